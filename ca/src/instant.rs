//! Times at the borders of X.509 and webpki: UTC, whole seconds.

use std::time::Duration;

use rustls_pki_types::UnixTime;
use time::{OffsetDateTime, UtcDateTime, UtcOffset};
use x509_parser::time::ASN1Time;

/// How far notBefore and thisUpdate are set back, in seconds 900 (15 min), so that a verifier whose
/// clock is late accepts what was just issued; webpki has no tolerance of its own.
pub const CLOCK_SKEW_ALLOWANCE: Duration = Duration::from_secs(15 * 60);

/// Cuts `at` to the whole second (RFC 5280 §4.1.2.5 has no fractions).
pub(crate) fn whole_seconds(at: UtcDateTime) -> UtcDateTime {
    at.truncate_to_second()
}

pub(crate) fn to_offset(at: UtcDateTime) -> OffsetDateTime {
    whole_seconds(at).to_offset(UtcOffset::UTC)
}

pub(crate) fn from_asn1(at: ASN1Time) -> UtcDateTime {
    at.to_datetime().to_utc()
}

/// Times before 1970 become 1970: no certificate of ours was valid then.
pub(crate) fn to_unix(at: UtcDateTime) -> UnixTime {
    let seconds = u64::try_from(at.unix_timestamp()).unwrap_or(0);
    UnixTime::since_unix_epoch(Duration::from_secs(seconds))
}

/// Times past the year 9999 become the last representable second.
pub(crate) fn from_unix(at: UnixTime) -> UtcDateTime {
    i64::try_from(at.as_secs())
        .ok()
        .and_then(|seconds| UtcDateTime::from_unix_timestamp(seconds).ok())
        .unwrap_or(UtcDateTime::MAX)
}
