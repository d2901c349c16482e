//! WireGuard public keys from strangers: only those that make a secret anybody else does not know.

use mesh_core::WgKey;
use mesh_proto::v1::ErrorCode;
use x25519_dalek::{PublicKey, StaticSecret};

use crate::status::Problem;

/// 2^255 - 19, little-endian: keys are numbers below it (RFC 7748 §5).
const FIELD_PRIME: [u8; 32] = {
    let mut prime = [0xff; 32];
    prime[0] = 0xed;
    prime[31] = 0x7f;
    prime
};

/// Takes a key of 32 octets.
///
/// # Errors
/// Refuses a key of low order, with which every shared secret is zero (RFC 7748 §6.1), and one that is
/// not in its one canonical form, so that no key exists twice under two names.
pub(crate) fn parse_key(bytes: &[u8]) -> Result<WgKey, Problem> {
    let key = WgKey::try_from(bytes).map_err(|error| weak(error.to_string()))?;
    let is_canonical = key.0.iter().rev().lt(FIELD_PRIME.iter().rev());
    if !is_canonical {
        return Err(weak("the WireGuard key is not in canonical form".into()));
    }
    // Any clamped scalar tells: it is a multiple of the cofactor, so a point of low order becomes zero.
    let shared = StaticSecret::from([0x55; 32]).diffie_hellman(&PublicKey::from(key.0));
    if !shared.was_contributory() {
        return Err(weak("the WireGuard key is a point of low order".into()));
    }
    Ok(key)
}

fn weak(why: String) -> Problem {
    Problem::new(ErrorCode::KeyWeak, why, "make a new WireGuard key")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weak_keys_are_refused_and_real_ones_taken() {
        let mut one = [0; 32];
        one[0] = 1;
        let mut above = FIELD_PRIME;
        above[0] = 0xf6; // 2^255 - 10 is 9, the base point, in another form
        let mut high_bit = [9; 32];
        high_bit[31] = 0x89;
        // A point of order 8 (RFC 7748's implementations list it; also in libsodium's blocklist).
        let order8: [u8; 32] = [
            0xe0, 0xeb, 0x7a, 0x7c, 0x3b, 0x41, 0xb8, 0xae, 0x16, 0x56, 0xe3, 0xfa, 0xf1, 0x9f, 0xc4, 0x6a,
            0xda, 0x09, 0x8d, 0xeb, 0x9c, 0x32, 0xb1, 0xfd, 0x86, 0x62, 0x05, 0x16, 0x5f, 0x49, 0xb8, 0x00,
        ];
        for bad in [[0; 32], one, order8, FIELD_PRIME, above, high_bit, [0xff; 32]] {
            assert!(parse_key(&bad).is_err(), "{bad:02x?}");
        }
        assert!(parse_key(&[9; 31]).is_err());
        let real = PublicKey::from(&StaticSecret::from([7; 32])).to_bytes();
        assert_eq!(parse_key(&real).unwrap(), WgKey(real));
    }
}
