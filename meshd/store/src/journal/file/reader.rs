use std::{
    collections::VecDeque,
    fs::{self, File},
    io::{self, BufReader, Read, Seek, SeekFrom},
    path::Path,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, TryLockError},
};

use super::{
    base::Base,
    damaged,
    frame::{Damage, HEADER_BYTES, Header, TRAILER_BYTES},
    segment::Segment,
};
use crate::{
    disk,
    journal::{CutError, Head, Hold, JournalReader, ReadError, Records, StoredRecord},
};

const BUFFER_BYTES: usize = 128 * 1024;
/// Frames between two places that a reader may start from.
const FRAMES_PER_MARK: u32 = 64;

/// Where a journal's records are.
#[derive(Debug)]
pub(crate) struct Catalog {
    pub(crate) segments: Vec<Segment>,
    pub(crate) head: Head,
    pub(crate) base: Base,
    /// By number of the first record.
    marks: Vec<Mark>,
    frames_since_mark: u32,
}

/// A frame that is quick to find.
#[derive(Debug, Clone, Copy)]
struct Mark {
    first_seq: u64,
    segment: usize,
    offset: u64,
}

impl Catalog {
    pub(crate) fn new(base: Base) -> Self {
        Self { segments: Vec::new(), head: base.head, base, marks: Vec::new(), frames_since_mark: 0 }
    }

    /// Forgets the first `count` segments.
    fn forget(&mut self, count: usize, base: Base) {
        self.segments.drain(..count);
        self.marks.retain_mut(|mark| {
            let stays = mark.segment >= count;
            mark.segment = mark.segment.saturating_sub(count);
            stays
        });
        self.base = base;
    }

    /// Notes a frame of the last segment; `head` is the one after it.
    pub(crate) fn advance(&mut self, first_seq: u64, offset: u64, head: Head) {
        let segment = self.segments.len() - 1;
        // The first frame of every segment is marked.
        if offset == 0 || self.frames_since_mark == FRAMES_PER_MARK {
            self.marks.push(Mark { first_seq, segment, offset });
            self.frames_since_mark = 0;
        }
        self.frames_since_mark += 1;
        self.head = head;
    }

    /// The last mark at or before `seq`.
    fn mark(&self, seq: u64) -> Option<Mark> {
        let after = self.marks.partition_point(|mark| mark.first_seq <= seq);
        after.checked_sub(1).map(|index| self.marks[index])
    }
}

/// A catalog that the writer extends while readers use it.
#[derive(Debug)]
pub(crate) struct SharedCatalog {
    catalog: RwLock<Catalog>,
    /// One cuts at a time, and nobody while somebody holds the journal.
    cutting: RwLock<()>,
}

impl SharedCatalog {
    pub(crate) fn new(catalog: Catalog) -> Arc<Self> {
        Arc::new(Self { catalog: RwLock::new(catalog), cutting: RwLock::default() })
    }

    /// An empty journal goes on after `base`.
    pub(crate) fn begin(&self, base: Base) {
        *self.write() = Catalog::new(base);
    }

    pub(crate) fn add_segment(&self, segment: Segment) {
        self.write().segments.push(segment);
    }

    pub(crate) fn advance(&self, first_seq: u64, offset: u64, head: Head) {
        self.write().advance(first_seq, offset, head);
    }

