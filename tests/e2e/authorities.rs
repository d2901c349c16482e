//! Authorities take each other's place in a live fleet.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use mesh_lab::transcript::assert_shown;
use mesh_tests::{Fleet, fleet_test};

use crate::services::Service;

const PAGE: &str = include_str!("../../docs/ca.md");

fn rotation(fleet: &Fleet) -> serde_json::Value {
    fleet.controller(&["ca", "rotate", "status", "-o", "json"]).ok().json()
}

fn fingerprint(fleet: &Fleet) -> String {
    fleet.controller(&["ca", "fingerprint"]).ok().stdout
}

fn certificates_in(path: &Path) -> usize {
    std::fs::read_to_string(path).unwrap().matches("BEGIN CERTIFICATE").count()
}

/// Lets the controller take every step, and waits for the end.
fn rotate(service: &mut Service, arguments: &[&str]) {
    let command = [&["ca", "rotate", "start", "--auto", "-o", "json"], arguments].concat();
    let started = service.fleet.controller(&command).ok().json();
    assert_eq!((started["running"].as_bool(), started["phase"].as_str()), (Some(true), Some("trust")));
    let mut last = serde_json::Value::Null;
    let ended = mesh_tests::wait_until("the rotation's end", mesh_tests::DEADLINE * 2, || {
        last = rotation(&service.fleet);
        last["running"] == false
    });
    if let Err(error) = ended {
        panic!("{error}: {last}\n{}", service.fleet.processes.log_tails(60));
    }
}

#[test]
fn issuing_ca_and_root_are_replaced_under_requests_and_none_fails() {
    fleet_test("authorities::issuing_ca_and_root_are_replaced_under_requests_and_none_fails", || {
        let mut service = Service::start();
        let alpha: PathBuf = service.pair("alpha");
        let first_root = fingerprint(&service.fleet);
        let early = service.fleet.token(&["--ttl", "1h"]);
        let requester = service.requester();
        let (stop, failed, answered) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let ran = requester.request(Some(&alpha));
                    if ran.stdout != "200" {
                        eprintln!("{ran}");
                        failed.fetch_add(1, Ordering::Relaxed);
                    }
                    answered.fetch_add(1, Ordering::Relaxed);
                }
            });
            let issuer = || service_issuer(&alpha);
            let before = issuer();
            rotate(&mut service, &[]);
            assert_ne!(issuer(), before, "the pair has moved to the new issuing CA");
            assert_eq!(fingerprint(&service.fleet), first_root, "the root is the same");
            rotate(&mut service, &["--root"]);
            let (before, answer) = (issuer(), sign_offline(&mut service.fleet));
            rotate(&mut service, &["--response", &answer]);
            assert_ne!(issuer(), before, "the pair has moved to what the offline root signed");
            let seen = answered.load(Ordering::Relaxed);
            let more = || answered.load(Ordering::Relaxed) > seen + 5;
            mesh_tests::wait_until("requests after the rotation", mesh_tests::DEADLINE, more).unwrap();
            stop.store(true, Ordering::Relaxed);
        });
        assert_eq!(failed.load(Ordering::Relaxed), 0, "of {}", answered.load(Ordering::Relaxed));
        assert!(answered.load(Ordering::Relaxed) >= 60);
        assert_ne!(fingerprint(&service.fleet), first_root);
        service.fleet.until("one root stands in the folder", |_| certificates_in(&alpha.join("ca.pem")) == 1);
        // A token from before pins a root that has gone; the signed history leads from there to the new one.
        let fleet = &mut service.fleet;
        fleet.add_host("charlie");
        fleet.start_node("charlie");
        fleet.meshctl("charlie", &["enroll", early.trim(), "--name", "charlie"]).ok();
        fleet.wait_meshed(&["alpha", "bravo", "charlie"]);
    });
}

/// Takes the root offline, and has its file sign a new issuing CA as it would be done on another machine. Returns the
/// file with the answer.
fn sign_offline(fleet: &mut Fleet) -> String {
    let folder = fleet.path("ctl");
    let path = |name: &str| folder.join(name).display().to_string();
    let (root, pass, wrong) = (path("root.json"), path("root.pass"), path("wrong.pass"));
    let (request, answer) = (path("request.pem"), path("answer.pem"));
    std::fs::write(&pass, "correct horse battery\n").unwrap();
    std::fs::write(&wrong, "wrong horse battery\n").unwrap();
    let seal = ["ca", "seal", "--yes", "--out", &root, "--passphrase-file", &pass];
    let said = fleet.controller(&seal).ok().stdout;
    assert_shown(PAGE, "meshctl ca seal", &[], &said);
    let file = std::fs::read_to_string(&root).unwrap();
    assert!(file.contains("MESH SEALED KEY") && !file.contains("BEGIN PRIVATE KEY"));
    fleet.controller(&seal).refused("E0902", 2);
    let show = fleet.controller(&["ca", "show", "-o", "json"]).ok().json();
    assert_eq!(show["roots"][0]["keyOffline"], true);
    fleet.controller(&["ca", "rotate", "start", "--root"]).refused("E0563", 7);
    let said = fleet.controller(&["ca", "rotate", "start", "--request-out", &request]).ok().stdout;
    assert_shown(PAGE, "meshctl ca rotate start --request-out", &[], &said);

    let sign = |pass: &str, request: &str| {
        let files = ["--root", &root, "--passphrase-file", pass, "--request", request, "--out", &answer];
        fleet.controller(&[&["ca", "sign-issuer"], &files[..]].concat())
    };
    sign(&wrong, &request).refused("E0115", 4);
    sign(&pass, &root).refused("E0566", 7);
    assert!(!Path::new(&answer).exists(), "nothing was signed");
    assert_shown(PAGE, "meshctl ca sign-issuer", &[], &sign(&pass, &request).ok().stdout);
    answer
}

/// subjectKeyIdentifier of the CA in the pair's chain.
fn service_issuer(pair: &Path) -> Vec<u8> {
    let chain = std::fs::read(pair.join("cert.pem")).unwrap();
    let chain = mesh_ca::bundle::parse_certificates(&chain).unwrap();
    mesh_ca::ca_key_identifier(&chain[1]).unwrap().as_bytes().to_vec()
}
