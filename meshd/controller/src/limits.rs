//! Every bound this crate puts on what others send or make it keep.

use std::time::Duration;

/// Connections with a certificate of this mesh, or local ones, open at one time. Strangers take none of
/// these: what is not known yet, and what showed no certificate, has the two limits below.
pub(crate) const CONNECTIONS_MAX: usize = 12_000;
/// The same from one source: an IPv4 address, an IPv6 /64. A fleet behind one NAT stays below it.
pub(crate) const CONNECTIONS_PER_SOURCE_MAX: usize = 2_000;
/// Connections in the TLS handshake, of whom nothing is known yet, and those of one source. What is
/// refused comes again with back-off.
pub(crate) const HANDSHAKES_MAX: usize = 4_000;
pub(crate) const HANDSHAKES_PER_SOURCE_MAX: usize = 500;
/// Connections without a certificate: enrolling or logging in; and those of one source.
pub(crate) const ANONYMOUS_CONNECTIONS_MAX: usize = 1_000;
pub(crate) const ANONYMOUS_CONNECTIONS_PER_SOURCE_MAX: usize = 100;
/// Time from accept to the end of the TLS handshake.
pub(crate) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Age at which a connection is asked to go away; its streams may finish.
pub(crate) const CONNECTION_AGE_MAX: Duration = Duration::from_secs(24 * 3600);
/// The same for a connection without a client certificate: enough to enroll or to log in. Whoever keeps
/// more of them open than that takes the places of nodes.
pub(crate) const ANONYMOUS_CONNECTION_AGE_MAX: Duration = Duration::from_secs(60);
/// How long a connection that was asked to go may still finish what it is doing.
pub(crate) const CONNECTION_GRACE: Duration = Duration::from_millis(400);
/// The same for the connection of a node that leaves the mesh by its own word: it shall hear that it has left.
pub(crate) const LEAVING_GRACE: Duration = Duration::from_secs(20);
/// HTTP/2 streams open at one time on one connection.
pub(crate) const STREAMS_PER_CONNECTION_MAX: u32 = 64;
/// HTTP/2 PING interval on idle connections.
pub(crate) const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
/// How long an HTTP/2 PING may stay unanswered.
pub(crate) const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Octets of all headers of one request.
pub(crate) const HEADER_LIST_BYTES_MAX: u32 = 16 * 1024;
/// Octets of one message of a caller; a CSR and its names fit many times.
pub(crate) const MESSAGE_BYTES_MAX: usize = 256 * 1024;
/// Octets of one message of ours: a full map of a large mesh, all CRLs.
pub(crate) const ANSWER_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Plain-HTTP connections open at one time, in all and from one address.
pub(crate) const WEB_CONNECTIONS_MAX: usize = 1_024;
pub(crate) const WEB_CONNECTIONS_PER_ADDRESS_MAX: usize = 64;
/// Age at which a plain-HTTP connection is closed: a CRL of a full shard takes a modem that long.
pub(crate) const WEB_CONNECTION_AGE_MAX: Duration = Duration::from_secs(120);
/// Time for the head of one plain-HTTP request.
pub(crate) const WEB_HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// Octets and number of the headers of one plain-HTTP request.
pub(crate) const WEB_HEADER_BYTES_MAX: usize = 16 * 1024;
pub(crate) const WEB_HEADERS_MAX: usize = 64;
/// Connections that ask for figures at one time.
pub(crate) const METRICS_CONNECTIONS_MAX: usize = 16;

/// Signed OCSP responses that are kept, some 1.2 kB each.
pub(crate) const OCSP_CACHE_MAX: usize = 32_768;
/// OCSP responses being signed at one time: whoever floods with nonces gets one core at most.
pub(crate) const OCSP_SIGNERS_MAX: usize = 1;
/// Serials whose OCSP responses a node asks for at once.
pub(crate) const OCSP_SERIALS_MAX: usize = 512;

