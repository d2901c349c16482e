//! One stream per node: the roster and its changes down, acknowledgements and endpoints up.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh_core::world::Mesh;
use mesh_core::{NodeId, Serial, UtcTime};
use mesh_proto::v1 as pb;
use mesh_runtime::SharedClock;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use crate::archive::Archive;
use crate::gate::Connection;
use crate::limits::{
    COALESCE_WINDOW, CRLS_PER_MESSAGE_MAX, ENDPOINTS_PER_NODE_MAX, FINDING_BYTES_MAX, FINDINGS_PER_NODE_MAX,
    HELLO_TIMEOUT, SIGHTINGS_PER_MESSAGE_MAX, STREAM_QUEUE_MAX, STREAM_REQUESTS_PER_SECOND_MAX,
    VERSION_BYTES_MAX,
};
use crate::presence::{Greeting, Presence, Session, seen_endpoint};
use crate::status::{Problem, cut};
use crate::views::{Roster, Views};

/// A node's clock that differs by more than this is a finding.
const CLOCK_OFFSET_WARN_SECS: i64 = 60;

/// Serves the sync streams of all nodes.
#[derive(Debug, Clone)]
pub(crate) struct SyncHub {
    pub(crate) views: Views,
    pub(crate) presence: Arc<Presence>,
    pub(crate) archive: Archive,
    pub(crate) clock: SharedClock,
    /// What nodes are told of STUN and relay.
    pub(crate) offered: pb::hints::Underlay,
}

type Responses = mpsc::Sender<Result<pb::SyncResponse, Status>>;

/// One node's stream.
struct Stream {
    hub: SyncHub,
    node: NodeId,
    serial: Serial,
    connection: Arc<Connection>,
    expires_in: Duration,
    requests: Streaming<pb::SyncRequest>,
    responses: Responses,
}

/// Where the node stands, as far as this stream has told it.
#[derive(Default)]
struct Told {
    /// The cursor it has; absent until it has received a full map.
    cursor: Option<pb::Cursor>,
    /// Up to which record nothing is owed to it.
    since: Option<u64>,
    hints: u64,
    seen_from: Option<pb::Endpoint>,
    seen_from_told: bool,
    offered_told: bool,
}

/// Whose history a node's cursor belongs to.
enum Origin {
    Ours(pb::Cursor),
    /// Another journal or incarnation, or a record that is not kept.
    Unknown,
    /// It says it is ours, and is not.
    Forked,
}

impl SyncHub {
    /// Takes up a node's stream. The stream ends with its connection's identity.
    pub(crate) fn open(
        &self,
        (node, serial): (NodeId, Serial),
        connection: Arc<Connection>,
        requests: Streaming<pb::SyncRequest>,
    ) -> ReceiverStream<Result<pb::SyncResponse, Status>> {
        let (responses, stream) = mpsc::channel(STREAM_QUEUE_MAX);
        let expires_in = self.views.directory.read(|world| {
            let not_after = world.certificate(&serial).map_or(UtcTime::EPOCH, |c| c.not_after);
            not_after.since(UtcTime::from(self.clock.utc_now()))
        });
        let stream_task =
            Stream { hub: self.clone(), node, serial, connection, expires_in, requests, responses };
        tokio::spawn(async move {
            let responses = stream_task.responses.clone();
            if let Err(status) = stream_task.run().await {
                let _ = responses.try_send(Err(status));
            }
        });
        ReceiverStream::new(stream)
    }

    /// Whether a node's cursor names a record that this journal has, so that a delta may start there.
    async fn judge_cursor(&self, node: NodeId, cursor: pb::Cursor) -> Origin {
        let own = cursor.journal_id == self.views.journal_id.as_slice()
            && cursor.incarnation == self.views.incarnation;
        if !own {
            return Origin::Unknown;
        }
        let (archive, seq) = (self.archive.clone(), cursor.seq);
        if seq > self.views.directory.read(|world| world.head_seq()) {
            tracing::error!(%node, seq, "a node's cursor is ahead of our journal: the journal was forked");
            return Origin::Forked;
        }
        let hash8 = tokio::task::spawn_blocking(move || archive.hash8(seq)).await;
        let Ok(Ok(Some(hash8))) = hash8 else { return Origin::Unknown };
        if cursor.hash8 != hash8.as_slice() {
            tracing::error!(%node, seq, "a node's cursor names another record than ours: the journal was forked");
            return Origin::Forked;
        }
        Origin::Ours(cursor)
    }

