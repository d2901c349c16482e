//! Accepts connections: caps, time limits, TLS, and the end of connections whose identity has ended.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hyper::server::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use mesh_ca::TrustAnchors;
use mesh_core::{Serial, UtcTime};
use mesh_runtime::ShutdownToken;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::service::Routes;

use crate::error::StartupError;
use crate::gate::{Connection, Gate, GateParts, Peer, identify};
use crate::limits::{
    ANONYMOUS_CONNECTION_AGE_MAX, CONNECTION_AGE_MAX, CONNECTION_GRACE, CONNECTIONS_MAX,
    CONNECTIONS_PER_ADDRESS_MAX, HANDSHAKE_TIMEOUT, HEADER_LIST_BYTES_MAX, KEEPALIVE_INTERVAL,
    KEEPALIVE_TIMEOUT, STREAMS_PER_CONNECTION_MAX,
};
use crate::tls::peer_leaf;

/// How long accepting pauses when the operating system has no more descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves the services on connections, until told to stop.
#[derive(Clone)]
pub(crate) struct Server {
    routes: Routes,
    parts: Arc<GateParts>,
    acceptor: TlsAcceptor,
    anchors: Arc<TrustAnchors>,
    connections: Connections,
    tracker: TaskTracker,
    shutdown: ShutdownToken,
}

impl Server {
    pub(crate) fn new(
        routes: Routes,
        parts: Arc<GateParts>,
        (acceptor, anchors): (TlsAcceptor, Arc<TrustAnchors>),
        (connections, shutdown): (Connections, ShutdownToken),
    ) -> Self {
        Self { routes, parts, acceptor, anchors, connections, tracker: TaskTracker::new(), shutdown }
    }

    /// Accepts TLS connections until shutdown.
    pub(crate) async fn serve_tcp(&self, listener: TcpListener) {
        loop {
            let accepted = tokio::select! {
                () = self.shutdown.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, address)) => self.take_tcp(stream, address),
                Err(error) => self.pause_accepting(&error).await,
            }
        }
    }

    /// Accepts local connections until shutdown.
    pub(crate) async fn serve_unix(&self, listener: UnixListener) {
        loop {
            let accepted = tokio::select! {
                () = self.shutdown.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, _)) => self.take_unix(stream),
                Err(error) => self.pause_accepting(&error).await,
            }
        }
    }

    /// Ends the connections of identities that World has ended, whenever World changes.
    pub(crate) async fn end_ended_identities(&self) {
        let mut head = self.parts.directory.watch();
        loop {
            let at = UtcTime::from(self.parts.clock.utc_now());
            let ended = self.parts.directory.read(|world| {
                self.connections
                    .certificates()
                    .into_iter()
                    .filter(|serial| {
                        let peer = Peer::Remote { address: [0, 0, 0, 0].into(), certificate: Some(*serial) };
                        identify(&peer, world, at).is_err()
                    })
                    .collect::<Vec<_>>()
            });
            for serial in ended {
                self.connections.close(serial);
            }
            tokio::select! {
                () = self.shutdown.cancelled() => return,
                changed = head.changed() => if changed.is_err() { return },
            }
        }
    }

    /// Waits until every connection has ended. Call it after shutdown.
    pub(crate) async fn drain(&self) {
        self.tracker.close();
        self.tracker.wait().await;
    }

    async fn pause_accepting(&self, error: &io::Error) {
        tracing::warn!(%error, "cannot accept a connection");
        tokio::time::sleep(ACCEPT_PAUSE).await;
    }

    fn take_tcp(&self, stream: TcpStream, address: SocketAddr) {
        let ip = address.ip().to_canonical();
        let Some(slot) = self.connections.take_slot(Some(ip)) else {
            tracing::warn!(%address, "too many connections: closed");
            return;
        };
        let server = self.clone();
        self.tracker.spawn(async move {
            let _slot = slot;
            if let Err(error) = server.handle_tcp(stream, ip).await {
                tracing::debug!(%address, %error, "connection ended in the handshake");
            }
        });
    }

    async fn handle_tcp(&self, stream: TcpStream, address: IpAddr) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let handshake = tokio::time::timeout(HANDSHAKE_TIMEOUT, self.acceptor.accept(stream));
        let stream = tokio::select! {
            () = self.shutdown.cancelled() => return Ok(()),
            done = handshake => done.map_err(|_| io::ErrorKind::TimedOut)??,
        };
        let certificate = match stream.get_ref().1.peer_certificates() {
            None => None,
            Some(chain) => {
                let leaf =
                    peer_leaf(chain, &self.anchors, self.parts.clock.utc_now()).map_err(io::Error::other)?;
                Some(Serial(*leaf.serial.as_bytes()))
            }
        };
        self.serve(stream, Peer::Remote { address, certificate }).await;
        Ok(())
    }

    fn take_unix(&self, stream: UnixStream) {
        let own = nix::unistd::geteuid().as_raw();
        match stream.peer_cred() {
            Ok(credentials) if credentials.uid() == 0 || credentials.uid() == own => {}
            Ok(credentials) => {
                tracing::warn!(uid = credentials.uid(), "local caller refused");
                return;
            }
            Err(error) => {
                tracing::warn!(%error, "local caller has no credentials");
                return;
            }
        }
        let Some(slot) = self.connections.take_slot(None) else { return };
        let server = self.clone();
        self.tracker.spawn(async move {
            let _slot = slot;
            server.serve(stream, Peer::Local).await;
        });
    }

    async fn serve(&self, stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, peer: Peer) {
        let closing = self.shutdown.child_token();
        let age_max = age_max(&peer);
        let _entry = match peer {
            Peer::Remote { certificate: Some(serial), .. } => {
                Some(self.connections.register(serial, closing.clone()))
            }
            _ => None,
        };
        let connection = Arc::new(Connection { peer, closing: closing.clone() });
        let gate = Gate::new(self.routes.clone(), connection, Arc::clone(&self.parts));
        let served = http2_builder().serve_connection(TokioIo::new(stream), TowerToHyperService::new(gate));
        let mut served = std::pin::pin!(served);
        tokio::select! {
            ended = served.as_mut() => return log_end(ended),
            () = closing.cancelled() => {}
            () = tokio::time::sleep(age_max) => closing.cancel(),
        }
        // Answers that are ready may still leave; then the connection goes, whatever runs on it.
        served.as_mut().graceful_shutdown();
        match tokio::time::timeout(CONNECTION_GRACE, served).await {
            Ok(ended) => log_end(ended),
            Err(_) => tracing::debug!("connection was cut after its grace"),
        }
    }
}

