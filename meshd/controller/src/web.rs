//! What certificates point to, over plain HTTP: CRLs, CA certificates and OCSP, and nothing else.
//!
//! Everything here is signed and public, so it needs no TLS; a client that checks a certificate could not
//! check the one of a TLS server at the same time (RFC 5280 §8). There is no directory, no upload, no redirect.

use std::collections::HashMap;
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderValue};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use mesh_ca::OcspQuery;
use mesh_core::{KeyId, UtcTime};
use mesh_runtime::{Backoff, SharedClock, ShutdownToken};
use sha2::{Digest as _, Sha256};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::task::TaskTracker;

use crate::authority::CaFacts;
use crate::directory::Directory;
use crate::error::StartupError;
use crate::limits::{
    WEB_CONNECTION_AGE_MAX, WEB_CONNECTIONS_MAX, WEB_CONNECTIONS_PER_ADDRESS_MAX, WEB_HEADER_BYTES_MAX,
    WEB_HEADER_TIMEOUT, WEB_HEADERS_MAX,
};
use crate::ocsp::Ocsp;
use crate::publish::Publisher;

/// RFC 5280 §4.2.1.13, RFC 2585 §4.
const CRL_TYPE: &str = "application/pkix-crl";
/// RFC 5280 §4.2.2.1, RFC 2585 §4.
const CERTIFICATE_TYPE: &str = "application/pkix-cert";
/// RFC 6960 §C.1, §C.2.
const OCSP_REQUEST_TYPE: &str = "application/ocsp-request";
const OCSP_RESPONSE_TYPE: &str = "application/ocsp-response";
/// How long a cache may keep a CRL or an OCSP response: a revocation is not seen any later behind one.
const CRL_AGE_MAX: Duration = Duration::from_secs(600);
/// How long a cache may keep a CA's certificate.
const CERTIFICATE_AGE_MAX: Duration = Duration::from_secs(24 * 3600);
/// Shortest and longest wait for an address that this machine does not have yet.
const BIND_RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// Something to hand out.
struct Page {
    body: Bytes,
    kind: &'static str,
    modified: UtcTime,
    /// When it counts no longer.
    ends: UtcTime,
    /// How long a cache may keep it at most.
    age_max: Duration,
}

/// Serves published CRLs and CA certificates.
#[derive(Debug, Clone)]
pub(crate) struct Web {
    parts: Arc<WebParts>,
    tracker: TaskTracker,
    shutdown: ShutdownToken,
}

#[derive(Debug)]
pub(crate) struct WebParts {
    pub(crate) directory: Arc<Directory>,
    pub(crate) publisher: Arc<Publisher>,
    pub(crate) clock: SharedClock,
    pub(crate) ocsp: Arc<Ocsp>,
    slots: Slots,
}

impl WebParts {
    pub(crate) fn new(
        directory: Arc<Directory>,
        publisher: Arc<Publisher>,
        ocsp: Arc<Ocsp>,
        clock: SharedClock,
    ) -> Self {
        Self { directory, publisher, ocsp, clock, slots: Slots::default() }
    }
}

/// Where to serve: bound already, or an address that this machine does not have yet, such as that of a mesh whose
/// interface comes up later.
#[derive(Debug)]
pub(crate) enum WebSocket {
    Bound(TcpListener),
    Later(SocketAddr),
}

impl WebSocket {
    /// # Errors
    /// The address is in use, or this process may not listen there.
    pub(crate) async fn open(address: SocketAddr) -> Result<Self, StartupError> {
        match TcpListener::bind(address).await {
            Ok(listener) => Ok(Self::Bound(listener)),
            Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => {
                tracing::warn!(%address, "this machine does not have the address yet; publishing there begins when it has");
                Ok(Self::Later(address))
            }
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                Err(StartupError::PortInUse { address })
            }
            Err(source) => Err(StartupError::Listen { address: address.to_string(), source }),
        }
    }

    pub(crate) fn address(&self) -> Option<SocketAddr> {
        match self {
            Self::Bound(listener) => listener.local_addr().ok(),
            Self::Later(address) => Some(*address),
        }
    }
}

