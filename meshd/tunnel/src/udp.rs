//! The underlay: UDP sockets of both families on one port, a pair for each queue.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags};
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

use crate::counters::OffloadCells;
use crate::detour::{SinkCell, is_virtual};
use crate::error::TunnelError;
use crate::send::{self, Message};
use crate::tunnel::Offloads;
use crate::wake;

/// Kernel buffers per socket, bytes. Four times as much was no faster, and only made a standing queue:
/// round trips under load took 2.7 times as long.
const SOCKET_BUFFER_BYTES: usize = 1 << 20;
/// How often a free port is looked for that is free in both families.
const PORT_ATTEMPTS: usize = 32;
/// Longest wait for room in a full send buffer; then the datagram is lost, as on any network.
pub(crate) const SEND_WAIT: Duration = Duration::from_millis(100);

/// What sockets are made from.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    /// 0 takes a port that is free in both families.
    pub(crate) port: u16,
    pub(crate) fwmark: Option<u32>,
    /// Pairs of sockets on the one port, among which the kernel spreads the senders (`SO_REUSEPORT`).
    pub(crate) queues: usize,
    pub(crate) wanted: Offloads,
    pub(crate) offloads: Arc<OffloadCells>,
    /// Takes what is for virtual endpoints.
    pub(crate) virtual_out: Arc<SinkCell>,
}

/// The sockets in use, one pair for each queue. They may be exchanged at any time: whoever is about to wait
/// or to send takes them from here.
#[derive(Debug, Default)]
pub(crate) struct UdpCell(RwLock<Vec<Arc<Udp>>>);

impl UdpCell {
    /// `None` once the tunnel is closed.
    pub(crate) fn get(&self, queue: usize) -> Option<Arc<Udp>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(queue).cloned()
    }

    /// Puts `sockets` in the place of those in use, which close when their last user lets go.
    pub(crate) fn set(&self, sockets: Vec<Arc<Udp>>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = sockets;
    }

    pub(crate) fn all(&self) -> Vec<Arc<Udp>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Both sockets of one queue. A machine without IPv6 has only the first.
#[derive(Debug)]
pub(crate) struct Udp {
    v4: UdpSocket,
    v6: Option<UdpSocket>,
    port: u16,
    pub(crate) offloads: Arc<OffloadCells>,
    virtual_out: Arc<SinkCell>,
}

impl Udp {
    /// Binds the port in both families, once for each queue.
    pub(crate) fn bind(settings: &Settings) -> Result<Vec<Arc<Self>>, TunnelError> {
        let mut attempt = 1;
        let first = loop {
            match Self::bind_once(settings, settings.port) {
                Err(TunnelError::PortInUse { .. }) if settings.port == 0 && attempt < PORT_ATTEMPTS => {
                    attempt += 1;
                }
                result => break result?,
            }
        };
        let port = first.port;
        let mut all = vec![Arc::new(first)];
        for _ in 1..settings.queues {
            all.push(Arc::new(Self::bind_once(settings, port)?));
        }
        Ok(all)
    }

