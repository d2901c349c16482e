//! The interface every backend stands behind.

use std::net::SocketAddr;
use std::time::Duration;

use crate::config::{PeerConfig, TunnelConfig};
use crate::engine::Userspace;
use crate::error::TunnelError;
use crate::event::Events;
use crate::key::{PrivateKey, PublicKey};

/// One WireGuard interface. Calls may come from any thread; none of them waits for the network.
pub trait Tunnel: Send + Sync {
    /// The interface name actually given.
    fn name(&self) -> &str;

    fn backend(&self) -> BackendInfo;

    /// The UDP port in use, the same for IPv4 and IPv6.
    fn listen_port(&self) -> u16;

    fn public_key(&self) -> PublicKey;

    /// Adds a peer or updates it. The session and the packets waiting for it are kept unless the
    /// preshared key changes, which starts a new handshake. With an endpoint and a keepalive the
    /// handshake begins at once.
    ///
    /// # Errors
    /// Nothing has changed. [`TunnelError::AllowedIpsOverlap`] if another peer owns exactly one of the
    /// prefixes; a prefix inside another peer's is fine, the longest wins. [`TunnelError::PeerKey`],
    /// [`TunnelError::OwnKey`], [`TunnelError::Endpoint`], [`TunnelError::TooManyAllowedIps`],
    /// [`TunnelError::TooManyPeers`], [`TunnelError::Closed`].
    fn set_peer(&self, peer: PeerConfig) -> Result<(), TunnelError>;

    /// Forgets a peer and its session. When this returns, no packet of it reaches the interface any
    /// more. `false` if there was no such peer.
    fn remove_peer(&self, key: &PublicKey) -> bool;

    /// Sends to `endpoint` from now on, until the peer speaks from elsewhere. `false` if there is no
    /// such peer or the address cannot be sent to.
    fn set_endpoint(&self, key: &PublicKey, endpoint: SocketAddr) -> bool;

    /// Takes another identity. **Every session is dropped** and packets waiting for one are lost; peers
    /// that had a session and have an endpoint are greeted at once, and answer as soon as they know the
    /// new public key. Packets under the old key are refused from the moment this returns.
    ///
    /// # Errors
    /// Nothing has changed. [`TunnelError::OwnKey`] if a peer has this key, [`TunnelError::Closed`].
    fn rotate_key(&self, private_key: PrivateKey) -> Result<(), TunnelError>;

    /// Sends a handshake initiation now, whether or not there is a session: a probe of the endpoint. An
    /// answer shows as [`HandshakeDone`](crate::TunnelEvent::HandshakeDone); a session in use stays in
    /// use until then. Calls closer together than 20 ms are one. `false` if there is no such peer
    /// or it has no endpoint.
    fn initiate_handshake(&self, key: &PublicKey) -> bool;

    /// A peer as it was last configured, `None` if there is no such peer.
    fn peer(&self, key: &PublicKey) -> Option<PeerConfig>;

    /// All peers, ordered by key.
    fn peers(&self) -> Vec<PeerStats>;

    /// Packets and datagrams that were dropped, by reason, since the start.
    fn counters(&self) -> Counters;

    /// The reading end of the one event queue.
    fn events(&self) -> Events;

    /// Stops the threads and removes the interface. Does nothing the second time. Dropping does the same.
    fn close(&self);
}

/// Creates the interface, sets its MTU, brings it up and starts to listen. Addresses and routes are
/// the caller's.
///
/// # Errors
/// Nothing is left behind; each variant of [`TunnelError`] names the next step.
pub fn open(config: TunnelConfig) -> Result<Box<dyn Tunnel>, TunnelError> {
    open_with(config, Offloads::ALL)
}

/// As [`open`], with no other offloads than `wanted`: to find out which of them a driver cannot do.
///
/// # Errors
/// As [`open`].
pub fn open_with(config: TunnelConfig, wanted: Offloads) -> Result<Box<dyn Tunnel>, TunnelError> {
    Ok(Box::new(Userspace::open(config, wanted)?))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum BackendKind {
    Userspace,
    Kernel,
}

/// Which engine runs and what it could switch on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackendInfo {
    pub kind: BackendKind,
    pub offloads: Offloads,
    /// Why the kernel's own WireGuard is not used; `None` if it is.
    pub why_not_kernel: Option<String>,
}

/// What the interface and the sockets do in batches at this moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offloads {
    /// The interface hands over and takes TCP segments in one piece of up to 64 KiB (TSO).
    pub tun_tcp: bool,
    /// The same for UDP (USO, Linux 6.2).
    pub tun_udp: bool,
    /// Equal datagrams leave in one system call (`UDP_SEGMENT`).
    pub udp_gso: bool,
    /// Equal datagrams arrive in one system call (`UDP_GRO`).
    pub udp_gro: bool,
}

impl Offloads {
    pub const ALL: Self = Self { tun_tcp: true, tun_udp: true, udp_gso: true, udp_gro: true };
    pub const NONE: Self = Self { tun_tcp: false, tun_udp: false, udp_gso: false, udp_gro: false };
}

/// One peer as it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerStats {
    pub public_key: PublicKey,
    /// The underlay address in use.
    pub endpoint: Option<SocketAddr>,
    /// Time since the last completed handshake; `None` before the first.
    pub last_handshake: Option<Duration>,
    /// Whether packets can be sent without a new handshake first.
    pub has_session: bool,
    /// Bytes of authenticated datagrams received, headers of WireGuard included.
    pub rx_bytes: u64,
    /// Bytes of datagrams sent, headers of WireGuard included.
    pub tx_bytes: u64,
    /// Round trip of the last handshake that we began.
    pub rtt: Option<Duration>,
}

/// What was dropped and why, since the start of the interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// From the interface: not an IP packet, or longer than the MTU.
    pub tx_malformed: u64,
    /// From the interface: no peer has the destination.
    pub tx_no_peer: u64,
    /// From the interface: the peer has no endpoint yet.
    pub tx_no_endpoint: u64,
    /// The UDP socket refused a datagram.
    pub tx_socket_errors: u64,
    /// From the network: not a WireGuard message, wrong MAC, unknown receiver, forged, replayed.
    pub rx_invalid: u64,
    /// From the network: authentic, but the inner source is not the peer's.
    pub rx_wrong_source: u64,
    /// Handshake messages answered with a cookie, because too many came.
    pub rx_under_load: u64,
    /// Handshake messages dropped because the queue of 1024 was full.
    pub rx_handshakes_dropped: u64,
    /// The interface refused a packet.
    pub rx_interface_errors: u64,
}
