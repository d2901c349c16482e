//! What the services are made of: built once, shared by all.

use std::sync::Arc;
use std::time::Duration;

use mesh_ca::ClientVerifier;
use mesh_proto::v1 as pb;
use mesh_runtime::SharedClock;

use crate::archive::Archive;
use crate::certify::Certifier;
use crate::config::Unlock;
use crate::denials::Denials;
use crate::directory::Directory;
use crate::enroll::Enroller;
use crate::history::History;
use crate::issuer::Issuing;
use crate::ocsp::Ocsp;
use crate::presence::Presence;
use crate::publish::Publisher;
use crate::relay::RelayHub;
use crate::renew::Renewer;
use crate::revoke::Revoker;
use crate::state::StateDir;
use crate::sync::SyncHub;
use crate::token::{TokenFacts, TokenPlace, TokenSecrets};
use crate::writer::Writer;

#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) directory: Arc<Directory>,
    pub(crate) writer: Writer,
    pub(crate) issuing: Issuing,
    /// Judges client certificates; a change of roots reaches it here.
    pub(crate) clients: Arc<ClientVerifier>,
    /// Held by whoever changes authorities.
    pub(crate) successions: tokio::sync::Mutex<()>,
    pub(crate) archive: Archive,
    pub(crate) history: History,
    pub(crate) presence: Arc<Presence>,
    pub(crate) publisher: Arc<Publisher>,
    pub(crate) ocsp: Arc<Ocsp>,
    pub(crate) denials: Denials,
    pub(crate) clock: SharedClock,

    pub(crate) enroller: Enroller,
    pub(crate) renewer: Renewer,
    pub(crate) certifier: Certifier,
    pub(crate) revoker: Revoker,
    pub(crate) sync: SyncHub,
    /// None if it is switched off.
    pub(crate) relay: Option<RelayHub>,

    /// What every new token says, besides the root that it pins.
    pub(crate) token_place: TokenPlace,
    pub(crate) token_secrets: TokenSecrets,
    pub(crate) controller_name: String,
    /// The state directory.
    pub(crate) state_dir: std::path::PathBuf,
    pub(crate) unlock: Unlock,
    pub(crate) state: StateDir,
    /// How long after its end a certificate is remembered.
    pub(crate) retention: Option<Duration>,
}

impl Parts {
    /// What a token that is made now says: it pins the root of whoever issues now.
    pub(crate) fn token_facts(&self) -> TokenFacts {
        let TokenPlace { controllers, trust_domain } = self.token_place.clone();
        let root_spki_sha256 = self.issuing.authority().root_spki_sha256();
        TokenFacts { controllers, root_spki_sha256, trust_domain, kind: pb::join_token::Kind::Node }
    }
}
