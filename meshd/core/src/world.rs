//! The fold of the journal.

mod state;

pub use state::*;
