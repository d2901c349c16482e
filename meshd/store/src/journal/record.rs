use std::fmt;

use sha2::{Digest, Sha256};

/// Separates these hashes from every other use of SHA-256.
const DOMAIN: &[u8] = b"meshd journal record v1\0";
/// Operation id, time and length before the bytes of a stored record.
const PREFIX_BYTES: usize = 16 + 8 + 4;

/// A record to append.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodedRecord {
    /// Given by whoever made the record, to find it again.
    pub op_id: [u8; 16],
    /// Seconds since 1970, UTC.
    pub time_secs: i64,
    pub bytes: Vec<u8>,
}

/// A record of the journal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredRecord {
    /// Place in the journal; the first is 1.
    pub seq: u64,
    /// Seconds since 1970, UTC.
    pub time_secs: i64,
    pub op_id: [u8; 16],
    pub bytes: Vec<u8>,
    /// Over this record and, by the hash before it, all earlier ones.
    pub hash: [u8; 32],
}

/// An end of the journal: its last record's number and hash, which covers all records before it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Head {
    pub seq: u64,
    pub hash: [u8; 32],
}

impl Head {
    /// The end of a journal without records.
    pub const EMPTY: Self = Self { seq: 0, hash: [0; 32] };

    /// The head after `record`.
    pub(crate) fn next(&self, record: &EncodedRecord) -> Self {
        let seq = self.seq + 1;
        Self { seq, hash: chain_hash(&self.hash, seq, record) }
    }
}

impl fmt::Debug for Head {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.seq)?;
        self.hash[..8].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl EncodedRecord {
    /// Bytes that the record takes in a frame.
    pub(crate) fn stored_len(&self) -> usize {
        PREFIX_BYTES + self.bytes.len()
    }

    /// The record as stored: `op_id ‖ time ‖ length ‖ bytes`, numbers little-endian.
    pub(crate) fn store(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.prefix());
        out.extend_from_slice(&self.bytes);
    }

    /// Takes a stored record off the front of `body`.
    pub(crate) fn load(body: &mut &[u8]) -> Option<Self> {
        let (op_id, rest) = body.split_first_chunk::<16>()?;
        let (time, rest) = rest.split_first_chunk::<8>()?;
        let (length, rest) = rest.split_first_chunk::<4>()?;
        let length = usize::try_from(u32::from_le_bytes(*length)).ok()?;
        let (bytes, rest) = rest.split_at_checked(length)?;
        *body = rest;
        Some(Self { op_id: *op_id, time_secs: i64::from_le_bytes(*time), bytes: bytes.to_vec() })
    }

    fn prefix(&self) -> [u8; PREFIX_BYTES] {
        let length = u32::try_from(self.bytes.len()).expect("a record is checked against RECORD_BYTES_MAX");
        let mut prefix = [0; PREFIX_BYTES];
        prefix[..16].copy_from_slice(&self.op_id);
        prefix[16..24].copy_from_slice(&self.time_secs.to_le_bytes());
        prefix[24..].copy_from_slice(&length.to_le_bytes());
        prefix
    }

    pub(crate) fn into_stored(self, head: &Head) -> StoredRecord {
        let Self { op_id, time_secs, bytes } = self;
        StoredRecord { seq: head.seq, time_secs, op_id, bytes, hash: head.hash }
    }
}

impl StoredRecord {
    pub(crate) fn to_encoded(&self) -> EncodedRecord {
        EncodedRecord { op_id: self.op_id, time_secs: self.time_secs, bytes: self.bytes.clone() }
    }

    /// The journal's head when this was its last record.
    pub fn head(&self) -> Head {
        Head { seq: self.seq, hash: self.hash }
    }
}

/// Hash of a record: SHA-256 of a domain tag, the hash before it, its number and the stored record
/// (operation id, time, length, bytes; numbers little-endian).
pub fn chain_hash(previous: &[u8; 32], seq: u64, record: &EncodedRecord) -> [u8; 32] {
    let mut hash = Sha256::new_with_prefix(DOMAIN);
    hash.update(previous);
    hash.update(seq.to_le_bytes());
    hash.update(record.prefix());
    hash.update(&record.bytes);
    hash.finalize().into()
}
