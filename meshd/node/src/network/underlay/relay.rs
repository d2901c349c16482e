//! This node's relay session: the stream it is opened on, and its frames by UDP.

use std::net::SocketAddr;
use std::time::Duration;

use mesh_core::NodeId;
use mesh_core::relay::{
    Codec, Counters, DATAGRAM_BYTES_MAX, Direction, Frame, Key, OVERHEAD_BYTES, SessionId, Window,
};
use mesh_proto::v1 as pb;
use mesh_proto::v1::relay_client::RelayClient;
use mesh_proto::v1::relay_response::{Grant, Response};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::AbortOnDropHandle;
use tonic::transport::Channel;

use super::Event;
use crate::limits::RELAY_QUEUE;

/// Keepalives by UDP until the first answer, and after it.
const KEEPALIVE_FIRST: Duration = Duration::from_millis(500);
const KEEPALIVE: Duration = Duration::from_secs(20);
/// Between two questions whether UDP gets through again.
const KEEPALIVE_BLOCKED: Duration = Duration::from_secs(10);
/// Keepalives at the first pace.
const KEEPALIVES_FIRST: u32 = 4;
/// Without an answer for so long UDP does not get through.
const UDP_SILENCE: Duration = Duration::from_secs(45);
/// After a stream that ended before the next is opened.
const REOPEN: Duration = Duration::from_secs(2);
/// Largest UDP payload over Ethernet, by IPv4 and by IPv6; larger frames take the stream.
const PAYLOAD_IPV4_MAX: usize = 1472;
const PAYLOAD_IPV6_MAX: usize = 1452;

/// The session, if there is one.
#[derive(Default)]
pub(super) struct Relay {
    channel: Option<Channel>,
    /// Counts streams, so that what an old one still says is not taken for a new one's.
    number: u64,
    stream: Option<Stream>,
    session: Option<Session>,
    reopen_at: Option<Instant>,
}

struct Stream {
    requests: mpsc::Sender<pb::RelayRequest>,
    _task: AbortOnDropHandle<()>,
}

struct Session {
    codec: Codec,
    counters: Counters,
    window: Window,
    /// The controller's UDP port, if it has one.
    server: Option<SocketAddr>,
    answered_at: Option<Instant>,
    keepalives: u32,
    keepalive_at: Instant,
}

impl Relay {
    /// Whether datagrams can be relayed.
    pub(super) fn is_open(&self) -> bool {
        self.session.is_some()
    }

    /// The connection on which sessions are opened from now on; `None`: no relay. A session ends with its
    /// connection.
    pub(super) fn use_channel(&mut self, channel: Option<Channel>, events: &mpsc::Sender<Event>) {
        // Channels cannot be compared: every call means another.
        (self.channel, self.reopen_at) = (channel, None);
        self.open(events);
    }

    fn open(&mut self, events: &mpsc::Sender<Event>) {
        (self.session, self.stream) = (None, None);
        let Some(channel) = self.channel.clone() else { return };
        self.number += 1;
        let (requests, outgoing) = mpsc::channel(RELAY_QUEUE);
        let task = tokio::spawn(pump(channel, outgoing, self.number, events.clone()));
        self.stream = Some(Stream { requests, _task: AbortOnDropHandle::new(task) });
    }

    /// A stream has ended; what an older one says is late.
    pub(super) fn ended(&mut self, number: u64, now: Instant) {
        if number == self.number {
            (self.session, self.stream) = (None, None);
            self.reopen_at = self.channel.is_some().then(|| now + REOPEN);
        }
    }

    /// Opens the next stream when its time has come.
    pub(super) fn reopen(&mut self, events: &mpsc::Sender<Event>, now: Instant) {
        if self.reopen_at.is_some_and(|at| at <= now) {
            self.reopen_at = None;
            self.open(events);
        }
    }

    /// Takes a message of the stream; a datagram of a peer comes out.
    pub(super) fn take_response(
        &mut self,
        number: u64,
        response: pb::RelayResponse,
        server: Option<SocketAddr>,
        now: Instant,
    ) -> Option<(NodeId, Vec<u8>)> {
        if number != self.number {
            return None;
        }
        match response.response? {
            Response::Grant(grant) => {
                self.session = session(&grant, server, now);
                None
            }
            Response::Datagram(datagram) => {
                let fits = datagram.node_id != 0 && datagram.datagram.len() <= DATAGRAM_BYTES_MAX;
                (fits && self.session.is_some())
                    .then(|| (NodeId(datagram.node_id), datagram.datagram.to_vec()))
            }
        }
    }

