//! The extension by which a node's certificate vouches for its WireGuard keys.
//!
//! `WireguardKeys ::= SEQUENCE SIZE (1..2) OF OCTET STRING (SIZE (32))`, newest first; two while a key is
//! being rotated. Never critical, so that verifiers which do not know it accept the certificate.

use der::asn1::OctetStringRef;
use der::{Decode as _, Encode as _};

/// 1.3.6.1.4.1.32473.1.1, in the arc for examples (RFC 5612) until the project has a number of its own.
pub const WIREGUARD_KEYS_OID: [u64; 9] = [1, 3, 6, 1, 4, 1, 32473, 1, 1];

/// The same object identifier as text, as x509-parser and `der` print it.
pub(crate) const WIREGUARD_KEYS_OID_TEXT: &str = "1.3.6.1.4.1.32473.1.1";

/// Most keys in one certificate: the current one, and the one before while rotating.
pub(crate) const WIREGUARD_KEYS_MAX: usize = 2;

/// Why a value is not a list of WireGuard keys.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireguardKeysError {
    #[error("list of WireGuard keys is not DER")]
    Encoding,
    #[error("list holds {0} WireGuard keys, one or two are allowed")]
    Count(usize),
    #[error("WireGuard key is {0} octets long, not 32")]
    KeyLength(usize),
    #[error("WireGuard key is all zeros")]
    ZeroKey,
    #[error("list holds one WireGuard key twice")]
    Repeated,
}

pub(crate) fn check(keys: &[[u8; 32]]) -> Result<(), WireguardKeysError> {
    if keys.is_empty() || keys.len() > WIREGUARD_KEYS_MAX {
        return Err(WireguardKeysError::Count(keys.len()));
    }
    if keys.contains(&[0; 32]) {
        return Err(WireguardKeysError::ZeroKey);
    }
    if keys.len() == 2 && keys[0] == keys[1] {
        return Err(WireguardKeysError::Repeated);
    }
    Ok(())
}

pub(crate) fn encode(keys: &[[u8; 32]]) -> Result<Vec<u8>, WireguardKeysError> {
    check(keys)?;
    let list: Result<Vec<_>, _> = keys.iter().map(|key| OctetStringRef::new(key)).collect();
    list.and_then(|list| list.to_der()).map_err(|_| WireguardKeysError::Encoding)
}

pub(crate) fn decode(der: &[u8]) -> Result<Vec<[u8; 32]>, WireguardKeysError> {
    let list = Vec::<OctetStringRef<'_>>::from_der(der).map_err(|_| WireguardKeysError::Encoding)?;
    if list.is_empty() || list.len() > WIREGUARD_KEYS_MAX {
        return Err(WireguardKeysError::Count(list.len()));
    }
    let keys: Vec<[u8; 32]> = list
        .iter()
        .map(|key| {
            let bytes = key.as_bytes();
            bytes.try_into().map_err(|_| WireguardKeysError::KeyLength(bytes.len()))
        })
        .collect::<Result<_, _>>()?;
    check(&keys).map(|()| keys)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_encoding_is_a_sequence_of_octet_strings() {
        let der = encode(&[[7; 32]]).unwrap();
        assert_eq!(der[..4], [0x30, 34, 0x04, 32]);
        assert_eq!(decode(&der), Ok(vec![[7; 32]]));
        let two = encode(&[[7; 32], [8; 32]]).unwrap();
        assert_eq!(decode(&two), Ok(vec![[7; 32], [8; 32]]));
    }

    #[test]
    fn other_lists_are_refused() {
        assert_eq!(encode(&[]), Err(WireguardKeysError::Count(0)));
        assert_eq!(encode(&[[1; 32], [2; 32], [3; 32]]), Err(WireguardKeysError::Count(3)));
        assert_eq!(encode(&[[0; 32]]), Err(WireguardKeysError::ZeroKey));
        assert_eq!(encode(&[[1; 32], [1; 32]]), Err(WireguardKeysError::Repeated));
        assert_eq!(decode(&[0x30, 0]), Err(WireguardKeysError::Count(0)));
        assert_eq!(decode(&[0x30, 3, 4, 1, 9]), Err(WireguardKeysError::KeyLength(1)));
        let mut trailing = encode(&[[7; 32]]).unwrap();
        trailing.push(0);
        assert_eq!(decode(&trailing), Err(WireguardKeysError::Encoding));
    }

    proptest! {
        /// Whatever bytes stand in the extension, reading them ends, and what is read writes back the same.
        #[test]
        fn decoding_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            if let Ok(keys) = decode(&bytes) {
                prop_assert_eq!(encode(&keys).unwrap(), bytes);
            }
        }
    }
}
