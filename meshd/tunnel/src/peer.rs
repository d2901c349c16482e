//! One peer: the adapter around boringtun's `Tunn`, and everything about a peer that `Tunn` leaves out.
//!
//! Performs no I/O and reads no clock itself: bytes and `now` come in, bytes to send come out. (`Tunn`
//! reads its own clock and randomness; this file is as far as that goes.) Traps of boringtun 0.7.1
//! that are dealt with here:
//! - it panics on short buffers before it authenticates: [`BUFFER_BYTES`] is enough for any datagram;
//! - it queues up to 256 packets of any size while there is no session, and rotates that queue when it is
//!   asked too early: it gets packets only while there is a session, and the queue is ours, bounded by
//!   bytes and emptied only once a session is known to be in use ([`Backlog::Ready`]);
//! - it gives up after 90 s and its keepalive does not try again: keepalive and retry are ours;
//! - its keepalive interval cannot be changed later: ours can.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::{Tunn, TunnResult};

use crate::config::PeerConfig;
use crate::detour::is_virtual;
use crate::identity::Identity;
use crate::key::PublicKey;
use crate::packet::{self, Message};
use crate::tunnel::PeerStats;

/// Size every buffer given to a peer must have: any datagram or padded packet, with its overhead.
pub(crate) const BUFFER_BYTES: usize = 65_536 + packet::DATA_OVERHEAD;

/// Age of a session at which its initiator makes a new one. WireGuard paper §6.1.
const REKEY_AFTER_TIME: Duration = Duration::from_secs(120);
/// The same for the responder of a peer that must stay up: later, so that one side begins as a rule.
const RESPONDER_REKEY_AFTER_TIME: Duration = Duration::from_secs(150);
/// Silence after something was sent that counts as such: KEEPALIVE_TIMEOUT + REKEY_TIMEOUT of the
/// WireGuard paper §6.1.
const SILENCE: Duration = Duration::from_secs(15);
/// Initiations on request are at least this far apart; peers drop faster ones as a flood.
const INITIATION_SPACING: Duration = Duration::from_millis(20);
/// Pause before another 90 s of attempts once boringtun gave up. Doubles, with jitter, up to the last.
const RETRY_FIRST: Duration = Duration::from_secs(5);
const RETRY_LAST: Duration = Duration::from_secs(80);

/// What may wait for a session: packets, and their bytes with [`PACKET_COST`] for each. More pushes out the
/// oldest, as in the kernel's WireGuard.
const WAITING_MAX: usize = 1024;
const WAITING_BYTES_MAX: usize = 256 << 10;
/// What a waiting packet costs beside its bytes.
const PACKET_COST: usize = 64;
/// Addresses one initiation is sent to at once.
pub(crate) const PROBES_MAX: usize = 32;
/// A path through a virtual endpoint takes over from a direct one after this long without a word on that.
/// In between, messages of both may mix without moving the endpoint to and fro.
const DIRECT_LOST: Duration = Duration::from_secs(5);

/// Sessions that boringtun keeps at the same time, by the last bits of their index.
const SESSIONS: usize = 8;

pub(crate) struct Peer {
    pub(crate) key: PublicKey,
    /// 24 bits, in every session index that we hand out.
    pub(crate) index: u32,
    /// Peers with the same number may use each other's inner addresses: the twins of one peer, and two
    /// keys of one peer while one hands over to the other.
    owner: AtomicU64,
    state: Mutex<State>,
}

/// Two are the same only if they are one.
impl PartialEq for Peer {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self, other)
    }
}

