//! Where one peer may be reached: candidates gathered from many sides, one in use at a time.
//!
//! Candidates are merged, never replaced: a controller that is silent takes nothing away. One whose time to
//! live is over is tried after the fresh ones, and goes only when the list is full.

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::ids::NodeId;
use crate::limits::CANDIDATES_PER_PEER_MAX;

/// How long a candidate counts as fresh after it was last offered.
pub const CANDIDATE_TTL: Duration = Duration::from_secs(600);
/// Addresses that answered are remembered: the one in use and the one before.
const PROVEN_MAX: usize = 2;
/// Where relayed peers are, as the tunnel sees it: the prefix that routers discard, so that no real endpoint
/// is in it. RFC 6666 §4. The host part is the node's index.
const RELAY_NETWORK: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 0), 64);
const RELAY_PORT: u16 = 1;

/// The endpoint that stands for "by the relay, to this peer".
pub fn relay_endpoint(peer: NodeId) -> SocketAddr {
    let host = u128::from(RELAY_NETWORK.network()) | u128::from(peer.0);
    SocketAddr::new(Ipv6Addr::from(host).into(), RELAY_PORT)
}

/// The peer behind an endpoint that [`relay_endpoint`] made; `None` for every other.
pub fn relayed_peer(endpoint: SocketAddr) -> Option<NodeId> {
    let IpAddr::V6(ip) = endpoint.ip() else { return None };
    let host = u128::from(ip) & u128::from(u64::MAX);
    let peer = u32::try_from(host).ok().filter(|peer| *peer != 0)?;
    (RELAY_NETWORK.contains(&ip) && endpoint.port() == RELAY_PORT).then_some(NodeId(peer))
}

/// Who said that a peer may be reached somewhere; the first is tried first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    /// Written in the peer's configuration.
    Configured,
    /// An address of one of the peer's interfaces.
    Interface,
    /// Where another peer has seen it.
    PeerSaw,
    /// Where the controller has seen it, with the peer's WireGuard port.
    ControllerSaw,
}

/// The overlay's own prefixes: an endpoint inside them would send the tunnel through itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overlay {
    pub ipv4: Ipv4Net,
    pub ipv6: Ipv6Net,
}

impl Overlay {
    /// Whether a packet to `address` can be meant for the underlay: one host, a port, outside the overlay.
    pub fn may_carry(&self, address: SocketAddr) -> bool {
        let ip = address.ip().to_canonical();
        let not_outside = [IpNet::V4(self.ipv4), IpNet::V6(self.ipv6), IpNet::V6(RELAY_NETWORK)];
        let inside = not_outside.iter().any(|net| net.contains(&ip));
        let broadcast = ip == IpAddr::V4(std::net::Ipv4Addr::BROADCAST);
        address.port() != 0 && !inside && !ip.is_unspecified() && !ip.is_multicast() && !broadcast
    }
}

/// The candidates of one peer. Performs no I/O.
#[derive(Clone, Debug)]
pub struct Endpoints {
    overlay: Overlay,
    candidates: BTreeMap<SocketAddr, Candidate>,
    /// Addresses from which the peer authenticated itself, newest first.
    proven: VecDeque<SocketAddr>,
    current: Option<SocketAddr>,
}

#[derive(Clone, Copy, Debug)]
struct Candidate {
    source: Source,
    offered_at: Instant,
}

impl Candidate {
    fn is_stale(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.offered_at) > CANDIDATE_TTL
    }
}

impl Endpoints {
    pub fn new(overlay: Overlay) -> Self {
        Self { overlay, candidates: BTreeMap::new(), proven: VecDeque::new(), current: None }
    }

    /// The endpoint in use; `None` before the first candidate.
    pub fn current(&self) -> Option<SocketAddr> {
        self.current
    }

    /// Whether the peer authenticated itself from the endpoint in use.
    pub fn is_proven(&self) -> bool {
        self.current.is_some() && self.current == self.proven.front().copied()
    }

