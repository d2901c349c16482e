//! Packets from the network that belong together, put together, so that the host's stack handles one
//! instead of forty.
//!
//! Only what [`split`](super::split) would undo exactly is merged: TCP segments and UDP datagrams of one
//! flow, in order, alike in every header field but the counting ones, of one size (the last may be
//! shorter), with good checksums. Everything else passes as it is. The order of packets within a
//! flow is kept; the order between flows is not.

use std::ops::Range;

use super::virtio::{GSO_TCP4, GSO_TCP6, GSO_UDP, Header, NEEDS_CHECKSUM};
use super::{TCP, UDP, be16, be32, checksum, put16, tcp_flags};
use crate::packet::Fragment;

/// Flows that are open for more at the same time; the longest unused one is closed for another.
const FLOWS: usize = 16;
/// Packets that the kernel takes in one. Its UDP limit is 64; TCP has none but the length.
pub(crate) const PACKETS_MAX: usize = 64;
/// Length of a merged packet, bytes; it must fit IPv4's length field.
const LENGTH_MAX: usize = 65_535;
/// Headers of what may be merged, bytes: IPv6 and TCP with all options.
const HEADERS_MAX: usize = 40 + 60;
const DONT_FRAGMENT: u16 = 0x4000;
const RESERVED_FRAGMENT_BIT: u16 = 0x8000;

/// One packet to be written: the packets of a batch in it, chained by [`Plan::next`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Group {
    pub(crate) first: usize,
    last: usize,
    pub(crate) count: usize,
    length: usize,
    shape: Option<Shape>,
    /// The first packet's checksums; looked at when a second one wants to join.
    good: Option<bool>,
}

/// What is known of a packet that may be merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shape {
    transport: usize,
    headers: usize,
    /// Payload bytes of the first packet, and so of all but the last.
    size: usize,
    is_tcp: bool,
    /// Next sequence number that continues the group (TCP).
    sequence: u32,
    /// Identification of the next packet that continues the group (IPv4 without "don't fragment").
    id: u16,
    /// Nothing may follow.
    closed: bool,
}

/// What the interface takes in one piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Kinds {
    pub(crate) tcp: bool,
    pub(crate) udp: bool,
}

/// Decides what becomes one packet. Keeps its memory between batches.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    groups: Vec<Group>,
    next: Vec<usize>,
    /// Open groups, the latest used last.
    open: Vec<usize>,
}

impl Plan {
    /// Plans for the packets at `ranges` of `arena`.
    pub(crate) fn make(&mut self, arena: &[u8], ranges: &[Range<usize>], kinds: Kinds) {
        self.groups.clear();
        self.open.clear();
        self.next.clear();
        self.next.resize(ranges.len(), usize::MAX);
        for (index, range) in ranges.iter().enumerate() {
            self.place(arena, ranges, index, &arena[range.clone()], kinds);
        }
    }

    /// The groups of the last plan.
    pub(crate) fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// The packets of a group after its first.
    pub(crate) fn rest(&self, group: &Group) -> impl Iterator<Item = usize> {
        std::iter::successors(Some(group.first), |at| Some(self.next[*at])).take(group.count).skip(1)
    }

    fn place(&mut self, arena: &[u8], ranges: &[Range<usize>], index: usize, packet: &[u8], kinds: Kinds) {
        let flow = Flow::of(packet);
        if Fragment::of(packet) != Fragment::No {
            // Its flow is not known, but must not pass it.
            let apart = |open: &usize| {
                addresses(&arena[ranges[self.groups[*open].first].clone()]) != addresses(packet)
            };
            self.open.retain(apart);
        }
        let shape = flow
            .as_ref()
            .and_then(|flow| flow.shape(packet))
            .filter(|shape| if shape.is_tcp { kinds.tcp } else { kinds.udp });
        if let Some(flow) = &flow
            && let Some(slot) = self.open.iter().position(|open| {
                let first = &arena[ranges[self.groups[*open].first].clone()];
                Flow::of(first).is_some_and(|other| other.same(flow))
            })
        {
            let open = self.open.remove(slot);
            let group = &mut self.groups[open];
            let first = &arena[ranges[group.first].clone()];
            if let Some(shape) = shape
                && group.takes(first, packet, &shape)
            {
                self.append(open, index, packet, &shape);
                return;
            }
            // Of this flow, but no continuation: whatever follows goes behind it, into another group.
        }
        self.begin(index, packet, shape);
    }

