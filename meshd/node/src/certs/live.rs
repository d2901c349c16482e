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
    /// The policy has changed: would it still let this pair be issued?
    pub(super) judge: bool,
    pub(super) judging: bool,
    /// No question about the policy before this.
    pub(super) judge_after: Option<Instant>,
    /// Why policy does not let it be renewed; until the policy changes it is not tried.
    pub(super) refused: Option<String>,
    pub(super) stapling: bool,
    /// No question for an OCSP response before this.
    pub(super) staple_after: Option<Instant>,
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
            judge: true,
            judging: false,
            judge_after: None,
            refused: None,
            stapling: false,
            staple_after: None,
            last_hook: None,
            hook_due: None,
            ask_after: None,
            backoff: Backoff::new(RETRY_FIRST, RETRY_LONGEST),
            forced: false,
            problem: String::new(),
        }
    }
}

impl Live {
    /// What people are told: a failure first, then what policy says.
    pub(super) fn shown_problem(&self) -> &str {
        match self.problem.as_str() {
            "" => self.refused.as_deref().unwrap_or_default(),
            problem => problem,
        }
    }
}
