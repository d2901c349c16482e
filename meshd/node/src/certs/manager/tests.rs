//! What a hook that fails does to the files of a service.

use mesh_ca::LeafKey;
use mesh_runtime::ManualClock;

use super::*;
use crate::certs::record::Material;
use crate::network::{self, Outlets};
use crate::pki::read_own;
use crate::state::{Der, Identity, Secret};
use crate::testing::TestMesh;

const NAME: &str = "api.web-1.mesh.internal";

/// A task with one pair, whose published files are in place and whose candidate waits for its hook.
struct Fixture {
    folder: tempfile::TempDir,
    mesh: TestMesh,
    identity: Identity,
    outlets: Outlets,
    task: Task,
}

impl Fixture {
    async fn new(reload: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mesh = TestMesh::new(time::UtcDateTime::now());
        let identity = mesh.node(1, "web-1");
        let state = StateDir::open(&folder.path().join("state")).unwrap();
        state.save_identity(&identity).unwrap();
        let clock = ControllerClock::new(Arc::new(ManualClock::new(mesh.now)), 0);
        let findings = Findings::default();
        let identities = Identities::load(&state, &clock, &findings).unwrap().unwrap();
        let (network, outlets) = network::detached(&mesh.trust(&identity, 1, &[]));
        outlets.crls.send_replace(Arc::new(mesh.crls(1, &[])));
        let out = folder.path().canonicalize().unwrap().join("tls");
        let definition = Definition {
            names: vec![NAME.into()],
            out,
            profile: "server".into(),
            ttl_secs: 0,
            key_type: String::new(),
            owner: None,
            mode: 0o600,
            reload: Some(reload.into()),
            rotate_key: false,
            combined: false,
            p12_passphrase_file: None,
            origin: Origin::Socket,
        };
        let parts = Manager {
            state,
            clock,
            findings,
            host: Host::open().unwrap(),
            identities: Arc::new(identities),
            network,
            uplink: crate::uplink::detached(),
            certs_dir: folder.path().join("certs.d"),
            inbox: mpsc::channel(1).1,
            settled: tokio::sync::watch::Sender::new(0),
        };
        let mut record = Record::new(definition.clone());
        record.published = Some(material(&mesh, &identity));
        record.candidate = Some(material(&mesh, &identity));
        let task = Task {
            parts,
            records: [(NAME.to_owned(), record)].into(),
            live: [(NAME.to_owned(), Live::default())].into(),
            jobs: JoinSet::new(),
            crls: Arc::new(mesh.crls(1, &[])),
            roots: identity.roots.clone(),
            bundle: 0,
            terms: Terms::default(),
        };
        let published = task.records[NAME].published.clone().unwrap();
        task.write(&definition, &published).await.unwrap();
        task.save();
        Self { folder, mesh, identity, outlets, task }
    }

    /// Puts the candidate in place, runs the hook and takes its verdict.
    async fn run_hook(&mut self) {
        self.task.run_hook(NAME).await;
        let done = self.task.jobs.join_next().await.expect("a hook runs").unwrap();
        self.task.finish(done).await;
    }

    fn leaf_in_place(&self) -> Vec<u8> {
        let text = std::fs::read(self.task.records[NAME].definition.out.join("cert.pem")).unwrap();
        mesh_ca::bundle::parse_certificates(&text).unwrap()[0].to_vec()
    }

    fn record(&self) -> &Record {
        &self.task.records[NAME]
    }
}

fn material(mesh: &TestMesh, identity: &Identity) -> Material {
    let key = LeafKey::generate().unwrap();
    let leaf = mesh.service(&key, NAME);
    let with_leaf = Identity { leaf: Der(leaf.clone()), ..identity.clone() };
    let read = read_own(&with_leaf).unwrap();
    Material {
        key: Secret::new(key.to_pkcs8_der().to_vec()),
        leaf: Der(leaf),
        issuers: identity.issuers.clone(),
        serial: read.serial.as_bytes().to_vec(),
        not_before: read.not_before.unix_timestamp(),
        not_after: read.not_after.unix_timestamp(),
        staples: true,
        staple: None,
    }
}

