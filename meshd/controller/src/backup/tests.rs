//! A controller whose journal lost its beginning, in a backup; and backups that were made to be trouble.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use mesh_core::{Serial, World};
use mesh_store::StoredRecord;
use proptest::prelude::*;

use super::*;
use crate::config::{RestoreConfig, RestoreSummary};
use crate::controller::load_world;
use crate::error::StartupError;
use crate::rig::{DAY, Rig, VirtualClock, init};
use crate::state::StateDir;

const SECRET: &str = "correct horse battery";
const NODES: u32 = 2;
const RETENTION: Duration = Duration::from_secs(4 * DAY);

fn passphrase() -> Passphrase {
    Passphrase::new(SECRET.into())
}

/// A controller whose journal has lost its beginning, with one certificate that outlived its record's segment and was
/// revoked before the cut.
struct Fleet {
    folder: tempfile::TempDir,
    clock: Arc<VirtualClock>,
    rig: Rig,
    long: Serial,
}

impl Fleet {
    async fn cut() -> Self {
        let (folder, clock) = (tempfile::tempdir().unwrap(), Arc::new(VirtualClock::default()));
        let root = init(folder.path(), &clock);
        let rig = Rig::open(&root, &clock, RETENTION).await;
        rig.enroll(NODES).await;
        let long = rig.issue_detached(Duration::from_secs(80 * DAY)).await.serial;
        rig.revoke(long).await;
        for _ in 0..12 {
            rig.day(NODES).await;
        }
        assert!(rig.keeper.archive.reader().base().seq > 0, "nothing was cut");
        Self { folder, clock, rig, long }
    }

