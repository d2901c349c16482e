//! What a tampered store, a wrong controller or an old map can and cannot do to a node.

use proptest::prelude::*;
use std::sync::OnceLock;

use super::*;
use crate::pki::read_own;
use crate::state::Identity;
use crate::testing::{LIFE, TestMesh, address, cursor, full, ipv6, place, record};

const NOW: i64 = 1_800_000_000;

fn mesh() -> TestMesh {
    TestMesh::new(UtcDateTime::from_unix_timestamp(NOW).unwrap())
}

fn serial(identity: &Identity) -> Vec<u8> {
    read_own(identity).unwrap().serial.as_bytes().to_vec()
}

/// What node 1 makes of a full map with `peers`.
fn evaluated(mesh: &TestMesh, own: &Identity, peers: Vec<pb::Peer>, revoked: &[&[u8]]) -> Evaluation {
    let trust = mesh.trust(own, 1, revoked);
    let mut roster = Roster::default();
    roster.apply_full(full(1, peers), &trust).unwrap();
    roster.evaluate(&trust, &place(own), mesh.now)
}

#[test]
fn name_keys_and_addresses_come_from_the_certificate() {
    let mesh = mesh();
    let (own, bravo) = (mesh.node(1, "alpha"), mesh.node(2, "bravo"));
    let result = evaluated(&mesh, &own, vec![record(&bravo)], &[]);
    let peer = &result.peers[&2];
    assert_eq!(peer.leaf.name, "bravo");
    assert_eq!((peer.leaf.ipv4, peer.leaf.ipv6), (bravo.ipv4, bravo.ipv6));
    assert_eq!(peer.wireguard_key(), place(&bravo).wireguard_keys[0]);
    assert_eq!(result.next_end, Some(mesh.now + LIFE));
}

#[test]
fn a_record_with_a_forged_or_foreign_certificate_is_left_out_and_the_others_stand() {
    let mesh = mesh();
    let (own, bravo, charlie) = (mesh.node(1, "alpha"), mesh.node(2, "bravo"), mesh.node(3, "charlie"));
    let other_mesh = TestMesh::new(mesh.now);
    let mut flipped = record(&charlie);
    let mut der = flipped.leaf.to_vec();
    // The WireGuard key stands in the certificate: any changed byte of it breaks the signature.
    let key = place(&charlie).wireguard_keys[0];
    let at = der.windows(32).position(|window| window == key).unwrap();
    der[at] ^= 1;
    flipped.leaf = der.into();
    let key = crate::join::leaf_key(&charlie.tls_key).unwrap();
    let with_leaf = |leaf: Vec<u8>| pb::Peer { leaf: leaf.into(), ..record(&charlie) };
    let table = [
        ("a swapped key", flipped),
        ("another node's certificate", pb::Peer { node_id: 3, ..record(&bravo) }),
        ("another mesh's certificate", record(&other_mesh.node(3, "charlie"))),
        ("a service's certificate", with_leaf(mesh.service(&key, "charlie.mesh.internal"))),
        ("a controller's certificate", with_leaf(mesh.controller(&key))),
        ("nothing", with_leaf(Vec::new())),
        ("noise", with_leaf(vec![0x30; 500])),
        ("a huge one", with_leaf(vec![0x30; 100_000])),
        ("an address outside the mesh", record(&mesh.node_at(3, "charlie", [10, 0, 0, 1].into(), ipv6(3)))),
        ("an IPv6 address of another node", record(&mesh.node_at(3, "charlie", address(3), ipv6(4)))),
        ("our own address", record(&mesh.node_at(3, "charlie", own.ipv4, ipv6(3)))),
        ("our own name", record(&mesh.node(3, "alpha"))),
    ];
    for (what, bad) in table {
        let mut peers = vec![bad];
        // The good record must not share the id of the one that carries its certificate.
        peers.push(record(&bravo));
        let result = evaluated(&mesh, &own, peers, &[]);
        assert!(result.peers.contains_key(&2), "{what}: the good record stands");
        assert!(!result.peers.contains_key(&3), "{what} is left out");
        assert!(result.refused.contains_key(&3), "{what} is reported");
    }
}

