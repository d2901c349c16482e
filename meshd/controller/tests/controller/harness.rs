//! A controller on loopback in this process, and clients that speak to it as nodes and operators do.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use hyper_util::rt::TokioIo;
use mesh_ca::{ControllerVerifier, Csr, LeafKey, PinnedControllerVerifier, TrustAnchors, TrustDomain};
use mesh_controller::{
    Controller, Environment, InitConfig, Publishing, RelayLimit, RunConfig, StartupError, StunListen,
};
use mesh_proto::v1 as pb;
use mesh_runtime::{SharedClock, ShutdownToken, SystemClock};
use mesh_store::Journal;
use prost::Message as _;
use rustls::ClientConfig;
use rustls_pki_types::{CertificateDer, ServerName};
use tempfile::TempDir;
use tokio::net::{TcpStream, UnixStream};
use tokio::task::JoinHandle;
use tonic::transport::{Channel, Endpoint, Uri};

pub(crate) const DOMAIN: &str = "mesh.internal";

/// A state directory with a controller in it, running or not.
pub(crate) struct Mesh {
    folder: TempDir,
    pub(crate) clock: SharedClock,
}

/// A running controller.
pub(crate) struct Running {
    pub(crate) address: SocketAddr,
    pub(crate) socket: PathBuf,
    pub(crate) root: CertificateDer<'static>,
    clock: SharedClock,
    shutdown: ShutdownToken,
    task: JoinHandle<Result<(), StartupError>>,
}

impl Mesh {
    pub(crate) fn init() -> Self {
        Self::init_at(Arc::new(SystemClock))
    }

    pub(crate) fn init_at(clock: SharedClock) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mesh = Self { folder, clock };
        mesh_controller::init(mesh.init_config(), Arc::clone(&mesh.clock)).unwrap();
        mesh
    }

    /// Before `init`.
    pub(crate) fn empty() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), clock: Arc::new(SystemClock) }
    }

    pub(crate) fn state_dir(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    pub(crate) fn init_config(&self) -> InitConfig {
        InitConfig { fleet: "test".into(), ..InitConfig::unsealed(self.state_dir(), DOMAIN) }
    }

    pub(crate) fn run_config(&self) -> RunConfig {
        RunConfig {
            state_dir: self.state_dir(),
            listen: "127.0.0.1:0".parse().unwrap(),
            socket: self.folder.path().join("controller.sock"),
            advertise: vec![],
            passphrase: None,
            key_store: None,
            pin: None,
            publish_listen: vec![],
            publishing: Publishing::default(),
            stun_listen: StunListen::LikeTls,
            relay: Some(RelayLimit::default()),
            metrics_listen: None,
            retention: Some(Duration::from_secs(30 * 86_400)),
            announce: false,
        }
    }

    pub(crate) async fn start(&self) -> Running {
        self.start_with(None).await
    }

    /// Where `running` serves over plain HTTP.
    pub(crate) fn web(&self) -> Vec<SocketAddr> {
        let text = std::fs::read_to_string(self.state_dir().join("publish-listen")).unwrap();
        text.lines().map(|line| line.parse().unwrap()).collect()
    }

    pub(crate) async fn start_with(&self, journal: Option<Box<dyn Journal>>) -> Running {
        self.start_config(self.run_config(), journal).await
    }

    /// Starts with a changed configuration.
    pub(crate) async fn start_as(&self, change: impl FnOnce(&mut RunConfig)) -> Running {
        let mut config = self.run_config();
        change(&mut config);
        self.start_config(config, None).await
    }

    pub(crate) async fn start_config(&self, config: RunConfig, journal: Option<Box<dyn Journal>>) -> Running {
        let socket = config.socket.clone();
        let environment = Environment { clock: Arc::clone(&self.clock), journal };
        let controller = Controller::build(config, environment).await.unwrap();
        let address = controller.local_addr().unwrap();
        let shutdown = ShutdownToken::new();
        let task = tokio::spawn(controller.run(shutdown.clone()));
        let clock = Arc::clone(&self.clock);
        let root = CertificateDer::from(vec![]);
        let mut running = Running { address, socket, root, clock, shutdown, task };
        let ca = pb::ca_client::CaClient::new(running.local().await).show(pb::Empty {}).await.unwrap();
        running.root = CertificateDer::from(ca.into_inner().roots[0].der.to_vec());
        running
    }
}