impl Web {
    pub(crate) fn new(parts: WebParts, shutdown: ShutdownToken) -> Self {
        Self { parts: Arc::new(parts), tracker: TaskTracker::new(), shutdown }
    }

    /// Serves one address until shutdown.
    pub(crate) async fn serve(&self, socket: WebSocket) {
        let Some(listener) = self.bind(socket).await else { return };
        loop {
            let accepted = tokio::select! {
                () = self.shutdown.cancelled() => break,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, address)) => self.take(stream, address.ip().to_canonical()),
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
        self.tracker.close();
        self.tracker.wait().await;
    }

    async fn bind(&self, socket: WebSocket) -> Option<TcpListener> {
        let address = match socket {
            WebSocket::Bound(listener) => return Some(listener),
            WebSocket::Later(address) => address,
        };
        let mut backoff = Backoff::new(BIND_RETRY.0, BIND_RETRY.1);
        loop {
            match TcpListener::bind(address).await {
                Ok(listener) => {
                    tracing::info!(%address, "publishing");
                    return Some(listener);
                }
                Err(error) => tracing::debug!(%address, %error, "cannot publish here yet"),
            }
            tokio::select! {
                () = self.shutdown.cancelled() => return None,
                () = tokio::time::sleep(backoff.next_wait()) => {}
            }
        }
    }

