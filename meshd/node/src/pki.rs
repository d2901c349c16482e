//! Whom this node believes: its pinned roots, the issuing CAs it was told of, and the newest CRLs.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use mesh_ca::{
    ChainError, Crl, ExpiredCrl, Identity as Speaker, LeafKey, Profile, RevocationLists, TrustAnchors,
    TrustDomain, Usage, VerifiedLeaf, verify_chain,
};
use mesh_proto::v1 as pb;
use rustls_pki_types::CertificateDer;
use time::UtcDateTime;

use crate::limits::{CERTIFICATE_BYTES_MAX, CRL_BYTES_MAX, CRLS_MAX, ISSUERS_MAX};
use crate::state::{Der, Identity};

/// What a valid chain says about a node. The only source of a peer's name, addresses and keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NodeLeaf {
    pub(crate) name: String,
    pub(crate) ipv4: Ipv4Addr,
    pub(crate) ipv6: Ipv6Addr,
    /// Newest first, one or two.
    pub(crate) wireguard_keys: Vec<[u8; 32]>,
    pub(crate) serial: Vec<u8>,
    pub(crate) not_before: UtcDateTime,
    pub(crate) not_after: UtcDateTime,
    /// The earliest end in the chain: the lease.
    pub(crate) chain_not_after: UtcDateTime,
}

