//! Authorities replaced over the wire: what nodes are told, what is refused, and who comes back how.

use std::sync::Arc;
use std::time::Duration;

use mesh_ca::{TrustAnchors, TrustDomain, Usage, verify_chain};
use mesh_controller::{Controller, Environment, Passphrase, StartupError, Unlock};
use mesh_proto::v1 as pb;
use rustls_pki_types::CertificateDer;
use time::UtcDateTime;

use crate::harness::*;

async fn ca(running: &Running) -> pb::ca_client::CaClient<tonic::transport::Channel> {
    pb::ca_client::CaClient::new(running.local().await)
}

async fn start(running: &Running, root: bool) -> pb::RotationInfo {
    let request = pb::StartRotationRequest { root, operation_id: operation().into(), ..Default::default() };
    ca(running).await.start_rotation(request).await.unwrap().into_inner()
}

async fn status(running: &Running) -> pb::RotationInfo {
    ca(running).await.rotation_status(pb::Empty {}).await.unwrap().into_inner()
}

async fn advance(running: &Running) -> Result<pb::RotationInfo, tonic::Status> {
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
    let bundle = stream.full().await.trust.unwrap();
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
    let bundle = stream.full().await.trust.unwrap();
    assert_eq!((bundle.version, bundle.lineage.len()), (3, 1));
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

#[tokio::test]
async fn a_rotation_stands_in_the_journal_and_may_be_taken_back() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    running.enroll("alpha").await;
    let started = start(&running, false).await;
    running.stop().await.unwrap();
    let running = mesh.start().await;
    let again = status(&running).await;
    assert_eq!((again.phase.as_str(), again.to), ("trust", started.to));
    let step = pb::RotationStep { version: again.version, operation_id: operation().into() };
    let aborted = ca(&running).await.abort_rotation(step).await.unwrap().into_inner();
    assert!(!aborted.running);
    let show = ca(&running).await.show(pb::Empty {}).await.unwrap().into_inner();
    assert_eq!(show.issuers.len(), 1, "the announced one is withdrawn");
    running.stop().await.unwrap();
    mesh.start().await.stop().await.unwrap();
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
