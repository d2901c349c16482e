//! CRL shards: which one a new certificate joins, which ones must be signed, and what each lists.
//!
//! Shards are opened in groups that are never closed or moved; a certificate stays in the shard of its issuance. A group
//! fixes the base of its addresses, so a changed base opens new shards and old certificates keep theirs. Shard 0 is that of
//! certificates that name no CRL; a CRL without an address speaks for its whole issuer (RFC 5280 §5.2.5), and verifiers take
//! it for every certificate. So once other shards exist it lists their entries too, until the last certificate
//! of shard 0 has ended.

use serde::{Deserialize, Serialize};

use super::{CrlState, World};
use crate::certificate::Reason;
use crate::change::Change;
use crate::command::Command;
use crate::ids::{KeyId, Serial};
use crate::limits::{BASE_URL_CHARS_MAX, CERTIFICATES_PER_SHARD, CRL_SHARDS_MAX, CRL_SHARDS_PER_GROUP_MAX};
use crate::refusal::Refusal;
use crate::time::UtcTime;
use crate::world::Decision;

/// Shards that were opened together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardGroup {
    /// From 1.
    pub first: u16,
    pub count: u16,
    /// Plain `http` address before `/crl/…`, without a final slash.
    pub base_url: String,
}

impl ShardGroup {
    fn contains(&self, shard: u16) -> bool {
        shard >= self.first && shard - self.first < self.count
    }
}

/// Where a certificate that is being made belongs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub shard: u16,
    /// What the certificate's pointers begin with; `None` in a mesh without published CRLs.
    pub base_url: Option<String>,
}

/// Path of a CRL below the base address.
pub fn crl_path(issuer: &KeyId, shard: u16) -> String {
    format!("/crl/{issuer}/{shard}.crl")
}

impl World {
    /// The groups of one issuer, oldest first.
    pub fn shard_groups(&self, issuer: &KeyId) -> &[ShardGroup] {
        self.state.shard_groups.get(issuer).map_or(&[], Vec::as_slice)
    }

    /// The shard of a new certificate: in the emptiest group of the newest base address, by the serial's last octets,
    /// which are random.
    pub fn place_for(&self, issuer: &KeyId, serial: &Serial) -> Place {
        let Some((group, _)) = self.emptiest_group(issuer) else {
            return Place { shard: 0, base_url: None };
        };
        let tail = u16::from_be_bytes([serial.0[14], serial.0[15]]);
        Place { shard: group.first + tail % group.count, base_url: Some(group.base_url.clone()) }
    }

    /// The address in the certificates of a shard, and in its CRL; `None` for shard 0.
    pub fn crl_url(&self, issuer: &KeyId, shard: u16) -> Option<String> {
        let group = self.shard_groups(issuer).iter().find(|group| group.contains(shard))?;
        Some(format!("{}{}", group.base_url, crl_path(issuer, shard)))
    }

    /// The shards that need a CRL: those a new certificate may join, and those that still have one. Ascending.
    pub fn crl_shards(&self, issuer: &KeyId) -> Vec<u16> {
        let groups = self.shard_groups(issuer);
        let Some(newest) = groups.last() else { return vec![0] };
        let mut shards: Vec<u16> = (self.shard_size(issuer, 0) > 0).then_some(0).into_iter().collect();
        let issues = self.is_trusted(issuer);
        for group in groups {
            let open = issues && group.base_url == newest.base_url;
            let range = group.first..group.first + group.count;
            shards.extend(range.filter(|shard| open || self.shard_size(issuer, *shard) > 0));
        }
        shards
    }

    /// Whether new certificates of `issuer` need more shards.
    pub fn shards_are_full(&self, issuer: &KeyId) -> bool {
        self.emptiest_group(issuer)
            .is_some_and(|(group, size)| size >= usize::from(group.count) * CERTIFICATES_PER_SHARD)
    }

    /// What the next CRL of a shard must list: revoked, and not yet on a CRL signed after their expiry
    /// (RFC 5280 §3.3), by serial.
    pub fn revoked_entries(&self, issuer: &KeyId, shard: u16) -> Vec<(Serial, UtcTime, Reason)> {
        // Without an address a CRL speaks for every shard.
        let shards = if shard == 0 { 0..=u16::MAX } else { shard..=shard };
        let of_issuer = self.index.revoked.get(issuer);
        let lists = of_issuer.into_iter().flat_map(|of_issuer| of_issuer.range(shards.clone()));
        let mut entries = Vec::new();
        for (shard, listed) in lists {
            let newest = self.crl(issuer, *shard).map(|crl| crl.this_update);
            let stays =
                listed.iter().filter(|(_, entry)| newest.is_none_or(|newest| newest < entry.not_after));
            entries.extend(stays.map(|(serial, entry)| (*serial, entry.revoked.at, entry.revoked.reason)));
        }
        entries.sort_unstable_by_key(|(serial, ..)| *serial);
        entries
    }

    /// Whether the newest CRL of a shard lists every revocation that it speaks for.
    pub fn crl_is_complete(&self, issuer: &KeyId, shard: u16) -> bool {
        let revoked = self.state.revoked_seq.get(issuer);
        let last = match shard {
            0 => revoked.and_then(|shards| shards.values().max()),
            _ => revoked.and_then(|shards| shards.get(&shard)),
        };
        match (self.crl(issuer, shard), last) {
            (Some(crl), Some(last)) => crl.covers_seq >= *last,
            (crl, None) => crl.is_some(),
            (None, Some(_)) => false,
        }
    }

