//! The ten steps. Each returns its line, made from what it saw.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use mesh_ca::bundle;
use mesh_lab::{wait_for, wait_until};
use serde_json::Value;
use x509_parser::{prelude::FromDer as _, revocation_list::CertificateRevocationList};

use super::{
    Broken,
    fleet::{CONTROLLER, DOMAIN, Fleet, Node, Ran},
};
use crate::text::{left, now, rtt, short_fingerprint};

pub(super) struct Step {
    pub(super) name: &'static str,
    pub(super) run: fn(&mut Fleet) -> Result<String, Broken>,
}

pub(super) const STEPS: [Step; 10] = [
    Step { name: "ca", run: ca },
    Step { name: "enroll", run: enroll },
    Step { name: "mesh", run: mesh },
    Step { name: "issue", run: issue },
    Step { name: "mtls", run: mtls },
    Step { name: "no cert", run: no_certificate },
    Step { name: "rotate", run: rotate },
    Step { name: "revoke", run: revoke },
    Step { name: "evict", run: evict },
    Step { name: "offline", run: offline },
];

const CONTROLLER_PORT: u16 = 7443;
const HTTPS_PORT: u16 = 8443;
const REQUESTS: &str = "200";
/// What is expected within moments has this long before the step fails.
const PATIENCE: Duration = Duration::from_secs(10);
/// Exit code of "done, but somebody was not reached".
const FINDINGS: i32 = 3;
/// Exit code of a refusal.
const DENIED: i32 = 4;
/// Exit code of "try again".
const UNREACHABLE: i32 = 5;
const SERVER: &str = "https";
const LOAD: &str = "requests";

fn ca(fleet: &mut Fleet) -> Result<String, Broken> {
    let host = fleet.controller.clone();
    let address = host.ipv4().ok_or_else(|| Broken::new("the controller's host has no address"))?;
    let state = fleet.path("controller");
    let state = text(&state)?;
    let advertise = format!("{address}:{CONTROLLER_PORT}");
    fleet.meshd(
        &host,
        &[
            "controller",
            "init",
            "--state-dir",
            state,
            "--domain",
            DOMAIN,
            "--name",
            "ctl",
            "--advertise",
            &advertise,
            "--unlock",
            "none",
        ],
    )?;
    start_controller(fleet)?;
    let ca = fleet.meshctl(&host, &["ca", "show", "-o", "json"])?.json()?;
    let authorities = |kind: &str| ca[kind].as_array().map_or(0, Vec::len);
    if authorities("roots") != 1 || authorities("issuers") == 0 {
        return Err(Broken::new("the controller shows no root or no issuing CA"));
    }
    let root = hex::decode(string(&ca, "rootSpkiSha256")?)
        .map_err(|_| Broken::new("the root has no fingerprint"))?;
    Ok(format!("root and issuing CA created, root {}", short_fingerprint(&root)))
}

pub(super) fn start_controller(fleet: &mut Fleet) -> Result<(), Broken> {
    let host = fleet.controller.clone();
    let state = fleet.path(CONTROLLER);
    let listen = format!("0.0.0.0:{CONTROLLER_PORT}");
    fleet.start_meshd(&host, &["controller", "run", "--state-dir", text(&state)?, "--listen", &listen])?;
    fleet.wait_ready(&host)
}

/// All nodes at once, each with a token of its own.
fn enroll(fleet: &mut Fleet) -> Result<String, Broken> {
    for node in fleet.nodes.clone() {
        let state = fleet.path(node.name);
        fleet.start_meshd(&node.host, &["node", "run", "--state-dir", text(&state)?])?;
    }
    for node in fleet.nodes.clone() {
        fleet.wait_ready(&node.host)?;
    }
    let shared: &Fleet = fleet;
    let enrolled: Vec<Result<String, Broken>> = thread::scope(|scope| {
        let workers: Vec<_> =
            shared.nodes.iter().map(|node| scope.spawn(move || enroll_one(shared, node))).collect();
        workers
            .into_iter()
            .map(|worker| worker.join().unwrap_or_else(|_| Err(Broken::new("a thread ended early"))))
            .collect()
    });
    for (node, address) in fleet.nodes.iter_mut().zip(enrolled) {
        node.ipv4 = address?;
    }
    let seen = fleet.meshctl(&fleet.controller, &["node", "ls", "-o", "json"])?.json()?;
    let parts: Vec<String> = fleet.nodes.iter().map(|node| format!("{} {}", node.name, node.ipv4)).collect();
    let known = seen["items"].as_array().map_or(0, Vec::len);
    if known == parts.len() {
        Ok(parts.join("   "))
    } else {
        Err(Broken::new(format!("the controller lists {known} nodes")))
    }
}

