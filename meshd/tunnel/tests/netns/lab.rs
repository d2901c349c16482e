//! Namespaces, a veth pair between two of them, engines inside, and waiting with a deadline.

use std::fs::File;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::process::{Command, Output};
use std::thread;
use std::time::{Duration, Instant};

use mesh_tunnel::{
    Backend, Events, Offloads, PeerConfig, PeerStats, PrivateKey, PublicKey, Tunnel, TunnelBuilder,
    TunnelEvent,
};
use nix::sched::{CloneFlags, setns};

/// Longest wait for anything that ought to happen.
pub(crate) const DEADLINE: Duration = Duration::from_secs(45);
/// A test that takes longer than this has hung.
pub(crate) const WATCHDOG: Duration = Duration::from_secs(120);
const INSIDE: &str = "MESH_TUNNEL_INSIDE_NAMESPACE";

/// Declares tests that run inside namespaces of their own.
macro_rules! netns_tests {
    ($($(#[$attr:meta])* fn $name:ident() $body:block)*) => { $(
        $(#[$attr])*
        #[test]
        fn $name() {
            let path = concat!(module_path!(), "::", stringify!($name));
            $crate::lab::in_namespaces(path, $crate::lab::WATCHDOG, || $body);
        }
    )* };
}

/// Runs `body` in namespaces of its own; `path` is the test's own, `limit` when it counts as hung.
pub(crate) fn in_namespaces(path: &str, limit: Duration, body: impl FnOnce()) {
    if std::env::var_os(INSIDE).is_some() {
        thread::spawn(move || {
            thread::park_timeout(limit);
            eprintln!("test ran into the watchdog");
            std::process::exit(101);
        });
        run("mount", &["-t", "tmpfs", "tmpfs", "/run"]);
        body();
        return;
    }
    let name = path.split_once("::").map_or(path, |(_, rest)| rest);
    let mut child = Command::new("unshare");
    child.args(["-Urnm", "--"]).arg(std::env::current_exe().unwrap());
    child.args(["--exact", name, "--nocapture", "--test-threads=1", "--include-ignored"]).env(INSIDE, "1");
    let output = child.output().expect("unshare (util-linux) must be installed");
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(
        output.status.success() && text.contains("1 passed"),
        "in namespaces: {}\n{text}\n(if user namespaces are denied here: `sysctl kernel.unprivileged_userns_clone=1`, \
         `sysctl kernel.apparmor_restrict_unprivileged_userns=0`, or run as root)",
        output.status
    );
}

/// Runs a program that must succeed.
pub(crate) fn run(program: &str, args: &[&str]) -> Output {
    let output = Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|error| panic!("{program} must be installed: {error}"));
    let shown = || String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        output.status.success(),
        "{program} {args:?}: {}{}",
        shown(),
        String::from_utf8_lossy(&output.stdout)
    );
    output
}

/// Waits until `probe` gives something.
pub(crate) fn eventually<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + DEADLINE;
    loop {
        if let Some(value) = probe() {
            return value;
        }
        assert!(Instant::now() < end, "timed out: {what}");
        thread::park_timeout(Duration::from_millis(2));
    }
}

/// A network namespace.
#[derive(Debug)]
pub(crate) struct Namespace {
    pub(crate) name: &'static str,
    file: File,
}

impl Namespace {
    pub(crate) fn new(name: &'static str) -> Self {
        run("ip", &["netns", "add", name]);
        let file = File::open(format!("/run/netns/{name}")).unwrap();
        let namespace = Self { name, file };
        namespace.ip("link set lo up");
        namespace
    }

    /// Runs `f` in the namespace; sockets, threads and processes that it makes belong there.
    pub(crate) fn run<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        let body = || {
            setns(&self.file, CloneFlags::CLONE_NEWNET).unwrap();
            f()
        };
        thread::scope(|scope| scope.spawn(body).join())
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    pub(crate) fn ip(&self, command: &str) -> String {
        let mut args = vec!["-n", self.name];
        args.extend(command.split_whitespace());
        String::from_utf8(run("ip", &args).stdout).unwrap()
    }

    pub(crate) fn run_program(&self, program: &str, args: &[&str]) -> Output {
        self.run(|| run(program, args))
    }

    pub(crate) fn ping(&self, to: IpAddr) {
        self.run_program("ping", &["-c", "3", "-i", "0.2", "-W", "5", &to.to_string()]);
    }

    pub(crate) fn udp(&self, address: SocketAddr) -> UdpSocket {
        let socket = self.run(|| UdpSocket::bind(address)).unwrap_or_else(|e| panic!("bind {address}: {e}"));
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        socket
    }

