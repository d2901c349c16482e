//! Enrollment: from a join token to an identity on disk.
//!
//! Keys and request are on disk before the first byte is sent, and the identity is on disk before anybody
//! is told. Whatever happens in between, the same token asks again for the same thing with the same keys.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use mesh_ca::{Csr, Label, LeafKey, VerifiedLeaf};
use mesh_proto::v1 as pb;
use mesh_proto::v1::ErrorCode;
use mesh_proto::v1::enroll_response::Outcome;
use mesh_proto::v1::enrollment_client::EnrollmentClient;
use mesh_runtime::Backoff;
use mesh_tunnel::PrivateKey;
use prost::Message as _;
use tokio::sync::mpsc;
use tonic::Request;
use zeroize::{Zeroize as _, Zeroizing};

use crate::clock::ControllerClock;
use crate::connect::{connect, joining_config};
use crate::failpoint;
use crate::failure::Failure;
use crate::limits::{APPROVAL_FIRST, APPROVAL_LONGEST, CALL_TIMEOUT, CONTROLLERS_MAX, TOKEN_CHARS_MAX};
use crate::pki;
use crate::state::{ClockFile, Der, Enrollment, Identity, Secret, StateDir};

/// Begins every join token.
const TOKEN_PREFIX: &str = "mesh1_";

/// A join token that was read. Cannot be printed.
pub(crate) struct Token {
    controllers: Vec<String>,
    root_pin: [u8; 32],
    id: Vec<u8>,
    secret: Secret,
    trust_domain: String,
}

impl Token {
    /// Reads the printed form; white space around it is forgiven.
    ///
    /// # Errors
    /// [`ErrorCode::TokenInvalid`], and never a part of the token.
    pub(crate) fn parse(text: &str) -> Result<Self, Failure> {
        let invalid = |why: &str| {
            Failure::new(
                ErrorCode::TokenInvalid,
                format!("this is not a join token: {why}"),
                "copy the whole token, or create a new one with `meshctl token create`",
            )
        };
        let text = text.trim();
        if text.len() > TOKEN_CHARS_MAX {
            return Err(invalid("it is too long"));
        }
        let body = text.strip_prefix(TOKEN_PREFIX).ok_or_else(|| invalid("it does not begin with mesh1_"))?;
        let bytes = URL_SAFE_NO_PAD.decode(body).map_err(|_| invalid("it is cut or changed"))?;
        let bytes = Zeroizing::new(bytes);
        let message = pb::JoinToken::decode(bytes.as_slice()).map_err(|_| invalid("it is cut or changed"))?;
        let root_pin = <[u8; 32]>::try_from(message.root_spki_sha256.as_ref())
            .map_err(|_| invalid("it names no root"))?;
        match message.kind() {
            pb::join_token::Kind::Node => {}
            pb::join_token::Kind::Operator => {
                return Err(invalid("it is an operator's; use it with `meshctl login`"));
            }
            pb::join_token::Kind::Unspecified => return Err(invalid("it is of no known kind")),
        }
        if message.controllers.is_empty() || message.controllers.len() > CONTROLLERS_MAX {
            return Err(invalid("it names no controller"));
        }
        Ok(Self {
            controllers: message.controllers,
            root_pin,
            id: message.id.to_vec(),
            secret: Secret::new(message.secret.to_vec()),
            trust_domain: message.trust_domain,
        })
    }

    /// Whether the token is for the mesh that `identity` belongs to.
    pub(crate) fn is_for(&self, identity: &Identity) -> bool {
        // During a change of roots there are two, and a token pins either.
        pki::has_root(identity, &self.root_pin) && self.trust_domain == identity.trust_domain
    }
}

/// What a caller hears while it waits.
#[derive(Debug, Clone)]
pub(crate) enum Progress {
    Connecting(String),
    Pending(pb::enroll_response::Pending),
}

/// Enrolls, from start to identity on disk.
#[derive(Debug, Clone)]
pub(crate) struct Joiner {
    state: StateDir,
    clock: ControllerClock,
}

impl Joiner {
    pub(crate) fn new(state: StateDir, clock: ControllerClock) -> Self {
        Self { state, clock }
    }

