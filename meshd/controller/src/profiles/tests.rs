use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;

use mesh_ca::{
    CaNaming, Csr, Identity, Issuer, KeyId, LeafKey, MemoryKeyStore, SerialNumber, Usage, create_issuing_ca,
    create_root, issue_leaf,
};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use super::*;

const NOW: UtcDateTime = time::macros::utc_datetime!(2026-11-22 12:00:00);

struct Authority {
    store: MemoryKeyStore,
    root: Issuer,
    issuing: Issuer,
}

impl Authority {
    fn new() -> Self {
        let domain = TrustDomain::parse("mesh.internal").unwrap();
        let mut store = MemoryKeyStore::new();
        let naming = CaNaming { mesh: "test", now: NOW };
        let ids = ["root", "issuing"].map(|id| KeyId::parse(id).unwrap());
        for id in &ids {
            store.generate(id.clone()).unwrap();
        }
        let root = create_root(&store, &ids[0], naming, &mut random_fill).unwrap();
        let root = Issuer::new(&root.der, ids[0].clone(), domain.clone(), &store).unwrap();
        let issuing = create_issuing_ca(&root, &store, &ids[1], naming, &mut random_fill).unwrap();
        let issuing = Issuer::new(&issuing.der, ids[1].clone(), domain, &store).unwrap();
        Self { store, root, issuing }
    }
}

const NAMES: [&str; 6] = [
    "db.mesh.internal",
    "controller.mesh.internal",
    "mesh.internal",
    "a.example",
    "internal",
    "web-1.mesh.internal",
];

/// A value that fits, or one that should not.
fn any_value(good: &'static [&'static str]) -> impl Strategy<Value = String> {
    prop_oneof![
        14 => proptest::sample::select(good).prop_map(str::to_owned),
        1 => proptest::sample::select(vec![
            "\"controller\"", "\"node\"", "\"operator\"", "\"ca\"", "\"ocsp\"", "true", "[]", "\"0s\"", "\"1000d\"",
            "[\"server-auth\"]", "[\"ocsp-signing\"]", "[\"any\"]", "[\"cert-sign\"]",
            "[\"../controller/c1\"]", "[\"node/web-1\"]", "[\"1.3.6.1.5.5.7.3.9\"]",
        ]).prop_map(str::to_owned),
    ]
}

/// Text of one profile: each key there or not, with a value that fits or not.
fn any_profile() -> impl Strategy<Value = String> {
    let name = prop_oneof![
        12 => Just("database"),
        1 => proptest::sample::select(vec!["node", "controller", "operator", "ca", "peer", "ocsp"]),
    ];
    let seldom = || proptest::bool::weighted(0.08);
    let lines = (
        any_value(&["\"server\"", "\"client\"", "\"peer\""]),
        proptest::option::of(any_value(&["[\"ecdsa-p256\"]", "[\"ed25519\", \"ecdsa-p384\"]"])),
        proptest::option::of(any_value(&["\"5m\"", "\"1h\"", "\"72h\""])),
        proptest::option::of(any_value(&["\"72h\"", "\"9d\"", "\"90d\""])),
        any_value(&["[\"code-signing\"]", "[\"ipsec-ike\", \"document-signing\"]"]),
        proptest::option::of(any_value(&["\"empty\"", "\"common-name\""])),
        proptest::option::of(any_value(&["\"none\"", "\"short-lived\"", "[\"crl\"]", "[\"crl\", \"ocsp\"]"])),
        any_value(&["[\"*\"]", "[\"db\"]", "[\"controller\"]"]),
    );
    let names = || proptest::collection::btree_set(proptest::sample::select(NAMES.to_vec()), 0..3);
    let own = any_value(&["[\"name\"]", "[\"below\", \"addresses\"]", "[\"name\", \"below\"]"]);
    let rule = (names(), names(), proptest::option::of(own));
    (name, lines, rule, (seldom(), seldom(), seldom())).prop_map(|(name, lines, (exact, below, own), odd)| {
        // Kind peer has services and no other purposes; seldom it is written the other way round.
        let is_peer = lines.0 == "\"peer\"";
        let mut text = format!("[profile.{name}]\nkind = {}\n", lines.0);
        let optional = [
            ("keys", lines.1),
            ("lifetime", lines.2),
            ("lifetime_max", lines.3),
            ("usages", (is_peer == odd.0).then_some(lines.4)),
            ("subject", lines.5),
            ("revocation", lines.6),
            ("is_ca", odd.1.then(|| "true".to_owned())),
        ];
        for (key, value) in optional {
            text += &value.map_or_else(String::new, |value| format!("{key} = {value}\n"));
        }
        text += &format!("[[profile.{name}.names]]\nto = [\"tag:db\"]\n");
        let list = |names: &BTreeSet<&str>| format!("{:?}", names.iter().collect::<Vec<_>>());
        for (key, names) in [("exact", exact), ("below", below)] {
            text += &if names.is_empty() { String::new() } else { format!("{key} = {}\n", list(&names)) };
        }
        for (key, value) in [("own", own), ("services", (is_peer != odd.2).then_some(lines.7))] {
            text += &value.map_or_else(String::new, |value| format!("{key} = {value}\n"));
        }
        text
    })
}

