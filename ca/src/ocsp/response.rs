//! Responses, read back and checked: by the responder before it hands one out, and by whoever receives one.

use der::{Decode as _, Encode as _};
use rustls_pki_types::CertificateDer;
use time::UtcDateTime;
use x509_cert::Certificate;
use x509_cert::ext::pkix::CrlReason;
use x509_ocsp::{
    BasicOcspResponse, CertStatus, OcspGeneralizedTime, OcspResponse, OcspResponseStatus, ResponderId,
    SingleResponse,
};

use super::{CertIdHash, ID_NONCE, ID_SHA1, ID_SHA256, NONCE_BYTES_MAX, OcspIssuer, OcspStatus};
use crate::instant::{from_asn1, to_unix};
use crate::key::PublicKey;
use crate::leaf::parse_certificate;
use crate::lint::{Finding, lint_ocsp_responder};
use crate::reason::RevocationReason;
use crate::serial::SerialNumber;

/// Largest response, in bytes of DER: an RSA-4096 responder's certificate and signature need about 3000.
pub const OCSP_RESPONSE_BYTES_MAX: usize = 16 * 1024;

/// id-pkix-ocsp-basic, RFC 6960 §4.2.1.
const ID_BASIC: der::asn1::ObjectIdentifier = der::asn1::ObjectIdentifier::new_unwrap("1.3.6.1.5.5.7.48.1.1");

/// id-kp-OCSPSigning without tag and length, as webpki wants it.
const OCSP_SIGNING: &[u8] = &[0x2b, 6, 1, 5, 5, 7, 3, 9];

/// Why a response is not believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OcspResponseError {
    #[error("OCSP response is larger than {OCSP_RESPONSE_BYTES_MAX} bytes")]
    TooLarge,
    #[error("OCSP response is malformed")]
    Malformed,
    #[error("OCSP responder answered with failure {0}")]
    Failure(u8),
    #[error("OCSP response speaks of {0} certificates, not one")]
    Several(usize),
    #[error("OCSP response is about another issuer's certificate")]
    OtherIssuer,
    #[error("OCSP response is signed by neither the issuer nor its delegate")]
    NotDelegate,
    #[error("OCSP response's signature does not verify")]
    Signature,
    #[error("OCSP response has no nextUpdate")]
    NoNextUpdate,
    #[error("OCSP response counts from {0} only")]
    NotYetValid(UtcDateTime),
    #[error("OCSP response ended at {0}")]
    Expired(UtcDateTime),
}

/// A response whose signature and time have been verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedOcspResponse {
    /// `None` for a serial that this authority does not issue; its status is then always unknown.
    pub serial: Option<SerialNumber>,
    pub status: OcspStatus,
    pub hash: CertIdHash,
    pub this_update: UtcDateTime,
    pub next_update: UtcDateTime,
    pub produced_at: UtcDateTime,
    pub nonce: Option<Vec<u8>>,
}

/// Verifies a response about a certificate of the CA `issuer_der` at the time `at`. Signer is the CA itself or a delegate
/// with a certificate issued directly by it, valid now (RFC 6960 §4.2.2.2).
pub fn parse_ocsp_response(
    der: &[u8],
    issuer_der: &[u8],
    at: UtcDateTime,
) -> Result<VerifiedOcspResponse, OcspResponseError> {
    let basic = read_basic(der)?;
    let (verified, signer) = verify_signed(&basic, issuer_der)?;
    if at < verified.this_update {
        return Err(OcspResponseError::NotYetValid(verified.this_update));
    }
    if at > verified.next_update {
        return Err(OcspResponseError::Expired(verified.next_update));
    }
    match signer {
        Some(delegate) if !is_delegate(&delegate, issuer_der, at) => Err(OcspResponseError::NotDelegate),
        _ => Ok(verified),
    }
}

fn read_basic(der: &[u8]) -> Result<BasicOcspResponse, OcspResponseError> {
    if der.len() > OCSP_RESPONSE_BYTES_MAX {
        return Err(OcspResponseError::TooLarge);
    }
    let response = OcspResponse::from_der(der).map_err(|_| OcspResponseError::Malformed)?;
    match (response.response_status, response.response_bytes) {
        (OcspResponseStatus::Successful, Some(bytes)) if bytes.response_type == ID_BASIC => {
            BasicOcspResponse::from_der(bytes.response.as_bytes()).map_err(|_| OcspResponseError::Malformed)
        }
        (OcspResponseStatus::Successful, _) => Err(OcspResponseError::Malformed),
        (failure, _) => Err(OcspResponseError::Failure(failure as u8)),
    }
}

