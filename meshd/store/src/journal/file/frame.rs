//! The bytes of a frame: one batch of records.
//!
//! ```text
//! header  0  magic        4   f5 'm' 'j' 'f'
//!         4  version      2   1
//!         6  reserved     2   0
//!         8  body length  4
//!        12  records      4
//!        16  first seq    8
//!        24  previous    32   hash of the record before the first
//!        56  CRC-32       4   of bytes 0..56
//! body   60  records          op_id 16, time 8, length 4, bytes
//!         …  CRC-32       4   of the header's CRC and the body
//! ```
//! Numbers are little-endian. After the last frame of a segment come zeroes.

use crate::journal::{EncodedRecord, FRAME_BODY_BYTES_MAX, Head, RECORDS_PER_FRAME_MAX, StoredRecord};

/// The first byte occurs in no UTF-8 text, which makes the search for frames in damage short.
pub(crate) const MAGIC: [u8; 4] = [0xf5, b'm', b'j', b'f'];
const VERSION: u16 = 1;
pub(crate) const HEADER_BYTES: usize = 60;
const HEADER_CRC_AT: usize = HEADER_BYTES - 4;
pub(crate) const TRAILER_BYTES: usize = 4;

/// What is wrong with a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    #[error("it is cut off")]
    Cut,
    #[error("no frame begins here")]
    NoFrame,
    #[error("the header's checksum is wrong")]
    HeaderChecksum,
    #[error("the body's checksum is wrong")]
    BodyChecksum,
    #[error("frame version {version} is not known")]
    Version { version: u16 },
    #[error("its contents contradict its header")]
    Contents,
    #[error("it is numbered {found}")]
    Number { found: u64 },
    #[error("it does not continue the hash chain")]
    Chain,
}

impl Damage {
    /// Whether a power cut during the frame's write can have left this. What has both checksums right was
    /// written so, on purpose.
    pub(crate) fn may_be_torn(&self) -> bool {
        matches!(self, Self::Cut | Self::NoFrame | Self::HeaderChecksum | Self::BodyChecksum)
    }
}

/// A header whose checksum is right.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Header {
    pub(crate) body_bytes: usize,
    pub(crate) records: usize,
    pub(crate) first_seq: u64,
    pub(crate) previous: [u8; 32],
    crc: [u8; 4],
}

/// The frame that holds `records` after `head`, and the head after them.
pub(crate) fn encode(head: &Head, records: &[EncodedRecord]) -> (Vec<u8>, Head) {
    let body_bytes: usize = records.iter().map(EncodedRecord::stored_len).sum();
    let checked = "an append is checked against its limits";
    let mut frame = Vec::with_capacity(HEADER_BYTES + body_bytes + TRAILER_BYTES);
    frame.extend_from_slice(&MAGIC);
    frame.extend_from_slice(&VERSION.to_le_bytes());
    frame.extend_from_slice(&[0; 2]);
    frame.extend_from_slice(&u32::try_from(body_bytes).expect(checked).to_le_bytes());
    frame.extend_from_slice(&u32::try_from(records.len()).expect(checked).to_le_bytes());
    frame.extend_from_slice(&(head.seq + 1).to_le_bytes());
    frame.extend_from_slice(&head.hash);
    let crc = crc32fast::hash(&frame).to_le_bytes();
    frame.extend_from_slice(&crc);
    let mut end = *head;
    for record in records {
        record.store(&mut frame);
        end = end.next(record);
    }
    let crc = body_crc(&crc, &frame[HEADER_BYTES..]);
    frame.extend_from_slice(&crc);
    (frame, end)
}

impl Header {
    pub(crate) fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self, Damage> {
        if bytes[..4] != MAGIC {
            return Err(Damage::NoFrame);
        }
        let crc = chunk::<4>(bytes, HEADER_CRC_AT);
        if crc32fast::hash(&bytes[..HEADER_CRC_AT]).to_le_bytes() != crc {
            return Err(Damage::HeaderChecksum);
        }
        let version = u16::from_le_bytes(chunk(bytes, 4));
        if version != VERSION {
            return Err(Damage::Version { version });
        }
        let body_bytes = u32::from_le_bytes(chunk(bytes, 8)) as usize;
        let records = u32::from_le_bytes(chunk(bytes, 12)) as usize;
        if body_bytes > FRAME_BODY_BYTES_MAX || records == 0 || records > RECORDS_PER_FRAME_MAX {
            return Err(Damage::Contents);
        }
        let first_seq = u64::from_le_bytes(chunk(bytes, 16));
        Ok(Self { body_bytes, records, first_seq, previous: chunk(bytes, 24), crc })
    }

    /// Bytes from the start of this frame to the start of the next.
    pub(crate) fn frame_bytes(&self) -> u64 {
        (HEADER_BYTES + self.body_bytes + TRAILER_BYTES) as u64
    }

    /// The number of the first record after this frame.
    pub(crate) fn next_seq(&self) -> u64 {
        self.first_seq.saturating_add(self.records as u64)
    }

    /// Checks `body`, which ends with its checksum.
    pub(crate) fn check_body<'a>(&self, body: &'a [u8]) -> Result<&'a [u8], Damage> {
        let (body, crc) = body.split_last_chunk::<TRAILER_BYTES>().ok_or(Damage::Cut)?;
        if body_crc(&self.crc, body) == *crc { Ok(body) } else { Err(Damage::BodyChecksum) }
    }

    /// The records of this frame, which must follow `head`; moves `head` to the last of them.
    pub(crate) fn records(&self, mut body: &[u8], head: &mut Head) -> Result<Vec<StoredRecord>, Damage> {
        if self.first_seq != head.seq + 1 {
            return Err(Damage::Number { found: self.first_seq });
        }
        if self.previous != head.hash {
            return Err(Damage::Chain);
        }
        let mut end = *head;
        let mut records = Vec::with_capacity(self.records);
        for _ in 0..self.records {
            let record = EncodedRecord::load(&mut body).ok_or(Damage::Contents)?;
            end = end.next(&record);
            records.push(record.into_stored(&end));
        }
        if !body.is_empty() {
            return Err(Damage::Contents);
        }
        *head = end;
        Ok(records)
    }
}

/// The header's checksum goes first, so that no body fits another frame's header.
fn body_crc(header_crc: &[u8; 4], body: &[u8]) -> [u8; 4] {
    let mut crc = crc32fast::Hasher::new();
    crc.update(header_crc);
    crc.update(body);
    crc.finalize().to_le_bytes()
}

fn chunk<const N: usize>(bytes: &[u8; HEADER_BYTES], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().expect("the fields lie within the header")
}
