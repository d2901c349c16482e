//! How a machine becomes a node and stays one.

use std::net::{IpAddr, Ipv4Addr};

use super::{At, Decided, Decision};
use crate::certificate::{CertificateRecord, Owner, PROFILE_NODE};
use crate::change::Change;
use crate::command::{Actor, Command, CommandKind};
use crate::ids::{KeyHash, NodeId, WgKey};
use crate::limits::{NODE_ID_WINDOW, NODES_MAX, WIREGUARD_KEYS_MAX};
use crate::names::{NameError, NodeName};
use crate::refusal::Refusal;
use crate::world::{Node, NodeState, Purpose, Token, World};

/// With what a machine asks for entry.
#[derive(Clone, Copy)]
struct Candidate<'a> {
    name: &'a NodeName,
    key_hash: KeyHash,
    wireguard: WgKey,
}

impl Candidate<'_> {
    /// Whether this is the machine that asked before.
    fn is(&self, node: &Node, token: &Token) -> bool {
        let asked = &node.enrollment;
        asked.token == token.id && asked.key_hash == self.key_hash && asked.wireguard == self.wireguard
    }
}

impl World {
    pub(super) fn decide_request_enrollment(&self, now: At<'_>, actor: &Actor, command: &Command) -> Decided {
        let Command::RequestEnrollment { token, name, key_hash, wireguard } = command else {
            return Ok(Decision::AlreadyDone);
        };
        let candidate = Candidate { name, key_hash: *key_hash, wireguard: *wireguard };
        self.check_not_revoked(actor, candidate)?;
        let token = self.presented_token(actor, token)?;
        if let Some(node) = self.node_by_name(name).filter(|node| candidate.is(node, token)) {
            return match node.state {
                NodeState::Pending { .. } | NodeState::Active => Ok(Decision::AlreadyDone),
                NodeState::Revoked { reason, .. } => Err(Refusal::NodeRevoked { name: name.clone(), reason }),
            };
        }
        if token.purpose == Purpose::Enrollment && !token.require_approval {
            return Err(Refusal::ApprovalNotRequired { id: token.id });
        }
        let (spent, replaced) = self.admit(now, token, candidate)?;
        let requested = Change::NodeRequested {
            id: self.next_node_id(),
            name: name.clone(),
            tags: token.tags.clone(),
            token: token.id,
            key_hash: *key_hash,
            wireguard: *wireguard,
        };
        Ok(Decision::Changes([spent].into_iter().chain(replaced).chain([requested]).collect()))
    }

    pub(super) fn decide_enroll(&self, now: At<'_>, actor: &Actor, command: &Command) -> Decided {
        let Command::Enroll { token, node: id, name, ipv4, wireguard, certificate } = command else {
            return Ok(Decision::AlreadyDone);
        };
        let candidate = Candidate { name, key_hash: certificate.key_hash, wireguard: *wireguard };
        self.check_not_revoked(actor, candidate)?;
        let token = self.presented_token(actor, token)?;
        let known = self.node_by_name(name).filter(|node| candidate.is(node, token));
        let mut changes = Vec::new();
        let tags = match known {
            Some(node) => match node.state {
                NodeState::Revoked { reason, .. } => {
                    return Err(Refusal::NodeRevoked { name: name.clone(), reason });
                }
                NodeState::Pending { approved: false } => {
                    return Err(Refusal::NotApproved { name: name.clone() });
                }
                NodeState::Pending { approved: true } => node.tags.clone(),
                NodeState::Active => return self.repeat_enrollment(node, token, candidate),
            },
            None => {
                if token.purpose == Purpose::Enrollment && token.require_approval {
                    return Err(Refusal::NotApproved { name: name.clone() });
                }
                let (spent, replaced) = self.admit(now, token, candidate)?;
                changes.extend([spent].into_iter().chain(replaced));
                token.tags.clone()
            }
        };
        self.check_node_id(*id, known)?;
        self.check_new_address(now, *ipv4)?;
        self.check_node_certificate(now, *id, name, *ipv4, certificate)?;
        changes.push(Change::NodeEnrolled {
            id: *id,
            name: name.clone(),
            tags,
            token: token.id,
            ipv4: *ipv4,
            wireguard: *wireguard,
            certificate: certificate.clone(),
        });
        Ok(Decision::Changes(changes))
    }

