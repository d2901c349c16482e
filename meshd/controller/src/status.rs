//! The only door from errors to gRPC: what a caller is told, and what stays in our log.

use mesh_core::Refusal;
use mesh_proto::Exit;
use mesh_proto::v1::{ErrorCode, ErrorDetail};
use prost::Message as _;
use tonic::{Code, Status};

use crate::writer::WriteError;

/// Octets of all facts, and of the reason: trailers travel as headers, and clients bound those.
const FACTS_BYTES_MAX: usize = 4 * 1024;
const WHY_BYTES_MAX: usize = 1024;

/// A refusal or failure as the caller sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Problem {
    pub(crate) code: ErrorCode,
    pub(crate) why: String,
    pub(crate) next: String,
    pub(crate) facts: Vec<String>,
}

impl Problem {
    pub(crate) fn new(code: ErrorCode, why: impl Into<String>, next: impl Into<String>) -> Self {
        Self { code, why: why.into(), next: next.into(), facts: Vec::new() }
    }

    /// Something of ours went wrong: `what` goes to the log, the caller learns no more than that.
    pub(crate) fn internal(what: impl AsRef<str>) -> Self {
        tracing::error!(what = what.as_ref(), "internal error");
        Self::new(
            ErrorCode::Internal,
            "internal error",
            "look at the controller's log; this is a bug worth reporting",
        )
    }

