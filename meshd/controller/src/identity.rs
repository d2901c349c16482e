//! A node's identity: what its certificate says, and what the node is told with it.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use mesh_ca::{Identity, Profile};
use mesh_core::world::Mesh;
use mesh_core::{DnsName, NodeId, NodeName, OperatorName, Owner, Refusal, UtcTime, WgKey, World};
use mesh_proto::v1 as pb;
use mesh_runtime::SharedClock;

use crate::authority::{Authority, LeafRequest, label};
use crate::directory::Directory;
use crate::status::Problem;

/// What was fixed when the mesh was made; there is always one once the controller runs.
pub(crate) fn mesh_of(world: &World) -> Result<&Mesh, Problem> {
    world.mesh().ok_or_else(|| Refusal::MeshMissing.into())
}

/// What a node's leaf says: everything from World, nothing from the CSR.
pub(crate) fn leaf_of_node(
    world: &World,
    node: NodeId,
    name: &NodeName,
    ipv4: Ipv4Addr,
    wireguard: &[WgKey],
) -> Result<LeafRequest, Problem> {
    let mesh = mesh_of(world)?;
    let dns: DnsName = name.under(&mesh.domain).ok_or_else(|| {
        Problem::new(
            pb::ErrorCode::NameInvalid,
            format!("name {name} is too long below {}", mesh.domain),
            "choose a shorter name",
        )
    })?;
    let name = label(name.as_str()).map_err(|source| {
        Problem::new(pb::ErrorCode::NameInvalid, format!("{name}: {source}"), "choose another name")
    })?;
    Ok(LeafRequest {
        profile: Profile::Node,
        identity: Some(Identity::Node { name }),
        owner: Owner::Node(node),
        names: vec![dns],
        ips: vec![IpAddr::V4(ipv4), IpAddr::V6(mesh.ipv6_of(node))],
        wireguard: wireguard.iter().map(|key| key.0).collect(),
        pair_name: String::new(),
        lifetime: Profile::Node.default_lifetime(),
        custom: None,
    })
}

/// The slot of a node's current identity. Its life began when it was issued; `not_before` is backdated.
pub(crate) fn renew_at(node: NodeId, identity: &mesh_core::world::Identity) -> UtcTime {
    let issued = (identity.not_before + mesh_ca::CLOCK_SKEW_ALLOWANCE).min(identity.not_after);
    mesh_core::rotation::slot(node, issued, identity.not_after.since(issued))
}

/// The trusted issuing CAs: `first` leads, or the one that issues now.
pub(crate) fn issuer_ders(world: &World, first: Option<&mesh_core::KeyId>) -> Vec<bytes::Bytes> {
    let first = first.or(world.bundle().map(|bundle| &bundle.issuer));
    let mut issuers: Vec<_> = world.trusted_authorities().filter(|authority| !authority.is_root).collect();
    issuers.sort_by_key(|issuer| Some(&issuer.key_id) != first);
    issuers.into_iter().map(|issuer| issuer.der.clone().into()).collect()
}

/// The trusted roots: the one that join tokens pin leads.
pub(crate) fn root_ders(world: &World) -> Vec<bytes::Bytes> {
    let active = world.active_root().map(|root| &root.key_id);
    let mut roots: Vec<_> = world.trusted_authorities().filter(|authority| authority.is_root).collect();
    roots.sort_by_key(|root| Some(&root.key_id) != active);
    roots.into_iter().map(|root| root.der.clone().into()).collect()
}

/// What a node is to trust, with the history that leads there.
pub(crate) fn trust_bundle(world: &World) -> Option<pb::TrustBundle> {
    let bundle = world.bundle()?;
    Some(pb::TrustBundle {
        version: bundle.version,
        roots: root_ders(world),
        issuers: issuer_ders(world, None),
        lineage: world.history().into_iter().map(|cross| cross.der.clone().into()).collect(),
        issuer_key_id: bundle.issuer.0.clone().into(),
    })
}

/// Builds the answers that hand out identities.
#[derive(Debug, Clone)]
pub(crate) struct IdentityAnswers {
    pub(crate) directory: Arc<Directory>,
    pub(crate) authority: Arc<Authority>,
    pub(crate) clock: SharedClock,
    /// `host:port` of every controller.
    pub(crate) controllers: Vec<String>,
}

impl IdentityAnswers {
    /// Everything a node needs to work, with its current leaf.
    pub(crate) fn identity(&self, node: NodeId) -> Result<pb::NodeIdentity, Problem> {
        let now = UtcTime::from(self.clock.utc_now());
        self.directory.read(|world| {
            let mesh = mesh_of(world)?;
            let node = world.node(node).ok_or(Refusal::NodeNotFound { node })?;
            let identity =
                node.current.as_ref().ok_or_else(|| Refusal::NodePending { name: node.name.clone() })?;
            let issuer = world.certificate(&identity.serial).map(|leaf| &leaf.issuer_key_id);
            Ok(pb::NodeIdentity {
                leaf: identity.leaf.clone().into(),
                issuers: issuer_ders(world, issuer),
                roots: root_ders(world),
                trust: trust_bundle(world),
                trust_domain: mesh.domain.to_string(),
                mesh_id: mesh.mesh_id.to_vec().into(),
                node_id: node.id.0,
                name: node.name.to_string(),
                ipv4: node.ipv4.map(|ip| ip.to_string()).unwrap_or_default(),
                ipv6: mesh.ipv6_of(node.id).to_string(),
                ipv4_pool: mesh.ipv4_pool.to_string(),
                ipv6_prefix: mesh.ipv6_prefix().to_string(),
                controller_time: now.unix(),
                controllers: self.controllers.clone(),
                renew_at: renew_at(node.id, identity).unix(),
            })
        })
    }

    /// What `meshctl login` stores.
    pub(crate) fn login(&self, operator: &OperatorName, leaf: Vec<u8>) -> Result<pb::LoginResponse, Problem> {
        let role = self
            .directory
            .read(|world| world.operator(operator).map(|operator| operator.role))
            .ok_or_else(|| Refusal::OperatorNotFound { name: operator.clone() })?;
        Ok(pb::LoginResponse {
            leaf: leaf.into(),
            issuers: self.directory.read(|world| issuer_ders(world, None)),
            roots: self.directory.read(root_ders),
            name: operator.to_string(),
            role: role.to_string(),
            trust_domain: self.authority.domain().to_string(),
        })
    }
}
