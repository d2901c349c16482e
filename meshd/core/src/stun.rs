//! STUN binding: a node asks from which address and port its datagrams arrive. RFC 8489.
//!
//! Only what that takes: the Binding method, requests without authentication, answers with
//! XOR-MAPPED-ADDRESS. Everything else is no message for us. An answer has at most
//! [`RESPONSE_BYTES_MAX`] bytes, so that a forged source gains a factor of 1.5 with headers.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Fixed value in every message. RFC 8489 §5.
const MAGIC_COOKIE: u32 = 0x2112_A442;
/// Message header, bytes. RFC 8489 §5.
const HEADER_BYTES: usize = 20;
/// Type and length in front of an attribute's value, bytes. RFC 8489 §14.
const ATTRIBUTE_HEADER_BYTES: usize = 4;
/// Largest message that is looked at, bytes: what a path of unknown MTU takes over IPv4. RFC 8489 §6.1.
pub const MESSAGE_BYTES_MAX: usize = 548;
/// Largest answer of ours, bytes: an IPv6 address.
pub const RESPONSE_BYTES_MAX: usize = HEADER_BYTES + ATTRIBUTE_HEADER_BYTES + 20;
/// Attributes of one message that are looked at.
const ATTRIBUTES_MAX: usize = 32;

/// Binding request and its answers. RFC 8489 §18.2 and §5.
const BINDING_REQUEST: u16 = 0x0001;
const BINDING_SUCCESS: u16 = 0x0101;
/// RFC 8489 §14.2.
const XOR_MAPPED_ADDRESS: u16 = 0x0020;
/// Types below this must be understood. RFC 8489 §14.
const COMPREHENSION_OPTIONAL: u16 = 0x8000;
/// Address families of an address attribute. RFC 8489 §14.1.
const FAMILY_IPV4: u8 = 0x01;
const FAMILY_IPV6: u8 = 0x02;

/// What ties an answer to its request: 96 random bits. RFC 8489 §5.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TransactionId(pub [u8; 12]);

/// Why bytes are no message that is answered or believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StunError {
    #[error("not a STUN message")]
    NotStun,
    #[error("message has more than {MESSAGE_BYTES_MAX} bytes")]
    TooLong,
    #[error("message is of type {kind:#06x}")]
    Type { kind: u16 },
    #[error("attributes are malformed")]
    Attributes,
    #[error("attribute {kind:#06x} must be understood and is not")]
    Unknown { kind: u16 },
    #[error("answer belongs to another request")]
    Transaction,
    #[error("answer has no address")]
    NoAddress,
}

/// Whether a datagram is STUN's by its header: never a WireGuard message, whose second byte is zero where
/// STUN has its type, and whose next bytes are not the cookie. RFC 8489 §5, §6.3.
pub fn is_stun(datagram: &[u8]) -> bool {
    Header::parse(datagram).is_ok()
}

/// A request without attributes, 20 bytes.
pub fn binding_request(transaction: TransactionId) -> Vec<u8> {
    header(BINDING_REQUEST, 0, transaction)
}

/// Reads a Binding request.
///
/// # Errors
/// [`StunError`]: such a datagram gets no answer.
pub fn parse_request(datagram: &[u8]) -> Result<TransactionId, StunError> {
    let (header, attributes) = Header::parse(datagram)?;
    if header.kind != BINDING_REQUEST {
        return Err(StunError::Type { kind: header.kind });
    }
    for attribute in Attributes(attributes).take(ATTRIBUTES_MAX) {
        let (kind, _) = attribute?;
        if kind < COMPREHENSION_OPTIONAL {
            return Err(StunError::Unknown { kind });
        }
    }
    Ok(header.transaction)
}

/// The answer to a request that came from `source`; at most [`RESPONSE_BYTES_MAX`] bytes.
pub fn binding_response(transaction: TransactionId, source: SocketAddr) -> Vec<u8> {
    let mut value = vec![0];
    let port = source.port() ^ (MAGIC_COOKIE >> 16) as u16;
    match source.ip().to_canonical() {
        IpAddr::V4(ip) => {
            value.push(FAMILY_IPV4);
            value.extend(port.to_be_bytes());
            value.extend((u32::from(ip) ^ MAGIC_COOKIE).to_be_bytes());
        }
        IpAddr::V6(ip) => {
            value.push(FAMILY_IPV6);
            value.extend(port.to_be_bytes());
            value.extend((u128::from(ip) ^ mask(transaction)).to_be_bytes());
        }
    }
    let mut message = header(BINDING_SUCCESS, ATTRIBUTE_HEADER_BYTES + value.len(), transaction);
    message.extend(XOR_MAPPED_ADDRESS.to_be_bytes());
    message.extend((value.len() as u16).to_be_bytes());
    message.extend(value);
    message
}

