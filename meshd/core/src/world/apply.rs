//! `apply`: records become state. Infallible assignment; what a change names and is not there is skipped.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::{
    CertificateState, Enrollment, Identity, Mesh, Node, NodeState, Operation, Operator, Outcome, Stop,
    Touched, World,
};
use crate::authority::{Authority, Standing};
use crate::certificate::{CertificateRecord, Owner, Reason, Revocation};
use crate::change::{Change, Record};
use crate::command::Actor;
use crate::ids::{KeyId, NodeId, Serial};
use crate::limits::{
    BUNDLES_MAX, OPERATION_MEMORY, OPERATIONS_MAX, PRUNE_INTERVAL, TOKEN_RETENTION, TOUCHED_RECORDS_MAX,
};
use crate::names::{NodeName, Tag};
use crate::time::UtcTime;

/// Where and when a change happens.
#[derive(Clone, Copy)]
struct Moment {
    seq: u64,
    at: UtcTime,
}

impl World {
    /// Takes record `seq` into the state, forgets what its time has ended, and moves the head.
    pub fn apply(&mut self, seq: u64, record: &Record) {
        let moment = Moment { seq, at: record.at.max(self.state.last_time) };
        self.state.head_seq = seq;
        self.state.last_time = moment.at;
        self.note_proof(&record.actor);
        let mut touched = Touched::default();
        for change in &record.changes {
            self.touch(&mut touched, change);
            self.apply_change(moment, change);
        }
        self.remember_operation(moment, record);
        self.remember_touched(seq, touched);
        self.prune(moment.at);
    }

    /// A node that acts under its current identity has received it.
    fn note_proof(&mut self, actor: &Actor) {
        let Actor::Node { id, serial } = actor else { return };
        let Some(node) = self.state.nodes.get_mut(id) else { return };
        if node.current.as_ref().is_some_and(|identity| identity.serial == *serial) {
            node.proved = true;
        }
    }

    fn apply_change(&mut self, moment: Moment, change: &Change) {
        match change {
            Change::MeshCreated { mesh } => self.create(mesh),
            Change::ControllerCertified { certificate } => {
                self.add_certificate(moment, certificate);
                self.state.controller = Some(certificate.serial);
            }
            Change::ResponderCertified { certificate } => self.add_certificate(moment, certificate),
            Change::TokenCreated { token } => {
                self.state.tokens.insert(token.id, token.clone());
            }
            Change::TokenUsed { id, used } => {
                if let Some(token) = self.state.tokens.get_mut(id) {
                    token.used = *used;
                }
            }
            Change::TokenRevoked { id } => {
                if let Some(token) = self.state.tokens.get_mut(id) {
                    token.revoked_at = Some(moment.at);
                }
            }
            Change::NodeRequested { .. } | Change::NodeEnrolled { .. } => self.add_node(moment, change),
            Change::NodeApproved { id, .. } => {
                self.update_node(*id, |node| node.state = NodeState::Pending { approved: true });
            }
            Change::IdentityRenewed { id, wireguard, certificate, previous, .. } => {
                self.add_certificate(moment, certificate);
                let newest = self.bundle_version();
                self.update_node(*id, |node| {
                    // Whoever comes back after its end has the bundle that came with the answer, or nothing.
                    if !node.is_live(moment.at) {
                        node.given = newest;
                    }
                    node.rotate_keys &= node.wireguard.first() == wireguard.first();
                    node.wireguard.clone_from(wireguard);
                    node.vouched.extend(wireguard);
                    node.previous = Some(*previous);
                    node.current = Some(Identity::from(certificate));
                    node.proved = false;
                });
            }
            Change::NodeTagged { id, tags, .. } => self.update_node(*id, |node| node.tags.clone_from(tags)),
            Change::NodeRevoked { id, reason, .. } => self.update_node(*id, |node| {
                node.state = NodeState::Revoked { at: moment.at, reason: *reason };
                node.stopped.clear();
                node.reissue.clear();
                node.rotate_keys = false;
            }),
            Change::NodeRemoved { id, .. } => self.remove_node(*id),
            Change::KeyRotationAsked { id, .. } => self.update_node(*id, |node| node.rotate_keys = true),
            Change::CertificateIssued { certificate } => self.add_certificate(moment, certificate),
            Change::CertificateRevoked { serial, reason } => self.revoke(*serial, moment, *reason),
            Change::KeyBlocked { key_hash } => {
                self.state.blocked_keys.insert(*key_hash);
            }
            Change::WireguardKeyBlocked { key } => {
                self.state.blocked_wireguard.insert(*key);
            }
            Change::PairStopped { node, pair, names, reason } => self.update_node(*node, |node| {
                let stop = Stop { at: moment.at, reason: *reason, names: names.clone() };
                node.stopped.insert(pair.clone(), stop);
                node.reissue.remove(pair);
            }),
            Change::PairResumed { node, pair } => self.update_node(*node, |node| {
                node.stopped.remove(pair);
                node.reissue.remove(pair);
            }),
            Change::ReissueAsked { node, pair } => self.update_node(*node, |node| {
                node.reissue.insert(pair.clone());
            }),
            Change::PolicyApplied { toml, policy, version } => {
                self.state.policy_toml.clone_from(toml);
                self.state.policy.clone_from(policy);
                self.state.policy_version = *version;
            }
            Change::OperatorAdded { name, role, login } => {
                let (name, role, login) = (name.clone(), *role, *login);
                let operator =
                    Operator { name: name.clone(), role, added_at: moment.at, login, serial: None };
                self.state.operators.insert(name, operator);
            }
            Change::OperatorRemoved { name } => {
                self.state.operators.remove(name);
            }
            Change::OperatorCertified { name, serial } => {
                if let Some(operator) = self.state.operators.get_mut(name) {
                    operator.serial = Some(*serial);
                }
            }
            Change::CrlIssued { crl } => {
                let shards = self.state.crls.entry(crl.issuer_key_id.clone()).or_default();
                shards.insert(crl.shard, crl.clone());
            }
            Change::CrlShardsOpened { issuer_key_id, group } => {
                let groups = self.state.shard_groups.entry(issuer_key_id.clone()).or_default();
                groups.push(group.clone());
            }
            Change::AuthorityAdded { authority } => self.state.authorities.push(authority.clone()),
            Change::AuthorityStanding { key_id, standing } => {
                self.update_authority(key_id, |authority| authority.standing = *standing);
            }
            Change::RootCrossSigned { cross } => self.state.crosses.push(cross.clone()),
            Change::RotationChanged { rotation } => self.state.rotation.clone_from(rotation),
            Change::BundleIssued { bundle } => {
                self.state.bundles.insert(bundle.version, bundle.clone());
                while self.state.bundles.len() > BUNDLES_MAX {
                    self.state.bundles.pop_first();
                }
            }
            Change::BundleAcknowledged { version, nodes } => {
                for id in nodes {
                    // Only what a node says under its current identity is noted: it has received that one.
                    self.update_node(*id, |node| {
                        node.bundle = node.bundle.max(*version);
                        node.proved = true;
                    });
                }
            }
            Change::RootExported { key_id } => {
                self.update_authority(key_id, |authority| authority.exported = true);
            }
            Change::RootSealed { key_id } => {
                self.update_authority(key_id, |authority| authority.sealed = true);
            }
            Change::Denied { .. } => {}
            Change::ClockHeld => self.state.clock_held = true,
            Change::ClockConfirmed => self.state.clock_held = false,
        }
    }

