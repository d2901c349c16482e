use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use mesh_core::{
    Actor, Change, DnsName, KeyHash, KeyId, NodeName, OperationId, Reason, Record, TokenId, WgKey,
};
use mesh_runtime::SystemClock;
use mesh_store::Head;

use super::*;
use crate::config::InitConfig;
use crate::controller::load_world;
use crate::state::StateDir;

const NOW: UtcTime = UtcTime(1_795_363_200);
const DAY: i64 = 86_400;

/// Certificate `number` of a fleet in which node n has a service `s<n>.mesh.internal`; it ends at `end`.
fn record(number: u32, node: u32, end: i64) -> CertificateRecord {
    let mut serial = [0x41; 16];
    serial[..4].copy_from_slice(&number.wrapping_mul(0x9E37_79B9).to_be_bytes());
    serial[4..8].copy_from_slice(&number.to_be_bytes());
    let name = format!("s{node}.mesh.internal");
    CertificateRecord {
        serial: Serial(serial),
        key_hash: KeyHash([1; 32]),
        owner: Owner::Service { node: NodeId(node), name: name.clone() },
        profile: "server".into(),
        names: vec![DnsName::try_from(name.as_str()).unwrap()],
        ips: vec![],
        pair_name: name,
        shard: 0,
        not_before: UtcTime(end - 3 * DAY),
        not_after: UtcTime(end),
        issuer_key_id: KeyId(vec![if number.is_multiple_of(2) { 0xaa } else { 0xbb }; 20]),
        der: vec![],
    }
}

fn query() -> Query {
    Query {
        scope: Scope::All,
        states: vec![State::Ok],
        issuer: String::new(),
        until: None,
        now: NOW,
        after: None,
        limit: 7,
    }
}

/// An index of 100 certificates of ten nodes, one of which ends each hour around `NOW`; every tenth is revoked.
fn filled(folder: &std::path::Path) -> (Index, Vec<CertificateRecord>) {
    let mut index = Index::open(folder);
    let records: Vec<_> = (0..100).map(|n| record(n, n % 10, NOW.0 + (i64::from(n) - 50) * 3600)).collect();
    let mut ops: Vec<IndexOp> = records.iter().flat_map(|r| issued_ops("mesh.internal", 1, r)).collect();
    for revoked in records.iter().step_by(10) {
        let revocation =
            pb::Certificate { revoked_at: NOW.0 - 1, reason: "superseded".into(), ..Default::default() };
        let key = [&revoked.serial.0[..], &[REVOKED_SUFFIX]].concat();
        ops.push(IndexOp::insert(Table::CertificateBySerial, key, revocation.encode_to_vec()));
    }
    index.apply(&Head { seq: 1, hash: [1; 32] }, &ops).unwrap();
    (index, records)
}

/// Every page, one after the other.
fn all(index: &Index, query: Query) -> Vec<Serial> {
    pages(query, |query| find(index, query).unwrap())
}

fn pages(mut query: Query, find: impl Fn(&Query) -> CertificatePage) -> Vec<Serial> {
    let mut found = Vec::new();
    loop {
        let page = find(&query);
        assert!(page.certificates.len() <= query.limit);
        found.extend(page.certificates.iter().map(|c| Serial::try_from(&*c.serial).unwrap()));
        let Some(next) = page.next else { return found };
        assert!(is_cursor(&next) && position(&next).is_some());
        assert_ne!(query.after.as_ref(), Some(&next), "a cursor goes on");
        query.after = Some(next);
    }
}

/// World of a new mesh, with `nodes` nodes called `s<n>`.
fn world(folder: &std::path::Path, nodes: u32) -> World {
    let init = InitConfig::unsealed(folder.join("state"), "mesh.internal");
    crate::init::init(init.clone(), std::sync::Arc::new(SystemClock)).unwrap();
    let (state, store) = StateDir::open(&init.state_dir).unwrap();
    let (mut world, _) = load_world(&state, &store.journal, &store.snapshots).unwrap();
    let enrolled = |n: u32| Change::NodeEnrolled {
        id: NodeId(n),
        name: NodeName::try_from(format!("s{n}").as_str()).unwrap(),
        tags: BTreeSet::new(),
        token: TokenId([7; 8]),
        ipv4: std::net::Ipv4Addr::from(0x6440_0001 + n),
        wireguard: WgKey([7; 32]),
        // Ended long ago: only services are counted.
        certificate: CertificateRecord {
            owner: Owner::Node(NodeId(n)),
            profile: "node".into(),
            pair_name: String::new(),
            ..record(u32::MAX - n, n, NOW.0 - 100 * DAY)
        },
    };
    apply(&mut world, (0..nodes).map(enrolled).collect());
    world
}

