//! The controller as a whole: built once, run once.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use mesh_ca::{ClientVerifier, TrustAnchors};
use mesh_core::{Command, World};
use mesh_proto::v1 as pb;
use mesh_runtime::{SharedClock, ShutdownToken};
use mesh_store::{Head, Journal, Snapshots};
use tokio::net::{TcpListener, UnixListener};
use tokio_rustls::TlsAcceptor;
use tonic::service::Routes;

use crate::archive::Archive;
use crate::authority::{Authority, WorldKeys};
use crate::certify::Certifier;
use crate::codec::{decode, decode_record};
use crate::config::{Publishing, RunConfig};
use crate::denials::Denials;
use crate::directory::Directory;
use crate::enroll::Enroller;
use crate::error::StartupError;
use crate::gate::GateParts;
use crate::hardware::{Hsm, HsmPlace};
use crate::history::History;
use crate::identity::IdentityAnswers;
use crate::init::{check_advertised, check_publish_url};
use crate::issuer::Issuing;
use crate::limits::{ANSWER_BYTES_MAX, MESSAGE_BYTES_MAX};
use crate::listener::{Server, bind_tcp, bind_unix};
use crate::metrics;
use crate::ocsp::Ocsp;
use crate::own_certificate::OwnCertificate;
use crate::parts::Parts;
use crate::presence::Presence;
use crate::publish::Publisher;
use crate::receipts::Receipts;
use crate::relay::RelayHub;
use crate::renew::Renewer;
use crate::reservations::Reservations;
use crate::retention::{self, Keeper};
use crate::revoke::Revoker;
use crate::service;
use crate::sightings::Sightings;
use crate::snapshots::{SNAPSHOT_VERSION, SnapshotTaker};
use crate::state::{Settings, StateDir};
use crate::status::Problem;
use crate::sync::SyncHub;
use crate::throttle::Throttle;
use crate::tls::{every_root, server_config};
use crate::token::{TokenPlace, TokenSecrets};
use crate::udp_port::UdpPort;
use crate::underlay;
use crate::views::Views;
use crate::web::{Web, WebParts, WebSocket};
use crate::writer::{Writer, WriterParts};

/// How long connections may finish after shutdown was asked for.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(3);
/// How often refusals of known callers are written down.
const DENIALS_INTERVAL: Duration = Duration::from_secs(10);

/// What a controller takes from outside besides its configuration.
pub struct Environment {
    pub clock: SharedClock,
    /// Takes the place of the journal on disk: for tests that make it fail.
    pub journal: Option<Box<dyn Journal>>,
}

impl std::fmt::Debug for Environment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Environment").field("clock", &self.clock).finish_non_exhaustive()
    }
}

/// A controller that is ready to serve.
pub struct Controller {
    parts: Arc<Parts>,
    own: Arc<OwnCertificate>,
    server: Server,
    tcp: TcpListener,
    unix: UnixListener,
    web: Web,
    web_sockets: Vec<WebSocket>,
    udp: Option<Arc<UdpPort>>,
    metrics_socket: Option<tokio::net::TcpListener>,
    journal_folder: PathBuf,
    socket: PathBuf,
    snapshots: SnapshotTaker,
    keeper: Keeper,
    sightings: Sightings,
    writer_thread: JoinHandle<()>,
    stop: ShutdownToken,
    fatal: ShutdownToken,
    announce: bool,
}

impl std::fmt::Debug for Controller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Controller").field("socket", &self.socket).finish_non_exhaustive()
    }
}

