use std::sync::Arc;

use mesh_core::{Command, CommandKind, Refusal};
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
        let invalid = |problems| pb::PolicyCheck { valid: false, problems, warnings: Vec::new() };
        let checked = self.0.directory.read(|world| {
            world.check_policy(&document.toml).map(|policy| (world.policy_warnings(&policy), policy))
        });
        let check = match checked {
            Err(problems) => invalid(problems),
            Ok((warnings, policy)) => match self.0.issuing.profile_problems(policy).await? {
                problems if problems.is_empty() => pb::PolicyCheck { valid: true, problems, warnings },
                problems => invalid(problems),
            },
        };
        Ok(Response::new(check))
    }

    async fn apply(
        &self,
        request: Request<pb::PolicyDocument>,
    ) -> Result<Response<pb::ActionResponse>, Status> {
        let caller = Caller::from_extensions(request.extensions())?;
        let document = limited(request.into_inner())?;
        let operation = super::operation(&document.operation_id)?;
        self.0.check_profiles(&caller, &document.toml).await?;
        let command = Command::ApplyPolicy { toml: document.toml };
        let committed = self.0.submit(&caller, operation, command).await?;
        let version = self.0.directory.read(|world| world.policy_version());
        let detail = format!("policy version {version} is in force");
        Ok(Response::new(pb::ActionResponse { changed: committed.changed(), detail, incomplete: false }))
    }
}

impl Parts {
    /// A profile comes into force only after a sample chain under it was made and linted. The rest is the writer's to check.
    async fn check_profiles(&self, caller: &Caller, toml: &str) -> Result<(), Problem> {
        let actor = super::actor(caller)?;
        let policy = self.directory.read(|world| {
            world.check_actor(self.utc(), &actor, CommandKind::ApplyPolicy)?;
            Ok::<_, Refusal>(world.check_policy(toml).ok())
        })?;
        let problems = match policy {
            Some(policy) => self.issuing.profile_problems(policy).await?,
            None => Vec::new(),
        };
        if problems.is_empty() { Ok(()) } else { Err(Refusal::PolicyInvalid { problems }.into()) }
    }
}

fn limited(document: pb::PolicyDocument) -> Result<pb::PolicyDocument, Problem> {
    match document.toml.len() {
        0..=POLICY_BYTES_MAX => Ok(document),
        _ => Err(Problem::too_large("policy", POLICY_BYTES_MAX)),
    }
}
