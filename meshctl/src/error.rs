//! What is printed when something fails: a stable code, facts, why, and what to do.

use std::{error::Error as StdError, fmt::Write as _, io, path::Path};

pub(crate) use mesh_proto::Exit;
use mesh_proto::v1::{ErrorCode, ErrorDetail};
use prost::Message as _;
use serde_json::json;

use crate::{
    output::{Output, Tone, paint},
    text::safe,
};

/// Shown at the end of every `--help`.
pub(crate) const EXIT_CODES: &str = "\
Exit codes:
  0  done, or nothing to do      4  denied or not enrolled
  1  failed                      5  unreachable, try again
  2  usage                       6  not found
  3  finished with findings      7  conflict";

/// A failure as people and scripts see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) code: ErrorCode,
    pub(crate) exit: Exit,
    pub(crate) title: String,
    pub(crate) facts: Vec<String>,
    pub(crate) why: String,
    pub(crate) next: String,
}

pub(crate) type Result<T, E = Failure> = std::result::Result<T, E>;

impl Failure {
    pub(crate) fn new(code: ErrorCode, title: impl Into<String>) -> Self {
        Self {
            code,
            exit: code.exit(),
            title: title.into(),
            facts: Vec::new(),
            why: String::new(),
            next: String::new(),
        }
    }

    pub(crate) fn why(mut self, why: impl Into<String>) -> Self {
        self.why = why.into();
        self
    }

    pub(crate) fn next(mut self, next: impl Into<String>) -> Self {
        self.next = next.into();
        self
    }

    pub(crate) fn fact(mut self, fact: impl Into<String>) -> Self {
        self.facts.push(fact.into());
        self
    }

    pub(crate) fn exit(mut self, exit: Exit) -> Self {
        self.exit = exit;
        self
    }

    pub(crate) fn usage(title: impl Into<String>, next: impl Into<String>) -> Self {
        Self::new(ErrorCode::Usage, title).next(next)
    }

    /// A file of ours that could not be read or written.
    pub(crate) fn file(attempt: &str, path: &Path, error: &io::Error) -> Self {
        let code = match error.kind() {
            io::ErrorKind::NotFound => ErrorCode::StateNotFound,
            io::ErrorKind::PermissionDenied => ErrorCode::StatePermissions,
            io::ErrorKind::ReadOnlyFilesystem => ErrorCode::StateReadOnly,
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorCode::DiskFull,
            _ => ErrorCode::Internal,
        };
        let next = match code {
            ErrorCode::StateNotFound => "check the path",
            ErrorCode::StatePermissions => "check who owns it, or run as that user",
            ErrorCode::StateReadOnly => "choose a place that can be written",
            ErrorCode::DiskFull => "make room and try again",
            _ => "see the system's log, then try again",
        };
        Self::new(code, format!("cannot {attempt} {}", path.display()))
            .why(error.to_string())
            .next(next)
            .exit(if error.kind() == io::ErrorKind::NotFound { Exit::NotFound } else { Exit::Failed })
    }

    /// What a daemon answered; `of` names it: "the controller", "the local node".
    pub(crate) fn from_status(status: &tonic::Status, of: &str) -> Self {
        if let Some(failure) = Self::from_details(status) {
            return failure;
        }
        if let Some(failure) = Self::from_chain(status, of) {
            return failure;
        }
        let message = if status.message().is_empty() { "it gave no reason" } else { status.message() };
        let (code, title, next) = match status.code() {
            tonic::Code::Unavailable => (
                unreachable_code(of),
                format!("{of} cannot be reached"),
                "check that it runs, then try again",
            ),
            tonic::Code::DeadlineExceeded | tonic::Code::Cancelled => (
                ErrorCode::TimedOut,
                format!("{of} did not answer in time"),
                "try again, or allow more with --timeout",
            ),
            tonic::Code::PermissionDenied => {
                (ErrorCode::Denied, format!("{of} refused"), "ask an admin for the right")
            }
            tonic::Code::Unauthenticated => (
                ErrorCode::NotEnrolled,
                format!("{of} does not know you"),
                "run `meshctl login` with a new operator token",
            ),
            tonic::Code::ResourceExhausted => {
                (ErrorCode::Overloaded, format!("{of} is busy"), "try again in a moment")
            }
            tonic::Code::InvalidArgument => {
                (ErrorCode::Usage, format!("{of} refused the request"), "correct it and try again")
            }
            tonic::Code::Unimplemented => (
                ErrorCode::Internal,
                format!("{of} does not know this command"),
                "bring meshd and meshctl to the same version",
            ),
            _ => (ErrorCode::Internal, format!("{of} failed"), "see its log; the error is its own"),
        };
        let mut failure = Self::new(code, title).why(message).next(next);
        failure.exit = match status.code() {
            tonic::Code::NotFound => Exit::NotFound,
            tonic::Code::AlreadyExists | tonic::Code::FailedPrecondition | tonic::Code::Aborted => {
                Exit::Conflict
            }
            tonic::Code::Cancelled => Exit::Unreachable,
            _ => failure.exit,
        };
        failure
    }