    fn take(&self, stream: TcpStream, source: IpAddr) {
        let Some(slot) = self.parts.slots.take(source) else {
            tracing::debug!(%source, "too many connections: closed");
            return;
        };
        // Answers are small and whole: nothing is gained by waiting for more to send.
        let _ = stream.set_nodelay(true);
        let (parts, shutdown) = (Arc::clone(&self.parts), self.shutdown.clone());
        self.tracker.spawn(async move {
            let _slot = slot;
            let answer = service_fn(move |request| {
                let parts = Arc::clone(&parts);
                async move { Ok::<_, Infallible>(parts.answer(request).await) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(WEB_HEADER_TIMEOUT)
                .max_buf_size(WEB_HEADER_BYTES_MAX)
                .max_headers(WEB_HEADERS_MAX)
                .pipeline_flush(true)
                .serve_connection(TokioIo::new(stream), answer);
            tokio::select! {
                ended = connection => if let Err(error) = ended {
                    tracing::debug!(%source, %error, "connection ended");
                },
                // Whoever reads so slowly, or asks for so long, takes the place of others.
                () = tokio::time::sleep(WEB_CONNECTION_AGE_MAX) => {}
                () = shutdown.cancelled() => {}
            }
        });
    }
}

impl WebParts {
    async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let is_head = request.method() == Method::HEAD;
        if let Some(rest) = self.ocsp_path(request.uri().path()) {
            return self.answer_ocsp(request, rest).await;
        }
        let Some(page) = self.page(request.uri().path()) else {
            return plain(StatusCode::NOT_FOUND, is_head, "not found\n");
        };
        if !is_head && request.method() != Method::GET {
            let mut refused = plain(StatusCode::METHOD_NOT_ALLOWED, false, "only GET and HEAD\n");
            refused.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
            return refused;
        }
        page.respond(request.headers(), is_head, self.clock.utc_now().into())
    }

    /// What lies under a path, below the base addresses' own paths or below none.
    fn page(&self, path: &str) -> Option<Page> {
        self.page_at(path).or_else(|| self.page_at(&self.below_base(path)?))
    }

    fn below_base(&self, path: &str) -> Option<String> {
        self.directory.read(|world| {
            let bases = world.authorities().iter().flat_map(|ca| world.shard_groups(&ca.key_id));
            let mut paths = bases.filter_map(|group| base_path(&group.base_url));
            paths.find_map(|base| path.strip_prefix(base).map(str::to_owned))
        })
    }

    /// The part behind `/ocsp`: empty for a POST, a slash and the request for a GET (RFC 6960 §A.1).
    fn ocsp_path(&self, path: &str) -> Option<String> {
        let rest = |path: &str| {
            let rest = path.strip_prefix("/ocsp")?;
            (rest.is_empty() || rest.starts_with('/')).then(|| rest.to_owned())
        };
        rest(path).or_else(|| rest(&self.below_base(path)?))
    }

    async fn answer_ocsp(&self, request: Request<Incoming>, rest: String) -> Response<Full<Bytes>> {
        let (is_head, now) = (request.method() == Method::HEAD, UtcTime::from(self.clock.utc_now()));
        let headers = request.headers().clone();
        let is_get = request.method() == Method::GET || is_head;
        let asked = match (request.method(), rest.strip_prefix('/')) {
            (&Method::POST, None | Some("")) => {
                if headers.get(header::CONTENT_TYPE).is_none_or(|kind| kind != OCSP_REQUEST_TYPE) {
                    return plain(
                        StatusCode::UNSUPPORTED_MEDIA_TYPE,
                        false,
                        "only application/ocsp-request\n",
                    );
                }
                match Limited::new(request.into_body(), mesh_ca::OCSP_REQUEST_BYTES_MAX).collect().await {
                    Ok(body) => OcspQuery::from_der(&body.to_bytes()),
                    Err(_) => return plain(StatusCode::PAYLOAD_TOO_LARGE, false, "too large\n"),
                }
            }
            (_, Some(text)) if is_get && !text.is_empty() => OcspQuery::from_get_path(text),
            _ if is_get => return plain(StatusCode::NOT_FOUND, is_head, "not found\n"),
            _ => {
                let mut refused = plain(StatusCode::METHOD_NOT_ALLOWED, false, "only GET, HEAD and POST\n");
                refused.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD, POST"));
                return refused;
            }
        };
        let reply = self.ocsp.answer(asked).await;
        let Some((this_update, next_update)) = reply.life.filter(|_| is_get) else {
            let mut response = Response::new(Full::new(if is_head { Bytes::new() } else { reply.der }));
            let headers = response.headers_mut();
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(OCSP_RESPONSE_TYPE));
            headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
            return response;
        };
        let page = Page {
            body: reply.der,
            kind: OCSP_RESPONSE_TYPE,
            modified: this_update + mesh_ca::CLOCK_SKEW_ALLOWANCE,
            ends: next_update,
            age_max: CRL_AGE_MAX,
        };
        page.respond(&headers, is_head, now)
    }

    fn page_at(&self, path: &str) -> Option<Page> {
        if let Some(name) = path.strip_prefix("/crl/") {
            let (issuer, shard) = name.strip_suffix(".crl")?.split_once('/')?;
            let issuer = key_id(issuer)?;
            match shard {
                // What a root says of the CAs that it signed.
                "ca" => self
                    .directory
                    .read(|world| world.authority(&issuer).filter(|ca| ca.is_root).map(|_| ()))
                    .and_then(|()| self.crl(&issuer, 0)),
                shard => self.crl(&issuer, shard_number(shard)?),
            }
        } else {
            self.certificate(&key_id(path.strip_prefix("/ca/")?.strip_suffix(".cer")?)?)
        }
    }

    fn crl(&self, issuer: &KeyId, shard: u16) -> Option<Page> {
        let crl = self.publisher.one(issuer, shard)?;
        Some(Page {
            body: crl.der,
            kind: CRL_TYPE,
            // thisUpdate is backdated for late clocks; caches compare with their own past.
            modified: crl.this_update + mesh_ca::CLOCK_SKEW_ALLOWANCE,
            ends: crl.next_update,
            age_max: CRL_AGE_MAX,
        })
    }

    fn certificate(&self, key_id: &KeyId) -> Option<Page> {
        let der =
            self.directory.read(|world| world.authority(key_id).map(|ca| Bytes::from(ca.der.clone())))?;
        let facts = CaFacts::read(&der)?;
        Some(Page {
            body: der,
            kind: CERTIFICATE_TYPE,
            modified: UtcTime::from(facts.not_before) + mesh_ca::CLOCK_SKEW_ALLOWANCE,
            ends: facts.not_after.into(),
            age_max: CERTIFICATE_AGE_MAX,
        })
    }
}

impl Page {
    fn respond(self, asked: &HeaderMap, is_head: bool, now: UtcTime) -> Response<Full<Bytes>> {
        let etag = format!("\"{}\"", hex::encode(&Sha256::digest(&self.body)[..16]));
        let unchanged = self.is_unchanged(asked, &etag);
        // Half of what is left: a cache has always something fresh to get before it ends (RFC 9111 §4.2).
        let age = self.age_max.min(self.ends.since(now) / 2).as_secs();
        let length = self.body.len();
        let body = if is_head || unchanged { Bytes::new() } else { self.body };
        let mut response = Response::new(Full::new(body));
        let headers = response.headers_mut();
        headers.insert(header::ETAG, value(&etag));
        headers.insert(header::LAST_MODIFIED, value(&http_date(self.modified)));
        headers.insert(header::EXPIRES, value(&http_date(now + Duration::from_secs(age))));
        headers.insert(header::CACHE_CONTROL, value(&format!("public, max-age={age}, no-transform")));
        headers.insert(header::DATE, value(&http_date(now)));
        if unchanged {
            *response.status_mut() = StatusCode::NOT_MODIFIED;
            return response;
        }
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(self.kind));
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
        headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        response
    }

