//! World on disk now and then, so that a start need not replay the whole journal.

use std::sync::Arc;

use mesh_runtime::ShutdownToken;
use mesh_store::{Snapshot, Snapshots};

use crate::codec::encode;
use crate::directory::Directory;
use crate::limits::SNAPSHOT_EVERY_RECORDS;

/// The layout of World that this program writes and reads; another one is replayed from the journal.
pub(crate) const SNAPSHOT_VERSION: u32 = 2;

#[derive(Debug)]
pub(crate) struct SnapshotTaker {
    directory: Arc<Directory>,
    snapshots: Snapshots,
    last: u64,
}

impl SnapshotTaker {
    /// The records up to `last` need no new snapshot: they were just replayed.
    pub(crate) fn new(directory: Arc<Directory>, snapshots: Snapshots, last: u64) -> Self {
        Self { directory, snapshots, last }
    }

    /// Takes a snapshot after every [`SNAPSHOT_EVERY_RECORDS`] records, until shutdown.
    pub(crate) async fn run(mut self, shutdown: ShutdownToken) {
        let mut head = self.directory.watch();
        loop {
            let seq = head.borrow_and_update().seq;
            self.take_if_due(seq).await;
            tokio::select! {
                () = shutdown.cancelled() => return self.take_if_due(self.directory.head().seq).await,
                changed = head.changed() => if changed.is_err() { return },
            }
        }
    }

    async fn take_if_due(&mut self, seq: u64) {
        if seq >= self.last + SNAPSHOT_EVERY_RECORDS {
            self.last = seq;
            self.take().await;
        }
    }

    async fn take(&self) {
        let (directory, snapshots) = (Arc::clone(&self.directory), self.snapshots.clone());
        let taken = tokio::task::spawn_blocking(move || {
            let (world, head) = directory.read_with_head(|world, head| (world.clone(), head));
            let bytes = encode(&world).map_err(|error| mesh_runtime::chain(&error))?;
            let snapshot = Snapshot { head, version: SNAPSHOT_VERSION, bytes };
            snapshots.write(&snapshot).map_err(|error| mesh_runtime::chain(&error))?;
            Ok::<_, String>(head)
        })
        .await;
        match taken {
            Ok(Ok(head)) => tracing::info!(?head, "snapshot written"),
            Ok(Err(error)) => tracing::warn!(error, "snapshot was not written"),
            Err(error) => tracing::warn!(%error, "snapshot was not written"),
        }
    }
}