    fn append(&mut self, open: usize, index: usize, packet: &[u8], shape: &Shape) {
        let group = &mut self.groups[open];
        self.next[group.last] = index;
        group.last = index;
        group.count += 1;
        group.length += shape.size;
        let so_far = group.shape.as_mut().expect("an open group has a shape");
        so_far.sequence = shape.sequence;
        so_far.id = shape.id;
        so_far.closed = shape.closed || shape.size < so_far.size || group.count == PACKETS_MAX;
        debug_assert!(packet.len() == shape.headers + shape.size);
        if !so_far.closed {
            self.open.push(open);
        }
    }

    fn begin(&mut self, index: usize, packet: &[u8], shape: Option<Shape>) {
        self.groups.push(Group {
            first: index,
            last: index,
            count: 1,
            length: packet.len(),
            shape,
            good: None,
        });
        if shape.is_some_and(|shape| !shape.closed) {
            if self.open.len() == FLOWS {
                self.open.remove(0);
            }
            self.open.push(self.groups.len() - 1);
        }
    }
}

impl Group {
    /// Whether `packet` of the same flow continues this group, whose first packet is `first`.
    fn takes(&mut self, first: &[u8], packet: &[u8], shape: &Shape) -> bool {
        let Some(own) = self.shape else { return false };
        let counts = if own.is_tcp { be32(packet, own.transport + 4) == own.sequence } else { true };
        own.headers == shape.headers
            && own.is_tcp == shape.is_tcp
            && shape.size <= own.size
            && counts
            && self.length + shape.size <= LENGTH_MAX
            && same_headers(first, packet, &own)
            && continues_ids(packet, own.id)
            && *self.good.get_or_insert_with(|| has_good_checksum(first, &own))
            && has_good_checksum(packet, shape)
    }

    /// Turns the headers of the group's first packet into those of the whole, and says what header goes
    /// before it. A group of one is left as it is.
    pub(crate) fn finish(&self, first: &mut [u8], last_flags: u8) -> Header {
        let Some(shape) = self.shape.filter(|_| self.count > 1) else { return Header::default() };
        let transport_length = (self.length - shape.transport) as u16;
        let (addresses, kind) = match first[0] >> 4 {
            4 => {
                put16(first, 2, self.length as u16);
                put16(first, 10, 0);
                let sum = checksum::sum(&first[..20], 0);
                put16(first, 10, !sum);
                (12..20, GSO_TCP4)
            }
            _ => {
                put16(first, 4, (self.length - 40) as u16);
                (8..40, GSO_TCP6)
            }
        };
        let (protocol, field) = if shape.is_tcp { (TCP, 16) } else { (UDP, 6) };
        if shape.is_tcp {
            first[shape.transport + 13] |= last_flags;
        } else {
            put16(first, shape.transport + 4, transport_length);
        }
        let pseudo = checksum::pseudo_header(&first[addresses], protocol, transport_length);
        put16(first, shape.transport + field, pseudo);
        Header {
            flags: NEEDS_CHECKSUM,
            gso_type: if shape.is_tcp { kind } else { GSO_UDP },
            header_length: shape.headers as u16,
            gso_size: shape.size as u16,
            checksum_start: shape.transport as u16,
            checksum_offset: field as u16,
        }
    }

    /// The headers of the group's first packet, for [`restore`](Self::restore) after
    /// [`finish`](Self::finish).
    pub(crate) fn save(&self, first: &[u8]) -> [u8; HEADERS_MAX] {
        let mut saved = [0; HEADERS_MAX];
        let headers = self.changed();
        saved[..headers].copy_from_slice(&first[..headers]);
        saved
    }

    pub(crate) fn restore(&self, first: &mut [u8], saved: &[u8; HEADERS_MAX]) {
        let headers = self.changed();
        first[..headers].copy_from_slice(&saved[..headers]);
    }

