//! The CA with its keys in memory: the one place where identities meet X.509.

use std::fmt;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use mesh_ca::{
    CrlPlan, DnsName, HttpUrl, Identity, Issuer, KeyId, KeyPurpose, KeyStore, Label, LeafKey, LeafTemplate,
    MemoryKeyStore, NameError, OcspError, OcspResponder, OcspStatus, Profile, PublishingPoints, RevokedEntry,
    SerialNumber, SubjectKey, TrustDomain, UrlError,
};
use mesh_core::world::Place;
use mesh_core::{CaRecord, CertificateRecord, KeyHash, Owner, Reason, Serial, UtcTime};
use sha2::{Digest as _, Sha256};
use time::UtcDateTime;
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer as _;

use crate::config::{Passphrase, Unlock};
use crate::error::StartupError;
use crate::profiles::{self, Custom};
use crate::state::{read_file, replace_file};

/// File of the sealed root key, below the state directory's `keys`.
const ROOT_KEY_FILE: &str = "root.key";
const ISSUING_KEY_FILE: &str = "issuing.key";
const ROOT_KEY_ID: &str = "root";
const ISSUING_KEY_ID: &str = "issuing";

/// Root and issuing CA, able to sign. Signing blocks: only on the blocking pool.
pub(crate) struct Authority {
    domain: TrustDomain,
    store: MemoryKeyStore,
    root: Issuer,
    issuing: Issuer,
    root_spki_sha256: [u8; 32],
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").field("domain", &self.domain).finish_non_exhaustive()
    }
}

/// What `init` made, before anything of it is recorded.
pub(crate) struct NewAuthority {
    pub(crate) authority: Authority,
    pub(crate) root_not_after: UtcDateTime,
    pub(crate) issuing_not_after: UtcDateTime,
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
    /// Draws both keys, makes both certificates and writes the keys below `keys`.
    pub(crate) fn create(
        keys: &Path,
        domain: &TrustDomain,
        fleet: &str,
        passphrase: Option<&Passphrase>,
        now: UtcDateTime,
    ) -> Result<NewAuthority, StartupError> {
        let mut store = MemoryKeyStore::new();
        let (root_id, issuing_id) = (key_id(ROOT_KEY_ID), key_id(ISSUING_KEY_ID));
        for (id, purpose, file) in [
            (&root_id, KeyPurpose::Root, ROOT_KEY_FILE),
            (&issuing_id, KeyPurpose::Issuing, ISSUING_KEY_FILE),
        ] {
            let pkcs8 = store.generate(id.clone()).map_err(internal("cannot draw a CA key"))?;
            let text = mesh_ca::seal(
                &pkcs8,
                id,
                purpose,
                unlock_with(passphrase),
                mesh_ca::KdfParams::default(),
                &mut random_fill,
            )
            .map_err(internal("cannot seal a CA key"))?;
            let path = keys.join(file);
            replace_file(&path, text.as_bytes()).map_err(|error| StartupError::io("write", &path, error))?;
        }
        let naming = mesh_ca::CaNaming { mesh: fleet, now };
        let root_certificate = mesh_ca::create_root(&store, &root_id, naming, &mut random_fill)
            .map_err(internal("cannot make the root CA"))?;
        let root = Issuer::new(&root_certificate.der, root_id, domain.clone(), &store)
            .map_err(internal("cannot use the root CA"))?;
        let issuing_certificate =
            mesh_ca::create_issuing_ca(&root, &store, &issuing_id, naming, &mut random_fill)
                .map_err(internal("cannot make the issuing CA"))?;
        let issuing = Issuer::new(&issuing_certificate.der, issuing_id, domain.clone(), &store)
            .map_err(internal("cannot use the issuing CA"))?;
        Ok(NewAuthority {
            root_not_after: root_certificate.not_after,
            issuing_not_after: issuing_certificate.not_after,
            authority: Self {
                domain: domain.clone(),
                root_spki_sha256: root_certificate.key_hash,
                store,
                root,
                issuing,
            },
        })
    }

