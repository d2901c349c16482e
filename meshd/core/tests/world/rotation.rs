//! Authorities take each other's place while nodes come and go, and nobody's certificate ever fails.

use std::collections::BTreeSet;

use mesh_core::world::NodeState;
use mesh_core::{
    Actor, Bundle, Change, Command, KeyId, OperationId, Owner, Phase, Reason, Record, Refusal, Role,
    RotationKind, Serial, Standing, UtcTime, Which, World,
};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::fixture::*;

fn advance(version: u64) -> Command {
    Command::AdvanceRotation { version }
}

fn acknowledge(nodes: &[&Enrolled], version: u64) -> Command {
    Command::AcknowledgeBundle { version, nodes: nodes.iter().map(|node| node.id).collect() }
}

/// CRLs of everything that is trusted and has none.
fn crls(mesh: &mut Fixture) {
    let missing: Vec<KeyId> = mesh
        .world
        .trusted_authorities()
        .map(|authority| authority.key_id.clone())
        .filter(|key_id| mesh.world.crl(key_id, 0).is_none())
        .collect();
    missing.iter().for_each(|key_id| mesh.crl_by(key_id, 365 * DAY));
}

/// The controller takes a certificate by whoever issues now.
fn certify_controller(mesh: &mut Fixture) {
    let serial = Serial(mesh.bytes());
    let owner = Owner::Controller { name: "ctl-1".to_owned() };
    let certificate = mesh.certificate(owner, "controller", serial);
    mesh.ok(Actor::Controller, Command::RecordControllerCertificate { certificate });
}

fn renew(mesh: &mut Fixture, node: &mut Enrolled) {
    let (renewal, serial) = mesh.renewal(node, false);
    mesh.ok(node.actor(), renewal);
    node.serial = serial;
}

#[test]
fn an_issuing_authority_is_replaced_in_two_steps_and_each_waits_for_everybody() {
    let mut mesh = Fixture::new();
    let (mut alpha, mut bravo) = (mesh.enroll("alpha", &[]), mesh.enroll("bravo", &[]));
    mesh.issue(&alpha, &["alpha.mesh.internal"]);
    let start = start_rotation(&mesh.world, 0x20, false, false);
    mesh.ok(Actor::LocalRoot, start.clone());
    let again = start_rotation(&mesh.world, 0x30, false, false);
    assert!(matches!(mesh.refused(Actor::LocalRoot, again), Refusal::RotationRunning { .. }));
    assert_eq!(mesh.world.active_issuer().unwrap().key_id, issuer(), "announced is not in use");

    let waits = |nodes, leaves, crls| Refusal::RotationWaits { nodes, leaves, crls };
    assert_eq!(mesh.refused(Actor::LocalRoot, advance(2)), waits(2, 0, 2));
    crls(&mut mesh);
    assert_eq!(mesh.refused(Actor::LocalRoot, advance(2)), waits(2, 0, 0));
    mesh.ok(Actor::Controller, acknowledge(&[&alpha], 2));
    mesh.already_done(Actor::Controller, acknowledge(&[&alpha], 2));
    assert_eq!(mesh.refused(Actor::LocalRoot, advance(2)), waits(1, 0, 0));
    mesh.ok(Actor::Controller, acknowledge(&[&bravo], 2));
    let moved = mesh.refused(Actor::LocalRoot, advance(1));
    assert_eq!(moved, Refusal::RotationMoved { asked: 1, now: 2 });
    mesh.ok(Actor::LocalRoot, advance(2));
    assert_eq!(mesh.world.rotation().unwrap().phase, Phase::Issue);
    assert_eq!(mesh.world.active_issuer().unwrap().key_id, KeyId(vec![0x21; 20]));

    // Whoever joins now gets the new one, and owes nothing.
    let late = mesh.enroll("late", &[]);
    mesh.ok(Actor::Controller, acknowledge(&[&alpha, &bravo], 3));
    assert_eq!(mesh.refused(Actor::LocalRoot, advance(3)), waits(0, 4, 0));
    certify_controller(&mut mesh);
    renew(&mut mesh, &mut alpha);
    renew(&mut mesh, &mut bravo);
    // The answers may have got lost: the leaves before still count.
    assert_eq!(mesh.refused(Actor::LocalRoot, advance(3)), waits(0, 3, 0));
    mesh.issue(&alpha, &["alpha.mesh.internal"]);
    mesh.issue(&bravo, &["bravo.mesh.internal"]);
    mesh.ok(Actor::LocalRoot, advance(3));
    assert!(mesh.world.rotation().is_none());
    assert_eq!(mesh.world.authority(&issuer()).unwrap().standing, Standing::Retired);
    assert_eq!(mesh.world.bundle().unwrap().issuers.len(), 1);
    assert!(mesh.world.node(late.id).unwrap().bundle >= 3);

    let mut stale = mesh.service(&alpha, &["stale.alpha.mesh.internal"]);
    stale.issuer_key_id = issuer();
    let refused = mesh.refused(alpha.actor(), issue(&stale));
    assert_eq!(refused, Refusal::IssuerNotActive { issuer: issuer(), standing: "retired" });
    assert_eq!(mesh.refused(Actor::LocalRoot, advance(4)), Refusal::RotationNone);
    assert!(
        matches!(mesh.refused(Actor::LocalRoot, start), Refusal::AuthorityInvalid { .. }),
        "a key is used once"
    );
}

