//! Power cuts: whatever the disk made of the last frame's write, what was acknowledged is there, and
//! of the rest either all or nothing.

use std::{fs, ops::Range, path::PathBuf};

use mesh_store::{EncodedRecord, FileJournal};
use proptest::{collection::vec, prelude::*, sample::Index};

use crate::support::{append, contents, open, options, record, segments, warnings};

/// A journal whose last frame was written and not synced.
struct Unsynced {
    folder: tempfile::TempDir,
    acknowledged: Vec<EncodedRecord>,
    tail: Vec<EncodedRecord>,
    segment: PathBuf,
    /// Where the last frame stands in it.
    frame: Range<usize>,
}

impl Unsynced {
    fn new(batches: &[Vec<usize>], tail: &[usize]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut journal = open(folder.path());
        let (mut acknowledged, mut end) = (Vec::new(), 0);
        let mut number = 0;
        let mut make = |lengths: &[usize]| -> Vec<EncodedRecord> {
            lengths
                .iter()
                .map(|length| {
                    number += 1;
                    record(number, *length)
                })
                .collect()
        };
        for lengths in batches {
            let (records, before) = (make(lengths), segments(folder.path()).len());
            append(&mut journal, &records);
            end = if segments(folder.path()).len() > before { 0 } else { end } + frame_bytes(&records);
            acknowledged.extend(records);
        }
        let head = fs::read(folder.path().join("head")).ok();
        let (tail, before) = (make(tail), segments(folder.path()).len());
        append(&mut journal, &tail);
        // The head file is written after the sync, which never came.
        match head {
            Some(head) => fs::write(folder.path().join("head"), head).unwrap(),
            None => fs::remove_file(folder.path().join("head")).unwrap(),
        }
        let names = segments(folder.path());
        let start = if names.len() > before { 0 } else { end };
        let segment = folder.path().join(names.last().unwrap());
        let frame = start..start + frame_bytes(&tail);
        Self { folder, acknowledged, tail, segment, frame }
    }

    /// Opens the journal after the power cut and holds it to the promise. Whether the tail was kept.
    fn check(&self, whole: bool) -> Result<(), TestCaseError> {
        let (journal, logged) = warnings(|| FileJournal::open(self.folder.path(), options()));
        let mut journal = journal.map_err(|error| TestCaseError::fail(format!("refused: {error}")))?;
        let mut expected = self.acknowledged.clone();
        if whole {
            expected.extend(self.tail.clone());
        }
        prop_assert_eq!(contents(&journal), expected.clone());
        prop_assert!(logged.len() <= 1, "{:?}", logged);
        // It goes on as if nothing had been.
        let next = record(1_000, 33);
        append(&mut journal, std::slice::from_ref(&next));
        drop(journal);
        let (journal, logged) = warnings(|| open(self.folder.path()));
        prop_assert_eq!(logged.len(), 0);
        expected.push(next);
        prop_assert_eq!(contents(&journal), expected);
        Ok(())
    }
}

/// Header, records with their prefixes, checksum.
fn frame_bytes(records: &[EncodedRecord]) -> usize {
    60 + records.iter().map(|record| 28 + record.bytes.len()).sum::<usize>() + 4
}

/// What a disk does to one sector of a write that was not synced.
#[derive(Debug, Clone)]
enum Sector {
    Written,
    Lost,
    Torn(Index),
    Of(Index),
}

fn any_sector() -> impl Strategy<Value = Sector> {
    prop_oneof![
        3 => Just(Sector::Written),
        2 => Just(Sector::Lost),
        1 => any::<Index>().prop_map(Sector::Torn),
        1 => any::<Index>().prop_map(Sector::Of),
    ]
}

const SECTOR_BYTES: usize = 64;

fn scramble(frame: &[u8], sectors: &[Sector]) -> Vec<u8> {
    let originals: Vec<&[u8]> = frame.chunks(SECTOR_BYTES).collect();
    let mut out = Vec::new();
    for (index, original) in originals.iter().enumerate() {
        let mut sector = original.to_vec();
        match &sectors[index % sectors.len()] {
            Sector::Written => {}
            Sector::Lost => sector.fill(0),
            Sector::Torn(at) => {
                let at = at.index(sector.len());
                sector[at..].fill(0);
            }
            Sector::Of(other) => {
                let other = originals[other.index(originals.len())];
                let length = sector.len().min(other.len());
                sector[..length].copy_from_slice(&other[..length]);
            }
        }
        out.extend(sector);
    }
    out
}

