//! The parts of [`World`](crate::World) and of its changes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use crate::addresses;
use crate::certificate::{CaRecord, CertificateRecord, Owner, Reason, Revocation};
use crate::command::{Actor, Role};
use crate::ids::{KeyHash, KeyId, NodeId, Serial, TokenId, WgKey};
use crate::names::{DnsName, NodeName, OperatorName, Tag};
use crate::time::UtcTime;

/// What was fixed when the mesh was created.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mesh {
    #[serde(with = "crate::bytes::array")]
    pub mesh_id: [u8; 16],
    #[serde(with = "crate::bytes::array")]
    pub journal_id: [u8; 16],
    pub fleet: String,
    pub domain: DnsName,
    pub controller_name: String,
    pub ipv4_pool: Ipv4Net,
    pub cas: Vec<CaRecord>,
}

impl Mesh {
    /// The mesh's /48.
    pub fn ipv6_prefix(&self) -> Ipv6Net {
        addresses::ula_prefix(&self.mesh_id)
    }

    /// The overlay address of a node.
    pub fn ipv6_of(&self, node: NodeId) -> Ipv6Addr {
        addresses::ipv6_of(&self.mesh_id, node)
    }

    /// Whether an address belongs to the overlay.
    pub fn contains(&self, ip: IpAddr) -> bool {
        match ip {
            IpAddr::V4(ip) => self.ipv4_pool.contains(&ip),
            IpAddr::V6(ip) => self.ipv6_prefix().contains(&ip),
        }
    }
}

/// An enrolled, pending or revoked machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    pub id: NodeId,
    pub name: NodeName,
    pub state: NodeState,
    pub tags: BTreeSet<Tag>,
    /// `None` while pending.
    pub ipv4: Option<Ipv4Addr>,
    /// Newest first; two during a rotation.
    pub wireguard: Vec<WgKey>,
    /// Every WireGuard key it ever vouched for: no other node may use them, and all end with the node.
    pub vouched: BTreeSet<WgKey>,
    /// `None` while pending.
    pub current: Option<Identity>,
    /// Serial of the identity before [`current`](Self::current): valid until the next renewal, since the
    /// node may not have received the new one.
    pub previous: Option<Serial>,
    /// The node has changed something under its current identity, so it has received it.
    pub proved: bool,
    pub enrollment: Enrollment,
    pub enrolled_at: Option<UtcTime>,
    /// An operator asked for new keys.
    pub rotate_keys: bool,
    /// Pairs that must not be issued until somebody on the node asks again by hand.
    pub stopped: BTreeMap<String, Stop>,
    /// Pairs to issue again at once with a new key.
    pub reissue: BTreeSet<String>,
    /// The newest bundle it acknowledged; 0 before the first.
    #[serde(default)]
    pub bundle: u64,
    /// The bundle it was given when it came in, or came back: it has no older one.
    #[serde(default)]
    pub given: u64,
}

/// Certificates that have not ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CertificateCounts {
    /// Neither ended nor revoked.
    pub live: usize,
    pub revoked: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NodeState {
    /// Waits for an operator; `approved` once one said yes.
    Pending {
        approved: bool,
    },
    Active,
    /// Its name stays blocked until it is removed or an operator makes a token for that name.
    Revoked {
        at: UtcTime,
        reason: Reason,
    },
}

/// A node's certificate, with the leaf that peers receive.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pub serial: Serial,
    pub key_hash: KeyHash,
    pub not_before: UtcTime,
    pub not_after: UtcTime,
    #[serde(with = "crate::bytes::vec")]
    pub leaf: Vec<u8>,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Identity({}, until {})", self.serial, self.not_after)
    }
}

impl From<&CertificateRecord> for Identity {
    fn from(certificate: &CertificateRecord) -> Self {
        Self {
            serial: certificate.serial,
            key_hash: certificate.key_hash,
            not_before: certificate.not_before,
            not_after: certificate.not_after,
            leaf: certificate.der.clone(),
        }
    }
}

/// With what a node asked for entry; the same again is a retry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Enrollment {
    pub token: TokenId,
    pub key_hash: KeyHash,
    pub wireguard: WgKey,
    pub requested_at: UtcTime,
}

