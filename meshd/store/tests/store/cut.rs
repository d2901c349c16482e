//! Cutting off the beginning of a journal.

use std::{fs, path::Path, time::Duration};

use mesh_store::{
    BeginError, Head, Index, IndexOp, Journal, StoredRecord, Table, catch_up, journal::JournalError,
};
use proptest::prelude::*;

use crate::support::{append, encoded, files, open, record, segments};

/// Every seventh record is worth keeping.
fn keep(stored: &StoredRecord) -> bool {
    stored.seq.is_multiple_of(7)
}

fn seqs(records: &[StoredRecord]) -> Vec<u64> {
    records.iter().map(|record| record.seq).collect()
}

fn read_from(journal: &dyn Journal, first: u64) -> Vec<StoredRecord> {
    journal.read(first).collect::<Result<_, _>>().unwrap()
}

/// Segments of two records: 1, 3, 5, …
fn filled(folder: &Path, records: u64) -> mesh_store::FileJournal {
    let mut journal = open(folder);
    for number in 1..=records {
        append(&mut journal, &[record(number, 300)]);
    }
    journal
}

#[test]
fn the_chain_goes_on_where_it_was_cut_and_kept_records_stay() {
    let folder = tempfile::tempdir().unwrap();
    let mut journal = filled(folder.path(), 30);
    let all = read_from(&journal, 1);
    let reader = journal.reader();
    assert_eq!((reader.base(), reader.parts().len()), (Head::EMPTY, 15));

    let mut shown = Vec::new();
    // Record 20 ends a segment, so the cut is exact.
    let base = reader
        .cut(20, &mut |stored| {
            shown.push(stored.seq);
            keep(stored)
        })
        .unwrap();
    assert_eq!((base, shown), (all[19].head(), (1..=20).collect()));
    assert_eq!(segments(folder.path()).len(), 5);
    append(&mut journal, &[record(31, 300)]);
    for journal in [journal, open(folder.path())] {
        let reader = journal.reader();
        assert_eq!(reader.base(), base);
        assert_eq!(seqs(&read_from(&journal, 1)), (21..=31).collect::<Vec<_>>());
        assert_eq!(read_from(&journal, 25)[..6], all[24..]);
        assert_eq!(reader.kept().unwrap(), [all[6].clone(), all[13].clone()]);
        for (seq, expected) in [(7, Some(7)), (8, None), (20, None), (21, Some(21)), (32, None)] {
            assert_eq!(reader.record(seq).unwrap().map(|record| record.seq), expected, "{seq}");
        }
        for (seq, known) in [(0, true), (7, false), (19, false), (20, true), (21, true), (32, false)] {
            assert_eq!(reader.hash_at(seq).unwrap().is_some(), known, "{seq}");
        }
    }

    // The next cut asks again about what was kept.
    let journal = open(folder.path());
    let mut shown = Vec::new();
    journal
        .reader()
        .cut(25, &mut |stored| {
            shown.push(stored.seq);
            stored.seq == 14
        })
        .unwrap();
    assert_eq!(shown, [7, 14, 21, 22, 23, 24]);
    assert_eq!(seqs(&open(folder.path()).reader().kept().unwrap()), [14]);
}

#[test]
fn the_segment_that_is_written_is_never_cut() {
    let folder = tempfile::tempdir().unwrap();
    let journal = filled(folder.path(), 9);
    assert_eq!(journal.reader().cut(u64::MAX, &mut |_| false).unwrap().seq, 8);
    assert_eq!(journal.reader().cut(u64::MAX, &mut |_| panic!("nothing goes")).unwrap().seq, 8);
    drop(journal);
    assert_eq!(seqs(&read_from(&open(folder.path()), 1)), [9]);
}

#[test]
fn a_journal_that_is_held_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let journal = filled(folder.path(), 10);
    let before = files(folder.path());
    let (reader, other) = (journal.reader(), journal.reader());
    let (first, second) = (reader.hold(), other.hold());
    for held in [Some(first), Some(second), None] {
        let base = journal.reader().cut(6, &mut keep).unwrap();
        if held.is_some() {
            assert_eq!(base, Head::EMPTY);
            assert_eq!(files(folder.path()), before);
        } else {
            assert_eq!(base.seq, 6);
        }
        drop(held);
    }
}

#[test]
fn an_empty_journal_begins_where_another_was_cut() {
    let folder = tempfile::tempdir().unwrap();
    let (there, here) = (folder.path().join("there"), folder.path().join("here"));
    for folder in [&there, &here] {
        fs::create_dir(folder).unwrap();
    }
    let source = filled(&there, 30);
    let base = source.reader().cut(20, &mut keep).unwrap();
    let kept = source.reader().kept().unwrap();

    let mut journal = open(&here);
    let swapped: Vec<_> = kept.iter().rev().cloned().collect();
    let later = read_from(&source, 21)[..1].to_vec();
    for (what, bad, seq) in [
        ("order", swapped, 7),
        ("twice", vec![kept[0].clone(), kept[0].clone()], 7),
        ("past the base", later, 21),
    ] {
        let refused = journal.begin_after(&base, &bad).unwrap_err();
        assert!(matches!(refused, BeginError::Kept { seq: at } if at == seq), "{what}: {refused}");
        assert!(!here.join("base").exists());
    }
    journal.begin_after(&base, &kept).unwrap();
    assert_eq!(journal.head(), base);
    // Also one that is reopened before it has a record of its own.
    drop(journal);
    let mut journal = open(&here);
    assert_eq!((journal.head(), journal.reader().kept().unwrap()), (base, kept.clone()));
    assert!(matches!(journal.begin_after(&base, &kept), Err(BeginError::NotEmpty)));
    for stored in read_from(&source, 21) {
        append(&mut journal, &[encoded(&stored)]);
    }
    drop(journal);
    let journal = open(&here);
    assert_eq!(journal.head(), source.head());
    assert_eq!(journal.reader().kept().unwrap(), kept);
    assert_eq!(read_from(&journal, 1), read_from(&source, 1));
    // And is cut as any other.
    assert_eq!(
        journal.reader().cut(26, &mut |_| false).unwrap(),
        source.reader().cut(26, &mut keep).unwrap()
    );
    assert!(journal.reader().kept().unwrap().is_empty());
}

