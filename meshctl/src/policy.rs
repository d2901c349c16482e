//! `meshctl policy`: who may reach whom, and who may hold which name.

use std::{fs::File, io::Read, path::PathBuf};

use mesh_proto::v1::{self as pb, ErrorCode, policy_client::PolicyClient};
use serde_json::json;

use crate::{
    app::{App, client, operation_id},
    error::{Exit, Failure, Result},
    text::{safe, safe_lines},
};

/// Longest policy that is sent.
const POLICY_BYTES_MAX: u64 = 1024 * 1024;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Print the policy in force
    Show,
    /// Check a policy file without applying it
    Check(Document),
    /// Put a policy file in force
    Apply(Document),
}

#[derive(Debug, clap::Args)]
pub(crate) struct Document {
    /// The policy file, or `-` for stdin
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

impl Command {
    pub(crate) async fn run(self, app: &App) -> Result<Exit> {
        match self {
            Self::Show => show(app).await,
            Self::Check(document) => check(app, &document).await,
            Self::Apply(document) => apply(app, &document).await,
        }
    }
}

impl Document {
    fn read(&self) -> Result<pb::PolicyDocument> {
        let mut toml = String::new();
        let failed = |error| Failure::file("read", &self.file, &error);
        let read = if self.file.as_os_str() == "-" {
            std::io::stdin().lock().take(POLICY_BYTES_MAX + 1).read_to_string(&mut toml)
        } else {
            File::open(&self.file).map_err(failed)?.take(POLICY_BYTES_MAX + 1).read_to_string(&mut toml)
        };
        read.map_err(failed)?;
        if toml.len() as u64 > POLICY_BYTES_MAX {
            return Err(Failure::new(ErrorCode::TooLarge, "the policy is too long")
                .why(format!("it has more than {POLICY_BYTES_MAX} bytes"))
                .next("use tags instead of single nodes"));
        }
        Ok(pb::PolicyDocument { toml, version: 0, operation_id: operation_id() })
    }
}

async fn show(app: &App) -> Result<Exit> {
    let policy = app.ask(client!(PolicyClient<_>, app.controller().await?).get(pb::Empty {})).await?;
    if app.out.is_json() {
        app.out.document("Policy", &json!({ "version": policy.version, "toml": policy.toml }));
    } else {
        app.out.write(&safe_lines(&policy.toml));
    }
    Ok(Exit::Done)
}

async fn check(app: &App, document: &Document) -> Result<Exit> {
    let request = document.read()?;
    let answer = app.ask(client!(PolicyClient<_>, app.controller().await?).check(request)).await?;
    let failure = refusal(&answer);
    if app.out.is_json() {
        app.out.document(
            "PolicyCheck",
            &json!({ "valid": answer.valid, "problems": answer.problems, "warnings": answer.warnings }),
        );
        failure.iter().for_each(|failure| failure.print(None));
        return Ok(failure.map_or(Exit::Done, |failure| failure.exit));
    }
    answer.warnings.iter().for_each(|warning| app.out.line(&format!("warning: {}", safe(warning))));
    match failure {
        Some(failure) => Err(failure),
        None => {
            app.out.line("the policy is valid");
            Ok(Exit::Done)
        }
    }
}

/// Every problem of a policy as one error; `None` for a valid one.
fn refusal(answer: &pb::PolicyCheck) -> Option<Failure> {
    if answer.valid {
        return None;
    }
    let start = Failure::new(ErrorCode::PolicyInvalid, "the policy is not valid")
        .next("correct the file; the policy in force stays as it is");
    Some(answer.problems.iter().fold(start, |failure, problem| failure.fact(problem)))
}

async fn apply(app: &App, document: &Document) -> Result<Exit> {
    let request = document.read()?;
    let answer = app.ask(client!(PolicyClient<_>, app.controller().await?).apply(request)).await?;
    let lines = [match (answer.changed, answer.detail.is_empty()) {
        (true, true) => "the policy is in force".to_owned(),
        (true, false) => safe(&answer.detail).into_owned(),
        (false, _) => "this policy was in force already".to_owned(),
    }];
    app.out.action("PolicyApplication", answer.changed, json!({ "detail": answer.detail }), "policy", &lines);
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_invalid_policy_is_refused_with_every_problem() {
        let answer =
            pb::PolicyCheck { valid: false, problems: vec!["a".into(), "b".into()], warnings: vec![] };
        let failure = refusal(&answer).unwrap();
        assert_eq!(
            (failure.code, failure.exit, failure.facts.len()),
            (ErrorCode::PolicyInvalid, Exit::Usage, 2)
        );
        assert!(refusal(&pb::PolicyCheck { valid: true, ..answer }).is_none());
    }

    #[test]
    fn a_policy_has_a_limit() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "#".repeat(POLICY_BYTES_MAX as usize + 1)).unwrap();
        let document = Document { file: file.path().to_owned() };
        assert_eq!(document.read().unwrap_err().code, ErrorCode::TooLarge);
    }
}
