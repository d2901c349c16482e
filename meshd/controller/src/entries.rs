//! Entries of the peer map in the form in which they travel: encoded once per version, shared by all streams.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use mesh_core::{NodeId, PeerView, Serial, Tag, World};
use mesh_proto::v1 as pb;

/// What has been encoded. Which node sees which entry is `core`'s answer; here it only becomes bytes.
#[derive(Debug, Default)]
pub(crate) struct Entries(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    by_node: BTreeMap<NodeId, Version>,
    encoded: u64,
}

/// A node as its peers see it now: the same for all of them but for who may open connections.
#[derive(Debug)]
struct Version {
    leaf: Serial,
    tags: BTreeSet<Tag>,
    /// By (inbound, outbound).
    bytes: BTreeMap<(bool, bool), Bytes>,
}

impl Version {
    fn is_of(&self, view: &PeerView) -> bool {
        self.leaf == view.leaf_serial && self.tags == view.tags
    }
}

impl Entries {
    /// The entry of node `id` for whoever has this view of it; `None` if the node has no leaf.
    pub(crate) fn of(&self, world: &World, id: NodeId, view: &PeerView) -> Option<Bytes> {
        let mut inner = self.lock();
        let inner = &mut *inner;
        let version = inner
            .by_node
            .entry(id)
            .and_modify(|version| {
                if !version.is_of(view) {
                    version.bytes.clear();
                }
            })
            .or_insert_with(|| Version {
                leaf: view.leaf_serial,
                tags: BTreeSet::new(),
                bytes: BTreeMap::new(),
            });
        let way = (view.inbound, view.outbound);
        if let Some(bytes) = version.bytes.get(&way) {
            return Some(bytes.clone());
        }
        let bytes = peer(world, id, view)?.to_entry();
        (version.leaf, version.tags) = (view.leaf_serial, view.tags.clone());
        version.bytes.insert(way, bytes.clone());
        inner.encoded += 1;
        Some(bytes)
    }

