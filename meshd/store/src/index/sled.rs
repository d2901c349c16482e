//! The index on sled 0.34.
//!
//! sled never calls fsync for us, and a kill at a bad moment can leave a file that it refuses or
//! panics on. So every error and every panic ends in the same place: the folder is moved aside, an
//! empty one takes its place, and the journal fills it again.

use std::{
    fs, io,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};

use sled::{Batch, Db, IVec, Mode};

use super::{
    Entry, IndexError, IndexOp, KEY_BYTES_MAX, Order, PAGE_ENTRIES_MAX, Page, Table, VALUE_BYTES_MAX,
};
use crate::{
    disk,
    journal::{Head, JournalReader, ReadError},
    state::StateDir,
};

/// Page cache; sled's default is 1 GiB.
const CACHE_BYTES: u64 = 16 * 1024 * 1024;
/// Pages reach the kernel at the latest after this time. It is no durability: see the module.
const FLUSH_EVERY_MILLIS: u64 = 500;
/// Files this small are not made anew.
const COMPACT_BYTES_MIN: u64 = 16 * 1024 * 1024;
/// Files so many percent as large as when they were made anew are made anew again.
const COMPACT_GROWTH_PERCENT: u64 = 150;
/// Keys of ours, apart from every table's.
const META: u8 = 0;
const APPLIED_KEY: &[u8] = &[META, b'a'];
/// Bytes that the files took when they were last made anew, a big-endian u64.
const COMPACTED_KEY: &[u8] = &[META, b'c'];
const LAYOUT_KEY: &[u8] = &[META, b'v'];
/// What the tables hold. An index of another layout is made anew from the journal.
const LAYOUT: u8 = 3;
/// Name of the folder that an unusable index is moved to; one is kept, for whoever wants to know why.
const QUARANTINE: &str = "quarantined";
/// Name of the folder whose entries are copied while the files are made anew.
const OUTGROWN: &str = "outgrown";

/// What the journal says up to [`applied`](Self::applied), sorted for look-ups.
///
/// All tables share one sled tree, so that one batch takes a whole frame.
#[derive(Debug)]
pub struct Index {
    folder: PathBuf,
    /// `None` where none could be made.
    db: Option<Db>,
    applied: Head,
    /// After the database, so that it is let go last.
    lock: Option<StateDir>,
}

impl Index {
    /// Opens the index in `folder`. One that cannot be opened is moved aside, and this one is empty. Where
    /// not even that works, as on a full disk, every use fails until [`rebuild`](Self::rebuild) succeeds.
    pub fn open(folder: impl Into<PathBuf>) -> Self {
        let folder = folder.into();
        // A stop while it was copied: the copy names no applied record yet, and the journal fills it.
        if let Err(error) = remove_folder(&folder.with_extension(OUTGROWN)) {
            warn("an outgrown index stays on the disk", &error);
        }
        match open(&folder) {
            Ok((db, applied)) => Self { folder, db: Some(db), applied, lock: None },
            Err(error) => {
                let mut index = Self { folder, db: None, applied: Head::EMPTY, lock: None };
                if error.is_full() {
                    warn("there is no room to open the index", &error);
                } else {
                    warn("quarantining an index that does not open", &error);
                    index.rebuild_or_warn();
                }
                index
            }
        }
    }

    /// Holds the state directory's lock as long as the database is open.
    pub(crate) fn hold(&mut self, state: StateDir) {
        self.lock = Some(state);
    }

    /// The last record that was applied.
    pub fn applied(&self) -> Head {
        self.applied
    }

    /// Empties the index unless it was made from this journal. It must not be ahead of it: opening the
    /// journal with [`applied`](Self::applied) as a witness has seen to that.
    ///
    /// # Errors
    /// If the journal cannot be read.
    pub fn bind(&mut self, journal: &dyn JournalReader) -> Result<(), ReadError> {
        if journal.hash_at(self.applied.seq)? != Some(self.applied.hash) {
            tracing::warn!(applied = ?self.applied, "quarantining an index of another journal");
            self.rebuild_or_warn();
        }
        Ok(())
    }

    /// Moves the database aside and starts with an empty one, to be filled from the journal.
    ///
    /// # Errors
    /// [`IndexError::Io`] or [`IndexError::Database`] if no empty one can be made, as on a full disk. Try
    /// again later.
    pub fn rebuild(&mut self) -> Result<(), IndexError> {
        // Dropping flushes, which may panic on what made us come here.
        let db = self.db.take();
        let _ = catch_unwind(AssertUnwindSafe(|| drop(db)));
        self.applied = Head::EMPTY;
        quarantine(&self.folder)?;
        let (db, applied) = open(&self.folder)?;
        self.db = Some(db);
        self.applied = applied;
        Ok(())
    }

    fn rebuild_or_warn(&mut self) {
        if let Err(error) = self.rebuild() {
            warn("cannot make an index", &error);
        }
    }

