//! What certificates point to, fetched by curl over plain HTTP from another machine: on the controller's own network,
//! and on the mesh, at the address of a node that lives on the controller's host.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf};

use mesh_tests::{CONTROLLER, Fleet, Ran, binary, fleet_test};

/// Where the world looks; curl is told which of our addresses that is.
const HOST: &str = "pki.mesh.internal";
const PORT: u16 = 8080;
const NAME: &str = "shop.alpha.mesh.internal";
/// The node on the controller's host.
const HUB: &str = "hub";

fn base() -> String {
    format!("http://{HOST}:{PORT}")
}

fn start_hub(fleet: &mut Fleet) {
    let folder = fleet.path(HUB);
    let mut command = fleet.command(CONTROLLER, binary("meshd"), &["node", "run"]);
    command.arg("--state-dir").arg(folder.join("state")).arg("--socket").arg(folder.join("meshd.sock"));
    command.arg("--certs-dir").arg(folder.join("certs.d"));
    fleet.processes.spawn(HUB, command).unwrap();
    fleet.until("the hub answers on its socket", |fleet| hub(fleet, &["status", "-o", "json"]).code == 0);
}

fn hub(fleet: &Fleet, args: &[&str]) -> Ran {
    let socket = fleet.path(HUB).join("meshd.sock").display().to_string();
    fleet.on(CONTROLLER, binary("meshctl").to_str().unwrap(), &[&["--socket", &socket], args].concat())
}

struct Answer {
    status: u16,
    headers: BTreeMap<String, String>,
    /// The file with the body.
    body: PathBuf,
}

impl Answer {
    fn bytes(&self) -> Vec<u8> {
        std::fs::read(&self.body).unwrap_or_default()
    }

    /// Seconds for which a cache may keep it.
    fn max_age(&self) -> u64 {
        let text = &self.headers["cache-control"];
        let age = text.split(", ").find_map(|part| part.strip_prefix("max-age=")).expect(text);
        assert!(text.contains("public") && !text.contains("no-store"), "{text}");
        age.parse().unwrap()
    }
}

/// One request of curl's from alpha to `address`.
fn curl(fleet: &Fleet, address: IpAddr, url: &str, args: &[&str]) -> Answer {
    let folder = fleet.path("alpha");
    let (head, body) = (folder.join("head"), folder.join("body"));
    for old in [&head, &body] {
        let _ = std::fs::remove_file(old);
    }
    let resolve = format!("{HOST}:{PORT}:{address}");
    let (head_text, body_text) = (head.display().to_string(), body.display().to_string());
    let fixed = ["-sS", "--max-time", "10", "--resolve", &resolve, "-D", &head_text, "-o", &body_text];
    fleet.on("alpha", "curl", &[&fixed[..], args, &[url]].concat()).ok();
    let head = std::fs::read_to_string(head).unwrap();
    let mut lines = head.lines();
    let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    let headers = lines.filter_map(|line| line.split_once(": "));
    let headers = headers.map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned())).collect();
    Answer { status, headers, body }
}

/// CRL, issuing CA and OCSP request, as the certificate says where they are.
struct Pointers {
    crl: String,
    issuer: String,
    /// A GET of RFC 6960 §A.1.
    ocsp: String,
}

impl Pointers {
    fn of(fleet: &Fleet, pair: &std::path::Path) -> Self {
        let file = |name: &str| pair.join(name).display().to_string();
        let text = |args: &[&str]| fleet.on("alpha", "openssl", args).ok().stdout;
        let (cert, issuer, request) = (file("cert.pem"), file("issuer.pem"), file("request.der"));
        let shown =
            text(&["x509", "-in", &cert, "-noout", "-ext", "crlDistributionPoints,authorityInfoAccess"]);
        let after = |mark: &str| {
            let at = shown.find(mark).unwrap_or_else(|| panic!("no {mark} in {shown}")) + mark.len();
            shown[at..].split_whitespace().next().unwrap().to_owned()
        };
        let pem = std::fs::read_to_string(pair.join("cert.pem")).unwrap();
        let second = pem.rfind("-----BEGIN").unwrap();
        std::fs::write(pair.join("issuer.pem"), &pem[second..]).unwrap();
        let ask = ["ocsp", "-issuer", &issuer, "-cert", &cert, "-no_nonce", "-reqout", &request];
        text(&ask);
        let encoded = text(&["base64", "-A", "-in", &request]);
        let escaped = encoded.trim().replace('+', "%2B").replace('/', "%2F").replace('=', "%3D");
        let responder = after("OCSP - URI:");
        Self {
            crl: after("Full Name:\n      URI:"),
            issuer: after("CA Issuers - URI:"),
            ocsp: format!("{responder}/{escaped}"),
        }
    }

    fn all(&self) -> [(&str, &str); 3] {
        [
            (&self.crl, "application/pkix-crl"),
            (&self.issuer, "application/pkix-cert"),
            (&self.ocsp, "application/ocsp-response"),
        ]
    }
}

