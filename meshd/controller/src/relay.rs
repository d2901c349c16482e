//! The relay: WireGuard's datagrams of nodes that have no direct way to each other. It sees ciphertext, never
//! a key; it serves nodes with an open stream, each to the peers that policy lets it see, and no more per
//! second than the limit says.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use mesh_core::NodeId;
use mesh_core::rate::Bucket;
use mesh_core::relay::{
    Codec, Counters, DATAGRAM_BYTES_MAX, Direction, Frame, Key, OVERHEAD_BYTES, SessionId, Window,
};
use mesh_proto::v1 as pb;
use mesh_runtime::SharedClock;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use crate::gate::Connection;
use crate::limits::{RELAY_BURST_BYTES_MIN, RELAY_QUEUE_MAX, RELAY_UDP_PAYLOAD_MAX, RELAY_UDP_TTL};
use crate::status::Problem;
use crate::udp_port::{UdpPort, Way};
use crate::views::Views;

/// Serves the relay sessions of all nodes.
#[derive(Debug, Clone)]
pub(crate) struct RelayHub(Arc<Hub>);

#[derive(Debug)]
struct Hub {
    views: Views,
    clock: SharedClock,
    bytes_per_second: u64,
    /// The socket that STUN uses too; none until it is bound, or if UDP is off.
    udp: OnceLock<(Arc<UdpPort>, u16)>,
    sessions: Mutex<Sessions>,
}

#[derive(Debug, Default)]
struct Sessions {
    by_node: BTreeMap<NodeId, Arc<Session>>,
    by_id: BTreeMap<SessionId, Arc<Session>>,
}

type Responses = mpsc::Sender<Result<pb::RelayResponse, Status>>;

/// One node's session.
#[derive(Debug)]
struct Session {
    node: NodeId,
    codec: Codec,
    responses: Responses,
    traffic: Mutex<Traffic>,
    tally: Tally,
}

#[derive(Debug)]
struct Traffic {
    bucket: Bucket,
    window: Window,
    counters: Counters,
    /// The way back of its newest frame by UDP, and when that came. None once it uses the stream instead.
    udp: Option<(Way, Instant)>,
    /// Whom it may send to, as World was at this record.
    visible: (u64, BTreeMap<NodeId, bool>),
}

/// What became of a node's datagrams.
#[derive(Debug, Default)]
struct Tally {
    forwarded: AtomicU64,
    over_limit: AtomicU64,
    denied: AtomicU64,
    undeliverable: AtomicU64,
}

/// Takes a session away when its stream ends, however that happens.
struct Entry<'a> {
    hub: &'a Hub,
    session: Arc<Session>,
}

impl RelayHub {
    pub(crate) fn new(views: Views, clock: SharedClock, bytes_per_second: u64) -> Self {
        let (udp, sessions) = (OnceLock::new(), Mutex::default());
        Self(Arc::new(Hub { views, clock, bytes_per_second, udp, sessions }))
    }

    /// From now on frames go out by this socket, which is bound to `port`.
    pub(crate) fn use_udp(&self, socket: Arc<UdpPort>, port: u16) {
        // Set once, before the first request is served.
        let _ = self.0.udp.set((socket, port));
    }

