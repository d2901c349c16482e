//! Custom profiles between the policy, which knows no X.509, and the CA, which knows no mesh.
//!
//! The one file that turns the policy's words into the CA's. A profile issues nothing before a sample chain under it was
//! made and linted; what was accepted is remembered by its content.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use mesh_ca::{
    AcceptedProfile, DnsRule, IpRule, KeyAlgorithm, KeyFamily, Label, LeafTemplate, NameOwner, Placement,
    ProfileSpec, PublicKey, RevocationForm, SpecRequest, TrustDomain,
};
use mesh_core::limits::PROFILES_MAX;
use mesh_core::profile::{ExtraUsage, KeyType, Own, Profile, Revocability, ServiceKind, SubjectForm};
use mesh_core::world::Place;
use mesh_core::{Policy, ProfileName};
use mesh_runtime::chain;
use time::UtcDateTime;

use crate::authority::{IssueProblem, LeafRequest, points, random_fill};

/// Accepted profiles that are remembered: those in force, and as many that are only being checked.
const ACCEPTED_MAX: usize = 2 * PROFILES_MAX;

/// Profiles whose samples were linted.
#[derive(Debug, Default)]
pub(crate) struct Profiles {
    /// Used last stands last.
    accepted: Mutex<Vec<(Profile, Arc<AcceptedProfile>)>>,
    /// Whoever checks a policy waits here: samples with RSA keys take seconds, and must not keep issuing from its threads.
    pub(crate) turn: tokio::sync::Mutex<()>,
}

/// A profile that may issue, and for whom.
#[derive(Debug, Clone)]
pub(crate) struct Custom {
    pub(crate) accepted: Arc<AcceptedProfile>,
    pub(crate) node: Label,
    pub(crate) service: Label,
    /// The node's own.
    pub(crate) addresses: Vec<IpAddr>,
}

impl Profiles {
    /// Makes and lints a sample chain under the profile, unless that was done before. Blocks: RSA keys take seconds.
    ///
    /// # Errors
    /// What is wrong with it, for people.
    pub(crate) fn accept(
        &self,
        name: &ProfileName,
        profile: &Profile,
        domain: &TrustDomain,
        now: UtcDateTime,
    ) -> Result<Arc<AcceptedProfile>, String> {
        if let Some(known) = self.known(name, profile) {
            return Ok(known);
        }
        let spec = spec(name, profile)?;
        let accepted = spec.accept(domain, now, &mut random_fill).map_err(|error| chain(&error))?;
        let accepted = Arc::new(accepted);
        let mut known = self.accepted.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= ACCEPTED_MAX {
            known.remove(0);
        }
        known.push((profile.clone(), Arc::clone(&accepted)));
        Ok(accepted)
    }

    fn known(&self, name: &ProfileName, profile: &Profile) -> Option<Arc<AcceptedProfile>> {
        let mut known = self.accepted.lock().unwrap_or_else(PoisonError::into_inner);
        let same = |(content, accepted): &(Profile, Arc<AcceptedProfile>)| {
            content == profile && accepted.spec().name.as_str() == name.as_str()
        };
        let at = known.iter().position(same)?;
        let found = known.remove(at);
        let accepted = Arc::clone(&found.1);
        known.push(found);
        Some(accepted)
    }

    /// What is wrong with the profiles of a policy, one line each. Blocks.
    pub(crate) fn problems(&self, policy: &Policy, domain: &TrustDomain, now: UtcDateTime) -> Vec<String> {
        let refused = policy.profile.iter().filter_map(|(name, profile)| {
            let problem = self.accept(name, profile, domain, now).err()?;
            Some(format!("profile.{name}: {problem}"))
        });
        refused.collect()
    }
}

/// The type of a key in the policy's words.
pub(crate) fn key_type(algorithm: KeyAlgorithm) -> KeyType {
    match algorithm {
        KeyAlgorithm::EcdsaP256 => KeyType::EcdsaP256,
        KeyAlgorithm::EcdsaP384 => KeyType::EcdsaP384,
        KeyAlgorithm::Ed25519 => KeyType::Ed25519,
        KeyAlgorithm::Rsa { .. } => KeyType::Rsa,
    }
}

/// The built-in profile that a kind narrows.
pub(crate) fn built_in(kind: ServiceKind) -> mesh_ca::Profile {
    service_kind(kind).profile()
}

