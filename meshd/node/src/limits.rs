//! The largest of everything that comes from elsewhere, and the longest of every wait.

use std::time::Duration;

/// Peers in one map.
pub(crate) const PEERS_PER_MAP_MAX: usize = 20_000;
/// One certificate, DER bytes.
pub(crate) const CERTIFICATE_BYTES_MAX: usize = 16 * 1024;
/// Issuing CAs in one map.
pub(crate) const ISSUERS_MAX: usize = 16;
/// Roots in one bundle.
pub(crate) const ROOTS_MAX: usize = 16;
/// One CRL, DER bytes.
pub(crate) const CRL_BYTES_MAX: usize = 8 * 1024 * 1024;
/// CRLs (issuer and shard) that are kept.
pub(crate) const CRLS_MAX: usize = mesh_ca::CRLS_MAX;
/// One gRPC message from the controller, bytes.
pub(crate) const MESSAGE_BYTES_MAX: usize = 64 * 1024 * 1024;
/// One gRPC message on the local socket, bytes.
pub(crate) const LOCAL_MESSAGE_BYTES_MAX: usize = 64 * 1024;
/// A join token, characters.
pub(crate) const TOKEN_CHARS_MAX: usize = 4096;
/// Controller addresses in one token or identity.
pub(crate) const CONTROLLERS_MAX: usize = 16;
/// Endpoints kept for one peer.
pub(crate) const ENDPOINTS_PER_PEER_MAX: usize = 16;
/// Endpoints this node tells of itself.
pub(crate) const OWN_ENDPOINTS_MAX: usize = 16;
/// Names in one managed pair.
pub(crate) const NAMES_PER_PAIR_MAX: usize = 32;
/// Managed pairs on one node.
pub(crate) const PAIRS_MAX: usize = 256;
/// A reload hook, characters.
pub(crate) const HOOK_CHARS_MAX: usize = 4096;
/// What is kept of a hook's output for the finding, bytes.
pub(crate) const HOOK_OUTPUT_BYTES_MAX: usize = 2048;
/// One file in `certs.d`, bytes.
pub(crate) const DECLARATION_BYTES_MAX: u64 = 64 * 1024;
/// One file of our own state, bytes.
pub(crate) const STATE_FILE_BYTES_MAX: u64 = 128 * 1024 * 1024;
/// Findings kept at once.
pub(crate) const FINDINGS_MAX: usize = 256;
/// Calls waiting for the network actor.
pub(crate) const COMMAND_QUEUE: usize = 64;
/// Datagrams and events waiting for the underlay task.
pub(crate) const UNDERLAY_QUEUE: usize = 1024;
/// Datagrams waiting for the relay's stream.
pub(crate) const RELAY_QUEUE: usize = 256;
/// Addresses taken from the names in the configuration.
pub(crate) const NAMES_RESOLVED_MAX: usize = 8;
/// Peers whose address is reported in one message.
pub(crate) const SIGHTINGS_MAX: usize = 256;
/// Echo requests of one `ping`.
pub(crate) const PING_COUNT_MAX: u32 = 1000;
/// Connections on the local socket.
pub(crate) const LOCAL_CONNECTIONS_MAX: usize = 64;

/// TCP and TLS to the controller.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// One call to the controller.
pub(crate) const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// A reload hook.
pub(crate) const HOOK_TIMEOUT: Duration = Duration::from_secs(30);
/// Least time between two runs of one pair's hook.
pub(crate) const HOOK_INTERVAL: Duration = Duration::from_secs(5);
/// HTTP/2 ping to the controller while nothing else is said.
pub(crate) const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
/// How long such a ping may stay unanswered.
pub(crate) const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// First and longest wait between attempts to reach the controller.
pub(crate) const RECONNECT_FIRST: Duration = Duration::from_millis(250);
pub(crate) const RECONNECT_LONGEST: Duration = Duration::from_secs(30);
/// First and longest wait between questions about a pending approval.
pub(crate) const APPROVAL_FIRST: Duration = Duration::from_millis(500);
pub(crate) const APPROVAL_LONGEST: Duration = Duration::from_secs(5);
/// First and longest wait after a failed renewal or a failed hook.
pub(crate) const RETRY_FIRST: Duration = Duration::from_secs(2);
pub(crate) const RETRY_LONGEST: Duration = Duration::from_secs(300);
/// What `nft` may print of our table, bytes: four sets with an address of every peer.
pub(crate) const TABLE_BYTES_MAX: u64 = 32 * 1024 * 1024;
/// A program we start: `nft`.
pub(crate) const PROGRAM_TIMEOUT: Duration = Duration::from_secs(10);
/// First line of a passphrase file, bytes.
pub(crate) const PASSPHRASE_BYTES_MAX: usize = 1024;
/// A file of a pair that is read back, bytes.
pub(crate) const KEY_STORE_BYTES_MAX: u64 = 1024 * 1024;
