use std::sync::Arc;

use mesh_ca::{Csr, LeafKey};
use mesh_proto::v1 as pb;
use pb::ErrorCode;
use pb::certificates_client::CertificatesClient;
use pb::operators_client::OperatorsClient;

use crate::harness::{Identity, JoinToken, Mesh, Running, code, issue_request, operation};

async fn add(running: &Running, name: &str, role: &str) -> JoinToken {
    let mut operators = OperatorsClient::new(running.local().await);
    let request =
        pb::AddOperatorRequest { name: name.into(), role: role.into(), operation_id: operation().into() };
    JoinToken::parse(&operators.add(request).await.unwrap().into_inner().token)
}

fn login_request(token: &JoinToken, key: &LeafKey) -> pb::LoginRequest {
    pb::LoginRequest {
        token_id: token.0.id.clone(),
        token_secret: token.0.secret.clone(),
        csr: Csr::create(key).unwrap().into(),
        operation_id: operation().into(),
    }
}

async fn login(running: &Running, name: &str, role: &str) -> Identity {
    let token = add(running, name, role).await;
    assert_eq!(token.0.kind(), pb::join_token::Kind::Operator);
    let key = LeafKey::generate().unwrap();
    let mut operators = OperatorsClient::new(running.stranger().await);
    let answer = operators.login(login_request(&token, &key)).await.unwrap().into_inner();
    assert_eq!((answer.name.as_str(), answer.role.as_str()), (name, role));
    Identity { leaf: answer.leaf.to_vec(), issuer: answer.issuers[0].to_vec(), key: Arc::new(key) }
}

