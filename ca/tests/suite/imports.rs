//! CAs made elsewhere, and key files that other programs read.

use mesh_ca::*;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyUsagePurpose};
use rustls_pki_types::CertificateDer;

use crate::authority::*;

fn ca_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "Example");
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages =
        vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
    params.not_before = (NOW - HOUR).to_offset(time::UtcOffset::UTC);
    params.not_after = (NOW + 10_000 * HOUR).to_offset(time::UtcOffset::UTC);
    params.serial_number = Some(rcgen::SerialNumber::from(77_u64));
    params
}

fn pem_files(certificates: &[&[u8]], key: &LeafKey) -> Vec<u8> {
    (bundle::encode_certificates(certificates) + &key.to_pkcs8_pem()).into_bytes()
}

fn import(text: &[u8]) -> Result<ImportedCa, ImportError> {
    import_ca(&[text], None, NOW)
}

#[test]
fn a_foreign_root_of_every_key_type_is_taken_and_signs() {
    for algorithm in KeyAlgorithm::GENERATED.into_iter().filter(|a| *a != KeyAlgorithm::Rsa { bits: 4096 }) {
        let key = LeafKey::generate_for(algorithm).unwrap();
        let root = ca_params("Old Root").self_signed(&key).unwrap();
        let imported = import(&pem_files(&[root.der()], &key)).unwrap();
        assert!(imported.is_root());
        assert_eq!(imported.key_hash, key.key_hash());

        let mut store = MemoryKeyStore::new();
        let (root_id, issuing_id) = (KeyId::parse("old").unwrap(), KeyId::parse("new").unwrap());
        store.insert_pkcs8(root_id.clone(), &imported.pkcs8).unwrap();
        store.generate(issuing_id.clone()).unwrap();
        let domain = TrustDomain::parse("mesh.internal").unwrap();
        let root_issuer = Issuer::new(&imported.certificate, root_id, domain.clone(), &store).unwrap();
        let naming = CaNaming { mesh: "prod-eu", now: NOW };
        let issuing = create_issuing_ca(&root_issuer, &store, &issuing_id, naming, &mut rng).unwrap();
        let issuing = Issuer::new(&issuing.der, issuing_id, domain.clone(), &store).unwrap();
        let template = Authority::template(Profile::Node);
        let leaf_key = LeafKey::generate().unwrap();
        let leaf =
            issue_leaf(&issuing, &store, &leaf_key, &template, SerialNumber::random(&mut rng)).unwrap();
        let anchors = TrustAnchors::new(domain, [root.der()]).unwrap();
        let chain = [CertificateDer::from(issuing.certificate_der())];
        let crls = [
            build_crl(&root_issuer, &store, &CrlPlan::new(1, NOW, ROOT_CRL_LIFETIME, &[])).unwrap(),
            build_crl(&issuing, &store, &CrlPlan::new(1, NOW, CRL_LIFETIME, &[])).unwrap(),
        ];
        let lists = RevocationLists::new(&crls, ExpiredCrl::Refuse).unwrap();
        let verified = verify_chain(&leaf.der, &chain, &anchors, NOW, Usage::Any, Some(&lists));
        assert!(verified.is_ok(), "{algorithm}: {verified:?}");
    }
}

#[test]
pub(crate) fn a_foreign_intermediate_comes_with_its_root() {
    let (root_key, key) = (LeafKey::generate().unwrap(), LeafKey::generate().unwrap());
    let root = ca_params("Old Root").self_signed(&root_key).unwrap();
    let issuer = rcgen::Issuer::from_ca_cert_der(root.der(), &root_key).unwrap();
    let mut params = ca_params("Old Issuing");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    let orphan = params.signed_by(&key, &issuer).unwrap();
    params.use_authority_key_identifier_extension = true;
    let good = params.signed_by(&key, &issuer).unwrap();
    let imported = import(&pem_files(&[good.der(), root.der()], &key)).unwrap();
    assert!(!imported.is_root());
    assert_eq!(imported.issuers, [root.der().clone()]);
    assert_eq!(import(&pem_files(&[good.der()], &key)).unwrap_err(), ImportError::NoRoot);
    assert_eq!(
        import(&pem_files(&[orphan.der(), root.der()], &key)).unwrap_err(),
        ImportError::AuthorityKeyId
    );
    // A root of the same name and key identifier that signed nothing.
    let mut posing = ca_params("Old Root");
    posing.key_identifier_method =
        rcgen::KeyIdMethod::PreSpecified(ca_params("Old Root").key_identifier(&root_key));
    let posing = posing.self_signed(&LeafKey::generate().unwrap()).unwrap();
    assert_eq!(
        import(&pem_files(&[good.der(), posing.der()], &key)).unwrap_err(),
        ImportError::IssuerSignature
    );
}

