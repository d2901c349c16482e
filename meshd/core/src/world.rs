//! The fold of the journal: what the mesh is now, who may change it, what a command would change.
//!
//! [`World::decide`] says what a command would do, [`World::apply`] does it. Whatever must be atomic is
//! checked in `decide`, which one writer runs in order; so nothing can slip in between check and act.

mod apply;
mod decide;
mod index;
mod shards;
mod shared;
mod state;
pub(crate) mod trust;
mod wish;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Bound;
use std::sync::Arc;

use ipnet::Ipv6Net;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

pub use self::decide::Decision;
use self::index::Index;
pub use self::shards::{Place, ShardGroup, crl_path, is_base_url};
pub use self::state::*;
pub use self::wish::{About, Asker, Verdict, Wish};
use crate::addresses;
use crate::authority::{Authority, Bundle, Cross, Rotation};
use crate::certificate::Owner;
use crate::change::{Change, Record};
use crate::command::{Actor, Request, Role};
use crate::ids::{KeyHash, KeyId, NodeId, OperationId, Serial, TokenId, WgKey};
use crate::limits::{CLOCK_JUMP_MAX, RESUME_WINDOW};
use crate::names::{self, DnsName, NodeName, OperatorName};
use crate::policy::{Policy, Selector, Subject};
use crate::refusal::Refusal;
use crate::time::UtcTime;

/// The state of a mesh after some record of its journal. A plain value: two worlds that applied the same
/// records are equal. Serialises as its snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct World {
    state: State,
    /// Derived from `state`; never serialised.
    index: Index,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    mesh: Option<Mesh>,
    head_seq: u64,
    last_time: UtcTime,
    clock_held: bool,
    /// The controller's newest certificate.
    controller: Option<Serial>,
    nodes: BTreeMap<NodeId, Node>,
    /// Indexes of removed nodes: never given again.
    retired: BTreeSet<NodeId>,
    highest_node: u32,
    /// Shared with copies of this world: those of a snapshot are made while everybody waits.
    #[serde(with = "shared")]
    certificates: BTreeMap<Serial, Arc<CertificateState>>,
    tokens: BTreeMap<TokenId, Token>,
    operators: BTreeMap<OperatorName, Operator>,
    blocked_keys: BTreeSet<KeyHash>,
    blocked_wireguard: BTreeSet<WgKey>,
    policy: Policy,
    policy_toml: String,
    policy_version: u64,
    crls: BTreeMap<KeyId, BTreeMap<u16, CrlState>>,
    shard_groups: BTreeMap<KeyId, Vec<ShardGroup>>,
    /// The record of the newest revocation in each shard.
    revoked_seq: BTreeMap<KeyId, BTreeMap<u16, u64>>,
    operations: BTreeMap<OperationId, Operation>,
    touched: VecDeque<(u64, Touched)>,
    /// Touches of records up to this one are forgotten.
    touched_floor: u64,
    pruned_at: UtcTime,
    /// In the order of their coming.
    #[serde(default)]
    authorities: Vec<Authority>,
    #[serde(default)]
    crosses: Vec<Cross>,
    /// By version; the newest is what nodes are to trust.
    #[serde(default)]
    bundles: BTreeMap<u64, Bundle>,
    #[serde(default)]
    rotation: Option<Rotation>,
}

/// Sequence numbers, time, and the mesh as a whole.
impl World {
    /// The world before the first record.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sequence number of the last record applied; 0 before the first.
    pub fn head_seq(&self) -> u64 {
        self.state.head_seq
    }

    /// Time of the last record.
    pub fn last_time(&self) -> UtcTime {
        self.state.last_time
    }

    /// Whether time-dependent commands wait until somebody confirms the clock.
    pub fn clock_held(&self) -> bool {
        self.state.clock_held
    }

    /// The time of the next record when the clock says `clock`: never before the last record's, and
    /// standing still while the clock is held, so that nothing expires by a wrong clock.
    pub fn record_time(&self, clock: UtcTime) -> UtcTime {
        if self.state.clock_held { self.state.last_time } else { clock.max(self.state.last_time) }
    }

    /// Whether the clock ran so far ahead of `expected` (the last reading plus what the monotonic clock
    /// counted since) that the caller must give [`Command::HoldClock`](crate::Command::HoldClock).
    pub fn clock_jumped(expected: UtcTime, clock: UtcTime) -> bool {
        clock.since(expected) > CLOCK_JUMP_MAX
    }

