//! The authority's keys at rest.
//!
//! A sealed key is one PEM block. Its body is a header and the ciphertext:
//!
//! ```text
//! magic "meshkey" | version u8 = 1 | sealing u8 (0 none, 1 argon2id + XChaCha20-Poly1305)
//! purpose u8 | memory KiB u32 | passes u32 | lanes u32 | salt [16] | nonce [24] | key id length u8 | key id
//! ciphertext, or the bare PKCS #8 where sealing is none
//! ```
//!
//! Integers are big endian. The whole header is authenticated with the ciphertext, so that neither the
//! cost nor the name or purpose of a key can be changed, and two files cannot be swapped.

use std::fmt;

use argon2::{Algorithm, Argon2, Params, Version};
use chacha20poly1305::aead::{Aead as _, Payload};
use chacha20poly1305::{KeyInit as _, XChaCha20Poly1305, XNonce};
use zeroize::{Zeroize as _, Zeroizing};

use crate::keystore::KeyId;

/// Largest sealed key, in bytes of PEM.
pub const SEALED_KEY_BYTES_MAX: usize = 16 * 1024;

const SEALED_LABEL: &str = "MESH SEALED KEY";
const UNSEALED_LABEL: &str = "MESH UNSEALED KEY";
const MAGIC: &[u8; 7] = b"meshkey";
const VERSION: u8 = 1;
const SALT_BYTES: usize = 16;
const NONCE_BYTES: usize = 24;

/// What a key of the authority is for; a key sealed for one purpose does not open for another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KeyPurpose {
    Root,
    Issuing,
}

impl KeyPurpose {
    fn code(self) -> u8 {
        match self {
            Self::Root => 1,
            Self::Issuing => 2,
        }
    }
}

/// Cost of turning a passphrase into a key with Argon2id (RFC 9106).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KdfParams {
    /// Memory in KiB.
    pub memory_kib: u32,
    /// Passes over the memory.
    pub passes: u32,
    /// Lanes.
    pub lanes: u32,
}

impl KdfParams {
    /// Lowest cost that is ever used or accepted: 19 MiB, 2 passes (OWASP's floor for Argon2id).
    pub const FLOOR: Self = Self { memory_kib: 19 * 1024, passes: 2, lanes: 1 };

    /// Highest cost that is accepted, so that a planted file cannot take the host's memory: 1 GiB, 16 passes.
    pub const CEILING: Self = Self { memory_kib: 1024 * 1024, passes: 16, lanes: 8 };

    pub(crate) fn check(self) -> Result<(), SealError> {
        let within = |value, low, high| (low..=high).contains(&value);
        if within(self.memory_kib, Self::FLOOR.memory_kib, Self::CEILING.memory_kib)
            && within(self.passes, Self::FLOOR.passes, Self::CEILING.passes)
            && within(self.lanes, Self::FLOOR.lanes, Self::CEILING.lanes)
        {
            Ok(())
        } else {
            Err(SealError::Cost(self))
        }
    }
}

impl Default for KdfParams {
    /// 64 MiB, 3 passes, 1 lane.
    fn default() -> Self {
        Self { memory_kib: 64 * 1024, passes: 3, lanes: 1 }
    }
}

/// How a key is, or is to be, protected at rest.
#[derive(Clone, Copy)]
pub enum Unlock<'a> {
    /// By a passphrase of at least one byte.
    Passphrase(&'a [u8]),
    /// Not at all: the file's permissions are the only protection.
    None,
}

impl fmt::Debug for Unlock<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Passphrase(_) => "Passphrase",
            Self::None => "None",
        })
    }
}

/// Why a key was not sealed or opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    #[error("passphrase is empty")]
    EmptyPassphrase,
    #[error(
        "key derivation cost of {} KiB, {} passes, {} lanes is out of bounds",
        .0.memory_kib, .0.passes, .0.lanes
    )]
    Cost(KdfParams),
    #[error("sealed key is larger than {SEALED_KEY_BYTES_MAX} bytes")]
    TooLarge,
    #[error("sealed key is malformed")]
    Malformed,
    #[error("sealed key has format version {0}; this program knows version {VERSION}")]
    Version(u8),
    #[error("sealed key is {found}, not {wanted}")]
    OtherKey { found: String, wanted: KeyId },
    #[error("sealed key has another purpose")]
    OtherPurpose,
    #[error("key is sealed with a passphrase, none was given")]
    PassphraseNeeded,
    #[error("key is not sealed, but a passphrase was given")]
    NotSealed,
    #[error("wrong passphrase, or the sealed key was changed")]
    WrongPassphrase,
    #[error("key derivation failed")]
    Derive,
}

