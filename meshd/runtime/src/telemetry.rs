use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// One readable line per event.
    #[default]
    Text,
    /// One JSON document per event.
    Json,
}

/// Sends log events to standard error, filtered by `MESH_LOG` (default: `info`).
///
/// `MESH_LOG` takes tracing's directives, e.g. `info,mesh_controller::sync=debug`. Colour only on a
/// terminal and not with `NO_COLOR`. A second call has no effect, so tests may call it freely.
pub fn init_telemetry(format: LogFormat) {
    let filter = EnvFilter::try_from_env("MESH_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(colour)
        .with_target(true);
    // An error means that a subscriber is already there: the first one stays.
    let _ = match format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
}
