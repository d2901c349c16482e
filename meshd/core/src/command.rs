//! What callers may ask of the mesh.

use std::collections::BTreeSet;
use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

use crate::authority::Cross;
use crate::certificate::{CaRecord, CertificateRecord, Reason};
use crate::ids::{KeyHash, KeyId, NodeId, OperationId, Serial, TokenId, WgKey};
use crate::names::{DnsName, NodeName, OperatorName, Tag};
use crate::profile::{KeyType, Profile};
use crate::time::UtcTime;

/// One command, who gives it, and an id that stays the same when it is repeated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    pub actor: Actor,
    pub operation: OperationId,
    pub command: Command,
}

/// Who acts: taken from the TLS certificate, the checked token or the local socket, never from the
/// message. Checked again by [`World::decide`](crate::World::decide).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Actor {
    /// Root on the controller's host, over its Unix socket.
    LocalRoot,
    /// The controller process itself: its own certificate, CRLs, denials, the clock.
    Controller,
    Node {
        id: NodeId,
        serial: Serial,
    },
    Operator {
        name: OperatorName,
        serial: Serial,
    },
    /// An anonymous caller who showed the secret of this token.
    Token {
        id: TokenId,
    },
}

impl fmt::Display for Actor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Actor::LocalRoot => f.write_str("local root"),
            Actor::Controller => f.write_str("controller"),
            Actor::Node { id, .. } => write!(f, "node {id}"),
            Actor::Operator { name, .. } => write!(f, "operator {name}"),
            Actor::Token { id } => write!(f, "token {id}"),
        }
    }
}

/// What an operator may do; the table stands in [`auth`](crate::auth).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    Admin,
    Operator,
    Enroller,
    Auditor,
}

/// The text is no role.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a role; known are admin, operator, enroller, auditor")]
pub struct RoleError {
    pub text: String,
}

impl Role {
    pub const ALL: [Role; 4] = [Role::Admin, Role::Operator, Role::Enroller, Role::Auditor];

    pub const fn as_str(self) -> &'static str {
        match self {
            Role::Admin => "admin",
            Role::Operator => "operator",
            Role::Enroller => "enroller",
            Role::Auditor => "auditor",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = RoleError;
    fn from_str(text: &str) -> Result<Self, RoleError> {
        let known = Role::ALL.into_iter().find(|role| role.as_str() == text);
        known.ok_or_else(|| RoleError { text: text.to_owned() })
    }
}

/// Which certificates to revoke.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Which {
    Serial(Serial),
    /// A host name, an address or the name of a pair: all live service certificates that carry it.
    Name(String),
    KeyHash(KeyHash),
}

/// What a certificate under a custom profile was made from; it counts only while the policy still says the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Made {
    pub profile: Profile,
    /// The type of the certified key.
    pub key: KeyType,
}

/// Refusals of one kind, counted by the controller.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Denial {
    /// Who asked, as shown in the audit log.
    pub caller: String,
    pub action: String,
    pub reason: String,
    pub count: u64,
    pub first: UtcTime,
    pub last: UtcTime,
}

