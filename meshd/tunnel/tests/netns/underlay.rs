//! An underlay that fails: what the sockets refuse is counted, and traffic goes on once they take it again.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use mesh_tunnel::{PeerConfig, PrivateKey, TunnelEvent};

use crate::basic::tcp_transfer;
use crate::lab::{End, connected, echo, eventually, run};

/// Runs one `nft` command in the end's namespace.
fn nft(end: &End, command: &str) {
    end.namespace.run(|| run("nft", &[command]));
}

/// Sends from `a` to `b` until `a` has counted some more refusals of its socket.
fn refused(a: &End, b: &End, what: &str) {
    let before = a.tunnel.counters().tx_socket_errors;
    let socket = a.inner_udp();
    eventually(what, || {
        // An answer that nobody is there is no failure of this test.
        let _ = socket.send_to(b"lost", (b.inner4, 9));
        (a.tunnel.counters().tx_socket_errors >= before + 3).then_some(())
    });
}

/// Both directions work, under the session that was there before.
fn goes_on(a: &End, b: &End) {
    let (from, to) = (a.inner_udp(), b.inner_udp());
    for _ in 0..10 {
        echo(&from, &to, b"there and back");
        echo(&to, &from, b"and the other way");
    }
    tcp_transfer(&b.namespace, &a.namespace, b.inner4, 1 << 20);
    let begun_anew = |end: &End| {
        std::iter::from_fn(|| end.events.try_recv())
            .any(|event| matches!(event, TunnelEvent::HandshakeDone { .. }))
    };
    assert!(!begun_anew(a) && !begun_anew(b), "the session has outlived it");
}

netns_tests! {
    fn without_a_route_datagrams_are_refused_and_then_go_on() {
        let (a, b) = connected();
        goes_on(&a, &b);
        // ENETUNREACH.
        a.namespace.ip("route del 10.213.0.0/24 dev veth0");
        refused(&a, &b, "network is unreachable");
        a.namespace.ip("route add 10.213.0.0/24 dev veth0 src 10.213.0.1");
        goes_on(&a, &b);
        // EHOSTUNREACH at once, and EACCES: routes that say no.
        for kind in ["unreachable", "prohibit"] {
            a.namespace.ip(&format!("route add {kind} 10.213.0.2/32"));
            refused(&a, &b, kind);
            a.namespace.ip(&format!("route del {kind} 10.213.0.2/32"));
            goes_on(&a, &b);
        }
    }

    fn a_link_that_goes_down_and_up_costs_no_session() {
        let (a, b) = connected();
        a.namespace.ip("link set veth0 down");
        refused(&a, &b, "the link is down");
        a.namespace.ip("link set veth0 up");
        goes_on(&a, &b);
    }

    fn a_firewall_that_refuses_our_datagrams_is_counted() {
        let (a, b) = connected();
        // EPERM.
        nft(&a, "add table inet t; add chain inet t c { type filter hook output priority 0; }; \
            add rule inet t c oifname veth0 meta l4proto udp drop");
        refused(&a, &b, "operation not permitted");
        nft(&a, "delete table inet t");
        goes_on(&a, &b);
    }

    fn a_host_that_answers_port_unreachable_is_not_believed() {
        let (a, b) = connected();
        let port = b.tunnel.listen_port();
        nft(&b, &format!("add table inet t; add chain inet t c {{ type filter hook input priority 0; }}; \
            add counter inet t refused; \
            add rule inet t c udp dport {port} counter name refused reject with icmpx type port-unreachable"));
        let socket = a.inner_udp();
        eventually("refusals by ICMP", || {
            let _ = socket.send_to(b"lost", (b.inner4, 9));
            let listed = b.namespace.run_program("nft", &["list", "counter", "inet", "t", "refused"]);
            let text = String::from_utf8(listed.stdout).unwrap();
            let packets: u64 = text.split("packets ").nth(1)?.split(' ').next()?.parse().ok()?;
            (packets >= 20).then_some(())
        });
        assert!(!a.events.try_recv().is_some_and(|event| matches!(event, TunnelEvent::Stopped { .. })));
        nft(&b, "delete table inet t");
        goes_on(&a, &b);
    }

    fn a_link_that_is_slower_than_the_sender_loses_datagrams_and_nothing_else() {
        let (a, b) = connected();
        // The queue of the link is larger than the socket's buffer, which fills: EAGAIN.
        a.namespace.run_program("tc", &["qdisc", "add", "dev", "veth0", "root", "tbf", "rate", "2mbit", "burst",
            "16k", "limit", "64m"]);
        let before = a.tunnel.counters().tx_socket_errors;
        let socket = a.inner_udp();
        eventually("a full buffer", || {
            for _ in 0..500 {
                let _ = socket.send_to(&[7; 1300], (b.inner4, 9));
            }
            (a.tunnel.counters().tx_socket_errors > before).then_some(())
        });
        a.namespace.run_program("tc", &["qdisc", "del", "dev", "veth0", "root"]);
        // What still waits in the interface's own queue leaves no room for more, which is lost as well.
        let sink = b.inner_udp();
        sink.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        eventually("room again", || {
            socket.send_to(b"again", sink.local_addr().unwrap()).ok()?;
            sink.recv(&mut [0; 8]).ok()
        });
        goes_on(&a, &b);
    }

    fn a_stream_goes_on_while_peers_come_and_go() {
        let (a, b) = connected();
        let (to, from) = (b.inner_udp(), a.inner_udp());
        let changes = AtomicUsize::new(0);
        let done = std::sync::atomic::AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| while !done.load(Ordering::Relaxed) {
                let n = changes.fetch_add(1, Ordering::Relaxed);
                let mut bytes = [9; 32];
                bytes[8..16].copy_from_slice(&n.to_le_bytes());
                let key = PrivateKey::from_bytes(bytes).public();
                let allowed_ips = vec![format!("10.216.0.{}/32", n % 250).parse().unwrap()];
                for end in [&a, &b] {
                    end.tunnel.set_peer(PeerConfig { allowed_ips: allowed_ips.clone(), ..PeerConfig::new(key) }).unwrap();
                }
                thread::park_timeout(Duration::from_millis(5));
                assert!(a.tunnel.remove_peer(&key) && b.tunnel.remove_peer(&key));
            });
            // Until enough have come and gone, whatever the speed.
            while changes.load(Ordering::Relaxed) < 60 {
                tcp_transfer(&b.namespace, &a.namespace, b.inner4, 4 << 20);
                tcp_transfer(&a.namespace, &b.namespace, a.inner6, 4 << 20);
                for _ in 0..20 {
                    echo(&from, &to, b"and not one datagram is lost");
                }
            }
            done.store(true, Ordering::Relaxed);
        });
        for (end, other) in [(&a, &b), (&b, &a)] {
            assert_eq!(end.tunnel.peers().len(), 1);
            assert!(end.stats(other).has_session);
            let counters = end.tunnel.counters();
            let lost = (counters.rx_invalid, counters.rx_wrong_source, counters.rx_interface_errors, counters.tx_no_peer);
            assert_eq!(lost, (0, 0, 0, 0), "{counters:?}");
        }
    }
}
