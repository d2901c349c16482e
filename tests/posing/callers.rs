//! Who may call what, tried with every kind of certificate on every method.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use mesh_ca::{Csr, LeafKey, TrustAnchors, TrustDomain};
use mesh_proto::v1 as pb;
use mesh_runtime::{ManualClock, SharedClock, ShutdownToken};
use mesh_tests::{CONTROLLER, Fleet, fleet_test};
use rustls_pki_types::CertificateDer;

use crate::{
    credential::{Credential, DOMAIN, config_under},
    rpc::{Outcome, call_all, call_empty, channel, methods, operation},
};

/// What only a node may call. Written out here, so that a change of the product's table is seen.
const NODE_ONLY: [&str; 5] = [
    "/mesh.v1.Renewal/Renew",
    "/mesh.v1.Renewal/Resume",
    "/mesh.v1.Sync/Sync",
    "/mesh.v1.Relay/Open",
    "/mesh.v1.Nodes/Leave",
];
/// What a node may call as operators do, for what is its own.
const NODES_TOO: [&str; 6] = [
    "/mesh.v1.Certificates/Issue",
    "/mesh.v1.Certificates/Explain",
    "/mesh.v1.Certificates/List",
    "/mesh.v1.Certificates/Get",
    "/mesh.v1.Certificates/Revoke",
    "/mesh.v1.Certificates/Crls",
];
/// What a token in the message opens.
const TOKEN_HOLDERS: [&str; 2] = ["/mesh.v1.Enrollment/Enroll", "/mesh.v1.Operators/Login"];
/// A copy of the CA is for root on the controller's host.
const ROOT_ONLY: [&str; 1] = ["/mesh.v1.Ca/Backup"];
/// Revocation lists are for everybody with a certificate.
const MEMBERS: [&str; 1] = ["/mesh.v1.Certificates/Crls"];

fn without(allowed: &[&str]) -> Vec<String> {
    methods().into_iter().filter(|path| !allowed.contains(&path.as_str())).collect()
}

/// Each call was refused at the gate, and for the reason `why`.
fn assert_all(why: pb::ErrorCode, who: &str, outcomes: Vec<(String, Outcome)>) {
    assert!(!outcomes.is_empty());
    let denied = |outcome: &Outcome| matches!(outcome, Outcome::Denied(code) if *code == why);
    let passed: Vec<_> = outcomes.iter().filter(|(_, outcome)| !denied(outcome)).collect();
    assert!(passed.is_empty(), "{who} was not refused with {why:?}: {passed:#?}");
}

fn assert_all_denied(who: &str, outcomes: Vec<(String, Outcome)>) {
    assert_all(pb::ErrorCode::Denied, who, outcomes);
}

fn assert_reached(who: &str, outcomes: Vec<(String, Outcome)>) {
    for (path, outcome) in &outcomes {
        assert!(!outcome.is_denied(), "{who} is kept from {path}: {outcome:?}");
    }
}

/// Each method was refused to an identity that has ended. The controller ends such connections as it hears of changes, maybe
/// in the midst of these calls: what was cut off is asked again.
fn assert_ended(fleet: &Fleet, host: &str, credential: &Credential, who: &str) {
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut left = methods();
    while !left.is_empty() {
        assert!(Instant::now() < deadline, "{who} is cut off again and again: {left:?}");
        let outcomes = call_all(fleet, host, Some(credential), &left);
        let (cut, answered): (Vec<_>, Vec<_>) =
            outcomes.into_iter().partition(|(_, outcome)| outcome.is_cut());
        left = cut.into_iter().map(|(path, _)| path).collect();
        if !answered.is_empty() {
            assert_all(pb::ErrorCode::IdentityRevoked, who, answered);
        }
    }
}

fn owned(paths: &[&str]) -> Vec<String> {
    paths.iter().map(ToString::to_string).collect()
}

