//! OCSP as `openssl ocsp`, GnuTLS's `ocsptool` and a plain HTTP client see it.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use base64::Engine as _;
use mesh_ca::{OcspStatus, RevocationReason, parse_ocsp_response};
use mesh_controller::{Publishing, RunConfig};
use mesh_lab::transcript::assert_shown;
use mesh_proto::v1 as pb;
use pb::certificates_client::CertificatesClient;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use x509_parser::prelude::FromDer as _;

use crate::harness::{Identity, Mesh, Node, Running, operation};
use crate::publishing::PAGE;

pub(crate) const BASE: &str = "http://pki.mesh.internal";

/// Certificates on disk for the judges.
pub(crate) struct Files {
    folder: tempfile::TempDir,
    pub(crate) address: SocketAddr,
}

impl Files {
    pub(crate) fn new(node: &Node, address: SocketAddr) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let files = Self { folder, address };
        files.write("issuer.pem", &node.enrolled.issuers[0]);
        files.write("root.pem", &node.enrolled.roots[0]);
        files
    }

    fn write(&self, name: &str, der: &[u8]) -> PathBuf {
        let path = self.folder.path().join(name);
        std::fs::write(&path, mesh_ca::bundle::encode_certificates([der])).unwrap();
        path
    }

    async fn run(&self, program: &'static str, args: &[&str]) -> (bool, String) {
        let mut command = Command::new(program);
        command.args(args).current_dir(self.folder.path());
        let output = tokio::task::spawn_blocking(move || command.output().expect(program)).await.unwrap();
        let text = [output.stderr, output.stdout].concat();
        (output.status.success(), String::from_utf8_lossy(&text).into_owned())
    }

    /// What `openssl ocsp` says of a certificate.
    async fn openssl(&self, certificate: &Path, more: &[&str]) -> String {
        let url = format!("http://{}/ocsp", self.address);
        let certificate = certificate.display().to_string();
        let mut args = vec!["ocsp", "-issuer", "issuer.pem"];
        args.extend(more);
        args.extend([
            "-cert",
            &certificate,
            "-CAfile",
            "root.pem",
            "-verify_other",
            "issuer.pem",
            "-url",
            &url,
        ]);
        self.run("openssl", &args).await.1
    }
}

pub(crate) async fn start(mesh: &Mesh) -> Running {
    let config = RunConfig {
        publish_listen: vec!["127.0.0.1:0".parse().unwrap()],
        publishing: Publishing { url: Some(BASE.into()), shards: 2 },
        ..mesh.run_config()
    };
    mesh.start_config(config, None).await
}

pub(crate) fn serial(identity: &Identity) -> Vec<u8> {
    let (_, certificate) = x509_parser::certificate::X509Certificate::from_der(&identity.leaf).unwrap();
    certificate.raw_serial().to_vec()
}

pub(crate) async fn revoke(running: &Running, serial: &[u8]) {
    let request = pb::RevokeCertificateRequest {
        which: Some(pb::revoke_certificate_request::Which::Serial(serial.to_vec().into())),
        reason: "key-compromise".into(),
        wait_secs: 0,
        operation_id: operation().into(),
    };
    let revoked = CertificatesClient::new(running.local().await).revoke(request).await.unwrap().into_inner();
    assert!(revoked.changed);
}