    /// Writes the request for `token` to disk, with new keys; or finds the one that is there, if it was made
    /// for the same token and name.
    ///
    /// # Errors
    /// The name is no node name, or the disk refuses.
    pub(crate) fn prepare(&self, token: &Token, name: &str) -> Result<Enrollment, Failure> {
        check_name(name)?;
        let stored = self.state.enrollment()?;
        let same_token =
            stored.filter(|stored| stored.token_id == token.id && stored.root_pin == token.root_pin);
        if let Some(stored) = same_token.as_ref().filter(|stored| stored.name == name) {
            return Ok(stored.clone());
        }
        // Another name, same token: the keys stay, so that the controller sees one machine that corrects itself.
        let (tls_key, wireguard_key) = match same_token {
            Some(stored) => (stored.tls_key, stored.wireguard_key),
            None => new_keys()?,
        };
        let key = leaf_key(&tls_key)?;
        let csr = Csr::create(&key).map_err(|error| Failure::internal("cannot make a CSR", &error))?;
        let enrollment = Enrollment {
            operation_id: mesh_runtime::random_bytes(),
            token_id: token.id.clone(),
            token_secret: token.secret.clone(),
            root_pin: token.root_pin,
            trust_domain: token.trust_domain.clone(),
            controllers: token.controllers.clone(),
            name: name.to_owned(),
            csr: Der(csr),
            tls_key,
            wireguard_key,
        };
        self.state.save_enrollment(&enrollment)?;
        failpoint::ENROLL_AFTER_KEYS.crash();
        Ok(enrollment)
    }

    /// Asks until there is an answer for good. A refusal removes the stored request; while the controller
    /// cannot be reached it stays, and [`ErrorCode::ControllerUnreachable`] is returned.
    pub(crate) async fn enroll(
        &self,
        enrollment: &Enrollment,
        progress: &mpsc::Sender<Progress>,
    ) -> Result<Identity, Failure> {
        let mut approval = Backoff::new(APPROVAL_FIRST, APPROVAL_LONGEST);
        loop {
            match self.ask(enrollment, progress).await {
                Ok((Outcome::Enrolled(answer), root)) => {
                    let identity = self.accept(enrollment, answer, root)?;
                    failpoint::ENROLL_BEFORE_SAVE.crash();
                    // Commit point: from here on this machine is that node.
                    self.state.save_identity(&identity)?;
                    self.state.save_clock(ClockFile { offset_secs: self.clock.offset_secs() })?;
                    self.state.forget_enrollment()?;
                    return Ok(identity);
                }
                Ok((Outcome::Pending(pending), _)) => {
                    // A full queue means that nobody listens any more; the question goes on.
                    let _ = progress.try_send(Progress::Pending(pending));
                    tokio::time::sleep(APPROVAL_FIRST + approval.next_wait()).await;
                }
                Err(failure) => {
                    if is_final(failure.code) {
                        self.state.forget_enrollment()?;
                    }
                    return Err(failure);
                }
            }
        }
    }

    /// One round over all controllers.
    async fn ask(
        &self,
        enrollment: &Enrollment,
        progress: &mpsc::Sender<Progress>,
    ) -> Result<(Outcome, Der), Failure> {
        let mut last = None;
        for address in &enrollment.controllers {
            let _ = progress.try_send(Progress::Connecting(address.clone()));
            match self.ask_one(enrollment, address).await {
                Ok(outcome) => return Ok(outcome),
                Err(failure) => {
                    tracing::info!(controller = address, code = failure.number(), why = %failure, "no enrollment here");
                    // A refusal is an answer; only silence is worth the next address.
                    if failure.exit != 5 && failure.code != ErrorCode::RootMismatch {
                        return Err(failure);
                    }
                    last = Some(failure);
                }
            }
        }
        Err(last.expect("a token names at least one controller"))
    }

    /// The answer, and the root that was pinned and shown.
    async fn ask_one(&self, enrollment: &Enrollment, address: &str) -> Result<(Outcome, Der), Failure> {
        let (tls, verifier) = joining_config(enrollment.root_pin, &self.clock);
        let connected = match connect(address, tls).await {
            Ok(connected) => connected,
            Err(error) => {
                let shown = verifier.shown().filter(|shown| *shown != enrollment.root_pin);
                let pinned_missing = matches!(
                    error.certificate_error(),
                    Some(rustls::CertificateError::UnknownIssuer | rustls::CertificateError::Other(_))
                );
                return Err(match shown {
                    Some(shown) => root_mismatch(&enrollment.root_pin, Some(&shown)),
                    None if pinned_missing => root_mismatch(&enrollment.root_pin, None),
                    None => error.into(),
                });
            }
        };
        // The pin has matched in this very connection; only now may the secret leave.
        let Some(root) = verifier.accepted().map(|accepted| accepted.root_der) else {
            return Err(root_mismatch(&enrollment.root_pin, verifier.shown().as_ref()));
        };
        let wireguard = wireguard_key(&enrollment.wireguard_key)?;
        let mut request = Request::new(pb::EnrollRequest {
            token_id: enrollment.token_id.clone().into(),
            token_secret: enrollment.token_secret.expose().to_vec().into(),
            name: enrollment.name.clone(),
            csr: enrollment.csr.0.clone().into(),
            wireguard_public_key: wireguard.public().0.to_vec().into(),
            operation_id: enrollment.operation_id.to_vec().into(),
            node_time: self.clock.own().utc_now().unix_timestamp(),
        });
        request.set_timeout(CALL_TIMEOUT);
        let answer = EnrollmentClient::new(connected.channel).enroll(request).await;
        failpoint::ENROLL_AFTER_SEND.crash();
        match answer {
            Ok(answer) => {
                let outcome = answer.into_inner().outcome.ok_or_else(|| unclear("the answer is empty"))?;
                Ok((outcome, Der(root.to_vec())))
            }
            Err(status) => Err(Failure::from_status(&status)),
        }
    }

