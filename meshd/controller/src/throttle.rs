//! How often one source address may be wrong about a secret.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use crate::limits::{WRONG_SECRET_SOURCES_MAX, WRONG_SECRET_WINDOW, WRONG_SECRETS_MAX};

/// Counts wrong secrets per source. IPv6 sources count by their /64, which is one subscriber.
#[derive(Debug, Default)]
pub(crate) struct Throttle(Mutex<HashMap<IpAddr, Strikes>>);

#[derive(Debug, Clone, Copy)]
struct Strikes {
    since: Instant,
    count: u32,
}

impl Throttle {
    /// Whether `source` has used up its tries for now.
    pub(crate) fn is_exhausted(&self, source: IpAddr, now: Instant) -> bool {
        let strikes = self.lock();
        strikes.get(&subscriber(source)).is_some_and(|s| s.live(now) && s.count >= WRONG_SECRETS_MAX)
    }

    /// Counts a wrong secret from `source`.
    pub(crate) fn strike(&self, source: IpAddr, now: Instant) {
        let mut strikes = self.lock();
        if strikes.len() >= WRONG_SECRET_SOURCES_MAX {
            strikes.retain(|_, s| s.live(now));
        }
        // Still full of live ones: an attack from everywhere. Start over rather than grow.
        if strikes.len() >= WRONG_SECRET_SOURCES_MAX {
            strikes.clear();
        }
        let entry = strikes.entry(subscriber(source)).or_insert(Strikes { since: now, count: 0 });
        if !entry.live(now) {
            *entry = Strikes { since: now, count: 0 };
        }
        entry.count = entry.count.saturating_add(1);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<IpAddr, Strikes>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Strikes {
    fn live(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.since) < WRONG_SECRET_WINDOW
    }
}

fn subscriber(source: IpAddr) -> IpAddr {
    match source.to_canonical() {
        IpAddr::V6(address) => {
            let segments = address.segments();
            let [a, b, c, d, ..] = segments;
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_source_is_held_after_its_tries_and_free_again_after_the_window() {
        let (throttle, now) = (Throttle::default(), Instant::now());
        let (bad, good): (IpAddr, IpAddr) = ("192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap());
        for _ in 0..WRONG_SECRETS_MAX {
            assert!(!throttle.is_exhausted(bad, now));
            throttle.strike(bad, now);
        }
        assert!(throttle.is_exhausted(bad, now));
        assert!(!throttle.is_exhausted(good, now));
        assert!(!throttle.is_exhausted(bad, now + WRONG_SECRET_WINDOW));
    }

    #[test]
    fn one_ipv6_subscriber_is_one_source() {
        let (throttle, now) = (Throttle::default(), Instant::now());
        for host in 0..WRONG_SECRETS_MAX {
            throttle.strike(format!("2001:db8::{host:x}").parse().unwrap(), now);
        }
        assert!(throttle.is_exhausted("2001:db8::ffff".parse().unwrap(), now));
        assert!(!throttle.is_exhausted("2001:db8:0:1::1".parse().unwrap(), now));
        let later = now + WRONG_SECRET_WINDOW + Duration::from_secs(1);
        throttle.strike("2001:db8::1".parse().unwrap(), later);
        assert!(!throttle.is_exhausted("2001:db8::1".parse().unwrap(), later));
    }
}
