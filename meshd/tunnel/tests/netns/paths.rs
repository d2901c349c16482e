//! Offloads missing one by one, and underlays with less room than the tunnel thinks.

use std::net::UdpSocket;

use mesh_tunnel::Offloads;
use nix::sys::socket::{setsockopt, sockopt};

use crate::basic::tcp_transfer;
use crate::lab::{End, Namespace, connected, introduce, run, two_namespaces};

/// TCP both ways in both families, and datagrams in bursts.
fn traffic(a: &End, b: &End, bytes: usize) {
    for (server, client) in [(b, a), (a, b)] {
        for address in [server.inner4, server.inner6] {
            tcp_transfer(&server.namespace, &client.namespace, address, bytes);
        }
    }
    burst(&a.inner_udp(), &b.inner_udp());
}

/// Many datagrams at once, of sizes that can and cannot travel together. They are fewer than any buffer
/// holds, so every one must arrive, and in order.
fn burst(from: &UdpSocket, to: &UdpSocket) {
    let sizes = [1200, 1200, 1200, 700, 1200, 1, 0, 1392, 1392, 40, 40, 40, 41];
    for round in 0..8_u8 {
        for size in sizes {
            from.send_to(&vec![round; size], to.local_addr().unwrap()).unwrap();
        }
    }
    let mut buffer = [0; 2048];
    for round in 0..8_u8 {
        for size in sizes {
            let (length, _) = to.recv_from(&mut buffer).unwrap();
            assert_eq!(buffer[..length], vec![round; size]);
        }
    }
}

fn without(change: impl Fn(&mut Offloads)) -> Offloads {
    let mut offloads = Offloads::ALL;
    change(&mut offloads);
    offloads
}

/// Two links of 1500 and 1280 bytes with a router between them: `a` sees only the first.
fn router_with_less_room() -> (Namespace, Namespace, Namespace) {
    let (a, router, b) = (Namespace::new("a"), Namespace::new("r"), Namespace::new("b"));
    for (end, network, mtu) in [(&a, 1, 1500), (&b, 2, 1280)] {
        let (near, far) = (format!("veth{network}"), end.name);
        run(
            "ip",
            &["link", "add", &near, "netns", "r", "type", "veth", "peer", "name", "veth0", "netns", far],
        );
        for (namespace, interface, host) in [(end, "veth0", 1), (&router, near.as_str(), 254)] {
            namespace.ip(&format!("addr add 10.213.{network}.{host}/24 dev {interface}"));
            namespace.ip(&format!("addr add fd13:{network}::{host}/64 dev {interface} nodad"));
            namespace.ip(&format!("link set {interface} mtu {mtu} up"));
        }
        end.ip(&format!("route add default via 10.213.{network}.254"));
        end.ip(&format!("-6 route add default via fd13:{network}::254"));
    }
    for switch in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
        router.run(|| std::fs::write(format!("/proc/sys/net/{switch}"), "1")).unwrap();
    }
    (a, router, b)
}

netns_tests! {
    fn this_kernel_has_all_offloads_and_says_so() {
        let (a, _) = two_namespaces();
        let end = End::new(a, 1, Offloads::ALL);
        assert_eq!(end.tunnel.backend().offloads, Offloads::ALL);
    }

    fn any_offload_may_be_missing_on_either_side() {
        let table = [
            Offloads::NONE,
            without(|o| (o.tun_tcp, o.tun_udp) = (false, false)),
            without(|o| o.tun_udp = false),
            without(|o| o.udp_gso = false),
            without(|o| o.udp_gro = false),
        ];
        for (round, offloads) in table.into_iter().enumerate() {
            if round > 0 {
                for namespace in ["a", "b"] {
                    run("ip", &["netns", "del", namespace]);
                }
            }
            let (a, b) = two_namespaces();
            let (a, b) = (End::new(a, 1, Offloads::ALL), End::new(b, 2, offloads));
            assert_eq!(b.tunnel.backend().offloads, offloads);
            introduce(&a, &b, b.endpoint4());
            traffic(&a, &b, 4 << 20);
            for end in [&a, &b] {
                let counters = end.tunnel.counters();
                assert_eq!((counters.rx_interface_errors, counters.tx_malformed), (0, 0), "{offloads:?}");
            }
        }
    }

    fn datagrams_that_a_program_sends_in_one_piece_arrive_one_by_one() {
        let (a, b) = connected();
        for (from, to) in [(a.inner4, b.inner4), (a.inner6, b.inner6)] {
            let (from, to) = (a.namespace.udp((from, 0).into()), b.namespace.udp((to, 0).into()));
            setsockopt(&from, sockopt::UdpGsoSegment, &1000).unwrap();
            let bytes: Vec<u8> = (0..20_500_u32).map(|n| ((n * 31) >> 3) as u8).collect();
            from.send_to(&bytes, to.local_addr().unwrap()).unwrap();
            let mut buffer = [0; 2048];
            for datagram in bytes.chunks(1000) {
                let (length, _) = to.recv_from(&mut buffer).unwrap();
                assert!(buffer[..length] == *datagram);
            }
        }
        assert_eq!(a.tunnel.counters().tx_malformed, 0);
    }

    fn a_link_that_cannot_segment_datagrams_still_carries_them() {
        let (a, b) = two_namespaces();
        for namespace in [&a, &b] {
            namespace.run_program("ethtool", &["-K", "veth0", "tx-udp-segmentation", "off", "gso", "off"]);
        }
        let (a, b) = (End::new(a, 1, Offloads::ALL), End::new(b, 2, Offloads::ALL));
        introduce(&a, &b, b.endpoint4());
        traffic(&a, &b, 4 << 20);
    }

    fn a_link_with_less_room_than_the_tunnel_carries_tcp() {
        let (a, b) = two_namespaces();
        for namespace in [&a, &b] {
            namespace.ip("link set veth0 mtu 1280");
        }
        let (a, b) = (End::new(a, 1, Offloads::ALL), End::new(b, 2, Offloads::ALL));
        for endpoint in [b.endpoint4(), b.endpoint6()] {
            introduce(&a, &b, endpoint);
            a.tunnel.set_endpoint(&b.key(), endpoint);
            traffic(&a, &b, 1 << 20);
            let is_v6 = b.stats(&a).endpoint.unwrap().is_ipv6();
            assert_eq!(is_v6, endpoint.is_ipv6());
        }
    }

    fn a_router_with_less_room_than_the_tunnel_lets_tcp_through() {
        let (a, router, b) = router_with_less_room();
        let (a, b) = (End::new(a, 1, Offloads::ALL), End::new(b, 2, Offloads::ALL));
        let port = b.tunnel.listen_port();
        for endpoint in [format!("10.213.2.1:{port}"), format!("[fd13:2::1]:{port}")] {
            let endpoint = endpoint.parse().unwrap();
            introduce(&a, &b, endpoint);
            a.tunnel.set_endpoint(&b.key(), endpoint);
            for (server, client) in [(&b, &a), (&a, &b)] {
                for address in [server.inner4, server.inner6] {
                    tcp_transfer(&server.namespace, &client.namespace, address, 1 << 20);
                }
            }
        }
        drop(router);
    }
}
