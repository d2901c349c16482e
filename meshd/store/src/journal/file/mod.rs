mod base;
mod frame;
mod head;
mod reader;
mod recovery;
pub(crate) mod segment;

pub use frame::Damage;

use std::{
    fmt,
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use self::{
    base::Base,
    head::HeadFile,
    reader::{FileReader, SharedCatalog},
    recovery::Recovered,
    segment::{Segment, reserve},
};
use super::{
    Append, AppendError, BeginError, EncodedRecord, Head, Journal, JournalReader, ReadError, StoredRecord,
    check_batch,
};
use crate::{disk, state::StateDir};

/// Bytes of a segment, unless one frame alone needs more.
pub const SEGMENT_BYTES: u64 = 64 * 1024 * 1024;
/// Room on disk is taken in these steps, ahead of what is written.
const ROOM_BYTES: u64 = 8 * 1024 * 1024;

/// How a file journal is opened.
#[derive(Debug, Clone)]
pub struct FileOptions {
    /// Bytes that a new segment takes on disk.
    pub segment_bytes: u64,
    /// What other files say was acknowledged; a journal that ends before is refused.
    pub witnesses: Vec<Witness>,
}

/// A place outside the journal that knows how far it went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Witness {
    pub name: String,
    pub seq: u64,
}

impl Default for FileOptions {
    fn default() -> Self {
        Self { segment_bytes: SEGMENT_BYTES, witnesses: Vec::new() }
    }
}

/// Why a journal was not opened. Nothing on disk was changed.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error("record {seq} is damaged ({damage}) at byte {offset} of {}; {evidence}, so it is not cut", path.display())]
    Damaged { seq: u64, path: PathBuf, offset: u64, damage: Damage, evidence: Evidence },
    #[error("state ahead of journal: {witness} has record {acknowledged}, the journal ends at {head}")]
    Ahead { witness: String, acknowledged: u64, head: u64 },
    #[error("record {seq} is not the one that was acknowledged")]
    Forked { seq: u64 },
    #[error("record {seq} is missing: the next segment begins at {found}")]
    Missing { seq: u64, found: u64 },
    #[error("{} does not say where the journal begins", path.display())]
    Base { path: PathBuf },
    #[error("cannot {attempt} {}", path.display())]
    Io { attempt: &'static str, path: PathBuf, source: io::Error },
}

/// Why damage cannot be the rest of a write that was never acknowledged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Evidence {
    /// This file says that the record was acknowledged.
    Acknowledged { witness: String },
    /// A whole frame stands after it.
    FrameFollows { seq: u64 },
    /// A whole segment stands after it.
    SegmentFollows,
    /// Its checksums are right, so no write was interrupted.
    Whole,
}

impl fmt::Display for Evidence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Acknowledged { witness } => write!(f, "{witness} says it was acknowledged"),
            Self::FrameFollows { seq } => write!(f, "record {seq} follows it"),
            Self::SegmentFollows => f.write_str("a segment follows it"),
            Self::Whole => f.write_str("it was not written so by accident"),
        }
    }
}

/// A journal in a folder of segment files.
pub struct FileJournal {
    folder: PathBuf,
    options: FileOptions,
    catalog: Arc<SharedCatalog>,
    head: Head,
    active: Option<Active>,
    head_file: HeadFile,
    broken: bool,
    /// Seconds after which a segment takes no more records, by their times.
    segment_secs: i64,
    /// After the files, so that it is let go last.
    lock: Option<StateDir>,
}

/// The segment that is written.
struct Active {
    segment: Segment,
    file: File,
    /// Where the next frame goes.
    end: u64,
    /// Bytes that the file has on disk.
    room: u64,
    /// Time of its first record.
    since: i64,
}

impl FileJournal {
    /// Opens the journal in `folder`, which must be ours alone (see [`StateDir`](crate::StateDir)),
    /// checks every record, and cuts a last frame that was not written to its end.
    ///
    /// # Errors
    /// Whatever else is wrong refuses the journal and changes nothing on disk.
    pub fn open(folder: &Path, options: FileOptions) -> Result<Self, JournalError> {
        let Recovered { catalog, end, tail, leftovers } = recovery::recover(folder, &options.witnesses)?;
        let head = catalog.head;
        if let Some(tail) = tail {
            tail.cut()?;
        }
        for path in leftovers {
            fs::remove_file(&path).map_err(|source| failed("remove", &path, source))?;
        }
        let last = catalog.segments.last().cloned();
        let head_file =
            HeadFile::open(folder).map_err(|source| failed("open", &folder.join(head::FILE), source))?;
        let catalog = SharedCatalog::new(catalog);
        let active = match last {
            Some(segment) => {
                let first = FileReader::new(Arc::clone(&catalog)).read(segment.first_seq).next();
                let since = first.and_then(Result::ok).map_or(i64::MAX, |record| record.time_secs);
                Some(Active::open(&segment, end, since)?)
            }
            None => None,
        };
        Ok(Self {
            folder: folder.to_owned(),
            options,
            catalog,
            head,
            active,
            head_file,
            broken: false,
            segment_secs: i64::MAX,
            lock: None,
        })
    }

    /// Begins a new segment at the latest when the records of the last one span `span`, so that old ones can be
    /// [`cut`](JournalReader::cut) off in time.
    pub fn limit_segment_span(&mut self, span: Duration) {
        self.segment_secs = i64::try_from(span.as_secs()).unwrap_or(i64::MAX);
    }

