//! Listings of certificates: those that live out of World, all others out of the index, found by their end, their owner or a
//! name, and purged when they have ended long ago.

use mesh_core::{CertificateRecord, NodeId, Owner, Serial, UtcTime, World};
use mesh_proto::v1 as pb;
use mesh_store::index::VALUE_BYTES_MAX;
use mesh_store::{Index, IndexError, IndexOp, Order, Page, Table};
use prost::Message as _;

use super::{REVOKED_SUFFIX, sortable, unsortable};
use crate::limits::{INDEX_SCAN_MAX, PAGE_SIZE_MAX};
use crate::service::messages::{issued_message, judged_message};

const SERIAL_BYTES: usize = 16;
/// Octets of the end and the serial, which every key ends with.
const TAIL_BYTES: usize = 8 + SERIAL_BYTES;
/// Octets of a record's number in front of what is kept of a certificate.
const SEQ_BYTES: usize = 8;

/// Where a listing looks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Scope {
    All,
    /// A node's identities and services.
    Node(NodeId),
    /// A DNS name, an address, or the name of a pair.
    Name(String),
}

/// What a certificate is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    Ok,
    Revoked,
    Ended,
}

/// One page of a listing.
#[derive(Debug, Clone)]
pub(crate) struct Query {
    pub(crate) scope: Scope,
    /// Any of these.
    pub(crate) states: Vec<State>,
    /// Hexadecimal digits that the issuer's key id begins with; empty for any.
    pub(crate) issuer: String,
    /// Only those that end at this time or before.
    pub(crate) until: Option<UtcTime>,
    pub(crate) now: UtcTime,
    /// Where the page before ended.
    pub(crate) after: Option<Vec<u8>>,
    pub(crate) limit: usize,
}

/// A page of certificates, and where the next one begins. A page may be short, even empty, and not be the last.
#[derive(Debug)]
pub(crate) struct CertificatePage {
    pub(crate) certificates: Vec<pb::Certificate>,
    pub(crate) next: Option<Vec<u8>>,
}

impl Query {
    fn table(&self) -> (Table, Vec<u8>) {
        match &self.scope {
            Scope::All => (Table::CertificateByExpiry, Vec::new()),
            Scope::Node(id) => (Table::CertificateByOwner, id.0.to_be_bytes().to_vec()),
            Scope::Name(name) => (Table::CertificateByName, name_prefix(name)),
        }
    }

    /// Whether World knows all that is asked for.
    pub(crate) fn is_of_all_live(&self) -> bool {
        self.scope == Scope::All && self.states == [State::Ok]
    }

    /// What has not ended comes soonest end first; a listing with the past in it, latest end first.
    fn order(&self) -> Order {
        if self.states == [State::Ok] { Order::Ascending } else { Order::Descending }
    }

    /// The key, without the scope's prefix, after which the first page begins.
    fn start(&self) -> Option<Vec<u8>> {
        let at = |end: UtcTime, serial: u8| [&sortable(end.unix())[..], &[serial; SERIAL_BYTES]].concat();
        match self.order() {
            // What ends now has ended.
            Order::Ascending => Some(at(self.now, 0xff)),
            Order::Descending if self.states == [State::Ended] => Some(at(UtcTime(self.now.0 + 1), 0)),
            Order::Descending => self.until.map(|until| at(UtcTime(until.0 + 1), 0)),
        }
    }

    /// Whether nothing after a certificate with this end can match any more.
    fn is_past(&self, not_after: i64) -> bool {
        self.order() == Order::Ascending && self.until.is_some_and(|until| not_after > until.unix())
    }

    fn matches(&self, certificate: &pb::Certificate) -> bool {
        self.states.contains(&state(certificate, self.now))
            && self.until.is_none_or(|until| certificate.not_after <= until.unix())
            && self.is_of_issuer(&certificate.issuer_key_id)
    }

    fn is_of_issuer(&self, key_id: &[u8]) -> bool {
        self.issuer.is_empty() || hex::encode(key_id).starts_with(&self.issuer)
    }
}

/// Revoked stays revoked, also past the end.
pub(crate) fn state(certificate: &pb::Certificate, now: UtcTime) -> State {
    match certificate.revoked_at {
        0 if certificate.not_after > now.unix() => State::Ok,
        0 => State::Ended,
        _ => State::Revoked,
    }
}

