//! A CA key that is sealed under the mesh's passphrase, and where it lies.

use std::path::{Path, PathBuf};

use mesh_ca::{CaKeyType, KeyId, KeyPurpose, MemoryKeyStore};
use zeroize::Zeroizing;

use super::{Authority, random_fill};
use crate::config::Passphrase;
use crate::error::StartupError;
use crate::state::{read_file, replace_file};
use crate::status::Problem;

/// Names of the keys that a mesh begins with; later ones carry a part of their own identifier.
pub(super) const ROOT_KEY_ID: &str = "root";
pub(super) const ISSUING_KEY_ID: &str = "issuing";

/// A key that was just drawn. Dropped, it never was.
pub(crate) struct NewKey {
    pub(crate) id: KeyId,
    pub(crate) store: MemoryKeyStore,
    pkcs8: Zeroizing<Vec<u8>>,
    sealed: Zeroizing<String>,
}

/// Why there is no new key.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KeyProblem {
    #[error("cannot draw a CA key")]
    Draw(#[source] mesh_ca::KeyStoreError),
    #[error("cannot seal a CA key")]
    Seal(#[source] mesh_ca::SealError),
    #[error("cannot write a CA key")]
    Write(#[source] std::io::Error),
}

impl KeyProblem {
    pub(super) fn at_start(self, keys: &Path) -> StartupError {
        match self {
            Self::Write(error) => StartupError::io("write", keys, error),
            other => StartupError::internal("cannot make a CA key", other),
        }
    }
}

impl NewKey {
    pub(crate) fn draw(
        id: KeyId,
        purpose: KeyPurpose,
        key_type: CaKeyType,
        passphrase: Option<&Passphrase>,
    ) -> Result<Self, KeyProblem> {
        let mut store = MemoryKeyStore::new();
        let pkcs8 = store.generate_for(id.clone(), key_type.algorithm()).map_err(KeyProblem::Draw)?;
        Self::sealed(id, store, pkcs8, purpose, passphrase)
    }

    /// A key that was drawn elsewhere.
    pub(crate) fn take(
        id: KeyId,
        pkcs8: &Zeroizing<Vec<u8>>,
        purpose: KeyPurpose,
        passphrase: Option<&Passphrase>,
    ) -> Result<Self, KeyProblem> {
        let mut store = MemoryKeyStore::new();
        store.insert_pkcs8(id.clone(), pkcs8).map_err(KeyProblem::Draw)?;
        Self::sealed(id, store, pkcs8.clone(), purpose, passphrase)
    }

    /// A key that waits on disk.
    pub(crate) fn open(authority: &Authority, name: &str, purpose: KeyPurpose) -> Result<Self, Problem> {
        let (id, path) = (key_id(name), authority.keys().join(format!("{name}.key")));
        let text = read_file(&path, mesh_ca::SEALED_KEY_BYTES_MAX as u64)
            .map_err(|_| Problem::ceremony("no request is waiting for an answer"))?;
        let unlock = unlock_with(authority.passphrase());
        let pkcs8 = mesh_ca::unseal(&text, &id, purpose, unlock)
            .map_err(|error| Problem::ceremony(format!("the key that waits cannot be opened: {error}")))?;
        let mut store = MemoryKeyStore::new();
        store
            .insert_pkcs8(id.clone(), &pkcs8)
            .map_err(|error| Problem::internal_error("the key that waits cannot be used", &error))?;
        Ok(Self::sealed(id, store, pkcs8, purpose, authority.passphrase())?)
    }

    /// The same key under another name.
    pub(crate) fn renamed(
        self,
        id: KeyId,
        purpose: KeyPurpose,
        passphrase: Option<&Passphrase>,
    ) -> Result<Self, KeyProblem> {
        let mut store = MemoryKeyStore::new();
        store.insert_pkcs8(id.clone(), &self.pkcs8).map_err(KeyProblem::Draw)?;
        Self::sealed(id, store, self.pkcs8, purpose, passphrase)
    }

    fn sealed(
        id: KeyId,
        store: MemoryKeyStore,
        pkcs8: Zeroizing<Vec<u8>>,
        purpose: KeyPurpose,
        passphrase: Option<&Passphrase>,
    ) -> Result<Self, KeyProblem> {
        let cost = mesh_ca::KdfParams::default();
        let sealed = mesh_ca::seal(&pkcs8, &id, purpose, unlock_with(passphrase), cost, &mut random_fill)
            .map_err(KeyProblem::Seal)?;
        Ok(Self { id, store, pkcs8, sealed })
    }

    pub(crate) fn file(&self, keys: &Path) -> PathBuf {
        keys.join(format!("{}.key", self.id))
    }

    pub(crate) fn write(&self, keys: &Path) -> Result<(), KeyProblem> {
        replace_file(&self.file(keys), self.sealed.as_bytes()).map_err(KeyProblem::Write)
    }
}

pub(crate) fn purpose_of(is_root: bool) -> KeyPurpose {
    if is_root { KeyPurpose::Root } else { KeyPurpose::Issuing }
}

/// The name of an authority's key in its store and on disk.
pub(crate) fn key_name(is_root: bool, id: &mesh_core::KeyId) -> KeyId {
    key_id(&key_name_of(is_root, id))
}

pub(super) fn key_name_of(is_root: bool, key_id: &mesh_core::KeyId) -> String {
    let kind = if is_root { ROOT_KEY_ID } else { ISSUING_KEY_ID };
    format!("{kind}-{}", hex::encode(&key_id.0[..key_id.0.len().min(8)]))
}

pub(super) fn key_id(text: &str) -> KeyId {
    KeyId::parse(text).expect("our key ids are lower-case words")
}

pub(crate) fn unlock_with(passphrase: Option<&Passphrase>) -> mesh_ca::Unlock<'_> {
    match passphrase {
        Some(passphrase) => mesh_ca::Unlock::Passphrase(passphrase.as_bytes()),
        None => mesh_ca::Unlock::None,
    }
}
