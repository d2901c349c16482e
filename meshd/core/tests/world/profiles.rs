//! Custom profiles: what their rules give, to whom, and that a certificate is made from the policy in force.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use mesh_core::profile::{KeyType, Profile, Rule};
use mesh_core::world::{About, Asker, Verdict, Wish};
use mesh_core::{
    Actor, CertificateRecord, Command, DnsName, Made, NodeName, Owner, Policy, Refusal, Role, Serial, Tag,
};
use proptest::collection::{btree_set, vec};
use proptest::prelude::*;

use crate::fixture::*;

const POLICY: &str = r#"
[[grant]]
names = ["api.mesh.internal"]
to = ["tag:db"]

[profile.database]
kind = "peer"
keys = ["ecdsa-p256", "ed25519"]
lifetime = "24h"
lifetime_max = "7d"

[[profile.database.names]]
to = ["tag:db"]
exact = ["db.mesh.internal"]
below = ["shop.mesh.internal"]
services = ["db"]

[[profile.database.names]]
to = ["*"]
own = ["name", "addresses"]
"#;

fn made(mesh: &Fixture, profile: &str, key: KeyType) -> Option<Box<Made>> {
    let (_, profile) = mesh.world.profile(profile)?;
    Some(Box::new(Made { profile: profile.clone(), key }))
}

fn certificate(mesh: &mut Fixture, node: &Enrolled, profile: &str, names: &[&str]) -> CertificateRecord {
    let mut certificate = mesh.service(node, names);
    certificate.profile = profile.to_owned();
    certificate.not_after = mesh.now + DAY;
    certificate
}

fn command(mesh: &Fixture, certificate: &CertificateRecord) -> Command {
    let made = made(mesh, &certificate.profile, KeyType::EcdsaP256);
    Command::IssueCertificate { certificate: certificate.clone(), restart: false, made }
}

#[test]
fn a_profile_gives_what_its_rules_say_and_nothing_else() {
    let mut mesh = Fixture::with_policy(POLICY);
    let (alpha, bravo) = (mesh.enroll("alpha", &["db"]), mesh.enroll("bravo", &[]));
    for name in ["db.mesh.internal", "a.shop.mesh.internal", "x.y.shop.mesh.internal", "alpha.mesh.internal"]
    {
        let certificate = certificate(&mut mesh, &alpha, "database", &["db.mesh.internal", name]);
        mesh.ok(alpha.actor(), command(&mesh, &certificate));
    }
    let table = [
        ("shop.mesh.internal", "profile"),
        ("evilshop.mesh.internal", "profile"),
        ("x.alpha.mesh.internal", "profile"),
        ("api.mesh.internal", "profile"),
        ("bravo.mesh.internal", "taken"),
        ("controller.mesh.internal", "reserved"),
        ("mesh.internal", "reserved"),
        ("db.example.com", "outside"),
    ];
    for (name, verdict) in table {
        let certificate = certificate(&mut mesh, &alpha, "database", &["db.mesh.internal", name]);
        let refusal = mesh.refused(alpha.actor(), command(&mesh, &certificate));
        let fits = match &refusal {
            Refusal::NameOutsideProfile { .. } => verdict == "profile",
            Refusal::NameTaken { .. } => verdict == "taken",
            Refusal::NameReserved { .. } => verdict == "reserved",
            Refusal::NameOutsideDomain { .. } => verdict == "outside",
            _ => false,
        };
        assert!(fits, "{name}: {refusal}");
    }
    // The name of a profile is nobody's under the built-in ones.
    let plain = mesh.service(&alpha, &["db.mesh.internal"]);
    assert!(matches!(mesh.refused(alpha.actor(), issue(&plain)), Refusal::NameNotGranted { .. }));
    // The other node has no rule for the name, and none for the SPIFFE ID.
    let theirs = certificate(&mut mesh, &bravo, "database", &["bravo.mesh.internal"]);
    let refusal = mesh.refused(bravo.actor(), command(&mesh, &theirs));
    assert!(matches!(refusal, Refusal::ServiceOutsideProfile { .. }), "{refusal}");
}

