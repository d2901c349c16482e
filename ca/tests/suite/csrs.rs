//! What a CSR may ask for, and that asking gets it nothing.

use mesh_ca::*;
use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose, SanType};

use crate::authority::*;

fn ia5(text: &str) -> rcgen::string::Ia5String {
    rcgen::string::Ia5String::try_from(text).unwrap()
}

fn request(change: impl Fn(&mut CertificateParams)) -> Vec<u8> {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    change(&mut params);
    params.serialize_request(&LeafKey::generate().unwrap()).unwrap().der().to_vec()
}

fn verify(der: &[u8]) -> Result<VerifiedCsr, CsrError> {
    Csr::parse(der).and_then(Csr::verify)
}

#[test]
fn a_plain_csr_proves_its_key_and_asks_for_nothing() {
    let key = LeafKey::generate().unwrap();
    let der = Csr::create(&key).unwrap();
    let csr = verify(&der).unwrap();
    assert_eq!(csr.spki_der(), key.public_key().spki_der());
    assert_eq!(csr.key_hash(), key.key_hash());
    assert!(csr.requested_names().is_empty());
    for label in ["CERTIFICATE REQUEST", "NEW CERTIFICATE REQUEST"] {
        let text = pem::encode(&pem::Pem::new(label, der.clone()));
        assert_eq!(verify(text.as_bytes()).unwrap().key_hash(), key.key_hash());
    }
}

#[test]
fn requested_names_are_shown_to_the_caller() {
    let der = request(|p| {
        p.distinguished_name.push(rcgen::DnType::CommonName, "shop");
        p.subject_alt_names = vec![
            SanType::DnsName(ia5("Shop.Mesh.internal")),
            SanType::IpAddress("100.64.0.9".parse().unwrap()),
            SanType::IpAddress("fd00::9".parse().unwrap()),
            SanType::URI(ia5("spiffe://mesh.internal/controller/c1")),
        ];
        p.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        p.is_ca = IsCa::ExplicitNoCa;
    });
    let csr = verify(&der).unwrap();
    let names = RequestedNames {
        common_name: Some("shop".to_owned()),
        dns: vec![dns("shop.mesh.internal")],
        ips: vec!["100.64.0.9".parse().unwrap(), "fd00::9".parse().unwrap()],
        uris: vec!["spiffe://mesh.internal/controller/c1".to_owned()],
    };
    assert_eq!(*csr.requested_names(), names);
}

#[test]
fn requests_that_no_leaf_can_have_are_refused() {
    type Change = fn(&mut CertificateParams);
    type Expected = fn(CsrError) -> bool;
    let eku = |e| matches!(e, CsrError::ExtendedKeyUsage);
    let table: [(&str, Change, Expected); 13] = [
        (
            "CA:TRUE",
            |p| p.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained),
            |e| e == CsrError::AsksForCa,
        ),
        (
            "CA:TRUE with a path length",
            |p| p.is_ca = IsCa::Ca(rcgen::BasicConstraints::Constrained(0)),
            |e| e == CsrError::AsksForCa,
        ),
        (
            "keyCertSign",
            |p| p.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyCertSign],
            |e| e == CsrError::KeyUsage,
        ),
        ("cRLSign", |p| p.key_usages = vec![KeyUsagePurpose::CrlSign], |e| e == CsrError::KeyUsage),
        ("anyEKU", |p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::Any], eku),
        ("OCSP signing", |p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::OcspSigning], eku),
        ("own EKU", |p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::Other(vec![1, 2, 3])], eku),
        (
            "WireGuard keys",
            |p| {
                let extension = rcgen::CustomExtension::from_oid_content(&WIREGUARD_KEYS_OID, vec![0x30, 0]);
                p.custom_extensions.push(extension);
            },
            |e| e == CsrError::Extension("1.3.6.1.4.1.32473.1.1".to_owned()),
        ),
        (
            "the same extension twice",
            |p| {
                p.is_ca = IsCa::ExplicitNoCa;
                let again =
                    rcgen::CustomExtension::from_oid_content(&[2, 5, 29, 19], vec![0x30, 3, 1, 1, 255]);
                p.custom_extensions.push(again);
            },
            |e| e == CsrError::Duplicate,
        ),
        (
            "65 names",
            |p| {
                let name = |i| SanType::DnsName(ia5(&format!("n{i}.mesh.internal")));
                p.subject_alt_names = (0..=SANS_PER_CSR_MAX).map(name).collect();
            },
            |e| e == CsrError::TooManyNames,
        ),
        (
            "an e-mail address",
            |p| p.subject_alt_names = vec![SanType::Rfc822Name(ia5("a@mesh.internal"))],
            |e| e == CsrError::NameType,
        ),
        (
            "a URI with a space",
            |p| p.subject_alt_names = vec![SanType::URI(ia5("spiffe://a b"))],
            |e| e == CsrError::Uri,
        ),
        (
            "a common name with a line break",
            |p| p.distinguished_name.push(rcgen::DnType::CommonName, "a\nb"),
            |e| e == CsrError::CommonName,
        ),
    ];
    for (what, change, expected) in table {
        let refused = verify(&request(change)).expect_err(what);
        assert!(expected(refused.clone()), "{what}: {refused:?}");
    }
}

