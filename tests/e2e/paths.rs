//! Nodes behind routers that translate addresses, and behind firewalls: who reaches whom, and how.

use std::time::Duration;

use ipnet::IpNet;
use mesh_tests::{CONTROLLER, DEADLINE, Fleet, fleet_test};

/// What stands between a node and the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Nothing.
    Open,
    /// A router that keeps one port for all, and lets in only what answers.
    PortRestricted,
    /// A router with another port for each destination.
    Symmetric,
    /// A firewall that lets no UDP through.
    Blocked,
}

use Kind::{Blocked, Open, PortRestricted, Symmetric};

const NODES: [(&str, Kind); 8] = [
    ("o1", Open),
    ("o2", Open),
    ("p1", PortRestricted),
    ("p2", PortRestricted),
    ("s1", Symmetric),
    ("s2", Symmetric),
    ("b1", Blocked),
    ("b2", Blocked),
];

/// How two nodes reach each other at best.
fn expected(a: Kind, b: Kind) -> &'static str {
    match (a, b) {
        (Blocked, _) | (_, Blocked) => "relay ",
        (Symmetric, Symmetric | PortRestricted) | (PortRestricted, Symmetric) => "relay ",
        _ => "direct ",
    }
}

/// A node's host, behind whatever its kind asks for.
fn add_host(fleet: &mut Fleet, number: u8, name: &str, kind: Kind) {
    match kind {
        Open => drop(fleet.add_host(name)),
        Blocked => {
            fleet.add_host(name);
            block_udp(fleet, name);
        }
        PortRestricted | Symmetric => add_translated(fleet, number, name, kind),
    }
}

/// A host of a private network, and its router: a router with one arm, since the switch is one.
fn add_translated(fleet: &mut Fleet, number: u8, name: &str, kind: Kind) {
    let router = format!("r-{name}");
    let outside: IpNet = format!("10.99.0.{}/24", 100 + number).parse().unwrap();
    let network = |host| -> IpNet { format!("192.168.{number}.{host}/24").parse().unwrap() };
    fleet.add_host_at(&router, &[outside, network(1)]);
    let host = fleet.add_host_at(name, &[network(2)]);
    host.add_default_route(network(1).addr()).unwrap();
    // Everything comes and goes by one interface: routers of one arm advise hosts to go round them.
    for (on, switch, value) in [
        (router.as_str(), "ipv4/ip_forward", "1"),
        (router.as_str(), "ipv4/conf/all/send_redirects", "0"),
        (router.as_str(), "ipv4/conf/eth0/send_redirects", "0"),
        (name, "ipv4/conf/all/accept_redirects", "0"),
    ] {
        fleet.host(on).run(|| std::fs::write(format!("/proc/sys/net/{switch}"), value)).unwrap().unwrap();
    }
    let mapping = match kind {
        // Other ports than the host's own, so that only who asks (STUN) knows them.
        PortRestricted => "masquerade to :20000-29999",
        _ => "masquerade to :30000-60000 random,fully-random",
    };
    let rules = format!(
        "table ip nat {{
            counter relayed {{ }}
            chain out {{ type nat hook postrouting priority srcnat;
                ip saddr 192.168.{number}.0/24 meta l4proto {{ tcp, udp }} {mapping};
            }}
            chain forward {{ type filter hook forward priority filter; policy accept;
                ip saddr 192.168.{number}.0/24 udp dport 7443 meta length > 600 counter name relayed
                ip daddr 192.168.{number}.0/24 ct state new drop
                ip daddr 192.168.0.0/16 ip saddr 192.168.0.0/16 drop;
            }}
            chain input {{ type filter hook input priority filter; policy accept;
                ip daddr {} meta l4proto udp drop;
            }}
        }}",
        outside.addr()
    );
    nft(fleet, &router, &rules);
}

