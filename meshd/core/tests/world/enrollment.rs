use mesh_core::world::{NodeState, TokenState};
use mesh_core::{Actor, Command, KeyHash, NodeId, Reason, Refusal, TokenId, WgKey};

use crate::fixture::*;

#[test]
fn a_token_admits_one_node_and_fixes_its_tags() {
    let mut mesh = Fixture::new();
    let token = mesh.token(None, &["web"], 1, false);
    let alpha = mesh.enroll_with(token, "alpha");
    let node = mesh.world.node_by_name(&alpha.name).unwrap();
    assert_eq!((node.id, node.state, &node.tags), (NodeId(1), NodeState::Active, &tag_set(&["web"])));
    assert_eq!(node.ipv4, Some("100.64.0.1".parse().unwrap()), "the host part is the index");
    assert_eq!(mesh.world.token(&token).unwrap().state(mesh.now), TokenState::Used);
    let second = mesh.enrollment(token, "bravo");
    assert_eq!(mesh.refused(anonymous(token), second), Refusal::TokenUsed { id: token });
}

#[test]
fn of_many_prepared_with_one_token_exactly_one_succeeds() {
    let mut mesh = Fixture::new();
    let token = mesh.token(None, &[], 1, false);
    let prepared: Vec<Command> = (0..64).map(|n| mesh.enrollment(token, &format!("node-{n}"))).collect();
    let taken =
        prepared.into_iter().filter(|command| mesh.give(anonymous(token), command.clone()).is_ok()).count();
    assert_eq!((taken, mesh.world.nodes().count()), (1, 1));
}

#[test]
fn a_retry_with_the_same_keys_gets_the_same_answer_even_after_expiry() {
    let mut mesh = Fixture::new();
    let alpha = mesh.enroll("alpha", &[]);
    mesh.already_done(anonymous(alpha.token), alpha.enrollment.clone());
    mesh.wait(2 * HOUR);
    mesh.already_done(anonymous(alpha.token), alpha.enrollment.clone());
    let other_keys = mesh.enrollment(alpha.token, "alpha");
    assert_eq!(mesh.refused(anonymous(alpha.token), other_keys), Refusal::TokenUsed { id: alpha.token });
    mesh.ok(Actor::LocalRoot, revoke_node(&alpha));
    let revoked = Refusal::NodeRevoked { name: alpha.name.clone(), reason: Reason::KeyCompromise };
    assert_eq!(mesh.refused(anonymous(alpha.token), alpha.enrollment.clone()), revoked);
}

#[test]
fn an_enrollment_is_not_repeated_for_an_identity_that_was_renewed() {
    let mut mesh = Fixture::new();
    let alpha = mesh.enroll("alpha", &[]);
    let (renewal, _) = mesh.renewal(&alpha, false);
    mesh.ok(alpha.actor(), renewal);
    let used = Refusal::TokenUsed { id: alpha.token };
    assert_eq!(mesh.refused(anonymous(alpha.token), alpha.enrollment.clone()), used);
}

#[test]
fn tokens_are_refused_each_for_its_own_reason_and_stay_unspent() {
    let mut mesh = Fixture::new();
    let unknown = TokenId([0; 8]);
    let command = mesh.enrollment(unknown, "alpha");
    assert_eq!(mesh.refused(anonymous(unknown), command), Refusal::TokenUnknown { id: unknown });

    let named = mesh.token(Some("web-1"), &[], 1, false);
    let command = mesh.enrollment(named, "db-1");
    let (expected, got) = ("web-1".try_into().unwrap(), "db-1".try_into().unwrap());
    assert_eq!(
        mesh.refused(anonymous(named), command),
        Refusal::TokenNameMismatch { id: named, expected, got }
    );
    assert_eq!(mesh.world.token(&named).unwrap().used, 0);

    let other = mesh.token(None, &[], 1, false);
    let command = mesh.enrollment(named, "web-1");
    assert_eq!(
        mesh.refused(anonymous(other), command),
        Refusal::TokenUnknown { id: named },
        "not the caller's"
    );

    mesh.ok(Actor::LocalRoot, Command::RevokeToken { id: other });
    mesh.already_done(Actor::LocalRoot, Command::RevokeToken { id: other });
    let command = mesh.enrollment(other, "alpha");
    assert_eq!(mesh.refused(anonymous(other), command), Refusal::TokenRevoked { id: other });

    mesh.wait(HOUR);
    let command = mesh.enrollment(named, "web-1");
    let ago = std::time::Duration::ZERO;
    assert_eq!(mesh.refused(anonymous(named), command), Refusal::TokenExpired { id: named, ago });
    mesh.now = mesh.now - 24 * HOUR;
    let command = mesh.enrollment(named, "web-1");
    mesh.crl();
    mesh.wait(25 * HOUR);
    mesh.crl();
    mesh.now = mesh.now - 24 * HOUR;
    assert!(
        matches!(mesh.refused(anonymous(named), command), Refusal::TokenExpired { .. }),
        "clocks that go back"
    );
}

