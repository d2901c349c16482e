//! World's parts as messages.

use mesh_core::world::{CertificateState, Node, NodeState, Token};
use mesh_core::{CertificateRecord, Owner, UtcTime, World};
use mesh_proto::v1 as pb;

use crate::presence::NodePresence;
use crate::status::Problem;

/// A certificate that World knows.
pub(crate) fn certificate_message(world: &World, certificate: &CertificateState) -> pb::Certificate {
    let domain = world.domain().map(ToString::to_string).unwrap_or_default();
    let (revoked_at, reason) = match certificate.revoked {
        Some(revoked) => (revoked.at.unix(), revoked.reason.to_string()),
        None => (0, String::new()),
    };
    let owner = owner_name(world, &certificate.owner);
    pb::Certificate {
        serial: certificate.serial.0.to_vec().into(),
        profile: certificate.profile.clone(),
        name: pair_or_identity(&certificate.pair_name, &certificate.owner, &owner),
        names: names(&certificate.names, &certificate.ips),
        spiffe: spiffe(&domain, kind_of(world, &certificate.profile), &certificate.owner, &owner),
        owner,
        not_before: certificate.not_before.unix(),
        not_after: certificate.not_after.unix(),
        revoked_at,
        reason,
        key_hash: certificate.key_hash.0.to_vec().into(),
        leaf: Default::default(),
        issuer_key_id: certificate.issuer_key_id.0.clone().into(),
        ..Default::default()
    }
}

/// A certificate as it was issued, without looking at World.
pub(crate) fn issued_message(domain: &str, certificate: &CertificateRecord) -> pb::Certificate {
    // The node's name stands in its identity, and in front of the domain in nothing else for sure.
    let owner = match &certificate.owner {
        Owner::Node(_) => certificate
            .names
            .first()
            .and_then(|name| name.as_str().split('.').next())
            .unwrap_or_default()
            .to_owned(),
        Owner::Service { node, .. } => format!("node {node}"),
        other => plain_owner(other),
    };
    pb::Certificate {
        serial: certificate.serial.0.to_vec().into(),
        profile: certificate.profile.clone(),
        name: pair_or_identity(&certificate.pair_name, &certificate.owner, &owner),
        names: names(&certificate.names, &certificate.ips),
        spiffe: match certificate.owner {
            Owner::Service { .. } => String::new(),
            _ => spiffe(domain, &certificate.profile, &certificate.owner, &owner),
        },
        owner,
        not_before: certificate.not_before.unix(),
        not_after: certificate.not_after.unix(),
        revoked_at: 0,
        reason: String::new(),
        key_hash: certificate.key_hash.0.to_vec().into(),
        leaf: Default::default(),
        issuer_key_id: certificate.issuer_key_id.0.clone().into(),
        ..Default::default()
    }
}

/// The same with what policy says to its renewal.
pub(crate) fn judged_message(world: &World, certificate: &CertificateState, now: UtcTime) -> pb::Certificate {
    let mut message = certificate_message(world, certificate);
    if certificate.is_live(now)
        && let Some(refusal) = world.renewal_refused(certificate)
    {
        let problem = Problem::from(refusal);
        (message.refused_code, message.refused_why) = (problem.code.label(), problem.why);
    }
    message
}

/// The built-in profile that one of the policy narrows; the name itself of a built-in one.
fn kind_of<'a>(world: &'a World, profile: &'a str) -> &'a str {
    world.profile(profile).map_or(profile, |(_, custom)| custom.kind.as_str())
}

/// Puts the name of a node that still exists in the place of its index.
pub(crate) fn name_owner(world: &World, certificate: &mut pb::Certificate) {
    let id = certificate.owner.strip_prefix("node ").and_then(|id| id.parse().ok());
    if let Some(node) = id.and_then(|id| world.node(mesh_core::NodeId(id))) {
        certificate.owner = node.name.to_string();
    }
}

fn names(dns: &[mesh_core::DnsName], ips: &[std::net::IpAddr]) -> Vec<String> {
    dns.iter().map(ToString::to_string).chain(ips.iter().map(ToString::to_string)).collect()
}

fn pair_or_identity(pair_name: &str, owner: &Owner, owner_name: &str) -> String {
    match owner {
        Owner::Service { .. } | Owner::Detached { .. } => pair_name.to_owned(),
        _ => owner_name.to_owned(),
    }
}

fn owner_name(world: &World, owner: &Owner) -> String {
    match owner {
        Owner::Node(node) | Owner::Service { node, .. } => {
            world.node(*node).map_or_else(|| format!("node {node}"), |node| node.name.to_string())
        }
        other => plain_owner(other),
    }
}

