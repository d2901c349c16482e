//! One big packet from the interface, cut into packets of the path's size with finished checksums.

use super::virtio::{GSO_ECN, GSO_NONE, GSO_TCP4, GSO_TCP6, GSO_UDP, Header, NEEDS_CHECKSUM};
use super::{be16, be32, checksum, put16, put32, tcp_flags};

/// The segments of one packet, in order.
#[derive(Debug)]
pub(crate) struct Segments<'a> {
    packet: &'a [u8],
    transport: usize,
    /// Bytes of all headers.
    headers: usize,
    size: usize,
    is_tcp: bool,
    /// Payload bytes that were handed out.
    done: usize,
    index: u16,
    finished: bool,
}

impl<'a> Segments<'a> {
    /// `None` if the header and the packet do not fit together. The kernel never does that, but what
    /// it reads a guest or a container may have written.
    pub(crate) fn new(header: &Header, packet: &'a mut [u8]) -> Option<Self> {
        let transport = usize::from(header.checksum_start);
        let (headers, is_tcp) = match header.gso_type & !GSO_ECN {
            GSO_NONE => {
                if header.flags & NEEDS_CHECKSUM != 0 {
                    finish_checksum(packet, transport, usize::from(header.checksum_offset))?;
                }
                (packet.len(), false)
            }
            kind @ (GSO_TCP4 | GSO_TCP6 | GSO_UDP) => {
                let (offset, is_tcp) = if kind == GSO_UDP { (6, false) } else { (16, true) };
                let has_checksum =
                    header.flags & NEEDS_CHECKSUM != 0 && usize::from(header.checksum_offset) == offset;
                let version = packet.first()? >> 4;
                let fits = (version == 4 && kind != GSO_TCP6) || (version == 6 && kind != GSO_TCP4);
                if !has_checksum || !fits || header.gso_size == 0 {
                    return None;
                }
                (headers_length(packet, transport, is_tcp)?, is_tcp)
            }
            _ => return None,
        };
        let size = usize::from(header.gso_size);
        Some(Self {
            packet,
            transport,
            headers,
            size,
            is_tcp,
            done: 0,
            index: 0,
            finished: packet.is_empty(),
        })
    }

    /// The whole, with the headers that all segments get.
    pub(crate) fn packet(&self) -> &[u8] {
        self.packet
    }

    /// Length of the next segment, bytes; `None` at the end.
    pub(crate) fn next_length(&self) -> Option<usize> {
        if self.finished {
            return None;
        }
        Some(self.headers + (self.packet.len() - self.headers - self.done).min(self.payload_limit()))
    }

    /// Writes the next segment to the start of `out`, which must have room for
    /// [`next_length`](Self::next_length) bytes. Its length, or `None` at the end.
    pub(crate) fn write_next(&mut self, out: &mut [u8]) -> Option<usize> {
        let length = self.next_length()?;
        let out = &mut out[..length];
        let from = self.headers + self.done;
        out[..self.headers].copy_from_slice(&self.packet[..self.headers]);
        out[self.headers..].copy_from_slice(&self.packet[from..from + length - self.headers]);
        let last = from + length - self.headers == self.packet.len();
        if self.size != 0 && self.headers != self.packet.len() {
            self.adjust(out, last);
        }
        self.done += length - self.headers;
        self.index = self.index.wrapping_add(1);
        self.finished = last;
        Some(length)
    }

    fn payload_limit(&self) -> usize {
        if self.size == 0 { usize::MAX } else { self.size }
    }

