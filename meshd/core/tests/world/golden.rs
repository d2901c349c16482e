//! A checked-in journal must always decode and always mean the same. The journal is never edited and never
//! written again once shipped; when World only *holds* things differently, the digest of World changes and
//! the reason stands in that commit.

use mesh_core::{Actor, Change, Command, Denial, KeyId, Reason, Record, Role, WgKey, World};
use sha2::{Digest, Sha256};

use crate::fixture::*;

/// Each version's journal and digests; a later one holds the kinds of change that came with it.
const GOLDEN: [(&str, &str, &str); 2] = [
    ("v1", include_str!("../golden/v1.json"), include_str!("../golden/v1.digests")),
    ("v2", include_str!("../golden/v2.json"), include_str!("../golden/v2.digests")),
];

/// World after each of those journals, as a snapshot or a backup of that time holds it.
const WORLDS: [(&str, &[u8]); 2] =
    [("v1", include_bytes!("../golden/v1.world")), ("v2", include_bytes!("../golden/v2.world"))];

fn cbor<T: serde::Serialize>(value: &T) -> Vec<u8> {
    let mut bytes = Vec::new();
    ciborium::into_writer(value, &mut bytes).unwrap();
    bytes
}

fn cbor_digest<T: serde::Serialize>(value: &T) -> String {
    hex::encode(Sha256::digest(cbor(value)))
}

fn replay(records: &[Record]) -> World {
    let mut world = World::new();
    for (index, record) in records.iter().enumerate() {
        world.apply(index as u64 + 1, record);
    }
    world
}

fn digests(records: &[Record]) -> String {
    format!("journal {}\nworld {}\n", cbor_digest(&records), cbor_digest(&replay(records)))
}

#[test]
fn the_golden_journals_replay_to_the_same_worlds() {
    for (version, journal, expected) in GOLDEN {
        let records: Vec<Record> = serde_json::from_str(journal).unwrap();
        assert_eq!(digests(&records), expected, "{version}");
        for record in &records {
            let mut bytes = Vec::new();
            ciborium::into_writer(record, &mut bytes).unwrap();
            assert_eq!(&ciborium::from_reader::<Record, _>(bytes.as_slice()).unwrap(), record);
        }
    }
}

/// A journal that lost its beginning starts from a snapshot, so a World that was written once is read for ever; where it
/// is held differently today, it comes to the same as the journal.
#[test]
fn a_world_of_then_is_read_and_means_what_its_journal_does() {
    for ((version, written), (_, journal, _)) in WORLDS.into_iter().zip(GOLDEN) {
        let records: Vec<Record> = serde_json::from_str(journal).unwrap();
        let world: World =
            ciborium::from_reader(written).unwrap_or_else(|error| panic!("{version}: {error}"));
        assert!(cbor(&world) == cbor(&replay(&records)), "{version} means something else");
    }
}

#[test]
fn the_golden_journals_have_every_kind_of_change() {
    let journals = GOLDEN.iter().map(|(_, journal, _)| serde_json::from_str(journal).unwrap());
    let records: Vec<serde_json::Value> = journals.flat_map(|all: Vec<serde_json::Value>| all).collect();
    let changes = records.iter().flat_map(|record| record["changes"].as_array().unwrap());
    let kinds: std::collections::BTreeSet<String> = changes
        .map(|change| {
            change
                .as_str()
                .map_or_else(|| change.as_object().unwrap().keys().next().unwrap().clone(), str::to_owned)
        })
        .collect();
    assert_eq!(kinds.into_iter().collect::<Vec<_>>(), KINDS);
}

/// Every variant of [`Change`], as it stands in records. A new variant is added here and to a new golden
/// journal; a shipped one is never renamed.
const KINDS: [&str; 36] = [
    "authority_added",
    "authority_standing",
    "bundle_acknowledged",
    "bundle_issued",
    "certificate_issued",
    "certificate_revoked",
    "clock_confirmed",
    "clock_held",
    "controller_certified",
    "crl_issued",
    "denied",
    "identity_renewed",
    "key_blocked",
    "key_rotation_asked",
    "mesh_created",
    "node_approved",
    "node_enrolled",
    "node_removed",
    "node_requested",
    "node_revoked",
    "node_tagged",
    "operator_added",
    "operator_certified",
    "operator_removed",
    "pair_resumed",
    "pair_stopped",
    "policy_applied",
    "reissue_asked",
    "root_cross_signed",
    "root_exported",
    "root_sealed",
    "rotation_changed",
    "token_created",
    "token_revoked",
    "token_used",
    "wireguard_key_blocked",
];

