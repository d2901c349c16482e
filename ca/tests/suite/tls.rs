//! Real rustls handshakes in memory, at a time of our choosing.

use std::sync::Arc;
use std::time::Duration;

use mesh_ca::*;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::CryptoProvider;
use rustls::time_provider::TimeProvider;
use rustls::{CertificateError, ClientConfig, ClientConnection, Error, ServerConfig, ServerConnection};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use time::UtcDateTime;

use crate::authority::*;

#[derive(Debug)]
struct At(UtcDateTime);

impl TimeProvider for At {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(Duration::from_secs(self.0.unix_timestamp().try_into().unwrap())))
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

fn chain(authority: &Authority, leaf: &Leaf, with_root: bool) -> Vec<CertificateDer<'static>> {
    let mut chain = vec![CertificateDer::from(leaf.issued.der.clone())];
    chain.extend(authority.intermediates());
    if with_root {
        chain.push(CertificateDer::from(authority.root.certificate_der().to_vec()));
    }
    chain
}

fn server(authority: &Authority, leaf: &Leaf, with_root: bool, at: UtcDateTime) -> ServerConfig {
    ServerConfig::builder_with_details(provider(), Arc::new(At(at)))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_client_cert_verifier(Arc::new(ClientVerifier::new(authority.anchors())))
        .with_single_cert(chain(authority, leaf, with_root), leaf.key.to_rustls_der())
        .unwrap()
}

fn client(
    verifier: Arc<dyn ServerCertVerifier>,
    identity: Option<(&Authority, &Leaf)>,
    at: UtcDateTime,
) -> ClientConfig {
    let config = ClientConfig::builder_with_details(provider(), Arc::new(At(at)))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    match identity {
        None => config.with_no_client_auth(),
        Some((authority, leaf)) => {
            config.with_client_auth_cert(chain(authority, leaf, false), leaf.key.to_rustls_der()).unwrap()
        }
    }
}

/// How the handshake ended for the server and for the client, and which chain the server saw.
struct Outcome {
    server: Result<(), Error>,
    client: Result<(), Error>,
    peer: Option<Vec<CertificateDer<'static>>>,
}

fn handshake(server: ServerConfig, client: ClientConfig) -> Outcome {
    let mut server = ServerConnection::new(Arc::new(server)).unwrap();
    let mut client =
        ClientConnection::new(Arc::new(client), ServerName::try_from("any.name.at.all").unwrap()).unwrap();
    let (mut server_end, mut client_end) = (Ok(()), Ok(()));
    // A TLS 1.3 handshake is over after three flights; the alerts need one more.
    for _ in 0..4 {
        let mut wire = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut wire).unwrap();
        }
        server_end = server_end.and(
            deliver(&wire, |bytes| server.read_tls(bytes))
                .and_then(|()| server.process_new_packets().map(drop)),
        );
        let mut wire = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut wire).unwrap();
        }
        client_end = client_end.and(
            deliver(&wire, |bytes| client.read_tls(bytes))
                .and_then(|()| client.process_new_packets().map(drop)),
        );
    }
    if server_end.is_ok() && client_end.is_ok() {
        assert!(!server.is_handshaking() && !client.is_handshaking());
    }
    let peer = server.peer_certificates().map(<[_]>::to_vec);
    Outcome { server: server_end, client: client_end, peer }
}

fn deliver(mut wire: &[u8], mut read: impl FnMut(&mut &[u8]) -> std::io::Result<usize>) -> Result<(), Error> {
    while !wire.is_empty() {
        read(&mut wire).map_err(|error| Error::General(error.to_string()))?;
    }
    Ok(())
}

fn pinned(authority: &Authority) -> Arc<PinnedControllerVerifier> {
    let hash = authority.anchors().root_key_hashes().next().unwrap();
    Arc::new(PinnedControllerVerifier::new(hash))
}

fn rooted(authority: &Authority) -> Arc<ControllerVerifier> {
    Arc::new(ControllerVerifier::new(Arc::new(authority.anchors()), None))
}

fn certificate_error(result: Result<(), Error>) -> CertificateError {
    match result {
        Err(Error::InvalidCertificate(error)) => error,
        other => panic!("no certificate was refused: {other:?}"),
    }
}

fn is_not_controller(result: Result<(), Error>) -> bool {
    match certificate_error(result) {
        CertificateError::Other(other) => other.0.downcast_ref() == Some(&ChainError::NotController),
        _ => false,
    }
}

#[test]
fn a_joining_node_learns_root_and_mesh_from_its_pin() {
    let authority = Authority::new();
    let controller = authority.leaf(Profile::Controller);
    let verifier = pinned(&authority);
    assert_eq!(verifier.accepted(), None);
    let outcome = handshake(server(&authority, &controller, true, NOW), client(verifier.clone(), None, NOW));
    assert_eq!((outcome.server, outcome.client, outcome.peer), (Ok(()), Ok(()), None));
    let accepted = verifier.accepted().unwrap();
    assert_eq!(accepted.root_der.as_ref(), authority.root.certificate_der());
    assert_eq!(accepted.domain.as_str(), "mesh.internal");
    assert_eq!(accepted.name.as_str(), "c1");
    assert_eq!(accepted.chain_not_after, controller.issued.not_after);
}

