//! Taking over a CA that was made elsewhere: its certificate and key from PEM, PKCS #8 or PKCS #12, and every reason not to.

use std::fmt;

use aws_lc_rs::encoding::{AsDer as _, Pkcs8V1Der};
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P384_SHA384_ASN1_SIGNING, EcdsaKeyPair, RsaKeyPair,
};
use rustls_pki_types::CertificateDer;
use time::UtcDateTime;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::x509::X509Version;
use zeroize::Zeroizing;

use crate::asn1::parts;
use crate::instant::from_asn1;
use crate::issue::blank_issuer;
use crate::key::{KeyError, PublicKey};
use crate::leaf::{KeyIdentifier, parse_certificate, read_extensions};
use crate::lint::CERT_BYTES_MAX;
use crate::pkcs12::{PKCS12_BYTES_MAX, Pkcs12Error, decrypt_pkcs8, read_pkcs12};
use crate::private::KeyPair;

/// Version, algorithm, key, attributes, public key (RFC 5958 §2).
const PKCS8_FIELDS_MAX: usize = 5;

/// Why a CA is not taken over.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ImportError {
    #[error("file is larger than {PKCS12_BYTES_MAX} bytes")]
    TooLarge,
    #[error("file holds no certificate")]
    NoCertificate,
    #[error("file holds {0} private keys, not one")]
    Keys(usize),
    #[error("file is neither PEM nor PKCS #12")]
    Malformed,
    #[error("file holds a block {0:?}, which is not taken")]
    Label(String),
    #[error("private key is encrypted, a password is needed")]
    PasswordNeeded,
    #[error("private key is encrypted in PEM's old way; convert it with `openssl pkcs8 -topk8`")]
    OldEncryption,
    #[error("file cannot be opened")]
    Pkcs12(#[source] Pkcs12Error),
    #[error("private key is not taken")]
    Key(#[source] KeyError),
    #[error("private key belongs to none of the certificates")]
    OtherKey,
    #[error("certificate is malformed, larger than {CERT_BYTES_MAX} bytes, or not version 3")]
    Certificate,
    #[error("certificate is not a CA's (RFC 5280 §4.2.1.9)")]
    NotCa,
    #[error("basicConstraints are not critical (RFC 5280 §4.2.1.9)")]
    ConstraintsNotCritical,
    #[error("certificate has no keyUsage, or a non-critical one (RFC 5280 §4.2.1.3)")]
    KeyUsage,
    #[error("keyUsage lacks keyCertSign")]
    KeyCertSign,
    #[error("keyUsage lacks cRLSign: this CA could not revoke")]
    CrlSign,
    #[error("certificate has no subjectKeyIdentifier (RFC 5280 §4.2.1.2)")]
    NoSubjectKeyId,
    #[error("authorityKeyIdentifier is missing or is not its issuer's key identifier (RFC 5280 §4.2.1.1)")]
    AuthorityKeyId,
    #[error("subject is empty (RFC 5280 §4.1.2.6)")]
    EmptySubject,
    #[error("subject cannot be reproduced byte for byte in what this CA would sign (RFC 5280 §4.1.2.4)")]
    Subject,
    #[error("certificate's own key is not taken")]
    PublicKey(#[source] KeyError),
    #[error("root's signature does not verify with its own key")]
    SelfSignature,
    #[error("certificate is signed with a weak algorithm ({0})")]
    WeakSignature(String),
    #[error("certificate is not signed by the issuer that came with it")]
    IssuerSignature,
    #[error("chain does not end in a self-signed root")]
    NoRoot,
    #[error("path length of the root leaves no room for an issuing CA")]
    PathLength,
    #[error(
        "extendedKeyUsage lacks TLS server or client, so no leaf below could be used for it (checklist 12)"
    )]
    ExtendedKeyUsage,
    #[error("name constraints hold a URI or directory name, which rustls and others refuse")]
    NameConstraints,
    #[error("critical extension {0} is not known to every verifier")]
    CriticalExtension(String),
    #[error("an extension is there twice, or cannot be read")]
    Extensions,
    #[error("certificate ended at {0}")]
    Expired(UtcDateTime),
    #[error("certificate is not valid before {0}")]
    NotYetValid(UtcDateTime),
}

