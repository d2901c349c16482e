//! The interface: made, brought up and taken away over rtnetlink.

use std::io;

use netlink_packet_core::{NLA_F_NESTED, NLM_F_CREATE, NLM_F_EXCL, NlasIterator};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use nix::errno::Errno;

use super::netlink::{Netlink, invalid};

/// Numbers tried for a name with `%d`.
const NUMBERS: u32 = 1024;
/// Attributes of `linux/if_link.h` that are read.
const IFLA_IFNAME: u16 = 3;
const IFLA_LINKINFO: u16 = 18;
const IFLA_IFALIAS: u16 = 20;
const IFLA_STATS64: u16 = 23;
const IFLA_INFO_KIND: u16 = 1;
/// Length of `struct ifinfomsg`, and where the index is in it, bytes.
const HEADER_BYTES: usize = 16;
const INDEX_AT: usize = 4;
/// Places in `struct rtnl_link_stats64`, of 8 bytes each.
const STAT_RX_ERRORS: usize = 4;
const STAT_TX_ERRORS: usize = 5;
const STAT_TX_DROPPED: usize = 7;
const STAT_RX_FRAME_ERRORS: usize = 13;

/// What is read of an interface.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    /// Kind as `ip link` says it; empty for hardware.
    pub(super) kind: String,
    pub(super) alias: String,
    pub(super) errors: LinkErrors,
}

/// The kernel's own counters of what went wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct LinkErrors {
    pub(super) rx: u64,
    pub(super) rx_frame: u64,
    pub(super) tx: u64,
    pub(super) tx_dropped: u64,
}

/// Changes interfaces in one network namespace.
pub(super) struct Links(Netlink);

impl Links {
    pub(super) fn open() -> io::Result<Self> {
        Netlink::open(NETLINK_ROUTE).map(Self)
    }

    /// Makes a WireGuard interface, down. `name` may hold `%d`. The name it got.
    pub(super) fn create(&mut self, name: &str, mtu: u16) -> io::Result<String> {
        if !name.contains("%d") {
            return self.create_one(name, mtu).map(|()| name.to_owned());
        }
        for number in 0..NUMBERS {
            let name = name.replace("%d", &number.to_string());
            match self.create_one(&name, mtu) {
                Err(error) if errno(&error) == Some(Errno::EEXIST) => {}
                result => return result.map(|()| name),
            }
        }
        Err(Errno::EEXIST.into())
    }

    fn create_one(&mut self, name: &str, mtu: u16) -> io::Result<()> {
        self.0
            .request(RouteNetlinkMessage::NewLink(creation(name, mtu)), NLM_F_CREATE | NLM_F_EXCL, |_| Ok(()))
    }

    /// What there is under `name`, `None` if nothing.
    pub(super) fn find(&mut self, name: &str) -> io::Result<Option<Link>> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        self.read(message)
    }

    pub(super) fn by_index(&mut self, index: u32) -> io::Result<Option<Link>> {
        self.read(with_index(index))
    }

    fn read(&mut self, message: LinkMessage) -> io::Result<Option<Link>> {
        let mut found = None;
        let asked = self.0.request(RouteNetlinkMessage::GetLink(message), 0, |payload| {
            found = Some(parse(payload)?);
            Ok(())
        });
        match asked {
            Err(error) if errno(&error) == Some(Errno::ENODEV) => Ok(None),
            result => result.map(|()| found),
        }
    }

    pub(super) fn set_alias(&mut self, index: u32, alias: &str) -> io::Result<()> {
        let mut message = with_index(index);
        message.attributes.push(LinkAttribute::IfAlias(alias.to_owned()));
        self.0.request(RouteNetlinkMessage::SetLink(message), 0, |_| Ok(()))
    }

    pub(super) fn set_up(&mut self, index: u32) -> io::Result<()> {
        let mut message = with_index(index);
        (message.header.flags, message.header.change_mask) = (LinkFlags::Up, LinkFlags::Up);
        self.0.request(RouteNetlinkMessage::SetLink(message), 0, |_| Ok(()))
    }

    /// Removes the interface; fine if it is gone.
    pub(super) fn delete(&mut self, index: u32) -> io::Result<()> {
        match self.0.request(RouteNetlinkMessage::DelLink(with_index(index)), 0, |_| Ok(())) {
            Err(error) if errno(&error) == Some(Errno::ENODEV) => Ok(()),
            result => result,
        }
    }
}

/// The error number of a netlink answer.
pub(super) fn errno(error: &io::Error) -> Option<Errno> {
    error.raw_os_error().map(Errno::from_raw)
}

fn creation(name: &str, mtu: u16) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::Mtu(mtu.into()),
        LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Wireguard)]),
    ];
    message
}

fn with_index(index: u32) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message
}

