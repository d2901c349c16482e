//! One thin file per gRPC service: who, what, do, answer.

pub(crate) mod audit;
pub(crate) mod ca;
pub(crate) mod certificates;
pub(crate) mod enrollment;
pub(crate) mod fleet;
pub(crate) mod messages;
pub(crate) mod nodes;
pub(crate) mod operators;
pub(crate) mod policy;
pub(crate) mod relay;
pub(crate) mod renewal;
pub(crate) mod sync;
pub(crate) mod tokens;

use std::time::Duration;

use mesh_core::{Actor, Command, CommandKind, OperationId, Request, UtcTime};

use crate::auth::Caller;
use crate::config::Passphrase;
use crate::limits::LONE_PASSPHRASE_BYTES_MIN;
use crate::parts::Parts;
use crate::status::Problem;
use crate::writer::Committed;

/// The operation's id: the caller's, which makes a repetition safe, or one of ours when it sent none.
pub(crate) fn operation(bytes: &[u8]) -> Result<OperationId, Problem> {
    if bytes.is_empty() {
        return Ok(OperationId(mesh_runtime::random_bytes()));
    }
    OperationId::try_from(bytes).map_err(|error| Problem::usage(error.to_string()))
}

/// The caller as an actor; the table has let in only those that are one.
pub(crate) fn actor(caller: &Caller) -> Result<Actor, Problem> {
    caller.actor().ok_or_else(|| Problem::denied(&caller.describe(), "this"))
}

/// A passphrase that is all that protects `what`, once it has left this machine.
///
/// # Errors
/// One that is too short.
pub(crate) fn lone_passphrase(passphrase: String, what: &str) -> Result<Passphrase, Problem> {
    let passphrase = Passphrase::new(passphrase);
    if passphrase.as_bytes().len() < LONE_PASSPHRASE_BYTES_MIN {
        return Err(Problem::usage(format!(
            "the passphrase of {what} has at least {LONE_PASSPHRASE_BYTES_MIN} characters"
        )));
    }
    Ok(passphrase)
}

fn seconds(duration: u32) -> Duration {
    Duration::from_secs(duration.into())
}

impl Parts {
    pub(crate) fn utc(&self) -> UtcTime {
        self.clock.utc_now().into()
    }

    /// Runs a command of `caller`.
    async fn submit(
        &self,
        caller: &Caller,
        operation: OperationId,
        command: Command,
    ) -> Result<Committed, Problem> {
        let actor = actor(caller)?;
        let kind = command.kind();
        let outcome = self.writer.submit(Request { actor, operation, command }).await;
        Ok(outcome.inspect_err(|error| self.note_denial(caller, kind, error))?)
    }

    fn note_denial(&self, caller: &Caller, kind: CommandKind, error: &crate::writer::WriteError) {
        if let crate::writer::WriteError::Refused(mesh_core::Refusal::Denied { .. }) = error {
            self.denials.note(caller, kind.action(), &error.to_string(), self.utc());
        }
    }
}
