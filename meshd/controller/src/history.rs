//! The index of what the journal said of certificates, also of those that have ended. It may be lost at any time; then it
//! is made again from the journal.

mod inventory;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mesh_core::{Change, Record, Serial, UtcTime};
use mesh_proto::v1 as pb;
use mesh_runtime::ShutdownToken;
use mesh_store::{Index, IndexError, IndexOp, StoredRecord, Table};
use prost::Message as _;

use crate::archive::{Archive, issued};
use crate::codec::decode_record;
use crate::directory::{self, Directory};
use crate::limits::{FOLLOW_PAUSE, INDEX_PAUSE_MAX, INDEX_REST, INDEX_REST_BUSY, INDEX_TURN_RECORDS};
use crate::status::Problem;

pub(crate) use inventory::{CertificatePage, Query, Scope, State, find_live, is_cursor, state};

/// Frames whose changes go to the index in one batch.
const FRAMES_PER_BATCH: usize = 16;
/// Ends the key of a certificate's revocation, beside that of the certificate.
const REVOKED_SUFFIX: u8 = b'r';

/// The index, kept up to date behind the writer.
#[derive(Debug, Clone)]
pub(crate) struct History {
    index: Arc<Mutex<Option<Index>>>,
    archive: Archive,
    directory: Arc<Directory>,
    /// The trust domain, for names in stored messages.
    domain: String,
}

impl History {
    pub(crate) fn new(index: Index, archive: Archive, directory: Arc<Directory>, domain: String) -> Self {
        Self { index: Arc::new(Mutex::new(Some(index))), archive, directory, domain }
    }

    /// Applies new records until shutdown. A failing index costs history, never the controller: it takes a small part of
    /// the processor however many callers come, and falls behind instead. Whoever asks it something brings it up to date first.
    pub(crate) async fn run(&self, shutdown: ShutdownToken) {
        let (mut head, mut last, mut seen) = (self.directory.watch(), 0, self.directory.head().seq);
        loop {
            head.mark_unchanged();
            let (history, began) = (self.clone(), tokio::time::Instant::now());
            let turn = tokio::task::spawn_blocking(move || {
                history.follow_by(INDEX_TURN_RECORDS);
                history.applied()
            });
            let applied = turn.await.unwrap_or_else(|error| {
                tracing::error!(%error, "the index could not be brought up to date");
                last
            });
            let now = self.directory.head().seq;
            let came = now.saturating_sub(std::mem::replace(&mut seen, now));
            let advanced = applied.saturating_sub(std::mem::replace(&mut last, applied));
            // While more comes than a turn takes up, it would only fall behind at others' cost.
            let rest = if came > advanced { INDEX_REST_BUSY } else { INDEX_REST };
            let pause = (began.elapsed() * rest).clamp(FOLLOW_PAUSE, INDEX_PAUSE_MAX);
            if advanced > 0 && applied < now {
                tokio::select! {
                    () = shutdown.cancelled() => return,
                    () = tokio::time::sleep(pause) => {}
                }
                continue;
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                changed = directory::changed(&mut head, pause) => if changed.is_err() { return },
            }
        }
    }

    /// Brings the index up to the journal's head. Blocks.
    pub(crate) fn catch_up(&self) {
        self.follow_by(usize::MAX);
    }

    /// Brings the index nearer to the journal's head, by about so many records at most. Blocks.
    fn follow_by(&self, limit: usize) {
        let mut index = self.lock();
        let Some(index) = index.as_mut() else { return };
        if self.follow_recent(index, limit) {
            return;
        }
        let outcome =
            mesh_store::catch_up_by(index, self.archive.reader(), limit, |stored| self.ops_of(stored));
        if let Err(error) = outcome {
            tracing::error!(error = mesh_runtime::chain(&error), "the index is behind the journal");
        }
    }

    /// Applies what is still in memory, the usual case. `false` if that is not enough, or if the index fails: the
    /// journal says the rest.
    fn follow_recent(&self, index: &mut Index, limit: usize) -> bool {
        let head = self.directory.head();
        if index.applied() == head {
            return true;
        }
        let Some(frames) = self.directory.recent(index.applied().seq) else { return false };
        let mut done = 0;
        for batch in frames.chunks(FRAMES_PER_BATCH) {
            let mut ops = Vec::new();
            for (seq, record) in batch.iter().flat_map(|frame| &frame.records) {
                self.record_ops(*seq, record, &mut ops);
                done += 1;
            }
            let last = batch.last().map_or(head, |frame| frame.head);
            if index.apply(&last, &ops).is_err() {
                return false;
            }
            if done >= limit {
                break;
            }
        }
        true
    }

