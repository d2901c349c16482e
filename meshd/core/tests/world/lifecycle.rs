//! The mesh as a whole: creation, time, records, snapshots.

use std::time::Duration;

use mesh_core::world::NameOwner;
use mesh_core::{
    Actor, Command, Decision, Denial, OperationId, Owner, Reason, Refusal, Request, Serial, UtcTime, World,
};

use crate::fixture::*;

#[test]
fn nothing_happens_before_the_mesh_is_created() {
    let mut mesh = Fixture::empty();
    let command = Command::ApplyPolicy { toml: String::new() };
    assert_eq!(mesh.refused(Actor::LocalRoot, command), Refusal::MeshMissing);
    mesh.ok(Actor::LocalRoot, create_mesh(""));
    mesh.already_done(Actor::LocalRoot, create_mesh(""));
    let mut other = create_mesh("");
    if let Command::CreateMesh { mesh_id, .. } = &mut other {
        *mesh_id = [3; 16];
    }
    assert_eq!(mesh.refused(Actor::LocalRoot, other), Refusal::MeshExists);
    assert_eq!((mesh.world.head_seq(), mesh.world.last_time()), (1, START));
}

#[test]
fn an_impossible_mesh_is_not_created() {
    let edits: [fn(&mut Command); 9] = [
        |c| {
            if let Command::CreateMesh { fleet, .. } = c {
                fleet.clear()
            }
        },
        |c| {
            if let Command::CreateMesh { fleet, .. } = c {
                *fleet = "a\nb".to_owned()
            }
        },
        |c| {
            if let Command::CreateMesh { fleet, .. } = c {
                *fleet = "x".repeat(129)
            }
        },
        |c| {
            if let Command::CreateMesh { controller_name, .. } = c {
                *controller_name = "a.b".to_owned()
            }
        },
        |c| {
            if let Command::CreateMesh { controller_name, .. } = c {
                *controller_name = "CTL".to_owned()
            }
        },
        |c| {
            if let Command::CreateMesh { ipv4_pool, .. } = c {
                *ipv4_pool = "192.0.2.0/31".parse().unwrap()
            }
        },
        |c| {
            if let Command::CreateMesh { cas, .. } = c {
                cas.clear()
            }
        },
        |c| {
            if let Command::CreateMesh { cas, .. } = c {
                cas.truncate(1)
            }
        },
        |c| {
            if let Command::CreateMesh { cas, .. } = c {
                *cas = vec![cas[1].clone(); 17]
            }
        },
    ];
    for (index, edit) in edits.into_iter().enumerate() {
        let mut mesh = Fixture::empty();
        let mut command = create_mesh("");
        edit(&mut command);
        let refusal = mesh.refused(Actor::LocalRoot, command);
        assert!(matches!(refusal, Refusal::MeshInvalid { .. }), "edit {index}: {refusal}");
    }
    let refusal = Fixture::empty().refused(Actor::LocalRoot, create_mesh("[[allow"));
    assert!(matches!(refusal, Refusal::PolicyInvalid { .. }));
}

#[test]
fn the_controller_certifies_itself_under_its_own_name() {
    let mut mesh = Fixture::new();
    let old = mesh.world.controller_serial().unwrap();
    let mut wrong =
        mesh.certificate(Owner::Controller { name: "other".to_owned() }, "controller", Serial([1; 16]));
    let record = |certificate| Command::RecordControllerCertificate { certificate };
    assert!(matches!(
        mesh.refused(Actor::Controller, record(wrong.clone())),
        Refusal::CertificateMismatch { .. }
    ));
    (wrong.owner, wrong.profile) = (Owner::Controller { name: "ctl-1".to_owned() }, "node".to_owned());
    assert!(matches!(
        mesh.refused(Actor::Controller, record(wrong.clone())),
        Refusal::CertificateMismatch { .. }
    ));
    wrong.profile = "controller".to_owned();
    assert!(matches!(mesh.refused(Actor::LocalRoot, record(wrong.clone())), Refusal::Denied { .. }));
    mesh.ok(Actor::Controller, record(wrong.clone()));
    assert_eq!(mesh.world.controller_serial(), Some(wrong.serial));
    let unknown = Refusal::IdentityUnknown { serial: wrong.serial };
    assert_eq!(
        mesh.world.authenticate(wrong.serial, mesh.now),
        Err(unknown),
        "the controller is nobody's client"
    );
    let which = mesh_core::Which::Serial(old);
    mesh.ok(Actor::LocalRoot, Command::RevokeCertificates { which, reason: Reason::Superseded });
}

