//! Whose interface it is. A TUN device goes with the process that made it; the kernel's WireGuard interface
//! stays. So it carries a mark that tells, after a crash, that nobody uses it any more.

use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::Uid;

use super::link::{Link, Links};

/// Begins the alias of our interfaces (`ip link show` prints it).
const MARK: &str = "mesh-tunnel ";
const KIND: &str = "wireguard";

/// Held as long as the interface is in use: a socket whose abstract name only this network namespace sees,
/// and which the kernel takes back when the process ends in whatever way.
#[derive(Debug)]
pub(super) struct Owner {
    alias: String,
    _socket: UnixListener,
}

impl Owner {
    pub(super) fn new() -> io::Result<Self> {
        let token: String = rand::random::<[u8; 16]>().iter().map(|byte| format!("{byte:02x}")).collect();
        let alias = format!("{MARK}{token}");
        let _socket = UnixListener::bind_addr(&SocketAddr::from_abstract_name(&alias)?)?;
        Ok(Self { alias, _socket })
    }

    pub(super) fn alias(&self) -> &str {
        &self.alias
    }
}

/// Removes the interface `name` if it is one of ours that a dead process left behind.
pub(super) fn remove_abandoned(links: &mut Links, name: &str) -> io::Result<bool> {
    let Some(link) = links.find(name)? else { return Ok(false) };
    if !is_abandoned(&link) {
        return Ok(false);
    }
    links.delete(link.index)?;
    Ok(true)
}

fn is_abandoned(link: &Link) -> bool {
    link.kind == KIND && link.alias.starts_with(MARK) && !is_held(&link.alias)
}

/// Whether a process of root or of our own user answers under the name. Others may take it as well.
fn is_held(alias: &str) -> bool {
    let Ok(address) = SocketAddr::from_abstract_name(alias) else { return false };
    let Ok(stream) = UnixStream::connect_addr(&address) else { return false };
    getsockopt(&stream, PeerCredentials)
        .is_ok_and(|peer| peer.uid() == 0 || peer.uid() == Uid::effective().as_raw())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_interfaces_without_a_living_owner_are_abandoned() {
        let owner = Owner::new().unwrap();
        let link =
            |kind: &str, alias: &str| Link { kind: kind.into(), alias: alias.into(), ..Link::default() };
        let alias = owner.alias().to_owned();
        assert!(!is_abandoned(&link(KIND, &alias)));
        drop(owner);
        assert!(is_abandoned(&link(KIND, &alias)));
        assert!(!is_abandoned(&link("tun", &alias)));
        assert!(!is_abandoned(&link(KIND, "somebody's")));
        assert!(!is_abandoned(&link(KIND, "")));
    }
}