    fn read(&self) -> RwLockReadGuard<'_, Catalog> {
        self.catalog.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Catalog> {
        self.catalog.write().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
pub(crate) struct FileReader(Arc<SharedCatalog>);

impl FileReader {
    pub(crate) fn new(catalog: Arc<SharedCatalog>) -> Self {
        Self(catalog)
    }
}

impl JournalReader for FileReader {
    fn head(&self) -> Head {
        self.0.read().head
    }

    fn read(&self, from_seq: u64) -> Records {
        let catalog = self.0.read();
        let from = from_seq.max(catalog.base.head.seq + 1);
        let (mark, until) = (catalog.mark(from), catalog.head.seq);
        match mark.filter(|_| from <= until) {
            Some(mark) => Box::new(FileRecords {
                segments: catalog.segments[mark.segment..].iter().cloned().collect(),
                start: mark.offset,
                scanner: None,
                next_seq: mark.first_seq,
                chain: None,
                ready: VecDeque::new(),
                from,
                until,
            }),
            None => Box::new(std::iter::empty()),
        }
    }

    fn base(&self) -> Head {
        self.0.read().base.head
    }

    fn parts(&self) -> Vec<u64> {
        self.0.read().segments.iter().map(|segment| segment.first_seq).collect()
    }

    fn kept(&self) -> Result<Vec<StoredRecord>, ReadError> {
        self.0.read().base.all()
    }

    fn record(&self, seq: u64) -> Result<Option<StoredRecord>, ReadError> {
        {
            let catalog = self.0.read();
            if seq <= catalog.base.head.seq {
                return catalog.base.find(seq);
            }
        }
        Ok(JournalReader::read(self, seq).next().transpose()?.filter(|record| record.seq == seq))
    }

    fn hold(&self) -> Hold<'_> {
        Hold(Some(self.0.cutting.read().unwrap_or_else(PoisonError::into_inner)))
    }

    fn cut(&self, through: u64, keep: &mut dyn FnMut(&StoredRecord) -> bool) -> Result<Head, CutError> {
        let _turn = match self.0.cutting.try_write() {
            Ok(turn) => turn,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Ok(self.base()),
        };
        let (base, segments) = {
            let catalog = self.0.read();
            (catalog.base.clone(), catalog.segments.clone())
        };
        // A segment goes when the next one begins soon enough; so the one that is written stays.
        let goes =
            segments.windows(2).take_while(|pair| pair[1].first_seq <= through.saturating_add(1)).count();
        let Some(folder) = segments.first().and_then(|first| first.path.parent()).filter(|_| goes > 0) else {
            return Ok(base.head);
        };
        let end = segments[goes].first_seq - 1;
        let mut kept = base.all()?;
        kept.retain(|record| keep(record));
        let mut head = base.head;
        for record in JournalReader::read(self, base.head.seq + 1) {
            let record = record?;
            if record.seq > end {
                break;
            }
            head = record.head();
            if keep(&record) {
                kept.push(record);
            }
        }
        let failed = |attempt, path: &Path| {
            let path = path.to_owned();
            move |source| CutError::Io { attempt, path, source }
        };
        // Commit point: from here on the journal begins after `head`.
        let base = Base::store(folder, &head, &kept).map_err(failed("write a base file in", folder))?;
        self.0.write().forget(goes, base);
        for segment in &segments[..goes] {
            fs::remove_file(&segment.path).map_err(failed("remove", &segment.path))?;
        }
        disk::sync_folder(folder).map_err(failed("sync", folder))?;
        Ok(head)
    }
}

struct FileRecords {
    /// Not yet opened.
    segments: VecDeque<Segment>,
    /// Where to start in the first of them.
    start: u64,
    scanner: Option<(Segment, Scanner)>,
    /// The first record of the next frame.
    next_seq: u64,
    /// The record before it, unless its frame was skipped.
    chain: Option<Head>,
    ready: VecDeque<StoredRecord>,
    from: u64,
    until: u64,
}

impl FileRecords {
    /// Reads or skips one frame.
    fn advance(&mut self) -> Result<(), ReadError> {
        if self.segments.front().is_some_and(|next| self.scanner.is_none() || next.first_seq == self.next_seq)
        {
            let segment = self.segments.pop_front().expect("a front was seen");
            let scanner =
                Scanner::open(&segment, std::mem::take(&mut self.start)).map_err(io_error(&segment))?;
            self.scanner = Some((segment, scanner));
        }
        let (segment, scanner) = self.scanner.as_mut().expect("the catalog names a segment for every record");
        let (next_seq, offset) = (self.next_seq, scanner.offset());
        let bad = |damage| damaged(next_seq, segment, offset, damage);
        let header = match scanner.header().map_err(io_error(segment))? {
            Found::Header(header) => header,
            Found::End => return Err(ReadError::Missing { seq: next_seq, path: segment.path.clone() }),
            Found::Damage(damage) => return Err(bad(damage)),
        };
        if header.first_seq != next_seq {
            return Err(bad(Damage::Number { found: header.first_seq }));
        }
        self.next_seq = header.next_seq();
        if self.next_seq <= self.from {
            self.chain = None;
            return scanner.skip(&header).map_err(io_error(segment));
        }
        let body = scanner.body(&header).map_err(io_error(segment))?.map_err(bad)?;
        // The first frame's word for the record before it must do; its own records are checked.
        let mut head = self.chain.unwrap_or(Head { seq: next_seq - 1, hash: header.previous });
        let records = header.records(&body, &mut head).map_err(bad)?;
        self.chain = Some(head);
        self.ready
            .extend(records.into_iter().filter(|record| record.seq >= self.from && record.seq <= self.until));
        Ok(())
    }
}

impl Iterator for FileRecords {
    type Item = Result<StoredRecord, ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.ready.is_empty() {
            if self.next_seq > self.until {
                return None;
            }
            if let Err(error) = self.advance() {
                self.next_seq = u64::MAX;
                self.until = 0;
                return Some(Err(error));
            }
        }
        self.ready.pop_front().map(Ok)
    }
}

