//! Names that people and certificates use, checked once, where they enter.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::limits::{
    LABEL_CHARS_MAX, NAME_CHARS_MAX, OPERATOR_NAME_CHARS_MAX, PROFILE_NAME_CHARS_MAX, TAG_CHARS_MAX,
};

/// Profiles that exist without a policy, and words that must not look like one: no custom profile takes their names.
pub const PROFILES_BUILT_IN: [&str; 10] =
    ["ca", "client", "controller", "issuing", "node", "ocsp", "operator", "peer", "root", "server"];

/// Labels directly under the domain that no node and no grant may take: the mesh's own services, and
/// names that browsers, resolvers and hosts give a meaning of their own.
pub const RESERVED: [&str; 18] = [
    "acme",
    "autoconfig",
    "autodiscover",
    "broadcasthost",
    "ca",
    "controller",
    "crl",
    "dns",
    "isatap",
    "localdomain",
    "localhost",
    "mesh",
    "meshctl",
    "meshd",
    "ocsp",
    "pki",
    "spiffe",
    "wpad",
];

/// Whether `label` is one of [`RESERVED`].
pub fn is_reserved(label: &str) -> bool {
    RESERVED.contains(&label)
}

/// Why a text is no name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    #[error("the name is empty")]
    Empty,
    #[error("the name is {length} characters long, the most is {max}")]
    TooLong { length: usize, max: usize },
    #[error("a label of the name is empty")]
    EmptyLabel,
    #[error("label {label} is longer than 63 characters")]
    LabelTooLong { label: String },
    #[error("character {} is not allowed in a name", .character.escape_default())]
    Character { character: char },
    #[error("label {label} begins or ends with a hyphen")]
    Hyphen { label: String },
    #[error("label {label} is encoded: names are plain ASCII")]
    Encoded { label: String },
    #[error("{name} is a wildcard")]
    Wildcard { name: String },
    #[error("{name} is reserved")]
    Reserved { name: String },
    #[error("{name} looks like an IP address")]
    Address { name: String },
    #[error("{name} has dots: a node's name is one label, without the domain")]
    Dots { name: String },
}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident, $check:path) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(text: String) -> Result<Self, NameError> {
                let text = text.to_ascii_lowercase();
                $check(&text)?;
                Ok(Self(text))
            }
        }

        impl TryFrom<&str> for $name {
            type Error = NameError;
            fn try_from(text: &str) -> Result<Self, NameError> {
                text.to_owned().try_into()
            }
        }

        impl FromStr for $name {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                text.try_into()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", self.0)
            }
        }
    };
}

name_type!(
    /// Name of a node: one DNS label, lower case, not reserved. Node `web-1` owns `web-1.<domain>` and all below it.
    NodeName, check_node_name
);
name_type!(
    /// A host name in lower case: no wildcard, no trailing dot, at most 253 characters.
    DnsName, check_dns_name
);
name_type!(
    /// `[a-z0-9-]{1,32}`.
    Tag, check_tag
);
name_type!(
    /// `[a-z0-9._-]{1,64}`, beginning with a letter or digit.
    OperatorName, check_operator_name
);
name_type!(
    /// Name of a custom profile: one DNS label of at most 32 characters that no built-in profile has.
    ProfileName, check_profile_name
);
name_type!(
    /// The last part of a service's SPIFFE ID: one DNS label.
    ServiceName, check_label
);
name_type!(
    /// What a managed pair is called: its first host name or address, or a plain label for clients.
    PairName, check_pair_name
);

impl DnsName {
    /// Whether this is `domain` or lies below it.
    pub fn is_within(&self, domain: &DnsName) -> bool {
        match self.0.strip_suffix(domain.as_str()) {
            Some(head) => head.is_empty() || head.ends_with('.'),
            None => false,
        }
    }

    /// Whether this lies below `parent`, at any depth, and is not `parent` itself.
    pub fn is_below(&self, parent: &DnsName) -> bool {
        self.0.strip_suffix(parent.as_str()).is_some_and(|head| head.len() > 1 && head.ends_with('.'))
    }

