//! Everything a running controller signed, before judges that share no code with us.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use mesh_tests::{Fleet, fleet_test, run};
use serde_json::{Value, json};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests lie in the repository").to_owned()
}

/// What a leaf of a profile may be used for.
fn uses(profile: &str) -> Value {
    match profile {
        "server" => json!(["server"]),
        "client" => json!(["client"]),
        "ocsp" => json!([]),
        _ => json!(["server", "client"]),
    }
}

/// PEM blocks, each with its lines.
fn blocks(text: &str) -> Vec<String> {
    let ends = text.split_inclusive("-----\n").collect::<Vec<_>>();
    ends.chunks(2).filter(|pair| pair.len() == 2).map(|pair| pair.concat()).collect()
}

#[test]
fn every_certificate_and_crl_of_a_fleet_is_accepted_by_foreign_judges() {
    judge("judged::every_certificate_and_crl_of_a_fleet_is_accepted_by_foreign_judges", "p256");
}

#[test]
fn those_of_a_fleet_with_p384_cas_are_accepted() {
    judge("judged::those_of_a_fleet_with_p384_cas_are_accepted", "p384");
}

#[test]
fn those_of_a_fleet_with_ed25519_cas_are_accepted() {
    judge("judged::those_of_a_fleet_with_ed25519_cas_are_accepted", "ed25519");
}

/// A fleet whose CAs have keys of a type does what fleets do, before all judges.
fn judge(test: &str, key_type: &str) {
    fleet_test(test, || {
        let fleet = Fleet::with_nodes_and(&["alpha", "bravo"], &["--key-type", key_type]);
        for (node, name, profile) in [
            ("alpha", "alpha.mesh.internal", "server"),
            ("alpha", "out.alpha.mesh.internal", "client"),
            ("alpha", "both.alpha.mesh.internal", "peer"),
            ("bravo", "lost.bravo.mesh.internal", "server"),
        ] {
            let out = fleet.path(node).join(name).display().to_string();
            fleet.meshctl(node, &["cert", "issue", name, "--profile", profile, "--out", &out]).ok();
        }
        // An operator, and what the operator writes for a machine that is no node.
        let token = fleet.controller(&["operator", "add", "alice", "--role", "admin"]).ok().stdout;
        fs::write(fleet.path("alpha").join("login"), token.trim()).unwrap();
        let login = fleet.path("alpha").join("login").display().to_string();
        let url = format!("https://{}", fleet.controller_url());
        fleet.meshctl("alpha", &["login", &url, "--token-file", &login]).ok();
        let detached = fleet.path("detached").display().to_string();
        fleet.controller(&["cert", "issue", "printer.mesh.internal", "--out", &detached]).ok();
        fleet.controller(&["cert", "revoke", "lost.bravo.mesh.internal", "--reason", "key-compromise"]).ok();
        fleet.controller(&["node", "revoke", "bravo", "--reason", "key-compromise"]).ok();

        let folder = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
        put("root.pem", &fleet.controller(&["ca", "root"]).ok().stdout);
        let chain = fs::read_to_string(fleet.path("detached").join("cert.pem")).unwrap();
        put("issuing.pem", &blocks(&chain)[1]);
        let crls = blocks(&fleet.controller(&["ca", "crl"]).ok().stdout);
        assert_eq!(crls.len(), 2, "one of the issuing CA, one of the root");
        put("issuing.crl.pem", &crls[0]);
        put("root.crl.pem", &crls[1]);

        let listed = fleet.controller(&["cert", "ls", "--all", "-o", "json"]).ok().json();
        let (mut leaves, mut profiles) = (serde_json::Map::new(), std::collections::BTreeSet::new());
        for item in listed["items"].as_array().unwrap() {
            let (serial, profile) = (item["serial"].as_str().unwrap(), item["profile"].as_str().unwrap());
            let shown = fleet.controller(&["cert", "show", serial, "-o", "json"]).ok().json();
            let pem =
                shown.pointer("/item/pem").or_else(|| shown.get("pem")).and_then(Value::as_str).unwrap();
            let name = format!("leaf-{profile}-{}.pem", &serial[..8]);
            put(&name, pem);
            let names = item["names"].as_array().unwrap();
            let host = names.iter().find(|name| name.as_str().unwrap().parse::<std::net::IpAddr>().is_err());
            let revoked = item["state"] == "revoked";
            profiles.insert((profile.to_owned(), revoked));
            leaves.insert(name, json!({ "uses": uses(profile), "host": host, "revoked": revoked }));
        }
        let expected = [
            ("client", false),
            ("controller", false),
            ("node", false),
            ("node", true),
            ("operator", false),
            ("peer", false),
            ("server", false),
            ("server", true),
        ];
        let expected = expected.map(|(profile, revoked)| (profile.to_owned(), revoked));
        assert!(expected.iter().all(|kind| profiles.contains(kind)), "{profiles:?}");
        put("fleet.json", &Value::Object(leaves).to_string());

        let mut judge = Command::new(repository().join(".venv/bin/python"));
        judge.arg(repository().join("tests/judges/judge.py")).arg(folder.path());
        let said = run(judge).ok();
        assert!(said.stdout.contains(" 0 wrong"), "{said}");
    });
}