#[tokio::test(flavor = "multi_thread")]
async fn openssl_and_gnutls_believe_the_delegate() {
    let mesh = Mesh::init();
    let running = start(&mesh).await;
    let alpha = running.enroll("alpha").await;
    let files = Files::new(&alpha, mesh.web()[0]);
    let service = running.service(&alpha, "web.alpha.mesh.internal", "peer").await;
    let leaf = files.write("cert.pem", &service.leaf);

    // The certificate says where to ask.
    let (_, text) = files.run("openssl", &["x509", "-in", "cert.pem", "-noout", "-ocsp_uri"]).await;
    assert_eq!(text.trim(), format!("{BASE}/ocsp"));
    for hash in ["-sha1", "-sha256"] {
        for nonce in ["-nonce", "-no_nonce"] {
            let said = files.openssl(&leaf, &[hash, nonce]).await;
            assert!(
                said.contains("Response verify OK") && said.contains("cert.pem: good"),
                "{hash} {nonce}: {said}"
            );
            assert!(!said.contains("WARNING"), "{said}");
        }
    }
    let url = format!("http://{}/ocsp", files.address);
    let ask = format!("--ask={url}");
    let gnutls = [
        ask.as_str(),
        "--load-cert",
        "cert.pem",
        "--load-issuer",
        "issuer.pem",
        "--load-trust",
        "issuer.pem",
    ];
    let (success, said) = files.run("ocsptool", &gnutls).await;
    assert!(success && said.contains("Certificate Status: good"), "{said}");

    // Revoked: the answer of a second ago is not handed out again.
    revoke(&running, &serial(&service)).await;
    for nonce in ["-nonce", "-no_nonce"] {
        let said = files.openssl(&leaf, &[nonce]).await;
        assert!(said.contains("cert.pem: revoked") && said.contains("Reason: keyCompromise"), "{said}");
        let shown =
            said.replace(&files.folder.path().display().to_string(), "").replace("/cert.pem", "cert.pem");
        assert_shown(PAGE, "openssl ocsp", &[], &shown);
    }
    let (_, said) = files.run("ocsptool", &gnutls).await;
    assert!(said.contains("Certificate Status: revoked"), "{said}");

    // Never issued here: not good. Another CA: no answer at all.
    let args = ["ocsp", "-issuer", "issuer.pem", "-serial", "0x4141414141414141", "-CAfile", "root.pem"];
    let (_, said) =
        files.run("openssl", &[&args[..], &["-verify_other", "issuer.pem", "-url", &url]].concat()).await;
    assert!(said.contains("0x4141414141414141: unknown"), "{said}");
    let other = files.write("other.pem", &alpha.enrolled.roots[0]);
    let args = ["ocsp", "-issuer", "root.pem", "-cert", "issuer.pem", "-CAfile", "root.pem", "-url", &url];
    let (_, said) = files.run("openssl", &args).await;
    assert!(said.contains("unauthorized"), "{} {said}", other.display());
    running.stop().await.unwrap();
}

/// One GET or POST by hand; status line, head and body.
pub(crate) async fn exchange(address: SocketAddr, head: &str, body: &[u8]) -> (String, Vec<u8>) {
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    stream.write_all(format!("{head}host: x\r\nconnection: close\r\n\r\n").as_bytes()).await.unwrap();
    let _ = stream.write_all(body).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n").expect("a head");
    (String::from_utf8_lossy(&answer[..end]).to_ascii_lowercase(), answer[end + 4..].to_vec())
}

