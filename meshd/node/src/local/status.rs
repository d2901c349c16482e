//! `Local.Status`.

use std::net::SocketAddr;
use std::time::Duration;

use mesh_core::endpoints::relayed_peer;
use mesh_proto::v1 as pb;

use crate::failure::Failure;
use crate::network::PeerView;
use crate::run::Node;

pub(super) async fn status(node: &Node) -> Result<pb::NodeStatus, Failure> {
    let version = env!("CARGO_PKG_VERSION").to_owned();
    let Ok(session) = node.session().await else {
        let findings = node.findings.list();
        return Ok(pb::NodeStatus { enrolled: false, findings, version, ..Default::default() });
    };
    let active = session.identities.active();
    let identity = &active.identity;
    let network = session.network.status().await?;
    let uplink = session.uplink.status();
    let now = node.clock.own().utc_now().unix_timestamp();
    Ok(pb::NodeStatus {
        enrolled: true,
        name: identity.name.clone(),
        ipv4: identity.ipv4.to_string(),
        ipv6: identity.ipv6.to_string(),
        trust_domain: identity.trust_domain.clone(),
        controller: uplink.controller.clone(),
        controller_connected: uplink.connected,
        controller_rtt_us: micros(uplink.rtt),
        backend: network.backend,
        why_not_kernel: network.why_not_kernel.unwrap_or_default(),
        backend_lacks: network.lacks,
        offloads: network.offloads,
        interface: network.interface,
        wireguard_port: u32::from(network.wireguard_port),
        not_after: active.not_after.unix_timestamp(),
        renews_at: active.renews_at.unix_timestamp(),
        peers: network.peers.iter().map(|peer| peer_status(peer, &uplink.controller, now)).collect(),
        findings: node.findings.list(),
        pairs: session.pairs.list().await?,
        crl_number: network.crl_number,
        tags: network.tags,
        roster_seq: network.roster_seq,
        version,
        serial: active.serial.clone().into(),
        controller_offset_secs: node.clock.offset_secs(),
    })
}

/// How a peer is reached: `direct ADDR`, `relay CONTROLLER` or `none`.
fn path(peer: &PeerView, controller: &str) -> String {
    peer.endpoint.filter(|_| peer.has_session).map_or_else(|| "none".to_owned(), |to| way(to, controller))
}

/// The way to an endpoint: `direct ADDR` or `relay CONTROLLER`.
pub(super) fn way(endpoint: SocketAddr, controller: &str) -> String {
    match relayed_peer(endpoint) {
        Some(_) => format!("relay {controller}"),
        None => format!("direct {endpoint}"),
    }
}

/// Where a peer's packets go on the underlay; `None` for a relayed one, whose endpoint stands for the relay.
pub(super) fn underlay(peer: &PeerView) -> Option<SocketAddr> {
    peer.endpoint.filter(|endpoint| relayed_peer(*endpoint).is_none())
}

fn peer_status(peer: &PeerView, controller: &str, now: i64) -> pb::PeerStatus {
    let path = path(peer, controller);
    let ago = |past: Duration| now.saturating_sub(i64::try_from(past.as_secs()).unwrap_or(i64::MAX));
    pb::PeerStatus {
        name: peer.name.clone(),
        ipv4: peer.ipv4.to_string(),
        ipv6: peer.ipv6.to_string(),
        path,
        last_handshake: peer.last_handshake.map_or(0, ago),
        rtt_us: peer.rtt.map_or(0, micros),
        lease_ends: peer.lease_ends.unix_timestamp(),
        rx_bytes: peer.rx_bytes,
        tx_bytes: peer.tx_bytes,
        tags: peer.tags.clone(),
        wireguard_public_key: peer.wireguard_key.to_vec().into(),
        inbound: peer.inbound,
        outbound: peer.outbound,
        endpoint: underlay(peer).map(|endpoint| endpoint.to_string()).unwrap_or_default(),
        probes: peer.quality.probes,
        probes_lost: peer.quality.lost,
    }
}

pub(super) fn micros(duration: Duration) -> u32 {
    u32::try_from(duration.as_micros()).unwrap_or(u32::MAX)
}
