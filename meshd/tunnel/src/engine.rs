//! The userspace engine: its threads, and the calls that change it.
//!
//! | thread | does |
//! |---|---|
//! | carrier | one queue both ways: interface → encrypt → socket, and socket → decrypt, check the inner source → interface; passes handshakes on |
//! | housekeeper | handshakes (they cost 0.2 ms each), timers, retries, keepalives |
//!
//! With more cores there are several queues, each with its carrier: the kernel keeps a flow on one queue of the
//! interface and a sender at one socket, so the order of a flow's packets holds.
//!
//! Calls from outside never send: they change state and wake a thread.

use std::fmt;
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::carrier::Carrier;
use crate::config::{ALLOWED_IPS_PER_PEER_MAX, PEERS_MAX, PeerConfig, TunnelConfig};
use crate::counters::{OffloadCells, count};
use crate::detour::{DatagramSink, SinkCell, is_virtual};
use crate::error::TunnelError;
use crate::event::Events;
use crate::housekeeper::{HANDSHAKES_WAITING_MAX, Housekeeper};
use crate::identity::{Identities, Identity};
use crate::key::{PrivateKey, PublicKey};
use crate::packet;
use crate::peer::Peer;
use crate::shared::{Binding, HANDSHAKES_PER_SECOND_MAX, HANDSHAKES_PER_SECOND_PER_PEER, Shared, lock};
use crate::tun::Tun;
use crate::tunnel::{BackendInfo, BackendKind, Counters, PeerStats, Tuning, Tunnel};
use crate::udp::{Settings, Udp};

/// First greetings of more peers than this spread over so much, per peer and at most.
const GREETED_AT_ONCE: usize = 32;
const GREETING_SPREAD_PER_PEER: Duration = Duration::from_micros(300);
const GREETING_SPREAD_MAX: Duration = Duration::from_millis(333);

/// How often a call that waits for sockets looks whether the tunnel is closed.
const BIND_WAIT: Duration = Duration::from_millis(100);

/// The engine behind [`Tunnel`].
pub(crate) struct Userspace {
    name: String,
    shared: Arc<Shared>,
    offloads: Arc<OffloadCells>,
    virtual_out: Arc<SinkCell>,
    /// What the sockets in use were made from, with the port they have.
    sockets: Mutex<Settings>,
    /// Serialises changes of port and mark. Not `control`: the thread that binds may wait for that.
    rebinding: Mutex<()>,
    why_not_kernel: Option<String>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Userspace {
    pub(crate) fn open(config: TunnelConfig, tuning: Tuning) -> Result<Self, TunnelError> {
        config.check()?;
        let queues = tuning.queues();
        let shared = Shared::new(config.private_key, queues)
            .map_err(|source| TunnelError::System { action: "make an event descriptor", source })?;
        let shared = Arc::new(shared);
        let (offloads, virtual_out) = (Arc::<OffloadCells>::default(), Arc::<SinkCell>::default());
        let mut settings = Settings {
            port: config.listen_port,
            fwmark: config.fwmark.filter(|mark| *mark != 0),
            queues,
            wanted: tuning.offloads,
            offloads: offloads.clone(),
            virtual_out: virtual_out.clone(),
        };
        let sockets = Udp::bind(&settings)?;
        settings.port = sockets[0].port();
        shared.udp.set(sockets.clone());
        let tuns = Tun::create(&config.interface, queues, tuning.offloads, &offloads)?;
        tuns[0].bring_up(config.mtu)?;
        let engine = Self {
            name: tuns[0].name().to_owned(),
            shared: shared.clone(),
            offloads,
            virtual_out,
            sockets: Mutex::new(settings),
            rebinding: Mutex::default(),
            why_not_kernel: None,
            threads: Mutex::default(),
        };
        let (pass_on, handshakes) = sync_channel(HANDSHAKES_WAITING_MAX);
        for ((queue, tun), udp) in tuns.into_iter().enumerate().zip(sockets) {
            let carrier = Carrier::new(shared.clone(), queue, tun, udp, config.mtu, pass_on.clone());
            engine.spawn("carrier", move || carrier.run())?;
        }
        let housekeeper = Housekeeper::new(shared, handshakes);
        engine.spawn("housekeeper", move || housekeeper.run())?;
        Ok(engine)
    }

    /// Says why this engine runs where the kernel's was to be tried first.
    pub(crate) fn instead_of_kernel(mut self, why: String) -> Self {
        self.why_not_kernel = Some(why);
        self
    }

    /// Starts one thread; if it fails or panics the whole tunnel stops and says why.
    fn spawn(
        &self,
        role: &'static str,
        run: impl FnOnce() -> Result<(), String> + Send + 'static,
    ) -> Result<(), TunnelError> {
        let shared = self.shared.clone();
        let body = move || {
            let result = catch_unwind(AssertUnwindSafe(run))
                .unwrap_or_else(|_| Err(format!("the {role} thread panicked; this is a bug")));
            if let Err(error) = result {
                shared.stop(Some(error));
            }
        };
        let thread = thread::Builder::new()
            .name(format!("wg-{role}"))
            .spawn(body)
            .map_err(|source| TunnelError::System { action: "start a thread", source })?;
        lock(&self.threads).push(thread);
        Ok(())
    }

    fn change(&self) -> Result<MutexGuard<'_, ()>, TunnelError> {
        let guard = lock(&self.shared.control);
        if self.shared.is_stopped() { Err(TunnelError::Closed) } else { Ok(guard) }
    }

