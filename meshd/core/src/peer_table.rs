//! Which peers a node keeps a tunnel with, and at which endpoint to try them next.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::endpoints::{Endpoints, Overlay, Source};
use crate::ids::NodeId;
use crate::limits::PEERS_PER_MAP_MAX;

/// Between two tries of a silent peer. Shorter than WireGuard's own `Rekey-Timeout` of 5 s (paper §6.1),
/// since each try of the first round goes to another endpoint: a host with several addresses must not make
/// the first packet wait for that many timeouts.
pub const PROBE_INTERVAL: Duration = Duration::from_secs(1);
/// The longest pause between two tries of a peer that is silent at every endpoint.
pub const PROBE_INTERVAL_MAX: Duration = Duration::from_secs(60);
/// A peer that was not heard for so long has no session left. WireGuard paper §6.1 `Reject-After-Time`.
pub const SILENCE_MAX: Duration = Duration::from_secs(180);
/// New peers are tried within this time, spread so that a big map does not start all handshakes at once.
pub const FIRST_PROBE_SPREAD: Duration = Duration::from_millis(333);

/// Handshakes after the host has moved are spread over this much for each peer: what one costs, twice.
pub const MOVED_SPREAD_PER_PEER: Duration = Duration::from_micros(400);

/// What the caller must do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send to the peer at this address from now on.
    SetEndpoint { peer: NodeId, endpoint: SocketAddr },
    /// Begin a handshake, unless one is under way.
    Handshake { peer: NodeId },
}

/// Performs no I/O.
///
/// Call one `handle_*`, drain [`poll_action`](Self::poll_action) to `None`, then sleep until
/// [`poll_timeout`](Self::poll_timeout). `now` must never go backwards between calls.
#[derive(Debug)]
pub struct PeerTable {
    overlay: Overlay,
    peers: BTreeMap<NodeId, Peer>,
    actions: VecDeque<Action>,
    rng: StdRng,
}

#[derive(Debug)]
struct Peer {
    endpoints: Endpoints,
    /// When the peer was last heard.
    heard_at: Option<Instant>,
    /// Tries since the peer was last heard.
    tries: u32,
    wake_at: Instant,
}

impl PeerTable {
    /// A table without peers. The seed spreads timers, nothing else.
    pub fn new(overlay: Overlay, seed: [u8; 32]) -> Self {
        Self { overlay, peers: BTreeMap::new(), actions: VecDeque::new(), rng: StdRng::from_seed(seed) }
    }

    /// Replaces the set of peers; those that stay keep what is known of them. More than
    /// [`PEERS_PER_MAP_MAX`] are not taken.
    pub fn handle_peers(&mut self, peers: &BTreeSet<NodeId>, now: Instant) {
        self.peers.retain(|id, _| peers.contains(id));
        self.actions.retain(|action| peers.contains(&action.peer()));
        for id in peers.iter().take(PEERS_PER_MAP_MAX) {
            self.peers.entry(*id).or_insert_with(|| Peer {
                endpoints: Endpoints::new(self.overlay),
                heard_at: None,
                tries: 0,
                wake_at: now + self.rng.random_range(Duration::ZERO..FIRST_PROBE_SPREAD),
            });
        }
    }

    /// Adds candidates; unknown peers and impossible addresses are ignored. A peer that is silent at the
    /// end of its list is tried at once.
    pub fn handle_candidates(&mut self, id: NodeId, candidates: &[(SocketAddr, Source)], now: Instant) {
        let Some(peer) = self.peers.get_mut(&id) else { return };
        let (before, known) = (peer.endpoints.current(), peer.endpoints.order(now).len());
        for (address, source) in candidates {
            peer.endpoints.offer(*address, *source, now);
        }
        let is_new = peer.endpoints.order(now).len() > known;
        if let (None, Some(endpoint)) = (before, peer.endpoints.current()) {
            self.actions.push_back(Action::SetEndpoint { peer: id, endpoint });
        }
        if is_new && peer.is_silent(now) {
            peer.tries = 0;
            peer.wake_at = peer.wake_at.min(now + self.rng.random_range(Duration::ZERO..FIRST_PROBE_SPREAD));
        }
    }

    /// The peer authenticated itself, by a handshake or data, from `from`: its endpoint now (roaming).
    pub fn handle_authenticated(&mut self, id: NodeId, from: SocketAddr, now: Instant) {
        let Some(peer) = self.peers.get_mut(&id) else { return };
        let before = peer.endpoints.current();
        if !peer.endpoints.handle_authenticated(from) {
            return;
        }
        (peer.heard_at, peer.tries, peer.wake_at) = (Some(now), 0, now + SILENCE_MAX);
        if before != Some(from) {
            self.actions.push_back(Action::SetEndpoint { peer: id, endpoint: from });
        }
    }

