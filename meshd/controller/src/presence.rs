//! Live facts about nodes: who is connected, what they have, where they are. Nothing of this is in
//! the journal; a restart forgets it and the nodes tell it again.

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use mesh_core::{NodeId, Serial, UtcTime};
use mesh_proto::v1 as pb;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::limits::{ENDPOINT_TTL, SIGHTINGS_PER_NODE_MAX, TAKEOVER_WINDOW, TAKEOVERS_SUSPICIOUS};

/// What the controller knows about a node at this moment.
#[derive(Debug, Clone, Default)]
pub(crate) struct NodePresence {
    pub(crate) connected: bool,
    pub(crate) last_seen: Option<UtcTime>,
    pub(crate) version: String,
    pub(crate) backend: String,
    pub(crate) acknowledged_seq: u64,
    /// By issuer key id and shard: the number of the CRL that is on the node's disk.
    pub(crate) crls: BTreeMap<(Vec<u8>, u32), u64>,
    /// The newest bundle it has taken up, and the identity under which it said so.
    pub(crate) trust: u64,
    pub(crate) serial: Option<Serial>,
    pub(crate) findings: Vec<String>,
    pub(crate) clock_offset_secs: i64,
    pub(crate) endpoints: Vec<pb::Endpoint>,
    /// Where peers see it, the newest first.
    sightings: VecDeque<pb::Endpoint>,
    /// Rises whenever `endpoints` changes; drawn from one counter of all nodes.
    pub(crate) endpoints_version: u64,
    endpoints_at: Option<Instant>,
    /// It came back with a cursor of a history that is not ours.
    pub(crate) forked: bool,
    /// Streams in a row that took the place of a live one, and when the last one did.
    takeovers: u32,
    taken_over_at: Option<Instant>,
    session: u64,
}

#[derive(Debug, Default)]
struct Inner {
    nodes: BTreeMap<NodeId, NodePresence>,
    closers: BTreeMap<NodeId, CancellationToken>,
    /// Who changed its endpoints last, by version, so that a stream looks at changes only.
    by_version: BTreeMap<u64, NodeId>,
    next_session: u64,
    next_version: u64,
}

/// All of it, shared.
#[derive(Debug)]
pub(crate) struct Presence {
    inner: Mutex<Inner>,
    /// Changes when anything that a receipt waits for may have changed.
    acks: watch::Sender<u64>,
    /// The newest endpoints version.
    hints: watch::Sender<u64>,
}

/// One node's stream, for as long as it lives. Dropping it marks the node as gone, unless a newer
/// stream has taken its place.
#[derive(Debug)]
pub(crate) struct Session<'a> {
    presence: &'a Presence,
    node: NodeId,
    number: u64,
    pub(crate) replaced: CancellationToken,
}

/// What a node says about itself in its hello.
#[derive(Debug)]
pub(crate) struct Greeting {
    pub(crate) version: String,
    pub(crate) backend: String,
    pub(crate) clock_offset_secs: i64,
    pub(crate) crls: Vec<pb::CrlHave>,
    pub(crate) endpoints: Vec<pb::Endpoint>,
    /// The record of the map it came back with, which it has on disk and in effect; 0 without one.
    pub(crate) holds_seq: u64,
    pub(crate) trust: u64,
    /// The identity that opened the stream.
    pub(crate) serial: Option<Serial>,
    /// Its cursor names another history than ours.
    pub(crate) forked: bool,
}

impl Presence {
    pub(crate) fn new() -> Self {
        Self { inner: Mutex::default(), acks: watch::Sender::new(0), hints: watch::Sender::new(0) }
    }