    fn from_details(status: &tonic::Status) -> Option<Self> {
        if status.details().is_empty() {
            return None;
        }
        let detail = ErrorDetail::decode(status.details()).ok()?;
        Some(Self::from_detail(&detail, status.message()))
    }

    pub(crate) fn from_detail(detail: &ErrorDetail, title: &str) -> Self {
        // A daemon that says the same twice has put "what: why" into one sentence.
        let (title, why) = match title.split_once(": ") {
            _ if title != detail.why => (title, detail.why.as_str()),
            Some((what, why)) => (what, why),
            None => (title, ""),
        };
        let mut failure = Self::new(detail.code(), title).why(why).next(&detail.next);
        failure.facts.clone_from(&detail.facts);
        if let Some(exit) = Exit::failure(detail.exit) {
            failure.exit = exit;
        }
        failure
    }

    /// Looks through an error and its sources for what TLS or the system said.
    pub(crate) fn from_chain(error: &(dyn StdError + 'static), of: &str) -> Option<Self> {
        let mut next = Some(error);
        while let Some(error) = next {
            if let Some(tls) = error.downcast_ref::<rustls::Error>() {
                return Some(Self::from_tls(tls, of));
            }
            if let Some(io) = error.downcast_ref::<io::Error>() {
                // An I/O error wraps what TLS said without naming it as its source.
                if let Some(tls) = io.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
                    return Some(Self::from_tls(tls, of));
                }
                if io.get_ref().is_none_or(|inner| inner.source().is_none()) {
                    return Some(Self::from_io(io, of));
                }
            }
            next = error.source();
        }
        None
    }

    fn from_io(error: &io::Error, of: &str) -> Self {
        let (title, next) = match error.kind() {
            io::ErrorKind::PermissionDenied => {
                let title = format!("{of} may not be asked by this user");
                return Self::new(ErrorCode::Denied, title)
                    .why("its socket serves root and the user it runs as")
                    .next("try again with sudo");
            }
            io::ErrorKind::TimedOut => {
                (format!("{of} did not answer in time"), "check the address and the firewall, then try again")
            }
            _ => (
                format!("{of} cannot be reached"),
                "check that meshd runs there and the address is right, then try again",
            ),
        };
        Self::new(unreachable_code(of), title).why(error.to_string()).next(next)
    }

    fn from_tls(error: &rustls::Error, of: &str) -> Self {
        use rustls::AlertDescription as Alert;
        match error {
            rustls::Error::InvalidCertificate(reason) => {
                Self::new(ErrorCode::ControllerNotTrusted, format!("{of} is not the one we trust"))
                    .why(format!("its certificate does not verify against our root: {reason}"))
                    .next("check the address; on the controller compare `meshctl ca fingerprint`")
            }
            rustls::Error::AlertReceived(alert) => {
                let (code, why) = match alert {
                    Alert::CertificateExpired => (ErrorCode::IdentityExpired, "our certificate has expired"),
                    Alert::CertificateRevoked => (ErrorCode::IdentityRevoked, "our certificate is revoked"),
                    Alert::CertificateRequired => (ErrorCode::NotEnrolled, "it asks for a certificate"),
                    _ => (ErrorCode::Denied, "it does not accept our certificate"),
                };
                Self::new(code, format!("{of} refused the connection"))
                    .why(why)
                    .next("run `meshctl login` with a new operator token")
            }
            other => Self::new(unreachable_code(of), format!("{of} speaks no TLS that we understand"))
                .why(other.to_string())
                .next("check that the address is that of a meshd controller"),
        }
    }

    /// The text, with colours.
    pub(crate) fn render(&self) -> String {
        let mut out = String::new();
        let head = paint(Tone::Bad, &format!("error[{}]:", self.code.label()));
        let _ = writeln!(out, "{head} {}", safe(&self.title));
        for fact in &self.facts {
            let _ = writeln!(out, "  {}", safe(fact));
        }
        // Many refusals are one sentence, which is the title then.
        if !self.why.is_empty() && self.why != self.title {
            let _ = writeln!(out, "  why: {}", safe(&self.why));
        }
        if !self.next.is_empty() {
            let _ = writeln!(out, "  do:  {}", safe(&self.next));
        }
        out
    }