#[test]
fn every_kind_of_caller_is_kept_to_its_own_methods() {
    fleet_test("callers::every_kind_of_caller_is_kept_to_its_own_methods", || {
        let mut fleet = Fleet::with_nodes(&["alpha"]);

        // A certificate that a service holds, readable by whoever runs the service.
        for profile in ["server", "client", "peer"] {
            let out = fleet.path("alpha").join(profile);
            let name = format!("{profile}.alpha.{DOMAIN}");
            let args = ["cert", "issue", &name, "--profile", profile, "--out", out.to_str().unwrap()];
            fleet.meshctl("alpha", &args).ok();
            if profile == "server" {
                // Without the client purpose it is refused in the handshake already.
                continue;
            }
            let pair = Credential::of_pair(&out);
            let who = format!("a {profile} pair");
            assert_all_denied(&who, call_all(&fleet, "alpha", Some(&pair), &without(&MEMBERS)));
            assert_reached(&who, call_all(&fleet, "alpha", Some(&pair), &owned(&MEMBERS)));
        }

        assert_all_denied("nobody", call_all(&fleet, "alpha", None, &without(&TOKEN_HOLDERS)));
        assert_reached("nobody", call_all(&fleet, "alpha", None, &owned(&TOKEN_HOLDERS)));

        let node = Credential::of_node(&fleet, "alpha");
        let allowed = [&NODE_ONLY[..], &NODES_TOO].concat();
        assert_all_denied("a node", call_all(&fleet, "alpha", Some(&node), &without(&allowed)));
        // Not Leave, which would succeed.
        let harmless = [&NODE_ONLY[..3], &NODES_TOO].concat();
        assert_reached("a node", call_all(&fleet, "alpha", Some(&node), &owned(&harmless)));

        fleet.add_host("desk");
        log_in(&fleet, "desk", "alice", "admin");
        let admin = Credential::of_operator(&fleet, "desk");
        let kept_out = owned(&[&NODE_ONLY[..], &TOKEN_HOLDERS, &ROOT_ONLY].concat());
        assert_all_denied("an admin", call_all(&fleet, "desk", Some(&admin), &kept_out));
        let listings = owned(&["/mesh.v1.Nodes/List", "/mesh.v1.Operators/List", "/mesh.v1.Ca/Show"]);
        assert_reached("an admin", call_all(&fleet, "desk", Some(&admin), &listings));

        // Once revoked, by whatever name, nothing is left; not even what strangers may do.
        fleet.controller(&["operator", "rm", "alice", "--yes"]).ok();
        assert_ended(&fleet, "desk", &admin, "a removed admin");
        fleet.controller(&["node", "revoke", "alpha", "--yes"]).ok();
        assert_ended(&fleet, "alpha", &node, "a revoked node");
    });
}

#[test]
fn a_server_pair_is_no_client() {
    fleet_test("callers::a_server_pair_is_no_client", || {
        let fleet = Fleet::with_nodes(&["alpha"]);
        let out = fleet.path("alpha").join("tls");
        let name = format!("api.alpha.{DOMAIN}");
        let args = ["cert", "issue", &name, "--profile", "server", "--out", out.to_str().unwrap()];
        fleet.meshctl("alpha", &args).ok();
        let pair = Credential::of_pair(&out);
        let config = crate::credential::client_config(&fleet, Some(&pair));
        let address = crate::rpc::controller(&fleet);
        let outcome = crate::rpc::on_host(&fleet, "alpha", || async move {
            match channel(address, config).await {
                // In TLS 1.3 the client hears of the refusal with its first read.
                Ok(channel) => format!("{:?}", call_empty(&channel, "/mesh.v1.Certificates/Crls").await),
                Err(error) => format!("no connection: {error:?}"),
            }
        });
        assert!(!outcome.contains("Reached(Ok"), "{outcome}");
        assert!(!fleet.processes.log(CONTROLLER).contains("panicked"));
    });
}

