//! A controller without its sockets, on virtual time: the real signer, writer, journal, snapshots, index and CRLs.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mesh_ca::LeafKey;
use mesh_core::{
    Actor, CertificateRecord, Command, DnsName, KeyId, NodeId, NodeName, OperationId, Owner, Reason, Request,
    Serial, TokenId, UtcTime, WgKey, Which,
};
use mesh_runtime::{Clock, SharedClock, ShutdownToken};
use time::UtcDateTime;

use crate::archive::Archive;
use crate::authority::{Authority, LeafRequest, WorldKeys};
use crate::config::{InitConfig, Publishing, Unlock};
use crate::controller::load_world;
use crate::directory::Directory;
use crate::history::History;
use crate::identity::leaf_of_node;
use crate::issuer::Issuing;
use crate::publish::Publisher;
use crate::retention::{Keeper, segment_span};
use crate::state::{StateDir, room_taken};
use crate::succession::{self, Wanted};
use crate::writer::{Committed, WriteError, Writer, WriterParts};

pub(crate) const DAY: u64 = 86_400;
pub(crate) const HOUR: u64 = 3_600;

/// A clock whose hands stand where they are put, together.
#[derive(Debug, Default)]
pub(crate) struct VirtualClock(AtomicI64);

impl VirtualClock {
    pub(crate) fn advance(&self, secs: u64) {
        self.0.fetch_add(secs.cast_signed(), Ordering::Relaxed);
    }
}

impl Clock for VirtualClock {
    fn utc_now(&self) -> UtcDateTime {
        UtcDateTime::from_unix_timestamp(1_795_363_200 + self.0.load(Ordering::Relaxed)).unwrap()
    }

    fn now(&self) -> Instant {
        Instant::now()
    }

    fn since_boot(&self) -> Duration {
        Duration::from_secs(self.0.load(Ordering::Relaxed).unsigned_abs())
    }
}

/// A controller without its sockets.
pub(crate) struct Rig {
    pub(crate) clock: Arc<VirtualClock>,
    pub(crate) state: StateDir,
    pub(crate) directory: Arc<Directory>,
    pub(crate) writer: Writer,
    thread: JoinHandle<()>,
    pub(crate) issuing: Issuing,
    pub(crate) publisher: Publisher,
    pub(crate) keeper: Keeper,
}

impl Rig {
    /// Opens what is in `root`, as a start of the controller does.
    pub(crate) async fn open(root: &Path, clock: &Arc<VirtualClock>, retention: Duration) -> Self {
        let shared: SharedClock = clock.clone();
        let (state, mut store) = StateDir::open(root).unwrap();
        store.journal.limit_segment_span(segment_span(retention));
        let journal: Box<dyn mesh_store::Journal> = Box::new(store.journal);
        let (world, head) = load_world(&state, &*journal, &store.snapshots).unwrap();
        let domain = mesh_ca::TrustDomain::parse("mesh.internal").unwrap();
        let authority =
            Authority::open(&state.keys(), &domain, &WorldKeys::of(&world), Unlock::None, None, None)
                .unwrap();
        let archive = Archive::new(journal.reader());
        let directory = Arc::new(Directory::new(world, head));
        let (writer, thread) = Writer::start(WriterParts {
            journal,
            directory: Arc::clone(&directory),
            clock: Arc::clone(&shared),
            fatal: ShutdownToken::new(),
        })
        .unwrap();
        let history =
            History::new(store.index, archive.clone(), Arc::clone(&directory), "mesh.internal".into());
        let issuing = Issuing::new(Arc::new(authority), Arc::clone(&directory), Arc::clone(&shared)).unwrap();
        let publishing = Publishing { url: Some("http://pki.mesh.internal".into()), shards: 4 };
        let parts = (Arc::clone(&shared), state.crls(), publishing);
        let publisher = Publisher::new(Arc::clone(&directory), writer.clone(), issuing.clone(), parts)
            .numbered_from(state.settings().unwrap().crl_number_floor.unwrap_or(0));
        publisher.open_shards().await.unwrap();
        publisher.start().await.unwrap();
        let (snapshots, retention) = (store.snapshots, Some(retention));
        let keeper = Keeper { directory: Arc::clone(&directory), history, archive, snapshots, retention };
        Self { clock: Arc::clone(clock), state, directory, writer, thread, issuing, publisher, keeper }
    }

    pub(crate) fn close(self) {
        self.writer.stop();
        self.thread.join().unwrap();
        self.keeper.history.close();
    }

    pub(crate) async fn submit(&self, actor: Actor, command: Command) {
        let operation = OperationId(mesh_runtime::random_bytes());
        self.writer.submit(Request { actor, operation, command }).await.unwrap();
    }

    /// Enrolls nodes 1 to `count` with one token.
    pub(crate) async fn enroll(&self, count: u32) {
        let token = TokenId(mesh_runtime::random_bytes());
        let create = Command::CreateToken {
            id: token,
            secret_hash: [7; 32],
            tags: Default::default(),
            name: None,
            uses: count,
            expires_at: UtcTime::from(self.clock.utc_now()) + Duration::from_secs(HOUR),
            require_approval: false,
        };
        self.submit(Actor::LocalRoot, create).await;
        for number in 1..=count {
            let (node, name) =
                (NodeId(number), NodeName::try_from(format!("node-{number}").as_str()).unwrap());
            let ipv4 = self.directory.read(|world| world.free_ipv4().next()).unwrap();
            let mut wireguard = WgKey(mesh_runtime::random_bytes());
            // Above the field's prime no encoding is canonical.
            wireguard.0[31] &= 0x3f;
            let leaf = self.directory.read(|world| leaf_of_node(world, node, &name, ipv4, &[wireguard]));
            let key = Arc::new(LeafKey::generate().unwrap());
            let certificate = self.issuing.sign_own(leaf.unwrap(), key).await.unwrap();
            let command = Command::Enroll { token, node, name, ipv4, wireguard, certificate };
            self.submit(Actor::Token { id: token }, command).await;
        }
    }

