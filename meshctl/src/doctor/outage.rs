//! `meshctl doctor --outage`: who would be without a certificate after so long without a controller.

use std::collections::BTreeMap;

use mesh_proto::v1 as pb;
use serde_json::json;

use crate::{
    app::App,
    cert,
    error::{Exit, Result},
    output::count,
    text::{Span, left, now, rfc3339, safe},
};

pub(super) async fn run(app: &App, outage: Span) -> Result<Exit> {
    let all = cert::all_live(app).await?;
    let now = now();
    let newest = newest(&all);
    let ending = ending(&newest, now + i64::from(outage.seconds()));
    if app.out.is_json() {
        let items: Vec<_> = ending.iter().map(|certificate| cert::document(certificate)).collect();
        app.out.document(
            "OutageReport",
            &json!({
                "outageSeconds": outage.seconds(), "checked": newest.len(), "ending": items,
                "until": rfc3339(now + i64::from(outage.seconds())),
            }),
        );
    } else if ending.is_empty() {
        app.out.line(&format!("{} would outlive it", count(newest.len(), "certificate")));
    } else {
        for certificate in &ending {
            app.out.line(&format!(
                "{}  {} of {} ends in {}",
                safe(&certificate.name),
                safe(&certificate.profile),
                safe(&certificate.owner),
                left(certificate.not_after, now)
            ));
        }
        app.out.note(&format!("{} of {} would end", ending.len(), count(newest.len(), "certificate")));
    }
    Ok(if ending.is_empty() { Exit::Done } else { Exit::Findings })
}

/// The newest certificate of each purpose: one that was renewed may end.
fn newest(all: &[pb::Certificate]) -> Vec<&pb::Certificate> {
    let mut newest: BTreeMap<(&str, &str, &str), &pb::Certificate> = BTreeMap::new();
    for certificate in all {
        let purpose = (&*certificate.owner, &*certificate.profile, &*certificate.name);
        let kept = newest.entry(purpose).or_insert(certificate);
        if certificate.not_after > kept.not_after {
            *kept = certificate;
        }
    }
    newest.into_values().collect()
}

/// Those that end at `until` or before, soonest first.
fn ending<'a>(newest: &[&'a pb::Certificate], until: i64) -> Vec<&'a pb::Certificate> {
    let mut ending: Vec<_> = newest.iter().copied().filter(|c| c.not_after <= until).collect();
    ending.sort_by_key(|certificate| certificate.not_after);
    ending
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_newest_certificate_of_a_purpose_counts() {
        let certificate = |name: &str, profile: &str, hours: i64| pb::Certificate {
            name: name.into(),
            owner: "web-1".into(),
            profile: profile.into(),
            not_after: hours * 3600,
            ..pb::Certificate::default()
        };
        let all = [
            certificate("web-1", "node", 20),
            certificate("web-1", "node", 70),
            certificate("api", "server", 50),
            certificate("api", "client", 61),
            certificate("db", "server", 30),
        ];
        let newest = newest(&all);
        assert_eq!(newest.len(), 4);
        let names = |until: i64| {
            ending(&newest, until * 3600)
                .iter()
                .map(|c| (c.name.as_str(), c.not_after / 3600))
                .collect::<Vec<_>>()
        };
        assert_eq!(names(60), [("db", 30), ("api", 50)]);
        assert_eq!(names(61), [("db", 30), ("api", 50), ("api", 61)]);
        assert!(names(29).is_empty());
    }
}
