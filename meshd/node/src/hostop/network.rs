//! Interfaces, addresses and routes, over netlink.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures::TryStreamExt as _;
use ipnet::IpNet;
use nix::errno::Errno;
use rtnetlink::RouteMessageBuilder;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressHeaderFlags};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteScope, RouteType,
};

use super::{Host, HostError};

/// Metric that every other route wins against.
const WORST_METRIC: u32 = u32::MAX;

/// An interface address as the kernel lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct InterfaceAddress {
    pub(crate) interface: String,
    pub(crate) address: IpAddr,
    pub(crate) loopback: bool,
}

/// How the kernel would send a packet to one address. Two that differ mean that the host has moved, as far as
/// that address is concerned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Way {
    source: Option<IpAddr>,
    gateway: Option<IpAddr>,
    interface: Option<u32>,
}

impl Host {
    /// All addresses of all interfaces that are up.
    pub(crate) async fn addresses(&self) -> Result<Vec<InterfaceAddress>, HostError> {
        let failed = |source| HostError::Netlink { action: "list interfaces".into(), source };
        let mut links = std::collections::BTreeMap::new();
        let mut stream = self.netlink.link().get().execute();
        while let Some(link) = stream.try_next().await.map_err(failed)? {
            let name = link.attributes.iter().find_map(|attribute| match attribute {
                LinkAttribute::IfName(name) => Some(name.clone()),
                _ => None,
            });
            let up = link.header.flags.contains(LinkFlags::Up);
            let loopback = link.header.flags.contains(LinkFlags::Loopback);
            if let Some(name) = name.filter(|_| up) {
                links.insert(link.header.index, (name, loopback));
            }
        }
        let mut found = Vec::new();
        let mut stream = self.netlink.address().get().execute();
        while let Some(message) = stream.try_next().await.map_err(failed)? {
            let Some((interface, loopback)) = links.get(&message.header.index) else { continue };
            // On point-to-point links `Address` is the far end and `Local` is ours.
            let local = message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Local(address) => Some(*address),
                _ => None,
            });
            let address = message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Address(address) => Some(*address),
                _ => None,
            });
            if let Some(address) = local.or(address) {
                found.push(InterfaceAddress { interface: interface.clone(), address, loopback: *loopback });
            }
        }
        Ok(found)
    }

    /// The way to `address`; `None` if there is none.
    pub(crate) async fn way_to(&self, address: IpAddr) -> Option<Way> {
        let (family, bits, destination) = match address.to_canonical() {
            IpAddr::V4(ip) => (AddressFamily::Inet, 32, RouteAddress::Inet(ip)),
            IpAddr::V6(ip) => (AddressFamily::Inet6, 128, RouteAddress::Inet6(ip)),
        };
        let mut question = RouteMessage::default();
        question.header.address_family = family;
        question.header.destination_prefix_length = bits;
        question.attributes.push(RouteAttribute::Destination(destination));
        let mut answers = self.netlink.route().get(question).execute();
        let mut way = None;
        loop {
            match answers.try_next().await {
                Ok(Some(route)) if route.header.kind != RouteType::Unreachable => way = Some(way_of(&route)),
                Ok(Some(_)) => {}
                // "Network is unreachable" is an answer too.
                Ok(None) | Err(_) => return way,
            }
        }
    }

    /// Whether the kernel has a route for exactly `prefix`: into `interface`, or with `None` an unreachable one.
    /// Only those routes are asked for, since a router's table may hold a million others.
    pub(crate) async fn has_route(&self, prefix: IpNet, interface: Option<&str>) -> Result<bool, HostError> {
        let index = match interface {
            Some(interface) => Some(self.index(interface).await?),
            None => None,
        };
        let mut question = RouteMessage::default();
        question.header.address_family = match prefix {
            IpNet::V4(_) => AddressFamily::Inet,
            IpNet::V6(_) => AddressFamily::Inet6,
        };
        question.header.table = RouteHeader::RT_TABLE_MAIN;
        match index {
            Some(index) => question.attributes.push(RouteAttribute::Oif(index)),
            None => question.header.kind = RouteType::Unreachable,
        }
        let failed = |source| HostError::Netlink { action: "list routes".into(), source };
        let mut stream = self.netlink.route().get(question).execute();
        let mut found = false;
        // Read to its end: what is left of an answer would be taken for a part of the next.
        while let Some(route) = stream.try_next().await.map_err(failed)? {
            found |= leads(&route, prefix, index);
        }
        Ok(found)
    }

    async fn index(&self, interface: &str) -> Result<u32, HostError> {
        let mut stream = self.netlink.link().get().match_name(interface.to_owned()).execute();
        match stream.try_next().await {
            Ok(Some(link)) => Ok(link.header.index),
            _ => Err(HostError::NoInterface { interface: interface.to_owned() }),
        }
    }

    pub(super) async fn add_address(&self, interface: &str, address: IpNet) -> Result<(), HostError> {
        let index = self.index(interface).await?;
        let mut request = self.netlink.address().add(index, address.addr(), address.prefix_len());
        // Ours alone by the certificate. While the kernel still asked for duplicates it would refuse the
        // address as a route's source.
        request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
        outcome(request.execute().await, || format!("add address {address} to {interface}"), address)
    }

    /// A route that is there stays as it is: replacing it would drop the kernel's cached ways.
    pub(super) async fn add_route(
        &self,
        interface: &str,
        prefix: IpNet,
        source: IpAddr,
    ) -> Result<(), HostError> {
        // A kernel that cannot say is given the route again.
        if self.has_route(prefix, Some(interface)).await.unwrap_or(false) {
            return Ok(());
        }
        let index = self.index(interface).await?;
        let message = match (prefix, source) {
            (IpNet::V4(prefix), IpAddr::V4(source)) => RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(prefix.network(), prefix.prefix_len())
                .output_interface(index)
                .pref_source(source)
                .scope(RouteScope::Link)
                .build(),
            (IpNet::V6(prefix), IpAddr::V6(source)) => RouteMessageBuilder::<Ipv6Addr>::new()
                .destination_prefix(prefix.network(), prefix.prefix_len())
                .output_interface(index)
                .pref_source(source)
                .build(),
            _ => return Err(HostError::NoFamily { family: "route with a source of the other family" }),
        };
        let added = self.netlink.route().add(message).replace().execute().await;
        outcome(added, || format!("add route {prefix} to {interface}"), prefix)
    }

    pub(super) async fn add_unreachable(&self, prefix: IpNet) -> Result<(), HostError> {
        let added = self.netlink.route().add(unreachable(prefix)).execute().await;
        outcome(added, || format!("add unreachable route {prefix}"), prefix)
    }

    pub(super) async fn del_unreachable(&self, prefix: IpNet) -> Result<(), HostError> {
        match self.netlink.route().del(unreachable(prefix)).execute().await {
            Err(error) if errno(&error) == Some(Errno::ESRCH) => Ok(()),
            other => outcome(other, || format!("remove unreachable route {prefix}"), prefix),
        }
    }
}

