//! From the interface to the network.

use std::io::IoSlice;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use crate::counters::{count, count_many};
use crate::offload::split::Segments;
use crate::offload::virtio::{HEADER_BYTES, Header};
use crate::outbox::{Flushed, Outbox};
use crate::packet::{self, DATA_OVERHEAD, DATAGRAM_MAX, Fragment};
use crate::peer::{BUFFER_BYTES, Peer, Sent};
use crate::shared::Shared;
use crate::tun::{READ_BYTES, Tun};
use crate::udp::{SEND_WAIT, Udp};
use crate::unreachable::{self, ANSWER_BYTES, Limit};

/// Packets taken from the interface before the other direction gets its turn.
const TURN: usize = 64;

pub(crate) struct Outbound {
    shared: Arc<Shared>,
    tun: Arc<Tun>,
    udp: Arc<Udp>,
    mtu: usize,
    /// What was read: header and packet.
    packet: Vec<u8>,
    /// One segment of it, padded.
    segment: Vec<u8>,
    outbox: Outbox,
    /// Whose the last destination was, within a turn.
    last: Option<(IpAddr, Arc<Peer>)>,
    /// Where the outbox cannot send to at the moment, and since when.
    blocked: Option<(SocketAddr, Instant)>,
    answers: Limit,
}

/// How far a packet has come.
enum Filled {
    All,
    /// The outbox must be flushed first.
    Full,
    NoEndpoint,
}

impl Outbound {
    pub(crate) fn new(shared: Arc<Shared>, tun: Arc<Tun>, udp: Arc<Udp>, mtu: u16) -> Self {
        Self {
            shared,
            tun,
            udp,
            mtu: mtu.into(),
            packet: vec![0; READ_BYTES],
            segment: vec![0; BUFFER_BYTES],
            outbox: Outbox::new(),
            last: None,
            blocked: None,
            answers: Limit::new(Instant::now()),
        }
    }

    /// The sockets were exchanged.
    pub(crate) fn set_udp(&mut self, udp: Arc<Udp>) {
        self.udp = udp;
    }

    /// Takes some packets from the interface and sends them. An error is the end of the tunnel. Call it only
    /// while nothing is [`blocked`](Self::blocked).
    pub(crate) fn turn(&mut self) -> Result<(), String> {
        let now = Instant::now();
        let mut result = Ok(());
        for _ in 0..TURN {
            match self.tun.read(&mut self.packet) {
                Ok(Some(length)) => self.packet(length, now),
                Ok(None) => break,
                Err(error) => {
                    result = Err(format!("cannot read from interface {}: {error}", self.tun.name()));
                    break;
                }
            }
            if self.outbox.is_worth_a_call() {
                break;
            }
        }
        self.last = None;
        self.flush(now);
        result
    }

    /// Where what could not be sent is to go, and since when it waits.
    pub(crate) fn blocked(&self) -> Option<(SocketAddr, Instant)> {
        self.blocked
    }

    /// Tries again to send what waits, or gives it up if it has waited for long.
    pub(crate) fn retry(&mut self, now: Instant) {
        self.flush(now);
        if self.blocked.is_some_and(|(_, since)| now.saturating_duration_since(since) >= SEND_WAIT) {
            self.drop_rest();
        }
    }

    /// Sends what waited for a session of `peer`.
    pub(crate) fn send_waiting(&mut self, peer: &Peer, now: Instant) {
        while let Filled::Full = self.fill(peer, None, 0, Fragment::No, now) {
            self.make_room(now);
        }
        self.flush(now);
    }

    /// Sends the packet at the start of the packet buffer; `length` is with its header.
    fn packet(&mut self, length: usize, now: Instant) {
        // Taken out, so that the segments can borrow it while the rest is at work.
        let mut buffer = std::mem::take(&mut self.packet);
        self.segments(&mut buffer[..length], now);
        self.packet = buffer;
    }

