//! Each rule of the linter is broken once.

use mesh_ca::*;
use rcgen::{CustomExtension, DnType, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose, SanType};

use crate::authority::*;

const SERVICE: &str = "spiffe://mesh.internal/service/web-1/shop";

fn ia5(text: &str) -> rcgen::string::Ia5String {
    rcgen::string::Ia5String::try_from(text).unwrap()
}

fn offset(at: time::UtcDateTime) -> time::OffsetDateTime {
    at.to_offset(time::UtcOffset::UTC)
}

#[test]
pub(crate) fn each_broken_leaf_is_found() {
    let authority = Authority::new();
    type Change = fn(&mut rcgen::CertificateParams);
    let table: Vec<(&str, Change, Finding)> = vec![
        ("no AKI", |p| p.use_authority_key_identifier_extension = false, Finding::AuthorityKeyId),
        ("rcgen's own serial", |p| p.serial_number = None, Finding::Serial),
        ("short serial", |p| p.serial_number = Some(rcgen::SerialNumber::from(7_u64)), Finding::Serial),
        (
            "negative serial",
            |p| p.serial_number = Some(rcgen::SerialNumber::from_slice(&[0xff; 16])),
            Finding::Serial,
        ),
        ("rcgen's own validity", |p| p.not_after = rcgen::date_time_ymd(4096, 1, 1), Finding::Validity),
        ("longer than the issuer", |p| p.not_after = rcgen::date_time_ymd(2029, 1, 1), Finding::BeyondIssuer),
        ("before the issuer", |p| p.not_before = offset(NOW - HOUR), Finding::BeyondIssuer),
        ("ends before it begins", |p| p.not_after = p.not_before - 2 * HOUR, Finding::Validity),
        ("no key usage", |p| p.key_usages.clear(), Finding::KeyUsage),
        ("keyEncipherment", |p| p.key_usages.push(KeyUsagePurpose::KeyEncipherment), Finding::KeyUsage),
        ("keyCertSign", |p| p.key_usages.push(KeyUsagePurpose::KeyCertSign), Finding::KeyUsage),
        ("no EKU", |p| p.extended_key_usages.clear(), Finding::ExtendedKeyUsage),
        ("anyEKU", |p| p.extended_key_usages.push(ExtendedKeyUsagePurpose::Any), Finding::ExtendedKeyUsage),
        (
            "time stamping",
            |p| p.extended_key_usages.push(ExtendedKeyUsagePurpose::TimeStamping),
            Finding::ExtendedKeyUsage,
        ),
        (
            "OCSP signing",
            |p| p.extended_key_usages.push(ExtendedKeyUsagePurpose::OcspSigning),
            Finding::ExtendedKeyUsage,
        ),
        (
            "code signing beside a SPIFFE ID",
            |p| p.extended_key_usages.push(ExtendedKeyUsagePurpose::CodeSigning),
            Finding::Profile,
        ),
        ("no basic constraints", |p| p.is_ca = IsCa::NoCa, Finding::BasicConstraints),
        (
            "CA:TRUE",
            |p| p.is_ca = IsCa::Ca(rcgen::BasicConstraints::Constrained(0)),
            Finding::BasicConstraints,
        ),
        ("no SAN", |p| p.subject_alt_names.clear(), Finding::Names),
        (
            "65 names",
            |p| {
                let name = |i| SanType::DnsName(ia5(&format!("n{i}.mesh.internal")));
                p.subject_alt_names.extend((0..64).map(name));
            },
            Finding::Names,
        ),
        (
            "wildcard",
            |p| p.subject_alt_names.push(SanType::DnsName(ia5("*.mesh.internal"))),
            Finding::DnsName,
        ),
        (
            "upper case",
            |p| p.subject_alt_names.push(SanType::DnsName(ia5("Web.mesh.internal"))),
            Finding::DnsName,
        ),
        ("foreign CN", |p| p.distinguished_name.push(DnType::CommonName, "root"), Finding::CommonName),
        (
            "critical foreign extension",
            |p| {
                let mut extension = CustomExtension::from_oid_content(&[1, 2, 3, 4], vec![5, 0]);
                extension.set_criticality(true);
                p.custom_extensions.push(extension);
            },
            Finding::Criticality("1.2.3.4".to_owned()),
        ),
        (
            "foreign extension",
            |p| p.custom_extensions.push(CustomExtension::from_oid_content(&[1, 2, 3, 4], vec![5, 0])),
            Finding::ForeignExtension("1.2.3.4".to_owned()),
        ),
        (
            "extension twice",
            |p| p.custom_extensions.push(CustomExtension::from_oid_content(&[2, 5, 29, 19], vec![0x30, 0])),
            Finding::Extensions,
        ),
        (
            "two URIs",
            |p| p.subject_alt_names.push(SanType::URI(ia5("spiffe://mesh.internal/node/web-1"))),
            Finding::Profile,
        ),
        (
            "e-mail address",
            |p| p.subject_alt_names.push(SanType::Rfc822Name(ia5("a@mesh.internal"))),
            Finding::Extensions,
        ),
        ("SVID with one purpose", |p| p.extended_key_usages.truncate(1), Finding::Profile),
        (
            "CRL over https",
            |p| {
                let uris = vec!["https://crl.mesh.internal/".to_owned()];
                p.crl_distribution_points = vec![rcgen::CrlDistributionPoint { uris }];
            },
            Finding::CrlAddress,
        ),
        (
            "two CRL addresses",
            |p| {
                let uris = vec!["http://a.mesh.internal/".to_owned(), "http://b.mesh.internal/".to_owned()];
                p.crl_distribution_points = vec![rcgen::CrlDistributionPoint { uris }];
            },
            Finding::CrlAddress,
        ),
        (
            "noRevAvail beside a CRL address",
            |p| {
                p.crl_distribution_points =
                    vec![rcgen::CrlDistributionPoint { uris: vec!["http://a.mesh.internal/".to_owned()] }];
                p.custom_extensions.push(CustomExtension::from_oid_content(&[2, 5, 29, 56], vec![5, 0]));
            },
            Finding::NoRevAvail,
        ),
        (
            "noRevAvail that lives 11 days",
            |p| {
                p.not_after = p.not_before + 11 * 24 * HOUR;
                p.custom_extensions.push(CustomExtension::from_oid_content(&[2, 5, 29, 56], vec![5, 0]));
            },
            Finding::NoRevAvail,
        ),
        (
            "issuer's address over https",
            |p| {
                let url = b"https://x/";
                let access =
                    [&[0x30, 22, 0x30, 20, 6, 8, 43, 6, 1, 5, 5, 7, 48, 2, 0x86, 10], url.as_slice()]
                        .concat();
                let oid = [1, 3, 6, 1, 5, 5, 7, 1, 1];
                p.custom_extensions.push(CustomExtension::from_oid_content(&oid, access));
            },
            Finding::Pointers,
        ),
        (
            "over 10 000 bytes",
            |p| {
                let content = [&[4, 0x82, 0x27, 0x10][..], &[0; 10_000]].concat();
                p.custom_extensions.push(CustomExtension::from_oid_content(&[1, 2, 3, 4], content));
            },
            Finding::TooLarge,
        ),
    ];
    let lint = |der: &[u8]| lint_leaf(der, authority.issuing.certificate_der(), authority.issuing.domain());
    let key = LeafKey::generate().unwrap();
    assert_eq!(lint(&authority.sign_raw(&Authority::raw_params(&[SERVICE]), &key)), []);
    for (what, change, finding) in table {
        let mut params = Authority::raw_params(&[SERVICE]);
        change(&mut params);
        let found = lint(&authority.sign_raw(&params, &key));
        assert!(found.contains(&finding), "{what}: {found:?}");
    }
    assert_eq!(lint(b"0"), [Finding::Unreadable]);
}

