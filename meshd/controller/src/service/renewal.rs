use std::sync::Arc;

use mesh_proto::v1 as pb;
use tonic::{Request, Response, Status};

use crate::auth::Caller;
use crate::parts::Parts;
use crate::renew::Renewal;
use crate::service::enrollment::wireguard_keys;
use crate::status::Problem;

#[derive(Debug)]
pub(crate) struct RenewalService(pub(crate) Arc<Parts>);

#[tonic::async_trait]
impl pb::renewal_server::Renewal for RenewalService {
    async fn renew(&self, request: Request<pb::RenewRequest>) -> Result<Response<pb::NodeIdentity>, Status> {
        let caller = Caller::from_extensions(request.extensions())?;
        let renewal = renewal(&caller, request.into_inner(), false)?;
        Ok(Response::new(self.0.renewer.renew(renewal).await?))
    }

    async fn resume(&self, request: Request<pb::RenewRequest>) -> Result<Response<pb::NodeIdentity>, Status> {
        let caller = Caller::from_extensions(request.extensions())?;
        // A node that renewed in time may ask here too, e.g. when its clock runs ahead of ours.
        let expired = matches!(caller, Caller::ExpiredNode { .. });
        let renewal = renewal(&caller, request.into_inner(), expired)?;
        Ok(Response::new(self.0.renewer.renew(renewal).await?))
    }
}

fn renewal(caller: &Caller, request: pb::RenewRequest, resume: bool) -> Result<Renewal, Problem> {
    let (Caller::Node { id, .. } | Caller::ExpiredNode { id, .. }) = caller else {
        return Err(Problem::denied(&caller.describe(), "Renewal"));
    };
    Ok(Renewal {
        node: *id,
        actor: super::actor(caller)?,
        wireguard: wireguard_keys(&request.wireguard_public_keys)?,
        operation: super::operation(&request.operation_id)?,
        csr: request.csr,
        resume,
    })
}