    /// What was fixed at creation; `None` before the first record.
    pub fn mesh(&self) -> Option<&Mesh> {
        self.state.mesh.as_ref()
    }

    pub fn domain(&self) -> Option<&DnsName> {
        self.mesh().map(|mesh| &mesh.domain)
    }

    pub fn fleet(&self) -> Option<&str> {
        self.mesh().map(|mesh| mesh.fleet.as_str())
    }

    pub fn mesh_id(&self) -> Option<&[u8; 16]> {
        self.mesh().map(|mesh| &mesh.mesh_id)
    }

    pub fn ipv6_prefix(&self) -> Option<Ipv6Net> {
        self.mesh().map(Mesh::ipv6_prefix)
    }

    pub fn ipv6_of(&self, node: NodeId) -> Option<Ipv6Addr> {
        self.mesh().map(|mesh| mesh.ipv6_of(node))
    }

    /// The record of a decision that was taken on this world.
    pub fn record(&self, at: UtcTime, request: &Request, changes: Vec<Change>) -> Record {
        Record {
            operation: request.operation,
            at: at.max(self.state.last_time),
            actor: request.actor.clone(),
            who: self.who(&request.actor),
            action: request.command.kind().action().to_owned(),
            changes,
        }
    }

    /// The actor as the audit log shows it, e.g. `node web-1`.
    pub fn who(&self, actor: &Actor) -> String {
        match actor {
            Actor::Node { id, .. } => match self.node(*id) {
                Some(node) => format!("node {}", node.name),
                None => actor.to_string(),
            },
            _ => actor.to_string(),
        }
    }

    /// A request that took effect within the last 24 hours.
    pub fn operation(&self, id: &OperationId) -> Option<&Operation> {
        self.state.operations.get(id)
    }

    /// What records after `seq` touched. `None` when `seq` is too old, or ahead of this world.
    pub fn touched_since(&self, seq: u64) -> Option<Touched> {
        if seq < self.state.touched_floor || seq > self.state.head_seq {
            return None;
        }
        let mut all = Touched::default();
        let first = self.state.touched.partition_point(|(at, _)| *at <= seq);
        self.state.touched.range(first..).for_each(|(_, touched)| all.merge(touched));
        Some(all)
    }
}

/// Nodes and addresses.
impl World {
    pub fn node(&self, id: NodeId) -> Option<&Node> {
        self.state.nodes.get(&id)
    }

    pub fn node_by_name(&self, name: &NodeName) -> Option<&Node> {
        self.index.node_by_name.get(name).and_then(|id| self.node(*id))
    }

    /// Pending, active and revoked nodes, by index.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.state.nodes.values()
    }

    /// The node that uses or ever used a WireGuard key.
    pub fn node_by_wireguard(&self, key: &WgKey) -> Option<&Node> {
        self.index.node_by_wireguard.get(key).and_then(|id| self.node(*id))
    }

    /// One past the highest index ever used.
    pub fn next_node_id(&self) -> NodeId {
        NodeId(self.state.highest_node.saturating_add(1))
    }

    /// Whether an index was never used.
    pub fn node_id_free(&self, id: NodeId) -> bool {
        id.0 > 0 && !self.state.nodes.contains_key(&id) && !self.state.retired.contains(&id)
    }

    /// Whether a pool address has no node and no unexpired certificate names it.
    pub fn ipv4_free(&self, address: Ipv4Addr) -> bool {
        self.mesh().is_some_and(|mesh| addresses::is_host(&mesh.ipv4_pool, address))
            && !self.index.node_by_ipv4.contains_key(&address)
            && !self.index.serials_by_name.contains_key(&IpAddr::V4(address).to_string())
    }

    /// Free pool addresses, beginning at the one whose host part is the next node's index.
    pub fn free_ipv4(&self) -> impl Iterator<Item = Ipv4Addr> {
        let start = self.next_node_id().0;
        let hosts = self.mesh().map(|mesh| addresses::hosts_from(mesh.ipv4_pool, start));
        hosts.into_iter().flatten().filter(|address| self.ipv4_free(*address))
    }

    /// Who owns a name; `None` for free names and those outside the domain.
    pub fn owner_of_name(&self, name: &DnsName) -> Option<NameOwner> {
        let mesh = self.mesh()?;
        if *name == mesh.domain {
            return Some(NameOwner::Reserved);
        }
        let label = name.label_under(&mesh.domain)?;
        if label == mesh.controller_name {
            return Some(NameOwner::Controller);
        }
        if names::is_reserved(label) {
            return Some(NameOwner::Reserved);
        }
        let node = NodeName::try_from(label).ok().and_then(|label| self.index.node_by_name.get(&label));
        if let Some(node) = node {
            return Some(NameOwner::Node(*node));
        }
        if self.policy().grants(name) {
            return Some(NameOwner::Grant);
        }
        let serials = self.index.serials_by_name.get(name.as_str()).into_iter().flatten();
        let mut live = serials.filter_map(|serial| self.certificate(serial));
        live.find(|certificate| {
            matches!(certificate.owner, Owner::Detached { .. }) && certificate.is_live(self.last_time())
        })
        .map(|certificate| NameOwner::Detached(certificate.serial))
    }

    /// Service names that policy grants to an active node, sorted.
    pub fn granted_names(&self, node: NodeId) -> BTreeSet<DnsName> {
        match self.node(node) {
            Some(node) if node.state == NodeState::Active => {
                self.policy().granted(subject(node)).into_iter().cloned().collect()
            }
            _ => BTreeSet::new(),
        }
    }

    /// Pairs of a node that must not be issued until somebody on the node asks again by hand.
    pub fn stopped_names(&self, node: NodeId) -> BTreeSet<String> {
        self.node(node).map(|node| node.stopped.keys().cloned().collect()).unwrap_or_default()
    }
}

