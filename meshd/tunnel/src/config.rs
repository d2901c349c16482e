//! What a caller asks for: one interface, its peers.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use ipnet::IpNet;

use crate::error::TunnelError;
use crate::key::{PresharedKey, PrivateKey, PublicKey};

/// Allowed-IP prefixes one peer may own.
pub(crate) const ALLOWED_IPS_PER_PEER_MAX: usize = 4096;
/// Peers one interface may have. boringtun leaves 24 bits for the peer index; this is what was thought about.
pub(crate) const PEERS_MAX: usize = 65_536;
/// Smallest and largest interface MTU, bytes. 576: every IPv4 host takes it (RFC 791 §3.1); IPv6 wants
/// 1280. The largest leaves room for outer IPv4 or IPv6, UDP and WireGuard headers in 65535 bytes.
pub(crate) const MTU_MIN: u16 = 576;
pub(crate) const MTU_MAX: u16 = 65_535 - 80;
/// Persistent keepalive the protocol's tools allow, seconds.
const KEEPALIVE_SECS_MAX: u64 = 65_535;
/// Longest interface name, bytes: `IFNAMSIZ` less the final zero.
const INTERFACE_BYTES_MAX: usize = 15;

/// One peer, keyed by its public key.
#[derive(Clone, PartialEq, Eq)]
pub struct PeerConfig {
    pub public_key: PublicKey,
    pub preshared_key: Option<PresharedKey>,
    /// Underlay address to try first; `None` waits for the peer to speak. On update, `None` or the value
    /// configured before keeps the endpoint the peer has roamed to.
    pub endpoint: Option<SocketAddr>,
    /// Inner addresses that are sent to this peer and accepted from it. Host bits are ignored.
    pub allowed_ips: Vec<IpNet>,
    /// Whole seconds, 1 s to 65535 s; rounded up. `None` or zero: off.
    pub persistent_keepalive: Option<Duration>,
}

impl PeerConfig {
    /// A peer with nothing but its key: no endpoint, no allowed IPs, no keepalive.
    pub fn new(public_key: PublicKey) -> Self {
        Self {
            public_key,
            preshared_key: None,
            endpoint: None,
            allowed_ips: Vec::new(),
            persistent_keepalive: None,
        }
    }

    pub(crate) fn check(&self) -> Result<(), TunnelError> {
        PublicKey::checked(self.public_key.0)
            .map_err(|source| TunnelError::PeerKey { peer: self.public_key, source })?;
        if self.allowed_ips.len() > ALLOWED_IPS_PER_PEER_MAX {
            return Err(TunnelError::TooManyAllowedIps {
                peer: self.public_key,
                count: self.allowed_ips.len(),
            });
        }
        if self.endpoint.is_some_and(|e| e.port() == 0 || e.ip().is_unspecified() || e.ip().is_multicast()) {
            return Err(TunnelError::Endpoint { peer: self.public_key });
        }
        Ok(())
    }

    /// The keepalive interval in use, `None` if off.
    pub(crate) fn keepalive(&self) -> Option<Duration> {
        let interval = self.persistent_keepalive.filter(|interval| !interval.is_zero())?;
        let secs = interval.as_secs() + u64::from(interval.subsec_nanos() > 0);
        Some(Duration::from_secs(secs.min(KEEPALIVE_SECS_MAX)))
    }
}

impl fmt::Debug for PeerConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PeerConfig")
            .field("public_key", &self.public_key)
            .field("preshared_key", &self.preshared_key.as_ref().map(|_| "(hidden)"))
            .field("endpoint", &self.endpoint)
            .field("allowed_ips", &self.allowed_ips)
            .field("persistent_keepalive", &self.persistent_keepalive)
            .finish()
    }
}

/// One interface, as [`TunnelBuilder`](crate::TunnelBuilder) has put it together.
#[derive(Clone)]
pub(crate) struct TunnelConfig {
    pub(crate) interface: String,
    pub(crate) mtu: u16,
    pub(crate) listen_port: u16,
    pub(crate) private_key: PrivateKey,
    pub(crate) fwmark: Option<u32>,
}

impl TunnelConfig {
    pub(crate) fn check(&self) -> Result<(), TunnelError> {
        let name = &self.interface;
        let printable = name.bytes().all(|b| b.is_ascii_graphic() && b != b'/' && b != b':');
        let counter = !name.contains('%') || (name.matches('%').count() == 1 && name.contains("%d"));
        let dots = name == "." || name == "..";
        if name.is_empty() || name.len() > INTERFACE_BYTES_MAX || !printable || !counter || dots {
            return Err(TunnelError::InterfaceName { name: name.clone() });
        }
        if !(MTU_MIN..=MTU_MAX).contains(&self.mtu) {
            return Err(TunnelError::Mtu { mtu: self.mtu });
        }
        Ok(())
    }
}

impl fmt::Debug for TunnelConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TunnelConfig")
            .field("interface", &self.interface)
            .field("mtu", &self.mtu)
            .field("listen_port", &self.listen_port)
            .field("public_key", &self.private_key.public())
            .field("fwmark", &self.fwmark)
            .finish()
    }
}
