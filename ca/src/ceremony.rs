//! Signing an issuing CA where the root's key is: a request leaves the controller, certificate and CRL come back.
//!
//! The request is one PEM block `MESH ISSUER REQUEST`, the answer a PEM file with one certificate and one CRL. The request
//! is signed by the key it asks a certificate for, so that a file changed on the way asks for nothing.
//!
//! ```text
//! IssuerRequest ::= SEQUENCE { asked Asked, signature BIT STRING }       -- over the DER of asked
//! Asked ::= SEQUENCE { version INTEGER (1), rootKeyHash OCTET STRING, mesh UTF8String, publicKey SubjectPublicKeyInfo,
//!                      crlUrl UTF8String, issuerUrl UTF8String,            -- empty where there is none
//!                      requestedAt INTEGER, crlNumber INTEGER,             -- seconds since 1970; number of the root's CRL
//!                      revoked SEQUENCE OF SEQUENCE { serial OCTET STRING, at INTEGER, reason INTEGER } }
//! ```

use der::asn1::{BitStringRef, OctetStringRef, Utf8StringRef};
use der::{Decode as _, Encode as _, Tag};
use time::UtcDateTime;

use crate::asn1::{content, elements, parts, sequence, wrap};
use crate::bundle::{BundleError, encode_certificates, encode_crls};
use crate::crl::{Crl, CrlError, CrlPlan, ROOT_CRL_LIFETIME, RevokedEntry, build_crl};
use crate::hierarchy::{CaCertificate, CaNaming, create_issuing_ca_for};
use crate::instant::{from_asn1, whole_seconds};
use crate::issue::{IssueError, Issuer, recheck_signature};
use crate::key::{KeyError, PublicKey};
use crate::keystore::{KeyId, KeyStore, KeyStoreError};
use crate::leaf::parse_certificate;
use crate::lint::{Finding, lint_ca, lint_crl};
use crate::pointers::{HttpUrl, Pointers};
use crate::reason::RevocationReason;
use crate::serial::SerialNumber;

/// Largest request or answer, in bytes of PEM.
pub const CEREMONY_BYTES_MAX: usize = 256 * 1024;

/// Most revoked issuing CAs that a request names.
const REVOKED_MAX: usize = 1024;

const REQUEST_LABEL: &str = "MESH ISSUER REQUEST";
const VERSION: u8 = 1;

