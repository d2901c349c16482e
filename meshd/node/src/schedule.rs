//! When a certificate is renewed.

use mesh_ca::CLOCK_SKEW_ALLOWANCE;
use sha2::{Digest as _, Sha256};
use time::UtcDateTime;

/// After a third of the life, and up to a thirtieth later, so that a fleet that was enrolled together does
/// not renew together. The same certificate always gets the same moment.
///
/// Life begins when the certificate was issued: `not_before` is backdated by [`CLOCK_SKEW_ALLOWANCE`].
pub(crate) fn renews_at(not_before: UtcDateTime, not_after: UtcDateTime, serial: &[u8]) -> UtcDateTime {
    let issued = (not_before + CLOCK_SKEW_ALLOWANCE).min(not_after);
    let life = not_after - issued;
    let spread = u32::from_be_bytes(first_four(&Sha256::digest(serial)));
    let jitter = life / 30 * (f64::from(spread) / f64::from(u32::MAX));
    issued + life / 3 + jitter
}

fn first_four(bytes: &[u8]) -> [u8; 4] {
    [bytes[0], bytes[1], bytes[2], bytes[3]]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Never at once after issuing, never later than 37 % of the life, whatever the lifetime.
        #[test]
        fn renewal_falls_between_a_third_and_slightly_more(
            minutes in 1i64..200_000,
            serial in any::<[u8; 16]>(),
        ) {
            let issued = UtcDateTime::from_unix_timestamp(1_800_000_000).unwrap();
            let life = time::Duration::minutes(minutes);
            let at = renews_at(issued - CLOCK_SKEW_ALLOWANCE, issued + life, &serial);
            prop_assert!(at >= issued + life / 3);
            prop_assert!(at <= issued + life * 37 / 100);
        }
    }
}
