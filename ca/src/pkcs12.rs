//! PKCS #12 files (RFC 7292): one key with its chain, as Java, Windows and OpenSSL take and give it.
//!
//! Written with PBES2 (PBKDF2 with HMAC-SHA-256, AES-256-CBC) and an HMAC-SHA-256 MAC, which OpenSSL since 1.1 and Java since
//! 11.0.12 read. Read with PBES2 only: the older RC2 and 3DES forms protect nothing, and their maker can export anew.

use aws_lc_rs::hmac;
use der::asn1::{BmpString, ObjectIdentifier, OctetStringRef};
use der::{Decode as _, Encode as _, Tag};
use pkcs5::EncryptionScheme;
use pkcs5::pbes2;
use rustls_pki_types::CertificateDer;
use zeroize::Zeroizing;

use crate::asn1::{CONTEXT_0, content, elements, oid, parts, sequence, wrap};

/// Largest PKCS #12 file, in bytes.
pub const PKCS12_BYTES_MAX: usize = 256 * 1024;

/// PBKDF2 and MAC rounds of what is written: NIST SP 800-132 leaves the number open; OWASP's floor for PBKDF2 with
/// HMAC-SHA-256 is 600,000, which both Java and OpenSSL take.
const ROUNDS_WRITTEN: u32 = 600_000;

/// Most rounds that are read, so that a planted file cannot take a core for hours.
const ROUNDS_MAX: u32 = 10_000_000;

/// Most elements of any list in a file.
const ELEMENTS_MAX: usize = 64;

const ID_DATA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.7.1");
const ID_ENCRYPTED_DATA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.7.6");
const ID_KEY_BAG: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.12.10.1.1");
const ID_SHROUDED_KEY_BAG: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.12.10.1.2");
const ID_CERT_BAG: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.12.10.1.3");
const ID_X509: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.9.22.1");
const ID_FRIENDLY_NAME: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.9.20");
const ID_LOCAL_KEY_ID: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.9.21");
const ID_SHA256: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.16.840.1.101.3.4.2.1");

/// Why a PKCS #12 file is not written or read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Pkcs12Error {
    #[error("PKCS #12 file is larger than {PKCS12_BYTES_MAX} bytes")]
    TooLarge,
    #[error("password is empty")]
    EmptyPassword,
    #[error("password or name has a character outside the basic multilingual plane")]
    Text,
    #[error("PKCS #12 file is malformed")]
    Malformed,
    #[error("PKCS #12 file is protected with an old algorithm; export it anew with AES-256 and SHA-256")]
    OldAlgorithm,
    #[error("PKCS #12 file asks for {0} rounds of key derivation, at most {ROUNDS_MAX} are allowed")]
    Rounds(u32),
    #[error("wrong password, or the file was changed")]
    WrongPassword,
    #[error("PKCS #12 file holds {0} private keys, not one")]
    Keys(usize),
    #[error("PKCS #12 file holds no certificate")]
    NoCertificate,
    #[error("PKCS #12 file cannot be encoded")]
    Encode,
}

/// What a PKCS #12 file holds. The key cannot be printed.
pub struct Pkcs12Contents {
    /// PKCS #8 DER.
    pub pkcs8: Zeroizing<Vec<u8>>,
    /// In the order of the file.
    pub certificates: Vec<CertificateDer<'static>>,
}

impl std::fmt::Debug for Pkcs12Contents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pkcs12Contents")
            .field("certificates", &self.certificates.len())
            .finish_non_exhaustive()
    }
}