fn block_udp(fleet: &Fleet, name: &str) {
    let rules = "table inet block {
        chain in { type filter hook input priority -10; iifname eth0 meta l4proto udp drop; }
        chain out { type filter hook output priority -10; oifname eth0 meta l4proto udp drop; }
    }";
    nft(fleet, name, rules);
}

fn nft(fleet: &Fleet, host: &str, rules: &str) {
    let file = fleet.path(host).join("rules.nft");
    std::fs::write(&file, rules).unwrap();
    fleet.on(host, "nft", &["-f", file.to_str().unwrap()]).ok();
}

/// How `from` reaches `to`, as its status says.
fn path(fleet: &Fleet, from: &str, to: &str) -> String {
    let status = fleet.meshctl(from, &["status", "-o", "json"]);
    if status.code != 0 {
        return String::new();
    }
    let status = status.json();
    let peers = status["peers"].as_array().cloned().unwrap_or_default();
    let peer = peers.iter().find(|peer| peer["name"] == to);
    peer.and_then(|peer| peer["path"].as_str()).unwrap_or_default().to_owned()
}

#[test]
fn every_pair_of_networks_is_joined_by_its_best_path() {
    fleet_test("paths::every_pair_of_networks_is_joined_by_its_best_path", || {
        let mut fleet = Fleet::new();
        for (number, (name, kind)) in (1..).zip(NODES) {
            add_host(&mut fleet, number, name, kind);
            fleet.start_node(name);
        }
        for (name, _) in NODES {
            fleet.enroll(name, &[]);
        }
        let addresses = NODES.map(|(name, _)| fleet.addresses(name).0);
        for (index, (from, kind)) in NODES.into_iter().enumerate() {
            for ((to, other), address) in NODES.into_iter().zip(addresses).skip(index + 1) {
                let best = expected(kind, other);
                fleet.until(&format!("{from} and {to} meet: {best}"), |fleet| {
                    path(fleet, from, to).starts_with(best) && path(fleet, to, from).starts_with(best)
                });
                fleet.until(&format!("{from} reaches {to}"), |fleet| fleet.pings(from, address));
                fleet.until(&format!("{to} reaches {from}"), |fleet| fleet.pings(to, addresses[index]));
            }
        }

        // Where UDP gets through, the relay is used by UDP.
        let relayed = |fleet: &Fleet, router: &str| {
            let listed =
                fleet.on(router, "nft", &["-j", "list", "counter", "ip", "nat", "relayed"]).ok().json();
            listed["nftables"][1]["counter"]["packets"].as_u64().expect("a counter")
        };
        let before = relayed(&fleet, "r-s1");
        fleet.on("s1", "ping", &["-n", "-c10", "-i0.02", "-s700", "-W2", &addresses[5].to_string()]).ok();
        assert!(relayed(&fleet, "r-s1") >= before + 10, "s1 reaches s2 by the relay over UDP");

        // The firewall opens: the relay gives way, at both ends, and nothing is lost on the way.
        assert!(path(&fleet, "b1", "o1").starts_with("relay "));
        let walk = fleet.meshctl("b1", &["ping", "o1", "-c1", "-o", "json"]).ok().json();
        let underlay = &walk["replies"][0];
        assert_eq!(underlay["detail"], path(&fleet, "b1", "o1"), "{walk}");
        assert_eq!(underlay["address"], "", "no address stands for the relay: {walk}");
        let mut ping = fleet.command("b1", "ping", &["-n", "-i0.1", "-w60", &addresses[0].to_string()]);
        ping.arg("-q");
        fleet.processes.spawn("ping", ping).unwrap();
        fleet.on("b1", "nft", &["delete", "table", "inet", "block"]).ok();
        fleet.until("b1 and o1 meet directly", |fleet| {
            path(fleet, "b1", "o1").starts_with("direct ") && path(fleet, "o1", "b1").starts_with("direct ")
        });
        fleet.processes.signal("ping", nix::sys::signal::Signal::SIGINT).unwrap();
        fleet.processes.wait("ping", Duration::from_secs(5)).unwrap();
        let said = fleet.processes.log("ping");
        assert!(said.contains(" 0% packet loss"), "{said}");

        // The session of a revoked node ends with it.
        let std::net::IpAddr::V6(overlay) = fleet.addresses("s2").1 else { panic!("no IPv6 address") };
        let ended = format!("relay session ended node={} ", overlay.segments()[7]);
        assert!(!fleet.processes.log(CONTROLLER).contains(&ended));
        fleet.controller(&["node", "revoke", "s2", "--yes", "--reason", "key-compromise"]).ok();
        fleet.within("the relay lets go of s2", Duration::from_secs(5), |fleet| {
            fleet.processes.log(CONTROLLER).contains(&ended)
        });
        assert!(!fleet.pings("s1", addresses[5]));
    });
}

