//! Places where a test may make the node stop or misbehave on purpose.
//!
//! Only a build with the cargo feature `failpoints` looks at `MESH_FAILPOINT`; any other build
//! compiles every point to nothing.

/// A place in the code that `MESH_FAILPOINT` can name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Failpoint {
    /// The process dies once its keys are on disk, before anything was sent.
    EnrollAfterKeys,
    /// The process dies once the controller has answered, before the answer was read.
    EnrollAfterSend,
    /// The process dies with the identity in memory, before it is on disk.
    EnrollBeforeSave,
    /// Peers that left the map stay in the tunnel.
    PeerRemovalDisabled,
    /// CRLs after the first are ignored.
    CrlApplyDisabled,
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
            Self::EnrollAfterKeys => "node-enroll-after-keys",
            Self::EnrollAfterSend => "node-enroll-after-send",
            Self::EnrollBeforeSave => "node-enroll-before-save",
            Self::PeerRemovalDisabled => "peer-removal-disabled",
            Self::CrlApplyDisabled => "crl-apply-disabled",
        };
        std::env::var("MESH_FAILPOINT").is_ok_and(|set| set.split(',').any(|point| point.trim() == name))
    }

    /// Never, in a build without failpoints.
    #[cfg(not(feature = "failpoints"))]
    pub(crate) fn is_set(self) -> bool {
        false
    }
}
