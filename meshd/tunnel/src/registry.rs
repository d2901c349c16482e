//! The peers of one interface, found by key, by session index, or by inner address.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::allowed_ips::AllowedIps;
use crate::config::PEERS_MAX;
use crate::key::PublicKey;
use crate::peer::Peer;

/// Bits of a peer index that name its slot; the eight above are random, so that a slot that is used
/// again does not answer to its old sessions.
const SLOT_MASK: u32 = PEERS_MAX as u32 - 1;

pub(crate) struct Registry {
    by_key: BTreeMap<PublicKey, Arc<Peer>>,
    slots: Vec<Option<Arc<Peer>>>,
    free: Vec<u32>,
    routes: AllowedIps<Arc<Peer>>,
}

impl Registry {
    pub(crate) fn new() -> Self {
        Self { by_key: BTreeMap::new(), slots: Vec::new(), free: Vec::new(), routes: AllowedIps::new() }
    }

    pub(crate) fn by_key(&self, key: &PublicKey) -> Option<&Arc<Peer>> {
        self.by_key.get(key)
    }

    /// The peer a session index (`receiver` of a message to us) belongs to.
    pub(crate) fn by_session(&self, receiver: u32) -> Option<&Arc<Peer>> {
        let index = receiver >> 8;
        let peer = self.slots.get((index & SLOT_MASK) as usize)?.as_ref()?;
        (peer.index == index).then_some(peer)
    }

    /// The peer that owns an inner address.
    pub(crate) fn by_address(&self, address: IpAddr) -> Option<&Arc<Peer>> {
        self.routes.owner_of(address)
    }

    pub(crate) fn peers(&self) -> impl ExactSizeIterator<Item = &Arc<Peer>> {
        self.by_key.values()
    }

    /// Whose prefix another peer, or `peer` if it exists already, would take away.
    pub(crate) fn conflict(
        &self,
        prefixes: &[IpNet],
        peer: Option<&Arc<Peer>>,
    ) -> Option<(IpNet, PublicKey)> {
        self.routes.conflict(prefixes, peer).map(|(prefix, owner)| (prefix, owner.key))
    }

    /// A free peer index for [`insert`](Self::insert), or `None` at the limit. `noise` is random.
    pub(crate) fn reserve(&mut self, noise: u8) -> Option<u32> {
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None if self.slots.len() < PEERS_MAX => {
                self.slots.push(None);
                self.slots.len() as u32 - 1
            }
            None => return None,
        };
        Some(slot | u32::from(noise) << 16)
    }

    pub(crate) fn insert(&mut self, peer: Arc<Peer>, prefixes: &[IpNet]) {
        self.routes.replace(&[], prefixes, &peer);
        self.slots[(peer.index & SLOT_MASK) as usize] = Some(peer.clone());
        self.by_key.insert(peer.key, peer);
    }

    pub(crate) fn route(&mut self, peer: &Arc<Peer>, old: &[IpNet], new: &[IpNet]) {
        self.routes.replace(old, new, peer);
    }

    pub(crate) fn remove(&mut self, key: &PublicKey) -> Option<Arc<Peer>> {
        let peer = self.by_key.remove(key)?;
        let slot = peer.index & SLOT_MASK;
        self.slots[slot as usize] = None;
        self.free.push(slot);
        self.routes.replace(peer.lock().allowed_ips(), &[], &peer);
        Some(peer)
    }
}
