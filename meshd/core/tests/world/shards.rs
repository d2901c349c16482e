//! CRL shards: fixed at issuance, grown and never moved, together exactly the journal's revocations.

use std::collections::{BTreeMap, BTreeSet};

use mesh_core::limits::CERTIFICATES_PER_SHARD;
use mesh_core::world::ShardGroup;
use mesh_core::{Actor, Change, Command, Reason, Record, Refusal, Serial, UtcTime, Which, World};
use proptest::prelude::*;

use crate::fixture::*;

const BASE: &str = "http://pki.mesh.internal";

fn open(count: u16, base_url: &str) -> Command {
    Command::OpenCrlShards { issuer_key_id: issuer(), count, base_url: base_url.to_owned() }
}

fn revoke(serial: Serial) -> Command {
    Command::RevokeCertificates { which: Which::Serial(serial), reason: Reason::CessationOfOperation }
}

#[test]
fn a_certificate_keeps_the_shard_and_the_address_of_its_issuance() {
    let mut mesh = Fixture::new();
    let web = mesh.enroll("web-1", &[]);
    let before = mesh.issue(&web, &["web-1.mesh.internal"]);
    assert_eq!((before.shard, mesh.world.crl_url(&issuer(), 0)), (0, None));
    assert_eq!(mesh.world.crl_shards(&issuer()), [0]);
    mesh.ok(Actor::Controller, open(4, BASE));
    mesh.already_done(Actor::Controller, open(4, BASE));
    let first = mesh.issue(&web, &["a.web-1.mesh.internal"]);
    assert!((1..=4).contains(&first.shard));
    let url = mesh.world.crl_url(&issuer(), first.shard);
    assert_eq!(url, Some(format!("{BASE}/crl/{}/{}.crl", issuer(), first.shard)));
    // Another address opens other shards; the old ones keep theirs.
    mesh.ok(Actor::Controller, open(2, "http://192.0.2.1:8080/pki"));
    let second = mesh.issue(&web, &["b.web-1.mesh.internal"]);
    assert!((5..=6).contains(&second.shard));
    assert_eq!(mesh.world.crl_url(&issuer(), first.shard), url);
    let live: BTreeSet<u16> = mesh.world.crl_shards(&issuer()).into_iter().collect();
    assert!(live.is_superset(&BTreeSet::from([0, first.shard, 5, 6])));
    for certificate in [before, first, second] {
        assert_eq!(mesh.world.certificate(&certificate.serial).unwrap().shard, certificate.shard);
    }
}

#[test]
fn a_certificate_of_no_known_shard_is_refused() {
    let mut mesh = Fixture::new();
    let web = mesh.enroll("web-1", &[]);
    for (opened, shard) in [(false, 1), (true, 0), (true, 5)] {
        if opened {
            let _ = mesh.give(Actor::Controller, open(4, BASE));
        }
        let mut certificate = mesh.service(&web, &["web-1.mesh.internal"]);
        certificate.shard = shard;
        let refusal = mesh.refused(web.actor(), issue(&certificate));
        assert_eq!(refusal, Refusal::CertificateMismatch { what: "its CRL shard does not exist" });
    }
}

#[test]
fn only_usable_shards_are_opened_and_only_by_the_controller() {
    let mut mesh = Fixture::new();
    for (count, base) in
        [(0, BASE), (257, BASE), (4, "https://pki.mesh.internal"), (4, "http://a/?b"), (4, "")]
    {
        let refusal = mesh.refused(Actor::Controller, open(count, base));
        assert!(matches!(refusal, Refusal::CrlMismatch { .. }), "{count} {base}");
    }
    assert!(matches!(mesh.refused(Actor::LocalRoot, open(4, BASE)), Refusal::Denied { .. }));
    let root = mesh.world.active_root().unwrap().key_id.clone();
    let of_root = Command::OpenCrlShards { issuer_key_id: root, count: 4, base_url: BASE.to_owned() };
    assert!(matches!(mesh.refused(Actor::Controller, of_root), Refusal::IssuerUnknown { .. }));
}