impl Controller {
    /// Opens state, keys and sockets. When this returns, requests queue up and [`run`](Self::run) serves
    /// them.
    ///
    /// # Errors
    /// Whatever keeps the controller from starting, each as its own variant; nothing of the state was
    /// changed unless everything could be opened.
    pub async fn build(config: RunConfig, environment: Environment) -> Result<Self, StartupError> {
        let Environment { clock, journal } = environment;
        config.advertise.iter().try_for_each(|address| check_advertised(address))?;
        config.publishing.url.iter().try_for_each(|url| check_publish_url(url))?;
        let (state, mut store) = StateDir::open(&config.state_dir)?;
        if let Some(retention) = config.retention {
            store.journal.limit_segment_span(retention::segment_span(retention));
        }
        let settings = state.settings()?;
        let journal = journal.unwrap_or_else(|| Box::new(store.journal));
        let (world, head) = load_world(&state, &*journal, &store.snapshots)?;
        let mesh = world.mesh().cloned().ok_or_else(|| corrupt(&state, "its journal is empty"))?;
        let domain = mesh_ca::TrustDomain::parse(mesh.domain.as_str())
            .map_err(|error| StartupError::internal("cannot use the domain", error))?;
        let authority = open_authority(&config, &state, &settings, &domain, &world).await?;
        let tcp = bind_tcp(config.listen).await?;
        let address = tcp
            .local_addr()
            .map_err(|source| StartupError::Listen { address: config.listen.to_string(), source })?;
        let udp = underlay::bind(config.stun_listen, address).await?;
        let unix = bind_unix(&config.socket).await?;
        let mut web_sockets = Vec::new();
        for address in &config.publish_listen {
            web_sockets.push(WebSocket::open(*address).await?);
        }
        let metrics_socket = match config.metrics_listen {
            Some(address) => Some(metrics::bind(address).await?),
            None => None,
        };
        let controllers = advertised(&config, &settings, address);

        let archive = Archive::new(journal.reader());
        let directory = Arc::new(Directory::new(world, head));
        let history = History::new(store.index, archive.clone(), Arc::clone(&directory), domain.to_string());
        let fatal = ShutdownToken::new();
        let (writer, writer_thread) = Writer::start(WriterParts {
            journal,
            directory: Arc::clone(&directory),
            clock: Arc::clone(&clock),
            fatal: fatal.clone(),
        })
        .map_err(|error| StartupError::internal("cannot start the writer", error))?;
        let issuing = Issuing::new(Arc::clone(&authority), Arc::clone(&directory), Arc::clone(&clock))
            .map_err(|error| StartupError::internal("cannot start the signers' threads", error))?;
        let publishing = Publishing {
            url: config.publishing.url.clone().or_else(|| settings.publish_url.clone()),
            ..config.publishing.clone()
        };
        let publisher = Publisher::new(
            Arc::clone(&directory),
            writer.clone(),
            issuing.clone(),
            (Arc::clone(&clock), state.crls(), publishing),
        );
        let publisher = Arc::new(publisher.numbered_from(settings.crl_number_floor.unwrap_or(0)));
        publisher
            .open_shards()
            .await
            .map_err(|problem| startup(&state, "cannot open CRL shards", problem))?;
        let own = OwnCertificate::issue(
            settings.name.clone(),
            mesh.domain.clone(),
            (issuing.clone(), writer.clone(), Arc::clone(&clock)),
            Arc::clone(&directory),
        )
        .await
        .map_err(|problem| startup(&state, "cannot issue the controller's certificate", problem))?;
        let ocsp = Arc::new(Ocsp::new(
            Arc::clone(&directory),
            writer.clone(),
            issuing.clone(),
            (Arc::clone(&clock), mesh.controller_name.clone()),
        ));
        ocsp.refresh()
            .await
            .map_err(|problem| startup(&state, "cannot certify an OCSP delegate", problem))?;
        publisher.start().await.map_err(|problem| startup(&state, "cannot publish CRLs", problem))?;

        let clients = TrustAnchors::new(domain.clone(), directory.read(every_root))
            .map(|anchors| Arc::new(ClientVerifier::new(anchors)))
            .map_err(|error| StartupError::internal("cannot use the root CA", error))?;
        let tls = server_config(Arc::clone(&clients), own.served(), Arc::clone(&clock))
            .map_err(|error| StartupError::internal("cannot configure TLS", error))?;
        let stop = ShutdownToken::new();
        let denials = Denials::default();
        let gate = Arc::new(GateParts {
            directory: Arc::clone(&directory),
            clock: Arc::clone(&clock),
            denials: denials.clone(),
        });
        // The server's table of connections is part of the services, and the services of the server.
        let connections = crate::connections::Connections::default();
        let presence = Arc::new(Presence::new());
        let sightings =
            directory.read(|world| Sightings::open(&state, world, Arc::clone(&presence), Arc::clone(&clock)));
        let answers = IdentityAnswers {
            directory: Arc::clone(&directory),
            authority: Arc::clone(&authority),
            clock: Arc::clone(&clock),
            controllers: controllers.clone(),
        };
        let receipts = Receipts { directory: Arc::clone(&directory), presence: Arc::clone(&presence) };
        let views = Views {
            directory: Arc::clone(&directory),
            publisher: Arc::clone(&publisher),
            entries: Arc::default(),
            journal_id: mesh.journal_id,
            incarnation: settings.incarnation,
        };
        let keeper = Keeper {
            directory: Arc::clone(&directory),
            history: history.clone(),
            archive: archive.clone(),
            snapshots: store.snapshots.clone(),
            retention: config.retention,
        };
        let snapshots = SnapshotTaker::new(Arc::clone(&directory), store.snapshots, head.seq);
        let udp_port = udp.as_ref().and_then(|socket| Some(socket.local_addr().ok()?.port())).unwrap_or(0);
        let relay = config.relay.map(|limit| {
            let hub = RelayHub::new(views.clone(), Arc::clone(&clock), limit.bytes_per_second);
            if let Some(socket) = &udp {
                hub.use_udp(Arc::clone(socket), udp_port);
            }
            hub
        });
        let offered = pb::hints::Underlay { udp_port: udp_port.into(), relay: relay.is_some() };
        let parts = Arc::new(Parts {
            enroller: Enroller {
                directory: Arc::clone(&directory),
                writer: writer.clone(),
                issuing: issuing.clone(),
                reservations: Reservations::default(),
                answers: answers.clone(),
                throttle: Throttle::default(),
                clock: Arc::clone(&clock),
                archive: archive.clone(),
            },
            renewer: Renewer {
                directory: Arc::clone(&directory),
                writer: writer.clone(),
                issuing: issuing.clone(),
                answers,
            },
            certifier: Certifier {
                directory: Arc::clone(&directory),
                writer: writer.clone(),
                issuing: issuing.clone(),
                archive: archive.clone(),
            },
            revoker: Revoker {
                directory: Arc::clone(&directory),
                writer: writer.clone(),
                publisher: Arc::clone(&publisher),
                receipts,
                connections: connections.clone(),
            },
            sync: SyncHub {
                views,
                presence: Arc::clone(&presence),
                archive: archive.clone(),
                clock: Arc::clone(&clock),
                offered,
            },
            relay,
            token_place: TokenPlace { controllers, trust_domain: domain.to_string() },
            token_secrets: TokenSecrets::new(),
            controller_name: settings.name,
            state_dir: state.root().to_owned(),
            unlock: settings.unlock,
            state: state.clone(),
            retention: config.retention,
            directory,
            writer,
            issuing,
            clients: Arc::clone(&clients),
            successions: tokio::sync::Mutex::default(),
            archive,
            history,
            presence,
            publisher,
            ocsp,
            denials,
            clock,
        });
        let web = WebParts::new(
            Arc::clone(&parts.directory),
            Arc::clone(&parts.publisher),
            Arc::clone(&parts.ocsp),
            Arc::clone(&parts.clock),
        );
        let web = Web::new(web, stop.clone());
        let acceptor = TlsAcceptor::from(Arc::new(tls));
        let server = Server::new(routes(&parts), gate, (acceptor, clients), (connections, stop.clone()));
        write_listen_file(&state, "listen", [address]);
        write_listen_file(&state, "publish-listen", web_sockets.iter().filter_map(WebSocket::address));
        match &metrics_socket {
            Some(socket) => write_listen_file(&state, "metrics-listen", socket.local_addr()),
            None => drop(std::fs::remove_file(config.state_dir.join("metrics-listen"))),
        }
        Ok(Self {
            parts,
            own: Arc::new(own),
            server,
            tcp,
            unix,
            web,
            web_sockets,
            udp,
            metrics_socket,
            journal_folder: config.state_dir.join(mesh_store::JOURNAL_FOLDER),
            socket: config.socket,
            snapshots,
            keeper,
            sightings,
            writer_thread,
            stop,
            fatal,
            announce: config.announce,
        })
    }