/// A CA whose certificate and key were found fit. The key cannot be printed.
pub struct ImportedCa {
    /// PKCS #8 DER, to be sealed.
    pub pkcs8: Zeroizing<Vec<u8>>,
    /// The CA's own certificate.
    pub certificate: CertificateDer<'static>,
    /// Its issuers up to and including the root; empty for a root.
    pub issuers: Vec<CertificateDer<'static>>,
    /// subjectKeyIdentifier.
    pub key_identifier: KeyIdentifier,
    /// SHA-256 of the DER SubjectPublicKeyInfo.
    pub key_hash: [u8; 32],
    pub not_after: UtcDateTime,
}

impl ImportedCa {
    /// Whether it is a root.
    pub fn is_root(&self) -> bool {
        self.issuers.is_empty()
    }
}

impl fmt::Debug for ImportedCa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ImportedCa")
            .field("key_identifier", &self.key_identifier)
            .field("root", &self.is_root())
            .finish_non_exhaustive()
    }
}

/// Reads a CA from `files`, each PEM (certificates, a key in PKCS #8, encrypted or not, or in the forms `EC PRIVATE KEY` and
/// `RSA PRIVATE KEY`) or PKCS #12, and checks all that strict verifiers demand of it at the time `now`.
///
/// An intermediate needs its issuers up to the root in the files.
pub fn import_ca(
    files: &[&[u8]],
    password: Option<&str>,
    now: UtcDateTime,
) -> Result<ImportedCa, ImportError> {
    let (mut keys, mut certificates) = (Vec::new(), Vec::new());
    for file in files {
        if file.len() > PKCS12_BYTES_MAX {
            return Err(ImportError::TooLarge);
        }
        read_file(file, password, &mut keys, &mut certificates)?;
    }
    let [pkcs8] = <[_; 1]>::try_from(keys).map_err(|keys: Vec<_>| ImportError::Keys(keys.len()))?;
    if certificates.is_empty() {
        return Err(ImportError::NoCertificate);
    }
    let key = KeyPair::from_pkcs8_der(&pkcs8).map_err(ImportError::Key)?;
    let own = certificates.iter().position(|der| {
        parse_certificate(der).is_some_and(|parsed| parsed.public_key().raw == key.public_key().spki_der())
    });
    let certificate = certificates.swap_remove(own.ok_or(ImportError::OtherKey)?);
    check_ca(&certificate, now)?;
    let issuers = chain_to_root(&certificate, &certificates, now)?;
    let parsed = parse_certificate(&certificate).ok_or(ImportError::Certificate)?;
    let extensions = read_extensions(&parsed).map_err(|_| ImportError::Extensions)?;
    if issuers.is_empty() && extensions.path_len == Some(0) {
        return Err(ImportError::PathLength);
    }
    Ok(ImportedCa {
        key_identifier: extensions.subject_key_id.ok_or(ImportError::NoSubjectKeyId)?,
        key_hash: key.public_key().key_hash(),
        not_after: from_asn1(parsed.validity().not_after),
        pkcs8,
        issuers,
        certificate: certificate.clone(),
    })
}

