//! One authority after another: new keys and certificates, the steps of a rotation, the root taken offline.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use mesh_ca::{
    CEREMONY_BYTES_MAX, CaNaming, Issuer, IssuerRequest, KeyPurpose, KeyStore as _, Pointers, RevokedEntry,
    SignedIssuer, TrustAnchors, Usage, verify_chain,
};
use mesh_core::{
    Actor, CaRecord, Change, Command, Cross, Decision, KeyId, NodeId, OperationId, Request, Serial, World,
};
use mesh_proto::v1 as pb;
use mesh_runtime::ShutdownToken;
use rustls_pki_types::CertificateDer;
use sha2::{Digest as _, Sha256};
use time::UtcDateTime;

use crate::auth::Caller;
use crate::authority::{
    Authority, CaFacts, KeyProblem, NewKey, Signer, core_key_id, crl_entry, random_fill, unlock_with,
};
use crate::config::Passphrase;
use crate::hardware::{Hsm, TOKEN_FILE_SUFFIX, write_token_file};
use crate::parts::Parts;
use crate::publish::Publisher;
use crate::state::{read_file, replace_file};
use crate::status::Problem;
use crate::tls::every_root;

/// How often acknowledgements and conditions are looked at when nothing else happens, and the pause after each look.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);
const LOOK_PAUSE: Duration = Duration::from_millis(50);
/// The key of an authority that the offline root has not signed yet, and its request.
const PENDING_KEY: &str = "pending-issuing";
const PENDING_REQUEST: &str = "pending-issuing.request";
/// Shortest passphrase of an exported root: it is all that protects it.
const EXPORT_PASSPHRASE_BYTES_MIN: usize = 8;

/// Authorities that are ready to be announced.
struct Prepared {
    issuing: Signer,
    root: Option<Signer>,
    crosses: Vec<Cross>,
}

impl Prepared {
    fn command(&self, auto: bool) -> Command {
        let record = |signer: &Signer, is_root| CaRecord {
            key_id: core_key_id(&signer.issuer),
            der: signer.issuer.certificate_der().to_vec(),
            is_root,
            sealed: false,
        };
        Command::StartRotation {
            issuing: record(&self.issuing, false),
            root: self.root.as_ref().map(|root| record(root, true)),
            crosses: self.crosses.clone(),
            auto,
        }
    }
}

impl From<KeyProblem> for Problem {
    fn from(problem: KeyProblem) -> Self {
        match &problem {
            KeyProblem::Write(error) if error.kind() == std::io::ErrorKind::StorageFull => Self::new(
                pb::ErrorCode::DiskFull,
                "no space left for a CA key",
                "free some space, then try again",
            ),
            _ => Self::internal_error("no new CA key", &problem),
        }
    }
}

impl From<mesh_ca::IssueError> for Problem {
    fn from(error: mesh_ca::IssueError) -> Self {
        match &error {
            mesh_ca::IssueError::KeyStore(source) => Self::key_store("make a CA certificate", source),
            _ => Self::internal_error("cannot make a CA certificate", &error),
        }
    }
}

/// New keys, sealed and written, and certificates by the keys that are here. Blocks.
fn prepare(
    authority: &Authority,
    active_root: &mesh_core::Authority,
    fleet: &str,
    publisher: &Publisher,
    (with_root, now): (bool, UtcDateTime),
) -> Result<Prepared, Problem> {
    let old =
        authority.signer(&active_root.key_id).ok_or_else(|| Problem::root_sealed("sign a new authority"))?;
    let naming = CaNaming { mesh: fleet, now };
    let new_root = match with_root {
        false => None,
        true => {
            let key = draw(authority, "new-root", KeyPurpose::Root)?;
            let made = mesh_ca::create_root(&key.store, &key.id, naming, &mut random_fill)?;
            Some(keep(authority, key, &made.der, KeyPurpose::Root)?)
        }
    };
    let crosses = match &new_root {
        None => Vec::new(),
        Some(new) => {
            let cross = |signer: &Signer, root: &Signer| -> Result<Cross, Problem> {
                let der = root.issuer.certificate_der();
                let made =
                    mesh_ca::vouch_for_root(&signer.issuer, &*signer.store, der, now, &mut random_fill)?;
                let (root, by) = (core_key_id(&root.issuer), core_key_id(&signer.issuer));
                Ok(Cross { root, by, der: made.der })
            };
            vec![cross(&old, new)?, cross(new, &old)?]
        }
    };
    let root = new_root.as_ref().unwrap_or(&old);
    if let Some(token) = authority.token() {
        let pointers = publisher.ca_pointers(root.issuer.certificate_der())?;
        let issuing = draw_in_token(authority, token, root, (naming, &pointers))?;
        return Ok(Prepared { issuing, root: new_root, crosses });
    }
    let key = draw(authority, "new-issuing", KeyPurpose::Issuing)?;
    let public = key.store.public_key(&key.id).map_err(mesh_ca::IssueError::KeyStore)?;
    let pointers = publisher.ca_pointers(root.issuer.certificate_der())?;
    let made = mesh_ca::create_issuing_ca_for(
        &root.issuer,
        &*root.store,
        &public,
        naming,
        &pointers,
        &mut random_fill,
    )?;
    let issuing = keep(authority, key, &made.der, KeyPurpose::Issuing)?;
    Ok(Prepared { issuing, root: new_root, crosses })
}

