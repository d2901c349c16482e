//! The identity in use, its renewal, and Resume.
//!
//! A renewed identity is stored beside the old one and used; only when the controller has served it is the
//! old one forgotten. If it is refused, the old one is still there.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mesh_ca::Csr;
use mesh_proto::v1 as pb;
use mesh_proto::v1::ErrorCode;
use mesh_proto::v1::renewal_client::RenewalClient;
use mesh_runtime::Backoff;
use time::UtcDateTime;
use tokio::sync::watch;
use tonic::Request;
use tonic::transport::Channel;

use crate::clock::ControllerClock;
use crate::failure::Failure;
use crate::findings::{Findings, Severity};
use crate::join::{
    agrees_with_leaf, check_identity, leaf_key, new_tls_key, new_wireguard_key, wireguard_key,
};
use crate::limits::{CALL_TIMEOUT, RETRY_FIRST, RETRY_LONGEST};
use crate::pki;
use crate::schedule::{assigned, renews_at};
use crate::state::{Der, Identity, RenewalRequest, StateDir};

/// The wall clock is looked at this often, since it may jump.
const CLOCK_CHECK: Duration = Duration::from_secs(20);
/// A renewal to follow a change of issuing CA is repeated at most this often.
const MOVE_PAUSE: Duration = Duration::from_secs(20);
/// An order to rotate keys is carried out at most this often, until the controller takes it back.
const ROTATION_PAUSE: Duration = Duration::from_secs(60);

/// Which WireGuard keys the next certificate shall list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Keys {
    /// Those of the certificate before.
    Keep,
    /// A new one, and the newest one before.
    Rotate,
    /// The newest one alone: it is the only one in use.
    Shed,
}

/// An identity with what its certificate says.
pub(crate) struct Active {
    pub(crate) identity: Identity,
    pub(crate) serial: Vec<u8>,
    /// Key identifier of the CA that signed it.
    pub(crate) issuer: Vec<u8>,
    pub(crate) not_after: UtcDateTime,
    pub(crate) renews_at: UtcDateTime,
    /// The newest public key.
    pub(crate) wireguard_key: [u8; 32],
}

impl Active {
    fn new(identity: Identity) -> Result<Self, Failure> {
        let unbelievable = |why: String| {
            Failure::new(
                ErrorCode::StateCorrupt,
                format!("the stored identity cannot be believed: {why}"),
                "restore the state folder from a backup, or move it away and enroll again",
            )
        };
        let leaf = pki::read_own(&identity).map_err(|error| unbelievable(mesh_runtime::chain(&error)))?;
        // What stands beside the certificate is used to set up this host: it must not say anything else.
        if !agrees_with_leaf(&identity, &leaf)? {
            return Err(unbelievable("its certificate says something else".to_owned()));
        }
        let newest = identity.wireguard_keys.first();
        let newest = newest.ok_or_else(|| unbelievable("it has no WireGuard key".to_owned()))?;
        Ok(Self {
            serial: leaf.serial.as_bytes().to_vec(),
            issuer: leaf.issuer_key_id.as_bytes().to_vec(),
            not_after: leaf.chain_not_after,
            wireguard_key: wireguard_key(newest)?.public().0,
            renews_at: assigned(identity.renew_at, leaf.not_before, leaf.not_after)
                .unwrap_or_else(|| renews_at(leaf.not_before, leaf.not_after, leaf.serial.as_bytes())),
            identity,
        })
    }

    /// Whether another CA issues now: this identity is about to be trusted by nobody.
    pub(crate) fn is_of_retiring_issuer(&self) -> bool {
        !self.identity.active_issuer.is_empty() && self.issuer != self.identity.active_issuer
    }

    pub(crate) fn has_expired(&self, now: UtcDateTime) -> bool {
        now > self.not_after
    }
}

/// The identity in use, shared by all parts that need it.
pub(crate) struct Identities {
    state: StateDir,
    clock: ControllerClock,
    findings: Findings,
    active: watch::Sender<Arc<Active>>,
    /// The one before the active one, until the active one is proved.
    fallback: Mutex<Option<Arc<Active>>>,
}

impl Identities {
    /// Reads what is on disk; `None` if this machine is not enrolled.
    pub(crate) fn load(
        state: &StateDir,
        clock: &ControllerClock,
        findings: &Findings,
    ) -> Result<Option<Self>, Failure> {
        let Some(current) = state.identity()? else { return Ok(None) };
        let current = Arc::new(Active::new(current)?);
        let next = state.next_identity()?.map(Active::new).transpose()?.map(Arc::new);
        let (active, fallback) = match next {
            Some(next) => (next, Some(current)),
            None => (current, None),
        };
        Ok(Some(Self {
            state: state.clone(),
            clock: clock.clone(),
            findings: findings.clone(),
            active: watch::Sender::new(active),
            fallback: Mutex::new(fallback),
        }))
    }

