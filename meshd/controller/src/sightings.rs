//! When each node was last heard of, in a file beside the journal. It may be lost: nothing depends on
//! it but what people are shown after a restart.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use mesh_core::{NodeId, UtcTime, World};
use mesh_runtime::{SharedClock, ShutdownToken};

use crate::codec::{decode, encode};
use crate::presence::Presence;
use crate::state::{StateDir, read_file, replace_file};

const FILE: &str = "last-seen";
/// A hundred thousand nodes fit.
const FILE_BYTES_MAX: u64 = 8 * 1024 * 1024;
/// How old the file may be when the machine loses power.
const WRITE_INTERVAL: Duration = Duration::from_secs(300);

/// Keeps the file.
#[derive(Debug)]
pub(crate) struct Sightings {
    path: std::path::PathBuf,
    presence: Arc<Presence>,
    clock: SharedClock,
}

impl Sightings {
    /// Takes up the file, if there is a good one, for nodes that still exist.
    pub(crate) fn open(state: &StateDir, world: &World, presence: Arc<Presence>, clock: SharedClock) -> Self {
        let path = state.root().join(FILE);
        let read = read_file(&path, FILE_BYTES_MAX).ok();
        if let Some(seen) = read.and_then(|bytes| decode::<BTreeMap<NodeId, UtcTime>>(&bytes).ok()) {
            presence.recall(seen.into_iter().filter(|(id, _)| world.node(*id).is_some()).collect());
        }
        Self { path, presence, clock }
    }

    /// Writes the file now and then, and once more at shutdown.
    pub(crate) async fn run(self, shutdown: ShutdownToken) {
        let mut written = BTreeMap::new();
        loop {
            let stopped = tokio::select! {
                () = shutdown.cancelled() => true,
                () = tokio::time::sleep(WRITE_INTERVAL) => false,
            };
            let seen = self.presence.last_seen(self.clock.utc_now().into());
            if seen != written {
                self.write(&seen).await;
                written = seen;
            }
            if stopped {
                return;
            }
        }
    }

    async fn write(&self, seen: &BTreeMap<NodeId, UtcTime>) {
        let Ok(bytes) = encode(seen) else { return };
        let path = self.path.clone();
        let written = tokio::task::spawn_blocking(move || replace_file(&path, &bytes)).await;
        match written {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "the file of last sightings was not written"),
            Err(error) => tracing::warn!(%error, "the file of last sightings was not written"),
        }
    }
}
