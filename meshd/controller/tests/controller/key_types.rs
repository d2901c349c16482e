//! CAs of every type of key that is made here: served, issued by, revoked by, rotated.

use std::sync::Arc;

use mesh_ca::{ExpiredCrl, IssuerRequest, KeyAlgorithm, PublicKey, RevocationLists, Usage, verify_chain};
use mesh_controller::{CaKeyType, HsmPlace, ImportConfig, ImportKind, InitConfig, StartupError};
use mesh_proto::v1::{self as pb, ErrorCode};
use pb::certificates_client::CertificatesClient;
use rustls_pki_types::CertificateDer;
use x509_parser::prelude::FromDer as _;

use crate::harness::*;
use crate::ocsp;
use crate::rotation::{advance, ca, follow, status};

/// A mesh whose CAs have keys of a type.
fn init(key_type: CaKeyType) -> Mesh {
    let mesh = Mesh::empty();
    let config = InitConfig { key_type: Some(key_type), ..mesh.init_config() };
    mesh_controller::init(config, Arc::clone(&mesh.clock)).unwrap();
    mesh
}

fn key_of(der: &[u8]) -> KeyAlgorithm {
    let (_, certificate) = x509_parser::certificate::X509Certificate::from_der(der).unwrap();
    PublicKey::from_spki_der(certificate.public_key().raw).unwrap().algorithm()
}

/// Roots and issuing CAs that are trusted, by the type of their keys as told and as it is.
async fn types(running: &Running) -> (Vec<KeyAlgorithm>, Vec<KeyAlgorithm>) {
    let info = ca(running).await.show(pb::Empty {}).await.unwrap().into_inner();
    let of = |list: &[pb::CaCertificate]| {
        list.iter()
            .map(|known| {
                assert_eq!(known.key_type, key_of(&known.der).to_string());
                key_of(&known.der)
            })
            .collect()
    };
    (of(&info.roots), of(&info.issuers))
}

/// What is issued now verifies, with all CRLs, by TLS in both directions and by OCSP; revoked, it is refused.
pub(crate) async fn exercise(mesh: &Mesh, running: &Running, node: &Node, name: &str) {
    // Both ends of this connection were judged by rustls: the controller's chain and the node's.
    let service = running.service(node, name, "peer").await;
    let (issuer, root) = (node.enrolled.issuers[0].clone(), &node.enrolled.roots[0]);
    let anchors =
        Arc::new(mesh_ca::TrustAnchors::new(mesh_ca::TrustDomain::parse(DOMAIN).unwrap(), [root]).unwrap());
    let chain = [CertificateDer::from(service.issuer.clone())];
    let verified = async || {
        let mut client = CertificatesClient::new(running.member(&node.identity).await);
        let crls = client.crls(pb::CrlsRequest::default()).await.unwrap().into_inner().crls;
        let lists = RevocationLists::new(crls.iter().map(|crl| &crl.der), ExpiredCrl::Refuse).unwrap();
        verify_chain(&service.leaf, &chain, &anchors, mesh.clock.utc_now(), Usage::Any, Some(&lists))
            .map(drop)
    };
    verified().await.unwrap();
    let serial = ocsp::serial(&service);
    let files = ocsp::Files::new(node, mesh.web()[0]);
    let told = async || {
        let request = ocsp::request(&files, &serial, false).await;
        let length = request.len();
        let head = format!(
            "POST /ocsp HTTP/1.1\r\ncontent-type: application/ocsp-request\r\ncontent-length: {length}\r\n"
        );
        let (_, answer) = ocsp::exchange(files.address, &head, &request).await;
        mesh_ca::parse_ocsp_response(&answer, &issuer, mesh.clock.utc_now()).unwrap().status
    };
    assert_eq!(told().await, mesh_ca::OcspStatus::Good);
    ocsp::revoke(running, &serial).await;
    assert!(matches!(told().await, mesh_ca::OcspStatus::Revoked { .. }));
    let refused = verified().await.unwrap_err();
    assert!(refused.to_string().contains("revoked"), "{refused}");
}

async fn start(
    mesh: &Mesh,
    request: pb::StartRotationRequest,
    running: Running,
) -> (Running, pb::RotationInfo) {
    let request = pb::StartRotationRequest { operation_id: operation().into(), ..request };
    let info = ca(&running).await.start_rotation(request).await.unwrap().into_inner();
    running.stop().await.unwrap();
    // The keys that were just drawn are found again.
    (restart(mesh).await, info)
}

