//! Where the peers are: what is told, what the tunnel sees, what is kept for the next start.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use mesh_core::NodeId;
use mesh_core::peer_table::Action;
use mesh_proto::v1 as pb;
use mesh_tunnel::{PublicKey, TunnelEvent};

use super::Worker;
use crate::limits::PEERS_PER_MAP_MAX;
use crate::network::endpoints::{candidates, own_endpoints};

impl Worker {
    pub(super) fn take_hints(&mut self, hints: pb::Hints) {
        let now = self.clock.own().now();
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
                    self.told_changed = true;
                }
            }
            // An old key falls silent when its owner has dropped it, a new one is silent until its owner has it.
            TunnelEvent::PeerSilent { peer } => {
                let in_use = |id: &NodeId| self.keys.get(&id.0).is_some_and(|keys| keys.in_use == peer.0);
                if let Some(id) = self.id_of(&peer).filter(in_use) {
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
            let (Action::SetEndpoint { peer, .. } | Action::Handshake { peer }) = action;
            let Some(keys) = self.keys.get(&peer.0) else { continue };
            match action {
                Action::SetEndpoint { endpoint, .. } => keys.all().for_each(|key| {
                    self.tunnel.set_endpoint(&PublicKey(key), endpoint);
                }),
                Action::Handshake { .. } => {
                    self.tunnel.initiate_handshake(&PublicKey(keys.in_use));
                }
            }
        }
    }

    pub(super) async fn refresh_endpoints(&mut self) {
        match self.host.addresses().await {
            Ok(addresses) => {
                let (interface, port) = (self.tunnel.name(), self.tunnel.listen_port());
                let endpoints = own_endpoints(self.overlay, &self.configured, &addresses, interface, port);
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
        let mut list: Vec<SocketAddr> = self.table.endpoint(NodeId(id)).into_iter().collect();
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
        let hints = pb::Hints { peers: peers.collect(), seen_from: Vec::new() };
        if let Err(error) = self.state.save_endpoints(&hints) {
            tracing::warn!(error = mesh_runtime::chain(&error), "endpoints are not stored");
        }
    }
}
