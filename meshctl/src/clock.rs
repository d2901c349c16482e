//! `meshctl clock`: the controller's clock, when it had to be doubted.

use mesh_proto::v1::{self as pb, fleet_client::FleetClient};
use serde_json::json;

use crate::{
    app::{App, client, operation_id},
    error::{Exit, Result},
};

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Say that the controller's clock is right after it jumped; what waits for the time goes on
    Confirm,
}

impl Command {
    pub(crate) async fn run(self, app: &App) -> Result<Exit> {
        let Self::Confirm = self;
        let request = pb::ConfirmClockRequest { operation_id: operation_id() };
        let answer = app.ask(client!(FleetClient<_>, app.controller().await?).confirm_clock(request)).await?;
        let body = json!({ "detail": answer.detail });
        app.out.action(
            "ClockConfirmation",
            answer.changed,
            body,
            "controller",
            &[crate::text::safe(&answer.detail).into_owned()],
        );
        Ok(Exit::Done)
    }
}
