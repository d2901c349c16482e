//! The authorities that a mesh begins with.

use std::path::Path;

use mesh_ca::{
    CaKeyType, DnsName, Identity, Issuer, KeyId, KeyPurpose, KeyStore, LeafKey, LeafTemplate, Profile,
    SubjectKey, TrustDomain,
};
use mesh_core::CaRecord;
use time::UtcDateTime;

use super::new_key::{ISSUING_KEY_ID, KeyProblem, NewKey, ROOT_KEY_ID, key_id};
use super::{CaFacts, draw_serial, label, random_fill};
use crate::config::Passphrase;
use crate::error::StartupError;
use crate::hardware::{Hsm, TOKEN_FILE_SUFFIX, write_token_file};
use crate::import::{Foreign, ImportProblem};

/// What `init` shall make its authorities of.
pub(crate) struct Making<'a> {
    pub(crate) keys: &'a Path,
    pub(crate) domain: &'a TrustDomain,
    pub(crate) fleet: &'a str,
    pub(crate) passphrase: Option<&'a Passphrase>,
    /// Keeps the issuing key.
    pub(crate) token: Option<&'a Hsm>,
    /// A CA that takes the place of a new one.
    pub(crate) foreign: Option<&'a Foreign>,
    /// Of the keys that are drawn.
    pub(crate) key_type: CaKeyType,
    pub(crate) now: UtcDateTime,
}

/// What `init` made, before anything of it is recorded.
pub(crate) struct NewAuthority {
    pub(crate) cas: Vec<CaRecord>,
    pub(crate) root_spki_sha256: [u8; 32],
    pub(crate) root_not_after: UtcDateTime,
    pub(crate) issuing_not_after: UtcDateTime,
}

