//! The peers of one interface, found by key, by session index, or by inner address.
//!
//! While a second private key of ours stands beside the first, every peer is there twice: as the peer of
//! the first key and as its *twin* under the second. They have sessions of their own and one set of
//! prefixes, which the one holds through which we send.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::allowed_ips::AllowedIps;
use crate::config::PEERS_MAX;
use crate::key::PublicKey;
use crate::peer::Peer;

/// Slots: every peer may have a twin.
const SLOTS_MAX: usize = 2 * PEERS_MAX;
/// Bits of a peer index that name its slot; those above are random, so that a slot that is used again does
/// not answer to its old sessions.
const SLOT_MASK: u32 = SLOTS_MAX as u32 - 1;
const NOISE_MASK: u32 = 0xff_ffff & !SLOT_MASK;

pub(crate) struct Registry {
    by_key: BTreeMap<PublicKey, Entry>,
    slots: Vec<Option<Arc<Peer>>>,
    free: Vec<u32>,
    routes: AllowedIps<Arc<Peer>>,
    next_owner: u64,
}

struct Entry {
    peer: Arc<Peer>,
    twin: Option<Arc<Peer>>,
    /// The twin holds the prefixes.
    moved: bool,
}

impl Entry {
    fn holder(&self) -> &Arc<Peer> {
        self.twin.as_ref().filter(|_| self.moved).unwrap_or(&self.peer)
    }

    fn both(&self) -> impl Iterator<Item = &Arc<Peer>> {
        std::iter::once(&self.peer).chain(&self.twin)
    }
}

impl Registry {
    pub(crate) fn new() -> Self {
        Self {
            by_key: BTreeMap::new(),
            slots: Vec::new(),
            free: Vec::new(),
            routes: AllowedIps::new(),
            next_owner: 0,
        }
    }

    pub(crate) fn by_key(&self, key: &PublicKey) -> Option<&Arc<Peer>> {
        self.by_key.get(key).map(|entry| &entry.peer)
    }

    pub(crate) fn twin(&self, key: &PublicKey) -> Option<&Arc<Peer>> {
        self.by_key.get(key)?.twin.as_ref()
    }

    /// The one through which packets leave: the peer, or its twin.
    pub(crate) fn holder(&self, key: &PublicKey) -> Option<&Arc<Peer>> {
        self.by_key.get(key).map(Entry::holder)
    }

    /// The peer and its twin, if there are any.
    pub(crate) fn both(&self, key: &PublicKey) -> impl Iterator<Item = &Arc<Peer>> {
        self.by_key.get(key).into_iter().flat_map(Entry::both)
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

    pub(crate) fn len(&self) -> usize {
        self.by_key.len()
    }

    /// Every peer and its twin, ordered by key.
    pub(crate) fn pairs(&self) -> impl Iterator<Item = (&Arc<Peer>, Option<&Arc<Peer>>)> {
        self.by_key.values().map(|entry| (&entry.peer, entry.twin.as_ref()))
    }

    /// All peers and twins.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Arc<Peer>> {
        self.by_key.values().flat_map(Entry::both)
    }

    /// Whose prefix another peer, or the one with `key` if it exists already, would take away.
    pub(crate) fn conflict(&self, prefixes: &[IpNet], key: &PublicKey) -> Option<(IpNet, PublicKey)> {
        self.routes.conflict(prefixes, self.holder(key)).map(|(prefix, owner)| (prefix, owner.key))
    }

    /// A free peer index for [`insert`](Self::insert) or [`insert_twin`](Self::insert_twin), or `None` at the
    /// limit. `noise` is random.
    pub(crate) fn reserve(&mut self, noise: u32) -> Option<u32> {
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None if self.slots.len() < SLOTS_MAX => {
                self.slots.push(None);
                self.slots.len() as u32 - 1
            }
            None => return None,
        };
        Some(slot | (noise & NOISE_MASK))
    }

    /// A number no other peer has had.
    pub(crate) fn new_owner(&mut self) -> u64 {
        self.next_owner += 1;
        self.next_owner
    }

    pub(crate) fn insert(&mut self, peer: Arc<Peer>, prefixes: &[IpNet]) {
        self.routes.replace(&[], prefixes, &peer);
        self.slots[(peer.index & SLOT_MASK) as usize] = Some(peer.clone());
        self.by_key.insert(peer.key, Entry { peer, twin: None, moved: false });
    }

    pub(crate) fn insert_twin(&mut self, twin: Arc<Peer>) {
        if let Some(entry) = self.by_key.get_mut(&twin.key) {
            self.slots[(twin.index & SLOT_MASK) as usize] = Some(twin.clone());
            entry.twin = Some(twin);
        }
    }

    /// Changes the prefixes of the peer with `key` from `old` to `new`.
    pub(crate) fn route(&mut self, key: &PublicKey, old: &[IpNet], new: &[IpNet]) {
        if let Some(entry) = self.by_key.get(key) {
            self.routes.replace(old, new, entry.holder());
        }
    }

    /// Moves the prefixes of the peer with `key` to its twin, or back.
    pub(crate) fn use_twin(&mut self, key: &PublicKey, moved: bool) {
        if let Some(entry) = self.by_key.get_mut(key).filter(|entry| entry.twin.is_some()) {
            entry.moved = moved;
            let holder = entry.holder();
            let prefixes = holder.lock().allowed_ips().to_vec();
            self.routes.replace(&[], &prefixes, holder);
        }
    }

    /// The twins take the place of the peers. Those that are replaced; they are no longer found.
    pub(crate) fn promote_twins(&mut self) -> Vec<Arc<Peer>> {
        let keys: Vec<PublicKey> = self.by_key.keys().copied().collect();
        let mut replaced = Vec::new();
        for key in &keys {
            self.use_twin(key, true);
            let entry = self.by_key.get_mut(key).expect("its key was just read");
            entry.moved = false;
            if let Some(twin) = entry.twin.take() {
                replaced.push(std::mem::replace(&mut entry.peer, twin));
            }
        }
        replaced.iter().for_each(|peer| self.release(peer));
        replaced
    }

    /// The twins go. What they were; they are no longer found.
    pub(crate) fn drop_twins(&mut self) -> Vec<Arc<Peer>> {
        let keys: Vec<PublicKey> = self.by_key.keys().copied().collect();
        let mut dropped = Vec::new();
        for key in &keys {
            self.use_twin(key, false);
            dropped.extend(self.by_key.get_mut(key).and_then(|entry| entry.twin.take()));
        }
        dropped.iter().for_each(|twin| self.release(twin));
        dropped
    }

    /// Takes a peer out, with its twin.
    pub(crate) fn remove(&mut self, key: &PublicKey) -> Vec<Arc<Peer>> {
        let Some(entry) = self.by_key.remove(key) else { return Vec::new() };
        let prefixes = entry.holder().lock().allowed_ips().to_vec();
        self.routes.replace(&prefixes, &[], entry.holder());
        let removed: Vec<_> = entry.both().cloned().collect();
        removed.iter().for_each(|peer| self.release(peer));
        removed
    }

    fn release(&mut self, peer: &Peer) {
        let slot = peer.index & SLOT_MASK;
        self.slots[slot as usize] = None;
        self.free.push(slot);
    }
}