    /// Takes a frame that came by UDP; a datagram of a peer comes out. What is not of this session is dropped.
    pub(super) fn take_frame<'a>(
        &mut self,
        bytes: &'a [u8],
        from: SocketAddr,
        now: Instant,
    ) -> Option<(NodeId, &'a [u8])> {
        let session = self.session.as_mut().filter(|session| session.server == Some(from))?;
        let frame = session.codec.open(Direction::ToNode, bytes).ok()?;
        if !session.window.accept(frame.counter) {
            return None;
        }
        if session.answered_at.is_none() {
            session.keepalive_at = now + KEEPALIVE;
        }
        session.answered_at = Some(now);
        (frame.peer != 0).then_some((NodeId(frame.peer), frame.datagram))
    }

    /// Sends a datagram: a frame to send by UDP comes out, or it has gone to the stream, or it is lost.
    pub(super) fn send(
        &mut self,
        peer: NodeId,
        datagram: Vec<u8>,
        now: Instant,
    ) -> Option<(Vec<u8>, SocketAddr)> {
        let session = self.session.as_mut()?;
        if datagram.len() > DATAGRAM_BYTES_MAX {
            return None;
        }
        if let Some(server) = session.udp(datagram.len(), now)
            && let Some(frame) = session.frame(peer.0, &datagram)
        {
            return Some((frame, server));
        }
        let request = pb::RelayRequest { node_id: peer.0, datagram: datagram.into() };
        // A full queue means that the connection is slower than the traffic: what does not fit is lost.
        let _ = self.stream.as_ref()?.requests.try_send(request);
        None
    }

    /// The keepalive that is due, by UDP.
    pub(super) fn keepalive(&mut self, now: Instant) -> Option<(Vec<u8>, SocketAddr)> {
        let session = self.session.as_mut().filter(|session| session.keepalive_at <= now)?;
        let server = session.server?;
        session.keepalives = session.keepalives.saturating_add(1);
        session.keepalive_at = now
            + match session.gets_through(now) {
                true => KEEPALIVE,
                false if session.keepalives <= KEEPALIVES_FIRST => KEEPALIVE_FIRST,
                false => KEEPALIVE_BLOCKED,
            };
        Some((session.frame(0, &[])?, server))
    }

    /// Our own network has changed: the stream is used until UDP is heard again.
    pub(super) fn doubt_udp(&mut self, now: Instant) {
        if let Some(session) = &mut self.session {
            (session.answered_at, session.keepalives, session.keepalive_at) = (None, 0, now);
        }
    }

    pub(super) fn wake(&self) -> Option<Instant> {
        let keepalive = self.session.as_ref().filter(|session| session.server.is_some());
        [keepalive.map(|session| session.keepalive_at), self.reopen_at].into_iter().flatten().min()
    }
}

impl Session {
    fn gets_through(&self, now: Instant) -> bool {
        self.answered_at.is_some_and(|at| now.saturating_duration_since(at) < UDP_SILENCE)
    }

    /// Where a datagram of `length` bytes goes by UDP, if it can.
    fn udp(&self, length: usize, now: Instant) -> Option<SocketAddr> {
        let server = self.server.filter(|_| self.gets_through(now))?;
        let room = if server.is_ipv4() { PAYLOAD_IPV4_MAX } else { PAYLOAD_IPV6_MAX };
        (length + OVERHEAD_BYTES <= room).then_some(server)
    }

    fn frame(&mut self, peer: u32, datagram: &[u8]) -> Option<Vec<u8>> {
        let counter = self.counters.draw()?;
        self.codec.seal(Direction::ToController, Frame { counter, peer, datagram }).ok()
    }
}

/// The session that was granted; `None` if the grant cannot be one.
fn session(grant: &Grant, server: Option<SocketAddr>, now: Instant) -> Option<Session> {
    let key = <[u8; 32]>::try_from(&*grant.key).ok()?;
    let id = SessionId::of(grant.session);
    if id.number() != grant.session {
        return None;
    }
    let port = u16::try_from(grant.udp_port).ok().filter(|port| *port != 0);
    Some(Session {
        codec: Codec::new(id, &Key::new(key)),
        counters: Counters::default(),
        window: Window::default(),
        server: server.zip(port).map(|(server, port)| SocketAddr::new(server.ip(), port)),
        answered_at: None,
        keepalives: 0,
        keepalive_at: now,
    })
}

