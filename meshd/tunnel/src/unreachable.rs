//! Tells the host at once that nobody has the address it wants, instead of letting it wait.
//!
//! Pure functions on bytes. RFC 792, RFC 4443 §3.1 and §2.4; who gets no answer: RFC 1122 §3.2.2.

use std::time::{Duration, Instant};

use crate::offload::{be16, checksum, put16};
use crate::packet;

/// Answers per second. The host's stack needs few of them, a scan through a dead network many.
const ANSWERS_PER_SECOND: u32 = 100;
/// Longest answer, bytes: what every host takes. RFC 1812 §4.3.2.3, RFC 4443 §2.4 (c).
const IPV4_ANSWER_MAX: usize = 576;
const IPV6_ANSWER_MAX: usize = 1280;

const ICMP: u8 = 1;
const ICMPV6: u8 = 58;

/// Room for any answer, bytes.
pub(crate) const ANSWER_BYTES: usize = IPV6_ANSWER_MAX;

/// Lets a limited number of answers through.
#[derive(Debug)]
pub(crate) struct Limit {
    left: u32,
    since: Instant,
}

impl Limit {
    pub(crate) fn new(now: Instant) -> Self {
        Self { left: ANSWERS_PER_SECOND, since: now }
    }

    pub(crate) fn allows(&mut self, now: Instant) -> bool {
        if now.saturating_duration_since(self.since) >= Duration::from_secs(1) {
            *self = Self::new(now);
        }
        let allowed = self.left > 0;
        self.left = self.left.saturating_sub(1);
        allowed
    }
}

/// Writes "destination unreachable: host unreachable" about `packet` to `out`, as if it came from the
/// destination itself. Its length, or `None` if such a packet gets no answer.
pub(crate) fn answer(packet: &[u8], out: &mut [u8; ANSWER_BYTES]) -> Option<usize> {
    packet::ip_length(packet)?;
    if packet[0] >> 4 == 4 { answer_ipv4(packet, out) } else { answer_ipv6(packet, out) }
}

fn answer_ipv4(packet: &[u8], out: &mut [u8; ANSWER_BYTES]) -> Option<usize> {
    let header = usize::from(packet[0] & 0x0f) * 4;
    let payload = packet.get(header..)?;
    let (source, destination) = (&packet[12..16], &packet[16..20]);
    let is_single = |address: &[u8]| !matches!(address[0], 0 | 127 | 224..=255);
    let is_first_fragment = be16(packet, 6) & 0x1fff == 0;
    // Of ICMP only an echo request is answered; an answer to an error could go on for ever.
    let is_error = packet[9] == ICMP && payload.first() != Some(&8);
    if !is_single(source) || !is_single(destination) || !is_first_fragment || is_error {
        return None;
    }
    let quoted = packet.len().min(IPV4_ANSWER_MAX - 28);
    let length = 28 + quoted;
    let out = &mut out[..length];
    out[..28].fill(0);
    (out[0], out[6], out[8], out[9]) = (0x45, 0x40, 64, ICMP);
    put16(out, 2, length as u16);
    out[12..16].copy_from_slice(destination);
    out[16..20].copy_from_slice(source);
    let sum = checksum::sum(&out[..20], 0);
    put16(out, 10, !sum);
    (out[20], out[21]) = (3, 1);
    out[28..].copy_from_slice(&packet[..quoted]);
    let sum = checksum::sum(&out[20..], 0);
    put16(out, 22, !sum);
    Some(length)
}