#[test]
fn record_time_never_goes_back() {
    let mut mesh = Fixture::new();
    mesh.now = mesh.now - DAY;
    mesh.ok(Actor::LocalRoot, Command::ApplyPolicy { toml: String::new() });
    assert!(mesh.journal.iter().all(|record| record.at == START));
    assert_eq!(mesh.world.record_time(START - DAY), START);
    assert_eq!(mesh.world.record_time(START + DAY), START + DAY);
}

#[test]
fn a_held_clock_stands_still_and_stops_what_depends_on_it() {
    let mut mesh = Fixture::new();
    let alpha = mesh.enroll("alpha", &[]);
    let token = mesh.token(None, &[], 1, false);
    let jump = START + 400 * DAY;
    assert!(World::clock_jumped(START, jump) && World::clock_jumped(START, START + Duration::from_secs(601)));
    assert!(
        !World::clock_jumped(START, START + Duration::from_secs(600))
            && !World::clock_jumped(START, START - DAY)
    );
    mesh.ok(Actor::Controller, Command::HoldClock);
    mesh.already_done(Actor::Controller, Command::HoldClock);
    assert_eq!(mesh.world.record_time(jump), START, "nothing expires by a wrong clock");
    let enrollment = mesh.enrollment(token, "bravo");
    assert_eq!(
        mesh.refused(anonymous(token), enrollment.clone()),
        Refusal::ClockJump { action: "node.enroll" }
    );
    let (renewal, _) = mesh.renewal(&alpha, false);
    assert_eq!(mesh.refused(alpha.actor(), renewal), Refusal::ClockJump { action: "node.renew" });
    assert!(matches!(mesh.refused(alpha.actor(), Command::ConfirmClock), Refusal::Denied { .. }));
    mesh.ok(Actor::LocalRoot, revoke_node(&alpha));
    mesh.crl();
    mesh.ok(Actor::LocalRoot, Command::ConfirmClock);
    mesh.already_done(Actor::LocalRoot, Command::ConfirmClock);
    mesh.ok(anonymous(token), enrollment);
}

#[test]
fn a_repeated_operation_is_done_once_and_remembered_for_a_day() {
    let mut mesh = Fixture::new();
    let alpha = mesh.enroll("alpha", &[]);
    let operation = OperationId([7; 16]);
    let tag = |tag: &str| Command::TagNode { node: alpha.id, add: tag_set(&[tag]), remove: tag_set(&[]) };
    let request = Request { actor: Actor::LocalRoot, operation, command: tag("a") };
    assert!(matches!(mesh.run(&request), Ok(Decision::Changes(_))));
    let untag = Command::TagNode { node: alpha.id, add: tag_set(&[]), remove: tag_set(&["a"]) };
    mesh.ok(Actor::LocalRoot, untag);
    assert_eq!(mesh.run(&request), Ok(Decision::AlreadyDone), "not done a second time");
    let other = Request { command: Command::RotateKeys { node: alpha.id }, ..request.clone() };
    assert_eq!(mesh.run(&other), Err(Refusal::OperationReused { operation }));
    mesh.wait(DAY + HOUR);
    mesh.crl();
    assert_eq!(mesh.world.operation(&operation), None);
}

#[test]
fn expired_tokens_and_their_unanswered_requests_are_forgotten_after_a_month() {
    let mut mesh = Fixture::new();
    let token = mesh.token(None, &[], 1, true);
    let name: mesh_core::NodeName = "alpha".try_into().unwrap();
    let (key_hash, wireguard) = (mesh_core::KeyHash([1; 32]), mesh_core::WgKey([1; 32]));
    let request = Command::RequestEnrollment { token, name: name.clone(), key_hash, wireguard };
    mesh.ok(anonymous(token), request);
    mesh.wait(29 * DAY);
    mesh.crl();
    assert!(mesh.world.token(&token).is_some() && mesh.world.node_by_name(&name).is_some());
    mesh.wait(2 * DAY);
    mesh.crl();
    assert!(mesh.world.token(&token).is_none() && mesh.world.node_by_name(&name).is_none());
    assert!(!mesh.world.node_id_free(mesh_core::NodeId(1)));
}

