//! The thread from the interface to the network.

use std::io::IoSlice;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Instant;

use nix::poll::{PollFd, PollTimeout};

use crate::counters::{count, count_many};
use crate::offload::split::Segments;
use crate::offload::virtio::{HEADER_BYTES, Header};
use crate::packet::{self, DATA_OVERHEAD, DATAGRAM_MAX};
use crate::peer::{BUFFER_BYTES, Outgoing, Peer, Sent};
use crate::shared::Shared;
use crate::tun::{READ_BYTES, Tun};
use crate::udp::Udp;
use crate::unreachable::{self, ANSWER_BYTES, Limit};
use crate::wake::{self, READABLE};

/// Packets taken from the interface before the wake-ups are looked at again.
const TURN: usize = 64;
/// Datagrams in one call. Older kernels take no more (`UDP_MAX_SEGMENTS`).
const BATCH_DATAGRAMS: usize = 64;

pub(crate) struct Outbound {
    shared: Arc<Shared>,
    queue: usize,
    tun: Arc<Tun>,
    udp: Arc<Udp>,
    mtu: usize,
    /// What was read: header and packet.
    packet: Vec<u8>,
    /// One segment of it, padded.
    segment: Vec<u8>,
    batch: Batch,
    /// A datagram that does not go with others.
    single: Vec<u8>,
    answers: Limit,
}

impl Outbound {
    pub(crate) fn new(shared: Arc<Shared>, queue: usize, tun: Arc<Tun>, udp: Arc<Udp>, mtu: u16) -> Self {
        let buffer = || vec![0; BUFFER_BYTES];
        Self {
            shared,
            queue,
            tun,
            udp,
            mtu: mtu.into(),
            packet: vec![0; READ_BYTES],
            segment: buffer(),
            batch: Batch::new(),
            single: buffer(),
            answers: Limit::new(Instant::now()),
        }
    }

    /// Runs until the tunnel stops; an error is the end of the tunnel.
    pub(crate) fn run(mut self) -> Result<(), String> {
        let shared = self.shared.clone();
        while !shared.is_stopped() {
            let woken = {
                let wake = PollFd::new(shared.queues[self.queue].outbound.as_fd(), READABLE);
                let mut fds = [wake, PollFd::new(self.tun.as_fd(), READABLE)];
                wake::wait(&mut fds, PollTimeout::NONE).map_err(|error| format!("cannot wait: {error}"))?;
                wake::is_ready(&fds[0])
            };
            if woken {
                shared.queues[self.queue].outbound.clear();
                // The sockets may have been exchanged.
                let Some(udp) = shared.udp.get(self.queue) else { break };
                self.udp = udp;
                for peer in shared.take_ready() {
                    self.send_waiting(&peer, Instant::now());
                }
            }
            self.turn()?;
        }
        Ok(())
    }

