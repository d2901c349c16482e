//! A private network in one process: namespaces, veth pairs and child processes.
//!
//! `meshctl demo` and the tests build their fleets here. Nothing is ever done to the machine's own
//! network: a [`Lab`] makes one network namespace for the switch (a bridge) and one per [`Host`],
//! and file descriptors keep them alive, so they vanish with the process however it ends. A host
//! has its own mount namespace too, with a private `/run`, so that two daemons may use the same
//! socket paths.
//!
//! It works as root and, after [`enter`], as any user the kernel grants a user namespace.
//!
//! Every system call that std does not offer stands in `sys`; the other files hold no `unsafe`
//! but the registration of hooks between fork and exec.

mod sys;

mod error;
mod isolation;
mod network;
mod process;
mod wait;

pub mod testing;
pub mod transcript;

pub use error::LabError;
pub use isolation::{Isolation, check_tun, enter};
pub use network::{Host, Lab};
pub use process::Processes;
pub use wait::{wait_for, wait_until};
