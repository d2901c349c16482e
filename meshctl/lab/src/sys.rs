//! The system calls std does not offer.
//!
//! Everything here may run between fork and exec in a process that had several threads, so it only
//! makes system calls: no allocation, no locks, no environment (signal-safety(7)).

use std::{
    ffi::CStr,
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use nix::libc;

/// The user a process becomes in the tests of the unprivileged way: `nobody`.
const NOBODY: u32 = 65534;
/// Device number of `/dev/net/tun` (Documentation/admin-guide/devices.txt).
const TUN_DEVICE: (u32, u32) = (10, 200);

/// What [`enter`] needs, made before the fork.
#[derive(Debug, Clone)]
pub(crate) struct EnterPlan {
    privileged: bool,
    uid_map: String,
    gid_map: String,
}

impl EnterPlan {
    /// A plan for the calling user.
    pub(crate) fn current() -> Self {
        Self::of(nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw())
    }

    /// A plan for the user that [`become_nobody`] makes.
    pub(crate) fn nobody() -> Self {
        Self::of(NOBODY, NOBODY)
    }

    fn of(uid: u32, gid: u32) -> Self {
        Self { privileged: uid == 0, uid_map: format!("0 {uid} 1\n"), gid_map: format!("0 {gid} 1\n") }
    }
}

/// Moves the process into new namespaces as `plan` says: network and mounts, and a user namespace in
/// which it is root unless it already may do the rest without. Returns whether that was needed.
pub(crate) fn enter(plan: &EnterPlan) -> io::Result<bool> {
    let own = libc::CLONE_NEWNET | libc::CLONE_NEWNS;
    // Root needs no user namespace, and without one every uid stays usable; but root in a container
    // may lack CAP_SYS_ADMIN and be granted a user namespace all the same.
    let user_namespace = !(plan.privileged && unshare(own).is_ok());
    if user_namespace {
        unshare(own | libc::CLONE_NEWUSER)?;
        // A gid map may be written only once setgroups is given up (user_namespaces(7)).
        write_file(c"/proc/self/setgroups", b"deny")?;
        write_file(c"/proc/self/uid_map", plan.uid_map.as_bytes())?;
        write_file(c"/proc/self/gid_map", plan.gid_map.as_bytes())?;
    }
    furnish()?;
    Ok(user_namespace)
}

/// New network and mount namespaces for the calling thread alone.
pub(crate) fn unshare_thread() -> io::Result<()> {
    unshare(libc::CLONE_NEWNET | libc::CLONE_NEWNS)?;
    furnish()
}

/// Makes fresh namespaces usable: private mounts, an empty `/run`, `/sys` of this network, `lo` up.
fn furnish() -> io::Result<()> {
    mount(None, c"/", None, libc::MS_REC | libc::MS_PRIVATE, None)?;
    mount(Some(c"tmpfs"), c"/run", Some(c"tmpfs"), libc::MS_NOSUID | libc::MS_NODEV, Some(c"mode=0755"))?;
    // Some containers mask parts of /sys, and then the kernel allows no second one. Nothing that we
    // start depends on it; without it /sys/class/net shows the outer network's names.
    let _ = mount(Some(c"sysfs"), c"/sys", Some(c"sysfs"), libc::MS_NOSUID | libc::MS_NODEV, None);
    loopback_up()
}

/// Joins the network and mount namespaces, keeping the current directory's path.
pub(crate) fn join(net: BorrowedFd<'_>, mounts: BorrowedFd<'_>) -> io::Result<()> {
    let mut cwd = [0; libc::PATH_MAX as usize];
    // SAFETY: the buffer is writable for the length passed, and lives through the call.
    if unsafe { libc::getcwd(cwd.as_mut_ptr(), cwd.len()) }.is_null() {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: setns takes an open descriptor, borrowed for the call, and no memory of ours.
    check(unsafe { libc::setns(net.as_raw_fd(), libc::CLONE_NEWNET) })?;
    // A thread shares root and directory with its process; a mount namespace cannot be joined so.
    unshare(libc::CLONE_FS)?;
    // SAFETY: as above.
    check(unsafe { libc::setns(mounts.as_raw_fd(), libc::CLONE_NEWNS) })?;
    // Joining moved us to the root folder of that namespace.
    // SAFETY: getcwd succeeded, so the buffer holds a string that ends in NUL.
    check(unsafe { libc::chdir(cwd.as_ptr()) })
}

/// Ties a child's life to the thread that started it; `parent` is the id of that thread's process.
pub(crate) fn die_with(parent: libc::pid_t) -> io::Result<()> {
    // SAFETY: this option of prctl takes a plain integer.
    check(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) })?;
    // The parent may have died before the line above; then nobody would ever send the signal.
    // SAFETY: getppid has no arguments and cannot fail.
    if unsafe { libc::getppid() } != parent {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    Ok(())
}

/// Turns root into `nobody`, in a mount namespace where every user may open `/dev/net/tun`, as
/// udev has it on an ordinary installation.
pub(crate) fn become_nobody() -> io::Result<()> {
    unshare(libc::CLONE_NEWNS)?;
    mount(None, c"/", None, libc::MS_REC | libc::MS_PRIVATE, None)?;
    let device = libc::makedev(TUN_DEVICE.0, TUN_DEVICE.1);
    if mount(Some(c"tmpfs"), c"/dev/net", Some(c"tmpfs"), libc::MS_NOSUID, Some(c"mode=0755")).is_ok() {
        // SAFETY: the path is a constant string that ends in NUL.
        check(unsafe { libc::mknod(c"/dev/net/tun".as_ptr(), libc::S_IFCHR | 0o666, device) })?;
        // SAFETY: as above. mknod obeys the umask, chmod does not.
        check(unsafe { libc::chmod(c"/dev/net/tun".as_ptr(), 0o666) })?;
    }
    // SAFETY: no group is passed, so the pointer is never read.
    check(unsafe { libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>()) as i32 })?;
    // The raw calls change this thread alone, which after a fork is all there is; libc's wrappers
    // would signal other threads and are not async-signal-safe.
    // SAFETY: plain integers.
    check(unsafe { libc::syscall(libc::SYS_setresgid, NOBODY, NOBODY, NOBODY) as i32 })?;
    // SAFETY: plain integers.
    check(unsafe { libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY) as i32 })?;
    // A change of user makes /proc/self root's, and with it the maps that `enter` writes.
    // SAFETY: this option of prctl takes a plain integer.
    check(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 1) })
}