#[test]
fn a_crash_before_the_segments_went_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let journal = filled(folder.path(), 10);
    let names = segments(folder.path());
    let bytes: Vec<_> = names.iter().map(|name| fs::read(folder.path().join(name)).unwrap()).collect();
    journal.reader().cut(6, &mut keep).unwrap();
    drop(journal);
    let left = segments(folder.path());
    for (name, bytes) in names.iter().zip(bytes).filter(|(name, _)| !left.contains(name)) {
        fs::write(folder.path().join(name), bytes).unwrap();
    }
    let journal = open(folder.path());
    assert_eq!(segments(folder.path()), left);
    assert_eq!(seqs(&read_from(&journal, 1)), [7, 8, 9, 10]);
}

#[test]
fn a_base_that_is_damaged_or_lost_is_said() {
    let folder = tempfile::tempdir().unwrap();
    filled(folder.path(), 10).reader().cut(8, &mut keep).unwrap();
    let path = folder.path().join("base");
    let good = fs::read(&path).unwrap();
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 0x20;
        fs::write(&path, &bad).unwrap();
        let refused = mesh_store::FileJournal::open(folder.path(), crate::support::options()).unwrap_err();
        assert!(matches!(refused, JournalError::Base { .. }), "octet {at}: {refused}");
    }
    for length in 0..good.len() {
        fs::write(&path, &good[..length]).unwrap();
        assert!(mesh_store::FileJournal::open(folder.path(), crate::support::options()).is_err(), "{length}");
    }
    fs::remove_file(&path).unwrap();
    let refused = mesh_store::FileJournal::open(folder.path(), crate::support::options()).unwrap_err();
    assert!(matches!(refused, JournalError::Missing { seq: 1, found: 9 }), "{refused}");
    fs::write(&path, good).unwrap();
    assert_eq!(open(folder.path()).head().seq, 10);
}

#[test]
fn a_segment_ends_when_its_time_is_over() {
    let folder = tempfile::tempdir().unwrap();
    let mut journal = open(folder.path());
    journal.limit_segment_span(Duration::from_secs(3));
    // A record a second, small enough for one segment.
    for number in 1..=10 {
        append(&mut journal, &[record(number, 10)]);
    }
    assert_eq!(journal.reader().parts(), [1, 4, 7, 10]);
    drop(journal);
    let mut journal = open(folder.path());
    journal.limit_segment_span(Duration::from_secs(3));
    for number in 11..=13 {
        append(&mut journal, &[record(number, 10)]);
    }
    assert_eq!(journal.reader().parts(), [1, 4, 7, 10, 13]);
}

#[test]
fn a_lost_index_is_made_of_what_is_left_and_what_was_kept() {
    let folder = tempfile::tempdir().unwrap();
    let below = folder.path().join("journal");
    fs::create_dir(&below).unwrap();
    let journal = filled(&below, 20);
    journal.reader().cut(16, &mut keep).unwrap();
    let mut index = Index::open(folder.path().join("index"));
    let by_seq = |stored: &StoredRecord| {
        vec![IndexOp::insert(Table::CertificateByOwner, stored.seq.to_be_bytes(), stored.op_id)]
    };
    catch_up(&mut index, &*journal.reader(), by_seq).unwrap();
    assert_eq!(index.applied(), journal.head());
    let page = mesh_store::Page { limit: 100, ..Default::default() };
    let entries = index.page(Table::CertificateByOwner, &page).unwrap();
    let found: Vec<u64> =
        entries.iter().map(|(key, _)| u64::from_be_bytes(key.as_slice().try_into().unwrap())).collect();
    assert_eq!(found, [7, 14, 17, 18, 19, 20]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Whatever is appended, cut and reopened, the journal is a plain list that lost its beginning.
    #[test]
    fn cuts_agree_with_a_plain_list(
        steps in prop::collection::vec((1u64..5, 1usize..600, 0u64..60, any::<bool>()), 1..25),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let mut journal = open(folder.path());
        let (mut model, mut kept): (Vec<StoredRecord>, Vec<u64>) = (Vec::new(), Vec::new());
        for (count, length, through, reopen) in steps {
            let first = journal.head().seq + 1;
            let records: Vec<_> = (first..first + count).map(|number| record(number, length)).collect();
            append(&mut journal, &records);
            model.extend(read_from(&journal, first));
            let before = journal.reader().base();
            let base = journal.reader().cut(through, &mut keep).unwrap();
            prop_assert!(base.seq <= through.max(before.seq) && base.seq < journal.head().seq);
            kept.extend(model.iter().filter(|r| r.seq <= base.seq && keep(r)).map(|r| r.seq));
            model.retain(|record| record.seq > base.seq);
            if reopen {
                drop(journal);
                journal = open(folder.path());
            }
            prop_assert_eq!(journal.reader().base(), base);
            prop_assert_eq!(&read_from(&journal, 0), &model);
            prop_assert_eq!(&seqs(&journal.reader().kept().unwrap()), &kept);
        }
    }
}