/// Certificates, keys and CRLs.
impl World {
    pub fn certificate(&self, serial: &Serial) -> Option<&CertificateState> {
        self.state.certificates.get(serial).map(|certificate| &**certificate)
    }

    /// Live certificates, and ended ones that are still needed, by serial.
    pub fn certificates(&self) -> impl Iterator<Item = &CertificateState> {
        self.state.certificates.values().map(|certificate| &**certificate)
    }

    /// Certificates of a node and its services.
    pub fn certificates_of(&self, node: NodeId) -> impl Iterator<Item = &CertificateState> {
        let serials = self.index.serials_by_node.get(&node).into_iter().flatten();
        serials.filter_map(|serial| self.certificate(serial))
    }

    /// Certificates whose end and serial lie after these, soonest end first.
    pub fn certificates_by_end(&self, after: (UtcTime, Serial)) -> impl Iterator<Item = &CertificateState> {
        let later = self.index.ends.range((Bound::Excluded(after), Bound::Unbounded));
        later.filter_map(|(_, serial)| self.certificate(serial))
    }

    /// How many certificates have not ended at `at`. Takes no longer for many: those that ended leave World soon.
    pub fn certificate_counts(&self, at: UtcTime) -> CertificateCounts {
        let ended = self.index.ends.iter().take_while(|(not_after, _)| *not_after <= at);
        let ended: Vec<&CertificateState> =
            ended.filter_map(|(_, serial)| self.certificate(serial)).collect();
        let ended_revoked = ended.iter().filter(|certificate| certificate.revoked.is_some()).count();
        let shards = self.index.revoked.values().flat_map(BTreeMap::values);
        let revoked = shards.map(BTreeMap::len).sum::<usize>() - ended_revoked;
        CertificateCounts { live: self.state.certificates.len() - ended.len() - revoked, revoked }
    }

    /// The controller's newest certificate.
    pub fn controller_serial(&self) -> Option<Serial> {
        self.state.controller
    }

    pub fn key_blocked(&self, key: &KeyHash) -> bool {
        self.state.blocked_keys.contains(key)
    }

    pub fn wireguard_key_blocked(&self, key: &WgKey) -> bool {
        self.state.blocked_wireguard.contains(key)
    }

    /// Whether a CRL signed after its expiry has listed it, so that it may leave.
    fn is_off_crl(&self, certificate: &CertificateState) -> bool {
        let crl = self.crl(&certificate.issuer_key_id, certificate.shard);
        crl.is_some_and(|crl| crl.this_update >= certificate.not_after)
    }
}

/// Tokens, operators and policy.
impl World {
    /// A join or login token.
    pub fn token(&self, id: &TokenId) -> Option<&Token> {
        self.state.tokens.get(id)
    }

    pub fn tokens(&self) -> impl Iterator<Item = &Token> {
        self.state.tokens.values()
    }

    pub fn operator(&self, name: &OperatorName) -> Option<&Operator> {
        self.state.operators.get(name)
    }