    /// Packets the interface has received, that is, the tunnel has let through.
    pub(crate) fn received_packets(&self, interface: &str) -> u64 {
        let table = self.run(|| std::fs::read_to_string("/proc/thread-self/net/dev")).unwrap();
        let line = table.lines().find_map(|line| line.trim().strip_prefix(&format!("{interface}:"))).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

/// One end: a namespace with an engine in it.
pub(crate) struct End {
    pub(crate) namespace: Namespace,
    pub(crate) tunnel: Box<dyn Tunnel>,
    pub(crate) events: Events,
    /// Underlay addresses.
    pub(crate) outer4: IpAddr,
    pub(crate) outer6: IpAddr,
    /// Addresses inside the tunnel.
    pub(crate) inner4: IpAddr,
    pub(crate) inner6: IpAddr,
}

pub(crate) const MTU: u16 = 1420;

pub(crate) fn key(byte: u8) -> PrivateKey {
    PrivateKey::from_bytes([byte; 32])
}

pub(crate) fn open_as(private_key: PrivateKey, offloads: Offloads) -> Box<dyn Tunnel> {
    TunnelBuilder::new("wg0", private_key).mtu(MTU).offloads(offloads).open().unwrap()
}

impl End {
    pub(crate) fn new(namespace: Namespace, number: u8, offloads: Offloads) -> Self {
        Self::built(namespace, number, |builder| builder.offloads(offloads))
    }

    /// An end on the engine that is asked for.
    pub(crate) fn on(namespace: Namespace, number: u8, backend: Backend) -> Self {
        Self::built(namespace, number, |builder| builder.backend(backend))
    }

    /// An end that is opened as `change` says.
    pub(crate) fn built(
        namespace: Namespace,
        number: u8,
        change: impl FnOnce(TunnelBuilder) -> TunnelBuilder,
    ) -> Self {
        let builder = change(TunnelBuilder::new("wg0", key(number)).mtu(MTU));
        let tunnel = namespace.run(|| builder.open()).unwrap();
        let address = |text: String| -> IpAddr { text.parse().unwrap() };
        let end = Self {
            events: tunnel.events(),
            tunnel,
            outer4: address(format!("10.213.0.{number}")),
            outer6: address(format!("fd13::{number}")),
            inner4: address(format!("10.214.0.{number}")),
            inner6: address(format!("fd14::{number}")),
            namespace,
        };
        end.namespace.ip(&format!("addr add {}/24 dev wg0", end.inner4));
        end.namespace.ip(&format!("addr add {}/64 dev wg0", end.inner6));
        end
    }

    pub(crate) fn key(&self) -> PublicKey {
        self.tunnel.public_key()
    }

    pub(crate) fn endpoint4(&self) -> SocketAddr {
        (self.outer4, self.tunnel.listen_port()).into()
    }

    pub(crate) fn endpoint6(&self) -> SocketAddr {
        (self.outer6, self.tunnel.listen_port()).into()
    }

    /// How another end sees this one.
    pub(crate) fn as_peer(&self, endpoint: Option<SocketAddr>) -> PeerConfig {
        PeerConfig {
            public_key: self.key(),
            preshared_key: None,
            endpoint,
            allowed_ips: vec![self.inner4.into(), self.inner6.into()],
            persistent_keepalive: None,
        }
    }

    pub(crate) fn stats(&self, peer: &End) -> PeerStats {
        self.tunnel.peers().into_iter().find(|stats| stats.public_key == peer.key()).expect("peer is known")
    }

    /// A UDP socket on this end's inner IPv4 address.
    pub(crate) fn inner_udp(&self) -> UdpSocket {
        self.namespace.udp((self.inner4, 0).into())
    }

    pub(crate) fn expect_event(&self, wanted: impl Fn(&TunnelEvent) -> bool) -> TunnelEvent {
        eventually("event", || self.events.try_recv().filter(|event| wanted(event)))
    }
}

/// Two ends on one veth pair that do not know each other yet.
pub(crate) fn two_ends() -> (End, End) {
    let (a, b) = two_namespaces();
    (End::new(a, 1, Offloads::ALL), End::new(b, 2, Offloads::ALL))
}

pub(crate) fn two_namespaces() -> (Namespace, Namespace) {
    let (a, b) = (Namespace::new("a"), Namespace::new("b"));
    run("ip", &["link", "add", "veth0", "netns", "a", "type", "veth", "peer", "name", "veth0", "netns", "b"]);
    for (namespace, number) in [(&a, 1), (&b, 2)] {
        namespace.ip(&format!("addr add 10.213.0.{number}/24 dev veth0"));
        namespace.ip(&format!("addr add fd13::{number}/64 dev veth0 nodad"));
        namespace.ip("link set veth0 up");
    }
    (a, b)
}

/// Two ends that know each other; `a` knows where `b` is.
pub(crate) fn two_peers() -> (End, End) {
    let (a, b) = two_ends();
    introduce(&a, &b, b.endpoint4());
    (a, b)
}

/// Tells two ends of each other; `a` learns where `b` is.
pub(crate) fn introduce(a: &End, b: &End, endpoint: SocketAddr) {
    b.tunnel.set_peer(a.as_peer(None)).unwrap();
    a.tunnel.set_peer(b.as_peer(Some(endpoint))).unwrap();
}

/// Two peers with a session in use.
pub(crate) fn connected() -> (End, End) {
    let (a, b) = two_peers();
    assert!(a.tunnel.initiate_handshake(&b.key()));
    a.expect_event(|event| matches!(event, TunnelEvent::HandshakeDone { .. }));
    b.expect_event(|event| matches!(event, TunnelEvent::HandshakeDone { .. }));
    (a, b)
}

/// One datagram there and back; how long it took.
pub(crate) fn echo(from: &UdpSocket, to: &UdpSocket, text: &[u8]) -> Duration {
    let (start, mut buffer) = (Instant::now(), [0; 2048]);
    from.send_to(text, to.local_addr().unwrap()).unwrap();
    let (length, source) = to.recv_from(&mut buffer).expect("request arrives");
    assert_eq!(&buffer[..length], text);
    to.send_to(text, source).unwrap();
    let (length, _) = from.recv_from(&mut buffer).expect("answer arrives");
    assert_eq!(&buffer[..length], text);
    start.elapsed()
}