fn read_file(
    file: &[u8],
    password: Option<&str>,
    keys: &mut Vec<Zeroizing<Vec<u8>>>,
    certificates: &mut Vec<CertificateDer<'static>>,
) -> Result<(), ImportError> {
    // DER begins with SEQUENCE, which is '0' and never the start of a PEM file.
    if file.first() == Some(&0x30) {
        let contents =
            read_pkcs12(file, password.ok_or(ImportError::PasswordNeeded)?).map_err(ImportError::Pkcs12)?;
        keys.push(contents.pkcs8);
        certificates.extend(contents.certificates);
        return Ok(());
    }
    let blocks = pem::parse_many(file).map_err(|_| ImportError::Malformed)?;
    if blocks.is_empty() {
        return Err(ImportError::Malformed);
    }
    for block in blocks {
        if block.headers().get("DEK-Info").is_some() {
            return Err(ImportError::OldEncryption);
        }
        let label = block.tag().to_owned();
        let body = Zeroizing::new(block.into_contents());
        match label.as_str() {
            "CERTIFICATE" => certificates.push(CertificateDer::from(body.to_vec())),
            "PRIVATE KEY" => keys.push(body),
            "ENCRYPTED PRIVATE KEY" => {
                let password = password.ok_or(ImportError::PasswordNeeded)?;
                let opened = decrypt_pkcs8(&body, password.as_bytes()).map_err(ImportError::Pkcs12)?;
                // Padding of a wrong password's nonsense is right once in 256 times.
                if parts(&opened, PKCS8_FIELDS_MAX).is_err() {
                    return Err(ImportError::Pkcs12(Pkcs12Error::WrongPassword));
                }
                keys.push(opened);
            }
            "EC PRIVATE KEY" => keys.push(ec_to_pkcs8(&body)?),
            "RSA PRIVATE KEY" => keys.push(rsa_to_pkcs8(&body)?),
            // OpenSSL writes the curve beside an EC key; the key itself names it again.
            "EC PARAMETERS" => {}
            _ => return Err(ImportError::Label(label)),
        }
    }
    Ok(())
}

/// From SEC 1 (RFC 5915).
fn ec_to_pkcs8(der: &[u8]) -> Result<Zeroizing<Vec<u8>>, ImportError> {
    [&ECDSA_P256_SHA256_ASN1_SIGNING, &ECDSA_P384_SHA384_ASN1_SIGNING]
        .into_iter()
        .find_map(|curve| EcdsaKeyPair::from_private_key_der(curve, der).ok())
        .and_then(|pair| pair.to_pkcs8v1().ok())
        .map(|document| Zeroizing::new(document.as_ref().to_vec()))
        .ok_or(ImportError::Key(KeyError::PrivateKey))
}

/// From PKCS #1 (RFC 8017 §A.1.2).
fn rsa_to_pkcs8(der: &[u8]) -> Result<Zeroizing<Vec<u8>>, ImportError> {
    let pair = RsaKeyPair::from_der(der).map_err(|_| ImportError::Key(KeyError::PrivateKey))?;
    let document: Pkcs8V1Der<'_> = pair.as_der().map_err(|_| ImportError::Key(KeyError::PrivateKey))?;
    Ok(Zeroizing::new(document.as_ref().to_vec()))
}

/// Whether a CA certificate is one that strict verifiers take, apart from its issuer's signature, and whether its subject
/// would stand byte for byte as the issuer of what it signs here.
pub fn check_ca(der: &[u8], now: UtcDateTime) -> Result<(), ImportError> {
    check_fit(der, now)?;
    let certificate = parse_certificate(der).ok_or(ImportError::Certificate)?;
    let public = PublicKey::from_spki_der(certificate.public_key().raw).map_err(ImportError::PublicKey)?;
    blank_issuer(der, &public).map(drop).map_err(|_| ImportError::Subject)
}

/// What is asked of a CA that signs elsewhere, too.
fn check_fit(der: &[u8], now: UtcDateTime) -> Result<(), ImportError> {
    if der.len() > CERT_BYTES_MAX {
        return Err(ImportError::Certificate);
    }
    let certificate = parse_certificate(der).ok_or(ImportError::Certificate)?;
    if certificate.version() != X509Version::V3
        || certificate.signature_algorithm != certificate.tbs_certificate.signature
    {
        return Err(ImportError::Certificate);
    }
    PublicKey::from_spki_der(certificate.public_key().raw).map_err(ImportError::PublicKey)?;
    check_ca_extensions(&certificate)?;
    if certificate.subject().iter().next().is_none() {
        return Err(ImportError::EmptySubject);
    }
    let algorithm = certificate.signature_algorithm.algorithm.to_id_string();
    // SHA-1 and MD5 with RSA, SHA-1 with ECDSA.
    let weak = ["1.2.840.113549.1.1.4", "1.2.840.113549.1.1.5", "1.2.840.10045.4.1"];
    if weak.contains(&algorithm.as_str()) {
        return Err(ImportError::WeakSignature(algorithm));
    }
    let (begin, end) =
        (from_asn1(certificate.validity().not_before), from_asn1(certificate.validity().not_after));
    if now < begin {
        return Err(ImportError::NotYetValid(begin));
    }
    if now > end {
        return Err(ImportError::Expired(end));
    }
    Ok(())
}

