//! Places where a test may make the controller stop or misbehave on purpose.

use mesh_runtime::Failpoint;

/// The process dies after an identity was signed and before it is recorded.
pub(crate) const ENROLL_BEFORE_COMMIT: Failpoint = Failpoint::new("enroll-before-commit");
/// The process dies after an identity was recorded and before anything else happens.
pub(crate) const ENROLL_AFTER_COMMIT: Failpoint = Failpoint::new("enroll-after-commit");
/// The process dies with the answer ready to be sent.
pub(crate) const ENROLL_BEFORE_ANSWER: Failpoint = Failpoint::new("enroll-before-answer");
/// New CRLs are made and recorded, but no stream hears of them.
pub(crate) const CRL_PUSH_DISABLED: Failpoint = Failpoint::new("crl-push-disabled");
/// Revoked nodes are recorded, but no peer is told to drop them.
pub(crate) const PEER_REMOVAL_DISABLED: Failpoint = Failpoint::new("peer-removal-disabled");
/// Whoever leaves the mesh waits two seconds for the answer.
pub(crate) const LEAVE_ANSWER_SLOW: Failpoint = Failpoint::new("leave-answer-slow");
