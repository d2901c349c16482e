//! Sessions over time: roaming, rekeying, removal, silence, new keys.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;

use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::StaticSecret;
use mesh_tunnel::{TunnelBuilder, TunnelEvent};

use crate::basic::tcp_transfer;
use crate::lab::{connected, echo, eventually, key};

netns_tests! {
    fn a_peer_that_moves_is_followed() {
        let (a, b) = connected();
        let (from, to) = (a.inner_udp(), b.inner_udp());
        echo(&from, &to, b"before");
        a.namespace.ip("addr add 10.213.0.77/24 dev veth0");
        a.namespace.ip("addr del 10.213.0.1/24 dev veth0");
        // The kernel takes a secondary address away with the primary one.
        a.namespace.ip("addr replace 10.213.0.77/24 dev veth0");
        echo(&from, &to, b"after");
        let moved = ([10, 213, 0, 77], a.tunnel.listen_port()).into();
        b.expect_event(|event| *event == TunnelEvent::EndpointChanged { peer: a.key(), from: moved });
        assert_eq!(b.stats(&a).endpoint, Some(moved));
        // And from IPv4 to IPv6, where only the sender knows of the change.
        a.tunnel.set_endpoint(&b.key(), b.endpoint6());
        echo(&from, &to, b"over IPv6");
        assert_eq!(b.stats(&a).endpoint, Some(a.endpoint6()));
    }

    fn an_update_with_the_old_endpoint_does_not_undo_roaming() {
        let (a, b) = connected();
        a.namespace.ping(b.inner4);
        let roamed = b.stats(&a).endpoint;
        b.tunnel.set_peer(a.as_peer(None)).unwrap();
        assert_eq!(b.stats(&a).endpoint, roamed);
        assert!(b.stats(&a).has_session);
    }

    fn rekeying_under_traffic_loses_nothing() {
        let (a, b) = connected();
        let (from, to) = (a.inner_udp(), b.inner_udp());
        let (finished, sessions) = (AtomicBool::new(false), AtomicU32::new(0));
        thread::scope(|scope| {
            let rekeying = scope.spawn(|| {
                while !finished.load(Ordering::Relaxed) {
                    for (end, other) in [(&a, &b), (&b, &a)] {
                        end.tunnel.initiate_handshake(&other.key());
                        let done = |event: &TunnelEvent| matches!(event, TunnelEvent::HandshakeDone { .. });
                        end.expect_event(done);
                        sessions.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
            // Until there were enough of both, whichever the machine is slower at.
            let mut number = 0_u32;
            while !rekeying.is_finished() && (number < 4000 || sessions.load(Ordering::Relaxed) < 4) {
                echo(&from, &to, &number.to_le_bytes());
                number += 1;
            }
            finished.store(true, Ordering::Relaxed);
            rekeying.join().unwrap();
        });
    }

    fn a_removed_peer_is_cut_off_when_the_call_returns() {
        let (a, b) = connected();
        let (from, to) = (a.inner_udp(), b.inner_udp());
        let target = to.local_addr().unwrap();
        let finished = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !finished.load(Ordering::Relaxed) {
                    let _ = from.send_to(&[0; 1200], target);
                }
            });
            let got = || b.namespace.received_packets("wg0");
            eventually("traffic", || (got() > 1000).then_some(()));
            assert!(b.tunnel.remove_peer(&a.key()));
            let at_return = got();
            let seen = b.tunnel.counters().rx_invalid;
            eventually("traffic goes on", || (b.tunnel.counters().rx_invalid > seen + 1000).then_some(()));
            assert_eq!(got(), at_return);
            finished.store(true, Ordering::Relaxed);
        });
        assert!(!b.tunnel.remove_peer(&a.key()));
        assert_eq!(b.tunnel.peers(), []);
        // It may come back, with a new session only.
        b.tunnel.set_peer(a.as_peer(None)).unwrap();
        a.tunnel.initiate_handshake(&b.key());
        a.expect_event(|event| matches!(event, TunnelEvent::HandshakeDone { .. }));
        a.namespace.ping(b.inner4);
    }

    fn peers_that_come_and_go_do_not_disturb_the_others() {
        let (a, b) = connected();
        let finished = AtomicBool::new(false);
        let rounds = thread::scope(|scope| {
            let churn = scope.spawn(|| {
                let mut rounds = 0;
                while !finished.load(Ordering::Relaxed) {
                    for end in [&a, &b] {
                        for byte in 20..60 {
                            let address = std::net::IpAddr::from([10, 216, 0, byte]);
                            let guest = mesh_tunnel::PeerConfig {
                                public_key: key(byte).public(),
                                allowed_ips: vec![address.into()],
                                ..a.as_peer(None)
                            };
                            end.tunnel.set_peer(guest).unwrap();
                        }
                        for byte in 20..60 {
                            assert!(end.tunnel.remove_peer(&key(byte).public()));
                        }
                    }
                    rounds += 1;
                }
                rounds
            });
            for _ in 0..4 {
                tcp_transfer(&b.namespace, &a.namespace, b.inner4, 8 << 20);
            }
            finished.store(true, Ordering::Relaxed);
            churn.join().unwrap()
        });
        assert!(rounds > 0);
        for end in [&a, &b] {
            let counters = end.tunnel.counters();
            assert_eq!((counters.rx_invalid, counters.rx_wrong_source), (0, 0), "{counters:?}");
            assert_eq!(end.tunnel.peers().len(), 1);
        }
    }

    fn a_peer_that_restarts_is_back_when_it_speaks() {
        let (a, mut b) = connected();
        let port = b.tunnel.listen_port();
        b.tunnel.close();
        b.tunnel = b.namespace.run(|| TunnelBuilder::new("wg0", key(2)).listen_port(port).open()).unwrap();
        b.namespace.ip(&format!("addr add {}/24 dev wg0", b.inner4));
        b.tunnel.set_peer(a.as_peer(Some(a.endpoint4()))).unwrap();
        b.namespace.ping(a.inner4);
        a.namespace.ping(b.inner4);
    }

    fn a_new_own_key_ends_the_old_sessions() {
        let (a, b) = connected();
        let old = a.key();
        a.tunnel.rotate_key(key(11)).unwrap();
        assert_eq!(a.key(), key(11).public());
        assert!(!a.stats(&b).has_session);
        // b does not know the new key: it refuses, and what it sends under the old one is refused.
        let before = a.tunnel.counters().rx_invalid;
        b.inner_udp().send_to(b"old", (a.inner4, 9)).unwrap();
        eventually("old session refused", || (a.tunnel.counters().rx_invalid > before).then_some(()));
        assert!(b.tunnel.remove_peer(&old));
        b.tunnel.set_peer(a.as_peer(Some(a.endpoint4()))).unwrap();
        b.namespace.ping(a.inner4);
        a.namespace.ping(b.inner4);
    }

    fn silence_is_reported_once() {
        let (a, b) = connected();
        b.tunnel.close();
        let (from, target) = (a.inner_udp(), (b.inner4, 9));
        let event = eventually("silence", || {
            from.send_to(b"anybody there?", target).unwrap();
            let event = a.events.recv_timeout(std::time::Duration::from_millis(100)).ok()?;
            matches!(event, TunnelEvent::PeerSilent { .. }).then_some(event)
        });
        assert_eq!(event, TunnelEvent::PeerSilent { peer: b.key() });
        from.send_to(b"anybody there?", target).unwrap();
        assert_eq!(a.events.try_recv(), None);
    }

    fn a_thousand_peers_may_come_at_once() {
        let (hub, far) = crate::lab::two_ends();
        let server = hub.key().0;
        let secret = |n: u16| [[1, 2], n.to_le_bytes()].concat().into_iter().chain([7; 28]).collect::<Vec<u8>>();
        let keys: Vec<[u8; 32]> = (0..CROWD).map(|n| secret(n).try_into().unwrap()).collect();
        for (n, key) in keys.iter().enumerate() {
            let [high, low] = (n as u16).to_be_bytes();
            let address = std::net::IpAddr::from([10, 215, high, low]);
            hub.tunnel.set_peer(mesh_tunnel::PeerConfig {
                public_key: mesh_tunnel::PrivateKey::from_bytes(*key).public(),
                preshared_key: None,
                endpoint: None,
                allowed_ips: vec![address.into()],
                persistent_keepalive: None,
            }).unwrap();
        }
        let mut crowd: Vec<Tunn> = (0..).zip(&keys).map(|(n, key)| {
            Tunn::new(StaticSecret::from(*key), server.into(), None, None, n, None)
        }).collect();
        let socket = far.namespace.udp((far.outer4, 0).into());
        socket.set_nonblocking(true).unwrap();
        let (start, mut out, mut buffer) = (std::time::Instant::now(), [0; 2048], [0; 2048]);
        // What the hub says goes to the client it is for; what the client says to that, back.
        let mut listen = |crowd: &mut [Tunn]| {
            let mut out = [0; 2048];
            while let Ok((length, _)) = socket.recv_from(&mut buffer) {
                // Cookie replies have the receiver where responses have the sender.
                let at = if buffer[0] == 3 { 4 } else { 8 };
                let client = u32::from_le_bytes(buffer[at..at + 4].try_into().unwrap()) >> 8;
                let reply = crowd[client as usize].decapsulate(None, &buffer[..length], &mut out);
                if let TunnResult::WriteToNetwork(keepalive) = reply {
                    socket.send_to(keepalive, hub.endpoint4()).unwrap();
                }
            }
        };
        eventually("all are up", || {
            let up: BTreeSet<_> = hub.tunnel.peers().into_iter().filter(|peer| peer.last_handshake.is_some())
                .map(|peer| peer.public_key).collect();
            for (client, key) in keys.iter().enumerate() {
                if !up.contains(&mesh_tunnel::PrivateKey::from_bytes(*key).public()) {
                    let hello = crowd[client].format_handshake_initiation(&mut out, true);
                    let TunnResult::WriteToNetwork(hello) = hello else { panic!("no initiation") };
                    socket.send_to(hello, hub.endpoint4()).unwrap();
                }
                listen(&mut crowd);
            }
            // Buffers are small in a user namespace: who is not heard tries again in a second.
            let pause = std::time::Instant::now();
            while pause.elapsed() < std::time::Duration::from_secs(1) {
                listen(&mut crowd);
                if hub.tunnel.peers().iter().all(|peer| peer.last_handshake.is_some()) {
                    return Some(());
                }
                std::thread::park_timeout(std::time::Duration::from_millis(5));
            }
            None
        });
        println!("{CROWD} handshakes in {:?}", start.elapsed());
    }
}

const CROWD: u16 = 1000;
