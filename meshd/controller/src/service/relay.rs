use std::sync::Arc;
use std::time::Duration;

use mesh_proto::v1 as pb;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::auth::Caller;
use crate::gate::Connection;
use crate::parts::Parts;
use crate::status::Problem;

#[derive(Debug)]
pub(crate) struct RelayService(pub(crate) Arc<Parts>);

#[tonic::async_trait]
impl pb::relay_server::Relay for RelayService {
    type OpenStream = ReceiverStream<Result<pb::RelayResponse, Status>>;

    async fn open(
        &self,
        request: Request<Streaming<pb::RelayRequest>>,
    ) -> Result<Response<Self::OpenStream>, Status> {
        let caller = Caller::from_extensions(request.extensions())?;
        let Caller::Node { id, serial, .. } = caller else {
            return Err(Problem::denied(&caller.describe(), "Relay").into());
        };
        let connection = request
            .extensions()
            .get::<Arc<Connection>>()
            .cloned()
            .ok_or_else(|| Problem::internal("request came past the gate"))?;
        let relay = self.0.relay.as_ref().ok_or_else(Problem::relay_off)?;
        let now = self.0.utc();
        let not_after = self.0.directory.read(|world| world.certificate(&serial).map(|c| c.not_after));
        let expires_in = not_after.map_or(Duration::ZERO, |not_after| not_after.since(now));
        Ok(Response::new(relay.open((id, expires_in), connection, request.into_inner())))
    }
}
