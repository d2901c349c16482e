//! The network task: takes commands and tunnel events one after the other.

mod reconcile;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_core::NodeId;
use mesh_core::endpoints::Overlay;
use mesh_core::peer_table::{Action, PeerTable};
use mesh_proto::v1 as pb;
use mesh_proto::v1::ErrorCode;
use mesh_tunnel::{PublicKey, Tunnel, TunnelConfig, TunnelEvent};
use tokio::sync::mpsc;

use reconcile::apply_firewall;

use super::backend::{backend_line, backend_name, offloads};
use super::endpoints::{candidates, own_endpoints};
use super::lease::Leases;
use super::overlay;
use super::stored::{stored_endpoints, stored_roster};
use super::{
    Belief, Command, Inspection, Knowledge, NetworkHandle, NetworkStatus, Outlets, PeerView, Receipt, Update,
    wire,
};
use crate::clock::ControllerClock;
use crate::failpoint::Failpoint;
use crate::failure::Failure;
use crate::findings::{Findings, Severity};
use crate::firewall::Firewall;
use crate::hostop::{Host, HostOp, TableMark};
use crate::identity::Active;
use crate::join::wireguard_key;
use crate::limits::PEERS_PER_MAP_MAX;
use crate::pki::Trust;
use crate::roster::{Peer, Place, Roster, RosterError};
use crate::state::{Identity, StateDir};

/// Interfaces, firewall and clocks are looked at this often.
const TICK: Duration = Duration::from_secs(10);
/// Keeps mappings in routers and firewalls open. WireGuard's own advice for nodes behind NAT.
const KEEPALIVE: Duration = Duration::from_secs(25);
/// Tunnel events that may wait; the tunnel collapses what does not fit.
const EVENT_QUEUE: usize = 256;

/// What the task is started with.
pub(crate) struct Setup {
    pub(crate) state: StateDir,
    pub(crate) clock: ControllerClock,
    pub(crate) findings: Findings,
    pub(crate) interface: String,
    pub(crate) mtu: u16,
    pub(crate) wg_port: u16,
    pub(crate) endpoints: Vec<SocketAddr>,
    pub(crate) active: Arc<Active>,
}

/// Everything that must change together.
pub(crate) struct Worker {
    state: StateDir,
    clock: ControllerClock,
    findings: Findings,
    configured: Vec<SocketAddr>,
    trust: Trust,
    roster: Roster,
    place: Place,
    overlay: Overlay,
    host: Host,
    tunnel: Arc<dyn Tunnel>,
    /// Which endpoint each peer is tried at, and when.
    table: PeerTable,
    leases: Leases,
    /// Peers that are in the tunnel and in the firewall.
    current: BTreeMap<u32, Peer>,
    /// Their ids by WireGuard key.
    ids: BTreeMap<[u8; 32], u32>,
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
        let Setup { state, clock, findings, interface, mtu, wg_port, endpoints: configured, active } = setup;
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
        let host = Host::open()?;
        overlay::close_the_gaps(&host, &place, &findings).await?;
        let private_key = wireguard_key(&identity.wireguard_keys[0])?;
        let config = TunnelConfig {
            interface: interface.clone(),
            mtu,
            listen_port: wg_port,
            private_key,
            fwmark: None,
        };
        // The table comes before the interface it speaks of: there is no moment without it.
        let (firewall, mark) = apply_firewall(&host, empty_firewall(&interface, &place), &findings).await;
        let tunnel: Arc<dyn Tunnel> = overlay::open_tunnel(config).await?.into();
        overlay::address(&host, tunnel.name(), &place, &findings).await?;
        let events = forward_events(tunnel.as_ref());
        let belief = Belief { anchors: trust.anchors(), revocation: trust.revocation() };
        let (handle, inbox, outlets) = wire(belief);
        outlets.own.send_replace(roster.own().clone());
        outlets.crls.send_replace(Arc::new(trust.crl_messages()));
        let told = stored_endpoints(&state);
        let (saved_cursor, saved_crls) = (roster.cursor().cloned(), trust.crl_haves());
        let mut worker = Self {
            state,
            clock,
            findings,
            configured,
            trust,
            roster,
            place,
            overlay,
            host,
            tunnel,
            table: PeerTable::new(overlay, mesh_runtime::random_bytes()),
            leases: Leases::default(),
            current: BTreeMap::new(),
            ids: BTreeMap::new(),
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
        worker.refresh_endpoints().await;
        worker.reconcile().await;
        Ok((handle, worker))
    }

