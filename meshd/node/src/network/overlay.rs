//! Bringing the overlay up: nothing in clear first, then interface, addresses, routes.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use mesh_proto::v1::ErrorCode;
use mesh_tunnel::{Tunnel, TunnelBuilder, TunnelError};

use crate::failure::Failure;
use crate::findings::{Findings, Severity};
use crate::hostop::{Host, HostError, HostOp};
use crate::roster::Place;

/// How to get the kernel's WireGuard.
const NO_MODULE: &str =
    "load the module with `modprobe wireguard` (a container uses its host's), or take --backend userspace";
/// The finding that this host has no IPv6.
const NO_IPV6: &str = "host/ipv6";

/// Answers "unreachable" for the mesh's prefixes wherever no better route exists. Before the interface, so
/// that at no moment a packet for the mesh takes the default route.
pub(super) async fn close_the_gaps(host: &Host, place: &Place, findings: &Findings) -> Result<(), Failure> {
    for prefix in prefixes(place) {
        tolerate_ipv6(host.apply(HostOp::AddUnreachable { prefix }).await, findings)?;
    }
    Ok(())
}

/// Takes the unreachable routes away; only when the node leaves the mesh.
pub(super) async fn open_the_gaps(host: &Host, place: &Place) {
    for prefix in prefixes(place) {
        if let Err(error) = host.apply(HostOp::DelUnreachable { prefix }).await {
            tracing::warn!(%prefix, error = mesh_runtime::chain(&error), "unreachable route stays");
        }
    }
}

/// Gives the interface its two addresses, and the mesh's prefixes their way into it; no other route.
pub(super) async fn address(
    host: &Host,
    interface: &str,
    place: &Place,
    findings: &Findings,
) -> Result<(), Failure> {
    let addresses: [IpNet; 2] = [
        IpNet::V4(Ipv4Net::new(place.ipv4, 32).expect("32 is a length")),
        IpNet::V6(Ipv6Net::new(place.ipv6, 128).expect("128 is a length")),
    ];
    for (address, prefix) in addresses.into_iter().zip(prefixes(place)) {
        let interface = interface.to_owned();
        let added = host.apply(HostOp::AddAddress { interface: interface.clone(), address }).await;
        if tolerate_ipv6(added, findings)? {
            let op = HostOp::AddRoute { interface, prefix, source: address.addr() };
            tolerate_ipv6(host.apply(op).await, findings)?;
        }
    }
    Ok(())
}

/// Addresses and routes that ought to be there and are not, one sentence each.
pub(super) async fn missing(
    host: &Host,
    interface: &str,
    place: &Place,
    findings: &Findings,
) -> Result<Vec<String>, HostError> {
    let found = host.addresses().await?;
    let has = |address| found.iter().any(|found| found.interface == interface && found.address == address);
    let mut missing = Vec::new();
    for (address, prefix) in [IpAddr::V4(place.ipv4), IpAddr::V6(place.ipv6)].into_iter().zip(prefixes(place))
    {
        if address.is_ipv6() && findings.stands(NO_IPV6) {
            continue;
        }
        if !has(address) {
            missing.push(format!("{interface} is down or lacks the address {address}"));
        }
        if !host.has_route(prefix, Some(interface)).await? {
            missing.push(format!("there is no route for {prefix} into {interface}"));
        }
        if !host.has_route(prefix, None).await? {
            missing.push(format!("there is no unreachable route for {prefix}"));
        }
    }
    Ok(missing)
}

/// Opens the tunnel; it may wait for the kernel.
pub(super) async fn open_tunnel(builder: TunnelBuilder) -> Result<Box<dyn Tunnel>, Failure> {
    tokio::task::spawn_blocking(move || builder.open())
        .await
        .map_err(|error| Failure::internal("opening the tunnel was cut off", &error))?
        .map_err(tunnel_failure)
}

/// A tunnel error as the outside sees it.
pub(crate) fn tunnel_failure(error: TunnelError) -> Failure {
    use ErrorCode as C;
    let (code, next) = match &error {
        TunnelError::NoTunDevice => {
            (C::TunMissing, "load the module with `modprobe tun`, or give the container /dev/net/tun")
        }
        TunnelError::NoKernel { .. } => (C::KernelBackendMissing, NO_MODULE),
        TunnelError::NoRights { .. } | TunnelError::SocketRights { .. } => {
            (C::TunDenied, "run meshd as root, or with CAP_NET_ADMIN")
        }
        TunnelError::InterfaceBusy { .. } => {
            (C::InterfaceBusy, "stop what owns the interface, or choose another with --interface")
        }
        TunnelError::PortInUse { .. } => {
            (C::PortInUse, "choose another with --wg-port; `ss -lunp` shows who has it")
        }
        TunnelError::InterfaceName { .. } | TunnelError::Mtu { .. } => {
            (C::ConfigInvalid, "correct the interface's name or MTU")
        }
        _ => (C::Internal, "look at the daemon's log"),
    };
    Failure::new(code, mesh_runtime::chain(&error), next)
}

fn prefixes(place: &Place) -> [IpNet; 2] {
    [IpNet::V4(place.ipv4_pool), IpNet::V6(place.ipv6_prefix)]
}

/// A host without IPv6 is a node without IPv6, and says so. `false` if the step was left out.
fn tolerate_ipv6(result: Result<(), HostError>, findings: &Findings) -> Result<bool, Failure> {
    match result {
        Ok(()) => Ok(true),
        Err(HostError::NoFamily { .. }) => {
            findings.raise(
                NO_IPV6,
                Severity::Warn,
                "this host",
                "IPv6 is switched off, so the mesh's IPv6 addresses do not work here",
                "switch it on: sysctl net.ipv6.conf.all.disable_ipv6=0",
            );
            Ok(false)
        }
        Err(error) => Err(error.into()),
    }
}