    /// The label directly under `domain`: `web-1` of `api.web-1.mesh.internal`. `None` for the domain
    /// itself and for names outside it.
    pub fn label_under<'a>(&'a self, domain: &DnsName) -> Option<&'a str> {
        let head = self.0.strip_suffix(domain.as_str())?.strip_suffix('.')?;
        head.rsplit('.').next()
    }
}

impl NodeName {
    /// `<name>.<domain>`. `None` when that is longer than a host name may be.
    pub fn under(&self, domain: &DnsName) -> Option<DnsName> {
        DnsName::try_from(format!("{}.{domain}", self.0)).ok()
    }
}

fn check_node_name(text: &str) -> Result<(), NameError> {
    if text.contains('*') {
        return Err(NameError::Wildcard { name: text.to_owned() });
    }
    if text.is_empty() {
        return Err(NameError::Empty);
    }
    if text.contains('.') {
        return Err(NameError::Dots { name: text.to_owned() });
    }
    check_label(text)?;
    if is_reserved(text) {
        return Err(NameError::Reserved { name: text.to_owned() });
    }
    Ok(())
}

fn check_dns_name(text: &str) -> Result<(), NameError> {
    if text.is_empty() {
        return Err(NameError::Empty);
    }
    if text.len() > NAME_CHARS_MAX {
        return Err(NameError::TooLong { length: text.len(), max: NAME_CHARS_MAX });
    }
    if text.contains('*') {
        return Err(NameError::Wildcard { name: text.to_owned() });
    }
    text.split('.').try_for_each(check_label)?;
    // A numeric last label would be read as an IPv4 address by URL parsers.
    if text.rsplit('.').next().is_some_and(|last| last.bytes().all(|byte| byte.is_ascii_digit())) {
        return Err(NameError::Address { name: text.to_owned() });
    }
    Ok(())
}

fn check_label(label: &str) -> Result<(), NameError> {
    if label.is_empty() {
        return Err(NameError::EmptyLabel);
    }
    if let Some(character) = label.chars().find(|c| !matches!(c, 'a'..='z' | '0'..='9' | '-')) {
        return Err(NameError::Character { character });
    }
    if label.len() > LABEL_CHARS_MAX {
        return Err(NameError::LabelTooLong { label: label.to_owned() });
    }
    if label.starts_with('-') || label.ends_with('-') {
        return Err(NameError::Hyphen { label: label.to_owned() });
    }
    // RFC 5890 §2.3.1: "--" in third place marks encodings such as punycode, which look-alikes need.
    if label.get(2..4) == Some("--") {
        return Err(NameError::Encoded { label: label.to_owned() });
    }
    Ok(())
}

fn check_profile_name(text: &str) -> Result<(), NameError> {
    check_label(text)?;
    if text.len() > PROFILE_NAME_CHARS_MAX {
        return Err(NameError::TooLong { length: text.len(), max: PROFILE_NAME_CHARS_MAX });
    }
    if PROFILES_BUILT_IN.contains(&text) {
        return Err(NameError::Reserved { name: text.to_owned() });
    }
    Ok(())
}

fn check_tag(text: &str) -> Result<(), NameError> {
    check_plain(text, TAG_CHARS_MAX, |c| matches!(c, 'a'..='z' | '0'..='9' | '-'))
}

fn check_operator_name(text: &str) -> Result<(), NameError> {
    check_plain(text, OPERATOR_NAME_CHARS_MAX, |c| matches!(c, 'a'..='z' | '0'..='9' | '-' | '.' | '_'))?;
    match text.chars().next() {
        Some(first) if !first.is_ascii_alphanumeric() => Err(NameError::Character { character: first }),
        _ => Ok(()),
    }
}

fn check_pair_name(text: &str) -> Result<(), NameError> {
    if text.contains('*') {
        return Err(NameError::Wildcard { name: text.to_owned() });
    }
    if text.parse::<std::net::IpAddr>().is_ok() {
        return Ok(());
    }
    check_dns_name(text)
}

