//! `policy.toml`: who may open connections to whom, and which service names nodes may take.
//!
//! ```toml
//! [[allow]]                       # direction counts; all ports
//! from = ["tag:web", "node:db-1"]
//! to = ["tag:db", "*"]
//!
//! [[grant]]
//! names = ["api.mesh.internal"]
//! to = ["tag:web", "node:bravo"]
//!
//! [profile.database]              # a narrower kind of service certificate
//! kind = "server"
//! keys = ["ecdsa-p256", "ed25519"]
//! lifetime = "24h"
//! lifetime_max = "7d"
//!
//! [[profile.database.names]]
//! to = ["tag:db"]
//! exact = ["db.mesh.internal"]
//! own = ["name", "addresses"]
//! ```
//! What no rule allows is denied.

mod reader;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::names::{DnsName, NameError, NodeName, ProfileName, Tag};
use crate::profile::Profile;

/// What a new mesh begins with.
pub const STARTER_POLICY: &str = r#"# Who may open connections to whom. What no rule allows is denied.
#
# This starter lets EVERY enrolled node reach EVERY other one, on all ports.
# Replace it before the fleet grows, for example by:
#
#   [[allow]]
#   from = ["tag:web"]
#   to = ["tag:db"]
#
# A grant lets nodes take certificates for a service name:
#
#   [[grant]]
#   names = ["api.mesh.internal"]
#   to = ["tag:web"]

[[allow]]
from = ["*"]
to = ["*"]
"#;

/// A policy that has been parsed. Without rules it denies everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    pub allow: Vec<Allow>,
    pub grant: Vec<Grant>,
    /// Custom profiles.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub profile: BTreeMap<ProfileName, Profile>,
}

/// Nodes in `from` may open connections to nodes in `to`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Allow {
    pub from: Vec<Selector>,
    pub to: Vec<Selector>,
}

/// Nodes in `to` may take certificates for `names`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    pub names: Vec<DnsName>,
    pub to: Vec<Selector>,
}

/// Chooses nodes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Selector {
    Any,
    Tag(Tag),
    Node(NodeName),
}

impl Policy {
    /// Parses `policy.toml`.
    ///
    /// # Errors
    /// Every problem found, one line each, at most [`POLICY_PROBLEMS_MAX`](crate::limits::POLICY_PROBLEMS_MAX); never an
    /// empty list.
    pub fn parse(text: &str) -> Result<Self, Vec<String>> {
        reader::read(text)
    }

    /// Whether `from` may open connections to `to`.
    pub fn allows(&self, from: Subject<'_>, to: Subject<'_>) -> bool {
        self.allow.iter().any(|rule| from.is_any_of(&rule.from) && to.is_any_of(&rule.to))
    }

    /// Service names granted to `node`, sorted.
    pub fn granted(&self, node: Subject<'_>) -> BTreeSet<&DnsName> {
        let grants = self.grant.iter().filter(|grant| node.is_any_of(&grant.to));
        grants.flat_map(|grant| &grant.names).collect()
    }

    /// The grant, from 0, that gives `name` to `node`.
    pub fn granting(&self, node: Subject<'_>, name: &DnsName) -> Option<usize> {
        self.grant.iter().position(|grant| grant.names.contains(name) && node.is_any_of(&grant.to))
    }

    /// Whether any grant or profile hands out `name`.
    pub fn grants(&self, name: &DnsName) -> bool {
        let in_profile = || {
            let mut rules = self.profile.values().flat_map(|profile| &profile.names);
            rules.any(|rule| {
                rule.exact.contains(name) || rule.below.iter().any(|parent| name.is_below(parent))
            })
        };
        self.grant.iter().any(|grant| grant.names.contains(name)) || in_profile()
    }

    /// The first name that a grant or profile hands out and that belongs to `label` under `domain`: the label itself or
    /// below it.
    pub fn granted_under<'a>(&'a self, label: &str, domain: &DnsName) -> Option<&'a DnsName> {
        let rules = self.profile.values().flat_map(|profile| &profile.names);
        let in_profiles = rules.flat_map(|rule| rule.taken());
        let mut names = self.grant.iter().flat_map(|grant| &grant.names).chain(in_profiles);
        names.find(|name| name.label_under(domain) == Some(label))
    }

    /// The rules that speak about one node, so that many peers can be judged against few rules.
    pub fn about<'a>(&'a self, node: Subject<'_>) -> RulesAbout<'a> {
        let inbound = self.allow.iter().filter(|rule| node.is_any_of(&rule.to)).map(|rule| &rule.from[..]);
        let outbound = self.allow.iter().filter(|rule| node.is_any_of(&rule.from)).map(|rule| &rule.to[..]);
        RulesAbout { inbound: inbound.collect(), outbound: outbound.collect() }
    }

    /// Every selector in the policy.
    pub fn selectors(&self) -> impl Iterator<Item = &Selector> {
        let allow = self.allow.iter().flat_map(|rule| rule.from.iter().chain(&rule.to));
        let rules = self.profile.values().flat_map(|profile| &profile.names);
        let profiles = rules.flat_map(|rule| &rule.to);
        allow.chain(self.grant.iter().flat_map(|grant| &grant.to)).chain(profiles)
    }
}

/// See [`Policy::about`].
#[derive(Clone, Debug)]
pub struct RulesAbout<'a> {
    inbound: Vec<&'a [Selector]>,
    outbound: Vec<&'a [Selector]>,
}

