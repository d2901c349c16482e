//! The node's side of the underlay: where its tunnel's datagrams come out (STUN), names in its configuration,
//! changes of its own network, and the controller's relay, by UDP where that gets through and over the TLS
//! connection where not.
//!
//! One task owns all of this. The tunnel's threads only ever put datagrams into its queue.

mod relay;
mod stun;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh_core::NodeId;
use mesh_core::endpoints::relayed_peer;
use mesh_proto::v1 as pb;
use mesh_tunnel::Tunnel;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use super::NetworkHandle;
use crate::limits::{NAMES_RESOLVED_MAX, PEERS_PER_MAP_MAX, UNDERLAY_QUEUE};
use crate::uplink::UplinkHandle;

use relay::Relay;
use stun::Stun;

/// How often names in the configuration are looked up again, and how often at most.
const RESOLVE_INTERVAL: Duration = Duration::from_secs(60);
const RESOLVE_INTERVAL_MIN: Duration = Duration::from_secs(3);
/// Longest wait for the resolver.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Changes of the host's network within this time are one.
const SETTLE: Duration = Duration::from_millis(250);

/// What a peer gets by the relay that we look for in vain: nothing that WireGuard knows.
const KNOCK: [u8; 1] = [0];
/// The network task hears of one peer's asking no more often than this.
const KNOCK_INTERVAL: Duration = Duration::from_secs(1);

/// What the underlay is now, for the network task.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct UnderlayNews {
    /// What the configuration names, resolved.
    pub(crate) configured: Vec<SocketAddr>,
    /// Where the controller sees the tunnel's UDP port.
    pub(crate) mapped: Option<SocketAddr>,
    /// There is a relay session.
    pub(crate) relay: bool,
}

/// What happens to the task.
pub(super) enum Event {
    /// A WireGuard message for a peer that is reached by the relay.
    ToRelay { peer: NodeId, datagram: Vec<u8> },
    /// A datagram on the tunnel's port that is not WireGuard's.
    Foreign { datagram: Vec<u8>, from: SocketAddr },
    /// A message on the relay stream of this number.
    Stream { number: u64, response: pb::RelayResponse },
    /// That stream has ended.
    StreamEnded { number: u64 },
    /// The configured names, as they resolve now.
    Resolved(Vec<SocketAddr>),
}

/// See the module.
pub(crate) struct Underlay {
    tunnel: Arc<dyn Tunnel>,
    network: NetworkHandle,
    uplink: UplinkHandle,
    /// Rises with each change of the host's links, addresses and routes.
    changes: watch::Receiver<u64>,
    /// `HOST:PORT` each.
    configured: Vec<String>,
    events: mpsc::Receiver<Event>,
    sender: mpsc::Sender<Event>,
    stun: Stun,
    relay: Relay,
    offer: pb::hints::Underlay,
    news: UnderlayNews,
    /// What the network task knows.
    told: Option<UnderlayNews>,
    resolving: Option<AbortOnDropHandle<()>>,
    resolved_at: Option<Instant>,
    resolve_at: Instant,
    /// When a change of the network has settled.
    settled_at: Option<Instant>,
    /// Whether the engine lets others use its port; a kernel does not. Then the relay's stream only tells which
    /// peers are looking for us.
    shares_port: bool,
    /// Peers that asked by the relay, and when the network task last heard of it.
    knocks: BTreeMap<NodeId, Option<Instant>>,
}

impl Underlay {
    pub(crate) fn new(
        (tunnel, may_share): (Arc<dyn Tunnel>, bool),
        network: NetworkHandle,
        uplink: UplinkHandle,
        (changes, configured): (watch::Receiver<u64>, Vec<String>),
    ) -> Self {
        let (sender, events) = mpsc::channel(UNDERLAY_QUEUE);
        let shares_port = may_share && take_over(tunnel.as_ref(), &sender);
        if !shares_port {
            tracing::info!(
                "this tunnel's UDP port cannot be shared: no STUN and no relay; peers that are reached directly tell \
                 where they see this node, and whoever is not asks by the relay's stream"
            );
        }
        let now = Instant::now();
        Self {
            tunnel,
            network,
            uplink,
            changes,
            configured,
            events,
            sender,
            stun: Stun::new(now),
            relay: Relay::default(),
            offer: pb::hints::Underlay::default(),
            news: UnderlayNews::default(),
            told: None,
            resolving: None,
            resolved_at: None,
            resolve_at: now,
            settled_at: None,
            shares_port,
            knocks: BTreeMap::new(),
        }
    }

