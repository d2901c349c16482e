//! cfssl as Debian ships it, asked over HTTPS with client certificates.

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use mesh_tests::{CONTROLLER, Fleet, rpc};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::issuance::{CALLERS, LOAD_HOST, Load, cpu_time, on_load_core};

/// Made once for the server: its own CA, its TLS pair and that of the callers, one CSR to sign.
const MAKE: &str = r#"
set -eu
ec() { openssl ecparam -name prime256v1 -genkey -noout | openssl pkcs8 -topk8 -nocrypt -out "$1"; }
ec ca-key.pem; ec tls-key.pem; ec client-key.pem; ec leaf-key.pem
openssl req -x509 -new -key ca-key.pem -subj /CN=bench-ca -days 30 -out ca.pem \
    -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign
for end in tls client; do
    openssl req -new -key $end-key.pem -subj /CN=$end -out $end.csr
    printf 'subjectAltName=DNS:cfssl\nauthorityKeyIdentifier=keyid\nbasicConstraints=CA:FALSE\n' > ext
    openssl x509 -req -in $end.csr -CA ca.pem -CAkey ca-key.pem -CAcreateserial -days 30 -extfile ext -out $end.pem
done
openssl req -new -key leaf-key.pem -subj /CN=api.bench.internal -out leaf.csr
printf '{"signing":{"default":{"expiry":"72h","usages":["digital signature","server auth"]}}}' > config.json
printf '{"driver":"sqlite3","data_source":"certs.db"}' > db.json
python3 - <<'PYTHON'
import sqlite3
db = sqlite3.connect("certs.db")
db.executescript("""
CREATE TABLE certificates (serial_number blob NOT NULL, authority_key_identifier blob NOT NULL, ca_label blob,
  status blob NOT NULL, reason int, expiry timestamp, revoked_at timestamp, pem blob NOT NULL,
  PRIMARY KEY(serial_number, authority_key_identifier));
CREATE TABLE ocsp_responses (serial_number blob NOT NULL, authority_key_identifier blob NOT NULL, body blob NOT NULL,
  expiry timestamp, PRIMARY KEY(serial_number, authority_key_identifier));
""")
PYTHON
"#;

/// A running `cfssl serve`.
pub(crate) struct Cfssl {
    name: &'static str,
    address: SocketAddr,
    folder: PathBuf,
    request: Arc<Vec<u8>>,
}

impl Cfssl {
    /// Starts it on the controller's host and waits until it accepts connections.
    pub(crate) fn start(fleet: &mut Fleet, name: &'static str, port: u16, stores: bool) -> Self {
        let folder = fleet.path(CONTROLLER).join(name);
        std::fs::create_dir_all(&folder).expect("a folder");
        let mut make = fleet.command(CONTROLLER, "bash", &["-c", MAKE]);
        make.current_dir(&folder);
        mesh_tests::run(make).ok();
        let port_text = port.to_string();
        let mut arguments = vec!["serve", "-address", "0.0.0.0", "-port", &port_text, "-loglevel", "5"];
        arguments.extend(["-ca", "ca.pem", "-ca-key", "ca-key.pem", "-config", "config.json"]);
        arguments.extend(["-tls-cert", "tls.pem", "-tls-key", "tls-key.pem", "-mutual-tls-ca", "ca.pem"]);
        if stores {
            arguments.extend(["-db-config", "db.json"]);
        }
        let mut command = fleet.command(CONTROLLER, "cfssl", &arguments);
        command.current_dir(&folder).env("GOMAXPROCS", "1");
        fleet.processes.spawn(name, command).expect("cfssl starts");
        let ip = fleet.host(CONTROLLER).ipv4().expect("an IPv4 address");
        let csr = std::fs::read_to_string(folder.join("leaf.csr")).expect("the CSR");
        let body =
            serde_json::json!({ "certificate_request": csr, "hosts": ["api.bench.internal"] }).to_string();
        let request = format!(
            "POST /api/v1/cfssl/sign HTTP/1.1\r\nHost: cfssl\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let server =
            Self { name, address: (ip, port).into(), folder, request: Arc::new(request.into_bytes()) };
        fleet.until("cfssl signs", |fleet| {
            let (address, config) = (server.address, server.client());
            let request = Arc::clone(&server.request);
            rpc::on_host(fleet, LOAD_HOST, || async move {
                match Connection::open(address, config).await {
                    Ok(mut connection) => connection.sign(&request).await.is_ok(),
                    Err(_) => false,
                }
            })
        });
        server
    }

    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    fn client(&self) -> Arc<rustls::ClientConfig> {
        let read = |file: &str| std::fs::read(self.folder.join(file)).expect("a file that was just made");
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(&read("ca.pem")).expect("PEM")).expect("a root");
        let chain = vec![CertificateDer::from_pem_slice(&read("client.pem")).expect("PEM")];
        let key = PrivateKeyDer::from_pem_slice(&read("client-key.pem")).expect("PEM");
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("the provider's own versions")
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .expect("key and chain fit");
        Arc::new(config)
    }

