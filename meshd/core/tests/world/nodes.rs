use mesh_core::world::NodeState;
use mesh_core::{Actor, Change, Command, NodeId, Reason, Refusal, WgKey};

use crate::fixture::*;

#[test]
fn one_revocation_cuts_certificates_keys_and_tokens() {
    let mut mesh = Fixture::new();
    let token = mesh.token(None, &[], 5, false);
    let alpha = mesh.enroll_with(token, "alpha");
    let service = mesh.issue(&alpha, &["alpha.mesh.internal"]);
    let named = mesh.token(Some("alpha"), &[], 1, false);
    let changes = mesh.ok(Actor::LocalRoot, revoke_node(&alpha));
    let count = |wanted: fn(&Change) -> bool| changes.iter().filter(|change| wanted(change)).count();
    assert_eq!(count(|change| matches!(change, Change::CertificateRevoked { .. })), 2);
    assert_eq!(count(|change| matches!(change, Change::KeyBlocked { .. })), 2);
    assert_eq!(count(|change| matches!(change, Change::WireguardKeyBlocked { .. })), 1);
    assert_eq!(
        count(|change| matches!(change, Change::TokenRevoked { .. })),
        2,
        "its own and the one for its name"
    );
    assert!(mesh.world.token(&named).unwrap().revoked_at.is_some());
    assert_eq!(mesh.world.revoked_entries(&issuer(), 0).len(), 2);
    mesh.already_done(Actor::LocalRoot, revoke_node(&alpha));
    let reason = Reason::KeyCompromise;
    let gone = Refusal::IdentityRevoked { serial: alpha.serial, reason };
    assert_eq!(mesh.world.authenticate(alpha.serial, mesh.now), Err(gone.clone()));
    assert_eq!(mesh.world.authenticate_resume(alpha.serial, mesh.now), Err(gone.clone()));
    let (renewal, _) = mesh.renewal(&alpha, false);
    assert_eq!(mesh.refused(alpha.actor(), renewal), gone);
    let unknown = Refusal::IdentityUnknown { serial: service.serial };
    assert!(mesh.world.authenticate(service.serial, mesh.now).is_err_and(|error| error != unknown));
}

#[test]
fn a_revoked_name_comes_back_only_by_an_operator() {
    let mut mesh = Fixture::new();
    let alpha = mesh.enroll("alpha", &[]);
    mesh.ok(Actor::LocalRoot, revoke_node(&alpha));
    let any = mesh.token(None, &[], 5, false);
    let command = mesh.enrollment(any, "alpha");
    assert!(matches!(mesh.refused(anonymous(any), command), Refusal::NodeRevoked { .. }));
    let named = mesh.token(Some("alpha"), &[], 1, false);
    let back = mesh.enroll_with(named, "alpha");
    assert_eq!(back.id, NodeId(2), "a new index");
    assert_eq!(mesh.world.node(alpha.id), None);
    assert!(mesh.world.authenticate(alpha.serial, mesh.now).is_err());

    let bravo = mesh.enroll("bravo", &[]);
    mesh.ok(Actor::LocalRoot, revoke_node(&bravo));
    mesh.ok(
        Actor::LocalRoot,
        Command::RevokeNode { node: bravo.id, reason: Reason::Unspecified, remove: true },
    );
    mesh.enroll_with(any, "bravo");
}

#[test]
fn revoked_keys_never_come_back_even_after_removal() {
    let mut mesh = Fixture::new();
    let alpha = mesh.enroll("alpha", &[]);
    let Command::Enroll { wireguard, certificate, .. } = &alpha.enrollment else { unreachable!() };
    let (wireguard, key_hash) = (*wireguard, certificate.key_hash);
    mesh.ok(
        Actor::LocalRoot,
        Command::RevokeNode { node: alpha.id, reason: Reason::KeyCompromise, remove: true },
    );
    mesh.wait(400 * DAY);
    mesh.crl();
    assert_eq!(mesh.world.certificates().count(), 1, "only the controller's is left");
    let token = mesh.token(None, &[], 5, false);
    let mut command = mesh.enrollment(token, "alpha");
    if let Command::Enroll { certificate, .. } = &mut command {
        certificate.key_hash = key_hash;
    }
    assert_eq!(mesh.refused(anonymous(token), command), Refusal::KeyRevoked { key_hash });
    let mut command = mesh.enrollment(token, "alpha");
    if let Command::Enroll { wireguard: key, .. } = &mut command {
        *key = wireguard;
    }
    assert_eq!(mesh.refused(anonymous(token), command), Refusal::WireguardKeyRevoked { key: wireguard });
}