async fn fleet_crl(running: &Running) -> u64 {
    let mut fleet = pb::fleet_client::FleetClient::new(running.local().await);
    fleet.status(pb::Empty {}).await.unwrap().into_inner().crl_number
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_logs_in_once_and_acts_within_the_role_until_removed() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    running.enroll("alpha").await;
    let alice = login(&running, "alice", "admin").await;
    let olaf = login(&running, "olaf", "auditor").await;
    let ellen = login(&running, "ellen", "enroller").await;
    let (admin, auditor, enroller) =
        (running.member(&alice).await, running.member(&olaf).await, running.member(&ellen).await);

    use pb::tokens_client::TokensClient;
    let token = || pb::CreateTokenRequest::default();
    TokensClient::new(admin.clone()).create(token()).await.unwrap();
    TokensClient::new(enroller.clone()).create(token()).await.unwrap();
    let refused = TokensClient::new(auditor.clone()).create(token()).await.unwrap_err();
    assert_eq!(code(&refused), ErrorCode::Denied);
    let end = || pb::RevokeNodeRequest { name: "alpha".into(), ..Default::default() };
    let refused = pb::nodes_client::NodesClient::new(enroller).revoke(end()).await.unwrap_err();
    assert_eq!(code(&refused), ErrorCode::Denied);
    let mut fleet = pb::fleet_client::FleetClient::new(auditor);
    let status = fleet.status(pb::Empty {}).await.unwrap().into_inner();
    assert_eq!(status.nodes[0].name, "alpha");
    assert!(status.findings.iter().any(|finding| finding.what.contains("not sealed")));

    let mut operators = OperatorsClient::new(admin.clone());
    let listed = operators.list(pb::Empty {}).await.unwrap().into_inner().operators;
    assert_eq!(listed.len(), 3);
    assert!(listed.iter().all(|operator| operator.not_after > 0));
    let remove = |name: &str| pb::RemoveOperatorRequest { name: name.into(), ..Default::default() };
    // Somebody who never logged in has no certificate, so no CRL is made for the removal.
    add(&running, "nina", "auditor").await;
    let before = fleet_crl(&running).await;
    assert!(operators.remove(remove("nina")).await.unwrap().into_inner().changed);
    assert_eq!(fleet_crl(&running).await, before);
    assert!(operators.remove(remove("olaf")).await.unwrap().into_inner().changed);
    assert_eq!(fleet_crl(&running).await, before + 1);
    let nobody = operators.remove(remove("nobody")).await.unwrap_err();
    assert_eq!(code(&nobody), ErrorCode::OperatorNotFound);
    let gone = CertificatesClient::new(running.member(&olaf).await)
        .crls(pb::CrlsRequest::default())
        .await
        .unwrap_err();
    assert!(matches!(code(&gone), ErrorCode::IdentityRevoked | ErrorCode::IdentityUnknown), "{gone:?}");
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_token_is_good_for_one_key_and_for_no_node() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    let token = add(&running, "alice", "admin").await;
    let candidate = crate::harness::Candidate::new("alpha");
    let refused = candidate.ask(running.stranger().await, &token).await.unwrap_err();
    assert_eq!(code(&refused), ErrorCode::TokenInvalid);

    let key = LeafKey::generate().unwrap();
    let mut operators = OperatorsClient::new(running.stranger().await);
    let first = operators.login(login_request(&token, &key)).await.unwrap().into_inner();
    // The answer got lost on the way: the same key gets the same certificate.
    let again = operators.login(login_request(&token, &key)).await.unwrap().into_inner();
    assert_eq!(first.leaf, again.leaf);
    let other = LeafKey::generate().unwrap();
    let refused = operators.login(login_request(&token, &other)).await.unwrap_err();
    assert_eq!(code(&refused), ErrorCode::TokenUsed);

    let join = running.plain_token().await;
    let refused = operators.login(login_request(&join, &other)).await.unwrap_err();
    assert_eq!(code(&refused), ErrorCode::TokenInvalid);
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_writes_certificates_for_machines_that_are_no_nodes() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    let alpha = running.enroll("alpha").await;
    let mut local = CertificatesClient::new(running.local().await);
    let key = LeafKey::generate().unwrap();
    let request = issue_request(&key, &["printer.mesh.internal", "192.0.2.9"], "server");
    let issued = local.issue(request.clone()).await.unwrap().into_inner();
    let certificate = issued.certificate.unwrap();
    assert_eq!((certificate.owner.as_str(), certificate.spiffe.as_str()), ("local root", ""));
    assert_eq!(certificate.names, ["printer.mesh.internal", "192.0.2.9"]);
    assert_eq!(issued.crls.len(), 2);
    // The same operation again is the same certificate.
    assert_eq!(local.issue(request).await.unwrap().into_inner().leaf, issued.leaf);

    let table = [
        (&["alpha.mesh.internal"][..], "server", ErrorCode::NameTaken),
        (&["x.alpha.mesh.internal"], "server", ErrorCode::NameTaken),
        (&["ca.mesh.internal"], "server", ErrorCode::NameReserved),
        (&["printer.example.org"], "server", ErrorCode::NameOutsideDomain),
        (&[alpha.enrolled.ipv4.as_str()], "server", ErrorCode::NameNotGranted),
        (&["scanner.mesh.internal"], "peer", ErrorCode::CertificateInvalid),
        (&["scanner.mesh.internal"], "controller", ErrorCode::Usage),
        (&["scanner.mesh.internal"], "node", ErrorCode::Usage),
        (&[], "server", ErrorCode::Usage),
    ];
    for (names, profile, expected) in table {
        let key = LeafKey::generate().unwrap();
        let refused = local.issue(issue_request(&key, names, profile)).await.unwrap_err();
        assert_eq!(code(&refused), expected, "{names:?} {profile}: {refused:?}");
    }
    let short = pb::IssueRequest { ttl_secs: 5, ..issue_request(&key, &["s.mesh.internal"], "server") };
    assert_eq!(code(&local.issue(short).await.unwrap_err()), ErrorCode::Usage);

    // A node that comes later cannot take a name that is out there.
    let token = running.plain_token().await;
    let refused =
        crate::harness::Candidate::new("printer").ask(running.stranger().await, &token).await.unwrap_err();
    assert_eq!(code(&refused), ErrorCode::NameTaken);

    let by_serial = pb::GetCertificateRequest { serial: certificate.serial.clone() };
    assert_eq!(local.get(by_serial.clone()).await.unwrap().into_inner().leaf, issued.leaf);
    let mut node = CertificatesClient::new(running.member(&alpha.identity).await);
    assert_eq!(code(&node.get(by_serial).await.unwrap_err()), ErrorCode::CertificateNotFound);
    let own = node.list(pb::ListCertificatesRequest::default()).await.unwrap().into_inner().certificates;
    assert!(own.iter().all(|certificate| certificate.owner == "alpha"), "{own:?}");
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_granted_name_goes_to_those_it_is_granted_to() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    let alpha = running.enroll("alpha").await;
    let bravo = running.enroll("bravo").await;
    let mut policy = pb::policy_client::PolicyClient::new(running.local().await);
    let toml = "[[grant]]\nnames = [\"api.mesh.internal\"]\nto = [\"node:bravo\"]\n";
    let document = pb::PolicyDocument { toml: toml.into(), ..Default::default() };
    policy.apply(document).await.unwrap();
    let refused = {
        let key = LeafKey::generate().unwrap();
        let mut node = CertificatesClient::new(running.member(&alpha.identity).await);
        node.issue(issue_request(&key, &["api.mesh.internal"], "peer")).await.unwrap_err()
    };
    assert_eq!(code(&refused), ErrorCode::NameNotGranted);
    let key = LeafKey::generate().unwrap();
    let mut node = CertificatesClient::new(running.member(&bravo.identity).await);
    let issued = node.issue(issue_request(&key, &["api.mesh.internal"], "peer")).await.unwrap().into_inner();
    assert_eq!(issued.certificate.unwrap().spiffe, "spiffe://mesh.internal/service/bravo/api");

    // Neither can a node take a granted name, nor a grant a node's.
    let token = running.plain_token().await;
    let refused =
        crate::harness::Candidate::new("api").ask(running.stranger().await, &token).await.unwrap_err();
    assert_eq!(code(&refused), ErrorCode::NameTaken);
    let toml = "[[grant]]\nnames = [\"alpha.mesh.internal\"]\nto = [\"*\"]\n";
    let document = pb::PolicyDocument { toml: toml.into(), ..Default::default() };
    assert!(!policy.check(document.clone()).await.unwrap().into_inner().valid);
    assert_eq!(code(&policy.apply(document).await.unwrap_err()), ErrorCode::PolicyInvalid);
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_listed_without_their_secret_and_end_when_revoked() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    let token =
        running.token(pb::CreateTokenRequest { tags: vec!["web".into()], ..Default::default() }).await;
    let mut tokens = pb::tokens_client::TokensClient::new(running.local().await);
    let listed = tokens.list(pb::Empty {}).await.unwrap().into_inner().tokens;
    assert_eq!((listed.len(), listed[0].state.as_str(), listed[0].uses), (1, "open", 1));
    assert_eq!(listed[0].id, token.0.id);
    let revoke = pb::RevokeTokenRequest { id: token.0.id.clone(), ..Default::default() };
    assert!(tokens.revoke(revoke.clone()).await.unwrap().into_inner().changed);
    assert!(!tokens.revoke(revoke).await.unwrap().into_inner().changed);
    let refused =
        crate::harness::Candidate::new("alpha").ask(running.stranger().await, &token).await.unwrap_err();
    assert_eq!(code(&refused), ErrorCode::TokenRevoked);
    let unknown = pb::RevokeTokenRequest { id: vec![1; 8].into(), ..Default::default() };
    assert_eq!(code(&tokens.revoke(unknown).await.unwrap_err()), ErrorCode::TokenNotFound);
    let bad_tag = pb::CreateTokenRequest { tags: vec!["No Tag".into()], ..Default::default() };
    assert_eq!(code(&tokens.create(bad_tag).await.unwrap_err()), ErrorCode::TagInvalid);
    let long = pb::CreateTokenRequest { ttl_secs: u32::MAX, ..Default::default() };
    assert_eq!(code(&tokens.create(long).await.unwrap_err()), ErrorCode::Usage);
    running.stop().await.unwrap();
}

