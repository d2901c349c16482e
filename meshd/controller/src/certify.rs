//! Certificates for services of nodes and for machines that are no nodes.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use mesh_ca::{Identity, Label, Profile, VerifiedCsr};
use mesh_core::profile::{KeyType, service_label};
use mesh_core::world::{Asker, Wish};
use mesh_core::{
    Actor, CertificateRecord, Change, Command, DnsName, KeyHash, Made, OperationId, Owner, ProfileName,
    Refusal, Request,
};
use mesh_proto::v1 as pb;

use crate::archive::Archive;
use crate::auth::Caller;
use crate::authority::{LeafRequest, label};
use crate::directory::Directory;
use crate::issuer::{Issuing, check_requested_names};
use crate::limits::CERTIFICATE_TTL_MIN;
use crate::profiles::{Custom, built_in, key_type};
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
    pub(crate) profile: Asked,
    /// Zero: the profile's default.
    pub(crate) lifetime: Duration,
    pub(crate) operation: OperationId,
    pub(crate) restart: bool,
}

/// The profile that is asked for.
#[derive(Debug, Clone)]
pub(crate) enum Asked {
    BuiltIn(Profile),
    /// One of the policy's, by a name that may be nobody's.
    Custom(String),
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
        let (mut request, custom) = self.leaf(&order, &actor)?;
        let Order { csr, operation, restart, pair_name, .. } = order;
        let uri = request.identity.as_ref().map(|i| i.to_spiffe(self.issuing.authority().domain()));
        let committed = match custom {
            None => {
                let request = move |csr: &VerifiedCsr| {
                    let (names, ips) = (&request.names, &request.ips);
                    check_requested_names(csr.requested_names(), names, ips, uri.as_deref())?;
                    Ok(request)
                };
                let command = move |certificate| {
                    let command = Command::IssueCertificate { certificate, restart, made: None };
                    Request { actor, operation, command }
                };
                self.issuing.certify(csr.clone(), request, (&self.writer, command)).await?
            }
            Some((name, profile)) => {
                let csr = self.issuing.verify(csr.clone()).await?;
                let key = key_type(csr.public_key().algorithm());
                request.custom = Some(self.custom(&name, &profile, key, &request).await?);
                let (names, ips) = (&request.names, &request.ips);
                check_requested_names(csr.requested_names(), names, ips, uri.as_deref())?;
                let certificate = self.issuing.sign(request, csr).await?;
                let made = Some(Box::new(Made { profile, key }));
                let command = Command::IssueCertificate { certificate, restart, made };
                // Commit point.
                self.writer.submit(Request { actor, operation, command }).await?
            }
        };
        let issued = committed.changes().iter().find_map(|change| match change {
            Change::CertificateIssued { certificate } => Some(certificate),
            _ => None,
        });
        if let Some(certificate) = issued {
            tracing::info!(serial = %certificate.serial, pair = pair_name, profile = certificate.profile, "certificate issued");
            return Ok(certificate.clone());
        }
        let key_hash = KeyHash(self.issuing.verify(csr).await?.key_hash());
        let (archive, seq) = (self.archive.clone(), committed.seq);
        let earlier = self.issuing.on_pool(move || archive.issued_at(seq)).await?;
        earlier
            .filter(|certificate| certificate.key_hash == key_hash)
            .ok_or_else(|| Refusal::OperationReused { operation }.into())
    }

    /// The template's content: owner and SPIFFE ID by the caller, names by the request, which
    /// the writer checks against the owner.
    fn leaf(&self, order: &Order, actor: &Actor) -> Result<(LeafRequest, Option<Named>), Problem> {
        let (profile, custom) = match &order.profile {
            Asked::BuiltIn(profile) => (*profile, None),
            Asked::Custom(name) => {
                let known = self
                    .directory
                    .read(|world| world.profile(name).map(|(name, profile)| (name.clone(), profile.clone())));
                let escaped = || mesh_core::change::escape(name);
                let known = known.ok_or_else(|| Refusal::ProfileUnknown { profile: escaped() })?;
                (built_in(known.1.kind), Some(known))
            }
        };
        let (owner, identity) = match actor {
            Actor::Node { id, .. } => {
                let node = self
                    .directory
                    .read(|world| world.node(*id).map(|node| node.name.to_string()))
                    .ok_or(Refusal::NodeNotFound { node: *id })?;
                let identity = match profile.carries_identity() {
                    true => Some(service_identity(&node, &order.pair_name)?),
                    false => None,
                };
                (Owner::Service { node: *id, name: order.pair_name.clone() }, identity)
            }
            _ if profile.carries_identity() && custom.is_none() => {
                return Err(Problem::new(
                    pb::ErrorCode::CertificateInvalid,
                    format!("profile {profile} is only for services of nodes"),
                    "ask for profile server or client",
                ));
            }
            Actor::Operator { name, .. } => (Owner::Detached { operator: Some(name.clone()) }, None),
            _ => (Owner::Detached { operator: None }, None),
        };
        let lifetime = match order.lifetime {
            Duration::ZERO => {
                custom.as_ref().map_or(profile.default_lifetime(), |(_, custom)| custom.lifetime())
            }
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
        let request = LeafRequest {
            profile,
            identity,
            owner,
            names: order.names.clone(),
            ips: order.ips.clone(),
            wireguard: Vec::new(),
            pair_name: order.pair_name.clone(),
            lifetime,
            custom: None,
        };
        Ok((request, custom))
    }

    /// The profile as it may issue for this request. What policy refuses is refused before anything is signed; the writer
    /// judges again.
    async fn custom(
        &self,
        name: &ProfileName,
        profile: &mesh_core::profile::Profile,
        key: KeyType,
        request: &LeafRequest,
    ) -> Result<Custom, Problem> {
        let asker = request.owner.node().map_or(Asker::Detached, Asker::Node);
        let wish = Wish {
            profile: name.as_str(),
            names: &request.names,
            ips: &request.ips,
            pair_name: &request.pair_name,
            lifetime: Some(request.lifetime),
            key: Some(key),
        };
        let (node, addresses) = self.directory.read(|world| {
            world.judge_wish(asker, &wish).into_iter().try_for_each(|verdict| verdict.outcome.map(drop))?;
            let node = request.owner.node().and_then(|id| world.node(id));
            let node = node.ok_or(Refusal::CertificateMismatch { what: "it is for no node" })?;
            let ipv4 = node.ipv4.map(IpAddr::V4);
            let ipv6 = world.ipv6_of(node.id).map(IpAddr::V6);
            Ok::<_, Refusal>((node.name.clone(), ipv4.into_iter().chain(ipv6).collect()))
        })?;
        let service = checked_label(service_label(&request.pair_name, &node))?;
        let node = checked_label(node.as_str())?;
        let accepted = self.issuing.accept(name.clone(), profile.clone()).await?;
        Ok(Custom { accepted, node, service, addresses })
    }
}

/// A custom profile and its name.
type Named = (ProfileName, mesh_core::profile::Profile);

fn checked_label(text: &str) -> Result<Label, Problem> {
    label(text).map_err(|error| {
        Problem::new(pb::ErrorCode::NameInvalid, format!("{text}: {error}"), "choose another name")
    })
}

/// `/service/NODE/NAME`: the first label of the pair's name, or the node's own when it is an address.
fn service_identity(node: &str, pair_name: &str) -> Result<Identity, Problem> {
    let first = match pair_name.parse::<IpAddr>() {
        Ok(_) => node,
        Err(_) => pair_name.split('.').next().unwrap_or(pair_name),
    };
    Ok(Identity::Service { node: checked_label(node)?, name: checked_label(first)? })
}
