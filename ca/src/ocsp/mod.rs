//! OCSP (RFC 6960, in the lightweight profile of RFC 9919, nonces of RFC 9654): requests read, responses signed by a
//! delegate of the issuing CA, and responses checked.
//!
//! A responder answers one certificate per response. Without a nonce a response may be signed ahead and served from a
//! cache until its nextUpdate; a cache that ignores nonces is allowed (RFC 9654 §2.1).

mod request;
mod responder;
mod response;

use aws_lc_rs::digest;
use der::asn1::{ObjectIdentifier, OctetString};
use time::UtcDateTime;
use x509_cert::serial_number::SerialNumber as Asn1Serial;
use x509_cert::spki::AlgorithmIdentifierOwned;
use x509_ocsp::CertId;

use crate::leaf::parse_certificate;
use crate::reason::RevocationReason;
use crate::serial::SerialNumber;

pub use request::{NONCE_BYTES_MAX, OCSP_REQUEST_BYTES_MAX, OcspQuery, OcspRequestError};
pub use responder::{OCSP_RESPONDER_LIFETIME, OCSP_RESPONSE_LIFETIME, OcspAnswer, OcspError, OcspResponder};
pub use response::{
    OCSP_RESPONSE_BYTES_MAX, OcspResponseError, VerifiedOcspResponse, lint_ocsp_response, parse_ocsp_response,
};

const ID_SHA1: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.14.3.2.26");
const ID_SHA256: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.16.840.1.101.3.4.2.1");
const ID_NONCE: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.5.5.7.48.1.2");

/// Hash of a CertID. SHA-1 identifies here, it protects nothing; RFC 9919 prefers SHA-256, most clients still send SHA-1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CertIdHash {
    Sha1,
    Sha256,
}

impl CertIdHash {
    /// Both, the older first.
    pub const ALL: [Self; 2] = [Self::Sha1, Self::Sha256];

    fn oid(self) -> ObjectIdentifier {
        match self {
            Self::Sha1 => ID_SHA1,
            Self::Sha256 => ID_SHA256,
        }
    }

    fn digest(self, bytes: &[u8]) -> Vec<u8> {
        let algorithm = match self {
            Self::Sha1 => &digest::SHA1_FOR_LEGACY_USE_ONLY,
            Self::Sha256 => &digest::SHA256,
        };
        digest::digest(algorithm, bytes).as_ref().to_vec()
    }
}

/// An issuing CA as a CertID names it: hashes of its subject and of its public key's bits (RFC 6960 §4.1.1).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OcspIssuer {
    sha1: [Vec<u8>; 2],
    sha256: [Vec<u8>; 2],
}

impl OcspIssuer {
    /// Reads the CA certificate's DER; `None` if it cannot be read.
    pub fn new(certificate_der: &[u8]) -> Option<Self> {
        let certificate = parse_certificate(certificate_der)?;
        let parts = [certificate.subject().as_raw(), certificate.public_key().subject_public_key.as_ref()];
        Some(Self {
            sha1: parts.map(|part| CertIdHash::Sha1.digest(part)),
            sha256: parts.map(|part| CertIdHash::Sha256.digest(part)),
        })
    }

    /// Whether the query is about a certificate of this CA.
    pub fn is_asked(&self, query: &OcspQuery) -> bool {
        let [name, key] = self.hashes(query.hash());
        query.names(name, key)
    }

    fn hashes(&self, hash: CertIdHash) -> &[Vec<u8>; 2] {
        match hash {
            CertIdHash::Sha1 => &self.sha1,
            CertIdHash::Sha256 => &self.sha256,
        }
    }

    /// The CertID that a client computes for a certificate of ours; the algorithm's parameters are NULL, as OpenSSL and
    /// GnuTLS write them.
    fn cert_id(&self, hash: CertIdHash, serial: &SerialNumber) -> der::Result<CertId> {
        let [name, key] = self.hashes(hash);
        Ok(CertId {
            hash_algorithm: AlgorithmIdentifierOwned {
                oid: hash.oid(),
                parameters: Some(der::asn1::Null.into()),
            },
            issuer_name_hash: OctetString::new(name.as_slice())?,
            issuer_key_hash: OctetString::new(key.as_slice())?,
            serial_number: Asn1Serial::new(serial.as_bytes())?,
        })
    }
}

/// What is known of a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OcspStatus {
    /// Issued here and not revoked.
    Good,
    /// With the time and reason that its CRL states.
    Revoked { at: UtcDateTime, reason: RevocationReason },
    /// Never issued here (RFC 6960 §2.2).
    Unknown,
}

/// An answer without signature (RFC 6960 §2.3). It proves nothing: a client goes on as if there had been none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum OcspFailure {
    /// The request is no DER, too large, or asks about several certificates.
    MalformedRequest,
    /// The responder failed.
    InternalError,
    /// The responder cannot answer right now.
    TryLater,
    /// The issuer is none of ours, or the responder may not speak for it.
    Unauthorized,
}

impl OcspFailure {
    /// Every failure that is sent. sigRequired (5) never is: requests need no signature here.
    pub const ALL: [Self; 4] =
        [Self::MalformedRequest, Self::InternalError, Self::TryLater, Self::Unauthorized];

    /// The whole response, DER: `SEQUENCE { ENUMERATED }`.
    pub fn to_der(self) -> [u8; 5] {
        let status = match self {
            Self::MalformedRequest => 1,
            Self::InternalError => 2,
            Self::TryLater => 3,
            Self::Unauthorized => 6,
        };
        [0x30, 3, 0x0a, 1, status]
    }
}