#[test]
fn roles_are_kept_over_the_wire() {
    fleet_test("callers::roles_are_kept_over_the_wire", || {
        let mut fleet = Fleet::with_nodes(&["alpha"]);
        fleet.add_host("desk");
        log_in(&fleet, "desk", "eve", "auditor");
        let as_eve = |fleet: &Fleet, args: &[&str]| {
            let mut command = fleet.command("desk", mesh_tests::binary("meshctl"), &[]);
            command.arg("--controller").arg(fleet.controller_url()).args(args);
            mesh_tests::run(command)
        };
        as_eve(&fleet, &["node", "ls"]).ok();
        for args in [
            &["token", "create"][..],
            &["node", "revoke", "alpha", "--yes"],
            &["node", "tag", "alpha", "+db"],
            &["operator", "add", "mallory", "--role", "admin"],
            &["operator", "add", "eve", "--role", "admin"],
            &["operator", "rm", "eve", "--yes"],
        ] {
            let refused = as_eve(&fleet, args);
            assert_eq!(refused.code, 4, "{refused}");
        }
        let alpha = fleet.controller(&["node", "show", "alpha", "-o", "json"]).ok();
        assert!(!alpha.stdout.contains("\"db\"") && !alpha.stdout.contains("revoked\""), "{alpha}");
    });
}

/// `name` becomes an operator of `role` on host `host`.
pub(crate) fn log_in(fleet: &Fleet, host: &str, name: &str, role: &str) {
    let added = fleet.controller(&["operator", "add", name, "--role", role]).ok();
    let file = fleet.path(host).join("operator-token");
    std::fs::write(&file, added.stdout.trim()).unwrap();
    let mut login = fleet.command(host, mesh_tests::binary("meshctl"), &["login"]);
    login.arg(fleet.controller_url()).arg("--token-file").arg(&file);
    mesh_tests::run(login).ok();
    std::fs::remove_file(file).unwrap();
}

/// In this process, because only here the controller's clock can be moved by days.
#[tokio::test(flavor = "multi_thread")]
async fn an_expired_node_reaches_resume_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let moved = Arc::new(ManualClock::new(time::UtcDateTime::now()));
    let clock: SharedClock = moved.clone();
    let state_dir = folder.path().join("state");
    let init = mesh_controller::InitConfig::unsealed(state_dir.clone(), DOMAIN);
    mesh_controller::init(init, Arc::clone(&clock)).unwrap();
    let config = mesh_controller::RunConfig {
        state_dir,
        listen: "127.0.0.1:0".parse().unwrap(),
        socket: folder.path().join("controller.sock"),
        advertise: vec![],
        passphrase: None,
        key_store: None,
        pin: None,
        publish_listen: vec![],
        publishing: mesh_controller::Publishing::default(),
        stun_listen: mesh_controller::StunListen::LikeTls,
        relay: Some(mesh_controller::RelayLimit::default()),
        metrics_listen: None,
        retention: None,
        announce: false,
    };
    let socket = config.socket.clone();
    let environment = mesh_controller::Environment { clock, journal: None };
    let controller = mesh_controller::Controller::build(config, environment).await.unwrap();
    let address = controller.local_addr().unwrap();
    let shutdown = ShutdownToken::new();
    let task = tokio::spawn(controller.run(shutdown.clone()));

    let root = local(&socket).await;
    let shown = pb::ca_client::CaClient::new(root.clone()).show(pb::Empty {}).await.unwrap().into_inner();
    let anchors = TrustAnchors::new(TrustDomain::parse(DOMAIN).unwrap(), [&shown.roots[0].der]).unwrap();
    let anchors = Arc::new(anchors);
    let created = pb::tokens_client::TokensClient::new(root.clone())
        .create(pb::CreateTokenRequest { operation_id: operation(), ..Default::default() })
        .await
        .unwrap();
    let token = crate::join::open(&created.into_inner().token);
    let key = LeafKey::generate().unwrap();
    // Clients live in the controller's time: whoever redials sees a certificate that is good then.
    let config_of = |credential: Option<&Credential>| {
        let mut config = config_under(Arc::clone(&anchors), credential);
        config.time_provider = Arc::new(TimeOf(Arc::clone(&moved)));
        config
    };
    let stranger = channel(address, config_of(None)).await.unwrap();
    let request = crate::join::request(&token, "web-1", &key);
    let wireguard = request.wireguard_public_key.clone();
    let answer = pb::enrollment_client::EnrollmentClient::new(stranger).enroll(request).await.unwrap();
    let Some(pb::enroll_response::Outcome::Enrolled(enrolled)) = answer.into_inner().outcome else {
        panic!("the node is enrolled")
    };
    let chain = [enrolled.leaf, enrolled.issuers[0].clone()];
    let node = Credential {
        chain: chain.iter().map(|der| CertificateDer::from(der.to_vec())).collect(),
        key: key.to_rustls_der(),
    };

    // An open connection and a new one: neither the age of the handshake nor its novelty matters.
    let old = channel(address, config_of(Some(&node))).await.unwrap();
    assert!(!call_empty(&old, "/mesh.v1.Certificates/List").await.is_denied());
    moved.advance(Duration::from_secs(73 * 3600));
    let new = connected_once_renewed(address, config_of(Some(&node)), &root).await;
    for path in methods() {
        for connection in [&old, &new] {
            let outcome = call_empty(connection, &path).await;
            assert_eq!(outcome.is_denied(), path != "/mesh.v1.Renewal/Resume", "{path}: {outcome:?}");
        }
    }
    // It really is the way back.
    let next = LeafKey::generate().unwrap();
    let request = pb::RenewRequest {
        csr: Csr::create(&next).unwrap().into(),
        wireguard_public_keys: vec![wireguard],
        operation_id: operation(),
    };
    let resumed = pb::renewal_client::RenewalClient::new(new.clone()).resume(request).await.unwrap();
    assert_eq!(resumed.into_inner().name, "web-1");
    // Beyond the window not even that.
    moved.advance(Duration::from_secs(40 * 24 * 3600));
    let late = connected_once_renewed(address, config_of(Some(&node)), &root).await;
    for path in methods() {
        let outcome = call_empty(&late, &path).await;
        assert!(outcome.is_denied() || is_window_passed(&outcome), "{path}: {outcome:?}");
    }
    shutdown.cancel();
    task.await.unwrap().unwrap();
}