/// Issues what an accepted profile gives for the asked names, as one that is not the policy's judge would.
fn issue(
    authority: &Authority,
    accepted: Arc<AcceptedProfile>,
    (service, dns): (&str, &str),
) -> Option<Vec<u8>> {
    let family = *accepted.spec().keys.first().unwrap();
    let algorithm =
        mesh_ca::KeyAlgorithm::GENERATED.into_iter().find(|known| KeyFamily::of(*known) == family);
    let key = LeafKey::generate_for(algorithm.unwrap()).unwrap();
    let csr = Csr::parse(&Csr::create(&key).unwrap()).unwrap().verify().unwrap();
    let label = |text: &str| Label::parse(text).unwrap();
    let profile = accepted.spec().kind.profile();
    let request = LeafRequest {
        profile,
        identity: None,
        owner: mesh_core::Owner::Detached { operator: None },
        names: vec![mesh_core::DnsName::try_from(dns).unwrap()],
        ips: Vec::new(),
        // Whatever stands in a request, no service carries it.
        wireguard: vec![[7; 32]],
        pair_name: dns.to_owned(),
        lifetime: accepted.spec().lifetime,
        custom: None,
    };
    let custom = Custom { accepted, node: label("web-1"), service: label(service), addresses: Vec::new() };
    let place = Place { shard: 1, base_url: Some("http://pki.mesh.internal".to_owned()) };
    let at = (authority.issuing.key_identifier(), &place);
    let domain = authority.issuing.domain();
    let template = template(&custom, &request, csr.public_key(), at, NOW, domain).ok()?;
    let serial = SerialNumber::random(&mut random_fill);
    Some(issue_leaf(&authority.issuing, &authority.store, &csr, &template, serial).unwrap().der)
}

/// Every name that might be asked for.
fn names() -> impl Iterator<Item = String> {
    NAMES.into_iter().flat_map(|name| [name.to_owned(), format!("x.{name}")])
}

