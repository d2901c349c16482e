//! What another program does to a node's host is put right by the node itself.

use std::time::Duration;

use mesh_lab::Lab;
use mesh_tests::{Fleet, binary, fleet_test};

/// Well under what finds out otherwise: a tick of 10 s, a keepalive of 20 s, a handshake after 25 s.
const AT_ONCE: Duration = Duration::from_secs(5);

#[test]
fn a_host_that_moves_is_back_at_once() {
    fleet_test("host::a_host_that_moves_is_back_at_once", || {
        let mut fleet = Fleet::with_nodes(&["alpha", "bravo", "charlie"]);
        let alpha = fleet.addresses_known("alpha").0;
        for (round, number) in [200, 201].into_iter().enumerate() {
            fleet.host("alpha").set_addresses(&Lab::underlay(number)).unwrap();
            for peer in ["bravo", "charlie"] {
                let what = format!("{peer} reaches alpha where it is now");
                fleet.within(&what, AT_ONCE, |fleet| fleet.pings(peer, alpha));
            }
            let tag = format!("round-{round}");
            fleet.controller(&["node", "tag", "alpha", &format!("+{tag}")]).ok();
            fleet.within("alpha hears its controller", AT_ONCE, |fleet| {
                fleet.meshctl("alpha", &["status", "-o", "json"]).ok().stdout.contains(&tag)
            });
        }
        let moves = fleet.processes.log("alpha").matches("this host has moved, connecting anew").count();
        assert!(moves >= 2, "the uplink saw {moves} moves");
    });
}

/// Whether this kernel has WireGuard of its own.
fn kernel_has_wireguard(fleet: &Fleet, host: &str) -> bool {
    let made = fleet.on(host, "ip", &["link", "add", "wg-probe", "type", "wireguard"]);
    if made.code == 0 {
        fleet.on(host, "ip", &["link", "del", "wg-probe"]).ok();
    }
    made.code == 0
}

#[test]
fn the_kernels_wireguard_is_used_where_it_exists_and_refused_where_not() {
    fleet_test("host::the_kernels_wireguard_is_used_where_it_exists_and_refused_where_not", || {
        let mut fleet = Fleet::with_nodes(&["alpha"]);
        let has = kernel_has_wireguard(&fleet, "alpha");
        let status = fleet.meshctl("alpha", &["status", "-o", "json"]).ok().json();
        assert_eq!(status["backend"], if has { "kernel" } else { "userspace" });
        let why = status["whyNotKernel"].as_str().unwrap();
        assert_eq!(why.contains("module `wireguard`"), !has, "{why}");
        let wide = fleet.meshctl("alpha", &["status", "-o", "wide"]).ok().stdout;
        assert_eq!(wide.contains("not the kernel's WireGuard: "), !has, "{wide}");

        fleet.processes.kill("alpha").unwrap();
        let state = fleet.state("alpha").display().to_string();
        let socket = fleet.path("alpha").join("other.sock").display().to_string();
        let args = ["node", "run", "--state-dir", &state, "--socket", &socket, "--wg-port", "0", "--backend"];
        let run =
            |backend| fleet.on("alpha", binary("meshd").to_str().unwrap(), &[&args[..], &[backend]].concat());
        run("hardware").refused("E0113", 2);
        if !has {
            let refused = run("kernel").refused("E0121", 1);
            for part in ["modprobe wireguard", "--backend userspace"] {
                assert!(refused.stderr.contains(part), "{part} in {refused}");
            }
        }
    });
}

#[test]
fn a_flushed_firewall_and_lost_routes_come_back() {
    fleet_test("host::a_flushed_firewall_and_lost_routes_come_back", || {
        let mut fleet = Fleet::with_nodes(&["alpha", "bravo"]);
        let (bravo, bravo6) = fleet.addresses_known("bravo");
        assert!(fleet.pings("alpha", bravo) && fleet.pings("alpha", bravo6));

        let table = |fleet: &Fleet| fleet.on("alpha", "nft", &["list", "table", "inet", "meshd"]).stdout;
        let before = table(&fleet);
        assert!(before.contains("chain overlay"), "{before}");
        // Each far sooner than the next tick, which one of them could meet by chance.
        for _ in 0..4 {
            fleet.on("alpha", "nft", &["flush", "ruleset"]);
            fleet.within("alpha's table is back", Duration::from_secs(3), |fleet| table(fleet) == before);
        }

        let routes = |fleet: &Fleet| {
            let routes = fleet.on("alpha", "ip", &["route"]).stdout;
            routes + &fleet.on("alpha", "ip", &["-6", "route", "show", "type", "unreachable"]).stdout
        };
        let before = routes(&fleet);
        assert!(before.contains("unreachable"), "{before}");
        for change in ["link set mesh0 down", "link set mesh0 up", "route flush type unreachable"] {
            fleet.on("alpha", "ip", &change.split(' ').collect::<Vec<_>>());
        }
        assert_ne!(routes(&fleet), before);
        fleet.until("alpha's routes are back", |fleet| routes(fleet) == before);
        fleet.until("alpha reaches bravo again", |fleet| {
            fleet.pings("alpha", bravo) && fleet.pings("alpha", bravo6)
        });
    });
}
