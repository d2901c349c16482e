//! The way to the controller: one connection, one Sync stream on it, and calls of other tasks beside it.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mesh_proto::v1 as pb;
use mesh_proto::v1::ErrorCode;
use mesh_proto::v1::certificates_client::CertificatesClient;
use mesh_proto::v1::sync_client::SyncClient;
use mesh_proto::v1::sync_response::Response;
use mesh_runtime::Backoff;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Request;
use tonic::transport::Channel;

use crate::certs::PairsHandle;
use crate::clock::ControllerClock;
use crate::connect::{Connected, connect, node_config};
use crate::failure::Failure;
use crate::findings::{Findings, Severity};
use crate::hostop::{Host, Way};
use crate::identity::{Active, Identities};
use crate::limits::{CALL_TIMEOUT, COMMAND_QUEUE, MESSAGE_BYTES_MAX, RECONNECT_FIRST, RECONNECT_LONGEST};
use crate::network::{NetworkHandle, Receipt, Update};
use crate::roster::RosterError;
use crate::state::{ClockFile, StateDir};

/// A clock this far from the controller's is worth a finding, seconds.
const CLOCK_OFF_SECS: i64 = 60;

/// How the connection stands, for `status`.
#[derive(Debug, Clone, Default)]
pub(crate) struct UplinkStatus {
    pub(crate) controller: String,
    pub(crate) connected: bool,
    pub(crate) rtt: Duration,
    /// The controller's address, while connected.
    pub(crate) remote: Option<SocketAddr>,
    /// Why the last attempt failed; empty while connected.
    pub(crate) problem: String,
    /// Set while the controller refuses this node's identity: that is no outage, and is not told as one.
    pub(crate) refusal: Option<Failure>,
}

/// The uplink as other tasks see it.
#[derive(Debug, Clone)]
pub(crate) struct UplinkHandle {
    /// The open connection; `None` while there is none.
    pub(crate) channel: watch::Receiver<Option<Channel>>,
    status: Arc<Mutex<UplinkStatus>>,
}

impl UplinkHandle {
    pub(crate) fn status(&self) -> UplinkStatus {
        self.status.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The open connection.
    ///
    /// # Errors
    /// The controller's own words if it refuses this node; else [`ErrorCode::ControllerUnreachable`].
    pub(crate) fn open_channel(&self) -> Result<Channel, Failure> {
        self.channel.borrow().clone().ok_or_else(|| {
            let UplinkStatus { problem, refusal, .. } = self.status();
            if let Some(refusal) = refusal {
                return refusal;
            }
            let why = match problem.is_empty() {
                true => "there is no connection to the controller yet".to_owned(),
                false => format!("there is no connection to the controller: {problem}"),
            };
            Failure::new(
                ErrorCode::ControllerUnreachable,
                why,
                "check that the controller runs and its port is open from here",
            )
        })
    }
}

/// An uplink that never connects.
#[cfg(test)]
pub(crate) fn detached() -> UplinkHandle {
    let (_, channel) = watch::channel(None);
    UplinkHandle { channel, status: Arc::default() }
}

/// Keeps the connection up for as long as it runs.
pub(crate) struct Uplink {
    state: StateDir,
    clock: ControllerClock,
    findings: Findings,
    identities: Arc<Identities>,
    network: NetworkHandle,
    pairs: PairsHandle,
    channel: watch::Sender<Option<Channel>>,
    status: Arc<Mutex<UplinkStatus>>,
    host: Host,
    /// Rises whenever the host's links, addresses or routes change.
    changes: watch::Receiver<u64>,
    /// Where the controller was last spoken to.
    at: Option<IpAddr>,
    /// The next `Hello` asks for the whole map.
    ask_everything: bool,
}

/// Why a stream ended.
enum End {
    /// A new identity is to be used: connect again at once.
    NewIdentity,
    /// The map that is needed is another one: connect again at once, asking for everything.
    Resync(RosterError),
    /// This host has moved, and the connection has stayed behind: connect again at once.
    Moved,
    /// Connection or controller failed: wait, then try again.
    Failed(Failure),
}

impl From<Failure> for End {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

impl From<crate::network::Gone> for End {
    fn from(gone: crate::network::Gone) -> Self {
        Self::Failed(gone.into())
    }
}

impl From<tonic::Status> for End {
    fn from(status: tonic::Status) -> Self {
        Self::Failed(Failure::from_status(&status))
    }
}

impl Uplink {
    pub(crate) fn new(
        state: StateDir,
        clock: ControllerClock,
        findings: Findings,
        identities: Arc<Identities>,
        network: NetworkHandle,
        pairs: PairsHandle,
        (host, changes): (Host, watch::Receiver<u64>),
    ) -> (UplinkHandle, Self) {
        let (channel, open) = watch::channel(None);
        let status = Arc::new(Mutex::new(UplinkStatus::default()));
        let handle = UplinkHandle { channel: open, status: status.clone() };
        let uplink = Self {
            state,
            clock,
            findings,
            identities,
            network,
            pairs,
            channel,
            status,
            host,
            changes,
            at: None,
            ask_everything: false,
        };
        (handle, uplink)
    }