/// How old a connection of this caller may become.
fn age_max(peer: &Peer) -> Duration {
    match peer {
        Peer::Remote { certificate: None, .. } => ANONYMOUS_CONNECTION_AGE_MAX,
        Peer::Remote { certificate: Some(_), .. } | Peer::Local => CONNECTION_AGE_MAX,
    }
}

fn log_end(ended: hyper::Result<()>) {
    if let Err(error) = ended {
        tracing::debug!(%error, "connection ended");
    }
}

fn http2_builder() -> http2::Builder<TokioExecutor> {
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_PER_CONNECTION_MAX)
        .max_header_list_size(HEADER_LIST_BYTES_MAX)
        .keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT);
    builder
}

/// Opens the TCP listener.
pub(crate) async fn bind_tcp(address: SocketAddr) -> Result<TcpListener, StartupError> {
    TcpListener::bind(address).await.map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => StartupError::PortInUse { address },
        _ => StartupError::Listen { address: address.to_string(), source },
    })
}

/// Opens the Unix socket with mode 0600. A socket that nobody answers on is replaced.
pub(crate) async fn bind_unix(path: &Path) -> Result<UnixListener, StartupError> {
    let failed = |source| StartupError::Listen { address: path.display().to_string(), source };
    if let Ok(metadata) = path.symlink_metadata() {
        if !metadata.file_type().is_socket() {
            // Somebody's file: not ours to remove.
            return Err(failed(io::ErrorKind::AlreadyExists.into()));
        }
        if UnixStream::connect(path).await.is_ok() {
            return Err(failed(io::ErrorKind::AddrInUse.into()));
        }
        std::fs::remove_file(path).map_err(failed)?;
    }
    if let Some(folder) = path.parent().filter(|folder| !folder.exists()) {
        std::fs::create_dir_all(folder).map_err(failed)?;
    }
    // Until the mode is set, only the credentials check keeps others out; it does so at any time.
    let listener = UnixListener::bind(path).map_err(failed)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(listener)
}

