//! Names that are smuggled into CSRs, and what comes of it: nothing.

use mesh_ca::*;
use rcgen::{CertificateParams, CustomExtension, SanType};

use crate::authority::*;

fn ia5(text: &str) -> rcgen::string::Ia5String {
    rcgen::string::Ia5String::try_from(text).unwrap()
}

fn request(key: &LeafKey, change: impl Fn(&mut CertificateParams)) -> Result<VerifiedCsr, CsrError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    change(&mut params);
    Csr::parse(params.serialize_request(key).unwrap().der())?.verify()
}

/// subjectAltName with one general name of any tag.
fn raw_name(params: &mut CertificateParams, tag: u8, content: &[u8]) {
    let length = u8::try_from(content.len()).unwrap();
    let names = [&[0x30, length + 2, tag, length], content].concat();
    params.custom_extensions.push(CustomExtension::from_oid_content(&[2, 5, 29, 17], names));
}

#[test]
fn names_of_foreign_kinds_are_refused() {
    let key = LeafKey::generate().unwrap();
    let long = format!("{}.mesh.internal", "a".repeat(300));
    type Change<'a> = Box<dyn Fn(&mut CertificateParams) + 'a>;
    let table: Vec<(&str, Change<'_>)> = vec![
        (
            "otherName",
            Box::new(|p| {
                p.subject_alt_names =
                    vec![SanType::OtherName((vec![1, 3, 6, 1, 4, 1, 311, 20, 2, 3], "root@mesh".into()))]
            }),
        ),
        ("directoryName", Box::new(|p| raw_name(p, 0xa4, &[0x30, 0]))),
        ("registeredID", Box::new(|p| raw_name(p, 0x88, &[0x2a, 3, 4]))),
        (
            "e-mail address",
            Box::new(|p| p.subject_alt_names = vec![SanType::Rfc822Name(ia5("a@mesh.internal"))]),
        ),
        ("IP address of 5 octets", Box::new(|p| raw_name(p, 0x87, &[10, 0, 0, 1, 0]))),
        ("IP address with mask", Box::new(|p| raw_name(p, 0x87, &[10, 0, 0, 1, 255, 0, 0, 0]))),
        ("DNS name in UTF-8", Box::new(|p| raw_name(p, 0x82, "wеb.mesh.internal".as_bytes()))),
        ("NUL", Box::new(|p| raw_name(p, 0x82, b"web.mesh.internal\0.evil.example"))),
        ("wildcard", Box::new(|p| p.subject_alt_names = vec![SanType::DnsName(ia5("*.mesh.internal"))])),
        (
            "inner wildcard",
            Box::new(|p| p.subject_alt_names = vec![SanType::DnsName(ia5("w*b.mesh.internal"))]),
        ),
        ("comma", Box::new(|p| p.subject_alt_names = vec![SanType::DnsName(ia5("a,b.mesh.internal"))])),
        ("blank", Box::new(|p| p.subject_alt_names = vec![SanType::DnsName(ia5(" "))])),
        ("under_score", Box::new(|p| p.subject_alt_names = vec![SanType::DnsName(ia5("a_b.mesh.internal"))])),
        ("300 characters", Box::new(move |p| p.subject_alt_names = vec![SanType::DnsName(ia5(&long))])),
        (
            "name constraints",
            Box::new(|p| {
                p.custom_extensions.push(CustomExtension::from_oid_content(&[2, 5, 29, 30], vec![0x30, 0]))
            }),
        ),
        (
            "policies",
            Box::new(|p| {
                let policy = vec![0x30, 7, 0x30, 5, 6, 3, 0x2a, 3, 4];
                p.custom_extensions.push(CustomExtension::from_oid_content(&[2, 5, 29, 32], policy));
            }),
        ),
        (
            "ocsp-nocheck",
            Box::new(|p| {
                let oid = [1, 3, 6, 1, 5, 5, 7, 48, 1, 5];
                p.custom_extensions.push(CustomExtension::from_oid_content(&oid, vec![5, 0]));
            }),
        ),
        (
            "noRevAvail",
            Box::new(|p| {
                p.custom_extensions.push(CustomExtension::from_oid_content(&[2, 5, 29, 56], vec![5, 0]))
            }),
        ),
        (
            "CRL address",
            Box::new(|p| {
                p.custom_extensions.push(CustomExtension::from_oid_content(&[2, 5, 29, 31], vec![0x30, 0]))
            }),
        ),
    ];
    for (what, change) in table {
        assert!(request(&key, change).is_err(), "{what}");
    }
}