/// Ready for the next step: announced, with CRLs, acknowledged.
fn announced() -> (Fixture, Enrolled) {
    let mut mesh = Fixture::new();
    let alpha = mesh.enroll("alpha", &[]);
    let start = start_rotation(&mesh.world, 0x20, false, false);
    mesh.ok(Actor::LocalRoot, start);
    crls(&mut mesh);
    mesh.ok(Actor::Controller, acknowledge(&[&alpha], 2));
    (mesh, alpha)
}

/// What no decision would write: a journal made by hand, or by a version with a mistake.
fn force(mesh: &mut Fixture, change: Change) {
    let record = Record {
        operation: OperationId(mesh.bytes()),
        at: mesh.now,
        actor: Actor::Controller,
        who: "controller".into(),
        action: "forced".into(),
        changes: vec![change],
    };
    mesh.world.apply(mesh.world.head_seq() + 1, &record);
}

/// The invariant that each step checks first: every live leaf verifies under every live bundle. Nothing that
/// `decide` lets in breaks it, so it is broken here from outside.
#[test]
fn no_step_is_taken_while_a_leaf_in_use_would_fail_somewhere() {
    let (mut mesh, alpha) = announced();
    mesh.world.check_trust(mesh.now).unwrap();
    let mut stray = mesh.service(&alpha, &["stray.alpha.mesh.internal"]);
    stray.issuer_key_id = KeyId(vec![0x77; 20]);
    force(&mut mesh, Change::CertificateIssued { certificate: stray.clone() });
    let gap = mesh.world.check_trust(mesh.now).unwrap_err();
    assert_eq!((gap.serial, gap.holder), (stray.serial, alpha.id));
    assert_eq!(mesh.refused(Actor::LocalRoot, advance(2)), Refusal::TrustGap { gap });
    assert_eq!(mesh.world.rotation().unwrap().phase, Phase::Trust, "nothing has moved");
    // Once it is over the step is free.
    let revoke =
        Command::RevokeCertificates { which: Which::Serial(stray.serial), reason: Reason::Superseded };
    mesh.ok(Actor::LocalRoot, revoke);
    mesh.ok(Actor::LocalRoot, advance(2));

    // A bundle in use that does not know who is to issue next.
    let (mut mesh, alpha) = announced();
    let mut blind = mesh.world.bundle().unwrap().clone();
    blind.version += 1;
    blind.issuers.remove(&KeyId(vec![0x21; 20]));
    force(&mut mesh, Change::BundleIssued { bundle: blind });
    let name = mesh.world.node(alpha.id).unwrap().name.clone();
    let issuer = KeyId(vec![0x21; 20]);
    assert_eq!(mesh.refused(Actor::LocalRoot, advance(2)), Refusal::NodeBlind { node: name, issuer });

    // A leaf of an authority that would be taken back.
    let (mut mesh, alpha) = announced();
    let mut early = mesh.service(&alpha, &["early.alpha.mesh.internal"]);
    early.issuer_key_id = KeyId(vec![0x21; 20]);
    force(&mut mesh, Change::CertificateIssued { certificate: early.clone() });
    let refused = mesh.refused(Actor::LocalRoot, Command::AbortRotation { version: 2 });
    assert_eq!(refused, Refusal::LeafInUse { serial: early.serial, issuer: early.issuer_key_id });
}

