//! A UDP port on every address of this host, whose answers leave from the address that was asked: a router or a
//! firewall on the way lets in nothing else (RFC 8489 §6.3.1).

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg, setsockopt, sockopt,
};
use tokio::io::Interest;
use tokio::net::UdpSocket;

/// See the module.
#[derive(Debug)]
pub(crate) struct UdpPort(UdpSocket);

/// Where a datagram came from and the address of ours that it was for: the way back.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Way {
    pub(crate) to: SocketAddr,
    from: Option<Local>,
}

/// An address of ours, as the kernel tells it.
#[derive(Debug, Clone, Copy)]
enum Local {
    V4(libc::in_pktinfo),
    /// Also IPv4, mapped, on a socket of both families.
    V6(libc::in6_pktinfo),
}

impl UdpPort {
    pub(crate) async fn bind(address: SocketAddr) -> io::Result<Self> {
        let socket = UdpSocket::bind(address).await?;
        match address {
            SocketAddr::V4(_) => setsockopt(&socket, sockopt::Ipv4PacketInfo, &true)?,
            SocketAddr::V6(_) => setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)?,
        }
        Ok(Self(socket))
    }

    pub(crate) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }

    /// The next datagram's length and the way back; what does not fit `buffer` is cut off.
    pub(crate) async fn receive(&self, buffer: &mut [u8]) -> io::Result<(usize, Way)> {
        self.0.async_io(Interest::READABLE, || receive(&self.0, buffer)).await
    }

    /// Sends a datagram now or not at all.
    pub(crate) fn try_send(&self, datagram: &[u8], way: Way) -> io::Result<()> {
        self.0.try_io(Interest::WRITABLE, || send(&self.0, datagram, way))
    }
}

fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<(usize, Way)> {
    let mut parts = [IoSliceMut::new(buffer)];
    let mut space = nix::cmsg_space!(libc::in6_pktinfo);
    let message =
        recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_DONTWAIT)?;
    let from = message.cmsgs()?.find_map(|control| match control {
        ControlMessageOwned::Ipv4PacketInfo(info) => Some(Local::V4(info)),
        ControlMessageOwned::Ipv6PacketInfo(info) => Some(Local::V6(info)),
        _ => None,
    });
    let address = message.address.as_ref().and_then(socket_address).ok_or(Errno::EAFNOSUPPORT)?;
    Ok((message.bytes, Way { to: address, from: from.map(Local::for_answers) }))
}

fn send(socket: &UdpSocket, datagram: &[u8], way: Way) -> io::Result<()> {
    let (parts, address) = ([IoSlice::new(datagram)], SockaddrStorage::from(way.to));
    let from = way.from.as_ref().map(|from| match from {
        Local::V4(info) => ControlMessage::Ipv4PacketInfo(info),
        Local::V6(info) => ControlMessage::Ipv6PacketInfo(info),
    });
    sendmsg(socket.as_raw_fd(), &parts, from.as_slice(), MsgFlags::MSG_DONTWAIT, Some(&address))?;
    Ok(())
}

impl Local {
    /// The address alone: which interface an answer takes is for the routes to say. Link-local addresses say
    /// nothing without theirs (RFC 4007 §6).
    fn for_answers(self) -> Self {
        match self {
            Self::V4(info) => Self::V4(libc::in_pktinfo { ipi_ifindex: 0, ..info }),
            Self::V6(info) if Ipv6Addr::from(info.ipi6_addr.s6_addr).is_unicast_link_local() => {
                Self::V6(info)
            }
            Self::V6(info) => Self::V6(libc::in6_pktinfo { ipi6_ifindex: 0, ..info }),
        }
    }
}

fn socket_address(address: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = address.as_sockaddr_in().map(|address| SocketAddrV4::from(*address).into());
    v4.or_else(|| address.as_sockaddr_in6().map(|address| SocketAddrV6::from(*address).into()))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    /// All of 127.0.0.0/8 are addresses of this host, and routes prefer the first: an answer that leaves from
    /// another was told to.
    #[tokio::test]
    async fn answers_leave_from_the_address_that_was_asked() {
        for (bound, asked) in [
            ("0.0.0.0:0", "127.0.0.3"),
            ("[::]:0", "127.0.0.4"),
            ("[::]:0", "::1"),
            ("127.0.0.5:0", "127.0.0.5"),
        ] {
            let port = UdpPort::bind(bound.parse().unwrap()).await.unwrap();
            let server = SocketAddr::new(asked.parse().unwrap(), port.local_addr().unwrap().port());
            let loopback = if asked.contains(':') { "[::1]:0" } else { "127.0.0.1:0" };
            let client = UdpSocket::bind(loopback).await.unwrap();
            client.send_to(b"question", server).await.unwrap();
            let mut buffer = [0; 5];
            let (length, way) =
                tokio::time::timeout(PATIENCE, port.receive(&mut buffer)).await.unwrap().unwrap();
            assert_eq!(&buffer[..length], b"quest", "cut off at the buffer's end");
            let seen = SocketAddr::new(way.to.ip().to_canonical(), way.to.port());
            assert_eq!(seen, client.local_addr().unwrap());
            port.try_send(b"answer", way).unwrap();
            let mut buffer = [0; 64];
            let (length, from) =
                tokio::time::timeout(PATIENCE, client.recv_from(&mut buffer)).await.unwrap().unwrap();
            assert_eq!((&buffer[..length], from), (&b"answer"[..], server), "bound to {bound}");
        }
    }
}
