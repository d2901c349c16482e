//! `decide`: what a command would change, or why not. Reads, never writes.

mod certificates;
mod enrollment;
mod mesh;
mod nodes;
mod operators;
mod rotation;
mod tokens;

use super::{NameOwner, NodeState, Outcome, World};
use crate::auth::Caller;
use crate::certificate::{CertificateRecord, Owner, PROFILE_OCSP};
use crate::change::Change;
use crate::command::{Actor, Command, CommandKind, Request};
use crate::ids::{KeyHash, NodeId, WgKey};
use crate::limits::{CERTIFICATE_BYTES_MAX, SANS_MAX};
use crate::refusal::Refusal;
use crate::time::UtcTime;
use crate::world::Mesh;

/// What a command that was not refused means.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub enum Decision {
    /// To be recorded all together; never empty.
    Changes(Vec<Change>),
    /// The mesh is as the command wants it; answer from World, record nothing.
    AlreadyDone,
}

impl Decision {
    /// Without changes there is nothing to do.
    fn from_changes(changes: Vec<Change>) -> Self {
        if changes.is_empty() { Decision::AlreadyDone } else { Decision::Changes(changes) }
    }

    /// The changes; empty when there is nothing to do.
    pub fn changes(self) -> Vec<Change> {
        match self {
            Decision::Changes(changes) => changes,
            Decision::AlreadyDone => Vec::new(),
        }
    }
}

type Decided = Result<Decision, Refusal>;

impl World {
    /// What `request` would change at `at`. Everything that must hold at the moment of the change is
    /// checked here: who asks and whether he may, whether names, addresses, keys, serials and tokens are
    /// free. A repeated request is [`Decision::AlreadyDone`].
    ///
    /// # Errors
    /// One [`Refusal`]; nothing changes.
    pub fn decide(&self, at: UtcTime, request: &Request) -> Decided {
        let at = at.max(self.last_time());
        let Request { actor, command, .. } = request;
        if let Command::CreateMesh { .. } = command {
            self.check_may(actor, command.kind())?;
            return self.decide_create_mesh(command);
        }
        let mesh = self.mesh().ok_or(Refusal::MeshMissing)?;
        self.check_actor(at, actor, command.kind())?;
        if self.is_repetition(request)? {
            return Ok(Decision::AlreadyDone);
        }
        if self.clock_held() && depends_on_time(command.kind()) {
            return Err(Refusal::ClockJump { action: command.kind().action() });
        }
        self.decide_command(At { at, mesh }, actor, command)
    }

    fn decide_command(&self, now: At<'_>, actor: &Actor, command: &Command) -> Decided {
        match command {
            Command::CreateMesh { .. } => Ok(Decision::AlreadyDone),
            Command::RecordControllerCertificate { certificate } => {
                self.decide_controller_certificate(now, certificate)
            }
            Command::RecordResponder { certificate } => self.decide_responder(now, certificate),
            Command::CreateToken { .. } => self.decide_create_token(now, actor, command),
            Command::RevokeToken { id } => self.decide_revoke_token(id),
            Command::RequestEnrollment { .. } => self.decide_request_enrollment(now, actor, command),
            Command::Enroll { .. } => self.decide_enroll(now, actor, command),
            Command::ApproveNode { node } => self.decide_approve(*node),
            Command::TagNode { node, add, remove } => self.decide_tag(*node, add, remove),
            Command::RevokeNode { node, reason, remove } => {
                self.decide_revoke_node(now, *node, *reason, *remove)
            }
            Command::LeaveNode { node } => self.decide_leave(now, actor, *node),
            Command::RenewIdentity { .. } => self.decide_renew(now, actor, command),
            Command::RotateKeys { node } => self.decide_rotate_keys(*node),
            Command::IssueCertificate { certificate, restart, made } => {
                self.decide_issue(now, actor, certificate, *restart, made.as_deref())
            }
            Command::RevokeCertificates { which, reason } => {
                self.decide_revoke_certificates(now, actor, which, *reason)
            }
            Command::ApplyPolicy { toml } => self.decide_policy(toml),
            Command::AddOperator { .. } => self.decide_add_operator(now, actor, command),
            Command::RemoveOperator { name } => self.decide_remove_operator(now, actor, name),
            Command::LoginOperator { token, certificate } => {
                self.decide_login(now, actor, token, certificate)
            }
            Command::RecordCrl { .. } => self.decide_crl(command),
            Command::OpenCrlShards { .. } => self.decide_open_shards(command),
            Command::StartRotation { .. } => self.decide_start_rotation(now, command),
            Command::AdvanceRotation { version } => self.decide_advance_rotation(now, actor, *version),
            Command::AbortRotation { version } => self.decide_abort_rotation(now, *version),
            Command::AcknowledgeBundle { version, nodes } => self.decide_acknowledge_bundle(*version, nodes),
            Command::ExportRoot { key_id } => self.decide_export_root(key_id),
            Command::SealRoot { key_id } => self.decide_seal_root(now, key_id),
            Command::RecordDenials { denials } => self.decide_denials(denials),
            Command::HoldClock if self.clock_held() => Ok(Decision::AlreadyDone),
            Command::HoldClock => Ok(Decision::Changes(vec![Change::ClockHeld])),
            Command::ConfirmClock if !self.clock_held() => Ok(Decision::AlreadyDone),
            Command::ConfirmClock => Ok(Decision::Changes(vec![Change::ClockConfirmed])),
        }
    }