    /// Signs from [`CALLERS`] connections for `time`; every answer is checked.
    pub(crate) fn load(&mut self, fleet: &Fleet, time: Duration) -> Load {
        let server = fleet.processes.id(self.name).expect("it runs");
        let (address, config, request) = (self.address, self.client(), Arc::clone(&self.request));
        on_load_core(fleet, || async move {
            let mut connections = Vec::new();
            for _ in 0..CALLERS {
                let mut connection =
                    Connection::open(address, Arc::clone(&config)).await.expect("cfssl is there");
                connection.sign(&request).await.expect("cfssl signs");
                connections.push(connection);
            }
            let (start, cpu) = (Instant::now(), cpu_time(server));
            let mut tasks = tokio::task::JoinSet::new();
            for mut connection in connections {
                let request = Arc::clone(&request);
                tasks.spawn(async move {
                    let mut latencies = Vec::new();
                    while start.elapsed() < time {
                        let asked = Instant::now();
                        connection.sign(&request).await.expect("cfssl signs");
                        latencies.push(asked.elapsed());
                    }
                    latencies
                });
            }
            let latencies = tasks.join_all().await.concat();
            Load::of(latencies, start.elapsed(), cpu_time(server) - cpu)
        })
    }
}

/// One HTTP/1.1 connection that is kept.
struct Connection {
    stream: TlsStream<TcpStream>,
    buffer: Vec<u8>,
}

impl Connection {
    async fn open(address: SocketAddr, config: Arc<rustls::ClientConfig>) -> std::io::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let name = ServerName::try_from("cfssl").expect("a host name");
        let stream = TlsConnector::from(config).connect(name, stream).await?;
        Ok(Self { stream, buffer: vec![0; 16 * 1024] })
    }

    async fn sign(&mut self, request: &[u8]) -> std::io::Result<()> {
        self.stream.write_all(request).await?;
        let mut have = 0;
        loop {
            let read = self.stream.read(&mut self.buffer[have..]).await?;
            if read == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            have += read;
            let Some(head) = self.buffer[..have].windows(4).position(|window| window == b"\r\n\r\n") else {
                continue;
            };
            let text = String::from_utf8_lossy(&self.buffer[..head]).to_ascii_lowercase();
            let length = text
                .lines()
                .find_map(|line| line.strip_prefix("content-length: ")?.trim().parse::<usize>().ok());
            let length = length.ok_or_else(|| std::io::Error::other(format!("no length in {text}")))?;
            if have < head + 4 + length {
                continue;
            }
            let body = String::from_utf8_lossy(&self.buffer[head + 4..have]);
            let signed = text.starts_with("http/1.1 200") && body.contains("BEGIN CERTIFICATE");
            return if signed { Ok(()) } else { Err(std::io::Error::other(body.into_owned())) };
        }
    }
}
