//! A whole fleet of real processes in private namespaces, for tests and benchmarks.
//!
//! Every test of a suite starts with [`fleet_test`], which runs it in a process of its own inside new
//! network and mount namespaces. Nothing outside is touched.
#![forbid(unsafe_code)]

pub mod credential;
pub mod join;
pub mod rpc;

mod binaries;
mod clock;
mod command;
mod fleet;

pub use binaries::binary;
pub use clock::move_clock;
pub use command::{Ran, run};
pub use fleet::{CONTROLLER, Fleet, fleet_test};
pub use mesh_lab::{Host, wait_until};

use std::time::Duration;

/// How long a state may take to come about on two busy cores before a test calls it missing.
pub const DEADLINE: Duration = Duration::from_secs(60);
