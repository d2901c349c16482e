//! Entries of the peer map: encoded once by the controller, and the same bytes on every stream.

use prost::bytes::Bytes;
use prost::{DecodeError, Message as _};

use crate::v1::{Delta, Full, Peer};

impl Peer {
    /// As it stands in [`Full::peers`] and [`Delta::upserts`].
    pub fn to_entry(&self) -> Bytes {
        self.encode_to_vec().into()
    }
}

impl Full {
    /// The peers, each read by itself: one that cannot be read says nothing about the others.
    pub fn read_peers(&self) -> impl Iterator<Item = Result<Peer, DecodeError>> {
        read(&self.peers)
    }
}

impl Delta {
    /// New and changed peers, each read by itself.
    pub fn read_upserts(&self) -> impl Iterator<Item = Result<Peer, DecodeError>> {
        read(&self.upserts)
    }
}

fn read(entries: &[Bytes]) -> impl Iterator<Item = Result<Peer, DecodeError>> {
    // A clone shares the bytes; the leaf in the peer is a part of them.
    entries.iter().map(|entry| Peer::decode(entry.clone()))
}