/// The content, and the delegate's certificate unless the issuer signed itself. Says nothing about times.
fn verify_signed(
    basic: &BasicOcspResponse,
    issuer_der: &[u8],
) -> Result<(VerifiedOcspResponse, Option<Vec<u8>>), OcspResponseError> {
    let data = &basic.tbs_response_data;
    let [single] = data.responses.as_slice() else {
        return Err(OcspResponseError::Several(data.responses.len()));
    };
    let hash = match single.cert_id.hash_algorithm.oid {
        ID_SHA1 => CertIdHash::Sha1,
        ID_SHA256 => CertIdHash::Sha256,
        _ => return Err(OcspResponseError::OtherIssuer),
    };
    let ids = OcspIssuer::new(issuer_der).ok_or(OcspResponseError::OtherIssuer)?;
    let [name, key] = ids.hashes(hash);
    if single.cert_id.issuer_name_hash.as_bytes() != name || single.cert_id.issuer_key_hash.as_bytes() != key
    {
        return Err(OcspResponseError::OtherIssuer);
    }
    let signer = signer(basic, issuer_der)?;
    verify_signature(basic, signer.as_deref().unwrap_or(issuer_der))?;
    let nonce = data.response_extensions.iter().flatten().find(|extension| extension.extn_id == ID_NONCE);
    let nonce = nonce.map(|extension| {
        der::asn1::OctetStringRef::from_der(extension.extn_value.as_bytes())
            .ok()
            .map(|nonce| nonce.as_bytes().to_vec())
            .filter(|nonce| (1..=NONCE_BYTES_MAX).contains(&nonce.len()))
            .ok_or(OcspResponseError::Malformed)
    });
    let verified = VerifiedOcspResponse {
        serial: SerialNumber::from_slice(single.cert_id.serial_number.as_bytes()).ok(),
        status: status(single).ok_or(OcspResponseError::Malformed)?,
        hash,
        this_update: from_time(single.this_update).ok_or(OcspResponseError::Malformed)?,
        next_update: single.next_update.and_then(from_time).ok_or(OcspResponseError::NoNextUpdate)?,
        produced_at: from_time(data.produced_at).ok_or(OcspResponseError::Malformed)?,
        nonce: nonce.transpose()?,
    };
    Ok((verified, signer))
}

/// The delegate's certificate, `None` if the responder is the issuer.
fn signer(basic: &BasicOcspResponse, issuer_der: &[u8]) -> Result<Option<Vec<u8>>, OcspResponseError> {
    let is_responder = |certificate: &Certificate| match &basic.tbs_response_data.responder_id {
        ResponderId::ByName(name) => certificate.tbs_certificate.subject == *name,
        ResponderId::ByKey(hash) => {
            let bits = certificate.tbs_certificate.subject_public_key_info.subject_public_key.raw_bytes();
            CertIdHash::Sha1.digest(bits) == hash.as_bytes()
        }
    };
    let issuer = Certificate::from_der(issuer_der).map_err(|_| OcspResponseError::OtherIssuer)?;
    if is_responder(&issuer) {
        return Ok(None);
    }
    let delegate = basic.certs.iter().flatten().find(|certificate| is_responder(certificate));
    let delegate = delegate.ok_or(OcspResponseError::NotDelegate)?;
    delegate.to_der().map(Some).map_err(|_| OcspResponseError::Malformed)
}

fn verify_signature(basic: &BasicOcspResponse, signer_der: &[u8]) -> Result<(), OcspResponseError> {
    let signer = parse_certificate(signer_der).ok_or(OcspResponseError::NotDelegate)?;
    let key =
        PublicKey::from_spki_der(signer.public_key().raw).map_err(|_| OcspResponseError::NotDelegate)?;
    let (oid, null) = key.algorithm().signature_oid();
    let algorithm = &basic.signature_algorithm;
    let parameters = match &algorithm.parameters {
        None => !null,
        Some(parameters) => null && parameters.is_null(),
    };
    if algorithm.oid.to_string() != oid || !parameters {
        return Err(OcspResponseError::Signature);
    }
    let message = basic.tbs_response_data.to_der().map_err(|_| OcspResponseError::Malformed)?;
    let signature = basic.signature.as_bytes().ok_or(OcspResponseError::Signature)?;
    if key.verifies(&message, signature) { Ok(()) } else { Err(OcspResponseError::Signature) }
}

