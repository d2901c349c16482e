//! A change of WireGuard keys under traffic.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use mesh_lab::Lab;
use mesh_tests::{Fleet, fleet_test};
use mesh_tunnel::{PeerConfig, PrivateKey, PublicKey, Tunnel, TunnelBuilder};
use nix::sys::signal::Signal;

/// Between two echoes, and the longest time without any that a change of keys may cost.
const EVERY: Duration = Duration::from_millis(10);
const GAP_MAX: Duration = Duration::from_secs(1);

/// The node's newest public key, as the controller has it.
fn public_key(fleet: &Fleet, name: &str) -> String {
    let node = fleet.controller(&["node", "show", name, "-o", "json"]).ok().json();
    node["wireguardPublicKey"].as_str().unwrap_or_else(|| panic!("no key in {node}")).to_owned()
}

/// The node's private keys, newest first, from its disk.
fn private_keys(fleet: &Fleet, name: &str) -> Vec<[u8; 32]> {
    let text = std::fs::read_to_string(fleet.state(name).join("identity.json")).unwrap();
    let identity: serde_json::Value = serde_json::from_str(&text).unwrap();
    let keys = identity["wireguard_keys"].as_array().unwrap().iter();
    keys.map(|key| STANDARD.decode(key.as_str().unwrap()).unwrap().try_into().unwrap()).collect()
}

fn start_echoes(fleet: &mut Fleet, from: &str, to: &str) {
    let (name, to) = (format!("ping-{from}"), fleet.addresses_known(to).0.to_string());
    let interval = EVERY.as_secs_f64().to_string();
    let echoes = fleet.command(from, "ping", &["-n", "-i", &interval, "-W1", &to]);
    fleet.processes.spawn(&name, echoes).unwrap();
    fleet.until("the first echo", |fleet| fleet.processes.log(&name).contains("icmp_seq=1 "));
}

/// Ends the echoes; how many were sent, and the longest time in which none was answered.
fn end_echoes(fleet: &mut Fleet, from: &str) -> (u64, Duration) {
    let name = format!("ping-{from}");
    fleet.processes.signal(&name, Signal::SIGINT).unwrap();
    fleet.processes.wait(&name, mesh_tests::DEADLINE).unwrap();
    let log = fleet.processes.log(&name);
    let numbers =
        log.lines().filter_map(|line| line.split("icmp_seq=").nth(1)?.split(' ').next()?.parse().ok());
    let mut numbers: Vec<u64> = numbers.collect();
    numbers.sort_unstable();
    let sent: u64 =
        log.lines().find_map(|line| line.split(" packets transmitted").next()?.parse().ok()).unwrap();
    let edges = numbers.windows(2).map(|pair| pair[1] - pair[0] - 1).max().unwrap_or(sent);
    let tail = sent.saturating_sub(*numbers.last().unwrap_or(&0));
    (sent, EVERY * u32::try_from(edges.max(tail)).unwrap())
}

/// Whoever holds `private` speaks to node `name` from the host `outsider`.
fn pose(
    fleet: &Fleet,
    outsider: &str,
    (interface, private): (&str, [u8; 32]),
    name: &str,
) -> Box<dyn Tunnel> {
    let public_key: PublicKey = public_key(fleet, name).parse().unwrap();
    let endpoint = (fleet.host(name).ipv4().unwrap(), 51820).into();
    let builder = TunnelBuilder::new(interface, PrivateKey::from_bytes(private));
    let tunnel = fleet.host(outsider).run(|| builder.open()).unwrap().unwrap();
    let peer = PeerConfig {
        endpoint: Some(endpoint),
        persistent_keepalive: Some(Duration::from_secs(1)),
        ..PeerConfig::new(public_key)
    };
    tunnel.set_peer(peer).unwrap();
    tunnel
}

#[test]
fn keys_change_under_traffic_without_a_gap_and_the_old_one_is_dead() {
    fleet_test("rotation::keys_change_under_traffic_without_a_gap_and_the_old_one_is_dead", || {
        let mut fleet = Fleet::with_nodes(&["alpha", "bravo"]);
        let old = private_keys(&fleet, "bravo")[0];
        start_echoes(&mut fleet, "alpha", "bravo");
        start_echoes(&mut fleet, "bravo", "alpha");
        for name in ["bravo", "alpha"] {
            let before = public_key(&fleet, name);
            fleet.controller(&["node", "rotate-keys", name]).ok();
            fleet.until("the new key is on record", |fleet| public_key(fleet, name) != before);
            fleet.until("the old key is dead", |fleet| {
                fleet.processes.log(name).contains("the old WireGuard key is dead")
            });
            fleet.until("the certificate forgets the old key", |fleet| private_keys(fleet, name).len() == 1);
            let peer = if name == "alpha" { "bravo" } else { "alpha" };
            fleet.until("the peer forgets it too", |fleet| {
                let status = fleet.meshctl(peer, &["status", "-o", "json"]).ok().json();
                status["peers"][0]["wireguardPublicKey"] == public_key(fleet, name)
                    && fleet.processes.log(peer).contains("a peer's other WireGuard key is gone")
            });
        }
        for name in ["alpha", "bravo"] {
            let (sent, gap) = end_echoes(&mut fleet, name);
            eprintln!("{name}: {sent} echoes, longest gap {gap:?}");
            assert!(sent > 100 && gap <= GAP_MAX, "{name}: {gap:?} without an answer, of {sent}");
        }
        fleet.lab.add_host("outsider", &Lab::underlay(99)).unwrap();
        let dead = pose(&fleet, "outsider", ("old0", old), "alpha");
        let newest = private_keys(&fleet, "bravo")[0];
        let living = pose(&fleet, "outsider", ("new0", newest), "alpha");
        // Both asked; that the living key is answered shows that the dead one was heard.
        fleet.until("the living key opens a session", |_| living.peers()[0].has_session);
        fleet.until("the dead key was tried again", |_| dead.peers()[0].tx_bytes >= 2 * 148);
        assert!(!dead.peers()[0].has_session && dead.peers()[0].rx_bytes == 0, "{:?}", dead.peers());
    });
}