    /// Takes up a node's new stream. An older stream of the same node is told to end.
    pub(crate) fn connect(
        &self,
        node: NodeId,
        greeting: Greeting,
        (now, at): (Instant, UtcTime),
    ) -> Session<'_> {
        let replaced = CancellationToken::new();
        let number = {
            let mut inner = self.lock();
            inner.next_session += 1;
            let number = inner.next_session;
            let older = inner.closers.insert(node, replaced.clone());
            if let Some(older) = &older {
                tracing::warn!(%node, "a second stream of one node: the older one ends");
                older.cancel();
            }
            let entry = inner.nodes.entry(node).or_default();
            entry.connected = true;
            entry.last_seen = Some(at);
            entry.version = greeting.version;
            entry.backend = greeting.backend;
            entry.clock_offset_secs = greeting.clock_offset_secs;
            entry.session = number;
            entry.forked = greeting.forked;
            entry.note_takeover(older.is_some().then_some(now));
            entry.acknowledged_seq = entry.acknowledged_seq.max(greeting.holds_seq);
            entry.trust = greeting.trust;
            entry.serial = greeting.serial;
            entry.note_crls(&greeting.crls);
            number
        };
        self.report_endpoints(node, greeting.endpoints, now);
        self.acks.send_modify(|version| *version += 1);
        Session { presence: self, node, number, replaced }
    }

    /// When each node was last heard of, for the next start.
    pub(crate) fn last_seen(&self, now: UtcTime) -> BTreeMap<NodeId, UtcTime> {
        let inner = self.lock();
        let seen = inner.nodes.iter().filter_map(|(id, node)| {
            let at = if node.connected { Some(now) } else { node.last_seen };
            at.map(|at| (*id, at))
        });
        seen.collect()
    }

    /// Takes up what the process before knew.
    pub(crate) fn recall(&self, last_seen: BTreeMap<NodeId, UtcTime>) {
        let mut inner = self.lock();
        for (id, at) in last_seen {
            inner.nodes.entry(id).or_default().last_seen = Some(at);
        }
    }

    /// What is known about `node`; defaults if nothing is.
    pub(crate) fn of(&self, node: NodeId) -> NodePresence {
        self.lock().nodes.get(&node).cloned().unwrap_or_default()
    }

    /// Forgets a node that will not come back.
    pub(crate) fn forget(&self, node: NodeId) {
        let mut inner = self.lock();
        if let Some(gone) = inner.nodes.remove(&node) {
            inner.by_version.remove(&gone.endpoints_version);
        }
        if let Some(closer) = inner.closers.remove(&node) {
            closer.cancel();
        }
    }

    /// Endpoints of every node that changed after version `since` and still live, oldest change first.
    pub(crate) fn endpoints_since(&self, since: u64, now: Instant) -> Vec<(NodeId, u64, Vec<pb::Endpoint>)> {
        let inner = self.lock();
        let live = |n: &NodePresence| {
            n.connected || n.endpoints_at.is_some_and(|at| now.saturating_duration_since(at) < ENDPOINT_TTL)
        };
        inner
            .by_version
            .range(since.saturating_add(1)..)
            .filter_map(|(version, id)| Some((*id, *version, inner.nodes.get(id)?)))
            .filter(|(.., node)| live(node))
            .map(|(id, version, node)| (id, version, node.all_endpoints()))
            .collect()
    }

    /// Notes what a node reports about itself; the same list again changes nothing.
    pub(crate) fn report_endpoints(&self, node: NodeId, endpoints: Vec<pb::Endpoint>, now: Instant) {
        let version = {
            let mut inner = self.lock();
            let next = inner.next_version + 1;
            let Some(entry) = inner.nodes.get_mut(&node) else { return };
            entry.endpoints_at = Some(now);
            if entry.endpoints == endpoints {
                return;
            }
            entry.endpoints = endpoints;
            inner.endpoints_changed(node, next);
            next
        };
        self.hints.send_replace(version);
    }

    /// Notes where a peer sees a node that is connected. What the node says of itself stands before it.
    pub(crate) fn report_sighting(&self, node: NodeId, endpoint: pb::Endpoint) {
        let version = {
            let mut inner = self.lock();
            let next = inner.next_version + 1;
            let Some(entry) = inner.nodes.get_mut(&node).filter(|entry| entry.connected) else { return };
            let told = entry.endpoints.iter().chain(&entry.sightings);
            if told.into_iter().any(|known| known.address == endpoint.address) {
                return;
            }
            entry.sightings.push_front(endpoint);
            entry.sightings.truncate(SIGHTINGS_PER_NODE_MAX);
            inner.endpoints_changed(node, next);
            next
        };
        self.hints.send_replace(version);
    }

    pub(crate) fn watch_acks(&self) -> watch::Receiver<u64> {
        self.acks.subscribe()
    }

    pub(crate) fn watch_hints(&self) -> watch::Receiver<u64> {
        self.hints.subscribe()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn endpoints_changed(&mut self, node: NodeId, version: u64) {
        let Some(entry) = self.nodes.get_mut(&node) else { return };
        let before = std::mem::replace(&mut entry.endpoints_version, version);
        self.next_version = version;
        self.by_version.remove(&before);
        self.by_version.insert(version, node);
    }
}

