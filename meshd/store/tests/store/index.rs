use std::{fs, path::Path};

use mesh_store::{
    Head, Index, IndexError, IndexOp, Journal, OpenError, Order, Page, Store, StoreOptions, StoredRecord,
    Table, catch_up,
    index::{KEY_BYTES_MAX, VALUE_BYTES_MAX},
    journal::JournalError,
};
use proptest::{collection::vec, prelude::*};

use crate::support::{append, files, record, warnings};

fn small() -> StoreOptions {
    StoreOptions { segment_bytes: 4096 }
}

fn head(seq: u64) -> Head {
    Head { seq, hash: [seq as u8; 32] }
}

/// What a record means in the index of these tests.
fn changes(record: &StoredRecord) -> Vec<IndexOp> {
    vec![
        IndexOp::insert(Table::CertificateByOwner, record.seq.to_be_bytes(), record.op_id),
        IndexOp::insert(Table::CertificateBySerial, record.op_id, record.seq.to_be_bytes()),
    ]
}

fn filled(path: &Path, records: u64) -> Store {
    let mut store = Store::open(path, small()).unwrap();
    for number in store.journal.head().seq + 1..=records {
        append(&mut store.journal, &[record(number, 50)]);
    }
    catch_up(&mut store.index, &*store.journal.reader(), changes).unwrap();
    store
}

fn dump(index: &Index) -> Vec<(Vec<u8>, Vec<u8>)> {
    let page = |table| index.page(table, &Page { limit: 1000, ..Page::default() }).unwrap();
    [page(Table::CertificateByOwner), page(Table::CertificateBySerial)].concat()
}

#[test]
fn a_frame_is_applied_with_its_head_and_survives_a_restart() {
    let parent = tempfile::tempdir().unwrap();
    let path = parent.path().join("index");
    let mut index = Index::open(&path);
    assert_eq!(index.applied(), Head::EMPTY);
    let ops = [
        IndexOp::insert(Table::CertificateByOwner, *b"k", *b"audit"),
        IndexOp::insert(Table::CertificateByExpiry, *b"k", *b"time"),
        IndexOp::insert(Table::CertificateByExpiry, *b"gone", *b"x"),
    ];
    index.apply(&head(3), &ops).unwrap();
    index.apply(&head(4), &[IndexOp::remove(Table::CertificateByExpiry, *b"gone")]).unwrap();
    drop(index);
    let index = Index::open(&path);
    assert_eq!(index.applied(), head(4));
    assert_eq!(index.get(Table::CertificateByOwner, b"k").unwrap().as_deref(), Some(&b"audit"[..]));
    assert_eq!(index.get(Table::CertificateByExpiry, b"k").unwrap().as_deref(), Some(&b"time"[..]));
    assert_eq!(index.get(Table::CertificateByExpiry, b"gone").unwrap(), None);
    assert_eq!(index.get(Table::CertificateByName, b"k").unwrap(), None);
}

