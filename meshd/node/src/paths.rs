//! Which underlay address each peer is tried at, and when. Performs no I/O: WireGuard's handshake is the probe.

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use crate::limits::ENDPOINTS_PER_PEER_MAX;

/// How long one endpoint is given to answer a handshake before the next is tried.
const PROBE_WAIT: Duration = Duration::from_millis(700);
/// Pause after a round over all endpoints without an answer: first, doubling up to the longest.
const ROUND_PAUSE_FIRST: Duration = Duration::from_secs(1);
const ROUND_PAUSE_LONGEST: Duration = Duration::from_secs(60);

/// A peer by its public key.
pub(crate) type Key = [u8; 32];

/// Where an endpoint is known from; the better source is tried first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Source {
    /// It answered before.
    Proved,
    Configured,
    Interface,
    ControllerSaw,
    PeerSaw,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    /// Send to `endpoint` and begin a handshake there.
    Probe { peer: Key, endpoint: SocketAddr },
}

#[derive(Debug)]
struct Path {
    candidates: Vec<(Source, SocketAddr)>,
    /// The endpoint that last answered.
    proved: Option<SocketAddr>,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing to try.
    Waiting,
    /// Candidate `next - 1` was probed; `next` is due at `at`.
    Probing { next: usize, at: Instant, pause: Duration },
    /// A session stands.
    Up,
}

/// The endpoints of all peers.
///
/// Call one `handle_*`, drain [`poll_action`](Self::poll_action) to `None`, then sleep until
/// [`poll_timeout`](Self::poll_timeout). `now` must never go backwards between calls.
#[derive(Debug, Default)]
pub(crate) struct Paths {
    peers: BTreeMap<Key, Path>,
    actions: VecDeque<Action>,
}

impl Paths {
    pub(crate) fn add_peer(&mut self, peer: Key) {
        let path = Path { candidates: Vec::new(), proved: None, state: State::Waiting };
        self.peers.entry(peer).or_insert(path);
    }

    pub(crate) fn remove_peer(&mut self, peer: &Key) {
        self.peers.remove(peer);
        self.actions.retain(|Action::Probe { peer: other, .. }| other != peer);
    }

    /// Merges endpoints somebody told of. A fresh list from a source replaces what that source said
    /// before; an empty one deletes nothing.
    pub(crate) fn handle_candidates(&mut self, peer: &Key, told: &[(Source, SocketAddr)], now: Instant) {
        let Some(path) = self.peers.get_mut(peer) else { return };
        if told.is_empty() {
            return;
        }
        let before = path.candidates.clone();
        path.candidates.retain(|(source, _)| !told.iter().any(|(other, _)| other == source));
        for &(source, endpoint) in told {
            if usable(&endpoint) && !path.candidates.iter().any(|(_, known)| *known == endpoint) {
                path.candidates.push((source, endpoint));
            }
        }
        path.candidates.sort_by_key(|(source, _)| *source);
        path.candidates.truncate(ENDPOINTS_PER_PEER_MAX);
        let news = path.candidates.iter().any(|candidate| !before.contains(candidate));
        // A peer that could not be reached and has moved is tried at once.
        if path.state == State::Waiting || (news && path.state != State::Up) {
            path.restart(now);
        }
        self.handle_timeout(now);
    }

    /// A handshake with `peer` is complete; `endpoint` is where it stands.
    pub(crate) fn handle_handshake(&mut self, peer: &Key, endpoint: Option<SocketAddr>) {
        if let Some(path) = self.peers.get_mut(peer) {
            path.state = State::Up;
            path.proved = endpoint.or(path.proved);
        }
    }

    /// An authenticated packet of `peer` came from elsewhere; the tunnel uses that from now on.
    pub(crate) fn handle_roaming(&mut self, peer: &Key, from: SocketAddr) {
        self.handle_handshake(peer, Some(from));
    }

    /// `peer` does not answer any more.
    pub(crate) fn handle_silence(&mut self, peer: &Key, now: Instant) {
        if let Some(path) = self.peers.get_mut(peer).filter(|path| path.state == State::Up) {
            path.restart(now);
        }
        self.handle_timeout(now);
    }

    pub(crate) fn handle_timeout(&mut self, now: Instant) {
        for (&peer, path) in &mut self.peers {
            let State::Probing { next, at, pause } = path.state else { continue };
            if at > now {
                continue;
            }
            let endpoints = path.in_order();
            let Some(&endpoint) = endpoints.get(next) else {
                // The round is over: once more from the start, after a pause that grows.
                path.state =
                    State::Probing { next: 0, at: now + pause, pause: (pause * 2).min(ROUND_PAUSE_LONGEST) };
                continue;
            };
            self.actions.push_back(Action::Probe { peer, endpoint });
            path.state = State::Probing { next: next + 1, at: now + PROBE_WAIT, pause };
        }
    }