/// Carries one stream until it ends.
async fn pump(
    channel: Channel,
    outgoing: mpsc::Receiver<pb::RelayRequest>,
    number: u64,
    events: mpsc::Sender<Event>,
) {
    let ended = async {
        let mut client = RelayClient::new(channel).max_decoding_message_size(2 * DATAGRAM_BYTES_MAX);
        let mut incoming = client.open(ReceiverStream::new(outgoing)).await?.into_inner();
        while let Some(response) = incoming.message().await? {
            if events.send(Event::Stream { number, response }).await.is_err() {
                break;
            }
        }
        Ok::<(), tonic::Status>(())
    };
    if let Err(status) = ended.await {
        tracing::info!(why = status.message(), "relay session ended");
    }
    // The task that reads this has ended otherwise.
    let _ = events.send(Event::StreamEnded { number }).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: NodeId = NodeId(7);

    fn open(udp_port: u32, now: Instant) -> (Relay, mpsc::Receiver<pb::RelayRequest>, SocketAddr) {
        let (requests, sent) = mpsc::channel(8);
        let task = AbortOnDropHandle::new(tokio::spawn(async {}));
        let mut relay = Relay { stream: Some(Stream { requests, _task: task }), ..Relay::default() };
        let server = SocketAddr::from(([192, 0, 2, 1], 7443));
        let grant = Grant { session: 1 << 31 | 5, key: vec![3; 32].into(), udp_port, bytes_per_second: 1 };
        let response = pb::RelayResponse { response: Some(Response::Grant(grant)) };
        assert!(relay.take_response(1, response.clone(), Some(server), now).is_none());
        assert!(!relay.is_open(), "the word of another stream");
        relay.take_response(0, response, Some(server), now);
        assert!(relay.is_open());
        (relay, sent, server)
    }

    fn controller() -> Codec {
        Codec::new(SessionId::of(5), &Key::new([3; 32]))
    }

    #[tokio::test]
    async fn datagrams_take_the_stream_until_udp_is_heard_and_when_it_falls_silent() {
        let mut now = Instant::now();
        let (mut relay, mut sent, server) = open(7443, now);
        assert!(relay.send(PEER, vec![1; 100], now).is_none());
        assert_eq!(sent.try_recv().unwrap().node_id, 7);
        let (keepalive, to) = relay.keepalive(now).unwrap();
        assert_eq!(to, server);
        assert_eq!(controller().open(Direction::ToController, &keepalive).unwrap().peer, 0);
        assert!(relay.keepalive(now).is_none());

        let answer =
            controller().seal(Direction::ToNode, Frame { counter: 0, peer: 0, datagram: &[] }).unwrap();
        assert!(relay.take_frame(&answer, SocketAddr::from(([192, 0, 2, 9], 7443)), now).is_none());
        assert!(relay.send(PEER, vec![1; 100], now).is_none(), "an answer from elsewhere is none");
        assert!(relay.take_frame(&answer, server, now).is_none(), "a keepalive carries nothing");
        let (frame, _) = relay.send(PEER, vec![1; 100], now).expect("UDP gets through");
        assert_eq!(controller().open(Direction::ToController, &frame).unwrap().datagram, [1; 100]);
        assert!(relay.send(PEER, vec![1; 1453], now).is_none(), "too large for one packet");
        now += UDP_SILENCE;
        assert!(relay.send(PEER, vec![1; 100], now).is_none());
        assert_eq!(std::iter::from_fn(|| sent.try_recv().ok()).count(), 3);
    }

    #[tokio::test]
    async fn a_frame_counts_once() {
        let now = Instant::now();
        let (mut relay, _sent, server) = open(7443, now);
        let frame = Frame { counter: 4, peer: 7, datagram: b"ciphertext" };
        let bytes = controller().seal(Direction::ToNode, frame).unwrap();
        assert_eq!(relay.take_frame(&bytes, server, now), Some((PEER, &b"ciphertext"[..])));
        assert_eq!(relay.take_frame(&bytes, server, now), None);
        let own = controller().seal(Direction::ToController, Frame { counter: 5, ..frame }).unwrap();
        assert_eq!(relay.take_frame(&own, server, now), None, "a frame of ours, thrown back");
    }

    #[tokio::test]
    async fn without_a_udp_port_everything_takes_the_stream() {
        let now = Instant::now();
        let (mut relay, mut sent, _) = open(0, now);
        assert!(relay.keepalive(now).is_none() && relay.wake().is_none());
        assert!(relay.send(PEER, vec![1; 100], now).is_none());
        assert!(sent.try_recv().is_ok());
        relay.ended(0, now);
        assert!(!relay.is_open());
    }
}