fn enroll_one(fleet: &Fleet, node: &Node) -> Result<String, Broken> {
    let token = fleet.meshctl(&fleet.controller, &["token", "create", "-q"])?.stdout;
    let done = fleet
        .meshctl_with(&node.host, &["enroll", "-", "--name", node.name, "-o", "json"], &token)?
        .json()?;
    string(&done, "ipv4")
}

/// Every pair of the first node, through the product and beside it.
fn mesh(fleet: &mut Fleet) -> Result<String, Broken> {
    let alpha = fleet.node("alpha").clone();
    let mut parts = Vec::new();
    for peer in fleet.nodes.iter().filter(|node| node.name != "alpha") {
        let time = first_ping(fleet, &alpha, peer)?;
        parts.push(format!("alpha -> {} {time}", peer.name));
    }
    let charlie = fleet.node("charlie");
    first_ping(fleet, charlie, &alpha)?;
    if !fleet.overlay_passes(charlie, &alpha)? {
        return Err(Broken::new("a datagram from charlie does not reach alpha over the mesh"));
    }
    let status = fleet.meshctl(&alpha.host, &["status", "-o", "json"])?.json()?;
    Ok(format!("{}   (WireGuard, {})", parts.join("   "), string(&status, "backend")?))
}

/// Pings until the roster and the handshake are there.
fn first_ping(fleet: &Fleet, from: &Node, to: &Node) -> Result<String, Broken> {
    let mut last = String::new();
    let ran = wait_for(&format!("a ping from {} to {}", from.name, to.name), PATIENCE, || {
        match ping(fleet, from, to) {
            Ok(ran) if ran.code == 0 => Some(ran),
            Ok(ran) => {
                last = ran.complaint();
                None
            }
            Err(Broken(why)) => {
                last = why;
                None
            }
        }
    });
    overlay_time(&ran.map_err(|error| Broken::new(format!("{error}: {last}")))?)
}

fn ping(fleet: &Fleet, from: &Node, to: &Node) -> Result<Ran, Broken> {
    fleet.try_meshctl(&from.host, &["ping", to.name, "--count", "1", "--wait", "500ms", "-o", "json"])
}

/// The round trip of the packet that went through the tunnel.
fn overlay_time(ran: &Ran) -> Result<String, Broken> {
    let document = ran.json()?;
    let replies = document["replies"].as_array().cloned().unwrap_or_default();
    let reply = replies.iter().rev().find(|reply| reply["layer"] == "overlay" && reply["ok"] == true);
    let micros =
        reply.and_then(|reply| reply["rttMicros"].as_u64()).and_then(|micros| u32::try_from(micros).ok());
    micros.map(rtt).ok_or_else(|| Broken::new("the ping has no overlay reply"))
}

