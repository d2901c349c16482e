//! Packets that came as two fragments, made whole again before [`merge`](super::merge) sees them.
//!
//! A datagram a little longer than the interface's MTU crosses the tunnel as a long and a short packet. Whole, many
//! of them can leave as one; in parts each goes through the host's stack alone, twice. Only a first and a last
//! fragment that lie side by side and fit each other exactly are joined, within one batch; nothing is held back.
//! What does not fit passes as it is, and the host does what it always does; so does IPv6, where a host that forwards
//! may not cut again what we had joined (RFC 8200 §5).

use std::ops::Range;

use super::{be16, checksum, put16};
use crate::packet::Fragment;

/// An IPv4 header without options, bytes, and its field of flags and offset. RFC 791 §3.1.
const HEADER: usize = 20;
const MORE_FRAGMENTS: u16 = 0x2000;
const OFFSET: u16 = 0x1fff;
/// Length of a joined packet, bytes.
const LENGTH_MAX: usize = 65_535;

/// Finds pairs. Keeps its memory between batches.
#[derive(Debug, Default)]
pub(crate) struct Joiner {
    /// First fragments without their last, the oldest first.
    firsts: Vec<usize>,
}

impl Joiner {
    /// Joins what belongs together of the packets at `ranges` of `arena`, in the bytes from `used` on. A pair
    /// becomes one packet in the place of its last fragment. What is used then.
    pub(crate) fn join(
        &mut self,
        arena: &mut [u8],
        mut used: usize,
        ranges: &mut Vec<Range<usize>>,
    ) -> usize {
        self.firsts.clear();
        let mut joined = false;
        for index in 0..ranges.len() {
            match Fragment::of(&arena[ranges[index].clone()]) {
                Fragment::No => {}
                Fragment::First => self.firsts.push(index),
                Fragment::Last => {
                    let last = ranges[index].clone();
                    // In order, as a rule: the first of them.
                    let found = self.firsts.iter().position(|first| {
                        belong_together(&arena[ranges[*first].clone()], &arena[last.clone()])
                    });
                    let Some(at) = found else { continue };
                    let first = ranges[self.firsts[at]].clone();
                    let Some(length) = write(arena, used, first, last) else { continue };
                    ranges[self.firsts.remove(at)] = 0..0;
                    ranges[index] = used..used + length;
                    used += length;
                    joined = true;
                }
            }
        }
        if joined {
            ranges.retain(|range| !range.is_empty());
        }
        used
    }
}

/// Whether two packets are the first and the last fragment of one, with nothing between them, and agree in all
/// that is not about being fragments.
fn belong_together(first: &[u8], last: &[u8]) -> bool {
    // Options are rare, and some belong to the first fragment only.
    let plain = |packet: &[u8]| packet[0] == 0x45 && packet.len() > HEADER;
    if !plain(first) || !plain(last) {
        return false;
    }
    // Type of service, identification, time to live, protocol, addresses.
    let same = first[1] == last[1]
        && first[4..6] == last[4..6]
        && first[8..10] == last[8..10]
        && first[12..20] == last[12..20];
    // "Don't fragment" and the reserved bit are not expected on fragments.
    let (begin, end) = (be16(first, 6), be16(last, 6));
    same && begin == MORE_FRAGMENTS
        && end & !OFFSET == 0
        && usize::from(end & OFFSET) * 8 == first.len() - HEADER
}

/// Writes the whole packet to `arena` at `at`. Its length; `None` if there is no room or it would be too long.
fn write(arena: &mut [u8], at: usize, first: Range<usize>, last: Range<usize>) -> Option<usize> {
    let (parts, rest) = arena.split_at_mut(at);
    let (first, last) = (&parts[first], &parts[last][HEADER..]);
    let length = first.len() + last.len();
    let out = rest.get_mut(..length).filter(|_| length <= LENGTH_MAX)?;
    out[..first.len()].copy_from_slice(first);
    out[first.len()..].copy_from_slice(last);
    put16(out, 2, length as u16);
    put16(out, 6, 0);
    put16(out, 10, 0);
    let sum = checksum::sum(&out[..HEADER], 0);
    put16(out, 10, !sum);
    Some(length)
}

#[cfg(test)]
mod tests {
    use super::super::sample::Sample;
    use super::*;
    use proptest::prelude::*;