/// Reads the frames of one segment.
pub(crate) struct Scanner {
    file: BufReader<File>,
    offset: u64,
}

/// What stands where a frame may begin.
pub(crate) enum Found {
    Header(Header),
    /// Zeroes, or the end of the file.
    End,
    Damage(Damage),
}

impl Scanner {
    pub(crate) fn open(segment: &Segment, offset: u64) -> io::Result<Self> {
        let mut file = BufReader::with_capacity(BUFFER_BYTES, File::open(&segment.path)?);
        file.seek(SeekFrom::Start(offset))?;
        Ok(Self { file, offset })
    }

    /// Where the next frame begins.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    pub(crate) fn file(&self) -> &File {
        self.file.get_ref()
    }

    /// Reads a header. Afterwards call [`body`](Self::body) or [`skip`](Self::skip), or stop.
    pub(crate) fn header(&mut self) -> io::Result<Found> {
        let mut bytes = [0; HEADER_BYTES];
        let length = read_up_to(&mut self.file, &mut bytes)?;
        if bytes[..length].iter().all(|byte| *byte == 0) {
            return Ok(Found::End);
        }
        if length < HEADER_BYTES {
            return Ok(Found::Damage(Damage::Cut));
        }
        Ok(Header::parse(&bytes).map_or_else(Found::Damage, Found::Header))
    }

    /// Reads and checks the body that belongs to `header`.
    pub(crate) fn body(&mut self, header: &Header) -> io::Result<Result<Vec<u8>, Damage>> {
        let mut bytes = vec![0; header.body_bytes + TRAILER_BYTES];
        if read_up_to(&mut self.file, &mut bytes)? < bytes.len() {
            return Ok(Err(Damage::Cut));
        }
        self.offset += header.frame_bytes();
        Ok(header.check_body(&bytes).map(<[u8]>::len).map(|length| {
            bytes.truncate(length);
            bytes
        }))
    }

    pub(crate) fn skip(&mut self, header: &Header) -> io::Result<()> {
        self.offset += header.frame_bytes();
        let rest = header.body_bytes + TRAILER_BYTES;
        self.file.seek_relative(i64::try_from(rest).expect("a body is at most FRAME_BODY_BYTES_MAX"))
    }

    /// Whether nothing but zeroes stands from the current frame to the end of the file.
    pub(crate) fn rest_is_zero(&mut self) -> io::Result<bool> {
        static ZEROES: [u8; 64 * 1024] = [0; 64 * 1024];
        let mut chunk = vec![0; ZEROES.len()];
        self.file.seek(SeekFrom::Start(self.offset))?;
        loop {
            // Comparing slices is one memcmp; the reserved room may be large.
            match read_up_to(&mut self.file, &mut chunk)? {
                0 => return Ok(true),
                length if chunk[..length] != ZEROES[..length] => return Ok(false),
                _ => {}
            }
        }
    }
}

fn read_up_to(file: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(length) => filled += length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

fn io_error(segment: &Segment) -> impl Fn(io::Error) -> ReadError + use<> {
    let path = segment.path.clone();
    move |source| ReadError::Io { path: path.clone(), source }
}