    pub(super) fn decide_renew(&self, now: At<'_>, actor: &Actor, command: &Command) -> Decided {
        let (
            Command::RenewIdentity { node: id, wireguard, certificate, .. },
            Actor::Node { id: caller, serial },
        ) = (command, actor)
        else {
            return Err(self.denied(actor, CommandKind::RenewIdentity));
        };
        let node = self.node(*id).filter(|_| id == caller);
        let Some(node) = node else {
            return Err(self.denied(actor, CommandKind::RenewIdentity));
        };
        // `check_actor` has let in active nodes only, and those have an address.
        let Some(ipv4) = node.ipv4 else {
            return Err(Refusal::NodePending { name: node.name.clone() });
        };
        let distinct = wireguard.first() != wireguard.get(1);
        if wireguard.is_empty() || wireguard.len() > WIREGUARD_KEYS_MAX || !distinct {
            return Err(Refusal::WireguardKeyCount { count: wireguard.len() });
        }
        wireguard.iter().try_for_each(|key| self.check_wireguard(*key, Some(*id)))?;
        self.check_key(certificate.key_hash, |user| *user == Owner::Node(*id))?;
        self.check_node_certificate(now, *id, &node.name, ipv4, certificate)?;
        Ok(Decision::Changes(vec![Change::IdentityRenewed {
            id: *id,
            name: node.name.clone(),
            wireguard: wireguard.clone(),
            certificate: certificate.clone(),
            previous: *serial,
        }]))
    }

    /// A revoked machine is told so, whatever became of its token.
    fn check_not_revoked(&self, actor: &Actor, candidate: Candidate<'_>) -> Result<(), Refusal> {
        let Some(node) = self.node_by_name(candidate.name) else { return Ok(()) };
        let same = *actor == (Actor::Token { id: node.enrollment.token })
            && node.enrollment.key_hash == candidate.key_hash;
        match node.state {
            NodeState::Revoked { reason, .. } if same => {
                Err(Refusal::NodeRevoked { name: node.name.clone(), reason })
            }
            _ => Ok(()),
        }
    }

    /// The same machine asks again: the same answer, as long as its first identity is its newest.
    fn repeat_enrollment(&self, node: &Node, token: &Token, candidate: Candidate<'_>) -> Decided {
        match &node.current {
            Some(identity) if identity.key_hash == candidate.key_hash => Ok(Decision::AlreadyDone),
            _ => Err(Refusal::TokenUsed { id: token.id }),
        }
    }

    /// Lets a new machine in: spends the token, and removes the revoked node whose name it may take.
    fn admit(
        &self,
        now: At<'_>,
        token: &Token,
        candidate: Candidate<'_>,
    ) -> Result<(Change, Option<Change>), Refusal> {
        if token.purpose != Purpose::Enrollment {
            let action = CommandKind::Enroll.action();
            return Err(Refusal::TokenPurpose { id: token.id, action });
        }
        let spent = self.spend(now, token)?;
        if let Some(expected) = token.name.as_ref().filter(|expected| *expected != candidate.name) {
            let (id, expected, got) = (token.id, expected.clone(), candidate.name.clone());
            return Err(Refusal::TokenNameMismatch { id, expected, got });
        }
        self.check_key(candidate.key_hash, |_| false)?;
        self.check_wireguard(candidate.wireguard, None)?;
        let replaced = self.check_node_name(now, token, candidate.name)?;
        if self.state.nodes.len() >= NODES_MAX {
            return Err(Refusal::Limit { what: "nodes", max: NODES_MAX });
        }
        Ok((spent, replaced))
    }