/// How the golden journal was made.
fn story() -> Vec<Record> {
    let mut mesh = Fixture::with_policy("[[allow]]\nfrom = [\"tag:web\"]\nto = [\"*\"]\n");
    let mut alpha = mesh.enroll("alpha", &["web"]);
    let token = mesh.token(Some("bravo"), &["db"], 1, true);
    let enrollment = mesh.enrollment(token, "bravo");
    let Command::Enroll { node, name, wireguard, certificate, .. } = enrollment.clone() else {
        unreachable!()
    };
    let request = Command::RequestEnrollment { token, name, key_hash: certificate.key_hash, wireguard };
    mesh.ok(anonymous(token), request);
    mesh.ok(Actor::LocalRoot, Command::ApproveNode { node });
    mesh.ok(anonymous(token), enrollment.clone());
    let bravo = enrolled(enrollment);
    let alice = mesh.operator("alice", Role::Operator);
    mesh.wait(HOUR);
    let spare = mesh.token(None, &[], 5, false);
    mesh.ok(alice.clone(), Command::RevokeToken { id: spare });
    mesh.ok(
        alice.clone(),
        Command::TagNode { node: alpha.id, add: tag_set(&["edge"]), remove: tag_set(&[]) },
    );
    let toml = format!(
        "{}[[grant]]\nnames = [\"api.mesh.internal\"]\nto = [\"tag:edge\"]\n",
        mesh.world.policy_toml()
    );
    mesh.ok(alice.clone(), Command::ApplyPolicy { toml });
    mesh.issue(&alpha, &["api.mesh.internal", "alpha.mesh.internal"]);
    mesh.ok(alice.clone(), revoke_name("api.mesh.internal", Reason::Superseded));
    mesh.issue(&alpha, &["api.mesh.internal"]);
    mesh.ok(alice.clone(), revoke_name("api.mesh.internal", Reason::KeyCompromise));
    mesh.crl();
    let again = mesh.service(&alpha, &["api.mesh.internal"]);
    mesh.ok(alpha.actor(), restart(&again));
    mesh.ok(alice.clone(), Command::RotateKeys { node: alpha.id });
    let (mut renewal, serial) = mesh.renewal(&alpha, false);
    if let Command::RenewIdentity { wireguard, .. } = &mut renewal {
        wireguard.insert(0, WgKey([0x77; 32]));
    }
    mesh.ok(alpha.actor(), renewal);
    alpha.serial = serial;
    mesh.ok(Actor::LocalRoot, revoke_node(&bravo));
    mesh.ok(Actor::LocalRoot, Command::RemoveOperator { name: "alice".try_into().unwrap() });
    let denial = Denial {
        caller: "operator alice".to_owned(),
        action: "policy.apply".to_owned(),
        reason: "identity revoked".to_owned(),
        count: 2,
        first: mesh.now,
        last: mesh.now,
    };
    mesh.ok(Actor::Controller, Command::RecordDenials { denials: vec![denial] });
    mesh.ok(Actor::Controller, Command::HoldClock);
    mesh.ok(Actor::LocalRoot, Command::ConfirmClock);
    mesh.wait(73 * HOUR);
    mesh.crl();
    let (resume, serial) = mesh.renewal(&alpha, true);
    mesh.ok(alpha.actor(), resume);
    alpha.serial = serial;
    mesh.ok(alpha.actor(), Command::LeaveNode { node: alpha.id });
    mesh.crl();
    let kept = mesh.journal.iter().flat_map(|record| &record.changes);
    assert!(kept.clone().any(|change| matches!(change, Change::TokenRevoked { .. })));
    mesh.journal
}

/// The second one: authorities change, and a root is taken offline.
fn story_of_authorities() -> Vec<Record> {
    let mut mesh = Fixture::new();
    let alpha = mesh.enroll("alpha", &[]);
    let start = start_rotation(&mesh.world, 0x20, true, false);
    mesh.ok(Actor::LocalRoot, start);
    let (new_root, new_issuing) = (KeyId(vec![0x20; 20]), KeyId(vec![0x21; 20]));
    mesh.crl_by(&new_root, 365 * DAY);
    mesh.crl_by(&new_issuing, 7 * DAY);
    let acknowledge = |version| Command::AcknowledgeBundle { version, nodes: [alpha.id].into() };
    mesh.ok(Actor::Controller, acknowledge(2));
    mesh.ok(Actor::LocalRoot, Command::AdvanceRotation { version: 2 });
    let owner = mesh_core::Owner::Controller { name: "ctl-1".to_owned() };
    let serial = mesh_core::Serial(mesh.bytes());
    let certificate = mesh.certificate(owner, "controller", serial);
    mesh.ok(Actor::Controller, Command::RecordControllerCertificate { certificate });
    let (renewal, serial) = mesh.renewal(&alpha, false);
    mesh.ok(alpha.actor(), renewal);
    let renewed = Enrolled { serial, ..alpha.clone() };
    mesh.issue(&renewed, &["alpha.mesh.internal"]);
    mesh.ok(Actor::Controller, acknowledge(3));
    mesh.ok(Actor::LocalRoot, Command::AdvanceRotation { version: 3 });
    mesh.ok(Actor::LocalRoot, Command::ExportRoot { key_id: new_root.clone() });
    mesh.ok(Actor::LocalRoot, Command::SealRoot { key_id: new_root });
    let start = start_rotation(&mesh.world, 0x30, false, false);
    mesh.ok(Actor::LocalRoot, start);
    mesh.ok(Actor::LocalRoot, Command::AbortRotation { version: 5 });
    mesh.journal
}

#[test]
fn the_stories_can_be_told_again() {
    for records in [story(), story_of_authorities()] {
        assert_eq!(replay(&records).head_seq(), records.len() as u64);
    }
}

/// A journal that is checked in is never written again, nor is its World; the digest of World is.
#[test]
#[expect(clippy::disallowed_methods, reason = "the one test that writes")]
#[ignore = "writes the golden files; only for a new version"]
fn write_the_golden_files() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    for (version, journal, _) in GOLDEN {
        let mut records: Vec<Record> = serde_json::from_str(journal).unwrap();
        if records.is_empty() {
            records = story_of_authorities();
            let text = serde_json::to_string_pretty(&records).unwrap() + "\n";
            std::fs::write(folder.join(format!("{version}.json")), text).unwrap();
        }
        std::fs::write(folder.join(format!("{version}.digests")), digests(&records)).unwrap();
        let world = folder.join(format!("{version}.world"));
        if std::fs::metadata(&world).is_ok_and(|file| file.len() == 0) {
            std::fs::write(world, cbor(&replay(&records))).unwrap();
        }
    }
}