#[test]
fn a_leaf_of_another_issuer_is_found() {
    let (authority, other) = (Authority::new(), Authority::new());
    let leaf = authority.leaf(Profile::Node).issued.der;
    let found = lint_leaf(&leaf, other.issuing.certificate_der(), authority.issuing.domain());
    assert!(found.contains(&Finding::IssuerName) && found.contains(&Finding::AuthorityKeyId), "{found:?}");
}

#[test]
pub(crate) fn each_broken_ca_is_found() {
    let authority = Authority::new();
    type Change = fn(&mut rcgen::CertificateParams);
    let table: Vec<(&str, Change, Finding)> = vec![
        (
            "no path length",
            |p| p.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained),
            Finding::BasicConstraints,
        ),
        ("no CA", |p| p.is_ca = IsCa::ExplicitNoCa, Finding::BasicConstraints),
        ("no key usage", |p| p.key_usages.clear(), Finding::KeyUsage),
        ("no cRLSign", |p| p.key_usages.truncate(1), Finding::KeyUsage),
        ("no AKI", |p| p.use_authority_key_identifier_extension = false, Finding::AuthorityKeyId),
        (
            "EKU",
            |p| p.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth),
            Finding::ForeignExtension("2.5.29.37".to_owned()),
        ),
        ("no subject", |p| p.distinguished_name = rcgen::DistinguishedName::new(), Finding::EmptySubject),
        (
            "GeneralizedTime too late",
            |p| p.not_after = rcgen::date_time_ymd(2050, 1, 1),
            Finding::BeyondIssuer,
        ),
    ];
    let good = || {
        let mut params = Authority::raw_params(&[]);
        params.subject_alt_names.clear();
        params.extended_key_usages.clear();
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params
    };
    let key = LeafKey::generate().unwrap();
    let lint = |params| lint_ca(&authority.sign_raw(&params, &key), authority.issuing.certificate_der());
    assert_eq!(lint(good()), []);
    for (what, change, finding) in table {
        let mut params = good();
        change(&mut params);
        let found = lint(params);
        assert!(found.contains(&finding), "{what}: {found:?}");
    }
}

