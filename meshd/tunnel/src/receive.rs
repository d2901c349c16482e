//! Many datagrams in one system call: `recvmmsg` with `UDP_GRO`.
//!
//! nix has a wrapper, but it forgets to reset the control buffers between calls, so that segment sizes
//! stop arriving; hence our own.

use std::io;
use std::mem::{self, MaybeUninit};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::ptr;

use nix::errno::Errno;
use nix::libc;

/// Messages per call. With coalescing each may hold 64 datagrams.
const MESSAGES: usize = 16;
/// Largest message: a datagram, or as many as the kernel coalesces.
const MESSAGE_BYTES: usize = 65_536;
/// Room for the two control messages that are asked for, with the alignment the kernel expects.
type Control = [u64; 8];

/// What one call brought. Keeps its memory between calls.
pub(crate) struct Received {
    bytes: Vec<u8>,
    messages: [Option<Message>; MESSAGES],
}

/// One message: datagrams of `segment` bytes from one sender, the last may be shorter.
#[derive(Debug, Clone, Copy)]
struct Message {
    length: usize,
    segment: usize,
    tos: u8,
    from: SocketAddr,
}

impl Received {
    pub(crate) fn new() -> Self {
        // Never written, never touched: the kernel gives memory only to the pages that are used.
        Self { bytes: vec![0; MESSAGES * MESSAGE_BYTES], messages: [None; MESSAGES] }
    }

    /// Takes what is waiting at `socket`. The number of messages; zero if there is nothing.
    pub(crate) fn receive(&mut self, socket: &UdpSocket) -> io::Result<usize> {
        self.messages = [None; MESSAGES];
        // SAFETY: all of these are plain C data for which zero is a valid value.
        let mut names: [libc::sockaddr_storage; MESSAGES] = unsafe { mem::zeroed() };
        let mut controls: [Control; MESSAGES] = [[0; 8]; MESSAGES];
        let mut parts = [libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 }; MESSAGES];
        // SAFETY: as above.
        let mut headers: [libc::mmsghdr; MESSAGES] = unsafe { mem::zeroed() };
        for (index, chunk) in self.bytes.chunks_exact_mut(MESSAGE_BYTES).enumerate() {
            parts[index] = libc::iovec { iov_base: chunk.as_mut_ptr().cast(), iov_len: chunk.len() };
            let header = &mut headers[index].msg_hdr;
            header.msg_name = (&raw mut names[index]).cast();
            header.msg_namelen = mem::size_of::<libc::sockaddr_storage>() as libc::socklen_t;
            header.msg_iov = &raw mut parts[index];
            header.msg_iovlen = 1;
            header.msg_control = (&raw mut controls[index]).cast();
            header.msg_controllen = mem::size_of::<Control>() as _;
        }
        // SAFETY: `headers` holds MESSAGES valid headers; every pointer in them is to memory of the stated
        // length that lives and is not otherwise used until the call returns. No timeout.
        let count = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                headers.as_mut_ptr(),
                MESSAGES as libc::c_uint,
                libc::MSG_DONTWAIT as _,
                ptr::null_mut(),
            )
        };
        let count = match Errno::result(count) {
            Ok(count) => count as usize,
            Err(Errno::EAGAIN | Errno::EINTR) => 0,
            Err(errno) => return Err(errno.into()),
        };
        for (index, header) in headers[..count].iter().enumerate() {
            let length = header.msg_len as usize;
            // SAFETY: the kernel has filled in this header, and its control buffer is alive.
            let (segment, tos) = unsafe { control(&header.msg_hdr) };
            let segment = segment.unwrap_or(length).max(1);
            self.messages[index] = address(&names[index]).map(|from| Message { length, segment, tos, from });
        }
        Ok(count)
    }

    /// The messages of the last call: sender, type of service, and the datagrams.
    pub(crate) fn messages(&self) -> impl Iterator<Item = (SocketAddr, u8, std::slice::Chunks<'_, u8>)> {
        self.bytes.chunks_exact(MESSAGE_BYTES).zip(&self.messages).filter_map(|(bytes, message)| {
            let message = message.as_ref()?;
            Some((message.from, message.tos, bytes[..message.length].chunks(message.segment)))
        })
    }
}

