use std::sync::Arc;

use mesh_proto::v1 as pb;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::auth::Caller;
use crate::gate::Connection;
use crate::parts::Parts;
use crate::status::Problem;

#[derive(Debug)]
pub(crate) struct SyncService(pub(crate) Arc<Parts>);

#[tonic::async_trait]
impl pb::sync_server::Sync for SyncService {
    type SyncStream = ReceiverStream<Result<pb::SyncResponse, Status>>;

    async fn sync(
        &self,
        request: Request<Streaming<pb::SyncRequest>>,
    ) -> Result<Response<Self::SyncStream>, Status> {
        let caller = Caller::from_extensions(request.extensions())?;
        let Caller::Node { id, serial, .. } = caller else {
            return Err(Problem::denied(&caller.describe(), "Sync").into());
        };
        let connection = request
            .extensions()
            .get::<Arc<Connection>>()
            .cloned()
            .ok_or_else(|| Problem::internal("request came past the gate"))?;
        Ok(Response::new(self.0.sync.open((id, serial), connection, request.into_inner())))
    }
}
