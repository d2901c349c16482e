//! Certificates as the mesh knows them: who owns them, what they name, whether they still count.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::ids::{KeyHash, KeyId, NodeId, Serial};
use crate::names::{DnsName, OperatorName};
use crate::time::UtcTime;

/// Profile of a node's identity.
pub const PROFILE_NODE: &str = "node";
/// Profile of the controller's identity.
pub const PROFILE_CONTROLLER: &str = "controller";
/// Profile of a delegate that signs OCSP responses; no identity.
pub const PROFILE_OCSP: &str = "ocsp";
/// Profile of an operator's identity.
pub const PROFILE_OPERATOR: &str = "operator";
/// Profile of a service that only calls others; the one that may carry no name.
pub const PROFILE_CLIENT: &str = "client";
/// Profiles that a service may ask for.
pub const PROFILES_SERVICE: [&str; 3] = ["server", PROFILE_CLIENT, "peer"];

/// Whom a certificate speaks for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Owner {
    Controller {
        name: String,
    },
    Node(NodeId),
    /// A service on a node; `name` is the name of its pair.
    Service {
        node: NodeId,
        name: String,
    },
    Operator(OperatorName),
    /// Written once for a machine that is no node; `None` is the controller's local root.
    Detached {
        operator: Option<OperatorName>,
    },
}

impl Owner {
    /// The node whose end ends this certificate too.
    pub fn node(&self) -> Option<NodeId> {
        match self {
            Owner::Node(node) | Owner::Service { node, .. } => Some(*node),
            Owner::Controller { .. } | Owner::Operator(_) | Owner::Detached { .. } => None,
        }
    }
}

/// Everything worth keeping of one issued certificate. Stands in records; [`World`](crate::World)
/// keeps the DER only of each node's current leaf.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateRecord {
    pub serial: Serial,
    pub key_hash: KeyHash,
    pub owner: Owner,
    pub profile: String,
    pub names: Vec<DnsName>,
    pub ips: Vec<IpAddr>,
    /// Name of the managed pair; empty for identities.
    pub pair_name: String,
    /// CRL shard, fixed at issuance.
    pub shard: u16,
    pub not_before: UtcTime,
    pub not_after: UtcTime,
    pub issuer_key_id: KeyId,
    #[serde(with = "crate::bytes::vec")]
    pub der: Vec<u8>,
}

impl fmt::Debug for CertificateRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CertificateRecord")
            .field("serial", &self.serial)
            .field("owner", &self.owner)
            .field("profile", &self.profile)
            .field("names", &self.names)
            .field("ips", &self.ips)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

/// A certificate of one of the mesh's authorities.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaRecord {
    pub key_id: KeyId,
    #[serde(with = "crate::bytes::vec")]
    pub der: Vec<u8>,
    pub is_root: bool,
    /// Its key is not on the controller, and never was.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub sealed: bool,
}

/// When and why a certificate stopped to count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revocation {
    pub at: UtcTime,
    pub reason: Reason,
}

/// Why a certificate is revoked. RFC 5280 §5.3.1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    #[default]
    Unspecified,
    KeyCompromise,
    CaCompromise,
    AffiliationChanged,
    Superseded,
    CessationOfOperation,
    PrivilegeWithdrawn,
}

/// The text is no reason that this mesh knows.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a reason; known are {}", Reason::ALL.map(Reason::as_str).join(", "))]
pub struct ReasonError {
    pub text: String,
}

impl Reason {
    pub const ALL: [Reason; 7] = [
        Reason::Unspecified,
        Reason::KeyCompromise,
        Reason::CaCompromise,
        Reason::AffiliationChanged,
        Reason::Superseded,
        Reason::CessationOfOperation,
        Reason::PrivilegeWithdrawn,
    ];

    /// The name in RFC 5280, in kebab case.
    pub const fn as_str(self) -> &'static str {
        match self {
            Reason::Unspecified => "unspecified",
            Reason::KeyCompromise => "key-compromise",
            Reason::CaCompromise => "ca-compromise",
            Reason::AffiliationChanged => "affiliation-changed",
            Reason::Superseded => "superseded",
            Reason::CessationOfOperation => "cessation-of-operation",
            Reason::PrivilegeWithdrawn => "privilege-withdrawn",
        }
    }

    /// CRLReason code. RFC 5280 §5.3.1.
    pub const fn code(self) -> u8 {
        match self {
            Reason::Unspecified => 0,
            Reason::KeyCompromise => 1,
            Reason::CaCompromise => 2,
            Reason::AffiliationChanged => 3,
            Reason::Superseded => 4,
            Reason::CessationOfOperation => 5,
            Reason::PrivilegeWithdrawn => 9,
        }
    }

    /// Whether the holder is still trusted: the end is a matter of housekeeping.
    pub const fn is_benign(self) -> bool {
        matches!(self, Reason::AffiliationChanged | Reason::Superseded | Reason::CessationOfOperation)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The empty text is [`Reason::Unspecified`].
impl FromStr for Reason {
    type Err = ReasonError;
    fn from_str(text: &str) -> Result<Self, ReasonError> {
        if text.is_empty() {
            return Ok(Reason::Unspecified);
        }
        let known = Reason::ALL.into_iter().find(|reason| reason.as_str() == text);
        known.ok_or_else(|| ReasonError { text: text.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_read_what_they_write() {
        for reason in Reason::ALL {
            assert_eq!(reason.as_str().parse(), Ok(reason));
            assert_eq!(serde_json::to_string(&reason).unwrap(), format!("\"{reason}\""));
        }
        assert_eq!("".parse(), Ok(Reason::Unspecified));
        assert!("certificate-hold".parse::<Reason>().is_err());
    }
}
