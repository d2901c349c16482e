//! `meshctl node`: the enrolled machines.

use std::{ffi::OsString, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use mesh_proto::v1::{self as pb, nodes_client::NodesClient};
use serde_json::{Value, json};

use crate::{
    app::{App, Wait, client, operation_id},
    cli::List,
    client::CONTROLLER,
    error::{Exit, Failure, Result},
    output::{Listing, Table, Tone, count, paint},
    revocation,
    text::{ago, fingerprint, left, now, rfc3339, safe},
};

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// List nodes
    Ls(List),
    /// Everything about one node
    Show(Name),
    /// Let a node in that waits for approval
    Approve(Name),
    /// Add and remove tags: meshctl node tag web-1 +web -db
    Tag(Tag),
    /// Take a node's identity away; its peers cut it off at once
    Revoke(Revoke),
    /// Revoke a node and remove it from the list
    Rm(Revoke),
    /// Have a node make new WireGuard keys
    RotateKeys(Name),
}

#[derive(Debug, clap::Args)]
pub(crate) struct Name {
    /// The node's name
    name: String,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Tag {
    /// The node's name
    name: String,
    /// +TAG adds, -TAG removes; a tag h, o, q, v or y is removed after --
    #[arg(required = true, allow_hyphen_values = true, trailing_var_arg = true, value_name = "+TAG|-TAG")]
    changes: Vec<String>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Revoke {
    /// The node's name
    name: String,
    /// Why
    #[arg(long, value_parser = revocation::REASONS, default_value = "unspecified", hide_default_value = true)]
    reason: String,
    #[command(flatten)]
    wait: Wait,
}

impl Command {
    pub(crate) async fn run(self, app: &App) -> Result<Exit> {
        match self {
            Self::Ls(list) => app.watch(&list.watch, || list_nodes(app)).await,
            Self::Show(node) => show(app, node.name).await,
            Self::Approve(node) => approve(app, node.name).await,
            Self::Tag(tag) => tag.run(app).await,
            Self::Revoke(revoke) => revoke.run(app, false).await,
            Self::Rm(revoke) => revoke.run(app, true).await,
            Self::RotateKeys(node) => rotate_keys(app, node.name).await,
        }
    }
}

async fn list_nodes(app: &App) -> Result<Exit> {
    let nodes = app.ask(client!(NodesClient<_>, app.controller().await?).list(pb::Empty {})).await?.nodes;
    app.out.listing(&listing(&nodes, now(), app.out.is_wide()));
    Ok(Exit::Done)
}

pub(crate) fn listing(nodes: &[pb::Node], now: i64, wide: bool) -> Listing {
    Listing {
        kind: "NodeList",
        items: nodes.iter().map(document).collect(),
        names: nodes.iter().map(|node| node.name.clone()).collect(),
        table: if wide { wide_table(nodes, now) } else { table(nodes, now) },
        empty: "no nodes yet; `meshctl token create` makes the token to join with",
    }
}

pub(crate) fn table(nodes: &[pb::Node], now: i64) -> Table {
    let mut table = Table::new(&["NODE", "MESH IP", "TAGS", "LAST SEEN", "CERT", "STATE"]);
    for node in nodes {
        let (state, tone) = state(node);
        table.toned_row(
            [
                node.name.clone(),
                node.ipv4.clone(),
                node.tags.join(","),
                seen(node, now),
                certificate(node, now),
                state,
            ],
            Some(tone),
        );
    }
    table
}

fn wide_table(nodes: &[pb::Node], now: i64) -> Table {
    let mut table = Table::new(&[
        "NODE",
        "MESH IP",
        "MESH IPV6",
        "TAGS",
        "LAST SEEN",
        "CERT",
        "SERIAL",
        "ENDPOINTS",
        "BACKEND",
        "VERSION",
        "STATE",
    ]);
    for node in nodes {
        let (state, tone) = state(node);
        let endpoints: Vec<&str> = node.endpoints.iter().map(|endpoint| endpoint.address.as_str()).collect();
        table.toned_row(
            [
                node.name.clone(),
                node.ipv4.clone(),
                node.ipv6.clone(),
                node.tags.join(","),
                seen(node, now),
                certificate(node, now),
                hex::encode(&node.serial),
                endpoints.join(","),
                node.backend.clone(),
                node.version.clone(),
                state,
            ],
            Some(tone),
        );
    }
    table
}

fn seen(node: &pb::Node, now: i64) -> String {
    if node.connected { "now".to_owned() } else { ago(node.last_seen, now) }
}

fn certificate(node: &pb::Node, now: i64) -> String {
    if node.revoked_at != 0 {
        return format!("revoked {}", ago(node.revoked_at, now));
    }
    match (node.not_after, node.renews_at) {
        (0, _) => "-".to_owned(),
        (end, renews) if renews > now => format!("{} (renews {})", left(end, now), left(renews, now)),
        (end, _) => left(end, now),
    }
}

fn state(node: &pb::Node) -> (String, Tone) {
    match node.state.as_str() {
        "revoked" if node.cut_off_of > 0 => {
            let done = node.cut_off_on >= node.cut_off_of;
            (
                format!("cut off on {}/{}", node.cut_off_on, node.cut_off_of),
                if done { Tone::Dim } else { Tone::Bad },
            )
        }
        "revoked" => ("revoked".to_owned(), Tone::Dim),
        "ok" => ("ok".to_owned(), Tone::Good),
        "expired" => ("expired".to_owned(), Tone::Bad),
        other => (other.to_owned(), Tone::Warn),
    }
}

pub(crate) fn document(node: &pb::Node) -> Value {
    let endpoints: Vec<Value> = node
        .endpoints
        .iter()
        .map(|endpoint| {
            let source = endpoint.source().as_str_name().to_ascii_lowercase().replace('_', "-");
            json!({ "address": endpoint.address, "source": source })
        })
        .collect();
    json!({
        "name": node.name, "id": node.id, "state": node.state, "ipv4": node.ipv4, "ipv6": node.ipv6, "tags": node.tags,
        "connected": node.connected, "lastSeen": rfc3339(node.last_seen), "enrolledAt": rfc3339(node.enrolled_at),
        "notAfter": rfc3339(node.not_after), "renewsAt": rfc3339(node.renews_at), "serial": hex::encode(&node.serial),
        "keySha256": hex::encode(&node.key_hash), "wireguardPublicKey": STANDARD.encode(&node.wireguard_public_key),
        "revokedAt": rfc3339(node.revoked_at), "reason": node.reason, "endpoints": endpoints, "version": node.version,
        "backend": node.backend, "cutOffOn": node.cut_off_on, "cutOffOf": node.cut_off_of, "findings": node.findings,
        "acknowledgedSeq": node.acknowledged_seq,
    })
}

async fn show(app: &App, name: String) -> Result<Exit> {
    let request = pb::NodeRequest { name, operation_id: prost::bytes::Bytes::new() };
    let node = app.ask(client!(NodesClient<_>, app.controller().await?).get(request)).await?;
    match app.out.format {
        crate::output::Format::Json => app.out.document("Node", &document(&node)),
        crate::output::Format::Name => app.out.line(&safe(&node.name)),
        _ => describe(&node, now()).iter().for_each(|line| app.out.line(line)),
    }
    Ok(Exit::Done)
}

fn describe(node: &pb::Node, now: i64) -> Vec<String> {
    let (state, tone) = state(node);
    let mut facts: Vec<(&str, String)> = vec![
        ("mesh ip", format!("{} {}", node.ipv4, node.ipv6)),
        ("tags", node.tags.join(" ")),
        ("last seen", seen(node, now)),
        ("enrolled", ago(node.enrolled_at, now)),
        ("certificate", format!("{} {}", hex::encode(&node.serial), certificate(node, now))),
        ("key", if node.key_hash.is_empty() { String::new() } else { fingerprint(&node.key_hash) }),
        ("wireguard", STANDARD.encode(&node.wireguard_public_key)),
        ("reason", node.reason.clone()),
        ("runs", format!("{} {}", node.version, node.backend)),
    ];
    facts.extend(node.endpoints.iter().map(|endpoint| {
        (
            "endpoint",
            format!(
                "{} ({})",
                endpoint.address,
                endpoint.source().as_str_name().to_ascii_lowercase().replace('_', " ")
            ),
        )
    }));
    facts.extend(node.findings.iter().map(|finding| ("finding", finding.clone())));
    let mut lines = vec![format!("{}  {}", safe(&node.name), paint(tone, &safe(&state)))];
    lines.extend(
        facts
            .iter()
            .filter(|(_, value)| !value.trim().is_empty())
            .map(|(name, value)| format!("  {name:<12} {}", safe(value.trim()))),
    );
    lines
}

async fn approve(app: &App, name: String) -> Result<Exit> {
    let request = pb::NodeRequest { name: name.clone(), operation_id: operation_id() };
    let answer = app.ask(client!(NodesClient<_>, app.controller().await?).approve(request)).await?;
    let line = if answer.changed { "approved; it joins when it asks again" } else { "was approved already" };
    acted(app, "NodeApproval", &name, &answer, line);
    Ok(Exit::Done)
}

async fn rotate_keys(app: &App, name: String) -> Result<Exit> {
    let request = pb::NodeRequest { name: name.clone(), operation_id: operation_id() };
    let answer = app.ask(client!(NodesClient<_>, app.controller().await?).rotate_keys(request)).await?;
    let line = if answer.changed {
        "makes new WireGuard keys at its next renewal, which is now"
    } else {
        "is making new keys already"
    };
    acted(app, "KeyRotation", &name, &answer, line);
    Ok(Exit::Done)
}

fn acted(app: &App, kind: &str, name: &str, answer: &pb::ActionResponse, line: &str) {
    // The controller's own words say more, for instance which tags there are now.
    let lines = [match answer.changed && !answer.detail.is_empty() {
        true => safe(&answer.detail).into_owned(),
        false => format!("node {} {line}", safe(name)),
    }];
    app.out.action(kind, answer.changed, json!({ "name": name, "detail": answer.detail }), name, &lines);
}

impl Tag {
    async fn run(self, app: &App) -> Result<Exit> {
        let (add, remove) = split(&self.changes)?;
        let request =
            pb::TagNodeRequest { name: self.name.clone(), add, remove, operation_id: operation_id() };
        let answer = app.ask(client!(NodesClient<_>, app.controller().await?).tag(request)).await?;
        acted(
            app,
            "NodeTags",
            &self.name,
            &answer,
            if answer.changed { "has new tags" } else { "had these tags already" },
        );
        Ok(Exit::Done)
    }
}

/// Options in the short form, which would otherwise be tags to remove.
const SHORT_OPTIONS: [&str; 5] = ["-h", "-o", "-q", "-v", "-y"];
/// Options that take the next word.
const WITH_VALUE: [&str; 6] = ["-o", "--output", "--timeout", "--color", "--controller", "--socket"];

/// Moves options of `node tag` in front of its name and tags, so that they may stand behind them as with
/// every other command: a `-x` among tags cannot be told from an option otherwise.
pub(crate) fn options_first(line: Vec<OsString>) -> Vec<OsString> {
    let Some(at) = line.windows(2).position(|pair| pair[0] == "node" && pair[1] == "tag") else {
        return line;
    };
    let mut options = line;
    let mut words = options.split_off(at + 2).into_iter();
    let mut plain = Vec::new();
    while let Some(word) = words.next() {
        if word == "--" {
            plain.extend(words);
            break;
        }
        let text = word.to_str().unwrap_or_default();
        let takes_next = WITH_VALUE.contains(&text);
        if text.starts_with("--") || SHORT_OPTIONS.contains(&text) {
            options.push(word);
            options.extend(takes_next.then(|| words.next()).flatten());
        } else {
            plain.push(word);
        }
    }
    options.push("--".into());
    options.extend(plain);
    options
}

/// `+a -b` into what is added and what is removed.
fn split(changes: &[String]) -> Result<(Vec<String>, Vec<String>)> {
    let (mut add, mut remove) = (Vec::new(), Vec::new());
    for change in changes {
        match (change.strip_prefix('+'), change.strip_prefix('-')) {
            (Some(tag), _) if !tag.is_empty() => add.push(tag.to_owned()),
            (_, Some(tag)) if !tag.is_empty() && !tag.starts_with('-') => remove.push(tag.to_owned()),
            _ => {
                return Err(Failure::usage(
                    format!("{change} neither adds nor removes a tag"),
                    "write +TAG or -TAG, as in `meshctl node tag web-1 +web -db`",
                ));
            }
        }
    }
    Ok((add, remove))
}

impl Revoke {
    async fn run(self, app: &App, remove: bool) -> Result<Exit> {
        app.confirm(&format!(
            "{} node {}? It cannot come back without a new token.",
            if remove { "remove" } else { "revoke" },
            self.name
        ))?;
        let wait = self.wait.seconds();
        let request = pb::RevokeNodeRequest {
            name: self.name.clone(),
            reason: self.reason,
            wait_secs: wait,
            operation_id: operation_id(),
        };
        let mut nodes = client!(NodesClient<_>, app.controller().await?);
        let extra = Duration::from_secs(wait.into());
        let answer = if remove {
            app.ask_for(CONTROLLER, extra, nodes.remove(request)).await?
        } else {
            app.ask_for(CONTROLLER, extra, nodes.revoke(request)).await?
        };
        let head = head(&self.name, &answer, remove);
        let kind = if remove { "NodeRemoval" } else { "NodeRevocation" };
        Ok(revocation::report(app, kind, &self.name, &answer, head, wait > 0))
    }
}

/// `node old-1: 2 certificates revoked (CRL #42), WireGuard peer removed, 1 token void, 2 open streams closed`
fn head(name: &str, answer: &pb::RevokeResponse, remove: bool) -> String {
    if !answer.changed {
        return format!("node {} was {} already", safe(name), if remove { "removed" } else { "revoked" });
    }
    let mut parts = Vec::new();
    // Removing a node that was revoked before revokes nothing more.
    if !answer.revoked.is_empty() {
        parts.push(format!(
            "{} revoked (CRL #{})",
            count(answer.revoked.len(), "certificate"),
            answer.crl_number
        ));
    }
    if answer.peer_removed {
        parts.push("WireGuard peer removed".to_owned());
    }
    if answer.tokens_void > 0 {
        parts.push(format!("{} void", count(answer.tokens_void as usize, "token")));
    }
    if answer.streams_closed > 0 {
        parts.push(format!("{} closed", count(answer.streams_closed as usize, "open stream")));
    }
    if remove {
        parts.push("removed from the list".to_owned());
    }
    format!("node {}: {}", safe(name), parts.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: i64 = 1_800_000_000;

    fn fleet() -> Vec<pb::Node> {
        let node = |name: &str, ipv4: &str, tag: &str, state: &str| pb::Node {
            name: name.into(),
            ipv4: ipv4.into(),
            tags: vec![tag.into()],
            state: state.into(),
            serial: vec![0xab; 16].into(),
            ..pb::Node::default()
        };
        vec![
            pb::Node {
                connected: true,
                not_after: NOW + 60 * 3600,
                renews_at: NOW + 12 * 3600,
                ..node("web-1", "100.64.0.11", "web", "ok")
            },
            pb::Node {
                connected: true,
                not_after: NOW + 31 * 3600,
                ..node("db-2", "100.64.0.22", "db", "late")
            },
            pb::Node {
                last_seen: NOW - 4 * 86_400,
                revoked_at: NOW - 5 * 86_400,
                cut_off_on: 3,
                cut_off_of: 3,
                ..node("old-1", "100.64.0.40", "web", "revoked")
            },
        ]
    }

    #[test]
    fn the_table_reads_like_the_contract() {
        let text = anstream::adapter::strip_str(&table(&fleet(), NOW).lines().join("\n")).to_string();
        insta::assert_snapshot!(text, @r"
        NODE   MESH IP      TAGS  LAST SEEN  CERT              STATE
        web-1  100.64.0.11  web   now        60h (renews 12h)  ok
        db-2   100.64.0.22  db    now        31h               late
        old-1  100.64.0.40  web   4d ago     revoked 5d ago    cut off on 3/3
        ");
    }

    /// Golden: fields are only ever added.
    #[test]
    fn the_json_of_a_node_is_stable() {
        insta::assert_snapshot!(serde_json::to_string_pretty(&document(&fleet()[0])).unwrap(), @r#"
        {
          "name": "web-1",
          "id": 0,
          "state": "ok",
          "ipv4": "100.64.0.11",
          "ipv6": "",
          "tags": [
            "web"
          ],
          "connected": true,
          "lastSeen": null,
          "enrolledAt": null,
          "notAfter": "2027-01-17T20:00:00Z",
          "renewsAt": "2027-01-15T20:00:00Z",
          "serial": "abababababababababababababababab",
          "keySha256": "",
          "wireguardPublicKey": "",
          "revokedAt": null,
          "reason": "",
          "endpoints": [],
          "version": "",
          "backend": "",
          "cutOffOn": 0,
          "cutOffOf": 0,
          "findings": [],
          "acknowledgedSeq": 0
        }
        "#);
    }

    #[test]
    fn tag_changes_have_a_sign() {
        let changes = |words: &[&str]| split(&words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>());
        assert_eq!(
            changes(&["+web", "-db", "+x"]).unwrap(),
            (vec!["web".into(), "x".into()], vec!["db".into()])
        );
        for bad in ["web", "+", "-", "--quiet"] {
            assert_eq!(changes(&[bad]).unwrap_err().exit, Exit::Usage, "{bad}");
        }
    }

    #[test]
    fn options_may_follow_the_tags() {
        let moved = |line: &str| {
            let words = options_first(line.split(' ').map(OsString::from).collect());
            words.iter().map(|word| word.to_str().unwrap()).collect::<Vec<_>>().join(" ")
        };
        let table = [
            ("meshctl node tag web-1 +a -b -o json", "meshctl node tag -o json -- web-1 +a -b"),
            ("meshctl node tag web-1 -q +a -y -v", "meshctl node tag -q -y -v -- web-1 +a"),
            (
                "meshctl node tag --timeout 5s web-1 +a --color=never",
                "meshctl node tag --timeout 5s --color=never -- web-1 +a",
            ),
            ("meshctl node tag web-1 +a -- -q --x", "meshctl node tag -- web-1 +a -q --x"),
            ("meshctl node tag web-1 -db -o", "meshctl node tag -o -- web-1 -db"),
            ("meshctl node show tag -o json", "meshctl node show tag -o json"),
        ];
        for (line, expected) in table {
            assert_eq!(moved(line), expected);
        }
    }

    #[test]
    fn a_revocation_says_what_was_cut() {
        let answer = pb::RevokeResponse {
            changed: true,
            revoked: vec![pb::Certificate::default(); 2],
            crl_number: 42,
            tokens_void: 1,
            streams_closed: 2,
            peer_removed: true,
            ..pb::RevokeResponse::default()
        };
        assert_eq!(
            head("old-1", &answer, false),
            "node old-1: 2 certificates revoked (CRL #42), WireGuard peer removed, 1 token void, 2 open streams closed"
        );
        let removed = pb::RevokeResponse { changed: true, ..pb::RevokeResponse::default() };
        assert_eq!(head("old-1", &removed, true), "node old-1: removed from the list");
        assert_eq!(head("old-1", &pb::RevokeResponse::default(), false), "node old-1 was revoked already");
    }
}