/// Issued directly by the CA, for OCSP signing, and valid at `at`, as webpki sees it.
fn is_delegate(delegate_der: &[u8], issuer_der: &[u8], at: UtcDateTime) -> bool {
    let (delegate, issuer) = (CertificateDer::from(delegate_der), CertificateDer::from(issuer_der));
    let verify = || -> Result<(), webpki::Error> {
        let anchor = webpki::anchor_from_trusted_cert(&issuer)?;
        webpki::EndEntityCert::try_from(&delegate)?
            .verify_for_usage(
                webpki::ALL_VERIFICATION_ALGS,
                &[anchor],
                &[],
                to_unix(at),
                webpki::KeyUsage::required(OCSP_SIGNING),
                None,
                None,
            )
            .map(drop)
    };
    verify().is_ok()
}

fn from_time(at: OcspGeneralizedTime) -> Option<UtcDateTime> {
    let seconds = i64::try_from(at.0.to_unix_duration().as_secs()).ok()?;
    UtcDateTime::from_unix_timestamp(seconds).ok()
}

/// `None` for a reason that this authority does not use.
fn status(single: &SingleResponse) -> Option<OcspStatus> {
    Some(match &single.cert_status {
        CertStatus::Good(_) => OcspStatus::Good,
        CertStatus::Unknown(_) => OcspStatus::Unknown,
        CertStatus::Revoked(info) => OcspStatus::Revoked {
            at: from_time(info.revocation_time)?,
            reason: match info.revocation_reason {
                None | Some(CrlReason::Unspecified) => RevocationReason::Unspecified,
                Some(reason) => RevocationReason::from_code(u8::try_from(reason as u32).ok()?)?,
            },
        },
    })
}

/// Checks a response of a delegate of the CA `issuer_der`: empty if it keeps all rules (checklist 33 to 37).
pub fn lint_ocsp_response(der: &[u8], issuer_der: &[u8]) -> Vec<Finding> {
    let Ok(basic) = read_basic(der) else { return vec![Finding::Unreadable] };
    let (verified, delegate) = match verify_signed(&basic, issuer_der) {
        Ok((verified, Some(delegate))) => (verified, delegate),
        Ok((_, None)) => return vec![Finding::OcspDelegate],
        Err(OcspResponseError::NoNextUpdate) => return vec![Finding::OcspTimes],
        Err(OcspResponseError::Several(_)) => return vec![Finding::OcspSingle],
        Err(_) => return vec![Finding::OcspSignature],
    };
    let mut findings = lint_ocsp_responder(&delegate, issuer_der);
    let mut require = |kept: bool, finding| {
        if !kept {
            findings.push(finding)
        }
    };
    let Some(certificate) = parse_certificate(&delegate) else { return vec![Finding::Unreadable] };
    let end = from_asn1(certificate.validity().not_after);
    let ordered = verified.this_update < verified.next_update
        && verified.this_update <= verified.produced_at
        && verified.next_update <= end;
    require(ordered, Finding::OcspTimes);
    // A serial never issued is not "good" (RFC 6960 §2.2).
    require(verified.serial.is_some() || verified.status == OcspStatus::Unknown, Finding::OcspForeignSerial);
    let delegated =
        [verified.this_update.max(from_asn1(certificate.validity().not_before)), verified.next_update]
            .into_iter()
            .all(|at| is_delegate(&delegate, issuer_der, at));
    require(delegated, Finding::OcspDelegate);
    // The one certificate, and no reason 0 or 7 in the open.
    require(basic.certs.as_ref().is_some_and(|certs| certs.len() == 1), Finding::OcspDelegate);
    let CertStatus::Revoked(info) = &basic.tbs_response_data.responses[0].cert_status else {
        return findings;
    };
    let reason = !matches!(info.revocation_reason, Some(CrlReason::Unspecified | CrlReason::RemoveFromCRL));
    require(reason, Finding::CrlEntry);
    findings
}
