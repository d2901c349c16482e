//! What `node revoke`, `node rm` and `cert revoke` have in common: reasons and receipts.

use mesh_proto::v1::{self as pb, receipt::State};
use serde_json::{Value, json};

use crate::{
    app::App,
    error::Exit,
    output::count,
    text::{ago, elapsed, minute, now, rfc3339, safe},
};

/// RFC 5280 §5.3.1 in kebab case, without those that make no sense for a leaf.
pub(crate) const REASONS: [&str; 6] = [
    "unspecified",
    "key-compromise",
    "affiliation-changed",
    "superseded",
    "cessation-of-operation",
    "privilege-withdrawn",
];

/// Prints the end of a revocation; exit 3 if somebody who was waited for has not heard of it.
pub(crate) fn report(
    app: &App,
    kind: &str,
    name: &str,
    answer: &pb::RevokeResponse,
    head: String,
    waited: bool,
) -> Exit {
    let now = now();
    let mut lines = vec![head];
    lines.extend(receipts(name, answer, now));
    app.out.action(kind, answer.changed, document(name, answer), name, &lines);
    if waited && missing(answer).next().is_some() { Exit::Findings } else { Exit::Done }
}

fn missing(answer: &pb::RevokeResponse) -> impl Iterator<Item = &pb::Receipt> {
    answer.receipts.iter().filter(|receipt| receipt.state() != State::Acknowledged)
}

/// `acknowledged by web-1 db-1 (2/3) in 0.4s` and a line per node that was not reached.
fn receipts(name: &str, answer: &pb::RevokeResponse, now: i64) -> Vec<String> {
    if answer.receipts.is_empty() {
        return Vec::new();
    }
    let reached: Vec<_> = answer
        .receipts
        .iter()
        .filter(|receipt| receipt.state() == State::Acknowledged)
        .map(|receipt| safe(&receipt.node))
        .collect();
    let names = if reached.is_empty() { "nobody".to_owned() } else { reached.join(" ") };
    let time = elapsed(std::time::Duration::from_millis(answer.waited_ms.into()));
    let mut lines =
        vec![format!("acknowledged by {names} ({}/{}) in {time}", reached.len(), answer.receipts.len())];
    lines.extend(missing(answer).map(|receipt| {
        let seen = match (receipt.state(), receipt.last_seen) {
            (State::TimedOut, _) => "connected but silent".to_owned(),
            (_, 0) => "never seen".to_owned(),
            (_, at) => format!("last seen {}", ago(at, now)),
        };
        let lease = match receipt.lease_ends {
            0 => String::new(),
            at => format!("; it drops {} by {} at the latest (lease)", safe(name), minute(at)),
        };
        format!("not reached: {}, {seen}{lease}", safe(&receipt.node))
    }));
    lines
}

fn document(name: &str, answer: &pb::RevokeResponse) -> Value {
    let receipts: Vec<Value> = answer
        .receipts
        .iter()
        .map(|receipt| {
            let state = receipt.state().as_str_name().to_ascii_lowercase().replace('_', "-");
            json!({
                "node": receipt.node, "state": state, "lastSeen": rfc3339(receipt.last_seen),
                "leaseEnds": rfc3339(receipt.lease_ends),
            })
        })
        .collect();
    json!({
        "name": name,
        "revoked": answer.revoked.iter().map(|certificate| hex::encode(&certificate.serial)).collect::<Vec<_>>(),
        "crlNumber": answer.crl_number, "receipts": receipts, "tokensVoid": answer.tokens_void,
        "streamsClosed": answer.streams_closed, "peerRemoved": answer.peer_removed, "waitedMs": answer.waited_ms,
    })
}

/// `2 certificates`.
pub(crate) fn certificates(answer: &pb::RevokeResponse) -> String {
    count(answer.revoked.len(), "certificate")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn receipt(node: &str, state: State, last_seen: i64, lease_ends: i64) -> pb::Receipt {
        pb::Receipt { node: node.into(), state: state.into(), last_seen, lease_ends }
    }

    #[test]
    fn nodes_out_of_reach_are_named_with_the_end_of_their_lease() {
        let now = 1_795_500_000;
        let answer = pb::RevokeResponse {
            changed: true,
            waited_ms: 400,
            receipts: vec![
                receipt("web-1", State::Acknowledged, now, 0),
                receipt("db-1", State::Acknowledged, now, 0),
                receipt("db-2", State::Offline, now - 3 * 3600, 1_795_511_520),
            ],
            ..pb::RevokeResponse::default()
        };
        assert_eq!(
            receipts("old-1", &answer, now),
            [
                "acknowledged by web-1 db-1 (2/3) in 0.4s",
                "not reached: db-2, last seen 3h ago; it drops old-1 by 2026-11-24T09:12Z at the latest (lease)"
            ]
        );
        assert_eq!(missing(&answer).count(), 1);
        assert!(receipts("old-1", &pb::RevokeResponse::default(), now).is_empty());
    }
}
