//! Everything that needs root, as one closed list. Executed in-process; a privileged helper could take
//! the same list over a socketpair.

mod hook;
mod keystore;
mod network;
mod nft;
mod pair;
mod watch;

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use mesh_proto::v1::ErrorCode;
use rtnetlink::Handle;

use crate::failure::Failure;
use crate::limits::{HOOK_TIMEOUT, PROGRAM_TIMEOUT, TABLE_BYTES_MAX};

pub(crate) use hook::HookError;
pub(crate) use keystore::KeyStoreOrder;
pub(crate) use network::{InterfaceAddress, Way};
pub(crate) use nft::TableMark;
pub(crate) use pair::{Access, FolderError, PairFiles};
pub(crate) use watch::Changes;

/// One change of the host. No text from the network is in it: prefixes, names that were checked, rule text
/// that this program wrote, files of certificates that were verified, and commands of root's.
#[derive(Debug)]
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
    /// Writes one version of a service's folder and makes it the current one.
    WritePair(Box<PairVersion>),
    /// Runs a reload hook: a command that root configured.
    RunHook {
        command: String,
        pair: String,
        folder: PathBuf,
    },
}

/// What [`HostOp::WritePair`] writes.
#[derive(Debug)]
pub(crate) struct PairVersion {
    pub(crate) folder: PathBuf,
    /// Whose folder it is.
    pub(crate) pair: String,
    pub(crate) files: PairFiles,
    pub(crate) access: Access,
    /// Begins with `..20` (a UTC stamp) and has not been used before.
    pub(crate) version: String,
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
    #[error(transparent)]
    Pair(FolderError),
    #[error(transparent)]
    Hook(HookError),
    #[error("writing a pair was cut off")]
    PairCutOff {
        #[source]
        source: tokio::task::JoinError,
    },
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
        let error = match error {
            HostError::Pair(error) => return error.into(),
            other => other,
        };
        let (code, next) = match &error {
            HostError::Hook(_) => {
                (ErrorCode::HookFailed, "correct the service or the hook; it is tried again by itself")
            }
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

/// The hands that carry out [`HostOp`]s, and the eyes that look at the host.
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

impl Host {
    /// Opens a netlink socket in this process's network namespace. Must be called inside a runtime.
    ///
    /// # Errors
    /// [`HostError::Socket`].
    pub(crate) fn open() -> Result<Self, HostError> {
        let failed = |source| HostError::Socket { source };
        // With strict checking the kernel filters what is listed (Linux 4.20); without it, we do.
        let (connection, netlink, _) = rtnetlink::new_connection_with_strict_check()
            .or_else(|_| rtnetlink::new_connection())
            .map_err(failed)?;
        tokio::spawn(connection);
        Ok(Self { netlink, nft: nft::find_nft() })
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
            HostOp::WritePair(pair) => write_pair(*pair).await,
            HostOp::RunHook { command, pair, folder } => {
                hook::run(&command, &pair, &folder, HOOK_TIMEOUT).await.map_err(HostError::Hook)
            }
        }
    }

    /// Whether [`HostOp::WritePair`] would take `folder` for `pair`; makes and changes nothing.
    ///
    /// # Errors
    /// [`HostError::Pair`] says why not.
    pub(crate) fn check_pair(folder: &Path, pair: &str) -> Result<(), HostError> {
        pair::PairFolder::check(folder, pair).map_err(HostError::Pair)
    }
}

/// Waits for the disk on a thread of its own.
async fn write_pair(pair: PairVersion) -> Result<(), HostError> {
    let write = move || {
        let PairVersion { folder, pair, files, access, version } = pair;
        pair::PairFolder::open(&folder, &pair)?.publish(&files, access, &version)
    };
    let written = tokio::task::spawn_blocking(write).await;
    written.map_err(|source| HostError::PairCutOff { source })?.map_err(HostError::Pair)
}
