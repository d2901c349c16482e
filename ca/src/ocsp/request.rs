//! Requests.

use base64::Engine as _;
use der::Decode as _;
use x509_ocsp::{CertId, OcspRequest};

use super::{CertIdHash, ID_NONCE, ID_SHA1, ID_SHA256};
use crate::serial::SerialNumber;

/// Largest request, in bytes of DER. One CertID with SHA-256 and a nonce of 128 octets needs about 320; RFC 9919 §5 keeps
/// GET requests to 255 bytes.
pub const OCSP_REQUEST_BYTES_MAX: usize = 1024;

/// Longest nonce, in octets. RFC 9654 §2.1: 1 to 128.
pub const NONCE_BYTES_MAX: usize = 128;

/// Why a request is not answered with a signed response.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OcspRequestError {
    #[error("OCSP request is larger than {OCSP_REQUEST_BYTES_MAX} bytes")]
    TooLarge,
    #[error("OCSP request is not base64")]
    Base64,
    #[error("OCSP request is malformed")]
    Malformed,
    #[error("OCSP request asks about {0} certificates, not one")]
    Several(usize),
    #[error("OCSP request has the critical extension {0}")]
    CriticalExtension(String),
    #[error("OCSP request names its issuer by a hash other than SHA-1 or SHA-256")]
    Hash,
    #[error("OCSP request's nonce is {0} octets long, 1 to {NONCE_BYTES_MAX} are allowed")]
    NonceLength(usize),
}

/// What a request asks. Its signature, if any, is not looked at: anybody may ask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OcspQuery {
    id: CertId,
    hash: CertIdHash,
    nonce: Option<Vec<u8>>,
}

impl OcspQuery {
    /// Reads the body of a POST (`application/ocsp-request`).
    ///
    /// # Errors
    /// All are answered with [`OcspFailure::MalformedRequest`](super::OcspFailure), but [`OcspRequestError::Hash`] with
    /// [`OcspFailure::Unauthorized`](super::OcspFailure): an issuer that cannot be recognised is none of ours.
    pub fn from_der(bytes: &[u8]) -> Result<Self, OcspRequestError> {
        if bytes.len() > OCSP_REQUEST_BYTES_MAX {
            return Err(OcspRequestError::TooLarge);
        }
        let request = OcspRequest::from_der(bytes).map_err(|_| OcspRequestError::Malformed)?.tbs_request;
        let [single] = <[_; 1]>::try_from(request.request_list)
            .map_err(|list: Vec<_>| OcspRequestError::Several(list.len()))?;
        let extensions = request.request_extensions.unwrap_or_default();
        let of_one = single.single_request_extensions.unwrap_or_default();
        if let Some(critical) = extensions.iter().chain(&of_one).find(|e| e.critical && e.extn_id != ID_NONCE)
        {
            return Err(OcspRequestError::CriticalExtension(critical.extn_id.to_string()));
        }
        let mut nonces = extensions.iter().filter(|extension| extension.extn_id == ID_NONCE);
        let nonce = match (nonces.next(), nonces.next()) {
            (None, _) => None,
            (Some(extension), None) => Some(read_nonce(extension.extn_value.as_bytes())?),
            (Some(_), Some(_)) => return Err(OcspRequestError::Malformed),
        };
        let hash = match single.req_cert.hash_algorithm.oid {
            ID_SHA1 => CertIdHash::Sha1,
            ID_SHA256 => CertIdHash::Sha256,
            _ => return Err(OcspRequestError::Hash),
        };
        Ok(Self { id: single.req_cert, hash, nonce })
    }

    /// Reads what follows the responder's path and a slash in a GET: base64 of the DER, percent-encoded where `+`, `/` and
    /// `=` were (RFC 6960 §A.1). Plain ones are taken as well, since many clients send them.
    pub fn from_get_path(text: &str) -> Result<Self, OcspRequestError> {
        // Every base64 character may be written in three.
        if text.len() > 4 * OCSP_REQUEST_BYTES_MAX {
            return Err(OcspRequestError::TooLarge);
        }
        let plain = percent_decode(text).ok_or(OcspRequestError::Base64)?;
        let config = base64::engine::GeneralPurposeConfig::new()
            .with_decode_padding_mode(base64::engine::DecodePaddingMode::Indifferent);
        let engine = base64::engine::GeneralPurpose::new(&base64::alphabet::STANDARD, config);
        let der = engine.decode(plain).map_err(|_| OcspRequestError::Base64)?;
        Self::from_der(&der)
    }

    /// Hash by which the issuer is named, and will be in the response.
    pub fn hash(&self) -> CertIdHash {
        self.hash
    }

    /// The serial, if it is of the form that this authority issues; any other was never issued here.
    pub fn serial(&self) -> Option<SerialNumber> {
        SerialNumber::from_slice(self.id.serial_number.as_bytes()).ok()
    }

    /// The nonce that wants to be echoed.
    pub fn nonce(&self) -> Option<&[u8]> {
        self.nonce.as_deref()
    }

