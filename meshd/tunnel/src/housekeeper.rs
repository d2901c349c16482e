//! The thread that answers handshakes and keeps time.

use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::{Packet, Tunn};
use nix::poll::PollFd;

use crate::counters::count;
use crate::identity::Identity;
use crate::key::PublicKey;
use crate::packet::{INITIATION_BYTES, Message};
use crate::peer::{BUFFER_BYTES, Notes, Outgoing, Peer};
use crate::shared::Shared;
use crate::wake::{self, READABLE};

/// Handshake messages that may wait. At 0.25 ms each this is a quarter of a second of work.
pub(crate) const HANDSHAKES_WAITING_MAX: usize = 1024;
/// Handshake messages answered before the timers are looked at again.
const HANDSHAKES_PER_TURN: usize = 64;
/// How often every peer's timers run. boringtun's own time stands still in between.
const TICK: Duration = Duration::from_millis(200);
/// How often the limiter starts to count again. boringtun asks for one second.
const LIMITER_RESET: Duration = Duration::from_secs(1);

/// A handshake message and where it came from.
#[derive(Debug)]
pub(crate) struct Handshake {
    bytes: [u8; INITIATION_BYTES],
    length: usize,
    from: SocketAddr,
}

impl Handshake {
    /// `None` if the message is longer than any handshake message.
    pub(crate) fn new(message: &[u8], from: SocketAddr) -> Option<Self> {
        let mut bytes = [0; INITIATION_BYTES];
        bytes.get_mut(..message.len())?.copy_from_slice(message);
        Some(Self { bytes, length: message.len(), from })
    }

    fn message(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

pub(crate) struct Housekeeper {
    shared: Arc<Shared>,
    handshakes: Receiver<Handshake>,
    peers: Vec<Arc<Peer>>,
    datagram: Vec<u8>,
}

impl Housekeeper {
    pub(crate) fn new(shared: Arc<Shared>, handshakes: Receiver<Handshake>) -> Self {
        Self { shared, handshakes, peers: Vec::new(), datagram: vec![0; BUFFER_BYTES] }
    }

    /// Runs until the tunnel stops; an error is the end of the tunnel.
    pub(crate) fn run(mut self) -> Result<(), String> {
        let shared = self.shared.clone();
        let (mut next_tick, mut next_reset) = (Instant::now(), Instant::now() + LIMITER_RESET);
        let mut busy = false;
        while !shared.is_stopped() {
            let pause =
                if busy { Duration::ZERO } else { next_tick.saturating_duration_since(Instant::now()) };
            let wake = PollFd::new(shared.housekeeper.as_fd(), READABLE);
            wake::wait(&mut [wake], wake::rounded_up(pause))
                .map_err(|error| format!("cannot wait: {error}"))?;
            shared.housekeeper.clear();
            shared.bind_if_asked();
            busy = self.answer_handshakes();
            for key in shared.take_arrived() {
                shared.use_twin(&key);
            }
            for peer in shared.take_urgent() {
                self.tick(&peer);
            }
            let now = Instant::now();
            if now >= next_tick {
                next_tick = now + TICK;
                self.tick_all();
            }
            if now >= next_reset {
                next_reset = now + LIMITER_RESET;
                shared.identities().iter().for_each(|identity| identity.limiter.reset_count());
            }
        }
        Ok(())
    }

    fn tick_all(&mut self) {
        let mut peers = std::mem::take(&mut self.peers);
        peers.extend(self.shared.registry().all().cloned());
        for peer in peers.drain(..) {
            self.tick(&peer);
        }
        self.peers = peers; // keeps its memory
    }

    fn tick(&mut self, peer: &Arc<Peer>) {
        let mut notes = Notes::default();
        let probe = peer.lock().tick_probes(&mut self.datagram, Instant::now());
        if let Some((length, addresses)) = probe {
            for to in addresses {
                self.send(Outgoing { length, to, is_data: false });
            }
        }
        let outgoing = peer.lock().tick(&mut self.datagram, Instant::now(), &mut notes);
        self.shared.report(peer, notes);
        if let Some(outgoing) = outgoing {
            self.send(outgoing);
        }
    }

    /// Whether more may be waiting.
    fn answer_handshakes(&mut self) -> bool {
        for _ in 0..HANDSHAKES_PER_TURN {
            match self.handshakes.try_recv() {
                Ok(handshake) => self.answer(&handshake),
                Err(_) => return false,
            }
        }
        true
    }

    fn answer(&mut self, handshake: &Handshake) {
        let Some(peer) = self.sender_of(handshake) else { return count(&self.shared.counters.rx_invalid) };
        let (mut notes, message) = (Notes::default(), (handshake.message(), handshake.from));
        let answer = peer.lock().handshake(message, &mut self.datagram, Instant::now(), &mut notes);
        self.shared.report(&peer, notes);
        if let Some(outgoing) = answer {
            self.send(outgoing);
        }
    }

    /// Who claims to have sent a handshake message. Nothing is proved by it yet.
    fn sender_of(&self, handshake: &Handshake) -> Option<Arc<Peer>> {
        match Message::parse(handshake.message())? {
            Message::Initiation => {
                let Ok(Packet::HandshakeInit(initiation)) = Tunn::parse_incoming_packet(handshake.message())
                else {
                    return None;
                };
                let own = self.shared.identities();
                // A key that it is not for fails to decrypt; so does a forgery, for both.
                let claim = |own: &Identity| {
                    parse_handshake_anon(&own.private.secret(), &own.public.to_x25519(), &initiation).ok()
                };
                if let Some(half) = claim(&own.current) {
                    return self.shared.registry().by_key(&PublicKey(half.peer_static_public)).cloned();
                }
                let half = claim(own.next.as_deref()?)?;
                self.shared.registry().twin(&PublicKey(half.peer_static_public)).cloned()
            }
            Message::Response { receiver } | Message::CookieReply { receiver } => {
                self.shared.registry().by_session(receiver).cloned()
            }
            Message::Data { .. } => None,
        }
    }

    fn send(&self, outgoing: Outgoing) {
        // None: the tunnel is stopping.
        let Some(udp) = self.shared.udp.get(0) else { return };
        if udp.send(&self.datagram[..outgoing.length], outgoing.tos(), outgoing.to).is_err() {
            count(&self.shared.counters.tx_socket_errors);
        }
    }
}
