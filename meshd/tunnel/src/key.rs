//! Keys: Curve25519 pairs and preshared keys. Secret ones have no `Debug` and clear their memory.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use subtle::ConstantTimeEq;
use x25519_dalek::StaticSecret;
use zeroize::Zeroizing;

/// Length of every key, bytes. WireGuard paper §5.4.
const KEY_BYTES: usize = 32;

/// The prime of Curve25519, 2^255 - 19, little endian. RFC 7748 §4.1.
const FIELD_PRIME: [u8; KEY_BYTES] = {
    let mut prime = [0xff; KEY_BYTES];
    prime[0] = 0xed;
    prime[31] = 0x7f;
    prime
};

/// Why bytes or text are not a usable key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    #[error("key is not 32 bytes in base64 (44 characters)")]
    Encoding,
    #[error("public key is not the canonical encoding of its point")]
    NonCanonical,
    #[error("public key is a point of low order")]
    LowOrder,
}

/// A Curve25519 private key. Cannot be printed; its memory is cleared on drop.
#[expect(missing_debug_implementations, reason = "secret types cannot be printed")]
#[derive(Clone)]
pub struct PrivateKey(Zeroizing<[u8; KEY_BYTES]>);

impl PrivateKey {
    /// Draws a key from `rng`, which must be a cryptographic source, and clamps it (RFC 7748 §5).
    pub fn generate(rng: &mut dyn FnMut(&mut [u8])) -> Self {
        let mut bytes = Zeroizing::new([0; KEY_BYTES]);
        rng(&mut bytes[..]);
        Self(Zeroizing::new(x25519_clamp(*bytes)))
    }

    /// Takes 32 bytes as they are; clamping happens when the key is used.
    pub fn from_bytes(bytes: [u8; KEY_BYTES]) -> Self {
        Self(Zeroizing::new(bytes))
    }

    pub fn to_bytes(&self) -> Zeroizing<[u8; KEY_BYTES]> {
        self.0.clone()
    }

    pub fn public(&self) -> PublicKey {
        PublicKey(x25519_dalek::PublicKey::from(&self.secret()).to_bytes())
    }

    pub(crate) fn secret(&self) -> StaticSecret {
        StaticSecret::from(*self.0)
    }
}

/// Base64 as `wg genkey` writes it.
impl FromStr for PrivateKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        decode(text).map(Self)
    }
}

/// A Curve25519 public key. Printed in base64, as `wg` does.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey(pub [u8; KEY_BYTES]);

impl PublicKey {
    /// Takes 32 bytes from outside.
    ///
    /// # Errors
    /// [`KeyError::NonCanonical`] if the top bit is set or the value is not below the field prime: two
    /// texts would name one key. [`KeyError::LowOrder`] if every exchange with it has the same result
    /// (RFC 7748 §6.1): anybody could speak for its owner.
    pub fn checked(bytes: [u8; KEY_BYTES]) -> Result<Self, KeyError> {
        if bytes.iter().rev().ge(FIELD_PRIME.iter().rev()) {
            return Err(KeyError::NonCanonical);
        }
        // Clamped scalars are multiples of the cofactor, so any of them maps a low-order point to zero.
        let probe = StaticSecret::from([1; KEY_BYTES]);
        if !probe.diffie_hellman(&x25519_dalek::PublicKey::from(bytes)).was_contributory() {
            return Err(KeyError::LowOrder);
        }
        Ok(Self(bytes))
    }

    pub(crate) fn to_x25519(self) -> x25519_dalek::PublicKey {
        x25519_dalek::PublicKey::from(self.0)
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&STANDARD.encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({self})")
    }
}

/// Base64 as `wg pubkey` writes it; refuses what [`PublicKey::checked`] refuses.
impl FromStr for PublicKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        Self::checked(*decode(text)?)
    }
}

/// A preshared key, mixed into every handshake. Cannot be printed; its memory is cleared on drop.
#[expect(missing_debug_implementations, reason = "secret types cannot be printed")]
#[derive(Clone)]
pub struct PresharedKey(Zeroizing<[u8; KEY_BYTES]>);

impl PresharedKey {
    pub fn from_bytes(bytes: [u8; KEY_BYTES]) -> Self {
        Self(Zeroizing::new(bytes))
    }

    pub fn to_bytes(&self) -> Zeroizing<[u8; KEY_BYTES]> {
        self.0.clone()
    }
}

impl PartialEq for PresharedKey {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&*other.0).into()
    }
}

impl Eq for PresharedKey {}

/// Base64 as `wg genpsk` writes it.
impl FromStr for PresharedKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        decode(text).map(Self)
    }
}

fn decode(text: &str) -> Result<Zeroizing<[u8; KEY_BYTES]>, KeyError> {
    // base64 may need one byte more than it writes for 44 characters.
    let mut bytes = Zeroizing::new([0; KEY_BYTES + 1]);
    match STANDARD.decode_slice(text, &mut bytes[..]) {
        Ok(KEY_BYTES) => {
            let mut key = Zeroizing::new([0; KEY_BYTES]);
            key.copy_from_slice(&bytes[..KEY_BYTES]);
            Ok(key)
        }
        _ => Err(KeyError::Encoding),
    }
}

fn x25519_clamp(mut scalar: [u8; KEY_BYTES]) -> [u8; KEY_BYTES] {
    scalar[0] &= 248;
    scalar[31] &= 127;
    scalar[31] |= 64;
    scalar
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn little_endian(hex: &str) -> [u8; 32] {
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(hex.as_bytes().chunks(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
        }
        bytes
    }

    #[test]
    fn low_order_and_non_canonical_public_keys_are_refused() {
        // The points of small order and their other encodings, as listed at cr.yp.to/ecdh.html.
        let table = [
            ("0000000000000000000000000000000000000000000000000000000000000000", KeyError::LowOrder),
            ("0100000000000000000000000000000000000000000000000000000000000000", KeyError::LowOrder),
            ("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800", KeyError::LowOrder),
            ("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157", KeyError::LowOrder),
            ("ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f", KeyError::LowOrder),
            ("edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f", KeyError::NonCanonical),
            ("eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f", KeyError::NonCanonical),
            ("0900000000000000000000000000000000000000000000000000000000000080", KeyError::NonCanonical),
            ("ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff", KeyError::NonCanonical),
        ];
        for (hex, error) in table {
            assert_eq!(PublicKey::checked(little_endian(hex)), Err(error), "{hex}");
        }
    }

    #[test]
    fn text_that_is_no_key_is_refused() {
        let good = PrivateKey::from_bytes([7; 32]).public().to_string();
        assert_eq!(good.len(), 44);
        for text in ["", "AAAA", &good[..43], &format!("{good}A"), &good.replace('=', "!")] {
            assert_eq!(text.parse::<PublicKey>(), Err(KeyError::Encoding), "{text:?}");
        }
    }

    /// RFC 7748 §6.1, the second pair.
    #[test]
    fn public_key_of_the_rfc_vector() {
        let private = little_endian("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb");
        let public = little_endian("de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f");
        assert_eq!(PrivateKey::from_bytes(private).public(), PublicKey(public));
    }

    proptest! {
        #[test]
        fn generated_keys_survive_text(seed in any::<[u8; 32]>()) {
            let key = PrivateKey::generate(&mut |out| out.copy_from_slice(&seed));
            let public = key.public();
            prop_assert_eq!(public.to_string().parse::<PublicKey>(), Ok(public));
            let text = STANDARD.encode(*key.to_bytes());
            prop_assert_eq!(text.parse::<PrivateKey>().unwrap().public(), public);
        }
    }
}
