//! Changes of WireGuard keys, ours and the peers', without a gap: the new key stands beside the old one until
//! both sides have a session under it.
//!
//! | who changes | whoever speaks with it |
//! |---|---|
//! | has a certificate with both keys, and listens on both | learns of the certificate, adds the new key beside the old one |
//! | sees sessions under the new key with everybody | has a session under the new key: the allowed IPs move there |
//! | drops the old key, then renews without it | learns of that certificate, removes the old key |
//!
//! An engine with room for one key changes it in place a moment after its certificate has come: what lies between is
//! one handshake.

use std::time::{Duration, Instant};

use mesh_core::NodeId;
use mesh_tunnel::{PrivateKey, PublicKey, TunnelError};

use super::{Worker, place_of};
use crate::identity::Active;
use crate::join::wireguard_key;
use crate::network::overlay;

/// The old key lives on for so long after everybody has a session under the new one: what is under way arrives.
const LINGERS: Duration = Duration::from_secs(2);
/// Peers that have not heard of the new key by then are cut off until they do: their certificates come with the
/// controller's map, so they have no controller.
const OVERLAP_MAX: Duration = Duration::from_secs(300);
/// How often a change under way is looked at.
const LOOK: Duration = Duration::from_millis(250);
/// An engine that can have only one key changes to the next so long after its certificate came: the peers have heard
/// of it by then, let us in under it at once, and only a handshake lies between.
const IN_PLACE_DELAY: Duration = Duration::from_secs(3);

/// The keys of one peer that are in the tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PeerKeys {
    /// The one with the allowed IPs.
    pub(super) in_use: [u8; 32],
    /// A newer one that has no session yet, or the one before.
    pub(super) beside: Option<[u8; 32]>,
}

/// What to do about a peer whose certificate now lists other keys than before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum KeyStep {
    Stay,
    /// Put this newer key beside the one in use.
    Add([u8; 32]),
    /// Take this key away; the one in use stays.
    Remove([u8; 32]),
    /// Move over to this newer key that stands beside, and take the old one away.
    Finish([u8; 32]),
    /// Nothing that is in the tunnel is listed any more: begin anew.
    Replace,
}

impl PeerKeys {
    pub(super) fn of(key: [u8; 32]) -> Self {
        Self { in_use: key, beside: None }
    }

    pub(super) fn all(self) -> impl Iterator<Item = [u8; 32]> {
        std::iter::once(self.in_use).chain(self.beside)
    }

    /// The next step towards `listed`: one or two keys, newest first.
    pub(super) fn step(self, listed: &[[u8; 32]]) -> KeyStep {
        let newest = listed.first().copied();
        match (listed.contains(&self.in_use), self.beside) {
            (true, Some(beside)) if !listed.contains(&beside) => KeyStep::Remove(beside),
            (true, None) => match newest.filter(|newest| *newest != self.in_use) {
                Some(newest) => KeyStep::Add(newest),
                None => KeyStep::Stay,
            },
            (true, Some(_)) => KeyStep::Stay,
            (false, Some(beside)) if listed.contains(&beside) => KeyStep::Finish(beside),
            (false, _) => KeyStep::Replace,
        }
    }
}

/// Our own change of keys while both are in use.
pub(super) struct OwnChange {
    key: PublicKey,
    began: Instant,
    /// The key itself, if it is to take the place of the old one and cannot stand beside it.
    in_place: Option<PrivateKey>,
    /// Since when everybody has a session under the new key.
    ready: Option<Instant>,
}

impl Worker {
    /// Takes the keys of a new certificate: the newest follows the one in use.
    pub(super) fn rekey(&mut self, active: &Active) {
        let newest = wireguard_key(&active.identity.wireguard_keys[0]);
        let (place, newest) = match (place_of(&active.identity), newest) {
            (Ok(place), Ok(newest)) => (place, newest),
            (Err(failure), _) | (_, Err(failure)) => {
                return self.findings.raise_failure("identity/keys", "this node's keys", &failure);
            }
        };
        self.place.wireguard_keys = place.wireguard_keys;
        let (current, next) = (self.tunnel.public_key(), newest.public());
        if next == current {
            if self.own_change.take().is_some() {
                tracing::info!("the change of WireGuard keys is called off");
                self.tunnel.drop_next_key();
            }
            return self.tell_settled();
        }
        if self.own_change.as_ref().is_some_and(|change| change.key == next) {
            return;
        }
        let began = self.clock.own().now();
        let vouched = self.place.wireguard_keys.contains(&current.0);
        let taken = match vouched {
            true => self.tunnel.add_next_key(newest.clone()),
            // The old key is vouched for no more: nobody may use it for another moment.
            false => Err(TunnelError::Unsupported { backend: "certificate", action: "keep the old key" }),
        };
        let taken = match taken {
            Ok(()) => {
                tracing::info!(key = %next, "a new WireGuard key stands beside the old one");
                self.own_change = Some(OwnChange { key: next, began, in_place: None, ready: None });
                Ok(())
            }
            Err(TunnelError::Unsupported { .. }) if vouched => {
                tracing::info!(key = %next, "a new WireGuard key takes the old one's place in a moment");
                self.own_change = Some(OwnChange { key: next, began, in_place: Some(newest), ready: None });
                Ok(())
            }
            Err(TunnelError::Unsupported { .. }) => {
                self.own_change = None;
                self.tunnel.rotate_key(newest).inspect(|()| self.tell_settled())
            }
            Err(error) => Err(error),
        };
        match taken {
            Ok(()) => self.findings.clear("identity/keys"),
            Err(error) => {
                let failure = overlay::tunnel_failure(error);
                self.findings.raise_failure("identity/keys", "this node's keys", &failure);
            }
        }
    }