/// Each document with its validator, for how long it may be kept, and not sent again to who has it.
fn cached_as_told(fleet: &Fleet, address: IpAddr, pointers: &Pointers) {
    for (url, kind) in pointers.all() {
        assert!(url.starts_with(&base()), "{url}");
        let first = curl(fleet, address, url, &[]);
        assert_eq!((first.status, first.headers["content-type"].as_str()), (200, kind), "{url}");
        let (tag, age) = (&first.headers["etag"], first.max_age());
        assert!(tag.starts_with('"') && tag.ends_with('"') && tag.len() > 10, "{tag}");
        assert!((1..=24 * 3600).contains(&age), "{url}: {age}");
        // A revocation is not hidden behind a cache for longer than that.
        assert!(kind == "application/pkix-cert" || age <= 600, "{url}: {age}");
        assert!(!first.bytes().is_empty());
        for header in [format!("If-None-Match: {tag}"), format!("If-None-Match: \"other\", {tag}")] {
            let again = curl(fleet, address, url, &["-H", &header]);
            assert_eq!((again.status, again.bytes().len()), (304, 0), "{url} {header}");
            assert_eq!(again.headers["etag"], *tag);
            assert!(again.max_age() <= age);
        }
        let other = curl(fleet, address, url, &["-H", "If-None-Match: \"other\""]);
        assert_eq!((other.status, other.bytes() == first.bytes()), (200, true), "{url}");
    }
    let issuer = curl(fleet, address, &pointers.issuer, &[]).body.display().to_string();
    let subject =
        fleet.on("alpha", "openssl", &["x509", "-inform", "DER", "-in", &issuer, "-noout", "-subject"]);
    assert!(subject.ok().stdout.contains("issuing"), "the CA that signed it");
}

#[test]
fn what_certificates_point_to_is_fetched_on_the_mesh_and_beside_it() {
    fleet_test("published::what_certificates_point_to_is_fetched_on_the_mesh_and_beside_it", || {
        let mut fleet = Fleet::without_controller();
        fleet.init_controller_with(&["--publish-url", &base()]);
        fleet.start_controller();
        fleet.add_host("alpha");
        fleet.start_node("alpha");
        fleet.enroll("alpha", &[]);
        std::fs::create_dir_all(fleet.path(HUB)).unwrap();
        start_hub(&mut fleet);
        hub(&fleet, &["enroll", &fleet.token(&[]), "--name", HUB]).ok();
        let (on_mesh, _) = fleet.addresses(HUB);
        let beside = fleet.host(CONTROLLER).ipv4().unwrap();
        fleet.until("alpha reaches the hub", |fleet| fleet.pings("alpha", on_mesh));

        // After a boot of that machine the controller is there before the mesh's interface.
        fleet.processes.stop(HUB).unwrap();
        fleet.processes.stop(CONTROLLER).unwrap();
        let listen = format!("{beside}:{PORT},{on_mesh}:{PORT}");
        fleet.start_controller_with(&[("MESH_PUBLISH_LISTEN", &listen)]);
        let log = fleet.processes.log(CONTROLLER);
        assert!(log.contains("does not have the address yet"), "{log}");
        start_hub(&mut fleet);
        fleet.until("alpha is back at the controller", |fleet| {
            fleet.controller(&["node", "show", "alpha", "-o", "json"]).json()["connected"] == true
        });

        let pair = fleet.path("alpha").join("tls");
        let out = pair.display().to_string();
        fleet.meshctl("alpha", &["cert", "issue", NAME, "--profile", "server", "--out", &out]).ok();
        let pointers = Pointers::of(&fleet, &pair);
        let url = format!("http://{on_mesh}:{PORT}/");
        fleet.until("the mesh's address is served", |fleet| {
            fleet.on("alpha", "curl", &["-sS", "--max-time", "2", &url]).stdout == "not found\n"
        });
        for address in [beside, on_mesh] {
            cached_as_told(&fleet, address, &pointers);
        }

        // A revocation changes list and answer, and with them their tags: who has the old ones gets the new ones.
        let tags = [&pointers.crl, &pointers.ocsp]
            .map(|url| format!("If-None-Match: {}", curl(&fleet, on_mesh, url, &[]).headers["etag"]));
        let serial = {
            let cert = pair.join("cert.pem").display().to_string();
            let shown =
                fleet.on("alpha", "openssl", &["x509", "-in", &cert, "-noout", "-serial"]).ok().stdout;
            shown.trim().strip_prefix("serial=").unwrap().to_owned()
        };
        fleet.controller(&["cert", "revoke", NAME, "--reason", "key-compromise"]).ok();
        let issuer = pair.join("issuer.pem").display().to_string();
        for address in [beside, on_mesh] {
            let list = curl(&fleet, address, &pointers.crl, &["-H", &tags[0]]);
            assert_eq!(list.status, 200);
            let file = list.body.display().to_string();
            let crl = ["crl", "-inform", "DER", "-in", &file, "-noout", "-text", "-CAfile", &issuer];
            let shown = fleet.on("alpha", "openssl", &crl).ok();
            assert!(shown.stdout.contains(&serial) && shown.stderr.contains("verify OK"), "{shown}");
            let answer = curl(&fleet, address, &pointers.ocsp, &["-H", &tags[1]]);
            assert_eq!(answer.status, 200);
            let file = answer.body.display().to_string();
            let shown = fleet.on("alpha", "openssl", &["ocsp", "-respin", &file, "-resp_text", "-noverify"]);
            assert!(shown.stdout.contains("Cert Status: revoked"), "{shown}");
            assert!(shown.stdout.contains(&format!("Serial Number: {serial}")), "{shown}");
        }
    });
}
