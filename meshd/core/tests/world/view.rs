use mesh_core::{Actor, Command, Reason};

use crate::fixture::*;

const WEB_TO_DB: &str = "[[allow]]\nfrom = [\"tag:web\"]\nto = [\"tag:db\"]";

#[test]
fn a_node_sees_only_peers_that_a_rule_connects_it_with() {
    let mut mesh = Fixture::with_policy(WEB_TO_DB);
    let (web, db, other) =
        (mesh.enroll("web-1", &["web"]), mesh.enroll("db-1", &["db"]), mesh.enroll("x", &[]));
    let peers = |mesh: &Fixture, node: &Enrolled| mesh.world.view_for(node.id).unwrap().peers;
    let seen = peers(&mesh, &web);
    assert_eq!(seen.keys().copied().collect::<Vec<_>>(), [db.id]);
    assert_eq!((seen[&db.id].inbound, seen[&db.id].outbound), (false, true));
    assert_eq!(seen[&db.id].leaf_serial, db.serial);
    let seen = peers(&mesh, &db);
    assert_eq!((seen[&web.id].inbound, seen[&web.id].outbound), (true, false));
    assert!(peers(&mesh, &other).is_empty());
    mesh.ok(Actor::LocalRoot, revoke_node(&db));
    assert!(peers(&mesh, &web).is_empty());
    assert_eq!(mesh.world.view_for(db.id), None);
    assert_eq!(mesh.world.leaf(db.id), None);
}

#[test]
fn a_delta_says_what_a_node_may_see_of_what_changed() {
    let mut mesh = Fixture::with_policy(WEB_TO_DB);
    let (web, db) = (mesh.enroll("web-1", &["web"]), mesh.enroll("db-1", &["db"]));
    let seq = mesh.world.head_seq();
    let empty = mesh.world.delta_for(web.id, seq).unwrap();
    assert!(empty.is_empty());
    mesh.crl();
    assert_eq!(mesh.world.delta_for(web.id, seq).unwrap().crls, [(issuer(), 0)].into());
    let web_2 = mesh.enroll("web-2", &["web"]);
    let delta = mesh.world.delta_for(web.id, seq).unwrap();
    assert_eq!(
        (delta.upserts.len(), delta.removes),
        (0, [web_2.id].into()),
        "nothing of a node it may not see"
    );
    let (renewal, serial) = mesh.renewal(&db, false);
    mesh.ok(db.actor(), renewal);
    assert_eq!(mesh.world.delta_for(web.id, seq).unwrap().upserts[&db.id].leaf_serial, serial);
    mesh.ok(Actor::LocalRoot, Command::RevokeNode { node: db.id, reason: Reason::Unspecified, remove: true });
    assert!(mesh.world.delta_for(web.id, seq).unwrap().removes.contains(&db.id));
}

#[test]
fn what_changes_a_nodes_own_facts_calls_for_a_full_view() {
    let mut mesh = Fixture::new();
    let alpha = mesh.enroll("alpha", &[]);
    mesh.issue(&alpha, &["alpha.mesh.internal"]);
    let commands = [
        Command::TagNode { node: alpha.id, add: tag_set(&["web"]), remove: tag_set(&[]) },
        Command::RotateKeys { node: alpha.id },
        Command::ApplyPolicy { toml: WEB_TO_DB.to_owned() },
        revoke_name("alpha.mesh.internal", Reason::Unspecified),
    ];
    for command in commands {
        let seq = mesh.world.head_seq();
        assert!(mesh.world.delta_for(alpha.id, seq).is_some());
        mesh.ok(Actor::LocalRoot, command);
        assert_eq!(mesh.world.delta_for(alpha.id, seq), None);
    }
    let ahead = mesh.world.head_seq() + 1;
    assert_eq!(mesh.world.delta_for(alpha.id, ahead), None, "a cursor ahead of the journal");
}

#[test]
fn cursors_older_than_what_is_remembered_are_too_old() {
    let mut mesh = Fixture::new();
    let alpha = mesh.enroll("alpha", &[]);
    let bravo = mesh.enroll("bravo", &[]);
    let seq = mesh.world.head_seq();
    for round in 0..mesh_core::limits::TOUCHED_RECORDS_MAX {
        let (add, remove) = if round % 2 == 0 {
            (["t"].as_slice(), [].as_slice())
        } else {
            ([].as_slice(), ["t"].as_slice())
        };
        mesh.ok(
            Actor::LocalRoot,
            Command::TagNode { node: bravo.id, add: tag_set(add), remove: tag_set(remove) },
        );
    }
    let delta = mesh.world.delta_for(alpha.id, seq).unwrap();
    assert_eq!(delta.upserts.len(), 1, "many changes of one node are one entry");
    mesh.ok(
        Actor::LocalRoot,
        Command::TagNode { node: bravo.id, add: tag_set(&["u"]), remove: tag_set(&[]) },
    );
    assert_eq!(mesh.world.delta_for(alpha.id, seq), None);
    assert!(mesh.world.delta_for(alpha.id, seq + 1).is_some());
}