#[test]
fn full_shards_get_company_and_empty_ones_are_used_again() {
    let mut mesh = Fixture::new();
    mesh.ok(Actor::Controller, open(1, BASE));
    let operator = Actor::LocalRoot;
    let add = |mesh: &mut Fixture| {
        let serial = Serial(mesh.bytes());
        let owner = mesh_core::Owner::Detached { operator: None };
        let mut certificate = mesh.certificate(owner, "server", serial);
        certificate.names = vec![format!("{serial}.example.mesh.internal").try_into().unwrap()];
        certificate.pair_name = certificate.names[0].to_string();
        mesh.ok(operator.clone(), issue(&certificate));
        certificate.shard
    };
    for _ in 0..CERTIFICATES_PER_SHARD {
        assert!(!mesh.world.shards_are_full(&issuer()));
        assert_eq!(add(&mut mesh), 1);
    }
    assert!(mesh.world.shards_are_full(&issuer()));
    mesh.ok(Actor::Controller, open(1, BASE));
    assert_eq!(add(&mut mesh), 2);
    // The first shard's certificates end: it takes new ones again.
    mesh.wait(73 * HOUR);
    mesh.crl_of(1);
    assert_eq!(add(&mut mesh), 1);
    // Shard 0 has the controller's own certificate of before.
    assert_eq!(mesh.world.crl_shards(&issuer()), [0, 1, 2]);
}

#[test]
fn a_revocation_makes_one_shard_incomplete() {
    let mut mesh = Fixture::new();
    let web = mesh.enroll("web-1", &[]);
    mesh.ok(Actor::Controller, open(4, BASE));
    for shard in 0..=4 {
        mesh.crl_of(shard);
    }
    let certificate = mesh.issue(&web, &["web-1.mesh.internal"]);
    mesh.ok(web.actor(), revoke(certificate.serial));
    let incomplete: Vec<u16> =
        (0..=4).filter(|shard| !mesh.world.crl_is_complete(&issuer(), *shard)).collect();
    assert_eq!(incomplete, [0, certificate.shard], "and the one that speaks for the whole issuer");
    let seq = mesh.world.head_seq();
    mesh.crl_of(certificate.shard);
    assert!(!mesh.world.crl_is_complete(&issuer(), 0));
    assert!(mesh.world.crl_is_complete(&issuer(), certificate.shard));
    let touched = mesh.world.touched_since(seq).unwrap();
    assert_eq!(touched.crls, BTreeSet::from([(issuer(), certificate.shard)]), "deltas stay small");
}

/// The form in which shipped journals hold it.
#[test]
fn the_record_of_opened_shards_is_never_read_differently() {
    let text = r#"{"crl_shards_opened":{"issuer_key_id":"0808","group":{"first":1,"count":4,"base_url":"http://pki.mesh.internal"}}}"#;
    let change: Change = serde_json::from_str(text).unwrap();
    let group = ShardGroup { first: 1, count: 4, base_url: BASE.to_owned() };
    let issuer_key_id = mesh_core::KeyId(vec![8; 2]);
    assert_eq!(change, Change::CrlShardsOpened { issuer_key_id, group });
    assert_eq!(serde_json::to_string(&change).unwrap(), text);
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Issue,
    Revoke(prop::sample::Index),
    RevokeNode,
    Wait(u32),
    /// Signs every CRL that lacks a revocation, as the publisher does after each record.
    Complete,
    /// Signs every CRL anew, as the publisher does by time.
    Resign,
    Open(u16, bool),
    Restart,
    Replay,
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => Just(Step::Issue),
        4 => any::<prop::sample::Index>().prop_map(Step::Revoke),
        1 => Just(Step::RevokeNode),
        2 => (1u32..100).prop_map(Step::Wait),
        3 => Just(Step::Complete),
        1 => Just(Step::Resign),
        1 => (1u16..5, any::<bool>()).prop_map(|(count, other)| Step::Open(count, other)),
        1 => Just(Step::Restart),
        1 => Just(Step::Replay),
    ]
}

/// What a relying party has: the newest list of each shard.
#[derive(Default)]
struct Published {
    lists: BTreeMap<u16, BTreeSet<Serial>>,
    /// When a list that was signed after the certificate's end last held it.
    after_end: BTreeSet<Serial>,
    number: BTreeMap<u16, u64>,
}

impl Published {
    fn sign(&mut self, mesh: &mut Fixture, shard: u16, ends: &BTreeMap<Serial, UtcTime>) {
        let listed: BTreeSet<Serial> =
            mesh.world.revoked_entries(&issuer(), shard).into_iter().map(|(serial, ..)| serial).collect();
        let now = mesh.now;
        self.after_end.extend(listed.iter().filter(|serial| ends[*serial] <= now));
        self.lists.insert(shard, listed);
        mesh.crl_of(shard);
        let number = mesh.world.last_crl_number(&issuer(), shard);
        let before = self.number.insert(shard, number).unwrap_or(0);
        assert_eq!(number, before + 1, "numbers rise by one, also after a restart");
    }

