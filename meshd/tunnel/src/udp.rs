//! The underlay: UDP sockets of both families on one port, a pair for each queue.

use std::io::{self, IoSlice};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, RwLock};

use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, sendmsg, setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

use crate::counters::OffloadCells;
use crate::detour::{SinkCell, is_virtual};
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
    offloads: Arc<OffloadCells>,
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

    /// Sends one datagram with `tos` in its IP header; waits a moment if the send buffer is full.
    pub(crate) fn send(&self, datagram: &[u8], tos: u8, to: SocketAddr) -> io::Result<()> {
        self.send_segments(datagram, None, (tos, to), SEND_WAIT_MS)
    }

    /// Sends one datagram, or not if the send buffer is full.
    pub(crate) fn send_now(&self, datagram: &[u8], to: SocketAddr) -> io::Result<()> {
        self.send_segments(datagram, None, (0, to), 0)
    }

    /// Sends the datagrams of `size` bytes that `bytes` is made of; the last may be shorter. The number
    /// of those that the socket refused.
    pub(crate) fn send_batch(&self, bytes: &[u8], size: usize, tos: u8, to: SocketAddr) -> usize {
        if bytes.len() > size && self.offloads.udp_gso.load(Ordering::Relaxed) {
            match self.send_segments(bytes, Some(size as u16), (tos, to), SEND_WAIT_MS) {
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
        bytes.chunks(size).filter(|datagram| self.send(datagram, tos, to).is_err()).count()
    }

    fn send_segments(
        &self,
        bytes: &[u8],
        size: Option<u16>,
        (tos, to): (u8, SocketAddr),
        wait_ms: u16,
    ) -> io::Result<()> {
        if is_virtual(to) {
            for datagram in bytes.chunks(size.map_or(bytes.len(), usize::from).max(1)) {
                if !self.virtual_out.give(datagram, to) {
                    return Err(io::ErrorKind::AddrNotAvailable.into());
                }
            }
            return Ok(());
        }
        let class = i32::from(tos);
        let (socket, service) = match to {
            SocketAddr::V4(_) => (&self.v4, ControlMessage::Ipv4Tos(&tos)),
            SocketAddr::V6(_) => {
                let socket = self.v6.as_ref();
                let socket = socket.ok_or_else(|| io::Error::from(io::ErrorKind::AddrNotAvailable))?;
                (socket, ControlMessage::Ipv6TClass(&class))
            }
        };
        let (parts, address) = ([IoSlice::new(bytes)], SockaddrStorage::from(to));
        // Zero is what the socket does anyway.
        let all = [size.as_ref().map(ControlMessage::UdpGsoSegments), (tos != 0).then_some(service)];
        let control: &[ControlMessage<'_>] = match &all {
            [Some(first), Some(second)] => &[*first, *second],
            [Some(one), None] | [None, Some(one)] => std::slice::from_ref(one),
            [None, None] => &[],
        };
        let send = || sendmsg(socket.as_raw_fd(), &parts, control, MsgFlags::MSG_DONTWAIT, Some(&address));
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

fn is_size_error(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EMSGSIZE | Errno::EINVAL))
}

fn is_without_ipv6(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EAFNOSUPPORT | Errno::EADDRNOTAVAIL))
}
