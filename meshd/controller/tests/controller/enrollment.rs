use mesh_ca::{Identity as Spiffe, Usage, verify_chain};
use mesh_proto::v1 as pb;
use pb::ErrorCode;
use rustls_pki_types::CertificateDer;
use time::UtcDateTime;

use crate::harness::{Candidate, JoinToken, Mesh, code, connect, pinned_config};

#[tokio::test(flavor = "multi_thread")]
async fn a_node_enrolls_with_a_token_and_its_chain_says_what_the_answer_says() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    let token =
        running.token(pb::CreateTokenRequest { tags: vec!["web".into()], ..Default::default() }).await;
    assert_eq!(token.0.trust_domain, "mesh.internal");
    assert_eq!(token.0.kind(), pb::join_token::Kind::Node);

    // The stranger knows nothing but the pin: the root comes with the handshake.
    let (config, verifier) = pinned_config(token.0.root_spki_sha256.to_vec().try_into().unwrap());
    let channel = connect(running.address, config).await.unwrap();
    let accepted = verifier.accepted().unwrap();
    assert_eq!(accepted.root_der, running.root);
    assert_eq!(accepted.name.as_str(), "ctl-1");

    let candidate = Candidate::new("web-1");
    let enrolled = candidate.enroll(channel, &token).await.unwrap();
    assert_eq!((enrolled.name.as_str(), enrolled.node_id), ("web-1", 1));
    assert_eq!(enrolled.ipv4, "100.64.0.1");
    assert_eq!(enrolled.roots[0], running.root.to_vec());
    let issuers: Vec<_> = enrolled.issuers.iter().map(|der| CertificateDer::from(der.to_vec())).collect();
    let leaf =
        verify_chain(&enrolled.leaf, &issuers, &running.anchors(), UtcDateTime::now(), Usage::Any, None)
            .unwrap();
    assert!(matches!(&leaf.identity, Some(Spiffe::Node { name }) if name.as_str() == "web-1"));
    assert_eq!(leaf.wireguard_keys, [candidate.wireguard]);
    assert_eq!(leaf.dns[0].as_str(), "web-1.mesh.internal");
    let mut ips: Vec<String> = leaf.ips.iter().map(ToString::to_string).collect();
    ips.sort();
    let mut expected = vec![enrolled.ipv4.clone(), enrolled.ipv6.clone()];
    expected.sort();
    assert_eq!(ips, expected);

    let mut nodes = pb::nodes_client::NodesClient::new(running.local().await);
    let listed = nodes.list(pb::Empty {}).await.unwrap().into_inner().nodes;
    assert_eq!(listed.len(), 1);
    assert_eq!((listed[0].name.as_str(), listed[0].tags.as_slice()), ("web-1", &["web".to_owned()][..]));
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_machine_may_ask_again_and_no_other_may() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    let token = running.plain_token().await;
    let candidate = Candidate::new("web-1");
    let first = candidate.enroll(running.stranger().await, &token).await.unwrap();
    let again = candidate.enroll(running.stranger().await, &token).await.unwrap();
    assert_eq!(first.leaf, again.leaf);
    assert_eq!(first.node_id, again.node_id);

    let refused = Candidate::new("web-1").ask(running.stranger().await, &token).await.unwrap_err();
    assert!(matches!(code(&refused), ErrorCode::TokenUsed | ErrorCode::NameTaken), "{refused:?}");
    let refused = Candidate::new("web-2").ask(running.stranger().await, &token).await.unwrap_err();
    assert_eq!(code(&refused), ErrorCode::TokenUsed);
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_token_learns_nothing_and_a_source_runs_out_of_tries() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    let token = running.plain_token().await;
    let mut wrong_secret = token.clone();
    wrong_secret.0.secret = vec![0; 32].into();
    let mut wrong_id = token.clone();
    wrong_id.0.id = vec![9; 8].into();
    let mut short_id = token.clone();
    short_id.0.id = vec![9; 3].into();
    let mut seen = Vec::new();
    for wrong in [&wrong_secret, &wrong_id, &short_id] {
        let refused = Candidate::new("web-1").ask(running.stranger().await, wrong).await.unwrap_err();
        assert_eq!(code(&refused), ErrorCode::TokenInvalid);
        seen.push((refused.code(), refused.message().to_owned(), refused.details().to_vec()));
    }
    assert!(seen.windows(2).all(|pair| pair[0] == pair[1]), "{seen:?}");

    let channel = running.stranger().await;
    for _ in 0..30 {
        let _ = Candidate::new("web-1").ask(channel.clone(), &wrong_secret).await.unwrap_err();
    }
    let held = Candidate::new("web-1").ask(channel, &token).await.unwrap_err();
    assert_eq!(code(&held), ErrorCode::Overloaded);
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_does_not_spend_the_token() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    let token = running.token(pb::CreateTokenRequest { name: "web-1".into(), ..Default::default() }).await;
    let channel = running.stranger().await;
    let refusals = [
        ("db-1", ErrorCode::TokenNameMismatch),
        ("controller", ErrorCode::NameReserved),
        ("*", ErrorCode::NameWildcard),
        ("web_1", ErrorCode::NameInvalid),
        ("web-1.mesh.internal", ErrorCode::NameInvalid),
        ("", ErrorCode::NameInvalid),
    ];
    for (name, expected) in refusals {
        let refused = Candidate::new(name).ask(channel.clone(), &token).await.unwrap_err();
        assert_eq!(code(&refused), expected, "{name:?}: {refused:?}");
    }
    Candidate::new("web-1").enroll(channel, &token).await.unwrap();
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_csr_that_asks_for_too_much_is_refused_by_name() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    let token = running.plain_token().await;
    let candidate = Candidate::new("web-1");
    let good = candidate.request(&token);
    let with = |csr: Vec<u8>| pb::EnrollRequest { csr: csr.into(), ..good.clone() };
    let mut flipped = good.csr.to_vec();
    *flipped.last_mut().unwrap() ^= 1;
    let table = [
        ("empty", with(vec![]), ErrorCode::CsrInvalid),
        ("noise", with(vec![0x30; 64]), ErrorCode::CsrInvalid),
        ("flipped", with(flipped), ErrorCode::CsrSignature),
        ("17 KiB", with(vec![0x30; 17 * 1024]), ErrorCode::TooLarge),
        (
            "CA:TRUE",
            with(csr_with(|p| p.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained))),
            ErrorCode::CsrNotALeaf,
        ),
        (
            "foreign name",
            with(csr_with(|p| p.subject_alt_names = vec![dns("db-1.mesh.internal")])),
            ErrorCode::CsrForeignName,
        ),
        (
            "controller URI",
            with(csr_with(|p| {
                p.subject_alt_names =
                    vec![rcgen::SanType::URI("spiffe://mesh.internal/controller/ctl-1".try_into().unwrap())];
            })),
            ErrorCode::CsrForeignName,
        ),
        (
            "wildcard",
            with(csr_with(|p| p.subject_alt_names = vec![dns("*.mesh.internal")])),
            ErrorCode::NameWildcard,
        ),
        ("P-521", with(csr_of(&rcgen::PKCS_ECDSA_P521_SHA512, |_| {})), ErrorCode::KeyWeak),
    ];
    let mut client = pb::enrollment_client::EnrollmentClient::new(running.stranger().await);
    for (what, request, expected) in table {
        let refused = client.enroll(request).await.unwrap_err();
        assert_eq!(code(&refused), expected, "{what}: {refused:?}");
    }
    // A message of 5 MiB is refused before it is understood, and the connection lives on.
    let huge = client.enroll(with(vec![0x30; 5 * 1024 * 1024])).await.unwrap_err();
    assert!(matches!(huge.code(), tonic::Code::OutOfRange | tonic::Code::ResourceExhausted), "{huge:?}");
    let weak = pb::EnrollRequest { wireguard_public_key: vec![0; 32].into(), ..good.clone() };
    assert_eq!(code(&client.enroll(weak).await.unwrap_err()), ErrorCode::KeyWeak);
    // None of it spent the token.
    client.enroll(good).await.unwrap();
    running.stop().await.unwrap();
}

