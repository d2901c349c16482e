//! Datagrams longer than the MTU: each crosses as fragments, which leave in batches of their own kind and may be put
//! together again before they reach the host.

use mesh_tunnel::Offloads;

use crate::lab::{End, introduce, two_namespaces};

/// Lengths in turn: two fragments, three, none; the last behind a fragment, too.
const LENGTHS: [usize; 8] = [1400, 1400, 3000, 60, 1400, 1393, 1000, 4000];

netns_tests! {
    fn datagrams_longer_than_the_mtu_arrive_whole_and_in_order() {
        for offloads in [Offloads::ALL, Offloads { tun_udp: false, ..Offloads::ALL }, Offloads::NONE] {
            let (a, b) = two_namespaces();
            let [a, b] = [(a, 1), (b, 2)].map(|(namespace, number)| End::new(namespace, number, offloads));
            introduce(&a, &b, b.endpoint4());
            a.namespace.ping(b.inner4);
            for (from, to) in [(a.inner4, b.inner4), (a.inner6, b.inner6)] {
                let (from, to) = (a.namespace.udp((from, 0).into()), b.namespace.udp((to, 0).into()));
                // Connected, so that identifications count up as those of a busy program's do.
                from.connect(to.local_addr().unwrap()).unwrap();
                let mut number = 0_u32;
                for burst in [1, 2, 3, 8, 24, 40, 40] {
                    // Fewer at a time than any buffer holds, so that each must arrive.
                    let sent: Vec<Vec<u8>> = (0..burst)
                        .map(|at| {
                            number += 1;
                            let length = LENGTHS[if burst < 40 { 0 } else { at % LENGTHS.len() }];
                            (0..length).map(|byte| (byte as u32).wrapping_mul(number) as u8).collect()
                        })
                        .collect();
                    sent.iter().for_each(|datagram| assert_eq!(from.send(datagram).unwrap(), datagram.len()));
                    for datagram in &sent {
                        let mut bytes = [0; 5000];
                        let (length, _) = to.recv_from(&mut bytes).unwrap();
                        assert!(bytes[..length] == *datagram, "burst of {burst}, {length} of {}", datagram.len());
                    }
                }
            }
            let counters = b.tunnel.counters();
            assert_eq!((counters.rx_invalid, counters.rx_interface_errors), (0, 0), "{counters:?}");
            for (end, name) in [(a, "a"), (b, "b")] {
                drop(end);
                crate::lab::run("ip", &["netns", "del", name]);
            }
        }
    }
}
