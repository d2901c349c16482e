//! What ended long ago leaves: certificates leave the index, and the journal loses its oldest segments, so that the store
//! of a fleet that renews every day stays as large as the days it remembers.
//!
//! Times are the journal's: a clock that runs ahead must not throw history away. Records that made a certificate which
//! has not ended long ago, or that World still holds, are kept when their segment goes, with what revoked it.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use mesh_core::{Change, Serial, UtcTime};
use mesh_runtime::ShutdownToken;
use mesh_store::{Snapshots, StoredRecord};

use crate::archive::{Archive, issued};
use crate::codec::decode_record;
use crate::directory::Directory;
use crate::history::History;
use crate::limits::{LISTING_RETENTION, PURGE_PERIOD, SEGMENT_SPAN_MIN, SEGMENTS_PER_RETENTION};
use crate::snapshots;

/// Looks now and then for what may go.
#[derive(Debug, Clone)]
pub(crate) struct Keeper {
    pub(crate) directory: Arc<Directory>,
    pub(crate) history: History,
    pub(crate) archive: Archive,
    pub(crate) snapshots: Snapshots,
    /// How long after its end a certificate is remembered; `None` keeps the journal for ever.
    pub(crate) retention: Option<Duration>,
}

/// How much time the records of one segment may span, so that a part of the retention goes at a time.
pub(crate) fn segment_span(retention: Duration) -> Duration {
    (retention / SEGMENTS_PER_RETENTION).max(SEGMENT_SPAN_MIN)
}

impl Keeper {
    /// Sweeps once in a while until shutdown.
    pub(crate) async fn run(self, shutdown: ShutdownToken) {
        let mut due = tokio::time::interval(PURGE_PERIOD);
        due.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                _ = due.tick() => {}
            }
            let keeper = self.clone();
            if let Err(error) = tokio::task::spawn_blocking(move || keeper.sweep()).await {
                tracing::error!(%error, "history was not swept");
            }
        }
    }

    /// Lets go of what may go. Whatever fails is tried again by the next sweep. Blocks.
    pub(crate) fn sweep(&self) {
        let now = self.directory.read(|world| world.last_time());
        let retention = self.retention.unwrap_or(LISTING_RETENTION);
        let before = UtcTime(now.unix().saturating_sub_unsigned(retention.as_secs()));
        self.history.purge(before);
        self.history.compact();
        if self.retention.is_some()
            && let Err(error) = self.cut(before)
        {
            tracing::warn!(error, "the journal keeps its oldest records");
        }
    }

    /// Removes the segments whose records were all made before `before`.
    fn cut(&self, before: UtcTime) -> Result<(), String> {
        let reader = self.archive.reader();
        let base = reader.base();
        let Some(through) = self.last_before(before)?.filter(|through| *through > base.seq) else {
            return Ok(());
        };
        // A start needs a snapshot instead of what goes, and one to fall back to.
        let taken = self.snapshots.seqs().map_err(|error| mesh_runtime::chain(&error))?;
        let [.., fallback, _] = taken[..] else {
            snapshots::take(&self.directory, &self.snapshots)?;
            return Ok(());
        };
        if fallback < through {
            snapshots::take(&self.directory, &self.snapshots)?;
            return Ok(());
        }
        // The index is not made again from records that are gone.
        self.history.catch_up();
        if self.history.applied() < through {
            return Err("the index is behind".into());
        }
        let mut wanted = Wanted { before, directory: &self.directory, serials: HashSet::new() };
        let cut = reader.cut(through, &mut |stored| wanted.keeps(stored));
        let cut = cut.map_err(|error| mesh_runtime::chain(&error))?;
        tracing::info!(through = cut.seq, kept = wanted.serials.len(), "the journal lost its oldest records");
        Ok(())
    }

    /// The last record before the newest segment whose predecessors are all older than `before`.
    fn last_before(&self, before: UtcTime) -> Result<Option<u64>, String> {
        let reader = self.archive.reader();
        let mut last = None;
        for first in reader.parts().into_iter().skip(1) {
            let stored = reader.record(first).map_err(|error| mesh_runtime::chain(&error))?;
            match stored {
                // Times never fall, so all before this one are as old.
                Some(stored) if stored.time_secs < before.unix() => last = Some(first - 1),
                _ => break,
            }
        }
        Ok(last)
    }
}

/// Says which records are kept.
struct Wanted<'a> {
    before: UtcTime,
    directory: &'a Directory,
    serials: HashSet<Serial>,
}

impl Wanted<'_> {
    /// Records are shown in their order, so a certificate comes before what revoked it.
    fn keeps(&mut self, stored: &StoredRecord) -> bool {
        // What cannot be read is not ours to throw away.
        let Ok(record) = decode_record(&stored.bytes) else { return true };
        let mut keeps = false;
        for change in &record.changes {
            if let Some(certificate) = issued(change)
                && (certificate.not_after >= self.before
                    || self.directory.read(|world| world.certificate(&certificate.serial).is_some()))
            {
                self.serials.insert(certificate.serial);
                keeps = true;
            }
            if let Change::CertificateRevoked { serial, .. } = change {
                keeps |= self.serials.contains(serial);
            }
        }
        keeps
    }
}

#[cfg(test)]
mod tests;
