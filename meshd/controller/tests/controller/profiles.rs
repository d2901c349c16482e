//! Custom profiles of the policy: from the file to the certificate, field by field.

use mesh_ca::{Csr, Identity as Spiffe, KeyAlgorithm, Label, LeafKey, Profile, Usage, verify_chain};
use mesh_proto::v1::certificates_client::CertificatesClient;
use mesh_proto::v1::policy_client::PolicyClient;
use mesh_proto::v1::{self as pb, ErrorCode};
use rustls_pki_types::CertificateDer;
use tonic::transport::Channel;

use crate::harness::*;

const POLICY: &str = r#"
[profile.database]
kind = "peer"
keys = ["ecdsa-p256", "ed25519"]
lifetime = "2h"
lifetime_max = "24h"
subject = "empty"

[[profile.database.names]]
to = ["node:alpha"]
exact = ["db.mesh.internal"]
own = ["addresses"]
services = ["db"]

[profile.job]
kind = "client"
usages = ["document-signing"]
lifetime = "1h"
revocation = "short-lived"

[[profile.job.names]]
to = ["*"]
own = ["below"]
"#;

async fn apply(running: &Running, toml: &str) -> Result<(), tonic::Status> {
    let document = pb::PolicyDocument { toml: toml.into(), version: 0, operation_id: operation().into() };
    PolicyClient::new(running.local().await).apply(document).await.map(drop)
}

fn request(key: &LeafKey, names: &[&str], profile: &str) -> pb::IssueRequest {
    issue_request(key, names, profile)
}

async fn issue(channel: &Channel, request: pb::IssueRequest) -> Result<pb::IssueResponse, ErrorCode> {
    let answer = CertificatesClient::new(channel.clone()).issue(request).await;
    answer.map(tonic::Response::into_inner).map_err(|status| code(&status))
}

