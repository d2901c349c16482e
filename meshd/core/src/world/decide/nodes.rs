//! Nodes: approved, tagged, ended.

use std::collections::BTreeSet;

use super::{At, Decided, Decision};
use crate::certificate::Reason;
use crate::change::Change;
use crate::command::{Actor, CommandKind};
use crate::ids::NodeId;
use crate::limits::TAGS_MAX;
use crate::names::Tag;
use crate::refusal::Refusal;
use crate::world::{Node, NodeState, TokenState, World};

impl World {
    fn known_node(&self, id: NodeId) -> Result<&Node, Refusal> {
        self.node(id).ok_or(Refusal::NodeNotFound { node: id })
    }

    /// Pending or active.
    fn unrevoked_node(&self, id: NodeId) -> Result<&Node, Refusal> {
        let node = self.known_node(id)?;
        match node.state {
            NodeState::Revoked { reason, .. } => {
                Err(Refusal::NodeRevoked { name: node.name.clone(), reason })
            }
            NodeState::Pending { .. } | NodeState::Active => Ok(node),
        }
    }

    pub(super) fn decide_approve(&self, id: NodeId) -> Decided {
        let node = self.unrevoked_node(id)?;
        match node.state {
            NodeState::Pending { approved: false } => {
                Ok(Decision::Changes(vec![Change::NodeApproved { id, name: node.name.clone() }]))
            }
            _ => Ok(Decision::AlreadyDone),
        }
    }

    pub(super) fn decide_tag(&self, id: NodeId, add: &BTreeSet<Tag>, remove: &BTreeSet<Tag>) -> Decided {
        let node = self.unrevoked_node(id)?;
        let tags: BTreeSet<Tag> = node.tags.difference(remove).chain(add).cloned().collect();
        if tags == node.tags {
            return Ok(Decision::AlreadyDone);
        }
        if tags.len() > TAGS_MAX {
            return Err(Refusal::TooManyTags { max: TAGS_MAX });
        }
        Ok(Decision::Changes(vec![Change::NodeTagged { id, name: node.name.clone(), tags }]))
    }

    pub(super) fn decide_rotate_keys(&self, id: NodeId) -> Decided {
        let node = self.unrevoked_node(id)?;
        match node.state {
            NodeState::Active if node.rotate_keys => Ok(Decision::AlreadyDone),
            NodeState::Active => {
                Ok(Decision::Changes(vec![Change::KeyRotationAsked { id, name: node.name.clone() }]))
            }
            _ => Err(Refusal::NodePending { name: node.name.clone() }),
        }
    }

    pub(super) fn decide_revoke_node(
        &self,
        now: At<'_>,
        id: NodeId,
        reason: Reason,
        remove: bool,
    ) -> Decided {
        if self.state.retired.contains(&id) {
            return Ok(Decision::AlreadyDone);
        }
        let node = self.known_node(id)?;
        let removed = remove.then(|| Change::NodeRemoved { id, name: node.name.clone() });
        let mut changes = match node.state {
            NodeState::Revoked { .. } => Vec::new(),
            NodeState::Pending { .. } | NodeState::Active => self.end_node(now, node, reason, remove),
        };
        changes.extend(removed);
        Ok(Decision::from_changes(changes))
    }

    pub(super) fn decide_leave(&self, now: At<'_>, actor: &Actor, id: NodeId) -> Decided {
        let node = self.known_node(id)?;
        if !matches!(actor, Actor::Node { id: caller, .. } if *caller == id) {
            return Err(self.denied(actor, CommandKind::LeaveNode));
        }
        let mut changes = self.end_node(now, node, Reason::CessationOfOperation, true);
        changes.push(Change::NodeRemoved { id, name: node.name.clone() });
        Ok(Decision::Changes(changes))
    }

    /// Cuts everything that speaks for a node: certificates, TLS and WireGuard keys, tokens.
    fn end_node(&self, now: At<'_>, node: &Node, reason: Reason, remove: bool) -> Vec<Change> {
        let ended: Vec<_> = self.certificates_of(node.id).filter(|c| c.revoked.is_none()).collect();
        let revoked = ended.iter().map(|c| Change::CertificateRevoked { serial: c.serial, reason });
        let keys: BTreeSet<_> = ended.iter().map(|c| c.key_hash).chain([node.enrollment.key_hash]).collect();
        let keys = keys.into_iter().filter(|key| !self.key_blocked(key));
        let keys = keys.map(|key_hash| Change::KeyBlocked { key_hash });
        let wireguard = node.vouched.iter().map(|key| Change::WireguardKeyBlocked { key: *key });
        let end = Change::NodeRevoked { id: node.id, name: node.name.clone(), reason };
        [end]
            .into_iter()
            .chain(revoked)
            .chain(keys)
            .chain(wireguard)
            .chain(self.void(now, node, reason, remove))
            .collect()
    }

    /// Tokens that must not bring the node back: those made for its name, and the one it entered with while
    /// that has uses left. A node that is retired in good faith voids nothing.
    fn void(&self, now: At<'_>, node: &Node, reason: Reason, remove: bool) -> impl Iterator<Item = Change> {
        let keeps_name = remove && reason.is_benign();
        let open = self.tokens().filter(move |token| token.state(now.at) == TokenState::Open);
        let void = open.filter(move |token| {
            let named = token.name.as_ref() == Some(&node.name) && !keeps_name;
            named || (token.id == node.enrollment.token && !reason.is_benign())
        });
        void.map(|token| Change::TokenRevoked { id: token.id })
    }
}