    fn utc(&self) -> UtcTime {
        self.clock.utc_now().into()
    }
}

impl Stream {
    async fn run(mut self) -> Result<(), Status> {
        let hello = self.hello().await?;
        let seen = seen_endpoint(self.connection.address(), hello.wireguard_port);
        let mut told = Told { seen_from: seen.clone(), ..Told::default() };
        let mut forked = false;
        if let Some(cursor) = hello.cursor.clone() {
            match self.hub.judge_cursor(self.node, cursor).await {
                Origin::Ours(cursor) => {
                    told.since = Some(cursor.seq);
                    told.cursor = Some(cursor);
                }
                Origin::Unknown => {}
                Origin::Forked => forked = true,
            }
        }
        let presence = Arc::clone(&self.hub.presence);
        let times = (self.hub.clock.now(), self.hub.utc());
        let greeting = self.greeting(hello, seen, (told.since.unwrap_or(0), forked))?;
        let session = presence.connect(self.node, greeting, times);
        tracing::info!(node = %self.node, resumed = told.since.is_some(), "sync stream opened");
        let ended = self.exchange(&session, &mut told).await;
        tracing::info!(node = %self.node, "sync stream ended");
        ended
    }

    async fn hello(&mut self) -> Result<pb::sync_request::Hello, Status> {
        let first = tokio::time::timeout(HELLO_TIMEOUT, self.requests.message())
            .await
            .map_err(|_| Problem::usage("no hello came in time"))??;
        match first.and_then(|request| request.request) {
            Some(pb::sync_request::Request::Hello(hello)) => Ok(hello),
            _ => Err(Problem::usage("the first message must be a hello").into()),
        }
    }

    fn greeting(
        &self,
        hello: pb::sync_request::Hello,
        seen: Option<pb::Endpoint>,
        (holds_seq, forked): (u64, bool),
    ) -> Result<Greeting, Problem> {
        check_crls(&hello.crls)?;
        let clock_offset_secs = match hello.node_time {
            0 => 0,
            node_time => node_time.saturating_sub(self.hub.utc().unix()),
        };
        if clock_offset_secs.abs() > CLOCK_OFFSET_WARN_SECS {
            tracing::warn!(node = %self.node, clock_offset_secs, "a node's clock differs from ours");
        }
        Ok(Greeting {
            version: short_text(hello.version, VERSION_BYTES_MAX),
            backend: short_text(hello.backend, VERSION_BYTES_MAX),
            clock_offset_secs,
            holds_seq,
            trust: hello.trust,
            serial: Some(self.serial),
            forked,
            crls: hello.crls,
            endpoints: self.endpoints(hello.endpoints, seen)?,
        })
    }

    /// Checks what a node says about where it is, and adds where we see it.
    fn endpoints(
        &self,
        reported: Vec<pb::Endpoint>,
        seen: Option<pb::Endpoint>,
    ) -> Result<Vec<pb::Endpoint>, Problem> {
        if reported.len() > ENDPOINTS_PER_NODE_MAX {
            return Err(Problem::too_large("list of endpoints", ENDPOINTS_PER_NODE_MAX));
        }
        let mesh = self.hub.views.directory.read(|world| world.mesh().cloned());
        let mut endpoints: Vec<_> = reported
            .into_iter()
            .filter(|endpoint| mesh.as_ref().is_some_and(|mesh| is_usable(endpoint, mesh)))
            .collect();
        // A node that knows by STUN needs no guess.
        let knows = |endpoint: &pb::Endpoint| endpoint.source() == pb::endpoint::Source::ControllerSaw;
        if let Some(seen) = seen
            && !endpoints.iter().any(|endpoint| endpoint.address == seen.address || knows(endpoint))
        {
            endpoints.push(seen);
        }
        Ok(endpoints)
    }

    /// Takes up where this node sees its peers, for those it may see; of others it can know nothing.
    fn note_sightings(&self, seen: Vec<pb::sync_request::Seen>) -> Result<(), Problem> {
        if seen.len() > SIGHTINGS_PER_MESSAGE_MAX {
            return Err(Problem::too_large("list of sightings", SIGHTINGS_PER_MESSAGE_MAX));
        }
        let visible = self.hub.views.visible(self.node, seen.iter().map(|seen| NodeId(seen.node_id)));
        let mesh = self.hub.views.directory.read(|world| world.mesh().cloned());
        for seen in seen.into_iter().filter(|seen| visible.contains(&NodeId(seen.node_id))) {
            let source = pb::endpoint::Source::PeerSaw as i32;
            let endpoint = pb::Endpoint { address: seen.address, source };
            if mesh.as_ref().is_some_and(|mesh| is_usable(&endpoint, mesh)) {
                self.hub.presence.report_sighting(NodeId(seen.node_id), endpoint);
            }
        }
        Ok(())
    }

