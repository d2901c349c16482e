//! The delegated responder: its certificate, and what it signs.

use std::time::Duration;

use der::asn1::{BitString, GeneralizedTime, OctetString};
use der::{DateTime, Decode as _, Encode as _};
use rcgen::{CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose};
use rustls_pki_types::CertificateDer;
use time::UtcDateTime;
use x509_cert::Certificate;
use x509_cert::ext::Extension;
use x509_cert::ext::pkix::CrlReason;
use x509_ocsp::{
    BasicOcspResponse, CertId, CertStatus, OcspGeneralizedTime, OcspResponse, ResponderId, ResponseData,
    RevokedInfo, SingleResponse,
};

use super::{CertIdHash, ID_NONCE, OcspIssuer, OcspQuery, OcspStatus, response};
use crate::extension::add_ocsp_no_check;
use crate::instant::{CLOCK_SKEW_ALLOWANCE, to_offset, whole_seconds};
use crate::issue::{IssueError, Issuer, LEAF_VALIDITY_MIN, recheck_signature};
use crate::keystore::KeyStore;
use crate::lint::{Finding, lint_ocsp_responder};
use crate::private::LeafKey;
use crate::reason::RevocationReason;
use crate::serial::SerialNumber;

/// Validity of a responder's certificate without backdating: 14 days. It carries ocsp-nocheck, so a short life is the only
/// bound on a stolen key (RFC 6960 §4.2.2.2.1).
pub const OCSP_RESPONDER_LIFETIME: Duration = Duration::from_secs(14 * 24 * 3600);

/// nextUpdate of a response after its making: 24 h. A cache signs anew well before.
pub const OCSP_RESPONSE_LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// Why no response is signed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OcspError {
    #[error("issuer's certificate cannot be read")]
    Issuer,
    #[error("query is about another issuer")]
    OtherIssuer,
    #[error("nextUpdate is not later than thisUpdate, or past the responder's own certificate ({0})")]
    Updates(UtcDateTime),
    #[error("time is outside the years 1970 to 9999")]
    Time,
    #[error("responder's key cannot sign")]
    Sign,
    #[error("response cannot be encoded: {0}")]
    Encode(String),
    #[error("response breaks a rule: {0}")]
    Lint(Finding),
    #[error("responder's certificate was not issued")]
    Certificate(#[source] IssueError),
    #[error("responder's certificate holds another key, is not by this issuer, or breaks a rule")]
    NotResponder,
}

/// What a response is to say of one certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OcspAnswer {
    pub status: OcspStatus,
    /// The moment at which the status was known to be right, less the clock allowance.
    pub this_update: UtcDateTime,
    pub next_update: UtcDateTime,
    /// The moment of signing.
    pub produced_at: UtcDateTime,
}

impl OcspAnswer {
    /// A status as of `now`: thisUpdate less [`CLOCK_SKEW_ALLOWANCE`], nextUpdate after `lifetime`.
    pub fn new(status: OcspStatus, now: UtcDateTime, lifetime: Duration) -> Self {
        Self {
            status,
            this_update: whole_seconds(now - CLOCK_SKEW_ALLOWANCE),
            next_update: whole_seconds(now + lifetime),
            produced_at: whole_seconds(now),
        }
    }
}

/// A delegate that signs responses for one issuing CA, with a certificate issued directly by it (RFC 6960 §4.2.2.2).
#[derive(Debug)]
pub struct OcspResponder {
    key: LeafKey,
    certificate: Certificate,
    certificate_der: Vec<u8>,
    issuer_der: Vec<u8>,
    ids: OcspIssuer,
    not_after: UtcDateTime,
}