    /// Applies the changes of the records up to `head`: all of them and `head` itself, or none.
    ///
    /// # Errors
    /// Nothing was applied. For [`IndexError::Database`] and [`IndexError::Panicked`] the index is of no
    /// more use until [`rebuild`](Self::rebuild).
    pub fn apply(&mut self, head: &Head, ops: &[IndexOp]) -> Result<(), IndexError> {
        let mut batch = Batch::default();
        for op in ops {
            op.check()?;
            let key = key(op.table, &op.key);
            match &op.value {
                Some(value) => batch.insert(key, value.as_slice()),
                None => batch.remove(key),
            }
        }
        batch.insert(APPLIED_KEY, encode_head(head).as_slice());
        // A batch is as atomic as a transaction and does not read what it overwrites.
        self.guarded("write to", |db| db.apply_batch(batch))?;
        self.applied = *head;
        Ok(())
    }

    /// Makes the files anew from their entries if they are larger than 16 MiB and by half than they were
    /// when this was done last; says whether it was. sled alone keeps several times what is live, and gives
    /// little of it back. Copies every entry, and takes the room of the copy meanwhile.
    ///
    /// # Errors
    /// The index is as it was, or [`IndexError::Absent`] from now on where not even that can be restored.
    pub fn compact(&mut self) -> Result<bool, IndexError> {
        let before = self.bytes()?;
        let fresh = self.guarded("read from", |db| db.get(COMPACTED_KEY))?;
        let fresh = fresh.and_then(|bytes| Some(u64::from_be_bytes(bytes.as_ref().try_into().ok()?)));
        if before <= COMPACT_BYTES_MIN.max(fresh.unwrap_or(0).saturating_mul(COMPACT_GROWTH_PERCENT) / 100) {
            return Ok(false);
        }
        let outgrown = self.folder.with_extension(OUTGROWN);
        remove_folder(&outgrown)?;
        rename(&self.folder, &outgrown)?;
        // sled goes on with the file that it holds, wherever the folder is.
        match self.guarded("copy", |old| Ok(copy(old, &self.folder))).flatten() {
            Ok(new) => {
                let old = self.db.replace(new);
                let _ = catch_unwind(AssertUnwindSafe(|| drop(old)));
                if let Err(error) = remove_folder(&outgrown) {
                    warn("an outgrown index stays on the disk", &error);
                }
                tracing::info!(before, after = self.bytes()?, "the index was made anew from its entries");
                Ok(true)
            }
            Err(error) => {
                if let Err(unrestored) =
                    remove_folder(&self.folder).and_then(|()| rename(&outgrown, &self.folder))
                {
                    warn("the index is lost until it is rebuilt", &unrestored);
                    let old = self.db.take();
                    let _ = catch_unwind(AssertUnwindSafe(|| drop(old)));
                }
                Err(error)
            }
        }
    }

    /// Bytes of the database's files.
    ///
    /// # Errors
    /// As [`apply`](Self::apply).
    pub fn bytes(&self) -> Result<u64, IndexError> {
        self.guarded("measure", Db::size_on_disk)
    }

    /// The value under `key`.
    ///
    /// # Errors
    /// As [`apply`](Self::apply).
    pub fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, IndexError> {
        let value = self.guarded("read from", |db| db.get(self::key(table, key)))?;
        Ok(value.map(|value| value.to_vec()))
    }

    /// One page of entries.
    ///
    /// # Errors
    /// As [`apply`](Self::apply).
    pub fn page(&self, table: Table, page: &Page) -> Result<Vec<Entry>, IndexError> {
        let limit = page.limit.min(PAGE_ENTRIES_MAX);
        let prefix = key(table, &page.prefix);
        let after = page.after.as_ref().map(|after| key(table, after));
        let past = |key: &IVec| match (&after, page.order) {
            (None, _) => true,
            (Some(after), Order::Ascending) => key.as_ref() > after.as_slice(),
            (Some(after), Order::Descending) => key.as_ref() < after.as_slice(),
        };
        let start = after.as_ref().filter(|after| after.starts_with(&prefix)).unwrap_or(&prefix);
        self.guarded("read from", |db| {
            let entries: Box<dyn Iterator<Item = sled::Result<(IVec, IVec)>>> = match page.order {
                Order::Ascending => {
                    Box::new(db.range(start.clone()..).take_while(|entry| within(entry, &prefix)))
                }
                Order::Descending => match after.as_ref().filter(|after| after.starts_with(&prefix)) {
                    Some(after) => {
                        Box::new(db.range(..after.clone()).rev().take_while(|entry| within(entry, &prefix)))
                    }
                    None => Box::new(db.scan_prefix(&prefix).rev()),
                },
            };
            entries
                .filter(|entry| entry.as_ref().map_or(true, |(key, _)| past(key)))
                .take(limit)
                .map(|entry| entry.map(|(key, value)| (key[1..].to_vec(), value.to_vec())))
                .collect()
        })
    }

