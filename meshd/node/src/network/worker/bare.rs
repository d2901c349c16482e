//! Life with an engine that keeps its port to itself, as the kernel's does: what it costs shows, and where a peer
//! is cut off by it a node that may choose takes the other engine.

use std::collections::BTreeSet;

use mesh_tunnel::Backend;

use super::Worker;
use crate::findings::Severity;
use crate::network::Choice;

/// The findings that a peer can be reached by the relay alone, which this engine cannot use.
const FINDINGS: &str = "engine/";

impl Worker {
    /// A peer asks for us by the relay: it may have tried all else in vain.
    pub(super) fn take_knock(&mut self, id: u32) {
        let Some(name) = self.current.get(&id).map(|peer| peer.leaf.name.clone()) else { return };
        if !self.bare || self.reopen {
            return;
        }
        if self.with_session().contains(&id) {
            return self.knocks.answered(id);
        }
        if !self.knocks.hear(id, self.clock.own().now()) {
            return;
        }
        let why =
            format!("{name} cannot be reached directly, and the kernel's WireGuard cannot use the relay");
        if self.choice.backend == Backend::Auto {
            tracing::warn!(
                peer = name,
                "no direct path, and none by the relay on this engine: on to userspace"
            );
            Choice::remember(&self.state, why, self.clock.now());
            self.reopen = true;
        } else {
            let next = "take --backend auto or userspace, or open a UDP path between the two";
            self.findings.raise(finding(id), Severity::Warn, "this host's WireGuard", why, next);
        }
    }

    /// Names the peers that are to hear of us by the relay: theirs may be an engine like ours.
    pub(super) fn publish_unreached(&mut self) {
        if !self.bare {
            return;
        }
        let reached = self.with_session();
        reached.iter().for_each(|id| self.knocks.answered(*id));
        let unreached: Vec<u32> = self.current.keys().copied().filter(|id| !reached.contains(id)).collect();
        let standing: Vec<String> = unreached.iter().copied().map(finding).collect();
        self.findings.clear_others(FINDINGS, &standing);
        // Also when they are the same as before: each time they are asked again.
        if !unreached.is_empty() {
            self.outlets.unreached.send_replace(unreached);
        }
    }

    /// The kernel tells of a peer's session under a new key only when it is asked, once a second by itself; traffic
    /// waits for that.
    pub(super) fn look_for_new_keys(&self) {
        if self.bare && self.keys_are_changing() {
            self.tunnel.peers();
        }
    }

    /// Whether some peer has a newer key beside the one in use.
    pub(super) fn keys_are_changing(&self) -> bool {
        self.keys.iter().any(|(id, keys)| {
            let newest = self.current.get(id).map(|peer| peer.wireguard_key());
            keys.beside.is_some() && keys.beside == newest
        })
    }

    fn with_session(&self) -> BTreeSet<u32> {
        let live = self.tunnel.peers().into_iter().filter(|peer| peer.has_session);
        live.filter_map(|peer| self.ids.get(&peer.public_key.0).copied()).collect()
    }
}

fn finding(peer: u32) -> String {
    format!("{FINDINGS}{peer:08}")
}