#[test]
fn an_authority_that_was_dropped_answers_until_the_last_leaf_by_it_is_off_its_crl() {
    let (mut mesh, mut alpha) = announced();
    let detached = mesh.issue(&alpha, &["web.alpha.mesh.internal"]);
    mesh.ok(Actor::LocalRoot, advance(2));
    certify_controller(&mut mesh);
    renew(&mut mesh, &mut alpha);
    mesh.issue(&alpha, &["web.alpha.mesh.internal"]);
    mesh.ok(Actor::Controller, acknowledge(&[&alpha], 3));
    mesh.ok(Actor::LocalRoot, advance(3));
    let old = |mesh: &Fixture| mesh.world.authority(&issuer()).unwrap().clone();
    assert_eq!(old(&mesh).standing, Standing::Retired);
    assert!(mesh.world.answers(&old(&mesh)) && !mesh.world.is_trusted(&issuer()));

    // Revoked late, it is listed by the one that issued it, and the delegate may be renewed.
    let which = Which::Serial(detached.serial);
    mesh.ok(Actor::LocalRoot, Command::RevokeCertificates { which, reason: Reason::KeyCompromise });
    assert_eq!(mesh.world.revoked_entries(&issuer(), 0)[0].0, detached.serial);
    assert!(!mesh.world.crl_is_complete(&issuer(), 0));
    mesh.crl_by(&issuer(), 7 * DAY);
    let serial = Serial(mesh.bytes());
    let owner = Owner::Controller { name: "ctl-1".to_owned() };
    let mut delegate = mesh.certificate(owner, "ocsp", serial);
    delegate.names.clear();
    delegate.issuer_key_id = issuer();
    mesh.ok(Actor::Controller, Command::RecordResponder { certificate: delegate });

    // The node forgets its identity before with the next renewal; the rest ends.
    renew(&mut mesh, &mut alpha);
    for _ in 0..5 {
        mesh.wait(30 * HOUR);
        renew(&mut mesh, &mut alpha);
        mesh.crl_by(&issuer(), 7 * DAY);
    }
    assert!(!mesh.world.answers(&old(&mesh)));
    assert!(mesh.world.answers(mesh.world.active_issuer().unwrap()));
    let serial = Serial(mesh.bytes());
    let owner = Owner::Controller { name: "ctl-1".to_owned() };
    let mut delegate = mesh.certificate(owner, "ocsp", serial);
    delegate.names.clear();
    delegate.issuer_key_id = issuer();
    let late = mesh.refused(Actor::Controller, Command::RecordResponder { certificate: delegate });
    assert_eq!(late, Refusal::IssuerNotActive { issuer: issuer(), standing: "retired" });
}

#[test]
fn nothing_is_issued_by_an_authority_that_is_only_announced() {
    let mut mesh = Fixture::new();
    let alpha = mesh.enroll("alpha", &[]);
    let start = start_rotation(&mesh.world, 0x20, true, false);
    mesh.ok(Actor::LocalRoot, start);
    let mut early = mesh.service(&alpha, &["alpha.mesh.internal"]);
    for issuer in [KeyId(vec![0x21; 20]), KeyId(vec![0x20; 20]), root(), KeyId(vec![0x77; 20])] {
        early.issuer_key_id = issuer.clone();
        let refused = mesh.refused(alpha.actor(), issue(&early));
        assert!(
            matches!(refused, Refusal::IssuerNotActive { .. } | Refusal::IssuerUnknown { .. }),
            "{issuer}: {refused}"
        );
    }
}

