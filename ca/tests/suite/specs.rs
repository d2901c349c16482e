//! Profiles of an operator's own making.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use mesh_ca::*;

use crate::authority::*;

const DAY: Duration = Duration::from_secs(86_400);

fn spec(kind: ServiceKind) -> ProfileSpec {
    ProfileSpec {
        name: label("database"),
        kind,
        extra_usages: Vec::new(),
        keys: BTreeSet::from(KeyFamily::ALL),
        lifetime: DAY,
        lifetime_max: 7 * DAY,
        dns: vec![
            DnsRule::Exact(dns("db.mesh.internal")),
            DnsRule::Below(dns("shop.example")),
            DnsRule::OwnName,
            DnsRule::BelowOwnName,
        ],
        ips: IpRule::OwnAddresses,
        subject: SubjectForm::CommonName,
        revocation: RevocationForm::Pointers { crl: true, ocsp: true },
    }
}

fn accept(spec: ProfileSpec) -> Result<AcceptedProfile, SpecError> {
    spec.accept(&TrustDomain::parse("mesh.internal").unwrap(), NOW, &mut rng)
}

#[test]
fn a_sound_profile_is_accepted_and_issues_what_it_says() {
    let authority = Authority::new();
    let domain = authority.issuing.domain();
    let addresses: [IpAddr; 1] = ["100.64.0.9".parse().unwrap()];
    let (node, service) = (label("web-1"), label("db"));
    let points = PublishingPoints::new(HttpUrl::parse("http://pki.mesh.internal").unwrap(), 8).unwrap();
    for kind in [ServiceKind::Server, ServiceKind::Client, ServiceKind::Peer] {
        let profile = accept(spec(kind)).unwrap();
        let key = LeafKey::generate_for(KeyAlgorithm::Ed25519).unwrap();
        let request = SpecRequest {
            owner: NameOwner { domain, node: &node, addresses: &addresses },
            service: &service,
            dns: vec![dns("a.shop.example"), dns("web-1.mesh.internal"), dns("x.web-1.mesh.internal")],
            ips: addresses.to_vec(),
            lifetime: None,
            now: NOW,
            key: key.public_key(),
        };
        let rules: Vec<String> =
            profile.explain(&request).unwrap().into_iter().map(|grant| grant.rule).collect();
        let expected = [
            "names below shop.example",
            "the node's own name",
            "names below the node's own",
            "the node's own addresses",
        ];
        assert_eq!(rules, expected);
        let serial = SerialNumber::random(&mut rng);
        let shard = points.shard_of(&serial);
        let placement =
            Placement { issuer: authority.issuing.key_identifier(), points: Some(&points), shard };
        let template = profile.template(&request, placement).unwrap();
        let issued = issue_leaf(&authority.issuing, &authority.store, &key, &template, serial).unwrap();
        let leaf = authority.verify(&issued.der, Usage::Any).unwrap();

        // Field by field what the profile says.
        assert_eq!(leaf.profile, kind.profile());
        assert_eq!(leaf.dns, request.dns);
        assert_eq!(leaf.ips, request.ips);
        assert_eq!((leaf.not_before, leaf.not_after), (NOW - CLOCK_SKEW_ALLOWANCE, NOW + DAY));
        let identity = Identity::Service { node: node.clone(), name: service.clone() };
        assert_eq!(leaf.identity, (kind == ServiceKind::Peer).then_some(identity));
        assert!(leaf.wireguard_keys.is_empty());
        assert_eq!(issued.crl_shard, shard);
        assert_eq!(template.pointers, points.leaf(authority.issuing.key_identifier(), shard).unwrap());
    }
}

