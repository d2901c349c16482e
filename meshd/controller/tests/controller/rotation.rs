//! Authorities replaced over the wire: what nodes are told, what is refused, and who comes back how.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use mesh_ca::{Csr, LeafKey, TrustAnchors, TrustDomain, Usage, verify_chain};
use mesh_controller::{Controller, Environment, Passphrase, StartupError, Unlock};
use mesh_proto::v1 as pb;
use rustls_pki_types::CertificateDer;
use time::UtcDateTime;

use crate::harness::*;
use crate::ocsp::{self, Files};

pub(crate) async fn ca(running: &Running) -> pb::ca_client::CaClient<tonic::transport::Channel> {
    pb::ca_client::CaClient::new(running.local().await)
}

pub(crate) async fn start(running: &Running, root: bool) -> pb::RotationInfo {
    let request = pb::StartRotationRequest { root, operation_id: operation().into(), ..Default::default() };
    ca(running).await.start_rotation(request).await.unwrap().into_inner()
}

pub(crate) async fn status(running: &Running) -> pb::RotationInfo {
    ca(running).await.rotation_status(pb::Empty {}).await.unwrap().into_inner()
}

pub(crate) async fn advance(running: &Running) -> Result<pb::RotationInfo, tonic::Status> {
    let version = status(running).await.version;
    let step = pb::RotationStep { version, operation_id: operation().into() };
    Ok(ca(running).await.advance_rotation(step).await?.into_inner())
}

