//! Public keys that may be certified, and the key pair of a leaf.

use std::fmt;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _};
use der::asn1::UintRef;
use der::{Decode as _, Reader as _};
use rcgen::PublicKeyData as _;
use rustls::sign::CertifiedKey;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use sha2::{Digest as _, Sha256};
use zeroize::{Zeroize as _, Zeroizing};

/// Label of a PEM block with a PKCS #8 key. RFC 7468 §10.
const PKCS8_LABEL: &str = "PRIVATE KEY";

/// Largest PEM text of a private key, in bytes.
const KEY_PEM_BYTES_MAX: usize = 16 * 1024;

/// Largest SubjectPublicKeyInfo, in bytes; RSA 4096 needs 550.
const SPKI_BYTES_MAX: usize = 1024;

/// Smallest and largest RSA modulus, in bits.
const RSA_BITS: std::ops::RangeInclusive<usize> = 2048..=4096;

/// Key types that are certified.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KeyAlgorithm {
    EcdsaP256,
    EcdsaP384,
    Ed25519,
    /// With exponent 65537 and 2048 to 4096 bits, a multiple of 8.
    Rsa {
        bits: u16,
    },
}

/// Why a key is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    #[error("public key is {0} bytes long, at most {SPKI_BYTES_MAX} are allowed")]
    TooLong(usize),
    #[error("public key is not a DER SubjectPublicKeyInfo of a known type")]
    Unsupported,
    #[error("public key is not in its one canonical encoding")]
    NotCanonical,
    #[error("public key is no uncompressed point of its curve")]
    Point,
    #[error("RSA key has {0} bits; 2048 to 4096 in steps of 8 are allowed")]
    RsaSize(usize),
    #[error("RSA key's exponent is not 65537")]
    RsaExponent,
    #[error("RSA key is malformed")]
    RsaEncoding,
    #[error("private key is not one PEM block of PKCS #8")]
    PrivatePem,
    #[error("private key is not an ECDSA P-256 key")]
    PrivateKey,
    #[error("key pair cannot be generated")]
    Generate,
}

/// A public key whose type, size and encoding have been checked.
#[derive(Clone, PartialEq, Eq)]
pub struct PublicKey {
    algorithm: KeyAlgorithm,
    spki: rcgen::SubjectPublicKeyInfo,
    der: Vec<u8>,
}

impl PublicKey {
    /// Takes the DER SubjectPublicKeyInfo of a P-256, P-384, Ed25519 or RSA key (2048 to 4096 bits, e = 65537).
    ///
    /// Only the canonical encoding is taken, so that one key has one hash.
    pub fn from_spki_der(spki_der: &[u8]) -> Result<Self, KeyError> {
        if spki_der.len() > SPKI_BYTES_MAX {
            return Err(KeyError::TooLong(spki_der.len()));
        }
        let spki = rcgen::SubjectPublicKeyInfo::from_der(spki_der).map_err(|_| KeyError::Unsupported)?;
        if spki.subject_public_key_info() != spki_der {
            return Err(KeyError::NotCanonical);
        }
        let algorithm = check_key_bits(&spki)?;
        Ok(Self { algorithm, spki, der: spki_der.to_vec() })
    }

    /// The key's type and size.
    pub fn algorithm(&self) -> KeyAlgorithm {
        self.algorithm
    }

    /// The DER SubjectPublicKeyInfo.
    pub fn spki_der(&self) -> &[u8] {
        &self.der
    }

    /// SHA-256 of the DER SubjectPublicKeyInfo.
    pub fn key_hash(&self) -> [u8; 32] {
        Sha256::digest(&self.der).into()
    }

    /// subjectKeyIdentifier for this key: the first 160 bits of the SHA-256 of the public key's bits
    /// (RFC 7093 §2 method 1). rcgen's default hashes the whole SubjectPublicKeyInfo, which is no method of that RFC.
    pub(crate) fn key_identifier(&self) -> rcgen::KeyIdMethod {
        rcgen::KeyIdMethod::PreSpecified(Sha256::digest(self.spki.der_bytes())[..20].to_vec())
    }

    pub(crate) fn as_rcgen(&self) -> &rcgen::SubjectPublicKeyInfo {
        &self.spki
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({:?}, sha256 {})", self.algorithm, hex::encode(self.key_hash()))
    }
}

fn check_key_bits(spki: &rcgen::SubjectPublicKeyInfo) -> Result<KeyAlgorithm, KeyError> {
    let (algorithm, bits) = (spki.algorithm(), spki.der_bytes());
    if algorithm == &rcgen::PKCS_ECDSA_P256_SHA256 {
        check_point(bits, &aws_lc_rs::agreement::ECDH_P256, 32).map(|()| KeyAlgorithm::EcdsaP256)
    } else if algorithm == &rcgen::PKCS_ECDSA_P384_SHA384 {
        check_point(bits, &aws_lc_rs::agreement::ECDH_P384, 48).map(|()| KeyAlgorithm::EcdsaP384)
    } else if algorithm == &rcgen::PKCS_ED25519 {
        if bits.len() == 32 { Ok(KeyAlgorithm::Ed25519) } else { Err(KeyError::Point) }
    } else if algorithm == &rcgen::PKCS_RSA_SHA256 {
        check_rsa(bits).map(|bits| KeyAlgorithm::Rsa { bits })
    } else {
        Err(KeyError::Unsupported)
    }
}

