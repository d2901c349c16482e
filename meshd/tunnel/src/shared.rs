//! What the threads of one engine share, and the calls that reach them.
//!
//! Locks are taken in the order control, registry, peer, and none is held across a system call.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::counters::CounterCells;
use crate::detour::{SinkCell, Waiting};
use crate::error::TunnelError;
use crate::event::{Queue, TunnelEvent};
use crate::identity::Identities;
use crate::key::{PrivateKey, PublicKey};
use crate::peer::{Notes, Peer};
use crate::quiescence::Quiescence;
use crate::registry::Registry;
use crate::udp::{Settings, Udp, UdpCell};
use crate::wake::Wake;

/// Handshake messages per second before cookies are asked for: with few peers, for each peer, and at most.
/// A whole fleet may come back within a second (each peer sends one message and answers one); what a
/// flood can take is one core, of the thread that answers handshakes.
const HANDSHAKES_PER_SECOND_MIN: u64 = 100;
pub(crate) const HANDSHAKES_PER_SECOND_PER_PEER: u64 = 2;
pub(crate) const HANDSHAKES_PER_SECOND_MAX: u64 = 4096;

/// What the threads and the calls share.
pub(crate) struct Shared {
    registry: RwLock<Registry>,
    identities: RwLock<Identities>,
    /// Serialises what changes peers, prefixes or keys.
    pub(crate) control: Mutex<()>,
    pub(crate) events: Arc<Queue>,
    pub(crate) counters: CounterCells,
    pub(crate) queues: Vec<QueueCells>,
    pub(crate) housekeeper: Wake,
    pub(crate) udp: UdpCell,
    /// Takes datagrams that are not WireGuard's.
    pub(crate) foreign: SinkCell,
    /// What came from virtual endpoints; for the first carrier.
    pub(crate) detoured: Waiting,
    /// Peers whose waiting packets may go; for the first carrier.
    ready: Mutex<Vec<Arc<Peer>>>,
    /// Peers that want a tick before the next one is due; for the housekeeper.
    urgent: Mutex<Vec<Arc<Peer>>>,
    /// Peers that have begun to use our second key; for the housekeeper.
    arrived: Mutex<Vec<PublicKey>>,
    /// Sockets that are asked for; for the housekeeper.
    pub(crate) to_bind: Mutex<Option<Binding>>,
    stop: AtomicBool,
}

/// A request for sockets, and who waits for them.
pub(crate) struct Binding {
    pub(crate) settings: Settings,
    pub(crate) answer: SyncSender<Result<Vec<Arc<Udp>>, TunnelError>>,
}

/// What wakes and watches the carrier of one queue.
pub(crate) struct QueueCells {
    pub(crate) wake: Wake,
    /// Whether it is inside a batch of what came in.
    pub(crate) quiescence: Quiescence,
}

impl QueueCells {
    fn new() -> std::io::Result<Self> {
        Ok(Self { wake: Wake::new()?, quiescence: Quiescence::default() })
    }
}

impl Shared {
    pub(crate) fn new(private_key: PrivateKey, queues: usize) -> std::io::Result<Self> {
        Ok(Self {
            registry: RwLock::new(Registry::new()),
            identities: RwLock::new(Identities::new(private_key, HANDSHAKES_PER_SECOND_MIN)),
            control: Mutex::default(),
            events: Arc::default(),
            counters: CounterCells::default(),
            queues: (0..queues).map(|_| QueueCells::new()).collect::<Result<_, _>>()?,
            housekeeper: Wake::new()?,
            udp: UdpCell::default(),
            foreign: SinkCell::default(),
            detoured: Waiting::default(),
            ready: Mutex::default(),
            urgent: Mutex::default(),
            arrived: Mutex::default(),
            to_bind: Mutex::default(),
            stop: AtomicBool::new(false),
        })
    }

    pub(crate) fn registry(&self) -> RwLockReadGuard<'_, Registry> {
        self.registry.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn registry_mut(&self) -> RwLockWriteGuard<'_, Registry> {
        self.registry.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn identities(&self) -> Identities {
        self.identities.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn set_identities(&self, identities: Identities) {
        *self.identities.write().unwrap_or_else(PoisonError::into_inner) = identities;
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
        self.wake_queues();
        self.housekeeper.wake();
    }

    pub(crate) fn wake_queues(&self) {
        self.queues.iter().for_each(|queue| queue.wake.wake());
    }

    /// Returns once no packet is on its way to the interface that was decrypted before the call.
    pub(crate) fn wait_for_batches(&self) {
        self.queues.iter().for_each(|queue| queue.quiescence.wait());
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
        if notes.twin_in_use {
            // The caller may hold up a call that has `control`; somebody else has to wait for that.
            lock(&self.arrived).push(key);
            self.housekeeper.wake();
        }
        if notes.backlog_ready {
            lock(&self.ready).push(peer.clone());
            self.queues[0].wake.wake();
        }
    }

    /// Peers whose waiting packets may go. Call after the wake-up was cleared.
    pub(crate) fn take_ready(&self) -> Vec<Arc<Peer>> {
        std::mem::take(&mut *lock(&self.ready))
    }

    pub(crate) fn take_urgent(&self) -> Vec<Arc<Peer>> {
        std::mem::take(&mut *lock(&self.urgent))
    }

    pub(crate) fn take_arrived(&self) -> Vec<PublicKey> {
        std::mem::take(&mut *lock(&self.arrived))
    }

    /// Binds the sockets that somebody waits for, if so.
    pub(crate) fn bind_if_asked(&self) {
        let Some(Binding { settings, answer }) = lock(&self.to_bind).take() else { return };
        // It fails only if nobody waits any more.
        let _ = answer.send(Udp::bind(&settings));
    }

    /// Sends through the second key of ours from now on, as the peer does.
    pub(crate) fn use_twin(&self, key: &PublicKey) {
        let _control = lock(&self.control);
        self.registry_mut().use_twin(key, true);
    }

    pub(crate) fn tick_soon(&self, peer: &Arc<Peer>) {
        let mut urgent = lock(&self.urgent);
        // A caller that asks again and again does not make the list grow.
        if !urgent.contains(peer) {
            urgent.push(peer.clone());
        }
        drop(urgent);
        self.housekeeper.wake();
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
