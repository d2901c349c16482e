//! One authority after another: roots that vouch for each other.

use rcgen::{BasicConstraints, CertificateParams, DnType, DnValue, IsCa, KeyUsagePurpose};
use time::UtcDateTime;

use crate::hierarchy::CaCertificate;
use crate::instant::{CLOCK_SKEW_ALLOWANCE, from_asn1, to_offset, whole_seconds};
use crate::issue::{IssueError, Issuer, signing_error};
use crate::key::PublicKey;
use crate::keystore::KeyStore;
use crate::leaf::{parse_certificate, read_extensions};
use crate::serial::SerialNumber;

/// Signs name and key of another root: whoever trusts `signer` can follow to it. Valid while both are.
///
/// Unlike [`cross_sign`](crate::cross_sign) it sets no path length: in a history of roots one such link stands below
/// another. Blocks while the key store signs.
///
/// # Errors
/// [`IssueError::NotCa`] unless `root_der` is a self-signed CA certificate with a key identifier, or if its name
/// cannot be written again octet for octet; [`IssueError::IssuerKeyAsLeaf`] for `signer`'s own key.
pub fn vouch_for_root(
    signer: &Issuer,
    store: &dyn KeyStore,
    root_der: &[u8],
    now: UtcDateTime,
    rng: &mut dyn FnMut(&mut [u8]),
) -> Result<CaCertificate, IssueError> {
    let root = parse_certificate(root_der).ok_or(IssueError::NotCa)?;
    let extensions = read_extensions(&root).map_err(|_| IssueError::NotCa)?;
    let self_signed =
        root.issuer().as_raw() == root.subject().as_raw() && root.verify_signature(None).is_ok();
    if !(self_signed && extensions.is_ca && extensions.key_cert_sign && extensions.crl_sign) {
        return Err(IssueError::NotCa);
    }
    let key_identifier = extensions.subject_key_id.ok_or(IssueError::NotCa)?;
    let public = PublicKey::from_spki_der(root.public_key().raw).map_err(|_| IssueError::NotCa)?;
    let signer_certificate = parse_certificate(signer.certificate_der()).ok_or(IssueError::NotCa)?;
    if signer_certificate.public_key().raw == public.spki_der() {
        return Err(IssueError::IssuerKeyAsLeaf);
    }
    let starts = [root.validity().not_before, signer_certificate.validity().not_before].map(from_asn1);
    let not_before = whole_seconds(now - CLOCK_SKEW_ALLOWANCE).max(starts[0]).max(starts[1]);
    let not_after = from_asn1(root.validity().not_after).min(signer.not_after());
    if not_after <= not_before {
        return Err(IssueError::IssuerEnds(signer.not_after()));
    }
    let serial = SerialNumber::random(rng);
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    for attribute in root.subject().iter_attributes() {
        let oid: Vec<u64> = attribute.attr_type().iter().ok_or(IssueError::NotCa)?.collect();
        let text = attribute.as_str().map_err(|_| IssueError::NotCa)?;
        params.distinguished_name.push(DnType::from_oid(&oid), DnValue::Utf8String(text.to_owned()));
    }
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_before = to_offset(not_before);
    params.not_after = to_offset(not_after);
    params.serial_number = Some(rcgen::SerialNumber::from_slice(serial.as_bytes()));
    params.key_identifier_method = rcgen::KeyIdMethod::PreSpecified(key_identifier.as_bytes().to_vec());
    params.use_authority_key_identifier_extension = true;
    let keys = signer.signer(store);
    let issuer = signer.to_rcgen(&keys).map_err(|error| IssueError::Encode(error.to_string()))?;
    let der = params
        .signed_by(&public, &issuer)
        .map(|certificate| certificate.der().to_vec())
        .map_err(|error| signing_error(&keys, &error))?;
    check_cross(&der, root_der, signer.certificate_der())?;
    Ok(CaCertificate { der, serial, not_before, not_after, key_hash: public.key_hash() })
}

