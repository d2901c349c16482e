//! When a certificate is renewed: each third of its life, and sooner again when that fails.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::time::UtcTime;

/// First pause after a failed renewal; doubles with each failure.
pub const RETRY_MIN: Duration = Duration::from_secs(2);
/// The longest pause between two tries.
pub const RETRY_MAX: Duration = Duration::from_secs(1800);
/// Renewals of one moment spread over this part of the life, so that a fleet started at once does not
/// renew at once.
const SPREAD: u32 = 20;

/// The schedule of one certificate. Performs no I/O; `now` is the controller's time as far as it is known.
#[derive(Debug)]
pub struct Renewal {
    not_after: UtcTime,
    due_at: UtcTime,
    failures: u32,
    rng: StdRng,
}

impl Renewal {
    /// The schedule of a certificate that is valid from `not_before` to `not_after`. The seed spreads it.
    pub fn new(not_before: UtcTime, not_after: UtcTime, seed: [u8; 32]) -> Self {
        let mut renewal = Self { not_after, due_at: not_before, failures: 0, rng: StdRng::from_seed(seed) };
        renewal.handle_renewed(not_before, not_after);
        renewal
    }

    /// When the next try is due.
    pub fn due_at(&self) -> UtcTime {
        self.due_at
    }

    pub fn is_due(&self, now: UtcTime) -> bool {
        now >= self.due_at
    }

    /// Whether the certificate has expired, so that only Resume or a new one helps.
    pub fn has_lapsed(&self, now: UtcTime) -> bool {
        now >= self.not_after
    }

    /// Tries since the certificate became due that failed.
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// A new certificate is in place: due after a third of its life, give or take a twentieth.
    pub fn handle_renewed(&mut self, not_before: UtcTime, not_after: UtcTime) {
        let life = not_after.since(not_before);
        let spread = self.rng.random_range(Duration::ZERO..=life / SPREAD * 2);
        (self.not_after, self.failures) = (not_after, 0);
        self.due_at = not_before + (life / 3 + spread).saturating_sub(life / SPREAD);
    }

    /// Renew at once: somebody asked for new keys, or the certificate is superseded.
    pub fn handle_asked(&mut self, now: UtcTime) {
        self.due_at = self.due_at.min(now);
    }

    /// The try failed: again after a random pause up to a bound that doubles (full jitter), capped so that
    /// several tries are left before the certificate expires.
    pub fn handle_failed(&mut self, now: UtcTime) {
        let left = self.not_after.since(now) / 8;
        let cap = if self.has_lapsed(now) { RETRY_MAX } else { RETRY_MAX.min(left).max(RETRY_MIN) };
        let bound = RETRY_MIN.saturating_mul(1 << self.failures.min(16)).min(cap);
        self.failures = self.failures.saturating_add(1);
        self.due_at = now + self.rng.random_range(Duration::from_secs(1)..=bound);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn a_72_hour_identity_renews_after_about_a_day() {
        for seed in 0..50 {
            let renewal = Renewal::new(UtcTime(0), UtcTime(0) + 72 * HOUR, [seed; 32]);
            let due = renewal.due_at().since(UtcTime(0));
            assert!(due >= 20 * HOUR && due <= 28 * HOUR, "{due:?}");
        }
    }

    #[test]
    fn renewals_of_one_moment_are_spread() {
        let due = |seed| Renewal::new(UtcTime(0), UtcTime(0) + 72 * HOUR, [seed; 32]).due_at();
        let distinct: std::collections::BTreeSet<_> = (0..50).map(due).collect();
        assert!(distinct.len() > 40);
    }

    #[test]
    fn asking_brings_a_renewal_forward_and_never_puts_it_off() {
        let mut renewal = Renewal::new(UtcTime(0), UtcTime(0) + 72 * HOUR, [1; 32]);
        renewal.handle_asked(UtcTime(100));
        assert!(renewal.is_due(UtcTime(100)) && !renewal.is_due(UtcTime(99)));
        renewal.handle_asked(UtcTime(200));
        assert!(renewal.is_due(UtcTime(100)));
    }

    proptest! {
        /// However often it fails, there is always a next try: later, within half an hour, and while the
        /// certificate has an hour left at least four more before it expires.
        #[test]
        fn failures_never_stop_the_tries(life in 3600i64..300_000, failures in 1usize..60, seed in any::<[u8; 32]>()) {
            let mut renewal = Renewal::new(UtcTime(0), UtcTime(life), seed);
            prop_assert!(renewal.due_at() > UtcTime(0) && renewal.due_at() < UtcTime(life));
            for _ in 0..failures {
                let now = renewal.due_at();
                renewal.handle_failed(now);
                prop_assert!(renewal.due_at() > now);
                prop_assert!(renewal.due_at() <= now + RETRY_MAX);
                if UtcTime(life).since(now) >= HOUR {
                    prop_assert!(renewal.due_at().since(now) * 4 < UtcTime(life).since(now));
                }
            }
        }
    }
}
