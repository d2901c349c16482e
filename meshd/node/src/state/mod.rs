//! The state folder: mode 0700, one process at a time, every file replaced whole.

mod folder;
mod identity;
mod secret;
mod stored_map;

pub(crate) use folder::{StateDir, StateError};
pub(crate) use identity::{ClockFile, Der, ENGINE_FILE, Enrollment, Identity, RenewalRequest};
pub(crate) use secret::Secret;
pub(crate) use stored_map::Floor;
