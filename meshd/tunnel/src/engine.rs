//! The userspace engine: what its three threads share, and the calls that change it.
//!
//! | thread | does |
//! |---|---|
//! | outbound | interface → encrypt → socket; the only one that sends inner packets, so their order holds |
//! | inbound | socket → decrypt, check the inner source → interface; passes handshakes on |
//! | housekeeper | handshakes (they cost 0.2 ms each), timers, retries, keepalives |
//!
//! Calls from outside never send: they change state and wake a thread. Locks are taken in the order
//! control, registry, peer, and none is held across a system call.

use std::fmt;
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use boringtun::noise::rate_limiter::RateLimiter;

use crate::config::{PeerConfig, TunnelConfig};
use crate::detour::{DatagramSink, SinkCell, Waiting, is_virtual};
use crate::error::TunnelError;
use crate::event::{Events, Queue, TunnelEvent};
use crate::housekeeper::{HANDSHAKES_WAITING_MAX, Housekeeper};
use crate::inbound::Inbound;
use crate::key::{PrivateKey, PublicKey};
use crate::outbound::Outbound;
use crate::packet;
use crate::peer::{Notes, Peer};
use crate::quiescence::Quiescence;
use crate::registry::Registry;
use crate::tun::Tun;
use crate::tunnel::{BackendInfo, BackendKind, Counters, Offloads, PeerStats, Tunnel};
use crate::udp::Udp;
use crate::wake::Wake;

/// Handshake messages per second before cookies are asked for: with few peers, for each peer, and at most.
/// A whole fleet may come back within a second (each peer sends one message and answers one); what a
/// flood can take is one core, of the thread that answers handshakes.
const HANDSHAKES_PER_SECOND_MIN: u64 = 100;
const HANDSHAKES_PER_SECOND_PER_PEER: u64 = 2;
const HANDSHAKES_PER_SECOND_MAX: u64 = 4096;
/// First greetings of more peers than this spread over so much, per peer and at most.
const GREETED_AT_ONCE: usize = 32;
const GREETING_SPREAD_PER_PEER: Duration = Duration::from_micros(300);
const GREETING_SPREAD_MAX: Duration = Duration::from_millis(333);

/// What the threads and the calls share.
pub(crate) struct Shared {
    registry: RwLock<Registry>,
    identity: RwLock<Arc<Identity>>,
    pub(crate) events: Arc<Queue>,
    pub(crate) counters: CounterCells,
    pub(crate) outbound: Wake,
    pub(crate) inbound: Wake,
    pub(crate) housekeeper: Wake,
    /// Whether the inbound thread is inside a batch.
    pub(crate) quiescence: Quiescence,
    /// Takes datagrams that are not WireGuard's.
    pub(crate) foreign: SinkCell,
    /// What came from virtual endpoints; for the inbound thread.
    pub(crate) detoured: Waiting,
    /// Peers whose waiting packets may go; for the outbound thread.
    ready: Mutex<Vec<Arc<Peer>>>,
    /// Peers that want a tick before the next one is due; for the housekeeper.
    urgent: Mutex<Vec<Arc<Peer>>>,
    stop: AtomicBool,
}

/// Who we are, and the limiter whose MACs and cookies depend on it.
pub(crate) struct Identity {
    pub(crate) private: PrivateKey,
    pub(crate) public: PublicKey,
    pub(crate) limiter: RateLimiter,
    limit: u64,
}

impl Identity {
    fn new(private: PrivateKey, limit: u64) -> Self {
        let public = private.public();
        Self { limiter: RateLimiter::new(&public.to_x25519(), limit), private, public, limit }
    }
}

impl Shared {
    fn new(private_key: PrivateKey) -> std::io::Result<Self> {
        Ok(Self {
            registry: RwLock::new(Registry::new()),
            identity: RwLock::new(Arc::new(Identity::new(private_key, HANDSHAKES_PER_SECOND_MIN))),
            events: Arc::default(),
            counters: CounterCells::default(),
            outbound: Wake::new()?,
            inbound: Wake::new()?,
            housekeeper: Wake::new()?,
            quiescence: Quiescence::default(),
            foreign: SinkCell::default(),
            detoured: Waiting::default(),
            ready: Mutex::default(),
            urgent: Mutex::default(),
            stop: AtomicBool::new(false),
        })
    }