    /// Opens both keys and binds them to the certificates that World remembers.
    pub(crate) fn open(
        keys: &Path,
        domain: &TrustDomain,
        cas: &[CaRecord],
        unlock: Unlock,
        passphrase: Option<&Passphrase>,
    ) -> Result<Self, StartupError> {
        let passphrase = match unlock {
            Unlock::None => None,
            _ => Some(passphrase.ok_or(StartupError::PassphraseMissing)?),
        };
        let mut store = MemoryKeyStore::new();
        let (root_id, issuing_id) = (key_id(ROOT_KEY_ID), key_id(ISSUING_KEY_ID));
        for (id, purpose, file) in [
            (&root_id, KeyPurpose::Root, ROOT_KEY_FILE),
            (&issuing_id, KeyPurpose::Issuing, ISSUING_KEY_FILE),
        ] {
            let path = keys.join(file);
            let text = read_file(&path, mesh_ca::SEALED_KEY_BYTES_MAX as u64)
                .map_err(|error| StartupError::io("read", &path, error))?;
            let pkcs8 =
                mesh_ca::unseal(&text, id, purpose, unlock_with(passphrase)).map_err(
                    |error| match error {
                        mesh_ca::SealError::WrongPassphrase => StartupError::PassphraseWrong,
                        mesh_ca::SealError::PassphraseNeeded => StartupError::PassphraseMissing,
                        other => StartupError::StateCorrupt {
                            path: path.clone(),
                            what: "a CA key cannot be opened".into(),
                            source: Some(other.into()),
                        },
                    },
                )?;
            store.insert_pkcs8(id.clone(), &pkcs8).map_err(|error| StartupError::StateCorrupt {
                path: path.clone(),
                what: "a CA key cannot be read".into(),
                source: Some(error.into()),
            })?;
        }
        let bind = |is_root: bool, id: KeyId| {
            let corrupt = |what: &str, source: Option<mesh_ca::IssueError>| StartupError::StateCorrupt {
                path: keys.into(),
                what: what.into(),
                source: source.map(Into::into),
            };
            let record = cas
                .iter()
                .rfind(|ca| ca.is_root == is_root)
                .ok_or_else(|| corrupt("the journal names no such CA", None))?;
            Issuer::new(&record.der, id, domain.clone(), &store)
                .map_err(|error| corrupt("a CA's key and certificate do not fit", Some(error)))
        };
        let root = bind(true, root_id)?;
        let issuing = bind(false, issuing_id)?;
        let root_spki_sha256 =
            store.public_key(root.key_id()).map_err(internal("cannot read the root's key"))?.key_hash();
        Ok(Self { domain: domain.clone(), root_spki_sha256, store, root, issuing })
    }

    pub(crate) fn domain(&self) -> &TrustDomain {
        &self.domain
    }

    /// What join tokens pin.
    pub(crate) fn root_spki_sha256(&self) -> [u8; 32] {
        self.root_spki_sha256
    }

    pub(crate) fn root_der(&self) -> &[u8] {
        self.root.certificate_der()
    }

    pub(crate) fn issuing_der(&self) -> &[u8] {
        self.issuing.certificate_der()
    }

    pub(crate) fn root_not_after(&self) -> UtcDateTime {
        self.root.not_after()
    }

    pub(crate) fn issuing_not_after(&self) -> UtcDateTime {
        self.issuing.not_after()
    }

    /// subjectKeyIdentifier of one of the two, as World knows issuers.
    pub(crate) fn issuer_key_id(&self, role: CaRole) -> mesh_core::KeyId {
        core_key_id(self.ca(role))
    }

    /// Whether `key_hash` is one of the CA's own keys.
    pub(crate) fn is_own_key(&self, key_hash: &[u8; 32]) -> bool {
        [&self.root, &self.issuing]
            .into_iter()
            .any(|issuer| self.store.public_key(issuer.key_id()).is_ok_and(|key| key.key_hash() == *key_hash))
    }