    pub fn operators(&self) -> impl Iterator<Item = &Operator> {
        self.state.operators.values()
    }

    pub fn policy(&self) -> &Policy {
        &self.state.policy
    }

    /// The policy as it was written.
    pub fn policy_toml(&self) -> &str {
        &self.state.policy_toml
    }

    /// Rises by one at each change, from 1.
    pub fn policy_version(&self) -> u64 {
        self.state.policy_version
    }

    /// What a policy says without effect: tags that no node has, nodes that do not exist.
    pub fn policy_warnings(&self, policy: &Policy) -> Vec<String> {
        let selectors: BTreeSet<&Selector> = policy.selectors().collect();
        let idle = selectors.into_iter().filter(|selector| match selector {
            Selector::Any => false,
            Selector::Tag(tag) => !self.nodes().any(|node| node.tags.contains(tag)),
            Selector::Node(name) => self.node_by_name(name).is_none(),
        });
        idle.map(|selector| format!("{selector} matches no node")).collect()
    }
}

/// Who somebody is.
impl World {
    /// The caller that a verified certificate speaks for, at `at`. The look-up on every RPC.
    ///
    /// # Errors
    /// [`Refusal::IdentityUnknown`] also for certificates that are no identity (services, the controller).
    pub fn authenticate(&self, serial: Serial, at: UtcTime) -> Result<Actor, Refusal> {
        let (certificate, actor) = self.identity(serial)?;
        if at >= certificate.not_after {
            return Err(Refusal::IdentityExpired { serial, ago: at.since(certificate.not_after) });
        }
        Ok(actor)
    }

    /// The node whose identity may have expired within the resume window; good for one thing, a new identity.
    ///
    /// # Errors
    /// As [`authenticate`](Self::authenticate), and [`Refusal::ResumeWindowPassed`].
    pub fn authenticate_resume(&self, serial: Serial, at: UtcTime) -> Result<Actor, Refusal> {
        let (certificate, actor) = self.identity(serial)?;
        let Actor::Node { id, .. } = actor else {
            return Err(Refusal::IdentityUnknown { serial });
        };
        let ago = at.since(certificate.not_after);
        if ago > RESUME_WINDOW {
            return Err(Refusal::ResumeWindowPassed { serial, ago });
        }
        // The one before the last counts only while the node may never have received the last.
        let proved = self.node(id).is_some_and(|node| node.proved && node.previous == Some(serial));
        if proved { Err(Refusal::IdentitySuperseded { serial }) } else { Ok(actor) }
    }

    /// An unrevoked identity that has not been replaced, whatever its age.
    fn identity(&self, serial: Serial) -> Result<(&CertificateState, Actor), Refusal> {
        let unknown = Refusal::IdentityUnknown { serial };
        let certificate = self.certificate(&serial).ok_or(unknown.clone())?;
        if let Some(revoked) = certificate.revoked {
            return Err(Refusal::IdentityRevoked { serial, reason: revoked.reason });
        }
        match &certificate.owner {
            Owner::Node(id) => {
                let node = self.node(*id).ok_or(unknown.clone())?;
                if let NodeState::Revoked { reason, .. } = node.state {
                    return Err(Refusal::IdentityRevoked { serial, reason });
                }
                let current = node.current.as_ref().map(|identity| identity.serial);
                if current != Some(serial) && node.previous != Some(serial) {
                    return Err(Refusal::IdentitySuperseded { serial });
                }
                Ok((certificate, Actor::Node { id: *id, serial }))
            }
            Owner::Operator(name) => {
                let operator = self.operator(name).ok_or(unknown.clone())?;
                if operator.serial != Some(serial) {
                    return Err(Refusal::IdentitySuperseded { serial });
                }
                Ok((certificate, Actor::Operator { name: name.clone(), serial }))
            }
            Owner::Controller { .. } | Owner::Service { .. } | Owner::Detached { .. } => Err(unknown),
        }
    }

    /// The role of an operator.
    pub fn role(&self, name: &OperatorName) -> Option<Role> {
        self.operator(name).map(|operator| operator.role)
    }
}

/// A node as the policy sees it.
pub(crate) fn subject(node: &Node) -> Subject<'_> {
    Subject { name: &node.name, tags: &node.tags }
}

/// A snapshot: everything but what can be derived.
impl Serialize for World {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.state.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for World {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let state = State::deserialize(deserializer)?;
        let index = Index::of(&state);
        Ok(Self { state, index })
    }
}
