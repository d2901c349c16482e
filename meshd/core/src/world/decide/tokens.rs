//! Join and login tokens: made, spent, revoked.

use super::{At, Decided, Decision};
use crate::change::Change;
use crate::command::{Actor, Command};
use crate::ids::TokenId;
use crate::limits::{TAGS_MAX, TOKEN_LIFE_MAX, TOKEN_USES_MAX, TOKENS_MAX};
use crate::refusal::Refusal;
use crate::world::{Purpose, Token, TokenState, World};

impl World {
    pub(super) fn decide_create_token(&self, now: At<'_>, actor: &Actor, command: &Command) -> Decided {
        let Command::CreateToken { id, secret_hash, tags, name, uses, expires_at, require_approval } =
            command
        else {
            return Ok(Decision::AlreadyDone);
        };
        if *uses == 0 || *uses > TOKEN_USES_MAX || (name.is_some() && *uses > 1) {
            let max = if name.is_some() { 1 } else { TOKEN_USES_MAX };
            return Err(Refusal::TokenUses { uses: *uses, max });
        }
        if tags.len() > TAGS_MAX {
            return Err(Refusal::TooManyTags { max: TAGS_MAX });
        }
        if let Some(name) = name.as_ref().filter(|name| name.as_str() == now.mesh.controller_name) {
            return Err(Refusal::NameReserved { name: name.to_string() });
        }
        let token = Token {
            id: *id,
            secret_hash: *secret_hash,
            purpose: Purpose::Enrollment,
            tags: tags.clone(),
            name: name.clone(),
            uses: *uses,
            used: 0,
            created_at: now.at,
            expires_at: *expires_at,
            require_approval: *require_approval,
            created_by: actor.clone(),
            revoked_at: None,
        };
        self.check_new_token(now, &token)?;
        Ok(Decision::Changes(vec![Change::TokenCreated { token }]))
    }

    /// What join and login tokens must both fulfil.
    pub(super) fn check_new_token(&self, now: At<'_>, token: &Token) -> Result<(), Refusal> {
        if self.token(&token.id).is_some() {
            return Err(Refusal::TokenExists { id: token.id });
        }
        if token.expires_at <= now.at || token.expires_at.since(now.at) > TOKEN_LIFE_MAX {
            return Err(Refusal::TokenLife { max: TOKEN_LIFE_MAX });
        }
        if self.state.tokens.len() >= TOKENS_MAX {
            return Err(Refusal::Limit { what: "tokens", max: TOKENS_MAX });
        }
        Ok(())
    }

    /// A used token may be revoked too: then even a retry gets no answer.
    pub(super) fn decide_revoke_token(&self, id: &TokenId) -> Decided {
        let token = self.token(id).ok_or(Refusal::TokenUnknown { id: *id })?;
        if token.revoked_at.is_some() {
            return Ok(Decision::AlreadyDone);
        }
        Ok(Decision::Changes(vec![Change::TokenRevoked { id: *id }]))
    }

    /// The caller's own token, which is not revoked.
    pub(super) fn presented_token(&self, actor: &Actor, id: &TokenId) -> Result<&Token, Refusal> {
        if *actor != (Actor::Token { id: *id }) {
            return Err(Refusal::TokenUnknown { id: *id });
        }
        let token = self.token(id).ok_or(Refusal::TokenUnknown { id: *id })?;
        match token.revoked_at {
            Some(_) => Err(Refusal::TokenRevoked { id: *id }),
            None => Ok(token),
        }
    }

    /// The token has a use left, and spends it.
    pub(super) fn spend(&self, now: At<'_>, token: &Token) -> Result<Change, Refusal> {
        let id = token.id;
        match token.state(now.at) {
            TokenState::Open => Ok(Change::TokenUsed { id, used: token.used + 1 }),
            TokenState::Used => Err(Refusal::TokenUsed { id }),
            TokenState::Expired => Err(Refusal::TokenExpired { id, ago: now.at.since(token.expires_at) }),
            TokenState::Revoked => Err(Refusal::TokenRevoked { id }),
        }
    }
}
