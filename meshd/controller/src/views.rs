//! World as nodes receive it: full maps, deltas and hints, all made from the one view in `core`.

use std::collections::BTreeSet;
use std::sync::Arc;

use mesh_core::policy::Subject;
use mesh_core::world::{CrlState, NodeState};
use mesh_core::{NodeId, Own, World};
use mesh_proto::v1 as pb;
use mesh_store::Head;

use crate::directory::Directory;
use crate::entries::Entries;
use crate::failpoint;
use crate::identity::{issuer_ders, trust_bundle};
use crate::publish::{Publisher, crl_have};

/// How a node stands to be told about the roster.
#[derive(Debug)]
pub(crate) enum Roster {
    /// Replaces all it knew.
    Full(pb::Full),
    /// What changed, and which peers are new or changed.
    Delta(pb::Delta, BTreeSet<NodeId>),
    /// Nothing that this node may see changed, up to this record.
    Unchanged,
    /// The node is no member any more.
    Gone,
}

/// Makes the messages of the sync stream.
#[derive(Debug, Clone)]
pub(crate) struct Views {
    pub(crate) directory: Arc<Directory>,
    pub(crate) publisher: Arc<Publisher>,
    pub(crate) entries: Arc<Entries>,
    pub(crate) journal_id: [u8; 16],
    pub(crate) incarnation: u32,
}

impl Views {
    /// What `node` has to learn after record `since`, or everything; and the record it then stands at.
    pub(crate) fn roster(
        &self,
        node: NodeId,
        from: Option<&pb::Cursor>,
        since: Option<u64>,
    ) -> (Roster, u64) {
        // Read before World: the two locks are never held together.
        let frozen = self.publisher.frozen_haves();
        self.directory.read_with_head(|world, head| {
            let is_member = world.node(node).is_some_and(|n| n.state == NodeState::Active);
            let roster = match since.and_then(|since| world.delta_for(node, since)) {
                _ if !is_member => Roster::Gone,
                Some(delta) if delta.is_empty() => Roster::Unchanged,
                Some(delta) => {
                    let changed = delta.upserts.keys().copied().collect();
                    Roster::Delta(self.delta(world, head, from, delta, frozen), changed)
                }
                None => self.full(world, head, node, frozen).map_or(Roster::Gone, Roster::Full),
            };
            (roster, head.seq)
        })
    }

    /// The cursor of `head`.
    pub(crate) fn cursor(&self, head: Head) -> pb::Cursor {
        pb::Cursor {
            journal_id: self.journal_id.to_vec().into(),
            incarnation: self.incarnation,
            seq: head.seq,
            hash8: head.hash[..8].to_vec().into(),
        }
    }

    /// Which of `peers` the node may see.
    pub(crate) fn visible(&self, node: NodeId, peers: impl Iterator<Item = NodeId>) -> BTreeSet<NodeId> {
        self.directory.read(|world| {
            let Some(own) = world.node(node).filter(|n| n.state == NodeState::Active) else {
                return BTreeSet::new();
            };
            let rules = world.policy().about(Subject { name: &own.name, tags: &own.tags });
            peers
                .filter(|peer| *peer != node)
                .filter_map(|peer| world.node(peer))
                .filter(|peer| peer.state == NodeState::Active)
                .filter(|peer| {
                    let subject = || Subject { name: &peer.name, tags: &peer.tags };
                    rules.inbound(subject()) || rules.outbound(subject())
                })
                .map(|peer| peer.id)
                .collect()
        })
    }

    fn full(
        &self,
        world: &World,
        head: Head,
        node: NodeId,
        frozen: Option<Vec<pb::CrlHave>>,
    ) -> Option<pb::Full> {
        let view = world.view_for(node)?;
        self.entries.forget_all_ended(world);
        Some(pb::Full {
            cursor: Some(self.cursor(head)),
            own: Some(own(&view.own)),
            issuers: issuer_ders(world, None),
            peers: view.peers.iter().filter_map(|(id, view)| self.entries.of(world, *id, view)).collect(),
            crls: frozen.unwrap_or_else(|| {
                world.crls().filter(|crl| world.is_trusted(&crl.issuer_key_id)).map(have).collect()
            }),
            trust: trust_bundle(world),
        })
    }

    fn delta(
        &self,
        world: &World,
        head: Head,
        from: Option<&pb::Cursor>,
        delta: mesh_core::Delta,
        frozen: Option<Vec<pb::CrlHave>>,
    ) -> pb::Delta {
        self.entries.forget_ended(world, delta.removes.iter());
        let newer = delta.crls.iter().filter_map(|(issuer, shard)| world.crl(issuer, *shard)).map(have);
        let crls = match frozen {
            Some(_) if delta.crls.is_empty() => Vec::new(),
            Some(frozen) => frozen,
            None => newer.collect(),
        };
        let removes = match failpoint::PEER_REMOVAL_DISABLED.is_set() {
            true => Vec::new(),
            false => delta.removes.iter().map(|id| id.0).collect(),
        };
        pb::Delta {
            from: from.cloned(),
            cursor: Some(self.cursor(head)),
            own: None,
            issuers: Vec::new(),
            upserts: delta
                .upserts
                .iter()
                .filter_map(|(id, view)| self.entries.of(world, *id, view))
                .collect(),
            removes,
            crls,
        }
    }
}

fn have(crl: &CrlState) -> pb::CrlHave {
    crl_have(&crl.issuer_key_id, crl.shard, crl.number)
}

fn own(own: &Own) -> pb::Own {
    pb::Own {
        tags: own.tags.iter().map(ToString::to_string).collect(),
        granted_names: own.granted.iter().map(ToString::to_string).collect(),
        stopped_names: own.stopped.iter().cloned().collect(),
        reissue_names: own.reissue.iter().cloned().collect(),
        policy_version: own.policy_version,
        rotate_keys: own.rotate_keys,
    }
}
