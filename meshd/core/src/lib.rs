//! What a mesh is: its nodes, names, certificates, operators and policy, and what may change them.
//!
//! Pure: no I/O, clock, environment or global randomness; time and seeds arrive as arguments.
//! [`World`] is the fold of the journal: `decide` says what a command would do,
//! `apply` does it. This crate sees serials, key hashes and DER as opaque bytes.
#![forbid(unsafe_code)]

mod bytes;

pub mod limits;

pub mod ids;
pub mod names;
pub mod time;

pub mod authority;
pub mod certificate;
pub mod change;
pub mod command;
pub mod refusal;

pub mod addresses;
pub mod auth;
pub mod policy;
pub mod profile;
pub mod view;
pub mod world;

pub mod endpoints;
pub mod peer_table;
pub mod rate;
pub mod relay;
pub mod rotation;
pub mod stun;

pub use authority::{Authority, Bundle, Cross, Phase, Rotation, RotationKind, Standing, Waiting};
pub use certificate::{CaRecord, CertificateRecord, Owner, Reason, Revocation};
pub use change::{Change, Record};
pub use command::{Actor, Command, CommandKind, Denial, Made, Request, Role, Which};
pub use ids::{KeyHash, KeyId, NodeId, OperationId, Serial, TokenId, WgKey};
pub use names::{DnsName, NameError, NodeName, OperatorName, PairName, ProfileName, Tag};
pub use policy::Policy;
pub use refusal::Refusal;
pub use time::UtcTime;
pub use view::{Delta, Own, PeerView, View};
pub use world::{Decision, World};