    /// Cuts a packet in two behind `at` bytes of payload, a multiple of 8.
    fn cut(packet: &[u8], at: usize) -> [Vec<u8>; 2] {
        let part = |payload: &[u8], field: u16| {
            let mut part = [&packet[..HEADER], payload].concat();
            put16(&mut part, 2, (HEADER + payload.len()) as u16);
            put16(&mut part, 6, field);
            put16(&mut part, 10, 0);
            let sum = checksum::sum(&part[..HEADER], 0);
            put16(&mut part, 10, !sum);
            part
        };
        let (first, last) = packet[HEADER..].split_at(at);
        [part(first, MORE_FRAGMENTS), part(last, (at / 8) as u16)]
    }

    fn join(packets: &[Vec<u8>], room: usize) -> Vec<Vec<u8>> {
        let (mut arena, mut ranges) = (Vec::new(), Vec::new());
        for packet in packets {
            ranges.push(arena.len()..arena.len() + packet.len());
            arena.extend_from_slice(packet);
        }
        let used = arena.len();
        arena.resize(used + room, 0);
        let end = Joiner::default().join(&mut arena, used, &mut ranges);
        assert!(end <= arena.len());
        ranges.iter().map(|range| arena[range.clone()].to_vec()).collect()
    }

    /// A datagram of 1,400 bytes, as the host's stack would put it together.
    fn whole(number: u8) -> Vec<u8> {
        let mut sample = Sample::udp(false, 1);
        (sample.dont_fragment, sample.id) = (false, number.into());
        let mut packet = sample.next(1400, 0);
        *packet.last_mut().unwrap() = number;
        Sample::repair(&mut packet);
        packet
    }

    #[test]
    fn pairs_become_what_they_were_in_any_order_of_arrival() {
        let packets: Vec<_> = (0..5).map(whole).collect();
        let parts: Vec<_> = packets.iter().map(|packet| cut(packet, 1376)).collect();
        let of = |which: usize| parts.iter().map(move |both| both[which].clone());
        let turns: Vec<_> = parts.iter().flatten().cloned().collect();
        let apart: Vec<_> = of(0).chain(of(1)).collect();
        assert_eq!(join(&turns, 10_000), packets);
        assert_eq!(join(&apart, 10_000), packets);
        // Room for two only: the rest goes as it came.
        let some = join(&apart, 3000);
        assert_eq!((some.len(), &some[3..5]), (8, &packets[..2]));
        // A last one before its first is the host's business, and so is one alone.
        let turned = [parts[0][1].clone(), parts[0][0].clone(), parts[1][0].clone(), packets[2].clone()];
        assert_eq!(join(&turned, 10_000), turned);
    }

    #[test]
    fn what_does_not_fit_stays_as_it_is() {
        let table = [
            ("options", 0, 3),
            ("type of service", 1, 3),
            ("identification", 5, 1),
            ("more fragments", 6, 0x20),
            ("don't fragment", 6, 0x40),
            ("offset", 7, 1),
            ("time to live", 8, 1),
            ("protocol", 9, 1),
            ("source", 15, 1),
        ];
        for (what, at, change) in table {
            let mut parts = cut(&whole(1), 1376);
            parts[1][at] ^= change;
            assert_eq!(join(&parts, 10_000), parts, "{what}");
        }
    }

    proptest! {
        /// What comes out came in, or several packets came together; never more bytes than there were.
        #[test]
        fn any_packets_stay_or_come_together(packets in proptest::collection::vec(
            (prop_oneof![Just(0x45_u8), Just(0x60), any::<u8>()], proptest::collection::vec(any::<u8>(), 0..80)), 0..8),
            room in 0..200_usize)
        {
            let packets: Vec<Vec<u8>> = packets.into_iter().map(|(first, mut bytes)| {
                if let Some(byte) = bytes.first_mut() { *byte = first; }
                bytes
            }).filter(|packet| !packet.is_empty()).collect();
            let joined = join(&packets, room);
            let bytes = |packets: &[Vec<u8>]| packets.iter().map(Vec::len).sum::<usize>();
            prop_assert!(bytes(&joined) <= bytes(&packets));
            let unchanged = joined.iter().all(|packet| packets.contains(packet));
            prop_assert!(joined.len() < packets.len() || (joined.len() == packets.len() && unchanged));
        }
    }
}
