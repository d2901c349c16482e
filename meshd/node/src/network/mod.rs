//! The one task that owns roster, tunnel, firewall and routes. All others send it what they learned.

mod backend;
mod endpoints;
mod engine;
mod lease;
mod overlay;
mod probe;
mod status;
mod stored;
mod underlay;
mod worker;

use std::sync::Arc;

use mesh_ca::{RevocationLists, TrustAnchors};
use mesh_proto::v1 as pb;
use tokio::sync::{mpsc, oneshot, watch};

use crate::failure::Failure;
use crate::identity::Active;
use crate::limits::COMMAND_QUEUE;
use crate::roster::RosterError;

pub(crate) use engine::{Choice, KERNEL_LACKS};
pub(crate) use probe::Quality;
pub(crate) use status::{Inspection, NetworkStatus, PeerView};
pub(crate) use underlay::{Underlay, UnderlayNews};
pub(crate) use worker::{Ended, Setup, Worker};

/// What the other tasks ask of the network.
pub(crate) enum Command {
    Map {
        update: Box<Update>,
        reply: oneshot::Sender<Result<(), RosterError>>,
    },
    Crls {
        crls: Vec<pb::Crl>,
        reply: oneshot::Sender<()>,
    },
    Hints(pb::Hints),
    Underlay(UnderlayNews),
    Rekey(Arc<Active>),
    /// Sends the peer a handshake now.
    Greet(u32),
    /// The peer asks for us by the relay.
    Knock(u32),
    Knowledge(oneshot::Sender<Knowledge>),
    Status(oneshot::Sender<NetworkStatus>),
    Inspect(oneshot::Sender<Inspection>),
    /// Ends the task; with `forget` also routes and table are taken away.
    Stop {
        forget: bool,
        reply: oneshot::Sender<()>,
    },
}

/// A map as the controller sends it.
pub(crate) enum Update {
    /// With the identity that holds the roots it came with.
    Full(pb::Full, Arc<Active>),
    Delta(pb::Delta),
}

/// What this node has, for `Hello`.
#[derive(Debug, Clone, Default)]
pub(crate) struct Knowledge {
    /// `None` as well while the map is not on disk: a controller takes it for a receipt.
    pub(crate) cursor: Option<pb::Cursor>,
    /// In effect, on disk or not; [`Receipt::crls`] are those on disk.
    pub(crate) crls: Vec<pb::CrlHave>,
    pub(crate) backend: String,
    pub(crate) wireguard_port: u16,
}

/// What is on disk and in effect: all that may be acknowledged.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Receipt {
    /// Of the map; 0 if no map of this journal could be stored.
    pub(crate) seq: u64,
    pub(crate) crls: Vec<pb::CrlHave>,
}

/// Whom a TLS client of this node believes.
#[derive(Debug, Clone)]
pub(crate) struct Belief {
    pub(crate) anchors: Arc<TrustAnchors>,
    pub(crate) revocation: Option<Arc<RevocationLists>>,
}

/// The network as other tasks see it. Clones speak to the same task.
#[derive(Debug, Clone)]
pub(crate) struct NetworkHandle {
    commands: mpsc::Sender<Command>,
    pub(crate) belief: watch::Receiver<Belief>,
    /// What the map says about this node itself.
    pub(crate) own: watch::Receiver<pb::Own>,
    /// The newest CRLs.
    pub(crate) crls: watch::Receiver<Arc<Vec<pb::Crl>>>,
    /// Where this node can be reached.
    pub(crate) endpoints: watch::Receiver<Vec<pb::Endpoint>>,
    /// Where this node sees peers that nobody has told it of.
    pub(crate) seen: watch::Receiver<Vec<pb::sync_request::Seen>>,
    /// What the controller offers besides its gRPC port.
    pub(crate) offer: watch::Receiver<pb::hints::Underlay>,
    /// Changes whenever a peer falls silent.
    pub(crate) silence: watch::Receiver<u64>,
    /// Peers without a session that are to hear of us by the relay; an engine that can use it asks by itself.
    pub(crate) unreached: watch::Receiver<Vec<u32>>,
    pub(crate) receipt: watch::Receiver<Receipt>,
    /// The WireGuard key in sole use: the one of the tunnel when no change of keys is under way.
    pub(crate) settled_key: watch::Receiver<Option<[u8; 32]>>,
}

/// The ends of [`NetworkHandle`] that the worker holds.
pub(crate) struct Outlets {
    pub(crate) belief: watch::Sender<Belief>,
    pub(crate) own: watch::Sender<pb::Own>,
    pub(crate) crls: watch::Sender<Arc<Vec<pb::Crl>>>,
    pub(crate) endpoints: watch::Sender<Vec<pb::Endpoint>>,
    pub(crate) seen: watch::Sender<Vec<pb::sync_request::Seen>>,
    pub(crate) offer: watch::Sender<pb::hints::Underlay>,
    pub(crate) silence: watch::Sender<u64>,
    pub(crate) unreached: watch::Sender<Vec<u32>>,
    pub(crate) receipt: watch::Sender<Receipt>,
    pub(crate) settled_key: watch::Sender<Option<[u8; 32]>>,
}

