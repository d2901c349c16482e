//! Making certificates: root, issuing CA, leaves.

use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose, SanType,
};
use rustls_pki_types::CertificateDer;
use sha2::{Digest as _, Sha256};
use time::UtcDateTime;

use crate::csr::VerifiedCsr;
use crate::identity::TrustDomain;
use crate::instant::{CLOCK_SKEW_ALLOWANCE, from_asn1, to_offset, to_unix, whole_seconds};
use crate::key::{KeyAlgorithm, LeafKey, PublicKey};
use crate::keystore::{KeyId, KeyStore, KeyStoreError, StoredSigner};
use crate::leaf::{KeyIdentifier, parse_certificate, read_extensions};
use crate::lint::{Finding, lint_ca, lint_leaf};
use crate::profile::Profile;
use crate::serial::SerialNumber;
use crate::template::{LeafTemplate, TemplateError};
use crate::wireguard;

/// Validity of a root without backdating: 3652 days, ten years.
pub const ROOT_LIFETIME: Duration = Duration::from_secs(3652 * 24 * 3600);

/// Validity of an issuing CA without backdating: 730 days, two years.
pub const ISSUING_CA_LIFETIME: Duration = Duration::from_secs(730 * 24 * 3600);

/// Shortest validity that is still issued once it was cut to the issuer's, in seconds: 60.
const LEAF_VALIDITY_MIN: Duration = Duration::from_secs(60);

/// Longest mesh name in a CA's subject, in bytes; the rest of a common name takes 27 of its 64.
const MESH_NAME_BYTES_MAX: usize = 32;

/// Why nothing was issued. What had been signed by then, if anything, has been dropped.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IssueError {
    #[error("template is refused")]
    Template(#[source] TemplateError),
    #[error("profile controller is issued in the controller's own process, never for a CSR")]
    ControllerFromCsr,
    #[error("leaf's key is its issuer's key")]
    IssuerKeyAsLeaf,
    #[error("issuer's certificate ends at {0}, too soon for a leaf")]
    IssuerEnds(UtcDateTime),
    #[error("mesh name is not 1 to {MESH_NAME_BYTES_MAX} printable ASCII characters")]
    MeshName,
    #[error("issuer's certificate is not a CA's, or cannot be read")]
    NotCa,
    #[error("issuer's certificate holds another key than {0}")]
    OtherKey(KeyId),
    #[error("issuer may not sign another CA")]
    PathLength,
    #[error("key store failed")]
    KeyStore(#[source] KeyStoreError),
    #[error("certificate cannot be encoded: {0}")]
    Encode(String),
    #[error("certificate breaks a rule: {0}")]
    Lint(Finding),
    #[error("signed certificate is not valid: {0}")]
    Recheck(String),
}

/// A certificate that was just signed and read back. It is nothing until its record is on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IssuedCertificate {
    pub der: Vec<u8>,
    pub serial: SerialNumber,
    pub not_before: UtcDateTime,
    pub not_after: UtcDateTime,
    /// SHA-256 of the DER SubjectPublicKeyInfo.
    pub key_hash: [u8; 32],
    /// subjectKeyIdentifier of the issuer.
    pub issuer_key_id: KeyIdentifier,
    /// The CRL this certificate belongs to.
    pub crl_shard: u16,
}

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

/// A CA certificate bound to its key in a [`KeyStore`].
#[derive(Debug, Clone)]
pub struct Issuer {
    certificate: CertificateDer<'static>,
    key_id: KeyId,
    public: PublicKey,
    key_identifier: KeyIdentifier,
    domain: TrustDomain,
    not_before: UtcDateTime,
    not_after: UtcDateTime,
    path_len: Option<u32>,
}

impl Issuer {
    /// Binds `certificate_der` to the key `key_id` of `store`.
    ///
    /// # Errors
    /// [`IssueError::NotCa`] unless it is a CA's with keyCertSign, cRLSign and a key identifier;
    /// [`IssueError::OtherKey`] if the key does not belong to it.
    pub fn new(
        certificate_der: &[u8],
        key_id: KeyId,
        domain: TrustDomain,
        store: &dyn KeyStore,
    ) -> Result<Self, IssueError> {
        let certificate = parse_certificate(certificate_der).ok_or(IssueError::NotCa)?;
        let extensions = read_extensions(&certificate).map_err(|_| IssueError::NotCa)?;
        if !(extensions.is_ca && extensions.key_cert_sign && extensions.crl_sign) {
            return Err(IssueError::NotCa);
        }
        let public = store.public_key(&key_id).map_err(IssueError::KeyStore)?;
        if certificate.public_key().raw != public.spki_der() || public.algorithm() != KeyAlgorithm::EcdsaP256
        {
            return Err(IssueError::OtherKey(key_id));
        }
        Ok(Self {
            key_identifier: extensions.subject_key_id.ok_or(IssueError::NotCa)?,
            path_len: extensions.path_len,
            not_before: from_asn1(certificate.validity().not_before),
            not_after: from_asn1(certificate.validity().not_after),
            certificate: CertificateDer::from(certificate_der.to_vec()),
            key_id,
            public,
            domain,
        })
    }

