use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use mesh_core::world::{CrlState, Node, NodeState};
use mesh_core::{Command, KeyId, NodeId, UtcTime, World};
use mesh_proto::v1 as pb;
use tonic::{Request, Response, Status};

use crate::auth::Caller;
use crate::failpoint;
use crate::gate::Connection;
use crate::parts::Parts;
use crate::revoke;
use crate::service::certificates::reason;
use crate::service::messages::node_message;
use crate::service::tokens::tags;
use crate::status::Problem;

#[derive(Debug)]
pub(crate) struct NodesService(pub(crate) Arc<Parts>);

#[tonic::async_trait]
impl pb::nodes_server::Nodes for NodesService {
    async fn list(&self, _: Request<pb::Empty>) -> Result<Response<pb::ListNodesResponse>, Status> {
        Ok(Response::new(pb::ListNodesResponse { nodes: self.0.nodes() }))
    }

    async fn get(&self, request: Request<pb::NodeRequest>) -> Result<Response<pb::Node>, Status> {
        let id = self.0.find_node(&request.into_inner().name)?;
        let now = self.0.utc();
        let node = self.0.directory.read(|world| world.node(id).map(|node| self.0.node(world, node, now)));
        Ok(Response::new(node.ok_or_else(|| Problem::node_not_found(&id.to_string()))?))
    }

    async fn approve(
        &self,
        request: Request<pb::NodeRequest>,
    ) -> Result<Response<pb::ActionResponse>, Status> {
        let caller = Caller::from_extensions(request.extensions())?;
        let request = request.into_inner();
        let node = self.0.find_node(&request.name)?;
        let operation = super::operation(&request.operation_id)?;
        let committed = self.0.submit(&caller, operation, Command::ApproveNode { node }).await?;
        let detail = format!("node {} may enroll", request.name);
        Ok(Response::new(pb::ActionResponse { changed: committed.changed(), detail, incomplete: false }))
    }

    async fn tag(
        &self,
        request: Request<pb::TagNodeRequest>,
    ) -> Result<Response<pb::ActionResponse>, Status> {
        let caller = Caller::from_extensions(request.extensions())?;
        let request = request.into_inner();
        let node = self.0.find_node(&request.name)?;
        let operation = super::operation(&request.operation_id)?;
        let (add, remove) = (tags(&request.add)?, tags(&request.remove)?);
        let command = Command::TagNode { node, add, remove };
        let committed = self.0.submit(&caller, operation, command).await?;
        let now: Vec<String> = self.0.directory.read(|world| {
            let tags = world.node(node).map(|node| node.tags.clone()).unwrap_or_default();
            tags.iter().map(ToString::to_string).collect()
        });
        let detail = format!("node {} has tags [{}]", request.name, now.join(" "));
        Ok(Response::new(pb::ActionResponse { changed: committed.changed(), detail, incomplete: false }))
    }

    async fn revoke(
        &self,
        request: Request<pb::RevokeNodeRequest>,
    ) -> Result<Response<pb::RevokeResponse>, Status> {
        let caller = Caller::from_extensions(request.extensions())?;
        Ok(Response::new(self.0.end_node(&caller, request.into_inner(), false).await?))
    }

    async fn remove(
        &self,
        request: Request<pb::RevokeNodeRequest>,
    ) -> Result<Response<pb::RevokeResponse>, Status> {
        let caller = Caller::from_extensions(request.extensions())?;
        Ok(Response::new(self.0.end_node(&caller, request.into_inner(), true).await?))
    }

    async fn rotate_keys(
        &self,
        request: Request<pb::NodeRequest>,
    ) -> Result<Response<pb::ActionResponse>, Status> {
        let caller = Caller::from_extensions(request.extensions())?;
        let request = request.into_inner();
        let node = self.0.find_node(&request.name)?;
        let operation = super::operation(&request.operation_id)?;
        let committed = self.0.submit(&caller, operation, Command::RotateKeys { node }).await?;
        let detail = format!("node {} makes new keys at its next contact", request.name);
        Ok(Response::new(pb::ActionResponse { changed: committed.changed(), detail, incomplete: false }))
    }

    async fn leave(&self, request: Request<pb::Empty>) -> Result<Response<pb::ActionResponse>, Status> {
        let caller = Caller::from_extensions(request.extensions())?;
        let Caller::Node { id, name, .. } = &caller else {
            return Err(Problem::denied(&caller.describe(), "Nodes/Leave").into());
        };
        if let Some(connection) = request.extensions().get::<Arc<Connection>>() {
            connection.leaving.store(true, Ordering::Release);
        }
        let operation = super::operation(&[])?;
        let committed = self.0.submit(&caller, operation, Command::LeaveNode { node: *id }).await?;
        if failpoint::LEAVE_ANSWER_SLOW.is_set() {
            tokio::time::sleep(std::time::Duration::from_secs(2)).await;
        }
        self.0.publisher.cover(committed.changes()).await?;
        self.0.presence.forget(*id);
        let detail = format!("node {name} has left the mesh");
        Ok(Response::new(pb::ActionResponse { changed: committed.changed(), detail, incomplete: false }))
    }
}

impl Parts {
    /// Every node with what is known of it live, by index.
    pub(crate) fn nodes(&self) -> Vec<pb::Node> {
        let now = self.utc();
        self.directory.read(|world| world.nodes().map(|node| self.node(world, node, now)).collect())
    }

    fn node(&self, world: &World, node: &Node, now: UtcTime) -> pb::Node {
        let message = node_message(world, node, &self.presence.of(node.id), now);
        let (cut_off_on, cut_off_of) = match node.state {
            NodeState::Revoked { .. } => self.cut_off(world, node.id),
            _ => (0, 0),
        };
        pb::Node { cut_off_on, cut_off_of, ..message }
    }

    /// On how many of the active nodes the newest CRLs of an ended node's certificates are: what they list is cut
    /// off there.
    fn cut_off(&self, world: &World, ended: NodeId) -> (u32, u32) {
        let shards: BTreeSet<(KeyId, u16)> =
            world.certificates_of(ended).map(|c| (c.issuer_key_id.clone(), c.shard)).collect();
        let crls: Vec<_> = shards.iter().filter_map(|(issuer, shard)| world.crl(issuer, *shard)).collect();
        let active = world.nodes().filter(|node| node.state == NodeState::Active);
        let (mut on, mut of) = (0, 0);
        for node in active {
            of += 1;
            let presence = self.presence.of(node.id);
            let has = |crl: &&CrlState| presence.has_crl(&crl.issuer_key_id.0, crl.shard.into(), crl.number);
            on += u32::from(crls.iter().all(has));
        }
        (on, of)
    }

    /// A node by its name.
    fn find_node(&self, text: &str) -> Result<NodeId, Problem> {
        let found = self
            .directory
            .read(|world| world.nodes().find(|node| node.name.as_str() == text).map(|node| node.id));
        found.ok_or_else(|| Problem::node_not_found(&mesh_core::change::escape(text)))
    }

    async fn end_node(
        &self,
        caller: &Caller,
        request: pb::RevokeNodeRequest,
        remove: bool,
    ) -> Result<pb::RevokeResponse, Problem> {
        let node = self.find_node(&request.name)?;
        let order = revoke::Order {
            actor: super::actor(caller)?,
            operation: super::operation(&request.operation_id)?,
            wait: super::seconds(request.wait_secs),
        };
        let response = self.revoker.node(order, node, (reason(&request.reason)?, remove)).await?;
        if response.changed {
            tracing::info!(node = request.name, remove, crl = response.crl_number, "node revoked");
        }
        Ok(response)
    }
}