fn wire(belief: Belief) -> (NetworkHandle, mpsc::Receiver<Command>, Outlets) {
    let (commands, inbox) = mpsc::channel(COMMAND_QUEUE);
    let outlets = Outlets {
        belief: watch::Sender::new(belief),
        own: watch::Sender::new(pb::Own::default()),
        crls: watch::Sender::new(Arc::default()),
        endpoints: watch::Sender::new(Vec::new()),
        seen: watch::Sender::new(Vec::new()),
        offer: watch::Sender::new(pb::hints::Underlay::default()),
        silence: watch::Sender::new(0),
        unreached: watch::Sender::new(Vec::new()),
        receipt: watch::Sender::new(Receipt::default()),
        settled_key: watch::Sender::new(None),
    };
    let handle = NetworkHandle {
        commands,
        belief: outlets.belief.subscribe(),
        own: outlets.own.subscribe(),
        crls: outlets.crls.subscribe(),
        endpoints: outlets.endpoints.subscribe(),
        seen: outlets.seen.subscribe(),
        offer: outlets.offer.subscribe(),
        silence: outlets.silence.subscribe(),
        unreached: outlets.unreached.subscribe(),
        receipt: outlets.receipt.subscribe(),
        settled_key: outlets.settled_key.subscribe(),
    };
    (handle, inbox, outlets)
}

/// The network task has ended.
#[derive(Debug, thiserror::Error)]
#[error("the network is shut down")]
pub(crate) struct Gone;

impl From<Gone> for Failure {
    fn from(gone: Gone) -> Self {
        Failure::new(
            mesh_proto::v1::ErrorCode::DaemonUnreachable,
            gone.to_string(),
            "wait until meshd runs again; its log says why it stopped",
        )
    }
}

impl NetworkHandle {
    /// Applies a map; when this returns, it has taken effect. The receipt says whether it is on disk.
    pub(crate) async fn apply(&self, update: Update) -> Result<Result<(), RosterError>, Gone> {
        let update = Box::new(update);
        self.ask(|reply| Command::Map { update, reply }).await
    }

    /// Takes CRLs; when this returns, they are in effect. The receipt says whether they are on disk.
    pub(crate) async fn take_crls(&self, crls: Vec<pb::Crl>) -> Result<(), Gone> {
        self.ask(|reply| Command::Crls { crls, reply }).await
    }

    pub(crate) async fn hints(&self, hints: pb::Hints) -> Result<(), Gone> {
        self.commands.send(Command::Hints(hints)).await.map_err(|_| Gone)
    }

    pub(crate) async fn underlay(&self, news: UnderlayNews) -> Result<(), Gone> {
        self.commands.send(Command::Underlay(news)).await.map_err(|_| Gone)
    }

    pub(crate) async fn rekey(&self, active: Arc<Active>) -> Result<(), Gone> {
        self.commands.send(Command::Rekey(active)).await.map_err(|_| Gone)
    }

    pub(crate) async fn greet(&self, peer: u32) -> Result<(), Gone> {
        self.commands.send(Command::Greet(peer)).await.map_err(|_| Gone)
    }

    pub(crate) async fn knock(&self, peer: u32) -> Result<(), Gone> {
        self.commands.send(Command::Knock(peer)).await.map_err(|_| Gone)
    }

    pub(crate) async fn knowledge(&self) -> Result<Knowledge, Gone> {
        self.ask(Command::Knowledge).await
    }

    pub(crate) async fn status(&self) -> Result<NetworkStatus, Gone> {
        self.ask(Command::Status).await
    }

    /// Looks at the host itself, not at what is remembered of it.
    pub(crate) async fn inspect(&self) -> Result<Inspection, Gone> {
        self.ask(Command::Inspect).await
    }

    pub(crate) async fn stop(&self, forget: bool) {
        // If the task is gone, it has stopped.
        let _ = self.ask(|reply| Command::Stop { forget, reply }).await;
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, Gone> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.map_err(|_| Gone)?;
        answer.await.map_err(|_| Gone)
    }
}

/// A network nobody runs: what stands in the outlets is all it says.
#[cfg(test)]
pub(crate) fn detached(trust: &crate::pki::Trust) -> (NetworkHandle, Outlets) {
    let belief = Belief { anchors: trust.anchors(), revocation: trust.revocation() };
    let (handle, _inbox, outlets) = wire(belief);
    (handle, outlets)
}
