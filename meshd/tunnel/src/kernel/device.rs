//! WireGuard's generic netlink family: what is sent to the kernel's module, and what it reports.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::time::Duration;

use ipnet::IpNet;
use netlink_packet_core::{NLA_F_NESTED, NetlinkSerializable, NlaBuffer, NlasIterator};
use netlink_packet_generic::constants::{CTRL_ATTR_FAMILY_ID, GENL_HDRLEN};
use netlink_packet_generic::ctrl::nlas::GenlCtrlAttrs;
use netlink_packet_generic::ctrl::{GenlCtrl, GenlCtrlCmd};
use netlink_packet_generic::{GenlFamily, GenlMessage};
use netlink_packet_wireguard::{
    WireguardAddressFamily, WireguardAllowedIp, WireguardAllowedIpAttr, WireguardAttribute, WireguardCmd,
    WireguardDeviceFlags, WireguardMessage, WireguardPeer, WireguardPeerAttribute, WireguardPeerFlags,
};
use netlink_sys::protocols::NETLINK_GENERIC;
use nix::libc;
use zeroize::Zeroize as _;

use super::netlink::{Netlink, invalid};
use crate::config::{PEERS_MAX, PeerConfig};
use crate::key::{PrivateKey, PublicKey};

/// Prefixes in one message: a nest of attributes may have 65535 bytes, a prefix takes up to 40.
const PREFIXES_PER_MESSAGE: usize = 1024;

/// Attributes of `linux/wireguard.h` that are read.
const WGDEVICE_A_LISTEN_PORT: u16 = 6;
const WGDEVICE_A_PEERS: u16 = 8;
const WGPEER_A_PUBLIC_KEY: u16 = 1;
const WGPEER_A_ENDPOINT: u16 = 4;
const WGPEER_A_LAST_HANDSHAKE_TIME: u16 = 6;
const WGPEER_A_RX_BYTES: u16 = 7;
const WGPEER_A_TX_BYTES: u16 = 8;
/// Lengths of `struct sockaddr_in` and `sockaddr_in6`, bytes.
const SOCKADDR_IN_BYTES: usize = 16;
const SOCKADDR_IN6_BYTES: usize = 28;

/// The module's own interface to one network namespace.
pub(super) struct Device {
    netlink: Netlink,
    family: u16,
    index: u32,
}

impl Device {
    /// The family of the interface with this index. The kernel loads its module when it can.
    pub(super) fn open(index: u32) -> io::Result<Self> {
        let mut netlink = Netlink::open(NETLINK_GENERIC)?;
        let mut family = None;
        let ask = GenlMessage::from_payload(GenlCtrl {
            cmd: GenlCtrlCmd::GetFamily,
            nlas: vec![GenlCtrlAttrs::FamilyName(WireguardMessage::family_name().to_owned())],
        });
        netlink.request(ask, 0, |payload| {
            family = family_id(payload)?;
            Ok(())
        })?;
        let family = family.ok_or_else(|| invalid("the family has no number"))?;
        Ok(Self { netlink, family, index })
    }

    /// Carries one change out, whole or not at all but for running out of memory.
    pub(super) fn set(&mut self, change: Vec<WireguardAttribute>) -> io::Result<()> {
        let message = self.message(WireguardCmd::SetDevice, change);
        self.netlink.request(message, 0, |_| Ok(()))
    }

    /// The port, and all peers as they stand.
    pub(super) fn get(&mut self) -> io::Result<Snapshot> {
        let message = self.message(WireguardCmd::GetDevice, Vec::new());
        let mut snapshot = Snapshot::default();
        self.netlink.dump(&message, |payload| match payload {
            None => {
                snapshot = Snapshot::default();
                Ok(())
            }
            Some(payload) => snapshot.add(payload),
        })?;
        Ok(snapshot)
    }

    fn message(&self, cmd: WireguardCmd, attributes: Vec<WireguardAttribute>) -> Message {
        Message::new(self.family, self.index, cmd, attributes)
    }
}

/// A message of the family, which may hold keys: wiped on drop.
#[derive(Clone)]
struct Message(GenlMessage<WireguardMessage>);

impl Message {
    fn new(family: u16, index: u32, cmd: WireguardCmd, mut attributes: Vec<WireguardAttribute>) -> Self {
        attributes.insert(0, WireguardAttribute::IfIndex(index));
        let mut message = GenlMessage::from_payload(WireguardMessage { cmd, attributes });
        message.set_resolved_family_id(family);
        Self(message)
    }
}

