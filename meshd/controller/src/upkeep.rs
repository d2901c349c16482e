//! What is looked at again and again: CRLs that age, delegates that end.

use std::time::Duration;

use mesh_runtime::{Backoff, ShutdownToken};
use mesh_store::Head;
use tokio::sync::watch;

use crate::directory;
use crate::limits::FOLLOW_PAUSE;
use crate::status::Problem;

/// How often somebody looks, when nothing changes.
const CHECK_INTERVAL: Duration = Duration::from_secs(60);

/// Refreshes at once, every minute and, if `head` is given, after changes, until shutdown. A failure is logged as `what` and
/// tried again with back-off.
pub(crate) async fn keep_fresh<F: Future<Output = Result<(), Problem>>>(
    what: &'static str,
    refresh: impl Fn() -> F,
    mut head: Option<watch::Receiver<Head>>,
    shutdown: ShutdownToken,
) {
    let mut backoff = Backoff::new(Duration::from_secs(1), CHECK_INTERVAL);
    loop {
        let wait = match refresh().await {
            Ok(()) => {
                backoff.reset();
                CHECK_INTERVAL
            }
            Err(problem) => {
                tracing::error!(why = problem.why, "{what}; trying again");
                backoff.next_wait()
            }
        };
        let failing = backoff.attempts() > 0;
        let changed = async {
            match head.as_mut().filter(|_| !failing) {
                Some(head) => directory::changed(head, FOLLOW_PAUSE).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(wait) => {}
            changed = changed => if changed.is_err() { return },
        }
    }
}
