//! One thin handler for each call.

use std::pin::Pin;
use std::sync::Arc;

use mesh_proto::v1 as pb;
use mesh_proto::v1::certificates_client::CertificatesClient;
use mesh_proto::v1::local_server::Local;
use mesh_proto::v1::nodes_client::NodesClient;
use tokio_stream::Stream;
use tonic::transport::server::UdsConnectInfo;
use tonic::{Request, Response, Status};

use super::{doctor, enroll, ping, status};
use crate::certs::{Definition, Manager};
use crate::failure::Failure;
use crate::limits::CALL_TIMEOUT;
use crate::run::Node;
use crate::session::Session;

/// Answers for one node.
pub(crate) struct LocalService {
    node: Arc<Node>,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send + 'static>>;

impl LocalService {
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self { node }
    }

    /// Tells the controller, as far as it can be reached. Leaving works without it.
    async fn tell_controller(&self, session: &Session) -> Result<(), Failure> {
        let channel = session.uplink.open_channel()?;
        let mut request = Request::new(pb::Empty {});
        request.set_timeout(CALL_TIMEOUT);
        NodesClient::new(channel)
            .leave(request)
            .await
            .map(drop)
            .map_err(|status| Failure::from_status(&status))
    }
}

#[tonic::async_trait]
impl Local for LocalService {
    type EnrollStream = Answers<pb::LocalEnrollProgress>;
    type PingStream = Answers<pb::PingReply>;

    async fn enroll(
        &self,
        request: Request<pb::LocalEnrollRequest>,
    ) -> Result<Response<Self::EnrollStream>, Status> {
        Ok(Response::new(Box::pin(enroll::enroll(self.node.clone(), request.into_inner()))))
    }

    async fn leave(&self, _request: Request<pb::Empty>) -> Result<Response<pb::ActionResponse>, Status> {
        let Ok(session) = self.node.session().await else {
            let detail = "this machine was not enrolled".to_owned();
            return Ok(Response::new(pb::ActionResponse { changed: false, detail, incomplete: false }));
        };
        let told = self.tell_controller(&session).await;
        drop(session);
        let (reply, answer) = tokio::sync::oneshot::channel();
        let gone = |_| Status::from(Failure::from(crate::network::Gone));
        self.node.leave.send(reply).await.map_err(|_| Status::from(Failure::from(crate::network::Gone)))?;
        answer.await.map_err(gone)??;
        let incomplete = told.is_err();
        let detail = match told {
            Ok(()) => "this machine has left the mesh".to_owned(),
            Err(failure) => format!(
                "this machine has left the mesh; the controller was not told ({failure}): run `meshctl node rm` there"
            ),
        };
        Ok(Response::new(pb::ActionResponse { changed: true, detail, incomplete }))
    }

    async fn status(&self, _request: Request<pb::Empty>) -> Result<Response<pb::NodeStatus>, Status> {
        Ok(Response::new(status::status(&self.node).await?))
    }

    async fn issue_certificate(
        &self,
        request: Request<pb::LocalIssueRequest>,
    ) -> Result<Response<pb::ManagedPair>, Status> {
        let session = self.node.session().await?;
        let uid = caller_uid(&request).ok_or_else(|| Status::unauthenticated("no peer credentials"))?;
        let own_certs = Manager::own_certs(&self.node.state);
        let definition = Definition::from_request(request.into_inner(), uid, &own_certs)?;
        Ok(Response::new(session.pairs.issue(definition).await?))
    }

    async fn explain_certificate(
        &self,
        request: Request<pb::ExplainRequest>,
    ) -> Result<Response<pb::ExplainResponse>, Status> {
        let channel = self.node.session().await?.uplink.open_channel()?;
        let mut call = Request::new(request.into_inner());
        call.set_timeout(CALL_TIMEOUT);
        let answer = CertificatesClient::new(channel).explain(call).await;
        answer.map_err(|status| Failure::from_status(&status).into())
    }

    async fn renew_certificate(
        &self,
        request: Request<pb::LocalRenewRequest>,
    ) -> Result<Response<pb::ManagedPair>, Status> {
        let name = request.into_inner().name;
        Ok(Response::new(self.node.session().await?.pairs.renew(name).await?))
    }

    async fn list_certificates(
        &self,
        _request: Request<pb::Empty>,
    ) -> Result<Response<pb::ManagedPairs>, Status> {
        let pairs = self.node.session().await?.pairs.list().await.map_err(Failure::from)?;
        Ok(Response::new(pb::ManagedPairs { pairs }))
    }

    async fn ping(&self, request: Request<pb::PingRequest>) -> Result<Response<Self::PingStream>, Status> {
        let session = self.node.session().await?;
        Ok(Response::new(Box::pin(ping::ping(session, request.into_inner()).await?)))
    }

    async fn doctor(&self, _request: Request<pb::Empty>) -> Result<Response<pb::DoctorReport>, Status> {
        Ok(Response::new(doctor::doctor(&self.node).await?))
    }
}

/// Who is at the other end of the socket, as the kernel says.
fn caller_uid<T>(request: &Request<T>) -> Option<u32> {
    request.extensions().get::<UdsConnectInfo>()?.peer_cred.map(|peer| peer.uid())
}
