//! What the daemon's command line hands down, already parsed.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use mesh_ca::CaKeyType;
use zeroize::Zeroizing;

use crate::hardware::HsmPlace;

/// A passphrase. Has no readable `Debug`; wiped when dropped.
#[derive(Clone)]
pub struct Passphrase(Zeroizing<String>);

impl Passphrase {
    pub fn new(text: String) -> Self {
        Self(Zeroizing::new(text))
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Passphrase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Passphrase(…)")
    }
}

/// How the CA's keys are unlocked at each start; remembered in the state directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Unlock {
    /// A person types it, or it comes by file or environment at each start.
    Passphrase,
    /// systemd hands it over (`LoadCredential=mesh-passphrase`).
    Credential,
    /// It lies in a file that is named at each start.
    File,
    /// The keys are not sealed: whoever reads the disk is the CA.
    None,
}

impl Unlock {
    pub fn name(self) -> &'static str {
        match self {
            Self::Passphrase => "passphrase",
            Self::Credential => "credential",
            Self::File => "file",
            Self::None => "none",
        }
    }
}

/// What `meshd controller init` was asked to make.
#[derive(Debug, Clone)]
pub struct InitConfig {
    /// Must not exist; its parent must.
    pub state_dir: PathBuf,
    /// Trust domain and DNS domain, for example `mesh.internal`.
    pub domain: String,
    /// The controller's own name, one DNS label.
    pub name: String,
    /// What status shows as the fleet's name.
    pub fleet: String,
    /// `host:port` under which nodes reach the controller; stands in every join token.
    pub advertise: Vec<String>,
    /// Base address of published CRLs, for example `http://pki.mesh.internal`.
    pub publish_url: Option<String>,
    /// Pool of overlay IPv4 addresses.
    pub ipv4_pool: ipnet::Ipv4Net,
    pub unlock: Unlock,
    /// Seals the CA's keys; present unless `unlock` is [`Unlock::None`].
    pub passphrase: Option<Passphrase>,
    /// A CA that exists already, in place of a new one.
    pub import: Option<ImportConfig>,
    /// The token that keeps the issuing CA's key, in place of a sealed file.
    pub key_store: Option<HsmPlace>,
    /// Of that token.
    pub pin: Option<Passphrase>,
    /// Of the keys that are drawn now; those of later CAs follow it. P-256 unless said.
    pub key_type: Option<CaKeyType>,
}

impl InitConfig {
    /// The least that makes a mesh: keys that nothing seals, nobody told where the controller is, nothing published.
    pub fn unsealed(state_dir: PathBuf, domain: &str) -> Self {
        Self {
            state_dir,
            domain: domain.to_owned(),
            name: "ctl-1".to_owned(),
            fleet: domain.split('.').next().unwrap_or_default().to_owned(),
            advertise: Vec::new(),
            publish_url: None,
            ipv4_pool: ipnet::Ipv4Net::new_assert(std::net::Ipv4Addr::new(100, 64, 0, 0), 10),
            unlock: Unlock::None,
            passphrase: None,
            import: None,
            key_store: None,
            pin: None,
            key_type: None,
        }
    }
}

/// Which of the mesh's two CAs is taken over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImportKind {
    /// A root with its key; its issuing CA is made anew.
    Root,
    /// An issuing CA with its key, below a root whose key stays where it is.
    Issuer,
}

/// A CA that was made elsewhere.
#[derive(Debug, Clone)]
pub struct ImportConfig {
    pub kind: ImportKind,
    /// Certificates and the key, each PEM or PKCS #12, in any order.
    pub files: Vec<PathBuf>,
    /// The root's newest CRL, PEM or DER. Needed beside an issuing CA; beside a root it must be empty.
    pub crl: Option<PathBuf>,
    /// Of an encrypted key or a PKCS #12 file.
    pub passphrase: Option<Passphrase>,
}

/// What `restore` was asked to make.
#[derive(Debug, Clone)]
pub struct RestoreConfig {
    /// Must not exist; its parent must.
    pub state_dir: PathBuf,
    pub backup: PathBuf,
    /// The backup's own, given when it was taken.
    pub passphrase: Passphrase,
}

/// What `restore` made.
#[derive(Debug, Clone)]
pub struct RestoreSummary {
    pub state_dir: PathBuf,
    pub domain: String,
    pub taken_at: time::UtcDateTime,
    /// First record of the journal that is left by its retention.
    pub first_seq: u64,
    /// Last record of the journal.
    pub seq: u64,
    pub unlock: Unlock,
}

/// What `init` made, for its last lines on the screen.
#[derive(Debug, Clone)]
pub struct InitSummary {
    pub state_dir: PathBuf,
    pub domain: String,
    pub root_spki_sha256: [u8; 32],
    pub root_not_after: time::UtcDateTime,
    pub issuing_not_after: time::UtcDateTime,
    pub unlock: Unlock,
}

/// Where the UDP port is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum StunListen {
    /// At the address and port number of the gRPC listener. If that port is taken, there is none.
    #[default]
    LikeTls,
    At(SocketAddr),
    Off,
}

/// What each node may send by the relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RelayLimit {
    pub bytes_per_second: u64,
}

impl Default for RelayLimit {
    /// 4 MiB/s: a terminal, a deployment, a small database; not a backup of all.
    fn default() -> Self {
        Self { bytes_per_second: 4 << 20 }
    }
}

/// What `meshd controller run` was told.
#[derive(Debug, Clone)]
pub struct RunConfig {
    pub state_dir: PathBuf,
    /// Address of the gRPC listener; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Unix socket for root and the daemon's own uid.
    pub socket: PathBuf,
    /// Overrides what `init` was told, when not empty.
    pub advertise: Vec<String>,
    pub passphrase: Option<Passphrase>,
    /// Overrides the token that `init` was told.
    pub key_store: Option<HsmPlace>,
    /// Of the token that keeps CA keys, if one does.
    pub pin: Option<Passphrase>,
    /// Where CRLs and CA certificates are served over plain HTTP; port 0 takes a free one.
    pub publish_listen: Vec<SocketAddr>,
    pub publishing: Publishing,
    /// UDP port for STUN and the relay's frames.
    pub stun_listen: StunListen,
    /// `None`: no relay at all, neither by UDP nor over TLS.
    pub relay: Option<RelayLimit>,
    /// Loopback address at which figures for Prometheus are served; port 0 takes a free one. `None`: not at all.
    pub metrics_listen: Option<SocketAddr>,
    /// How long after its end a certificate is remembered, and how long the journal goes back; `None`: for ever.
    pub retention: Option<Duration>,
    /// Print `listening on ADDR` on standard output once requests are served.
    pub announce: bool,
}

/// How certificates say where their CRL is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Publishing {
    /// Base address in new certificates: `http://host[:port][/path]`. `None` keeps what was used before.
    pub url: Option<String>,
    /// CRL shards opened at a time, from 1 to 256.
    pub shards: u16,
}

/// CRL shards opened at a time when nobody says otherwise.
pub const CRL_SHARDS_DEFAULT: u16 = 4;

impl Default for Publishing {
    fn default() -> Self {
        Self { url: None, shards: CRL_SHARDS_DEFAULT }
    }
}
