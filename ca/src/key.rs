//! Public keys that may be certified.

use std::fmt;

use std::str::FromStr;

use der::asn1::UintRef;
use der::{Decode as _, Reader as _};
use rcgen::PublicKeyData as _;
use sha2::{Digest as _, Sha256};
use x509_parser::prelude::FromDer as _;
use x509_parser::x509::SubjectPublicKeyInfo;

/// Largest SubjectPublicKeyInfo, in bytes; RSA 4096 needs 550.
const SPKI_BYTES_MAX: usize = 1024;

/// Smallest and largest RSA modulus, in bits.
const RSA_BITS: std::ops::RangeInclusive<usize> = 2048..=4096;

/// Key types that are certified. Written `ecdsa-p256`, `ecdsa-p384`, `ed25519`, `rsa-2048`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum KeyAlgorithm {
    #[default]
    EcdsaP256,
    EcdsaP384,
    Ed25519,
    /// With exponent 65537 and 2048 to 4096 bits, a multiple of 8.
    Rsa {
        bits: u16,
    },
}

/// A text that names no key type.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown key type {0:?}; ecdsa-p256, ecdsa-p384, ed25519 and rsa-2048 to rsa-4096 are known")]
pub struct UnknownKeyAlgorithm(pub String);

impl KeyAlgorithm {
    /// The types that are generated here.
    pub const GENERATED: [Self; 6] = [
        Self::EcdsaP256,
        Self::EcdsaP384,
        Self::Ed25519,
        Self::Rsa { bits: 2048 },
        Self::Rsa { bits: 3072 },
        Self::Rsa { bits: 4096 },
    ];

    /// Whether a CA made here may have such a key; an imported CA may also have an RSA key.
    pub fn permits_new_ca(self) -> bool {
        !matches!(self, Self::Rsa { .. })
    }

    /// What such a key signs certificates, CRLs and OCSP responses with: ECDSA with SHA-256 or SHA-384 (RFC 5758 §3.2),
    /// Ed25519 (RFC 8410 §3), RSA PKCS #1 v1.5 with SHA-256 (RFC 4055 §5).
    pub(crate) fn signature(self) -> &'static rcgen::SignatureAlgorithm {
        match self {
            Self::EcdsaP256 => &rcgen::PKCS_ECDSA_P256_SHA256,
            Self::EcdsaP384 => &rcgen::PKCS_ECDSA_P384_SHA384,
            Self::Ed25519 => &rcgen::PKCS_ED25519,
            Self::Rsa { .. } => &rcgen::PKCS_RSA_SHA256,
        }
    }

    /// Object identifier of [`signature`](Self::signature), and whether its parameters are NULL instead of absent.
    pub(crate) fn signature_oid(self) -> (&'static str, bool) {
        match self {
            Self::EcdsaP256 => ("1.2.840.10045.4.3.2", false),
            Self::EcdsaP384 => ("1.2.840.10045.4.3.3", false),
            Self::Ed25519 => ("1.3.101.112", false),
            Self::Rsa { .. } => ("1.2.840.113549.1.1.11", true),
        }
    }
}

impl fmt::Display for KeyAlgorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::EcdsaP256 => f.write_str("ecdsa-p256"),
            Self::EcdsaP384 => f.write_str("ecdsa-p384"),
            Self::Ed25519 => f.write_str("ed25519"),
            Self::Rsa { bits } => write!(f, "rsa-{bits}"),
        }
    }
}

impl FromStr for KeyAlgorithm {
    type Err = UnknownKeyAlgorithm;
    fn from_str(text: &str) -> Result<Self, UnknownKeyAlgorithm> {
        let unknown = || UnknownKeyAlgorithm(text.to_owned());
        match text {
            "ecdsa-p256" => Ok(Self::EcdsaP256),
            "ecdsa-p384" => Ok(Self::EcdsaP384),
            "ed25519" => Ok(Self::Ed25519),
            _ => {
                let bits: u16 =
                    text.strip_prefix("rsa-").and_then(|bits| bits.parse().ok()).ok_or_else(unknown)?;
                let written = Self::Rsa { bits };
                let sized = RSA_BITS.contains(&usize::from(bits)) && bits.is_multiple_of(8);
                if sized && written.to_string() == text { Ok(written) } else { Err(unknown()) }
            }
        }
    }
}

