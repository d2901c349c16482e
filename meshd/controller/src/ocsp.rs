//! OCSP: a delegate of each issuing CA answers from World; answers are signed once and kept until half of their life.
//!
//! A signed answer without a nonce is the same for everybody, so it is cached by serial and hash. Signing on demand, for a nonce or a
//! serial that was never issued, is bounded: beyond that a cached answer goes out without the nonce, which RFC 9654 §2.1
//! allows, or the failure tryLater.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use bytes::Bytes;
use mesh_ca::{
    CertIdHash, OCSP_RESPONSE_LIFETIME, OcspAnswer, OcspError, OcspFailure, OcspQuery, OcspRequestError,
    OcspResponder, OcspStatus,
};
use mesh_core::{Command, KeyId, Owner, Serial, UtcTime};
use mesh_runtime::{SharedClock, ShutdownToken};
use time::UtcDateTime;
use tokio::sync::Semaphore;

use crate::authority::{CaRole, ocsp_status};
use crate::directory::Directory;
use crate::issuer::Issuing;
use crate::limits::{OCSP_CACHE_MAX, OCSP_SIGNERS_MAX};
use crate::status::Problem;
use crate::upkeep::keep_fresh;
use crate::writer::Writer;

/// An answer as it goes out.
#[derive(Debug, Clone)]
pub(crate) struct OcspReply {
    pub(crate) der: Bytes,
    /// thisUpdate and nextUpdate of what a cache may keep; `None` for failures, nonces and unknown serials.
    pub(crate) life: Option<(UtcTime, UtcTime)>,
}

#[derive(Debug)]
pub(crate) struct Ocsp {
    directory: Arc<Directory>,
    writer: Writer,
    issuing: Issuing,
    clock: SharedClock,
    controller: String,
    delegates: RwLock<BTreeMap<KeyId, Arc<Delegate>>>,
    cache: Mutex<Cache>,
    signers: Arc<Semaphore>,
}

#[derive(Debug)]
struct Delegate {
    issuer: KeyId,
    responder: OcspResponder,
    renew_at: UtcTime,
}

type CacheKey = (KeyId, Serial, CertIdHash);

#[derive(Debug, Clone)]
struct Cached {
    der: Bytes,
    status: OcspStatus,
    this_update: UtcTime,
    next_update: UtcTime,
    /// Half of its life is over.
    stale_at: UtcTime,
}

/// Two generations: when the young one is full it becomes the old one, and what is asked for again moves over.
#[derive(Debug, Default)]
struct Cache {
    young: HashMap<CacheKey, Cached>,
    old: HashMap<CacheKey, Cached>,
}

impl Cache {
    fn find(&mut self, key: &CacheKey) -> Option<Cached> {
        if let Some(found) = self.young.get(key) {
            return Some(found.clone());
        }
        let found = self.old.remove(key)?;
        self.keep(key.clone(), found.clone());
        Some(found)
    }

    fn keep(&mut self, key: CacheKey, cached: Cached) {
        if self.young.len() >= OCSP_CACHE_MAX / 2 {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(key, cached);
    }
}

impl Ocsp {
    pub(crate) fn new(
        directory: Arc<Directory>,
        writer: Writer,
        issuing: Issuing,
        (clock, controller): (SharedClock, String),
    ) -> Self {
        Self {
            directory,
            writer,
            issuing,
            clock,
            controller,
            delegates: RwLock::default(),
            cache: Mutex::default(),
            signers: Arc::new(Semaphore::new(OCSP_SIGNERS_MAX)),
        }
    }

    /// Certifies a delegate for each issuing CA that has none, or an old one.
    pub(crate) async fn refresh(&self) -> Result<(), Problem> {
        self.issuing.authority().catch_up(&self.directory);
        let issuers = self.issuing.authority().crl_issuers();
        self.delegates
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|known, _| issuers.iter().any(|(issuer, _)| issuer == known));
        for (issuer, role) in issuers {
            let now = UtcTime::from(self.clock.utc_now());
            if role == CaRole::Issuing
                && self.delegate(&issuer).is_none_or(|delegate| delegate.renew_at <= now)
            {
                match self.certify(issuer.clone()).await {
                    // The last certificate of a dropped CA may have ended with this very record.
                    Err(problem) if !self.directory.read(|world| world.is_trusted(&issuer)) => {
                        tracing::info!(%issuer, why = problem.why, "a dropped CA needs no OCSP delegate any more");
                    }
                    certified => certified?,
                }
            }
        }
        Ok(())
    }

    /// Keeps the delegates fresh until shutdown.
    pub(crate) async fn run(&self, shutdown: ShutdownToken) {
        keep_fresh("OCSP delegate was not renewed", || self.refresh(), None, shutdown).await;
    }

    /// Answers what somebody sent.
    pub(crate) async fn answer(&self, asked: Result<OcspQuery, OcspRequestError>) -> OcspReply {
        let query = match asked {
            Ok(query) => query,
            Err(OcspRequestError::Hash) => return failure(OcspFailure::Unauthorized),
            Err(_) => return failure(OcspFailure::MalformedRequest),
        };
        let Some(delegate) = self.asked(&query) else { return failure(OcspFailure::Unauthorized) };
        let (status, now) = (self.status(&delegate.issuer, query.serial()), self.clock.utc_now());
        let key = query
            .serial()
            .filter(|_| status != OcspStatus::Unknown)
            .map(|serial| (delegate.issuer.clone(), Serial(*serial.as_bytes()), query.hash()));
        let cached = key.as_ref().and_then(|key| self.cached(key, status, now.into()));
        match (&cached, query.nonce()) {
            (Some(cached), None) => return cached.clone(),
            (None, None) if key.is_some() => {}
            // Whoever wants a signature of their own waits for none: what there is goes out.
            _ if self.signers.available_permits() == 0 => {
                return cached.unwrap_or_else(|| failure(OcspFailure::TryLater));
            }
            _ => {}
        }
        let has_nonce = query.nonce().is_some();
        let signed =
            self.sign(delegate, status, now, move |delegate, answer| delegate.answer(&query, answer)).await;
        match (signed, key) {
            (Some(signed), Some(key)) if !has_nonce => self.remember(key, signed),
            (Some(signed), _) => OcspReply { der: signed.der, life: None },
            (None, _) => cached.unwrap_or_else(|| failure(OcspFailure::TryLater)),
        }
    }

