//! `Local.Ping`: underlay, handshake, overlay, each on its own line, so that the broken layer shows.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh_proto::v1 as pb;
use mesh_proto::v1::ErrorCode;
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::status::{micros, path};
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
    tokio::spawn(async move {
        for sequence in 0..count {
            let overlay = overlay(source, target, sequence as u16, timeout).await;
            // After the first echo, which makes the tunnel try: what the lower layers say then is news.
            let below = if sequence == 0 { below(&session, &request.node).await } else { Vec::new() };
            for reply in below.into_iter().chain([overlay]) {
                if replies.send(Ok(reply)).await.is_err() {
                    return;
                }
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

async fn below(session: &Session, node: &str) -> Vec<pb::PingReply> {
    let Ok(peer) = find(session, node).await else { return Vec::new() };
    let underlay = match (peer.endpoint, peer.candidates.as_slice()) {
        (Some(_), _) if peer.has_session => (true, path(&peer, &session.uplink.status().controller)),
        (_, []) => (false, "no endpoint of this node is known".to_owned()),
        (_, candidates) => {
            let tried: Vec<String> = candidates.iter().map(ToString::to_string).collect();
            (false, format!("no answer from {}", tried.join(", ")))
        }
    };
    let handshake = match peer.last_handshake {
        Some(age) if peer.has_session => (true, format!("{}s ago", age.as_secs())),
        Some(age) => (false, format!("the last was {}s ago", age.as_secs())),
        None => (false, "none yet".to_owned()),
    };
    let address = peer.endpoint.map(|endpoint| endpoint.to_string()).unwrap_or_default();
    let reply = |layer: &str, (ok, detail): (bool, String), rtt_us| pb::PingReply {
        layer: layer.to_owned(),
        ok,
        rtt_us,
        detail,
        address: address.clone(),
    };
    vec![reply("underlay", underlay, 0), reply("handshake", handshake, peer.rtt.map_or(0, micros))]
}

async fn overlay(source: IpAddr, target: IpAddr, sequence: u16, timeout: Duration) -> pb::PingReply {
    let answer = tokio::task::spawn_blocking(move || echo(source, target, sequence, timeout)).await;
    let (ok, rtt_us, detail) = match answer {
        Ok(Ok(Some(rtt))) => (true, micros(rtt), String::new()),
        Ok(Ok(None)) => (false, 0, format!("no reply within {} ms", timeout.as_millis())),
        Ok(Err(error)) => (false, 0, error.to_string()),
        Err(error) => (false, 0, error.to_string()),
    };
    pb::PingReply { layer: "overlay".to_owned(), ok, rtt_us, detail, address: target.to_string() }
}
