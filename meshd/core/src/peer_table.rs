//! Which peers a node keeps a tunnel with, where it looks for them, and when.
//!
//! The probe is WireGuard's own handshake: what answers has the peer's key. A path in use is given up only
//! for one that has answered. A direct path is left alone; a relayed peer is looked for at its own
//! addresses again and again; a silent one everywhere, the relay last. Two peers behind NAT open the way
//! for each other by probing at about the same time, which is why news of a peer starts a
//! burst of probes: it reaches both sides at once.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::endpoints::{Endpoints, Overlay, Source, relay_endpoint};
use crate::ids::NodeId;
use crate::limits::PEERS_PER_MAP_MAX;

/// Between two tries of a silent peer. Shorter than WireGuard's own `Rekey-Timeout` of 5 s (paper §6.1),
/// since each try of the first round goes to another endpoint: a host with several addresses must not make
/// the first packet wait for that many timeouts.
pub const PROBE_INTERVAL: Duration = Duration::from_secs(1);
/// Rounds of probes a [`PROBE_INTERVAL`] apart before the pauses grow: the burst in which two peers
/// behind NAT meet.
pub const BURST_ROUNDS: u32 = 4;
/// The longest pause between two tries of a peer that is silent at every endpoint.
pub const PROBE_INTERVAL_MAX: Duration = Duration::from_secs(60);
/// The same for a peer that is reached by the relay. Short enough that a router keeps the hole of one side's
/// last probe open until the other side's next: Linux forgets unanswered datagrams after 30 s.
pub const RELAYED_PROBE_INTERVAL_MAX: Duration = Duration::from_secs(20);
/// How long the direct addresses have to answer before the relay is asked.
pub const RELAY_DELAY: Duration = Duration::from_millis(250);
/// How long a path has to answer after our own network has changed.
pub const CHECK_TIMEOUT: Duration = Duration::from_millis(1500);
/// A peer that was not heard for so long has no session left. WireGuard paper §6.1 `Reject-After-Time`.
pub const SILENCE_MAX: Duration = Duration::from_secs(180);
/// New peers are tried within this time, spread so that a big map does not start all handshakes at once.
pub const FIRST_PROBE_SPREAD: Duration = Duration::from_millis(333);

/// Handshakes after the host has moved are spread over this much for each peer: what one costs, twice.
pub const MOVED_SPREAD_PER_PEER: Duration = Duration::from_micros(400);

/// What the tunnel's engine can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probing {
    /// Handshakes at any address while packets go where they went.
    Beside,
    /// A handshake goes only where packets go: a probe moves the peer there. Kernels can do no more.
    InPlace,
}

/// What the caller must do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send to the peer at this address from now on.
    SetEndpoint { peer: NodeId, endpoint: SocketAddr },
    /// Begin one handshake, at each of these addresses; packets go on where they went. With
    /// [`Probing::InPlace`] there is one address, the one in use.
    Probe { peer: NodeId, endpoints: Vec<SocketAddr> },
}

/// Performs no I/O.
///
/// Call one `handle_*`, drain [`poll_action`](Self::poll_action) to `None`, then sleep until
/// [`poll_timeout`](Self::poll_timeout). `now` must never go backwards between calls.
#[derive(Debug)]
pub struct PeerTable {
    overlay: Overlay,
    probing: Probing,
    /// Whether there is a relay at the moment.
    relay: bool,
    peers: BTreeMap<NodeId, Peer>,
    actions: VecDeque<Action>,
    rng: StdRng,
}

#[derive(Debug)]
struct Peer {
    endpoints: Endpoints,
    /// When the peer was last heard at the endpoint in use.
    heard_at: Option<Instant>,
    /// Rounds of probes since the last news of the peer.
    rounds: u32,
    /// When news last began a burst.
    burst_at: Option<Instant>,
    next: Step,
    wake_at: Instant,
}