    /// Where the gRPC listener is bound.
    ///
    /// # Errors
    /// The operating system does not say.
    pub fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.tcp.local_addr()
    }

    /// Where CRLs are served over plain HTTP.
    pub fn publish_addrs(&self) -> Vec<SocketAddr> {
        self.web_sockets.iter().filter_map(WebSocket::address).collect()
    }

    /// Serves until `shutdown` is cancelled.
    ///
    /// # Errors
    /// The journal could not be synced: the process has to end, and start anew from what is on disk.
    pub async fn run(self, shutdown: ShutdownToken) -> Result<(), StartupError> {
        let Self {
            sightings,
            parts,
            own,
            server,
            tcp,
            unix,
            web,
            web_sockets,
            udp,
            metrics_socket,
            journal_folder,
            socket,
            snapshots,
            keeper,
            writer_thread,
            stop,
            fatal,
            announce,
        } = self;
        if announce && let Ok(address) = tcp.local_addr() {
            println!("listening on {address}");
        }
        tracing::info!(address = ?tcp.local_addr().ok(), socket = %socket.display(), "controller is ready");
        let tasks = tokio_util::task::TaskTracker::new();
        {
            let server = server.clone();
            tasks.spawn(async move { server.serve_tcp(tcp).await });
        }
        {
            let server = server.clone();
            tasks.spawn(async move { server.serve_unix(unix).await });
        }
        for socket in web_sockets {
            let web = web.clone();
            tasks.spawn(async move { web.serve(socket).await });
        }
        {
            let server = server.clone();
            tasks.spawn(async move { server.end_ended_identities().await });
        }
        if let Some(listener) = metrics_socket {
            tasks.spawn(metrics::serve(listener, Arc::clone(&parts), journal_folder, stop.clone()));
        }
        if let Some(socket) = udp {
            let (relay, clock, stop) = (parts.relay.clone(), Arc::clone(&parts.clock), stop.clone());
            tasks.spawn(underlay::serve(socket, relay, clock, stop));
        }
        {
            let (publisher, stop) = (Arc::clone(&parts.publisher), stop.clone());
            tasks.spawn(async move { publisher.run(stop).await });
        }
        {
            let (ocsp, stop) = (Arc::clone(&parts.ocsp), stop.clone());
            tasks.spawn(async move { ocsp.run(stop).await });
        }
        {
            let (parts, stop) = (Arc::clone(&parts), stop.clone());
            tasks.spawn(async move { parts.keep_rotation(stop).await });
        }
        {
            let (own, stop) = (Arc::clone(&own), stop.clone());
            tasks.spawn(async move { own.keep_fresh(stop).await });
        }
        {
            let (history, stop) = (parts.history.clone(), stop.clone());
            tasks.spawn(async move { history.run(stop).await });
        }
        {
            let stop = stop.clone();
            tasks.spawn(async move { snapshots.run(stop).await });
        }
        tasks.spawn(keeper.run(stop.clone()));
        {
            let stop = stop.clone();
            tasks.spawn(async move { sightings.run(stop).await });
        }
        {
            let (parts, stop) = (Arc::clone(&parts), stop.clone());
            tasks.spawn(async move { write_denials(parts, stop).await });
        }
        let failed = tokio::select! {
            () = shutdown.cancelled() => false,
            () = fatal.cancelled() => true,
        };
        stop.cancel();
        tasks.close();
        let drained = async {
            server.drain().await;
            tasks.wait().await;
        };
        if tokio::time::timeout(DRAIN_TIMEOUT, drained).await.is_err() {
            tracing::warn!("some connections did not end in time");
        }
        parts.writer.stop();
        parts.history.close();
        let _ = std::fs::remove_file(&socket);
        // The thread ends with the stop above, or has ended already.
        let _ = tokio::task::spawn_blocking(move || writer_thread.join()).await;
        tracing::info!("controller has stopped");
        match failed {
            false => Ok(()),
            true => Err(StartupError::Internal {
                what: "the journal cannot be trusted any more".into(),
                source: None,
            }),
        }
    }
}