    /// The CA certificate's DER.
    pub fn certificate_der(&self) -> &[u8] {
        &self.certificate
    }

    /// subjectKeyIdentifier of the CA certificate: authorityKeyIdentifier of what it signs.
    pub fn key_identifier(&self) -> &KeyIdentifier {
        &self.key_identifier
    }

    /// The key's name in its store.
    pub fn key_id(&self) -> &KeyId {
        &self.key_id
    }

    /// The mesh it issues for.
    pub fn domain(&self) -> &TrustDomain {
        &self.domain
    }

    /// End of the CA certificate's validity: no leaf outlives it.
    pub fn not_after(&self) -> UtcDateTime {
        self.not_after
    }

    pub(crate) fn signer<'a>(&'a self, store: &'a dyn KeyStore) -> StoredSigner<'a> {
        StoredSigner::new(store, &self.key_id, &self.public)
    }

    pub(crate) fn to_rcgen<S: rcgen::SigningKey>(
        &self,
        signer: S,
    ) -> Result<rcgen::Issuer<'static, S>, rcgen::Error> {
        rcgen::Issuer::from_ca_cert_der(&self.certificate, signer)
    }

    fn sign(
        &self,
        store: &dyn KeyStore,
        params: &CertificateParams,
        key: &PublicKey,
    ) -> Result<Vec<u8>, IssueError> {
        let signer = self.signer(store);
        let issuer = self.to_rcgen(&signer).map_err(|error| IssueError::Encode(error.to_string()))?;
        params
            .signed_by(key.as_rcgen(), &issuer)
            .map(|certificate| certificate.der().to_vec())
            .map_err(|error| signing_error(&signer, &error))
    }
}

pub(crate) fn signing_error(signer: &StoredSigner<'_>, error: &rcgen::Error) -> IssueError {
    match signer.take_failure() {
        Some(failure) => IssueError::KeyStore(failure),
        None => IssueError::Encode(error.to_string()),
    }
}

/// Whose key a leaf certifies.
#[derive(Debug, Clone, Copy)]
pub enum SubjectKey<'a> {
    /// A stranger's, proved by the CSR's signature.
    Csr(&'a VerifiedCsr),
    /// One's own: possession needs no proof. The only way to the profile `controller`.
    Own(&'a LeafKey),
}

impl SubjectKey<'_> {
    fn public_key(&self) -> &PublicKey {
        match self {
            Self::Csr(csr) => csr.public_key(),
            Self::Own(key) => key.public_key(),
        }
    }
}

impl<'a> From<&'a VerifiedCsr> for SubjectKey<'a> {
    fn from(csr: &'a VerifiedCsr) -> Self {
        Self::Csr(csr)
    }
}

impl<'a> From<&'a LeafKey> for SubjectKey<'a> {
    fn from(key: &'a LeafKey) -> Self {
        Self::Own(key)
    }
}

/// Issues a leaf for `key` as `template` says.
///
/// notAfter is cut to the issuer's, notBefore is never before the issuer's. The certificate is read back
/// with two parsers, verified and linted before it is handed out. Nothing is recorded here: a certificate must be
/// on disk before it is on the wire.
///
/// Blocks while the key store signs.
///
/// # Errors
/// Nothing has been signed for [`IssueError::Template`], [`IssueError::ControllerFromCsr`],
/// [`IssueError::IssuerKeyAsLeaf`] and [`IssueError::IssuerEnds`].
pub fn issue_leaf<'k>(
    issuer: &Issuer,
    store: &dyn KeyStore,
    key: impl Into<SubjectKey<'k>>,
    template: &LeafTemplate,
    serial: SerialNumber,
) -> Result<IssuedCertificate, IssueError> {
    let key = key.into();
    template.check().map_err(IssueError::Template)?;
    if template.profile == Profile::Controller && matches!(key, SubjectKey::Csr(_)) {
        return Err(IssueError::ControllerFromCsr);
    }
    let key = key.public_key();
    if *key == issuer.public {
        return Err(IssueError::IssuerKeyAsLeaf);
    }
    let (not_before, not_after) = cut_validity(issuer, template)?;
    let mut params = leaf_params(template, issuer.domain())?;
    params.not_before = to_offset(not_before);
    params.not_after = to_offset(not_after);
    params.serial_number = Some(rcgen::SerialNumber::from_slice(serial.as_bytes()));
    params.key_identifier_method = key.key_identifier();
    let der = issuer.sign(store, &params, key)?;
    recheck_leaf(&der, issuer, key, not_before, not_after)?;
    Ok(IssuedCertificate {
        der,
        serial,
        not_before,
        not_after,
        key_hash: key.key_hash(),
        issuer_key_id: issuer.key_identifier.clone(),
        crl_shard: template.crl_shard,
    })
}

