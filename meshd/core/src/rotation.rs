//! When a certificate is renewed: each third of its life, and sooner again when that fails.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::ids::NodeId;
use crate::time::UtcTime;

/// First pause after a failed renewal; doubles with each failure.
pub const RETRY_MIN: Duration = Duration::from_secs(2);
/// The longest pause between two tries.
pub const RETRY_MAX: Duration = Duration::from_secs(1800);
/// Renewals of one moment spread over this part of the life, so that a fleet started at once does not
/// renew at once.
const SPREAD: u32 = 20;

/// The golden ratio, less one, of 2^32 (Weyl sequence): consecutive node ids lie far apart.
const GOLDEN: u32 = 0x9E37_79B9;
/// An identity is not renewed again within this part of the period: a slot that near is the next round's.
const SLOT_MARGIN: u32 = 24;

/// When the identity of `node` is to be renewed that was issued at `issued` and lives for `life`: at the
/// node's own moment within the period of a third of the life, the same in every period. So a fleet spreads
/// evenly, also after all of it renewed at once, as after an outage. At the latest a twenty-fourth of the
/// period after the period is over.
pub fn slot(node: NodeId, issued: UtcTime, life: Duration) -> UtcTime {
    let period = (life / 3).as_secs().max(1);
    let share = u64::from(node.0.wrapping_mul(GOLDEN));
    let offset = ((u128::from(period) * u128::from(share)) >> 32) as i64;
    let earliest = issued + Duration::from_secs(period / u64::from(SLOT_MARGIN));
    let phase = (offset - earliest.0).rem_euclid(period as i64);
    UtcTime(earliest.0 + phase)
}

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

    /// 1,000 nodes that were all issued in one second renew evenly over the day, then each at its own time.
    #[test]
    fn slots_spread_a_fleet_and_stay() {
        let (issued, life) = (UtcTime(1_795_363_200), 72 * HOUR);
        let mut per_hour = [0; 24];
        for id in 1..=1_000 {
            let first = slot(NodeId(id), issued, life);
            let age = first.since(issued);
            assert!(age >= HOUR && age < 25 * HOUR, "node {id}: {age:?}");
            per_hour[(age.as_secs() / 3600) as usize % 24] += 1;
            // A renewal that is a little late or early keeps the slot: one renewal a day.
            for late in [-30, 0, 30] {
                assert_eq!(slot(NodeId(id), UtcTime(first.0 + late), life), first + 24 * HOUR, "node {id}");
            }
        }
        assert!(per_hour.iter().all(|count| (35..=50).contains(count)), "{per_hour:?}");
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