async fn ready(running: &Running) {
    within(Duration::from_secs(20), "the rotation is ready", async {
        while !status(running).await.ready {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

/// What a node that does everything right says about bundle `trust`.
async fn acknowledge(stream: &SyncStream, trust: u64) {
    let ack = pb::sync_request::Ack { trust, ..Default::default() };
    stream.send(pb::sync_request::Request::Ack(ack)).await;
}

async fn renew(running: &Running, node: &Node) -> Node {
    let candidate = Candidate::new("alpha");
    let request = pb::RenewRequest {
        csr: mesh_ca::Csr::create(&candidate.key).unwrap().into(),
        wireguard_public_keys: vec![node.wireguard.to_vec().into()],
        operation_id: operation().into(),
    };
    let mut client = pb::renewal_client::RenewalClient::new(running.member(&node.identity).await);
    let renewed = client.renew(request).await.unwrap().into_inner();
    Node { wireguard: node.wireguard, ..candidate.into_node(renewed) }
}

fn anchors(roots: &[bytes::Bytes]) -> TrustAnchors {
    TrustAnchors::new(TrustDomain::parse(DOMAIN).unwrap(), roots).unwrap()
}

#[tokio::test]
async fn a_root_is_replaced_and_each_message_holds_what_the_next_step_needs() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    let first_pin = ca(&running).await.show(pb::Empty {}).await.unwrap().into_inner().root_spki_sha256;
    let node = running.enroll("alpha").await;
    let (mut stream, full) = SyncStream::of(&running, &node).await;
    assert_eq!(full.trust.unwrap().version, 1);
    let old = running.root.to_vec();

    let info = start(&running, true).await;
    assert_eq!((info.phase.as_str(), info.waits_for_nodes.as_slice()), ("trust", &["alpha".to_owned()][..]));
    let bundle = stream.new_full().await.trust.unwrap();
    assert_eq!((bundle.version, bundle.roots.len(), bundle.issuers.len()), (2, 2, 2));
    assert_eq!(bundle.roots[0], old, "the one that issues leads");
    assert_eq!(code(&advance(&running).await.unwrap_err()), pb::ErrorCode::RotationWaits);
    let again = pb::StartRotationRequest { operation_id: operation().into(), ..Default::default() };
    let refused = ca(&running).await.start_rotation(again).await.unwrap_err();
    assert_eq!(code(&refused), pb::ErrorCode::RotationRunning);
    acknowledge(&stream, 2).await;
    ready(&running).await;
    // CRLs of all four are published before anything is issued.
    let crls = ca(&running).await.show(pb::Empty {}).await.unwrap().into_inner().crls;
    assert_eq!(crls.len(), 4);

    assert_eq!(advance(&running).await.unwrap().phase, "issue");
    let bundle = stream.new_full().await.trust.unwrap();
    // Both trusted roots can be reached from the other.
    assert_eq!((bundle.version, bundle.lineage.len()), (3, 2));
    assert_ne!(bundle.roots[0], old, "the new root leads");
    // Whoever knows only the old root still reaches the controller, by the signed history.
    let renewed = renew(&running, &node).await;
    let issuers: Vec<_> =
        renewed.enrolled.issuers.iter().map(|der| CertificateDer::from(der.to_vec())).collect();
    let now = UtcDateTime::now();
    let under = |roots: &[bytes::Bytes]| {
        verify_chain(&renewed.identity.leaf, &issuers, &anchors(roots), now, Usage::Any, None)
    };
    under(&bundle.roots[..1]).unwrap();
    assert!(under(&[old.clone().into()]).is_err(), "the new leaf is the new root's");
    let (stream, _) = SyncStream::of(&running, &renewed).await;
    acknowledge(&stream, 3).await;
    ready(&running).await;
    assert!(!advance(&running).await.unwrap().running);

    // The old root is gone from every answer, and the token pins the new one.
    let late = running.enroll("bravo").await;
    assert_eq!(late.enrolled.roots.len(), 1);
    assert_ne!(late.enrolled.roots[0], old);
    let token = running.plain_token().await;
    assert_ne!(token.0.root_spki_sha256, first_pin);
    assert_eq!(code(&advance(&running).await.unwrap_err()), pb::ErrorCode::RotationNone);
    running.stop().await.unwrap();

    // After a restart the keys of those in use are found, and the ones of the others not missed.
    let running = mesh.start().await;
    assert_ne!(running.root.to_vec(), old);
    running.enroll("charlie").await;
    running.stop().await.unwrap();
}

/// Ends the process and starts it again; the rotation stands where it stood.
async fn restart(mesh: &Mesh, running: Running) -> Running {
    let before = status(&running).await;
    running.stop().await.unwrap();
    let running = mesh.start().await;
    let after = status(&running).await;
    let facts = |info: pb::RotationInfo| {
        (
            (info.running, info.kind, info.phase, info.aborted, info.version),
            (info.from, info.to, info.started_at, info.phase_at),
        )
    };
    assert_eq!(facts(before), facts(after));
    running
}

async fn abort(running: &Running) -> Result<pb::RotationInfo, tonic::Status> {
    let version = status(running).await.version;
    let step = pb::RotationStep { version, operation_id: operation().into() };
    Ok(ca(running).await.abort_rotation(step).await?.into_inner())
}

/// The node renews under the CA that issues now and says that it has the newest bundle.
pub(crate) async fn follow(running: &Running, node: &Node) -> Node {
    let renewed = renew(running, node).await;
    let (stream, full) = SyncStream::of(running, &renewed).await;
    acknowledge(&stream, full.trust.unwrap().version).await;
    ready(running).await;
    renewed
}

#[tokio::test]
async fn a_rotation_goes_on_after_a_restart_in_every_phase_and_may_be_taken_back() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    let alpha = running.enroll("alpha").await;
    let keys = || std::fs::read_dir(mesh.state_dir().join("keys")).unwrap().count();
    let first = keys();
    assert_eq!(start(&running, true).await.phase, "trust");
    let running = restart(&mesh, running).await;
    // Nothing was issued by the announced ones: they are gone at once, and their keys with them.
    assert!(!abort(&running).await.unwrap().running);
    let show = ca(&running).await.show(pb::Empty {}).await.unwrap().into_inner();
    assert_eq!((show.roots.len(), show.issuers.len()), (1, 1), "the announced ones are withdrawn");
    assert_eq!(code(&abort(&running).await.unwrap_err()), pb::ErrorCode::RotationNone);
    let running = restart(&mesh, running).await;
    assert_eq!(keys(), first);

    start(&running, false).await;
    let alpha = follow(&running, &alpha).await;
    assert_eq!(advance(&running).await.unwrap().phase, "issue");
    let running = restart(&mesh, running).await;
    let bravo = running.enroll("bravo").await;
    assert_eq!(bravo.enrolled.trust.as_ref().unwrap().version, status(&running).await.version);
    let back = abort(&running).await.unwrap();
    assert!(back.running && back.aborted);
    assert_eq!(code(&abort(&running).await.unwrap_err()), pb::ErrorCode::RotationRefused);
    let running = restart(&mesh, running).await;
    let waits = advance(&running).await.unwrap_err();
    assert_eq!(code(&waits), pb::ErrorCode::RotationWaits, "leaves of the one that goes are in use");
    let renewed = renew(&running, &alpha).await;
    let (stream, full) = SyncStream::of(&running, &renewed).await;
    acknowledge(&stream, full.trust.unwrap().version).await;
    let bravo = follow(&running, &bravo).await;
    assert!(!advance(&running).await.unwrap().running);
    let running = restart(&mesh, running).await;
    let show = ca(&running).await.show(pb::Empty {}).await.unwrap().into_inner();
    assert_eq!(show.issuers.len(), 1);
    assert_eq!(show.issuers[0].der, bravo.enrolled.issuers[0], "the old one issues");
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_ca_answers_for_what_it_issued_until_that_has_ended() {
    let clock = Arc::new(mesh_runtime::ManualClock::new(UtcDateTime::now()));
    let mesh = Mesh::init_at(clock.clone());
    let now = || mesh_runtime::Clock::utc_now(&*clock);
    let running = ocsp::start(&mesh).await;
    let keys = || {
        let names = std::fs::read_dir(mesh.state_dir().join("keys")).unwrap();
        names.map(|name| name.unwrap().file_name().into_string().unwrap()).collect::<BTreeSet<_>>()
    };
    let alpha = running.enroll("alpha").await;
    let old = alpha.enrolled.issuers[0].clone();
    let service = running.service(&alpha, "web.alpha.mesh.internal", "peer").await;
    let serial = ocsp::serial(&service);
    let pointer = crate::publishing::pointer(&service.leaf).unwrap();
    let path = pointer.strip_prefix(ocsp::BASE).unwrap().to_owned();

    start(&running, false).await;
    let alpha = follow(&running, &alpha).await;
    advance(&running).await.unwrap();
    let alpha = renew(&running, &alpha).await;
    running.service(&alpha, "web.alpha.mesh.internal", "peer").await;
    let (mut stream, full) = SyncStream::of(&running, &alpha).await;
    acknowledge(&stream, full.trust.unwrap().version).await;
    ready(&running).await;
    assert!(!advance(&running).await.unwrap().running);
    let ended = stream.new_full().await;
    let told: Vec<_> = ended.crls.iter().map(|crl| crl.issuer_key_id.to_vec()).collect();
    let old_id = mesh_ca::ca_key_identifier(&old).unwrap().as_bytes().to_vec();
    assert!(!told.contains(&old_id), "nodes are not told what nobody trusts");

    // Both ways of asking, before and after the process starts anew; signed by the old key, and by its delegate.
    let says = async |revoked: bool| {
        let files = Files::new(&with_issuer(&alpha, &old), mesh.web()[0]);
        let (head, der) = ocsp::exchange(files.address, &format!("GET {path} HTTP/1.1\r\n"), b"").await;
        assert!(head.starts_with("http/1.1 200"), "{head}");
        let crl = mesh_ca::Crl::parse_verified(&der, &old).unwrap();
        let number = mesh_ca::SerialNumber::from_slice(&serial).unwrap();
        assert_eq!(crl.contains(&number), revoked, "CRL");
        let request = ocsp::request(&files, &serial, false).await;
        let length = request.len();
        let head = format!(
            "POST /ocsp HTTP/1.1\r\ncontent-type: application/ocsp-request\r\ncontent-length: {length}\r\n"
        );
        let (_, answer) = ocsp::exchange(files.address, &head, &request).await;
        let parsed = mesh_ca::parse_ocsp_response(&answer, &old, now()).unwrap();
        assert_eq!(matches!(parsed.status, mesh_ca::OcspStatus::Revoked { .. }), revoked, "OCSP");
        crl.number()
    };
    says(false).await;
    ocsp::revoke(&running, &serial).await;
    let number = says(true).await;
    running.stop().await.unwrap();
    let running = ocsp::start(&mesh).await;
    assert!(says(true).await >= number, "numbers rise");
    assert_eq!(keys().len(), 3, "root, the old one, the new one: {:?}", keys());

    // Renewed once more, the node remembers nothing of it; then all it issued ends, and is on one CRL after that.
    renew(&running, &alpha).await;
    running.stop().await.unwrap();
    for _ in 0..3 {
        clock.advance(Duration::from_secs(100 * 3600));
        let running = ocsp::start(&mesh).await;
        running.plain_token().await;
        running.stop().await.unwrap();
    }
    let running = ocsp::start(&mesh).await;
    let gone = async {
        while keys().len() > 2 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    within(Duration::from_secs(10), "the key of the dropped CA is removed", gone).await;
    assert!(!keys().contains("issuing.key"), "{:?}", keys());
    let (head, _) = ocsp::exchange(mesh.web()[0], &format!("GET {path} HTTP/1.1\r\n"), b"").await;
    assert!(head.starts_with("http/1.1 404"), "{head}");
    running.enroll("bravo").await;
    running.stop().await.unwrap();
}

/// The node as somebody sees it who has its former issuer.
fn with_issuer(node: &Node, issuer: &bytes::Bytes) -> Node {
    let mut node = node.clone();
    node.enrolled.issuers = vec![issuer.clone()];
    node
}

#[tokio::test]
async fn an_offline_root_signs_a_new_issuing_ca_and_nothing_else_is_believed() {
    let mesh = Mesh::init();
    let running = ocsp::start(&mesh).await;
    let alpha = running.enroll("alpha").await;
    let passphrase = "correct horse";
    let request = pb::ExportRootRequest { passphrase: passphrase.into(), operation_id: operation().into() };
    let exported = ca(&running).await.export_root(request).await.unwrap().into_inner();
    let seal =
        pb::SealRequest { root_spki_sha256: exported.spki_sha256.clone(), operation_id: operation().into() };
    ca(&running).await.seal(seal).await.unwrap();
    let ask = async |running: &Running| {
        ca(running).await.request_issuer(pb::RequestIssuerRequest::default()).await.unwrap().into_inner().pem
    };
    let pem = ask(&running).await;
    let running = restart_published(&mesh, running).await;
    assert_eq!(ask(&running).await, pem, "one request until it is answered");

    // On the other machine, with nothing but the two files.
    let id = mesh_ca::KeyId::parse(&exported.key_id).unwrap();
    let unlock = mesh_ca::Unlock::Passphrase(passphrase.as_bytes());
    let key =
        mesh_ca::unseal(exported.sealed_key.as_bytes(), &id, mesh_ca::KeyPurpose::Root, unlock).unwrap();
    let mut store = mesh_ca::MemoryKeyStore::new();
    store.insert_pkcs8(id.clone(), &key).unwrap();
    let domain = TrustDomain::parse(DOMAIN).unwrap();
    let root = mesh_ca::Issuer::new(&exported.root, id, domain, &store).unwrap();
    let request = mesh_ca::IssuerRequest::parse_verified(pem.as_bytes()).unwrap();
    let mut fill = |bytes: &mut [u8]| bytes.copy_from_slice(&random(bytes.len()));
    let mut sign = |request: &mesh_ca::IssuerRequest| {
        mesh_ca::sign_issuer(request, &root, &store, UtcDateTime::now(), &mut fill).unwrap().to_pem()
    };
    let answer = sign(&request);
    // Another CRL than the next one, another mesh's key, a changed file: nothing is believed or changed.
    let late = sign(&mesh_ca::IssuerRequest { crl_number: request.crl_number + 1, ..request.clone() });
    let foreign = Csr::parse(&Csr::create(&LeafKey::generate().unwrap()).unwrap()).unwrap().verify().unwrap();
    let foreign = foreign.public_key().clone();
    let foreign = sign(&mesh_ca::IssuerRequest { public_key: foreign, ..request.clone() });
    let begin = async |answer: &str, root: bool| {
        let request = pb::StartRotationRequest {
            signed: answer.to_owned(),
            operation_id: operation().into(),
            root,
            ..Default::default()
        };
        ca(&running).await.start_rotation(request).await.map(tonic::Response::into_inner)
    };
    let mut spoiled = answer.clone().into_bytes();
    let middle = answer.find("END CERTIFICATE").unwrap() - 20;
    spoiled[middle] = if spoiled[middle] == b'A' { b'B' } else { b'A' };
    let spoiled = String::from_utf8(spoiled).unwrap();
    for (what, wrong) in [("late", &late), ("foreign", &foreign), ("spoiled", &spoiled), ("none", &pem)] {
        assert_eq!(code(&begin(wrong, false).await.unwrap_err()), pb::ErrorCode::CeremonyMismatch, "{what}");
    }
    assert_eq!(code(&begin(&answer, true).await.unwrap_err()), pb::ErrorCode::Usage);
    assert!(!status(&running).await.running);
    assert_eq!(begin(&answer, false).await.unwrap().phase, "trust");
    assert_eq!(code(&begin(&answer, false).await.unwrap_err()), pb::ErrorCode::RotationRunning);
    let alpha = follow(&running, &alpha).await;
    advance(&running).await.unwrap();
    let alpha = follow(&running, &alpha).await;
    assert!(!advance(&running).await.unwrap().running);
    assert_eq!(code(&begin(&answer, false).await.unwrap_err()), pb::ErrorCode::CeremonyMismatch, "used once");
    // The new CA names the root's CRL, and that is there.
    let pointer = crate::publishing::pointer(&alpha.enrolled.issuers[0]).unwrap();
    assert!(pointer.ends_with("/ca.crl"), "{pointer}");
    let path = pointer.strip_prefix(ocsp::BASE).unwrap();
    let (_, der) = ocsp::exchange(mesh.web()[0], &format!("GET {path} HTTP/1.1\r\n"), b"").await;
    let crl = mesh_ca::Crl::parse_verified(&der, &exported.root).unwrap();
    assert_eq!(crl.number(), request.crl_number);
    running.stop().await.unwrap();
    ocsp::start(&mesh).await.stop().await.unwrap();
}

async fn restart_published(mesh: &Mesh, running: Running) -> Running {
    running.stop().await.unwrap();
    ocsp::start(mesh).await
}

fn random(length: usize) -> Vec<u8> {
    (0..length).map(|_| mesh_runtime::random_bytes::<1>()[0]).collect()
}

/// A mesh whose keys are sealed with `passphrase`.
async fn build(mesh: &Mesh, passphrase: &str) -> Result<(), StartupError> {
    let config = mesh_controller::RunConfig {
        passphrase: Some(Passphrase::new(passphrase.to_owned())),
        ..mesh.run_config()
    };
    let environment = Environment { clock: Arc::clone(&mesh.clock), journal: None };
    Controller::build(config, environment).await.map(drop)
}

#[tokio::test]
async fn swapped_keys_and_wrong_passphrases_are_refused_before_anything_is_signed() {
    let mesh = Mesh::empty();
    let passphrase = Some(Passphrase::new("correct horse".to_owned()));
    let config = mesh_controller::InitConfig { unlock: Unlock::Passphrase, passphrase, ..mesh.init_config() };
    mesh_controller::init(config, Arc::clone(&mesh.clock)).unwrap();
    let keys = mesh.state_dir().join("keys");
    let (root, issuing) = (keys.join("root.key"), keys.join("issuing.key"));
    let journal = || {
        let folder = std::fs::read_dir(mesh.state_dir().join("journal")).unwrap();
        folder.map(|entry| std::fs::read(entry.unwrap().path()).unwrap()).collect::<Vec<_>>()
    };
    let before = journal();
    let refused = |error: StartupError| (error.code(), error.exit());

    let wrong = build(&mesh, "wrong horse").await.unwrap_err();
    assert_eq!(refused(wrong), (pb::ErrorCode::PassphraseWrong, 4));
    let (root_text, issuing_text) = (std::fs::read(&root).unwrap(), std::fs::read(&issuing).unwrap());
    std::fs::write(&root, &issuing_text).unwrap();
    std::fs::write(&issuing, &root_text).unwrap();
    let swapped = build(&mesh, "correct horse").await.unwrap_err();
    assert_eq!(refused(swapped), (pb::ErrorCode::CaKeyMismatch, 4));
    // A key of the right name and purpose that is another's.
    let other = Mesh::empty();
    let passphrase = Some(Passphrase::new("correct horse".to_owned()));
    let config =
        mesh_controller::InitConfig { unlock: Unlock::Passphrase, passphrase, ..other.init_config() };
    mesh_controller::init(config, Arc::clone(&other.clock)).unwrap();
    std::fs::write(&root, &root_text).unwrap();
    std::fs::write(&issuing, std::fs::read(other.state_dir().join("keys/issuing.key")).unwrap()).unwrap();
    let foreign = build(&mesh, "correct horse").await.unwrap_err();
    assert_eq!(refused(foreign), (pb::ErrorCode::CaKeyMismatch, 4));
    assert_eq!(journal(), before, "nothing was signed and nothing recorded");
    std::fs::write(&issuing, &issuing_text).unwrap();
    build(&mesh, "correct horse").await.unwrap();
}

#[tokio::test]
async fn a_sealed_root_signs_nothing_and_is_exported_once() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    let export = |passphrase: &str| pb::ExportRootRequest {
        passphrase: passphrase.to_owned(),
        operation_id: operation().into(),
    };
    let short = ca(&running).await.export_root(export("short")).await.unwrap_err();
    assert_eq!(code(&short), pb::ErrorCode::Usage);
    let show = ca(&running).await.show(pb::Empty {}).await.unwrap().into_inner();
    let seal =
        pb::SealRequest { root_spki_sha256: show.root_spki_sha256.clone(), operation_id: operation().into() };
    let early = ca(&running).await.seal(seal.clone()).await.unwrap_err();
    assert_eq!(code(&early), pb::ErrorCode::RotationRefused, "nothing was exported");
    let exported = ca(&running).await.export_root(export("correct horse")).await.unwrap().into_inner();
    assert!(exported.sealed_key.contains("MESH SEALED KEY"));
    let other = pb::SealRequest { root_spki_sha256: vec![7; 32].into(), ..seal.clone() };
    assert_eq!(code(&ca(&running).await.seal(other).await.unwrap_err()), pb::ErrorCode::CeremonyMismatch);
    assert!(ca(&running).await.seal(seal.clone()).await.unwrap().into_inner().changed);
    assert!(!mesh.state_dir().join("keys/root.key").exists());
    let again = pb::SealRequest { operation_id: operation().into(), ..seal };
    assert!(!ca(&running).await.seal(again).await.unwrap().into_inner().changed);

    let twice = ca(&running).await.export_root(export("correct horse")).await.unwrap_err();
    assert_eq!(code(&twice), pb::ErrorCode::RootSealed);
    for root in [false, true] {
        let request =
            pb::StartRotationRequest { root, operation_id: operation().into(), ..Default::default() };
        let refused = ca(&running).await.start_rotation(request).await.unwrap_err();
        assert_eq!(code(&refused), pb::ErrorCode::RootSealed);
    }
    let names: Vec<_> = std::fs::read_dir(mesh.state_dir().join("keys")).unwrap().collect();
    assert_eq!(names.len(), 1, "no key was drawn for nothing: {names:?}");
    running.enroll("alpha").await;
    running.stop().await.unwrap();
    mesh.start().await.stop().await.unwrap();
}