    /// Runs until it is dropped.
    pub(crate) async fn run(mut self) {
        let mut backoff = Backoff::new(RECONNECT_FIRST, RECONNECT_LONGEST);
        loop {
            let mut served = false;
            let active = self.identities.active();
            let end = match self.session(&active, &mut served).await {
                Ok(never) => match never {},
                Err(end) => end,
            };
            self.note(|status| status.remote = None);
            self.channel.send_replace(None);
            if served {
                backoff.reset();
            }
            match end {
                End::NewIdentity => self.note(|status| status.connected = false),
                End::Moved => {
                    tracing::info!("this host has moved, connecting anew");
                    self.note(|status| status.connected = false);
                }
                End::Resync(error) => {
                    tracing::warn!(%error, "asking for the whole map");
                    self.ask_everything = true;
                    self.wait(backoff.next_wait()).await;
                }
                End::Failed(failure) => {
                    self.failed(&active, &failure);
                    self.wait(backoff.next_wait()).await;
                }
            }
        }
    }

    /// Waits, unless the host's network changes: what could not be reached may be reachable now.
    async fn wait(&mut self, pause: Duration) {
        self.changes.mark_unchanged();
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            Ok(()) = self.changes.changed() => {}
        }
    }

    /// Connects, and serves one Sync stream to its end.
    async fn session(
        &mut self,
        active: &Arc<Active>,
        served: &mut bool,
    ) -> Result<std::convert::Infallible, End> {
        let mut moved = Moves::new(self.host.clone(), self.changes.clone());
        moved.follow(self.at).await;
        let connected = tokio::select! {
            connected = self.connect(active) => connected?,
            () = moved.wait() => return Err(End::Moved),
        };
        self.at = Some(connected.at.ip());
        moved.follow(self.at).await;
        if active.has_expired(self.clock.now()) {
            self.identities.resume(&connected.channel).await?;
            return Err(End::NewIdentity);
        }
        let channel = connected.channel;
        // A first start has no CRL, and without one no peer is believed.
        if self.network.knowledge().await?.crls.is_empty() {
            self.fetch_crls(&channel).await?;
        }
        let (outgoing, stream) = mpsc::channel(COMMAND_QUEUE);
        let hello = self.hello().await?;
        send(&outgoing, pb::sync_request::Request::Hello(hello)).await?;
        let mut client = SyncClient::new(channel.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX);
        let opened = tokio::time::timeout(CALL_TIMEOUT, client.sync(ReceiverStream::new(stream))).await;
        let mut incoming = opened.map_err(|_| silent())??.into_inner();
        let first_message = tokio::time::sleep(CALL_TIMEOUT);
        tokio::pin!(first_message);
        let mut identity = self.identities.subscribe();
        let mut endpoints = self.network.endpoints.clone();
        endpoints.mark_unchanged();
        let mut seen = self.network.seen.clone();
        if !seen.borrow().is_empty() {
            seen.mark_changed();
        }
        let mut settled = self.pairs.settled.clone();
        settled.mark_unchanged();
        loop {
            tokio::select! {
                message = incoming.message() => {
                    let Some(message) = message? else {
                        return Err(closed("the controller ended the stream").into());
                    };
                    if !*served {
                        *served = true;
                        self.identities.prove(active)?;
                        self.note(|status| {
                            status.connected = true;
                            status.rtt = connected.rtt;
                            status.remote = Some(connected.at);
                            status.problem.clear();
                            status.refusal = None;
                        });
                        self.findings.clear("controller");
                        tracing::info!(controller = self.current_controller(), "controller connected");
                        self.channel.send_replace(Some(channel.clone()));
                    }
                    self.learn_time(message.controller_time);
                    self.take(message, &channel, &outgoing).await?;
                }
                () = moved.wait() => return Err(End::Moved),
                () = &mut first_message, if !*served => return Err(silent().into()),
                changed = identity.changed() => {
                    // The sender lives in `self.identities`.
                    if changed.is_ok() && identity.borrow_and_update().serial != active.serial {
                        return Err(End::NewIdentity);
                    }
                }
                changed = self.network.receipt.changed(), if *served => {
                    // Stored at last, or by another way than this stream.
                    if changed.is_err() {
                        return Err(closed("the network has stopped").into());
                    }
                    self.acknowledge(&outgoing).await?;
                }
                changed = settled.changed(), if *served => {
                    // The services have followed the authorities.
                    if changed.is_err() {
                        return Err(closed("the pairs' task has stopped").into());
                    }
                    settled.borrow_and_update();
                    self.acknowledge(&outgoing).await?;
                }
                changed = endpoints.changed() => {
                    if changed.is_err() {
                        return Err(closed("the network has stopped").into());
                    }
                    endpoints.mark_unchanged();
                    self.tell_endpoints(&outgoing).await?;
                }
                changed = seen.changed() => {
                    if changed.is_err() {
                        return Err(closed("the network has stopped").into());
                    }
                    self.tell_endpoints(&outgoing).await?;
                }
            }
        }
    }

