//! Where the authority's own keys are and how they sign.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::str::FromStr;

use zeroize::Zeroizing;

use crate::key::{KeyAlgorithm, KeyError, PublicKey};
use crate::private::KeyPair;

/// Name of a key of the authority, for example `root-9f2c1d`: 1 to 64 lower-case letters, digits, hyphens.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(String);

impl KeyId {
    /// Longest key id in bytes.
    pub const BYTES_MAX: usize = 64;

    /// Takes a name as it is.
    pub fn parse(text: &str) -> Result<Self, KeyStoreError> {
        let plain = |b: u8| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-');
        if text.is_empty() || text.len() > Self::BYTES_MAX || !text.bytes().all(plain) {
            return Err(KeyStoreError::BadId);
        }
        Ok(Self(text.to_owned()))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for KeyId {
    type Err = KeyStoreError;
    fn from_str(text: &str) -> Result<Self, KeyStoreError> {
        Self::parse(text)
    }
}

/// Why a key of the authority cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyStoreError {
    #[error("key id is not 1 to 64 lower-case letters, digits or hyphens")]
    BadId,
    #[error("no key {0}")]
    UnknownKey(KeyId),
    #[error("key {0} is already there")]
    Occupied(KeyId),
    #[error("key {0} is not a key in PKCS #8 of a type that a CA may have")]
    BadKey(KeyId),
    #[error("key {0} cannot sign")]
    Sign(KeyId),
    #[error("key cannot be generated")]
    Generate(#[source] KeyError),
    #[error("hardware token that holds key {key_id} refuses: {what}")]
    Token { key_id: KeyId, what: String },
}

/// Signs with the authority's keys. The key's type fixes the algorithm: ECDSA P-256 with SHA-256, P-384 with SHA-384
/// (RFC 5758 §3.2), Ed25519 (RFC 8410), RSA PKCS #1 v1.5 with SHA-256 (RFC 4055 §5).
///
/// Calls block, possibly on hardware: run them on a bounded blocking pool, never on an async worker.
pub trait KeyStore: Send + Sync {
    /// The signature of `key_id` over `tbs`, the DER of what is to be signed: DER for ECDSA (RFC 5480 §4), plain octets
    /// otherwise.
    fn sign(&self, key_id: &KeyId, tbs: &[u8]) -> Result<Vec<u8>, KeyStoreError>;

    /// The public half of `key_id`.
    fn public_key(&self, key_id: &KeyId) -> Result<PublicKey, KeyStoreError>;
}

/// Keys held in this process's memory, as unsealed from disk.
#[derive(Default)]
pub struct MemoryKeyStore {
    keys: BTreeMap<KeyId, KeyPair>,
}

impl MemoryKeyStore {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    /// Draws an ECDSA P-256 key pair, keeps it as `key_id` and hands out its PKCS #8 DER, to be sealed.
    pub fn generate(&mut self, key_id: KeyId) -> Result<Zeroizing<Vec<u8>>, KeyStoreError> {
        self.generate_for(key_id, KeyAlgorithm::EcdsaP256)
    }

    /// Draws a key pair of a type, keeps it as `key_id` and hands out its PKCS #8 DER, to be sealed.
    pub fn generate_for(
        &mut self,
        key_id: KeyId,
        algorithm: KeyAlgorithm,
    ) -> Result<Zeroizing<Vec<u8>>, KeyStoreError> {
        let pair = KeyPair::generate(algorithm).map_err(KeyStoreError::Generate)?;
        let pkcs8 = pair.pkcs8_der().clone();
        self.insert(key_id, pair)?;
        Ok(pkcs8)
    }

    /// Takes a DER PKCS #8 key, usually fresh from [`unseal`](crate::unseal): P-256, P-384, Ed25519, or an imported CA's
    /// RSA key of 2048 to 4096 bits.
    pub fn insert_pkcs8(&mut self, key_id: KeyId, pkcs8: &[u8]) -> Result<(), KeyStoreError> {
        let pair = KeyPair::from_pkcs8_der(pkcs8).map_err(|_| KeyStoreError::BadKey(key_id.clone()))?;
        self.insert(key_id, pair)
    }

    fn insert(&mut self, key_id: KeyId, pair: KeyPair) -> Result<(), KeyStoreError> {
        match self.keys.entry(key_id) {
            Entry::Occupied(taken) => Err(KeyStoreError::Occupied(taken.key().clone())),
            Entry::Vacant(free) => {
                free.insert(pair);
                Ok(())
            }
        }
    }

    /// Forgets a key, for example the root's once its CRL is signed.
    pub fn remove(&mut self, key_id: &KeyId) -> bool {
        self.keys.remove(key_id).is_some()
    }

    fn key(&self, key_id: &KeyId) -> Result<&KeyPair, KeyStoreError> {
        self.keys.get(key_id).ok_or_else(|| KeyStoreError::UnknownKey(key_id.clone()))
    }
}

impl KeyStore for MemoryKeyStore {
    fn sign(&self, key_id: &KeyId, tbs: &[u8]) -> Result<Vec<u8>, KeyStoreError> {
        self.key(key_id)?.sign(tbs).ok_or_else(|| KeyStoreError::Sign(key_id.clone()))
    }

    fn public_key(&self, key_id: &KeyId) -> Result<PublicKey, KeyStoreError> {
        Ok(self.key(key_id)?.public_key().clone())
    }
}

impl fmt::Debug for MemoryKeyStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.keys.keys()).finish()
    }
}

