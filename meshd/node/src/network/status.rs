//! The network as a person asks for it.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use time::UtcDateTime;

use super::Quality;

/// A snapshot of what the network task knows.
#[derive(Debug, Clone)]
pub(crate) struct NetworkStatus {
    pub(crate) interface: String,
    pub(crate) backend: String,
    /// Why the kernel's WireGuard is not used though it was tried or might be.
    pub(crate) why_not_kernel: Option<String>,
    /// What the engine cannot do that another could, one phrase each.
    pub(crate) lacks: Vec<String>,
    pub(crate) offloads: Vec<String>,
    pub(crate) wireguard_port: u16,
    pub(crate) peers: Vec<PeerView>,
    pub(crate) roster_seq: u64,
    pub(crate) crl_number: u64,
    pub(crate) firewall_ready: bool,
    pub(crate) tags: Vec<String>,
}

/// One peer as it stands.
#[derive(Debug, Clone)]
pub(crate) struct PeerView {
    pub(crate) id: u32,
    pub(crate) name: String,
    pub(crate) ipv4: Ipv4Addr,
    pub(crate) ipv6: Ipv6Addr,
    pub(crate) wireguard_key: [u8; 32],
    pub(crate) endpoint: Option<SocketAddr>,
    pub(crate) candidates: Vec<SocketAddr>,
    /// Time since the last handshake.
    pub(crate) last_handshake: Option<Duration>,
    pub(crate) has_session: bool,
    /// Of probes through the tunnel; before the first of them, of the last handshake that we began.
    pub(crate) rtt: Option<Duration>,
    /// Of the last handshake that we began.
    pub(crate) handshake_rtt: Option<Duration>,
    pub(crate) quality: Quality,
    pub(crate) lease_ends: UtcDateTime,
    pub(crate) rx_bytes: u64,
    pub(crate) tx_bytes: u64,
    pub(crate) tags: Vec<String>,
    pub(crate) inbound: bool,
    pub(crate) outbound: bool,
}

/// What the host was found to lack, one sentence each; nothing where all is well.
#[derive(Debug, Clone, Default)]
pub(crate) struct Inspection {
    pub(crate) firewall: Option<String>,
    pub(crate) overlay: Vec<String>,
}
