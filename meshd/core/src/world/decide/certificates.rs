//! Certificates of services and of machines that are no nodes: issued, revoked.

use std::collections::{BTreeMap, BTreeSet};

use super::{At, Decided, Decision};
use crate::certificate::{CertificateRecord, Owner, PROFILE_CLIENT, PROFILES_SERVICE, Reason};
use crate::change::Change;
use crate::command::{Actor, CommandKind, Made, Which};
use crate::ids::{KeyHash, NodeId, Serial};
use crate::limits::CERTIFICATES_PER_NODE_MAX;
use crate::names::{PairName, ProfileName};
use crate::refusal::Refusal;
use crate::world::{Asker, CertificateState, Node, NodeState, Wish, World};

impl World {
    pub(super) fn decide_issue(
        &self,
        now: At<'_>,
        actor: &Actor,
        certificate: &CertificateRecord,
        restart: bool,
        made: Option<&Made>,
    ) -> Decided {
        self.check_certificate(now, certificate)?;
        check_service(certificate)?;
        self.check_made(certificate, made)?;
        let owner = match actor {
            Actor::Node { id, .. } => Owner::Service { node: *id, name: certificate.pair_name.clone() },
            Actor::Operator { name, .. } => Owner::Detached { operator: Some(name.clone()) },
            Actor::LocalRoot => Owner::Detached { operator: None },
            Actor::Controller | Actor::Token { .. } => {
                return Err(self.denied(actor, CommandKind::IssueCertificate));
            }
        };
        if certificate.owner != owner {
            return Err(Refusal::CertificateMismatch { what: "it is not the caller's" });
        }
        let mut changes = match owner.node() {
            Some(id) => {
                let node = self.node(id).ok_or(Refusal::NodeNotFound { node: id })?;
                self.check_service_of(now, node, certificate, made)?;
                self.resumed(node, certificate, restart)?
            }
            None => {
                self.check_key(certificate.key_hash, |user| matches!(user, Owner::Detached { .. }))?;
                self.check_wish(now, Asker::Detached, certificate, made)?;
                Vec::new()
            }
        };
        changes.push(Change::CertificateIssued { certificate: certificate.clone() });
        Ok(Decision::Changes(changes))
    }

    /// A node's service may take what its profile gives: under a built-in one the node's names, what lies below them,
    /// what policy grants, and the node's own addresses.
    fn check_service_of(
        &self,
        now: At<'_>,
        node: &Node,
        certificate: &CertificateRecord,
        made: Option<&Made>,
    ) -> Result<(), Refusal> {
        self.check_key(
            certificate.key_hash,
            |user| matches!(user, Owner::Service { node: owner, .. } if *owner == node.id),
        )?;
        self.check_wish(now, Asker::Node(node.id), certificate, made)?;
        // Counted only where the ended ones could make a difference.
        let known = self.index.serials_by_node.get(&node.id).map_or(0, BTreeSet::len);
        if known >= CERTIFICATES_PER_NODE_MAX {
            let services = self.certificates_of(node.id).filter(|c| c.owner != Owner::Node(node.id));
            if services.filter(|service| service.is_live(now.at)).count() >= CERTIFICATES_PER_NODE_MAX {
                return Err(Refusal::Limit {
                    what: "live certificates of one node",
                    max: CERTIFICATES_PER_NODE_MAX,
                });
            }
        }
        Ok(())
    }

    /// The certificate was made from the profile that is in force now.
    fn check_made(&self, certificate: &CertificateRecord, made: Option<&Made>) -> Result<(), Refusal> {
        let profile = certificate.profile.as_str();
        if PROFILES_SERVICE.contains(&profile) {
            return Ok(());
        }
        let (Some((_, known)), Some(made)) = (self.profile(profile), made) else {
            return Err(Refusal::ProfileUnknown { profile: crate::change::escape(profile) });
        };
        match *known == made.profile {
            true => Ok(()),
            false => Err(Refusal::ProfileChanged { profile: profile.to_owned() }),
        }
    }

    fn check_wish(
        &self,
        now: At<'_>,
        asker: Asker,
        certificate: &CertificateRecord,
        made: Option<&Made>,
    ) -> Result<(), Refusal> {
        let wish = Wish {
            lifetime: Some(certificate.not_after.since(now.at)),
            key: made.map(|made| made.key),
            profile: &certificate.profile,
            names: &certificate.names,
            ips: &certificate.ips,
            pair_name: &certificate.pair_name,
        };
        self.judge_wish(asker, &wish).into_iter().try_for_each(|verdict| verdict.outcome.map(drop))
    }

