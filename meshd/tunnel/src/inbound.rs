//! The thread from the network to the interface.

use std::io::{self, IoSlice};
use std::iter::Peekable;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, TrySendError};
use std::time::Instant;

use boringtun::noise::TunnResult;
use nix::poll::{PollFd, PollTimeout};

use crate::counters::{count, count_many};
use crate::detour::is_virtual;
use crate::housekeeper::Handshake;
use crate::offload::merge::{Group, Kinds, PACKETS_MAX, Plan};
use crate::offload::virtio::Header;
use crate::packet::{self, Message};
use crate::peer::{BUFFER_BYTES, Notes, Peer, Received as Decrypted};
use crate::receive::Received;
use crate::shared::Shared;
use crate::tun::Tun;
use crate::udp::Udp;
use crate::wake::{self, READABLE};

/// Calls at one socket before the other gets its turn.
const TURN: usize = 8;
/// Decrypted packets that wait to be written, bytes. Twice the largest message.
const ARENA_BYTES: usize = 2 * BUFFER_BYTES;

pub(crate) struct Inbound {
    shared: Arc<Shared>,
    queue: usize,
    udp: Arc<Udp>,
    handshakes: SyncSender<Handshake>,
    delivery: Delivery,
}

impl Inbound {
    pub(crate) fn new(
        shared: Arc<Shared>,
        queue: usize,
        tun: Arc<Tun>,
        udp: Arc<Udp>,
        handshakes: SyncSender<Handshake>,
    ) -> Self {
        let delivery = Delivery::new(shared.clone(), tun);
        Self { shared, queue, udp, handshakes, delivery }
    }

    /// Runs until the tunnel stops; an error is the end of the tunnel.
    pub(crate) fn run(mut self) -> Result<(), String> {
        let shared = self.shared.clone();
        let own = &shared.queues[self.queue];
        let mut received = Received::new();
        while !shared.is_stopped() {
            // They may be exchanged at any time, with a wake-up.
            let Some(udp) = shared.udp.get(self.queue) else { break };
            self.udp = udp.clone();
            let mut fds = vec![PollFd::new(own.inbound.as_fd(), READABLE)];
            fds.extend(udp.sockets().map(|socket| PollFd::new(socket.as_fd(), READABLE)));
            wake::wait(&mut fds, PollTimeout::NONE).map_err(|error| format!("cannot wait: {error}"))?;
            if wake::is_ready(&fds[0]) {
                own.inbound.clear();
                if self.queue == 0 {
                    self.detoured();
                }
            }
            for (socket, _) in udp.sockets().zip(&fds[1..]).filter(|(_, fd)| wake::is_ready(fd)) {
                self.turn(socket, &mut received);
            }
        }
        Ok(())
    }

    fn turn(&mut self, socket: &UdpSocket, received: &mut Received) {
        let shared = self.shared.clone();
        for _ in 0..TURN {
            // An error here belongs to something sent earlier (ICMP); the socket lives on.
            let Ok(1..) = received.receive(socket) else { return };
            let _batch = shared.queues[self.queue].quiescence.begin();
            let now = Instant::now();
            for (from, tos, datagrams) in received.messages() {
                self.delivery.congested = tos & packet::ECN_CE == packet::ECN_CE;
                self.message(from, datagrams.peekable(), now);
            }
            self.delivery.flush();
        }
    }

    /// Takes what came from virtual endpoints.
    fn detoured(&mut self) {
        let shared = self.shared.clone();
        let datagrams = shared.detoured.take();
        let _batch = shared.queues[self.queue].quiescence.begin();
        self.delivery.congested = false;
        let now = Instant::now();
        for (datagram, from) in &datagrams {
            self.message(*from, std::iter::once(datagram.as_slice()).peekable(), now);
        }
        self.delivery.flush();
    }

    /// Takes the datagrams of one sender.
    fn message<'a, I: Iterator<Item = &'a [u8]>>(
        &mut self,
        from: SocketAddr,
        mut datagrams: Peekable<I>,
        now: Instant,
    ) {
        if datagrams.peek().is_none() {
            count(&self.shared.counters.rx_invalid); // no bytes at all
        }
        while let Some(datagram) = datagrams.peek().copied() {
            match Message::parse(datagram) {
                Some(Message::Data { receiver }) => {
                    let found = self.shared.registry().by_session(receiver).cloned();
                    if let Some(peer) = found {
                        self.delivery.run(&peer, from, &mut datagrams, now);
                        continue;
                    }
                    count(&self.shared.counters.rx_invalid);
                }
                Some(Message::Initiation | Message::Response { .. }) => self.handshake(datagram, from),
                Some(Message::CookieReply { .. }) => self.pass_on(datagram, from),
                None => self.foreign(datagram, from),
            }
            datagrams.next();
        }
    }