/// A pair that an operator stopped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stop {
    pub at: UtcTime,
    pub reason: Reason,
    /// The names that the pair carried: no other pair of the node may take them meanwhile.
    pub names: BTreeSet<DnsName>,
}

/// A certificate that is alive, or revoked and still on its CRL.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateState {
    pub serial: Serial,
    pub key_hash: KeyHash,
    pub owner: Owner,
    pub profile: String,
    pub names: Vec<DnsName>,
    pub ips: Vec<IpAddr>,
    pub pair_name: String,
    pub shard: u16,
    pub issuer_key_id: KeyId,
    pub not_before: UtcTime,
    pub not_after: UtcTime,
    /// Sequence number of the record that issued it.
    pub issued_seq: u64,
    pub revoked: Option<Revocation>,
}

impl CertificateState {
    /// Neither revoked nor expired at `at`.
    pub fn is_live(&self, at: UtcTime) -> bool {
        self.revoked.is_none() && at < self.not_after
    }
}

/// What a token is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    Enrollment,
    Login { operator: OperatorName },
}

/// A join or login token. Only a hash of its secret is known here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token {
    pub id: TokenId,
    #[serde(with = "crate::bytes::array")]
    pub secret_hash: [u8; 32],
    pub purpose: Purpose,
    pub tags: BTreeSet<Tag>,
    pub name: Option<NodeName>,
    pub uses: u32,
    pub used: u32,
    pub created_at: UtcTime,
    pub expires_at: UtcTime,
    pub require_approval: bool,
    pub created_by: Actor,
    pub revoked_at: Option<UtcTime>,
}

/// What a token is worth now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenState {
    Open,
    Used,
    Expired,
    Revoked,
}

impl TokenState {
    pub const fn as_str(self) -> &'static str {
        match self {
            TokenState::Open => "open",
            TokenState::Used => "used",
            TokenState::Expired => "expired",
            TokenState::Revoked => "revoked",
        }
    }
}

impl Token {
    pub fn state(&self, at: UtcTime) -> TokenState {
        if self.revoked_at.is_some() {
            TokenState::Revoked
        } else if self.used >= self.uses {
            TokenState::Used
        } else if at >= self.expires_at {
            TokenState::Expired
        } else {
            TokenState::Open
        }
    }
}

/// A person.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Operator {
    pub name: OperatorName,
    pub role: Role,
    pub added_at: UtcTime,
    /// The one-time token for `meshctl login`.
    pub login: TokenId,
    /// `None` until the first login.
    pub serial: Option<Serial>,
}

/// The newest CRL of one issuer and shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CrlState {
    pub issuer_key_id: KeyId,
    pub shard: u16,
    pub number: u64,
    /// Every revocation up to this record is in it.
    pub covers_seq: u64,
    #[serde(with = "crate::bytes::array")]
    pub digest: [u8; 32],
    pub this_update: UtcTime,
    pub next_update: UtcTime,
}

/// A request that took effect, so that its repetition is answered, not repeated.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Operation {
    pub at: UtcTime,
    pub seq: u64,
    pub action: String,
    pub who: String,
    pub outcome: Outcome,
}

/// What a repeated request is answered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    Done,
    Node(NodeId),
    Certificate(Serial),
    Token(TokenId),
}

/// What records touched, for deltas.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Touched {
    /// Nodes that peers may see differently: added, ended, renewed, tagged.
    pub nodes: BTreeSet<NodeId>,
    /// Nodes that see themselves differently: tags, stops, asked rotations.
    pub own: BTreeSet<NodeId>,
    pub policy: bool,
    /// Issuers and shards with a newer CRL.
    pub crls: BTreeSet<(KeyId, u16)>,
    /// A new bundle.
    #[serde(default)]
    pub trust: bool,
}

impl Touched {
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    pub(crate) fn merge(&mut self, other: &Touched) {
        self.nodes.extend(&other.nodes);
        self.own.extend(&other.own);
        self.policy |= other.policy;
        self.crls.extend(other.crls.iter().cloned());
        self.trust |= other.trust;
    }
}

/// Who owns a DNS name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NameOwner {
    Reserved,
    Controller,
    Node(NodeId),
    /// Policy grants the name to some nodes.
    Grant,
    /// A live certificate that an operator wrote for a machine that is no node.
    Detached(Serial),
}
