//! Where the peers are: what is told, what the tunnel sees, what is kept for the next start.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use mesh_core::NodeId;
use mesh_core::endpoints::relayed_peer;
use mesh_core::peer_table::Action;
use mesh_proto::v1 as pb;
use mesh_tunnel::{PublicKey, TunnelEvent};

use super::Worker;
use crate::limits::{PEERS_PER_MAP_MAX, SIGHTINGS_MAX};
use crate::network::UnderlayNews;
use crate::network::endpoints::{candidates, own_endpoints};

impl Worker {
    pub(super) fn take_hints(&mut self, hints: pb::Hints) {
        let now = self.clock.own().now();
        if let Some(offer) = hints.underlay {
            self.outlets.offer.send_replace(offer);
        }
        for peer in hints.peers {
            if peer.endpoints.is_empty() {
                continue;
            }
            self.table.handle_candidates(NodeId(peer.node_id), &candidates(&peer.endpoints), now);
            if self.told.len() >= PEERS_PER_MAP_MAX && !self.told.contains_key(&peer.node_id) {
                continue;
            }
            self.told.insert(peer.node_id, peer.endpoints);
            self.told_changed = true;
        }
    }

    /// Takes up what the underlay task found out.
    pub(super) async fn take_underlay(&mut self, news: UnderlayNews) {
        let now = self.clock.own().now();
        let before = std::mem::replace(&mut self.underlay, news);
        self.table.handle_relay(self.underlay.relay, now);
        self.refresh_endpoints().await;
        // The first answer is news to others, not to us.
        let moved = before.mapped.is_some() && before.mapped != self.underlay.mapped;
        if moved && self.underlay.mapped.is_some() {
            tracing::info!(mapped = ?self.underlay.mapped, "this node is seen elsewhere");
            let peers = self.current.keys().copied().map(NodeId).collect();
            self.table.handle_moved(&peers, now);
        }
    }

    /// Tells the controller of peers that were seen where nobody said they are.
    pub(super) fn publish_seen(&self) {
        let seen = self
            .seen
            .iter()
            .take(SIGHTINGS_MAX)
            .map(|(id, address)| pb::sync_request::Seen { node_id: *id, address: address.to_string() });
        let seen: Vec<_> = seen.collect();
        self.outlets.seen.send_if_modified(|before| {
            let changed = *before != seen;
            *before = seen;
            changed
        });
    }

    fn note_seen(&mut self, id: NodeId, from: SocketAddr) {
        let told =
            self.told.get(&id.0).is_some_and(|told| candidates(told).iter().any(|(known, _)| *known == from));
        if told || !self.overlay.may_carry(from) {
            self.seen.remove(&id.0);
        } else if self.seen.len() < SIGHTINGS_MAX || self.seen.contains_key(&id.0) {
            self.seen.insert(id.0, from);
        }
    }

    pub(super) fn handle_event(&mut self, event: TunnelEvent) {
        let now = self.clock.own().now();
        match event {
            TunnelEvent::HandshakeDone { peer } => {
                if let Some(id) = self.id_of(&peer) {
                    self.peer_changes_over(id, peer);
                }
                // Where the tunnel sends to; had it been elsewhere, an event of its own would say so.
                if let Some(id) = self.id_of(&peer)
                    && let Some(endpoint) = self.table.endpoint(id)
                {
                    self.table.handle_authenticated(id, endpoint, now);
                }
            }
            TunnelEvent::EndpointChanged { peer, from } => {
                if let Some(id) = self.id_of(&peer) {
                    self.table.handle_authenticated(id, from, now);
                    self.note_seen(id, from);
                    self.told_changed = true;
                }
            }
            TunnelEvent::PathAnswered { peer, from, .. } => {
                // An answer by the relay moves nothing while there is a direct path.
                if let Some(id) = self.id_of(&peer)
                    && (relayed_peer(from).is_none() || self.table.endpoint(id) == Some(from))
                {
                    self.table.handle_authenticated(id, from, now);
                }
            }
            // An old key falls silent when its owner has dropped it, a new one is silent until its owner has it.
            TunnelEvent::PeerSilent { peer } => {
                let in_use = |id: &NodeId| self.keys.get(&id.0).is_some_and(|keys| keys.in_use == peer.0);
                if let Some(id) = self.id_of(&peer).filter(in_use) {
                    self.outlets.silence.send_modify(|count| *count = count.wrapping_add(1));
                    self.table.handle_no_reply(id, now);
                }
            }
            _ => {}
        }
    }

