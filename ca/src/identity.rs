//! Who a certificate speaks for, and the names it may carry.

use std::fmt;
use std::str::FromStr;

/// Longest DNS label in octets. RFC 1035 §2.3.4.
const LABEL_BYTES_MAX: usize = 63;

/// Longest DNS name in characters, without the trailing dot. RFC 1035 §2.3.4 (255 octets on the wire).
const DNS_NAME_BYTES_MAX: usize = 253;

/// Longest trust domain: one label and a dot must still fit in front of it.
const TRUST_DOMAIN_BYTES_MAX: usize = DNS_NAME_BYTES_MAX - LABEL_BYTES_MAX - 1;

/// Why a text is not a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    #[error("name is empty or has an empty label")]
    Empty,
    #[error("name is {length} characters long, at most {max} are allowed")]
    TooLong { length: usize, max: usize },
    #[error("name has a wildcard")]
    Wildcard,
    #[error("name ends with a dot")]
    TrailingDot,
    #[error("name has character {0:?}; lower-case letters, digits and inner hyphens are allowed")]
    Character(char),
    #[error("label begins or ends with a hyphen")]
    Hyphen,
    #[error("label {0:?} has hyphens in third and fourth place and is no A-label")]
    ReservedLabel(String),
    #[error("name's last label is all digits, so it reads like an IP address")]
    NumericTopLabel,
    #[error("trust domain has a single label, at least two are needed")]
    SingleLabel,
    #[error("not a SPIFFE ID of trust domain {0}")]
    ForeignTrustDomain(TrustDomain),
    #[error("not a SPIFFE ID of a node, controller, service or operator")]
    SpiffePath,
}

fn check_label(label: &str) -> Result<(), NameError> {
    if label.is_empty() {
        return Err(NameError::Empty);
    }
    if label.contains('*') {
        return Err(NameError::Wildcard);
    }
    if let Some(bad) = label.chars().find(|c| !matches!(c, 'a'..='z' | '0'..='9' | '-')) {
        return Err(NameError::Character(bad));
    }
    if label.len() > LABEL_BYTES_MAX {
        return Err(NameError::TooLong { length: label.len(), max: LABEL_BYTES_MAX });
    }
    if label.starts_with('-') || label.ends_with('-') {
        return Err(NameError::Hyphen);
    }
    // RFC 5890 §2.3.1: only A-labels may have this form.
    if label.as_bytes().get(2..4) == Some(b"--") && !label.starts_with("xn--") {
        return Err(NameError::ReservedLabel(label.to_owned()));
    }
    Ok(())
}

fn check_dns_name(name: &str, max: usize) -> Result<(), NameError> {
    if name.is_empty() {
        return Err(NameError::Empty);
    }
    if name.len() > max {
        return Err(NameError::TooLong { length: name.len(), max });
    }
    if name.ends_with('.') {
        return Err(NameError::TrailingDot);
    }
    name.split('.').try_for_each(check_label)?;
    let last = name.rsplit('.').next().unwrap_or_default();
    if last.bytes().all(|b| b.is_ascii_digit()) {
        return Err(NameError::NumericTopLabel);
    }
    Ok(())
}

macro_rules! checked_text {
    ($name:ident) => {
        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
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

        impl FromStr for $name {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                Self::parse(text)
            }
        }

        impl TryFrom<&str> for $name {
            type Error = NameError;
            fn try_from(text: &str) -> Result<Self, NameError> {
                Self::parse(text)
            }
        }
    };
}

/// One DNS label: 1 to 63 lower-case letters, digits and inner hyphens (RFC 1123 §2.1, RFC 5890 §2.3.1).
/// Node, service, operator and controller names are labels.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Label(String);

checked_text!(Label);

impl Label {
    /// Takes `text` as it is: upper case is refused, not folded.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        check_label(text).map(|()| Self(text.to_owned()))
    }
}

/// A host name as it stands in a certificate: lower-case A-labels, no wildcard, no trailing dot,
/// at most 253 characters.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DnsName(String);

checked_text!(DnsName);

impl DnsName {
    /// Takes `text` as it is: upper case is refused, not folded.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        check_dns_name(text, DNS_NAME_BYTES_MAX).map(|()| Self(text.to_owned()))
    }

    /// `LABEL.DOMAIN`, the name of a node.
    pub fn within(label: &Label, domain: &TrustDomain) -> Self {
        // Both parts are checked, and a trust domain leaves room for one label.
        Self(format!("{label}.{domain}"))
    }
}

/// The name of a mesh as it stands in every SPIFFE ID, for example `mesh.internal`. At least two
/// labels, because a URI's host has to be a fully qualified name (RFC 5280 §4.2.1.6).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TrustDomain(String);

checked_text!(TrustDomain);

impl TrustDomain {
    /// Takes `text` as it is: upper case is refused, not folded.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        check_dns_name(text, TRUST_DOMAIN_BYTES_MAX)?;
        if !text.contains('.') {
            return Err(NameError::SingleLabel);
        }
        Ok(Self(text.to_owned()))
    }
}

/// Whom a certificate speaks for. The kinds never overlap: each is written by one group of
/// profiles only (see [`Profile`](crate::Profile)).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Identity {
    Controller { name: Label },
    Node { name: Label },
    Service { node: Label, name: Label },
    Operator { name: Label },
}

impl Identity {
    /// The SPIFFE ID: `spiffe://DOMAIN/node/NAME`, `/controller/NAME`, `/service/NODE/NAME` or
    /// `/operator/NAME` (SPIFFE-ID §2).
    pub fn to_spiffe(&self, domain: &TrustDomain) -> String {
        match self {
            Self::Controller { name } => format!("spiffe://{domain}/controller/{name}"),
            Self::Node { name } => format!("spiffe://{domain}/node/{name}"),
            Self::Service { node, name } => format!("spiffe://{domain}/service/{node}/{name}"),
            Self::Operator { name } => format!("spiffe://{domain}/operator/{name}"),
        }
    }

