//! Which engine is taken, on kernels with and without WireGuard of their own. `ip` is the judge of that.

use std::process::Command;

use mesh_tunnel::{Backend, BackendKind, Tunnel, TunnelBuilder, TunnelError};

use crate::lab::{Namespace, key};

fn open(backend: Backend) -> Result<Box<dyn Tunnel>, TunnelError> {
    TunnelBuilder::new("wg9", key(1)).backend(backend).open()
}

/// Whether this kernel has WireGuard.
pub(crate) fn kernel_has_it() -> bool {
    let made = Command::new("ip").args(["link", "add", "wg8", "type", "wireguard"]).output().unwrap();
    if made.status.success() {
        crate::lab::run("ip", &["link", "del", "wg8"]);
        return true;
    }
    let why = String::from_utf8_lossy(&made.stderr).into_owned();
    assert!(why.contains("Unknown device type") || why.contains("not supported"), "{why}");
    false
}

netns_tests! {
    fn auto_takes_the_kernels_and_else_says_why_not() {
        let namespace = Namespace::new("a");
        namespace.run(|| {
            let has = kernel_has_it();
            let tunnel = open(Backend::Auto).unwrap();
            let info = tunnel.backend();
            let kind = if has { BackendKind::Kernel } else { BackendKind::Userspace };
            assert_eq!(info.kind, kind, "{info:?}");
            match info.why_not_kernel {
                None => assert!(has),
                Some(why) => assert!(!has && why.contains("module `wireguard`") && why.contains("not supported"), "{why}"),
            }
            let shown = String::from_utf8(crate::lab::run("ip", &["-d", "link", "show", "wg9"]).stdout).unwrap();
            assert!(shown.contains(if has { "wireguard" } else { "tun type tun" }), "{shown}");
        });
    }

    fn the_kernels_alone_is_refused_where_there_is_none() {
        let namespace = Namespace::new("a");
        namespace.run(|| match open(Backend::Kernel) {
            Ok(tunnel) => {
                assert!(kernel_has_it());
                assert_eq!(tunnel.backend().kind, BackendKind::Kernel);
            }
            Err(error) => {
                assert!(!kernel_has_it());
                assert!(matches!(&error, TunnelError::NoKernel { why } if why.contains("module `wireguard`")), "{error}");
            }
        });
        assert!(!std::fs::read_to_string("/proc/thread-self/net/dev").unwrap().contains("wg9"));
    }

    fn userspace_is_taken_when_it_is_asked_for() {
        let namespace = Namespace::new("a");
        namespace.run(|| {
            let info = open(Backend::Userspace).unwrap().backend();
            assert_eq!((info.kind, info.why_not_kernel), (BackendKind::Userspace, None));
        });
    }

    fn somebody_elses_interface_is_busy_for_every_engine() {
        let namespace = Namespace::new("a");
        namespace.run(|| {
            crate::lab::run("ip", &["link", "add", "wg9", "type", "veth", "peer", "name", "other"]);
            for backend in [Backend::Auto, Backend::Kernel, Backend::Userspace] {
                let error = open(backend).map(|tunnel| tunnel.backend()).unwrap_err();
                assert!(matches!(error, TunnelError::InterfaceBusy { .. }), "{backend:?}: {error}");
            }
            crate::lab::run("ip", &["link", "show", "wg9"]);
        });
    }
}
