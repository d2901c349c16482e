//! Durable state of a controller: the journal, snapshots beside it, and an index that may be lost.
//!
//! The journal is the truth: append-only, hash-chained, synced before anything is acknowledged. Its
//! records are opaque here. [`Store::open`] opens all of it in the one safe order.
//!
//! Everything here blocks; call it from a thread that may.
#![forbid(unsafe_code)]

mod disk;
mod state;
mod store;

pub mod index;
pub mod journal;
pub mod snapshot;

pub use index::{Index, IndexError, IndexOp, Order, Page, Table};
pub use journal::{
    Append, AppendError, BeginError, CutError, EncodedRecord, FileJournal, Head, Hold, Journal,
    JournalReader, MemoryJournal, ReadError, Records, StoredRecord, find_operation,
};
pub use snapshot::{Snapshot, SnapshotError, Snapshots};
pub use state::{STATE_FORMAT_VERSION, StateDir, StateError};
pub use store::{CatchUpError, JOURNAL_FOLDER, OpenError, Store, StoreOptions, catch_up, catch_up_by};
