//! What is remembered of a managed pair: on disk before anything that follows from it is sent or written.

use std::collections::BTreeMap;

use mesh_proto::v1 as pb;
use rustls_pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use time::UtcDateTime;

use super::definition::Definition;
use crate::failure::Failure;
use crate::hostop::{KeyStoreOrder, PairFiles};
use crate::join::leaf_key;
use crate::schedule::renews_at;
use crate::state::{Der, Secret, StateDir, StateError};

const PAIRS_FILE: &str = "pairs.json";

/// All pairs by name.
pub(super) type Records = BTreeMap<String, Record>;

#[derive(Serialize, Deserialize, Clone)]
pub(super) struct Record {
    pub(super) definition: Definition,
    /// What the service uses.
    pub(super) published: Option<Material>,
    /// Issued, and not yet accepted by the service's hook.
    pub(super) candidate: Option<Material>,
    /// Asked for, and not yet answered.
    pub(super) request: Option<IssueRequest>,
    /// An operator revoked it: no renewal until it is issued again.
    pub(super) stopped: bool,
    /// The controller's order to issue anew was carried out already.
    pub(super) reissued: bool,
}

/// A key and its chain.
#[derive(Serialize, Deserialize, Clone)]
pub(super) struct Material {
    pub(super) key: Secret,
    pub(super) leaf: Der,
    pub(super) issuers: Vec<Der>,
    #[serde(with = "hex")]
    pub(super) serial: Vec<u8>,
    /// UTC seconds.
    pub(super) not_before: i64,
    pub(super) not_after: i64,
    /// Whether a server shows it and its revocation is told at all, so that an OCSP response belongs to it.
    #[serde(default)]
    pub(super) staples: bool,
    /// The OCSP response that services staple.
    #[serde(default)]
    pub(super) staple: Option<Staple>,
}

/// An OCSP response that was verified.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq)]
pub(super) struct Staple {
    pub(super) der: Der,
    /// UTC seconds.
    pub(super) taken_at: i64,
    pub(super) next_update: i64,
}

/// The same question is asked again after a crash.
#[derive(Serialize, Deserialize, Clone)]
pub(super) struct IssueRequest {
    #[serde(with = "hex")]
    pub(super) operation_id: [u8; 16],
    pub(super) key: Secret,
    pub(super) csr: Der,
    pub(super) restart: bool,
}

impl Record {
    pub(super) fn new(definition: Definition) -> Self {
        Self { definition, published: None, candidate: None, request: None, stopped: false, reissued: false }
    }

    /// The newest material, accepted or not.
    pub(super) fn newest(&self) -> Option<&Material> {
        self.candidate.as_ref().or(self.published.as_ref())
    }

    /// The pair as people see it.
    pub(super) fn show(&self, problem: &str, changed: bool) -> pb::ManagedPair {
        let state = match (self.stopped, problem) {
            (true, _) => "stopped",
            (false, "") => "ok",
            _ => "failing",
        };
        let material = self.published.as_ref().or(self.candidate.as_ref());
        pb::ManagedPair {
            name: self.definition.name().to_owned(),
            names: self.definition.names.clone(),
            out: self.definition.out.display().to_string(),
            profile: self.definition.profile.clone(),
            serial: material.map(|material| material.serial.clone()).unwrap_or_default().into(),
            not_after: material.map_or(0, |material| material.not_after),
            renews_at: material.map_or(0, |material| material.renews_at().unix_timestamp()),
            state: state.to_owned(),
            problem: problem.to_owned(),
            changed,
            rotate_key: self.definition.rotate_key,
            reload: self.definition.reload.clone().unwrap_or_default(),
            combined: self.definition.combined,
            p12: self.definition.p12_passphrase_file.is_some(),
        }
    }
}

impl Material {
    pub(super) fn renews_at(&self) -> UtcDateTime {
        renews_at(instant(self.not_before), instant(self.not_after), &self.serial)
    }

    pub(super) fn has_expired(&self, now: UtcDateTime) -> bool {
        now.unix_timestamp() > self.not_after
    }

    /// Whether a new OCSP response is to be asked for: after a third of what this one had left, well before servers and
    /// clients mind its age.
    pub(super) fn wants_staple(&self, now: UtcDateTime) -> bool {
        let old = self.staple.as_ref().is_none_or(|staple| {
            let third = (staple.next_update - staple.taken_at) / 3;
            now.unix_timestamp() >= staple.taken_at + third
        });
        self.staples && old
    }

    /// Whether a CA other than `issuer` (its key identifier) signed it; never if `issuer` is empty.
    pub(super) fn is_of_other(&self, issuer: &[u8]) -> bool {
        let own = self.issuers.first().and_then(|der| mesh_ca::ca_key_identifier(&der.0));
        !issuer.is_empty() && own.is_some_and(|own| own.as_bytes() != issuer)
    }

    /// What stands in the pair's folder. The roots are those that this node trusts now: two while one takes the other's place.
    pub(super) fn files(
        &self,
        definition: &Definition,
        crls: &[pb::Crl],
        roots: &[Der],
    ) -> Result<PairFiles, Failure> {
        let chain = || std::iter::once(&self.leaf).chain(self.issuers.first()).map(|der| &der.0);
        let key = leaf_key(&self.key)?;
        let p12 = definition.p12_passphrase_file.as_ref().map(|passphrase_file| KeyStoreOrder {
            alias: definition.name().to_owned(),
            passphrase_file: passphrase_file.clone(),
            key: key.to_pkcs8_der(),
            chain: chain().map(|der| CertificateDer::from(der.clone())).collect(),
        });
        Ok(PairFiles {
            key: key.to_pkcs8_pem(),
            cert: mesh_ca::bundle::encode_certificates(chain()),
            combined: definition.combined,
            p12,
            ca: mesh_ca::bundle::encode_certificates(roots.iter().map(|der| &der.0)),
            crl: mesh_ca::bundle::encode_crls(crls.iter().map(|crl| &crl.der)),
            ocsp: self.staple.as_ref().map(|staple| staple.der.0.clone()),
        })
    }
}

impl StateDir {
    pub(super) fn pairs(&self) -> Result<Records, StateError> {
        Ok(self.read_json(PAIRS_FILE)?.unwrap_or_default())
    }

    pub(super) fn save_pairs(&self, records: &Records) -> Result<(), StateError> {
        self.write_json(PAIRS_FILE, records)
    }
}

fn instant(seconds: i64) -> UtcDateTime {
    UtcDateTime::from_unix_timestamp(seconds).unwrap_or(UtcDateTime::UNIX_EPOCH)
}