    fn source(&self) -> Source<'_> {
        Source {
            root: self.rig.state.root(),
            journal: self.rig.keeper.archive.reader(),
            directory: &self.rig.directory,
        }
    }

    fn backup(&self) -> (Vec<u8>, Manifest) {
        let mut bytes = Vec::new();
        let manifest = write(&mut bytes, &passphrase(), &self.source(), 1).unwrap();
        (bytes, manifest)
    }

    fn restore(&self, backup: &[u8], name: &str) -> Result<RestoreSummary, StartupError> {
        let file = self.folder.path().join("backup");
        std::fs::write(&file, backup).unwrap();
        let config =
            RestoreConfig { state_dir: self.state_dir(name), backup: file, passphrase: passphrase() };
        let clock: mesh_runtime::SharedClock = self.clock.clone();
        crate::restore::restore(&config, &clock)
    }

    fn state_dir(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

fn records(journal: &dyn JournalReader) -> Vec<StoredRecord> {
    journal.read(1).collect::<Result<_, _>>().unwrap()
}

/// The published CRLs' numbers by issuer and shard.
fn numbers(rig: &Rig) -> BTreeMap<(mesh_core::KeyId, u16), u64> {
    rig.publisher.published().into_iter().map(|crl| ((crl.issuer, crl.shard), crl.number)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_journal_comes_back_with_its_base_and_what_was_kept() {
    let fleet = Fleet::cut().await;
    let (bytes, manifest) = fleet.backup();
    let reader = fleet.rig.keeper.archive.reader();
    let (base, kept, all) = (reader.base(), reader.kept().unwrap(), records(reader));
    assert_eq!(manifest.first_seq(), base.seq + 1);
    assert!(!kept.is_empty());
    let world = crate::codec::encode(&fleet.rig.directory.read(World::clone)).unwrap();
    // What the backup does not know.
    fleet.rig.day(NODES).await;
    let mut floor = numbers(&fleet.rig);
    let incarnation = fleet.rig.state.settings().unwrap().incarnation;

    // Twice from the same backup: CRLs of the first restore are about then.
    for name in ["once", "twice"] {
        fleet.clock.advance(1);
        let summary = fleet.restore(&bytes, name).unwrap();
        assert_eq!((summary.first_seq, summary.seq), (base.seq + 1, manifest.seq));
        {
            let (state, store) = StateDir::open(&fleet.state_dir(name)).unwrap();
            let (again, head) = load_world(&state, &store.journal, &store.snapshots).unwrap();
            assert_eq!(head, manifest.head());
            assert!(crate::codec::encode(&again).unwrap() == world, "another World");
        }
        let rig = Rig::open(&fleet.state_dir(name), &fleet.clock, RETENTION).await;
        assert_eq!(rig.state.settings().unwrap().incarnation, incarnation + 1);
        let reader = rig.keeper.archive.reader();
        assert_eq!((reader.base(), reader.kept().unwrap()), (base, kept.clone()));
        assert_eq!(records(reader)[..all.len()], all);
        let revoked = rig.directory.read(|world| world.certificate(&fleet.long).unwrap().revoked);
        assert!(revoked.is_some());
        // The index is made of what was kept and what is left.
        rig.keeper.history.catch_up();
        let seq = rig.keeper.history.issued_seq(&fleet.long).unwrap().unwrap();
        assert!(seq <= base.seq);
        assert_eq!(rig.keeper.archive.certificate(seq, &fleet.long).unwrap().unwrap().serial, fleet.long);
        for (place, number) in numbers(&rig) {
            assert!(number > floor[&place], "{name}, {place:?}: {number} after {}", floor[&place]);
        }
        // It goes on: renews, revokes, forgets.
        rig.renew(1).await;
        let lost = rig.issue_detached(Duration::from_secs(DAY)).await.serial;
        rig.revoke(lost).await;
        rig.publisher.refresh().await.unwrap();
        rig.keeper.sweep();
        floor = numbers(&rig);
        rig.close();
    }
    fleet.rig.close();
}

/// What the sweep would remove stays as long as a backup is being read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_cut_while_a_backup_is_written() {
    struct Sweeping<'a>(&'a Rig, Vec<u8>);
    impl Write for Sweeping<'_> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.keeper.sweep();
            self.0.keeper.sweep();
            self.1.extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let fleet = Fleet::cut().await;
    let base = fleet.rig.keeper.archive.reader().base();
    // Snapshots past what could go, and time for it to go.
    for _ in 0..3 {
        fleet.clock.advance(2 * DAY);
        fleet.rig.renew(1).await;
        crate::snapshots::take(&fleet.rig.directory, &fleet.rig.keeper.snapshots).unwrap();
    }
    let mut out = Sweeping(&fleet.rig, Vec::new());
    let manifest = write(&mut out, &passphrase(), &fleet.source(), 1).unwrap();
    let bytes = out.1;
    assert_eq!((fleet.rig.keeper.archive.reader().base(), manifest.first_seq()), (base, base.seq + 1));
    fleet.restore(&bytes, "restored").unwrap();
    fleet.rig.keeper.sweep();
    assert!(fleet.rig.keeper.archive.reader().base().seq > base.seq, "the sweep had nothing to do");
    fleet.rig.close();
}

/// What is inside a backup, to be changed and sealed again by one who knows the passphrase.
#[derive(Clone)]
struct Content {
    manifest: Manifest,
    files: Vec<u8>,
    world: Vec<u8>,
    kept: Vec<StoredRecord>,
    records: Vec<StoredRecord>,
}

impl Content {
    fn of(fleet: &Fleet) -> Self {
        let (bytes, manifest) = fleet.backup();
        let opened = open(&bytes[..], &passphrase()).unwrap();
        let beginning = opened.beginning.unwrap();
        Self {
            files: opened.files.iter().flat_map(|(_, bytes)| bytes.to_vec()).collect(),
            world: beginning.world.bytes,
            kept: beginning.kept,
            records: records(fleet.rig.keeper.archive.reader()),
            manifest,
        }
    }

    fn base(&mut self) -> &mut BaseEntry {
        self.manifest.base.as_mut().unwrap()
    }

    fn seal(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let sealer = ArchiveSealer::new(SECRET.as_bytes(), KdfParams::default(), &mut random_fill).unwrap();
        out.extend_from_slice(sealer.header());
        let mut writer =
            SealedWriter { out: &mut out, sealer: Some(sealer), chunk: Zeroizing::new(Vec::new()) };
        let text = serde_json::to_vec(&self.manifest).unwrap();
        let before = [MAGIC, &length(text.len()).unwrap(), &text, &self.files, &self.world].concat();
        writer.write_all(&before).unwrap();
        for record in &self.kept {
            writer.write_all(&record.seq.to_be_bytes()).unwrap();
            writer.write_all(&record.hash).unwrap();
            write_record(&mut writer, record).unwrap();
        }
        self.records.iter().for_each(|record| write_record(&mut writer, record).unwrap());
        writer.finish().unwrap();
        out
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_that_contradicts_itself_makes_nothing() {
    type Spoil = fn(&mut Content);
    let fleet = Fleet::cut().await;
    let good = Content::of(&fleet);
    let table: [(&str, Spoil); 15] = [
        ("it begins before the first record", |c| c.base().seq = 0),
        ("it begins after its end", |c| c.base().seq = c.manifest.seq + 1),
        ("it begins elsewhere", |c| c.base().seq -= 1),
        ("it continues another chain", |c| c.base().hash[0] ^= 1),
        ("it ends elsewhere", |c| c.manifest.hash[0] ^= 1),
        ("its first record is missing", |c| drop(c.records.remove(0))),
        ("its last record is missing", |c| drop(c.records.pop())),
        ("a record was changed", |c| c.records[3].time_secs += 1),
        ("it says nothing of a base", |c| (c.manifest.base, c.world, c.kept) = Default::default()),
        ("a kept record comes twice", |c| {
            c.kept.insert(0, c.kept[0].clone());
            c.base().kept += 1;
        }),
        ("a kept record is not before the base", |c| {
            let seq = c.base().seq + 1;
            c.kept.last_mut().unwrap().seq = seq;
        }),
        ("it says more kept records than there are", |c| c.base().kept = u64::MAX),
        ("World is longer than any", |c| c.base().world_bytes = u64::MAX),
        ("World is of another layout", |c| c.base().world_version += 1),
        ("World is cut off", |c| {
            c.world.truncate(c.world.len() / 2);
            c.base().world_bytes = c.world.len() as u64;
        }),
    ];
    for (what, spoil) in table {
        let mut content = good.clone();
        spoil(&mut content);
        let refused = fleet.restore(&content.seal(), "restored").expect_err(what);
        assert_eq!(refused.code(), mesh_proto::v1::ErrorCode::BackupRefused, "{what}: {refused}");
        assert!(!fleet.state_dir("restored").exists(), "{what}: something is half made");
    }
    fleet.restore(&good.seal(), "restored").unwrap();
    fleet.rig.close();
}

fn any_base() -> impl Strategy<Value = Option<BaseEntry>> {
    let numbers =
        (0u64..9, any::<u32>(), prop_oneof![0u64..40, any::<u64>()], prop_oneof![0u64..4, any::<u64>()]);
    prop::option::of(numbers.prop_map(|(seq, world_version, world_bytes, kept)| BaseEntry {
        seq,
        hash: [3; 32],
        world_version,
        world_bytes,
        kept,
    }))
}

proptest! {
    /// Whatever was sealed, reading it ends, holds no more than was there, and what is taken is what was written.
    #[test]
    fn content_of_any_kind_is_read_or_refused(
        base in any_base(),
        names in prop::collection::vec("(keys/|crl/|)[a-z.]{0,12}", 0..4),
        lengths in prop::collection::vec(prop_oneof![0u64..64, any::<u64>()], 4),
        rest in prop::collection::vec(any::<u8>(), 0..400),
    ) {
        let files: Vec<FileEntry> =
            names.iter().zip(lengths).map(|(name, bytes)| FileEntry { name: name.clone(), bytes }).collect();
        let manifest = Manifest {
            domain: String::new(),
            fleet: String::new(),
            taken_at: 0,
            seq: 5,
            hash: [7; 32],
            files,
            base,
        };
        let text = serde_json::to_vec(&manifest).unwrap();
        let content = [MAGIC, &length(text.len()).unwrap(), &text, &rest].concat();
        let Ok(mut opened) = read_content(&content[..]) else { return Ok(()) };
        prop_assert_eq!(&opened.manifest, &manifest);
        let mut taken: usize = opened.files.iter().map(|(_, bytes)| bytes.len()).sum();
        for (name, _) in &opened.files {
            prop_assert!(limit_of(name).is_some(), "{} has no place", name);
        }
        if let Some(beginning) = &opened.beginning {
            prop_assert!((1..=5).contains(&beginning.base.seq));
            let kept: usize = beginning.kept.iter().map(|record| record.bytes.len()).sum();
            taken += beginning.world.bytes.len() + kept;
        }
        while let Ok(Some(record)) = opened.next_record() {
            taken += record.bytes.len();
        }
        prop_assert!(taken <= rest.len());
    }
}