/// Open connections: counted per source, and by the certificate they showed.
#[derive(Debug, Clone, Default)]
pub(crate) struct Connections(Arc<Mutex<Table>>);

#[derive(Debug, Default)]
struct Table {
    open: usize,
    by_source: HashMap<IpAddr, usize>,
    by_certificate: BTreeMap<Serial, BTreeMap<u64, CancellationToken>>,
    next: u64,
}

impl Connections {
    fn take_slot(&self, source: Option<IpAddr>) -> Option<Slot> {
        let mut table = self.lock();
        if table.open >= CONNECTIONS_MAX {
            return None;
        }
        if let Some(source) = source {
            let count = table.by_source.entry(source).or_default();
            if *count >= CONNECTIONS_PER_ADDRESS_MAX {
                return None;
            }
            *count += 1;
        }
        table.open += 1;
        Some(Slot { connections: self.clone(), source })
    }

    fn register(&self, serial: Serial, closing: CancellationToken) -> Entry {
        let mut table = self.lock();
        table.next += 1;
        let number = table.next;
        table.by_certificate.entry(serial).or_default().insert(number, closing);
        Entry { connections: self.clone(), serial, number }
    }

    fn certificates(&self) -> Vec<Serial> {
        self.lock().by_certificate.keys().copied().collect()
    }

    /// How many connections showed one of these certificates.
    pub(crate) fn count(&self, serials: &[Serial]) -> usize {
        let table = self.lock();
        serials.iter().filter_map(|serial| table.by_certificate.get(serial)).map(BTreeMap::len).sum()
    }

    /// Ends every connection that showed this certificate.
    pub(crate) fn close(&self, serial: Serial) {
        let closing: Vec<_> = {
            let table = self.lock();
            table.by_certificate.get(&serial).into_iter().flat_map(BTreeMap::values).cloned().collect()
        };
        closing.iter().for_each(CancellationToken::cancel);
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One counted connection.
struct Slot {
    connections: Connections,
    source: Option<IpAddr>,
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut table = self.connections.lock();
        table.open -= 1;
        if let Some(source) = self.source
            && let Some(count) = table.by_source.get_mut(&source)
        {
            *count -= 1;
            if *count == 0 {
                table.by_source.remove(&source);
            }
        }
    }
}

/// One connection in the table of certificates.
struct Entry {
    connections: Connections,
    serial: Serial,
    number: u64,
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut table = self.connections.lock();
        if let Some(open) = table.by_certificate.get_mut(&self.serial) {
            open.remove(&self.number);
            if open.is_empty() {
                table.by_certificate.remove(&self.serial);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_counted_per_source_and_come_back() {
        let connections = Connections::default();
        let source: IpAddr = "192.0.2.1".parse().unwrap();
        let slots: Vec<_> =
            (0..CONNECTIONS_PER_ADDRESS_MAX).map(|_| connections.take_slot(Some(source)).unwrap()).collect();
        assert!(connections.take_slot(Some(source)).is_none());
        assert!(connections.take_slot(Some("192.0.2.2".parse().unwrap())).is_some());
        drop(slots);
        assert!(connections.take_slot(Some(source)).is_some());
        assert!(connections.lock().by_source.is_empty());
    }

    #[test]
    fn a_connection_without_a_certificate_is_short_lived() {
        let remote = |certificate| Peer::Remote { address: [192, 0, 2, 1].into(), certificate };
        assert_eq!(age_max(&remote(None)), Duration::from_secs(60));
        assert_eq!(age_max(&remote(Some(Serial([0x41; 16])))), CONNECTION_AGE_MAX);
        assert_eq!(age_max(&Peer::Local), CONNECTION_AGE_MAX);
    }

    #[test]
    fn closing_a_certificate_reaches_all_of_its_connections_and_no_other() {
        let connections = Connections::default();
        let (ended, other) = (Serial([0x41; 16]), Serial([0x42; 16]));
        let tokens: Vec<_> = (0..3).map(|_| CancellationToken::new()).collect();
        let _entries = [
            connections.register(ended, tokens[0].clone()),
            connections.register(ended, tokens[1].clone()),
            connections.register(other, tokens[2].clone()),
        ];
        assert_eq!(connections.count(&[ended, other]), 3);
        connections.close(ended);
        assert_eq!(
            tokens.iter().map(CancellationToken::is_cancelled).collect::<Vec<_>>(),
            [true, true, false]
        );
    }
}
