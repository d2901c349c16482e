//! Reads `policy.toml`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use toml::{Table, Value};

use super::{Allow, Grant, Policy, Selector};
use crate::limits::{
    POLICY_BYTES_MAX, POLICY_LIST_MAX, POLICY_PROBLEMS_MAX, POLICY_RULES_MAX, PROFILE_RULES_MAX, PROFILES_MAX,
};
use crate::names::ProfileName;
use crate::profile::{KeyType, NameRule, Profile, Revocability, ServiceKind, SubjectForm};

/// Usual lifetime of a certificate under a profile that names none: 72 h.
const LIFETIME_SECS: u32 = 72 * 3600;

pub(super) fn read(text: &str) -> Result<Policy, Vec<String>> {
    if text.len() > POLICY_BYTES_MAX {
        return Err(vec![format!("the policy is {} bytes long, the most is {POLICY_BYTES_MAX}", text.len())]);
    }
    let document: Table =
        text.parse().map_err(|error: toml::de::Error| vec![one_line(&error.to_string())])?;
    let mut reader = Reader::default();
    let policy = reader.policy(&document);
    if reader.problems.is_empty() { Ok(policy) } else { Err(reader.problems) }
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
        self.unknown_keys("", document, &["allow", "grant", "profile"]);
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
        policy.profile = self.profiles(document);
        policy
    }

    fn profiles(&mut self, document: &Table) -> BTreeMap<ProfileName, Profile> {
        let tables = match document.get("profile") {
            None => return BTreeMap::new(),
            Some(Value::Table(tables)) if tables.len() <= PROFILES_MAX => tables,
            Some(Value::Table(tables)) => {
                self.problem(format!("profile: {} profiles, the most is {PROFILES_MAX}", tables.len()));
                return BTreeMap::new();
            }
            Some(_) => {
                self.problem("profile: write [profile.NAME]".to_owned());
                return BTreeMap::new();
            }
        };
        let mut profiles = BTreeMap::new();
        for (name, value) in tables {
            let at = format!("profile.{}", name.escape_debug().take(64).collect::<String>());
            match (ProfileName::try_from(name.as_str()), value) {
                // Names are lower case: two tables would be one profile.
                (Ok(known), Value::Table(table)) if known.as_str() == name => {
                    profiles.insert(known, self.profile(&at, table));
                }
                (Ok(_), Value::Table(_)) => self.problem(format!("{at}: write the name in lower case")),
                (Ok(_), _) => self.problem(format!("{at}: write [{at}]")),
                (Err(error), _) => self.problem(format!("{at}: {error}")),
            }
        }
        profiles
    }

    fn profile(&mut self, at: &str, table: &Table) -> Profile {
        const KEYS: [&str; 8] =
            ["kind", "keys", "lifetime", "lifetime_max", "usages", "subject", "revocation", "names"];
        self.unknown_keys(at, table, &KEYS);
        let kind = self.word(at, table, "kind").unwrap_or_else(|| {
            if !table.contains_key("kind") {
                self.problem(format!("{at}: \"kind\" is missing: server, client or peer"));
            }
            ServiceKind::Server
        });
        let lifetime_max = self.seconds(at, table, "lifetime_max");
        let lifetime = self.seconds(at, table, "lifetime");
        let lifetime_secs = lifetime.unwrap_or_else(|| LIFETIME_SECS.min(lifetime_max.unwrap_or(u32::MAX)));
        let keys = match table.contains_key("keys") {
            true => self.list(at, table, "keys").into_iter().collect(),
            false => BTreeSet::from([KeyType::EcdsaP256]),
        };
        Profile {
            kind,
            keys,
            lifetime_secs,
            lifetime_max_secs: lifetime_max.unwrap_or(lifetime_secs),
            usages: self.optional_list(at, table, "usages").into_iter().collect(),
            subject: self.word(at, table, "subject").unwrap_or(SubjectForm::CommonName),
            revocation: self.revocation(at, table),
            names: self.name_rules(at, table, kind),
        }
    }

    fn name_rules(&mut self, at: &str, profile: &Table, kind: ServiceKind) -> Vec<NameRule> {
        let tables = self.tables_at(&format!("{at}."), profile, "names", PROFILE_RULES_MAX);
        let none = profile.get("names").is_none_or(|names| names.as_array().is_some_and(Vec::is_empty));
        if none {
            self.problem(format!("{at}: [[{at}.names]] is missing: nobody could use the profile"));
        }
        let mut rules = Vec::new();
        for (at, table) in tables {
            self.unknown_keys(&at, table, &["to", "exact", "below", "own", "services"]);
            let rule = NameRule {
                to: self.selectors(&at, table, "to"),
                exact: self.optional_list(&at, table, "exact"),
                below: self.optional_list(&at, table, "below"),
                own: self.optional_list(&at, table, "own").into_iter().collect(),
                services: self.optional_list(&at, table, "services"),
            };
            if rule.to.contains(&Selector::Any) && rule.taken().next().is_some() {
                self.problem(format!("{at}.to: a name is given to tags or nodes, not to \"*\""));
            }
            if kind != ServiceKind::Peer && !rule.services.is_empty() {
                self.problem(format!("{at}.services: only kind \"peer\" has a SPIFFE ID"));
            }
            rules.push(rule);
        }
        if kind == ServiceKind::Peer && !rules.is_empty() && rules.iter().all(|rule| rule.services.is_empty())
        {
            self.problem(format!(
                "{at}: kind \"peer\" needs \"services\" in a rule: the names in its SPIFFE ID"
            ));
        }
        rules
    }

    /// `["crl", "ocsp"]`, or one of the words `none` and `short-lived`.
    fn revocation(&mut self, at: &str, table: &Table) -> Revocability {
        let pointers = |crl, ocsp| Revocability::Pointers { crl, ocsp };
        match table.get("revocation") {
            None => pointers(true, true),
            Some(Value::String(word)) if word == "none" => pointers(false, false),
            Some(Value::String(word)) if word == "short-lived" => Revocability::ShortLived,
            Some(Value::Array(words)) if words.len() <= 2 && words.iter().all(is_pointer) => {
                let has = |wanted: &str| words.iter().any(|word| word.as_str() == Some(wanted));
                pointers(has("crl"), has("ocsp"))
            }
            Some(_) => {
                self.problem(format!(
                    "{at}.revocation: write [\"crl\", \"ocsp\"], one of them, \"none\" or \"short-lived\""
                ));
                pointers(true, true)
            }
        }
    }

    /// One word that may be left out.
    fn word<T: FromStr<Err: fmt::Display>>(&mut self, at: &str, table: &Table, key: &str) -> Option<T> {
        match table.get(key)?.as_str().map(str::parse::<T>) {
            Some(Ok(word)) => return Some(word),
            Some(Err(error)) => self.problem(format!("{at}.{key}: {error}")),
            None => self.problem(format!("{at}.{key}: not a text")),
        }
        None
    }

    fn seconds(&mut self, at: &str, table: &Table, key: &str) -> Option<u32> {
        let seconds = table.get(key)?.as_str().and_then(crate::time::seconds);
        if seconds.is_none() {
            self.problem(format!("{at}.{key}: write a duration like \"24h\", in s, m, h or d"));
        }
        seconds
    }

    /// A list that may be left out, but not be empty.
    fn optional_list<T: FromStr<Err: fmt::Display>>(&mut self, at: &str, table: &Table, key: &str) -> Vec<T> {
        if table.contains_key(key) { self.list(at, table, key) } else { Vec::new() }
    }

    fn unknown_keys(&mut self, at: &str, table: &Table, known: &[&str]) {
        for key in table.keys().filter(|key| !known.contains(&key.as_str())) {
            let place = if at.is_empty() { "" } else { ": " };
            self.problem(format!("{at}{place}unknown key {key:?}, known are {}", known.join(", ")));
        }
    }

    fn tables<'a>(&mut self, document: &'a Table, key: &str) -> Vec<(String, &'a Table)> {
        self.tables_at("", document, key, POLICY_RULES_MAX)
    }

    /// The tables of `[[WITHIN KEY]]`, each with its place.
    fn tables_at<'a>(
        &mut self,
        within: &str,
        document: &'a Table,
        key: &str,
        max: usize,
    ) -> Vec<(String, &'a Table)> {
        let Some(value) = document.get(key) else { return Vec::new() };
        let key = format!("{within}{key}");
        let Value::Array(items) = value else {
            self.problem(format!("{key}: write [[{key}]]"));
            return Vec::new();
        };
        if items.len() > max {
            self.problem(format!("{key}: {} rules, the most is {max}", items.len()));
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
    fn list<T: FromStr<Err: fmt::Display>>(&mut self, at: &str, rule: &Table, key: &str) -> Vec<T> {
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

fn is_pointer(word: &Value) -> bool {
    matches!(word.as_str(), Some("crl" | "ocsp"))
}
