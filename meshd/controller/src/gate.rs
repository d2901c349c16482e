//! In front of every service: who is on this connection now, and may they call this method?

use std::convert::Infallible;
use std::net::IpAddr;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::task::{Context, Poll};

use futures::FutureExt as _;
use http::{Request, Response};
use hyper::body::Incoming;
use mesh_core::{NodeId, Owner, Serial, UtcTime, World};
use mesh_runtime::SharedClock;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::service::Routes;
use tower::Service;

use crate::auth::{Caller, authorize, method_name};
use crate::denials::Denials;
use crate::directory::Directory;
use crate::status::Problem;

/// What is known about a connection from its first bytes on.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) peer: Peer,
    /// Cancelled when the connection has to end: its identity was revoked, or the daemon stops.
    pub(crate) closing: CancellationToken,
    /// Its node has asked to leave the mesh: the identity ends with the answer still to be written.
    pub(crate) leaving: AtomicBool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Peer {
    /// Root or the daemon's own user.
    Local,
    /// From the network; the serial is of the certificate whose chain and key were verified.
    Remote { address: IpAddr, certificate: Option<Serial> },
}

impl Connection {
    /// Where the caller connects from, if from the network.
    pub(crate) fn address(&self) -> Option<IpAddr> {
        match self.peer {
            Peer::Local => None,
            Peer::Remote { address, .. } => Some(address),
        }
    }
}

/// Who speaks on `connection` as the mesh knows it at `at`: looked up on every request, so that a
/// revocation or an expiry counts from the next request on.
pub(crate) fn identify(peer: &Peer, world: &World, at: UtcTime) -> Result<Caller, Problem> {
    let serial = match peer {
        Peer::Local => return Ok(Caller::LocalRoot),
        Peer::Remote { certificate: None, address } => {
            return Ok(Caller::Anonymous { address: Some(*address) });
        }
        Peer::Remote { certificate: Some(serial), .. } => *serial,
    };
    let Some(certificate) = world.certificate(&serial) else {
        return Err(Problem::identity_unknown());
    };
    if certificate.revoked.is_some() {
        return Err(Problem::identity_revoked());
    }
    let at = world.record_time(at);
    let expired = at >= certificate.not_after;
    match &certificate.owner {
        Owner::Node(id) => {
            let name = node_name(world, *id);
            if expired {
                world.authenticate_resume(serial, at)?;
                return Ok(Caller::ExpiredNode { id: *id, name, serial });
            }
            world.authenticate(serial, at)?;
            Ok(Caller::Node { id: *id, name, serial })
        }
        Owner::Operator(name) => {
            world.authenticate(serial, at)?;
            Ok(Caller::Operator { name: name.clone(), serial })
        }
        _ if expired => Err(Problem::identity_expired()),
        Owner::Service { node, name } => {
            let node = node_name(world, *node);
            Ok(Caller::Service { serial, owner: format!("service {name} of node {node}") })
        }
        Owner::Detached { .. } | Owner::Controller { .. } => {
            let owner = certificate.names.first().map(ToString::to_string).unwrap_or_default();
            Ok(Caller::Service { serial, owner })
        }
    }
}

fn node_name(world: &World, node: NodeId) -> String {
    world.node(node).map_or_else(|| node.to_string(), |node| node.name.to_string())
}

/// What the gate asks.
#[derive(Debug)]
pub(crate) struct GateParts {
    pub(crate) directory: Arc<Directory>,
    pub(crate) clock: SharedClock,
    pub(crate) denials: Denials,
}

/// All services, seen from one connection.
#[derive(Clone)]
pub(crate) struct Gate {
    routes: Routes,
    connection: Arc<Connection>,
    parts: Arc<GateParts>,
}

impl Gate {
    pub(crate) fn new(routes: Routes, connection: Arc<Connection>, parts: Arc<GateParts>) -> Self {
        Self { routes, connection, parts }
    }

    fn admit(&self, path: &str) -> Result<Caller, tonic::Status> {
        let at = UtcTime::from(self.parts.clock.utc_now());
        let caller = self.parts.directory.read(|world| identify(&self.connection.peer, world, at));
        let caller = caller.inspect_err(|problem| {
            tracing::info!(method = method_name(path), peer = ?self.connection.peer, why = problem.why, "refused");
        })?;
        authorize(&caller, path)
            .inspect_err(|status| self.parts.denials.note(&caller, path, status.message(), at))?;
        Ok(caller)
    }
}

impl Service<Request<Incoming>> for Gate {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Service::<Request<Incoming>>::poll_ready(&mut self.routes, context)
    }

    fn call(&mut self, mut request: Request<Incoming>) -> Self::Future {
        match self.admit(request.uri().path()) {
            Ok(caller) => {
                request.extensions_mut().insert(caller);
                request.extensions_mut().insert(Arc::clone(&self.connection));
                let answer = AssertUnwindSafe(self.routes.call(request)).catch_unwind();
                // A handler that panics answers for itself alone: it holds no lock that others trust.
                Box::pin(answer.map(|done| {
                    done.unwrap_or_else(|_| {
                        let status = tonic::Status::from(Problem::internal("a handler panicked"));
                        Ok(status.into_http())
                    })
                }))
            }
            Err(status) => Box::pin(std::future::ready(Ok(status.into_http()))),
        }
    }
}
