//! What operators do with a fleet day by day.

use mesh_lab::Lab;
use mesh_tests::{CONTROLLER, Fleet, fleet_test};

#[test]
fn a_node_that_left_is_forgotten_and_may_come_back() {
    fleet_test("operations::a_node_that_left_is_forgotten_and_may_come_back", || {
        let mut fleet = Fleet::with_nodes(&["alpha", "bravo"]);
        let bravo = fleet.addresses_known("bravo").0;
        fleet.meshctl("bravo", &["leave", "--yes"]).ok();
        fleet.until("alpha dropped bravo", |fleet| !fleet.pings("alpha", bravo));
        fleet.until("the controller lists one node", |fleet| {
            let nodes = fleet.controller(&["node", "ls", "-o", "json"]).ok().json();
            let live = |node: &&serde_json::Value| node["state"] != "revoked";
            nodes["items"].as_array().unwrap().iter().filter(live).count() == 1
        });
        // Nothing of the mesh is left on the host.
        let routes = fleet.on("bravo", "ip", &["route", "show", "table", "all"]).stdout;
        assert!(!routes.contains("100.64.0.0/10"), "{routes}");
        fleet.enroll("bravo", &["--name", "bravo"]);
        fleet.wait_meshed(&["alpha", "bravo"]);
    });
}

#[test]
fn who_leaves_hears_it_from_a_slow_controller_too() {
    fleet_test("operations::who_leaves_hears_it_from_a_slow_controller_too", || {
        let mut fleet = Fleet::without_controller();
        fleet.init_controller();
        fleet.start_controller_with(&[("MESH_FAILPOINT", "leave-answer-slow")]);
        fleet.add_host("alpha");
        fleet.start_node("alpha");
        fleet.enroll("alpha", &[]);
        let left = fleet.meshctl("alpha", &["leave", "--yes"]).ok();
        assert!(!left.to_string().contains("was not told"), "{left}");
        fleet.controller(&["node", "show", "alpha"]).exits(6);
    });
}

#[test]
fn a_host_that_moves_is_found_again() {
    fleet_test("operations::a_host_that_moves_is_found_again", || {
        let mut fleet = Fleet::with_nodes(&["alpha", "bravo"]);
        let (alpha, bravo) = (fleet.addresses_known("alpha").0, fleet.addresses_known("bravo").0);
        fleet.host("bravo").set_addresses(&Lab::underlay(200)).unwrap();
        // Bravo speaks first from its new place: alpha follows what is authenticated.
        fleet.until("bravo is back after its move", |fleet| fleet.pings("bravo", alpha));
        assert!(fleet.pings("alpha", bravo));
        fleet.until("the controller sees bravo again", |fleet| {
            let node = fleet.controller(&["node", "show", "bravo", "-o", "json"]).json();
            node["connected"] == true
        });
    });
}

#[test]
fn pairs_are_declared_in_certs_d() {
    fleet_test("operations::pairs_are_declared_in_certs_d", || {
        let mut fleet = Fleet::new();
        fleet.add_host("alpha");
        let folder = fleet.path("alpha").join("certs.d");
        let out = fleet.path("alpha").join("declared");
        std::fs::create_dir_all(&folder).unwrap();
        let pair = format!(
            "[[pair]]\nnames = [\"db.alpha.mesh.internal\"]\nout = {:?}\nprofile = \"server\"\n",
            out.to_str().unwrap()
        );
        std::fs::write(folder.join("db.toml"), pair).unwrap();
        fleet.start_node("alpha");
        fleet.enroll("alpha", &[]);
        fleet.until("the declared pair is there", |_| {
            out.join("cert.pem").exists() && out.join("key.pem").exists()
        });
        let (ca, crl, cert) = (out.join("ca.pem"), out.join("crl.pem"), out.join("cert.pem"));
        let path = |path: &std::path::Path| path.to_str().unwrap().to_owned();
        let judged = fleet.on(
            "alpha",
            "openssl",
            &[
                "verify",
                "-x509_strict",
                "-crl_check_all",
                "-CAfile",
                &path(&ca),
                "-CRLfile",
                &path(&crl),
                "-untrusted",
                &path(&cert),
                "-verify_hostname",
                "db.alpha.mesh.internal",
                &path(&cert),
            ],
        );
        judged.ok();
    });
}

#[test]
fn an_operator_logs_in_and_is_removed() {
    fleet_test("operations::an_operator_logs_in_and_is_removed", || {
        let mut fleet = Fleet::new();
        fleet.add_host("laptop");
        let token =
            fleet.controller(&["operator", "add", "alice", "--role", "admin"]).ok().stdout.trim().to_owned();
        let url = format!("https://{}", fleet.controller_url());
        let file = fleet.path("laptop").join("token");
        std::fs::write(&file, token).unwrap();
        let alice =
            |args: &[&str]| mesh_tests::run(fleet.command("laptop", mesh_tests::binary("meshctl"), args));
        alice(&["login", &url, "--token-file", file.to_str().unwrap()]).ok();
        alice(&["node", "ls", "-o", "json"]).ok();
        let log = fleet.controller(&["audit", "log", "-o", "json"]).ok().stdout;
        assert!(log.contains("alice"), "{log}");
        // A key made on the laptop, signed by the controller.
        let out = fleet.path("laptop").join("tls");
        alice(&["cert", "issue", "api.mesh.internal", "--out", out.to_str().unwrap()]).ok();
        assert!(out.join("key.pem").exists());

        fleet.controller(&["operator", "rm", "alice"]).ok();
        let refused = alice(&["node", "ls"]);
        assert_eq!(refused.code, 4, "{refused}");
        // The one-time token does not work twice.
        assert_ne!(alice(&["login", &url, "--token-file", file.to_str().unwrap()]).code, 0);
        assert!(fleet.processes.is_running(CONTROLLER));
    });
}
