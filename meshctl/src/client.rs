//! Finding and calling the daemons: a controller over TLS 1.3 or its local socket, the local node over its.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use hyper_util::rt::TokioIo;
use mesh_proto::v1::ErrorCode;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint};

use crate::{
    context::{self, Context},
    error::{Failure, Result},
};

pub(crate) const CONTROLLER_SOCKET: &str = "/run/meshd/controller.sock";
pub(crate) const NODE_SOCKET: &str = "/run/meshd/node.sock";
pub(crate) const CONTROLLER: &str = "the controller";
pub(crate) const NODE: &str = "the local node";
/// Where a controller listens unless told otherwise.
const DEFAULT_PORT: u16 = 7443;
/// Answers to listings of a large fleet are bigger than tonic's 4 MiB.
pub(crate) const ANSWER_BYTES_MAX: usize = 64 * 1024 * 1024;
/// One address of several that does not answer must not use up the whole time.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// TLS needs a name to connect to; the verifier goes by the SPIFFE URI and ignores it.
const TLS_NAME: &str = "controller.mesh";

/// How a controller can be reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Target {
    Unix(PathBuf),
    /// `host:port`
    Tcp(String),
}

impl std::str::FromStr for Target {
    type Err = String;

    /// Reads `unix:PATH`, `https://host[:port]` or `host[:port]`.
    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            return if path.is_empty() {
                Err("unix: wants a path".into())
            } else {
                Ok(Self::Unix(path.into()))
            };
        }
        let rest = text.strip_prefix("https://").unwrap_or(text).trim_end_matches('/');
        let authority: http::uri::Authority =
            rest.parse().map_err(|_| "write https://HOST:PORT, HOST:PORT or unix:PATH".to_owned())?;
        if text.contains("://") && !text.starts_with("https://") || authority.as_str().contains('@') {
            return Err("write https://HOST:PORT, HOST:PORT or unix:PATH".into());
        }
        if authority.host().is_empty() {
            return Err("a host is missing".into());
        }
        let port = match authority.port_u16() {
            Some(port) => port,
            None if authority.as_str() == authority.host() => DEFAULT_PORT,
            None => return Err("the port is no port".into()),
        };
        Ok(Self::Tcp(format!("{}:{port}", authority.host())))
    }
}

/// Where the daemons are, from flags and environment.
#[derive(Debug, Clone)]
pub(crate) struct Places {
    pub(crate) controller: Option<Target>,
    pub(crate) socket: Option<PathBuf>,
    pub(crate) timeout: Option<Duration>,
}

/// Which role answers `status` here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Controller,
    Node,
}

impl Places {
    /// The controller: `--controller`, `MESH_CONTROLLER`, the context file, the local socket.
    pub(crate) async fn controller(&self) -> Result<Channel> {
        let context = || load_context();
        match &self.controller {
            Some(Target::Unix(path)) => self.unix(path, CONTROLLER).await,
            Some(Target::Tcp(address)) => {
                let context = context()?.ok_or_else(no_operator)?;
                self.tls(std::slice::from_ref(address), &context).await
            }
            None => match context()? {
                Some(context) => self.tls(&context.controllers, &context).await,
                None if Path::new(CONTROLLER_SOCKET).exists() => {
                    self.unix(Path::new(CONTROLLER_SOCKET), CONTROLLER).await
                }
                None => Err(no_controller()),
            },
        }
    }

    /// The local node: `--socket`, `MESH_SOCKET`, the usual place.
    pub(crate) async fn node(&self) -> Result<Channel> {
        let path = self.node_socket();
        if !path.exists() {
            return Err(Failure::new(ErrorCode::DaemonUnreachable, "no meshd node runs here")
                .why(format!("there is no socket at {}", path.display()))
                .next("start it with `meshd node run`, or name its socket with --socket"));
        }
        self.unix(&path, NODE).await
    }

    pub(crate) fn node_socket(&self) -> PathBuf {
        self.socket.clone().unwrap_or_else(|| NODE_SOCKET.into())
    }

    /// Whether a command that both roles have is meant for the node here: one is here (or named) and
    /// no controller is.
    pub(crate) fn is_node(&self) -> bool {
        self.controller.is_none() && (self.socket.is_some() || Path::new(NODE_SOCKET).exists())
    }

    /// Who answers `status`: what was named, else the controller's socket, else the node's, else the
    /// controller of the context file.
    pub(crate) fn status_role(&self) -> Role {
        let controller_here = Path::new(CONTROLLER_SOCKET).exists();
        if self.socket.is_none() && self.controller.is_none() && controller_here || !self.is_node() {
            Role::Controller
        } else {
            Role::Node
        }
    }

    /// Whether the caller's own controller socket should be used before the context file.
    pub(crate) fn local_controller(&self) -> Option<Target> {
        let here = self.controller.is_none() && Path::new(CONTROLLER_SOCKET).exists();
        here.then(|| Target::Unix(CONTROLLER_SOCKET.into()))
    }

    async fn unix(&self, path: &Path, of: &str) -> Result<Channel> {
        let path = path.to_owned();
        let socket = format!("socket {}", path.display());
        let connect = tower::service_fn(move |_: http::Uri| {
            let path = path.clone();
            async move { Ok::<_, io::Error>(TokioIo::new(UnixStream::connect(path).await?)) }
        });
        let connected = self.endpoint().connect_with_connector(connect).await;
        connected.map_err(|error| cannot_connect(&error, of).fact(socket))
    }

    async fn tls(&self, addresses: &[String], context: &Context) -> Result<Channel> {
        let config = operator_config(context)?;
        self.tls_with(addresses, Arc::new(config)).await
    }

