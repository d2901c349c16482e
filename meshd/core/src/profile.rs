//! Profiles of an operator's own making: what `[profile.NAME]` of `policy.toml` says, and what it gives to whom.
//!
//! A profile narrows one of the kinds of service certificate. It has no word for a node, a controller, an operator or a CA.
//! What no rule of it gives is refused.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::names::{DnsName, NodeName, ProfileName, ServiceName};
use crate::policy::{Selector, Subject};

/// One `[profile.NAME]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Profile {
    pub kind: ServiceKind,
    pub keys: BTreeSet<KeyType>,
    /// Seconds, when nobody asks for less.
    pub lifetime_secs: u32,
    /// Seconds, at most.
    pub lifetime_max_secs: u32,
    /// Purposes beside TLS.
    pub usages: BTreeSet<ExtraUsage>,
    pub subject: SubjectForm,
    pub revocation: Revocability,
    pub names: Vec<NameRule>,
}

/// What nodes may have under a profile: one `[[profile.NAME.names]]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NameRule {
    pub to: Vec<Selector>,
    /// These names.
    pub exact: Vec<DnsName>,
    /// Every name below these, at any depth; never the names themselves.
    pub below: Vec<DnsName>,
    /// What is the node's own.
    pub own: BTreeSet<Own>,
    /// Last parts of SPIFFE IDs `/service/NODE/NAME`; the node is always the own one.
    pub services: Vec<ServiceRule>,
}

/// A part of what a node owns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Own {
    /// `NODE.DOMAIN`.
    Name,
    /// What lies below that.
    Below,
    /// The node's mesh addresses.
    Addresses,
}

/// Which services a rule lets a node speak as.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ServiceRule {
    Any,
    Named(ServiceName),
}

/// The kind of certificate a profile narrows: `server`, `client`, or `peer`, which is both and has a SPIFFE ID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ServiceKind {
    Server,
    Client,
    Peer,
}

/// A type of key. `rsa` has 2048 to 4096 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeyType {
    EcdsaP256,
    EcdsaP384,
    Ed25519,
    Rsa,
}

/// A purpose beside TLS that lets nobody speak for somebody.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExtraUsage {
    CodeSigning,
    EmailProtection,
    IpsecIke,
    DocumentSigning,
}

/// What stands in the subject.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SubjectForm {
    /// A common name that repeats the first name.
    #[default]
    CommonName,
    Empty,
}

/// Where a certificate says that its revocation is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Revocability {
    /// Pointers as the mesh publishes them. Without any, only the CRL that every node holds on disk tells it.
    Pointers { crl: bool, ocsp: bool },
    /// Nowhere: it lives shortly and says so (RFC 9608).
    ShortLived,
}

macro_rules! words {
    ($type:ident, $what:literal, $($variant:ident => $word:literal),+) => {
        impl $type {
            /// Every one, in a fixed order.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The word in the policy file.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl FromStr for $type {
            type Err = UnknownWord;
            fn from_str(text: &str) -> Result<Self, UnknownWord> {
                let known = Self::ALL.iter().copied().find(|one| one.as_str() == text);
                known.ok_or_else(|| UnknownWord {
                    text: text.escape_debug().take(64).collect(),
                    what: $what,
                    known: [$($word),+].join(", "),
                })
            }
        }
    };
}

words!(ServiceKind, "kind", Server => "server", Client => "client", Peer => "peer");
words!(KeyType, "key type", EcdsaP256 => "ecdsa-p256", EcdsaP384 => "ecdsa-p384", Ed25519 => "ed25519", Rsa => "rsa");
words!(ExtraUsage, "usage", CodeSigning => "code-signing", EmailProtection => "email-protection",
    IpsecIke => "ipsec-ike", DocumentSigning => "document-signing");
words!(SubjectForm, "subject", CommonName => "common-name", Empty => "empty");
words!(Own, "part of what a node owns", Name => "name", Below => "below", Addresses => "addresses");

/// A text that is none of the words that are known there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{text}\" is no {what}; known are {known}")]
pub struct UnknownWord {
    text: String,
    what: &'static str,
    known: String,
}

impl FromStr for ServiceRule {
    type Err = crate::names::NameError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "*" { Ok(Self::Any) } else { text.parse().map(Self::Named) }
    }
}

/// Which rule gave something, as `--explain` prints it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rule {
    /// The built-in rule for the node's own name.
    OwnName,
    BelowOwnName,
    OwnAddress,
    OwnService,
    /// The n-th `[[grant]]`, from 0.
    Grant(usize),
    /// Whoever may write certificates for machines that are no nodes.
    Detached,
    /// The n-th `[[profile.NAME.names]]`, from 0, and what of it.
    Profile {
        profile: ProfileName,
        rule: usize,
        part: Part,
    },
    /// What the profile as a whole says.
    Allowed {
        profile: ProfileName,
    },
    BuiltIn,
}

