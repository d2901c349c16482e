//! The time of one revocation, from the command to the recorded CRL, through the real writer, journal and publisher.

use std::time::{Duration, Instant};

use mesh_core::world::ShardGroup;
use mesh_core::{
    Actor, CertificateRecord, DnsName, KeyHash, OperationId, Owner, Reason, Record, Request, Serial, Which,
    World,
};
use mesh_runtime::SystemClock;

use super::*;
use crate::authority::{Authority, WorldKeys};
use crate::config::{InitConfig, Unlock};
use crate::controller::load_world;
use crate::state::StateDir;
use crate::writer::WriterParts;

/// Revocations that are timed.
const TIMED: usize = 300;

fn certificate(world: &World, issuer: &KeyId, number: u64, now: UtcTime) -> CertificateRecord {
    let mut serial = [0x41; 16];
    // The tail of a real serial is random.
    serial[8..].copy_from_slice(&number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes());
    serial[4..8].copy_from_slice(&(number as u32).to_be_bytes());
    let (serial, name) = (Serial(serial), format!("s{number}.mesh.internal"));
    let mut key_hash = [0; 32];
    key_hash[..8].copy_from_slice(&number.to_be_bytes());
    CertificateRecord {
        serial,
        key_hash: KeyHash(key_hash),
        owner: Owner::Detached { operator: None },
        profile: "server".into(),
        names: vec![DnsName::try_from(name.as_str()).unwrap()],
        ips: Vec::new(),
        pair_name: name,
        shard: world.place_for(issuer, &serial).shard,
        not_before: now,
        not_after: now + Duration::from_secs(80 * 86_400),
        issuer_key_id: issuer.clone(),
        der: vec![1],
    }
}

/// Adds `revoked` revoked certificates and [`TIMED`] live ones among them, as their records would have: a live one's shard
/// is as full of revocations as any.
fn fill(world: &mut World, issuer: &KeyId, revoked: u64, now: UtcTime) -> Vec<Serial> {
    let seq = world.head_seq();
    let apply = |world: &mut World, changes: Vec<Change>| {
        let record = Record {
            operation: OperationId(mesh_runtime::random_bytes()),
            at: now,
            actor: Actor::Controller,
            who: "controller".into(),
            action: "cert.issue".into(),
            changes,
        };
        world.apply(seq, &record);
    };
    let (mut live, total) = (Vec::new(), revoked + TIMED as u64);
    for number in 0..total {
        if number == 0 || world.shards_are_full(issuer) {
            let first = world.shard_groups(issuer).last().map_or(1, |group| group.first + group.count);
            let group = ShardGroup { first, count: 16, base_url: "http://pki.mesh.internal".into() };
            apply(world, vec![Change::CrlShardsOpened { issuer_key_id: issuer.clone(), group }]);
        }
        let certificate = certificate(world, issuer, number, now);
        let serial = certificate.serial;
        let mut changes = vec![Change::CertificateIssued { certificate }];
        // Every so many-th one stays.
        if (number + 1) * TIMED as u64 / total > number * TIMED as u64 / total {
            live.push(serial);
        } else {
            changes.push(Change::CertificateRevoked { serial, reason: Reason::Superseded });
        }
        apply(world, changes);
    }
    assert_eq!(live.len(), TIMED);
    live
}

/// Median and 99th percentile.
async fn measure(revoked: u64) -> (Duration, Duration) {
    let folder = tempfile::tempdir().unwrap();
    let clock: SharedClock = Arc::new(SystemClock);
    let init = InitConfig::unsealed(folder.path().join("state"), "mesh.internal");
    crate::init::init(init.clone(), Arc::clone(&clock)).unwrap();
    let (state, store) = StateDir::open(&init.state_dir).unwrap();
    let journal: Box<dyn mesh_store::Journal> = Box::new(store.journal);
    let (mut world, head) = load_world(&state, &*journal, &store.snapshots).unwrap();
    let domain = mesh_ca::TrustDomain::parse("mesh.internal").unwrap();
    let authority =
        Authority::open(&state.keys(), &domain, &WorldKeys::of(&world), Unlock::None, None, None).unwrap();
    let authority = Arc::new(authority);
    let issuer = authority.issuer_key_id(CaRole::Issuing);
    let live = fill(&mut world, &issuer, revoked, clock.utc_now().into());
    let directory = Arc::new(Directory::new(world, head));
    let (writer, thread) = Writer::start(WriterParts {
        journal,
        directory: Arc::clone(&directory),
        clock: Arc::clone(&clock),
        fatal: ShutdownToken::new(),
    })
    .unwrap();
    let issuing = Issuing::new(authority, Arc::clone(&directory), Arc::clone(&clock)).unwrap();
    let parts = (clock, state.crls(), Publishing { url: None, shards: 16 });
    let publisher = Publisher::new(directory, writer.clone(), issuing, parts);
    publisher.start().await.unwrap();
    let mut times = Vec::with_capacity(TIMED);
    for serial in live {
        let command =
            Command::RevokeCertificates { which: Which::Serial(serial), reason: Reason::Superseded };
        let operation = OperationId(mesh_runtime::random_bytes());
        let began = Instant::now();
        let committed = writer.submit(Request { actor: Actor::LocalRoot, operation, command }).await.unwrap();
        let covering = publisher.cover(committed.changes()).await.unwrap();
        times.push(began.elapsed());
        assert_eq!(covering.len(), 1, "one shard");
    }
    writer.stop();
    thread.join().unwrap();
    times.sort();
    (times[TIMED / 2], times[TIMED * 99 / 100])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement of a minute or two: make bench-revocation"]
async fn revocation_is_flat_from_a_hundred_to_a_million() {
    let mut figures = Vec::new();
    for revoked in [100, 10_000, 1_000_000] {
        let (median, p99) = measure(revoked).await;
        println!("revocation: {revoked} revoked, median {median:?}, p99 {p99:?}");
        figures.push((median, p99));
    }
    let p99s = figures.iter().map(|(_, p99)| p99.as_secs_f64());
    let (least, most) = (p99s.clone().fold(f64::MAX, f64::min), p99s.fold(0.0, f64::max));
    assert!(most <= 0.02, "{figures:?}");
    assert!(most <= 1.5 * least, "{figures:?}");
}
