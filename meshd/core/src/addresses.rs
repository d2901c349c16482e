//! Overlay addresses: IPv6 from the mesh id and the node's index, IPv4 from a pool.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};
use sha2::{Digest, Sha256};

use crate::ids::NodeId;

/// The mesh's unique local prefix: `fd` ‖ SHA-256("ula" ‖ mesh id)[..5], /48. RFC 4193 §3.1.
pub fn ula_prefix(mesh_id: &[u8; 16]) -> Ipv6Net {
    let digest = Sha256::new().chain_update(b"ula").chain_update(mesh_id).finalize();
    let mut octets = [0u8; 16];
    octets[0] = 0xfd;
    octets[1..6].copy_from_slice(&digest[..5]);
    Ipv6Net::new_assert(octets.into(), 48)
}

/// The address of `node` in the mesh's prefix: subnet 0, host part the node's index.
pub fn ipv6_of(mesh_id: &[u8; 16], node: NodeId) -> Ipv6Addr {
    let prefix = u128::from(ula_prefix(mesh_id).network());
    Ipv6Addr::from(prefix | u128::from(node.0))
}

/// Whether `address` may be given to a node: inside the pool, neither its network nor broadcast address.
pub fn is_host(pool: &Ipv4Net, address: Ipv4Addr) -> bool {
    pool.contains(&address) && address != pool.network() && address != pool.broadcast()
}

/// Every host address of `pool` once, beginning at the `start`th (1 is the first) and wrapping around.
pub fn hosts_from(pool: Ipv4Net, start: u32) -> impl Iterator<Item = Ipv4Addr> {
    let network = u32::from(pool.network());
    let hosts = (u64::from(u32::from(pool.broadcast())) - u64::from(network)).saturating_sub(1);
    (0..hosts).map(move |step| {
        let host = (u64::from(start.saturating_sub(1)) + step) % hosts + 1;
        // `host` is below the pool's size, so the sum stays inside the pool.
        Ipv4Addr::from(network + host as u32)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_prefix_is_a_unique_local_48() {
        let prefix = ula_prefix(&[1; 16]);
        assert_eq!(prefix.prefix_len(), 48);
        assert_eq!(prefix.network().octets()[0], 0xfd);
        assert_ne!(prefix, ula_prefix(&[2; 16]));
        let address = ipv6_of(&[1; 16], NodeId(11));
        assert!(prefix.contains(&address));
        assert!(address.to_string().ends_with("::b"), "{address}");
    }

    #[test]
    fn hosts_wrap_around_and_come_once_each() {
        let pool: Ipv4Net = "192.0.2.0/29".parse().unwrap();
        let hosts: Vec<String> = hosts_from(pool, 5).map(|host| host.to_string()).collect();
        assert_eq!(hosts, ["192.0.2.5", "192.0.2.6", "192.0.2.1", "192.0.2.2", "192.0.2.3", "192.0.2.4"]);
        assert!(hosts_from(pool, 5).all(|host| is_host(&pool, host)));
        assert!(!is_host(&pool, pool.network()) && !is_host(&pool, pool.broadcast()));
        let all: Ipv4Net = "0.0.0.0/0".parse().unwrap();
        let ends: Vec<Ipv4Addr> = hosts_from(all, u32::MAX - 1).take(2).collect();
        assert_eq!(ends, [Ipv4Addr::new(255, 255, 255, 254), Ipv4Addr::new(0, 0, 0, 1)]);
    }
}