impl Running {
    pub(crate) async fn stop(self) -> Result<(), StartupError> {
        self.shutdown.cancel();
        self.task.await.unwrap()
    }

    /// Waits for the controller to end by itself.
    pub(crate) async fn ended(self) -> Result<(), StartupError> {
        self.task.await.unwrap()
    }

    /// Local root over the Unix socket.
    pub(crate) async fn local(&self) -> Channel {
        let socket = self.socket.clone();
        Endpoint::from_static("http://localhost")
            .connect_with_connector(tower::service_fn(move |_: Uri| {
                let socket = socket.clone();
                async move { UnixStream::connect(socket).await.map(TokioIo::new) }
            }))
            .await
            .unwrap()
    }

    pub(crate) fn anchors(&self) -> Arc<TrustAnchors> {
        Arc::new(TrustAnchors::new(TrustDomain::parse(DOMAIN).unwrap(), [&self.root]).unwrap())
    }

    /// A stranger who checks the controller by its pinned root.
    pub(crate) async fn stranger(&self) -> Channel {
        self.try_connect(None).await.unwrap()
    }

    /// Somebody with a certificate.
    pub(crate) async fn member(&self, identity: &Identity) -> Channel {
        self.try_connect(Some(identity)).await.unwrap()
    }

    pub(crate) async fn try_connect(
        &self,
        identity: Option<&Identity>,
    ) -> Result<Channel, tonic::transport::Error> {
        connect(self.address, client_config(self.anchors(), identity, &self.clock)).await
    }

    pub(crate) async fn token(&self, request: pb::CreateTokenRequest) -> JoinToken {
        let mut tokens = pb::tokens_client::TokensClient::new(self.local().await);
        let token = tokens.create(request).await.unwrap().into_inner().token;
        JoinToken::parse(&token)
    }

    pub(crate) async fn plain_token(&self) -> JoinToken {
        self.token(pb::CreateTokenRequest::default()).await
    }

    /// Enrolls a node with a token of its own.
    pub(crate) async fn enroll(&self, name: &str) -> Node {
        let token = self.plain_token().await;
        let candidate = Candidate::new(name);
        let enrolled = candidate.enroll(self.stranger().await, &token).await.unwrap();
        candidate.into_node(enrolled)
    }

    /// Signs a service certificate for `node`.
    pub(crate) async fn service(&self, node: &Node, name: &str, profile: &str) -> Identity {
        let key = LeafKey::generate().unwrap();
        let mut client = pb::certificates_client::CertificatesClient::new(self.member(&node.identity).await);
        let issued = client.issue(issue_request(&key, &[name], profile)).await.unwrap().into_inner();
        Identity { leaf: issued.leaf.to_vec(), issuer: issued.issuers[0].to_vec(), key: Arc::new(key) }
    }
}

pub(crate) fn issue_request(key: &LeafKey, names: &[&str], profile: &str) -> pb::IssueRequest {
    pb::IssueRequest {
        csr: Csr::create(key).unwrap().into(),
        names: names.iter().map(ToString::to_string).collect(),
        profile: profile.into(),
        ttl_secs: 0,
        operation_id: operation().into(),
        restart: false,
    }
}

pub(crate) fn operation() -> Vec<u8> {
    mesh_runtime::random_bytes::<16>().to_vec()
}

/// A certificate and its key.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    pub(crate) leaf: Vec<u8>,
    pub(crate) issuer: Vec<u8>,
    pub(crate) key: Arc<LeafKey>,
}

pub(crate) fn client_config(
    anchors: Arc<TrustAnchors>,
    identity: Option<&Identity>,
    clock: &SharedClock,
) -> ClientConfig {
    let builder =
        ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(ControllerVerifier::new(anchors, None)));
    let mut config = match identity {
        None => builder.with_no_client_auth(),
        Some(identity) => builder.with_client_cert_resolver(Arc::new(Shown::of(identity))),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.time_provider = Arc::new(TestTime(Arc::clone(clock)));
    config
}

/// Shows a certificate with a key, whether they belong together or not.
#[derive(Debug)]
struct Shown(Arc<rustls::sign::CertifiedKey>);

impl Shown {
    fn of(identity: &Identity) -> Self {
        let chain = [&identity.leaf, &identity.issuer].map(|der| CertificateDer::from(der.clone()));
        let key = rustls::crypto::aws_lc_rs::sign::any_ecdsa_type(&identity.key.to_rustls_der()).unwrap();
        Self(Arc::new(rustls::sign::CertifiedKey::new(chain.to_vec(), key)))
    }
}

