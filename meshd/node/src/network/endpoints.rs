//! Where this node can be reached, and which told endpoints of others are worth a packet.

use std::net::{IpAddr, SocketAddr};

use mesh_core::endpoints::{Overlay, Source};
use mesh_proto::v1 as pb;
use mesh_proto::v1::endpoint::Source as Told;

use super::UnderlayNews;
use crate::hostop::InterfaceAddress;
use crate::limits::{ENDPOINTS_PER_PEER_MAX, OWN_ENDPOINTS_MAX};

/// Our own endpoints: what an administrator named, then where the controller sees the tunnel's port, then the
/// addresses of our interfaces. Loopback counts only if there is nothing else, so that several nodes on one machine find each other.
pub(super) fn own_endpoints(
    overlay: Overlay,
    underlay: &UnderlayNews,
    addresses: &[InterfaceAddress],
    overlay_interface: &str,
    port: u16,
) -> Vec<pb::Endpoint> {
    let reachable = |found: &&InterfaceAddress| {
        found.interface != overlay_interface
            && overlay.may_carry(SocketAddr::new(found.address, port))
            && match found.address {
                IpAddr::V4(ip) => !ip.is_link_local(),
                // Without its interface a link-local address leads nowhere.
                IpAddr::V6(ip) => !ip.is_unicast_link_local(),
            }
    };
    let (loopback, outside): (Vec<_>, Vec<_>) =
        addresses.iter().filter(reachable).partition(|found| found.loopback || found.address.is_loopback());
    let chosen = if outside.is_empty() && underlay.configured.is_empty() { loopback } else { outside };
    let configured = underlay.configured.iter().map(|endpoint| (Told::Configured, *endpoint));
    let interfaces = chosen.iter().map(|found| (Told::Interface, SocketAddr::new(found.address, port)));
    let mut endpoints: Vec<pb::Endpoint> = Vec::new();
    let mapped = underlay.mapped.filter(|mapped| overlay.may_carry(*mapped));
    let mapped = mapped.filter(|mapped| !chosen.iter().any(|found| found.address == mapped.ip()));
    let mapped = mapped.map(|endpoint| (Told::ControllerSaw, endpoint));
    for (source, endpoint) in configured.chain(mapped).chain(interfaces) {
        let address = endpoint.to_string();
        if endpoints.len() < OWN_ENDPOINTS_MAX && !endpoints.iter().any(|known| known.address == address) {
            endpoints.push(pb::Endpoint { address, source: source as i32 });
        }
    }
    endpoints
}

/// What others told of a peer, as far as it can be read; the peer table leaves out what cannot be used.
pub(super) fn candidates(told: &[pb::Endpoint]) -> Vec<(SocketAddr, Source)> {
    told.iter()
        .take(ENDPOINTS_PER_PEER_MAX)
        .filter_map(|endpoint| {
            let source = match endpoint.source() {
                Told::Configured => Source::Configured,
                Told::Interface => Source::Interface,
                Told::ControllerSaw => Source::ControllerSaw,
                Told::PeerSaw | Told::Unspecified => Source::PeerSaw,
            };
            Some((endpoint.address.parse().ok()?, source))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PORT: u16 = 51820;

    fn overlay() -> Overlay {
        Overlay { ipv4: "100.64.0.0/10".parse().unwrap(), ipv6: "fd5e:1:2::/48".parse().unwrap() }
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
        let mut underlay = UnderlayNews {
            configured: vec!["198.51.100.1:4000".parse().unwrap()],
            mapped: Some("203.0.113.5:40000".parse().unwrap()),
            ..UnderlayNews::default()
        };
        let own = |underlay: &UnderlayNews| own_endpoints(overlay(), underlay, &addresses, "mesh0", PORT);
        let named = ["198.51.100.1:4000", "203.0.113.5:40000", "192.0.2.7:51820", "[2001:db8::7]:51820"];
        assert_eq!(told(&own(&underlay)), named);
        assert_eq!(own(&underlay)[1].source(), Told::ControllerSaw);
        // No router between the controller and us: nothing new.
        underlay.mapped = Some("192.0.2.7:51820".parse().unwrap());
        assert_eq!(own(&underlay).len(), 3);
        let alone = own_endpoints(overlay(), &UnderlayNews::default(), &addresses[..1], "mesh0", PORT);
        assert_eq!(told(&alone), ["127.0.0.1:51820"]);
    }

    #[test]
    fn an_endpoint_that_cannot_be_read_is_left_out() {
        let endpoint =
            |address: &str| pb::Endpoint { address: address.into(), source: Told::Interface as i32 };
        let list = ["nonsense", "192.0.2.1:51820", "192.0.2.1", ""].map(endpoint);
        assert_eq!(candidates(&list), [("192.0.2.1:51820".parse().unwrap(), Source::Interface)]);
    }
}