    /// Reads a SPIFFE ID of `domain`. Only the exact text that [`to_spiffe`](Self::to_spiffe) writes is taken.
    pub fn parse(domain: &TrustDomain, uri: &str) -> Result<Self, NameError> {
        let (found, identity) = Self::parse_any_domain(uri)?;
        if found != *domain {
            return Err(NameError::ForeignTrustDomain(domain.clone()));
        }
        Ok(identity)
    }

    /// Reads a SPIFFE ID of a trust domain that is not known yet: only while joining, where the
    /// chain is pinned by its root.
    pub(crate) fn parse_any_domain(uri: &str) -> Result<(TrustDomain, Self), NameError> {
        let rest = uri.strip_prefix("spiffe://").ok_or(NameError::SpiffePath)?;
        let mut parts = rest.split('/');
        let domain = TrustDomain::parse(parts.next().unwrap_or_default())?;
        let parts: Vec<&str> = parts.collect();
        let identity = match parts.as_slice() {
            ["controller", name] => Self::Controller { name: Label::parse(name)? },
            ["node", name] => Self::Node { name: Label::parse(name)? },
            ["service", node, name] => Self::Service { node: Label::parse(node)?, name: Label::parse(name)? },
            ["operator", name] => Self::Operator { name: Label::parse(name)? },
            _ => return Err(NameError::SpiffePath),
        };
        Ok((domain, identity))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn label(text: &str) -> Label {
        Label::parse(text).unwrap()
    }

    #[test]
    fn dns_names_are_taken_only_in_certificate_form() {
        let long = format!("{}.example", "a".repeat(300));
        let table: [(&str, Result<(), NameError>); 17] = [
            ("web-1.mesh.internal", Ok(())),
            ("localhost", Ok(())),
            ("xn--bcher-kva.example", Ok(())),
            ("1.mesh.internal", Ok(())),
            ("", Err(NameError::Empty)),
            ("a..b", Err(NameError::Empty)),
            (".a", Err(NameError::Empty)),
            ("a.", Err(NameError::TrailingDot)),
            ("*.mesh.internal", Err(NameError::Wildcard)),
            ("Web.mesh.internal", Err(NameError::Character('W'))),
            ("web_1.mesh.internal", Err(NameError::Character('_'))),
            ("web\0.mesh.internal", Err(NameError::Character('\0'))),
            ("bücher.example", Err(NameError::Character('ü'))),
            ("-web.mesh.internal", Err(NameError::Hyphen)),
            ("ab--c.example", Err(NameError::ReservedLabel("ab--c".into()))),
            ("10.0.0.1", Err(NameError::NumericTopLabel)),
            (&long, Err(NameError::TooLong { length: 308, max: 253 })),
        ];
        for (text, verdict) in table {
            assert_eq!(DnsName::parse(text).map(drop), verdict, "name {text:?}");
        }
        let label64 = format!("{}.example", "a".repeat(64));
        assert_eq!(DnsName::parse(&label64), Err(NameError::TooLong { length: 64, max: 63 }));
    }

    #[test]
    fn trust_domain_has_at_least_two_labels() {
        assert!(TrustDomain::parse("mesh.internal").is_ok());
        assert_eq!(TrustDomain::parse("mesh"), Err(NameError::SingleLabel));
        let long = format!("{}.internal", "a.".repeat(95));
        assert!(matches!(TrustDomain::parse(&long), Err(NameError::TooLong { .. })));
    }

    #[test]
    fn spiffe_ids_read_back_as_what_was_written() {
        let domain = TrustDomain::parse("mesh.internal").unwrap();
        let table = [
            (Identity::Controller { name: label("c1") }, "spiffe://mesh.internal/controller/c1"),
            (Identity::Node { name: label("web-1") }, "spiffe://mesh.internal/node/web-1"),
            (
                Identity::Service { node: label("web-1"), name: label("shop") },
                "spiffe://mesh.internal/service/web-1/shop",
            ),
            (Identity::Operator { name: label("anna") }, "spiffe://mesh.internal/operator/anna"),
        ];
        for (identity, uri) in table {
            assert_eq!(identity.to_spiffe(&domain), uri);
            assert_eq!(Identity::parse(&domain, uri), Ok(identity));
        }
    }

    #[test]
    fn near_misses_of_a_spiffe_id_are_refused() {
        let domain = TrustDomain::parse("mesh.internal").unwrap();
        for uri in [
            "spiffe://mesh.internal",
            "spiffe://mesh.internal/",
            "spiffe://mesh.internal/node",
            "spiffe://mesh.internal/node/",
            "spiffe://mesh.internal/node/web-1/",
            "spiffe://mesh.internal/node/web-1/x",
            "spiffe://mesh.internal/node/../controller/c1",
            "spiffe://mesh.internal/node/web%2d1",
            "spiffe://mesh.internal/Node/web-1",
            "spiffe://mesh.internal/service/web-1",
            "spiffe://mesh.internal//node/web-1",
            "SPIFFE://mesh.internal/node/web-1",
            "https://mesh.internal/node/web-1",
            "spiffe://mesh.internal:443/node/web-1",
            "spiffe://a@mesh.internal/node/web-1",
            "spiffe://mesh.internal/node/web-1?x=1",
            "spiffe://mesh.internal/node/web-1#x",
            "spiffe://other.internal/node/web-1",
        ] {
            assert!(Identity::parse(&domain, uri).is_err(), "{uri}");
        }
    }
}