fn apply(world: &mut World, changes: Vec<Change>) {
    let record = Record {
        operation: OperationId([0; 16]),
        at: UtcTime(NOW.0 - 100 * DAY),
        actor: Actor::Controller,
        who: "controller".into(),
        action: "cert.issue".into(),
        changes,
    };
    world.apply(world.head_seq() + 1, &record);
}

#[test]
fn what_lives_is_listed_from_world_as_the_index_has_it() {
    let folder = tempfile::tempdir().unwrap();
    let (index, records) = filled(&folder.path().join("index"));
    let mut world = world(folder.path(), 10);
    let revoked = records.iter().step_by(10).map(|r| r.serial);
    let revoked = revoked.map(|serial| Change::CertificateRevoked { serial, reason: Reason::Superseded });
    let issued = records.iter().map(|r| Change::CertificateIssued { certificate: r.clone() });
    apply(&mut world, issued.chain(revoked).collect());
    let soon = Some(UtcTime(NOW.0 + 24 * 3600));
    for (until, issuer) in [(None, ""), (soon, ""), (None, "aa"), (soon, "bbbb"), (None, "cc")] {
        for limit in [1, 7, PAGE_SIZE_MAX] {
            let query = Query { until, issuer: issuer.into(), limit, ..query() };
            assert!(query.is_of_all_live());
            let from_world = pages(query.clone(), |query| find_live(&world, query));
            assert_eq!(from_world, all(&index, query.clone()), "{query:?}");
        }
    }
    let first = &find_live(&world, &query()).certificates[0];
    assert!(first.owner.starts_with('s') && first.not_after > NOW.0, "{first:?}");
    assert!(!Query { scope: Scope::Node(NodeId(3)), ..query() }.is_of_all_live());
    assert!(!Query { states: vec![State::Ok, State::Ended], ..query() }.is_of_all_live());
}

#[test]
fn pages_are_what_a_plain_scan_finds() {
    let folder = tempfile::tempdir().unwrap();
    let (index, records) = filled(folder.path());
    let revoked: BTreeSet<Serial> = records.iter().step_by(10).map(|r| r.serial).collect();
    let state_of = |r: &CertificateRecord| match revoked.contains(&r.serial) {
        true => State::Revoked,
        false if r.not_after > NOW => State::Ok,
        false => State::Ended,
    };
    let everything = vec![State::Ok, State::Revoked, State::Ended];
    let soon = Some(UtcTime(NOW.0 + 24 * 3600));
    let scopes =
        [Scope::All, Scope::Node(NodeId(3)), Scope::Name("S4.mesh.internal".into()), Scope::Node(NodeId(77))];
    for scope in scopes {
        for states in
            [vec![State::Ok], vec![State::Revoked, State::Ended], vec![State::Ended], everything.clone()]
        {
            for (until, issuer) in [(None, ""), (soon, ""), (None, "aa"), (soon, "bbbb"), (None, "cc")] {
                let query = Query {
                    scope: scope.clone(),
                    states: states.clone(),
                    until,
                    issuer: issuer.into(),
                    ..query()
                };
                let expected: BTreeSet<Serial> = records
                    .iter()
                    .filter(|r| match &scope {
                        Scope::All => true,
                        Scope::Node(id) => matches!(r.owner, Owner::Service { node, .. } if node == *id),
                        Scope::Name(name) => r.pair_name.eq_ignore_ascii_case(name),
                    })
                    .filter(|r| states.contains(&state_of(r)))
                    .filter(|r| until.is_none_or(|until| r.not_after <= until))
                    .filter(|r| hex::encode(&r.issuer_key_id.0).starts_with(issuer))
                    .map(|r| r.serial)
                    .collect();
                let found = all(&index, query.clone());
                assert_eq!(found.iter().copied().collect::<BTreeSet<_>>(), expected, "{query:?}");
                assert_eq!(found.len(), expected.len(), "none twice: {query:?}");
            }
        }
    }
    let soonest = find(&index, &query()).unwrap().certificates;
    assert!(soonest.is_sorted_by_key(|c| c.not_after) && soonest[0].not_after > NOW.0);
}

