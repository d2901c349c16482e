//! One authority after another: new keys and certificates, the steps of a rotation.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use mesh_ca::{CaKeyType, CaNaming, Issuer, KeyPurpose, KeyStore as _, TrustAnchors, Usage, verify_chain};
use mesh_core::{
    Actor, CaRecord, Change, Command, Cross, Decision, KeyId, NodeId, OperationId, Request, Serial, World,
};
use mesh_pkcs11::TokenError;
use mesh_proto::v1 as pb;
use mesh_runtime::ShutdownToken;
use rustls_pki_types::CertificateDer;
use time::UtcDateTime;

use crate::auth::Caller;
use crate::authority::{
    Authority, CaFacts, KeyProblem, NewKey, Signer, core_key_id, key_algorithm, random_fill,
};
use crate::hardware::{Hsm, TOKEN_FILE_SUFFIX, write_token_file};
use crate::parts::Parts;
use crate::publish::Publisher;
use crate::status::Problem;
use crate::tls::every_root;
use crate::writer::{WriteError, Writer};

/// How often acknowledgements and conditions are looked at when nothing else happens, and the pause after each look.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);
const LOOK_PAUSE: Duration = Duration::from_millis(50);

/// Authorities that are ready to be announced.
pub(crate) struct Prepared {
    pub(crate) issuing: Signer,
    pub(crate) root: Option<Signer>,
    pub(crate) crosses: Vec<Cross>,
}

impl Prepared {
    /// Takes the keys into use and records the announcement. If that is refused, the keys were never drawn.
    pub(crate) async fn announce(
        self,
        authority: &Authority,
        writer: &Writer,
        (actor, operation, auto): (Actor, OperationId, bool),
    ) -> Result<Vec<KeyId>, WriteError> {
        let command = self.command(auto);
        let ids: Vec<KeyId> =
            self.root.iter().chain([&self.issuing]).map(|s| core_key_id(&s.issuer)).collect();
        self.root.into_iter().chain([self.issuing]).for_each(|signer| authority.add(signer));
        // Commit point.
        if let Err(error) = writer.submit(Request { actor, operation, command }).await {
            for key_id in &ids {
                if let Err(error) = authority.forget_drawn(key_id) {
                    tracing::warn!(%error, "a key that is of no use stays on disk");
                }
            }
            return Err(error);
        }
        Ok(ids)
    }

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

/// What new authorities are to be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
    /// A root, too.
    pub(crate) root: bool,
    /// Of every new key; without it each follows the one before it.
    pub(crate) key_type: Option<CaKeyType>,
    pub(crate) now: UtcDateTime,
}

/// New keys, sealed and written, and certificates by the keys that are here. Blocks.
pub(crate) fn prepare(
    authority: &Authority,
    active_root: &mesh_core::Authority,
    fleet: &str,
    publisher: &Publisher,
    wanted: Wanted,
) -> Result<Prepared, Problem> {
    let now = wanted.now;
    let old =
        authority.signer(&active_root.key_id).ok_or_else(|| Problem::root_sealed("sign a new authority"))?;
    let naming = CaNaming { mesh: fleet, now };
    let new_root = match wanted.root {
        false => None,
        true => {
            let key_type = wanted.key_type.unwrap_or(CaKeyType::after(key_algorithm(&active_root.der)));
            let key = draw(authority, "new-root", KeyPurpose::Root, key_type)?;
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
    let key_type = wanted.key_type.unwrap_or_else(|| authority.next_key_type());
    if let Some(token) = authority.token() {
        let pointers = publisher.ca_pointers(root.issuer.certificate_der())?;
        let issuing = draw_in_token(authority, (token, key_type), root, (naming, &pointers))?;
        return Ok(Prepared { issuing, root: new_root, crosses });
    }
    let key = draw(authority, "new-issuing", KeyPurpose::Issuing, key_type)?;
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

pub(crate) fn draw(
    authority: &Authority,
    name: &str,
    purpose: KeyPurpose,
    key_type: CaKeyType,
) -> Result<NewKey, Problem> {
    let id = mesh_ca::KeyId::parse(name).map_err(|error| Problem::internal_error("bad key name", &error))?;
    Ok(NewKey::draw(id, purpose, key_type, authority.passphrase())?)
}

/// The key type that a caller asks for; `None` if it leaves that to us.
pub(crate) fn asked_key_type(text: &str) -> Result<Option<CaKeyType>, Problem> {
    match text {
        "" => Ok(None),
        text => text
            .parse()
            .map(Some)
            .map_err(|_| Problem::usage("this is no key type of a new CA; those are p256, p384 and ed25519")),
    }
}

/// An issuing CA below `root` whose key is drawn in the token and never leaves it.
fn draw_in_token(
    authority: &Authority,
    (token, key_type): (&Hsm, CaKeyType),
    root: &Signer,
    (naming, pointers): (CaNaming<'_>, &mesh_ca::Pointers),
) -> Result<Signer, Problem> {
    let label = Hsm::fresh_label();
    let store = token.generate(&label, key_type).map_err(|error| {
        let next = match error {
            TokenError::Generate(_) | TokenError::Unsupported { .. } => {
                "choose another with --key-type; nothing was changed"
            }
            _ => "put the token back and try again; nothing was changed",
        };
        let why = format!("no key was drawn in the hardware token: {}", mesh_runtime::chain(&error));
        Problem::new(pb::ErrorCode::TokenUnavailable, why, next)
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
pub(crate) fn keep(
    authority: &Authority,
    key: NewKey,
    der: &[u8],
    purpose: KeyPurpose,
) -> Result<Signer, Problem> {
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
        let domain = self.issuing.authority().domain().clone();
        match TrustAnchors::new(domain, self.directory.read(every_root)) {
            Ok(anchors) => self.clients.replace_anchors(anchors),
            Err(error) => tracing::error!(%error, "a root of ours cannot be used"),
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
        let key_type = asked_key_type(&request.key_type)?;
        if key_type.is_some() && !request.signed.is_empty() {
            return Err(Problem::usage("the key of an answered request is drawn already"));
        }
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
            (true, root) => {
                let publisher = Arc::clone(&self.publisher);
                let wanted = Wanted { root, key_type, now };
                let work = move || prepare(&authority, &active_root, &fleet, &publisher, wanted);
                self.issuing.on_pool(work).await?
            }
        };
        let by = (actor, operation, request.auto);
        let ids = prepared.announce(self.issuing.authority(), &self.writer, by).await?;
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

    pub(crate) fn active_root(&self) -> Result<mesh_core::Authority, Problem> {
        self.directory
            .read(|world| world.active_root().cloned())
            .ok_or_else(|| mesh_core::Refusal::MeshMissing.into())
    }
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
}