fn draw(authority: &Authority, name: &str, purpose: KeyPurpose) -> Result<NewKey, Problem> {
    let id = mesh_ca::KeyId::parse(name).map_err(|error| Problem::internal_error("bad key name", &error))?;
    Ok(NewKey::draw(id, purpose, authority.passphrase())?)
}

/// An issuing CA below `root` whose key is drawn in the token and never leaves it.
fn draw_in_token(
    authority: &Authority,
    token: &Hsm,
    root: &Signer,
    (naming, pointers): (CaNaming<'_>, &mesh_ca::Pointers),
) -> Result<Signer, Problem> {
    let label = Hsm::fresh_label();
    let store = token.generate(&label).map_err(|error| {
        Problem::new(
            pb::ErrorCode::TokenUnavailable,
            format!("no key was drawn in the hardware token: {}", mesh_runtime::chain(&error)),
            "put the token back and try again; nothing was changed",
        )
    })?;
    let made = || -> Result<Issuer, Problem> {
        let public = store.public_key(&label).map_err(mesh_ca::IssueError::KeyStore)?;
        let made = mesh_ca::create_issuing_ca_for(
            &root.issuer,
            &*root.store,
            &public,
            naming,
            pointers,
            &mut random_fill,
        )?;
        let issuer = Issuer::new(&made.der, label.clone(), authority.domain().clone(), &store)?;
        let name = crate::authority::key_name(false, &core_key_id(&issuer));
        let path = authority.keys().join(format!("{name}.{TOKEN_FILE_SUFFIX}"));
        write_token_file(&path, &label).map_err(KeyProblem::Write)?;
        Ok(issuer)
    };
    match made() {
        Ok(issuer) => Ok(Signer { issuer, store: Box::new(store) }),
        Err(problem) => {
            token.destroy(&label);
            Err(problem)
        }
    }
}

/// Writes a key under its own name, which only its certificate gives it, and binds both.
fn keep(authority: &Authority, key: NewKey, der: &[u8], purpose: KeyPurpose) -> Result<Signer, Problem> {
    let identifier =
        mesh_ca::ca_key_identifier(der).ok_or_else(|| Problem::internal("a new CA has no identifier"))?;
    let id = crate::authority::key_name(purpose == KeyPurpose::Root, &KeyId(identifier.as_bytes().to_vec()));
    let key = key.renamed(id, purpose, authority.passphrase())?;
    key.write(authority.keys())?;
    let issuer = Issuer::new(der, key.id.clone(), authority.domain().clone(), &key.store)?;
    Ok(Signer { issuer, store: Box::new(key.store) })
}

impl Parts {
    /// Follows what nodes acknowledge, and takes steps by itself where the one who started it said so.
    pub(crate) async fn keep_rotation(self: Arc<Self>, shutdown: ShutdownToken) {
        let (mut head, mut acks) = (self.directory.watch(), self.presence.watch_acks());
        loop {
            self.follow_authorities().await;
            if let Err(problem) = self.note_acknowledgements().await {
                tracing::warn!(why = problem.why, "acknowledgements were not written down");
            }
            if let Err(problem) = self.advance_by_itself().await {
                tracing::debug!(why = problem.why, "the rotation waits");
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(LOOK_INTERVAL) => {}
                changed = head.changed() => if changed.is_err() { return },
                changed = acks.changed() => if changed.is_err() { return },
            }
            tokio::time::sleep(LOOK_PAUSE).await;
        }
    }

    /// Keys in memory, OCSP delegates and roots for client certificates as World has them.
    async fn follow_authorities(&self) {
        let Some(known) = self.issuing.authority().news(&self.directory) else { return };
        if let Err(error) = self.anchors.replace(self.directory.read(every_root)) {
            tracing::error!(%error, "a root of ours cannot be used");
        }
        let authority = Arc::clone(self.issuing.authority());
        let discarded = self.issuing.on_pool(move || {
            authority.discard_ended(&known);
            Ok::<(), Problem>(())
        });
        if let Err(problem) = discarded.await {
            tracing::warn!(why = problem.why, "keys of CAs that have ended stay");
        }
        // Before its first leaf: whoever asks for that one is answered.
        if let Err(problem) = self.ocsp.refresh().await {
            tracing::warn!(why = problem.why, "no OCSP delegate of a new CA yet");
        }
    }

    async fn note_acknowledgements(&self) -> Result<(), Problem> {
        let (version, behind) = self.directory.read(|world| {
            let version = world.bundle_version();
            let behind = world.nodes().filter(|node| node.bundle < version);
            let current = |node: &mesh_core::world::Node| Some((node.id, node.current.as_ref()?.serial));
            (version, behind.filter_map(current).collect::<Vec<_>>())
        });
        // Under its current identity: then the one before is not shown any more.
        let says = |(id, serial): &(NodeId, Serial)| {
            let presence = self.presence.of(*id);
            presence.trust == version && presence.serial == Some(*serial)
        };
        let nodes: BTreeSet<NodeId> = behind.into_iter().filter(says).map(|(id, _)| id).collect();
        if !nodes.is_empty() {
            self.writer.submit_own(Command::AcknowledgeBundle { version, nodes }).await?;
        }
        Ok(())
    }

    async fn advance_by_itself(&self) -> Result<(), Problem> {
        let at = self.utc();
        let ready = self.directory.read(|world| {
            let rotation = world.rotation().filter(|rotation| rotation.auto)?;
            world.rotation_waits_for(at)?.is_over().then_some(rotation.version)
        });
        let Some(version) = ready else { return Ok(()) };
        let operation = OperationId(mesh_runtime::random_bytes());
        self.step_rotation(Actor::Controller, operation, Command::AdvanceRotation { version }).await
    }

    pub(crate) async fn start_rotation(
        &self,
        caller: &Caller,
        request: pb::StartRotationRequest,
    ) -> Result<pb::RotationInfo, Problem> {
        let operation = super::service::operation(&request.operation_id)?;
        let actor = super::service::actor(caller)?;
        let _one = self.successions.lock().await;
        if self.directory.read(|world| world.operation(&operation).is_some()) {
            return self.rotation_info(false);
        }
        // Before a key is drawn: a refusal leaves nothing behind.
        let (at, kind) = (self.utc(), mesh_core::CommandKind::StartRotation);
        let (fleet, active_root) = self.directory.read(|world| {
            world.check_actor(at, &actor, kind)?;
            if let Some(rotation) = world.rotation() {
                return Err(mesh_core::Refusal::RotationRunning { to: rotation.to.clone() });
            }
            let root = world.active_root().cloned().ok_or(mesh_core::Refusal::MeshMissing)?;
            Ok((world.fleet().unwrap_or_default().to_owned(), root))
        })?;
        let (authority, now) = (Arc::clone(self.issuing.authority()), self.clock.utc_now());
        let prepared = match (request.signed.is_empty(), request.root) {
            (false, true) => {
                return Err(Problem::usage(
                    "a request for the offline root is for an issuing CA, not for a root",
                ));
            }
            (false, false) => self.take_response(request.signed, &active_root).await?,
            (true, with_root) => {
                let publisher = Arc::clone(&self.publisher);
                let work = move || prepare(&authority, &active_root, &fleet, &publisher, (with_root, now));
                self.issuing.on_pool(work).await?
            }
        };
        let command = prepared.command(request.auto);
        let ids: Vec<KeyId> =
            prepared.root.iter().chain([&prepared.issuing]).map(|s| core_key_id(&s.issuer)).collect();
        let authority = self.issuing.authority();
        prepared.root.into_iter().chain([prepared.issuing]).for_each(|signer| authority.add(signer));
        // Commit point.
        let committed = self.writer.submit(Request { actor, operation, command }).await;
        if let Err(error) = committed {
            for key_id in &ids {
                if let Err(error) = authority.forget_drawn(key_id) {
                    tracing::warn!(%error, "a key that is of no use stays on disk");
                }
            }
            return Err(error.into());
        }
        self.follow_authorities().await;
        self.forget_pending();
        tracing::info!(to = ?ids, "rotation started");
        self.rotation_info(true)
    }

    /// Checks with real verifiers what `decide` checks on records, then takes the step.
    pub(crate) async fn step_rotation(
        &self,
        actor: Actor,
        operation: OperationId,
        command: Command,
    ) -> Result<(), Problem> {
        let request = Request { actor, operation, command };
        let at = self.utc();
        let check = self.directory.read(|world| Check::of(world, at, &request))?;
        if let Some(check) = check {
            let (archive, now) = (self.archive.clone(), self.clock.utc_now());
            let domain = self.issuing.authority().domain().clone();
            let leaves = check.leaves.clone();
            let ders = move || {
                leaves
                    .into_iter()
                    .filter_map(|(seq, serial)| archive.certificate(seq, &serial).transpose())
                    .map(|found| found.map(|leaf| (leaf.serial, leaf.der)))
                    .collect::<Result<Vec<_>, Problem>>()
            };
            let ders = self.issuing.on_pool(ders).await?;
            self.issuing.on_pool(move || check.verify(&domain, &ders, now)).await?;
        }
        // Commit point.
        let committed = self.writer.submit(request).await?;
        self.follow_authorities().await;
        tracing::info!(seq = committed.seq, changed = committed.changed(), "rotation has moved");
        Ok(())
    }

    pub(crate) fn rotation_info(&self, changed: bool) -> Result<pb::RotationInfo, Problem> {
        let at = self.utc();
        Ok(self.directory.read(|world| rotation_message(world, at, changed)))
    }

    /// The root's key under a passphrase of the caller's. Recorded first.
    pub(crate) async fn export_root(
        &self,
        caller: &Caller,
        request: pb::ExportRootRequest,
    ) -> Result<pb::ExportRootResponse, Problem> {
        let operation = super::service::operation(&request.operation_id)?;
        let actor = super::service::actor(caller)?;
        let passphrase = Passphrase::new(request.passphrase);
        if passphrase.as_bytes().len() < EXPORT_PASSPHRASE_BYTES_MIN {
            return Err(Problem::usage(format!(
                "the passphrase of an exported root has at least {EXPORT_PASSPHRASE_BYTES_MIN} characters"
            )));
        }
        let _one = self.successions.lock().await;
        let root = self.active_root()?;
        let command = Command::ExportRoot { key_id: root.key_id.clone() };
        // Commit point: whoever has the file stands in the journal.
        self.writer.submit(Request { actor, operation, command }).await?;
        self.publisher.sign_anew(&root.key_id).await?;
        let authority = Arc::clone(self.issuing.authority());
        let known = root.clone();
        let (sealed_key, key_id) =
            self.issuing.on_pool(move || authority.export(&known, &passphrase)).await?;
        let facts = CaFacts::read(&root.der).ok_or_else(|| Problem::internal("the root cannot be read"))?;
        Ok(pb::ExportRootResponse {
            sealed_key,
            root: root.der.into(),
            key_id,
            spki_sha256: facts.spki_sha256.to_vec().into(),
            fleet: self.directory.read(|world| world.fleet().unwrap_or_default().to_owned()),
            trust_domain: self.issuing.authority().domain().to_string(),
        })
    }

    /// Takes the root's key away, for good.
    pub(crate) async fn seal_root(
        &self,
        caller: &Caller,
        request: pb::SealRequest,
    ) -> Result<pb::ActionResponse, Problem> {
        let operation = super::service::operation(&request.operation_id)?;
        let actor = super::service::actor(caller)?;
        let _one = self.successions.lock().await;
        let root = self.active_root()?;
        let facts = CaFacts::read(&root.der).ok_or_else(|| Problem::internal("the root cannot be read"))?;
        if facts.spki_sha256 != *request.root_spki_sha256 {
            return Err(Problem::ceremony(
                "the exported file is of another root than the one that signs here",
            ));
        }
        let command = Command::SealRoot { key_id: root.key_id.clone() };
        // Commit point: from here on the key is not used; a crash before it is removed ends at the next start.
        let committed = self.writer.submit(Request { actor, operation, command }).await?;
        let authority = Arc::clone(self.issuing.authority());
        let known = root.clone();
        let removed = self.issuing.on_pool(move || {
            authority
                .forget(&known)
                .map_err(|error| Problem::internal_error("the root's key file stays", &error))
        });
        removed.await?;
        let detail = match committed.changed() {
            true => format!("root {} is offline", hex::encode(facts.spki_sha256)),
            false => "the root is offline already".to_owned(),
        };
        Ok(pb::ActionResponse { changed: committed.changed(), detail, incomplete: false })
    }

    /// The request for the offline root: made once, and handed out again until it is answered.
    pub(crate) async fn request_issuer(&self, caller: &Caller) -> Result<pb::IssuerRequest, Problem> {
        let actor = super::service::actor(caller)?;
        let _one = self.successions.lock().await;
        let at = self.utc();
        let (root, fleet, crl_number, revoked) = self.directory.read(|world| {
            world.check_actor(at, &actor, mesh_core::CommandKind::StartRotation)?;
            if let Some(rotation) = world.rotation() {
                return Err(mesh_core::Refusal::RotationRunning { to: rotation.to.clone() });
            }
            let root = world.active_root().cloned().ok_or(mesh_core::Refusal::MeshMissing)?;
            let number = self.publisher.number_after(world.last_crl_number(&root.key_id, 0));
            let revoked = world.revoked_entries(&root.key_id, 0);
            Ok((root, world.fleet().unwrap_or_default().to_owned(), number, revoked))
        })?;
        let facts = CaFacts::read(&root.der).ok_or_else(|| Problem::internal("the root cannot be read"))?;
        let draft = Draft {
            root_key_hash: facts.spki_sha256,
            mesh: fleet,
            pointers: self.publisher.ca_pointers(&root.der)?,
            requested_at: self.clock.utc_now(),
            crl_number,
            revoked: revoked.into_iter().filter_map(|(serial, at, why)| crl_entry(serial, at, why)).collect(),
        };
        let authority = Arc::clone(self.issuing.authority());
        let (pem, key_hash) = self.issuing.on_pool(move || pending_request(&authority, draft)).await?;
        Ok(pb::IssuerRequest {
            pem,
            root_spki_sha256: facts.spki_sha256.to_vec().into(),
            key_sha256: key_hash.to_vec().into(),
        })
    }

    /// The offline root's answer: certificate and CRL, each checked before anything is believed.
    async fn take_response(&self, answer: String, root: &mesh_core::Authority) -> Result<Prepared, Problem> {
        let authority = Arc::clone(self.issuing.authority());
        let known = root.clone();
        let (issuing, der) = self.issuing.on_pool(move || bind_pending(&authority, &answer, &known)).await?;
        let crl = mesh_ca::Crl::parse_verified(&der, &root.der)
            .map_err(|error| Problem::ceremony(format!("the root's CRL is not believed: {error}")))?;
        let digest: [u8; 32] = Sha256::digest(&der).into();
        let (last, taken) = self.directory.read(|world| {
            let last = world.crl(&root.key_id, 0);
            (last.map_or(0, |last| last.number), last.is_some_and(|last| last.digest == digest))
        });
        let next = self.publisher.number_after(last);
        if !taken && crl.number() != next {
            return Err(Problem::ceremony(format!(
                "the root's CRL has number {}, {next} is the next: make a new request",
                crl.number()
            )));
        }
        if !taken {
            self.publisher.take_foreign(&root.key_id, &crl, der.into()).await?;
        }
        Ok(Prepared { issuing, root: None, crosses: Vec::new() })
    }

    /// Publishes the next CRL of a root whose key is elsewhere.
    pub(crate) async fn import_crl(
        &self,
        caller: &Caller,
        request: pb::ImportCrlRequest,
    ) -> Result<pb::ActionResponse, Problem> {
        let actor = super::service::actor(caller)?;
        let _one = self.successions.lock().await;
        let at = self.utc();
        let der = request.crl;
        let digest: [u8; 32] = Sha256::digest(&der).into();
        let (root, issuing, last) = self.directory.read(|world| {
            world.check_actor(at, &actor, mesh_core::CommandKind::SealRoot)?;
            let root = world.active_root().cloned().ok_or(mesh_core::Refusal::MeshMissing)?;
            let issuing = world.active_issuer().cloned().ok_or(mesh_core::Refusal::MeshMissing)?;
            let last = world.crl(&root.key_id, 0).map(|last| (last.number, last.digest));
            Ok::<_, Problem>((root, issuing, last))
        })?;
        let refused = |why: String| {
            Problem::new(
                pb::ErrorCode::ImportRefused,
                format!("the CRL is not taken: {why}"),
                "let the root sign its next CRL (`openssl ca -gencrl`) and give that; the one before stays",
            )
        };
        if last.is_some_and(|(_, known)| known == digest) {
            let detail = "this CRL is published already".to_owned();
            return Ok(pb::ActionResponse { changed: false, detail, incomplete: false });
        }
        if !root.sealed {
            return Err(refused(
                "the root's key is here, and the controller signs the root's CRLs".to_owned(),
            ));
        }
        let crl =
            mesh_ca::Crl::parse_verified(&der, &root.der).map_err(|error| refused(error.to_string()))?;
        if let Some((last, _)) = last.filter(|(last, _)| crl.number() <= *last) {
            return Err(refused(format!("it has number {}, and number {last} is published", crl.number())));
        }
        if mesh_core::UtcTime::from(crl.next_update()) <= at {
            return Err(refused(format!("it ended at {}", crl.next_update())));
        }
        if CaFacts::read(&issuing.der).is_some_and(|facts| crl.contains_raw(&facts.serial)) {
            return Err(refused(
                "it lists the issuing CA, and nothing below that would be accepted".to_owned(),
            ));
        }
        let detail = format!("CRL #{} of the root, good until {}", crl.number(), crl.next_update());
        self.publisher.take_foreign(&root.key_id, &crl, der).await?;
        Ok(pb::ActionResponse { changed: true, detail, incomplete: false })
    }

    /// The request has been answered.
    fn forget_pending(&self) {
        let keys = self.issuing.authority().keys();
        for name in [format!("{PENDING_KEY}.key"), PENDING_REQUEST.to_owned()] {
            match std::fs::remove_file(keys.join(&name)) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    tracing::warn!(%error, name, "an answered request stays on disk");
                }
                _ => {}
            }
        }
    }

    fn active_root(&self) -> Result<mesh_core::Authority, Problem> {
        self.directory
            .read(|world| world.active_root().cloned())
            .ok_or_else(|| mesh_core::Refusal::MeshMissing.into())
    }
}

