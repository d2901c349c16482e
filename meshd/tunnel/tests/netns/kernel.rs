//! The kernel's WireGuard against the userspace engine. Needs the kernel's module: `make test-kernel` runs
//! this in a virtual machine with Debian's kernel.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use mesh_tunnel::{
    Backend, BackendKind, PeerConfig, PresharedKey, PublicKey, RecvTimeoutError, TunnelBuilder, TunnelError,
    TunnelEvent,
};

use crate::basic::tcp_transfer;
use crate::lab::{DEADLINE, End, MTU, eventually, introduce, key, two_namespaces};
use crate::rotation::{listen, next_peer};

const CHILD: &str = "MESH_TUNNEL_CHILD";

fn builder(interface: &str, private: u8) -> TunnelBuilder {
    TunnelBuilder::new(interface, key(private)).mtu(MTU).backend(Backend::Kernel)
}

/// `a` on the kernel's engine, `b` on ours.
fn kernel_and_userspace() -> (End, End) {
    let (a, b) = two_namespaces();
    let ends = (End::on(a, 1, Backend::Kernel), End::on(b, 2, Backend::Userspace));
    assert_eq!(ends.0.tunnel.backend().kind, BackendKind::Kernel);
    assert_eq!(ends.1.tunnel.backend().kind, BackendKind::Userspace);
    ends
}

fn connected() -> (End, End) {
    let (a, b) = kernel_and_userspace();
    introduce(&a, &b, b.endpoint4());
    a.namespace.ping(b.inner4);
    for end in [&a, &b] {
        end.expect_event(|event| matches!(event, TunnelEvent::HandshakeDone { .. }));
    }
    (a, b)
}

fn replies(from: &End, to: IpAddr) -> bool {
    let mut ping = Command::new("ping");
    ping.args(["-c", "2", "-i", "0.2", "-W", "2", &to.to_string()])
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    from.namespace.run(|| ping.status()).unwrap().success()
}

/// The longest that a change of keys may interrupt.
const GAP_MAX: Duration = Duration::from_secs(1);

/// The longest pauses in a datagram each millisecond, from `a` to `b` and back, while `change` goes on.
fn traffic_during(a: &End, b: &End, change: impl FnOnce()) -> [Duration; 2] {
    let (there, back) = ((a.inner_udp(), b.inner_udp()), (b.inner_udp(), a.inner_udp()));
    let (stop, quiet) = (AtomicBool::new(false), AtomicBool::new(false));
    thread::scope(|scope| {
        let talkers = [&there, &back].map(|(from, to)| scope.spawn(|| talk_on(from, to, &stop)));
        let listeners = [&there.1, &back.1].map(|at| scope.spawn(|| listen(at, &quiet)));
        thread::park_timeout(Duration::from_millis(200));
        change();
        thread::park_timeout(Duration::from_millis(500));
        stop.store(true, Ordering::Relaxed);
        let sent = talkers.map(|talker| talker.join().unwrap());
        quiet.store(true, Ordering::Relaxed);
        let gaps = listeners.map(|listener| listener.join().unwrap().1);
        println!("longest pauses {gaps:?} in {sent:?} datagrams");
        gaps
    })
}

/// Sends a number every millisecond until told to stop; how many the interface took. The kernel refuses (ENOKEY)
/// while it has the peers anew.
fn talk_on(from: &UdpSocket, to: &UdpSocket, stop: &AtomicBool) -> u64 {
    let mut sent = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        sent += u64::from(from.send_to(&sent.to_le_bytes(), to.local_addr().unwrap()).is_ok());
        thread::park_timeout(Duration::from_millis(1));
    }
    sent
}

/// What `wg show wg0 WHAT` prints for one peer.
fn shown(end: &End, what: &str, peer: &PublicKey) -> String {
    let output = end.namespace.run_program("wg", &["show", "wg0", what]);
    let text = String::from_utf8(output.stdout).unwrap();
    let prefix = format!("{peer}\t");
    text.lines().find_map(|line| line.strip_prefix(&prefix)).map(str::to_owned).unwrap_or_default()
}

