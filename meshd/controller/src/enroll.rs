//! Letting machines and people in: a checked token, a verified key, one record.

use std::net::IpAddr;
use std::sync::Arc;

use bytes::Bytes;
use mesh_ca::{Identity, Profile, VerifiedCsr};
use mesh_core::world::{NodeState, Purpose};
use mesh_core::{
    Actor, Change, Command, KeyHash, NodeId, NodeName, OperationId, OperatorName, Owner, Refusal, Request,
    TokenId, UtcTime, WgKey,
};
use mesh_proto::v1 as pb;
use mesh_runtime::SharedClock;
use zeroize::Zeroizing;

use crate::archive::Archive;
use crate::authority::{LeafRequest, label};
use crate::directory::Directory;
use crate::failpoint;
use crate::identity::{IdentityAnswers, leaf_of_node};
use crate::issuer::{Issuing, check_requested_names};
use crate::reservations::Reservations;
use crate::status::Problem;
use crate::throttle::Throttle;
use crate::token::secret_matches;
use crate::writer::{WriteError, Writer};

/// Tries to prepare again when a reservation turned out to be taken.
const ATTEMPTS_MAX: u32 = 4;

/// What a stranger shows of its token. The secret is wiped when dropped.
pub(crate) struct TokenClaim {
    id: Option<TokenId>,
    secret: Zeroizing<Vec<u8>>,
}

impl TokenClaim {
    pub(crate) fn new(id: &[u8], secret: &[u8]) -> Self {
        Self { id: TokenId::try_from(id).ok(), secret: Zeroizing::new(secret.to_vec()) }
    }
}

/// A machine that asks to be let in; every field is checked.
pub(crate) struct Enrollment {
    pub(crate) token: TokenClaim,
    pub(crate) name: NodeName,
    pub(crate) csr: Bytes,
    pub(crate) wireguard: WgKey,
    pub(crate) operation: OperationId,
}

/// A person with a one-time token.
pub(crate) struct Login {
    pub(crate) token: TokenClaim,
    pub(crate) csr: Bytes,
    pub(crate) operation: OperationId,
}

/// Answers tokens.
#[derive(Debug)]
pub(crate) struct Enroller {
    pub(crate) directory: Arc<Directory>,
    pub(crate) writer: Writer,
    pub(crate) issuing: Issuing,
    pub(crate) reservations: Reservations,
    pub(crate) answers: IdentityAnswers,
    pub(crate) throttle: Throttle,
    pub(crate) clock: SharedClock,
    pub(crate) archive: Archive,
}

/// Where an enrollment stands once token and key are checked.
enum Standing {
    /// An operator has to approve it first; nothing is recorded yet.
    Ask,
    /// Recorded, and not approved yet.
    Waiting,
    /// May be signed now; the index of the approved node, if it has one.
    Admitted(Option<NodeId>),
}

impl Enroller {
    /// Lets a machine in, or says that it waits for an operator.
    ///
    /// Refusals spend nothing: only the record of an accepted enrollment does.
    pub(crate) async fn enroll(
        &self,
        source: Option<IpAddr>,
        enrollment: Enrollment,
    ) -> Result<pb::EnrollResponse, Problem> {
        let token = self.check_token(source, &enrollment.token)?;
        let csr = self.issuing.verify(enrollment.csr.clone()).await?;
        let key_hash = KeyHash(csr.key_hash());
        match self.standing(token, &enrollment, key_hash) {
            Standing::Ask => {
                let command = Command::RequestEnrollment {
                    token,
                    name: enrollment.name.clone(),
                    key_hash,
                    wireguard: enrollment.wireguard,
                };
                // The retry that follows an approval is another command, so this one has an id of its own.
                let operation = OperationId(mesh_runtime::random_bytes());
                self.writer.submit(as_token(token, operation, command)).await?;
                Ok(pending(&enrollment.name, key_hash))
            }
            Standing::Waiting => Ok(pending(&enrollment.name, key_hash)),
            Standing::Admitted(node) => self.admit(token, &enrollment, csr, node).await,
        }
    }