impl RulesAbout<'_> {
    /// Whether `peer` may open connections to the node.
    pub fn inbound(&self, peer: Subject<'_>) -> bool {
        self.inbound.iter().any(|from| peer.is_any_of(from))
    }

    /// Whether the node may open connections to `peer`.
    pub fn outbound(&self, peer: Subject<'_>) -> bool {
        self.outbound.iter().any(|to| peer.is_any_of(to))
    }
}

/// A node as the policy sees it.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    pub name: &'a NodeName,
    pub tags: &'a BTreeSet<Tag>,
}

impl Subject<'_> {
    /// Whether one of `selectors` chooses this node.
    pub fn is_any_of(self, selectors: &[Selector]) -> bool {
        selectors.iter().any(|selector| match selector {
            Selector::Any => true,
            Selector::Tag(tag) => self.tags.contains(tag),
            Selector::Node(name) => self.name == name,
        })
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Selector::Any => f.write_str("*"),
            Selector::Tag(tag) => write!(f, "tag:{tag}"),
            Selector::Node(name) => write!(f, "node:{name}"),
        }
    }
}

impl std::str::FromStr for Selector {
    type Err = SelectorError;
    fn from_str(text: &str) -> Result<Self, SelectorError> {
        let invalid = |source| SelectorError::Name { text: text.escape_debug().to_string(), source };
        match text.split_once(':') {
            Some(("tag", tag)) => tag.parse().map(Selector::Tag).map_err(invalid),
            Some(("node", name)) => name.parse().map(Selector::Node).map_err(invalid),
            _ if text == "*" => Ok(Selector::Any),
            _ => Err(SelectorError::Form { text: text.escape_debug().to_string() }),
        }
    }
}

/// Why a text chooses no nodes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SelectorError {
    #[error("\"{text}\" is not a selector: write \"tag:NAME\", \"node:NAME\" or \"*\"")]
    Form { text: String },
    #[error("\"{text}\" is not a selector: {source}")]
    Name {
        text: String,
        #[source]
        source: NameError,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::{POLICY_BYTES_MAX, POLICY_PROBLEMS_MAX, POLICY_RULES_MAX};

    #[test]
    fn the_starter_policy_lets_all_reach_each_other_and_says_so() {
        let policy = Policy::parse(STARTER_POLICY).unwrap();
        let (name, tags) = (NodeName::try_from("a").unwrap(), BTreeSet::new());
        let node = Subject { name: &name, tags: &tags };
        assert!(policy.allows(node, node));
        assert!(STARTER_POLICY.contains("EVERY"));
    }

    #[test]
    fn an_empty_policy_denies() {
        let policy = Policy::parse("").unwrap();
        let (name, tags) = (NodeName::try_from("a").unwrap(), BTreeSet::new());
        let node = Subject { name: &name, tags: &tags };
        assert!(!policy.allows(node, node));
    }

    #[test]
    fn every_problem_is_listed_with_its_place() {
        let text = r#"
            deny = 1
            [[allow]]
            from = ["tag:", "web", "node:ca", "*"]
            [[allow]]
            from = []
            to = "*"
            ports = [80]
            [[grant]]
            names = ["*.mesh.internal", 7, "api.mesh.internal"]
            to = ["*"]
        "#;
        let problems = Policy::parse(text).unwrap_err();
        let wanted = [
            "unknown key \"deny\"",
            "allow[0].from[0]: \"tag:\"",
            "allow[0].from[1]: \"web\"",
            "allow[0].from[2]: \"node:ca\"",
            "allow[0]: \"to\" is missing",
            "allow[1]: unknown key \"ports\"",
            "allow[1]: \"from\" is missing or empty",
            "allow[1].to: write a list",
            "grant[0].names[0]: *.mesh.internal is a wildcard",
            "grant[0].names[1]: not a text",
            "grant[0].to: a name is granted",
        ];
        assert_eq!(problems.len(), wanted.len(), "{problems:#?}");
        for (problem, wanted) in problems.iter().zip(wanted) {
            assert!(problem.starts_with(wanted), "{problem} / {wanted}");
        }
    }

    #[test]
    fn broken_or_huge_texts_are_refused_in_few_words() {
        assert_eq!(Policy::parse("[[allow").unwrap_err().len(), 1);
        assert!(!Policy::parse("a\n=\u{1b}").unwrap_err()[0].contains('\n'));
        assert_eq!(Policy::parse(&"#".repeat(POLICY_BYTES_MAX + 1)).unwrap_err().len(), 1);
        let many = "[[allow]]\n".repeat(POLICY_RULES_MAX);
        assert_eq!(Policy::parse(&many).unwrap_err().len(), POLICY_PROBLEMS_MAX);
        assert_eq!(Policy::parse(&"[[allow]]\n".repeat(POLICY_RULES_MAX + 1)).unwrap_err().len(), 1);
    }

    #[test]
    fn direction_counts() {
        let policy = Policy::parse("[[allow]]\nfrom = [\"tag:web\"]\nto = [\"node:db-1\"]").unwrap();
        let (web, db) = (NodeName::try_from("web-1").unwrap(), NodeName::try_from("db-1").unwrap());
        let (web_tags, db_tags) = (BTreeSet::from([Tag::try_from("web").unwrap()]), BTreeSet::new());
        let (web, db) = (Subject { name: &web, tags: &web_tags }, Subject { name: &db, tags: &db_tags });
        assert!(policy.allows(web, db) && !policy.allows(db, web) && !policy.allows(web, web));
    }
}