/// Writes a key and its chain (leaf first) under `password`; `name` is what Java calls the alias.
///
/// Blocks for about 0.3 s, as the derivation asks.
pub fn write_pkcs12(
    name: &str,
    pkcs8: &[u8],
    chain: &[CertificateDer<'_>],
    password: &str,
    rng: &mut dyn FnMut(&mut [u8]),
) -> Result<Zeroizing<Vec<u8>>, Pkcs12Error> {
    if password.is_empty() {
        return Err(Pkcs12Error::EmptyPassword);
    }
    let leaf = chain.first().ok_or(Pkcs12Error::NoCertificate)?;
    let friendly = BmpString::from_utf8(name).map_err(|_| Pkcs12Error::Text)?;
    BmpString::from_utf8(password).map_err(|_| Pkcs12Error::Text)?;
    let local_key = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, leaf);
    let build = |rng: &mut dyn FnMut(&mut [u8])| -> Result<Zeroizing<Vec<u8>>, Pkcs12Error> {
        let encode = |_: der::Error| Pkcs12Error::Encode;
        let attributes = attributes(&friendly, local_key.as_ref()).map_err(encode)?;
        let mut certificates = Vec::new();
        for (index, certificate) in chain.iter().enumerate() {
            let attributes = if index == 0 { attributes.as_slice() } else { &[] };
            certificates.extend(cert_bag(certificate, attributes).map_err(encode)?);
        }
        let certificates = wrap(Tag::Sequence, &certificates).map_err(encode)?;
        let (scheme, ciphertext) = encrypt(&certificates, password, rng)?;
        let encrypted = encrypted_data(&scheme, &ciphertext).map_err(encode)?;
        let (scheme, ciphertext) = encrypt(pkcs8, password, rng)?;
        let keys = key_bag(&scheme, &ciphertext, &attributes).map_err(encode)?;
        let safe = sequence(&[&encrypted, &keys]).map_err(encode)?;
        let mut salt = [0; 16];
        rng(&mut salt);
        let mac = mac(password, &salt, ROUNDS_WRITTEN, &safe)?;
        file(&safe, &salt, &mac).map(Zeroizing::new).map_err(encode)
    };
    build(rng)
}

/// Reads a file with one key and at least one certificate.
pub fn read_pkcs12(bytes: &[u8], password: &str) -> Result<Pkcs12Contents, Pkcs12Error> {
    if bytes.len() > PKCS12_BYTES_MAX {
        return Err(Pkcs12Error::TooLarge);
    }
    let safe = verified_safe(bytes, password)?;
    let malformed = |_: der::Error| Pkcs12Error::Malformed;
    let (mut keys, mut certificates) = (Vec::new(), Vec::new());
    for info in parts(&safe, ELEMENTS_MAX).map_err(malformed)? {
        let contents = safe_contents(info, password)?;
        for bag in parts(&contents, ELEMENTS_MAX).map_err(malformed)? {
            let fields = parts(bag, 3).map_err(malformed)?;
            let [id, value, ..] = fields.as_slice() else { return Err(Pkcs12Error::Malformed) };
            let value = content(value, CONTEXT_0).map_err(malformed)?;
            match oid(id).map_err(malformed)? {
                ID_KEY_BAG => keys.push(Zeroizing::new(value.to_vec())),
                ID_SHROUDED_KEY_BAG => keys.push(decrypt_pkcs8(value, password.as_bytes())?),
                ID_CERT_BAG => certificates.extend(read_cert_bag(value).map_err(malformed)?),
                _ => {}
            }
        }
    }
    if certificates.is_empty() {
        return Err(Pkcs12Error::NoCertificate);
    }
    let [pkcs8] = <[_; 1]>::try_from(keys).map_err(|keys: Vec<_>| Pkcs12Error::Keys(keys.len()))?;
    Ok(Pkcs12Contents { pkcs8, certificates })
}

/// Opens an EncryptedPrivateKeyInfo (RFC 5958 §3): PBES2 with PBKDF2 or scrypt.
pub(crate) fn decrypt_pkcs8(der: &[u8], password: &[u8]) -> Result<Zeroizing<Vec<u8>>, Pkcs12Error> {
    let fields = parts(der, 2).map_err(|_| Pkcs12Error::Malformed)?;
    let [algorithm, data] = fields.as_slice() else { return Err(Pkcs12Error::Malformed) };
    let data = OctetStringRef::from_der(data).map_err(|_| Pkcs12Error::Malformed)?;
    decrypt(algorithm, data.as_bytes(), password)
}

fn attributes(friendly: &BmpString, local_key: &[u8]) -> der::Result<Vec<u8>> {
    let attribute =
        |id: ObjectIdentifier, value: Vec<u8>| sequence(&[&id.to_der()?, &wrap(Tag::Set, &value)?]);
    let mut both = [
        attribute(ID_FRIENDLY_NAME, friendly.to_der()?)?,
        attribute(ID_LOCAL_KEY_ID, OctetStringRef::new(local_key)?.to_der()?)?,
    ];
    // The elements of a set are sorted by their encoding (X.690 §11.6).
    both.sort();
    wrap(Tag::Set, &both.concat())
}

fn cert_bag(certificate: &[u8], attributes: &[u8]) -> der::Result<Vec<u8>> {
    let der = wrap(CONTEXT_0, &OctetStringRef::new(certificate)?.to_der()?)?;
    let bag = sequence(&[&ID_X509.to_der()?, &der])?;
    sequence(&[&ID_CERT_BAG.to_der()?, &wrap(CONTEXT_0, &bag)?, attributes])
}

