//! One revoke cuts a node off everywhere.

use mesh_tests::{Fleet, fleet_test};

#[test]
fn a_revoked_node_is_cut_off_by_every_peer_and_the_controller() {
    fleet_test("revocation::a_revoked_node_is_cut_off_by_every_peer_and_the_controller", || {
        let mut fleet = Fleet::with_nodes(&["alpha", "bravo", "charlie"]);
        let (alpha, _) = fleet.addresses_known("alpha");
        let (charlie, charlie6) = fleet.addresses_known("charlie");

        let revoked = fleet.controller(&[
            "node",
            "revoke",
            "charlie",
            "--reason",
            "key-compromise",
            "--wait",
            "-o",
            "json",
        ]);
        assert_eq!(revoked.ok().json()["changed"], true);
        // The receipts say so; now it must be so.
        assert!(!fleet.pings("alpha", charlie) && !fleet.pings("bravo", charlie6));
        assert!(!fleet.pings("charlie", alpha));

        // Idempotent, and it does not come back: not with its identity, not with a new token for the old name.
        let again = fleet.controller(&["node", "revoke", "charlie", "-o", "json"]).ok().json();
        assert_eq!(again["changed"], false);
        fleet.processes.kill("charlie").unwrap();
        fleet.start_node("charlie");
        fleet.until("charlie knows that it is revoked", |fleet| {
            fleet.meshctl("charlie", &["status"]).stdout.contains("revoked")
        });
        assert!(!fleet.pings("charlie", alpha));
        fleet.add_host("thief");
        fleet.start_node("thief");
        let token = fleet.token(&[]);
        let refused = fleet.meshctl("thief", &["enroll", &token, "--name", "charlie"]);
        assert!(refused.code == 4 || refused.code == 7, "{refused}");
        // An operator may give the name away again, by a token that says so.
        fleet.controller(&["node", "rm", "charlie", "--yes"]).ok();
        let token = fleet.token(&["--name", "charlie"]);
        fleet.meshctl("thief", &["enroll", &token, "--name", "charlie"]).ok();
    });
}
