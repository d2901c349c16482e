//! Places where a test may make the controller stop or misbehave on purpose.
//!
//! Only a build with the cargo feature `failpoints` looks at `MESH_FAILPOINT`; any other build
//! compiles every point to nothing.

/// A place in the code that `MESH_FAILPOINT` can name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Failpoint {
    /// The process dies after an identity was signed and before it is recorded.
    EnrollBeforeCommit,
    /// The process dies after an identity was recorded and before anything else happens.
    EnrollAfterCommit,
    /// The process dies with the answer ready to be sent.
    EnrollBeforeAnswer,
    /// New CRLs are made and recorded, but no stream hears of them.
    CrlPushDisabled,
    /// Revoked nodes are recorded, but no peer is told to drop them.
    PeerRemovalDisabled,
}

impl Failpoint {
    /// Ends the process as a crash would, when the environment names this point.
    pub(crate) fn crash(self) {
        if self.is_set() {
            std::process::abort();
        }
    }

    /// Whether the environment names this point.
    #[cfg(feature = "failpoints")]
    pub(crate) fn is_set(self) -> bool {
        let name = match self {
            Self::EnrollBeforeCommit => "enroll-before-commit",
            Self::EnrollAfterCommit => "enroll-after-commit",
            Self::EnrollBeforeAnswer => "enroll-before-answer",
            Self::CrlPushDisabled => "crl-push-disabled",
            Self::PeerRemovalDisabled => "peer-removal-disabled",
        };
        std::env::var("MESH_FAILPOINT").is_ok_and(|set| set.split(',').any(|point| point.trim() == name))
    }

    /// Never, in a build without failpoints.
    #[cfg(not(feature = "failpoints"))]
    pub(crate) fn is_set(self) -> bool {
        false
    }
}
