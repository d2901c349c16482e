//! Packets for the tests of this folder, made in code.

use proptest::prelude::*;

use super::{TCP, UDP, be16, checksum, put16, put32, tcp_flags};

/// A flow that makes packets, each continuing the one before.
#[derive(Debug, Clone)]
pub(crate) struct Sample {
    v6: bool,
    protocol: u8,
    flow: u8,
    pub(crate) sequence: u32,
    pub(crate) id: u16,
    pub(crate) dont_fragment: bool,
    pub(crate) options: usize,
    pub(crate) acknowledgement: u32,
}

impl Sample {
    pub(crate) fn tcp(v6: bool, flow: u8) -> Self {
        let (sequence, id) = (u32::MAX - 3000, u16::MAX - 5);
        Self { v6, protocol: TCP, flow, sequence, id, dont_fragment: true, options: 12, acknowledgement: 1 }
    }

    pub(crate) fn udp(v6: bool, flow: u8) -> Self {
        Self { protocol: UDP, ..Self::tcp(v6, flow) }
    }

    pub(crate) fn next(&mut self, payload: usize, flags: u8) -> Vec<u8> {
        let mut packet = if self.v6 { vec![0; 40] } else { vec![0; 20] };
        let own = if self.protocol == TCP { 20 + self.options } else { 8 };
        let length = own + payload;
        if self.v6 {
            packet[0] = 0x60;
            put16(&mut packet, 4, length as u16);
            (packet[6], packet[7]) = (self.protocol, 64);
            (packet[23], packet[39]) = (self.flow, 200);
        } else {
            (packet[0], packet[8], packet[9]) = (0x45, 64, self.protocol);
            put16(&mut packet, 2, 20 + length as u16);
            put16(&mut packet, 4, self.id);
            packet[6] = if self.dont_fragment { 0x40 } else { 0 };
            (packet[15], packet[19]) = (self.flow, 200);
        }
        let at = packet.len();
        packet.resize(at + own, 0);
        packet[at..at + 4].copy_from_slice(&[self.flow, 1, 0, 80]);
        if self.protocol == TCP {
            put32(&mut packet, at + 4, self.sequence);
            put32(&mut packet, at + 8, self.acknowledgement);
            packet[at + 12] = ((own / 4) << 4) as u8;
            packet[at + 13] = flags;
            put16(&mut packet, at + 14, 500);
            packet[at + 20..].fill(1);
        } else {
            put16(&mut packet, at + 4, length as u16);
        }
        packet.extend((0..payload).map(|n| (n as u32).wrapping_add(self.sequence) as u8));
        self.sequence = self.sequence.wrapping_add(payload as u32);
        self.id = self.id.wrapping_add(1);
        Self::repair(&mut packet);
        packet
    }

    /// Makes the checksums of a TCP or UDP packet right.
    pub(crate) fn repair(packet: &mut [u8]) {
        let (at, protocol, addresses) = match packet[0] >> 4 {
            4 => {
                put16(packet, 10, 0);
                let sum = checksum::sum(&packet[..20], 0);
                put16(packet, 10, !sum);
                (20, packet[9], packet[12..20].to_vec())
            }
            _ => (40, packet[6], packet[8..40].to_vec()),
        };
        let field = at + if protocol == TCP { 16 } else { 6 };
        put16(packet, field, 0);
        let pseudo = checksum::pseudo_header(&addresses, protocol, (packet.len() - at) as u16);
        let sum = !checksum::sum(&packet[at..], pseudo);
        put16(packet, field, if sum == 0 && protocol == UDP { 0xffff } else { sum });
        assert!(be16(packet, field) != 0 || protocol == TCP);
    }
}

/// Several flows in any mixture, mostly going on as they should, sometimes not.
pub(crate) fn any_traffic() -> impl Strategy<Value = Vec<Vec<u8>>> {
    let step = (0..6_usize, prop_oneof![4 => Just(100_usize), 1 => 0..300_usize], 0..24_u8, any::<u32>());
    proptest::collection::vec(step, 0..120).prop_map(|steps| {
        let mut flows: Vec<Sample> = (0..6_u8)
            .map(|n| match n {
                0..4 => Sample { dont_fragment: n != 3, ..Sample::tcp(n % 2 == 0, n) },
                n => Sample { dont_fragment: false, ..Sample::udp(n == 4, n) },
            })
            .collect();
        let mut packets = Vec::new();
        for (flow, payload, event, noise) in steps {
            let sample = &mut flows[flow];
            let mut flags = tcp_flags::ACK;
            match event {
                0 => flags |= tcp_flags::PSH,
                1 => flags |= tcp_flags::FIN,
                2 => flags |= tcp_flags::CWR,
                3 => flags |= (noise & 0xff) as u8,
                4 => sample.sequence = noise,
                5 if !sample.dont_fragment => sample.id = noise as u16,
                6 => sample.acknowledgement = noise,
                7 => sample.options = noise as usize % 6 * 4,
                _ => {}
            }
            packets.push(sample.next(payload, flags));
            if event == 8 {
                let packet = packets.last_mut().expect("just pushed");
                let at = noise as usize % packet.len();
                packet[at] ^= 1 << (noise % 8);
            }
        }
        packets
    })
}
