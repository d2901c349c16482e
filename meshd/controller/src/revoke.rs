//! Ending certificates and nodes: one record, one CRL, the end of open connections, receipts.

use std::sync::Arc;
use std::time::Duration;

use mesh_core::{Actor, Change, Command, NodeId, OperationId, Reason, Request, Serial, UtcTime, Which};
use mesh_proto::v1 as pb;

use crate::connections::Connections;
use crate::directory::Directory;
use crate::publish::{CrlRef, Publisher};
use crate::receipts::{Expected, Receipts};
use crate::service::messages::certificate_message;
use crate::status::Problem;
use crate::writer::{Committed, Writer};

/// Revokes, and reports who has taken it up.
#[derive(Debug, Clone)]
pub(crate) struct Revoker {
    pub(crate) directory: Arc<Directory>,
    pub(crate) writer: Writer,
    pub(crate) publisher: Arc<Publisher>,
    pub(crate) receipts: Receipts,
    pub(crate) connections: Connections,
}

/// Who revokes, and how long they wait for receipts.
pub(crate) struct Order {
    pub(crate) actor: Actor,
    pub(crate) operation: OperationId,
    pub(crate) wait: Duration,
}

impl Revoker {
    /// Ends a node: its identity, its services' certificates, its place among the peers.
    pub(crate) async fn node(
        &self,
        order: Order,
        node: NodeId,
        (reason, remove): (Reason, bool),
    ) -> Result<pb::RevokeResponse, Problem> {
        // Counted before they are closed.
        let serials: Vec<Serial> =
            self.directory.read(|world| world.certificates_of(node).map(|c| c.serial).collect());
        let lease_ends = self
            .directory
            .read(|world| world.certificates_of(node).map(|c| c.not_after).max().unwrap_or_default());
        let open = self.connections.count(&serials);
        let command = Command::RevokeNode { node, reason, remove };
        let committed = self.submit(&order, command).await?;
        let mut response = self.finish(&order, &committed, (Some(node), lease_ends)).await?;
        response.streams_closed = if committed.changed() { count(open) } else { 0 };
        Ok(response)
    }

    /// Ends certificates of services, operators or machines that are no nodes.
    pub(crate) async fn certificates(
        &self,
        order: Order,
        which: Which,
        reason: Reason,
    ) -> Result<pb::RevokeResponse, Problem> {
        let command = Command::RevokeCertificates { which, reason };
        let committed = self.submit(&order, command).await?;
        self.finish(&order, &committed, (None, UtcTime::EPOCH)).await
    }

    async fn submit(&self, order: &Order, command: Command) -> Result<Committed, Problem> {
        let request = Request { actor: order.actor.clone(), operation: order.operation, command };
        // Commit point: from here on every request of what was revoked is refused.
        Ok(self.writer.submit(request).await?)
    }

    async fn finish(
        &self,
        order: &Order,
        committed: &Committed,
        (node, lease_ends): (Option<NodeId>, UtcTime),
    ) -> Result<pb::RevokeResponse, Problem> {
        let changes = committed.changes();
        let revoked = self.revoked(changes);
        let lease_ends = revoked.iter().map(|c| UtcTime::from_unix(c.not_after)).max().unwrap_or(lease_ends);
        // An open connection of what was revoked ends now; the watcher would find it too.
        for certificate in &revoked {
            if let Ok(serial) = Serial::try_from(&*certificate.serial) {
                self.connections.close(serial);
            }
        }
        for change in changes {
            if let Change::NodeRemoved { id, .. } = change {
                self.receipts.presence.forget(*id);
            }
        }
        let crls = self.cover(changes).await?;
        let mut response = pb::RevokeResponse {
            changed: committed.changed(),
            revoked,
            crl_number: crls.iter().map(|crl| crl.number).max().unwrap_or(0),
            tokens_void: count(changes.iter().filter(|c| matches!(c, Change::TokenRevoked { .. })).count()),
            peer_removed: changes
                .iter()
                .any(|c| matches!(c, Change::NodeRevoked { .. } | Change::NodeRemoved { .. })),
            ..pb::RevokeResponse::default()
        };
        if !order.wait.is_zero() {
            let expected = Expected { seq: committed.seq, crls, lease_ends, except: node };
            let (receipts, waited) = self.receipts.collect(&expected, order.wait).await;
            response.receipts = receipts;
            response.waited_ms = u32::try_from(waited.as_millis()).unwrap_or(u32::MAX);
        }
        Ok(response)
    }

    /// A CRL with this revocation. Without one the revocation stands all the same, and says so.
    async fn cover(&self, changes: &[Change]) -> Result<Vec<CrlRef>, Problem> {
        self.publisher.cover(changes).await.map_err(|problem| Problem {
            why: format!("revoked, but the CRL that says so could not be made: {}", problem.why),
            next: format!("the controller tries again by itself; {}", problem.next),
            ..problem
        })
    }

    fn revoked(&self, changes: &[Change]) -> Vec<pb::Certificate> {
        self.directory.read(|world| {
            changes
                .iter()
                .filter_map(|change| match change {
                    Change::CertificateRevoked { serial, .. } => world.certificate(serial),
                    _ => None,
                })
                .map(|certificate| certificate_message(world, certificate))
                .collect()
        })
    }
}

/// A number for a reply; what does not fit is shown as the most that does.
pub(crate) fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}