impl Making<'_> {
    /// Draws the keys that are not brought along, makes their certificates and writes the keys below `keys`.
    ///
    /// # Errors
    /// A key that was drawn in a token for nothing is taken out again.
    pub(crate) fn create(&self) -> Result<NewAuthority, StartupError> {
        let failed = |problem: KeyProblem| problem.at_start(self.keys);
        let Some(foreign) = self.foreign else {
            let key = self.draw(ROOT_KEY_ID, KeyPurpose::Root)?;
            let naming = mesh_ca::CaNaming { mesh: self.fleet, now: self.now };
            let root = mesh_ca::create_root(&key.store, &key.id, naming, &mut random_fill)
                .map_err(internal("cannot make the root CA"))?;
            let made = self.below(&key, &root.der)?;
            key.write(self.keys).map_err(failed)?;
            return self.sum_up(&root.der, false, &made);
        };
        let brought = |name, purpose| {
            NewKey::take(key_id(name), &foreign.ca.pkcs8, purpose, self.passphrase).map_err(failed)
        };
        if foreign.ca.is_root() {
            let key = brought(ROOT_KEY_ID, KeyPurpose::Root)?;
            let made = self.below(&key, &foreign.ca.certificate)?;
            key.write(self.keys).map_err(failed)?;
            return self.sum_up(foreign.root(), false, &made);
        }
        let key = brought(ISSUING_KEY_ID, KeyPurpose::Issuing)?;
        let der = foreign.ca.certificate.to_vec();
        self.try_out(foreign.root(), &der, key.id.clone(), &key.store)?;
        key.write(self.keys).map_err(failed)?;
        self.sum_up(foreign.root(), true, &der)
    }

    fn draw(&self, name: &str, purpose: KeyPurpose) -> Result<NewKey, StartupError> {
        NewKey::draw(key_id(name), purpose, self.key_type, self.passphrase)
            .map_err(|problem| problem.at_start(self.keys))
    }

    /// An issuing CA below the root whose key is here: drawn, certified, and written or kept in the token.
    fn below(&self, root_key: &NewKey, root_der: &[u8]) -> Result<Vec<u8>, StartupError> {
        let failed = |problem: KeyProblem| problem.at_start(self.keys);
        let root = Issuer::new(root_der, root_key.id.clone(), self.domain.clone(), &root_key.store)
            .map_err(|error| self.refused(error))?;
        let Some(token) = self.token else {
            let key = self.draw(ISSUING_KEY_ID, KeyPurpose::Issuing)?;
            let der = self.certify((&root, &root_key.store), (&key.id, &key.store))?;
            key.write(self.keys).map_err(failed)?;
            return Ok(der);
        };
        let label = Hsm::fresh_label();
        let store =
            token.generate(&label, self.key_type).map_err(|source| StartupError::Hardware { source })?;
        let path = self.keys.join(format!("{ISSUING_KEY_ID}.{TOKEN_FILE_SUFFIX}"));
        let made = self.certify((&root, &root_key.store), (&label, &store)).and_then(|der| {
            write_token_file(&path, &label).map_err(|error| StartupError::io("write", &path, error))?;
            Ok(der)
        });
        if made.is_err() {
            token.destroy(&label);
        }
        made
    }

    fn certify(
        &self,
        (root, root_store): (&Issuer, &dyn KeyStore),
        (id, store): (&KeyId, &dyn KeyStore),
    ) -> Result<Vec<u8>, StartupError> {
        let public = store.public_key(id).map_err(internal("cannot use the issuing CA's key"))?;
        let naming = mesh_ca::CaNaming { mesh: self.fleet, now: self.now };
        let none = mesh_ca::Pointers::default();
        let made = mesh_ca::create_issuing_ca_for(root, root_store, &public, naming, &none, &mut random_fill)
            .map_err(|error| self.refused(error))?;
        self.try_out(root.certificate_der(), &made.der, id.clone(), store)?;
        Ok(made.der)
    }

    /// Issues a node's certificate that nobody gets, and asks whether it would be accepted: what a CA's name constraints
    /// or path length forbid shows here and not on the first server.
    fn try_out(
        &self,
        root_der: &[u8],
        issuing_der: &[u8],
        id: KeyId,
        store: &dyn KeyStore,
    ) -> Result<(), StartupError> {
        let sample = || -> Result<Vec<u8>, mesh_ca::IssueError> {
            let issuer = Issuer::new(issuing_der, id, self.domain.clone(), store)?;
            let key = LeafKey::generate()
                .map_err(|source| mesh_ca::IssueError::KeyStore(mesh_ca::KeyStoreError::Generate(source)))?;
            let name = label("sample").map_err(|_| mesh_ca::IssueError::MeshName)?;
            let lifetime = Profile::Node.default_lifetime();
            let mut template =
                LeafTemplate::new(Profile::Node, Some(Identity::Node { name }), self.now, lifetime);
            template.dns = DnsName::parse(&format!("sample.{}", self.domain)).into_iter().collect();
            template.ips = vec![std::net::Ipv4Addr::new(100, 64, 0, 1).into()];
            template.wireguard_keys = vec![[9; 32]];
            mesh_ca::issue_leaf(&issuer, store, SubjectKey::Own(&key), &template, draw_serial())
                .map(|issued| issued.der)
        };
        let leaf = sample().map_err(|error| self.refused(error))?;
        let verify = || -> Result<(), mesh_ca::ChainError> {
            let anchors = mesh_ca::TrustAnchors::new(self.domain.clone(), [root_der])?;
            let chain = [rustls_pki_types::CertificateDer::from(issuing_der)];
            mesh_ca::verify_chain(&leaf, &chain, &anchors, self.now, mesh_ca::Usage::Any, None).map(drop)
        };
        verify().map_err(|error| StartupError::Import { problem: ImportProblem::Sample(error) })
    }

    /// A CA that was brought along and cannot sign is its owner's affair, one of our own is ours.
    fn refused(&self, error: mesh_ca::IssueError) -> StartupError {
        match self.foreign {
            Some(_) => StartupError::Import { problem: ImportProblem::Sign(error) },
            None => StartupError::internal("cannot make a CA", error),
        }
    }

    fn sum_up(
        &self,
        root_der: &[u8],
        sealed: bool,
        issuing_der: &[u8],
    ) -> Result<NewAuthority, StartupError> {
        let facts = |der: &[u8]| {
            CaFacts::read(der).ok_or_else(|| StartupError::Internal {
                what: "a CA certificate cannot be read back".into(),
                source: None,
            })
        };
        let record = |der: &[u8], is_root| CaRecord {
            key_id: mesh_core::KeyId(
                mesh_ca::ca_key_identifier(der).map(|id| id.as_bytes().to_vec()).unwrap_or_default(),
            ),
            der: der.to_vec(),
            is_root,
            sealed: is_root && sealed,
        };
        let root = facts(root_der)?;
        Ok(NewAuthority {
            root_spki_sha256: root.spki_sha256,
            root_not_after: root.not_after,
            issuing_not_after: facts(issuing_der)?.not_after,
            cas: vec![record(root_der, true), record(issuing_der, false)],
        })
    }
}

fn internal<E: std::error::Error + Send + Sync + 'static>(
    what: &'static str,
) -> impl FnOnce(E) -> StartupError {
    move |error| StartupError::internal(what, error)
}