/// One page of all that is live: World has it in the order that is asked for, so that a listing among a million is not a
/// thousand look-ups on disk. Looks at no more than [`INDEX_SCAN_MAX`] certificates.
pub(crate) fn find_live(world: &World, query: &Query) -> CertificatePage {
    let limit = query.limit.clamp(1, PAGE_SIZE_MAX);
    let after =
        query.after.as_deref().and_then(position).unwrap_or((query.now, Serial([0xff; SERIAL_BYTES])));
    let mut certificates = Vec::new();
    for (scanned, certificate) in (1..).zip(world.certificates_by_end(after)) {
        if query.is_past(certificate.not_after.unix()) {
            break;
        }
        if certificate.is_live(query.now) && query.is_of_issuer(&certificate.issuer_key_id.0) {
            certificates.push(judged_message(world, certificate, query.now));
        }
        if certificates.len() == limit || scanned == INDEX_SCAN_MAX {
            let next = [&sortable(certificate.not_after.unix())[..], &certificate.serial.0].concat();
            return CertificatePage { certificates, next: Some(next) };
        }
    }
    CertificatePage { certificates, next: None }
}

/// One page. Looks at no more than [`INDEX_SCAN_MAX`] entries.
pub(super) fn find(index: &Index, query: &Query) -> Result<CertificatePage, IndexError> {
    let limit = query.limit.clamp(1, PAGE_SIZE_MAX);
    let (table, prefix) = query.table();
    let with_prefix = |tail: Vec<u8>| [&prefix[..], &tail].concat();
    let mut after = query.after.clone().or_else(|| query.start()).map(with_prefix);
    let (mut certificates, mut scanned) = (Vec::new(), 0);
    while scanned < INDEX_SCAN_MAX {
        let page =
            Page { prefix: prefix.clone(), after, limit: PAGE_SIZE_MAX.min(limit * 2), order: query.order() };
        let entries = index.page(table, &page)?;
        let is_last = entries.len() < page.limit;
        scanned += entries.len();
        let count = entries.len();
        after = None;
        for (number, (key, value)) in entries.into_iter().enumerate() {
            if let Some(certificate) = certificate(index, &value)? {
                if query.is_past(certificate.not_after) {
                    return Ok(CertificatePage { certificates, next: None });
                }
                if query.matches(&certificate) {
                    certificates.push(certificate);
                }
            }
            let tail = key[prefix.len()..].to_vec();
            if certificates.len() == limit {
                let more = number + 1 < count || !is_last;
                return Ok(CertificatePage { certificates, next: more.then_some(tail) });
            }
            after = Some(key);
        }
        if is_last {
            return Ok(CertificatePage { certificates, next: None });
        }
    }
    let next = after.map(|key| key[prefix.len()..].to_vec());
    Ok(CertificatePage { certificates, next })
}

/// The certificate that an entry names, with its revocation.
fn certificate(index: &Index, value: &[u8]) -> Result<Option<pb::Certificate>, IndexError> {
    let serial = &value[..value.len().min(SERIAL_BYTES)];
    let Some(stored) = index.get(Table::CertificateBySerial, serial)? else { return Ok(None) };
    let Some((_, mut certificate)) = unstored(&stored) else { return Ok(None) };
    let key = [serial, &[REVOKED_SUFFIX]].concat();
    if let Some(revocation) = index.get(Table::CertificateBySerial, &key)?
        && let Ok(revocation) = pb::Certificate::decode(&*revocation)
    {
        certificate.revoked_at = revocation.revoked_at;
        certificate.reason = revocation.reason;
    }
    Ok(Some(certificate))
}

