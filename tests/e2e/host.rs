//! What another program does to a node's host is put right by the node itself.

use mesh_tests::{Fleet, fleet_test};

#[test]
fn a_flushed_firewall_and_lost_routes_come_back() {
    fleet_test("host::a_flushed_firewall_and_lost_routes_come_back", || {
        let mut fleet = Fleet::with_nodes(&["alpha", "bravo"]);
        let (bravo, bravo6) = fleet.addresses_known("bravo");
        assert!(fleet.pings("alpha", bravo) && fleet.pings("alpha", bravo6));

        let table = |fleet: &Fleet| fleet.on("alpha", "nft", &["list", "table", "inet", "meshd"]).stdout;
        let before = table(&fleet);
        assert!(before.contains("chain overlay"), "{before}");
        fleet.on("alpha", "nft", &["flush", "ruleset"]);
        fleet.until("alpha's table is back", |fleet| table(fleet) == before);

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