    /// Who will see a difference once `change` is applied.
    fn touch(&self, touched: &mut Touched, change: &Change) {
        match change {
            Change::NodeEnrolled { id, .. }
            | Change::NodeTagged { id, .. }
            | Change::NodeRevoked { id, .. }
            | Change::NodeRemoved { id, .. } => {
                touched.nodes.insert(*id);
                touched.own.insert(*id);
            }
            Change::IdentityRenewed { id, .. } => {
                touched.nodes.insert(*id);
                // The renewal may be the rotation that the node's own facts ask for.
                touched.own.extend(self.node(*id).filter(|node| node.rotate_keys).map(|node| node.id));
            }
            Change::KeyRotationAsked { id: node, .. }
            | Change::PairStopped { node, .. }
            | Change::PairResumed { node, .. }
            | Change::ReissueAsked { node, .. } => {
                touched.own.insert(*node);
            }
            Change::PolicyApplied { .. } => touched.policy = true,
            Change::CrlIssued { crl } => {
                touched.crls.insert((crl.issuer_key_id.clone(), crl.shard));
            }
            Change::BundleIssued { .. } => touched.trust = true,
            Change::MeshCreated { .. }
            | Change::ControllerCertified { .. }
            | Change::ResponderCertified { .. }
            | Change::TokenCreated { .. }
            | Change::TokenUsed { .. }
            | Change::TokenRevoked { .. }
            | Change::NodeRequested { .. }
            | Change::NodeApproved { .. }
            | Change::CertificateIssued { .. }
            | Change::CertificateRevoked { .. }
            | Change::KeyBlocked { .. }
            | Change::WireguardKeyBlocked { .. }
            | Change::OperatorAdded { .. }
            | Change::OperatorRemoved { .. }
            | Change::OperatorCertified { .. }
            | Change::CrlShardsOpened { .. }
            | Change::AuthorityAdded { .. }
            | Change::AuthorityStanding { .. }
            | Change::RootCrossSigned { .. }
            | Change::RotationChanged { .. }
            | Change::BundleAcknowledged { .. }
            | Change::RootExported { .. }
            | Change::RootSealed { .. }
            | Change::Denied { .. }
            | Change::ClockHeld
            | Change::ClockConfirmed => {}
        }
    }

