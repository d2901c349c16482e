//! A node that starts without its controller believes its disk only as far as the chains go.

use std::{fs, net::IpAddr, path::PathBuf};

use mesh_proto::v1 as pb;
use mesh_tests::{CONTROLLER, DEADLINE, Fleet, fleet_test};
use prost::Message as _;

use crate::credential::{decoded, identity_file};

const NODES: [&str; 4] = ["alpha", "bravo", "charlie", "delta"];

/// A fleet whose controller is gone and whose alpha sleeps; alpha's disk is the attacker's.
struct Sleeping {
    fleet: Fleet,
    map: Vec<u8>,
}

impl Sleeping {
    fn new() -> Self {
        let mut fleet = Fleet::with_nodes(&NODES);
        fleet.until("alpha's map is on disk", |fleet| {
            fs::read(map_file(fleet)).is_ok_and(|map| pb::Full::decode(&*map).unwrap().peers.len() == 3)
        });
        fleet.processes.stop(CONTROLLER).unwrap();
        fleet.processes.stop("alpha").unwrap();
        let map = fs::read(map_file(&fleet)).unwrap();
        Self { fleet, map }
    }

    fn full(&self) -> pb::Full {
        pb::Full::decode(&*self.map).unwrap()
    }

    fn id(&self, node: &str) -> u32 {
        u32::try_from(identity_file(&self.fleet, node)["node_id"].as_u64().unwrap()).unwrap()
    }

    /// Starts alpha with `map` on its disk; the peers of `up` must come, those of `down` must not.
    fn wakes_with(&mut self, what: &str, map: &[u8], up: &[&str], down: &[&str]) {
        let path = map_file(&self.fleet);
        // Written over, so that the file keeps its mode.
        fs::write(&path, map).unwrap();
        self.fleet.start_node("alpha");
        for peer in up {
            let (v4, v6) = self.fleet.addresses_known(peer);
            for address in [v4, v6] {
                let what = format!("{what}: {peer} comes up at {address}");
                self.fleet.until(&what, |fleet| fleet.pings("alpha", address));
            }
        }
        for peer in down {
            let (v4, v6) = self.fleet.addresses_known(peer);
            for address in [v4, v6] {
                assert!(!self.fleet.pings("alpha", address), "{what}: {peer} answers at {address}");
            }
        }
        let status = self.fleet.meshctl("alpha", &["status", "-o", "json"]).json();
        let peers = peers_in(&status);
        for peer in down {
            assert!(!peers.contains(&(*peer).to_owned()), "{what}: {status:#}");
        }
        let doctor = self.fleet.meshctl("alpha", &["doctor"]);
        if down.is_empty() {
            assert_eq!(findings(&status), Vec::<String>::new(), "{what}");
        } else {
            assert!(!findings(&status).is_empty(), "{what}: status says nothing: {status:#}");
            assert_eq!(doctor.code, 3, "{what}: {doctor}");
            assert!(doctor.stdout.contains("left out") || doctor.stdout.contains("map"), "{what}: {doctor}");
        }
        self.fleet.processes.stop("alpha").unwrap();
        // The next case starts from the truth, whatever this one has stored.
        fs::write(path, &self.map).unwrap();
    }
}

fn map_file(fleet: &Fleet) -> PathBuf {
    fleet.state("alpha").join("map.bin")
}

fn peers_in(status: &serde_json::Value) -> Vec<String> {
    list(status, "peers").iter().filter_map(|peer| peer["name"].as_str().map(str::to_owned)).collect()
}

/// Findings about the map; that the controller is away is expected here.
fn findings(status: &serde_json::Value) -> Vec<String> {
    let all = list(status, "findings");
    let all = all.iter().map(ToString::to_string);
    all.filter(|text| text.contains("left out") || text.contains("map")).collect()
}

fn list(status: &serde_json::Value, key: &str) -> Vec<serde_json::Value> {
    let found = status.get(key).or_else(|| status.pointer(&format!("/item/{key}")));
    found.and_then(|value| value.as_array()).cloned().unwrap_or_default()
}

fn peers(full: &pb::Full) -> Vec<pb::Peer> {
    full.read_peers().map(|peer| peer.expect("an entry of the map")).collect()
}

fn leaf_of(full: &pb::Full, id: u32) -> bytes::Bytes {
    peers(full).into_iter().find(|peer| peer.node_id == id).expect("the map has that peer").leaf
}

fn set_leaf(full: &mut pb::Full, id: u32, leaf: bytes::Bytes) {
    let at = peers(full).iter().position(|peer| peer.node_id == id).expect("the map has that peer");
    full.peers[at] = pb::Peer { leaf, ..peers(full).swap_remove(at) }.to_entry();
}