/// A request but for its key.
struct Draft {
    root_key_hash: [u8; 32],
    mesh: String,
    pointers: Pointers,
    requested_at: UtcDateTime,
    crl_number: u64,
    revoked: Vec<RevokedEntry>,
}

impl Draft {
    /// Whether `request` asks for the same.
    fn is_in(&self, request: &IssuerRequest) -> bool {
        (self.root_key_hash, self.crl_number) == (request.root_key_hash, request.crl_number)
            && (&self.mesh, &self.pointers, &self.revoked)
                == (&request.mesh, &request.pointers, &request.revoked)
    }
}

/// The request that waits, PEM, and the digest of its key; made if there is none or it asks for something else than
/// `draft`. Blocks.
fn pending_request(authority: &Authority, draft: Draft) -> Result<(String, [u8; 32]), Problem> {
    if authority.token().is_some() {
        // Its key would wait in a file.
        return Err(Problem::new(
            pb::ErrorCode::TokenUnavailable,
            "keys of this mesh are drawn in a hardware token, and a request for an offline root is not made there",
            "rotate before the root is sealed, or take key_store out of the configuration for this rotation",
        ));
    }
    let key_file = authority.keys().join(format!("{PENDING_KEY}.key"));
    if key_file.exists()
        && let Ok((pem, request)) = stored_request(authority)
        && draft.is_in(&request)
    {
        return Ok((pem, request.public_key.key_hash()));
    }
    let key = match key_file.exists() {
        true => NewKey::open(authority, PENDING_KEY, KeyPurpose::Issuing)?,
        false => draw(authority, PENDING_KEY, KeyPurpose::Issuing)?,
    };
    let failed = "cannot make a request";
    let public_key =
        key.store.public_key(&key.id).map_err(|error| Problem::internal_error(failed, &error))?;
    let Draft { root_key_hash, mesh, pointers, requested_at, crl_number, revoked } = draft;
    let request =
        IssuerRequest { root_key_hash, mesh, public_key, pointers, requested_at, crl_number, revoked };
    let pem = request.to_pem(&key.store, &key.id).map_err(|error| Problem::internal_error(failed, &error))?;
    // The key first: a request without its key would be signed for nothing.
    key.write(authority.keys())?;
    replace_file(&authority.keys().join(PENDING_REQUEST), pem.as_bytes())
        .map_err(|error| Problem::internal_error("cannot write the request", &error))?;
    Ok((pem, request.public_key.key_hash()))
}

