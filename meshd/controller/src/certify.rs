//! Certificates for services of nodes and for machines that are no nodes.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use mesh_ca::{Identity, Label, Profile};
use mesh_core::{Actor, CertificateRecord, Command, DnsName, KeyHash, OperationId, Owner, Refusal, Request};
use mesh_proto::v1 as pb;

use crate::archive::Archive;
use crate::auth::Caller;
use crate::authority::{LeafRequest, label};
use crate::directory::Directory;
use crate::issuer::{Issuing, check_requested_names};
use crate::limits::CERTIFICATE_TTL_MIN;
use crate::status::Problem;
use crate::writer::Writer;

/// What somebody asks a certificate for; every field is checked.
pub(crate) struct Order {
    pub(crate) caller: Caller,
    pub(crate) csr: Bytes,
    pub(crate) names: Vec<DnsName>,
    pub(crate) ips: Vec<IpAddr>,
    /// The first name or address as it was asked for.
    pub(crate) pair_name: String,
    pub(crate) profile: Profile,
    /// Zero: the profile's default.
    pub(crate) lifetime: Duration,
    pub(crate) operation: OperationId,
    pub(crate) restart: bool,
}

#[derive(Debug)]
pub(crate) struct Certifier {
    pub(crate) directory: Arc<Directory>,
    pub(crate) writer: Writer,
    pub(crate) issuing: Issuing,
    pub(crate) archive: Archive,
}

impl Certifier {
    /// Issues a certificate, or hands out again what the same operation got before.
    pub(crate) async fn issue(&self, order: Order) -> Result<CertificateRecord, Problem> {
        let actor = order
            .caller
            .actor()
            .ok_or_else(|| Problem::denied(&order.caller.describe(), "Certificates/Issue"))?;
        let request = self.leaf(&order, &actor)?;
        let csr = self.issuing.verify(order.csr).await?;
        let uri = request.identity.as_ref().map(|i| i.to_spiffe(self.issuing.authority().domain()));
        check_requested_names(csr.requested_names(), &request.names, &request.ips, uri.as_deref())?;
        let key_hash = KeyHash(csr.key_hash());
        let certificate = self.issuing.sign(request, csr).await?;
        let command = Command::IssueCertificate { certificate: certificate.clone(), restart: order.restart };
        let request = Request { actor, operation: order.operation, command };
        // Commit point.
        let committed = self.writer.submit(request).await?;
        if committed.changed() {
            tracing::info!(serial = %certificate.serial, pair = order.pair_name, profile = certificate.profile, "certificate issued");
            return Ok(certificate);
        }
        let (archive, seq) = (self.archive.clone(), committed.seq);
        let earlier = self.issuing.on_pool(move || archive.issued_at(seq)).await?;
        earlier
            .filter(|certificate| certificate.key_hash == key_hash)
            .ok_or_else(|| Refusal::OperationReused { operation: order.operation }.into())
    }

    /// The template's content: owner and SPIFFE ID by the caller, names by the request, which
    /// the writer checks against the owner.
    fn leaf(&self, order: &Order, actor: &Actor) -> Result<LeafRequest, Problem> {
        let (owner, identity) = match actor {
            Actor::Node { id, .. } => {
                let node = self
                    .directory
                    .read(|world| world.node(*id).map(|node| node.name.to_string()))
                    .ok_or(Refusal::NodeNotFound { node: *id })?;
                let identity = match order.profile.carries_identity() {
                    true => Some(service_identity(&node, &order.pair_name)?),
                    false => None,
                };
                (Owner::Service { node: *id, name: order.pair_name.clone() }, identity)
            }
            _ if order.profile.carries_identity() => {
                return Err(Problem::new(
                    pb::ErrorCode::CertificateInvalid,
                    format!("profile {} is only for services of nodes", order.profile),
                    "ask for profile server or client",
                ));
            }
            Actor::Operator { name, .. } => (Owner::Detached { operator: Some(name.clone()) }, None),
            _ => (Owner::Detached { operator: None }, None),
        };
        let lifetime = match order.lifetime {
            Duration::ZERO => order.profile.default_lifetime(),
            asked if asked < CERTIFICATE_TTL_MIN => {
                return Err(Problem::usage(format!(
                    "a certificate lives at least {} s",
                    CERTIFICATE_TTL_MIN.as_secs()
                )));
            }
            asked if asked > mesh_ca::LEAF_LIFETIME_MAX => {
                return Err(Problem::usage(format!(
                    "a certificate lives at most {} days",
                    mesh_ca::LEAF_LIFETIME_MAX.as_secs() / 86_400
                )));
            }
            asked => asked,
        };
        Ok(LeafRequest {
            profile: order.profile,
            identity,
            owner,
            names: order.names.clone(),
            ips: order.ips.clone(),
            wireguard: Vec::new(),
            pair_name: order.pair_name.clone(),
            lifetime,
        })
    }
}

/// `/service/NODE/NAME`: the first label of the pair's name, or the node's own when it is an address.
fn service_identity(node: &str, pair_name: &str) -> Result<Identity, Problem> {
    let first = match pair_name.parse::<IpAddr>() {
        Ok(_) => node,
        Err(_) => pair_name.split('.').next().unwrap_or(pair_name),
    };
    let checked = |text: &str| -> Result<Label, Problem> {
        label(text).map_err(|error| {
            Problem::new(pb::ErrorCode::NameInvalid, format!("{text}: {error}"), "choose another name")
        })
    };
    Ok(Identity::Service { node: checked(node)?, name: checked(first)? })
}
