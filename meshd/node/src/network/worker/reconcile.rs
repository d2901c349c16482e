//! From the roster to tunnel and firewall: who goes, goes first; who comes, comes last.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;
use mesh_core::NodeId;
use mesh_tunnel::{PeerConfig, PublicKey};

use super::rotation::{KeyStep, PeerKeys};
use super::{KEEPALIVE, Worker, empty_firewall};
use crate::failpoint;
use crate::failure::Failure;
use crate::findings::{Findings, Severity};
use crate::firewall::Firewall;
use crate::hostop::{Host, HostError, HostOp, TableMark};
use crate::network::endpoints::candidates;
use crate::network::overlay;
use crate::roster::Peer;

/// The finding that somebody touched the table, and how long it stands.
const TOUCHED: &str = "firewall/touched";
const TOUCHED_SHOWN: Duration = Duration::from_secs(300);

/// The finding that peers are kept which the map does not have.
const HELD: &str = "held";

impl Worker {
    /// Makes tunnel and firewall what the roster says now. First everybody who must go goes; then the
    /// firewall changes; only then newcomers are let in.
    pub(super) async fn reconcile(&mut self) {
        let wanted = self.wanted();
        self.cut_off(&wanted);
        let firewall = self.firewall_for(&wanted);
        if self.firewall.as_ref() != Some(&firewall) {
            (self.firewall, self.mark) = apply_firewall(&self.host, firewall, &self.findings).await;
        }
        if self.firewall.is_none() {
            // Fail closed: without the receiver's rules nobody is let in.
            self.cut_off(&BTreeMap::new());
        } else {
            self.let_in(wanted);
        }
    }

    /// Compares the kernel's table with the one that was applied. If another program took it away or
    /// changed it, it is forgotten, so that [`reconcile`](Self::reconcile) puts it back.
    pub(super) async fn look_at_firewall(&mut self) {
        let now = self.clock.own().now();
        if self.touched_until.is_some_and(|until| now >= until) {
            self.touched_until = None;
            self.findings.clear(TOUCHED);
        }
        match self.firewall_problem().await {
            Ok(None) => self.findings.clear("firewall/look"),
            Ok(Some(what)) => {
                self.findings.clear("firewall/look");
                let next = "find out who did: `nft flush ruleset` and a restart of nftables.service take every table";
                let what = format!("{what}; it was put back");
                self.findings.raise(TOUCHED, Severity::Warn, "this host's firewall", what, next);
                self.touched_until = Some(now + TOUCHED_SHOWN);
                (self.firewall, self.mark) = (None, None);
            }
            // What cannot be seen is not taken for lost: peers would go because `nft` is slow.
            Err(error) => {
                let failure = Failure::from(error);
                self.findings.raise(
                    "firewall/look",
                    Severity::Warn,
                    "this host's firewall",
                    format!("{}: it cannot be looked at: {}", failure.number(), failure.why),
                    failure.next,
                );
            }
        }
    }

    /// What is wrong with the kernel's table; nothing if none was applied, which is a finding of its own.
    pub(super) async fn firewall_problem(&self) -> Result<Option<String>, HostError> {
        if self.firewall.is_none() {
            return Ok(None);
        }
        let found = self.host.table_mark().await?;
        Ok(match found {
            None => Some("table inet meshd was removed by another program".to_owned()),
            found if found != self.mark => Some("table inet meshd was changed by another program".to_owned()),
            _ => None,
        })
    }

    /// Gives interface and prefixes back what they lost: an interface that was set down loses its routes
    /// and its IPv6 address. What is there stays as it is.
    pub(super) async fn restore_overlay(&self) {
        let restored = async {
            overlay::close_the_gaps(&self.host, &self.place, &self.findings).await?;
            overlay::address(&self.host, self.tunnel.name(), &self.place, &self.findings).await
        };
        match restored.await {
            Ok(()) => self.findings.clear("host/overlay"),
            Err(failure) => {
                let subject = format!("interface {}", self.tunnel.name());
                self.findings.raise_failure("host/overlay", subject, &failure);
            }
        }
    }

