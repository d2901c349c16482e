//! CRLs: signed after every revocation, recorded, then published; signed anew before they age.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use bytes::Bytes;
use mesh_core::{Command, KeyId, Serial, UtcTime};
use mesh_proto::v1 as pb;
use mesh_runtime::{Backoff, SharedClock, ShutdownToken};
use sha2::{Digest as _, Sha256};

use crate::authority::{CaRole, crl_entry};
use crate::directory::Directory;
use crate::failpoint;
use crate::issuer::Issuing;
use crate::limits::{CRL_RESIGN_AFTER, ROOT_CRL_RESIGN_BEFORE};
use crate::state::{read_file, replace_file};
use crate::status::Problem;
use crate::writer::Writer;

/// The one CRL of an issuer so far; certificates carry it from issuance on.
const SHARD: u16 = 0;
/// How often the age of the CRLs is looked at.
const CHECK_INTERVAL: Duration = Duration::from_secs(60);

/// A CRL that is recorded and may be handed out.
#[derive(Debug, Clone)]
pub(crate) struct PublishedCrl {
    pub(crate) issuer: KeyId,
    pub(crate) shard: u16,
    pub(crate) number: u64,
    pub(crate) der: Bytes,
}

/// Signs, records and hands out CRLs.
#[derive(Debug)]
pub(crate) struct Publisher {
    directory: Arc<Directory>,
    writer: Writer,
    issuing: Issuing,
    clock: SharedClock,
    folder: PathBuf,
    /// Signed CRLs by issuer and number; only the one that World names is published.
    signed: RwLock<BTreeMap<KeyId, BTreeMap<u64, Signed>>>,
    /// One CRL is made at a time; whoever waits finds its revocation covered.
    turn: tokio::sync::Mutex<()>,
    /// What the failpoint keeps handing out.
    frozen: RwLock<Option<Vec<PublishedCrl>>>,
}

#[derive(Debug, Clone)]
struct Signed {
    der: Bytes,
    listed: BTreeSet<Serial>,
}

impl Publisher {
    pub(crate) fn new(
        directory: Arc<Directory>,
        writer: Writer,
        issuing: Issuing,
        (clock, folder): (SharedClock, PathBuf),
    ) -> Self {
        Self {
            directory,
            writer,
            issuing,
            clock,
            folder,
            signed: RwLock::default(),
            turn: tokio::sync::Mutex::default(),
            frozen: RwLock::default(),
        }
    }

    /// Takes up the CRLs on disk, and makes those that are missing, damaged or old.
    pub(crate) async fn start(&self) -> Result<(), Problem> {
        for role in [CaRole::Root, CaRole::Issuing] {
            self.load(role);
        }
        self.refresh().await?;
        if failpoint::CRL_PUSH_DISABLED.is_set() {
            let now = self.published();
            *self.frozen.write().unwrap_or_else(PoisonError::into_inner) = Some(now);
        }
        Ok(())
    }

