//! May this node, or this machine that is no node, have such a certificate? One judgement for `cert issue`, for
//! `--dry-run --explain`, and for what a changed policy means for certificates that exist.

use std::net::IpAddr;
use std::time::Duration;

use super::{NameOwner, Node, NodeState, World, subject};
use crate::certificate::{Owner, PROFILES_SERVICE};
use crate::ids::NodeId;
use crate::names::{self, DnsName, ProfileName};
use crate::policy::Subject;
use crate::profile::{KeyType, Part, Profile, Rule, ServiceKind, service_label};
use crate::refusal::Refusal;
use crate::world::{CertificateState, Mesh};

/// For whom a certificate is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asker {
    /// A service of this node.
    Node(NodeId),
    /// A machine that is no node.
    Detached,
}

/// What a certificate shall say, as far as policy decides it.
#[derive(Clone, Copy, Debug)]
pub struct Wish<'a> {
    pub profile: &'a str,
    pub names: &'a [DnsName],
    pub ips: &'a [IpAddr],
    pub pair_name: &'a str,
    /// `None`: the profile's.
    pub lifetime: Option<Duration>,
    /// `None`: not known yet.
    pub key: Option<KeyType>,
}

impl<'a> Wish<'a> {
    /// The same again, as a renewal would ask for it. The key's type is not remembered.
    pub fn renewal(certificate: &'a CertificateState) -> Self {
        Self {
            profile: &certificate.profile,
            names: &certificate.names,
            ips: &certificate.ips,
            pair_name: &certificate.pair_name,
            lifetime: None,
            key: None,
        }
    }
}

/// What policy says to one part of a wish.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    pub about: About,
    pub outcome: Result<Rule, Refusal>,
}

/// The part of a wish that a verdict is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum About {
    Profile(String),
    Key(KeyType),
    Lifetime(Duration),
    /// The last part of a SPIFFE ID.
    Service(String),
    Name(DnsName),
    Address(IpAddr),
}

/// A profile as the policy in force knows it.
#[derive(Clone, Copy)]
enum Terms<'a> {
    BuiltIn { is_peer: bool },
    Custom { name: &'a ProfileName, profile: &'a Profile },
}

impl World {
    /// A custom profile of the policy in force.
    pub fn profile(&self, name: &str) -> Option<(&ProfileName, &Profile)> {
        self.policy().profile.iter().find(|(known, _)| known.as_str() == name)
    }

    /// What policy says to each part of a wish. The certificate may be issued if nothing is refused.
    pub fn judge_wish(&self, asker: Asker, wish: &Wish<'_>) -> Vec<Verdict> {
        let about_profile = || About::Profile(wish.profile.to_owned());
        let refused = |refusal| vec![Verdict { about: about_profile(), outcome: Err(refusal) }];
        let Some(mesh) = self.mesh() else { return refused(Refusal::MeshMissing) };
        let node = match asker {
            Asker::Detached => None,
            Asker::Node(id) => match self.node(id) {
                Some(node) => Some(node),
                None => return refused(Refusal::NodeNotFound { node: id }),
            },
        };
        let terms = match self.terms(wish.profile) {
            Ok(terms) => terms,
            Err(refusal) => return refused(refusal),
        };
        let judge = Judge { world: self, mesh, node, terms };
        let mut verdicts = vec![Verdict { about: about_profile(), outcome: judge.profile() }];
        verdicts.extend(wish.key.map(|key| Verdict { about: About::Key(key), outcome: judge.key(key) }));
        verdicts.extend(
            wish.lifetime.map(|lifetime| Verdict {
                about: About::Lifetime(lifetime),
                outcome: judge.lifetime(lifetime),
            }),
        );
        if let Some(node) = node.filter(|_| terms.is_peer()) {
            let label = service_label(wish.pair_name, &node.name);
            let about = About::Service(label.to_owned());
            verdicts.push(Verdict { about, outcome: judge.service(node, label) });
        }
        let names = wish.names.iter();
        verdicts.extend(
            names.map(|name| Verdict { about: About::Name(name.clone()), outcome: judge.name(name) }),
        );
        let ips = wish.ips.iter();
        verdicts.extend(ips.map(|ip| Verdict { about: About::Address(*ip), outcome: judge.address(*ip) }));
        verdicts
    }