impl Peer {
    /// `start` is when a peer with a keepalive is first greeted.
    pub(crate) fn new(config: PeerConfig, own: &Identity, index: u32, owner: u64, start: Instant) -> Self {
        let (key, now) = (config.public_key, Instant::now());
        let state = State {
            tunn: new_tunn(own, &config, index),
            index,
            endpoint: config.endpoint.map(packet::unmapped),
            keepalive: config.keepalive(),
            config,
            removed: false,
            is_twin: false,
            backlog: Backlog::Empty,
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            in_session: false,
            initiation_wanted: false,
            probes: Vec::new(),
            last_direct_rx: None,
            unconfirmed: [None; SESSIONS],
            last_initiation: None,
            initiator: false,
            last_handshake: None,
            last_tx: now,
            unanswered_since: None,
            silent: false,
            gave_up: false,
            retry_at: start,
            retry_pause: RETRY_FIRST,
            rtt: None,
            rx_bytes: 0,
            tx_bytes: 0,
        };
        Self { key, index, owner: AtomicU64::new(owner), state: Mutex::new(state) }
    }

    /// The same peer for another key of ours: no session, but where it is and what it may is known.
    pub(crate) fn twin(&self, own: &Identity, index: u32, start: Instant) -> Self {
        let (config, endpoint) = {
            let state = self.lock();
            (state.config.clone(), state.endpoint)
        };
        let twin = Self::new(config, own, index, self.owner(), start);
        {
            let mut state = twin.lock();
            (state.endpoint, state.is_twin) = (endpoint, true);
        }
        twin
    }

    pub(crate) fn owner(&self) -> u64 {
        self.owner.load(Ordering::Acquire)
    }

    /// From here on the peer may send what `other` may.
    pub(crate) fn join(&self, other: &Self) {
        self.owner.store(other.owner(), Ordering::Release);
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Packets that wait for a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Backlog {
    Empty,
    Waiting,
    /// A session is in use: the sender may take them.
    Ready,
}

/// A peer behind its lock.
pub(crate) struct State {
    tunn: Tunn,
    index: u32,
    endpoint: Option<SocketAddr>,
    keepalive: Option<Duration>,
    config: PeerConfig,
    removed: bool,
    /// Of a second key of ours, and not yet used by the peer for packets.
    is_twin: bool,
    backlog: Backlog,
    waiting: VecDeque<Vec<u8>>,
    waiting_bytes: usize,
    /// Whether `Tunn` has a session to send with. It says so itself, but reads the clock for that.
    in_session: bool,
    initiation_wanted: bool,
    /// Where else the next initiation goes.
    probes: Vec<SocketAddr>,
    /// When the peer last spoke from an address that is not virtual.
    last_direct_rx: Option<Instant>,
    /// Our indices of sessions that we answered, each in use once data comes in on it. The peer may have
    /// asked several times before; boringtun keeps as many sessions, in the same places.
    unconfirmed: [Option<u32>; SESSIONS],
    /// Our last initiation: its index and when it was made.
    last_initiation: Option<(u32, Instant)>,
    initiator: bool,
    last_handshake: Option<Instant>,
    last_tx: Instant,
    unanswered_since: Option<Instant>,
    silent: bool,
    /// boringtun has stopped trying; nothing was started since.
    gave_up: bool,
    retry_at: Instant,
    retry_pause: Duration,
    rtt: Option<Duration>,
    rx_bytes: u64,
    tx_bytes: u64,
}

/// Bytes at the start of the caller's buffer, to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Outgoing {
    pub(crate) length: usize,
    pub(crate) to: SocketAddr,
    /// A data message, not a handshake.
    pub(crate) is_data: bool,
}

impl Outgoing {
    /// Type of service for those that leave alone.
    pub(crate) fn tos(&self) -> u8 {
        if self.is_data { 0 } else { packet::HANDSHAKE_TOS }
    }
}

/// What came of an inner packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sent {
    Send(Outgoing),
    /// Kept as the first of those that wait, and here is the handshake.
    Began {
        first: Outgoing,
        dropped: usize,
    },
    /// Kept until there is a session, in place of so many older ones.
    Queued {
        dropped: usize,
    },
    NoEndpoint,
    /// The peer was removed meanwhile.
    Gone,
}

/// What came of a data message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Received {
    /// An inner packet of `length` bytes at the start of the caller's buffer. Its source is unchecked.
    Packet {
        length: usize,
        source: IpAddr,
    },
    Keepalive,
    Invalid,
}