/// The entries of a certificate that record `seq` issued.
pub(super) fn issued_ops(domain: &str, seq: u64, certificate: &CertificateRecord) -> Vec<IndexOp> {
    let mut message = issued_message(domain, certificate);
    if message.encoded_len() + SEQ_BYTES > VALUE_BYTES_MAX {
        // A few hundred long names; the certificate itself says them.
        message.names.clear();
    }
    let serial = certificate.serial.0;
    let mut ops = vec![IndexOp::insert(Table::CertificateBySerial, serial, stored(seq, &message))];
    let owner = match &certificate.owner {
        Owner::Node(id) | Owner::Service { node: id, .. } => Some(*id),
        _ => None,
    };
    let keys = keys(owner, &message);
    // With the owner, whose name says nothing about his number once he is gone.
    let value = [&serial[..], &owner.map_or_else(Vec::new, |id| id.0.to_be_bytes().to_vec())].concat();
    ops.extend(keys.into_iter().map(|(table, key)| IndexOp::insert(table, key, value.clone())));
    ops
}

/// A certificate as it is kept: the record that issued it, and what a listing says of it.
fn stored(seq: u64, message: &pb::Certificate) -> Vec<u8> {
    let mut value = Vec::with_capacity(SEQ_BYTES + message.encoded_len());
    value.extend_from_slice(&seq.to_be_bytes());
    message.encode_raw(&mut value);
    value
}

/// What [`stored`] made.
pub(super) fn unstored(value: &[u8]) -> Option<(u64, pb::Certificate)> {
    let (seq, message) = value.split_first_chunk()?;
    Some((u64::from_be_bytes(*seq), pb::Certificate::decode(message).ok()?))
}

/// All keys of the listings that lead to a certificate.
fn keys(owner: Option<NodeId>, message: &pb::Certificate) -> Vec<(Table, Vec<u8>)> {
    let tail = [&sortable(message.not_after)[..], &message.serial].concat();
    let with = |prefix: &[u8]| [prefix, &tail].concat();
    let mut keys = vec![(Table::CertificateByExpiry, with(&[]))];
    keys.extend(owner.map(|id| (Table::CertificateByOwner, with(&id.0.to_be_bytes()))));
    let mut names: Vec<&str> =
        message.names.iter().map(String::as_str).chain([message.name.as_str()]).collect();
    names.sort_unstable();
    names.dedup();
    names.retain(|name| !name.is_empty());
    keys.extend(names.into_iter().map(|name| (Table::CertificateByName, with(&name_prefix(name)))));
    keys
}

/// No name holds the octet 0, so none is the beginning of another.
fn name_prefix(name: &str) -> Vec<u8> {
    [name.to_ascii_lowercase().as_bytes(), &[0]].concat()
}

/// Removes what ended before `before`, a page's worth at most; returns how many certificates that were.
pub(super) fn purge(index: &mut Index, before: UtcTime) -> Result<usize, IndexError> {
    let page = Page { limit: PAGE_SIZE_MAX, ..Page::default() };
    let entries = index.page(Table::CertificateByExpiry, &page)?;
    let bound = sortable(before.unix());
    let (mut ops, mut count) = (Vec::new(), 0);
    for (key, value) in entries.into_iter().take_while(|(key, _)| key[..8.min(key.len())] < bound[..]) {
        let (serial, owner) = value.split_at(value.len().min(SERIAL_BYTES));
        let owner = owner.try_into().ok().map(|id| NodeId(u32::from_be_bytes(id)));
        if let Some(message) = index.get(Table::CertificateBySerial, serial)?
            && let Some((_, message)) = unstored(&message)
        {
            ops.extend(keys(owner, &message).into_iter().map(|(table, key)| IndexOp::remove(table, key)));
        }
        ops.push(IndexOp::remove(Table::CertificateByExpiry, key));
        ops.push(IndexOp::remove(Table::CertificateBySerial, serial));
        ops.push(IndexOp::remove(Table::CertificateBySerial, [serial, &[REVOKED_SUFFIX]].concat()));
        count += 1;
    }
    if count > 0 {
        let head = index.applied();
        index.apply(&head, &ops)?;
    }
    Ok(count)
}

/// Whether a page token can be one of ours.
pub(crate) fn is_cursor(bytes: &[u8]) -> bool {
    bytes.len() == TAIL_BYTES
}

/// The end and the serial that a cursor stands for.
fn position(cursor: &[u8]) -> Option<(UtcTime, Serial)> {
    let (end, serial) = cursor.split_first_chunk()?;
    Some((UtcTime(unsortable(*end)), Serial::try_from(serial).ok()?))
}

#[cfg(test)]
mod tests;
