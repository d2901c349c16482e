//! The published World: what is on disk, and nothing else. Everybody reads here; one thread writes.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use mesh_core::{Record, World};
use mesh_store::Head;
use tokio::sync::watch;

use crate::limits::RECENT_RECORDS_MAX;

/// World as of the newest durable record, and a way to hear of newer ones.
#[derive(Debug)]
pub(crate) struct Directory {
    published: RwLock<(World, Head)>,
    head: watch::Sender<Head>,
    /// The newest frames, so that whoever follows closely need not read them from disk.
    recent: Mutex<VecDeque<Arc<Frame>>>,
}

/// Records that became durable together.
#[derive(Debug)]
pub(crate) struct Frame {
    /// By number, without gaps; never empty.
    pub(crate) records: Vec<(u64, Arc<Record>)>,
    /// The last of them.
    pub(crate) head: Head,
}

impl Directory {
    pub(crate) fn new(world: World, head: Head) -> Self {
        let recent = Mutex::default();
        Self { published: RwLock::new((world, head)), head: watch::Sender::new(head), recent }
    }

    /// Looks at World. The closure cannot wait, so the lock is never held across an await; and it must not
    /// look here again, nor take a lock under which somebody else looks here.
    pub(crate) fn read<T>(&self, look: impl FnOnce(&World) -> T) -> T {
        self.read_with_head(|world, _| look(world))
    }

    /// Looks at World together with the record it stands at.
    pub(crate) fn read_with_head<T>(&self, look: impl FnOnce(&World, Head) -> T) -> T {
        let published = self.published.read().unwrap_or_else(PoisonError::into_inner);
        look(&published.0, published.1)
    }

    /// The newest durable record.
    pub(crate) fn head(&self) -> Head {
        self.read_with_head(|_, head| head)
    }

    /// Changes whenever records have been published.
    pub(crate) fn watch(&self) -> watch::Receiver<Head> {
        self.head.subscribe()
    }

    /// The frames after record `seq`; `None` unless all of them are still in memory.
    pub(crate) fn recent(&self, seq: u64) -> Option<Vec<Arc<Frame>>> {
        let recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let first = recent.partition_point(|frame| frame.head.seq <= seq);
        let is_next = recent.get(first).is_some_and(|frame| frame.records[0].0 == seq + 1);
        is_next.then(|| recent.range(first..).cloned().collect())
    }

    /// Publishes records that are durable. Only the writer's thread calls this.
    pub(crate) fn publish(&self, records: Vec<(u64, Arc<Record>)>, head: Head) {
        {
            let mut published = self.published.write().unwrap_or_else(PoisonError::into_inner);
            for (seq, record) in &records {
                published.0.apply(*seq, record);
            }
            published.1 = head;
        }
        self.remember(records, head);
        self.head.send_replace(head);
    }

    fn remember(&self, records: Vec<(u64, Arc<Record>)>, head: Head) {
        if records.is_empty() {
            return;
        }
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        recent.push_back(Arc::new(Frame { records, head }));
        let too_old = |frame: &Arc<Frame>| frame.head.seq + RECENT_RECORDS_MAX as u64 <= head.seq;
        while recent.front().is_some_and(too_old) {
            recent.pop_front();
        }
    }
}

/// Waits for a change of what a receiver of [`Directory::watch`] watches, and `pause` more, so that many changes are one.
///
/// # Errors
/// The directory is gone.
pub(crate) async fn changed(
    head: &mut watch::Receiver<Head>,
    pause: Duration,
) -> Result<(), watch::error::RecvError> {
    head.changed().await?;
    tokio::time::sleep(pause).await;
    head.mark_unchanged();
    Ok(())
}
