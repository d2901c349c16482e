//! The append-only, hash-chained log.
//!
//! A record is opaque bytes with the id of the operation that made it and the time it was made. Its
//! hash covers the hash before it, so that one hash, a [`Head`], stands for all of the past.

mod file;
mod memory;
mod record;

pub(crate) use file::segment::number as file_number;
pub use file::{Damage, Evidence, FileJournal, FileOptions, JournalError, SEGMENT_BYTES, Witness};
pub use memory::{Fault, Faults, MemoryJournal};
pub use record::{EncodedRecord, Head, StoredRecord, chain_hash};

use std::{io, path::PathBuf, sync::RwLockReadGuard};

/// Largest bytes of one record.
pub const RECORD_BYTES_MAX: usize = 1024 * 1024;
/// Most records of one append.
pub const RECORDS_PER_FRAME_MAX: usize = 4096;
/// Largest sum of the records of one append, as stored.
pub const FRAME_BODY_BYTES_MAX: usize = 8 * 1024 * 1024;

/// An append-only log with one writer.
pub trait Journal: Send {
    /// The end of what is durable.
    fn head(&self) -> Head;

    /// Adds `records` after `expected`: all of them or none.
    ///
    /// # Errors
    /// In every case nothing was appended, now or later, and the journal may be used on unless it says
    /// [`AppendError::Broken`]. What may or may not have been appended is no error but
    /// [`Append::Unknown`].
    fn append(&mut self, expected: &Head, records: &[EncodedRecord]) -> Result<Append, AppendError>;

    /// A handle for reading, for any thread, also while records are appended.
    fn reader(&self) -> Box<dyn JournalReader>;

    /// The records from `from_seq` (the first is 1) to the head as it is now.
    fn read(&self, from_seq: u64) -> Records {
        self.reader().read(from_seq)
    }
}

/// Reads a journal that another thread may be writing.
pub trait JournalReader: Send + Sync {
    /// The end of what is durable.
    fn head(&self) -> Head;

    /// The records from `from_seq` (the first is 1) to the head as it is now; those after
    /// [`base`](Self::base), if older ones were asked for. Every record's hash is checked against its
    /// predecessor; the first error ends the iteration.
    fn read(&self, from_seq: u64) -> Records;

    /// The hash of the record at `seq`, or of the empty journal for 0; `None` past the head and before the
    /// [`base`](Self::base).
    ///
    /// # Errors
    /// As [`read`](Self::read).
    fn hash_at(&self, seq: u64) -> Result<Option<[u8; 32]>, ReadError> {
        let base = self.base();
        match seq {
            0 => Ok(Some(Head::EMPTY.hash)),
            seq if seq == base.seq => Ok(Some(base.hash)),
            _ => Ok(self.read(seq).next().transpose()?.filter(|r| r.seq == seq).map(|record| record.hash)),
        }
    }

    /// The last record that was [`cut`](Self::cut) off: what the first one left continues.
    fn base(&self) -> Head {
        Head::EMPTY
    }

    /// The first record of each part that can be cut off as a whole, and of the last one, which cannot.
    fn parts(&self) -> Vec<u64> {
        vec![self.base().seq + 1]
    }

    /// The records that [`cut`](Self::cut) kept, by number.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    fn kept(&self) -> Result<Vec<StoredRecord>, ReadError> {
        Ok(Vec::new())
    }

    /// One record, also a kept one; `None` if there is none, or none any more.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    fn record(&self, seq: u64) -> Result<Option<StoredRecord>, ReadError> {
        Ok(self.read(seq).next().transpose()?.filter(|record| record.seq == seq))
    }

    /// Keeps the journal whole until the answer is dropped: nothing is [`cut`](Self::cut) off meanwhile, so that
    /// base, kept records and all others can be read as they belong together.
    fn hold(&self) -> Hold<'_> {
        Hold(None)
    }

    /// Removes the oldest parts, as far as they lie before `through` or end there, but for the records that
    /// `keep` wants: it is shown those that were kept before, then those that go, by number. Returns the new
    /// [`base`](Self::base). A journal that cannot be cut, or is [held](Self::hold), stays as it is.
    ///
    /// # Errors
    /// In every case the journal is whole.
    fn cut(&self, through: u64, keep: &mut dyn FnMut(&StoredRecord) -> bool) -> Result<Head, CutError> {
        let _ = (through, keep);
        Ok(self.base())
    }
}