    /// Serves until it is told to stop.
    ///
    /// # Errors
    /// The tunnel broke down.
    pub(crate) async fn run(mut self) -> Result<(), Failure> {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        tick.reset();
        loop {
            self.act();
            let wake = self.wake();
            tokio::select! {
                command = self.inbox.recv() => match command {
                    Some(Command::Stop { forget, reply }) => {
                        self.stop(forget).await;
                        // Whoever asked may be gone; the work is done.
                        let _ = reply.send(());
                        return Ok(());
                    }
                    Some(command) => self.handle(command).await,
                    None => {
                        self.stop(false).await;
                        return Ok(());
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
            Command::Rekey(active) => self.rekey(&active),
            Command::Knowledge(reply) => {
                let _ = reply.send(self.knowledge());
            }
            Command::Status(reply) => {
                let _ = reply.send(self.status());
            }
            Command::Inspect(reply) => {
                let _ = reply.send(self.inspect().await);
            }
            Command::Stop { .. } => unreachable!("handled by the loop"),
        }
    }

    async fn apply(&mut self, update: Update) -> Result<(), RosterError> {
        let applied = match update {
            Update::Full(full) => {
                let ids: BTreeSet<u32> = full.peers.iter().map(|peer| peer.node_id).collect();
                // A whole map names everybody: whoever is not in it is gone, and so are its endpoints.
                let applied = self.roster.apply_full(full, &self.trust);
                if applied.is_ok() {
                    self.told.retain(|id, _| ids.contains(id));
                }
                applied
            }
            Update::Delta(delta) => self.roster.apply_delta(delta),
        };
        if let Err(error) = applied {
            self.findings.raise(
                "roster",
                Severity::Bad,
                "the controller's map",
                error.to_string(),
                "if this does not pass, compare the controller with its last backup",
            );
            return Err(error);
        }
        self.findings.clear("roster");
        match self.trust.add_issuers(self.roster.issuers()) {
            Ok(true) => self.roster.doubt(),
            Ok(false) => {}
            Err(error) => tracing::warn!(error = mesh_runtime::chain(&error), "issuing CA is left out"),
        }
        // Effect first, disk second: whoever must go is gone before anything else takes time. What is not on
        // disk is not acknowledged.
        self.reconcile().await;
        self.save_map();
        self.publish_receipt();
        let own = self.roster.own().clone();
        self.outlets.own.send_if_modified(|before| {
            let changed = *before != own;
            *before = own;
            changed
        });
        Ok(())
    }

    async fn take_crls(&mut self, crls: &[pb::Crl]) {
        let mut changed = false;
        for message in crls {
            if Failpoint::CrlApplyDisabled.is_set() && self.trust.revocation().is_some() {
                continue;
            }
            match self.trust.take_crl(message) {
                Ok(new) => changed |= new,
                Err(error) => {
                    tracing::warn!(
                        number = message.number,
                        error = mesh_runtime::chain(&error),
                        "CRL is left out"
                    );
                }
            }
        }
        if !changed {
            return;
        }
        let messages = self.trust.crl_messages();
        self.save_crls(&messages);
        self.roster.doubt();
        self.reconcile().await;
        // The map names the CRLs it was stored with, so that older ones put in their place are seen.
        if self.roster.cursor().is_some() {
            self.save_map();
        }
        self.publish_receipt();
        let belief = Belief { anchors: self.trust.anchors(), revocation: self.trust.revocation() };
        self.outlets.belief.send_replace(belief);
        self.outlets.crls.send_replace(Arc::new(messages));
    }

    fn save_map(&mut self) {
        let map = self.roster.to_full(self.trust.crl_haves());
        if let Err(error) = self.state.save_map(&map) {
            self.map_unsaved = true;
            self.findings.raise_failure("state/map", "the state folder", &error.into());
        } else {
            self.map_unsaved = false;
            self.saved_cursor = map.cursor;
            self.findings.clear("state/map");
        }
    }

    fn save_crls(&mut self, messages: &[pb::Crl]) {
        if let Err(error) = self.state.save_crls(messages) {
            self.crls_unsaved = true;
            self.findings.raise_failure("state/crls", "the state folder", &error.into());
        } else {
            self.crls_unsaved = false;
            self.saved_crls = self.trust.crl_haves();
            self.findings.clear("state/crls");
        }
    }

    /// Stores what could not be stored before.
    fn save_again(&mut self) {
        if self.crls_unsaved {
            self.save_crls(&self.trust.crl_messages());
        }
        if self.map_unsaved {
            self.save_map();
        }
        self.publish_receipt();
    }

    fn publish_receipt(&self) {
        let journal = |cursor: &pb::Cursor| (cursor.journal_id.clone(), cursor.incarnation);
        // A number of another journal would say something else.
        let saved = self
            .saved_cursor
            .as_ref()
            .filter(|saved| self.roster.cursor().is_some_and(|cursor| journal(cursor) == journal(saved)));
        let receipt = Receipt { seq: saved.map_or(0, |cursor| cursor.seq), crls: self.saved_crls.clone() };
        self.outlets.receipt.send_if_modified(|before| {
            let changed = *before != receipt;
            *before = receipt;
            changed
        });
    }

    fn take_hints(&mut self, hints: pb::Hints) {
        let now = self.clock.own().now();
        for peer in hints.peers {
            if peer.endpoints.is_empty() {
                continue;
            }
            self.table.handle_candidates(NodeId(peer.node_id), &candidates(&peer.endpoints), now);
            if self.told.len() >= PEERS_PER_MAP_MAX && !self.told.contains_key(&peer.node_id) {
                continue;
            }
            self.told.insert(peer.node_id, peer.endpoints);
            self.told_changed = true;
        }
    }

    fn rekey(&mut self, active: &Active) {
        let keys = match place_of(&active.identity) {
            Ok(place) => place.wireguard_keys,
            Err(failure) => {
                return self.findings.raise_failure("identity/keys", "this node's keys", &failure);
            }
        };
        self.place.wireguard_keys = keys;
        let Ok(private_key) = wireguard_key(&active.identity.wireguard_keys[0]) else { return };
        if private_key.public() == self.tunnel.public_key() {
            return;
        }
        match self.tunnel.rotate_key(private_key) {
            Ok(()) => tracing::info!(key = %self.tunnel.public_key(), "WireGuard key rotated"),
            Err(error) => {
                let failure = overlay::tunnel_failure(error);
                self.findings.raise_failure("identity/keys", "this node's keys", &failure);
            }
        }
    }

    fn handle_event(&mut self, event: TunnelEvent) {
        let now = self.clock.own().now();
        match event {
            TunnelEvent::HandshakeDone { peer } => {
                // Where the tunnel sends to; had it been elsewhere, an event of its own would say so.
                if let Some(id) = self.id_of(&peer)
                    && let Some(endpoint) = self.table.endpoint(id)
                {
                    self.table.handle_authenticated(id, endpoint, now);
                }
            }
            TunnelEvent::EndpointChanged { peer, from } => {
                if let Some(id) = self.id_of(&peer) {
                    self.table.handle_authenticated(id, from, now);
                    self.told_changed = true;
                }
            }
            TunnelEvent::PeerSilent { peer } => {
                if let Some(id) = self.id_of(&peer) {
                    self.table.handle_no_reply(id, now);
                }
            }
            _ => {}
        }
    }

    fn id_of(&self, key: &PublicKey) -> Option<NodeId> {
        self.ids.get(&key.0).copied().map(NodeId)
    }

    /// Carries out what the peer table wants.
    fn act(&mut self) {
        while let Some(action) = self.table.poll_action() {
            let (Action::SetEndpoint { peer, .. } | Action::Handshake { peer }) = action;
            let Some(peer) = self.current.get(&peer.0) else { continue };
            let key = PublicKey(peer.wireguard_key());
            match action {
                Action::SetEndpoint { endpoint, .. } => self.tunnel.set_endpoint(&key, endpoint),
                Action::Handshake { .. } => self.tunnel.initiate_handshake(&key),
            };
        }
    }

    fn wake(&self) -> Instant {
        let now = self.clock.own().now();
        let lease = self.next_lease.map(|at| now + at.saturating_sub(self.clock.since_boot()));
        let path = self.table.poll_timeout();
        [lease, path].into_iter().flatten().min().unwrap_or(now + TICK).min(now + TICK)
    }

    async fn tick(&mut self) {
        self.look_at_firewall().await;
        self.restore_overlay().await;
        self.refresh_endpoints().await;
        // Leases, a firewall that was missing, a clock that was set.
        self.reconcile().await;
        self.save_again();
        self.save_endpoints();
    }

    async fn refresh_endpoints(&mut self) {
        match self.host.addresses().await {
            Ok(addresses) => {
                let (interface, port) = (self.tunnel.name(), self.tunnel.listen_port());
                let endpoints = own_endpoints(self.overlay, &self.configured, &addresses, interface, port);
                self.outlets.endpoints.send_if_modified(|before| {
                    let changed = *before != endpoints;
                    *before = endpoints;
                    changed
                });
            }
            Err(error) => tracing::warn!(error = mesh_runtime::chain(&error), "cannot list addresses"),
        }
    }

    fn knowledge(&self) -> Knowledge {
        Knowledge {
            cursor: self.roster.cursor().filter(|_| !self.map_unsaved).cloned(),
            crls: self.trust.crl_haves(),
            backend: backend_line(self.tunnel.as_ref()),
            wireguard_port: self.tunnel.listen_port(),
        }
    }

    fn status(&self) -> NetworkStatus {
        let stats: BTreeMap<[u8; 32], _> =
            self.tunnel.peers().into_iter().map(|stats| (stats.public_key.0, stats)).collect();
        let peers = self.current.iter().map(|(id, peer)| {
            let key = peer.wireguard_key();
            let stats = stats.get(&key);
            PeerView {
                name: peer.leaf.name.clone(),
                ipv4: peer.leaf.ipv4,
                ipv6: peer.leaf.ipv6,
                wireguard_key: key,
                endpoint: stats.and_then(|stats| stats.endpoint),
                candidates: self.candidates_of(*id),
                last_handshake: stats.and_then(|stats| stats.last_handshake),
                has_session: stats.is_some_and(|stats| stats.has_session),
                rtt: stats.and_then(|stats| stats.rtt),
                lease_ends: peer.leaf.chain_not_after,
                rx_bytes: stats.map_or(0, |stats| stats.rx_bytes),
                tx_bytes: stats.map_or(0, |stats| stats.tx_bytes),
                tags: peer.tags.clone(),
                inbound: peer.inbound,
                outbound: peer.outbound,
            }
        });
        NetworkStatus {
            interface: self.tunnel.name().to_owned(),
            backend: backend_name(self.tunnel.as_ref()).to_owned(),
            offloads: offloads(self.tunnel.as_ref()),
            wireguard_port: self.tunnel.listen_port(),
            peers: peers.collect(),
            roster_seq: self.roster.seq(),
            crl_number: self.trust.crls().map(|trusted| trusted.message.number).max().unwrap_or(0),
            firewall_ready: self.firewall.is_some(),
            tags: self.roster.own().tags.clone(),
        }
    }

    async fn inspect(&self) -> Inspection {
        let firewall =
            self.firewall_problem().await.unwrap_or_else(|error| Some(mesh_runtime::chain(&error)));
        let overlay = overlay::missing(&self.host, self.tunnel.name(), &self.place, &self.findings).await;
        Inspection { firewall, overlay: overlay.unwrap_or_else(|error| vec![mesh_runtime::chain(&error)]) }
    }

    /// Where a peer may be, the endpoint in use first.
    fn candidates_of(&self, id: u32) -> Vec<SocketAddr> {
        let told = self.told.get(&id).map(|told| candidates(told)).unwrap_or_default();
        let mut list: Vec<SocketAddr> = self.table.endpoint(NodeId(id)).into_iter().collect();
        for (address, _) in told {
            if !list.contains(&address) && self.overlay.may_carry(address) {
                list.push(address);
            }
        }
        list
    }

    fn save_endpoints(&mut self) {
        if !std::mem::take(&mut self.told_changed) {
            return;
        }
        // Also of those that are no peers now: with a clock that is wrong or a map that is refused nobody is one,
        // and the next start without a controller shall still find them.
        let known: BTreeSet<u32> = self.current.keys().chain(self.told.keys()).copied().collect();
        let peers = known.into_iter().map(|node_id| {
            let told = self.told.get(&node_id).map(Vec::as_slice).unwrap_or_default();
            // The one in use leads, so that a start without a controller finds it first.
            let endpoints = self.candidates_of(node_id).into_iter().map(|address| {
                let address = address.to_string();
                let source = told.iter().find(|known| known.address == address);
                let source = source.map_or(pb::endpoint::Source::PeerSaw as i32, |known| known.source);
                pb::Endpoint { address, source }
            });
            pb::hints::PeerEndpoints { node_id, endpoints: endpoints.collect() }
        });
        let hints = pb::Hints { peers: peers.collect(), seen_from: Vec::new() };
        if let Err(error) = self.state.save_endpoints(&hints) {
            tracing::warn!(error = mesh_runtime::chain(&error), "endpoints are not stored");
        }
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
