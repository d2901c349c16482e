//! When a certificate is renewed: `mesh-core`'s schedule, bound to what stands in the certificate.

use mesh_ca::CLOCK_SKEW_ALLOWANCE;
use mesh_core::UtcTime;
use mesh_core::rotation::Renewal;
use sha2::{Digest as _, Sha256};
use time::UtcDateTime;

/// After a third of the life, give or take a twentieth, so that a fleet that was enrolled together does not
/// renew together. The same certificate always gets the same moment, also after a restart.
///
/// Life begins when the certificate was issued: `not_before` is backdated by [`CLOCK_SKEW_ALLOWANCE`].
pub(crate) fn renews_at(not_before: UtcDateTime, not_after: UtcDateTime, serial: &[u8]) -> UtcDateTime {
    let issued = (not_before + CLOCK_SKEW_ALLOWANCE).min(not_after);
    let (begin, end) = (UtcTime(issued.unix_timestamp()), UtcTime(not_after.unix_timestamp()));
    let due = Renewal::new(begin, end, Sha256::digest(serial).into()).due_at();
    UtcDateTime::from_unix_timestamp(due.0).unwrap_or(issued)
}

/// The moment that the controller assigned, unless it leaves too little of the life for retries: before the
/// certificate begins, or in the last half of its life.
pub(crate) fn assigned(
    renew_at: i64,
    not_before: UtcDateTime,
    not_after: UtcDateTime,
) -> Option<UtcDateTime> {
    let at = UtcDateTime::from_unix_timestamp(renew_at).ok()?;
    (at > not_before && at < not_after - (not_after - not_before) / 2).then_some(at)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Never at once after issuing, never later than two fifths of the life, whatever the lifetime.
        #[test]
        fn renewal_falls_around_a_third(minutes in 1i64..200_000, serial in any::<[u8; 16]>()) {
            let issued = UtcDateTime::from_unix_timestamp(1_800_000_000).unwrap();
            let life = time::Duration::minutes(minutes);
            let at = renews_at(issued - CLOCK_SKEW_ALLOWANCE, issued + life, &serial);
            prop_assert!(at >= issued + life / 4);
            prop_assert!(at <= issued + life * 2 / 5);
            prop_assert_eq!(at, renews_at(issued - CLOCK_SKEW_ALLOWANCE, issued + life, &serial));
        }
    }

    #[test]
    fn an_assigned_moment_is_obeyed_within_reason() {
        let begin = UtcDateTime::from_unix_timestamp(1_800_000_000).unwrap();
        let end = begin + time::Duration::hours(72);
        let at = |hours: i64| assigned(1_800_000_000 + hours * 3600, begin, end);
        assert_eq!(at(25), Some(begin + time::Duration::hours(25)));
        for hours in [-1, 0, 36, 72, 100] {
            assert_eq!(at(hours), None, "{hours} h");
        }
        for unusable in [0, i64::MAX, i64::MIN] {
            assert_eq!(assigned(unusable, begin, end), None);
        }
    }
}
