//! The index: what the journal says, sorted for look-ups. It may be lost at any time.

mod sled;

pub use self::sled::Index;

use std::{io, path::PathBuf};

/// Largest bytes of a value; larger ones would be split over blobs in files of their own.
pub const VALUE_BYTES_MAX: usize = 4096;
/// Largest bytes of a key.
pub const KEY_BYTES_MAX: usize = 512;
/// Most entries of one page.
pub const PAGE_ENTRIES_MAX: usize = 1000;

/// What is looked up by what.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Table {
    CertificateBySerial = 1,
    CertificateByExpiry = 3,
    CertificateByOwner = 6,
    CertificateByName = 7,
}

/// A change of one entry; no value removes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IndexOp {
    pub table: Table,
    pub key: Vec<u8>,
    pub value: Option<Vec<u8>>,
}

/// Which way a page goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Order {
    #[default]
    Ascending,
    Descending,
}

/// Which entries of a table are wanted.
#[derive(Debug, Clone, Default)]
pub struct Page {
    /// Only keys that begin so.
    pub prefix: Vec<u8>,
    /// Only keys after this one, in the page's order: the last one of the page before.
    pub after: Option<Vec<u8>>,
    /// At most so many, and never more than [`PAGE_ENTRIES_MAX`].
    pub limit: usize,
    pub order: Order,
}

/// An entry of a table: key and value.
pub type Entry = (Vec<u8>, Vec<u8>);

/// Why the index gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    #[error("index key of {bytes} bytes is larger than {KEY_BYTES_MAX}")]
    KeyTooLarge { bytes: usize },
    #[error("index value of {bytes} bytes is larger than {VALUE_BYTES_MAX}")]
    ValueTooLarge { bytes: usize },
    #[error("there is no index")]
    Absent,
    #[error("the index has another layout")]
    Layout,
    #[error("cannot {attempt} the index")]
    Database { attempt: &'static str, source: ::sled::Error },
    #[error("the index failed to {attempt}")]
    Panicked { attempt: &'static str },
    #[error("cannot {attempt} {}", path.display())]
    Io { attempt: &'static str, path: PathBuf, source: io::Error },
}

impl IndexOp {
    pub fn insert(table: Table, key: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>) -> Self {
        Self { table, key: key.into(), value: Some(value.into()) }
    }

    pub fn remove(table: Table, key: impl Into<Vec<u8>>) -> Self {
        Self { table, key: key.into(), value: None }
    }
}

impl IndexError {
    /// Whether the database is at fault, not what it was asked.
    pub(crate) fn is_mended_by_rebuild(&self) -> bool {
        matches!(self, Self::Absent | Self::Database { .. } | Self::Panicked { .. })
    }

    /// Whether room on the disk is all that is missing.
    pub(crate) fn is_full(&self) -> bool {
        match self {
            Self::Database { source: ::sled::Error::Io(error), .. } | Self::Io { source: error, .. } => {
                crate::disk::is_full(error)
            }
            _ => false,
        }
    }
}
