//! The network task: takes commands and tunnel events one after the other.

mod bare;
mod map;
mod moves;
mod paths;
mod reconcile;
mod report;
mod rotation;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_core::endpoints::Overlay;
use mesh_core::peer_table::{PeerTable, Probing};
use mesh_proto::v1 as pb;
use mesh_proto::v1::ErrorCode;
use mesh_tunnel::{Backend, PublicKey, Tunnel, TunnelBuilder, TunnelEvent};
use tokio::sync::mpsc;

use moves::{Look, Ways};
use reconcile::apply_firewall;
use rotation::{OwnChange, PeerKeys};

use super::engine::{Choice, Knocks, is_bare};
use super::lease::Leases;
use super::overlay;
use super::probe::Prober;
use super::stored::{stored_endpoints, stored_roster};
use super::{Belief, Command, NetworkHandle, Outlets, UnderlayNews, wire};
use crate::clock::ControllerClock;
use crate::failure::Failure;
use crate::findings::Findings;
use crate::firewall::Firewall;
use crate::hostop::{Changes, Host, HostOp, TableMark};
use crate::identity::Active;
use crate::join::wireguard_key;
use crate::pki::Trust;
use crate::roster::{Peer, Place, Roster};
use crate::state::{Identity, StateDir};

/// Interfaces, firewall and clocks are looked at this often.
const TICK: Duration = Duration::from_secs(10);
/// Keeps mappings in routers and firewalls open. WireGuard's own advice for nodes behind NAT.
const KEEPALIVE: Duration = Duration::from_secs(25);
/// Tunnel events that may wait; the tunnel collapses what does not fit.
const EVENT_QUEUE: usize = 256;

/// What the task is started with.
pub(crate) struct Setup {
    pub(crate) host: Host,
    pub(crate) changes: Changes,
    pub(crate) state: StateDir,
    pub(crate) clock: ControllerClock,
    pub(crate) findings: Findings,
    pub(crate) interface: String,
    pub(crate) mtu: u16,
    pub(crate) wg_port: u16,
    pub(crate) backend: Backend,
    pub(crate) active: Arc<Active>,
}

/// How the task has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    /// It was told to.
    Stopped,
    /// To begin anew, on another engine.
    Reopen,
}

/// Everything that must change together.
pub(crate) struct Worker {
    state: StateDir,
    clock: ControllerClock,
    findings: Findings,
    /// What the underlay task found out last.
    underlay: UnderlayNews,
    /// Peers seen where nobody said they are, for the controller.
    seen: BTreeMap<u32, SocketAddr>,
    trust: Trust,
    roster: Roster,
    place: Place,
    overlay: Overlay,
    host: Host,
    changes: Changes,
    /// How the kernel reaches the peers.
    ways: Ways,
    tunnel: Arc<dyn Tunnel>,
    choice: Choice,
    /// The engine keeps its port to itself: no STUN, no relay, no probes beside a path in use.
    bare: bool,
    knocks: Knocks,
    /// Another engine is to take this one's place.
    reopen: bool,
    /// Which endpoint each peer is tried at, and when.
    table: PeerTable,
    leases: Leases,
    /// Peers that are in the tunnel and in the firewall.
    current: BTreeMap<u32, Peer>,
    /// Their ids by WireGuard key.
    ids: BTreeMap<[u8; 32], u32>,
    /// Under which of their keys they are in the tunnel, by id.
    keys: BTreeMap<u32, PeerKeys>,
    prober: Prober,
    /// Our own change of keys, while both are in use.
    own_change: Option<OwnChange>,
    /// The table as it was last applied.
    firewall: Option<Firewall>,
    /// What the kernel then had.
    mark: Option<TableMark>,
    /// How long the finding stands that somebody touched the table.
    touched_until: Option<Instant>,
    /// Endpoints told of nodes, by id, as they came.
    told: BTreeMap<u32, Vec<pb::Endpoint>>,
    told_changed: bool,
    next_lease: Option<Duration>,
    /// Cursor and numbers of what is on disk.
    saved_cursor: Option<pb::Cursor>,
    saved_crls: Vec<pb::CrlHave>,
    /// Set while the newest could not be stored; each tick tries again.
    map_unsaved: bool,
    crls_unsaved: bool,
    outlets: Outlets,
    inbox: mpsc::Receiver<Command>,
    events: mpsc::Receiver<TunnelEvent>,
}