/// Checklist 4, 10, 11, 12, 13, 15: each fault of a foreign CA has a name.
#[test]
pub(crate) fn a_ca_that_strict_verifiers_refuse_is_refused_by_its_fault() {
    type Change = fn(&mut CertificateParams);
    let table: Vec<(&str, Change, ImportError)> = vec![
        ("no CA", |p| p.is_ca = IsCa::ExplicitNoCa, ImportError::NotCa),
        ("no basicConstraints", |p| p.is_ca = IsCa::NoCa, ImportError::NotCa),
        ("no keyUsage", |p| p.key_usages.clear(), ImportError::KeyUsage),
        ("no keyCertSign", |p| p.key_usages = p.key_usages.split_off(1), ImportError::KeyCertSign),
        ("no cRLSign", |p| p.key_usages.truncate(1), ImportError::CrlSign),
        ("no subject", |p| p.distinguished_name = rcgen::DistinguishedName::new(), ImportError::EmptySubject),
        (
            "EKU that narrows",
            |p| p.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth],
            ImportError::ExtendedKeyUsage,
        ),
        (
            "URI name constraint",
            |p| {
                // [0] permitted { [6] "mesh.internal" }
                let tree = [&[0x30, 19, 0xa0, 17, 0x30, 15, 0x86, 13], b"mesh.internal".as_slice()].concat();
                let mut extension = rcgen::CustomExtension::from_oid_content(&[2, 5, 29, 30], tree);
                extension.set_criticality(true);
                p.custom_extensions.push(extension);
            },
            ImportError::NameConstraints,
        ),
        (
            "critical policy",
            |p| {
                let policy = vec![0x30, 7, 0x30, 5, 6, 3, 0x2a, 3, 4];
                let mut extension = rcgen::CustomExtension::from_oid_content(&[2, 5, 29, 32], policy);
                extension.set_criticality(true);
                p.custom_extensions.push(extension);
            },
            ImportError::CriticalExtension("2.5.29.32".to_owned()),
        ),
        (
            "path length 0 on a root",
            |p| p.is_ca = IsCa::Ca(BasicConstraints::Constrained(0)),
            ImportError::PathLength,
        ),
        (
            "ended",
            |p| p.not_after = (NOW - HOUR / 2).to_offset(time::UtcOffset::UTC),
            ImportError::Expired(NOW - HOUR / 2),
        ),
        (
            "not begun",
            |p| p.not_before = (NOW + HOUR).to_offset(time::UtcOffset::UTC),
            ImportError::NotYetValid(NOW + HOUR),
        ),
    ];
    let key = LeafKey::generate().unwrap();
    for (what, change, fault) in table {
        let mut params = ca_params("Old Root");
        change(&mut params);
        let root = params.self_signed(&key).unwrap();
        assert_eq!(import(&pem_files(&[root.der()], &key)).unwrap_err(), fault, "{what}");
    }
}

/// rcgen loses repeated attributes of a name, and its own issuer would then differ from the subject (checklist 4).
#[test]
pub(crate) fn a_ca_whose_name_cannot_be_reproduced_is_refused() {
    let authority = Authority::new();
    // CN=a, CN=a: the second vanishes.
    let name = hex::decode("3018310a3008060355040313016131 0a30080603550403130161".replace(' ', "")).unwrap();
    let key = LeafKey::generate().unwrap();
    let root = ca_params("Old Root").self_signed(&key).unwrap();
    let (_, parsed) = x509_parser::parse_x509_certificate(root.der()).unwrap();
    let old = parsed.subject().as_raw().to_vec();
    let renamed = replace_names(root.der(), &old, &name);
    assert!(x509_parser::parse_x509_certificate(&renamed).is_ok());
    assert_eq!(check_ca(&renamed, NOW), Err(ImportError::Subject));
    let mut store = MemoryKeyStore::new();
    let id = KeyId::parse("old").unwrap();
    store.insert_pkcs8(id.clone(), &key.to_pkcs8_der()).unwrap();
    let refused = Issuer::new(&renamed, id, authority.root.domain().clone(), &store).map(drop);
    assert_eq!(refused, Err(IssueError::IssuerName));
}

/// What a root that signs elsewhere is called is its own affair, as long as the issuing CA here has a name of ours.
#[test]
fn an_intermediate_is_taken_below_a_root_whose_name_cannot_be_reproduced() {
    let (root_key, key) = (LeafKey::generate().unwrap(), LeafKey::generate().unwrap());
    let root = ca_params("Old Root").self_signed(&root_key).unwrap();
    let issuer = rcgen::Issuer::from_ca_cert_der(root.der(), &root_key).unwrap();
    let mut params = ca_params("Old Issuing");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.use_authority_key_identifier_extension = true;
    let plain = params.signed_by(&key, &issuer).unwrap();
    let (_, parsed) = x509_parser::parse_x509_certificate(root.der()).unwrap();
    let name = hex::decode("3018310a3008060355040313016131 0a30080603550403130161".replace(' ', "")).unwrap();
    let renamed = |der: &[u8]| sign_again(&replace_names(der, parsed.subject().as_raw(), &name), &root_key);
    let files = pem_files(&[&renamed(plain.der()), &renamed(root.der())], &key);
    assert!(!import(&files).unwrap().is_root());
}

