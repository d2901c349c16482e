//! WireGuard's configuration protocol on a Unix socket, so that `wg show` and `wg set` work.
//!
//! The protocol is described at <https://www.wireguard.com/xplatform/>. Who may change an interface may also
//! read its private and preshared keys, as `wg showconf` does; who may only read sees neither.

use std::fmt::Write as _;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ipnet::IpNet;
use nix::errno::Errno;
use nix::poll::{PollFd, PollTimeout};
use zeroize::Zeroizing;

use crate::config::PeerConfig;
use crate::error::TunnelError;
use crate::key::{PresharedKey, PrivateKey, PublicKey};
use crate::tunnel::{PeerStats, Tunnel};
use crate::wake::{self, READABLE, Wake};

/// Where `wg` looks for sockets.
const FOLDER: &str = "/var/run/wireguard";
/// Longest request, bytes: `wg setconf` with some ten thousand peers.
const REQUEST_BYTES_MAX: u64 = 4 << 20;
/// What a peer takes in an answer as a rule, bytes.
const PEER_TEXT_BYTES: usize = 512;
/// How long one client may keep the others waiting.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(3);

/// What a client of the socket may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UapiAccess {
    /// `wg show` without private and preshared keys; every `wg set` is refused.
    Read,
    /// All of `wg`: `show`, `showconf`, `set`, `setconf`, `addconf`, `syncconf`. Private and preshared keys are
    /// shown to whoever may open the socket, which is the same user.
    ReadWrite,
}