/// What is due when the peer's time comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// A round of probes, if it needs one.
    Round,
    /// The end of a round: the relay.
    Relay,
    /// Whether the path in use has outlived a change of our own network.
    Check,
    /// It has not answered.
    GiveUp,
}

impl PeerTable {
    /// A table without peers. The seed spreads timers, nothing else.
    pub fn new(overlay: Overlay, probing: Probing, seed: [u8; 32]) -> Self {
        Self {
            overlay,
            probing,
            relay: false,
            peers: BTreeMap::new(),
            actions: VecDeque::new(),
            rng: StdRng::from_seed(seed),
        }
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
                rounds: 0,
                burst_at: None,
                next: Step::Round,
                wake_at: now + self.rng.random_range(Duration::ZERO..FIRST_PROBE_SPREAD),
            });
        }
    }

    /// Adds candidates; unknown peers and impossible addresses are ignored. They are tried at once unless
    /// there is a direct path: new or not, they say that the peer is looking too.
    pub fn handle_candidates(&mut self, id: NodeId, candidates: &[(SocketAddr, Source)], now: Instant) {
        let Some(peer) = self.peers.get_mut(&id) else { return };
        let (before, known) = (peer.endpoints.current(), peer.endpoints.order(now).len());
        for (address, source) in candidates {
            peer.endpoints.offer(*address, *source, now);
        }
        if let (None, Some(endpoint)) = (before, peer.endpoints.current()) {
            self.actions.push_back(Action::SetEndpoint { peer: id, endpoint });
        }
        let is_news = match self.probing {
            Probing::Beside => !candidates.is_empty(),
            // Each try costs the path in use: only for what was not tried yet.
            Probing::InPlace => peer.endpoints.order(now).len() > known,
        };
        if is_news && !peer.is_settled(now) {
            peer.burst(now, self.rng.random_range(Duration::ZERO..FIRST_PROBE_SPREAD));
        }
    }

    /// The peer authenticated itself, by a handshake or data, from `from`: its endpoint now (roaming).
    pub fn handle_authenticated(&mut self, id: NodeId, from: SocketAddr, now: Instant) {
        let Some(peer) = self.peers.get_mut(&id) else { return };
        let before = peer.endpoints.current();
        if !peer.endpoints.handle_authenticated(from) {
            return;
        }
        peer.heard_at = Some(now);
        if !peer.endpoints.is_relayed() {
            (peer.rounds, peer.next, peer.wake_at) = (0, Step::Round, now + SILENCE_MAX);
        } else if before != Some(from) || !matches!(peer.next, Step::Round) {
            // Reached at last, or reached in another way than before: is there a direct one as well?
            (peer.next, peer.rounds) = (Step::Round, if before == Some(from) { peer.rounds } else { 0 });
            peer.wake_at = now + pause(peer.rounds, RELAYED_PROBE_INTERVAL_MAX, &mut self.rng);
        }
        if before != Some(from) {
            self.actions.push_back(Action::SetEndpoint { peer: id, endpoint: from });
        }
    }

    /// The tunnel sent and heard nothing back: the peer is looked for everywhere.
    pub fn handle_no_reply(&mut self, id: NodeId, now: Instant) {
        if let Some(peer) = self.peers.get_mut(&id) {
            peer.lost(now);
        }
    }

    /// A relay has come or gone. When it comes, peers that are silent are asked for there.
    pub fn handle_relay(&mut self, available: bool, now: Instant) {
        if std::mem::replace(&mut self.relay, available) == available {
            return;
        }
        for peer in self.peers.values_mut() {
            if !available && peer.endpoints.is_relayed() {
                peer.heard_at = None;
            }
            if available && !peer.is_heard(now) {
                let spread = self.rng.random_range(Duration::ZERO..FIRST_PROBE_SPREAD);
                (peer.next, peer.wake_at) = (Step::Round, peer.wake_at.min(now + spread));
            }
        }
    }

    /// This host has moved as far as `peers` are concerned: each is tried where it is, so that it learns where
    /// we are, and looked for elsewhere if it does not answer there. Spread by their number.
    pub fn handle_moved(&mut self, peers: &BTreeSet<NodeId>, now: Instant) {
        let spread = MOVED_SPREAD_PER_PEER.saturating_mul(u32::try_from(peers.len()).unwrap_or(u32::MAX));
        for (_, peer) in self.peers.iter_mut().filter(|(id, _)| peers.contains(id)) {
            peer.rounds = 0;
            peer.next = if peer.is_settled(now) { Step::Check } else { Step::Round };
            peer.wake_at = peer.wake_at.min(now + self.rng.random_range(Duration::ZERO..=spread));
        }
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Instant) {
        let (probing, relay) = (self.probing, self.relay && self.probing == Probing::Beside);
        for (&id, peer) in self.peers.iter_mut().filter(|(_, peer)| peer.wake_at <= now) {
            match peer.next {
                Step::Check => {
                    (peer.next, peer.wake_at) = (Step::GiveUp, now + CHECK_TIMEOUT);
                    let endpoints = peer.endpoints.current().into_iter().collect();
                    self.actions.push_back(Action::Probe { peer: id, endpoints });
                    continue;
                }
                Step::GiveUp => peer.lost(now),
                Step::Round | Step::Relay => {}
            }
            if peer.is_settled(now) {
                peer.wake_at = peer.heard_at.map_or(now, |at| at + SILENCE_MAX).max(now + PROBE_INTERVAL);
                continue;
            }
            match probing {
                Probing::Beside => peer.probe_beside(id, relay, now, (&mut self.actions, &mut self.rng)),
                Probing::InPlace => peer.probe_in_place(id, now, (&mut self.actions, &mut self.rng)),
            }
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
    fn is_heard(&self, now: Instant) -> bool {
        self.heard_at.is_some_and(|heard| now.saturating_duration_since(heard) < SILENCE_MAX)
    }

    /// Heard, and not by the relay: nothing to look for.
    fn is_settled(&self, now: Instant) -> bool {
        self.is_heard(now) && !self.endpoints.is_relayed()
    }

    fn lost(&mut self, now: Instant) {
        (self.heard_at, self.rounds, self.next) = (None, 0, Step::Round);
        self.wake_at = self.wake_at.min(now);
    }

    /// Begins a burst of rounds, at most one per [`PROBE_INTERVAL`], whatever others tell.
    fn burst(&mut self, now: Instant, delay: Duration) {
        let earliest = self.burst_at.map_or(now, |at| at + PROBE_INTERVAL);
        let start = (now + delay).max(earliest);
        (self.rounds, self.next, self.burst_at) = (0, Step::Round, Some(start));
        self.wake_at = self.wake_at.min(start).max(earliest.min(start));
    }

    fn probe_beside(
        &mut self,
        id: NodeId,
        relay: bool,
        now: Instant,
        (actions, rng): (&mut VecDeque<Action>, &mut StdRng),
    ) {
        let is_heard = self.is_heard(now);
        if self.next == Step::Round {
            let endpoints = self.endpoints.order(now);
            if !endpoints.is_empty() {
                actions.push_back(Action::Probe { peer: id, endpoints });
            }
            // Not the same handshake: the peer takes only the first copy, and the shorter way is to win.
            if relay && !is_heard {
                (self.next, self.wake_at) = (Step::Relay, now + RELAY_DELAY);
                return;
            }
        } else if relay {
            actions.push_back(Action::Probe { peer: id, endpoints: vec![relay_endpoint(id)] });
        }
        self.next = Step::Round;
        self.rounds = self.rounds.saturating_add(1);
        let longest = if is_heard { RELAYED_PROBE_INTERVAL_MAX } else { PROBE_INTERVAL_MAX };
        self.wake_at = now + pause(self.rounds, longest, rng);
    }

    fn probe_in_place(
        &mut self,
        id: NodeId,
        now: Instant,
        (actions, rng): (&mut VecDeque<Action>, &mut StdRng),
    ) {
        // The first try goes to the endpoint in use; only its silence asks for another.
        let before = self.endpoints.current();
        let endpoint = if self.rounds == 0 { before } else { self.endpoints.rotate(now) };
        self.rounds = self.rounds.saturating_add(1);
        let laps = self.rounds / u32::try_from(self.endpoints.order(now).len().max(1)).unwrap_or(u32::MAX);
        self.wake_at = now + pause(BURST_ROUNDS - 1 + laps, PROBE_INTERVAL_MAX, rng);
        let Some(endpoint) = endpoint else { return };
        if before != Some(endpoint) {
            actions.push_back(Action::SetEndpoint { peer: id, endpoint });
        }
        actions.push_back(Action::Probe { peer: id, endpoints: vec![endpoint] });
    }
}

impl Action {
    fn peer(&self) -> NodeId {
        match self {
            Action::SetEndpoint { peer, .. } | Action::Probe { peer, .. } => *peer,
        }
    }
}

/// One interval during the burst, then doubling with each round up to `longest`, with up to a fifth of jitter.
fn pause(rounds: u32, longest: Duration, rng: &mut StdRng) -> Duration {
    let doublings = rounds.saturating_sub(BURST_ROUNDS - 1).min(6);
    let pause = PROBE_INTERVAL.saturating_mul(1 << doublings).min(longest);
    pause + rng.random_range(Duration::ZERO..pause / 5)
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "a test needs some instant to begin with")]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    const PEER: NodeId = NodeId(2);

    fn table(peers: impl IntoIterator<Item = NodeId>, probing: Probing, now: Instant) -> PeerTable {
        let overlay = Overlay { ipv4: "100.64.0.0/10".parse().unwrap(), ipv6: "fd00::/48".parse().unwrap() };
        let mut table = PeerTable::new(overlay, probing, [7; 32]);
        table.handle_peers(&peers.into_iter().collect(), now);
        table
    }

    fn host(number: u8) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, number], 51820))
    }

    fn probe(endpoints: &[SocketAddr]) -> Action {
        Action::Probe { peer: PEER, endpoints: endpoints.to_vec() }
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
    fn where_a_probe_moves_the_peer_a_silent_one_is_tried_at_each_endpoint_in_turn() {
        let mut now = Instant::now();
        let mut table = table([PEER], Probing::InPlace, now);
        table.handle_relay(true, now);
        table.handle_candidates(PEER, &[(host(1), Source::Configured), (host(2), Source::Interface)], now);
        assert_eq!(drain(&mut table), [Action::SetEndpoint { peer: PEER, endpoint: host(1) }]);
        assert_eq!(next_actions(&mut table, &mut now), [probe(&[host(1)])]);
        let second = Action::SetEndpoint { peer: PEER, endpoint: host(2) };
        assert_eq!(next_actions(&mut table, &mut now), [second, probe(&[host(2)])]);
        let first = Action::SetEndpoint { peer: PEER, endpoint: host(1) };
        assert_eq!(next_actions(&mut table, &mut now), [first, probe(&[host(1)])]);
    }

    #[test]
    fn a_silent_peer_is_looked_for_everywhere_and_by_the_relay_last() {
        let mut now = Instant::now();
        let mut table = table([PEER], Probing::Beside, now);
        table.handle_relay(true, now);
        table.handle_candidates(PEER, &[(host(1), Source::Configured), (host(2), Source::Interface)], now);
        drain(&mut table);
        let began = now;
        for _ in 0..3 {
            assert_eq!(next_actions(&mut table, &mut now), [probe(&[host(1), host(2)])]);
            assert_eq!(next_actions(&mut table, &mut now), [probe(&[relay_endpoint(PEER)])]);
        }
        assert!(now - began < Duration::from_secs(5), "a burst takes a few seconds");
    }

    #[test]
    fn a_relayed_peer_is_looked_for_directly_until_it_answers() {
        let mut now = Instant::now();
        let mut table = table([PEER], Probing::Beside, now);
        table.handle_relay(true, now);
        table.handle_candidates(PEER, &[(host(1), Source::ControllerSaw)], now);
        drain(&mut table);
        table.handle_authenticated(PEER, relay_endpoint(PEER), now);
        assert_eq!(drain(&mut table), [Action::SetEndpoint { peer: PEER, endpoint: relay_endpoint(PEER) }]);
        for _ in 0..20 {
            let before = now;
            assert_eq!(next_actions(&mut table, &mut now), [probe(&[host(1)])]);
            assert!(now - before <= RELAYED_PROBE_INTERVAL_MAX.mul_f64(1.2));
            table.handle_authenticated(PEER, relay_endpoint(PEER), now); // it is heard by the relay all the time
        }
        table.handle_authenticated(PEER, host(1), now);
        assert_eq!(drain(&mut table), [Action::SetEndpoint { peer: PEER, endpoint: host(1) }]);
        assert_eq!(table.poll_timeout(), Some(now + SILENCE_MAX), "and then no more");
    }

    #[test]
    fn a_peer_that_is_heard_is_left_alone_until_its_session_is_over() {
        let mut now = Instant::now();
        let mut table = table([PEER], Probing::Beside, now);
        table.handle_authenticated(PEER, host(3), now);
        assert_eq!(drain(&mut table), [Action::SetEndpoint { peer: PEER, endpoint: host(3) }]);
        assert_eq!(table.poll_timeout(), Some(now + SILENCE_MAX));
        table.handle_no_reply(PEER, now);
        assert_eq!(next_actions(&mut table, &mut now), [probe(&[host(3)])]);
    }

    #[test]
    fn news_starts_a_burst_for_a_silent_peer_but_not_for_a_healthy_one() {
        let mut now = Instant::now();
        let mut table = table([PEER], Probing::Beside, now);
        table.handle_candidates(PEER, &[(host(1), Source::Configured)], now);
        for _ in 0..20 {
            next_actions(&mut table, &mut now);
        }
        assert!(table.poll_timeout().unwrap() > now + PROBE_INTERVAL, "backed off");
        // The same again: the peer is back and looks for us.
        table.handle_candidates(PEER, &[(host(1), Source::Configured)], now);
        assert!(table.poll_timeout().unwrap() <= now + FIRST_PROBE_SPREAD);
        table.handle_authenticated(PEER, host(1), now);
        table.handle_candidates(PEER, &[(host(3), Source::Interface)], now);
        assert_eq!(table.poll_timeout(), Some(now + SILENCE_MAX));
        assert_eq!(table.endpoint(PEER), Some(host(1)));
    }

    #[test]
    fn after_a_change_of_network_a_path_that_answers_stays_and_one_that_does_not_is_replaced() {
        let mut now = Instant::now();
        let mut table = table([PEER], Probing::Beside, now);
        table.handle_candidates(PEER, &[(host(1), Source::Configured), (host(2), Source::Interface)], now);
        table.handle_authenticated(PEER, host(2), now);
        drain(&mut table);
        for answers in [true, false] {
            table.handle_moved(&[PEER].into(), now);
            assert_eq!(next_actions(&mut table, &mut now), [probe(&[host(2)])], "only the one in use");
            if answers {
                table.handle_authenticated(PEER, host(2), now);
                assert_eq!(table.poll_timeout(), Some(now + SILENCE_MAX));
            }
        }
        assert_eq!(next_actions(&mut table, &mut now), [probe(&[host(2), host(1)])]);
        assert_eq!(table.endpoint(PEER), Some(host(2)), "nothing moves before somebody answers");
    }

    #[test]
    fn after_a_move_every_peer_is_tried_where_it_is() {
        let now = Instant::now();
        let ids: BTreeSet<NodeId> = (1..=1000).map(NodeId).collect();
        let mut table = table(ids.iter().copied(), Probing::Beside, now);
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
                let peer = action.peer();
                assert_eq!(action, Action::Probe { peer, endpoints: vec![host(1)] }, "nobody is given up");
                assert!(first.insert(peer, at).is_none());
            }
        }
        assert!(first.keys().all(|id| id.0 <= 500), "who is reached as before is left alone");
        let spread = at.duration_since(now);
        assert!(spread <= MOVED_SPREAD_PER_PEER * 500 && spread > MOVED_SPREAD_PER_PEER * 250, "{spread:?}");
    }

    #[derive(Clone, Debug)]
    enum Happening {
        Peers(BTreeSet<u8>),
        Candidate(u8, u8),
        Authenticated(u8, u8),
        Relayed(u8),
        NoReply(u8),
        Relay(bool),
        Moved,
        Wait(u16),
    }

    fn any_happening() -> impl Strategy<Value = Happening> {
        let id = 1u8..7;
        prop_oneof![
            proptest::collection::btree_set(id.clone(), 0..6).prop_map(Happening::Peers),
            (id.clone(), any::<u8>()).prop_map(|(id, host)| Happening::Candidate(id, host)),
            (id.clone(), any::<u8>()).prop_map(|(id, host)| Happening::Authenticated(id, host)),
            id.clone().prop_map(Happening::Relayed),
            id.prop_map(Happening::NoReply),
            any::<bool>().prop_map(Happening::Relay),
            Just(Happening::Moved),
            (0u16..300).prop_map(Happening::Wait),
        ]
    }

    fn any_probing() -> impl Strategy<Value = Probing> {
        prop_oneof![Just(Probing::Beside), Just(Probing::InPlace)]
    }

    fn node(id: u8) -> NodeId {
        NodeId(id.into())
    }

    fn happen(table: &mut PeerTable, happening: &Happening, now: &mut Instant) {
        match happening {
            Happening::Peers(ids) => table.handle_peers(&ids.iter().map(|id| node(*id)).collect(), *now),
            Happening::Candidate(id, number) => {
                table.handle_candidates(node(*id), &[(host(*number), Source::Interface)], *now);
            }
            Happening::Authenticated(id, number) => {
                table.handle_authenticated(node(*id), host(*number), *now)
            }
            Happening::Relayed(id) => table.handle_authenticated(node(*id), relay_endpoint(node(*id)), *now),
            Happening::NoReply(id) => table.handle_no_reply(node(*id), *now),
            Happening::Relay(available) => table.handle_relay(*available, *now),
            Happening::Moved => table.handle_moved(&(1..4).map(NodeId).collect(), *now),
            Happening::Wait(seconds) => *now += Duration::from_secs((*seconds).into()),
        }
        table.handle_timeout(*now);
    }

    proptest! {
        /// Whoever obeys the actions sends every peer's packets where the table says, never acts for a peer
        /// that is gone, and is never asked to act in the past or twice at one moment.
        #[test]
        fn actions_and_table_agree(probing in any_probing(), happenings in vec(any_happening(), 0..64)) {
            let mut now = Instant::now();
            let mut table = table([], probing, now);
            let (mut peers, mut told) = (BTreeSet::new(), BTreeMap::new());
            for happening in happenings {
                if let Happening::Peers(ids) = &happening {
                    peers = ids.iter().map(|id| node(*id)).collect();
                    told.retain(|id, _| peers.contains(id));
                }
                happen(&mut table, &happening, &mut now);
                for action in drain(&mut table) {
                    prop_assert!(peers.contains(&action.peer()));
                    match action {
                        Action::SetEndpoint { peer, endpoint } => drop(told.insert(peer, endpoint)),
                        Action::Probe { peer, endpoints } if probing == Probing::InPlace => {
                            prop_assert_eq!(told.get(&peer).copied().into_iter().collect::<Vec<_>>(), endpoints);
                        }
                        Action::Probe { endpoints, .. } => prop_assert!(!endpoints.is_empty()),
                    }
                }
                for peer in &peers {
                    prop_assert_eq!(told.get(peer).copied(), table.endpoint(*peer));
                }
                prop_assert!(table.poll_timeout().is_none_or(|wake| wake > now));
                prop_assert_eq!(table.poll_timeout().is_none(), peers.is_empty());
            }
        }

        /// Never stuck: whatever has happened, a peer that is not reached directly is probed at each of its
        /// addresses, and at the relay if it is not reached at all, within the longest pause.
        #[test]
        fn whoever_is_not_reached_is_looked_for_everywhere(happenings in vec(any_happening(), 0..48)) {
            let mut now = Instant::now();
            let mut table = table([PEER], Probing::Beside, now);
            for happening in happenings.iter().filter(|happening| !matches!(happening, Happening::Peers(_))) {
                happen(&mut table, happening, &mut now);
            }
            drain(&mut table);
            let (settled, heard) = (table.peers[&PEER].is_settled(now), table.peers[&PEER].is_heard(now));
            let mut wanted: BTreeSet<SocketAddr> = match settled {
                true => BTreeSet::new(),
                false => table.peers[&PEER].endpoints.order(now).into_iter().collect(),
            };
            if table.relay && !heard {
                wanted.insert(relay_endpoint(PEER));
            }
            let deadline = now + PROBE_INTERVAL_MAX.mul_f64(1.2) + CHECK_TIMEOUT + PROBE_INTERVAL;
            while let Some(at) = table.poll_timeout().filter(|at| *at <= deadline) {
                table.handle_timeout(at);
                for action in drain(&mut table) {
                    if let Action::Probe { endpoints, .. } = action {
                        wanted.retain(|address| !endpoints.contains(address));
                    }
                }
            }
            prop_assert!(wanted.is_empty(), "{wanted:?} were not tried");
        }

        /// A relayed peer becomes a direct one as soon as any of its addresses answers, however the
        /// peer was found.
        #[test]
        fn the_relay_gives_way_to_a_direct_path(happenings in vec(any_happening(), 0..32), works in any::<u8>()) {
            let mut now = Instant::now();
            let mut table = table([PEER], Probing::Beside, now);
            for happening in happenings.iter().filter(|happening| !matches!(happening, Happening::Peers(_))) {
                happen(&mut table, happening, &mut now);
            }
            table.handle_candidates(PEER, &[(host(works), Source::ControllerSaw)], now);
            table.handle_authenticated(PEER, relay_endpoint(PEER), now);
            let deadline = now + RELAYED_PROBE_INTERVAL_MAX.mul_f64(1.2) + PROBE_INTERVAL;
            while let Some(at) = table.poll_timeout().filter(|at| *at <= deadline) {
                table.handle_timeout(at);
                for action in drain(&mut table) {
                    if matches!(action, Action::Probe { ref endpoints, .. } if endpoints.contains(&host(works))) {
                        table.handle_authenticated(PEER, host(works), at);
                    }
                }
            }
            prop_assert_eq!(table.endpoint(PEER), Some(host(works)));
        }

        /// Bounded work: however often a peer is in the news or falls silent, it costs no more than two
        /// probes a second and what the tunnel itself reports.
        #[test]
        fn news_costs_at_most_two_probes_a_second(news in vec((any::<u8>(), 0u64..200), 1..200)) {
            let start = Instant::now();
            let (mut now, mut table, mut probes) = (start, table([PEER], Probing::Beside, start), 0);
            table.handle_relay(true, now);
            for (number, wait) in news {
                now += Duration::from_millis(wait);
                table.handle_candidates(PEER, &[(host(number), Source::Interface)], now);
                while table.poll_timeout().is_some_and(|at| at <= now) {
                    table.handle_timeout(now);
                }
                probes += drain(&mut table).iter().filter(|a| matches!(a, Action::Probe { .. })).count() as u64;
            }
            let seconds = (now - start).as_secs() + 1;
            prop_assert!(probes <= 2 * seconds + 2, "{probes} in {seconds} s");
        }
    }
}