    /// The tunnel sent and heard nothing back: the next endpoint is due.
    pub fn handle_no_reply(&mut self, id: NodeId, now: Instant) {
        if let Some(peer) = self.peers.get_mut(&id) {
            peer.heard_at = None;
            peer.wake_at = peer.wake_at.min(now);
        }
    }

    /// This host has moved as far as `peers` are concerned: each is tried where it is, so that it learns where
    /// we are. Spread by their number.
    pub fn handle_moved(&mut self, peers: &BTreeSet<NodeId>, now: Instant) {
        let spread = MOVED_SPREAD_PER_PEER.saturating_mul(u32::try_from(peers.len()).unwrap_or(u32::MAX));
        for (_, peer) in self.peers.iter_mut().filter(|(id, _)| peers.contains(id)) {
            peer.tries = 0;
            peer.wake_at = peer.wake_at.min(now + self.rng.random_range(Duration::ZERO..=spread));
        }
    }

    /// Tries every peer whose time has come.
    pub fn handle_timeout(&mut self, now: Instant) {
        for (&id, peer) in self.peers.iter_mut().filter(|(_, peer)| peer.wake_at <= now) {
            // The first try goes to the endpoint in use; only its silence asks for another.
            let before = peer.endpoints.current();
            let endpoint = if peer.tries == 0 { before } else { peer.endpoints.rotate(now) };
            peer.tries = peer.tries.saturating_add(1);
            peer.wake_at = now + pause(peer.tries, peer.endpoints.order(now).len(), &mut self.rng);
            let Some(endpoint) = endpoint else { continue };
            if before != Some(endpoint) {
                self.actions.push_back(Action::SetEndpoint { peer: id, endpoint });
            }
            self.actions.push_back(Action::Handshake { peer: id });
        }
    }

    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When to call [`handle_timeout`](Self::handle_timeout); `None` without peers.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.peers.values().map(|peer| peer.wake_at).min()
    }

    /// The endpoint in use.
    pub fn endpoint(&self, id: NodeId) -> Option<SocketAddr> {
        self.peers.get(&id)?.endpoints.current()
    }
}

impl Peer {
    fn is_silent(&self, now: Instant) -> bool {
        self.heard_at.is_none_or(|heard| now.saturating_duration_since(heard) >= SILENCE_MAX)
    }
}

impl Action {
    fn peer(&self) -> NodeId {
        match self {
            Action::SetEndpoint { peer, .. } | Action::Handshake { peer } => *peer,
        }
    }
}

