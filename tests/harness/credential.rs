//! Certificates and keys as the product left them on disk.

use std::{fs, path::Path, sync::Arc};

use crate::Fleet;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use mesh_ca::{ControllerVerifier, TrustAnchors, TrustDomain};
use rustls::ClientConfig;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};

pub const DOMAIN: &str = "mesh.internal";

/// A chain, leaf first, and its key.
pub struct Credential {
    pub chain: Vec<CertificateDer<'static>>,
    pub key: PrivateKeyDer<'static>,
}

impl std::fmt::Debug for Credential {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credential").field("chain", &self.chain).finish_non_exhaustive()
    }
}

impl Credential {
    /// What a thief takes from a node's state directory: leaf, issuers and root, as the controller would serve them.
    pub fn of_node(fleet: &Fleet, node: &str) -> Self {
        let identity = identity_file(fleet, node);
        let ders = |key: &str| {
            let list = identity[key].as_array().expect("a list").clone();
            list.into_iter().map(|text| CertificateDer::from(decoded(&text)))
        };
        let leaf = CertificateDer::from(decoded(&identity["leaf"]));
        let chain = std::iter::once(leaf).chain(ders("issuers")).chain(ders("roots")).collect();
        let key = PrivateKeyDer::Pkcs8(decoded(&identity["tls_key"]).into());
        Self { chain, key }
    }

    /// A pair as `meshctl cert issue` writes it, with the root behind it.
    pub fn of_pair(folder: &Path) -> Self {
        let read = |name: &str| fs::read(folder.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        let mut chain = certificates(&read("cert.pem"));
        chain.extend(certificates(&read("ca.pem")));
        Self { chain, key: PrivateKeyDer::from_pem_slice(&read("key.pem")).expect("a key in PEM") }
    }

    /// The operator who logged in on `host`.
    pub fn of_operator(fleet: &Fleet, host: &str) -> Self {
        let path = fleet.path(host).join(".config/meshd/context.toml");
        let text = fs::read_to_string(path).expect("the context file");
        let context: toml::Table = text.parse().expect("a context file is TOML");
        let pem = |key: &str| context[key].as_str().expect("PEM text").as_bytes();
        let key = PrivateKeyDer::from_pem_slice(pem("key")).expect("a key in PEM");
        Self { chain: certificates(pem("certificate")), key }
    }
}

fn certificates(pem: &[u8]) -> Vec<CertificateDer<'static>> {
    CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().expect("certificates in PEM")
}

/// `identity.json` of a node: what it keeps secret, and what it believes.
pub fn identity_file(fleet: &Fleet, node: &str) -> serde_json::Value {
    let text = fs::read(fleet.state(node).join("identity.json")).expect("the node has an identity");
    serde_json::from_slice(&text).expect("the identity is JSON")
}

/// Base64 in JSON.
pub fn decoded(text: &serde_json::Value) -> Vec<u8> {
    STANDARD.decode(text.as_str().expect("a text")).expect("base64")
}

/// TLS 1.3 towards the fleet's controller, as `credential` or as nobody.
pub fn client_config(fleet: &Fleet, credential: Option<&Credential>) -> ClientConfig {
    let root = fleet.controller(&["ca", "root"]).ok();
    let roots = certificates(root.stdout.as_bytes());
    let anchors = TrustAnchors::new(TrustDomain::parse(DOMAIN).unwrap(), &roots).expect("the root is one");
    config_under(Arc::new(anchors), credential)
}

pub fn config_under(anchors: Arc<TrustAnchors>, credential: Option<&Credential>) -> ClientConfig {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(ControllerVerifier::new(anchors, None)));
    let mut config = match credential {
        None => builder.with_no_client_auth(),
        Some(Credential { chain, key }) => {
            builder.with_client_auth_cert(chain.clone(), key.clone_key()).expect("key and chain fit")
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    config
}
