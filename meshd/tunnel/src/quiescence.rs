//! Lets a control call wait until a carrier has finished the batch it is in.
//!
//! That thread holds no lock while it writes to the interface, so a removed peer's packet that is
//! already decrypted could still be on its way. `wait` returns when no such packet is left.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

/// The thread's batch counter: odd while it is inside a batch.
#[derive(Debug, Default)]
pub(crate) struct Quiescence(AtomicU64);

/// A batch in progress; ends when dropped, also by a panic.
#[derive(Debug)]
pub(crate) struct Batch<'a>(&'a Quiescence);

impl Quiescence {
    /// Only the owning thread may call this, and not while a batch of its own is alive.
    pub(crate) fn begin(&self) -> Batch<'_> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Batch(self)
    }

    /// Returns once every batch that was running at the call has ended. Batches are short and never
    /// block, so this takes a millisecond or two at most.
    pub(crate) fn wait(&self) {
        let seen = self.0.load(Ordering::SeqCst);
        let mut spins = 0_u32;
        while seen % 2 == 1 && self.0.load(Ordering::SeqCst) == seen {
            spins += 1;
            if spins < 64 { thread::yield_now() } else { thread::sleep(Duration::from_micros(50)) }
        }
    }
}

impl Drop for Batch<'_> {
    fn drop(&mut self) {
        self.0.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;

    #[test]
    fn waiting_outlasts_the_batch_that_was_running() {
        let (quiescence, done) = (Arc::new(Quiescence::default()), Arc::new(AtomicBool::new(false)));
        let (started, wait_for_start) = std::sync::mpsc::channel();
        let worker = thread::spawn({
            let (quiescence, done) = (quiescence.clone(), done.clone());
            move || {
                let batch = quiescence.begin();
                started.send(()).unwrap();
                for _ in 0..1000 {
                    thread::yield_now();
                }
                done.store(true, Ordering::SeqCst);
                drop(batch);
                let _next = quiescence.begin();
            }
        });
        wait_for_start.recv().unwrap();
        quiescence.wait();
        assert!(done.load(Ordering::SeqCst));
        worker.join().unwrap();
        quiescence.wait();
    }
}
