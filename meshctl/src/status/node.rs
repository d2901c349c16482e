//! One node and its peers.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use mesh_proto::v1 as pb;
use serde_json::{Value, json};

use super::{finding_documents, findings, next_steps};
use crate::{
    app::App,
    cert,
    output::{Format, Table, Tone, paint},
    text::{ago, left, rfc3339, rtt, safe, size},
};

pub(super) fn show(app: &App, status: &pb::NodeStatus, now: i64) {
    match app.out.format {
        Format::Json => app.out.document("NodeStatus", &document(status)),
        Format::Name => status.peers.iter().for_each(|peer| app.out.line(&safe(&peer.name))),
        Format::Table | Format::Wide => {
            lines(status, now, app.out.is_wide()).iter().for_each(|line| app.out.line(line))
        }
    }
}

fn lines(status: &pb::NodeStatus, now: i64, wide: bool) -> Vec<String> {
    let mut lines = findings(&status.findings);
    if !status.enrolled {
        lines.push("this node is in no mesh yet".to_owned());
        lines.push(
            "next: meshctl enroll TOKEN (on the controller `meshctl token create` makes one)".to_owned(),
        );
        return lines;
    }
    lines.push(head(status, now));
    if wide && !status.why_not_kernel.is_empty() {
        lines.push(format!("not the kernel's WireGuard: {}", safe(&status.why_not_kernel)));
    }
    if wide && !status.backend_lacks.is_empty() {
        let lacks = status.backend_lacks.iter().map(|what| safe(what)).collect::<Vec<_>>().join("; ");
        lines.push(format!("{}'s WireGuard lacks: {lacks}", safe(&status.backend)));
    }
    if status.peers.is_empty() {
        lines.push("no peers: no other node, or policy allows none".to_owned());
    } else {
        lines.extend(peers(&status.peers, now, wide).lines());
    }
    lines.extend(next_steps(&status.findings));
    lines
}

/// `web-1   100.64.0.11 fd5e:…::b   controller ctl-1 ok 12ms   userspace, offloads tso+uso   cert 60h (renews 12h)`
fn head(status: &pb::NodeStatus, now: i64) -> String {
    let controller = match (status.controller_connected, status.controller_rtt_us) {
        (true, 0) => paint(Tone::Good, "ok"),
        (true, time) => format!("{} {}", paint(Tone::Good, "ok"), rtt(time)),
        (false, _) => paint(Tone::Warn, "not connected"),
    };
    let offloads = if status.offloads.is_empty() {
        String::new()
    } else {
        format!(", offloads {}", safe(&status.offloads.join("+")))
    };
    let renews = if status.renews_at > now {
        format!(" (renews {})", left(status.renews_at, now))
    } else {
        String::new()
    };
    [
        paint(Tone::Bold, &safe(&status.name)),
        format!("{} {}", safe(&status.ipv4), safe(&short_ipv6(&status.ipv6))),
        format!("controller {} {controller}", safe(&status.controller)),
        format!("{}{offloads}", safe(&status.backend)),
        format!("cert {}{renews}", left(status.not_after, now)),
    ]
    .join("   ")
}

/// `fd5e:…::b`: the first group and what is behind the zeros.
fn short_ipv6(address: &str) -> String {
    match (address.split_once(':'), address.rsplit_once("::")) {
        (Some((first, rest)), Some((_, last))) if rest.contains("::") && !rest.starts_with(':') => {
            format!("{first}:…::{last}")
        }
        _ => address.to_owned(),
    }
}

fn peers(peers: &[pb::PeerStatus], now: i64, wide: bool) -> Table {
    let mut table = Table::new(if wide {
        &[
            "PEER",
            "MESH IP",
            "MESH IPV6",
            "TAGS",
            "ALLOWED",
            "PATH",
            "HANDSHAKE",
            "RTT",
            "LOSS",
            "RECEIVED",
            "SENT",
            "LEASE",
        ]
    } else {
        &["PEER", "MESH IP", "PATH", "HANDSHAKE", "RTT", "LOSS", "LEASE"]
    });
    for peer in peers {
        let (name, ipv4, path) = (peer.name.clone(), peer.ipv4.clone(), peer.path.clone());
        let (handshake, time, lease) =
            (ago(peer.last_handshake, now), rtt(peer.rtt_us), left(peer.lease_ends, now));
        if wide {
            let allowed = match (peer.inbound, peer.outbound) {
                (true, true) => "both ways",
                (true, false) => "in",
                (false, true) => "out",
                (false, false) => "no",
            };
            table.row([
                name,
                ipv4,
                peer.ipv6.clone(),
                peer.tags.join(","),
                allowed.to_owned(),
                path,
                handshake,
                time,
                loss(peer),
                size(peer.rx_bytes),
                size(peer.tx_bytes),
                lease,
            ]);
        } else {
            table.row([name, ipv4, path, handshake, time, loss(peer), lease]);
        }
    }
    table
}

/// Of the last probes through the tunnel, in whole per cent, rounded up: one that was lost shows.
fn loss(peer: &pb::PeerStatus) -> String {
    match peer.probes {
        0 => "-".to_owned(),
        probes => format!("{}%", (peer.probes_lost * 100).div_ceil(probes)),
    }
}