    /// Believes an answer only as far as it proves itself.
    fn accept(
        &self,
        enrollment: &Enrollment,
        answer: pb::NodeIdentity,
        root: Der,
    ) -> Result<Identity, Failure> {
        self.clock.learn(answer.controller_time);
        let bundle = answer.trust.clone();
        let identity = Identity::from_answer(
            answer,
            enrollment.root_pin,
            enrollment.tls_key.clone(),
            vec![enrollment.wireguard_key.clone()],
        )
        .ok_or_else(|| unclear("a field is missing"))?;
        let identity = take_bundle(identity, &[root], bundle.as_ref(), self.clock.now())?;
        if identity.trust_domain != enrollment.trust_domain || identity.name != enrollment.name {
            return Err(unclear("it is for another name"));
        }
        check_identity(&identity, &self.clock)?;
        Ok(identity)
    }
}

impl Identity {
    /// An identity as the controller answered it, with the keys that were asked for. `None` if a field is
    /// missing or unreadable.
    pub(crate) fn from_answer(
        answer: pb::NodeIdentity,
        root_pin: [u8; 32],
        tls_key: Secret,
        wireguard_keys: Vec<Secret>,
    ) -> Option<Self> {
        let ders = |list: Vec<bytes::Bytes>| list.into_iter().map(|der| Der(der.to_vec())).collect();
        if answer.controllers.len() > CONTROLLERS_MAX {
            return None;
        }
        Some(Self {
            name: answer.name,
            node_id: answer.node_id,
            trust_domain: answer.trust_domain,
            mesh_id: answer.mesh_id.to_vec(),
            ipv4: answer.ipv4.parse().ok()?,
            ipv6: answer.ipv6.parse().ok()?,
            ipv4_pool: answer.ipv4_pool.parse().ok()?,
            ipv6_prefix: answer.ipv6_prefix.parse().ok()?,
            controllers: answer.controllers,
            root_pin,
            lineage: Vec::new(),
            bundle: 0,
            active_issuer: Vec::new(),
            leaf: Der(answer.leaf.to_vec()),
            issuers: ders(answer.issuers),
            roots: ders(answer.roots),
            renew_at: answer.renew_at,
            tls_key,
            wireguard_keys,
        })
    }
}

/// An answered identity with the bundle that came with it, as far as `trusted` roots lead there. An older controller
/// sends none; then the roots of the answer count as far as they have the pinned key.
pub(crate) fn take_bundle(
    identity: Identity,
    trusted: &[Der],
    bundle: Option<&pb::TrustBundle>,
    now: time::UtcDateTime,
) -> Result<Identity, Failure> {
    let Some(bundle) = bundle else { return Ok(identity) };
    pki::with_bundle(&identity, trusted, bundle, now).map_err(|error| unclear(&mesh_runtime::chain(&error)))
}

/// That the identity's chain leads to the pinned root, and says what the answer says beside it.
pub(crate) fn check_identity(identity: &Identity, clock: &ControllerClock) -> Result<(), Failure> {
    let key = leaf_key(&identity.tls_key)?;
    let verified = pki::judge_own(identity, &identity.issuers, &identity.leaf.0, &key, clock.now())
        .map_err(|error| unclear(&mesh_runtime::chain(&error)))?;
    match agrees_with_leaf(identity, &verified)? {
        true => Ok(()),
        false => Err(unclear("the certificate says something else")),
    }
}

