//! What a machine that joins sends, without being one.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use mesh_ca::{Csr, LeafKey};
use mesh_proto::v1 as pb;
use prost::Message as _;

use crate::rpc::operation;

/// Reads the printed form of a join token.
pub fn open(text: &str) -> pb::JoinToken {
    let body = text.strip_prefix("mesh1_").expect("a token of this version");
    pb::JoinToken::decode(&*URL_SAFE_NO_PAD.decode(body).unwrap()).unwrap()
}

/// What a machine with `key` and a new WireGuard key would send.
pub fn request(token: &pb::JoinToken, name: &str, key: &LeafKey) -> pb::EnrollRequest {
    pb::EnrollRequest {
        token_id: token.id.clone(),
        token_secret: token.secret.clone(),
        name: name.into(),
        csr: Csr::create(key).unwrap().into(),
        wireguard_public_key: wireguard_key(),
        operation_id: operation(),
        node_time: 0,
    }
}

/// A new WireGuard key; nobody keeps its private half.
pub fn wireguard_key() -> bytes::Bytes {
    let key = x25519_dalek::StaticSecret::from(mesh_runtime::random_bytes::<32>());
    x25519_dalek::PublicKey::from(&key).to_bytes().to_vec().into()
}
