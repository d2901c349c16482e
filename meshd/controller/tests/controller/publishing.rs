//! What certificates point to: shards, plain HTTP, and that both say the same; asked by a real curl.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use mesh_ca::Crl;
use mesh_controller::{Publishing, RunConfig};
use mesh_lab::transcript::assert_shown;
use mesh_proto::v1 as pb;
use pb::certificates_client::CertificatesClient;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use x509_parser::extensions::{DistributionPointName, GeneralName, ParsedExtension};
use x509_parser::prelude::FromDer as _;

use crate::harness::{Identity, Mesh, Node, Running, SyncStream, operation, within};

/// What it says is held against what curl and OpenSSL say.
pub(crate) const PAGE: &str = include_str!("../../../../docs/certificates.md");

const BASE: &str = "http://pki.mesh.internal/mesh";

struct Answer {
    status: u16,
    headers: BTreeMap<String, String>,
    body: Vec<u8>,
}

/// Asks with curl, as anybody would.
async fn curl(address: SocketAddr, path: &str, args: &[&str]) -> Answer {
    let url = format!("http://{address}{path}");
    let mut command = Command::new("curl");
    command.args(["--silent", "--show-error", "--max-time", "20", "--path-as-is"]);
    // With --head the headers are the output already.
    if !args.contains(&"--head") {
        command.args(["--dump-header", "-"]);
    }
    command.args(args).arg(url);
    let output =
        tokio::task::spawn_blocking(move || command.output().expect("curl is installed")).await.unwrap();
    assert!(output.status.success(), "curl: {}", String::from_utf8_lossy(&output.stderr));
    let end = output.stdout.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
    let head = String::from_utf8(output.stdout[..end].to_vec()).unwrap();
    let mut lines = head.lines();
    let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    let headers = lines.map(|line| line.split_once(": ").unwrap());
    let headers = headers.map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned())).collect();
    Answer { status, headers, body: output.stdout[end + 4..].to_vec() }
}

fn published(mesh: &Mesh) -> RunConfig {
    RunConfig {
        publish_listen: vec!["127.0.0.1:0".parse().unwrap(), "[::1]:0".parse().unwrap()],
        publishing: Publishing { url: Some(BASE.into()), shards: 3 },
        ..mesh.run_config()
    }
}

/// The one CRL address of a certificate.
pub(crate) fn pointer(der: &[u8]) -> Option<String> {
    let (_, certificate) = x509_parser::certificate::X509Certificate::from_der(der).unwrap();
    let found = certificate.extensions().iter().find_map(|extension| match extension.parsed_extension() {
        ParsedExtension::CRLDistributionPoints(points) => Some((extension.critical, points)),
        _ => None,
    });
    let (critical, points) = found?;
    assert!(!critical, "checklist 17");
    let [point] = points.points.as_slice() else { panic!("{} points", points.points.len()) };
    let Some(DistributionPointName::FullName(names)) = &point.distribution_point else { panic!("no name") };
    let [GeneralName::URI(url)] = names.as_slice() else { panic!("{names:?}") };
    Some((*url).to_owned())
}

fn path_of(url: &str) -> &str {
    url.strip_prefix("http://pki.mesh.internal").unwrap()
}

async fn revoke(running: &Running, serial: &[u8]) -> pb::RevokeResponse {
    let request = pb::RevokeCertificateRequest {
        which: Some(pb::revoke_certificate_request::Which::Serial(serial.to_vec().into())),
        reason: "superseded".into(),
        wait_secs: 0,
        operation_id: operation().into(),
    };
    CertificatesClient::new(running.local().await).revoke(request).await.unwrap().into_inner()
}

fn serial(identity: &Identity) -> Vec<u8> {
    let (_, certificate) = x509_parser::certificate::X509Certificate::from_der(&identity.leaf).unwrap();
    certificate.raw_serial().to_vec()
}

async fn services(running: &Running, node: &Node, count: usize) -> Vec<Identity> {
    let mut issued = Vec::new();
    for number in 0..count {
        issued.push(running.service(node, &format!("s{number}.alpha.mesh.internal"), "peer").await);
    }
    issued
}

