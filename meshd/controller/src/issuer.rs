//! Preparing certificates around the writer: in parallel, on a few threads of their own.
//!
//! The order never changes: verify the CSR's own signature, build the template from the profile,
//! check the template, draw the serial, sign, read back and lint; then the caller has the writer
//! decide and record. A certificate leaves the process only after that.

use std::net::IpAddr;
use std::sync::Arc;

use bytes::Bytes;
use mesh_ca::{
    AcceptedProfile, Csr, CsrError, LeafKey, OcspResponder, RequestedNames, SerialNumber, SubjectKey,
    VerifiedCsr,
};
use mesh_core::profile::Profile;
use mesh_core::world::Place;
use mesh_core::{CertificateRecord, KeyId, Owner, Policy, ProfileName, Request, Serial};
use mesh_proto::v1::ErrorCode;
use mesh_runtime::SharedClock;
use tokio::sync::{Semaphore, oneshot};

use crate::authority::{Authority, CaRole, IssueProblem, LeafRequest, draw_serial};
use crate::directory::Directory;
use crate::limits::{CSR_BYTES_MAX, PREPARATIONS_MAX};
use crate::profiles::Profiles;
use crate::signers::{Signers, guarded};
use crate::status::Problem;
use crate::writer::{Committed, WriteError, Writer};

/// Verifies CSRs and signs leaves; no more than [`PREPARATIONS_MAX`] wait at a time.
#[derive(Debug, Clone)]
pub(crate) struct Issuing {
    authority: Arc<Authority>,
    directory: Arc<Directory>,
    clock: SharedClock,
    permits: Arc<Semaphore>,
    profiles: Arc<Profiles>,
    signers: Signers,
}

