//! The few rtnetlink requests a lab needs, so that it does not depend on iproute2.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd, BorrowedFd},
};

use futures::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::{
    Handle, LinkBridge, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder,
    packet_route::address::{AddressAttribute, AddressFlags, AddressScope},
};

use super::namespaces::Namespaces;
use crate::LabError;

/// A netlink connection into one namespace, and the runtime that drives it.
pub(crate) struct Netlink {
    runtime: tokio::runtime::Runtime,
    handle: Handle,
}

impl Netlink {
    /// Runs `work` with a connection into `namespaces`, on a thread of its own, so that a caller may
    /// itself be inside an async runtime.
    pub(crate) fn with<T: Send>(
        namespaces: &Namespaces,
        work: impl FnOnce(&Self) -> Result<T, LabError> + Send,
    ) -> Result<T, LabError> {
        namespaces.run(|| {
            let netlink = Self::connect()
                .map_err(|source| LabError::System { attempt: "open a netlink socket", source })?;
            work(&netlink)
        })?
    }

    fn connect() -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        let (connection, handle, _) = {
            let _guard = runtime.enter();
            rtnetlink::new_connection()?
        };
        runtime.spawn(connection);
        Ok(Self { runtime, handle })
    }

    pub(crate) fn add_bridge(&self, name: &str) -> Result<(), LabError> {
        let message = LinkBridge::new(name).up().build();
        self.request("add a bridge", name, self.handle.link().add(message).execute())
    }

    /// Adds a veth pair; `name` is here and up, `peer` in the namespace `other`, and down.
    pub(crate) fn add_veth(&self, name: &str, peer: &str, other: BorrowedFd<'_>) -> Result<(), LabError> {
        let pair = LinkVeth::new(name, peer).up().build();
        self.request("add a veth pair", name, self.handle.link().add(pair).execute())?;
        self.set_link("move a veth end", peer, |link| link.setns_by_fd(other.as_raw_fd()))
    }

    /// Changes the link `name` as `change` says; `attempt` names that in an error.
    pub(crate) fn set_link(
        &self,
        attempt: &'static str,
        name: &str,
        change: impl FnOnce(LinkMessageBuilder<LinkUnspec>) -> LinkMessageBuilder<LinkUnspec>,
    ) -> Result<(), LabError> {
        let message = change(LinkUnspec::new_with_name(name)).build();
        self.request(attempt, name, self.handle.link().set(message).execute())
    }

    /// Gives the link exactly `addresses`, apart from its link-local ones.
    pub(crate) fn replace_addresses(&self, name: &str, addresses: &[IpNet]) -> Result<(), LabError> {
        let index = index_of(name)?;
        let listing = self.handle.address().get().set_link_index_filter(index).execute();
        let present: Vec<_> = self.request("list addresses", name, listing.try_collect())?;
        for address in present.into_iter().filter(|address| address.header.scope != AddressScope::Link) {
            self.request("remove an address", name, self.handle.address().del(address).execute())?;
        }
        for address in addresses {
            let mut request = self.handle.address().add(index, address.addr(), address.prefix_len());
            // Nobody else is on this wire; without the flag an IPv6 address is unusable for a second.
            request.message_mut().attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
            self.request("add an address", name, request.execute())?;
        }
        Ok(())
    }

    /// Sends everything without a better route to `gateway`.
    pub(crate) fn add_default_route(&self, name: &str, gateway: IpAddr) -> Result<(), LabError> {
        let index = index_of(name)?;
        let message = match gateway {
            IpAddr::V4(gateway) => {
                RouteMessageBuilder::<Ipv4Addr>::new().gateway(gateway).output_interface(index).build()
            }
            IpAddr::V6(gateway) => {
                RouteMessageBuilder::<Ipv6Addr>::new().gateway(gateway).output_interface(index).build()
            }
        };
        self.request("add a default route", name, self.handle.route().add(message).execute())
    }

    fn request<T>(
        &self,
        attempt: &'static str,
        interface: &str,
        request: impl Future<Output = Result<T, rtnetlink::Error>>,
    ) -> Result<T, LabError> {
        self.runtime.block_on(request).map_err(|source| LabError::Netlink {
            attempt,
            interface: interface.to_owned(),
            source: Box::new(source),
        })
    }
}

/// The kernel's number for the link `name` in the calling thread's network namespace.
pub(crate) fn index_of(name: &str) -> Result<u32, LabError> {
    nix::net::if_::if_nametoindex(name)
        .map_err(|errno| LabError::System { attempt: "look up a network interface", source: errno.into() })
}
