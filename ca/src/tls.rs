//! Who is at the other end of a TLS connection: rustls verifiers for both ends, TLS 1.3 only.
//!
//! The time is the one rustls passes in. Nothing here reads a clock or a socket.

use std::sync::{Arc, Mutex, PoisonError, RwLock};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use sha2::{Digest as _, Sha256};
use time::UtcDateTime;

use crate::chain::{ChainError, RevocationLists, TrustAnchors, Usage, verify_chain, verify_chain_expired_ok};
use crate::identity::{Identity, Label, TrustDomain};
use crate::instant::from_unix;
use crate::key::PublicKey;
use crate::leaf::{VerifiedLeaf, parse_certificate, read_extensions};

/// The refusal as rustls carries it: the well-known ones choose the TLS alert, the others keep [`ChainError`] as their
/// source.
fn refuse(error: ChainError) -> Error {
    Error::InvalidCertificate(match error {
        ChainError::Expired(_) => CertificateError::Expired,
        ChainError::NotYetValid(_) => CertificateError::NotValidYet,
        ChainError::Revoked => CertificateError::Revoked,
        ChainError::UnknownIssuer | ChainError::PinNotFound => CertificateError::UnknownIssuer,
        ChainError::BadSignature => CertificateError::BadSignature,
        ChainError::RevocationUnknown => CertificateError::UnknownRevocationStatus,
        other => CertificateError::Other(OtherError(Arc::new(other))),
    })
}

fn algorithms() -> WebPkiSupportedAlgorithms {
    rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms
}

/// What every verifier here says about signatures in the handshake.
macro_rules! tls13_signatures {
    () => {
        fn verify_tls12_signature(
            &self,
            _message: &[u8],
            _cert: &CertificateDer<'_>,
            _dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Err(Error::General("TLS 1.2 is not spoken here".to_owned()))
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            verify_tls13_signature(message, cert, dss, &self.algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.algorithms.supported_schemes()
        }
    };
}

fn controller_name(leaf: &VerifiedLeaf) -> Result<&Label, ChainError> {
    match &leaf.identity {
        Some(Identity::Controller { name }) => Ok(name),
        _ => Err(ChainError::NotController),
    }
}

/// A node's or operator's view of the controller: a chain to a pinned root whose leaf has exactly one URI, and that a
/// `/controller/` of the mesh. DNS names and addresses are ignored, so that a controller may be reached under any.
#[derive(Debug)]
pub struct ControllerVerifier {
    anchors: Arc<TrustAnchors>,
    revocation: Option<Arc<RevocationLists>>,
    tolerates_unknown_revocation: bool,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ControllerVerifier {
    /// With `revocation` a controller on a CRL is refused too.
    pub fn new(anchors: Arc<TrustAnchors>, revocation: Option<Arc<RevocationLists>>) -> Self {
        Self { anchors, revocation, tolerates_unknown_revocation: false, algorithms: algorithms() }
    }

    /// Where the CRLs say nothing about the controller's issuer, because the CA has changed since, the chain alone
    /// counts: otherwise the CRL that is lacking could never be fetched.
    pub fn tolerating_unknown_revocation(self) -> Self {
        Self { tolerates_unknown_revocation: true, ..self }
    }

    fn judge(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        revocation: Option<&RevocationLists>,
    ) -> Result<VerifiedLeaf, ChainError> {
        verify_chain(end_entity, intermediates, &self.anchors, from_unix(now), Usage::Server, revocation)
    }
}

impl ServerCertVerifier for ControllerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let leaf = match self.judge(end_entity, intermediates, now, self.revocation.as_deref()) {
            Err(ChainError::RevocationUnknown) if self.tolerates_unknown_revocation => {
                self.judge(end_entity, intermediates, now, None)
            }
            verdict => verdict,
        };
        let leaf = leaf.map_err(refuse)?;
        controller_name(&leaf).map_err(refuse)?;
        Ok(ServerCertVerified::assertion())
    }

    tls13_signatures!();
}

/// What a joining node or operator learned from a controller whose root matched the pin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AcceptedController {
    /// The root, to be stored and pinned from now on.
    pub root_der: CertificateDer<'static>,
    /// The mesh, from the controller's SPIFFE ID.
    pub domain: TrustDomain,
    /// The controller's name.
    pub name: Label,
    /// End of the chain's validity.
    pub chain_not_after: UtcDateTime,
}