/// Why a certificate or CRL is not believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TrustError {
    #[error("certificate is {0} bytes long, {CERTIFICATE_BYTES_MAX} is the limit")]
    TooLarge(usize),
    #[error("chain is refused")]
    Chain(#[source] ChainError),
    #[error("certificate is of profile {0}, not a node's")]
    NotNode(&'static str),
    #[error("certificate lacks an address or a WireGuard key")]
    Incomplete,
    #[error("no CRL is here yet")]
    NoCrl,
    #[error("roots do not have the pinned key")]
    Pin,
    #[error("trust domain {0:?} is not a name")]
    Domain(String),
    #[error("certificate is for another key")]
    OtherKey,
    #[error("there are {0} issuing CAs, {ISSUERS_MAX} is the limit")]
    TooManyIssuers(usize),
    #[error("CRL is of no CA that is known here")]
    CrlIssuer,
    #[error("CRL is {0} bytes long, {CRL_BYTES_MAX} is the limit")]
    CrlTooLarge(usize),
    #[error("CRL is not that of shard {0}")]
    CrlShard(u32),
    #[error("there are more than {CRLS_MAX} CRLs")]
    TooManyCrls,
}

/// A CRL that was verified.
#[derive(Debug, Clone)]
pub(crate) struct TrustedCrl {
    pub(crate) crl: Crl,
    pub(crate) message: pb::Crl,
}

/// The node's beliefs. Cheap to ask, replaced as a whole when something changes.
#[derive(Debug)]
pub(crate) struct Trust {
    anchors: Arc<TrustAnchors>,
    issuers: Vec<CertificateDer<'static>>,
    /// By issuer key id and shard.
    crls: BTreeMap<(Vec<u8>, u32), TrustedCrl>,
    revocation: Option<Arc<RevocationLists>>,
}

impl Trust {
    /// Believes the roots of `identity` as far as they have the key its join token pinned.
    ///
    /// # Errors
    /// [`TrustError::Pin`] if none has it: the file was changed by somebody else.
    pub(crate) fn of(identity: &Identity) -> Result<Self, TrustError> {
        let anchors = anchors(&identity.trust_domain, &identity.roots, &identity.root_pin)?;
        let issuers = identity.issuers.iter().map(|der| CertificateDer::from(der.0.clone())).collect();
        Ok(Self { anchors: Arc::new(anchors), issuers, crls: BTreeMap::new(), revocation: None })
    }

    pub(crate) fn anchors(&self) -> Arc<TrustAnchors> {
        self.anchors.clone()
    }

    pub(crate) fn revocation(&self) -> Option<Arc<RevocationLists>> {
        self.revocation.clone()
    }

    /// Adds issuing CAs that were told of. They are believed only as links to a pinned root. `true` if any is new.
    pub(crate) fn add_issuers<'a>(
        &mut self,
        issuers: impl IntoIterator<Item = &'a [u8]>,
    ) -> Result<bool, TrustError> {
        let mut added = false;
        for der in issuers {
            if der.len() > CERTIFICATE_BYTES_MAX {
                return Err(TrustError::TooLarge(der.len()));
            }
            if self.issuers.iter().any(|known| known.as_ref() == der) {
                continue;
            }
            if self.issuers.len() == ISSUERS_MAX {
                return Err(TrustError::TooManyIssuers(ISSUERS_MAX + 1));
            }
            self.issuers.push(CertificateDer::from(der.to_vec()));
            added = true;
        }
        Ok(added)
    }

    /// Takes a CRL if it is signed by a known CA and not older than the one that is here. `true` if it is new.
    pub(crate) fn take_crl(&mut self, message: &pb::Crl) -> Result<bool, TrustError> {
        if message.der.len() > CRL_BYTES_MAX {
            return Err(TrustError::CrlTooLarge(message.der.len()));
        }
        let crl = self
            .issuers
            .iter()
            .chain(self.anchors.root_ders())
            .find_map(|issuer| Crl::parse_verified(&message.der, issuer).ok())
            .ok_or(TrustError::CrlIssuer)?;
        // The shard is not signed, the address is: a CRL in the place of another would hide what that one lists.
        let of_shard = match crl.url() {
            Some(url) => url.as_str().ends_with(&format!("/{}.crl", message.shard)),
            None => message.shard == 0,
        };
        if !of_shard {
            return Err(TrustError::CrlShard(message.shard));
        }
        let key = (crl.issuer_key_id().as_bytes().to_vec(), message.shard);
        match self.crls.get(&key) {
            Some(known) if known.crl.number() >= crl.number() => return Ok(false),
            None if self.crls.len() == CRLS_MAX => return Err(TrustError::TooManyCrls),
            _ => {}
        }
        // What the message says about itself is not signed; what stands in the CRL is.
        let message = pb::Crl {
            issuer_key_id: key.0.clone().into(),
            shard: message.shard,
            number: crl.number(),
            der: message.der.clone(),
        };
        self.crls.insert(key, TrustedCrl { crl, message });
        let ders = self.crls.values().map(|trusted| &trusted.message.der);
        self.revocation = RevocationLists::new(ders, ExpiredCrl::Accept).ok().map(Arc::new);
        Ok(true)
    }

    pub(crate) fn crls(&self) -> impl Iterator<Item = &TrustedCrl> {
        self.crls.values()
    }

    pub(crate) fn crl_messages(&self) -> Vec<pb::Crl> {
        self.crls.values().map(|trusted| trusted.message.clone()).collect()
    }

    /// What is here, as the controller wants to hear it.
    pub(crate) fn crl_haves(&self) -> Vec<pb::CrlHave> {
        self.crls
            .values()
            .map(|trusted| pb::CrlHave {
                issuer_key_id: trusted.message.issuer_key_id.clone(),
                shard: trusted.message.shard,
                number: trusted.message.number,
            })
            .collect()
    }

    /// Whether one of `published` is newer than what is here.
    pub(crate) fn lacks(&self, published: &[pb::CrlHave]) -> bool {
        published.iter().any(|have| {
            let key = (have.issuer_key_id.to_vec(), have.shard);
            self.crls.get(&key).is_none_or(|known| known.crl.number() < have.number)
        })
    }

    /// Whether `serial` is on a CRL.
    pub(crate) fn is_revoked(&self, serial: &[u8]) -> bool {
        mesh_ca::SerialNumber::from_slice(serial)
            .is_ok_and(|serial| self.crls.values().any(|trusted| trusted.crl.contains(&serial)))
    }

    /// Judges a peer's leaf: chain to the pinned root now, profile `node`, on no CRL.
    ///
    /// # Errors
    /// [`TrustError::NoCrl`] as long as there is no CRL at all: nobody is believed on half the evidence.
    pub(crate) fn judge_node(&self, leaf: &[u8], now: UtcDateTime) -> Result<NodeLeaf, TrustError> {
        if leaf.len() > CERTIFICATE_BYTES_MAX {
            return Err(TrustError::TooLarge(leaf.len()));
        }
        let revocation = self.revocation.as_deref().ok_or(TrustError::NoCrl)?;
        let verified = verify_chain(leaf, &self.issuers, &self.anchors, now, Usage::Any, Some(revocation))
            .map_err(TrustError::Chain)?;
        node_leaf(&verified)
    }
}

