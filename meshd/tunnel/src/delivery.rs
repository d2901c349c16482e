//! From decryption to the interface: what may pass, put together where it belongs together.

use std::io::{self, IoSlice};
use std::iter::Peekable;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use crate::counters::{count, count_many};
use crate::offload::join::Joiner;
use crate::offload::merge::{Group, Kinds, PACKETS_MAX, Plan};
use crate::offload::virtio::Header;
use crate::packet::{self, Fragment, Message};
use crate::peer::{BUFFER_BYTES, Notes, Peer, Received as Decrypted};
use crate::shared::Shared;
use crate::tun::Tun;

/// Decrypted packets that wait to be written, bytes: eight of the largest messages, and as much again for fragments
/// that are joined. Written in one go, they wake the program that reads them once. The kernel gives memory only to
/// what is used.
const WAITING_BYTES: usize = 8 * BUFFER_BYTES;
const ARENA_BYTES: usize = 2 * WAITING_BYTES;

/// From decryption to the interface.
pub(crate) struct Delivery {
    shared: Arc<Shared>,
    tun: Arc<Tun>,
    arena: Vec<u8>,
    used: usize,
    /// Where in the arena the packets are that may be delivered.
    packets: Vec<Range<usize>>,
    /// The inner sources of the run in progress.
    sources: Vec<IpAddr>,
    /// Whether the datagrams at hand have met congestion on their way.
    pub(crate) congested: bool,
    /// First fragments whose last may still come.
    open: usize,
    joiner: Joiner,
    plan: Plan,
}

impl Delivery {
    pub(crate) fn new(shared: Arc<Shared>, tun: Arc<Tun>) -> Self {
        Self {
            shared,
            tun,
            arena: vec![0; ARENA_BYTES],
            used: 0,
            packets: Vec::new(),
            sources: Vec::new(),
            congested: false,
            open: 0,
            joiner: Joiner::default(),
            plan: Plan::default(),
        }
    }

    /// Decrypts the data messages at the head of `datagrams` that are for `peer`: one lock for all of them.
    pub(crate) fn run<'a, I: Iterator<Item = &'a [u8]>>(
        &mut self,
        peer: &Arc<Peer>,
        from: SocketAddr,
        datagrams: &mut Peekable<I>,
        now: Instant,
    ) {
        let is_ours = |datagram: &&[u8]| matches!(Message::parse(datagram), Some(Message::Data { receiver }) if receiver >> 8 == peer.index);
        let (first, mut notes) = (self.packets.len(), Notes::default());
        let mut state = peer.lock();
        while !self.is_full() {
            let Some(datagram) = datagrams.next_if(is_ours) else { break };
            match state.decrypt((datagram, from), &mut self.arena[self.used..], now, &mut notes) {
                Decrypted::Packet { length, source } => {
                    if self.congested {
                        packet::set_congested(&mut self.arena[self.used..self.used + length]);
                    }
                    self.packets.push(self.used..self.used + length);
                    self.sources.push(source);
                    self.used += length;
                }
                Decrypted::Keepalive => {}
                Decrypted::Invalid => count(&self.shared.counters.rx_invalid),
            }
        }
        drop(state);
        self.shared.report(peer, notes);
        self.check(peer, first);
        if self.is_full() {
            self.flush();
        }
    }

    fn is_full(&self) -> bool {
        self.used + BUFFER_BYTES > WAITING_BYTES
    }

    /// Whether what waits would be better off with what comes next.
    pub(crate) fn has_open_fragments(&self) -> bool {
        self.open > 0
    }

    /// Drops those of the packets from `first` on that `peer` may not send.
    fn check(&mut self, peer: &Arc<Peer>, first: usize) {
        let (registry, counters) = (self.shared.registry(), &self.shared.counters);
        let (mut kept, mut last) = (first, None);
        for (index, source) in (first..).zip(self.sources.drain(..)) {
            let allowed = match last {
                Some((known, allowed)) if known == source => allowed,
                // The whole table, not this peer's list: a nested prefix of another peer must win.
                _ => registry.by_address(source).is_some_and(|holder| holder.owner() == peer.owner()),
            };
            last = Some((source, allowed));
            if !allowed {
                count(&counters.rx_wrong_source);
            } else if packet::destination(&self.arena[self.packets[index].clone()]).is_none() {
                // boringtun has cut the padding, but a length too small for its own header gets through.
                count(&counters.rx_invalid);
            } else {
                match Fragment::of(&self.arena[self.packets[index].clone()]) {
                    Fragment::No => {}
                    Fragment::First => self.open += 1,
                    Fragment::Last => self.open = self.open.saturating_sub(1),
                }
                self.packets.swap(kept, index);
                kept += 1;
            }
        }
        self.packets.truncate(kept);
    }

    /// Writes what waits to the interface.
    pub(crate) fn flush(&mut self) {
        let (tcp, udp) = self.tun.merging();
        if udp {
            self.used = self.joiner.join(&mut self.arena, self.used, &mut self.packets);
        }
        self.plan.make(&self.arena, &self.packets, Kinds { tcp, udp });
        for index in 0..self.plan.groups().len() {
            let group = self.plan.groups()[index];
            if let Err(error) = self.write(&group) {
                self.refused(&group, &error);
            }
        }
        self.packets.clear();
        (self.used, self.open) = (0, 0);
    }

    fn write(&mut self, group: &Group) -> io::Result<()> {
        let last = self.packets[group.last()].clone();
        let flags = group.closing_flags(&self.arena[last]);
        let first = self.packets[group.first].clone();
        let before = group.save(&self.arena[first.clone()]);
        let header = group.finish(&mut self.arena[first.clone()], flags).bytes();
        let mut parts = [IoSlice::new(&[]); PACKETS_MAX + 1];
        parts[0] = IoSlice::new(&header);
        parts[1] = IoSlice::new(&self.arena[first.clone()]);
        for (part, index) in parts[2..].iter_mut().zip(self.plan.rest(group)) {
            *part = IoSlice::new(&self.arena[self.packets[index].clone()][group.headers()..]);
        }
        let result = self.tun.write(&parts[..=group.count]);
        if result.is_err() {
            group.restore(&mut self.arena[first], &before);
        }
        result
    }

    /// The interface did not take a group: its packets go one by one, if that may help.
    fn refused(&mut self, group: &Group, error: &io::Error) {
        let counters = &self.shared.counters;
        if group.count == 1 || error.raw_os_error() != Some(nix::libc::EINVAL) {
            return count_many(&counters.rx_interface_errors, group.count);
        }
        tracing::warn!(%error, "merging of packets switched off");
        self.tun.stop_merging();
        let header = Header::default().bytes();
        for index in std::iter::once(group.first).chain(self.plan.rest(group)) {
            let packet = &self.arena[self.packets[index].clone()];
            if self.tun.write(&[IoSlice::new(&header), IoSlice::new(packet)]).is_err() {
                count(&counters.rx_interface_errors);
            }
        }
    }
}
