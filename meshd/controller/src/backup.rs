//! A backup: everything a controller is, in one file sealed under a passphrase of its own, and the way back from it.
//!
//! ```text
//! magic "meshbackup 1\n"
//! manifest    length u32, JSON: when and of what, the journal's head, each file with its length
//! files       their octets, in the manifest's order: settings, sealed keys, CRLs
//! if the manifest has a base, since the journal lost its oldest records by retention:
//!   world     as of the journal's head, encoded as in a snapshot
//!   kept      records that outlived their segment: number u64, hash [32], then as below
//! records     of the journal, from the first that is left: length u32, operation id [16], time i64, octets
//! ```
//!
//! Integers are big endian. The records' hashes are made anew by whoever restores; the manifest says where they begin and
//! where they end. All of it goes through [`mesh_ca::ArchiveSealer`]. Keys are as they lie on disk, sealed under the
//! CA's own passphrase; a key in a hardware token is not in a backup.

use std::io::{self, Read, Write};
use std::path::Path;

use mesh_ca::{
    ARCHIVE_CHUNK_BYTES, ARCHIVE_HEADER_BYTES, ARCHIVE_TAG_BYTES, ArchiveOpener, ArchiveSealer, KdfParams,
    SealError,
};
use mesh_store::snapshot::SNAPSHOT_BYTES_MAX;
use mesh_store::{EncodedRecord, Head, JournalReader, ReadError, Snapshot, StoredRecord};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::authority::random_fill;
use crate::config::Passphrase;
use crate::directory::Directory;
use crate::snapshots;
use crate::state::read_file;

const MAGIC: &[u8] = b"meshbackup 1\n";
/// Largest manifest, in octets of JSON.
const MANIFEST_BYTES_MAX: usize = 1024 * 1024;
/// Most files in a backup: keys and CRL shards.
const FILES_MAX: usize = 8192;
/// Folders of the state directory that are in a backup, and the largest file of each in octets.
const FOLDERS: [(&str, u64); 2] =
    [("keys", mesh_ca::SEALED_KEY_BYTES_MAX as u64), ("crl", mesh_ca::CRL_BYTES_MAX as u64)];
/// The controller's settings, and the largest they may be.
pub(crate) const SETTINGS_NAME: &str = "controller.toml";
const SETTINGS_BYTES_MAX: u64 = 64 * 1024;

/// Names below the state directory, and content.
type Files = Vec<(String, Zeroizing<Vec<u8>>)>;

/// What a backup is of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Manifest {
    pub(crate) domain: String,
    pub(crate) fleet: String,
    /// Seconds since 1970.
    pub(crate) taken_at: i64,
    /// The journal's last record, and its hash, which covers all before it.
    pub(crate) seq: u64,
    #[serde(with = "hex")]
    pub(crate) hash: [u8; 32],
    files: Vec<FileEntry>,
    /// `None` if the records are there from the first on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    base: Option<BaseEntry>,
}

/// Where the records begin, and what stands in for those before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct BaseEntry {
    /// The last record that is gone, and its hash, which the first one that is left continues.
    seq: u64,
    #[serde(with = "hex")]
    hash: [u8; 32],
    /// Layout of World, and its length.
    world_version: u32,
    world_bytes: u64,
    /// Records that were kept.
    kept: u64,
}

impl Manifest {
    pub(crate) fn head(&self) -> Head {
        Head { seq: self.seq, hash: self.hash }
    }