    /// Binds sockets in the network namespace that the tunnel was opened in, where its threads still are;
    /// the caller may be anywhere.
    fn bind_at_home(&self, settings: Settings) -> Result<Vec<Arc<Udp>>, TunnelError> {
        let (answer, answered) = sync_channel(1);
        *lock(&self.shared.to_bind) = Some(Binding { settings, answer });
        self.shared.housekeeper.wake();
        loop {
            match answered.recv_timeout(BIND_WAIT) {
                Ok(result) => return result,
                Err(RecvTimeoutError::Timeout) if !self.shared.is_stopped() => {}
                Err(_) => return Err(TunnelError::Closed),
            }
        }
    }

    fn find(&self, key: &PublicKey) -> Option<Arc<Peer>> {
        self.shared.registry().by_key(key).cloned()
    }

    /// Lets the limiter grow with the number of peers.
    fn grow_limit(&self, peers: usize) {
        let Identities { current, next } = self.shared.identities();
        let wanted = (peers as u64 * HANDSHAKES_PER_SECOND_PER_PEER).min(HANDSHAKES_PER_SECOND_MAX);
        if wanted > current.limit {
            // Powers of two, so that it does not happen with every peer.
            let grown = |own: &Arc<Identity>| Arc::new(own.with_limit(wanted.next_power_of_two()));
            let (current, next) = (grown(&current), next.as_ref().map(grown));
            self.shared.set_identities(Identities { current, next });
        }
    }

    /// Puts a twin beside each of `peers`.
    fn add_twins(&self, peers: &[Arc<Peer>], next: &Identity) -> Result<(), TunnelError> {
        for peer in peers {
            let index =
                self.shared.registry_mut().reserve(rand::random()).ok_or(TunnelError::TooManyPeers)?;
            let start = Instant::now() + greeting_delay(peers.len());
            let twin = Arc::new(peer.twin(next, index, start));
            self.shared.registry_mut().insert_twin(twin);
        }
        Ok(())
    }

    /// Ends peers that are no longer found. Packets of theirs may still be on their way after this.
    fn retire(&self, peers: &[Arc<Peer>]) {
        for peer in peers {
            peer.lock().remove();
        }
    }

    fn forget_next_key(&self) -> bool {
        let Identities { current, next } = self.shared.identities();
        self.shared.set_identities(Identities { current, next: None });
        let dropped = self.shared.registry_mut().drop_twins();
        self.retire(&dropped);
        next.is_some()
    }

