//! Operators: added, logged in, removed.

use std::collections::BTreeSet;

use super::{At, Decided, Decision};
use crate::certificate::{CertificateRecord, Owner, PROFILE_OPERATOR, Reason};
use crate::change::Change;
use crate::command::{Actor, Command, CommandKind, Role};
use crate::ids::TokenId;
use crate::limits::OPERATORS_MAX;
use crate::names::OperatorName;
use crate::refusal::Refusal;
use crate::world::{Purpose, Token, TokenState, World};

impl World {
    pub(super) fn decide_add_operator(&self, now: At<'_>, actor: &Actor, command: &Command) -> Decided {
        let Command::AddOperator { name, role, token, secret_hash, expires_at } = command else {
            return Ok(Decision::AlreadyDone);
        };
        if self.operator(name).is_some() {
            return Err(Refusal::OperatorExists { name: name.clone() });
        }
        if self.state.operators.len() >= OPERATORS_MAX {
            return Err(Refusal::Limit { what: "operators", max: OPERATORS_MAX });
        }
        let login = Token {
            id: *token,
            secret_hash: *secret_hash,
            purpose: Purpose::Login { operator: name.clone() },
            tags: BTreeSet::new(),
            name: None,
            uses: 1,
            used: 0,
            created_at: now.at,
            expires_at: *expires_at,
            require_approval: false,
            created_by: actor.clone(),
            revoked_at: None,
        };
        self.check_new_token(now, &login)?;
        let added = Change::OperatorAdded { name: name.clone(), role: *role, login: *token };
        Ok(Decision::Changes(vec![Change::TokenCreated { token: login }, added]))
    }

    /// Ends the operator's certificates, and the open tokens he has or made.
    pub(super) fn decide_remove_operator(&self, now: At<'_>, actor: &Actor, name: &OperatorName) -> Decided {
        let operator = self.operator(name).ok_or_else(|| Refusal::OperatorNotFound { name: name.clone() })?;
        let admins = self.operators().filter(|operator| operator.role == Role::Admin).count();
        if operator.role == Role::Admin && admins == 1 && *actor != Actor::LocalRoot {
            return Err(Refusal::LastAdmin { name: name.clone() });
        }
        let his = |certificate: &&crate::world::CertificateState| {
            certificate.owner == Owner::Operator(name.clone()) && certificate.revoked.is_none()
        };
        let mut changes = vec![Change::OperatorRemoved { name: name.clone() }];
        for certificate in self.certificates().filter(his) {
            let (serial, key_hash) = (certificate.serial, certificate.key_hash);
            changes.push(Change::CertificateRevoked { serial, reason: Reason::PrivilegeWithdrawn });
            changes.push(Change::KeyBlocked { key_hash });
        }
        let open = self.tokens().filter(|token| token.state(now.at) == TokenState::Open);
        let his = open.filter(|token| {
            let made = matches!(&token.created_by, Actor::Operator { name: maker, .. } if maker == name);
            let has = token.purpose == Purpose::Login { operator: name.clone() };
            made || has
        });
        changes.extend(his.map(|token| Change::TokenRevoked { id: token.id }));
        Ok(Decision::Changes(changes))
    }

    pub(super) fn decide_login(
        &self,
        now: At<'_>,
        actor: &Actor,
        token: &TokenId,
        certificate: &CertificateRecord,
    ) -> Decided {
        let token = self.presented_token(actor, token)?;
        let Purpose::Login { operator } = &token.purpose else {
            let action = CommandKind::LoginOperator.action();
            return Err(Refusal::TokenPurpose { id: token.id, action });
        };
        let operator = self.operator(operator).filter(|operator| operator.login == token.id);
        let operator = operator.ok_or(Refusal::TokenUnknown { id: token.id })?;
        // The same key again is a retry, as long as what was issued for it is good.
        let issued = operator.serial.and_then(|serial| self.certificate(&serial));
        if issued.is_some_and(|issued| issued.key_hash == certificate.key_hash && issued.is_live(now.at)) {
            return Ok(Decision::AlreadyDone);
        }
        let spent = self.spend(now, token)?;
        self.check_certificate(now, certificate)?;
        let name = operator.name.clone();
        let plain = certificate.names.is_empty() && certificate.ips.is_empty();
        if certificate.owner != Owner::Operator(name.clone())
            || certificate.profile != PROFILE_OPERATOR
            || !plain
        {
            return Err(Refusal::CertificateMismatch { what: "it is not the operator's identity" });
        }
        self.check_key(certificate.key_hash, |_| false)?;
        let serial = certificate.serial;
        let issued = Change::CertificateIssued { certificate: certificate.clone() };
        Ok(Decision::Changes(vec![spent, issued, Change::OperatorCertified { name, serial }]))
    }
}