    fn turn(&mut self) -> Result<(), String> {
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
        }
        self.flush();
        result
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
        let found = shared.registry().by_address(destination).cloned();
        let Some(peer) = found else {
            count(&counters.tx_no_peer);
            return self.refuse(packet, now);
        };
        if peer.lock().endpoint().is_none() {
            count(&counters.tx_no_endpoint);
            return self.refuse(packet, now);
        }
        let Some(mut segments) = Segments::new(&Header::parse(header), packet) else {
            return count(&counters.tx_malformed);
        };
        self.send_waiting(&peer, now);
        let tos = packet::outer_tos(segments.packet());
        while segments.next_length().is_some() {
            if let Some(handshake) = self.fill(&peer, &mut segments, tos, now) {
                self.send_single(handshake);
            } else if segments.next_length().is_some() {
                self.flush();
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

    /// Encrypts segments into the batch until it is full, or something came out that is not data (in the
    /// single buffer; send it and call again), or all are done.
    fn fill(&mut self, peer: &Peer, segments: &mut Segments<'_>, tos: u8, now: Instant) -> Option<Outgoing> {
        let counters = &self.shared.counters;
        let mut state = peer.lock();
        while let Some(length) = segments.next_length() {
            let padded = packet::padded(length, self.mtu);
            if padded + DATA_OVERHEAD > DATAGRAM_MAX {
                segments.write_next(&mut self.segment);
                count(&counters.tx_malformed);
                continue;
            }
            match state.endpoint() {
                Some(to) if !self.batch.takes(padded + DATA_OVERHEAD, (tos, to)) => return None,
                _ => {}
            }
            segments.write_next(&mut self.segment);
            self.segment[length..padded].fill(0);
            match state.encrypt(&self.segment[..padded], self.batch.room(), now) {
                Sent::Send(outgoing) => self.batch.add(&outgoing, tos),
                Sent::Began { first, dropped } => {
                    count_many(&counters.tx_waiting_dropped, dropped);
                    let handshake = &self.batch.room()[..first.length];
                    self.single[..first.length].copy_from_slice(handshake);
                    return Some(first);
                }
                Sent::Queued { dropped } => count_many(&counters.tx_waiting_dropped, dropped),
                Sent::NoEndpoint | Sent::Gone => {}
            }
        }
        None
    }

    /// What waited for a session goes before anything newer.
    fn send_waiting(&mut self, peer: &Peer, now: Instant) {
        loop {
            let next = peer.lock().next_waiting(&mut self.single, now);
            match next {
                Some(outgoing) => {
                    self.flush();
                    self.send_single(outgoing);
                }
                None => return,
            }
        }
    }

    fn send_single(&self, outgoing: Outgoing) {
        if self.udp.send(&self.single[..outgoing.length], outgoing.tos(), outgoing.to).is_err() {
            count(&self.shared.counters.tx_socket_errors);
        }
    }

    fn flush(&mut self) {
        if let Some((bytes, size, (tos, to))) = self.batch.take() {
            let refused = self.udp.send_batch(bytes, size, tos, to);
            count_many(&self.shared.counters.tx_socket_errors, refused);
        }
    }
}

/// Datagrams for one destination that leave in one call: all of one size, but the last may be shorter.
struct Batch {
    bytes: Vec<u8>,
    length: usize,
    count: usize,
    size: usize,
    /// Type of service and address.
    to: Option<(u8, SocketAddr)>,
}

impl Batch {
    fn new() -> Self {
        // Behind a full batch there must still be room for the largest single result.
        Self { bytes: vec![0; DATAGRAM_MAX + BUFFER_BYTES], length: 0, count: 0, size: 0, to: None }
    }

    /// Whether a datagram of `length` bytes to `to` may follow. An empty batch takes anything.
    fn takes(&self, length: usize, to: (u8, SocketAddr)) -> bool {
        let ended = self.length < self.size * self.count;
        self.count == 0
            || (!ended
                && self.to == Some(to)
                && length <= self.size
                && self.count < BATCH_DATAGRAMS
                && self.length + length <= DATAGRAM_MAX)
    }

    /// Where the next datagram goes.
    fn room(&mut self) -> &mut [u8] {
        &mut self.bytes[self.length..]
    }

    /// Takes up the datagram that was written to [`room`](Self::room).
    fn add(&mut self, outgoing: &Outgoing, tos: u8) {
        if self.count == 0 {
            (self.size, self.to) = (outgoing.length, Some((tos, outgoing.to)));
        }
        self.length += outgoing.length;
        self.count += 1;
    }

    /// All datagrams, their size, and how and where they go; the batch is empty then.
    fn take(&mut self) -> Option<(&[u8], usize, (u8, SocketAddr))> {
        let (length, to) = (std::mem::take(&mut self.length), self.to.take()?);
        self.count = 0;
        Some((&self.bytes[..length], self.size, to))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn add(batch: &mut Batch, length: usize, to: SocketAddr) -> bool {
        let takes = batch.takes(length, (2, to));
        if takes {
            batch.add(&Outgoing { length, to, is_data: true }, 2);
        }
        takes
    }

    #[test]
    fn a_batch_holds_what_one_call_may_send() {
        let (to, other): (SocketAddr, SocketAddr) = (([10, 0, 0, 1], 1).into(), ([10, 0, 0, 1], 2).into());
        let mut batch = Batch::new();
        assert!(batch.take().is_none());
        assert!(add(&mut batch, 100, to));
        assert!(!add(&mut batch, 100, other));
        assert!(!add(&mut batch, 101, to));
        assert!(!batch.takes(100, (0, to)), "another type of service");
        assert!(add(&mut batch, 60, to));
        assert!(!add(&mut batch, 60, to), "a shorter one is the last");
        assert_eq!(batch.take().map(|(bytes, size, to)| (bytes.len(), size, to)), Some((160, 100, (2, to))));
        for _ in 0..BATCH_DATAGRAMS {
            assert!(add(&mut batch, 96, other));
        }
        assert!(!add(&mut batch, 96, other));
        batch.take();
        while add(&mut batch, 1452, to) {}
        let (bytes, ..) = batch.take().unwrap();
        assert_eq!(bytes.len(), 45 * 1452);
    }
}
