use std::time::Duration;

use rand::Rng as _;

/// Waits between attempts: exponential with full jitter, so that a fleet which lost its controller
/// together does not come back together.
///
/// Attempt `n` waits a uniformly random time between zero and `min(cap, base * 2^n)`.
#[derive(Debug, Clone)]
pub struct Backoff {
    base: Duration,
    cap: Duration,
    attempt: u32,
}

impl Backoff {
    /// A back-off whose first wait is at most `base` and whose longest is `cap`.
    pub const fn new(base: Duration, cap: Duration) -> Self {
        Self { base, cap, attempt: 0 }
    }

    /// The next wait, drawn from the operating system's randomness.
    pub fn next_wait(&mut self) -> Duration {
        self.next_wait_with(&mut crate::os_rng())
    }

    /// The next wait, drawn from `rng`.
    pub fn next_wait_with(&mut self, rng: &mut impl rand::RngCore) -> Duration {
        let ceiling = self.ceiling();
        self.attempt = self.attempt.saturating_add(1);
        let nanos = u64::try_from(ceiling.as_nanos()).unwrap_or(u64::MAX);
        Duration::from_nanos(rng.random_range(0..=nanos))
    }

    /// Starts over: call it once an attempt has succeeded for good.
    pub fn reset(&mut self) {
        self.attempt = 0;
    }

    /// How many waits were drawn since the start or the last reset.
    pub fn attempts(&self) -> u32 {
        self.attempt
    }

    fn ceiling(&self) -> Duration {
        let factor = 1u32.checked_shl(self.attempt).unwrap_or(u32::MAX);
        self.base.checked_mul(factor).unwrap_or(self.cap).min(self.cap)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng as _;

    #[test]
    fn waits_stay_under_a_doubling_ceiling_and_use_its_whole_range() {
        let mut rng = rand::rngs::StdRng::seed_from_u64(7);
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
        for attempt in 0..80u32 {
            let ceiling = Duration::from_millis(100)
                .checked_mul(1u32.checked_shl(attempt).unwrap_or(u32::MAX))
                .unwrap_or(Duration::from_secs(5))
                .min(Duration::from_secs(5));
            assert!(backoff.next_wait_with(&mut rng) <= ceiling, "attempt {attempt}");
        }
        let draws: Vec<_> = (0..200).map(|_| backoff.next_wait_with(&mut rng)).collect();
        assert!(draws.iter().any(|wait| *wait < Duration::from_secs(1)));
        assert!(draws.iter().any(|wait| *wait > Duration::from_secs(4)));
        backoff.reset();
        assert!(backoff.next_wait_with(&mut rng) <= Duration::from_millis(100));
        assert_eq!(backoff.attempts(), 1);
    }
}
