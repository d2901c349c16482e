//! `meshctl doctor`: everything that could be wrong with this node, or would be after an outage.

mod outage;

use mesh_proto::v1::{self as pb, local_client::LocalClient};
use serde_json::json;

use crate::{
    app::{App, client},
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
        let report = app.ask_node(client!(LocalClient<_>, app.node().await?).doctor(pb::Empty {})).await?;
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

fn lines(report: &pb::DoctorReport, all: bool) -> Vec<String> {
    let mut lines = findings(&report.findings);
    if all {
        lines.extend(
            report.passed.iter().map(|check| format!("{}  {}", paint(Tone::Good, "ok"), safe(check))),
        );
    }
    if report.findings.is_empty() {
        lines.push(format!("all {} passed", count(report.checks as usize, "check")));
    }
    lines.extend(next_steps(&report.findings));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

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
    }
}