async fn restart(mesh: &Mesh) -> Running {
    ocsp::start(mesh).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mesh_lives_on_ca_keys_of_every_type() {
    for key_type in CaKeyType::ALL {
        let mesh = init(key_type);
        let running = restart(&mesh).await;
        let one = vec![key_type.algorithm()];
        assert_eq!(types(&running).await, (one.clone(), one));
        let alpha = running.enroll("alpha").await;
        exercise(&mesh, &running, &alpha, "web.alpha.mesh.internal").await;
        running.stop().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_ca_follows_the_one_before_unless_somebody_says_otherwise() {
    use KeyAlgorithm::{EcdsaP256, EcdsaP384, Ed25519};
    let mesh = init(CaKeyType::P384);
    let running = restart(&mesh).await;
    let mut alpha = running.enroll("alpha").await;
    let asked = |root: bool, key_type: &str| pb::StartRotationRequest {
        root,
        key_type: key_type.into(),
        operation_id: operation().into(),
        ..Default::default()
    };
    for bad in ["rsa-2048", "p521", "P384", " p256"] {
        let refused = ca(&running).await.start_rotation(asked(false, bad)).await.unwrap_err();
        assert_eq!(code(&refused), ErrorCode::Usage, "{bad}");
        let request = pb::RequestIssuerRequest { key_type: bad.into() };
        let refused = ca(&running).await.request_issuer(request).await.unwrap_err();
        assert_eq!(code(&refused), ErrorCode::Usage, "{bad}");
    }
    let answered = pb::StartRotationRequest { signed: "x".into(), ..asked(false, "p256") };
    assert_eq!(code(&ca(&running).await.start_rotation(answered).await.unwrap_err()), ErrorCode::Usage);
    assert!(!status(&running).await.running);

    let mut running = running;
    // Root and issuing CA before, what is asked for, and both after.
    let table = [
        (true, "", (vec![EcdsaP384], vec![EcdsaP384])),
        (false, "ed25519", (vec![EcdsaP384], vec![Ed25519])),
        (false, "", (vec![EcdsaP384], vec![Ed25519])),
        (true, "", (vec![EcdsaP384], vec![Ed25519])),
        (true, "ecdsa-p256", (vec![EcdsaP256], vec![EcdsaP256])),
    ];
    for (step, (root, key_type, wanted)) in table.into_iter().enumerate() {
        let (again, info) = start(&mesh, asked(root, key_type), running).await;
        running = again;
        assert_eq!(info.phase, "trust", "{step}");
        alpha = follow(&running, &alpha).await;
        assert_eq!(advance(&running).await.unwrap().phase, "issue", "{step}");
        alpha = follow(&running, &alpha).await;
        assert!(!advance(&running).await.unwrap().running, "{step}");
        assert_eq!(types(&running).await, wanted, "{step}");
        exercise(&mesh, &running, &alpha, &format!("web{step}.alpha.mesh.internal")).await;
    }
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_offline_root_is_asked_for_a_key_of_the_wanted_type() {
    let mesh = init(CaKeyType::Ed25519);
    let running = mesh.start().await;
    let ask = async |key_type: &str| {
        let request = pb::RequestIssuerRequest { key_type: key_type.into() };
        let pem = ca(&running).await.request_issuer(request).await.unwrap().into_inner().pem;
        IssuerRequest::parse_verified(pem.as_bytes()).unwrap().public_key
    };
    let first = ask("").await;
    assert_eq!(first.algorithm(), KeyAlgorithm::Ed25519, "as the issuing CA");
    assert!(ask("").await == first && ask("ed25519").await == first, "one request until it is answered");
    let other = ask("p384").await;
    assert_eq!(other.algorithm(), KeyAlgorithm::EcdsaP384);
    assert!(ask("").await == other, "nothing else was asked for since");
    running.stop().await.unwrap();
}

#[test]
fn a_type_that_cannot_be_drawn_is_refused_before_anything_is_made() {
    let mesh = Mesh::empty();
    let refused = |change: &dyn Fn(&mut InitConfig)| -> StartupError {
        let mut config = mesh.init_config();
        change(&mut config);
        let error = mesh_controller::init(config, Arc::clone(&mesh.clock)).unwrap_err();
        assert!(!mesh.state_dir().exists() && !error.next().is_empty());
        error
    };
    let imported = refused(&|config| {
        config.key_type = Some(CaKeyType::P384);
        config.import =
            Some(ImportConfig { kind: ImportKind::Issuer, files: vec![], crl: None, passphrase: None });
    });
    assert_eq!((imported.code(), imported.exit()), (ErrorCode::ConfigInvalid, 2), "{imported}");
    let in_token = refused(&|config| {
        config.key_type = Some(CaKeyType::Ed25519);
        config.key_store = Some(HsmPlace::parse("pkcs11:token=a?module-path=/nonexistent.so").unwrap());
        config.pin = Some(mesh_controller::Passphrase::new("1234".into()));
    });
    assert_eq!((in_token.code(), in_token.exit()), (ErrorCode::ConfigInvalid, 2), "{in_token}");
    assert!(in_token.to_string().contains("p256 or p384"), "{in_token}");
}
