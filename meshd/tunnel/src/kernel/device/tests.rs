use std::collections::{BTreeMap, BTreeSet};

use netlink_packet_core::{
    Emitable as _, NLM_F_ACK, NLM_F_REQUEST, NetlinkHeader, ParseableParametrized as _,
};
use netlink_packet_generic::GenlHeader;
use netlink_packet_wireguard::{WireguardAllowedIpFlags, WireguardTimeSpec};
use proptest::collection::{btree_map, btree_set, vec};
use proptest::prelude::*;

use super::super::netlink::encode;
use super::*;
use crate::key::PresharedKey;

const KEY: PublicKey = PublicKey([0xaa; 32]);
const BIN: PublicKey = PublicKey([0xee; 32]);

fn config(prefixes: &[&str], keepalive: u64) -> PeerConfig {
    PeerConfig {
        public_key: KEY,
        preshared_key: None,
        endpoint: None,
        allowed_ips: prefixes.iter().map(|prefix| prefix.parse().unwrap()).collect(),
        persistent_keepalive: Some(Duration::from_secs(keepalive)),
    }
}

/// Written down from `linux/wireguard.h` and `linux/netlink.h`, byte by byte.
#[cfg(target_endian = "little")]
#[test]
fn a_new_peer_is_these_bytes() {
    let endpoint = "192.0.2.7:51820".parse().unwrap();
    let psk = Some(PresharedKey::from_bytes([0xbb; 32]));
    let config = PeerConfig { preshared_key: psk, ..config(&["10.0.0.2/32"], 25) };
    let mut messages = create_peer(&config, Some(endpoint), false);
    assert_eq!(messages.len(), 1);
    let message = Message::new(0x21, 7, WireguardCmd::SetDevice, messages.remove(0));
    let mut header = NetlinkHeader::default();
    (header.flags, header.sequence_number) = (NLM_F_REQUEST | NLM_F_ACK, 5);
    let expected = [
        // Length, family, flags, sequence, port; command 1, version 1.
        &[224, 0, 0, 0, 0x21, 0, 5, 0, 5, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0][..],
        &[8, 0, 1, 0, 7, 0, 0, 0],
        &[196, 0, 8, 0x80],
        // Away with what was there.
        &[48, 0, 0, 0x80, 36, 0, 1, 0],
        &[0xaa; 32],
        &[8, 0, 3, 0, 1, 0, 0, 0],
        // And anew, with these prefixes and no others.
        &[144, 0, 0, 0x80, 36, 0, 1, 0],
        &[0xaa; 32],
        &[8, 0, 3, 0, 2, 0, 0, 0, 36, 0, 2, 0],
        &[0xbb; 32],
        &[20, 0, 4, 0, 2, 0, 0xca, 0x6c, 192, 0, 2, 7, 0, 0, 0, 0, 0, 0, 0, 0],
        &[32, 0, 9, 0x80, 28, 0, 0, 0x80],
        &[6, 0, 1, 0, 2, 0, 0, 0, 8, 0, 2, 0, 10, 0, 0, 2, 5, 0, 3, 0, 32, 0, 0, 0],
        &[6, 0, 5, 0, 25, 0, 0, 0],
    ]
    .concat();
    assert_eq!(encode(header, message)[..], expected[..]);
}