/// Judges what the controller issued to this node itself: chain to the pinned root, the profile asked for, our key.
pub(crate) fn judge_own(
    trust_domain: &str,
    roots: &[Der],
    pin: &[u8; 32],
    issuers: &[Der],
    leaf: &[u8],
    key: &LeafKey,
    now: UtcDateTime,
) -> Result<VerifiedLeaf, TrustError> {
    let anchors = anchors(trust_domain, roots, pin)?;
    let issuers: Vec<_> = issuers.iter().map(|der| CertificateDer::from(der.0.as_slice())).collect();
    let verified =
        verify_chain(leaf, &issuers, &anchors, now, Usage::Any, None).map_err(TrustError::Chain)?;
    if verified.key_hash != key.key_hash() {
        return Err(TrustError::OtherKey);
    }
    Ok(verified)
}

/// The end and begin of our own leaf, also when it has expired.
pub(crate) fn read_own(identity: &Identity) -> Result<VerifiedLeaf, TrustError> {
    let anchors = anchors(&identity.trust_domain, &identity.roots, &identity.root_pin)?;
    let issuers: Vec<_> = identity.issuers.iter().map(|der| CertificateDer::from(der.0.as_slice())).collect();
    // The far future: the chain is then judged at the leaf's own end.
    let at = UtcDateTime::MAX;
    mesh_ca::verify_chain_expired_ok(&identity.leaf.0, &issuers, &anchors, at, Usage::Any, None)
        .map(|verified| verified.leaf)
        .map_err(TrustError::Chain)
}

/// The profile of `leaf` as a node's facts.
pub(crate) fn node_leaf(verified: &VerifiedLeaf) -> Result<NodeLeaf, TrustError> {
    let name = match (&verified.profile, &verified.identity) {
        (Profile::Node, Some(Speaker::Node { name })) => name.to_string(),
        (profile, _) => return Err(TrustError::NotNode(profile.name())),
    };
    let ipv4 = verified.ips.iter().find_map(|ip| match ip {
        IpAddr::V4(ip) => Some(*ip),
        IpAddr::V6(_) => None,
    });
    let ipv6 = verified.ips.iter().find_map(|ip| match ip {
        IpAddr::V6(ip) => Some(*ip),
        IpAddr::V4(_) => None,
    });
    let (Some(ipv4), Some(ipv6), false) = (ipv4, ipv6, verified.wireguard_keys.is_empty()) else {
        return Err(TrustError::Incomplete);
    };
    Ok(NodeLeaf {
        name,
        ipv4,
        ipv6,
        wireguard_keys: verified.wireguard_keys.clone(),
        serial: verified.serial.as_bytes().to_vec(),
        not_before: verified.not_before,
        not_after: verified.not_after,
        chain_not_after: verified.chain_not_after,
    })
}

fn anchors(domain: &str, roots: &[Der], pin: &[u8; 32]) -> Result<TrustAnchors, TrustError> {
    let domain = TrustDomain::parse(domain).map_err(|_| TrustError::Domain(domain.to_owned()))?;
    // A root that is not the pinned one is believed only once a rotation is vouched for, which the first form has not.
    let pinned: Vec<&Der> = roots
        .iter()
        .filter(|root| {
            TrustAnchors::new(domain.clone(), [&root.0])
                .is_ok_and(|anchors| anchors.root_key_hashes().any(|hash| hash == *pin))
        })
        .collect();
    if pinned.is_empty() {
        return Err(TrustError::Pin);
    }
    TrustAnchors::new(domain, pinned.iter().map(|root| &root.0)).map_err(TrustError::Chain)
}