    /// The same for an error with causes.
    pub(crate) fn internal_error(what: &str, error: &(dyn std::error::Error + 'static)) -> Self {
        Self::internal(format!("{what}: {}", mesh_runtime::chain(error)))
    }

    pub(crate) fn denied(who: &str, what: &str) -> Self {
        Self::new(
            ErrorCode::Denied,
            format!("{what} is not allowed to {who}"),
            "use an identity that may, e.g. an operator's (`meshctl login`), or root on the controller's host",
        )
    }

    pub(crate) fn identity_expired() -> Self {
        Self::new(
            ErrorCode::IdentityExpired,
            "the certificate has expired",
            "the node resumes by itself within 30 days; an operator logs in again with a new token",
        )
    }

    pub(crate) fn identity_revoked() -> Self {
        Self::new(
            ErrorCode::IdentityRevoked,
            "the certificate has been revoked",
            "an operator has to create a new token before this machine can enroll again",
        )
    }

    pub(crate) fn identity_unknown() -> Self {
        Self::new(
            ErrorCode::IdentityUnknown,
            "the controller does not know this certificate",
            "enroll with a token of this controller",
        )
    }

    /// What a caller with a wrong token learns, whatever was wrong with it.
    pub(crate) fn token_invalid() -> Self {
        Self::new(
            ErrorCode::TokenInvalid,
            "the token is not valid here",
            "create a new one with `meshctl token create`",
        )
    }

    pub(crate) fn usage(why: impl Into<String>) -> Self {
        Self::new(ErrorCode::Usage, why, "correct the request; `meshctl --help` shows the forms")
    }

    pub(crate) fn too_large(what: &str, max: usize) -> Self {
        Self::new(
            ErrorCode::TooLarge,
            format!("{what} is larger than {max}"),
            "send less; the limit is fixed",
        )
    }

    pub(crate) fn overloaded(what: &str) -> Self {
        Self::new(ErrorCode::Overloaded, format!("too many {what}"), "try again in a moment")
    }

    /// A stream ends although nothing is wrong with it: the controller stops, or the connection is old.
    pub(crate) fn closing() -> Self {
        Self::new(
            ErrorCode::ControllerUnreachable,
            "the controller closes this connection",
            "nothing: the node reconnects by itself",
        )
    }

    pub(crate) fn relay_off() -> Self {
        Self::new(
            ErrorCode::Denied,
            "this controller runs no relay",
            "switch it on in the controller's configuration (`relay = true`)",
        )
    }

    /// A request came too late: the controller ends.
    pub(crate) fn stopping() -> Self {
        Self::new(ErrorCode::ControllerUnreachable, "the controller is stopping", "try again when it is back")
    }

    pub(crate) fn root_sealed(what: &str) -> Self {
        Self::new(
            ErrorCode::RootSealed,
            format!("the root's key is offline: the controller cannot {what}"),
            "write a request with `meshctl ca rotate start --request-out FILE`, sign it with `meshctl ca sign-issuer` where the key is",
        )
    }

    /// A file of the ceremony with the offline root does not belong to what is here.
    pub(crate) fn ceremony(why: impl Into<String>) -> Self {
        Self::new(
            ErrorCode::CeremonyMismatch,
            why,
            "compare the fingerprints of request, root and answer; make a new request if in doubt; nothing was changed",
        )
    }

    /// A key of the CA did not sign. A hardware token that is gone is for its owner to put back.
    pub(crate) fn key_store(what: &str, error: &mesh_ca::KeyStoreError) -> Self {
        match error {
            mesh_ca::KeyStoreError::Token { what: why, .. } => {
                tracing::error!(why, "the hardware token with the CA's key does not sign");
                Self::new(
                    ErrorCode::TokenUnavailable,
                    format!("cannot {what}: the hardware token with the CA's key refuses: {why}"),
                    "put the token back and restart the controller; nothing was signed",
                )
            }
            other => Self::internal_error(&format!("cannot {what}"), other),
        }
    }

    pub(crate) fn node_not_found(name: &str) -> Self {
        Self::new(
            ErrorCode::NodeNotFound,
            format!("there is no node {name}"),
            "`meshctl node ls` shows all nodes",
        )
    }

    pub(crate) fn certificate_not_found(which: &str) -> Self {
        Self::new(
            ErrorCode::CertificateNotFound,
            format!("there is no certificate {which}"),
            "`meshctl cert ls` shows all certificates",
        )
    }

    fn grpc_code(&self) -> Code {
        match (self.code, self.code.exit()) {
            (ErrorCode::Internal, _) => Code::Internal,
            (ErrorCode::DiskFull | ErrorCode::Overloaded | ErrorCode::AddressesExhausted, _) => {
                Code::ResourceExhausted
            }
            (ErrorCode::TokenInvalid, _) => Code::Unauthenticated,
            (ErrorCode::TokenUsed, _) => Code::FailedPrecondition,
            (_, Exit::Usage) => Code::InvalidArgument,
            (_, Exit::Denied) => Code::PermissionDenied,
            (_, Exit::Unreachable) => Code::Unavailable,
            (_, Exit::NotFound) => Code::NotFound,
            (_, Exit::Conflict) => Code::FailedPrecondition,
            _ => Code::Aborted,
        }
    }

    /// The three facts, cut to what fits into the headers of an answer.
    pub(crate) fn detail(mut self) -> ErrorDetail {
        let (exit, count) = (self.code.exit().number(), self.facts.len());
        let mut room = FACTS_BYTES_MAX;
        self.facts.retain(|fact| {
            room = room.saturating_sub(fact.len());
            room > 0
        });
        if self.facts.len() < count {
            self.facts.push(format!("and {} more", count - self.facts.len()));
        }
        ErrorDetail {
            code: self.code as i32,
            why: cut(self.why, WHY_BYTES_MAX),
            next: self.next,
            exit,
            facts: self.facts,
        }
    }
}

impl From<Problem> for Status {
    fn from(problem: Problem) -> Self {
        let code = problem.grpc_code();
        let message = cut(problem.why.clone(), WHY_BYTES_MAX);
        Status::with_details(code, message, problem.detail().encode_to_vec().into())
    }
}

impl From<Refusal> for Problem {
    fn from(refusal: Refusal) -> Self {
        let (code, next) = explain(&refusal);
        let mut problem = Self::new(code, refusal.to_string(), next);
        if let Refusal::PolicyInvalid { problems } = refusal {
            problem.why = "the policy is not valid".into();
            problem.facts = problems;
        }
        problem
    }
}

/// Code and next step of each refusal.
fn explain(refusal: &Refusal) -> (ErrorCode, &'static str) {
    use ErrorCode as C;
    use Refusal as R;
    const NEW_TOKEN: &str = "create a new token with `meshctl token create`";
    const OTHER_NAME: &str = "choose another name, or end the one that has it";
    const NEW_KEY: &str = "make a new key and ask again";
    const ASK_AGAIN: &str = "try again";
    const FULL: &str = "remove what is no longer used, then try again";
    const CLOCK: &str = "check the controller's clock, then `meshctl clock confirm`";
    const BUG: &str = "look at the controller's log; this is a bug worth reporting";
    match refusal {
        R::Denied { .. } => {
            (C::Denied, "use an identity with a role that may, or root on the controller's host")
        }
        R::IdentityUnknown { .. } => (C::IdentityUnknown, "enroll with a token of this controller"),
        R::IdentityExpired { .. } => {
            (C::IdentityExpired, "the node resumes by itself within 30 days; an operator logs in again")
        }
        R::IdentityRevoked { .. } => {
            (C::IdentityRevoked, "an operator has to create a new token before this machine can enroll again")
        }
        R::IdentitySuperseded { .. } => (C::IdentityRevoked, "use the newest certificate of this identity"),
        R::ResumeWindowPassed { .. } => (C::ResumeWindowPassed, "enroll again with a new token"),
        R::TokenUnknown { .. } => (C::TokenInvalid, NEW_TOKEN),
        R::TokenExpired { .. } => (C::TokenExpired, NEW_TOKEN),
        R::TokenUsed { .. } => (C::TokenUsed, NEW_TOKEN),
        R::TokenRevoked { .. } => (C::TokenRevoked, NEW_TOKEN),
        R::TokenNameMismatch { .. } => (
            C::TokenNameMismatch,
            "enroll under the token's name, or create a token for this one; the token is not spent",
        ),
        R::TokenPurpose { .. } => {
            (C::TokenInvalid, "join tokens are for `meshctl enroll`, login tokens for `meshctl login`")
        }
        R::TokenExists { .. } => (C::Internal, ASK_AGAIN),
        R::TokenUses { .. } | R::TokenLife { .. } => (C::Usage, "stay within the limits"),
        R::ApprovalNotRequired { .. } | R::NotApproved { .. } => {
            (C::ApprovalPending, "wait for an operator's `meshctl node approve`")
        }
        R::NameInvalid { source, .. } => match source {
            mesh_core::NameError::Wildcard { .. } => {
                (C::NameWildcard, "name each host; wildcards are not issued")
            }
            mesh_core::NameError::Reserved { .. } => (C::NameReserved, OTHER_NAME),
            _ => (C::NameInvalid, "use lower-case letters, digits and inner hyphens"),
        },
        R::NameTaken { .. } | R::NodeEnrolled { .. } => (C::NameTaken, OTHER_NAME),
        R::NameReserved { .. } => (C::NameReserved, "choose another name; this one is the mesh's own"),
        R::NameOutsideDomain { .. } => (C::NameOutsideDomain, "choose a name below the mesh's domain"),
        R::NameNotGranted { .. } => {
            (C::NameNotGranted, "use the node's own name or one below it, or grant the name in policy.toml")
        }
        R::NameStopped { .. } => (C::NameStopped, "run `meshctl cert issue` for it again"),
        R::AddressNotOwned { .. } => (C::NameNotGranted, "ask only for the node's own mesh addresses"),
        R::AddressTaken { .. } | R::NodeIdTaken { .. } | R::SerialTaken { .. } => (C::Overloaded, ASK_AGAIN),
        R::AddressOutsidePool { .. } => (C::Internal, BUG),
        R::KeyInUse { .. } | R::WireguardKeyInUse { .. } => (C::KeyInUse, NEW_KEY),
        R::KeyRevoked { .. } | R::WireguardKeyRevoked { .. } => (C::KeyRevoked, NEW_KEY),
        R::WireguardKeyCount { .. } => (C::Usage, "send one key, or two during a rotation"),
        R::NodeNotFound { .. } => (C::NodeNotFound, "`meshctl node ls` shows all nodes"),
        R::NodeRevoked { .. } => {
            (C::NodeRevoked, "remove it, then create a new token, to let the machine in again")
        }
        R::NodePending { .. } => (C::NodePending, "approve it with `meshctl node approve`, or remove it"),
        R::TooManyTags { .. } => (C::TagInvalid, "use fewer tags"),
        R::CertificateNotFound { .. } => (C::CertificateNotFound, "`meshctl cert ls` shows all certificates"),
        R::NodeIdentity { .. } => (C::NodeIdentity, "to end a node use `meshctl node revoke`"),
        R::ControllerIdentity { .. } => {
            (C::NodeIdentity, "restart the controller: it takes a new certificate")
        }
        R::CertificateMismatch { .. } => (C::CertificateInvalid, "correct the request"),
        R::IssuerUnknown { .. } | R::CrlNumber { .. } | R::CrlMismatch { .. } => (C::Internal, BUG),
        R::ProfileUnknown { .. } => (
            C::ProfileUnknown,
            "server, client and peer are built in; others stand in the policy as [profile.NAME]",
        ),
        R::ProfileNotGiven { .. } => {
            (C::ProfileNotGiven, "tag the node, or add a rule to the profile in policy.toml")
        }
        R::NameOutsideProfile { .. } | R::AddressOutsideProfile { .. } => {
            (C::NameOutsideProfile, "use another name or profile, or add the name to the profile's rules")
        }
        R::KeyOutsideProfile { .. } => {
            (C::KeyOutsideProfile, "choose another key with --key-type, or allow this type in the profile")
        }
        R::LifetimeOutsideProfile { .. } => {
            (C::LifetimeOutsideProfile, "ask for less with --ttl, or leave it out")
        }
        R::ServiceOutsideProfile { .. } => (
            C::ServiceOutsideProfile,
            "the first name of the pair decides it: put another first, or add it to \"services\" of the profile",
        ),
        R::ProfileChanged { .. } => (C::ProfileChanged, ASK_AGAIN),
        R::IssuerNotActive { .. } => (C::CertificateInvalid, "ask again: another CA issues now"),
        R::AuthorityInvalid { .. } => (C::RotationRefused, "nothing was changed; look at `meshctl ca show`"),
        R::RotationRunning { .. } => {
            (C::RotationRunning, "finish it, or take it back: `meshctl ca rotate status`, `advance`, `abort`")
        }
        R::RotationNone => (
            C::RotationNone,
            "`meshctl ca rotate start` begins one; an authority that was dropped is not taken back",
        ),
        R::RotationMoved { .. } => {
            (C::RotationRefused, "look at `meshctl ca rotate status`, then decide again")
        }
        R::RotationAborted => {
            (C::RotationRefused, "advance it to its end, then start another; a way back is not turned again")
        }
        R::RotationWaits { .. } => (
            C::RotationWaits,
            "`meshctl ca rotate status` names them; a node that is gone for good: `meshctl node revoke`",
        ),
        R::TrustGap { .. } | R::LeafInUse { .. } | R::NodeBlind { .. } => (
            C::RotationRefused,
            "wait until it has been renewed, or revoke it; `meshctl ca rotate status` says more",
        ),
        R::RootSealed { .. } => (
            C::RootSealed,
            "write a request with `meshctl ca rotate start --request-out FILE`, and sign it where the key is",
        ),
        R::RootNotExported { .. } => (C::RotationRefused, "`meshctl ca seal` exports it first"),
        R::PolicyInvalid { .. } => {
            (C::PolicyInvalid, "correct it; `meshctl policy check` lists every problem")
        }
        R::OperatorExists { .. } => (C::OperatorExists, "remove the operator first, or choose another name"),
        R::OperatorNotFound { .. } => (C::OperatorNotFound, "`meshctl operator ls` shows all operators"),
        R::LastAdmin { .. } => (C::LastAdmin, "add another admin first"),
        R::MeshMissing | R::MeshExists | R::MeshInvalid { .. } => (C::Internal, BUG),
        R::ClockJump { .. } => (C::ClockJump, CLOCK),
        R::OperationReused { .. } => (C::Usage, "draw a new operation id for a new request"),
        R::Limit { .. } => (C::Overloaded, FULL),
    }
}

impl From<WriteError> for Problem {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::Refused(refusal) => refusal.into(),
            WriteError::DiskFull => Self::new(
                ErrorCode::DiskFull,
                "the controller's disk is full; nothing was changed",
                "free some space on the controller, then try again",
            ),
            WriteError::Overloaded => Self::overloaded("changes at the same time"),
            WriteError::TooLarge => Self::new(
                ErrorCode::TooLarge,
                "the change is too large for one record",
                "split it into smaller ones",
            ),
            WriteError::Journal(what) => Self::internal(what),
            WriteError::Unknown => Self::new(
                ErrorCode::Overloaded,
                "the controller is stopping; whether the change was made is not known yet",
                "repeat the same command: it is made once at most",
            ),
        }
    }
}