/// No text of a policy makes a profile under which a certificate passes for a node's, the controller's, an operator's, an OCSP
/// responder's or a CA's.
#[test]
fn no_profile_makes_an_identity_or_a_ca() {
    let (issued, kinds) = (Cell::new(0), RefCell::new(BTreeSet::new()));
    let authority = Authority::new();
    let domain = authority.issuing.domain();
    let asked = (any_profile(), "[a-z]{1,9}|controller|node");
    let judge = |text: &str, service: &str| {
        let Ok(policy) = Policy::parse(text) else { return Ok(()) };
        let profiles = Profiles::default();
        for (name, profile) in &policy.profile {
            let Ok(accepted) = profiles.accept(name, profile, domain, NOW) else { continue };
            for name in names() {
                let Some(der) = issue(&authority, Arc::clone(&accepted), (service, &name)) else { continue };
                issued.set(issued.get() + 1);
                kinds.borrow_mut().insert(profile.kind);
                is_a_plain_service(&authority, &der, profile.kind, service)?;
            }
        }
        Ok(())
    };
    let mut runner = TestRunner::new(ProptestConfig { cases: 128, ..ProptestConfig::default() });
    runner.run(&asked, |(text, service)| judge(&text, &service)).unwrap();
    // Else the property would hold for want of certificates.
    assert!(issued.get() > 20 && kinds.borrow().len() == 3, "{} {:?}", issued.get(), kinds.borrow());
}

fn is_a_plain_service(
    authority: &Authority,
    der: &[u8],
    kind: ServiceKind,
    service: &str,
) -> Result<(), TestCaseError> {
    let domain = authority.issuing.domain().clone();
    let anchors = mesh_ca::TrustAnchors::new(domain, [authority.root.certificate_der()]).unwrap();
    let chain = [authority.issuing.certificate_der().to_vec().into()];
    let leaf = mesh_ca::verify_chain(der, &chain, &anchors, NOW, Usage::Any, None).unwrap();
    prop_assert_eq!(leaf.profile, built_in(kind));
    let label = |text: &str| Label::parse(text).unwrap();
    let identity = Identity::Service { node: label("web-1"), name: label(service) };
    prop_assert_eq!(leaf.identity, (kind == ServiceKind::Peer).then_some(identity));
    prop_assert!(leaf.wireguard_keys.is_empty());
    let (_, parsed) = x509_parser::parse_x509_certificate(der).unwrap();
    prop_assert!(!parsed.is_ca());
    let usage = parsed.key_usage().unwrap().unwrap().value;
    prop_assert!(usage.digital_signature() && !usage.key_cert_sign() && !usage.crl_sign());
    let purposes = parsed.extended_key_usage().unwrap().unwrap().value;
    prop_assert!(!purposes.any && !purposes.ocsp_signing && !purposes.time_stamping);
    Ok(())
}

#[test]
fn a_profile_that_breaks_a_rule_is_told_with_its_name() {
    let policy = |body: &str| {
        let text = format!(
            "[profile.p]\n{body}\n[[profile.p.names]]\nto = [\"tag:a\"]\nexact = [\"a.mesh.internal\"]"
        );
        Policy::parse(&text).unwrap()
    };
    let profiles = Profiles::default();
    let domain = TrustDomain::parse("mesh.internal").unwrap();
    let table = [
        ("kind = \"server\"\nlifetime = \"1m\"", "outside 300 s to 90 days"),
        ("kind = \"server\"\nlifetime_max = \"91d\"", "outside 300 s to 90 days"),
        ("kind = \"server\"\nlifetime = \"2h\"\nlifetime_max = \"1h\"", "longer than the longest"),
        ("kind = \"server\"\nrevocation = \"short-lived\"\nlifetime_max = \"11d\"", "10 days at most"),
    ];
    for (body, wanted) in table {
        let problems = profiles.problems(&policy(body), &domain, NOW);
        assert!(problems.len() == 1 && problems[0].starts_with("profile.p: "), "{problems:?}");
        assert!(problems[0].contains(wanted), "{problems:?} / {wanted}");
    }
    let sound = policy("kind = \"server\"\nrevocation = \"short-lived\"");
    assert_eq!(profiles.problems(&sound, &domain, NOW), Vec::<String>::new());
    let (name, profile) = sound.profile.first_key_value().unwrap();
    let (first, again) =
        (profiles.accept(name, profile, &domain, NOW), profiles.accept(name, profile, &domain, NOW));
    assert!(Arc::ptr_eq(&first.unwrap(), &again.unwrap()), "what was linted once is remembered");
}
