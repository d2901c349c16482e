//! What a path finder needs of an engine: datagrams on the tunnel's own UDP port that are not WireGuard's
//! (STUN, a relay's frames), and endpoints behind which there is no UDP at all (a relay over TLS).
//!
//! A *virtual endpoint* is a socket address inside [`VIRTUAL_NETWORK`]. Everywhere else it is an endpoint
//! like any other: it can be configured, probed, roamed to and shown. Only at the very end, datagrams
//! for it are handed to a function instead of a socket.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use ipnet::Ipv6Net;

use crate::packet::DATAGRAM_MAX;

/// Addresses of virtual endpoints: the prefix that routers discard, so that no real peer can be there.
/// RFC 6666 §4. What the other 64 bits and the port mean is the caller's.
pub const VIRTUAL_NETWORK: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 0), 64);

/// Bytes of datagrams from virtual endpoints that may wait for the carrier, with
/// [`DATAGRAM_COST`] for each.
const WAITING_BYTES_MAX: usize = 1 << 20;
/// What a waiting datagram costs beside its bytes.
const DATAGRAM_COST: usize = 64;

/// Takes one datagram and the address it came from or is for. Is called on the engine's threads: it must
/// be quick, must not block, and must not call the tunnel's [`close`](crate::Tunnel::close).
pub type DatagramSink = Arc<dyn Fn(&[u8], SocketAddr) + Send + Sync>;

/// Whether `endpoint` is a virtual one.
pub fn is_virtual(endpoint: SocketAddr) -> bool {
    matches!(endpoint.ip(), IpAddr::V6(ip) if VIRTUAL_NETWORK.contains(&ip))
}

/// A sink that may be set and taken away while it is in use.
#[derive(Default)]
pub(crate) struct SinkCell(RwLock<Option<DatagramSink>>);

impl SinkCell {
    pub(crate) fn set(&self, sink: Option<DatagramSink>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = sink;
    }

    /// Hands a datagram over; `false` if nobody takes it.
    pub(crate) fn give(&self, datagram: &[u8], address: SocketAddr) -> bool {
        // Cloned, so that the sink may be changed from inside itself.
        let sink = self.0.read().unwrap_or_else(PoisonError::into_inner).clone();
        sink.map(|sink| sink(datagram, address)).is_some()
    }
}

impl std::fmt::Debug for SinkCell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SinkCell")
    }
}

/// Datagrams from virtual endpoints on their way to the carrier.
#[derive(Debug, Default)]
pub(crate) struct Waiting(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    datagrams: VecDeque<(Vec<u8>, SocketAddr)>,
    bytes: usize,
}

impl Waiting {
    /// `false` if there is no room, or if it is none that WireGuard could have sent.
    pub(crate) fn push(&self, datagram: &[u8], from: SocketAddr) -> bool {
        let cost = datagram.len() + DATAGRAM_COST;
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if datagram.len() > DATAGRAM_MAX || inner.bytes + cost > WAITING_BYTES_MAX {
            return false;
        }
        inner.bytes += cost;
        inner.datagrams.push_back((datagram.to_vec(), from));
        true
    }

    /// Everything that waits, the oldest first.
    pub(crate) fn take(&self) -> VecDeque<(Vec<u8>, SocketAddr)> {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        inner.bytes = 0;
        std::mem::take(&mut inner.datagrams)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn virtual_endpoints_are_those_of_the_discard_prefix() {
        for (address, expected) in [
            ("[100::1]:7", true),
            ("[100::ffff:ffff:ffff:ffff]:1", true),
            ("[100:0:0:1::1]:7", false),
            ("[fd00::1]:7", false),
            ("100.0.0.1:7", false),
        ] {
            assert_eq!(is_virtual(address.parse().unwrap()), expected, "{address}");
        }
    }

    #[test]
    fn what_waits_is_bounded_by_bytes_and_keeps_its_order() {
        let (waiting, from) = (Waiting::default(), "[100::1]:7".parse().unwrap());
        assert!(!waiting.push(&vec![0; DATAGRAM_MAX + 1], from));
        let mut taken = 0_u32;
        while waiting.push(&[&taken.to_le_bytes()[..], &[0; 996]].concat(), from) {
            taken += 1;
        }
        assert_eq!(taken as usize, WAITING_BYTES_MAX / (1000 + DATAGRAM_COST));
        let all = waiting.take();
        for (number, (datagram, _)) in (0_u32..).zip(&all) {
            assert_eq!(datagram[..4], number.to_le_bytes());
        }
        assert_eq!(all.len(), taken as usize);
        assert!(waiting.push(&[0; 100], from));
    }
}
