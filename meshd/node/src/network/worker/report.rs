//! What the task tells of itself.

use std::collections::{BTreeMap, BTreeSet};

use mesh_tunnel::PeerStats;

use super::Worker;
use crate::network::backend::{backend_line, backend_name, offloads};
use crate::network::{Inspection, KERNEL_LACKS, Knowledge, NetworkStatus, PeerView, overlay};

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
        let mut stats: BTreeMap<[u8; 32], PeerStats> = BTreeMap::new();
        // While we change our key each peer is there twice, and while it changes its own, twice again.
        for next in self.tunnel.peers().into_iter().chain(self.tunnel.peers_of_next_key()) {
            stats.entry(next.public_key.0).and_modify(|known| add(known, &next)).or_insert(next);
        }
        let peers = self.current.iter().map(|(id, peer)| {
            let keys = self.keys.get(id);
            let key = keys.map_or(peer.wireguard_key(), |keys| keys.in_use);
            let mut merged = stats.get(&key).cloned();
            let beside = keys.and_then(|keys| keys.beside).and_then(|key| stats.get(&key));
            if let (Some(merged), Some(beside)) = (&mut merged, beside) {
                add(merged, beside);
            }
            let stats = merged.as_ref();
            let quality = self.prober.quality(peer.leaf.ipv4).unwrap_or_default();
            PeerView {
                id: *id,
                name: peer.leaf.name.clone(),
                ipv4: peer.leaf.ipv4,
                ipv6: peer.leaf.ipv6,
                wireguard_key: key,
                endpoint: stats.and_then(|stats| stats.endpoint),
                candidates: self.candidates_of(*id),
                last_handshake: stats.and_then(|stats| stats.last_handshake),
                has_session: stats.is_some_and(|stats| stats.has_session),
                rtt: quality.rtt.or(stats.and_then(|stats| stats.rtt)),
                handshake_rtt: stats.and_then(|stats| stats.rtt),
                quality,
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
            why_not_kernel: self.choice.why_not_kernel.clone().or(self.tunnel.backend().why_not_kernel),
            lacks: if self.bare { KERNEL_LACKS.map(str::to_owned).to_vec() } else { Vec::new() },
            offloads: offloads(self.tunnel.as_ref()),
            wireguard_port: self.tunnel.listen_port(),
            peers: peers.collect(),
            roster_seq: self.roster.seq(),
            crl_number: self.trust.crls().map(|trusted| trusted.message.number).max().unwrap_or(0),
            firewall_ready: self.firewall.is_some(),
            tags: self.roster.own().tags.clone(),
        }
    }

    /// Has the peers probed that have a session.
    pub(super) fn measure_paths(&self) {
        let live: BTreeSet<[u8; 32]> = (self.tunnel.peers().into_iter())
            .chain(self.tunnel.peers_of_next_key())
            .filter(|peer| peer.has_session)
            .map(|peer| peer.public_key.0)
            .collect();
        let has_session =
            |id: &u32| self.keys.get(id).is_some_and(|keys| keys.all().any(|key| live.contains(&key)));
        let peers = self.current.iter().filter(|(id, _)| has_session(id));
        self.prober.set_peers(peers.map(|(_, peer)| peer.leaf.ipv4).collect());
    }

    pub(super) async fn inspect(&self) -> Inspection {
        let firewall =
            self.firewall_problem().await.unwrap_or_else(|error| Some(mesh_runtime::chain(&error)));
        let overlay = overlay::missing(&self.host, self.tunnel.name(), &self.place, &self.findings).await;
        Inspection { firewall, overlay: overlay.unwrap_or_else(|error| vec![mesh_runtime::chain(&error)]) }
    }
}

/// Sums up one peer that stands in the tunnel under two pairs of keys.
fn add(known: &mut PeerStats, other: &PeerStats) {
    known.last_handshake = match (known.last_handshake, other.last_handshake) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    };
    known.has_session |= other.has_session;
    known.endpoint = known.endpoint.or(other.endpoint);
    known.rtt = known.rtt.or(other.rtt);
    known.rx_bytes += other.rx_bytes;
    known.tx_bytes += other.tx_bytes;
}