/// While it lives, a journal loses nothing.
#[derive(Debug)]
pub struct Hold<'a>(#[expect(dead_code, reason = "it is held, not read")] Option<RwLockReadGuard<'a, ()>>);

/// An iteration over records; it owns all it needs.
pub type Records = Box<dyn Iterator<Item = Result<StoredRecord, ReadError>> + Send>;

/// What became of an append.
#[derive(Debug)]
pub enum Append {
    /// The records are durable and end at `head`.
    Appended { head: Head },
    /// Nothing was appended, because the journal does not end where the caller thought.
    Conflict { head: Head },
    /// The records may be there or not: look for their operation ids, in a new process if the journal is
    /// a file. A failed sync must never be retried: the kernel may have dropped the pages it could not
    /// write, and would report success (fsync(2)).
    Unknown { source: io::Error },
}

/// Why an append was not attempted or was wholly undone.
#[derive(Debug, thiserror::Error)]
pub enum AppendError {
    #[error("an append needs at least one record")]
    Empty,
    #[error("record of {bytes} bytes is larger than {RECORD_BYTES_MAX}")]
    RecordTooLarge { bytes: usize },
    #[error("{records} records at once are more than {RECORDS_PER_FRAME_MAX}")]
    TooManyRecords { records: usize },
    #[error("records of {bytes} bytes at once are more than {FRAME_BODY_BYTES_MAX}")]
    FrameTooLarge { bytes: usize },
    #[error("the disk is full")]
    Full { source: io::Error },
    #[error("cannot write to the journal")]
    Io { source: io::Error },
    #[error("the journal is closed, because the outcome of an earlier append is unknown")]
    Broken,
}

/// Why a record could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("cannot read {}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("record {seq} is damaged ({damage}) at byte {offset} of {}", path.display())]
    Damaged { seq: u64, path: PathBuf, offset: u64, damage: Damage },
    #[error("record {seq} is missing from {}", path.display())]
    Missing { seq: u64, path: PathBuf },
}

/// Why the beginning of a journal was not removed.
#[derive(Debug, thiserror::Error)]
pub enum CutError {
    #[error("records to be cut cannot be read")]
    Read(#[from] ReadError),
    #[error("cannot {attempt} {}", path.display())]
    Io { attempt: &'static str, path: PathBuf, source: io::Error },
}

/// Why a journal does not begin after records that are elsewhere.
#[derive(Debug, thiserror::Error)]
pub enum BeginError {
    #[error("the journal has records already")]
    NotEmpty,
    #[error("kept record {seq} is out of order, or not before the journal's first")]
    Kept { seq: u64 },
    #[error("cannot write a base file in {}", path.display())]
    Io { path: PathBuf, source: io::Error },
}

/// Looks for the record of an operation, to resolve an [`Append::Unknown`].
///
/// # Errors
/// If a record from `from_seq` on cannot be read.
pub fn find_operation(
    reader: &dyn JournalReader,
    from_seq: u64,
    operation: &[u8; 16],
) -> Result<Option<StoredRecord>, ReadError> {
    reader
        .read(from_seq)
        .find(|record| record.as_ref().map_or(true, |record| record.op_id == *operation))
        .transpose()
}

/// Refuses what no journal takes.
fn check_batch(records: &[EncodedRecord]) -> Result<(), AppendError> {
    if records.is_empty() {
        return Err(AppendError::Empty);
    }
    if records.len() > RECORDS_PER_FRAME_MAX {
        return Err(AppendError::TooManyRecords { records: records.len() });
    }
    if let Some(record) = records.iter().find(|record| record.bytes.len() > RECORD_BYTES_MAX) {
        return Err(AppendError::RecordTooLarge { bytes: record.bytes.len() });
    }
    let bytes = records.iter().map(EncodedRecord::stored_len).sum();
    if bytes > FRAME_BODY_BYTES_MAX {
        return Err(AppendError::FrameTooLarge { bytes });
    }
    Ok(())
}