    /// Gives an operator the certificate that the one-time token stands for.
    pub(crate) async fn login(
        &self,
        source: Option<IpAddr>,
        login: Login,
    ) -> Result<pb::LoginResponse, Problem> {
        let token = self.check_token(source, &login.token)?;
        let purpose = self.directory.read(|world| world.token(&token).map(|t| t.purpose.clone()));
        let Some(Purpose::Login { operator }) = purpose else {
            return Err(Refusal::TokenPurpose { id: token, action: "operator.login" }.into());
        };
        let csr = self.issuing.verify(login.csr).await?;
        check_requested_names(csr.requested_names(), &[], &[], None)?;
        let request = operator_leaf(&operator)?;
        let certificate = self.issuing.sign(request, csr).await?;
        let serial = certificate.serial;
        let command = Command::LoginOperator { token, certificate: certificate.clone() };
        // Commit point.
        let committed = self.writer.submit(as_token(token, login.operation, command)).await?;
        if committed.changed() {
            tracing::info!(%operator, %serial, "operator logged in");
            return self.answers.login(&operator, certificate.der);
        }
        // The same key asks again: the answer of the first try got lost.
        let current = self.directory.read(|world| {
            let serial = world.operator(&operator)?.serial?;
            world.certificate(&serial).map(|known| (known.issued_seq, serial))
        });
        let (seq, serial) = current.ok_or(Refusal::TokenUsed { id: token })?;
        let archive = self.archive.clone();
        let earlier = self.issuing.on_pool(move || archive.certificate(seq, &serial)).await?;
        match earlier.filter(|earlier| earlier.key_hash == certificate.key_hash) {
            Some(earlier) => self.answers.login(&operator, earlier.der),
            None => Err(Refusal::TokenUsed { id: token }.into()),
        }
    }

    async fn admit(
        &self,
        token: TokenId,
        enrollment: &Enrollment,
        csr: Arc<VerifiedCsr>,
        pending: Option<NodeId>,
    ) -> Result<pb::EnrollResponse, Problem> {
        for attempt in 1.. {
            match self.try_admit(token, enrollment, Arc::clone(&csr), pending).await {
                Err(Attempt::Taken(refusal)) if attempt == ATTEMPTS_MAX => return Err(refusal.into()),
                Err(Attempt::Taken(_)) => {}
                Err(Attempt::Failed(problem)) => return Err(problem),
                Ok(answer) => return Ok(answer),
            }
        }
        unreachable!("the loop ends at ATTEMPTS_MAX")
    }

    async fn try_admit(
        &self,
        token: TokenId,
        enrollment: &Enrollment,
        csr: Arc<VerifiedCsr>,
        pending: Option<NodeId>,
    ) -> Result<pb::EnrollResponse, Attempt> {
        let reservation = self
            .directory
            .read(|world| self.reservations.take(world, pending))
            .ok_or_else(addresses_exhausted)?;
        let (node, ipv4) = (reservation.node, reservation.ipv4);
        let wireguard = enrollment.wireguard;
        let request =
            self.directory.read(|world| leaf_of_node(world, node, &enrollment.name, ipv4, &[wireguard]))?;
        let uri = request.identity.as_ref().map(|i| i.to_spiffe(self.issuing.authority().domain()));
        check_requested_names(csr.requested_names(), &request.names, &request.ips, uri.as_deref())?;
        let certificate = self.issuing.sign(request, csr).await?;
        let key_hash = certificate.key_hash;
        failpoint::ENROLL_BEFORE_COMMIT.crash();
        let name = enrollment.name.clone();
        let command = Command::Enroll { token, node, name, ipv4, wireguard, certificate };
        // Commit point.
        let committed = self.writer.submit(as_token(token, enrollment.operation, command)).await;
        failpoint::ENROLL_AFTER_COMMIT.crash();
        let committed = match committed {
            Err(WriteError::Refused(
                refusal @ (Refusal::AddressTaken { .. }
                | Refusal::NodeIdTaken { .. }
                | Refusal::SerialTaken { .. }),
            )) => return Err(Attempt::Taken(refusal)),
            other => other.map_err(Problem::from)?,
        };
        let node = committed
            .changes()
            .iter()
            .find_map(|change| match change {
                Change::NodeEnrolled { id, .. } => Some(*id),
                _ => None,
            })
            .or_else(|| self.enrolled_with(&enrollment.name, key_hash))
            .ok_or_else(|| Problem::internal("an enrolled node is missing"))?;
        tracing::info!(%node, name = %enrollment.name, seq = committed.seq, changed = committed.changed(), "node enrolled");
        let identity = self.answers.identity(node)?;
        failpoint::ENROLL_BEFORE_ANSWER.crash();
        Ok(pb::EnrollResponse { outcome: Some(pb::enroll_response::Outcome::Enrolled(identity)) })
    }