    /// The peers that the chains vouch for and whose leases hold.
    fn wanted(&mut self) -> BTreeMap<u32, Peer> {
        let (now, boot) = (self.clock.now(), self.clock.since_boot());
        let evaluation = self.roster.evaluate(&self.trust, &self.place, now);
        let mut keys = Vec::new();
        for (id, error) in &evaluation.refused {
            let key = format!("roster/{id:08}");
            let subject = format!("node record {id}");
            let what = format!("left out: {}", mesh_runtime::chain(error));
            self.findings.raise(
                key.clone(),
                Severity::Bad,
                subject,
                what,
                "look at this node on the controller",
            );
            keys.push(key);
        }
        self.findings.clear_others("roster/", &keys);
        self.tell_of_held();
        let mut peers = evaluation.peers;
        peers.retain(|_, peer| self.leases.holds(&peer.leaf.serial, peer.leaf.chain_not_after, now, boot));
        let serials: BTreeSet<Vec<u8>> = peers.values().map(|peer| peer.leaf.serial.clone()).collect();
        self.leases.keep(&serials);
        // One second past the end, since times in certificates are whole seconds and inclusive.
        self.next_lease = self.leases.next(boot).map(|left| boot + left + Duration::from_secs(1));
        if failpoint::PEER_REMOVAL_DISABLED.is_set() {
            for (id, peer) in &self.current {
                peers.entry(*id).or_insert_with(|| peer.clone());
            }
        }
        peers
    }

    fn tell_of_held(&self) {
        let held = self.roster.held().len();
        if held == 0 {
            return self.findings.clear(HELD);
        }
        self.findings.raise(
            HELD,
            Severity::Bad,
            "the controller's map",
            format!("it lacks {held} peers for no reason it gives; they stay until their leases end"),
            "was the controller restored from an old backup? If they shall go: revoke them, or apply a new policy",
        );
    }

    fn cut_off(&mut self, wanted: &BTreeMap<u32, Peer>) {
        let steps: Vec<(u32, PeerKeys, Option<KeyStep>)> = self
            .keys
            .iter()
            .map(|(id, keys)| (*id, *keys, wanted.get(id).map(|peer| keys.step(&peer.leaf.wireguard_keys))))
            .collect();
        for (id, keys, step) in steps {
            match step {
                None | Some(KeyStep::Replace) => self.forget_peer(id, keys),
                Some(KeyStep::Remove(key)) => {
                    self.forget_other_key(key);
                    self.keys.insert(id, PeerKeys::of(keys.in_use));
                }
                Some(KeyStep::Finish(newer)) => {
                    match self.tunnel.hand_over(&PublicKey(keys.in_use), &PublicKey(newer)) {
                        Ok(()) => {
                            self.forget_other_key(keys.in_use);
                            self.keys.insert(id, PeerKeys::of(newer));
                        }
                        // Let in anew, with its addresses, a moment later.
                        Err(error) => {
                            tracing::warn!(%error, "addresses do not move to the new key");
                            self.forget_peer(id, keys);
                        }
                    }
                }
                // Newcomers come last.
                Some(KeyStep::Add(_) | KeyStep::Stay) => {}
            }
        }
    }

    fn forget_peer(&mut self, id: u32, keys: PeerKeys) {
        keys.all().for_each(|key| self.forget_key(key));
        self.keys.remove(&id);
        if let Some(peer) = self.current.remove(&id) {
            tracing::info!(peer = peer.leaf.name, "peer cut off");
        }
    }

    fn forget_other_key(&mut self, key: [u8; 32]) {
        tracing::info!(key = %PublicKey(key), "a peer's other WireGuard key is gone");
        self.forget_key(key);
    }

    fn forget_key(&mut self, key: [u8; 32]) {
        self.tunnel.remove_peer(&PublicKey(key));
        self.ids.remove(&key);
    }