    /// The first of `addresses` that answers as a controller should.
    pub(crate) async fn tls_with(
        &self,
        addresses: &[String],
        config: Arc<rustls::ClientConfig>,
    ) -> Result<Channel> {
        let mut last = no_controller();
        for address in addresses {
            let connector = TlsConnector::from(Arc::clone(&config));
            let target = address.clone();
            let connect = tower::service_fn(move |_: http::Uri| {
                let (connector, target) = (connector.clone(), target.clone());
                async move {
                    let tcp = TcpStream::connect(&target).await?;
                    tcp.set_nodelay(true)?;
                    let name = ServerName::try_from(TLS_NAME).expect("a constant host name");
                    Ok::<_, io::Error>(TokioIo::new(connector.connect(name, tcp).await?))
                }
            });
            match self.endpoint().connect_with_connector(connect).await {
                Ok(channel) => return Ok(channel),
                Err(error) => last = cannot_connect(&error, &format!("{CONTROLLER} {address}")),
            }
        }
        Err(last)
    }

    fn endpoint(&self) -> Endpoint {
        // The connectors above dial; this only fills HTTP/2's :authority.
        let endpoint = Endpoint::from_static("http://meshd")
            .connect_timeout(self.timeout.map_or(CONNECT_LIMIT, |timeout| timeout.min(CONNECT_LIMIT)));
        endpoint
            .http2_keep_alive_interval(Duration::from_secs(15))
            .keep_alive_timeout(Duration::from_secs(10))
    }
}

fn load_context() -> Result<Option<Context>> {
    context::path().map_or(Ok(None), |path| context::load(&path))
}

/// TLS 1.3 as the operator of `context`, to controllers under its roots only.
fn operator_config(context: &Context) -> Result<rustls::ClientConfig> {
    let damaged = |what: &str| {
        Failure::new(ErrorCode::StateCorrupt, format!("the context file holds no usable {what}"))
            .next("run `meshctl login` again with a new operator token")
    };
    let chain = certificates(&context.certificate)
        .filter(|chain| !chain.is_empty())
        .ok_or_else(|| damaged("certificate"))?;
    let roots =
        certificates(&context.roots).filter(|roots| !roots.is_empty()).ok_or_else(|| damaged("root"))?;
    let key = PrivateKeyDer::from_pem_slice(context.key.as_bytes()).map_err(|_| damaged("key"))?;
    let verifier = crate::trust::controller_verifier(&roots, &context.trust_domain)
        .map_err(|why| damaged("root").why(why))?;
    let mut config = crate::trust::client_config(verifier)
        .with_client_auth_cert(chain, key)
        .map_err(|error| damaged("key").why(error.to_string()))?;
    crate::trust::finish(&mut config);
    Ok(config)
}

fn certificates(pem: &str) -> Option<Vec<CertificateDer<'static>>> {
    CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<_, _>>().ok()
}

fn cannot_connect(error: &tonic::transport::Error, of: &str) -> Failure {
    Failure::from_chain(error, of).unwrap_or_else(|| {
        let code = if of == NODE { ErrorCode::DaemonUnreachable } else { ErrorCode::ControllerUnreachable };
        Failure::new(code, format!("{of} cannot be reached"))
            .why(deepest(error))
            .next("check that meshd runs there and the address is right, then try again")
    })
}

fn deepest(error: &dyn std::error::Error) -> String {
    let mut error: &dyn std::error::Error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

fn no_operator() -> Failure {
    Failure::new(ErrorCode::NotEnrolled, "you have no operator identity on this machine")
        .why("a controller that is not on this machine wants to know who asks")
        .next("get a token with `meshctl operator add NAME --role ROLE` there, then run `meshctl login URL`")
}

fn no_controller() -> Failure {
    Failure::new(ErrorCode::ControllerUnreachable, "no controller is known here")
        .why(format!(
            "no --controller, no MESH_CONTROLLER, no context file, and no socket at {CONTROLLER_SOCKET}"
        ))
        .next("run this on the controller, or `meshctl login URL` with an operator token")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn controllers_are_named_by_url_host_or_socket() {
        let table = [
            ("https://ctl.example:8000", Target::Tcp("ctl.example:8000".into())),
            ("https://ctl.example/", Target::Tcp("ctl.example:7443".into())),
            ("192.0.2.1", Target::Tcp("192.0.2.1:7443".into())),
            ("[2001:db8::1]:99", Target::Tcp("[2001:db8::1]:99".into())),
            ("unix:/run/x.sock", Target::Unix("/run/x.sock".into())),
            ("unix:///run/x.sock", Target::Unix("/run/x.sock".into())),
        ];
        for (text, target) in table {
            assert_eq!(text.parse(), Ok(target), "{text}");
        }
        for text in ["", "unix:", "http://ctl.example", "https://", "ctl:99999", "a b", "user@host", "ctl/x"]
        {
            assert!(text.parse::<Target>().is_err(), "{text}");
        }
    }

    #[tokio::test]
    async fn a_missing_socket_is_unreachable_and_says_where() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("node.sock");
        let places = Places {
            controller: Some(Target::Unix(folder.path().join("c.sock"))),
            socket: Some(socket.clone()),
            timeout: None,
        };
        let failure = places.node().await.unwrap_err();
        assert_eq!(failure.code, ErrorCode::DaemonUnreachable);
        assert!(failure.why.contains(&socket.display().to_string()));
        let failure = places.controller().await.unwrap_err();
        assert_eq!(
            (failure.code, failure.exit),
            (ErrorCode::ControllerUnreachable, crate::error::Exit::Unreachable)
        );
    }
}