impl NetlinkSerializable for Message {
    fn message_type(&self) -> u16 {
        self.0.message_type()
    }

    fn buffer_len(&self) -> usize {
        NetlinkSerializable::buffer_len(&self.0)
    }

    fn serialize(&self, buffer: &mut [u8]) {
        self.0.serialize(buffer);
    }
}

impl Drop for Message {
    fn drop(&mut self) {
        self.wipe();
    }
}

impl Message {
    fn wipe(&mut self) {
        for attribute in &mut self.0.payload.attributes {
            match attribute {
                WireguardAttribute::PrivateKey(key) => key.zeroize(),
                WireguardAttribute::Peers(peers) => {
                    for attribute in peers.iter_mut().flat_map(|peer| &mut peer.0) {
                        if let WireguardPeerAttribute::PresharedKey(key) = attribute {
                            key.zeroize();
                        }
                    }
                }
                _ => {}
            }
        }
    }
}

/// What the interface itself gets. Without a port the kernel takes any.
pub(super) fn interface(private_key: &PrivateKey, port: u16, fwmark: u32) -> Vec<WireguardAttribute> {
    let mut change = identity(private_key);
    change.extend([WireguardAttribute::ListenPort(port), WireguardAttribute::Fwmark(fwmark)]);
    change
}

/// Another key, and no peers: each session is gone.
pub(super) fn identity(private_key: &PrivateKey) -> Vec<WireguardAttribute> {
    vec![
        WireguardAttribute::PrivateKey(*private_key.to_bytes()),
        WireguardAttribute::Flags(WireguardDeviceFlags::ReplacePeers),
    ]
}

/// A peer from nothing: whatever the kernel had under its key goes in the same message, session and all.
/// With a keepalive and an endpoint the kernel greets it at once; `greet` asks for that without one.
pub(super) fn create_peer(
    config: &PeerConfig,
    endpoint: Option<SocketAddr>,
    greet: bool,
) -> Vec<Vec<WireguardAttribute>> {
    use WireguardPeerAttribute as A;
    let keepalive = keepalive_secs(config);
    let prefixes: Vec<IpNet> = config.allowed_ips.iter().map(IpNet::trunc).collect();
    let (first, rest) = prefixes.split_at(prefixes.len().min(PREFIXES_PER_MESSAGE));
    let mut peer = vec![A::PublicKey(config.public_key.0), A::Flags(WireguardPeerFlags::ReplaceAllowedIps)];
    peer.extend(config.preshared_key.as_ref().map(|key| A::PresharedKey(*key.to_bytes())));
    peer.extend(endpoint.map(A::Endpoint));
    peer.push(A::AllowedIps(first.iter().map(allowed_ip).collect()));
    // Going from off to on is what makes the kernel send.
    peer.push(A::PersistentKeepalive(if greet { keepalive.max(1) } else { keepalive }));
    let mut peers = vec![removal(config.public_key), WireguardPeer(peer)];
    if greet && keepalive == 0 {
        peers.push(update(config.public_key, A::PersistentKeepalive(0)));
    }
    let mut messages = vec![vec![WireguardAttribute::Peers(peers)]];
    messages.extend(more_prefixes(config.public_key, rest));
    messages
}

/// What changes from `old` to `new`, session and kept prefixes untouched. `bin` is the key of nobody.
pub(super) fn change_peer(
    old: &PeerConfig,
    new: &PeerConfig,
    bin: PublicKey,
) -> Vec<Vec<WireguardAttribute>> {
    use WireguardPeerAttribute as A;
    let truncated =
        |config: &PeerConfig| -> BTreeSet<IpNet> { config.allowed_ips.iter().map(IpNet::trunc).collect() };
    let (had, wanted) = (truncated(old), truncated(new));
    let gone: Vec<IpNet> = had.difference(&wanted).copied().collect();
    let added: Vec<IpNet> = wanted.difference(&had).copied().collect();
    let mut messages = take_prefixes(&gone, bin);
    let mut peer = Vec::new();
    peer.extend(new.endpoint.filter(|_| new.endpoint != old.endpoint).map(A::Endpoint));
    let keepalive = keepalive_secs(new);
    if keepalive != keepalive_secs(old) {
        peer.push(A::PersistentKeepalive(keepalive));
    }
    let (first, rest) = added.split_at(added.len().min(PREFIXES_PER_MESSAGE));
    if !first.is_empty() {
        peer.push(A::AllowedIps(first.iter().map(allowed_ip).collect()));
    }
    if !peer.is_empty() {
        peer.insert(0, A::PublicKey(new.public_key.0));
        messages.push(vec![WireguardAttribute::Peers(vec![WireguardPeer(peer)])]);
    }
    messages.extend(more_prefixes(new.public_key, rest));
    messages
}

