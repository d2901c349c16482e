//! The tunnel's engine in words.

use mesh_tunnel::{BackendKind, Tunnel};

pub(super) fn backend_name(tunnel: &dyn Tunnel) -> &'static str {
    match tunnel.backend().kind {
        BackendKind::Kernel => "kernel",
        _ => "userspace",
    }
}

pub(super) fn offloads(tunnel: &dyn Tunnel) -> Vec<String> {
    let offloads = tunnel.backend().offloads;
    let all = [
        (offloads.tun_tcp, "tso"),
        (offloads.tun_udp, "uso"),
        (offloads.udp_gso, "gso"),
        (offloads.udp_gro, "gro"),
    ];
    all.into_iter().filter(|(on, _)| *on).map(|(_, name)| name.to_owned()).collect()
}

pub(super) fn backend_line(tunnel: &dyn Tunnel) -> String {
    let offloads = offloads(tunnel);
    match offloads.is_empty() {
        true => backend_name(tunnel).to_owned(),
        false => format!("{} {}", backend_name(tunnel), offloads.join("+")),
    }
}