/// Only the uncompressed form (SEC 1 §2.3.3, leading 04) of a point that is on the curve. aws-lc also reads
/// compressed points, which would give one key two encodings.
fn check_point(
    bits: &[u8],
    curve: &'static aws_lc_rs::agreement::Algorithm,
    coordinate_bytes: usize,
) -> Result<(), KeyError> {
    if bits.len() != 1 + 2 * coordinate_bytes || bits[0] != 4 {
        return Err(KeyError::Point);
    }
    let point = aws_lc_rs::agreement::UnparsedPublicKey::new(curve, bits);
    aws_lc_rs::agreement::ParsedPublicKey::try_from(point).map(drop).map_err(|_| KeyError::Point)
}

fn check_rsa(bits: &[u8]) -> Result<u16, KeyError> {
    let (modulus, exponent) = read_rsa(bits).map_err(|_| KeyError::RsaEncoding)?;
    let modulus_bytes = modulus.as_bytes();
    let size = modulus_bytes.len() * 8 - modulus_bytes.first().map_or(0, |b| b.leading_zeros() as usize);
    if !RSA_BITS.contains(&size) || size % 8 != 0 {
        return Err(KeyError::RsaSize(size));
    }
    if exponent.as_bytes() != [1, 0, 1] {
        return Err(KeyError::RsaExponent);
    }
    if modulus_bytes.last().is_none_or(|b| b % 2 == 0) {
        return Err(KeyError::RsaEncoding);
    }
    u16::try_from(size).map_err(|_| KeyError::RsaSize(size))
}

/// `RSAPublicKey ::= SEQUENCE { modulus INTEGER, publicExponent INTEGER }`, RFC 8017 §A.1.1; strict DER.
fn read_rsa(bits: &[u8]) -> der::Result<(UintRef<'_>, UintRef<'_>)> {
    let mut reader = der::SliceReader::new(bits)?;
    let pair = reader.sequence(|inner| Ok((UintRef::decode(inner)?, UintRef::decode(inner)?)))?;
    reader.finish(pair)
}

/// The ECDSA P-256 key pair of a leaf. It is born where it is used and never leaves the host; it cannot be printed.
pub struct LeafKey {
    pair: EcdsaKeyPair,
    pkcs8: Zeroizing<Vec<u8>>,
    public: PublicKey,
}

impl LeafKey {
    /// Draws a new key pair from aws-lc's generator.
    pub fn generate() -> Result<Self, KeyError> {
        let pkcs8 = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &SystemRandom::new())
            .map_err(|_| KeyError::Generate)?;
        Self::from_pkcs8_der(pkcs8.as_ref())
    }

    /// Reads a DER PKCS #8 key.
    pub fn from_pkcs8_der(pkcs8: &[u8]) -> Result<Self, KeyError> {
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, pkcs8)
            .map_err(|_| KeyError::PrivateKey)?;
        let public = p256_public_key(&pair).ok_or(KeyError::PrivateKey)?;
        Ok(Self { pair, pkcs8: Zeroizing::new(pkcs8.to_vec()), public })
    }

    /// Reads one PEM block `PRIVATE KEY` (RFC 7468 §10).
    pub fn from_pkcs8_pem(text: &str) -> Result<Self, KeyError> {
        if text.len() > KEY_PEM_BYTES_MAX {
            return Err(KeyError::PrivatePem);
        }
        let block = pem::parse(text).map_err(|_| KeyError::PrivatePem)?;
        let labelled = block.tag() == PKCS8_LABEL;
        let contents = Zeroizing::new(block.into_contents());
        if labelled { Self::from_pkcs8_der(&contents) } else { Err(KeyError::PrivatePem) }
    }

    /// The key as a PEM block `PRIVATE KEY`, wiped when dropped.
    pub fn to_pkcs8_pem(&self) -> Zeroizing<String> {
        let block = pem::Pem::new(PKCS8_LABEL, self.pkcs8.to_vec());
        let config = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
        let text = Zeroizing::new(pem::encode_config(&block, config));
        block.into_contents().zeroize();
        text
    }

    /// The DER PKCS #8 key.
    pub fn to_pkcs8_der(&self) -> Zeroizing<Vec<u8>> {
        self.pkcs8.clone()
    }

    /// The public half.
    pub fn public_key(&self) -> &PublicKey {
        &self.public
    }

    /// SHA-256 of the DER SubjectPublicKeyInfo.
    pub fn key_hash(&self) -> [u8; 32] {
        self.public.key_hash()
    }

    /// The key in rustls's form.
    pub fn to_rustls_der(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.pkcs8.to_vec()))
    }

    /// `chain` (leaf first) with this key, ready for a rustls certificate resolver.
    ///
    /// # Errors
    /// [`rustls::Error::InconsistentKeys`] if the leaf holds another key.
    pub fn certified(&self, chain: Vec<CertificateDer<'static>>) -> Result<CertifiedKey, rustls::Error> {
        let signing = rustls::crypto::aws_lc_rs::sign::any_ecdsa_type(&self.to_rustls_der())?;
        let certified = CertifiedKey::new(chain, signing);
        certified.keys_match()?;
        Ok(certified)
    }
}