    pub(crate) fn registry(&self) -> RwLockReadGuard<'_, Registry> {
        self.registry.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn registry_mut(&self) -> RwLockWriteGuard<'_, Registry> {
        self.registry.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn identity(&self) -> Arc<Identity> {
        self.identity.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_identity(&self, identity: Identity) {
        *self.identity.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(identity);
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Ends all threads. Only the first reason is reported.
    pub(crate) fn stop(&self, error: Option<String>) {
        if self.stop.swap(true, Ordering::AcqRel) {
            return;
        }
        match &error {
            Some(error) => tracing::error!(%error, "tunnel stopped"),
            None => tracing::debug!("tunnel closed"),
        }
        self.events.push(TunnelEvent::Stopped { error });
        for thread in [&self.outbound, &self.inbound, &self.housekeeper] {
            thread.wake();
        }
    }

    /// Passes on what a peer's state machine has to tell.
    pub(crate) fn report(&self, peer: &Arc<Peer>, notes: Notes) {
        if notes == Notes::default() {
            return;
        }
        let key = peer.key;
        if notes.handshake_done {
            tracing::debug!(peer = %key, "handshake done");
            self.events.push(TunnelEvent::HandshakeDone { peer: key });
        }
        if let Some(from) = notes.moved_to {
            tracing::info!(peer = %key, endpoint = %from, "endpoint changed");
            self.events.push(TunnelEvent::EndpointChanged { peer: key, from });
        }
        if let Some((from, rtt)) = notes.answered {
            self.events.push(TunnelEvent::PathAnswered { peer: key, from, rtt });
        }
        if notes.silent {
            tracing::info!(peer = %key, "peer silent");
            self.events.push(TunnelEvent::PeerSilent { peer: key });
        }
        if notes.backlog_ready {
            lock(&self.ready).push(peer.clone());
            self.outbound.wake();
        }
    }

    /// Peers whose waiting packets may go. Call after the wake-up was cleared.
    pub(crate) fn take_ready(&self) -> Vec<Arc<Peer>> {
        std::mem::take(&mut *lock(&self.ready))
    }

    pub(crate) fn take_urgent(&self) -> Vec<Arc<Peer>> {
        std::mem::take(&mut *lock(&self.urgent))
    }

    fn tick_soon(&self, peer: &Arc<Peer>) {
        let mut urgent = lock(&self.urgent);
        // A caller that asks again and again does not make the list grow.
        if !urgent.contains(peer) {
            urgent.push(peer.clone());
        }
        drop(urgent);
        self.housekeeper.wake();
    }
}

/// The engine behind [`Tunnel`].
pub(crate) struct Userspace {
    name: String,
    port: u16,
    shared: Arc<Shared>,
    offloads: Arc<OffloadCells>,
    /// `None` once closed, so that the port is free then.
    udp: Mutex<Option<Arc<Udp>>>,
    virtual_out: Arc<SinkCell>,
    /// Serialises the calls that change peers or keys.
    control: Mutex<()>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Userspace {
    pub(crate) fn open(config: TunnelConfig, wanted: Offloads) -> Result<Self, TunnelError> {
        config.check()?;
        let shared = Shared::new(config.private_key)
            .map_err(|source| TunnelError::System { action: "make an event descriptor", source })?;
        let shared = Arc::new(shared);
        let (offloads, virtual_out) = (Arc::<OffloadCells>::default(), Arc::<SinkCell>::default());
        let udp = Arc::new(Udp::bind(
            config.listen_port,
            config.fwmark,
            wanted,
            offloads.clone(),
            virtual_out.clone(),
        )?);
        let tun = Arc::new(Tun::create(&config.interface, wanted, offloads.clone())?);
        tun.bring_up(config.mtu)?;
        let engine = Self {
            name: tun.name().to_owned(),
            port: udp.port(),
            shared: shared.clone(),
            offloads,
            udp: Mutex::new(Some(udp.clone())),
            virtual_out,
            control: Mutex::default(),
            threads: Mutex::default(),
        };
        let (pass_on, handshakes) = sync_channel(HANDSHAKES_WAITING_MAX);
        let outbound = Outbound::new(shared.clone(), tun.clone(), udp.clone(), config.mtu);
        let inbound = Inbound::new(shared.clone(), tun, udp.clone(), pass_on);
        let housekeeper = Housekeeper::new(shared, udp, handshakes);
        engine.spawn("outbound", move || outbound.run())?;
        engine.spawn("inbound", move || inbound.run())?;
        engine.spawn("housekeeper", move || housekeeper.run())?;
        Ok(engine)
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
        let guard = lock(&self.control);
        if self.shared.is_stopped() { Err(TunnelError::Closed) } else { Ok(guard) }
    }

    fn find(&self, key: &PublicKey) -> Option<Arc<Peer>> {
        self.shared.registry().by_key(key).cloned()
    }

    /// Lets the limiter grow with the number of peers. Outstanding cookies become void, which costs
    /// their holders one more round trip.
    fn grow_limit(&self, peers: usize) {
        let identity = self.shared.identity();
        let wanted = (peers as u64 * HANDSHAKES_PER_SECOND_PER_PEER).min(HANDSHAKES_PER_SECOND_MAX);
        if wanted > identity.limit {
            // Powers of two, so that it does not happen with every peer.
            self.shared.set_identity(Identity::new(identity.private.clone(), wanted.next_power_of_two()));
        }
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
            why_not_kernel: Some("this version has no kernel backend".into()),
        }
    }

    fn listen_port(&self) -> u16 {
        self.port
    }

    fn public_key(&self) -> PublicKey {
        self.shared.identity().public
    }

    fn set_peer(&self, config: PeerConfig) -> Result<(), TunnelError> {
        config.check()?;
        let _control = self.change()?;
        let identity = self.shared.identity();
        if config.public_key == identity.public {
            return Err(TunnelError::OwnKey { peer: config.public_key });
        }
        let known = self.find(&config.public_key);
        // Only this call and the others under `control` change routes, so what is free now stays free.
        let overlap = self.shared.registry().conflict(&config.allowed_ips, known.as_ref());
        if let Some((prefix, owner)) = overlap {
            return Err(TunnelError::AllowedIpsOverlap { peer: config.public_key, owner, prefix });
        }
        let new = config.allowed_ips.clone();
        let peer = match known {
            Some(peer) => {
                let old = peer.lock().allowed_ips().to_vec();
                self.shared.registry_mut().route(&peer, &old, &new);
                peer.lock().update(config, &identity.private, Instant::now());
                peer
            }
            None => {
                let count = self.shared.registry().peers().len() + 1;
                let index =
                    self.shared.registry_mut().reserve(rand::random()).ok_or(TunnelError::TooManyPeers)?;
                let start = Instant::now() + greeting_delay(count);
                let peer = Arc::new(Peer::new(config, &identity.private, index, start));
                self.shared.registry_mut().insert(peer.clone(), &new);
                self.grow_limit(count);
                peer
            }
        };
        self.shared.tick_soon(&peer);
        Ok(())
    }

    fn remove_peer(&self, key: &PublicKey) -> bool {
        let _control = lock(&self.control);
        let Some(peer) = self.shared.registry_mut().remove(key) else { return false };
        peer.lock().remove();
        // A packet that was decrypted a moment ago may still be on its way to the interface.
        self.shared.quiescence.wait();
        true
    }

    fn set_endpoint(&self, key: &PublicKey, endpoint: SocketAddr) -> bool {
        let Some(peer) = self.find(key).filter(|_| is_usable(endpoint)) else { return false };
        peer.lock().set_endpoint(endpoint);
        self.shared.tick_soon(&peer);
        true
    }

    fn rotate_key(&self, private_key: PrivateKey) -> Result<(), TunnelError> {
        let _control = self.change()?;
        let (public, limit) = (private_key.public(), self.shared.identity().limit);
        if self.find(&public).is_some() {
            return Err(TunnelError::OwnKey { peer: public });
        }
        self.shared.set_identity(Identity::new(private_key.clone(), limit));
        let peers: Vec<_> = self.shared.registry().peers().cloned().collect();
        for peer in &peers {
            peer.lock().renew(&private_key, Instant::now() + greeting_delay(peers.len()));
        }
        self.shared.quiescence.wait();
        self.shared.housekeeper.wake();
        Ok(())
    }

    fn initiate_handshake(&self, key: &PublicKey) -> bool {
        let Some(peer) = self.find(key) else { return false };
        let wanted = peer.lock().want_initiation();
        if wanted {
            self.shared.tick_soon(&peer);
        }
        wanted
    }

    fn probe(&self, key: &PublicKey, to: &[SocketAddr]) -> bool {
        let usable: Vec<_> = to.iter().copied().filter(|address| is_usable(*address)).collect();
        let Some(peer) = self.find(key).filter(|_| !usable.is_empty()) else { return false };
        let wanted = peer.lock().want_probes(&usable);
        if wanted {
            self.shared.tick_soon(&peer);
        }
        wanted
    }

    fn send_raw(&self, datagram: &[u8], to: SocketAddr) -> Result<(), TunnelError> {
        let udp = lock(&self.udp).clone().ok_or(TunnelError::Closed)?;
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
            self.shared.inbound.wake();
        } else {
            count(&self.shared.counters.rx_virtual_dropped);
        }
        taken
    }

    fn peer(&self, key: &PublicKey) -> Option<PeerConfig> {
        self.find(key).map(|peer| peer.lock().config().clone())
    }

    fn peers(&self) -> Vec<PeerStats> {
        let peers: Vec<_> = self.shared.registry().peers().cloned().collect();
        let now = Instant::now();
        peers.iter().map(|peer| peer.lock().stats(peer.key, now)).collect()
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
        *lock(&self.udp) = None;
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
            .field("port", &self.port)
            .finish_non_exhaustive()
    }
}

/// [`Offloads`] as they are at the moment; each may be switched off by the first error of a driver.
#[derive(Debug, Default)]
pub(crate) struct OffloadCells {
    pub(crate) tun_tcp: AtomicBool,
    pub(crate) tun_udp: AtomicBool,
    pub(crate) udp_gso: AtomicBool,
    pub(crate) udp_gro: AtomicBool,
}

impl OffloadCells {
    pub(crate) fn read(&self) -> Offloads {
        Offloads {
            tun_tcp: self.tun_tcp.load(Ordering::Relaxed),
            tun_udp: self.tun_udp.load(Ordering::Relaxed),
            udp_gso: self.udp_gso.load(Ordering::Relaxed),
            udp_gro: self.udp_gro.load(Ordering::Relaxed),
        }
    }
}

macro_rules! counter_cells {
    ($($name:ident),* $(,)?) => {
        /// [`Counters`] while they count.
        #[derive(Debug, Default)]
        pub(crate) struct CounterCells { $(pub(crate) $name: AtomicU64),* }

        impl CounterCells {
            fn read(&self) -> Counters {
                Counters { $($name: self.$name.load(Ordering::Relaxed)),* }
            }
        }
    };
}

counter_cells!(
    tx_malformed,
    tx_no_peer,
    tx_no_endpoint,
    tx_socket_errors,
    rx_invalid,
    rx_wrong_source,
    rx_under_load,
    rx_handshakes_dropped,
    rx_interface_errors,
    rx_foreign,
    rx_virtual_dropped,
);

fn is_usable(endpoint: SocketAddr) -> bool {
    endpoint.port() != 0 && !endpoint.ip().is_unspecified() && !endpoint.ip().is_multicast()
}

/// Adds one.
pub(crate) fn count(cell: &AtomicU64) {
    cell.fetch_add(1, Ordering::Relaxed);
}

/// Adds `n`.
pub(crate) fn count_many(cell: &AtomicU64, n: usize) {
    cell.fetch_add(n as u64, Ordering::Relaxed);
}

fn greeting_delay(peers: usize) -> Duration {
    let crowd = peers.saturating_sub(GREETED_AT_ONCE) as u32;
    let spread = (GREETING_SPREAD_PER_PEER * crowd).min(GREETING_SPREAD_MAX);
    spread.mul_f64(rand::random_range(0.0..1.0))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
