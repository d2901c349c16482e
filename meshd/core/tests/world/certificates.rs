use mesh_core::{Actor, CertificateRecord, Change, Command, Owner, Reason, Refusal, Role, Serial, Which};

use crate::fixture::*;

const GRANT: &str = "[[grant]]\nnames = [\"api.mesh.internal\"]\nto = [\"tag:web\", \"node:charlie\"]";

#[test]
fn a_node_takes_its_own_names_and_granted_ones_only() {
    let mut mesh = Fixture::with_policy(GRANT);
    let (alpha, bravo) = (mesh.enroll("alpha", &["web"]), mesh.enroll("bravo", &[]));
    mesh.issue(&alpha, &["alpha.mesh.internal", "db.alpha.mesh.internal", "api.mesh.internal"]);
    let table = [
        ("bravo.mesh.internal", "taken"),
        ("x.bravo.mesh.internal", "taken"),
        ("other.mesh.internal", "not granted"),
        ("sub.api.mesh.internal", "not granted"),
        ("mesh.internal", "reserved"),
        ("ca.mesh.internal", "reserved"),
        ("www.ctl-1.mesh.internal", "reserved"),
        ("alpha.example.com", "outside"),
        ("evilmesh.internal", "outside"),
    ];
    for (name, verdict) in table {
        let certificate = mesh.service(&alpha, &["alpha.mesh.internal", name]);
        let refusal = mesh.refused(alpha.actor(), issue(&certificate));
        let fits = match &refusal {
            Refusal::NameTaken { .. } => verdict == "taken",
            Refusal::NameNotGranted { .. } => verdict == "not granted",
            Refusal::NameReserved { .. } => verdict == "reserved",
            Refusal::NameOutsideDomain { .. } => verdict == "outside",
            _ => false,
        };
        assert!(fits, "{name}: {refusal}");
    }
    let certificate = mesh.service(&bravo, &["api.mesh.internal"]);
    assert!(matches!(mesh.refused(bravo.actor(), issue(&certificate)), Refusal::NameNotGranted { .. }));
    let charlie = mesh.enroll("charlie", &[]);
    mesh.issue(&charlie, &["api.mesh.internal"]);
}

#[test]
fn a_node_takes_its_own_addresses_only() {
    let mut mesh = Fixture::new();
    let (alpha, bravo) = (mesh.enroll("alpha", &[]), mesh.enroll("bravo", &[]));
    let address = |mesh: &Fixture, node: &Enrolled| mesh.world.node(node.id).unwrap().ipv4.unwrap().into();
    let mut certificate = mesh.service(&alpha, &["alpha.mesh.internal"]);
    certificate.ips = vec![address(&mesh, &alpha), mesh.world.ipv6_of(alpha.id).unwrap().into()];
    mesh.ok(alpha.actor(), issue(&certificate));
    for ip in [address(&mesh, &bravo), "127.0.0.1".parse().unwrap(), "192.0.2.1".parse().unwrap()] {
        let mut certificate = mesh.service(&alpha, &["alpha.mesh.internal"]);
        certificate.ips = vec![ip];
        assert_eq!(mesh.refused(alpha.actor(), issue(&certificate)), Refusal::AddressNotOwned { ip });
    }
}

#[test]
fn a_service_certificate_is_what_its_caller_may_have() {
    let mut mesh = Fixture::new();
    let (alpha, bravo) = (mesh.enroll("alpha", &[]), mesh.enroll("bravo", &[]));
    let good = mesh.service(&alpha, &["alpha.mesh.internal"]);
    let edits: [fn(&mut CertificateRecord); 7] = [
        |c| c.profile = "node".to_owned(),
        |c| c.profile = "operator".to_owned(),
        |c| c.owner = Owner::Node(mesh_core::NodeId(1)),
        |c| c.owner = Owner::Service { node: mesh_core::NodeId(2), name: "alpha.mesh.internal".to_owned() },
        |c| c.owner = Owner::Detached { operator: None },
        |c| c.names.clear(),
        |c| {
            c.pair_name = "x.alpha.mesh.internal".to_owned();
            c.owner = Owner::Service { node: mesh_core::NodeId(1), name: c.pair_name.clone() };
        },
    ];
    for (index, edit) in edits.into_iter().enumerate() {
        let mut certificate = good.clone();
        edit(&mut certificate);
        let refusal = mesh.refused(alpha.actor(), issue(&certificate));
        assert!(matches!(refusal, Refusal::CertificateMismatch { .. }), "edit {index}: {refusal}");
    }
    assert!(mesh.give(bravo.actor(), issue(&good)).is_err(), "another node's");
    let mut client = mesh.service(&alpha, &["alpha.mesh.internal"]);
    (client.profile, client.pair_name) = ("client".to_owned(), "web".to_owned());
    client.names.clear();
    client.owner = Owner::Service { node: alpha.id, name: "web".to_owned() };
    mesh.ok(alpha.actor(), issue(&client));
}

