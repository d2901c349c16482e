//! `meshctl cert inspect`: any certificate, from a file or from whoever answers at an address.

use std::{
    io::Read as _,
    net::{TcpStream, ToSocketAddrs as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use mesh_proto::v1::ErrorCode;
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, Error, SignatureScheme, Stream,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature},
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use serde_json::json;

use super::{Facts, file, lint};
use crate::{
    app::App,
    error::{Exit, Failure, Result},
    output::{Format, Tone, paint},
    text::{now, safe},
};

const HTTPS: &str = "https://";
const HTTPS_PORT: u16 = 443;
/// For the connection, and for each answer of the other end.
const SILENCE_LIMIT: Duration = Duration::from_secs(5);

#[derive(Debug, clap::Args)]
pub(crate) struct Inspect {
    /// A PEM or DER file, or https://HOST:PORT
    #[arg(value_name = "FILE|URL")]
    which: String,
}

impl Inspect {
    /// Exit 3 if any rule is broken, or a certificate has ended.
    pub(crate) fn run(&self, app: &App) -> Result<Exit> {
        let chain = match self.which.strip_prefix(HTTPS) {
            Some(authority) => served(authority.trim_end_matches('/'))?,
            None => file::certificates(&PathBuf::from(&self.which))?,
        };
        show(app, &chain)
    }
}

/// Prints every certificate with what is wrong with it.
pub(super) fn show(app: &App, chain: &[CertificateDer<'_>]) -> Result<Exit> {
    let now = now();
    let mut any = false;
    let mut documents = Vec::new();
    for der in chain {
        let facts = Facts::read(der)?;
        let mut findings = lint::findings(der);
        if facts.not_after <= now {
            findings.push("it has ended".to_owned());
        }
        if facts.not_before > now {
            findings.push("it is not valid yet".to_owned());
        }
        any |= !findings.is_empty();
        match app.out.format {
            Format::Json => {
                let mut document = facts.document();
                document["findings"] = json!(findings);
                documents.push(document);
            }
            Format::Name => app.out.line(&facts.serial),
            Format::Table | Format::Wide => {
                facts.describe(now).iter().for_each(|line| app.out.line(line));
                for finding in &findings {
                    app.out.line(&format!("  {} {}", paint(Tone::Warn, "!"), safe(finding)));
                }
            }
        }
    }
    if app.out.is_json() {
        app.out.list_document("CertificateFile", &documents);
    }
    Ok(if any { Exit::Findings } else { Exit::Done })
}

/// The chain that a TLS server shows. Nothing is sent but the handshake, and nothing it says is believed.
fn served(authority: &str) -> Result<Vec<CertificateDer<'static>>> {
    let (host, port) = split(authority)?;
    let unreachable = |why: String| {
        Failure::new(ErrorCode::PeerUnreachable, format!("{host}:{port} shows no certificate"))
            .why(why)
            .next("check the address, and that it speaks TLS there")
    };
    let name = ServerName::try_from(host.clone())
        .map_err(|_| Failure::usage(format!("{host} is no host name"), "write https://HOST:PORT"))?;
    let addresses =
        (host.as_str(), port).to_socket_addrs().map_err(|error| unreachable(error.to_string()))?;
    let mut last = "the name has no address".to_owned();
    for address in addresses {
        let tried = TcpStream::connect_timeout(&address, SILENCE_LIMIT)
            .map_err(|error| error.to_string())
            .and_then(|stream| handshake(stream, name.clone()));
        match tried {
            Ok(chain) => return Ok(chain),
            Err(why) => last = why,
        }
    }
    Err(unreachable(last))
}

fn handshake(
    mut stream: TcpStream,
    name: ServerName<'static>,
) -> Result<Vec<CertificateDer<'static>>, String> {
    let text = |error: std::io::Error| error.to_string();
    stream.set_read_timeout(Some(SILENCE_LIMIT)).map_err(text)?;
    stream.set_write_timeout(Some(SILENCE_LIMIT)).map_err(text)?;
    let provider = Arc::new(aws_lc_rs::default_provider());
    let onlooker = Arc::new(Onlooker { provider: Arc::clone(&provider), seen: Mutex::default() });
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(onlooker.clone())
        .with_no_client_auth();
    let mut connection = ClientConnection::new(Arc::new(config), name).map_err(|error| error.to_string())?;
    // A server that asks for a certificate of ours ends the connection; its own has come by then.
    let ended = Stream::new(&mut connection, &mut stream).read(&mut [0]);
    let seen = std::mem::take(&mut *onlooker.seen.lock().unwrap_or_else(PoisonError::into_inner));
    match (seen.is_empty(), ended) {
        (false, _) => Ok(seen),
        (true, Err(error)) => Err(error.to_string()),
        (true, Ok(_)) => Err("it ended the connection".to_owned()),
    }
}

/// `HOST`, `HOST:PORT`, `[IPV6]:PORT`.
fn split(authority: &str) -> Result<(String, u16)> {
    let parsed: http::uri::Authority = authority.parse().map_err(|_| {
        Failure::usage(format!("{HTTPS}{authority} is no address"), "write https://HOST:PORT")
    })?;
    let host = parsed.host().trim_start_matches('[').trim_end_matches(']').to_owned();
    Ok((host, parsed.port_u16().unwrap_or(HTTPS_PORT)))
}

/// Looks at what is shown and lets it pass: what it says is printed, never relied on. That the other end
/// holds the key is checked all the same.
#[derive(Debug)]
struct Onlooker {
    provider: Arc<CryptoProvider>,
    seen: Mutex<Vec<CertificateDer<'static>>>,
}

impl ServerCertVerifier for Onlooker {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let chain = std::iter::once(end_entity).chain(intermediates);
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) =
            chain.map(|der| der.clone().into_owned()).collect();
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// `meshctl cert show FILE` shows the same.
pub(super) fn show_file(app: &App, path: &Path) -> Result<Exit> {
    show(app, &file::certificates(path)?)?;
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use rcgen::{CertificateParams, KeyPair};
    use rustls::{ServerConfig, ServerConnection};

    use super::*;

    #[test]
    fn addresses_have_a_port_or_that_of_https() {
        let table = [
            ("db.mesh.internal", "db.mesh.internal", 443),
            ("db.mesh.internal:8443", "db.mesh.internal", 8443),
            ("127.0.0.1:1", "127.0.0.1", 1),
            ("[::1]:9", "::1", 9),
        ];
        for (text, host, port) in table {
            assert_eq!(split(text).unwrap(), (host.to_owned(), port), "{text}");
        }
        assert_eq!(split("a b").unwrap_err().exit, Exit::Usage);
    }

    #[test]
    fn what_a_server_shows_is_seen_whoever_signed_it() {
        let key = KeyPair::generate().unwrap();
        let shown = CertificateParams::new(vec!["x".to_owned()]).unwrap().self_signed(&key).unwrap();
        let der = shown.der().clone();
        let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![der.clone()],
                rustls_pki_types::PrivatePkcs8KeyDer::from(key.serialize_der()).into(),
            )
            .unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut connection = ServerConnection::new(Arc::new(config)).unwrap();
            while connection.is_handshaking() {
                connection.complete_io(&mut stream).unwrap();
            }
        });
        assert_eq!(served(&address.to_string()).unwrap(), [der]);
        server.join().unwrap();
        let failure = served(&address.to_string()).unwrap_err();
        assert_eq!((failure.code, failure.exit), (ErrorCode::PeerUnreachable, Exit::Unreachable));
    }
}
