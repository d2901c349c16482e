//! `Local.Doctor`: every check by name, what it found, and what to do.

use mesh_proto::v1 as pb;

use crate::failure::Failure;
use crate::network::{Inspection, NetworkStatus};
use crate::run::Node;

/// Collects what passed and what did not.
#[derive(Default)]
struct Report {
    passed: Vec<String>,
    findings: Vec<pb::Finding>,
    checks: u32,
}

impl Report {
    fn check(&mut self, name: &str, problem: Option<(&str, String, &str)>) {
        self.checks += 1;
        match problem {
            None => self.passed.push(name.to_owned()),
            Some((severity, what, next)) => self.findings.push(pb::Finding {
                subject: name.to_owned(),
                what,
                next: next.to_owned(),
                severity: severity.to_owned(),
            }),
        }
    }
}

pub(super) async fn doctor(node: &Node) -> Result<pb::DoctorReport, Failure> {
    let mut report = Report::default();
    let state =
        node.state.read("version").err().map(|error| ("bad", error.to_string(), "repair the state folder"));
    report.check("state folder", state);
    let Ok(session) = node.session().await else {
        let problem =
            ("warn", "this machine is not enrolled".to_owned(), "enroll it: `meshctl enroll TOKEN`");
        report.check("identity", Some(problem));
        return Ok(finish(report, node));
    };
    let active = session.identities.active();
    let expired = active.has_expired(node.clock.now()).then(|| {
        let what = format!("the certificate ended at {}", active.not_after);
        ("bad", what, "let the node reach its controller: it resumes by itself")
    });
    report.check("identity", expired);
    let uplink = session.uplink.status();
    let offline = (!uplink.connected).then(|| {
        let what = match uplink.problem.as_str() {
            "" => "no connection yet".to_owned(),
            problem => format!("no connection: {problem}"),
        };
        ("warn", what, "check that the controller runs and its port is open from here")
    });
    report.check("controller", offline);
    network(&mut report, &session.network.status().await?, &session.network.inspect().await?);
    Ok(finish(report, node))
}

fn network(report: &mut Report, network: &NetworkStatus, host: &Inspection) {
    let touched = host.firewall.clone().map(|what| {
        ("bad", what, "it is put back within seconds; find out who did it, e.g. `nft flush ruleset`")
    });
    let firewall = (!network.firewall_ready).then(|| {
        (
            "bad",
            "table inet meshd is not in place, so no peer is let in".to_owned(),
            "install the package nftables",
        )
    });
    report.check("firewall", firewall.or(touched));
    let overlay = (!host.overlay.is_empty()).then(|| {
        let next = "they are put back within seconds once the interface is up: `ip link set dev IFACE up`";
        ("bad", host.overlay.join("; "), next)
    });
    report.check("overlay addresses and routes", overlay);
    let crl = (network.crl_number == 0)
        .then(|| ("bad", "there is no CRL yet".to_owned(), "let the node reach its controller once"));
    report.check("revocation list", crl);
    // Not a fault: the userspace engine speaks the same protocol, and what the kernel's lacks may not be needed.
    report.check(&backend_check(network), None);
    report.check(&format!("interface {}, UDP port {}", network.interface, network.wireguard_port), None);
    for peer in &network.peers {
        let silent = (!peer.has_session).then(|| {
            let tried: Vec<String> = peer.candidates.iter().map(ToString::to_string).collect();
            let what = match tried.is_empty() {
                true => "no endpoint is known".to_owned(),
                false => format!("no handshake with {}", tried.join(", ")),
            };
            ("warn", what, "check that its UDP port is open, or give it an endpoint in its configuration")
        });
        report.check(&format!("peer {}", peer.name), silent);
    }
}

/// Which engine runs, why it is not the kernel's, and what it lacks.
fn backend_check(network: &NetworkStatus) -> String {
    let mut line = format!("WireGuard in {}", network.backend);
    if let Some(why) = &network.why_not_kernel {
        line = format!("{line}: {why}");
        if why.contains("module") {
            line += "; `modprobe wireguard` and a restart of meshd would use the kernel's";
        }
    }
    if !network.lacks.is_empty() {
        line = format!("{line}: {}", network.lacks.join("; "));
    }
    line
}

/// Standing findings count as checks that failed.
fn finish(mut report: Report, node: &Node) -> pb::DoctorReport {
    // What a check above has said already is not said twice.
    let checked: Vec<&str> = report.findings.iter().map(|finding| finding.subject.as_str()).collect();
    let mut standing = node.findings.list();
    standing.retain(|finding| !checked.iter().any(|subject| finding.subject.ends_with(subject)));
    report.checks += u32::try_from(standing.len()).unwrap_or(u32::MAX);
    report.findings.extend(standing);
    pb::DoctorReport { findings: report.findings, checks: report.checks, passed: report.passed }
}