    /// Ends our own change of keys once everybody has followed, or long enough was waited.
    pub(super) fn advance_own_change(&mut self) {
        let now = self.clock.own().now();
        let Some(change) = &mut self.own_change else { return };
        if change.in_place.is_some() {
            if now >= change.began + IN_PLACE_DELAY {
                self.change_in_place();
            }
            return;
        }
        let next = self.tunnel.peers_of_next_key();
        let followed = |key| next.iter().any(|peer| peer.public_key == key && peer.has_session);
        let waiting =
            self.tunnel.peers().iter().filter(|peer| peer.has_session && !followed(peer.public_key)).count();
        change.ready = change.ready.filter(|_| waiting == 0).or((waiting == 0).then_some(now));
        let over = now >= change.began + OVERLAP_MAX;
        if !over && change.ready.is_none_or(|ready| now < ready + LINGERS) {
            return;
        }
        self.tunnel.switch_to_next_key();
        self.own_change = None;
        tracing::info!(key = %self.tunnel.public_key(), waiting, "the old WireGuard key is dead");
        self.tell_settled();
    }

    /// The new key is ours from now on, the old one dead: peers with a session are greeted under it.
    fn change_in_place(&mut self) {
        let Some(OwnChange { in_place: Some(key), .. }) = self.own_change.take() else { return };
        match self.tunnel.rotate_key(key) {
            Ok(()) => {
                tracing::info!(key = %self.tunnel.public_key(), "the old WireGuard key is dead");
                self.tell_settled();
            }
            Err(error) => {
                let failure = overlay::tunnel_failure(error);
                self.findings.raise_failure("identity/keys", "this node's keys", &failure);
            }
        }
    }

    /// Says which key is in sole use, so that the certificate may forget the other.
    pub(super) fn tell_settled(&self) {
        self.outlets.settled_key.send_replace(Some(self.tunnel.public_key().0));
    }

    /// When a change under way is looked at next: ours, or on an engine that must be asked a peer's.
    pub(super) fn own_change_timeout(&self) -> Option<Instant> {
        let changing = self.own_change.is_some() || (self.bare && self.keys_are_changing());
        changing.then(|| self.clock.own().now() + LOOK)
    }

    /// A session under `key` is in use: if it is the newer one of a peer, its allowed IPs move there.
    pub(super) fn peer_changes_over(&mut self, id: NodeId, key: PublicKey) {
        let (Some(peer), Some(keys)) = (self.current.get(&id.0), self.keys.get_mut(&id.0)) else { return };
        if key.0 != peer.wireguard_key() || key.0 == keys.in_use {
            return;
        }
        match self.tunnel.hand_over(&PublicKey(keys.in_use), &key) {
            Ok(()) => {
                tracing::info!(peer = peer.leaf.name, %key, "peer has changed its WireGuard key");
                *keys = PeerKeys { in_use: key.0, beside: Some(keys.in_use) };
            }
            // The old key goes with the peer's next certificate, and the new one takes its place then.
            Err(error) => tracing::warn!(peer = peer.leaf.name, %error, "addresses stay with the old key"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: [u8; 32] = [1; 32];
    const NEW: [u8; 32] = [2; 32];
    const THIRD: [u8; 32] = [3; 32];

    #[test]
    fn each_certificate_asks_for_one_step() {
        let table = [
            (PeerKeys::of(OLD), &[OLD][..], KeyStep::Stay),
            (PeerKeys::of(OLD), &[NEW, OLD], KeyStep::Add(NEW)),
            (PeerKeys { in_use: OLD, beside: Some(NEW) }, &[NEW, OLD], KeyStep::Stay),
            (PeerKeys { in_use: NEW, beside: Some(OLD) }, &[NEW, OLD], KeyStep::Stay),
            (PeerKeys { in_use: NEW, beside: Some(OLD) }, &[NEW], KeyStep::Remove(OLD)),
            // The certificate without the old key came before a session under the new one.
            (PeerKeys { in_use: OLD, beside: Some(NEW) }, &[NEW], KeyStep::Finish(NEW)),
            // A change that was called off.
            (PeerKeys { in_use: OLD, beside: Some(NEW) }, &[OLD], KeyStep::Remove(NEW)),
            // Certificates in between were missed.
            (PeerKeys::of(OLD), &[NEW], KeyStep::Replace),
            (PeerKeys::of(OLD), &[THIRD, NEW], KeyStep::Replace),
            (PeerKeys { in_use: NEW, beside: Some(OLD) }, &[THIRD, NEW], KeyStep::Remove(OLD)),
        ];
        for (keys, listed, step) in table {
            assert_eq!(keys.step(listed), step, "{keys:?} {listed:?}");
        }
    }
}