    /// Why policy would not let a service's certificate be renewed as it is; `None` if it would, and for what is no
    /// service's.
    pub fn renewal_refused(&self, certificate: &CertificateState) -> Option<Refusal> {
        let Owner::Service { node, .. } = &certificate.owner else { return None };
        let verdicts = self.judge_wish(Asker::Node(*node), &Wish::renewal(certificate));
        verdicts.into_iter().find_map(|verdict| verdict.outcome.err())
    }

    fn terms(&self, profile: &str) -> Result<Terms<'_>, Refusal> {
        if PROFILES_SERVICE.contains(&profile) {
            return Ok(Terms::BuiltIn { is_peer: profile == ServiceKind::Peer.as_str() });
        }
        if names::PROFILES_BUILT_IN.contains(&profile) {
            return Err(Refusal::CertificateMismatch { what: "its profile is not for services" });
        }
        let found = self.profile(profile).map(|(name, profile)| Terms::Custom { name, profile });
        found.ok_or_else(|| Refusal::ProfileUnknown { profile: crate::change::escape(profile) })
    }
}

impl Terms<'_> {
    fn is_peer(&self) -> bool {
        match self {
            Self::BuiltIn { is_peer } => *is_peer,
            Self::Custom { profile, .. } => profile.kind == ServiceKind::Peer,
        }
    }
}

struct Judge<'a> {
    world: &'a World,
    mesh: &'a Mesh,
    /// `None`: a machine that is no node.
    node: Option<&'a Node>,
    terms: Terms<'a>,
}

