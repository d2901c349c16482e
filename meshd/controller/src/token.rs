//! The join token as people carry it, and what the controller keeps of it.

use aws_lc_rs::hmac;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use mesh_core::{OperationId, TokenId};
use mesh_proto::v1 as pb;
use prost::Message as _;
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

/// Marks a join token of this version, for people and for secret scanners.
pub(crate) const PREFIX: &str = "mesh1_";

/// A token's secret half. Cannot be printed; wiped when dropped.
pub(crate) struct TokenSecret(Zeroizing<[u8; 32]>);

/// Makes the secrets of new tokens. A repeated request gets the secret of the first one, although nothing
/// but its hash is kept: a secret is a function of the request's id, its caller, and a key that is drawn at
/// start and lives in memory alone.
pub(crate) struct TokenSecrets(hmac::Key);

impl std::fmt::Debug for TokenSecrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TokenSecrets")
    }
}

impl TokenSecrets {
    pub(crate) fn new() -> Self {
        let key = Zeroizing::new(mesh_runtime::random_bytes::<32>());
        Self(hmac::Key::new(hmac::HMAC_SHA256, &*key))
    }

    /// The secret of the token that `caller` makes by `operation`.
    pub(crate) fn secret(&self, caller: &str, operation: &OperationId) -> TokenSecret {
        let mut context = hmac::Context::with_key(&self.0);
        context.update(&operation.0);
        context.update(caller.as_bytes());
        let tag = context.sign();
        let mut secret = Zeroizing::new([0; 32]);
        secret.copy_from_slice(tag.as_ref());
        TokenSecret(secret)
    }
}

impl TokenSecret {
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

/// What does not change between tokens.
#[derive(Debug, Clone)]
pub(crate) struct TokenPlace {
    pub(crate) controllers: Vec<String>,
    pub(crate) trust_domain: String,
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
        let secrets = TokenSecrets::new();
        let (id, secret) = (TokenId([1; 8]), secrets.secret("local root", &OperationId([1; 16])));
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

    #[test]
    fn a_repeated_request_gets_its_secret_and_nobody_else_does() {
        let (secrets, operation) = (TokenSecrets::new(), OperationId([1; 16]));
        let first = secrets.secret("operator alice", &operation).hash();
        assert_eq!(secrets.secret("operator alice", &operation).hash(), first);
        assert_ne!(secrets.secret("operator mallory", &operation).hash(), first);
        assert_ne!(secrets.secret("operator alice", &OperationId([2; 16])).hash(), first);
        assert_ne!(TokenSecrets::new().secret("operator alice", &operation).hash(), first, "after a restart");
    }
}
