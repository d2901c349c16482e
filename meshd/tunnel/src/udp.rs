//! The underlay: one UDP socket per family on one port.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;

use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

use crate::error::TunnelError;
use crate::packet;
use crate::wake;

/// Kernel buffers per socket, bytes: about 6 ms at 5 Gbit/s.
const SOCKET_BUFFER_BYTES: usize = 4 << 20;
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
}

impl Udp {
    /// Binds `port` in both families; 0 takes one that is free in both.
    pub(crate) fn bind(port: u16, fwmark: Option<u32>) -> Result<Self, TunnelError> {
        let mut attempt = 1;
        loop {
            match Self::bind_once(port, fwmark) {
                Err(TunnelError::PortInUse { .. }) if port == 0 && attempt < PORT_ATTEMPTS => attempt += 1,
                result => return result,
            }
        }
    }

    fn bind_once(port: u16, fwmark: Option<u32>) -> Result<Self, TunnelError> {
        let v4 = bind_one(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)), fwmark)?;
        let local = v4.local_addr();
        let port = local.map_err(|source| TunnelError::Socket { action: "read the port of", source })?.port();
        let v6 = match bind_one(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)), fwmark) {
            Ok(socket) => Some(socket),
            Err(TunnelError::Socket { source, .. }) if is_without_ipv6(&source) => None,
            Err(error) => return Err(error),
        };
        Ok(Self { v4, v6, port })
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn sockets(&self) -> impl Iterator<Item = &UdpSocket> {
        std::iter::once(&self.v4).chain(&self.v6)
    }

    /// Sends one datagram; waits a moment if the send buffer is full.
    pub(crate) fn send(&self, datagram: &[u8], to: SocketAddr) -> io::Result<()> {
        let socket = match to {
            SocketAddr::V4(_) => &self.v4,
            SocketAddr::V6(_) => {
                self.v6.as_ref().ok_or_else(|| io::Error::from(io::ErrorKind::AddrNotAvailable))?
            }
        };
        match socket.send_to(datagram, to) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                wake::wait(
                    &mut [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)],
                    PollTimeout::from(SEND_WAIT_MS),
                )?;
                socket.send_to(datagram, to).map(drop)
            }
            result => result.map(drop),
        }
    }
}

/// One waiting datagram of `socket`; `None` if there is none.
pub(crate) fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<Option<(usize, SocketAddr)>> {
    match socket.recv_from(buffer) {
        Ok((length, from)) => Ok(Some((length, packet::unmapped(from)))),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}

fn bind_one(address: SocketAddr, fwmark: Option<u32>) -> Result<UdpSocket, TunnelError> {
    let failed = |action| move |source| TunnelError::Socket { action, source };
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))
        .map_err(failed("open"))?;
    if address.is_ipv6() {
        socket.set_only_v6(true).map_err(failed("restrict to IPv6"))?;
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

/// Beyond the system's limit where we may, up to it where not. Small buffers cost speed, nothing else.
fn enlarge_buffers(socket: &Socket) {
    if setsockopt(socket, sockopt::RcvBufForce, &SOCKET_BUFFER_BYTES).is_err() {
        let _ = socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES);
    }
    if setsockopt(socket, sockopt::SndBufForce, &SOCKET_BUFFER_BYTES).is_err() {
        let _ = socket.set_send_buffer_size(SOCKET_BUFFER_BYTES);
    }
}

fn is_without_ipv6(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(nix::errno::Errno::from_raw);
    matches!(errno, Some(nix::errno::Errno::EAFNOSUPPORT | nix::errno::Errno::EADDRNOTAVAIL))
}
