//! Everything that needs root, as one closed list. Executed in-process; a privileged helper could take
//! the same list over a socketpair.

use std::net::IpAddr;
use std::path::PathBuf;
use std::process::Stdio;

use futures::TryStreamExt as _;
use ipnet::IpNet;
use mesh_proto::v1::ErrorCode;
use nix::errno::Errno;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressHeaderFlags};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteScope, RouteType};
use rtnetlink::{Handle, RouteMessageBuilder};
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::failure::Failure;
use crate::firewall::TABLE;
use crate::limits::{PROGRAM_TIMEOUT, TABLE_BYTES_MAX};

/// Metric that every other route wins against.
const WORST_METRIC: u32 = u32::MAX;

/// Where `nft` is looked for besides `PATH`: daemons are often started without the `sbin` folders.
const SBIN: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/local/sbin", "/usr/bin"];

/// One change of the host. No text from the network is in it: prefixes, names that were checked, and
/// rule text that this program wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum HostOp {
    /// Gives the interface an address.
    AddAddress {
        interface: String,
        address: IpNet,
    },
    /// Sends a prefix into the interface, with `source` as our own address.
    AddRoute {
        interface: String,
        prefix: IpNet,
        source: IpAddr,
    },
    /// Answers "unreachable" for the prefix whenever no better route exists. Outlives the daemon.
    AddUnreachable {
        prefix: IpNet,
    },
    DelUnreachable {
        prefix: IpNet,
    },
    /// Replaces table `inet meshd` in one transaction.
    ApplyNft {
        text: String,
    },
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum HostError {
    #[error("no rights to change the network; meshd needs CAP_NET_ADMIN")]
    NoRights,
    #[error("interface {interface} does not exist")]
    NoInterface { interface: String },
    #[error("the kernel has no {family}")]
    NoFamily { family: &'static str },
    #[error("cannot {action}")]
    Netlink {
        action: String,
        #[source]
        source: rtnetlink::Error,
    },
    #[error("cannot open a netlink socket")]
    Socket {
        #[source]
        source: std::io::Error,
    },
    #[error("nft is not installed")]
    NftMissing,
    #[error("nft refused the rules: {output}")]
    NftRefused { output: String },
    #[error("cannot run nft")]
    NftRun {
        #[source]
        source: std::io::Error,
    },
    #[error("nft printed more than {TABLE_BYTES_MAX} bytes")]
    NftLong,
    #[error("nft did not end within {} s", PROGRAM_TIMEOUT.as_secs())]
    NftTimeout,
}

impl HostError {
    pub(crate) fn is_firewall(&self) -> bool {
        matches!(
            self,
            Self::NftMissing
                | Self::NftRefused { .. }
                | Self::NftRun { .. }
                | Self::NftLong
                | Self::NftTimeout
        )
    }
}

impl From<HostError> for Failure {
    fn from(error: HostError) -> Self {
        let (code, next) = match &error {
            HostError::NoRights => (ErrorCode::TunDenied, "run meshd as root, or give it CAP_NET_ADMIN"),
            HostError::NftMissing => (
                ErrorCode::FirewallUnavailable,
                "install the package nftables; no peer is brought up without it",
            ),
            error if error.is_firewall() => {
                (ErrorCode::FirewallUnavailable, "check that the kernel has nf_tables and conntrack")
            }
            HostError::NoFamily { .. } => {
                (ErrorCode::Internal, "switch the family on, see sysctl net.ipv6.conf")
            }
            _ => (ErrorCode::Internal, "look at the daemon's log and at `ip addr`, `ip route`"),
        };
        Failure::new(code, mesh_runtime::chain(&error), next)
    }
}

/// The hands that carry out [`HostOp`]s, and the eyes that look at interfaces.
#[derive(Clone)]
pub(crate) struct Host {
    netlink: Handle,
    nft: Option<PathBuf>,
}

impl std::fmt::Debug for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Host").field("nft", &self.nft).finish_non_exhaustive()
    }
}

/// Table `inet meshd` as it stands in the kernel: everything in it, and the handles that the kernel gave
/// when it was made. Two that are equal are the same table, unchanged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TableMark([u8; 32]);

