//! The CA with its keys in memory: the one place where identities meet X.509.

mod known;
mod making;
mod new_key;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock, RwLockWriteGuard};
use std::time::Duration;

use mesh_ca::{
    CaKeyType, CrlPlan, DnsName, HttpUrl, Identity, Issuer, KeyAlgorithm, KeyId, KeyStore, Label, LeafKey,
    LeafTemplate, MemoryKeyStore, NameError, OcspError, OcspResponder, OcspStatus, Profile, PublicKey,
    PublishingPoints, RevokedEntry, SerialNumber, SubjectKey, TrustDomain, UrlError,
};
use mesh_core::world::Place;
use mesh_core::{CertificateRecord, KeyHash, Owner, Reason, Serial, UtcTime};
use sha2::{Digest as _, Sha256};
use time::UtcDateTime;
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer as _;
use zeroize::Zeroizing;

use crate::config::{Passphrase, Unlock};
use crate::error::StartupError;
use crate::hardware::{Hsm, TOKEN_FILE_SUFFIX, read_token_file};
use crate::profiles::{self, Custom};
use crate::state::read_file;
use crate::status::Problem;

pub(crate) use known::WorldKeys;
pub(crate) use making::Making;
pub(crate) use new_key::{KeyProblem, NewKey, key_name, purpose_of, unlock_with};

use known::Stamp;
use new_key::{ISSUING_KEY_ID, key_id, key_name_of};

/// The authorities whose keys are here, able to sign. Signing blocks: only on the blocking pool.
pub(crate) struct Authority {
    domain: TrustDomain,
    keys: PathBuf,
    /// Seals the keys of authorities to come.
    passphrase: Option<Passphrase>,
    /// Keeps the keys of issuing authorities, if keys are kept in hardware.
    token: Option<Hsm>,
    /// The authorities that `init` made: their keys have names of their own.
    initial: BTreeSet<mesh_core::KeyId>,
    ring: RwLock<Ring>,
}

/// One key and the certificate that belongs to it.
pub(crate) struct Signer {
    pub(crate) issuer: Issuer,
    pub(crate) store: Box<dyn KeyStore>,
}

#[derive(Default)]
struct Ring {
    signers: BTreeMap<mesh_core::KeyId, Arc<Signer>>,
    /// As World has it: who issues, below which root.
    active: Option<(mesh_core::Authority, mesh_core::Authority)>,
    answering: Vec<mesh_core::Authority>,
    /// What all this is of.
    stamp: Stamp,
    /// What all others have been told of, see [`Authority::news`].
    told: Option<Stamp>,
    /// SHA-256 of the keys of all authorities there ever were.
    key_hashes: BTreeSet<[u8; 32]>,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").field("domain", &self.domain).finish_non_exhaustive()
    }
}

/// A CRL that was just signed; nothing until its record is durable.
#[derive(Debug)]
pub(crate) struct SignedCrl {
    pub(crate) der: Vec<u8>,
    pub(crate) this_update: UtcTime,
    pub(crate) next_update: UtcTime,
}

/// What a CRL is to say.
pub(crate) struct CrlOrder<'a> {
    pub(crate) number: u64,
    /// The address in the certificates of its shard.
    pub(crate) url: Option<&'a str>,
    pub(crate) revoked: &'a [RevokedEntry],
    pub(crate) now: UtcDateTime,
}

/// Which of the two CAs a CRL belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CaRole {
    Root,
    Issuing,
}

/// What a leaf will say, in the mesh's own words.
#[derive(Debug, Clone)]
pub(crate) struct LeafRequest {
    pub(crate) profile: Profile,
    pub(crate) identity: Option<Identity>,
    pub(crate) owner: Owner,
    pub(crate) names: Vec<mesh_core::DnsName>,
    pub(crate) ips: Vec<IpAddr>,
    pub(crate) wireguard: Vec<[u8; 32]>,
    pub(crate) pair_name: String,
    /// Cut to what profile and issuer allow.
    pub(crate) lifetime: Duration,
    /// The custom profile that says what else stands in it; `profile` is then its kind.
    pub(crate) custom: Option<Custom>,
}

impl LeafRequest {
    /// The name under which the certificate is known.
    fn profile_name(&self) -> &str {
        self.custom.as_ref().map_or(self.profile.name(), |custom| custom.accepted.spec().name.as_str())
    }
}

