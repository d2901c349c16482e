//! Where this node can be reached, and which told endpoints of others are worth a packet.

use std::net::{IpAddr, SocketAddr};

use ipnet::{Ipv4Net, Ipv6Net};
use mesh_proto::v1 as pb;
use mesh_proto::v1::endpoint::Source as Told;

use crate::hostop::InterfaceAddress;
use crate::limits::{ENDPOINTS_PER_PEER_MAX, OWN_ENDPOINTS_MAX};
use crate::paths::Source;

/// The prefixes of the overlay. An endpoint inside them would send the tunnel through itself.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Overlay {
    pub(crate) ipv4_pool: Ipv4Net,
    pub(crate) ipv6_prefix: Ipv6Net,
}

impl Overlay {
    fn contains(&self, ip: &IpAddr) -> bool {
        match ip {
            IpAddr::V4(ip) => self.ipv4_pool.contains(ip),
            IpAddr::V6(ip) => self.ipv6_prefix.contains(ip),
        }
    }

    /// Our own endpoints: what an administrator named, then the addresses of our interfaces. Loopback
    /// counts only if there is nothing else, so that several nodes on one machine find each other.
    pub(crate) fn own_endpoints(
        &self,
        configured: &[SocketAddr],
        addresses: &[InterfaceAddress],
        overlay_interface: &str,
        port: u16,
    ) -> Vec<pb::Endpoint> {
        let reachable = |found: &&InterfaceAddress| {
            found.interface != overlay_interface
                && !self.contains(&found.address)
                && match found.address {
                    IpAddr::V4(ip) => !ip.is_link_local() && !ip.is_unspecified(),
                    IpAddr::V6(ip) => !ip.is_unicast_link_local() && !ip.is_unspecified(),
                }
        };
        let (loopback, outside): (Vec<_>, Vec<_>) = addresses
            .iter()
            .filter(reachable)
            .partition(|found| found.loopback || found.address.is_loopback());
        let chosen = if outside.is_empty() && configured.is_empty() { loopback } else { outside };
        let configured = configured.iter().map(|endpoint| (Told::Configured, *endpoint));
        let interfaces = chosen.iter().map(|found| (Told::Interface, SocketAddr::new(found.address, port)));
        let mut endpoints: Vec<pb::Endpoint> = Vec::new();
        for (source, endpoint) in configured.chain(interfaces) {
            let address = endpoint.to_string();
            if endpoints.len() < OWN_ENDPOINTS_MAX && !endpoints.iter().any(|known| known.address == address)
            {
                endpoints.push(pb::Endpoint { address, source: source as i32 });
            }
        }
        endpoints
    }

    /// What others told of a peer, as far as it is usable.
    pub(crate) fn candidates(&self, told: &[pb::Endpoint]) -> Vec<(Source, SocketAddr)> {
        told.iter()
            .take(ENDPOINTS_PER_PEER_MAX)
            .filter_map(|endpoint| {
                let address: SocketAddr = endpoint.address.parse().ok()?;
                let source = match endpoint.source() {
                    Told::Configured => Source::Configured,
                    Told::Interface => Source::Interface,
                    Told::ControllerSaw => Source::ControllerSaw,
                    Told::PeerSaw | Told::Unspecified => Source::PeerSaw,
                };
                (!self.contains(&address.ip())).then_some((source, address))
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PORT: u16 = 51820;

    fn overlay() -> Overlay {
        Overlay { ipv4_pool: "100.64.0.0/10".parse().unwrap(), ipv6_prefix: "fd5e:1:2::/48".parse().unwrap() }
    }

    fn address(interface: &str, address: &str) -> InterfaceAddress {
        let address: IpAddr = address.parse().unwrap();
        InterfaceAddress { interface: interface.into(), address, loopback: address.is_loopback() }
    }

    fn told(endpoints: &[pb::Endpoint]) -> Vec<&str> {
        endpoints.iter().map(|endpoint| endpoint.address.as_str()).collect()
    }

    #[test]
    fn own_endpoints_are_those_that_others_can_reach() {
        let addresses = [
            address("lo", "127.0.0.1"),
            address("eth0", "192.0.2.7"),
            address("eth0", "fe80::1"),
            address("eth0", "2001:db8::7"),
            address("mesh0", "192.0.2.99"),
            address("eth1", "100.64.0.9"),
            address("eth1", "169.254.3.3"),
        ];
        let configured = ["198.51.100.1:4000".parse().unwrap()];
        let endpoints = overlay().own_endpoints(&configured, &addresses, "mesh0", PORT);
        assert_eq!(told(&endpoints), ["198.51.100.1:4000", "192.0.2.7:51820", "[2001:db8::7]:51820"]);
        let alone = overlay().own_endpoints(&[], &addresses[..1], "mesh0", PORT);
        assert_eq!(told(&alone), ["127.0.0.1:51820"]);
    }

    #[test]
    fn an_endpoint_inside_the_overlay_or_unreadable_is_left_out() {
        let endpoint =
            |address: &str| pb::Endpoint { address: address.into(), source: Told::Interface as i32 };
        let list = ["100.64.0.5:1", "[fd5e:1:2::5]:1", "nonsense", "192.0.2.1:51820"].map(endpoint);
        let expected = [(Source::Interface, "192.0.2.1:51820".parse().unwrap())];
        assert_eq!(overlay().candidates(&list), expected);
    }
}
