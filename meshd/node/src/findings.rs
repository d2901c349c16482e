//! What is wrong right now, for `status`, `doctor` and the controller. A finding stands until it is cleared.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mesh_proto::v1 as pb;

use crate::failure::Failure;
use crate::limits::FINDINGS_MAX;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Severity {
    Warn,
    Bad,
}

/// The list that all parts of the node write to.
#[derive(Debug, Clone, Default)]
pub(crate) struct Findings(Arc<Mutex<BTreeMap<String, pb::Finding>>>);

impl Findings {
    /// Raises or replaces the finding called `key`.
    pub(crate) fn raise(
        &self,
        key: impl Into<String>,
        severity: Severity,
        subject: impl Into<String>,
        what: impl Into<String>,
        next: impl Into<String>,
    ) {
        let (key, what) = (key.into(), what.into());
        let severity = match severity {
            Severity::Warn => "warn",
            Severity::Bad => "bad",
        };
        let finding = pb::Finding {
            subject: subject.into(),
            what: what.clone(),
            next: next.into(),
            severity: severity.into(),
        };
        let mut findings = self.lock();
        if findings.len() >= FINDINGS_MAX && !findings.contains_key(&key) {
            return;
        }
        let before = findings.insert(key.clone(), finding.clone());
        if before.as_ref() != Some(&finding) {
            tracing::warn!(finding = key, severity, what, "finding raised");
        }
    }

    /// As [`raise`](Self::raise), from a failure.
    pub(crate) fn raise_failure(
        &self,
        key: impl Into<String>,
        subject: impl Into<String>,
        failure: &Failure,
    ) {
        let what = format!("{}: {}", failure.number(), failure.why);
        self.raise(key, Severity::Bad, subject, what, failure.next.clone());
    }

    pub(crate) fn clear(&self, key: &str) {
        if self.lock().remove(key).is_some() {
            tracing::info!(finding = key, "finding cleared");
        }
    }

    /// Clears all findings whose key begins with `prefix` and is not in `keep`.
    pub(crate) fn clear_others(&self, prefix: &str, keep: &[String]) {
        let gone: Vec<String> = self
            .lock()
            .keys()
            .filter(|key| key.starts_with(prefix) && !keep.contains(key))
            .cloned()
            .collect();
        gone.iter().for_each(|key| self.clear(key));
    }

    /// Whether the finding called `key` stands.
    pub(crate) fn stands(&self, key: &str) -> bool {
        self.lock().contains_key(key)
    }

    pub(crate) fn list(&self) -> Vec<pb::Finding> {
        self.lock().values().cloned().collect()
    }

    /// One line each, for the controller.
    pub(crate) fn lines(&self) -> Vec<String> {
        self.lock().values().map(|finding| format!("{}: {}", finding.subject, finding.what)).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, pb::Finding>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_stand_until_cleared_and_are_bounded() {
        let findings = Findings::default();
        for n in 0..FINDINGS_MAX + 10 {
            findings.raise(format!("peer/{n:04}"), Severity::Warn, "peer", "gone", "look");
        }
        assert_eq!(findings.list().len(), FINDINGS_MAX);
        findings.clear_others("peer/", &["peer/0003".to_owned()]);
        assert_eq!(findings.lines(), ["peer: gone"]);
        findings.clear("peer/0003");
        assert!(findings.list().is_empty());
    }
}