#[test]
fn key_lifetime_service_and_address_are_the_profiles_to_give() {
    let mut mesh = Fixture::with_policy(POLICY);
    let alpha = mesh.enroll("alpha", &["db"]);
    let good = certificate(&mut mesh, &alpha, "database", &["db.mesh.internal"]);
    let rsa = Command::IssueCertificate {
        certificate: good.clone(),
        restart: false,
        made: made(&mesh, "database", KeyType::Rsa),
    };
    let refusal = mesh.refused(alpha.actor(), rsa);
    assert!(matches!(refusal, Refusal::KeyOutsideProfile { key: KeyType::Rsa, .. }), "{refusal}");
    let mut long = good.clone();
    long.not_after = mesh.now + 8 * DAY;
    let refusal = mesh.refused(alpha.actor(), command(&mesh, &long));
    assert!(matches!(refusal, Refusal::LifetimeOutsideProfile { .. }), "{refusal}");
    let mut address = certificate(&mut mesh, &alpha, "database", &["db.mesh.internal"]);
    address.ips = vec![mesh.world.node(alpha.id).unwrap().ipv4.unwrap().into()];
    mesh.ok(alpha.actor(), command(&mesh, &address));
    let ip: IpAddr = "100.64.0.200".parse().unwrap();
    let mut foreign = certificate(&mut mesh, &alpha, "database", &["db.mesh.internal"]);
    foreign.ips = vec![ip];
    assert_eq!(mesh.refused(alpha.actor(), command(&mesh, &foreign)), Refusal::AddressNotOwned { ip });
    // The pair's first label is the service in the SPIFFE ID.
    let other = certificate(&mut mesh, &alpha, "database", &["alpha.mesh.internal"]);
    let refusal = mesh.refused(alpha.actor(), command(&mesh, &other));
    assert!(matches!(refusal, Refusal::ServiceOutsideProfile { .. }), "{refusal}");
}

#[test]
fn a_certificate_counts_only_under_the_policy_it_was_made_from() {
    let mut mesh = Fixture::with_policy(POLICY);
    let alpha = mesh.enroll("alpha", &["db"]);
    let first = certificate(&mut mesh, &alpha, "database", &["db.mesh.internal"]);
    let late = command(&mesh, &first);
    let toml = POLICY.replace("\"7d\"", "\"6d\"");
    mesh.ok(Actor::LocalRoot, Command::ApplyPolicy { toml });
    let refusal = mesh.refused(alpha.actor(), late.clone());
    assert_eq!(refusal, Refusal::ProfileChanged { profile: "database".to_owned() });
    mesh.ok(Actor::LocalRoot, Command::ApplyPolicy { toml: String::new() });
    for command in [late, Command::IssueCertificate { certificate: first, restart: false, made: None }] {
        let refusal = mesh.refused(alpha.actor(), command);
        assert_eq!(refusal, Refusal::ProfileUnknown { profile: "database".to_owned() });
    }
}

#[test]
fn a_custom_profile_is_for_nodes() {
    let mut mesh = Fixture::with_policy(POLICY);
    let alpha = mesh.enroll("alpha", &["db"]);
    let alice = mesh.operator("alice", Role::Operator);
    let mut detached = certificate(&mut mesh, &alpha, "database", &["db.mesh.internal"]);
    detached.owner = Owner::Detached { operator: Some("alice".try_into().unwrap()) };
    detached.serial = Serial(mesh.bytes());
    let refusal = mesh.refused(alice, command(&mesh, &detached));
    assert!(matches!(refusal, Refusal::ProfileNotGiven { .. }), "{refusal}");
}

#[test]
fn a_policy_change_shows_which_certificates_could_not_be_renewed() {
    let mut mesh = Fixture::with_policy(POLICY);
    let alpha = mesh.enroll("alpha", &["db"]);
    let first = certificate(&mut mesh, &alpha, "database", &["db.mesh.internal"]);
    mesh.ok(alpha.actor(), command(&mesh, &first));
    let plain = mesh.issue(&alpha, &["api.mesh.internal"]);
    let refused =
        |mesh: &Fixture, serial: &Serial| mesh.world.renewal_refused(mesh.world.certificate(serial).unwrap());
    assert_eq!((refused(&mesh, &first.serial), refused(&mesh, &plain.serial)), (None, None));
    let toml = POLICY.replace("db.mesh.internal", "db2.mesh.internal").replace("api.", "app.");
    mesh.ok(Actor::LocalRoot, Command::ApplyPolicy { toml });
    let refusal = refused(&mesh, &first.serial);
    assert!(matches!(refusal, Some(Refusal::NameOutsideProfile { .. })), "{refusal:?}");
    assert!(matches!(refused(&mesh, &plain.serial), Some(Refusal::NameNotGranted { .. })));
    let toml = POLICY.replace("tag:db", "tag:none");
    mesh.ok(Actor::LocalRoot, Command::ApplyPolicy { toml });
    assert!(refused(&mesh, &first.serial).is_some());
    mesh.ok(Actor::LocalRoot, Command::ApplyPolicy { toml: POLICY.to_owned() });
    assert_eq!(refused(&mesh, &first.serial), None);
}