    /// Adds a candidate or makes it fresh; it is used only when there was none. `false` for addresses that
    /// cannot be an endpoint.
    pub fn offer(&mut self, address: SocketAddr, source: Source, now: Instant) -> bool {
        if !self.overlay.may_carry(address) {
            return false;
        }
        let candidate = self.candidates.entry(address).or_insert(Candidate { source, offered_at: now });
        candidate.source = candidate.source.min(source);
        candidate.offered_at = candidate.offered_at.max(now);
        self.shed(now);
        if self.current.is_none() {
            self.current = Some(address);
        }
        true
    }

    /// Whether the endpoint in use is the relay.
    pub fn is_relayed(&self) -> bool {
        self.current.is_some_and(|current| relayed_peer(current).is_some())
    }

    /// The peer authenticated itself from `from`: that is its endpoint now. `false` for addresses that
    /// cannot be one.
    pub fn handle_authenticated(&mut self, from: SocketAddr) -> bool {
        if relayed_peer(from).is_some() {
            // No candidate: the way back to a direct path is through those.
            self.current = Some(from);
            return true;
        }
        if !self.overlay.may_carry(from) {
            return false;
        }
        self.proven.retain(|address| *address != from);
        self.proven.push_front(from);
        self.proven.truncate(PROVEN_MAX);
        self.current = Some(from);
        true
    }

    /// The endpoint in use does not answer: takes the next. What answered last comes first, then fresh
    /// candidates, then stale ones, then from the beginning.
    pub fn rotate(&mut self, now: Instant) -> Option<SocketAddr> {
        let order = self.order(now);
        let next = match order.iter().position(|address| Some(*address) == self.current) {
            Some(at) => order.get((at + 1) % order.len()),
            None => order.first(),
        };
        self.current = next.copied().or(self.current);
        self.current
    }

    /// Every known address once, best first, the relay left out.
    pub fn order(&self, now: Instant) -> Vec<SocketAddr> {
        let mut order: Vec<SocketAddr> = self.proven.iter().copied().collect();
        let unproven = self.candidates.iter().filter(|(address, _)| !self.proven.contains(address));
        let mut rest: Vec<_> = unproven
            .map(|(address, candidate)| (candidate.is_stale(now), candidate.source, *address))
            .collect();
        rest.sort();
        order.extend(rest.into_iter().map(|(_, _, address)| address));
        order
    }

