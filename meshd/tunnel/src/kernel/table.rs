//! What is known of the peers besides what the kernel says: what was asked for, who owns which prefix,
//! and what was seen before, from which the events follow. No I/O; both clocks come as arguments.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::device::{PeerReport, Snapshot};
use crate::allowed_ips::AllowedIps;
use crate::config::{PEERS_MAX, PeerConfig};
use crate::error::TunnelError;
use crate::event::TunnelEvent;
use crate::key::PublicKey;
use crate::packet::DATA_OVERHEAD;
use crate::tunnel::PeerStats;

/// Age at which a session may not be used any more. WireGuard paper §6.1 Reject-After-Time.
const REJECT_AFTER_TIME: Duration = Duration::from_secs(180);
/// Silence after something was sent that counts as such: KEEPALIVE_TIMEOUT + REKEY_TIMEOUT of the
/// WireGuard paper §6.1.
const SILENCE: Duration = Duration::from_secs(15);
/// The kernel sends initiations to one peer no closer than this. WireGuard paper §6.1 Rekey-Timeout.
const REKEY_TIMEOUT: Duration = Duration::from_secs(5);
/// Calls closer together than this are one greeting.
const GREETING_SPACING: Duration = Duration::from_millis(20);

pub(super) struct Table {
    own: PublicKey,
    peers: BTreeMap<PublicKey, Known>,
    routes: AllowedIps<PublicKey>,
    /// When the kernel was last asked; what changed since is no older.
    observed: Instant,
}

pub(super) struct Known {
    pub(super) config: PeerConfig,
    pub(super) endpoint: Option<SocketAddr>,
    /// As the kernel says it, by the wall clock: only ever compared with itself.
    handshake_mark: Option<Duration>,
    last_handshake: Option<Instant>,
    rx_bytes: Count,
    tx_bytes: Count,
    unanswered_since: Option<Instant>,
    silent: bool,
    /// Where and when the peer was last greeted on request.
    greeted: Option<(SocketAddr, Instant)>,
}

/// Bytes that the kernel counts from zero whenever the peer is made anew.
#[derive(Debug, Clone, Copy, Default)]
struct Count {
    before: u64,
    now: u64,
}

impl Count {
    fn total(self) -> u64 {
        self.before + self.now
    }

    fn restart(&mut self) {
        *self = Self { before: self.total(), now: 0 };
    }

    /// How much it grew.
    fn advance(&mut self, now: u64) -> u64 {
        let grown = now.saturating_sub(self.now);
        self.now = now;
        grown
    }
}

/// What an update means for a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Update {
    New,
    Change,
    /// Another preshared key: the session must go.
    Renew,
}

/// What a request for a handshake comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Greeting {
    /// The peer is made anew, which makes the kernel greet it.
    Now(SocketAddr),
    /// The kernel has just greeted it there and goes on by itself.
    UnderWay,
    /// No such peer, no endpoint, or a session in use that the kernel would have to drop.
    Impossible,
}

impl Table {
    pub(super) fn new(own: PublicKey, now: Instant) -> Self {
        Self { own, peers: BTreeMap::new(), routes: AllowedIps::new(), observed: now }
    }

    pub(super) fn own(&self) -> PublicKey {
        self.own
    }

