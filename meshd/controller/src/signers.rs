//! The threads that check CSRs and sign: as many as there are cores, so that a burst of requests costs a queue and not a
//! crowd of threads that take turns.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use crate::status::Problem;

type Job = Box<dyn FnOnce() + Send>;

/// Hands work to the threads, which end with the last clone.
#[derive(Clone)]
pub(crate) struct Signers(Arc<Owner>);

struct Owner(Arc<Shared>);

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    /// Woken for each job while a thread waits.
    work: Condvar,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    idle: usize,
    closed: bool,
}

impl Signers {
    /// Starts `threads` threads.
    pub(crate) fn start(threads: usize) -> std::io::Result<Self> {
        let signers = Self(Arc::new(Owner(Arc::default())));
        for _ in 0..threads.max(1) {
            let shared = Arc::clone(&signers.0.0);
            std::thread::Builder::new().name("signer".into()).spawn(move || shared.work())?;
        }
        Ok(signers)
    }

    /// Queues work. Nobody hears of a panic in it but the log.
    pub(crate) fn spawn(&self, job: impl FnOnce() + Send + 'static) {
        let shared = &self.0.0;
        let mut queue = shared.lock();
        queue.jobs.push_back(Box::new(job));
        if queue.idle > 0 {
            shared.work.notify_one();
        }
    }

    /// Runs work and waits for it.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, Problem> + Send + 'static,
    ) -> Result<T, Problem> {
        let (answer, answered) = oneshot::channel();
        self.spawn(move || {
            // A caller that has gone needs no answer.
            let _ = answer.send(guarded(work));
        });
        answered.await.unwrap_or_else(|_| Err(Problem::stopping()))
    }
}

/// Runs work whose panic is its caller's internal error: it holds no lock that others trust.
pub(crate) fn guarded<T>(work: impl FnOnce() -> Result<T, Problem>) -> Result<T, Problem> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| Err(Problem::internal("preparation failed")))
}

impl Shared {
    fn work(&self) {
        while let Some(job) = self.next() {
            if catch_unwind(AssertUnwindSafe(job)).is_err() {
                tracing::error!("a signer's work panicked");
            }
        }
    }

    /// The oldest job; `None` once the last owner has gone.
    fn next(&self) -> Option<Job> {
        let mut queue = self.lock();
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                return Some(job);
            }
            if queue.closed {
                return None;
            }
            queue.idle += 1;
            queue = self.work.wait(queue).unwrap_or_else(PoisonError::into_inner);
            queue.idle -= 1;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.lock().closed = true;
        self.0.work.notify_all();
    }
}

impl std::fmt::Debug for Signers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Signers")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_is_its_callers_alone() {
        let signers = Signers::start(1).unwrap();
        assert!(signers.run(|| -> Result<(), _> { panic!("on purpose") }).await.is_err());
        assert_eq!(signers.run(|| Ok(7)).await.unwrap(), 7);
    }

    #[tokio::test]
    async fn work_that_waits_is_done_before_the_threads_end() {
        let signers = Signers::start(2).unwrap();
        let (sent, received) = std::sync::mpsc::channel();
        for number in 0..100 {
            let sent = sent.clone();
            signers.spawn(move || sent.send(number).unwrap());
        }
        drop((signers, sent));
        let mut all: Vec<i32> = received.iter().collect();
        all.sort_unstable();
        assert_eq!(all, (0..100).collect::<Vec<_>>());
    }
}
