//! What known callers were refused, counted per minute and kind, and written to the journal.
//! Strangers only reach the log: whoever can fill the journal with refusals can fill the disk.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use mesh_core::{Denial, UtcTime};

use crate::auth::{Caller, method_name};

/// Kinds of refusals kept between two records; more are only counted in the last one.
const KINDS_MAX: usize = 256;

/// Lines about strangers in the log between two records; the rest is one number.
const STRANGER_LINES_MAX: u64 = 50;

type Key = (String, String, String);

/// Refusals since the last record.
#[derive(Debug, Clone, Default)]
pub(crate) struct Denials {
    known: Arc<Mutex<BTreeMap<Key, Denial>>>,
    strangers: Arc<AtomicU64>,
}

impl Denials {
    /// Counts that `caller` was refused `path`.
    pub(crate) fn note(&self, caller: &Caller, path: &str, reason: &str, at: UtcTime) {
        if let Caller::Anonymous { address } = caller {
            let count = self.strangers.fetch_add(1, Ordering::Relaxed);
            if count < STRANGER_LINES_MAX {
                tracing::info!(?address, method = method_name(path), reason, "stranger refused");
            }
            return;
        }
        tracing::warn!(caller = caller.describe(), method = method_name(path), reason, "refused");
        let key = (caller.describe(), method_name(path).to_owned(), reason.to_owned());
        let mut denials = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if !denials.contains_key(&key) && denials.len() >= KINDS_MAX {
            return;
        }
        let denial = denials.entry(key.clone()).or_insert_with(|| Denial {
            caller: key.0,
            action: key.1,
            reason: key.2,
            count: 0,
            first: at,
            last: at,
        });
        denial.count += 1;
        denial.last = at;
    }

    /// Everything counted so far; counting starts over.
    pub(crate) fn take(&self) -> Vec<Denial> {
        let strangers = self.strangers.swap(0, Ordering::Relaxed);
        if strangers > STRANGER_LINES_MAX {
            tracing::info!(count = strangers, "strangers refused, most of them without a line here");
        }
        let mut denials = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *denials).into_values().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_core::{NodeId, Serial};

    #[test]
    fn refusals_of_one_kind_are_one_entry_and_strangers_leave_none() {
        let denials = Denials::default();
        let node = Caller::Node { id: NodeId(1), name: "web-1".into(), serial: Serial([0x40; 16]) };
        for second in 0..5 {
            denials.note(&node, "/mesh.v1.Nodes/Revoke", "no", UtcTime::from_unix(second));
        }
        denials.note(&Caller::Anonymous { address: None }, "/mesh.v1.Nodes/Revoke", "no", UtcTime::EPOCH);
        let taken = denials.take();
        assert_eq!(taken.len(), 1);
        assert_eq!((taken[0].count, taken[0].caller.as_str()), (5, "node web-1"));
        assert_eq!(taken[0].last, UtcTime::from_unix(4));
        assert!(denials.take().is_empty());
    }
}