#[tokio::test]
async fn a_hook_that_fails_brings_the_old_pair_back_and_is_tried_again() {
    let mut fixture = Fixture::new("test -e \"$MESH_PAIR_DIR/../service-is-well\"").await;
    let record = fixture.record().clone();
    let (old, new) = (record.published.unwrap().leaf.0, record.candidate.unwrap().leaf.0);
    let (reply, answer) = tokio::sync::oneshot::channel();
    fixture.task.live.get_mut(NAME).unwrap().waiters.push(reply);

    fixture.run_hook().await;
    assert_eq!(fixture.leaf_in_place(), old);
    let failure = answer.await.unwrap().unwrap_err();
    assert_eq!((failure.code, failure.exit), (ErrorCode::HookFailed, 1));
    assert_eq!(fixture.task.parts.findings.list().len(), 1);
    assert_eq!(fixture.task.list()[0].state, "failing");
    assert!(fixture.task.live[NAME].hook_due.is_some(), "another try is due");

    // The service is repaired; the same certificate is offered again, none is issued anew.
    std::fs::write(fixture.folder.path().join("service-is-well"), "").unwrap();
    fixture.task.live.get_mut(NAME).unwrap().last_hook = None;
    fixture.run_hook().await;
    assert_eq!(fixture.leaf_in_place(), new);
    assert!(fixture.record().candidate.is_none());
    assert!(fixture.task.parts.findings.list().is_empty());
    assert_eq!(fixture.task.list()[0].state, "ok");
}

#[tokio::test]
async fn an_old_pair_that_is_revoked_does_not_return() {
    let mut fixture = Fixture::new("exit 1").await;
    let record = fixture.record().clone();
    let (old, new) = (record.published.unwrap(), record.candidate.unwrap());
    fixture.outlets.crls.send_replace(Arc::new(fixture.mesh.crls(2, &[&old.serial])));
    fixture.run_hook().await;
    assert_eq!(fixture.leaf_in_place(), new.leaf.0);
    assert_eq!(fixture.task.parts.findings.list().len(), 1);
    assert_eq!(fixture.identity.name, "web-1");
}

#[tokio::test]
async fn a_new_crl_is_written_at_once_and_survives_a_hook_that_fails() {
    let mut fixture = Fixture::new("exit 1").await;
    fixture.task.records.get_mut(NAME).unwrap().candidate = None;
    let crls = fixture.mesh.crls(2, &[&[0x47; 16]]);
    fixture.outlets.crls.send_replace(Arc::new(crls.clone()));
    fixture.task.write_crls().await;
    let in_place = || {
        let text = std::fs::read(fixture.task.records[NAME].definition.out.join("crl.pem")).unwrap();
        mesh_ca::bundle::parse_crls(&text).unwrap()
    };
    let expected: Vec<Vec<u8>> = crls.iter().map(|crl| crl.der.to_vec()).collect();
    assert_eq!(in_place(), expected);
    assert!(fixture.task.live[NAME].hook_due.is_some(), "the service is told");
    fixture.run_hook().await;
    let text = std::fs::read(fixture.record().definition.out.join("crl.pem")).unwrap();
    assert_eq!(mesh_ca::bundle::parse_crls(&text).unwrap(), expected, "a broken hook revives nothing");
}

#[tokio::test]
async fn the_controllers_word_stops_a_pair_and_orders_a_new_key() {
    let mut fixture = Fixture::new("true").await;
    let own = |stopped: bool, reissue: bool| pb::Own {
        stopped_names: stopped.then(|| NAME.to_owned()).into_iter().collect(),
        reissue_names: reissue.then(|| NAME.to_owned()).into_iter().collect(),
        ..Default::default()
    };
    fixture.task.take_own(&own(true, false));
    assert_eq!(fixture.task.list()[0].state, "stopped");
    assert!(fixture.record().request.is_none(), "a stopped pair is not asked for");
    fixture.task.take_own(&own(false, true));
    let request = fixture.record().request.clone().expect("a new certificate is asked for");
    let old_key = &fixture.record().published.as_ref().unwrap().key;
    assert!(request.key != *old_key, "with a new key");
    // The same word again, for instance after a restart, is no second order.
    fixture.task.records.get_mut(NAME).unwrap().request = None;
    fixture.task.take_own(&own(false, true));
    assert!(fixture.record().request.is_none());
    // On disk before anything is sent.
    assert!(fixture.task.parts.state.pairs().unwrap()[NAME].reissued);
}

