use std::sync::Arc;

use mesh_core::{Change, Command, OperatorName, Role, TokenId, UtcTime};
use mesh_proto::v1 as pb;
use tonic::{Request, Response, Status};

use crate::auth::Caller;
use crate::authority::label;
use crate::enroll::{Login, TokenClaim};
use crate::limits::TOKEN_TTL;
use crate::parts::Parts;
use crate::status::Problem;
use crate::token::{TokenFacts, encode};

#[derive(Debug)]
pub(crate) struct OperatorsService(pub(crate) Arc<Parts>);

#[tonic::async_trait]
impl pb::operators_server::Operators for OperatorsService {
    async fn add(
        &self,
        request: Request<pb::AddOperatorRequest>,
    ) -> Result<Response<pb::AddOperatorResponse>, Status> {
        let caller = Caller::from_extensions(request.extensions())?;
        let request = request.into_inner();
        let name = operator_name(&request.name)?;
        let role: Role = request
            .role
            .parse()
            .map_err(|error: mesh_core::command::RoleError| Problem::usage(error.to_string()))?;
        let operation = super::operation(&request.operation_id)?;
        let secret = self.0.token_secrets.secret(&caller.describe(), &operation);
        let mut token = TokenId(mesh_runtime::random_bytes());
        let command = Command::AddOperator {
            name: name.clone(),
            role,
            token,
            secret_hash: secret.hash(),
            expires_at: self.0.utc() + TOKEN_TTL,
        };
        let committed = self.0.submit(&caller, operation, command).await?;
        if !committed.changed() {
            let before = self.0.directory.read(|world| {
                let login = world.operator(&name)?.login;
                world.token(&login).filter(|token| token.secret_hash == secret.hash()).map(|token| token.id)
            });
            token = before.ok_or_else(|| {
                Problem::new(
                    pb::ErrorCode::OperatorExists,
                    format!("operator {name} was added before; the token went out with the first answer"),
                    "remove the operator and add it again if that answer was lost",
                )
            })?;
        }
        let facts = TokenFacts { kind: pb::join_token::Kind::Operator, ..self.0.token_facts() };
        Ok(Response::new(pb::AddOperatorResponse { token: encode(&facts, &token, &secret) }))
    }

    async fn list(&self, _: Request<pb::Empty>) -> Result<Response<pb::ListOperatorsResponse>, Status> {
        let operators = self.0.directory.read(|world| {
            let message = |operator: &mesh_core::world::Operator| {
                let certificate = operator.serial.and_then(|serial| world.certificate(&serial));
                pb::Operator {
                    name: operator.name.to_string(),
                    role: operator.role.to_string(),
                    added_at: operator.added_at.unix(),
                    not_after: certificate.map_or(UtcTime::EPOCH, |c| c.not_after).unix(),
                    serial: operator.serial.map(|s| s.0.to_vec()).unwrap_or_default().into(),
                }
            };
            world.operators().map(message).collect()
        });
        Ok(Response::new(pb::ListOperatorsResponse { operators }))
    }

    async fn remove(
        &self,
        request: Request<pb::RemoveOperatorRequest>,
    ) -> Result<Response<pb::ActionResponse>, Status> {
        let caller = Caller::from_extensions(request.extensions())?;
        let request = request.into_inner();
        let name = operator_name(&request.name)?;
        let operation = super::operation(&request.operation_id)?;
        let command = Command::RemoveOperator { name: name.clone() };
        let committed = self.0.submit(&caller, operation, command).await?;
        // An operator who never logged in had no certificate: nothing for a CRL to say.
        if committed.changes().iter().any(|change| matches!(change, Change::CertificateRevoked { .. })) {
            self.0.publisher.cover(committed.changes()).await?;
        }
        let detail = format!("operator {name} is removed");
        Ok(Response::new(pb::ActionResponse { changed: committed.changed(), detail, incomplete: false }))
    }

    async fn login(&self, request: Request<pb::LoginRequest>) -> Result<Response<pb::LoginResponse>, Status> {
        let source = match Caller::from_extensions(request.extensions())? {
            Caller::Anonymous { address } => address,
            _ => None,
        };
        let request = request.into_inner();
        let login = Login {
            token: TokenClaim::new(&request.token_id, &request.token_secret),
            operation: super::operation(&request.operation_id)?,
            csr: request.csr,
        };
        Ok(Response::new(self.0.enroller.login(source, login).await?))
    }
}

/// A name that can stand in a certificate as well.
fn operator_name(text: &str) -> Result<OperatorName, Problem> {
    let invalid = |why: String| {
        Problem::new(
            pb::ErrorCode::NameInvalid,
            format!("operator name {}: {why}", mesh_core::change::escape(text)),
            "use lower-case letters, digits and inner hyphens",
        )
    };
    let name = OperatorName::try_from(text).map_err(|error| invalid(error.to_string()))?;
    label(name.as_str()).map_err(|error| invalid(error.to_string()))?;
    Ok(name)
}