    /// The record that issued a certificate, also one that World has forgotten. Blocks.
    pub(crate) fn issued_seq(&self, serial: &Serial) -> Result<Option<u64>, Problem> {
        let value = self.get(Table::CertificateBySerial, &serial.0)?;
        Ok(value.and_then(|value| inventory::unstored(&value)).map(|(seq, _)| seq))
    }

    /// The last record that the index knows. Blocks.
    pub(crate) fn applied(&self) -> u64 {
        self.lock().as_ref().map_or(0, |index| index.applied().seq)
    }

    /// A page of certificates. Blocks.
    pub(crate) fn certificates(&self, query: &Query) -> Result<CertificatePage, Problem> {
        let index = self.lock();
        inventory::find(index.as_ref().ok_or_else(closed)?, query).map_err(failed)
    }

    /// Removes certificates that ended before `before`. Blocks.
    pub(crate) fn purge(&self, before: UtcTime) {
        let mut purged = 0;
        loop {
            let mut index = self.lock();
            let Some(index) = index.as_mut() else { return };
            match inventory::purge(index, before) {
                Ok(0) => break,
                Ok(count) => purged += count,
                Err(error) => {
                    return tracing::warn!(
                        error = mesh_runtime::chain(&error),
                        "ended certificates stay in the index"
                    );
                }
            }
        }
        if purged > 0 {
            tracing::info!(certificates = purged, "left the index: ended long ago");
        }
    }

    /// Gives back the room that removed entries still take. Blocks.
    pub(crate) fn compact(&self) {
        let mut index = self.lock();
        let Some(index) = index.as_mut() else { return };
        if let Err(error) = index.compact() {
            tracing::warn!(error = mesh_runtime::chain(&error), "the index keeps the room it takes");
        }
    }

    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, Problem> {
        self.lock().as_ref().ok_or_else(closed)?.get(table, key).map_err(failed)
    }

    /// What a stored record means for the index; depends on the record alone.
    fn ops_of(&self, stored: &StoredRecord) -> Vec<IndexOp> {
        let mut ops = Vec::new();
        match decode_record(&stored.bytes) {
            Ok(record) => self.record_ops(stored.seq, &record, &mut ops),
            Err(error) => {
                tracing::error!(
                    seq = stored.seq,
                    error = mesh_runtime::chain(&error),
                    "record is not indexed"
                );
            }
        }
        ops
    }

    fn record_ops(&self, seq: u64, record: &Record, ops: &mut Vec<IndexOp>) {
        for change in &record.changes {
            if let Change::CertificateRevoked { serial, reason } = change {
                let revocation = pb::Certificate {
                    revoked_at: record.at.unix(),
                    reason: reason.to_string(),
                    ..pb::Certificate::default()
                };
                let key = [serial.0.as_slice(), &[REVOKED_SUFFIX]].concat();
                ops.push(IndexOp::insert(Table::CertificateBySerial, key, revocation.encode_to_vec()));
            }
            if let Some(certificate) = issued(change) {
                ops.extend(inventory::issued_ops(&self.domain, seq, certificate));
            }
        }
    }

    /// Lets go of the index, and of the state directory's lock with it.
    pub(crate) fn close(&self) {
        *self.lock() = None;
    }

    fn lock(&self) -> MutexGuard<'_, Option<Index>> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Octets that sort as the number does, negative ones first.
fn sortable(seconds: i64) -> [u8; 8] {
    (seconds.cast_unsigned() ^ (1 << 63)).to_be_bytes()
}

/// The number that [`sortable`] made these octets of.
fn unsortable(octets: [u8; 8]) -> i64 {
    (u64::from_be_bytes(octets) ^ (1 << 63)).cast_signed()
}

fn closed() -> Problem {
    Problem::stopping()
}

fn failed(error: IndexError) -> Problem {
    Problem::internal_error("the index gave no answer", &error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_sort_as_octets() {
        let times = [i64::MIN, -1, 0, 1, 1_795_363_200, i64::MAX];
        assert!(times.map(sortable).is_sorted());
    }
}
