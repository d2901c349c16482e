//! Echo requests through the overlay. RFC 792, RFC 4443 §4.

use std::io::Read as _;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, Socket, Type};

const ECHO_REQUEST_V4: u8 = 8;
const ECHO_REPLY_V4: u8 = 0;
const ECHO_REQUEST_V6: u8 = 128;
const ECHO_REPLY_V6: u8 = 129;
/// Bytes of payload: what `ping` sends.
const PAYLOAD_BYTES: usize = 56;
const HEADER_BYTES: usize = 8;

/// Sends one echo request from `source` to `target` and waits for its reply. Blocks for at most `timeout`.
///
/// `Ok(None)`: no reply in time.
///
/// # Errors
/// The operating system refused: no right to open a raw socket, or no route.
pub(crate) fn echo(
    source: IpAddr,
    target: IpAddr,
    sequence: u16,
    timeout: Duration,
) -> std::io::Result<Option<Duration>> {
    let socket = open(source)?;
    // A connected raw socket receives from its target only.
    socket.connect(&SocketAddr::new(target, 0).into())?;
    let identifier = u16::from_be_bytes(mesh_runtime::random_bytes());
    let began = Instant::now();
    socket.send(&request(target, identifier, sequence))?;
    let mut buffer = [0; 2048];
    loop {
        let Some(left) = timeout.checked_sub(began.elapsed()).filter(|left| !left.is_zero()) else {
            return Ok(None);
        };
        socket.set_read_timeout(Some(left))?;
        match (&socket).read(&mut buffer) {
            Ok(length) if reply_to(target, &buffer[..length], identifier) == Some(sequence) => {
                return Ok(Some(began.elapsed()));
            }
            Ok(_) => {}
            Err(error)
                if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) =>
            {
                return Ok(None);
            }
            Err(error) => return Err(error),
        }
    }
}

/// A raw socket that speaks from `source`.
///
/// # Errors
/// No right to open one, or `source` is not ours.
pub(crate) fn open(source: IpAddr) -> std::io::Result<Socket> {
    let (domain, protocol) = match source {
        IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4),
        IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6),
    };
    let socket = Socket::new(domain, Type::RAW, Some(protocol))?;
    socket.bind(&SocketAddr::new(source, 0).into())?;
    Ok(socket)
}

/// An echo request, as it is handed to the socket.
pub(crate) fn request(target: IpAddr, identifier: u16, sequence: u16) -> Vec<u8> {
    let mut packet = vec![0; HEADER_BYTES + PAYLOAD_BYTES];
    packet[0] = if target.is_ipv4() { ECHO_REQUEST_V4 } else { ECHO_REQUEST_V6 };
    packet[4..6].copy_from_slice(&identifier.to_be_bytes());
    packet[6..8].copy_from_slice(&sequence.to_be_bytes());
    // The kernel computes ICMPv6's checksum itself (RFC 3542 §3.1): it covers the addresses.
    if target.is_ipv4() {
        let sum = checksum(&packet);
        packet[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    packet
}

/// The sequence number that `packet`, as the socket hands it over, is the reply to; `None` if it is something
/// else, or for somebody else.
pub(crate) fn reply_to(target: IpAddr, packet: &[u8], identifier: u16) -> Option<u16> {
    let (kind, body) = match target {
        // A raw IPv4 socket hands over the IP header too; its length is in the low half of the first byte.
        IpAddr::V4(_) => {
            let header = packet.first().map_or(0, |first| usize::from(first & 0x0f) * 4);
            (ECHO_REPLY_V4, packet.get(header..).unwrap_or_default())
        }
        IpAddr::V6(_) => (ECHO_REPLY_V6, packet),
    };
    let ours = body.len() >= HEADER_BYTES && body[0] == kind && body[4..6] == identifier.to_be_bytes();
    ours.then(|| u16::from_be_bytes([body[6], body[7]]))
}

/// The Internet checksum, RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_checks_out_and_its_reply_is_recognised() {
        let target: IpAddr = "100.64.0.2".parse().unwrap();
        let packet = request(target, 0xbeef, 3);
        assert_eq!(checksum(&packet), 0, "a packet with its checksum sums to zero");
        let mut reply = vec![0x45; 20];
        reply.extend_from_slice(&packet);
        assert_eq!(reply_to(target, &reply, 0xbeef), None, "our own request is no reply");
        reply[20] = ECHO_REPLY_V4;
        assert_eq!(reply_to(target, &reply, 0xbeef), Some(3));
        assert_eq!(reply_to(target, &reply, 0xbeee), None);
        assert_eq!(reply_to(target, &reply[..24], 0xbeef), None);
        assert_eq!(reply_to(target, &[], 0xbeef), None);
    }
}