    fn changed(&self) -> usize {
        if self.count > 1 { self.headers() } else { 0 }
    }

    /// Bytes of headers to leave out of every packet but the first.
    pub(crate) fn headers(&self) -> usize {
        self.shape.map_or(0, |shape| shape.headers)
    }

    /// Flags that only the last packet of a group may have, and that the whole gets from it.
    pub(crate) fn closing_flags(&self, last: &[u8]) -> u8 {
        match self.shape {
            Some(shape) if shape.is_tcp => last[shape.transport + 13] & tcp_flags::PSH,
            _ => 0,
        }
    }

    pub(crate) fn last(&self) -> usize {
        self.last
    }
}

/// Source and destination of a whole IP packet.
fn addresses(packet: &[u8]) -> Option<&[u8]> {
    if packet.first()? >> 4 == 4 { packet.get(12..20) } else { packet.get(8..40) }
}

/// What a packet is part of: addresses, protocol and ports.
struct Flow<'a> {
    addresses: &'a [u8],
    protocol: u8,
    ports: &'a [u8],
    transport: usize,
}

impl<'a> Flow<'a> {
    /// `None` if it is no TCP or UDP packet, or a fragment, or has options or extension headers.
    fn of(packet: &'a [u8]) -> Option<Self> {
        let (transport, protocol, addresses, length) = match packet.first()? {
            0x45 if packet.len() >= 28 => {
                let fragment = be16(packet, 6) & !(DONT_FRAGMENT | RESERVED_FRAGMENT_BIT);
                if fragment != 0 {
                    return None;
                }
                (20, packet[9], &packet[12..20], usize::from(be16(packet, 2)))
            }
            first if first >> 4 == 6 && packet.len() >= 48 => {
                (40, packet[6], &packet[8..40], usize::from(be16(packet, 4)) + 40)
            }
            _ => return None,
        };
        let known = protocol == TCP || protocol == UDP;
        (known && length == packet.len()).then(|| Self {
            addresses,
            protocol,
            ports: &packet[transport..transport + 4],
            transport,
        })
    }

    fn same(&self, other: &Flow<'_>) -> bool {
        self.ports == other.ports && self.protocol == other.protocol && self.addresses == other.addresses
    }

    /// `None` if the packet must stay alone.
    fn shape(&self, packet: &[u8]) -> Option<Shape> {
        let at = self.transport;
        let is_tcp = self.protocol == TCP;
        let (own, closed) = if is_tcp {
            if packet.len() < at + 20 {
                return None;
            }
            let flags = packet[at + 13];
            let plain = flags & !tcp_flags::PSH == tcp_flags::ACK;
            // The four reserved bits and the urgent pointer must be as usual.
            if !plain || packet[at + 12] & 0x0f != 0 || be16(packet, at + 18) != 0 {
                return None;
            }
            (usize::from(packet[at + 12] >> 4) * 4, flags & tcp_flags::PSH != 0)
        } else {
            let length = usize::from(be16(packet, at + 4));
            // Without a checksum there is nothing to verify.
            if length != packet.len() - at || be16(packet, at + 6) == 0 {
                return None;
            }
            (8, false)
        };
        let headers = at + own;
        let size = packet.len().checked_sub(headers).filter(|size| *size > 0)?;
        let four = packet[0] >> 4 == 4;
        if (is_tcp && own < 20) || (four && be16(packet, 6) & RESERVED_FRAGMENT_BIT != 0) {
            return None;
        }
        Some(Shape {
            transport: at,
            headers,
            size,
            is_tcp,
            sequence: if is_tcp { be32(packet, at + 4).wrapping_add(size as u32) } else { 0 },
            id: if four { be16(packet, 4).wrapping_add(1) } else { 0 },
            closed,
        })
    }
}

