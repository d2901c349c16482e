use std::path::PathBuf;

use crate::{
    index::{Index, IndexError, IndexOp},
    journal::Journal,
    journal::{
        FileJournal, FileOptions, Head, JournalError, JournalReader, ReadError, SEGMENT_BYTES, StoredRecord,
        Witness,
    },
    snapshot::Snapshots,
    state::{StateDir, StateError},
};

/// The journal's folder in a state directory.
pub const JOURNAL_FOLDER: &str = "journal";
const INDEX_FOLDER: &str = "index";
/// Records whose changes go to the index in one transaction during a replay.
const REPLAY_BATCH: usize = 256;

/// How a store is opened.
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// Bytes of a new journal segment.
    pub segment_bytes: u64,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self { segment_bytes: SEGMENT_BYTES }
    }
}

/// All durable state of a controller. Its parts may go different ways: the lock is held until the last
/// of them is dropped.
#[derive(Debug)]
pub struct Store {
    pub journal: FileJournal,
    pub snapshots: Snapshots,
    /// Bring it up to date with [`catch_up`].
    pub index: Index,
    pub state: StateDir,
}

/// Why a store was not opened. The journal on disk is as it was.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error("cannot check the index against the journal")]
    Bind { source: ReadError },
}

/// Why the index is not up to date.
#[derive(Debug, thiserror::Error)]
pub enum CatchUpError {
    #[error("cannot bring the index up to date")]
    Index { source: IndexError },
    #[error("cannot replay the journal into the index")]
    Replay { source: ReadError },
}

impl Store {
    /// Locks and opens the state directory at `path`, made if its parent is there.
    ///
    /// # Errors
    /// [`StateError::InUse`], [`StateError::Newer`], [`StateError::Mode`]; [`JournalError`] if the journal
    /// lost or changed something that was acknowledged. An unusable index or snapshot is no error.
    pub fn open(path: impl Into<PathBuf>, options: StoreOptions) -> Result<Self, OpenError> {
        let state = StateDir::open(path)?;
        let folder = state.folder(JOURNAL_FOLDER)?;
        // The index first, because it knows how far the journal went.
        let mut index = Index::open(state.path().join(INDEX_FOLDER));
        index.hold(state.clone());
        let witnesses = vec![Witness { name: "the index".to_owned(), seq: index.applied().seq }];
        let options = FileOptions { segment_bytes: options.segment_bytes, witnesses };
        let mut journal = FileJournal::open(&folder, options)?;
        journal.hold(state.clone());
        index.bind(&*journal.reader()).map_err(|source| OpenError::Bind { source })?;
        Ok(Self { journal, snapshots: Snapshots::new(folder), index, state })
    }
}

/// Applies to the index what the journal has beyond it. `changes` says what a record means there; it
/// must depend on the record alone. An index that fails on the way, or could not be opened, is rebuilt
/// once.
///
/// # Errors
/// If the journal cannot be read, or a rebuilt index fails as well, as on a full disk. Nothing is lost by
/// going on without an index and calling again later.
pub fn catch_up(
    index: &mut Index,
    journal: &dyn JournalReader,
    changes: impl FnMut(&StoredRecord) -> Vec<IndexOp>,
) -> Result<(), CatchUpError> {
    catch_up_by(index, journal, usize::MAX, changes)
}

/// As [`catch_up`], with `limit` records at most, rounded up to a batch.
///
/// # Errors
/// As [`catch_up`].
pub fn catch_up_by(
    index: &mut Index,
    journal: &dyn JournalReader,
    limit: usize,
    mut changes: impl FnMut(&StoredRecord) -> Vec<IndexOp>,
) -> Result<(), CatchUpError> {
    match replay(index, journal, limit, &mut changes) {
        Err(CatchUpError::Index { source }) if source.is_mended_by_rebuild() => {
            tracing::warn!(error = &source as &dyn std::error::Error, "rebuilding an index that failed");
            index.rebuild().map_err(|source| CatchUpError::Index { source })?;
            replay(index, journal, limit, &mut changes)
        }
        other => other,
    }
}

fn replay(
    index: &mut Index,
    journal: &dyn JournalReader,
    limit: usize,
    changes: &mut impl FnMut(&StoredRecord) -> Vec<IndexOp>,
) -> Result<(), CatchUpError> {
    let base = journal.base();
    if index.applied().seq < base.seq {
        // What was cut off is gone, but for what was kept of it.
        let kept = journal.kept().map_err(|source| CatchUpError::Replay { source })?;
        for some in kept.chunks(REPLAY_BATCH) {
            let ops: Vec<IndexOp> = some.iter().flat_map(&mut *changes).collect();
            index.apply(&index.applied(), &ops).map_err(|source| CatchUpError::Index { source })?;
        }
        index.apply(&base, &[]).map_err(|source| CatchUpError::Index { source })?;
    }
    let mut records = journal.read(index.applied().seq + 1);
    for _ in 0..limit.div_ceil(REPLAY_BATCH) {
        let mut head: Option<Head> = None;
        let mut ops = Vec::new();
        for record in records.by_ref().take(REPLAY_BATCH) {
            let record = record.map_err(|source| CatchUpError::Replay { source })?;
            ops.extend(changes(&record));
            head = Some(record.head());
        }
        let Some(head) = head else { return Ok(()) };
        index.apply(&head, &ops).map_err(|source| CatchUpError::Index { source })?;
    }
    Ok(())
}
