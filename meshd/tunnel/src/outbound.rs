//! The thread from the interface to the network.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Instant;

use nix::poll::{PollFd, PollTimeout};

use crate::engine::{Shared, count};
use crate::packet;
use crate::peer::{BUFFER_BYTES, Outgoing, Peer, Sent};
use crate::tun::Tun;
use crate::udp::Udp;
use crate::wake::{self, READABLE};

/// Packets taken from the interface before the wake-ups are looked at again.
const TURN: usize = 64;

pub(crate) struct Outbound {
    shared: Arc<Shared>,
    tun: Arc<Tun>,
    udp: Arc<Udp>,
    mtu: usize,
    plaintext: Vec<u8>,
    datagram: Vec<u8>,
}

impl Outbound {
    pub(crate) fn new(shared: Arc<Shared>, tun: Arc<Tun>, udp: Arc<Udp>, mtu: u16) -> Self {
        let buffer = || vec![0; BUFFER_BYTES];
        Self { shared, tun, udp, mtu: mtu.into(), plaintext: buffer(), datagram: buffer() }
    }

    /// Runs until the tunnel stops; an error is the end of the tunnel.
    pub(crate) fn run(mut self) -> Result<(), String> {
        let shared = self.shared.clone();
        while !shared.is_stopped() {
            let woken = {
                let wake = PollFd::new(shared.outbound.wake.as_fd(), READABLE);
                let mut fds = [wake, PollFd::new(self.tun.as_fd(), READABLE)];
                wake::wait(&mut fds, PollTimeout::NONE).map_err(|error| format!("cannot wait: {error}"))?;
                wake::is_ready(&fds[0])
            };
            let _batch = shared.outbound.quiescence.begin();
            if woken {
                shared.outbound.wake.clear();
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
        for _ in 0..TURN {
            match self.tun.read(&mut self.plaintext) {
                Ok(Some(length)) => self.packet(length, now),
                Ok(None) => break,
                Err(error) => return Err(format!("cannot read from interface {}: {error}", self.tun.name())),
            }
        }
        Ok(())
    }

    /// Sends the packet of `length` bytes at the start of the plaintext buffer.
    fn packet(&mut self, length: usize, now: Instant) {
        let counters = &self.shared.counters;
        let padded = packet::padded(length, self.mtu);
        let Some(destination) = packet::destination(&self.plaintext[..length])
            .filter(|_| padded + packet::DATA_OVERHEAD <= packet::DATAGRAM_MAX)
        else {
            return count(&counters.tx_malformed);
        };
        let Some(peer) = self.shared.registry().by_address(destination).cloned() else {
            return count(&counters.tx_no_peer);
        };
        self.plaintext[length..padded].fill(0);
        self.send_waiting(&peer, now);
        let sent = peer.lock().encrypt(&self.plaintext[..padded], &mut self.datagram, now);
        match sent {
            Sent::Send(outgoing) => self.send(outgoing),
            Sent::NoEndpoint => count(&self.shared.counters.tx_no_endpoint),
            Sent::Queued | Sent::Gone => {}
        }
    }

    /// What waited for a session goes before anything newer.
    fn send_waiting(&mut self, peer: &Peer, now: Instant) {
        loop {
            let next = peer.lock().next_waiting(&mut self.datagram, now);
            match next {
                Some(outgoing) => self.send(outgoing),
                None => return,
            }
        }
    }

    fn send(&self, outgoing: Outgoing) {
        if self.udp.send(&self.datagram[..outgoing.length], outgoing.to).is_err() {
            count(&self.shared.counters.tx_socket_errors);
        }
    }
}