/// The certificate under a new signature by a P-256 key.
fn sign_again(der: &[u8], key: &LeafKey) -> Vec<u8> {
    use der::{Decode as _, Encode as _};
    let outer: Vec<der::AnyRef<'_>> = Vec::from_der(der).unwrap();
    let signature = rcgen::SigningKey::sign(key, &outer[0].to_der().unwrap()).unwrap();
    let bits = der::asn1::BitString::from_bytes(&signature).unwrap().to_der().unwrap();
    vec![outer[0], outer[1], der::AnyRef::from_der(&bits).unwrap()].to_der().unwrap()
}

/// The certificate with issuer and subject replaced. Its signature no longer holds, which neither check looks at.
fn replace_names(der: &[u8], old: &[u8], new: &[u8]) -> Vec<u8> {
    use der::{Decode as _, Encode as _};
    let outer: Vec<der::AnyRef<'_>> = Vec::from_der(der).unwrap();
    let tbs = outer[0].to_der().unwrap();
    let mut fields: Vec<der::AnyRef<'_>> = Vec::from_der(&tbs).unwrap();
    for field in &mut fields {
        if field.to_der().unwrap() == old {
            *field = der::AnyRef::from_der(new).unwrap();
        }
    }
    let tbs = fields.to_der().unwrap();
    vec![der::AnyRef::from_der(&tbs).unwrap(), outer[1], outer[2]].to_der().unwrap()
}

#[test]
fn other_files_are_refused() {
    let (key, other) = (LeafKey::generate().unwrap(), LeafKey::generate().unwrap());
    let root = ca_params("Old Root").self_signed(&key).unwrap();
    let der: &[u8] = root.der();
    assert_eq!(import(b"").unwrap_err(), ImportError::Malformed);
    assert_eq!(import(&pem_files(&[], &key)).unwrap_err(), ImportError::NoCertificate);
    assert_eq!(import(bundle::encode_certificates([der]).as_bytes()).unwrap_err(), ImportError::Keys(0));
    assert_eq!(import(&pem_files(&[der], &other)).unwrap_err(), ImportError::OtherKey);
    let twice = [pem_files(&[der], &key), key.to_pkcs8_pem().as_bytes().to_vec()].concat();
    assert_eq!(import(&twice).unwrap_err(), ImportError::Keys(2));
    assert_eq!(import(&vec![b'x'; PKCS12_BYTES_MAX + 1]).unwrap_err(), ImportError::TooLarge);
    assert_eq!(import(b"0").unwrap_err(), ImportError::PasswordNeeded);
    let foreign = pem::encode(&pem::Pem::new("X509 CRL", vec![0x30, 0]));
    assert_eq!(import(foreign.as_bytes()).unwrap_err(), ImportError::Label("X509 CRL".to_owned()));
    let authority = Authority::new();
    let leaf = authority.leaf(Profile::Server);
    assert_eq!(import(&pem_files(&[&leaf.issued.der], &leaf.key)).unwrap_err(), ImportError::NotCa);
}

#[test]
fn a_pkcs12_file_reads_back_and_needs_its_password() {
    let authority = Authority::new();
    let leaf = authority.leaf(Profile::Server);
    let chain = [vec![CertificateDer::from(leaf.issued.der.clone())], authority.intermediates()].concat();
    let pkcs8 = leaf.key.to_pkcs8_der();
    let file = write_pkcs12("shop", &pkcs8, &chain, "correct horse", &mut rng).unwrap();
    let read = read_pkcs12(&file, "correct horse").unwrap();
    assert_eq!((&read.certificates, &read.pkcs8), (&chain, &pkcs8));
    assert!(!format!("{read:?}").contains(&hex::encode(&pkcs8[36..60])));
    assert_eq!(read_pkcs12(&file, "wrong horse").unwrap_err(), Pkcs12Error::WrongPassword);
    assert!(!file.windows(16).any(|window| window == &pkcs8[36..52]));
    let middle = file.len() / 2;
    let mut changed = file.to_vec();
    changed[middle] ^= 1;
    assert_eq!(read_pkcs12(&changed, "correct horse").unwrap_err(), Pkcs12Error::WrongPassword);
    let refused = write_pkcs12("shop", &pkcs8, &chain, "", &mut rng);
    assert_eq!(refused.unwrap_err(), Pkcs12Error::EmptyPassword);
    assert_eq!(write_pkcs12("x", &pkcs8, &[], "p", &mut rng).unwrap_err(), Pkcs12Error::NoCertificate);
    assert_eq!(read_pkcs12(b"0", "p").unwrap_err(), Pkcs12Error::Malformed);
}