    /// Lets a peer reach us under its newer key as well. Its addresses follow once there is a session.
    fn add_key(&mut self, id: u32, peer: &Peer, newer: [u8; 32]) {
        let config =
            PeerConfig { allowed_ips: Vec::new(), ..peer_config(peer, self.table.endpoint(NodeId(id))) };
        let Some(keys) = self.keys.get_mut(&id) else { return };
        match self.tunnel.set_peer(config) {
            Ok(()) => {
                tracing::debug!(peer = peer.leaf.name, "a second key of a peer");
                keys.beside = Some(newer);
                self.ids.insert(newer, id);
            }
            // Tried again whenever the map is looked at; until then the old key carries everything.
            Err(error) => tracing::warn!(peer = peer.leaf.name, %error, "no second key"),
        }
    }

    fn let_in(&mut self, wanted: BTreeMap<u32, Peer>) {
        let now = self.clock.own().now();
        let ids: BTreeSet<NodeId> = wanted.keys().copied().map(NodeId).collect();
        self.table.handle_peers(&ids, now);
        let mut keys = Vec::new();
        for (id, peer) in wanted {
            if !self.current.contains_key(&id) {
                // A peer with a new key stays where it was.
                let known = self.table.endpoint(NodeId(id));
                if let Err(error) = self.tunnel.set_peer(peer_config(&peer, known)) {
                    let finding = format!("tunnel/{id:08}");
                    let failure = overlay::tunnel_failure(error);
                    let subject = format!("peer {}", peer.leaf.name);
                    self.findings.raise_failure(finding.clone(), subject, &failure);
                    keys.push(finding);
                    continue;
                }
                tracing::info!(peer = peer.leaf.name, ipv4 = %peer.leaf.ipv4, "peer let in");
                self.ids.insert(peer.wireguard_key(), id);
                self.keys.insert(id, PeerKeys::of(peer.wireguard_key()));
                match known {
                    Some(_) => self.table.handle_no_reply(NodeId(id), now),
                    None => {
                        let told = self.told.get(&id).map(|told| candidates(told)).unwrap_or_default();
                        self.table.handle_candidates(NodeId(id), &told, now);
                    }
                }
            }
            let step = self.keys.get(&id).map(|keys| keys.step(&peer.leaf.wireguard_keys));
            if let Some(KeyStep::Add(newer)) = step {
                self.add_key(id, &peer, newer);
            }
            self.current.insert(id, peer);
        }
        self.findings.clear_others("tunnel/", &keys);
    }

    fn firewall_for(&self, wanted: &BTreeMap<u32, Peer>) -> Firewall {
        let addresses = |peer: &Peer| (peer.leaf.ipv4, peer.leaf.ipv6);
        Firewall {
            peers: wanted.values().map(addresses).collect(),
            inbound: wanted.values().filter(|peer| peer.inbound).map(addresses).collect(),
            ..empty_firewall(self.tunnel.name(), &self.place)
        }
    }
}

/// Applies the table; `None` and a finding if that is not possible. The mark is what the kernel then has;
/// without one the table counts as changed at the next look.
pub(super) async fn apply_firewall(
    host: &Host,
    firewall: Firewall,
    findings: &Findings,
) -> (Option<Firewall>, Option<TableMark>) {
    match host.apply(HostOp::ApplyNft { text: firewall.ruleset() }).await {
        Ok(()) => {
            findings.clear("firewall");
            let mark = host.table_mark().await.unwrap_or_else(|error| {
                tracing::warn!(error = mesh_runtime::chain(&error), "firewall table cannot be looked at");
                None
            });
            (Some(firewall), mark)
        }
        Err(error) => {
            let failure = Failure::from(error);
            let what = format!("{}: no peer is let in: {}", failure.number(), failure.why);
            findings.raise("firewall", Severity::Bad, "this host's firewall", what, failure.next);
            (None, None)
        }
    }
}

fn peer_config(peer: &Peer, endpoint: Option<SocketAddr>) -> PeerConfig {
    PeerConfig {
        public_key: PublicKey(peer.wireguard_key()),
        preshared_key: None,
        endpoint,
        allowed_ips: vec![IpNet::from(IpAddr::V4(peer.leaf.ipv4)), IpNet::from(IpAddr::V6(peer.leaf.ipv6))],
        persistent_keepalive: Some(KEEPALIVE),
    }
}
