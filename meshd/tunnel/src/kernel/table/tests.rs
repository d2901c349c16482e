use super::*;
use crate::key::PresharedKey;

const OWN: PublicKey = PublicKey([1; 32]);
const PEER: PublicKey = PublicKey([9; 32]);
const WALL: Duration = Duration::from_secs(1_800_000_000);

fn config(key: PublicKey, prefix: &str) -> PeerConfig {
    PeerConfig {
        public_key: key,
        preshared_key: None,
        endpoint: Some(place(1)),
        allowed_ips: vec![prefix.parse().unwrap()],
        persistent_keepalive: None,
    }
}

fn place(port: u16) -> SocketAddr {
    ([192, 0, 2, 1], port).into()
}

/// A table with one peer, and a clock that both sides share.
struct World {
    table: Table,
    now: Instant,
    wall: Duration,
    report: PeerReport,
}

impl World {
    fn new() -> Self {
        let now = Instant::now();
        let mut table = Table::new(OWN, now);
        let config = config(PEER, "10.0.0.9/32");
        let update = table.check(&config).unwrap();
        table.insert(config, update);
        let endpoint = Some(place(1));
        let report = PeerReport { key: PEER, endpoint, last_handshake: None, rx_bytes: 0, tx_bytes: 0 };
        Self { table, now, wall: WALL, report }
    }

    fn pass(&mut self, secs: u64) -> Vec<TunnelEvent> {
        (self.now, self.wall) = (self.now + Duration::from_secs(secs), self.wall + Duration::from_secs(secs));
        let snapshot = Snapshot { port: 1, peers: vec![self.report.clone()] };
        self.table.observe(&snapshot, self.now, self.wall)
    }

    /// A handshake half a second before the next look.
    fn handshake(&mut self) -> Vec<TunnelEvent> {
        self.report.last_handshake = Some(self.wall + Duration::from_millis(500));
        (self.report.rx_bytes, self.report.tx_bytes) =
            (self.report.rx_bytes + 92, self.report.tx_bytes + 148);
        self.pass(1)
    }

    fn stats(&self) -> PeerStats {
        self.table.stats(self.now).remove(0)
    }
}

#[test]
fn a_handshake_is_told_once_and_its_age_is_known() {
    let mut world = World::new();
    assert_eq!(world.pass(1), []);
    assert!(!world.stats().has_session);
    assert_eq!(world.handshake(), [TunnelEvent::HandshakeDone { peer: PEER }]);
    assert_eq!(world.pass(1), []);
    assert_eq!(world.stats().last_handshake, Some(Duration::from_millis(1500)));
    world.pass(177);
    assert!(world.stats().has_session);
    world.pass(2);
    assert!(!world.stats().has_session, "180 s are over");
    assert_eq!(world.handshake(), [TunnelEvent::HandshakeDone { peer: PEER }]);
}

#[test]
fn a_wall_clock_that_is_set_does_not_make_sessions_older_or_younger() {
    for jump in [-7200_i64, 7200] {
        let mut world = World::new();
        world.handshake();
        let before = world.stats().last_handshake;
        world.wall = world.wall.checked_add_signed(jump);
        assert_eq!(world.pass(0), []);
        assert_eq!(world.stats().last_handshake, before, "{jump}");
        // A handshake stamped by the old clock is seen after the jump.
        world.report.last_handshake = world.report.last_handshake.map(|at| at + Duration::from_secs(1));
        assert_eq!(world.pass(1).len(), 1);
        assert!(world.stats().last_handshake.unwrap() <= Duration::from_secs(1), "{jump}");
    }
}

trait Jump {
    fn checked_add_signed(self, secs: i64) -> Duration;
}

impl Jump for Duration {
    fn checked_add_signed(self, secs: i64) -> Duration {
        Duration::from_secs(self.as_secs().checked_add_signed(secs).unwrap())
    }
}

#[test]
fn roaming_is_told_and_what_we_set_is_not() {
    let mut world = World::new();
    world.report.endpoint = Some(place(2));
    let moved = TunnelEvent::EndpointChanged { peer: PEER, from: place(2) };
    assert_eq!(world.pass(1), [moved]);
    assert_eq!(world.pass(1), []);
    world.table.set_endpoint(&PEER, place(3));
    world.report.endpoint = Some(place(3));
    assert_eq!(world.pass(1), []);
    // An update that does not name another endpoint keeps the one the peer roamed to.
    for endpoint in [None, Some(place(1))] {
        let config = PeerConfig { endpoint, ..config(PEER, "10.0.0.9/32") };
        assert_eq!(world.table.endpoint_for(&config), Some(place(3)));
    }
    let config = PeerConfig { endpoint: Some(place(4)), ..config(PEER, "10.0.0.9/32") };
    assert_eq!(world.table.endpoint_for(&config), Some(place(4)));
}