fn stored_request(authority: &Authority) -> Result<(String, IssuerRequest), Problem> {
    let none = || Problem::ceremony("no request is waiting for an answer");
    let text =
        read_file(&authority.keys().join(PENDING_REQUEST), CEREMONY_BYTES_MAX as u64).map_err(|_| none())?;
    let request = IssuerRequest::parse_verified(&text)
        .map_err(|error| Problem::ceremony(format!("the request that waits is damaged: {error}")))?;
    Ok((String::from_utf8(text).map_err(|_| none())?, request))
}

/// The pending key with the certificate that the offline root made for it, under its lasting name, and the root's CRL.
/// Blocks.
fn bind_pending(
    authority: &Authority,
    answer: &str,
    root: &mesh_core::Authority,
) -> Result<(Signer, Vec<u8>), Problem> {
    let (_, request) = stored_request(authority)?;
    let signed = SignedIssuer::parse_verified(answer.as_bytes(), &request, &root.der).map_err(|error| {
        Problem::ceremony(format!("the answer is not believed: {}", mesh_runtime::chain(&error)))
    })?;
    let key = NewKey::open(authority, PENDING_KEY, KeyPurpose::Issuing)?;
    let signer = keep(authority, key, &signed.certificate.der, KeyPurpose::Issuing)?;
    Ok((signer, signed.root_crl))
}