fn dns(name: &str) -> rcgen::SanType {
    rcgen::SanType::DnsName(name.try_into().unwrap())
}

fn csr_with(change: impl FnOnce(&mut rcgen::CertificateParams)) -> Vec<u8> {
    csr_of(&rcgen::PKCS_ECDSA_P256_SHA256, change)
}

fn csr_of(
    algorithm: &'static rcgen::SignatureAlgorithm,
    change: impl FnOnce(&mut rcgen::CertificateParams),
) -> Vec<u8> {
    let key = rcgen::KeyPair::generate_for(algorithm).unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    change(&mut params);
    params.serialize_request(&key).unwrap().der().to_vec()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_is_taken_is_refused() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    let token = running.token(pb::CreateTokenRequest { uses: 5, ..Default::default() }).await;
    let first = Candidate::new("web-1");
    first.enroll(running.stranger().await, &token).await.unwrap();
    let same_key = pb::EnrollRequest { name: "web-2".into(), ..first.request(&token) };
    let other = Candidate::new("web-3");
    let same_wireguard =
        pb::EnrollRequest { wireguard_public_key: first.wireguard.to_vec().into(), ..other.request(&token) };
    let mut client = pb::enrollment_client::EnrollmentClient::new(running.stranger().await);
    for request in [same_key, same_wireguard] {
        assert_eq!(code(&client.enroll(request).await.unwrap_err()), ErrorCode::KeyInUse);
    }
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_with_approval_lets_nobody_in_before_an_operator_does() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    let token = running.token(pb::CreateTokenRequest { require_approval: true, ..Default::default() }).await;
    let candidate = Candidate::new("web-1");
    for _ in 0..2 {
        match candidate.ask(running.stranger().await, &token).await.unwrap().outcome {
            Some(pb::enroll_response::Outcome::Pending(pending)) => {
                assert_eq!(pending.node, "web-1");
                assert_eq!(pending.key_hash, candidate.key.key_hash().to_vec());
            }
            other => panic!("{other:?}"),
        }
    }
    let mut nodes = pb::nodes_client::NodesClient::new(running.local().await);
    let request = pb::NodeRequest { name: "web-1".into(), operation_id: vec![].into() };
    assert!(nodes.approve(request.clone()).await.unwrap().into_inner().changed);
    assert!(!nodes.approve(request).await.unwrap().into_inner().changed);
    let enrolled = candidate.enroll(running.stranger().await, &token).await.unwrap();
    assert_eq!(enrolled.name, "web-1");
    running.stop().await.unwrap();
}

