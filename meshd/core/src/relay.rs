//! The frames of the controller's relay over UDP: what a node hands over for another, and gets from it.
//!
//! ```text
//! session (4, highest bit set) · counter (4) · peer (4) · datagram · tag (8)
//! ```
//! All numbers are big-endian. `peer` is the node the datagram is for (to the controller) or from (to the
//! node); zero is a keepalive, which the controller answers with one. The tag is HMAC-SHA-256 (RFC 2104)
//! over a direction byte and everything before it, cut to 64 bits, under the key of the session, which
//! the node received over its authenticated stream. It keeps strangers out of the relay; what the datagrams
//! say is WireGuard's to protect.
//!
//! The first byte tells a frame from its neighbours on a port: WireGuard's is 1 to 4, STUN's below 64.

use hmac::{Hmac, Mac};
use sha2::Sha256;

/// What a frame adds to a datagram, bytes. With it a full packet of MTU 1420 still fits IPv4 over Ethernet.
pub const OVERHEAD_BYTES: usize = HEADER_BYTES + TAG_BYTES;
/// Largest datagram that is relayed, bytes: WireGuard on jumbo frames.
pub const DATAGRAM_BYTES_MAX: usize = 9_216;
/// Session, counter, peer.
const HEADER_BYTES: usize = 12;
/// 64 bits of a tag are as hard to guess as they are for as long as a session lives.
const TAG_BYTES: usize = 8;
/// Highest bit of every session number.
const SESSION_BIT: u32 = 1 << 31;
/// Counters behind the newest that may still arrive.
const WINDOW: u32 = 128;

/// The key of one session. Cannot be printed.
#[derive(Clone)]
pub struct Key([u8; 32]);

impl Key {
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(…)")
    }
}

/// The number of a session, drawn by the controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(u32);

impl SessionId {
    /// A session number out of any 32 bits.
    pub fn of(bits: u32) -> Self {
        Self(bits | SESSION_BIT)
    }

    pub fn number(self) -> u32 {
        self.0
    }
}

/// Which way a frame goes. A frame of one direction is none of the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    ToController,
    ToNode,
}

/// What a frame says, its tag verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    pub counter: u32,
    /// The other node, or 0 in a keepalive.
    pub peer: u32,
    pub datagram: &'a [u8],
}

/// Why bytes are no frame of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("not a relay frame")]
    NotAFrame,
    #[error("datagram has more than {DATAGRAM_BYTES_MAX} bytes")]
    TooLong,
    #[error("frame is not of this session")]
    Session,
    #[error("tag is wrong")]
    Tag,
}

/// The session that a datagram names; `None` if it is no frame.
pub fn session_of(datagram: &[u8]) -> Option<SessionId> {
    let session = u32::from_be_bytes(*datagram.first_chunk()?);
    (session & SESSION_BIT != 0 && datagram.len() >= OVERHEAD_BYTES).then_some(SessionId(session))
}

/// Writes and reads the frames of one session.
#[derive(Clone)]
pub struct Codec {
    session: SessionId,
    mac: Hmac<Sha256>,
}

impl std::fmt::Debug for Codec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Codec").field("session", &self.session).finish_non_exhaustive()
    }
}

impl Codec {
    pub fn new(session: SessionId, key: &Key) -> Self {
        Self { session, mac: Hmac::new_from_slice(&key.0).expect("HMAC takes keys of any length") }
    }

    pub fn session(&self) -> SessionId {
        self.session
    }

    /// A frame; `counter` must rise with each one of a direction.
    ///
    /// # Errors
    /// [`FrameError::TooLong`].
    pub fn seal(&self, direction: Direction, frame: Frame<'_>) -> Result<Vec<u8>, FrameError> {
        if frame.datagram.len() > DATAGRAM_BYTES_MAX {
            return Err(FrameError::TooLong);
        }
        let mut bytes = Vec::with_capacity(frame.datagram.len() + OVERHEAD_BYTES);
        bytes.extend(self.session.0.to_be_bytes());
        bytes.extend(frame.counter.to_be_bytes());
        bytes.extend(frame.peer.to_be_bytes());
        bytes.extend(frame.datagram);
        let tag = self.mac(direction, &bytes).finalize().into_bytes();
        bytes.extend(&tag[..TAG_BYTES]);
        Ok(bytes)
    }

    /// Reads a frame. Whether its counter came before is [`Window`]'s to say.
    ///
    /// # Errors
    /// [`FrameError`]: nothing of it may be believed.
    pub fn open<'a>(&self, direction: Direction, bytes: &'a [u8]) -> Result<Frame<'a>, FrameError> {
        if session_of(bytes).ok_or(FrameError::NotAFrame)? != self.session {
            return Err(FrameError::Session);
        }
        if bytes.len() > DATAGRAM_BYTES_MAX + OVERHEAD_BYTES {
            return Err(FrameError::TooLong);
        }
        let (covered, tag) = bytes.split_at(bytes.len() - TAG_BYTES);
        // In constant time.
        self.mac(direction, covered).verify_truncated_left(tag).map_err(|_| FrameError::Tag)?;
        let number = |at: usize| {
            covered[at..].first_chunk().map(|bytes| u32::from_be_bytes(*bytes)).ok_or(FrameError::NotAFrame)
        };
        Ok(Frame { counter: number(4)?, peer: number(8)?, datagram: &covered[HEADER_BYTES..] })
    }

    fn mac(&self, direction: Direction, covered: &[u8]) -> Hmac<Sha256> {
        let mut mac = self.mac.clone();
        mac.update(match direction {
            Direction::ToController => &[1],
            Direction::ToNode => &[2],
        });
        mac.update(covered);
        mac
    }
}

