//! Places where a test may make the node stop or misbehave on purpose.

use mesh_runtime::Failpoint;

/// The process dies once its keys are on disk, before anything was sent.
pub(crate) const ENROLL_AFTER_KEYS: Failpoint = Failpoint::new("node-enroll-after-keys");
/// The process dies once the controller has answered, before the answer was read.
pub(crate) const ENROLL_AFTER_SEND: Failpoint = Failpoint::new("node-enroll-after-send");
/// The process dies with the identity in memory, before it is on disk.
pub(crate) const ENROLL_BEFORE_SAVE: Failpoint = Failpoint::new("node-enroll-before-save");
/// Peers that left the map stay in the tunnel.
pub(crate) const PEER_REMOVAL_DISABLED: Failpoint = Failpoint::new("peer-removal-disabled");
/// An engine that `auto` has chosen can do no more than the kernel's: it keeps its port to itself.
pub(crate) const ENGINE_BARE: Failpoint = Failpoint::new("node-engine-bare");
/// CRLs after the first are ignored.
pub(crate) const CRL_APPLY_DISABLED: Failpoint = Failpoint::new("crl-apply-disabled");
