use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh_ca::Profile;
use mesh_core::names::PROFILES_BUILT_IN;
use mesh_core::world::CertificateState;
use mesh_core::{DnsName, KeyHash, NodeId, Reason, Refusal, Serial, UtcTime, Which};
use mesh_proto::v1 as pb;
use tonic::{Request, Response, Status};

use crate::auth::Caller;
use crate::certify::{Asked, Order};
use crate::history::{CertificatePage, Query, Scope, State, find_live, is_cursor, state};
use crate::identity::{issuer_ders, root_ders};
use crate::limits::{ISSUER_DIGITS_MAX, NAMES_PER_CERTIFICATE_MAX, OCSP_SERIALS_MAX, PAGE_SIZE_MAX};
use crate::parts::Parts;
use crate::revoke;
use crate::service::messages::{certificate_message, judged_message, name_owner};
use crate::status::Problem;
use crate::sync::check_crls;

#[derive(Debug)]
pub(crate) struct CertificatesService(pub(crate) Arc<Parts>);

#[tonic::async_trait]
impl pb::certificates_server::Certificates for CertificatesService {
    async fn issue(&self, request: Request<pb::IssueRequest>) -> Result<Response<pb::IssueResponse>, Status> {
        let caller = Caller::from_extensions(request.extensions())?;
        let is_node = matches!(caller, Caller::Node { .. });
        let order = order(caller, request.into_inner())?;
        let issued = self.0.certifier.issue(order).await?;
        // A node has the others from its stream; a folder that is written once gets all there are.
        let crls = match is_node {
            true => self.0.publisher.messages_for(&issued.issuer_key_id, issued.shard),
            false => self.0.publisher.messages(&[]),
        };
        let (certificate, issuers, roots) = self.0.directory.read(|world| {
            let known = world.certificate(&issued.serial);
            let certificate = known.map(|known| certificate_message(world, known));
            (certificate, issuer_ders(world, Some(&issued.issuer_key_id)), root_ders(world))
        });
        Ok(Response::new(pb::IssueResponse { leaf: issued.der.into(), issuers, roots, crls, certificate }))
    }

    async fn explain(
        &self,
        request: Request<pb::ExplainRequest>,
    ) -> Result<Response<pb::ExplainResponse>, Status> {
        let caller = Caller::from_extensions(request.extensions())?;
        Ok(Response::new(self.0.explain(&caller, &request.into_inner())?))
    }

    async fn list(
        &self,
        request: Request<pb::ListCertificatesRequest>,
    ) -> Result<Response<pb::ListCertificatesResponse>, Status> {
        let caller = Caller::from_extensions(request.extensions())?;
        Ok(Response::new(self.0.list_certificates(&caller, request.into_inner()).await?))
    }

    async fn get(
        &self,
        request: Request<pb::GetCertificateRequest>,
    ) -> Result<Response<pb::Certificate>, Status> {
        let caller = Caller::from_extensions(request.extensions())?;
        let serial = serial(&request.into_inner().serial)?;
        Ok(Response::new(self.0.certificate(&caller, serial).await?))
    }

    async fn revoke(
        &self,
        request: Request<pb::RevokeCertificateRequest>,
    ) -> Result<Response<pb::RevokeResponse>, Status> {
        let caller = Caller::from_extensions(request.extensions())?;
        let request = request.into_inner();
        let which = which(request.which)?;
        let reason = reason(&request.reason)?;
        let order = revoke::Order {
            actor: super::actor(&caller)?,
            operation: super::operation(&request.operation_id)?,
            wait: super::seconds(request.wait_secs),
        };
        Ok(Response::new(self.0.revoker.certificates(order, which, reason).await?))
    }

    async fn crls(&self, request: Request<pb::CrlsRequest>) -> Result<Response<pb::CrlsResponse>, Status> {
        let pb::CrlsRequest { have, ocsp_of, no_crls } = request.into_inner();
        check_crls(&have)?;
        if ocsp_of.len() > OCSP_SERIALS_MAX {
            return Err(Problem::too_large("list of serials", OCSP_SERIALS_MAX).into());
        }
        let mut ocsp = Vec::new();
        for wanted in ocsp_of {
            let reply = self.0.ocsp.staple(serial(&wanted)?).await;
            ocsp.extend(reply.and_then(|reply| {
                let (_, next_update) = reply.life?;
                Some(pb::OcspResponse { serial: wanted, der: reply.der, next_update: next_update.unix() })
            }));
        }
        let crls = if no_crls { Vec::new() } else { self.0.publisher.messages(&have) };
        Ok(Response::new(pb::CrlsResponse { crls, ocsp }))
    }
}