    async fn take(
        &mut self,
        message: pb::SyncResponse,
        channel: &Channel,
        outgoing: &mpsc::Sender<pb::SyncRequest>,
    ) -> Result<(), End> {
        let (update, published) = match message.response {
            Some(Response::Full(full)) => {
                let crls = full.crls.clone();
                // On disk before it is in effect: a crash in between starts with what was told.
                match full.trust.as_ref().map(|bundle| self.identities.take_bundle(bundle)).transpose() {
                    Ok(_) => self.findings.clear("roots"),
                    Err(failure) => {
                        self.findings.raise_failure("roots", "the controller's roots", &failure);
                        return Err(failure.into());
                    }
                }
                (Update::Full(full, self.identities.active()), crls)
            }
            Some(Response::Delta(delta)) => {
                let crls = delta.crls.clone();
                (Update::Delta(delta), crls)
            }
            Some(Response::Hints(hints)) => return Ok(self.network.hints(hints).await?),
            Some(Response::Goodbye(goodbye)) => {
                let detail = goodbye.reason.unwrap_or_default();
                return Err(Failure::from_detail(detail).into());
            }
            // Something newer than this program; what it means will be told again in a map.
            None => return Ok(()),
        };
        self.network.apply(update).await?.map_err(End::Resync)?;
        self.ask_everything = false;
        let knowledge = self.network.knowledge().await?;
        if lacks(&knowledge.crls, &published) {
            self.fetch_crls(channel).await?;
            // "Took effect" includes the services' folders; a slow disk delays the word, not the effect.
            let written = tokio::time::timeout(CALL_TIMEOUT, self.pairs.write_crls()).await;
            if !matches!(written, Ok(Ok(()))) {
                tracing::warn!("CRLs are not in all folders yet");
            }
        }
        self.acknowledge(outgoing).await
    }

