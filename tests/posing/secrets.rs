//! Secrets stay where they were born: looked for in every file the fleet has written, in every usual writing.

use std::{
    fs,
    path::{Path, PathBuf},
};

use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, URL_SAFE},
};
use mesh_tests::{CONTROLLER, Fleet, fleet_test};
use x509_parser::prelude::FromDer as _;

use crate::{
    credential::{DOMAIN, decoded, identity_file},
    join,
};

/// What is looked for, in each writing.
#[derive(Default)]
pub(crate) struct Needles(Vec<(String, Vec<u8>)>);

impl Needles {
    /// `secret` raw, in hexadecimal and in base64 at any offset of a larger text.
    pub(crate) fn add(&mut self, what: &str, secret: &[u8]) {
        let mut push = |form: &str, bytes: Vec<u8>| {
            assert!(bytes.len() >= 8, "{what} as {form} is too short to be looked for");
            self.0.push((format!("{what}, {form}"), bytes));
        };
        push("raw", secret.to_vec());
        push("hex", hex::encode(secret).into_bytes());
        push("HEX", hex::encode_upper(secret).into_bytes());
        // As Rust's Debug and JSON write a list of bytes.
        let list: Vec<String> = secret.iter().map(u8::to_string).collect();
        push("list", list.join(", ").into_bytes());
        push("JSON list", list.join(",").into_bytes());
        for skip in 0..3.min(secret.len()) {
            let inner = &secret[skip..];
            // Whole groups of three, so that no neighbour has a part in the text.
            let inner = &inner[..inner.len() / 3 * 3];
            push("base64", STANDARD.encode(inner).into_bytes());
            push("base64url", URL_SAFE.encode(inner).into_bytes());
        }
    }

    /// A PKCS #8 key: its document and its scalar.
    pub(crate) fn add_key(&mut self, what: &str, pkcs8: &[u8]) {
        self.add(&format!("{what} (scalar)"), &scalar(pkcs8));
    }

    pub(crate) fn found_in(&self, bytes: &[u8]) -> Vec<String> {
        let found = self.0.iter().filter(|(_, needle)| contains(bytes, needle));
        found.map(|(what, _)| what.clone()).collect()
    }
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    let first = needle[0];
    let mut rest = haystack;
    while let Some(at) = rest.iter().position(|byte| *byte == first) {
        rest = &rest[at..];
        if rest.starts_with(needle) {
            return true;
        }
        rest = &rest[1..];
    }
    false
}

/// The private number in a P-256 key: PKCS #8 (RFC 5958) around an ECPrivateKey (RFC 5915).
fn scalar(pkcs8: &[u8]) -> Vec<u8> {
    use x509_parser::asn1_rs::{Any, Integer, OctetString, Sequence};
    let read = || -> Option<Vec<u8>> {
        let (_, outer) = Sequence::from_der(pkcs8).ok()?;
        let (rest, _) = Integer::from_der(&outer.content).ok()?;
        let (rest, _) = Any::from_der(rest).ok()?;
        let (_, key) = OctetString::from_der(rest).ok()?;
        let (_, inner) = Sequence::from_der(key.as_ref()).ok()?;
        let (rest, _) = Integer::from_der(&inner.content).ok()?;
        let (_, number) = OctetString::from_der(rest).ok()?;
        Some(number.as_ref().to_vec())
    };
    let number = read().expect("a P-256 key in PKCS #8");
    assert_eq!(number.len(), 32);
    number
}

/// Every regular file below `folder`, links not followed.
pub(crate) fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
        let entry = entry.unwrap();
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            files.extend(files_below(&entry.path()));
        } else if kind.is_file() {
            files.push(entry.path());
        }
    }
    files
}