    /// Makes the headers of `segment` true: they are still those of the whole packet.
    fn adjust(&self, segment: &mut [u8], last: bool) {
        let length = segment.len();
        if segment[0] >> 4 == 4 {
            put16(segment, 2, length as u16);
            let id = be16(segment, 4).wrapping_add(self.index);
            put16(segment, 4, id);
            put16(segment, 10, 0);
            let header = usize::from(segment[0] & 0x0f) * 4;
            let sum = checksum::sum(&segment[..header], 0);
            put16(segment, 10, !sum);
        } else {
            put16(segment, 4, (length - 40) as u16);
        }
        let at = self.transport;
        if self.is_tcp {
            let sequence = be32(segment, at + 4).wrapping_add(self.done as u32);
            put32(segment, at + 4, sequence);
            if !last {
                segment[at + 13] &= !(tcp_flags::FIN | tcp_flags::PSH);
            }
            if self.index != 0 {
                segment[at + 13] &= !tcp_flags::CWR;
            }
        } else {
            put16(segment, at + 4, (length - at) as u16);
        }
        // The field holds the sum of the pseudo-header, with the length of the whole packet in it.
        let field = at + if self.is_tcp { 16 } else { 6 };
        let (whole, own) = ((self.packet.len() - at) as u16, (length - at) as u16);
        let pseudo = checksum::add(checksum::add(be16(segment, field), !whole), own);
        put16(segment, field, 0);
        let sum = !checksum::sum(&segment[at..], pseudo);
        // A UDP checksum of zero would mean "none" (RFC 768).
        put16(segment, field, if sum == 0 && !self.is_tcp { 0xffff } else { sum });
    }
}

/// Bytes of the IP and transport headers of a packet with segments, if they are all there.
fn headers_length(packet: &[u8], transport: usize, is_tcp: bool) -> Option<usize> {
    let ip = match packet[0] >> 4 {
        4 => usize::from(packet[0] & 0x0f) * 4,
        _ => 40,
    };
    let ends = if packet[0] >> 4 == 4 { transport == ip && ip >= 20 } else { transport >= ip };
    let own = if is_tcp { usize::from(*packet.get(transport + 12)? >> 4) * 4 } else { 8 };
    let headers = transport + own;
    // Something must follow, and every length must fit its field.
    (ends && (!is_tcp || own >= 20) && packet.len() > headers && packet.len() <= 65_535 + 40)
        .then_some(headers)
}

fn finish_checksum(packet: &mut [u8], start: usize, offset: usize) -> Option<()> {
    let field = start + offset;
    if packet.len() < field + 2 {
        return None;
    }
    // The field holds the sum of the pseudo-header, so it takes part like any other word.
    let sum = !checksum::sum(&packet[start..], 0);
    put16(packet, field, if sum == 0 && offset == 6 { 0xffff } else { sum });
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Whatever header comes with whatever bytes: an answer, no panic, and no byte too many.
        #[test]
        fn no_input_makes_it_panic(
            bytes: [u8; 10], kind in prop_oneof![Just(0_u8), Just(1), Just(4), Just(5), any::<u8>()],
            start in 0..64_u16, size in 0..200_u16, version in prop_oneof![Just(0x45_u8), Just(0x60), any::<u8>()],
            packet in proptest::collection::vec(any::<u8>(), 0..400),
        ) {
            let mut packet = packet;
            if let Some(first) = packet.first_mut() {
                *first = version;
            }
            let mut header = Header::parse(&bytes);
            (header.gso_type, header.checksum_start, header.gso_size) = (kind, start, size);
            if bytes[8] % 2 == 0 {
                (header.flags, header.checksum_offset) = (NEEDS_CHECKSUM, if kind == GSO_UDP { 6 } else { 16 });
            }
            let length = packet.len();
            if let Some(mut segments) = Segments::new(&header, &mut packet) {
                let (mut out, mut payload) = (vec![0; 70_000], 0);
                while let Some(written) = segments.write_next(&mut out) {
                    prop_assert!(written <= length);
                    payload += written - segments.headers;
                }
                prop_assert_eq!(payload + segments.headers, length);
            }
        }
    }

    /// A datagram whose checksum is left to the device, as the kernel hands it over.
    #[test]
    fn an_unfinished_checksum_is_finished() {
        let mut packet =
            vec![0x45, 0, 0, 32, 0, 0, 0x40, 0, 64, super::super::UDP, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
        packet.extend([0x10, 0, 0x20, 0, 0, 12, 0, 0, b'a', b'b', b'c', b'd']);
        let pseudo = checksum::pseudo_header(&packet[12..20], super::super::UDP, 12);
        put16(&mut packet, 26, pseudo);
        let header =
            Header { flags: NEEDS_CHECKSUM, checksum_start: 20, checksum_offset: 6, ..Header::default() };
        let mut segments = Segments::new(&header, &mut packet).unwrap();
        let mut out = [0; 64];
        assert_eq!(segments.write_next(&mut out), Some(32));
        assert_eq!(segments.write_next(&mut out), None);
        assert_eq!(checksum::sum(&out[20..32], pseudo), 0xffff);
    }
}