/// At most `max` octets of `text`, whole characters, and an ellipsis where something is missing.
pub(crate) fn cut(mut text: String, max: usize) -> String {
    if text.len() > max {
        let end = (0..=max).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
        text.truncate(end);
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_fits_into_the_headers_of_an_answer() {
        let mut problem = Problem::usage("ü".repeat(5_000));
        problem.facts = (0..1_000).map(|line| format!("line {line}: something is wrong here")).collect();
        let status = Status::from(problem);
        assert!(status.details().len() < 6 * 1024, "{}", status.details().len());
        assert!(status.message().len() <= WHY_BYTES_MAX + '…'.len_utf8());
        let detail = ErrorDetail::decode(status.details()).unwrap();
        assert_eq!((detail.code(), detail.exit), (ErrorCode::Usage, 2));
        let more = detail.facts.last().unwrap();
        assert_eq!(*more, format!("and {} more", 1_000 - (detail.facts.len() - 1)));
    }

    #[test]
    fn what_went_wrong_inside_stays_inside() {
        let error = std::io::Error::other("secret path /x/y");
        let status = Status::from(Problem::internal_error("cannot do it", &error));
        assert_eq!(status.code(), Code::Internal);
        assert!(!status.message().contains("secret") && !format!("{status:?}").contains("/x/y"));
    }
}
