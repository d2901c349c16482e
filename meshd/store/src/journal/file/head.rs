//! The head file: the last acknowledged record, so that its loss is noticed.
//!
//! It is written in place after each sync and not synced itself. So it never claims what is not
//! durable, a kill of the process cannot lose it, and after a power cut it is at worst old.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
};

use crate::journal::Head;

pub(crate) const FILE: &str = "head";
const MAGIC: [u8; 8] = *b"mjhead1\n";
const BYTES: usize = 8 + 8 + 32 + 4;

#[derive(Debug)]
pub(crate) struct HeadFile(File);

impl HeadFile {
    /// What the file says: `None` if it is not there or not whole.
    pub(crate) fn load(folder: &Path) -> io::Result<Option<Head>> {
        match fs::read(folder.join(FILE)) {
            Ok(bytes) => Ok(decode(&bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(crate) fn open(folder: &Path) -> io::Result<Self> {
        let path = folder.join(FILE);
        OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path).map(Self)
    }

    pub(crate) fn store(&self, head: &Head) -> io::Result<()> {
        self.0.write_all_at(&encode(head), 0)
    }
}

fn encode(head: &Head) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(BYTES);
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&head.seq.to_le_bytes());
    bytes.extend_from_slice(&head.hash);
    bytes.extend_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
    bytes
}

fn decode(bytes: &[u8]) -> Option<Head> {
    let bytes: &[u8; BYTES] = bytes.try_into().ok()?;
    let head =
        Head { seq: u64::from_le_bytes(bytes[8..16].try_into().ok()?), hash: bytes[16..48].try_into().ok()? };
    (encode(&head) == bytes).then_some(head)
}