impl Issuing {
    /// Starts the threads that sign.
    pub(crate) fn new(
        authority: Arc<Authority>,
        directory: Arc<Directory>,
        clock: SharedClock,
    ) -> std::io::Result<Self> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let (permits, signers) = (Arc::new(Semaphore::new(PREPARATIONS_MAX)), Signers::start(cores)?);
        Ok(Self { authority, directory, clock, permits, profiles: Arc::default(), signers })
    }

    pub(crate) fn authority(&self) -> &Arc<Authority> {
        &self.authority
    }

    /// A custom profile that may issue: its sample was linted, now or before.
    pub(crate) async fn accept(
        &self,
        name: ProfileName,
        profile: Profile,
    ) -> Result<Arc<AcceptedProfile>, Problem> {
        let (profiles, authority) = (Arc::clone(&self.profiles), Arc::clone(&self.authority));
        let now = self.clock.utc_now();
        self.on_pool(move || {
            let accepted = profiles.accept(&name, &profile, authority.domain(), now);
            accepted.map_err(|why| {
                Problem::internal(format!("profile {name} of the policy in force is not sound: {why}"))
            })
        })
        .await
    }

    /// What is wrong with the custom profiles of a policy, one line each.
    pub(crate) async fn profile_problems(&self, policy: Policy) -> Result<Vec<String>, Problem> {
        if policy.profile.is_empty() {
            return Ok(Vec::new());
        }
        let (profiles, authority) = (Arc::clone(&self.profiles), Arc::clone(&self.authority));
        let now = self.clock.utc_now();
        let _turn = self.profiles.turn.lock().await;
        self.on_pool(move || Ok(profiles.problems(&policy, authority.domain(), now))).await
    }

    /// Parses a CSR and checks that its maker holds the key.
    pub(crate) async fn verify(&self, csr: Bytes) -> Result<Arc<VerifiedCsr>, Problem> {
        let issuing = self.clone();
        self.sign_on(move || issuing.check_csr(&csr).map(Arc::new)).await
    }

    /// Signs a leaf for a verified CSR. Nothing is recorded yet.
    pub(crate) async fn sign(
        &self,
        request: LeafRequest,
        csr: Arc<VerifiedCsr>,
    ) -> Result<CertificateRecord, Problem> {
        let issuing = self.clone();
        self.sign_on(move || issuing.issue(&request, SubjectKey::Csr(&csr))).await
    }

    /// Checks a CSR, signs for it and has the writer record it, in one turn of a signer's thread: `request` says
    /// what, from the CSR that was proved, and `command` what to record.
    pub(crate) async fn certify(
        &self,
        csr: Bytes,
        request: impl FnOnce(&VerifiedCsr) -> Result<LeafRequest, Problem> + Send + 'static,
        (writer, command): (&Writer, impl FnOnce(CertificateRecord) -> Request + Send + 'static),
    ) -> Result<Committed, Problem> {
        let _permit = self.permits.acquire().await.map_err(|_| Problem::stopping())?;
        let (answer, answered) = oneshot::channel();
        let (failed, failure) = oneshot::channel();
        let (issuing, writer, coming) = (self.clone(), writer.clone(), writer.announce());
        self.signers.spawn(move || {
            let prepared = guarded(|| {
                let csr = issuing.check_csr(&csr)?;
                let request = request(&csr)?;
                issuing.issue(&request, SubjectKey::Csr(&csr))
            });
            // Commit point: the answer comes once the record is durable.
            let sent = prepared.and_then(|certificate| Ok(writer.send(command(certificate), answer)?));
            if let Err(problem) = sent {
                // A caller that has gone needs no answer.
                let _ = failed.send(problem);
            }
            drop(coming);
        });
        match answered.await {
            Ok(outcome) => Ok(outcome?),
            // Refused before the writer, or by a writer that has ended.
            Err(_) => Err(failure.await.unwrap_or_else(|_| WriteError::Unknown.into())),
        }
    }

    /// Signs a leaf for a key of our own.
    pub(crate) async fn sign_own(
        &self,
        request: LeafRequest,
        key: Arc<LeafKey>,
    ) -> Result<CertificateRecord, Problem> {
        let issuing = self.clone();
        self.sign_on(move || issuing.issue(&request, SubjectKey::Own(&key))).await
    }

    /// Certifies a delegate for OCSP. Nothing is recorded yet.
    pub(crate) async fn certify_responder(
        &self,
        issuer: KeyId,
        owner: Owner,
    ) -> Result<(OcspResponder, CertificateRecord), Problem> {
        let (authority, now) = (Arc::clone(&self.authority), self.clock.utc_now());
        let (serial, place) = self.draw_place_of(&issuer);
        self.sign_on(move || {
            authority
                .certify_responder(&issuer, owner, (serial, &place), now)
                .map_err(|error| Problem::internal_error("cannot certify an OCSP delegate", &error))
        })
        .await
    }

    fn check_csr(&self, csr: &[u8]) -> Result<VerifiedCsr, Problem> {
        if csr.len() > CSR_BYTES_MAX {
            return Err(Problem::too_large("CSR", CSR_BYTES_MAX));
        }
        let verified = Csr::parse(csr)?.verify()?;
        if self.authority.is_own_key(&verified.key_hash()) {
            return Err(Problem::new(
                ErrorCode::KeyInUse,
                "the CSR's key belongs to a CA of this mesh",
                "make a new key and ask again",
            ));
        }
        Ok(verified)
    }

    fn issue(&self, request: &LeafRequest, key: SubjectKey<'_>) -> Result<CertificateRecord, Problem> {
        let (serial, place) = self.draw_place();
        Ok(self.authority.issue(request, key, (serial, &place), self.clock.utc_now())?)
    }

    /// A new serial and the CRL shard that it chooses.
    fn draw_place(&self) -> (SerialNumber, Place) {
        self.authority.catch_up(&self.directory);
        self.draw_place_of(&self.authority.issuer_key_id(CaRole::Issuing))
    }

    fn draw_place_of(&self, issuer: &KeyId) -> (SerialNumber, Place) {
        let serial = draw_serial();
        let place = self.directory.read(|world| world.place_for(issuer, &Serial(*serial.as_bytes())));
        (serial, place)
    }

    /// Runs work of the processor on a signer's thread.
    async fn sign_on<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, Problem> + Send + 'static,
    ) -> Result<T, Problem> {
        let _permit = self.permits.acquire().await.map_err(|_| Problem::stopping())?;
        self.signers.run(work).await
    }

    /// Runs work that waits for a disk, when a permit is free.
    pub(crate) async fn on_pool<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, Problem> + Send + 'static,
    ) -> Result<T, Problem> {
        let permit = Arc::clone(&self.permits).acquire_owned().await.map_err(|_| Problem::stopping())?;
        tokio::task::spawn_blocking(move || {
            let _permit = permit;
            work()
        })
        .await
        .map_err(|error| Problem::internal_error("preparation failed", &error))?
    }
}