/// Whether what stands beside the certificate is what it says: name, addresses and keys.
pub(crate) fn agrees_with_leaf(identity: &Identity, verified: &VerifiedLeaf) -> Result<bool, Failure> {
    let leaf = pki::node_leaf(verified).map_err(|error| unclear(&error.to_string()))?;
    let keys: Vec<[u8; 32]> = identity
        .wireguard_keys
        .iter()
        .map(|key| wireguard_key(key).map(|key| key.public().0))
        .collect::<Result<_, _>>()?;
    Ok(leaf.name == identity.name
        && leaf.ipv4 == identity.ipv4
        && leaf.ipv6 == identity.ipv6
        && leaf.wireguard_keys == keys
        && verified.key_hash == leaf_key(&identity.tls_key)?.key_hash())
}

pub(crate) fn new_keys() -> Result<(Secret, Secret), Failure> {
    Ok((new_tls_key()?, new_wireguard_key()))
}

pub(crate) fn new_tls_key() -> Result<Secret, Failure> {
    let key = LeafKey::generate().map_err(|error| Failure::internal("cannot make a key", &error))?;
    Ok(Secret::new(key.to_pkcs8_der().to_vec()))
}

pub(crate) fn new_wireguard_key() -> Secret {
    let key = PrivateKey::generate(&mut |bytes| {
        let mut random: [u8; 32] = mesh_runtime::random_bytes();
        bytes.copy_from_slice(&random);
        random.zeroize();
    });
    Secret::new(key.to_bytes().to_vec())
}

pub(crate) fn leaf_key(secret: &Secret) -> Result<LeafKey, Failure> {
    LeafKey::from_pkcs8_der(secret.expose()).map_err(|error| broken_key(&error.to_string()))
}

pub(crate) fn wireguard_key(secret: &Secret) -> Result<PrivateKey, Failure> {
    <[u8; 32]>::try_from(secret.expose())
        .map(PrivateKey::from_bytes)
        .map_err(|_| broken_key("it is not 32 bytes long"))
}

fn broken_key(why: &str) -> Failure {
    Failure::new(
        ErrorCode::StateCorrupt,
        format!("a stored key cannot be used: {why}"),
        "restore the state folder from a backup, or enroll again",
    )
}

fn check_name(name: &str) -> Result<(), Failure> {
    Label::parse(name).map(drop).map_err(|error| {
        Failure::new(
            ErrorCode::NameInvalid,
            format!("{name:?} cannot be a node's name: {error}"),
            "choose one label of lower-case letters, digits and inner hyphens with --name",
        )
    })
}

/// Answers that asking again will not change. The token's use was not spent on our keys.
fn is_final(code: ErrorCode) -> bool {
    use ErrorCode as C;
    matches!(
        code,
        C::TokenInvalid
            | C::TokenExpired
            | C::TokenUsed
            | C::TokenRevoked
            | C::TokenNotFound
            | C::TokenNameMismatch
            | C::EnrollmentRefused
            | C::RootMismatch
            | C::NameInvalid
            | C::NameTaken
            | C::NameReserved
            | C::NodeRevoked
            | C::KeyInUse
            | C::KeyRevoked
            | C::CsrInvalid
            | C::CsrSignature
            | C::Denied
    )
}

fn root_mismatch(expected: &[u8; 32], shown: Option<&[u8; 32]>) -> Failure {
    let shown = shown
        .map_or_else(|| "no root certificate".to_owned(), |hash| format!("sha256:{}", hex::encode(hash)));
    Failure::new(
        ErrorCode::RootMismatch,
        "controller's root key does not match the token: wrong controller, a stale token, or someone in the middle. Nothing was sent.",
        "on the controller run `meshctl ca fingerprint`, compare, then create a new token",
    )
    .fact(format!("token expects sha256:{}", hex::encode(expected)))
    .fact(format!("controller showed {shown}"))
}

