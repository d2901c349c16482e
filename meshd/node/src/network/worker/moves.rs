//! What follows when the host itself changes: it has other addresses or routes than a moment ago.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Instant;

use mesh_core::NodeId;
use mesh_core::endpoints::relayed_peer;

use super::Worker;
use crate::hostop::Way;

/// A look at the ways of all peers takes this part of the time at most, on a host whose routes never rest.
const SHARE_OF_TIME: u32 = 20;

/// How the kernel reaches each peer's endpoint, as of the last look. Performs no I/O.
#[derive(Debug, Default)]
pub(super) struct Ways {
    known: BTreeMap<u32, (IpAddr, Option<Way>)>,
    not_before: Option<Instant>,
    /// A change was seen before the next look was due.
    due: Option<Instant>,
}

impl Ways {
    /// Whether a look is allowed at `now`; if not, it is due later.
    fn may_look(&mut self, now: Instant) -> bool {
        match self.not_before.filter(|at| *at > now) {
            Some(later) => {
                self.due = Some(later);
                false
            }
            None => {
                self.due = None;
                true
            }
        }
    }

    fn looked(&mut self, began: Instant, ended: Instant) {
        self.not_before = Some(ended + (ended - began) * SHARE_OF_TIME);
    }

    /// Takes what was found and names the peers that are reached another way than before, or again. After a
    /// change also those that were never looked at: they may have been spoken to from where we were.
    fn compare(&mut self, found: BTreeMap<u32, (IpAddr, Option<Way>)>, why: Look) -> BTreeSet<NodeId> {
        let moved = found.iter().filter(|(id, (address, way))| {
            let changed = match self.known.get(id).filter(|(at, _)| at == address) {
                Some((_, before)) => before != way,
                None => why == Look::Change,
            };
            changed && way.is_some()
        });
        let moved = moved.map(|(id, _)| NodeId(*id)).collect();
        self.known = found;
        moved
    }

    /// When a look that was put off is due.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.due
    }
}

/// Why the ways are looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Look {
    /// It is time.
    Tick,
    /// The host's network has changed.
    Change,
}

impl Worker {
    /// Links, addresses or routes have changed: whatever of ours was lost comes back, our endpoints are told
    /// anew, and peers that are reached another way now get a handshake from where we are.
    pub(super) async fn network_changed(&mut self) {
        let began = self.clock.own().now();
        if !self.ways.may_look(began) {
            return;
        }
        self.restore_overlay().await;
        self.refresh_endpoints().await;
        self.look_at_ways(Look::Change).await;
        self.ways.looked(began, self.clock.own().now());
    }

    pub(super) async fn look_at_ways(&mut self, why: Look) {
        let ids: Vec<u32> = self.current.keys().copied().collect();
        let mut by_address: BTreeMap<IpAddr, Option<Way>> = BTreeMap::new();
        let mut found = BTreeMap::new();
        for id in ids {
            let endpoint = self.table.endpoint(NodeId(id));
            let Some(endpoint) = endpoint.filter(|endpoint| relayed_peer(*endpoint).is_none()) else {
                continue;
            };
            let address = endpoint.ip().to_canonical();
            let way = match by_address.get(&address) {
                Some(way) => way.clone(),
                None => by_address.entry(address).or_insert(self.host.way_to(address).await).clone(),
            };
            found.insert(id, (address, way));
        }
        let moved = self.ways.compare(found, why);
        if !moved.is_empty() {
            tracing::info!(peers = moved.len(), "this host has moved");
            self.table.handle_moved(&moved, self.clock.own().now());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn looks_take_a_small_share_of_the_time() {
        let (mut ways, start) = (Ways::default(), Instant::now());
        assert!(ways.may_look(start));
        ways.looked(start, start + Duration::from_millis(100));
        let soon = start + Duration::from_millis(200);
        assert!(!ways.may_look(soon));
        let due = ways.poll_timeout().expect("put off, not forgotten");
        assert_eq!(due, start + Duration::from_millis(2100));
        assert!(ways.may_look(due));
        assert_eq!(ways.poll_timeout(), None);
    }
}
