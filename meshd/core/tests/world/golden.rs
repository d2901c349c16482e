//! A checked-in journal must always decode and always mean the same. The journal is never edited and never
//! written again once shipped; when World only *holds* things differently, the digest of World changes and
//! the reason stands in that commit.

use mesh_core::{Actor, Change, Command, Denial, Reason, Record, Role, WgKey, World};
use sha2::{Digest, Sha256};

use crate::fixture::*;

const JOURNAL: &str = include_str!("../golden/v1.json");
const DIGESTS: &str = include_str!("../golden/v1.digests");

fn cbor_digest<T: serde::Serialize>(value: &T) -> String {
    let mut bytes = Vec::new();
    ciborium::into_writer(value, &mut bytes).unwrap();
    hex::encode(Sha256::digest(bytes))
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
fn the_golden_journal_replays_to_the_same_world() {
    let records: Vec<Record> = serde_json::from_str(JOURNAL).unwrap();
    assert_eq!(digests(&records), DIGESTS);
    for record in &records {
        let mut bytes = Vec::new();
        ciborium::into_writer(record, &mut bytes).unwrap();
        assert_eq!(&ciborium::from_reader::<Record, _>(bytes.as_slice()).unwrap(), record);
    }
}

#[test]
fn the_golden_journal_has_every_kind_of_change() {
    let records: Vec<serde_json::Value> = serde_json::from_str(JOURNAL).unwrap();
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
const KINDS: [&str; 28] = [
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

#[test]
fn the_story_can_be_told_again() {
    let records = story();
    assert_eq!(replay(&records).head_seq(), records.len() as u64);
}

#[test]
#[expect(clippy::disallowed_methods, reason = "the one test that writes")]
#[ignore = "writes the golden files; only for a new version"]
fn write_the_golden_files() {
    let records = story();
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    std::fs::write(folder.join("v1.json"), serde_json::to_string_pretty(&records).unwrap() + "\n").unwrap();
    std::fs::write(folder.join("v1.digests"), digests(&records)).unwrap();
}
