//! The format on disk is a promise: these bytes were written by the first version.

use std::{collections::BTreeMap, fs, path::Path};

use mesh_store::{FileJournal, Journal, Snapshot, Snapshots, journal::FileOptions};

use crate::support::{append, contents, files, record};

const HEAD_HASH: &str = "936ecea4ec3a20500418234152910ce5c50da814858710ca14d4c3f9f448dea1";

fn golden() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1")
}

fn options() -> FileOptions {
    FileOptions { segment_bytes: 512, witnesses: Vec::new() }
}

fn write(folder: &Path) {
    let mut journal = FileJournal::open(folder, options()).unwrap();
    for batch in [&[1, 2][..], &[3], &[4, 5, 6], &[7], &[8]] {
        append(
            &mut journal,
            &batch.iter().map(|number| record(*number, *number as usize * 11)).collect::<Vec<_>>(),
        );
    }
    let snapshot = Snapshot { head: journal.head(), version: 7, bytes: b"state".to_vec() };
    Snapshots::new(folder).write(&snapshot).unwrap();
}

#[test]
fn the_first_version_is_still_read() {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in files(&golden()) {
        fs::write(folder.path().join(name), bytes).unwrap();
    }
    let journal = FileJournal::open(folder.path(), options()).unwrap();
    let expected: Vec<_> = (1..=8).map(|number| record(number, number as usize * 11)).collect();
    assert_eq!(contents(&journal), expected);
    assert_eq!(hex::encode(journal.head().hash), HEAD_HASH);
    let snapshot = Snapshots::new(folder.path()).newest(&*journal.reader(), 7).unwrap().unwrap();
    assert_eq!((snapshot.head, &snapshot.bytes[..]), (journal.head(), &b"state"[..]));
}

#[test]
fn the_first_version_is_still_written() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path());
    let (written, first) = (without_room(folder.path()), without_room(&golden()));
    assert!(written == first, "the format changed; it needs a version of its own");
}

/// The files without the room that segments have past their last frame, which is no part of the format.
fn without_room(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = files(folder);
    for (_, bytes) in files.iter_mut().filter(|(name, _)| name.starts_with("segment-")) {
        let end = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        bytes.truncate(end);
    }
    files
}

/// Writes the files above, once for every version of the format.
#[test]
#[ignore = "writes the golden files; only for a new version"]
fn write_the_golden_files() {
    fs::create_dir_all(golden()).unwrap();
    write(&golden());
}