    /// Says where this node is, and where it sees others.
    async fn tell_endpoints(&self, outgoing: &mpsc::Sender<pb::SyncRequest>) -> Result<(), End> {
        let (endpoints, seen) = (self.network.endpoints.borrow().clone(), self.network.seen.borrow().clone());
        let told = pb::sync_request::Endpoints { endpoints, seen };
        send(outgoing, pb::sync_request::Request::Endpoints(told)).await
    }

    /// Says what is in effect and on disk, and nothing else.
    async fn acknowledge(&mut self, outgoing: &mpsc::Sender<pb::SyncRequest>) -> Result<(), End> {
        let Receipt { seq, crls } = self.network.receipt.borrow_and_update().clone();
        let trust = self.trust_taken_up(&crls);
        let ack = pb::sync_request::Ack { seq, crls, findings: self.findings.lines(), trust };
        send(outgoing, pb::sync_request::Request::Ack(ack)).await
    }

    /// The bundle that is in effect everywhere on this node: on disk, with a CRL of each CA, in all folders, and
    /// with nothing left that another CA signed. 0 if some of it is missing.
    fn trust_taken_up(&self, crls: &[pb::CrlHave]) -> u64 {
        let active = self.identities.active();
        let identity = &active.identity;
        let covered = identity.roots.iter().chain(&identity.issuers).all(|ca| {
            mesh_ca::ca_key_identifier(&ca.0)
                .is_some_and(|id| crls.iter().any(|crl| crl.issuer_key_id == id.as_bytes()))
        });
        let settled = *self.pairs.settled.borrow() == identity.bundle;
        if covered && settled && !active.is_of_retiring_issuer() { identity.bundle } else { 0 }
    }

    async fn hello(&mut self) -> Result<pb::sync_request::Hello, End> {
        let knowledge = self.network.knowledge().await?;
        let receipt = self.network.receipt.borrow_and_update().clone();
        Ok(pb::sync_request::Hello {
            cursor: knowledge.cursor.filter(|_| !self.ask_everything),
            endpoints: self.network.endpoints.borrow().clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            backend: knowledge.backend,
            wireguard_port: u32::from(knowledge.wireguard_port),
            node_time: self.clock.own().utc_now().unix_timestamp(),
            trust: self.trust_taken_up(&receipt.crls),
            crls: receipt.crls,
        })
    }

    async fn fetch_crls(&self, channel: &Channel) -> Result<(), End> {
        let have = self.network.knowledge().await?.crls;
        let mut request = Request::new(pb::CrlsRequest { have, ..Default::default() });
        request.set_timeout(CALL_TIMEOUT);
        let mut client =
            CertificatesClient::new(channel.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX);
        let crls = client.crls(request).await?.into_inner().crls;
        Ok(self.network.take_crls(crls).await?)
    }

    /// Tries the controllers in their order.
    async fn connect(&self, active: &Active) -> Result<Connected, End> {
        let belief = self.network.belief.borrow().clone();
        let config = node_config(&active.identity, belief.anchors, belief.revocation, &self.clock)
            .map_err(Failure::from)?;
        let mut last = None;
        for address in &active.identity.controllers {
            self.note(|status| status.controller.clone_from(address));
            match connect(address, config.clone()).await {
                Ok(connected) => return Ok(connected),
                Err(error) => {
                    tracing::debug!(
                        controller = address,
                        error = mesh_runtime::chain(&error),
                        "no connection"
                    );
                    last = Some(error);
                }
            }
        }
        Err(match last {
            Some(error) => Failure::from(error).into(),
            None => Failure::new(
                ErrorCode::StateCorrupt,
                "the stored identity names no controller",
                "enroll this node again",
            )
            .into(),
        })
    }

