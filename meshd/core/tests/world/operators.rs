use mesh_core::{Actor, Command, OperatorName, Owner, Refusal, Role, Serial, TokenId};

use crate::fixture::*;

fn name(text: &str) -> OperatorName {
    text.try_into().unwrap()
}

#[test]
fn a_login_token_makes_one_operator_certificate() {
    let mut mesh = Fixture::new();
    let (token, expires_at) = (TokenId([1; 8]), mesh.now + HOUR);
    let add = Command::AddOperator {
        name: name("alice"),
        role: Role::Admin,
        token,
        secret_hash: [0; 32],
        expires_at,
    };
    mesh.ok(Actor::LocalRoot, add.clone());
    assert_eq!(mesh.refused(Actor::LocalRoot, add), Refusal::OperatorExists { name: name("alice") });
    let login = |certificate| Command::LoginOperator { token, certificate };
    let mut wrong = mesh.certificate(Owner::Operator(name("bob")), "operator", Serial([1; 16]));
    assert!(matches!(
        mesh.refused(anonymous(token), login(wrong.clone())),
        Refusal::CertificateMismatch { .. }
    ));
    (wrong.owner, wrong.profile) = (Owner::Operator(name("alice")), "client".to_owned());
    assert!(matches!(mesh.refused(anonymous(token), login(wrong)), Refusal::CertificateMismatch { .. }));
    let good = mesh.certificate(Owner::Operator(name("alice")), "operator", Serial([2; 16]));
    mesh.ok(anonymous(token), login(good.clone()));
    mesh.already_done(anonymous(token), login(good.clone()));
    let other = mesh.certificate(Owner::Operator(name("alice")), "operator", Serial([3; 16]));
    assert_eq!(mesh.refused(anonymous(token), login(other)), Refusal::TokenUsed { id: token });
    let alice = Actor::Operator { name: name("alice"), serial: good.serial };
    assert_eq!(mesh.world.authenticate(good.serial, mesh.now), Ok(alice));
}

#[test]
fn removing_an_operator_ends_his_certificate_and_his_tokens() {
    let mut mesh = Fixture::new();
    mesh.operator("alice", Role::Admin);
    let bob = mesh.operator("bob", Role::Enroller);
    let id = TokenId([5; 8]);
    let expires_at = mesh.now + HOUR;
    let create = Command::CreateToken {
        id,
        secret_hash: [0; 32],
        tags: tag_set(&[]),
        name: None,
        uses: 3,
        expires_at,
        require_approval: false,
    };
    mesh.ok(bob.clone(), create.clone());
    mesh.ok(Actor::LocalRoot, Command::RemoveOperator { name: name("bob") });
    assert!(mesh.world.token(&id).unwrap().revoked_at.is_some());
    assert!(matches!(mesh.refused(bob, create), Refusal::IdentityRevoked { .. }));
    let gone = Command::RemoveOperator { name: name("bob") };
    assert_eq!(mesh.refused(Actor::LocalRoot, gone), Refusal::OperatorNotFound { name: name("bob") });
}

#[test]
fn admins_do_not_remove_the_last_admin_but_local_root_may() {
    let mut mesh = Fixture::new();
    let alice = mesh.operator("alice", Role::Admin);
    let remove = Command::RemoveOperator { name: name("alice") };
    assert_eq!(mesh.refused(alice, remove.clone()), Refusal::LastAdmin { name: name("alice") });
    mesh.ok(Actor::LocalRoot, remove);
}

#[test]
fn roles_bound_what_operators_do() {
    let mut mesh = Fixture::new();
    let node = mesh.enroll("alpha", &[]);
    let actors = [
        (mesh.operator("admin", Role::Admin), true, true, true),
        (mesh.operator("op", Role::Operator), false, true, true),
        (mesh.operator("enroller", Role::Enroller), false, false, true),
        (mesh.operator("auditor", Role::Auditor), false, false, false),
        (node.actor(), false, false, false),
    ];
    for (index, (actor, adds_operators, tags, makes_tokens)) in actors.into_iter().enumerate() {
        let expires_at = mesh.now + HOUR;
        let add = Command::AddOperator {
            name: name(&format!("new-{index}")),
            role: Role::Auditor,
            token: TokenId(mesh.bytes()),
            secret_hash: [0; 32],
            expires_at,
        };
        let tag =
            Command::TagNode { node: node.id, add: tag_set(&[&format!("t{index}")]), remove: tag_set(&[]) };
        let token = Command::CreateToken {
            id: TokenId(mesh.bytes()),
            secret_hash: [0; 32],
            tags: tag_set(&[]),
            name: None,
            uses: 1,
            expires_at,
            require_approval: false,
        };
        for (command, allowed) in [(add, adds_operators), (tag, tags), (token, makes_tokens)] {
            let action = command.kind().action();
            match mesh.give(actor.clone(), command) {
                Ok(_) => assert!(allowed, "{actor} did {action}"),
                Err(Refusal::Denied { action: denied, .. }) => {
                    assert!(!allowed && denied == action, "{actor} {action}")
                }
                Err(other) => panic!("{actor} {action}: {other}"),
            }
        }
    }
}

#[test]
fn an_expired_or_foreign_operator_is_nobody() {
    let mut mesh = Fixture::new();
    let alice = mesh.operator("alice", Role::Admin);
    let Actor::Operator { serial, .. } = alice.clone() else { unreachable!() };
    let policy = || Command::ApplyPolicy { toml: String::new() };
    let posing = Actor::Operator { name: name("bob"), serial };
    assert_eq!(mesh.refused(posing, policy()), Refusal::IdentityUnknown { serial });
    let node = mesh.enroll("alpha", &[]);
    let posing = Actor::Operator { name: name("alice"), serial: node.serial };
    assert!(matches!(mesh.refused(posing, policy()), Refusal::IdentityUnknown { .. }));
    mesh.wait(73 * HOUR);
    assert!(matches!(mesh.refused(alice, policy()), Refusal::IdentityExpired { .. }));
}

#[test]
fn the_login_token_of_a_former_namesake_is_worth_nothing() {
    let mut mesh = Fixture::new();
    mesh.operator("alice", Role::Admin);
    let old = mesh.world.operator(&name("alice")).unwrap().login;
    mesh.ok(Actor::LocalRoot, Command::RemoveOperator { name: name("alice") });
    mesh.operator("alice", Role::Auditor);
    let certificate = mesh.certificate(Owner::Operator(name("alice")), "operator", Serial([9; 16]));
    let login = Command::LoginOperator { token: old, certificate };
    assert_eq!(mesh.refused(anonymous(old), login), Refusal::TokenUnknown { id: old });
}
