//! Many messages in one system call: `sendmmsg`, each with its own destination, type of service and
//! `UDP_SEGMENT`.
//!
//! nix has a wrapper, but it allocates, and takes one set of control messages for all.

use std::io;
use std::mem;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::ptr;

use nix::errno::Errno;
use nix::libc;

/// Messages per call.
pub(crate) const MESSAGES: usize = 32;
/// Room for the two control messages that a message may have, with the alignment the kernel expects.
type Control = [u64; 8];

/// Bytes to one destination: a datagram, or as many as segments of the given size make, the last of which
/// may be shorter.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Message<'a> {
    pub(crate) bytes: &'a [u8],
    /// Size of the datagrams, if there are several.
    pub(crate) segment: Option<u16>,
    pub(crate) tos: u8,
    pub(crate) to: SocketAddr,
}

/// Sends the first [`MESSAGES`] of `messages`, which must be of the socket's family. How many the socket took;
/// an error belongs to the first of them. Never waits.
pub(crate) fn send(socket: &UdpSocket, messages: &[Message<'_>]) -> io::Result<usize> {
    let count = messages.len().min(MESSAGES);
    // SAFETY: all of these are plain C data for which zero is a valid value.
    let mut names: [libc::sockaddr_in6; MESSAGES] = unsafe { mem::zeroed() };
    let mut controls: [Control; MESSAGES] = [[0; 8]; MESSAGES];
    let mut parts = [libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 }; MESSAGES];
    // SAFETY: as above.
    let mut headers: [libc::mmsghdr; MESSAGES] = unsafe { mem::zeroed() };
    for (index, message) in messages.iter().take(count).enumerate() {
        // The kernel only reads what it is given to send.
        parts[index] =
            libc::iovec { iov_base: message.bytes.as_ptr().cast_mut().cast(), iov_len: message.bytes.len() };
        let header = &mut headers[index].msg_hdr;
        header.msg_namelen = write_address(&mut names[index], message.to);
        header.msg_name = (&raw mut names[index]).cast();
        header.msg_iov = &raw mut parts[index];
        header.msg_iovlen = 1;
        header.msg_control = (&raw mut controls[index]).cast();
        header.msg_controllen = mem::size_of::<Control>() as _;
        // SAFETY: the header's control buffer is zeroed, aligned and of the stated length.
        header.msg_controllen = unsafe { write_control(header, message) } as _;
    }
    // SAFETY: `headers` holds `count` valid headers; every pointer in them is to memory of the stated length
    // that lives until the call returns.
    let sent = unsafe {
        libc::sendmmsg(
            socket.as_raw_fd(),
            headers.as_mut_ptr(),
            count as libc::c_uint,
            libc::MSG_DONTWAIT as _,
        )
    };
    Ok(Errno::result(sent)? as usize)
}

/// Length of the address that was written.
fn write_address(name: &mut libc::sockaddr_in6, to: SocketAddr) -> libc::socklen_t {
    match to {
        SocketAddr::V4(to) => {
            // SAFETY: all zero is a valid value; the smaller structure is written over the larger, whose
            // alignment is the same.
            unsafe {
                let mut four: libc::sockaddr_in = mem::zeroed();
                four.sin_family = libc::AF_INET as libc::sa_family_t;
                four.sin_port = to.port().to_be();
                four.sin_addr.s_addr = u32::from_ne_bytes(to.ip().octets());
                ptr::from_mut(name).cast::<libc::sockaddr_in>().write(four);
            }
            mem::size_of::<libc::sockaddr_in>() as libc::socklen_t
        }
        SocketAddr::V6(to) => {
            name.sin6_family = libc::AF_INET6 as libc::sa_family_t;
            name.sin6_port = to.port().to_be();
            name.sin6_addr.s6_addr = to.ip().octets();
            name.sin6_scope_id = to.scope_id();
            mem::size_of::<libc::sockaddr_in6>() as libc::socklen_t
        }
    }
}

/// Bytes of control messages that were written.
///
/// # Safety
/// The control buffer of `header` must be zeroed, as long as the header says and at least as long as
/// [`Control`], and aligned as that.
unsafe fn write_control(header: &libc::msghdr, message: &Message<'_>) -> usize {
    let mut used = 0;
    // SAFETY: two control messages of an integer and of 16 bits fit into the buffer, by the caller's promise.
    unsafe {
        let mut next = libc::CMSG_FIRSTHDR(header);
        if let Some(segment) = message.segment {
            write_one(next, libc::SOL_UDP, libc::UDP_SEGMENT, segment);
            used += libc::CMSG_SPACE(mem::size_of::<u16>() as libc::c_uint) as usize;
            next = libc::CMSG_NXTHDR(header, next);
        }
        // Zero is what the socket does anyway.
        if message.tos != 0 {
            let (level, kind) = match message.to {
                SocketAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_TOS),
                SocketAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_TCLASS),
            };
            write_one(next, level, kind, libc::c_int::from(message.tos));
            used += libc::CMSG_SPACE(mem::size_of::<libc::c_int>() as libc::c_uint) as usize;
        }
    }
    used
}

/// # Safety
/// `at` must be where in a control buffer a control message with a `T` fits.
unsafe fn write_one<T>(at: *mut libc::cmsghdr, level: libc::c_int, kind: libc::c_int, value: T) {
    // SAFETY: by the caller's promise.
    unsafe {
        (*at).cmsg_level = level;
        (*at).cmsg_type = kind;
        (*at).cmsg_len = libc::CMSG_LEN(mem::size_of::<T>() as libc::c_uint) as _;
        libc::CMSG_DATA(at).cast::<T>().write_unaligned(value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::receive::Received;

    #[test]
    fn every_message_has_its_own_destination_size_and_service() {
        for local in ["127.0.0.1:0", "[::1]:0"] {
            let bound = || UdpSocket::bind(local).unwrap();
            let (sender, one, two) = (bound(), bound(), bound());
            for socket in [&one, &two] {
                let socket = socket2::SockRef::from(socket);
                if local.starts_with('[') {
                    socket.set_recv_tclass_v6(true)
                } else {
                    socket.set_recv_tos_v4(true)
                }
                .unwrap();
            }
            let bytes = [7; 300];
            let message = |bytes, segment, tos, to: &UdpSocket| Message {
                bytes,
                segment,
                tos,
                to: to.local_addr().unwrap(),
            };
            let messages = [
                message(&bytes[..], Some(128), 2, &one),
                message(&bytes[..5], None, 0, &two),
                message(&bytes[..6], None, 0x88, &one),
            ];
            assert_eq!(send(&sender, &messages).unwrap(), 3);
            let mut seen = [Vec::new(), Vec::new()];
            for (socket, seen) in [&one, &two].into_iter().zip(&mut seen) {
                let mut received = Received::new();
                received.receive(socket).unwrap();
                for (from, tos, datagrams) in received.messages() {
                    assert_eq!(from, sender.local_addr().unwrap());
                    seen.extend(datagrams.map(|datagram| (datagram.len(), tos)));
                }
            }
            assert_eq!(seen[0], [(128, 2), (128, 2), (44, 2), (6, 0x88)], "{local}");
            assert_eq!(seen[1], [(5, 0)], "{local}");
            // The error is of the first; those before it have left.
            let too_long = vec![0; 70_000];
            let messages = [message(&bytes[..1], None, 0, &one), message(&too_long[..], None, 0, &one)];
            assert_eq!(send(&sender, &messages).unwrap(), 1);
            assert_eq!(send(&sender, &messages[1..]).unwrap_err().raw_os_error(), Some(libc::EMSGSIZE));
        }
    }
}
