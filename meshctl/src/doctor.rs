//! `meshctl doctor`: everything that could be wrong with this node or, on the controller, with the fleet, or would be
//! after an outage.

mod outage;

use mesh_proto::v1::{self as pb, fleet_client::FleetClient, local_client::LocalClient};
use serde_json::json;

use crate::{
    app::{App, client},
    client::Role,
    error::{Exit, Result},
    output::{Tone, count, paint},
    status::{finding_documents, findings, next_steps},
    text::{Span, safe},
};

#[derive(Debug, clap::Args)]
pub(crate) struct Doctor {
    /// Ask the controller instead: whose certificate would end if it were away for TIME from now
    #[arg(long, value_name = "TIME")]
    outage: Option<Span>,
}

impl Doctor {
    pub(crate) async fn run(self, app: &App) -> Result<Exit> {
        if let Some(outage) = self.outage {
            return outage::run(app, outage).await;
        }
        let report = match app.places.status_role() {
            Role::Node => {
                app.ask_node(client!(LocalClient<_>, app.node().await?).doctor(pb::Empty {})).await?
            }
            Role::Controller => fleet(app).await?,
        };
        if app.out.is_json() {
            app.out.document(
                "DoctorReport",
                &json!({
                    "checks": report.checks, "passed": report.passed, "findings": finding_documents(&report.findings),
                }),
            );
        } else {
            lines(&report, app.out.verbose || app.out.is_wide()).iter().for_each(|line| app.out.line(line));
        }
        Ok(if report.findings.is_empty() { Exit::Done } else { Exit::Findings })
    }
}

/// What the controller finds wrong, as a report: it looks at each node and at itself.
async fn fleet(app: &App) -> Result<pb::DoctorReport> {
    let mut app = app.clone();
    // As `status` does.
    app.places.controller = app.places.local_controller().or(app.places.controller);
    let status = app.ask(client!(FleetClient<_>, app.controller().await?).status(pb::Empty {})).await?;
    Ok(fleet_report(status))
}

fn fleet_report(status: pb::FleetStatus) -> pb::DoctorReport {
    let mut passed: Vec<String> = vec![];
    let subjects: Vec<&str> = status.findings.iter().map(|finding| finding.subject.as_str()).collect();
    for name in status.nodes.iter().map(|node| &node.name).chain([&status.controller]) {
        if !subjects.contains(&name.as_str()) {
            passed.push(name.clone());
        }
    }
    let checks = u32::try_from(status.nodes.len() + 1).unwrap_or(u32::MAX);
    pb::DoctorReport { checks, passed, findings: status.findings }
}

fn lines(report: &pb::DoctorReport, all: bool) -> Vec<String> {
    let mut lines = findings(&report.findings);
    if all {
        lines.extend(
            report.passed.iter().map(|check| format!("{}  {}", paint(Tone::Good, "ok"), safe(check))),
        );
    }
    if report.findings.is_empty() {
        let checks = count(report.checks as usize, "check");
        lines.push(if report.checks == 1 {
            format!("{checks} passed")
        } else {
            format!("all {checks} passed")
        });
    }
    lines.extend(next_steps(&report.findings));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_controllers_report_is_of_itself_and_each_node() {
        let node = |name: &str| pb::Node { name: name.into(), ..pb::Node::default() };
        let finding = pb::Finding {
            subject: "ctl-1".into(),
            what: "the issuing CA has less than 20 % of its life left".into(),
            next: "meshctl ca rotate start".into(),
            severity: "warn".into(),
        };
        let status = pb::FleetStatus {
            controller: "ctl-1".into(),
            nodes: vec![node("alpha"), node("bravo")],
            findings: vec![finding],
            ..pb::FleetStatus::default()
        };
        let report = fleet_report(status);
        assert_eq!(
            (report.checks, report.passed.as_slice()),
            (3, &["alpha".to_owned(), "bravo".to_owned()][..])
        );
        let text = lines(&report, false).join("\n");
        assert!(text.contains("less than 20 %") && text.contains("meshctl ca rotate start"), "{text}");
    }

    #[test]
    fn a_report_has_findings_and_what_is_next_or_says_that_all_is_well() {
        let finding = |what: &str| pb::Finding {
            subject: "clock".into(),
            what: what.into(),
            next: "start a time service".into(),
            severity: "bad".into(),
        };
        let report = pb::DoctorReport {
            findings: vec![finding("14m behind"), finding("not synchronised")],
            checks: 9,
            passed: vec!["tun".into()],
        };
        let text = anstream::adapter::strip_str(&lines(&report, true).join("\n")).to_string();
        insta::assert_snapshot!(text, @r"
        ! 2 findings   clock: 14m behind
                       clock: not synchronised
        ok  tun
        next: start a time service
        ");
        let fine = pb::DoctorReport { checks: 9, ..pb::DoctorReport::default() };
        assert_eq!(lines(&fine, false), ["all 9 checks passed"]);
        let one = pb::DoctorReport { checks: 1, ..pb::DoctorReport::default() };
        assert_eq!(lines(&one, false), ["1 check passed"]);
    }
}
