//! Certificates for the services on this host: declared or asked for, issued, renewed, written, announced.

mod declared;
mod definition;
mod issue;
mod live;
mod manager;
mod record;

use mesh_proto::v1 as pb;
use tokio::sync::{mpsc, oneshot, watch};

use crate::failure::Failure;
use crate::limits::COMMAND_QUEUE;
use crate::network::Gone;

pub(crate) use definition::Definition;
pub(crate) use manager::Manager;

/// What the other tasks ask of the pairs.
pub(crate) enum Command {
    Issue {
        definition: Box<Definition>,
        reply: Answer,
    },
    Renew {
        name: String,
        reply: Answer,
    },
    List(oneshot::Sender<Vec<pb::ManagedPair>>),
    /// Writes the newest CRLs into all folders.
    WriteCrls(oneshot::Sender<()>),
    /// Forgets all pairs; their files stay until they expire.
    Forget(oneshot::Sender<()>),
}

pub(crate) type Answer = oneshot::Sender<Result<pb::ManagedPair, Failure>>;

/// The pairs as other tasks see them. Clones speak to the same task.
#[derive(Debug, Clone)]
pub(crate) struct PairsHandle {
    commands: mpsc::Sender<Command>,
    /// The bundle that all services have; 0 while some have not.
    pub(crate) settled: watch::Receiver<u64>,
}

/// A handle and the ends that belong to it.
pub(crate) fn wire() -> (PairsHandle, mpsc::Receiver<Command>, watch::Sender<u64>) {
    let (commands, inbox) = mpsc::channel(COMMAND_QUEUE);
    let (settled, told) = watch::channel(0);
    (PairsHandle { commands, settled: told }, inbox, settled)
}

impl PairsHandle {
    /// Issues a pair, or finds that it is as asked for. Returns once it is written and its hook has run.
    pub(crate) async fn issue(&self, definition: Definition) -> Result<pb::ManagedPair, Failure> {
        let definition = Box::new(definition);
        self.ask(|reply| Command::Issue { definition, reply }).await?
    }

    pub(crate) async fn renew(&self, name: String) -> Result<pb::ManagedPair, Failure> {
        self.ask(|reply| Command::Renew { name, reply }).await?
    }

    pub(crate) async fn list(&self) -> Result<Vec<pb::ManagedPair>, Gone> {
        self.ask(Command::List).await
    }

    pub(crate) async fn write_crls(&self) -> Result<(), Gone> {
        self.ask(Command::WriteCrls).await
    }

    pub(crate) async fn forget(&self) {
        // A task that is gone has nothing to forget.
        let _ = self.ask(Command::Forget).await;
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, Gone> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.map_err(|_| Gone)?;
        answer.await.map_err(|_| Gone)
    }
}
