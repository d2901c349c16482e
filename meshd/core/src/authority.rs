//! Certificate authorities as the mesh knows them, what nodes are told to trust, and how one authority takes
//! the place of another.
//!
//! A rotation has two phases and an end: *trust* (everybody learns the new authority, nothing is issued by
//! it), *issue* (leaves are renewed under the new one), then the old one is dropped. No step is taken before
//! every leaf in use verifies under every bundle in use, before and after it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::ids::{KeyId, NodeId, Serial};
use crate::time::UtcTime;

/// An authority and where it stands.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Authority {
    pub key_id: KeyId,
    /// Of a root: its self-signed certificate.
    #[serde(with = "crate::bytes::vec")]
    pub der: Vec<u8>,
    pub is_root: bool,
    /// The root that signed an issuing authority; a root's own.
    pub root: KeyId,
    pub standing: Standing,
    /// A root whose key was written to an encrypted file. Only then may the key here be removed.
    pub exported: bool,
    /// Its key is not on the controller.
    pub sealed: bool,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.is_root { "root" } else { "issuing" };
        write!(f, "Authority({kind} {}, {:?})", self.key_id, self.standing)
    }
}

/// What an authority is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// Trusted, so that it may issue later.
    Announced,
    /// Issues; of a root: signed the one that does.
    Active,
    /// Trusted for what it issued before.
    Retiring,
    /// Nobody trusts it any more.
    Retired,
    /// Its introduction was taken back.
    Withdrawn,
}

impl Standing {
    pub const fn is_trusted(self) -> bool {
        matches!(self, Standing::Announced | Standing::Active | Standing::Retiring)
    }

    /// Whether a leaf by it may be recorded: one that was signed a moment before the change still may.
    pub const fn may_issue(self) -> bool {
        matches!(self, Standing::Active | Standing::Retiring)
    }

    pub const fn as_str(self) -> &'static str {
        match self {
            Standing::Announced => "announced",
            Standing::Active => "active",
            Standing::Retiring => "retiring",
            Standing::Retired => "retired",
            Standing::Withdrawn => "withdrawn",
        }
    }
}

/// A root's name and key in a certificate that another root signed: whoever trusts the signer can follow.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cross {
    pub root: KeyId,
    pub by: KeyId,
    #[serde(with = "crate::bytes::vec")]
    pub der: Vec<u8>,
}

impl fmt::Debug for Cross {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cross({} by {})", self.root, self.by)
    }
}

/// What a node is told to trust, all at once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bundle {
    /// Rises by one with each change, from 1.
    pub version: u64,
    pub roots: BTreeSet<KeyId>,
    /// Issuing authority to its root.
    pub issuers: BTreeMap<KeyId, KeyId>,
    /// The one that issues now: who holds a leaf of another renews.
    pub issuer: KeyId,
}

impl Bundle {
    /// Whether a leaf by `issuer` verifies with this bundle alone.
    pub fn vouches_for(&self, issuer: &KeyId) -> bool {
        self.issuers.get(issuer).is_some_and(|root| self.roots.contains(root))
    }
}

/// What is replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RotationKind {
    /// The issuing authority, under the same root.
    Issuing,
    /// The root, and the issuing authority with it.
    Root,
}

impl RotationKind {
    pub const fn as_str(self) -> &'static str {
        match self {
            RotationKind::Issuing => "issuing",
            RotationKind::Root => "root",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The new authority is announced to everybody.
    Trust,
    /// It issues, and every leaf is renewed.
    Issue,
}

impl Phase {
    pub const fn as_str(self) -> &'static str {
        match self {
            Phase::Trust => "trust",
            Phase::Issue => "issue",
        }
    }
}

/// A change of authorities under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rotation {
    pub kind: RotationKind,
    pub phase: Phase,
    /// The issuing authority that goes; after an abort in phase `issue`, the one that came.
    pub from: KeyId,
    pub to: KeyId,
    pub from_root: KeyId,
    pub to_root: KeyId,
    /// The controller takes the next step by itself once it may.
    pub auto: bool,
    /// On its way back.
    pub aborted: bool,
    pub started_at: UtcTime,
    pub phase_at: UtcTime,
    /// The bundle that every node must have taken up before the next step.
    pub version: u64,
}

/// A leaf in use that a bundle in use does not vouch for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "certificate {serial} of issuer {issuer} would not verify with bundle {version}, which node {holder} may use"
)]
pub struct Gap {
    pub serial: Serial,
    pub issuer: KeyId,
    pub holder: NodeId,
    pub version: u64,
}

/// Looks for a leaf in use that some bundle in use does not vouch for. `issuers` maps each issuer of a leaf
/// in use to one such leaf; `bundles` are those in use, each with somebody who may use it.
pub fn find_gap<'a>(
    issuers: &BTreeMap<KeyId, Serial>,
    bundles: impl IntoIterator<Item = (&'a Bundle, NodeId)>,
) -> Option<Gap> {
    bundles.into_iter().find_map(|(bundle, holder)| {
        let (issuer, serial) = issuers.iter().find(|(issuer, _)| !bundle.vouches_for(issuer))?;
        Some(Gap { serial: *serial, issuer: issuer.clone(), holder, version: bundle.version })
    })
}

/// What keeps a rotation from its next step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Waiting {
    /// Nodes with a live identity that have not taken up the bundle.
    pub nodes: Vec<NodeId>,
    /// Leaves in use by an authority that is to go.
    pub leaves: Vec<Serial>,
    /// Authorities that have no CRL yet.
    pub crls: Vec<KeyId>,
    /// Nodes that are away for longer than their identity lives. Nobody waits for them; they come back by
    /// the history of roots.
    pub away: Vec<NodeId>,
}

impl Waiting {
    /// Whether the next step may be taken.
    pub fn is_over(&self) -> bool {
        self.nodes.is_empty() && self.leaves.is_empty() && self.crls.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(byte: u8) -> KeyId {
        KeyId(vec![byte; 20])
    }

    #[test]
    fn a_bundle_vouches_only_for_a_known_issuer_below_a_trusted_root() {
        let bundle = Bundle {
            version: 1,
            roots: [key(1)].into(),
            issuers: [(key(10), key(1)), (key(20), key(2))].into(),
            issuer: key(10),
        };
        assert!(bundle.vouches_for(&key(10)));
        assert!(!bundle.vouches_for(&key(20)), "its root is not trusted");
        assert!(!bundle.vouches_for(&key(30)), "it is not known");
    }

    #[test]
    fn a_gap_names_leaf_and_holder() {
        let bundle = |version, root| Bundle {
            version,
            roots: [key(root)].into(),
            issuers: [(key(root * 10), key(root))].into(),
            issuer: key(root * 10),
        };
        let (old, new) = (bundle(1, 1), bundle(2, 2));
        let leaves = BTreeMap::from([(key(10), Serial([7; 16]))]);
        assert_eq!(find_gap(&leaves, [(&old, NodeId(1))]), None);
        let gap = find_gap(&leaves, [(&old, NodeId(1)), (&new, NodeId(2))]).unwrap();
        assert_eq!((gap.serial, gap.holder, gap.version), (Serial([7; 16]), NodeId(2), 2));
    }
}
