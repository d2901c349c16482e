//! What goes on when a part is missing: the controller, a daemon, a link.

use mesh_tests::{CONTROLLER, Fleet, fleet_test};

#[test]
fn the_mesh_lives_without_its_controller() {
    fleet_test("outage::the_mesh_lives_without_its_controller", || {
        let mut fleet = Fleet::with_nodes(&["alpha", "bravo"]);
        fleet.processes.kill(CONTROLLER).unwrap();
        let (bravo, bravo6) = fleet.addresses_known("bravo");
        assert!(fleet.pings("alpha", bravo) && fleet.pings("alpha", bravo6));

        // A node that starts now knows its peers from its own disk.
        fleet.processes.kill("alpha").unwrap();
        fleet.start_node("alpha");
        fleet.until("alpha is back without a controller", |fleet| fleet.pings("alpha", bravo));

        fleet.start_controller();
        fleet.until("alpha found its controller again", |fleet| {
            fleet.meshctl("alpha", &["status", "-o", "json"]).json()["controllerConnected"] == true
        });
    });
}

#[test]
fn a_dead_daemon_leaks_nothing() {
    fleet_test("outage::a_dead_daemon_leaks_nothing", || {
        let mut fleet = Fleet::with_nodes(&["alpha", "bravo"]);
        let (bravo, bravo6) = fleet.addresses_known("bravo");
        // A default route is what makes a leak possible at all.
        let gateway = fleet.host("bravo").ipv4().unwrap();
        fleet.host("alpha").add_default_route(gateway).unwrap();
        fleet.processes.kill("alpha").unwrap();

        let capture = fleet.path("alpha").join("capture");
        let tcpdump = fleet.command(
            "alpha",
            "tcpdump",
            &[
                "-n",
                "-U",
                "-i",
                "any",
                "--immediate-mode",
                "-w",
                capture.to_str().unwrap(),
                "not",
                "port",
                "7443",
            ],
        );
        fleet.processes.spawn("tcpdump", tcpdump).unwrap();
        fleet.until("tcpdump listens", |fleet| fleet.processes.log("tcpdump").contains("listening on"));
        for address in [bravo, bravo6] {
            assert!(!fleet.pings("alpha", address), "{address} must be unreachable");
        }
        // The capture sees what does leave: a packet to the underlay.
        assert!(fleet.pings("alpha", gateway));
        fleet.until("the capture holds the underlay's echo", |fleet| {
            read_capture(fleet, &capture).contains(&gateway.to_string())
        });
        fleet.processes.stop("tcpdump").unwrap();
        let seen = read_capture(&fleet, &capture);
        for address in [bravo, bravo6] {
            assert!(!seen.contains(&address.to_string()), "a packet to {address} left in clear:\n{seen}");
        }
    });
}

fn read_capture(fleet: &Fleet, capture: &std::path::Path) -> String {
    fleet.on("alpha", "tcpdump", &["-n", "-r", capture.to_str().unwrap()]).stdout
}
