//! The one form in which anything that went wrong leaves this crate: code, reason, next step, exit.

use std::fmt;

use mesh_proto::Exit;
use mesh_proto::v1::{ErrorCode, ErrorDetail};
use prost::Message as _;
use tonic::{Code, Status};

/// A refusal or failure as a person sees it: the same facts in the daemon's last line, in `Local`'s
/// answers and in `meshctl`'s output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Stable number, shown as `E0412`.
    pub code: ErrorCode,
    /// One sentence: what was wrong.
    pub why: String,
    /// One sentence: what to do.
    pub next: String,
    /// The exit code: 1 failed, 2 usage, 4 denied, 5 unreachable, 6 not found, 7 conflict.
    pub exit: i32,
    /// Lines shown under the error.
    pub facts: Vec<String>,
}

impl Failure {
    pub fn new(code: ErrorCode, why: impl Into<String>, next: impl Into<String>) -> Self {
        Self { code, why: why.into(), next: next.into(), exit: code.exit().number(), facts: Vec::new() }
    }

    pub(crate) fn fact(mut self, line: impl Into<String>) -> Self {
        self.facts.push(line.into());
        self
    }

    /// For what cannot happen unless we are wrong; the cause goes to the log, not to the caller.
    pub(crate) fn internal(what: &str, error: &(dyn std::error::Error + 'static)) -> Self {
        tracing::error!(what, error = mesh_runtime::chain(error), "internal error");
        Self::new(
            ErrorCode::Internal,
            format!("internal error: {what}"),
            "look at the daemon's log; this is a bug worth reporting",
        )
    }

    /// What a gRPC call came back with. Refusals keep their own detail; a transport failure is
    /// [`ErrorCode::ControllerUnreachable`].
    pub(crate) fn from_status(status: &Status) -> Self {
        if let Some(detail) = detail_of(status) {
            return Self::from_detail(detail);
        }
        let (code, next) = match status.code() {
            Code::PermissionDenied | Code::Unauthenticated => {
                (ErrorCode::Denied, "look at the controller's log for the reason")
            }
            Code::DeadlineExceeded => (ErrorCode::TimedOut, "try again; the controller may be overloaded"),
            Code::Unavailable | Code::Cancelled | Code::Unknown => {
                (ErrorCode::ControllerUnreachable, "check that the controller runs and its port is open")
            }
            _ => (ErrorCode::Internal, "look at the controller's log"),
        };
        Self::new(code, format!("the controller answered: {}", status.message()), next)
    }

    /// A refusal as the controller worded it.
    pub(crate) fn from_detail(detail: ErrorDetail) -> Self {
        Self {
            code: ErrorCode::try_from(detail.code).unwrap_or(ErrorCode::Unspecified),
            why: detail.why,
            next: detail.next,
            exit: detail.exit,
            facts: detail.facts,
        }
    }

    /// The code as people see it.
    pub fn number(&self) -> String {
        self.code.label()
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.why)
    }
}

impl std::error::Error for Failure {}

impl From<Failure> for ErrorDetail {
    fn from(failure: Failure) -> Self {
        Self {
            code: failure.code as i32,
            why: failure.why,
            next: failure.next,
            exit: failure.exit,
            facts: failure.facts,
        }
    }
}

impl From<Failure> for Status {
    fn from(failure: Failure) -> Self {
        let code = match Exit::failure(failure.exit) {
            Some(Exit::Usage) => Code::InvalidArgument,
            Some(Exit::Denied) => Code::PermissionDenied,
            Some(Exit::Unreachable) => Code::Unavailable,
            Some(Exit::NotFound) => Code::NotFound,
            Some(Exit::Conflict) => Code::FailedPrecondition,
            _ if failure.code == ErrorCode::Internal => Code::Internal,
            _ => Code::Aborted,
        };
        let message = failure.why.clone();
        Status::with_details(code, message, ErrorDetail::from(failure).encode_to_vec().into())
    }
}

/// The detail a refusal carries, if it carries one.
pub(crate) fn detail_of(status: &Status) -> Option<ErrorDetail> {
    let detail = ErrorDetail::decode(status.details()).ok()?;
    (detail.code != 0).then_some(detail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_survives_the_way_through_grpc() {
        let failure = Failure::new(ErrorCode::RootMismatch, "wrong root", "compare the fingerprints")
            .fact("token expects sha256:00")
            .fact("controller showed sha256:11");
        assert_eq!(failure.number(), "E0412");
        assert_eq!(failure.exit, 4);
        let status = Status::from(failure.clone());
        assert_eq!(status.code(), Code::PermissionDenied);
        assert_eq!(Failure::from_status(&status), failure);
    }

    #[test]
    fn a_status_without_detail_still_says_what_to_do() {
        let failure = Failure::from_status(&Status::unavailable("connection refused"));
        assert_eq!((failure.code, failure.exit), (ErrorCode::ControllerUnreachable, 5));
        assert!(!failure.next.is_empty());
    }
}