#[test]
fn every_part_of_a_wish_gets_its_rule_or_its_refusal() {
    let mut mesh = Fixture::with_policy(POLICY);
    let alpha = mesh.enroll("alpha", &["db"]);
    let names: Vec<DnsName> =
        ["db.mesh.internal", "a.shop.mesh.internal", "alpha.mesh.internal", "x.mesh.internal"]
            .map(|name| name.try_into().unwrap())
            .into();
    let wish = Wish {
        profile: "database",
        names: &names,
        ips: &[],
        pair_name: "db.mesh.internal",
        lifetime: Some(Duration::from_secs(60)),
        key: Some(KeyType::Ed25519),
    };
    let verdicts = mesh.world.judge_wish(Asker::Node(alpha.id), &wish);
    let rules: Vec<String> = verdicts
        .iter()
        .map(|Verdict { outcome, .. }| match outcome {
            Ok(rule) => rule.to_string(),
            Err(refusal) => refusal.to_string(),
        })
        .collect();
    let expected = [
        "profile.database",
        "profile.database",
        "profile.database",
        "profile.database.names[0].services",
        "profile.database.names[0].exact",
        "profile.database.names[0].below shop.mesh.internal",
        "profile.database.names[1].own name",
        "no rule of profile database gives x.mesh.internal to node alpha",
    ];
    assert_eq!(rules, expected);
    assert_eq!(verdicts[4].about, About::Name(names[0].clone()));
    let built_in = Wish { profile: "server", names: &names[2..3], ..wish };
    let verdicts = mesh.world.judge_wish(Asker::Node(alpha.id), &built_in);
    assert_eq!(verdicts.last().unwrap().outcome, Ok(Rule::OwnName));
    let unknown = mesh.world.judge_wish(Asker::Node(alpha.id), &Wish { profile: "nobody", ..wish });
    let [Verdict { outcome: Err(Refusal::ProfileUnknown { .. }), .. }] = &unknown[..] else {
        panic!("{unknown:?}")
    };
}

#[test]
fn a_name_of_a_profile_has_one_owner_whichever_comes_first() {
    let mut mesh = Fixture::with_policy(POLICY);
    mesh.enroll("alpha", &["db"]);
    for (name, why) in [
        ("alpha.mesh.internal", "belongs to node alpha"),
        ("x.alpha.mesh.internal", "belongs to node alpha"),
        ("ocsp.mesh.internal", "is reserved"),
        ("mesh.internal", "is the domain itself"),
        ("example.com", "is outside mesh.internal"),
    ] {
        for key in ["exact", "below"] {
            let toml = format!(
                "[profile.p]\nkind = \"server\"\n[[profile.p.names]]\nto = [\"tag:db\"]\n{key} = [\"{name}\"]"
            );
            let problems = vec![format!("profile.p.names[0]: {name} {why}")];
            let refusal = mesh.refused(Actor::LocalRoot, Command::ApplyPolicy { toml });
            assert_eq!(refusal, Refusal::PolicyInvalid { problems });
        }
    }
    for name in ["db", "shop"] {
        let token = mesh.token(None, &[], 1, false);
        let command = mesh.enrollment(token, name);
        assert!(matches!(mesh.refused(anonymous(token), command), Refusal::NameTaken { .. }), "{name}");
    }
}

#[test]
fn what_a_profile_may_not_say_is_refused_with_its_place() {
    let text = r#"
        [profile.node]
        kind = "server"
        [[profile.node.names]]
        to = ["*"]
        own = ["name"]
        [profile.Upper]
        kind = "server"
        [[profile.Upper.names]]
        to = ["*"]
        own = ["name"]
        [profile.a]
        kind = "ca"
        keys = ["dsa"]
        lifetime = "1 day"
        usages = ["server-auth"]
        subject = "cn=root"
        revocation = "never"
        is_ca = true
        [profile.b]
        names = []
        [profile.c]
        kind = "server"
        keys = []
        [[profile.c.names]]
        to = ["*"]
        exact = ["db.mesh.internal"]
        own = ["everything"]
        services = ["db"]
        spiffe = "spiffe://mesh.internal/node/a"
        [profile.d]
        kind = "peer"
        [[profile.d.names]]
        to = ["tag:x"]
        services = ["../node/a"]
    "#;
    let problems = Policy::parse(text).unwrap_err();
    let wanted = [
        "profile.Upper: write the name in lower case",
        "profile.a: unknown key \"is_ca\"",
        "profile.a.kind: \"ca\" is no kind",
        "profile.a.lifetime: write a duration",
        "profile.a.keys[0]: \"dsa\" is no key type",
        "profile.a.usages[0]: \"server-auth\" is no usage",
        "profile.a.subject: \"cn=root\" is no subject",
        "profile.a.revocation: write",
        "profile.a: [[profile.a.names]] is missing",
        "profile.b: \"kind\" is missing",
        "profile.b: [[profile.b.names]] is missing",
        "profile.c: \"keys\" is missing or empty",
        "profile.c.names[0]: unknown key \"spiffe\"",
        "profile.c.names[0].own[0]: \"everything\"",
        "profile.c.names[0].to: a name is given",
        "profile.c.names[0].services: only kind",
        "profile.d.names[0].services[0]:",
        "profile.d: kind \"peer\" needs",
        "profile.node: node is reserved",
    ];
    for (index, wanted) in wanted.iter().enumerate() {
        let problem = problems.get(index).map_or("", String::as_str);
        assert!(problem.starts_with(wanted), "{problem} / {wanted}");
    }
    assert_eq!(problems.len(), wanted.len(), "{problems:#?}");
    for built_in in mesh_core::names::PROFILES_BUILT_IN {
        let text = format!("[profile.{built_in}]\nkind = \"peer\"");
        assert!(Policy::parse(&text).unwrap_err()[0].contains("is reserved"), "{built_in}");
    }
}