/// What the caller has to tell others after a call.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Notes {
    pub(crate) handshake_done: bool,
    pub(crate) moved_to: Option<SocketAddr>,
    pub(crate) backlog_ready: bool,
    pub(crate) silent: bool,
    /// An answer to our initiation: where from and how long it took.
    pub(crate) answered: Option<(SocketAddr, Duration)>,
    /// The peer has begun to use the second key of ours.
    pub(crate) twin_in_use: bool,
}

impl State {
    /// Encrypts one inner packet into `out`. Without a session it is kept and a handshake begins. Take
    /// [`next_waiting`](Self::next_waiting) to its end first, or packets overtake each other.
    pub(crate) fn encrypt(&mut self, plaintext: &[u8], out: &mut [u8], now: Instant) -> Sent {
        if self.removed {
            return Sent::Gone;
        }
        let Some(to) = self.endpoint else { return Sent::NoEndpoint };
        self.unanswered_since.get_or_insert(now);
        if self.in_session
            && let Some(length) = datagram_length(self.tunn.encapsulate(plaintext, out))
        {
            return Sent::Send(self.outgoing(&out[..length], to, now));
        }
        let dropped = self.keep(plaintext);
        match datagram_length(self.tunn.format_handshake_initiation(out, false)) {
            Some(length) => Sent::Began { first: self.outgoing(&out[..length], to, now), dropped },
            None => Sent::Queued { dropped },
        }
    }

    /// Keeps a packet until there is a session; how many older ones had to go for it.
    fn keep(&mut self, plaintext: &[u8]) -> usize {
        self.backlog = Backlog::Waiting;
        self.waiting_bytes += plaintext.len() + PACKET_COST;
        self.waiting.push_back(plaintext.to_vec());
        let mut dropped = 0;
        while self.waiting.len() > WAITING_MAX || self.waiting_bytes > WAITING_BYTES_MAX {
            dropped += usize::from(self.pop_waiting().is_some());
        }
        dropped
    }

    fn pop_waiting(&mut self) -> Option<Vec<u8>> {
        let packet = self.waiting.pop_front()?;
        self.waiting_bytes -= packet.len() + PACKET_COST;
        Some(packet)
    }

    fn forget_waiting(&mut self) {
        (self.waiting, self.waiting_bytes, self.backlog) = (VecDeque::new(), 0, Backlog::Empty);
    }

    /// The next packet that waited for a session, encrypted into `out`.
    pub(crate) fn next_waiting(&mut self, out: &mut [u8], now: Instant) -> Option<Outgoing> {
        if self.backlog != Backlog::Ready || self.removed {
            return None;
        }
        let to = self.endpoint?;
        if !self.in_session {
            // It ended in between; what is left waits for the next one.
            self.backlog = Backlog::Waiting;
            return None;
        }
        let Some(packet) = self.pop_waiting() else {
            self.forget_waiting();
            return None;
        };
        let length = datagram_length(self.tunn.encapsulate(&packet, out))?;
        Some(self.outgoing(&out[..length], to, now))
    }

    /// Decrypts a data message into `out`.
    pub(crate) fn decrypt(
        &mut self,
        (datagram, from): (&[u8], SocketAddr),
        out: &mut [u8],
        now: Instant,
        notes: &mut Notes,
    ) -> Received {
        let Some(Message::Data { receiver }) = Message::parse(datagram) else { return Received::Invalid };
        if self.removed {
            return Received::Invalid;
        }
        let received = match self.tunn.decapsulate(Some(from.ip()), datagram, out) {
            TunnResult::WriteToTunnelV4(packet, source) => {
                Received::Packet { length: packet.len(), source: source.into() }
            }
            TunnResult::WriteToTunnelV6(packet, source) => {
                Received::Packet { length: packet.len(), source: source.into() }
            }
            TunnResult::Done => Received::Keepalive,
            TunnResult::WriteToNetwork(_) | TunnResult::Err(_) => return Received::Invalid,
        };
        self.in_session = true;
        notes.twin_in_use |= matches!(received, Received::Packet { .. }) && std::mem::take(&mut self.is_twin);
        self.authenticated((datagram.len(), from), now, notes);
        let unconfirmed = &mut self.unconfirmed[receiver as usize % SESSIONS];
        if *unconfirmed == Some(receiver) {
            *unconfirmed = None;
            self.initiator = false;
            self.session_begins(now, notes);
        } else if self.backlog == Backlog::Waiting {
            // Data on a known session: it is in use, so what waits can go.
            self.backlog_ready(notes);
        }
        received
    }