    /// If-None-Match decides, and only without it If-Modified-Since (RFC 9110 §13.1.3).
    fn is_unchanged(&self, asked: &HeaderMap, etag: &str) -> bool {
        let mut tags = asked.get_all(header::IF_NONE_MATCH).iter().peekable();
        if tags.peek().is_some() {
            let listed = tags.filter_map(|tags| tags.to_str().ok()).flat_map(|tags| tags.split(','));
            return listed.map(str::trim).any(|tag| tag == "*" || tag.trim_start_matches("W/") == etag);
        }
        let since = asked.get(header::IF_MODIFIED_SINCE).and_then(|since| since.to_str().ok());
        let since = since.and_then(|since| httpdate::parse_http_date(since).ok());
        since.is_some_and(|since| system_time(self.modified) <= since)
    }
}

/// Connections open at one time, in all and from each address.
#[derive(Debug, Clone, Default)]
struct Slots(Arc<Mutex<HashMap<IpAddr, usize>>>);

struct Slot(Slots, IpAddr);

impl Slots {
    fn take(&self, source: IpAddr) -> Option<Slot> {
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if open.values().sum::<usize>() >= WEB_CONNECTIONS_MAX {
            return None;
        }
        let count = open.entry(source).or_default();
        if *count >= WEB_CONNECTIONS_PER_ADDRESS_MAX {
            return None;
        }
        *count += 1;
        Some(Slot(self.clone(), source))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut open = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = open.get_mut(&self.1) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.1);
            }
        }
    }
}