fn words(text: &str) -> BTreeSet<&str> {
    text.split_whitespace().filter(|word| *word != "(none)").collect()
}

netns_tests! {
    #[ignore = "needs the kernel's module: make test-kernel"]
    fn both_families_inside_and_outside() {
        for (outer6, kernel_begins) in [(false, true), (true, false)] {
            let (a, b) = kernel_and_userspace();
            let (first, second) = if kernel_begins { (&a, &b) } else { (&b, &a) };
            let endpoint = if outer6 { second.endpoint6() } else { second.endpoint4() };
            introduce(first, second, endpoint);
            for (from, to) in [(first, second), (second, first)] {
                from.namespace.ping(to.inner4);
                from.namespace.ping(to.inner6);
            }
            tcp_transfer(&b.namespace, &a.namespace, b.inner4, 2 << 20);
            tcp_transfer(&a.namespace, &b.namespace, a.inner6, 2 << 20);
            let (ours, theirs) = (a.stats(&b), b.stats(&a));
            assert_eq!(ours.endpoint, Some(if outer6 { b.endpoint6() } else { b.endpoint4() }));
            assert!(ours.has_session && ours.last_handshake.is_some_and(|age| age < DEADLINE), "{ours:?}");
            // The same datagrams, counted at both ends.
            assert!(ours.rx_bytes > 2 << 20 && ours.tx_bytes > 2 << 20, "{ours:?}");
            assert!(theirs.rx_bytes.abs_diff(ours.tx_bytes) < 100_000, "{ours:?} {theirs:?}");
            assert_eq!(b.tunnel.counters().rx_invalid, 0);
            a.tunnel.close();
            b.tunnel.close();
            for name in ["a", "b"] {
                crate::lab::run("ip", &["netns", "del", name]);
            }
        }
    }

    #[ignore = "needs the kernel's module: make test-kernel"]
    fn a_removed_peer_is_cut_off_and_can_come_back() {
        let (a, b) = connected();
        assert!(a.tunnel.remove_peer(&b.key()));
        assert!(!a.tunnel.remove_peer(&b.key()));
        assert!(a.tunnel.peers().is_empty());
        assert!(!replies(&b, a.inner4) && !replies(&a, b.inner4));
        a.tunnel.set_peer(b.as_peer(Some(b.endpoint4()))).unwrap();
        a.namespace.ping(b.inner4);
    }

    #[ignore = "needs the kernel's module: make test-kernel"]
    fn the_userspace_end_rekeys_and_the_kernel_tells() {
        let (a, b) = connected();
        for _ in 0..3 {
            assert!(b.tunnel.initiate_handshake(&a.key()));
            b.expect_event(|event| matches!(event, TunnelEvent::HandshakeDone { .. }));
            b.namespace.ping(a.inner4);
            a.expect_event(|event| matches!(event, TunnelEvent::HandshakeDone { .. }));
        }
        // With a session in use the kernel has no way to begin another beside it, and says so.
        assert!(!a.tunnel.initiate_handshake(&b.key()));
        a.namespace.ping(b.inner4);
    }

    #[ignore = "needs the kernel's module: make test-kernel"]
    fn a_peer_that_moves_is_followed() {
        let (a, b) = connected();
        b.namespace.ip("addr del 10.213.0.2/24 dev veth0");
        b.namespace.ip("addr add 10.213.0.77/24 dev veth0");
        assert!(eventually("an answer from the new address", || replies(&b, a.inner4).then_some(true)));
        let moved: SocketAddr = (IpAddr::from([10, 213, 0, 77]), b.tunnel.listen_port()).into();
        let event = a.expect_event(|event| matches!(event, TunnelEvent::EndpointChanged { .. }));
        assert_eq!(event, TunnelEvent::EndpointChanged { peer: b.key(), from: moved });
        assert_eq!(a.stats(&b).endpoint, Some(moved));
        assert_eq!(shown(&a, "endpoints", &b.key()), moved.to_string());
        // An update that does not name another endpoint keeps this one.
        a.tunnel.set_peer(b.as_peer(None)).unwrap();
        assert_eq!(shown(&a, "endpoints", &b.key()), moved.to_string());
        a.namespace.ping(b.inner4);
        let elsewhere = SocketAddr::from(([10, 213, 0, 99], 9));
        assert!(a.tunnel.set_endpoint(&b.key(), elsewhere));
        assert_eq!(shown(&a, "endpoints", &b.key()), elsewhere.to_string());
        assert!(!a.tunnel.set_endpoint(&key(77).public(), elsewhere));
        assert!(!a.tunnel.set_endpoint(&b.key(), ([0, 0, 0, 0], 9).into()));
    }

    #[ignore = "needs the kernel's module: make test-kernel"]
    fn prefixes_are_changed_one_by_one_and_never_taken() {
        let (a, b) = connected();
        let with = |prefixes: &[&str]| {
            let allowed_ips = prefixes.iter().map(|prefix| prefix.parse().unwrap()).collect();
            PeerConfig { allowed_ips, ..b.as_peer(None) }
        };
        for prefixes in [
            &["10.214.0.2/32", "10.9.0.0/16", "fd14::2/128"][..],
            &["10.214.0.2/32", "fd14::2/128"],
            &["10.214.0.2/32", "10.8.0.0/16", "10.7.0.0/16"],
            &[],
            &["10.214.0.2/32", "fd14::2/128"],
        ] {
            a.tunnel.set_peer(with(prefixes)).unwrap();
            let text = shown(&a, "allowed-ips", &b.key());
            assert_eq!(words(&text), prefixes.iter().copied().collect(), "{text}");
            assert!(a.stats(&b).has_session);
        }
        a.namespace.ping(b.inner6);
        // Nobody else is left of what took them away.
        let peers = a.namespace.run_program("wg", &["show", "wg0", "peers"]);
        assert_eq!(String::from_utf8(peers.stdout).unwrap().trim(), b.key().to_string());
        let thief = PeerConfig { public_key: key(9).public(), ..with(&["10.214.0.2/32"]) };
        let refused = a.tunnel.set_peer(thief).unwrap_err();
        assert!(matches!(refused, TunnelError::AllowedIpsOverlap { owner, .. } if owner == b.key()), "{refused}");
        assert!(matches!(a.tunnel.set_peer(a.as_peer(None)), Err(TunnelError::OwnKey { .. })));
        a.namespace.ping(b.inner4);
    }

    #[ignore = "needs the kernel's module: make test-kernel"]
    fn other_keys_end_sessions_at_once() {
        let (a, b) = connected();
        let before = a.stats(&b);
        let psk = || Some(PresharedKey::from_bytes([3; 32]));
        a.tunnel.set_peer(PeerConfig { preshared_key: psk(), ..b.as_peer(None) }).unwrap();
        assert!(!a.stats(&b).has_session);
        assert!(a.stats(&b).rx_bytes >= before.rx_bytes, "counters go on");
        assert!(!replies(&a, b.inner4));
        b.tunnel.set_peer(PeerConfig { preshared_key: psk(), ..a.as_peer(Some(a.endpoint4())) }).unwrap();
        b.tunnel.initiate_handshake(&a.key());
        assert!(eventually("a session with the preshared key", || replies(&b, a.inner4).then_some(true)));
        let old = a.key();
        a.tunnel.rotate_key(key(5)).unwrap();
        assert_eq!(a.key(), key(5).public());
        assert!(!replies(&b, a.inner4), "the old key is dead");
        assert_eq!(a.tunnel.peers().len(), 1);
        assert!(matches!(a.tunnel.rotate_key(key(2)), Err(TunnelError::OwnKey { .. })));
        b.tunnel.remove_peer(&old);
        b.tunnel.set_peer(PeerConfig { preshared_key: psk(), ..a.as_peer(Some(a.endpoint4())) }).unwrap();
        assert!(eventually("a session with the new key", || replies(&b, a.inner4).then_some(true)));
    }

    #[ignore = "needs the kernel's module: make test-kernel"]
    fn a_peer_changes_its_key_and_the_kernel_follows() {
        let (a, b) = connected();
        let (old, new) = (b.key(), key(12).public());
        let gaps = traffic_during(&a, &b, || {
            b.tunnel.add_next_key(key(12)).unwrap();
            a.tunnel.set_peer(next_peer(&b, 12)).unwrap();
            a.expect_event(|event| *event == TunnelEvent::HandshakeDone { peer: new });
            a.tunnel.hand_over(&old, &new).unwrap();
            eventually("the other side follows", || b.tunnel.peers_of_next_key()[0].rx_bytes.gt(&1000).then_some(()));
            b.tunnel.switch_to_next_key();
            assert!(a.tunnel.remove_peer(&old));
        });
        assert!(gaps.iter().all(|gap| *gap <= GAP_MAX), "{gaps:?}");
        assert_eq!(a.tunnel.peer(&new).unwrap().allowed_ips.len(), 2);
        assert!(matches!(a.tunnel.hand_over(&old, &new), Err(TunnelError::UnknownPeer { .. })));
    }

    #[ignore = "needs the kernel's module: make test-kernel"]
    fn the_kernel_changes_its_key_and_the_peer_follows() {
        let (a, b) = connected();
        let (old, new) = (a.key(), key(12).public());
        b.tunnel.set_peer(next_peer(&a, 12)).unwrap();
        let gaps = traffic_during(&a, &b, || {
            a.tunnel.rotate_key(key(12)).unwrap();
            b.expect_event(|event| *event == TunnelEvent::HandshakeDone { peer: new });
            b.tunnel.hand_over(&old, &new).unwrap();
            assert!(b.tunnel.remove_peer(&old));
        });
        assert!(gaps.iter().all(|gap| *gap <= GAP_MAX), "{gaps:?}");
        b.namespace.ping(a.inner6);
    }

    #[ignore = "needs the kernel's module: make test-kernel"]
    fn silence_is_told_and_a_greeting_finds_the_peer_again() {
        let (a, b) = connected();
        assert!(a.tunnel.set_endpoint(&b.key(), ([10, 213, 0, 66], 9).into()));
        assert!(!replies(&a, b.inner4));
        a.expect_event(|event| matches!(event, TunnelEvent::PeerSilent { .. }));
        assert!(a.tunnel.set_endpoint(&b.key(), b.endpoint4()));
        assert!(a.tunnel.initiate_handshake(&b.key()), "a silent peer is greeted although there was a session");
        a.expect_event(|event| matches!(event, TunnelEvent::HandshakeDone { .. }));
        a.namespace.ping(b.inner4);
        assert!(!a.tunnel.initiate_handshake(&key(77).public()));
    }

    #[ignore = "needs the kernel's module: make test-kernel"]
    fn a_keepalive_greets_at_once_and_a_request_without_one_too() {
        let (a, b) = kernel_and_userspace();
        b.tunnel.set_peer(a.as_peer(None)).unwrap();
        let keepalive = Some(Duration::from_secs(25));
        a.tunnel.set_peer(PeerConfig { persistent_keepalive: keepalive, ..b.as_peer(Some(b.endpoint4())) }).unwrap();
        b.expect_event(|event| matches!(event, TunnelEvent::HandshakeDone { .. }));
        a.tunnel.remove_peer(&b.key());
        a.tunnel.set_peer(b.as_peer(Some(b.endpoint4()))).unwrap();
        while b.events.try_recv().is_some() {}
        assert!(a.tunnel.initiate_handshake(&b.key()));
        b.expect_event(|event| matches!(event, TunnelEvent::HandshakeDone { .. }));
        assert_eq!(shown(&a, "persistent-keepalive", &b.key()), "off");
    }

    #[ignore = "needs the kernel's module: make test-kernel"]
    fn thousands_of_peers_are_listed_in_full() {
        const PEERS: u16 = 2000;
        let (a, b) = connected();
        let start = Instant::now();
        for number in 0..PEERS {
            let mut bytes = [7; 32];
            // Not the ends, which clamping changes.
            bytes[8..10].copy_from_slice(&number.to_be_bytes());
            let [high, low] = number.to_be_bytes();
            let many = (0..20_u8).map(|n| format!("fd77:{number:x}::{n:x}/128").parse().unwrap());
            let peer = PeerConfig {
                public_key: mesh_tunnel::PrivateKey::from_bytes(bytes).public(),
                preshared_key: None,
                endpoint: Some(([10, 213, 9, 9], number + 1).into()),
                allowed_ips: many.chain([format!("10.77.{high}.{low}/32").parse().unwrap()]).collect(),
                persistent_keepalive: None,
            };
            a.tunnel.set_peer(peer).unwrap();
        }
        let set = start.elapsed();
        let start = Instant::now();
        let listed = a.tunnel.peers();
        println!("{PEERS} peers set in {set:?}, listed in {:?}", start.elapsed());
        assert_eq!(listed.len(), usize::from(PEERS) + 1);
        let output = a.namespace.run_program("wg", &["show", "wg0", "endpoints"]);
        assert_eq!(String::from_utf8(output.stdout).unwrap().lines().count(), usize::from(PEERS) + 1);
        a.namespace.ping(b.inner4);
        assert!(a.stats(&b).rx_bytes > 0);
    }

    #[ignore = "needs the kernel's module: make test-kernel"]
    fn an_interface_deleted_under_us_ends_the_tunnel_with_a_reason() {
        let (a, b) = connected();
        a.namespace.ip("link del wg0");
        let event = a.expect_event(|event| matches!(event, TunnelEvent::Stopped { .. }));
        assert_eq!(event, TunnelEvent::Stopped { error: Some("interface wg0 is gone".into()) });
        assert!(matches!(a.tunnel.set_peer(b.as_peer(None)), Err(TunnelError::Closed)));
        a.tunnel.close();
        assert_eq!(a.events.recv_timeout(Duration::ZERO), Err(RecvTimeoutError::Closed));
    }

    #[ignore = "needs the kernel's module: make test-kernel"]
    fn the_interface_is_up_with_port_mtu_and_mark_and_gone_at_the_end() {
        let (a, _b) = two_namespaces();
        let socket = a.udp("0.0.0.0:0".parse().unwrap());
        let port = socket.local_addr().unwrap().port();
        let taken = builder("wg0", 1).listen_port(port);
        let error = a.run(|| taken.open().map(|t| t.backend())).unwrap_err();
        assert!(matches!(error, TunnelError::PortInUse { port: p } if p == port), "{error}");
        drop(socket);
        let marked = builder("mesh%d", 1).listen_port(port).mtu(1280).fwmark(0x77);
        let tunnel = a.run(|| marked.open()).unwrap();
        assert_eq!((tunnel.name(), tunnel.listen_port()), ("mesh0", port));
        let link = a.ip("-d link show mesh0");
        assert!(link.contains(",UP") && link.contains("mtu 1280") && link.contains("wireguard"), "{link}");
        let wg = String::from_utf8(a.run_program("wg", &["show", "mesh0"]).stdout).unwrap();
        assert!(wg.contains("fwmark: 0x77") && wg.contains(&tunnel.public_key().to_string()), "{wg}");
        tunnel.set_fwmark(Some(0x99)).unwrap();
        let other = a.run(|| tunnel.set_listen_port(0)).unwrap();
        assert_eq!((tunnel.fwmark(), tunnel.listen_port()), (Some(0x99), other));
        let wg = String::from_utf8(a.run_program("wg", &["show", "mesh0"]).stdout).unwrap();
        assert!(wg.contains("fwmark: 0x99") && wg.contains(&format!("listening port: {other}")), "{wg}");
        let socket = a.udp("0.0.0.0:0".parse().unwrap());
        let taken = socket.local_addr().unwrap().port();
        assert!(matches!(tunnel.set_listen_port(taken), Err(TunnelError::PortInUse { port }) if port == taken));
        assert_eq!(tunnel.listen_port(), other);
        tunnel.close();
        tunnel.close();
        assert!(!a.ip("link show").contains("mesh0"));
    }

    #[ignore = "needs the kernel's module: make test-kernel"]
    fn what_nobody_may_send_is_counted() {
        let (a, b) = connected();
        // `b` sends from an address that `a` does not give it.
        b.namespace.ip("addr add 10.214.0.200/32 dev wg0");
        let spoof = b.namespace.udp("10.214.0.200:0".parse().unwrap());
        eventually("the count", || {
            spoof.send_to(b"spoof", (a.inner4, 9)).unwrap();
            (a.tunnel.counters().rx_wrong_source > 0).then_some(())
        });
        let before = a.tunnel.counters().tx_no_peer;
        let stranger = a.inner_udp();
        let _ = stranger.send_to(b"x", "10.214.0.99:9");
        eventually("the count", || (a.tunnel.counters().tx_no_peer > before).then_some(()));
    }
}

