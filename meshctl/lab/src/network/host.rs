use std::{
    ffi::OsStr,
    fmt,
    net::IpAddr,
    os::{
        fd::{AsRawFd, BorrowedFd},
        unix::process::CommandExt,
    },
    path::PathBuf,
    process::Command,
    sync::{Arc, Mutex, PoisonError},
};

use ipnet::IpNet;

use super::{namespaces::Namespaces, netlink::Netlink, switch::plug_in};
use crate::LabError;

/// One machine of a [`Lab`](crate::Lab): a network of its own behind one cable, and a private `/run`.
///
/// A cheap handle; the host lives until the last one and the last process in it are gone.
#[derive(Clone)]
pub struct Host(Arc<Machine>);

struct Machine {
    name: String,
    port: String,
    namespaces: Namespaces,
    switch: Arc<Namespaces>,
    addresses: Mutex<Vec<IpNet>>,
}

impl Host {
    /// The name of the underlay interface in every host.
    pub const INTERFACE: &str = "eth0";

    pub(super) fn new(name: &str, port: String, namespaces: Namespaces, switch: Arc<Namespaces>) -> Self {
        let addresses = Mutex::default();
        Self(Arc::new(Machine { name: name.to_owned(), port, namespaces, switch, addresses }))
    }

    pub(super) fn namespaces(&self) -> &Namespaces {
        &self.0.namespaces
    }

    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The underlay addresses given last.
    pub fn addresses(&self) -> Vec<IpNet> {
        self.0.addresses.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The first IPv4 underlay address.
    pub fn ipv4(&self) -> Option<IpAddr> {
        self.addresses().iter().map(IpNet::addr).find(IpAddr::is_ipv4)
    }

    /// The first IPv6 underlay address.
    pub fn ipv6(&self) -> Option<IpAddr> {
        self.addresses().iter().map(IpNet::addr).find(IpAddr::is_ipv6)
    }

    /// A command that will run on this host: its network, its `/run`, our current directory.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        let machine = Arc::clone(&self.0);
        // SAFETY: the hook only makes system calls (see `sys`), on descriptors that it keeps open.
        unsafe { command.pre_exec(move || machine.namespaces.join()) };
        command
    }

    /// Runs `work` on a thread of its own on this host and returns its answer. Sockets opened there
    /// stay there, also when they are used elsewhere later.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, LabError> {
        self.0.namespaces.run(work)
    }

    /// The network namespace, for `setns(2)`.
    pub fn ns_fd(&self) -> BorrowedFd<'_> {
        self.0.namespaces.net()
    }

    /// The network namespace as a path, for `nsenter --net=` and the like, while this handle lives.
    pub fn ns_path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.ns_fd().as_raw_fd()).into()
    }

    /// Moves the host: from now on it has exactly these underlay addresses. A default route goes with
    /// the address it needs.
    pub fn set_addresses(&self, addresses: &[IpNet]) -> Result<(), LabError> {
        Netlink::with(self.namespaces(), |netlink| netlink.replace_addresses(Self::INTERFACE, addresses))?;
        *self.0.addresses.lock().unwrap_or_else(PoisonError::into_inner) = addresses.to_vec();
        Ok(())
    }

    /// Routes everything unknown to `gateway`, which is an address of another host.
    pub fn add_default_route(&self, gateway: IpAddr) -> Result<(), LabError> {
        if !self.addresses().iter().any(|own| own.addr().is_ipv4() == gateway.is_ipv4()) {
            return Err(LabError::Gateway { gateway });
        }
        Netlink::with(self.namespaces(), |netlink| netlink.add_default_route(Self::INTERFACE, gateway))
    }

    /// Pulls the cable: the host sees its carrier go.
    pub fn link_down(&self) -> Result<(), LabError> {
        Netlink::with(&self.0.switch, |netlink| {
            netlink.set_link("pull the cable", &self.0.port, |link| link.down())
        })
    }

    /// Plugs the cable in again.
    pub fn link_up(&self) -> Result<(), LabError> {
        Netlink::with(&self.0.switch, |netlink| {
            netlink.set_link("plug in the cable", &self.0.port, |link| link.up())
        })
    }

    /// Cuts the host off behind its carrier, as a fault further away would: it sees no link event.
    pub fn partition(&self) -> Result<(), LabError> {
        Netlink::with(&self.0.switch, |netlink| {
            netlink.set_link("leave the switch", &self.0.port, |link| link.nocontroller())
        })
    }

    /// Ends [`partition`](Self::partition).
    pub fn rejoin(&self) -> Result<(), LabError> {
        Netlink::with(&self.0.switch, |netlink| plug_in(netlink, &self.0.port))
    }
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Host").field("name", &self.0.name).field("addresses", &self.addresses()).finish()
    }
}
