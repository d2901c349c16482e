//! Identifiers: opaque bytes and numbers with a meaning.

use std::cmp::Ordering;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Index of a node, from 1, never used twice in one mesh; the host part of its overlay IPv6 address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NodeId(pub u32);

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Why bytes or text are no identifier.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    #[error("{what} has {got} bytes, not {want}")]
    Length { what: &'static str, got: usize, want: usize },
    #[error("{what} is not hexadecimal")]
    Hex { what: &'static str },
}

/// Numbers that sort as the bytes do.
fn words(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.as_chunks::<8>().0.iter().map(|word| u64::from_be_bytes(*word))
}

macro_rules! byte_id {
    ($(#[$doc:meta])* $name:ident, $length:literal, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(#[serde(with = "crate::bytes::array")] pub [u8; $length]);

        /// The order of the bytes, looked at by eight: looking identifiers up is most of what World does.
        impl Ord for $name {
            fn cmp(&self, other: &Self) -> Ordering {
                const { assert!($length % 8 == 0) }
                words(&self.0).cmp(words(&other.0))
            }
        }

        impl PartialOrd for $name {
            fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
                Some(self.cmp(other))
            }
        }

        impl $name {
            /// The raw bytes.
            pub const fn as_bytes(&self) -> &[u8; $length] {
                &self.0
            }
        }

        impl AsRef<[u8]> for $name {
            fn as_ref(&self) -> &[u8] {
                &self.0
            }
        }

        impl TryFrom<&[u8]> for $name {
            type Error = IdError;
            fn try_from(bytes: &[u8]) -> Result<Self, IdError> {
                let length = IdError::Length { what: $what, got: bytes.len(), want: $length };
                bytes.try_into().map(Self).map_err(|_| length)
            }
        }

        /// Hexadecimal, either case.
        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                let bytes = hex::decode(text).map_err(|_| IdError::Hex { what: $what })?;
                Self::try_from(bytes.as_slice())
            }
        }

        /// Lower-case hexadecimal.
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&hex::encode(self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }
    };
}

byte_id!(
    /// Serial number of a certificate.
    Serial, 16, "serial"
);
byte_id!(
    /// SHA-256 of a SubjectPublicKeyInfo in DER.
    KeyHash, 32, "key hash"
);
byte_id!(
    /// X25519 public key that WireGuard uses.
    WgKey, 32, "WireGuard key"
);
byte_id!(
    /// Public part of a join or login token.
    TokenId, 8, "token id"
);
byte_id!(
    /// Drawn by the caller; the same on every retry of one request.
    OperationId, 16, "operation id"
);

/// Subject key identifier of an issuer (RFC 5280 §4.2.1.2), as its certificate carries it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct KeyId(#[serde(with = "crate::bytes::vec")] pub Vec<u8>);

impl AsRef<[u8]> for KeyId {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// Lower-case hexadecimal.
impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(&self.0))
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyId({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_read_what_they_write() {
        let serial = Serial([0xab; 16]);
        assert_eq!(serial.to_string().parse(), Ok(serial));
        assert_eq!("zz".parse::<Serial>(), Err(IdError::Hex { what: "serial" }));
        let short = IdError::Length { what: "token id", got: 1, want: 8 };
        assert_eq!("00".parse::<TokenId>(), Err(short));
    }

    #[test]
    fn ids_sort_as_their_bytes() {
        let mut bytes = [0x7f; 32];
        let mut all = vec![bytes];
        for place in 0..bytes.len() {
            for value in [0, 0x80, 0xff] {
                bytes[place] = value;
                all.push(bytes);
            }
            bytes[place] = if place % 3 == 0 { 0x7f } else { 0x80 };
        }
        for (left, right) in all.iter().flat_map(|left| all.iter().map(move |right| (left, right))) {
            assert_eq!(KeyHash(*left).cmp(&KeyHash(*right)), left.cmp(right), "{left:?} {right:?}");
        }
    }

    #[test]
    fn ids_are_bytes_in_cbor_and_hex_in_json() {
        let key = WgKey([7; 32]);
        let mut cbor = Vec::new();
        ciborium::into_writer(&key, &mut cbor).unwrap();
        assert_eq!(&cbor[..2], &[0x58, 0x20], "a CBOR byte string of 32");
        assert_eq!(ciborium::from_reader::<WgKey, _>(cbor.as_slice()).unwrap(), key);
        let json = serde_json::to_string(&key).unwrap();
        assert_eq!(json, format!("\"{}\"", "07".repeat(32)));
        assert_eq!(serde_json::from_str::<WgKey>(&json).unwrap(), key);
        assert!(serde_json::from_str::<WgKey>("\"0707\"").is_err());
    }
}