impl Parts {
    /// What has not ended, soonest end first; with ended ones, latest end first.
    async fn list_certificates(
        &self,
        caller: &Caller,
        request: pb::ListCertificatesRequest,
    ) -> Result<pb::ListCertificatesResponse, Problem> {
        let query = query(&request, self.utc())?;
        if let Caller::Node { id, .. } = caller {
            return Ok(self.list_own(*id, &query));
        }
        let node = request.node.as_str();
        if node.is_empty() && query.is_of_all_live() {
            return Ok(message(self.directory.read(|world| find_live(world, &query))));
        }
        let known = self.directory.read(|world| {
            let name = mesh_core::NodeName::try_from(node).ok()?;
            world.node_by_name(&name).map(|node| node.id)
        });
        // Names of nodes that are gone are found by reading on.
        let scope = match (known, query.scope) {
            (Some(id), Scope::All) => Scope::Node(id),
            (_, scope) => scope,
        };
        let (history, query) = (self.history.clone(), Query { scope, ..query });
        let asked = query.clone();
        let mut page = self
            .issuing
            .on_pool(move || {
                history.catch_up();
                history.certificates(&asked)
            })
            .await?;
        // What World still knows, it knows better: names of owners, and revocations of this second.
        self.directory.read(|world| {
            for certificate in &mut page.certificates {
                let known = Serial::try_from(&*certificate.serial).ok();
                match known.and_then(|serial| world.certificate(&serial)) {
                    Some(known) => *certificate = judged_message(world, known, query.now),
                    None => name_owner(world, certificate),
                }
            }
        });
        page.certificates
            .retain(|c| (node.is_empty() || c.owner == node) && query.states.contains(&state(c, query.now)));
        Ok(message(page))
    }

    /// A node sees its own only, and those are few: they are all in World.
    fn list_own(&self, node: NodeId, query: &Query) -> pb::ListCertificatesResponse {
        let mut certificates: Vec<pb::Certificate> = self.directory.read(|world| {
            world
                .certificates_of(node)
                .map(|certificate| judged_message(world, certificate, query.now))
                .filter(|c| query.states.contains(&state(c, query.now)))
                .filter(|c| query.until.is_none_or(|until| c.not_after <= until.unix()))
                .filter(|c| match &query.scope {
                    Scope::Name(name) => c.name == *name || c.names.contains(name),
                    _ => true,
                })
                .take(PAGE_SIZE_MAX)
                .collect()
        });
        certificates.sort_by_key(|certificate| certificate.not_after);
        pb::ListCertificatesResponse { certificates, next_page_token: String::new() }
    }

    async fn certificate(&self, caller: &Caller, serial: Serial) -> Result<pb::Certificate, Problem> {
        let not_found = || Problem::certificate_not_found(&serial.to_string());
        let known = self.directory.read(|world| {
            let known = world.certificate(&serial)?;
            may_see(caller, known).then(|| (known.issued_seq, judged_message(world, known, self.utc())))
        });
        let (archive, history) = (self.archive.clone(), self.history.clone());
        let is_node = matches!(caller, Caller::Node { .. });
        let (seq, message) = match known {
            Some((seq, message)) => (Some(seq), Some(message)),
            None if is_node => return Err(not_found()),
            None => {
                let find = move || {
                    history.catch_up();
                    history.issued_seq(&serial)
                };
                (self.issuing.on_pool(find).await?, None)
            }
        };
        let seq = seq.ok_or_else(not_found)?;
        let issued = self.issuing.on_pool(move || archive.certificate(seq, &serial)).await?;
        let issued = issued.ok_or_else(not_found)?;
        let domain = self.issuing.authority().domain().to_string();
        let message = message.unwrap_or_else(|| crate::service::messages::issued_message(&domain, &issued));
        Ok(pb::Certificate { leaf: issued.der.into(), ..message })
    }
}

fn message(page: CertificatePage) -> pb::ListCertificatesResponse {
    let next_page_token = page.next.map(hex::encode).unwrap_or_default();
    pb::ListCertificatesResponse { certificates: page.certificates, next_page_token }
}

/// Operators see all; a node sees its own and its services'.
fn may_see(caller: &Caller, certificate: &CertificateState) -> bool {
    match caller {
        Caller::Node { id, .. } => certificate.owner.node() == Some(*id),
        _ => true,
    }
}