/// Reads the answer to the request of this transaction: where the server saw us.
///
/// # Errors
/// [`StunError`]: nothing of it may be believed.
pub fn parse_response(datagram: &[u8], expected: TransactionId) -> Result<SocketAddr, StunError> {
    let (header, attributes) = Header::parse(datagram)?;
    if header.transaction != expected {
        return Err(StunError::Transaction);
    }
    if header.kind != BINDING_SUCCESS {
        return Err(StunError::Type { kind: header.kind });
    }
    let mut found = None;
    for attribute in Attributes(attributes).take(ATTRIBUTES_MAX) {
        let (kind, value) = attribute?;
        // The first of a kind counts. RFC 8489 §14.
        if kind == XOR_MAPPED_ADDRESS && found.is_none() {
            found = Some(xor_address(value, expected).ok_or(StunError::Attributes)?);
        }
    }
    found.ok_or(StunError::NoAddress)
}

/// The transaction that an answer names, to find its request by.
pub fn transaction_of(datagram: &[u8]) -> Option<TransactionId> {
    Header::parse(datagram).ok().map(|(header, _)| header.transaction)
}

struct Header {
    kind: u16,
    transaction: TransactionId,
}

impl Header {
    fn parse(datagram: &[u8]) -> Result<(Self, &[u8]), StunError> {
        let (header, attributes) = datagram.split_first_chunk::<HEADER_BYTES>().ok_or(StunError::NotStun)?;
        let [k0, k1, l0, l1, c0, c1, c2, c3, transaction @ ..] = *header;
        let (kind, length) = (u16::from_be_bytes([k0, k1]), usize::from(u16::from_be_bytes([l0, l1])));
        // The two highest bits tell STUN from its neighbours on a port. RFC 8489 §5.
        let is_stun = k0 & 0xc0 == 0
            && u32::from_be_bytes([c0, c1, c2, c3]) == MAGIC_COOKIE
            && length % 4 == 0
            && length == attributes.len();
        if !is_stun {
            return Err(StunError::NotStun);
        }
        if datagram.len() > MESSAGE_BYTES_MAX {
            return Err(StunError::TooLong);
        }
        Ok((Self { kind, transaction: TransactionId(transaction) }, attributes))
    }
}

/// Type and value of each attribute; ends with the first that does not fit.
struct Attributes<'a>(&'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = Result<(u16, &'a [u8]), StunError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let bytes = std::mem::take(&mut self.0);
        let parse = || {
            let ([k0, k1, l0, l1], rest) = bytes.split_first_chunk::<ATTRIBUTE_HEADER_BYTES>()?;
            let length = usize::from(u16::from_be_bytes([*l0, *l1]));
            let value = rest.get(..length)?;
            // Values are padded to four bytes. RFC 8489 §14.
            Some((u16::from_be_bytes([*k0, *k1]), value, rest.get(length.next_multiple_of(4)..)?))
        };
        let Some((kind, value, rest)) = parse() else { return Some(Err(StunError::Attributes)) };
        self.0 = rest;
        Some(Ok((kind, value)))
    }
}

fn header(kind: u16, length: usize, transaction: TransactionId) -> Vec<u8> {
    let mut message = Vec::with_capacity(HEADER_BYTES + length);
    message.extend(kind.to_be_bytes());
    message.extend((length as u16).to_be_bytes());
    message.extend(MAGIC_COOKIE.to_be_bytes());
    message.extend(transaction.0);
    message
}

