//! What a path finder builds on: probes, datagrams that are not WireGuard's, endpoints without UDP.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;

use mesh_tunnel::{DatagramSink, TunnelEvent};

use crate::lab::{DEADLINE, End, connected, echo, eventually, introduce, two_ends, two_peers};

const RELAY: &str = "[100::7]:1";

/// What one end says to its virtual endpoints the other hears, as long as `open` holds.
fn wire(from: &Arc<End>, to: &Arc<End>, open: &Arc<AtomicBool>) {
    let (to, open) = (Arc::downgrade(to), open.clone());
    let sink: DatagramSink = Arc::new(move |datagram, address| {
        if open.load(Ordering::SeqCst)
            && let Some(to) = to.upgrade()
        {
            assert!(to.tunnel.receive_virtual(datagram, address));
        }
    });
    assert!(from.tunnel.set_virtual_sink(Some(sink)));
}

/// Two ends that hear each other through the relay; each believes the other to be at `endpoint`.
fn relayed(endpoint: impl Fn(&End) -> SocketAddr) -> (Arc<End>, Arc<End>, Arc<AtomicBool>) {
    let (a, b) = two_ends();
    let (a, b, open) = (Arc::new(a), Arc::new(b), Arc::new(AtomicBool::new(true)));
    wire(&a, &b, &open);
    wire(&b, &a, &open);
    introduce(&a, &b, endpoint(&b));
    (a, b, open)
}

fn expect_answer(end: &End, wanted: SocketAddr) {
    end.expect_event(|event| matches!(event, TunnelEvent::PathAnswered { from, .. } if *from == wanted));
}

netns_tests! {
    fn foreign_datagrams_come_and_go_through_the_tunnels_own_port() {
        let (a, b) = connected();
        let (heard, hearing) = channel();
        let sink: DatagramSink = Arc::new(move |datagram, from| {
            heard.send((datagram.to_vec(), from)).unwrap();
        });
        // A STUN request begins with 0x0001, its answer with 0x0101; a relay may send anything else.
        let stun = [&[1, 1, 0, 12, 0x21, 0x12, 0xa4, 0x42][..], &[7; 24]].concat();
        a.tunnel.send_raw(&stun, b.endpoint4()).unwrap();
        eventually("nobody wants it", || (b.tunnel.counters().rx_invalid == 1).then_some(()));
        assert!(b.tunnel.set_foreign_sink(Some(sink)));
        for datagram in [stun.as_slice(), b"x", &[0; 1200], &[4, 0, 0, 1, 9, 9]] {
            a.tunnel.send_raw(datagram, b.endpoint4()).unwrap();
            assert_eq!(hearing.recv_timeout(DEADLINE).unwrap(), (datagram.to_vec(), a.endpoint4()));
        }
        // What begins as WireGuard's is judged by the tunnel alone, as are sessions.
        a.tunnel.send_raw(&[4, 0, 0, 0, 1, 2, 3], b.endpoint4()).unwrap();
        eventually("judged", || (b.tunnel.counters().rx_invalid == 2).then_some(()));
        echo(&a.inner_udp(), &b.inner_udp(), b"session");
        assert!(hearing.try_recv().is_err());
        assert_eq!(b.tunnel.counters().rx_foreign, 4);
        b.tunnel.set_foreign_sink(None);
        b.tunnel.close();
        assert!(b.tunnel.send_raw(&stun, a.endpoint4()).is_err());
    }

    fn a_probe_moves_the_endpoint_only_when_it_is_answered() {
        let (a, b) = two_peers();
        let nowhere: SocketAddr = (a.outer4, 9).into();
        a.tunnel.set_endpoint(&b.key(), nowhere);
        assert!(!a.tunnel.probe(&b.key(), &["0.0.0.0:1".parse().unwrap()]));
        assert!(!a.tunnel.probe(&a.key(), &[b.endpoint4()]));
        assert!(a.tunnel.probe(&b.key(), &[nowhere]));
        eventually("sent", || (a.stats(&b).tx_bytes >= 148).then_some(()));
        assert_eq!(a.stats(&b).endpoint, Some(nowhere));
        // One initiation to all: whoever answers first it is, and the others are not tried again.
        assert!(a.tunnel.probe(&b.key(), &[nowhere, b.endpoint6(), (a.outer4, 10).into()]));
        expect_answer(&a, b.endpoint6());
        assert_eq!(a.stats(&b).endpoint, Some(b.endpoint6()));
        b.expect_event(|event| matches!(event, TunnelEvent::HandshakeDone { .. }));
        assert_eq!(b.stats(&a).endpoint, Some(a.endpoint6()));
        // With a session in use, too; it stays in use.
        assert!(a.tunnel.probe(&b.key(), &[b.endpoint4()]));
        expect_answer(&a, b.endpoint4());
        echo(&a.inner_udp(), &b.inner_udp(), b"session");
        assert_eq!(b.stats(&a).endpoint, Some(a.endpoint4()));
    }

    fn a_peer_may_be_behind_a_virtual_endpoint() {
        let (a, b, _open) = relayed(|_| RELAY.parse().unwrap());
        a.namespace.ping(b.inner4);
        crate::basic::tcp_transfer(&b.namespace, &a.namespace, b.inner6, 1 << 20);
        assert_eq!(b.stats(&a).endpoint, Some(RELAY.parse().unwrap()));
        assert_eq!(a.stats(&b).endpoint, Some(RELAY.parse().unwrap()));
        // Only virtual addresses may be claimed by a caller.
        assert!(!a.tunnel.receive_virtual(&[0; 40], b.endpoint4()));
        assert_eq!(a.tunnel.counters().rx_virtual_dropped, 1);
    }

    fn a_direct_path_takes_over_at_once_and_the_relay_only_when_it_is_dead() {
        let (a, b, open) = relayed(|_| RELAY.parse().unwrap());
        echo(&a.inner_udp(), &b.inner_udp(), b"by relay");
        assert!(a.tunnel.probe(&b.key(), &[b.endpoint4()]));
        expect_answer(&a, b.endpoint4());
        echo(&a.inner_udp(), &b.inner_udp(), b"direct");
        assert_eq!((a.stats(&b).endpoint, b.stats(&a).endpoint), (Some(b.endpoint4()), Some(a.endpoint4())));
        // a goes back to the relay: b follows, but not while the direct path was heard a moment ago.
        a.tunnel.set_endpoint(&b.key(), RELAY.parse().unwrap());
        let (from, to) = (a.inner_udp(), b.inner_udp());
        from.send_to(b"by relay again", to.local_addr().unwrap()).unwrap();
        to.recv_from(&mut [0; 64]).unwrap();
        assert_eq!(b.stats(&a).endpoint, Some(a.endpoint4()));
        eventually("b follows", || {
            from.send_to(b"by relay again", to.local_addr().unwrap()).unwrap();
            (b.stats(&a).endpoint == Some(RELAY.parse().unwrap())).then_some(())
        });
        open.store(false, Ordering::SeqCst);
        assert!(a.tunnel.set_virtual_sink(None));
        from.send_to(b"nobody takes it", to.local_addr().unwrap()).unwrap();
        eventually("counted", || (a.tunnel.counters().tx_socket_errors > 0).then_some(()));
    }
}