    /// The response for a certificate of ours, to be stapled; SHA-1, as TLS clients look for it.
    pub(crate) async fn staple(&self, serial: Serial) -> Option<OcspReply> {
        let issuer =
            self.directory.read(|world| world.certificate(&serial).map(|c| c.issuer_key_id.clone()))?;
        let (delegate, now) = (self.delegate(&issuer)?, self.clock.utc_now());
        let number = mesh_ca::SerialNumber::from_slice(&serial.0).ok()?;
        let status = self.status(&issuer, Some(number));
        let key = (issuer, serial, CertIdHash::Sha1);
        if let Some(cached) = self.cached(&key, status, now.into()) {
            return Some(cached);
        }
        let presign = move |delegate: &OcspResponder, answer: &OcspAnswer| {
            delegate.presign(&number, CertIdHash::Sha1, answer)
        };
        self.sign(delegate, status, now, presign).await.map(|signed| self.remember(key, signed))
    }

    fn status(&self, issuer: &KeyId, serial: Option<mesh_ca::SerialNumber>) -> OcspStatus {
        let Some(serial) = serial else { return OcspStatus::Unknown };
        self.directory.read(|world| {
            let known = world.certificate(&Serial(*serial.as_bytes()));
            match known.filter(|known| known.issuer_key_id == *issuer) {
                Some(known) => ocsp_status(known.revoked),
                None => OcspStatus::Unknown,
            }
        })
    }

    fn cached(&self, key: &CacheKey, status: OcspStatus, now: UtcTime) -> Option<OcspReply> {
        let cached = self.cache.lock().unwrap_or_else(PoisonError::into_inner).find(key)?;
        // What was revoked since, or has lived for half of its time, is signed anew.
        (cached.status == status && now < cached.stale_at).then(|| cached.reply())
    }

    fn remember(&self, key: CacheKey, signed: Cached) -> OcspReply {
        let reply = signed.reply();
        self.cache.lock().unwrap_or_else(PoisonError::into_inner).keep(key, signed);
        reply
    }

    async fn sign(
        &self,
        delegate: Arc<Delegate>,
        status: OcspStatus,
        now: UtcDateTime,
        sign: impl FnOnce(&OcspResponder, &OcspAnswer) -> Result<Vec<u8>, OcspError> + Send + 'static,
    ) -> Option<Cached> {
        let permit = Arc::clone(&self.signers).acquire_owned().await.ok()?;
        let signed = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            let left = delegate.responder.not_after() - now;
            let lifetime = OCSP_RESPONSE_LIFETIME.min(left.try_into().unwrap_or(Duration::ZERO));
            let answer = OcspAnswer::new(status, now, lifetime);
            let der = sign(&delegate.responder, &answer)?;
            Ok::<_, OcspError>(Cached {
                der: der.into(),
                status,
                this_update: answer.this_update.into(),
                next_update: answer.next_update.into(),
                stale_at: UtcTime::from(now) + lifetime / 2,
            })
        })
        .await;
        match signed {
            Ok(Ok(signed)) => Some(signed),
            Ok(Err(error)) => {
                tracing::error!(error = mesh_runtime::chain(&error), "OCSP response was not signed");
                None
            }
            Err(error) => {
                tracing::error!(%error, "OCSP response was not signed");
                None
            }
        }
    }

    fn asked(&self, query: &OcspQuery) -> Option<Arc<Delegate>> {
        let delegates = self.delegates.read().unwrap_or_else(PoisonError::into_inner);
        delegates.values().find(|delegate| delegate.responder.issuer().is_asked(query)).cloned()
    }

    fn delegate(&self, issuer: &KeyId) -> Option<Arc<Delegate>> {
        self.delegates.read().unwrap_or_else(PoisonError::into_inner).get(issuer).cloned()
    }

    async fn certify(&self, issuer: KeyId) -> Result<(), Problem> {
        let owner = Owner::Controller { name: self.controller.clone() };
        let (responder, record) = self.issuing.certify_responder(issuer.clone(), owner).await?;
        let renew_at = record.not_before + record.not_after.since(record.not_before) / 3;
        // Commit point: no response leaves before its signer is recorded.
        self.writer.submit_own(Command::RecordResponder { certificate: record.clone() }).await?;
        tracing::info!(%issuer, serial = %record.serial, not_after = %record.not_after, "OCSP delegate certified");
        let delegate = Arc::new(Delegate { issuer: issuer.clone(), responder, renew_at });
        self.delegates.write().unwrap_or_else(PoisonError::into_inner).insert(issuer, delegate);
        Ok(())
    }
}

impl Cached {
    fn reply(&self) -> OcspReply {
        OcspReply { der: self.der.clone(), life: Some((self.this_update, self.next_update)) }
    }
}

fn failure(failure: OcspFailure) -> OcspReply {
    OcspReply { der: Bytes::copy_from_slice(&failure.to_der()), life: None }
}
