//! Which controllers we speak to: those under our roots, or, before we have any, under a pinned key.

use std::sync::Arc;

use mesh_ca::{ControllerVerifier, TrustAnchors, TrustDomain};
use rustls::{
    ClientConfig, ConfigBuilder,
    client::{Resumption, WantsClientCert, danger::ServerCertVerifier},
};
use rustls_pki_types::CertificateDer;

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