/// Which counters have been seen: each counts once, and old ones not at all (as RFC 6479 has it).
#[derive(Clone, Copy, Debug, Default)]
pub struct Window {
    /// The newest counter plus one; 0 before the first.
    next: u32,
    /// Bit n: `newest - n` was seen.
    seen: u128,
}

impl Window {
    /// Takes note of a counter whose frame was verified; `false` if it came before or is too old.
    pub fn accept(&mut self, counter: u32) -> bool {
        if counter == u32::MAX {
            return false;
        }
        if counter >= self.next {
            let ahead = counter - self.next + 1;
            self.seen = self.seen.checked_shl(ahead).unwrap_or(0) | 1;
            self.next = counter + 1;
            return true;
        }
        let behind = self.next - 1 - counter;
        if behind >= WINDOW || self.seen & (1 << behind) != 0 {
            return false;
        }
        self.seen |= 1 << behind;
        true
    }

    /// Whether `counter` is newer than all that were accepted.
    pub fn is_newest(&self, counter: u32) -> bool {
        counter >= self.next
    }
}

/// The counters of one direction of one session. They end; what is then left goes another way.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters(u32);

impl Counters {
    pub fn draw(&mut self) -> Option<u32> {
        let counter = self.0;
        self.0 = counter.checked_add(1)?;
        Some(counter)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::stun;

    fn codec(session: u32, key: u8) -> Codec {
        Codec::new(SessionId::of(session), &Key::new([key; 32]))
    }

    #[test]
    fn frames_of_another_session_key_or_direction_are_refused() {
        let frame = Frame { counter: 7, peer: 3, datagram: b"ciphertext" };
        let bytes = codec(1, 1).seal(Direction::ToController, frame).unwrap();
        assert_eq!(bytes.len(), frame.datagram.len() + OVERHEAD_BYTES);
        assert_eq!(codec(1, 1).open(Direction::ToController, &bytes), Ok(frame));
        assert_eq!(codec(1, 1).open(Direction::ToNode, &bytes), Err(FrameError::Tag));
        assert_eq!(codec(1, 2).open(Direction::ToController, &bytes), Err(FrameError::Tag));
        assert_eq!(codec(2, 1).open(Direction::ToController, &bytes), Err(FrameError::Session));
        let long = Frame { datagram: &[0; DATAGRAM_BYTES_MAX + 1], ..frame };
        assert_eq!(codec(1, 1).seal(Direction::ToNode, long), Err(FrameError::TooLong));
    }

    #[test]
    fn a_full_packet_fits_one_ethernet_frame() {
        // IPv4 and UDP headers, the frame's own bytes, WireGuard's around a packet of 1420 bytes.
        assert_eq!(20 + 8 + OVERHEAD_BYTES + 32 + 1420, 1500);
    }

    #[test]
    fn counters_end() {
        let mut counters = Counters(u32::MAX - 1);
        assert_eq!(counters.draw(), Some(u32::MAX - 1));
        assert_eq!(counters.draw(), None);
        assert_eq!(counters.draw(), None);
    }

    proptest! {
        /// What is sealed opens, and a frame with one changed byte does not.
        #[test]
        fn a_changed_byte_is_noticed(
            (counter, peer) in any::<(u32, u32)>(),
            datagram in vec(any::<u8>(), 0..300),
            (at, flip) in (any::<prop::sample::Index>(), 1u8..),
        ) {
            let codec = codec(9, 9);
            let frame = Frame { counter, peer, datagram: &datagram };
            let mut bytes = codec.seal(Direction::ToNode, frame).unwrap();
            prop_assert_eq!(codec.open(Direction::ToNode, &bytes), Ok(frame));
            prop_assert!(!stun::is_stun(&bytes) && bytes[0] >= 0x80);
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            prop_assert!(codec.open(Direction::ToNode, &bytes).is_err());
        }

        /// Bytes of any kind are judged without a panic.
        #[test]
        fn bytes_of_any_kind_are_judged(bytes in vec(any::<u8>(), 0..100)) {
            prop_assert!(codec(9, 9).open(Direction::ToController, &bytes).is_err());
            prop_assert!(session_of(&bytes).is_none_or(|session| session.number() >= SESSION_BIT));
        }

        /// The window takes each counter at most once, every one that is new, and agrees with a plain set.
        #[test]
        fn each_counter_counts_once(counters in vec(0u32..400, 0..200)) {
            let (mut window, mut seen, mut newest) = (Window::default(), BTreeSet::new(), None);
            for counter in counters {
                let fresh = newest.is_none_or(|newest| counter + WINDOW > newest) && seen.insert(counter);
                prop_assert_eq!(window.accept(counter), fresh, "{}", counter);
                newest = newest.max(Some(counter));
            }
        }
    }
}
