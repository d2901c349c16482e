//! Opening, its errors, and the end.

use std::net::UdpSocket;
use std::process::Command;

use mesh_tunnel::{RecvTimeoutError, Tunnel, TunnelBuilder, TunnelError, TunnelEvent};

use crate::lab::{connected, eventually, key, run};

const NESTED: &str = "MESH_TUNNEL_NESTED";

fn builder(interface: &str) -> TunnelBuilder {
    TunnelBuilder::new(interface, key(1))
}

fn refusal(builder: TunnelBuilder) -> TunnelError {
    builder.open().map(|tunnel| tunnel.name().to_owned()).expect_err("must be refused")
}

fn interface_exists(name: &str) -> bool {
    let table = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    table.lines().any(|line| line.trim().starts_with(&format!("{name}:")))
}

netns_tests! {
    fn an_open_tunnel_is_up_with_its_mtu_and_gone_when_closed() {
        let tunnel = builder("mesh%d").open().unwrap();
        assert_eq!(tunnel.name(), "mesh0");
        let shown = String::from_utf8(run("ip", &["link", "show", "mesh0"]).stdout).unwrap();
        assert!(shown.contains(",UP") && shown.contains("mtu 1420"), "{shown}");
        // Nobody else can have the port, in either family.
        for address in ["0.0.0.0", "::"] {
            assert!(UdpSocket::bind((address, tunnel.listen_port())).is_err());
        }
        let events = tunnel.events();
        tunnel.close();
        tunnel.close();
        assert!(!interface_exists("mesh0"));
        assert!(UdpSocket::bind(("0.0.0.0", tunnel.listen_port())).is_ok());
        assert_eq!(events.recv(), Some(TunnelEvent::Stopped { error: None }));
        assert_eq!(events.recv(), None);
        assert!(matches!(tunnel.rotate_key(key(3)), Err(TunnelError::Closed)));
        assert!(!tunnel.initiate_handshake(&key(2).public()));
    }

    fn dropping_a_tunnel_removes_its_interface() {
        drop(builder("wg9").open().unwrap());
        assert!(!interface_exists("wg9"));
        let again: Box<dyn Tunnel> = builder("wg9").open().unwrap();
        assert!(interface_exists(again.name()));
    }

    fn what_is_taken_is_named() {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        let port = socket.local_addr().unwrap().port();
        let error = refusal(builder("wg9").listen_port(port));
        assert!(matches!(error, TunnelError::PortInUse { port: p } if p == port), "{error}");
        assert!(error.to_string().contains(&port.to_string()));
        assert!(!interface_exists("wg9"));
        let six = UdpSocket::bind("[::]:0").unwrap();
        let port = six.local_addr().unwrap().port();
        assert!(matches!(refusal(builder("wg9").listen_port(port)), TunnelError::PortInUse { .. }));
        run("ip", &["link", "add", "wg9", "type", "veth", "peer", "name", "other"]);
        let error = refusal(builder("wg9"));
        assert!(matches!(error, TunnelError::InterfaceBusy { .. }), "{error:?}");
        assert!(error.to_string().contains("wg9"));
    }

    fn bad_settings_are_refused_before_anything_is_opened() {
        for name in ["", "a/b", "sixteen-bytes-xx", "a b", "..", "%s", "a%d%d", "a:b"] {
            let error = refusal(builder(name));
            assert!(matches!(error, TunnelError::InterfaceName { .. }), "{name:?}: {error}");
        }
        for mtu in [0, 575, 65_500] {
            assert!(matches!(refusal(builder("wg9").mtu(mtu)), TunnelError::Mtu { .. }));
        }
    }

    fn a_missing_device_is_named() {
        run("mount", &["-t", "tmpfs", "tmpfs", "/dev/net"]);
        let error = refusal(builder("wg9"));
        assert!(matches!(error, TunnelError::NoTunDevice), "{error:?}");
        assert!(error.to_string().contains("/dev/net/tun"));
    }

    fn an_interface_deleted_under_us_ends_the_tunnel_with_a_reason() {
        let (a, b) = connected();
        a.namespace.ip("link del wg0");
        let event = eventually("the end", || {
            a.events.try_recv().filter(|event| matches!(event, TunnelEvent::Stopped { .. }))
        });
        assert!(matches!(event, TunnelEvent::Stopped { error: Some(text) } if text.contains("wg0")));
        let refused = a.tunnel.set_peer(b.as_peer(None));
        assert!(matches!(refused, Err(TunnelError::Closed)));
        a.tunnel.close();
        assert_eq!(a.events.recv_timeout(std::time::Duration::ZERO), Err(RecvTimeoutError::Closed));
    }

    fn an_interface_that_is_set_down_and_up_goes_on() {
        let (a, b) = connected();
        for _ in 0..3 {
            b.namespace.ip("link set wg0 down");
            let _ = a.inner_udp().send_to(b"lost", (b.inner4, 9));
            b.namespace.ip("link set wg0 up");
        }
        a.namespace.ping(b.inner4);
    }
}

/// A user namespace of its own, but the network of its parent: no right to make interfaces.
#[test]
fn missing_rights_are_named() {
    if std::env::var_os(NESTED).is_some() {
        let error = refusal(builder("wg9"));
        assert!(matches!(error, TunnelError::NoRights { .. }), "{error:?}");
        assert!(error.to_string().contains("CAP_NET_ADMIN"));
        return;
    }
    let path = concat!(module_path!(), "::missing_rights_are_named");
    crate::lab::in_namespaces(path, crate::lab::WATCHDOG, || {
        let output = Command::new("unshare")
            .args(["-Ur", "--"])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "lifecycle::missing_rights_are_named", "--nocapture"])
            .env(NESTED, "1")
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    });
}
