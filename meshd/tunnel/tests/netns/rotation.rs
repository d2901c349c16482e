//! A change of keys under traffic: two private keys on one side, two public keys of one peer on the other.

use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use mesh_tunnel::{PeerConfig, TunnelError, TunnelEvent};

use crate::lab::{End, connected, echo, eventually, key};

/// `b` as `a` knows it under its next key.
pub(crate) fn next_peer(b: &End, number: u8) -> PeerConfig {
    PeerConfig {
        public_key: key(number).public(),
        allowed_ips: Vec::new(),
        persistent_keepalive: Some(Duration::from_secs(25)),
        ..b.as_peer(Some(b.endpoint4()))
    }
}

/// Sends a number every millisecond until told to stop; how many.
fn talk(from: &UdpSocket, to: &UdpSocket, stop: &AtomicBool) -> u64 {
    let mut sent = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        from.send_to(&sent.to_le_bytes(), to.local_addr().unwrap()).unwrap();
        sent += 1;
        thread::park_timeout(Duration::from_millis(1));
    }
    sent
}

/// Reads numbers until told to stop and then silence; how many came and the longest pause between two.
pub(crate) fn listen(at: &UdpSocket, stop: &AtomicBool) -> (u64, Duration) {
    at.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let (mut got, mut last, mut gap) = (0, Instant::now(), Duration::ZERO);
    loop {
        match at.recv_from(&mut [0; 8]) {
            Ok(_) => {
                gap = gap.max(last.elapsed());
                last = Instant::now();
                got += 1;
            }
            Err(_) if stop.load(Ordering::Relaxed) => return (got, gap),
            Err(_) => {}
        }
    }
}