impl rustls::client::ResolvesClientCert for Shown {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<rustls::sign::CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

#[derive(Debug)]
struct TestTime(SharedClock);

impl rustls::time_provider::TimeProvider for TestTime {
    fn current_time(&self) -> Option<rustls_pki_types::UnixTime> {
        let seconds = self.0.utc_now().unix_timestamp().try_into().ok()?;
        Some(rustls_pki_types::UnixTime::since_unix_epoch(Duration::from_secs(seconds)))
    }
}

pub(crate) fn pinned_config(pin: [u8; 32]) -> (ClientConfig, Arc<PinnedControllerVerifier>) {
    let verifier = Arc::new(PinnedControllerVerifier::new(pin));
    let mut config =
        ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(verifier.clone())
            .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    (config, verifier)
}

pub(crate) async fn connect(
    address: SocketAddr,
    config: ClientConfig,
) -> Result<Channel, tonic::transport::Error> {
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    Endpoint::from_static("http://controller")
        .connect_timeout(Duration::from_secs(10))
        .connect_with_connector(tower::service_fn(move |_: Uri| {
            let connector = connector.clone();
            async move {
                let stream = TcpStream::connect(address).await?;
                let name = ServerName::try_from("controller").unwrap();
                connector.connect(name, stream).await.map(TokioIo::new)
            }
        }))
        .await
}

/// A join token, opened.
#[derive(Clone)]
pub(crate) struct JoinToken(pub(crate) pb::JoinToken);

impl JoinToken {
    pub(crate) fn parse(text: &str) -> Self {
        let body = text.strip_prefix("mesh1_").expect("a token of this version");
        let bytes = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(body).unwrap();
        Self(pb::JoinToken::decode(&*bytes).unwrap())
    }
}

/// A machine before it is enrolled.
pub(crate) struct Candidate {
    pub(crate) name: String,
    pub(crate) key: LeafKey,
    pub(crate) wireguard: [u8; 32],
    pub(crate) operation: Vec<u8>,
}

impl Candidate {
    pub(crate) fn new(name: &str) -> Self {
        Self {
            name: name.into(),
            key: LeafKey::generate().unwrap(),
            wireguard: wireguard_key(),
            operation: operation(),
        }
    }

    pub(crate) fn request(&self, token: &JoinToken) -> pb::EnrollRequest {
        pb::EnrollRequest {
            token_id: token.0.id.clone(),
            token_secret: token.0.secret.clone(),
            name: self.name.clone(),
            csr: Csr::create(&self.key).unwrap().into(),
            wireguard_public_key: self.wireguard.to_vec().into(),
            operation_id: self.operation.clone().into(),
            node_time: 0,
        }
    }

    pub(crate) async fn ask(
        &self,
        channel: Channel,
        token: &JoinToken,
    ) -> Result<pb::EnrollResponse, tonic::Status> {
        let mut client = pb::enrollment_client::EnrollmentClient::new(channel);
        client.enroll(self.request(token)).await.map(tonic::Response::into_inner)
    }

    pub(crate) async fn enroll(
        &self,
        channel: Channel,
        token: &JoinToken,
    ) -> Result<pb::NodeIdentity, tonic::Status> {
        match self.ask(channel, token).await?.outcome {
            Some(pb::enroll_response::Outcome::Enrolled(identity)) => Ok(identity),
            other => panic!("not enrolled: {other:?}"),
        }
    }

    pub(crate) fn into_node(self, enrolled: pb::NodeIdentity) -> Node {
        let identity = Identity {
            leaf: enrolled.leaf.to_vec(),
            issuer: enrolled.issuers[0].to_vec(),
            key: Arc::new(self.key),
        };
        Node { identity, enrolled, wireguard: self.wireguard }
    }
}

/// An enrolled machine.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub(crate) identity: Identity,
    pub(crate) enrolled: pb::NodeIdentity,
    pub(crate) wireguard: [u8; 32],
}

impl Node {
    pub(crate) fn id(&self) -> u32 {
        self.enrolled.node_id
    }
}

pub(crate) fn wireguard_key() -> [u8; 32] {
    x25519_dalek::PublicKey::from(&x25519_dalek::StaticSecret::from(mesh_runtime::random_bytes::<32>()))
        .to_bytes()
}

/// An entry of a map, read.
pub(crate) fn peer(entry: &bytes::Bytes) -> pb::Peer {
    pb::Peer::decode(entry.clone()).unwrap()
}

