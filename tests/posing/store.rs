//! The controller's disk in foreign hands: a damaged journal is refused, an index is only a reading of it.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use mesh_tests::{CONTROLLER, Fleet, fleet_test};

use crate::{credential::identity_file, secrets::files_below};

/// Every file below `folder` with its content, but for the index: it may be lost, and sled tidies up when it is opened.
fn contents(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let files = files_below(folder).into_iter().filter(|file| !file.starts_with(folder.join("index")));
    files.map(|file| (file.clone(), fs::read(file).unwrap())).collect()
}

/// The journal's one segment, and how much of it is written.
fn segment(state: &Path) -> (PathBuf, usize) {
    let mut found: Vec<_> = files_below(state)
        .into_iter()
        .filter_map(|file| {
            let bytes = fs::read(&file).unwrap();
            bytes.starts_with(&[0xf5, b'm', b'j', b'f']).then(|| {
                let end = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
                (file, end)
            })
        })
        .collect();
    assert_eq!(found.len(), 1, "one segment of a young journal: {found:?}");
    found.remove(0)
}

#[test]
fn a_flipped_byte_in_the_journal_stops_the_start_and_names_the_record() {
    fleet_test("store::a_flipped_byte_in_the_journal_stops_the_start_and_names_the_record", || {
        let mut fleet = Fleet::with_nodes(&["alpha", "bravo"]);
        fleet.controller(&["node", "tag", "alpha", "+web"]).ok();
        let listed = fleet.controller(&["node", "ls", "-o", "json"]).ok().json();
        fleet.processes.stop(CONTROLLER).unwrap();
        let state = fleet.state(CONTROLLER);
        let (path, end) = segment(&state);
        let whole = fs::read(&path).unwrap();
        // The first magic, a length, a sequence number, a chain hash, bodies from first to last, the last checksum.
        let places = [0, 8, 17, 30, 57, 70, end / 4, end / 2, end * 3 / 4, end - 200, end - 2];
        for at in places {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x10;
            fs::write(&path, &bytes).unwrap();
            let before = contents(&state);
            let refused = fleet.meshd_controller(&["run"]).refused("E0106", 1);
            assert!(refused.stderr.contains("record "), "byte {at}: no record is named: {refused}");
            let after = contents(&state);
            assert!(before.keys().eq(after.keys()), "byte {at}: files came or went: {:?}", after.keys());
            for (file, content) in &before {
                assert!(after[file] == *content, "byte {at}: {} was changed", file.display());
            }
        }
        // Cut where it was acknowledged: no quiet loss of the last records either.
        fs::write(&path, &whole[..end / 2]).unwrap();
        fleet.meshd_controller(&["run"]).refused("E0106", 1);
        fs::write(&path, &whole).unwrap();
        fleet.start_controller();
        let again = fleet.controller(&["node", "ls", "-o", "json"]).ok().json();
        assert_eq!(names(&listed), names(&again));
        fleet.controller(&["audit", "verify"]).ok();
    });
}

fn names(listing: &serde_json::Value) -> Vec<String> {
    listing["items"].as_array().unwrap().iter().map(|item| item["name"].to_string()).collect()
}

/// What the index answers: certificates by serial, ended ones too, and audit entries by number.
fn answers(fleet: &Fleet) -> BTreeMap<String, serde_json::Value> {
    let mut facts = BTreeMap::new();
    for (command, key) in
        [(&["cert", "ls", "--all", "-o", "json"][..], "serial"), (&["audit", "log", "-o", "json"], "seq")]
    {
        let listing = fleet.controller(command).ok().json();
        for item in listing["items"].as_array().expect("a listing") {
            facts.insert(format!("{key} {}", item[key]), item.clone());
        }
    }
    facts
}

fn index_folder(state: &Path) -> PathBuf {
    let index = state.join("index");
    assert!(index.is_dir(), "the index lies in {}", index.display());
    index
}