    /// The newest CRL of one shard.
    pub fn crl(&self, issuer: &KeyId, shard: u16) -> Option<&CrlState> {
        self.state.crls.get(issuer)?.get(&shard)
    }

    /// The newest CRL of every issuer and shard that still needs one.
    pub fn crls(&self) -> impl Iterator<Item = &CrlState> {
        self.state.crls.iter().flat_map(|(issuer, shards)| {
            let needed = self.crl_shards(issuer);
            shards.iter().filter(move |(shard, _)| needed.binary_search(shard).is_ok()).map(|(_, crl)| crl)
        })
    }

    /// 0 before the first CRL.
    pub fn last_crl_number(&self, issuer: &KeyId, shard: u16) -> u64 {
        self.crl(issuer, shard).map_or(0, |crl| crl.number)
    }

    pub(super) fn has_shard(&self, issuer: &KeyId, shard: u16) -> bool {
        match self.shard_groups(issuer) {
            [] => shard == 0,
            groups => groups.iter().any(|group| group.contains(shard)),
        }
    }

    pub(super) fn decide_open_shards(&self, command: &Command) -> Result<Decision, Refusal> {
        let Command::OpenCrlShards { issuer_key_id, count, base_url } = command else {
            return Ok(Decision::AlreadyDone);
        };
        let issuer = self.authority(issuer_key_id).filter(|ca| !ca.is_root);
        if issuer.is_none() {
            return Err(Refusal::IssuerUnknown { issuer: issuer_key_id.clone() });
        }
        if *count == 0 || *count > CRL_SHARDS_PER_GROUP_MAX || !is_base_url(base_url) {
            return Err(Refusal::CrlMismatch { what: "its shards have no usable number or address" });
        }
        let groups = self.shard_groups(issuer_key_id);
        let newest = groups.last();
        if newest.is_some_and(|newest| newest.base_url == *base_url) && !self.shards_are_full(issuer_key_id) {
            return Ok(Decision::AlreadyDone);
        }
        let first = newest.map_or(1, |newest| newest.first + newest.count);
        if first.checked_add(*count).is_none_or(|end| end > CRL_SHARDS_MAX) {
            return Err(Refusal::Limit {
                what: "CRL shards of one issuer",
                max: usize::from(CRL_SHARDS_MAX),
            });
        }
        let group = ShardGroup { first, count: *count, base_url: base_url.clone() };
        Ok(Decision::Changes(vec![Change::CrlShardsOpened { issuer_key_id: issuer_key_id.clone(), group }]))
    }

    /// With the number of its certificates.
    fn emptiest_group(&self, issuer: &KeyId) -> Option<(&ShardGroup, usize)> {
        let newest = self.shard_groups(issuer).last()?;
        let open = self.group_sizes(issuer).filter(|(group, _)| group.base_url == newest.base_url);
        open.min_by_key(|(group, size)| size / usize::from(group.count))
    }

    /// Every group with the number of its certificates. One walk over both: this is asked for each certificate.
    fn group_sizes(&self, issuer: &KeyId) -> impl Iterator<Item = (&ShardGroup, usize)> {
        let mut sizes = self.index.shard_sizes.get(issuer).into_iter().flatten().peekable();
        // Groups stand in the order of their shards.
        self.shard_groups(issuer).iter().map(move |group| {
            while sizes.next_if(|(shard, _)| **shard < group.first).is_some() {}
            let mut total = 0;
            while let Some((_, size)) = sizes.next_if(|(shard, _)| group.contains(**shard)) {
                total += size;
            }
            (group, total)
        })
    }

    /// Certificates of a shard that World remembers.
    fn shard_size(&self, issuer: &KeyId, shard: u16) -> usize {
        self.index.shard_sizes.get(issuer).and_then(|shards| shards.get(&shard)).copied().unwrap_or(0)
    }
}

/// `http://host[:port][/path]`, no final slash, nothing that needs escaping in a URL.
pub fn is_base_url(text: &str) -> bool {
    let Some(rest) = text.strip_prefix("http://") else { return false };
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    text.len() <= BASE_URL_CHARS_MAX
        && !host.is_empty()
        && host.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b':' | b'[' | b']'))
        && !rest.ends_with('/')
        && path.split('/').all(|part| part != "." && part != "..")
        && path.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b'~' | b'/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_base_address_is_plain_http_without_surprises() {
        for good in
            ["http://pki.mesh.internal", "http://192.0.2.1:8080", "http://[fd00::1]:80/pki", "http://a/b/c"]
        {
            assert!(is_base_url(good), "{good}");
        }
        for bad in [
            "",
            "https://a",
            "http://",
            "http:///a",
            "http://a/",
            "http://a b",
            "http://a?x",
            "http://a#x",
            "http://u@a",
            "http://a/../b",
            "HTTP://a",
            "http://a/%2e",
            "ftp://a",
        ] {
            assert!(!is_base_url(bad), "{bad}");
        }
        assert!(!is_base_url(&format!("http://{}", "a".repeat(BASE_URL_CHARS_MAX))));
    }
}