    fn failed(&mut self, active: &Active, failure: &Failure) {
        let refused = matches!(
            failure.code,
            ErrorCode::IdentityUnknown | ErrorCode::IdentityRevoked | ErrorCode::Denied
        );
        self.note(|status| {
            status.connected = false;
            status.problem.clone_from(&failure.why);
            status.refusal = refused.then(|| failure.clone());
        });
        tracing::info!(code = failure.number(), why = %failure, "no controller");
        let severity = match failure.code {
            ErrorCode::ControllerUnreachable | ErrorCode::TimedOut | ErrorCode::Overloaded => Severity::Warn,
            _ => Severity::Bad,
        };
        let what = format!("{}: {}", failure.number(), failure.why);
        self.findings.raise("controller", severity, "the controller", what, failure.next.clone());
        if refused
            && active.serial == self.identities.active().serial
            && let Err(error) = self.identities.fall_back()
        {
            self.findings.raise_failure("identity/renewal", "this node's identity", &error);
        }
    }

    fn learn_time(&self, controller_time: i64) {
        let Some(offset_secs) = self.clock.learn(controller_time) else { return };
        tracing::info!(offset_secs, "controller's clock learned");
        if let Err(error) = self.state.save_clock(ClockFile { offset_secs }) {
            self.findings.raise_failure("state/clock", "the state folder", &error.into());
        }
        if offset_secs.abs() > CLOCK_OFF_SECS {
            self.findings.raise(
                "host/clock",
                Severity::Warn,
                "this host's clock",
                format!(
                    "it is {} s {} the controller's",
                    offset_secs.abs(),
                    if offset_secs > 0 { "behind" } else { "ahead of" }
                ),
                "set it, e.g. with `timedatectl set-ntp true`",
            );
        } else {
            self.findings.clear("host/clock");
        }
    }

    fn current_controller(&self) -> String {
        self.status.lock().unwrap_or_else(PoisonError::into_inner).controller.clone()
    }

    fn note(&self, change: impl FnOnce(&mut UplinkStatus)) {
        change(&mut self.status.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// Whether the host has moved away from a connection: the kernel reaches its other end another way than when
/// it was made. Having no way at all is no move, since the old one may come back.
struct Moves {
    host: Host,
    changes: watch::Receiver<u64>,
    /// The other end, and the way to it.
    followed: Option<(IpAddr, Option<Way>)>,
}

impl Moves {
    fn new(host: Host, changes: watch::Receiver<u64>) -> Self {
        Self { host, changes, followed: None }
    }

    async fn follow(&mut self, at: Option<IpAddr>) {
        self.changes.mark_unchanged();
        self.followed = match at {
            Some(at) => Some((at, self.host.way_to(at).await)),
            None => None,
        };
    }

    /// Returns once the host has moved. Can be dropped and called again.
    async fn wait(&mut self) {
        loop {
            let (Ok(()), Some((at, before))) = (self.changes.changed().await, &self.followed) else {
                return std::future::pending().await;
            };
            let now = self.host.way_to(*at).await;
            if now.is_some() && now != *before {
                return;
            }
        }
    }
}

async fn send(
    outgoing: &mpsc::Sender<pb::SyncRequest>,
    request: pb::sync_request::Request,
) -> Result<(), End> {
    outgoing
        .send(pb::SyncRequest { request: Some(request) })
        .await
        .map_err(|_| closed("the stream to the controller has ended").into())
}

fn closed(why: &str) -> Failure {
    Failure::new(ErrorCode::ControllerUnreachable, why, "nothing to do: the node connects again by itself")
}

fn silent() -> Failure {
    Failure::new(
        ErrorCode::TimedOut,
        format!("the controller sent no map within {} s", CALL_TIMEOUT.as_secs()),
        "look at the controller's load and log",
    )
}

fn lacks(have: &[pb::CrlHave], published: &[pb::CrlHave]) -> bool {
    published.iter().any(|wanted| {
        !have.iter().any(|have| {
            have.issuer_key_id == wanted.issuer_key_id
                && have.shard == wanted.shard
                && have.number >= wanted.number
        })
    })
}

#[cfg(test)]
mod tests;
