//! The little we need to know of inner IP packets and of WireGuard's messages. Pure functions on bytes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::offload::checksum;

/// Header, counter and tag around an inner packet, bytes. WireGuard paper §5.4.6.
pub(crate) const DATA_OVERHEAD: usize = 32;
/// Handshake initiation, response and cookie reply, bytes. WireGuard paper §5.4.2, §5.4.3, §5.4.7.
pub(crate) const INITIATION_BYTES: usize = 148;
pub(crate) const RESPONSE_BYTES: usize = 92;
pub(crate) const COOKIE_REPLY_BYTES: usize = 64;
/// Inner packets are padded to a multiple of this, bytes. WireGuard paper §5.4.6.
const PADDING: usize = 16;
/// Largest UDP payload, bytes: 65535 less IPv4 and UDP headers.
pub(crate) const DATAGRAM_MAX: usize = 65_507;
/// Counters from here on are refused, as the sender must have made a new session long before.
/// WireGuard paper §6.1: 2^64 - 2^13 - 1.
const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);

/// The kind of a datagram, by its first bytes and its length only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Message {
    Initiation,
    /// Answers to us; the receiver index is ours.
    Response {
        receiver: u32,
    },
    CookieReply {
        receiver: u32,
    },
    Data {
        receiver: u32,
    },
}

impl Message {
    /// `None` for everything that no WireGuard peer sends.
    pub(crate) fn parse(datagram: &[u8]) -> Option<Self> {
        match (u32_at(datagram, 0)?, datagram.len()) {
            (1, INITIATION_BYTES) => Some(Self::Initiation),
            (2, RESPONSE_BYTES) => Some(Self::Response { receiver: u32_at(datagram, 8)? }),
            (3, COOKIE_REPLY_BYTES) => Some(Self::CookieReply { receiver: u32_at(datagram, 4)? }),
            (4, DATA_OVERHEAD..=DATAGRAM_MAX) => {
                let counter = u64::from(u32_at(datagram, 8)?) | u64::from(u32_at(datagram, 12)?) << 32;
                let receiver = u32_at(datagram, 4)?;
                (counter < REJECT_AFTER_MESSAGES).then_some(Self::Data { receiver })
            }
            _ => None,
        }
    }
}

/// Whether a datagram claims to be WireGuard's: a message type and three zeros. STUN (RFC 8489 §5) and
/// TLS never begin like that.
pub(crate) fn is_wireguard(datagram: &[u8]) -> bool {
    matches!(u32_at(datagram, 0), Some(1..=4))
}

/// Sender index of a handshake initiation or response.
pub(crate) fn sender_index(handshake: &[u8]) -> Option<u32> {
    u32_at(handshake, 4)
}

/// Destination of an IP packet; `None` if it is not one, is cut short, or is longer than it says.
pub(crate) fn destination(packet: &[u8]) -> Option<IpAddr> {
    (ip_length(packet)? == packet.len()).then_some(())?;
    match packet[0] >> 4 {
        4 => Some(Ipv4Addr::from(array_at::<4>(packet, 16)?).into()),
        _ => Some(Ipv6Addr::from(array_at::<16>(packet, 24)?).into()),
    }
}

/// Which part of a datagram an IP packet is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fragment {
    /// The whole of it, or we cannot tell.
    No,
    /// Any but the last.
    First,
    Last,
}

impl Fragment {
    /// Of a whole packet (RFC 791 §3.1, RFC 8200 §4.5). Behind other extension headers it is not looked for.
    pub(crate) fn of(packet: &[u8]) -> Self {
        let (offset, more) = match packet.first().map(|first| first >> 4) {
            Some(4) if packet.len() >= 20 => {
                let field = u16::from_be_bytes([packet[6], packet[7]]);
                (field & 0x1fff, field & 0x2000 != 0)
            }
            Some(6) if packet.len() >= 48 && packet[6] == FRAGMENT_HEADER => {
                let field = u16::from_be_bytes([packet[42], packet[43]]);
                (field & 0xfff8, field & 1 != 0)
            }
            _ => return Self::No,
        };
        match (offset, more) {
            (_, true) => Self::First,
            (0, false) => Self::No,
            (_, false) => Self::Last,
        }
    }
}