#[test]
fn what_is_too_large_leaves_the_frame_unapplied() {
    let parent = tempfile::tempdir().unwrap();
    let mut index = Index::open(parent.path().join("index"));
    let fine = IndexOp::insert(Table::CertificateByOwner, vec![1; KEY_BYTES_MAX], vec![1; VALUE_BYTES_MAX]);
    let key = IndexOp::insert(Table::CertificateByOwner, vec![1; KEY_BYTES_MAX + 1], *b"");
    let value = IndexOp::insert(Table::CertificateByOwner, *b"k", vec![1; VALUE_BYTES_MAX + 1]);
    assert!(matches!(index.apply(&head(1), &[fine.clone(), key]), Err(IndexError::KeyTooLarge { .. })));
    assert!(matches!(index.apply(&head(1), &[fine.clone(), value]), Err(IndexError::ValueTooLarge { .. })));
    assert_eq!(index.applied(), Head::EMPTY);
    assert!(index.page(Table::CertificateByOwner, &Page { limit: 9, ..Page::default() }).unwrap().is_empty());
    index.apply(&head(1), &[fine]).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(48) })]

    /// Turning pages gives each matching entry of a table once, in order.
    #[test]
    fn pages_cover_a_table_once(
        keys in vec(vec(0_u8..4, 0..4), 0..40), prefix in vec(0_u8..4, 0..2), limit in 1_usize..7,
        descending in any::<bool>(),
    ) {
        let parent = tempfile::tempdir().unwrap();
        let mut index = Index::open(parent.path().join("index"));
        let mut ops: Vec<_> = keys.iter().map(|key| IndexOp::insert(Table::CertificateByName, key.clone(), *b"v")).collect();
        // Neighbours that must not show.
        ops.push(IndexOp::insert(Table::CertificateBySerial, [0xff; 4], *b"n"));
        ops.push(IndexOp::insert(Table::CertificateByExpiry, *b"", *b"n"));
        index.apply(&head(1), &ops).unwrap();

        let mut expected: Vec<_> = keys.into_iter().filter(|key| key.starts_with(&prefix)).collect();
        expected.sort();
        expected.dedup();
        let order = if descending { Order::Descending } else { Order::Ascending };
        if descending {
            expected.reverse();
        }
        let (mut found, mut after): (Vec<Vec<u8>>, Option<Vec<u8>>) = (Vec::new(), None);
        loop {
            let page = Page { prefix: prefix.clone(), after: after.clone(), limit, order };
            let entries = index.page(Table::CertificateByName, &page).unwrap();
            prop_assert!(entries.len() <= limit);
            let Some((last, _)) = entries.last() else { break };
            after = Some(last.clone());
            found.extend(entries.into_iter().map(|(key, _)| key));
        }
        prop_assert_eq!(found, expected);
    }
}

#[test]
fn a_damaged_index_is_quarantined_and_rebuilt_to_the_same() {
    let parent = tempfile::tempdir().unwrap();
    let path = parent.path().join("state");
    let store = filled(&path, 300);
    let expected = dump(&store.index);
    assert_eq!(expected.len(), 600);
    drop(store);

    let intact = files(&path.join("index"));
    type Change = fn(&mut Vec<u8>);
    let table: [(&str, Change); 4] = [
        ("emptied", Vec::clear),
        ("cut", |bytes| bytes.truncate(bytes.len() / 3)),
        ("overwritten", |bytes| bytes.fill(0xa5)),
        ("sprinkled", |bytes| bytes.iter_mut().step_by(61).for_each(|byte| *byte ^= 0x55)),
    ];
    for (name, change) in table {
        for target in ["conf", "db"] {
            for (file, bytes) in &intact {
                let mut bytes = bytes.clone();
                if file == target {
                    change(&mut bytes);
                }
                fs::create_dir_all(path.join("index").join(file).parent().unwrap()).unwrap();
                fs::write(path.join("index").join(file), bytes).unwrap();
            }
            let mut store = Store::open(&path, small()).unwrap();
            assert_eq!(store.journal.head().seq, 300);
            catch_up(&mut store.index, &*store.journal.reader(), changes).unwrap();
            assert_eq!(dump(&store.index), expected, "{target} {name}");
        }
    }
    assert!(path.join("index.quarantined").exists());
}

#[test]
fn an_index_that_does_not_open_costs_one_warning() {
    let parent = tempfile::tempdir().unwrap();
    let path = parent.path().join("state");
    drop(filled(&path, 20));
    for name in files(&path.join("index")).keys() {
        fs::write(path.join("index").join(name), [0xa5; 999]).unwrap();
    }
    let (mut store, logged) = warnings(|| Store::open(&path, small()).unwrap());
    assert_eq!(logged.len(), 1, "{logged:?}");
    assert_eq!(store.index.applied(), Head::EMPTY);
    catch_up(&mut store.index, &*store.journal.reader(), changes).unwrap();
    assert_eq!(dump(&store.index).len(), 40);
}

