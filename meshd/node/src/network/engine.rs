//! Whose WireGuard carries the mesh. The kernel's cannot share its UDP port: with it there is no STUN, so no way
//! through two routers that translate addresses, and no relay. Where that turns out to cut a peer off, a node
//! that may choose goes on in userspace and remembers why.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use mesh_tunnel::{Backend, BackendKind, Tunnel};
use serde::{Deserialize, Serialize};
use time::UtcDateTime;

use crate::failpoint;
use crate::limits::PEERS_PER_MAP_MAX;
use crate::state::{ENGINE_FILE, StateDir};

/// How long a need is remembered; then the kernel's WireGuard has another try. Networks change.
const REMEMBERED: Duration = Duration::from_secs(7 * 24 * 3600);
/// A peer that asks by the relay has this long to be reached directly: twice the time after which the kernel repeats
/// a handshake that was lost (WireGuard paper §6.1 `Rekey-Timeout`, 5 s).
const PATIENCE: Duration = Duration::from_secs(10);
/// A peer that did not ask for so long has found another way, or is gone.
const FORGOTTEN: Duration = Duration::from_secs(90);

/// What the kernel's WireGuard cannot do, for people.
pub(crate) const KERNEL_LACKS: [&str; 3] = [
    "no relay: peers whose UDP is blocked stay cut off",
    "no STUN: two nodes that are both behind NAT do not meet",
    "a change of keys interrupts for a handshake (under 1 s)",
];

/// The engine to open, and why it is not the kernel's though that might be taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Choice {
    pub(crate) backend: Backend,
    pub(crate) why_not_kernel: Option<String>,
}

/// A need as it is on disk.
#[derive(Debug, Serialize, Deserialize)]
struct Need {
    why: String,
    /// Seconds since 1970, UTC.
    since: i64,
}

impl Choice {
    /// What `wanted` comes to on this node at `now`.
    pub(crate) fn of(wanted: Backend, state: &StateDir, now: UtcDateTime) -> Self {
        let need = match state.read_json::<Need>(ENGINE_FILE) {
            Ok(need) => need.filter(|need| wanted == Backend::Auto && need.holds(now)),
            Err(error) => {
                tracing::warn!(
                    error = mesh_runtime::chain(&error),
                    "what was learned of the engines is lost"
                );
                None
            }
        };
        match need {
            Some(need) => Self { backend: Backend::Userspace, why_not_kernel: Some(need.why) },
            None => Self { backend: wanted, why_not_kernel: None },
        }
    }

    /// Remembers that `auto` means userspace here.
    pub(crate) fn remember(state: &StateDir, why: String, now: UtcDateTime) {
        let need = Need { why, since: now.unix_timestamp() };
        if let Err(error) = state.write_json(ENGINE_FILE, &need) {
            tracing::warn!(
                error = mesh_runtime::chain(&error),
                "what was learned of the engines is not stored"
            );
        }
    }
}

impl Need {
    fn holds(&self, now: UtcDateTime) -> bool {
        let age = now.unix_timestamp().saturating_sub(self.since);
        // One from the future was written by a wrong clock.
        (0..i64::try_from(REMEMBERED.as_secs()).unwrap_or(i64::MAX)).contains(&age)
    }
}

/// Whether this engine keeps its port to itself.
pub(crate) fn is_bare(tunnel: &dyn Tunnel, choice: &Choice) -> bool {
    tunnel.backend().kind == BackendKind::Kernel
        || (choice.backend == Backend::Auto && failpoint::ENGINE_BARE.is_set())
}

/// Peers that ask for us by the relay, which a bare engine cannot answer. Performs no I/O.
#[derive(Debug, Default)]
pub(super) struct Knocks(BTreeMap<u32, Knock>);

#[derive(Debug, Clone, Copy)]
struct Knock {
    first: Instant,
    last: Instant,
}

impl Knocks {
    /// A peer without a session has asked. `true` if it has had long enough to be reached directly.
    pub(super) fn hear(&mut self, peer: u32, now: Instant) -> bool {
        if self.0.len() >= PEERS_PER_MAP_MAX && !self.0.contains_key(&peer) {
            return false;
        }
        let knock = self.0.entry(peer).or_insert(Knock { first: now, last: now });
        if now.saturating_duration_since(knock.last) > FORGOTTEN {
            knock.first = now;
        }
        knock.last = now;
        now.saturating_duration_since(knock.first) >= PATIENCE
    }

    /// It has a session.
    pub(super) fn answered(&mut self, peer: u32) {
        self.0.remove(&peer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_need_is_remembered_for_a_while_and_only_where_there_is_a_choice() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::open(&folder.path().join("state")).unwrap();
        let now = UtcDateTime::from_unix_timestamp(1_800_000_000).unwrap();
        let of = |wanted, now| Choice::of(wanted, &state, now);
        assert_eq!(of(Backend::Auto, now), Choice { backend: Backend::Auto, why_not_kernel: None });
        Choice::remember(&state, "bravo needs the relay".into(), now);
        let later = now + REMEMBERED;
        let table = [
            (Backend::Auto, now, Backend::Userspace, true),
            (Backend::Auto, later - Duration::from_secs(1), Backend::Userspace, true),
            (Backend::Auto, later, Backend::Auto, false),
            (Backend::Auto, now - Duration::from_secs(1), Backend::Auto, false),
            (Backend::Kernel, now, Backend::Kernel, false),
            (Backend::Userspace, now, Backend::Userspace, false),
        ];
        for (wanted, at, backend, says_why) in table {
            let choice = of(wanted, at);
            assert_eq!(
                (choice.backend, choice.why_not_kernel.is_some()),
                (backend, says_why),
                "{wanted:?} {at}"
            );
        }
        state.forget_everything().unwrap();
        assert_eq!(of(Backend::Auto, now).backend, Backend::Auto, "it was of the mesh that was left");
        // What cannot be read costs the memory, not the node.
        state.write(ENGINE_FILE, b"{").unwrap();
        assert_eq!(of(Backend::Auto, now).backend, Backend::Auto);
    }

    #[test]
    fn a_peer_that_keeps_asking_is_heard_and_one_that_was_reached_is_not() {
        let (mut knocks, start) = (Knocks::default(), Instant::now());
        let at = |secs| start + Duration::from_secs(secs);
        assert!(!knocks.hear(2, at(0)));
        assert!(!knocks.hear(2, at(9)));
        knocks.answered(2);
        assert!(!knocks.hear(2, at(10)), "it was reached meanwhile: anew");
        assert!(!knocks.hear(3, at(19)), "each by itself");
        assert!(knocks.hear(2, at(20)));
        // Two single probes far apart are no need.
        assert!(!knocks.hear(3, at(19 + 91)));
        assert!(knocks.hear(3, at(19 + 91 + 10)));
        for peer in 0..2 * u32::try_from(PEERS_PER_MAP_MAX).unwrap() {
            knocks.hear(peer, at(200));
        }
        assert!(knocks.0.len() <= PEERS_PER_MAP_MAX);
    }
}