/// Whether `der` is a certificate of the root in `root_der`, name, key and key identifier octet for octet, that
/// the root in `signer_der` signed. Says nothing about its age.
///
/// # Errors
/// [`IssueError::Recheck`] says what differs.
pub fn check_cross(der: &[u8], root_der: &[u8], signer_der: &[u8]) -> Result<(), IssueError> {
    let bad = |what: &str| IssueError::Recheck(what.to_owned());
    let read = |der| parse_certificate(der).ok_or_else(|| bad("a certificate cannot be read"));
    let (cross, root, signer) = (read(der)?, read(root_der)?, read(signer_der)?);
    let extensions = read_extensions(&cross).map_err(|_| bad("its extensions cannot be read"))?;
    let expected = read_extensions(&root).map_err(|_| bad("the root's extensions cannot be read"))?;
    if cross.subject().as_raw() != root.subject().as_raw() {
        return Err(bad("the root's name cannot be written again octet for octet"));
    }
    if cross.public_key().raw != root.public_key().raw || extensions.subject_key_id != expected.subject_key_id
    {
        return Err(bad("it holds another key than the root"));
    }
    if !(extensions.is_ca && extensions.key_cert_sign) || extensions.path_len == Some(0) {
        return Err(bad("it is no root's"));
    }
    if cross.issuer().as_raw() != signer.subject().as_raw() {
        return Err(bad("it names another signer"));
    }
    cross.verify_signature(Some(signer.public_key())).map_err(|_| bad("its signature does not verify"))
}

/// The roots among `candidates` (self-signed, DER) that `trusted` leads to through `lineage`: `trusted` themselves, and
/// every root that one of these has signed, in any number of steps. At most [`LINEAGE_MAX`] links are read.
///
/// A link counts only while it is valid at `at`: a root that has expired vouches for nobody. Without `at` dates are
/// not looked at: for what was vouched for once, and is read from disk again.
pub fn vouched_roots<'a>(
    trusted: &[&'a [u8]],
    candidates: &[&'a [u8]],
    lineage: &[&[u8]],
    at: Option<UtcDateTime>,
) -> Vec<&'a [u8]> {
    let valid = |der: &[u8]| {
        parse_certificate(der).is_some_and(|certificate| {
            let validity = certificate.validity();
            at.is_none_or(|at| from_asn1(validity.not_before) <= at && at <= from_asn1(validity.not_after))
        })
    };
    // Signers are known by certificate, self-signed or not: what counts is name and key.
    let mut signers: Vec<&[u8]> = trusted.iter().copied().filter(|der| valid(der)).collect();
    let mut links: Vec<&[u8]> = lineage.iter().copied().take(LINEAGE_MAX).filter(|der| valid(der)).collect();
    loop {
        let found = links
            .iter()
            .position(|link| signers.iter().any(|signer| check_cross(link, link, signer).is_ok()));
        match found {
            Some(index) => signers.push(links.swap_remove(index)),
            None => break,
        }
    }
    let is_vouched =
        |root: &&&[u8]| trusted.contains(root) || signers.iter().any(|signer| same_authority(signer, root));
    candidates.iter().filter(is_vouched).copied().collect()
}

/// Most links of a history of roots that are read.
pub const LINEAGE_MAX: usize = 16;

/// Whether two certificates are of one authority: the same name and key.
fn same_authority(one: &[u8], other: &[u8]) -> bool {
    let (Some(one), Some(other)) = (parse_certificate(one), parse_certificate(other)) else { return false };
    one.subject().as_raw() == other.subject().as_raw() && one.public_key().raw == other.public_key().raw
}

/// subjectKeyIdentifier of a CA certificate; `None` if it is none or has none.
pub fn ca_key_identifier(der: &[u8]) -> Option<crate::leaf::KeyIdentifier> {
    read_extensions(&parse_certificate(der)?).ok().filter(|extensions| extensions.is_ca)?.subject_key_id
}

/// Whether the CA in `issuer_der` signed `der` and stands in it as its issuer. Says nothing about dates.
pub fn is_signed_by(der: &[u8], issuer_der: &[u8]) -> bool {
    let (Some(certificate), Some(issuer)) = (parse_certificate(der), parse_certificate(issuer_der)) else {
        return false;
    };
    certificate.issuer().as_raw() == issuer.subject().as_raw()
        && certificate.verify_signature(Some(issuer.public_key())).is_ok()
}