/// An interface address as the kernel lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct InterfaceAddress {
    pub(crate) interface: String,
    pub(crate) address: IpAddr,
    pub(crate) loopback: bool,
}

impl Host {
    /// Opens a netlink socket in this process's network namespace. Must be called inside a runtime.
    ///
    /// # Errors
    /// [`HostError::Socket`].
    pub(crate) fn open() -> Result<Self, HostError> {
        let (connection, netlink, _) =
            rtnetlink::new_connection().map_err(|source| HostError::Socket { source })?;
        tokio::spawn(connection);
        Ok(Self { netlink, nft: find_nft() })
    }

    pub(crate) fn has_nft(&self) -> bool {
        self.nft.is_some()
    }

    /// Carries out one operation. Doing again what is already so succeeds.
    pub(crate) async fn apply(&self, op: HostOp) -> Result<(), HostError> {
        tracing::debug!(?op, "host operation");
        match op {
            HostOp::AddAddress { interface, address } => self.add_address(&interface, address).await,
            HostOp::AddRoute { interface, prefix, source } => {
                self.add_route(&interface, prefix, source).await
            }
            HostOp::AddUnreachable { prefix } => self.add_unreachable(prefix).await,
            HostOp::DelUnreachable { prefix } => self.del_unreachable(prefix).await,
            HostOp::ApplyNft { text } => self.apply_nft(&text).await,
        }
    }

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

    /// Whether the kernel has a route for exactly `prefix`: into `interface`, or with `None` an unreachable one.
    pub(crate) async fn has_route(&self, prefix: IpNet, interface: Option<&str>) -> Result<bool, HostError> {
        let index = match interface {
            Some(interface) => Some(self.index(interface).await?),
            None => None,
        };
        let question = match prefix {
            IpNet::V4(_) => RouteMessageBuilder::<std::net::Ipv4Addr>::new().build(),
            IpNet::V6(_) => RouteMessageBuilder::<std::net::Ipv6Addr>::new().build(),
        };
        let failed = |source| HostError::Netlink { action: "list routes".into(), source };
        let mut stream = self.netlink.route().get(question).execute();
        let mut found = false;
        // Read to its end: what is left of an answer would be taken for a part of the next.
        while let Some(route) = stream.try_next().await.map_err(failed)? {
            found |= leads(&route, prefix, index);
        }
        Ok(found)
    }

    /// What stands in the kernel as our table; `None` if it is not there.
    pub(crate) async fn table_mark(&self) -> Result<Option<TableMark>, HostError> {
        let nft = self.nft.as_ref().ok_or(HostError::NftMissing)?;
        let run = async {
            let mut child = tokio::process::Command::new(nft)
                .args(["-j", "list", "table"])
                .args(TABLE.split(' '))
                // The answer to a table that is not there is known by its words.
                .env("LC_ALL", "C")
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .kill_on_drop(true)
                .spawn()?;
            let stdout = child.stdout.take().expect("stdout is piped above");
            let stderr = child.stderr.take().expect("stderr is piped above");
            let (mut text, mut said) = (Vec::new(), Vec::new());
            let (mut stdout, mut stderr) = (stdout.take(TABLE_BYTES_MAX + 1), stderr.take(4096));
            tokio::try_join!(stdout.read_to_end(&mut text), stderr.read_to_end(&mut said))?;
            // One that still writes is ended here.
            drop((stdout, stderr));
            Ok((child.wait().await?, text, said))
        };
        let (status, text, said) = tokio::time::timeout(PROGRAM_TIMEOUT, run)
            .await
            .map_err(|_| HostError::NftTimeout)?
            .map_err(|source| HostError::NftRun { source })?;
        if text.len() as u64 > TABLE_BYTES_MAX {
            return Err(HostError::NftLong);
        }
        if status.success() {
            return Ok(Some(TableMark(Sha256::digest(&text).into())));
        }
        let said = String::from_utf8_lossy(&said);
        match said.contains("No such file or directory") {
            true => Ok(None),
            false => {
                Err(HostError::NftRefused { output: said.lines().take(4).collect::<Vec<_>>().join(" | ") })
            }
        }
    }

