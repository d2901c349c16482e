//! Enrollment interrupted at every step: the retry gets the same identity, or the token is intact.

use mesh_tests::{CONTROLLER, Fleet, fleet_test};

/// Failpoints on the node's side: the daemon ends itself at the named step.
const NODE_STEPS: [&str; 3] = ["node-enroll-after-keys", "node-enroll-after-send", "node-enroll-before-save"];
/// The same on the controller's side.
const CONTROLLER_STEPS: [&str; 3] = ["enroll-before-commit", "enroll-after-commit", "enroll-before-answer"];

#[test]
fn a_node_that_dies_while_enrolling_gets_the_same_identity() {
    fleet_test("enrollment::a_node_that_dies_while_enrolling_gets_the_same_identity", || {
        let mut fleet = Fleet::new();
        for (index, step) in NODE_STEPS.iter().enumerate() {
            let name = format!("web-{index}");
            fleet.add_host(&name);
            let token = fleet.token(&[]);
            fleet.start_node_with(&name, &[], &[("MESH_FAILPOINT", step)]);
            let died = fleet.meshctl(&name, &["enroll", &token, "--name", &name]);
            assert_ne!(died.code, 0, "{step} must interrupt: {died}");
            fleet.processes.wait(&name, mesh_tests::DEADLINE).unwrap();

            fleet.start_node(&name);
            fleet.meshctl(&name, &["enroll", &token, "--name", &name]).ok();
            one_node(&fleet, &name);
        }
    });
}

#[test]
fn a_controller_that_dies_while_enrolling_gives_one_identity() {
    fleet_test("enrollment::a_controller_that_dies_while_enrolling_gives_one_identity", || {
        let mut fleet = Fleet::new();
        for (index, step) in CONTROLLER_STEPS.iter().enumerate() {
            let name = format!("db-{index}");
            fleet.add_host(&name);
            fleet.start_node(&name);
            let token = fleet.token(&[]);
            fleet.processes.stop(CONTROLLER).unwrap();
            fleet.start_controller_with(&[("MESH_FAILPOINT", step)]);
            let died = fleet.meshctl(&name, &["enroll", &token, "--name", &name, "--timeout", "5s"]);
            assert_ne!(died.code, 0, "{step} must interrupt: {died}");
            fleet.processes.wait(CONTROLLER, mesh_tests::DEADLINE).unwrap();

            fleet.start_controller();
            fleet.meshctl(&name, &["enroll", &token, "--name", &name]).ok();
            one_node(&fleet, &name);
        }
    });
}

/// Exactly one node of that name, and the log tells of exactly one enrollment.
fn one_node(fleet: &Fleet, name: &str) {
    let nodes = fleet.controller(&["node", "ls", "-o", "json"]).ok().json();
    let same = nodes["items"].as_array().unwrap().iter().filter(|node| node["name"] == name).count();
    assert_eq!(same, 1, "{nodes}");
    let log = fleet.controller(&["audit", "log", "-o", "json"]).ok().json();
    let enrolled = log["items"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|entry| entry["action"] == "node.enroll" && entry["detail"].as_str().unwrap().contains(name))
        .count();
    assert_eq!(enrolled, 1, "{log}");
}

#[test]
fn a_token_for_another_root_is_never_sent() {
    fleet_test("enrollment::a_token_for_another_root_is_never_sent", || {
        let mut fleet = Fleet::new();
        let token = fleet.token(&[]);
        // Another controller, with another root, now answers at the address in the token.
        fleet.processes.stop(CONTROLLER).unwrap();
        std::fs::remove_dir_all(fleet.state(CONTROLLER)).unwrap();
        fleet.init_controller();
        fleet.start_controller();

        fleet.add_host("web-1");
        fleet.start_node("web-1");
        let refused = fleet.meshctl("web-1", &["enroll", &token]).refused("E0412", 4);
        assert!(refused.stderr.contains("token expects sha256:"), "{refused}");
        assert!(refused.stderr.contains("controller showed sha256:"), "{refused}");
        assert!(refused.stderr.contains("Nothing was sent"), "{refused}");
        // The controller never saw an attempt.
        let log = fleet.controller(&["audit", "log", "-o", "json"]).ok().stdout;
        assert!(!log.contains("web-1"), "{log}");
    });
}

#[test]
fn a_node_enrolls_by_itself_with_a_token_file() {
    fleet_test("enrollment::a_node_enrolls_by_itself_with_a_token_file", || {
        let mut fleet = Fleet::new();
        fleet.add_host("web-1");
        let token = fleet.path("web-1").join("token");
        std::fs::write(&token, fleet.token(&["--name", "web-1"])).unwrap();
        fleet.start_node_with("web-1", &["--token-file", token.to_str().unwrap(), "--name", "web-1"], &[]);
        fleet.until("web-1 has enrolled itself", |fleet| {
            fleet.controller(&["node", "show", "web-1"]).code == 0
        });

        // The same token again, on another machine: refused, and the daemon ends with that code.
        fleet.add_host("web-2");
        let command =
            fleet.node_command("web-2", &["--token-file", token.to_str().unwrap(), "--name", "web-1"], &[]);
        fleet.processes.spawn("web-2", command).unwrap();
        let status = fleet.processes.wait("web-2", mesh_tests::DEADLINE).unwrap();
        assert_eq!(status.code(), Some(4), "{}", fleet.processes.log("web-2"));
        assert!(fleet.processes.log("web-2").contains("error[E04"), "{}", fleet.processes.log("web-2"));
    });
}

#[test]
fn approval_is_waited_for() {
    fleet_test("enrollment::approval_is_waited_for", || {
        let mut fleet = Fleet::new();
        fleet.add_host("web-1");
        fleet.start_node("web-1");
        let token = fleet.token(&["--require-approval"]);
        let waiting = fleet.meshctl_command("web-1", &["enroll", &token, "--name", "web-1"]);
        fleet.processes.spawn("enroll", waiting).unwrap();
        fleet.until("the enrollment says which command approves it", |fleet| {
            fleet.processes.log("enroll").contains("meshctl node approve web-1")
        });
        let pending = fleet.controller(&["node", "show", "web-1", "-o", "json"]).ok();
        assert!(pending.stdout.contains("pending"), "{pending}");
        fleet.controller(&["node", "approve", "web-1"]).ok();
        let status = fleet.processes.wait("enroll", mesh_tests::DEADLINE).unwrap();
        assert_eq!(status.code(), Some(0), "{}", fleet.processes.log("enroll"));
    });
}
