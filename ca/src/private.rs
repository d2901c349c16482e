//! Private keys in this process's memory, of every type that is certified.

use std::fmt;

use aws_lc_rs::encoding::{AsDer as _, Pkcs8V1Der, PublicKeyX509Der};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P384_SHA384_ASN1_SIGNING, EcdsaKeyPair, EcdsaSigningAlgorithm,
    Ed25519KeyPair, KeyPair as _, RSA_PKCS1_SHA256, RsaKeyPair,
};
use rustls::sign::CertifiedKey;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use zeroize::{Zeroize as _, Zeroizing};

use crate::key::{KeyAlgorithm, KeyError, PublicKey};

/// Label of a PEM block with a PKCS #8 key. RFC 7468 §10.
const PKCS8_LABEL: &str = "PRIVATE KEY";

/// Largest PEM text of a private key, in bytes.
const KEY_PEM_BYTES_MAX: usize = 16 * 1024;

enum Pair {
    Ecdsa(EcdsaKeyPair),
    Ed25519(Ed25519KeyPair),
    // Large, and rare.
    Rsa(Box<RsaKeyPair>),
}

impl Pair {
    /// The type is told by trying: a PKCS #8 key fits one at most.
    fn from_pkcs8(der: &[u8]) -> Option<Self> {
        let ecdsa = |algorithm: &'static EcdsaSigningAlgorithm| EcdsaKeyPair::from_pkcs8(algorithm, der).ok();
        ecdsa(&ECDSA_P256_SHA256_ASN1_SIGNING)
            .or_else(|| ecdsa(&ECDSA_P384_SHA384_ASN1_SIGNING))
            .map(Self::Ecdsa)
            .or_else(|| Ed25519KeyPair::from_pkcs8(der).ok().map(Self::Ed25519))
            .or_else(|| RsaKeyPair::from_pkcs8(der).ok().map(|pair| Self::Rsa(Box::new(pair))))
    }

    fn public_spki(&self) -> Option<PublicKeyX509Der<'static>> {
        match self {
            Self::Ecdsa(pair) => pair.public_key().as_der(),
            Self::Ed25519(pair) => pair.public_key().as_der(),
            Self::Rsa(pair) => pair.public_key().as_der(),
        }
        .ok()
    }
}

/// A key pair with its PKCS #8 encoding, which is wiped when dropped. Signs as
/// [`KeyAlgorithm::signature`] says.
pub(crate) struct KeyPair {
    pair: Pair,
    pkcs8: Zeroizing<Vec<u8>>,
    public: PublicKey,
}

impl KeyPair {
    /// Draws a key pair from aws-lc's generator.
    pub(crate) fn generate(algorithm: KeyAlgorithm) -> Result<Self, KeyError> {
        let random = SystemRandom::new();
        let ecdsa = |curve| {
            EcdsaKeyPair::generate_pkcs8(curve, &random).map(|der| Zeroizing::new(der.as_ref().to_vec()))
        };
        let pkcs8 = match algorithm {
            KeyAlgorithm::EcdsaP256 => ecdsa(&ECDSA_P256_SHA256_ASN1_SIGNING),
            KeyAlgorithm::EcdsaP384 => ecdsa(&ECDSA_P384_SHA384_ASN1_SIGNING),
            // Version 1 (RFC 5958 §2): OpenSSL 3.0 and Java 17 do not read the public key of version 2.
            KeyAlgorithm::Ed25519 => {
                Ed25519KeyPair::generate_pkcs8v1(&random).map(|der| Zeroizing::new(der.as_ref().to_vec()))
            }
            KeyAlgorithm::Rsa { bits } => {
                let size = match bits {
                    2048 => KeySize::Rsa2048,
                    3072 => KeySize::Rsa3072,
                    4096 => KeySize::Rsa4096,
                    other => return Err(KeyError::RsaGeneration(other)),
                };
                RsaKeyPair::generate(size).and_then(|pair| {
                    let der: Pkcs8V1Der<'_> = pair.as_der()?;
                    Ok(Zeroizing::new(der.as_ref().to_vec()))
                })
            }
        };
        Self::from_pkcs8_der(&pkcs8.map_err(|_| KeyError::Generate)?)
    }

    /// Reads a DER PKCS #8 key whose public half may be certified.
    pub(crate) fn from_pkcs8_der(pkcs8: &[u8]) -> Result<Self, KeyError> {
        let pair = Pair::from_pkcs8(pkcs8).ok_or(KeyError::PrivateKey)?;
        let spki = pair.public_spki().ok_or(KeyError::PrivateKey)?;
        let public = PublicKey::from_spki_der(spki.as_ref())?;
        Ok(Self { pair, pkcs8: Zeroizing::new(pkcs8.to_vec()), public })
    }

    pub(crate) fn public_key(&self) -> &PublicKey {
        &self.public
    }

    pub(crate) fn pkcs8_der(&self) -> &Zeroizing<Vec<u8>> {
        &self.pkcs8
    }

    /// The signature as it stands in a certificate: DER for ECDSA (RFC 5480 §4), plain octets otherwise.
    pub(crate) fn sign(&self, message: &[u8]) -> Option<Vec<u8>> {
        let random = SystemRandom::new();
        match &self.pair {
            Pair::Ecdsa(pair) => {
                pair.sign(&random, message).ok().map(|signature| signature.as_ref().to_vec())
            }
            Pair::Ed25519(pair) => pair.try_sign(message).ok().map(|signature| signature.as_ref().to_vec()),
            Pair::Rsa(pair) => {
                let mut signature = vec![0; pair.public_modulus_len()];
                pair.sign(&RSA_PKCS1_SHA256, &random, message, &mut signature).ok().map(|()| signature)
            }
        }
    }
}

