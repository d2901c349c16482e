//! `meshctl cert issue --dry-run`: what policy says to each part of a request.

use mesh_proto::v1::{ErrorCode, ExplainResponse, explain_response::Verdict};
use serde_json::{Value, json};

use crate::{
    app::App,
    error::Exit,
    output::{Format, Tone, paint},
    text::safe,
};

/// Prints the answer; the exit code is the one with which issuing would end.
pub(super) fn report(app: &App, profile: &str, answer: &ExplainResponse, explain: bool) -> Exit {
    match app.out.format {
        Format::Json => app.out.document("CertificateDryRun", &document(profile, answer)),
        Format::Name => {
            let names = answer.verdicts.iter().filter(|verdict| is_name(verdict) && verdict.allowed);
            names.for_each(|verdict| app.out.line(&safe(&verdict.subject)));
        }
        Format::Table | Format::Wide => {
            lines(profile, answer, explain).iter().for_each(|line| app.out.line(line))
        }
    }
    exit(answer)
}

fn exit(answer: &ExplainResponse) -> Exit {
    match answer.verdicts.iter().find(|verdict| !verdict.allowed) {
        Some(verdict) => verdict.code().exit(),
        None => Exit::Done,
    }
}

fn is_name(verdict: &Verdict) -> bool {
    matches!(verdict.about.as_str(), "name" | "address")
}

fn lines(profile: &str, answer: &ExplainResponse, explain: bool) -> Vec<String> {
    let mut lines = Vec::new();
    for verdict in &answer.verdicts {
        // What is allowed and was not asked about in words is told only on request.
        if !explain && verdict.allowed && !is_name(verdict) {
            continue;
        }
        let (mark, tone) = if verdict.allowed { ("yes", Tone::Good) } else { ("no ", Tone::Bad) };
        let about = format!("{} {}", safe(&verdict.about), safe(&verdict.subject));
        let why = match (verdict.allowed, explain) {
            (true, true) => format!("  by {}", safe(&verdict.rule)),
            (true, false) => String::new(),
            (false, _) => format!("  {}: {}", verdict.code().label(), safe(&verdict.why)),
        };
        lines.push(format!("{} {about}{why}", paint(tone, mark)));
        if !verdict.allowed {
            lines.push(format!("    do: {}", safe(&verdict.next)));
        }
    }
    lines.push(match answer.allowed {
        true => format!("profile {}: would be issued; nothing was", safe(profile)),
        false => format!("profile {}: would be refused; nothing was issued", safe(profile)),
    });
    lines
}

fn document(profile: &str, answer: &ExplainResponse) -> Value {
    let items: Vec<Value> = answer
        .verdicts
        .iter()
        .map(|verdict| {
            let code = (!verdict.allowed && verdict.code() != ErrorCode::Unspecified)
                .then(|| verdict.code().label());
            json!({
                "about": verdict.about, "subject": verdict.subject, "allowed": verdict.allowed,
                "rule": verdict.rule, "code": code, "why": verdict.why, "next": verdict.next,
            })
        })
        .collect();
    json!({ "profile": profile, "allowed": answer.allowed, "changed": false, "items": items })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer() -> ExplainResponse {
        let yes = Verdict {
            about: "name".into(),
            subject: "db.mesh.internal".into(),
            allowed: true,
            rule: "profile.database.names[0].exact".into(),
            ..Verdict::default()
        };
        let no = Verdict {
            about: "name".into(),
            subject: "x.mesh.internal".into(),
            code: ErrorCode::NameOutsideProfile.into(),
            why: "no rule of profile database gives x.mesh.internal to node db-1".into(),
            next: "use another name".into(),
            ..Verdict::default()
        };
        let profile =
            Verdict { about: "profile".into(), subject: "database".into(), allowed: true, ..yes.clone() };
        ExplainResponse { allowed: false, verdicts: vec![profile, yes, no] }
    }

    #[test]
    fn each_name_has_its_rule_or_its_code() {
        let text = |explain| {
            anstream::adapter::strip_str(&lines("database", &answer(), explain).join("\n")).to_string()
        };
        insta::assert_snapshot!(text(true), @r"
        yes profile database  by profile.database.names[0].exact
        yes name db.mesh.internal  by profile.database.names[0].exact
        no  name x.mesh.internal  E0572: no rule of profile database gives x.mesh.internal to node db-1
            do: use another name
        profile database: would be refused; nothing was issued
        ");
        assert_eq!(text(false).lines().count(), 4);
        assert_eq!(exit(&answer()), Exit::Denied);
        assert_eq!(exit(&ExplainResponse { allowed: true, verdicts: Vec::new() }), Exit::Done);
    }

    #[test]
    fn the_json_is_stable() {
        let mut answer = answer();
        answer.verdicts.remove(0);
        assert_eq!(
            document("database", &answer).to_string(),
            r#"{"profile":"database","allowed":false,"changed":false,"items":[{"about":"name","subject":"db.mesh.internal","allowed":true,"rule":"profile.database.names[0].exact","code":null,"why":"","next":""},{"about":"name","subject":"x.mesh.internal","allowed":false,"rule":"","code":"E0572","why":"no rule of profile database gives x.mesh.internal to node db-1","next":"use another name"}]}"#
        );
    }
}