/// RFC 8200 §4.5.
const FRAGMENT_HEADER: u8 = 44;

/// Length an IP packet says it has, bytes, if it has a whole header and says no less than that.
pub(crate) fn ip_length(packet: &[u8]) -> Option<usize> {
    match packet.first()? >> 4 {
        4 if packet.len() >= 20 => {
            let header = usize::from(packet[0] & 0x0f) * 4;
            let length = usize::from(u16::from_be_bytes(array_at(packet, 2)?));
            (header >= 20 && length >= header).then_some(length)
        }
        6 if packet.len() >= 40 => Some(usize::from(u16::from_be_bytes(array_at(packet, 4)?)) + 40),
        _ => None,
    }
}

/// The type of service (RFC 2474, RFC 3168) of the datagram that carries an inner packet: the inner ECN
/// bits, with "congestion experienced" as ECT(0), since that is for the inner ends; no DSCP, which would
/// tell the path what is inside. As the kernel's WireGuard does (`ip_tunnel_ecn_encap`).
pub(crate) fn outer_tos(packet: &[u8]) -> u8 {
    match ecn(packet) {
        ECN_CE => ECN_ECT0,
        other => other,
    }
}

/// Type of service of handshake messages: AF41, as the kernel's WireGuard sends them.
pub(crate) const HANDSHAKE_TOS: u8 = 0x88;
const ECN_MASK: u8 = 3;
const ECN_ECT0: u8 = 2;
pub(crate) const ECN_CE: u8 = 3;

fn ecn(packet: &[u8]) -> u8 {
    match packet {
        [first, second, ..] if first >> 4 == 4 => second & ECN_MASK,
        [first, second, ..] if first >> 4 == 6 => second >> 4 & ECN_MASK,
        _ => 0,
    }
}

/// Marks an inner packet as having met congestion, if its ends can tell (RFC 6040 §4.2). One that cannot
/// stays as it is. `packet` is whole.
pub(crate) fn set_congested(packet: &mut [u8]) {
    if matches!(ecn(packet), 0 | ECN_CE) || ip_length(packet).is_none() {
        return;
    }
    if packet[0] >> 4 == 6 {
        packet[1] |= ECN_CE << 4;
        return;
    }
    let word = |packet: &[u8]| u16::from_be_bytes([packet[0], packet[1]]);
    let before = word(packet);
    packet[1] |= ECN_CE;
    // RFC 1624 §3: the new checksum from the old one.
    let sum = u16::from_be_bytes([packet[10], packet[11]]);
    let changed = checksum::add(checksum::add(!sum, !before), word(packet));
    packet[10..12].copy_from_slice(&(!changed).to_be_bytes());
}

/// Length to which a packet of `length` bytes is padded: a multiple of 16, but never beyond the MTU.
pub(crate) fn padded(length: usize, mtu: usize) -> usize {
    length.next_multiple_of(PADDING).min(mtu.max(length))
}

