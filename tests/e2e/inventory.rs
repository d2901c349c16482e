//! What people look at certificates with: verify, inspect, the machine's trust store, and who would outlive an outage.

use std::path::Path;

use mesh_tests::{CONTROLLER, Fleet, fleet_test};

const NAME: &str = "shop.alpha.mesh.internal";

/// A self-signed certificate of OpenSSL's, with these extensions.
fn self_signed(fleet: &Fleet, file: &str, days: &str, extensions: &[&str]) -> String {
    let path = fleet.path("alpha").join(file);
    let (out, key) = (path.display().to_string(), format!("{}.key", path.display()));
    let mut args = vec!["req", "-x509", "-nodes", "-newkey", "rsa:2048", "-subj", "/CN=other", "-days", days];
    args.extend(["-keyout", &key, "-out", &out]);
    extensions.iter().for_each(|extension| args.extend(["-addext", extension]));
    fleet.on("alpha", "openssl", &args).ok();
    out
}

/// Why the pair does not hold, by people's and by programs' form.
fn why(fleet: &Fleet, args: &[&str]) -> String {
    let verify = [&["cert", "verify"], args].concat();
    let said = fleet.meshctl("alpha", &verify).exits(3);
    let json = fleet.meshctl("alpha", &[&verify[..], &["-o", "json"]].concat()).exits(3).json();
    assert_eq!(json["valid"], false, "{json}");
    let why = json["why"].as_str().unwrap().to_owned();
    assert!(said.stderr.contains(&why), "{said}");
    why
}

fn verified(fleet: &mut Fleet, pair: &Path) {
    let cert = pair.join("cert.pem").display().to_string();
    let good = fleet.meshctl("alpha", &["cert", "verify", &cert, "-o", "json"]).ok().json();
    assert_eq!((&good["valid"], &good["revocationChecked"]), (&true.into(), &true.into()), "{good}");
    assert!(good["revocationAsOf"].as_str().unwrap().ends_with('Z'), "{good}");
    let said = fleet.meshctl("alpha", &["cert", "verify", &cert]).ok();
    assert!(said.stdout.contains("not revoked by CRLs of"), "{said}");

    let other = self_signed(fleet, "other.pem", "30", &["keyUsage=critical,keyCertSign,cRLSign"]);
    assert!(why(fleet, &[&cert, "--ca", &other]).contains("does not lead to the root"));
    // The root's list alone says nothing of the leaf.
    let crls = std::fs::read_to_string(pair.join("crl.pem")).unwrap();
    let last = crls.rfind("-----BEGIN").unwrap();
    let root_only = fleet.path("alpha").join("root-only.pem");
    std::fs::write(&root_only, &crls[last..]).unwrap();
    let said = why(fleet, &[&cert, "--crl", root_only.to_str().unwrap()]);
    assert!(said.contains("says nothing about a certificate of its chain"), "{said}");
    let changed = fleet.path("alpha").join("changed");
    std::fs::create_dir(&changed).unwrap();
    for file in ["cert.pem", "ca.pem", "crl.pem"] {
        std::fs::copy(pair.join(file), changed.join(file)).unwrap();
    }
    let foreign_key = fleet.path("alpha").join("other.pem.key");
    std::fs::copy(foreign_key, changed.join("key.pem")).unwrap();
    assert!(why(fleet, &[changed.join("cert.pem").to_str().unwrap()]).contains("another certificate"));

    fleet.controller(&["cert", "revoke", NAME, "--reason", "key-compromise", "--wait"]).ok();
    assert_eq!(why(fleet, &[&cert]), "it is revoked");
}

fn inspected(fleet: &mut Fleet, pair: &Path) {
    let file = |name: &str| pair.join(name).display().to_string();
    let serve =
        ["s_server", "-accept", "8444", "-quiet", "-cert", &file("cert.pem"), "-key", &file("key.pem")];
    let chain = ["-cert_chain", &file("cert.pem")];
    let server = fleet.command("alpha", "openssl", &[&serve[..], &chain].concat());
    fleet.processes.spawn("s_server", server).unwrap();
    let (alpha, _) = fleet.addresses("alpha");
    let url = format!("https://{alpha}:8444");
    fleet.until("the server answers", |fleet| fleet.meshctl("alpha", &["cert", "inspect", &url]).code == 0);
    let shown = fleet.meshctl("alpha", &["cert", "inspect", &url, "-o", "json"]).ok().json();
    let leaf = &shown["items"][0];
    assert_eq!((&leaf["names"][0], &leaf["findings"]), (&NAME.into(), &serde_json::json!([])), "{shown}");
    // The controller asks its callers for certificates, and shows its own all the same.
    let url = format!("https://{}", fleet.controller_url());
    let shown = fleet.controller(&["cert", "inspect", &url, "-o", "json"]).ok().json();
    let items = shown["items"].as_array().unwrap();
    assert_eq!(items.len(), 3, "leaf, issuing CA, root: {shown}");
    assert!(items[0]["spiffe"].as_str().unwrap().contains("/controller/"), "{shown}");

    // What strict verifiers refuse is said of a file from elsewhere.
    let bad = self_signed(fleet, "bad.pem", "4000", &["basicConstraints=CA:FALSE", "keyUsage=keyCertSign"]);
    let shown = fleet.meshctl("alpha", &["cert", "inspect", &bad, "-o", "json"]).exits(3).json();
    assert!(!shown["items"][0]["findings"].as_array().unwrap().is_empty(), "{shown}");
    fleet.meshctl("alpha", &["cert", "inspect", "https://127.0.0.1:1"]).exits(5);
}