    /// Takes up a node's stream. The session ends with the stream, and both with the identity. A newer stream
    /// of the same node takes the place of an older one.
    pub(crate) fn open(
        &self,
        (node, expires_in): (NodeId, Duration),
        connection: Arc<Connection>,
        mut requests: Streaming<pb::RelayRequest>,
    ) -> ReceiverStream<Result<pb::RelayResponse, Status>> {
        let (responses, stream) = mpsc::channel(RELAY_QUEUE_MAX);
        let hub = Arc::clone(&self.0);
        tokio::spawn(async move {
            let key: [u8; 32] = mesh_runtime::random_bytes();
            let session = hub.start(node, &key, responses);
            let entry = Entry { hub: &hub, session: Arc::clone(&session) };
            if session.responses.send(Ok(hub.grant(&session, &key))).await.is_err() {
                return;
            }
            let expiry = tokio::time::sleep(expires_in);
            tokio::pin!(expiry);
            loop {
                tokio::select! {
                    biased;
                    () = &mut expiry => {
                        let _ = session.responses.try_send(Err(Problem::identity_expired().into()));
                        break;
                    }
                    () = connection.closing.cancelled() => {
                        let _ = session.responses.try_send(Err(Problem::closing().into()));
                        break;
                    }
                    () = session.responses.closed() => break,
                    request = requests.message() => match request {
                        Ok(Some(request)) => {
                            // Whoever sends here does so because UDP does not get through.
                            session.traffic().udp = None;
                            hub.forward(&session, NodeId(request.node_id), &request.datagram);
                        }
                        Ok(None) | Err(_) => break,
                    },
                }
            }
            drop(entry);
        });
        ReceiverStream::new(stream)
    }

    /// Takes a frame that came by UDP. Whatever is wrong with it, nobody is told.
    pub(crate) fn take_frame(&self, bytes: &[u8], way: Way) {
        let Some(session) = mesh_core::relay::session_of(bytes).and_then(|id| self.0.by_id(id)) else {
            return;
        };
        let Ok(frame) = session.codec.open(Direction::ToController, bytes) else { return };
        {
            let mut traffic = session.traffic();
            let is_newest = traffic.window.is_newest(frame.counter);
            if !traffic.window.accept(frame.counter) {
                return;
            }
            // An older frame that was held up must not lead the answers back to where it came from.
            if is_newest {
                traffic.udp = Some((way, self.0.clock.now()));
            }
        }
        match frame.peer {
            // A keepalive is answered with its like: that is how the node knows that UDP gets through.
            0 => self.0.send_udp(&session, 0, &[]),
            peer => self.0.forward(&session, NodeId(peer), frame.datagram),
        }
    }
}

impl Hub {
    fn start(&self, node: NodeId, key: &[u8; 32], responses: Responses) -> Arc<Session> {
        let burst = self.bytes_per_second.max(RELAY_BURST_BYTES_MIN);
        let mut sessions = self.lock();
        let id = loop {
            let id = SessionId::of(u32::from_be_bytes(mesh_runtime::random_bytes()));
            if !sessions.by_id.contains_key(&id) {
                break id;
            }
        };
        let session = Arc::new(Session {
            node,
            codec: Codec::new(id, &Key::new(*key)),
            responses,
            traffic: Mutex::new(Traffic {
                bucket: Bucket::new(self.bytes_per_second, burst, self.clock.now()),
                window: Window::default(),
                counters: Counters::default(),
                udp: None,
                visible: (0, BTreeMap::new()),
            }),
            tally: Tally::default(),
        });
        sessions.by_id.insert(id, Arc::clone(&session));
        if let Some(older) = sessions.by_node.insert(node, Arc::clone(&session)) {
            sessions.by_id.remove(&older.codec.session());
        }
        tracing::info!(%node, "relay session opened");
        session
    }

    fn grant(&self, session: &Session, key: &[u8; 32]) -> pb::RelayResponse {
        let grant = pb::relay_response::Grant {
            session: session.codec.session().number(),
            key: key.to_vec().into(),
            udp_port: self.udp.get().map_or(0, |(_, port)| u32::from(*port)),
            bytes_per_second: self.bytes_per_second,
        };
        pb::RelayResponse { response: Some(pb::relay_response::Response::Grant(grant)) }
    }

