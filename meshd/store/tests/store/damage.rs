//! Damage on disk: what is cut, what is refused, and that a refusal changes nothing.

use std::{fs, path::Path};

use mesh_store::{
    FileJournal, Journal, Snapshot, Snapshots,
    journal::{Damage, Evidence, FileOptions, JournalError, Witness},
};

use crate::support::{append, contents, files, open, options, record, segments, warnings};

/// Three batches of two records; the head file says that all are acknowledged.
fn three_frames() -> (tempfile::TempDir, Vec<u64>) {
    let folder = tempfile::tempdir().unwrap();
    let options = FileOptions { segment_bytes: 64 * 1024, ..options() };
    let mut journal = FileJournal::open(folder.path(), options).unwrap();
    let mut ends = vec![0];
    for batch in 0..3 {
        append(&mut journal, &[record(batch * 2 + 1, 40), record(batch * 2 + 2, 60)]);
        ends.push(ends.last().unwrap() + 60 + 2 * 28 + 100 + 4);
    }
    (folder, ends)
}

fn only_segment(folder: &Path) -> std::path::PathBuf {
    let names = segments(folder);
    assert_eq!(names.len(), 1);
    folder.join(&names[0])
}

fn edit(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).unwrap();
    change(&mut bytes);
    fs::write(path, bytes).unwrap();
}

/// The error of a journal that must not open, having checked that nothing on disk changed.
fn refusal(folder: &Path, options: FileOptions) -> JournalError {
    let before = files(folder);
    let error = FileJournal::open(folder, options).expect_err("a damaged journal opened");
    assert_eq!(files(folder), before, "a refusal changed the disk");
    error
}

#[test]
fn every_byte_of_an_acknowledged_frame_is_guarded() {
    let (folder, ends) = three_frames();
    let segment = only_segment(folder.path());
    for at in 0..ends[3] {
        edit(&segment, |bytes| bytes[at as usize] ^= 0x10);
        let frame = ends.iter().filter(|end| **end <= at).count() as u64 - 1;
        let error = refusal(folder.path(), options());
        let JournalError::Damaged { seq, offset, evidence, .. } = &error else {
            panic!("byte {at}: {error}")
        };
        assert_eq!((*seq, *offset), (frame * 2 + 1, ends[frame as usize]), "byte {at}");
        assert!(matches!(evidence, Evidence::Acknowledged { .. }), "byte {at}: {error}");
        assert!(error.to_string().contains(&format!("record {seq} is damaged")), "{error}");
        edit(&segment, |bytes| bytes[at as usize] ^= 0x10);
    }
    assert_eq!(contents(&open(folder.path())).len(), 6);
}

#[test]
fn without_a_witness_only_the_last_frame_may_be_cut() {
    for at_in_frame in [0, 9, 20, 30, 57, 70, 200] {
        for frame in 0..3 {
            let (folder, ends) = three_frames();
            fs::remove_file(folder.path().join("head")).unwrap();
            let at = (ends[frame] + at_in_frame) as usize;
            edit(&only_segment(folder.path()), |bytes| bytes[at] ^= 1);
            if frame < 2 {
                let error = refusal(folder.path(), options());
                let JournalError::Damaged { evidence, .. } = &error else { panic!("{error}") };
                let follows = frame as u64 * 2 + 3;
                assert_eq!(
                    *evidence,
                    Evidence::FrameFollows { seq: follows },
                    "frame {frame}, byte {at_in_frame}"
                );
            } else {
                let (journal, warnings) = warnings(|| open(folder.path()));
                assert_eq!(journal.head().seq, 4);
                assert_eq!(warnings.len(), 1, "{warnings:?}");
                assert!(warnings[0].contains("seq=5"), "{warnings:?}");
            }
        }
    }
}

#[test]
fn any_witness_keeps_the_last_frame_from_being_cut() {
    let witness = Witness { name: "the index".to_owned(), seq: 5 };
    let (folder, ends) = three_frames();
    fs::remove_file(folder.path().join("head")).unwrap();
    edit(&only_segment(folder.path()), |bytes| bytes[ends[3] as usize - 1] ^= 1);
    let error = refusal(folder.path(), FileOptions { witnesses: vec![witness], ..options() });
    assert!(error.to_string().contains("the index says it was acknowledged"), "{error}");
    // The journal is damaged, but what a snapshot knows is asked before that.
    let snapshot = Snapshot { head: mesh_store::Head { seq: 6, hash: [1; 32] }, version: 1, bytes: vec![1] };
    Snapshots::new(folder.path()).write(&snapshot).unwrap();
    let error = refusal(folder.path(), options());
    assert!(error.to_string().contains("a snapshot says it was acknowledged"), "{error}");
}

