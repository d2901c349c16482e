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
            Ok(pb::NodeIdentity {
                leaf: identity.leaf.clone().into(),
                issuers: vec![self.authority.issuing_der().to_vec().into()],
                roots: vec![self.authority.root_der().to_vec().into()],
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
            issuers: vec![self.authority.issuing_der().to_vec().into()],
            roots: vec![self.authority.root_der().to_vec().into()],
            name: operator.to_string(),
            role: role.to_string(),
            trust_domain: self.authority.domain().to_string(),
        })
    }
}
