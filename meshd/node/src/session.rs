//! The life of a node that has an identity: its tasks, and their common end.

use std::sync::Arc;

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
        let ended = |what: &str| {
            Failure::new(
                ErrorCode::Internal,
                format!("{what} has ended unexpectedly"),
                "look at the daemon's log; this is a bug worth reporting",
            )
        };
        Err(tokio::select! {
            result = &mut self.network => match result {
                Ok(Ok(Ended::Reopen)) => return Ok(()),
                Ok(Ok(Ended::Stopped)) => ended("the network task"),
                Ok(Err(failure)) => failure,
                Err(error) => Failure::internal("the network task has crashed", &error),
            },
            Some(result) = self.others.join_next() => match result {
                Ok(()) => ended("a task"),
                Err(error) => Failure::internal("a task has crashed", &error),
            },
        })
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
