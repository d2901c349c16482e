//! The published World: what is on disk, and nothing else. Everybody reads here; one thread writes.

use std::sync::{PoisonError, RwLock};

use mesh_core::{Record, World};
use mesh_store::Head;
use tokio::sync::watch;

/// World as of the newest durable record, and a way to hear of newer ones.
#[derive(Debug)]
pub(crate) struct Directory {
    published: RwLock<(World, Head)>,
    head: watch::Sender<Head>,
}

impl Directory {
    pub(crate) fn new(world: World, head: Head) -> Self {
        Self { published: RwLock::new((world, head)), head: watch::Sender::new(head) }
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

    /// Publishes records that are durable. Only the writer's thread calls this.
    pub(crate) fn publish<'a>(&self, records: impl IntoIterator<Item = (u64, &'a Record)>, head: Head) {
        {
            let mut published = self.published.write().unwrap_or_else(PoisonError::into_inner);
            for (seq, record) in records {
                published.0.apply(seq, record);
            }
            published.1 = head;
        }
        self.head.send_replace(head);
    }
}