    async fn exchange(&mut self, session: &Session<'_>, told: &mut Told) -> Result<(), Status> {
        let mut head = self.hub.views.directory.watch();
        let mut hints = self.hub.presence.watch_hints();
        let (closing, replaced) = (self.connection.closing.clone(), session.replaced.clone());
        let expiry = tokio::time::sleep(self.expires_in);
        tokio::pin!(expiry);
        let (mut due, mut next_send) = (true, Instant::now());
        let mut budget = Budget::new(Instant::now());
        loop {
            tokio::select! {
                biased;
                () = closing.cancelled() => return self.goodbye(self.reason_to_close()),
                () = replaced.cancelled() => return self.goodbye(replaced_by_newer()),
                () = &mut expiry => return self.goodbye(Problem::identity_expired()),
                request = paced(budget.next_at, &mut self.requests) => match request? {
                    Some(request) => {
                        budget.spend(Instant::now());
                        self.handle(request, session, told)?;
                    }
                    None => return Ok(()),
                },
                changed = head.changed(), if !due => {
                    due = true;
                    changed.map_err(|_| Problem::closing())?;
                }
                changed = hints.changed(), if !due => {
                    due = true;
                    changed.map_err(|_| Problem::closing())?;
                }
                // A slow reader holds up only itself: when it is ready again, one message with the sum
                // of what it missed is made then.
                permit = ready(next_send, &self.responses), if due => {
                    let Some(permit) = permit else { return Ok(()) };
                    head.mark_unchanged();
                    hints.mark_unchanged();
                    due = false;
                    if let Some(response) = self.next_response(told, &mut due)? {
                        permit.send(Ok(response));
                        next_send = Instant::now() + if due { Duration::ZERO } else { COALESCE_WINDOW };
                    }
                }
            }
        }
    }

    /// The next message owed to the node. Roster first; `more` says that hints are to follow at once.
    fn next_response(&self, told: &mut Told, more: &mut bool) -> Result<Option<pb::SyncResponse>, Status> {
        let (roster, head) = self.hub.views.roster(self.node, told.cursor.as_ref(), told.since);
        told.since = Some(head);
        let response = match roster {
            Roster::Gone => return Err(Problem::identity_revoked().into()),
            Roster::Full(full) => {
                told.cursor.clone_from(&full.cursor);
                told.hints = 0;
                pb::sync_response::Response::Full(full)
            }
            Roster::Delta(delta, changed) => {
                told.cursor.clone_from(&delta.cursor);
                // A peer that just became visible may have said long ago where it is.
                if !changed.is_empty() {
                    told.hints = 0;
                }
                pb::sync_response::Response::Delta(delta)
            }
            Roster::Unchanged => return Ok(self.hints(told).map(|hints| self.response(hints))),
        };
        *more = true;
        Ok(Some(self.response(response)))
    }

    fn hints(&self, told: &mut Told) -> Option<pb::sync_response::Response> {
        let changed = self.hub.presence.endpoints_since(told.hints, self.hub.clock.now());
        let newest = changed.iter().map(|(_, version, _)| *version).max();
        told.hints = newest.map_or(told.hints, |newest| newest.max(told.hints));
        let visible: BTreeSet<NodeId> = self.hub.views.visible(self.node, changed.iter().map(|(id, ..)| *id));
        let peers: Vec<_> = changed
            .into_iter()
            .filter(|(id, ..)| visible.contains(id))
            .map(|(id, _, endpoints)| pb::hints::PeerEndpoints { node_id: id.0, endpoints })
            .collect();
        let seen_from: Vec<_> = match told.seen_from_told {
            true => Vec::new(),
            false => told.seen_from.clone().into_iter().collect(),
        };
        told.seen_from_told = true;
        let underlay = (!std::mem::replace(&mut told.offered_told, true)).then_some(self.hub.offered);
        if peers.is_empty() && seen_from.is_empty() && underlay.is_none() {
            return None;
        }
        Some(pb::sync_response::Response::Hints(pb::Hints { peers, seen_from, underlay }))
    }