    /// Number of the first record that is left.
    pub(crate) fn first_seq(&self) -> u64 {
        self.base.as_ref().map_or(0, |base| base.seq) + 1
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileEntry {
    /// `controller.toml`, or `FOLDER/NAME`.
    name: String,
    bytes: u64,
}

/// Why a backup is not written or not read.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    #[error("cannot read or write the backup")]
    Io(#[source] io::Error),
    #[error("the passphrase does not open the backup, or the backup was changed or cut off")]
    Passphrase,
    #[error("the file is not a backup of a controller")]
    NotBackup,
    #[error("the backup cannot be opened")]
    Seal(#[source] SealError),
    #[error("the backup is malformed: {0}")]
    Malformed(&'static str),
    #[error("the journal cannot be read")]
    Journal(#[source] ReadError),
    #[error("the journal in the backup does not end where the backup says")]
    OtherHead,
    #[error("World cannot be encoded: {0}")]
    World(String),
}

impl From<SealError> for BackupError {
    fn from(error: SealError) -> Self {
        match error {
            SealError::WrongPassphrase => Self::Passphrase,
            SealError::Malformed => Self::NotBackup,
            other => Self::Seal(other),
        }
    }
}

impl From<io::Error> for BackupError {
    fn from(error: io::Error) -> Self {
        // Readers of ours carry their own refusals through `Read`.
        match error.downcast::<SealError>() {
            Ok(sealed) => sealed.into(),
            Err(error) => Self::Io(error),
        }
    }
}

/// What a backup is taken of.
pub(crate) struct Source<'a> {
    /// The state directory.
    pub(crate) root: &'a Path,
    pub(crate) journal: &'a dyn JournalReader,
    pub(crate) directory: &'a Directory,
}

/// What stands in for records that are gone.
pub(crate) struct Beginning {
    /// The last of them.
    pub(crate) base: Head,
    /// World as of the journal's head.
    pub(crate) world: Snapshot,
    pub(crate) kept: Vec<StoredRecord>,
}

impl Beginning {
    /// `None` if no record is gone.
    fn of(source: &Source<'_>) -> Result<Option<Self>, BackupError> {
        let base = source.journal.base();
        if base.seq == 0 {
            return Ok(None);
        }
        let world = snapshots::of(source.directory).map_err(BackupError::World)?;
        let kept = source.journal.kept().map_err(BackupError::Journal)?;
        Ok(Some(Self { base, world, kept }))
    }

    fn entry(&self) -> BaseEntry {
        BaseEntry {
            seq: self.base.seq,
            hash: self.base.hash,
            world_version: self.world.version,
            world_bytes: self.world.bytes.len() as u64,
            kept: self.kept.len() as u64,
        }
    }

    fn write(&self, writer: &mut SealedWriter<'_>) -> Result<(), BackupError> {
        writer.write_all(&self.world.bytes)?;
        for record in &self.kept {
            writer.write_all(&record.seq.to_be_bytes())?;
            writer.write_all(&record.hash)?;
            write_record(writer, record)?;
        }
        Ok(())
    }

    /// Room is made for what is there, not for what the manifest says.
    fn read(reader: &mut impl Read, entry: &BaseEntry, head: Head) -> Result<Self, BackupError> {
        if entry.seq == 0 || entry.seq > head.seq {
            return Err(BackupError::Malformed("where its records begin"));
        }
        if entry.world_bytes > SNAPSHOT_BYTES_MAX as u64 {
            return Err(BackupError::Malformed("World's length"));
        }
        let mut bytes = Vec::new();
        reader.take(entry.world_bytes).read_to_end(&mut bytes)?;
        let mut kept = Vec::new();
        for _ in 0..entry.kept {
            let (mut seq, mut hash) = ([0; 8], [0; 32]);
            read_whole(reader, &mut seq)?;
            read_whole(reader, &mut hash)?;
            let record = read_record(reader)?.ok_or(BackupError::Malformed("it ends too early"))?;
            let EncodedRecord { op_id, time_secs, bytes } = record;
            kept.push(StoredRecord { seq: u64::from_be_bytes(seq), time_secs, op_id, bytes, hash });
        }
        let world = Snapshot { head, version: entry.world_version, bytes };
        Ok(Self { base: Head { seq: entry.seq, hash: entry.hash }, world, kept })
    }
}

/// Writes a backup to `out`, with the records up to the head as it is now. Blocks.
pub(crate) fn write(
    out: &mut dyn Write,
    passphrase: &Passphrase,
    source: &Source<'_>,
    taken_at: i64,
) -> Result<Manifest, BackupError> {
    // Nothing of it leaves while it is read.
    let _whole = source.journal.hold();
    let beginning = Beginning::of(source)?;
    let (domain, fleet, head) = source.directory.read_with_head(|world, head| {
        let domain = world.mesh().map(|mesh| mesh.domain.to_string()).unwrap_or_default();
        (domain, world.fleet().unwrap_or_default().to_owned(), head)
    });
    // World goes no further than its own head.
    let head = beginning.as_ref().map_or(head, |beginning| beginning.world.head);
    let files = collect(source.root)?;
    let entries =
        files.iter().map(|(name, bytes)| FileEntry { name: name.clone(), bytes: bytes.len() as u64 });
    let manifest = Manifest {
        domain,
        fleet,
        taken_at,
        seq: head.seq,
        hash: head.hash,
        files: entries.collect(),
        base: beginning.as_ref().map(Beginning::entry),
    };
    let text = serde_json::to_vec(&manifest).map_err(|_| BackupError::Malformed("manifest"))?;
    let sealer = ArchiveSealer::new(passphrase.as_bytes(), KdfParams::default(), &mut random_fill)?;
    out.write_all(sealer.header())?;
    let mut writer = SealedWriter { out, sealer: Some(sealer), chunk: Zeroizing::new(Vec::new()) };
    writer.write_all(MAGIC)?;
    writer.write_all(&length(text.len())?)?;
    writer.write_all(&text)?;
    for (_, bytes) in &files {
        writer.write_all(bytes)?;
    }
    beginning.iter().try_for_each(|beginning| beginning.write(&mut writer))?;
    for record in source.journal.read(manifest.first_seq()) {
        let record = record.map_err(BackupError::Journal)?;
        if record.seq > head.seq {
            break;
        }
        write_record(&mut writer, &record)?;
    }
    writer.finish()?;
    Ok(manifest)
}

fn write_record(writer: &mut SealedWriter<'_>, record: &StoredRecord) -> Result<(), BackupError> {
    writer.write_all(&length(record.bytes.len())?)?;
    writer.write_all(&record.op_id)?;
    writer.write_all(&record.time_secs.to_be_bytes())?;
    Ok(writer.write_all(&record.bytes)?)
}

fn length(bytes: usize) -> Result<[u8; 4], BackupError> {
    u32::try_from(bytes).map(u32::to_be_bytes).map_err(|_| BackupError::Malformed("length"))
}

/// Names below the state directory and content; leftovers of a write that was cut off stay out.
fn collect(root: &Path) -> Result<Files, BackupError> {
    let (settings, limit) = (SETTINGS_NAME, SETTINGS_BYTES_MAX);
    let mut files = vec![(settings.to_owned(), Zeroizing::new(read_file(&root.join(settings), limit)?))];
    for (folder, limit) in FOLDERS {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(root.join(folder))? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if entry.file_type()?.is_file() && is_plain(&name) {
                names.push(name);
            }
        }
        names.sort();
        for name in names {
            let name = format!("{folder}/{name}");
            match read_file(&root.join(&name), limit) {
                Ok(bytes) => files.push((name, Zeroizing::new(bytes))),
                // Replaced or removed since it was listed.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(files)
}

/// A name that cannot lead out of its folder.
fn is_plain(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    (1..=128).contains(&name.len())
        && !name.starts_with('.')
        && !name.ends_with(".new")
        && name.bytes().all(plain)
}

/// Cuts what is written into sealed chunks.
struct SealedWriter<'a> {
    out: &'a mut dyn Write,
    /// `None` once finished.
    sealer: Option<ArchiveSealer>,
    chunk: Zeroizing<Vec<u8>>,
}

impl Write for SealedWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // A full chunk waits until it is known not to be the last.
        if self.chunk.len() == ARCHIVE_CHUNK_BYTES {
            let sealer = self.sealer.as_mut().ok_or(io::ErrorKind::BrokenPipe)?;
            let sealed = sealer.chunk(&self.chunk).map_err(io::Error::other)?;
            self.out.write_all(&sealed)?;
            self.chunk.clear();
        }
        let taken = bytes.len().min(ARCHIVE_CHUNK_BYTES - self.chunk.len());
        self.chunk.extend_from_slice(&bytes[..taken]);
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl SealedWriter<'_> {
    fn finish(mut self) -> Result<(), BackupError> {
        let sealer = self.sealer.take().ok_or(BackupError::Malformed("end"))?;
        self.out.write_all(&sealer.last(&self.chunk)?)?;
        Ok(self.out.flush()?)
    }
}

/// Puts sealed chunks together again. Nothing is handed out that was not authenticated.
pub(crate) struct OpenedReader<R> {
    source: R,
    /// `None` after the last chunk.
    opener: Option<ArchiveOpener>,
    /// The sealed chunk that comes next: whether it is the last shows by what follows it.
    next: Vec<u8>,
    plain: Zeroizing<Vec<u8>>,
    at: usize,
}

impl<R: Read> OpenedReader<R> {
    fn open(mut source: R, passphrase: &Passphrase) -> Result<Self, BackupError> {
        let mut header = [0; ARCHIVE_HEADER_BYTES];
        source.read_exact(&mut header).map_err(|_| BackupError::NotBackup)?;
        let opener = ArchiveOpener::new(&header, passphrase.as_bytes())?;
        let next = read_chunk(&mut source)?;
        Ok(Self { source, opener: Some(opener), next, plain: Zeroizing::new(Vec::new()), at: 0 })
    }

    fn refill(&mut self) -> io::Result<()> {
        let Some(mut opener) = self.opener.take() else { return Ok(()) };
        let sealed = std::mem::take(&mut self.next);
        let more = read_chunk(&mut self.source)?;
        if more.is_empty() {
            self.plain = opener.last(&sealed).map_err(io::Error::other)?;
        } else {
            self.plain = opener.chunk(&sealed).map_err(io::Error::other)?;
            (self.opener, self.next) = (Some(opener), more);
        }
        self.at = 0;
        Ok(())
    }
}

fn read_chunk(source: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut chunk = Vec::with_capacity(ARCHIVE_CHUNK_BYTES + ARCHIVE_TAG_BYTES);
    source.by_ref().take((ARCHIVE_CHUNK_BYTES + ARCHIVE_TAG_BYTES) as u64).read_to_end(&mut chunk)?;
    Ok(chunk)
}

impl<R: Read> Read for OpenedReader<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.at == self.plain.len() {
            self.refill()?;
        }
        let taken = out.len().min(self.plain.len() - self.at);
        out[..taken].copy_from_slice(&self.plain[self.at..self.at + taken]);
        self.at += taken;
        Ok(taken)
    }
}

/// A backup that was opened: its files are here, its records still to be read.
pub(crate) struct Opened<R> {
    pub(crate) manifest: Manifest,
    pub(crate) files: Files,
    pub(crate) beginning: Option<Beginning>,
    reader: R,
}

/// Opens a backup and reads all but its records. Blocks.
pub(crate) fn open<R: Read>(
    source: R,
    passphrase: &Passphrase,
) -> Result<Opened<OpenedReader<R>>, BackupError> {
    read_content(OpenedReader::open(source, passphrase)?)
}

/// Reads what was sealed, but for the records.
fn read_content<R: Read>(mut reader: R) -> Result<Opened<R>, BackupError> {
    let mut magic = [0; MAGIC.len()];
    read_whole(&mut reader, &mut magic)?;
    if magic != MAGIC {
        return Err(BackupError::NotBackup);
    }
    let bytes = read_length(&mut reader)?.filter(|bytes| *bytes <= MANIFEST_BYTES_MAX);
    let mut text = vec![0; bytes.ok_or(BackupError::Malformed("manifest"))?];
    read_whole(&mut reader, &mut text)?;
    let manifest: Manifest = serde_json::from_slice(&text).map_err(|_| BackupError::Malformed("manifest"))?;
    if manifest.files.len() > FILES_MAX {
        return Err(BackupError::Malformed("too many files"));
    }
    let mut files = Vec::new();
    for entry in &manifest.files {
        let limit = limit_of(&entry.name).ok_or(BackupError::Malformed("a file's name"))?;
        if entry.bytes > limit {
            return Err(BackupError::Malformed("a file's length"));
        }
        let mut bytes = Zeroizing::new(vec![0; usize::try_from(entry.bytes).unwrap_or(0)]);
        read_whole(&mut reader, &mut bytes)?;
        files.push((entry.name.clone(), bytes));
    }
    let head = manifest.head();
    let beginning =
        manifest.base.as_ref().map(|entry| Beginning::read(&mut reader, entry, head)).transpose()?;
    Ok(Opened { manifest, files, beginning, reader })
}

/// How long a file of this name may be; `None` for one that has no place in a state directory.
fn limit_of(name: &str) -> Option<u64> {
    match name.split_once('/') {
        None => (name == SETTINGS_NAME).then_some(SETTINGS_BYTES_MAX),
        Some((folder, name)) if is_plain(name) => {
            FOLDERS.iter().find(|(known, _)| *known == folder).map(|(_, limit)| *limit)
        }
        Some(_) => None,
    }
}

impl<R: Read> Opened<R> {
    /// The next record; `None` at the end, which has been authenticated then.
    pub(crate) fn next_record(&mut self) -> Result<Option<EncodedRecord>, BackupError> {
        read_record(&mut self.reader)
    }
}

/// `None` at the end.
fn read_record(reader: &mut impl Read) -> Result<Option<EncodedRecord>, BackupError> {
    let Some(bytes) = read_length(reader)? else { return Ok(None) };
    if bytes > mesh_store::journal::RECORD_BYTES_MAX {
        return Err(BackupError::Malformed("a record's length"));
    }
    let (mut op_id, mut time, mut body) = ([0; 16], [0; 8], vec![0; bytes]);
    read_whole(reader, &mut op_id)?;
    read_whole(reader, &mut time)?;
    read_whole(reader, &mut body)?;
    Ok(Some(EncodedRecord { op_id, time_secs: i64::from_be_bytes(time), bytes: body }))
}

/// `None` at the end.
fn read_length(reader: &mut impl Read) -> Result<Option<usize>, BackupError> {
    let mut bytes = [0; 4];
    let first = reader.read(&mut bytes[..1])?;
    if first == 0 {
        return Ok(None);
    }
    read_whole(reader, &mut bytes[1..])?;
    Ok(Some(u32::from_be_bytes(bytes) as usize))
}

fn read_whole(reader: &mut impl Read, bytes: &mut [u8]) -> Result<(), BackupError> {
    reader.read_exact(bytes).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => BackupError::Malformed("it ends too early"),
        _ => error.into(),
    })
}

#[cfg(test)]
mod tests;