#[test]
pub(crate) fn malformed_names_are_refused_by_their_fault() {
    let long = format!("{}.mesh.internal", "a.".repeat(143));
    let table = [
        ("*.mesh.internal", NameError::Wildcard),
        ("web\0.mesh.internal", NameError::Character('\0')),
        ("web.mesh.internal.", NameError::TrailingDot),
        ("", NameError::Empty),
        ("10.0.0.1", NameError::NumericTopLabel),
        (&long, NameError::TooLong { length: 300, max: 253 }),
    ];
    for (name, fault) in table {
        let der = request(|p| p.subject_alt_names = vec![SanType::DnsName(ia5(name))]);
        match verify(&der) {
            Err(CsrError::Name { source, .. }) => assert_eq!(source, fault, "{name:?}"),
            other => panic!("{name:?}: {other:?}"),
        }
    }
}

#[test]
pub(crate) fn weak_and_foreign_keys_are_refused() {
    /// An RSA key of any size that signs nothing: a CSR is judged by its key before its signature.
    struct Rsa(Vec<u8>);
    impl rcgen::PublicKeyData for Rsa {
        fn der_bytes(&self) -> &[u8] {
            &self.0
        }
        fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
            &rcgen::PKCS_RSA_SHA256
        }
    }
    impl rcgen::SigningKey for Rsa {
        fn sign(&self, _: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
            Ok(vec![0; self.0.len()])
        }
    }
    let rsa = |bits: usize, exponent: &[u8], last: u8| {
        use der::Encode as _;
        let mut modulus = vec![0xc5; bits / 8];
        *modulus.last_mut().unwrap() = last;
        let number = |bytes| der::asn1::UintRef::new(bytes).unwrap().to_der().unwrap();
        let body = [number(&modulus), number(exponent)].concat();
        let sequence = der::AnyRef::new(der::Tag::Sequence, &body).unwrap().to_der().unwrap();
        CertificateParams::default().serialize_request(&Rsa(sequence)).unwrap().der().to_vec()
    };
    let f4 = [1, 0, 1];
    let table = [
        (rsa(1024, &f4, 1), CsrError::Key(KeyError::RsaSize(1024))),
        (rsa(2040, &f4, 1), CsrError::Key(KeyError::RsaSize(2040))),
        (rsa(4104, &f4, 1), CsrError::Key(KeyError::RsaSize(4104))),
        (rsa(2048, &[3], 1), CsrError::Key(KeyError::RsaExponent)),
        (rsa(2048, &f4, 2), CsrError::Key(KeyError::RsaEncoding)),
        (rsa(2048, &f4, 1), CsrError::Signature),
    ];
    for (der, verdict) in table {
        assert_eq!(verify(&der).unwrap_err(), verdict);
    }
    let p521 = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P521_SHA512).unwrap();
    let der = CertificateParams::default().serialize_request(&p521).unwrap();
    assert_eq!(verify(der.der()).unwrap_err(), CsrError::Key(KeyError::Unsupported));
}