    /// What is not WireGuard's may be somebody else's who shares the port.
    fn foreign(&self, datagram: &[u8], from: SocketAddr) {
        let theirs = !packet::is_wireguard(datagram) && !is_virtual(from);
        let counters = &self.shared.counters;
        if theirs && self.shared.foreign.give(datagram, from) {
            count(&counters.rx_foreign);
        } else {
            count(&counters.rx_invalid);
        }
    }

    /// Judges a handshake message before anything expensive is done for it.
    fn handshake(&self, datagram: &[u8], from: SocketAddr) {
        for identity in self.shared.identities().iter() {
            let mut cookie = [0; packet::COOKIE_REPLY_BYTES];
            let verdict = identity.limiter.verify_packet(Some(from.ip()), datagram, &mut cookie).map(drop);
            match verdict {
                Ok(()) => return self.pass_on(datagram, from),
                Err(TunnResult::WriteToNetwork(reply)) => {
                    count(&self.shared.counters.rx_under_load);
                    if self.udp.send_now(reply, from).is_err() {
                        count(&self.shared.counters.tx_socket_errors);
                    }
                    return;
                }
                // Not for this key of ours.
                Err(_) => {}
            }
        }
        count(&self.shared.counters.rx_invalid);
    }

    /// Gives a handshake message to the housekeeper.
    fn pass_on(&self, datagram: &[u8], from: SocketAddr) {
        let Some(handshake) = Handshake::new(datagram, from) else { return };
        match self.handshakes.try_send(handshake) {
            Ok(()) => self.shared.housekeeper.wake(),
            Err(TrySendError::Full(_)) => count(&self.shared.counters.rx_handshakes_dropped),
            // The housekeeper has ended, so the tunnel is stopping.
            Err(TrySendError::Disconnected(_)) => {}
        }
    }
}

/// From decryption to the interface.
struct Delivery {
    shared: Arc<Shared>,
    tun: Arc<Tun>,
    arena: Vec<u8>,
    used: usize,
    /// Where in the arena the packets are that may be delivered.
    packets: Vec<Range<usize>>,
    /// The inner sources of the run in progress.
    sources: Vec<IpAddr>,
    /// Whether the datagrams at hand have met congestion on their way.
    congested: bool,
    plan: Plan,
}

impl Delivery {
    fn new(shared: Arc<Shared>, tun: Arc<Tun>) -> Self {
        Self {
            shared,
            tun,
            arena: vec![0; ARENA_BYTES],
            used: 0,
            packets: Vec::new(),
            sources: Vec::new(),
            congested: false,
            plan: Plan::default(),
        }
    }

    /// Decrypts the data messages at the head of `datagrams` that are for `peer`: one lock for all of them.
    fn run<'a, I: Iterator<Item = &'a [u8]>>(
        &mut self,
        peer: &Arc<Peer>,
        from: SocketAddr,
        datagrams: &mut Peekable<I>,
        now: Instant,
    ) {
        let is_ours = |datagram: &&[u8]| matches!(Message::parse(datagram), Some(Message::Data { receiver }) if receiver >> 8 == peer.index);
        let (first, mut notes) = (self.packets.len(), Notes::default());
        let mut state = peer.lock();
        while self.arena.len() - self.used >= BUFFER_BYTES {
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
        if self.arena.len() - self.used < BUFFER_BYTES {
            self.flush();
        }
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
                self.packets.swap(kept, index);
                kept += 1;
            }
        }
        self.packets.truncate(kept);
    }

    /// Writes what waits to the interface.
    fn flush(&mut self) {
        let (tcp, udp) = self.tun.merging();
        self.plan.make(&self.arena, &self.packets, Kinds { tcp, udp });
        for index in 0..self.plan.groups().len() {
            let group = self.plan.groups()[index];
            if let Err(error) = self.write(&group) {
                self.refused(&group, &error);
            }
        }
        self.packets.clear();
        self.used = 0;
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