/// A ContentInfo `data` with the one shrouded key.
fn key_bag(scheme: &[u8], ciphertext: &[u8], attributes: &[u8]) -> der::Result<Vec<u8>> {
    let shrouded = sequence(&[scheme, &OctetStringRef::new(ciphertext)?.to_der()?])?;
    let bag = sequence(&[&ID_SHROUDED_KEY_BAG.to_der()?, &wrap(CONTEXT_0, &shrouded)?, attributes])?;
    data(&sequence(&[&bag])?)
}

/// A ContentInfo `data` around `inner`.
fn data(inner: &[u8]) -> der::Result<Vec<u8>> {
    sequence(&[&ID_DATA.to_der()?, &wrap(CONTEXT_0, &OctetStringRef::new(inner)?.to_der()?)?])
}

/// A ContentInfo `encryptedData` (RFC 5652 §8).
fn encrypted_data(scheme: &[u8], ciphertext: &[u8]) -> der::Result<Vec<u8>> {
    let implicit = Tag::ContextSpecific { constructed: false, number: der::TagNumber::N0 };
    let info = sequence(&[&ID_DATA.to_der()?, scheme, &wrap(implicit, ciphertext)?])?;
    let encrypted = sequence(&[&0_u8.to_der()?, &info])?;
    sequence(&[&ID_ENCRYPTED_DATA.to_der()?, &wrap(CONTEXT_0, &encrypted)?])
}

fn file(safe: &[u8], salt: &[u8], mac: &[u8]) -> der::Result<Vec<u8>> {
    let digest = sequence(&[
        &sequence(&[&ID_SHA256.to_der()?, &der::asn1::Null.to_der()?])?,
        &OctetStringRef::new(mac)?.to_der()?,
    ])?;
    let mac = sequence(&[&digest, &OctetStringRef::new(salt)?.to_der()?, &ROUNDS_WRITTEN.to_der()?])?;
    sequence(&[&3_u8.to_der()?, &data(safe)?, &mac])
}

/// AlgorithmIdentifier of PBES2 and the ciphertext.
fn encrypt(
    plain: &[u8],
    password: &str,
    rng: &mut dyn FnMut(&mut [u8]),
) -> Result<(Vec<u8>, Vec<u8>), Pkcs12Error> {
    let (mut salt, mut iv) = ([0; 16], [0; 16]);
    rng(&mut salt);
    rng(&mut iv);
    let parameters = pbes2::Parameters::pbkdf2_sha256_aes256cbc(ROUNDS_WRITTEN, &salt, &iv)
        .map_err(|_| Pkcs12Error::Encode)?;
    let ciphertext = parameters.encrypt(password.as_bytes(), plain).map_err(|_| Pkcs12Error::Encode)?;
    let scheme = EncryptionScheme::from(parameters).to_der().map_err(|_| Pkcs12Error::Encode)?;
    Ok((scheme, ciphertext))
}

fn decrypt(algorithm: &[u8], ciphertext: &[u8], password: &[u8]) -> Result<Zeroizing<Vec<u8>>, Pkcs12Error> {
    let scheme = EncryptionScheme::from_der(algorithm).map_err(|_| Pkcs12Error::OldAlgorithm)?;
    let parameters = scheme.pbes2().ok_or(Pkcs12Error::OldAlgorithm)?;
    if let Some(pbkdf2) = parameters.kdf.pbkdf2()
        && pbkdf2.iteration_count > ROUNDS_MAX
    {
        return Err(Pkcs12Error::Rounds(pbkdf2.iteration_count));
    }
    if let Some(scrypt) = parameters.kdf.scrypt() {
        // 128 r N bytes: N = 2^17 and r = 8 are 128 MiB.
        let memory = u128::from(scrypt.cost_parameter) * u128::from(scrypt.block_size) * 128;
        if memory > 256 * 1024 * 1024 || scrypt.parallelization > 16 {
            return Err(Pkcs12Error::Rounds(u32::try_from(scrypt.cost_parameter).unwrap_or(u32::MAX)));
        }
    }
    match parameters.decrypt(password, ciphertext) {
        Ok(plain) => Ok(Zeroizing::new(plain)),
        Err(pkcs5::Error::UnsupportedAlgorithm { .. }) => Err(Pkcs12Error::OldAlgorithm),
        Err(_) => Err(Pkcs12Error::WrongPassword),
    }
}

fn mac_key(password: &str, salt: &[u8], rounds: u32) -> Result<hmac::Key, Pkcs12Error> {
    let rounds = i32::try_from(rounds).map_err(|_| Pkcs12Error::Rounds(rounds))?;
    let key = pkcs12::kdf::derive_key_utf8::<sha2::Sha256>(
        password,
        salt,
        pkcs12::kdf::Pkcs12KeyType::Mac,
        rounds,
        32,
    )
    .map_err(|_| Pkcs12Error::Text)?;
    Ok(hmac::Key::new(hmac::HMAC_SHA256, &Zeroizing::new(key)))
}