fn issue(fleet: &mut Fleet) -> Result<String, Broken> {
    let (alpha, bravo) = (fleet.node("alpha").clone(), fleet.node("bravo").clone());
    let policy = fleet.path("policy.toml");
    let old = fleet.meshctl(&fleet.controller, &["policy", "show"])?.stdout;
    let grant = format!("\n[[grant]]\nnames = [\"{}\"]\nto = [\"node:bravo\"]\n", api());
    fs::write(&policy, old + &grant)
        .map_err(|error| Broken::new(format!("cannot write the policy: {error}")))?;
    fleet.meshctl(&fleet.controller, &["policy", "apply", text(&policy)?])?;

    let server = fleet.path("bravo-api");
    let words = ["cert", "issue", &api(), "--out", text(&server)?, "-o", "json"];
    let pair = fleet.meshctl(&bravo.host, &words)?.json()?;
    let client = fleet.path("alpha-web");
    let words = ["cert", "issue", &web(), "--profile", "peer", "--out", text(&client)?, "-o", "json"];
    let other = fleet.meshctl(&alpha.host, &words)?.json()?;
    fleet.memory.server_serial = string(&pair, "serial")?;
    fleet.memory.client_serial = string(&other, "serial")?;

    let key = server.join("key.pem");
    let mode = fs::metadata(&key)
        .map_err(|error| Broken::new(format!("no key on bravo: {error}")))?
        .permissions()
        .mode();
    if mode & 0o777 != 0o600 {
        return Err(Broken::new(format!("the key on bravo has mode {:o}", mode & 0o777)));
    }
    for folder in [&server, &client] {
        let host = if folder == &server { &bravo.host } else { &alpha.host };
        fleet.meshctl(host, &["cert", "verify", text(&folder.join("cert.pem"))?])?;
    }
    let ends = seconds(&pair, "notAfter")?;
    Ok(format!("{} on bravo: key on the node, chain verified, expires in {}", api(), left(ends, now())))
}

fn mtls(fleet: &mut Fleet) -> Result<String, Broken> {
    let (alpha, bravo) = (fleet.node("alpha").clone(), fleet.node("bravo").clone());
    let dir = fleet.path("bravo-api");
    let listen = format!("{}:{HTTPS_PORT}", bravo.ipv4);
    fleet.start_meshctl(
        SERVER,
        &bravo.host,
        &["probe", "serve", "--listen", &listen, "--dir", text(&dir)?],
    )?;
    let listening =
        wait_until("the HTTPS server", PATIENCE, || fleet.processes().log(SERVER).contains("listening"));
    listening?;
    let ran = get(fleet, &alpha, &[])?;
    let answer = must(&ran)?;
    let (status, client) = (&answer["status"], string(&answer, "client")?);
    if status != 200 || client != format!("spiffe://{DOMAIN}/service/alpha/web") {
        return Err(Broken::new(format!("{status} for {client}")));
    }
    Ok(format!("alpha -> https://{}:{HTTPS_PORT} {status}, client {client}", api()))
}

fn no_certificate(fleet: &mut Fleet) -> Result<String, Broken> {
    let alpha = fleet.node("alpha").clone();
    let ran = get(fleet, &alpha, &["--no-cert"])?;
    if ran.code == DENIED {
        return Ok("the same call without a certificate: refused".to_owned());
    }
    Err(Broken::new(format!("a call without a certificate was not refused; {}", ran.complaint())))
}

