//! Node indexes and addresses held between the preparation of a certificate and its record, so that
//! parallel enrolments do not sign for the same address.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mesh_core::{NodeId, World};

#[derive(Debug, Clone, Default)]
pub(crate) struct Reservations(Arc<Mutex<Held>>);

#[derive(Debug, Default)]
struct Held {
    nodes: BTreeSet<NodeId>,
    addresses: BTreeSet<Ipv4Addr>,
}

/// Held until dropped: after the record was published, or after a refusal.
#[derive(Debug)]
pub(crate) struct Reservation {
    all: Reservations,
    /// Set when the index is new; a pending node has its own.
    reserved_node: Option<NodeId>,
    pub(crate) node: NodeId,
    pub(crate) ipv4: Ipv4Addr,
}

impl Reservations {
    /// Takes the next free index, unless `pending` has one already, and a free address. `None` if the
    /// pool has none left.
    pub(crate) fn take(&self, world: &World, pending: Option<NodeId>) -> Option<Reservation> {
        let mut held = self.lock();
        let ipv4 = world.free_ipv4().find(|address| !held.addresses.contains(address))?;
        let reserved_node = match pending {
            Some(_) => None,
            None => {
                let first = world.next_node_id().0;
                Some((first..=u32::MAX).map(NodeId).find(|id| !held.nodes.contains(id))?)
            }
        };
        held.addresses.insert(ipv4);
        held.nodes.extend(reserved_node);
        let node = pending.or(reserved_node)?;
        Some(Reservation { all: self.clone(), reserved_node, node, ipv4 })
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut held = self.all.lock();
        held.addresses.remove(&self.ipv4);
        if let Some(node) = self.reserved_node {
            held.nodes.remove(&node);
        }
    }
}