/// The key pair of a leaf. It is born where it is used and never leaves the host; it cannot be printed.
pub struct LeafKey(KeyPair);

impl LeafKey {
    /// Draws a new ECDSA P-256 key pair from aws-lc's generator.
    pub fn generate() -> Result<Self, KeyError> {
        Self::generate_for(KeyAlgorithm::EcdsaP256)
    }

    /// Draws a new key pair of a type. RSA takes up to some seconds.
    ///
    /// # Errors
    /// [`KeyError::RsaGeneration`] for an RSA size other than 2048, 3072 and 4096.
    pub fn generate_for(algorithm: KeyAlgorithm) -> Result<Self, KeyError> {
        KeyPair::generate(algorithm).map(Self)
    }

    /// Reads a DER PKCS #8 key (RFC 5958) of any type that is certified.
    pub fn from_pkcs8_der(pkcs8: &[u8]) -> Result<Self, KeyError> {
        KeyPair::from_pkcs8_der(pkcs8).map(Self)
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
        let block = pem::Pem::new(PKCS8_LABEL, self.0.pkcs8.to_vec());
        let config = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
        let text = Zeroizing::new(pem::encode_config(&block, config));
        block.into_contents().zeroize();
        text
    }

    /// The DER PKCS #8 key.
    pub fn to_pkcs8_der(&self) -> Zeroizing<Vec<u8>> {
        self.0.pkcs8.clone()
    }

    /// The public half.
    pub fn public_key(&self) -> &PublicKey {
        &self.0.public
    }

    /// SHA-256 of the DER SubjectPublicKeyInfo.
    pub fn key_hash(&self) -> [u8; 32] {
        self.0.public.key_hash()
    }

    /// The key in rustls's form.
    pub fn to_rustls_der(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.0.pkcs8.to_vec()))
    }

    /// `chain` (leaf first) with this key, ready for a rustls certificate resolver.
    ///
    /// # Errors
    /// [`rustls::Error::InconsistentKeys`] if the leaf holds another key.
    pub fn certified(&self, chain: Vec<CertificateDer<'static>>) -> Result<CertifiedKey, rustls::Error> {
        let signing = rustls::crypto::aws_lc_rs::sign::any_supported_type(&self.to_rustls_der())?;
        let certified = CertifiedKey::new(chain, signing);
        certified.keys_match()?;
        Ok(certified)
    }
}

impl fmt::Debug for LeafKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LeafKey({:?})", self.0.public)
    }
}

impl rcgen::PublicKeyData for LeafKey {
    fn der_bytes(&self) -> &[u8] {
        self.0.public.der_bytes()
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        self.0.public.algorithm().signature()
    }
}

impl rcgen::SigningKey for LeafKey {
    fn sign(&self, msg: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        self.0.sign(msg).ok_or(rcgen::Error::RemoteKeyError)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_every_type_are_generated_read_back_and_sign() {
        for algorithm in
            KeyAlgorithm::GENERATED.into_iter().filter(|a| *a != KeyAlgorithm::Rsa { bits: 4096 })
        {
            let key = LeafKey::generate_for(algorithm).unwrap();
            assert_eq!(key.public_key().algorithm(), algorithm);
            let again = LeafKey::from_pkcs8_pem(&key.to_pkcs8_pem()).unwrap();
            assert_eq!(again.public_key(), key.public_key());
            // A CSR is verified by another program's code: x509-parser's.
            let csr = crate::Csr::parse(&crate::Csr::create(&again).unwrap()).unwrap().verify().unwrap();
            assert_eq!(csr.public_key(), key.public_key());
        }
        assert_eq!(
            LeafKey::generate_for(KeyAlgorithm::Rsa { bits: 2056 }).unwrap_err(),
            KeyError::RsaGeneration(2056)
        );
    }

    #[test]
    fn a_leaf_key_survives_pem_and_cannot_be_printed() {
        let key = LeafKey::generate().unwrap();
        let text = key.to_pkcs8_pem();
        assert!(text.starts_with("-----BEGIN PRIVATE KEY-----\n"));
        assert_eq!(LeafKey::from_pkcs8_pem(&text).unwrap().key_hash(), key.key_hash());
        let shown = format!("{key:?}");
        assert!(shown.starts_with("LeafKey(PublicKey("), "{shown}");
        assert!(!shown.contains(&hex::encode(&key.0.pkcs8[36..60])));
    }

    #[test]
    fn other_private_keys_are_refused() {
        assert_eq!(LeafKey::from_pkcs8_pem("").unwrap_err(), KeyError::PrivatePem);
        let p521 = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P521_SHA512).unwrap();
        assert_eq!(LeafKey::from_pkcs8_pem(&p521.serialize_pem()).unwrap_err(), KeyError::PrivateKey);
        let relabelled = LeafKey::generate().unwrap().to_pkcs8_pem().replace("PRIVATE KEY", "CERTIFICATE");
        assert_eq!(LeafKey::from_pkcs8_pem(&relabelled).unwrap_err(), KeyError::PrivatePem);
        let huge = RsaKeyPair::generate(KeySize::Rsa2048).unwrap();
        let der: Pkcs8V1Der<'_> = huge.as_der().unwrap();
        let mut cut = der.as_ref().to_vec();
        cut.pop();
        assert_eq!(LeafKey::from_pkcs8_der(&cut).unwrap_err(), KeyError::PrivateKey);
    }
}
