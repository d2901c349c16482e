use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use mesh_core::world::{Outcome, Token};
use mesh_core::{Command, OperationId, Tag, TokenId};
use mesh_proto::v1 as pb;
use tonic::{Request, Response, Status};

use crate::auth::Caller;
use crate::limits::{TAGS_PER_REQUEST_MAX, TOKEN_TTL, TOKEN_TTL_MAX, TOKEN_USES_MAX};
use crate::parts::Parts;
use crate::service::enrollment::node_name;
use crate::service::messages::token_message;
use crate::status::Problem;
use crate::token::{TokenSecret, encode};

#[derive(Debug)]
pub(crate) struct TokensService(pub(crate) Arc<Parts>);

#[tonic::async_trait]
impl pb::tokens_server::Tokens for TokensService {
    async fn create(
        &self,
        request: Request<pb::CreateTokenRequest>,
    ) -> Result<Response<pb::CreateTokenResponse>, Status> {
        let caller = Caller::from_extensions(request.extensions())?;
        Ok(Response::new(self.0.create_token(&caller, request.into_inner()).await?))
    }

    async fn list(&self, _: Request<pb::Empty>) -> Result<Response<pb::ListTokensResponse>, Status> {
        let now = self.0.utc();
        let tokens = self
            .0
            .directory
            .read(|world| world.tokens().map(|token| token_message(world, token, now)).collect());
        Ok(Response::new(pb::ListTokensResponse { tokens }))
    }

    async fn revoke(
        &self,
        request: Request<pb::RevokeTokenRequest>,
    ) -> Result<Response<pb::ActionResponse>, Status> {
        let caller = Caller::from_extensions(request.extensions())?;
        let request = request.into_inner();
        let id = TokenId::try_from(&*request.id).map_err(|error| Problem::usage(error.to_string()))?;
        let operation = super::operation(&request.operation_id)?;
        let known = self.0.directory.read(|world| world.token(&id).is_some());
        if !known {
            return Err(Problem::new(
                pb::ErrorCode::TokenNotFound,
                format!("there is no token {id}"),
                "`meshctl token ls` shows all tokens",
            )
            .into());
        }
        let committed = self.0.submit(&caller, operation, Command::RevokeToken { id }).await?;
        let detail = format!("token {id} is void");
        Ok(Response::new(pb::ActionResponse { changed: committed.changed(), detail, incomplete: false }))
    }
}

impl Parts {
    async fn create_token(
        &self,
        caller: &Caller,
        request: pb::CreateTokenRequest,
    ) -> Result<pb::CreateTokenResponse, Problem> {
        let operation = super::operation(&request.operation_id)?;
        let tags = tags(&request.tags)?;
        let name = match request.name.as_str() {
            "" => None,
            name => Some(node_name(name)?),
        };
        let ttl = match request.ttl_secs {
            0 => TOKEN_TTL,
            secs => Duration::from_secs(secs.into()),
        };
        if ttl > TOKEN_TTL_MAX {
            return Err(Problem::usage(format!(
                "a token lives at most {} days",
                TOKEN_TTL_MAX.as_secs() / 86_400
            )));
        }
        let uses = request.uses.max(1);
        if uses > TOKEN_USES_MAX {
            return Err(Problem::usage(format!("a token has at most {TOKEN_USES_MAX} uses")));
        }
        let secret = self.token_secrets.secret(&caller.describe(), &operation);
        let id = TokenId(mesh_runtime::random_bytes());
        let command = Command::CreateToken {
            id,
            secret_hash: secret.hash(),
            tags,
            name,
            uses,
            expires_at: self.utc() + ttl,
            require_approval: request.require_approval,
        };
        let committed = self.submit(caller, operation, command).await?;
        let id = match committed.changed() {
            true => id,
            false => self.token_of(&operation, &secret)?,
        };
        let now = self.utc();
        let info =
            self.directory.read(|world| world.token(&id).map(|token| token_message(world, token, now)));
        Ok(pb::CreateTokenResponse { token: encode(&self.token_facts(), &id, &secret), info })
    }
}

impl Parts {
    /// The token that `operation` made before, if `secret` is still its secret.
    fn token_of(&self, operation: &OperationId, secret: &TokenSecret) -> Result<TokenId, Problem> {
        let made = self.directory.read(|world| match world.operation(operation)?.outcome {
            Outcome::Token(id) => world.token(&id).cloned(),
            _ => None,
        });
        let is_same = |token: &Token| token.secret_hash == secret.hash();
        match made {
            Some(token) if is_same(&token) => Ok(token.id),
            Some(token) => Err(answer_gone(&token.id)),
            None => Err(Problem::new(
                pb::ErrorCode::TokenNotFound,
                "the token that this operation created has ended",
                "create another token",
            )),
        }
    }
}

/// The controller was restarted since: only the hash of the secret is left.
pub(crate) fn answer_gone(id: &TokenId) -> Problem {
    Problem::new(
        pb::ErrorCode::TokenAnswerGone,
        format!("token {id} was created by this operation; its secret went out with the first answer"),
        format!("`meshctl token revoke {id}`, then create another"),
    )
}

pub(crate) fn tags(texts: &[String]) -> Result<BTreeSet<Tag>, Problem> {
    if texts.len() > TAGS_PER_REQUEST_MAX {
        return Err(Problem::too_large("list of tags", TAGS_PER_REQUEST_MAX));
    }
    texts
        .iter()
        .map(|text| {
            Tag::try_from(text.as_str()).map_err(|error| {
                Problem::new(
                    pb::ErrorCode::TagInvalid,
                    format!("tag {}: {error}", mesh_core::change::escape(text)),
                    "use 1 to 32 lower-case letters, digits and hyphens",
                )
            })
        })
        .collect()
}
