//! `Local.Ping`: underlay, handshake, overlay. Each is tried, and the first that is broken ends the walk: what
//! stands on it cannot work.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use mesh_proto::v1 as pb;
use mesh_proto::v1::ErrorCode;
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::status::{micros, underlay, way};
use crate::failure::Failure;
use crate::limits::PING_COUNT_MAX;
use crate::network::PeerView;
use crate::ping::echo;
use crate::session::Session;

/// Replies that may wait for a slow reader.
const REPLIES: usize = 16;
const TIMEOUT_DEFAULT: Duration = Duration::from_secs(2);
const TIMEOUT_LONGEST: Duration = Duration::from_secs(60);
/// Between two echo requests, as `ping` does.
const INTERVAL: Duration = Duration::from_secs(1);
/// A handshake may need a second try, which WireGuard makes late; ours come each second.
const HANDSHAKE_PATIENCE_MIN: Duration = Duration::from_secs(3);
/// How long a refusal of the underlay (ICMP) is waited for.
const REFUSAL: Duration = Duration::from_millis(300);
/// How often the network task is asked whether something has come.
const LOOK: Duration = Duration::from_millis(20);

pub(super) async fn ping(
    session: Arc<Session>,
    request: pb::PingRequest,
) -> Result<impl Stream<Item = Result<pb::PingReply, Status>> + use<>, Failure> {
    let peer = find(&session, &request.node).await?;
    let target = match request.node.parse::<IpAddr>() {
        Ok(IpAddr::V6(_)) => IpAddr::V6(peer.ipv6),
        _ => IpAddr::V4(peer.ipv4),
    };
    let identity = session.identities.active();
    let source = match target {
        IpAddr::V4(_) => IpAddr::V4(identity.identity.ipv4),
        IpAddr::V6(_) => IpAddr::V6(identity.identity.ipv6),
    };
    let count = request.count.clamp(1, PING_COUNT_MAX);
    let timeout = match request.timeout_ms {
        0 => TIMEOUT_DEFAULT,
        ms => Duration::from_millis(u64::from(ms)).min(TIMEOUT_LONGEST),
    };
    let (replies, stream) = mpsc::channel(REPLIES);
    let walk = Walk { session, node: request.node, patience: timeout.max(HANDSHAKE_PATIENCE_MIN) };
    tokio::spawn(async move {
        let below = walk.below(&replies).await;
        // Whoever asked may be gone.
        if !matches!(below, Ok(true)) {
            return;
        }
        for sequence in 0..count {
            let reply = overlay(source, target, sequence as u16, timeout).await;
            if replies.send(Ok(reply)).await.is_err() {
                return;
            }
            if sequence + 1 < count {
                tokio::time::sleep(INTERVAL).await;
            }
        }
    });
    Ok(ReceiverStream::new(stream))
}

async fn find(session: &Session, node: &str) -> Result<PeerView, Failure> {
    let active = session.identities.active();
    let own = &active.identity;
    let suffix = format!(".{}", own.trust_domain);
    let name = node.strip_suffix(&suffix).unwrap_or(node);
    let address = node.parse::<IpAddr>().ok();
    let matches = |peer: &PeerView| {
        peer.name == name || address == Some(IpAddr::V4(peer.ipv4)) || address == Some(IpAddr::V6(peer.ipv6))
    };
    let found = session.network.status().await?.peers.into_iter().find(matches);
    found.ok_or_else(|| {
        let why = match name == own.name {
            true => format!("{name} is this node itself"),
            false => format!("this node knows no peer {node}"),
        };
        Failure::new(
            ErrorCode::NodeNotFound,
            why,
            "`meshctl status` shows the peers; one that no policy rule joins to this node is not among them",
        )
    })
}

/// What came of one layer.
struct Layer {
    detail: String,
    rtt: Option<Duration>,
    /// What to do; set where the layer is broken.
    next: Option<String>,
}

impl Layer {
    fn well(detail: impl Into<String>) -> Self {
        Self { detail: detail.into(), rtt: None, next: None }
    }

    fn broken(detail: impl Into<String>, next: impl Into<String>) -> Self {
        Self { detail: detail.into(), rtt: None, next: Some(next.into()) }
    }
}

struct Walk {
    session: Arc<Session>,
    node: String,
    patience: Duration,
}