#[test]
fn every_key_type_that_is_taken_verifies() {
    for algorithm in [
        &rcgen::PKCS_ECDSA_P256_SHA256,
        &rcgen::PKCS_ECDSA_P384_SHA384,
        &rcgen::PKCS_ED25519,
        &rcgen::PKCS_RSA_SHA256,
        &rcgen::PKCS_RSA_SHA512,
    ] {
        let pair = KeyPair::generate_for(algorithm).unwrap();
        let der = CertificateParams::default().serialize_request(&pair).unwrap();
        assert!(verify(der.der()).is_ok(), "{algorithm:?}");
    }
}

#[test]
pub(crate) fn a_signature_by_another_key_is_refused() {
    let mut der = Csr::create(&LeafKey::generate().unwrap()).unwrap();
    *der.last_mut().unwrap() ^= 1;
    assert_eq!(verify(&der).unwrap_err(), CsrError::Signature);

    /// Holds one key and signs with another.
    struct Thief(LeafKey, LeafKey);
    impl rcgen::PublicKeyData for Thief {
        fn der_bytes(&self) -> &[u8] {
            rcgen::PublicKeyData::der_bytes(&self.0)
        }
        fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
            rcgen::PublicKeyData::algorithm(&self.0)
        }
    }
    impl rcgen::SigningKey for Thief {
        fn sign(&self, msg: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
            rcgen::SigningKey::sign(&self.1, msg)
        }
    }
    let thief = Thief(LeafKey::generate().unwrap(), LeafKey::generate().unwrap());
    let der = CertificateParams::default().serialize_request(&thief).unwrap();
    assert_eq!(verify(der.der()).unwrap_err(), CsrError::Signature);
}

#[test]
pub(crate) fn size_and_form_are_judged_first() {
    let five_mib = vec![0x30; 5 * 1024 * 1024];
    assert_eq!(Csr::parse(&five_mib).unwrap_err(), CsrError::TooLarge(five_mib.len()));
    let der = Csr::create(&LeafKey::generate().unwrap()).unwrap();
    let block = pem::encode(&pem::Pem::new("CERTIFICATE REQUEST", der.clone()));
    let twice = format!("{block}{block}");
    let mislabelled = block.replace("CERTIFICATE REQUEST", "CERTIFICATE");
    let trailing = [der.as_slice(), &[0]].concat();
    for text in
        [b"".as_slice(), b"hello", b"0", twice.as_bytes(), mislabelled.as_bytes(), &trailing, &der[..90]]
    {
        assert_eq!(Csr::parse(text).unwrap_err(), CsrError::Malformed);
    }
}

/// What a CSR asks for does not change one extension of what is issued.
#[test]
fn a_certificate_says_what_the_template_says_whatever_the_csr_asked() {
    let authority = Authority::new();
    let template = Authority::template(Profile::Peer);
    let key = LeafKey::generate().unwrap();
    let greedy = {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(rcgen::DnType::CommonName, "root");
        params.subject_alt_names = vec![
            SanType::DnsName(ia5("controller.mesh.internal")),
            SanType::URI(ia5("spiffe://mesh.internal/controller/c1")),
        ];
        params.key_usages = vec![KeyUsagePurpose::ContentCommitment, KeyUsagePurpose::KeyAgreement];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params.serialize_request(&key).unwrap().der().to_vec()
    };
    let serial = SerialNumber::random(&mut rng);
    let issue = |csr: &[u8]| {
        let csr = verify(csr).unwrap();
        issue_leaf(&authority.issuing, &authority.store, &csr, &template, serial).unwrap().der
    };
    let signed_part = |der: &[u8]| {
        let (_, parsed) = x509_parser::parse_x509_certificate(der).unwrap();
        parsed.tbs_certificate.as_ref().to_vec()
    };
    let (plain, greedy) = (issue(&Csr::create(&key).unwrap()), issue(&greedy));
    assert_eq!(signed_part(&plain), signed_part(&greedy));
}
