//! Certificate signing requests (PKCS #10, RFC 2986): proof that the asker holds a key, and what it asks for.

use std::net::IpAddr;

use der::asn1::{AnyRef, BitStringRef, ObjectIdentifier};
use der::{Decode as _, Reader as _, SliceReader, Tag, Tagged as _};
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::cri_attributes::ParsedCriAttribute;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::FromDer as _;
use x509_parser::x509::X509Version;

use crate::identity::{DnsName, NameError};
use crate::key::{KeyAlgorithm, KeyError, PublicKey};
use crate::private::LeafKey;

/// Largest CSR, in bytes, PEM or DER.
pub const CSR_BYTES_MAX: usize = 16 * 1024;

/// Most subject alternative names in one CSR.
pub const SANS_PER_CSR_MAX: usize = 64;

/// Longest URI or common name that is passed on, in bytes.
const NAME_TEXT_BYTES_MAX: usize = 256;

/// Labels a CSR has in PEM: RFC 7468 §7, and the older one that some tools still write.
const CSR_LABELS: [&str; 2] = ["CERTIFICATE REQUEST", "NEW CERTIFICATE REQUEST"];

/// Why a CSR is refused. In every case nothing has been signed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CsrError {
    #[error("CSR is {0} bytes long, at most {CSR_BYTES_MAX} are allowed")]
    TooLarge(usize),
    #[error("CSR is neither DER nor one PEM block of a certificate request")]
    Malformed,
    #[error("CSR's version is not 1")]
    Version,
    #[error("CSR's key is not taken")]
    Key(#[source] KeyError),
    #[error("CSR's signature algorithm is weak, or does not fit its key")]
    SignatureAlgorithm,
    #[error("CSR is not signed by the key it holds")]
    Signature,
    #[error("CSR asks to be a CA")]
    AsksForCa,
    #[error("CSR asks for a key usage that no leaf has")]
    KeyUsage,
    #[error("CSR asks for an extended key usage other than TLS server and client")]
    ExtendedKeyUsage,
    #[error("CSR asks for extension {0}")]
    Extension(String),
    #[error("CSR holds one extension or extension request twice")]
    Duplicate,
    #[error("CSR asks for more than {SANS_PER_CSR_MAX} names")]
    TooManyNames,
    #[error("CSR asks for a name that is no DNS name, IP address or URI")]
    NameType,
    #[error("CSR asks for name {name:?}")]
    Name {
        name: String,
        #[source]
        source: NameError,
    },
    #[error("CSR asks for an IP address of {0} octets")]
    IpLength(usize),
    #[error("CSR's common name is malformed, or longer than {NAME_TEXT_BYTES_MAX} bytes")]
    CommonName,
    #[error("CSR asks for a URI that is malformed, or longer than {NAME_TEXT_BYTES_MAX} bytes")]
    Uri,
    #[error("CSR cannot be made")]
    Create,
}

/// What a CSR asks to be named. Nothing of it reaches a certificate by itself: names come from the identity
/// record, and a caller compares or refuses what stands here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RequestedNames {
    /// Common name of the subject.
    pub common_name: Option<String>,
    /// DNS names, folded to lower case.
    pub dns: Vec<DnsName>,
    pub ips: Vec<IpAddr>,
    /// URIs as they stand; a SPIFFE ID here is a claim, never a proof.
    pub uris: Vec<String>,
}

impl RequestedNames {
    /// Whether the CSR asks for no name at all.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// A CSR of bearable size whose structure can be read; nothing about it is proved.
#[derive(Debug, Clone)]
pub struct Csr {
    der: Vec<u8>,
}

impl Csr {
    /// Takes DER, or one PEM block.
    ///
    /// # Errors
    /// [`CsrError::TooLarge`] past [`CSR_BYTES_MAX`], before anything is read; [`CsrError::Malformed`] for trailing
    /// bytes, several blocks, or another label.
    pub fn parse(der_or_pem: &[u8]) -> Result<Self, CsrError> {
        if der_or_pem.len() > CSR_BYTES_MAX {
            return Err(CsrError::TooLarge(der_or_pem.len()));
        }
        // A DER CSR begins with SEQUENCE, which is '0' and never the start of a PEM block.
        let der =
            if der_or_pem.first() == Some(&0x30) { der_or_pem.to_vec() } else { one_pem_block(der_or_pem)? };
        parse_der(&der)?;
        Ok(Self { der })
    }