/// The other process runs this test as well, and in it does no more than to hold the interface.
#[test]
#[ignore = "needs the kernel's module: make test-kernel"]
fn what_a_killed_process_left_is_taken_over_and_what_lives_is_not() {
    if std::env::var_os(CHILD).is_some() {
        let _tunnel = builder("wg0", 1).open().unwrap();
        thread::sleep(DEADLINE);
        return;
    }
    let path = concat!(module_path!(), "::what_a_killed_process_left_is_taken_over_and_what_lives_is_not");
    crate::lab::in_namespaces(path, crate::lab::WATCHDOG, || {
        let (a, _b) = two_namespaces();
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "kernel::what_a_killed_process_left_is_taken_over_and_what_lives_is_not"]);
        child.args(["--ignored", "--nocapture"]).env(CHILD, "1").stdout(Stdio::null());
        let mut child = a.run(|| child.spawn()).unwrap();
        let alias = || a.ip("link show").contains("alias mesh-tunnel");
        eventually("the other process' interface", || alias().then_some(()));
        let open = |backend| a.run(|| builder("wg0", 2).backend(backend).open());
        for backend in [Backend::Kernel, Backend::Userspace] {
            let error = open(backend).map(|tunnel| tunnel.backend()).unwrap_err();
            assert!(matches!(error, TunnelError::InterfaceBusy { .. }), "{error}");
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(alias(), "the kernel keeps it");
        for backend in [Backend::Userspace, Backend::Kernel] {
            assert_eq!(open(backend).unwrap().public_key(), key(2).public());
        }
        assert!(!a.ip("link show").contains("wg0"));
    });
}