    /// The stops and wishes that issuing this pair ends.
    fn resumed(
        &self,
        node: &Node,
        certificate: &CertificateRecord,
        restart: bool,
    ) -> Result<Vec<Change>, Refusal> {
        let pair = &certificate.pair_name;
        let hit = node.stopped.iter().filter(|(stopped, stop)| {
            *stopped == pair || certificate.names.iter().any(|name| stop.names.contains(name))
        });
        let mut pairs: BTreeSet<&String> = node.reissue.get(pair).into_iter().collect();
        for (stopped, stop) in hit {
            if !restart {
                return Err(Refusal::NameStopped { name: stopped.clone(), reason: stop.reason });
            }
            pairs.insert(stopped);
        }
        let resumed = |pair: &String| Change::PairResumed { node: node.id, pair: pair.clone() };
        Ok(pairs.into_iter().map(resumed).collect())
    }

    pub(super) fn decide_revoke_certificates(
        &self,
        now: At<'_>,
        actor: &Actor,
        which: &Which,
        reason: Reason,
    ) -> Decided {
        let mine = |certificate: &&CertificateState| match actor {
            Actor::Node { id, .. } => {
                matches!(&certificate.owner, Owner::Service { node, .. } if node == id)
            }
            _ => true,
        };
        let matched: Vec<&CertificateState> = self.matching(which).into_iter().filter(mine).collect();
        if matched.is_empty() {
            return self.revoke_nothing(actor, which);
        }
        // A name that both a node and a service carry means the service.
        let is_service =
            |c: &CertificateState| matches!(c.owner, Owner::Service { .. } | Owner::Detached { .. });
        let services_only = matches!(which, Which::Name(_)) && matched.iter().any(|c| is_service(c));
        let meant = matched.into_iter().filter(|c| c.revoked.is_none() && (is_service(c) || !services_only));
        let meant: Vec<&CertificateState> = meant.collect();
        meant.iter().try_for_each(|certificate| self.check_revocable(which, certificate))?;
        let mut live: BTreeMap<Serial, &CertificateState> =
            meant.into_iter().filter(|c| c.is_live(now.at)).map(|c| (c.serial, c)).collect();
        if is_compromise(reason) {
            let keys: Vec<KeyHash> = live.values().map(|c| c.key_hash).collect();
            let shared = keys.iter().flat_map(|key| self.matching(&Which::KeyHash(*key)));
            live.extend(shared.filter(|c| c.is_live(now.at)).map(|c| (c.serial, c)));
        }
        let mut changes: Vec<Change> =
            live.keys().map(|serial| Change::CertificateRevoked { serial: *serial, reason }).collect();
        changes.extend(self.blocked_by(now, which, reason, &live));
        changes.extend(self.stopped_by(now, reason, &live));
        Ok(Decision::from_changes(changes))
    }

    /// Certificates that World remembers, revoked ones included.
    fn matching(&self, which: &Which) -> Vec<&CertificateState> {
        let serials = match which {
            Which::Serial(serial) => return self.certificate(serial).into_iter().collect(),
            Which::Name(name) => self.index.serials_by_name.get(&name.to_ascii_lowercase()),
            Which::KeyHash(key) => self.index.serials_by_key.get(key),
        };
        serials.into_iter().flatten().filter_map(|serial| self.certificate(serial)).collect()
    }

    /// Nothing is known of it: gone already, or never there.
    fn revoke_nothing(&self, actor: &Actor, which: &Which) -> Decided {
        let (text, done) = match which {
            Which::Serial(serial) => (serial.to_string(), false),
            Which::Name(name) => {
                let pair = name.to_ascii_lowercase();
                let mut nodes = self.nodes().filter(|node| match actor {
                    Actor::Node { id, .. } => node.id == *id,
                    _ => true,
                });
                (name.clone(), nodes.any(|node| node.stopped.contains_key(&pair)))
            }
            Which::KeyHash(key) => (key.to_string(), self.key_blocked(key)),
        };
        if done { Ok(Decision::AlreadyDone) } else { Err(Refusal::CertificateNotFound { which: text }) }
    }

    /// Identities of nodes end with the node; the controller's current one ends with its successor.
    fn check_revocable(&self, which: &Which, certificate: &CertificateState) -> Result<(), Refusal> {
        match &certificate.owner {
            Owner::Node(id) => {
                let node = self.node(*id).ok_or(Refusal::NodeNotFound { node: *id })?;
                let which = match which {
                    Which::Serial(serial) => serial.to_string(),
                    Which::Name(name) => name.clone(),
                    Which::KeyHash(key) => key.to_string(),
                };
                Err(Refusal::NodeIdentity { which, node: node.name.clone() })
            }
            Owner::Controller { .. } if self.controller_serial() == Some(certificate.serial) => {
                Err(Refusal::ControllerIdentity { serial: certificate.serial })
            }
            _ => Ok(()),
        }
    }