#[test]
fn an_address_is_quarantined_until_no_certificate_names_it() {
    let mut mesh = Fixture::new();
    let alpha = mesh.enroll("alpha", &[]);
    let address = mesh.world.node(alpha.id).unwrap().ipv4.unwrap();
    mesh.ok(alpha.actor(), Command::LeaveNode { node: alpha.id });
    assert!(!mesh.world.ipv4_free(address));
    mesh.crl();
    mesh.wait(71 * HOUR);
    mesh.crl();
    assert!(!mesh.world.ipv4_free(address), "the certificate has an hour left");
    mesh.wait(2 * HOUR);
    assert!(!mesh.world.ipv4_free(address), "no CRL was signed since it expired");
    mesh.crl();
    assert!(mesh.world.ipv4_free(address));
}

#[test]
fn a_node_that_leaves_is_gone_and_may_come_again_with_new_keys() {
    let mut mesh = Fixture::new();
    let (alpha, bravo) = (mesh.enroll("alpha", &[]), mesh.enroll("bravo", &[]));
    let foreign = mesh.refused(bravo.actor(), Command::LeaveNode { node: alpha.id });
    assert_eq!(foreign, Refusal::Denied { actor: "node bravo".to_owned(), action: "node.leave" });
    mesh.ok(alpha.actor(), Command::LeaveNode { node: alpha.id });
    assert_eq!(mesh.world.node(alpha.id), None);
    assert!(mesh.world.authenticate(alpha.serial, mesh.now).is_err());
    mesh.enroll("alpha", &[]);
}

#[test]
fn a_retired_node_voids_no_shared_token() {
    let mut mesh = Fixture::new();
    let token = mesh.token(None, &[], 5, false);
    let alpha = mesh.enroll_with(token, "alpha");
    mesh.ok(
        Actor::LocalRoot,
        Command::RevokeNode { node: alpha.id, reason: Reason::CessationOfOperation, remove: true },
    );
    assert_eq!(mesh.world.token(&token).unwrap().revoked_at, None);
}