struct Header {
    sealed: bool,
    purpose: u8,
    cost: KdfParams,
    salt: [u8; SALT_BYTES],
    nonce: [u8; NONCE_BYTES],
    key_id: String,
}

impl Header {
    fn encode(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend([VERSION, u8::from(self.sealed), self.purpose]);
        for number in [self.cost.memory_kib, self.cost.passes, self.cost.lanes] {
            out.extend(number.to_be_bytes());
        }
        out.extend(self.salt);
        out.extend(self.nonce);
        out.push(u8::try_from(self.key_id.len()).expect("a key id has at most 64 bytes"));
        out.extend(self.key_id.as_bytes());
        out
    }

    /// The header and what follows it.
    fn decode(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let rest = bytes.strip_prefix(MAGIC)?;
        let ([_version, sealed, purpose], rest) = rest.split_first_chunk()?;
        let (memory, rest) = rest.split_first_chunk()?;
        let (passes, rest) = rest.split_first_chunk()?;
        let (lanes, rest) = rest.split_first_chunk()?;
        let (salt, rest) = rest.split_first_chunk()?;
        let (nonce, rest) = rest.split_first_chunk()?;
        let (length, rest) = rest.split_first()?;
        let (key_id, rest) = rest.split_at_checked(usize::from(*length))?;
        let header = Self {
            sealed: match sealed {
                0 => false,
                1 => true,
                _ => return None,
            },
            purpose: *purpose,
            cost: KdfParams {
                memory_kib: u32::from_be_bytes(*memory),
                passes: u32::from_be_bytes(*passes),
                lanes: u32::from_be_bytes(*lanes),
            },
            salt: *salt,
            nonce: *nonce,
            key_id: std::str::from_utf8(key_id).ok()?.to_owned(),
        };
        Some((header, rest))
    }
}

/// The cipher under a key that is made from a passphrase.
pub(crate) fn passphrase_cipher(
    passphrase: &[u8],
    cost: KdfParams,
    salt: &[u8; SALT_BYTES],
) -> Result<XChaCha20Poly1305, SealError> {
    let params =
        Params::new(cost.memory_kib, cost.passes, cost.lanes, Some(32)).map_err(|_| SealError::Cost(cost))?;
    let mut key = Zeroizing::new([0; 32]);
    Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
        .hash_password_into(passphrase, salt, key.as_mut())
        .map_err(|_| SealError::Derive)?;
    Ok(XChaCha20Poly1305::new(key.as_ref().into()))
}

/// Seals `pkcs8` and returns the PEM text to store. With [`Unlock::None`] the key stays readable and the
/// block says so in its label.
///
/// Blocks for as long as `cost` asks (about 0.1 s with the default).
pub fn seal(
    pkcs8: &[u8],
    key_id: &KeyId,
    purpose: KeyPurpose,
    unlock: Unlock<'_>,
    cost: KdfParams,
    rng: &mut dyn FnMut(&mut [u8]),
) -> Result<Zeroizing<String>, SealError> {
    let mut header = Header {
        sealed: matches!(unlock, Unlock::Passphrase(_)),
        purpose: purpose.code(),
        cost,
        salt: [0; SALT_BYTES],
        nonce: [0; NONCE_BYTES],
        key_id: key_id.as_str().to_owned(),
    };
    let (label, mut body) = match unlock {
        Unlock::Passphrase([]) => return Err(SealError::EmptyPassphrase),
        Unlock::Passphrase(passphrase) => {
            cost.check()?;
            rng(&mut header.salt);
            rng(&mut header.nonce);
            let aad = header.encode();
            let payload = Payload { msg: pkcs8, aad: &aad };
            let sealed = passphrase_cipher(passphrase, cost, &header.salt)?
                .encrypt(XNonce::from_slice(&header.nonce), payload)
                .map_err(|_| SealError::TooLarge)?;
            (SEALED_LABEL, [aad, sealed].concat())
        }
        Unlock::None => {
            header.cost = KdfParams { memory_kib: 0, passes: 0, lanes: 0 };
            (UNSEALED_LABEL, [&header.encode(), pkcs8].concat())
        }
    };
    let block = pem::Pem::new(label, body.clone());
    body.zeroize();
    let config = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    let text = Zeroizing::new(pem::encode_config(&block, config));
    block.into_contents().zeroize();
    Ok(text)
}

