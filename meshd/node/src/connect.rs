//! Connections to the controller: TLS 1.3, the controller's chain judged by the pinned root, no resumption.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use mesh_ca::{ControllerVerifier, LeafKey, PinnedControllerVerifier, RevocationLists, TrustAnchors};
use mesh_proto::v1::ErrorCode;
use rustls::client::danger::DangerousClientConfigBuilder;
use rustls::{CertificateError, ClientConfig};
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint};

use crate::clock::ControllerClock;
use crate::failure::Failure;
use crate::limits::{CONNECT_TIMEOUT, KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT};
use crate::state::Identity;

/// Why there is no connection. In every case nothing but the TLS handshake has been sent.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    #[error("{address} is not HOST:PORT")]
    Address { address: String },
    #[error("cannot reach {address}")]
    Tcp {
        address: String,
        #[source]
        source: std::io::Error,
    },
    #[error("{address} did not answer within {} s", CONNECT_TIMEOUT.as_secs())]
    Timeout { address: String },
    #[error("TLS with {address} failed")]
    Tls {
        address: String,
        #[source]
        source: std::io::Error,
    },
    #[error("gRPC with {address} failed")]
    Http {
        address: String,
        #[source]
        source: tonic::transport::Error,
    },
    #[error("our own certificate cannot be used")]
    OwnCertificate {
        #[source]
        source: rustls::Error,
    },
}

impl ConnectError {
    /// What TLS held against the other side's certificate.
    pub(crate) fn certificate_error(&self) -> Option<&CertificateError> {
        let Self::Tls { source, .. } = self else { return None };
        match source.get_ref()?.downcast_ref::<rustls::Error>()? {
            rustls::Error::InvalidCertificate(error) => Some(error),
            _ => None,
        }
    }
}

impl From<ConnectError> for Failure {
    fn from(error: ConnectError) -> Self {
        let why = mesh_runtime::chain(&error);
        let (code, next) = match (&error, error.certificate_error()) {
            (_, Some(CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. })) => (
                ErrorCode::ClockOff,
                "set this machine's clock (`timedatectl`); it is behind the controller's certificate",
            ),
            (_, Some(CertificateError::Expired | CertificateError::ExpiredContext { .. })) => (
                ErrorCode::ClockOff,
                "compare this machine's clock with the controller's; its certificate counts as expired here",
            ),
            (_, Some(_)) => (
                ErrorCode::ControllerNotTrusted,
                "check the controller's address: what answers there is no controller of this mesh",
            ),
            (ConnectError::Address { .. }, _) => {
                (ErrorCode::ConfigInvalid, "correct the controller's address")
            }
            (ConnectError::OwnCertificate { .. }, _) => (ErrorCode::StateCorrupt, "enroll this node again"),
            _ => (
                ErrorCode::ControllerUnreachable,
                "check that the controller runs, and that its port is open from here",
            ),
        };
        Failure::new(code, why, next)
    }
}

/// An open connection and the time its TCP handshake took.
#[derive(Debug)]
pub(crate) struct Connected {
    pub(crate) channel: Channel,
    pub(crate) rtt: Duration,
    /// The other end.
    pub(crate) at: SocketAddr,
}

/// How a node that is enrolled speaks to its controller.
///
/// # Errors
/// The stored key or chain cannot be used.
pub(crate) fn node_config(
    identity: &Identity,
    anchors: Arc<TrustAnchors>,
    revocation: Option<Arc<RevocationLists>>,
    clock: &ControllerClock,
) -> Result<Arc<ClientConfig>, ConnectError> {
    let verifier = ControllerVerifier::new(anchors, revocation).tolerating_unknown_revocation();
    let unusable = || rustls::Error::General("key cannot be read".to_owned());
    let key = LeafKey::from_pkcs8_der(identity.tls_key.expose())
        .map_err(|_| ConnectError::OwnCertificate { source: unusable() })?;
    let chain = std::iter::once(&identity.leaf)
        .chain(identity.issuers.first())
        .map(|der| CertificateDer::from(der.0.clone()))
        .collect();
    let config = builder(clock)
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_auth_cert(chain, key.to_rustls_der())
        .map_err(|source| ConnectError::OwnCertificate { source })?;
    Ok(Arc::new(finish(config)))
}

/// How a node that joins speaks to a controller: it believes nothing but the token's pin.
pub(crate) fn joining_config(
    pin: [u8; 32],
    clock: &ControllerClock,
) -> (Arc<ClientConfig>, Arc<PinnedControllerVerifier>) {
    let verifier = Arc::new(PinnedControllerVerifier::new(pin));
    let config = builder(clock).with_custom_certificate_verifier(verifier.clone()).with_no_client_auth();
    (Arc::new(finish(config)), verifier)
}

fn builder(clock: &ControllerClock) -> DangerousClientConfigBuilder {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    ClientConfig::builder_with_details(provider, Arc::new(clock.clone()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("the provider has TLS 1.3")
        .dangerous()
}

fn finish(mut config: ClientConfig) -> ClientConfig {
    config.alpn_protocols = vec![b"h2".to_vec()];
    // A resumed session would skip the certificate, ours and theirs.
    config.resumption = rustls::client::Resumption::disabled();
    config
}

/// Connects to `address` (`HOST:PORT`). One TLS connection serves one channel; when it ends, the channel ends.
pub(crate) async fn connect(address: &str, tls: Arc<ClientConfig>) -> Result<Connected, ConnectError> {
    let attempt = async {
        let (tcp, rtt, at) = dial(address).await?;
        let name = server_name(address)?;
        let stream = TlsConnector::from(tls)
            .connect(name, tcp)
            .await
            .map_err(|source| ConnectError::Tls { address: address.to_owned(), source })?;
        let channel = channel_over(address, stream).await?;
        Ok(Connected { channel, rtt, at })
    };
    match tokio::time::timeout(CONNECT_TIMEOUT, attempt).await {
        Ok(result) => result,
        Err(_) => Err(ConnectError::Timeout { address: address.to_owned() }),
    }
}

async fn dial(address: &str) -> Result<(TcpStream, Duration, SocketAddr), ConnectError> {
    let failed = |source| ConnectError::Tcp { address: address.to_owned(), source };
    let candidates: Vec<_> = tokio::net::lookup_host(address).await.map_err(failed)?.collect();
    let mut last = std::io::Error::from(std::io::ErrorKind::AddrNotAvailable);
    for candidate in candidates {
        let began = tokio::time::Instant::now();
        match TcpStream::connect(candidate).await {
            Ok(tcp) => {
                tcp.set_nodelay(true).map_err(failed)?;
                return Ok((tcp, began.elapsed(), candidate));
            }
            Err(error) => last = error,
        }
    }
    Err(failed(last))
}

async fn channel_over(address: &str, stream: TlsStream<TcpStream>) -> Result<Channel, ConnectError> {
    let failed = |source| ConnectError::Http { address: address.to_owned(), source };
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(failed)?
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true);
    let mut stream = Some(TokioIo::new(stream));
    // Only once: a second connection would go around the checks of this one.
    let connector = tower::service_fn(move |_| {
        let stream = stream.take();
        async move { stream.ok_or_else(|| std::io::Error::other("the connection to the controller has ended")) }
    });
    endpoint.connect_with_connector(connector).await.map_err(failed)
}

fn server_name(address: &str) -> Result<ServerName<'static>, ConnectError> {
    let invalid = || ConnectError::Address { address: address.to_owned() };
    let (host, _) = address.rsplit_once(':').ok_or_else(invalid)?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    ServerName::try_from(host.to_owned()).map_err(|_| invalid())
}