/// A request as `openssl` writes it.
pub(crate) async fn request(files: &Files, serial: &[u8], nonce: bool) -> Vec<u8> {
    let serial = format!("0x{}", hex::encode(serial));
    let nonce = if nonce { "-nonce" } else { "-no_nonce" };
    let args = ["ocsp", "-issuer", "issuer.pem", "-serial", &serial, nonce, "-reqout", "request.der"];
    let (success, said) = files.run("openssl", &args).await;
    assert!(success, "{said}");
    std::fs::read(files.folder.path().join("request.der")).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn get_and_post_say_the_same_and_caches_are_told_how_long() {
    let mesh = Mesh::init();
    let running = start(&mesh).await;
    let alpha = running.enroll("alpha").await;
    let files = Files::new(&alpha, mesh.web()[0]);
    let serial = serial(&alpha.identity);
    let issuer = &alpha.enrolled.issuers[0];
    let plain = request(&files, &serial, false).await;
    let encoded = base64::engine::general_purpose::STANDARD.encode(&plain);
    let escaped = encoded.replace('+', "%2B").replace('/', "%2F").replace('=', "%3D");
    let post = |body: &[u8]| {
        let length = body.len();
        format!(
            "POST /ocsp HTTP/1.1\r\ncontent-type: application/ocsp-request\r\ncontent-length: {length}\r\n"
        )
    };

    let (head, first) = exchange(files.address, &format!("GET /ocsp/{encoded} HTTP/1.1\r\n"), b"").await;
    assert!(head.starts_with("http/1.1 200") && head.contains("application/ocsp-response"), "{head}");
    assert!(
        head.contains("etag: ") && head.contains("max-age=600") && head.contains("last-modified"),
        "{head}"
    );
    let parsed = parse_ocsp_response(&first, issuer, time::UtcDateTime::now()).unwrap();
    assert_eq!(parsed.status, OcspStatus::Good);
    for (head, body) in [(format!("GET /ocsp/{escaped} HTTP/1.1\r\n"), &b""[..]), (post(&plain), &plain[..])]
    {
        let (_, again) = exchange(files.address, &head, body).await;
        assert_eq!(again, first, "signed once");
    }
    let etag = head.lines().find_map(|line| line.strip_prefix("etag: ")).unwrap();
    let conditional = format!("GET /ocsp/{encoded} HTTP/1.1\r\nif-none-match: {etag}\r\n");
    let (head, body) = exchange(files.address, &conditional, b"").await;
    assert!(head.starts_with("http/1.1 304") && body.is_empty(), "{head}");

    // A nonce is echoed and such an answer kept by nobody.
    let nonced = request(&files, &serial, true).await;
    let (head, answer) = exchange(files.address, &post(&nonced), &nonced).await;
    assert!(head.contains("no-store"), "{head}");
    let parsed = parse_ocsp_response(&answer, issuer, time::UtcDateTime::now()).unwrap();
    assert!(parsed.nonce.is_some_and(|nonce| nonced.windows(nonce.len()).any(|part| part == nonce)));

    // What is no request.
    let large = vec![0x30; 5_000];
    for (what, head, body, status, wanted) in [
        ("no DER", post(b"\x30\x03abc"), &b"\x30\x03abc"[..], "200", &b"\x30\x03\x0a\x01\x01"[..]),
        ("nothing", post(b""), b"", "200", b"\x30\x03\x0a\x01\x01"),
        ("too much", post(&large), &large, "413", b"too large\n"),
        ("no base64", "GET /ocsp/%zz HTTP/1.1\r\n".into(), b"", "200", b"\x30\x03\x0a\x01\x01"),
        ("no request", "GET /ocsp HTTP/1.1\r\n".into(), b"", "404", b"not found\n"),
        (
            "a form",
            "POST /ocsp HTTP/1.1\r\ncontent-length: 0\r\n".into(),
            b"",
            "415",
            b"only application/ocsp-request\n",
        ),
        (
            "another method",
            "PUT /ocsp HTTP/1.1\r\ncontent-length: 0\r\n".into(),
            b"",
            "405",
            b"only GET, HEAD and POST\n",
        ),
    ] {
        let (head, answer) = exchange(files.address, &head, body).await;
        assert!(head.starts_with(&format!("http/1.1 {status}")), "{what}: {head}");
        assert_eq!(answer, wanted, "{what}");
    }
    running.stop().await.unwrap();
}

/// Each nonce costs a signature, and no more are made at a time than the controller can spare: whoever comes meanwhile
/// gets the answer that is there, without the nonce (RFC 9654 §2.1), and nobody waits or gets a wrong one.
#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_nonces_is_answered_with_what_there_is() {
    const CALLERS: usize = 48;
    let mesh = Mesh::init();
    let running = start(&mesh).await;
    let alpha = running.enroll("alpha").await;
    let files = Files::new(&alpha, mesh.web()[0]);
    let serial = serial(&alpha.identity);
    let issuer = alpha.enrolled.issuers[0].clone();
    let post = |length: usize| {
        format!(
            "POST /ocsp HTTP/1.1\r\ncontent-type: application/ocsp-request\r\ncontent-length: {length}\r\n"
        )
    };
    // The answer that is there.
    let plain = request(&files, &serial, false).await;
    exchange(files.address, &post(plain.len()), &plain).await;
    let nonced = request(&files, &serial, true).await;
    // OpenSSL's nonce stands at the end of its request: 16 octets, another for each caller.
    let mut callers = tokio::task::JoinSet::new();
    for number in 0..CALLERS {
        let (mut body, head, address) = (nonced.clone(), post(nonced.len()), files.address);
        let at = body.len() - 1;
        body[at] ^= u8::try_from(number).unwrap();
        callers.spawn(async move { (body[at - 15..].to_vec(), exchange(address, &head, &body).await) });
    }
    let mut echoed = 0;
    for (nonce, (head, answer)) in callers.join_all().await {
        assert!(head.starts_with("http/1.1 200") && head.contains("no-store"), "{head}");
        let parsed = parse_ocsp_response(&answer, &issuer, time::UtcDateTime::now()).unwrap();
        assert_eq!(parsed.status, OcspStatus::Good);
        if let Some(theirs) = parsed.nonce {
            assert_eq!(theirs, nonce, "the nonce of somebody else");
            echoed += 1;
        }
    }
    assert!(echoed > 0, "none of {CALLERS} was signed for");
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_gets_what_its_services_staple() {
    let mesh = Mesh::init();
    let running = start(&mesh).await;
    let alpha = running.enroll("alpha").await;
    let service = running.service(&alpha, "web.alpha.mesh.internal", "peer").await;
    let mut client = CertificatesClient::new(running.member(&alpha.identity).await);
    let wanted = |serials: &[Vec<u8>]| pb::CrlsRequest {
        ocsp_of: serials.iter().map(|serial| serial.clone().into()).collect(),
        ..Default::default()
    };
    let unknown = vec![0x41; 16];
    let answer = client.crls(wanted(&[serial(&service), unknown])).await.unwrap().into_inner();
    let [response] = answer.ocsp.as_slice() else { panic!("{} responses", answer.ocsp.len()) };
    let issuer = &alpha.enrolled.issuers[0];
    let now = time::UtcDateTime::now();
    let parsed = parse_ocsp_response(&response.der, issuer, now).unwrap();
    assert_eq!(
        (parsed.status, parsed.next_update.unix_timestamp()),
        (OcspStatus::Good, response.next_update)
    );
    assert_eq!(parsed.serial.unwrap().as_bytes().to_vec(), serial(&service));

    revoke(&running, &serial(&service)).await;
    let answer = client.crls(wanted(&[serial(&service)])).await.unwrap().into_inner();
    let parsed = parse_ocsp_response(&answer.ocsp[0].der, issuer, now).unwrap();
    assert!(
        matches!(parsed.status, OcspStatus::Revoked { reason: RevocationReason::KeyCompromise, .. }),
        "{:?}",
        parsed.status
    );
    let many = vec![vec![0x41; 16]; 513];
    assert_eq!(client.crls(wanted(&many)).await.unwrap_err().code(), tonic::Code::InvalidArgument);
    running.stop().await.unwrap();
}

/// Cached answers over HTTP/1.1, requests and client included, on one connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement: make bench-ocsp"]
async fn rate_of_cached_answers() {
    const ROUNDS: usize = 2_000;
    const BATCH: usize = 32;
    let mesh = Mesh::init();
    let running = start(&mesh).await;
    let alpha = running.enroll("alpha").await;
    let files = Files::new(&alpha, mesh.web()[0]);
    let plain = request(&files, &serial(&alpha.identity), false).await;
    let path = base64::engine::general_purpose::STANDARD.encode(&plain);
    let one = format!("GET /ocsp/{path} HTTP/1.1\r\nhost: x\r\n\r\n");
    let mut stream = tokio::net::TcpStream::connect(files.address).await.unwrap();
    stream.write_all(one.as_bytes()).await.unwrap();
    let mut buffer = vec![0; 1 << 20];
    let length = stream.read(&mut buffer).await.unwrap();
    let batch = one.repeat(BATCH).into_bytes();
    let (began, cpu) = (Instant::now(), cpu_time());
    for _ in 0..ROUNDS {
        stream.write_all(&batch).await.unwrap();
        stream.read_exact(&mut buffer[..length * BATCH]).await.unwrap();
    }
    let (elapsed, used) = (began.elapsed(), cpu_time() - cpu);
    let count = (ROUNDS * BATCH) as f64;
    println!(
        "ocsp: {:.0} responses/s by the clock, {:.1} us CPU each, {:.0}/s per core (client included)",
        count / elapsed.as_secs_f64(),
        used.as_secs_f64() * 1e6 / count,
        count / used.as_secs_f64()
    );
    assert!(count / used.as_secs_f64() >= 20_000.0, "fewer than 20,000 responses a second on one core");
    running.stop().await.unwrap();
}

/// User and system time of this process.
fn cpu_time() -> Duration {
    let mut total = Duration::ZERO;
    for task in std::fs::read_dir("/proc/self/task").unwrap().flatten() {
        let stat = std::fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
        let nanoseconds = stat.split(' ').next().and_then(|text| text.parse().ok()).unwrap_or(0);
        total += Duration::from_nanos(nanoseconds);
    }
    total
}