    /// The authorities that a mesh begins with are its first bundle.
    fn create(&mut self, mesh: &Mesh) {
        self.state.mesh = Some(mesh.clone());
        // The last of each kind counts, as it did before authorities could change.
        let last = |is_root: bool| mesh.cas.iter().rfind(|ca| ca.is_root == is_root);
        let (Some(root), Some(issuing)) = (last(true), last(false)) else { return };
        self.state.authorities = mesh
            .cas
            .iter()
            .map(|ca| Authority {
                key_id: ca.key_id.clone(),
                der: ca.der.clone(),
                is_root: ca.is_root,
                root: if ca.is_root { ca.key_id.clone() } else { root.key_id.clone() },
                standing: match ca.key_id == root.key_id || ca.key_id == issuing.key_id {
                    true => Standing::Active,
                    false => Standing::Retiring,
                },
                exported: false,
                sealed: ca.sealed,
            })
            .collect();
        let bundle = self.next_bundle(&issuing.key_id, &[]);
        self.state.bundles.insert(bundle.version, bundle);
    }

    fn update_authority(&mut self, key_id: &KeyId, update: impl FnOnce(&mut Authority)) {
        if let Some(authority) = self.state.authorities.iter_mut().find(|known| known.key_id == *key_id) {
            update(authority);
        }
    }

    /// A new node, or a pending one that becomes active.
    fn add_node(&mut self, moment: Moment, change: &Change) {
        let node = match change {
            Change::NodeRequested { id, name, tags, token, key_hash, wireguard } => {
                let (token, key_hash, wireguard, requested_at) = (*token, *key_hash, *wireguard, moment.at);
                let enrollment = Enrollment { token, key_hash, wireguard, requested_at };
                pending_node(*id, name.clone(), tags.clone(), enrollment)
            }
            Change::NodeEnrolled { id, name, tags, token, ipv4, wireguard, certificate } => {
                self.add_certificate(moment, certificate);
                let (token, key_hash, wireguard) = (*token, certificate.key_hash, *wireguard);
                let requested_at =
                    self.node(*id).map_or(moment.at, |pending| pending.enrollment.requested_at);
                let enrollment = Enrollment { token, key_hash, wireguard, requested_at };
                Node {
                    state: NodeState::Active,
                    ipv4: Some(*ipv4),
                    current: Some(Identity::from(certificate)),
                    enrolled_at: Some(moment.at),
                    bundle: self.bundle_version(),
                    given: self.bundle_version(),
                    ..pending_node(*id, name.clone(), tags.clone(), enrollment)
                }
            }
            _ => return,
        };
        self.state.highest_node = self.state.highest_node.max(node.id.0);
        if let Some(pending) = self.state.nodes.remove(&node.id) {
            self.index.remove_node(&pending);
        }
        self.index.add_node(&node);
        self.state.nodes.insert(node.id, node);
    }

    fn update_node(&mut self, id: NodeId, update: impl FnOnce(&mut Node)) {
        let Some(node) = self.state.nodes.get_mut(&id) else { return };
        update(node);
        self.index.node_by_wireguard.extend(node.vouched.iter().map(|key| (*key, id)));
    }

    fn remove_node(&mut self, id: NodeId) {
        if let Some(node) = self.state.nodes.remove(&id) {
            self.index.remove_node(&node);
        }
        self.state.retired.insert(id);
    }

    fn add_certificate(&mut self, moment: Moment, record: &CertificateRecord) {
        let certificate = CertificateState {
            serial: record.serial,
            key_hash: record.key_hash,
            owner: record.owner.clone(),
            profile: record.profile.clone(),
            names: record.names.clone(),
            ips: record.ips.clone(),
            pair_name: record.pair_name.clone(),
            shard: record.shard,
            issuer_key_id: record.issuer_key_id.clone(),
            not_before: record.not_before,
            not_after: record.not_after,
            issued_seq: moment.seq,
            revoked: None,
        };
        let domain = self.state.mesh.as_ref().map(|mesh| &mesh.domain);
        self.index.add_certificate(&certificate, domain);
        self.state.certificates.insert(certificate.serial, Arc::new(certificate));
    }

    /// What is revoked stays so with its first time and reason.
    fn revoke(&mut self, serial: Serial, Moment { seq, at }: Moment, reason: Reason) {
        let Some(certificate) = self.state.certificates.get_mut(&serial) else { return };
        let certificate = Arc::make_mut(certificate);
        if certificate.revoked.is_none() {
            let revoked = Revocation { at, reason };
            certificate.revoked = Some(revoked);
            self.index.release_key(certificate);
            self.index.add_revoked(certificate, revoked);
        }
        let shards = self.state.revoked_seq.entry(certificate.issuer_key_id.clone()).or_default();
        shards.insert(certificate.shard, seq);
    }