#[test]
fn a_ca_in_pkcs12_is_imported() {
    let key = LeafKey::generate_for(KeyAlgorithm::EcdsaP384).unwrap();
    let root = ca_params("Old Root").self_signed(&key).unwrap();
    let file = write_pkcs12("root", &key.to_pkcs8_der(), &[root.der().clone()], "s3cret", &mut rng).unwrap();
    let imported = import_ca(&[&file], Some("s3cret"), NOW).unwrap();
    assert_eq!(imported.certificate, *root.der());
    assert_eq!(import_ca(&[&file], None, NOW).unwrap_err(), ImportError::PasswordNeeded);
    let wrong = import_ca(&[&file], Some("wrong"), NOW).unwrap_err();
    assert_eq!(wrong, ImportError::Pkcs12(Pkcs12Error::WrongPassword));
}

/// Files that OpenSSL 3 made: PKCS #8 under a password, SEC 1, and PKCS #12 in the new and the old form.
#[test]
#[allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "another program reads and writes the files"
)]
fn key_files_of_openssl_are_read() {
    use std::process::Command;
    let folder = std::env::temp_dir().join(format!("mesh-ca-import-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let openssl = |arguments: &[&str]| {
        let done = Command::new("openssl").args(arguments).current_dir(&folder).output().unwrap();
        assert!(done.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
    };
    let key = LeafKey::generate().unwrap();
    let root = ca_params("Old Root").self_signed(&key).unwrap();
    let read = |name: &str| std::fs::read(folder.join(name)).unwrap();
    std::fs::write(folder.join("root.pem"), bundle::encode_certificates([root.der()])).unwrap();
    std::fs::write(folder.join("key.pem"), key.to_pkcs8_pem().as_bytes()).unwrap();
    openssl(&["pkcs8", "-topk8", "-in", "key.pem", "-out", "sealed.pem", "-passout", "pass:s3cret"]);
    openssl(&[
        "pkcs8",
        "-topk8",
        "-scrypt",
        "-in",
        "key.pem",
        "-out",
        "scrypt.pem",
        "-passout",
        "pass:s3cret",
    ]);
    openssl(&["ec", "-in", "key.pem", "-out", "sec1.pem"]);
    let export = ["pkcs12", "-export", "-in", "root.pem", "-inkey", "key.pem", "-passout", "pass:s3cret"];
    openssl(&[&export[..], &["-out", "new.p12"]].concat());
    openssl(
        &[
            &export[..],
            &["-out", "old.p12", "-certpbe", "PBE-SHA1-3DES", "-keypbe", "PBE-SHA1-3DES", "-macalg", "sha1"],
        ]
        .concat(),
    );
    let certificate = read("root.pem");
    for name in ["sealed.pem", "scrypt.pem", "sec1.pem"] {
        let imported = import_ca(&[&certificate, &read(name)], Some("s3cret"), NOW);
        assert_eq!(imported.unwrap().key_hash, key.key_hash(), "{name}");
    }
    assert_eq!(import_ca(&[&read("new.p12")], Some("s3cret"), NOW).unwrap().key_hash, key.key_hash());
    let sealed = read("sealed.pem");
    assert_eq!(import_ca(&[&certificate, &sealed], None, NOW).unwrap_err(), ImportError::PasswordNeeded);
    let wrong = import_ca(&[&certificate, &sealed], Some("wrong"), NOW).unwrap_err();
    assert_eq!(wrong, ImportError::Pkcs12(Pkcs12Error::WrongPassword));
    let old = import_ca(&[&read("old.p12")], Some("s3cret"), NOW).unwrap_err();
    assert_eq!(old, ImportError::Pkcs12(Pkcs12Error::OldAlgorithm));

    // And OpenSSL reads what we write.
    let chain = [CertificateDer::from(root.der().to_vec())];
    let file = write_pkcs12("root", &key.to_pkcs8_der(), &chain, "s3cret", &mut rng).unwrap();
    std::fs::write(folder.join("ours.p12"), file.as_slice()).unwrap();
    openssl(&["pkcs12", "-in", "ours.p12", "-passin", "pass:s3cret", "-nodes", "-out", "opened.pem"]);
    assert_eq!(import_ca(&[&read("opened.pem")], None, NOW).unwrap().key_hash, key.key_hash());
    std::fs::remove_dir_all(&folder).unwrap();
}
