//! A token bucket: so much at once, so much per second, and not a bit more.

use std::time::{Duration, Instant};

/// How much somebody may send. Performs no I/O and reads no clock.
#[derive(Clone, Copy, Debug)]
pub struct Bucket {
    per_second: u64,
    burst: u64,
    /// What may be taken now, in units of 1/1000, so that slow rates do not lose what time brings.
    level: u64,
    filled_at: Instant,
}

impl Bucket {
    /// A full bucket: `burst` units at once, `per_second` more each second.
    pub fn new(per_second: u64, burst: u64, now: Instant) -> Self {
        Self { per_second, burst, level: burst.saturating_mul(1000), filled_at: now }
    }

    /// Takes `amount` units, or nothing if there are fewer.
    pub fn take(&mut self, amount: u64, now: Instant) -> bool {
        self.fill(now);
        let amount = amount.saturating_mul(1000);
        let enough = amount <= self.level;
        if enough {
            self.level -= amount;
        }
        enough
    }

    /// Whether nothing is owed: a bucket that may be forgotten.
    pub fn is_full(&mut self, now: Instant) -> bool {
        self.fill(now);
        self.level == self.burst.saturating_mul(1000)
    }

    fn fill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.filled_at);
        let millis = u64::try_from(passed.as_millis()).unwrap_or(u64::MAX);
        if millis > 0 {
            self.level = self.level.saturating_add(millis.saturating_mul(self.per_second));
            self.level = self.level.min(self.burst.saturating_mul(1000));
            // The rest of a millisecond counts for the next time.
            self.filled_at += Duration::from_millis(millis);
        }
    }
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "a test needs some instant to begin with")]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_was_taken_comes_back_with_time() {
        let start = Instant::now();
        let mut bucket = Bucket::new(10, 5, start);
        assert!(bucket.take(5, start));
        assert!(!bucket.take(1, start + Duration::from_millis(99)));
        assert!(bucket.take(1, start + Duration::from_millis(100)));
        assert!(!bucket.is_full(start + Duration::from_millis(599)));
        assert!(bucket.is_full(start + Duration::from_millis(600)));
        assert!(!bucket.take(6, start + Duration::from_secs(3600)), "never more than the burst");
    }

    proptest! {
        /// However it is asked, it never gives more than the burst and what the time has brought.
        #[test]
        fn never_more_than_burst_and_rate(
            (rate, burst) in (0u64..10_000, 0u64..10_000),
            asks in vec((0u64..2_000, 0u64..3_000), 0..64),
        ) {
            let start = Instant::now();
            let (mut bucket, mut now, mut given) = (Bucket::new(rate, burst, start), start, 0);
            for (amount, wait) in asks {
                now += Duration::from_micros(wait * 700);
                if bucket.take(amount, now) {
                    given += amount;
                }
                let passed = now.saturating_duration_since(start).as_micros() as u64;
                prop_assert!(given <= burst + rate * passed / 1_000_000);
            }
        }
    }
}
