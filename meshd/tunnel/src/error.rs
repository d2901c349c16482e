//! Why an interface did not open or a change was refused.

use std::io;

use ipnet::IpNet;

use crate::config::{ALLOWED_IPS_PER_PEER_MAX, MTU_MAX, MTU_MIN, PEERS_MAX};
use crate::key::{KeyError, PublicKey};

/// In every case nothing was changed and nothing is left open.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    #[error("interface name {name:?} is not valid; use 1 to 15 letters, digits, '-', '_' or '.'")]
    InterfaceName { name: String },
    #[error("mtu {mtu} is outside {MTU_MIN} to {MTU_MAX}")]
    Mtu { mtu: u16 },
    #[error(
        "there is no /dev/net/tun here; load the module with `modprobe tun`, or give the container the device"
    )]
    NoTunDevice,
    #[error("the kernel's WireGuard cannot be used: {why}")]
    NoKernel { why: String },
    #[error("no right to create interface {name}; run as root or with CAP_NET_ADMIN")]
    NoRights { name: String },
    #[error("interface {name} already exists; choose another name or remove it with `ip link del {name}`")]
    InterfaceBusy { name: String },
    #[error("cannot {action} on interface {name}")]
    Interface {
        name: String,
        action: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("UDP port {port} is in use; choose another listen port or 0 for any, `ss -lunp` shows the owner")]
    PortInUse { port: u16 },
    #[error("no right to {action}; run as root or with {capability}")]
    SocketRights { action: &'static str, capability: &'static str },
    #[error("cannot {action} on the UDP socket")]
    Socket {
        action: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("cannot {action}")]
    System {
        action: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("public key of peer {peer} cannot be used")]
    PeerKey {
        peer: PublicKey,
        #[source]
        source: KeyError,
    },
    #[error("peer {peer} has our own public key")]
    OwnKey { peer: PublicKey },
    #[error("endpoint of peer {peer} is not an address one can send to")]
    Endpoint { peer: PublicKey },
    #[error("allowed IPs {prefix} of peer {peer} belong to peer {owner} already")]
    AllowedIpsOverlap { peer: PublicKey, owner: PublicKey, prefix: IpNet },
    #[error("peer {peer} has {count} allowed IPs, {ALLOWED_IPS_PER_PEER_MAX} is the limit")]
    TooManyAllowedIps { peer: PublicKey, count: usize },
    #[error("the interface has {PEERS_MAX} peers, which is the limit")]
    TooManyPeers,
    #[error("there is no peer {peer}")]
    UnknownPeer { peer: PublicKey },
    #[error("the {backend} cannot {action}")]
    Unsupported { backend: &'static str, action: &'static str },
    #[error("the tunnel is closed")]
    Closed,
}
