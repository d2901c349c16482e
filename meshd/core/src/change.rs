//! What commands did: the records of the journal.
//!
//! A change carries its outcome (the address, the serial, the resulting tags), never an intent. A shipped
//! variant never changes its meaning; fields are only added, with a default. The golden journal in
//! `tests/golden` holds both.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

use crate::authority::{Authority, Bundle, Cross, Rotation, Standing};
use crate::certificate::{CertificateRecord, Owner, Reason};
use crate::command::{Actor, Denial, Role};
use crate::ids::{KeyHash, KeyId, NodeId, OperationId, Serial, TokenId, WgKey};
use crate::limits::DETAIL_CHARS_MAX;
use crate::names::{DnsName, NodeName, OperatorName, Tag};
use crate::policy::Policy;
use crate::time::UtcTime;
use crate::world::{CrlState, Mesh, Purpose, ShardGroup, Token};

/// One command with all its changes: all or nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub operation: OperationId,
    /// Never before the time of the record before it.
    pub at: UtcTime,
    pub actor: Actor,
    /// The actor as a person reads it, e.g. `node web-1`: names outlive nodes here.
    pub who: String,
    /// [`CommandKind::action`](crate::CommandKind::action).
    pub action: String,
    pub changes: Vec<Change>,
}

/// One outcome. Serials, hashes and DER are opaque.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    MeshCreated {
        mesh: Mesh,
    },
    ControllerCertified {
        certificate: CertificateRecord,
    },
    /// A delegate of an issuing authority signs OCSP responses from now on.
    ResponderCertified {
        certificate: CertificateRecord,
    },
    TokenCreated {
        token: Token,
    },
    /// `used` is the resulting count.
    TokenUsed {
        id: TokenId,
        used: u32,
    },
    TokenRevoked {
        id: TokenId,
    },
    NodeRequested {
        id: NodeId,
        name: NodeName,
        tags: BTreeSet<Tag>,
        token: TokenId,
        key_hash: KeyHash,
        wireguard: WgKey,
    },
    NodeApproved {
        id: NodeId,
        name: NodeName,
    },
    NodeEnrolled {
        id: NodeId,
        name: NodeName,
        tags: BTreeSet<Tag>,
        token: TokenId,
        ipv4: Ipv4Addr,
        wireguard: WgKey,
        certificate: CertificateRecord,
    },
    /// `previous` is the identity under which the node asked.
    IdentityRenewed {
        id: NodeId,
        name: NodeName,
        wireguard: Vec<WgKey>,
        certificate: CertificateRecord,
        previous: Serial,
    },
    /// `tags` are all the tags from now on.
    NodeTagged {
        id: NodeId,
        name: NodeName,
        tags: BTreeSet<Tag>,
    },
    NodeRevoked {
        id: NodeId,
        name: NodeName,
        reason: Reason,
    },
    NodeRemoved {
        id: NodeId,
        name: NodeName,
    },
    KeyRotationAsked {
        id: NodeId,
        name: NodeName,
    },
    /// A service's, operator's or detached certificate.
    CertificateIssued {
        certificate: CertificateRecord,
    },
    CertificateRevoked {
        serial: Serial,
        reason: Reason,
    },
    /// The key is never accepted again.
    KeyBlocked {
        key_hash: KeyHash,
    },
    WireguardKeyBlocked {
        key: WgKey,
    },
    PairStopped {
        node: NodeId,
        pair: String,
        names: BTreeSet<DnsName>,
        reason: Reason,
    },
    /// The pair may be issued again, and needs not be reissued: it just was.
    PairResumed {
        node: NodeId,
        pair: String,
    },
    /// The pair is to be issued again at once with a new key.
    ReissueAsked {
        node: NodeId,
        pair: String,
    },
    PolicyApplied {
        toml: String,
        policy: Policy,
        version: u64,
    },
    OperatorAdded {
        name: OperatorName,
        role: Role,
        login: TokenId,
    },
    OperatorRemoved {
        name: OperatorName,
    },
    OperatorCertified {
        name: OperatorName,
        serial: Serial,
    },
    CrlIssued {
        crl: CrlState,
    },
    /// New certificates of the issuer join one of these shards.
    CrlShardsOpened {
        issuer_key_id: KeyId,
        group: ShardGroup,
    },
    AuthorityAdded {
        authority: Authority,
    },
    AuthorityStanding {
        key_id: KeyId,
        standing: Standing,
    },
    RootCrossSigned {
        cross: Cross,
    },
    /// The rotation as it is from now on.
    RotationChanged {
        rotation: Option<Rotation>,
    },
    BundleIssued {
        bundle: Bundle,
    },
    BundleAcknowledged {
        version: u64,
        nodes: BTreeSet<NodeId>,
    },
    RootExported {
        key_id: KeyId,
    },
    RootSealed {
        key_id: KeyId,
    },
    Denied {
        denial: Denial,
    },
    ClockHeld,
    ClockConfirmed,
}