#[test]
fn a_root_follows_only_by_the_signatures_of_both() {
    let mut mesh = Fixture::new();
    let good = start_rotation(&mesh.world, 0x20, true, false);
    let with = |change: &dyn Fn(&mut Vec<mesh_core::Cross>)| {
        let Command::StartRotation { issuing, root, mut crosses, auto } = good.clone() else {
            unreachable!()
        };
        change(&mut crosses);
        Command::StartRotation { issuing, root, crosses, auto }
    };
    let bad = [
        with(&|crosses| crosses.clear()),
        with(&|crosses| drop(crosses.pop())),
        with(&|crosses| crosses[0].der.clear()),
        with(&|crosses| crosses[1] = crosses[0].clone()),
        with(&|crosses| crosses[0].by = KeyId(vec![0x55; 20])),
    ];
    for command in bad {
        assert!(matches!(mesh.refused(Actor::LocalRoot, command), Refusal::AuthorityInvalid { .. }));
    }
    mesh.ok(Actor::LocalRoot, good);
    assert_eq!(mesh.world.bundle().unwrap().roots.len(), 2);
    assert_eq!(mesh.world.rotation().unwrap().kind, RotationKind::Root);
}

#[test]
fn an_abort_before_issuing_is_immediate_and_one_after_it_goes_the_same_way_back() {
    let mut mesh = Fixture::new();
    let mut alpha = mesh.enroll("alpha", &[]);
    let start = start_rotation(&mesh.world, 0x20, true, false);
    mesh.ok(Actor::LocalRoot, start);
    mesh.ok(Actor::LocalRoot, Command::AbortRotation { version: 2 });
    assert!(mesh.world.rotation().is_none());
    assert_eq!(mesh.world.bundle().unwrap().roots, BTreeSet::from([root()]));

    let start = start_rotation(&mesh.world, 0x30, true, false);
    mesh.ok(Actor::LocalRoot, start);
    crls(&mut mesh);
    mesh.ok(Actor::Controller, acknowledge(&[&alpha], 4));
    mesh.ok(Actor::LocalRoot, advance(4));
    certify_controller(&mut mesh);
    renew(&mut mesh, &mut alpha);
    mesh.issue(&alpha, &["alpha.mesh.internal"]);
    mesh.ok(Actor::LocalRoot, Command::AbortRotation { version: 5 });
    assert_eq!(mesh.world.active_issuer().unwrap().key_id, issuer(), "the old one issues again");
    assert_eq!(
        mesh.refused(Actor::LocalRoot, Command::AbortRotation { version: 6 }),
        Refusal::RotationAborted
    );
    assert!(matches!(mesh.refused(Actor::LocalRoot, advance(6)), Refusal::RotationWaits { nodes: 1, .. }));
    mesh.ok(Actor::Controller, acknowledge(&[&alpha], 6));
    certify_controller(&mut mesh);
    renew(&mut mesh, &mut alpha);
    mesh.issue(&alpha, &["alpha.mesh.internal"]);
    mesh.ok(Actor::LocalRoot, advance(6));
    assert_eq!(mesh.world.authority(&KeyId(vec![0x30; 20])).unwrap().standing, Standing::Withdrawn);
    assert_eq!(mesh.refused(Actor::LocalRoot, Command::AbortRotation { version: 7 }), Refusal::RotationNone);
    // Who joined in between pins the root that was withdrawn, and still finds the way.
    assert!(mesh.world.lineage().iter().any(|cross| cross.by == KeyId(vec![0x30; 20])));
}

#[test]
fn only_admins_change_authorities_and_the_controller_advances_only_when_told_to() {
    for auto in [false, true] {
        let mut mesh = Fixture::new();
        let alice = mesh.operator("alice", Role::Operator);
        let admin = mesh.operator("bob", Role::Admin);
        let start = start_rotation(&mesh.world, 0x20, false, auto);
        for actor in [alice.clone(), Actor::Controller] {
            assert!(matches!(mesh.refused(actor, start.clone()), Refusal::Denied { .. }));
        }
        mesh.ok(admin.clone(), start);
        crls(&mut mesh);
        assert!(matches!(mesh.refused(alice.clone(), advance(2)), Refusal::Denied { .. }));
        assert!(matches!(
            mesh.refused(alice.clone(), Command::AbortRotation { version: 2 }),
            Refusal::Denied { .. }
        ));
        assert!(matches!(mesh.refused(admin, acknowledge(&[], 2)), Refusal::Denied { .. }));
        match auto {
            true => drop(mesh.ok(Actor::Controller, advance(2))),
            false => assert!(matches!(mesh.refused(Actor::Controller, advance(2)), Refusal::Denied { .. })),
        }
    }
}

