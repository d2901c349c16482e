//! The interface: a TUN device, made by us, gone with its descriptor.
//!
//! Every packet goes with a virtio header, so that the host may hand over and take segments in one
//! piece; which kinds it does is settled when the device is made.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::errno::Errno;
use nix::libc;

use crate::counters::OffloadCells;
use crate::error::TunnelError;
use crate::offload::virtio::HEADER_BYTES;
use crate::tunnel::Offloads;

/// Room for the largest packet a read can bring, bytes: header, IPv6 header and 65535 bytes.
pub(crate) const READ_BYTES: usize = HEADER_BYTES + 40 + 65_535;

/// Features of `TUNSETOFFLOAD` that come with TCP segments, and those for UDP (Linux 6.2).
const TCP_FEATURES: libc::c_uint =
    libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
const UDP_FEATURES: libc::c_uint = libc::TUN_F_USO4 | libc::TUN_F_USO6;

const FLAGS: libc::c_int = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
const DEVICE: &str = "/dev/net/tun";

/// Thin wrappers around the requests of `linux/if_tun.h` and `linux/sockios.h`.
mod request {
    use nix::libc::{SIOCGIFFLAGS, SIOCSIFFLAGS, SIOCSIFMTU, TUNSETIFF, TUNSETOFFLOAD, ifreq};

    nix::ioctl_readwrite_bad!(set_interface, TUNSETIFF, ifreq);
    nix::ioctl_write_ptr_bad!(set_mtu, SIOCSIFMTU, ifreq);
    nix::ioctl_write_ptr_bad!(set_flags, SIOCSIFFLAGS, ifreq);
    nix::ioctl_readwrite_bad!(flags, SIOCGIFFLAGS, ifreq);
    nix::ioctl_write_int_bad!(set_offload, TUNSETOFFLOAD);
}

#[derive(Debug)]
pub(crate) struct Tun {
    file: File,
    name: String,
    offloads: Arc<OffloadCells>,
}

impl Tun {
    /// Creates the interface with what it can of the `wanted` offloads and `queues` queues, among which the
    /// kernel spreads the flows. `name` must have been checked and may hold `%d`.
    pub(crate) fn create(
        name: &str,
        queues: usize,
        wanted: Offloads,
        offloads: &Arc<OffloadCells>,
    ) -> Result<Vec<Self>, TunnelError> {
        let several = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
        let first = Self::attach(name, FLAGS | libc::IFF_TUN_EXCL | several, wanted, offloads)?;
        let name = first.name.clone();
        let mut all = vec![first];
        for _ in 1..queues {
            all.push(Self::attach(&name, FLAGS | several, wanted, offloads)?);
        }
        Ok(all)
    }