    /// Runs until it is dropped, or the network task has ended.
    pub(crate) async fn run(mut self) {
        let mut silence = self.network.silence.clone();
        let mut unreached = self.network.unreached.clone();
        let mut offer = self.network.offer.clone();
        let mut channel = self.uplink.channel.clone();
        self.connection_changed();
        loop {
            let now = Instant::now();
            self.work(now);
            let wake = [Some(self.resolve_at), self.settled_at, self.stun.wake(), self.relay.wake()];
            let wake = wake.into_iter().flatten().min().unwrap_or(self.resolve_at);
            let changed = tokio::select! {
                event = self.events.recv() => {
                    // A sender is held here, so the queue does not end.
                    if let Some(event) = event {
                        self.handle(event, Instant::now());
                    }
                    Ok(())
                }
                changed = channel.changed() => changed.inspect(|()| self.connection_changed()),
                changed = offer.changed() => changed.inspect(|()| {
                    self.offer = *offer.borrow_and_update();
                    self.connection_changed();
                }),
                changed = self.changes.changed() => {
                    // Kept alive as long as the node: an end means that there is nothing more to hear.
                    if changed.is_ok() {
                        let at = Instant::now() + SETTLE;
                        self.settled_at.get_or_insert(at);
                    }
                    changed
                }
                changed = unreached.changed() => changed.inspect(|()| {
                    let peers = unreached.borrow_and_update().clone();
                    self.knock(&peers, Instant::now());
                }),
                changed = silence.changed() => changed.inspect(|()| self.resolve_soon(Instant::now())),
                () = tokio::time::sleep_until(wake) => Ok(()),
            };
            if changed.is_err() || self.tell().await.is_err() {
                return;
            }
        }
    }

    /// What is due.
    fn work(&mut self, now: Instant) {
        if self.settled_at.is_some_and(|at| at <= now) {
            self.settled_at = None;
            self.stun.restart(now);
            self.relay.doubt_udp(now);
            self.resolve_soon(now);
        }
        if self.resolve_at <= now {
            self.resolve(now);
        }
        if let Some((request, server)) = self.stun.poll(now) {
            self.send(&request, server);
        }
        self.relay.reopen(&self.sender, now);
        if let Some((frame, server)) = self.relay.keepalive(now) {
            self.send(&frame, server);
        }
    }

    fn handle(&mut self, event: Event, now: Instant) {
        match event {
            Event::ToRelay { peer, datagram } => {
                if let Some((frame, server)) = self.relay.send(peer, datagram, now) {
                    self.send(&frame, server);
                }
            }
            Event::Foreign { datagram, from } => {
                if mesh_core::stun::is_stun(&datagram) {
                    self.stun.handle_answer(&datagram, from, now);
                } else if let Some((peer, datagram)) = self.relay.take_frame(&datagram, from, now) {
                    self.deliver(peer, datagram);
                }
            }
            Event::Stream { number, response } => {
                let server = self.server(|offer| offer.udp_port);
                if let Some((peer, datagram)) = self.relay.take_response(number, response, server, now) {
                    self.deliver(peer, &datagram);
                }
            }
            Event::StreamEnded { number } => {
                self.relay.ended(number, now);
            }
            Event::Resolved(addresses) => {
                self.resolving = None;
                self.news.configured = addresses;
            }
        }
    }

    /// The controller's connection or its offer is another: what hangs on them begins anew.
    fn connection_changed(&mut self) {
        let now = Instant::now();
        self.stun.use_server(self.server(|offer| offer.udp_port), now);
        let channel = self.uplink.channel.borrow().clone().filter(|_| self.offer.relay);
        self.relay.use_channel(channel, &self.sender);
    }

    /// The controller's UDP port; `None` while there is no connection, or no such port.
    fn server(&self, port: impl FnOnce(&pb::hints::Underlay) -> u32) -> Option<SocketAddr> {
        let port = u16::try_from(port(&self.offer)).ok().filter(|port| *port != 0 && self.shares_port)?;
        let ip = self.uplink.status().remote?.ip().to_canonical();
        Some(SocketAddr::new(ip, port))
    }