#[test]
fn a_service_keeps_its_key_but_takes_nobody_elses() {
    let mut mesh = Fixture::new();
    let (alpha, bravo) = (mesh.enroll("alpha", &[]), mesh.enroll("bravo", &[]));
    let first = mesh.issue(&alpha, &["alpha.mesh.internal"]);
    let mut renewed = mesh.service(&alpha, &["alpha.mesh.internal"]);
    renewed.key_hash = first.key_hash;
    mesh.ok(alpha.actor(), issue(&renewed));
    let identity = mesh.world.node(alpha.id).unwrap().current.as_ref().unwrap().key_hash;
    for key_hash in [first.key_hash, identity] {
        let mut theirs = mesh.service(&bravo, &["bravo.mesh.internal"]);
        theirs.key_hash = key_hash;
        assert_eq!(mesh.refused(bravo.actor(), issue(&theirs)), Refusal::KeyInUse { key_hash });
    }
    let mut own = mesh.service(&alpha, &["alpha.mesh.internal"]);
    own.key_hash = identity;
    let in_use = Refusal::KeyInUse { key_hash: identity };
    assert_eq!(mesh.refused(alpha.actor(), issue(&own)), in_use, "a service is not its node");
    let (mut renewal, _) = mesh.renewal(&alpha, false);
    if let Command::RenewIdentity { certificate, .. } = &mut renewal {
        certificate.key_hash = first.key_hash;
    }
    assert!(
        matches!(mesh.refused(alpha.actor(), renewal), Refusal::KeyInUse { .. }),
        "a node is not its service"
    );
}

#[test]
fn revoking_a_name_stops_its_pair_until_somebody_on_the_node_asks() {
    let mut mesh = Fixture::new();
    let alpha = mesh.enroll("alpha", &[]);
    let first = mesh.issue(&alpha, &["db.alpha.mesh.internal", "x.alpha.mesh.internal"]);
    let second = mesh.issue(&alpha, &["db.alpha.mesh.internal", "x.alpha.mesh.internal"]);
    let other = mesh.issue(&alpha, &["other.alpha.mesh.internal"]);
    let reason = Reason::KeyCompromise;
    let changes = mesh.ok(Actor::LocalRoot, revoke_name("X.alpha.mesh.internal", reason));
    let revoked: Vec<Serial> = changes
        .iter()
        .filter_map(|change| match change {
            Change::CertificateRevoked { serial, .. } => Some(*serial),
            _ => None,
        })
        .collect();
    assert_eq!(revoked, [first.serial, second.serial]);
    assert!(mesh.world.certificate(&other.serial).unwrap().revoked.is_none());
    mesh.already_done(Actor::LocalRoot, revoke_name("x.alpha.mesh.internal", reason));
    let pair = "db.alpha.mesh.internal".to_owned();
    assert_eq!(mesh.world.stopped_names(alpha.id), [pair.clone()].into());
    let stopped = Refusal::NameStopped { name: pair.clone(), reason };
    for names in [&["db.alpha.mesh.internal"][..], &["new.alpha.mesh.internal", "x.alpha.mesh.internal"]] {
        let certificate = mesh.service(&alpha, names);
        assert_eq!(mesh.refused(alpha.actor(), issue(&certificate)), stopped, "no way round by another pair");
    }
    let mut again = mesh.service(&alpha, &["db.alpha.mesh.internal"]);
    again.key_hash = second.key_hash;
    assert_eq!(
        mesh.refused(alpha.actor(), restart(&again)),
        Refusal::KeyRevoked { key_hash: second.key_hash }
    );
    let again = mesh.service(&alpha, &["db.alpha.mesh.internal"]);
    mesh.ok(alpha.actor(), restart(&again));
    assert!(mesh.world.stopped_names(alpha.id).is_empty());
    mesh.issue(&alpha, &["db.alpha.mesh.internal"]);
}