    /// Keys that must not come back: all that were named or are compromised, and those with no other
    /// certificate left. A key that stays in honest use under another certificate stays.
    fn blocked_by<'a>(
        &'a self,
        now: At<'a>,
        which: &'a Which,
        reason: Reason,
        ended: &'a BTreeMap<Serial, &CertificateState>,
    ) -> impl Iterator<Item = Change> + 'a {
        let keys: BTreeSet<KeyHash> = ended.values().map(|c| c.key_hash).collect();
        let blocked = keys.into_iter().filter(move |key| {
            let rest = self.matching(&Which::KeyHash(*key));
            let mut rest = rest.into_iter().filter(|c| c.is_live(now.at) && !ended.contains_key(&c.serial));
            matches!(which, Which::KeyHash(_)) || is_compromise(reason) || rest.next().is_none()
        });
        blocked.map(|key_hash| Change::KeyBlocked { key_hash })
    }

    /// Managed pairs that lost the certificate they use: to be issued again at once when superseded,
    /// stopped otherwise.
    fn stopped_by(
        &self,
        now: At<'_>,
        reason: Reason,
        ended: &BTreeMap<Serial, &CertificateState>,
    ) -> Vec<Change> {
        let mut pairs: BTreeMap<(NodeId, &str), Vec<&CertificateState>> = BTreeMap::new();
        for certificate in ended.values() {
            if let Owner::Service { node, name } = &certificate.owner {
                pairs.entry((*node, name)).or_default().push(certificate);
            }
        }
        let mut changes = Vec::new();
        for ((id, pair), lost) in pairs {
            let Some(node) = self.node(id).filter(|node| node.state == NodeState::Active) else { continue };
            let newest_lost = lost.iter().map(|c| c.issued_seq).max();
            let same_pair =
                self.certificates_of(id).filter(|c| c.owner.node() == Some(id) && c.pair_name == pair);
            let left = same_pair.filter(|c| c.is_live(now.at) && !ended.contains_key(&c.serial));
            let newer_left = left.map(|c| c.issued_seq).max() > newest_lost;
            if !newer_left {
                changes.extend(pair_loss(node, pair, &lost, reason));
            }
        }
        changes
    }
}

fn pair_loss(node: &Node, pair: &str, lost: &[&CertificateState], reason: Reason) -> Option<Change> {
    let (id, stop) = (node.id, node.stopped.get(pair));
    if reason == Reason::Superseded {
        let wanted = stop.is_none() && !node.reissue.contains(pair);
        return wanted.then(|| Change::ReissueAsked { node: id, pair: pair.to_owned() });
    }
    let names = lost.iter().flat_map(|c| &c.names).chain(stop.into_iter().flat_map(|stop| &stop.names));
    Some(Change::PairStopped { node: id, pair: pair.to_owned(), names: names.cloned().collect(), reason })
}

const fn is_compromise(reason: Reason) -> bool {
    matches!(reason, Reason::KeyCompromise | Reason::CaCompromise)
}

/// What holds for every service: a service profile, and a pair named by one of its names or a plain label.
fn check_service(certificate: &CertificateRecord) -> Result<(), Refusal> {
    let mismatch = |what| Err(Refusal::CertificateMismatch { what });
    let custom = ProfileName::try_from(certificate.profile.as_str());
    let custom = custom.is_ok_and(|name| name.as_str() == certificate.profile);
    if !custom && !PROFILES_SERVICE.contains(&certificate.profile.as_str()) {
        return mismatch("its profile is not for services");
    }
    if certificate.names.is_empty() && certificate.ips.is_empty() && certificate.profile != PROFILE_CLIENT {
        return mismatch("it has no name");
    }
    let pair = &certificate.pair_name;
    let checked = PairName::try_from(pair.as_str());
    let checked =
        checked.map_err(|source| Refusal::NameInvalid { name: pair.escape_debug().to_string(), source })?;
    let carried = certificate.names.iter().any(|name| name.as_str() == pair)
        || certificate.ips.iter().any(|ip| ip.to_string() == *pair);
    let label = !pair.contains(['.', ':']);
    if checked.as_str() != pair || !(carried || label) {
        return mismatch("its pair is named by none of its names");
    }
    Ok(())
}