fn parse(payload: &[u8]) -> io::Result<Link> {
    let cut = || invalid("an interface's answer is cut");
    let header: &[u8; HEADER_BYTES] = payload.first_chunk().ok_or_else(cut)?;
    let index = header[INDEX_AT..].first_chunk().copied().ok_or_else(cut)?;
    let mut link = Link { index: u32::from_ne_bytes(index), ..Link::default() };
    for attribute in NlasIterator::new(&payload[HEADER_BYTES..]) {
        let attribute = attribute.map_err(|_| cut())?;
        let value = attribute.value();
        match attribute.kind() & !NLA_F_NESTED {
            IFLA_IFNAME => link.name = text(value),
            IFLA_IFALIAS => link.alias = text(value),
            IFLA_LINKINFO => {
                for inner in NlasIterator::new(value) {
                    let inner = inner.map_err(|_| cut())?;
                    if inner.kind() == IFLA_INFO_KIND {
                        link.kind = text(inner.value());
                    }
                }
            }
            IFLA_STATS64 => {
                let stat = |place: usize| {
                    let bytes = value.get(place * 8..).and_then(|rest| rest.first_chunk());
                    bytes.map_or(0, |bytes| u64::from_ne_bytes(*bytes))
                };
                link.errors = LinkErrors {
                    rx: stat(STAT_RX_ERRORS),
                    rx_frame: stat(STAT_RX_FRAME_ERRORS),
                    tx: stat(STAT_TX_ERRORS),
                    tx_dropped: stat(STAT_TX_DROPPED),
                };
            }
            _ => {}
        }
    }
    Ok(link)
}

/// Text up to its final zero.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::super::netlink::encode;
    use super::*;
    use netlink_packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkHeader};
    use proptest::collection::vec;
    use proptest::prelude::*;

    /// `strace -e sendmsg -xx ip link add wg7 mtu 1420 type wireguard` but for the sequence number, and with
    /// the attributes in our order.
    #[cfg(target_endian = "little")]
    #[test]
    fn creating_an_interface_is_what_iproute2_sends() {
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
        let bytes = encode(header, RouteNetlinkMessage::NewLink(creation("wg7", 1420)));
        let expected = [
            &[0x44, 0, 0, 0, 0x10, 0, 0x05, 0x06, 0, 0, 0, 0, 0, 0, 0, 0][..],
            &[0; 16],
            &[8, 0, 3, 0, b'w', b'g', b'7', 0],
            &[8, 0, 4, 0, 0x8c, 0x05, 0, 0],
            &[20, 0, 18, 0, 14, 0, 1, 0],
            b"wireguard\0\0\0",
        ]
        .concat();
        assert_eq!(bytes[..], expected[..]);
    }

    #[test]
    fn an_interface_is_read_with_kind_alias_and_errors() {
        let mut payload = vec![0; HEADER_BYTES];
        payload[INDEX_AT..8].copy_from_slice(&7_u32.to_ne_bytes());
        let mut attribute = |kind: u16, value: &[u8]| {
            payload.extend(((4 + value.len()) as u16).to_ne_bytes());
            payload.extend(kind.to_ne_bytes());
            payload.extend(value);
            payload.resize(payload.len().next_multiple_of(4), 0);
        };
        attribute(IFLA_IFNAME, b"wg7\0");
        attribute(IFLA_IFALIAS, b"mesh-tunnel x");
        let kind = [&14_u16.to_ne_bytes()[..], &1_u16.to_ne_bytes(), b"wireguard\0\0\0"].concat();
        attribute(IFLA_LINKINFO | NLA_F_NESTED, &kind);
        let stats: Vec<u8> = (0..24_u64).flat_map(u64::to_ne_bytes).collect();
        attribute(IFLA_STATS64, &stats);
        let errors = LinkErrors { rx: 4, rx_frame: 13, tx: 5, tx_dropped: 7 };
        let (name, kind, alias) = ("wg7".into(), "wireguard".into(), "mesh-tunnel x".into());
        assert_eq!(parse(&payload).unwrap(), Link { index: 7, name, kind, alias, errors });
        assert!(parse(&payload[..10]).is_err());
    }

    proptest! {
        /// Nothing is read that does not stand in the answer.
        #[test]
        fn any_answer_is_read_or_refused(
            bytes in vec(any::<u8>(), 0..200),
            heads in vec((4_usize..50, 0_u16..24, prop_oneof![Just(IFLA_IFNAME), Just(IFLA_IFALIAS), Just(IFLA_LINKINFO)]), 0..8),
        ) {
            let mut bytes = bytes;
            // Plausible lengths and kinds, so that the inner levels are reached.
            for (at, length, kind) in heads {
                if let Some(place) = bytes.get_mut(at * 4..at * 4 + 4) {
                    place[..2].copy_from_slice(&length.to_ne_bytes());
                    place[2..].copy_from_slice(&kind.to_ne_bytes());
                }
            }
            let Ok(link) = parse(&bytes) else { return Ok(()) };
            prop_assert_eq!(&link.index.to_ne_bytes()[..], &bytes[INDEX_AT..INDEX_AT + 4]);
            for read in [&link.name, &link.alias, &link.kind] {
                prop_assert!(!read.contains('\0'));
                let stands = bytes[HEADER_BYTES..].windows(read.len().max(1)).any(|part| part == read.as_bytes());
                prop_assert!(read.is_empty() || read.contains(char::REPLACEMENT_CHARACTER) || stands, "{read:?}");
            }
        }
    }
}
