//! Wall-clock time of records and certificates.

use std::fmt;
use std::ops::{Add, Sub};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use time::UtcDateTime;
use time::format_description::well_known::Rfc3339;

/// Whole UTC seconds since 1970-01-01T00:00:00Z. Arithmetic saturates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct UtcTime(pub i64);

impl UtcTime {
    /// 1970-01-01T00:00:00Z.
    pub const EPOCH: Self = Self(0);

    /// The time `seconds` after 1970.
    pub const fn from_unix(seconds: i64) -> Self {
        Self(seconds)
    }

    /// Seconds since 1970.
    pub const fn unix(self) -> i64 {
        self.0
    }

    /// How long ago `earlier` was; zero when it lies ahead.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_secs(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }
}

impl Add<Duration> for UtcTime {
    type Output = Self;
    fn add(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(i64::try_from(duration.as_secs()).unwrap_or(i64::MAX)))
    }
}

impl Sub<Duration> for UtcTime {
    type Output = Self;
    fn sub(self, duration: Duration) -> Self {
        Self(self.0.saturating_sub(i64::try_from(duration.as_secs()).unwrap_or(i64::MAX)))
    }
}

impl From<UtcDateTime> for UtcTime {
    fn from(time: UtcDateTime) -> Self {
        Self(time.unix_timestamp())
    }
}

/// Times outside the calendar the `time` crate knows become its nearest end.
impl From<UtcTime> for UtcDateTime {
    fn from(time: UtcTime) -> Self {
        let end = if time.0 < 0 { UtcDateTime::MIN } else { UtcDateTime::MAX };
        UtcDateTime::from_unix_timestamp(time.0).unwrap_or(end)
    }
}

/// RFC 3339, e.g. `2026-11-22T16:00:00Z`; bare seconds where the calendar ends.
impl fmt::Display for UtcTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match UtcDateTime::from_unix_timestamp(self.0).ok().and_then(|time| time.format(&Rfc3339).ok()) {
            Some(text) => f.write_str(&text),
            None => write!(f, "@{}", self.0),
        }
    }
}

/// A duration as files write it (`90s`, `15m`, `24h`, `30d`), in seconds; `None` for anything else.
pub fn seconds(text: &str) -> Option<u32> {
    let unit = text.chars().last()?;
    let factor = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => 86_400,
        _ => return None,
    };
    let number = &text[..text.len() - unit.len_utf8()];
    number.bytes().all(|byte| byte.is_ascii_digit()).then_some(())?;
    number.parse::<u32>().ok()?.checked_mul(factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_one_unit_and_no_sign() {
        for (text, wanted) in [("90s", 90), ("15m", 900), ("24h", 86_400), ("30d", 2_592_000), ("0s", 0)] {
            assert_eq!(seconds(text), Some(wanted), "{text}");
        }
        for text in
            ["", "s", "5", "+5s", "-5s", "5 s", "5x", "1.5h", "5S", "5\u{e9}", "99999999d", "4294967296s"]
        {
            assert_eq!(seconds(text), None, "{text}");
        }
    }

    #[test]
    fn time_is_shown_as_rfc_3339() {
        assert_eq!(UtcTime(1_795_363_200).to_string(), "2026-11-22T16:00:00Z");
        assert_eq!(UtcTime(i64::MAX).to_string(), format!("@{}", i64::MAX));
    }

    #[test]
    fn arithmetic_saturates_and_since_is_never_negative() {
        assert_eq!(UtcTime(i64::MAX) + Duration::from_secs(5), UtcTime(i64::MAX));
        assert_eq!(UtcTime(10) - Duration::from_secs(15), UtcTime(-5));
        assert_eq!(UtcTime(10).since(UtcTime(15)), Duration::ZERO);
        assert_eq!(UtcTime::from(UtcDateTime::from(UtcTime(77))), UtcTime(77));
    }
}
