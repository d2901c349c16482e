//! The controller's end of TLS: 1.3 only, post-quantum hybrid first, no resumption.

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use mesh_ca::{ClientVerifier, TrustAnchors, Usage, VerifiedLeaf, verify_chain_expired_ok};
use mesh_runtime::SharedClock;
use rustls::ServerConfig;
use rustls::crypto::{CryptoProvider, SupportedKxGroup};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::time_provider::TimeProvider;
use rustls_pki_types::{CertificateDer, UnixTime};
use time::UtcDateTime;

/// The controller's current certificate; renewals swap it under running handshakes.
pub(crate) struct ServedCertificate(RwLock<Arc<CertifiedKey>>);

impl ServedCertificate {
    pub(crate) fn new(certified: CertifiedKey) -> Self {
        Self(RwLock::new(Arc::new(certified)))
    }

    /// New handshakes use `certified` from now on.
    pub(crate) fn replace(&self, certified: CertifiedKey) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(certified);
    }
}

impl fmt::Debug for ServedCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ServedCertificate")
    }
}

impl ResolvesServerCert for ServedCertificate {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner)))
    }
}

/// Every root that ever signed for this mesh: a node that was away shows what it has. Which certificate counts
/// is World's to say, by serial and key, so that an old root's key alone opens nothing.
pub(crate) fn every_root(world: &mesh_core::World) -> Vec<Vec<u8>> {
    world.authorities().iter().filter(|known| known.is_root).map(|root| root.der.clone()).collect()
}

/// X25519MLKEM768 before everything else, whatever a future default may say.
fn provider() -> CryptoProvider {
    use rustls::crypto::aws_lc_rs::{default_provider, kx_group};
    let preferred: Vec<&'static dyn SupportedKxGroup> =
        vec![kx_group::X25519MLKEM768, kx_group::X25519, kx_group::SECP256R1, kx_group::SECP384R1];
    CryptoProvider { kx_groups: preferred, ..default_provider() }
}

/// rustls asks the same clock as the rest of the process.
#[derive(Debug)]
struct ClockForTls(SharedClock);

impl TimeProvider for ClockForTls {
    fn current_time(&self) -> Option<UnixTime> {
        let seconds = u64::try_from(self.0.utc_now().unix_timestamp()).ok()?;
        Some(UnixTime::since_unix_epoch(Duration::from_secs(seconds)))
    }
}

/// TLS 1.3 with optional client certificates.
///
/// Nothing is resumed: a resumed session carries no certificate, so that a revoked client could come
/// back with a ticket. Neither tickets nor stored sessions nor early data exist.
///
/// # Errors
/// If the cryptography provider lacks TLS 1.3, which it does not.
pub(crate) fn server_config(
    clients: Arc<ClientVerifier>,
    certificate: Arc<ServedCertificate>,
    clock: SharedClock,
) -> Result<ServerConfig, rustls::Error> {
    let mut config = ServerConfig::builder_with_provider(Arc::new(provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(clients)
        .with_cert_resolver(certificate);
    config.time_provider = Arc::new(ClockForTls(clock));
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

/// Reads the certificate of a finished handshake. Its chain was verified there; this verifies again
/// rather than trust a second reading of unverified bytes.
pub(crate) fn peer_leaf(
    certificates: &[CertificateDer<'_>],
    anchors: &TrustAnchors,
    now: UtcDateTime,
) -> Result<VerifiedLeaf, mesh_ca::ChainError> {
    let (leaf, intermediates) = certificates.split_first().ok_or(mesh_ca::ChainError::UnknownIssuer)?;
    verify_chain_expired_ok(leaf, intermediates, anchors, now, Usage::Client, None)
        .map(|verified| verified.leaf)
}
