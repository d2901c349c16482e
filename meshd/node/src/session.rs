//! The life of a node that has an identity: its tasks, and their common end.

use std::sync::Arc;
use std::time::Duration;

use mesh_proto::v1::ErrorCode;
use tokio::task::{JoinHandle, JoinSet};

use crate::certs::{self, Manager, PairsHandle};
use crate::failure::Failure;
use crate::firewall::TABLE_NAME;
use crate::hostop::{Changes, Host};
use crate::identity::Identities;
use crate::network::{Ended, NetworkHandle, Setup, Underlay, Worker};
use crate::run::Node;
use crate::uplink::{Uplink, UplinkHandle};

/// What the network task needs at most from the close of its channels to its end.
const NETWORK_ENDS: Duration = Duration::from_secs(10);

/// What the local socket needs of a running node.
pub(crate) struct Session {
    pub(crate) identities: Arc<Identities>,
    pub(crate) network: NetworkHandle,
    pub(crate) uplink: UplinkHandle,
    pub(crate) pairs: PairsHandle,
}

/// The tasks behind a [`Session`].
pub(crate) struct Running {
    pub(crate) session: Arc<Session>,
    network: JoinHandle<Result<Ended, Failure>>,
    others: JoinSet<()>,
}

impl Running {
    /// Brings the overlay up from what is on disk, then lets everything else begin.
    ///
    /// # Errors
    /// The overlay cannot be brought up.
    pub(crate) async fn start(node: &Arc<Node>, identities: Arc<Identities>) -> Result<Self, Failure> {
        let config = &node.config;
        let (host, changes) = (Host::open()?, Changes::listen(TABLE_NAME));
        let setup = Setup {
            host: host.clone(),
            changes: changes.clone(),
            state: node.state.clone(),
            clock: node.clock.clone(),
            findings: node.findings.clone(),
            interface: config.interface.clone(),
            mtu: config.mtu,
            wg_port: config.wg_port,
            backend: config.backend,
            active: identities.active(),
        };
        let (network, worker) = Worker::start(setup).await?;
        let (pairs, pairs_inbox, settled) = certs::wire();
        let (uplink, uplink_task) = Uplink::new(
            node.state.clone(),
            node.clock.clone(),
            node.findings.clone(),
            identities.clone(),
            network.clone(),
            pairs.clone(),
            (host.clone(), changes.network.clone()),
        );
        let manager = Manager {
            state: node.state.clone(),
            clock: node.clock.clone(),
            findings: node.findings.clone(),
            host,
            identities: identities.clone(),
            network: network.clone(),
            uplink: uplink.clone(),
            certs_dir: config.certs_dir.clone(),
            inbox: pairs_inbox,
            settled,
        };
        let underlay = Underlay::new(
            (worker.tunnel(), worker.shares_port()),
            network.clone(),
            uplink.clone(),
            (changes.network.clone(), config.endpoints.clone()),
        );
        let mut others = JoinSet::new();
        others.spawn(underlay.run());
        let network_task = tokio::spawn(worker.run());
        others.spawn(uplink_task.run());
        others.spawn(identities.clone().keep_renewed(
            uplink.channel.clone(),
            network.own.clone(),
            network.settled_key.clone(),
        ));
        others.spawn(follow_identity(identities.clone(), network.clone()));
        others.spawn(manager.run());
        let session = Arc::new(Session { identities, network, uplink, pairs });
        Ok(Self { session, network: network_task, others })
    }

    /// Waits until a task that must not end has ended: `Ok` if all are to begin anew.
    ///
    /// # Errors
    /// Why it has ended.
    pub(crate) async fn broken(&mut self) -> Result<(), Failure> {
        first_end(&mut self.network, &mut self.others).await
    }

    /// Ends what is left after the network task has.
    pub(crate) async fn let_go(mut self) {
        self.others.shutdown().await;
    }

    /// Ends all tasks. With `forget` the host is left as it was before enrollment.
    pub(crate) async fn stop(mut self, forget: bool) {
        if forget {
            self.session.pairs.forget().await;
        }
        self.others.shutdown().await;
        self.session.network.stop(forget).await;
        if let Err(error) = self.network.await {
            tracing::warn!(%error, "network task ended badly");
        }
    }
}

/// Waits for the first task to end, and says why all must.
async fn first_end(
    network: &mut JoinHandle<Result<Ended, Failure>>,
    others: &mut JoinSet<()>,
) -> Result<(), Failure> {
    let ended = |what: &str| {
        Failure::new(
            ErrorCode::Internal,
            format!("{what} has ended unexpectedly"),
            "look at the daemon's log; this is a bug worth reporting",
        )
    };
    let network_ended = |result| match result {
        Ok(Ok(Ended::Reopen)) => Ok(()),
        Ok(Ok(Ended::Stopped)) => Err(ended("the network task")),
        Ok(Err(failure)) => Err(failure),
        Err(error) => Err(Failure::internal("the network task has crashed", &error)),
    };
    let other = tokio::select! {
        result = &mut *network => return network_ended(result),
        Some(result) = others.join_next() => result,
    };
    if let Err(error) = other {
        return Err(Failure::internal("a task has crashed", &error));
    }
    // The others end when the network's channels close, a moment before the network task itself is over.
    match tokio::time::timeout(NETWORK_ENDS, network).await {
        Ok(result) => network_ended(result),
        Err(_) => Err(ended("a task")),
    }
}

/// Hands new WireGuard keys to the tunnel as soon as their certificate is here: peers have it at the same time.
async fn follow_identity(identities: Arc<Identities>, network: NetworkHandle) {
    let mut active = identities.subscribe();
    while active.changed().await.is_ok() {
        let current = active.borrow_and_update().clone();
        if network.rekey(current).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_ends_because_the_network_does_is_not_the_cause() {
        let (end, ends) = tokio::sync::oneshot::channel();
        let mut network = tokio::spawn(async move {
            ends.await.unwrap();
            Ok(Ended::Reopen)
        });
        let mut others = JoinSet::new();
        others.spawn(async {});
        let ending = async {
            // The other task is over long before.
            for _ in 0..100 {
                tokio::task::yield_now().await;
            }
            end.send(()).unwrap();
        };
        let (result, ()) = tokio::join!(first_end(&mut network, &mut others), ending);
        assert!(result.is_ok(), "{:?}", result.map_err(|failure| failure.why));
    }
}
