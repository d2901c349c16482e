//! How a command ends: one table for the daemons, which send it, and for `meshctl`, which ends with it.

use crate::v1::ErrorCode;

/// How a command ends. The numbers are part of the contract with scripts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done, or nothing to do.
    Done = 0,
    Failed = 1,
    Usage = 2,
    /// Finished with findings.
    Findings = 3,
    /// Denied, or not enrolled.
    Denied = 4,
    /// Unreachable: try again.
    Unreachable = 5,
    NotFound = 6,
    Conflict = 7,
}

impl Exit {
    /// As [`ErrorDetail`](crate::v1::ErrorDetail) carries it.
    pub const fn number(self) -> i32 {
        self as i32
    }

    /// The failure that a number from the wire names; `None` for 0 and for numbers of a newer program.
    pub fn failure(number: i32) -> Option<Self> {
        use Exit::{Conflict, Denied, Failed, Findings, NotFound, Unreachable, Usage};
        [Failed, Usage, Findings, Denied, Unreachable, NotFound, Conflict]
            .into_iter()
            .find(|exit| exit.number() == number)
    }
}

impl From<Exit> for std::process::ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

impl ErrorCode {
    /// `E0412`, as people see it.
    pub fn label(self) -> String {
        format!("E{:04}", self as i32)
    }

    /// How a command ends that fails with this error, unless who fails says another. A match without a
    /// default, so that a new code without an exit does not compile.
    pub const fn exit(self) -> Exit {
        use ErrorCode as C;
        match self {
            C::Unspecified
            | C::StatePermissions
            | C::StateReadOnly
            | C::StateNewerVersion
            | C::StateCorrupt
            | C::TunMissing
            | C::TunDenied
            | C::DiskFull
            | C::ClockOff
            | C::InterfaceBusy
            | C::FirewallUnavailable
            | C::NamespacesDenied
            | C::KernelBackendMissing
            | C::ApprovalPending
            | C::HookFailed
            | C::Pkcs12Refused
            | C::ImportRefused
            | C::ImportName
            | C::TokenUnavailable
            | C::SealedKeyCost
            | C::BackupRefused
            | C::CertificateInvalid
            | C::AddressesExhausted
            | C::Internal
            | C::ClockJump => Exit::Failed,
            C::ConfigInvalid
            | C::PassphraseMissing
            | C::ImportPassphrase
            | C::PinMissing
            | C::NameInvalid
            | C::NameWildcard
            | C::CsrInvalid
            | C::CsrSignature
            | C::KeyWeak
            | C::CsrForeignName
            | C::CsrNotALeaf
            | C::TooLarge
            | C::TagInvalid
            | C::PolicyInvalid
            | C::Usage => Exit::Usage,
            C::NotAllReached | C::RotationWaits => Exit::Findings,
            C::PassphraseWrong
            | C::PinWrong
            | C::CaKeyMismatch
            | C::ControllerNotTrusted
            | C::Denied
            | C::IdentityExpired
            | C::IdentityRevoked
            | C::IdentityUnknown
            | C::NotEnrolled
            | C::TokenInvalid
            | C::TokenExpired
            | C::TokenUsed
            | C::TokenRevoked
            | C::TokenNameMismatch
            | C::EnrollmentRefused
            | C::RootMismatch
            | C::ResumeWindowPassed
            | C::NameReserved
            | C::NameOutsideDomain
            | C::NameNotGranted
            | C::KeyRevoked
            | C::ProfileNotGiven
            | C::NameOutsideProfile
            | C::KeyOutsideProfile
            | C::LifetimeOutsideProfile
            | C::ServiceOutsideProfile
            | C::NodeRevoked => Exit::Denied,
            C::ControllerUnreachable
            | C::DaemonUnreachable
            | C::TimedOut
            | C::PeerUnreachable
            | C::ProfileChanged
            | C::Overloaded => Exit::Unreachable,
            C::StateNotFound
            | C::TokenNotFound
            | C::ProfileUnknown
            | C::CertificateNotFound
            | C::NodeNotFound
            | C::OperatorNotFound => Exit::NotFound,
            C::StateInUse
            | C::StateExists
            | C::PortInUse
            | C::AlreadyEnrolled
            | C::NameTaken
            | C::KeyInUse
            | C::NodeIdentity
            | C::DirectoryNotOurs
            | C::NameStopped
            | C::TokenAnswerGone
            | C::NodePending
            | C::OperatorExists
            | C::LastAdmin
            | C::RotationRunning
            | C::RotationNone
            | C::RotationRefused
            | C::RootSealed
            | C::CeremonyMismatch => Exit::Conflict,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_error_ends_a_command_with_a_failure_that_reads_back() {
        let codes: Vec<_> = (0..10_000).filter_map(|number| ErrorCode::try_from(number).ok()).collect();
        assert!(codes.len() > 60, "only {} codes found", codes.len());
        for code in codes {
            assert_ne!(code.exit(), Exit::Done, "{code:?}");
            assert_eq!(Exit::failure(code.exit().number()), Some(code.exit()), "{code:?}");
        }
        for number in [0, -1, 8, i32::MAX] {
            assert_eq!(Exit::failure(number), None, "{number}");
        }
        assert_eq!(ErrorCode::NameInvalid.label(), "E0501");
    }
}