    fn bind_once(settings: &Settings, port: u16) -> Result<Self, TunnelError> {
        let v4 = bind_one(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)), settings)?;
        let local = v4.local_addr();
        let port = local.map_err(|source| TunnelError::Socket { action: "read the port of", source })?.port();
        let v6 = match bind_one(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)), settings) {
            Ok(socket) => Some(socket),
            Err(TunnelError::Socket { source, .. }) if is_without_ipv6(&source) => None,
            Err(error) => return Err(error),
        };
        let (offloads, virtual_out) = (settings.offloads.clone(), settings.virtual_out.clone());
        let udp = Self { v4, v6, port, offloads, virtual_out };
        udp.switch_on(settings.wanted);
        Ok(udp)
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

    /// Changes the mark of outer packets; 0 is none.
    pub(crate) fn set_mark(&self, mark: u32) -> Result<(), TunnelError> {
        self.sockets().try_for_each(|socket| set_mark(&socket2::SockRef::from(socket), mark))
    }

    pub(crate) fn sockets(&self) -> impl Iterator<Item = &UdpSocket> {
        std::iter::once(&self.v4).chain(&self.v6)
    }

    /// The socket for datagrams to `to`.
    pub(crate) fn socket_to(&self, to: SocketAddr) -> Option<&UdpSocket> {
        if to.is_ipv4() { Some(&self.v4) } else { self.v6.as_ref() }
    }

    /// Sends one datagram with `tos` in its IP header; waits a moment if the send buffer is full.
    pub(crate) fn send(&self, datagram: &[u8], tos: u8, to: SocketAddr) -> io::Result<()> {
        match self.send_one(datagram, tos, to) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.wait_for_room(to, SEND_WAIT)?;
                self.send_one(datagram, tos, to)
            }
            result => result,
        }
    }

    /// Sends one datagram, or not if the send buffer is full.
    pub(crate) fn send_now(&self, datagram: &[u8], to: SocketAddr) -> io::Result<()> {
        self.send_one(datagram, 0, to)
    }

    fn send_one(&self, bytes: &[u8], tos: u8, to: SocketAddr) -> io::Result<()> {
        if is_virtual(to) {
            let taken = self.detour(bytes, to);
            return if taken { Ok(()) } else { Err(io::ErrorKind::AddrNotAvailable.into()) };
        }
        self.send_many(&[Message { bytes, segment: None, tos, to }]).map(drop)
    }

    /// Hands over a datagram for a virtual endpoint; `false` if nobody takes it.
    pub(crate) fn detour(&self, datagram: &[u8], to: SocketAddr) -> bool {
        self.virtual_out.give(datagram, to)
    }

    /// Sends messages of one family. How many the socket took; an error belongs to the first.
    pub(crate) fn send_many(&self, messages: &[Message<'_>]) -> io::Result<usize> {
        let Some(first) = messages.first() else { return Ok(0) };
        let socket = self.socket_to(first.to).ok_or(io::ErrorKind::AddrNotAvailable)?;
        send::send(socket, messages)
    }

    /// Waits until the socket for `to` takes something, but not for ever.
    pub(crate) fn wait_for_room(&self, to: SocketAddr, limit: Duration) -> io::Result<()> {
        let Some(socket) = self.socket_to(to) else { return Ok(()) };
        let mut room = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
        wake::wait(&mut room, wake::rounded_up(limit))
    }
}

fn bind_one(address: SocketAddr, settings: &Settings) -> Result<UdpSocket, TunnelError> {
    let failed = |action| move |source| TunnelError::Socket { action, source };
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))
        .map_err(failed("open"))?;
    if address.is_ipv6() {
        socket.set_only_v6(true).map_err(failed("restrict to IPv6"))?;
    } else {
        allow_fragments(&socket).map_err(failed("allow fragments"))?;
    }
    if let Some(mark) = settings.fwmark {
        set_mark(&socket2::SockRef::from(&socket), mark)?;
    }
    if settings.queues > 1 {
        socket.set_reuse_port(true).map_err(failed("share the port of"))?;
    }
    // To learn of congestion on the way. A kernel that does not tell costs nothing but that.
    let _ = if address.is_ipv6() { socket.set_recv_tclass_v6(true) } else { socket.set_recv_tos_v4(true) };
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

fn set_mark(socket: &Socket, mark: u32) -> Result<(), TunnelError> {
    socket.set_mark(mark).map_err(|source| match source.kind() {
        io::ErrorKind::PermissionDenied => {
            TunnelError::SocketRights { action: "set the mark of packets", capability: "CAP_NET_ADMIN" }
        }
        _ => TunnelError::Socket { action: "set the mark", source },
    })
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

/// Whether a message is too long, or has too many segments, for its path.
pub(crate) fn is_size_error(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EMSGSIZE | Errno::EINVAL))
}

fn is_without_ipv6(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EAFNOSUPPORT | Errno::EADDRNOTAVAIL))
}
