//! The join token as people carry it, and what the controller keeps of it.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use mesh_core::TokenId;
use mesh_proto::v1 as pb;
use prost::Message as _;
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

/// Marks a join token of this version, for people and for secret scanners.
pub(crate) const PREFIX: &str = "mesh1_";

/// A token's secret half. Cannot be printed; wiped when dropped.
pub(crate) struct TokenSecret(Zeroizing<[u8; 32]>);

impl TokenSecret {
    pub(crate) fn draw() -> Self {
        Self(Zeroizing::new(mesh_runtime::random_bytes()))
    }

    /// What World keeps. The secret has 256 random bits, so a plain hash is enough.
    pub(crate) fn hash(&self) -> [u8; 32] {
        secret_hash(&*self.0)
    }
}

pub(crate) fn secret_hash(secret: &[u8]) -> [u8; 32] {
    Sha256::digest(secret).into()
}

/// Whether `secret` hashes to `expected`, in constant time. Without an expectation the same work is
/// done and the answer is no, so that unknown ids cannot be told from wrong secrets.
pub(crate) fn secret_matches(secret: &[u8], expected: Option<&[u8; 32]>) -> bool {
    let found = secret_hash(secret);
    let equal = found.ct_eq(expected.unwrap_or(&[0; 32]));
    bool::from(equal) && expected.is_some()
}

/// What a token says besides its secret.
#[derive(Debug, Clone)]
pub(crate) struct TokenFacts {
    pub(crate) controllers: Vec<String>,
    pub(crate) root_spki_sha256: [u8; 32],
    pub(crate) trust_domain: String,
    pub(crate) kind: pb::join_token::Kind,
}

/// `mesh1_` and the base64url of the token's message.
pub(crate) fn encode(facts: &TokenFacts, id: &TokenId, secret: &TokenSecret) -> String {
    let message = pb::JoinToken {
        controllers: facts.controllers.clone(),
        root_spki_sha256: facts.root_spki_sha256.to_vec().into(),
        id: id.0.to_vec().into(),
        secret: secret.0.to_vec().into(),
        kind: facts.kind as i32,
        trust_domain: facts.trust_domain.clone(),
    };
    format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(message.encode_to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_reads_back_and_only_its_own_secret_matches() {
        let facts = TokenFacts {
            controllers: vec!["ctl.example:7443".into()],
            root_spki_sha256: [7; 32],
            trust_domain: "mesh.internal".into(),
            kind: pb::join_token::Kind::Node,
        };
        let (id, secret) = (TokenId([1; 8]), TokenSecret::draw());
        let text = encode(&facts, &id, &secret);
        let body = text.strip_prefix(PREFIX).unwrap();
        let read = pb::JoinToken::decode(&*URL_SAFE_NO_PAD.decode(body).unwrap()).unwrap();
        assert_eq!(read.controllers, facts.controllers);
        assert_eq!(read.root_spki_sha256, vec![7u8; 32]);
        assert!(secret_matches(&read.secret, Some(&secret.hash())));
        assert!(!secret_matches(&[0; 32], Some(&secret.hash())));
        assert!(!secret_matches(&read.secret, None));
        assert!(!secret_matches(b"", Some(&[0; 32])));
    }
}
