//! Figures for Prometheus, over plain HTTP on a loopback address. Each is read from World, from who is connected, or from
//! the disk at the moment it is asked for; nothing is counted on the side.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use bytes::Bytes;
use http::header::{self, HeaderValue};
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use mesh_core::{UtcTime, World};
use mesh_runtime::ShutdownToken;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::authority::CaFacts;
use crate::error::StartupError;
use crate::limits::{
    METRICS_CONNECTIONS_MAX, WEB_CONNECTION_AGE_MAX, WEB_HEADER_BYTES_MAX, WEB_HEADER_TIMEOUT,
};
use crate::parts::Parts;
use crate::service::fleet::{remaining_life, signed_at};

/// OpenMetrics 1.0, which Prometheus asks for.
const METRICS_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// Every state that a node may be in, so that a series does not vanish when its last node leaves it.
const NODE_STATES: [&str; 6] = ["ok", "late", "offline", "expired", "pending", "revoked"];

type Labels = Vec<(&'static str, String)>;
type Gauges = Family<Labels, Gauge>;
type Ratios = Family<Labels, Gauge<f64, AtomicU64>>;

/// Opens the address of the figures.
///
/// # Errors
/// It is not a loopback address, is in use, or may not be used by this process.
pub(crate) async fn bind(address: SocketAddr) -> Result<TcpListener, StartupError> {
    if !address.ip().is_loopback() {
        return Err(StartupError::Config {
            key: "metrics_listen",
            problem: format!(
                "{address} is not a loopback address; the figures are served without encryption"
            ),
        });
    }
    TcpListener::bind(address).await.map_err(|source| match source.kind() {
        std::io::ErrorKind::AddrInUse => StartupError::PortInUse { address },
        _ => StartupError::Listen { address: address.to_string(), source },
    })
}

/// Serves `/metrics` until shutdown.
pub(crate) async fn serve(
    listener: TcpListener,
    parts: Arc<Parts>,
    journal: PathBuf,
    shutdown: ShutdownToken,
) {
    let slots = Arc::new(Semaphore::new(METRICS_CONNECTIONS_MAX));
    let tracker = tokio_util::task::TaskTracker::new();
    loop {
        let stream = tokio::select! {
            () = shutdown.cancelled() => break,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection for metrics");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            },
        };
        let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else { continue };
        let (parts, journal, shutdown) = (Arc::clone(&parts), journal.clone(), shutdown.clone());
        tracker.spawn(async move {
            let _slot = slot;
            let answer = service_fn(move |request| {
                let (parts, journal) = (Arc::clone(&parts), journal.clone());
                async move { Ok::<_, Infallible>(answer(&parts, journal, &request).await) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(WEB_HEADER_TIMEOUT)
                .max_buf_size(WEB_HEADER_BYTES_MAX)
                .serve_connection(TokioIo::new(stream), answer);
            tokio::select! {
                ended = connection => if let Err(error) = ended {
                    tracing::debug!(%error, "connection for metrics ended");
                },
                () = tokio::time::sleep(WEB_CONNECTION_AGE_MAX) => {}
                () = shutdown.cancelled() => {}
            }
        });
    }
    tracker.close();
    tracker.wait().await;
}

async fn answer(parts: &Arc<Parts>, journal: PathBuf, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    let is_head = request.method() == Method::HEAD;
    let (status, kind, body) = match (request.uri().path(), request.method()) {
        ("/metrics", &Method::GET | &Method::HEAD) => {
            let parts = Arc::clone(parts);
            // Reading World waits for nobody for long, reading the disk may.
            match tokio::task::spawn_blocking(move || page(&parts, &journal)).await {
                Ok(text) => (StatusCode::OK, METRICS_TYPE, text),
                Err(_) => (StatusCode::INTERNAL_SERVER_ERROR, "text/plain", "failed\n".to_owned()),
            }
        }
        ("/metrics", _) => (StatusCode::METHOD_NOT_ALLOWED, "text/plain", "only GET and HEAD\n".to_owned()),
        _ => (StatusCode::NOT_FOUND, "text/plain", "see /metrics\n".to_owned()),
    };
    let length = body.len();
    let body = if is_head { Bytes::new() } else { Bytes::from(body) };
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// All figures as text.
fn page(parts: &Parts, journal: &Path) -> String {
    let (now, mut registry) = (parts.utc(), Registry::with_prefix("meshd"));
    parts.directory.read(|world| {
        authorities(&mut registry, world, now);
        certificates(&mut registry, world, now);
        crls(&mut registry, world, now);
        gauge(&mut registry, "journal_records", "Records in the journal", None, world.head_seq());
    });
    nodes(&mut registry, parts);
    let bytes = disk_bytes(journal);
    let help = "Disk space of the journal, with what is reserved ahead";
    gauge(&mut registry, "journal_disk", help, Some(Unit::Bytes), bytes);
    let mut text = String::new();
    encode(&mut text, &registry).expect("a String takes everything");
    text
}

fn gauge(registry: &mut Registry, name: &str, help: &str, unit: Option<Unit>, value: u64) {
    let gauge = Gauge::<i64>::default();
    gauge.set(whole(value));
    match unit {
        Some(unit) => registry.register_with_unit(name, help, unit, gauge),
        None => registry.register(name, help, gauge),
    }
}

fn authorities(registry: &mut Registry, world: &World, now: UtcTime) {
    let (seconds, ratios) = (Gauges::default(), Ratios::default());
    for known in world.trusted_authorities() {
        let Some(facts) = CaFacts::read(&known.der) else { continue };
        let kind = if known.is_root { "root" } else { "issuing" };
        let labels: Labels = vec![
            ("ca", kind.to_owned()),
            ("key_id", known.key_id.to_string()),
            ("standing", known.standing.as_str().to_owned()),
        ];
        let (left, ratio) = remaining_life(facts.not_before.into(), facts.not_after.into(), now);
        seconds.get_or_create(&labels).set(whole(left.as_secs()));
        ratios.get_or_create(&labels).set(ratio);
    }
    let help = "Until the end of a trusted CA's certificate; 0 past it";
    registry.register_with_unit("ca_remaining_life", help, Unit::Seconds, seconds);
    let help = "What is left of a trusted CA's life, of 1: findings at 0.5, 0.2 and 0.05";
    registry.register_with_unit("ca_remaining_life", help, Unit::Ratios, ratios);
}

fn certificates(registry: &mut Registry, world: &World, now: UtcTime) {
    let (gauges, counts) = (Gauges::default(), world.certificate_counts(now));
    for (state, count) in [("live", counts.live), ("revoked", counts.revoked)] {
        gauges.get_or_create(&vec![("state", state.to_owned())]).set(whole(count as u64));
    }
    registry.register("certificates", "Certificates that have not ended, by state", gauges);
}

fn crls(registry: &mut Registry, world: &World, now: UtcTime) {
    let (numbers, ages, left) = (Gauges::default(), Gauges::default(), Gauges::default());
    for crl in world.crls().filter(|crl| world.is_trusted(&crl.issuer_key_id)) {
        let labels: Labels =
            vec![("issuer", crl.issuer_key_id.to_string()), ("shard", crl.shard.to_string())];
        numbers.get_or_create(&labels).set(whole(crl.number));
        let age = now.unix().saturating_sub(signed_at(crl.this_update)).max(0);
        ages.get_or_create(&labels).set(age);
        left.get_or_create(&labels).set(whole(crl.next_update.since(now).as_secs()));
    }
    registry.register("crl_number", "Number of a shard's newest CRL", numbers);
    registry.register_with_unit("crl_age", "Since a shard's newest CRL was signed", Unit::Seconds, ages);
    let help = "Until nextUpdate of a shard's newest CRL; 0 past it";
    registry.register_with_unit("crl_remaining_life", help, Unit::Seconds, left);
}

fn nodes(registry: &mut Registry, parts: &Parts) {
    let gauges = Gauges::default();
    let of = |state: &str| gauges.get_or_create(&vec![("state", state.to_owned())]).clone();
    for state in NODE_STATES {
        of(state).set(0);
    }
    for node in parts.nodes() {
        of(&node.state).inc();
    }
    registry.register("nodes", "Nodes by state, as in meshctl node ls", gauges);
}

/// Space that the files of a folder take on disk, bytes; those that cannot be read are left out.
fn disk_bytes(folder: &Path) -> u64 {
    let files = std::fs::read_dir(folder).into_iter().flatten().flatten();
    // stat(2) counts blocks of 512 octets.
    files.filter_map(|file| file.metadata().ok()).map(|facts| facts.blocks() * 512).sum()
}

fn whole(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