fn way_of(route: &RouteMessage) -> Way {
    let address = |address: &RouteAddress| match address {
        RouteAddress::Inet(ip) => Some(IpAddr::V4(*ip)),
        RouteAddress::Inet6(ip) => Some(IpAddr::V6(*ip)),
        _ => None,
    };
    let mut way = Way { source: None, gateway: None, interface: None };
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::PrefSource(source) => way.source = address(source),
            RouteAttribute::Gateway(gateway) => way.gateway = address(gateway),
            RouteAttribute::Oif(index) => way.interface = Some(*index),
            _ => {}
        }
    }
    way
}

fn leads(route: &RouteMessage, prefix: IpNet, index: Option<u32>) -> bool {
    let destination = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(address)) => Some(IpAddr::V4(*address)),
        RouteAttribute::Destination(RouteAddress::Inet6(address)) => Some(IpAddr::V6(*address)),
        _ => None,
    });
    let out = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(*index),
        _ => None,
    });
    let way = match index {
        Some(index) => route.header.kind == RouteType::Unicast && out == Some(index),
        None => route.header.kind == RouteType::Unreachable,
    };
    way && destination == Some(prefix.network())
        && route.header.destination_prefix_length == prefix.prefix_len()
}

fn unreachable(prefix: IpNet) -> RouteMessage {
    let mut message = match prefix {
        IpNet::V4(prefix) => RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(prefix.network(), prefix.prefix_len())
            .priority(WORST_METRIC)
            .build(),
        IpNet::V6(prefix) => RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(prefix.network(), prefix.prefix_len())
            .priority(WORST_METRIC)
            .build(),
    };
    message.header.kind = RouteType::Unreachable;
    debug_assert!(matches!(message.header.address_family, AddressFamily::Inet | AddressFamily::Inet6));
    message
}

fn outcome(
    result: Result<(), rtnetlink::Error>,
    action: impl FnOnce() -> String,
    subject: IpNet,
) -> Result<(), HostError> {
    match result {
        Ok(()) => Ok(()),
        Err(error) => match errno(&error) {
            Some(Errno::EEXIST) => Ok(()),
            // The kernel says EACCES for an address of a family that sysctl switched off.
            Some(Errno::EACCES | Errno::EAFNOSUPPORT | Errno::EOPNOTSUPP | Errno::ENODEV)
                if matches!(subject, IpNet::V6(_)) =>
            {
                Err(HostError::NoFamily { family: "IPv6" })
            }
            Some(Errno::EPERM) => Err(HostError::NoRights),
            _ => Err(HostError::Netlink { action: action(), source: error }),
        },
    }
}

fn errno(error: &rtnetlink::Error) -> Option<Errno> {
    match error {
        rtnetlink::Error::NetlinkError(message) => {
            Some(Errno::from_raw(message.raw_code().unsigned_abs().try_into().ok()?))
        }
        _ => None,
    }
}