#[test]
fn what_no_rule_gives_is_refused() {
    let authority = Authority::new();
    let domain = authority.issuing.domain();
    let addresses: [IpAddr; 1] = ["100.64.0.9".parse().unwrap()];
    let (node, service) = (label("web-1"), label("db"));
    let mut narrow = spec(ServiceKind::Server);
    narrow.keys = BTreeSet::from([KeyFamily::EcdsaP256]);
    let profile = accept(narrow).unwrap();
    let (key, other) = (LeafKey::generate().unwrap(), LeafKey::generate_for(KeyAlgorithm::Ed25519).unwrap());
    let request = |name: &str| SpecRequest {
        owner: NameOwner { domain, node: &node, addresses: &addresses },
        service: &service,
        dns: vec![dns(name)],
        ips: Vec::new(),
        lifetime: None,
        now: NOW,
        key: key.public_key(),
    };
    let placement = Placement { issuer: authority.issuing.key_identifier(), points: None, shard: 0 };
    let ask = |request: SpecRequest<'_>| profile.template(&request, placement).map(drop);
    assert_eq!(ask(request("db.mesh.internal")), Ok(()));
    for name in [
        "shop.example",
        "evilshop.example",
        "a.shop.example.evil.example",
        "web-2.mesh.internal",
        "xweb-1.mesh.internal",
        "mesh.internal",
        "controller.mesh.internal",
    ] {
        let refusal = RequestRefusal::Name { profile: label("database"), name: dns(name) };
        assert_eq!(ask(request(name)), Err(refusal));
    }
    let ip = "100.64.0.10".parse().unwrap();
    let foreign = SpecRequest { ips: vec![ip], ..request("db.mesh.internal") };
    assert_eq!(ask(foreign), Err(RequestRefusal::Ip { profile: label("database"), ip }));
    let long = SpecRequest { lifetime: Some(8 * DAY), ..request("db.mesh.internal") };
    assert_eq!(ask(long), Err(RequestRefusal::Lifetime { profile: label("database"), max: 7 * DAY }));
    let foreign = SpecRequest { key: other.public_key(), ..request("db.mesh.internal") };
    let refusal = RequestRefusal::KeyType { profile: label("database"), key: KeyAlgorithm::Ed25519 };
    assert_eq!(ask(foreign), Err(refusal));
    let nameless = SpecRequest { dns: Vec::new(), ..request("db.mesh.internal") };
    let refusal = RequestRefusal::Template(TemplateError::NoHostName(Profile::Server));
    assert_eq!(ask(nameless), Err(refusal));
}

#[test]
fn an_unsound_profile_is_refused_by_its_fault() {
    type Change = fn(&mut ProfileSpec);
    let table: Vec<(Change, SpecError)> = vec![
        (|s| s.name = label("node"), SpecError::BuiltIn(label("node"))),
        (|s| s.name = label("controller"), SpecError::BuiltIn(label("controller"))),
        (|s| s.name = label("operator"), SpecError::BuiltIn(label("operator"))),
        (|s| s.keys.clear(), SpecError::NoKeys),
        (|s| s.lifetime = DAY / 1000, SpecError::Lifetime(DAY / 1000)),
        (|s| s.lifetime_max = 91 * DAY, SpecError::Lifetime(91 * DAY)),
        (|s| s.lifetime = 8 * DAY, SpecError::LifetimeOrder),
        (
            |s| (s.revocation, s.lifetime_max) = (RevocationForm::NoRevAvail, 11 * DAY),
            SpecError::NoRevAvailLifetime(11 * DAY),
        ),
        (|s| (s.dns, s.ips) = (Vec::new(), IpRule::None), SpecError::NoNames(ServiceKind::Peer)),
        (|s| s.dns = vec![DnsRule::OwnName; 257], SpecError::TooManyRules(257)),
        (|s| s.dns.push(DnsRule::Below(dns("example"))), SpecError::TopLevel(DnsRule::Below(dns("example")))),
        (
            |s| s.extra_usages = vec![ExtraUsage::CodeSigning],
            SpecError::Template(TemplateError::ExtraUsage(Profile::Peer)),
        ),
    ];
    for (change, fault) in table {
        let mut spec = spec(ServiceKind::Peer);
        spec.keys = BTreeSet::from([KeyFamily::EcdsaP256]);
        change(&mut spec);
        assert_eq!(accept(spec), Err(fault));
    }
    let mut client = spec(ServiceKind::Client);
    client.dns.clear();
    assert_eq!(accept(client), Err(SpecError::NoNames(ServiceKind::Client)));
}

/// Checklist 18: short-lived without pointers, and marked so; the CA above keeps its CRL.
#[test]
pub(crate) fn a_short_lived_profile_carries_no_rev_avail_and_no_pointers() {
    let authority = Authority::new();
    let mut short = spec(ServiceKind::Server);
    short.revocation = RevocationForm::NoRevAvail;
    short.extra_usages = vec![ExtraUsage::IpsecIke];
    short.subject = SubjectForm::Empty;
    let profile = accept(short).unwrap();
    let key = LeafKey::generate().unwrap();
    let (node, service) = (label("web-1"), label("db"));
    let points = PublishingPoints::new(HttpUrl::parse("http://pki.mesh.internal").unwrap(), 8).unwrap();
    let request = SpecRequest {
        owner: NameOwner { domain: authority.issuing.domain(), node: &node, addresses: &[] },
        service: &service,
        dns: vec![dns("db.mesh.internal")],
        ips: Vec::new(),
        lifetime: None,
        now: NOW,
        key: key.public_key(),
    };
    let placement = Placement { issuer: authority.issuing.key_identifier(), points: Some(&points), shard: 0 };
    let template = profile.template(&request, placement).unwrap();
    assert_eq!((&template.pointers.crl, &template.pointers.ocsp), (&None, &None));
    let leaf = authority.issue_for(key, &template).issued.der;
    let (_, parsed) = x509_parser::parse_x509_certificate(&leaf).unwrap();
    let find = |oid: &str| parsed.extensions().iter().find(|e| e.oid.to_id_string() == oid);
    assert!(find("2.5.29.56").is_some_and(|e| !e.critical && e.value == [5, 0]));
    assert!(find("2.5.29.31").is_none());
    assert_eq!(parsed.subject().iter().count(), 0);
    assert!(find("2.5.29.17").unwrap().critical);
    assert!(parsed.extended_key_usage().unwrap().unwrap().value.server_auth);
    assert!(authority.verify(&leaf, Usage::Server).is_ok());
}

