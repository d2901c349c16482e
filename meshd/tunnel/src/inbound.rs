//! From the network to the interface.

use std::iter::Peekable;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, TrySendError};
use std::time::Instant;

use boringtun::noise::TunnResult;

use crate::counters::count;
use crate::delivery::Delivery;
use crate::detour::is_virtual;
use crate::housekeeper::Handshake;
use crate::packet::{self, Message};
use crate::receive::Received;
use crate::shared::Shared;
use crate::tun::Tun;
use crate::udp::Udp;

/// Calls at one socket in a turn.
const CALLS: usize = 2;

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

    /// The sockets were exchanged.
    pub(crate) fn set_udp(&mut self, udp: Arc<Udp>) {
        self.udp = udp;
    }

    /// Takes what one call at `socket` brings, or two if the first ends between the fragments of a packet.
    pub(crate) fn turn(&mut self, socket: &UdpSocket, received: &mut Received) {
        let shared = self.shared.clone();
        let _batch = shared.queues[self.queue].quiescence.begin();
        for _ in 0..CALLS {
            // An error here belongs to something sent earlier (ICMP); the socket lives on.
            let Ok(1..) = received.receive(socket) else { break };
            let now = Instant::now();
            for (from, tos, datagrams) in received.messages() {
                self.delivery.congested = tos & packet::ECN_CE == packet::ECN_CE;
                self.message(from, datagrams.peekable(), now);
            }
            if !self.delivery.has_open_fragments() {
                break;
            }
        }
        self.delivery.flush();
    }

    /// Takes what came from virtual endpoints.
    pub(crate) fn detoured(&mut self) {
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