impl Walk {
    /// Tries what lies below the overlay; whether all of it stands.
    async fn below(&self, replies: &mpsc::Sender<Result<pb::PingReply, Status>>) -> Result<bool, Failure> {
        for (layer, found) in self.layers().await? {
            let ok = found.next.is_none();
            let endpoint = underlay(&find(&self.session, &self.node).await?);
            let reply = pb::PingReply {
                layer: layer.to_owned(),
                ok,
                rtt_us: found.rtt.map_or(0, micros),
                detail: found.detail,
                address: endpoint.map(|endpoint| endpoint.to_string()).unwrap_or_default(),
                next: found.next.unwrap_or_default(),
            };
            if replies.send(Ok(reply)).await.is_err() || !ok {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Underlay and handshake, the latter only if the former stands. A handshake proves both, so it is tried at
    /// once, also where there is a session: that may be of a time when the path still worked. Meanwhile the
    /// endpoint is knocked at: what the network refuses, no handshake passes.
    async fn layers(&self) -> Result<Vec<(&'static str, Layer)>, Failure> {
        let began = Instant::now();
        let (mut asked, mut refusal): (Option<Instant>, Option<(SocketAddr, std::io::Error)>) = (None, None);
        loop {
            let peer = find(&self.session, &self.node).await?;
            let stands = Layer::well(self.way(&peer));
            if peer.last_handshake.is_some_and(|age| age < began.elapsed()) {
                let handshake = Layer { rtt: peer.handshake_rtt, ..Layer::well("") };
                return Ok(vec![("underlay", stands), ("handshake", handshake)]);
            }
            if began.elapsed() >= self.patience {
                return Ok(match (peer.endpoint, refusal) {
                    (None, _) => vec![("underlay", self.no_endpoint())],
                    (Some(_), Some((endpoint, error))) => vec![("underlay", self.refused(endpoint, &error))],
                    (Some(_), None) => vec![("underlay", stands), ("handshake", self.no_handshake(&peer))],
                });
            }
            if asked.is_none_or(|at| at.elapsed() >= INTERVAL) {
                asked = Some(Instant::now());
                self.session.network.greet(peer.id).await?;
            }
            if let Some(endpoint) = underlay(&peer).filter(|_| began.elapsed() > REFUSAL) {
                refusal = knock(endpoint).await.err().map(|error| (endpoint, error)).or(refusal);
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    fn way(&self, peer: &PeerView) -> String {
        peer.endpoint.map(|to| way(to, &self.session.uplink.status().controller)).unwrap_or_default()
    }

    fn no_endpoint(&self) -> Layer {
        let next = format!(
            "on {}: `meshctl status`: does it reach the controller? Else give it an endpoint in its configuration",
            self.node
        );
        Layer::broken("no endpoint of this node is known", next)
    }

    fn refused(&self, endpoint: SocketAddr, error: &std::io::Error) -> Layer {
        let next = match error.kind() {
            ErrorKind::ConnectionRefused => {
                format!("nothing listens there: does meshd run on {}, and with this --wg-port?", self.node)
            }
            ErrorKind::PermissionDenied => "this host's own firewall forbids it".to_owned(),
            _ => format!("this host finds no way there: look at `ip route get {}`", endpoint.ip()),
        };
        Layer::broken(format!("{endpoint}: {error}"), next)
    }

    fn no_handshake(&self, peer: &PeerView) -> Layer {
        let mut tried: Vec<String> = peer.candidates.iter().map(ToString::to_string).collect();
        let relayed = underlay(peer).is_none();
        if relayed {
            tried.insert(0, self.way(peer));
        }
        let mut detail = format!("no answer from {}", tried.join(", "));
        if let Some(age) = peer.last_handshake {
            detail.push_str(&format!("; the last one was {} s ago", age.as_secs()));
        }
        let open = match relayed {
            // The relay hands over to nodes that are connected to it; no port of theirs needs to be open.
            true => "does it reach the controller, which relays?",
            false => "its UDP port open all the way?",
        };
        let next =
            format!("is {0} up, and {open} On {0}: `meshctl doctor`; does it list this node?", self.node);
        Layer::broken(detail, next)
    }
}

/// Sends one byte that WireGuard ignores, and listens for the network's refusal.
async fn knock(endpoint: SocketAddr) -> std::io::Result<()> {
    let any = match endpoint {
        SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let socket = UdpSocket::bind(SocketAddr::new(any, 0)).await?;
    socket.connect(endpoint).await?;
    socket.send(&[0]).await?;
    match tokio::time::timeout(REFUSAL, socket.recv(&mut [0; 1])).await {
        Ok(Err(error)) => Err(error),
        Ok(Ok(_)) | Err(_) => Ok(()),
    }
}

async fn overlay(source: IpAddr, target: IpAddr, sequence: u16, timeout: Duration) -> pb::PingReply {
    let answer = tokio::task::spawn_blocking(move || echo(source, target, sequence, timeout)).await;
    let (ok, rtt_us, detail) = match answer {
        Ok(Ok(Some(rtt))) => (true, micros(rtt), String::new()),
        Ok(Ok(None)) => (false, 0, format!("no reply within {} ms", timeout.as_millis())),
        Ok(Err(error)) => (false, 0, error.to_string()),
        Err(error) => (false, 0, error.to_string()),
    };
    let next = match ok {
        true => String::new(),
        false => {
            "the tunnel stands: does a firewall there drop ICMP? `meshctl doctor` on that node tells more"
                .to_owned()
        }
    };
    pb::PingReply { layer: "overlay".to_owned(), ok, rtt_us, detail, address: target.to_string(), next }
}