/// Makes the kernel send an empty packet to a peer that it has: that is what it does whenever the keepalive goes
/// from off to on.
pub(super) fn greeting(config: &PeerConfig) -> Vec<WireguardAttribute> {
    let keepalive = keepalive_secs(config);
    let mut steps = vec![0, keepalive.max(1)];
    steps.extend((keepalive == 0).then_some(0));
    let step = |secs| update(config.public_key, WireguardPeerAttribute::PersistentKeepalive(secs));
    vec![WireguardAttribute::Peers(steps.into_iter().map(step).collect())]
}

pub(super) fn remove_peer(key: PublicKey) -> Vec<WireguardAttribute> {
    vec![WireguardAttribute::Peers(vec![removal(key)])]
}

pub(super) fn set_endpoint(key: PublicKey, endpoint: SocketAddr) -> Vec<WireguardAttribute> {
    vec![WireguardAttribute::Peers(vec![update(key, WireguardPeerAttribute::Endpoint(endpoint))])]
}

/// Takes prefixes from whoever has them. Older kernels (before 6.16) cannot take one from a peer but only
/// replace all, which leaves the others nobody's for a moment; so they move to a peer that is nobody, which
/// goes in the same message.
fn take_prefixes(prefixes: &[IpNet], bin: PublicKey) -> Vec<Vec<WireguardAttribute>> {
    let message = |chunk: &[IpNet]| {
        let key = WireguardPeerAttribute::PublicKey(bin.0);
        let prefixes = WireguardPeerAttribute::AllowedIps(chunk.iter().map(allowed_ip).collect());
        vec![WireguardAttribute::Peers(vec![WireguardPeer(vec![key, prefixes]), removal(bin)])]
    };
    prefixes.chunks(PREFIXES_PER_MESSAGE).map(message).collect()
}

fn more_prefixes(key: PublicKey, prefixes: &[IpNet]) -> Vec<Vec<WireguardAttribute>> {
    let message = |chunk: &[IpNet]| {
        let prefixes = WireguardPeerAttribute::AllowedIps(chunk.iter().map(allowed_ip).collect());
        vec![WireguardAttribute::Peers(vec![update(key, prefixes)])]
    };
    prefixes.chunks(PREFIXES_PER_MESSAGE).map(message).collect()
}

fn removal(key: PublicKey) -> WireguardPeer {
    update_flagged(key, WireguardPeerFlags::RemoveMe)
}

fn update_flagged(key: PublicKey, flags: WireguardPeerFlags) -> WireguardPeer {
    WireguardPeer(vec![WireguardPeerAttribute::PublicKey(key.0), WireguardPeerAttribute::Flags(flags)])
}

/// One attribute of a peer, if it is there.
fn update(key: PublicKey, attribute: WireguardPeerAttribute) -> WireguardPeer {
    let mut peer = update_flagged(key, WireguardPeerFlags::UpdateOnly);
    peer.0.push(attribute);
    peer
}

fn keepalive_secs(config: &PeerConfig) -> u16 {
    let secs = config.keepalive().map_or(0, |interval| interval.as_secs());
    u16::try_from(secs).unwrap_or(u16::MAX)
}

fn allowed_ip(prefix: &IpNet) -> WireguardAllowedIp {
    let family = match prefix {
        IpNet::V4(_) => WireguardAddressFamily::Ipv4,
        IpNet::V6(_) => WireguardAddressFamily::Ipv6,
    };
    WireguardAllowedIp(vec![
        WireguardAllowedIpAttr::Family(family),
        WireguardAllowedIpAttr::IpAddr(prefix.addr()),
        WireguardAllowedIpAttr::Cidr(prefix.prefix_len()),
    ])
}

/// The interface at one moment. The keys that the kernel tells as well are not kept.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Snapshot {
    pub(super) port: u16,
    pub(super) peers: Vec<PeerReport>,
}

/// One peer as the kernel has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PeerReport {
    pub(super) key: PublicKey,
    pub(super) endpoint: Option<SocketAddr>,
    /// Since 1970 by the wall clock; `None` before the first.
    pub(super) last_handshake: Option<Duration>,
    pub(super) rx_bytes: u64,
    pub(super) tx_bytes: u64,
}

