//! Small texts: times, durations, serials, hashes, and foreign strings made harmless.

use std::{borrow::Cow, fmt::Write as _, str::FromStr, time::Duration};

use time::{OffsetDateTime, UtcDateTime, format_description::well_known::Rfc3339};

const MINUTE: u64 = 60;
const HOUR: u64 = 60 * MINUTE;
const DAY: u64 = 24 * HOUR;
/// The past is told in days from here on.
const DAYS_SHOWN_FROM_AGO: u64 = 3 * DAY;
/// Leases are compared by the hour: three days are `72h`.
const DAYS_SHOWN_FROM_LEFT: u64 = 100 * HOUR;

/// The wall clock, UTC seconds since 1970: the one place meshctl reads it.
pub(crate) fn now() -> i64 {
    OffsetDateTime::now_utc().unix_timestamp()
}

/// RFC 3339 UTC; `None` for 0, which the wire uses for "not set", and for times no calendar has.
pub(crate) fn rfc3339(seconds: i64) -> Option<String> {
    if seconds == 0 {
        return None;
    }
    OffsetDateTime::from_unix_timestamp(seconds).ok()?.format(&Rfc3339).ok()
}

/// `2036-11-02`, or `-`.
pub(crate) fn date(seconds: i64) -> String {
    match UtcDateTime::from_unix_timestamp(seconds) {
        Ok(at) if seconds != 0 => at.date().to_string(),
        _ => "-".to_owned(),
    }
}

/// `2026-11-24T09:12Z`, or `-`: for times somebody will compare with a clock.
pub(crate) fn minute(seconds: i64) -> String {
    rfc3339(seconds).map_or_else(|| "-".to_owned(), |text| format!("{}Z", &text[..16]))
}

/// `now`, `41s ago`, `3d ago`; `-` for 0; times to come are `now` (clocks differ a little).
pub(crate) fn ago(at: i64, now: i64) -> String {
    if at == 0 {
        return "-".to_owned();
    }
    match u64::try_from(now.saturating_sub(at)).unwrap_or(0) {
        0..5 => "now".to_owned(),
        seconds => format!("{} ago", span(seconds, DAYS_SHOWN_FROM_AGO)),
    }
}

/// `60h`, `15m`; `ended` once it is past, `-` for 0.
pub(crate) fn left(until: i64, now: i64) -> String {
    match u64::try_from(until.saturating_sub(now)) {
        _ if until == 0 => "-".to_owned(),
        Ok(seconds) if seconds > 0 => span(seconds, DAYS_SHOWN_FROM_LEFT),
        _ => "ended".to_owned(),
    }
}

/// One number and one unit, rounded down: `41s`, `15m`, `60h`, `30d`.
fn span(seconds: u64, days_from: u64) -> String {
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7_200 => format!("{}m", seconds / MINUTE),
        _ if seconds < days_from => format!("{}h", seconds / HOUR),
        _ => format!("{}d", seconds / DAY),
    }
}

/// A round trip: `0.9ms`, `31ms`; `-` for 0.
pub(crate) fn rtt(micros: u32) -> String {
    match micros {
        0 => "-".to_owned(),
        1..10_000 => format!("{:.1}ms", (f64::from(micros) / 1000.0).max(0.1)),
        _ => format!("{}ms", micros / 1000),
    }
}

/// `0.4s`, as transcripts show elapsed times.
pub(crate) fn elapsed(time: Duration) -> String {
    format!("{:.1}s", time.as_secs_f64())
}

/// `12 B`, `3.4 KiB`, `1.2 GiB`.
pub(crate) fn size(bytes: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = units[0];
    for next in &units[1..] {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    format!("{value:.1} {unit}")
}

/// `sha256:9f2c…1d` at the usual length, for screens; the whole in `-o wide` and JSON.
pub(crate) fn fingerprint(hash: &[u8]) -> String {
    format!("sha256:{}", hex::encode(hash))
}

/// `sha256:9f2c…1d`.
pub(crate) fn short_fingerprint(hash: &[u8]) -> String {
    let text = hex::encode(hash);
    if text.len() < 8 {
        return fingerprint(hash);
    }
    format!("sha256:{}…{}", &text[..4], &text[text.len() - 2..])
}

/// Text from elsewhere with every character that could move the cursor, change colours or turn the
/// reading direction written as `\u{…}`.
pub(crate) fn safe(text: &str) -> Cow<'_, str> {
    if !text.chars().any(is_unsafe) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        if is_unsafe(c) {
            let _ = write!(out, "\\u{{{:x}}}", u32::from(c));
        } else {
            out.push(c);
        }
    }
    Cow::Owned(out)
}

/// Like [`safe`], but keeps line breaks and tabs: for documents of several lines.
pub(crate) fn safe_lines(text: &str) -> String {
    text.split('\n')
        .map(|line| line.split('\t').map(safe).collect::<Vec<_>>().join("\t"))
        .collect::<Vec<_>>()
        .join("\n")
}