async fn explain(channel: &Channel, request: pb::ExplainRequest) -> pb::ExplainResponse {
    CertificatesClient::new(channel.clone()).explain(request).await.unwrap().into_inner()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_custom_profile_is_issued_renewed_explained_and_taken_back() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    let alpha = running.enroll("alpha").await;
    let bravo = running.enroll("bravo").await;
    let (channel, other) = (running.member(&alpha.identity).await, running.member(&bravo.identity).await);
    let key = LeafKey::generate_for(KeyAlgorithm::Ed25519).unwrap();
    let asked = || request(&key, &["db.mesh.internal"], "database");
    assert_eq!(issue(&channel, asked()).await.unwrap_err(), ErrorCode::ProfileUnknown);
    apply(&running, POLICY).await.unwrap();

    // Field by field what profile and request say; nothing of the CSR but its key.
    let first = issue(&channel, asked()).await.unwrap();
    let chain = [CertificateDer::from(first.issuers[0].to_vec())];
    let now = mesh.clock.utc_now();
    let leaf = verify_chain(&first.leaf, &chain, &running.anchors(), now, Usage::Any, None).unwrap();
    let names: Vec<String> = leaf.dns.iter().map(ToString::to_string).collect();
    assert_eq!((leaf.profile, names), (Profile::Peer, vec!["db.mesh.internal".to_owned()]));
    let label = |text: &str| Label::parse(text).unwrap();
    assert_eq!(leaf.identity, Some(Spiffe::Service { node: label("alpha"), name: label("db") }));
    assert!(leaf.ips.is_empty() && leaf.wireguard_keys.is_empty() && !leaf.no_rev_avail);
    assert_eq!(leaf.key_hash, key.key_hash());
    let life = leaf.not_after - leaf.not_before - mesh_ca::CLOCK_SKEW_ALLOWANCE;
    assert_eq!(life, time::Duration::hours(2));
    let shown = first.certificate.unwrap();
    assert_eq!((&*shown.profile, &*shown.spiffe), ("database", "spiffe://mesh.internal/service/alpha/db"));
    let (_, parsed) = x509_parser::parse_x509_certificate(&first.leaf).unwrap();
    assert_eq!(parsed.subject().iter().count(), 0);

    // The same key again: a renewal.
    assert!(issue(&channel, asked()).await.is_ok());

    // What no rule gives.
    let p384 = LeafKey::generate_for(KeyAlgorithm::EcdsaP384).unwrap();
    let long = pb::IssueRequest { ttl_secs: 2 * 86_400, ..asked() };
    for (channel, request, wanted) in [
        (&other, request(&p384, &["db.mesh.internal"], "database"), ErrorCode::ProfileNotGiven),
        (&channel, request(&p384, &["db.mesh.internal"], "database"), ErrorCode::KeyOutsideProfile),
        (&channel, long, ErrorCode::LifetimeOutsideProfile),
        (
            &channel,
            request(&key, &["db.mesh.internal", "x.mesh.internal"], "database"),
            ErrorCode::NameOutsideProfile,
        ),
        (
            &channel,
            request(&key, &["db.mesh.internal", "bravo.mesh.internal"], "database"),
            ErrorCode::NameTaken,
        ),
        (&channel, request(&key, &["alpha.mesh.internal"], "database"), ErrorCode::ServiceOutsideProfile),
        (&channel, request(&key, &["db.mesh.internal"], "server"), ErrorCode::NameNotGranted),
        (&channel, request(&key, &["db.mesh.internal"], "node"), ErrorCode::Usage),
        (&channel, request(&key, &["db.mesh.internal"], "controller"), ErrorCode::Usage),
    ] {
        let names = request.names.clone();
        let profile = request.profile.clone();
        let found = issue(channel, request).await.unwrap_err();
        assert_eq!(found, wanted, "{profile} {names:?}");
    }
    let local = running.local().await;
    let detached = issue(&local, request(&p384, &["db.mesh.internal"], "database")).await.unwrap_err();
    assert_eq!(detached, ErrorCode::ProfileNotGiven, "custom profiles are for nodes");

    // The dry run says the same, part by part, and issues nothing.
    let ask = |node: &str, names: &[&str]| pb::ExplainRequest {
        names: names.iter().map(ToString::to_string).collect(),
        profile: "database".into(),
        ttl_secs: 0,
        key_type: "ed25519".into(),
        node: node.into(),
    };
    let before = audit_len(&running).await;
    let good = explain(&channel, ask("", &["db.mesh.internal"])).await;
    assert!(good.allowed, "{good:?}");
    assert_eq!(good.verdicts.last().unwrap().rule, "profile.database.names[0].exact");
    let mixed =
        explain(&local, ask("alpha", &["db.mesh.internal", "x.mesh.internal", "*.mesh.internal"])).await;
    let codes: Vec<ErrorCode> =
        mixed.verdicts.iter().filter(|verdict| !verdict.allowed).map(|verdict| verdict.code()).collect();
    assert_eq!(codes, [ErrorCode::NameOutsideProfile, ErrorCode::NameWildcard]);
    let theirs = explain(&local, ask("bravo", &["db.mesh.internal"])).await;
    assert_eq!(theirs.verdicts[0].code(), ErrorCode::ProfileNotGiven);
    let posing = CertificatesClient::new(other.clone()).explain(ask("alpha", &["db.mesh.internal"])).await;
    assert_eq!(code(&posing.unwrap_err()), ErrorCode::Denied);
    let nobody = CertificatesClient::new(local.clone()).explain(ask("nobody", &["db.mesh.internal"])).await;
    assert_eq!(code(&nobody.unwrap_err()), ErrorCode::NodeNotFound);
    // It refuses what no template can say, as issuing does.
    let built_in =
        |profile: &str, names: &[&str]| pb::ExplainRequest { profile: profile.into(), ..ask("", names) };
    for (channel, profile, names) in [
        (&local, "peer", &["printer.mesh.internal"][..]),
        (&channel, "client", &[alpha.enrolled.ipv4.as_str()]),
        (&channel, "server", &["alpha.mesh.internal", "alpha.mesh.internal"]),
    ] {
        let answer = explain(channel, built_in(profile, names)).await;
        let refused = answer.verdicts.iter().find(|verdict| !verdict.allowed).unwrap();
        assert_eq!(refused.code(), ErrorCode::CertificateInvalid, "{profile} {names:?}");
        let fresh = LeafKey::generate().unwrap();
        let issued = issue(channel, request(&fresh, names, profile)).await.unwrap_err();
        assert_eq!(issued, ErrorCode::CertificateInvalid, "{profile} {names:?}");
    }
    assert_eq!(audit_len(&running).await, before, "a dry run leaves no record");

    // A policy that no longer gives it: shown with the certificate, and refused at its renewal.
    apply(&running, &POLICY.replace("exact = [\"db.", "exact = [\"db2.")).await.unwrap();
    assert_eq!(issue(&channel, asked()).await.unwrap_err(), ErrorCode::NameOutsideProfile);
    let list = pb::ListCertificatesRequest { name: "db.mesh.internal".into(), ..Default::default() };
    let listed = CertificatesClient::new(local.clone()).list(list).await.unwrap().into_inner().certificates;
    assert_eq!(listed.len(), 2);
    assert!(listed.iter().all(|certificate| certificate.refused_code == "E0572"), "{listed:?}");
    apply(&running, "").await.unwrap();
    assert_eq!(issue(&channel, asked()).await.unwrap_err(), ErrorCode::ProfileUnknown);
    running.stop().await.unwrap();
}

