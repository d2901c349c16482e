//! Making CA certificates: the root, issuing CAs under it, and cross-signatures between roots.

use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyUsagePurpose};
use sha2::{Digest as _, Sha256};
use time::UtcDateTime;

use crate::extension::add_pointers;
use crate::instant::{CLOCK_SKEW_ALLOWANCE, from_asn1, to_offset, whole_seconds};
use crate::issue::{IssueError, Issuer, LEAF_VALIDITY_MIN, recheck_signature, signing_error};
use crate::key::PublicKey;
use crate::keystore::{KeyId, KeyStore, StoredSigner};
use crate::leaf::{parse_certificate, read_extensions};
use crate::lint::{CaKind, lint_ca_as};
use crate::pointers::Pointers;
use crate::serial::SerialNumber;

/// Validity of a root without backdating: 3652 days, ten years.
pub const ROOT_LIFETIME: Duration = Duration::from_secs(3652 * 24 * 3600);

/// Validity of an issuing CA without backdating: 730 days, two years.
pub const ISSUING_CA_LIFETIME: Duration = Duration::from_secs(730 * 24 * 3600);

/// Longest mesh name in a CA's subject, in bytes; the rest of a common name takes 27 of its 64.
pub(crate) const MESH_NAME_BYTES_MAX: usize = 32;

/// A CA certificate that was just signed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaCertificate {
    pub der: Vec<u8>,
    pub serial: SerialNumber,
    pub not_before: UtcDateTime,
    pub not_after: UtcDateTime,
    /// SHA-256 of the DER SubjectPublicKeyInfo: the pin of a root.
    pub key_hash: [u8; 32],
}

/// What a CA is called and from when it counts.
#[derive(Debug, Clone, Copy)]
pub struct CaNaming<'a> {
    /// Name of the mesh, for example `prod-eu`; 1 to 32 printable ASCII characters.
    pub mesh: &'a str,
    /// The moment of making; notBefore is this less [`CLOCK_SKEW_ALLOWANCE`].
    pub now: UtcDateTime,
}

/// Makes the self-signed root for the key `key_id` of `store` (P-256, P-384 or Ed25519), valid for [`ROOT_LIFETIME`].
///
/// Blocks while the key store signs.
pub fn create_root(
    store: &dyn KeyStore,
    key_id: &KeyId,
    naming: CaNaming<'_>,
    rng: &mut dyn FnMut(&mut [u8]),
) -> Result<CaCertificate, IssueError> {
    let public = store.public_key(key_id).map_err(IssueError::KeyStore)?;
    check_new_ca_key(&public)?;
    let not_before = whole_seconds(naming.now - CLOCK_SKEW_ALLOWANCE);
    let not_after = whole_seconds(naming.now + ROOT_LIFETIME);
    let serial = SerialNumber::random(rng);
    let name = ca_name("root CA", naming, &public)?;
    let params = CaParams { name: &name, public: &public, serial, not_before, not_after }
        .build(BasicConstraints::Unconstrained);
    let signer = StoredSigner::new(store, key_id, &public);
    let der = params.self_signed(&signer).map_err(|error| signing_error(&signer, &error))?.der().to_vec();
    recheck_signature(&der, &der, &public)?;
    finish(CaKind::Root, der.clone(), &der, serial, not_before, not_after, &public)
}

/// Makes an issuing CA under `root` for the key `key_id` of `store`, without pointers. See [`create_issuing_ca_for`].
///
/// Blocks while the key store signs.
pub fn create_issuing_ca(
    root: &Issuer,
    store: &dyn KeyStore,
    key_id: &KeyId,
    naming: CaNaming<'_>,
    rng: &mut dyn FnMut(&mut [u8]),
) -> Result<CaCertificate, IssueError> {
    let public = store.public_key(key_id).map_err(IssueError::KeyStore)?;
    create_issuing_ca_for(root, store, &public, naming, &Pointers::default(), rng)
}

/// Makes an issuing CA under `root` for a public key whose possession the caller has checked (P-256, P-384 or Ed25519):
/// [`ISSUING_CA_LIFETIME`] cut to the root's, path length 0. `store` holds the root's key; `pointers` name the root's CRL
/// for CA certificates and the root's certificate ([`PublishingPoints::ca`](crate::PublishingPoints::ca)).
///
/// Several may live side by side: each key gets a subject of its own. Blocks while the key store signs.
pub fn create_issuing_ca_for(
    root: &Issuer,
    store: &dyn KeyStore,
    public: &PublicKey,
    naming: CaNaming<'_>,
    pointers: &Pointers,
    rng: &mut dyn FnMut(&mut [u8]),
) -> Result<CaCertificate, IssueError> {
    if root.path_len == Some(0) {
        return Err(IssueError::PathLength);
    }
    check_new_ca_key(public)?;
    if *public == root.public {
        return Err(IssueError::IssuerKeyAsLeaf);
    }
    let (not_before, not_after) = cut_validity(root, naming.now, naming.now + ISSUING_CA_LIFETIME)?;
    let serial = SerialNumber::random(rng);
    let name = ca_name("issuing CA", naming, public)?;
    let mut params = CaParams { name: &name, public, serial, not_before, not_after }
        .build(BasicConstraints::Constrained(0));
    params.use_authority_key_identifier_extension = true;
    add_pointers(&mut params, pointers).map_err(|error| IssueError::Encode(error.to_string()))?;
    let der = root.sign(store, &params, public)?;
    recheck_signature(&der, root.certificate_der(), public)?;
    finish(CaKind::Issuing, der, root.certificate_der(), serial, not_before, not_after, public)
}

