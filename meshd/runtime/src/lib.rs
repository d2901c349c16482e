//! What touches the world outside a process's own logic: clocks, operating-system randomness,
//! signals and telemetry; and helpers every role shares: back-off, the error chain, failpoints.
//!
//! Nothing else in the product reads a clock. The crate knows no other crate of ours, so that any
//! of them may depend on it.
#![forbid(unsafe_code)]

mod backoff;
mod clock;
mod error_chain;
mod failpoint;
mod random;
mod signals;
mod telemetry;

pub use backoff::Backoff;
pub use clock::{Clock, ManualClock, SharedClock, SystemClock};
pub use error_chain::chain;
pub use failpoint::Failpoint;
pub use random::{OsRandom, os_rng, random_bytes};
pub use signals::shutdown_on_signals;
pub use telemetry::{LogFormat, init_telemetry};
pub use tokio_util::sync::CancellationToken as ShutdownToken;