/// What a refusal says about itself.
pub(crate) fn code(status: &tonic::Status) -> pb::ErrorCode {
    let detail = pb::ErrorDetail::decode(status.details()).unwrap();
    assert!(!detail.why.is_empty() && !detail.next.is_empty(), "{detail:?}");
    assert!(detail.exit > 0, "{detail:?}");
    detail.code()
}

/// Waits for something that has to happen, and fails loudly when it does not.
pub(crate) async fn within<T>(limit: Duration, what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(limit, future).await.unwrap_or_else(|_| panic!("{what}: not within {limit:?}"))
}

/// A node's sync stream, driven by hand.
pub(crate) struct SyncStream {
    requests: tokio::sync::mpsc::Sender<pb::SyncRequest>,
    responses: tonic::Streaming<pb::SyncResponse>,
}

/// How long a message of the controller may take in these tests.
const PATIENCE: Duration = Duration::from_secs(10);

impl SyncStream {
    pub(crate) async fn open(
        channel: Channel,
        hello: pb::sync_request::Hello,
    ) -> Result<Self, tonic::Status> {
        let (requests, outgoing) = tokio::sync::mpsc::channel(16);
        let first = pb::sync_request::Request::Hello(hello);
        requests.send(pb::SyncRequest { request: Some(first) }).await.unwrap();
        let outgoing = tokio_stream::wrappers::ReceiverStream::new(outgoing);
        let mut client = pb::sync_client::SyncClient::new(channel);
        let responses = client.sync(outgoing).await?.into_inner();
        Ok(Self { requests, responses })
    }

    /// Opens a stream of `node` without a cursor and takes the full map.
    pub(crate) async fn of(running: &Running, node: &Node) -> (Self, pb::Full) {
        let hello = pb::sync_request::Hello { wireguard_port: 51820, ..Default::default() };
        let mut stream = Self::open(running.member(&node.identity).await, hello).await.unwrap();
        let full = stream.full().await;
        (stream, full)
    }

    /// The next message, whatever it is; `None` at the end of the stream.
    pub(crate) async fn next(&mut self) -> Result<Option<pb::SyncResponse>, tonic::Status> {
        within(PATIENCE, "a sync message", self.responses.message()).await
    }

    async fn body(&mut self) -> pb::sync_response::Response {
        self.next().await.unwrap().expect("the stream goes on").response.unwrap()
    }

    pub(crate) async fn full(&mut self) -> pb::Full {
        loop {
            match self.body().await {
                pb::sync_response::Response::Full(full) => return full,
                pb::sync_response::Response::Hints(_) => {}
                other => panic!("expected a full map: {other:?}"),
            }
        }
    }

    /// The next full map; what changes of the old one meanwhile (CRLs signed anew) is passed over.
    pub(crate) async fn new_full(&mut self) -> pb::Full {
        loop {
            if let pb::sync_response::Response::Full(full) = self.body().await {
                return full;
            }
        }
    }

    pub(crate) async fn delta(&mut self) -> pb::Delta {
        loop {
            match self.body().await {
                pb::sync_response::Response::Delta(delta) => return delta,
                pb::sync_response::Response::Hints(_) => {}
                other => panic!("expected a delta: {other:?}"),
            }
        }
    }

    pub(crate) async fn hints(&mut self) -> pb::Hints {
        loop {
            if let pb::sync_response::Response::Hints(hints) = self.body().await {
                return hints;
            }
        }
    }

    pub(crate) async fn send(&self, request: pb::sync_request::Request) {
        self.requests.send(pb::SyncRequest { request: Some(request) }).await.unwrap();
    }

    pub(crate) async fn ack(&self, seq: u64, crls: Vec<pb::CrlHave>) {
        self.send(pb::sync_request::Request::Ack(pb::sync_request::Ack {
            seq,
            crls,
            findings: vec![],
            trust: 0,
        }))
        .await;
    }

    /// Takes messages until the stream ends; what the goodbye said, if there was one.
    pub(crate) async fn end(mut self) -> Option<pb::ErrorCode> {
        let mut reason = None;
        loop {
            match self.next().await {
                Ok(Some(message)) => {
                    if let Some(pb::sync_response::Response::Goodbye(goodbye)) = message.response {
                        reason = Some(goodbye.reason.unwrap().code());
                    }
                }
                Ok(None) | Err(_) => return reason,
            }
        }
    }
}