/// Connects as soon as the controller shows a certificate that is good at the moved time. It looks at its own age
/// whenever something is recorded, so something is.
async fn connected_once_renewed(
    address: std::net::SocketAddr,
    config: rustls::ClientConfig,
    root: &tonic::transport::Channel,
) -> tonic::transport::Channel {
    let deadline = std::time::Instant::now() + Duration::from_secs(30);
    loop {
        pb::tokens_client::TokensClient::new(root.clone())
            .create(pb::CreateTokenRequest { operation_id: operation(), ..Default::default() })
            .await
            .unwrap();
        match channel(address, config.clone()).await {
            Ok(channel) => return channel,
            Err(error) => assert!(std::time::Instant::now() < deadline, "not renewed: {error:?}"),
        }
    }
}

/// What a clock that is moved shows, for TLS.
#[derive(Debug)]
struct TimeOf(Arc<ManualClock>);

impl rustls::time_provider::TimeProvider for TimeOf {
    fn current_time(&self) -> Option<rustls_pki_types::UnixTime> {
        let seconds = u64::try_from(mesh_runtime::Clock::utc_now(&*self.0).unix_timestamp()).ok()?;
        Some(rustls_pki_types::UnixTime::since_unix_epoch(Duration::from_secs(seconds)))
    }
}

fn is_window_passed(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Reached(Err(status))
        if crate::rpc::error_code(status) == pb::ErrorCode::ResumeWindowPassed)
}

async fn local(socket: &std::path::Path) -> tonic::transport::Channel {
    let socket = socket.to_owned();
    tonic::transport::Endpoint::from_static("http://localhost")
        .connect_with_connector(tower::service_fn(move |_: tonic::transport::Uri| {
            let socket = socket.clone();
            async move { tokio::net::UnixStream::connect(socket).await.map(hyper_util::rt::TokioIo::new) }
        }))
        .await
        .unwrap()
}