    pub(super) fn get(&self, key: &PublicKey) -> Option<&Known> {
        self.peers.get(key)
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &Known> {
        self.peers.values()
    }

    /// Whether `config` may be taken, and what that means.
    pub(super) fn check(&self, config: &PeerConfig) -> Result<Update, TunnelError> {
        config.check()?;
        let peer = config.public_key;
        if peer == self.own {
            return Err(TunnelError::OwnKey { peer });
        }
        let known = self.peers.get(&peer);
        if let Some((prefix, owner)) = self.routes.conflict(&config.allowed_ips, Some(&peer)) {
            return Err(TunnelError::AllowedIpsOverlap { peer, owner: *owner, prefix });
        }
        match known {
            None if self.peers.len() >= PEERS_MAX => Err(TunnelError::TooManyPeers),
            None => Ok(Update::New),
            Some(known) if known.config.preshared_key != config.preshared_key => Ok(Update::Renew),
            Some(_) => Ok(Update::Change),
        }
    }

    /// Where a peer with a new configuration is to be reached: the place it has roamed to, unless another
    /// is asked for.
    pub(super) fn endpoint_for(&self, config: &PeerConfig) -> Option<SocketAddr> {
        let known = self.peers.get(&config.public_key);
        let kept =
            known.filter(|known| config.endpoint.is_none() || config.endpoint == known.config.endpoint);
        kept.map_or(config.endpoint, |known| known.endpoint)
    }

    /// Takes what [`check`](Self::check) allowed and the kernel has.
    pub(super) fn insert(&mut self, config: PeerConfig, update: Update) {
        let endpoint = self.endpoint_for(&config);
        let key = config.public_key;
        let old = self.peers.get(&key).map_or_else(Vec::new, |known| known.config.allowed_ips.clone());
        self.routes.replace(&old, &config.allowed_ips, &key);
        match self.peers.get_mut(&key) {
            Some(known) => {
                (known.config, known.endpoint) = (config, endpoint);
                if update == Update::Renew {
                    known.restart();
                }
            }
            None => drop(self.peers.insert(key, Known::new(config, endpoint))),
        }
    }

    pub(super) fn remove(&mut self, key: &PublicKey) -> bool {
        let Some(known) = self.peers.remove(key) else { return false };
        self.routes.replace(&known.config.allowed_ips, &[], key);
        true
    }

    pub(super) fn set_endpoint(&mut self, key: &PublicKey, endpoint: SocketAddr) {
        if let Some(known) = self.peers.get_mut(key) {
            known.endpoint = Some(endpoint);
        }
    }

    /// Another own key: every session is gone.
    pub(super) fn set_own(&mut self, own: PublicKey) {
        self.own = own;
        self.peers.values_mut().for_each(Known::restart);
    }

    pub(super) fn greeting(&self, key: &PublicKey, now: Instant) -> Greeting {
        let Some((known, endpoint)) = self.peers.get(key).and_then(|known| Some((known, known.endpoint?)))
        else {
            return Greeting::Impossible;
        };
        if known.has_session(now) && !known.silent {
            return Greeting::Impossible;
        }
        let age = known.greeted.map(|(to, at)| (to == endpoint, now.saturating_duration_since(at)));
        match age {
            Some((_, age)) if age < GREETING_SPACING => Greeting::UnderWay,
            Some((true, age)) if age < REKEY_TIMEOUT => Greeting::UnderWay,
            _ => Greeting::Now(endpoint),
        }
    }

    /// The peer was made anew to greet it.
    pub(super) fn greeted(&mut self, key: &PublicKey, now: Instant) {
        if let Some(known) = self.peers.get_mut(key) {
            known.restart();
            known.greeted = known.endpoint.map(|endpoint| (endpoint, now));
            known.unanswered_since = Some(now);
        }
    }

    /// Compares what the kernel says with what it said before. `wall` is the time since 1970.
    pub(super) fn observe(&mut self, snapshot: &Snapshot, now: Instant, wall: Duration) -> Vec<TunnelEvent> {
        let before = std::mem::replace(&mut self.observed, now);
        let interval = now.saturating_duration_since(before);
        let mut events = Vec::new();
        for report in &snapshot.peers {
            if let Some(known) = self.peers.get_mut(&report.key) {
                known.observe(report, (now, wall, interval), &mut events);
            }
        }
        events
    }

    pub(super) fn stats(&self, now: Instant) -> Vec<PeerStats> {
        self.peers.values().map(|known| known.stats(now)).collect()
    }
}

impl Known {
    fn new(config: PeerConfig, endpoint: Option<SocketAddr>) -> Self {
        Self {
            config,
            endpoint,
            handshake_mark: None,
            last_handshake: None,
            rx_bytes: Count::default(),
            tx_bytes: Count::default(),
            unanswered_since: None,
            silent: false,
            greeted: None,
        }
    }

    /// The kernel has the peer anew: no session, counters at zero.
    fn restart(&mut self) {
        (self.handshake_mark, self.last_handshake, self.unanswered_since) = (None, None, None);
        self.silent = false;
        self.rx_bytes.restart();
        self.tx_bytes.restart();
    }

    pub(super) fn has_session(&self, now: Instant) -> bool {
        self.last_handshake.is_some_and(|at| now.saturating_duration_since(at) < REJECT_AFTER_TIME)
    }

    fn observe(
        &mut self,
        report: &PeerReport,
        (now, wall, interval): (Instant, Duration, Duration),
        events: &mut Vec<TunnelEvent>,
    ) {
        let peer = report.key;
        if report.endpoint.is_some() && report.endpoint != self.endpoint {
            self.endpoint = report.endpoint;
            events.extend(report.endpoint.map(|from| TunnelEvent::EndpointChanged { peer, from }));
        }
        if report.last_handshake.is_some() && report.last_handshake != self.handshake_mark {
            self.handshake_mark = report.last_handshake;
            // The wall clock may have been set meanwhile: the handshake is no older than the last look.
            let age =
                report.last_handshake.map_or(Duration::ZERO, |at| wall.saturating_sub(at)).min(interval);
            self.last_handshake = now.checked_sub(age).or(Some(now));
            events.push(TunnelEvent::HandshakeDone { peer });
        }
        let heard = self.rx_bytes.advance(report.rx_bytes) > 0;
        let sent = self.tx_bytes.advance(report.tx_bytes);
        if heard {
            (self.unanswered_since, self.silent) = (None, false);
        } else if sent > 0 && sent != DATA_OVERHEAD as u64 {
            // A message without content is a keepalive, which wants no answer.
            self.unanswered_since.get_or_insert(now);
        }
        let overdue = |since| now.saturating_duration_since(since) >= SILENCE;
        if !self.silent && self.unanswered_since.is_some_and(overdue) {
            self.silent = true;
            events.push(TunnelEvent::PeerSilent { peer });
        }
    }

    fn stats(&self, now: Instant) -> PeerStats {
        PeerStats {
            public_key: self.config.public_key,
            endpoint: self.endpoint,
            last_handshake: self.last_handshake.map(|at| now.saturating_duration_since(at)),
            has_session: self.has_session(now),
            rx_bytes: self.rx_bytes.total(),
            tx_bytes: self.tx_bytes.total(),
            rtt: None,
        }
    }
}

#[cfg(test)]
mod tests;
