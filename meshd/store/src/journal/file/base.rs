//! The base file: where the journal begins once its oldest segments were removed, and which of their records were kept.
//!
//! ```text
//! header  0  magic        8   "mjbase1\n"
//!         8  seq          8   of the last record that was removed
//!        16  hash        32   of that record: what the first one that is left continues
//!        48  kept         4
//!        52  CRC-32       4   of bytes 0..52
//! kept   56  seq 8, hash 32, then the record as in a frame (op_id 16, time 8, length 4, bytes), CRC-32 4 of all that
//! ```
//! Numbers are little-endian. It is replaced before segments are removed, so that a crash in between leaves segments that
//! nobody needs, and never a journal without its beginning.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use crate::{
    disk,
    journal::{EncodedRecord, Head, ReadError, StoredRecord, file::frame::Damage},
};

pub(crate) const FILE: &str = "base";
const MAGIC: [u8; 8] = *b"mjbase1\n";
const HEADER_BYTES: usize = 56;
const CRC_BYTES: usize = 4;
const SEQ_AND_HASH_BYTES: usize = 8 + 32;

/// Where the journal begins, and what is kept of what was before.
#[derive(Debug, Clone)]
pub(crate) struct Base {
    /// The last record that was removed; [`Head::EMPTY`] where none was.
    pub(crate) head: Head,
    /// By number.
    kept: Vec<Kept>,
    path: PathBuf,
}

/// Where a kept record lies in the file.
#[derive(Debug, Clone, Copy)]
struct Kept {
    seq: u64,
    offset: u64,
    bytes: usize,
}

/// What is wrong with a base file.
#[derive(Debug)]
pub(crate) enum Trouble {
    Io(io::Error),
    Damaged,
}

impl Base {
    /// The base file in `folder`; without one the journal begins at its first record.
    pub(crate) fn load(folder: &Path) -> Result<Self, Trouble> {
        let path = folder.join(FILE);
        match fs::read(&path) {
            Ok(bytes) => parse(&bytes, path).ok_or(Trouble::Damaged),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Ok(Self { head: Head::EMPTY, kept: Vec::new(), path })
            }
            Err(error) => Err(Trouble::Io(error)),
        }
    }

    /// Replaces the file, durably. No kept record may be [`misplaced`].
    pub(crate) fn store(folder: &Path, head: &Head, kept: &[StoredRecord]) -> io::Result<Self> {
        let path = folder.join(FILE);
        let bytes = encode(head, kept);
        disk::replace_file(&path, &[&bytes])?;
        let own = "what was just encoded";
        Ok(parse(&bytes, path).unwrap_or_else(|| unreachable!("{own} reads back")))
    }

    /// Every kept record, by number.
    pub(crate) fn all(&self) -> Result<Vec<StoredRecord>, ReadError> {
        self.kept.iter().map(|kept| self.read(*kept)).collect()
    }

    /// One kept record.
    pub(crate) fn find(&self, seq: u64) -> Result<Option<StoredRecord>, ReadError> {
        match self.kept.binary_search_by_key(&seq, |kept| kept.seq) {
            Ok(at) => self.read(self.kept[at]).map(Some),
            Err(_) => Ok(None),
        }
    }

    fn read(&self, kept: Kept) -> Result<StoredRecord, ReadError> {
        let io = |source| ReadError::Io { path: self.path.clone(), source };
        let mut bytes = vec![0; kept.bytes];
        File::open(&self.path).and_then(|file| file.read_exact_at(&mut bytes, kept.offset)).map_err(io)?;
        let (record, _) = take(&mut &bytes[..]).ok_or_else(|| ReadError::Damaged {
            seq: kept.seq,
            path: self.path.clone(),
            offset: kept.offset,
            damage: Damage::BodyChecksum,
        })?;
        Ok(record)
    }
}

fn encode(head: &Head, kept: &[StoredRecord]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&head.seq.to_le_bytes());
    bytes.extend_from_slice(&head.hash);
    bytes.extend_from_slice(&u32::try_from(kept.len()).unwrap_or(u32::MAX).to_le_bytes());
    bytes.extend_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
    for record in kept {
        let start = bytes.len();
        bytes.extend_from_slice(&record.seq.to_le_bytes());
        bytes.extend_from_slice(&record.hash);
        record.to_encoded().store(&mut bytes);
        let crc = crc32fast::hash(&bytes[start..]).to_le_bytes();
        bytes.extend_from_slice(&crc);
    }
    bytes
}

fn parse(bytes: &[u8], path: PathBuf) -> Option<Base> {
    let (header, mut rest) = bytes.split_at_checked(HEADER_BYTES)?;
    let (covered, crc) = header.split_last_chunk::<CRC_BYTES>()?;
    if covered[..8] != MAGIC || crc32fast::hash(covered).to_le_bytes() != *crc {
        return None;
    }
    let head = Head {
        seq: u64::from_le_bytes(covered[8..16].try_into().ok()?),
        hash: covered[16..48].try_into().ok()?,
    };
    let count = u32::from_le_bytes(covered[48..52].try_into().ok()?);
    let mut kept: Vec<Kept> = Vec::new();
    for _ in 0..count {
        let offset = (bytes.len() - rest.len()) as u64;
        let (record, length) = take(&mut rest)?;
        kept.push(Kept { seq: record.seq, offset, bytes: length });
    }
    let in_order = misplaced(&head, kept.iter().map(|kept| kept.seq)).is_none();
    (rest.is_empty() && in_order).then_some(Base { head, kept, path })
}

/// The first kept record that does not come after the one before, or lies past `head`.
pub(crate) fn misplaced(head: &Head, seqs: impl Iterator<Item = u64>) -> Option<u64> {
    let mut last = 0;
    seqs.into_iter().find(|seq| *seq <= std::mem::replace(&mut last, *seq) || *seq > head.seq)
}

/// Takes a kept record off the front, with the octets it took.
fn take(rest: &mut &[u8]) -> Option<(StoredRecord, usize)> {
    let whole = *rest;
    let (place, mut body) = whole.split_at_checked(SEQ_AND_HASH_BYTES)?;
    let record = EncodedRecord::load(&mut body)?;
    let covered = whole.len() - body.len();
    let (crc, body) = body.split_first_chunk::<CRC_BYTES>()?;
    if crc32fast::hash(&whole[..covered]).to_le_bytes() != *crc {
        return None;
    }
    let head =
        Head { seq: u64::from_le_bytes(place[..8].try_into().ok()?), hash: place[8..].try_into().ok()? };
    *rest = body;
    Some((record.into_stored(&head), covered + CRC_BYTES))
}
