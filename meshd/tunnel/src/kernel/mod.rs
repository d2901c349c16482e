//! The kernel's own WireGuard behind the same interface as the userspace engine.
//!
//! The kernel tells nothing by itself: one thread asks once a second and compares. What the kernel cannot
//! do is said at [`Tunnel`]: it begins no handshake beside a session in use. What it does otherwise, this
//! module undoes: it would move a prefix from one peer to another without a word, keep sessions across a
//! change of keys, and keep the interface when its process dies.

mod device;
mod link;
mod netlink;
mod owner;
mod table;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use netlink_packet_wireguard::WireguardAttribute;
use nix::errno::Errno;

use self::device::Device;
use self::link::{Link, Links, errno};
use self::owner::Owner;
use self::table::{Greeting, Table, Update};
use crate::config::{PeerConfig, TunnelConfig};
use crate::error::TunnelError;
use crate::event::{Events, Queue, TunnelEvent};
use crate::key::{PrivateKey, PublicKey};
use crate::tunnel::{BackendInfo, BackendKind, Counters, Offloads, PeerStats, Tunnel};

/// How often the kernel is asked what its peers do.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// The kernel may fail to answer so often before the tunnel counts as broken: memory may be short.
const POLL_FAILURES_MAX: u32 = 10;
/// Ports tried for one that is free in both families.
const PORT_ATTEMPTS: usize = 16;

/// Why the kernel's WireGuard does not carry the interface.
#[derive(Debug)]
pub(crate) enum OpenError {
    /// It is not there or not for us; the text says why.
    Absent(String),
    /// Another engine would fail as well.
    Other(TunnelError),
}

impl From<TunnelError> for OpenError {
    fn from(error: TunnelError) -> Self {
        Self::Other(error)
    }
}

/// Removes the interface `name` if a process of ours died and left it behind. What does not work here
/// shows when the interface is made.
pub(crate) fn remove_abandoned(name: &str) {
    let removed = Links::open().and_then(|mut links| owner::remove_abandoned(&mut links, name));
    match removed {
        Ok(true) => tracing::info!(interface = name, "removed an interface that a dead process left behind"),
        Ok(false) => {}
        Err(error) => tracing::debug!(interface = name, %error, "cannot look for an abandoned interface"),
    }
}

/// The kernel's engine behind [`Tunnel`].
pub(crate) struct Kernel {
    name: String,
    shared: Arc<Shared>,
    poller: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    name: String,
    index: u32,
    events: Arc<Queue>,
    control: Mutex<Control>,
    /// Wakes the poller at the end.
    ended: Condvar,
}

/// Everything that changes, under one lock: what the kernel is told and what is remembered of it agree.
struct Control {
    links: Links,
    device: Device,
    table: Table,
    port: u16,
    fwmark: u32,
    stopped: bool,
    /// Given back at the end.
    owner: Option<Owner>,
}

impl Kernel {
    pub(crate) fn open(config: &TunnelConfig) -> Result<Self, OpenError> {
        config.check()?;
        let system = |action| move |source| OpenError::Other(TunnelError::System { action, source });
        let mut links = Links::open().map_err(system("open a netlink socket"))?;
        let owner = Owner::new().map_err(system("make a socket"))?;
        let name = links
            .create(&config.interface, config.mtu)
            .map_err(|error| not_made(&config.interface, error))?;
        let made = Self::start(links, owner, name.clone(), config);
        if made.is_err() {
            // The interface that was made goes again, whatever failed.
            remove(&name);
        }
        made
    }

    fn start(mut links: Links, owner: Owner, name: String, config: &TunnelConfig) -> Result<Self, OpenError> {
        let failed = |action| {
            let name = name.clone();
            move |source| OpenError::Other(TunnelError::Interface { name, action, source })
        };
        let Link { index, .. } = links
            .find(&name)
            .and_then(|link| link.ok_or_else(|| Errno::ENODEV.into()))
            .map_err(failed("find"))?;
        links.set_alias(index, owner.alias()).map_err(failed("mark"))?;
        let mut device = match Device::open(index) {
            Err(error) if errno(&error) == Some(Errno::ENOENT) => {
                return Err(OpenError::Absent(
                    "this kernel's WireGuard does not speak generic netlink".into(),
                ));
            }
            result => result.map_err(failed("open a netlink socket"))?,
        };
        let fwmark = config.fwmark.unwrap_or(0);
        device
            .set(device::interface(&config.private_key, config.listen_port, fwmark))
            .map_err(failed("set key and port"))?;
        bring_up(&mut links, index, &name, config.listen_port)?;
        let port = device.get().map_err(failed("read"))?.port;
        let table = Table::new(config.private_key.public(), Instant::now());
        let control = Control { links, device, table, port, fwmark, stopped: false, owner: Some(owner) };
        let shared = Arc::new(Shared {
            name: name.clone(),
            index,
            events: Arc::default(),
            control: Mutex::new(control),
            ended: Condvar::new(),
        });
        let poller = thread::Builder::new()
            .name("wg-kernel".into())
            .spawn({
                let shared = shared.clone();
                move || shared.poll()
            })
            .map_err(|source| TunnelError::System { action: "start a thread", source })?;
        Ok(Self { name, shared, poller: Mutex::new(Some(poller)) })
    }