    /// Takes a handshake message whose MAC the caller has verified; the answer, if any, is in `out`.
    pub(crate) fn handshake(
        &mut self,
        (datagram, from): (&[u8], SocketAddr),
        out: &mut [u8],
        now: Instant,
        notes: &mut Notes,
    ) -> Option<Outgoing> {
        let message = Message::parse(datagram).filter(|m| !matches!(m, Message::Data { .. }))?;
        if self.removed {
            return None;
        }
        let length = match self.tunn.decapsulate(Some(from.ip()), datagram, out) {
            TunnResult::WriteToNetwork(answer) => answer.len(),
            // A cookie ends here. It is not proof of who sent it: no roaming.
            _ => return None,
        };
        self.in_session = self.has_session();
        match message {
            Message::Response { receiver } => {
                self.authenticated((datagram.len(), from), now, notes);
                if let Some((_, sent)) = self.last_initiation.filter(|(index, _)| *index == receiver) {
                    let rtt = now.saturating_duration_since(sent);
                    (self.rtt, notes.answered) = (Some(rtt), Some((from, rtt)));
                }
                self.initiator = true;
                self.session_begins(now, notes);
            }
            _ => {
                self.heard(datagram.len(), now);
                // Only one way is proved. The endpoint moves when the peer has our answer and uses it.
                if self.endpoint.is_none() {
                    self.moved(from, notes);
                }
                if let Some(index) = packet::sender_index(&out[..length]) {
                    self.unconfirmed[index as usize % SESSIONS] = Some(index);
                }
            }
        }
        Some(self.outgoing(&out[..length], from, now))
    }

    /// To be called every 100 to 250 ms: timers, retries, keepalives. At most one datagram comes out.
    pub(crate) fn tick(&mut self, out: &mut [u8], now: Instant, notes: &mut Notes) -> Option<Outgoing> {
        if self.removed {
            return None;
        }
        let due = match self.tunn.update_timers(out) {
            TunnResult::WriteToNetwork(datagram) => Some(datagram.len()),
            TunnResult::Err(WireGuardError::ConnectionExpired) => {
                self.gave_up(now);
                None
            }
            _ => None,
        };
        self.in_session = self.has_session();
        self.notice_silence(now, notes);
        let to = self.endpoint?;
        let length = due.or_else(|| self.own_timers(out, now))?;
        Some(self.outgoing(&out[..length], to, now))
    }

    /// An initiation that is due for probing: its length, and the addresses that all get it.
    pub(crate) fn tick_probes(&mut self, out: &mut [u8], now: Instant) -> Option<(usize, Vec<SocketAddr>)> {
        if self.removed || self.probes.is_empty() || !self.is_spaced(now) {
            return None;
        }
        let mut to = std::mem::take(&mut self.probes);
        if std::mem::take(&mut self.initiation_wanted) {
            to.extend(self.endpoint.filter(|endpoint| !to.contains(endpoint)));
        }
        let length = datagram_length(self.tunn.format_handshake_initiation(out, true))?;
        self.outgoing(&out[..length], to[0], now);
        self.tx_bytes += (length * (to.len() - 1)) as u64;
        Some((length, to))
    }