/// What the kernel's `wg_get_device_dump` writes for one peer with two prefixes, the second in another part.
#[cfg(target_endian = "little")]
#[test]
fn the_kernels_answer_is_read_across_its_parts() {
    let first = [
        &[0, 1, 0, 0][..],
        &[6, 0, 6, 0, 0x6c, 0xca, 0, 0],
        &[8, 0, 7, 0, 0, 0, 0, 0],
        &[8, 0, 1, 0, 7, 0, 0, 0],
        &[8, 0, 2, 0, b'w', b'g', b'0', 0],
        &[36, 0, 3, 0],
        &[0x11; 32],
        &[36, 0, 4, 0],
        &[0x22; 32],
        &[204, 0, 8, 0x80, 200, 0, 0, 0x80, 36, 0, 1, 0],
        &[0xaa; 32],
        &[36, 0, 2, 0],
        &[0; 32],
        &[20, 0, 6, 0, 0, 0x2f, 0x5b, 0x6a, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0],
        &[6, 0, 5, 0, 25, 0, 0, 0],
        &[12, 0, 8, 0, 0xe8, 3, 0, 0, 0, 0, 0, 0],
        &[12, 0, 7, 0, 0xd0, 7, 0, 0, 0, 0, 0, 0],
        &[8, 0, 10, 0, 1, 0, 0, 0],
        &[
            32, 0, 4, 0, 10, 0, 0xca, 0x6c, 0, 0, 0, 0, 0x20, 1, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
            9, 0, 0, 0, 0,
        ],
        &[32, 0, 9, 0x80, 28, 0, 0, 0x80],
        &[5, 0, 3, 0, 32, 0, 0, 0, 6, 0, 1, 0, 2, 0, 0, 0, 8, 0, 2, 0, 10, 0, 0, 2],
    ]
    .concat();
    let second = [
        &[0, 1, 0, 0][..],
        &[76, 0, 8, 0x80, 72, 0, 0, 0x80, 36, 0, 1, 0],
        &[0xaa; 32],
        &[32, 0, 9, 0x80, 28, 0, 0, 0x80],
        &[5, 0, 3, 0, 32, 0, 0, 0, 6, 0, 1, 0, 2, 0, 0, 0, 8, 0, 2, 0, 10, 0, 0, 3],
    ]
    .concat();
    let mut snapshot = Snapshot::default();
    snapshot.add(&first).unwrap();
    snapshot.add(&second).unwrap();
    let report = PeerReport {
        key: KEY,
        endpoint: Some("[2001:db8::9]:51820".parse().unwrap()),
        last_handshake: Some(Duration::new(0x6a5b_2f00, 7)),
        rx_bytes: 2000,
        tx_bytes: 1000,
    };
    assert_eq!(snapshot, Snapshot { port: 51820, peers: vec![report] });
    for length in 0..first.len() {
        // Cut anywhere: an error or less, never a wrong number.
        let mut cut = Snapshot::default();
        if cut.add(&first[..length]).is_ok() {
            assert!(cut.peers.is_empty() && [0, 51820].contains(&cut.port), "{length}: {cut:?}");
        }
    }
}

#[test]
fn keys_are_wiped_when_a_message_goes() {
    let mut message = Message::new(1, 1, WireguardCmd::SetDevice, identity(&PrivateKey::from_bytes([9; 32])));
    let held = |message: &Message| {
        message
            .0
            .payload
            .attributes
            .iter()
            .any(|a| matches!(a, WireguardAttribute::PrivateKey(key) if *key == [9; 32]))
    };
    assert!(held(&message));
    message.wipe();
    assert!(!held(&message));
}

#[test]
fn what_does_not_change_is_not_said() {
    let old = config(&["10.0.0.1/32", "10.0.0.2/32"], 25);
    assert_eq!(change_peer(&old, &old, BIN), Vec::<Vec<WireguardAttribute>>::new());
    // Host bits are ignored.
    assert_eq!(change_peer(&config(&["10.0.0.7/24"], 0), &config(&["10.0.0.9/24"], 0), BIN).len(), 0);
    let new = PeerConfig { endpoint: Some("192.0.2.7:1".parse().unwrap()), ..old.clone() };
    let expected = WireguardPeer(vec![
        WireguardPeerAttribute::PublicKey(KEY.0),
        WireguardPeerAttribute::Endpoint("192.0.2.7:1".parse().unwrap()),
    ]);
    assert_eq!(change_peer(&old, &new, BIN), [vec![WireguardAttribute::Peers(vec![expected])]]);
}

/// What the kernel's `wg_set_device` does with prefixes, and that no message is longer than a nest may be.
#[derive(Debug, Default)]
struct Model {
    peers: BTreeMap<[u8; 32], BTreeSet<IpNet>>,
}

impl Model {
    fn apply(&mut self, message: &[WireguardAttribute]) {
        for attribute in message {
            assert!(attribute_length(attribute) <= usize::from(u16::MAX));
            match attribute {
                WireguardAttribute::Flags(flags) if flags.contains(WireguardDeviceFlags::ReplacePeers) => {
                    self.peers.clear();
                }
                WireguardAttribute::Peers(peers) => peers.iter().for_each(|peer| self.apply_peer(peer)),
                _ => {}
            }
        }
    }