fn document(status: &pb::NodeStatus) -> Value {
    let peer = |peer: &pb::PeerStatus| {
        json!({
            "name": peer.name, "ipv4": peer.ipv4, "ipv6": peer.ipv6, "path": peer.path,
            "lastHandshake": rfc3339(peer.last_handshake), "rttMicros": peer.rtt_us, "leaseEnds": rfc3339(peer.lease_ends),
            "rxBytes": peer.rx_bytes, "txBytes": peer.tx_bytes, "tags": peer.tags,
            "wireguardPublicKey": STANDARD.encode(&peer.wireguard_public_key), "inbound": peer.inbound,
            "outbound": peer.outbound, "endpoint": peer.endpoint, "probes": peer.probes,
            "probesLost": peer.probes_lost,
        })
    };
    json!({
        "enrolled": status.enrolled, "name": status.name, "ipv4": status.ipv4, "ipv6": status.ipv6,
        "trustDomain": status.trust_domain, "tags": status.tags, "controller": status.controller,
        "controllerConnected": status.controller_connected, "controllerRttMicros": status.controller_rtt_us,
        "controllerOffsetSeconds": status.controller_offset_secs, "backend": status.backend,
        "whyNotKernel": status.why_not_kernel, "backendLacks": status.backend_lacks, "offloads": status.offloads, "interface": status.interface, "wireguardPort": status.wireguard_port,
        "serial": hex::encode(&status.serial), "notAfter": rfc3339(status.not_after),
        "renewsAt": rfc3339(status.renews_at), "crlNumber": status.crl_number, "rosterSeq": status.roster_seq,
        "version": status.version, "peers": status.peers.iter().map(peer).collect::<Vec<_>>(),
        "pairs": status.pairs.iter().map(cert::pair_document).collect::<Vec<_>>(),
        "findings": finding_documents(&status.findings),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: i64 = 1_800_000_000;

    #[test]
    fn a_node_reads_like_the_contract() {
        let peer = |name: &str, ipv4: &str, path: &str, back, rtt_us, lease: i64| pb::PeerStatus {
            name: name.into(),
            ipv4: ipv4.into(),
            path: path.into(),
            last_handshake: NOW - back,
            rtt_us,
            lease_ends: NOW + lease * 3600,
            probes: if rtt_us == 900 { 30 } else { 0 },
            probes_lost: 1,
            ..pb::PeerStatus::default()
        };
        let status = pb::NodeStatus {
            enrolled: true,
            name: "web-1".into(),
            ipv4: "100.64.0.11".into(),
            ipv6: "fd5e:1:2::b".into(),
            controller: "ctl-1".into(),
            controller_connected: true,
            controller_rtt_us: 12_000,
            backend: "userspace".into(),
            offloads: ["tso", "uso", "gso", "gro"].map(Into::into).to_vec(),
            not_after: NOW + 60 * 3600,
            renews_at: NOW + 12 * 3600,
            peers: vec![
                peer("db-1", "100.64.0.21", "direct 192.0.2.21:51820", 41, 900, 65),
                peer("db-2", "100.64.0.22", "none", 12, 31_000, 31),
            ],
            ..pb::NodeStatus::default()
        };
        let text = anstream::adapter::strip_str(&lines(&status, NOW, false).join("\n")).to_string();
        insta::assert_snapshot!(text, @r"
        web-1   100.64.0.11 fd5e:…::b   controller ctl-1 ok 12ms   userspace, offloads tso+uso+gso+gro   cert 60h (renews 12h)
        PEER  MESH IP      PATH                     HANDSHAKE  RTT    LOSS  LEASE
        db-1  100.64.0.21  direct 192.0.2.21:51820  41s ago    0.9ms  4%    65h
        db-2  100.64.0.22  none                     12s ago    31ms   -     31h
        ");
    }

    #[test]
    fn what_the_kernels_engine_lacks_is_said() {
        let mut status = pb::NodeStatus { enrolled: true, backend: "kernel".into(), ..Default::default() };
        assert!(!lines(&status, NOW, true).iter().any(|line| line.contains("lacks")));
        status.backend_lacks = ["no relay", "no STUN"].map(Into::into).to_vec();
        let line = "kernel's WireGuard lacks: no relay; no STUN";
        assert!(lines(&status, NOW, true).iter().any(|found| found == line));
        assert_eq!(document(&status)["backendLacks"], json!(["no relay", "no STUN"]));
    }

    #[test]
    fn a_node_outside_any_mesh_says_how_to_enter_one() {
        let lines = lines(&pb::NodeStatus::default(), NOW, false);
        assert!(lines[1].contains("meshctl enroll"), "{lines:?}");
    }

    #[test]
    fn addresses_are_shortened_only_where_something_is_left_out() {
        for (long, short) in [("fd5e:1:2::b", "fd5e:…::b"), ("fd5e::b", "fd5e::b"), ("::1", "::1"), ("", "")]
        {
            assert_eq!(short_ipv6(long), short);
        }
    }
}
