//! Segmentation offloads in user space: one packet of up to 64 KiB from the interface becomes many of
//! the path's size ([`split`]), and many from the network become one again ([`merge`]).
//!
//! Pure functions on bytes. `split(merge(x)) == x` is a property test.

pub(crate) mod checksum;
pub(crate) mod join;
pub(crate) mod merge;
#[cfg(test)]
mod sample;
pub(crate) mod split;
pub(crate) mod virtio;

pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;

/// TCP's flags, in byte 13 of its header. RFC 9293 §3.1.
pub(crate) mod tcp_flags {
    pub(crate) const FIN: u8 = 0x01;
    pub(crate) const PSH: u8 = 0x08;
    pub(crate) const ACK: u8 = 0x10;
    pub(crate) const CWR: u8 = 0x80;
}

pub(crate) fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

pub(crate) fn put16(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

pub(crate) fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

pub(crate) fn put32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
}
