//! `meshctl login` against something that is not the controller the token was made for.

use std::{
    io::{Read as _, Write as _},
    net::TcpListener,
    process::{Command, Stdio},
    sync::Arc,
    thread::{self, JoinHandle},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use mesh_proto::v1::{JoinToken, join_token::Kind};
use prost::Message as _;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, KeyUsagePurpose};
use rustls::{
    ServerConfig, ServerConnection, Stream,
    pki_types::{CertificateDer, PrivatePkcs8KeyDer},
};

/// A TLS server with a root of its own. What it returns is what it was sent inside TLS.
fn impostor() -> (String, JoinHandle<Vec<u8>>) {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let root = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let leaf =
        CertificateParams::new(vec!["ctl.mesh.internal".to_owned()]).unwrap().signed_by(&key, &root).unwrap();
    let chain: Vec<CertificateDer<'static>> = vec![leaf.der().clone(), root.der().clone()];
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, PrivatePkcs8KeyDer::from(key.serialize_der()).into())
        .unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let server = thread::spawn(move || {
        let (mut tcp, _) = listener.accept().unwrap();
        let mut tls = ServerConnection::new(Arc::new(config)).unwrap();
        let mut received = Vec::new();
        // Ends with the alert of a client that does not trust us.
        let _ = Stream::new(&mut tls, &mut tcp).read_to_end(&mut received);
        received
    });
    (address, server)
}

fn token(kind: Kind, address: &str) -> String {
    let token = JoinToken {
        controllers: vec![address.to_owned()],
        root_spki_sha256: vec![0x9f; 32].into(),
        id: vec![1; 8].into(),
        secret: b"this secret must not leave here!".to_vec().into(),
        kind: kind.into(),
        trust_domain: "mesh.internal".into(),
    };
    format!("mesh1_{}", URL_SAFE_NO_PAD.encode(token.encode_to_vec()))
}

/// Exit code and stderr of a login with `token` on stdin.
fn login(address: &str, token: &str) -> (i32, String, bool) {
    let folder = tempfile::tempdir().unwrap();
    let context = folder.path().join("context.toml");
    let mut child = Command::new(env!("CARGO_BIN_EXE_meshctl"))
        .args(["login", &format!("https://{address}"), "-", "--timeout", "10s"])
        .env("MESH_CONTEXT", &context)
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(token.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap(), context.exists())
}

#[test]
fn a_controller_with_another_root_is_refused_before_the_secret_is_sent() {
    let (address, server) = impostor();
    let (exit, stderr, saved) = login(&address, &token(Kind::Operator, &address));
    let received = server.join().unwrap();
    assert_eq!(received, b"", "something was sent to a stranger");
    assert_eq!(exit, 4, "{stderr}");
    assert!(stderr.starts_with("error[E0412]: controller's root key does not match the token"), "{stderr}");
    assert!(stderr.contains(&format!("sha256:{}", "9f".repeat(32))), "{stderr}");
    assert_eq!(stderr.matches("sha256:").count(), 2, "both fingerprints: {stderr}");
    assert!(!saved, "an identity was saved");
}

#[test]
fn a_token_for_nodes_does_not_even_connect() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (exit, stderr, _) = login(&address, &token(Kind::Node, &address));
    assert_eq!(exit, 4, "{stderr}");
    assert!(stderr.contains("E0401") && stderr.contains("operator add"), "{stderr}");
    assert_eq!(listener.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
}