    /// Begins an empty journal after records that are elsewhere: `head` is the last of them, and `kept` are those that
    /// are kept here, by number, as after a [`cut`](JournalReader::cut).
    ///
    /// # Errors
    /// In every case the journal is empty as before.
    pub fn begin_after(&mut self, head: &Head, kept: &[StoredRecord]) -> Result<(), BeginError> {
        if self.head != Head::EMPTY {
            return Err(BeginError::NotEmpty);
        }
        if let Some(seq) = base::misplaced(head, kept.iter().map(|record| record.seq)) {
            return Err(BeginError::Kept { seq });
        }
        let base = Base::store(&self.folder, head, kept)
            .map_err(|source| BeginError::Io { path: self.folder.clone(), source })?;
        self.catalog.begin(base);
        self.head = *head;
        Ok(())
    }

    /// Holds the state directory's lock as long as the journal is open.
    pub(crate) fn hold(&mut self, state: StateDir) {
        self.lock = Some(state);
    }

    /// Writes the frame where nothing was and syncs it. The outer error is a write that was surely undone;
    /// the inner one leaves it unknown.
    fn write(&mut self, frame: &[u8], time_secs: i64) -> Result<io::Result<()>, AppendError> {
        let segment_bytes = self.options.segment_bytes;
        let length = frame.len() as u64;
        // An empty segment takes even a frame that is larger than a segment.
        let fits = |active: &&mut Active| {
            let young = time_secs.saturating_sub(active.since) < self.segment_secs;
            active.end == 0 || (young && active.end + length <= segment_bytes)
        };
        let active = match self.active.as_mut().filter(fits) {
            Some(active) => active,
            None => {
                let segment = Segment::at(&self.folder, self.head.seq + 1);
                let active = Active::create(segment, room(length, segment_bytes), length, time_secs)
                    .map_err(refused)?;
                self.catalog.add_segment(active.segment.clone());
                if let Some(full) = self.active.replace(active) {
                    full.close();
                }
                self.active.as_mut().expect("it was just put there")
            }
        };
        if active.end == 0 {
            active.since = time_secs;
        }
        let end = active.end + length;
        active.room = reserve(&active.file, active.room, room(end, segment_bytes), end).map_err(refused)?;
        if let Err(source) = active.file.write_all_at(frame, active.end) {
            // What was written must not be found later, whatever of it reached the disk.
            return match active.file.set_len(active.end).and_then(|()| active.file.sync_all()) {
                Ok(()) => {
                    active.room = active.end;
                    Err(refused(source))
                }
                Err(_) => Ok(Err(source)),
            };
        }
        Ok(active.file.sync_data())
    }
}

impl Journal for FileJournal {
    fn head(&self) -> Head {
        self.head
    }

    fn append(&mut self, expected: &Head, records: &[EncodedRecord]) -> Result<Append, AppendError> {
        if self.broken {
            return Err(AppendError::Broken);
        }
        check_batch(records)?;
        if *expected != self.head {
            return Ok(Append::Conflict { head: self.head });
        }
        let (frame, head) = frame::encode(&self.head, records);
        if let Err(source) = self.write(&frame, records[0].time_secs)? {
            self.broken = true;
            return Ok(Append::Unknown { source });
        }
        // Commit point.
        let active = self.active.as_mut().expect("the frame was written to a segment");
        let start = active.end;
        active.end += frame.len() as u64;
        self.head = head;
        self.catalog.advance(expected.seq + 1, start, head);
        if let Err(error) = self.head_file.store(&head) {
            tracing::warn!(error = &error as &dyn std::error::Error, "cannot write the journal's head file");
        }
        Ok(Append::Appended { head })
    }

    fn reader(&self) -> Box<dyn JournalReader> {
        Box::new(FileReader::new(Arc::clone(&self.catalog)))
    }
}

impl fmt::Debug for FileJournal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileJournal")
            .field("folder", &self.folder)
            .field("head", &self.head)
            .finish_non_exhaustive()
    }
}

impl Active {
    /// Reopens the last segment, whose last frame ends at `end`.
    fn open(segment: &Segment, end: u64, since: i64) -> Result<Self, JournalError> {
        let file = File::options().read(true).write(true).open(&segment.path);
        let file = file.map_err(|source| failed("open", &segment.path, source))?;
        // The room after the last frame is asked for again at the first append: a copy of the file, as
        // from a backup, has its length but not its blocks.
        Ok(Self { segment: segment.clone(), file, end, room: end, since })
    }

    fn create(segment: Segment, bytes: u64, least: u64, since: i64) -> io::Result<Self> {
        let (file, room) = segment.create(bytes, least)?;
        Ok(Self { segment, file, end: 0, room, since })
    }

    /// Gives back the room that no frame will take. Zeroes that stay do no harm.
    fn close(self) {
        if let Err(error) = self.file.set_len(self.end) {
            tracing::warn!(%error, segment = %self.segment.path.display(), "unused room stays with a full segment");
        }
    }
}

/// The room that a segment has on disk when its frames end at `end`.
fn room(end: u64, segment_bytes: u64) -> u64 {
    end.next_multiple_of(ROOM_BYTES).min(segment_bytes).max(end)
}

fn refused(source: io::Error) -> AppendError {
    if disk::is_full(&source) { AppendError::Full { source } } else { AppendError::Io { source } }
}

fn failed(attempt: &'static str, path: &Path, source: io::Error) -> JournalError {
    JournalError::Io { attempt, path: path.to_owned(), source }
}

/// A damaged frame as a reader reports it.
fn damaged(seq: u64, segment: &Segment, offset: u64, damage: Damage) -> ReadError {
    ReadError::Damaged { seq, path: segment.path.clone(), offset, damage }
}
