//! The `Local` service on the node's Unix socket: for root and the daemon's own user.

mod doctor;
mod enroll;
mod ping;
mod service;
mod status;

use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream as BlockingUnixStream;
use std::path::Path;
use std::sync::Arc;

use mesh_proto::v1::ErrorCode;
use mesh_proto::v1::local_server::LocalServer as Generated;
use tokio::net::UnixListener;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;

use crate::failure::Failure;
use crate::limits::{LOCAL_CONNECTIONS_MAX, LOCAL_MESSAGE_BYTES_MAX};
use crate::run::Node;
use service::LocalService;

/// The bound socket and what answers on it.
pub(crate) struct LocalServer {
    listener: UnixListener,
    node: Arc<Node>,
}

impl LocalServer {
    /// Binds the socket, mode 0600. A socket that nobody answers on is replaced.
    ///
    /// # Errors
    /// [`ErrorCode::StateInUse`] if somebody answers; [`ErrorCode::ConfigInvalid`] if the path cannot be bound.
    pub(crate) fn open(node: Arc<Node>) -> Result<Self, Failure> {
        let path = &node.config.socket;
        let failed = |action: &str, error: std::io::Error| {
            Failure::new(
                ErrorCode::ConfigInvalid,
                format!("cannot {action} {}: {error}", path.display()),
                "choose another --socket, or make its folder writable",
            )
        };
        if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            std::fs::create_dir_all(parent).map_err(|error| failed("make the folder of", error))?;
        }
        clear_stale(path)?;
        let listener = UnixListener::bind(path).map_err(|error| failed("listen on", error))?;
        // Who connects before this line is judged by its credentials all the same.
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
            .map_err(|error| failed("close", error))?;
        Ok(Self { listener, node })
    }

    /// Serves until `shutdown`, then removes the socket.
    pub(crate) async fn serve(self, shutdown: CancellationToken) {
        let us = nix::unistd::geteuid().as_raw();
        let admitted = UnixListenerStream::new(self.listener).filter(move |stream| match stream {
            Ok(stream) => match stream.peer_cred() {
                Ok(peer) if peer.uid() == 0 || peer.uid() == us => true,
                Ok(peer) => {
                    tracing::warn!(uid = peer.uid(), "stranger on the local socket refused");
                    false
                }
                Err(_) => false,
            },
            // One failed accept must not end the server.
            Err(_) => false,
        });
        let service = Generated::new(LocalService::new(self.node.clone()))
            .max_decoding_message_size(LOCAL_MESSAGE_BYTES_MAX);
        let served = Server::builder()
            .concurrency_limit_per_connection(LOCAL_CONNECTIONS_MAX)
            .add_service(service)
            .serve_with_incoming_shutdown(admitted, shutdown.cancelled_owned())
            .await;
        if let Err(error) = served {
            tracing::error!(error = mesh_runtime::chain(&error), "local socket failed");
        }
        // Somebody may have removed it already.
        let _ = std::fs::remove_file(&self.node.config.socket);
    }
}

/// Removes a socket that was left behind.
fn clear_stale(path: &Path) -> Result<(), Failure> {
    let metadata = match std::fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => {
            return Err(Failure::new(
                ErrorCode::ConfigInvalid,
                format!("cannot look at {}: {error}", path.display()),
                "choose another --socket",
            ));
        }
    };
    if !metadata.file_type().is_socket() {
        return Err(Failure::new(
            ErrorCode::ConfigInvalid,
            format!("{} exists and is no socket", path.display()),
            "choose another --socket",
        ));
    }
    if BlockingUnixStream::connect(path).is_ok() {
        return Err(Failure::new(
            ErrorCode::StateInUse,
            format!("another daemon answers on {}", path.display()),
            "stop it, or give this one its own --socket and --state-dir",
        ));
    }
    std::fs::remove_file(path).map_err(|error| {
        Failure::new(
            ErrorCode::ConfigInvalid,
            format!("cannot remove the old socket {}: {error}", path.display()),
            "remove it, or choose another --socket",
        )
    })
}