    /// Checks the CSR's own signature, its key, and that it asks for nothing a leaf cannot have.
    ///
    /// Refused: CA:TRUE, keyCertSign, cRLSign, extended key usages other than serverAuth and clientAuth (so also
    /// anyExtendedKeyUsage), every extension but subjectAltName, keyUsage, extendedKeyUsage, basicConstraints and
    /// subjectKeyIdentifier, and names that no certificate of ours could hold. Ignored: key usages and extended key
    /// usages a leaf may have (the profile decides), and attributes other than the extension request.
    pub fn verify(self) -> Result<VerifiedCsr, CsrError> {
        let csr = parse_der(&self.der)?;
        let info = &csr.certification_request_info;
        if info.version != X509Version(0) {
            return Err(CsrError::Version);
        }
        let key = PublicKey::from_spki_der(info.subject_pki.raw).map_err(CsrError::Key)?;
        check_signature(&csr, key.algorithm())?;
        let mut names = RequestedNames { common_name: common_name(&csr)?, ..RequestedNames::default() };
        read_extensions(&csr, &mut names)?;
        Ok(VerifiedCsr { key, names })
    }

    /// Makes a CSR for `key` that asks for nothing: the authority knows the names. DER.
    pub fn create(key: &LeafKey) -> Result<Vec<u8>, CsrError> {
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        let csr = params.serialize_request(key).map_err(|_| CsrError::Create)?;
        Ok(csr.der().to_vec())
    }

    /// The CSR's DER.
    pub fn der(&self) -> &[u8] {
        &self.der
    }
}

/// A CSR whose signature proves that its maker holds the key. Only [`Csr::verify`] makes one.
#[derive(Debug, Clone)]
pub struct VerifiedCsr {
    key: PublicKey,
    names: RequestedNames,
}

impl VerifiedCsr {
    /// The key.
    pub fn public_key(&self) -> &PublicKey {
        &self.key
    }

    /// The key's DER SubjectPublicKeyInfo.
    pub fn spki_der(&self) -> &[u8] {
        self.key.spki_der()
    }

    /// SHA-256 of [`spki_der`](Self::spki_der).
    pub fn key_hash(&self) -> [u8; 32] {
        self.key.key_hash()
    }

    /// The names the CSR asks for.
    pub fn requested_names(&self) -> &RequestedNames {
        &self.names
    }
}

fn one_pem_block(text: &[u8]) -> Result<Vec<u8>, CsrError> {
    let mut blocks = pem::parse_many(text).map_err(|_| CsrError::Malformed)?;
    match (blocks.pop(), blocks.is_empty()) {
        (Some(block), true) if CSR_LABELS.contains(&block.tag()) => Ok(block.into_contents()),
        _ => Err(CsrError::Malformed),
    }
}

fn parse_der(der: &[u8]) -> Result<X509CertificationRequest<'_>, CsrError> {
    envelope_is_strict(der).map_err(|_| CsrError::Malformed)?;
    match X509CertificationRequest::from_der(der) {
        Ok(([], csr)) => Ok(csr),
        _ => Err(CsrError::Malformed),
    }
}

/// Reads the unsigned envelope as strict DER: x509-parser is lax about tags there, and no signature covers it.
/// `SEQUENCE { SEQUENCE, SEQUENCE { OID, parameters OPTIONAL }, BIT STRING }`, RFC 2986 §4.2.
fn envelope_is_strict(bytes: &[u8]) -> der::Result<()> {
    let mut reader = SliceReader::new(bytes)?;
    reader.sequence(|outer| {
        AnyRef::decode(outer)?.tag().assert_eq(Tag::Sequence)?;
        outer.sequence(|algorithm| {
            ObjectIdentifier::decode(algorithm)?;
            Option::<AnyRef<'_>>::decode(algorithm).map(drop)
        })?;
        BitStringRef::decode(outer).map(drop)
    })?;
    reader.finish(())
}

fn check_signature(csr: &X509CertificationRequest<'_>, key: KeyAlgorithm) -> Result<(), CsrError> {
    let oid = csr.signature_algorithm.algorithm.to_id_string();
    let fits = match oid.as_str() {
        // ecdsa-with-SHA256, ecdsa-with-SHA384 (RFC 5758 §3.2).
        "1.2.840.10045.4.3.2" | "1.2.840.10045.4.3.3" => {
            matches!(key, KeyAlgorithm::EcdsaP256 | KeyAlgorithm::EcdsaP384)
        }
        // id-Ed25519 (RFC 8410 §3).
        "1.3.101.112" => key == KeyAlgorithm::Ed25519,
        // sha256, sha384 and sha512WithRSAEncryption, RSASSA-PSS (RFC 4055 §5 and §3.1).
        "1.2.840.113549.1.1.11"
        | "1.2.840.113549.1.1.12"
        | "1.2.840.113549.1.1.13"
        | "1.2.840.113549.1.1.10" => matches!(key, KeyAlgorithm::Rsa { .. }),
        _ => false,
    };
    if !fits || csr.signature_value.unused_bits != 0 {
        return Err(CsrError::SignatureAlgorithm);
    }
    csr.verify_signature().map_err(|_| CsrError::Signature)
}

