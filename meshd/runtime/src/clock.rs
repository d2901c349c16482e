use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use time::UtcDateTime;

/// The clocks of one process. Handed down as an argument; only this crate implements it.
///
/// Three readings that are never mixed: UTC for certificates and records, [`Instant`] for timers,
/// and the time since boot, which also counts while the machine sleeps, for leases.
pub trait Clock: fmt::Debug + Send + Sync + 'static {
    /// Wall clock, UTC. May jump either way.
    fn utc_now(&self) -> UtcDateTime;
    /// Monotonic, for timers. Stands still while the machine sleeps.
    fn now(&self) -> Instant;
    /// Monotonic, and counts while the machine sleeps (`CLOCK_BOOTTIME`).
    fn since_boot(&self) -> Duration;
}

/// A clock that many parts of a process share.
pub type SharedClock = Arc<dyn Clock>;

/// The machine's own clocks.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn utc_now(&self) -> UtcDateTime {
        UtcDateTime::now()
    }

    fn now(&self) -> Instant {
        Instant::now()
    }

    fn since_boot(&self) -> Duration {
        use nix::time::{ClockId, clock_gettime};
        let reading =
            clock_gettime(ClockId::CLOCK_BOOTTIME).expect("CLOCK_BOOTTIME exists since Linux 2.6.39");
        reading.into()
    }
}

/// A clock that only moves when told to. For tests.
#[derive(Debug)]
pub struct ManualClock {
    start: Instant,
    reading: Mutex<Reading>,
}

#[derive(Debug, Clone, Copy)]
struct Reading {
    utc: UtcDateTime,
    passed: Duration,
}

impl ManualClock {
    /// A clock that shows `utc` until it is moved.
    pub fn new(utc: UtcDateTime) -> Self {
        let reading = Reading { utc, passed: Duration::ZERO };
        Self { start: Instant::now(), reading: Mutex::new(reading) }
    }

    /// Lets `step` pass on every reading alike.
    pub fn advance(&self, step: Duration) {
        let mut reading = self.lock();
        reading.utc += step;
        reading.passed += step;
    }

    /// Sets the wall clock alone, as an operator or NTP would.
    pub fn set_utc(&self, utc: UtcDateTime) {
        self.lock().utc = utc;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Reading> {
        self.reading.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Clock for ManualClock {
    fn utc_now(&self) -> UtcDateTime {
        self.lock().utc
    }

    fn now(&self) -> Instant {
        self.start + self.lock().passed
    }

    fn since_boot(&self) -> Duration {
        self.lock().passed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advancing_moves_every_reading_and_setting_the_wall_moves_one() {
        let clock = ManualClock::new(UtcDateTime::UNIX_EPOCH);
        let before = clock.now();
        clock.advance(Duration::from_secs(90));
        assert_eq!(clock.utc_now().unix_timestamp(), 90);
        assert_eq!(clock.now() - before, Duration::from_secs(90));
        clock.set_utc(UtcDateTime::UNIX_EPOCH);
        assert_eq!(clock.utc_now().unix_timestamp(), 0);
        assert_eq!(clock.since_boot(), Duration::from_secs(90));
    }

    #[test]
    fn the_boot_clock_never_goes_back() {
        let first = SystemClock.since_boot();
        assert!(SystemClock.since_boot() >= first);
        assert!(first > Duration::ZERO);
    }
}
