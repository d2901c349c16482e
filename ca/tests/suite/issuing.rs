//! Issuing, and what stops it.

use std::time::Duration;

use mesh_ca::*;

use crate::authority::*;

#[test]
fn cas_are_named_by_mesh_date_and_key() {
    let (one, two) = (Authority::new(), Authority::new());
    let subject = |issuer: &Issuer| {
        let (_, parsed) = x509_parser::parse_x509_certificate(issuer.certificate_der()).unwrap();
        parsed.subject().to_string()
    };
    let root = subject(&one.root);
    assert!(root.starts_with("CN=prod-eu root CA 2026-11-22 "), "{root}");
    assert!(subject(&one.issuing).starts_with("CN=prod-eu issuing CA 2026-11-22 "));
    assert_ne!(root, subject(&two.root));
    assert_eq!(one.root.not_after(), NOW + ROOT_LIFETIME);
    assert_eq!(one.issuing.not_after(), NOW + ISSUING_CA_LIFETIME);
    assert_eq!(lint_ca(one.root.certificate_der(), one.root.certificate_der()), []);
    assert_eq!(lint_ca(one.issuing.certificate_der(), one.root.certificate_der()), []);
}

#[test]
pub(crate) fn renewing_with_the_same_key_takes_another_serial() {
    let authority = Authority::new();
    let (key, template) = (LeafKey::generate().unwrap(), Authority::template(Profile::Peer));
    let issue = || {
        let serial = SerialNumber::random(&mut rng);
        let issued = issue_leaf(&authority.issuing, &authority.store, &key, &template, serial).unwrap();
        assert_eq!(issued.serial, serial);
        assert_eq!(authority.verify(&issued.der, Usage::Any).unwrap().serial, serial);
        issued
    };
    let (old, new) = (issue(), issue());
    assert_ne!(old.serial, new.serial);
    assert_eq!(old.key_hash, new.key_hash);
}

#[test]
pub(crate) fn a_leaf_never_reaches_beyond_its_issuer() {
    let authority = Authority::new();
    let end = authority.issuing.not_after();
    let at = |now| {
        let template = LeafTemplate {
            dns: vec![dns("shop.mesh.internal")],
            ..LeafTemplate::new(Profile::Server, None, now, 72 * HOUR)
        };
        let key = LeafKey::generate().unwrap();
        issue_leaf(&authority.issuing, &authority.store, &key, &template, SerialNumber::random(&mut rng))
    };
    assert_eq!(at(end - HOUR).unwrap().not_after, end);
    assert_eq!(at(end + HOUR).unwrap_err(), IssueError::IssuerEnds(end));
    // Made in the first second of the CA: backdating stops at the CA's own notBefore.
    let issued = at(NOW - Duration::from_secs(600)).unwrap();
    assert_eq!(issued.not_before, NOW - CLOCK_SKEW_ALLOWANCE);
}

#[test]
fn a_leaf_of_a_few_seconds_can_be_issued() {
    let authority = Authority::new();
    let template =
        LeafTemplate { not_after: NOW + Duration::from_secs(5), ..Authority::template(Profile::Node) };
    assert_eq!(authority.issue(&template).issued.not_after, NOW + Duration::from_secs(5));
}

#[test]
fn a_controller_is_never_issued_for_a_csr() {
    let authority = Authority::new();
    let csr = Csr::create(&LeafKey::generate().unwrap()).unwrap();
    let csr = Csr::parse(&csr).unwrap().verify().unwrap();
    let issue = |profile| {
        let template = Authority::template(profile);
        issue_leaf(&authority.issuing, &authority.store, &csr, &template, SerialNumber::random(&mut rng))
            .map(drop)
    };
    assert_eq!(issue(Profile::Controller), Err(IssueError::ControllerFromCsr));
    for profile in Profile::ALL.into_iter().filter(|profile| *profile != Profile::Controller) {
        assert_eq!(issue(profile), Ok(()), "{profile}");
    }
}

#[test]
fn a_bad_template_is_refused_before_anything_is_signed() {
    struct NeverSigns;
    impl KeyStore for NeverSigns {
        fn sign(&self, _: &KeyId, _: &[u8]) -> Result<Vec<u8>, KeyStoreError> {
            panic!("signed a refused template")
        }
        fn public_key(&self, key_id: &KeyId) -> Result<PublicKey, KeyStoreError> {
            Err(KeyStoreError::UnknownKey(key_id.clone()))
        }
    }
    let authority = Authority::new();
    let template = LeafTemplate { dns: Vec::new(), ..Authority::template(Profile::Server) };
    let key = LeafKey::generate().unwrap();
    let refused =
        issue_leaf(&authority.issuing, &NeverSigns, &key, &template, SerialNumber::random(&mut rng));
    assert_eq!(refused, Err(IssueError::Template(TemplateError::NoHostName(Profile::Server))));
}

