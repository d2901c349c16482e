//! The daemon role that runs on every server: keeps the server's identity, builds the encrypted
//! network with its peers and hands certificates to the services on the host.
#![forbid(unsafe_code)]

mod certs;
mod clock;
mod config;
mod connect;
mod failpoint;
mod failure;
mod findings;
mod firewall;
mod hostop;
mod identity;
mod join;
mod limits;
mod local;
mod network;
mod ping;
mod pki;
mod roster;
mod run;
mod schedule;
mod session;
mod state;
#[cfg(test)]
mod testing;
mod uplink;

pub use config::{Backend, RunConfig};
pub use failure::{Failure, Failure as StartupError};
pub use run::run;
