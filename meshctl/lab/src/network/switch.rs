use std::{collections::BTreeMap, net::Ipv4Addr, sync::Arc};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::{
    host::Host,
    namespaces::Namespaces,
    netlink::{Netlink, index_of},
};
use crate::LabError;

/// Ports of one lab; a bridge takes 1,023 (`BR_PORT_BITS`), our addresses are numbered by one byte.
const HOSTS_MAX: usize = 250;
const BRIDGE: &str = "switch";

/// A switch with hosts on it: the underlay of a fleet.
///
/// It stands in namespaces of its own, so any number of labs may exist side by side. Needs the right
/// to make network namespaces: be root, or [`enter`](crate::enter) first.
#[derive(Debug)]
pub struct Lab {
    switch: Arc<Namespaces>,
    hosts: BTreeMap<String, Host>,
}

impl Lab {
    /// A switch without hosts.
    ///
    /// # Errors
    /// [`LabError::NamespacesRefused`] where this process may not make namespaces.
    pub fn new() -> Result<Self, LabError> {
        let switch = Namespaces::new()?;
        Netlink::with(&switch, |netlink| netlink.add_bridge(BRIDGE))?;
        Ok(Self { switch: Arc::new(switch), hosts: BTreeMap::new() })
    }

    /// Underlay addresses for the host numbered `number`: `10.99.0.N/24` and `fd99::N/64`.
    pub fn underlay(number: u8) -> [IpNet; 2] {
        let v4 = Ipv4Net::new(Ipv4Addr::new(10, 99, 0, number), 24).expect("24 is a prefix length of IPv4");
        let v6 = Ipv6Net::new([0xfd99, 0, 0, 0, 0, 0, 0, number.into()].into(), 64)
            .expect("64 is a prefix length of IPv6");
        [v4.into(), v6.into()]
    }

    /// Plugs a new host with these addresses into the switch. It has `lo`, `eth0`, routes to its own
    /// prefixes and no default route.
    pub fn add_host(&mut self, name: &str, addresses: &[IpNet]) -> Result<Host, LabError> {
        if self.hosts.contains_key(name) {
            return Err(LabError::HostExists { name: name.to_owned() });
        }
        if self.hosts.len() == HOSTS_MAX {
            return Err(LabError::Full { limit: HOSTS_MAX });
        }
        let port = format!("port{}", self.hosts.len() + 1);
        let namespaces = Namespaces::new()?;
        Netlink::with(&self.switch, |netlink| {
            netlink.add_veth(&port, Host::INTERFACE, namespaces.net())?;
            plug_in(netlink, &port)
        })?;
        let host = Host::new(name, port, namespaces, Arc::clone(&self.switch));
        Netlink::with(host.namespaces(), |netlink| {
            netlink.set_link("set the link up", Host::INTERFACE, |link| link.up())
        })?;
        host.set_addresses(addresses)?;
        self.hosts.insert(name.to_owned(), host.clone());
        Ok(host)
    }

    /// The host of that name.
    pub fn host(&self, name: &str) -> Option<&Host> {
        self.hosts.get(name)
    }

    /// All hosts, by name.
    pub fn hosts(&self) -> impl Iterator<Item = &Host> {
        self.hosts.values()
    }
}

/// Makes `port` a port of the bridge; to be called in the switch's namespace.
pub(super) fn plug_in(netlink: &Netlink, port: &str) -> Result<(), LabError> {
    let bridge = index_of(BRIDGE)?;
    netlink.set_link("plug into the switch", port, |link| link.controller(bridge).up())
}