    /// Keeps the CRLs fresh and complete until shutdown.
    pub(crate) async fn run(&self, shutdown: ShutdownToken) {
        let mut head = self.directory.watch();
        let mut backoff = Backoff::new(Duration::from_secs(1), CHECK_INTERVAL);
        loop {
            let wait = match self.refresh().await {
                Ok(()) => {
                    backoff.reset();
                    CHECK_INTERVAL
                }
                Err(problem) => {
                    tracing::error!(why = problem.why, "CRLs could not be refreshed; trying again");
                    backoff.next_wait()
                }
            };
            let failing = backoff.attempts() > 0;
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(wait) => {}
                changed = head.changed(), if !failing => if changed.is_err() { return },
            }
        }
    }

    /// Makes sure that the issuing CA's CRL covers every revocation up to record `seq`, and returns
    /// its number.
    pub(crate) async fn ensure_covers(&self, seq: u64) -> Result<u64, Problem> {
        let _turn = self.turn.lock().await;
        let issuer = self.issuing.authority().issuer_key_id(CaRole::Issuing);
        let current = self.directory.read(|world| world.crl(&issuer, SHARD).cloned());
        match current {
            Some(crl) if crl.covers_seq >= seq => Ok(crl.number),
            _ => self.make(CaRole::Issuing).await,
        }
    }

    /// The newest recorded CRL of each issuer, issuing CA first.
    pub(crate) fn published(&self) -> Vec<PublishedCrl> {
        if let Some(frozen) = &*self.frozen.read().unwrap_or_else(PoisonError::into_inner) {
            return frozen.clone();
        }
        // One lock after the other, never both: readers of each wait behind its writers.
        let roles = [CaRole::Issuing, CaRole::Root];
        let issuers = roles.map(|role| self.issuing.authority().issuer_key_id(role));
        let numbers = self
            .directory
            .read(|world| issuers.each_ref().map(|issuer| world.last_crl_number(issuer, SHARD)));
        let signed = self.signed.read().unwrap_or_else(PoisonError::into_inner);
        issuers
            .into_iter()
            .zip(numbers)
            .filter_map(|(issuer, number)| {
                let der = signed.get(&issuer)?.get(&number)?.der.clone();
                Some(PublishedCrl { issuer, shard: SHARD, number, der })
            })
            .collect()
    }

    /// What streams tell nodes about the published CRLs.
    pub(crate) fn haves(&self) -> Vec<pb::CrlHave> {
        self.published()
            .into_iter()
            .map(|crl| pb::CrlHave {
                issuer_key_id: crl.issuer.0.into(),
                shard: crl.shard.into(),
                number: crl.number,
            })
            .collect()
    }

    /// The published CRLs with their content.
    pub(crate) fn messages(&self) -> Vec<pb::Crl> {
        self.published()
            .into_iter()
            .map(|crl| pb::Crl {
                issuer_key_id: crl.issuer.0.into(),
                shard: crl.shard.into(),
                number: crl.number,
                der: crl.der,
            })
            .collect()
    }

    /// How many certificates the published CRL of `issuer` lists.
    pub(crate) fn entries_of(&self, issuer: &[u8], number: u64) -> usize {
        let signed = self.signed.read().unwrap_or_else(PoisonError::into_inner);
        let all = signed.iter().find(|(known, _)| known.0 == issuer);
        all.and_then(|(_, all)| all.get(&number)).map_or(0, |crl| crl.listed.len())
    }

    async fn refresh(&self) -> Result<(), Problem> {
        let _turn = self.turn.lock().await;
        let now = UtcTime::from(self.clock.utc_now());
        for role in [CaRole::Root, CaRole::Issuing] {
            if self.is_due(role, now) {
                self.make(role).await?;
            }
        }
        Ok(())
    }

    /// Whether the CRL is missing, lacks a revocation, or is old enough to be signed anew.
    fn is_due(&self, role: CaRole, now: UtcTime) -> bool {
        let issuer = self.issuing.authority().issuer_key_id(role);
        let (state, entries) = self
            .directory
            .read(|world| (world.crl(&issuer, SHARD).cloned(), world.revoked_entries(&issuer, SHARD)));
        let Some(state) = state else { return true };
        let signed = self.signed.read().unwrap_or_else(PoisonError::into_inner);
        let Some(current) = signed.get(&issuer).and_then(|all| all.get(&state.number)) else {
            return true;
        };
        let complete = entries.iter().all(|(serial, ..)| current.listed.contains(serial));
        let aged = match role {
            CaRole::Issuing => now.since(state.this_update) >= CRL_RESIGN_AFTER,
            CaRole::Root => state.next_update.since(now) <= ROOT_CRL_RESIGN_BEFORE,
        };
        !complete || aged
    }

    /// Signs, records, writes and publishes one CRL. The caller holds the turn.
    async fn make(&self, role: CaRole) -> Result<u64, Problem> {
        let authority = Arc::clone(self.issuing.authority());
        let issuer = authority.issuer_key_id(role);
        let (covers_seq, number, entries) = self.directory.read(|world| {
            let number = world.last_crl_number(&issuer, SHARD) + 1;
            (world.head_seq(), number, world.revoked_entries(&issuer, SHARD))
        });
        let listed: BTreeSet<Serial> = entries.iter().map(|(serial, ..)| *serial).collect();
        let now = self.clock.utc_now();
        let crl = self
            .issuing
            .on_pool(move || {
                let entries: Vec<_> = entries
                    .into_iter()
                    .filter_map(|(serial, at, reason)| crl_entry(serial, at, reason))
                    .collect();
                authority
                    .crl(role, number, &entries, now)
                    .map_err(|error| Problem::internal_error("cannot sign a CRL", &error))
            })
            .await?;
        let der = Bytes::from(crl.der);
        let digest: [u8; 32] = Sha256::digest(&der).into();
        self.keep(&issuer, number, Signed { der: der.clone(), listed });
        let command = Command::RecordCrl {
            issuer_key_id: issuer.clone(),
            shard: SHARD,
            number,
            covers_seq,
            digest,
            this_update: crl.this_update,
            next_update: crl.next_update,
        };
        // Commit point: from here on the CRL is published, because World names its number.
        self.writer.submit_own(command).await?;
        self.write(role, der).await;
        tracing::info!(%issuer, number, covers_seq, "CRL published");
        Ok(number)
    }

    /// Remembers a signed CRL, and forgets all but the two before it, which somebody may be reading.
    fn keep(&self, issuer: &KeyId, number: u64, crl: Signed) {
        let mut signed = self.signed.write().unwrap_or_else(PoisonError::into_inner);
        let all = signed.entry(issuer.clone()).or_default();
        all.retain(|other, _| *other + 2 >= number);
        all.insert(number, crl);
    }

    /// Writes the CRL and `crl.pem`. They can be made again, so a failure only costs the next start.
    async fn write(&self, role: CaRole, der: Bytes) {
        let path = self.file(role);
        let bundle = self.folder.join("crl.pem");
        let pem = mesh_ca::bundle::encode_crls(self.published().into_iter().map(|crl| crl.der));
        let written = tokio::task::spawn_blocking(move || {
            replace_file(&path, &der)?;
            replace_file(&bundle, pem.as_bytes())
        })
        .await;
        match written {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "CRL was not written to disk"),
            Err(error) => tracing::warn!(%error, "CRL was not written to disk"),
        }
    }

    fn load(&self, role: CaRole) {
        let issuer = self.issuing.authority().issuer_key_id(role);
        let Some(state) = self.directory.read(|world| world.crl(&issuer, SHARD).cloned()) else {
            return;
        };
        let Ok(der) = read_file(&self.file(role), mesh_ca::CRL_BYTES_MAX as u64) else { return };
        if <[u8; 32]>::from(Sha256::digest(&der)) != state.digest {
            tracing::warn!(%issuer, "the CRL on disk is not the recorded one; it is made anew");
            return;
        }
        let Some(listed) = self.issuing.authority().listed(role, &der) else { return };
        self.keep(&issuer, state.number, Signed { der: der.into(), listed });
    }

    fn file(&self, role: CaRole) -> PathBuf {
        self.folder.join(match role {
            CaRole::Root => "root.crl",
            CaRole::Issuing => "issuing.crl",
        })
    }
}