    pub(super) fn cert_id(&self) -> &CertId {
        &self.id
    }

    pub(super) fn names(&self, name_hash: &[u8], key_hash: &[u8]) -> bool {
        self.id.issuer_name_hash.as_bytes() == name_hash && self.id.issuer_key_hash.as_bytes() == key_hash
    }
}

fn read_nonce(value: &[u8]) -> Result<Vec<u8>, OcspRequestError> {
    let nonce =
        der::asn1::OctetStringRef::from_der(value).map_err(|_| OcspRequestError::Malformed)?.as_bytes();
    if nonce.is_empty() || nonce.len() > NONCE_BYTES_MAX {
        return Err(OcspRequestError::NonceLength(nonce.len()));
    }
    Ok(nonce.to_vec())
}

fn percent_decode(text: &str) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        if first == b'%' {
            let (digits, tail) = tail.split_first_chunk::<2>()?;
            let mut byte = [0];
            hex::decode_to_slice(digits, &mut byte).ok()?;
            out.push(byte[0]);
            rest = tail;
        } else {
            out.push(first);
            rest = tail;
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A request by hand: CertID with SHA-1, one nonce.
    fn request(nonce: &[u8]) -> Vec<u8> {
        use der::Encode as _;
        let wrap = |tag: u8, body: &[u8]| {
            let inner = der::AnyRef::new(der::Tag::OctetString, body).unwrap().to_der().unwrap();
            [&[tag], &inner[1..]].concat()
        };
        let id = [
            hex::decode("300906052b0e03021a0500").unwrap(),
            wrap(4, &[1; 20]),
            wrap(4, &[2; 20]),
            wrap(2, &[0x41; 16]),
        ]
        .concat();
        let extension =
            wrap(0x30, &[hex::decode("06092b0601050507300102").unwrap(), wrap(4, &wrap(4, nonce))].concat());
        let list = wrap(0x30, &wrap(0x30, &wrap(0x30, &id)));
        wrap(0x30, &wrap(0x30, &[list, wrap(0xa2, &wrap(0x30, &extension))].concat()))
    }

    #[test]
    fn nonces_of_1_to_128_octets_are_taken() {
        for length in [1, 16, 32, 127, 128] {
            let query = OcspQuery::from_der(&request(&vec![9; length])).unwrap();
            assert_eq!(query.nonce(), Some(vec![9; length].as_slice()));
            assert_eq!(query.serial(), Some(SerialNumber::from_slice(&[0x41; 16]).unwrap()));
            assert_eq!(query.hash(), CertIdHash::Sha1);
        }
        for length in [0, 129, 500] {
            let refused = OcspQuery::from_der(&request(&vec![9; length]));
            assert_eq!(refused, Err(OcspRequestError::NonceLength(length)));
        }
        assert_eq!(OcspQuery::from_der(&request(&[9; 1100])), Err(OcspRequestError::TooLarge));
    }

    #[test]
    fn a_get_path_is_base64_with_or_without_percent() {
        let der = request(&[0xfb; 31]);
        let plain = base64::engine::general_purpose::STANDARD.encode(&der);
        let escaped = plain.replace('+', "%2B").replace('/', "%2f").replace('=', "%3D");
        assert_ne!(plain, escaped);
        let expected = OcspQuery::from_der(&der).unwrap();
        for text in [plain.as_str(), &escaped, plain.trim_end_matches('=')] {
            assert_eq!(OcspQuery::from_get_path(text), Ok(expected.clone()));
        }
        for text in ["%", "%2", "%zz", "a b", "\u{e4}"] {
            assert_eq!(OcspQuery::from_get_path(text), Err(OcspRequestError::Base64), "{text:?}");
        }
        assert_eq!(OcspQuery::from_get_path(""), Err(OcspRequestError::Malformed));
        assert_eq!(OcspQuery::from_get_path(&"A".repeat(5000)), Err(OcspRequestError::TooLarge));
    }

    proptest! {
        /// Whatever is sent, reading it ends; and it is the same request by GET as by POST.
        #[test]
        fn get_and_post_are_read_alike(bytes in proptest::collection::vec(any::<u8>(), 0..300), text in "[ -~]{0,300}") {
            let _ = OcspQuery::from_get_path(&text);
            let path = base64::engine::general_purpose::STANDARD.encode(&bytes);
            prop_assert_eq!(OcspQuery::from_get_path(&path), OcspQuery::from_der(&bytes));
        }

        /// A valid request with one byte changed or cut is read or refused, never a panic, and never another length of nonce.
        #[test]
        fn a_changed_request_never_panics(at in 0_usize..140, byte in any::<u8>(), cut in 0_usize..140) {
            let mut der = request(&[9; 32]);
            let length = der.len();
            der[at % length] = byte;
            let _ = OcspQuery::from_der(&der);
            prop_assert!(OcspQuery::from_der(&der[..cut % length]).is_err());
        }
    }
}
