//! `meshctl status`: the fleet on a controller, the peers on a node.

mod fleet;
mod node;

use mesh_proto::v1::{self as pb, fleet_client::FleetClient, local_client::LocalClient};
use serde_json::{Value, json};

use crate::{
    app::{App, Watch, client},
    client::Role,
    error::{Exit, Result},
    output::{Tone, count, paint},
    text::{now, safe},
};

#[derive(Debug, clap::Args)]
pub(crate) struct Status {
    /// Exit 3 if anything needs attention
    #[arg(long)]
    check: bool,
    #[command(flatten)]
    watch: Watch,
}

impl Status {
    pub(crate) async fn run(self, app: &App) -> Result<Exit> {
        app.watch(&self.watch, || self.show(app)).await
    }

    async fn show(&self, app: &App) -> Result<Exit> {
        match app.places.status_role() {
            Role::Controller => self.fleet(app).await,
            Role::Node => self.node(app).await,
        }
    }

    async fn fleet(&self, app: &App) -> Result<Exit> {
        let mut app = app.clone();
        // On the controller's own machine its socket goes before the context file.
        app.places.controller = app.places.local_controller().or(app.places.controller);
        let status = app.ask(client!(FleetClient<_>, app.controller().await?).status(pb::Empty {})).await?;
        fleet::show(&app, &status, now());
        Ok(self.verdict(!status.findings.is_empty(), true))
    }

    async fn node(&self, app: &App) -> Result<Exit> {
        let status = app.ask_node(client!(LocalClient<_>, app.node().await?).status(pb::Empty {})).await?;
        node::show(app, &status, now());
        Ok(self.verdict(!status.findings.is_empty(), status.enrolled))
    }

    fn verdict(&self, findings: bool, enrolled: bool) -> Exit {
        match (self.check, enrolled, findings) {
            (true, false, _) => Exit::Denied,
            (true, true, true) => Exit::Findings,
            _ => Exit::Done,
        }
    }
}

/// `! 1 finding   db-2: certificate renews late (clock 14m behind)`, one line each.
pub(crate) fn findings(findings: &[pb::Finding]) -> Vec<String> {
    let head = format!("! {}", count(findings.len(), "finding"));
    findings
        .iter()
        .enumerate()
        .map(|(index, finding)| {
            let tone = if finding.severity == "bad" { Tone::Bad } else { Tone::Warn };
            let lead = if index == 0 { paint(tone, &head) } else { " ".repeat(head.len()) };
            let subject = if finding.subject.is_empty() {
                String::new()
            } else {
                format!("{}: ", safe(&finding.subject))
            };
            format!("{lead}   {subject}{}", safe(&finding.what))
        })
        .collect()
}

/// `next, on db-2: meshctl doctor`, each once.
pub(crate) fn next_steps(findings: &[pb::Finding]) -> Vec<String> {
    let mut steps: Vec<String> = Vec::new();
    for finding in findings.iter().filter(|finding| !finding.next.is_empty()) {
        let next = safe(&finding.next);
        let step = if next.starts_with("on ") { format!("next, {next}") } else { format!("next: {next}") };
        if !steps.contains(&step) {
            steps.push(step);
        }
    }
    steps
}

pub(crate) fn finding_documents(findings: &[pb::Finding]) -> Vec<Value> {
    findings
        .iter()
        .map(|finding| {
            json!({ "subject": finding.subject, "what": finding.what, "next": finding.next, "severity": finding.severity })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn check_turns_findings_into_exit_3() {
        let status = |check| Status { check, watch: Watch { watch: None } };
        assert_eq!(status(true).verdict(true, true), Exit::Findings);
        assert_eq!(status(true).verdict(false, true), Exit::Done);
        assert_eq!(status(true).verdict(false, false), Exit::Denied);
        assert_eq!(status(false).verdict(true, false), Exit::Done);
    }
}
