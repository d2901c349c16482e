//! Does a chain lead to a pinned root, now and for this use?

use std::fmt;
use std::sync::Arc;

use der::Decode as _;
use rustls_pki_types::{CertificateDer, TrustAnchor};
use time::UtcDateTime;

use crate::identity::TrustDomain;
use crate::instant::{from_asn1, from_unix, to_unix, whole_seconds};
use crate::issue::AnyPurpose;
use crate::key::PublicKey;
use crate::leaf::{
    ClassifyError, KeyIdentifier, VerifiedLeaf, parse_certificate, read_extensions, read_leaf,
};
use crate::lint::CERT_BYTES_MAX;

/// Most certificates beside the leaf that a peer may send.
pub const CHAIN_LENGTH_MAX: usize = 6;

/// Most CRLs in one set: the shards of some issuing CAs and the roots'.
pub const CRLS_MAX: usize = 2048;

/// Why a chain is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    #[error("no root is pinned")]
    NoRoots,
    #[error("root is not a self-signed CA certificate")]
    Root,
    #[error("chain has {0} certificates beside the leaf, at most {CHAIN_LENGTH_MAX} are allowed")]
    TooLong(usize),
    #[error("certificate is {0} bytes long, at most {CERT_BYTES_MAX} are allowed")]
    TooLarge(usize),
    #[error("leaf cannot be read")]
    Leaf(#[source] ClassifyError),
    #[error("certificate expired at {0}")]
    Expired(UtcDateTime),
    #[error("certificate is not valid before {0}")]
    NotYetValid(UtcDateTime),
    #[error("chain does not lead to a pinned root")]
    UnknownIssuer,
    #[error("a signature of the chain does not verify")]
    BadSignature,
    #[error("certificate is not for this use")]
    Usage,
    #[error("certificate is revoked")]
    Revoked,
    #[error("no CRL says whether a certificate of the chain is revoked")]
    RevocationUnknown,
    #[error("CRL ended at {0}")]
    CrlExpired(UtcDateTime),
    #[error("leaf's authority key identifier is not its issuer's")]
    IssuerKeyId,
    #[error("set of CRLs is empty, larger than {CRLS_MAX}, or holds one that cannot be read")]
    Crls,
    #[error("certificate is not the controller's")]
    NotController,
    #[error("chain holds no root with the pinned key")]
    PinNotFound,
    #[error("chain is not valid: {0}")]
    Invalid(webpki::Error),
}

impl From<webpki::Error> for ChainError {
    fn from(error: webpki::Error) -> Self {
        match error {
            webpki::Error::CertExpired { not_after, .. } => Self::Expired(from_unix(not_after)),
            webpki::Error::CertNotValidYet { not_before, .. } => Self::NotYetValid(from_unix(not_before)),
            webpki::Error::UnknownIssuer => Self::UnknownIssuer,
            webpki::Error::InvalidSignatureForPublicKey => Self::BadSignature,
            webpki::Error::RequiredEkuNotFoundContext(_) => Self::Usage,
            webpki::Error::CertRevoked => Self::Revoked,
            webpki::Error::UnknownRevocationStatus => Self::RevocationUnknown,
            webpki::Error::CrlExpired { next_update, .. } => Self::CrlExpired(from_unix(next_update)),
            other => Self::Invalid(other),
        }
    }
}

struct Root {
    certificate: CertificateDer<'static>,
    anchor: TrustAnchor<'static>,
    key_id: KeyIdentifier,
    key_hash: [u8; 32],
    not_before: UtcDateTime,
    not_after: UtcDateTime,
}

/// The pinned roots of one mesh.
pub struct TrustAnchors {
    domain: TrustDomain,
    roots: Vec<Root>,
    anchors: Vec<TrustAnchor<'static>>,
}