/// A request each second across the age at which the session is renewed (120 s), and each is answered.
fn across_a_rekey_by_the_clock(path: &str, kernel_begins: bool) {
    crate::lab::in_namespaces(path, Duration::from_secs(300), || {
        let (a, b) = kernel_and_userspace();
        let (first, second) = if kernel_begins { (&a, &b) } else { (&b, &a) };
        introduce(first, second, second.endpoint4());
        let to = second.inner4.to_string();
        first.namespace.run_program("ping", &["-c", "1", "-W", "10", &to]);
        let ping = first.namespace.run_program("ping", &["-q", "-c", "135", "-i", "1", "-W", "3", &to]);
        let text = String::from_utf8(ping.stdout).unwrap();
        assert!(text.contains("135 received"), "{text}");
        for (end, other) in [(&a, &b), (&b, &a)] {
            let age = end.stats(other).last_handshake.unwrap();
            assert!(age < Duration::from_secs(60), "{age:?}: not renewed");
        }
    });
}

#[test]
#[ignore = "needs the kernel's module, and two minutes: make test-kernel"]
fn the_kernel_rekeys_by_the_clock() {
    across_a_rekey_by_the_clock(concat!(module_path!(), "::the_kernel_rekeys_by_the_clock"), true);
}

#[test]
#[ignore = "needs the kernel's module, and two minutes: make test-kernel"]
fn userspace_rekeys_by_the_clock_against_the_kernel() {
    let path = concat!(module_path!(), "::userspace_rekeys_by_the_clock_against_the_kernel");
    across_a_rekey_by_the_clock(path, false);
}