#[test]
fn a_login_token_does_not_enroll_and_the_reverse() {
    let mut mesh = Fixture::new();
    let operator = mesh.operator("alice", mesh_core::Role::Admin);
    let login = mesh.world.operators().next().unwrap().login;
    let command = mesh.enrollment(login, "alpha");
    let action = "node.enroll";
    assert_eq!(mesh.refused(anonymous(login), command), Refusal::TokenPurpose { id: login, action });
    let join = mesh.token(None, &[], 1, false);
    let certificate = mesh.certificate(
        mesh_core::Owner::Operator("alice".try_into().unwrap()),
        "operator",
        mesh_core::Serial([7; 16]),
    );
    let command = Command::LoginOperator { token: join, certificate };
    let action = "operator.login";
    assert_eq!(mesh.refused(anonymous(join), command), Refusal::TokenPurpose { id: join, action });
    assert!(matches!(operator, Actor::Operator { .. }));
}

#[test]
fn names_addresses_keys_serials_and_indexes_are_unique() {
    let mut mesh = Fixture::new();
    let alpha = mesh.enroll("alpha", &[]);
    let token = mesh.token(None, &[], 10, false);
    let taken = mesh.world.node(alpha.id).unwrap().clone();

    let command = mesh.enrollment(token, "alpha");
    let owner = "node alpha".to_owned();
    assert_eq!(
        mesh.refused(anonymous(token), command),
        Refusal::NameTaken { name: "alpha".to_owned(), owner }
    );

    let fresh = mesh.enrollment(token, "bravo");
    let with = |edit: &dyn Fn(&mut Command)| {
        let mut command = fresh.clone();
        edit(&mut command);
        command
    };
    macro_rules! edit {
        ($field:ident, $body:expr) => {
            with(&|command: &mut Command| match command {
                Command::Enroll { $field, .. } => $body,
                _ => unreachable!(),
            })
        };
    }
    let command = edit!(wireguard, *wireguard = taken.wireguard[0]);
    assert_eq!(
        mesh.refused(anonymous(token), command),
        Refusal::WireguardKeyInUse { key: taken.wireguard[0] }
    );
    let key_hash = taken.current.as_ref().unwrap().key_hash;
    let command = edit!(certificate, certificate.key_hash = key_hash);
    assert_eq!(mesh.refused(anonymous(token), command), Refusal::KeyInUse { key_hash });
    let command = edit!(certificate, certificate.serial = alpha.serial);
    assert_eq!(mesh.refused(anonymous(token), command), Refusal::SerialTaken { serial: alpha.serial });
    let command = edit!(ipv4, *ipv4 = taken.ipv4.unwrap());
    assert!(matches!(mesh.refused(anonymous(token), command), Refusal::AddressTaken { .. }));
    let command = edit!(ipv4, *ipv4 = "100.64.0.0".parse().unwrap());
    assert!(matches!(mesh.refused(anonymous(token), command), Refusal::AddressOutsidePool { .. }));
    let command = edit!(node, *node = alpha.id);
    assert_eq!(mesh.refused(anonymous(token), command), Refusal::NodeIdTaken { node: alpha.id });
    let command = edit!(node, *node = NodeId(0));
    assert_eq!(mesh.refused(anonymous(token), command), Refusal::NodeIdTaken { node: NodeId(0) });
    let command = edit!(node, *node = NodeId(1_000_000));
    assert_eq!(mesh.refused(anonymous(token), command), Refusal::NodeIdTaken { node: NodeId(1_000_000) });
    let command = edit!(certificate, certificate.issuer_key_id = mesh_core::KeyId(vec![0; 20]));
    assert!(matches!(mesh.refused(anonymous(token), command), Refusal::IssuerUnknown { .. }));
    for command in [
        edit!(certificate, certificate.profile = "server".to_owned()),
        edit!(certificate, certificate.owner = mesh_core::Owner::Node(alpha.id)),
        edit!(certificate, certificate.names.clear()),
        edit!(certificate, certificate.names.push("x.bravo.mesh.internal".try_into().unwrap())),
        edit!(certificate, certificate.ips.truncate(1)),
        edit!(certificate, certificate.ips.push("192.0.2.1".parse().unwrap())),
        edit!(certificate, certificate.not_after = START),
        edit!(certificate, certificate.der.clear()),
        edit!(certificate, certificate.der = vec![0; 20_000]),
    ] {
        assert!(matches!(mesh.refused(anonymous(token), command), Refusal::CertificateMismatch { .. }));
    }
    mesh.ok(anonymous(token), fresh);
}

