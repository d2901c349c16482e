//! The interface every backend stands behind.

use std::net::SocketAddr;
use std::time::Duration;

use crate::config::PeerConfig;
use crate::detour::DatagramSink;
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

    /// Listens on another port from now on, 0 for any; sessions go on, and peers learn of it from our next
    /// packet. The port that was given.
    ///
    /// # Errors
    /// Nothing has changed. [`TunnelError::PortInUse`], [`TunnelError::Socket`], [`TunnelError::SocketRights`],
    /// [`TunnelError::Closed`], [`TunnelError::Unsupported`].
    fn set_listen_port(&self, port: u16) -> Result<u16, TunnelError> {
        let _ = port;
        Err(TunnelError::Unsupported { backend: "kernel", action: "change the port" })
    }

    /// The mark of outer packets, if there is one.
    fn fwmark(&self) -> Option<u32> {
        None
    }

    /// Changes the mark of outer packets (`SO_MARK`); `None` and 0 are none.
    ///
    /// # Errors
    /// [`TunnelError::SocketRights`], [`TunnelError::Socket`], [`TunnelError::Closed`],
    /// [`TunnelError::Unsupported`].
    fn set_fwmark(&self, mark: Option<u32>) -> Result<(), TunnelError> {
        let _ = mark;
        Err(TunnelError::Unsupported { backend: "kernel", action: "change the mark" })
    }

    /// Our private key, for a configuration socket that serves `wg showconf`. `None` if the backend keeps
    /// it to itself.
    fn private_key(&self) -> Option<PrivateKey> {
        None
    }

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

    /// Lets peers reach us under a second private key, beside the first: handshakes on either are answered,
    /// and each peer has a session of its own with either. Packets leave under the first key until a
    /// packet of the peer comes in under the second, which shows that it has changed over; then under
    /// that. Peers with an endpoint and a keepalive are greeted under the second key until they answer.
    /// A second key that was there before is dropped.
    ///
    /// # Errors
    /// [`TunnelError::OwnKey`] if it is the first key or a peer's, [`TunnelError::TooManyPeers`],
    /// [`TunnelError::Closed`], [`TunnelError::Unsupported`].
    fn add_next_key(&self, private_key: PrivateKey) -> Result<(), TunnelError> {
        let _ = private_key;
        Err(TunnelError::Unsupported { backend: "kernel", action: "have two private keys" })
    }

    /// All peers as they stand under the second key, ordered by key; empty if there is none.
    fn peers_of_next_key(&self) -> Vec<PeerStats> {
        Vec::new()
    }

    /// The second key takes the place of the first, **which is dead** when this returns. Sessions under the
    /// second go on; peers without one are greeted at once. `false` if there is no second key.
    fn switch_to_next_key(&self) -> bool {
        false
    }

    /// Goes back to the first key alone. `false` if there was no second.
    fn drop_next_key(&self) -> bool {
        false
    }

    /// The other side of a peer's change of keys: `to` is the same peer as `from` under its new key. The
    /// allowed IPs move in one step, so no packet falls between; until `from` is removed, both may send
    /// from them. Call it when `to` has a session. With the kernel's WireGuard only `to` may send from them: what is
    /// under way by the old key is lost, for a round trip.
    ///
    /// # Errors
    /// Nothing has changed. [`TunnelError::UnknownPeer`], [`TunnelError::TooManyAllowedIps`],
    /// [`TunnelError::Closed`].
    fn hand_over(&self, from: &PublicKey, to: &PublicKey) -> Result<(), TunnelError>;

    /// Sends a handshake initiation now, whether or not there is a session: a probe of the endpoint. An
    /// answer shows as [`HandshakeDone`](crate::TunnelEvent::HandshakeDone); a session in use stays in
    /// use until then. Calls closer together than 20 ms are one. `false` if there is no such peer
    /// or it has no endpoint.
    ///
    /// The kernel's WireGuard has no such request: while a session is in use and the peer is heard, nothing is
    /// sent and the answer is `false`; otherwise the peer is greeted, at one endpoint once in 5 s.
    fn initiate_handshake(&self, key: &PublicKey) -> bool;

    /// Sends one handshake initiation to all of `to` (at most 32) and leaves the endpoint as it is. Where the
    /// first answer comes from, the peer is from then on, and
    /// [`PathAnswered`](crate::TunnelEvent::PathAnswered) says so; the peer takes only the first of them.
    /// Keep probes of one peer a round trip apart, or answers are lost. `false` if there is no such peer
    /// or no address one can send to, or if the backend cannot do it.
    fn probe(&self, key: &PublicKey, to: &[SocketAddr]) -> bool {
        let _ = (key, to);
        false
    }

    /// Sends one datagram from the tunnel's own UDP port, or through the virtual sink; not a WireGuard
    /// message, but what shares its way: STUN, a relay's frames. Does not wait for room.
    ///
    /// # Errors
    /// [`TunnelError::Socket`] if it could not be sent, also because the backend has no such way (the kernel);
    /// [`TunnelError::Closed`].
    fn send_raw(&self, datagram: &[u8], to: SocketAddr) -> Result<(), TunnelError> {
        let _ = (datagram, to);
        Err(TunnelError::Socket { action: "send a datagram", source: std::io::ErrorKind::Unsupported.into() })
    }

    /// Who gets the datagrams on the tunnel's UDP port that do not begin as WireGuard's do (a type of 1 to
    /// 4 and three zeros). Without one they are counted as invalid. `false` if the backend cannot do it.
    fn set_foreign_sink(&self, sink: Option<DatagramSink>) -> bool {
        let _ = sink;
        false
    }

    /// Who gets the WireGuard messages for [virtual endpoints](crate::VIRTUAL_NETWORK). Without one they
    /// are lost and counted as socket errors. `false` if the backend cannot do it.
    fn set_virtual_sink(&self, sink: Option<DatagramSink>) -> bool {
        let _ = sink;
        false
    }

    /// Takes a WireGuard message that came another way than by UDP, as from the virtual endpoint `from`.
    /// A peer's endpoint moves there, as to any place it speaks from, but not within 5 s after it spoke
    /// from a real one. `false` if it was dropped: no virtual address, more than 1 MiB waiting, or the
    /// backend cannot do it.
    fn receive_virtual(&self, datagram: &[u8], from: SocketAddr) -> bool {
        let _ = (datagram, from);
        false
    }

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

