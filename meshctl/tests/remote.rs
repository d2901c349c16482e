//! `meshctl` against a controller that says what a test wants: exit codes, JSON and text of the contract.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::mpsc,
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
    service::TowerToHyperService,
};
use mesh_proto::v1::{
    self as pb, ErrorCode,
    nodes_server::{Nodes, NodesServer},
    receipt::State,
};
use prost::Message as _;
use tonic::{Code, Request, Response, Status};

/// Knows one node, `old-1`; `slow` never answers, `hostile` tries to paint the terminal.
struct Controller;

fn now() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    now.as_secs().try_into().unwrap()
}

fn not_found(name: &str) -> Status {
    let detail = pb::ErrorDetail {
        code: ErrorCode::NodeNotFound.into(),
        why: "no node has that name".into(),
        next: "`meshctl node ls` shows all".into(),
        exit: 6,
        facts: vec![],
    };
    Status::with_details(Code::NotFound, format!("there is no node {name}"), detail.encode_to_vec().into())
}

fn receipt(node: &str, state: State, last_seen: i64, lease_ends: i64) -> pb::Receipt {
    pb::Receipt { node: node.into(), state: state.into(), last_seen, lease_ends }
}

#[tonic::async_trait]
impl Nodes for Controller {
    async fn list(&self, _: Request<pb::Empty>) -> Result<Response<pb::ListNodesResponse>, Status> {
        Ok(Response::new(pb::ListNodesResponse::default()))
    }

    async fn get(&self, request: Request<pb::NodeRequest>) -> Result<Response<pb::Node>, Status> {
        match request.into_inner().name.as_str() {
            "slow" => std::future::pending().await,
            "hostile" => Ok(Response::new(pb::Node {
                name: "hostile".into(),
                state: "ok\u{1b}[2J\u{7}".into(),
                reason: "line\nbreak".into(),
                ..pb::Node::default()
            })),
            name => Err(not_found(name)),
        }
    }

    async fn approve(&self, _: Request<pb::NodeRequest>) -> Result<Response<pb::ActionResponse>, Status> {
        let detail = "was let in before".into();
        Ok(Response::new(pb::ActionResponse { changed: false, detail, incomplete: false }))
    }

    async fn tag(
        &self,
        request: Request<pb::TagNodeRequest>,
    ) -> Result<Response<pb::ActionResponse>, Status> {
        let request = request.into_inner();
        assert_eq!(request.operation_id.len(), 16);
        let detail = format!("add {:?} remove {:?}", request.add, request.remove);
        Ok(Response::new(pb::ActionResponse { changed: true, detail, incomplete: false }))
    }

    async fn revoke(
        &self,
        request: Request<pb::RevokeNodeRequest>,
    ) -> Result<Response<pb::RevokeResponse>, Status> {
        let request = request.into_inner();
        if request.name != "old-1" {
            return Err(not_found(&request.name));
        }
        assert_eq!(request.reason, "key-compromise");
        let receipts = vec![
            receipt("web-1", State::Acknowledged, now(), 0),
            receipt("db-1", State::Acknowledged, now(), 0),
            receipt("db-2", State::Offline, now() - 3 * 3600 - 60, 1_795_511_520),
        ];
        Ok(Response::new(pb::RevokeResponse {
            changed: true,
            revoked: vec![pb::Certificate { serial: vec![7; 16].into(), ..pb::Certificate::default() }; 2],
            crl_number: 42,
            receipts: if request.wait_secs > 0 { receipts } else { vec![] },
            tokens_void: 1,
            streams_closed: 2,
            peer_removed: true,
            waited_ms: 400,
        }))
    }

    async fn remove(
        &self,
        request: Request<pb::RevokeNodeRequest>,
    ) -> Result<Response<pb::RevokeResponse>, Status> {
        Err(not_found(&request.into_inner().name))
    }

    async fn rotate_keys(&self, _: Request<pb::NodeRequest>) -> Result<Response<pb::ActionResponse>, Status> {
        Err(Status::unavailable("going down"))
    }

    async fn leave(&self, _: Request<pb::Empty>) -> Result<Response<pb::ActionResponse>, Status> {
        Err(Status::permission_denied("nodes only"))
    }
}

/// A controller on a socket of its own, for as long as the test runs.
struct Served {
    folder: tempfile::TempDir,
}

impl Served {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (ready, started) = mpsc::channel();
        let socket = Self::socket_in(folder.path());
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = tokio::net::UnixListener::bind(socket).unwrap();
                ready.send(()).unwrap();
                loop {
                    let (stream, _) = listener.accept().await.unwrap();
                    let service = TowerToHyperService::new(NodesServer::new(Controller));
                    let server = auto::Builder::new(TokioExecutor::new());
                    tokio::spawn(async move { server.serve_connection(TokioIo::new(stream), service).await });
                }
            });
        });
        started.recv_timeout(Duration::from_secs(20)).unwrap();
        Self { folder }
    }

    fn socket_in(folder: &Path) -> PathBuf {
        folder.join("controller.sock")
    }

    /// Exit code, stdout, stderr.
    fn meshctl(&self, arguments: &[&str]) -> (i32, String, String) {
        let socket = Self::socket_in(self.folder.path());
        let output = Command::new(env!("CARGO_BIN_EXE_meshctl"))
            .arg("--controller")
            .arg(format!("unix:{}", socket.display()))
            .args(arguments)
            .env("MESH_CONTEXT", self.folder.path().join("context.toml"))
            .env_remove("MESH_SOCKET")
            .env_remove("MESH_TIMEOUT")
            .output()
            .unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
    }
}