    fn change(&self) -> Result<MutexGuard<'_, Control>, TunnelError> {
        let control = self.shared.lock();
        if control.stopped { Err(TunnelError::Closed) } else { Ok(control) }
    }

    fn failed(&self, action: &'static str) -> impl FnOnce(io::Error) -> TunnelError + '_ {
        move |source| TunnelError::Interface { name: self.name.clone(), action, source }
    }

    /// Carries messages out. When one fails the interface is not what it should be: the tunnel ends.
    fn carry_out(
        &self,
        control: &mut Control,
        action: &'static str,
        messages: Vec<Vec<WireguardAttribute>>,
    ) -> Result<(), TunnelError> {
        for message in messages {
            if let Err(source) = control.device.set(message) {
                let name = self.name.clone();
                let error = TunnelError::Interface { name, action, source };
                self.shared.stop(control, Some(with_source(&error)));
                return Err(error);
            }
        }
        Ok(())
    }
}

impl Tunnel for Kernel {
    fn name(&self) -> &str {
        &self.name
    }

    fn backend(&self) -> BackendInfo {
        BackendInfo { kind: BackendKind::Kernel, offloads: Offloads::NONE, why_not_kernel: None }
    }

    fn listen_port(&self) -> u16 {
        self.shared.lock().port
    }

    fn set_listen_port(&self, port: u16) -> Result<u16, TunnelError> {
        let mut control = self.change()?;
        match control.device.set(vec![WireguardAttribute::ListenPort(port)]) {
            Err(error) if errno(&error) == Some(Errno::EADDRINUSE) => {
                return Err(TunnelError::PortInUse { port });
            }
            result => result.map_err(self.failed("change the port"))?,
        }
        control.port = control.device.get().map_err(self.failed("read"))?.port;
        Ok(control.port)
    }

    fn fwmark(&self) -> Option<u32> {
        Some(self.shared.lock().fwmark).filter(|mark| *mark != 0)
    }

    fn set_fwmark(&self, mark: Option<u32>) -> Result<(), TunnelError> {
        let mut control = self.change()?;
        let mark = mark.unwrap_or(0);
        let change = vec![WireguardAttribute::Fwmark(mark)];
        control.device.set(change).map_err(self.failed("change the mark"))?;
        control.fwmark = mark;
        Ok(())
    }

    fn public_key(&self) -> PublicKey {
        self.shared.lock().table.own()
    }

    fn set_peer(&self, config: PeerConfig) -> Result<(), TunnelError> {
        let config = PeerConfig { endpoint: config.endpoint.map(canonical), ..config };
        let mut control = self.change()?;
        let update = control.table.check(&config)?;
        let endpoint = control.table.endpoint_for(&config);
        let known = control.table.get(&config.public_key);
        let messages = match (update, known) {
            (Update::Change, Some(known)) => device::change_peer(&known.config, &config, nobody()),
            (_, known) => {
                let was_up = known.is_some_and(|known| known.has_session(Instant::now()));
                device::create_peer(&config, endpoint, was_up && endpoint.is_some())
            }
        };
        self.carry_out(&mut control, "set a peer", messages)?;
        control.table.insert(config, update);
        Ok(())
    }

    fn remove_peer(&self, key: &PublicKey) -> bool {
        let Ok(mut control) = self.change() else { return false };
        if !control.table.remove(key) {
            return false;
        }
        // If the kernel does not obey, the tunnel has ended: no packet of the peer gets through either way.
        let _ = self.carry_out(&mut control, "remove a peer", vec![device::remove_peer(*key)]);
        true
    }