impl Authority {
    /// Opens the keys of all authorities that answer but sealed ones, and binds each to the certificate that World
    /// remembers.
    ///
    /// # Errors
    /// A wrong passphrase, or a key that is another's: nothing is signed before every key has proved itself.
    pub(crate) fn open(
        keys: &Path,
        domain: &TrustDomain,
        world: &WorldKeys,
        unlock: Unlock,
        passphrase: Option<&Passphrase>,
        token: Option<Hsm>,
    ) -> Result<Self, StartupError> {
        let passphrase = match unlock {
            Unlock::None => None,
            _ => Some(passphrase.ok_or(StartupError::PassphraseMissing)?),
        };
        let authority = Self {
            domain: domain.clone(),
            keys: keys.into(),
            passphrase: passphrase.cloned(),
            token,
            initial: world.initial.clone(),
            ring: RwLock::default(),
        };
        for known in world.answering.iter() {
            let path = authority.key_file(known);
            if known.sealed {
                // Sealing ended with its record; a crash may have left the file.
                match std::fs::remove_file(&path) {
                    Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                        return Err(StartupError::io("remove", path, error));
                    }
                    _ => continue,
                }
            }
            let opened = match authority.token_file(known) {
                Some(path) => authority.open_in_token(known, &path),
                None => authority.open_key(known, &path),
            };
            let signer = match opened {
                Err(StartupError::StateIo { source, .. })
                    if source.kind() == std::io::ErrorKind::NotFound && !known.standing.is_trusted() =>
                {
                    tracing::warn!(issuer = %known.key_id, "the key of a CA that was dropped is gone: its CRLs end");
                    continue;
                }
                opened => opened?,
            };
            authority.lock().signers.insert(known.key_id.clone(), Arc::new(signer));
        }
        authority.follow(world);
        let ring = authority.ring.read().unwrap_or_else(PoisonError::into_inner);
        let ready =
            ring.active.as_ref().is_some_and(|(issuing, _)| ring.signers.contains_key(&issuing.key_id));
        drop(ring);
        match ready {
            true => Ok(authority),
            false => Err(StartupError::StateCorrupt {
                path: keys.into(),
                what: "the journal names no issuing CA whose key is here".into(),
                source: None,
            }),
        }
    }

    /// The key of a trusted authority, opened from disk once more.
    pub(crate) fn open_sealed(
        &self,
        known: &mesh_core::Authority,
    ) -> Result<(KeyId, Zeroizing<Vec<u8>>), Problem> {
        let path = self.key_file(known);
        let text = read_file(&path, mesh_ca::SEALED_KEY_BYTES_MAX as u64)
            .map_err(|error| Problem::internal_error("a CA key cannot be read", &error))?;
        let id = self.key_name(known, &path);
        let unlock = unlock_with(self.passphrase.as_ref());
        let pkcs8 = mesh_ca::unseal(&text, &id, purpose_of(known.is_root), unlock)
            .map_err(|error| Problem::internal_error("a CA key cannot be opened", &error))?;
        Ok((id, pkcs8))
    }

    pub(crate) fn drop_signer(&self, key_id: &mesh_core::KeyId) {
        self.lock().signers.remove(key_id);
    }

    fn open_key(&self, known: &mesh_core::Authority, path: &Path) -> Result<Signer, StartupError> {
        let text = read_file(path, mesh_ca::SEALED_KEY_BYTES_MAX as u64)
            .map_err(|error| StartupError::io("read", path, error))?;
        let mismatch = |what: &str| StartupError::CaKeyMismatch { path: path.into(), what: what.into() };
        let (id, purpose) = (self.key_name(known, path), purpose_of(known.is_root));
        let pkcs8 =
            mesh_ca::unseal(&text, &id, purpose, unlock_with(self.passphrase.as_ref())).map_err(|error| {
                match error {
                    mesh_ca::SealError::WrongPassphrase => StartupError::PassphraseWrong,
                    mesh_ca::SealError::PassphraseNeeded => StartupError::PassphraseMissing,
                    mesh_ca::SealError::OtherKey { .. } | mesh_ca::SealError::OtherPurpose => {
                        mismatch(&error.to_string())
                    }
                    mesh_ca::SealError::Cost(_) => {
                        StartupError::SealedKeyCost { path: path.into(), source: error }
                    }
                    other => StartupError::StateCorrupt {
                        path: path.into(),
                        what: "a CA key cannot be opened".into(),
                        source: Some(other.into()),
                    },
                }
            })?;
        let mut store = MemoryKeyStore::new();
        store.insert_pkcs8(id.clone(), &pkcs8).map_err(|error| StartupError::StateCorrupt {
            path: path.into(),
            what: "a CA key cannot be read".into(),
            source: Some(error.into()),
        })?;
        let issuer = Issuer::new(&known.der, id, self.domain.clone(), &store)
            .map_err(|error| mismatch(&format!("it does not belong to its certificate: {error}")))?;
        Ok(Signer { issuer, store: Box::new(store) })
    }

    fn open_in_token(&self, known: &mesh_core::Authority, path: &Path) -> Result<Signer, StartupError> {
        let id = read_token_file(path)?;
        let token = self.token.as_ref().ok_or_else(|| StartupError::Config {
            key: "key_store",
            problem: format!("the key {id} is in a hardware token, and no token is configured"),
        })?;
        let store = token.open(&id).map_err(|source| StartupError::Hardware { source })?;
        let issuer = Issuer::new(&known.der, id, self.domain.clone(), &store).map_err(|error| {
            StartupError::CaKeyMismatch {
                path: path.into(),
                what: format!("the token's key does not belong to its certificate: {error}"),
            }
        })?;
        Ok(Signer { issuer, store: Box::new(store) })
    }

    /// The file that says under which label an authority's key is in the token; `None` if it is not there.
    fn token_file(&self, known: &mesh_core::Authority) -> Option<PathBuf> {
        let path = self.key_file(known).with_extension(TOKEN_FILE_SUFFIX);
        let first = self.keys.join(format!("{ISSUING_KEY_ID}.{TOKEN_FILE_SUFFIX}"));
        let of_init = self.initial.contains(&known.key_id) && !known.is_root;
        [Some(path), Some(first).filter(|_| of_init)].into_iter().flatten().find(|path| path.exists())
    }

    /// The token that keeps the keys of issuing authorities.
    pub(crate) fn token(&self) -> Option<&Hsm> {
        self.token.as_ref()
    }

    /// Where the sealed key of an authority lies: under a name of its own, or the one it has had since `init`.
    fn key_file(&self, known: &mesh_core::Authority) -> PathBuf {
        let own = self.keys.join(format!("{}.key", key_name_of(known.is_root, &known.key_id)));
        match own.exists() || !self.initial.contains(&known.key_id) {
            true => own,
            false => self.keys.join(if known.is_root { "root.key" } else { "issuing.key" }),
        }
    }

    fn key_name(&self, known: &mesh_core::Authority, path: &Path) -> KeyId {
        let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        KeyId::parse(stem).unwrap_or_else(|_| key_id(&key_name_of(known.is_root, &known.key_id)))
    }

    /// Takes up who issues now, and forgets keys of authorities that nobody trusts any more.
    pub(crate) fn follow(&self, world: &WorldKeys) {
        let mut ring = self.lock();
        if world.stamp.version < ring.stamp.version {
            // Copied before what is here already.
            return;
        }
        ring.active.clone_from(&world.active);
        ring.answering.clone_from(&world.answering);
        ring.stamp = world.stamp;
        ring.key_hashes.clone_from(&world.key_hashes);
        ring.signers.retain(|key_id, _| {
            // A key that was just drawn is not in World yet.
            world
                .all
                .iter()
                .find(|known| known.key_id == *key_id)
                .is_none_or(|known| world.answering.contains(known) && !known.sealed)
        });
    }

    /// Removes the keys of authorities that will never sign again: who held an old root's key could still lead
    /// astray whoever was away since then. Blocks.
    pub(crate) fn discard_ended(&self, world: &WorldKeys) {
        let ended = world.all.iter().filter(|known| !world.answering.contains(known));
        for known in ended {
            let file = match self.token_file(known) {
                Some(file) => {
                    if let (Some(token), Ok(id)) = (&self.token, read_token_file(&file)) {
                        token.destroy(&id);
                    }
                    file
                }
                None => self.key_file(known),
            };
            match std::fs::remove_file(file) {
                Ok(()) => tracing::info!(issuer = %known.key_id, "the key of a CA that has ended is removed"),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => {
                    tracing::warn!(issuer = %known.key_id, %error, "the key of a CA that has ended stays")
                }
            }
        }
    }

    /// Takes up World's authorities if they have changed: whoever saw a new bundle gets a leaf of its issuer.
    pub(crate) fn catch_up(&self, directory: &crate::directory::Directory) {
        let known = self.ring.read().unwrap_or_else(PoisonError::into_inner).stamp;
        if directory.read(Stamp::of) != known {
            self.follow(&directory.read(WorldKeys::of));
        }
    }

    /// World's authorities, if they have changed since this was asked before; they are taken up.
    pub(crate) fn news(&self, directory: &crate::directory::Directory) -> Option<WorldKeys> {
        let told = self.ring.read().unwrap_or_else(PoisonError::into_inner).told;
        if told == Some(directory.read(Stamp::of)) {
            return None;
        }
        let world = directory.read(WorldKeys::of);
        self.follow(&world);
        self.lock().told = Some(world.stamp);
        Some(world)
    }

    pub(crate) fn domain(&self) -> &TrustDomain {
        &self.domain
    }

    pub(crate) fn keys(&self) -> &Path {
        &self.keys
    }

    pub(crate) fn passphrase(&self) -> Option<&Passphrase> {
        self.passphrase.as_ref()
    }

    /// What join tokens pin.
    pub(crate) fn root_spki_sha256(&self) -> [u8; 32] {
        self.active(|_, root| CaFacts::read(&root.der).map(|facts| facts.spki_sha256)).unwrap_or_default()
    }

    pub(crate) fn root_not_after(&self) -> UtcDateTime {
        self.active(|_, root| CaFacts::read(&root.der).map(|facts| facts.not_after))
            .unwrap_or(UtcDateTime::UNIX_EPOCH)
    }

    pub(crate) fn issuing_not_after(&self) -> UtcDateTime {
        self.active(|issuing, _| CaFacts::read(&issuing.der).map(|facts| facts.not_after))
            .unwrap_or(UtcDateTime::UNIX_EPOCH)
    }

    /// What the key of the next issuing CA is, unless somebody wants another.
    pub(crate) fn next_key_type(&self) -> CaKeyType {
        self.active(|issuing, _| Some(CaKeyType::after(key_algorithm(&issuing.der)))).unwrap_or_default()
    }

    /// subjectKeyIdentifier of the CA that issues, or of its root, as World knows issuers.
    pub(crate) fn issuer_key_id(&self, role: CaRole) -> mesh_core::KeyId {
        self.active(|issuing, root| {
            Some(match role {
                CaRole::Issuing => issuing.key_id.clone(),
                CaRole::Root => root.key_id.clone(),
            })
        })
        .expect("a controller runs only with an issuing CA")
    }

    fn active<T>(
        &self,
        look: impl FnOnce(&mesh_core::Authority, &mesh_core::Authority) -> Option<T>,
    ) -> Option<T> {
        let ring = self.ring.read().unwrap_or_else(PoisonError::into_inner);
        let (issuing, root) = ring.active.as_ref()?;
        look(issuing, root)
    }

    /// Whether `key_hash` is one of the CA's own keys.
    pub(crate) fn is_own_key(&self, key_hash: &[u8; 32]) -> bool {
        self.ring.read().unwrap_or_else(PoisonError::into_inner).key_hashes.contains(key_hash)
    }

    /// The key of an authority; `None` if it is not here.
    pub(crate) fn signer(&self, key_id: &mesh_core::KeyId) -> Option<Arc<Signer>> {
        self.ring.read().unwrap_or_else(PoisonError::into_inner).signers.get(key_id).cloned()
    }

    pub(crate) fn add(&self, signer: Signer) {
        self.lock().signers.insert(core_key_id(&signer.issuer), Arc::new(signer));
    }

    /// Lets go of a key in memory and on disk.
    pub(crate) fn forget(&self, known: &mesh_core::Authority) -> std::io::Result<()> {
        self.lock().signers.remove(&known.key_id);
        match std::fs::remove_file(self.key_file(known)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn lock(&self) -> RwLockWriteGuard<'_, Ring> {
        self.ring.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Signs a leaf under the issuing CA, reads it back, lints it. The result is nothing until its
    /// record is durable. Blocks.
    pub(crate) fn issue(
        &self,
        request: &LeafRequest,
        key: SubjectKey<'_>,
        (serial, place): (SerialNumber, &Place),
        now: UtcDateTime,
    ) -> Result<CertificateRecord, IssueProblem> {
        let mut template =
            LeafTemplate::new(request.profile, request.identity.clone(), now, request.lifetime);
        template.dns = request
            .names
            .iter()
            .map(|name| DnsName::parse(name.as_str()))
            .collect::<Result<_, _>>()
            .map_err(IssueProblem::Name)?;
        template.ips.clone_from(&request.ips);
        template.wireguard_keys.clone_from(&request.wireguard);
        template.crl_shard = place.shard;
        let signer = self.signer(&self.issuer_key_id(CaRole::Issuing)).ok_or(IssueProblem::NoKey)?;
        if let Some(base) = &place.base_url {
            let points = points(base).map_err(IssueProblem::Pointers)?;
            let issuer = signer.issuer.key_identifier();
            template.pointers = points.leaf(issuer, place.shard).map_err(IssueProblem::Pointers)?;
        }
        if let Some(custom) = &request.custom {
            let at = (signer.issuer.key_identifier(), place);
            template = profiles::template(custom, request, key.public_key(), at, now, &self.domain)?;
        }
        let issued = mesh_ca::issue_leaf(&signer.issuer, &*signer.store, key, &template, serial)
            .map_err(IssueProblem::Issue)?;
        Ok(CertificateRecord {
            serial: Serial(*issued.serial.as_bytes()),
            key_hash: KeyHash(issued.key_hash),
            owner: request.owner.clone(),
            profile: request.profile_name().to_owned(),
            names: request.names.clone(),
            ips: request.ips.clone(),
            pair_name: request.pair_name.clone(),
            shard: issued.crl_shard,
            not_before: issued.not_before.into(),
            not_after: issued.not_after.into(),
            issuer_key_id: mesh_core::KeyId(issued.issuer_key_id.as_bytes().to_vec()),
            der: issued.der,
        })
    }

    /// Certifies a new key as the delegate of an issuing CA for OCSP. Blocks.
    pub(crate) fn certify_responder(
        &self,
        issuer: &mesh_core::KeyId,
        owner: Owner,
        (serial, place): (SerialNumber, &Place),
        now: UtcDateTime,
    ) -> Result<(OcspResponder, CertificateRecord), OcspError> {
        let signer = self.signer(issuer).ok_or(OcspError::Issuer)?;
        let key = LeafKey::generate().map_err(|_| OcspError::Sign)?;
        let key_hash = KeyHash(key.key_hash());
        let responder = OcspResponder::issue(&signer.issuer, &*signer.store, key, serial, now)?;
        let der = responder.certificate_der().to_vec();
        let facts = CaFacts::read(&der).ok_or(OcspError::NotResponder)?;
        let record = CertificateRecord {
            serial: Serial(*serial.as_bytes()),
            key_hash,
            owner,
            profile: mesh_core::certificate::PROFILE_OCSP.to_owned(),
            names: Vec::new(),
            ips: Vec::new(),
            pair_name: String::new(),
            shard: place.shard,
            not_before: facts.not_before.into(),
            not_after: facts.not_after.into(),
            issuer_key_id: issuer.clone(),
            der,
        };
        Ok((responder, record))
    }

    /// The CAs whose CRLs are published: the one that issues, the other issuing ones, roots. Dropped ones stay until the
    /// last certificate below them has ended.
    pub(crate) fn crl_issuers(&self) -> Vec<(mesh_core::KeyId, CaRole)> {
        let ring = self.ring.read().unwrap_or_else(PoisonError::into_inner);
        let active = ring.active.as_ref().map(|(issuing, _)| &issuing.key_id);
        let mut issuers: Vec<&mesh_core::Authority> = ring.answering.iter().collect();
        issuers.sort_by_key(|known| (known.is_root, Some(&known.key_id) != active));
        issuers.into_iter().map(|known| (known.key_id.clone(), role_of(known))).collect()
    }

    /// Signs a CRL of one of [`crl_issuers`](Self::crl_issuers) whose key is here. Blocks.
    pub(crate) fn crl(
        &self,
        issuer: &mesh_core::KeyId,
        order: &CrlOrder<'_>,
    ) -> Result<SignedCrl, mesh_ca::CrlError> {
        let (role, _) = self.answering(issuer).ok_or(mesh_ca::CrlError::NotCrlIssuer)?;
        let signer = self.signer(issuer).ok_or(mesh_ca::CrlError::NotCrlIssuer)?;
        let lifetime = match role {
            CaRole::Root => mesh_ca::ROOT_CRL_LIFETIME,
            CaRole::Issuing => mesh_ca::CRL_LIFETIME,
        };
        let mut plan = CrlPlan::new(order.number, order.now, lifetime, order.revoked);
        let url = order.url.and_then(|url| HttpUrl::parse(url).ok());
        plan.url = url.as_ref();
        let der = mesh_ca::build_crl(&signer.issuer, &*signer.store, &plan)?;
        Ok(SignedCrl { der, this_update: plan.this_update.into(), next_update: plan.next_update.into() })
    }

    /// How many certificates a CRL of ours lists; `None` if it is not ours or cannot be read.
    pub(crate) fn listed(&self, issuer: &mesh_core::KeyId, der: &[u8]) -> Option<usize> {
        let (_, issuer_der) = self.answering(issuer)?;
        Some(mesh_ca::Crl::parse_verified(der, &issuer_der).ok()?.len())
    }

    /// Kind and certificate of a CA that answers for what it issued.
    fn answering(&self, issuer: &mesh_core::KeyId) -> Option<(CaRole, Vec<u8>)> {
        let ring = self.ring.read().unwrap_or_else(PoisonError::into_inner);
        let known = ring.answering.iter().find(|known| known.key_id == *issuer)?;
        Some((role_of(known), known.der.clone()))
    }
}

fn role_of(known: &mesh_core::Authority) -> CaRole {
    if known.is_root { CaRole::Root } else { CaRole::Issuing }
}

/// Why a leaf was not signed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IssueProblem {
    #[error("name cannot stand in a certificate")]
    Name(#[source] NameError),
    #[error("address of published CRLs cannot stand in a certificate")]
    Pointers(#[source] UrlError),
    #[error("custom profile does not allow it")]
    Profile(#[source] mesh_ca::RequestRefusal),
    #[error("certificate was not issued")]
    Issue(#[source] mesh_ca::IssueError),
    #[error("the issuing CA's key is not here")]
    NoKey,
}

/// What people want to know of a CA certificate.
pub(crate) struct CaFacts {
    pub(crate) subject: String,
    pub(crate) not_before: UtcDateTime,
    pub(crate) not_after: UtcDateTime,
    pub(crate) spki_sha256: [u8; 32],
    pub(crate) serial: Vec<u8>,
}

impl CaFacts {
    /// Reads a certificate of our own; `None` if it cannot be read.
    pub(crate) fn read(der: &[u8]) -> Option<Self> {
        let (_, certificate) = X509Certificate::from_der(der).ok()?;
        let validity = certificate.validity();
        Some(Self {
            subject: certificate.subject().to_string(),
            not_before: validity.not_before.to_datetime().to_utc(),
            not_after: validity.not_after.to_datetime().to_utc(),
            spki_sha256: Sha256::digest(certificate.public_key().raw).into(),
            serial: certificate.raw_serial().to_vec(),
        })
    }
}

/// Type of the key of a CA of ours.
pub(crate) fn key_algorithm(der: &[u8]) -> KeyAlgorithm {
    let certificate = X509Certificate::from_der(der).ok();
    certificate
        .and_then(|(_, certificate)| PublicKey::from_spki_der(certificate.public_key().raw).ok())
        .map_or(KeyAlgorithm::default(), |key| key.algorithm())
}

/// A serial that no certificate of ours has had: 126 random bits; the writer refuses a repeat.
pub(crate) fn draw_serial() -> SerialNumber {
    SerialNumber::random(&mut random_fill)
}

/// The addresses below a base address. How many shards there are is World's to say.
pub(crate) fn points(base: &str) -> Result<PublishingPoints, UrlError> {
    PublishingPoints::new(HttpUrl::parse(base)?, 1)
}

/// A name as one label of a SPIFFE ID.
pub(crate) fn label(text: &str) -> Result<Label, NameError> {
    Label::parse(text)
}

/// A revocation as OCSP tells it: the same time and reason as on the CRL.
pub(crate) fn ocsp_status(revoked: Option<mesh_core::Revocation>) -> OcspStatus {
    let Some(revoked) = revoked else { return OcspStatus::Good };
    let reason = mesh_ca::RevocationReason::from_code(revoked.reason.code());
    let reason = reason.unwrap_or(mesh_ca::RevocationReason::Unspecified);
    OcspStatus::Revoked { at: revoked.at.into(), reason }
}

pub(crate) fn crl_entry(serial: Serial, at: UtcTime, reason: Reason) -> Option<RevokedEntry> {
    Some(RevokedEntry {
        serial: SerialNumber::from_slice(&serial.0).ok()?,
        revoked_at: at.into(),
        reason: mesh_ca::RevocationReason::from_code(reason.code())?,
    })
}

pub(crate) fn core_key_id(issuer: &Issuer) -> mesh_core::KeyId {
    mesh_core::KeyId(issuer.key_identifier().as_bytes().to_vec())
}

pub(crate) fn random_fill(bytes: &mut [u8]) {
    use rand::RngCore as _;
    mesh_runtime::os_rng().fill_bytes(bytes);
}