#[test]
fn two_records_that_claim_one_address_do_not_both_become_peers() {
    let mesh = mesh();
    let own = mesh.node(1, "alpha");
    let (bravo, rival) = (mesh.node(2, "bravo"), mesh.node_at(3, "charlie", address(2), ipv6(3)));
    let result = evaluated(&mesh, &own, vec![record(&bravo), record(&rival)], &[]);
    assert_eq!(result.peers.keys().collect::<Vec<_>>(), [&2]);
    assert_eq!(result.refused[&3], RecordError::Duplicate("bravo".into()));
}

#[test]
fn a_revoked_certificate_is_no_peer_whatever_the_map_says() {
    let mesh = mesh();
    let (own, bravo, charlie) = (mesh.node(1, "alpha"), mesh.node(2, "bravo"), mesh.node(3, "charlie"));
    let revoked = serial(&bravo);
    let result = evaluated(&mesh, &own, vec![record(&bravo), record(&charlie)], &[&revoked]);
    assert_eq!(result.peers.keys().collect::<Vec<_>>(), [&3]);
}

#[test]
fn nobody_is_a_peer_before_the_first_crl() {
    let mesh = mesh();
    let (own, bravo) = (mesh.node(1, "alpha"), mesh.node(2, "bravo"));
    let trust = Trust::of(&own).unwrap();
    let mut roster = Roster::default();
    roster.apply_full(full(1, vec![record(&bravo)]), &trust).unwrap();
    let result = roster.evaluate(&trust, &place(&own), mesh.now);
    assert_eq!(result.refused[&2], RecordError::Trust(TrustError::NoCrl));
}

#[test]
fn an_older_crl_does_not_replace_a_newer_one() {
    let mesh = mesh();
    let (own, bravo) = (mesh.node(1, "alpha"), mesh.node(2, "bravo"));
    let revoked = serial(&bravo);
    let mut trust = mesh.trust(&own, 7, &[&revoked]);
    for old in mesh.crls(6, &[]) {
        assert!(!trust.take_crl(&old).unwrap());
        // The message's own number is not signed and not believed.
        assert!(!trust.take_crl(&pb::Crl { number: 99, ..old }).unwrap());
    }
    assert!(trust.is_revoked(&revoked));
    let foreign = TestMesh::new(mesh.now).crls(8, &[]);
    assert_eq!(trust.take_crl(&foreign[1]).unwrap_err(), TrustError::CrlIssuer);
}

#[test]
fn a_certificate_past_its_end_is_no_peer_also_from_the_cache() {
    let mesh = mesh();
    let (own, bravo) = (mesh.node(1, "alpha"), mesh.node(2, "bravo"));
    let trust = mesh.trust(&own, 1, &[]);
    let mut roster = Roster::default();
    roster.apply_full(full(1, vec![record(&bravo)]), &trust).unwrap();
    for (age, valid) in [(0, true), (72 * 3600, true), (72 * 3600 + 1, false)] {
        let now = mesh.now + time::Duration::seconds(age);
        let result = roster.evaluate(&trust, &place(&own), now);
        assert_eq!(result.peers.contains_key(&2), valid, "{age} s");
    }
}

#[test]
fn an_old_map_is_refused_and_changes_nothing() {
    let mesh = mesh();
    let (own, bravo, charlie) = (mesh.node(1, "alpha"), mesh.node(2, "bravo"), mesh.node(3, "charlie"));
    let trust = mesh.trust(&own, 1, &[]);
    let mut roster = Roster::default();
    roster.apply_full(full(10, vec![record(&bravo)]), &trust).unwrap();
    let old = full(9, vec![record(&bravo), record(&charlie)]);
    assert_eq!(roster.apply_full(old.clone(), &trust), Err(RosterError::Rollback { found: 9, floor: 10 }));
    assert_eq!(roster.to_full(Vec::new()).peers.len(), 1);
    // The same after a restart: the floor is on disk.
    let mut restarted = Roster::new(Floor::of(&cursor(10)));
    assert!(matches!(restarted.apply_full(old, &trust), Err(RosterError::Rollback { .. })));
    let unnamed = pb::Full { cursor: None, ..full(11, Vec::new()) };
    assert_eq!(roster.apply_full(unnamed, &trust), Err(RosterError::NoCursor));
}