/// Roots and issuing CAs of a bundle, DER.
type Trusted = (Vec<Vec<u8>>, Vec<Vec<u8>>);

/// What a step must not break, copied out of World: real certificates, real bundles.
struct Check {
    /// Of leaves in use.
    leaves: Vec<(u64, Serial)>,
    /// Each bundle in use, and the one to come.
    bundles: Vec<Trusted>,
}

impl Check {
    /// `None` if the step would change nothing.
    fn of(world: &World, at: mesh_core::UtcTime, request: &Request) -> Result<Option<Self>, Problem> {
        let Decision::Changes(changes) = world.decide(at, request)? else { return Ok(None) };
        let next = changes.iter().find_map(|change| match change {
            Change::BundleIssued { bundle } => Some(bundle),
            _ => None,
        });
        let der = |key_id: &KeyId| world.authority(key_id).map(|known| known.der.clone());
        let ders = |bundle: &mesh_core::Bundle| {
            (bundle.roots.iter().filter_map(der).collect(), bundle.issuers.keys().filter_map(der).collect())
        };
        let bundles = world.bundles_in_use(at).chain(next).map(ders).collect();
        let leaves = world.leaves_in_use(at).map(|leaf| (leaf.issued_seq, leaf.serial)).collect();
        Ok(Some(Self { leaves, bundles }))
    }