fn cut_validity(issuer: &Issuer, template: &LeafTemplate) -> Result<(UtcDateTime, UtcDateTime), IssueError> {
    let not_before = whole_seconds(template.not_before).max(issuer.not_before);
    let not_after = whole_seconds(template.not_after).min(issuer.not_after);
    let cut = not_after < whole_seconds(template.not_after);
    if not_after <= not_before || (cut && not_after - not_before < LEAF_VALIDITY_MIN) {
        return Err(IssueError::IssuerEnds(issuer.not_after));
    }
    Ok((not_before, not_after))
}

fn leaf_params(template: &LeafTemplate, domain: &TrustDomain) -> Result<CertificateParams, IssueError> {
    let encode = |error: rcgen::Error| IssueError::Encode(error.to_string());
    let ia5 = |text: &str| rcgen::string::Ia5String::try_from(text).map_err(encode);
    let mut params = CertificateParams::default();
    for name in &template.dns {
        params.subject_alt_names.push(SanType::DnsName(ia5(name.as_str())?));
    }
    params.subject_alt_names.extend(template.ips.iter().map(|ip| SanType::IpAddress(*ip)));
    let uri = template.identity.as_ref().map(|identity| identity.to_spiffe(domain));
    if let Some(uri) = &uri {
        params.subject_alt_names.push(SanType::URI(ia5(uri)?));
    }
    // The common name repeats a SAN, for programs that map it to a user; past 64 characters the subject stays
    // empty, and rcgen then makes the SAN critical (RFC 5280 §4.1.2.6).
    params.distinguished_name = rcgen::DistinguishedName::new();
    let name = template.dns.first().map(|name| name.as_str().to_owned()).or(uri);
    if let Some(name) = name.filter(|name| name.len() <= 64) {
        params.distinguished_name.push(DnType::CommonName, name);
    }
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    if template.profile.server_auth() {
        params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
    }
    if template.profile.client_auth() {
        params.extended_key_usages.push(ExtendedKeyUsagePurpose::ClientAuth);
    }
    if !template.wireguard_keys.is_empty() {
        let content = wireguard::encode(&template.wireguard_keys)
            .map_err(|error| IssueError::Template(TemplateError::BadWireguardKeys(error)))?;
        params
            .custom_extensions
            .push(rcgen::CustomExtension::from_oid_content(&wireguard::WIREGUARD_KEYS_OID, content));
    }
    if let Some(url) = &template.crl_url {
        params.crl_distribution_points = vec![rcgen::CrlDistributionPoint { uris: vec![url.clone()] }];
    }
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

fn recheck_leaf(
    der: &[u8],
    issuer: &Issuer,
    key: &PublicKey,
    not_before: UtcDateTime,
    not_after: UtcDateTime,
) -> Result<(), IssueError> {
    recheck_signature(der, issuer.certificate_der(), key)?;
    let leaf = CertificateDer::from(der);
    let webpki = |error: webpki::Error| IssueError::Recheck(error.to_string());
    let entity = webpki::EndEntityCert::try_from(&leaf).map_err(webpki)?;
    let anchor = webpki::anchor_from_trusted_cert(&issuer.certificate).map_err(webpki)?;
    for at in [not_before, not_after] {
        entity
            .verify_for_usage(
                webpki::ALL_VERIFICATION_ALGS,
                std::slice::from_ref(&anchor),
                &[],
                to_unix(at),
                AnyPurpose,
                None,
                None,
            )
            .map_err(webpki)?;
    }
    match lint_leaf(der, issuer.certificate_der(), issuer.domain()).into_iter().next() {
        Some(finding) => Err(IssueError::Lint(finding)),
        None => Ok(()),
    }
}

fn recheck_signature(der: &[u8], issuer_der: &[u8], key: &PublicKey) -> Result<(), IssueError> {
    let unreadable = || IssueError::Recheck("certificate cannot be read back".to_owned());
    let certificate = parse_certificate(der).ok_or_else(unreadable)?;
    let issuer = parse_certificate(issuer_der).ok_or_else(unreadable)?;
    if certificate.public_key().raw != key.spki_der() {
        return Err(IssueError::Recheck("certificate holds another key".to_owned()));
    }
    certificate
        .verify_signature(Some(issuer.public_key()))
        .map_err(|_| IssueError::Recheck("signature does not verify".to_owned()))
}

/// Takes every extended key usage: the lint looks at them.
pub(crate) struct AnyPurpose;

impl webpki::ExtendedKeyUsageValidator for AnyPurpose {
    fn validate(&self, _: webpki::KeyPurposeIdIter<'_, '_>) -> Result<(), webpki::Error> {
        Ok(())
    }
}

/// Makes the self-signed root for the key `key_id` of `store`: P-256, [`ROOT_LIFETIME`].
///
/// Blocks while the key store signs.
pub fn create_root(
    store: &dyn KeyStore,
    key_id: &KeyId,
    naming: CaNaming<'_>,
    rng: &mut dyn FnMut(&mut [u8]),
) -> Result<CaCertificate, IssueError> {
    let public = store.public_key(key_id).map_err(IssueError::KeyStore)?;
    let not_before = whole_seconds(naming.now - CLOCK_SKEW_ALLOWANCE);
    let not_after = whole_seconds(naming.now + ROOT_LIFETIME);
    let serial = SerialNumber::random(rng);
    let params = CaParams { kind: "root CA", naming, public: &public, serial, not_before, not_after }
        .build(BasicConstraints::Unconstrained)?;
    let signer = StoredSigner::new(store, key_id, &public);
    let der = params.self_signed(&signer).map_err(|error| signing_error(&signer, &error))?.der().to_vec();
    recheck_signature(&der, &der, &public)?;
    finish_ca(der.clone(), &der, serial, not_before, not_after, &public)
}

/// Makes an issuing CA under `root` for the key `key_id` of `store`: P-256, [`ISSUING_CA_LIFETIME`] cut to the root's,
/// path length 0.
///
/// Blocks while the key store signs.
pub fn create_issuing_ca(
    root: &Issuer,
    store: &dyn KeyStore,
    key_id: &KeyId,
    naming: CaNaming<'_>,
    rng: &mut dyn FnMut(&mut [u8]),
) -> Result<CaCertificate, IssueError> {
    if root.path_len == Some(0) {
        return Err(IssueError::PathLength);
    }
    let public = store.public_key(key_id).map_err(IssueError::KeyStore)?;
    if public == root.public {
        return Err(IssueError::IssuerKeyAsLeaf);
    }
    let not_before = whole_seconds(naming.now - CLOCK_SKEW_ALLOWANCE).max(root.not_before);
    let not_after = whole_seconds(naming.now + ISSUING_CA_LIFETIME).min(root.not_after);
    if not_after - not_before < LEAF_VALIDITY_MIN {
        return Err(IssueError::IssuerEnds(root.not_after));
    }
    let serial = SerialNumber::random(rng);
    let mut params = CaParams { kind: "issuing CA", naming, public: &public, serial, not_before, not_after }
        .build(BasicConstraints::Constrained(0))?;
    params.use_authority_key_identifier_extension = true;
    let der = root.sign(store, &params, &public)?;
    recheck_signature(&der, root.certificate_der(), &public)?;
    finish_ca(der, root.certificate_der(), serial, not_before, not_after, &public)
}

struct CaParams<'a> {
    kind: &'a str,
    naming: CaNaming<'a>,
    public: &'a PublicKey,
    serial: SerialNumber,
    not_before: UtcDateTime,
    not_after: UtcDateTime,
}