#[test]
fn what_ended_long_ago_leaves_every_table() {
    let folder = tempfile::tempdir().unwrap();
    let (mut index, records) = filled(folder.path());
    let before = UtcTime(NOW.0 - 20 * 3600);
    let old = records.iter().filter(|r| r.not_after < before).count();
    assert_eq!((old, purge(&mut index, before).unwrap()), (30, 30));
    assert_eq!(purge(&mut index, before).unwrap(), 0);
    assert_eq!(index.applied().seq, 1);
    let everything = Query { states: vec![State::Ok, State::Revoked, State::Ended], ..query() };
    assert_eq!(all(&index, everything).len(), 70);
    let tables = [
        (Table::CertificateBySerial, 70 + 7), // with seven revocations
        (Table::CertificateByExpiry, 70),
        (Table::CertificateByOwner, 70),
        (Table::CertificateByName, 70),
    ];
    for (table, expected) in tables {
        let page = Page { limit: 1_000, ..Page::default() };
        assert_eq!(index.page(table, &page).unwrap().len(), expected, "{table:?}");
    }
}

/// `cert ls --expiring 24h` among a million certificates: 100 ms. Run by `make bench-inventory`.
#[test]
#[ignore = "fills a million entries, minutes: make bench-inventory"]
fn a_million_certificates_are_listed_in_a_moment() {
    const CERTIFICATES: u32 = 1_000_000;
    const NODES: u32 = 10_000;
    // The ends lie evenly in the 90 days around now.
    let one = |n: u32| {
        let spread = i64::from(n.wrapping_mul(0x9E37_79B9) >> 9) % (90 * DAY);
        record(n, n % NODES, NOW.0 - 30 * DAY + spread)
    };
    let folder = tempfile::tempdir().unwrap();
    let filling = Instant::now();
    let mut world = world(folder.path(), NODES);
    for first in (0..CERTIFICATES).step_by(10_000) {
        let issued = |n| Change::CertificateIssued { certificate: one(n) };
        apply(&mut world, (first..first + 10_000).map(issued).collect());
    }
    println!("World of {CERTIFICATES} in {:.1?}", filling.elapsed());
    // All the pages that the command asks for.
    let soon = Query { until: Some(UtcTime(NOW.0 + DAY)), limit: PAGE_SIZE_MAX, ..query() };
    let took =
        timed("expiring within 24 h, all", || pages(soon.clone(), |query| find_live(&world, query)).len());
    assert!(took < Duration::from_millis(100), "{took:?}");
    drop(world);

    let mut index = Index::open(folder.path().join("index"));
    let filling = Instant::now();
    // A table at a time in the order of its keys, as the index copies itself: in the order of their serials each entry
    // would read and write a page of its own.
    for table in [
        Table::CertificateBySerial,
        Table::CertificateByExpiry,
        Table::CertificateByOwner,
        Table::CertificateByName,
    ] {
        let mut ops: Vec<IndexOp> = (0..CERTIFICATES)
            .flat_map(|n| issued_ops("mesh.internal", u64::from(n) + 1, &one(n)))
            .filter(|op| op.table == table)
            .collect();
        ops.sort_unstable_by(|one, other| one.key.cmp(&other.key));
        for some in ops.chunks(5_000) {
            index.apply(&Head { seq: u64::from(CERTIFICATES), hash: [1; 32] }, some).unwrap();
        }
    }
    println!("index of {CERTIFICATES} in {:.1?}", filling.elapsed());
    let query = || Query { limit: PAGE_SIZE_MAX, ..query() };
    let node = Query { scope: Scope::Node(NodeId(77)), ..query() };
    timed("of one node, all", || all(&index, node.clone()).len());
    let name = Query { scope: Scope::Name("s77.mesh.internal".into()), ..query() };
    timed("of one name, all", || all(&index, name.clone()).len());
    let ended = Query { states: vec![State::Ended], ..query() };
    timed("ended, first page", || find(&index, &ended).unwrap().certificates.len());
}

/// Median of seven.
fn timed(what: &str, list: impl Fn() -> usize) -> Duration {
    let mut count = 0;
    let mut times: Vec<Duration> = (0..7)
        .map(|_| {
            let start = Instant::now();
            count = list();
            start.elapsed()
        })
        .collect();
    times.sort();
    println!("{what}: {count} in {:.1?} (median of 7; longest {:.1?})", times[3], times[6]);
    times[3]
}