/// One interval for each endpoint of the first round, then doubling with each round up to the maximum,
/// with up to a fifth of jitter.
fn pause(tries: u32, endpoints: usize, rng: &mut StdRng) -> Duration {
    let rounds = tries / u32::try_from(endpoints.max(1)).unwrap_or(u32::MAX);
    let pause = PROBE_INTERVAL.saturating_mul(1 << rounds.min(6)).min(PROBE_INTERVAL_MAX);
    pause + rng.random_range(Duration::ZERO..pause / 5)
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "a test needs some instant to begin with")]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    const PEER: NodeId = NodeId(2);

    fn table(peers: impl IntoIterator<Item = NodeId>, now: Instant) -> PeerTable {
        let overlay = Overlay { ipv4: "100.64.0.0/10".parse().unwrap(), ipv6: "fd00::/48".parse().unwrap() };
        let mut table = PeerTable::new(overlay, [7; 32]);
        table.handle_peers(&peers.into_iter().collect(), now);
        table
    }

    fn host(number: u8) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, number], 51820))
    }

    fn drain(table: &mut PeerTable) -> Vec<Action> {
        std::iter::from_fn(|| table.poll_action()).collect()
    }

    /// Lets time pass until the table acts, and says what it does.
    fn next_actions(table: &mut PeerTable, now: &mut Instant) -> Vec<Action> {
        *now = table.poll_timeout().expect("a peer").max(*now);
        table.handle_timeout(*now);
        drain(table)
    }

    #[test]
    fn a_silent_peer_is_tried_at_each_endpoint_in_turn() {
        let mut now = Instant::now();
        let mut table = table([PEER], now);
        table.handle_candidates(PEER, &[(host(1), Source::Configured), (host(2), Source::Interface)], now);
        assert_eq!(drain(&mut table), [Action::SetEndpoint { peer: PEER, endpoint: host(1) }]);
        let handshake = Action::Handshake { peer: PEER };
        assert_eq!(next_actions(&mut table, &mut now), [handshake]);
        let second = Action::SetEndpoint { peer: PEER, endpoint: host(2) };
        assert_eq!(next_actions(&mut table, &mut now), [second, handshake]);
        let first = Action::SetEndpoint { peer: PEER, endpoint: host(1) };
        assert_eq!(next_actions(&mut table, &mut now), [first, handshake]);
    }

    #[test]
    fn a_peer_that_is_heard_is_left_alone_until_its_session_is_over() {
        let mut now = Instant::now();
        let mut table = table([PEER], now);
        table.handle_authenticated(PEER, host(3), now);
        assert_eq!(drain(&mut table), [Action::SetEndpoint { peer: PEER, endpoint: host(3) }]);
        assert_eq!(table.poll_timeout(), Some(now + SILENCE_MAX));
        table.handle_no_reply(PEER, now);
        assert_eq!(next_actions(&mut table, &mut now), [Action::Handshake { peer: PEER }]);
    }

    #[test]
    fn a_new_candidate_wakes_a_silent_peer_but_no_healthy_one() {
        let mut now = Instant::now();
        let mut table = table([PEER], now);
        table.handle_candidates(PEER, &[(host(1), Source::Configured)], now);
        for _ in 0..20 {
            next_actions(&mut table, &mut now);
        }
        assert!(table.poll_timeout().unwrap() > now + PROBE_INTERVAL, "backed off");
        table.handle_candidates(PEER, &[(host(2), Source::Interface)], now);
        assert!(table.poll_timeout().unwrap() <= now + FIRST_PROBE_SPREAD);
        table.handle_authenticated(PEER, host(2), now);
        table.handle_candidates(PEER, &[(host(3), Source::Interface)], now);
        assert_eq!(table.poll_timeout(), Some(now + SILENCE_MAX));
        assert_eq!(table.endpoint(PEER), Some(host(2)));
    }

    #[test]
    fn after_a_move_every_peer_is_tried_where_it_is() {
        let now = Instant::now();
        let ids: BTreeSet<NodeId> = (1..=1000).map(NodeId).collect();
        let mut table = table(ids.iter().copied(), now);
        for id in &ids {
            table.handle_authenticated(*id, host(1), now);
        }
        drain(&mut table);
        table.handle_moved(&(1..=500).map(NodeId).collect(), now);
        let mut first = BTreeMap::new();
        let mut at = now;
        while first.len() < 500 {
            at = table.poll_timeout().unwrap();
            table.handle_timeout(at);
            for action in drain(&mut table) {
                assert_eq!(action, Action::Handshake { peer: action.peer() }, "nobody is given up");
                assert!(first.insert(action.peer(), at).is_none());
            }
        }
        assert!(first.keys().all(|id| id.0 <= 500), "who is reached as before is left alone");
        let spread = at.duration_since(now);
        assert!(spread <= MOVED_SPREAD_PER_PEER * 500 && spread > MOVED_SPREAD_PER_PEER * 250, "{spread:?}");
    }

    #[derive(Clone, Debug)]
    enum Step {
        Peers(BTreeSet<u8>),
        Candidate(u8, u8),
        Authenticated(u8, u8),
        NoReply(u8),
        Wait(u16),
    }

    fn any_step() -> impl Strategy<Value = Step> {
        let id = 0u8..6;
        prop_oneof![
            proptest::collection::btree_set(id.clone(), 0..6).prop_map(Step::Peers),
            (id.clone(), any::<u8>()).prop_map(|(id, host)| Step::Candidate(id, host)),
            (id.clone(), any::<u8>()).prop_map(|(id, host)| Step::Authenticated(id, host)),
            id.prop_map(Step::NoReply),
            (0u16..300).prop_map(Step::Wait),
        ]
    }

    proptest! {
        /// Whoever obeys the actions sends every peer's packets where the table says, never acts for a peer
        /// that is gone, and is never asked to act in the past or twice at one moment.
        #[test]
        fn actions_and_table_agree(steps in vec(any_step(), 0..64)) {
            let mut now = Instant::now();
            let mut table = table([], now);
            let (mut peers, mut told) = (BTreeSet::new(), BTreeMap::new());
            for step in steps {
                match step {
                    Step::Peers(ids) => {
                        peers = ids.into_iter().map(|id| NodeId(id.into())).collect();
                        table.handle_peers(&peers, now);
                        told.retain(|id, _| peers.contains(id));
                    }
                    Step::Candidate(id, number) => {
                        table.handle_candidates(NodeId(id.into()), &[(host(number), Source::Interface)], now);
                    }
                    Step::Authenticated(id, number) => table.handle_authenticated(NodeId(id.into()), host(number), now),
                    Step::NoReply(id) => table.handle_no_reply(NodeId(id.into()), now),
                    Step::Wait(seconds) => now += Duration::from_secs(seconds.into()),
                }
                table.handle_timeout(now);
                for action in drain(&mut table) {
                    prop_assert!(peers.contains(&action.peer()));
                    match action {
                        Action::SetEndpoint { peer, endpoint } => drop(told.insert(peer, endpoint)),
                        Action::Handshake { peer } => prop_assert!(told.contains_key(&peer)),
                    }
                }
                for peer in &peers {
                    prop_assert_eq!(told.get(peer).copied(), table.endpoint(*peer));
                }
                prop_assert!(table.poll_timeout().is_none_or(|wake| wake > now));
                prop_assert_eq!(table.poll_timeout().is_none(), peers.is_empty());
            }
        }
    }
}
