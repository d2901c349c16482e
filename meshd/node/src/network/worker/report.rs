//! What the task tells of itself.

use std::collections::BTreeMap;

use super::Worker;
use crate::network::backend::{backend_line, backend_name, offloads};
use crate::network::{Inspection, Knowledge, NetworkStatus, PeerView, overlay};

impl Worker {
    pub(super) fn knowledge(&self) -> Knowledge {
        Knowledge {
            cursor: self.roster.cursor().filter(|_| !self.map_unsaved).cloned(),
            crls: self.trust.crl_haves(),
            backend: backend_line(self.tunnel.as_ref()),
            wireguard_port: self.tunnel.listen_port(),
        }
    }

    pub(super) fn status(&self) -> NetworkStatus {
        let stats: BTreeMap<[u8; 32], _> =
            self.tunnel.peers().into_iter().map(|stats| (stats.public_key.0, stats)).collect();
        let peers = self.current.iter().map(|(id, peer)| {
            let key = peer.wireguard_key();
            let stats = stats.get(&key);
            PeerView {
                name: peer.leaf.name.clone(),
                ipv4: peer.leaf.ipv4,
                ipv6: peer.leaf.ipv6,
                wireguard_key: key,
                endpoint: stats.and_then(|stats| stats.endpoint),
                candidates: self.candidates_of(*id),
                last_handshake: stats.and_then(|stats| stats.last_handshake),
                has_session: stats.is_some_and(|stats| stats.has_session),
                rtt: stats.and_then(|stats| stats.rtt),
                lease_ends: peer.leaf.chain_not_after,
                rx_bytes: stats.map_or(0, |stats| stats.rx_bytes),
                tx_bytes: stats.map_or(0, |stats| stats.tx_bytes),
                tags: peer.tags.clone(),
                inbound: peer.inbound,
                outbound: peer.outbound,
            }
        });
        NetworkStatus {
            interface: self.tunnel.name().to_owned(),
            backend: backend_name(self.tunnel.as_ref()).to_owned(),
            offloads: offloads(self.tunnel.as_ref()),
            wireguard_port: self.tunnel.listen_port(),
            peers: peers.collect(),
            roster_seq: self.roster.seq(),
            crl_number: self.trust.crls().map(|trusted| trusted.message.number).max().unwrap_or(0),
            firewall_ready: self.firewall.is_some(),
            tags: self.roster.own().tags.clone(),
        }
    }

    pub(super) async fn inspect(&self) -> Inspection {
        let firewall =
            self.firewall_problem().await.unwrap_or_else(|error| Some(mesh_runtime::chain(&error)));
        let overlay = overlay::missing(&self.host, self.tunnel.name(), &self.place, &self.findings).await;
        Inspection { firewall, overlay: overlay.unwrap_or_else(|error| vec![mesh_runtime::chain(&error)]) }
    }
}