/// Key types of CAs that are made here. Written `p256`, `p384`, `ed25519`; read also as [`KeyAlgorithm`] writes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum CaKeyType {
    #[default]
    P256,
    P384,
    Ed25519,
}

/// A text that names no key type for a CA.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no key type of a new CA; those are p256, p384 and ed25519")]
pub struct UnknownCaKeyType(pub String);

impl CaKeyType {
    pub const ALL: [Self; 3] = [Self::P256, Self::P384, Self::Ed25519];

    /// The type of a CA after one with such a key: the same, but for RSA, which only imported CAs have.
    pub fn after(algorithm: KeyAlgorithm) -> Self {
        match algorithm {
            KeyAlgorithm::EcdsaP256 | KeyAlgorithm::Rsa { .. } => Self::P256,
            KeyAlgorithm::EcdsaP384 => Self::P384,
            KeyAlgorithm::Ed25519 => Self::Ed25519,
        }
    }

    pub fn algorithm(self) -> KeyAlgorithm {
        match self {
            Self::P256 => KeyAlgorithm::EcdsaP256,
            Self::P384 => KeyAlgorithm::EcdsaP384,
            Self::Ed25519 => KeyAlgorithm::Ed25519,
        }
    }
}

impl fmt::Display for CaKeyType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::P256 => "p256",
            Self::P384 => "p384",
            Self::Ed25519 => "ed25519",
        })
    }
}

impl FromStr for CaKeyType {
    type Err = UnknownCaKeyType;
    fn from_str(text: &str) -> Result<Self, UnknownCaKeyType> {
        let named = |known: &Self| known.to_string() == text || known.algorithm().to_string() == text;
        Self::ALL.into_iter().find(named).ok_or_else(|| UnknownCaKeyType(text.to_owned()))
    }
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
    #[error("private key is not an ECDSA P-256, P-384, Ed25519 or RSA key")]
    PrivateKey,
    #[error("RSA keys are generated with 2048, 3072 or 4096 bits, not {0}")]
    RsaGeneration(u16),
    #[error("key pair cannot be generated")]
    Generate,
}

/// A public key whose type, size and encoding have been checked.
#[derive(Clone, PartialEq, Eq)]
pub struct PublicKey {
    algorithm: KeyAlgorithm,
    der: Vec<u8>,
    /// Where the key's own bits begin in `der`; they go to its end.
    bits_at: usize,
}

impl PublicKey {
    /// Takes the DER SubjectPublicKeyInfo of a P-256, P-384, Ed25519 or RSA key (2048 to 4096 bits, e = 65537).
    ///
    /// Only the canonical encoding is taken, so that one key has one hash.
    pub fn from_spki_der(spki_der: &[u8]) -> Result<Self, KeyError> {
        if spki_der.len() > SPKI_BYTES_MAX {
            return Err(KeyError::TooLong(spki_der.len()));
        }
        let Ok((_, parsed)) = SubjectPublicKeyInfo::from_der(spki_der) else {
            return Err(KeyError::Unsupported);
        };
        let bits = &*parsed.subject_public_key.data;
        let written = |signature: &&'static rcgen::SignatureAlgorithm| {
            Plain { bits, signature }.subject_public_key_info() == spki_der
        };
        let signature = SIGNATURES.into_iter().find(written).ok_or_else(|| refused(spki_der))?;
        let algorithm = check_key_bits(signature, bits)?;
        Ok(Self { algorithm, der: spki_der.to_vec(), bits_at: spki_der.len() - bits.len() })
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
        rcgen::KeyIdMethod::PreSpecified(Sha256::digest(self.der_bytes())[..20].to_vec())
    }

    /// Whether `signature` over `message` is this key's, by its one algorithm (see [`KeyStore`](crate::KeyStore)).
    pub fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        use aws_lc_rs::signature as scheme;
        let algorithm: &dyn scheme::VerificationAlgorithm = match self.algorithm {
            KeyAlgorithm::EcdsaP256 => &scheme::ECDSA_P256_SHA256_ASN1,
            KeyAlgorithm::EcdsaP384 => &scheme::ECDSA_P384_SHA384_ASN1,
            KeyAlgorithm::Ed25519 => &scheme::ED25519,
            KeyAlgorithm::Rsa { .. } => &scheme::RSA_PKCS1_2048_8192_SHA256,
        };
        scheme::UnparsedPublicKey::new(algorithm, self.der_bytes()).verify(message, signature).is_ok()
    }
}