#[test]
fn a_revocation_that_did_not_reach_all_ends_with_exit_3_and_says_who_is_missing() {
    let served = Served::start();
    let (exit, stdout, stderr) =
        served.meshctl(&["node", "revoke", "old-1", "--reason", "key-compromise", "--wait"]);
    assert_eq!((exit, stderr.as_str()), (3, ""));
    insta::assert_snapshot!(stdout, @r"
    node old-1: 2 certificates revoked (CRL #42), WireGuard peer removed, 1 token void, 2 open streams closed
    acknowledged by web-1 db-1 (2/3) in 0.4s
    not reached: db-2, last seen 3h ago; it drops old-1 by 2026-11-24T09:12Z at the latest (lease)
    ");
    // Nobody was waited for, so nobody is missing.
    let (exit, stdout, _) = served.meshctl(&["node", "revoke", "old-1", "--reason", "key-compromise"]);
    assert_eq!((exit, stdout.lines().count()), (0, 1), "{stdout}");
}

#[test]
fn json_is_one_document_whatever_happens() {
    let served = Served::start();
    let empty = "{\n  \"apiVersion\": \"mesh/v1\",\n  \"kind\": \"NodeList\",\n  \"items\": []\n}\n";
    assert_eq!(served.meshctl(&["node", "ls", "-o", "json"]), (0, empty.to_owned(), String::new()));
    let table: [(&[&str], i32); 5] = [
        (&["node", "show", "nobody"], 6),
        (&["node", "approve", "web-1"], 0),
        (&["node", "revoke", "old-1", "--reason", "key-compromise", "--wait=5s"], 3),
        (&["node", "rotate-keys", "web-1"], 5),
        (&["node", "rm", "nobody"], 6),
    ];
    for (arguments, expected) in table {
        let (exit, stdout, _) = served.meshctl(&[arguments, &["-o", "json"]].concat());
        assert_eq!(exit, expected, "{arguments:?}: {stdout}");
        let document: serde_json::Value = serde_json::from_str(&stdout).unwrap();
        assert_eq!(document["apiVersion"], "mesh/v1", "{arguments:?}");
        let failed = document["kind"] == "Error";
        assert!(failed || document["changed"].is_boolean(), "{document}");
    }
}

#[test]
fn an_unknown_node_is_exit_6_with_the_controllers_own_words() {
    let served = Served::start();
    let (exit, stdout, stderr) = served.meshctl(&["node", "show", "nobody"]);
    assert_eq!((exit, stdout.as_str()), (6, ""));
    insta::assert_snapshot!(stderr, @r"
    error[E0601]: there is no node nobody
      why: no node has that name
      do:  `meshctl node ls` shows all
    ");
}

#[test]
fn doing_it_again_changes_nothing_and_succeeds() {
    let served = Served::start();
    let (exit, stdout, _) = served.meshctl(&["node", "approve", "web-1"]);
    assert_eq!((exit, stdout.as_str()), (0, "node web-1 was approved already\n"));
}

#[test]
fn tags_are_added_and_removed_by_their_sign() {
    let served = Served::start();
    let (exit, stdout, _) = served.meshctl(&["node", "tag", "web-1", "+web", "-db"]);
    assert_eq!((exit, stdout.as_str()), (0, "add [\"web\"] remove [\"db\"]\n"));
    let (exit, stdout, stderr) = served.meshctl(&["node", "tag", "web-1", "+web", "-db", "-o", "json"]);
    assert_eq!(exit, 0, "{stderr}");
    let document: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(document["detail"], "add [\"web\"] remove [\"db\"]");
    let (exit, stdout, _) = served.meshctl(&["node", "tag", "web-1", "+web", "-q", "--", "-q"]);
    assert_eq!((exit, stdout.as_str()), (0, ""));
}

#[test]
fn a_controller_that_does_not_answer_is_exit_5_after_the_given_time() {
    let served = Served::start();
    let (exit, _, stderr) = served.meshctl(&["node", "show", "slow", "--timeout", "300ms"]);
    assert_eq!(exit, 5);
    assert!(stderr.starts_with("error[E0203]"), "{stderr}");
}

#[test]
fn what_a_controller_says_cannot_steer_the_terminal() {
    let served = Served::start();
    let (exit, stdout, _) = served.meshctl(&["node", "show", "hostile", "--color", "always"]);
    assert_eq!(exit, 0);
    assert!(stdout.contains("\\u{1b}[2J\\u{7}") && stdout.contains("line\\u{a}break"), "{stdout:?}");
    assert!(!stdout.contains("\u{1b}[2J") && !stdout.contains('\u{7}'), "{stdout:?}");
}

#[test]
fn colours_are_for_terminals_unless_asked_for() {
    let served = Served::start();
    let (_, piped, _) = served.meshctl(&["node", "show", "hostile"]);
    assert!(!piped.contains('\u{1b}'), "{piped:?}");
    let (_, forced, _) = served.meshctl(&["node", "show", "hostile", "--color", "always"]);
    assert!(forced.contains("\u{1b}["), "{forced:?}");
}
