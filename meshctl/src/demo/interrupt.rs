//! Ctrl-C in the middle leaves nothing behind either.

use std::{
    fs,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use tokio::signal::unix::{SignalKind, signal};

use super::Broken;

/// What shells report for a program that SIGINT ended.
const EXIT_INTERRUPTED: i32 = 130;

/// Removes a folder and ends the process at SIGINT or SIGTERM, until it is disarmed.
#[derive(Debug)]
pub(super) struct Interrupt {
    armed: Arc<AtomicBool>,
}

impl Interrupt {
    /// Starts a thread, so namespaces must have been entered.
    pub(super) fn arm(folder: PathBuf) -> Result<Self, Broken> {
        let armed = Arc::new(AtomicBool::new(true));
        let watched = Arc::clone(&armed);
        let work = move || {
            if wait_for_signal().is_ok() && watched.load(Ordering::SeqCst) {
                // The daemons end with us: the kernel sees to that.
                let _ = fs::remove_dir_all(&folder);
                std::process::exit(EXIT_INTERRUPTED);
            }
        };
        let started = thread::Builder::new().name("signals".to_owned()).spawn(work);
        started.map_err(|error| Broken::new(format!("cannot start a thread: {error}")))?;
        Ok(Self { armed })
    }

    /// From now on somebody else waits for the signal, or the folder is to stay.
    pub(super) fn disarm(&self) {
        self.armed.store(false, Ordering::SeqCst);
    }
}

/// Returns at the first SIGINT or SIGTERM.
pub(super) fn wait_for_signal() -> Result<(), Broken> {
    let broken = |error: std::io::Error| Broken::new(format!("cannot wait for a signal: {error}"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(broken)?;
    runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt()).map_err(broken)?;
        let mut terminate = signal(SignalKind::terminate()).map_err(broken)?;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        Ok(())
    })
}
