//! The thread from the network to the interface.

use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, TrySendError};
use std::time::Instant;

use boringtun::noise::TunnResult;
use nix::poll::{PollFd, PollTimeout};

use crate::engine::{Shared, count};
use crate::housekeeper::Handshake;
use crate::packet::{self, Message};
use crate::peer::{BUFFER_BYTES, Notes, Received};
use crate::tun::Tun;
use crate::udp::{self, Udp};
use crate::wake::{self, READABLE};

/// Datagrams taken from one socket before the other gets its turn.
const TURN: usize = 64;

pub(crate) struct Inbound {
    shared: Arc<Shared>,
    tun: Arc<Tun>,
    udp: Arc<Udp>,
    handshakes: SyncSender<Handshake>,
    datagram: Vec<u8>,
    plaintext: Vec<u8>,
}

impl Inbound {
    pub(crate) fn new(
        shared: Arc<Shared>,
        tun: Arc<Tun>,
        udp: Arc<Udp>,
        handshakes: SyncSender<Handshake>,
    ) -> Self {
        let buffer = || vec![0; BUFFER_BYTES];
        Self { shared, tun, udp, handshakes, datagram: buffer(), plaintext: buffer() }
    }

    /// Runs until the tunnel stops; an error is the end of the tunnel.
    pub(crate) fn run(mut self) -> Result<(), String> {
        let (shared, udp) = (self.shared.clone(), self.udp.clone());
        while !shared.is_stopped() {
            let mut fds = vec![PollFd::new(shared.inbound.wake.as_fd(), READABLE)];
            fds.extend(udp.sockets().map(|socket| PollFd::new(socket.as_fd(), READABLE)));
            wake::wait(&mut fds, PollTimeout::NONE).map_err(|error| format!("cannot wait: {error}"))?;
            let _batch = shared.inbound.quiescence.begin();
            for (socket, _) in udp.sockets().zip(&fds[1..]).filter(|(_, fd)| wake::is_ready(fd)) {
                self.turn(socket);
            }
        }
        Ok(())
    }

    fn turn(&mut self, socket: &UdpSocket) {
        let now = Instant::now();
        for _ in 0..TURN {
            match udp::receive(socket, &mut self.datagram) {
                Ok(Some((length, from))) => self.datagram(length, from, now),
                // An error here belongs to something sent earlier (ICMP); the socket lives on.
                Ok(None) | Err(_) => return,
            }
        }
    }

    /// Looks at the datagram of `length` bytes at the start of the datagram buffer.
    fn datagram(&mut self, length: usize, from: SocketAddr, now: Instant) {
        match Message::parse(&self.datagram[..length]) {
            Some(Message::Data { receiver }) => self.data(receiver, length, from, now),
            Some(Message::Initiation | Message::Response { .. }) => self.handshake(length, from),
            Some(Message::CookieReply { .. }) => self.pass_on(length, from),
            None => count(&self.shared.counters.rx_invalid),
        }
    }

    fn data(&mut self, receiver: u32, length: usize, from: SocketAddr, now: Instant) {
        let counters = &self.shared.counters;
        let Some(peer) = self.shared.registry().by_session(receiver).cloned() else {
            return count(&counters.rx_invalid);
        };
        let mut notes = Notes::default();
        let datagram = (&self.datagram[..length], from);
        let received = peer.lock().decrypt(datagram, &mut self.plaintext, now, &mut notes);
        self.shared.report(&peer, notes);
        match received {
            Received::Packet { length, source } => {
                // The whole table, not this peer's list: a nested prefix of another peer must win.
                let owner = self.shared.registry().by_address(source).cloned();
                if owner.as_ref() != Some(&peer) {
                    return count(&counters.rx_wrong_source);
                }
                self.deliver(length);
            }
            Received::Keepalive => {}
            Received::Invalid => count(&counters.rx_invalid),
        }
    }

    fn deliver(&self, length: usize) {
        let packet = &self.plaintext[..length];
        // boringtun has cut the padding; a length field that is too small for its header gets no further.
        if packet::destination(packet).is_none() {
            count(&self.shared.counters.rx_invalid);
        } else if self.tun.write(packet).is_err() {
            count(&self.shared.counters.rx_interface_errors);
        }
    }

    /// Judges a handshake message before anything expensive is done for it.
    fn handshake(&mut self, length: usize, from: SocketAddr) {
        let identity = self.shared.identity();
        let mut cookie = [0; packet::COOKIE_REPLY_BYTES];
        let verdict =
            identity.limiter.verify_packet(Some(from.ip()), &self.datagram[..length], &mut cookie).map(drop);
        match verdict {
            Ok(()) => self.pass_on(length, from),
            Err(TunnResult::WriteToNetwork(reply)) => {
                count(&self.shared.counters.rx_under_load);
                if self.udp.send(reply, from).is_err() {
                    count(&self.shared.counters.tx_socket_errors);
                }
            }
            Err(_) => count(&self.shared.counters.rx_invalid),
        }
    }

    /// Gives a handshake message to the housekeeper.
    fn pass_on(&self, length: usize, from: SocketAddr) {
        let Some(handshake) = Handshake::new(&self.datagram[..length], from) else { return };
        match self.handshakes.try_send(handshake) {
            Ok(()) => self.shared.housekeeper.wake.wake(),
            Err(TrySendError::Full(_)) => count(&self.shared.counters.rx_handshakes_dropped),
            // The housekeeper has ended, so the tunnel is stopping.
            Err(TrySendError::Disconnected(_)) => {}
        }
    }
}
