//! What every journal must do, whatever keeps it.

use std::path::PathBuf;

use mesh_store::{
    Append, AppendError, EncodedRecord, FileJournal, Head, Journal, MemoryJournal, find_operation,
    journal::{FRAME_BODY_BYTES_MAX, Fault, RECORD_BYTES_MAX, RECORDS_PER_FRAME_MAX, chain_hash},
};
use proptest::{collection::vec, prelude::*};

use crate::support::{append, contents, encoded, open, read_all, record};

/// Something that keeps a journal while nobody has it open.
trait Keeper {
    fn open(&mut self) -> Box<dyn Journal>;
}

struct Files(tempfile::TempDir);
struct Memory(MemoryJournal);

impl Keeper for Files {
    fn open(&mut self) -> Box<dyn Journal> {
        Box::new(open(self.0.path()))
    }
}

impl Keeper for Memory {
    fn open(&mut self) -> Box<dyn Journal> {
        Box::new(self.0.reopen())
    }
}

fn keepers() -> [Box<dyn Keeper>; 2] {
    [Box::new(Files(tempfile::tempdir().unwrap())), Box::new(Memory(MemoryJournal::new()))]
}

#[test]
fn an_empty_journal_has_the_empty_head_and_no_records() {
    for mut keeper in keepers() {
        let journal = keeper.open();
        assert_eq!(journal.head(), Head::EMPTY);
        assert_eq!(journal.read(0).count() + journal.read(1).count() + journal.read(9).count(), 0);
        assert_eq!(journal.reader().hash_at(0).unwrap(), Some(Head::EMPTY.hash));
        assert_eq!(journal.reader().hash_at(1).unwrap(), None);
    }
}

#[test]
fn records_come_back_chained_also_after_a_restart() {
    for mut keeper in keepers() {
        let mut journal = keeper.open();
        let given: Vec<_> = (1..=40).map(|number| record(number, number as usize * 5)).collect();
        for batch in given.chunks(3) {
            append(&mut *journal, batch);
        }
        let head = journal.head();
        drop(journal);
        let journal = keeper.open();
        assert_eq!(journal.head(), head);
        let mut previous = Head::EMPTY;
        for (stored, given) in read_all(&*journal).into_iter().zip(&given) {
            assert_eq!(encoded(&stored), *given);
            assert_eq!(stored.seq, previous.seq + 1);
            assert_eq!(stored.hash, chain_hash(&previous.hash, stored.seq, given));
            assert_eq!(journal.reader().hash_at(stored.seq).unwrap(), Some(stored.hash));
            previous = stored.head();
        }
        assert_eq!(previous, head);
        assert_eq!(head.seq, 40);
    }
}

#[test]
fn an_append_to_another_head_conflicts_and_changes_nothing() {
    for mut keeper in keepers() {
        let mut journal = keeper.open();
        let first = append(&mut *journal, &[record(1, 10)]);
        let wrong = [Head::EMPTY, Head { seq: 2, ..first }, Head { hash: [9; 32], ..first }];
        for expected in wrong {
            let answer = journal.append(&expected, &[record(2, 10)]).unwrap();
            assert!(matches!(answer, Append::Conflict { head } if head == first), "{expected:?}");
        }
        assert_eq!(contents(&*journal), [record(1, 10)]);
        append(&mut *journal, &[record(2, 10)]);
    }
}

#[test]
fn what_is_too_large_is_refused_and_changes_nothing() {
    for mut keeper in keepers() {
        let mut journal = keeper.open();
        let largest = record(1, RECORD_BYTES_MAX);
        let head = append(&mut *journal, std::slice::from_ref(&largest));
        let mut refuse = |records: &[EncodedRecord]| journal.append(&head, records).unwrap_err();
        assert!(matches!(refuse(&[]), AppendError::Empty));
        assert!(matches!(refuse(&[record(2, RECORD_BYTES_MAX + 1)]), AppendError::RecordTooLarge { .. }));
        let many = vec![record(2, 0); RECORDS_PER_FRAME_MAX + 1];
        assert!(matches!(refuse(&many), AppendError::TooManyRecords { .. }));
        let large = vec![largest.clone(); FRAME_BODY_BYTES_MAX / RECORD_BYTES_MAX];
        assert!(matches!(refuse(&large), AppendError::FrameTooLarge { .. }));
        assert_eq!(journal.head(), head);
        append(&mut *journal, &many[1..]);
        drop(journal);
        let journal = keeper.open();
        assert_eq!(journal.read(1).count(), 1 + RECORDS_PER_FRAME_MAX);
        assert_eq!(contents(&*journal)[0], largest);
    }
}

#[test]
fn a_reader_follows_a_writer_on_another_thread() {
    for mut keeper in keepers() {
        let mut journal = keeper.open();
        let reader = journal.reader();
        std::thread::scope(|scope| {
            let follower = scope.spawn(move || {
                let (mut next, mut seen) = (1, Vec::new());
                while seen.len() < 300 {
                    for record in reader.read(next) {
                        seen.push(encoded(&record.unwrap()));
                        next += 1;
                    }
                    std::thread::yield_now();
                }
                seen
            });
            for number in (1..=300).step_by(2) {
                append(&mut *journal, &[record(number, 50), record(number + 1, 3)]);
            }
            let seen = follower.join().unwrap();
            assert_eq!(seen, contents(&*journal));
        });
    }
}