/// Why a request or its answer is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CeremonyError {
    #[error("file is larger than {CEREMONY_BYTES_MAX} bytes")]
    TooLarge,
    #[error("file is not one PEM block {REQUEST_LABEL:?}")]
    NotRequest,
    #[error("issuer request is malformed")]
    Malformed,
    #[error("issuer request has version {0}, this program knows version {VERSION}")]
    Version(u8),
    #[error("issuer request's key is not taken")]
    Key(#[source] KeyError),
    #[error("issuer request is not signed by the key it names, or was changed")]
    Signature,
    #[error("issuer request is for another root")]
    OtherRoot,
    #[error("key store failed")]
    KeyStore(#[source] KeyStoreError),
    #[error("issuing certificate was not made")]
    Issue(#[source] IssueError),
    #[error("root's CRL was not made or is not taken")]
    Crl(#[source] CrlError),
    #[error("answer is not one certificate and one CRL in PEM")]
    Answer(#[source] BundleError),
    #[error("answer's certificate is for another key")]
    OtherKey,
    #[error("answer's certificate is not signed by this root")]
    NotByRoot,
    #[error("answer breaks a rule: {0}")]
    Lint(Finding),
    #[error("answer's CRL has number {found}, {wanted} was asked for")]
    CrlNumber { found: u64, wanted: u64 },
}

/// What a controller asks of the holder of the root's key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IssuerRequest {
    /// SHA-256 of the root's DER SubjectPublicKeyInfo.
    pub root_key_hash: [u8; 32],
    /// Name of the mesh, see [`CaNaming::mesh`].
    pub mesh: String,
    /// Key of the new issuing CA.
    pub public_key: PublicKey,
    /// Where the root's CRL and certificate are published; written into the new certificate.
    pub pointers: Pointers,
    /// When the controller asked.
    pub requested_at: UtcDateTime,
    /// Number of the root's next CRL.
    pub crl_number: u64,
    /// Issuing CAs that the root's CRL lists.
    pub revoked: Vec<RevokedEntry>,
}

impl IssuerRequest {
    /// The request as PEM, signed with the key `key_id` of `store`, which must be [`public_key`](Self::public_key).
    ///
    /// Blocks while the key store signs.
    pub fn to_pem(&self, store: &dyn KeyStore, key_id: &KeyId) -> Result<String, CeremonyError> {
        let asked = self.encode().map_err(|_| CeremonyError::Malformed)?;
        let signature = store.sign(key_id, &asked).map_err(CeremonyError::KeyStore)?;
        if !self.public_key.verifies(&asked, &signature) {
            return Err(CeremonyError::Signature);
        }
        let bits = BitStringRef::from_bytes(&signature).and_then(|bits| bits.to_der());
        let der = bits.and_then(|bits| sequence(&[&asked, &bits])).map_err(|_| CeremonyError::Malformed)?;
        let config = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
        Ok(pem::encode_config(&pem::Pem::new(REQUEST_LABEL, der), config))
    }

    /// Reads a request and checks that its maker holds the key.
    pub fn parse_verified(text: &[u8]) -> Result<Self, CeremonyError> {
        if text.len() > CEREMONY_BYTES_MAX {
            return Err(CeremonyError::TooLarge);
        }
        let blocks = pem::parse_many(text).map_err(|_| CeremonyError::NotRequest)?;
        let [block] = blocks.as_slice() else { return Err(CeremonyError::NotRequest) };
        if block.tag() != REQUEST_LABEL {
            return Err(CeremonyError::NotRequest);
        }
        let outer = parts(block.contents(), 2).map_err(|_| CeremonyError::Malformed)?;
        let [asked, signature] = outer.as_slice() else { return Err(CeremonyError::Malformed) };
        let signature = BitStringRef::from_der(signature)
            .ok()
            .and_then(|bits| bits.as_bytes())
            .ok_or(CeremonyError::Malformed)?;
        let request = Self::decode(asked)?;
        if request.public_key.verifies(asked, signature) {
            Ok(request)
        } else {
            Err(CeremonyError::Signature)
        }
    }

    fn encode(&self) -> der::Result<Vec<u8>> {
        let text = |text: &str| Utf8StringRef::new(text)?.to_der();
        let url = |url: &Option<HttpUrl>| text(url.as_ref().map_or("", HttpUrl::as_str));
        let seconds = |at: UtcDateTime| u64::try_from(at.unix_timestamp()).unwrap_or(0).to_der();
        let mut revoked = Vec::new();
        for entry in &self.revoked {
            let serial = OctetStringRef::new(entry.serial.as_bytes())?.to_der()?;
            revoked.extend(sequence(&[
                &serial,
                &seconds(entry.revoked_at)?,
                &entry.reason.code().to_der()?,
            ])?);
        }
        sequence(&[
            &VERSION.to_der()?,
            &OctetStringRef::new(&self.root_key_hash)?.to_der()?,
            &text(&self.mesh)?,
            self.public_key.spki_der(),
            &url(&self.pointers.crl)?,
            &url(&self.pointers.issuer)?,
            &seconds(self.requested_at)?,
            &self.crl_number.to_der()?,
            &wrap(Tag::Sequence, &revoked)?,
        ])
    }

    fn decode(asked: &[u8]) -> Result<Self, CeremonyError> {
        let malformed = |_: der::Error| CeremonyError::Malformed;
        let fields = parts(asked, 9).map_err(malformed)?;
        match fields.first().map(|version| u8::from_der(version)) {
            Some(Ok(VERSION)) => {}
            Some(Ok(other)) => return Err(CeremonyError::Version(other)),
            _ => return Err(CeremonyError::Malformed),
        }
        let [_, root, mesh, key, crl, issuer, at, number, revoked] = fields.as_slice() else {
            return Err(CeremonyError::Malformed);
        };
        let url = |bytes: &[u8]| match Utf8StringRef::from_der(bytes).map_err(malformed)?.as_str() {
            "" => Ok(None),
            text => HttpUrl::parse(text).map(Some).map_err(|_| CeremonyError::Malformed),
        };
        let root = OctetStringRef::from_der(root).map_err(malformed)?;
        let list = content(revoked, Tag::Sequence)
            .and_then(|body| elements(body, REVOKED_MAX))
            .map_err(malformed)?;
        Ok(Self {
            root_key_hash: root.as_bytes().try_into().map_err(|_| CeremonyError::Malformed)?,
            mesh: Utf8StringRef::from_der(mesh).map_err(malformed)?.as_str().to_owned(),
            public_key: PublicKey::from_spki_der(key).map_err(CeremonyError::Key)?,
            pointers: Pointers { crl: url(crl)?, ocsp: None, issuer: url(issuer)? },
            requested_at: read_time(at)?,
            crl_number: u64::from_der(number).map_err(malformed)?,
            revoked: list.into_iter().map(read_entry).collect::<Result<_, _>>()?,
        })
    }

    /// Complete and without address: it also speaks for the root itself, whose certificate names none, and OpenSSL's
    /// `-crl_check_all` asks for that.
    fn crl_plan(&self, now: UtcDateTime) -> CrlPlan<'_> {
        CrlPlan::new(self.crl_number, now, ROOT_CRL_LIFETIME, &self.revoked)
    }
}

fn read_time(bytes: &[u8]) -> Result<UtcDateTime, CeremonyError> {
    let seconds = u64::from_der(bytes).map_err(|_| CeremonyError::Malformed)?;
    i64::try_from(seconds)
        .ok()
        .and_then(|seconds| UtcDateTime::from_unix_timestamp(seconds).ok())
        .ok_or(CeremonyError::Malformed)
}

fn read_entry(bytes: &[u8]) -> Result<RevokedEntry, CeremonyError> {
    let fields = parts(bytes, 3).map_err(|_| CeremonyError::Malformed)?;
    let [serial, at, reason] = fields.as_slice() else { return Err(CeremonyError::Malformed) };
    let serial = OctetStringRef::from_der(serial).map_err(|_| CeremonyError::Malformed)?;
    let reason = u8::from_der(reason).map_err(|_| CeremonyError::Malformed)?;
    Ok(RevokedEntry {
        serial: SerialNumber::from_slice(serial.as_bytes()).map_err(|_| CeremonyError::Malformed)?,
        revoked_at: read_time(at)?,
        reason: RevocationReason::from_code(reason).ok_or(CeremonyError::Malformed)?,
    })
}

/// What the holder of the root's key gives back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedIssuer {
    /// The issuing CA's certificate.
    pub certificate: CaCertificate,
    /// The root's CRL for the coming [`ROOT_CRL_LIFETIME`], DER.
    pub root_crl: Vec<u8>,
}

impl SignedIssuer {
    /// Certificate and CRL as one PEM file.
    pub fn to_pem(&self) -> String {
        encode_certificates([&self.certificate.der]) + &encode_crls([&self.root_crl])
    }

    /// Reads the answer to `request`: signed by the root `root_der`, for the key that was asked for, every rule kept.
    pub fn parse_verified(
        text: &[u8],
        request: &IssuerRequest,
        root_der: &[u8],
    ) -> Result<Self, CeremonyError> {
        if text.len() > CEREMONY_BYTES_MAX {
            return Err(CeremonyError::TooLarge);
        }
        let malformed = || CeremonyError::Answer(BundleError::Malformed);
        let blocks = pem::parse_many(text).map_err(|_| malformed())?;
        let [certificate, crl] = blocks.as_slice() else { return Err(malformed()) };
        if certificate.tag() != "CERTIFICATE" || crl.tag() != "X509 CRL" {
            return Err(malformed());
        }
        let (der, root_crl) = (certificate.contents().to_vec(), crl.contents().to_vec());
        let parsed = parse_certificate(&der).ok_or_else(malformed)?;
        if parsed.public_key().raw != request.public_key.spki_der() {
            return Err(CeremonyError::OtherKey);
        }
        recheck_signature(&der, root_der, &request.public_key).map_err(|_| CeremonyError::NotByRoot)?;
        let read = Crl::parse_verified(&root_crl, root_der).map_err(CeremonyError::Crl)?;
        if read.number() != request.crl_number {
            return Err(CeremonyError::CrlNumber { found: read.number(), wanted: request.crl_number });
        }
        let findings = lint_ca(&der, root_der).into_iter().chain(lint_crl(&root_crl, root_der));
        if let Some(finding) = findings.into_iter().next() {
            return Err(CeremonyError::Lint(finding));
        }
        let serial = SerialNumber::from_slice(parsed.raw_serial())
            .map_err(|_| CeremonyError::Lint(Finding::Serial))?;
        let certificate = CaCertificate {
            serial,
            not_before: from_asn1(parsed.validity().not_before),
            not_after: from_asn1(parsed.validity().not_after),
            key_hash: request.public_key.key_hash(),
            der,
        };
        Ok(Self { certificate, root_crl })
    }
}

/// Signs what a verified request asks for: the issuing CA's certificate and the root's CRL.
///
/// Blocks while the key store, which holds the root's key, signs twice.
///
/// # Errors
/// [`CeremonyError::OtherRoot`] if the request names another root; nothing is signed then.
pub fn sign_issuer(
    request: &IssuerRequest,
    root: &Issuer,
    store: &dyn KeyStore,
    now: UtcDateTime,
    rng: &mut dyn FnMut(&mut [u8]),
) -> Result<SignedIssuer, CeremonyError> {
    if root.public_key().key_hash() != request.root_key_hash {
        return Err(CeremonyError::OtherRoot);
    }
    let naming = CaNaming { mesh: &request.mesh, now: whole_seconds(now) };
    let certificate = create_issuing_ca_for(root, store, &request.public_key, naming, &request.pointers, rng)
        .map_err(CeremonyError::Issue)?;
    let root_crl = build_crl(root, store, &request.crl_plan(now)).map_err(CeremonyError::Crl)?;
    Ok(SignedIssuer { certificate, root_crl })
}