    fn guarded<T>(
        &self,
        attempt: &'static str,
        work: impl FnOnce(&Db) -> sled::Result<T>,
    ) -> Result<T, IndexError> {
        let db = self.db.as_ref().ok_or(IndexError::Absent)?;
        guarded(attempt, || work(db))
    }
}

impl IndexOp {
    fn check(&self) -> Result<(), IndexError> {
        if self.key.len() > KEY_BYTES_MAX {
            return Err(IndexError::KeyTooLarge { bytes: self.key.len() });
        }
        match &self.value {
            Some(value) if value.len() > VALUE_BYTES_MAX => {
                Err(IndexError::ValueTooLarge { bytes: value.len() })
            }
            _ => Ok(()),
        }
    }
}

fn warn(message: &'static str, error: &IndexError) {
    tracing::warn!(error = error as &dyn std::error::Error, "{message}");
}

fn open(folder: &Path) -> Result<(Db, Head), IndexError> {
    disk::ensure_folder(folder).map_err(|source| IndexError::Io {
        attempt: "make",
        path: folder.into(),
        source,
    })?;
    let config = sled::Config::new()
        .path(folder)
        .cache_capacity(CACHE_BYTES)
        .mode(Mode::LowSpace)
        .use_compression(false)
        .flush_every_ms(Some(FLUSH_EVERY_MILLIS));
    let db = guarded("open", || config.open())?;
    let applied = guarded("read from", || db.get(APPLIED_KEY))?;
    let layout = guarded("read from", || db.get(LAYOUT_KEY))?;
    if applied.is_some() && layout.as_deref() != Some(&[LAYOUT]) {
        return Err(IndexError::Layout);
    }
    let applied = match applied {
        None => {
            guarded("write to", || db.insert(LAYOUT_KEY, &[LAYOUT]))?;
            Head::EMPTY
        }
        Some(bytes) => decode_head(&bytes).ok_or(IndexError::Database {
            attempt: "read from",
            source: sled::Error::ReportableBug("the applied head is malformed".to_owned()),
        })?,
    };
    Ok((db, applied))
}

/// A database in `folder` with the entries of `old`. What has been applied is written last, so that half a
/// copy is an empty index.
fn copy(old: &Db, folder: &Path) -> Result<Db, IndexError> {
    let (new, _) = open(folder)?;
    guarded("write to", || {
        for entry in old.iter() {
            let (key, value) = entry?;
            if key.first() != Some(&META) {
                new.insert(key, value)?;
            }
        }
        new.flush()?;
        let mut batch = Batch::default();
        batch.insert(COMPACTED_KEY, &new.size_on_disk()?.to_be_bytes());
        if let Some(applied) = old.get(APPLIED_KEY)? {
            batch.insert(APPLIED_KEY, applied);
        }
        new.apply_batch(batch)?;
        new.flush()
    })?;
    Ok(new)
}

/// Moves the folder aside, in place of one that was moved aside before.
fn quarantine(folder: &Path) -> Result<(), IndexError> {
    let aside = folder.with_extension(QUARANTINE);
    remove_folder(&aside)?;
    rename(folder, &aside)
}

/// Removes a folder if it is there.
fn remove_folder(folder: &Path) -> Result<(), IndexError> {
    gone(fs::remove_dir_all(folder)).map_err(|source| IndexError::Io {
        attempt: "remove",
        path: folder.into(),
        source,
    })
}

/// Renames a folder if it is there.
fn rename(from: &Path, to: &Path) -> Result<(), IndexError> {
    gone(fs::rename(from, to)).map_err(|source| IndexError::Io {
        attempt: "rename",
        path: from.into(),
        source,
    })
}

fn gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn guarded<T>(attempt: &'static str, work: impl FnOnce() -> sled::Result<T>) -> Result<T, IndexError> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(|source| IndexError::Database { attempt, source }),
        Err(_) => Err(IndexError::Panicked { attempt }),
    }
}

fn within(entry: &sled::Result<(IVec, IVec)>, prefix: &[u8]) -> bool {
    entry.as_ref().map_or(true, |(key, _)| key.starts_with(prefix))
}

fn key(table: Table, key: &[u8]) -> Vec<u8> {
    let mut full = Vec::with_capacity(1 + key.len());
    full.push(table as u8);
    full.extend_from_slice(key);
    full
}

fn encode_head(head: &Head) -> [u8; 40] {
    let mut bytes = [0; 40];
    bytes[..8].copy_from_slice(&head.seq.to_be_bytes());
    bytes[8..].copy_from_slice(&head.hash);
    bytes
}

fn decode_head(bytes: &[u8]) -> Option<Head> {
    let (seq, hash) = bytes.split_first_chunk::<8>()?;
    Some(Head { seq: u64::from_be_bytes(*seq), hash: hash.try_into().ok()? })
}