fn answer_ipv6(packet: &[u8], out: &mut [u8; ANSWER_BYTES]) -> Option<usize> {
    let (source, destination) = (&packet[8..24], &packet[24..40]);
    let is_single = |address: &[u8]| address[0] != 0xff && address[..15].iter().any(|byte| *byte != 0);
    // Only informational messages, and none of neighbour discovery (133 to 137).
    let is_error = packet[6] == ICMPV6 && !matches!(packet.get(40), Some(128..133 | 138..));
    if !is_single(source) || !is_single(destination) || is_error {
        return None;
    }
    let quoted = packet.len().min(IPV6_ANSWER_MAX - 48);
    let length = 48 + quoted;
    let out = &mut out[..length];
    out[..48].fill(0);
    (out[0], out[6], out[7]) = (0x60, ICMPV6, 64);
    put16(out, 4, (8 + quoted) as u16);
    out[8..24].copy_from_slice(destination);
    out[24..40].copy_from_slice(source);
    (out[40], out[41]) = (1, 3);
    out[48..].copy_from_slice(&packet[..quoted]);
    let pseudo = checksum::pseudo_header(&out[8..40], ICMPV6, (8 + quoted) as u16);
    let sum = checksum::sum(&out[40..], pseudo);
    put16(out, 42, !sum);
    Some(length)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ipv4(protocol: u8, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
        packet.extend(payload);
        let length = packet.len() as u16;
        put16(&mut packet, 2, length);
        packet
    }

    fn ipv6(protocol: u8, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; 40];
        (packet[0], packet[6], packet[8], packet[24]) = (0x60, protocol, 0xfd, 0xfd);
        (packet[23], packet[39]) = (1, 2);
        put16(&mut packet, 4, payload.len() as u16);
        packet.extend(payload);
        packet
    }

    #[test]
    fn answers_are_sound_and_quote_the_packet() {
        let mut out = [0; ANSWER_BYTES];
        let packet = ipv4(17, &[7; 2000]);
        assert_eq!(answer(&packet, &mut out), Some(IPV4_ANSWER_MAX));
        assert_eq!(checksum::sum(&out[..20], 0), 0xffff);
        assert_eq!(checksum::sum(&out[20..IPV4_ANSWER_MAX], 0), 0xffff);
        assert_eq!(out[28..IPV4_ANSWER_MAX], packet[..IPV4_ANSWER_MAX - 28]);
        assert_eq!((&out[12..16], &out[16..20]), (&packet[16..20], &packet[12..16]));
        let packet = ipv6(6, &[7; 100]);
        assert_eq!(answer(&packet, &mut out), Some(188));
        let pseudo = checksum::pseudo_header(&out[8..40], ICMPV6, 148);
        assert_eq!(checksum::sum(&out[40..188], pseudo), 0xffff);
    }

    #[test]
    fn some_packets_get_no_answer() {
        let mut out = [0; ANSWER_BYTES];
        let mut fragment = ipv4(17, &[0; 20]);
        fragment[7] = 1;
        let mut multicast = ipv4(17, &[0; 20]);
        multicast[16] = 224;
        let mut multicast6 = ipv6(17, &[0; 20]);
        multicast6[24] = 0xff;
        let mut unspecified = ipv6(17, &[0; 20]);
        unspecified[8..24].fill(0);
        let silent = [
            ipv4(ICMP, &[3; 20]),
            ipv6(ICMPV6, &[1; 20]),
            ipv6(ICMPV6, &[135; 20]),
            fragment,
            multicast,
            multicast6,
            unspecified,
        ];
        for packet in silent {
            assert_eq!(answer(&packet, &mut out), None, "{packet:?}");
        }
        assert!(answer(&ipv4(ICMP, &[8, 0, 0, 0]), &mut out).is_some());
        assert!(answer(&ipv6(ICMPV6, &[128, 0, 0, 0]), &mut out).is_some());
    }

    #[test]
    fn answers_are_limited_per_second() {
        let now = Instant::now();
        let mut limit = Limit::new(now);
        assert_eq!((0..1000).filter(|_| limit.allows(now)).count(), ANSWERS_PER_SECOND as usize);
        assert!(limit.allows(now + Duration::from_secs(1)));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..1500), first in 0x40..0x70_u8) {
            let mut bytes = bytes;
            if let Some(byte) = bytes.first_mut() {
                *byte = first;
            }
            let mut out = [0; ANSWER_BYTES];
            prop_assert!(answer(&bytes, &mut out).is_none_or(|length| length <= ANSWER_BYTES));
        }
    }
}