#[test]
fn an_entry_that_cannot_be_read_is_left_out_alone() {
    let mesh = mesh();
    let (own, bravo, charlie) = (mesh.node(1, "alpha"), mesh.node(2, "bravo"), mesh.node(3, "charlie"));
    let trust = mesh.trust(&own, 1, &[]);
    let mut roster = Roster::default();
    let mut map = full(1, vec![record(&bravo)]);
    map.peers.insert(0, vec![0xff; 7].into());
    roster.apply_full(map, &trust).unwrap();
    let upserts = vec![vec![0x0a, 0x7f].into(), record(&charlie).to_entry()];
    let delta = pb::Delta { from: Some(cursor(1)), cursor: Some(cursor(2)), upserts, ..Default::default() };
    roster.apply_delta(delta).unwrap();
    let peers = roster.evaluate(&trust, &place(&own), mesh.now).peers;
    assert_eq!(peers.keys().collect::<Vec<_>>(), [&2, &3]);
}

#[test]
fn changes_from_another_map_ask_for_the_whole_one() {
    let mesh = mesh();
    let own = mesh.node(1, "alpha");
    let trust = mesh.trust(&own, 1, &[]);
    let mut roster = Roster::default();
    let delta = |from: u64, to: u64| pb::Delta {
        from: Some(cursor(from)),
        cursor: Some(cursor(to)),
        ..Default::default()
    };
    assert_eq!(roster.apply_delta(delta(1, 2)), Err(RosterError::OtherBase), "nothing is here yet");
    roster.apply_full(full(5, Vec::new()), &trust).unwrap();
    assert_eq!(roster.apply_delta(delta(4, 6)), Err(RosterError::OtherBase));
    roster.apply_delta(delta(5, 6)).unwrap();
    assert_eq!(roster.seq(), 6);
}

#[test]
fn peers_that_a_map_lacks_unasked_stay_until_something_says_why() {
    let (mesh, own, records) = six();
    let (trust, place) = (mesh.trust(own, 1, &[]), place(own));
    let begin = || {
        let mut roster = Roster::default();
        roster.apply_full(full(1, records.clone()), &trust).unwrap();
        roster.evaluate(&trust, &place, mesh.now);
        roster
    };
    let peers = |roster: &mut Roster, trust: &Trust| -> Vec<u32> {
        roster.evaluate(trust, &place, mesh.now).peers.into_keys().collect()
    };
    let all: Vec<u32> = records.iter().map(|record| record.node_id).collect();

    // A blank map, again and again: everybody stays, and the cursor moves on.
    let mut roster = begin();
    for seq in 2..8 {
        roster.apply_full(full(seq, Vec::new()), &trust).unwrap();
        assert_eq!((peers(&mut roster, &trust), roster.seq()), (all.clone(), seq));
        assert_eq!(roster.held().len(), 6);
    }
    // Also after a restart: what is stored has them.
    let stored = roster.to_full(Vec::new());
    let mut restarted = Roster::default();
    restarted.apply_full(stored, &trust).unwrap();
    restarted.evaluate(&trust, &place, mesh.now);
    restarted.apply_full(full(9, Vec::new()), &trust).unwrap();
    assert_eq!(peers(&mut restarted, &trust), all);

    // Who comes back is held no more, and may go alone like anybody else.
    roster.apply_full(full(9, records[..5].to_vec()), &trust).unwrap();
    assert_eq!(roster.held().iter().collect::<Vec<_>>(), [&all[5]]);
    roster.apply_full(full(10, records[..4].to_vec()), &trust).unwrap();
    assert_eq!(peers(&mut roster, &trust), [&all[..4], &all[5..]].concat());

    // Changes that name a peer are believed, whatever they say of it.
    let mut roster = begin();
    roster.apply_full(full(2, Vec::new()), &trust).unwrap();
    let delta = pb::Delta {
        from: Some(cursor(2)),
        cursor: Some(cursor(3)),
        removes: vec![all[0]],
        upserts: vec![records[1].to_entry()],
        ..Default::default()
    };
    roster.apply_delta(delta).unwrap();
    assert_eq!(peers(&mut roster, &trust), all[1..]);
    assert!(!roster.held().contains(&all[1]));

    // A change of policy, or of our own tags, asks for it: as a whole map and as changes.
    for own in [
        pb::Own { policy_version: 2, ..Default::default() },
        pb::Own { tags: vec!["db".into()], ..Default::default() },
    ] {
        let mut roster = begin();
        let asked = pb::Full { own: Some(own.clone()), ..full(2, Vec::new()) };
        roster.apply_full(asked, &trust).unwrap();
        assert_eq!(peers(&mut roster, &trust), Vec::<u32>::new());

        let mut roster = begin();
        roster.apply_full(full(2, Vec::new()), &trust).unwrap();
        let asked = pb::Delta {
            from: Some(cursor(2)),
            cursor: Some(cursor(3)),
            own: Some(own),
            ..Default::default()
        };
        roster.apply_delta(asked).unwrap();
        assert_eq!(peers(&mut roster, &trust), Vec::<u32>::new());
        assert!(roster.held().is_empty());
    }

    // Half may go.
    let mut roster = begin();
    roster.apply_full(full(2, records[..3].to_vec()), &trust).unwrap();
    assert_eq!(peers(&mut roster, &trust), all[..3]);
    assert!(roster.held().is_empty());
}