impl NodePresence {
    /// What it reports and what others report of it.
    fn all_endpoints(&self) -> Vec<pb::Endpoint> {
        let own = |address: &str| self.endpoints.iter().any(|endpoint| endpoint.address == address);
        let seen = self.sightings.iter().filter(|seen| !own(&seen.address));
        self.endpoints.iter().chain(seen).cloned().collect()
    }

    fn note_crls(&mut self, crls: &[pb::CrlHave]) {
        for crl in crls {
            let number = self.crls.entry((crl.issuer_key_id.to_vec(), crl.shard)).or_default();
            *number = (*number).max(crl.number);
        }
    }

    /// Notes a new stream; `at` is set if it took the place of a live one.
    fn note_takeover(&mut self, at: Option<Instant>) {
        let recent =
            |last: Instant| at.is_some_and(|at| at.saturating_duration_since(last) < TAKEOVER_WINDOW);
        let before = if self.taken_over_at.is_some_and(recent) { self.takeovers } else { 0 };
        self.takeovers = if at.is_some() { before.saturating_add(1) } else { 0 };
        self.taken_over_at = at;
    }

    /// Whether two machines seem to use this node's key in turn.
    pub(crate) fn is_doubled(&self) -> bool {
        self.takeovers >= TAKEOVERS_SUSPICIOUS
    }

    /// Whether the node has this CRL or a newer one.
    pub(crate) fn has_crl(&self, issuer: &[u8], shard: u32, number: u64) -> bool {
        self.crls.get(&(issuer.to_vec(), shard)).is_some_and(|have| *have >= number)
    }
}

impl Session<'_> {
    /// Notes an acknowledgement: cumulative, so a smaller number than before says nothing.
    pub(crate) fn acknowledge(&self, ack: &pb::sync_request::Ack, findings: Vec<String>, at: UtcTime) {
        {
            let mut inner = self.presence.lock();
            let Some(entry) = inner.nodes.get_mut(&self.node) else { return };
            if entry.session != self.number {
                return;
            }
            entry.acknowledged_seq = entry.acknowledged_seq.max(ack.seq);
            entry.note_crls(&ack.crls);
            entry.trust = ack.trust;
            entry.findings = findings;
            entry.last_seen = Some(at);
        }
        self.presence.acks.send_modify(|version| *version += 1);
    }

    /// Notes that the node is alive.
    pub(crate) fn seen(&self, at: UtcTime) {
        if let Some(entry) = self.presence.lock().nodes.get_mut(&self.node) {
            entry.last_seen = Some(at);
        }
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        {
            let mut inner = self.presence.lock();
            let current = inner.nodes.get(&self.node).is_some_and(|entry| entry.session == self.number);
            if !current {
                return;
            }
            inner.closers.remove(&self.node);
            if let Some(entry) = inner.nodes.get_mut(&self.node) {
                entry.connected = false;
            }
        }
        self.presence.acks.send_modify(|version| *version += 1);
    }
}