#[test]
fn a_root_leaves_only_after_its_key_was_exported_and_with_a_crl_for_a_year() {
    let mut mesh = Fixture::new();
    let seal = Command::SealRoot { key_id: root() };
    assert_eq!(mesh.refused(Actor::LocalRoot, seal.clone()), Refusal::RootNotExported { root: root() });
    mesh.ok(Actor::LocalRoot, Command::ExportRoot { key_id: root() });
    assert!(matches!(mesh.refused(Actor::LocalRoot, seal.clone()), Refusal::CrlMismatch { .. }));
    mesh.crl_by(&root(), 299 * DAY);
    assert!(matches!(mesh.refused(Actor::LocalRoot, seal.clone()), Refusal::CrlMismatch { .. }));
    mesh.crl_by(&root(), 365 * DAY);
    let unknown = Command::SealRoot { key_id: issuer() };
    assert_eq!(mesh.refused(Actor::LocalRoot, unknown), Refusal::IssuerUnknown { issuer: issuer() });
    mesh.ok(Actor::LocalRoot, seal.clone());
    mesh.already_done(Actor::LocalRoot, seal);
    assert!(mesh.world.active_root().unwrap().sealed);
    let export = Command::ExportRoot { key_id: root() };
    assert_eq!(mesh.refused(Actor::LocalRoot, export), Refusal::RootSealed { root: root() });
}

#[test]
fn a_journal_from_before_authorities_could_change_has_one_bundle() {
    let mesh = Fixture::new();
    let bundle = mesh.world.bundle().unwrap();
    assert_eq!((bundle.version, bundle.issuer.clone()), (1, issuer()));
    assert_eq!(bundle.roots, BTreeSet::from([root()]));
    assert!(bundle.vouches_for(&issuer()));
    assert!(mesh.world.lineage().is_empty());
}

/// A node as it is on its own disk, which is not always what World believes.
struct Model {
    known: Enrolled,
    leaf: Leaf,
    pair: Leaf,
    bundle: Bundle,
    pin: KeyId,
    cut_off_until: UtcTime,
}

struct Leaf {
    issuer: KeyId,
    renew_at: UtcTime,
    not_after: UtcTime,
}

impl Leaf {
    fn of(certificate: &mesh_core::CertificateRecord, now: UtcTime) -> Self {
        Self {
            issuer: certificate.issuer_key_id.clone(),
            renew_at: now + 24 * HOUR,
            not_after: certificate.not_after,
        }
    }
}

/// A fleet on virtual time, cut into pieces at random.
struct Sim {
    mesh: Fixture,
    nodes: Vec<Model>,
    rng: StdRng,
    renewals: u32,
    returns: u32,
}

const STEP: std::time::Duration = std::time::Duration::from_secs(1200);

impl Sim {
    fn new(seed: u64) -> Self {
        let mut sim = Self {
            mesh: Fixture::new(),
            nodes: Vec::new(),
            rng: StdRng::seed_from_u64(seed),
            renewals: 0,
            returns: 0,
        };
        crls(&mut sim.mesh);
        (0..14).for_each(|_| sim.join());
        sim
    }

    fn join(&mut self) {
        let name = format!("n{}", self.nodes.len());
        let known = self.mesh.enroll(&name, &[]);
        let Command::Enroll { certificate, .. } = &known.enrollment else { unreachable!() };
        let leaf = Leaf::of(certificate, self.mesh.now);
        let pair = self.mesh.issue(&known, &[&format!("{name}.mesh.internal")]);
        let pair = Leaf::of(&pair, self.mesh.now);
        let bundle = self.mesh.world.bundle().unwrap().clone();
        let pin = self.mesh.world.active_root().unwrap().key_id.clone();
        self.nodes.push(Model { known, leaf, pair, bundle, pin, cut_off_until: self.mesh.now });
    }