/// One token, 64 machines at once: one is let in, whatever the order, and the books agree.
#[tokio::test(flavor = "multi_thread")]
async fn a_single_use_token_lets_one_of_64_in() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    for round in 0..50 {
        let token = running.plain_token().await;
        let channel = running.stranger().await;
        let asks = (0..64).map(|index| {
            let (channel, token): (_, JoinToken) = (channel.clone(), token.clone());
            tokio::spawn(
                async move { Candidate::new(&format!("r{round}-n{index}")).ask(channel, &token).await },
            )
        });
        let mut admitted = 0;
        for ask in asks.collect::<Vec<_>>() {
            match ask.await.unwrap() {
                Ok(_) => admitted += 1,
                Err(refused) => assert_eq!(code(&refused), ErrorCode::TokenUsed, "{refused:?}"),
            }
        }
        assert_eq!(admitted, 1, "round {round}");
    }
    let mut nodes = pb::nodes_client::NodesClient::new(running.local().await);
    let nodes = nodes.list(pb::Empty {}).await.unwrap().into_inner().nodes;
    assert_eq!(nodes.len(), 50);
    let distinct =
        |key: fn(&pb::Node) -> String| nodes.iter().map(key).collect::<std::collections::BTreeSet<_>>().len();
    assert_eq!(distinct(|node| node.ipv4.clone()), 50);
    assert_eq!(distinct(|node| node.ipv6.clone()), 50);
    assert_eq!(distinct(|node| hex::encode(&node.serial)), 50);
    running.stop().await.unwrap();
}

/// The controller gives every node a moment of its own to renew at, so that a fleet enrolled in one go does not renew so;
/// asked again, it says the same, and after a renewal the same moment of the next period.
#[tokio::test(flavor = "multi_thread")]
async fn each_node_is_told_a_renewal_slot_of_its_own() {
    const NODES: i64 = 12;
    let mesh = Mesh::init();
    let running = mesh.start().await;
    let mut slots = Vec::new();
    let mut last = None;
    for number in 0..NODES {
        let node = running.enroll(&format!("n{number}")).await;
        let age = node.enrolled.renew_at - node.enrolled.controller_time;
        // A period of 24 h, and never at once.
        assert!((3_600..=25 * 3_600).contains(&age), "{age}");
        slots.push(node.enrolled.renew_at.rem_euclid(86_400));
        last = Some(node);
    }
    slots.sort_unstable();
    let gaps = slots.windows(2).map(|two| two[1] - two[0]);
    let smallest = gaps.chain([slots[0] + 86_400 - slots[slots.len() - 1]]).min().unwrap();
    assert!(smallest > 86_400 / NODES / 3, "{smallest} s between two of {NODES}: {slots:?}");

    let node = last.unwrap();
    let candidate = Candidate::new("n11");
    let request = pb::RenewRequest {
        csr: mesh_ca::Csr::create(&candidate.key).unwrap().into(),
        wireguard_public_keys: vec![node.wireguard.to_vec().into()],
        operation_id: crate::harness::operation().into(),
    };
    let mut client = pb::renewal_client::RenewalClient::new(running.member(&node.identity).await);
    let renewed = client.renew(request).await.unwrap().into_inner();
    assert_eq!(
        (renewed.renew_at - node.enrolled.renew_at).rem_euclid(86_400),
        0,
        "a renewal keeps the time of day"
    );
    running.stop().await.unwrap();
}