    fn id_of(&self, key: &PublicKey) -> Option<NodeId> {
        self.ids.get(&key.0).copied().map(NodeId)
    }

    /// Carries out what the peer table wants.
    pub(super) fn act(&mut self) {
        while let Some(action) = self.table.poll_action() {
            let (Action::SetEndpoint { peer, .. } | Action::Probe { peer, .. }) = action;
            let Some(keys) = self.keys.get(&peer.0) else { continue };
            match action {
                Action::SetEndpoint { endpoint, .. } => keys.all().for_each(|key| {
                    self.tunnel.set_endpoint(&PublicKey(key), endpoint);
                }),
                Action::Probe { endpoints, .. } => {
                    let key = PublicKey(keys.in_use);
                    // Where the engine cannot look beside, the table has moved the peer there already.
                    if !self.tunnel.probe(&key, &endpoints) {
                        self.tunnel.initiate_handshake(&key);
                    }
                }
            }
        }
    }

    pub(super) async fn refresh_endpoints(&mut self) {
        match self.host.addresses().await {
            Ok(addresses) => {
                let (interface, port) = (self.tunnel.name(), self.tunnel.listen_port());
                let endpoints = own_endpoints(self.overlay, &self.underlay, &addresses, interface, port);
                self.outlets.endpoints.send_if_modified(|before| {
                    let changed = *before != endpoints;
                    *before = endpoints;
                    changed
                });
            }
            Err(error) => tracing::warn!(error = mesh_runtime::chain(&error), "cannot list addresses"),
        }
    }

    /// Where a peer may be, the endpoint in use first.
    pub(super) fn candidates_of(&self, id: u32) -> Vec<SocketAddr> {
        let told = self.told.get(&id).map(|told| candidates(told)).unwrap_or_default();
        let direct = self.table.endpoint(NodeId(id)).filter(|endpoint| relayed_peer(*endpoint).is_none());
        let mut list: Vec<SocketAddr> = direct.into_iter().collect();
        for (address, _) in told {
            if !list.contains(&address) && self.overlay.may_carry(address) {
                list.push(address);
            }
        }
        list
    }

    pub(super) fn save_endpoints(&mut self) {
        if !std::mem::take(&mut self.told_changed) {
            return;
        }
        // Also of those that are no peers now: with a clock that is wrong or a map that is refused nobody is one,
        // and the next start without a controller shall still find them.
        let known: BTreeSet<u32> = self.current.keys().chain(self.told.keys()).copied().collect();
        let peers = known.into_iter().map(|node_id| {
            let told = self.told.get(&node_id).map(Vec::as_slice).unwrap_or_default();
            // The one in use leads, so that a start without a controller finds it first.
            let endpoints = self.candidates_of(node_id).into_iter().map(|address| {
                let address = address.to_string();
                let source = told.iter().find(|known| known.address == address);
                let source = source.map_or(pb::endpoint::Source::PeerSaw as i32, |known| known.source);
                pb::Endpoint { address, source }
            });
            pb::hints::PeerEndpoints { node_id, endpoints: endpoints.collect() }
        });
        let hints = pb::Hints { peers: peers.collect(), seen_from: Vec::new(), underlay: None };
        if let Err(error) = self.state.save_endpoints(&hints) {
            tracing::warn!(error = mesh_runtime::chain(&error), "endpoints are not stored");
        }
    }
}
