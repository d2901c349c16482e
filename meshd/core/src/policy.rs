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
//! ```
//! What no rule allows is denied.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::limits::{POLICY_BYTES_MAX, POLICY_LIST_MAX, POLICY_PROBLEMS_MAX, POLICY_RULES_MAX};
use crate::names::{DnsName, NameError, NodeName, Tag};

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
    /// Every problem found, one line each, at most [`POLICY_PROBLEMS_MAX`]; never an empty list.
    pub fn parse(text: &str) -> Result<Self, Vec<String>> {
        if text.len() > POLICY_BYTES_MAX {
            return Err(vec![format!(
                "the policy is {} bytes long, the most is {POLICY_BYTES_MAX}",
                text.len()
            )]);
        }
        let document: Table =
            text.parse().map_err(|error: toml::de::Error| vec![one_line(&error.to_string())])?;
        let mut reader = Reader::default();
        let policy = reader.policy(&document);
        if reader.problems.is_empty() { Ok(policy) } else { Err(reader.problems) }
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

    /// Whether any grant hands out `name`.
    pub fn grants(&self, name: &DnsName) -> bool {
        self.grant.iter().any(|grant| grant.names.contains(name))
    }

    /// The first name that is granted and belongs to `label` under `domain`: the label itself or below it.
    pub fn granted_under<'a>(&'a self, label: &str, domain: &DnsName) -> Option<&'a DnsName> {
        let mut names = self.grant.iter().flat_map(|grant| &grant.names);
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
        allow.chain(self.grant.iter().flat_map(|grant| &grant.to))
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
    fn is_any_of(self, selectors: &[Selector]) -> bool {
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

/// Walks the document and gathers every problem rather than the first.
#[derive(Default)]
struct Reader {
    problems: Vec<String>,
}

impl Reader {
    fn problem(&mut self, text: String) {
        if self.problems.len() < POLICY_PROBLEMS_MAX {
            self.problems.push(text);
        }
    }

    fn policy(&mut self, document: &Table) -> Policy {
        self.unknown_keys("", document, &["allow", "grant"]);
        let mut policy = Policy::default();
        for (at, rule) in self.tables(document, "allow") {
            self.unknown_keys(&at, rule, &["from", "to"]);
            let (from, to) = (self.selectors(&at, rule, "from"), self.selectors(&at, rule, "to"));
            policy.allow.push(Allow { from, to });
        }
        for (at, rule) in self.tables(document, "grant") {
            self.unknown_keys(&at, rule, &["names", "to"]);
            let (names, to) = (self.list(&at, rule, "names"), self.selectors(&at, rule, "to"));
            if to.contains(&Selector::Any) {
                self.problem(format!("{at}.to: a name is granted to tags or nodes, not to \"*\""));
            }
            policy.grant.push(Grant { names, to });
        }
        policy
    }

    fn unknown_keys(&mut self, at: &str, table: &Table, known: &[&str]) {
        for key in table.keys().filter(|key| !known.contains(&key.as_str())) {
            let place = if at.is_empty() { "" } else { ": " };
            self.problem(format!("{at}{place}unknown key {key:?}, known are {}", known.join(", ")));
        }
    }

    fn tables<'a>(&mut self, document: &'a Table, key: &str) -> Vec<(String, &'a Table)> {
        let Some(value) = document.get(key) else { return Vec::new() };
        let Value::Array(items) = value else {
            self.problem(format!("{key}: write [[{key}]]"));
            return Vec::new();
        };
        if items.len() > POLICY_RULES_MAX {
            self.problem(format!("{key}: {} rules, the most is {POLICY_RULES_MAX}", items.len()));
            return Vec::new();
        }
        let mut tables = Vec::new();
        for (index, item) in items.iter().enumerate() {
            match item {
                Value::Table(table) => tables.push((format!("{key}[{index}]"), table)),
                _ => self.problem(format!("{key}[{index}]: write [[{key}]]")),
            }
        }
        tables
    }

    fn selectors(&mut self, at: &str, rule: &Table, key: &str) -> Vec<Selector> {
        self.list(at, rule, key)
    }

    /// A list of at least one text, each of which `T` can read.
    fn list<T: std::str::FromStr<Err: fmt::Display>>(&mut self, at: &str, rule: &Table, key: &str) -> Vec<T> {
        let items = match rule.get(key) {
            Some(Value::Array(items)) if !items.is_empty() => items,
            Some(Value::Array(_)) | None => {
                self.problem(format!("{at}: \"{key}\" is missing or empty"));
                return Vec::new();
            }
            Some(_) => {
                self.problem(format!("{at}.{key}: write a list of texts"));
                return Vec::new();
            }
        };
        if items.len() > POLICY_LIST_MAX {
            self.problem(format!("{at}.{key}: {} entries, the most is {POLICY_LIST_MAX}", items.len()));
            return Vec::new();
        }
        let mut list = Vec::new();
        for (index, item) in items.iter().enumerate() {
            match item.as_str().map(str::parse::<T>) {
                Some(Ok(entry)) => list.push(entry),
                Some(Err(error)) => self.problem(format!("{at}.{key}[{index}]: {error}")),
                None => self.problem(format!("{at}.{key}[{index}]: not a text")),
            }
        }
        list
    }
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

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