/// An answer that got lost on the way: the same request is answered alike, though no secret is kept.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_asked_for_again_is_the_same_until_the_controller_restarts() {
    use pb::tokens_client::TokensClient;
    let mesh = Mesh::init();
    let running = mesh.start().await;
    let join = || pb::CreateTokenRequest { operation_id: vec![7; 16].into(), ..Default::default() };
    let operator = || pb::AddOperatorRequest {
        name: "alice".into(),
        role: "admin".into(),
        operation_id: vec![8; 16].into(),
    };
    let mut tokens = TokensClient::new(running.local().await);
    let mut operators = OperatorsClient::new(running.local().await);
    let first = tokens.create(join()).await.unwrap().into_inner();
    let login = operators.add(operator()).await.unwrap().into_inner().token;
    assert_eq!(tokens.create(join()).await.unwrap().into_inner(), first);
    assert_eq!(operators.add(operator()).await.unwrap().into_inner().token, login);
    assert_eq!(tokens.list(pb::Empty {}).await.unwrap().into_inner().tokens.len(), 2);
    // Somebody else who has learned the operation's id gets nothing.
    let mallory = self::login(&running, "mallory", "admin").await;
    let mut theirs = TokensClient::new(running.member(&mallory).await);
    assert_eq!(code(&theirs.create(join()).await.unwrap_err()), ErrorCode::Usage);
    // It is a token that works.
    let candidate = crate::harness::Candidate::new("alpha");
    candidate.enroll(running.stranger().await, &JoinToken::parse(&first.token)).await.unwrap();
    running.stop().await.unwrap();

    let running = mesh.start().await;
    let mut tokens = TokensClient::new(running.local().await);
    let refused = tokens.create(join()).await.unwrap_err();
    assert_eq!(code(&refused), ErrorCode::TokenAnswerGone);
    let mut operators = OperatorsClient::new(running.local().await);
    assert_eq!(code(&operators.add(operator()).await.unwrap_err()), ErrorCode::OperatorExists);
    running.stop().await.unwrap();
}