    fn apply_peer(&mut self, peer: &WireguardPeer) {
        let key = peer
            .0
            .iter()
            .find_map(|a| if let WireguardPeerAttribute::PublicKey(key) = a { Some(*key) } else { None });
        let key = key.expect("each peer says its key");
        let flags = peer
            .0
            .iter()
            .find_map(|a| if let WireguardPeerAttribute::Flags(flags) = a { Some(*flags) } else { None });
        let flags = flags.unwrap_or(WireguardPeerFlags::empty());
        if flags.contains(WireguardPeerFlags::RemoveMe) {
            self.peers.remove(&key);
            return;
        }
        if flags.contains(WireguardPeerFlags::UpdateOnly) && !self.peers.contains_key(&key) {
            return;
        }
        self.peers.entry(key).or_default();
        if flags.contains(WireguardPeerFlags::ReplaceAllowedIps) {
            self.peers.insert(key, BTreeSet::new());
        }
        for attribute in &peer.0 {
            if let WireguardPeerAttribute::AllowedIps(prefixes) = attribute {
                prefixes.iter().for_each(|prefix| self.give(key, prefix));
            }
        }
    }

    fn give(&mut self, key: [u8; 32], prefix: &WireguardAllowedIp) {
        let (mut address, mut length) = (None, None);
        for attribute in &prefix.0 {
            match attribute {
                WireguardAllowedIpAttr::IpAddr(ip) => address = Some(*ip),
                WireguardAllowedIpAttr::Cidr(cidr) => length = Some(*cidr),
                WireguardAllowedIpAttr::Flags(flags) => assert_eq!(*flags, WireguardAllowedIpFlags::empty()),
                _ => {}
            }
        }
        let prefix = IpNet::new(address.unwrap(), length.unwrap()).unwrap();
        assert_eq!(prefix, prefix.trunc());
        for held in self.peers.values_mut() {
            held.remove(&prefix);
        }
        self.peers.get_mut(&key).unwrap().insert(prefix);
    }
}

fn attribute_length(attribute: &WireguardAttribute) -> usize {
    [attribute.clone()].as_slice().buffer_len()
}

fn any_prefixes() -> impl Strategy<Value = BTreeSet<IpNet>> {
    let four =
        (0_u8..24, 24_u8..=32).prop_map(|(n, length)| IpNet::new([10, 0, n, 0].into(), length).unwrap());
    let six = (0_u16..24).prop_map(|n| IpNet::new([0xfd00, n, 0, 0, 0, 0, 0, 0].into(), 128).unwrap());
    btree_set(prop_oneof![four, six].prop_map(|prefix| prefix.trunc()), 0..12)
}

/// Endpoint (IPv6 or not, address, port), last handshake, octets in and out.
type Report = (Option<(bool, [u8; 16], u16)>, Option<(u32, u32)>, u64, u64);

fn any_report() -> impl Strategy<Value = Report> {
    let time = (1_u32.., 0_u32..1_000_000_000);
    (
        proptest::option::of(any::<(bool, [u8; 16], u16)>()),
        proptest::option::of(time),
        any::<u64>(),
        any::<u64>(),
    )
}

