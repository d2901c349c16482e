//! Against Debian's wireguard-go and boringtun-cli, set up with `wg`.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use mesh_tunnel::{Offloads, PeerConfig, PresharedKey, PublicKey, Tunnel, TunnelEvent, Uapi, UapiAccess};

use crate::basic::tcp_transfer;
use crate::lab::{Namespace, eventually, key, open_as, two_namespaces};

const PORT: u16 = 51820;
const PSK: [u8; 32] = [42; 32];

/// Another's daemon on `wg0` of a namespace, with private key `key(2)`.
struct Theirs {
    daemon: Child,
    namespace: Namespace,
}

impl Theirs {
    fn wireguard_go(namespace: Namespace) -> Self {
        let mut command = Command::new("wireguard-go");
        command.args(["-f", "wg0"]).env("LOG_LEVEL", "error");
        Self::start(namespace, command, "wireguard-go must be installed (apt install wireguard-go)")
    }

    fn boringtun(namespace: Namespace) -> Self {
        let installed = concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/tools/bin/boringtun-cli");
        let mut command = Command::new(std::env::var("BORINGTUN_CLI").unwrap_or_else(|_| installed.into()));
        command.args(["-f", "--disable-drop-privileges", "wg0"]).env("WG_LOG_LEVEL", "error");
        Self::start(namespace, command, "boringtun-cli must be installed (tests/interop/install)")
    }

    fn start(namespace: Namespace, mut command: Command, needed: &str) -> Self {
        command.stdin(Stdio::null());
        let daemon = namespace.run(|| command.spawn()).unwrap_or_else(|error| panic!("{needed}: {error}"));
        fs::write("/run/key", STANDARD.encode(*key(2).to_bytes())).unwrap();
        fs::write("/run/psk", STANDARD.encode(PSK)).unwrap();
        let go = Self { daemon, namespace };
        let set_up = format!("set wg0 private-key /run/key listen-port {PORT}");
        eventually("their daemon answers", || go.try_wg(&set_up));
        go.namespace.ip("addr add 10.214.0.2/24 dev wg0");
        go.namespace.ip("addr add fd14::2/64 dev wg0");
        go.namespace.ip("link set wg0 mtu 1420 up");
        go
    }

    fn try_wg(&self, command: &str) -> Option<String> {
        let mut wg = Command::new("wg");
        wg.args(command.split_whitespace()).stderr(Stdio::null());
        let output = self
            .namespace
            .run(|| wg.output())
            .unwrap_or_else(|error| panic!("wg must be installed (apt install wireguard-tools): {error}"));
        output.status.success().then(|| String::from_utf8(output.stdout).unwrap())
    }

    fn wg(&self, command: &str) -> String {
        self.try_wg(command).unwrap_or_else(|| panic!("wg {command}"))
    }

    fn add_peer(&self, peer: PublicKey, more: &str) {
        let command = format!(
            "set wg0 peer {peer} preshared-key /run/psk allowed-ips 10.214.0.1/32,fd14::1/128 {more}"
        );
        self.wg(&command);
    }
}