impl TrustAnchors {
    /// Takes the DER of one or more self-signed roots; two while the root is being changed.
    pub fn new<D: AsRef<[u8]>>(
        domain: TrustDomain,
        roots: impl IntoIterator<Item = D>,
    ) -> Result<Self, ChainError> {
        let roots: Vec<Root> =
            roots.into_iter().map(|der| read_root(der.as_ref())).collect::<Result<_, _>>()?;
        if roots.is_empty() {
            return Err(ChainError::NoRoots);
        }
        let anchors = roots.iter().map(|root| root.anchor.clone()).collect();
        Ok(Self { domain, roots, anchors })
    }

    /// The mesh whose identities are accepted.
    pub fn domain(&self) -> &TrustDomain {
        &self.domain
    }

    /// The DER of the roots.
    pub fn root_ders(&self) -> impl Iterator<Item = &CertificateDer<'static>> {
        self.roots.iter().map(|root| &root.certificate)
    }

    /// SHA-256 of each root's DER SubjectPublicKeyInfo.
    pub fn root_key_hashes(&self) -> impl Iterator<Item = [u8; 32]> {
        self.roots.iter().map(|root| root.key_hash)
    }
}

impl fmt::Debug for TrustAnchors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hashes: Vec<_> = self.root_key_hashes().map(hex::encode).collect();
        f.debug_struct("TrustAnchors").field("domain", &self.domain.as_str()).field("roots", &hashes).finish()
    }
}

fn read_root(der: &[u8]) -> Result<Root, ChainError> {
    if der.len() > CERT_BYTES_MAX {
        return Err(ChainError::TooLarge(der.len()));
    }
    let parsed = parse_certificate(der).ok_or(ChainError::Root)?;
    let extensions = read_extensions(&parsed).map_err(|_| ChainError::Root)?;
    let self_issued = parsed.issuer().as_raw() == parsed.subject().as_raw();
    if !self_issued || !extensions.is_ca || !extensions.key_cert_sign {
        return Err(ChainError::Root);
    }
    parsed.verify_signature(None).map_err(|_| ChainError::Root)?;
    let key = PublicKey::from_spki_der(parsed.public_key().raw).map_err(|_| ChainError::Root)?;
    let certificate = CertificateDer::from(der.to_vec());
    let anchor = webpki::anchor_from_trusted_cert(&certificate).map_err(|_| ChainError::Root)?.to_owned();
    Ok(Root {
        anchor,
        key_id: extensions.subject_key_id.ok_or(ChainError::Root)?,
        key_hash: key.key_hash(),
        not_before: from_asn1(parsed.validity().not_before),
        not_after: from_asn1(parsed.validity().not_after),
        certificate,
    })
}

/// What the holder of the leaf does with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Usage {
    /// Acts as TLS server.
    Server,
    /// Acts as TLS client.
    Client,
    /// Neither is asked, for example when a peer map is checked.
    Any,
}

/// What to do once a CRL is past its nextUpdate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExpiredCrl {
    /// Refuse every chain it covers.
    Refuse,
    /// Go by it all the same: a mesh whose controller is away lives on until its leases end.
    Accept,
}

/// A CRL as chains are verified with, parsed once and shared.
#[derive(Clone)]
pub struct RevocationList(Arc<webpki::CertRevocationList<'static>>);

impl RevocationList {
    /// Reads the DER of a CRL. Its signature is verified with each chain.
    ///
    /// # Errors
    /// [`ChainError::Crls`] if it cannot be read or is longer than [`CRL_BYTES_MAX`](crate::CRL_BYTES_MAX).
    pub fn from_der(der: &[u8]) -> Result<Self, ChainError> {
        if der.len() > crate::crl::CRL_BYTES_MAX {
            return Err(ChainError::Crls);
        }
        let crl = webpki::OwnedCertRevocationList::from_der(der).map_err(|_| ChainError::Crls)?;
        Ok(Self(Arc::new(crl.into())))
    }
}

impl fmt::Debug for RevocationList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RevocationList")
    }
}

