//! A blocking netlink socket: one request, all of its answers.

use std::io;
use std::time::Duration;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NLMSG_NOOP,
    NLMSG_OVERRUN, NetlinkBuffer, NetlinkHeader, NetlinkMessage, NetlinkPayload, NetlinkSerializable,
};
use netlink_sys::{Socket, SocketAddr};
use nix::errno::Errno;
use socket2::SockRef;
use zeroize::Zeroizing;

/// Room for one datagram of the kernel's, bytes; it makes them no longer than 32 KiB (`netlink_dump`).
const DATAGRAM_BYTES: usize = 64 << 10;
/// How long the kernel may take for one answer. It answers at once, unless it has to load a module.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Answers of one request. A dump of 65,536 peers with all their prefixes needs less.
const DATAGRAMS_PER_ANSWER_MAX: usize = 1 << 17;
/// How often a dump that was disturbed by a change is asked for again.
const DUMP_ATTEMPTS: usize = 8;

/// One of the kernel's netlink families, in the network namespace it was opened in.
pub(super) struct Netlink {
    socket: Socket,
    sequence: u32,
    /// WireGuard's answers hold keys.
    datagram: Zeroizing<Vec<u8>>,
}

impl Netlink {
    pub(super) fn open(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        SockRef::from(&socket).set_read_timeout(Some(ANSWER_TIMEOUT))?;
        Ok(Self { socket, sequence: 0, datagram: Zeroizing::new(Vec::with_capacity(DATAGRAM_BYTES)) })
    }

    /// Sends one request and hands the payload of every answer to `take` until the kernel acknowledges.
    ///
    /// # Errors
    /// The kernel's own error, or that the answer cannot be read.
    pub(super) fn request<M: NetlinkSerializable>(
        &mut self,
        message: M,
        flags: u16,
        mut take: impl FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        self.send(message, NLM_F_REQUEST | NLM_F_ACK | flags)?;
        self.answers(&mut take).map(drop)
    }

    /// As [`request`](Self::request) for an answer in many parts; `take` is called with `None` before the
    /// first, also when a change in between makes the kernel's list useless and it begins anew.
    pub(super) fn dump<M: NetlinkSerializable + Clone>(
        &mut self,
        message: &M,
        mut take: impl FnMut(Option<&[u8]>) -> io::Result<()>,
    ) -> io::Result<()> {
        for _ in 0..DUMP_ATTEMPTS {
            take(None)?;
            self.send(message.clone(), NLM_F_REQUEST | NLM_F_DUMP)?;
            if self.answers(&mut |payload| take(Some(payload)))? == Dump::Whole {
                return Ok(());
            }
        }
        Err(invalid("the list changed each time it was read"))
    }

    fn send<M: NetlinkSerializable>(&mut self, message: M, flags: u16) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        (header.flags, header.sequence_number) = (flags, self.sequence);
        let bytes = encode(header, message);
        if self.socket.send(&bytes, 0)? == bytes.len() { Ok(()) } else { Err(invalid("a request was cut")) }
    }

    /// Reads until the end of the answer. Everything is read even when `take` fails, so that the next
    /// request does not find what is left.
    fn answers(&mut self, take: &mut dyn FnMut(&[u8]) -> io::Result<()>) -> io::Result<Dump> {
        let (mut kept, mut state) = (Ok(()), Dump::Whole);
        for _ in 0..DATAGRAMS_PER_ANSWER_MAX {
            self.datagram.clear();
            let length = match self.socket.recv(&mut *self.datagram, 0) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(io::Error::new(io::ErrorKind::TimedOut, "the kernel does not answer"));
                }
                result => result?,
            };
            if length > self.datagram.len() {
                return Err(invalid("an answer is longer than any may be"));
            }
            for part in parts(&self.datagram) {
                match part? {
                    Part { sequence, .. } if sequence != self.sequence => {}
                    Part { kind: Kind::Payload(payload), disturbed, .. } => {
                        if disturbed {
                            state = Dump::Disturbed;
                        }
                        if kept.is_ok() {
                            kept = take(payload);
                        }
                    }
                    Part { kind: Kind::End(result), disturbed, .. } => {
                        result?;
                        kept?;
                        return Ok(if disturbed { Dump::Disturbed } else { state });
                    }
                }
            }
        }
        Err(invalid("the answer has no end"))
    }
}

/// Whether a list is of one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Dump {
    Whole,
    Disturbed,
}