    /// Forgets those of `ids` that are members no more.
    pub(crate) fn forget_ended<'a>(&self, world: &World, ids: impl Iterator<Item = &'a NodeId>) {
        let mut inner = self.lock();
        for id in ids.filter(|id| world.leaf(**id).is_none()) {
            inner.by_node.remove(id);
        }
    }

    /// The same for everybody, where a whole map is made anyway.
    pub(crate) fn forget_all_ended(&self, world: &World) {
        self.lock().by_node.retain(|id, _| world.leaf(*id).is_some());
    }

    /// How many entries have been encoded since the start.
    #[cfg(test)]
    pub(crate) fn encoded(&self) -> u64 {
        self.lock().encoded
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn peer(world: &World, id: NodeId, view: &PeerView) -> Option<pb::Peer> {
    Some(pb::Peer {
        node_id: id.0,
        leaf: world.leaf(id)?.to_vec().into(),
        inbound: view.inbound,
        outbound: view.outbound,
        tags: view.tags.iter().map(ToString::to_string).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_core::policy::STARTER_POLICY;
    use mesh_core::world::Mesh;
    use mesh_core::{
        Actor, CertificateRecord, Change, KeyHash, KeyId, NodeName, OperationId, Owner, Policy, Reason,
        Record, TokenId, UtcTime, WgKey,
    };

    const NODES: u32 = 20;

    fn apply(world: &mut World, changes: Vec<Change>) {
        let record = Record {
            operation: OperationId([0; 16]),
            at: UtcTime(1_795_363_200),
            actor: Actor::Controller,
            who: "controller".into(),
            action: "test".into(),
            changes,
        };
        let seq = world.head_seq() + 1;
        world.apply(seq, &record);
    }

    fn name(id: u32) -> NodeName {
        NodeName::try_from(format!("n{id}").as_str()).unwrap()
    }

    fn certificate(id: u32, serial: u8) -> CertificateRecord {
        let mut bytes = [serial; 16];
        bytes[..4].copy_from_slice(&id.to_be_bytes());
        CertificateRecord {
            serial: Serial(bytes),
            key_hash: KeyHash([serial; 32]),
            owner: Owner::Node(NodeId(id)),
            profile: "node".into(),
            names: vec![],
            ips: vec![],
            pair_name: String::new(),
            shard: 0,
            not_before: UtcTime(1_795_363_000),
            not_after: UtcTime(1_795_563_200),
            issuer_key_id: KeyId(vec![1; 20]),
            der: [&id.to_be_bytes()[..], &[serial; 600]].concat(),
        }
    }

    fn world() -> World {
        let mut world = World::new();
        let mesh = Mesh {
            mesh_id: [1; 16],
            journal_id: [2; 16],
            fleet: "test".into(),
            domain: mesh_core::DnsName::try_from("mesh.internal").unwrap(),
            controller_name: "ctl-1".into(),
            ipv4_pool: "100.64.0.0/10".parse().unwrap(),
            cas: vec![],
        };
        let policy = Policy::parse(STARTER_POLICY).unwrap();
        let applied = Change::PolicyApplied { toml: STARTER_POLICY.into(), policy, version: 1 };
        apply(&mut world, vec![Change::MeshCreated { mesh }, applied]);
        for id in 1..=NODES {
            let enrolled = Change::NodeEnrolled {
                id: NodeId(id),
                name: name(id),
                tags: BTreeSet::new(),
                token: TokenId([1; 8]),
                ipv4: std::net::Ipv4Addr::from_bits(0x6440_0000 + id),
                wireguard: WgKey([u8::try_from(id).unwrap(); 32]),
                certificate: certificate(id, 0x41),
            };
            apply(&mut world, vec![enrolled]);
        }
        world
    }

    /// What every other node's stream is told of `changed` after record `since`.
    fn told(entries: &Entries, world: &World, changed: u32, since: u64) -> Vec<Bytes> {
        (1..=NODES)
            .filter(|id| *id != changed)
            .map(|id| {
                let delta = world.delta_for(NodeId(id), since).unwrap();
                let view = &delta.upserts[&NodeId(changed)];
                entries.of(world, NodeId(changed), view).unwrap()
            })
            .collect()
    }

    #[test]
    fn one_change_is_encoded_once_however_many_streams_hear_of_it() {
        let (mut world, entries) = (world(), Entries::default());
        let since = world.head_seq();
        let renewed = Change::IdentityRenewed {
            id: NodeId(7),
            name: name(7),
            wireguard: vec![WgKey([7; 32])],
            certificate: certificate(7, 0x42),
            previous: certificate(7, 0x41).serial,
        };
        apply(&mut world, vec![renewed]);
        let first = told(&entries, &world, 7, since);
        assert_eq!((first.len(), entries.encoded()), (NODES as usize - 1, 1));
        assert!(first.iter().all(|bytes| bytes.as_ptr() == first[0].as_ptr()), "the bytes are shared");
        let peer = <pb::Peer as prost::Message>::decode(first[0].clone()).unwrap();
        assert_eq!((peer.node_id, peer.leaf.to_vec()), (7, certificate(7, 0x42).der));
        assert!(peer.inbound && peer.outbound);

        // A full map made meanwhile shares them too, and a new version is encoded anew, once.
        let view = world.view_for(NodeId(3)).unwrap();
        entries.forget_all_ended(&world);
        assert_eq!(entries.of(&world, NodeId(7), &view.peers[&NodeId(7)]).unwrap(), first[0]);
        assert_eq!(entries.encoded(), 1);
        let tags = BTreeSet::from([Tag::try_from("web").unwrap()]);
        let since = world.head_seq();
        apply(&mut world, vec![Change::NodeTagged { id: NodeId(7), name: name(7), tags }]);
        let second = told(&entries, &world, 7, since);
        assert_ne!(second[0], first[0]);
        assert_eq!(entries.encoded(), 2);
    }

    #[test]
    fn what_differs_between_viewers_is_told_apart_and_what_ended_is_forgotten() {
        let (mut world, entries) = (world(), Entries::default());
        let view = world.view_for(NodeId(1)).unwrap().peers[&NodeId(2)].clone();
        let one_way = PeerView { outbound: false, ..view.clone() };
        let (both, inbound) =
            (entries.of(&world, NodeId(2), &view).unwrap(), entries.of(&world, NodeId(2), &one_way).unwrap());
        assert_ne!(both, inbound);
        assert_eq!(entries.of(&world, NodeId(2), &view).unwrap().as_ptr(), both.as_ptr());
        let revoked = Change::NodeRevoked { id: NodeId(2), name: name(2), reason: Reason::KeyCompromise };
        apply(&mut world, vec![revoked]);
        entries.forget_ended(&world, [NodeId(1), NodeId(2)].iter());
        assert!(entries.lock().by_node.is_empty());
        assert_eq!(entries.of(&world, NodeId(2), &view), None, "who has ended has no entry");
    }
}
