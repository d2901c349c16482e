//! Signing an issuing CA away from the controller.

use mesh_ca::*;
use rustls_pki_types::CertificateDer;

use crate::authority::*;

struct Ceremony {
    authority: Authority,
    /// The controller's store, without the root's key.
    online: MemoryKeyStore,
    request: IssuerRequest,
    pem: String,
}

const ISSUING: &str = "issuing-2";

fn ceremony(key: KeyAlgorithm, addressed: bool) -> Ceremony {
    let authority = Authority::new();
    let mut online = MemoryKeyStore::new();
    let id = KeyId::parse(ISSUING).unwrap();
    online.generate_for(id.clone(), key).unwrap();
    let points = PublishingPoints::new(HttpUrl::parse("http://pki.mesh.internal").unwrap(), 4).unwrap();
    let pointers = points.ca(authority.root.key_identifier()).unwrap();
    let request = IssuerRequest {
        root_key_hash: authority.root.public_key().key_hash(),
        mesh: "prod-eu".to_owned(),
        public_key: online.public_key(&id).unwrap(),
        pointers: if addressed { pointers } else { Pointers::default() },
        requested_at: NOW,
        crl_number: 41,
        revoked: vec![RevokedEntry {
            serial: SerialNumber::random(&mut rng),
            revoked_at: NOW - HOUR,
            reason: RevocationReason::Superseded,
        }],
    };
    let pem = request.to_pem(&online, &id).unwrap();
    Ceremony { authority, online, request, pem }
}

#[test]
pub(crate) fn a_request_becomes_an_issuing_ca_and_the_roots_crl() {
    for (key, addressed) in
        [(KeyAlgorithm::EcdsaP256, true), (KeyAlgorithm::EcdsaP384, false), (KeyAlgorithm::Ed25519, true)]
    {
        let Ceremony { authority, online, request, pem } = ceremony(key, addressed);
        let read = IssuerRequest::parse_verified(pem.as_bytes()).unwrap();
        assert_eq!(read, request);
        let answer = sign_issuer(&read, &authority.root, &authority.store, NOW, &mut rng).unwrap().to_pem();
        let root = authority.root.certificate_der();
        let signed = SignedIssuer::parse_verified(answer.as_bytes(), &request, root).unwrap();
        let crl = Crl::parse_verified(&signed.root_crl, root).unwrap();
        assert_eq!((crl.number(), crl.len()), (41, 1));
        assert_eq!((crl.url(), crl.scope()), (None, CrlScope::All));

        // The controller issues with it, without ever having seen the root's key.
        let id = KeyId::parse(ISSUING).unwrap();
        let domain = authority.root.domain().clone();
        let issuing = Issuer::new(&signed.certificate.der, id, domain, &online).unwrap();
        let leaf_key = LeafKey::generate().unwrap();
        let template = Authority::template(Profile::Node);
        let leaf =
            issue_leaf(&issuing, &online, &leaf_key, &template, SerialNumber::random(&mut rng)).unwrap();
        let chain = [CertificateDer::from(signed.certificate.der)];
        assert!(verify_chain(&leaf.der, &chain, &authority.anchors(), NOW, Usage::Any, None).is_ok());
    }
}

#[test]
fn changed_or_foreign_requests_sign_nothing() {
    let Ceremony { authority, online, request, pem } = ceremony(KeyAlgorithm::EcdsaP256, true);
    let block = pem::parse(&pem).unwrap();
    let text = |der: Vec<u8>| pem::encode(&pem::Pem::new(block.tag(), der));
    // Any changed byte is noticed: mostly by the signature.
    for at in 0..block.contents().len() {
        let mut der = block.contents().to_vec();
        der[at] ^= 1;
        assert!(IssuerRequest::parse_verified(text(der).as_bytes()).is_err(), "byte {at}");
    }
    assert_eq!(IssuerRequest::parse_verified(b""), Err(CeremonyError::NotRequest));
    assert_eq!(
        IssuerRequest::parse_verified(pem.replace("MESH ISSUER REQUEST", "CERTIFICATE").as_bytes()),
        Err(CeremonyError::NotRequest)
    );
    let huge = vec![b'x'; CEREMONY_BYTES_MAX + 1];
    assert_eq!(IssuerRequest::parse_verified(&huge), Err(CeremonyError::TooLarge));

    let stranger = Authority::new();
    let refused = sign_issuer(&request, &stranger.root, &stranger.store, NOW, &mut rng);
    assert_eq!(refused, Err(CeremonyError::OtherRoot));
    let refused = sign_issuer(&request, &authority.root, &online, NOW, &mut rng);
    assert!(matches!(refused, Err(CeremonyError::Issue(IssueError::KeyStore(_)))), "{refused:?}");
    let rsa = IssuerRequest {
        public_key: LeafKey::generate_for(KeyAlgorithm::Rsa { bits: 2048 }).unwrap().public_key().clone(),
        ..request.clone()
    };
    let refused = sign_issuer(&rsa, &authority.root, &authority.store, NOW, &mut rng);
    assert_eq!(refused, Err(CeremonyError::Issue(IssueError::CaKey(KeyAlgorithm::Rsa { bits: 2048 }))));
    // A request is never signed with another key than the one it names.
    let id = KeyId::parse("issuing").unwrap();
    assert_eq!(request.to_pem(&authority.store, &id), Err(CeremonyError::Signature));
}

#[test]
fn an_answer_for_another_request_is_refused() {
    let Ceremony { authority, request, .. } = ceremony(KeyAlgorithm::EcdsaP256, true);
    let root = authority.root.certificate_der();
    let answer = sign_issuer(&request, &authority.root, &authority.store, NOW, &mut rng).unwrap().to_pem();
    let parse = |request: &IssuerRequest, root: &[u8], text: &str| {
        SignedIssuer::parse_verified(text.as_bytes(), request, root).map(drop)
    };
    assert_eq!(parse(&request, root, &answer), Ok(()));
    let other_key =
        IssuerRequest { public_key: LeafKey::generate().unwrap().public_key().clone(), ..request.clone() };
    assert_eq!(parse(&other_key, root, &answer), Err(CeremonyError::OtherKey));
    let later = IssuerRequest { crl_number: 42, ..request.clone() };
    assert_eq!(parse(&later, root, &answer), Err(CeremonyError::CrlNumber { found: 41, wanted: 42 }));
    let stranger = Authority::new();
    assert_eq!(parse(&request, stranger.root.certificate_der(), &answer), Err(CeremonyError::NotByRoot));
    let half = answer.split_inclusive("-----END CERTIFICATE-----\n").next().unwrap();
    assert!(matches!(parse(&request, root, half), Err(CeremonyError::Answer(_))));
}