#[tokio::test(flavor = "multi_thread")]
async fn curl_fetches_what_certificates_point_to_and_nothing_else() {
    let mesh = Mesh::init();
    let running = mesh.start_config(published(&mesh), None).await;
    let alpha = running.enroll("alpha").await;
    let web = mesh.web();
    assert_eq!(web.len(), 2);

    // Each certificate names the CRL that covers it, on both addresses, with and without the base's own path.
    let url = pointer(&alpha.identity.leaf).unwrap();
    let issuer = &alpha.enrolled.issuers[0];
    assert!(url.starts_with(BASE), "{url}");
    let mut command = Command::new("curl");
    command.args(["-si", "--max-time", "20"]).arg(format!("http://{}{}", web[0], path_of(&url)));
    let output =
        tokio::task::spawn_blocking(move || command.output().expect("curl is installed")).await.unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert_shown(PAGE, "curl -si", &[], &text.lines().take(8).collect::<Vec<_>>().join("\n"));
    for address in &web {
        for path in [path_of(&url), path_of(&url).strip_prefix("/mesh").unwrap()] {
            let answer = curl(*address, path, &[]).await;
            assert_eq!(
                (answer.status, answer.headers["content-type"].as_str()),
                (200, "application/pkix-crl")
            );
            let crl = Crl::parse_verified(&answer.body, issuer).unwrap();
            assert!(crl.is_empty());
            assert_eq!(answer.headers["content-length"], answer.body.len().to_string());
        }
    }

    // The authorities, as AIA wants them.
    let (_, leaf) = x509_parser::certificate::X509Certificate::from_der(issuer).unwrap();
    let key_id = path_of(&url).split('/').nth(3).unwrap();
    let answer = curl(web[0], &format!("/ca/{key_id}.cer"), &[]).await;
    assert_eq!((answer.status, answer.headers["content-type"].as_str()), (200, "application/pkix-cert"));
    assert_eq!(answer.body, issuer.to_vec(), "{}", leaf.subject());

    // Caching.
    let first = curl(web[0], path_of(&url), &[]).await;
    let tag = format!("If-None-Match: {}", first.headers["etag"]);
    let since = format!("If-Modified-Since: {}", first.headers["last-modified"]);
    for asked in [&tag, &since] {
        let answer = curl(web[0], path_of(&url), &["--header", asked]).await;
        assert_eq!((answer.status, answer.body.len()), (304, 0), "{asked}");
    }
    let age: u64 = first.headers["cache-control"].split(['=', ',']).nth(2).unwrap().parse().unwrap();
    let crl = Crl::parse_verified(&first.body, issuer).unwrap();
    let left = (crl.next_update() - time::UtcDateTime::now()).whole_seconds();
    assert!(age > 0 && i64::try_from(age).unwrap() < left, "{age} of {left}");
    let head = curl(web[0], path_of(&url), &["--head"]).await;
    assert_eq!((head.status, head.body.len()), (200, 0));
    assert_eq!(head.headers["content-length"], first.headers["content-length"]);

    // Nothing else.
    for path in [
        "/",
        "/crl/",
        "/crl",
        "/ca/",
        "/mesh",
        "/mesh/crl/../crl/x",
        "/../../etc/passwd",
        "/crl/%2e%2e/x.crl",
        &format!("/crl/{key_id}/99.crl"),
        &format!("/crl/{key_id}/01.crl"),
        &format!("/crl/{}/1.crl", key_id.to_uppercase()),
        &format!("/crl/{key_id}/1.crl/"),
        &format!("/ca/{}.cer", "00".repeat(20)),
        "/mesh.v1.Fleet/Status",
    ] {
        assert_eq!(curl(web[0], path, &[]).await.status, 404, "{path}");
    }
    for method in ["POST", "PUT", "DELETE", "OPTIONS", "TRACE"] {
        let answer = curl(web[0], path_of(&url), &["--request", method]).await;
        assert_eq!((answer.status, answer.headers["allow"].as_str()), (405, "GET, HEAD"), "{method}");
    }
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revocation_changes_one_shard_and_nodes_fetch_only_that() {
    let mesh = Mesh::init();
    let running = mesh.start_config(published(&mesh), None).await;
    let (alpha, bravo) = (running.enroll("alpha").await, running.enroll("bravo").await);
    let issued = services(&running, &alpha, 12).await;
    let issuer = &alpha.enrolled.issuers[0];
    let mut by_url: BTreeMap<String, Vec<&Identity>> = BTreeMap::new();
    for identity in &issued {
        by_url.entry(pointer(&identity.leaf).unwrap()).or_default().push(identity);
    }
    assert!(by_url.len() > 1, "twelve random serials in one shard of three");
    let web = mesh.web()[0];
    let mut client = CertificatesClient::new(running.member(&alpha.identity).await);
    let before = client.crls(pb::CrlsRequest::default()).await.unwrap().into_inner().crls;
    let (mut stream, full) = SyncStream::of(&running, &bravo).await;
    assert_eq!(full.crls.len(), before.len(), "three shards and the root");
    assert_eq!(before.len(), 4);

    let (url, victims) = by_url.iter().next().unwrap();
    let mut tags = BTreeMap::new();
    for url in by_url.keys() {
        tags.insert(url, curl(web, path_of(url), &[]).await.headers["etag"].clone());
    }
    let revoked = revoke(&running, &serial(victims[0])).await;
    assert!(revoked.changed);
    for (other, tag) in &tags {
        let changed = curl(web, path_of(other), &[]).await.headers["etag"] != *tag;
        assert_eq!(changed, *other == url, "{other}");
    }
    let listed = curl(web, path_of(url), &[]).await;
    let crl = Crl::parse_verified(&listed.body, issuer).unwrap();
    assert!(crl.contains(&mesh_ca::SerialNumber::from_slice(&serial(victims[0])).unwrap()));
    assert_eq!((crl.len(), crl.number()), (1, revoked.crl_number));

    // The stream names one CRL, and asked with what it has a node gets one.
    let delta = loop {
        let delta = stream.delta().await;
        if !delta.crls.is_empty() {
            break delta;
        }
    };
    assert_eq!(delta.crls.len(), 1);
    let have = before.iter().map(|crl| pb::CrlHave {
        issuer_key_id: crl.issuer_key_id.clone(),
        shard: crl.shard,
        number: crl.number,
    });
    let request = pb::CrlsRequest { have: have.collect(), ..Default::default() };
    let newer = client.crls(request).await.unwrap().into_inner().crls;
    assert_eq!(newer.iter().map(|crl| &crl.der[..]).collect::<Vec<_>>(), [&listed.body[..]]);

    // A restart takes them up as they are, and goes on with the next number.
    drop(stream);
    running.stop().await.unwrap();
    let running = mesh.start_config(published(&mesh), None).await;
    assert_eq!(curl(mesh.web()[0], path_of(url), &[]).await.body, listed.body);
    if let Some(second) = victims.get(1) {
        let revoked = revoke(&running, &serial(second)).await;
        assert_eq!(revoked.crl_number, crl.number() + 1);
    }
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_of_before_stay_covered_by_a_list_of_all() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    let alpha = running.enroll("alpha").await;
    let old = running.service(&alpha, "old.alpha.mesh.internal", "peer").await;
    assert_eq!(pointer(&old.leaf), None);
    running.stop().await.unwrap();

    let running = mesh.start_config(published(&mesh), None).await;
    let new = running.service(&alpha, "new.alpha.mesh.internal", "peer").await;
    assert!(pointer(&new.leaf).is_some());
    for identity in [&old, &new] {
        assert!(revoke(&running, &serial(identity)).await.changed);
    }
    let mut client = CertificatesClient::new(running.member(&alpha.identity).await);
    let crls = client.crls(pb::CrlsRequest::default()).await.unwrap().into_inner().crls;
    let issuer = &alpha.enrolled.issuers[0];
    let whole =
        crls.iter().find_map(|crl| Crl::parse_verified(&crl.der, issuer).ok().filter(|_| crl.shard == 0));
    let listed: Vec<Vec<u8>> =
        whole.unwrap().entries().map(|entry| entry.serial.as_bytes().to_vec()).collect();
    for identity in [&old, &new] {
        assert!(listed.contains(&serial(identity)), "a CRL without an address speaks for the whole issuer");
    }
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_clients_get_an_end() {
    let mesh = Mesh::init();
    let running = mesh.start_config(published(&mesh), None).await;
    let web = mesh.web()[0];
    let ended = async |sent: Vec<u8>| {
        let mut stream = tokio::net::TcpStream::connect(web).await.unwrap();
        // A server that ends early resets: what was not sent then says the same.
        let _ = stream.write_all(&sent).await;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        String::from_utf8_lossy(&answer).lines().next().unwrap_or_default().to_owned()
    };
    let many = "x: y\r\n".repeat(100);
    for (what, sent, status) in [
        ("not HTTP", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n".to_vec(), "400"),
        ("a long line", [b"GET /".to_vec(), vec![b'a'; 40_000]].concat(), "431"),
        ("many headers", format!("GET / HTTP/1.1\r\nhost: x\r\n{many}\r\n").into_bytes(), "431"),
        ("long headers", format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n", "a".repeat(40_000)).into_bytes(), "431"),
    ] {
        let line = within(Duration::from_secs(10), what, ended(sent)).await;
        assert!(line.is_empty() || line.contains(status), "{what}: {line}");
    }
    // One address holds some connections and no more; another one is not kept out.
    let mut held = Vec::new();
    for _ in 0..200 {
        held.push(tokio::net::TcpStream::connect(web).await.unwrap());
    }
    let mut refused = 0;
    for stream in &mut held {
        let mut byte = [0];
        if let Ok(Ok(0) | Err(_)) =
            tokio::time::timeout(Duration::from_millis(20), stream.read(&mut byte)).await
        {
            refused += 1;
        }
    }
    assert!((100..=200).contains(&refused), "{refused} of 200 connections were closed");
    let other = mesh.web()[1];
    assert_eq!(curl(other, "/", &[]).await.status, 404);
    drop(held);
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_cannot_be_used_ends_the_start() {
    let mesh = Mesh::init();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let config = RunConfig { publish_listen: vec![taken.local_addr().unwrap()], ..mesh.run_config() };
    let environment = || mesh_controller::Environment {
        clock: std::sync::Arc::new(mesh_runtime::SystemClock),
        journal: None,
    };
    let error = mesh_controller::Controller::build(config, environment()).await.unwrap_err();
    assert!(matches!(error, mesh_controller::StartupError::PortInUse { .. }), "{error}");
    for url in ["https://pki.mesh.internal", "http://pki.mesh.internal/", "pki.mesh.internal", "http://a/?q"]
    {
        let publishing = Publishing { url: Some(url.into()), shards: 4 };
        let config = RunConfig { publishing, ..mesh.run_config() };
        let error = mesh_controller::Controller::build(config, environment()).await.unwrap_err();
        assert!(
            matches!(error, mesh_controller::StartupError::Config { key: "publish_url", .. }),
            "{url}: {error}"
        );
    }
}