/// Opens what [`seal`] wrote and returns the PKCS #8 DER.
///
/// # Errors
/// [`SealError::OtherKey`] and [`SealError::OtherPurpose`] if the file belongs to another key;
/// [`SealError::Cost`] if its cost lies outside [`KdfParams::FLOOR`] and [`KdfParams::CEILING`], before any
/// work is done; [`SealError::WrongPassphrase`] also for every change of header or ciphertext.
pub fn unseal(
    text: &[u8],
    key_id: &KeyId,
    purpose: KeyPurpose,
    unlock: Unlock<'_>,
) -> Result<Zeroizing<Vec<u8>>, SealError> {
    if text.len() > SEALED_KEY_BYTES_MAX {
        return Err(SealError::TooLarge);
    }
    let block = pem::parse(text).map_err(|_| SealError::Malformed)?;
    let label = block.tag().to_owned();
    let body = Zeroizing::new(block.into_contents());
    match body.strip_prefix(MAGIC).and_then(|rest| rest.first()) {
        Some(&VERSION) => {}
        Some(&other) => return Err(SealError::Version(other)),
        None => return Err(SealError::Malformed),
    }
    let (header, ciphertext) = Header::decode(&body).ok_or(SealError::Malformed)?;
    if label != if header.sealed { SEALED_LABEL } else { UNSEALED_LABEL } {
        return Err(SealError::Malformed);
    }
    if header.key_id != key_id.as_str() {
        return Err(SealError::OtherKey { found: header.key_id, wanted: key_id.clone() });
    }
    if header.purpose != purpose.code() {
        return Err(SealError::OtherPurpose);
    }
    match (header.sealed, unlock) {
        (true, Unlock::Passphrase(passphrase)) => {
            header.cost.check()?;
            let payload = Payload { msg: ciphertext, aad: &header.encode() };
            passphrase_cipher(passphrase, header.cost, &header.salt)?
                .decrypt(XNonce::from_slice(&header.nonce), payload)
                .map(Zeroizing::new)
                .map_err(|_| SealError::WrongPassphrase)
        }
        (false, Unlock::None) => Ok(Zeroizing::new(ciphertext.to_vec())),
        (true, Unlock::None) => Err(SealError::PassphraseNeeded),
        (false, Unlock::Passphrase(_)) => Err(SealError::NotSealed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &[u8] = b"pkcs8 of a key that nobody may read";

    fn id(text: &str) -> KeyId {
        KeyId::parse(text).unwrap()
    }

    fn counter() -> impl FnMut(&mut [u8]) {
        let mut next = 0_u8;
        move |bytes: &mut [u8]| bytes.iter_mut().for_each(|b| (*b, next) = (next, next.wrapping_add(1)))
    }

    fn sealed(key: &str, purpose: KeyPurpose) -> Zeroizing<String> {
        let unlock = Unlock::Passphrase(b"correct horse");
        seal(SECRET, &id(key), purpose, unlock, KdfParams::FLOOR, &mut counter()).unwrap()
    }

    /// The sealed text with one byte of its body changed.
    fn changed(text: &str, at: usize, change: impl Fn(u8) -> u8) -> String {
        let block = pem::parse(text).unwrap();
        let mut body = block.contents().to_vec();
        body[at] = change(body[at]);
        pem::encode(&pem::Pem::new(block.tag(), body))
    }

    #[test]
    fn the_right_passphrase_opens_and_the_text_hides_the_key() {
        let text = sealed("root-1", KeyPurpose::Root);
        assert!(text.starts_with("-----BEGIN MESH SEALED KEY-----\n"));
        let body = pem::parse(text.as_bytes()).unwrap().into_contents();
        assert!(!body.windows(8).any(|window| SECRET.starts_with(window)));
        let open = |passphrase: &'static [u8]| {
            unseal(text.as_bytes(), &id("root-1"), KeyPurpose::Root, Unlock::Passphrase(passphrase))
        };
        assert_eq!(open(b"correct horse").unwrap().as_slice(), SECRET);
        assert_eq!(open(b"wrong horse"), Err(SealError::WrongPassphrase));
        assert_eq!(open(b""), Err(SealError::WrongPassphrase));
    }

    #[test]
    fn a_key_does_not_open_under_another_name_or_purpose() {
        let text = sealed("root-1", KeyPurpose::Root);
        let open = |key: &str, purpose| {
            unseal(text.as_bytes(), &id(key), purpose, Unlock::Passphrase(b"correct horse"))
        };
        let other = SealError::OtherKey { found: "root-1".into(), wanted: id("issuing-1") };
        assert_eq!(open("issuing-1", KeyPurpose::Root), Err(other));
        assert_eq!(open("root-1", KeyPurpose::Issuing), Err(SealError::OtherPurpose));
    }

    #[test]
    fn any_changed_byte_of_header_or_ciphertext_is_noticed() {
        let text = sealed("root-1", KeyPurpose::Root);
        let length = pem::parse(text.as_bytes()).unwrap().contents().len();
        // 10..22 is the cost; it is tried in the next test, as some changes of it cost a gigabyte.
        for at in (0..10).chain(22..length) {
            let text = changed(&text, at, |byte| byte ^ 1);
            let opened = unseal(
                text.as_bytes(),
                &id("root-1"),
                KeyPurpose::Root,
                Unlock::Passphrase(b"correct horse"),
            );
            assert!(opened.is_err(), "byte {at}");
        }
    }

    #[test]
    fn a_relabelled_file_does_not_open_even_if_names_are_patched() {
        // Swapping files: the header of one on the ciphertext of the other.
        let (one, two) = (sealed("key-1", KeyPurpose::Root), sealed("key-2", KeyPurpose::Root));
        let (one, two) = (pem::parse(one.as_bytes()).unwrap(), pem::parse(two.as_bytes()).unwrap());
        let header = Header::decode(one.contents()).unwrap().0.encode();
        let body = [&header, Header::decode(two.contents()).unwrap().1].concat();
        let text = pem::encode(&pem::Pem::new(SEALED_LABEL, body));
        let unlock = Unlock::Passphrase(b"correct horse");
        let opened = unseal(text.as_bytes(), &id("key-1"), KeyPurpose::Root, unlock);
        assert_eq!(opened, Err(SealError::WrongPassphrase));
    }

    #[test]
    fn the_cost_cannot_be_lowered_or_driven_up() {
        let text = sealed("root-1", KeyPurpose::Root);
        let open = |text: &str| {
            unseal(text.as_bytes(), &id("root-1"), KeyPurpose::Root, Unlock::Passphrase(b"correct horse"))
        };
        for (at, value) in [(11, 0xff), (12, 0), (17, 1), (17, 200), (21, 0), (21, 99)] {
            let opened = open(&changed(&text, at, |_| value));
            assert!(matches!(opened, Err(SealError::Cost(_))), "byte {at} = {value}: {opened:?}");
        }
        // Another cost within bounds gives another key.
        assert_eq!(open(&changed(&text, 17, |_| 3)), Err(SealError::WrongPassphrase));
        let cheap = KdfParams { passes: 1, ..KdfParams::FLOOR };
        let unlock = Unlock::Passphrase(b"x");
        let refused = seal(SECRET, &id("a"), KeyPurpose::Root, unlock, cheap, &mut counter());
        assert_eq!(refused, Err(SealError::Cost(cheap)));
    }

    #[test]
    fn an_unsealed_key_says_so_and_never_passes_for_a_sealed_one() {
        let none = Unlock::None;
        let cost = KdfParams::default();
        let text = seal(SECRET, &id("root-1"), KeyPurpose::Root, none, cost, &mut counter()).unwrap();
        assert!(text.starts_with("-----BEGIN MESH UNSEALED KEY-----\n"));
        let open = |unlock| unseal(text.as_bytes(), &id("root-1"), KeyPurpose::Root, unlock);
        assert_eq!(open(none).unwrap().as_slice(), SECRET);
        assert_eq!(open(Unlock::Passphrase(b"x")), Err(SealError::NotSealed));
        let relabelled = text.replace("UNSEALED", "SEALED");
        let opened = unseal(relabelled.as_bytes(), &id("root-1"), KeyPurpose::Root, none);
        assert_eq!(opened, Err(SealError::Malformed));
        let sealed = sealed("root-1", KeyPurpose::Root);
        let opened = unseal(sealed.as_bytes(), &id("root-1"), KeyPurpose::Root, none);
        assert_eq!(opened, Err(SealError::PassphraseNeeded));
    }

    #[test]
    fn foreign_files_are_refused() {
        let open = |text: &[u8]| unseal(text, &id("root-1"), KeyPurpose::Root, Unlock::None);
        assert_eq!(open(b""), Err(SealError::Malformed));
        assert_eq!(open(&vec![b'x'; SEALED_KEY_BYTES_MAX + 1]), Err(SealError::TooLarge));
        let newer = changed(&sealed("root-1", KeyPurpose::Root), 7, |_| 2);
        assert_eq!(open(newer.as_bytes()), Err(SealError::Version(2)));
        let refused = seal(
            SECRET,
            &id("a"),
            KeyPurpose::Root,
            Unlock::Passphrase(b""),
            KdfParams::FLOOR,
            &mut counter(),
        );
        assert_eq!(refused, Err(SealError::EmptyPassphrase));
    }
}
