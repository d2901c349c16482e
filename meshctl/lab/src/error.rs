use std::{io, net::IpAddr, path::PathBuf, time::Duration};

/// Why a lab, a host or a process could not be had. Nothing outside the lab was changed.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    #[error("the process already has {threads} threads; namespaces must be entered before any thread starts")]
    Threaded { threads: usize },
    #[error("the kernel does not let this user make namespaces: {advice}")]
    NamespacesRefused { advice: String, source: io::Error },
    #[error("cannot {attempt}")]
    System { attempt: &'static str, source: io::Error },
    #[error("cannot open /dev/net/tun: {advice}")]
    Tun { advice: &'static str, source: io::Error },
    #[error("host name {name:?} is already in the lab")]
    HostExists { name: String },
    #[error("the lab is full: it holds {limit} hosts")]
    Full { limit: usize },
    #[error("cannot {attempt} on {interface}")]
    Netlink { attempt: &'static str, interface: String, source: Box<rtnetlink::Error> },
    #[error("gateway {gateway} is of no address family the host has")]
    Gateway { gateway: IpAddr },
    #[error("cannot write {}", path.display())]
    Log { path: PathBuf, source: io::Error },
    #[error("process name {name:?} is empty or holds a path separator")]
    ProcessName { name: String },
    #[error("cannot start process {name}")]
    Spawn { name: String, source: io::Error },
    #[error("no process {name} was started")]
    NoProcess { name: String },
    #[error("cannot signal or await process {name}")]
    Control { name: String, source: io::Error },
    #[error("{what} did not happen within {} ms", deadline.as_millis())]
    Deadline { what: String, deadline: Duration },
}

impl LabError {
    /// Sorts a failed attempt to make namespaces: refusals by policy get advice.
    pub(crate) fn namespaces(source: io::Error) -> Self {
        match source.raw_os_error().map(nix::errno::Errno::from_raw) {
            Some(nix::errno::Errno::EPERM | nix::errno::Errno::EACCES | nix::errno::Errno::ENOSPC) => {
                Self::NamespacesRefused { advice: advice(), source }
            }
            _ => Self::System { attempt: "enter new namespaces", source },
        }
    }
}

/// The switches that distributions use to keep user namespaces from ordinary users, with the value
/// that means "closed" and the command that opens them.
const SWITCHES: [(&str, &str, &str); 3] = [
    ("/proc/sys/kernel/unprivileged_userns_clone", "0", "sysctl -w kernel.unprivileged_userns_clone=1"),
    (
        "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
        "1",
        "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
    ),
    ("/proc/sys/user/max_user_namespaces", "0", "sysctl -w user.max_user_namespaces=15000"),
];

fn advice() -> String {
    let closed: Vec<&str> = SWITCHES
        .iter()
        .filter(|(path, closed, _)| std::fs::read_to_string(path).is_ok_and(|value| value.trim() == *closed))
        .map(|(_, _, command)| *command)
        .collect();
    if closed.is_empty() {
        // No switch is off, so a container runtime or a security module refuses.
        return "run as root; in a container, allow it CAP_SYS_ADMIN and unshare".to_owned();
    }
    format!("run as root, or open them with `{}`", closed.join(" && "))
}