/// Whether two packets of one flow agree in all that `split` copies from the first.
fn same_headers(first: &[u8], packet: &[u8], shape: &Shape) -> bool {
    let ip = if first[0] >> 4 == 4 {
        // Type of service; flags; time to live.
        first[1] == packet[1] && first[6..9] == packet[6..9]
    } else {
        // Traffic class and flow label; hop limit.
        first[..4] == packet[..4] && first[7] == packet[7]
    };
    let at = shape.transport;
    // Acknowledgement, data offset, window, options. Flags were looked at.
    ip && (!shape.is_tcp
        || (first[at + 8..at + 13] == packet[at + 8..at + 13]
            && first[at + 14..at + 16] == packet[at + 14..at + 16]
            && first[at + 20..shape.headers] == packet[at + 20..shape.headers]))
}

/// Whether the identification is what `split` would give. With "don't fragment" it means nothing (RFC
/// 6864 §4), and some hosts leave it zero.
fn continues_ids(packet: &[u8], expected: u16) -> bool {
    packet[0] >> 4 == 6 || be16(packet, 6) & DONT_FRAGMENT != 0 || be16(packet, 4) == expected
}

/// Whether the checksums of IP and transport are right. The host will not look again.
fn has_good_checksum(packet: &[u8], shape: &Shape) -> bool {
    let four = packet[0] >> 4 == 4;
    let addresses = if four { &packet[12..20] } else { &packet[8..40] };
    let protocol = if shape.is_tcp { TCP } else { UDP };
    let length = (packet.len() - shape.transport) as u16;
    let pseudo = checksum::pseudo_header(addresses, protocol, length);
    (!four || checksum::sum(&packet[..20], 0) == 0xffff)
        && checksum::sum(&packet[shape.transport..], pseudo) == 0xffff
}

#[cfg(test)]
mod tests {
    use super::super::sample::{Sample, any_traffic};
    use super::super::split::Segments;
    use super::*;
    use proptest::prelude::*;

    /// What the interface would be given: a header and one packet each.
    fn merge(packets: &[Vec<u8>], udp: bool) -> Vec<(Header, Vec<u8>)> {
        let (mut arena, mut ranges) = (Vec::new(), Vec::new());
        for packet in packets {
            ranges.push(arena.len()..arena.len() + packet.len());
            arena.extend_from_slice(packet);
        }
        let mut plan = Plan::default();
        plan.make(&arena, &ranges, Kinds { tcp: true, udp });
        let write = |group: &Group| {
            let flags = group.closing_flags(&arena[ranges[group.last()].clone()]);
            let mut whole = arena[ranges[group.first].clone()].to_vec();
            let saved = group.save(&whole);
            let header = group.finish(&mut whole, flags);
            let mut restored = whole.clone();
            group.restore(&mut restored, &saved);
            assert_eq!(restored, arena[ranges[group.first].clone()]);
            for index in plan.rest(group) {
                whole.extend_from_slice(&arena[ranges[index].clone()][group.headers()..]);
            }
            (header, whole)
        };
        plan.groups().iter().map(write).collect()
    }

    fn split(header: &Header, mut packet: Vec<u8>) -> Vec<Vec<u8>> {
        let mut segments = Segments::new(header, &mut packet).expect("what was merged can be split");
        let mut out = vec![0; 70_000];
        std::iter::from_fn(|| segments.write_next(&mut out).map(|length| out[..length].to_vec())).collect()
    }

    fn of_flow(packets: &[Vec<u8>], flow: &Vec<u8>) -> Vec<Vec<u8>> {
        packets.iter().filter(|packet| flow_key(packet) == *flow).cloned().collect()
    }

    fn flow_key(packet: &[u8]) -> Vec<u8> {
        Flow::of(packet).map_or_else(Vec::new, |flow| [flow.addresses, flow.ports, &[flow.protocol]].concat())
    }