    pub(crate) fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        self.peers
            .values()
            .filter_map(|path| match path.state {
                State::Probing { at, .. } => Some(at),
                State::Waiting | State::Up => None,
            })
            .min()
    }

    /// What is known of `peer`, the best first: to be stored for a start without a controller.
    pub(crate) fn endpoints(&self, peer: &Key) -> Vec<SocketAddr> {
        self.peers.get(peer).map(Path::in_order).unwrap_or_default()
    }
}

impl Path {
    fn restart(&mut self, now: Instant) {
        self.state = match self.in_order().is_empty() {
            true => State::Waiting,
            false => State::Probing { next: 0, at: now, pause: ROUND_PAUSE_FIRST },
        };
    }

    fn in_order(&self) -> Vec<SocketAddr> {
        let mut endpoints: Vec<SocketAddr> = self.proved.into_iter().collect();
        for (_, endpoint) in &self.candidates {
            if !endpoints.contains(endpoint) {
                endpoints.push(*endpoint);
            }
        }
        endpoints
    }
}

/// Whether a packet can be sent there at all.
fn usable(endpoint: &SocketAddr) -> bool {
    let link_local = match endpoint.ip() {
        IpAddr::V4(ip) => ip.is_broadcast(),
        // Without its interface a link-local address leads nowhere.
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    endpoint.port() != 0 && !endpoint.ip().is_unspecified() && !endpoint.ip().is_multicast() && !link_local
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PEER: Key = [1; 32];

    fn at(host: u8) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, host], 51820))
    }

    fn paths(candidates: &[(Source, SocketAddr)], now: Instant) -> Paths {
        let mut paths = Paths::default();
        paths.add_peer(PEER);
        paths.handle_candidates(&PEER, candidates, now);
        paths
    }

    fn probe(paths: &mut Paths) -> Option<SocketAddr> {
        paths.poll_action().map(|Action::Probe { endpoint, .. }| endpoint)
    }

    #[test]
    fn candidates_are_tried_in_order_until_one_answers() {
        let now = Instant::now();
        let told = [(Source::ControllerSaw, at(3)), (Source::Configured, at(1)), (Source::Interface, at(2))];
        let mut paths = paths(&told, now);
        assert_eq!(probe(&mut paths), Some(at(1)));
        assert_eq!(probe(&mut paths), None, "one at a time");
        paths.handle_timeout(now + PROBE_WAIT);
        assert_eq!(probe(&mut paths), Some(at(2)));
        paths.handle_handshake(&PEER, Some(at(2)));
        assert_eq!(paths.poll_timeout(), None, "a standing session is left alone");
        assert_eq!(paths.endpoints(&PEER), [at(2), at(1), at(3)], "the proved one leads");
    }

    #[test]
    fn silence_starts_with_the_last_good_endpoint() {
        let now = Instant::now();
        let mut paths = paths(&[(Source::Configured, at(1)), (Source::Interface, at(2))], now);
        while probe(&mut paths).is_some() {}
        paths.handle_roaming(&PEER, at(9));
        paths.handle_silence(&PEER, now + Duration::from_secs(20));
        assert_eq!(probe(&mut paths), Some(at(9)));
        paths.handle_timeout(now + Duration::from_secs(20) + PROBE_WAIT);
        assert_eq!(probe(&mut paths), Some(at(1)));
    }

    #[test]
    fn an_empty_list_deletes_nothing_and_a_removed_peer_is_quiet() {
        let now = Instant::now();
        let mut paths = paths(&[(Source::Interface, at(1))], now);
        paths.handle_candidates(&PEER, &[], now);
        assert_eq!(paths.endpoints(&PEER), [at(1)]);
        paths.remove_peer(&PEER);
        assert_eq!(probe(&mut paths), None);
        assert_eq!(paths.poll_timeout(), None);
    }

    proptest! {
        /// However long nobody answers, rounds slow down and never stop, and every candidate has its turn.
        #[test]
        fn every_candidate_is_tried_again_and_again(hosts in proptest::collection::btree_set(1u8..250, 1..8)) {
            let start = Instant::now();
            let told: Vec<_> = hosts.iter().map(|host| (Source::Interface, at(*host))).collect();
            let mut paths = paths(&told, start);
            let mut tries: BTreeMap<SocketAddr, u32> = BTreeMap::new();
            let mut now = start;
            for _ in 0..(hosts.len() + 1) * 10 {
                while let Some(endpoint) = probe(&mut paths) {
                    *tries.entry(endpoint).or_default() += 1;
                }
                now = paths.poll_timeout().expect("probing never ends by itself").max(now);
                paths.handle_timeout(now);
            }
            prop_assert_eq!(tries.len(), hosts.len());
            prop_assert!(tries.values().all(|count| (8..=11).contains(count)), "{:?}", tries);
            prop_assert!(now - start > Duration::from_secs(60));
        }
    }
}