/// One message of a datagram.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Part<'a> {
    sequence: u32,
    disturbed: bool,
    kind: Kind<'a>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind<'a> {
    Payload(&'a [u8]),
    End(Result<(), Errno>),
}

pub(super) fn encode<M: NetlinkSerializable>(header: NetlinkHeader, message: M) -> Zeroizing<Vec<u8>> {
    let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
    message.finalize();
    let mut bytes = Zeroizing::new(vec![0; message.buffer_len()]);
    message.serialize(&mut bytes);
    bytes
}

/// The messages of one datagram; an error ends them.
fn parts(datagram: &[u8]) -> impl Iterator<Item = io::Result<Part<'_>>> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        loop {
            if rest.is_empty() {
                return None;
            }
            let Ok(message) = NetlinkBuffer::new_checked(rest) else {
                rest = &[];
                return Some(Err(invalid("an answer is cut")));
            };
            let (sequence, payload) = (message.sequence_number(), message.payload());
            let disturbed = message.flags() & NLM_F_DUMP_INTR != 0;
            let kind = match message.message_type() {
                NLMSG_NOOP => None,
                NLMSG_OVERRUN => {
                    rest = &[];
                    return Some(Err(invalid("an answer was lost")));
                }
                NLMSG_ERROR | NLMSG_DONE => Some(Kind::End(status(payload))),
                _ => Some(Kind::Payload(payload)),
            };
            let next = (message.length() as usize).next_multiple_of(4).min(rest.len());
            rest = &rest[next..];
            if let Some(kind) = kind {
                return Some(Ok(Part { sequence, disturbed, kind }));
            }
        }
    })
}

/// The result at the end of an answer: zero or a negative error, and nothing for "done" of old kernels.
fn status(payload: &[u8]) -> Result<(), Errno> {
    match payload.first_chunk().map(|code| i32::from_ne_bytes(*code)) {
        None | Some(0) => Ok(()),
        Some(code) => Err(Errno::from_raw(code.saturating_neg())),
    }
}

pub(super) fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    fn message(kind: u16, flags: u16, sequence: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(((16 + payload.len()) as u32).to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(payload);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn a_datagram_is_its_messages_in_order() {
        let datagram = [
            message(0x1c, 0, 7, b"abc"),
            message(NLMSG_NOOP, 0, 7, b""),
            message(0x1c, NLM_F_DUMP_INTR, 7, b"de"),
            message(NLMSG_ERROR, 0, 8, &(-95_i32).to_ne_bytes()),
            message(NLMSG_DONE, 0, 9, &[]),
        ]
        .concat();
        let found: Vec<_> = parts(&datagram).map(|part| part.unwrap()).collect();
        let part = |sequence, disturbed, kind| Part { sequence, disturbed, kind };
        let expected = [
            part(7, false, Kind::Payload(b"abc")),
            part(7, true, Kind::Payload(b"de")),
            part(8, false, Kind::End(Err(Errno::EOPNOTSUPP))),
            part(9, false, Kind::End(Ok(()))),
        ];
        assert_eq!(found, expected);
        let lost = message(NLMSG_OVERRUN, 0, 7, b"");
        assert!(parts(&lost).next().unwrap().is_err());
        assert!(parts(&datagram[..18]).next().unwrap().is_err());
    }

    proptest! {
        /// Whatever arrives, it is read to its end or called cut; nothing panics and nothing goes on for ever.
        #[test]
        fn any_bytes_are_read_to_an_end(mut bytes in vec(any::<u8>(), 0..256), first in 0_u32..300) {
            if let Some(length) = bytes.first_chunk_mut() {
                *length = first.to_ne_bytes();
            }
            let found = parts(&bytes).count();
            prop_assert!(found <= bytes.len() / 16 + 1);
        }
    }

    /// Real answers of whatever kernel this is: the loopback interface exists, a nameless one does not.
    #[test]
    fn the_kernel_answers_requests_and_errors() {
        use netlink_packet_route::RouteNetlinkMessage;
        use netlink_packet_route::link::{LinkAttribute, LinkMessage};
        let mut route = Netlink::open(netlink_sys::protocols::NETLINK_ROUTE).unwrap();
        let mut ask = |name: &str| {
            let (mut message, mut answers) = (LinkMessage::default(), 0);
            message.attributes.push(LinkAttribute::IfName(name.into()));
            let asked = route.request(RouteNetlinkMessage::GetLink(message), 0, |_| {
                answers += 1;
                Ok(())
            });
            (asked.map_err(|error| error.raw_os_error()), answers)
        };
        assert_eq!(ask("lo"), (Ok(()), 1));
        assert_eq!(ask("not-there"), (Err(Some(Errno::ENODEV as i32)), 0));
        assert_eq!(ask("lo"), (Ok(()), 1));
        let mut answers = 0;
        let list = RouteNetlinkMessage::GetLink(LinkMessage::default());
        route
            .dump(&list, |answer| {
                answers = if answer.is_some() { answers + 1 } else { 0 };
                Ok(())
            })
            .unwrap();
        assert!(answers >= 1);
    }
}