#[test]
fn a_journal_that_ends_before_a_witness_is_refused() {
    let (folder, ends) = three_frames();
    let segment = only_segment(folder.path());
    edit(&segment, |bytes| bytes[ends[2] as usize..].fill(0));
    let error = refusal(folder.path(), options());
    assert!(matches!(&error, JournalError::Ahead { acknowledged: 6, head: 4, .. }), "{error}");
    assert!(error.to_string().starts_with("state ahead of journal"), "{error}");
    edit(&segment, |bytes| bytes.truncate(ends[2] as usize));
    assert!(matches!(refusal(folder.path(), options()), JournalError::Ahead { .. }));
    fs::remove_file(folder.path().join("head")).unwrap();
    assert_eq!(open(folder.path()).head().seq, 4);
    fs::remove_file(segment).unwrap();
    let index = Witness { name: "the index".to_owned(), seq: 1 };
    let error = refusal(folder.path(), FileOptions { witnesses: vec![index], ..options() });
    assert!(matches!(&error, JournalError::Ahead { acknowledged: 1, head: 0, .. }), "{error}");
}

#[test]
fn another_journal_under_the_same_head_file_is_refused() {
    let (folder, _) = three_frames();
    let other = tempfile::tempdir().unwrap();
    let mut journal =
        FileJournal::open(other.path(), FileOptions { segment_bytes: 64 * 1024, ..options() }).unwrap();
    for number in 1..=7 {
        append(&mut journal, &[record(number + 50, 10)]);
    }
    fs::copy(only_segment(other.path()), only_segment(folder.path())).unwrap();
    assert!(matches!(refusal(folder.path(), options()), JournalError::Forked { seq: 6 }));
}

#[test]
fn frames_that_are_swapped_repeated_or_missing_are_refused() {
    type Change = fn(&mut Vec<u8>, &[u64]);
    let table: [(&str, Change); 3] = [
        ("swapped", |bytes, ends| {
            let (second, third) = (ends[1] as usize..ends[2] as usize, ends[2] as usize..ends[3] as usize);
            let (a, b) = (bytes[second.clone()].to_vec(), bytes[third.clone()].to_vec());
            bytes[second].copy_from_slice(&b);
            bytes[third].copy_from_slice(&a);
        }),
        ("repeated", |bytes, ends| {
            let last = bytes[ends[2] as usize..ends[3] as usize].to_vec();
            bytes[ends[3] as usize..][..last.len()].copy_from_slice(&last);
        }),
        ("missing", |bytes, ends| {
            bytes.drain(ends[0] as usize..ends[1] as usize);
        }),
    ];
    for (name, change) in table {
        let (folder, ends) = three_frames();
        // Not even without a witness: their checksums are right, so no write was interrupted.
        fs::remove_file(folder.path().join("head")).unwrap();
        edit(&only_segment(folder.path()), |bytes| change(bytes, &ends));
        let error = refusal(folder.path(), options());
        let JournalError::Damaged { damage, evidence, .. } = &error else { panic!("{name}: {error}") };
        assert!(matches!(damage, Damage::Number { .. }), "{name}: {error}");
        assert_eq!(*evidence, Evidence::Whole, "{name}");
    }
}

#[test]
fn a_frame_of_another_history_is_refused() {
    let (folder, ends) = three_frames();
    let other = tempfile::tempdir().unwrap();
    let mut journal =
        FileJournal::open(other.path(), FileOptions { segment_bytes: 64 * 1024, ..options() }).unwrap();
    for batch in 50..53 {
        append(&mut journal, &[record(batch * 2 + 1, 40), record(batch * 2 + 2, 60)]);
    }
    fs::remove_file(folder.path().join("head")).unwrap();
    // Numbered right and with right checksums: only the hash before it gives it away.
    let last = ends[2] as usize..ends[3] as usize;
    let foreign = fs::read(only_segment(other.path())).unwrap()[last.clone()].to_vec();
    edit(&only_segment(folder.path()), |bytes| bytes[last].copy_from_slice(&foreign));
    let error = refusal(folder.path(), options());
    let JournalError::Damaged { seq: 5, damage, evidence, .. } = &error else { panic!("{error}") };
    assert_eq!((*damage, evidence), (Damage::Chain, &Evidence::Whole), "{error}");
}