    /// The name is free, or was a revoked node's and the token was made for it since.
    fn check_node_name(
        &self,
        now: At<'_>,
        token: &Token,
        name: &NodeName,
    ) -> Result<Option<Change>, Refusal> {
        let text = name.to_string();
        if text == now.mesh.controller_name {
            return Err(Refusal::NameReserved { name: text });
        }
        if name.under(&now.mesh.domain).is_none() {
            let source = NameError::TooLong { length: text.len(), max: crate::limits::NAME_CHARS_MAX };
            return Err(Refusal::NameInvalid { name: text, source });
        }
        if let Some(granted) = self.policy().granted_under(name.as_str(), &now.mesh.domain) {
            return Err(Refusal::NameTaken { name: text, owner: format!("a grant of {granted}") });
        }
        let holder = self.node_by_name(name);
        let serials = self.index.serials_by_label.get(name.as_str()).into_iter().flatten();
        let mut certificates = serials.filter_map(|serial| self.certificate(serial));
        if let Some(other) =
            certificates.find(|certificate| certificate.is_live(now.at)).filter(|_| holder.is_none())
        {
            return Err(Refusal::NameTaken { name: text, owner: format!("certificate {}", other.serial) });
        }
        let Some(node) = holder else { return Ok(None) };
        match node.state {
            NodeState::Revoked { .. } if token.name.as_ref() == Some(name) => {
                Ok(Some(Change::NodeRemoved { id: node.id, name: name.clone() }))
            }
            NodeState::Revoked { reason, .. } => Err(Refusal::NodeRevoked { name: name.clone(), reason }),
            NodeState::Pending { .. } => {
                Err(Refusal::NameTaken { name: text, owner: format!("pending node {name}") })
            }
            NodeState::Active => Err(Refusal::NameTaken { name: text, owner: format!("node {name}") }),
        }
    }

    /// The index is new, or the pending node's own.
    fn check_node_id(&self, id: NodeId, pending: Option<&Node>) -> Result<(), Refusal> {
        let ahead = id.0.saturating_sub(self.next_node_id().0);
        let fits = match pending {
            Some(node) => node.id == id,
            None => self.node_id_free(id) && ahead <= NODE_ID_WINDOW,
        };
        if fits { Ok(()) } else { Err(Refusal::NodeIdTaken { node: id }) }
    }

    fn check_new_address(&self, now: At<'_>, ipv4: Ipv4Addr) -> Result<(), Refusal> {
        let ip = IpAddr::V4(ipv4);
        if !crate::addresses::is_host(&now.mesh.ipv4_pool, ipv4) {
            return Err(Refusal::AddressOutsidePool { ip });
        }
        if !self.ipv4_free(ipv4) {
            return Err(Refusal::AddressTaken { ip });
        }
        Ok(())
    }

    /// The certificate says what World says: this node, its one name, its two addresses.
    fn check_node_certificate(
        &self,
        now: At<'_>,
        id: NodeId,
        name: &NodeName,
        ipv4: Ipv4Addr,
        certificate: &CertificateRecord,
    ) -> Result<(), Refusal> {
        self.check_certificate(now, certificate)?;
        if certificate.owner != Owner::Node(id) || certificate.profile != PROFILE_NODE {
            return Err(Refusal::CertificateMismatch { what: "it is not the node's identity" });
        }
        if !certificate.names.iter().eq(name.under(&now.mesh.domain).iter()) {
            return Err(Refusal::CertificateMismatch { what: "it does not carry exactly the node's name" });
        }
        let mut ips = certificate.ips.clone();
        ips.sort();
        if ips != [IpAddr::V4(ipv4), IpAddr::V6(now.mesh.ipv6_of(id))] {
            return Err(Refusal::CertificateMismatch {
                what: "it does not carry exactly the node's addresses",
            });
        }
        Ok(())
    }
}
