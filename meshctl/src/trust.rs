//! Which controllers we speak to: those under our roots, or, before we have any, under a pinned key.

use std::sync::{Arc, Mutex, PoisonError};

use mesh_ca::{ControllerVerifier, PinnedControllerVerifier, TrustAnchors, TrustDomain};
use rustls::{
    ClientConfig, ConfigBuilder, DigitallySignedStruct, Error, SignatureScheme,
    client::{
        Resumption, WantsClientCert,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use sha2::{Digest as _, Sha256};
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// What HTTP/2 is called in ALPN.
const HTTP2: &[u8] = b"h2";

/// Accepts controllers of `domain` under `roots`.
pub(crate) fn controller_verifier(
    roots: &[CertificateDer<'_>],
    domain: &str,
) -> Result<Arc<dyn ServerCertVerifier>, String> {
    let domain = TrustDomain::parse(domain).map_err(|error| error.to_string())?;
    let anchors = TrustAnchors::new(domain, roots).map_err(|error| error.to_string())?;
    // Without CRLs: a controller's certificate is short, and asking for its CRL would need a controller.
    Ok(Arc::new(ControllerVerifier::new(Arc::new(anchors), None)))
}

/// TLS 1.3 with post-quantum key exchange first, and `verifier` as the only judge.
pub(crate) fn client_config(
    verifier: Arc<dyn ServerCertVerifier>,
) -> ConfigBuilder<ClientConfig, WantsClientCert> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("aws-lc offers TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(verifier)
}

/// HTTP/2, and no resumption: every connection proves itself anew.
pub(crate) fn finish(config: &mut ClientConfig) {
    config.alpn_protocols = vec![HTTP2.to_vec()];
    config.resumption = Resumption::disabled();
}

/// Pins a root key and remembers which root was shown, for the error that names both.
#[derive(Debug)]
pub(crate) struct PinRecorder {
    pinned: PinnedControllerVerifier,
    shown: Mutex<Option<[u8; 32]>>,
}

impl PinRecorder {
    pub(crate) fn new(root_key_hash: [u8; 32]) -> Self {
        Self { pinned: PinnedControllerVerifier::new(root_key_hash), shown: Mutex::new(None) }
    }

    /// The root that was accepted; only after the handshake.
    pub(crate) fn accepted(&self) -> Option<mesh_ca::AcceptedController> {
        self.pinned.accepted()
    }

    /// SHA-256 of the key of the root that the other end showed, whoever that was.
    pub(crate) fn shown(&self) -> Option<[u8; 32]> {
        *self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// SHA-256 of the key of the first self-issued certificate.
fn root_shown(chain: &[CertificateDer<'_>]) -> Option<[u8; 32]> {
    chain.iter().find_map(|der| {
        let (_, parsed) = X509Certificate::from_der(der).ok()?;
        let self_issued = parsed.issuer().as_raw() == parsed.subject().as_raw();
        self_issued.then(|| Sha256::digest(parsed.public_key().raw).into())
    })
}

impl ServerCertVerifier for PinRecorder {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        *self.shown.lock().unwrap_or_else(PoisonError::into_inner) = root_shown(intermediates);
        self.pinned.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.pinned.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.pinned.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.pinned.supported_verify_schemes()
    }
}