impl Judge<'_> {
    fn who(&self) -> String {
        self.node
            .map_or_else(|| "machines that are no nodes".to_owned(), |node| format!("node {}", node.name))
    }

    fn profile(&self) -> Result<Rule, Refusal> {
        match (self.terms, self.node) {
            (Terms::BuiltIn { is_peer: true }, None) => {
                Err(Refusal::CertificateMismatch { what: "profile peer is only for services of nodes" })
            }
            (Terms::BuiltIn { .. }, _) => Ok(Rule::BuiltIn),
            (Terms::Custom { name, profile }, Some(node)) if profile.speaks_about(subject(node)) => {
                Ok(Rule::Allowed { profile: name.clone() })
            }
            (Terms::Custom { name, .. }, _) => {
                Err(Refusal::ProfileNotGiven { profile: name.clone(), who: self.who() })
            }
        }
    }

    fn key(&self, key: KeyType) -> Result<Rule, Refusal> {
        match self.terms {
            Terms::BuiltIn { .. } => Ok(Rule::BuiltIn),
            Terms::Custom { name, profile } if profile.keys.contains(&key) => {
                Ok(Rule::Allowed { profile: name.clone() })
            }
            Terms::Custom { name, .. } => Err(Refusal::KeyOutsideProfile { profile: name.clone(), key }),
        }
    }

    fn lifetime(&self, lifetime: Duration) -> Result<Rule, Refusal> {
        match self.terms {
            Terms::BuiltIn { .. } => Ok(Rule::BuiltIn),
            Terms::Custom { name, profile } if lifetime <= profile.lifetime_max() => {
                Ok(Rule::Allowed { profile: name.clone() })
            }
            Terms::Custom { name, profile } => {
                let max = profile.lifetime_max();
                Err(Refusal::LifetimeOutsideProfile { profile: name.clone(), asked: lifetime, max })
            }
        }
    }

    fn service(&self, node: &Node, label: &str) -> Result<Rule, Refusal> {
        let Terms::Custom { name, profile } = self.terms else { return Ok(Rule::OwnService) };
        let found = profile.gives_service(subject(node), label);
        let refusal = || Refusal::ServiceOutsideProfile { profile: name.clone(), service: label.to_owned() };
        found.map(|found| given(name, found)).ok_or_else(refusal)
    }

    /// A name is inside the domain and not the mesh's own, and nobody else's. After that it is the profile's to give.
    fn name(&self, name: &DnsName) -> Result<Rule, Refusal> {
        let owner = self.owner_of(name)?;
        let text = || name.to_string();
        let Some(node) = self.node else {
            return match owner {
                Some(owner @ NameOwner::Node(_)) => {
                    Err(Refusal::NameTaken { name: text(), owner: self.world.owner_label(&owner) })
                }
                _ => Ok(Rule::Detached),
            };
        };
        let own = node.name.under(&self.mesh.domain);
        match (owner, self.terms) {
            (Some(owner @ NameOwner::Node(id)), _) if id != node.id => {
                Err(Refusal::NameTaken { name: text(), owner: self.world.owner_label(&owner) })
            }
            (_, Terms::Custom { name: profile_name, profile }) => {
                let found = profile.gives_name(subject(node), own.as_ref(), name);
                found.map(|found| given(profile_name, found)).ok_or_else(|| Refusal::NameOutsideProfile {
                    profile: profile_name.clone(),
                    name: text(),
                    node: node.name.clone(),
                })
            }
            (Some(NameOwner::Node(_)), _) if own.as_ref() == Some(name) => Ok(Rule::OwnName),
            (Some(NameOwner::Node(_)), _) => Ok(Rule::BelowOwnName),
            (Some(NameOwner::Grant), _) => self.granted(node, name),
            _ => Err(Refusal::NameNotGranted { name: text(), node: node.name.clone() }),
        }
    }

    fn granted(&self, node: &Node, name: &DnsName) -> Result<Rule, Refusal> {
        let subject: Subject<'_> = subject(node);
        let granting = self.world.policy().granting(subject, name);
        match granting.filter(|_| node.state == NodeState::Active) {
            Some(index) => Ok(Rule::Grant(index)),
            None => Err(Refusal::NameNotGranted { name: name.to_string(), node: node.name.clone() }),
        }
    }

    fn owner_of(&self, name: &DnsName) -> Result<Option<NameOwner>, Refusal> {
        if !name.is_within(&self.mesh.domain) {
            let (name, domain) = (name.to_string(), self.mesh.domain.to_string());
            return Err(Refusal::NameOutsideDomain { name, domain });
        }
        match self.world.owner_of_name(name) {
            Some(NameOwner::Reserved | NameOwner::Controller) => {
                Err(Refusal::NameReserved { name: name.to_string() })
            }
            owner => Ok(owner),
        }
    }

    fn address(&self, ip: IpAddr) -> Result<Rule, Refusal> {
        let Some(node) = self.node else {
            let overlay = self.mesh.contains(ip);
            return if overlay { Err(Refusal::AddressNotOwned { ip }) } else { Ok(Rule::Detached) };
        };
        let own = [node.ipv4.map(IpAddr::V4), Some(IpAddr::V6(self.mesh.ipv6_of(node.id)))];
        if !own.contains(&Some(ip)) {
            return Err(Refusal::AddressNotOwned { ip });
        }
        let Terms::Custom { name, profile } = self.terms else { return Ok(Rule::OwnAddress) };
        let found = profile.gives_addresses(subject(node));
        let refusal = || Refusal::AddressOutsideProfile { profile: name.clone(), ip };
        found.map(|found| given(name, found)).ok_or_else(refusal)
    }
}

fn given(profile: &ProfileName, (rule, part): (usize, Part)) -> Rule {
    Rule::Profile { profile: profile.clone(), rule, part }
}