    /// What a node takes up, it takes up only if its pin leads there.
    fn take_bundle(&mut self, index: usize) {
        let world = &self.mesh.world;
        let bundle = world.bundle().unwrap();
        let node = &mut self.nodes[index];
        let (history, mut reached) = (world.history(), BTreeSet::from([node.pin.clone()]));
        while let Some(next) =
            history.iter().find(|cross| reached.contains(&cross.by) && !reached.contains(&cross.root))
        {
            reached.insert(next.root.clone());
        }
        let missing: Vec<_> = bundle.roots.difference(&reached).collect();
        assert!(missing.is_empty(), "{} cannot follow from {} to {missing:?}", node.known.name, node.pin);
        if !bundle.roots.contains(&node.pin) {
            node.pin = world.active_root().unwrap().key_id.clone();
        }
        node.bundle = bundle.clone();
    }

    fn settled(&self, index: usize) -> bool {
        let node = &self.nodes[index];
        let current = self.mesh.world.node(node.known.id).unwrap().current.as_ref().unwrap();
        node.bundle == *self.mesh.world.bundle().unwrap()
            && node.leaf.issuer == node.bundle.issuer
            && node.pair.issuer == node.bundle.issuer
            && current.serial == node.known.serial
    }

    /// One node's exchange with the controller; any answer may get lost.
    fn exchange(&mut self, index: usize) {
        let now = self.mesh.now;
        let lost = |rng: &mut StdRng| rng.random_ratio(1, 6);
        let expired = now >= self.nodes[index].leaf.not_after;
        if !expired {
            // A renewal whose answer got lost is asked for again under the old identity.
            self.take_bundle(index);
        }
        let node = &self.nodes[index];
        if expired || now >= node.leaf.renew_at || node.leaf.issuer != node.bundle.issuer {
            let known = node.known.clone();
            let (command, serial) = self.mesh.renewal(&known, expired);
            let Command::RenewIdentity { certificate, .. } = command.clone() else { unreachable!() };
            self.mesh.ok(known.actor(), command);
            self.renewals += 1;
            if lost(&mut self.rng) {
                return;
            }
            self.returns += u32::from(expired);
            self.nodes[index].leaf = Leaf::of(&certificate, now);
            self.nodes[index].known.serial = serial;
            self.take_bundle(index);
        }
        let node = &self.nodes[index];
        if now >= node.pair.renew_at || node.pair.issuer != node.bundle.issuer {
            let known = node.known.clone();
            let certificate = self.mesh.issue(&known, &[&format!("{}.mesh.internal", known.name)]);
            self.renewals += 1;
            if lost(&mut self.rng) {
                return;
            }
            self.nodes[index].pair = Leaf::of(&certificate, now);
        }
        let known = &self.nodes[index].known;
        if self.settled(index) && !lost(&mut self.rng) {
            let (version, id) = (self.nodes[index].bundle.version, known.id);
            if self.mesh.world.node(id).unwrap().bundle < version {
                self.mesh.ok(Actor::Controller, Command::AcknowledgeBundle { version, nodes: [id].into() });
            }
        } else if self.mesh.world.rotation().is_some_and(|rotation| rotation.phase == Phase::Trust) {
            // In the first phase taking the bundle up is all there is to acknowledge.
            let (version, id) = (self.nodes[index].bundle.version, known.id);
            let node = self.mesh.world.node(id).unwrap();
            let current = node.current.as_ref().unwrap().serial;
            if node.bundle < version && current == known.serial && version == self.mesh.world.bundle_version()
            {
                self.mesh.ok(Actor::Controller, Command::AcknowledgeBundle { version, nodes: [id].into() });
            }
        }
    }

    fn verify_everybody(&self, what: &str) {
        let now = self.mesh.now;
        let live: Vec<&Model> = self.nodes.iter().filter(|node| now < node.leaf.not_after).collect();
        for verifier in &live {
            for shown in &live {
                for leaf in [&shown.leaf, &shown.pair].into_iter().filter(|leaf| now < leaf.not_after) {
                    assert!(
                        verifier.bundle.vouches_for(&leaf.issuer),
                        "{what}: {} refuses {} with bundle {}",
                        verifier.known.name,
                        shown.known.name,
                        verifier.bundle.version
                    );
                }
            }
        }
    }