/// World from the newest snapshot and the records after it.
pub(crate) fn load_world(
    state: &StateDir,
    journal: &dyn Journal,
    snapshots: &Snapshots,
) -> Result<(World, Head), StartupError> {
    let unreadable = |what: &str, error: &(dyn std::error::Error + 'static)| StartupError::StateCorrupt {
        path: state.root().into(),
        what: format!("{what}: {}", mesh_runtime::chain(error)),
        source: None,
    };
    let snapshot = snapshots
        .newest(&*journal.reader(), SNAPSHOT_VERSION)
        .map_err(|error| unreadable("its snapshots cannot be read", &error))?;
    let (mut world, from) = match snapshot.map(|s| (decode::<World>(&s.bytes), s.head.seq)) {
        Some((Ok(world), seq)) => (world, seq + 1),
        Some((Err(error), _)) => {
            tracing::warn!(error = mesh_runtime::chain(&error), "a snapshot cannot be read; replaying all");
            (World::new(), 1)
        }
        None => (World::new(), 1),
    };
    let base = journal.reader().base().seq;
    if from <= base {
        return Err(StartupError::StateCorrupt {
            path: state.root().into(),
            what: format!(
                "none of its snapshots can be read, and the records up to {base} are gone by retention"
            ),
            source: None,
        });
    }
    for stored in journal.read(from) {
        let stored = stored.map_err(|error| unreadable("its journal cannot be read", &error))?;
        let record = decode_record(&stored.bytes)
            .map_err(|error| unreadable(&format!("record {} cannot be understood", stored.seq), &error))?;
        world.apply(stored.seq, &record);
    }
    Ok((world, journal.head()))
}