/// The address under which the controller sees a node, as a candidate for its peers: the source of
/// its connection with the port that its WireGuard listens on.
pub(crate) fn seen_endpoint(source: Option<IpAddr>, wireguard_port: u32) -> Option<pb::Endpoint> {
    let port = u16::try_from(wireguard_port).ok().filter(|port| *port != 0)?;
    let address = std::net::SocketAddr::new(source?.to_canonical(), port);
    Some(pb::Endpoint { address: address.to_string(), source: pb::endpoint::Source::ControllerSaw as i32 })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn greeting() -> Greeting {
        Greeting {
            version: "0.1.0".into(),
            backend: "userspace".into(),
            clock_offset_secs: 0,
            crls: vec![],
            endpoints: vec![],
            holds_seq: 0,
            trust: 0,
            serial: None,
            forked: false,
        }
    }

    fn times() -> (Instant, UtcTime) {
        (Instant::now(), UtcTime::from_unix(1_700_000_000))
    }

    #[test]
    fn the_newest_stream_wins_and_the_end_of_the_older_one_changes_nothing() {
        let presence = Presence::new();
        let first = presence.connect(NodeId(1), greeting(), times());
        let second = presence.connect(NodeId(1), greeting(), times());
        assert!(first.replaced.is_cancelled());
        assert!(!second.replaced.is_cancelled());
        drop(first);
        assert!(presence.of(NodeId(1)).connected);
        drop(second);
        assert!(!presence.of(NodeId(1)).connected);
        assert!(presence.of(NodeId(1)).last_seen.is_some());
    }

    #[test]
    fn one_key_in_two_places_shows_until_a_clean_return() {
        let presence = Presence::new();
        let (start, at) = times();
        let connect = |secs| presence.connect(NodeId(1), greeting(), (start + Duration::from_secs(secs), at));
        let doubled = || presence.of(NodeId(1)).is_doubled();
        let mut live = connect(0);
        // A node that comes back before its dead stream was noticed, each time long after the last.
        for hours in 1..4 {
            live = connect(hours * 3600);
            assert!(!doubled());
        }
        // The copy takes over, and the original takes over again.
        for secs in [100, 130] {
            live = connect(4 * 3600 + secs);
        }
        assert!(doubled());
        drop(live);
        assert!(doubled(), "the end of the stream is no all-clear");
        let _clean = connect(5 * 3600);
        assert!(!doubled());
    }

    #[test]
    fn acknowledgements_never_go_back() {
        let presence = Presence::new();
        let session = presence.connect(NodeId(1), greeting(), times());
        let ack = |seq, number| pb::sync_request::Ack {
            seq,
            crls: vec![pb::CrlHave { issuer_key_id: vec![9].into(), shard: 0, number }],
            findings: vec![],
            trust: 0,
        };
        session.acknowledge(&ack(7, 3), vec![], times().1);
        session.acknowledge(&ack(5, 2), vec![], times().1);
        let node = presence.of(NodeId(1));
        assert_eq!(node.acknowledged_seq, 7);
        assert!(node.has_crl(&[9], 0, 3));
        assert!(!node.has_crl(&[9], 0, 4));
        assert!(!node.has_crl(&[8], 0, 1));
    }

    #[test]
    fn only_changed_endpoints_are_told_again() {
        let presence = Presence::new();
        let (now, at) = times();
        let _a = presence.connect(NodeId(1), greeting(), (now, at));
        let _b = presence.connect(NodeId(2), greeting(), (now, at));
        let endpoint = |text: &str| vec![pb::Endpoint { address: text.into(), source: 1 }];
        presence.report_endpoints(NodeId(1), endpoint("192.0.2.1:1"), now);
        presence.report_endpoints(NodeId(2), endpoint("192.0.2.2:1"), now);
        let all = presence.endpoints_since(0, now);
        assert_eq!(all.len(), 2);
        let newest = all.iter().map(|(_, version, _)| *version).max().unwrap();
        presence.report_endpoints(NodeId(1), endpoint("192.0.2.1:1"), now);
        assert!(presence.endpoints_since(newest, now).is_empty());
        presence.report_endpoints(NodeId(1), endpoint("192.0.2.9:1"), now);
        let changed = presence.endpoints_since(newest, now);
        assert_eq!(changed.len(), 1);
        assert_eq!(changed[0].0, NodeId(1));
    }

    #[test]
    fn what_peers_see_stands_behind_what_a_node_says_and_is_bounded() {
        let presence = Presence::new();
        let (now, at) = times();
        let _session = presence.connect(NodeId(1), greeting(), (now, at));
        let endpoint = |text: &str, source| pb::Endpoint { address: text.into(), source };
        presence.report_endpoints(NodeId(1), vec![endpoint("192.0.2.1:1", 1)], now);
        for seen in ["192.0.2.1:1", "192.0.2.2:2", "192.0.2.3:3", "192.0.2.3:3", "192.0.2.4:4"] {
            presence.report_sighting(NodeId(1), endpoint(seen, 4));
            presence.report_sighting(NodeId(9), endpoint(seen, 4));
        }
        let told = presence.endpoints_since(0, now);
        let addresses: Vec<_> = told[0].2.iter().map(|endpoint| endpoint.address.as_str()).collect();
        assert_eq!(addresses, ["192.0.2.1:1", "192.0.2.4:4", "192.0.2.3:3"]);
        assert_eq!((told.len(), told[0].1), (1, 4), "a node that is not there has no entry");
    }

    #[test]
    fn a_mapped_source_is_shown_as_ipv4() {
        let source: IpAddr = "::ffff:192.0.2.7".parse().unwrap();
        let endpoint = seen_endpoint(Some(source), 51820).unwrap();
        assert_eq!(endpoint.address, "192.0.2.7:51820");
        assert_eq!(seen_endpoint(Some(source), 0), None);
        assert_eq!(seen_endpoint(None, 51820), None);
    }
}
