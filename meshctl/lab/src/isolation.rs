use std::{fs, io, os::unix::fs::OpenOptionsExt};

use nix::libc;

use crate::{LabError, sys};

/// Proof that the process runs in namespaces of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Isolation {
    /// Whether a user namespace was needed: we are root inside, an ordinary user outside.
    pub user_namespace: bool,
}

/// Moves the process into its own network and mount namespaces, with an empty `/run` and nothing but
/// `lo`; as an ordinary user, into a user namespace in which it is root as well. There is no way back.
///
/// # Errors
/// [`LabError::Threaded`] once a second thread runs: the kernel moves only whole processes of one
/// thread. [`LabError::NamespacesRefused`] says which setting of this machine is in the way.
pub fn enter() -> Result<Isolation, LabError> {
    let threads = fs::read_dir("/proc/self/task")
        .map_err(|source| LabError::System { attempt: "count the process's threads", source })?
        .count();
    if threads > 1 {
        return Err(LabError::Threaded { threads });
    }
    let user_namespace = sys::enter(&sys::EnterPlan::current()).map_err(LabError::namespaces)?;
    Ok(Isolation { user_namespace })
}

/// Checks that TUN devices can be had, before a node fails on it much later.
///
/// # Errors
/// [`LabError::Tun`] says what is missing and what to type.
pub fn check_tun() -> Result<(), LabError> {
    let opened =
        fs::OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun");
    opened.map(drop).map_err(|source| LabError::Tun { advice: tun_advice(&source), source })
}

fn tun_advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => {
            "the device is missing: `modprobe tun`, or start the container with `--device /dev/net/tun`"
        }
        io::ErrorKind::PermissionDenied => {
            "this user may not open it: `chmod 0666 /dev/net/tun` (the usual mode), or run as root"
        }
        _ if error.raw_os_error() == Some(libc::ENODEV) => {
            "the kernel has no TUN driver loaded: `modprobe tun`"
        }
        _ => "try `modprobe tun`",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_threaded_process_is_not_moved() {
        // The test harness runs each test on its own thread, or this one starts a second.
        std::thread::scope(|scope| {
            scope.spawn(|| assert!(matches!(enter(), Err(LabError::Threaded { threads }) if threads >= 2)));
        });
    }

    #[test]
    fn tun_errors_say_what_to_type() {
        for (code, part) in [(libc::ENOENT, "modprobe"), (libc::EACCES, "chmod"), (libc::ENODEV, "modprobe")]
        {
            let source = io::Error::from_raw_os_error(code);
            let error = LabError::Tun { advice: tun_advice(&source), source };
            assert!(error.to_string().contains(part), "{error}");
        }
    }

    #[test]
    fn refusals_by_policy_carry_advice_and_others_do_not() {
        let refused = LabError::namespaces(io::Error::from_raw_os_error(libc::EPERM));
        assert!(refused.to_string().contains("run as root"), "{refused}");
        let other = LabError::namespaces(io::Error::from_raw_os_error(libc::ENOMEM));
        assert!(matches!(other, LabError::System { .. }), "{other}");
    }
}
