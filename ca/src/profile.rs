//! What kinds of leaf exist, and what sets each apart.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::identity::Identity;

/// Longest validity of any leaf: 90 days, before backdating.
pub const LEAF_LIFETIME_MAX: Duration = Duration::from_secs(90 * 24 * 3600);

/// The kind of a leaf. Each fixes the extended key usage and the identity a certificate carries, so
/// that none can pass for another:
///
/// | profile | EKU | URI SAN | DNS SAN | WireGuard keys |
/// |---|---|---|---|---|
/// | controller | server, client | `/controller/NAME` | may | never |
/// | node | server, client | `/node/NAME` | at least one | one or two |
/// | server | server | none | or IP: at least one | never |
/// | client | client | none | at least one | never |
/// | peer | server, client | `/service/NODE/NAME` | or IP: at least one | never |
/// | operator | server, client | `/operator/NAME` | never | never |
///
/// `server` and `client` carry no SPIFFE ID. The SVID rules ask for *both* purposes as soon as a
/// certificate has a SPIFFE ID and an EKU (X509-SVID §4.4), and a server's key that may also act as a
/// client is exactly what those two profiles exist to prevent. Their owner is found by serial. A
/// service that wants a SPIFFE ID takes `peer`. An operator's certificate holds both purposes only
/// because of that rule; it has no DNS or IP name, so no client that checks host names takes it for a
/// server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Profile {
    Controller,
    Node,
    Server,
    Client,
    Peer,
    Operator,
}

impl Profile {
    /// Every profile, in a fixed order.
    pub const ALL: [Self; 6] =
        [Self::Controller, Self::Node, Self::Server, Self::Client, Self::Peer, Self::Operator];

    /// Whether the certificate may act as a TLS server (EKU serverAuth).
    pub fn server_auth(self) -> bool {
        self != Self::Client
    }

    /// Whether the certificate may act as a TLS client (EKU clientAuth).
    pub fn client_auth(self) -> bool {
        self != Self::Server
    }

    /// Validity without backdating when nobody asks for less: 72 h.
    pub fn default_lifetime(self) -> Duration {
        Duration::from_secs(72 * 3600)
    }

    /// Whether a certificate of this profile carries a SPIFFE ID at all.
    pub fn carries_identity(self) -> bool {
        !matches!(self, Self::Server | Self::Client)
    }

    /// Whether `identity` is what this profile must carry; `None` means no SPIFFE ID.
    pub fn permits(self, identity: Option<&Identity>) -> bool {
        matches!(
            (self, identity),
            (Self::Controller, Some(Identity::Controller { .. }))
                | (Self::Node, Some(Identity::Node { .. }))
                | (Self::Peer, Some(Identity::Service { .. }))
                | (Self::Operator, Some(Identity::Operator { .. }))
                | (Self::Server | Self::Client, None)
        )
    }

    /// Whether the leaf may carry DNS and IP names.
    pub fn permits_host_names(self) -> bool {
        self != Self::Operator
    }

    /// Name in configuration, commands and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Controller => "controller",
            Self::Node => "node",
            Self::Server => "server",
            Self::Client => "client",
            Self::Peer => "peer",
            Self::Operator => "operator",
        }
    }
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A purpose that a leaf of a custom profile may have beside TLS. None of them lets it speak for somebody.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ExtraUsage {
    /// id-kp-codeSigning, RFC 5280 §4.2.1.12.
    CodeSigning,
    /// id-kp-emailProtection, RFC 5280 §4.2.1.12.
    EmailProtection,
    /// id-kp-ipsecIKE, RFC 4945 §5.1.3.12.
    IpsecIke,
    /// id-kp-documentSigning, RFC 9336.
    DocumentSigning,
}

impl ExtraUsage {
    /// Every extra purpose.
    pub const ALL: [Self; 4] =
        [Self::CodeSigning, Self::EmailProtection, Self::IpsecIke, Self::DocumentSigning];

    /// Name in the policy file.
    pub fn name(self) -> &'static str {
        match self {
            Self::CodeSigning => "code-signing",
            Self::EmailProtection => "email-protection",
            Self::IpsecIke => "ipsec-ike",
            Self::DocumentSigning => "document-signing",
        }
    }

    pub(crate) fn oid(self) -> [u64; 9] {
        [
            1,
            3,
            6,
            1,
            5,
            5,
            7,
            3,
            match self {
                Self::CodeSigning => 3,
                Self::EmailProtection => 4,
                Self::IpsecIke => 17,
                Self::DocumentSigning => 36,
            },
        ]
    }
}

impl fmt::Display for ExtraUsage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for ExtraUsage {
    type Err = UnknownUsage;
    fn from_str(text: &str) -> Result<Self, UnknownUsage> {
        Self::ALL.into_iter().find(|usage| usage.name() == text).ok_or_else(|| UnknownUsage(text.to_owned()))
    }
}

/// A text that names no extra purpose.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown extended key usage {0:?}")]
pub struct UnknownUsage(pub String);

/// A text that names no profile.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown profile {0:?}")]
pub struct UnknownProfile(pub String);

impl FromStr for Profile {
    type Err = UnknownProfile;
    fn from_str(text: &str) -> Result<Self, UnknownProfile> {
        Self::ALL
            .into_iter()
            .find(|profile| profile.name() == text)
            .ok_or_else(|| UnknownProfile(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::Label;

    #[test]
    fn each_kind_of_identity_belongs_to_one_profile() {
        let label = |text| Label::parse(text).unwrap();
        let identities = [
            (Some(Identity::Controller { name: label("c") }), vec![Profile::Controller]),
            (Some(Identity::Node { name: label("n") }), vec![Profile::Node]),
            (Some(Identity::Service { node: label("n"), name: label("s") }), vec![Profile::Peer]),
            (Some(Identity::Operator { name: label("o") }), vec![Profile::Operator]),
            (None, vec![Profile::Server, Profile::Client]),
        ];
        for (identity, holders) in identities {
            let found: Vec<_> = Profile::ALL.into_iter().filter(|p| p.permits(identity.as_ref())).collect();
            assert_eq!(found, holders, "{identity:?}");
        }
    }

    #[test]
    fn a_spiffe_id_comes_with_both_purposes_and_single_purpose_without_one() {
        for profile in Profile::ALL {
            let both = profile.server_auth() && profile.client_auth();
            assert_eq!(both, profile.carries_identity(), "{profile}");
            assert!(profile.server_auth() || profile.client_auth());
        }
    }

    #[test]
    fn names_read_back() {
        for profile in Profile::ALL {
            assert_eq!(profile.name().parse(), Ok(profile));
        }
        assert!("root".parse::<Profile>().is_err());
    }
}
