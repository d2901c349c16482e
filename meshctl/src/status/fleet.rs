//! The fleet, as the controller sees it.

use mesh_proto::v1 as pb;
use serde_json::{Value, json};

use super::{finding_documents, findings, next_steps};
use crate::{
    app::App,
    node,
    output::{Format, Tone, paint},
    text::{ago, date, left, rfc3339, safe},
};

pub(super) fn show(app: &App, status: &pb::FleetStatus, now: i64) {
    match app.out.format {
        Format::Json => app.out.document("FleetStatus", &document(status)),
        Format::Name => status.nodes.iter().for_each(|node| app.out.line(&safe(&node.name))),
        Format::Table | Format::Wide => {
            lines(status, now, app.out.is_wide()).iter().for_each(|line| app.out.line(line))
        }
    }
}

fn lines(status: &pb::FleetStatus, now: i64, wide: bool) -> Vec<String> {
    let mut lines = findings(&status.findings);
    lines.push(head(status, now));
    if status.nodes.is_empty() {
        lines.push("no nodes yet; `meshctl token create` makes the token to join with".to_owned());
    } else {
        lines.extend(node::listing(&status.nodes, now, wide).table.lines());
    }
    lines.extend(status.store.as_ref().filter(|_| wide).map(|store| store_line(store, now)));
    lines.extend(next_steps(&status.findings));
    lines
}

/// `fleet prod-eu   root CA until 2036-11-02   issuing CA until 2028-11-02   CRL #41 38s old   mesh survives 51h without a controller`
fn head(status: &pb::FleetStatus, now: i64) -> String {
    let name = if status.fleet.is_empty() { &status.trust_domain } else { &status.fleet };
    let mut parts = vec![
        format!("fleet {}", paint(Tone::Bold, &safe(name))),
        format!("root CA until {}", date(status.root_not_after)),
        format!("issuing CA until {}", date(status.issuing_not_after)),
    ];
    if status.crl_number > 0 {
        let age = ago(status.crl_signed_at, now);
        let age = age.strip_suffix(" ago").map_or_else(|| "is new".to_owned(), |span| format!("{span} old"));
        parts.push(format!("CRL #{} {age}", status.crl_number));
    }
    if status.survives_until > 0 {
        parts.push(format!("mesh survives {} without a controller", left(status.survives_until, now)));
    }
    parts.join("   ")
}

/// `controller's store 43.1 MiB, records from #1200 (33d ago), certificates remembered 30d after their end`
fn store_line(store: &pb::StoreInfo, now: i64) -> String {
    let retention = match store.retention_secs {
        0 => "kept for ever".to_owned(),
        secs => format!("certificates remembered {}d after their end", secs / 86_400),
    };
    let size = store.bytes as f64 / (1024.0 * 1024.0);
    format!(
        "controller's store {size:.1} MiB, records from #{} ({}), {retention}",
        store.first_seq,
        ago(store.oldest, now)
    )
}

fn store_document(store: &pb::StoreInfo) -> Value {
    json!({
        "bytes": store.bytes, "firstSeq": store.first_seq, "oldest": rfc3339(store.oldest),
        "retentionSecs": store.retention_secs,
    })
}

fn document(status: &pb::FleetStatus) -> Value {
    json!({
        "fleet": status.fleet, "trustDomain": status.trust_domain, "controller": status.controller,
        "version": status.version, "rootNotAfter": rfc3339(status.root_not_after),
        "issuingNotAfter": rfc3339(status.issuing_not_after), "crlNumber": status.crl_number,
        "crlThisUpdate": rfc3339(status.crl_this_update), "crlSignedAt": rfc3339(status.crl_signed_at), "survivesUntil": rfc3339(status.survives_until),
        "headSeq": status.head_seq, "controllerTime": rfc3339(status.controller_time),
        "store": status.store.as_ref().map(store_document),
        "findings": finding_documents(&status.findings),
        "nodes": status.nodes.iter().map(node::document).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: i64 = 1_793_577_600; // 2026-11-02

    #[test]
    fn the_fleet_reads_like_the_contract() {
        let status = pb::FleetStatus {
            fleet: "prod-eu".into(),
            root_not_after: NOW + 3653 * 86_400,
            issuing_not_after: NOW + 731 * 86_400,
            crl_number: 41,
            crl_this_update: NOW - 38 - 900,
            crl_signed_at: NOW - 38,
            survives_until: NOW + 51 * 3600,
            nodes: vec![pb::Node {
                name: "db-2".into(),
                ipv4: "100.64.0.22".into(),
                tags: vec!["db".into()],
                state: "late".into(),
                connected: true,
                not_after: NOW + 31 * 3600,
                ..pb::Node::default()
            }],
            findings: vec![pb::Finding {
                subject: "db-2".into(),
                what: "certificate renews late (clock 14m behind)".into(),
                next: "on db-2: meshctl doctor".into(),
                severity: "warn".into(),
            }],
            ..pb::FleetStatus::default()
        };
        let text = anstream::adapter::strip_str(&lines(&status, NOW, false).join("\n")).to_string();
        insta::assert_snapshot!(text, @r"
        ! 1 finding   db-2: certificate renews late (clock 14m behind)
        fleet prod-eu   root CA until 2036-11-02   issuing CA until 2028-11-02   CRL #41 38s old   mesh survives 51h without a controller
        NODE  MESH IP      TAGS  LAST SEEN  CERT  STATE
        db-2  100.64.0.22  db    now        31h   late
        next, on db-2: meshctl doctor
        ");
    }

    #[test]
    fn the_store_is_a_line_of_the_wide_form() {
        let store = pb::StoreInfo {
            bytes: 45_193_626,
            first_seq: 1200,
            oldest: NOW - 33 * 86_400,
            retention_secs: 30 * 86_400,
        };
        let status = pb::FleetStatus { store: Some(store), ..pb::FleetStatus::default() };
        let line = "controller's store 43.1 MiB, records from #1200 (33d ago), certificates remembered 30d after their end";
        assert_eq!(lines(&status, NOW, true).last().unwrap(), line);
        assert!(!lines(&status, NOW, false).iter().any(|other| other == line));
        assert_eq!(document(&status)["store"]["firstSeq"], 1200);
    }

    #[test]
    fn an_empty_fleet_is_one_document_and_says_what_is_next() {
        let lines = lines(&pb::FleetStatus::default(), NOW, false);
        assert!(lines[1].contains("meshctl token create"));
        let document = document(&pb::FleetStatus::default());
        assert_eq!(document["nodes"], json!([]));
        assert_eq!(document["findings"], json!([]));
    }
}