    /// Prints the text on stderr and, where JSON was asked for, a document on stdout.
    pub(crate) fn print(&self, output: Option<&Output>) {
        let _ = io::Write::write_all(&mut anstream::stderr(), self.render().as_bytes());
        if let Some(output) = output.filter(|output| output.is_json()) {
            output.document(
                "Error",
                &json!({
                    "code": self.code.label(), "error": self.title, "facts": self.facts,
                    "why": self.why, "do": self.next, "exit": self.exit as u8,
                }),
            );
        }
    }
}

fn unreachable_code(of: &str) -> ErrorCode {
    if of.contains("node") { ErrorCode::DaemonUnreachable } else { ErrorCode::ControllerUnreachable }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(failure: &Failure) -> String {
        anstream::adapter::strip_str(&failure.render()).to_string()
    }

    #[test]
    fn an_error_says_what_why_and_what_to_do() {
        let detail = ErrorDetail {
            code: ErrorCode::RootMismatch.into(),
            why: "wrong controller, a stale token, or someone in the middle. Nothing was sent.".into(),
            next: "on the controller run `meshctl ca fingerprint`, compare, then create a new token".into(),
            exit: 4,
            facts: vec!["token expects sha256:9f2c…  controller showed sha256:1b77…".into()],
        };
        let status = tonic::Status::with_details(
            tonic::Code::PermissionDenied,
            "controller's root key does not match the token",
            detail.encode_to_vec().into(),
        );
        let failure = Failure::from_status(&status, "the local node");
        assert_eq!(failure.exit, Exit::Denied);
        assert_eq!(
            plain(&failure),
            "error[E0412]: controller's root key does not match the token\n  \
             token expects sha256:9f2c…  controller showed sha256:1b77…\n  \
             why: wrong controller, a stale token, or someone in the middle. Nothing was sent.\n  \
             do:  on the controller run `meshctl ca fingerprint`, compare, then create a new token\n"
        );
    }

    #[test]
    fn a_status_without_details_still_has_a_code_and_an_exit() {
        let table = [
            (tonic::Code::Unavailable, ErrorCode::ControllerUnreachable, Exit::Unreachable),
            (tonic::Code::DeadlineExceeded, ErrorCode::TimedOut, Exit::Unreachable),
            (tonic::Code::PermissionDenied, ErrorCode::Denied, Exit::Denied),
            (tonic::Code::Unauthenticated, ErrorCode::NotEnrolled, Exit::Denied),
            (tonic::Code::NotFound, ErrorCode::Internal, Exit::NotFound),
            (tonic::Code::AlreadyExists, ErrorCode::Internal, Exit::Conflict),
            (tonic::Code::InvalidArgument, ErrorCode::Usage, Exit::Usage),
            (tonic::Code::Internal, ErrorCode::Internal, Exit::Failed),
            (tonic::Code::ResourceExhausted, ErrorCode::Overloaded, Exit::Unreachable),
        ];
        for (code, error, exit) in table {
            let failure = Failure::from_status(&tonic::Status::new(code, "x"), "the controller");
            assert_eq!((failure.code, failure.exit), (error, exit), "{code:?}");
            assert!(!failure.next.is_empty(), "{code:?}");
        }
    }

    #[test]
    fn a_controller_cannot_paint_our_terminal() {
        let detail = ErrorDetail { why: "\x1b]0;owned\x07".into(), ..ErrorDetail::default() };
        let failure = Failure::from_detail(&detail, "a\nb\x1b[2J");
        assert!(!plain(&failure).contains(['\x1b', '\x07']));
        assert_eq!(plain(&failure).lines().count(), 2);
    }

    #[test]
    fn a_tls_error_inside_an_io_error_is_found() {
        let tls = rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer);
        let error = io::Error::new(io::ErrorKind::InvalidData, tls);
        let failure = Failure::from_chain(&error, "the controller").unwrap();
        assert_eq!((failure.code, failure.exit), (ErrorCode::ControllerNotTrusted, Exit::Denied));
        let refused = io::Error::from(io::ErrorKind::ConnectionRefused);
        let failure = Failure::from_chain(&refused, "the controller").unwrap();
        assert_eq!((failure.code, failure.exit), (ErrorCode::ControllerUnreachable, Exit::Unreachable));
    }

    #[test]
    fn unknown_exit_numbers_from_the_wire_fall_back_to_the_codes_own() {
        for exit in [0, -1, 8, i32::MAX] {
            let detail = ErrorDetail { code: ErrorCode::NodeNotFound.into(), exit, ..ErrorDetail::default() };
            assert_eq!(Failure::from_detail(&detail, "x").exit, Exit::NotFound);
        }
    }
}
