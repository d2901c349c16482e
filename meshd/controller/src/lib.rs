//! The controller: private certificate authority and directory of a fleet.
//!
//! Requests enter by `listener`, are admitted by `gate` after the one table in `auth`, handled by a
//! thin file of `service`, decided and recorded by the one thread of `writer`, and answered from
//! the published World in `directory`. Errors leave by `status` and no other door.
#![forbid(unsafe_code)]

mod config;
mod error;
mod limits;
mod metrics;

mod controller;
mod import;
mod init;
mod restore;

mod archive;
mod backup;
mod codec;
mod directory;
mod history;
mod retention;
mod snapshots;
mod state;
mod writer;

mod authority;
mod hardware;
mod issuer;
mod ocsp;
mod offline_root;
mod own_certificate;
mod profiles;
mod publish;
mod signers;
mod upkeep;
mod web;

mod auth;
mod connections;
mod denials;
mod gate;
mod listener;
mod status;
mod succession;
mod throttle;
mod tls;

mod certify;
mod enroll;
mod explain;
mod identity;
mod receipts;
mod renew;
mod reservations;
mod revoke;
mod token;
mod wireguard;

mod entries;
mod presence;
mod relay;
mod sightings;
mod sync;
mod udp_port;
mod underlay;
mod views;

mod failpoint;
mod parts;
#[cfg(test)]
mod rig;
mod service;

pub use backup::BackupError;
pub use config::{
    CRL_SHARDS_DEFAULT, ImportConfig, ImportKind, InitConfig, InitSummary, Passphrase, Publishing,
    RelayLimit, RestoreConfig, RestoreSummary, RunConfig, StunListen, Unlock,
};
pub use controller::{Controller, Environment};
pub use error::StartupError;
pub use hardware::HsmPlace;
pub use import::ImportProblem;
pub use init::init;
pub use mesh_ca::CaKeyType;
pub use mesh_proto::v1::ErrorCode;
pub use restore::restore;

/// Runs the controller of `config` on the system's clock until `shutdown`.
///
/// # Errors
/// Whatever kept it from starting, or made it stop; see [`StartupError`].
pub async fn run(config: RunConfig, shutdown: mesh_runtime::ShutdownToken) -> Result<(), StartupError> {
    let environment = Environment { clock: std::sync::Arc::new(mesh_runtime::SystemClock), journal: None };
    Controller::build(config, environment).await?.run(shutdown).await
}
