//! `meshctl enroll` and `meshctl leave`: this machine joins a mesh or leaves it.

use mesh_proto::v1::{self as pb, ErrorCode, local_client::LocalClient, local_enroll_progress::Step};
use serde_json::json;

use crate::{
    app::{App, client},
    client::NODE,
    error::{Exit, Failure, Result},
    secret::{self, TokenFile},
    text::{safe, short_fingerprint},
};

#[derive(clap::Args)]
pub(crate) struct Enroll {
    /// The join token, or `-` to read it from stdin; also MESH_TOKEN
    #[arg(value_name = "TOKEN", conflicts_with = "token_file", allow_hyphen_values = true)]
    token: Option<String>,
    #[command(flatten)]
    file: TokenFile,
    /// Name to join under; this machine's host name unless given
    #[arg(long)]
    name: Option<String>,
    /// If an operator must approve, do not wait for that
    #[arg(long)]
    no_wait: bool,
}

impl std::fmt::Debug for Enroll {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Enroll").field("name", &self.name).finish_non_exhaustive()
    }
}

#[derive(Debug, clap::Args)]
pub(crate) struct Leave {}

impl Enroll {
    pub(crate) async fn run(self, app: &App) -> Result<Exit> {
        let token = secret::token(self.token.as_deref(), self.file.token_file.as_deref(), "meshctl enroll")?;
        let request =
            pb::LocalEnrollRequest { token, name: self.name.unwrap_or_default(), no_wait: self.no_wait };
        let mut node = client!(LocalClient<_>, app.node().await?);
        let work = async {
            let mut steps = node.enroll(request).await?.into_inner();
            let mut pending = None;
            while let Some(progress) = steps.message().await? {
                match progress.step {
                    Some(Step::Connecting(address)) => {
                        app.out.detail(&format!("connecting to {}", safe(&address)))
                    }
                    Some(Step::Pending(waiting)) => {
                        say_pending(app, &waiting, self.no_wait);
                        pending = Some(waiting);
                    }
                    Some(Step::Done(done)) => return Ok(Outcome::Enrolled(done)),
                    None => {}
                }
            }
            Ok(pending.map_or(Outcome::Nothing, Outcome::Pending))
        };
        // With approval required this may take days, so there is no limit but the one given.
        let outcome: Result<Outcome, tonic::Status> = match app.places.timeout {
            Some(limit) => tokio::time::timeout(limit, work).await.map_err(|_| {
                Failure::new(ErrorCode::TimedOut, "the enrollment was not finished in time")
                    .why("the node goes on by itself")
                    .next("`meshctl status` shows when it is done")
            })?,
            None => work.await,
        };
        report(app, outcome.map_err(|status| Failure::from_status(&status, NODE))?)
    }
}

enum Outcome {
    Enrolled(pb::local_enroll_progress::Enrolled),
    Pending(pb::enroll_response::Pending),
    Nothing,
}

fn say_pending(app: &App, waiting: &pb::enroll_response::Pending, no_wait: bool) {
    let node = safe(&waiting.node);
    app.out.note(&format!(
        "{node} waits for approval; its key is {}\non the controller: meshctl node approve {node}{}",
        crate::text::fingerprint(&waiting.key_hash),
        if no_wait { "" } else { "\n(waiting; Ctrl-C leaves the request in place)" },
    ));
}

fn report(app: &App, outcome: Outcome) -> Result<Exit> {
    match outcome {
        Outcome::Enrolled(done) => {
            let name = done.name.clone();
            let line = if done.changed {
                format!(
                    "{} is in the mesh {}: {} {}",
                    safe(&name),
                    safe(&done.trust_domain),
                    safe(&done.ipv4),
                    safe(&done.ipv6)
                )
            } else {
                format!("{} was in the mesh {} already", safe(&name), safe(&done.trust_domain))
            };
            let body = json!({
                "name": done.name, "ipv4": done.ipv4, "ipv6": done.ipv6, "trustDomain": done.trust_domain, "state": "enrolled",
            });
            app.out.action("Enrollment", done.changed, body, &name, &[line]);
            Ok(Exit::Done)
        }
        Outcome::Pending(waiting) => {
            let body = json!({ "name": waiting.node, "state": "pending", "keySha256": hex::encode(&waiting.key_hash) });
            let line = format!(
                "{} waits for approval ({})",
                safe(&waiting.node),
                short_fingerprint(&waiting.key_hash)
            );
            app.out.action("Enrollment", true, body, &waiting.node, &[line]);
            Ok(Exit::Done)
        }
        Outcome::Nothing => Err(Failure::new(
            ErrorCode::Internal,
            "the node ended the enrollment without an answer",
        )
        .why("it may have been stopped")
        .next("see its log and run `meshctl enroll` again; the token is still good if nothing was issued")),
    }
}

impl Leave {
    pub(crate) async fn run(self, app: &App) -> Result<Exit> {
        app.confirm("leave the mesh and forget this machine's identity?")?;
        let answer = app.ask_node(client!(LocalClient<_>, app.node().await?).leave(pb::Empty {})).await?;
        let (line, exit) = departure(&answer);
        app.out.action(
            "Departure",
            answer.changed,
            json!({ "detail": answer.detail, "incomplete": answer.incomplete }),
            "",
            &[line],
        );
        Ok(exit)
    }
}

/// What is said of a departure, and whether the controller still has to be told of it.
fn departure(answer: &pb::ActionResponse) -> (String, Exit) {
    let line = match (answer.changed, answer.detail.as_str()) {
        (false, _) => "this machine is in no mesh".to_owned(),
        (true, detail) if answer.incomplete => safe(detail).into_owned(),
        (true, _) => "left the mesh; the identity is forgotten".to_owned(),
    };
    (line, if answer.incomplete { Exit::Findings } else { Exit::Done })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_departure_the_controller_does_not_know_of_is_a_finding() {
        let answer = |changed, incomplete, detail: &str| pb::ActionResponse {
            changed,
            detail: detail.to_owned(),
            incomplete,
        };
        let told = departure(&answer(true, false, "this machine has left the mesh"));
        assert_eq!(told, ("left the mesh; the identity is forgotten".to_owned(), Exit::Done));
        let untold = departure(&answer(true, true, "the controller was not told (x\u{1b}[2J): run it there"));
        assert_eq!(untold.1, Exit::Findings);
        assert_eq!(untold.0, "the controller was not told (x\\u{1b}[2J): run it there");
        let nowhere = departure(&answer(false, false, "this machine was not enrolled"));
        assert_eq!(nowhere, ("this machine is in no mesh".to_owned(), Exit::Done));
    }
}
