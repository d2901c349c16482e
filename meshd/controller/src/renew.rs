//! New certificates for nodes that are already in: renewal, and resuming after an expiry.

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use mesh_ca::VerifiedCsr;
use mesh_core::{Actor, Command, KeyHash, NodeId, OperationId, Refusal, Request, WgKey};
use mesh_proto::v1 as pb;

use crate::directory::Directory;
use crate::identity::{IdentityAnswers, leaf_of_node};
use crate::issuer::{Issuing, check_requested_names};
use crate::status::Problem;
use crate::writer::Writer;

/// What a node asks for; every field is checked.
pub(crate) struct Renewal {
    pub(crate) node: NodeId,
    pub(crate) actor: Actor,
    pub(crate) csr: Bytes,
    pub(crate) wireguard: Vec<WgKey>,
    pub(crate) operation: OperationId,
    /// The node's certificate has expired, and it may do nothing but this.
    pub(crate) resume: bool,
}

#[derive(Debug)]
pub(crate) struct Renewer {
    pub(crate) directory: Arc<Directory>,
    pub(crate) writer: Writer,
    pub(crate) issuing: Issuing,
    pub(crate) answers: IdentityAnswers,
}

impl Renewer {
    /// Issues the node's next identity: the same names and addresses, a new key.
    pub(crate) async fn renew(&self, renewal: Renewal) -> Result<pb::NodeIdentity, Problem> {
        let Renewal { node, actor, csr, wireguard, operation, resume } = renewal;
        let (directory, domain) = (Arc::clone(&self.directory), self.issuing.authority().domain().clone());
        let (keys, proved) = (wireguard.clone(), Arc::new(OnceLock::new()));
        let key_hash = Arc::clone(&proved);
        let request = move |csr: &VerifiedCsr| {
            let request = directory.read(|world| {
                let known = world.node(node).ok_or(Refusal::NodeNotFound { node })?;
                let ipv4 = known.ipv4.ok_or_else(|| Refusal::NodePending { name: known.name.clone() })?;
                leaf_of_node(world, node, &known.name, ipv4, &keys)
            })?;
            let uri = request.identity.as_ref().map(|i| i.to_spiffe(&domain));
            check_requested_names(csr.requested_names(), &request.names, &request.ips, uri.as_deref())?;
            proved.get_or_init(|| KeyHash(csr.key_hash()));
            Ok(request)
        };
        let command = move |certificate| {
            let command = Command::RenewIdentity { node, wireguard, certificate, resume };
            Request { actor, operation, command }
        };
        let committed = self.issuing.certify(csr, request, (&self.writer, command)).await?;
        tracing::info!(%node, seq = committed.seq, resume, changed = committed.changed(), "identity renewed");
        let current = self
            .directory
            .read(|world| world.node(node).and_then(|n| n.current.as_ref().map(|c| c.key_hash)));
        if current.as_ref() != key_hash.get() {
            return Err(Refusal::OperationReused { operation }.into());
        }
        self.answers.identity(node)
    }
}