#[test]
fn reserved_granted_and_certified_names_are_not_for_nodes() {
    let mut mesh = Fixture::with_policy(
        "[[grant]]\nnames = [\"api.mesh.internal\", \"x.shop.mesh.internal\"]\nto = [\"tag:web\"]",
    );
    let token = mesh.token(None, &[], 10, false);
    let command = mesh.enrollment(token, "ctl-1");
    assert_eq!(mesh.refused(anonymous(token), command), Refusal::NameReserved { name: "ctl-1".to_owned() });
    for name in ["api", "shop"] {
        let command = mesh.enrollment(token, name);
        assert!(matches!(mesh.refused(anonymous(token), command), Refusal::NameTaken { .. }), "{name}");
    }
    let serial = mesh_core::Serial([3; 16]);
    let mut printer = mesh.certificate(mesh_core::Owner::Detached { operator: None }, "server", serial);
    printer.names = vec!["printer.mesh.internal".try_into().unwrap()];
    printer.pair_name = "printer.mesh.internal".to_owned();
    mesh.ok(Actor::LocalRoot, issue(&printer));
    let command = mesh.enrollment(token, "printer");
    let owner = format!("certificate {serial}");
    assert_eq!(
        mesh.refused(anonymous(token), command),
        Refusal::NameTaken { name: "printer".to_owned(), owner }
    );
    mesh.wait(73 * HOUR);
    let token = mesh.token(None, &[], 10, false);
    mesh.enroll_with(token, "printer");
}

#[test]
fn approval_stands_between_request_and_certificate() {
    let mut mesh = Fixture::new();
    let token = mesh.token(None, &["db"], 1, true);
    let enrollment = mesh.enrollment(token, "db-1");
    let Command::Enroll { node, name, wireguard, ref certificate, .. } = enrollment.clone() else {
        unreachable!()
    };
    let pending = Refusal::NotApproved { name: name.clone() };
    assert_eq!(mesh.refused(anonymous(token), enrollment.clone()), pending, "no request yet");
    let request =
        Command::RequestEnrollment { token, name: name.clone(), key_hash: certificate.key_hash, wireguard };
    mesh.ok(anonymous(token), request.clone());
    mesh.already_done(anonymous(token), request.clone());
    assert_eq!(mesh.world.node_by_name(&name).unwrap().state, NodeState::Pending { approved: false });
    assert_eq!(mesh.world.view_for(node), None, "a pending node sees nothing");
    assert_eq!(mesh.refused(anonymous(token), enrollment.clone()), pending);
    let second = Command::RequestEnrollment {
        token,
        name: "db-2".try_into().unwrap(),
        key_hash: KeyHash([1; 32]),
        wireguard: WgKey([1; 32]),
    };
    assert_eq!(mesh.refused(anonymous(token), second), Refusal::TokenUsed { id: token });
    mesh.ok(Actor::LocalRoot, Command::ApproveNode { node });
    mesh.already_done(Actor::LocalRoot, Command::ApproveNode { node });
    let other_keys = mesh.enrollment(token, "db-1");
    assert!(
        matches!(mesh.refused(anonymous(token), other_keys), Refusal::NotApproved { .. }),
        "another machine"
    );
    mesh.wait(2 * HOUR);
    let Command::Enroll { certificate: mut fresh, ipv4, .. } = enrollment else { unreachable!() };
    fresh.not_after = mesh.now + HOUR;
    mesh.ok(
        anonymous(token),
        Command::Enroll { token, node, name: name.clone(), ipv4, wireguard, certificate: fresh },
    );
    let active = mesh.world.node_by_name(&name).unwrap();
    assert_eq!((active.id, active.state, &active.tags), (node, NodeState::Active, &tag_set(&["db"])));
    mesh.already_done(anonymous(token), request);
    mesh.already_done(Actor::LocalRoot, Command::ApproveNode { node });
}