    /// Asks for an initiation to all of `to`, whatever the endpoint is. `false` if the peer is gone.
    pub(crate) fn want_probes(&mut self, to: &[SocketAddr]) -> bool {
        for address in to.iter().copied().map(packet::unmapped) {
            if self.probes.len() < PROBES_MAX && !self.probes.contains(&address) {
                self.probes.push(address);
            }
        }
        !self.removed
    }

    /// Asks for an initiation at the next tick. `false` if there is nowhere to send it.
    pub(crate) fn want_initiation(&mut self) -> bool {
        self.initiation_wanted = self.endpoint.is_some() && !self.removed;
        self.initiation_wanted
    }

    pub(crate) fn endpoint(&self) -> Option<SocketAddr> {
        self.endpoint
    }

    pub(crate) fn set_endpoint(&mut self, endpoint: SocketAddr) {
        self.endpoint = Some(packet::unmapped(endpoint));
    }

    pub(crate) fn config(&self) -> &PeerConfig {
        &self.config
    }

    pub(crate) fn allowed_ips(&self) -> &[ipnet::IpNet] {
        &self.config.allowed_ips
    }

    /// Takes a new configuration of the same peer, and greets it at `start` if it should be up.
    pub(crate) fn update(&mut self, config: PeerConfig, own: &Identity, start: Instant) {
        if config.endpoint.is_some() && config.endpoint != self.config.endpoint {
            self.endpoint = config.endpoint.map(packet::unmapped);
            self.retry_at = start;
        }
        if config.keepalive() != self.keepalive {
            self.keepalive = config.keepalive();
            self.retry_at = start;
        }
        let new_psk = config.preshared_key != self.config.preshared_key;
        self.config = config;
        if new_psk {
            self.renew(own, start);
        }
    }

    /// Starts over under the own key `own`: session and waiting packets are gone.
    pub(crate) fn renew(&mut self, own: &Identity, start: Instant) {
        let was_up = self.last_handshake.is_some();
        self.tunn = new_tunn(own, &self.config, self.index);
        self.forget_waiting();
        self.in_session = false;
        (self.unconfirmed, self.last_initiation, self.last_handshake) = ([None; SESSIONS], None, None);
        (self.rtt, self.unanswered_since, self.silent) = (None, None, false);
        (self.retry_at, self.retry_pause) = (start, RETRY_FIRST);
        self.initiation_wanted = was_up && self.endpoint.is_some();
    }

    /// Takes `allowed_ips` instead of those it has.
    pub(crate) fn set_allowed_ips(&mut self, allowed_ips: Vec<ipnet::IpNet>) {
        self.config.allowed_ips = allowed_ips;
    }

    /// From here on the peer neither sends nor accepts anything.
    pub(crate) fn remove(&mut self) {
        self.removed = true;
    }

    pub(crate) fn stats(&self, key: PublicKey, now: Instant) -> PeerStats {
        PeerStats {
            public_key: key,
            endpoint: self.endpoint,
            last_handshake: self.last_handshake.map(|at| now.saturating_duration_since(at)),
            has_session: self.has_session(),
            rx_bytes: self.rx_bytes,
            tx_bytes: self.tx_bytes,
            rtt: self.rtt,
        }
    }

    pub(crate) fn has_session(&self) -> bool {
        self.tunn.time_since_last_handshake().is_some()
    }

    /// What boringtun's timers do not do. Length of what is now in `out`.
    fn own_timers(&mut self, out: &mut [u8], now: Instant) -> Option<usize> {
        if self.initiation_wanted && self.is_spaced(now) {
            self.initiation_wanted = false;
            return datagram_length(self.tunn.format_handshake_initiation(out, true));
        }
        let interval = self.keepalive?;
        let Some(age) = self.tunn.time_since_last_handshake() else {
            // Nothing comes out while boringtun is trying already.
            return (now >= self.retry_at)
                .then(|| datagram_length(self.tunn.format_handshake_initiation(out, false)))?;
        };
        let limit = if self.initiator { REKEY_AFTER_TIME } else { RESPONDER_REKEY_AFTER_TIME };
        if age >= limit
            && let Some(length) = datagram_length(self.tunn.format_handshake_initiation(out, false))
        {
            return Some(length);
        }
        (now.saturating_duration_since(self.last_tx) >= interval)
            .then(|| datagram_length(self.tunn.encapsulate(&[], out)))?
    }

