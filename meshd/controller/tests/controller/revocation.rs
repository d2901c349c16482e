use std::time::Duration;

use mesh_ca::{Crl, LeafKey};
use mesh_proto::v1 as pb;
use pb::ErrorCode;
use pb::certificates_client::CertificatesClient;
use pb::nodes_client::NodesClient;

use crate::harness::{Candidate, Mesh, SyncStream, code, issue_request, operation, within};

fn revoke(name: &str, wait_secs: u32) -> pb::RevokeNodeRequest {
    pb::RevokeNodeRequest {
        name: name.into(),
        reason: "key-compromise".into(),
        wait_secs,
        operation_id: operation().into(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_node_is_refused_at_once_and_its_stream_ends_within_a_second() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    let alpha = running.enroll("alpha").await;
    let service = running.service(&alpha, "api.alpha.mesh.internal", "peer").await;
    let channel = running.member(&alpha.identity).await;
    let (stream, _) = SyncStream::of(&running, &alpha).await;

    let mut nodes = NodesClient::new(running.local().await);
    let revoked = nodes.revoke(revoke("alpha", 0)).await.unwrap().into_inner();
    let since = std::time::Instant::now();
    assert!(revoked.changed && revoked.peer_removed);
    assert_eq!(revoked.revoked.len(), 2, "identity and service");
    assert!(revoked.streams_closed >= 2, "{revoked:?}");
    let reason = within(Duration::from_secs(1), "the end of the stream", stream.end()).await;
    assert!(since.elapsed() < Duration::from_secs(1));
    assert!(matches!(reason, None | Some(ErrorCode::IdentityRevoked)), "{reason:?}");

    // The open connection is good for nothing, and a new one neither.
    let old = CertificatesClient::new(channel).crls(pb::CrlsRequest::default()).await.unwrap_err();
    assert!(
        matches!(
            old.code(),
            tonic::Code::PermissionDenied
                | tonic::Code::Unavailable
                | tonic::Code::Unknown
                | tonic::Code::Cancelled
        ),
        "{old:?}"
    );
    for identity in [&alpha.identity, &service] {
        let mut client = CertificatesClient::new(running.member(identity).await);
        let refused = client.crls(pb::CrlsRequest::default()).await.unwrap_err();
        assert_eq!(code(&refused), ErrorCode::IdentityRevoked);
    }

    // Both serials are on the published CRL, which anybody with a certificate fetches.
    let bravo = running.enroll("bravo").await;
    let mut client = CertificatesClient::new(running.member(&bravo.identity).await);
    let crls = client.crls(pb::CrlsRequest::default()).await.unwrap().into_inner().crls;
    let issuing = crls.iter().find(|crl| crl.number == revoked.crl_number && crl.number > 1).unwrap();
    let crl = Crl::parse_verified(&issuing.der, &bravo.enrolled.issuers[0]).unwrap();
    for certificate in &revoked.revoked {
        assert!(crl.contains(&mesh_ca::SerialNumber::from_slice(&certificate.serial).unwrap()));
    }
    let file = mesh.state_dir().join(format!("crl/{}-0.crl", hex::encode(&issuing.issuer_key_id)));
    let on_disk = async {
        while std::fs::read(&file).ok().as_deref() != Some(&*issuing.der) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    within(Duration::from_secs(10), "the CRL on disk", on_disk).await;

    // Twice is once.
    let again = nodes.revoke(revoke("alpha", 0)).await.unwrap().into_inner();
    assert!(!again.changed);
    assert_eq!(again.crl_number, revoked.crl_number);
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn receipts_say_who_has_it_who_is_away_and_who_is_slow() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    let mut fleet = vec![];
    for name in ["alpha", "bravo", "charlie", "victim"] {
        fleet.push(running.enroll(name).await);
    }
    let (mut answers, _) = SyncStream::of(&running, &fleet[0]).await;
    let (_silent, _) = SyncStream::of(&running, &fleet[1]).await;
    let acknowledging = tokio::spawn(async move {
        // Takes up what it is told, as a node does: first on disk, then said so.
        loop {
            let delta = answers.delta().await;
            answers.ack(delta.cursor.unwrap().seq, delta.crls.clone()).await;
            if !delta.crls.is_empty() {
                return answers;
            }
        }
    });
    let mut nodes = NodesClient::new(running.local().await);
    let revoked = nodes.revoke(revoke("victim", 1)).await.unwrap().into_inner();
    let states: Vec<_> = revoked.receipts.iter().map(|r| (r.node.as_str(), r.state())).collect();
    use pb::receipt::State;
    assert_eq!(
        states,
        [("alpha", State::Acknowledged), ("bravo", State::TimedOut), ("charlie", State::Offline)]
    );
    let lease = fleet[3].identity.leaf.clone();
    let not_after = mesh_ca::verify_chain(
        &lease,
        &[fleet[3].enrolled.issuers[0].to_vec().into()],
        &running.anchors(),
        time::UtcDateTime::now(),
        mesh_ca::Usage::Any,
        None,
    )
    .unwrap()
    .not_after;
    assert!(revoked.receipts.iter().all(|r| r.lease_ends == not_after.unix_timestamp()));
    assert!((900..5_000).contains(&revoked.waited_ms), "{}", revoked.waited_ms);
    drop(acknowledging.await.unwrap());
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_name_and_key_come_back_only_through_an_operator() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    let token = running.token(pb::CreateTokenRequest { uses: 9, ..Default::default() }).await;
    let candidate = Candidate::new("alpha");
    candidate.enroll(running.stranger().await, &token).await.unwrap();
    let mut nodes = NodesClient::new(running.local().await);
    nodes.revoke(revoke("alpha", 0)).await.unwrap();

    let retry = candidate.ask(running.stranger().await, &token).await.unwrap_err();
    assert_eq!(code(&retry), ErrorCode::NodeRevoked);
    // The token it came with is void too; what follows comes with another.
    let voided = Candidate::new("bravo").ask(running.stranger().await, &token).await.unwrap_err();
    assert_eq!(code(&voided), ErrorCode::TokenRevoked);
    let token = running.token(pb::CreateTokenRequest { uses: 9, ..Default::default() }).await;
    let impostor = Candidate::new("alpha").ask(running.stranger().await, &token).await.unwrap_err();
    assert_eq!(code(&impostor), ErrorCode::NodeRevoked);
    let other_name = pb::EnrollRequest { name: "bravo".into(), ..candidate.request(&token) };
    let mut client = pb::enrollment_client::EnrollmentClient::new(running.stranger().await);
    assert_eq!(code(&client.enroll(other_name).await.unwrap_err()), ErrorCode::KeyRevoked);
    let bravo = Candidate::new("bravo");
    let same_wireguard = pb::EnrollRequest {
        wireguard_public_key: candidate.wireguard.to_vec().into(),
        ..bravo.request(&token)
    };
    assert_eq!(code(&client.enroll(same_wireguard).await.unwrap_err()), ErrorCode::KeyRevoked);

    // An operator makes a token for that very name: a new machine may have it.
    let token = running.token(pb::CreateTokenRequest { name: "alpha".into(), ..Default::default() }).await;
    Candidate::new("alpha").enroll(running.stranger().await, &token).await.unwrap();
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_certificate_is_revoked_by_name_and_stays_stopped() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    let alpha = running.enroll("alpha").await;
    let name = "api.alpha.mesh.internal";
    running.service(&alpha, name, "server").await;
    let mut operator = CertificatesClient::new(running.local().await);
    let by_name = |name: &str| pb::RevokeCertificateRequest {
        which: Some(pb::revoke_certificate_request::Which::Name(name.into())),
        operation_id: operation().into(),
        ..Default::default()
    };
    let revoked = operator.revoke(by_name(name)).await.unwrap().into_inner();
    assert!(revoked.changed);
    assert_eq!(revoked.revoked[0].name, name);
    assert!(!operator.revoke(by_name(name)).await.unwrap().into_inner().changed);

    let mut node = CertificatesClient::new(running.member(&alpha.identity).await);
    let key = LeafKey::generate().unwrap();
    let refused = node.issue(issue_request(&key, &[name], "server")).await.unwrap_err();
    assert_eq!(code(&refused), ErrorCode::NameStopped);
    let by_hand = pb::IssueRequest { restart: true, ..issue_request(&key, &[name], "server") };
    node.issue(by_hand).await.unwrap();

    let identity = operator.revoke(by_name("alpha.mesh.internal")).await.unwrap_err();
    assert_eq!(code(&identity), ErrorCode::NodeIdentity);
    let nobody = operator.revoke(by_name("nobody.mesh.internal")).await.unwrap_err();
    assert_eq!(code(&nobody), ErrorCode::CertificateNotFound);
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_leaves_gets_its_answer_and_is_gone() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    let alpha = running.enroll("alpha").await;
    let mut node = NodesClient::new(running.member(&alpha.identity).await);
    assert!(node.leave(pb::Empty {}).await.unwrap().into_inner().changed);
    let mut nodes = NodesClient::new(running.local().await);
    assert!(nodes.list(pb::Empty {}).await.unwrap().into_inner().nodes.is_empty());
    // The name is free again for whoever has a token.
    running.enroll("alpha").await;
    running.stop().await.unwrap();
}

/// Renewing and revoking at once ends revoked, whatever the order, and every leaf is on the CRL.
#[tokio::test(flavor = "multi_thread")]
async fn a_race_of_renewal_and_revocation_ends_revoked() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    for round in 0..30 {
        let name = format!("n{round}");
        let node = running.enroll(&name).await;
        let member = running.member(&node.identity).await;
        let renewing = tokio::spawn(async move {
            let key = LeafKey::generate().unwrap();
            let mut client = pb::renewal_client::RenewalClient::new(member);
            client
                .renew(pb::RenewRequest {
                    csr: mesh_ca::Csr::create(&key).unwrap().into(),
                    wireguard_public_keys: vec![node.wireguard.to_vec().into()],
                    operation_id: operation().into(),
                })
                .await
        });
        let mut nodes = NodesClient::new(running.local().await);
        let revoked = nodes.revoke(revoke(&name, 0)).await.unwrap().into_inner();
        let mut leaves = vec![node.identity.leaf.clone()];
        if let Ok(renewed) = renewing.await.unwrap() {
            leaves.push(renewed.into_inner().leaf.to_vec());
        }
        let crls =
            CertificatesClient::new(running.local().await).crls(pb::CrlsRequest::default()).await.unwrap();
        let crls = crls.into_inner().crls;
        let der = &crls.iter().find(|crl| crl.number >= revoked.crl_number && crl.number > 1).unwrap().der;
        let crl = Crl::parse_verified(der, &node.enrolled.issuers[0]).unwrap();
        for leaf in leaves {
            let leaf = mesh_ca::verify_chain(
                &leaf,
                &[node.enrolled.issuers[0].to_vec().into()],
                &running.anchors(),
                time::UtcDateTime::now(),
                mesh_ca::Usage::Any,
                None,
            )
            .unwrap();
            assert!(crl.contains(&leaf.serial), "round {round}");
        }
    }
    running.stop().await.unwrap();
}

/// What World has forgotten, the index and the journal still know.
#[tokio::test(flavor = "multi_thread")]
async fn ended_certificates_stay_in_the_history() {
    let clock = std::sync::Arc::new(mesh_runtime::ManualClock::new(time::UtcDateTime::now()));
    let mesh = Mesh::init_at(clock.clone());
    let running = mesh.start().await;
    let alpha = running.enroll("alpha").await;
    let service = running.service(&alpha, "api.alpha.mesh.internal", "peer").await;
    let serial = mesh_ca::verify_chain(
        &service.leaf,
        &[service.issuer.clone().into()],
        &running.anchors(),
        clock_now(&clock),
        mesh_ca::Usage::Any,
        None,
    )
    .unwrap()
    .serial;
    let mut operator = CertificatesClient::new(running.local().await);
    let which = pb::revoke_certificate_request::Which::Serial(serial.as_bytes().to_vec().into());
    let request = pb::RevokeCertificateRequest {
        which: Some(which),
        reason: "superseded".into(),
        ..Default::default()
    };
    operator.revoke(request).await.unwrap();
    running.stop().await.unwrap();
    // Long after its end, and after CRLs that need not list it any more.
    for _ in 0..3 {
        clock.advance(Duration::from_secs(100 * 3600));
        let running = mesh.start().await;
        running.plain_token().await;
        running.stop().await.unwrap();
    }

    let running = mesh.start().await;
    let mut operator = CertificatesClient::new(running.local().await);
    let live = operator.list(pb::ListCertificatesRequest::default()).await.unwrap().into_inner();
    let own = |certificate: &pb::Certificate| ["controller", "ocsp"].contains(&certificate.profile.as_str());
    assert!(live.certificates.iter().all(own), "{live:?}");
    let mut found = vec![];
    let mut page_token = String::new();
    loop {
        let page = pb::ListCertificatesRequest {
            include_ended: true,
            page_size: 2,
            page_token: page_token.clone(),
            ..Default::default()
        };
        let page = operator.list(page).await.unwrap().into_inner();
        assert!(page.certificates.len() <= 2);
        found.extend(page.certificates);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert!(found.is_sorted_by(|a, b| a.not_after >= b.not_after));
    let serials: std::collections::BTreeSet<_> = found.iter().map(|c| c.serial.clone()).collect();
    assert_eq!(serials.len(), found.len());
    let ended = found.iter().find(|c| c.serial == serial.as_bytes().as_slice()).expect("the service's");
    assert_eq!((ended.owner.as_str(), ended.reason.as_str()), ("alpha", "superseded"));
    assert!(ended.revoked_at > 0);
    let get = pb::GetCertificateRequest { serial: ended.serial.clone() };
    assert_eq!(operator.get(get).await.unwrap().into_inner().leaf, service.leaf);
    let unknown = pb::GetCertificateRequest { serial: vec![0x41; 16].into() };
    assert_eq!(code(&operator.get(unknown).await.unwrap_err()), ErrorCode::CertificateNotFound);
    running.stop().await.unwrap();
}

fn clock_now(clock: &mesh_runtime::ManualClock) -> time::UtcDateTime {
    use mesh_runtime::Clock as _;
    clock.utc_now()
}