#[test]
pub(crate) fn each_broken_crl_is_found() {
    let authority = Authority::new();
    type Change = fn(&mut rcgen::CertificateRevocationListParams);
    let table: Vec<(&str, Change, Finding)> = vec![
        (
            "AKI from the key, not the CA",
            |p| p.key_identifier_method = rcgen::KeyIdMethod::Sha512,
            Finding::AuthorityKeyId,
        ),
        (
            "foreign serial",
            |p| p.revoked_certs[0].serial_number = rcgen::SerialNumber::from(5_u64),
            Finding::CrlEntry,
        ),
        (
            "revoked after nextUpdate",
            |p| p.revoked_certs[0].revocation_time = offset(NOW + 1000 * HOUR),
            Finding::CrlEntry,
        ),
        (
            "removeFromCRL",
            |p| p.revoked_certs[0].reason_code = Some(rcgen::RevocationReason::RemoveFromCrl),
            Finding::CrlEntry,
        ),
    ];
    let der = rustls_pki_types::CertificateDer::from(authority.issuing.certificate_der().to_vec());
    let issuer =
        rcgen::Issuer::from_ca_cert_der(&der, LeafKey::from_pkcs8_der(&authority.issuing_pkcs8).unwrap())
            .unwrap();
    let good = || rcgen::CertificateRevocationListParams {
        this_update: offset(NOW),
        next_update: offset(NOW + CRL_LIFETIME),
        crl_number: rcgen::SerialNumber::from(3_u64),
        issuing_distribution_point: None,
        revoked_certs: vec![rcgen::RevokedCertParams {
            serial_number: rcgen::SerialNumber::from_slice(SerialNumber::random(&mut rng).as_bytes()),
            revocation_time: offset(NOW),
            reason_code: None,
            invalidity_date: None,
        }],
        key_identifier_method: rcgen::KeyIdMethod::PreSpecified(
            authority.issuing.key_identifier().as_bytes().to_vec(),
        ),
    };
    let lint = |params: rcgen::CertificateRevocationListParams| {
        lint_crl(params.signed_by(&issuer).unwrap().der(), authority.issuing.certificate_der())
    };
    assert_eq!(lint(good()), []);
    for (what, change, finding) in table {
        let mut params = good();
        change(&mut params);
        let found = lint(params);
        assert!(found.contains(&finding), "{what}: {found:?}");
    }
}

/// A list of no entries is written as nothing; rcgen cannot write it otherwise, so the bytes are patched here.
#[test]
pub(crate) fn an_empty_list_of_revoked_certificates_is_found() {
    use der::{Decode as _, Encode as _};
    let authority = Authority::new();
    let issuing = authority.issuing.certificate_der();
    let crl = authority.crls(&[]).remove(0);
    assert_eq!(lint_crl(&crl, issuing), []);
    let outer: Vec<der::AnyRef<'_>> = Vec::from_der(&crl).unwrap();
    let tbs = outer[0].to_der().unwrap();
    let mut fields: Vec<der::AnyRef<'_>> = Vec::from_der(&tbs).unwrap();
    fields.insert(5, der::AnyRef::new(der::Tag::Sequence, &[]).unwrap());
    let tbs = fields.to_der().unwrap();
    let patched = vec![der::AnyRef::from_der(&tbs).unwrap(), outer[1], outer[2]].to_der().unwrap();
    assert_eq!(lint_crl(&patched, issuing), [Finding::EmptyList]);
}
