//! Figures for Prometheus, asked for as it does.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use mesh_controller::{Controller, Environment, StartupError};
use mesh_proto::v1 as pb;

use crate::harness::*;

async fn curl(address: SocketAddr, args: &[&str], path: &str) -> String {
    let mut command = Command::new("curl");
    command.args(["--silent", "--show-error", "--include", "--max-time", "20"]).args(args);
    command.arg(format!("http://{address}{path}"));
    let output =
        tokio::task::spawn_blocking(move || command.output().expect("curl is installed")).await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Series to value.
async fn figures(mesh: &Mesh) -> BTreeMap<String, f64> {
    let address = std::fs::read_to_string(mesh.state_dir().join("metrics-listen")).unwrap();
    let answer = curl(address.trim().parse().unwrap(), &[], "/metrics").await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(answer.contains("application/openmetrics-text; version=1.0.0"), "{answer}");
    assert!(answer.ends_with("# EOF\n"), "{answer}");
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    let lines = body.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| line.rsplit_once(' ').unwrap())
        .map(|(k, v)| (k.to_owned(), v.parse().unwrap()))
        .collect()
}

/// The one series of a name with this label.
fn of(figures: &BTreeMap<String, f64>, name: &str, label: &str) -> f64 {
    let found: Vec<_> =
        figures.iter().filter(|(k, _)| k.starts_with(&format!("{name}{{")) && k.contains(label)).collect();
    let [(_, value)] = found.as_slice() else { panic!("{name} {label}: {found:?} of {figures:?}") };
    **value
}

#[tokio::test(flavor = "multi_thread")]
async fn figures_follow_the_fleet_and_the_clock() {
    let clock = Arc::new(mesh_runtime::ManualClock::new(time::UtcDateTime::now()));
    let mesh = Mesh::init_at(clock.clone());
    let listen = |config: &mut mesh_controller::RunConfig| {
        config.metrics_listen = Some("127.0.0.1:0".parse().unwrap());
    };
    let running = mesh.start_as(listen).await;
    let before = figures(&mesh).await;
    let alpha = running.enroll("alpha").await;
    let service = running.service(&alpha, "web.alpha.mesh.internal", "peer").await;
    let after = figures(&mesh).await;
    assert_eq!(of(&after, "meshd_certificates", "live") - of(&before, "meshd_certificates", "live"), 2.0);
    assert_eq!(of(&after, "meshd_certificates", "revoked"), 0.0);
    assert_eq!(of(&after, "meshd_nodes", "offline"), 1.0);
    assert_eq!(of(&after, "meshd_nodes", "\"ok\""), 0.0);
    assert!(after["meshd_journal_records"] > before["meshd_journal_records"]);
    assert!(after["meshd_journal_disk_bytes"] > 0.0);
    let (stream, _) = SyncStream::of(&running, &alpha).await;
    assert_eq!(of(&figures(&mesh).await, "meshd_nodes", "\"ok\""), 1.0);
    drop(stream);
    crate::ocsp::revoke(&running, &crate::ocsp::serial(&service)).await;
    let revoked = figures(&mesh).await;
    assert_eq!(of(&revoked, "meshd_certificates", "revoked"), 1.0);
    let issuer = hex::encode(mesh_ca::ca_key_identifier(&alpha.enrolled.issuers[0]).unwrap().as_bytes());
    assert_eq!(
        of(&revoked, "meshd_crl_number", &issuer) - of(&after, "meshd_crl_number", &issuer),
        1.0,
        "a revocation makes one CRL"
    );

    // Time passes: CRLs age, CAs have less left, and at half of its life the issuing CA is a finding.
    let life = |figures: &BTreeMap<String, f64>| of(figures, "meshd_ca_remaining_life_seconds", "issuing");
    let day = Duration::from_secs(86_400);
    // Less than the 12 h after which CRLs are signed anew.
    clock.advance(day / 4);
    let later = figures(&mesh).await;
    assert_eq!(life(&revoked) - life(&later), 21_600.0);
    assert!(of(&later, "meshd_crl_age_seconds", &issuer) >= 21_600.0);
    let ratio = |figures: &BTreeMap<String, f64>| of(figures, "meshd_ca_remaining_life_ratios", "issuing");
    let root = |figures: &BTreeMap<String, f64>| of(figures, "meshd_ca_remaining_life_ratios", "root");
    assert!(ratio(&later) > 0.99 && root(&later) > ratio(&later));
    let findings = async || {
        let status = pb::fleet_client::FleetClient::new(running.local().await).status(pb::Empty {}).await;
        let findings = status.unwrap().into_inner().findings;
        let ca = findings.into_iter().filter(|finding| finding.what.contains("of its life left"));
        ca.map(|finding| (finding.severity, finding.what)).collect::<Vec<_>>()
    };
    assert_eq!(findings().await, []);
    for (days, mark, severity) in [(370, "50 %", "warn"), (220, "20 %", "warn"), (110, "5 %", "bad")] {
        clock.advance(day * days);
        let [(grave, what)] = &findings().await[..] else { panic!("after {days} more days") };
        assert!(what.starts_with("the issuing CA") && what.contains(mark) && grave == severity, "{what}");
        let mark: f64 = mark.split(' ').next().unwrap().parse().unwrap();
        let ratio = ratio(&figures(&mesh).await);
        assert!(ratio < mark / 100.0 && ratio > 0.0, "{ratio}");
    }
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn figures_are_off_by_default_and_never_leave_the_machine() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    assert!(!mesh.state_dir().join("metrics-listen").exists());
    running.stop().await.unwrap();
    let mut config = mesh.run_config();
    config.metrics_listen = Some("0.0.0.0:0".parse().unwrap());
    let environment = Environment { clock: Arc::clone(&mesh.clock), journal: None };
    let refused = Controller::build(config, environment).await.map(drop).unwrap_err();
    assert!(matches!(refused, StartupError::Config { key: "metrics_listen", .. }), "{refused:?}");
    let running = mesh.start_as(|config| config.metrics_listen = Some("[::1]:0".parse().unwrap())).await;
    let address = std::fs::read_to_string(mesh.state_dir().join("metrics-listen")).unwrap();
    let address: SocketAddr = address.trim().parse().unwrap();
    for (args, path, status) in [
        (&[][..], "/", "404"),
        (&[], "/metrics/x", "404"),
        (&["--data", "x=1"], "/metrics", "405"),
        (&["--head"], "/metrics", "200"),
    ] {
        let answer = curl(address, args, path).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{path}: {answer}");
    }
    running.stop().await.unwrap();
}