    fn enrolled_with(&self, name: &NodeName, key_hash: KeyHash) -> Option<NodeId> {
        self.directory.read(|world| {
            let node = world.node_by_name(name)?;
            (node.enrollment.key_hash == key_hash).then_some(node.id)
        })
    }

    fn standing(&self, token: TokenId, enrollment: &Enrollment, key_hash: KeyHash) -> Standing {
        self.directory.read(|world| {
            let asks_approval = world.token(&token).is_some_and(|token| token.require_approval);
            let same = world.node_by_name(&enrollment.name).filter(|node| {
                node.enrollment.token == token
                    && node.enrollment.key_hash == key_hash
                    && node.enrollment.wireguard == enrollment.wireguard
            });
            match same.map(|node| (node.id, node.state)) {
                Some((_, NodeState::Pending { approved: false })) => Standing::Waiting,
                Some((id, NodeState::Pending { approved: true })) => Standing::Admitted(Some(id)),
                None if asks_approval => Standing::Ask,
                _ => Standing::Admitted(None),
            }
        })
    }

    /// Compares the secret before anything else is said about the token. Whatever was wrong, the
    /// answer is the same, and it counts against the source.
    fn check_token(&self, source: Option<IpAddr>, claim: &TokenClaim) -> Result<TokenId, Problem> {
        let now = self.clock.now();
        if source.is_some_and(|source| self.throttle.is_exhausted(source, now)) {
            return Err(Problem::overloaded("wrong tokens from this address"));
        }
        let hash =
            claim.id.and_then(|id| self.directory.read(|world| world.token(&id).map(|t| t.secret_hash)));
        match claim.id.filter(|_| secret_matches(&claim.secret, hash.as_ref())) {
            Some(id) => Ok(id),
            None => {
                if let Some(source) = source {
                    self.throttle.strike(source, now);
                }
                Err(Problem::token_invalid())
            }
        }
    }
}

/// Why an attempt did not succeed.
enum Attempt {
    /// What was reserved is taken after all: worth another try.
    Taken(Refusal),
    Failed(Problem),
}

impl From<Problem> for Attempt {
    fn from(problem: Problem) -> Self {
        Self::Failed(problem)
    }
}

fn as_token(token: TokenId, operation: OperationId, command: Command) -> Request {
    Request { actor: Actor::Token { id: token }, operation, command }
}

fn pending(name: &NodeName, key_hash: KeyHash) -> pb::EnrollResponse {
    let pending =
        pb::enroll_response::Pending { node: name.to_string(), key_hash: key_hash.0.to_vec().into() };
    pb::EnrollResponse { outcome: Some(pb::enroll_response::Outcome::Pending(pending)) }
}

fn operator_leaf(operator: &OperatorName) -> Result<LeafRequest, Problem> {
    let name = label(operator.as_str()).map_err(|error| {
        Problem::new(
            pb::ErrorCode::NameInvalid,
            format!("operator name {operator} cannot stand in a certificate: {error}"),
            "add the operator under a name of lower-case letters, digits and inner hyphens",
        )
    })?;
    Ok(LeafRequest {
        profile: Profile::Operator,
        identity: Some(Identity::Operator { name }),
        owner: Owner::Operator(operator.clone()),
        names: Vec::new(),
        ips: Vec::new(),
        wireguard: Vec::new(),
        pair_name: String::new(),
        lifetime: Profile::Operator.default_lifetime(),
        custom: None,
    })
}

fn addresses_exhausted() -> Problem {
    Problem::new(
        pb::ErrorCode::AddressesExhausted,
        "the pool of overlay addresses is used up",
        "remove nodes that are gone; their addresses come back once their certificates have ended",
    )
}

/// Refuses a node whose clock is so far off that its certificate would not yet, or no longer, hold there.
/// Nothing was looked at and no token is touched. 0 means that the node did not say.
pub(crate) fn check_clock(node_time: i64, now: UtcTime) -> Result<(), Problem> {
    let offset = node_time.saturating_sub(now.unix());
    if node_time == 0 || offset.unsigned_abs() <= mesh_ca::CLOCK_SKEW_ALLOWANCE.as_secs() {
        return Ok(());
    }
    let (minutes, direction) = (offset.unsigned_abs() / 60, if offset > 0 { "ahead" } else { "behind" });
    Err(Problem::new(
        pb::ErrorCode::ClockOff,
        format!("the node's clock differs by {minutes} min from the controller's: it is {direction}"),
        "set this machine's clock (`timedatectl`), then enroll again; the token is intact",
    ))
}
