//! How good the way to each peer is: an echo through the tunnel now and then, its round trip and its losses.
//!
//! The echo is ICMP's: the firewall table lets peers ask that in any case, so no port has to be opened, and the
//! tunnel's check of inner sources vouches for who answers. Only peers with a session are asked: a probe shall
//! measure a path and never make one.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::net::UdpSocket;
use tokio::sync::watch;

use crate::clock::ControllerClock;
use crate::ping;

/// Between two probes of one peer.
const INTERVAL: Duration = Duration::from_secs(10);
/// Probes a second, all peers together: with more peers than this allows, each is asked more rarely.
const RATE_MAX: u32 = 100;
/// An answer that took longer is a loss.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Probes that losses are counted over.
const WINDOW: usize = 30;

/// What is known of the way to one peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Quality {
    /// Smoothed as in TCP (RFC 6298 §2): an eighth of each new sample. `None` before the first answer.
    pub(crate) rtt: Option<Duration>,
    /// Probes whose outcome is known, at most 30.
    pub(crate) probes: u32,
    /// How many of them were not answered within 2 s.
    pub(crate) lost: u32,
}

/// Whom to ask when, and what came of it. Performs no I/O.
#[derive(Debug, Default)]
struct Probes {
    peers: BTreeMap<Ipv4Addr, Peer>,
    sequence: u16,
    /// No probe before this, whosever.
    not_before: Option<Instant>,
}

#[derive(Debug)]
struct Peer {
    due: Instant,
    waiting: Option<(u16, Instant)>,
    rtt: Option<Duration>,
    answered: VecDeque<bool>,
}

impl Peer {
    fn note(&mut self, answered: bool) {
        self.waiting = None;
        self.answered.push_back(answered);
        if self.answered.len() > WINDOW {
            self.answered.pop_front();
        }
    }
}

impl Probes {
    /// Replaces the set of peers; what is known of those that stay is kept.
    fn handle_peers(&mut self, peers: &BTreeSet<Ipv4Addr>, now: Instant) {
        self.peers.retain(|address, _| peers.contains(address));
        for address in peers {
            self.peers.entry(*address).or_insert_with(|| Peer {
                due: now,
                waiting: None,
                rtt: None,
                answered: VecDeque::new(),
            });
        }
    }

    /// The next echo to send, if one is due.
    fn poll_probe(&mut self, now: Instant) -> Option<(Ipv4Addr, u16)> {
        self.expire(now);
        if self.not_before.is_some_and(|at| at > now) {
            return None;
        }
        let (address, peer) = self.peers.iter_mut().min_by_key(|(_, peer)| peer.due)?;
        if peer.due > now {
            return None;
        }
        self.sequence = self.sequence.wrapping_add(1);
        peer.due = now + INTERVAL;
        peer.waiting = Some((self.sequence, now));
        self.not_before = Some(now + Duration::from_secs(1) / RATE_MAX);
        Some((*address, self.sequence))
    }

    /// An echo came back from `from`.
    fn handle_reply(&mut self, from: Ipv4Addr, sequence: u16, now: Instant) {
        self.expire(now);
        let Some(peer) = self.peers.get_mut(&from) else { return };
        let Some((_, sent)) = peer.waiting.filter(|(waiting, _)| *waiting == sequence) else { return };
        let sample = now.saturating_duration_since(sent);
        peer.rtt = Some(peer.rtt.map_or(sample, |rtt| (rtt * 7 + sample) / 8));
        peer.note(true);
    }

    fn expire(&mut self, now: Instant) {
        for peer in self.peers.values_mut() {
            if peer.waiting.is_some_and(|(_, sent)| now >= sent + TIMEOUT) {
                peer.note(false);
            }
        }
    }

    /// When to call [`poll_probe`](Self::poll_probe) next; `None` without peers.
    fn poll_timeout(&self) -> Option<Instant> {
        let due = self.peers.values().map(|peer| peer.due).min()?;
        Some(self.not_before.map_or(due, |at| at.max(due)))
    }

    fn quality(&self, address: Ipv4Addr) -> Option<Quality> {
        let peer = self.peers.get(&address)?;
        let lost = peer.answered.iter().filter(|answered| !**answered).count();
        Some(Quality { rtt: peer.rtt, probes: peer.answered.len() as u32, lost: lost as u32 })
    }
}

/// The probing task as the network task sees it. It ends when this is dropped.
#[derive(Debug)]
pub(super) struct Prober {
    targets: watch::Sender<BTreeSet<Ipv4Addr>>,
    probes: Arc<Mutex<Probes>>,
}

impl Prober {
    /// Starts probing from `own`, our overlay address. Must be called inside a runtime.
    pub(super) fn start(own: Ipv4Addr, clock: ControllerClock) -> Self {
        let (targets, wanted) = watch::channel(BTreeSet::new());
        let probes = Arc::new(Mutex::new(Probes::default()));
        let task = Task {
            clock,
            probes: probes.clone(),
            wanted,
            identifier: u16::from_be_bytes(mesh_runtime::random_bytes()),
        };
        tokio::spawn(async move {
            if let Err(error) = task.run(own).await {
                tracing::warn!(%error, "paths are not measured");
            }
        });
        Self { targets, probes }
    }