    /// Passes one datagram on, or drops it: as on any network nobody is told, but it is counted.
    fn forward(&self, from: &Session, to: NodeId, datagram: &[u8]) {
        if datagram.is_empty() || datagram.len() > DATAGRAM_BYTES_MAX {
            return count(&from.tally.denied);
        }
        if !from.traffic().bucket.take(datagram.len() as u64, self.clock.now()) {
            return count(&from.tally.over_limit);
        }
        if !self.may_see(from, to) {
            return count(&from.tally.denied);
        }
        let Some(target) = self.lock().by_node.get(&to).cloned() else {
            return count(&from.tally.undeliverable);
        };
        match self.deliver(&target, from.node, datagram) {
            true => count(&from.tally.forwarded),
            false => count(&from.tally.undeliverable),
        }
    }

    /// Whether policy lets the two see each other, and both are members, in World as it stands now.
    fn may_see(&self, from: &Session, to: NodeId) -> bool {
        let seq = self.views.directory.head().seq;
        let mut traffic = from.traffic();
        if traffic.visible.0 != seq {
            traffic.visible = (seq, BTreeMap::new());
        }
        if let Some(known) = traffic.visible.1.get(&to) {
            return *known;
        }
        let visible = self.views.visible(from.node, std::iter::once(to)).contains(&to);
        // As many as there are nodes, if the caller tries all numbers; then it is asked each time.
        if traffic.visible.1.len() < crate::limits::RELAY_VISIBLE_MAX {
            traffic.visible.1.insert(to, visible);
        }
        visible
    }

    fn deliver(&self, target: &Session, from: NodeId, datagram: &[u8]) -> bool {
        if datagram.len() + OVERHEAD_BYTES <= RELAY_UDP_PAYLOAD_MAX && self.by_udp(target, from.0, datagram) {
            return true;
        }
        let datagram =
            pb::relay_response::Datagram { node_id: from.0, datagram: Bytes::copy_from_slice(datagram) };
        let response = pb::relay_response::Response::Datagram(datagram);
        // A full queue means that the node reads too slowly: what does not fit is lost, as on any link.
        target.responses.try_send(Ok(pb::RelayResponse { response: Some(response) })).is_ok()
    }

    fn send_udp(&self, target: &Session, peer: u32, datagram: &[u8]) {
        self.by_udp(target, peer, datagram);
    }

    /// Sends a frame by UDP if the node uses it; `false` if the stream has to do.
    fn by_udp(&self, target: &Session, peer: u32, datagram: &[u8]) -> bool {
        let Some((socket, _)) = self.udp.get() else { return false };
        let now = self.clock.now();
        let mut traffic = target.traffic();
        let fresh = |at: Instant| now.saturating_duration_since(at) < RELAY_UDP_TTL;
        let Some((way, _)) = traffic.udp.filter(|(_, at)| fresh(*at)) else { return false };
        let Some(counter) = traffic.counters.draw() else { return false };
        drop(traffic);
        let frame = Frame { counter, peer, datagram };
        let Ok(bytes) = target.codec.seal(Direction::ToNode, frame) else { return false };
        socket.try_send(&bytes, way).is_ok()
    }

    fn by_id(&self, id: SessionId) -> Option<Arc<Session>> {
        self.lock().by_id.get(&id).cloned()
    }

    fn lock(&self) -> MutexGuard<'_, Sessions> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Session {
    fn traffic(&self) -> MutexGuard<'_, Traffic> {
        self.traffic.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        let (session, tally) = (&self.session, &self.session.tally);
        let mut sessions = self.hub.lock();
        sessions.by_id.remove(&session.codec.session());
        if sessions.by_node.get(&session.node).is_some_and(|current| Arc::ptr_eq(current, session)) {
            sessions.by_node.remove(&session.node);
        }
        drop(sessions);
        let read = |cell: &AtomicU64| cell.load(Ordering::Relaxed);
        tracing::info!(
            node = %session.node,
            forwarded = read(&tally.forwarded),
            over_limit = read(&tally.over_limit),
            denied = read(&tally.denied),
            undeliverable = read(&tally.undeliverable),
            "relay session ended"
        );
    }
}

fn count(cell: &AtomicU64) {
    cell.fetch_add(1, Ordering::Relaxed);
}