#[test]
fn a_pin_that_is_not_in_the_chain_is_refused() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    let controller = authority.leaf(Profile::Controller);
    for (verifier, with_root) in [(pinned(&stranger), true), (pinned(&authority), false)] {
        let server = server(&authority, &controller, with_root, NOW);
        let outcome = handshake(server, client(verifier.clone(), None, NOW));
        assert_eq!(certificate_error(outcome.client), CertificateError::UnknownIssuer);
        assert_eq!(verifier.accepted(), None);
    }
    // The real root beside a chain that does not lead to it.
    let theirs = stranger.leaf(Profile::Controller);
    let mut certificates = chain(&stranger, &theirs, false);
    certificates.push(CertificateDer::from(authority.root.certificate_der().to_vec()));
    let verifier = pinned(&authority);
    let now = At(NOW).current_time().unwrap();
    let name = ServerName::try_from("c").unwrap();
    let refused =
        verifier.verify_server_cert(&certificates[0], &certificates[1..], &name, &[], now).map(drop);
    assert_eq!(certificate_error(refused), CertificateError::UnknownIssuer);
    assert_eq!(verifier.accepted(), None);
}

#[test]
fn nothing_but_a_controller_passes_for_one() {
    let authority = Authority::new();
    for profile in Profile::ALL {
        let leaf = authority.leaf(profile);
        let (pin, roots) = (pinned(&authority), rooted(&authority));
        let verifiers: [Arc<dyn ServerCertVerifier>; 2] = [pin.clone(), roots];
        for verifier in verifiers {
            let outcome = handshake(server(&authority, &leaf, true, NOW), client(verifier, None, NOW));
            match profile {
                Profile::Controller => assert_eq!(outcome.client, Ok(())),
                // A client's certificate already fails as a server's.
                Profile::Client => assert!(outcome.client.is_err()),
                _ => assert!(is_not_controller(outcome.client), "{profile}"),
            }
        }
        assert_eq!(pin.accepted().is_some(), profile == Profile::Controller, "{profile}");
    }
}

#[test]
fn an_expired_or_revoked_controller_is_refused() {
    let authority = Authority::new();
    let controller = authority.leaf(Profile::Controller);
    let late = NOW + 100 * HOUR;
    for verifier in [pinned(&authority) as Arc<dyn ServerCertVerifier>, rooted(&authority)] {
        let outcome = handshake(server(&authority, &controller, true, late), client(verifier, None, late));
        assert_eq!(certificate_error(outcome.client), CertificateError::Expired);
    }
    let lists =
        RevocationLists::new(authority.crls(&[controller.issued.serial]), ExpiredCrl::Refuse).unwrap();
    let verifier = ControllerVerifier::new(Arc::new(authority.anchors()), Some(Arc::new(lists)));
    let outcome =
        handshake(server(&authority, &controller, true, NOW), client(Arc::new(verifier), None, NOW));
    assert_eq!(certificate_error(outcome.client), CertificateError::Revoked);
}

#[test]
fn clients_of_this_mesh_are_let_in_and_shown_to_the_handler() {
    let authority = Authority::new();
    let controller = authority.leaf(Profile::Controller);
    for profile in [Profile::Node, Profile::Client, Profile::Peer, Profile::Operator] {
        let leaf = authority.leaf(profile);
        let config = client(rooted(&authority), Some((&authority, &leaf)), NOW);
        let outcome = handshake(server(&authority, &controller, false, NOW), config);
        assert_eq!((outcome.server, outcome.client), (Ok(()), Ok(())), "{profile}");
        let peer = outcome.peer.unwrap();
        let verified = authority.verify(&peer[0], Usage::Client).unwrap();
        assert_eq!(verified.profile, profile);
    }
}

#[test]
fn an_expired_client_is_let_in_for_resume_and_flagged() {
    let authority = Authority::new();
    let node = authority.leaf(Profile::Node);
    let late = NOW + 100 * HOUR;
    // The controller has a fresh certificate.
    let template = LeafTemplate { not_after: NOW + 200 * HOUR, ..Authority::template(Profile::Controller) };
    let controller = authority.issue(&template);
    let config = client(rooted(&authority), Some((&authority, &node)), late);
    let outcome = handshake(server(&authority, &controller, false, late), config);
    assert_eq!((outcome.server, outcome.client), (Ok(()), Ok(())));
    let peer = outcome.peer.unwrap();
    let anchors = authority.anchors();
    let verified =
        verify_chain_expired_ok(&peer[0], &peer[1..], &anchors, late, Usage::Client, None).unwrap();
    assert!(verified.expired);
}

#[test]
fn clients_of_another_root_or_purpose_are_refused() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    let controller = authority.leaf(Profile::Controller);
    let foreign = stranger.leaf(Profile::Node);
    for at in [NOW, NOW + 71 * HOUR] {
        let config = client(rooted(&authority), Some((&stranger, &foreign)), at);
        let outcome = handshake(server(&authority, &controller, false, at), config);
        assert_eq!(certificate_error(outcome.server), CertificateError::UnknownIssuer);
    }
    let web_server = authority.leaf(Profile::Server);
    let config = client(rooted(&authority), Some((&authority, &web_server)), NOW);
    let outcome = handshake(server(&authority, &controller, false, NOW), config);
    assert!(matches!(certificate_error(outcome.server), CertificateError::Other(_)));
}

#[test]
fn a_stolen_certificate_without_its_key_is_refused() {
    let authority = Authority::new();
    let controller = authority.leaf(Profile::Controller);
    // The thief serves the controller's chain with a key of its own; rustls's builder would refuse the pair.
    let key = LeafKey::generate().unwrap();
    let thief = rustls::crypto::aws_lc_rs::sign::any_ecdsa_type(&key.to_rustls_der()).unwrap();
    let pair = rustls::sign::CertifiedKey::new(chain(&authority, &controller, true), thief);
    let config = ServerConfig::builder_with_details(provider(), Arc::new(At(NOW)))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(pair)));
    let outcome = handshake(config, client(rooted(&authority), None, NOW));
    assert_eq!(certificate_error(outcome.client), CertificateError::BadSignature);
    assert!(key.certified(chain(&authority, &controller, true)).is_err());
    assert!(controller.key.certified(chain(&authority, &controller, true)).is_ok());
}
