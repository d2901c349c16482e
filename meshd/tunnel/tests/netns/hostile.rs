//! What strangers and bad peers send.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use boringtun::noise::{Tunn, TunnResult};
use mesh_tunnel::{PeerConfig, TunnelError, TunnelEvent};
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};

use crate::lab::{DEADLINE, End, connected, echo, eventually, key, two_peers};

/// Lets `end` own another inner address, and a socket on it.
fn socket_on(end: &End, address: &str) -> UdpSocket {
    let address: IpAddr = address.parse().unwrap();
    end.namespace.ip(&format!("addr add {address} dev wg0"));
    end.namespace.udp((address, 0).into())
}

/// The bytes of the next datagram at `socket`.
fn next(socket: &UdpSocket) -> Vec<u8> {
    let mut buffer = [0; 2048];
    let (length, _) = socket.recv_from(&mut buffer).unwrap();
    buffer[..length].to_vec()
}

netns_tests! {
    fn an_inner_source_that_is_not_the_peers_is_dropped_in_both_families() {
        let (a, b) = connected();
        let (to4, to6) = (b.inner_udp(), b.namespace.udp((b.inner6, 0).into()));
        let targets = (to4.local_addr().unwrap(), to6.local_addr().unwrap());
        socket_on(&a, "10.214.0.99").send_to(b"forged", targets.0).unwrap();
        socket_on(&a, "fd14::99").send_to(b"forged", targets.1).unwrap();
        a.inner_udp().send_to(b"honest", targets.0).unwrap();
        a.namespace.udp((a.inner6, 0).into()).send_to(b"honest", targets.1).unwrap();
        assert_eq!((next(&to4), next(&to6)), (b"honest".to_vec(), b"honest".to_vec()));
        assert_eq!(b.tunnel.counters().rx_wrong_source, 2);
    }

    fn an_outer_prefix_does_not_cover_what_another_peer_has_inside_it() {
        let (a, b) = connected();
        let wide = PeerConfig { allowed_ips: vec!["10.214.0.0/24".parse().unwrap()], ..a.as_peer(None) };
        b.tunnel.set_peer(wide).unwrap();
        let nested = PeerConfig {
            public_key: key(9).public(),
            preshared_key: None,
            endpoint: None,
            allowed_ips: vec!["10.214.0.99/32".parse().unwrap()],
            persistent_keepalive: None,
        };
        b.tunnel.set_peer(nested).unwrap();
        let to = b.inner_udp();
        socket_on(&a, "10.214.0.99").send_to(b"forged", to.local_addr().unwrap()).unwrap();
        socket_on(&a, "10.214.0.98").send_to(b"honest", to.local_addr().unwrap()).unwrap();
        assert_eq!(next(&to), b"honest");
        assert_eq!(b.tunnel.counters().rx_wrong_source, 1);
        // The update kept the session: no handshake was needed for any of this.
        assert!(!b.events.try_recv().is_some_and(|event| matches!(event, TunnelEvent::HandshakeDone { .. })));
    }

    fn allowed_ips_of_another_peer_are_refused_and_nothing_changes() {
        let (a, b) = connected();
        let thief = PeerConfig {
            public_key: key(9).public(),
            allowed_ips: vec!["10.214.1.0/24".parse().unwrap(), a.inner6.into()],
            ..a.as_peer(None)
        };
        match b.tunnel.set_peer(thief) {
            Err(TunnelError::AllowedIpsOverlap { peer, owner, prefix }) => {
                assert_eq!((peer, owner), (key(9).public(), a.key()));
                assert_eq!(prefix, ipnet::IpNet::from(a.inner6));
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(b.tunnel.peers().len(), 1);
        a.namespace.ping(b.inner6);
    }

    fn keys_that_are_no_keys_are_refused() {
        let (a, b) = connected();
        let zero = PeerConfig { public_key: mesh_tunnel::PublicKey([0; 32]), ..a.as_peer(None) };
        assert!(matches!(b.tunnel.set_peer(zero), Err(TunnelError::PeerKey { .. })));
        let own = PeerConfig { public_key: b.key(), ..a.as_peer(None) };
        assert!(matches!(b.tunnel.set_peer(own), Err(TunnelError::OwnKey { .. })));
        assert_eq!(b.tunnel.peers().len(), 1);
    }

    fn random_datagrams_of_every_size_do_not_disturb_a_session() {
        let (a, b) = connected();
        let stranger = a.namespace.udp((a.outer4, 0).into());
        let (from, to) = (a.inner_udp(), b.inner_udp());
        let mut rng = StdRng::seed_from_u64(7);
        let (mut bytes, mut sent) = (vec![0; 65_507], 0_u64);
        for round in 0..600 {
            let length = match round % 3 {
                0 => rng.random_range(0..=65_507),
                1 => *[0, 1, 3, 4, 31, 32, 64, 92, 148, 149, 1452, 65_507].get(round / 3 % 12).unwrap(),
                _ => rng.random_range(0..200),
            };
            rng.fill_bytes(&mut bytes[..length]);
            if round % 2 == 0 && length >= 4 {
                // Looks like a message at first sight.
                bytes[..4].copy_from_slice(&[rng.random_range(1..=4), 0, 0, 0]);
            }
            stranger.send_to(&bytes[..length], b.endpoint4()).unwrap();
            sent += 1;
            if round % 50 == 0 {
                echo(&from, &to, b"still here");
            }
        }
        eventually("all were judged", || (b.tunnel.counters().rx_invalid >= sent).then_some(()));
        assert_eq!(b.stats(&a).endpoint, Some(a.endpoint4()));
        echo(&from, &to, b"still here");
    }

    fn replayed_messages_are_taken_once() {
        let (a, b) = two_peers();
        // A relay stands between a and b and repeats everything that a says.
        let relay = a.namespace.udp((a.outer4, 0).into());
        a.tunnel.set_endpoint(&b.key(), relay.local_addr().unwrap());
        let (near, far) = (a.endpoint4(), b.endpoint4());
        let relaying = relay.try_clone().unwrap();
        thread::spawn(move || repeat(&relaying, near, far, 3));
        let (from, to) = (a.inner_udp(), b.inner_udp());
        for number in 0..200_u32 {
            echo(&from, &to, &number.to_le_bytes());
        }
        // 200 requests and the handshake, each two times too many.
        eventually("repetitions were refused", || (b.tunnel.counters().rx_invalid >= 402).then_some(()));
        to.set_nonblocking(true).unwrap();
        assert!(to.recv_from(&mut [0; 64]).is_err(), "a repetition got through");
    }

    fn under_load_cookies_are_sent_and_an_honest_peer_gets_in() {
        let (a, b) = two_peers();
        let stranger = a.namespace.udp((a.outer4, 0).into());
        let (done, target, server) = (AtomicBool::new(false), b.endpoint4(), b.key());
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut tunn = Tunn::new(
                    boringtun::x25519::StaticSecret::from([77; 32]),
                    boringtun::x25519::PublicKey::from(server.0),
                    None,
                    None,
                    1,
                    None,
                );
                let mut out = [0; 148];
                while !done.load(Ordering::Relaxed) {
                    let TunnResult::WriteToNetwork(initiation) = tunn.format_handshake_initiation(&mut out, true)
                    else {
                        panic!("no initiation");
                    };
                    stranger.send_to(initiation, target).unwrap();
                }
            });
            eventually("load", || (b.tunnel.counters().rx_under_load > 10).then_some(()));
            let mut reply = [0; 2048];
            let (length, from) = stranger.recv_from(&mut reply).unwrap();
            assert_eq!((length, reply[0], from), (64, 3, target));
            let result = eventually("handshake under load", || {
                a.tunnel.initiate_handshake(&server);
                let got = a.events.recv_timeout(std::time::Duration::from_millis(100));
                got.ok().filter(|event| matches!(event, TunnelEvent::HandshakeDone { .. }))
            });
            done.store(true, Ordering::Relaxed);
            assert_eq!(result, TunnelEvent::HandshakeDone { peer: server });
        });
        a.namespace.ping(b.inner4);
    }
}

/// Forwards between `near` and `far`; what `near` says arrives `times` times.
fn repeat(relay: &UdpSocket, near: SocketAddr, far: SocketAddr, times: usize) {
    relay.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut buffer = [0; 65_536];
    while let Ok((length, from)) = relay.recv_from(&mut buffer) {
        if from == near {
            for _ in 0..times {
                relay.send_to(&buffer[..length], far).unwrap();
            }
        } else {
            relay.send_to(&buffer[..length], near).unwrap();
        }
    }
}