/// The newest CRL of each CA and shard. Their signatures are verified with each chain.
pub struct RevocationLists {
    crls: Vec<RevocationList>,
    expired: ExpiredCrl,
}

impl RevocationLists {
    /// Takes the DER of one CRL for every CA on the path, the root included: a chain with an uncovered CA is refused
    /// with [`ChainError::RevocationUnknown`]. Of two CRLs of one CA and address the first counts.
    pub fn new<D: AsRef<[u8]>>(
        crls: impl IntoIterator<Item = D>,
        expired: ExpiredCrl,
    ) -> Result<Self, ChainError> {
        let crls = crls.into_iter().take(CRLS_MAX + 1).map(|der| RevocationList::from_der(der.as_ref()));
        Self::of(crls.collect::<Result<Vec<_>, _>>()?, expired)
    }

    /// The same of CRLs that are read already, so that a new one costs no more than itself.
    ///
    /// # Errors
    /// [`ChainError::Crls`] for none, and for more than [`CRLS_MAX`].
    pub fn of(
        crls: impl IntoIterator<Item = RevocationList>,
        expired: ExpiredCrl,
    ) -> Result<Self, ChainError> {
        let crls: Vec<_> = crls.into_iter().take(CRLS_MAX + 1).collect();
        match crls.len() {
            1..=CRLS_MAX => Ok(Self { crls, expired }),
            _ => Err(ChainError::Crls),
        }
    }

    /// Whether a CRL for everything that the CA `name` (a DER Name) has issued is here. webpki then goes by it.
    fn cover(&self, name: &[u8]) -> bool {
        // webpki keeps a name without its outer tag and length.
        let Ok(name) = der::asn1::AnyRef::from_der(name) else { return false };
        let all = |crl: &webpki::CertRevocationList<'_>| crl.issuing_distribution_point().is_none();
        self.crls.iter().any(|RevocationList(crl)| crl.issuer() == name.value() && all(crl))
    }
}

impl fmt::Debug for RevocationLists {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RevocationLists")
            .field("crls", &self.crls.len())
            .field("expired", &self.expired)
            .finish()
    }
}

/// A leaf whose chain is good, apart from its age.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    pub leaf: VerifiedLeaf,
    /// Whether the leaf had expired at the time asked about.
    pub expired: bool,
}