fn rotate(fleet: &mut Fleet) -> Result<String, Broken> {
    let (alpha, bravo) = (fleet.node("alpha").clone(), fleet.node("bravo").clone());
    let ready = fleet.path("requests-run");
    let words = get_words(fleet, &["--count", REQUESTS, "--until-renewed", "10s", "--ready", text(&ready)?])?;
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    fleet.start_meshctl(LOAD, &alpha.host, &words)?;
    wait_until("the first of the requests", PATIENCE, || ready.exists())?;
    let renewed = fleet.meshctl(&bravo.host, &["cert", "renew", &api(), "-o", "json"])?.json()?;
    let serial = string(&renewed, "serial")?;
    fleet.processes().wait(LOAD, PATIENCE * 3)?;
    let answer: Value = serde_json::from_str(fleet.processes().log_tail(LOAD, 1).as_str())
        .map_err(|_| Broken::new("the requests left no result"))?;
    let serials: Vec<&str> =
        answer["serverSerials"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let (requests, failed) = (&answer["requests"], &answer["failed"]);
    if failed != 0 {
        return Err(Broken::new(format!("{failed} of {requests} requests failed: {}", answer["errors"])));
    }
    if serial == fleet.memory.server_serial
        || serials != [fleet.memory.server_serial.as_str(), serial.as_str()]
    {
        return Err(Broken::new(format!("the clients saw {serials:?}, not the change to {serial}")));
    }
    fleet.memory.server_serial = serial;
    Ok(format!("{} renewed under {requests} requests: {failed} failed", api()))
}

fn revoke(fleet: &mut Fleet) -> Result<String, Broken> {
    let alpha = fleet.node("alpha").clone();
    let started = Instant::now();
    let words = ["cert", "revoke", &web(), "--reason", "key-compromise", "--wait=10s", "-o", "json"];
    let answer = revoked(fleet, &words)?;
    let (number, reached) = (answer["crlNumber"].as_u64().unwrap_or(0), acknowledged(&answer));
    if reached != fleet.nodes.len() {
        return Err(Broken::new(format!("only {reached} of {} nodes have the CRL", fleet.nodes.len())));
    }
    let took = started.elapsed();
    // What the nodes say is checked on their disks, and by a server that only reads its folder.
    let serial = fleet.memory.client_serial.clone();
    for name in ["bravo-api", "alpha-web"] {
        let path = fleet.path(name).join("crl.pem");
        wait_until(&format!("serial {serial} in {}", path.display()), PATIENCE, || {
            crl_holds(&path, &serial)
        })?;
    }
    for node in &fleet.nodes {
        let status = fleet.meshctl(&node.host, &["status", "-o", "json"])?.json()?;
        if status["crlNumber"].as_u64().unwrap_or(0) < number {
            return Err(Broken::new(format!(
                "{} acknowledged CRL #{number} and has #{}",
                node.name, status["crlNumber"]
            )));
        }
    }
    let ran = get(fleet, &alpha, &[])?;
    if ran.code != DENIED {
        return Err(Broken::new(format!("bravo still takes the revoked certificate; {}", ran.complaint())));
    }
    let all = fleet.nodes.len();
    Ok(format!(
        "alpha's client certificate: CRL #{number} on {reached}/{all} nodes in {:.1}s; bravo refuses it",
        took.as_secs_f64()
    ))
}

fn evict(fleet: &mut Fleet) -> Result<String, Broken> {
    let (alpha, charlie) = (fleet.node("alpha").clone(), fleet.node("charlie").clone());
    let started = Instant::now();
    let words = ["node", "revoke", "charlie", "--reason", "key-compromise", "--wait=10s", "-o", "json"];
    let answer = revoked(fleet, &words)?;
    let (took, reached, peers) = (started.elapsed(), acknowledged(&answer), fleet.nodes.len() - 1);
    if reached != peers {
        return Err(Broken::new(format!("only {reached} of {peers} peers cut charlie off")));
    }
    if ping(fleet, &alpha, &charlie)?.code == 0 {
        return Err(Broken::new("alpha can still ping charlie"));
    }
    for peer in fleet.nodes.iter().filter(|node| node.name != "charlie") {
        for (from, to) in [(&charlie, peer), (peer, &charlie)] {
            if fleet.overlay_passes(from, to)? {
                return Err(Broken::new(format!("a datagram from {} still reaches {}", from.name, to.name)));
            }
        }
    }
    // Its identity is worth nothing to the controller either.
    denied(fleet, &charlie)?;
    Ok(format!(
        "charlie revoked: {reached}/{peers} peers cut it off in {:.1}s; ping: no reply; controller: denied",
        took.as_secs_f64()
    ))
}

/// A revocation ends well or, with nodes that did not hear of it, with findings; the step counts them.
fn revoked(fleet: &Fleet, words: &[&str]) -> Result<Value, Broken> {
    let ran = fleet.try_meshctl(&fleet.controller, words)?;
    if ran.code == 0 || ran.code == FINDINGS { ran.json() } else { Err(Broken::new(ran.complaint())) }
}

/// The node asks for a certificate and must be refused; while it is still dialling it asks again.
fn denied(fleet: &Fleet, node: &Node) -> Result<(), Broken> {
    let out = fleet.path("late");
    let name = format!("late.{}.{DOMAIN}", node.name);
    let words = ["cert", "issue", &name, "--out", text(&out)?];
    let ran = wait_for(&format!("a refusal for {}", node.name), PATIENCE, || {
        match fleet.try_meshctl(&node.host, &words) {
            Ok(ran) if ran.code == UNREACHABLE => None,
            other => Some(other),
        }
    })??;
    if ran.code == DENIED && !out.join("cert.pem").exists() {
        return Ok(());
    }
    Err(Broken::new(format!("the controller did not deny {}; {}", node.name, ran.complaint())))
}

fn offline(fleet: &mut Fleet) -> Result<String, Broken> {
    fleet.processes().kill(CONTROLLER)?;
    let (alpha, bravo) = (fleet.node("alpha").clone(), fleet.node("bravo").clone());
    wait_until("alpha to miss the controller", PATIENCE, || {
        let status = fleet.try_meshctl(&alpha.host, &["status", "-o", "json"]).and_then(|ran| ran.json());
        status.is_ok_and(|status| status["controllerConnected"] == false)
    })?;
    let ran = ping(fleet, &alpha, &bravo)?;
    if ran.code != 0 {
        return Err(Broken::new(format!("alpha lost bravo with the controller; {}", ran.complaint())));
    }
    if !fleet.overlay_passes(&alpha, &bravo)? {
        return Err(Broken::new("a datagram from alpha no longer reaches bravo"));
    }
    let time = overlay_time(&ran)?;
    let hours = shortest_lease(fleet)?;
    Ok(format!("controller stopped: alpha -> bravo still {time}; mesh survives {hours}h without it"))
}

/// Whole hours until the first lease among the nodes that are left ends.
fn shortest_lease(fleet: &Fleet) -> Result<i64, Broken> {
    let mut ends = Vec::new();
    for node in fleet.nodes.iter().filter(|node| node.name != "charlie") {
        let status = fleet.meshctl(&node.host, &["status", "-o", "json"])?.json()?;
        ends.push(seconds(&status, "notAfter")?);
        for peer in status["peers"].as_array().into_iter().flatten() {
            ends.push(seconds(peer, "leaseEnds")?);
        }
    }
    let first = ends.into_iter().min().ok_or_else(|| Broken::new("no node shows a lease"))?;
    Ok((first - now()) / 3600)
}

fn api() -> String {
    format!("api.{DOMAIN}")
}

fn web() -> String {
    format!("web.alpha.{DOMAIN}")
}

/// One call from alpha to bravo's server.
fn get(fleet: &Fleet, from: &Node, more: &[&str]) -> Result<Ran, Broken> {
    let words = get_words(fleet, more)?;
    fleet.try_meshctl(&from.host, &words.iter().map(String::as_str).collect::<Vec<_>>())
}

fn get_words(fleet: &Fleet, more: &[&str]) -> Result<Vec<String>, Broken> {
    let dir = fleet.path("alpha-web");
    let url = format!("https://{}:{HTTPS_PORT}", api());
    let words = ["probe", "get", &url, "--connect", &fleet.node("bravo").ipv4, "--dir", text(&dir)?];
    Ok(words.iter().chain(more).map(|word| (*word).to_owned()).collect())
}

fn must(ran: &Ran) -> Result<Value, Broken> {
    if ran.code == 0 { ran.json() } else { Err(Broken::new(ran.complaint())) }
}

fn acknowledged(answer: &Value) -> usize {
    let receipts = answer["receipts"].as_array();
    receipts.into_iter().flatten().filter(|receipt| receipt["state"] == "acknowledged").count()
}

/// Whether a CRL in `path` names `serial`.
fn crl_holds(path: &Path, serial: &str) -> bool {
    let Some(crls) = fs::read(path).ok().and_then(|text| bundle::parse_crls(&text).ok()) else {
        return false;
    };
    crls.iter().any(|der| {
        CertificateRevocationList::from_der(der).is_ok_and(|(_, crl)| {
            crl.iter_revoked_certificates().any(|entry| hex::encode(entry.raw_serial()) == serial)
        })
    })
}

fn text(path: &Path) -> Result<&str, Broken> {
    path.to_str().ok_or_else(|| Broken::new("the folder for temporary files has a name that is no text"))
}

fn string(value: &Value, field: &str) -> Result<String, Broken> {
    match value[field].as_str() {
        Some(text) if !text.is_empty() => Ok(text.to_owned()),
        _ => Err(Broken::new(format!("the answer has no {field}"))),
    }
}

/// A time of a JSON document as seconds since 1970.
fn seconds(value: &Value, field: &str) -> Result<i64, Broken> {
    let text = string(value, field)?;
    time::OffsetDateTime::parse(&text, &time::format_description::well_known::Rfc3339)
        .map(time::OffsetDateTime::unix_timestamp)
        .map_err(|_| Broken::new(format!("{field} is no time: {text}")))
}
