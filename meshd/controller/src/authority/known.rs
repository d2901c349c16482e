//! What World says about authorities.

use std::collections::BTreeSet;

use super::CaFacts;

/// What World says about authorities, copied out of its lock.
#[derive(Debug, Clone)]
pub(crate) struct WorldKeys {
    pub(super) stamp: Stamp,
    pub(super) initial: BTreeSet<mesh_core::KeyId>,
    pub(crate) all: Vec<mesh_core::Authority>,
    pub(crate) answering: Vec<mesh_core::Authority>,
    /// The one that issues, and its root.
    pub(crate) active: Option<(mesh_core::Authority, mesh_core::Authority)>,
    pub(crate) key_hashes: BTreeSet<[u8; 32]>,
}

/// Changes whenever authorities do: bundles follow each other, and dropped authorities end one by one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Stamp {
    pub(super) version: u64,
    answering: usize,
    sealed: usize,
}

impl Stamp {
    pub(super) fn of(world: &mesh_core::World) -> Self {
        Self {
            version: world.bundle_version(),
            answering: world.answering_authorities().count(),
            sealed: world.authorities().iter().filter(|known| known.sealed).count(),
        }
    }
}

impl WorldKeys {
    pub(crate) fn of(world: &mesh_core::World) -> Self {
        let hash = |known: &mesh_core::Authority| CaFacts::read(&known.der).map(|facts| facts.spki_sha256);
        Self {
            stamp: Stamp::of(world),
            initial: world
                .mesh()
                .map(|mesh| mesh.cas.iter().map(|ca| ca.key_id.clone()).collect())
                .unwrap_or_default(),
            all: world.authorities().to_vec(),
            answering: world.answering_authorities().cloned().collect(),
            active: world.active_issuer().cloned().zip(world.active_root().cloned()),
            key_hashes: world.authorities().iter().filter_map(hash).collect(),
        }
    }
}
