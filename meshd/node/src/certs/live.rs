//! What is remembered of a pair only while the process lives.

use mesh_runtime::Backoff;
use tokio::time::Instant;

use super::Answer;
use crate::limits::{RETRY_FIRST, RETRY_LONGEST};

/// What is true of a pair only while the process lives.
pub(super) struct Live {
    pub(super) waiters: Vec<Answer>,
    pub(super) issuing: bool,
    pub(super) hook_running: bool,
    pub(super) last_hook: Option<Instant>,
    /// The hook is to run, not before this.
    pub(super) hook_due: Option<Instant>,
    /// No question to the controller before this.
    pub(super) ask_after: Option<Instant>,
    pub(super) backoff: Backoff,
    /// An operator asked for a new certificate now.
    pub(super) forced: bool,
    pub(super) problem: String,
}

impl Default for Live {
    fn default() -> Self {
        Self {
            waiters: Vec::new(),
            issuing: false,
            hook_running: false,
            last_hook: None,
            hook_due: None,
            ask_after: None,
            backoff: Backoff::new(RETRY_FIRST, RETRY_LONGEST),
            forced: false,
            problem: String::new(),
        }
    }
}