    /// Whom to ask from now on.
    pub(super) fn set_peers(&self, peers: BTreeSet<Ipv4Addr>) {
        self.targets.send_if_modified(|before| {
            let changed = *before != peers;
            *before = peers;
            changed
        });
    }

    pub(super) fn quality(&self, address: Ipv4Addr) -> Option<Quality> {
        lock(&self.probes).quality(address)
    }
}

struct Task {
    clock: ControllerClock,
    probes: Arc<Mutex<Probes>>,
    wanted: watch::Receiver<BTreeSet<Ipv4Addr>>,
    identifier: u16,
}

impl Task {
    async fn run(mut self, own: Ipv4Addr) -> std::io::Result<()> {
        let socket = ping::open(IpAddr::V4(own))?;
        socket.set_nonblocking(true)?;
        // A raw socket in the clothes of a UDP one: both send and receive single packets with an address.
        let socket = UdpSocket::from_std(socket.into())?;
        let mut buffer = [0; 2048];
        loop {
            let wake = {
                let mut probes = lock(&self.probes);
                while let Some((address, sequence)) = probes.poll_probe(self.clock.own().now()) {
                    let request = ping::request(IpAddr::V4(address), self.identifier, sequence);
                    // What cannot be sent counts as lost.
                    let _ = socket.try_send_to(&request, SocketAddr::new(address.into(), 0));
                }
                probes.poll_timeout().unwrap_or_else(|| self.clock.own().now() + INTERVAL)
            };
            tokio::select! {
                received = socket.recv_from(&mut buffer) => {
                    // An error belongs to something sent earlier (ICMP); the socket lives on.
                    let Ok((length, from)) = received else {
                        tokio::time::sleep(TIMEOUT).await;
                        continue;
                    };
                    if let IpAddr::V4(from) = from.ip()
                        && let Some(sequence) = ping::reply_to(IpAddr::V4(from), &buffer[..length], self.identifier)
                    {
                        lock(&self.probes).handle_reply(from, sequence, self.clock.own().now());
                    }
                }
                changed = self.wanted.changed() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                    let peers = self.wanted.borrow_and_update().clone();
                    lock(&self.probes).handle_peers(&peers, self.clock.own().now());
                }
                () = tokio::time::sleep_until(wake.into()) => {}
            }
        }
    }
}

fn lock(probes: &Mutex<Probes>) -> MutexGuard<'_, Probes> {
    probes.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(host: u32) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(Ipv4Addr::new(100, 64, 0, 0)) + host)
    }

    #[test]
    fn answers_and_losses_are_counted() {
        let (mut probes, mut now) = (Probes::default(), Instant::now());
        probes.handle_peers(&[address(2)].into(), now);
        assert_eq!(probes.quality(address(2)), Some(Quality::default()));
        for round in 0..8u64 {
            let (to, sequence) = probes.poll_probe(now).expect("due");
            assert_eq!((to, probes.poll_probe(now)), (address(2), None), "one at a time");
            match round % 4 {
                // Too late, from somebody else, or with another number: no answer.
                0 => probes.handle_reply(to, sequence, now + TIMEOUT),
                1 => probes.handle_reply(address(3), sequence, now),
                2 => probes.handle_reply(to, sequence.wrapping_add(1), now),
                _ => probes.handle_reply(to, sequence, now + Duration::from_millis(8)),
            }
            now = probes.poll_timeout().unwrap();
        }
        probes.expire(now);
        let quality = probes.quality(address(2)).unwrap();
        assert_eq!(quality, Quality { rtt: Some(Duration::from_millis(8)), probes: 8, lost: 6 });
        for _ in 0..2 * WINDOW {
            let (to, sequence) = probes.poll_probe(now).unwrap();
            probes.handle_reply(to, sequence, now + Duration::from_millis(16));
            now = probes.poll_timeout().unwrap();
        }
        let quality = probes.quality(address(2)).unwrap();
        assert_eq!((quality.probes, quality.lost), (30, 0), "what is long past is forgotten");
        assert!(quality.rtt.unwrap() > Duration::from_millis(15), "{quality:?}");
        probes.handle_peers(&BTreeSet::new(), now);
        assert_eq!((probes.quality(address(2)), probes.poll_timeout()), (None, None));
    }

    #[test]
    fn many_peers_are_asked_at_a_bounded_rate_and_in_turn() {
        let (mut probes, start) = (Probes::default(), Instant::now());
        let peers: BTreeSet<Ipv4Addr> = (2..3002).map(address).collect();
        probes.handle_peers(&peers, start);
        let (mut now, mut asked) = (start, BTreeSet::new());
        while asked.len() < peers.len() {
            if let Some((to, _)) = probes.poll_probe(now) {
                assert!(asked.insert(to), "nobody twice before everybody once");
            }
            now = probes.poll_timeout().unwrap().max(now);
        }
        assert!(now - start >= Duration::from_secs(29), "{:?}", now - start);
    }
}
