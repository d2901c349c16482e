use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::Serialize;

const EXIT_CODES: &str = "Exit codes: 0 done, 1 failed, 2 usage, 4 denied or not enrolled, 5 unreachable, 6 not found, 7 conflict.

Every setting of `run` is a flag, a variable MESH_<NAME> and a key of the configuration file; the flag wins over the variable, \
the variable over drop-ins (FILE.d/*.toml), those over the file.";

/// A private certificate authority and WireGuard mesh: the daemon.
#[derive(Debug, Parser)]
#[command(name = "meshd", version, after_help = EXIT_CODES)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) role: Role,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Role {
    /// The certificate authority and the directory of the fleet.
    #[command(subcommand)]
    Controller(Controller),
    /// A server's place in the mesh.
    #[command(subcommand)]
    Node(Node),
}

#[derive(Debug, Subcommand)]
pub(crate) enum Controller {
    /// Make a new mesh: root and issuing CA, journal, starter policy.
    Init(ControllerInit),
    /// Make a controller from a backup; the one it was taken from must not run any more.
    Restore(ControllerRestore),
    /// Serve the mesh.
    #[command(after_help = EXIT_CODES)]
    Run(ControllerRun),
    /// Look at the settings without starting.
    Config {
        #[command(subcommand)]
        verb: ConfigVerb,
        #[command(flatten)]
        run: ControllerRun,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Node {
    /// Serve this server: identity, tunnels, certificates, firewall.
    #[command(after_help = EXIT_CODES)]
    Run(NodeRun),
    /// Look at the settings without starting.
    Config {
        #[command(subcommand)]
        verb: ConfigVerb,
        #[command(flatten)]
        run: NodeRun,
    },
}

#[derive(Debug, Clone, Copy, Subcommand)]
pub(crate) enum ConfigVerb {
    /// Read all settings and say what is wrong with them.
    Check,
    /// Print all settings as TOML.
    Show {
        /// Say where each one comes from.
        #[arg(long)]
        origin: bool,
    },
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Unlock {
    /// Asked for at each start.
    Passphrase,
    /// Handed over by systemd as credential `mesh-passphrase`.
    Credential,
    /// Read from --passphrase-file at each start.
    File,
    /// Not sealed: whoever reads the disk is the CA.
    None,
}

#[derive(Debug, Args)]
pub(crate) struct ControllerInit {
    /// Folder to make; must not exist.
    #[arg(long, value_name = "DIR", env = "MESH_STATE_DIR", default_value = "/var/lib/meshd/controller")]
    pub(crate) state_dir: PathBuf,
    /// DNS and trust domain of the mesh, for example mesh.internal.
    #[arg(long)]
    pub(crate) domain: String,
    /// Name of this controller, one DNS label.
    #[arg(long, default_value = "ctl-1")]
    pub(crate) name: String,
    /// Name of the fleet in `meshctl status`; the domain's first label if not given.
    #[arg(long)]
    pub(crate) fleet: Option<String>,
    /// Address under which nodes reach this controller; stands in every join token. Repeatable.
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) advertise: Vec<String>,
    /// Base address in certificates where their CRL is fetched, for example `http://pki.mesh.internal`; certificates name
    /// none without it.
    #[arg(long, value_name = "URL")]
    pub(crate) publish_url: Option<String>,
    /// Pool of overlay IPv4 addresses.
    #[arg(long, value_name = "CIDR", default_value = "100.64.0.0/10")]
    pub(crate) ipv4_pool: ipnet::Ipv4Net,
    /// How the CA's keys are unlocked at each start.
    #[arg(long, value_enum)]
    pub(crate) unlock: Option<Unlock>,
    /// File whose first line is the passphrase; `-` for stdin.
    #[arg(long, value_name = "F", env = "MESH_PASSPHRASE_FILE")]
    pub(crate) passphrase_file: Option<PathBuf>,
    /// Take over this root, PEM or PKCS #12, in place of a new one; beside --import-issuer its certificate alone.
    #[arg(long, value_name = "FILE")]
    pub(crate) import_root: Option<PathBuf>,
    /// Take over this issuing CA, PEM or PKCS #12; its root's key stays where it is.
    #[arg(long, value_name = "FILE", requires = "import_crl")]
    pub(crate) import_issuer: Option<PathBuf>,
    /// Key of the CA that is taken over, if it is in a file of its own: PKCS #8, encrypted or not, or OpenSSL's older forms.
    #[arg(long, value_name = "FILE")]
    pub(crate) import_key: Option<PathBuf>,
    /// The root's newest CRL, PEM or DER.
    #[arg(long, value_name = "FILE")]
    pub(crate) import_crl: Option<PathBuf>,
    /// File whose first line opens the imported key or PKCS #12 file; `-` for stdin. Asked for if needed.
    #[arg(long, value_name = "F", env = "MESH_IMPORT_PASSPHRASE_FILE")]
    pub(crate) import_passphrase_file: Option<PathBuf>,
    /// Draw the issuing CA's key in this hardware token, where it stays:
    /// `pkcs11:token=LABEL?module-path=/path/to/module.so` (RFC 7512), with `&pin-source=FILE` if wanted.
    #[arg(long, value_name = "URI", env = "MESH_KEY_STORE")]
    pub(crate) key_store: Option<String>,
    /// File whose first line is the token's PIN; `-` for stdin. Asked for if needed.
    #[arg(long, value_name = "F", env = "MESH_PIN_FILE")]
    pub(crate) pin_file: Option<PathBuf>,
    /// Type of the CA keys that are drawn now, followed by those of later CAs: p256, p384 or ed25519 (not in a hardware
    /// token) [default: p256].
    #[arg(long, value_name = "TYPE")]
    pub(crate) key_type: Option<mesh_controller::CaKeyType>,
}

#[derive(Debug, Args)]
pub(crate) struct ControllerRestore {
    /// Folder to make; must not exist.
    #[arg(long, value_name = "DIR", env = "MESH_STATE_DIR", default_value = "/var/lib/meshd/controller")]
    pub(crate) state_dir: PathBuf,
    /// The file that `meshctl ca backup` wrote.
    #[arg(long, value_name = "FILE")]
    pub(crate) from: PathBuf,
    /// File whose first line is the backup's passphrase; `-` for stdin. Asked for if needed.
    #[arg(long, value_name = "F", env = "MESH_BACKUP_PASSPHRASE_FILE")]
    pub(crate) backup_passphrase_file: Option<PathBuf>,
}

#[derive(Debug, Clone, Args, Serialize)]
pub(crate) struct ControllerRun {
    /// Configuration file [default: /etc/meshd/controller.toml, if it is there].
    #[arg(long, value_name = "F", global = true)]
    #[serde(skip)]
    pub(crate) config: Option<PathBuf>,
    /// Folder made by `init` [default: /var/lib/meshd/controller].
    #[arg(long, value_name = "DIR", global = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    state_dir: Option<String>,
    /// Address to listen on [default: 0.0.0.0:7443].
    #[arg(long, value_name = "ADDR:PORT", global = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    listen: Option<String>,
    /// Socket for root and the daemon's own user [default: /run/meshd/controller.sock].
    #[arg(long, value_name = "PATH", global = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    socket: Option<String>,
    /// Replaces the addresses given to `init`. Repeatable.
    #[arg(long, value_name = "HOST:PORT", global = true)]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    advertise: Vec<String>,
    /// File whose first line is the passphrase; `-` for stdin.
    #[arg(long, value_name = "F", global = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    passphrase_file: Option<String>,
    /// Replaces the hardware token given to `init`, a pkcs11: URI.
    #[arg(long, value_name = "URI", global = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    key_store: Option<String>,
    /// File whose first line is the token's PIN; `-` for stdin.
    #[arg(long, value_name = "F", global = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pin_file: Option<String>,
    /// Address at which CRLs, CA certificates and OCSP are served over plain HTTP. Repeatable.
    #[arg(long, value_name = "ADDR:PORT", global = true)]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    publish_listen: Vec<String>,
    /// Replaces the base address given to `init` in new certificates.
    #[arg(long, value_name = "URL", global = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    publish_url: Option<String>,
    /// CRL shards opened at a time [default: 4].
    #[arg(long, value_name = "COUNT", global = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    crl_shards: Option<u16>,
    /// UDP port for STUN and the relay, or `off` [default: the address of --listen].
    #[arg(long, value_name = "ADDR:PORT", global = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    stun_listen: Option<String>,
    /// Loopback address at which figures for Prometheus are served, at /metrics [default: none].
    #[arg(long, value_name = "ADDR:PORT", global = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    metrics_listen: Option<String>,
    /// Pass on WireGuard's datagrams between nodes without a direct way: true or false [default: true].
    #[arg(long, value_name = "BOOL", global = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    relay: Option<bool>,
    /// What one node may send by the relay, bytes per second [default: 4194304].
    #[arg(long, value_name = "BYTES", global = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    relay_bytes_per_second: Option<u64>,
    /// Days that a certificate is remembered after its end and that the journal goes back; 0 keeps the journal for ever [default: 30].
    #[arg(long, value_name = "DAYS", global = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    retention_days: Option<u32>,
    /// Log lines: text or json [default: text].
    #[arg(long, value_name = "FORMAT", global = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    log_format: Option<String>,
}

#[derive(Debug, Clone, Args, Serialize)]
pub(crate) struct NodeRun {
    /// Configuration file [default: /etc/meshd/node.toml, if it is there].
    #[arg(long, value_name = "F", global = true)]
    #[serde(skip)]
    pub(crate) config: Option<PathBuf>,
    /// Identity, keys and last map [default: /var/lib/meshd/node].
    #[arg(long, value_name = "DIR", global = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    state_dir: Option<String>,
    /// Socket for root and the daemon's own user [default: /run/meshd/node.sock].
    #[arg(long, value_name = "PATH", global = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    socket: Option<String>,
    /// Overlay interface [default: mesh0].
    #[arg(long, value_name = "NAME", global = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    interface: Option<String>,
    /// Largest packet inside the overlay, bytes [default: 1420].
    #[arg(long, value_name = "BYTES", global = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    mtu: Option<u16>,
    /// UDP port of WireGuard; 0 takes any [default: 51820].
    #[arg(long, value_name = "PORT", global = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    wg_port: Option<u16>,
    /// Whose WireGuard: auto (the kernel's where it exists and reaches every peer), kernel or userspace [default: auto].
    #[arg(long, value_name = "B", global = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    backend: Option<String>,
    /// Enroll by itself with this token; end if it is refused.
    #[arg(long, value_name = "F", global = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    token_file: Option<String>,
    /// Name to enroll under [default: the host name].
    #[arg(long, value_name = "N", global = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    /// Folder of declared certificates [default: /etc/meshd/certs.d].
    #[arg(long, value_name = "DIR", global = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    certs_dir: Option<String>,
    /// Underlay address or name under which peers reach this node. Repeatable.
    #[arg(long, value_name = "HOST:PORT", global = true)]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    endpoints: Vec<String>,
    /// Log lines: text or json [default: text].
    #[arg(long, value_name = "FORMAT", global = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    log_format: Option<String>,
}