impl Record {
    /// One line for people: every change that matters, control characters escaped, at most
    /// [`DETAIL_CHARS_MAX`] characters.
    pub fn detail(&self) -> String {
        let mut text = String::new();
        for part in self.changes.iter().filter_map(Change::detail) {
            let _ = write!(text, "{}{part}", if text.is_empty() { "" } else { "; " });
        }
        let keys = self.changes.iter().filter(|change| change.blocks_key()).count();
        if keys > 0 {
            let _ = write!(text, "; {keys} {} blocked", if keys == 1 { "key" } else { "keys" });
        }
        escape(&text)
    }
}

impl Change {
    fn blocks_key(&self) -> bool {
        matches!(self, Change::KeyBlocked { .. } | Change::WireguardKeyBlocked { .. })
    }

    /// What happened, unescaped; `None` for what [`Record::detail`] only counts.
    fn detail(&self) -> Option<String> {
        Some(match self {
            Change::MeshCreated { mesh } => {
                format!("fleet {} created, domain {}, addresses {}", mesh.fleet, mesh.domain, mesh.ipv4_pool)
            }
            Change::ControllerCertified { certificate }
            | Change::ResponderCertified { certificate }
            | Change::CertificateIssued { certificate } => describe(certificate),
            Change::TokenCreated { token } => describe_token(token),
            Change::TokenUsed { id, used } => format!("token {id} used, {used} in all"),
            Change::TokenRevoked { id } => format!("token {id} void"),
            Change::NodeRequested { id, name, key_hash, .. } => {
                format!("node {name} ({id}) asks for approval, key {key_hash}")
            }
            Change::NodeApproved { id, name } => format!("node {name} ({id}) approved"),
            Change::NodeEnrolled { id, name, ipv4, tags, certificate, .. } => {
                let tags = list(tags);
                format!("node {name} ({id}) enrolled, {ipv4}, tags [{tags}], serial {}", certificate.serial)
            }
            Change::IdentityRenewed { id, name, certificate, previous, .. } => {
                format!("node {name} ({id}) renewed, serial {} after {previous}", certificate.serial)
            }
            Change::NodeTagged { id, name, tags } => format!("node {name} ({id}) has tags [{}]", list(tags)),
            Change::NodeRevoked { id, name, reason } => format!("node {name} ({id}) revoked, {reason}"),
            Change::NodeRemoved { id, name } => format!("node {name} ({id}) removed"),
            Change::KeyRotationAsked { id, name } => format!("node {name} ({id}) is to rotate its keys"),
            Change::CertificateRevoked { serial, reason } => {
                format!("certificate {serial} revoked, {reason}")
            }
            Change::KeyBlocked { .. } | Change::WireguardKeyBlocked { .. } => return None,
            Change::PairStopped { node, pair, .. } => format!("pair {pair} of node {node} stopped"),
            Change::PairResumed { node, pair } => format!("pair {pair} of node {node} runs again"),
            Change::ReissueAsked { node, pair } => {
                format!("pair {pair} of node {node} is to be issued again")
            }
            Change::PolicyApplied { policy, version, .. } => {
                let (allow, grant) = (policy.allow.len(), policy.grant.len());
                let mut text = format!("policy version {version}: {allow} allow, {grant} grant");
                if !policy.profile.is_empty() {
                    let _ = write!(text, ", {} profiles", policy.profile.len());
                }
                text
            }
            Change::OperatorAdded { name, role, .. } => format!("operator {name} added, {role}"),
            Change::OperatorRemoved { name } => format!("operator {name} removed"),
            Change::OperatorCertified { name, serial } => {
                format!("operator {name} logged in, serial {serial}")
            }
            Change::CrlIssued { crl } => {
                format!(
                    "CRL {} of {} shard {} until {}",
                    crl.number, crl.issuer_key_id, crl.shard, crl.next_update
                )
            }
            Change::CrlShardsOpened { issuer_key_id, group } => {
                let ShardGroup { first, count, base_url } = group;
                format!("{count} CRL shards of {issuer_key_id} opened from {first} at {base_url}")
            }
            Change::AuthorityAdded { authority } => {
                let kind = if authority.is_root { "root" } else { "issuing CA" };
                format!("{kind} {} added", authority.key_id)
            }
            Change::AuthorityStanding { key_id, standing } => format!("CA {key_id} is {}", standing.as_str()),
            Change::RootCrossSigned { cross } => format!("root {} signed by root {}", cross.root, cross.by),
            Change::RotationChanged { rotation: Some(rotation) } => describe_rotation(rotation),
            Change::RotationChanged { rotation: None } => "rotation ended".to_owned(),
            Change::BundleIssued { bundle } => {
                let (roots, issuers) = (bundle.roots.len(), bundle.issuers.len());
                format!("bundle {}: {roots} roots, {issuers} issuing CAs", bundle.version)
            }
            Change::BundleAcknowledged { version, nodes } => {
                format!("bundle {version} taken up by nodes [{}]", list(nodes))
            }
            Change::RootExported { key_id } => format!("key of root {key_id} exported, encrypted"),
            Change::RootSealed { key_id } => format!("root {key_id} is offline"),
            Change::Denied { denial } => {
                let Denial { caller, action, reason, count, .. } = denial;
                format!("{caller} refused {action} {count} times: {reason}")
            }
            Change::ClockHeld => "the clock jumped; time-dependent commands wait".to_owned(),
            Change::ClockConfirmed => "the clock is confirmed".to_owned(),
        })
    }
}