#[test]
fn a_token_without_approval_has_nothing_to_request() {
    let mut mesh = Fixture::new();
    let token = mesh.token(None, &[], 1, false);
    let name = "alpha".try_into().unwrap();
    let request =
        Command::RequestEnrollment { token, name, key_hash: KeyHash([1; 32]), wireguard: WgKey([1; 32]) };
    assert_eq!(mesh.refused(anonymous(token), request), Refusal::ApprovalNotRequired { id: token });
}

#[test]
fn a_rejected_request_blocks_its_keys_and_frees_its_name() {
    let mut mesh = Fixture::new();
    let token = mesh.token(None, &[], 2, true);
    let name: mesh_core::NodeName = "alpha".try_into().unwrap();
    let (key_hash, wireguard) = (KeyHash([1; 32]), WgKey([1; 32]));
    mesh.ok(anonymous(token), Command::RequestEnrollment { token, name: name.clone(), key_hash, wireguard });
    let reject = Command::RevokeNode { node: NodeId(1), reason: Reason::Superseded, remove: true };
    mesh.ok(Actor::LocalRoot, reject.clone());
    mesh.already_done(Actor::LocalRoot, reject);
    let again = Command::RequestEnrollment { token, name: name.clone(), key_hash, wireguard };
    assert_eq!(mesh.refused(anonymous(token), again), Refusal::KeyRevoked { key_hash });
    let key_hash = KeyHash([2; 32]);
    let again = Command::RequestEnrollment { token, name: name.clone(), key_hash, wireguard };
    assert_eq!(mesh.refused(anonymous(token), again), Refusal::WireguardKeyRevoked { key: wireguard });
    mesh.ok(
        anonymous(token),
        Command::RequestEnrollment { token, name, key_hash, wireguard: WgKey([2; 32]) },
    );
    assert!(mesh.world.node(NodeId(2)).is_some(), "indexes are never used twice");
}

#[test]
fn impossible_tokens_are_refused() {
    let mut mesh = Fixture::new();
    let token = |uses, expires_at, name: Option<&str>| Command::CreateToken {
        id: TokenId([1; 8]),
        secret_hash: [0; 32],
        tags: tag_set(&[]),
        name: name.map(|name| name.try_into().unwrap()),
        uses,
        expires_at,
        require_approval: false,
    };
    let soon = mesh.now + HOUR;
    assert!(matches!(mesh.refused(Actor::LocalRoot, token(0, soon, None)), Refusal::TokenUses { .. }));
    assert!(matches!(mesh.refused(Actor::LocalRoot, token(10_001, soon, None)), Refusal::TokenUses { .. }));
    assert!(matches!(
        mesh.refused(Actor::LocalRoot, token(2, soon, Some("a"))),
        Refusal::TokenUses { max: 1, .. }
    ));
    let (now, late) = (mesh.now, mesh.now + 31 * DAY);
    assert!(matches!(mesh.refused(Actor::LocalRoot, token(1, now, None)), Refusal::TokenLife { .. }));
    assert!(matches!(mesh.refused(Actor::LocalRoot, token(1, late, None)), Refusal::TokenLife { .. }));
    assert!(matches!(
        mesh.refused(Actor::LocalRoot, token(1, soon, Some("ctl-1"))),
        Refusal::NameReserved { .. }
    ));
    mesh.ok(Actor::LocalRoot, token(1, soon, None));
    assert!(matches!(mesh.refused(Actor::LocalRoot, token(1, soon, None)), Refusal::TokenExists { .. }));
}

#[test]
fn an_operation_id_does_not_answer_for_a_node_that_was_revoked_since() {
    let mut mesh = Fixture::new();
    let token = mesh.token(None, &[], 1, false);
    let command = mesh.enrollment(token, "alpha");
    let operation = mesh_core::OperationId([4; 16]);
    let request = mesh_core::Request { actor: anonymous(token), operation, command };
    assert!(mesh.run(&request).is_ok());
    assert_eq!(mesh.run(&request), Ok(mesh_core::Decision::AlreadyDone));
    mesh.ok(Actor::LocalRoot, revoke_node(&enrolled(request.command.clone())));
    assert!(matches!(mesh.run(&request), Err(Refusal::NodeRevoked { .. })));
}