    /// Blocks.
    fn verify(
        &self,
        domain: &mesh_ca::TrustDomain,
        leaves: &[(Serial, Vec<u8>)],
        now: UtcDateTime,
    ) -> Result<(), Problem> {
        for (roots, issuers) in &self.bundles {
            let anchors = TrustAnchors::new(domain.clone(), roots)
                .map_err(|error| Problem::internal_error("a bundle cannot be used", &error))?;
            let issuers: Vec<CertificateDer<'_>> =
                issuers.iter().map(|der| CertificateDer::from(der.as_slice())).collect();
            for (serial, der) in leaves {
                verify_chain(der, &issuers, &anchors, now, Usage::Any, None).map_err(|error| {
                    Problem::new(
                        pb::ErrorCode::RotationRefused,
                        format!("certificate {serial} would not verify after this step: {error}"),
                        "renew or revoke it, then try again; nothing was changed",
                    )
                })?;
            }
        }
        Ok(())
    }
}

/// Lines of one kind that are shown; the count says the rest.
const SHOWN_MAX: usize = 50;

fn rotation_message(world: &World, at: mesh_core::UtcTime, changed: bool) -> pb::RotationInfo {
    let nodes = world.nodes().filter(|node| node.state == mesh_core::world::NodeState::Active).count() as u64;
    let version = world.bundle_version();
    let Some((rotation, waiting)) = world.rotation().zip(world.rotation_waits_for(at)) else {
        return pb::RotationInfo { version, nodes, changed, ..pb::RotationInfo::default() };
    };
    let subject = |key_id: &KeyId| {
        let facts = world.authority(key_id).and_then(|known| CaFacts::read(&known.der));
        facts.map_or_else(|| key_id.to_string(), |facts| facts.subject)
    };
    let names = |ids: &[NodeId]| -> Vec<String> {
        let named = ids.iter().filter_map(|id| world.node(*id)).map(|node| node.name.to_string());
        named.take(SHOWN_MAX).collect()
    };
    let mut leaves: BTreeMap<mesh_core::UtcTime, Vec<String>> = BTreeMap::new();
    for leaf in waiting.leaves.iter().filter_map(|serial| world.certificate(serial)) {
        let name = leaf.names.first().map_or_else(|| leaf.profile.clone(), ToString::to_string);
        leaves
            .entry(leaf.not_after)
            .or_default()
            .push(format!("{name} {} until {}", leaf.serial, leaf.not_after));
    }
    pb::RotationInfo {
        running: true,
        kind: rotation.kind.as_str().to_owned(),
        phase: rotation.phase.as_str().to_owned(),
        aborted: rotation.aborted,
        auto: rotation.auto,
        version: rotation.version,
        started_at: rotation.started_at.unix(),
        phase_at: rotation.phase_at.unix(),
        from: subject(&rotation.from),
        to: subject(&rotation.to),
        waits_until: leaves.last_key_value().map_or(0, |(until, _)| until.unix()),
        waits_for_nodes: names(&waiting.nodes),
        waits_for_certificates: leaves.into_values().flatten().take(SHOWN_MAX).collect(),
        away: names(&waiting.away),
        ready: waiting.is_over(),
        changed,
        nodes,
        ended: String::new(),
    }
}