    /// Who asks is somebody, still, and may ask for this. The same check is good for reads.
    ///
    /// # Errors
    /// An identity that does not count, or [`Refusal::Denied`].
    pub fn check_actor(&self, at: UtcTime, actor: &Actor, kind: CommandKind) -> Result<(), Refusal> {
        match actor {
            Actor::LocalRoot | Actor::Controller | Actor::Token { .. } => {}
            Actor::Node { serial, .. } | Actor::Operator { serial, .. } => {
                let resumes = kind == CommandKind::ResumeIdentity;
                let proven = if resumes {
                    self.authenticate_resume(*serial, at)
                } else {
                    self.authenticate(*serial, at)
                };
                if proven? != *actor {
                    return Err(Refusal::IdentityUnknown { serial: *serial });
                }
            }
        }
        self.check_may(actor, kind)
    }

    fn check_may(&self, actor: &Actor, kind: CommandKind) -> Result<(), Refusal> {
        let role = match actor {
            Actor::Operator { name, .. } => self.role(name),
            _ => None,
        };
        match Caller::of(actor, role) {
            Some(caller) if caller.may(kind) => Ok(()),
            _ => Err(self.denied(actor, kind)),
        }
    }

    fn denied(&self, actor: &Actor, kind: CommandKind) -> Refusal {
        Refusal::Denied { actor: self.who(actor), action: kind.action() }
    }

    /// Whether this very request took effect already. Token holders are told apart by their keys instead:
    /// their answer must end with the node. What the controller itself records is judged by its content.
    fn is_repetition(&self, request: &Request) -> Result<bool, Refusal> {
        if matches!(request.actor, Actor::Token { .. } | Actor::Controller) {
            return Ok(false);
        }
        let Some(done) = self.operation(&request.operation) else { return Ok(false) };
        let kind = request.command.kind();
        if done.action != kind.action() || done.who != self.who(&request.actor) {
            return Err(Refusal::OperationReused { operation: request.operation });
        }
        let (Some(key), Outcome::Certificate(serial)) = (key_of(&request.command), done.outcome) else {
            return Ok(true);
        };
        // What was issued then must still be what the caller asks for, and still be good.
        let issued = self.certificate(&serial).filter(|issued| issued.is_live(self.last_time()));
        let current = issued.filter(|issued| match issued.owner {
            Owner::Node(id) => self.node(id).is_some_and(|node| {
                node.current.as_ref().is_some_and(|identity| identity.serial == issued.serial)
            }),
            _ => true,
        });
        match current {
            Some(issued) if issued.key_hash == key => Ok(true),
            _ => Err(Refusal::OperationReused { operation: request.operation }),
        }
    }
}

/// What every decision needs.
#[derive(Clone, Copy)]
struct At<'a> {
    at: UtcTime,
    mesh: &'a Mesh,
}