/// `to`, `exact`, `below`, and whether the node's own name is given; tags and names by number.
type WrittenRule = (BTreeSet<u8>, BTreeSet<u8>, BTreeSet<u8>, bool);

/// A profile in the order in which its words stand in the file.
#[derive(Clone, Debug)]
struct Written {
    rules: Vec<WrittenRule>,
}

fn any_written() -> impl Strategy<Value = Written> {
    let rule = (btree_set(0_u8..3, 1..3), btree_set(0_u8..4, 0..3), btree_set(0_u8..4, 0..3), any::<bool>());
    vec(rule, 1..4).prop_map(|rules| Written { rules })
}

fn name(number: u8) -> String {
    ["a.mesh.internal", "b.a.mesh.internal", "b.mesh.internal", "c.b.a.mesh.internal"][usize::from(number)]
        .to_owned()
}

fn to_toml(written: &Written) -> String {
    let list = |items: Vec<String>| format!("[\"{}\"]", items.join("\", \""));
    let mut text = "[profile.p]\nkind = \"server\"\n".to_owned();
    for (to, exact, below, own) in &written.rules {
        text += "[[profile.p.names]]\n";
        text += &format!("to = {}\n", list(to.iter().map(|n| format!("tag:t{n}")).collect()));
        for (key, names) in [("exact", exact), ("below", below)] {
            if !names.is_empty() {
                text += &format!("{key} = {}\n", list(names.iter().map(|n| name(*n)).collect()));
            }
        }
        if *own {
            text += "own = [\"name\"]\n";
        }
    }
    text
}

proptest! {
    /// The parsed rules give exactly what their words give, to nodes with any tags.
    #[test]
    fn the_rules_say_what_their_words_say(written in any_written(), tags in btree_set(0_u8..3, 0..3), asked in 0_u8..4) {
        let policy = Policy::parse(&to_toml(&written)).unwrap();
        let profile: &Profile = policy.profile.values().next().unwrap();
        let node_name = NodeName::try_from("a").unwrap();
        let node_tags: BTreeSet<Tag> = tags.iter().map(|n| Tag::try_from(format!("t{n}")).unwrap()).collect();
        let node = mesh_core::policy::Subject { name: &node_name, tags: &node_tags };
        let own = DnsName::try_from("a.mesh.internal").unwrap();
        let asked = name(asked);
        let mut naive = false;
        for (to, exact, below, has_own) in &written.rules {
            let mine = to.iter().any(|tag| tags.contains(tag));
            let exactly = exact.iter().any(|n| name(*n) == asked);
            let beneath = below.iter().any(|n| asked.ends_with(&format!(".{}", name(*n))));
            naive |= mine && (exactly || beneath || (*has_own && asked == own.as_str()));
        }
        let given = profile.gives_name(node, Some(&own), &DnsName::try_from(asked.as_str()).unwrap());
        prop_assert_eq!(given.is_some(), naive);
    }

    /// No text of profiles makes the parser panic or answer with several lines in one.
    #[test]
    fn the_parser_survives_any_profile(
        text in "(\\[profile\\.[a-zA-Z_-]{0,9}\\]\n|\\[\\[profile\\.[a-z]{1,2}\\.names\\]\\]\n|(kind|keys|lifetime|revocation|to|exact|own|services|\\PC{0,5}) = (\\[(\"\\PC{0,9}\",?)*\\]|\"[a-z0-9-]{0,9}\"|7)\n){0,12}",
    ) {
        if let Err(problems) = Policy::parse(&text) {
            prop_assert!(!problems.is_empty());
            prop_assert!(problems.iter().all(|problem| !problem.contains('\n')));
        }
    }
}