#[test]
fn a_stop_outlives_the_certificates_it_ended() {
    let mut mesh = Fixture::new();
    let alpha = mesh.enroll("alpha", &[]);
    mesh.issue(&alpha, &["db.alpha.mesh.internal"]);
    mesh.ok(Actor::LocalRoot, revoke_name("db.alpha.mesh.internal", Reason::Unspecified));
    mesh.wait(4 * DAY);
    mesh.crl();
    mesh.wait(HOUR);
    mesh.crl();
    mesh.already_done(Actor::LocalRoot, revoke_name("db.alpha.mesh.internal", Reason::Unspecified));
    assert_eq!(mesh.world.stopped_names(alpha.id).len(), 1);
}

#[test]
fn superseded_asks_for_a_new_key_and_stops_nothing() {
    let mut mesh = Fixture::new();
    let alpha = mesh.enroll("alpha", &[]);
    let first = mesh.issue(&alpha, &["db.alpha.mesh.internal"]);
    mesh.ok(Actor::LocalRoot, revoke_name("db.alpha.mesh.internal", Reason::Superseded));
    let own = mesh.world.view_for(alpha.id).unwrap().own;
    assert_eq!((own.stopped.len(), own.reissue), (0, ["db.alpha.mesh.internal".to_owned()].into()));
    let mut again = mesh.service(&alpha, &["db.alpha.mesh.internal"]);
    again.key_hash = first.key_hash;
    assert!(matches!(mesh.refused(alpha.actor(), issue(&again)), Refusal::KeyRevoked { .. }));
    mesh.issue(&alpha, &["db.alpha.mesh.internal"]);
    assert!(mesh.world.view_for(alpha.id).unwrap().own.reissue.is_empty());
}

#[test]
fn one_serial_ends_one_certificate() {
    let mut mesh = Fixture::new();
    let alpha = mesh.enroll("alpha", &[]);
    let old = mesh.issue(&alpha, &["db.alpha.mesh.internal"]);
    let mut new = mesh.service(&alpha, &["db.alpha.mesh.internal"]);
    new.key_hash = old.key_hash;
    mesh.ok(alpha.actor(), issue(&new));
    let revoke =
        |serial| Command::RevokeCertificates { which: Which::Serial(serial), reason: Reason::Unspecified };
    mesh.ok(Actor::LocalRoot, revoke(old.serial));
    assert!(mesh.world.certificate(&new.serial).unwrap().revoked.is_none());
    assert!(!mesh.world.key_blocked(&old.key_hash), "the pair goes on with its key");
    assert!(mesh.world.stopped_names(alpha.id).is_empty());
    mesh.ok(Actor::LocalRoot, revoke(new.serial));
    assert!(mesh.world.key_blocked(&old.key_hash));
    assert_eq!(mesh.world.stopped_names(alpha.id).len(), 1, "the pair lost what it used");
    mesh.already_done(Actor::LocalRoot, revoke(new.serial));
}

#[test]
fn a_compromised_key_ends_every_certificate_that_has_it() {
    let mut mesh = Fixture::new();
    let alpha = mesh.enroll("alpha", &[]);
    let first = mesh.issue(&alpha, &["a.alpha.mesh.internal"]);
    let mut second = mesh.service(&alpha, &["b.alpha.mesh.internal"]);
    second.key_hash = first.key_hash;
    mesh.ok(alpha.actor(), issue(&second));
    let which = Which::Serial(first.serial);
    mesh.ok(Actor::LocalRoot, Command::RevokeCertificates { which, reason: Reason::KeyCompromise });
    assert!(mesh.world.certificate(&second.serial).unwrap().revoked.is_some());
    assert_eq!(mesh.world.stopped_names(alpha.id).len(), 2);
    let by_key =
        Command::RevokeCertificates { which: Which::KeyHash(first.key_hash), reason: Reason::Unspecified };
    mesh.already_done(Actor::LocalRoot, by_key);
}