    fn both(&self, key: &PublicKey) -> Vec<Arc<Peer>> {
        self.shared.registry().both(key).cloned().collect()
    }
}

impl Tunnel for Userspace {
    fn name(&self) -> &str {
        &self.name
    }

    fn backend(&self) -> BackendInfo {
        BackendInfo {
            kind: BackendKind::Userspace,
            offloads: self.offloads.read(),
            why_not_kernel: self.why_not_kernel.clone(),
        }
    }

    fn listen_port(&self) -> u16 {
        lock(&self.sockets).port
    }

    fn set_listen_port(&self, port: u16) -> Result<u16, TunnelError> {
        let _one_at_a_time = lock(&self.rebinding);
        let mut settings = lock(&self.sockets).clone();
        if port == settings.port {
            return Ok(port);
        }
        settings.port = port;
        let sockets = self.bind_at_home(settings.clone())?;
        settings.port = sockets[0].port();
        let given = settings.port;
        *lock(&self.sockets) = settings;
        self.shared.udp.set(sockets);
        // Those who wait at the old sockets, and hold them open.
        self.shared.wake_queues();
        Ok(given)
    }

    fn fwmark(&self) -> Option<u32> {
        lock(&self.sockets).fwmark
    }

    fn set_fwmark(&self, mark: Option<u32>) -> Result<(), TunnelError> {
        let _one_at_a_time = lock(&self.rebinding);
        let mark = mark.filter(|mark| *mark != 0);
        self.shared.udp.all().iter().try_for_each(|udp| udp.set_mark(mark.unwrap_or(0)))?;
        lock(&self.sockets).fwmark = mark;
        Ok(())
    }

    fn private_key(&self) -> Option<PrivateKey> {
        Some(self.shared.identities().current.private.clone())
    }

    fn public_key(&self) -> PublicKey {
        self.shared.identities().current.public
    }

    fn set_peer(&self, config: PeerConfig) -> Result<(), TunnelError> {
        config.check()?;
        let _control = self.change()?;
        let own = self.shared.identities();
        let key = config.public_key;
        if own.iter().any(|own| own.public == key) {
            return Err(TunnelError::OwnKey { peer: key });
        }
        let known = self.find(&key);
        // Only this call and the others under `control` change routes, so what is free now stays free.
        let overlap = self.shared.registry().conflict(&config.allowed_ips, &key);
        if let Some((prefix, owner)) = overlap {
            return Err(TunnelError::AllowedIpsOverlap { peer: key, owner, prefix });
        }
        let new = config.allowed_ips.clone();
        match known {
            Some(peer) => {
                let old = peer.lock().allowed_ips().to_vec();
                self.shared.registry_mut().route(&key, &old, &new);
                peer.lock().update(config.clone(), &own.current, Instant::now());
                let twin = self.shared.registry().twin(&key).cloned();
                if let (Some(twin), Some(next)) = (twin, &own.next) {
                    twin.lock().update(config, next, Instant::now());
                    self.shared.tick_soon(&twin);
                }
                self.shared.tick_soon(&peer);
            }
            None => {
                let count = self.shared.registry().len() + 1;
                if count > PEERS_MAX {
                    return Err(TunnelError::TooManyPeers);
                }
                let (index, owner) = {
                    let mut registry = self.shared.registry_mut();
                    (registry.reserve(rand::random()).ok_or(TunnelError::TooManyPeers)?, registry.new_owner())
                };
                let start = Instant::now() + greeting_delay(count);
                let peer = Arc::new(Peer::new(config, &own.current, index, owner, start));
                self.shared.registry_mut().insert(peer.clone(), &new);
                if let Some(next) = &own.next {
                    self.add_twins(std::slice::from_ref(&peer), next)?;
                }
                self.grow_limit(count);
                self.shared.tick_soon(&peer);
            }
        }
        Ok(())
    }

