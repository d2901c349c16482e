use std::sync::Arc;

use mesh_core::Command;
use mesh_proto::v1 as pb;
use tonic::{Request, Response, Status};

use crate::auth::Caller;
use crate::limits::POLICY_BYTES_MAX;
use crate::parts::Parts;
use crate::status::Problem;

#[derive(Debug)]
pub(crate) struct PolicyService(pub(crate) Arc<Parts>);

#[tonic::async_trait]
impl pb::policy_server::Policy for PolicyService {
    async fn get(&self, _: Request<pb::Empty>) -> Result<Response<pb::PolicyDocument>, Status> {
        Ok(Response::new(self.0.directory.read(|world| pb::PolicyDocument {
            toml: world.policy_toml().to_owned(),
            version: world.policy_version(),
            operation_id: Default::default(),
        })))
    }

    async fn check(&self, request: Request<pb::PolicyDocument>) -> Result<Response<pb::PolicyCheck>, Status> {
        let document = limited(request.into_inner())?;
        let check = self.0.directory.read(|world| match world.check_policy(&document.toml) {
            Err(problems) => pb::PolicyCheck { valid: false, problems, warnings: Vec::new() },
            Ok(policy) => pb::PolicyCheck {
                valid: true,
                problems: Vec::new(),
                warnings: world.policy_warnings(&policy),
            },
        });
        Ok(Response::new(check))
    }

    async fn apply(
        &self,
        request: Request<pb::PolicyDocument>,
    ) -> Result<Response<pb::ActionResponse>, Status> {
        let caller = Caller::from_extensions(request.extensions())?;
        let document = limited(request.into_inner())?;
        let operation = super::operation(&document.operation_id)?;
        let command = Command::ApplyPolicy { toml: document.toml };
        let committed = self.0.submit(&caller, operation, command).await?;
        let version = self.0.directory.read(|world| world.policy_version());
        let detail = format!("policy version {version} is in force");
        Ok(Response::new(pb::ActionResponse { changed: committed.changed(), detail, incomplete: false }))
    }
}

fn limited(document: pb::PolicyDocument) -> Result<pb::PolicyDocument, Problem> {
    match document.toml.len() {
        0..=POLICY_BYTES_MAX => Ok(document),
        _ => Err(Problem::too_large("policy", POLICY_BYTES_MAX)),
    }
}