    pub(crate) fn ca_records(&self) -> Vec<CaRecord> {
        [(&self.root, true), (&self.issuing, false)]
            .map(|(issuer, is_root)| CaRecord {
                key_id: core_key_id(issuer),
                der: issuer.certificate_der().to_vec(),
                is_root,
            })
            .into()
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
        if let Some(base) = &place.base_url {
            let points = points(base).map_err(IssueProblem::Pointers)?;
            let issuer = self.issuing.key_identifier();
            template.pointers = points.leaf(issuer, place.shard).map_err(IssueProblem::Pointers)?;
        }
        if let Some(custom) = &request.custom {
            let at = (self.issuing.key_identifier(), place);
            template = profiles::template(custom, request, key.public_key(), at, now, &self.domain)?;
        }
        let issued = mesh_ca::issue_leaf(&self.issuing, &self.store, key, &template, serial)
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
        let role = self.role_of(issuer).ok_or(OcspError::Issuer)?;
        let key = LeafKey::generate().map_err(|_| OcspError::Sign)?;
        let key_hash = KeyHash(key.key_hash());
        let responder = OcspResponder::issue(self.ca(role), &self.store, key, serial, now)?;
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

    /// The CAs whose CRLs are published, issuing ones first.
    pub(crate) fn crl_issuers(&self) -> Vec<(mesh_core::KeyId, CaRole)> {
        [CaRole::Issuing, CaRole::Root].map(|role| (self.issuer_key_id(role), role)).into()
    }

    /// Signs a CRL of one of [`crl_issuers`](Self::crl_issuers). Blocks.
    pub(crate) fn crl(
        &self,
        issuer: &mesh_core::KeyId,
        order: &CrlOrder<'_>,
    ) -> Result<SignedCrl, mesh_ca::CrlError> {
        let role = self.role_of(issuer).ok_or(mesh_ca::CrlError::NotCrlIssuer)?;
        let lifetime = match role {
            CaRole::Root => mesh_ca::ROOT_CRL_LIFETIME,
            CaRole::Issuing => mesh_ca::CRL_LIFETIME,
        };
        let mut plan = CrlPlan::new(order.number, order.now, lifetime, order.revoked);
        let url = order.url.and_then(|url| HttpUrl::parse(url).ok());
        plan.url = url.as_ref();
        let der = mesh_ca::build_crl(self.ca(role), &self.store, &plan)?;
        Ok(SignedCrl { der, this_update: plan.this_update.into(), next_update: plan.next_update.into() })
    }

    /// How many certificates a CRL of ours lists; `None` if it is not ours or cannot be read.
    pub(crate) fn listed(&self, issuer: &mesh_core::KeyId, der: &[u8]) -> Option<usize> {
        let issuer = self.ca(self.role_of(issuer)?).certificate_der();
        Some(mesh_ca::Crl::parse_verified(der, issuer).ok()?.len())
    }

    fn role_of(&self, issuer: &mesh_core::KeyId) -> Option<CaRole> {
        self.crl_issuers().into_iter().find(|(known, _)| known == issuer).map(|(_, role)| role)
    }

    fn ca(&self, role: CaRole) -> &Issuer {
        match role {
            CaRole::Root => &self.root,
            CaRole::Issuing => &self.issuing,
        }
    }
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

fn core_key_id(issuer: &Issuer) -> mesh_core::KeyId {
    mesh_core::KeyId(issuer.key_identifier().as_bytes().to_vec())
}

pub(crate) fn random_fill(bytes: &mut [u8]) {
    use rand::RngCore as _;
    mesh_runtime::os_rng().fill_bytes(bytes);
}

fn key_id(text: &str) -> KeyId {
    KeyId::parse(text).expect("our key ids are lower-case words")
}

fn unlock_with(passphrase: Option<&Passphrase>) -> mesh_ca::Unlock<'_> {
    match passphrase {
        Some(passphrase) => mesh_ca::Unlock::Passphrase(passphrase.as_bytes()),
        None => mesh_ca::Unlock::None,
    }
}

fn internal<E: std::error::Error + Send + Sync + 'static>(
    what: &'static str,
) -> impl FnOnce(E) -> StartupError {
    move |error| StartupError::internal(what, error)
}