#[test]
fn silence_is_told_once_and_keepalives_want_no_answer() {
    let mut world = World::new();
    world.handshake();
    for _ in 0..40 {
        world.report.tx_bytes += 32;
        assert_eq!(world.pass(1), [], "a keepalive each second");
    }
    world.report.tx_bytes += 128;
    for _ in 0..15 {
        assert_eq!(world.pass(1), []);
        world.report.tx_bytes += 128;
    }
    assert_eq!(world.pass(1), [TunnelEvent::PeerSilent { peer: PEER }]);
    world.report.tx_bytes += 128;
    assert_eq!(world.pass(20), []);
    world.report.rx_bytes += 32;
    assert_eq!(world.pass(1), []);
    world.report.tx_bytes += 128;
    assert_eq!(world.pass(1), []);
    assert_eq!(world.pass(15), [TunnelEvent::PeerSilent { peer: PEER }]);
}

#[test]
fn what_would_take_from_another_peer_is_refused() {
    let mut world = World::new();
    let other = PublicKey([7; 32]);
    let refused = world.table.check(&config(other, "10.0.0.9/32"));
    assert!(matches!(refused, Err(TunnelError::AllowedIpsOverlap { owner, .. }) if owner == PEER));
    assert!(matches!(world.table.check(&config(OWN, "10.0.0.7/32")), Err(TunnelError::OwnKey { .. })));
    assert_eq!(world.table.check(&config(other, "10.0.0.0/24")).unwrap(), Update::New);
    assert_eq!(world.table.check(&config(PEER, "10.0.0.8/32")).unwrap(), Update::Change);
    let keyed =
        PeerConfig { preshared_key: Some(PresharedKey::from_bytes([5; 32])), ..config(PEER, "10.0.0.8/32") };
    assert_eq!(world.table.check(&keyed).unwrap(), Update::Renew);
    // What a removed peer had is free.
    assert!(world.table.remove(&PEER));
    assert!(!world.table.remove(&PEER));
    assert_eq!(world.table.check(&config(other, "10.0.0.9/32")).unwrap(), Update::New);
}

#[test]
fn a_peer_made_anew_has_no_session_and_keeps_its_counters() {
    let mut world = World::new();
    world.handshake();
    let before = world.stats();
    assert_eq!((before.rx_bytes, before.tx_bytes), (92, 148));
    world.table.set_own(PublicKey([2; 32]));
    assert!(!world.stats().has_session);
    (world.report.rx_bytes, world.report.tx_bytes, world.report.last_handshake) = (10, 20, None);
    assert_eq!(world.pass(1), []);
    assert_eq!((world.stats().rx_bytes, world.stats().tx_bytes), (102, 168));
}

#[test]
fn a_greeting_never_costs_a_session_in_use_and_does_not_restart_one_under_way() {
    let mut world = World::new();
    assert_eq!(world.table.greeting(&OWN, world.now), Greeting::Impossible);
    assert_eq!(world.table.greeting(&PEER, world.now), Greeting::Now(place(1)));
    world.table.greeted(&PEER, world.now);
    assert_eq!(world.table.greeting(&PEER, world.now + Duration::from_secs(4)), Greeting::UnderWay);
    assert_eq!(world.table.greeting(&PEER, world.now + Duration::from_secs(5)), Greeting::Now(place(1)));
    // Elsewhere at once, but for calls in a bunch.
    world.table.set_endpoint(&PEER, place(2));
    assert_eq!(world.table.greeting(&PEER, world.now + Duration::from_millis(19)), Greeting::UnderWay);
    assert_eq!(world.table.greeting(&PEER, world.now + Duration::from_millis(20)), Greeting::Now(place(2)));
    world.report.endpoint = Some(place(2));
    world.handshake();
    assert_eq!(world.table.greeting(&PEER, world.now), Greeting::Impossible);
    world.report.tx_bytes += 128;
    world.pass(1);
    assert_eq!(world.pass(15), [TunnelEvent::PeerSilent { peer: PEER }]);
    assert_eq!(
        world.table.greeting(&PEER, world.now),
        Greeting::Now(place(2)),
        "a silent peer may lose its session"
    );
}

#[test]
fn a_greeted_peer_that_does_not_answer_is_silent() {
    let mut world = World::new();
    world.table.greeted(&PEER, world.now);
    assert_eq!(world.pass(14), []);
    assert_eq!(world.pass(1), [TunnelEvent::PeerSilent { peer: PEER }]);
}