/// Cross-signs the root or issuing CA `subject_der` of this authority with another root: the same subject, key and key
/// identifier under `root`, so that who trusts only `root` accepts what that CA signed. This is the one case in which two
/// CA certificates share a subject (RFC 5280 §3.2).
///
/// notAfter is the earlier of the subject's and `root`'s. A root gets path length 1, an issuing CA 0. Blocks while the key
/// store signs.
///
/// # Errors
/// [`IssueError::CrossSubject`] unless `subject_der` is a CA certificate whose subject is one common name, as all made here
/// are.
pub fn cross_sign(
    root: &Issuer,
    store: &dyn KeyStore,
    subject_der: &[u8],
    pointers: &Pointers,
    now: UtcDateTime,
    rng: &mut dyn FnMut(&mut [u8]),
) -> Result<CaCertificate, IssueError> {
    let subject = parse_certificate(subject_der).ok_or(IssueError::CrossSubject)?;
    let extensions = read_extensions(&subject).map_err(|_| IssueError::CrossSubject)?;
    let public = PublicKey::from_spki_der(subject.public_key().raw).map_err(|_| IssueError::CrossSubject)?;
    if !(extensions.is_ca && extensions.key_cert_sign && extensions.crl_sign) {
        return Err(IssueError::CrossSubject);
    }
    if public == root.public {
        return Err(IssueError::IssuerKeyAsLeaf);
    }
    let (kind, length) = match extensions.path_len {
        Some(0) => (CaKind::Issuing, 0),
        _ => (CaKind::CrossRoot, 1),
    };
    // The issuing CA below counts against the path as well.
    if root.path_len.is_some_and(|allowed| allowed <= u32::from(length)) {
        return Err(IssueError::PathLength);
    }
    let name = match subject.subject().iter_common_name().collect::<Vec<_>>().as_slice() {
        [name] => name.as_str().map_err(|_| IssueError::CrossSubject)?,
        _ => return Err(IssueError::CrossSubject),
    };
    let (not_before, not_after) = cut_validity(root, now, from_asn1(subject.validity().not_after))?;
    let serial = SerialNumber::random(rng);
    let mut params = CaParams { name, public: &public, serial, not_before, not_after }
        .build(BasicConstraints::Constrained(length));
    let key_id = extensions.subject_key_id.ok_or(IssueError::CrossSubject)?;
    params.key_identifier_method = rcgen::KeyIdMethod::PreSpecified(key_id.as_bytes().to_vec());
    params.use_authority_key_identifier_extension = true;
    add_pointers(&mut params, pointers).map_err(|error| IssueError::Encode(error.to_string()))?;
    let der = root.sign(store, &params, &public)?;
    recheck_signature(&der, root.certificate_der(), &public)?;
    let made = parse_certificate(&der).ok_or(IssueError::CrossSubject)?;
    if made.subject().as_raw() != subject.subject().as_raw() {
        return Err(IssueError::CrossSubject);
    }
    drop(made);
    finish(kind, der, root.certificate_der(), serial, not_before, not_after, &public)
}

fn check_new_ca_key(public: &PublicKey) -> Result<(), IssueError> {
    let algorithm = public.algorithm();
    if algorithm.permits_new_ca() { Ok(()) } else { Err(IssueError::CaKey(algorithm)) }
}

fn cut_validity(
    root: &Issuer,
    now: UtcDateTime,
    wanted: UtcDateTime,
) -> Result<(UtcDateTime, UtcDateTime), IssueError> {
    let not_before = whole_seconds(now - CLOCK_SKEW_ALLOWANCE).max(root.not_before);
    let not_after = whole_seconds(wanted).min(root.not_after);
    if not_after - not_before < LEAF_VALIDITY_MIN {
        return Err(IssueError::IssuerEnds(root.not_after));
    }
    Ok((not_before, not_after))
}

/// A new key gets a new subject, so that chains of two CAs are never mixed up (RFC 5280 §4.1.2.4, §6.1.3).
fn ca_name(kind: &str, naming: CaNaming<'_>, public: &PublicKey) -> Result<String, IssueError> {
    let mesh = naming.mesh;
    if mesh.is_empty() || mesh.len() > MESH_NAME_BYTES_MAX || !mesh.bytes().all(|b| matches!(b, b' '..=b'~'))
    {
        return Err(IssueError::MeshName);
    }
    let tag = hex::encode(&Sha256::digest(public.spki_der())[..3]);
    Ok(format!("{mesh} {kind} {} {tag}", naming.now.date()))
}

struct CaParams<'a> {
    name: &'a str,
    public: &'a PublicKey,
    serial: SerialNumber,
    not_before: UtcDateTime,
    not_after: UtcDateTime,
}

impl CaParams<'_> {
    fn build(&self, constraints: BasicConstraints) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, self.name);
        params.is_ca = IsCa::Ca(constraints);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.not_before = to_offset(self.not_before);
        params.not_after = to_offset(self.not_after);
        params.serial_number = Some(rcgen::SerialNumber::from_slice(self.serial.as_bytes()));
        params.key_identifier_method = self.public.key_identifier();
        params
    }
}

fn finish(
    kind: CaKind,
    der: Vec<u8>,
    issuer_der: &[u8],
    serial: SerialNumber,
    not_before: UtcDateTime,
    not_after: UtcDateTime,
    public: &PublicKey,
) -> Result<CaCertificate, IssueError> {
    if let Some(finding) = lint_ca_as(kind, &der, issuer_der).into_iter().next() {
        return Err(IssueError::Lint(finding));
    }
    Ok(CaCertificate { der, serial, not_before, not_after, key_hash: public.key_hash() })
}