#[test]
fn identities_are_not_revoked_as_certificates() {
    let mut mesh = Fixture::new();
    let alpha = mesh.enroll("alpha", &[]);
    let key = mesh.world.node(alpha.id).unwrap().current.as_ref().unwrap().key_hash;
    let whiches =
        [Which::Serial(alpha.serial), Which::KeyHash(key), Which::Name("alpha.mesh.internal".to_owned())];
    for which in whiches {
        let command = Command::RevokeCertificates { which, reason: Reason::Unspecified };
        let refusal = mesh.refused(Actor::LocalRoot, command);
        assert!(matches!(refusal, Refusal::NodeIdentity { .. }), "{refusal}");
    }
    let service = mesh.issue(&alpha, &["alpha.mesh.internal"]);
    mesh.ok(Actor::LocalRoot, revoke_name("alpha.mesh.internal", Reason::Unspecified));
    assert!(mesh.world.certificate(&service.serial).unwrap().revoked.is_some());
    assert!(mesh.world.authenticate(alpha.serial, mesh.now).is_ok(), "only the service of that name ends");
    let serial = mesh.world.controller_serial().unwrap();
    let command = Command::RevokeCertificates { which: Which::Serial(serial), reason: Reason::Unspecified };
    assert_eq!(mesh.refused(Actor::LocalRoot, command), Refusal::ControllerIdentity { serial });
    mesh.wait(4 * DAY);
    let which = Which::Serial(alpha.serial);
    let refusal =
        mesh.refused(Actor::LocalRoot, Command::RevokeCertificates { which, reason: Reason::Unspecified });
    assert!(matches!(refusal, Refusal::NodeIdentity { .. }), "an expired identity may still resume");
    let command = revoke_name("nobody.mesh.internal", Reason::Unspecified);
    assert!(matches!(mesh.refused(Actor::LocalRoot, command), Refusal::CertificateNotFound { .. }));
}

#[test]
fn a_node_revokes_its_own_services_and_learns_nothing_of_others() {
    let mut mesh = Fixture::new();
    let (alpha, bravo) = (mesh.enroll("alpha", &[]), mesh.enroll("bravo", &[]));
    let theirs = mesh.issue(&bravo, &["bravo.mesh.internal"]);
    let own = mesh.issue(&alpha, &["alpha.mesh.internal"]);
    let revoke =
        |serial| Command::RevokeCertificates { which: Which::Serial(serial), reason: Reason::Unspecified };
    for serial in [theirs.serial, bravo.serial, alpha.serial, Serial([0; 16])] {
        let refusal = mesh.refused(alpha.actor(), revoke(serial));
        assert_eq!(refusal, Refusal::CertificateNotFound { which: serial.to_string() });
    }
    mesh.ok(alpha.actor(), revoke(own.serial));
}

#[test]
fn detached_certificates_take_no_nodes_name_and_no_overlay_address() {
    let mut mesh = Fixture::with_policy(GRANT);
    mesh.enroll("alpha", &[]);
    let alice = mesh.operator("alice", Role::Operator);
    let owner = Owner::Detached { operator: Some("alice".try_into().unwrap()) };
    let make = |mesh: &mut Fixture, name: &str| {
        let serial = Serial(mesh.bytes());
        let mut certificate = mesh.certificate(owner.clone(), "server", serial);
        certificate.names = vec![name.try_into().unwrap()];
        certificate.pair_name = name.to_owned();
        certificate
    };
    let good = make(&mut mesh, "printer.mesh.internal");
    assert!(matches!(mesh.refused(Actor::LocalRoot, issue(&good)), Refusal::CertificateMismatch { .. }));
    mesh.ok(alice.clone(), issue(&good));
    let taken = make(&mut mesh, "x.alpha.mesh.internal");
    assert!(matches!(mesh.refused(alice.clone(), issue(&taken)), Refusal::NameTaken { .. }));
    let reserved = make(&mut mesh, "ocsp.mesh.internal");
    assert!(matches!(mesh.refused(alice.clone(), issue(&reserved)), Refusal::NameReserved { .. }));
    let mut address = make(&mut mesh, "printer.mesh.internal");
    address.ips = vec!["192.0.2.7".parse().unwrap()];
    mesh.ok(alice.clone(), issue(&address));
    for ip in ["100.64.0.77".parse().unwrap(), mesh.world.ipv6_of(mesh_core::NodeId(9)).unwrap().into()] {
        let mut overlay = make(&mut mesh, "printer.mesh.internal");
        overlay.ips = vec![ip];
        assert_eq!(mesh.refused(alice.clone(), issue(&overlay)), Refusal::AddressNotOwned { ip });
    }
}

