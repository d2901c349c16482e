//! The daemon role that runs on every server: keeps the server's identity, builds the encrypted
//! network with its peers and hands certificates to the services on the host.
#![forbid(unsafe_code)]

mod config;
mod failure;
mod limits;
mod run;
mod state;

pub use config::RunConfig;
pub use failure::{Failure, Failure as StartupError};
pub use run::run;
