//! A fleet renews for months in seconds.

use mesh_runtime::Clock as _;

use super::*;
use crate::rig::{DAY, Rig, VirtualClock, init};
use crate::snapshots::SNAPSHOT_VERSION;
use crate::state::{StateDir, room_taken};

fn mib(bytes: u64) -> f64 {
    bytes as f64 / (1 << 20) as f64
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn history_leaves_after_the_retention_and_what_is_needed_stays() {
    const NODES: u32 = 3;
    let retention = Duration::from_secs(8 * DAY);
    let (folder, clock) = (tempfile::tempdir().unwrap(), Arc::new(VirtualClock::default()));
    let root = init(folder.path(), &clock);
    let rig = Rig::open(&root, &clock, retention).await;
    rig.enroll(NODES).await;
    let long = rig.issue_detached(Duration::from_secs(80 * DAY)).await.serial;
    let revoked = rig.issue_detached(Duration::from_secs(80 * DAY)).await.serial;
    rig.revoke(revoked).await;
    let first = rig.renew(1).await;
    let mut records = Vec::new();
    for _ in 0..40 {
        rig.day(NODES).await;
        records.push(rig.directory.head().seq - rig.keeper.archive.reader().base().seq);
    }
    let base = rig.keeper.archive.reader().base();
    assert!(base.seq > 0, "nothing left");
    let (early, late) = (records[15..27].iter().max().unwrap(), records[28..].iter().max().unwrap());
    assert!(*late <= early + 20, "no plateau: {records:?}");

    // What lives is still there as a whole, and what was revoked still says so, from the journal alone.
    let listed = |rig: &Rig, serial: &Serial| {
        rig.keeper.history.catch_up();
        let seq = rig.keeper.history.issued_seq(serial).unwrap();
        seq.and_then(|seq| rig.keeper.archive.certificate(seq, serial).unwrap())
    };
    assert_eq!(listed(&rig, &long).unwrap().serial, long);
    assert!(listed(&rig, &first).is_none(), "an identity of the first day is remembered");
    let chain: Result<Vec<_>, _> = rig.keeper.archive.reader().read(1).collect();
    let chain = chain.unwrap();
    assert_eq!((chain[0].seq, chain.last().unwrap().head()), (base.seq + 1, rig.directory.head()));
    let world = rig.directory.read(mesh_core::World::clone);
    rig.close();

    // A start reads what is left, and an index that was lost is made of it.
    std::fs::remove_dir_all(root.join("index")).unwrap();
    let rig = Rig::open(&root, &clock, retention).await;
    rig.directory.read(|again| {
        assert_eq!(again.certificates().collect::<Vec<_>>(), world.certificates().collect::<Vec<_>>());
    });
    assert_eq!(rig.keeper.archive.reader().base(), base);
    assert_eq!(listed(&rig, &long).unwrap().serial, long);
    assert_eq!(listed(&rig, &revoked).unwrap().serial, revoked);
    let query = crate::history::Query {
        scope: crate::history::Scope::All,
        states: vec![crate::history::State::Revoked],
        issuer: String::new(),
        until: None,
        now: clock.utc_now().into(),
        after: None,
        limit: 10,
    };
    let found = rig.keeper.history.certificates(&query).unwrap().certificates;
    assert_eq!(found.iter().map(|c| &c.serial[..]).collect::<Vec<_>>(), [&revoked.0[..]]);
    rig.renew(2).await;
    rig.close();

    // Without a snapshot there is nothing to start from, and that is said.
    let (state, store) = StateDir::open(&root).unwrap();
    assert!(crate::controller::load_world(&state, &store.journal, &store.snapshots).is_ok());
    for seq in store.snapshots.seqs().unwrap() {
        std::fs::remove_file(root.join(format!("journal/snapshot-{seq:020}"))).unwrap();
    }
    let newest = store.snapshots.newest(&*mesh_store::Journal::reader(&store.journal), SNAPSHOT_VERSION);
    assert!(newest.unwrap().is_none());
    let refused = crate::controller::load_world(&state, &store.journal, &store.snapshots).unwrap_err();
    assert!(refused.to_string().contains("snapshots"), "{refused}");
}

/// 1,000 nodes that renew every 24 h, retention 30 days: at most 200 MiB, and no more after 90 days than after 60.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "ninety thousand certificates, a minute or two: make bench-retention"]
async fn ninety_days_of_a_thousand_nodes_reach_a_plateau() {
    const NODES: u32 = 1_000;
    let retention = Duration::from_secs(30 * DAY);
    let (folder, clock) = (tempfile::tempdir().unwrap(), Arc::new(VirtualClock::default()));
    let root = init(folder.path(), &clock);
    let rig = Rig::open(&root, &clock, retention).await;
    rig.enroll(NODES).await;
    let mut sizes = Vec::new();
    for day in 1..=90 {
        rig.day(NODES).await;
        sizes.push(rig.size());
        if day % 10 == 0 {
            let of = |name: &str| mib(room_taken(&rig.state.root().join(name), 0));
            println!(
                "day {day}: store {:.1} MiB (journal and snapshots {:.1}, index {:.1}, CRLs {:.1}), records from {}",
                mib(rig.size()),
                of("journal"),
                of("index"),
                of("crl"),
                rig.keeper.archive.reader().base().seq + 1
            );
        }
    }
    let (second, third) = (sizes[45..65].iter().max().unwrap(), sizes[65..].iter().max().unwrap());
    println!("largest in days 46-65: {:.1} MiB, in days 66-90: {:.1} MiB", mib(*second), mib(*third));
    rig.close();
    assert!(*third <= 200 << 20, "{:.1} MiB", mib(*third));
    assert!(*third as f64 <= *second as f64 * 1.1, "no plateau");
}