/// A node whose first engine cannot use the relay, and a peer that has no other way.
fn a_bare_engine_gives_way(environment: &[(&str, &str)], first: &str) {
    let mut fleet = Fleet::new();
    add_host(&mut fleet, 1, "open", Open);
    add_host(&mut fleet, 2, "blocked", Blocked);
    fleet.start_node_with("open", &[], environment);
    fleet.start_node("blocked");
    fleet.enroll("open", &[]);
    let status = |fleet: &Fleet| fleet.meshctl("open", &["status", "-o", "json"]).ok().json();
    let before = status(&fleet);
    assert_eq!(before["backend"], first);
    assert!(before["backendLacks"].to_string().contains("no relay"), "{before}");
    let doctor = fleet.meshctl("open", &["doctor", "-o", "json"]).stdout;
    assert!(doctor.contains("no relay"), "{doctor}");
    fleet.enroll("blocked", &[]);
    let met = |fleet: &Fleet| {
        path(fleet, "open", "blocked").starts_with("relay ")
            && path(fleet, "blocked", "open").starts_with("relay ")
    };
    fleet.until("they meet by the relay", met);
    let address = fleet.addresses("blocked").0;
    fleet.until("open reaches blocked", |fleet| fleet.pings("open", address));
    let after = status(&fleet);
    assert_eq!((&after["backend"], &after["backendLacks"]), (&"userspace".into(), &serde_json::json!([])));
    let why = after["whyNotKernel"].as_str().unwrap();
    assert!(why.contains("blocked") && why.contains("relay"), "{why}");
    // What was learned is known at the next start.
    fleet.processes.kill("open").unwrap();
    fleet.start_node_with("open", &[], environment);
    assert_eq!(status(&fleet)["whyNotKernel"], after["whyNotKernel"]);
    fleet.until("they meet again", met);
}

#[test]
fn auto_leaves_an_engine_that_cannot_reach_a_peer() {
    fleet_test("paths::auto_leaves_an_engine_that_cannot_reach_a_peer", || {
        a_bare_engine_gives_way(&[("MESH_FAILPOINT", "node-engine-bare")], "userspace");
    });
}

#[test]
#[ignore = "needs the kernel's module: make test-kernel"]
fn auto_leaves_the_kernels_engine_for_a_peer_that_needs_the_relay() {
    fleet_test("paths::auto_leaves_the_kernels_engine_for_a_peer_that_needs_the_relay", || {
        a_bare_engine_gives_way(&[], "kernel");
    });
}

