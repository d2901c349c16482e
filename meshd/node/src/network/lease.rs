//! When peers are dropped by themselves. Performs no I/O.

use std::collections::BTreeMap;
use std::time::Duration;

use time::UtcDateTime;

/// The ends of the peers' leases by the boot-time clock, which no one can set back.
///
/// A lease ends when either clock says so: the wall clock (controller time) as the certificate has it, or
/// the boot-time clock, counted from the moment the certificate was first believed.
#[derive(Debug, Default)]
pub(crate) struct Leases {
    /// By serial.
    ends: BTreeMap<Vec<u8>, Duration>,
}

impl Leases {
    /// Whether the lease of `serial`, which ends at `end`, still holds.
    pub(crate) fn holds(
        &mut self,
        serial: &[u8],
        end: UtcDateTime,
        now: UtcDateTime,
        boot: Duration,
    ) -> bool {
        if now > end {
            return false;
        }
        let left = Duration::try_from(end - now).unwrap_or_default();
        let boot_end = *self.ends.entry(serial.to_vec()).or_insert(boot + left);
        boot <= boot_end
    }

    /// Forgets the serials that are not in `kept`.
    pub(crate) fn keep(&mut self, kept: &std::collections::BTreeSet<Vec<u8>>) {
        self.ends.retain(|serial, _| kept.contains(serial));
    }

    /// How long until the next lease ends by the boot-time clock.
    pub(crate) fn next(&self, boot: Duration) -> Option<Duration> {
        self.ends.values().map(|end| end.saturating_sub(boot)).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn a_wall_clock_set_back_does_not_prolong_a_lease() {
        let start = UtcDateTime::from_unix_timestamp(1_800_000_000).unwrap();
        let end = start + 72 * HOUR;
        let mut leases = Leases::default();
        assert!(leases.holds(b"a", end, start, HOUR));
        assert_eq!(leases.next(HOUR), Some(72 * HOUR));
        assert!(leases.holds(b"a", end, start + 71 * HOUR, 72 * HOUR));
        // An hour and a second later the wall clock claims that no time has passed.
        assert!(!leases.holds(b"a", end, start, 73 * HOUR + Duration::from_secs(1)));
        // A wall clock that jumps ahead ends it at once.
        assert!(!leases.holds(b"b", end, end + HOUR, HOUR));
    }
}