impl Authority {
    /// A key that was drawn for nothing goes from memory and disk.
    fn forget_drawn(&self, key_id: &KeyId) -> std::io::Result<()> {
        let Some(signer) = self.signer(key_id) else { return Ok(()) };
        self.drop_signer(key_id);
        let name = crate::authority::key_name(false, key_id);
        let in_token = self.keys().join(format!("{name}.{TOKEN_FILE_SUFFIX}"));
        if let Some(token) = self.token().filter(|_| in_token.exists()) {
            token.destroy(signer.issuer.key_id());
            return std::fs::remove_file(in_token);
        }
        std::fs::remove_file(self.keys().join(format!("{}.key", signer.issuer.key_id())))
    }

    /// The root's key, sealed again under `passphrase`; and the name it has in that seal. Blocks.
    fn export(
        &self,
        root: &mesh_core::Authority,
        passphrase: &Passphrase,
    ) -> Result<(String, String), Problem> {
        let (id, pkcs8) = self.open_sealed(root)?;
        let cost = mesh_ca::KdfParams::default();
        let unlock = unlock_with(Some(passphrase));
        let text = mesh_ca::seal(&pkcs8, &id, KeyPurpose::Root, unlock, cost, &mut random_fill)
            .map_err(|error| Problem::internal_error("the root's key cannot be sealed again", &error))?;
        Ok((text.as_str().to_owned(), id.to_string()))
    }
}
