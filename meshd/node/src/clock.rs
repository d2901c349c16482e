//! Controller time: this machine's wall clock, corrected by what the controller's was seen to show.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use mesh_runtime::SharedClock;
use rustls_pki_types::UnixTime;
use time::UtcDateTime;

/// A clock that shows what the controller's clock shows. Clones share the offset.
#[derive(Debug, Clone)]
pub(crate) struct ControllerClock {
    clock: SharedClock,
    /// Controller time less ours, seconds.
    offset: Arc<AtomicI64>,
}

impl ControllerClock {
    pub(crate) fn new(clock: SharedClock, offset_secs: i64) -> Self {
        Self { clock, offset: Arc::new(AtomicI64::new(offset_secs)) }
    }

    pub(crate) fn own(&self) -> &SharedClock {
        &self.clock
    }

    /// Controller time now.
    pub(crate) fn now(&self) -> UtcDateTime {
        let own = self.clock.utc_now();
        own.checked_add(time::Duration::seconds(self.offset_secs())).unwrap_or(own)
    }

    pub(crate) fn since_boot(&self) -> Duration {
        self.clock.since_boot()
    }

    pub(crate) fn offset_secs(&self) -> i64 {
        self.offset.load(Ordering::Relaxed)
    }

    /// Learns from a time the controller has just told. Returns the new offset if it differs by more
    /// than the second that rounding and travel may cost.
    pub(crate) fn learn(&self, controller_time: i64) -> Option<i64> {
        if controller_time <= 0 {
            return None;
        }
        let offset = controller_time - self.clock.utc_now().unix_timestamp();
        let changed = (offset - self.offset_secs()).abs() > 1;
        changed.then(|| {
            self.offset.store(offset, Ordering::Relaxed);
            offset
        })
    }
}

/// TLS judges the controller's certificate by controller time too, so that a node whose clock is off
/// still reaches the one who can tell it.
impl rustls::time_provider::TimeProvider for ControllerClock {
    fn current_time(&self) -> Option<UnixTime> {
        let seconds = u64::try_from(self.now().unix_timestamp()).ok()?;
        Some(UnixTime::since_unix_epoch(Duration::from_secs(seconds)))
    }
}

#[cfg(test)]
mod tests {
    use mesh_runtime::ManualClock;

    use super::*;

    #[test]
    fn the_offset_is_learned_and_small_differences_are_not_news() {
        let own = Arc::new(ManualClock::new(UtcDateTime::from_unix_timestamp(1_000_000).unwrap()));
        let clock = ControllerClock::new(own.clone(), 0);
        assert_eq!(clock.learn(1_000_001), None);
        assert_eq!(clock.learn(1_003_600), Some(3600));
        assert_eq!(clock.now().unix_timestamp(), 1_003_600);
        own.advance(Duration::from_secs(5));
        assert_eq!(clock.now().unix_timestamp(), 1_003_605);
        assert_eq!(clock.learn(0), None);
    }
}
