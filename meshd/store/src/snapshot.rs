//! Snapshots: the state after some record, so that a start need not replay all before it.
//!
//! ```text
//! header  0  magic           8   "mjsnap1\n"
//!         8  version         4   of the content, the caller's
//!        12  reserved        4   0
//!        16  seq             8
//!        24  hash           32   of the record at seq
//!        56  content length  8
//!        64  content CRC-32  4
//!        68  CRC-32          4   of bytes 0..68
//! content 72
//! ```
//! Numbers are little-endian.

use std::{
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

use crate::{
    disk,
    journal::{Head, JournalReader, ReadError},
};

const PREFIX: &str = "snapshot-";
const MAGIC: [u8; 8] = *b"mjsnap1\n";
const HEADER_BYTES: usize = 72;
/// Largest content; a World of a hundred thousand nodes is a small part of it.
pub const SNAPSHOT_BYTES_MAX: usize = 1024 * 1024 * 1024;
/// Snapshots that stay: the newest, and one to fall back to.
const SNAPSHOTS_KEPT: usize = 2;

/// The state after the record at `head`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    pub head: Head,
    /// How `bytes` is encoded; one that its reader does not know is passed over.
    pub version: u32,
    pub bytes: Vec<u8>,
}

/// Why a snapshot was not written or no answer about them could be had.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    #[error("snapshot of {bytes} bytes is larger than {SNAPSHOT_BYTES_MAX}")]
    TooLarge { bytes: usize },
    #[error("cannot {attempt} {}", path.display())]
    Io { attempt: &'static str, path: PathBuf, source: io::Error },
    #[error("cannot check a snapshot against the journal")]
    Journal { source: ReadError },
}

/// The snapshots in a folder, beside the segments of the journal they belong to.
#[derive(Debug, Clone)]
pub struct Snapshots {
    folder: PathBuf,
}

impl Snapshots {
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into() }
    }

    /// Writes a snapshot, durably, and removes all but the newest two.
    ///
    /// # Errors
    /// The snapshots that were there stay as they are.
    pub fn write(&self, snapshot: &Snapshot) -> Result<(), SnapshotError> {
        if snapshot.bytes.len() > SNAPSHOT_BYTES_MAX {
            return Err(SnapshotError::TooLarge { bytes: snapshot.bytes.len() });
        }
        let path = self.folder.join(format!("{PREFIX}{:020}", snapshot.head.seq));
        disk::replace_file(&path, &[&encode_header(snapshot), &snapshot.bytes])
            .map_err(|source| SnapshotError::Io { attempt: "write", path, source })?;
        for (_, path) in list(&self.folder).map_err(self.failed("list"))?.iter().rev().skip(SNAPSHOTS_KEPT) {
            fs::remove_file(path).map_err(|source| SnapshotError::Io {
                attempt: "remove",
                path: path.clone(),
                source,
            })?;
        }
        Ok(())
    }

    /// The newest snapshot of this content `version` that is whole and belongs to the journal. Others are
    /// passed over with one warning.
    ///
    /// # Errors
    /// If the folder or the journal cannot be read; broken snapshots are none.
    pub fn newest(
        &self,
        journal: &dyn JournalReader,
        version: u32,
    ) -> Result<Option<Snapshot>, SnapshotError> {
        let mut passed_over = Vec::new();
        let mut newest = None;
        for (seq, path) in list(&self.folder).map_err(self.failed("list"))?.into_iter().rev() {
            match load(&path, seq) {
                Some(snapshot) if snapshot.version == version && belongs(&snapshot, journal)? => {
                    newest = Some(snapshot);
                    break;
                }
                _ => passed_over.push(path),
            }
        }
        if !passed_over.is_empty() {
            tracing::warn!(files = ?passed_over, "ignoring snapshots that are broken, foreign or of another version");
        }
        Ok(newest)
    }

    /// The records up to which there is a snapshot, oldest first.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub fn seqs(&self) -> Result<Vec<u64>, SnapshotError> {
        let all = list(&self.folder).map_err(self.failed("list"))?;
        Ok(all.into_iter().map(|(seq, _)| seq).collect())
    }

    fn failed(&self, attempt: &'static str) -> impl FnOnce(io::Error) -> SnapshotError {
        let path = self.folder.clone();
        move |source| SnapshotError::Io { attempt, path, source }
    }
}