fn describe(certificate: &CertificateRecord) -> String {
    let CertificateRecord { serial, profile, names, ips, not_after, .. } = certificate;
    let owner = match &certificate.owner {
        Owner::Controller { name } => format!("controller {name}"),
        Owner::Node(node) => format!("node {node}"),
        Owner::Service { node, name } => format!("{name} on node {node}"),
        Owner::Operator(name) => format!("operator {name}"),
        Owner::Detached { operator: Some(name) } => format!("operator {name}, not renewed"),
        Owner::Detached { operator: None } => "local root, not renewed".to_owned(),
    };
    let names: Vec<String> =
        names.iter().map(ToString::to_string).chain(ips.iter().map(ToString::to_string)).collect();
    format!("{profile} certificate {serial} for {owner} [{}] until {not_after}", names.join(" "))
}

fn describe_rotation(rotation: &Rotation) -> String {
    let Rotation { kind, phase, from, to, aborted, .. } = rotation;
    let back = if *aborted { ", on its way back" } else { "" };
    format!("rotation of the {} CA from {from} to {to}, phase {}{back}", kind.as_str(), phase.as_str())
}

fn describe_token(token: &Token) -> String {
    let mut text = match &token.purpose {
        Purpose::Enrollment => format!("join token {}", token.id),
        Purpose::Login { operator } => format!("login token {} for {operator}", token.id),
    };
    if let Some(name) = &token.name {
        let _ = write!(text, " for {name}");
    }
    let _ = write!(text, ", {} uses, tags [{}], until {}", token.uses, list(&token.tags), token.expires_at);
    if token.require_approval {
        text.push_str(", with approval");
    }
    text
}

fn list<T: ToString>(items: &BTreeSet<T>) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

/// One printable line: control, formatting and separator characters become `\u{…}`, and so does what could
/// pass for an escape; cut at [`DETAIL_CHARS_MAX`] characters with an ellipsis.
pub fn escape(text: &str) -> String {
    let mut out = String::new();
    for (count, character) in text.chars().enumerate() {
        if count >= DETAIL_CHARS_MAX {
            out.push('…');
            break;
        }
        if is_deceptive(character) {
            let _ = write!(out, "{}", character.escape_unicode());
        } else if character == '\\' {
            out.push_str("\\\\");
        } else {
            out.push(character);
        }
    }
    out
}

/// Controls, bidirectional overrides, zero-width characters and line separators: they move or hide text.
fn is_deceptive(character: char) -> bool {
    character.is_control()
        || matches!(
            character,
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
                | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}'
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn details_are_one_printable_line() {
        let denial = Denial {
            caller: "x\n\u{1b}[2J\u{202e}y\\n".to_owned(),
            action: "node.enroll".to_owned(),
            reason: "a\u{2028}b".repeat(1000),
            count: 3,
            first: UtcTime(1),
            last: UtcTime(2),
        };
        let record = Record {
            operation: OperationId([0; 16]),
            at: UtcTime(2),
            actor: Actor::Controller,
            who: "controller".to_owned(),
            action: "denials.record".to_owned(),
            changes: vec![Change::Denied { denial }],
        };
        let detail = record.detail();
        assert!(
            detail.starts_with("x\\u{a}\\u{1b}[2J\\u{202e}y\\\\n refused node.enroll 3 times: a\\u{2028}b")
        );
        assert!(detail.ends_with('…'));
        assert!(!detail.chars().any(is_deceptive));
    }
}