fn common_name(csr: &X509CertificationRequest<'_>) -> Result<Option<String>, CsrError> {
    let mut names = csr.certification_request_info.subject.iter_common_name();
    let Some(name) = names.next() else { return Ok(None) };
    let text = name.as_str().map_err(|_| CsrError::CommonName)?;
    if names.next().is_some() || text.len() > NAME_TEXT_BYTES_MAX || text.chars().any(char::is_control) {
        return Err(CsrError::CommonName);
    }
    Ok(Some(text.to_owned()))
}

fn read_extensions(csr: &X509CertificationRequest<'_>, names: &mut RequestedNames) -> Result<(), CsrError> {
    let mut requests =
        csr.certification_request_info.iter_attributes().filter_map(|attribute| {
            match attribute.parsed_attribute() {
                ParsedCriAttribute::ExtensionRequest(request) => Some(request),
                _ => None,
            }
        });
    let Some(request) = requests.next() else { return Ok(()) };
    if requests.next().is_some() {
        return Err(CsrError::Duplicate);
    }
    for (index, extension) in request.extensions.iter().enumerate() {
        if request.extensions[..index].iter().any(|other| other.oid == extension.oid) {
            return Err(CsrError::Duplicate);
        }
        read_extension(extension.parsed_extension(), names).map_err(|refusal| {
            refusal.unwrap_or_else(|| CsrError::Extension(extension.oid.to_id_string()))
        })?;
    }
    Ok(())
}

/// `None` as an error means that the extension as such is not taken.
fn read_extension(
    extension: &ParsedExtension<'_>,
    names: &mut RequestedNames,
) -> Result<(), Option<CsrError>> {
    match extension {
        ParsedExtension::BasicConstraints(constraints) if constraints.ca => Err(Some(CsrError::AsksForCa)),
        ParsedExtension::BasicConstraints(_) | ParsedExtension::SubjectKeyIdentifier(_) => Ok(()),
        ParsedExtension::KeyUsage(usage) if usage.key_cert_sign() || usage.crl_sign() => {
            Err(Some(CsrError::KeyUsage))
        }
        ParsedExtension::KeyUsage(_) => Ok(()),
        ParsedExtension::ExtendedKeyUsage(usage) => {
            let foreign = usage.any
                || usage.code_signing
                || usage.email_protection
                || usage.time_stamping
                || usage.ocsp_signing
                || !usage.other.is_empty();
            if foreign { Err(Some(CsrError::ExtendedKeyUsage)) } else { Ok(()) }
        }
        ParsedExtension::SubjectAlternativeName(san) => {
            if san.general_names.len() > SANS_PER_CSR_MAX {
                return Err(Some(CsrError::TooManyNames));
            }
            san.general_names.iter().try_for_each(|name| read_name(name, names)).map_err(Some)
        }
        _ => Err(None),
    }
}

fn read_name(name: &GeneralName<'_>, names: &mut RequestedNames) -> Result<(), CsrError> {
    match name {
        GeneralName::DNSName(text) => {
            let dns = DnsName::parse(&text.to_ascii_lowercase()).map_err(|source| CsrError::Name {
                // The name goes into a message: cut it, as it may be the size of the CSR.
                name: text.chars().take(NAME_TEXT_BYTES_MAX).collect(),
                source,
            })?;
            names.dns.push(dns);
        }
        GeneralName::IPAddress(octets) => names.ips.push(ip_from_octets(octets)?),
        GeneralName::URI(text) => {
            if text.len() > NAME_TEXT_BYTES_MAX || !text.bytes().all(|b| b.is_ascii_graphic()) {
                return Err(CsrError::Uri);
            }
            names.uris.push((*text).to_owned());
        }
        _ => return Err(CsrError::NameType),
    }
    Ok(())
}

fn ip_from_octets(octets: &[u8]) -> Result<IpAddr, CsrError> {
    crate::leaf::ip_from_octets(octets).ok_or(CsrError::IpLength(octets.len()))
}