#[test]
fn a_crl_lists_what_is_revoked_until_one_was_signed_after_its_expiry() {
    let mut mesh = Fixture::new();
    let alpha = mesh.enroll("alpha", &[]);
    let service = mesh.issue(&alpha, &["alpha.mesh.internal"]);
    mesh.ok(Actor::LocalRoot, revoke_name("alpha.mesh.internal", Reason::KeyCompromise));
    let at = mesh.now;
    let entry = vec![(service.serial, at, Reason::KeyCompromise)];
    assert_eq!(mesh.world.revoked_entries(&issuer(), 0), entry);
    assert!(mesh.world.revoked_entries(&issuer(), 1).is_empty());
    mesh.crl();
    mesh.wait(4 * DAY);
    assert_eq!(mesh.world.revoked_entries(&issuer(), 0), entry, "expired, but no CRL says so yet");
    mesh.crl();
    assert!(mesh.world.revoked_entries(&issuer(), 0).is_empty());
    mesh.wait(HOUR);
    mesh.crl();
    assert_eq!(mesh.world.certificate(&service.serial), None);
}

#[test]
fn crl_numbers_have_no_gap_and_cover_what_exists() {
    let mut mesh = Fixture::new();
    mesh.crl();
    let head = mesh.world.head_seq();
    let crl = |number, covers_seq, next_update| Command::RecordCrl {
        issuer_key_id: issuer(),
        shard: 0,
        number,
        covers_seq,
        digest: [1; 32],
        this_update: START,
        next_update,
    };
    let next = START + 7 * DAY;
    for number in [0, 1, mesh_core::limits::CRL_NUMBER_MAX + 1, u64::MAX] {
        assert_eq!(
            mesh.refused(Actor::Controller, crl(number, head, next)),
            Refusal::CrlNumber { number, last: 1 }
        );
    }
    for command in [crl(2, head + 1, next), crl(2, 0, next), crl(2, head, START)] {
        assert!(matches!(mesh.refused(Actor::Controller, command), Refusal::CrlMismatch { .. }));
    }
    mesh.ok(Actor::Controller, crl(2, head, next));
    mesh.already_done(Actor::Controller, crl(2, head, next));
    assert_eq!(mesh.world.last_crl_number(&issuer(), 0), 2);
    // After a restore numbers go on above all that may be about.
    mesh.ok(Actor::Controller, crl(1_795_000_000_000, head, next));
    let refused = mesh.refused(Actor::Controller, crl(3, head, next));
    assert_eq!(refused, Refusal::CrlNumber { number: 3, last: 1_795_000_000_000 });
}

#[test]
fn a_pair_that_has_dropped_a_revoked_name_goes_on() {
    let mut mesh = Fixture::new();
    let alpha = mesh.enroll("alpha", &[]);
    let old = mesh.issue(&alpha, &["a.alpha.mesh.internal", "b.alpha.mesh.internal"]);
    let new = mesh.issue(&alpha, &["a.alpha.mesh.internal"]);
    mesh.ok(Actor::LocalRoot, revoke_name("b.alpha.mesh.internal", Reason::Unspecified));
    assert!(mesh.world.certificate(&old.serial).unwrap().revoked.is_some());
    assert!(mesh.world.certificate(&new.serial).unwrap().revoked.is_none());
    assert!(mesh.world.stopped_names(alpha.id).is_empty());
}