    fn complete(&mut self, mesh: &mut Fixture, all: bool, ends: &BTreeMap<Serial, UtcTime>) {
        for shard in mesh.world.crl_shards(&issuer()) {
            if all || !mesh.world.crl_is_complete(&issuer(), shard) {
                self.sign(mesh, shard, ends);
            }
        }
    }
}

fn revocations(journal: &[Record]) -> BTreeSet<Serial> {
    let changes = journal.iter().flat_map(|record| &record.changes);
    changes
        .filter_map(|change| match change {
            Change::CertificateRevoked { serial, .. } => Some(*serial),
            _ => None,
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// The lists of all shards together are the journal's revocations: nothing that is revoked and unexpired is
    /// missing, nothing else is listed, and what expired was on one more list first.
    #[test]
    fn the_shards_together_are_the_journals_revocations(steps in prop::collection::vec(any_step(), 1..60)) {
        let mut mesh = Fixture::new();
        let mut published = Published::default();
        let mut ends: BTreeMap<Serial, UtcTime> = BTreeMap::new();
        let mut shards: BTreeMap<Serial, u16> = BTreeMap::new();
        let (mut node, mut names, mut issued) = (mesh.enroll("n0", &[]), 0, Vec::new());
        for step in steps {
            match step {
                Step::Issue => {
                    names += 1;
                    let name = format!("s{names}.{}.mesh.internal", node.name);
                    let certificate = mesh.service(&node, &[&name]);
                    if mesh.give(node.actor(), issue(&certificate)).is_ok() {
                        issued.push(certificate.serial);
                        shards.insert(certificate.serial, certificate.shard);
                    }
                }
                Step::Revoke(which) if !issued.is_empty() => {
                    let _ = mesh.give(Actor::LocalRoot, revoke(*which.get(&issued)));
                }
                Step::RevokeNode => {
                    mesh.ok(Actor::LocalRoot, revoke_node(&node));
                    names += 1;
                    node = mesh.enroll(&format!("n{names}"), &[]);
                }
                Step::Revoke(_) => {}
                Step::Wait(hours) => mesh.wait(hours * HOUR),
                Step::Complete => published.complete(&mut mesh, false, &ends),
                Step::Resign => published.complete(&mut mesh, true, &ends),
                Step::Open(count, other) => {
                    let base = if other { "http://192.0.2.1:8080" } else { BASE };
                    let _ = mesh.give(Actor::Controller, open(count, base));
                }
                Step::Restart => {
                    let mut snapshot = Vec::new();
                    ciborium::into_writer(&mesh.world, &mut snapshot).unwrap();
                    mesh.world = ciborium::from_reader(snapshot.as_slice()).unwrap();
                }
                Step::Replay => {
                    let mut world = World::new();
                    for (index, record) in mesh.journal.iter().enumerate() {
                        world.apply(index as u64 + 1, record);
                    }
                    prop_assert_eq!(&world, &mesh.world);
                }
            }
            ends.extend(mesh.world.certificates().map(|c| (c.serial, c.not_after)));
        }
        published.complete(&mut mesh, false, &ends);
        let (revoked, live) = (revocations(&mesh.journal), mesh.world.crl_shards(&issuer()));
        let listed: BTreeSet<Serial> =
            live.iter().filter_map(|shard| published.lists.get(shard)).flatten().copied().collect();
        prop_assert!(listed.is_subset(&revoked), "only what is revoked is listed");
        for serial in &revoked {
            let expired = ends[serial] <= mesh.now;
            prop_assert!(listed.contains(serial) || expired, "{serial} is revoked, unexpired and on no list");
            let remembered = mesh.world.certificate(serial);
            prop_assert!(
                remembered.is_some() || published.after_end.contains(serial),
                "{serial} left before one more list had it"
            );
            if let Some(known) = remembered.filter(|_| !expired) {
                let own = published.lists.get(&known.shard);
                prop_assert!(own.is_some_and(|list| list.contains(serial)), "{serial} is in its own shard");
            }
        }
        for (shard, list) in &published.lists {
            let foreign = list.iter().find(|serial| {
                *shard != 0 && shards.get(*serial).is_some_and(|own| own != shard)
            });
            prop_assert_eq!(foreign, None, "an entry is in another shard");
        }
    }
}