    fn step(&mut self, what: &str) {
        self.mesh.wait(STEP);
        let now = self.mesh.now;
        for index in 0..self.nodes.len() {
            if now < self.nodes[index].cut_off_until {
                continue;
            }
            if self.rng.random_ratio(1, 400) {
                let hours = self.rng.random_range(1..110);
                self.nodes[index].cut_off_until = now + hours * HOUR;
            } else {
                self.exchange(index);
            }
        }
        self.verify_everybody(what);
        let serial = self.mesh.world.controller_serial().unwrap();
        let held = self.mesh.world.certificate(&serial).cloned();
        let issuer = &self.mesh.world.bundle().unwrap().issuer;
        if held.is_none_or(|held| held.issuer_key_id != *issuer || now + 24 * HOUR > held.not_after) {
            certify_controller(&mut self.mesh);
        }
        self.mesh.world.check_trust(now).unwrap_or_else(|gap| panic!("{what}: {gap}"));
    }

    /// The process was killed: World is what the journal says.
    fn kill(&mut self) {
        let mut world = World::new();
        for (index, record) in self.mesh.journal.iter().enumerate() {
            world.apply(index as u64 + 1, record);
        }
        assert_eq!(world, self.mesh.world);
        self.mesh.world = world;
    }
}

/// One rotation from start to end, at most 500 hours, with an abort at some step or none.
fn rotate(seed: u64, new_root: bool, abort_after: Option<u32>) -> (u32, u32) {
    let what = format!("seed {seed}, root {new_root}, abort {abort_after:?}");
    let mut sim = Sim::new(seed);
    (0..60).for_each(|_| sim.step(&what));
    let start = start_rotation(&sim.mesh.world, 0x20, new_root, true);
    sim.mesh.ok(Actor::LocalRoot, start);
    let mut aborted = false;
    for step in 0..1500 {
        crls(&mut sim.mesh);
        sim.step(&what);
        if step % 97 == 0 {
            sim.join();
            sim.kill();
        }
        let Some(rotation) = sim.mesh.world.rotation().cloned() else { break };
        if abort_after == Some(step) && !rotation.aborted {
            sim.mesh.ok(Actor::LocalRoot, Command::AbortRotation { version: rotation.version });
            aborted = true;
            continue;
        }
        if sim.mesh.world.rotation_waits_for(sim.mesh.now).unwrap().is_over() {
            sim.mesh.ok(Actor::Controller, advance(rotation.version));
            sim.kill();
            sim.verify_everybody(&what);
        }
    }
    assert!(sim.mesh.world.rotation().is_none(), "{what}: it never ended");
    assert_eq!(aborted, abort_after.is_some(), "{what}: it ended before the abort");
    (0..600).for_each(|_| sim.step(&what));
    let world = &sim.mesh.world;
    assert!(world.nodes().all(|node| node.state == NodeState::Active));
    assert_eq!(world.bundle().unwrap().issuers.len(), 1, "{what}");
    (sim.renewals, sim.returns)
}

#[test]
fn no_verification_fails_while_an_issuing_authority_is_replaced_among_partitions() {
    let (mut renewals, mut returns) = (u32::MAX, 0);
    for seed in 0..6 {
        let (renewed, returned) = rotate(seed, false, None);
        (renewals, returns) = (renewals.min(renewed), returns + returned);
    }
    assert!(renewals >= 200 && returns > 0, "{renewals} renewals, {returns} returns");
}

#[test]
fn no_verification_fails_while_the_root_is_replaced_among_partitions() {
    let (mut renewals, mut returns) = (u32::MAX, 0);
    for seed in 100..106 {
        let (renewed, returned) = rotate(seed, true, None);
        (renewals, returns) = (renewals.min(renewed), returns + returned);
    }
    assert!(renewals >= 200 && returns > 0, "{renewals} renewals, {returns} returns");
}

#[test]
fn no_verification_fails_when_a_rotation_is_aborted_at_any_moment() {
    for (seed, step) in [(200, 0), (201, 5), (202, 40), (203, 120), (204, 200), (205, 260)] {
        for root in [true, false] {
            let (renewals, _) = rotate(seed, root, Some(step));
            assert!(renewals > 0, "seed {seed}, root {root}: nothing was renewed, so nothing was tried");
        }
    }
}