impl Snapshot {
    /// Takes one part of the kernel's answer. A peer whose prefixes do not fit goes on in the next part,
    /// where only its key is said again.
    fn add(&mut self, payload: &[u8]) -> io::Result<()> {
        for attribute in NlasIterator::new(payload.get(GENL_HDRLEN..).ok_or_else(cut)?) {
            let attribute = attribute.map_err(|_| cut())?;
            match attribute.kind() & !NLA_F_NESTED {
                WGDEVICE_A_LISTEN_PORT => self.port = u16::from_ne_bytes(fixed(&attribute)?),
                WGDEVICE_A_PEERS => {
                    for peer in NlasIterator::new(attribute.value()) {
                        self.add_peer(peer.map_err(|_| cut())?.value())?;
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn add_peer(&mut self, attributes: &[u8]) -> io::Result<()> {
        let mut key = None;
        let mut report = PeerReport {
            key: PublicKey([0; 32]),
            endpoint: None,
            last_handshake: None,
            rx_bytes: 0,
            tx_bytes: 0,
        };
        let mut goes_on = true;
        for attribute in NlasIterator::new(attributes) {
            let attribute = attribute.map_err(|_| cut())?;
            match attribute.kind() & !NLA_F_NESTED {
                WGPEER_A_PUBLIC_KEY => key = Some(PublicKey(fixed(&attribute)?)),
                WGPEER_A_ENDPOINT => report.endpoint = socket_address(attribute.value()),
                WGPEER_A_LAST_HANDSHAKE_TIME => report.last_handshake = timespec(fixed(&attribute)?),
                WGPEER_A_RX_BYTES => report.rx_bytes = u64::from_ne_bytes(fixed(&attribute)?),
                WGPEER_A_TX_BYTES => {
                    report.tx_bytes = u64::from_ne_bytes(fixed(&attribute)?);
                    goes_on = false;
                }
                _ => {}
            }
        }
        report.key = key.ok_or_else(|| invalid("a peer has no key"))?;
        if goes_on && self.peers.last().is_some_and(|last| last.key == report.key) {
            return Ok(());
        }
        if self.peers.len() > PEERS_MAX {
            return Err(invalid("the interface has more peers than it may have"));
        }
        self.peers.push(report);
        Ok(())
    }
}

fn cut() -> io::Error {
    invalid("an answer about the interface is cut")
}

/// The value of an attribute that has one length.
fn fixed<const N: usize>(attribute: &NlaBuffer<&[u8]>) -> io::Result<[u8; N]> {
    attribute.value().try_into().map_err(|_| invalid("an attribute has another length than it must"))
}

/// `struct __kernel_timespec`; zero is never.
fn timespec(bytes: [u8; 16]) -> Option<Duration> {
    let (secs, nanos) = bytes.split_at(8);
    let number = |bytes: &[u8]| u64::try_from(i64::from_ne_bytes(bytes.try_into().ok()?)).ok();
    let nanos = u32::try_from(number(nanos)?).ok().filter(|nanos| *nanos < 1_000_000_000)?;
    Some(Duration::new(number(secs)?, nanos)).filter(|time| !time.is_zero())
}

/// `struct sockaddr_in` or `sockaddr_in6`.
fn socket_address(bytes: &[u8]) -> Option<SocketAddr> {
    let family = i32::from(u16::from_ne_bytes(*bytes.first_chunk()?));
    let port = u16::from_be_bytes(*bytes.get(2..)?.first_chunk()?);
    match (family, bytes.len()) {
        (libc::AF_INET, SOCKADDR_IN_BYTES) => {
            let ip: [u8; 4] = *bytes[4..].first_chunk()?;
            Some((IpAddr::V4(Ipv4Addr::from(ip)), port).into())
        }
        (libc::AF_INET6, SOCKADDR_IN6_BYTES) => {
            let ip: [u8; 16] = *bytes[8..].first_chunk()?;
            let scope = u32::from_ne_bytes(*bytes[24..].first_chunk()?);
            Some(SocketAddrV6::new(Ipv6Addr::from(ip), port, 0, scope).into())
        }
        _ => None,
    }
}

fn family_id(payload: &[u8]) -> io::Result<Option<u16>> {
    for attribute in NlasIterator::new(payload.get(GENL_HDRLEN..).ok_or_else(cut)?) {
        let attribute = attribute.map_err(|_| cut())?;
        if attribute.kind() == CTRL_ATTR_FAMILY_ID {
            return fixed(&attribute).map(|id| Some(u16::from_ne_bytes(id)));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests;