/// The template of a certificate under a custom profile, checked against the profile once more.
pub(crate) fn template(
    custom: &Custom,
    request: &LeafRequest,
    key: &PublicKey,
    (issuer, place): (&mesh_ca::KeyIdentifier, &Place),
    now: UtcDateTime,
    domain: &TrustDomain,
) -> Result<LeafTemplate, IssueProblem> {
    let names = request.names.iter().map(|name| mesh_ca::DnsName::parse(name.as_str()));
    let points = place.base_url.as_deref().map(points).transpose().map_err(IssueProblem::Pointers)?;
    let asked = SpecRequest {
        owner: NameOwner { domain, node: &custom.node, addresses: &custom.addresses },
        service: &custom.service,
        dns: names.collect::<Result<_, _>>().map_err(IssueProblem::Name)?,
        ips: request.ips.clone(),
        lifetime: Some(request.lifetime),
        now,
        key,
    };
    let placement = Placement { issuer, points: points.as_ref(), shard: place.shard };
    custom.accepted.template(&asked, placement).map_err(IssueProblem::Profile)
}

/// All rules of a profile together, whomever they are for: what it can put into a certificate at all.
fn spec(name: &ProfileName, profile: &Profile) -> Result<ProfileSpec, String> {
    let mut dns = Vec::new();
    let parse = |name: &mesh_core::DnsName| {
        mesh_ca::DnsName::parse(name.as_str()).map_err(|error| format!("{name}: {error}"))
    };
    for rule in &profile.names {
        for exact in &rule.exact {
            dns.push(DnsRule::Exact(parse(exact)?));
        }
        for parent in &rule.below {
            dns.push(DnsRule::Below(parse(parent)?));
        }
        dns.extend(rule.own.contains(&Own::Name).then_some(DnsRule::OwnName));
        dns.extend(rule.own.contains(&Own::Below).then_some(DnsRule::BelowOwnName));
    }
    dns.sort();
    dns.dedup();
    let addresses = profile.names.iter().any(|rule| rule.own.contains(&Own::Addresses));
    Ok(ProfileSpec {
        name: Label::parse(name.as_str()).map_err(|error| error.to_string())?,
        kind: service_kind(profile.kind),
        extra_usages: profile.usages.iter().map(|usage| extra_usage(*usage)).collect(),
        keys: profile.keys.iter().map(|key| key_family(*key)).collect(),
        lifetime: profile.lifetime(),
        lifetime_max: profile.lifetime_max(),
        dns,
        ips: if addresses { IpRule::OwnAddresses } else { IpRule::None },
        subject: match profile.subject {
            SubjectForm::CommonName => mesh_ca::SubjectForm::CommonName,
            SubjectForm::Empty => mesh_ca::SubjectForm::Empty,
        },
        revocation: match profile.revocation {
            Revocability::Pointers { crl, ocsp } => RevocationForm::Pointers { crl, ocsp },
            Revocability::ShortLived => RevocationForm::NoRevAvail,
        },
    })
}

fn service_kind(kind: ServiceKind) -> mesh_ca::ServiceKind {
    match kind {
        ServiceKind::Server => mesh_ca::ServiceKind::Server,
        ServiceKind::Client => mesh_ca::ServiceKind::Client,
        ServiceKind::Peer => mesh_ca::ServiceKind::Peer,
    }
}

fn key_family(key: KeyType) -> KeyFamily {
    match key {
        KeyType::EcdsaP256 => KeyFamily::EcdsaP256,
        KeyType::EcdsaP384 => KeyFamily::EcdsaP384,
        KeyType::Ed25519 => KeyFamily::Ed25519,
        KeyType::Rsa => KeyFamily::Rsa,
    }
}

fn extra_usage(usage: ExtraUsage) -> mesh_ca::ExtraUsage {
    match usage {
        ExtraUsage::CodeSigning => mesh_ca::ExtraUsage::CodeSigning,
        ExtraUsage::EmailProtection => mesh_ca::ExtraUsage::EmailProtection,
        ExtraUsage::IpsecIke => mesh_ca::ExtraUsage::IpsecIke,
        ExtraUsage::DocumentSigning => mesh_ca::ExtraUsage::DocumentSigning,
    }
}

#[cfg(test)]
mod tests;
