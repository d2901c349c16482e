//! A name has one owner: nodes and grants cannot take one another's.

use mesh_tests::{CONTROLLER, Fleet, Ran, fleet_test};

fn apply(fleet: &Fleet, grants: &[(&str, &str)]) -> Ran {
    let mut policy = String::from("[[allow]]\nfrom = [\"*\"]\nto = [\"*\"]\n");
    for (name, to) in grants {
        policy.push_str(&format!("\n[[grant]]\nnames = [{name:?}]\nto = [{to:?}]\n"));
    }
    let file = fleet.path(CONTROLLER).join("policy.toml");
    std::fs::write(&file, policy).unwrap();
    fleet.controller(&["policy", "apply", file.to_str().unwrap()])
}

/// A policy with one custom profile that gives `name` by `rule`: `exact` or `below`.
fn apply_profile(fleet: &Fleet, rule: &str, name: &str) -> Ran {
    let policy = format!(
        "[[allow]]\nfrom = [\"*\"]\nto = [\"*\"]\n[profile.p]\nkind = \"server\"\n\
         [[profile.p.names]]\nto = [\"node:bravo\"]\n{rule} = [{name:?}]\n"
    );
    let file = fleet.path(CONTROLLER).join("policy.toml");
    std::fs::write(&file, policy).unwrap();
    fleet.controller(&["policy", "apply", file.to_str().unwrap()])
}

#[test]
fn neither_takes_the_others() {
    fleet_test("names::neither_takes_the_others", || {
        let mut fleet = Fleet::with_nodes(&["alpha", "bravo"]);
        apply(&fleet, &[("api.mesh.internal", "node:bravo"), ("deep.api2.mesh.internal", "node:bravo")]).ok();

        // A node cannot be called like a grant, nor like what a grant lies below.
        for host in ["api", "api2"] {
            fleet.add_host(host);
            fleet.start_node(host);
        }
        let token = fleet.token(&[]);
        fleet.meshctl("api", &["enroll", &token, "--name", "api"]).refused("E0502", 7);
        // A token made for that name does not help, wherever it is refused.
        let bound = fleet.controller(&["token", "create", "--name", "api"]);
        match bound.code {
            0 => fleet.meshctl("api", &["enroll", bound.stdout.trim(), "--name", "api"]).refused("E0502", 7),
            _ => bound.refused("E0502", 7),
        };
        // `deep.api2` below a node `api2` would be that node's own to hand out.
        fleet.meshctl("api2", &["enroll", &token, "--name", "api2"]).refused("E0502", 7);

        // No grant is called like a node, or lies below one, or is reserved, or outside.
        for name in [
            "alpha.mesh.internal",
            "x.alpha.mesh.internal",
            "controller.mesh.internal",
            "ca.mesh.internal",
            "mesh.internal",
            "*.mesh.internal",
            "api.example.com",
            "alpha",
        ] {
            let by_profile = ["exact", "below"].map(|rule| apply_profile(&fleet, rule, name));
            for refused in by_profile.into_iter().chain([apply(&fleet, &[(name, "node:bravo")])]) {
                assert!(
                    [2, 7].contains(&refused.code) && refused.stderr.contains("error[E0"),
                    "{name}: {refused}"
                );
            }
        }
        // The old policy stands, with its grants.
        let out = fleet.path("bravo").join("tls");
        let issue = ["cert", "issue", "api.mesh.internal", "--out", out.to_str().unwrap()];
        fleet.meshctl("bravo", &issue).ok();
        let theirs = fleet.path("alpha").join("tls");
        let steal = ["cert", "issue", "api.mesh.internal", "--out", theirs.to_str().unwrap()];
        fleet.meshctl("alpha", &steal).refused("E0505", 4);

        // A name that a profile gives is nobody's under the built-in ones, and no node's.
        apply_profile(&fleet, "below", "shop.mesh.internal").ok();
        let out = fleet.path("bravo").join("shop");
        let issue = ["cert", "issue", "a.shop.mesh.internal", "--out", out.to_str().unwrap()];
        fleet.meshctl("bravo", &issue).refused("E0505", 4);
        fleet.meshctl("bravo", &[&issue[..], &["--profile", "p"]].concat()).ok();
        fleet.meshctl("alpha", &[&issue[..], &["--profile", "p"]].concat()).refused("E0571", 4);
        fleet.meshctl("api2", &["enroll", &token, "--name", "shop"]).refused("E0502", 7);

        // The name of a node that was revoked does not become a grant's by that.
        fleet.controller(&["node", "revoke", "alpha", "--yes"]).ok();
        let refused = apply(&fleet, &[("alpha.mesh.internal", "node:bravo")]);
        assert_ne!(refused.code, 0, "{refused}");
    });
}

#[test]
fn a_name_that_an_operator_gave_out_is_no_nodes() {
    fleet_test("names::a_name_that_an_operator_gave_out_is_no_nodes", || {
        let mut fleet = Fleet::with_nodes(&["alpha"]);
        let out = fleet.path(CONTROLLER).join("svc");
        fleet.controller(&["cert", "issue", "svc.mesh.internal", "--out", out.to_str().unwrap()]).ok();
        fleet.add_host("svc");
        fleet.start_node("svc");
        let token = fleet.token(&[]);
        fleet.meshctl("svc", &["enroll", &token, "--name", "svc"]).refused("E0502", 7);
        let taken = fleet.path("alpha").join("tls");
        let issue = ["cert", "issue", "svc.mesh.internal", "--out", taken.to_str().unwrap()];
        let refused = fleet.meshctl("alpha", &issue);
        assert_ne!(refused.code, 0, "{refused}");
    });
}