    pub(crate) fn active(&self) -> Arc<Active> {
        self.active.borrow().clone()
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<Arc<Active>> {
        self.active.subscribe()
    }

    /// The controller has served `used`: what came before it is not needed any more.
    pub(crate) fn prove(&self, used: &Active) -> Result<(), Failure> {
        let mut fallback = self.fallback.lock().unwrap_or_else(PoisonError::into_inner);
        if fallback.is_none() || used.serial != self.active().serial {
            return Ok(());
        }
        // What was learned meanwhile about roots belongs to it.
        self.state.save_identity(&self.active().identity)?;
        self.state.forget_next_identity()?;
        *fallback = None;
        tracing::info!(serial = hex::encode(&used.serial), "new identity proved, the old one is forgotten");
        Ok(())
    }

    /// The controller does not know the renewed identity: back to the one before. `false` if there is none.
    pub(crate) fn fall_back(&self) -> Result<bool, Failure> {
        let mut fallback = self.fallback.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(before) = fallback.take() else { return Ok(false) };
        self.state.forget_next_identity()?;
        tracing::warn!(serial = hex::encode(&before.serial), "renewed identity refused, the old one is used");
        self.active.send_replace(before);
        Ok(true)
    }

    /// Takes up what the controller says is to be trusted, as far as the roots that are here lead to it. On disk
    /// when this returns; `None` if it is nothing new.
    ///
    /// # Errors
    /// No root of it can be reached, or this node's own certificate would not verify with it: nothing has changed.
    pub(crate) fn take_bundle(&self, bundle: &pb::TrustBundle) -> Result<Option<Arc<Active>>, Failure> {
        let refused = |why: String| {
            Failure::new(
                ErrorCode::ControllerNotTrusted,
                format!("the controller's new roots are not believed: {why}"),
                "compare `meshctl ca fingerprint` on the controller with this node's; nothing was changed here",
            )
        };
        let mut fallback = self.fallback.lock().unwrap_or_else(PoisonError::into_inner);
        let active = self.active();
        if active.identity.bundle == bundle.version && active.identity.active_issuer == bundle.issuer_key_id {
            return Ok(None);
        }
        let renewed = |before: &Active| -> Result<Active, Failure> {
            let roots = &before.identity.roots;
            let next = pki::with_bundle(&before.identity, roots, bundle, self.clock.now())
                .map_err(|error| refused(mesh_runtime::chain(&error)))?;
            Active::new(next).map_err(|failure| refused(failure.why))
        };
        let next = Arc::new(renewed(&active)?);
        if next.identity.bundle != bundle.version {
            tracing::warn!(
                version = bundle.version,
                "a new root is not vouched for by one that is trusted; it is left out"
            );
        }
        match fallback.as_ref() {
            Some(before) => {
                let before = Arc::new(renewed(before)?);
                self.state.save_identity(&before.identity)?;
                self.state.save_next_identity(&next.identity)?;
                *fallback = Some(before);
            }
            None => self.state.save_identity(&next.identity)?,
        }
        drop(fallback);
        if next.identity.root_pin != active.identity.root_pin {
            tracing::warn!(root = hex::encode(next.identity.root_pin), "the pinned root has moved on");
        }
        tracing::info!(version = bundle.version, "bundle of roots and issuing CAs taken up");
        self.active.send_replace(next.clone());
        Ok(Some(next))
    }

    /// Renews whenever a third of the life is over or the controller orders new keys, for as long as it runs.
    pub(crate) async fn keep_renewed(
        self: Arc<Self>,
        mut channel: watch::Receiver<Option<Channel>>,
        mut own: watch::Receiver<pb::Own>,
        mut settled_key: watch::Receiver<Option<[u8; 32]>>,
    ) {
        let mut retry = Backoff::new(RETRY_FIRST, RETRY_LONGEST);
        let mut active = self.subscribe();
        let mut rotated: Option<tokio::time::Instant> = None;
        let mut moved: Option<tokio::time::Instant> = None;
        loop {
            let now = self.clock.now();
            let current = active.borrow_and_update().clone();
            let asked = own.borrow_and_update().rotate_keys
                && rotated.is_none_or(|at| at.elapsed() >= ROTATION_PAUSE);
            let settled = *settled_key.borrow_and_update() == Some(current.wireguard_key);
            let keys = match (settled, asked, current.identity.wireguard_keys.len() > 1) {
                (true, true, _) => Keys::Rotate,
                (true, false, true) => Keys::Shed,
                _ => Keys::Keep,
            };
            let moves = current.is_of_retiring_issuer() && moved.is_none_or(|at| at.elapsed() >= MOVE_PAUSE);
            let due = keys != Keys::Keep || moves || now >= current.renews_at;
            let connected = channel.borrow_and_update().clone();
            // An expired identity is the uplink's: it may do nothing but Resume.
            if let (true, Some(channel), false) = (due, connected, current.has_expired(now)) {
                match self.renew(&channel, keys, false).await {
                    Ok(()) => {
                        retry.reset();
                        self.findings.clear("identity/renewal");
                        rotated = (keys == Keys::Rotate).then(tokio::time::Instant::now).or(rotated);
                        moved = moves.then(tokio::time::Instant::now).or(moved);
                        continue;
                    }
                    Err(failure) => {
                        self.findings.raise_failure("identity/renewal", "this node's identity", &failure);
                        tokio::time::sleep(retry.next_wait() + RETRY_FIRST).await;
                        continue;
                    }
                }
            }
            if due && now > current.renews_at + (current.not_after - current.renews_at) / 2 {
                self.findings.raise(
                    "identity/late",
                    Severity::Bad,
                    "this node's identity",
                    format!("renewal is late, the certificate ends at {}", current.not_after),
                    "check that the controller can be reached",
                );
            } else {
                self.findings.clear("identity/late");
            }
            tokio::select! {
                () = tokio::time::sleep(CLOCK_CHECK) => {}
                changed = active.changed() => if changed.is_err() { return },
                changed = channel.changed() => if changed.is_err() { return },
                changed = own.changed() => if changed.is_err() { return },
                changed = settled_key.changed() => if changed.is_err() { return },
            }
        }
    }

    /// Gets a new certificate for an expired one.
    pub(crate) async fn resume(&self, channel: &Channel) -> Result<(), Failure> {
        self.renew(channel, Keys::Keep, true).await
    }

    async fn renew(&self, channel: &Channel, keys: Keys, resume: bool) -> Result<(), Failure> {
        let active = self.active();
        let request = self.request(&active.identity, keys)?;
        let wireguard_public_keys = request
            .wireguard_keys
            .iter()
            .map(|key| wireguard_key(key).map(|key| key.public().0.to_vec().into()))
            .collect::<Result<_, _>>()?;
        let mut call = Request::new(pb::RenewRequest {
            csr: request.csr.0.clone().into(),
            wireguard_public_keys,
            operation_id: request.operation_id.to_vec().into(),
        });
        call.set_timeout(CALL_TIMEOUT);
        let mut client = RenewalClient::new(channel.clone());
        let answer = match resume {
            true => client.resume(call).await,
            false => client.renew(call).await,
        };
        let answer = match answer {
            Ok(answer) => answer.into_inner(),
            Err(status) => {
                let failure = Failure::from_status(&status);
                // A request that was refused for good must not be asked for ever.
                if failure.exit != 5 {
                    self.state.forget_renewal()?;
                }
                return Err(failure);
            }
        };
        self.accept(&active, &request, answer)
    }

    /// The request that is on disk already, or a new one, on disk before it is sent.
    fn request(&self, identity: &Identity, keys: Keys) -> Result<RenewalRequest, Failure> {
        if let Some(stored) = self.state.renewal()? {
            return Ok(stored);
        }
        let tls_key = new_tls_key()?;
        let csr = Csr::create(&leaf_key(&tls_key)?)
            .map_err(|error| Failure::internal("cannot make a CSR", &error))?;
        let newest = identity.wireguard_keys.first().cloned();
        let wireguard_keys = match keys {
            // Both stand in the certificate: peers have sessions under the new one before the old one goes.
            Keys::Rotate => std::iter::once(new_wireguard_key()).chain(newest).collect(),
            Keys::Shed => newest.into_iter().collect(),
            Keys::Keep => identity.wireguard_keys.clone(),
        };
        let request = RenewalRequest {
            operation_id: mesh_runtime::random_bytes(),
            csr: Der(csr),
            tls_key,
            wireguard_keys,
        };
        self.state.save_renewal(&request)?;
        Ok(request)
    }

    fn accept(
        &self,
        active: &Active,
        request: &RenewalRequest,
        answer: pb::NodeIdentity,
    ) -> Result<(), Failure> {
        let unclear = |why: &str| {
            Failure::new(
                ErrorCode::CertificateInvalid,
                format!("the renewed identity cannot be believed: {why}"),
                "look at the controller's log",
            )
        };
        let before = &active.identity;
        let (tls_key, wireguard_keys) = (request.tls_key.clone(), request.wireguard_keys.clone());
        let bundle = answer.trust.clone();
        let mut next = Identity::from_answer(answer, before.root_pin, tls_key, wireguard_keys)
            .ok_or_else(|| unclear("a field is missing"))?;
        // The lists of the answer are from before its bundle; what they lead to is the same.
        if let Some(bundle) = &bundle {
            next = pki::with_bundle(&next, &before.roots, bundle, self.clock.now())
                .map_err(|error| unclear(&mesh_runtime::chain(&error)))?;
        } else {
            next.lineage.clone_from(&before.lineage);
        }
        if next.name != before.name
            || next.node_id != before.node_id
            || next.trust_domain != before.trust_domain
        {
            return Err(unclear("it is for another node"));
        }
        if next.controllers.is_empty() {
            next.controllers.clone_from(&before.controllers);
        }
        check_identity(&next, &self.clock)?;
        let next = Arc::new(Active::new(next)?);
        self.state.save_next_identity(&next.identity)?;
        self.state.forget_renewal()?;
        let mut fallback = self.fallback.lock().unwrap_or_else(PoisonError::into_inner);
        // An unproved one in between was never needed by anybody else.
        if fallback.is_none() {
            *fallback = Some(self.active());
        }
        drop(fallback);
        tracing::info!(serial = hex::encode(&next.serial), not_after = %next.not_after, "identity renewed");
        self.active.send_replace(next);
        Ok(())
    }
}