pub(crate) fn is_snapshot(name: &str) -> bool {
    number(name).is_some()
}

/// The last record that a snapshot in `folder` vouches for. Its header suffices: it was written whole.
pub(crate) fn newest_seq(folder: &Path) -> io::Result<Option<u64>> {
    for (seq, path) in list(folder)?.into_iter().rev() {
        let mut header = [0; HEADER_BYTES];
        let whole = File::open(&path)?.read_exact(&mut header).is_ok();
        if whole && Header::parse(&header).is_some_and(|header| header.head.seq == seq) {
            return Ok(Some(seq));
        }
    }
    Ok(None)
}

/// The files named like snapshots, in order.
fn list(folder: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
    let mut snapshots = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if let Some(seq) = number(&entry.file_name().to_string_lossy()) {
            snapshots.push((seq, entry.path()));
        }
    }
    snapshots.sort();
    Ok(snapshots)
}

fn number(name: &str) -> Option<u64> {
    crate::journal::file_number(name, PREFIX)
}

fn belongs(snapshot: &Snapshot, journal: &dyn JournalReader) -> Result<bool, SnapshotError> {
    let hash = journal.hash_at(snapshot.head.seq).map_err(|source| SnapshotError::Journal { source })?;
    Ok(hash == Some(snapshot.head.hash))
}

/// The snapshot in a file; `None` if it is not whole.
fn load(path: &Path, seq: u64) -> Option<Snapshot> {
    let mut file = File::open(path).ok()?;
    let mut header = [0; HEADER_BYTES];
    file.read_exact(&mut header).ok()?;
    let header = Header::parse(&header).filter(|header| header.head.seq == seq)?;
    // The length is compared before room is made for it.
    if file.metadata().ok()?.len() != (HEADER_BYTES + header.content_bytes) as u64 {
        return None;
    }
    let mut bytes = vec![0; header.content_bytes];
    file.read_exact(&mut bytes).ok()?;
    (crc32fast::hash(&bytes) == header.content_crc).then_some(Snapshot {
        head: header.head,
        version: header.version,
        bytes,
    })
}

struct Header {
    head: Head,
    version: u32,
    content_bytes: usize,
    content_crc: u32,
}

impl Header {
    fn parse(bytes: &[u8; HEADER_BYTES]) -> Option<Self> {
        let (covered, crc) = bytes.split_last_chunk::<4>()?;
        if covered[..8] != MAGIC || crc32fast::hash(covered).to_le_bytes() != *crc {
            return None;
        }
        let content_bytes = usize::try_from(u64::from_le_bytes(covered[56..64].try_into().ok()?)).ok()?;
        Some(Self {
            version: u32::from_le_bytes(covered[8..12].try_into().ok()?),
            head: Head {
                seq: u64::from_le_bytes(covered[16..24].try_into().ok()?),
                hash: covered[24..56].try_into().ok()?,
            },
            content_bytes: Some(content_bytes).filter(|bytes| *bytes <= SNAPSHOT_BYTES_MAX)?,
            content_crc: u32::from_le_bytes(covered[64..68].try_into().ok()?),
        })
    }
}

fn encode_header(snapshot: &Snapshot) -> Vec<u8> {
    let mut header = Vec::with_capacity(HEADER_BYTES);
    header.extend_from_slice(&MAGIC);
    header.extend_from_slice(&snapshot.version.to_le_bytes());
    header.extend_from_slice(&[0; 4]);
    header.extend_from_slice(&snapshot.head.seq.to_le_bytes());
    header.extend_from_slice(&snapshot.head.hash);
    header.extend_from_slice(&(snapshot.bytes.len() as u64).to_le_bytes());
    header.extend_from_slice(&crc32fast::hash(&snapshot.bytes).to_le_bytes());
    header.extend_from_slice(&crc32fast::hash(&header).to_le_bytes());
    header
}