#[test]
fn a_segment_that_is_missing_or_cut_short_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut journal = open(folder.path());
    for number in 1..=9 {
        append(&mut journal, &[record(number, 300)]);
    }
    drop(journal);
    let names = segments(folder.path());
    let path = folder.path().join(&names[1]);
    let bytes = fs::read(&path).unwrap();
    fs::remove_file(folder.path().join("head")).unwrap();

    fs::remove_file(&path).unwrap();
    assert!(matches!(refusal(folder.path(), options()), JournalError::Missing { seq: 3, found: 5 }));
    fs::write(&path, &bytes[..392]).unwrap();
    assert!(matches!(refusal(folder.path(), options()), JournalError::Missing { seq: 4, found: 5 }));
    fs::write(&path, &bytes[..500]).unwrap();
    let error = refusal(folder.path(), options());
    assert!(
        matches!(&error, JournalError::Damaged { seq: 4, evidence: Evidence::SegmentFollows, .. }),
        "{error}"
    );
    fs::write(&path, &bytes).unwrap();
    assert_eq!(contents(&open(folder.path())).len(), 9);
}

/// A client chooses some bytes of a record. An image of a frame among them must not keep a journal from
/// opening after a power cut.
#[test]
fn an_image_of_a_frame_inside_a_record_is_content() {
    let (image_folder, ends) = three_frames();
    let image = fs::read(only_segment(image_folder.path())).unwrap()[..ends[3] as usize].to_vec();
    let folder = tempfile::tempdir().unwrap();
    let options = FileOptions { segment_bytes: 64 * 1024, ..options() };
    let mut journal = FileJournal::open(folder.path(), options.clone()).unwrap();
    append(&mut journal, &[record(1, 10)]);
    let head = fs::read(folder.path().join("head")).unwrap();
    let mut carrier = record(2, 0);
    carrier.bytes = image;
    append(&mut journal, &[carrier]);
    drop(journal);
    fs::write(folder.path().join("head"), head).unwrap();
    edit(&only_segment(folder.path()), |bytes| {
        let end = bytes.iter().rposition(|byte| *byte != 0).unwrap();
        bytes[end] ^= 1;
    });
    let journal = FileJournal::open(folder.path(), options).unwrap();
    assert_eq!(contents(&journal), [record(1, 10)]);
}

#[test]
fn stray_files_cost_one_warning_and_no_state() {
    let (folder, _) = three_frames();
    let strays = ["snap.FFFF.generating", "segment-7", "notes.txt"];
    for name in strays {
        fs::write(folder.path().join(name), "stray").unwrap();
    }
    fs::write(folder.path().join(format!("snapshot-{:020}", 3)), "").unwrap();
    fs::write(folder.path().join(format!("snapshot-{:020}", 4)), "half a snapsh").unwrap();
    for name in [format!("segment-{:020}.new", 7), format!("snapshot-{:020}.new", 5)] {
        fs::write(folder.path().join(name), "half").unwrap();
    }
    let (journal, logged) = warnings(|| open(folder.path()));
    assert_eq!(contents(&journal).len(), 6);
    assert_eq!(logged.len(), 1, "{logged:?}");
    let left = files(folder.path());
    assert!(strays.iter().all(|name| left.contains_key(*name)), "a stranger's file was removed");
    assert!(!left.keys().any(|name| name.ends_with(".new")), "our own leftovers stay");
}

#[test]
fn a_broken_head_file_costs_one_warning() {
    let (folder, _) = three_frames();
    fs::write(folder.path().join("head"), "nonsense").unwrap();
    let (mut journal, logged) = warnings(|| open(folder.path()));
    assert_eq!(logged.len(), 1, "{logged:?}");
    append(&mut journal, &[record(7, 1)]);
    drop(journal);
    let (_, logged) = warnings(|| open(folder.path()));
    assert_eq!(logged, [""; 0], "the next append did not mend it");
}
