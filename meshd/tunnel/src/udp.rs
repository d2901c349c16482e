//! The underlay: one UDP socket per family on one port.

use std::io::{self, IoSlice};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, sendmsg, setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

use crate::detour::{SinkCell, is_virtual};
use crate::engine::OffloadCells;
use crate::error::TunnelError;
use crate::tunnel::Offloads;
use crate::wake;

/// Kernel buffers per socket, bytes. Four times as much was no faster, and only made a standing queue:
/// round trips under load took 2.7 times as long.
const SOCKET_BUFFER_BYTES: usize = 1 << 20;
/// How often a free port is looked for that is free in both families.
const PORT_ATTEMPTS: usize = 32;
/// Longest wait for room in a full send buffer, ms; then the datagram is lost, as on any network.
const SEND_WAIT_MS: u16 = 100;

/// Both sockets. A machine without IPv6 has only the first.
#[derive(Debug)]
pub(crate) struct Udp {
    v4: UdpSocket,
    v6: Option<UdpSocket>,
    port: u16,
    offloads: Arc<OffloadCells>,
    /// Takes what is for virtual endpoints.
    virtual_out: Arc<SinkCell>,
}

impl Udp {
    /// Binds `port` in both families; 0 takes one that is free in both.
    pub(crate) fn bind(
        port: u16,
        fwmark: Option<u32>,
        wanted: Offloads,
        offloads: Arc<OffloadCells>,
        virtual_out: Arc<SinkCell>,
    ) -> Result<Self, TunnelError> {
        let mut attempt = 1;
        loop {
            match Self::bind_once(port, fwmark, &offloads, &virtual_out) {
                Err(TunnelError::PortInUse { .. }) if port == 0 && attempt < PORT_ATTEMPTS => attempt += 1,
                result => {
                    let udp = result?;
                    udp.switch_on(wanted);
                    return Ok(udp);
                }
            }
        }
    }

    fn bind_once(
        port: u16,
        fwmark: Option<u32>,
        offloads: &Arc<OffloadCells>,
        virtual_out: &Arc<SinkCell>,
    ) -> Result<Self, TunnelError> {
        let v4 = bind_one(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)), fwmark)?;
        let local = v4.local_addr();
        let port = local.map_err(|source| TunnelError::Socket { action: "read the port of", source })?.port();
        let v6 = match bind_one(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)), fwmark) {
            Ok(socket) => Some(socket),
            Err(TunnelError::Socket { source, .. }) if is_without_ipv6(&source) => None,
            Err(error) => return Err(error),
        };
        Ok(Self { v4, v6, port, offloads: offloads.clone(), virtual_out: virtual_out.clone() })
    }

    fn switch_on(&self, wanted: Offloads) {
        // Zero switches nothing on: it only asks whether the kernel knows the option.
        let gso = || self.sockets().all(|socket| setsockopt(socket, sockopt::UdpGsoSegment, &0).is_ok());
        let gro = || self.sockets().all(|socket| setsockopt(socket, sockopt::UdpGroSegment, &true).is_ok());
        self.offloads.udp_gso.store(wanted.udp_gso && gso(), Ordering::Relaxed);
        self.offloads.udp_gro.store(wanted.udp_gro && gro(), Ordering::Relaxed);
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn sockets(&self) -> impl Iterator<Item = &UdpSocket> {
        std::iter::once(&self.v4).chain(&self.v6)
    }

    /// Sends one datagram; waits a moment if the send buffer is full.
    pub(crate) fn send(&self, datagram: &[u8], to: SocketAddr) -> io::Result<()> {
        self.send_segments(datagram, None, to, SEND_WAIT_MS)
    }

    /// Sends one datagram, or not if the send buffer is full.
    pub(crate) fn send_now(&self, datagram: &[u8], to: SocketAddr) -> io::Result<()> {
        self.send_segments(datagram, None, to, 0)
    }

    /// Sends the datagrams of `size` bytes that `bytes` is made of; the last may be shorter. The number
    /// of those that the socket refused.
    pub(crate) fn send_batch(&self, bytes: &[u8], size: usize, to: SocketAddr) -> usize {
        if bytes.len() > size && self.offloads.udp_gso.load(Ordering::Relaxed) {
            match self.send_segments(bytes, Some(size as u16), to, SEND_WAIT_MS) {
                Ok(()) => return 0,
                // The device cannot do it after all.
                Err(error) if error.raw_os_error() == Some(Errno::EIO as i32) => {
                    tracing::warn!(%error, "UDP segmentation switched off");
                    self.offloads.udp_gso.store(false, Ordering::Relaxed);
                }
                // A path with a smaller MTU: the kernel fragments single datagrams, but not these.
                Err(error) if is_size_error(&error) => {}
                Err(_) => return bytes.len().div_ceil(size),
            }
        }
        bytes.chunks(size).filter(|datagram| self.send(datagram, to).is_err()).count()
    }

    fn send_segments(&self, bytes: &[u8], size: Option<u16>, to: SocketAddr, wait_ms: u16) -> io::Result<()> {
        if is_virtual(to) {
            for datagram in bytes.chunks(size.map_or(bytes.len(), usize::from).max(1)) {
                if !self.virtual_out.give(datagram, to) {
                    return Err(io::ErrorKind::AddrNotAvailable.into());
                }
            }
            return Ok(());
        }
        let socket = match to {
            SocketAddr::V4(_) => &self.v4,
            SocketAddr::V6(_) => {
                self.v6.as_ref().ok_or_else(|| io::Error::from(io::ErrorKind::AddrNotAvailable))?
            }
        };
        let (parts, address) = ([IoSlice::new(bytes)], SockaddrStorage::from(to));
        let segments = size.as_ref().map(ControlMessage::UdpGsoSegments);
        let send = || {
            sendmsg(socket.as_raw_fd(), &parts, segments.as_slice(), MsgFlags::MSG_DONTWAIT, Some(&address))
        };
        match send() {
            Err(Errno::EAGAIN) => {
                let mut room = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
                wake::wait(&mut room, PollTimeout::from(wait_ms))?;
                send()?;
            }
            result => {
                result?;
            }
        }
        Ok(())
    }
}

