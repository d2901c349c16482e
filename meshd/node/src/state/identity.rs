//! Who this node is: the forms that stand on disk.

use std::net::{Ipv4Addr, Ipv6Addr};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ipnet::{Ipv4Net, Ipv6Net};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{Secret, StateDir, StateError};

const ENROLLMENT_FILE: &str = "enrollment.json";
const IDENTITY_FILE: &str = "identity.json";
const NEXT_IDENTITY_FILE: &str = "identity-next.json";
const RENEWAL_FILE: &str = "renewal.json";
const CLOCK_FILE: &str = "clock.json";
/// Why this node does not run on the engine it would begin with; see `network::engine`.
pub(crate) const ENGINE_FILE: &str = "engine.json";

/// An enrollment under way. On disk before its first byte is sent, so that a retry after a crash at
/// any step asks for the same thing with the same keys and gets the same answer.
#[derive(Serialize, Deserialize, Clone)]
pub(crate) struct Enrollment {
    #[serde(with = "hex")]
    pub(crate) operation_id: [u8; 16],
    #[serde(with = "hex")]
    pub(crate) token_id: Vec<u8>,
    pub(crate) token_secret: Secret,
    #[serde(with = "hex")]
    pub(crate) root_pin: [u8; 32],
    pub(crate) trust_domain: String,
    pub(crate) controllers: Vec<String>,
    pub(crate) name: String,
    pub(crate) csr: Der,
    /// PKCS #8.
    pub(crate) tls_key: Secret,
    /// 32 bytes.
    pub(crate) wireguard_key: Secret,
}

/// The identity in use.
#[derive(Serialize, Deserialize, Clone)]
pub(crate) struct Identity {
    pub(crate) name: String,
    pub(crate) node_id: u32,
    pub(crate) trust_domain: String,
    #[serde(with = "hex")]
    pub(crate) mesh_id: Vec<u8>,
    pub(crate) ipv4: Ipv4Addr,
    pub(crate) ipv6: Ipv6Addr,
    pub(crate) ipv4_pool: Ipv4Net,
    pub(crate) ipv6_prefix: Ipv6Net,
    pub(crate) controllers: Vec<String>,
    /// SHA-256 of the root's SubjectPublicKeyInfo: from the join token, and moved along the signed history of
    /// roots when that root has gone.
    #[serde(with = "hex")]
    pub(crate) root_pin: [u8; 32],
    /// Certificates of roots, signed by roots before them.
    #[serde(default)]
    pub(crate) lineage: Vec<Der>,
    /// Version of the bundle that `roots` and `issuers` come from; 0 if the controller never said.
    #[serde(default)]
    pub(crate) bundle: u64,
    /// Key identifier of the CA that issues now; empty if the controller never said.
    #[serde(default, with = "hex")]
    pub(crate) active_issuer: Vec<u8>,
    pub(crate) leaf: Der,
    /// The leaf's own issuer first.
    pub(crate) issuers: Vec<Der>,
    pub(crate) roots: Vec<Der>,
    /// When the controller wants it renewed (UTC seconds); 0 if it did not say.
    #[serde(default)]
    pub(crate) renew_at: i64,
    /// PKCS #8.
    pub(crate) tls_key: Secret,
    /// 32 bytes each, newest first.
    pub(crate) wireguard_keys: Vec<Secret>,
}

/// A renewal under way: the same rule as for [`Enrollment`].
#[derive(Serialize, Deserialize, Clone)]
pub(crate) struct RenewalRequest {
    #[serde(with = "hex")]
    pub(crate) operation_id: [u8; 16],
    pub(crate) csr: Der,
    pub(crate) tls_key: Secret,
    pub(crate) wireguard_keys: Vec<Secret>,
}

/// What was learned of the controller's clock.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ClockFile {
    /// Controller time less our own, seconds.
    pub(crate) offset_secs: i64,
}

/// A DER document; base64 on disk.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Der(pub(crate) Vec<u8>);

impl Serialize for Der {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Der {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        STANDARD.decode(text).map(Self).map_err(|_| serde::de::Error::custom("not base64"))
    }
}

impl StateDir {
    pub(crate) fn enrollment(&self) -> Result<Option<Enrollment>, StateError> {
        self.read_json(ENROLLMENT_FILE)
    }

    pub(crate) fn save_enrollment(&self, enrollment: &Enrollment) -> Result<(), StateError> {
        self.write_json(ENROLLMENT_FILE, enrollment)
    }

    pub(crate) fn forget_enrollment(&self) -> Result<(), StateError> {
        self.remove(ENROLLMENT_FILE)
    }

    pub(crate) fn identity(&self) -> Result<Option<Identity>, StateError> {
        self.read_json(IDENTITY_FILE)
    }

    pub(crate) fn save_identity(&self, identity: &Identity) -> Result<(), StateError> {
        self.write_json(IDENTITY_FILE, identity)
    }

    /// A renewed identity that the controller has not seen in use yet.
    pub(crate) fn next_identity(&self) -> Result<Option<Identity>, StateError> {
        self.read_json(NEXT_IDENTITY_FILE)
    }

    pub(crate) fn save_next_identity(&self, identity: &Identity) -> Result<(), StateError> {
        self.write_json(NEXT_IDENTITY_FILE, identity)
    }

    pub(crate) fn forget_next_identity(&self) -> Result<(), StateError> {
        self.remove(NEXT_IDENTITY_FILE)
    }

    pub(crate) fn renewal(&self) -> Result<Option<RenewalRequest>, StateError> {
        self.read_json(RENEWAL_FILE)
    }

    pub(crate) fn save_renewal(&self, renewal: &RenewalRequest) -> Result<(), StateError> {
        self.write_json(RENEWAL_FILE, renewal)
    }

    pub(crate) fn forget_renewal(&self) -> Result<(), StateError> {
        self.remove(RENEWAL_FILE)
    }

    pub(crate) fn clock(&self) -> Result<ClockFile, StateError> {
        Ok(self.read_json(CLOCK_FILE)?.unwrap_or_default())
    }

    pub(crate) fn save_clock(&self, clock: ClockFile) -> Result<(), StateError> {
        self.write_json(CLOCK_FILE, &clock)
    }

    /// Forgets who this node was: identity, requests under way, map and CRLs. Identity first, so that a
    /// crash in between leaves no identity without its data.
    pub(crate) fn forget_everything(&self) -> Result<(), StateError> {
        for name in
            [IDENTITY_FILE, NEXT_IDENTITY_FILE, RENEWAL_FILE, ENROLLMENT_FILE, CLOCK_FILE, ENGINE_FILE]
        {
            self.remove(name)?;
        }
        self.forget_map()
    }
}
