//! `meshctl operator`: the people who may use this controller.

use mesh_proto::v1::{self as pb, operators_client::OperatorsClient};
use serde_json::{Value, json};

use crate::{
    app::{App, client, operation_id},
    cli::List,
    error::{Exit, Result},
    output::{Listing, Table},
    text::{ago, left, now, rfc3339, safe},
};

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Add an operator and print the one-time token for `meshctl login`
    Add(Add),
    /// List operators
    Ls(List),
    /// Remove an operator and revoke their certificate
    Rm(Remove),
}

#[derive(Debug, clap::Args)]
pub(crate) struct Add {
    /// The operator's name
    name: String,
    /// What they may do: admin everything, operator all but operators and CA, enroller tokens, auditor read
    #[arg(long, value_parser = ["admin", "operator", "enroller", "auditor"])]
    role: String,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Remove {
    /// The operator's name
    name: String,
}

impl Command {
    pub(crate) async fn run(self, app: &App) -> Result<Exit> {
        match self {
            Self::Add(add) => add.run(app).await,
            Self::Ls(list) => app.watch(&list.watch, || list_operators(app)).await,
            Self::Rm(remove) => remove.run(app).await,
        }
    }
}

impl Add {
    async fn run(self, app: &App) -> Result<Exit> {
        let request = pb::AddOperatorRequest {
            name: self.name.clone(),
            role: self.role.clone(),
            operation_id: operation_id(),
        };
        let answer = app.ask(client!(OperatorsClient<_>, app.controller().await?).add(request)).await?;
        if app.out.is_json() {
            let body =
                json!({ "name": self.name, "role": self.role, "token": answer.token, "changed": true });
            app.out.document("Operator", &body);
        } else {
            app.out.line(&answer.token);
            app.out.note(&format!(
                "one-time token of {} {}; on their machine: meshctl login https://CONTROLLER -",
                self.role,
                safe(&self.name)
            ));
        }
        Ok(Exit::Done)
    }
}

async fn list_operators(app: &App) -> Result<Exit> {
    let answer = app.ask(client!(OperatorsClient<_>, app.controller().await?).list(pb::Empty {})).await?;
    app.out.listing(&listing(&answer.operators, now()));
    Ok(Exit::Done)
}

fn listing(operators: &[pb::Operator], now: i64) -> Listing {
    let mut table = Table::new(&["OPERATOR", "ROLE", "ADDED", "CERT"]);
    for operator in operators {
        let certificate = match operator.not_after {
            0 => "not logged in yet".to_owned(),
            at => left(at, now),
        };
        table.row([operator.name.clone(), operator.role.clone(), ago(operator.added_at, now), certificate]);
    }
    Listing {
        kind: "OperatorList",
        items: operators.iter().map(document).collect(),
        names: operators.iter().map(|operator| operator.name.clone()).collect(),
        table,
        empty: "no operators; root on the controller may do everything without",
    }
}

fn document(operator: &pb::Operator) -> Value {
    json!({
        "name": operator.name, "role": operator.role, "addedAt": rfc3339(operator.added_at),
        "notAfter": rfc3339(operator.not_after), "serial": hex::encode(&operator.serial),
    })
}

impl Remove {
    async fn run(self, app: &App) -> Result<Exit> {
        app.confirm(&format!("remove operator {}?", self.name))?;
        let request = pb::RemoveOperatorRequest { name: self.name.clone(), operation_id: operation_id() };
        let answer = app.ask(client!(OperatorsClient<_>, app.controller().await?).remove(request)).await?;
        let line = if answer.changed { "removed, certificate revoked" } else { "was removed already" };
        let body = json!({ "name": self.name, "detail": answer.detail });
        app.out.action(
            "OperatorRemoval",
            answer.changed,
            body,
            &self.name,
            &[format!("operator {} {line}", safe(&self.name))],
        );
        Ok(Exit::Done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operators_are_listed_with_the_life_of_their_certificate() {
        let now = 1_800_000_000;
        let operator = |name: &str, not_after| pb::Operator {
            name: name.into(),
            role: "admin".into(),
            added_at: now - 7200,
            not_after,
            serial: vec![1; 16].into(),
        };
        let listing = listing(&[operator("alice", now + 3600 * 20), operator("bob", 0)], now);
        let text = anstream::adapter::strip_str(&listing.table.lines().join("\n")).to_string();
        insta::assert_snapshot!(text, @r"
        OPERATOR  ROLE   ADDED   CERT
        alice     admin  2h ago  20h
        bob       admin  2h ago  not logged in yet
        ");
    }
}