/// Whatever a CSR asks for, the certificate says what the profile and the request say: field by field.
#[test]
fn a_csr_adds_nothing_to_a_custom_profile() {
    let authority = Authority::new();
    let points = PublishingPoints::new(HttpUrl::parse("http://pki.mesh.internal").unwrap(), 8).unwrap();
    let (node, service) = (label("web-1"), label("db"));
    let (serial, key) =
        (SerialNumber::random(&mut rng), LeafKey::generate_for(KeyAlgorithm::EcdsaP384).unwrap());
    let csr = crate::smuggling::greedy_csr(&key);
    let table = [
        (ServiceKind::Server, RevocationForm::Pointers { crl: true, ocsp: false }, SubjectForm::CommonName),
        (ServiceKind::Client, RevocationForm::Pointers { crl: false, ocsp: false }, SubjectForm::Empty),
        (ServiceKind::Peer, RevocationForm::NoRevAvail, SubjectForm::Empty),
    ];
    for (kind, revocation, subject) in table {
        let mut spec = spec(kind);
        (spec.revocation, spec.subject, spec.keys) =
            (revocation, subject, BTreeSet::from([KeyFamily::EcdsaP384]));
        let profile = accept(spec).unwrap();
        let request = SpecRequest {
            owner: NameOwner { domain: authority.issuing.domain(), node: &node, addresses: &[] },
            service: &service,
            dns: vec![dns("db.mesh.internal")],
            ips: Vec::new(),
            lifetime: Some(DAY / 2),
            now: NOW,
            key: csr.public_key(),
        };
        let placement =
            Placement { issuer: authority.issuing.key_identifier(), points: Some(&points), shard: 3 };
        let template = profile.template(&request, placement).unwrap();
        let issued = issue_leaf(&authority.issuing, &authority.store, &csr, &template, serial).unwrap();
        let leaf = authority.verify(&issued.der, Usage::Any).unwrap();
        let expected = VerifiedLeaf {
            profile: kind.profile(),
            identity: (kind == ServiceKind::Peer)
                .then(|| Identity::Service { node: node.clone(), name: service.clone() }),
            serial,
            issuer_key_id: authority.issuing.key_identifier().clone(),
            dns: vec![dns("db.mesh.internal")],
            ips: Vec::new(),
            wireguard_keys: Vec::new(),
            not_before: NOW - CLOCK_SKEW_ALLOWANCE,
            not_after: NOW + DAY / 2,
            key_hash: key.key_hash(),
            no_rev_avail: revocation == RevocationForm::NoRevAvail,
            chain_not_after: NOW + DAY / 2,
        };
        assert_eq!(leaf, expected, "{kind}");
        let (_, parsed) = x509_parser::parse_x509_certificate(&issued.der).unwrap();
        let names: Vec<_> = parsed.subject().iter_attributes().map(|a| a.as_str().unwrap()).collect();
        let wanted: &[&str] = if subject == SubjectForm::Empty { &[] } else { &["db.mesh.internal"] };
        assert_eq!(names, wanted, "{kind}");
        let mut oids: Vec<_> = parsed.extensions().iter().map(|e| e.oid.to_id_string()).collect();
        oids.sort();
        let mut known = vec!["1.3.6.1.5.5.7.1.1", "2.5.29.14", "2.5.29.15", "2.5.29.17", "2.5.29.19"];
        known.extend(
            (revocation == RevocationForm::Pointers { crl: true, ocsp: false }).then_some("2.5.29.31"),
        );
        known.extend(["2.5.29.35", "2.5.29.37"]);
        known.extend((revocation == RevocationForm::NoRevAvail).then_some("2.5.29.56"));
        assert_eq!(oids, known, "{kind}");
    }
}