impl CaParams<'_> {
    fn build(&self, constraints: BasicConstraints) -> Result<CertificateParams, IssueError> {
        let mesh = self.naming.mesh;
        if mesh.is_empty()
            || mesh.len() > MESH_NAME_BYTES_MAX
            || !mesh.bytes().all(|b| matches!(b, b' '..=b'~'))
        {
            return Err(IssueError::MeshName);
        }
        // A new key gets a new subject, so that chains of two CAs are never mixed up (RFC 5280 §4.1.2.4, §6.1.3).
        let tag = hex::encode(&Sha256::digest(self.public.spki_der())[..3]);
        let name = format!("{mesh} {} {} {tag}", self.kind, self.naming.now.date());
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(constraints);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.not_before = to_offset(self.not_before);
        params.not_after = to_offset(self.not_after);
        params.serial_number = Some(rcgen::SerialNumber::from_slice(self.serial.as_bytes()));
        params.key_identifier_method = self.public.key_identifier();
        Ok(params)
    }
}

fn finish_ca(
    der: Vec<u8>,
    issuer_der: &[u8],
    serial: SerialNumber,
    not_before: UtcDateTime,
    not_after: UtcDateTime,
    public: &PublicKey,
) -> Result<CaCertificate, IssueError> {
    if let Some(finding) = lint_ca(&der, issuer_der).into_iter().next() {
        return Err(IssueError::Lint(finding));
    }
    Ok(CaCertificate { der, serial, not_before, not_after, key_hash: public.key_hash() })
}