    /// boringtun stopped trying and says so at every tick; the first time sets the next attempt.
    fn gave_up(&mut self, now: Instant) {
        if !std::mem::replace(&mut self.gave_up, true) {
            self.forget_waiting();
            self.retry_at = now + self.retry_pause.mul_f64(rand::random_range(0.5..1.0));
            self.retry_pause = (self.retry_pause * 2).min(RETRY_LAST);
        }
    }

    fn notice_silence(&mut self, now: Instant, notes: &mut Notes) {
        let overdue = |since| now.saturating_duration_since(since) >= SILENCE;
        if !self.silent && self.unanswered_since.is_some_and(overdue) {
            self.silent = true;
            notes.silent = true;
        }
    }

    /// A message was proved to be this peer's: it lives, and it is where the message came from.
    fn authenticated(&mut self, (length, from): (usize, SocketAddr), now: Instant, notes: &mut Notes) {
        self.heard(length, now);
        let from_virtual = is_virtual(from);
        if !from_virtual {
            self.last_direct_rx = Some(now);
        }
        let direct_is_alive = self.endpoint.is_some_and(|endpoint| !is_virtual(endpoint))
            && self.last_direct_rx.is_some_and(|at| now.saturating_duration_since(at) < DIRECT_LOST);
        if self.endpoint != Some(from) && !(from_virtual && direct_is_alive) {
            self.moved(from, notes);
        }
    }

    fn heard(&mut self, length: usize, now: Instant) {
        self.rx_bytes += length as u64;
        (self.unanswered_since, self.silent) = (None, false);
        (self.retry_at, self.retry_pause) = (now, RETRY_FIRST);
    }

    fn moved(&mut self, to: SocketAddr, notes: &mut Notes) {
        self.endpoint = Some(to);
        notes.moved_to = Some(to);
    }

    fn is_spaced(&self, now: Instant) -> bool {
        self.last_initiation.is_none_or(|(_, at)| now.saturating_duration_since(at) >= INITIATION_SPACING)
    }

    fn session_begins(&mut self, now: Instant, notes: &mut Notes) {
        self.last_handshake = Some(now);
        notes.handshake_done = true;
        if self.backlog == Backlog::Waiting {
            self.backlog_ready(notes);
        }
    }

    fn backlog_ready(&mut self, notes: &mut Notes) {
        self.backlog = Backlog::Ready;
        notes.backlog_ready = true;
    }

    fn outgoing(&mut self, datagram: &[u8], to: SocketAddr, now: Instant) -> Outgoing {
        self.tx_bytes += datagram.len() as u64;
        self.last_tx = now;
        if let Some(Message::Initiation) = Message::parse(datagram) {
            self.last_initiation = packet::sender_index(datagram).map(|index| (index, now));
            self.unanswered_since.get_or_insert(now);
            self.gave_up = false;
        }
        Outgoing { length: datagram.len(), to, is_data: is_data(datagram) }
    }
}

fn new_tunn(own: &Identity, config: &PeerConfig, index: u32) -> Tunn {
    // The front limiter has judged every message before it gets here; this one must not judge again.
    let unlimited = own.unlimited.clone();
    let psk = config.preshared_key.as_ref().map(|key| *key.to_bytes());
    Tunn::new(own.private.secret(), config.public_key.to_x25519(), psk, None, index, Some(unlimited))
}

fn is_data(datagram: &[u8]) -> bool {
    matches!(Message::parse(datagram), Some(Message::Data { .. }))
}

fn datagram_length(result: TunnResult<'_>) -> Option<usize> {
    match result {
        TunnResult::WriteToNetwork(datagram) => Some(datagram.len()),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