#[test]
fn records_tell_who_did_what_in_one_line() {
    let mut mesh = Fixture::new();
    let token = mesh.token(Some("alpha"), &["db", "web"], 1, false);
    let alpha = mesh.enroll_with(token, "alpha");
    mesh.issue(&alpha, &["alpha.mesh.internal"]);
    mesh.ok(Actor::LocalRoot, revoke_node(&alpha));
    let (renewed, serial) = (mesh.journal.last().unwrap(), alpha.serial);
    assert_eq!((renewed.action.as_str(), renewed.who.as_str()), ("node.revoke", "local root"));
    let detail = renewed.detail();
    assert!(detail.starts_with("node alpha (1) revoked, key-compromise; certificate "), "{detail}");
    assert!(detail.contains(&serial.to_string()) && detail.ends_with("; 3 keys blocked"), "{detail}");
    let issued = &mesh.journal[mesh.journal.len() - 2];
    assert_eq!((issued.action.as_str(), issued.who.as_str()), ("cert.issue", "node alpha"));
    let enrolled = &mesh.journal[mesh.journal.len() - 3];
    assert_eq!(enrolled.who, format!("token {token}"));
    let wanted = format!(
        "token {token} used, 1 in all; node alpha (1) enrolled, 100.64.0.1, tags [db web], serial {serial}"
    );
    assert_eq!(enrolled.detail(), wanted);
}

#[test]
fn denials_are_recorded_cut_and_counted() {
    let mut mesh = Fixture::new();
    let denial = |reason: String| Denial {
        caller: "node alpha".to_owned(),
        action: "cert.issue".to_owned(),
        reason,
        count: 4,
        first: START,
        last: START,
    };
    mesh.already_done(Actor::Controller, Command::RecordDenials { denials: Vec::new() });
    mesh.ok(Actor::Controller, Command::RecordDenials { denials: vec![denial("é\u{7}".repeat(500))] });
    let detail = mesh.journal.last().unwrap().detail();
    assert!(detail.starts_with("node alpha refused cert.issue 4 times: é\\u{7}é"), "{detail}");
    let many = vec![denial(String::new()); 1001];
    assert!(matches!(
        mesh.refused(Actor::Controller, Command::RecordDenials { denials: many }),
        Refusal::Limit { .. }
    ));
}

#[test]
fn a_snapshot_is_the_whole_world() {
    let mut mesh = Fixture::new();
    let alpha = mesh.enroll("alpha", &["web"]);
    mesh.issue(&alpha, &["alpha.mesh.internal"]);
    mesh.operator("alice", mesh_core::Role::Auditor);
    mesh.ok(Actor::LocalRoot, revoke_name("alpha.mesh.internal", Reason::KeyCompromise));
    mesh.crl();
    let mut bytes = Vec::new();
    ciborium::into_writer(&mesh.world, &mut bytes).unwrap();
    let restored: World = ciborium::from_reader(bytes.as_slice()).unwrap();
    assert_eq!(restored, mesh.world, "look-ups included");
}

#[test]
fn an_operation_id_that_comes_twice_is_remembered_once() {
    let mut mesh = Fixture::new();
    let operation = OperationId([8; 16]);
    let hold = Request { actor: Actor::Controller, operation, command: Command::HoldClock };
    assert!(mesh.run(&hold).is_ok());
    mesh.ok(Actor::LocalRoot, Command::ConfirmClock);
    mesh.wait(HOUR);
    assert!(mesh.run(&hold).is_ok());
    assert_eq!(mesh.world.operation(&operation).unwrap().seq, mesh.world.head_seq());
    let mut bytes = Vec::new();
    ciborium::into_writer(&mesh.world, &mut bytes).unwrap();
    assert_eq!(ciborium::from_reader::<World, _>(bytes.as_slice()).unwrap(), mesh.world);
}

#[test]
fn every_name_has_at_most_one_owner() {
    let mut mesh = Fixture::with_policy("[[grant]]\nnames = [\"api.mesh.internal\"]\nto = [\"tag:web\"]");
    let alpha = mesh.enroll("alpha", &[]);
    let table = [
        ("mesh.internal", Some(NameOwner::Reserved)),
        ("x.wpad.mesh.internal", Some(NameOwner::Reserved)),
        ("ctl-1.mesh.internal", Some(NameOwner::Controller)),
        ("a.b.alpha.mesh.internal", Some(NameOwner::Node(alpha.id))),
        ("api.mesh.internal", Some(NameOwner::Grant)),
        ("x.api.mesh.internal", None),
        ("free.mesh.internal", None),
        ("example.com", None),
    ];
    for (name, owner) in table {
        assert_eq!(mesh.world.owner_of_name(&name.try_into().unwrap()), owner, "{name}");
    }
    assert_eq!(UtcTime::default(), UtcTime::EPOCH);
}
