//! The index of what the journal said: certificates that have ended, and where in the audit log a
//! time lies. It may be lost at any time; then it is made again from the journal.

mod inventory;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mesh_core::{Change, Record, Serial, UtcTime};
use mesh_proto::v1 as pb;
use mesh_runtime::ShutdownToken;
use mesh_store::{Index, IndexError, IndexOp, Page, StoredRecord, Table};
use prost::Message as _;

use crate::archive::{Archive, issued};
use crate::codec::decode_record;
use crate::directory::Directory;
use crate::limits::{PURGE_PERIOD, RETENTION};
use crate::status::Problem;

pub(crate) use inventory::{CertificatePage, Query, Scope, State, is_cursor, state};

/// Ends the key of a certificate's revocation, beside that of the certificate.
const REVOKED_SUFFIX: u8 = b'r';

/// The index, kept up to date behind the writer.
#[derive(Debug, Clone)]
pub(crate) struct History {
    index: Arc<Mutex<Option<Index>>>,
    archive: Archive,
    /// The trust domain, for names in stored messages.
    domain: String,
}

impl History {
    pub(crate) fn new(index: Index, archive: Archive, domain: String) -> Self {
        Self { index: Arc::new(Mutex::new(Some(index))), archive, domain }
    }

    /// Applies new records until shutdown. A failing index costs history, never the controller.
    pub(crate) async fn run(&self, directory: Arc<Directory>, shutdown: ShutdownToken) {
        let mut head = directory.watch();
        let mut purging = tokio::time::interval(PURGE_PERIOD);
        purging.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            head.mark_unchanged();
            self.on_thread(Self::catch_up).await;
            tokio::select! {
                () = shutdown.cancelled() => return,
                changed = head.changed() => if changed.is_err() { return },
                // By the journal's time: a clock that runs ahead must not empty the index.
                _ = purging.tick() => {
                    let before = directory.read(|world| world.last_time());
                    let before = UtcTime(before.unix() - RETENTION.as_secs() as i64);
                    self.on_thread(move |history| history.purge(before)).await;
                }
            }
        }
    }

    async fn on_thread(&self, work: impl FnOnce(&Self) + Send + 'static) {
        let history = self.clone();
        if let Err(error) = tokio::task::spawn_blocking(move || work(&history)).await {
            tracing::error!(%error, "the index could not be brought up to date");
        }
    }

    /// Brings the index up to the journal's head. Blocks.
    pub(crate) fn catch_up(&self) {
        let mut index = self.lock();
        let Some(index) = index.as_mut() else { return };
        let outcome = mesh_store::catch_up(index, self.archive.reader(), |stored| self.ops_of(stored));
        if let Err(error) = outcome {
            tracing::error!(error = mesh_runtime::chain(&error), "the index is behind the journal");
        }
    }

    /// The record that issued a certificate, also one that World has forgotten. Blocks.
    pub(crate) fn issued_seq(&self, serial: &Serial) -> Result<Option<u64>, Problem> {
        let value = self.get(Table::CertificateByIdentity, &serial.0)?;
        Ok(value.and_then(|value| value.try_into().ok()).map(u64::from_be_bytes))
    }

    /// A page of certificates. Blocks.
    pub(crate) fn certificates(&self, query: &Query) -> Result<CertificatePage, Problem> {
        let index = self.lock();
        inventory::find(index.as_ref().ok_or_else(closed)?, query).map_err(failed)
    }

    /// Removes certificates that ended before `before`; the journal and the audit log keep them. Blocks.
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

    /// The first record made at or after `since`; past the head if there is none. Blocks.
    pub(crate) fn first_since(&self, since: UtcTime, head: u64) -> Result<u64, Problem> {
        let before = [sortable(since.unix().saturating_sub(1)), [0xff; 8]].concat();
        let page = Page { after: Some(before), limit: 1, ..Page::default() };
        let index = self.lock();
        let index = index.as_ref().ok_or_else(closed)?;
        let entries = index.page(Table::AuditByTime, &page).map_err(failed)?;
        let seq = entries.first().and_then(|(key, _)| key.last_chunk::<8>().copied());
        Ok(seq.map_or(head + 1, u64::from_be_bytes))
    }

    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, Problem> {
        self.lock().as_ref().ok_or_else(closed)?.get(table, key).map_err(failed)
    }

    /// What a record means for the index; depends on the record alone.
    fn ops_of(&self, stored: &StoredRecord) -> Vec<IndexOp> {
        let mut ops = vec![IndexOp::insert(
            Table::AuditByTime,
            [sortable(stored.time_secs), stored.seq.to_be_bytes()].concat(),
            [],
        )];
        match decode_record(&stored.bytes) {
            Ok(record) => self.certificate_ops(stored.seq, record, &mut ops),
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

    fn certificate_ops(&self, seq: u64, record: Record, ops: &mut Vec<IndexOp>) {
        let at = record.at;
        for change in record.changes {
            if let Change::CertificateRevoked { serial, reason } = &change {
                let revocation = pb::Certificate {
                    revoked_at: at.unix(),
                    reason: reason.to_string(),
                    ..pb::Certificate::default()
                };
                let key = [serial.0.as_slice(), &[REVOKED_SUFFIX]].concat();
                ops.push(IndexOp::insert(Table::CertificateBySerial, key, revocation.encode_to_vec()));
            }
            if let Some(certificate) = issued(change) {
                ops.extend(inventory::issued_ops(&self.domain, seq, &certificate));
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