impl OcspResponder {
    /// Has `issuer` certify `key` as its delegate from `now` for [`OCSP_RESPONDER_LIFETIME`], cut to the issuer's. The
    /// caller records the certificate ([`certificate_der`](Self::certificate_der)) before the first response leaves.
    ///
    /// Blocks while the key store signs.
    pub fn issue(
        issuer: &Issuer,
        store: &dyn KeyStore,
        key: LeafKey,
        serial: SerialNumber,
        now: UtcDateTime,
    ) -> Result<Self, OcspError> {
        let public = key.public_key();
        if *public == issuer.public {
            return Err(OcspError::Certificate(IssueError::IssuerKeyAsLeaf));
        }
        let not_before = whole_seconds(now - CLOCK_SKEW_ALLOWANCE).max(issuer.not_before);
        let not_after = whole_seconds(now + OCSP_RESPONDER_LIFETIME).min(issuer.not_after);
        if not_after - not_before < LEAF_VALIDITY_MIN {
            return Err(OcspError::Certificate(IssueError::IssuerEnds(issuer.not_after)));
        }
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        let tag = hex::encode(&public.key_hash()[..6]);
        params.distinguished_name.push(DnType::CommonName, format!("OCSP responder {tag}"));
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::OcspSigning];
        params.not_before = to_offset(not_before);
        params.not_after = to_offset(not_after);
        params.serial_number = Some(rcgen::SerialNumber::from_slice(serial.as_bytes()));
        params.key_identifier_method = public.key_identifier();
        params.use_authority_key_identifier_extension = true;
        add_ocsp_no_check(&mut params);
        let der = issuer.sign(store, &params, public).map_err(OcspError::Certificate)?;
        recheck_signature(&der, issuer.certificate_der(), public).map_err(OcspError::Certificate)?;
        Self::new(issuer.certificate_der(), key, &der)
    }

    /// Takes up an earlier certificate together with its key.
    pub fn new(issuer_der: &[u8], key: LeafKey, certificate_der: &[u8]) -> Result<Self, OcspError> {
        if let Some(finding) = lint_ocsp_responder(certificate_der, issuer_der).into_iter().next() {
            return Err(OcspError::Lint(finding));
        }
        let parsed = crate::leaf::parse_certificate(certificate_der).ok_or(OcspError::NotResponder)?;
        if parsed.public_key().raw != key.public_key().spki_der() {
            return Err(OcspError::NotResponder);
        }
        recheck_signature(certificate_der, issuer_der, key.public_key())
            .map_err(|_| OcspError::NotResponder)?;
        Ok(Self {
            not_after: crate::instant::from_asn1(parsed.validity().not_after),
            certificate: Certificate::from_der(certificate_der).map_err(encode)?,
            certificate_der: certificate_der.to_vec(),
            issuer_der: issuer_der.to_vec(),
            ids: OcspIssuer::new(issuer_der).ok_or(OcspError::Issuer)?,
            key,
        })
    }

    /// The issuer it speaks for, as CertIDs name it.
    pub fn issuer(&self) -> &OcspIssuer {
        &self.ids
    }

    /// The responder's certificate; it goes along in every response.
    pub fn certificate_der(&self) -> CertificateDer<'_> {
        CertificateDer::from(self.certificate_der.as_slice())
    }

    /// End of the responder's certificate. No response outlives it.
    pub fn not_after(&self) -> UtcDateTime {
        self.not_after
    }

    /// Signs the answer to a query, its CertID echoed as it was sent, and its nonce if there is one. DER.
    ///
    /// The response is read back and linted before it is handed out.
    ///
    /// # Errors
    /// [`OcspError::OtherIssuer`] if the query names another CA; the caller answers that with
    /// [`OcspFailure::Unauthorized`](super::OcspFailure).
    pub fn answer(&self, query: &OcspQuery, answer: &OcspAnswer) -> Result<Vec<u8>, OcspError> {
        if !self.ids.is_asked(query) {
            return Err(OcspError::OtherIssuer);
        }
        self.sign(query.cert_id().clone(), answer, query.nonce())
    }

    /// Signs an answer ahead of any query, without nonce, to be cached and stapled. DER.
    pub fn presign(
        &self,
        serial: &SerialNumber,
        hash: CertIdHash,
        answer: &OcspAnswer,
    ) -> Result<Vec<u8>, OcspError> {
        let id = self.ids.cert_id(hash, serial).map_err(encode)?;
        self.sign(id, answer, None)
    }

    fn sign(&self, id: CertId, answer: &OcspAnswer, nonce: Option<&[u8]>) -> Result<Vec<u8>, OcspError> {
        if answer.next_update <= answer.this_update || answer.next_update > self.not_after {
            return Err(OcspError::Updates(self.not_after));
        }
        let single = SingleResponse {
            cert_id: id,
            cert_status: cert_status(answer.status)?,
            this_update: ocsp_time(answer.this_update)?,
            next_update: Some(ocsp_time(answer.next_update)?),
            single_extensions: None,
        };
        let key_bits =
            self.certificate.tbs_certificate.subject_public_key_info.subject_public_key.raw_bytes();
        let data = ResponseData {
            version: x509_ocsp::Version::V1,
            // SHA-1 of the key's bits is what KeyHash means (RFC 6960 §4.2.1); it is a name, not a protection.
            responder_id: ResponderId::ByKey(
                OctetString::new(CertIdHash::Sha1.digest(key_bits)).map_err(encode)?,
            ),
            produced_at: ocsp_time(answer.produced_at)?,
            responses: vec![single],
            response_extensions: nonce.map(nonce_extension).transpose().map_err(encode)?.map(|e| vec![e]),
        };
        let signature = rcgen::SigningKey::sign(&self.key, &data.to_der().map_err(encode)?);
        let basic = BasicOcspResponse {
            tbs_response_data: data,
            signature_algorithm: signature_algorithm(&self.key).map_err(encode)?,
            signature: BitString::from_bytes(&signature.map_err(|_| OcspError::Sign)?).map_err(encode)?,
            certs: Some(vec![self.certificate.clone()]),
        };
        let der = OcspResponse::successful(basic).and_then(|response| response.to_der()).map_err(encode)?;
        match response::lint_ocsp_response(&der, &self.issuer_der).into_iter().next() {
            Some(finding) => Err(OcspError::Lint(finding)),
            None => Ok(der),
        }
    }
}

