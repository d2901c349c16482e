//! Who sees what: the one function that full maps and deltas are both made of.

use std::collections::{BTreeMap, BTreeSet};

use crate::ids::{KeyId, NodeId, Serial};
use crate::names::{DnsName, Tag};
use crate::policy::RulesAbout;
use crate::world::{Identity, Node, NodeState, World, subject};

/// All that one node may see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    pub own: Own,
    pub peers: BTreeMap<NodeId, PeerView>,
}

/// What a node sees of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Own {
    pub tags: BTreeSet<Tag>,
    /// Service names that policy grants to it.
    pub granted: BTreeSet<DnsName>,
    /// Pairs that must not be issued until somebody on the node asks again by hand.
    pub stopped: BTreeSet<String>,
    /// Pairs to issue again at once with a new key.
    pub reissue: BTreeSet<String>,
    pub policy_version: u64,
    /// New WireGuard keys are asked for.
    pub rotate_keys: bool,
}

/// What a node sees of another. The leaf itself is in [`World::leaf`]: key, name and addresses come from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerView {
    pub leaf_serial: Serial,
    /// The peer may open connections to the node.
    pub inbound: bool,
    /// The node may open connections to the peer.
    pub outbound: bool,
    pub tags: BTreeSet<Tag>,
}

/// What changed for a node since a record. An entry in `removes` may never have been sent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Delta {
    pub upserts: BTreeMap<NodeId, PeerView>,
    pub removes: BTreeSet<NodeId>,
    /// Issuers and shards with a newer CRL.
    pub crls: BTreeSet<(KeyId, u16)>,
}

impl Delta {
    /// Whether nothing changed that this node may see.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl View {
    /// What a node that had this view has after a delta.
    pub fn patch(&mut self, delta: Delta) {
        self.peers.retain(|id, _| !delta.removes.contains(id));
        self.peers.extend(delta.upserts);
    }
}

impl World {
    /// All that an active node may see; `None` for everybody else.
    pub fn view_for(&self, id: NodeId) -> Option<View> {
        let node = self.active(id)?;
        let rules = self.policy().about(subject(node));
        let peers = self.nodes().filter_map(|peer| Some((peer.id, see(node, &rules, peer)?)));
        Some(View { own: self.own(node), peers: peers.collect() })
    }

    /// What changed for an active node after record `since`. `None`: send the full view, because `since`
    /// is too old, or the policy or the node's own facts changed, which changes who sees whom.
    pub fn delta_for(&self, id: NodeId, since: u64) -> Option<Delta> {
        let node = self.active(id)?;
        let touched = self.touched_since(since)?;
        if touched.policy || touched.trust || touched.own.contains(&id) {
            return None;
        }
        let rules = self.policy().about(subject(node));
        // What an authority says that nobody trusts any more is for others.
        let crls = touched.crls.into_iter().filter(|(issuer, _)| self.is_trusted(issuer)).collect();
        let mut delta = Delta { crls, ..Delta::default() };
        for other in touched.nodes.into_iter().filter(|other| *other != id) {
            match self.node(other).and_then(|peer| see(node, &rules, peer)) {
                Some(peer) => drop(delta.upserts.insert(other, peer)),
                None => drop(delta.removes.insert(other)),
            }
        }
        Some(delta)
    }

    /// The leaf that peers of a node receive, in DER.
    pub fn leaf(&self, id: NodeId) -> Option<&[u8]> {
        self.active(id)?.current.as_ref().map(|identity| identity.leaf.as_slice())
    }

    fn active(&self, id: NodeId) -> Option<&Node> {
        self.node(id).filter(|node| node.state == NodeState::Active)
    }

    fn own(&self, node: &Node) -> Own {
        Own {
            tags: node.tags.clone(),
            granted: self.granted_names(node.id),
            stopped: self.stopped_names(node.id),
            reissue: node.reissue.clone(),
            policy_version: self.policy_version(),
            rotate_keys: node.rotate_keys,
        }
    }
}

/// What `node` sees of `peer`: active nodes that some rule connects it with, itself excepted.
fn see(node: &Node, rules: &RulesAbout<'_>, peer: &Node) -> Option<PeerView> {
    let identity: &Identity = peer.current.as_ref().filter(|_| peer.state == NodeState::Active)?;
    if peer.id == node.id {
        return None;
    }
    let (inbound, outbound) = (rules.inbound(subject(peer)), rules.outbound(subject(peer)));
    let seen = PeerView { leaf_serial: identity.serial, inbound, outbound, tags: peer.tags.clone() };
    (inbound || outbound).then_some(seen)
}