/// A change somebody asks for. Everything in it has been parsed; nothing in it has been believed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// The first command of every journal.
    CreateMesh {
        mesh_id: [u8; 16],
        journal_id: [u8; 16],
        fleet: String,
        domain: DnsName,
        controller_name: String,
        ipv4_pool: Ipv4Net,
        cas: Vec<CaRecord>,
        starter_policy: String,
    },
    RecordControllerCertificate {
        certificate: CertificateRecord,
    },
    /// A delegate for OCSP, made in this process.
    RecordResponder {
        certificate: CertificateRecord,
    },
    CreateToken {
        id: TokenId,
        secret_hash: [u8; 32],
        tags: BTreeSet<Tag>,
        name: Option<NodeName>,
        uses: u32,
        expires_at: UtcTime,
        require_approval: bool,
    },
    RevokeToken {
        id: TokenId,
    },
    /// Spends one use of a token that requires approval; the node is pending and has no certificate.
    RequestEnrollment {
        token: TokenId,
        name: NodeName,
        key_hash: KeyHash,
        wireguard: WgKey,
    },
    /// Spends one use of the token, or completes a pending node that an operator approved; then `node`
    /// is the pending node's id.
    Enroll {
        token: TokenId,
        node: NodeId,
        name: NodeName,
        ipv4: Ipv4Addr,
        wireguard: WgKey,
        certificate: CertificateRecord,
    },
    ApproveNode {
        node: NodeId,
    },
    TagNode {
        node: NodeId,
        add: BTreeSet<Tag>,
        remove: BTreeSet<Tag>,
    },
    /// Ends a node. With `remove` its name is free again; its keys never are.
    RevokeNode {
        node: NodeId,
        reason: Reason,
        remove: bool,
    },
    /// The node itself leaves: revoked with `cessation-of-operation` and removed.
    LeaveNode {
        node: NodeId,
    },
    /// `wireguard` lists one or two keys, newest first. `resume` is for an identity that has expired.
    RenewIdentity {
        node: NodeId,
        wireguard: Vec<WgKey>,
        certificate: CertificateRecord,
        resume: bool,
    },
    /// Asks the node for new keys at its next contact.
    RotateKeys {
        node: NodeId,
    },
    /// `restart` lifts a stop that `cert revoke` put on the pair.
    IssueCertificate {
        certificate: CertificateRecord,
        restart: bool,
        /// Under a custom profile: what it was made from.
        made: Option<Box<Made>>,
    },
    RevokeCertificates {
        which: Which,
        reason: Reason,
    },
    ApplyPolicy {
        toml: String,
    },
    AddOperator {
        name: OperatorName,
        role: Role,
        token: TokenId,
        secret_hash: [u8; 32],
        expires_at: UtcTime,
    },
    RemoveOperator {
        name: OperatorName,
    },
    LoginOperator {
        token: TokenId,
        certificate: CertificateRecord,
    },
    /// A CRL has been signed and may be published once this is durable.
    RecordCrl {
        issuer_key_id: KeyId,
        shard: u16,
        number: u64,
        covers_seq: u64,
        digest: [u8; 32],
        this_update: UtcTime,
        next_update: UtcTime,
    },
    /// New certificates of an issuing CA carry pointers below `base_url`, and more shards take them.
    OpenCrlShards {
        issuer_key_id: KeyId,
        count: u16,
        base_url: String,
    },
    /// Announces a new issuing authority, and a new root with it or none. `crosses` are the signatures of
    /// both roots on each other.
    StartRotation {
        issuing: CaRecord,
        root: Option<CaRecord>,
        crosses: Vec<Cross>,
        auto: bool,
    },
    /// `version` is the bundle that the caller saw, so that two callers do not take two steps.
    AdvanceRotation {
        version: u64,
    },
    AbortRotation {
        version: u64,
    },
    /// These nodes have a bundle on disk, in effect and in every folder, and said so under their current identity.
    AcknowledgeBundle {
        version: u64,
        nodes: BTreeSet<NodeId>,
    },
    /// A root's key is about to be handed out, encrypted.
    ExportRoot {
        key_id: KeyId,
    },
    /// A root's key leaves the controller.
    SealRoot {
        key_id: KeyId,
    },
    RecordDenials {
        denials: Vec<Denial>,
    },
    /// The writer saw the clock run ahead of what its monotonic clock expected.
    HoldClock,
    /// An operator says that the clock is right.
    ConfirmClock,
}