/// Refuses a CSR that asks for a name it does not get. What it asks for is never a reason to give it.
pub(crate) fn check_requested_names(
    requested: &RequestedNames,
    names: &[mesh_core::DnsName],
    ips: &[IpAddr],
    uri: Option<&str>,
) -> Result<(), Problem> {
    let foreign = |name: &str| {
        let mut problem = Problem::new(
            ErrorCode::CsrForeignName,
            format!("the CSR asks for {name}, which this certificate does not get"),
            "make a CSR without names: the controller fills them in",
        );
        problem.facts = names.iter().map(|name| format!("would be issued: {name}")).collect();
        problem
    };
    let has = |name: &str| names.iter().any(|own| own.as_str() == name);
    for name in &requested.dns {
        if !has(name.as_str()) {
            return Err(foreign(name.as_str()));
        }
    }
    for ip in &requested.ips {
        if !ips.contains(ip) {
            return Err(foreign(&ip.to_string()));
        }
    }
    for found in &requested.uris {
        if uri != Some(found.as_str()) {
            return Err(foreign(found));
        }
    }
    match &requested.common_name {
        Some(name) if !has(&name.to_ascii_lowercase()) && uri != Some(name.as_str()) => Err(foreign(name)),
        _ => Ok(()),
    }
}

impl From<CsrError> for Problem {
    fn from(error: CsrError) -> Self {
        let code = match &error {
            CsrError::TooLarge(_) | CsrError::TooManyNames => ErrorCode::TooLarge,
            CsrError::Signature => ErrorCode::CsrSignature,
            CsrError::Key(_) | CsrError::SignatureAlgorithm => ErrorCode::KeyWeak,
            CsrError::AsksForCa | CsrError::KeyUsage => ErrorCode::CsrNotALeaf,
            CsrError::Name { source: mesh_ca::NameError::Wildcard, .. } => ErrorCode::NameWildcard,
            CsrError::Name { .. } | CsrError::NameType | CsrError::Uri | CsrError::IpLength(_) => {
                ErrorCode::CsrForeignName
            }
            _ => ErrorCode::CsrInvalid,
        };
        Self::new(
            code,
            mesh_runtime::chain(&error),
            "make a new CSR with an ECDSA P-256 key and no extensions but names",
        )
    }
}

impl From<IssueProblem> for Problem {
    fn from(error: IssueProblem) -> Self {
        match &error {
            IssueProblem::Name(source) => Self::new(
                match source {
                    mesh_ca::NameError::Wildcard => ErrorCode::NameWildcard,
                    _ => ErrorCode::NameInvalid,
                },
                mesh_runtime::chain(&error),
                "choose a plain host name below the mesh's domain",
            ),
            IssueProblem::Profile(refusal) => Self::new(
                ErrorCode::CertificateInvalid,
                mesh_runtime::chain(refusal),
                "ask for names that fit the profile; `meshctl cert issue --dry-run --explain` shows its rules",
            ),
            IssueProblem::Issue(mesh_ca::IssueError::Template(template)) => Self::new(
                ErrorCode::CertificateInvalid,
                mesh_runtime::chain(template),
                "ask for a profile and names that fit each other",
            ),
            IssueProblem::Issue(mesh_ca::IssueError::IssuerEnds(at)) => Self::new(
                ErrorCode::CertificateInvalid,
                format!("the issuing CA ends at {at}"),
                "renew the issuing CA",
            ),
            IssueProblem::Pointers(source) => {
                Self::internal_error("the certificate cannot say where its CRL is", source)
            }
            IssueProblem::Issue(mesh_ca::IssueError::KeyStore(source)) => {
                Self::key_store("issue the certificate", source)
            }
            IssueProblem::NoKey => Self::internal_error("certificate was not issued", &error),
            IssueProblem::Issue(other) => Self::internal_error("certificate was not issued", other),
        }
    }
}