#[test]
fn tags_are_added_removed_and_bounded() {
    let mut mesh = Fixture::new();
    let alpha = mesh.enroll("alpha", &["web"]);
    let tag = |add: &[&str], remove: &[&str]| Command::TagNode {
        node: alpha.id,
        add: tag_set(add),
        remove: tag_set(remove),
    };
    mesh.ok(Actor::LocalRoot, tag(&["db"], &["web"]));
    assert_eq!(mesh.world.node(alpha.id).unwrap().tags, tag_set(&["db"]));
    mesh.already_done(Actor::LocalRoot, tag(&["db"], &["web"]));
    let many: Vec<String> = (0..33).map(|n| format!("t{n}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    assert_eq!(mesh.refused(Actor::LocalRoot, tag(&many, &[])), Refusal::TooManyTags { max: 32 });
    let unknown = Command::TagNode { node: NodeId(9), add: tag_set(&["a"]), remove: tag_set(&[]) };
    assert_eq!(mesh.refused(Actor::LocalRoot, unknown), Refusal::NodeNotFound { node: NodeId(9) });
}

#[test]
fn old_and_new_identity_are_both_good_until_the_next_renewal() {
    let mut mesh = Fixture::new();
    let mut alpha = mesh.enroll("alpha", &[]);
    let first = alpha.serial;
    let (renewal, second) = mesh.renewal(&alpha, false);
    mesh.ok(alpha.actor(), renewal);
    assert!(mesh.world.authenticate(first, mesh.now).is_ok());
    assert!(mesh.world.authenticate(second, mesh.now).is_ok());
    alpha.serial = second;
    let (renewal, third) = mesh.renewal(&alpha, false);
    mesh.ok(alpha.actor(), renewal);
    assert_eq!(mesh.world.authenticate(first, mesh.now), Err(Refusal::IdentitySuperseded { serial: first }));
    assert!(mesh.world.authenticate(second, mesh.now).is_ok());
    assert!(mesh.world.authenticate(third, mesh.now).is_ok());
}

#[test]
fn a_node_renews_only_itself() {
    let mut mesh = Fixture::new();
    let (alpha, bravo) = (mesh.enroll("alpha", &[]), mesh.enroll("bravo", &[]));
    let (renewal, _) = mesh.renewal(&bravo, false);
    assert!(matches!(mesh.refused(alpha.actor(), renewal.clone()), Refusal::Denied { .. }));
    let mut stolen = alpha.clone();
    stolen.id = bravo.id;
    assert!(
        matches!(mesh.refused(stolen.actor(), renewal), Refusal::IdentityUnknown { .. }),
        "serial of another"
    );
    let (mut renewal, _) = mesh.renewal(&alpha, false);
    let theirs = mesh.world.node(bravo.id).unwrap().wireguard[0];
    if let Command::RenewIdentity { wireguard, .. } = &mut renewal {
        wireguard.push(theirs);
    }
    assert_eq!(mesh.refused(alpha.actor(), renewal), Refusal::WireguardKeyInUse { key: theirs });
}

#[test]
fn two_wireguard_keys_at_most_and_no_key_that_another_node_ever_had() {
    let mut mesh = Fixture::new();
    let (mut alpha, bravo) = (mesh.enroll("alpha", &[]), mesh.enroll("bravo", &[]));
    let old = mesh.world.node(alpha.id).unwrap().wireguard[0];
    let renew = |mesh: &mut Fixture, node: &Enrolled, keys: &[WgKey]| {
        let (mut renewal, serial) = mesh.renewal(node, false);
        if let Command::RenewIdentity { wireguard, .. } = &mut renewal {
            *wireguard = keys.to_vec();
        }
        (renewal, serial)
    };
    mesh.ok(Actor::LocalRoot, Command::RotateKeys { node: alpha.id });
    mesh.already_done(Actor::LocalRoot, Command::RotateKeys { node: alpha.id });
    for keys in [&[][..], &[old, old], &[WgKey([1; 32]), old, WgKey([2; 32])]] {
        let (renewal, _) = renew(&mut mesh, &alpha, keys);
        assert!(matches!(mesh.refused(alpha.actor(), renewal), Refusal::WireguardKeyCount { .. }));
    }
    let (renewal, serial) = renew(&mut mesh, &alpha, &[old]);
    mesh.ok(alpha.actor(), renewal);
    alpha.serial = serial;
    assert!(mesh.world.node(alpha.id).unwrap().rotate_keys, "the same key is no rotation");
    let (renewal, serial) = renew(&mut mesh, &alpha, &[WgKey([1; 32]), old]);
    mesh.ok(alpha.actor(), renewal);
    alpha.serial = serial;
    assert!(!mesh.world.node(alpha.id).unwrap().rotate_keys);
    let (renewal, _) = renew(&mut mesh, &alpha, &[WgKey([1; 32])]);
    mesh.ok(alpha.actor(), renewal);
    let (renewal, _) = renew(&mut mesh, &bravo, &[old]);
    assert_eq!(mesh.refused(bravo.actor(), renewal), Refusal::WireguardKeyInUse { key: old });
    mesh.ok(Actor::LocalRoot, revoke_node(&alpha));
    assert!(mesh.world.wireguard_key_blocked(&old) && mesh.world.wireguard_key_blocked(&WgKey([1; 32])));
}

#[test]
fn an_expired_node_may_resume_within_the_window_and_do_nothing_else() {
    let mut mesh = Fixture::new();
    let mut alpha = mesh.enroll("alpha", &[]);
    mesh.wait(20 * DAY);
    mesh.crl();
    let (renewal, _) = mesh.renewal(&alpha, false);
    assert!(matches!(mesh.refused(alpha.actor(), renewal), Refusal::IdentityExpired { .. }));
    assert!(matches!(
        mesh.refused(alpha.actor(), Command::LeaveNode { node: alpha.id }),
        Refusal::IdentityExpired { .. }
    ));
    let (resume, serial) = mesh.renewal(&alpha, true);
    mesh.ok(alpha.actor(), resume);
    alpha.serial = serial;
    assert!(mesh.world.authenticate(alpha.serial, mesh.now).is_ok());
    mesh.wait(33 * DAY + HOUR);
    let (resume, _) = mesh.renewal(&alpha, true);
    assert!(matches!(mesh.refused(alpha.actor(), resume), Refusal::ResumeWindowPassed { .. }));
}

#[test]
fn resume_takes_the_identity_before_only_while_the_newest_is_unproved() {
    let mut mesh = Fixture::new();
    let alpha = mesh.enroll("alpha", &[]);
    let (renewal, newest) = mesh.renewal(&alpha, false);
    mesh.ok(alpha.actor(), renewal);
    mesh.wait(4 * DAY);
    assert!(mesh.world.authenticate_resume(alpha.serial, mesh.now).is_ok(), "the answer may have been lost");
    let with_newest = Enrolled { serial: newest, ..alpha.clone() };
    let (resume, third) = mesh.renewal(&with_newest, true);
    mesh.ok(with_newest.actor(), resume);
    assert!(mesh.world.authenticate_resume(alpha.serial, mesh.now).is_err(), "two renewals ago");
    let with_third = Enrolled { serial: third, ..alpha.clone() };
    mesh.issue(&with_third, &["alpha.mesh.internal"]);
    let superseded = Refusal::IdentitySuperseded { serial: newest };
    assert_eq!(mesh.world.authenticate_resume(newest, mesh.now), Err(superseded), "the third is proved");
}

#[test]
fn a_revoked_node_cannot_resume() {
    let mut mesh = Fixture::new();
    let alpha = mesh.enroll("alpha", &[]);
    mesh.wait(4 * DAY);
    mesh.ok(Actor::LocalRoot, revoke_node(&alpha));
    mesh.crl();
    mesh.wait(10 * DAY);
    mesh.crl();
    let (resume, _) = mesh.renewal(&alpha, true);
    assert!(matches!(mesh.refused(alpha.actor(), resume), Refusal::IdentityRevoked { .. }));
    assert!(matches!(mesh.world.node(alpha.id).unwrap().state, NodeState::Revoked { .. }));
}

#[test]
fn a_lost_answer_is_given_again_to_the_same_operation_and_key() {
    let mut mesh = Fixture::new();
    let alpha = mesh.enroll("alpha", &[]);
    let (renewal, serial) = mesh.renewal(&alpha, false);
    let operation = mesh_core::OperationId([9; 16]);
    let request = mesh_core::Request { actor: alpha.actor(), operation, command: renewal };
    assert!(mesh.run(&request).is_ok());
    assert_eq!(mesh.run(&request), Ok(mesh_core::Decision::AlreadyDone));
    assert_eq!(
        mesh.world.operation(&operation).unwrap().outcome,
        mesh_core::world::Outcome::Certificate(serial)
    );
    assert_eq!(mesh.world.node(alpha.id).unwrap().current.as_ref().unwrap().serial, serial);
    let (other, _) = mesh.renewal(&alpha, false);
    let other = mesh_core::Request { command: other, ..request.clone() };
    assert_eq!(mesh.run(&other), Err(Refusal::OperationReused { operation }));
    let bravo = mesh.enroll("bravo", &[]);
    let (theirs, _) = mesh.renewal(&bravo, false);
    let theirs = mesh_core::Request { actor: bravo.actor(), operation, command: theirs };
    assert_eq!(mesh.run(&theirs), Err(Refusal::OperationReused { operation }));
}