    fn remove_peer(&self, key: &PublicKey) -> bool {
        let _control = lock(&self.shared.control);
        let removed = self.shared.registry_mut().remove(key);
        self.retire(&removed);
        // A packet that was decrypted a moment ago may still be on its way to the interface.
        self.shared.wait_for_batches();
        !removed.is_empty()
    }

    fn set_endpoint(&self, key: &PublicKey, endpoint: SocketAddr) -> bool {
        let peers = if is_usable(endpoint) { self.both(key) } else { Vec::new() };
        for peer in &peers {
            peer.lock().set_endpoint(endpoint);
            self.shared.tick_soon(peer);
        }
        !peers.is_empty()
    }

    fn rotate_key(&self, private_key: PrivateKey) -> Result<(), TunnelError> {
        let _control = self.change()?;
        let (public, limit) = (private_key.public(), self.shared.identities().current.limit);
        if self.find(&public).is_some() {
            return Err(TunnelError::OwnKey { peer: public });
        }
        self.forget_next_key();
        let own = Identities::new(private_key, limit);
        self.shared.set_identities(own.clone());
        let peers: Vec<_> = self.shared.registry().all().cloned().collect();
        for peer in &peers {
            peer.lock().renew(&own.current, Instant::now() + greeting_delay(peers.len()));
        }
        self.shared.wait_for_batches();
        self.shared.housekeeper.wake();
        Ok(())
    }

    fn add_next_key(&self, private_key: PrivateKey) -> Result<(), TunnelError> {
        let _control = self.change()?;
        let (public, current) = (private_key.public(), self.shared.identities().current);
        if public == current.public || self.find(&public).is_some() {
            return Err(TunnelError::OwnKey { peer: public });
        }
        self.forget_next_key();
        let next = Arc::new(Identity::new(private_key, current.limit));
        let peers: Vec<_> = self.shared.registry().all().cloned().collect();
        if let Err(error) = self.add_twins(&peers, &next) {
            self.forget_next_key();
            return Err(error);
        }
        self.shared.set_identities(Identities { current, next: Some(next) });
        self.shared.housekeeper.wake();
        Ok(())
    }

    fn peers_of_next_key(&self) -> Vec<PeerStats> {
        let twins: Vec<_> = self.shared.registry().pairs().filter_map(|(_, twin)| twin.cloned()).collect();
        let now = Instant::now();
        twins.iter().map(|twin| twin.lock().stats(twin.key, now)).collect()
    }

    fn switch_to_next_key(&self) -> bool {
        let _control = lock(&self.shared.control);
        let Some(current) = self.shared.identities().next else { return false };
        self.shared.set_identities(Identities { current, next: None });
        let replaced = self.shared.registry_mut().promote_twins();
        self.retire(&replaced);
        let peers: Vec<_> = self.shared.registry().all().cloned().collect();
        for peer in &peers {
            let mut state = peer.lock();
            if !state.has_session() {
                state.want_initiation();
            }
        }
        self.shared.wait_for_batches();
        self.shared.housekeeper.wake();
        true
    }

    fn drop_next_key(&self) -> bool {
        let _control = lock(&self.shared.control);
        let dropped = self.forget_next_key();
        self.shared.wait_for_batches();
        dropped
    }

    fn hand_over(&self, from: &PublicKey, to: &PublicKey) -> Result<(), TunnelError> {
        let _control = self.change()?;
        let (old, new) = (self.both(from), self.both(to));
        let unknown = |peer: &PublicKey| TunnelError::UnknownPeer { peer: *peer };
        let giver = old.first().ok_or_else(|| unknown(from))?;
        let taker = new.first().ok_or_else(|| unknown(to))?;
        if from == to {
            return Ok(());
        }
        let (given, had) = (giver.lock().allowed_ips().to_vec(), taker.lock().allowed_ips().to_vec());
        let all = [had.as_slice(), &given].concat();
        if all.len() > ALLOWED_IPS_PER_PEER_MAX {
            return Err(TunnelError::TooManyAllowedIps { peer: *to, count: all.len() });
        }
        old.iter().for_each(|peer| peer.join(taker));
        // In one step for those who look addresses up: they find one or the other.
        self.shared.registry_mut().route(to, &had, &all);
        old.iter().for_each(|peer| peer.lock().set_allowed_ips(Vec::new()));
        new.iter().for_each(|peer| peer.lock().set_allowed_ips(all.clone()));
        Ok(())
    }