fn unclear(why: &str) -> Failure {
    Failure::new(
        ErrorCode::CertificateInvalid,
        format!("the controller's answer cannot be believed: {why}"),
        "compare clocks and versions of both machines, then try again",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn printed(change: impl FnOnce(&mut pb::JoinToken)) -> String {
        let mut message = pb::JoinToken {
            controllers: vec!["192.0.2.1:7443".into()],
            root_spki_sha256: vec![7; 32].into(),
            id: vec![1; 8].into(),
            secret: vec![2; 32].into(),
            kind: pb::join_token::Kind::Node as i32,
            trust_domain: "mesh.internal".into(),
        };
        change(&mut message);
        format!("{TOKEN_PREFIX}{}", URL_SAFE_NO_PAD.encode(message.encode_to_vec()))
    }

    fn joiner() -> (tempfile::TempDir, Joiner) {
        let parent = tempfile::tempdir().unwrap();
        let state = StateDir::open(&parent.path().join("state")).unwrap();
        let clock = ControllerClock::new(std::sync::Arc::new(mesh_runtime::SystemClock), 0);
        (parent, Joiner::new(state, clock))
    }

    #[test]
    fn tokens_are_read_or_refused_without_quoting_them() {
        assert!(Token::parse(&format!("  {}\n", printed(|_| {}))).is_ok());
        let cut = printed(|_| {});
        let table = [
            String::new(),
            "hello".into(),
            cut[..cut.len() - 3].to_owned(),
            printed(|token| token.kind = pb::join_token::Kind::Operator as i32),
            printed(|token| token.root_spki_sha256 = vec![7; 31].into()),
            printed(|token| token.controllers.clear()),
            format!("mesh1_{}", "A".repeat(TOKEN_CHARS_MAX)),
        ];
        for text in table {
            let Err(failure) = Token::parse(&text) else { panic!("{text} was taken") };
            assert_eq!((failure.code, failure.exit), (ErrorCode::TokenInvalid, 4), "{text}");
            assert!(text.len() < 8 || !failure.why.contains(&text[6..]), "the token is not quoted");
        }
    }

    proptest::proptest! {
        /// A token spoiled anywhere, or no token at all: a value within the limits, or a refusal that quotes nothing.
        #[test]
        fn any_text_is_a_token_within_limits_or_none(
            noise in "\\PC{0,60}|mesh1_[A-Za-z0-9_-]{0,90}",
            at in proptest::prelude::any::<proptest::sample::Index>(),
            put in "[A-Za-z0-9_-]",
        ) {
            let mut spoiled = printed(|_| {});
            let at = at.index(spoiled.len());
            spoiled.replace_range(at..=at, &put);
            for text in [noise, spoiled] {
                match Token::parse(&text) {
                    Ok(token) => {
                        proptest::prop_assert!((1..=CONTROLLERS_MAX).contains(&token.controllers.len()));
                    }
                    Err(failure) => {
                        proptest::prop_assert_eq!(failure.code, ErrorCode::TokenInvalid);
                        let shown = format!("{failure} {}", failure.next);
                        proptest::prop_assert!(text.len() < 24 || !shown.contains(&text[..]), "{}", shown);
                    }
                }
            }
        }
    }

    #[test]
    fn a_retry_after_a_crash_asks_for_the_same_with_the_same_keys() {
        let (_parent, joiner) = joiner();
        let token = Token::parse(&printed(|_| {})).unwrap();
        let first = joiner.prepare(&token, "web-1").unwrap();
        // The process died here; the next one reads the disk.
        let again = joiner.prepare(&token, "web-1").unwrap();
        assert_eq!(first.operation_id, again.operation_id);
        assert_eq!(first.csr, again.csr);
        assert!(first.tls_key == again.tls_key && first.wireguard_key == again.wireguard_key);

        let renamed = joiner.prepare(&token, "web-2").unwrap();
        assert!(renamed.tls_key == first.tls_key, "one machine keeps its key");
        assert_ne!(renamed.operation_id, first.operation_id, "another question has another id");

        let other = Token::parse(&printed(|token| token.id = vec![9; 8].into())).unwrap();
        assert!(joiner.prepare(&other, "web-2").unwrap().tls_key != first.tls_key);
    }

    #[test]
    fn names_that_are_none_are_refused_before_anything_is_written() {
        let (_parent, joiner) = joiner();
        let token = Token::parse(&printed(|_| {})).unwrap();
        for name in ["", "Web", "a.b", "*", "-a"] {
            let Err(failure) = joiner.prepare(&token, name) else { panic!("{name} was taken") };
            assert_eq!(failure.code, ErrorCode::NameInvalid, "{name}");
        }
        assert!(joiner.state.enrollment().unwrap().is_none());
    }

    #[tokio::test]
    async fn a_silent_controller_leaves_the_request_on_disk() {
        let (_parent, joiner) = joiner();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        drop(listener);
        let token = Token::parse(&printed(|token| token.controllers = vec![address])).unwrap();
        let enrollment = joiner.prepare(&token, "web-1").unwrap();
        let (progress, _kept) = mpsc::channel(4);
        let Err(failure) = joiner.enroll(&enrollment, &progress).await else { panic!("nobody answered") };
        assert_eq!((failure.code, failure.exit), (ErrorCode::ControllerUnreachable, 5));
        assert!(joiner.state.enrollment().unwrap().is_some());
    }
}
