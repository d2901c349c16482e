//! A userspace WireGuard engine: one TUN interface, many peers, one UDP port, two threads on
//! two cores and more on more.
//!
//! The crate is a library of its own: it knows nothing of the mesh it was written for, starts no async
//! runtime and opens nothing but `/dev/net/tun` and its UDP port. The Noise handshake and the
//! transport encryption are `boringtun::noise`; everything around them (routing by allowed IPs, the
//! inner-source check, roaming, the cookie rate limiter, timers, retries) is here.
//!
//! ```no_run
//! use mesh_tunnel::{PeerConfig, PrivateKey, PublicKey, TunnelBuilder};
//! use std::time::Duration;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let key: PrivateKey = "yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk=".parse()?;
//! let tunnel = TunnelBuilder::new("wg0", key).listen_port(51820).open()?;
//! let peer: PublicKey = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=".parse()?;
//! tunnel.set_peer(PeerConfig {
//!     endpoint: Some("192.0.2.7:51820".parse()?),
//!     allowed_ips: vec!["10.0.0.2/32".parse()?, "fd00::2/128".parse()?],
//!     persistent_keepalive: Some(Duration::from_secs(25)),
//!     ..PeerConfig::new(peer)
//! })?;
//! // Addresses and routes are the caller's: `ip addr add 10.0.0.1/24 dev wg0`.
//! while let Some(event) = tunnel.events().recv() {
//!     println!("{event:?}");
//! }
//! # Ok(())
//! # }
//! ```

mod builder;
mod config;
mod error;
mod event;
mod key;
mod tunnel;

mod allowed_ips;
mod detour;
mod identity;
mod offload;
mod packet;
mod peer;
mod registry;
mod unreachable;

mod carrier;
mod counters;
mod delivery;
mod engine;
mod housekeeper;
mod inbound;
mod outbound;
mod outbox;
mod shared;

mod kernel;

mod quiescence;
mod receive;
mod send;
mod tun;
mod uapi;
mod udp;
mod wake;

pub use builder::TunnelBuilder;
pub use config::PeerConfig;
pub use detour::{DatagramSink, VIRTUAL_NETWORK, is_virtual};
pub use error::TunnelError;
pub use event::{Events, RecvTimeoutError, TunnelEvent};
pub use key::{KeyError, PresharedKey, PrivateKey, PublicKey};
pub use tunnel::{Backend, BackendInfo, BackendKind, Counters, Offloads, PeerStats, Tunnel};
pub use uapi::{Uapi, UapiAccess};