macro_rules! kinds {
    ($($(#[$doc:meta])* $kind:ident = $action:literal),* $(,)?) => {
        /// Kinds of commands; the audit log shows [`action`](Self::action).
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum CommandKind { $($(#[$doc])* $kind),* }

        impl CommandKind {
            /// Every kind, in the order of declaration.
            pub const ALL: &[CommandKind] = &[$(CommandKind::$kind),*];

            /// The stable name in records, the audit log and refusals.
            pub const fn action(self) -> &'static str {
                match self { $(CommandKind::$kind => $action),* }
            }
        }
    };
}

kinds! {
    CreateMesh = "mesh.create",
    CertifyController = "controller.certify",
    CertifyResponder = "ocsp.certify",
    CreateToken = "token.create",
    RevokeToken = "token.revoke",
    RequestEnrollment = "node.request",
    Enroll = "node.enroll",
    ApproveNode = "node.approve",
    TagNode = "node.tag",
    RevokeNode = "node.revoke",
    RemoveNode = "node.remove",
    LeaveNode = "node.leave",
    RenewIdentity = "node.renew",
    ResumeIdentity = "node.resume",
    RotateKeys = "node.rotate-keys",
    IssueCertificate = "cert.issue",
    RevokeCertificates = "cert.revoke",
    ApplyPolicy = "policy.apply",
    AddOperator = "operator.add",
    RemoveOperator = "operator.remove",
    LoginOperator = "operator.login",
    RecordCrl = "crl.issue",
    OpenCrlShards = "crl.open",
    StartRotation = "ca.rotate-start",
    AdvanceRotation = "ca.rotate-advance",
    AbortRotation = "ca.rotate-abort",
    AcknowledgeBundle = "ca.acknowledge",
    ExportRoot = "ca.export-root",
    SealRoot = "ca.seal",
    RecordDenials = "denials.record",
    HoldClock = "clock.hold",
    ConfirmClock = "clock.confirm",
}

impl fmt::Display for CommandKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.action())
    }
}

impl Command {
    pub const fn kind(&self) -> CommandKind {
        match self {
            Command::CreateMesh { .. } => CommandKind::CreateMesh,
            Command::RecordControllerCertificate { .. } => CommandKind::CertifyController,
            Command::RecordResponder { .. } => CommandKind::CertifyResponder,
            Command::CreateToken { .. } => CommandKind::CreateToken,
            Command::RevokeToken { .. } => CommandKind::RevokeToken,
            Command::RequestEnrollment { .. } => CommandKind::RequestEnrollment,
            Command::Enroll { .. } => CommandKind::Enroll,
            Command::ApproveNode { .. } => CommandKind::ApproveNode,
            Command::TagNode { .. } => CommandKind::TagNode,
            Command::RevokeNode { remove: false, .. } => CommandKind::RevokeNode,
            Command::RevokeNode { remove: true, .. } => CommandKind::RemoveNode,
            Command::LeaveNode { .. } => CommandKind::LeaveNode,
            Command::RenewIdentity { resume: false, .. } => CommandKind::RenewIdentity,
            Command::RenewIdentity { resume: true, .. } => CommandKind::ResumeIdentity,
            Command::RotateKeys { .. } => CommandKind::RotateKeys,
            Command::IssueCertificate { .. } => CommandKind::IssueCertificate,
            Command::RevokeCertificates { .. } => CommandKind::RevokeCertificates,
            Command::ApplyPolicy { .. } => CommandKind::ApplyPolicy,
            Command::AddOperator { .. } => CommandKind::AddOperator,
            Command::RemoveOperator { .. } => CommandKind::RemoveOperator,
            Command::LoginOperator { .. } => CommandKind::LoginOperator,
            Command::RecordCrl { .. } => CommandKind::RecordCrl,
            Command::OpenCrlShards { .. } => CommandKind::OpenCrlShards,
            Command::StartRotation { .. } => CommandKind::StartRotation,
            Command::AdvanceRotation { .. } => CommandKind::AdvanceRotation,
            Command::AbortRotation { .. } => CommandKind::AbortRotation,
            Command::AcknowledgeBundle { .. } => CommandKind::AcknowledgeBundle,
            Command::ExportRoot { .. } => CommandKind::ExportRoot,
            Command::SealRoot { .. } => CommandKind::SealRoot,
            Command::RecordDenials { .. } => CommandKind::RecordDenials,
            Command::HoldClock => CommandKind::HoldClock,
            Command::ConfirmClock => CommandKind::ConfirmClock,
        }
    }
}