impl Drop for Theirs {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

fn ours(namespace: &Namespace) -> Box<dyn Tunnel> {
    let tunnel = namespace.run(|| open_as(key(1), Offloads::ALL));
    namespace.ip("addr add 10.214.0.1/24 dev wg0");
    namespace.ip("addr add fd14::1/64 dev wg0");
    tunnel
}

fn their_config(endpoint: bool) -> PeerConfig {
    PeerConfig {
        public_key: key(2).public(),
        preshared_key: Some(PresharedKey::from_bytes(PSK)),
        endpoint: endpoint.then(|| ([10, 213, 0, 2], PORT).into()),
        allowed_ips: vec!["10.214.0.2/32".parse().unwrap(), "fd14::2/128".parse().unwrap()],
        persistent_keepalive: None,
    }
}

fn handshake_done(tunnel: &dyn Tunnel) {
    eventually("handshake", || {
        tunnel.events().try_recv().filter(|event| matches!(event, TunnelEvent::HandshakeDone { .. }))
    });
}

fn traffic(a: &Namespace, b: &Namespace) {
    for inner in ["10.214.0.2", "fd14::2"] {
        a.ping(inner.parse().unwrap());
        tcp_transfer(b, a, inner.parse().unwrap(), 2 << 20);
    }
    for inner in ["10.214.0.1", "fd14::1"] {
        b.ping(inner.parse().unwrap());
        tcp_transfer(a, b, inner.parse().unwrap(), 2 << 20);
    }
}

/// We begin, and begin again three times.
fn we_begin_and_rekey(start: impl FnOnce(Namespace) -> Theirs) {
    let (a, b) = two_namespaces();
    let (theirs, tunnel) = (start(b), ours(&a));
    theirs.add_peer(tunnel.public_key(), "");
    tunnel.set_peer(their_config(true)).unwrap();
    traffic(&a, &theirs.namespace);
    for _ in 0..3 {
        while tunnel.events().try_recv().is_some() {}
        assert!(tunnel.initiate_handshake(&key(2).public()));
        handshake_done(&*tunnel);
        traffic(&a, &theirs.namespace);
    }
    assert_eq!(tunnel.counters().rx_invalid, 0, "{:?}", tunnel.counters());
    let transfer = theirs.wg("show wg0 transfer");
    let numbers: Vec<u64> = transfer.split_whitespace().skip(1).map(|n| n.parse().unwrap()).collect();
    assert!(numbers.iter().all(|bytes| *bytes > 16 << 20), "{transfer}");
}

/// They begin, forget us, and begin again, three times.
fn they_begin_and_start_over(start: impl FnOnce(Namespace) -> Theirs) {
    let (a, b) = two_namespaces();
    let (theirs, tunnel) = (start(b), ours(&a));
    tunnel.set_peer(their_config(false)).unwrap();
    let endpoint = format!("endpoint 10.213.0.1:{} persistent-keepalive 1", tunnel.listen_port());
    for _ in 0..3 {
        theirs.add_peer(tunnel.public_key(), &endpoint);
        handshake_done(&*tunnel);
        traffic(&a, &theirs.namespace);
        while tunnel.events().try_recv().is_some() {}
        theirs.wg(&format!("set wg0 peer {} remove", tunnel.public_key()));
    }
    let stats = tunnel.peers();
    assert_eq!(stats[0].endpoint, Some(([10, 213, 0, 2], PORT).into()));
}

netns_tests! {
    fn we_begin_and_rekey_with_wireguard_go() {
        we_begin_and_rekey(Theirs::wireguard_go);
    }

    fn wireguard_go_begins_and_starts_over() {
        they_begin_and_start_over(Theirs::wireguard_go);
    }

    fn we_begin_and_rekey_with_boringtun() {
        we_begin_and_rekey(Theirs::boringtun);
    }

    fn boringtun_begins_and_starts_over() {
        they_begin_and_start_over(Theirs::boringtun);
    }
}

fn wg(namespace: &Namespace, command: &str) -> Output {
    let mut wg = Command::new("wg");
    namespace.run(|| wg.args(command.split_whitespace()).output().expect("wg must be installed"))
}

fn text(output: Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

netns_tests! {
    fn wg_configures_and_shows_our_interface() {
        let (a, b) = two_namespaces();
        let (go, tunnel) = (Theirs::wireguard_go(b), Arc::<dyn Tunnel>::from(ours(&a)));
        // Both sockets would be called wg0: theirs is out of the way once it is configured.
        go.add_peer(key(3).public(), "");
        crate::lab::run("mv", &["/var/run/wireguard/wg0.sock", "/var/run/wireguard/theirs"]);
        let uapi = Uapi::serve(&tunnel, UapiAccess::ReadWrite).unwrap();
        fs::write("/run/ours", STANDARD.encode(*key(3).to_bytes())).unwrap();
        let peer = key(2).public();
        let command = format!(
            "set wg0 private-key /run/ours listen-port {} peer {peer} preshared-key /run/psk endpoint 10.213.0.2:{PORT} \
             allowed-ips 10.214.0.2/32,fd14::2/128 persistent-keepalive 7",
            tunnel.listen_port()
        );
        text(wg(&a, &command));
        assert_eq!(tunnel.public_key(), key(3).public());
        traffic(&a, &go.namespace);
        let shown = text(wg(&a, "show wg0"));
        for part in [&peer.to_string(), "10.214.0.2/32", "fd14::2/128", "10.213.0.2:51820", "every 7 seconds", "ago"] {
            assert!(shown.contains(part), "{part} in {shown}");
        }
        let dump = text(wg(&a, "show wg0 dump"));
        // Whoever may change keys may see them: `wg showconf` depends on it.
        for secret in [STANDARD.encode(PSK), STANDARD.encode(*key(3).to_bytes())] {
            assert!(dump.contains(&secret), "{dump}");
        }
        // The preshared key survives an update that does not name it.
        text(wg(&a, &format!("set wg0 peer {peer} persistent-keepalive 0")));
        assert!(tunnel.peer(&peer).unwrap().preshared_key == Some(PresharedKey::from_bytes(PSK)));
        // Port and mark change while the session goes on.
        let (was, free) = (tunnel.listen_port(), a.udp("0.0.0.0:0".parse().unwrap()).local_addr().unwrap().port());
        text(wg(&a, &format!("set wg0 listen-port {free} fwmark 0x17")));
        assert_eq!((tunnel.listen_port(), tunnel.fwmark()), (free, Some(0x17)));
        traffic(&a, &go.namespace);
        let taken = eventually("the old port is free", || a.run(|| std::net::UdpSocket::bind(("0.0.0.0", was))).ok());
        assert!(!wg(&a, &format!("set wg0 listen-port {was}")).status.success());
        assert_eq!(tunnel.listen_port(), free);
        drop(taken);
        text(wg(&a, "set wg0 fwmark 0"));
        assert_eq!(tunnel.fwmark(), None);
        // A prefix moves to whoever got it last.
        text(wg(&a, &format!("set wg0 peer {} allowed-ips 10.214.0.2/32", key(9).public())));
        assert_eq!(tunnel.peer(&peer).unwrap().allowed_ips, ["fd14::2/128".parse().unwrap()]);
        // The configuration as it stands, read and written back, changes nothing; another one replaces it.
        let shown = text(wg(&a, "showconf wg0"));
        assert!(shown.contains(&format!("ListenPort = {free}")) && shown.contains("PrivateKey = "), "{shown}");
        fs::write("/run/same.conf", &shown).unwrap();
        let handshake = tunnel.peers().into_iter().find(|stats| stats.public_key == peer).unwrap().has_session;
        for command in ["syncconf wg0 /run/same.conf", "setconf wg0 /run/same.conf"] {
            text(wg(&a, command));
            assert_eq!(text(wg(&a, "showconf wg0")), shown, "{command}");
        }
        assert!(handshake);
        let other = format!("[Interface]\nPrivateKey = {}\nListenPort = {free}\n[Peer]\nPublicKey = {peer}\n\
            AllowedIPs = 10.214.0.2/32\nEndpoint = 10.213.0.2:{PORT}\n", STANDARD.encode(*key(3).to_bytes()));
        fs::write("/run/other.conf", other).unwrap();
        text(wg(&a, "syncconf wg0 /run/other.conf"));
        assert_eq!(tunnel.peers().len(), 1);
        assert_eq!(tunnel.peer(&peer).unwrap().allowed_ips, ["10.214.0.2/32".parse().unwrap()]);
        text(wg(&a, &format!("set wg0 peer {peer} remove")));
        assert_eq!(tunnel.peers(), []);
        drop(uapi);
        assert!(!wg(&a, "show wg0").status.success());
    }

    fn a_socket_for_reading_refuses_changes() {
        let (a, _b) = two_namespaces();
        let tunnel = Arc::<dyn Tunnel>::from(ours(&a));
        tunnel.set_peer(their_config(true)).unwrap();
        let _uapi = Uapi::serve(&tunnel, UapiAccess::Read).unwrap();
        let dump = text(wg(&a, "show wg0 dump"));
        for secret in [STANDARD.encode(PSK), STANDARD.encode(*key(1).to_bytes())] {
            assert!(!dump.contains(&secret), "secret in {dump}");
        }
        assert!(text(wg(&a, "show wg0")).contains(&key(2).public().to_string()));
        assert!(!wg(&a, &format!("set wg0 peer {} remove", key(2).public())).status.success());
        assert_eq!(tunnel.peers().len(), 1);
        // Somebody else's socket is not taken away, a dead one is.
        assert!(Uapi::serve(&tunnel, UapiAccess::Read).is_err());
        let mut client = UnixStream::connect("/var/run/wireguard/wg0.sock").unwrap();
        client.write_all(b"nonsense\n\nget=1\n\n").unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("errno=-71\n\nlisten_port="), "{answer}");
        assert!(answer.ends_with("errno=0\n\n"), "{answer}");
    }
}

/// Ten minutes with a request every 3 s: several rekeys by the clock, each while the line is nearly idle.
const SOAK_REQUESTS: u32 = 210;

fn soak(path: &str, we_begin: bool) {
    crate::lab::in_namespaces(path, Duration::from_secs(900), || {
        let (a, b) = two_namespaces();
        let (go, tunnel) = (Theirs::wireguard_go(b), ours(&a));
        let theirs = format!("endpoint 10.213.0.1:{}", tunnel.listen_port());
        go.add_peer(tunnel.public_key(), if we_begin { "" } else { &theirs });
        tunnel.set_peer(their_config(we_begin)).unwrap();
        let (from, to) = if we_begin { (&a, "10.214.0.2") } else { (&go.namespace, "10.214.0.1") };
        let count = SOAK_REQUESTS.to_string();
        from.run_program("ping", &["-c", "1", "-W", "10", to]);
        let output = from.run_program("ping", &["-q", "-c", &count, "-i", "3", "-W", "3", to]);
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains(&format!("{count} received")), "{text}");
    });
}

#[test]
#[ignore = "a soak of ten minutes, half of what the whole suite may take: make soak"]
fn soak_where_we_begin() {
    soak(concat!(module_path!(), "::soak_where_we_begin"), true);
}

#[test]
#[ignore = "a soak of ten minutes, half of what the whole suite may take: make soak"]
fn soak_where_wireguard_go_begins() {
    soak(concat!(module_path!(), "::soak_where_wireguard_go_begins"), false);
}