fn replaced(bytes: &[u8], from: &[u8], to: &[u8]) -> bytes::Bytes {
    assert_eq!(from.len(), to.len());
    let mut bytes = bytes.to_vec();
    let at = bytes.windows(from.len()).position(|window| window == from).expect("the leaf has it");
    bytes[at..at + to.len()].copy_from_slice(to);
    bytes.into()
}

#[test]
fn is_believed_only_as_far_as_the_chains_go() {
    fleet_test("stored_map::is_believed_only_as_far_as_the_chains_go", || {
        let mut sleeping = Sleeping::new();
        let ids: Vec<u32> = NODES.iter().map(|node| sleeping.id(node)).collect();
        let others = ["charlie", "delta"];

        // The control: untouched, all come up and nothing is complained about.
        let untouched = sleeping.map.clone();
        sleeping.wakes_with("untouched", &untouched, &NODES[1..], &[]);

        // Another peer's leaf in bravo's place, delta's own record gone: delta is not moved to bravo's number.
        let mut full = sleeping.full();
        let delta = leaf_of(&full, ids[3]);
        set_leaf(&mut full, ids[1], delta);
        full.peers =
            peers(&full).iter().filter(|peer| peer.node_id != ids[3]).map(pb::Peer::to_entry).collect();
        sleeping.wakes_with("a swapped leaf", &full.encode_to_vec(), &["charlie"], &["bravo", "delta"]);

        // Twice the same leaf: the true record stands, the other does not.
        let mut full = sleeping.full();
        let delta = leaf_of(&full, ids[3]);
        set_leaf(&mut full, ids[1], delta);
        sleeping.wakes_with("a doubled leaf", &full.encode_to_vec(), &others, &["bravo"]);

        // A peer invented, with alpha's own leaf and with a stranger's.
        let mut full = sleeping.full();
        let own = decoded(&identity_file(&sleeping.fleet, "alpha")["leaf"]);
        set_leaf(&mut full, ids[1], own.into());
        sleeping.wakes_with("alpha's own leaf", &full.encode_to_vec(), &others, &["bravo"]);
        let mut full = sleeping.full();
        set_leaf(&mut full, ids[1], self_signed(&sleeping.fleet).into());
        sleeping.wakes_with("a self-signed leaf", &full.encode_to_vec(), &others, &["bravo"]);

        // Address, WireGuard key, or any byte changed within bravo's leaf.
        let (IpAddr::V4(bravo), IpAddr::V4(delta)) =
            (sleeping.fleet.addresses_known("bravo").0, sleeping.fleet.addresses_known("delta").0)
        else {
            panic!("the first address is IPv4")
        };
        let mut full = sleeping.full();
        let leaf = leaf_of(&full, ids[1]);
        set_leaf(&mut full, ids[1], replaced(&leaf, &bravo.octets(), &delta.octets()));
        sleeping.wakes_with("a changed address", &full.encode_to_vec(), &others, &["bravo"]);
        let key = wireguard_public(&sleeping.fleet, "bravo");
        let mut full = sleeping.full();
        set_leaf(&mut full, ids[1], replaced(&leaf, &key, &crate::join::wireguard_key()));
        sleeping.wakes_with("a changed WireGuard key", &full.encode_to_vec(), &others, &["bravo"]);
        for part in [0.1, 0.5, 0.98] {
            let mut full = sleeping.full();
            let mut leaf = leaf.to_vec();
            let at = (leaf.len() as f64 * part) as usize;
            leaf[at] ^= 0x04;
            set_leaf(&mut full, ids[1], leaf.into());
            sleeping.wakes_with(&format!("byte {at} flipped"), &full.encode_to_vec(), &others, &["bravo"]);
        }

        // No map at all any more: the node stands alone and says so, and the controller mends it.
        let noise: Vec<u8> = (0..sleeping.map.len()).map(|at| (at * 37 % 251) as u8 | 0x80).collect();
        sleeping.wakes_with("noise", &noise, &[], &NODES[1..]);
        sleeping.wakes_with("cut short", &untouched[..untouched.len() - 7], &[], &NODES[1..]);
        fs::write(map_file(&sleeping.fleet), &noise).unwrap();
        sleeping.fleet.start_node("alpha");
        sleeping.fleet.start_controller();
        sleeping.fleet.wait_meshed(&NODES);
    });
}