/// Octets of a CSR in DER.
pub(crate) const CSR_BYTES_MAX: usize = 16 * 1024;
/// Names and addresses asked for in one certificate.
pub(crate) const NAMES_PER_CERTIFICATE_MAX: usize = 32;
/// Octets of a policy document.
pub(crate) const POLICY_BYTES_MAX: usize = 128 * 1024;
/// Tags given in one request.
pub(crate) const TAGS_PER_REQUEST_MAX: usize = 32;
/// Endpoints a node may report about itself.
pub(crate) const ENDPOINTS_PER_NODE_MAX: usize = 16;
/// Peers whose address a node may report in one message, and addresses kept of one node that peers reported.
pub(crate) const SIGHTINGS_PER_MESSAGE_MAX: usize = 256;
pub(crate) const SIGHTINGS_PER_NODE_MAX: usize = 2;
/// Findings a node may report in one acknowledgement, and octets of each.
pub(crate) const FINDINGS_PER_NODE_MAX: usize = 16;
pub(crate) const FINDING_BYTES_MAX: usize = 256;
/// CRLs a node may say it has.
pub(crate) const CRLS_PER_MESSAGE_MAX: usize = 4_096;
/// Octets of a version or backend text of a node.
pub(crate) const VERSION_BYTES_MAX: usize = 64;
/// Hexadecimal digits of an issuer's key id in a request: RFC 7093 methods make 20 octets.
pub(crate) const ISSUER_DIGITS_MAX: usize = 64;
/// Entries of the index looked at for one page of a listing.
pub(crate) const INDEX_SCAN_MAX: usize = 20_000;
/// How long after its end a certificate stays in listings where the journal is kept for ever, and how often those past
/// it are looked for.
pub(crate) const LISTING_RETENTION: Duration = Duration::from_secs(30 * 24 * 3600);
pub(crate) const PURGE_PERIOD: Duration = Duration::from_secs(3600);
/// Parts in which the history of one retention leaves, and the least time that one of them spans.
pub(crate) const SEGMENTS_PER_RETENTION: u32 = 8;
pub(crate) const SEGMENT_SPAN_MIN: Duration = Duration::from_secs(3600);
/// Entries in one page of a listing.
pub(crate) const PAGE_SIZE_MAX: usize = 1_000;

/// Uses of one token.
pub(crate) const TOKEN_USES_MAX: u32 = 10_000;
/// Life of a token when none is asked for, and at most.
pub(crate) const TOKEN_TTL: Duration = Duration::from_secs(3600);
pub(crate) const TOKEN_TTL_MAX: Duration = Duration::from_secs(30 * 24 * 3600);
/// Shortest certificate that may be asked for.
pub(crate) const CERTIFICATE_TTL_MIN: Duration = Duration::from_secs(60);
/// Wrong secrets from one source address within [`WRONG_SECRET_WINDOW`].
pub(crate) const WRONG_SECRETS_MAX: u32 = 20;
pub(crate) const WRONG_SECRET_WINDOW: Duration = Duration::from_secs(60);
/// Source addresses remembered for wrong secrets.
pub(crate) const WRONG_SECRET_SOURCES_MAX: usize = 10_000;