    /// Makes the interface, or another queue of it.
    fn attach(
        name: &str,
        flags: libc::c_int,
        wanted: Offloads,
        offloads: &Arc<OffloadCells>,
    ) -> Result<Self, TunnelError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(DEVICE)
            .map_err(|source| cannot_open(name, source))?;
        let mut asked = interface_request(name);
        asked.ifr_ifru.ifru_flags = flags as libc::c_short;
        // SAFETY: `file` is an open descriptor and `asked` a whole ifreq that outlives the call; the
        // kernel reads it and writes the name it gave into it.
        let made = unsafe { request::set_interface(file.as_raw_fd(), &raw mut asked) };
        made.map_err(|errno| match errno {
            Errno::EPERM | Errno::EACCES => TunnelError::NoRights { name: name.to_owned() },
            Errno::EBUSY => TunnelError::InterfaceBusy { name: name.to_owned() },
            _ => failed(name, "create")(errno.into()),
        })?;
        let tcp = wanted.tun_tcp && set_offload(&file, TCP_FEATURES);
        let udp = tcp && wanted.tun_udp && set_offload(&file, TCP_FEATURES | UDP_FEATURES);
        offloads.tun_tcp.store(tcp, Ordering::Relaxed);
        offloads.tun_udp.store(udp, Ordering::Relaxed);
        Ok(Self { file, name: given_name(&asked), offloads: offloads.clone() })
    }

    /// Whether merged TCP segments, and whether merged datagrams, may be written.
    pub(crate) fn merging(&self) -> (bool, bool) {
        let now = self.offloads.read();
        (now.tun_tcp, now.tun_udp)
    }

    /// The device has refused a merged packet: none is written any more.
    pub(crate) fn stop_merging(&self) {
        self.offloads.tun_tcp.store(false, Ordering::Relaxed);
        self.offloads.tun_udp.store(false, Ordering::Relaxed);
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Sets the MTU and brings the interface up.
    pub(crate) fn bring_up(&self, mtu: u16) -> Result<(), TunnelError> {
        // No link-local address of the kernel's own making; a kernel without IPv6 has no such file.
        let mode = format!("/proc/sys/net/ipv6/conf/{}/addr_gen_mode", self.name);
        let _ = std::fs::write(mode, "1");
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None)
            .map_err(failed(&self.name, "open a socket to set options"))?;
        let mut asked = interface_request(&self.name);
        asked.ifr_ifru.ifru_mtu = i32::from(mtu);
        // SAFETY: an open socket and a whole ifreq that outlives the call, for a request that reads one.
        unsafe { request::set_mtu(socket.as_raw_fd(), &raw const asked) }
            .map_err(|errno| failed(&self.name, "set the MTU")(errno.into()))?;
        // SAFETY: as above, for a request that reads and writes one.
        unsafe { request::flags(socket.as_raw_fd(), &raw mut asked) }
            .map_err(|errno| failed(&self.name, "read the flags")(errno.into()))?;
        // SAFETY: the kernel has just filled in the flags, and any bits are a valid `c_short`.
        let flags = unsafe { asked.ifr_ifru.ifru_flags };
        asked.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
        // SAFETY: as for the MTU.
        unsafe { request::set_flags(socket.as_raw_fd(), &raw const asked) }
            .map_err(|errno| failed(&self.name, "set the state")(errno.into()))?;
        Ok(())
    }

    /// One packet from the host behind its header, at the start of `buffer`, which must have
    /// [`READ_BYTES`]. The length of both; `None` if there is none waiting.
    pub(crate) fn read(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        match (&self.file).read(buffer) {
            Ok(length) => Ok(Some(length)),
            Err(error) if is_transient(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// One packet to the host: its virtio header, then the packet in as many parts as it has.
    pub(crate) fn write(&self, parts: &[IoSlice<'_>]) -> io::Result<()> {
        (&self.file).write_vectored(parts).map(drop)
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn set_offload(file: &File, features: libc::c_uint) -> bool {
    // SAFETY: an open descriptor and a request that takes an integer.
    unsafe { request::set_offload(file.as_raw_fd(), features as libc::c_int) }.is_ok()
}

/// Nothing waiting, or the interface is down at the moment: not the end.
fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
        || error.raw_os_error() == Some(libc::EIO)
}

fn cannot_open(name: &str, source: io::Error) -> TunnelError {
    match source.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOENT | Errno::ENODEV | Errno::ENXIO) => TunnelError::NoTunDevice,
        Some(Errno::EPERM | Errno::EACCES) => TunnelError::NoRights { name: name.to_owned() },
        _ => failed(name, "open /dev/net/tun for")(source),
    }
}

fn failed(name: &str, action: &'static str) -> impl Fn(io::Error) -> TunnelError {
    let name = name.to_owned();
    move |source| TunnelError::Interface { name: name.clone(), action, source }
}

fn interface_request(name: &str) -> libc::ifreq {
    // SAFETY: ifreq is plain C data, for which all bits zero is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays zero: names are at most 15 bytes.
    for (to, from) in request.ifr_name[..libc::IFNAMSIZ - 1].iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request
}

fn given_name(request: &libc::ifreq) -> String {
    let bytes = request.ifr_name.iter().take_while(|c| **c != 0).map(|c| *c as u8);
    String::from_utf8_lossy(&bytes.collect::<Vec<_>>()).into_owned()
}