#[test]
fn stay_where_they_were_born() {
    fleet_test("secrets::stay_where_they_were_born", || {
        let mut fleet = Fleet::new();
        let nodes = ["alpha", "bravo"];
        let mut needles = Needles::default();
        for name in nodes {
            fleet.add_host(name);
            // The most talkative logs there are.
            fleet.start_node_with(name, &[], &[("RUST_LOG", "trace"), ("MESHD_LOG", "trace")]);
            let token = fleet.token(&[]);
            fleet.meshctl(name, &["enroll", &token, "--name", name]).ok();
            needles.add(&format!("{name}'s token"), &join::open(&token).secret);
        }
        fleet.wait_meshed(&nodes);
        // A full run: a pair, a renewal, rotated keys, wrong and right tokens, a revocation, restarts.
        let out = fleet.path("alpha").join("tls");
        let name = format!("web.alpha.{DOMAIN}");
        fleet.meshctl("alpha", &["cert", "issue", &name, "--out", out.to_str().unwrap()]).ok();
        let unused = fleet.token(&[]);
        needles.add("the unused token", &join::open(&unused).secret);
        fleet.meshctl("alpha", &["enroll", &unused]).ok();
        let operator = fleet.controller(&["operator", "add", "al", "--role", "admin"]).ok();
        needles.add("the operator's token", &join::open(operator.stdout.trim()).secret);
        let first = keys_of(&fleet, &nodes);
        fleet.controller(&["node", "rotate-keys", "alpha"]).ok();
        let before = identity_file(&fleet, "alpha")["wireguard_keys"].clone();
        fleet.until("alpha has new keys", |fleet| identity_file(fleet, "alpha")["wireguard_keys"] != before);
        fleet.controller(&["token", "ls"]).ok();
        fleet.controller(&["audit", "log"]).ok();
        fleet.processes.stop(CONTROLLER).unwrap();
        fleet.start_controller();
        fleet.controller(&["node", "revoke", "bravo", "--yes"]).ok();
        let bravo = fleet.addresses_known("bravo").0;
        fleet.until("alpha has dropped bravo", |fleet| !fleet.pings("alpha", bravo));

        let mut keys = first;
        keys.extend(keys_of(&fleet, &nodes));
        for (owner, what, secret) in &keys {
            needles.add(&format!("{owner}'s {what}"), secret);
        }
        let pair =
            mesh_ca::LeafKey::from_pkcs8_pem(&fs::read_to_string(out.join("key.pem")).unwrap()).unwrap();
        needles.add_key("the pair's key", &pair.to_pkcs8_der());

        // Running processes replace files while they are looked at.
        for process in nodes.into_iter().chain([CONTROLLER]) {
            fleet.processes.stop(process).unwrap();
        }
        // The control: each key is found in its owner's own file.
        for node in nodes {
            let own = fs::read(fleet.state(node).join("identity.json")).unwrap();
            let found = needles.found_in(&own);
            for what in ["TLS key", "WireGuard key"] {
                assert!(found.iter().any(|text| text.contains(&format!("{node}'s {what}"))), "{found:?}");
            }
        }
        let root = fleet.path(CONTROLLER).parent().unwrap().to_owned();
        let mut read = 0;
        for file in files_below(&root) {
            let found = needles.found_in(&fs::read(&file).unwrap());
            let path = file.strip_prefix(&root).unwrap();
            let leaks: Vec<_> = found.into_iter().filter(|what| !is_at_home(path, what)).collect();
            assert!(leaks.is_empty(), "{} holds {leaks:?}", path.display());
            read += 1;
        }
        assert!(read > 20, "only {read} files were looked at");
        assert!(files_below(fleet.processes.folder()).len() >= 3, "the logs are among them");
    });
}

/// The files of a node's state that hold its keys: of the identity in use, of the next one until it is proved,
/// and of the renewal that was under way when the node stopped.
const IDENTITY_FILES: [&str; 3] = ["identity.json", "identity-next.json", "renewal.json"];

/// Whether `path` is a file that may hold the secret called `what`.
fn is_at_home(path: &Path, what: &str) -> bool {
    let own_identity = ["alpha", "bravo"].iter().any(|node| {
        let file = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let key = what.starts_with(&format!("{node}'s TLS key"))
            || what.starts_with(&format!("{node}'s WireGuard key"));
        key && path.parent() == Some(&Path::new(node).join("state")) && IDENTITY_FILES.contains(&file)
    });
    // The service's file, and the node's own copy, from which it puts the old pair back when a hook fails.
    let own_pair = what.starts_with("the pair's key")
        && path.starts_with("alpha")
        && (path.file_name().is_some_and(|name| name == "key.pem")
            || path == Path::new("alpha/state/pairs.json"));
    own_identity || own_pair
}

/// Owner, kind and bytes of every private key of the nodes.
fn keys_of(fleet: &Fleet, nodes: &[&str]) -> Vec<(String, &'static str, Vec<u8>)> {
    let mut keys = Vec::new();
    for node in nodes {
        let identity = identity_file(fleet, node);
        keys.push(((*node).to_owned(), "TLS key", scalar(&decoded(&identity["tls_key"]))));
        for key in identity["wireguard_keys"].as_array().unwrap() {
            keys.push(((*node).to_owned(), "WireGuard key", decoded(key)));
        }
    }
    keys
}
