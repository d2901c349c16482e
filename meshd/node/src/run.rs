//! The role from start to end.

use tokio_util::sync::CancellationToken;

use crate::config::RunConfig;
use crate::failure::Failure;
use crate::state::StateDir;

/// Runs the node until `shutdown` is cancelled.
///
/// # Errors
/// [`Failure`] with code, reason, next step and exit code: the state folder cannot be used, the socket
/// cannot be opened, or the enrollment that `token_file` asks for was refused.
pub async fn run(config: RunConfig, shutdown: CancellationToken) -> Result<(), Failure> {
    let state = StateDir::open(&config.state_dir)?;
    tracing::info!(state = %state.path().display(), "node starts");
    shutdown.cancelled().await;
    Ok(())
}