#[tokio::test]
async fn a_pair_that_policy_refuses_says_why_and_waits_for_another_policy() {
    let mut fixture = Fixture::new("true").await;
    fixture.task.records.get_mut(NAME).unwrap().candidate = None;
    fixture.task.live.get_mut(NAME).unwrap().judge = false;
    let own = |policy_version| pb::Own { policy_version, ..Default::default() };
    fixture.task.take_own(&own(2));
    assert!(fixture.task.live[NAME].judge, "a new policy is asked about at once");
    let refusal = Failure::new(ErrorCode::NameOutsideProfile, "no rule gives it", "ask for another name");
    fixture.task.judged(NAME, Ok(Some(refusal.clone())));
    let shown = fixture.task.list().remove(0);
    assert_eq!((&*shown.state, &*shown.problem), ("failing", "E0572: no rule gives it; not renewed"));
    assert!(fixture.task.parts.findings.list()[0].what.contains("E0572"));
    // A reload of the service, for a new CRL say, changes nothing about it.
    fixture.run_hook().await;
    assert_eq!(fixture.task.list()[0].state, "failing");
    assert!(fixture.task.live[NAME].judge_after.is_some(), "it is asked again, but not in a loop");
    fixture.task.take_own(&own(3));
    assert!(fixture.task.live[NAME].judge && fixture.task.live[NAME].judge_after.is_none());
    fixture.task.judged(NAME, Ok(None));
    assert_eq!(fixture.task.list()[0].state, "ok");
    assert!(fixture.task.parts.findings.list().is_empty());
    // The controller's refusal of a renewal is the same.
    fixture.task.not_issued(NAME, refusal);
    assert!(fixture.task.live[NAME].refused.is_some() && fixture.task.live[NAME].ask_after.is_none());
    assert!(fixture.record().published.is_some(), "what is there stays");
}

#[tokio::test]
async fn a_new_ocsp_response_is_written_beside_the_pair_and_told_to_the_service() {
    let mut fixture = Fixture::new("true").await;
    fixture.task.records.get_mut(NAME).unwrap().candidate = None;
    let serial = fixture.record().published.as_ref().unwrap().serial.clone();
    let file = fixture.record().definition.out.join("ocsp.der");
    assert!(!file.exists());
    let now = fixture.mesh.now.unix_timestamp();
    let staple = |mark: u8| Staple { der: Der(vec![mark]), taken_at: now, next_update: now + 86_400 };
    fixture.task.stapled(NAME, &serial, Ok(Some(staple(1)))).await;
    assert_eq!(std::fs::read(&file).unwrap(), [1]);
    assert!(fixture.task.live[NAME].hook_due.is_some(), "the service is told");
    // One about a certificate that was replaced meanwhile is of no use.
    fixture.task.stapled(NAME, &[0x47; 16], Ok(Some(staple(2)))).await;
    assert_eq!(std::fs::read(&file).unwrap(), [1]);
    let published = fixture.record().published.clone().unwrap();
    let at = |seconds: i64| fixture.mesh.now + time::Duration::seconds(seconds);
    assert!(!published.wants_staple(at(28_000)) && published.wants_staple(at(28_801)), "after a third");
    assert!(!Material { staples: false, staple: None, ..published }.wants_staple(at(0)), "not for everyone");
    // A new certificate without a response takes the old one's away.
    let mesh = &fixture.mesh;
    let next = material(mesh, &fixture.identity);
    fixture.task.records.get_mut(NAME).unwrap().candidate = Some(next);
    fixture.run_hook().await;
    assert!(!file.exists() && std::fs::symlink_metadata(&file).is_err());
}
