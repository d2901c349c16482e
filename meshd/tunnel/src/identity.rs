//! Who we are: one private key, and during a change of keys a second one beside it.

use std::sync::Arc;

use boringtun::noise::rate_limiter::RateLimiter;

use crate::key::{PrivateKey, PublicKey};

/// One private key, and the limiter whose MACs and cookies depend on it.
pub(crate) struct Identity {
    pub(crate) private: PrivateKey,
    pub(crate) public: PublicKey,
    /// Judges every handshake message before anything expensive is done for it.
    pub(crate) limiter: RateLimiter,
    /// For the peers' own state machines, which get only what `limiter` has let through.
    pub(crate) unlimited: Arc<RateLimiter>,
    pub(crate) limit: u64,
}

impl Identity {
    /// `limit` is in handshake messages per second.
    pub(crate) fn new(private: PrivateKey, limit: u64) -> Self {
        let public = private.public();
        let limiter = |limit| RateLimiter::new(&public.to_x25519(), limit);
        Self { limiter: limiter(limit), unlimited: Arc::new(limiter(u64::MAX)), private, public, limit }
    }

    /// The same key with another limit. Outstanding cookies become void, which costs their holders one
    /// more round trip.
    pub(crate) fn with_limit(&self, limit: u64) -> Self {
        let limiter = RateLimiter::new(&self.public.to_x25519(), limit);
        let (private, unlimited) = (self.private.clone(), self.unlimited.clone());
        Self { private, public: self.public, limiter, unlimited, limit }
    }
}

/// The key in use, and the one that is to follow it.
#[derive(Clone)]
pub(crate) struct Identities {
    pub(crate) current: Arc<Identity>,
    pub(crate) next: Option<Arc<Identity>>,
}

impl Identities {
    pub(crate) fn new(private: PrivateKey, limit: u64) -> Self {
        Self { current: Arc::new(Identity::new(private, limit)), next: None }
    }

    /// Both, the one in use first.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Arc<Identity>> {
        std::iter::once(&self.current).chain(&self.next)
    }
}
