//! What a node tells of the ways to its peers, and where a broken one is broken.

use mesh_tests::{Fleet, fleet_test};
use nix::sys::signal::Signal;
use serde_json::Value;

/// The layers that were tried, with their outcome, and what is said about the last.
fn walk(fleet: &Fleet, from: &str, to: &str) -> (Vec<(String, bool)>, Value) {
    let ran = fleet.meshctl(from, &["ping", to, "-c1", "-o", "json"]);
    let document = ran.json();
    let replies = document["replies"].as_array().unwrap().clone();
    let layers = replies
        .iter()
        .map(|reply| (reply["layer"].as_str().unwrap().to_owned(), reply["ok"] == true))
        .collect();
    assert_eq!(document["reachable"] == true, ran.code == 0, "{ran}");
    (layers, replies.last().cloned().unwrap_or_default())
}

fn layers(outcomes: &[(&str, bool)]) -> Vec<(String, bool)> {
    outcomes.iter().map(|(layer, ok)| ((*layer).to_owned(), *ok)).collect()
}

fn peer(fleet: &Fleet, of: &str) -> Value {
    fleet.meshctl(of, &["status", "-o", "json"]).ok().json()["peers"][0].clone()
}

#[test]
fn a_ping_stops_at_the_broken_layer_and_the_status_measures() {
    fleet_test("ping::a_ping_stops_at_the_broken_layer_and_the_status_measures", || {
        let mut fleet = Fleet::with_nodes(&["alpha", "bravo"]);
        let (found, _) = walk(&fleet, "alpha", "bravo");
        assert_eq!(found, layers(&[("underlay", true), ("handshake", true), ("overlay", true)]));
        fleet.until("the path is measured", |fleet| {
            let peer = peer(fleet, "alpha");
            peer["probes"].as_u64() > Some(0)
                && peer["rttMicros"].as_u64() > Some(0)
                && peer["probesLost"] == 0
        });
        let endpoint = fleet.host("bravo").ipv4().unwrap();
        assert_eq!(peer(&fleet, "alpha")["endpoint"], format!("{endpoint}:51820"));

        let ruleset = "add table inet deny; add chain inet deny in { type filter hook input priority 10; }; \
                       add rule inet deny in iifname mesh0 meta l4proto icmp drop";
        fleet.on("bravo", "nft", &[ruleset]).ok();
        let (found, last) = walk(&fleet, "alpha", "bravo");
        assert_eq!(found, layers(&[("underlay", true), ("handshake", true), ("overlay", false)]));
        assert!(last["next"].as_str().unwrap().contains("ICMP"), "{last}");
        fleet.on("bravo", "nft", &["delete table inet deny"]).ok();

        // Asleep: its port is open and nobody answers.
        fleet.processes.signal("bravo", Signal::SIGSTOP).unwrap();
        let (found, last) = walk(&fleet, "alpha", "bravo");
        assert_eq!(found, layers(&[("underlay", true), ("handshake", false)]), "{last}");
        assert!(last["detail"].as_str().unwrap().contains("no answer from"), "{last}");
        assert!(last["next"].as_str().unwrap().contains("UDP port"), "{last}");
        fleet.until("the losses show", |fleet| peer(fleet, "alpha")["probesLost"].as_u64() > Some(0));
    });
}