fn is_unsafe(c: char) -> bool {
    // Bidirectional overrides and isolates, and invisible joiners, can make a name look like another.
    c.is_control()
        || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
}

/// One shell word, quoted where it must be.
pub(crate) fn shell_quote(word: &str) -> Cow<'_, str> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@%+~".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return Cow::Borrowed(word);
    }
    Cow::Owned(format!("'{}'", word.replace('\'', r"'\''")))
}

/// A duration as people type it: `90s`, `15m`, `24h`, `30d`, `500ms`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span(pub(crate) Duration);

/// Longest duration anybody may type: ten years.
const SPAN_DAYS_MAX: u64 = 3653;

impl Span {
    /// Whole seconds, rounded up, as the wire carries them.
    pub(crate) fn seconds(self) -> u32 {
        let whole = self.0.as_secs() + u64::from(self.0.subsec_nanos() > 0);
        u32::try_from(whole).expect("ten years of seconds fit u32")
    }
}

impl FromStr for Span {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const HOW: &str = "durations look like 90s, 15m, 24h or 30d";
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let number: u64 = number.parse().map_err(|_| HOW)?;
        let duration = match unit {
            "ms" => Some(Duration::from_millis(number)),
            "s" => Some(Duration::from_secs(number)),
            "m" => number.checked_mul(MINUTE).map(Duration::from_secs),
            "h" => number.checked_mul(HOUR).map(Duration::from_secs),
            "d" => number.checked_mul(DAY).map(Duration::from_secs),
            _ => return Err(HOW),
        };
        let longest = Duration::from_secs(SPAN_DAYS_MAX * DAY);
        duration.filter(|d| *d <= longest).map(Self).ok_or("at most ten years")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_read_as_people_say_them() {
        let now = 1_800_000_000;
        for (back, text) in [
            (0, "now"),
            (-3, "now"),
            (41, "41s ago"),
            (900, "15m ago"),
            (3 * 3600, "3h ago"),
            (300_000, "3d ago"),
            (8 * 86_400, "8d ago"),
        ] {
            assert_eq!(ago(now - back, now), text, "{back} s back");
        }
        for (ahead, text) in
            [(60 * 3600, "60h"), (90, "90s"), (0, "ended"), (-5, "ended"), (30 * 86_400, "30d")]
        {
            assert_eq!(left(now + ahead, now), text, "{ahead} s ahead");
        }
        assert_eq!(
            (ago(0, now), left(0, now), date(0), minute(0)),
            ("-".into(), "-".into(), "-".into(), "-".into())
        );
        assert_eq!(rfc3339(1_795_166_700).as_deref(), Some("2026-11-20T09:25:00Z"));
        assert_eq!(minute(1_795_166_700), "2026-11-20T09:25Z");
        assert_eq!(date(1_795_166_700), "2026-11-20");
        assert_eq!(rfc3339(i64::MAX), None);
    }

    #[test]
    fn round_trips_and_sizes_are_short() {
        for (micros, text) in [(0, "-"), (20, "0.1ms"), (912, "0.9ms"), (12_400, "12ms"), (31_000, "31ms")] {
            assert_eq!(rtt(micros), text);
        }
        for (bytes, text) in [(12, "12 B"), (3_482, "3.4 KiB"), (5 << 30, "5.0 GiB"), (u64::MAX, "16.0 EiB")]
        {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn durations_parse_as_documented_and_nothing_else() {
        for (text, seconds) in [("90s", 90), ("15m", 900), ("24h", 86_400), ("30d", 2_592_000), ("1500ms", 2)]
        {
            assert_eq!(text.parse::<Span>().unwrap().seconds(), seconds, "{text}");
        }
        for text in ["", "s", "5", "-5s", "5 s", "5x", "1.5h", "99999999999999999999d", "99999999d", "5S"] {
            assert!(text.parse::<Span>().is_err(), "{text}");
        }
    }

    #[test]
    fn foreign_text_cannot_steer_the_terminal() {
        assert_eq!(safe("web-1 ü"), "web-1 ü");
        assert_eq!(safe("a\x1b[31mb\r\n\u{202e}c\u{9b}"), r"a\u{1b}[31mb\u{d}\u{a}\u{202e}c\u{9b}");
        assert_eq!(safe_lines("a\tb\nc\x07"), "a\tb\nc\\u{7}");
    }

    #[test]
    fn words_are_quoted_for_the_shell_only_where_needed() {
        for (word, quoted) in
            [("ls", "ls"), ("", "''"), ("a b", "'a b'"), ("it's", r"'it'\''s'"), ("+a", "+a"), ("$x", "'$x'")]
        {
            assert_eq!(shell_quote(word), quoted);
        }
    }
}
