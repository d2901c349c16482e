//! What the controller may believe of an acknowledgement when this host's disk fails.

use mesh_proto::v1::sync_request::{Ack, Request as Told};

use super::*;
use crate::firewall::TABLE_NAME;
use crate::hostop::Changes;
use crate::network::{Setup, Worker};
use crate::testing::{TestMesh, full, in_own_network, record};

/// How long an acknowledgement may take.
const DEADLINE: Duration = Duration::from_secs(30);

/// An uplink in the middle of a stream, with a real network task behind it.
struct Fixture {
    folder: tempfile::TempDir,
    mesh: TestMesh,
    uplink: Uplink,
    channel: Channel,
    outgoing: mpsc::Sender<pb::SyncRequest>,
    told: mpsc::Receiver<pb::SyncRequest>,
}

impl Fixture {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mesh = TestMesh::new(time::UtcDateTime::now());
        let state = StateDir::open(&folder.path().join("state")).unwrap();
        state.save_identity(&mesh.node(1, "alpha")).unwrap();
        let clock = ControllerClock::new(Arc::new(mesh_runtime::SystemClock), 0);
        let findings = Findings::default();
        let identities = Arc::new(Identities::load(&state, &clock, &findings).unwrap().unwrap());
        let (host, changes) = (Host::open().unwrap(), Changes::listen(TABLE_NAME));
        let setup = Setup {
            host: host.clone(),
            changes: changes.clone(),
            state: state.clone(),
            clock: clock.clone(),
            findings: findings.clone(),
            interface: "mesh0".into(),
            mtu: 1280,
            wg_port: 0,
            backend: mesh_tunnel::Backend::Auto,
            active: identities.active(),
        };
        let (network, worker) = Worker::start(setup).await.unwrap();
        tokio::spawn(worker.run());
        network.take_crls(mesh.crls(1, &[])).await.unwrap();
        let (pairs, _inbox, _settled) = crate::certs::wire();
        let (_, uplink) =
            Uplink::new(state, clock, findings, identities, network, pairs, (host, changes.network));
        let (outgoing, told) = mpsc::channel(16);
        // Nothing listens there: the tests' messages give no reason to call.
        let channel = tonic::transport::Endpoint::from_static("http://127.0.0.1:1").connect_lazy();
        Self { folder, mesh, uplink, channel, outgoing, told }
    }

    /// The controller says `response`.
    async fn hears(&mut self, full: pb::Full) {
        let message = pb::SyncResponse { response: Some(Response::Full(full)), controller_time: 0 };
        let taken = self.uplink.take(message, &self.channel, &self.outgoing).await;
        assert!(taken.is_ok(), "the stream goes on");
    }

    async fn ack(&mut self) -> Ack {
        let request = tokio::time::timeout(DEADLINE, self.told.recv()).await.unwrap().unwrap();
        match request.request {
            Some(Told::Ack(ack)) => ack,
            other => panic!("an acknowledgement, not {other:?}"),
        }
    }
}

#[test]
fn nothing_is_acknowledged_that_the_disk_did_not_take() {
    in_own_network("uplink::tests::nothing_is_acknowledged_that_the_disk_did_not_take", || {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let mut fixture = Fixture::new().await;
            let bravo = record(&fixture.mesh.node(2, "bravo"));
            fixture.hears(full(1, vec![bravo.clone()])).await;
            let ack = fixture.ack().await;
            assert_eq!((ack.seq, ack.findings.len()), (1, 0), "{:?}", ack.findings);

            // A folder in the place of a file cannot be replaced by one.
            let state = fixture.folder.path().join("state");
            let blocked = ["map.bin", "crls.bin"].map(|name| state.join(name));
            for path in &blocked {
                std::fs::remove_file(path).unwrap();
                std::fs::create_dir(path).unwrap();
            }
            let crls = fixture.mesh.crls(2, &[]);
            fixture.uplink.network.take_crls(crls).await.unwrap();
            fixture.hears(full(2, Vec::new())).await;
            let ack = fixture.ack().await;
            assert_eq!(ack.seq, 1, "what took effect and is not on disk is not acknowledged");
            assert!(ack.crls.iter().all(|have| have.number == 1), "{:?}", ack.crls);
            assert!(ack.findings.iter().any(|line| line.contains("the state folder")), "{:?}", ack.findings);
            let hello = fixture.uplink.hello().await.map_err(|_| "no greeting").unwrap();
            assert_eq!(hello.cursor, None, "a greeting's cursor is a receipt too");
            assert!(hello.crls.iter().all(|have| have.number == 1), "{:?}", hello.crls);

            // The disk is well again: the network task stores what it has, and the stream hears of it.
            for path in &blocked {
                std::fs::remove_dir(path).unwrap();
            }
            let stored = async {
                while fixture.uplink.network.receipt.borrow().seq < 2 {
                    fixture.uplink.network.receipt.changed().await.unwrap();
                }
            };
            tokio::time::timeout(DEADLINE, stored).await.expect("stored at a tick");
            assert!(fixture.uplink.acknowledge(&fixture.outgoing).await.is_ok());
            let ack = fixture.ack().await;
            assert_eq!(ack.seq, 2);
            assert!(ack.crls.iter().all(|have| have.number == 2), "{:?}", ack.crls);
        });
    });
}