/// In a folder that stands for the machine's; judged by OpenSSL with nothing but that machine's store.
fn trusted(fleet: &Fleet, pair: &Path) {
    let machine = fleet.path("alpha").join("machine");
    for below in ["usr/share/ca-certificates", "etc/ca-certificates/update.d"] {
        std::fs::create_dir_all(machine.join(below)).unwrap();
    }
    std::fs::write(machine.join("etc/ca-certificates.conf"), "").unwrap();
    let (root, ca) = (machine.display().to_string(), pair.join("ca.pem").display().to_string());
    let place = |verb: &str| {
        let args = ["ca", "trust", verb, "--root", &root, "--ca", &ca, "-o", "json"];
        fleet.meshctl("alpha", &args).ok().json()["changed"].clone()
    };
    let store = machine.join("etc/ssl/certs/ca-certificates.crt").display().to_string();
    let cert = pair.join("cert.pem").display().to_string();
    let judged = || {
        let verify = ["verify", "-no-CApath", "-no-CAstore", "-CAfile", &store, "-untrusted", &cert, &cert];
        fleet.on("alpha", "openssl", &verify).code == 0
    };
    assert_eq!((place("install"), judged()), (true.into(), true));
    assert_eq!((place("install"), judged()), (false.into(), true));
    assert_eq!((place("remove"), judged()), (true.into(), false));
    assert_eq!(place("remove"), false);
    // A leaf is no root.
    let leaf = ["ca", "trust", "install", "--root", &root, "--ca", &cert];
    assert_ne!(fleet.meshctl("alpha", &leaf).code, 0);
    assert!(!judged());

    // A folder is meant as seen from where the command is typed, and must be there.
    let up = "../".repeat(std::env::current_dir().unwrap().components().count() - 1);
    let relative = format!("{up}{}", root.trim_start_matches('/'));
    fleet.meshctl("alpha", &["ca", "trust", "install", "--root", &relative, "--ca", &ca]).ok();
    assert!(judged());
    assert_eq!((place("remove"), judged()), (true.into(), false));
    let nowhere = format!("{root}/nowhere");
    fleet.meshctl("alpha", &["ca", "trust", "install", "--root", &nowhere, "--ca", &ca]).refused("E0102", 6);

    // Something of the machine's own takes it out again: that is looked for, not believed.
    let hook = machine.join("etc/ca-certificates/update.d/empty");
    std::fs::write(&hook, format!("#!/bin/sh\n: > {store}\n")).unwrap();
    fleet.on("alpha", "chmod", &["755", hook.to_str().unwrap()]).ok();
    let install = ["ca", "trust", "install", "--root", &root, "--ca", &ca];
    let refused = fleet.meshctl("alpha", &install).refused("E0524", 1);
    assert!(refused.stderr.contains("is not in") && !judged(), "{refused}");
}

#[test]
fn certificates_are_verified_inspected_trusted_and_counted() {
    fleet_test("inventory::certificates_are_verified_inspected_trusted_and_counted", || {
        let mut fleet = Fleet::with_nodes(&["alpha"]);
        let pair = fleet.path("alpha").join("tls");
        let out = pair.display().to_string();
        fleet.meshctl("alpha", &["cert", "issue", NAME, "--profile", "server", "--out", &out]).ok();

        inspected(&mut fleet, &pair);
        trusted(&fleet, &pair);

        // Identities live 72 h: after 60 h all are there, after four days none is.
        assert_eq!(
            fleet.controller(&["doctor", "--outage", "60h", "-o", "json"]).ok().json()["ending"],
            serde_json::json!([])
        );
        let report = fleet.controller(&["doctor", "--outage", "4d", "-o", "json"]).exits(3).json();
        let ending = report["ending"].as_array().unwrap();
        for (owner, profile) in [("alpha", "node"), ("alpha", "server")] {
            let found = ending
                .iter()
                .any(|item| item["owner"].as_str().unwrap().contains(owner) && item["profile"] == profile);
            assert!(found, "{owner} {profile}: {report}");
        }
        assert!(fleet.host(CONTROLLER).ipv4().is_some());

        verified(&mut fleet, &pair);
    });
}