#[test]
fn a_held_peer_goes_with_its_lease() {
    let (mesh, own, records) = six();
    let (trust, place) = (mesh.trust(own, 1, &[]), place(own));
    let mut roster = Roster::default();
    roster.apply_full(full(1, records.clone()), &trust).unwrap();
    roster.evaluate(&trust, &place, mesh.now);
    roster.apply_full(full(2, Vec::new()), &trust).unwrap();
    assert_eq!(roster.evaluate(&trust, &place, mesh.now + LIFE).peers.len(), 6);
    let after = roster.evaluate(&trust, &place, mesh.now + LIFE + std::time::Duration::from_secs(1));
    assert_eq!(after, Evaluation::default(), "gone, and no record is told as refused");
    assert!(roster.held().is_empty() && roster.to_full(Vec::new()).peers.is_empty());
}

/// A mesh with six peers, made once: keys and signatures are the slow part.
fn six() -> &'static (TestMesh, Identity, Vec<pb::Peer>) {
    static SIX: OnceLock<(TestMesh, Identity, Vec<pb::Peer>)> = OnceLock::new();
    SIX.get_or_init(|| {
        let mesh = mesh();
        let own = mesh.node(1, "alpha");
        let records = (2..8).map(|id| record(&mesh.node(id, &format!("node-{id}")))).collect();
        (mesh, own, records)
    })
}

