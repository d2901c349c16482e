//! Accepts connections: caps, time limits, TLS, and the end of connections whose identity has ended.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hyper::server::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use mesh_ca::ClientVerifier;
use mesh_core::{Serial, UtcTime};
use mesh_runtime::ShutdownToken;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio_rustls::TlsAcceptor;
use tokio_util::task::TaskTracker;
use tonic::service::Routes;

use crate::connections::{Class, Connections, Slot};
use crate::directory;
use crate::error::StartupError;
use crate::gate::{Connection, Gate, GateParts, Peer, identify};
use crate::limits::{
    ANONYMOUS_CONNECTION_AGE_MAX, CONNECTION_AGE_MAX, CONNECTION_GRACE, FOLLOW_PAUSE, HANDSHAKE_TIMEOUT,
    HEADER_LIST_BYTES_MAX, KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT, LEAVING_GRACE, STREAMS_PER_CONNECTION_MAX,
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
    clients: Arc<ClientVerifier>,
    connections: Connections,
    tracker: TaskTracker,
    shutdown: ShutdownToken,
}

impl Server {
    pub(crate) fn new(
        routes: Routes,
        parts: Arc<GateParts>,
        (acceptor, clients): (TlsAcceptor, Arc<ClientVerifier>),
        (connections, shutdown): (Connections, ShutdownToken),
    ) -> Self {
        Self { routes, parts, acceptor, clients, connections, tracker: TaskTracker::new(), shutdown }
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
                changed = directory::changed(&mut head, FOLLOW_PAUSE) => if changed.is_err() { return },
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
        let Some(slot) = self.connections.take_slot(Class::Handshake, Some(ip)) else {
            tracing::warn!(%address, "too many connections in the handshake: closed");
            return;
        };
        let server = self.clone();
        self.tracker.spawn(async move {
            if let Err(error) = server.handle_tcp(stream, ip, slot).await {
                tracing::debug!(%address, %error, "connection ended in the handshake");
            }
        });
    }

    async fn handle_tcp(&self, stream: TcpStream, address: IpAddr, slot: Slot) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let handshake = tokio::time::timeout(HANDSHAKE_TIMEOUT, self.acceptor.accept(stream));
        let stream = tokio::select! {
            () = self.shutdown.cancelled() => return Ok(()),
            done = handshake => done.map_err(|_| io::ErrorKind::TimedOut)??,
        };
        let certificate = match stream.get_ref().1.peer_certificates() {
            None => None,
            Some(chain) => {
                let leaf = peer_leaf(chain, &self.clients.anchors(), self.parts.clock.utc_now())
                    .map_err(io::Error::other)?;
                let serial = Serial(*leaf.serial.as_bytes());
                // A root that has gone may still sign: what counts is the key that World knows by this serial.
                let forged = self.parts.directory.read(|world| {
                    world.certificate(&serial).is_some_and(|known| known.key_hash.0 != leaf.key_hash)
                });
                if forged {
                    tracing::error!(%serial, %address, "a certificate with a known serial and another key: refused");
                    return Err(io::ErrorKind::PermissionDenied.into());
                }
                Some(serial)
            }
        };
        let class = if certificate.is_some() { Class::Known } else { Class::Anonymous };
        let Some(_slot) = slot.move_to(class) else {
            tracing::warn!(%address, ?class, "too many connections: closed");
            return Ok(());
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
        let Some(slot) = self.connections.take_slot(Class::Known, None) else { return };
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
        let connection = Connection { peer, closing: closing.clone(), leaving: AtomicBool::new(false) };
        let connection = Arc::new(connection);
        let gate = Gate::new(self.routes.clone(), Arc::clone(&connection), Arc::clone(&self.parts));
        let served = http2_builder().serve_connection(TokioIo::new(stream), TowerToHyperService::new(gate));
        let mut served = std::pin::pin!(served);
        tokio::select! {
            ended = served.as_mut() => return log_end(ended),
            () = closing.cancelled() => {}
            () = tokio::time::sleep(age_max) => closing.cancel(),
        }
        // Answers that are ready may still leave; then the connection goes, whatever runs on it.
        served.as_mut().graceful_shutdown();
        let grace = match connection.leaving.load(Ordering::Acquire) {
            true => LEAVING_GRACE,
            false => CONNECTION_GRACE,
        };
        match tokio::time::timeout(grace, served).await {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_without_a_certificate_is_short_lived() {
        let remote = |certificate| Peer::Remote { address: [192, 0, 2, 1].into(), certificate };
        assert_eq!(age_max(&remote(None)), Duration::from_secs(60));
        assert_eq!(age_max(&remote(Some(Serial([0x41; 16])))), CONNECTION_AGE_MAX);
        assert_eq!(age_max(&Peer::Local), CONNECTION_AGE_MAX);
    }
}
