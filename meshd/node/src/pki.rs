//! Whom this node believes: its pinned roots, the issuing CAs it was told of, and the newest CRLs.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use mesh_ca::{
    ChainError, Crl, ExpiredCrl, Identity as Speaker, LeafKey, Profile, RevocationList, RevocationLists,
    TrustAnchors, TrustDomain, Usage, VerifiedLeaf, verify_chain,
};
use mesh_proto::v1 as pb;
use rustls_pki_types::CertificateDer;
use time::UtcDateTime;

use crate::limits::{CERTIFICATE_BYTES_MAX, CRL_BYTES_MAX, CRLS_MAX, ISSUERS_MAX, ROOTS_MAX};
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
    list: RevocationList,
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
        let anchors = anchors_of(identity)?;
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
        let list = RevocationList::from_der(&message.der).map_err(TrustError::Chain)?;
        self.crls.insert(key, TrustedCrl { crl, message, list });
        let lists = self.crls.values().map(|trusted| trusted.list.clone());
        self.revocation = RevocationLists::of(lists, ExpiredCrl::Accept).ok().map(Arc::new);
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
    identity: &Identity,
    issuers: &[Der],
    leaf: &[u8],
    key: &LeafKey,
    now: UtcDateTime,
) -> Result<VerifiedLeaf, TrustError> {
    let anchors = anchors_of(identity)?;
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
    let anchors = anchors_of(identity)?;
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

/// The roots of an identity: those with the pinned key, and those that the signed history leads to from there.
fn anchors_of(identity: &Identity) -> Result<TrustAnchors, TrustError> {
    let name = &identity.trust_domain;
    let domain = TrustDomain::parse(name).map_err(|_| TrustError::Domain(name.clone()))?;
    let roots: Vec<&[u8]> = identity.roots.iter().map(|root| root.0.as_slice()).collect();
    let pinned: Vec<&[u8]> =
        roots.iter().copied().filter(|root| key_hash_of(&domain, root) == Some(identity.root_pin)).collect();
    if pinned.is_empty() {
        return Err(TrustError::Pin);
    }
    let lineage: Vec<&[u8]> = identity.lineage.iter().map(|link| link.0.as_slice()).collect();
    let believed = mesh_ca::vouched_roots(&pinned, &roots, &lineage, None);
    TrustAnchors::new(domain, believed).map_err(TrustError::Chain)
}

/// SHA-256 of a self-signed root's key.
fn key_hash_of(domain: &TrustDomain, root: &[u8]) -> Option<[u8; 32]> {
    TrustAnchors::new(domain.clone(), [root]).ok()?.root_key_hashes().next()
}

/// Whether `pin` is the key of a root of `identity`.
pub(crate) fn has_root(identity: &Identity, pin: &[u8; 32]) -> bool {
    identity.root_pin == *pin
        || anchors_of(identity).is_ok_and(|anchors| anchors.root_key_hashes().any(|h| h == *pin))
}

/// `identity` with what the controller says is to be trusted now. A root counts only if a root in `trusted` leads to
/// it; the pin moves when its root has gone. A bundle with a root that was left out is not taken up: its version is not
/// noted, so that nobody counts on this node.
///
/// # Errors
/// [`TrustError::Pin`] if no root of the bundle can be reached: nothing is believed then.
pub(crate) fn with_bundle(
    identity: &Identity,
    trusted: &[Der],
    bundle: &pb::TrustBundle,
    now: UtcDateTime,
) -> Result<Identity, TrustError> {
    if bundle.issuers.len() > ISSUERS_MAX || bundle.roots.len() > ROOTS_MAX {
        return Err(TrustError::TooManyIssuers(bundle.issuers.len().max(bundle.roots.len())));
    }
    let all = bundle.roots.iter().chain(&bundle.issuers).chain(&bundle.lineage);
    if let Some(large) = all.into_iter().find(|der| der.len() > CERTIFICATE_BYTES_MAX) {
        return Err(TrustError::TooLarge(large.len()));
    }
    let name = &identity.trust_domain;
    let domain = TrustDomain::parse(name).map_err(|_| TrustError::Domain(name.clone()))?;
    let slices = |list: &'_ [bytes::Bytes]| -> Vec<Vec<u8>> { list.iter().map(|der| der.to_vec()).collect() };
    let (roots, lineage) = (slices(&bundle.roots), slices(&bundle.lineage));
    let roots: Vec<&[u8]> = roots.iter().map(Vec::as_slice).collect();
    let lineage: Vec<&[u8]> = lineage.iter().map(Vec::as_slice).take(mesh_ca::LINEAGE_MAX).collect();
    let trusted: Vec<&[u8]> = trusted.iter().map(|root| root.0.as_slice()).collect();
    let believed = mesh_ca::vouched_roots(&trusted, &roots, &lineage, Some(now));
    let hashes: Vec<[u8; 32]> = believed.iter().filter_map(|root| key_hash_of(&domain, root)).collect();
    let root_pin = match hashes.contains(&identity.root_pin) {
        true => identity.root_pin,
        // The controller names the root that signs now first.
        false => *hashes.first().ok_or(TrustError::Pin)?,
    };
    // Our own issuer leads: it goes with our certificate.
    let mut issuers: Vec<Der> = bundle.issuers.iter().map(|der| Der(der.to_vec())).collect();
    issuers.sort_by_key(|issuer| !mesh_ca::is_signed_by(&identity.leaf.0, &issuer.0));
    Ok(Identity {
        root_pin,
        roots: believed.iter().map(|root| Der(root.to_vec())).collect(),
        issuers,
        lineage: lineage.iter().map(|link| Der(link.to_vec())).collect(),
        bundle: if believed.len() == roots.len() { bundle.version } else { identity.bundle },
        active_issuer: bundle.issuer_key_id.to_vec(),
        ..identity.clone()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestMesh;

    fn mesh() -> TestMesh {
        TestMesh::new(UtcDateTime::from_unix_timestamp(1_800_000_000).unwrap())
    }

    /// As the state folder keeps it.
    fn stored(identity: &Identity) -> Identity {
        serde_json::from_slice(&serde_json::to_vec(identity).unwrap()).unwrap()
    }

    fn pins(identity: &Identity) -> Vec<[u8; 32]> {
        anchors_of(identity).unwrap().root_key_hashes().collect()
    }

    #[test]
    fn the_pin_moves_along_the_signed_history_and_only_when_its_root_has_gone() {
        let mesh = mesh();
        let (next, [overlap, alone]) = mesh.successor();
        let before = mesh.node(1, "alpha");
        let both = stored(&with_bundle(&before, &before.roots, &overlap, mesh.now).unwrap());
        assert_eq!((both.root_pin, pins(&both).len(), both.bundle), (before.root_pin, 2, 2));
        assert_eq!(both.issuers[0], before.issuers[0], "our own issuer leads");
        assert!(has_root(&both, &next.node(1, "alpha").root_pin), "a token may pin either");
        let after = stored(&with_bundle(&both, &both.roots, &alone, mesh.now).unwrap());
        assert_eq!(after.root_pin, next.node(1, "alpha").root_pin);
        assert_eq!(pins(&after), [after.root_pin]);
        // Whoever slept through all of it gets there in one step.
        let slept = with_bundle(&before, &before.roots, &alone, mesh.now).unwrap();
        assert_eq!(slept.root_pin, after.root_pin);
    }

    #[test]
    fn a_root_that_no_pinned_root_leads_to_is_not_believed_whoever_says_so() {
        let mesh = mesh();
        let (_, [overlap, alone]) = mesh.successor();
        let own = mesh.node(1, "alpha");
        let refused = |bundle: &pb::TrustBundle| with_bundle(&own, &own.roots, bundle, mesh.now).map(drop);
        let unvouched = pb::TrustBundle { lineage: Vec::new(), ..alone.clone() };
        assert_eq!(refused(&unvouched), Err(TrustError::Pin));
        let (_, [foreign, _]) = self::mesh().successor();
        let by_others = pb::TrustBundle { lineage: foreign.lineage, ..alone.clone() };
        assert_eq!(refused(&by_others), Err(TrustError::Pin));
        assert_eq!(refused(&pb::TrustBundle { roots: Vec::new(), ..alone.clone() }), Err(TrustError::Pin));
        let late = mesh.now + mesh_ca::ROOT_LIFETIME + std::time::Duration::from_secs(86_400);
        assert_eq!(with_bundle(&own, &own.roots, &alone, late).map(drop), Err(TrustError::Pin));
        // Beside a good one it is left out.
        let unvouched = pb::TrustBundle { lineage: Vec::new(), ..overlap.clone() };
        let taken = with_bundle(&own, &own.roots, &unvouched, mesh.now).unwrap();
        assert_eq!(pins(&taken), [own.root_pin]);
        assert_eq!(taken.bundle, own.bundle, "what was left out is not acknowledged");
        let many =
            pb::TrustBundle { roots: vec![overlap.roots[0].clone(); ROOTS_MAX + 1], ..overlap.clone() };
        assert!(matches!(refused(&many), Err(TrustError::TooManyIssuers(_))));
        let large = pb::TrustBundle { roots: vec![vec![0x30; CERTIFICATE_BYTES_MAX + 1].into()], ..overlap };
        assert!(matches!(refused(&large), Err(TrustError::TooLarge(_))));
    }

    #[test]
    fn a_stored_root_without_its_history_is_not_believed() {
        let mesh = mesh();
        let (next, [overlap, _]) = mesh.successor();
        let own = mesh.node(1, "alpha");
        let both = with_bundle(&own, &own.roots, &overlap, mesh.now).unwrap();
        let tampered = Identity { lineage: Vec::new(), ..both };
        assert_eq!(pins(&tampered), [own.root_pin]);
        let swapped = Identity { roots: next.node(1, "alpha").roots, ..tampered };
        assert_eq!(anchors_of(&swapped).map(drop), Err(TrustError::Pin));
    }
}