/// Queues at most; each costs a thread and its buffers.
const QUEUES_MAX: usize = 16;

/// What the engine chooses itself if it is not told; see [`TunnelBuilder`](crate::TunnelBuilder).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tuning {
    pub(crate) offloads: Offloads,
    pub(crate) queues: Option<usize>,
}

impl Default for Tuning {
    fn default() -> Self {
        Self { offloads: Offloads::ALL, queues: None }
    }
}

impl Tuning {
    pub(crate) fn queues(&self) -> usize {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        // On two or three cores the second thread would only take the time of those whose packets these are.
        let fitting = if cores < 4 { 1 } else { cores.min(8) };
        self.queues.unwrap_or(fitting).clamp(1, QUEUES_MAX)
    }
}

/// Which engine may carry an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Backend {
    /// The kernel's WireGuard where it exists, else the userspace engine.
    #[default]
    Auto,
    /// The kernel's WireGuard and no other.
    Kernel,
    /// The userspace engine, also where the kernel has its own.
    Userspace,
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
    /// Why the kernel's own WireGuard is not used although it was to be tried; else `None`.
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

impl PeerStats {
    /// A peer under two keys of ours as one: the path of the younger session, the bytes of both.
    pub(crate) fn merged(first: Self, second: Option<Self>) -> Self {
        let Some(second) = second else { return first };
        let age = |stats: &Self| stats.last_handshake.unwrap_or(Duration::MAX);
        let (younger, older) = if age(&second) < age(&first) { (second, first) } else { (first, second) };
        Self {
            has_session: younger.has_session || older.has_session,
            rx_bytes: younger.rx_bytes + older.rx_bytes,
            tx_bytes: younger.tx_bytes + older.tx_bytes,
            rtt: younger.rtt.or(older.rtt),
            ..younger
        }
    }
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
    /// Datagrams that were handed to the foreign sink.
    pub rx_foreign: u64,
    /// Messages from virtual endpoints that were dropped because too many waited.
    pub rx_virtual_dropped: u64,
    /// From the interface: pushed out by newer packets while there was no session.
    pub tx_waiting_dropped: u64,
}