fn mac(password: &str, salt: &[u8], rounds: u32, safe: &[u8]) -> Result<Vec<u8>, Pkcs12Error> {
    Ok(hmac::sign(&mac_key(password, salt, rounds)?, safe).as_ref().to_vec())
}

/// The AuthenticatedSafe whose MAC holds.
fn verified_safe(bytes: &[u8], password: &str) -> Result<Vec<u8>, Pkcs12Error> {
    let malformed = |_: der::Error| Pkcs12Error::Malformed;
    let fields = parts(bytes, 3).map_err(malformed)?;
    let [_, info, mac_data] = fields.as_slice() else { return Err(Pkcs12Error::Malformed) };
    let safe = read_data(info).map_err(malformed)?;
    let mac_fields = parts(mac_data, 3).map_err(malformed)?;
    let [digest, salt, rounds] = mac_fields.as_slice() else { return Err(Pkcs12Error::OldAlgorithm) };
    let digest_fields = parts(digest, 2).map_err(malformed)?;
    let [algorithm, expected] = digest_fields.as_slice() else { return Err(Pkcs12Error::Malformed) };
    let algorithm = parts(algorithm, 2).map_err(malformed)?;
    if algorithm.first().map(|id| oid(id)) != Some(Ok(ID_SHA256)) {
        return Err(Pkcs12Error::OldAlgorithm);
    }
    let salt = OctetStringRef::from_der(salt).map_err(malformed)?.as_bytes();
    let rounds = u32::from_der(rounds).map_err(malformed)?;
    if rounds > ROUNDS_MAX || rounds == 0 || salt.is_empty() {
        return Err(Pkcs12Error::Rounds(rounds));
    }
    let expected = OctetStringRef::from_der(expected).map_err(malformed)?;
    hmac::verify(&mac_key(password, salt, rounds)?, &safe, expected.as_bytes())
        .map_err(|_| Pkcs12Error::WrongPassword)?;
    Ok(safe)
}

/// The octets of a ContentInfo `data`.
fn read_data(info: &[u8]) -> der::Result<Vec<u8>> {
    let fields = parts(info, 2)?;
    let [id, value] = fields.as_slice() else { return Err(der::ErrorKind::Failed.into()) };
    if oid(id)? != ID_DATA {
        return Err(der::ErrorKind::Failed.into());
    }
    Ok(OctetStringRef::from_der(content(value, CONTEXT_0)?)?.as_bytes().to_vec())
}

/// The SafeContents of one ContentInfo, opened if it is encrypted.
fn safe_contents(info: &[u8], password: &str) -> Result<Zeroizing<Vec<u8>>, Pkcs12Error> {
    let malformed = |_: der::Error| Pkcs12Error::Malformed;
    let fields = parts(info, 2).map_err(malformed)?;
    let [id, value] = fields.as_slice() else { return Err(Pkcs12Error::Malformed) };
    if oid(id).map_err(malformed)? != ID_ENCRYPTED_DATA {
        return read_data(info).map(Zeroizing::new).map_err(malformed);
    }
    let encrypted = parts(content(value, CONTEXT_0).map_err(malformed)?, 3).map_err(malformed)?;
    let [_, inner, ..] = encrypted.as_slice() else { return Err(Pkcs12Error::Malformed) };
    let inner = parts(inner, 3).map_err(malformed)?;
    let [_, algorithm, ciphertext] = inner.as_slice() else { return Err(Pkcs12Error::Malformed) };
    let implicit = Tag::ContextSpecific { constructed: false, number: der::TagNumber::N0 };
    let ciphertext = content(ciphertext, implicit).map_err(malformed)?;
    decrypt(algorithm, ciphertext, password.as_bytes())
}

fn read_cert_bag(bag: &[u8]) -> der::Result<Option<CertificateDer<'static>>> {
    let fields = parts(bag, 2)?;
    let [id, value] = fields.as_slice() else { return Err(der::ErrorKind::Failed.into()) };
    if oid(id)? != ID_X509 {
        return Ok(None);
    }
    let inner = elements(content(value, CONTEXT_0)?, 1)?;
    let der = inner.first().ok_or(der::ErrorKind::Failed)?;
    Ok(Some(CertificateDer::from(OctetStringRef::from_der(der)?.as_bytes().to_vec())))
}