    async fn index(&self, interface: &str) -> Result<u32, HostError> {
        let mut stream = self.netlink.link().get().match_name(interface.to_owned()).execute();
        match stream.try_next().await {
            Ok(Some(link)) => Ok(link.header.index),
            _ => Err(HostError::NoInterface { interface: interface.to_owned() }),
        }
    }

    async fn add_address(&self, interface: &str, address: IpNet) -> Result<(), HostError> {
        let index = self.index(interface).await?;
        let mut request = self.netlink.address().add(index, address.addr(), address.prefix_len());
        // Ours alone by the certificate. While the kernel still asked for duplicates it would refuse the
        // address as a route's source.
        request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
        outcome(request.execute().await, || format!("add address {address} to {interface}"), address)
    }

    async fn add_route(&self, interface: &str, prefix: IpNet, source: IpAddr) -> Result<(), HostError> {
        let index = self.index(interface).await?;
        let message = match (prefix, source) {
            (IpNet::V4(prefix), IpAddr::V4(source)) => RouteMessageBuilder::<std::net::Ipv4Addr>::new()
                .destination_prefix(prefix.network(), prefix.prefix_len())
                .output_interface(index)
                .pref_source(source)
                .scope(RouteScope::Link)
                .build(),
            (IpNet::V6(prefix), IpAddr::V6(source)) => RouteMessageBuilder::<std::net::Ipv6Addr>::new()
                .destination_prefix(prefix.network(), prefix.prefix_len())
                .output_interface(index)
                .pref_source(source)
                .build(),
            _ => return Err(HostError::NoFamily { family: "route with a source of the other family" }),
        };
        let added = self.netlink.route().add(message).replace().execute().await;
        outcome(added, || format!("add route {prefix} to {interface}"), prefix)
    }

    async fn add_unreachable(&self, prefix: IpNet) -> Result<(), HostError> {
        let added = self.netlink.route().add(unreachable(prefix)).execute().await;
        outcome(added, || format!("add unreachable route {prefix}"), prefix)
    }

    async fn del_unreachable(&self, prefix: IpNet) -> Result<(), HostError> {
        match self.netlink.route().del(unreachable(prefix)).execute().await {
            Err(error) if errno(&error) == Some(Errno::ESRCH) => Ok(()),
            other => outcome(other, || format!("remove unreachable route {prefix}"), prefix),
        }
    }

    async fn apply_nft(&self, text: &str) -> Result<(), HostError> {
        let nft = self.nft.as_ref().ok_or(HostError::NftMissing)?;
        // Judged first: a refusal then names its line and nothing has changed.
        for arguments in [["-c", "-f", "-"].as_slice(), &["-f", "-"]] {
            let run = async {
                let mut child = tokio::process::Command::new(nft)
                    .args(arguments)
                    .stdin(Stdio::piped())
                    .stdout(Stdio::null())
                    .stderr(Stdio::piped())
                    .kill_on_drop(true)
                    .spawn()?;
                let mut stdin = child.stdin.take().expect("stdin is piped above");
                stdin.write_all(text.as_bytes()).await?;
                drop(stdin);
                child.wait_with_output().await
            };
            let output = tokio::time::timeout(PROGRAM_TIMEOUT, run)
                .await
                .map_err(|_| HostError::NftTimeout)?
                .map_err(|source| HostError::NftRun { source })?;
            if !output.status.success() {
                let text = String::from_utf8_lossy(&output.stderr);
                let output = text.lines().take(4).collect::<Vec<_>>().join(" | ");
                return Err(HostError::NftRefused { output });
            }
        }
        Ok(())
    }
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
        IpNet::V4(prefix) => RouteMessageBuilder::<std::net::Ipv4Addr>::new()
            .destination_prefix(prefix.network(), prefix.prefix_len())
            .priority(WORST_METRIC)
            .build(),
        IpNet::V6(prefix) => RouteMessageBuilder::<std::net::Ipv6Addr>::new()
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

fn find_nft() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(SBIN.iter().map(PathBuf::from))
        .map(|folder| folder.join("nft"))
        .find(|candidate| candidate.is_file())
}
