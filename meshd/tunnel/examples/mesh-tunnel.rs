//! Brings up one WireGuard interface in the foreground, until interrupted.
//!
//! ```text
//! mesh-tunnel IFNAME
//!   WG_PRIVATE_KEY_FILE  file with the private key, as `wg genkey` writes it (default: a new one)
//!   WG_LISTEN_PORT       UDP port (default: any)
//!   WG_MTU               bytes (default 1420)
//!   WG_BACKEND           auto, kernel or userspace (default userspace, whose socket `wg` is served on)
//!   WG_FWMARK            mark of outer packets (default none)
//!   WG_QUEUES            queues of the interface, 1 to 16 (default by the number of cores)
//!   WG_ADDRESSES         10.0.0.1/24,fd00::1/64: given to the interface with `ip addr add`
//!   WG_PEERS             peers separated by ';', each: KEY [endpoint=IP:PORT] [allowed-ips=A,B] [keepalive=SECONDS]
//! ```
//!
//! It prints `listening on PORT as PUBLICKEY` once it is ready, and then its events. All of `wg` works on it.

use std::env;
use std::error::Error;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use mesh_tunnel::{
    Backend, BackendKind, PeerConfig, PrivateKey, Tunnel, TunnelBuilder, TunnelEvent, Uapi, UapiAccess,
};
use rand::RngCore;
use zeroize::Zeroizing;

type Fallible<T> = Result<T, Box<dyn Error>>;

fn main() -> Fallible<()> {
    let Some(interface) = env::args().nth(1) else { return Err("usage: mesh-tunnel IFNAME".into()) };
    let private_key: PrivateKey = match env::var("WG_PRIVATE_KEY_FILE") {
        Ok(file) => Zeroizing::new(std::fs::read_to_string(&file)?).trim().parse()?,
        Err(_) => PrivateKey::generate(&mut |bytes| rand::rng().fill_bytes(bytes)),
    };
    let peers = peers(&env::var("WG_PEERS").unwrap_or_default())?;
    let backend = match env::var("WG_BACKEND").as_deref() {
        Ok("auto") => Backend::Auto,
        Ok("kernel") => Backend::Kernel,
        Ok("userspace") | Err(_) => Backend::Userspace,
        Ok(other) => return Err(format!("WG_BACKEND={other} is not auto, kernel or userspace").into()),
    };
    let mut builder = TunnelBuilder::new(interface, private_key)
        .mtu(number("WG_MTU")?.unwrap_or(1420))
        .listen_port(number("WG_LISTEN_PORT")?.unwrap_or(0))
        .fwmark(number("WG_FWMARK")?)
        .backend(backend);
    if let Some(queues) = number("WG_QUEUES")? {
        builder = builder.queues(queues);
    }
    let tunnel: Arc<dyn Tunnel> = builder.open()?.into();
    // The kernel's interface is `wg`'s to show already.
    let _uapi = match tunnel.backend().kind {
        BackendKind::Kernel => None,
        _ => Some(Uapi::serve(&tunnel, UapiAccess::ReadWrite)?),
    };
    for address in env::var("WG_ADDRESSES").unwrap_or_default().split(',').filter(|a| !a.is_empty()) {
        let status = Command::new("ip").args(["addr", "add", address, "dev", tunnel.name()]).status()?;
        if !status.success() {
            return Err(format!("ip addr add {address} failed").into());
        }
    }
    for peer in peers {
        tunnel.set_peer(peer)?;
    }
    println!("listening on {} as {}", tunnel.listen_port(), tunnel.public_key());
    let events = tunnel.events();
    while let Some(event) = events.recv() {
        match event {
            TunnelEvent::Stopped { error: Some(error) } => return Err(error.into()),
            event => println!("{event:?}"),
        }
    }
    Ok(())
}

fn number<T: std::str::FromStr>(name: &str) -> Fallible<Option<T>> {
    match env::var(name) {
        Ok(text) => {
            text.parse().map(Some).map_err(|_| format!("{name}={text} is not a number in range").into())
        }
        Err(_) => Ok(None),
    }
}

fn peers(text: &str) -> Fallible<Vec<PeerConfig>> {
    text.split(';').map(str::trim).filter(|peer| !peer.is_empty()).map(peer).collect()
}

fn peer(text: &str) -> Fallible<PeerConfig> {
    let mut words = text.split_whitespace();
    let mut peer = PeerConfig::new(words.next().unwrap_or_default().parse()?);
    for word in words {
        match word.split_once('=') {
            Some(("endpoint", value)) => peer.endpoint = Some(value.parse()?),
            Some(("allowed-ips", value)) => {
                peer.allowed_ips = value.split(',').map(str::parse).collect::<Result<_, _>>()?;
            }
            Some(("keepalive", value)) => {
                peer.persistent_keepalive = Some(Duration::from_secs(value.parse()?))
            }
            _ => return Err(format!("unknown word {word:?} in WG_PEERS").into()),
        }
    }
    Ok(peer)
}
