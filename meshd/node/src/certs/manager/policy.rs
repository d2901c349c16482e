//! What a changed policy means for the pairs that are here: asked at once, not when they are to be renewed.

use std::time::Duration;

use mesh_proto::v1 as pb;
use mesh_proto::v1::ErrorCode;
use tokio::time::Instant;

use super::{Done, ISSUES_AT_ONCE, Task, Terms};
use crate::certs::issue;
use crate::failure::Failure;

/// Shortest time between two questions about one pair that got no answer.
const JUDGE_INTERVAL: Duration = Duration::from_secs(60);

/// Whether a refusal is the policy's, so that the same question gets the same answer until the policy changes.
pub(super) fn says(code: ErrorCode) -> bool {
    use ErrorCode as C;
    matches!(
        code,
        C::NameNotGranted
            | C::ProfileUnknown
            | C::ProfileNotGiven
            | C::NameOutsideProfile
            | C::KeyOutsideProfile
            | C::LifetimeOutsideProfile
            | C::ServiceOutsideProfile
    )
}

impl Task {
    /// Notes a policy, tags or grants that have changed: every pair is judged anew.
    pub(super) fn take_terms(&mut self, own: &pb::Own) {
        let terms = Terms {
            policy_version: own.policy_version,
            tags: own.tags.clone(),
            granted: own.granted_names.clone(),
        };
        if self.terms == terms {
            return;
        }
        self.terms = terms;
        for live in self.live.values_mut() {
            live.judge = true;
            live.judge_after = None;
            // What was refused may be granted now.
            live.ask_after = None;
        }
    }

    /// Asks the controller about one pair, if that is due.
    pub(super) fn ask_judgement(&mut self, name: &str) {
        let Some(record) = self.records.get(name) else { return };
        let Some(live) = self.live.get_mut(name) else { return };
        let early = live.judge_after.is_some_and(|after| after > Instant::now());
        // Before the first certificate the answer to the question itself says it.
        if !live.judge || live.judging || early || record.stopped || record.newest().is_none() {
            return;
        }
        let Ok(channel) = self.parts.uplink.open_channel() else { return };
        if self.jobs.len() >= ISSUES_AT_ONCE {
            return;
        }
        (live.judge, live.judging) = (false, true);
        let (name, definition) = (name.to_owned(), record.definition.clone());
        self.jobs.spawn(async move {
            let result = issue::judge(channel, &definition).await;
            Done::Judged { name, result }
        });
    }

    pub(super) fn judged(&mut self, name: &str, result: Result<Option<Failure>, Failure>) {
        let Some(live) = self.live.get_mut(name) else { return };
        live.judging = false;
        match result {
            Ok(None) => self.allow(name),
            Ok(Some(refusal)) => self.refuse(name, &refusal),
            Err(failure) => {
                tracing::debug!(pair = name, %failure, "policy could not be asked about a pair");
                live.judge = true;
                live.judge_after = Some(Instant::now() + JUDGE_INTERVAL);
            }
        }
    }

    /// Policy lets the pair be renewed.
    pub(super) fn allow(&mut self, name: &str) {
        let Some(live) = self.live.get_mut(name) else { return };
        if live.refused.take().is_some() {
            live.ask_after = None;
        }
        self.parts.findings.clear(&format!("policy/{name}"));
    }

    /// What is there stays until it ends; nothing new is asked for until policy gives it again.
    pub(super) fn refuse(&mut self, name: &str, refusal: &Failure) {
        let Some(live) = self.live.get_mut(name) else { return };
        tracing::warn!(pair = name, code = refusal.number(), why = %refusal, "policy no longer allows a pair");
        live.refused = Some(format!("{}: {}; not renewed", refusal.number(), refusal.why));
        // The refusal may be older than the last change of the policy that we heard of.
        live.judge = true;
        live.judge_after = Some(Instant::now() + JUDGE_INTERVAL);
        let subject = format!("pair {name}, not renewed");
        self.parts.findings.raise_failure(format!("policy/{name}"), subject, refusal);
    }
}
