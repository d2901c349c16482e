//! Nobody passes for somebody else.

use std::sync::Arc;
use std::time::Duration;

use mesh_ca::{Csr, LeafKey};
use mesh_proto::v1 as pb;
use mesh_runtime::{ManualClock, SharedClock};
use pb::ErrorCode;
use time::UtcDateTime;
use tonic::transport::Channel;

use crate::harness::{Identity, Mesh, Node, Running, code, issue_request, operation, wireguard_key};

fn renewal(key: &LeafKey, wireguard: [u8; 32]) -> pb::RenewRequest {
    pb::RenewRequest {
        csr: Csr::create(key).unwrap().into(),
        wireguard_public_keys: vec![wireguard.to_vec().into()],
        operation_id: operation().into(),
    }
}

/// Every call that only nodes may make, and how it was refused, if it was.
async fn node_calls(channel: Channel, wireguard: [u8; 32]) -> Vec<(&'static str, Option<tonic::Status>)> {
    let key = LeafKey::generate().unwrap();
    let mut renewals = pb::renewal_client::RenewalClient::new(channel.clone());
    let mut certificates = pb::certificates_client::CertificatesClient::new(channel.clone());
    let mut sync = pb::sync_client::SyncClient::new(channel.clone());
    let mut nodes = pb::nodes_client::NodesClient::new(channel);
    let hello = pb::SyncRequest {
        request: Some(pb::sync_request::Request::Hello(pb::sync_request::Hello::default())),
    };
    vec![
        ("renew", renewals.renew(renewal(&key, wireguard)).await.err()),
        ("resume", renewals.resume(renewal(&key, wireguard)).await.err()),
        ("sync", sync.sync(tokio_stream::once(hello)).await.err()),
        ("issue", certificates.issue(issue_request(&key, &["x.alpha.mesh.internal"], "peer")).await.err()),
        ("leave", nodes.leave(pb::Empty {}).await.err()),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_pair_is_refused_on_every_node_call() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    let alpha = running.enroll("alpha").await;
    for profile in ["peer", "client"] {
        let service = running.service(&alpha, &format!("{profile}.alpha.mesh.internal"), profile).await;
        let channel = running.member(&service).await;
        for (call, refused) in node_calls(channel.clone(), alpha.wireguard).await {
            assert_eq!(code(&refused.unwrap()), ErrorCode::Denied, "{profile} {call}");
        }
        // What every member may do, it may.
        pb::certificates_client::CertificatesClient::new(channel)
            .crls(pb::CrlsRequest::default())
            .await
            .unwrap();
    }
    // A server's certificate is not even a client's.
    let server = running.service(&alpha, "s.alpha.mesh.internal", "server").await;
    let channel = running.try_connect(Some(&server)).await;
    if let Ok(channel) = channel {
        let mut client = pb::certificates_client::CertificatesClient::new(channel);
        assert!(client.crls(pb::CrlsRequest::default()).await.is_err());
    }
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_and_nodes_cannot_act_as_operators() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    let alpha = running.enroll("alpha").await;
    running.enroll("bravo").await;
    for channel in [running.stranger().await, running.member(&alpha.identity).await] {
        let mut nodes = pb::nodes_client::NodesClient::new(channel.clone());
        let named = || pb::NodeRequest { name: "bravo".into(), operation_id: operation().into() };
        let end = || pb::RevokeNodeRequest { name: "bravo".into(), ..Default::default() };
        let mut tokens = pb::tokens_client::TokensClient::new(channel.clone());
        let mut policy = pb::policy_client::PolicyClient::new(channel.clone());
        let mut operators = pb::operators_client::OperatorsClient::new(channel.clone());
        let mut audit = pb::audit_client::AuditClient::new(channel.clone());
        let mut fleet = pb::fleet_client::FleetClient::new(channel.clone());
        let refusals = [
            nodes.list(pb::Empty {}).await.unwrap_err(),
            nodes.approve(named()).await.unwrap_err(),
            nodes.rotate_keys(named()).await.unwrap_err(),
            nodes.revoke(end()).await.unwrap_err(),
            nodes.remove(end()).await.unwrap_err(),
            tokens.create(pb::CreateTokenRequest::default()).await.unwrap_err(),
            policy.apply(pb::PolicyDocument::default()).await.unwrap_err(),
            operators
                .add(pb::AddOperatorRequest {
                    name: "eve".into(),
                    role: "admin".into(),
                    ..Default::default()
                })
                .await
                .unwrap_err(),
            audit.log(pb::AuditLogRequest::default()).await.unwrap_err(),
            fleet.status(pb::Empty {}).await.unwrap_err(),
        ];
        for refused in refusals {
            assert_eq!(code(&refused), ErrorCode::Denied, "{refused:?}");
        }
    }
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_renews_only_itself_and_only_with_keys_of_its_own() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    let alpha = running.enroll("alpha").await;
    let bravo = running.enroll("bravo").await;
    let mut client = pb::renewal_client::RenewalClient::new(running.member(&alpha.identity).await);
    let key = LeafKey::generate().unwrap();
    let stolen = client.renew(renewal(&key, bravo.wireguard)).await.unwrap_err();
    assert_eq!(code(&stolen), ErrorCode::KeyInUse);
    let theirs = client.renew(renewal(&bravo.identity.key, alpha.wireguard)).await.unwrap_err();
    assert_eq!(code(&theirs), ErrorCode::KeyInUse);
    let renewed = client.renew(renewal(&key, alpha.wireguard)).await.unwrap().into_inner();
    assert_eq!((&*renewed.name, &*renewed.ipv4), ("alpha", &*alpha.enrolled.ipv4));

    let mut certificates =
        pb::certificates_client::CertificatesClient::new(running.member(&alpha.identity).await);
    let table = [
        ("bravo.mesh.internal", ErrorCode::NameTaken),
        ("x.bravo.mesh.internal", ErrorCode::NameTaken),
        ("api.mesh.internal", ErrorCode::NameNotGranted),
        ("controller.mesh.internal", ErrorCode::NameReserved),
        ("ctl-1.mesh.internal", ErrorCode::NameReserved),
        ("example.org", ErrorCode::NameOutsideDomain),
        ("*.alpha.mesh.internal", ErrorCode::NameWildcard),
        ("a..alpha.mesh.internal", ErrorCode::NameInvalid),
        (bravo.enrolled.ipv4.as_str(), ErrorCode::NameNotGranted),
        ("192.0.2.1", ErrorCode::NameNotGranted),
    ];
    for (name, expected) in table {
        let key = LeafKey::generate().unwrap();
        let refused = certificates.issue(issue_request(&key, &[name], "server")).await.unwrap_err();
        assert_eq!(code(&refused), expected, "{name}: {refused:?}");
    }
    for own in ["alpha.mesh.internal", "api.alpha.mesh.internal", alpha.enrolled.ipv4.as_str()] {
        let key = LeafKey::generate().unwrap();
        certificates.issue(issue_request(&key, &[own], "server")).await.unwrap();
    }
    let identity_key = certificates
        .issue(issue_request(&alpha.identity.key, &["alpha.mesh.internal"], "server"))
        .await
        .unwrap_err();
    assert_eq!(code(&identity_key), ErrorCode::KeyInUse);
    running.stop().await.unwrap();
}

async fn expired(mesh: &Mesh, clock: &ManualClock, running: Running, hours: u64) -> Running {
    running.stop().await.unwrap();
    clock.advance(Duration::from_secs(hours * 3600));
    mesh.start().await
}

fn manual() -> (Arc<ManualClock>, Mesh) {
    let clock = Arc::new(ManualClock::new(UtcDateTime::now()));
    let shared: SharedClock = clock.clone();
    (clock, Mesh::init_at(shared))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_node_may_resume_and_nothing_else() {
    let (clock, mesh) = manual();
    let running = mesh.start().await;
    let alpha = running.enroll("alpha").await;
    let running = expired(&mesh, &clock, running, 73).await;
    let channel = running.member(&alpha.identity).await;
    for (call, outcome) in node_calls(channel, wireguard_key()).await {
        match (call, outcome) {
            ("resume", outcome) => assert!(outcome.is_none(), "{outcome:?}"),
            (_, outcome) => assert_eq!(code(&outcome.unwrap()), ErrorCode::IdentityExpired, "{call}"),
        }
    }
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn resume_ends_with_the_window_and_with_a_revocation() {
    let (clock, mesh) = manual();
    let running = mesh.start().await;
    let alpha = running.enroll("alpha").await;
    let bravo = running.enroll("bravo").await;
    let charlie = running.enroll("charlie").await;
    let mut nodes = pb::nodes_client::NodesClient::new(running.local().await);
    let end = pb::RevokeNodeRequest { name: "bravo".into(), ..Default::default() };
    nodes.revoke(end).await.unwrap();
    let running = expired(&mesh, &clock, running, 73).await;

    let resumed = resume(&running, &alpha).await.unwrap();
    assert_eq!(resumed.1.enrolled.ipv4, alpha.enrolled.ipv4);
    assert_eq!(code(&resume(&running, &bravo).await.unwrap_err()), ErrorCode::IdentityRevoked);
    // The new identity works for everything.
    let channel = running.member(&resumed.1.identity).await;
    pb::certificates_client::CertificatesClient::new(channel)
        .list(pb::ListCertificatesRequest::default())
        .await
        .unwrap();
    // With the new one proved, the old one is over.
    let running = expired(&mesh, &clock, running, 31 * 24).await;
    assert_eq!(code(&resume(&running, &charlie).await.unwrap_err()), ErrorCode::ResumeWindowPassed);
    running.stop().await.unwrap();
}

async fn resume(running: &Running, node: &Node) -> Result<(LeafKeyHash, Node), tonic::Status> {
    let key = LeafKey::generate().unwrap();
    let mut client = pb::renewal_client::RenewalClient::new(running.member(&node.identity).await);
    let enrolled = client.resume(renewal(&key, node.wireguard)).await?.into_inner();
    let hash = key.key_hash();
    let identity =
        Identity { leaf: enrolled.leaf.to_vec(), issuer: enrolled.issuers[0].to_vec(), key: Arc::new(key) };
    Ok((hash, Node { identity, enrolled, wireguard: node.wireguard }))
}

type LeafKeyHash = [u8; 32];

/// webpki looks at dates before signatures, so "expired" alone proves nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_forged_expired_certificate_does_not_get_past_the_handshake() {
    let (clock, mesh) = manual();
    let running = mesh.start().await;
    let alpha = running.enroll("alpha").await;
    let running = expired(&mesh, &clock, running, 73).await;

    let mut flipped = alpha.identity.clone();
    *flipped.leaf.last_mut().unwrap() ^= 1;
    // The same words under another mesh's CA of the same name.
    let other = Mesh::init_at(Arc::new(ManualClock::new(UtcDateTime::now())));
    let other_running = other.start().await;
    let foreign = other_running.enroll("alpha").await.identity;
    other_running.stop().await.unwrap();
    // The right certificate, held by somebody without its key.
    let thief = Identity { key: Arc::new(LeafKey::generate().unwrap()), ..alpha.identity.clone() };

    for (what, identity) in
        [("flipped signature", &flipped), ("foreign CA", &foreign), ("stolen certificate", &thief)]
    {
        let key = LeafKey::generate().unwrap();
        let outcome = match running.try_connect(Some(identity)).await {
            Err(_) => continue,
            Ok(channel) => {
                pb::renewal_client::RenewalClient::new(channel).resume(renewal(&key, alpha.wireguard)).await
            }
        };
        let refused = outcome.expect_err(what);
        assert!(refused.details().is_empty(), "{what} reached a handler: {refused:?}");
    }
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_superseded_identity_ends_once_its_successor_is_proved() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    let alpha = running.enroll("alpha").await;
    let renew = async |node: &Node| {
        let key = LeafKey::generate().unwrap();
        let mut client = pb::renewal_client::RenewalClient::new(running.member(&node.identity).await);
        let enrolled = client.renew(renewal(&key, node.wireguard)).await.unwrap().into_inner();
        let identity = Identity {
            leaf: enrolled.leaf.to_vec(),
            issuer: enrolled.issuers[0].to_vec(),
            key: Arc::new(key),
        };
        Node { identity, enrolled, wireguard: node.wireguard }
    };
    let second = renew(&alpha).await;
    let crls = async |node: &Node| {
        let channel = running.member(&node.identity).await;
        pb::certificates_client::CertificatesClient::new(channel).crls(pb::CrlsRequest::default()).await
    };
    // Old and new are both good until the new one has been used for the next renewal.
    crls(&alpha).await.unwrap();
    let third = renew(&second).await;
    assert_eq!(code(&crls(&alpha).await.unwrap_err()), ErrorCode::IdentityRevoked);
    crls(&second).await.unwrap();
    crls(&third).await.unwrap();
    running.stop().await.unwrap();
}