/// The socket of one interface. Goes away when dropped.
#[derive(Debug)]
pub struct Uapi {
    path: PathBuf,
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Stop {
    wake: Wake,
    asked: AtomicBool,
}

impl Uapi {
    /// Serves `/var/run/wireguard/NAME.sock`, for the same user only. Does not keep the tunnel open.
    ///
    /// # Errors
    /// [`TunnelError::System`] if the socket cannot be made, also because another process serves it.
    pub fn serve(tunnel: &Arc<dyn Tunnel>, access: UapiAccess) -> Result<Self, TunnelError> {
        let failed =
            |source| TunnelError::System { action: "serve the WireGuard configuration socket", source };
        let path = Path::new(FOLDER).join(format!("{}.sock", tunnel.name()));
        let listener = listen(&path).map_err(failed)?;
        let stop = Arc::new(Stop { wake: Wake::new().map_err(failed)?, asked: AtomicBool::new(false) });
        let server = Server { tunnel: Arc::downgrade(tunnel), access, listener, stop: stop.clone() };
        let thread =
            thread::Builder::new().name("wg-uapi".into()).spawn(move || server.run()).map_err(failed)?;
        Ok(Self { path, stop, thread: Some(thread) })
    }
}

impl Drop for Uapi {
    fn drop(&mut self) {
        self.stop.asked.store(true, Ordering::Release);
        self.stop.wake.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let _ = std::fs::remove_file(&self.path);
    }
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    std::fs::create_dir_all(FOLDER)?;
    std::fs::set_permissions(FOLDER, std::fs::Permissions::from_mode(0o700))?;
    // What a killed process left behind refuses connections; what serves does not.
    if matches!(UnixStream::connect(path), Err(error) if error.kind() == io::ErrorKind::ConnectionRefused) {
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

struct Server {
    tunnel: Weak<dyn Tunnel>,
    access: UapiAccess,
    listener: UnixListener,
    stop: Arc<Stop>,
}

impl Server {
    fn run(&self) {
        while !self.stop.asked.load(Ordering::Acquire) {
            let stop = PollFd::new(self.stop.wake.as_fd(), READABLE);
            let mut fds = [stop, PollFd::new(self.listener.as_fd(), READABLE)];
            if wake::wait(&mut fds, PollTimeout::NONE).is_err() {
                return;
            }
            if let Ok((client, _)) = self.listener.accept()
                && let Err(error) = self.client(&client)
            {
                tracing::debug!(%error, "configuration client");
            }
        }
    }

    /// Answers one client until it hangs up.
    fn client(&self, client: &UnixStream) -> io::Result<()> {
        client.set_nonblocking(false)?;
        client.set_read_timeout(Some(CLIENT_TIMEOUT))?;
        client.set_write_timeout(Some(CLIENT_TIMEOUT))?;
        let mut lines = BufReader::new(client.take(REQUEST_BYTES_MAX));
        while let Some(request) = request(&mut lines)? {
            let Some(tunnel) = self.tunnel.upgrade() else { return Ok(()) };
            let answer: Zeroizing<String> = match request.first().map(|line| line.as_str()) {
                Some("get=1") if request.len() == 1 => get(&*tunnel, self.access),
                Some("set=1") if self.access == UapiAccess::Read => errno(Errno::EPERM).into(),
                Some("set=1") => match set(&*tunnel, &request[1..]) {
                    Ok(()) => String::from("errno=0\n\n").into(),
                    Err(error) => errno(error).into(),
                },
                _ => errno(Errno::EPROTO).into(),
            };
            (&*client).write_all(answer.as_bytes())?;
        }
        Ok(())
    }
}

/// Lines up to an empty one; `None` at the end.
fn request(lines: &mut impl BufRead) -> io::Result<Option<Vec<Zeroizing<String>>>> {
    let mut request = Vec::new();
    loop {
        let mut line = Zeroizing::new(String::new());
        if lines.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        if line.trim_end().is_empty() {
            return Ok(Some(request));
        }
        request.push(Zeroizing::new(line.trim_end().to_owned()));
    }
}

fn errno(error: Errno) -> String {
    format!("errno={}\n\n", -(error as i32))
}

fn get(tunnel: &dyn Tunnel, access: UapiAccess) -> Zeroizing<String> {
    let peers = tunnel.peers();
    // Enough to begin with, so that growing leaves no copies of keys behind.
    let mut text = Zeroizing::new(String::with_capacity(PEER_TEXT_BYTES * (peers.len() + 1)));
    if let Some(key) = tunnel.private_key().filter(|_| access == UapiAccess::ReadWrite) {
        show_secret(&mut text, "private_key", &key.to_bytes());
    }
    show(&mut text, "listen_port", &tunnel.listen_port());
    if let Some(mark) = tunnel.fwmark() {
        show(&mut text, "fwmark", &mark);
    }
    for stats in peers {
        if let Some(config) = tunnel.peer(&stats.public_key) {
            show_peer(&mut text, &stats, &config, access);
        }
    }
    text.push_str("errno=0\n\n");
    text
}

fn show(text: &mut String, key: &str, value: &dyn std::fmt::Display) {
    writeln!(text, "{key}={value}").expect("writing to a String cannot fail");
}

fn show_secret(text: &mut String, key: &str, secret: &[u8; 32]) {
    show(text, key, &*Zeroizing::new(hex(secret)));
}

fn show_peer(text: &mut String, stats: &PeerStats, config: &PeerConfig, access: UapiAccess) {
    show(text, "public_key", &hex(&stats.public_key.0));
    if let Some(key) = config.preshared_key.as_ref().filter(|_| access == UapiAccess::ReadWrite) {
        show_secret(text, "preshared_key", &key.to_bytes());
    }
    let mut line = |key: &str, value: &dyn std::fmt::Display| show(text, key, value);
    line("protocol_version", &1);
    if let Some(endpoint) = stats.endpoint {
        line("endpoint", &endpoint);
    }
    if let Some(age) = stats.last_handshake {
        let at = SystemTime::now().checked_sub(age).and_then(|at| at.duration_since(UNIX_EPOCH).ok());
        let at = at.unwrap_or_default();
        line("last_handshake_time_sec", &at.as_secs());
        line("last_handshake_time_nsec", &at.subsec_nanos());
    }
    line("tx_bytes", &stats.tx_bytes);
    line("rx_bytes", &stats.rx_bytes);
    line("persistent_keepalive_interval", &config.keepalive().map_or(0, |interval| interval.as_secs()));
    for prefix in &config.allowed_ips {
        line("allowed_ip", &prefix.trunc());
    }
}

/// Applies the lines after `set=1`, one after the other, as they stand. Up to the first that fails.
fn set(tunnel: &dyn Tunnel, lines: &[Zeroizing<String>]) -> Result<(), Errno> {
    let mut change: Option<Change> = None;
    for line in lines {
        let (key, value) = line.split_once('=').ok_or(Errno::EINVAL)?;
        match (key, &mut change) {
            ("public_key", _) => {
                if let Some(done) = change.take() {
                    done.apply(tunnel)?;
                }
                change = Some(Change::begin(
                    tunnel,
                    PublicKey::checked(*unhex(value)?).map_err(|_| Errno::EINVAL)?,
                ));
            }
            (_, Some(change)) => change.line(key, value)?,
            (_, None) => set_interface(tunnel, key, value)?,
        }
    }
    change.map_or(Ok(()), |last| last.apply(tunnel))
}

fn set_interface(tunnel: &dyn Tunnel, key: &str, value: &str) -> Result<(), Errno> {
    match (key, value) {
        ("private_key", _) => {
            let bytes = unhex(value)?;
            if *bytes == [0; 32] {
                // "No key": an interface that can talk to nobody. We always have one.
                return Err(Errno::EOPNOTSUPP);
            }
            let private_key = PrivateKey::from_bytes(*bytes);
            if private_key.public() != tunnel.public_key() {
                tunnel.rotate_key(private_key).map_err(|error| code(&error))?;
            }
        }
        ("listen_port", _) => {
            let port = value.parse().map_err(|_| Errno::EINVAL)?;
            tunnel.set_listen_port(port).map_err(|error| code(&error))?;
        }
        ("fwmark", _) => {
            let mark = if value.is_empty() { 0 } else { number(value)? };
            tunnel.set_fwmark(Some(mark)).map_err(|error| code(&error))?;
        }
        ("replace_peers", "true") => {
            for peer in tunnel.peers() {
                tunnel.remove_peer(&peer.public_key);
            }
        }
        _ => return Err(Errno::EINVAL),
    }
    Ok(())
}

/// What is asked for one peer.
struct Change {
    config: PeerConfig,
    known: bool,
    remove: bool,
    update_only: bool,
}

impl Change {
    fn begin(tunnel: &dyn Tunnel, public_key: PublicKey) -> Self {
        let known = tunnel.peer(&public_key);
        let is_known = known.is_some();
        let config = known.unwrap_or_else(|| PeerConfig {
            public_key,
            preshared_key: None,
            endpoint: None,
            allowed_ips: Vec::new(),
            persistent_keepalive: None,
        });
        Self { config, known: is_known, remove: false, update_only: false }
    }

    fn line(&mut self, key: &str, value: &str) -> Result<(), Errno> {
        match (key, value) {
            ("remove", "true") => self.remove = true,
            ("update_only", "true") => self.update_only = true,
            ("protocol_version", "1") => {}
            ("replace_allowed_ips", "true") => self.config.allowed_ips.clear(),
            ("preshared_key", _) => {
                let bytes = unhex(value)?;
                self.config.preshared_key = (*bytes != [0; 32]).then(|| PresharedKey::from_bytes(*bytes));
            }
            ("endpoint", _) => {
                let endpoint: SocketAddr = value.parse().map_err(|_| Errno::EINVAL)?;
                self.config.endpoint = Some(endpoint);
            }
            ("persistent_keepalive_interval", _) => {
                let secs: u16 = value.parse().map_err(|_| Errno::EINVAL)?;
                self.config.persistent_keepalive = Some(Duration::from_secs(secs.into()));
            }
            ("allowed_ip", _) => self.allowed_ip(value)?,
            _ => return Err(Errno::EINVAL),
        }
        Ok(())
    }

    /// `+` before a prefix adds it, as nothing does; `-` takes it away.
    fn allowed_ip(&mut self, value: &str) -> Result<(), Errno> {
        let (remove, text) = match value.split_at_checked(1) {
            Some(("-", rest)) => (true, rest),
            Some(("+", rest)) => (false, rest),
            _ => (false, value),
        };
        let prefix: IpNet = text.parse().map_err(|_| Errno::EINVAL)?;
        self.config.allowed_ips.retain(|known| known.trunc() != prefix.trunc());
        if !remove {
            self.config.allowed_ips.push(prefix.trunc());
        }
        Ok(())
    }

    fn apply(self, tunnel: &dyn Tunnel) -> Result<(), Errno> {
        if self.remove {
            tunnel.remove_peer(&self.config.public_key);
        } else if self.known || !self.update_only {
            self.take_over(tunnel)?;
        }
        Ok(())
    }

    /// Prefixes that other peers have move to this one, as `wg` expects.
    fn take_over(self, tunnel: &dyn Tunnel) -> Result<(), Errno> {
        loop {
            match tunnel.set_peer(self.config.clone()) {
                Err(TunnelError::AllowedIpsOverlap { owner, prefix, .. }) => {
                    let Some(mut other) = tunnel.peer(&owner) else { continue };
                    other.allowed_ips.retain(|own| own.trunc() != prefix);
                    tunnel.set_peer(other).map_err(|error| code(&error))?;
                }
                result => return result.map_err(|error| code(&error)),
            }
        }
    }
}

fn code(error: &TunnelError) -> Errno {
    match error {
        TunnelError::AllowedIpsOverlap { .. } => Errno::EEXIST,
        TunnelError::PortInUse { .. } => Errno::EADDRINUSE,
        TunnelError::SocketRights { .. } => Errno::EACCES,
        TunnelError::Unsupported { .. } => Errno::EOPNOTSUPP,
        TunnelError::TooManyPeers | TunnelError::TooManyAllowedIps { .. } => Errno::ENOSPC,
        TunnelError::Closed => Errno::ENODEV,
        _ => Errno::EINVAL,
    }
}

/// A number as `wg` writes marks: decimal, or hexadecimal after `0x`.
fn number(text: &str) -> Result<u32, Errno> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| Errno::EINVAL)
}

fn hex(bytes: &[u8; 32]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Result<Zeroizing<[u8; 32]>, Errno> {
    let mut bytes = Zeroizing::new([0; 32]);
    if text.len() != 64 || !text.is_ascii() {
        return Err(Errno::EINVAL);
    }
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        let digit = |c: u8| char::from(c).to_digit(16).ok_or(Errno::EINVAL);
        *byte = (digit(pair[0])? << 4 | digit(pair[1])?) as u8;
    }
    Ok(bytes)
}
