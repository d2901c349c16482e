//! `meshctl ca rotate`: one authority takes the place of another, step by step.

use std::path::PathBuf;

use mesh_ca::CaKeyType;
use mesh_proto::v1::{self as pb, ca_client::CaClient};
use serde_json::{Value, json};

use super::ceremony;
use crate::{
    app::{App, client, operation_id},
    error::{Exit, Failure, Result},
    text::{ago, left, now, rfc3339, safe},
};

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Announce a new issuing CA to everybody, or a new root and issuing CA
    Start(Start),
    /// Where the rotation stands and what it waits for
    Status,
    /// Take the next step: issue by the new CA, then drop the old one
    Advance,
    /// Go back to the old CA
    Abort,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Start {
    /// Replace the root, and the issuing CA with it
    #[arg(long)]
    root: bool,
    /// Let the controller take each step by itself once it may
    #[arg(long)]
    auto: bool,
    /// For an offline root: write a request to this file, and start nothing yet
    #[arg(long, value_name = "FILE", conflicts_with_all = ["root", "auto", "response"])]
    request_out: Option<PathBuf>,
    /// For an offline root: the answer of `meshctl ca sign-issuer`
    #[arg(long, value_name = "FILE", conflicts_with_all = ["root", "key_type"])]
    response: Option<PathBuf>,
    /// Type of the new keys: p256, p384 or ed25519 [default: that of the CA before]
    #[arg(long, value_name = "TYPE")]
    key_type: Option<CaKeyType>,
}

impl Command {
    pub(crate) async fn run(self, app: &App) -> Result<Exit> {
        match self {
            Self::Start(start) => start.run(app).await,
            Self::Status => {
                let info = status(app).await?;
                show(app, &info, &lines(&info));
                Ok(Exit::Done)
            }
            Self::Advance => step(app, Step::Advance).await,
            Self::Abort => step(app, Step::Abort).await,
        }
    }
}

async fn status(app: &App) -> Result<pb::RotationInfo> {
    app.ask(client!(CaClient<_>, app.controller().await?).rotation_status(pb::Empty {})).await
}

impl Start {
    async fn run(self, app: &App) -> Result<Exit> {
        let key_type = self.key_type.map(|wanted| wanted.to_string()).unwrap_or_default();
        if let Some(path) = &self.request_out {
            return ceremony::write_request(app, path, key_type).await;
        }
        let signed = self.response.as_deref().map(ceremony::read_response).transpose()?.unwrap_or_default();
        let request = pb::StartRotationRequest {
            root: self.root,
            auto: self.auto,
            operation_id: operation_id(),
            signed,
            key_type,
        };
        let channel = app.controller().await?;
        let info = app.ask(client!(CaClient<_>, channel).start_rotation(request)).await?;
        let mut text = lines(&info);
        text.push(next(&info));
        show(app, &info, &text);
        Ok(Exit::Done)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    Advance,
    Abort,
}

async fn step(app: &App, step: Step) -> Result<Exit> {
    let before = status(app).await?;
    if step == Step::Abort && before.running {
        app.confirm(&format!("go back from {} to {}?", safe(&before.to), safe(&before.from)))?;
    }
    let request = pb::RotationStep { version: before.version, operation_id: operation_id() };
    let channel = app.controller().await?;
    let mut ca = client!(CaClient<_>, channel);
    let answer = match step {
        Step::Advance => app.ask(ca.advance_rotation(request)).await,
        Step::Abort => app.ask(ca.abort_rotation(request)).await,
    };
    let info = answer.map_err(|failure| explain(failure, &before))?;
    let mut text = Vec::new();
    match (step, info.running) {
        (Step::Advance, false) => {
            text.push(format!("{} is dropped; {} is the one in use", safe(&before.from), safe(&before.to)));
        }
        (Step::Abort, false) => {
            text.push(format!("{} is withdrawn; nothing had been issued by it", safe(&before.to)))
        }
        (_, true) => {
            text.extend(lines(&info));
            text.push(next(&info));
        }
    }
    show(app, &info, &text);
    Ok(Exit::Done)
}

/// A refusal to go on says what is waited for.
fn explain(mut failure: Failure, before: &pb::RotationInfo) -> Failure {
    for line in waiting(before) {
        failure = failure.fact(line);
    }
    failure
}

fn waiting(info: &pb::RotationInfo) -> Vec<String> {
    let list = |what: &str, names: &[String]| {
        let names: Vec<_> = names.iter().map(|name| safe(name).into_owned()).collect();
        (!names.is_empty()).then(|| format!("{what}: {}", names.join(", ")))
    };
    let nodes = list("waits for nodes", &info.waits_for_nodes);
    let leaves = list("waits for certificates", &info.waits_for_certificates);
    let away = list("away, not waited for", &info.away);
    nodes.into_iter().chain(leaves).chain(away).collect()
}

fn lines(info: &pb::RotationInfo) -> Vec<String> {
    if !info.running {
        return vec![format!("no rotation is under way (bundle {}, {} nodes)", info.version, info.nodes)];
    }
    let now = now();
    let back = if info.aborted { ", on its way back" } else { "" };
    let auto = if info.auto { ", steps by itself" } else { "" };
    let mut lines = vec![
        format!(
            "rotation of the {} CA, phase {}{back}{auto}, bundle {}",
            info.kind, info.phase, info.version
        ),
        format!("from {}", safe(&info.from)),
        format!("to   {}", safe(&info.to)),
        format!("started {}, in this phase since {}", ago(info.started_at, now), ago(info.phase_at, now)),
    ];
    lines.extend(waiting(info));
    if info.waits_until != 0 {
        lines.push(format!("the last of these certificates ends in {}", left(info.waits_until, now)));
    }
    lines
}

fn next(info: &pb::RotationInfo) -> String {
    match (info.ready, info.auto) {
        (_, true) => "next: nothing; `meshctl ca rotate status` follows it".to_owned(),
        (true, false) => "next: meshctl ca rotate advance".to_owned(),
        (false, false) => {
            "next: `meshctl ca rotate status` until nothing is waited for, then `advance`".to_owned()
        }
    }
}

fn show(app: &App, info: &pb::RotationInfo, text: &[String]) {
    app.out.action("Rotation", info.changed, document(info), &info.phase, text);
}

fn document(info: &pb::RotationInfo) -> Value {
    json!({
        "running": info.running, "ca": info.kind, "phase": info.phase, "aborted": info.aborted, "auto": info.auto,
        "bundle": info.version, "startedAt": rfc3339(info.started_at), "phaseAt": rfc3339(info.phase_at),
        "from": info.from, "to": info.to, "ready": info.ready, "nodes": info.nodes,
        "waitsForNodes": info.waits_for_nodes, "waitsForCertificates": info.waits_for_certificates,
        "waitsUntil": rfc3339(info.waits_until), "away": info.away,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_waited_for_is_named_without_control_characters() {
        let info = pb::RotationInfo {
            running: true,
            waits_for_nodes: vec!["web-1".into(), "db\u{1b}[2J".into()],
            away: vec!["old".into()],
            ..pb::RotationInfo::default()
        };
        let text = waiting(&info);
        assert!(text[0].starts_with("waits for nodes: web-1, db") && !text[0].contains('\u{1b}'), "{text:?}");
        assert_eq!(text[1], "away, not waited for: old");
    }
}
