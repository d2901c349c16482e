//! Every limit on foreign input, with its unit.

use std::time::Duration;

/// Nodes in one mesh, pending and revoked ones included.
pub const NODES_MAX: usize = 100_000;
/// How far past the highest index ever used a node index may be reserved.
pub const NODE_ID_WINDOW: u32 = 4096;
/// Tags on one node or one token.
pub const TAGS_MAX: usize = 32;
/// Characters of a tag.
pub const TAG_CHARS_MAX: usize = 32;
/// Characters of an operator's name.
pub const OPERATOR_NAME_CHARS_MAX: usize = 64;
/// Characters of one DNS label. RFC 1035 §2.3.4.
pub const LABEL_CHARS_MAX: usize = 63;
/// Characters of a host name in text form. RFC 1035 §2.3.4 less the root's length octet and dot.
pub const NAME_CHARS_MAX: usize = 253;
/// Bytes of a fleet's display name.
pub const FLEET_BYTES_MAX: usize = 128;
/// Enrollments one token may allow.
pub const TOKEN_USES_MAX: u32 = 10_000;
/// Longest life of a token.
pub const TOKEN_LIFE_MAX: Duration = Duration::from_secs(30 * 86_400);
/// Tokens kept at once, spent and expired ones included.
pub const TOKENS_MAX: usize = 10_000;
/// How long a token outlives its expiry, so that a retried enrollment still gets its answer.
pub const TOKEN_RETENTION: Duration = Duration::from_secs(30 * 86_400);
/// Names and addresses in one certificate.
pub const SANS_MAX: usize = 64;
/// Live service certificates of one node.
pub const CERTIFICATES_PER_NODE_MAX: usize = 512;
/// Bytes of one certificate in DER.
pub const CERTIFICATE_BYTES_MAX: usize = 16 * 1024;
/// WireGuard keys a node may vouch for: two during a rotation.
pub const WIREGUARD_KEYS_MAX: usize = 2;
/// Operators of one mesh.
pub const OPERATORS_MAX: usize = 1_000;
/// Bytes of `policy.toml`.
pub const POLICY_BYTES_MAX: usize = 256 * 1024;
/// `[[allow]]` and `[[grant]]` tables, each.
pub const POLICY_RULES_MAX: usize = 2_000;
/// Selectors or names in one list of the policy.
pub const POLICY_LIST_MAX: usize = 512;
/// Custom profiles of one policy.
pub const PROFILES_MAX: usize = 32;
/// `[[profile.NAME.names]]` tables of one profile.
pub const PROFILE_RULES_MAX: usize = 64;
/// Characters of a custom profile's name.
pub const PROFILE_NAME_CHARS_MAX: usize = 32;
/// Problems reported for one policy.
pub const POLICY_PROBLEMS_MAX: usize = 50;
/// Aggregated denials in one record.
pub const DENIALS_MAX: usize = 1_000;
/// Characters of one free text field of a denial.
pub const DENIAL_TEXT_CHARS_MAX: usize = 200;
/// Certificates in a CRL shard, on average, at which more shards are opened: a CRL of that many entries is still made
/// about as fast as an empty one.
pub const CERTIFICATES_PER_SHARD: usize = 256;
/// Highest number of a CRL: one that stands near the end of its type would be the last.
pub const CRL_NUMBER_MAX: u64 = 1 << 62;
/// CRL shards of one issuer, for ever: four million certificates at a time.
pub const CRL_SHARDS_MAX: u16 = 16_384;
/// CRL shards opened at once.
pub const CRL_SHARDS_PER_GROUP_MAX: u16 = 256;
/// Characters of the base address of published CRLs; the path takes some 60 more.
pub const BASE_URL_CHARS_MAX: usize = 150;
/// Authorities there may ever have been.
pub const AUTHORITIES_MAX: usize = 256;
/// Bundles that are remembered; nodes that are away for longer come back as if they had none.
pub const BUNDLES_MAX: usize = 64;
/// Certificate authorities recorded at creation.
pub const CAS_MAX: usize = 16;
/// Addresses taken from a pool only when it is at least this big (prefix length at most 30).
pub const IPV4_POOL_PREFIX_MAX: u8 = 30;
/// How long an expired identity may still ask for a new one.
pub const RESUME_WINDOW: Duration = Duration::from_secs(30 * 86_400);
/// How long an operation id is remembered.
pub const OPERATION_MEMORY: Duration = Duration::from_secs(24 * 3600);
/// Operation ids remembered at once; the oldest go first.
pub const OPERATIONS_MAX: usize = 65_536;
/// Records whose touched nodes are remembered for deltas.
pub const TOUCHED_RECORDS_MAX: usize = 16_384;
/// A clock that runs ahead of what was expected by more than this is held.
pub const CLOCK_JUMP_MAX: Duration = Duration::from_secs(600);
/// Record time between two prunings.
pub const PRUNE_INTERVAL: Duration = Duration::from_secs(60);
/// Characters of one line of audit detail.
pub const DETAIL_CHARS_MAX: usize = 1_000;
/// Endpoint candidates kept for one peer.
pub const CANDIDATES_PER_PEER_MAX: usize = 16;
/// Peers in one map.
pub const PEERS_PER_MAP_MAX: usize = NODES_MAX;
