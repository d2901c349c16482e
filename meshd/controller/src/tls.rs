//! The controller's end of TLS: 1.3 only, post-quantum hybrid first, no resumption.

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use mesh_ca::{ClientVerifier, TrustAnchors, TrustDomain, Usage, VerifiedLeaf, verify_chain_expired_ok};
use mesh_runtime::SharedClock;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{CryptoProvider, SupportedKxGroup};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::time_provider::TimeProvider;
use rustls::{DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme};
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

/// The roots that client certificates may lead to; replaced under running handshakes.
#[derive(Debug, Clone)]
pub(crate) struct SharedAnchors {
    domain: TrustDomain,
    current: Arc<RwLock<Arc<ClientAnchors>>>,
}

#[derive(Debug)]
struct ClientAnchors {
    anchors: Arc<TrustAnchors>,
    verifier: ClientVerifier,
}

impl SharedAnchors {
    pub(crate) fn new(domain: TrustDomain, roots: Vec<Vec<u8>>) -> Result<Self, mesh_ca::ChainError> {
        let first = ClientAnchors::new(&domain, roots)?;
        Ok(Self { domain, current: Arc::new(RwLock::new(Arc::new(first))) })
    }

    /// New handshakes accept chains to `roots` from now on.
    pub(crate) fn replace(&self, roots: Vec<Vec<u8>>) -> Result<(), mesh_ca::ChainError> {
        let next = Arc::new(ClientAnchors::new(&self.domain, roots)?);
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = next;
        Ok(())
    }

    pub(crate) fn anchors(&self) -> Arc<TrustAnchors> {
        Arc::clone(&self.current().anchors)
    }

    fn current(&self) -> Arc<ClientAnchors> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl ClientAnchors {
    fn new(domain: &TrustDomain, roots: Vec<Vec<u8>>) -> Result<Self, mesh_ca::ChainError> {
        let anchors = Arc::new(TrustAnchors::new(domain.clone(), roots)?);
        Ok(Self { verifier: ClientVerifier::new(Arc::clone(&anchors)), anchors })
    }
}

impl ClientCertVerifier for SharedAnchors {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    /// None, as the verifier below it says why.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.current().verifier.verify_client_cert(end_entity, intermediates, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.current().verifier.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.current().verifier.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.current().verifier.supported_verify_schemes()
    }
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
    anchors: SharedAnchors,
    certificate: Arc<ServedCertificate>,
    clock: SharedClock,
) -> Result<ServerConfig, rustls::Error> {
    let mut config = ServerConfig::builder_with_provider(Arc::new(provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(anchors))
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