impl Worker {
    /// Brings up what is known without anybody's help: CRLs and map from disk, routes, firewall, tunnel.
    ///
    /// # Errors
    /// [`Failure`] if the overlay cannot be brought up at all. Without a firewall it stands, but has no peers.
    pub(crate) async fn start(setup: Setup) -> Result<(NetworkHandle, Self), Failure> {
        let Setup { host, changes, state, clock, findings, interface, mtu, wg_port, backend, active } = setup;
        let identity = &active.identity;
        let mut trust = Trust::of(identity).map_err(|error| {
            Failure::new(
                ErrorCode::StateCorrupt,
                mesh_runtime::chain(&error),
                "restore the state folder, or move it away and enroll again",
            )
        })?;
        let roster = stored_roster(&state, &mut trust, &findings)?;
        let place = place_of(identity)?;
        let overlay = Overlay { ipv4: place.ipv4_pool, ipv6: place.ipv6_prefix };
        overlay::close_the_gaps(&host, &place, &findings).await?;
        let private_key = wireguard_key(&identity.wireguard_keys[0])?;
        let choice = Choice::of(backend, &state, clock.now());
        let builder = TunnelBuilder::new(&interface, private_key);
        let builder = builder.mtu(mtu).listen_port(wg_port).backend(choice.backend);
        // The table comes before the interface it speaks of: there is no moment without it.
        let (firewall, mark) = apply_firewall(&host, empty_firewall(&interface, &place), &findings).await;
        let tunnel: Arc<dyn Tunnel> = overlay::open_tunnel(builder).await?.into();
        overlay::address(&host, tunnel.name(), &place, &findings).await?;
        let prober = Prober::start(place.ipv4, clock.clone());
        let events = forward_events(tunnel.as_ref());
        let belief = Belief { anchors: trust.anchors(), revocation: trust.revocation() };
        let (handle, inbox, outlets) = wire(belief);
        outlets.own.send_replace(roster.own().clone());
        outlets.crls.send_replace(Arc::new(trust.crl_messages()));
        let told = stored_endpoints(&state);
        let bare = is_bare(tunnel.as_ref(), &choice);
        let probing = if bare { Probing::InPlace } else { Probing::Beside };
        let (saved_cursor, saved_crls) = (roster.cursor().cloned(), trust.crl_haves());
        let mut worker = Self {
            state,
            clock,
            findings,
            underlay: UnderlayNews::default(),
            seen: BTreeMap::new(),
            trust,
            roster,
            place,
            overlay,
            host,
            changes,
            ways: Ways::default(),
            tunnel,
            choice,
            bare,
            knocks: Knocks::default(),
            reopen: false,
            table: PeerTable::new(overlay, probing, mesh_runtime::random_bytes()),
            leases: Leases::default(),
            current: BTreeMap::new(),
            ids: BTreeMap::new(),
            keys: BTreeMap::new(),
            prober,
            own_change: None,
            firewall,
            mark,
            touched_until: None,
            told,
            told_changed: false,
            next_lease: None,
            saved_cursor,
            saved_crls,
            map_unsaved: false,
            crls_unsaved: false,
            outlets,
            inbox,
            events,
        };
        worker.publish_receipt();
        worker.tell_settled();
        worker.refresh_endpoints().await;
        worker.reconcile().await;
        Ok((handle, worker))
    }

    /// The tunnel, for the task that shares its port.
    pub(crate) fn tunnel(&self) -> Arc<dyn Tunnel> {
        self.tunnel.clone()
    }

    /// Whether others may use the tunnel's UDP port.
    pub(crate) fn shares_port(&self) -> bool {
        !self.bare
    }

    /// Serves until it is told to stop, or another engine is to take its place.
    ///
    /// # Errors
    /// The tunnel broke down.
    pub(crate) async fn run(mut self) -> Result<Ended, Failure> {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        tick.reset();
        loop {
            self.act();
            self.advance_own_change();
            self.look_for_new_keys();
            if self.reopen {
                self.stop(false).await;
                return Ok(Ended::Reopen);
            }
            let wake = self.wake();
            tokio::select! {
                command = self.inbox.recv() => match command {
                    Some(Command::Stop { forget, reply }) => {
                        self.stop(forget).await;
                        // Whoever asked may be gone; the work is done.
                        let _ = reply.send(());
                        return Ok(Ended::Stopped);
                    }
                    Some(command) => self.handle(command).await,
                    None => {
                        self.stop(false).await;
                        return Ok(Ended::Stopped);
                    }
                },
                event = self.events.recv() => match event {
                    Some(TunnelEvent::Stopped { error: Some(error) }) => return Err(broken(&error)),
                    Some(event) => self.handle_event(event),
                    None => return Err(broken("its event queue ended")),
                },
                () = tokio::time::sleep_until(wake.into()) => {
                    self.table.handle_timeout(self.clock.own().now());
                    if self.next_lease.is_some_and(|at| self.clock.since_boot() >= at) {
                        self.reconcile().await;
                    }
                    if self.ways.poll_timeout().is_some_and(|at| self.clock.own().now() >= at) {
                        self.network_changed().await;
                    }
                }
                Ok(()) = self.changes.network.changed() => self.network_changed().await,
                Ok(()) = self.changes.firewall.changed() => {
                    self.look_at_firewall().await;
                    self.reconcile().await;
                }
                _ = tick.tick() => self.tick().await,
            }
        }
    }