async fn audit_len(running: &Running) -> u64 {
    let answer = pb::audit_client::AuditClient::new(running.local().await).verify(pb::Empty {}).await;
    answer.unwrap().into_inner().last_seq
}

#[tokio::test(flavor = "multi_thread")]
async fn a_short_lived_profile_says_that_nobody_tells_of_its_revocation() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    apply(&running, POLICY).await.unwrap();
    let alpha = running.enroll("alpha").await;
    let channel = running.member(&alpha.identity).await;
    let key = LeafKey::generate().unwrap();
    // A CSR that asks for more is refused as a whole.
    let mut greedy = rcgen::CertificateParams::new(vec!["controller.mesh.internal".into()]).unwrap();
    greedy.distinguished_name = rcgen::DistinguishedName::new();
    let csr = greedy.serialize_request(&key).unwrap().der().to_vec();
    assert!(Csr::parse(&csr).is_ok());
    let asked = request(&key, &["job.alpha.mesh.internal"], "job");
    let smuggled = pb::IssueRequest { csr: csr.into(), ..asked.clone() };
    assert_eq!(issue(&channel, smuggled).await.unwrap_err(), ErrorCode::CsrForeignName);
    let issued = issue(&channel, asked).await.unwrap();
    let chain = [CertificateDer::from(issued.issuers[0].to_vec())];
    let leaf =
        verify_chain(&issued.leaf, &chain, &running.anchors(), mesh.clock.utc_now(), Usage::Client, None)
            .unwrap();
    assert!(leaf.no_rev_avail && leaf.profile == Profile::Client);
    let (_, parsed) = x509_parser::parse_x509_certificate(&issued.leaf).unwrap();
    let has = |oid: &str| parsed.extensions().iter().any(|extension| extension.oid.to_id_string() == oid);
    assert!(has("2.5.29.56") && !has("2.5.29.31"));
    let purposes = parsed.extended_key_usage().unwrap().unwrap().value;
    let other: Vec<String> = purposes.other.iter().map(|oid| oid.to_id_string()).collect();
    assert_eq!(other, ["1.3.6.1.5.5.7.3.36"]);
    assert!(purposes.client_auth && !purposes.server_auth);
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_profile_whose_sample_breaks_a_rule_never_comes_into_force() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    let toml = POLICY.replace("lifetime = \"1h\"", "lifetime = \"20d\"");
    let refused = apply(&running, &toml).await.unwrap_err();
    assert_eq!(code(&refused), ErrorCode::PolicyInvalid);
    let document = pb::PolicyDocument { toml, ..Default::default() };
    let check = PolicyClient::new(running.local().await).check(document).await.unwrap().into_inner();
    assert!(!check.valid && check.problems[0].starts_with("profile.job: "), "{check:?}");
    let in_force = PolicyClient::new(running.local().await).get(pb::Empty {}).await.unwrap().into_inner();
    assert!(!in_force.toml.contains("profile.job"));
    running.stop().await.unwrap();
}