/// A joining node's or operator's view of the controller: all it has is the SHA-256 of the root's DER
/// SubjectPublicKeyInfo. The root itself must be in the served chain. One verifier serves one connection.
#[derive(Debug)]
pub struct PinnedControllerVerifier {
    root_key_hash: [u8; 32],
    accepted: Mutex<Option<AcceptedController>>,
    shown: Mutex<Option<[u8; 32]>>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl PinnedControllerVerifier {
    /// Pins the root whose DER SubjectPublicKeyInfo has this SHA-256.
    pub fn new(root_key_hash: [u8; 32]) -> Self {
        Self { root_key_hash, accepted: Mutex::new(None), shown: Mutex::new(None), algorithms: algorithms() }
    }

    /// What was accepted. The chain is checked by then, possession of its key only once the handshake is over: ask
    /// after that.
    pub fn accepted(&self) -> Option<AcceptedController> {
        self.accepted.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// SHA-256 of the key of the root that was shown, whether it matched or not, so that a person can compare.
    pub fn shown(&self) -> Option<[u8; 32]> {
        *self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<AcceptedController, ChainError> {
        let is_pinned = |der: &&CertificateDer<'_>| {
            parse_certificate(der)
                .and_then(|parsed| PublicKey::from_spki_der(parsed.public_key().raw).ok())
                .is_some_and(|key| key.key_hash() == self.root_key_hash)
        };
        if intermediates.len() > crate::chain::CHAIN_LENGTH_MAX {
            return Err(ChainError::TooLong(intermediates.len()));
        }
        let root = intermediates.iter().find(is_pinned).ok_or(ChainError::PinNotFound)?;
        let domain = claimed_domain(end_entity).ok_or(ChainError::NotController)?;
        let anchors = TrustAnchors::new(domain.clone(), [root])?;
        let leaf = verify_chain(end_entity, intermediates, &anchors, from_unix(now), Usage::Server, None)?;
        Ok(AcceptedController {
            root_der: root.clone().into_owned(),
            domain,
            name: controller_name(&leaf)?.clone(),
            chain_not_after: leaf.chain_not_after,
        })
    }
}

/// SHA-256 of the key of the first self-issued certificate.
fn root_shown(chain: &[CertificateDer<'_>]) -> Option<[u8; 32]> {
    chain.iter().take(crate::chain::CHAIN_LENGTH_MAX).find_map(|der| {
        let parsed = parse_certificate(der)?;
        let self_issued = parsed.issuer().as_raw() == parsed.subject().as_raw();
        self_issued.then(|| Sha256::digest(parsed.public_key().raw).into())
    })
}

/// The mesh in the leaf's one URI; true only once the chain is verified.
fn claimed_domain(leaf: &[u8]) -> Option<TrustDomain> {
    let parsed = parse_certificate(leaf)?;
    match read_extensions(&parsed).ok()?.uris.as_slice() {
        [uri] => Identity::parse_any_domain(uri).ok().map(|(domain, _)| domain),
        _ => None,
    }
}

impl ServerCertVerifier for PinnedControllerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        *self.shown.lock().unwrap_or_else(PoisonError::into_inner) = root_shown(intermediates);
        let accepted = self.check(end_entity, intermediates, now).map_err(refuse)?;
        *self.accepted.lock().unwrap_or_else(PoisonError::into_inner) = Some(accepted);
        Ok(ServerCertVerified::assertion())
    }

    tls13_signatures!();
}

/// The controller's view of whoever connects. A certificate may be left out (a joining node has none). One that is
/// there must have a good chain; it may have expired, as Resume needs that, so the handler must look at the age and at
/// the journal on every call. Revocation is not looked at here.
#[derive(Debug)]
pub struct ClientVerifier {
    anchors: RwLock<Arc<TrustAnchors>>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ClientVerifier {
    /// Accepts clients of this mesh.
    pub fn new(anchors: TrustAnchors) -> Self {
        Self { anchors: RwLock::new(Arc::new(anchors)), algorithms: algorithms() }
    }

    /// What chains may lead to now.
    pub fn anchors(&self) -> Arc<TrustAnchors> {
        Arc::clone(&self.anchors.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Handshakes that begin from now on accept chains to `anchors`.
    pub fn replace_anchors(&self, anchors: TrustAnchors) {
        *self.anchors.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(anchors);
    }
}

impl ClientCertVerifier for ClientVerifier {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    /// None: the list is optional (RFC 8446 §4.2.4) and would tell strangers the name of the mesh.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        verify_chain_expired_ok(
            end_entity,
            intermediates,
            &self.anchors(),
            from_unix(now),
            Usage::Client,
            None,
        )
        .map(|_| ClientCertVerified::assertion())
        .map_err(refuse)
    }

    tls13_signatures!();
}