    fn initiate_handshake(&self, key: &PublicKey) -> bool {
        let mut wanted = false;
        for peer in self.both(key) {
            if peer.lock().want_initiation() {
                self.shared.tick_soon(&peer);
                wanted = true;
            }
        }
        wanted
    }

    fn probe(&self, key: &PublicKey, to: &[SocketAddr]) -> bool {
        let usable: Vec<_> = to.iter().copied().filter(|address| is_usable(*address)).collect();
        let holder = self.shared.registry().holder(key).cloned();
        let Some(peer) = holder.filter(|_| !usable.is_empty()) else { return false };
        let wanted = peer.lock().want_probes(&usable);
        if wanted {
            self.shared.tick_soon(&peer);
        }
        wanted
    }

    fn send_raw(&self, datagram: &[u8], to: SocketAddr) -> Result<(), TunnelError> {
        let udp = self.shared.udp.get(0).ok_or(TunnelError::Closed)?;
        udp.send_now(datagram, packet::unmapped(to))
            .map_err(|source| TunnelError::Socket { action: "send a datagram", source })
    }

    fn set_foreign_sink(&self, sink: Option<DatagramSink>) -> bool {
        self.shared.foreign.set(sink);
        true
    }

    fn set_virtual_sink(&self, sink: Option<DatagramSink>) -> bool {
        self.virtual_out.set(sink);
        true
    }

    fn receive_virtual(&self, datagram: &[u8], from: SocketAddr) -> bool {
        let taken =
            is_virtual(from) && !self.shared.is_stopped() && self.shared.detoured.push(datagram, from);
        if taken {
            self.shared.queues[0].wake.wake();
        } else {
            count(&self.shared.counters.rx_virtual_dropped);
        }
        taken
    }

    fn peer(&self, key: &PublicKey) -> Option<PeerConfig> {
        self.find(key).map(|peer| peer.lock().config().clone())
    }

    fn peers(&self) -> Vec<PeerStats> {
        let cloned = |(peer, twin): (&Arc<Peer>, Option<&Arc<Peer>>)| (peer.clone(), twin.cloned());
        let pairs: Vec<_> = self.shared.registry().pairs().map(cloned).collect();
        let now = Instant::now();
        let stats = |peer: &Arc<Peer>| peer.lock().stats(peer.key, now);
        pairs.iter().map(|(peer, twin)| PeerStats::merged(stats(peer), twin.as_ref().map(stats))).collect()
    }

    fn counters(&self) -> Counters {
        self.shared.counters.read()
    }

    fn events(&self) -> Events {
        self.shared.events.reader()
    }

    fn close(&self) {
        self.shared.stop(None);
        // The threads own the interface and the sockets: with the last of them all are gone.
        self.shared.udp.set(Vec::new());
        for thread in std::mem::take(&mut *lock(&self.threads)) {
            let _ = thread.join();
        }
        self.shared.events.close();
    }
}

impl Drop for Userspace {
    fn drop(&mut self) {
        self.close();
    }
}

impl fmt::Debug for Userspace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Userspace")
            .field("name", &self.name)
            .field("port", &self.listen_port())
            .finish_non_exhaustive()
    }
}

fn is_usable(endpoint: SocketAddr) -> bool {
    endpoint.port() != 0 && !endpoint.ip().is_unspecified() && !endpoint.ip().is_multicast()
}

fn greeting_delay(peers: usize) -> Duration {
    let crowd = peers.saturating_sub(GREETED_AT_ONCE) as u32;
    let spread = (GREETING_SPREAD_PER_PEER * crowd).min(GREETING_SPREAD_MAX);
    spread.mul_f64(rand::random_range(0.0..1.0))
}