impl fmt::Debug for LeafKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LeafKey({:?})", self.public)
    }
}

impl rcgen::PublicKeyData for LeafKey {
    fn der_bytes(&self) -> &[u8] {
        self.public.as_rcgen().der_bytes()
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        &rcgen::PKCS_ECDSA_P256_SHA256
    }
}

impl rcgen::SigningKey for LeafKey {
    fn sign(&self, msg: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        sign_p256(&self.pair, msg).ok_or(rcgen::Error::RemoteKeyError)
    }
}

/// The public half of `pair` as a checked key.
pub(crate) fn p256_public_key(pair: &EcdsaKeyPair) -> Option<PublicKey> {
    use aws_lc_rs::encoding::{AsDer as _, PublicKeyX509Der};
    let der: PublicKeyX509Der<'_> = pair.public_key().as_der().ok()?;
    PublicKey::from_spki_der(der.as_ref()).ok()
}

/// ECDSA with SHA-256, the signature in DER (RFC 5480 §4).
pub(crate) fn sign_p256(pair: &EcdsaKeyPair, message: &[u8]) -> Option<Vec<u8>> {
    pair.sign(&SystemRandom::new(), message).ok().map(|signature| signature.as_ref().to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::KeyPair;

    #[test]
    fn key_types_are_taken_or_refused() {
        let table = [
            (&rcgen::PKCS_ECDSA_P256_SHA256, Ok(KeyAlgorithm::EcdsaP256)),
            (&rcgen::PKCS_ECDSA_P384_SHA384, Ok(KeyAlgorithm::EcdsaP384)),
            (&rcgen::PKCS_ED25519, Ok(KeyAlgorithm::Ed25519)),
            (&rcgen::PKCS_RSA_SHA256, Ok(KeyAlgorithm::Rsa { bits: 2048 })),
            (&rcgen::PKCS_ECDSA_P521_SHA512, Err(KeyError::Unsupported)),
        ];
        for (algorithm, verdict) in table {
            let pair = KeyPair::generate_for(algorithm).unwrap();
            let key = PublicKey::from_spki_der(&pair.subject_public_key_info());
            assert_eq!(key.map(|key| key.algorithm()), verdict, "{algorithm:?}");
        }
    }

    #[test]
    fn a_compressed_or_foreign_point_is_refused() {
        let spki = LeafKey::generate().unwrap().public_key().spki_der().to_vec();
        let mut off_curve = spki.clone();
        *off_curve.last_mut().unwrap() ^= 1;
        assert_eq!(PublicKey::from_spki_der(&off_curve), Err(KeyError::Point));
        // The same key with a compressed point: SEQUENCE and BIT STRING lengths shrink by 32.
        let mut compressed = spki[..spki.len() - 32].to_vec();
        compressed[1] -= 32;
        let bit_string = compressed.len() - 35;
        compressed[bit_string] -= 32;
        compressed[bit_string + 2] = 2 + (spki[spki.len() - 1] & 1);
        assert_eq!(PublicKey::from_spki_der(&compressed), Err(KeyError::Point));
        let mut trailing = spki;
        trailing.push(0);
        assert_eq!(PublicKey::from_spki_der(&trailing), Err(KeyError::Unsupported));
    }

    #[test]
    fn a_leaf_key_survives_pem_and_cannot_be_printed() {
        let key = LeafKey::generate().unwrap();
        let text = key.to_pkcs8_pem();
        assert!(text.starts_with("-----BEGIN PRIVATE KEY-----\n"));
        assert_eq!(LeafKey::from_pkcs8_pem(&text).unwrap().key_hash(), key.key_hash());
        let shown = format!("{key:?}");
        assert!(shown.starts_with("LeafKey(PublicKey("), "{shown}");
        assert!(!shown.contains(&hex::encode(&key.pkcs8[36..60])));
    }

    #[test]
    fn other_private_keys_are_refused() {
        assert_eq!(LeafKey::from_pkcs8_pem("").unwrap_err(), KeyError::PrivatePem);
        let p384 = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
        assert_eq!(LeafKey::from_pkcs8_pem(&p384.serialize_pem()).unwrap_err(), KeyError::PrivateKey);
        let relabelled = LeafKey::generate().unwrap().to_pkcs8_pem().replace("PRIVATE KEY", "CERTIFICATE");
        assert_eq!(LeafKey::from_pkcs8_pem(&relabelled).unwrap_err(), KeyError::PrivatePem);
    }
}