fn bind_one(address: SocketAddr, fwmark: Option<u32>) -> Result<UdpSocket, TunnelError> {
    let failed = |action| move |source| TunnelError::Socket { action, source };
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))
        .map_err(failed("open"))?;
    if address.is_ipv6() {
        socket.set_only_v6(true).map_err(failed("restrict to IPv6"))?;
    } else {
        allow_fragments(&socket).map_err(failed("allow fragments"))?;
    }
    if let Some(mark) = fwmark {
        socket.set_mark(mark).map_err(|source| match source.kind() {
            io::ErrorKind::PermissionDenied => {
                TunnelError::SocketRights { action: "set the mark of packets", capability: "CAP_NET_ADMIN" }
            }
            _ => TunnelError::Socket { action: "set the mark", source },
        })?;
    }
    socket.set_nonblocking(true).map_err(failed("set non-blocking mode"))?;
    enlarge_buffers(&socket);
    socket.bind(&address.into()).map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => TunnelError::PortInUse { port: address.port() },
        io::ErrorKind::PermissionDenied => TunnelError::SocketRights {
            action: "listen on a port below 1024",
            capability: "CAP_NET_BIND_SERVICE",
        },
        _ => TunnelError::Socket { action: "bind a port", source },
    })?;
    Ok(socket.into())
}

/// Lets routers cut outer IPv4 packets, as the kernel's own WireGuard does: a path that swallows "packet
/// too big" would otherwise swallow the tunnel. IPv6 has no such choice.
fn allow_fragments(socket: &Socket) -> io::Result<()> {
    let value = libc::IP_PMTUDISC_DONT;
    // SAFETY: an open socket, and a pointer to an integer with its size, which is what this option takes.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            libc::IP_MTU_DISCOVER,
            (&raw const value).cast(),
            size_of_val(&value) as libc::socklen_t,
        )
    };
    Errno::result(result)?;
    Ok(())
}

/// Beyond the system's limit where we may, up to it where not. Small buffers cost speed, nothing else.
fn enlarge_buffers(socket: &Socket) {
    if setsockopt(socket, sockopt::RcvBufForce, &SOCKET_BUFFER_BYTES).is_err() {
        let _ = socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES);
    }
    if setsockopt(socket, sockopt::SndBufForce, &SOCKET_BUFFER_BYTES).is_err() {
        let _ = socket.set_send_buffer_size(SOCKET_BUFFER_BYTES);
    }
}

fn is_size_error(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EMSGSIZE | Errno::EINVAL))
}

fn is_without_ipv6(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EAFNOSUPPORT | Errno::EADDRNOTAVAIL))
}