    fn set_endpoint(&self, key: &PublicKey, endpoint: SocketAddr) -> bool {
        let usable = endpoint.port() != 0 && !endpoint.ip().is_unspecified() && !endpoint.ip().is_multicast();
        let Ok(mut control) = self.change() else { return false };
        let endpoint = canonical(endpoint);
        match control.table.get(key).filter(|_| usable) {
            None => false,
            Some(known) if known.endpoint == Some(endpoint) => true,
            Some(_) => {
                let message = vec![device::set_endpoint(*key, endpoint)];
                let done = self.carry_out(&mut control, "set an endpoint", message).is_ok();
                if done {
                    control.table.set_endpoint(key, endpoint);
                }
                done
            }
        }
    }

    fn rotate_key(&self, private_key: PrivateKey) -> Result<(), TunnelError> {
        let mut control = self.change()?;
        let (public, now) = (private_key.public(), Instant::now());
        if control.table.get(&public).is_some() {
            return Err(TunnelError::OwnKey { peer: public });
        }
        let peers = control.table.all().flat_map(|known| {
            let greet = known.has_session(now) && known.endpoint.is_some();
            device::create_peer(&known.config, known.endpoint, greet)
        });
        let messages = std::iter::once(device::identity(&private_key)).chain(peers).collect();
        self.carry_out(&mut control, "change the key", messages)?;
        control.table.set_own(public);
        Ok(())
    }

    fn hand_over(&self, from: &PublicKey, to: &PublicKey) -> Result<(), TunnelError> {
        let mut control = self.change()?;
        let config = |key: &PublicKey| {
            let known = control.table.get(key).ok_or(TunnelError::UnknownPeer { peer: *key })?;
            Ok::<_, TunnelError>(known.config.clone())
        };
        let (old, had) = (config(from)?, config(to)?);
        if from == to {
            return Ok(());
        }
        let allowed_ips = [had.allowed_ips.as_slice(), &old.allowed_ips].concat();
        let new = PeerConfig { allowed_ips, ..had.clone() };
        new.check()?;
        // A prefix that is given to one peer is taken from the other in the same step. The greeting shows the
        // other side at once that we have changed over; until it comes, what it sends by the old key is refused.
        let mut messages = device::change_peer(&had, &new, nobody());
        messages.push(device::greeting(&new));
        self.carry_out(&mut control, "hand addresses over", messages)?;
        control.table.insert(PeerConfig { allowed_ips: Vec::new(), ..old }, Update::Change);
        control.table.insert(new, Update::Change);
        Ok(())
    }

    fn initiate_handshake(&self, key: &PublicKey) -> bool {
        let Ok(mut control) = self.change() else { return false };
        let now = Instant::now();
        match (control.table.greeting(key, now), control.table.get(key)) {
            (Greeting::Now(endpoint), Some(known)) => {
                let messages = device::create_peer(&known.config, Some(endpoint), true);
                let done = self.carry_out(&mut control, "greet a peer", messages).is_ok();
                control.table.greeted(key, now);
                done
            }
            (Greeting::UnderWay, _) => true,
            _ => false,
        }
    }

    fn peer(&self, key: &PublicKey) -> Option<PeerConfig> {
        self.shared.lock().table.get(key).map(|known| known.config.clone())
    }

    fn peers(&self) -> Vec<PeerStats> {
        let mut control = self.shared.lock();
        // What fails here fails for the poller as well, which then says so.
        let _ = self.shared.look(&mut control);
        control.table.stats(Instant::now())
    }

    /// The kernel counts in fewer classes: what it calls a frame error is an inner source that is not the
    /// peer's.
    fn counters(&self) -> Counters {
        let mut control = self.shared.lock();
        let Ok(Some(Link { errors, .. })) = control.links.by_index(self.shared.index) else {
            return Counters::default();
        };
        Counters {
            tx_no_peer: errors.tx,
            tx_no_endpoint: errors.tx_dropped,
            rx_invalid: errors.rx.saturating_sub(errors.rx_frame),
            rx_wrong_source: errors.rx_frame,
            ..Counters::default()
        }
    }

    fn events(&self) -> Events {
        self.shared.events.reader()
    }

