//! Why a command changes nothing.

use std::net::IpAddr;
use std::time::Duration;

use crate::authority::Gap;
use crate::certificate::Reason;
use crate::ids::{KeyHash, KeyId, NodeId, OperationId, Serial, TokenId, WgKey};
use crate::names::{NameError, NodeName, OperatorName, ProfileName};
use crate::profile::KeyType;

/// Why [`World::decide`](crate::World::decide) refused. In every case nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    // Who may do what.
    #[error("{actor} may not do {action}")]
    Denied { actor: String, action: &'static str },
    #[error("certificate {serial} is not an identity of this mesh")]
    IdentityUnknown { serial: Serial },
    #[error("identity {serial} expired {} s ago", .ago.as_secs())]
    IdentityExpired { serial: Serial, ago: Duration },
    #[error("identity {serial} is revoked ({reason})")]
    IdentityRevoked { serial: Serial, reason: Reason },
    #[error("identity {serial} was replaced by a newer one")]
    IdentitySuperseded { serial: Serial },
    #[error("identity {serial} expired {} s ago, longer than the resume window", .ago.as_secs())]
    ResumeWindowPassed { serial: Serial, ago: Duration },

    // Tokens.
    #[error("token {id} is not known")]
    TokenUnknown { id: TokenId },
    #[error("token {id} expired {} s ago", .ago.as_secs())]
    TokenExpired { id: TokenId, ago: Duration },
    #[error("token {id} is used up")]
    TokenUsed { id: TokenId },
    #[error("token {id} is revoked")]
    TokenRevoked { id: TokenId },
    #[error("token {id} is for node {expected}, not {got}")]
    TokenNameMismatch { id: TokenId, expected: NodeName, got: NodeName },
    #[error("token {id} is not made for {action}")]
    TokenPurpose { id: TokenId, action: &'static str },
    #[error("token {id} exists already")]
    TokenExists { id: TokenId },
    #[error("a token must allow between 1 and {max} uses, not {uses}")]
    TokenUses { uses: u32, max: u32 },
    #[error("a token must expire in the future and within {} s", .max.as_secs())]
    TokenLife { max: Duration },
    #[error("token {id} needs no approval")]
    ApprovalNotRequired { id: TokenId },
    #[error("node {name} is not approved yet")]
    NotApproved { name: NodeName },

    // Names, keys, serials, addresses.
    #[error("name {name} is invalid")]
    NameInvalid {
        name: String,
        #[source]
        source: NameError,
    },
    #[error("name {name} belongs to {owner}")]
    NameTaken { name: String, owner: String },
    #[error("name {name} is reserved")]
    NameReserved { name: String },
    #[error("name {name} is outside {domain}")]
    NameOutsideDomain { name: String, domain: String },
    #[error("name {name} is neither owned by node {node} nor granted to it")]
    NameNotGranted { name: String, node: NodeName },
    #[error("pair {name} was stopped ({reason}) until it is issued again by hand")]
    NameStopped { name: String, reason: Reason },
    #[error("address {ip} does not belong to the caller")]
    AddressNotOwned { ip: IpAddr },
    #[error("address {ip} is taken")]
    AddressTaken { ip: IpAddr },
    #[error("address {ip} is not a host address of the pool")]
    AddressOutsidePool { ip: IpAddr },
    #[error("node index {node} is not free")]
    NodeIdTaken { node: NodeId },
    #[error("serial {serial} is taken")]
    SerialTaken { serial: Serial },
    #[error("key {key_hash} is in use by another certificate")]
    KeyInUse { key_hash: KeyHash },
    #[error("key {key_hash} is revoked")]
    KeyRevoked { key_hash: KeyHash },
    #[error("WireGuard key {key} is in use by another node")]
    WireguardKeyInUse { key: WgKey },
    #[error("WireGuard key {key} is revoked")]
    WireguardKeyRevoked { key: WgKey },
    #[error("a node has one or two different WireGuard keys, not {count}")]
    WireguardKeyCount { count: usize },

    // Nodes.
    #[error("node {node} is not known")]
    NodeNotFound { node: NodeId },
    #[error("node {name} is revoked ({reason})")]
    NodeRevoked { name: NodeName, reason: Reason },
    #[error("node {name} is pending")]
    NodePending { name: NodeName },
    #[error("node {name} is already enrolled")]
    NodeEnrolled { name: NodeName },
    #[error("a node or token has at most {max} tags")]
    TooManyTags { max: usize },

    // Certificates.
    #[error("no certificate matches {which}")]
    CertificateNotFound { which: String },
    #[error("{which} is the identity of node {node}")]
    NodeIdentity { which: String, node: NodeName },
    #[error("{serial} is the controller's current identity")]
    ControllerIdentity { serial: Serial },
    #[error("certificate does not fit the request: {what}")]
    CertificateMismatch { what: &'static str },
    #[error("issuer {issuer} is not an authority of this mesh")]
    IssuerUnknown { issuer: KeyId },
    #[error("CRL number {number} does not follow {last}")]
    CrlNumber { number: u64, last: u64 },
    #[error("CRL does not fit the journal: {what}")]
    CrlMismatch { what: &'static str },

    // Custom profiles.
    #[error("policy has no profile {profile}")]
    ProfileUnknown { profile: String },
    #[error("no rule of profile {profile} is for {who}")]
    ProfileNotGiven { profile: ProfileName, who: String },
    #[error("no rule of profile {profile} gives {name} to node {node}")]
    NameOutsideProfile { profile: ProfileName, name: String, node: NodeName },
    #[error("no rule of profile {profile} gives address {ip}")]
    AddressOutsideProfile { profile: ProfileName, ip: IpAddr },
    #[error("profile {profile} does not allow {key} keys")]
    KeyOutsideProfile { profile: ProfileName, key: KeyType },
    #[error("profile {profile} allows {} s at most, not {} s", .max.as_secs(), .asked.as_secs())]
    LifetimeOutsideProfile { profile: ProfileName, asked: Duration, max: Duration },
    #[error("no rule of profile {profile} gives the SPIFFE ID of service {service}")]
    ServiceOutsideProfile { profile: ProfileName, service: String },
    #[error("profile {profile} was changed while the certificate was made")]
    ProfileChanged { profile: String },
    // Authorities and their change.
    #[error("issuer {issuer} does not issue (it is {standing})")]
    IssuerNotActive { issuer: KeyId, standing: &'static str },
    #[error("authority is refused: {what}")]
    AuthorityInvalid { what: &'static str },
    #[error("a rotation to issuer {to} is under way")]
    RotationRunning { to: KeyId },
    #[error("no rotation is under way")]
    RotationNone,
    #[error("the rotation has moved on: bundle {now}, not {asked}")]
    RotationMoved { asked: u64, now: u64 },
    #[error("the rotation is on its way back already")]
    RotationAborted,
    #[error("the rotation waits for {nodes} nodes, {leaves} certificates, {crls} CRLs")]
    RotationWaits { nodes: usize, leaves: usize, crls: usize },
    #[error(transparent)]
    TrustGap { gap: Gap },
    #[error("certificate {serial} of issuer {issuer} is in use")]
    LeafInUse { serial: Serial, issuer: KeyId },
    #[error("node {node} does not trust issuer {issuer} yet")]
    NodeBlind { node: NodeName, issuer: KeyId },
    #[error("the key of root {root} is not on the controller")]
    RootSealed { root: KeyId },
    #[error("the key of root {root} has not been exported")]
    RootNotExported { root: KeyId },

    // Policy and operators.
    #[error("policy is invalid: {}", .problems.join("; "))]
    PolicyInvalid { problems: Vec<String> },
    #[error("operator {name} exists already")]
    OperatorExists { name: OperatorName },
    #[error("operator {name} is not known")]
    OperatorNotFound { name: OperatorName },
    #[error("operator {name} is the last admin")]
    LastAdmin { name: OperatorName },

    // The mesh as a whole.
    #[error("the mesh has not been created")]
    MeshMissing,
    #[error("the mesh has been created already")]
    MeshExists,
    #[error("the mesh cannot be created: {what}")]
    MeshInvalid { what: &'static str },
    #[error("the clock jumped; {action} waits until an operator confirms the time")]
    ClockJump { action: &'static str },
    #[error("operation {operation} was used for another request")]
    OperationReused { operation: OperationId },
    #[error("limit reached: at most {max} {what}")]
    Limit { what: &'static str, max: usize },
}
