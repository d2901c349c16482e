//! Several queues: what holds with one holds with four, whatever the number of cores.

use std::collections::BTreeMap;
use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use crate::basic::tcp_transfer;
use crate::lab::{End, eventually, introduce, key, two_namespaces};

const QUEUES: usize = 4;

fn two_ends_with_queues() -> (End, End) {
    let (a, b) = two_namespaces();
    let [a, b] =
        [(a, 1), (b, 2)].map(|(end, number)| End::built(end, number, |builder| builder.queues(QUEUES)));
    introduce(&a, &b, b.endpoint4());
    (a, b)
}

/// The CPU time (ns) that the threads of one name have used, by thread.
fn cpu_of(threads: &str) -> BTreeMap<String, u64> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
    let named = tasks.filter(|task| std::fs::read_to_string(task.join("comm")).unwrap().trim() == threads);
    named
        .map(|task| {
            let used = std::fs::read_to_string(task.join("schedstat")).unwrap();
            (task.display().to_string(), used.split_whitespace().next().unwrap().parse().unwrap())
        })
        .collect()
}

netns_tests! {
    fn every_flow_keeps_its_order_on_several_queues() {
        let (a, b) = two_ends_with_queues();
        a.namespace.ping(b.inner4);
        let to = b.inner_udp();
        let target = to.local_addr().unwrap();
        let flows: Vec<UdpSocket> = (0..8).map(|_| a.inner_udp()).collect();
        let before = cpu_of("wg-carrier");
        // Fewer at a time than any buffer holds, so that each must arrive.
        for round in 0..100_u32 {
            for flow in &flows {
                flow.send_to(&round.to_le_bytes(), target).unwrap();
            }
            let mut seen = BTreeMap::new();
            for _ in &flows {
                let mut bytes = [0; 4];
                let (_, from) = to.recv_from(&mut bytes).unwrap();
                assert_eq!(u32::from_le_bytes(bytes), round, "from {from}");
                assert!(seen.insert(from, ()).is_none(), "twice from {from}");
            }
        }
        // The same in one burst for each flow: within it, nothing overtakes.
        thread::scope(|scope| {
            for flow in &flows {
                scope.spawn(move || {
                    for n in 0..12_u32 {
                        flow.send_to(&n.to_le_bytes(), target).unwrap();
                    }
                });
            }
        });
        let mut next = BTreeMap::<_, u32>::new();
        for _ in 0..flows.len() * 12 {
            let mut bytes = [0; 4];
            let (_, from) = to.recv_from(&mut bytes).unwrap();
            let expected = next.entry(from).or_default();
            assert_eq!(u32::from_le_bytes(bytes), *expected, "from {from}");
            *expected += 1;
        }
        // Both ends live in this process: two times four carriers. More than one has worked.
        let after = cpu_of("wg-carrier");
        assert_eq!(after.len(), 2 * QUEUES);
        let worked = after.iter().filter(|(thread, used)| **used > before[*thread]).count();
        assert!(worked >= 2, "{before:?} {after:?}");
    }

    fn streams_in_both_directions_and_removals_work_on_several_queues() {
        let (a, b) = two_ends_with_queues();
        // b must know where a is before it may begin.
        a.namespace.ping(b.inner4);
        thread::scope(|scope| {
            for (server, client, address) in [(&b, &a, b.inner4), (&a, &b, a.inner6), (&b, &a, b.inner6)] {
                scope.spawn(move || tcp_transfer(&server.namespace, &client.namespace, address, 4 << 20));
            }
        });
        for end in [&a, &b] {
            let counters = end.tunnel.counters();
            assert_eq!((counters.rx_invalid, counters.rx_interface_errors), (0, 0), "{counters:?}");
        }
        let stop = AtomicBool::new(false);
        let (from, to) = (a.inner_udp(), b.inner_udp());
        thread::scope(|scope| {
            scope.spawn(|| while !stop.load(Ordering::Relaxed) {
                let _ = from.send_to(b"flood", to.local_addr().unwrap());
            });
            for _ in 0..20 {
                eventually("traffic", || (b.stats(&a).rx_bytes > 0).then_some(()));
                assert!(b.tunnel.remove_peer(&a.key()));
                let seen = b.namespace.received_packets("wg0");
                for _ in 0..1000 {
                    thread::yield_now();
                }
                assert_eq!(b.namespace.received_packets("wg0"), seen);
                b.tunnel.set_peer(a.as_peer(Some(a.endpoint4()))).unwrap();
                a.tunnel.initiate_handshake(&b.key());
                eventually("session", || b.stats(&a).has_session.then_some(()));
            }
            stop.store(true, Ordering::Relaxed);
        });
    }

    fn the_port_moves_with_all_its_queues() {
        let (a, b) = two_ends_with_queues();
        a.namespace.ping(b.inner4);
        let old = b.tunnel.listen_port();
        let new = b.tunnel.set_listen_port(0).unwrap();
        assert!(new != old && new == b.tunnel.listen_port());
        // b speaks, and a hears where it is now.
        b.namespace.ping(a.inner4);
        assert_eq!(a.stats(&b).endpoint, Some((b.outer4, new).into()));
        eventually("the old port is free", || b.namespace.run(|| UdpSocket::bind((b.outer4, old))).ok());
        b.tunnel.rotate_key(key(7)).unwrap();
        b.tunnel.close();
        assert!(b.tunnel.set_listen_port(0).is_err());
    }
}