    fn close(&self) {
        self.shared.stop(&mut self.shared.lock(), None);
        if let Some(poller) = self.poller.lock().unwrap_or_else(PoisonError::into_inner).take() {
            let _ = poller.join();
        }
        self.shared.events.close();
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        self.close();
    }
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kernel").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the kernel until the tunnel ends.
    fn poll(&self) {
        let mut failures = 0;
        let mut control = self.lock();
        loop {
            let still = |control: &mut Control| !control.stopped;
            control = self
                .ended
                .wait_timeout_while(control, POLL_INTERVAL, still)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
            if control.stopped {
                return;
            }
            match self.look(&mut control) {
                Ok(()) => failures = 0,
                Err(error) if errno(&error) == Some(Errno::ENODEV) => {
                    return self.stop(&mut control, Some(format!("interface {} is gone", self.name)));
                }
                Err(error) => {
                    failures += 1;
                    tracing::warn!(interface = %self.name, %error, "the kernel does not tell of its peers");
                    if failures == POLL_FAILURES_MAX {
                        let why = format!("the kernel does not tell of the peers of {}: {error}", self.name);
                        return self.stop(&mut control, Some(why));
                    }
                }
            }
        }
    }

    /// Asks the kernel once and reports what is new.
    fn look(&self, control: &mut Control) -> io::Result<()> {
        if control.stopped {
            return Ok(());
        }
        let snapshot = control.device.get()?;
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        for event in control.table.observe(&snapshot, Instant::now(), wall) {
            match &event {
                TunnelEvent::HandshakeDone { peer } => tracing::debug!(%peer, "handshake done"),
                TunnelEvent::EndpointChanged { peer, from } => {
                    tracing::info!(%peer, endpoint = %from, "endpoint changed");
                }
                TunnelEvent::PeerSilent { peer } => tracing::info!(%peer, "peer silent"),
                _ => {}
            }
            self.events.push(event);
        }
        Ok(())
    }

    /// Ends the tunnel and takes the interface away. Only the first reason is reported.
    fn stop(&self, control: &mut Control, error: Option<String>) {
        if std::mem::replace(&mut control.stopped, true) {
            return;
        }
        match &error {
            Some(error) => tracing::error!(%error, "tunnel stopped"),
            None => tracing::debug!("tunnel closed"),
        }
        if let Err(error) = control.links.delete(self.index) {
            tracing::error!(interface = %self.name, %error, "the interface stays");
        }
        control.owner = None;
        self.events.push(TunnelEvent::Stopped { error });
        self.ended.notify_all();
    }
}

/// Why the interface could not be made.
fn not_made(name: &str, error: io::Error) -> OpenError {
    match errno(&error) {
        Some(Errno::EOPNOTSUPP | Errno::ENODEV | Errno::EPROTONOSUPPORT | Errno::EAFNOSUPPORT) => {
            OpenError::Absent(format!("this kernel has no module `wireguard` ({error})"))
        }
        Some(Errno::EPERM | Errno::EACCES) => {
            OpenError::Other(TunnelError::NoRights { name: name.to_owned() })
        }
        Some(Errno::EEXIST) => OpenError::Other(TunnelError::InterfaceBusy { name: name.to_owned() }),
        _ => OpenError::Absent(format!("the kernel does not make the interface ({error})")),
    }
}

/// The kernel takes the port when the interface comes up. Asked for none, it draws one, and draws again if
/// that is taken in the other family.
fn bring_up(links: &mut Links, index: u32, name: &str, port: u16) -> Result<(), TunnelError> {
    for _ in 0..PORT_ATTEMPTS {
        match links.set_up(index) {
            Err(error) if errno(&error) == Some(Errno::EADDRINUSE) && port == 0 => {}
            Err(error) if errno(&error) == Some(Errno::EADDRINUSE) => {
                return Err(TunnelError::PortInUse { port });
            }
            result => {
                return result.map_err(|source| TunnelError::Interface {
                    name: name.to_owned(),
                    action: "bring up",
                    source,
                });
            }
        }
    }
    Err(TunnelError::PortInUse { port })
}

fn remove(name: &str) {
    let gone = Links::open().and_then(|mut links| match links.find(name)? {
        Some(link) => links.delete(link.index),
        None => Ok(()),
    });
    if let Err(error) = gone {
        tracing::error!(interface = name, %error, "the interface stays");
    }
}

/// An IPv4 address as such, not within IPv6: the kernel has a socket for each.
fn canonical(endpoint: SocketAddr) -> SocketAddr {
    match endpoint.ip().to_canonical() {
        ip if ip == endpoint.ip() => endpoint,
        ip => SocketAddr::new(ip, endpoint.port()),
    }
}

/// A key whose private half is thrown away.
fn nobody() -> PublicKey {
    PrivateKey::from_bytes(rand::random()).public()
}

fn with_source(error: &TunnelError) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}
