//! The extension by which a node's certificate vouches for its WireGuard keys.
//!
//! `WireguardKeys ::= SEQUENCE SIZE (1..2) OF OCTET STRING (SIZE (32))`, newest first; two while a key is
//! being rotated. Never critical, so that verifiers which do not know it accept the certificate.

use der::asn1::OctetStringRef;
use der::{Decode as _, Encode as _};
use x509_parser::asn1_rs::oid;

/// 1.3.6.1.4.1.32473.1.1, in the arc for examples (RFC 5612) until the project has a number of its own.
pub const WIREGUARD_KEYS_OID: [u64; 9] = [1, 3, 6, 1, 4, 1, 32473, 1, 1];

/// The same object identifier as it stands in DER, without tag and length.
pub(crate) const WIREGUARD_KEYS_OID_DER: &[u8] = &oid!(raw 1.3.6.1.4.1.32473.1.1);

/// Most keys in one certificate: the current one, and the one before while rotating.
pub(crate) const WIREGUARD_KEYS_MAX: usize = 2;

/// The canonical u-coordinates of low order: 0, 1, p - 1 and the two of order 8 (RFC 7748 §6.1 and §7; cr.yp.to/ecdh.html).
const LOW_ORDER: [[u8; 32]; 5] = [
    [0; 32],
    {
        let mut one = [0; 32];
        one[0] = 1;
        one
    },
    {
        let mut minus_one = [0xff; 32];
        minus_one[0] = 0xec;
        minus_one[31] = 0x7f;
        minus_one
    },
    [
        0xe0, 0xeb, 0x7a, 0x7c, 0x3b, 0x41, 0xb8, 0xae, 0x16, 0x56, 0xe3, 0xfa, 0xf1, 0x9f, 0xc4, 0x6a, 0xda,
        0x09, 0x8d, 0xeb, 0x9c, 0x32, 0xb1, 0xfd, 0x86, 0x62, 0x05, 0x16, 0x5f, 0x49, 0xb8, 0x00,
    ],
    [
        0x5f, 0x9c, 0x95, 0xbc, 0xa3, 0x50, 0x8c, 0x24, 0xb1, 0xd0, 0xb1, 0x55, 0x9c, 0x83, 0xef, 0x5b, 0x04,
        0x44, 0x5c, 0xc4, 0x58, 0x1c, 0x8e, 0x86, 0xd8, 0x22, 0x4e, 0xdd, 0xd0, 0x9f, 0x11, 0x57,
    ],
];

/// Why a value is not a list of WireGuard keys.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireguardKeysError {
    #[error("list of WireGuard keys is not DER")]
    Encoding,
    #[error("list holds {0} WireGuard keys, one or two are allowed")]
    Count(usize),
    #[error("WireGuard key is {0} octets long, not 32")]
    KeyLength(usize),
    #[error("WireGuard key is not the canonical encoding of a point")]
    NotCanonical,
    #[error("WireGuard key is a point of low order, which agrees on a secret that anybody knows")]
    LowOrder,
    #[error("list holds one WireGuard key twice")]
    Repeated,
}

pub(crate) fn check(keys: &[[u8; 32]]) -> Result<(), WireguardKeysError> {
    if keys.is_empty() || keys.len() > WIREGUARD_KEYS_MAX {
        return Err(WireguardKeysError::Count(keys.len()));
    }
    keys.iter().try_for_each(check_point)?;
    if keys.len() == 2 && keys[0] == keys[1] {
        return Err(WireguardKeysError::Repeated);
    }
    Ok(())
}

/// A u-coordinate of Curve25519 below p = 2^255 - 19, not of low order (RFC 7748 §5 and §6.1).
fn check_point(key: &[u8; 32]) -> Result<(), WireguardKeysError> {
    // Little endian: p is ed ff … ff 7f.
    let at_least_p = key[31] == 0x7f && key[1..31].iter().all(|byte| *byte == 0xff) && key[0] >= 0xed;
    if key[31] > 0x7f || at_least_p {
        return Err(WireguardKeysError::NotCanonical);
    }
    if LOW_ORDER.contains(key) {
        return Err(WireguardKeysError::LowOrder);
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
        assert_eq!(encode(&[[1; 32], [1; 32]]), Err(WireguardKeysError::Repeated));
        assert_eq!(decode(&[0x30, 0]), Err(WireguardKeysError::Count(0)));
        assert_eq!(decode(&[0x30, 3, 4, 1, 9]), Err(WireguardKeysError::KeyLength(1)));
        let mut trailing = encode(&[[7; 32]]).unwrap();
        trailing.push(0);
        assert_eq!(decode(&trailing), Err(WireguardKeysError::Encoding));
    }

    #[test]
    fn points_that_agree_on_a_known_secret_are_refused() {
        use aws_lc_rs::agreement::{EphemeralPrivateKey, UnparsedPublicKey, X25519, agree_ephemeral};
        let agrees = |key: &[u8; 32]| {
            let private =
                EphemeralPrivateKey::generate(&X25519, &aws_lc_rs::rand::SystemRandom::new()).unwrap();
            agree_ephemeral(private, UnparsedPublicKey::new(&X25519, key), (), |_| Ok(())).is_ok()
        };
        assert!(agrees(&[7; 32]));
        for key in &LOW_ORDER {
            assert!(!agrees(key), "{key:x?}");
            assert_eq!(check(&[*key]), Err(WireguardKeysError::LowOrder));
        }
        let p = {
            let mut p = LOW_ORDER[2];
            p[0] = 0xed;
            p
        };
        let top_bit = {
            let mut key = [7; 32];
            key[31] |= 0x80;
            key
        };
        for key in [p, [0xff; 32], top_bit] {
            assert_eq!(check(&[key]), Err(WireguardKeysError::NotCanonical));
        }
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