    fn handle(&self, request: pb::SyncRequest, session: &Session<'_>, told: &Told) -> Result<(), Problem> {
        use pb::sync_request::Request;
        let at = self.hub.utc();
        match request.request {
            Some(Request::Ack(mut ack)) => {
                check_crls(&ack.crls)?;
                let findings = std::mem::take(&mut ack.findings);
                let findings = findings
                    .into_iter()
                    .take(FINDINGS_PER_NODE_MAX)
                    .map(|finding| short_text(finding, FINDING_BYTES_MAX))
                    .collect();
                // Nobody can have taken up what has not been sent.
                ack.seq = ack.seq.min(told.since.unwrap_or(0));
                session.acknowledge(&ack, findings, at);
            }
            Some(Request::Endpoints(endpoints)) => {
                self.note_sightings(endpoints.seen)?;
                let endpoints = self.endpoints(endpoints.endpoints, told.seen_from.clone())?;
                session.seen(at);
                self.hub.presence.report_endpoints(self.node, endpoints, self.hub.clock.now());
            }
            Some(Request::Hello(_)) => return Err(Problem::usage("a stream has one hello")),
            None => {}
        }
        Ok(())
    }

    /// Tells the node why the stream ends. If it does not read, the end itself has to do.
    fn goodbye(&self, reason: Problem) -> Result<(), Status> {
        let goodbye = pb::Goodbye { reason: Some(reason.clone().detail()) };
        let response = self.response(pb::sync_response::Response::Goodbye(goodbye));
        let _ = self.responses.try_send(Ok(response));
        Err(reason.into())
    }

    fn reason_to_close(&self) -> Problem {
        let active = self.hub.views.directory.read(|world| world.view_for(self.node).is_some());
        match active {
            true => Problem::closing(),
            false => Problem::identity_revoked(),
        }
    }

    fn response(&self, response: pb::sync_response::Response) -> pb::SyncResponse {
        pb::SyncResponse { controller_time: self.hub.utc().unix(), response: Some(response) }
    }
}

/// The node's next message, once its turn has come. Safe to drop and to call again.
async fn paced(
    at: Instant,
    requests: &mut Streaming<pb::SyncRequest>,
) -> Result<Option<pb::SyncRequest>, Status> {
    tokio::time::sleep_until(at).await;
    requests.message().await
}

/// How many messages of a node are taken now, and when the next one is.
struct Budget {
    window: Instant,
    taken: u32,
    next_at: Instant,
}

impl Budget {
    fn new(now: Instant) -> Self {
        Self { window: now, taken: 0, next_at: now }
    }

    fn spend(&mut self, now: Instant) {
        const WINDOW: Duration = Duration::from_secs(1);
        if now >= self.window + WINDOW {
            *self = Self::new(now);
        }
        self.taken += 1;
        if self.taken >= STREAM_REQUESTS_PER_SECOND_MAX {
            self.next_at = self.window + WINDOW;
        }
    }
}

/// A place in the stream's queue, once the window has passed; `None` when the node is gone.
async fn ready<'a>(
    at: Instant,
    responses: &'a Responses,
) -> Option<mpsc::Permit<'a, Result<pb::SyncResponse, Status>>> {
    tokio::time::sleep_until(at).await;
    responses.reserve().await.ok()
}

fn replaced_by_newer() -> Problem {
    Problem::new(
        pb::ErrorCode::Denied,
        "a newer stream of this node has taken over",
        "if this machine was copied, enroll the copy with a token of its own",
    )
}

pub(crate) fn check_crls(crls: &[pb::CrlHave]) -> Result<(), Problem> {
    if crls.len() > CRLS_PER_MESSAGE_MAX {
        return Err(Problem::too_large("list of CRLs", CRLS_PER_MESSAGE_MAX));
    }
    Ok(())
}

/// An underlay address that a peer could send to. Mesh addresses would lead into the tunnel itself.
fn is_usable(endpoint: &pb::Endpoint, mesh: &Mesh) -> bool {
    endpoint.address.parse::<SocketAddr>().is_ok_and(|address| {
        let ip = address.ip();
        let relayed = mesh_core::endpoints::relayed_peer(address).is_some();
        address.port() != 0 && !ip.is_unspecified() && !ip.is_multicast() && !mesh.contains(ip) && !relayed
    })
}

fn short_text(text: String, max: usize) -> String {
    mesh_core::change::escape(&cut(text, max))
}