    proptest! {
        /// Splitting what was merged gives every packet back, byte for byte, in order within its flow.
        #[test]
        fn split_undoes_merge(packets in any_traffic(), udp: bool) {
            let merged = merge(&packets, udp);
            let back: Vec<Vec<u8>> =
                merged.into_iter().flat_map(|(header, packet)| split(&header, packet)).collect();
            prop_assert_eq!(back.len(), packets.len());
            for packet in &packets {
                let flow = flow_key(packet);
                prop_assert_eq!(of_flow(&back, &flow), of_flow(&packets, &flow));
            }
        }

        /// Bytes that are no packets at all are passed on as they are.
        #[test]
        fn no_bytes_make_it_panic(packets in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..100), 0..20)) {
            let mut back: Vec<Vec<u8>> = merge(&packets, true).into_iter().map(|(_, packet)| packet).collect();
            let mut packets = packets;
            back.sort();
            packets.sort();
            prop_assert_eq!(back, packets);
        }
    }

    fn stream(v6: bool, count: usize) -> Vec<Vec<u8>> {
        let mut sample = Sample::tcp(v6, 1);
        (0..count).map(|_| sample.next(1000, tcp_flags::ACK)).collect()
    }

    #[test]
    fn forty_segments_of_a_stream_become_one() {
        for v6 in [false, true] {
            let merged = merge(&stream(v6, 40), false);
            assert_eq!(merged.len(), 1);
            let (header, packet) = &merged[0];
            assert_eq!(packet.len(), 40 * 1000 + usize::from(header.header_length));
            assert_eq!((header.gso_size, header.flags), (1000, NEEDS_CHECKSUM));
        }
    }

    #[test]
    fn two_streams_that_alternate_become_two() {
        let (one, mut other) = (stream(false, 10), Sample::tcp(true, 2));
        let mixed: Vec<_> =
            one.into_iter().flat_map(|packet| [packet, other.next(500, tcp_flags::ACK)]).collect();
        assert_eq!(merge(&mixed, false).len(), 2);
    }

    #[test]
    fn datagrams_are_merged_only_where_the_interface_takes_them() {
        let mut sample = Sample::udp(false, 1);
        let packets: Vec<_> = (0..10).map(|_| sample.next(700, 0)).collect();
        assert_eq!(merge(&packets, true).len(), 1);
        assert_eq!(merge(&packets, false).len(), 10);
    }

    #[test]
    fn what_must_not_be_merged_is_not() {
        type Change = fn(&mut Vec<u8>);
        let table: [(&str, Change); 9] = [
            ("payload that does not match its checksum", |p| *p.last_mut().unwrap() ^= 1),
            ("IP header that does not match its checksum", |p| p[10] ^= 1),
            ("other type of service", |p| p[1] = 3),
            ("other time to live", |p| p[8] = 3),
            ("gap in the sequence", |p| p[27] ^= 1),
            ("other acknowledgement", |p| p[31] ^= 1),
            ("other window", |p| p[34] ^= 1),
            ("SYN", |p| p[33] |= 2),
            ("fragment", |p| p[6] = 0x20),
        ];
        for (what, change) in table {
            let mut packets = stream(false, 2);
            change(&mut packets[1]);
            if !what.contains("checksum") {
                Sample::repair(&mut packets[1]);
            }
            assert_eq!(merge(&packets, true).len(), 2, "{what}");
        }
    }

    #[test]
    fn nothing_of_its_hosts_passes_a_fragment() {
        for v6 in [false, true] {
            let (mut sample, mut other) = (Sample::udp(v6, 1), Sample::udp(v6, 2));
            let mut packets: Vec<_> = (0..3).map(|_| sample.next(100, 0)).collect();
            if v6 {
                packets[1][6] = 44;
                packets[1][43] = 1;
            } else {
                packets[1][6] = 0x20;
            }
            packets.insert(1, other.next(100, 0));
            packets.push(other.next(100, 0));
            let lengths: Vec<_> = merge(&packets, true).iter().map(|(_, packet)| packet.len()).collect();
            let own = if v6 { 148 } else { 128 };
            assert_eq!(lengths, [own, own + 100, own, own], "flow 2 is of other hosts");
        }
    }

    #[test]
    fn a_push_ends_a_group_and_stays_on_its_end() {
        let mut sample = Sample::tcp(false, 1);
        let flags = [tcp_flags::ACK, tcp_flags::ACK | tcp_flags::PSH, tcp_flags::ACK];
        let packets: Vec<_> = flags.iter().map(|flags| sample.next(100, *flags)).collect();
        let merged = merge(&packets, false);
        assert_eq!(merged.len(), 2);
        assert_eq!(merged[0].1[33], tcp_flags::ACK | tcp_flags::PSH);
    }
}