    fn remember_operation(&mut self, moment: Moment, record: &Record) {
        let Moment { seq, at } = moment;
        let (action, who) = (record.action.clone(), record.who.clone());
        let operation = Operation { at, seq, action, who, outcome: outcome(&record.changes) };
        if let Some(old) = self.state.operations.insert(record.operation, operation) {
            self.index.operations.remove(&(old.at, record.operation));
        }
        self.index.operations.insert((at, record.operation));
        while let Some((when, id)) = self.index.operations.first().copied() {
            if self.index.operations.len() <= OPERATIONS_MAX && when + OPERATION_MEMORY >= at {
                break;
            }
            self.index.operations.remove(&(when, id));
            self.state.operations.remove(&id);
        }
    }

    fn remember_touched(&mut self, seq: u64, touched: Touched) {
        if touched.is_empty() {
            return;
        }
        self.state.touched.push_back((seq, touched));
        while self.state.touched.len() > TOUCHED_RECORDS_MAX {
            if let Some((forgotten, _)) = self.state.touched.pop_front() {
                self.state.touched_floor = forgotten;
            }
        }
    }

    /// Forgets what ended, by record time, so that every replay forgets the same.
    fn prune(&mut self, at: UtcTime) {
        if at < self.state.pruned_at + PRUNE_INTERVAL {
            return;
        }
        self.state.pruned_at = at;
        self.prune_certificates(at);
        self.state.tokens.retain(|_, token| at < token.expires_at + TOKEN_RETENTION);
        let tokens = &self.state.tokens;
        let waiting =
            self.state.nodes.values().filter(|node| matches!(node.state, NodeState::Pending { .. }));
        let forgotten = waiting.filter(|node| !tokens.contains_key(&node.enrollment.token));
        let forgotten: Vec<NodeId> = forgotten.map(|node| node.id).collect();
        forgotten.into_iter().for_each(|id| self.remove_node(id));
    }

    fn prune_certificates(&mut self, at: UtcTime) {
        let ended = self.index.ends.iter().take_while(|(not_after, _)| *not_after <= at);
        let ended: Vec<Serial> =
            ended.map(|(_, serial)| *serial).filter(|serial| !self.is_needed(serial)).collect();
        let domain = self.state.mesh.as_ref().map(|mesh| &mesh.domain);
        for serial in ended {
            if let Some(certificate) = self.state.certificates.remove(&serial) {
                self.index.remove_certificate(&certificate, domain);
            }
        }
    }

    /// Whether an expired certificate must be remembered: somebody's identity (to resume, or to be told why
    /// not), or revoked and not yet listed by a CRL signed after its expiry.
    fn is_needed(&self, serial: &Serial) -> bool {
        let Some(certificate) = self.certificate(serial) else { return false };
        let identity = match &certificate.owner {
            Owner::Node(id) => self.node(*id).is_some_and(|node| {
                node.previous == Some(*serial) || node.current.as_ref().is_some_and(|c| c.serial == *serial)
            }),
            Owner::Operator(name) => {
                self.operator(name).is_some_and(|operator| operator.serial == Some(*serial))
            }
            Owner::Controller { .. } => self.state.controller == Some(*serial),
            Owner::Service { .. } | Owner::Detached { .. } => false,
        };
        identity || (certificate.revoked.is_some() && !self.is_off_crl(certificate))
    }
}

fn pending_node(id: NodeId, name: NodeName, tags: BTreeSet<Tag>, enrollment: Enrollment) -> Node {
    Node {
        id,
        name,
        state: NodeState::Pending { approved: false },
        tags,
        ipv4: None,
        wireguard: vec![enrollment.wireguard],
        vouched: [enrollment.wireguard].into(),
        current: None,
        previous: None,
        proved: false,
        enrollment,
        enrolled_at: None,
        rotate_keys: false,
        stopped: BTreeMap::new(),
        reissue: BTreeSet::new(),
        bundle: 0,
        given: 0,
    }
}

/// What the repetition of a request is answered with: the last thing that it made.
fn outcome(changes: &[Change]) -> Outcome {
    let made = changes.iter().rev().find_map(|change| match change {
        Change::NodeEnrolled { id, .. } | Change::NodeRequested { id, .. } => Some(Outcome::Node(*id)),
        Change::IdentityRenewed { certificate, .. }
        | Change::CertificateIssued { certificate }
        | Change::ResponderCertified { certificate }
        | Change::ControllerCertified { certificate } => Some(Outcome::Certificate(certificate.serial)),
        Change::TokenCreated { token } => Some(Outcome::Token(token.id)),
        _ => None,
    });
    made.unwrap_or(Outcome::Done)
}