/// The part of a name rule that gave something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    Exact,
    Below(DnsName),
    Own(Own),
    Service,
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OwnName => f.write_str("built in: the node's own name"),
            Self::BelowOwnName => f.write_str("built in: names below the node's own"),
            Self::OwnAddress => f.write_str("built in: the node's own addresses"),
            Self::OwnService => f.write_str("built in: services of the node itself"),
            Self::Grant(index) => write!(f, "grant[{index}]"),
            Self::Detached => f.write_str("built in: machines that are no nodes"),
            Self::Profile { profile, rule, part } => write!(f, "profile.{profile}.names[{rule}].{part}"),
            Self::Allowed { profile } => write!(f, "profile.{profile}"),
            Self::BuiltIn => f.write_str("built in"),
        }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact => f.write_str("exact"),
            Self::Below(parent) => write!(f, "below {parent}"),
            Self::Own(own) => write!(f, "own {own}"),
            Self::Service => f.write_str("services"),
        }
    }
}

impl Profile {
    /// Usual lifetime.
    pub fn lifetime(&self) -> Duration {
        Duration::from_secs(self.lifetime_secs.into())
    }

    /// Longest lifetime.
    pub fn lifetime_max(&self) -> Duration {
        Duration::from_secs(self.lifetime_max_secs.into())
    }

    /// Whether any rule speaks about `node`.
    pub fn speaks_about(&self, node: Subject<'_>) -> bool {
        self.rules_for(node).next().is_some()
    }

    /// The rule that gives `name` to `node`, whose own name is `own`. Whether somebody else owns the name is not looked at.
    pub fn gives_name(
        &self,
        node: Subject<'_>,
        own: Option<&DnsName>,
        name: &DnsName,
    ) -> Option<(usize, Part)> {
        self.rules_for(node).find_map(|(index, rule)| Some((index, rule.gives_name(own, name)?)))
    }

    /// The rule that gives `node` its own addresses.
    pub fn gives_addresses(&self, node: Subject<'_>) -> Option<(usize, Part)> {
        let mut rules = self.rules_for(node);
        let (index, _) = rules.find(|(_, rule)| rule.own.contains(&Own::Addresses))?;
        Some((index, Part::Own(Own::Addresses)))
    }

    /// The rule that lets `node` speak as its service `label`.
    pub fn gives_service(&self, node: Subject<'_>, label: &str) -> Option<(usize, Part)> {
        let gives = |rule: &&NameRule| {
            rule.services.iter().any(|service| match service {
                ServiceRule::Any => true,
                ServiceRule::Named(name) => name.as_str() == label,
            })
        };
        let (index, _) = self.rules_for(node).find(|(_, rule)| gives(rule))?;
        Some((index, Part::Service))
    }

    fn rules_for<'a>(&'a self, node: Subject<'a>) -> impl Iterator<Item = (usize, &'a NameRule)> {
        self.names.iter().enumerate().filter(move |(_, rule)| node.is_any_of(&rule.to))
    }
}

impl NameRule {
    fn gives_name(&self, own: Option<&DnsName>, name: &DnsName) -> Option<Part> {
        if self.exact.contains(name) {
            return Some(Part::Exact);
        }
        if let Some(parent) = self.below.iter().find(|parent| name.is_below(parent)) {
            return Some(Part::Below(parent.clone()));
        }
        let own = own?;
        if self.own.contains(&Own::Name) && name == own {
            return Some(Part::Own(Own::Name));
        }
        (self.own.contains(&Own::Below) && name.is_below(own)).then_some(Part::Own(Own::Below))
    }

    /// Names of the domain that the rule takes out of what is free: those it gives by name.
    pub fn taken(&self) -> impl Iterator<Item = &DnsName> {
        self.exact.iter().chain(&self.below)
    }
}

/// The last part of a service's SPIFFE ID: the first label of the pair's name, or the node's own name for an address.
pub fn service_label<'a>(pair_name: &'a str, node: &'a NodeName) -> &'a str {
    match pair_name.parse::<std::net::IpAddr>() {
        Ok(_) => node.as_str(),
        Err(_) => pair_name.split('.').next().unwrap_or(pair_name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_read_back() {
        for kind in ServiceKind::ALL {
            assert_eq!(kind.as_str().parse(), Ok(*kind));
        }
        for key in KeyType::ALL {
            assert_eq!(key.as_str().parse(), Ok(*key));
            assert_eq!(serde_json::to_string(key).unwrap(), format!("\"{key}\""));
        }
        for usage in ExtraUsage::ALL {
            assert_eq!(usage.as_str().parse(), Ok(*usage));
        }
        let unknown = "node".parse::<ServiceKind>().unwrap_err();
        assert_eq!(unknown.to_string(), "\"node\" is no kind; known are server, client, peer");
    }

    #[test]
    fn a_service_is_named_by_its_pair() {
        let node = NodeName::try_from("web-1").unwrap();
        let table = [("db.mesh.internal", "db"), ("db", "db"), ("100.64.0.1", "web-1"), ("fd00::1", "web-1")];
        for (pair, label) in table {
            assert_eq!(service_label(pair, &node), label, "{pair}");
        }
    }
}