/// One key of a [`KeyStore`] in the form that rcgen signs with. rcgen's error has no room for a cause, so
/// the store's own is kept here.
pub(crate) struct StoredSigner<'a> {
    store: &'a dyn KeyStore,
    key_id: &'a KeyId,
    public: &'a PublicKey,
    failure: std::cell::RefCell<Option<KeyStoreError>>,
}

impl<'a> StoredSigner<'a> {
    pub(crate) fn new(store: &'a dyn KeyStore, key_id: &'a KeyId, public: &'a PublicKey) -> Self {
        Self { store, key_id, public, failure: std::cell::RefCell::new(None) }
    }

    /// Why the last signature failed, if the store was to blame.
    pub(crate) fn take_failure(&self) -> Option<KeyStoreError> {
        self.failure.take()
    }
}

impl rcgen::PublicKeyData for StoredSigner<'_> {
    fn der_bytes(&self) -> &[u8] {
        self.public.der_bytes()
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        self.public.algorithm().signature()
    }
}

impl rcgen::SigningKey for StoredSigner<'_> {
    fn sign(&self, msg: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        self.store.sign(self.key_id, msg).map_err(|failure| {
            self.failure.replace(Some(failure));
            rcgen::Error::RemoteKeyError
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_or_taken_key_is_named() {
        let mut store = MemoryKeyStore::new();
        let id = KeyId::parse("root-1").unwrap();
        assert_eq!(store.sign(&id, b"x"), Err(KeyStoreError::UnknownKey(id.clone())));
        store.generate(id.clone()).unwrap();
        assert_eq!(store.generate(id.clone()).unwrap_err(), KeyStoreError::Occupied(id.clone()));
        assert!(store.sign(&id, b"x").is_ok());
        assert!(store.remove(&id));
        assert!(store.public_key(&id).is_err());
    }

    #[test]
    fn key_ids_are_plain_names() {
        for text in ["", "Root", "a/b", "..", "a b", &"a".repeat(65)] {
            assert_eq!(KeyId::parse(text), Err(KeyStoreError::BadId), "{text:?}");
        }
    }

    #[test]
    fn a_store_shows_only_names() {
        let mut store = MemoryKeyStore::new();
        store.generate(KeyId::parse("root-1").unwrap()).unwrap();
        assert_eq!(format!("{store:?}"), r#"{KeyId("root-1")}"#);
    }
}