/// Verifies that `leaf` (DER) leads through `intermediates` to a pinned root at the time `at`, may be used for `usage`, has a
/// profile of this mesh, and is on no CRL.
///
/// Without `revocation` nothing is checked for revocation: right only where the caller asks the journal instead.
///
/// A leaf with noRevAvail (RFC 9608 §4) needs no CRL that covers it. One that could cover it is looked at all the same: the
/// first of its issuer, since it names no shard. The CAs above need theirs, here one without an issuing distribution point.
pub fn verify_chain(
    leaf: &[u8],
    intermediates: &[CertificateDer<'_>],
    anchors: &TrustAnchors,
    at: UtcDateTime,
    usage: Usage,
    revocation: Option<&RevocationLists>,
) -> Result<VerifiedLeaf, ChainError> {
    let at = whole_seconds(at);
    check_sizes(leaf, intermediates)?;
    let mut verified = read_leaf(leaf, anchors.domain()).map_err(ChainError::Leaf)?;
    let der = CertificateDer::from(leaf);
    let entity = webpki::EndEntityCert::try_from(&der)?;
    let crls: Vec<_> = revocation.iter().flat_map(|lists| &lists.crls).map(|crl| &*crl.0).collect();
    let options = match revocation {
        None => None,
        Some(lists) => {
            let policy = match lists.expired {
                ExpiredCrl::Refuse => webpki::ExpirationPolicy::Enforce,
                ExpiredCrl::Accept => webpki::ExpirationPolicy::Ignore,
            };
            let unknown = match verified.no_rev_avail {
                true => webpki::UnknownStatusPolicy::Allow,
                false => webpki::UnknownStatusPolicy::Deny,
            };
            let builder = webpki::RevocationOptionsBuilder::new(&crls).map_err(|_| ChainError::Crls)?;
            Some(builder.with_expiration_policy(policy).with_status_policy(unknown).build())
        }
    };
    let path = entity.verify_for_usage(
        webpki::ALL_VERIFICATION_ALGS,
        &anchors.anchors,
        intermediates,
        to_unix(at),
        Purpose(usage),
        options,
        None,
    )?;
    // webpki does not look at the dates of a root.
    let root =
        anchors.roots.iter().find(|root| root.anchor == *path.anchor()).ok_or(ChainError::UnknownIssuer)?;
    if at < root.not_before {
        return Err(ChainError::NotYetValid(root.not_before));
    }
    if at > root.not_after {
        return Err(ChainError::Expired(root.not_after));
    }
    let mut issuer_key_id = None;
    verified.chain_not_after = verified.not_after.min(root.not_after);
    for intermediate in path.intermediate_certificates() {
        let der = intermediate.der();
        let parsed = parse_certificate(&der).ok_or(ChainError::UnknownIssuer)?;
        verified.chain_not_after = verified.chain_not_after.min(from_asn1(parsed.validity().not_after));
        // webpki was told to let an unknown status pass, and knows no difference between leaf and CA.
        if verified.no_rev_avail && revocation.is_some_and(|lists| !lists.cover(parsed.issuer().as_raw())) {
            return Err(ChainError::RevocationUnknown);
        }
        if issuer_key_id.is_none() {
            let extensions = read_extensions(&parsed).map_err(|_| ChainError::IssuerKeyId)?;
            issuer_key_id = Some(extensions.subject_key_id.ok_or(ChainError::IssuerKeyId)?);
        }
    }
    if verified.issuer_key_id != issuer_key_id.unwrap_or_else(|| root.key_id.clone()) {
        return Err(ChainError::IssuerKeyId);
    }
    Ok(verified)
}

/// Like [`verify_chain`], but for a leaf that may have expired: the chain is verified at the earlier of `at` and the
/// leaf's notAfter. Only for Resume, and for a caller that then looks the serial up and sees the flag.
///
/// webpki checks dates before signatures. Taking its word "expired" for "otherwise good" would accept a forgery.
pub fn verify_chain_expired_ok(
    leaf: &[u8],
    intermediates: &[CertificateDer<'_>],
    anchors: &TrustAnchors,
    at: UtcDateTime,
    usage: Usage,
    revocation: Option<&RevocationLists>,
) -> Result<Verified, ChainError> {
    check_sizes(leaf, intermediates)?;
    let claimed = read_leaf(leaf, anchors.domain()).map_err(ChainError::Leaf)?;
    let at = whole_seconds(at);
    let moment = at.min(claimed.not_after);
    let leaf = verify_chain(leaf, intermediates, anchors, moment, usage, revocation)?;
    Ok(Verified { expired: at > leaf.not_after, leaf })
}

fn check_sizes(leaf: &[u8], intermediates: &[CertificateDer<'_>]) -> Result<(), ChainError> {
    if intermediates.len() > CHAIN_LENGTH_MAX {
        return Err(ChainError::TooLong(intermediates.len()));
    }
    let sizes = std::iter::once(leaf.len()).chain(intermediates.iter().map(|der| der.len()));
    match sizes.into_iter().find(|size| *size > CERT_BYTES_MAX) {
        Some(size) => Err(ChainError::TooLarge(size)),
        None => Ok(()),
    }
}

struct Purpose(Usage);

impl webpki::ExtendedKeyUsageValidator for Purpose {
    fn validate(&self, purposes: webpki::KeyPurposeIdIter<'_, '_>) -> Result<(), webpki::Error> {
        match self.0 {
            Usage::Server => webpki::KeyUsage::server_auth().validate(purposes),
            Usage::Client => webpki::KeyUsage::client_auth().validate(purposes),
            Usage::Any => AnyPurpose.validate(purposes),
        }
    }
}