/// Commands waiting for the writer.
pub(crate) const WRITER_QUEUE_MAX: usize = 1_024;
/// Commands in one frame.
pub(crate) const FRAME_COMMANDS_MAX: usize = 256;
/// How long the writer gathers more commands while others are being prepared, at most.
pub(crate) const GATHER_TIME: Duration = Duration::from_millis(6);
/// Rounds of resolving a conflicting or unknown append before a command is given up.
pub(crate) const APPEND_ROUNDS_MAX: u32 = 8;
/// Certificates in preparation, and look-ups on disk, at one time.
pub(crate) const PREPARATIONS_MAX: usize = 256;
/// Records between two snapshots of World, at least; and how many times as long as the last one took the next one waits,
/// so that the snapshots of a large World never cost more than this part of the processor.
pub(crate) const SNAPSHOT_EVERY_RECORDS: u64 = 4_096;
pub(crate) const SNAPSHOT_REST: u32 = 63;
/// How long what follows the journal waits after a change for more of them: the index, the age of CRLs, and the
/// connections of identities that ended.
pub(crate) const FOLLOW_PAUSE: Duration = Duration::from_millis(100);
/// Records that the index takes up in one turn, and how many times as long as a turn took it rests: a fifteenth of
/// the processor, and a hundredth while records come faster than that.
pub(crate) const INDEX_TURN_RECORDS: usize = 256;
pub(crate) const INDEX_REST: u32 = 14;
pub(crate) const INDEX_REST_BUSY: u32 = 99;
/// It rests no longer than this, also after a turn that had to wait for somebody who was listing.
pub(crate) const INDEX_PAUSE_MAX: Duration = Duration::from_secs(10);
/// Records that what follows the journal finds in memory.
pub(crate) const RECENT_RECORDS_MAX: usize = 4_096;

/// Changes within this window travel as one message after the first.
pub(crate) const COALESCE_WINDOW: Duration = Duration::from_millis(100);
/// Messages of one node's stream that are taken within a second; the rest waits its turn.
pub(crate) const STREAM_REQUESTS_PER_SECOND_MAX: u32 = 50;
/// How long a new stream may take to say hello.
pub(crate) const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// Messages of one stream that wait for a slow reader; then it collapses to one from its cursor.
pub(crate) const STREAM_QUEUE_MAX: usize = 2;
/// Life of an endpoint that a node reported, unless it reports again or stays connected.
pub(crate) const ENDPOINT_TTL: Duration = Duration::from_secs(10 * 60);
/// Streams in a row that took the place of a live one, within [`TAKEOVER_WINDOW`] of each other, from which
/// on one key is in two places: a node that comes back before its dead stream is noticed does so once.
pub(crate) const TAKEOVERS_SUSPICIOUS: u32 = 2;
pub(crate) const TAKEOVER_WINDOW: Duration = Duration::from_secs(10 * 60);
/// Longest wait for receipts.
pub(crate) const RECEIPTS_WAIT_MAX: Duration = Duration::from_secs(300);

/// Age at which a CRL of an issuing CA is signed anew. It lives seven days.
pub(crate) const CRL_RESIGN_AFTER: Duration = Duration::from_secs(12 * 3600);
/// Shortest passphrase, octets, of a key or a backup that leaves this machine.
pub(crate) const LONE_PASSPHRASE_BYTES_MIN: usize = 8;
/// Remaining life at which the root's CRL is signed anew. It lives a year.
pub(crate) const ROOT_CRL_RESIGN_BEFORE: Duration = Duration::from_secs(180 * 24 * 3600);

/// STUN answers to one source address (IPv6: one /64): at once, and per second after that.
pub(crate) const STUN_BURST: u64 = 50;
pub(crate) const STUN_PER_SECOND: u64 = 20;
/// Source addresses remembered for that.
pub(crate) const STUN_SOURCES_MAX: usize = 20_000;
/// Datagrams that wait for a node which reads its relay stream too slowly; further ones are lost.
pub(crate) const RELAY_QUEUE_MAX: usize = 256;
/// Octets that may be relayed at once for one node, whatever the rate: a full TCP window.
pub(crate) const RELAY_BURST_BYTES_MIN: u64 = 256 * 1024;
/// Largest relay frame that goes by UDP, octets: an Ethernet frame without IPv4 and UDP headers. Larger ones
/// take the stream: fragments get lost behind too many firewalls.
pub(crate) const RELAY_UDP_PAYLOAD_MAX: usize = 1472;
/// How long after a node's last frame frames to it go by UDP. It sends keepalives every 20 s.
pub(crate) const RELAY_UDP_TTL: Duration = Duration::from_secs(65);
/// Peers of one relay session whose permission is remembered until World changes.
pub(crate) const RELAY_VISIBLE_MAX: usize = 4_096;
