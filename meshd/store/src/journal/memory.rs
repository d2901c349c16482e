use std::{
    collections::VecDeque,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::{
    Append, AppendError, EncodedRecord, Head, Journal, JournalReader, Records, StoredRecord, check_batch,
};

/// A journal in memory that fails when told to, for tests of whatever writes one.
#[derive(Debug, Default)]
pub struct MemoryJournal {
    disk: Arc<Mutex<Disk>>,
    broken: bool,
}

/// What a file journal would have on disk: it survives [`MemoryJournal::reopen`].
#[derive(Debug, Default)]
struct Disk {
    records: Vec<StoredRecord>,
    faults: VecDeque<Fault>,
}

/// How an append fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The append succeeds; to let some pass before one that fails.
    None,
    /// Nothing is kept, and the writer is told so.
    Full,
    /// Nothing is kept, but the writer cannot know.
    UnknownBeforePersisting,
    /// Everything is kept, but the writer cannot know.
    UnknownAfterPersisting,
}

/// Sets the faults of a journal that someone else owns.
#[derive(Debug, Clone)]
pub struct Faults(Arc<Mutex<Disk>>);

impl MemoryJournal {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn faults(&self) -> Faults {
        Faults(Arc::clone(&self.disk))
    }

    /// The journal as the next process would find it: with all that was kept.
    pub fn reopen(&self) -> Self {
        Self { disk: Arc::clone(&self.disk), broken: false }
    }
}

impl Faults {
    /// The next append fails so, the one after as by the call after.
    pub fn push(&self, fault: Fault) {
        lock(&self.0).faults.push_back(fault);
    }
}

impl Disk {
    fn head(&self) -> Head {
        self.records.last().map_or(Head::EMPTY, StoredRecord::head)
    }

    fn keep(&mut self, records: &[EncodedRecord]) -> Head {
        for record in records {
            let head = self.head().next(record);
            self.records.push(record.clone().into_stored(&head));
        }
        self.head()
    }
}

impl Journal for MemoryJournal {
    fn head(&self) -> Head {
        lock(&self.disk).head()
    }

    fn append(&mut self, expected: &Head, records: &[EncodedRecord]) -> Result<Append, AppendError> {
        if self.broken {
            return Err(AppendError::Broken);
        }
        check_batch(records)?;
        let mut disk = lock(&self.disk);
        let head = disk.head();
        if head != *expected {
            return Ok(Append::Conflict { head });
        }
        let unknown = || Append::Unknown { source: io::Error::other("fault asked for by a test") };
        match disk.faults.pop_front().unwrap_or(Fault::None) {
            Fault::None => Ok(Append::Appended { head: disk.keep(records) }),
            Fault::Full => Err(AppendError::Full { source: io::ErrorKind::StorageFull.into() }),
            Fault::UnknownBeforePersisting => {
                self.broken = true;
                Ok(unknown())
            }
            Fault::UnknownAfterPersisting => {
                disk.keep(records);
                self.broken = true;
                Ok(unknown())
            }
        }
    }

    fn reader(&self) -> Box<dyn JournalReader> {
        Box::new(MemoryReader(Arc::clone(&self.disk)))
    }
}

struct MemoryReader(Arc<Mutex<Disk>>);

impl JournalReader for MemoryReader {
    fn head(&self) -> Head {
        lock(&self.0).head()
    }

    fn read(&self, from_seq: u64) -> Records {
        let disk = lock(&self.0);
        let skipped = usize::try_from(from_seq.saturating_sub(1)).unwrap_or(usize::MAX);
        let records: Vec<_> = disk.records.iter().skip(skipped).cloned().map(Ok).collect();
        Box::new(records.into_iter())
    }
}

fn lock(disk: &Mutex<Disk>) -> MutexGuard<'_, Disk> {
    disk.lock().unwrap_or_else(PoisonError::into_inner)
}