fn order(caller: Caller, request: pb::IssueRequest) -> Result<Order, Problem> {
    if request.names.len() > NAMES_PER_CERTIFICATE_MAX {
        return Err(Problem::too_large("list of names", NAMES_PER_CERTIFICATE_MAX));
    }
    let Some(pair_name) = request.names.first().map(|name| name.to_ascii_lowercase()) else {
        return Err(Problem::usage("a certificate needs a name"));
    };
    let (names, ips) = split_names(&request.names)?;
    Ok(Order {
        caller,
        csr: request.csr,
        names,
        ips,
        pair_name,
        profile: profile(&request.profile)?,
        lifetime: Duration::from_secs(request.ttl_secs.into()),
        operation: super::operation(&request.operation_id)?,
        restart: request.restart,
    })
}

fn split_names(texts: &[String]) -> Result<(Vec<DnsName>, Vec<IpAddr>), Problem> {
    let (mut names, mut ips) = (Vec::new(), Vec::new());
    for text in texts {
        match text.parse::<IpAddr>() {
            Ok(ip) => ips.push(ip.to_canonical()),
            Err(_) => names.push(DnsName::try_from(text.as_str()).map_err(|source| {
                Problem::from(Refusal::NameInvalid { name: mesh_core::change::escape(text), source })
            })?),
        }
    }
    Ok((names, ips))
}

/// Only what a service may have; the others are made with an identity.
fn profile(text: &str) -> Result<Asked, Problem> {
    match text {
        "" | "server" => Ok(Asked::BuiltIn(Profile::Server)),
        "client" => Ok(Asked::BuiltIn(Profile::Client)),
        "peer" => Ok(Asked::BuiltIn(Profile::Peer)),
        reserved if PROFILES_BUILT_IN.contains(&reserved) => {
            Err(Problem::usage("the profile must be server, client, peer, or one of the policy's"))
        }
        custom => Ok(Asked::Custom(custom.to_owned())),
    }
}

fn which(which: Option<pb::revoke_certificate_request::Which>) -> Result<Which, Problem> {
    use pb::revoke_certificate_request::Which as Asked;
    match which {
        Some(Asked::Serial(bytes)) => Ok(Which::Serial(serial(&bytes)?)),
        Some(Asked::Name(name)) if is_name(&name) => Ok(Which::Name(name)),
        Some(Asked::KeyHash(bytes)) => {
            KeyHash::try_from(&*bytes).map(Which::KeyHash).map_err(|error| Problem::usage(error.to_string()))
        }
        _ => Err(Problem::usage("say which certificate: by serial, name or key")),
    }
}

/// A host name, an address or the name of a pair; it may come back in a message.
fn is_name(text: &str) -> bool {
    text.len() <= mesh_core::limits::NAME_CHARS_MAX && text.bytes().all(|byte| byte.is_ascii_graphic())
}

pub(crate) fn reason(text: &str) -> Result<Reason, Problem> {
    text.parse::<Reason>().map_err(|error| Problem::usage(error.to_string()))
}

fn serial(bytes: &[u8]) -> Result<Serial, Problem> {
    Serial::try_from(bytes).map_err(|error| Problem::usage(error.to_string()))
}

/// A listing as it was asked for; the owner is looked up by the caller.
fn query(request: &pb::ListCertificatesRequest, now: UtcTime) -> Result<Query, Problem> {
    use pb::list_certificates_request::State as Asked;
    let states = match (request.state(), request.include_ended) {
        (Asked::Ok, _) | (Asked::Unspecified, false) => vec![State::Ok],
        (Asked::Revoked, _) => vec![State::Revoked],
        (Asked::Ended, _) => vec![State::Ended],
        (Asked::Unspecified, true) => vec![State::Ok, State::Revoked, State::Ended],
    };
    let after = match request.page_token.as_str() {
        "" => None,
        text => Some(
            hex::decode(text)
                .ok()
                .filter(|cursor| is_cursor(cursor))
                .ok_or_else(|| Problem::usage("the page token is not one of ours"))?,
        ),
    };
    if request.issuer.len() > ISSUER_DIGITS_MAX || !request.issuer.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(Problem::usage("an issuer is named by hexadecimal digits of its key id"));
    }
    let scope = match request.name.as_str() {
        "" => Scope::All,
        name if is_name(name) => Scope::Name(name.to_ascii_lowercase()),
        _ => return Err(Problem::usage("this is no name of a certificate")),
    };
    Ok(Query {
        scope,
        states,
        issuer: request.issuer.to_ascii_lowercase(),
        until: (request.expiring_within_secs > 0).then(|| now + super::seconds(request.expiring_within_secs)),
        now,
        after,
        limit: match usize::try_from(request.page_size).unwrap_or(PAGE_SIZE_MAX) {
            0 => PAGE_SIZE_MAX,
            size => size.min(PAGE_SIZE_MAX),
        },
    })
}