/// Characters that look like others never make a name of ours.
#[test]
fn confusable_names_are_no_names() {
    for text in [
        "wеb-1",
        "ｗeb-1",
        "web‑1",
        "web-1\u{200b}",
        "WEB-1",
        "web-1 ",
        "ẃeb",
        "web,1",
        "web*",
        "*",
        ",",
        "..",
        "a/b",
        "a\\b",
        "-a",
        "xn--",
        "a\u{0}b",
    ] {
        let label = Label::parse(text);
        assert!(label.is_err() || text == "xn--", "{text:?}");
        assert!(TrustDomain::parse(&format!("{text}.internal")).is_err(), "{text:?}");
    }
    assert!(Label::parse(&"a".repeat(64)).is_err());
}

/// A CSR that asks to be the controller.
pub(crate) fn greedy_csr(key: &LeafKey) -> VerifiedCsr {
    request(key, |p| {
        p.distinguished_name.push(rcgen::DnType::CommonName, "controller.mesh.internal");
        p.distinguished_name.push(rcgen::DnType::OrganizationName, "system:masters");
        p.subject_alt_names = vec![
            SanType::DnsName(ia5("controller.mesh.internal")),
            SanType::IpAddress("100.64.0.1".parse().unwrap()),
            SanType::URI(ia5("spiffe://mesh.internal/controller/c1")),
        ];
        p.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
    })
    .unwrap()
}

/// Whatever a CSR asks, the certificate is the profile's, field by field.
#[test]
fn a_certificate_is_its_profile_field_by_field() {
    let authority = Authority::new();
    let key = LeafKey::generate().unwrap();
    let csr = greedy_csr(&key);
    for profile in Profile::ALL.into_iter().filter(|profile| *profile != Profile::Controller) {
        let template = Authority::template(profile);
        let serial = SerialNumber::random(&mut rng);
        let issued = issue_leaf(&authority.issuing, &authority.store, &csr, &template, serial).unwrap();
        let (_, parsed) = x509_parser::parse_x509_certificate(&issued.der).unwrap();
        let leaf = authority.verify(&issued.der, Usage::Any).unwrap();
        let expected = VerifiedLeaf {
            profile,
            identity: template.identity.clone(),
            serial,
            issuer_key_id: authority.issuing.key_identifier().clone(),
            dns: template.dns.clone(),
            ips: template.ips.clone(),
            wireguard_keys: template.wireguard_keys.clone(),
            not_before: template.not_before,
            not_after: template.not_after,
            key_hash: key.key_hash(),
            no_rev_avail: false,
            chain_not_after: template.not_after,
        };
        assert_eq!(leaf, expected, "{profile}");
        let subject: Vec<_> =
            parsed.subject().iter_attributes().map(|a| a.as_str().unwrap().to_owned()).collect();
        let spiffe =
            template.identity.as_ref().map(|identity| identity.to_spiffe(authority.issuing.domain()));
        let name = template.dns.first().map(|name| name.as_str().to_owned()).or(spiffe);
        assert_eq!(subject, [name.unwrap()], "{profile}");
        let mut oids: Vec<_> = parsed.extensions().iter().map(|e| e.oid.to_id_string()).collect();
        oids.sort();
        let mut known = vec!["2.5.29.14", "2.5.29.15", "2.5.29.17", "2.5.29.19", "2.5.29.35", "2.5.29.37"];
        if profile == Profile::Node {
            known.insert(0, "1.3.6.1.4.1.32473.1.1");
        }
        assert_eq!(oids, known, "{profile}");
    }
}