#[test]
fn a_router_of_the_test_translates_as_its_kind_says() {
    fleet_test("paths::a_router_of_the_test_translates_as_its_kind_says", || {
        let mut fleet = Fleet::new();
        let second: IpNet = "10.99.0.200/24".parse().unwrap();
        let ctl = fleet.host(CONTROLLER).clone();
        ctl.set_addresses(&[ctl.addresses(), vec![second]].concat()).unwrap();
        for (number, name, kind) in [(1, "p", PortRestricted), (2, "s", Symmetric)] {
            add_host(&mut fleet, number, name, kind);
        }
        // Two servers that answer STUN: the controller's own, and one more beside it.
        let server = ctl.run(|| std::net::UdpSocket::bind("10.99.0.200:3478")).unwrap().unwrap();
        let first = format!("{}:7443", ctl.ipv4().unwrap());
        for (name, same) in [("p", true), ("s", false)] {
            let socket =
                fleet.host(name).run(|| std::net::UdpSocket::bind("0.0.0.0:40000")).unwrap().unwrap();
            socket.set_read_timeout(Some(DEADLINE)).unwrap();
            server.set_read_timeout(Some(DEADLINE)).unwrap();
            let mapped = stun(&socket, &first);
            // The controller answers from where it was asked, also at its second address: the router lets in no other.
            stun(&socket, "10.99.0.200:7443");
            socket.send_to(b"where am I", server.local_addr().unwrap()).unwrap();
            let (_, elsewhere) = server.recv_from(&mut [0; 64]).unwrap();
            assert_ne!(mapped.port(), 40000, "{name}");
            assert_eq!(mapped.ip(), elsewhere.ip(), "{name}");
            assert_eq!(mapped.port() == elsewhere.port(), same, "{name}: {mapped} {elsewhere}");
        }
    });
}

/// One STUN binding, written out by hand: RFC 8489 §5 and §14.2.
fn stun(socket: &std::net::UdpSocket, server: &str) -> std::net::SocketAddr {
    let request = [&[0, 1, 0, 0, 0x21, 0x12, 0xa4, 0x42][..], b"transaction!"].concat();
    socket.send_to(&request, server).unwrap();
    let mut answer = [0; 64];
    let (length, _) = socket.recv_from(&mut answer).unwrap();
    assert_eq!((length, &answer[..2], &answer[20..24]), (32, &[1, 1][..], &[0, 0x20, 0, 8][..]));
    let port = u16::from_be_bytes([answer[26] ^ 0x21, answer[27] ^ 0x12]);
    let ip = [answer[28] ^ 0x21, answer[29] ^ 0x12, answer[30] ^ 0xa4, answer[31] ^ 0x42];
    (ip, port).into()
}

#[test]
fn a_configured_name_is_looked_up_again_when_the_network_changes() {
    fleet_test("paths::a_configured_name_is_looked_up_again_when_the_network_changes", || {
        let mut fleet = Fleet::new();
        fleet.add_host("alpha");
        let hosts = fleet.path("alpha").join("hosts");
        std::fs::write(&hosts, "10.99.0.77 alpha.test\n").unwrap();
        fleet.on("alpha", "mount", &["--bind", hosts.to_str().unwrap(), "/etc/hosts"]).ok();
        fleet.start_node_with("alpha", &["--endpoints", "alpha.test:51820"], &[]);
        fleet.enroll("alpha", &[]);
        let told = |fleet: &Fleet, address: &str| {
            let node = fleet.controller(&["node", "show", "alpha", "-o", "json"]).ok().json();
            let endpoints = node["endpoints"].as_array().cloned().unwrap_or_default();
            endpoints.iter().any(|endpoint| endpoint["address"] == address)
        };
        fleet.until("the name's address is told", |fleet| told(fleet, "10.99.0.77:51820"));
        // In place: the mount shows this file and no other.
        std::fs::write(&hosts, "10.99.0.78 alpha.test\n").unwrap();
        let host = fleet.host("alpha").clone();
        let added: IpNet = "10.99.0.79/24".parse().unwrap();
        host.set_addresses(&[host.addresses(), vec![added]].concat()).unwrap();
        fleet.within("the new addresses are told", Duration::from_secs(9), |fleet| {
            told(fleet, "10.99.0.78:51820")
                && told(fleet, "10.99.0.79:51820")
                && !told(fleet, "10.99.0.77:51820")
        });
    });
}