async fn open_authority(
    config: &RunConfig,
    state: &StateDir,
    settings: &Settings,
    domain: &mesh_ca::TrustDomain,
    world: &World,
) -> Result<Arc<Authority>, StartupError> {
    let (keys, domain, known) = (state.keys(), domain.clone(), WorldKeys::of(world));
    let (unlock, passphrase) = (settings.unlock, config.passphrase.clone());
    if unlock != crate::config::Unlock::None && passphrase.is_none() {
        return Err(StartupError::PassphraseMissing);
    }
    let stored = settings.key_store.as_deref().map(HsmPlace::parse).transpose();
    let stored = stored.map_err(|problem| StartupError::Config { key: "key_store", problem })?;
    let place = config.key_store.clone().or(stored);
    let token = place.map(|place| Hsm::new(&place, config.pin.as_ref())).transpose()?;
    // Opening a sealed key is slow on purpose.
    let opened = tokio::task::spawn_blocking(move || {
        Authority::open(&keys, &domain, &known, unlock, passphrase.as_ref(), token)
    });
    let authority =
        opened.await.map_err(|error| StartupError::internal("cannot open the CA's keys", error))??;
    if unlock == crate::config::Unlock::None {
        tracing::warn!("the CA's keys are not sealed: whoever reads the disk is the CA");
    }
    Ok(Arc::new(authority))
}