fn check_plain(text: &str, max: usize, allowed: impl Fn(char) -> bool) -> Result<(), NameError> {
    if text.is_empty() {
        return Err(NameError::Empty);
    }
    if let Some(character) = text.chars().find(|&c| !allowed(c)) {
        return Err(NameError::Character { character });
    }
    if text.len() > max {
        return Err(NameError::TooLong { length: text.len(), max });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_name_is_one_plain_label() {
        for good in ["a", "web-1", "WEB-1", "123", &"x".repeat(63)] {
            assert!(NodeName::try_from(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "-a",
            "a-",
            "a.b",
            "a_b",
            "*",
            "é",
            "a b",
            "a\n",
            "a\0",
            "xn--e1afmkfd",
            "localhost",
            "CA",
            "wpad",
        ] {
            assert!(NodeName::try_from(bad).is_err(), "{bad:?}");
        }
        assert!(NodeName::try_from("x".repeat(64)).is_err());
        assert_eq!(NodeName::try_from("Web-1").unwrap().as_str(), "web-1");
    }

    #[test]
    fn a_dns_name_is_a_host_name_without_wildcards() {
        for good in ["mesh.internal", "api.mesh.internal", "a.b.c.d", "localhost"] {
            assert!(DnsName::try_from(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "a.", ".a", "a..b", "*.a", "1.2.3.4", "a.123", "a/b", "a\u{0}b", "xn--a.b"] {
            assert!(DnsName::try_from(bad).is_err(), "{bad:?}");
        }
        assert!(DnsName::try_from(format!("{}.a", "x.".repeat(126).trim_end_matches('.'))).is_ok());
        assert!(DnsName::try_from("x.".repeat(127) + "a").is_err(), "255 characters");
    }

    /// What could be read as a pattern, a list, a path or another word is no tag, and nothing that is called by people.
    #[test]
    fn tags_operators_and_profiles_are_plain_words() {
        assert_eq!(Tag::try_from("WEB-2").unwrap().as_str(), "web-2");
        assert!(Tag::try_from("x".repeat(32)).is_ok() && Tag::try_from("x".repeat(33)).is_err());
        assert!(OperatorName::try_from("anna.b_c-1").is_ok() && ProfileName::try_from("database").is_ok());
        let foreign = [
            "",
            "*",
            "web*",
            ",",
            "web,db",
            "web db",
            " web",
            "web\n",
            "a\0b",
            "a/b",
            "..",
            "tag:web",
            "!web",
            "wеb",
            "ｗeb",
            "web\u{200b}",
            "é",
            "web;db",
            "\"web\"",
            "web=db",
        ];
        for bad in foreign {
            assert!(Tag::try_from(bad).is_err(), "tag {bad:?}");
            assert!(OperatorName::try_from(bad).is_err(), "operator {bad:?}");
            assert!(ProfileName::try_from(bad).is_err(), "profile {bad:?}");
        }
        for bad in ["node", "SERVER", "ocsp", "controller", "-a", "a_b", &"x".repeat(33)] {
            assert!(ProfileName::try_from(bad).is_err(), "profile {bad:?}");
        }
        for bad in [".a", "-a", "_a", &"x".repeat(65)] {
            assert!(OperatorName::try_from(bad).is_err(), "operator {bad:?}");
        }
    }

    #[test]
    fn a_name_belongs_to_the_label_under_the_domain() {
        let domain = DnsName::try_from("mesh.internal").unwrap();
        let table = [
            ("mesh.internal", None),
            ("web-1.mesh.internal", Some("web-1")),
            ("api.web-1.mesh.internal", Some("web-1")),
            ("xmesh.internal", None),
            ("mesh.internal.example", None),
        ];
        for (name, label) in table {
            let name = DnsName::try_from(name).unwrap();
            assert_eq!(name.label_under(&domain), label, "{name}");
            assert_eq!(name.is_within(&domain), label.is_some() || name == domain, "{name}");
        }
    }

    #[test]
    fn a_pair_may_be_named_by_an_address() {
        for good in ["web", "api.mesh.internal", "100.64.0.1", "fd00::1"] {
            assert!(PairName::try_from(good).is_ok(), "{good}");
        }
        for bad in ["", "a/b", "..", "*.x", "100.64.0.1/10"] {
            assert!(PairName::try_from(bad).is_err(), "{bad}");
        }
    }
}