    /// A new identity for one node; returns the serial of the one before.
    pub(crate) async fn renew(&self, number: u32) -> Serial {
        let node = NodeId(number);
        let (leaf, serial, wireguard) = self.directory.read(|world| {
            let known = world.node(node).unwrap();
            let keys = known.wireguard.clone();
            let leaf = leaf_of_node(world, node, &known.name, known.ipv4.unwrap(), &keys).unwrap();
            (leaf, known.current.as_ref().unwrap().serial, keys)
        });
        let key = Arc::new(LeafKey::generate().unwrap());
        let certificate = self.issuing.sign_own(leaf, key).await.unwrap();
        let command = Command::RenewIdentity { node, wireguard, certificate, resume: false };
        self.submit(Actor::Node { id: node, serial }, command).await;
        serial
    }

    /// A certificate for a machine that is no node.
    pub(crate) async fn issue_detached(&self, lifetime: Duration) -> CertificateRecord {
        let name = DnsName::try_from("printer.mesh.internal").unwrap();
        let leaf = LeafRequest {
            profile: mesh_ca::Profile::Server,
            identity: None,
            owner: Owner::Detached { operator: None },
            names: vec![name],
            ips: vec![],
            wireguard: vec![],
            pair_name: "printer.mesh.internal".into(),
            lifetime,
            custom: None,
        };
        let key = Arc::new(LeafKey::generate().unwrap());
        let certificate = self.issuing.sign_own(leaf, key).await.unwrap();
        let command =
            Command::IssueCertificate { certificate: certificate.clone(), restart: false, made: None };
        self.submit(Actor::LocalRoot, command).await;
        certificate
    }

    pub(crate) async fn revoke(&self, serial: Serial) {
        self.try_revoke(serial).await.unwrap();
    }

    pub(crate) async fn try_revoke(&self, serial: Serial) -> Result<Committed, WriteError> {
        let command =
            Command::RevokeCertificates { which: Which::Serial(serial), reason: Reason::Superseded };
        let operation = OperationId(mesh_runtime::random_bytes());
        self.writer.submit(Request { actor: Actor::LocalRoot, operation, command }).await
    }

    /// Announces a new issuing CA, below a new root if one is wanted.
    pub(crate) async fn start_rotation(&self, with_root: bool) -> Result<Vec<KeyId>, WriteError> {
        let authority = self.issuing.authority();
        let (fleet, root) = self.directory.read(|world| {
            (world.fleet().unwrap_or_default().to_owned(), world.active_root().unwrap().clone())
        });
        let wanted = Wanted { root: with_root, key_type: None, now: self.clock.utc_now() };
        let prepared = succession::prepare(authority, &root, &fleet, &self.publisher, wanted).unwrap();
        let by = (Actor::LocalRoot, OperationId(mesh_runtime::random_bytes()), false);
        let started = prepared.announce(authority, &self.writer, by).await;
        self.follow_authorities();
        started
    }

    /// One step on, or back, of the rotation under way.
    pub(crate) async fn step_rotation(&self, command: fn(u64) -> Command) -> Result<Committed, WriteError> {
        let version = self.directory.read(mesh_core::World::bundle_version);
        let operation = OperationId(mesh_runtime::random_bytes());
        let stepped = self
            .writer
            .submit(Request { actor: Actor::LocalRoot, operation, command: command(version) })
            .await;
        self.follow_authorities();
        stepped
    }

    pub(crate) fn active_issuer(&self) -> KeyId {
        self.issuing.authority().issuer_key_id(crate::authority::CaRole::Issuing)
    }

    /// Takes up what World says of authorities, as the controller does after each record.
    pub(crate) fn follow_authorities(&self) {
        if let Some(known) = self.issuing.authority().news(&self.directory) {
            self.issuing.authority().discard_ended(&known);
        }
    }

    /// One day in which every node renews once, spread over it.
    pub(crate) async fn day(&self, nodes: u32) {
        const STEPS: u32 = 12;
        for step in 0..STEPS {
            self.clock.advance(DAY / u64::from(STEPS));
            let own: Vec<u32> = (1..=nodes).filter(|number| number % STEPS == step).collect();
            for some in own.chunks(64) {
                futures::future::join_all(some.iter().map(|number| self.renew(*number))).await;
            }
            self.publisher.refresh().await.unwrap();
            self.keeper.history.catch_up();
            self.keeper.sweep();
        }
    }

    /// Octets on disk. What waits to be written by the index is written first.
    pub(crate) fn size(&self) -> u64 {
        room_taken(self.state.root(), 0)
    }
}

pub(crate) fn init(folder: &Path, clock: &Arc<VirtualClock>) -> PathBuf {
    let root = folder.join("state");
    let config = InitConfig::unsealed(root.clone(), "mesh.internal");
    crate::init::init(config, clock.clone()).unwrap();
    root
}
