use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    path::Path,
    sync::{Arc, Mutex},
};

use mesh_store::{Append, EncodedRecord, FileJournal, Head, Journal, StoredRecord, journal::FileOptions};

/// Small, so that a few records fill several.
pub(crate) const SEGMENT_BYTES: u64 = 1024;

pub(crate) fn options() -> FileOptions {
    FileOptions { segment_bytes: SEGMENT_BYTES, witnesses: Vec::new() }
}

pub(crate) fn open(folder: &Path) -> FileJournal {
    FileJournal::open(folder, options()).unwrap()
}

/// A record that is unlike that of any other number.
pub(crate) fn record(number: u64, length: usize) -> EncodedRecord {
    let mut op_id = [0x5a; 16];
    op_id[..8].copy_from_slice(&number.to_le_bytes());
    let bytes = (0..length).map(|at| (number as usize * 31 + at * 7) as u8).collect();
    EncodedRecord { op_id, time_secs: 1_700_000_000 + number as i64, bytes }
}

pub(crate) fn append(journal: &mut dyn Journal, records: &[EncodedRecord]) -> Head {
    match journal.append(&journal.head(), records).unwrap() {
        Append::Appended { head } => head,
        other => panic!("not appended: {other:?}"),
    }
}

pub(crate) fn read_all(journal: &dyn Journal) -> Vec<StoredRecord> {
    journal.read(1).collect::<Result<_, _>>().unwrap()
}

pub(crate) fn encoded(record: &StoredRecord) -> EncodedRecord {
    EncodedRecord { op_id: record.op_id, time_secs: record.time_secs, bytes: record.bytes.clone() }
}

pub(crate) fn contents(journal: &dyn Journal) -> Vec<EncodedRecord> {
    read_all(journal).iter().map(encoded).collect()
}

/// Every file below `folder`, by its path, with its bytes.
pub(crate) fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        if entry.file_type().unwrap().is_dir() {
            files.extend(
                self::files(&entry.path())
                    .into_iter()
                    .map(|(below, bytes)| (format!("{name}/{below}"), bytes)),
            );
        } else {
            files.insert(name, fs::read(entry.path()).unwrap());
        }
    }
    files
}

/// The names of the segments, in order.
pub(crate) fn segments(folder: &Path) -> Vec<String> {
    files(folder).into_keys().filter(|name| name.starts_with("segment-")).collect()
}

/// Runs `work` and returns what it logged at WARN, line by line.
pub(crate) fn warnings<T>(work: impl FnOnce() -> T) -> (T, Vec<String>) {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing_subscriber::filter::LevelFilter::WARN)
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .finish();
    let result = tracing_subscriber::util::SubscriberInitExt::set_default(subscriber);
    let value = work();
    drop(result);
    let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    (value, text.lines().map(str::to_owned).collect())
}

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
