//! Reading a journal for the first time: what is whole, what may be cut, what must be refused.

use std::{
    fs::{self, File},
    io::{self, BufRead, BufReader, Seek, SeekFrom},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use super::{
    Evidence, JournalError, Witness,
    base::{self, Base, Trouble},
    failed,
    frame::{Damage, HEADER_BYTES, Header, MAGIC, TRAILER_BYTES},
    head::{self, HeadFile},
    reader::{Catalog, Found, Scanner},
    segment::{self, Segment},
};
use crate::{
    journal::{Head, StoredRecord},
    snapshot,
};

const SEARCH_BUFFER_BYTES: usize = 256 * 1024;

/// A journal that may be used once its tail is cut.
pub(crate) struct Recovered {
    pub(crate) catalog: Catalog,
    /// Where the last frame of the last segment ends.
    pub(crate) end: u64,
    pub(crate) tail: Option<Tail>,
    /// Our own temporary files, left by a crash.
    pub(crate) leftovers: Vec<PathBuf>,
}

/// The rest of a write that was never acknowledged.
pub(crate) struct Tail {
    segment: Segment,
    offset: u64,
    seq: u64,
    damage: Damage,
}

/// Reads all segments. Changes nothing.
pub(crate) fn recover(folder: &Path, witnesses: &[Witness]) -> Result<Recovered, JournalError> {
    let (mut segments, strays) = Segment::list(folder).map_err(|source| failed("list", folder, source))?;
    let mut leftovers: Vec<PathBuf> =
        strays.iter().filter(|name| is_temporary(name)).map(|name| folder.join(name)).collect();
    let beside = Beside::load(folder, strays, witnesses)?;
    let base = Base::load(folder).map_err(|trouble| {
        let path = folder.join(base::FILE);
        match trouble {
            Trouble::Io(source) => failed("read", &path, source),
            Trouble::Damaged => JournalError::Base { path },
        }
    })?;
    // Segments that were to be removed when the process ended.
    let gone = segments.windows(2).take_while(|pair| pair[1].first_seq <= base.head.seq + 1).count();
    leftovers.extend(segments.drain(..gone).map(|segment| segment.path));
    let mut recovery = Recovery { catalog: Catalog::new(base), end: 0, beside };
    let last = segments.len().saturating_sub(1);
    let mut tail = None;
    for (index, segment) in segments.into_iter().enumerate() {
        tail = recovery.segment(segment, index == last)?;
    }
    let Recovery { catalog, end, beside } = recovery;
    beside.check_head(&catalog.head)?;
    Ok(Recovered { catalog, end, tail, leftovers })
}

/// Whether we name files so while we write them.
fn is_temporary(name: &str) -> bool {
    name.strip_suffix(".new")
        .is_some_and(|name| segment::is_segment(name) || snapshot::is_snapshot(name) || name == base::FILE)
}

struct Recovery {
    catalog: Catalog,
    end: u64,
    beside: Beside,
}

impl Recovery {
    fn segment(&mut self, segment: Segment, last: bool) -> Result<Option<Tail>, JournalError> {
        let expected = self.catalog.head.seq + 1;
        if segment.first_seq > expected {
            return Err(JournalError::Missing { seq: expected, found: segment.first_seq });
        }
        let mut scanner =
            Scanner::open(&segment, 0).map_err(|source| failed("open", &segment.path, source))?;
        if segment.first_seq < expected {
            let damage = Damage::Number { found: segment.first_seq };
            return self.refuse(&segment, 0, damage, Evidence::Whole);
        }
        self.catalog.segments.push(segment.clone());
        loop {
            let offset = scanner.offset();
            self.end = offset;
            let read = self.frame(&mut scanner).map_err(|source| failed("read", &segment.path, source))?;
            match read {
                Read::Records(records) => {
                    self.beside.check_records(&records)?;
                    let head = records.last().expect("a header names at least one record").head();
                    self.catalog.advance(records[0].seq, offset, head);
                }
                Read::End => return Ok(None),
                Read::Damage { damage, next } => {
                    return self.judge(&segment, scanner.file(), offset, damage, next, last);
                }
            }
        }
    }

    fn frame(&self, scanner: &mut Scanner) -> io::Result<Read> {
        let offset = scanner.offset();
        let header = match scanner.header()? {
            Found::Header(header) => header,
            Found::End if scanner.rest_is_zero()? => return Ok(Read::End),
            Found::End => return Ok(Read::Damage { damage: Damage::NoFrame, next: offset + 1 }),
            Found::Damage(damage) => return Ok(Read::Damage { damage, next: offset + 1 }),
        };
        // An intact header says where its frame ends. What looks like a frame before that is content.
        let next = offset + header.frame_bytes();
        let mut head = self.catalog.head;
        let records = scanner.body(&header)?.and_then(|body| header.records(&body, &mut head));
        Ok(records.map_or_else(|damage| Read::Damage { damage, next }, Read::Records))
    }

    /// Decides whether damage is a write that never ended. `next` is where another frame could begin.
    fn judge(
        &self,
        segment: &Segment,
        file: &File,
        offset: u64,
        damage: Damage,
        next: u64,
        last: bool,
    ) -> Result<Option<Tail>, JournalError> {
        let seq = self.catalog.head.seq + 1;
        if let Some(witness) = self.beside.witness_of(seq) {
            return self.refuse(
                segment,
                offset,
                damage,
                Evidence::Acknowledged { witness: witness.name.clone() },
            );
        }
        if !damage.may_be_torn() {
            return self.refuse(segment, offset, damage, Evidence::Whole);
        }
        if !last {
            return self.refuse(segment, offset, damage, Evidence::SegmentFollows);
        }
        let found = find_frame(file, next, seq).map_err(|source| failed("read", &segment.path, source))?;
        match found {
            Some(header) => {
                self.refuse(segment, offset, damage, Evidence::FrameFollows { seq: header.first_seq })
            }
            None => Ok(Some(Tail { segment: segment.clone(), offset, seq, damage })),
        }
    }

    fn refuse<T>(
        &self,
        segment: &Segment,
        offset: u64,
        damage: Damage,
        evidence: Evidence,
    ) -> Result<T, JournalError> {
        let seq = self.catalog.head.seq + 1;
        Err(JournalError::Damaged { seq, path: segment.path.clone(), offset, damage, evidence })
    }
}

enum Read {
    Records(Vec<StoredRecord>),
    End,
    Damage { damage: Damage, next: u64 },
}

/// What the files beside the segments know.
struct Beside {
    witnesses: Vec<Witness>,
    /// What the head file says.
    acknowledged: Option<Head>,
}

impl Beside {
    fn load(folder: &Path, mut strays: Vec<String>, outside: &[Witness]) -> Result<Self, JournalError> {
        let path = folder.join(head::FILE);
        let acknowledged = HeadFile::load(folder).map_err(|source| failed("read", &path, source))?;
        let mut witnesses = outside.to_vec();
        match acknowledged {
            Some(head) => witnesses.push(Witness { name: "the head file".to_owned(), seq: head.seq }),
            // An empty one is made when a journal is opened for the first time.
            None if fs::metadata(&path).is_ok_and(|metadata| metadata.len() > 0) => {
                strays.push(head::FILE.to_owned())
            }
            None => {}
        }
        let newest = snapshot::newest_seq(folder).map_err(|source| failed("list", folder, source))?;
        witnesses.extend(newest.map(|seq| Witness { name: "a snapshot".to_owned(), seq }));
        if !strays.is_empty() {
            tracing::warn!(folder = %folder.display(), files = ?strays, "ignoring files that are no part of the journal");
        }
        Ok(Self { witnesses, acknowledged })
    }

    fn witness_of(&self, seq: u64) -> Option<&Witness> {
        self.witnesses.iter().find(|witness| witness.seq >= seq)
    }

    fn check_records(&self, records: &[StoredRecord]) -> Result<(), JournalError> {
        match self.acknowledged {
            Some(head) if records.iter().any(|record| record.seq == head.seq && record.hash != head.hash) => {
                Err(JournalError::Forked { seq: head.seq })
            }
            _ => Ok(()),
        }
    }

    fn check_head(&self, head: &Head) -> Result<(), JournalError> {
        match self.witness_of(head.seq + 1) {
            Some(Witness { name, seq }) => {
                Err(JournalError::Ahead { witness: name.clone(), acknowledged: *seq, head: head.seq })
            }
            None => Ok(()),
        }
    }
}

impl Tail {
    /// Removes the tail, durably.
    pub(crate) fn cut(self) -> Result<(), JournalError> {
        let Self { segment, offset, seq, damage } = self;
        tracing::warn!(
            seq,
            offset,
            segment = %segment.path.display(),
            %damage,
            "cutting a last frame that was never acknowledged"
        );
        let cut = || -> io::Result<()> {
            let file = File::options().write(true).open(&segment.path)?;
            file.set_len(offset)?;
            file.sync_all()
        };
        cut().map_err(|source| failed("cut", &segment.path, source))
    }
}

/// The first whole frame at or after `from` that holds no record before `seq`.
fn find_frame(file: &File, from: u64, seq: u64) -> io::Result<Option<Header>> {
    let mut reader = BufReader::with_capacity(SEARCH_BUFFER_BYTES, file);
    let mut position = reader.seek(SeekFrom::Start(from))?;
    loop {
        match reader.skip_until(MAGIC[0])? {
            0 => return Ok(None),
            skipped => position += skipped as u64,
        }
        if let Some(header) = whole_frame(file, position - 1)?
            && header.first_seq >= seq
        {
            return Ok(Some(header));
        }
    }
}

fn whole_frame(file: &File, offset: u64) -> io::Result<Option<Header>> {
    let mut header = [0; HEADER_BYTES];
    if !read_exact_at(file, &mut header, offset)? {
        return Ok(None);
    }
    let Ok(header) = Header::parse(&header) else { return Ok(None) };
    let mut body = vec![0; header.body_bytes + TRAILER_BYTES];
    let complete = read_exact_at(file, &mut body, offset + HEADER_BYTES as u64)?;
    Ok((complete && header.check_body(&body).is_ok()).then_some(header))
}

fn read_exact_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<bool> {
    match file.read_exact_at(buffer, offset) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}