fn encode(error: der::Error) -> OcspError {
    OcspError::Encode(error.to_string())
}

fn ocsp_time(at: UtcDateTime) -> Result<OcspGeneralizedTime, OcspError> {
    let seconds = u64::try_from(at.unix_timestamp()).map_err(|_| OcspError::Time)?;
    let at = DateTime::from_unix_duration(Duration::from_secs(seconds)).map_err(|_| OcspError::Time)?;
    Ok(OcspGeneralizedTime(GeneralizedTime::from_date_time(at)))
}

fn cert_status(status: OcspStatus) -> Result<CertStatus, OcspError> {
    Ok(match status {
        OcspStatus::Good => CertStatus::good(),
        OcspStatus::Unknown => CertStatus::unknown(),
        OcspStatus::Revoked { at, reason } => CertStatus::revoked(RevokedInfo {
            revocation_time: ocsp_time(at)?,
            // As in the CRL, an absent reason means unspecified.
            revocation_reason: match reason {
                RevocationReason::Unspecified => None,
                RevocationReason::KeyCompromise => Some(CrlReason::KeyCompromise),
                RevocationReason::CaCompromise => Some(CrlReason::CaCompromise),
                RevocationReason::AffiliationChanged => Some(CrlReason::AffiliationChanged),
                RevocationReason::Superseded => Some(CrlReason::Superseded),
                RevocationReason::CessationOfOperation => Some(CrlReason::CessationOfOperation),
                RevocationReason::PrivilegeWithdrawn => Some(CrlReason::PrivilegeWithdrawn),
            },
        }),
    })
}

fn nonce_extension(nonce: &[u8]) -> der::Result<Extension> {
    let value = OctetString::new(nonce)?.to_der()?;
    Ok(Extension { extn_id: ID_NONCE, critical: false, extn_value: OctetString::new(value)? })
}

fn signature_algorithm(key: &LeafKey) -> der::Result<x509_cert::spki::AlgorithmIdentifierOwned> {
    let (oid, null) = key.public_key().algorithm().signature_oid();
    let parameters = if null { Some(der::asn1::Null.into()) } else { None };
    Ok(x509_cert::spki::AlgorithmIdentifierOwned { oid: der::asn1::ObjectIdentifier::new(oid)?, parameters })
}
