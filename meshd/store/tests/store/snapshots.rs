use std::fs;

use mesh_store::{Head, Journal, MemoryJournal, Snapshot, Snapshots};

use crate::support::{append, record, warnings};

fn journal_of(records: u64) -> MemoryJournal {
    let mut journal = MemoryJournal::new();
    for number in 1..=records {
        append(&mut journal, &[record(number, 10)]);
    }
    journal
}

fn snapshot(journal: &MemoryJournal, seq: u64) -> Snapshot {
    let hash = journal.reader().hash_at(seq).unwrap().unwrap();
    Snapshot { head: Head { seq, hash }, version: 1, bytes: format!("state after {seq}").into_bytes() }
}

#[test]
fn the_newest_snapshot_of_the_journal_comes_back() {
    let (folder, journal) = (tempfile::tempdir().unwrap(), journal_of(9));
    let snapshots = Snapshots::new(folder.path());
    assert_eq!(snapshots.newest(&*journal.reader(), 1).unwrap(), None);
    for seq in [3, 5, 8] {
        snapshots.write(&snapshot(&journal, seq)).unwrap();
        assert_eq!(snapshots.newest(&*journal.reader(), 1).unwrap(), Some(snapshot(&journal, seq)));
    }
    let names: Vec<_> = crate::support::files(folder.path()).into_keys().collect();
    assert_eq!(names, [5, 8].map(|seq| format!("snapshot-{seq:020}")), "old ones pile up");
}

#[test]
fn a_broken_foreign_or_other_snapshot_costs_one_warning() {
    let journal = journal_of(9);
    type Change = fn(Vec<u8>) -> Vec<u8>;
    let broken: [(&str, Change); 4] = [
        ("empty", |_| Vec::new()),
        ("cut", |bytes| bytes[..bytes.len() - 1].to_vec()),
        ("longer", |mut bytes| {
            bytes.push(0);
            bytes
        }),
        ("flipped", |mut bytes| {
            *bytes.last_mut().unwrap() ^= 1;
            bytes
        }),
    ];
    for (name, change) in broken {
        let folder = tempfile::tempdir().unwrap();
        let snapshots = Snapshots::new(folder.path());
        snapshots.write(&snapshot(&journal, 4)).unwrap();
        snapshots.write(&snapshot(&journal, 8)).unwrap();
        let path = folder.path().join(format!("snapshot-{:020}", 8));
        fs::write(&path, change(fs::read(&path).unwrap())).unwrap();
        let (newest, logged) = warnings(|| snapshots.newest(&*journal.reader(), 1).unwrap());
        assert_eq!(newest, Some(snapshot(&journal, 4)), "{name}");
        assert_eq!(logged.len(), 1, "{name}: {logged:?}");
    }
    let strangers = [
        ("foreign", Snapshot { head: Head { seq: 8, hash: [7; 32] }, ..snapshot(&journal, 8) }),
        ("other version", Snapshot { version: 2, ..snapshot(&journal, 8) }),
        ("future", Snapshot { head: Head { seq: 99, hash: [7; 32] }, ..snapshot(&journal, 8) }),
    ];
    for (name, stranger) in strangers {
        let folder = tempfile::tempdir().unwrap();
        let snapshots = Snapshots::new(folder.path());
        snapshots.write(&snapshot(&journal, 4)).unwrap();
        snapshots.write(&stranger).unwrap();
        let (newest, logged) = warnings(|| snapshots.newest(&*journal.reader(), 1).unwrap());
        assert_eq!(newest, Some(snapshot(&journal, 4)), "{name}");
        assert_eq!(logged.len(), 1, "{name}: {logged:?}");
    }
}

/// Every byte counts: whichever is changed, the snapshot is not used.
#[test]
fn every_byte_of_a_snapshot_is_guarded() {
    let (folder, journal) = (tempfile::tempdir().unwrap(), journal_of(3));
    let snapshots = Snapshots::new(folder.path());
    snapshots.write(&snapshot(&journal, 2)).unwrap();
    let path = folder.path().join(format!("snapshot-{:020}", 2));
    let bytes = fs::read(&path).unwrap();
    for at in 0..bytes.len() {
        let mut changed = bytes.clone();
        changed[at] ^= 0x40;
        fs::write(&path, changed).unwrap();
        assert_eq!(snapshots.newest(&*journal.reader(), 1).unwrap(), None, "byte {at}");
    }
}