fn check_ca_extensions(certificate: &X509Certificate<'_>) -> Result<(), ImportError> {
    let constrained = certificate.extensions().iter().any(|extension| {
        matches!(extension.parsed_extension(), ParsedExtension::NameConstraints(constraints)
            if constraints.permitted_subtrees.iter().chain(&constraints.excluded_subtrees).flatten()
                .any(|tree| matches!(tree.base, GeneralName::URI(_) | GeneralName::DirectoryName(_))))
    });
    if constrained {
        return Err(ImportError::NameConstraints);
    }
    let extensions = read_extensions(certificate).map_err(|_| ImportError::Extensions)?;
    let critical =
        |oid: &str| certificate.extensions().iter().find(|e| e.oid.to_id_string() == oid).map(|e| e.critical);
    if !extensions.is_ca {
        return Err(ImportError::NotCa);
    }
    if critical("2.5.29.19") != Some(true) {
        return Err(ImportError::ConstraintsNotCritical);
    }
    if critical("2.5.29.15") != Some(true) {
        return Err(ImportError::KeyUsage);
    }
    if !extensions.key_cert_sign {
        return Err(ImportError::KeyCertSign);
    }
    if !extensions.crl_sign {
        return Err(ImportError::CrlSign);
    }
    if extensions.subject_key_id.is_none() {
        return Err(ImportError::NoSubjectKeyId);
    }
    if critical("2.5.29.37").is_some() && !(extensions.server_auth && extensions.client_auth) {
        return Err(ImportError::ExtendedKeyUsage);
    }
    let known = ["2.5.29.15", "2.5.29.19", "2.5.29.30", "2.5.29.37"];
    let foreign = certificate
        .extensions()
        .iter()
        .find(|e| e.critical && !known.contains(&e.oid.to_id_string().as_str()));
    match foreign {
        Some(extension) => Err(ImportError::CriticalExtension(extension.oid.to_id_string())),
        None => Ok(()),
    }
}

/// The issuers of `certificate` among `others`, each verified, up to a self-signed root.
fn chain_to_root(
    certificate: &CertificateDer<'static>,
    others: &[CertificateDer<'static>],
    now: UtcDateTime,
) -> Result<Vec<CertificateDer<'static>>, ImportError> {
    let mut chain: Vec<CertificateDer<'static>> = Vec::new();
    let mut current = certificate.clone();
    loop {
        let child = parse_certificate(&current).ok_or(ImportError::Certificate)?;
        let wanted = read_extensions(&child).map_err(|_| ImportError::Extensions)?.authority_key_id;
        if child.issuer().as_raw() == child.subject().as_raw() {
            child.verify_signature(None).map_err(|_| ImportError::SelfSignature)?;
            return Ok(chain);
        }
        if chain.len() == crate::chain::CHAIN_LENGTH_MAX {
            return Err(ImportError::NoRoot);
        }
        let issuer = others.iter().find(|der| {
            parse_certificate(der).is_some_and(|issuer| issuer.subject().as_raw() == child.issuer().as_raw())
        });
        let issuer = issuer.ok_or(ImportError::NoRoot)?;
        check_fit(issuer, now)?;
        let parent = parse_certificate(issuer).ok_or(ImportError::Certificate)?;
        let identifier = read_extensions(&parent).map_err(|_| ImportError::Extensions)?.subject_key_id;
        if wanted.is_none() || wanted != identifier {
            return Err(ImportError::AuthorityKeyId);
        }
        child.verify_signature(Some(parent.public_key())).map_err(|_| ImportError::IssuerSignature)?;
        chain.push(issuer.clone());
        current = issuer.clone();
    }
}