    fn send(&self, datagram: &[u8], to: SocketAddr) {
        // What cannot be sent now is lost, as on any network; both protocols ask again.
        if let Err(error) = self.tunnel.send_raw(datagram, to) {
            tracing::debug!(%to, error = mesh_runtime::chain(&error), "datagram is not sent");
        }
    }

    fn deliver(&mut self, peer: NodeId, datagram: &[u8]) {
        if self.shares_port {
            self.tunnel.receive_virtual(datagram, mesh_core::endpoints::relay_endpoint(peer));
        } else if self.knocks.len() < PEERS_PER_MAP_MAX {
            self.knocks.entry(peer).or_insert(None);
        }
    }

    /// Lets peers that we cannot reach know that we look for them.
    fn knock(&mut self, peers: &[u32], now: Instant) {
        for peer in peers {
            if let Some((frame, server)) = self.relay.send(NodeId(*peer), KNOCK.to_vec(), now) {
                self.send(&frame, server);
            }
        }
    }

    fn resolve_soon(&mut self, now: Instant) {
        let earliest = self.resolved_at.map_or(now, |at| at + RESOLVE_INTERVAL_MIN);
        self.resolve_at = self.resolve_at.min(earliest.max(now));
    }

    fn resolve(&mut self, now: Instant) {
        (self.resolved_at, self.resolve_at) = (Some(now), now + RESOLVE_INTERVAL);
        let (names, before) = (self.configured.clone(), self.news.configured.clone());
        if names.is_empty() {
            return;
        }
        let sender = self.sender.clone();
        self.resolving = Some(AbortOnDropHandle::new(tokio::spawn(async move {
            // The task that reads this has ended otherwise.
            let _ = sender.send(Event::Resolved(resolve(&names, &before).await)).await;
        })));
    }

    /// Tells the network task what is new.
    async fn tell(&mut self) -> Result<(), super::Gone> {
        self.news.mapped = self.stun.mapped();
        self.news.relay = self.relay.is_open() && self.shares_port;
        let now = Instant::now();
        self.knocks
            .retain(|_, told| told.is_none_or(|at| now.saturating_duration_since(at) < KNOCK_INTERVAL));
        let new: Vec<NodeId> =
            self.knocks.iter().filter(|(_, told)| told.is_none()).map(|(peer, _)| *peer).collect();
        for peer in new {
            self.knocks.insert(peer, Some(now));
            self.network.knock(peer.0).await?;
        }
        if self.told.as_ref() != Some(&self.news) {
            self.told = Some(self.news.clone());
            self.network.underlay(self.news.clone()).await?;
        }
        Ok(())
    }
}

/// Puts what the tunnel does not know into the queue. `false` if this engine cannot do that.
fn take_over(tunnel: &dyn Tunnel, sender: &mpsc::Sender<Event>) -> bool {
    let (foreign, relayed) = (sender.clone(), sender.clone());
    // Called on the tunnel's threads: a full queue loses the datagram, nobody waits.
    let shares = tunnel.set_foreign_sink(Some(Arc::new(move |datagram, from| {
        let _ = foreign.try_send(Event::Foreign { datagram: datagram.to_vec(), from });
    })));
    shares
        && tunnel.set_virtual_sink(Some(Arc::new(move |datagram, to| {
            if let Some(peer) = relayed_peer(to) {
                let _ = relayed.try_send(Event::ToRelay { peer, datagram: datagram.to_vec() });
            }
        })))
}

/// Looks all names up; one that does not resolve now keeps nothing, unless none does: then all stays as it was.
async fn resolve(names: &[String], before: &[SocketAddr]) -> Vec<SocketAddr> {
    let mut found: Vec<SocketAddr> = Vec::new();
    for name in names {
        match tokio::time::timeout(RESOLVE_TIMEOUT, tokio::net::lookup_host(name)).await {
            Ok(Ok(addresses)) => {
                for address in addresses {
                    let address = SocketAddr::new(address.ip().to_canonical(), address.port());
                    if found.len() < NAMES_RESOLVED_MAX && !found.contains(&address) {
                        found.push(address);
                    }
                }
            }
            Ok(Err(error)) => tracing::warn!(name, %error, "configured endpoint does not resolve"),
            Err(_) => tracing::warn!(name, "configured endpoint: no answer from the resolver"),
        }
    }
    if found.is_empty() { before.to_vec() } else { found }
}
