//! Several issuing CAs under one root, and roots that vouch for each other.

use mesh_ca::*;
use rustls_pki_types::CertificateDer;

use crate::authority::*;

fn second_issuing(authority: &mut Authority, key: KeyAlgorithm) -> Issuer {
    let id = KeyId::parse("issuing-2").unwrap();
    authority.store.generate_for(id.clone(), key).unwrap();
    let naming = CaNaming { mesh: "prod-eu", now: NOW };
    let made = create_issuing_ca(&authority.root, &authority.store, &id, naming, &mut rng).unwrap();
    Issuer::new(&made.der, id, authority.root.domain().clone(), &authority.store).unwrap()
}

#[test]
pub(crate) fn several_issuing_cas_live_side_by_side_under_their_own_subjects() {
    let mut authority = Authority::new();
    let second = second_issuing(&mut authority, KeyAlgorithm::EcdsaP384);
    let subject = |der: &[u8]| {
        let (_, parsed) = x509_parser::parse_x509_certificate(der).unwrap();
        parsed.subject().as_raw().to_vec()
    };
    assert_ne!(subject(second.certificate_der()), subject(authority.issuing.certificate_der()));
    assert_ne!(second.key_identifier(), authority.issuing.key_identifier());

    let template = Authority::template(Profile::Peer);
    let key = LeafKey::generate().unwrap();
    let serial = SerialNumber::random(&mut rng);
    let leaf = issue_leaf(&second, &authority.store, &key, &template, serial).unwrap();
    let both =
        [authority.intermediates(), vec![CertificateDer::from(second.certificate_der().to_vec())]].concat();
    let verified = verify_chain(&leaf.der, &both, &authority.anchors(), NOW, Usage::Any, None).unwrap();
    assert_eq!(verified.issuer_key_id, *second.key_identifier());
    // A CRL of the first says nothing about the second's leaves.
    let lists = RevocationLists::new(authority.crls(&[serial]), ExpiredCrl::Refuse).unwrap();
    let unknown = verify_chain(&leaf.der, &both, &authority.anchors(), NOW, Usage::Any, Some(&lists));
    assert_eq!(unknown, Err(ChainError::RevocationUnknown));
}

#[test]
pub(crate) fn an_issuing_ca_certificate_says_where_the_roots_crl_is() {
    let mut authority = Authority::new();
    let id = KeyId::parse("issuing-2").unwrap();
    authority.store.generate(id.clone()).unwrap();
    let public = authority.store.public_key(&id).unwrap();
    let points = PublishingPoints::new(HttpUrl::parse("http://pki.mesh.internal").unwrap(), 4).unwrap();
    let pointers = points.ca(authority.root.key_identifier()).unwrap();
    let naming = CaNaming { mesh: "prod-eu", now: NOW };
    let made = create_issuing_ca_for(&authority.root, &authority.store, &public, naming, &pointers, &mut rng)
        .unwrap();
    assert_eq!(lint_ca(&made.der, authority.root.certificate_der()), []);
    let issuing = Issuer::new(&made.der, id, authority.root.domain().clone(), &authority.store).unwrap();

    let leaf_pointers = points.leaf(issuing.key_identifier(), 3).unwrap();
    let template =
        LeafTemplate { pointers: leaf_pointers.clone(), crl_shard: 3, ..Authority::template(Profile::Peer) };
    let key = LeafKey::generate().unwrap();
    let leaf =
        issue_leaf(&issuing, &authority.store, &key, &template, SerialNumber::random(&mut rng)).unwrap();

    // Each CRL covers its own kind only, and both together cover the chain.
    let plan = CrlPlan {
        url: leaf_pointers.crl.as_ref(),
        scope: CrlScope::UserCerts,
        ..CrlPlan::new(1, NOW, CRL_LIFETIME, &[])
    };
    let shard = build_crl(&issuing, &authority.store, &plan).unwrap();
    // The root's names no address, as the root's own certificate does not.
    let root_plan = CrlPlan::new(1, NOW, ROOT_CRL_LIFETIME, &[]);
    let root_crl = build_crl(&authority.root, &authority.store, &root_plan).unwrap();
    let verify = |crls: &[&Vec<u8>]| {
        let lists = RevocationLists::new(crls, ExpiredCrl::Refuse).unwrap();
        let intermediates = [CertificateDer::from(made.der.clone())];
        verify_chain(&leaf.der, &intermediates, &authority.anchors(), NOW, Usage::Any, Some(&lists)).map(drop)
    };
    assert_eq!(verify(&[&shard, &root_crl]), Ok(()));
    assert_eq!(verify(&[&shard]), Err(ChainError::RevocationUnknown));
    assert_eq!(verify(&[&root_crl]), Err(ChainError::RevocationUnknown));
    let read = Crl::parse_verified(&shard, issuing.certificate_der()).unwrap();
    assert_eq!((read.url(), read.scope()), (leaf_pointers.crl.as_ref(), CrlScope::UserCerts));
}

#[test]
fn a_cross_signed_root_carries_its_leaves_to_the_old_root() {
    let (old, new) = (
        Authority::new(),
        Authority::with_keys(NOW, "mesh.internal", KeyAlgorithm::Ed25519, KeyAlgorithm::EcdsaP384),
    );
    let cross =
        cross_sign(&old.root, &old.store, new.root.certificate_der(), &Pointers::default(), NOW, &mut rng)
            .unwrap();
    let leaf = new.leaf(Profile::Node).issued.der;
    let chain = [new.intermediates(), vec![CertificateDer::from(cross.der.clone())]].concat();
    let verify = |chain: &[CertificateDer<'static>], anchors: &TrustAnchors| {
        verify_chain(&leaf, chain, anchors, NOW, Usage::Any, None).map(drop)
    };
    assert_eq!(verify(&chain, &old.anchors()), Ok(()));
    assert_eq!(verify(&chain, &new.anchors()), Ok(()));
    assert_eq!(verify(&new.intermediates(), &old.anchors()), Err(ChainError::UnknownIssuer));
    assert_eq!(cross.key_hash, new.store.public_key(new.root.key_id()).unwrap().key_hash());

    // An issuing CA may be cross-signed as well, and then signs no further CA.
    let cross =
        cross_sign(&old.root, &old.store, new.issuing.certificate_der(), &Pointers::default(), NOW, &mut rng)
            .unwrap();
    assert_eq!(verify(&[CertificateDer::from(cross.der)], &old.anchors()), Ok(()));

    let refuse = |signer: &Issuer, subject: &[u8]| {
        cross_sign(signer, &old.store, subject, &Pointers::default(), NOW, &mut rng).unwrap_err()
    };
    assert_eq!(refuse(&old.root, &leaf), IssueError::CrossSubject);
    assert_eq!(refuse(&old.root, b"0"), IssueError::CrossSubject);
    assert_eq!(refuse(&old.root, old.root.certificate_der()), IssueError::IssuerKeyAsLeaf);
    assert_eq!(refuse(&old.issuing, new.root.certificate_der()), IssueError::PathLength);
}