/// Checks that several commands share.
impl World {
    /// The parts of a certificate that every kind must have.
    fn check_certificate(&self, now: At<'_>, certificate: &CertificateRecord) -> Result<(), Refusal> {
        let mismatch = |what| Err(Refusal::CertificateMismatch { what });
        if certificate.der.is_empty() || certificate.der.len() > CERTIFICATE_BYTES_MAX {
            return mismatch("its DER is empty or too long");
        }
        if certificate.names.len() + certificate.ips.len() > SANS_MAX {
            return Err(Refusal::Limit { what: "names in a certificate", max: SANS_MAX });
        }
        if certificate.not_before >= certificate.not_after || certificate.not_after <= now.at {
            return mismatch("it has expired");
        }
        let issuer = &certificate.issuer_key_id;
        match self.authority(issuer).filter(|issuer| !issuer.is_root) {
            None => return Err(Refusal::IssuerUnknown { issuer: issuer.clone() }),
            // A delegate answers for an authority from its first leaf to the end of its last one.
            Some(known) if certificate.profile == PROFILE_OCSP && self.answers(known) => {}
            Some(known) if !known.standing.may_issue() => {
                let standing = known.standing.as_str();
                return Err(Refusal::IssuerNotActive { issuer: issuer.clone(), standing });
            }
            Some(_) => {}
        }
        if !self.has_shard(&certificate.issuer_key_id, certificate.shard) {
            return mismatch("its CRL shard does not exist");
        }
        if self.certificate(&certificate.serial).is_some() {
            return Err(Refusal::SerialTaken { serial: certificate.serial });
        }
        Ok(())
    }

    /// The key is neither revoked nor used by an owner other than those that `fits` accepts.
    fn check_key(&self, key_hash: KeyHash, fits: impl Fn(&Owner) -> bool) -> Result<(), Refusal> {
        if self.key_blocked(&key_hash) {
            return Err(Refusal::KeyRevoked { key_hash });
        }
        let mut users = self.index.users_by_key.get(&key_hash).into_iter().flatten();
        let asked = self.index.node_by_enrollment_key.get(&key_hash);
        if users.any(|(owner, _)| !fits(owner)) || asked.is_some_and(|id| !fits(&Owner::Node(*id))) {
            return Err(Refusal::KeyInUse { key_hash });
        }
        Ok(())
    }

    /// The WireGuard key is neither revoked nor used by a node other than `node`.
    fn check_wireguard(&self, key: WgKey, node: Option<NodeId>) -> Result<(), Refusal> {
        if self.wireguard_key_blocked(&key) {
            return Err(Refusal::WireguardKeyRevoked { key });
        }
        match self.node_by_wireguard(&key) {
            Some(user) if Some(user.id) != node => Err(Refusal::WireguardKeyInUse { key }),
            _ => Ok(()),
        }
    }

    /// How refusals and messages name an owner.
    pub(super) fn owner_label(&self, owner: &NameOwner) -> String {
        match owner {
            NameOwner::Reserved => "the mesh itself".to_owned(),
            NameOwner::Controller => "the controller".to_owned(),
            NameOwner::Node(id) => self.node(*id).map_or_else(
                || format!("node {id}"),
                |node| match node.state {
                    NodeState::Revoked { .. } => format!("revoked node {}", node.name),
                    NodeState::Pending { .. } => format!("pending node {}", node.name),
                    NodeState::Active => format!("node {}", node.name),
                },
            ),
            NameOwner::Grant => "a grant of the policy".to_owned(),
            NameOwner::Detached(serial) => format!("certificate {serial}"),
        }
    }
}

/// Commands that a wrong clock would make wrong. Revocations and their CRLs are not among them.
const fn depends_on_time(kind: CommandKind) -> bool {
    use CommandKind as K;
    match kind {
        K::CertifyController
        | K::CertifyResponder
        | K::CreateToken
        | K::RequestEnrollment
        | K::Enroll
        | K::RenewIdentity
        | K::ResumeIdentity
        | K::IssueCertificate
        | K::AddOperator
        | K::LoginOperator
        | K::StartRotation
        | K::AdvanceRotation
        | K::SealRoot => true,
        K::CreateMesh
        | K::RevokeToken
        | K::ApproveNode
        | K::TagNode
        | K::RevokeNode
        | K::RemoveNode
        | K::LeaveNode
        | K::RotateKeys
        | K::RevokeCertificates
        | K::ApplyPolicy
        | K::RemoveOperator
        | K::RecordCrl
        | K::OpenCrlShards
        | K::AbortRotation
        | K::AcknowledgeBundle
        | K::ExportRoot
        | K::RecordDenials
        | K::HoldClock
        | K::ConfirmClock => false,
    }
}

/// The key that a command wants certified.
fn key_of(command: &Command) -> Option<KeyHash> {
    match command {
        Command::RenewIdentity { certificate, .. }
        | Command::IssueCertificate { certificate, .. }
        | Command::RecordControllerCertificate { certificate } => Some(certificate.key_hash),
        _ => None,
    }
}