impl rcgen::PublicKeyData for PublicKey {
    fn der_bytes(&self) -> &[u8] {
        &self.der[self.bits_at..]
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        self.algorithm.signature()
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({:?}, sha256 {})", self.algorithm, hex::encode(self.key_hash()))
    }
}

/// What keys that are taken sign with, the most frequent first.
static SIGNATURES: [&rcgen::SignatureAlgorithm; 4] = [
    &rcgen::PKCS_ECDSA_P256_SHA256,
    &rcgen::PKCS_ECDSA_P384_SHA384,
    &rcgen::PKCS_ED25519,
    &rcgen::PKCS_RSA_SHA256,
];

/// A key of which nothing is known but what stands in its encoding.
struct Plain<'a> {
    bits: &'a [u8],
    signature: &'static rcgen::SignatureAlgorithm,
}

impl rcgen::PublicKeyData for Plain<'_> {
    fn der_bytes(&self) -> &[u8] {
        self.bits
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        self.signature
    }
}

/// Why an encoding is none of ours. rcgen tries all types that it knows, which takes its time.
fn refused(spki_der: &[u8]) -> KeyError {
    match rcgen::SubjectPublicKeyInfo::from_der(spki_der) {
        Ok(spki) if spki.subject_public_key_info() != spki_der => KeyError::NotCanonical,
        _ => KeyError::Unsupported,
    }
}

fn check_key_bits(algorithm: &rcgen::SignatureAlgorithm, bits: &[u8]) -> Result<KeyAlgorithm, KeyError> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::private::LeafKey;
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
    fn names_of_key_types_read_back() {
        for algorithm in KeyAlgorithm::GENERATED {
            assert_eq!(algorithm.to_string().parse(), Ok(algorithm));
        }
        for text in
            ["", "p256", "rsa", "rsa-1024", "rsa-02048", "rsa-+2048", "rsa-2050", "rsa-8192", "RSA-2048"]
        {
            assert_eq!(text.parse::<KeyAlgorithm>(), Err(UnknownKeyAlgorithm(text.to_owned())));
        }
    }

    #[test]
    fn a_new_ca_has_one_of_three_types_and_the_next_one_follows() {
        for known in CaKeyType::ALL {
            assert!(known.algorithm().permits_new_ca());
            assert_eq!(CaKeyType::after(known.algorithm()), known);
            for text in [known.to_string(), known.algorithm().to_string()] {
                assert_eq!(text.parse(), Ok(known), "{text}");
            }
        }
        assert_eq!(CaKeyType::after(KeyAlgorithm::Rsa { bits: 4096 }), CaKeyType::default());
        for text in ["", "rsa", "rsa-2048", "p521", "P256", "p-256", " p256", "ed448"] {
            assert_eq!(text.parse::<CaKeyType>(), Err(UnknownCaKeyType(text.to_owned())));
        }
    }
}
