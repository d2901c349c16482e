//! Who has taken up a revocation, and when the others will have dropped it by themselves.

use std::sync::Arc;
use std::time::Duration;

use mesh_core::world::NodeState;
use mesh_core::{NodeId, UtcTime};
use mesh_proto::v1 as pb;
use tokio::time::Instant;

use crate::directory::Directory;
use crate::limits::RECEIPTS_WAIT_MAX;
use crate::presence::Presence;
use crate::publish::CrlRef;

/// What counts as having taken it up.
#[derive(Debug, Clone)]
pub(crate) struct Expected {
    /// The record of the revocation.
    pub(crate) seq: u64,
    /// The CRLs that list what was revoked.
    pub(crate) crls: Vec<CrlRef>,
    /// When what was revoked ends by itself.
    pub(crate) lease_ends: UtcTime,
    /// Not asked: it is the one that was revoked.
    pub(crate) except: Option<NodeId>,
}

#[derive(Debug, Clone)]
pub(crate) struct Receipts {
    pub(crate) directory: Arc<Directory>,
    pub(crate) presence: Arc<Presence>,
}

impl Receipts {
    /// Waits until every connected node has acknowledged, at most `wait`; returns one receipt per
    /// active node, by name, and how long it took.
    pub(crate) async fn collect(&self, expected: &Expected, wait: Duration) -> (Vec<pb::Receipt>, Duration) {
        let started = Instant::now();
        let deadline = started + wait.min(RECEIPTS_WAIT_MAX);
        let mut acks = self.presence.watch_acks();
        loop {
            acks.mark_unchanged();
            let receipts = self.now(expected);
            let waiting = receipts.iter().any(|r| r.state() == pb::receipt::State::TimedOut);
            if !waiting {
                return (receipts, started.elapsed());
            }
            tokio::select! {
                () = tokio::time::sleep_until(deadline) => return (self.now(expected), started.elapsed()),
                changed = acks.changed() => if changed.is_err() { return (receipts, started.elapsed()) },
            }
        }
    }

    /// The receipts as they stand; whoever is connected and has not acknowledged has timed out.
    fn now(&self, expected: &Expected) -> Vec<pb::Receipt> {
        let mut nodes: Vec<(NodeId, String)> = self.directory.read(|world| {
            world
                .nodes()
                .filter(|node| node.state == NodeState::Active && Some(node.id) != expected.except)
                .map(|node| (node.id, node.name.to_string()))
                .collect()
        });
        nodes.sort_by(|a, b| a.1.cmp(&b.1));
        nodes.into_iter().map(|(id, name)| self.receipt(id, name, expected)).collect()
    }

    fn receipt(&self, id: NodeId, name: String, expected: &Expected) -> pb::Receipt {
        let presence = self.presence.of(id);
        let has = |crl: &CrlRef| presence.has_crl(&crl.issuer.0, crl.shard.into(), crl.number);
        let has_crl = expected.crls.iter().all(has);
        let state = if has_crl && presence.acknowledged_seq >= expected.seq {
            pb::receipt::State::Acknowledged
        } else if presence.connected {
            pb::receipt::State::TimedOut
        } else {
            pb::receipt::State::Offline
        };
        pb::Receipt {
            node: name,
            state: state as i32,
            last_seen: presence.last_seen.map_or(0, UtcTime::unix),
            lease_ends: expected.lease_ends.unix(),
        }
    }
}