    fn segments(&mut self, bytes: &mut [u8], now: Instant) {
        let shared = self.shared.clone();
        let counters = &shared.counters;
        let Some((header, packet)) = bytes.split_first_chunk_mut::<HEADER_BYTES>() else {
            return count(&counters.tx_malformed);
        };
        let Some(destination) = packet::destination(packet) else { return count(&counters.tx_malformed) };
        let Some(peer) = self.peer_at(destination) else {
            count(&counters.tx_no_peer);
            return self.refuse(packet, now);
        };
        let Some(mut segments) = Segments::new(&Header::parse(header), packet) else {
            return count(&counters.tx_malformed);
        };
        let (tos, fragment) = (packet::outer_tos(segments.packet()), Fragment::of(segments.packet()));
        loop {
            match self.fill(&peer, Some(&mut segments), tos, fragment, now) {
                Filled::All => return,
                Filled::Full => self.make_room(now),
                Filled::NoEndpoint => {
                    count(&counters.tx_no_endpoint);
                    return self.refuse(segments.packet(), now);
                }
            }
        }
    }

    fn peer_at(&mut self, destination: IpAddr) -> Option<Arc<Peer>> {
        match &self.last {
            Some((known, peer)) if *known == destination => Some(peer.clone()),
            _ => {
                let peer = self.shared.registry().by_address(destination).cloned()?;
                self.last = Some((destination, peer.clone()));
                Some(peer)
            }
        }
    }

    /// Tells the host that a packet cannot be sent.
    fn refuse(&mut self, packet: &[u8], now: Instant) {
        let mut bytes = [0; ANSWER_BYTES];
        if self.answers.allows(now)
            && let Some(length) = unreachable::answer(packet, &mut bytes)
        {
            let header = Header::default().bytes();
            // If the host does not take it, it waits, as it would have without.
            let _ = self.tun.write(&[IoSlice::new(&header), IoSlice::new(&bytes[..length])]);
        }
    }

    /// Encrypts into the outbox what waited for a session, and then the segments: one lock for all of them.
    fn fill(
        &mut self,
        peer: &Peer,
        segments: Option<&mut Segments<'_>>,
        tos: u8,
        fragment: Fragment,
        now: Instant,
    ) -> Filled {
        let counters = &self.shared.counters;
        let mut state = peer.lock();
        if state.endpoint().is_none() {
            return Filled::NoEndpoint;
        }
        // What waited goes before anything newer.
        loop {
            if self.outbox.is_full() {
                return Filled::Full;
            }
            let Some(waited) = state.next_waiting(self.outbox.room(Fragment::No), now) else { break };
            self.outbox.add(&waited, waited.tos(), Fragment::No);
        }
        let Some(segments) = segments else { return Filled::All };
        while let Some(length) = segments.next_length() {
            if self.outbox.is_full() {
                return Filled::Full;
            }
            segments.write_next(&mut self.segment);
            let padded = packet::padded(length, self.mtu);
            if padded + DATA_OVERHEAD > DATAGRAM_MAX {
                count(&counters.tx_malformed);
                continue;
            }
            self.segment[length..padded].fill(0);
            match state.encrypt(&self.segment[..padded], self.outbox.room(fragment), now) {
                Sent::Send(outgoing) => self.outbox.add(&outgoing, tos, fragment),
                Sent::Began { first, dropped } => {
                    count_many(&counters.tx_waiting_dropped, dropped);
                    self.outbox.add(&first, first.tos(), fragment);
                }
                Sent::Queued { dropped } => count_many(&counters.tx_waiting_dropped, dropped),
                Sent::NoEndpoint | Sent::Gone => {}
            }
        }
        Filled::All
    }

    /// Sends what there is, waiting a moment for the socket if it must: in the middle of a packet.
    fn make_room(&mut self, now: Instant) {
        self.flush(now);
        if let Some((to, _)) = self.blocked {
            let _ = self.udp.wait_for_room(to, SEND_WAIT);
            self.flush(now);
            if self.blocked.is_some() {
                self.drop_rest();
            }
        }
    }

    fn flush(&mut self, now: Instant) {
        let (was, progress) = (self.blocked, self.outbox.progress());
        self.blocked = match self.outbox.flush(&self.udp) {
            Flushed::All => None,
            // A socket that takes a little at a time is not stuck.
            Flushed::Blocked(to) => {
                let stuck = was.filter(|_| self.outbox.progress() == progress);
                Some((to, stuck.map_or(now, |(_, since)| since)))
            }
        };
        count_many(&self.shared.counters.tx_socket_errors, self.outbox.take_refused());
    }

    fn drop_rest(&mut self) {
        self.outbox.drop_rest();
        self.blocked = None;
        count_many(&self.shared.counters.tx_socket_errors, self.outbox.take_refused());
    }
}