    async fn handle(&mut self, command: Command) {
        match command {
            Command::Map { update, reply } => {
                let result = self.apply(*update).await;
                // The asker may have lost its connection meanwhile.
                let _ = reply.send(result);
            }
            Command::Crls { crls, reply } => {
                self.take_crls(&crls).await;
                let _ = reply.send(());
            }
            Command::Hints(hints) => self.take_hints(hints),
            Command::Underlay(news) => self.take_underlay(news).await,
            Command::Rekey(active) => self.rekey(&active),
            Command::Greet(id) => {
                if let Some(keys) = self.keys.get(&id) {
                    self.tunnel.initiate_handshake(&PublicKey(keys.in_use));
                }
            }
            Command::Knock(id) => self.take_knock(id),
            Command::Knowledge(reply) => {
                let _ = reply.send(self.knowledge());
            }
            Command::Status(reply) => {
                self.measure_paths();
                let _ = reply.send(self.status());
            }
            Command::Inspect(reply) => {
                let _ = reply.send(self.inspect().await);
            }
            Command::Stop { .. } => unreachable!("handled by the loop"),
        }
    }

    fn wake(&self) -> Instant {
        let now = self.clock.own().now();
        let lease = self.next_lease.map(|at| now + at.saturating_sub(self.clock.since_boot()));
        let path = self.table.poll_timeout();
        [lease, path, self.ways.poll_timeout(), self.own_change_timeout()]
            .into_iter()
            .flatten()
            .min()
            .unwrap_or(now + TICK)
            .min(now + TICK)
    }

    async fn tick(&mut self) {
        self.look_at_firewall().await;
        self.restore_overlay().await;
        self.refresh_endpoints().await;
        self.look_at_ways(Look::Tick).await;
        self.publish_seen();
        self.publish_unreached();
        // Leases, a firewall that was missing, a clock that was set.
        self.reconcile().await;
        self.measure_paths();
        self.save_again();
        self.save_endpoints();
    }

    /// Routes and table stay unless the node leaves: with the interface gone nothing may go out in clear.
    async fn stop(&mut self, forget: bool) {
        self.told_changed = true;
        self.save_endpoints();
        let tunnel = self.tunnel.clone();
        // Fails only if the runtime is going down, and dropping closes it as well.
        let _ = tokio::task::spawn_blocking(move || tunnel.close()).await;
        if forget {
            overlay::open_the_gaps(&self.host, &self.place).await;
            if self.host.has_nft()
                && let Err(error) = self.host.apply(HostOp::ApplyNft { text: Firewall::removal() }).await
            {
                tracing::warn!(error = mesh_runtime::chain(&error), "firewall table stays");
            }
        }
    }
}

fn place_of(identity: &Identity) -> Result<Place, Failure> {
    let keys = identity.wireguard_keys.iter().map(|key| wireguard_key(key).map(|key| key.public().0));
    let wireguard_keys: Vec<[u8; 32]> = keys.collect::<Result<_, _>>()?;
    if wireguard_keys.is_empty() {
        return Err(Failure::new(
            ErrorCode::StateCorrupt,
            "the stored identity has no WireGuard key",
            "restore the state folder from a backup, or enroll again",
        ));
    }
    Ok(Place {
        node_id: identity.node_id,
        name: identity.name.clone(),
        ipv4: identity.ipv4,
        ipv6: identity.ipv6,
        ipv4_pool: identity.ipv4_pool.trunc(),
        ipv6_prefix: identity.ipv6_prefix.trunc(),
        wireguard_keys,
    })
}

fn empty_firewall(interface: &str, place: &Place) -> Firewall {
    Firewall {
        interface: interface.to_owned(),
        ipv4_pool: place.ipv4_pool,
        ipv6_prefix: place.ipv6_prefix,
        peers: BTreeSet::new(),
        inbound: BTreeSet::new(),
    }
}

/// The tunnel's queue is read by a thread of its own: it blocks.
fn forward_events(tunnel: &dyn Tunnel) -> mpsc::Receiver<TunnelEvent> {
    let events = tunnel.events();
    let (sender, receiver) = mpsc::channel(EVENT_QUEUE);
    let forward = move || {
        while let Some(event) = events.recv() {
            if sender.blocking_send(event).is_err() {
                return;
            }
        }
    };
    // Without this thread the node still works, and learns of peers at each tick.
    if let Err(error) = std::thread::Builder::new().name("tunnel-events".into()).spawn(forward) {
        tracing::error!(%error, "tunnel events are not heard");
    }
    receiver
}

fn broken(why: &str) -> Failure {
    Failure::new(
        ErrorCode::Internal,
        format!("the tunnel has stopped: {why}"),
        "look at the daemon's log; systemd starts it again",
    )
}