#[test]
fn an_operation_is_found_by_its_id() {
    for mut keeper in keepers() {
        let mut journal = keeper.open();
        append(&mut *journal, &[record(1, 5), record(2, 5), record(3, 5)]);
        let reader = journal.reader();
        let found = |from, number| find_operation(&*reader, from, &record(number, 0).op_id).unwrap();
        assert_eq!(found(1, 2).map(|record| record.seq), Some(2));
        assert_eq!(found(3, 2), None);
        assert_eq!(found(1, 4), None);
    }
}

#[test]
fn a_memory_journal_fails_as_told() {
    let mut journal = MemoryJournal::new();
    let faults = journal.faults();
    let first = append(&mut journal, &[record(1, 5)]);

    faults.push(Fault::Full);
    assert!(matches!(journal.append(&first, &[record(2, 5)]), Err(AppendError::Full { .. })));
    append(&mut journal, &[record(2, 5)]);

    let table = [(Fault::UnknownBeforePersisting, 2), (Fault::UnknownAfterPersisting, 3)];
    for (fault, kept) in table {
        let mut journal = journal.reopen();
        faults.push(Fault::None);
        faults.push(fault);
        let head = append(&mut journal, &[record(3, 5)]);
        assert!(matches!(journal.append(&head, &[record(4, 5)]), Ok(Append::Unknown { .. })));
        assert!(matches!(journal.append(&head, &[record(4, 5)]), Err(AppendError::Broken)));
        let next = journal.reopen();
        let found = find_operation(&*next.reader(), head.seq + 1, &record(4, 5).op_id).unwrap();
        assert_eq!(found.is_some(), kept == 3, "{fault:?}");
    }
}

#[derive(Debug, Clone)]
enum Step {
    Append(Vec<usize>),
    Stale(Vec<usize>),
    Restart,
    ReadFrom(u64),
}

fn any_step() -> impl Strategy<Value = Step> {
    let lengths = || vec(0_usize..400, 1..6);
    prop_oneof![
        4 => lengths().prop_map(Step::Append),
        1 => lengths().prop_map(Step::Stale),
        1 => Just(Step::Restart),
        2 => (0_u64..60).prop_map(Step::ReadFrom),
    ]
}

fn batch(model: &[EncodedRecord], lengths: &[usize]) -> Vec<EncodedRecord> {
    lengths.iter().zip(model.len() as u64 + 1..).map(|(length, number)| record(number, *length)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) })]

    /// Whatever is done to it, a journal holds what a plain list would.
    #[test]
    fn a_journal_is_a_list(steps in vec(any_step(), 0..30)) {
        for mut keeper in keepers() {
            let (mut journal, mut model) = (keeper.open(), Vec::new());
            for step in &steps {
                match step {
                    Step::Append(lengths) => {
                        let records = batch(&model, lengths);
                        append(&mut *journal, &records);
                        model.extend(records);
                    }
                    Step::Stale(lengths) => {
                        let stale = Head { seq: journal.head().seq, hash: [1; 32] };
                        let answer = journal.append(&stale, &batch(&model, lengths)).unwrap();
                        let conflict = matches!(answer, Append::Conflict { .. });
                        prop_assert!(conflict);
                    }
                    Step::Restart => {
                        drop(journal);
                        journal = keeper.open();
                    }
                    Step::ReadFrom(from) => {
                        let skipped = (from.saturating_sub(1) as usize).min(model.len());
                        let read: Vec<_> = journal.read(*from).map(|record| encoded(&record.unwrap())).collect();
                        prop_assert_eq!(&read[..], &model[skipped..]);
                    }
                }
                prop_assert_eq!(journal.head().seq, model.len() as u64);
            }
            prop_assert_eq!(contents(&*journal), model);
        }
    }
}

#[test]
fn segments_are_named_by_their_first_record_and_private() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let mut journal = open(folder.path());
    for number in 1..=9 {
        append(&mut journal, &[record(number, 300)]);
    }
    let names = crate::support::segments(folder.path());
    assert_eq!(names, [1, 3, 5, 7, 9].map(|first| format!("segment-{first:020}")));
    for name in &names {
        let metadata = std::fs::metadata(folder.path().join(name)).unwrap();
        if Some(name) == names.last() {
            assert_eq!(metadata.len(), crate::support::SEGMENT_BYTES, "not preallocated");
        } else {
            assert!(metadata.len() < crate::support::SEGMENT_BYTES, "room that nobody takes is given back");
        }
        assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
    }
}

#[test]
fn a_frame_larger_than_a_segment_has_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let mut journal = open(folder.path());
    for number in 1..=4 {
        append(&mut journal, &[record(number, if number % 2 == 0 { 5000 } else { 10 })]);
    }
    drop(journal);
    let mut journal: FileJournal = open(folder.path());
    append(&mut journal, &[record(5, 10)]);
    assert_eq!(contents(&journal).len(), 5);
    let first: PathBuf = folder.path().join(format!("segment-{:020}", 2));
    assert!(first.exists(), "{:?}", crate::support::segments(folder.path()));
}
