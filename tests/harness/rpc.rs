//! Calls to a controller from any host, by any caller, of any method.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use crate::Fleet;
use hyper_util::rt::TokioIo;
use mesh_proto::v1 as pb;
use prost::Message as _;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tonic::{
    Code, Request, Status,
    transport::{Channel, Endpoint, Uri},
};
use tonic_prost::ProstCodec;

use crate::credential::{Credential, client_config};

/// No answer of the controller takes longer in any of these tests.
const CALL_LIMIT: Duration = Duration::from_secs(20);

/// Served by the node on its own socket, not by the controller.
const SERVED_ELSEWHERE: &str = "mesh.v1.Local";

/// Every method of every service of the controller, as gRPC paths.
pub fn methods() -> Vec<String> {
    let pool = prost_reflect::DescriptorPool::decode(mesh_proto::FILE_DESCRIPTOR_SET).unwrap();
    let services = pool.services().filter(|service| service.full_name() != SERVED_ELSEWHERE);
    let paths: Vec<_> = services
        .flat_map(|service| {
            let paths = service.methods().map(|m| format!("/{}/{}", service.full_name(), m.name()));
            paths.collect::<Vec<_>>()
        })
        .collect();
    assert!(paths.len() > 25, "the schema has lost its methods: {paths:?}");
    paths
}

/// How a call with an empty message ended.
#[derive(Debug)]
pub enum Outcome {
    /// The gate let nobody past.
    Denied(pb::ErrorCode),
    /// The handler, or what lies before it, answered.
    Reached(Result<(), Status>),
}

impl Outcome {
    pub fn is_denied(&self) -> bool {
        matches!(self, Self::Denied(_))
    }

    /// The connection ended before there was an answer.
    pub fn is_cut(&self) -> bool {
        use std::error::Error as _;
        let Self::Reached(Err(status)) = self else { return false };
        status.source().is_some_and(|source| source.is::<tonic::transport::Error>())
    }

    fn of(answer: Result<(), Status>) -> Self {
        use pb::ErrorCode as C;
        let Err(status) = &answer else { return Self::Reached(answer) };
        let code = error_code(status);
        let refused = matches!(status.code(), Code::PermissionDenied | Code::Unauthenticated);
        match code {
            C::Denied | C::IdentityExpired | C::IdentityRevoked | C::IdentityUnknown if refused => {
                Self::Denied(code)
            }
            _ => Self::Reached(answer),
        }
    }
}

/// The stable code in a refusal's details.
pub fn error_code(status: &Status) -> pb::ErrorCode {
    pb::ErrorDetail::decode(status.details()).map_or(pb::ErrorCode::Unspecified, |detail| detail.code())
}

/// Runs `work` on a thread and a runtime of its own on host `name`.
pub fn on_host<T: Send, F: Future<Output = T>>(
    fleet: &Fleet,
    name: &str,
    work: impl FnOnce() -> F + Send,
) -> T {
    let run = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(work())
    };
    fleet.host(name).run(run).expect("the host's namespaces can be entered")
}

/// Connects to `address`; the channel redials by itself, so that a caller whose connection is cut tries again.
pub async fn channel(address: SocketAddr, config: ClientConfig) -> Result<Channel, tonic::transport::Error> {
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    Endpoint::from_static("http://controller")
        .connect_timeout(CALL_LIMIT)
        .connect_with_connector(tower::service_fn(move |_: Uri| {
            let connector = connector.clone();
            async move {
                let stream = TcpStream::connect(address).await?;
                stream.set_nodelay(true)?;
                let name = ServerName::try_from("controller").expect("a host name");
                connector.connect(name, stream).await.map(TokioIo::new)
            }
        }))
        .await
}

/// Calls `path` with one empty message and reads at most one answer.
pub async fn call_empty(channel: &Channel, path: &str) -> Outcome {
    let call = async {
        let mut client = tonic::client::Grpc::new(channel.clone());
        client.ready().await.map_err(|error| Status::from_error(error.into()))?;
        let request = Request::new(tokio_stream::once(pb::Empty {}));
        let codec = ProstCodec::<pb::Empty, pb::Empty>::default();
        let path = path.parse().expect("a path");
        let mut answers = client.streaming(request, path, codec).await?.into_inner();
        answers.message().await.map(drop)
    };
    let answer = tokio::time::timeout(CALL_LIMIT, call).await;
    Outcome::of(answer.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer in the test's limit"))))
}

/// Calls all of `paths` from host `from` as `credential`.
pub fn call_all(
    fleet: &Fleet,
    from: &str,
    credential: Option<&Credential>,
    paths: &[String],
) -> Vec<(String, Outcome)> {
    let (address, config) = (controller(fleet), client_config(fleet, credential));
    on_host(fleet, from, || async move {
        let channel = channel(address, config).await.expect("the TLS handshake is done");
        let mut outcomes = Vec::new();
        for path in paths {
            outcomes.push((path.clone(), call_empty(&channel, path).await));
        }
        outcomes
    })
}

pub fn controller(fleet: &Fleet) -> SocketAddr {
    fleet.controller_url().parse().expect("HOST:PORT")
}

/// Something new at each call, for `operation_id`.
pub fn operation() -> bytes::Bytes {
    mesh_runtime::random_bytes::<16>().to_vec().into()
}