/// The size of the datagrams in a message, if the kernel has coalesced several, and the type of service
/// (traffic class) they came with.
///
/// # Safety
/// `header` must have been filled in by the kernel and its control buffer must be alive.
unsafe fn control(header: &libc::msghdr) -> (Option<usize>, u8) {
    let (mut segment, mut tos) = (None, 0);
    // SAFETY: by the caller's promise the list that these macros walk is well formed, and each message has
    // the type that its level and number say: an integer, or one byte for the type of service.
    unsafe {
        let integer = |message: *const libc::cmsghdr| {
            let mut value = MaybeUninit::<libc::c_int>::uninit();
            let bytes = mem::size_of::<libc::c_int>();
            ptr::copy_nonoverlapping(libc::CMSG_DATA(message), value.as_mut_ptr().cast(), bytes);
            value.assume_init()
        };
        let mut next = libc::CMSG_FIRSTHDR(header);
        while let Some(message) = next.as_ref() {
            match (message.cmsg_level, message.cmsg_type) {
                (libc::SOL_UDP, libc::UDP_GRO) => {
                    segment = usize::try_from(integer(next)).ok().filter(|size| *size > 0);
                }
                (libc::IPPROTO_IP, libc::IP_TOS) => tos = *libc::CMSG_DATA(next),
                (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => tos = integer(next) as u8,
                _ => {}
            }
            next = libc::CMSG_NXTHDR(header, next);
        }
    }
    (segment, tos)
}

fn address(name: &libc::sockaddr_storage) -> Option<SocketAddr> {
    match libc::c_int::from(name.ss_family) {
        libc::AF_INET => {
            // SAFETY: the family says which of the structures, all smaller than the storage, this is.
            let name = unsafe { &*(&raw const *name).cast::<libc::sockaddr_in>() };
            let ip = Ipv4Addr::from(u32::from_be(name.sin_addr.s_addr));
            Some((ip, u16::from_be(name.sin_port)).into())
        }
        libc::AF_INET6 => {
            // SAFETY: as above.
            let name = unsafe { &*(&raw const *name).cast::<libc::sockaddr_in6>() };
            let (ip, port) = (Ipv6Addr::from(name.sin6_addr.s6_addr), u16::from_be(name.sin6_port));
            let scope = name.sin6_scope_id;
            Some(match ip.to_ipv4_mapped() {
                Some(ip) => (ip, port).into(),
                None => std::net::SocketAddrV6::new(ip, port, 0, scope).into(),
            })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn datagrams_of_every_size_arrive_with_their_sender() {
        for local in ["127.0.0.1:0", "[::1]:0"] {
            let receiver = UdpSocket::bind(local).unwrap();
            let sender = UdpSocket::bind(local).unwrap();
            let mut received = Received::new();
            assert_eq!(received.receive(&receiver).unwrap(), 0);
            let sizes = [0, 1, 40, 1452, 9000];
            for size in sizes {
                sender.send_to(&vec![size as u8; size], receiver.local_addr().unwrap()).unwrap();
            }
            assert_eq!(received.receive(&receiver).unwrap(), sizes.len());
            for ((from, tos, mut datagrams), size) in received.messages().zip(sizes) {
                assert_eq!(tos, 0);
                assert_eq!(from, sender.local_addr().unwrap());
                assert_eq!(datagrams.next().unwrap_or_default(), vec![size as u8; size]);
                assert!(datagrams.next().is_none());
            }
            assert_eq!(received.receive(&receiver).unwrap(), 0);
            assert_eq!(received.messages().count(), 0);
        }
    }
}