#[test]
fn a_journal_shorter_than_the_index_is_refused() {
    let parent = tempfile::tempdir().unwrap();
    let path = parent.path().join("state");
    drop(filled(&path, 9));
    fs::remove_dir_all(path.join("journal")).unwrap();
    let error = Store::open(&path, small()).unwrap_err();
    let OpenError::Journal(JournalError::Ahead { acknowledged: 9, head: 0, .. }) = &error else {
        panic!("{error}")
    };
    assert!(error.to_string().starts_with("state ahead of journal"), "{error}");
    assert!(!path.join("index.quarantined").exists());
}

#[test]
fn an_index_of_another_journal_is_rebuilt() {
    let parent = tempfile::tempdir().unwrap();
    let (ours, other) = (parent.path().join("ours"), parent.path().join("other"));
    drop(filled(&ours, 9));
    let mut store = Store::open(&other, small()).unwrap();
    for number in 1..=20 {
        append(&mut store.journal, &[record(number + 500, 50)]);
    }
    drop(store);
    fs::remove_dir_all(other.join("index")).unwrap();
    fs::rename(ours.join("index"), other.join("index")).unwrap();
    let mut store = Store::open(&other, small()).unwrap();
    assert_eq!(store.index.applied(), Head::EMPTY);
    catch_up(&mut store.index, &*store.journal.reader(), changes).unwrap();
    assert_eq!(dump(&store.index).len(), 40);
    assert_eq!(store.index.applied(), store.journal.head());
}

/// Most entries go, as a fleet that shrinks leaves: what sled keeps of them goes with the files.
#[test]
fn an_outgrown_index_is_made_anew_with_the_same_entries() {
    const ENTRIES: u64 = 30_000;
    let parent = tempfile::tempdir().unwrap();
    let path = parent.path().join("index");
    let mut index = Index::open(&path);
    assert!(!index.compact().unwrap(), "there is nothing to gain");
    // Spread over the tree, as serials are.
    let key = |number: u64| number.wrapping_mul(0x9E37_79B9_7F4A_7C15).to_be_bytes();
    let all = |index: &mut Index, op: &dyn Fn(u64) -> Option<IndexOp>| {
        for first in (1..=ENTRIES).step_by(500) {
            let ops: Vec<_> = (first..first + 500).filter_map(op).collect();
            index.apply(&head(first), &ops).unwrap();
        }
    };
    let insert = |number| Some(IndexOp::insert(Table::CertificateBySerial, key(number), [number as u8; 900]));
    all(&mut index, &insert);
    all(&mut index, &|number| {
        let goes = number % 30 > 0;
        goes.then(|| IndexOp::remove(Table::CertificateBySerial, key(number)))
    });
    let before = index.bytes().unwrap();
    assert!(before > 16 << 20, "{before} bytes");
    let dump = |index: &Index| {
        let (mut all, mut after) = (Vec::new(), None);
        loop {
            let page = Page { limit: 1000, after, ..Page::default() };
            let entries = index.page(Table::CertificateBySerial, &page).unwrap();
            after = entries.last().map(|(key, _)| key.clone());
            if after.is_none() {
                return all;
            }
            all.extend(entries);
        }
    };
    let (entries, applied) = (dump(&index), index.applied());
    assert_eq!(entries.len() as u64, ENTRIES / 30);
    assert!(index.compact().unwrap());
    let after = index.bytes().unwrap();
    assert!(after * 4 < before, "{before} bytes before, {after} after");
    assert!(!index.compact().unwrap(), "it has just been made");
    assert_eq!((dump(&index), index.applied()), (entries, applied));
    assert!(!parent.path().join("index.outgrown").exists());

    index.apply(&head(ENTRIES), &[insert(ENTRIES + 1).unwrap()]).unwrap();
    let (entries, applied) = (dump(&index), index.applied());
    drop(index);
    // As a stop during a copy leaves it.
    fs::create_dir(parent.path().join("index.outgrown")).unwrap();
    let index = Index::open(&path);
    assert_eq!((dump(&index), index.applied()), (entries, applied));
    assert!(!parent.path().join("index.outgrown").exists());
}