#[test]
fn a_failing_or_lying_key_store_issues_nothing() {
    struct Lies(MemoryKeyStore, LeafKey);
    impl KeyStore for Lies {
        fn sign(&self, _: &KeyId, tbs: &[u8]) -> Result<Vec<u8>, KeyStoreError> {
            Ok(rcgen::SigningKey::sign(&self.1, tbs).unwrap())
        }
        fn public_key(&self, key_id: &KeyId) -> Result<PublicKey, KeyStoreError> {
            self.0.public_key(key_id)
        }
    }
    let mut authority = Authority::new();
    let (key, template) = (LeafKey::generate().unwrap(), Authority::template(Profile::Node));
    let serial = SerialNumber::random(&mut rng);
    let lies = Lies(MemoryKeyStore::new(), LeafKey::generate().unwrap());
    let refused = issue_leaf(&authority.issuing, &lies, &key, &template, serial);
    assert_eq!(refused, Err(IssueError::Recheck("signature does not verify".to_owned())));

    let issuing = KeyId::parse("issuing").unwrap();
    authority.store.remove(&issuing);
    let refused = issue_leaf(&authority.issuing, &authority.store, &key, &template, serial);
    assert_eq!(refused, Err(IssueError::KeyStore(KeyStoreError::UnknownKey(issuing))));
}

#[test]
pub(crate) fn the_issuers_own_key_is_not_certified_as_a_leaf() {
    let authority = Authority::new();
    let key = LeafKey::from_pkcs8_der(&authority.issuing_pkcs8).unwrap();
    let template = Authority::template(Profile::Node);
    let refused =
        issue_leaf(&authority.issuing, &authority.store, &key, &template, SerialNumber::random(&mut rng));
    assert_eq!(refused, Err(IssueError::IssuerKeyAsLeaf));
}

#[test]
fn an_issuer_is_a_ca_with_its_own_key() {
    let authority = Authority::new();
    let domain = authority.root.domain().clone();
    let make = |der: &[u8], key: &str| {
        Issuer::new(der, KeyId::parse(key).unwrap(), domain.clone(), &authority.store).map(drop)
    };
    assert_eq!(make(authority.root.certificate_der(), "root"), Ok(()));
    let swapped = make(authority.root.certificate_der(), "issuing");
    assert_eq!(swapped, Err(IssueError::OtherKey(KeyId::parse("issuing").unwrap())));
    assert_eq!(make(&authority.leaf(Profile::Node).issued.der, "root"), Err(IssueError::NotCa));
    assert_eq!(make(b"0", "root"), Err(IssueError::NotCa));
    let naming = CaNaming { mesh: "prod-eu", now: NOW };
    let refused =
        create_issuing_ca(&authority.issuing, &authority.store, authority.root.key_id(), naming, &mut rng);
    assert_eq!(refused, Err(IssueError::PathLength));
    let refused =
        create_issuing_ca(&authority.root, &authority.store, authority.root.key_id(), naming, &mut rng);
    assert_eq!(refused, Err(IssueError::IssuerKeyAsLeaf));
    for mesh in ["", "a\nb", "ü", &"m".repeat(33)] {
        let naming = CaNaming { mesh, now: NOW };
        let refused = create_root(&authority.store, authority.root.key_id(), naming, &mut rng);
        assert_eq!(refused, Err(IssueError::MeshName), "{mesh:?}");
    }
}

#[test]
pub(crate) fn a_long_name_leaves_the_subject_empty_and_the_names_critical() {
    let authority = Authority::new();
    let name = dns(&format!("{}.mesh.internal", "a".repeat(60)));
    let template = LeafTemplate { dns: vec![name.clone()], ..Authority::template(Profile::Server) };
    let leaf = authority.issue(&template).issued.der;
    let (_, parsed) = x509_parser::parse_x509_certificate(&leaf).unwrap();
    assert_eq!(parsed.subject().iter().count(), 0);
    assert!(parsed.subject_alternative_name().unwrap().unwrap().critical);
    assert_eq!(authority.verify(&leaf, Usage::Server).unwrap().dns, [name]);
}