#[test]
fn the_keys_of_a_pending_node_are_taken() {
    let mut mesh = Fixture::new();
    let alpha = mesh.enroll("alpha", &[]);
    let token = mesh.token(None, &[], 3, true);
    let (key_hash, wireguard) = (KeyHash([1; 32]), WgKey([1; 32]));
    let request = |name: &str, key_hash, wireguard| Command::RequestEnrollment {
        token,
        name: name.try_into().unwrap(),
        key_hash,
        wireguard,
    };
    mesh.ok(anonymous(token), request("bravo", key_hash, wireguard));
    let refusal = mesh.refused(anonymous(token), request("charlie", key_hash, WgKey([2; 32])));
    assert_eq!(refusal, Refusal::KeyInUse { key_hash });
    let refusal = mesh.refused(anonymous(token), request("charlie", KeyHash([2; 32]), wireguard));
    assert_eq!(refusal, Refusal::WireguardKeyInUse { key: wireguard });
    let refusal = mesh.refused(anonymous(token), request("bravo", KeyHash([2; 32]), WgKey([2; 32])));
    assert!(matches!(refusal, Refusal::NameTaken { .. }));
    let mut service = mesh.service(&alpha, &["alpha.mesh.internal"]);
    service.key_hash = key_hash;
    assert_eq!(mesh.refused(alpha.actor(), issue(&service)), Refusal::KeyInUse { key_hash });
}

#[test]
fn the_key_of_an_identity_that_may_resume_is_taken() {
    let mut mesh = Fixture::new();
    let alpha = mesh.enroll("alpha", &[]);
    let key_hash = mesh.world.node(alpha.id).unwrap().current.as_ref().unwrap().key_hash;
    let (renewal, serial) = mesh.renewal(&alpha, false);
    mesh.ok(alpha.actor(), renewal);
    let newest = mesh.world.certificate(&serial).unwrap().key_hash;
    mesh.wait(5 * DAY);
    let bravo = mesh.enroll("bravo", &[]);
    for key_hash in [key_hash, newest] {
        let mut service = mesh.service(&bravo, &["bravo.mesh.internal"]);
        service.key_hash = key_hash;
        assert_eq!(mesh.refused(bravo.actor(), issue(&service)), Refusal::KeyInUse { key_hash });
    }
}

#[test]
fn a_revoked_machine_is_told_so_even_when_its_token_is_void() {
    let mut mesh = Fixture::new();
    let token = mesh.token(None, &[], 5, false);
    let alpha = mesh.enroll_with(token, "alpha");
    mesh.ok(Actor::LocalRoot, revoke_node(&alpha));
    let refusal = mesh.refused(anonymous(token), alpha.enrollment.clone());
    assert!(matches!(refusal, Refusal::NodeRevoked { .. }), "{refusal}");
    let command = mesh.enrollment(token, "bravo");
    assert_eq!(mesh.refused(anonymous(token), command), Refusal::TokenRevoked { id: token });
}

#[test]
fn the_same_keys_under_another_token_are_no_retry() {
    let mut mesh = Fixture::new();
    let alpha = mesh.enroll("alpha", &[]);
    let token = mesh.token(None, &[], 1, false);
    let mut command = alpha.enrollment.clone();
    if let Command::Enroll { token: used, .. } = &mut command {
        *used = token;
    }
    assert!(matches!(mesh.refused(anonymous(token), command), Refusal::KeyInUse { .. }));
}

#[test]
fn an_approved_node_keeps_its_index() {
    let mut mesh = Fixture::new();
    let token = mesh.token(None, &[], 1, true);
    let enrollment = mesh.enrollment(token, "alpha");
    let Command::Enroll { node, name, wireguard, certificate, .. } = enrollment.clone() else {
        unreachable!()
    };
    let key_hash = certificate.key_hash;
    mesh.ok(anonymous(token), Command::RequestEnrollment { token, name: name.clone(), key_hash, wireguard });
    mesh.ok(Actor::LocalRoot, Command::ApproveNode { node });
    let mut elsewhere = mesh.enrollment(token, "alpha");
    let other = mesh.world.next_node_id();
    if let Command::Enroll { certificate, wireguard: key, .. } = &mut elsewhere {
        (certificate.key_hash, *key) = (key_hash, wireguard);
    }
    assert_ne!(other, node);
    assert_eq!(mesh.refused(anonymous(token), elsewhere), Refusal::NodeIdTaken { node: other });
    mesh.ok(anonymous(token), enrollment);
}