proptest! {
    /// However a set of peers came about, by changes or as a whole, the node makes the same of it.
    #[test]
    fn changes_and_whole_maps_come_to_the_same(steps in proptest::collection::vec((0usize..6, any::<bool>()), 1..24)) {
        let (mesh, own, records) = six();
        let trust = mesh.trust(own, 1, &[]);
        let (mut by_changes, mut model) = (Roster::default(), BTreeMap::new());
        by_changes.apply_full(full(1, Vec::new()), &trust).unwrap();
        let mut seq = 1;
        for (index, present) in steps {
            let record = &records[index];
            let mut delta = pb::Delta { from: Some(cursor(seq)), cursor: Some(cursor(seq + 1)), ..Default::default() };
            seq += 1;
            if present {
                model.insert(record.node_id, record.clone());
                delta.upserts.push(record.to_entry());
            } else {
                model.remove(&record.node_id);
                delta.removes.push(record.node_id);
            }
            by_changes.apply_delta(delta).unwrap();
        }
        let mut whole = Roster::default();
        whole.apply_full(full(seq, model.into_values().collect()), &trust).unwrap();
        let place = place(own);
        prop_assert_eq!(
            by_changes.evaluate(&trust, &place, mesh.now),
            whole.evaluate(&trust, &place, mesh.now)
        );
        prop_assert_eq!(by_changes.to_full(Vec::new()), whole.to_full(Vec::new()));
    }

    /// Whatever whole maps and CRLs come in whatever order: who is in the newest map is a peer unless revoked, who is
    /// revoked is none, and nobody else is one but those that were peers a moment before.
    #[test]
    fn holding_never_keeps_the_revoked_nor_makes_a_peer(
        steps in proptest::collection::vec((any::<u8>(), any::<u8>(), any::<bool>()), 1..12),
    ) {
        let (mesh, own, records) = six();
        let serials: Vec<Vec<u8>> =
            records.iter().map(|record| mesh.trust(own, 1, &[]).judge_node(&record.leaf, mesh.now).unwrap().serial).collect();
        let place = place(own);
        let (mut roster, mut revoked, mut policy) = (Roster::default(), 0u8, 0);
        let mut before: BTreeSet<u32> = BTreeSet::new();
        for (seq, (present, newly_revoked, other_policy)) in (1u64..).zip(steps) {
            // Revocations are rarer than maps.
            revoked |= newly_revoked & newly_revoked.rotate_left(3) & newly_revoked.rotate_left(5);
            policy += u64::from(other_policy);
            let chosen = |bits: u8| (0..6usize).filter(move |at| bits & (1 << at) != 0);
            let listed: Vec<&[u8]> = chosen(revoked).map(|at| serials[at].as_slice()).collect();
            let trust = mesh.trust(own, seq, &listed);
            let told = chosen(present).map(|at| records[at].clone()).collect();
            let own = pb::Own { policy_version: policy, ..Default::default() };
            roster.apply_full(pb::Full { own: Some(own), ..full(seq, told) }, &trust).unwrap();
            roster.doubt();
            let peers: BTreeSet<u32> = roster.evaluate(&trust, &place, mesh.now).peers.into_keys().collect();
            let ids = |bits: u8| chosen(bits).map(|at| records[at].node_id).collect::<BTreeSet<u32>>();
            prop_assert!(peers.is_superset(&ids(present & !revoked)));
            prop_assert!(peers.is_disjoint(&ids(revoked)));
            prop_assert!(peers.difference(&ids(present)).all(|id| before.contains(id) && roster.held().contains(id)));
            if other_policy {
                prop_assert_eq!(&peers, &ids(present & !revoked));
            }
            before = peers;
        }
    }

    /// Bytes of a stream, spoiled anywhere: no panic, and whoever comes out as a peer is one as its certificate says.
    #[test]
    fn spoiled_bytes_make_no_peer_that_no_certificate_names(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        cut in proptest::option::of(any::<prop::sample::Index>()),
        as_delta in any::<bool>(),
    ) {
        let (mesh, own, records) = six();
        let trust = mesh.trust(own, 1, &[]);
        let response = match as_delta {
            false => pb::sync_response::Response::Full(full(2, records.to_vec())),
            true => pb::sync_response::Response::Delta(pb::Delta {
                from: Some(cursor(1)),
                cursor: Some(cursor(2)),
                upserts: records.iter().map(pb::Peer::to_entry).collect(),
                ..Default::default()
            }),
        };
        let message = pb::SyncResponse { response: Some(response), controller_time: 0 };
        let mut bytes = prost::Message::encode_to_vec(&message);
        for (at, value) in &changes {
            let at = at.index(bytes.len());
            bytes[at] = *value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let mut roster = Roster::default();
        roster.apply_full(full(1, Vec::new()), &trust).unwrap();
        match <pb::SyncResponse as prost::Message>::decode(bytes.as_slice()).ok().and_then(|told| told.response) {
            Some(pb::sync_response::Response::Full(full)) => drop(roster.apply_full(full, &trust)),
            Some(pb::sync_response::Response::Delta(delta)) => drop(roster.apply_delta(delta)),
            _ => {}
        }
        let truth = evaluated(mesh, own, records.to_vec(), &[]);
        for (id, peer) in roster.evaluate(&trust, &place(own), mesh.now).peers {
            prop_assert_eq!(Some(&peer.leaf), truth.peers.get(&id).map(|peer| &peer.leaf));
        }
    }

    /// Any byte of a leaf may be changed: the result is never another peer, only none.
    #[test]
    fn a_changed_byte_never_makes_another_peer(at in any::<prop::sample::Index>(), flip in 1u8..) {
        let (mesh, own, records) = six();
        let mut record = records[0].clone();
        let mut leaf = record.leaf.to_vec();
        let at = at.index(leaf.len());
        leaf[at] ^= flip;
        record.leaf = leaf.into();
        let trust = mesh.trust(own, 1, &[]);
        let mut roster = Roster::default();
        roster.apply_full(full(1, vec![record]), &trust).unwrap();
        prop_assert!(roster.evaluate(&trust, &place(own), mesh.now).peers.is_empty(), "byte {}", at);
    }
}
