//! World on disk now and then, so that a start need not replay the whole journal.

use std::sync::Arc;

use mesh_runtime::ShutdownToken;
use mesh_store::{Snapshot, Snapshots};
use tokio::time::Instant;

use crate::codec::encode;
use crate::directory::{self, Directory};
use crate::limits::{FOLLOW_PAUSE, SNAPSHOT_EVERY_RECORDS, SNAPSHOT_REST};

/// The layout of World that this program writes and reads; another one is replayed from the journal. Once a journal has
/// lost its beginning there is nothing to replay: a new layout must read the one before (`meshd/core/tests/world/golden.rs`).
pub(crate) const SNAPSHOT_VERSION: u32 = 2;

#[derive(Debug)]
pub(crate) struct SnapshotTaker {
    directory: Arc<Directory>,
    snapshots: Snapshots,
    last: u64,
    /// Before this moment no other is taken.
    rest_until: Instant,
}

impl SnapshotTaker {
    /// The records up to `last` need no new snapshot: they were just replayed.
    pub(crate) fn new(directory: Arc<Directory>, snapshots: Snapshots, last: u64) -> Self {
        Self { directory, snapshots, last, rest_until: Instant::now() }
    }

    /// Takes a snapshot after every [`SNAPSHOT_EVERY_RECORDS`] records, until shutdown.
    pub(crate) async fn run(mut self, shutdown: ShutdownToken) {
        let mut head = self.directory.watch();
        loop {
            let seq = head.borrow_and_update().seq;
            if Instant::now() >= self.rest_until {
                self.take_if_due(seq).await;
            }
            tokio::select! {
                () = shutdown.cancelled() => return self.take_if_due(self.directory.head().seq).await,
                changed = directory::changed(&mut head, FOLLOW_PAUSE) => if changed.is_err() { return },
            }
        }
    }

    async fn take_if_due(&mut self, seq: u64) {
        if seq >= self.last + SNAPSHOT_EVERY_RECORDS {
            self.last = seq;
            let start = Instant::now();
            self.take().await;
            self.rest_until = Instant::now() + start.elapsed() * SNAPSHOT_REST;
        }
    }

    async fn take(&self) {
        let (directory, snapshots) = (Arc::clone(&self.directory), self.snapshots.clone());
        match tokio::task::spawn_blocking(move || take(&directory, &snapshots)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(error, "snapshot was not written"),
            Err(error) => tracing::warn!(%error, "snapshot was not written"),
        }
    }
}

/// World as it is now. Blocks.
pub(crate) fn of(directory: &Directory) -> Result<Snapshot, String> {
    let (world, head) = directory.read_with_head(|world, head| (world.clone(), head));
    let bytes = encode(&world).map_err(|error| mesh_runtime::chain(&error))?;
    Ok(Snapshot { head, version: SNAPSHOT_VERSION, bytes })
}

/// Writes a snapshot of World as it is now. Blocks.
pub(crate) fn take(directory: &Directory, snapshots: &Snapshots) -> Result<(), String> {
    let snapshot = of(directory)?;
    snapshots.write(&snapshot).map_err(|error| mesh_runtime::chain(&error))?;
    tracing::info!(head = ?snapshot.head, "snapshot written");
    Ok(())
}
