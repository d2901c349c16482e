//! The daemon role that runs on every server: keeps the server's identity, builds the encrypted
//! network with its peers and hands certificates to the services on the host.
#![forbid(unsafe_code)]

mod certs;
mod clock;
mod config;
mod connect;
mod failpoint;
mod failure;
mod firewall;
mod hostop;
mod join;
mod limits;
mod pki;
mod roster;
mod run;
mod state;

pub use config::RunConfig;
pub use failure::{Failure, Failure as StartupError};
pub use run::run;