fn xor_address(value: &[u8], transaction: TransactionId) -> Option<SocketAddr> {
    let ([_, family, p0, p1], address) = value.split_first_chunk::<4>()?;
    let port = u16::from_be_bytes([*p0, *p1]) ^ (MAGIC_COOKIE >> 16) as u16;
    let ip = match *family {
        FAMILY_IPV4 => {
            let address = <[u8; 4]>::try_from(address).ok()?;
            Ipv4Addr::from(u32::from_be_bytes(address) ^ MAGIC_COOKIE).into()
        }
        FAMILY_IPV6 => {
            let address = <[u8; 16]>::try_from(address).ok()?;
            Ipv6Addr::from(u128::from_be_bytes(address) ^ mask(transaction)).into()
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

/// Cookie and transaction, with which an IPv6 address is XORed. RFC 8489 §14.2.
fn mask(transaction: TransactionId) -> u128 {
    let mut mask = [0; 16];
    mask[..4].copy_from_slice(&MAGIC_COOKIE.to_be_bytes());
    mask[4..].copy_from_slice(&transaction.0);
    u128::from_be_bytes(mask)
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    /// The transaction of RFC 5769's sample messages.
    const SAMPLE: TransactionId =
        TransactionId([0xb7, 0xe7, 0xa7, 0x01, 0xbc, 0x34, 0xd6, 0x86, 0xfa, 0x87, 0xdf, 0xae]);

    /// The address attributes of RFC 5769 §2.2 and §2.3, byte for byte.
    #[test]
    fn the_samples_of_rfc_5769_are_read_and_written() {
        let samples: [(&str, &[u8]); 2] = [
            ("192.0.2.1:32853", &[0, 0x20, 0, 8, 0, 1, 0xa1, 0x47, 0xe1, 0x12, 0xa6, 0x43]),
            (
                "[2001:db8:1234:5678:11:2233:4455:6677]:32853",
                &[
                    0, 0x20, 0, 20, 0, 2, 0xa1, 0x47, 0x01, 0x13, 0xa9, 0xfa, 0xa5, 0xd3, 0xf1, 0x79, 0xbc,
                    0x25, 0xf4, 0xb5, 0xbe, 0xd2, 0xb9, 0xd9,
                ],
            ),
        ];
        for (address, attribute) in samples {
            let address: SocketAddr = address.parse().unwrap();
            let message = binding_response(SAMPLE, address);
            assert_eq!(&message[HEADER_BYTES..], attribute, "{address}");
            assert!(message.len() <= RESPONSE_BYTES_MAX);
            assert_eq!(parse_response(&message, SAMPLE), Ok(address));
        }
    }

    #[test]
    fn only_plain_binding_requests_are_answered() {
        let request = binding_request(SAMPLE);
        assert_eq!(parse_request(&request), Ok(SAMPLE));
        // SOFTWARE "ab", padded: may be ignored.
        let with = |attribute: &[u8]| {
            let mut message = header(BINDING_REQUEST, attribute.len(), SAMPLE);
            message.extend(attribute);
            message
        };
        assert_eq!(parse_request(&with(&[0x80, 0x22, 0, 2, b'a', b'b', 0, 0])), Ok(SAMPLE));
        let username = [0, 6, 0, 1, b'a', 0, 0, 0];
        assert_eq!(parse_request(&with(&username)), Err(StunError::Unknown { kind: 6 }));
        assert_eq!(parse_request(&with(&[0x80, 0x22, 0, 9, 0, 0, 0, 0])), Err(StunError::Attributes));
        for kind in [0x0011, 0x0101, 0x0111, 0x0003] {
            let message = header(kind, 0, SAMPLE);
            assert_eq!(parse_request(&message), Err(StunError::Type { kind }), "{kind:#x}");
        }
        let long = [0x80, 0x22, 2, 12].into_iter().chain([0; 524]).collect::<Vec<u8>>();
        assert_eq!(parse_request(&with(&long[..])), Ok(SAMPLE), "548 bytes");
        let longer = [0x80, 0x22, 2, 16].into_iter().chain([0; 528]).collect::<Vec<u8>>();
        assert_eq!(parse_request(&with(&longer[..])), Err(StunError::TooLong));
    }

    #[test]
    fn an_answer_to_another_request_is_not_believed() {
        let message = binding_response(SAMPLE, "192.0.2.1:1".parse().unwrap());
        assert_eq!(parse_response(&message, TransactionId([0; 12])), Err(StunError::Transaction));
        assert_eq!(parse_response(&header(BINDING_SUCCESS, 0, SAMPLE), SAMPLE), Err(StunError::NoAddress));
        // 420 Unknown Attribute.
        assert_eq!(parse_response(&header(0x0111, 0, SAMPLE), SAMPLE), Err(StunError::Type { kind: 0x0111 }));
    }

    #[test]
    fn wireguards_messages_are_no_stun() {
        for kind in 1..=4 {
            for length in [32, 64, 92, 148, 1452] {
                let mut message = vec![0x21; length];
                message[..4].copy_from_slice(&[kind, 0, 0, 0]);
                message[4..8].copy_from_slice(&MAGIC_COOKIE.to_be_bytes());
                // The type is 0x0100 to 0x0400, the length 0: only one of 20 bytes could be both.
                assert!(!is_stun(&message), "{kind} {length}");
            }
        }
    }

    proptest! {
        /// Whatever comes: no panic, and nothing that is not one of ours is taken for a request.
        #[test]
        fn bytes_of_any_kind_are_judged(bytes in vec(any::<u8>(), 0..700), cookie in any::<bool>()) {
            let mut bytes = bytes;
            if cookie && bytes.len() >= 8 {
                let length = (bytes.len() - 8).saturating_sub(12) as u16;
                bytes[0] &= 0x3f;
                bytes[2..4].copy_from_slice(&length.to_be_bytes());
                bytes[4..8].copy_from_slice(&MAGIC_COOKIE.to_be_bytes());
            }
            if let Ok(transaction) = parse_request(&bytes) {
                prop_assert_eq!(&bytes[..2], &[0, 1]);
                prop_assert!(bytes.len() <= MESSAGE_BYTES_MAX);
                prop_assert_eq!(transaction_of(&bytes), Some(transaction));
            }
            let _ = parse_response(&bytes, SAMPLE);
        }

        /// Every address comes back, and one changed byte never yields an answer to another transaction.
        #[test]
        fn addresses_go_there_and_back(ip in any::<IpAddr>(), port in any::<u16>(), id in any::<[u8; 12]>(), at in 0usize..20, flip in 1u8..) {
            let (source, id) = (SocketAddr::new(ip, port), TransactionId(id));
            let mut message = binding_response(id, source);
            let read = parse_response(&message, id).unwrap();
            prop_assert_eq!(read, SocketAddr::new(ip.to_canonical(), port));
            message[at] ^= flip;
            prop_assert!(parse_response(&message, id).is_err());
        }
    }
}