fn plain(status: StatusCode, is_head: bool, text: &'static str) -> Response<Full<Bytes>> {
    let body = if is_head { Bytes::new() } else { Bytes::from_static(text.as_bytes()) };
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// The path of a base address, if it has one.
fn base_path(base_url: &str) -> Option<&str> {
    let rest = base_url.strip_prefix("http://")?;
    rest.find('/').map(|at| &rest[at..])
}

/// Only the one spelling that certificates have: no second name for a page.
fn key_id(text: &str) -> Option<KeyId> {
    let id = KeyId(hex::decode(text).ok()?);
    (id.to_string() == text).then_some(id)
}

fn shard_number(text: &str) -> Option<u16> {
    let number: u16 = text.parse().ok()?;
    (number.to_string() == text).then_some(number)
}

fn value(text: &str) -> HeaderValue {
    HeaderValue::from_str(text).expect("made of digits, letters and quotes")
}

fn http_date(at: UtcTime) -> String {
    httpdate::fmt_http_date(system_time(at))
}

fn system_time(at: UtcTime) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(at.unix()).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page() -> Page {
        let (modified, ends) = (UtcTime(1_795_363_200), UtcTime(1_795_363_200 + 7 * 86_400));
        Page { body: Bytes::from_static(b"crl"), kind: CRL_TYPE, modified, ends, age_max: CRL_AGE_MAX }
    }

    fn asked(name: header::HeaderName, text: &str) -> HeaderMap {
        HeaderMap::from_iter([(name, value(text))])
    }

    #[test]
    fn a_cache_never_keeps_a_crl_to_its_end() {
        let (begin, end) = (page().modified, page().ends);
        for left in [1, 2, 60, 1_199, 1_200, 86_400] {
            let now = end - Duration::from_secs(left);
            let answer = page().respond(&HeaderMap::new(), false, now);
            let control = answer.headers()[header::CACHE_CONTROL].to_str().unwrap().to_owned();
            let age: u64 = control.split(['=', ',']).nth(2).unwrap().parse().unwrap();
            assert!(age < left && age <= 600, "{control} with {left} s left");
        }
        let late = page().respond(&HeaderMap::new(), false, end + Duration::from_secs(1));
        assert_eq!(late.headers()[header::CACHE_CONTROL], "public, max-age=0, no-transform");
        assert_eq!(begin, page().modified);
    }

    #[test]
    fn what_a_client_has_is_not_sent_again() {
        let now = page().modified + Duration::from_secs(5);
        let etag = page().respond(&HeaderMap::new(), false, now).headers()[header::ETAG].clone();
        let etag = etag.to_str().unwrap();
        let same = http_date(page().modified);
        let older = http_date(page().modified - Duration::from_secs(1));
        let table = [
            (header::IF_NONE_MATCH, etag.to_owned(), true),
            (header::IF_NONE_MATCH, format!("\"x\", W/{etag}"), true),
            (header::IF_NONE_MATCH, "*".to_owned(), true),
            (header::IF_NONE_MATCH, "\"x\"".to_owned(), false),
            (header::IF_MODIFIED_SINCE, same.clone(), true),
            (header::IF_MODIFIED_SINCE, older, false),
            (header::IF_MODIFIED_SINCE, "yesterday".to_owned(), false),
        ];
        for (name, text, unchanged) in table {
            let answer = page().respond(&asked(name.clone(), &text), false, now);
            assert_eq!(answer.status() == StatusCode::NOT_MODIFIED, unchanged, "{name}: {text}");
        }
        let mut both = asked(header::IF_NONE_MATCH, "\"x\"");
        both.insert(header::IF_MODIFIED_SINCE, value(&same));
        assert_eq!(page().respond(&both, false, now).status(), StatusCode::OK, "the tag decides");
    }

    #[test]
    fn a_page_has_one_name() {
        let id = "08".repeat(20);
        assert!(key_id(&id).is_some() && shard_number("12").is_some());
        for bad in [&"0A".repeat(20), "", "0", "0x08", "../..", "%30"] {
            assert_eq!(key_id(bad).filter(|id| !id.0.is_empty()), None, "{bad}");
        }
        for bad in ["", "012", "+1", "-1", "65536", "1 "] {
            assert_eq!(shard_number(bad), None, "{bad}");
        }
        assert_eq!(base_path("http://a:1/x/y"), Some("/x/y"));
        assert_eq!(base_path("http://a:1"), None);
    }

    #[test]
    fn connections_are_counted_per_address_and_come_back() {
        let slots = Slots::default();
        let source: IpAddr = [192, 0, 2, 1].into();
        let held: Vec<_> =
            (0..WEB_CONNECTIONS_PER_ADDRESS_MAX).map(|_| slots.take(source).unwrap()).collect();
        assert!(slots.take(source).is_none());
        let other = slots.take([192, 0, 2, 2].into());
        assert!(other.is_some());
        drop(held);
        assert!(slots.take(source).is_some());
    }
}
