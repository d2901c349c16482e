//! `meshctl audit`: who did what.

use std::time::Duration;

use mesh_proto::v1::{self as pb, ErrorCode, audit_client::AuditClient};
use serde_json::{Value, json};

use crate::{
    app::{App, client},
    client::CONTROLLER,
    error::{Exit, Failure, Result},
    output::{Format, Listing, Table, Tone, paint},
    text::{Span, now, rfc3339, safe},
};

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Show the log, oldest first
    Log(Log),
    /// Check the whole chain of records for tampering
    Verify,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Log {
    /// Go on as new records arrive
    #[arg(long, short)]
    follow: bool,
    /// Only records of the last TIME, for instance 24h
    #[arg(long, value_name = "TIME")]
    since: Option<Span>,
    /// The newest records only; 0 is all
    #[arg(long, short = 'n', default_value_t = 200)]
    lines: u32,
}

impl Command {
    pub(crate) async fn run(self, app: &App) -> Result<Exit> {
        match self {
            Self::Log(log) => log.run(app).await,
            Self::Verify => verify(app).await,
        }
    }
}

impl Log {
    async fn run(self, app: &App) -> Result<Exit> {
        let since =
            self.since.map_or(0, |Span(back)| now() - i64::try_from(back.as_secs()).unwrap_or(i64::MAX));
        let request = pb::AuditLogRequest { since, follow: self.follow, limit: self.lines };
        let mut audit = client!(AuditClient<_>, app.controller().await?);
        let mut entries = app.ask(audit.log(request)).await?;
        let mut all = Vec::new();
        while let Some(entry) = next(app, &mut entries, self.follow).await? {
            if self.follow {
                one(app, &entry);
            } else {
                all.push(entry);
            }
        }
        if !self.follow {
            app.out.listing(&listing(&all));
        }
        Ok(Exit::Done)
    }
}

async fn next(
    app: &App,
    entries: &mut tonic::Streaming<pb::AuditEntry>,
    follow: bool,
) -> Result<Option<pb::AuditEntry>> {
    let message = entries.message();
    let answer = if follow {
        message.await
    } else {
        let limit = app.places.timeout.unwrap_or(Duration::from_secs(30));
        tokio::time::timeout(limit, message).await.map_err(|_| {
            Failure::new(ErrorCode::TimedOut, "the log stopped in the middle")
                .next("try again, or allow more with --timeout")
        })?
    };
    answer.map_err(|status| Failure::from_status(&status, CONTROLLER))
}

/// One line, or one JSON document a line, as records arrive.
fn one(app: &App, entry: &pb::AuditEntry) {
    match app.out.format {
        Format::Json => app.out.line(&document(entry).to_string()),
        Format::Name => app.out.line(&entry.seq.to_string()),
        Format::Table | Format::Wide => app.out.line(&format!(
            "{}  {}  {}  {}  {}",
            entry.seq,
            rfc3339(entry.time).unwrap_or_default(),
            safe(&entry.actor),
            safe(&entry.action),
            safe(&entry.detail)
        )),
    }
}

fn listing(entries: &[pb::AuditEntry]) -> Listing {
    let mut table = Table::new(&["SEQ", "TIME", "ACTOR", "ACTION", "DETAIL"]);
    for entry in entries {
        table.row([
            entry.seq.to_string(),
            rfc3339(entry.time).unwrap_or_default(),
            entry.actor.clone(),
            entry.action.clone(),
            entry.detail.clone(),
        ]);
    }
    Listing {
        kind: "AuditLog",
        items: entries.iter().map(document).collect(),
        names: entries.iter().map(|entry| entry.seq.to_string()).collect(),
        table,
        empty: "no records in that time",
    }
}

fn document(entry: &pb::AuditEntry) -> Value {
    json!({
        "seq": entry.seq, "time": rfc3339(entry.time), "actor": entry.actor, "action": entry.action,
        "detail": entry.detail, "hash": hex::encode(&entry.hash),
    })
}

async fn verify(app: &App) -> Result<Exit> {
    let mut audit = client!(AuditClient<_>, app.controller().await?);
    // Reads the whole journal.
    let answer = app.ask_for(CONTROLLER, Duration::from_secs(300), audit.verify(pb::Empty {})).await?;
    if app.out.is_json() {
        app.out.document(
            "AuditVerification",
            &json!({
                "intact": answer.intact, "firstSeq": answer.first_seq, "lastSeq": answer.last_seq,
                "headHash": hex::encode(&answer.head_hash), "baseHash": hex::encode(&answer.base_hash), "badSeq": answer.bad_seq, "problem": answer.problem,
            }),
        );
    } else {
        app.out.line(&sentence(&answer));
    }
    Ok(if answer.intact { Exit::Done } else { Exit::Findings })
}

fn sentence(answer: &pb::AuditVerifyResponse) -> String {
    if answer.intact {
        let older = match answer.base_hash.is_empty() {
            true => String::new(),
            false => format!(
                "; record {} and older are gone by retention, the chain continues {}",
                answer.first_seq.saturating_sub(1),
                hex::encode(&answer.base_hash)
            ),
        };
        return format!(
            "{}: records {} to {} form one chain, head {}{older}",
            paint(Tone::Good, "intact"),
            answer.first_seq,
            answer.last_seq,
            hex::encode(&answer.head_hash)
        );
    }
    format!("{}: record {}: {}", paint(Tone::Bad, "NOT intact"), answer.bad_seq, safe(&answer.problem))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_keep_to_one_line_and_verification_is_one_sentence() {
        let entry = pb::AuditEntry {
            seq: 7,
            time: 1_800_000_000,
            actor: "operator alice".into(),
            action: "node.revoke".into(),
            detail: "old-1\nreason".into(),
            hash: vec![1, 2].into(),
        };
        let listing = listing(&[entry]);
        assert_eq!(listing.table.lines().len(), 2);
        assert_eq!(
            listing.items[0].to_string(),
            r#"{"seq":7,"time":"2027-01-15T08:00:00Z","actor":"operator alice","action":"node.revoke","detail":"old-1\nreason","hash":"0102"}"#
        );
        let bad =
            pb::AuditVerifyResponse { bad_seq: 5, problem: "hash differs".into(), ..Default::default() };
        let text = anstream::adapter::strip_str(&sentence(&bad)).to_string();
        assert_eq!(text, "NOT intact: record 5: hash differs");
        let mut good = pb::AuditVerifyResponse {
            intact: true,
            first_seq: 1,
            last_seq: 9,
            head_hash: vec![0xab].into(),
            ..Default::default()
        };
        let said = |answer: &_| anstream::adapter::strip_str(&sentence(answer)).to_string();
        assert_eq!(said(&good), "intact: records 1 to 9 form one chain, head ab");
        (good.first_seq, good.base_hash) = (5, vec![0xcd].into());
        assert_eq!(
            said(&good),
            "intact: records 5 to 9 form one chain, head ab; record 4 and older are gone by retention, the chain continues cd"
        );
    }
}