proptest! {
    /// Whatever a peer's prefixes become, the kernel has exactly those, never loses one that stays, and no
    /// helper is left behind.
    #[test]
    fn updates_lead_where_they_should(steps in vec(any_prefixes(), 1..8)) {
        let mut model = Model::default();
        let mut old: Option<PeerConfig> = None;
        for prefixes in steps {
            let new = PeerConfig { allowed_ips: prefixes.iter().copied().collect(), ..config(&[], 0) };
            let stay: BTreeSet<IpNet> =
                old.iter().flat_map(|old| &old.allowed_ips).filter(|prefix| prefixes.contains(prefix)).copied().collect();
            let messages = match &old {
                None => create_peer(&new, None, false),
                Some(old) => change_peer(old, &new, BIN),
            };
            for message in messages {
                model.apply(&message);
                prop_assert!(model.peers[&KEY.0].is_superset(&stay));
            }
            prop_assert_eq!(&model.peers, &BTreeMap::from([(KEY.0, prefixes)]));
            old = Some(new);
        }
    }

    /// What the packet crate writes as the kernel would, we read.
    #[test]
    fn answers_come_back_as_they_were(peers in btree_map(any::<[u8; 32]>(), any_report(), 0..20), port: u16) {
        let mut expected = Snapshot { port, peers: Vec::new() };
        let mut told = Vec::new();
        for (key, (endpoint, handshake, rx_bytes, tx_bytes)) in peers {
            use WireguardPeerAttribute as A;
            let endpoint = endpoint.map(|(six, ip, port)| match six {
                true => SocketAddr::from((Ipv6Addr::from(ip), port)),
                false => SocketAddr::from((Ipv4Addr::from(*ip.first_chunk().unwrap()), port)),
            });
            let (seconds, nano_seconds) = handshake.map_or((0, 0), |(s, n)| (i64::from(s), i64::from(n)));
            let mut peer = vec![A::PublicKey(key), A::PresharedKey([3; 32])];
            peer.push(A::LastHandshake(WireguardTimeSpec { seconds, nano_seconds }));
            peer.extend(endpoint.map(A::Endpoint));
            peer.extend([A::RxBytes(rx_bytes), A::TxBytes(tx_bytes), A::AllowedIps(Vec::new())]);
            told.push(WireguardPeer(peer));
            let last_handshake = handshake.map(|(s, n)| Duration::new(s.into(), n));
            expected.peers.push(PeerReport { key: PublicKey(key), endpoint, last_handshake, rx_bytes, tx_bytes });
        }
        let attributes = vec![WireguardAttribute::ListenPort(port), WireguardAttribute::Peers(told)];
        let mut payload = vec![0; GENL_HDRLEN + attributes.as_slice().buffer_len()];
        attributes.as_slice().emit(&mut payload[GENL_HDRLEN..]);
        let mut snapshot = Snapshot::default();
        snapshot.add(&payload).unwrap();
        prop_assert_eq!(snapshot, expected);
        // And what we write, the packet crate reads.
        let header = GenlHeader { cmd: 1, version: 1 };
        let parsed = WireguardMessage::parse_with_param(&payload[GENL_HDRLEN..], header).unwrap();
        prop_assert_eq!(parsed.attributes, attributes);
    }

    /// Nothing is read that does not stand in the answer.
    #[test]
    fn any_answer_is_read_or_refused(bytes in vec(any::<u8>(), 0..300), lengths in vec((0_usize..75, 0_u16..64), 0..12)) {
        let mut bytes = bytes;
        // Plausible lengths, so that the inner levels are reached.
        for (at, length) in lengths {
            if let Some(place) = bytes.get_mut(at * 4..at * 4 + 2) {
                place.copy_from_slice(&length.to_ne_bytes());
            }
        }
        let mut snapshot = Snapshot::default();
        if snapshot.add(&bytes).is_ok() {
            for peer in &snapshot.peers {
                prop_assert!(bytes.windows(32).any(|part| part == peer.key.0), "{peer:?}");
            }
            let port = snapshot.port.to_ne_bytes();
            prop_assert!(snapshot.port == 0 || bytes.windows(2).any(|part| part == port));
        }
        if let Ok(Some(id)) = family_id(&bytes) {
            prop_assert!(bytes.windows(2).any(|part| part == id.to_ne_bytes()));
        }
    }
}

#[test]
fn thousands_of_prefixes_go_in_several_messages() {
    let many = |count: u16| -> Vec<IpNet> {
        (0..count).map(|n| IpNet::new([0xfd00, n, 0, 0, 0, 0, 0, 0].into(), 128).unwrap()).collect()
    };
    let (none, all) = (config(&[], 0), PeerConfig { allowed_ips: many(4096), ..config(&[], 0) });
    let mut model = Model::default();
    for message in create_peer(&all, None, false) {
        model.apply(&message);
    }
    assert_eq!(model.peers[&KEY.0].len(), 4096);
    for message in change_peer(&all, &none, BIN) {
        model.apply(&message);
    }
    assert_eq!(model.peers, BTreeMap::from([(KEY.0, BTreeSet::new())]));
    for message in change_peer(&none, &all, BIN) {
        model.apply(&message);
    }
    assert_eq!(model.peers[&KEY.0].len(), 4096);
}