fn unshare(flags: libc::c_int) -> io::Result<()> {
    // SAFETY: unshare takes plain flags; none of those used here shares or frees memory.
    check(unsafe { libc::unshare(flags) })
}

fn mount(
    source: Option<&CStr>,
    target: &CStr,
    kind: Option<&CStr>,
    flags: libc::c_ulong,
    data: Option<&CStr>,
) -> io::Result<()> {
    let pointer = |text: Option<&CStr>| text.map_or(std::ptr::null(), CStr::as_ptr);
    // SAFETY: every pointer is null, which mount(2) allows for all but the target, or a string that
    // ends in NUL and outlives the call.
    check(unsafe {
        libc::mount(pointer(source), target.as_ptr(), pointer(kind), flags, pointer(data).cast())
    })
}

fn write_file(path: &CStr, content: &[u8]) -> io::Result<()> {
    // SAFETY: the path ends in NUL; the descriptor is closed below and seen by nobody else.
    let fd = unsafe { libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC) };
    check(fd)?;
    // SAFETY: the buffer is readable for the length passed.
    let written = unsafe { libc::write(fd, content.as_ptr().cast(), content.len()) };
    let result = if written == content.len() as isize { Ok(()) } else { Err(io::Error::last_os_error()) };
    // SAFETY: we opened it above.
    unsafe { libc::close(fd) };
    result
}

fn loopback_up() -> io::Result<()> {
    // SAFETY: plain integers; the descriptor is closed below and seen by nobody else.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    check(fd)?;
    // SAFETY: ifreq is plain data, for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the request is an ifreq as SIOCSIFFLAGS expects it, and outlives the call.
    let result = check(unsafe { libc::ioctl(fd, libc::SIOCSIFFLAGS, &raw const request) });
    // SAFETY: we opened it above.
    unsafe { libc::close(fd) };
    result
}

fn check(returned: libc::c_int) -> io::Result<()> {
    if returned < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
