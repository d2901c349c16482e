//! Identities over time: leases end, expired nodes come back, sessions renew their keys.

use std::time::Duration;

use mesh_tests::{CONTROLLER, Fleet, fleet_test, move_clock};

/// Past the 72 h of an identity, within the 30 days in which it may resume.
const PAST_EXPIRY: &str = "+80h";

/// Restarts a role on host `name` with its clock moved.
fn restart_at(fleet: &mut Fleet, name: &str, offset: &str) {
    fleet.processes.stop(name).unwrap();
    let mut role =
        if name == CONTROLLER { fleet.controller_run_command() } else { fleet.node_command(name, &[], &[]) };
    move_clock(&mut role, offset);
    fleet.processes.spawn(name, role).unwrap();
    let host = name.to_owned();
    fleet.until(&format!("{name} answers in another time"), move |fleet| {
        fleet.meshctl(&host, &["status", "-o", "json"]).code == 0
    });
}

#[test]
fn an_expired_node_resumes_and_a_revoked_one_does_not() {
    fleet_test("lifetime::an_expired_node_resumes_and_a_revoked_one_does_not", || {
        let mut fleet = Fleet::with_nodes(&["alpha", "bravo", "charlie"]);
        let (alpha, bravo) = (fleet.addresses_known("alpha").0, fleet.addresses_known("bravo").0);
        fleet.processes.stop("charlie").unwrap();
        fleet.controller(&["node", "revoke", "charlie"]).ok();
        fleet.processes.stop("alpha").unwrap();
        fleet.processes.stop("bravo").unwrap();
        restart_at(&mut fleet, CONTROLLER, PAST_EXPIRY);
        for name in ["alpha", "bravo", "charlie"] {
            restart_at(&mut fleet, name, PAST_EXPIRY);
        }
        fleet.until("alpha and bravo are back", |fleet| {
            fleet.pings("alpha", bravo) && fleet.pings("bravo", alpha)
        });
        let nodes = fleet.controller(&["node", "ls", "-o", "json"]).ok().json();
        let state = |name: &str| {
            let node =
                nodes["items"].as_array().unwrap().iter().find(|node| node["name"] == name).cloned().unwrap();
            node["state"].as_str().unwrap().to_owned()
        };
        assert_eq!((state("alpha").as_str(), state("charlie").as_str()), ("ok", "revoked"), "{nodes}");
        assert!(!fleet.pings("charlie", alpha));
    });
}

#[test]
fn a_lease_ends_by_itself() {
    fleet_test("lifetime::a_lease_ends_by_itself", || {
        let mut fleet = Fleet::with_nodes(&["alpha", "bravo"]);
        let bravo = fleet.addresses_known("bravo").0;
        fleet.processes.kill(CONTROLLER).unwrap();
        // Within the lease the stored map is enough; after it the peer is gone.
        restart_at(&mut fleet, "alpha", "+40h");
        fleet.until("bravo answers within its lease", |fleet| fleet.pings("alpha", bravo));
        restart_at(&mut fleet, "alpha", PAST_EXPIRY);
        fleet.until("alpha says that it stands alone", |fleet| {
            let status = fleet.meshctl("alpha", &["status", "-o", "json"]).ok().json();
            status.to_string().contains("expired") || status["peers"].as_array().is_some_and(Vec::is_empty)
        });
        assert!(!fleet.pings("alpha", bravo));
    });
}

#[test]
fn sessions_renew_their_keys_without_the_controller() {
    fleet_test("lifetime::sessions_renew_their_keys_without_the_controller", || {
        let mut fleet = Fleet::with_nodes(&["alpha", "bravo"]);
        let bravo = fleet.addresses_known("bravo").0;
        fleet.processes.kill(CONTROLLER).unwrap();
        // A session is renewed after 120 s (WireGuard paper §6.1): 135 echoes, one a second, see it happen.
        let echoes = fleet.on("alpha", "ping", &["-n", "-q", "-i1", "-W1", "-c135", &bravo.to_string()]).ok();
        assert!(echoes.stdout.contains(" 0% packet loss"), "{echoes}");
        let status = fleet.meshctl("alpha", &["status", "-o", "json"]).ok().stdout;
        let handshake =
            status.split("last_handshake").nth(1).or_else(|| status.split("lastHandshake").nth(1));
        let when = handshake.and_then(|rest| rest.split('"').nth(2)).unwrap_or_default().to_owned();
        let age = fleet.on("alpha", "date", &["-d", &when, "+%s"]).ok().stdout;
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let age = now.saturating_sub(Duration::from_secs(age.trim().parse().unwrap()));
        assert!(age < Duration::from_secs(100), "no handshake for {age:?}: {status}");
    });
}
