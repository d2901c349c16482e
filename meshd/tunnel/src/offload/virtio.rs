//! The header a TUN device puts before every packet with `IFF_VNET_HDR`.
//!
//! `struct virtio_net_hdr` of `linux/virtio_net.h`, in the host's byte order.

/// Bytes of the header.
pub(crate) const HEADER_BYTES: usize = 10;

/// `flags`: the checksum at `checksum_start + checksum_offset` is not finished.
pub(crate) const NEEDS_CHECKSUM: u8 = 1;

pub(crate) const GSO_NONE: u8 = 0;
pub(crate) const GSO_TCP4: u8 = 1;
pub(crate) const GSO_TCP6: u8 = 4;
/// `VIRTIO_NET_HDR_GSO_UDP_L4`: datagrams, not fragments.
pub(crate) const GSO_UDP: u8 = 5;
/// May be added to the TCP types: the first segment alone has CWR.
pub(crate) const GSO_ECN: u8 = 0x80;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) flags: u8,
    pub(crate) gso_type: u8,
    /// Bytes of all headers, if there are segments. A hint, not to be trusted.
    pub(crate) header_length: u16,
    /// Payload bytes of every segment but the last.
    pub(crate) gso_size: u16,
    /// Where the transport header begins.
    pub(crate) checksum_start: u16,
    /// Where in the transport header the checksum is.
    pub(crate) checksum_offset: u16,
}

impl Header {
    pub(crate) fn parse(bytes: &[u8; HEADER_BYTES]) -> Self {
        let half = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        Self {
            flags: bytes[0],
            gso_type: bytes[1],
            header_length: half(2),
            gso_size: half(4),
            checksum_start: half(6),
            checksum_offset: half(8),
        }
    }

    pub(crate) fn bytes(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        (bytes[0], bytes[1]) = (self.flags, self.gso_type);
        let halves = [self.header_length, self.gso_size, self.checksum_start, self.checksum_offset];
        for (to, half) in bytes[2..].chunks_exact_mut(2).zip(halves) {
            to.copy_from_slice(&half.to_ne_bytes());
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn bytes_and_back(bytes: [u8; HEADER_BYTES]) {
            prop_assert_eq!(Header::parse(&bytes).bytes(), bytes);
        }
    }
}