/// The address behind an IPv4-mapped IPv6 one (RFC 4291 §2.5.5.2).
pub(crate) fn unmapped(address: std::net::SocketAddr) -> std::net::SocketAddr {
    std::net::SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    array_at(bytes, at).map(u32::from_le_bytes)
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ipv4(length: u16, bytes: usize) -> Vec<u8> {
        let mut packet = vec![0; bytes];
        packet[0] = 0x45;
        packet[2..4].copy_from_slice(&length.to_be_bytes());
        packet[16..20].copy_from_slice(&[192, 0, 2, 9]);
        packet
    }

    #[test]
    fn destinations_are_read_only_from_whole_packets() {
        let table = [
            (ipv4(28, 28), Some("192.0.2.9".parse().unwrap())),
            (ipv4(29, 28), None),
            (ipv4(27, 28), None),
            (ipv4(19, 20), None),
            (vec![0x45; 19], None),
            (vec![0x60; 39], None),
            (vec![0x55; 60], None),
            (Vec::new(), None),
        ];
        for (packet, expected) in table {
            assert_eq!(destination(&packet), expected, "{packet:?}");
        }
        let mut short_header = ipv4(28, 28);
        short_header[0] = 0x44;
        assert_eq!(destination(&short_header), None);
        let mut six = vec![0; 48];
        six[0] = 0x60;
        six[5] = 8;
        six[39] = 1;
        assert_eq!(destination(&six), Some("::1".parse().unwrap()));
    }

    #[test]
    fn fragments_are_told_apart() {
        let table = [
            (0, Fragment::No),
            (0x4000, Fragment::No),
            (0x2000, Fragment::First),
            (0x20b9, Fragment::First),
            (0xb9, Fragment::Last),
        ];
        for (field, expected) in table {
            let mut packet = ipv4(28, 28);
            packet[6..8].copy_from_slice(&u16::to_be_bytes(field));
            assert_eq!(Fragment::of(&packet), expected, "{field:x}");
        }
        for (field, expected) in
            [(0_u16, Fragment::No), (1, Fragment::First), (0x1009, Fragment::First), (0x1008, Fragment::Last)]
        {
            let mut packet = vec![0; 48];
            (packet[0], packet[6]) = (0x60, FRAGMENT_HEADER);
            packet[42..44].copy_from_slice(&field.to_be_bytes());
            assert_eq!(Fragment::of(&packet), expected, "{field:x}");
            packet[6] = 17;
            assert_eq!(Fragment::of(&packet), Fragment::No);
        }
        assert_eq!(Fragment::of(&[]), Fragment::No);
    }

    #[test]
    fn padding_stops_at_the_mtu() {
        for (length, expected) in [(0, 0), (1, 16), (16, 16), (1407, 1408), (1409, 1420), (1420, 1420)] {
            assert_eq!(padded(length, 1420), expected);
        }
        assert_eq!(padded(1500, 1420), 1500);
    }

    /// RFC 6040 §4.1 and §4.2, as far as the kernel's WireGuard goes.
    #[test]
    fn congestion_marks_cross_the_tunnel() {
        for (inner, outer, after_congestion) in [(0, 0, 0), (1, 1, 3), (2, 2, 3), (3, 2, 3)] {
            let mut four = ipv4(28, 28);
            four[1] = 0xb8 | inner;
            let sum = !checksum::sum(&four[..20], 0);
            four[10..12].copy_from_slice(&sum.to_be_bytes());
            let mut six = vec![0; 48];
            (six[0], six[1], six[5]) = (0x6b, 0x80 | inner << 4 | 0x0f, 8);
            for (packet, marked) in
                [(&mut four, 0xb8 | after_congestion), (&mut six, 0x8f | after_congestion << 4)]
            {
                assert_eq!(outer_tos(packet), outer);
                set_congested(packet);
                assert_eq!(packet[1], marked, "inner {inner}");
            }
            assert_eq!(checksum::sum(&four[..20], 0), 0xffff);
        }
    }

    #[test]
    fn messages_have_their_exact_length() {
        for (kind, length) in [(1, 148), (2, 92), (3, 64), (4, 32), (4, 1452), (4, 65_507)] {
            let mut datagram = vec![0; length];
            datagram[0] = kind;
            assert!(Message::parse(&datagram).is_some(), "type {kind} length {length}");
            datagram[3] = 1;
            assert_eq!(Message::parse(&datagram), None, "reserved bytes of type {kind}");
        }
        let mut last_counter = vec![0xff; 32];
        last_counter[..4].copy_from_slice(&[4, 0, 0, 0]);
        assert_eq!(Message::parse(&last_counter), None);
    }

    proptest! {
        /// What is read of any bytes holds for them, and a mark changes nothing else.
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(Message::parse(&bytes).is_none() || is_wireguard(&bytes));
            prop_assert_eq!(sender_index(&bytes).is_some(), bytes.len() >= 8);
            let length = ip_length(&bytes);
            prop_assert!(length.is_none_or(|length| length >= 20));
            prop_assert!(destination(&bytes).is_none() || length == Some(bytes.len()));
            prop_assert!(Fragment::of(&bytes) == Fragment::No || bytes.len() >= 20);
            prop_assert!(outer_tos(&bytes) < ECN_CE);
            let mut marked = bytes.clone();
            set_congested(&mut marked);
            for (at, (before, after)) in bytes.iter().zip(&marked).enumerate() {
                prop_assert!(before == after || matches!(at, 1 | 10 | 11), "byte {at}");
            }
        }
    }
}
