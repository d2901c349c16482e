//! `meshctl probe`: HTTPS with mutual TLS on the files that `cert issue` writes. Hidden: for the demo and tests.

use std::{
    fs, io,
    io::{Read, Write},
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use mesh_ca::bundle;
use mesh_proto::v1::ErrorCode;
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, Stream,
    client::WebPkiServerVerifier,
    pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, pem::PemObject},
    server::WebPkiClientVerifier,
};
use serde_json::{Value, json};

use crate::{
    cert::Facts,
    error::{Exit, Failure, Result},
    text::Span,
};

/// Longest request or answer that is read.
const MESSAGE_BYTES_MAX: u64 = 16 * 1024;
/// A peer that is silent this long is gone.
const SILENCE_LIMIT: Duration = Duration::from_secs(5);
/// Tries to read a pair that is being replaced.
const READ_TRIES: u32 = 10;
const ERRORS_KEPT: usize = 5;

type Problem = Box<dyn std::error::Error + Send + Sync>;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Answer every request of a client with a good certificate
    Serve(Serve),
    /// Ask, and print what came back as JSON
    Get(Get),
}

#[derive(Debug, clap::Args)]
pub(crate) struct Serve {
    #[arg(long)]
    listen: SocketAddr,
    /// Folder of the pair; read anew for every connection
    #[arg(long)]
    dir: PathBuf,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Get {
    /// https://NAME:PORT
    url: String,
    /// Address behind the name
    #[arg(long)]
    connect: IpAddr,
    /// Folder of our pair
    #[arg(long)]
    dir: PathBuf,
    /// Show no certificate
    #[arg(long)]
    no_cert: bool,
    #[arg(long, default_value_t = 1)]
    count: u32,
    /// Go on until the server shows another certificate, for at most this long
    #[arg(long)]
    until_renewed: Option<Span>,
    /// Touch this file once the first answer is there
    #[arg(long)]
    ready: Option<PathBuf>,
}

impl Command {
    pub(crate) fn run(self) -> Result<Exit> {
        match self {
            Self::Serve(serve) => serve.run(),
            Self::Get(get) => get.run(),
        }
    }
}

/// The files of one pair, all of the same version.
struct Pair {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    roots: Arc<RootCertStore>,
    crls: Vec<CertificateRevocationListDer<'static>>,
}

impl Pair {
    fn read(folder: &Path) -> Result<Self, Problem> {
        let mut last: Problem = "the pair cannot be read".into();
        for _ in 0..READ_TRIES {
            // Resolved once, so that the files belong together; the version may be gone a moment later.
            let version = fs::canonicalize(folder.join("..data")).unwrap_or_else(|_| folder.to_owned());
            match Self::read_version(&version) {
                Ok(pair) => return Ok(pair),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    fn read_version(folder: &Path) -> Result<Self, Problem> {
        let mut roots = RootCertStore::empty();
        for root in bundle::parse_certificates(&fs::read(folder.join("ca.pem"))?)? {
            roots.add(root)?;
        }
        let crls = bundle::parse_crls(&fs::read(folder.join("crl.pem"))?)?;
        Ok(Self {
            chain: bundle::parse_certificates(&fs::read(folder.join("cert.pem"))?)?,
            key: PrivateKeyDer::from_pem_slice(&fs::read(folder.join("key.pem"))?)?,
            roots: Arc::new(roots),
            crls: crls.into_iter().map(Into::into).collect(),
        })
    }

    fn server(self) -> Result<ServerConfig, Problem> {
        let verifier = WebPkiClientVerifier::builder_with_provider(self.roots, provider())
            .with_crls(self.crls)
            .enforce_revocation_expiration()
            .build()?;
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(verifier)
            .with_single_cert(self.chain, self.key)?;
        config.send_tls13_tickets = 0;
        Ok(config)
    }

    fn client(self, with_certificate: bool) -> Result<ClientConfig, Problem> {
        let verifier = WebPkiServerVerifier::builder_with_provider(self.roots, provider())
            .with_crls(self.crls)
            .enforce_revocation_expiration()
            .build()?;
        let config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_webpki_verifier(verifier);
        let mut config = if with_certificate {
            config.with_client_auth_cert(self.chain, self.key)?
        } else {
            config.with_no_client_auth()
        };
        config.resumption = rustls::client::Resumption::disabled();
        Ok(config)
    }
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

impl Serve {
    fn run(self) -> Result<Exit> {
        let cannot = |error: io::Error| {
            Failure::new(ErrorCode::PortInUse, format!("cannot listen on {}", self.listen))
                .why(error.to_string())
        };
        let listener = TcpListener::bind(self.listen).map_err(cannot)?;
        println!("listening on {}", self.listen);
        for stream in listener.incoming() {
            let dir = self.dir.clone();
            let serve = move |stream: TcpStream| match answer(stream, &dir) {
                Ok(client) => println!("200 to {client}"),
                Err(error) => println!("refused: {error}"),
            };
            match stream {
                Ok(stream) => {
                    std::thread::spawn(move || serve(stream));
                }
                Err(error) => println!("cannot accept: {error}"),
            }
        }
        Ok(Exit::Done)
    }
}

/// Serves one request and says whose it was.
fn answer(mut tcp: TcpStream, dir: &Path) -> Result<String, Problem> {
    limit(&tcp)?;
    let mut tls = ServerConnection::new(Arc::new(Pair::read(dir)?.server()?))?;
    let served = serve_one(&mut tls, &mut tcp);
    if served.is_err() {
        // Closing on unread bytes sends a reset, which would overtake the alert that says why.
        let _ = tcp.shutdown(Shutdown::Write);
        let _ = io::copy(&mut tcp.take(MESSAGE_BYTES_MAX), &mut io::sink());
    }
    served
}

fn serve_one(tls: &mut ServerConnection, tcp: &mut TcpStream) -> Result<String, Problem> {
    let mut stream = Stream::new(tls, tcp);
    read_head(&mut stream)?;
    let client = match stream.conn.peer_certificates() {
        Some([leaf, ..]) => identity(leaf)?,
        _ => return Err("no client certificate".into()),
    };
    let body = json!({ "client": client }).to_string();
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )?;
    stream.conn.send_close_notify();
    stream.flush()?;
    Ok(client)
}

/// The SPIFFE ID, or the first name where there is none.
fn identity(leaf: &[u8]) -> Result<String, Problem> {
    let facts = Facts::read(leaf).map_err(|failure| failure.title)?;
    Ok(if facts.spiffe.is_empty() {
        facts.names.first().cloned().unwrap_or(facts.serial)
    } else {
        facts.spiffe
    })
}

fn limit(tcp: &TcpStream) -> io::Result<()> {
    tcp.set_nodelay(true)?;
    tcp.set_read_timeout(Some(SILENCE_LIMIT))?;
    tcp.set_write_timeout(Some(SILENCE_LIMIT))
}

/// Reads up to the empty line that ends a request's head.
fn read_head(stream: &mut impl Read) -> Result<(), Problem> {
    let mut head = Vec::new();
    let mut buffer = [0; 1024];
    while !head.windows(4).any(|window| window == b"\r\n\r\n") {
        match stream.read(&mut buffer)? {
            0 => return Err("the request was cut short".into()),
            read if head.len() + read > MESSAGE_BYTES_MAX as usize => {
                return Err("the request is too long".into());
            }
            read => head.extend_from_slice(&buffer[..read]),
        }
    }
    Ok(())
}

/// One answer.
struct Answer {
    status: u16,
    client: String,
    serial: String,
}

#[derive(Default)]
struct Tally {
    ok: u32,
    failed: u32,
    status: u16,
    client: String,
    serials: Vec<String>,
    errors: Vec<String>,
    refused: bool,
}

impl Tally {
    fn add(&mut self, outcome: Result<Answer, Problem>) {
        match outcome {
            Ok(answer) => {
                self.ok += 1;
                self.status = answer.status;
                self.client = answer.client;
                if !self.serials.contains(&answer.serial) {
                    self.serials.push(answer.serial);
                }
            }
            Err(error) => {
                self.failed += 1;
                self.refused |= is_alert(error.as_ref());
                if self.errors.len() < ERRORS_KEPT {
                    self.errors.push(error.to_string());
                }
            }
        }
    }

    fn document(&self) -> Value {
        json!({
            "requests": self.ok + self.failed, "ok": self.ok, "failed": self.failed, "status": self.status,
            "client": self.client, "serverSerials": self.serials, "refused": self.refused, "errors": self.errors,
        })
    }
}

/// Whether the other end said no, rather than nothing.
fn is_alert(error: &(dyn std::error::Error + Send + Sync + 'static)) -> bool {
    let tls = match error.downcast_ref::<io::Error>() {
        Some(io) => io.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()),
        None => error.downcast_ref::<rustls::Error>(),
    };
    matches!(tls, Some(rustls::Error::AlertReceived(_)))
}

impl Get {
    fn run(self) -> Result<Exit> {
        let (name, port) = self.target()?;
        let started = Instant::now();
        let mut tally = Tally::default();
        loop {
            tally.add(self.once(&name, port));
            if let Some(ready) = self.ready.as_ref().filter(|_| tally.ok + tally.failed == 1) {
                fs::write(ready, "").map_err(|error| Failure::file("write", ready, &error))?;
            }
            let enough = tally.ok + tally.failed >= self.count;
            let renewed = tally.serials.len() > 1;
            let waiting = self.until_renewed.is_some_and(|Span(limit)| !renewed && started.elapsed() < limit);
            if enough && !waiting {
                break;
            }
        }
        println!("{}", tally.document());
        Ok(match (tally.failed, tally.refused) {
            (0, _) => Exit::Done,
            (_, true) => Exit::Denied,
            (_, false) => Exit::Unreachable,
        })
    }

    fn target(&self) -> Result<(String, u16)> {
        let wrong =
            || Failure::usage("this is not https://NAME:PORT", "for instance https://api.mesh.internal:8443");
        let rest = self.url.strip_prefix("https://").ok_or_else(wrong)?.trim_end_matches('/');
        let (name, port) = rest.split_once(':').unwrap_or((rest, "443"));
        Ok((name.to_owned(), port.parse().map_err(|_| wrong())?))
    }

    fn once(&self, name: &str, port: u16) -> Result<Answer, Problem> {
        let config = Arc::new(Pair::read(&self.dir)?.client(!self.no_cert)?);
        let mut tcp = TcpStream::connect_timeout(&SocketAddr::new(self.connect, port), SILENCE_LIMIT)?;
        limit(&tcp)?;
        let mut tls = ClientConnection::new(config, ServerName::try_from(name.to_owned())?)?;
        let mut stream = Stream::new(&mut tls, &mut tcp);
        // A server that refuses us may be gone before we have written; its alert still waits to be read.
        let asked = write!(stream, "GET / HTTP/1.1\r\nHost: {name}:{port}\r\nConnection: close\r\n\r\n");
        let mut text = Vec::new();
        match (Read::by_ref(&mut stream).take(MESSAGE_BYTES_MAX).read_to_end(&mut text), asked) {
            (Err(error), _) if is_alert(&error) => return Err(error.into()),
            (_, Err(error)) | (Err(error), _) => return Err(error.into()),
            (Ok(_), Ok(())) => {}
        }
        let serial = match stream.conn.peer_certificates() {
            Some([leaf, ..]) => Facts::read(leaf).map_err(|failure| failure.title)?.serial,
            _ => return Err("the server showed no certificate".into()),
        };
        let (status, client) = parse(&String::from_utf8(text)?)?;
        Ok(Answer { status, client, serial })
    }
}

/// Status and the `client` field of the body.
fn parse(text: &str) -> Result<(u16, String), Problem> {
    let (head, body) = text.split_once("\r\n\r\n").ok_or("no HTTP answer")?;
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).ok_or("no HTTP status")?;
    let body: Value = serde_json::from_str(body)?;
    Ok((status, body["client"].as_str().unwrap_or_default().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_read_and_noise_is_refused() {
        let text = "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n{\"client\":\"spiffe://m/service/a/b\"}";
        assert_eq!(parse(text).unwrap(), (200, "spiffe://m/service/a/b".to_owned()));
        for noise in ["", "HTTP/1.1\r\n\r\n{}", "x\r\n\r\ny"] {
            assert!(parse(noise).is_err(), "{noise}");
        }
    }

    #[test]
    fn requests_have_an_end() {
        assert!(read_head(&mut "GET / HTTP/1.1\r\n\r\n".as_bytes()).is_ok());
        assert!(read_head(&mut "GET / HTTP".as_bytes()).is_err());
        assert!(read_head(&mut "x".repeat(20_000).as_bytes()).is_err());
    }

    #[test]
    fn only_an_alert_counts_as_a_refusal() {
        let alert = rustls::Error::AlertReceived(rustls::AlertDescription::CertificateRevoked);
        assert!(is_alert(&io::Error::new(io::ErrorKind::InvalidData, alert)));
        assert!(!is_alert(&io::Error::from(io::ErrorKind::ConnectionRefused)));
    }
}