fn plain_owner(owner: &Owner) -> String {
    match owner {
        Owner::Controller { name } => name.clone(),
        Owner::Operator(name) | Owner::Detached { operator: Some(name) } => name.to_string(),
        Owner::Detached { operator: None } => "local root".into(),
        Owner::Node(node) | Owner::Service { node, .. } => format!("node {node}"),
    }
}

fn spiffe(domain: &str, profile: &str, owner: &Owner, owner_name: &str) -> String {
    match owner {
        Owner::Controller { name } => format!("spiffe://{domain}/controller/{name}"),
        Owner::Node(_) => format!("spiffe://{domain}/node/{owner_name}"),
        Owner::Operator(name) => format!("spiffe://{domain}/operator/{name}"),
        Owner::Service { name, .. } if profile == mesh_ca::Profile::Peer.name() => {
            let label = match name.parse::<std::net::IpAddr>() {
                Ok(_) => owner_name,
                Err(_) => name.split('.').next().unwrap_or(name),
            };
            format!("spiffe://{domain}/service/{owner_name}/{label}")
        }
        Owner::Service { .. } | Owner::Detached { .. } => String::new(),
    }
}

/// A node with what is known of it live.
pub(crate) fn node_message(world: &World, node: &Node, presence: &NodePresence, now: UtcTime) -> pb::Node {
    let (revoked_at, reason) = match node.state {
        NodeState::Revoked { at, reason } => (at.unix(), reason.to_string()),
        _ => (0, String::new()),
    };
    let identity = node.current.as_ref();
    let not_after = identity.map_or(UtcTime::EPOCH, |identity| identity.not_after);
    let renews_at = identity.map_or(0, |identity| renewal_due(identity.not_before, not_after).unix());
    pb::Node {
        id: node.id.0,
        name: node.name.to_string(),
        ipv4: node.ipv4.map(|ip| ip.to_string()).unwrap_or_default(),
        ipv6: world.ipv6_of(node.id).map(|ip| ip.to_string()).unwrap_or_default(),
        tags: node.tags.iter().map(ToString::to_string).collect(),
        state: node_state(node, presence, now).into(),
        connected: presence.connected,
        last_seen: match presence.connected {
            true => now.unix(),
            false => presence.last_seen.map_or(0, UtcTime::unix),
        },
        not_after: not_after.unix(),
        renews_at,
        serial: identity.map(|identity| identity.serial.0.to_vec()).unwrap_or_default().into(),
        key_hash: identity.map_or(node.enrollment.key_hash, |identity| identity.key_hash).0.to_vec().into(),
        wireguard_public_key: node.wireguard.first().map(|key| key.0.to_vec()).unwrap_or_default().into(),
        enrolled_at: node.enrolled_at.map_or(0, UtcTime::unix),
        revoked_at,
        reason,
        endpoints: presence.endpoints.clone(),
        version: presence.version.clone(),
        backend: presence.backend.clone(),
        cut_off_on: 0,
        cut_off_of: 0,
        findings: presence.findings.clone(),
        acknowledged_seq: presence.acknowledged_seq,
    }
}

/// An identity renews after a third of its life, give or take the node's own jitter.
fn renewal_due(not_before: UtcTime, not_after: UtcTime) -> UtcTime {
    not_before + not_after.since(not_before) / 3
}

/// pending | ok | late | expired | offline | revoked. Late: the certificate should long have been renewed.
fn node_state(node: &Node, presence: &NodePresence, now: UtcTime) -> &'static str {
    match (&node.state, &node.current) {
        (NodeState::Pending { .. }, _) => "pending",
        (NodeState::Revoked { .. }, _) => "revoked",
        (NodeState::Active, None) => "pending",
        (NodeState::Active, Some(identity)) => {
            let life = identity.not_after.since(identity.not_before);
            if now >= identity.not_after {
                "expired"
            } else if now >= identity.not_before + life * 2 / 3 {
                "late"
            } else if !presence.connected {
                "offline"
            } else {
                "ok"
            }
        }
    }
}

/// A token without its secret, which nobody has any more.
pub(crate) fn token_message(world: &World, token: &Token, now: UtcTime) -> pb::Token {
    pb::Token {
        id: token.id.0.to_vec().into(),
        tags: token.tags.iter().map(ToString::to_string).collect(),
        name: token.name.as_ref().map(ToString::to_string).unwrap_or_default(),
        uses: token.uses,
        used: token.used,
        created_at: token.created_at.unix(),
        expires_at: token.expires_at.unix(),
        require_approval: token.require_approval,
        created_by: world.who(&token.created_by),
        state: token.state(now).as_str().into(),
    }
}