netns_tests! {
    fn a_change_of_keys_under_traffic_loses_nothing_and_leaves_the_old_key_dead() {
        let (a, b) = connected();
        let old = b.key();
        let (a_to_b, b_to_a) = ((a.inner_udp(), b.inner_udp()), (b.inner_udp(), a.inner_udp()));
        let (stop, quiet) = (AtomicBool::new(false), AtomicBool::new(false));
        let results = thread::scope(|scope| {
            let talkers: Vec<_> = [&a_to_b, &b_to_a].map(|(from, to)| scope.spawn(|| talk(from, to, &stop))).into();
            let listeners: Vec<_> = [&a_to_b.1, &b_to_a.1].map(|at| scope.spawn(|| listen(at, &quiet))).into();

            b.tunnel.add_next_key(key(12)).unwrap();
            a.tunnel.set_peer(next_peer(&b, 12)).unwrap();
            eventually("session under the next key", || {
                b.tunnel.peers_of_next_key().iter().all(|peer| peer.last_handshake.is_some()).then_some(())
            });
            assert_eq!(b.tunnel.peers().len(), 1);
            a.tunnel.hand_over(&old, &key(12).public()).unwrap();
            let moved = || a.tunnel.peer(&key(12).public()).unwrap().allowed_ips.len();
            assert_eq!((moved(), a.tunnel.peer(&old).unwrap().allowed_ips.len()), (2, 0));
            // b sees a's packets under the next key and follows; both directions run on it.
            let rx = |public| a.tunnel.peers().into_iter().find(|peer| peer.public_key == public).unwrap().rx_bytes;
            let before = rx(key(12).public());
            eventually("b sends under the next key", || (rx(key(12).public()) > before + 5000).then_some(()));

            assert!(b.tunnel.switch_to_next_key());
            assert_eq!(b.key(), key(12).public());
            assert!(b.tunnel.peers_of_next_key().is_empty());
            assert!(a.tunnel.remove_peer(&old));
            let before = rx(key(12).public());
            eventually("still talking", || (rx(key(12).public()) > before + 5000).then_some(()));
            stop.store(true, Ordering::Relaxed);
            let sent: Vec<u64> = talkers.into_iter().map(|talker| talker.join().unwrap()).collect();
            quiet.store(true, Ordering::Relaxed);
            sent.into_iter().zip(listeners.into_iter().map(|listener| listener.join().unwrap())).collect::<Vec<_>>()
        });
        for (sent, (got, gap)) in results {
            assert_eq!(sent, got, "longest pause {gap:?}");
            assert!(gap < Duration::from_secs(1), "{gap:?}");
        }
        for end in [&a, &b] {
            let counters = end.tunnel.counters();
            assert_eq!((counters.rx_wrong_source, counters.tx_no_peer), (0, 0), "{counters:?}");
        }
        // The old key is dead: whoever still knows only that gets no answer.
        assert!(!b.tunnel.switch_to_next_key());
        a.tunnel.remove_peer(&key(12).public());
        let before = b.tunnel.counters().rx_invalid;
        let old_peer = PeerConfig { public_key: old, ..b.as_peer(Some(b.endpoint4())) };
        a.tunnel.set_peer(old_peer).unwrap();
        assert!(a.tunnel.initiate_handshake(&old));
        eventually("refused", || (b.tunnel.counters().rx_invalid > before).then_some(()));
        assert!(!a.tunnel.peers()[0].has_session);
    }

    fn a_peer_that_never_learns_the_next_key_is_served_until_the_switch() {
        let (a, b) = connected();
        b.tunnel.add_next_key(key(12)).unwrap();
        echo(&a.inner_udp(), &b.inner_udp(), b"old key");
        assert_eq!(b.tunnel.peers_of_next_key().len(), 1);
        assert!(b.tunnel.peers_of_next_key()[0].last_handshake.is_none());
        assert!(b.tunnel.switch_to_next_key());
        assert!(!b.stats(&a).has_session);
        // Nothing but the new key helps.
        let next = PeerConfig { public_key: key(12).public(), ..b.as_peer(Some(b.endpoint4())) };
        a.tunnel.remove_peer(&key(2).public());
        a.tunnel.set_peer(next).unwrap();
        a.namespace.ping(b.inner4);
    }

    fn a_change_of_keys_can_be_called_off() {
        let (a, b) = connected();
        b.tunnel.add_next_key(key(12)).unwrap();
        a.tunnel.set_peer(next_peer(&b, 12)).unwrap();
        a.expect_event(|event| *event == TunnelEvent::HandshakeDone { peer: key(12).public() });
        a.tunnel.hand_over(&b.key(), &key(12).public()).unwrap();
        echo(&a.inner_udp(), &b.inner_udp(), b"next key");
        // Back again: the addresses first, then the key.
        a.tunnel.hand_over(&key(12).public(), &b.key()).unwrap();
        a.tunnel.remove_peer(&key(12).public());
        assert!(b.tunnel.drop_next_key());
        assert!(!b.tunnel.drop_next_key());
        echo(&a.inner_udp(), &b.inner_udp(), b"first key again");
        assert_eq!(b.tunnel.counters().rx_wrong_source, 0);
    }

    fn keys_that_cannot_follow_are_refused() {
        let (a, b) = connected();
        let refused = |number| matches!(b.tunnel.add_next_key(key(number)), Err(TunnelError::OwnKey { .. }));
        assert!(refused(1) && refused(2));
        b.tunnel.add_next_key(key(12)).unwrap();
        let own = PeerConfig { public_key: key(12).public(), ..a.as_peer(None) };
        assert!(matches!(b.tunnel.set_peer(own), Err(TunnelError::OwnKey { .. })));
        let unknown = b.tunnel.hand_over(&a.key(), &key(9).public());
        assert!(matches!(unknown, Err(TunnelError::UnknownPeer { peer }) if peer == key(9).public()));
        // A peer that comes while there are two keys has both; one that goes takes both away.
        b.tunnel.set_peer(PeerConfig { public_key: key(9).public(), allowed_ips: Vec::new(), ..a.as_peer(None) }).unwrap();
        assert_eq!(b.tunnel.peers_of_next_key().len(), 2);
        assert!(b.tunnel.remove_peer(&key(9).public()));
        assert_eq!((b.tunnel.peers_of_next_key().len(), b.tunnel.peers().len()), (1, 1));
    }
}