#[test]
fn an_old_one_revives_nobody() {
    fleet_test("stored_map::an_old_one_revives_nobody", || {
        let mut fleet = Fleet::with_nodes(&NODES);
        fleet.until("alpha's map is on disk", |fleet| {
            fs::read(map_file(fleet)).is_ok_and(|map| pb::Full::decode(&*map).unwrap().peers.len() == 3)
        });
        let state = fleet.state("alpha");
        let keep = |name: &str| fs::read(state.join(name)).unwrap();
        let (old_map, old_floor, old_crls) = (keep("map.bin"), keep("floor.json"), keep("crls.bin"));
        fleet.controller(&["node", "revoke", "bravo", "--wait", "--yes"]).ok();
        fleet.processes.stop(CONTROLLER).unwrap();
        fleet.processes.stop("alpha").unwrap();
        let (new_map, new_floor, new_crls) = (keep("map.bin"), keep("floor.json"), keep("crls.bin"));
        assert_ne!(old_map, new_map);
        assert_ne!(old_crls, new_crls);

        let mut sleeping = Sleeping { fleet, map: new_map.clone() };
        let put = |name: &str, bytes: &[u8]| fs::write(state.join(name), bytes).unwrap();
        let all = &NODES[1..];
        // Below the floor the map is no map.
        sleeping.wakes_with("an old map", &old_map, &[], all);
        // With its own floor it is one, and the newer CRL still names bravo.
        put("floor.json", &old_floor);
        put("crls.bin", &new_crls);
        sleeping.wakes_with("an old map and floor", &old_map, &["charlie", "delta"], &["bravo"]);
        // The new map knows which CRL it was stored with.
        put("floor.json", &new_floor);
        put("crls.bin", &old_crls);
        sleeping.wakes_with("old CRLs", &new_map, &[], all);
        // Bravo's old record in the new map.
        put("floor.json", &new_floor);
        put("crls.bin", &new_crls);
        let mut forged = pb::Full::decode(&*new_map).unwrap();
        let bravo = sleeping.id("bravo");
        let old = pb::Full::decode(&*old_map).unwrap();
        forged.peers.push(peers(&old).iter().find(|peer| peer.node_id == bravo).unwrap().to_entry());
        sleeping.wakes_with("a record put back", &forged.encode_to_vec(), &["charlie", "delta"], &["bravo"]);
    });
}

/// Our own address or name changed in our own identity: the certificate says otherwise.
#[test]
fn an_identity_that_its_certificate_denies_does_not_start() {
    fleet_test("stored_map::an_identity_that_its_certificate_denies_does_not_start", || {
        let mut fleet = Fleet::with_nodes(&["alpha", "bravo"]);
        fleet.processes.stop("alpha").unwrap();
        let path = fleet.state("alpha").join("identity.json");
        let truth = fs::read(&path).unwrap();
        let (alpha, bravo) = (identity_file(&fleet, "alpha"), identity_file(&fleet, "bravo"));
        for key in ["ipv4", "ipv6", "name", "leaf", "root_pin", "tls_key"] {
            let mut forged = alpha.clone();
            forged[key] = match key {
                "root_pin" => "00".repeat(32).into(),
                key => bravo[key].clone(),
            };
            fs::write(&path, serde_json::to_vec(&forged).unwrap()).unwrap();
            let command = fleet.node_command("alpha", &[], &[]);
            let name = format!("forged-{key}");
            fleet.processes.spawn(&name, command).unwrap();
            let ended = fleet.processes.wait(&name, DEADLINE);
            let log = fleet.processes.log(&name);
            let status =
                ended.unwrap_or_else(|error| panic!("alpha lives with a forged {key}: {error}\n{log}"));
            assert_eq!(status.code(), Some(1), "{key}: {log}");
            assert!(log.contains("error[E0106]"), "{key}: {log}");
            assert!(!log.contains(alpha["tls_key"].as_str().unwrap()), "{key}: the log holds the key");
        }
        fs::write(&path, truth).unwrap();
        fleet.start_node("alpha");
        fleet.wait_meshed(&["alpha", "bravo"]);
    });
}

fn wireguard_public(fleet: &Fleet, node: &str) -> [u8; 32] {
    let secret = decoded(&identity_file(fleet, node)["wireguard_keys"][0]);
    let secret: [u8; 32] = secret.try_into().unwrap();
    x25519_dalek::PublicKey::from(&x25519_dalek::StaticSecret::from(secret)).to_bytes()
}

/// All that bravo's leaf says, signed by a key of ours.
fn self_signed(fleet: &Fleet) -> Vec<u8> {
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    let (v4, v6) = fleet.addresses_known("bravo");
    let mut params = rcgen::CertificateParams::default();
    params.subject_alt_names = vec![
        rcgen::SanType::DnsName("bravo.mesh.internal".try_into().unwrap()),
        rcgen::SanType::IpAddress(v4),
        rcgen::SanType::IpAddress(v6),
        rcgen::SanType::URI("spiffe://mesh.internal/node/bravo".try_into().unwrap()),
    ];
    params.self_signed(&key).unwrap().der().to_vec()
}