    /// Keeps the list within its limit: what was offered longest ago goes, never what is in use.
    fn shed(&mut self, now: Instant) {
        while self.candidates.len() > CANDIDATES_PER_PEER_MAX {
            let idle = self.candidates.iter().filter(|(address, _)| Some(**address) != self.current);
            let worst = idle.max_by_key(|(address, candidate)| {
                (now.saturating_duration_since(candidate.offered_at), candidate.source, **address)
            });
            let Some((worst, _)) = worst else { return };
            let worst = *worst;
            self.candidates.remove(&worst);
        }
    }
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "a test needs some instant to begin with")]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn overlay() -> Overlay {
        Overlay { ipv4: "100.64.0.0/10".parse().unwrap(), ipv6: "fd00:1:2::/48".parse().unwrap() }
    }

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn addresses_that_cannot_carry_the_tunnel_are_refused() {
        let mut endpoints = Endpoints::new(overlay());
        let bad = [
            "0.0.0.0:1",
            "192.0.2.1:0",
            "224.0.0.1:5",
            "255.255.255.255:5",
            "100.64.0.9:51820",
            "[::]:1",
            "[ff02::1]:1",
            "[fd00:1:2::5]:51820",
            "[::ffff:100.64.0.9]:51820",
            "[100::1]:51820",
        ];
        for address in bad {
            assert!(!endpoints.offer(at(address), Source::Configured, Instant::now()), "{address}");
            assert!(!endpoints.handle_authenticated(at(address)), "{address}");
        }
        assert_eq!(endpoints.current(), None);
    }

    #[test]
    fn a_relayed_peer_has_an_endpoint_that_nobody_can_name() {
        let relayed = relay_endpoint(NodeId(7));
        assert_eq!(relayed, at("[100::7]:1"));
        assert_eq!(relayed_peer(relayed), Some(NodeId(7)));
        for other in ["[100::]:1", "[100::7]:2", "[100::1:0:0]:1", "[101::7]:1", "192.0.2.7:1"] {
            assert_eq!(relayed_peer(at(other)), None, "{other}");
        }
        let (mut endpoints, now) = (Endpoints::new(overlay()), Instant::now());
        assert!(!endpoints.offer(relayed, Source::Configured, now));
        assert!(endpoints.handle_authenticated(relayed) && endpoints.is_relayed());
        assert!(endpoints.order(now).is_empty(), "it is no candidate");
        endpoints.offer(at("192.0.2.1:1"), Source::Configured, now);
        assert_eq!(endpoints.current(), Some(relayed), "an offer moves nothing");
    }

    #[test]
    fn a_roam_that_falls_silent_goes_back_to_the_last_good_endpoint() {
        let (mut endpoints, now) = (Endpoints::new(overlay()), Instant::now());
        endpoints.offer(at("192.0.2.9:1"), Source::Configured, now);
        endpoints.handle_authenticated(at("192.0.2.1:1"));
        endpoints.handle_authenticated(at("198.51.100.7:9"));
        assert_eq!(endpoints.current(), Some(at("198.51.100.7:9")));
        assert_eq!(endpoints.rotate(now), Some(at("192.0.2.1:1")));
        assert_eq!(endpoints.rotate(now), Some(at("192.0.2.9:1")));
        assert_eq!(endpoints.rotate(now), Some(at("198.51.100.7:9")), "from the beginning");
    }

    #[test]
    fn stale_candidates_come_last_but_stay() {
        let (mut endpoints, start) = (Endpoints::new(overlay()), Instant::now());
        endpoints.offer(at("192.0.2.1:1"), Source::Configured, start);
        let later = start + CANDIDATE_TTL + Duration::from_secs(1);
        endpoints.offer(at("192.0.2.2:1"), Source::ControllerSaw, later);
        assert_eq!(endpoints.order(start), [at("192.0.2.1:1"), at("192.0.2.2:1")]);
        assert_eq!(endpoints.order(later), [at("192.0.2.2:1"), at("192.0.2.1:1")]);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Offer(u8, u8),
        Authenticated(u8),
        Rotate,
        Wait(u16),
    }

    fn any_step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (any::<u8>(), 0u8..4).prop_map(|(host, source)| Step::Offer(host, source)),
            any::<u8>().prop_map(Step::Authenticated),
            Just(Step::Rotate),
            (0u16..900).prop_map(Step::Wait),
        ]
    }

    fn host(number: u8) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, number], 51820))
    }

    proptest! {
        /// Whatever happens: the endpoint in use is one that somebody named, an authenticated one is used
        /// at once, an offer moves nothing, the list is bounded, and rotating tries every address.
        #[test]
        fn the_endpoint_in_use_is_always_one_that_was_named(steps in vec(any_step(), 0..64)) {
            let (mut endpoints, mut now) = (Endpoints::new(overlay()), Instant::now());
            let mut named = std::collections::BTreeSet::new();
            let sources = [Source::Configured, Source::Interface, Source::PeerSaw, Source::ControllerSaw];
            for step in steps {
                let before = endpoints.current();
                match step {
                    Step::Offer(number, source) => {
                        prop_assert!(endpoints.offer(host(number), sources[usize::from(source)], now));
                        named.insert(host(number));
                        prop_assert!(before.is_none() || endpoints.current() == before);
                    }
                    Step::Authenticated(number) => {
                        prop_assert!(endpoints.handle_authenticated(host(number)));
                        named.insert(host(number));
                        prop_assert_eq!(endpoints.current(), Some(host(number)));
                        prop_assert!(endpoints.is_proven());
                    }
                    Step::Rotate => {
                        let next = endpoints.rotate(now);
                        prop_assert_eq!(next.is_some(), !endpoints.order(now).is_empty());
                    }
                    Step::Wait(seconds) => now += Duration::from_secs(seconds.into()),
                }
                prop_assert!(endpoints.candidates.len() <= CANDIDATES_PER_PEER_MAX);
                prop_assert!(endpoints.current().is_none_or(|current| named.contains(&current)));
            }
            let order = endpoints.order(now);
            let tried: std::collections::BTreeSet<_> =
                order.iter().filter_map(|_| endpoints.rotate(now)).collect();
            prop_assert_eq!(tried.len(), order.len(), "one round tries every address once");
        }
    }
}