#[test]
fn a_lost_or_damaged_index_is_made_again() {
    fleet_test("store::a_lost_or_damaged_index_is_made_again", || {
        let mut fleet = Fleet::with_nodes(&["alpha", "bravo"]);
        let out = fleet.path("alpha").join("tls");
        fleet
            .meshctl("alpha", &["cert", "issue", "a.alpha.mesh.internal", "--out", out.to_str().unwrap()])
            .ok();
        fleet.controller(&["cert", "revoke", "a.alpha.mesh.internal"]).ok();
        fleet.controller(&["node", "revoke", "bravo", "--yes"]).ok();
        let truth = answers(&fleet);
        assert!(truth.len() > 10, "{truth:#?}");
        let state = fleet.state(CONTROLLER);
        type Damage<'a> = (&'a str, &'a dyn Fn(&Path));
        let damages: [Damage<'_>; 4] = [
            ("deleted", &|index| fs::remove_dir_all(index).unwrap()),
            ("noise", &|index| {
                for file in files_below(index) {
                    let length = fs::read(&file).unwrap().len().max(64);
                    fs::write(file, (0..length).map(|at| (at * 31 % 255) as u8).collect::<Vec<_>>()).unwrap();
                }
            }),
            ("cut", &|index| {
                for file in files_below(index) {
                    let bytes = fs::read(&file).unwrap();
                    fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
                }
            }),
            ("a file in its place", &|index| {
                fs::remove_dir_all(index).unwrap();
                fs::write(index, "no folder").unwrap();
                fs::set_permissions(index, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
            }),
        ];
        for (what, damage) in damages {
            fleet.processes.stop(CONTROLLER).unwrap();
            damage(&index_folder(&state));
            fleet.start_controller();
            // A restart adds the controller's new certificate, and takes nothing away.
            let again = answers(&fleet);
            for (which, fact) in &truth {
                assert_eq!(again.get(which), Some(fact), "{what}: {which}");
            }
            fleet.controller(&["audit", "verify"]).ok();
        }
    });
}

/// Every value of the index that names alpha's key or address now names bravo's, checksums and all.
#[test]
fn what_is_swapped_in_the_index_reaches_no_peer() {
    fleet_test("store::what_is_swapped_in_the_index_reaches_no_peer", || {
        let nodes = ["alpha", "bravo", "charlie"];
        let mut fleet = Fleet::with_nodes(&nodes);
        let view = |fleet: &Fleet| {
            let status = fleet.meshctl("charlie", &["status", "-o", "json"]).ok().json();
            let peers = status.get("peers").or_else(|| status.pointer("/item/peers")).unwrap().clone();
            let fact = |peer: &serde_json::Value| {
                ["name", "ipv4", "ipv6", "wireguardPublicKey"].map(|key| peer[key].to_string())
            };
            let mut facts: Vec<_> = peers.as_array().unwrap().iter().map(fact).collect();
            facts.sort();
            assert!(facts.iter().flatten().all(|fact| fact != "null"), "{peers:#}");
            facts
        };
        let truth = view(&fleet);
        let state = fleet.state(CONTROLLER);
        fleet.processes.stop(CONTROLLER).unwrap();
        let swapped = swap_in_index(&index_folder(&state), &fleet);
        assert!(swapped > 0, "the index names alpha somewhere, or this test swaps nothing");
        fleet.start_controller();
        // Charlie forgets what it knew and takes it all from the controller.
        fleet.processes.stop("charlie").unwrap();
        for file in ["map.bin", "endpoints.bin"] {
            fs::remove_file(fleet.state("charlie").join(file)).ok();
        }
        fleet.start_node("charlie");
        fleet.wait_meshed(&nodes);
        assert_eq!(view(&fleet), truth);
    });
}

fn swap_in_index(folder: &Path, fleet: &Fleet) -> usize {
    let (a, b) = (identity_file(fleet, "alpha"), identity_file(fleet, "bravo"));
    let text = |identity: &serde_json::Value, key: &str| identity[key].as_str().unwrap().as_bytes().to_vec();
    let raw = |identity: &serde_json::Value| {
        let secret: [u8; 32] = crate::credential::decoded(&identity["wireguard_keys"][0]).try_into().unwrap();
        x25519_dalek::PublicKey::from(&x25519_dalek::StaticSecret::from(secret)).to_bytes().to_vec()
    };
    let pairs = [
        (raw(&a), raw(&b)),
        (text(&a, "ipv4"), text(&b, "ipv4")),
        (text(&a, "ipv6"), text(&b, "ipv6")),
        (text(&a, "name"), text(&b, "name")),
    ];
    let database = sled::Config::new().path(folder).mode(sled::Mode::LowSpace).open().unwrap();
    let mut swapped = 0;
    for entry in database.iter() {
        let (key, value) = entry.unwrap();
        let mut changed = value.to_vec();
        for (from, to) in pairs.iter().filter(|(from, to)| from.len() == to.len()) {
            let mut at = 0;
            while let Some(found) = changed[at..].windows(from.len()).position(|window| window == &from[..]) {
                changed[at + found..at + found + to.len()].copy_from_slice(to);
                at += found + to.len();
                swapped += 1;
            }
        }
        if value != changed {
            database.insert(key, changed).unwrap();
        }
    }
    database.flush().unwrap();
    swapped
}