/// What join tokens name: what was given now, what `init` was given, or where we listen.
fn advertised(config: &RunConfig, settings: &Settings, address: SocketAddr) -> Vec<String> {
    if !config.advertise.is_empty() {
        return config.advertise.clone();
    }
    if !settings.advertise.is_empty() {
        return settings.advertise.clone();
    }
    if !address.ip().is_unspecified() {
        return vec![address.to_string()];
    }
    let host = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
    let host = host.unwrap_or_else(|| "localhost".into());
    tracing::warn!(host, "no --advertise: join tokens name this host name");
    vec![format!("{host}:{}", address.port())]
}

/// For whoever started the controller with port 0.
fn write_listen_file(state: &StateDir, name: &str, addresses: impl IntoIterator<Item = SocketAddr>) {
    let lines: String = addresses.into_iter().map(|address| format!("{address}\n")).collect();
    if let Err(error) = state.write(name, lines.as_bytes()) {
        tracing::warn!(%error, name, "the file was not written");
    }
}

async fn write_denials(parts: Arc<Parts>, stop: ShutdownToken) {
    loop {
        let stopped = tokio::select! {
            () = stop.cancelled() => true,
            () = tokio::time::sleep(DENIALS_INTERVAL) => false,
        };
        let denials = parts.denials.take();
        if !denials.is_empty()
            && let Err(error) = parts.writer.submit_own(Command::RecordDenials { denials }).await
        {
            tracing::warn!(%error, "refusals were not written to the journal");
        }
        if stopped {
            return;
        }
    }
}

macro_rules! limited {
    ($server:ident, $service:expr) => {
        $server::new($service)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(ANSWER_BYTES_MAX)
    };
}

fn routes(parts: &Arc<Parts>) -> Routes {
    use pb::audit_server::AuditServer;
    use pb::ca_server::CaServer;
    use pb::certificates_server::CertificatesServer;
    use pb::enrollment_server::EnrollmentServer;
    use pb::fleet_server::FleetServer;
    use pb::nodes_server::NodesServer;
    use pb::operators_server::OperatorsServer;
    use pb::policy_server::PolicyServer;
    use pb::relay_server::RelayServer;
    use pb::renewal_server::RenewalServer;
    use pb::sync_server::SyncServer;
    use pb::tokens_server::TokensServer;
    let parts = || Arc::clone(parts);
    Routes::default()
        .add_service(limited!(EnrollmentServer, service::enrollment::EnrollmentService(parts())))
        .add_service(limited!(RenewalServer, service::renewal::RenewalService(parts())))
        .add_service(limited!(SyncServer, service::sync::SyncService(parts())))
        .add_service(limited!(RelayServer, service::relay::RelayService(parts())))
        .add_service(limited!(CertificatesServer, service::certificates::CertificatesService(parts())))
        .add_service(limited!(TokensServer, service::tokens::TokensService(parts())))
        .add_service(limited!(NodesServer, service::nodes::NodesService(parts())))
        .add_service(limited!(PolicyServer, service::policy::PolicyService(parts())))
        .add_service(limited!(OperatorsServer, service::operators::OperatorsService(parts())))
        .add_service(limited!(AuditServer, service::audit::AuditService(parts())))
        .add_service(limited!(CaServer, service::ca::CaService(parts())))
        .add_service(limited!(FleetServer, service::fleet::FleetService(parts())))
        .prepare()
}

fn corrupt(state: &StateDir, what: &str) -> StartupError {
    StartupError::StateCorrupt { path: state.root().into(), what: what.into(), source: None }
}

fn startup(state: &StateDir, what: &str, problem: Problem) -> StartupError {
    if problem.code == pb::ErrorCode::DiskFull {
        return StartupError::DiskFull { path: state.root().into() };
    }
    StartupError::Internal { what: format!("{what}: {}", problem.why), source: None }
}
