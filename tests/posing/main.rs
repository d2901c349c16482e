//! Whoever poses as somebody else, or brings what was tampered with, gets nothing.
//!
//! Real daemons in private namespaces; the attackers are clients and servers of our own, with keys and certificates
//! that the product handed out or that a thief would find on a disk.
#![forbid(unsafe_code)]

use mesh_tests::{credential, join, rpc};

mod bodies;
mod callers;
mod impostor;
mod names;
mod process;
mod resumption;
mod secrets;
mod store;
mod stored_map;
mod tokens;
