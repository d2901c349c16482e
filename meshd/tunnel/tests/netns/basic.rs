//! Packets get through, whole and in order, over both families.

use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use mesh_tunnel::{PresharedKey, TunnelEvent};

use crate::lab::{DEADLINE, End, Namespace, connected, echo, eventually, two_ends, two_peers};

netns_tests! {
    fn ping_inner_ipv4_and_ipv6_over_outer_ipv4() {
        let (a, b) = two_peers();
        a.namespace.ping(b.inner4);
        a.namespace.ping(b.inner6);
        b.namespace.ping(a.inner4);
        b.namespace.ping(a.inner6);
        assert_eq!(b.stats(&a).endpoint, Some(a.endpoint4()));
        assert!(a.stats(&b).last_handshake.is_some_and(|age| age < DEADLINE));
        assert!(a.stats(&b).rtt.is_some());
    }

    fn ping_inner_ipv4_and_ipv6_over_outer_ipv6() {
        let (a, b) = two_ends();
        b.tunnel.set_peer(a.as_peer(None)).unwrap();
        a.tunnel.set_peer(b.as_peer(Some(b.endpoint6()))).unwrap();
        a.namespace.ping(b.inner4);
        a.namespace.ping(b.inner6);
        assert_eq!(b.stats(&a).endpoint, Some(a.endpoint6()));
    }

    fn a_host_without_ipv6_still_has_a_tunnel() {
        let (a, b) = crate::lab::two_namespaces();
        for namespace in [&a, &b] {
            namespace.run(|| std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1")).unwrap();
        }
        let open = |namespace: &Namespace, number: u8| {
            let tunnel = namespace.run(|| crate::lab::open_as(crate::lab::key(number), mesh_tunnel::Offloads::ALL));
            namespace.ip(&format!("addr add 10.214.0.{number}/24 dev wg0"));
            tunnel
        };
        let (ta, tb) = (open(&a, 1), open(&b, 2));
        let peer = |key, address: &str, endpoint| mesh_tunnel::PeerConfig {
            public_key: key,
            preshared_key: None,
            endpoint,
            allowed_ips: vec![address.parse().unwrap()],
            persistent_keepalive: None,
        };
        tb.set_peer(peer(ta.public_key(), "10.214.0.1/32", None)).unwrap();
        let endpoint = (IpAddr::from([10, 213, 0, 2]), tb.listen_port()).into();
        ta.set_peer(peer(tb.public_key(), "10.214.0.2/32", Some(endpoint))).unwrap();
        a.ping([10, 214, 0, 2].into());
    }

    fn preshared_keys_must_agree() {
        let (a, b) = two_ends();
        let with = |end: &End, endpoint, byte| mesh_tunnel::PeerConfig {
            preshared_key: Some(PresharedKey::from_bytes([byte; 32])),
            ..end.as_peer(endpoint)
        };
        b.tunnel.set_peer(with(&a, None, 1)).unwrap();
        a.tunnel.set_peer(with(&b, Some(b.endpoint4()), 2)).unwrap();
        a.tunnel.initiate_handshake(&b.key());
        // The answer under the wrong key comes back and is refused: nothing is in use on either side.
        eventually("answer under the wrong key", || (b.stats(&a).tx_bytes >= 92).then_some(()));
        assert!(!a.stats(&b).has_session);
        a.tunnel.set_peer(with(&b, Some(b.endpoint4()), 1)).unwrap();
        a.tunnel.initiate_handshake(&b.key());
        a.expect_event(|event| matches!(event, TunnelEvent::HandshakeDone { .. }));
        a.namespace.ping(b.inner4);
    }

    fn who_has_no_peer_or_endpoint_is_unreachable_at_once() {
        let (a, b) = two_ends();
        // Known, but nobody knows where it is.
        a.tunnel.set_peer(b.as_peer(None)).unwrap();
        let stranger4 = "10.214.0.77".parse().unwrap();
        let stranger6 = "fd14::77".parse().unwrap();
        for address in [stranger4, stranger6, b.inner4, b.inner6] {
            let result = a.namespace.run(|| TcpStream::connect_timeout(&(address, 9).into(), DEADLINE));
            assert_eq!(result.unwrap_err().kind(), std::io::ErrorKind::HostUnreachable, "{address}");
        }
        let counters = a.tunnel.counters();
        assert_eq!((counters.tx_no_peer, counters.tx_no_endpoint), (2, 2), "{counters:?}");
    }

    fn tcp_carries_megabytes_unchanged_both_ways() {
        let (a, b) = connected();
        for (server, client, address) in [(&b, &a, b.inner4), (&a, &b, a.inner6)] {
            tcp_transfer(&server.namespace, &client.namespace, address, 8 << 20);
        }
        for end in [&a, &b] {
            let counters = end.tunnel.counters();
            assert_eq!((counters.rx_invalid, counters.rx_interface_errors), (0, 0), "{counters:?}");
        }
    }

    fn datagrams_of_every_size_come_back_unchanged() {
        let (a, b) = connected();
        let (from, to) = (a.inner_udp(), b.inner_udp());
        for length in (0..64).chain((64..1500).step_by(61)).chain([1391, 1392, 1393, 1400, 1452, 1472]) {
            let text: Vec<u8> = (0..length).map(|n| (n * 7 + length) as u8).collect();
            echo(&from, &to, &text);
        }
    }

    fn packets_that_waited_for_the_handshake_arrive_in_order() {
        let (a, b) = two_ends();
        a.tunnel.set_peer(b.as_peer(Some(b.endpoint4()))).unwrap();
        let (from, to) = (a.inner_udp(), b.inner_udp());
        for number in 0..100_u32 {
            from.send_to(&number.to_le_bytes(), to.local_addr().unwrap()).unwrap();
        }
        eventually("b has seen and refused the initiation", || {
            (b.tunnel.counters().rx_invalid > 0).then_some(())
        });
        b.tunnel.set_peer(a.as_peer(None)).unwrap();
        a.tunnel.initiate_handshake(&b.key());
        for number in 0..100_u32 {
            let mut bytes = [0; 4];
            to.recv_from(&mut bytes).unwrap();
            assert_eq!(u32::from_le_bytes(bytes), number);
        }
    }

    fn packets_that_waited_at_the_responder_arrive_in_order() {
        let (a, b) = two_ends();
        // b wants to send first, but a does not know it; then a's handshake is the one that succeeds.
        b.tunnel.set_peer(a.as_peer(Some(a.endpoint4()))).unwrap();
        let (from, to) = (b.inner_udp(), a.inner_udp());
        for number in 0..100_u32 {
            from.send_to(&number.to_le_bytes(), to.local_addr().unwrap()).unwrap();
        }
        eventually("a has seen and refused the initiation", || {
            (a.tunnel.counters().rx_invalid > 0).then_some(())
        });
        a.tunnel.set_peer(b.as_peer(Some(b.endpoint4()))).unwrap();
        a.tunnel.initiate_handshake(&b.key());
        for number in 0..100_u32 {
            let mut bytes = [0; 4];
            to.recv_from(&mut bytes).unwrap();
            assert_eq!(u32::from_le_bytes(bytes), number);
        }
    }

    fn a_keepalive_brings_the_session_up_without_traffic() {
        let (a, b) = two_ends();
        b.tunnel.set_peer(a.as_peer(None)).unwrap();
        let keepalive = Some(Duration::from_secs(1));
        let peer = mesh_tunnel::PeerConfig { persistent_keepalive: keepalive, ..b.as_peer(Some(b.endpoint4())) };
        a.tunnel.set_peer(peer).unwrap();
        b.expect_event(|event| matches!(event, TunnelEvent::HandshakeDone { .. }));
        let before = b.stats(&a).rx_bytes;
        eventually("two keepalives of 32 bytes", || (b.stats(&a).rx_bytes >= before + 64).then_some(()));
    }
}

/// Sends `bytes` of a pattern from `client` to `server` and compares what arrives.
pub(crate) fn tcp_transfer(server: &Namespace, client: &Namespace, address: IpAddr, bytes: usize) {
    let listener = server.run(|| TcpListener::bind((address, 0)).unwrap());
    let to = listener.local_addr().unwrap();
    let pattern: Vec<u8> = (0..bytes as u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    thread::scope(|scope| {
        let receiver = scope.spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(DEADLINE)).unwrap();
            let mut all = Vec::new();
            stream.read_to_end(&mut all).unwrap();
            all
        });
        let mut stream = client.run(|| TcpStream::connect_timeout(&to, DEADLINE)).unwrap();
        stream.write_all(&pattern).unwrap();
        drop(stream);
        assert!(receiver.join().unwrap() == pattern, "bytes differ");
    });
}