fn batches() -> impl Strategy<Value = Vec<Vec<usize>>> {
    vec(vec(0_usize..300, 1..4), 0..6)
}

fn tail() -> impl Strategy<Value = Vec<usize>> {
    vec(0_usize..300, 1..5)
}

proptest! {
    // PROPTEST_CASES makes it more.
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_tail_cut_anywhere_is_gone(batches in batches(), tail in tail(), at in any::<Index>()) {
        let unsynced = Unsynced::new(&batches, &tail);
        let at = unsynced.frame.start + at.index(unsynced.frame.len());
        let bytes = fs::read(&unsynced.segment).unwrap();
        fs::write(&unsynced.segment, &bytes[..at]).unwrap();
        unsynced.check(false)?;
    }

    #[test]
    fn a_tail_with_a_flipped_bit_is_gone(
        batches in batches(), tail in tail(), at in any::<Index>(), bit in 0..8_u8,
    ) {
        let unsynced = Unsynced::new(&batches, &tail);
        let mut bytes = fs::read(&unsynced.segment).unwrap();
        bytes[unsynced.frame.start + at.index(unsynced.frame.len())] ^= 1 << bit;
        fs::write(&unsynced.segment, &bytes).unwrap();
        unsynced.check(false)?;
    }

    #[test]
    fn a_tail_written_in_any_order_is_whole_or_gone(
        batches in batches(), tail in tail(), sectors in vec(any_sector(), 1..24),
    ) {
        let unsynced = Unsynced::new(&batches, &tail);
        let mut bytes = fs::read(&unsynced.segment).unwrap();
        let frame = &bytes[unsynced.frame.clone()];
        let scrambled = scramble(frame, &sectors);
        let whole = scrambled == frame;
        bytes[unsynced.frame.clone()].copy_from_slice(&scrambled);
        fs::write(&unsynced.segment, &bytes).unwrap();
        unsynced.check(whole)?;
    }

    /// A segment of any bytes, with and without something that looks like a frame: refused, or an empty journal.
    #[test]
    fn any_bytes_are_refused_or_hold_nothing(
        before in vec(any::<u8>(), 0..200), header in vec(any::<u8>(), 0..60), after in vec(any::<u8>(), 0..200),
    ) {
        let folder = tempfile::tempdir().unwrap();
        drop(open(folder.path()));
        let name = segments(folder.path()).into_iter().next().unwrap_or_else(|| "segment-00000000000000000001".to_owned());
        let bytes = [&before[..], &[0xf5, b'm', b'j', b'f', 1, 0, 0, 0], &header, &after].concat();
        fs::write(folder.path().join(name), bytes).unwrap();
        if let Ok(journal) = FileJournal::open(folder.path(), options()) {
            prop_assert!(crate::support::contents(&journal).is_empty());
        }
    }

    /// Damage to what was acknowledged is never healed.
    #[test]
    fn an_acknowledged_frame_is_never_cut(
        batches in batches().prop_filter("some", |batches| !batches.is_empty()),
        segment in any::<Index>(), at in any::<Index>(), bit in 0..8_u8, truncate in any::<bool>(),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let mut journal = open(folder.path());
        let mut number = 0;
        for lengths in &batches {
            let records: Vec<_> = lengths.iter().map(|length| { number += 1; record(number, *length) }).collect();
            append(&mut journal, &records);
        }
        drop(journal);
        let names = segments(folder.path());
        let path = folder.path().join(&names[segment.index(names.len())]);
        let mut bytes = fs::read(&path).unwrap();
        let used = bytes.iter().rposition(|byte| *byte != 0).unwrap() + 1;
        let at = at.index(used);
        if truncate {
            bytes.truncate(at);
        } else {
            bytes[at] ^= 1 << bit;
        }
        fs::write(&path, &bytes).unwrap();
        let before = crate::support::files(folder.path());
        prop_assert!(FileJournal::open(folder.path(), options()).is_err());
        prop_assert_eq!(crate::support::files(folder.path()), before);
    }
}
