//! CRLs: signed after every revocation, recorded, then published; signed anew before they age.
//!
//! Each issuer's certificates are spread over shards (see [`mesh_core::world::ShardGroup`]); a revocation makes the list of one
//! shard anew and leaves the others alone.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};

use bytes::Bytes;
use mesh_ca::Pointers;
use mesh_core::{Change, Command, KeyId, UtcTime};
use mesh_proto::v1 as pb;
use mesh_runtime::{SharedClock, ShutdownToken};
use sha2::{Digest as _, Sha256};

use crate::authority::{CaRole, CrlOrder, crl_entry, points};
use crate::config::Publishing;
use crate::directory::Directory;
use crate::failpoint;
use crate::issuer::Issuing;
use crate::limits::{CRL_RESIGN_AFTER, ROOT_CRL_RESIGN_BEFORE};
use crate::state::{read_file, replace_file};
use crate::status::Problem;
use crate::upkeep::keep_fresh;
use crate::writer::Writer;

/// An issuer and one of its shards.
pub(crate) type ShardId = (KeyId, u16);

/// A CRL by its place and number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CrlRef {
    pub(crate) issuer: KeyId,
    pub(crate) shard: u16,
    pub(crate) number: u64,
}

/// A CRL that is recorded and may be handed out.
#[derive(Debug, Clone)]
pub(crate) struct PublishedCrl {
    pub(crate) issuer: KeyId,
    pub(crate) shard: u16,
    pub(crate) number: u64,
    pub(crate) der: Bytes,
    pub(crate) this_update: UtcTime,
    pub(crate) next_update: UtcTime,
}

/// Signs, records and hands out CRLs.
#[derive(Debug)]
pub(crate) struct Publisher {
    directory: Arc<Directory>,
    writer: Writer,
    issuing: Issuing,
    clock: SharedClock,
    folder: PathBuf,
    publishing: Publishing,
    /// No CRL gets a lower number.
    floor: u64,
    /// Signed CRLs by shard and number; only the one that World names is published.
    signed: RwLock<BTreeMap<ShardId, BTreeMap<u64, Signed>>>,
    /// One CRL is made at a time; whoever waits finds its revocation covered.
    turn: tokio::sync::Mutex<()>,
    /// One file is written at a time, so that an older CRL never takes the place of a newer one.
    disk: Arc<tokio::sync::Mutex<()>>,
    /// What the failpoint keeps handing out.
    frozen: RwLock<Option<Vec<PublishedCrl>>>,
}

#[derive(Debug, Clone)]
struct Signed {
    der: Bytes,
    entries: usize,
}

impl Publisher {
    pub(crate) fn new(
        directory: Arc<Directory>,
        writer: Writer,
        issuing: Issuing,
        (clock, folder, publishing): (SharedClock, PathBuf, Publishing),
    ) -> Self {
        Self {
            floor: 0,
            directory,
            writer,
            issuing,
            clock,
            folder,
            publishing,
            signed: RwLock::default(),
            turn: tokio::sync::Mutex::default(),
            disk: Arc::default(),
            frozen: RwLock::default(),
        }
    }

    /// The same with numbers from `floor` on.
    pub(crate) fn numbered_from(self, floor: u64) -> Self {
        Self { floor, ..self }
    }

    /// Opens the shards that the configuration asks for. Before the first certificate of this process, so that it names
    /// its CRL.
    pub(crate) async fn open_shards(&self) -> Result<(), Problem> {
        for (issuer, role) in self.issuing.authority().crl_issuers() {
            if role == CaRole::Issuing && self.is_trusted(&issuer) {
                self.grow(&issuer).await?;
            }
        }
        Ok(())
    }

    /// Takes up the CRLs on disk, and makes those that are missing, damaged or old.
    pub(crate) async fn start(&self) -> Result<(), Problem> {
        for (issuer, _) in self.issuing.authority().crl_issuers() {
            for shard in self.directory.read(|world| world.crl_shards(&issuer)) {
                self.load(&issuer, shard);
            }
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
        let head = Some(self.directory.watch());
        keep_fresh("CRLs could not be refreshed", || self.refresh(), head, shutdown).await;
    }

    /// Makes sure that every revocation among `changes` is on its CRL. Returns those CRLs that nodes take; without a
    /// revocation, all CRLs of issuing CAs, which are complete then.
    pub(crate) async fn cover(&self, changes: &[Change]) -> Result<Vec<CrlRef>, Problem> {
        let mut shards = self.shards_of(changes);
        if shards.is_empty() {
            shards = self.shards(Some(CaRole::Issuing)).into_iter().collect();
        }
        let mut covering = Vec::with_capacity(shards.len());
        for (issuer, shard) in shards {
            let _turn = self.turn.lock().await;
            let current = self.directory.read(|world| {
                let crl = world.crl(&issuer, shard).filter(|_| world.crl_is_complete(&issuer, shard));
                crl.map(|crl| crl.number)
            });
            let number = match current {
                Some(number) => number,
                None => self.make(&issuer, shard).await?,
            };
            covering.push(CrlRef { issuer, shard, number });
        }
        covering.retain(|crl| self.is_trusted(&crl.issuer));
        Ok(covering)
    }

    /// The newest recorded CRLs of the CAs that nodes trust, those of issuing CAs first.
    pub(crate) fn published(&self) -> Vec<PublishedCrl> {
        if let Some(frozen) = &*self.frozen.read().unwrap_or_else(PoisonError::into_inner) {
            return frozen.clone();
        }
        let mut shards = self.shards(None);
        self.directory.read(|world| shards.retain(|(issuer, _)| world.is_trusted(issuer)));
        shards.into_iter().filter_map(|(issuer, shard)| self.find(issuer, shard)).collect()
    }

    /// Whether nodes trust an issuer. Others are served to whoever asks by address.
    fn is_trusted(&self, issuer: &KeyId) -> bool {
        self.directory.read(|world| world.is_trusted(issuer))
    }

    /// One published CRL.
    pub(crate) fn one(&self, issuer: &KeyId, shard: u16) -> Option<PublishedCrl> {
        if let Some(frozen) = &*self.frozen.read().unwrap_or_else(PoisonError::into_inner) {
            return frozen.iter().find(|crl| crl.issuer == *issuer && crl.shard == shard).cloned();
        }
        self.find(issuer.clone(), shard)
    }

    /// What a stale publication goes on to tell, if a test made it stale.
    pub(crate) fn frozen_haves(&self) -> Option<Vec<pb::CrlHave>> {
        let frozen = self.frozen.read().unwrap_or_else(PoisonError::into_inner);
        let have = |crl: &PublishedCrl| crl_have(&crl.issuer, crl.shard, crl.number);
        frozen.as_ref().map(|frozen| frozen.iter().map(have).collect())
    }

    /// The published CRLs that are newer than what somebody has.
    pub(crate) fn messages(&self, have: &[pb::CrlHave]) -> Vec<pb::Crl> {
        let have: BTreeMap<(&[u8], u32), u64> =
            have.iter().map(|have| ((&*have.issuer_key_id, have.shard), have.number)).collect();
        let is_newer = |crl: &PublishedCrl| {
            have.get(&(crl.issuer.0.as_slice(), crl.shard.into())).is_none_or(|had| *had < crl.number)
        };
        self.published().into_iter().filter(is_newer).map(message).collect()
    }

    /// The CRLs that a chain of a certificate in `shard` needs: its own and the roots'.
    pub(crate) fn messages_for(&self, issuer: &KeyId, shard: u16) -> Vec<pb::Crl> {
        let mut roots = self.shards(Some(CaRole::Root));
        self.directory.read(|world| roots.retain(|(root, _)| world.is_trusted(root)));
        let roots = roots.into_iter().filter_map(|(root, shard)| self.one(&root, shard));
        self.one(issuer, shard).into_iter().chain(roots).map(message).collect()
    }

    /// How many certificates a published CRL lists.
    pub(crate) fn entries_of(&self, issuer: &[u8], shard: u32, number: u64) -> usize {
        let Ok(shard) = u16::try_from(shard) else { return 0 };
        let signed = self.signed.read().unwrap_or_else(PoisonError::into_inner);
        let all = signed.get(&(KeyId(issuer.to_vec()), shard));
        all.and_then(|all| all.get(&number)).map_or(0, |crl| crl.entries)
    }

    /// The shards in which `changes` revoked something.
    fn shards_of(&self, changes: &[Change]) -> BTreeSet<ShardId> {
        self.directory.read(|world| {
            let revoked = changes.iter().filter_map(|change| match change {
                Change::CertificateRevoked { serial, .. } => world.certificate(serial),
                _ => None,
            });
            let mut shards: BTreeSet<ShardId> =
                revoked.map(|certificate| (certificate.issuer_key_id.clone(), certificate.shard)).collect();
            // While there are certificates without a pointer, their CRL speaks for all of the issuer's.
            let issuers: BTreeSet<KeyId> = shards.iter().map(|(issuer, _)| issuer.clone()).collect();
            let whole = issuers.into_iter().filter(|issuer| world.crl_shards(issuer).first() == Some(&0));
            shards.extend(whole.map(|issuer| (issuer, 0)));
            shards
        })
    }

    /// Every shard that needs a CRL, those of issuing CAs first.
    fn shards(&self, only: Option<CaRole>) -> Vec<ShardId> {
        let mut issuers = self.issuing.authority().crl_issuers();
        issuers.retain(|(_, role)| only.is_none_or(|only| only == *role));
        self.directory.read(|world| {
            let shards = issuers.into_iter().flat_map(|(issuer, _)| {
                let shards = world.crl_shards(&issuer);
                shards.into_iter().map(move |shard| (issuer.clone(), shard))
            });
            shards.collect()
        })
    }

    fn find(&self, issuer: KeyId, shard: u16) -> Option<PublishedCrl> {
        // One lock after the other, never both: readers of each wait behind its writers.
        let state = self.directory.read(|world| world.crl(&issuer, shard).cloned())?;
        let shard_id = (issuer, shard);
        let signed = self.signed.read().unwrap_or_else(PoisonError::into_inner);
        let der = signed.get(&shard_id)?.get(&state.number)?.der.clone();
        let (this_update, next_update) = (state.this_update, state.next_update);
        Some(PublishedCrl { issuer: shard_id.0, shard, number: state.number, der, this_update, next_update })
    }

    /// Makes what is missing, incomplete or old.
    pub(crate) async fn refresh(&self) -> Result<(), Problem> {
        self.issuing.authority().catch_up(&self.directory);
        for (issuer, role) in self.issuing.authority().crl_issuers() {
            if role == CaRole::Issuing && self.is_trusted(&issuer) {
                self.grow(&issuer).await?;
            }
            for shard in self.due_shards(&issuer, role) {
                // One turn for each: a revocation never waits for all that age at the same moment.
                let _turn = self.turn.lock().await;
                if self.is_due(&issuer, role, shard) {
                    self.make(&issuer, shard).await?;
                }
            }
        }
        Ok(())
    }

    /// Opens shards when an address is configured that has none, or when those there are have filled up.
    async fn grow(&self, issuer: &KeyId) -> Result<(), Problem> {
        let (base, full) = self.directory.read(|world| {
            let newest = world.shard_groups(issuer).last();
            (newest.map(|group| group.base_url.clone()), world.shards_are_full(issuer))
        });
        let Some(url) = self.publishing.url.clone().or_else(|| base.clone()) else { return Ok(()) };
        if base.as_ref() == Some(&url) && !full {
            return Ok(());
        }
        let command = Command::OpenCrlShards {
            issuer_key_id: issuer.clone(),
            count: self.publishing.shards,
            base_url: url,
        };
        self.writer.submit_own(command).await?;
        Ok(())
    }

    fn due_shards(&self, issuer: &KeyId, role: CaRole) -> Vec<u16> {
        let shards = self.directory.read(|world| world.crl_shards(issuer));
        shards.into_iter().filter(|shard| self.is_due(issuer, role, *shard)).collect()
    }

    /// Whether the CRL is missing, lacks a revocation, or is old enough to be signed anew.
    fn is_due(&self, issuer: &KeyId, role: CaRole, shard: u16) -> bool {
        // The key of an offline root signs elsewhere, and its CRL was made to last.
        if self.issuing.authority().signer(issuer).is_none() {
            return false;
        }
        let now = UtcTime::from(self.clock.utc_now());
        let current = self.directory.read(|world| {
            let crl = world.crl(issuer, shard).filter(|_| world.crl_is_complete(issuer, shard));
            crl.map(|crl| (crl.number, crl.this_update, crl.next_update))
        });
        let Some((number, this_update, next_update)) = current else { return true };
        if number < self.floor {
            return true;
        }
        let signed = self.signed.read().unwrap_or_else(PoisonError::into_inner);
        if !signed.get(&(issuer.clone(), shard)).is_some_and(|all| all.contains_key(&number)) {
            return true;
        }
        match role {
            CaRole::Issuing => now.since(this_update) >= CRL_RESIGN_AFTER,
            CaRole::Root => next_update.since(now) <= ROOT_CRL_RESIGN_BEFORE,
        }
    }

    /// Signs, records, publishes and writes one CRL. The caller holds the turn.
    async fn make(&self, issuer: &KeyId, shard: u16) -> Result<u64, Problem> {
        let authority = Arc::clone(self.issuing.authority());
        let (covers_seq, number, url, entries) = self.directory.read(|world| {
            let number = self.number_after(world.last_crl_number(issuer, shard));
            let entries = world.revoked_entries(issuer, shard);
            (world.head_seq(), number, world.crl_url(issuer, shard), entries)
        });
        let (count, now, signer) = (entries.len(), self.clock.utc_now(), issuer.clone());
        let crl = self
            .issuing
            .on_pool(move || {
                let revoked: Vec<_> = entries
                    .into_iter()
                    .filter_map(|(serial, at, reason)| crl_entry(serial, at, reason))
                    .collect();
                authority
                    .crl(&signer, &CrlOrder { number, url: url.as_deref(), revoked: &revoked, now })
                    .map_err(|error| match &error {
                        mesh_ca::CrlError::KeyStore(source) => Problem::key_store("sign a CRL", source),
                        _ => Problem::internal_error("cannot sign a CRL", &error),
                    })
            })
            .await?;
        let der = Bytes::from(crl.der);
        let digest: [u8; 32] = Sha256::digest(&der).into();
        self.keep((issuer.clone(), shard), number, Signed { der: der.clone(), entries: count });
        let command = Command::RecordCrl {
            issuer_key_id: issuer.clone(),
            shard,
            number,
            covers_seq,
            digest,
            this_update: crl.this_update,
            next_update: crl.next_update,
        };
        // Commit point: from here on the CRL is published, because World names its number.
        self.writer.submit_own(command).await?;
        self.write(self.file(issuer, shard), der);
        tracing::info!(%issuer, shard, number, covers_seq, "CRL published");
        Ok(number)
    }

    /// Remembers a signed CRL, and forgets all but the two before it, which somebody may be reading.
    fn keep(&self, shard: ShardId, number: u64, crl: Signed) {
        let mut signed = self.signed.write().unwrap_or_else(PoisonError::into_inner);
        let all = signed.entry(shard).or_default();
        while all.len() > 2 {
            all.pop_first();
        }
        all.insert(number, crl);
    }

    /// Writes a CRL beside what waits for it. It can be made again, so a failure only costs the next start.
    fn write(&self, path: PathBuf, der: Bytes) {
        let disk = Arc::clone(&self.disk);
        // Tokio's lock is fair: files are written in the order in which their CRLs were made.
        let turn = disk.lock_owned();
        tokio::spawn(async move {
            let _turn = turn.await;
            match tokio::task::spawn_blocking(move || replace_file(&path, &der)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(%error, "CRL was not written to disk"),
                Err(error) => tracing::warn!(%error, "CRL was not written to disk"),
            }
        });
    }

    /// Takes a CRL of a sealed root that was signed elsewhere: on disk, recorded and published like our own.
    pub(crate) async fn take_foreign(
        &self,
        root: &KeyId,
        crl: &mesh_ca::Crl,
        der: Bytes,
    ) -> Result<(), Problem> {
        let _turn = self.turn.lock().await;
        self.keep((root.clone(), 0), crl.number(), Signed { der: der.clone(), entries: crl.len() });
        let command = Command::RecordCrl {
            issuer_key_id: root.clone(),
            shard: 0,
            number: crl.number(),
            covers_seq: self.directory.read(mesh_core::World::head_seq),
            digest: Sha256::digest(&der).into(),
            this_update: crl.this_update().into(),
            next_update: crl.next_update().into(),
        };
        // Commit point.
        self.writer.submit_own(command).await?;
        self.write_through(root, &der)
    }

    /// Signs the CRL of `root` anew, so that it lasts for its whole life from now on, and has it on disk: once the
    /// root's key is gone it cannot be made again.
    pub(crate) async fn sign_anew(&self, root: &KeyId) -> Result<(), Problem> {
        let _turn = self.turn.lock().await;
        let number = self.make(root, 0).await?;
        let der = {
            let signed = self.signed.read().unwrap_or_else(PoisonError::into_inner);
            signed.get(&(root.clone(), 0)).and_then(|all| all.get(&number)).map(|crl| crl.der.clone())
        };
        let der = der.ok_or_else(|| Problem::internal("a CRL that was just signed is missing"))?;
        self.write_through(root, &der)
    }

    /// What a CA certificate that the root in `root_der` signs points to; nothing in a mesh that publishes nowhere.
    pub(crate) fn ca_pointers(&self, root_der: &[u8]) -> Result<Pointers, Problem> {
        let Some(url) = &self.publishing.url else { return Ok(Pointers::default()) };
        let id = mesh_ca::ca_key_identifier(root_der)
            .ok_or_else(|| Problem::internal("the root cannot be read"))?;
        points(url)
            .and_then(|points| points.ca(&id))
            .map_err(|error| Problem::internal_error("the published address cannot be used", &error))
    }

    fn write_through(&self, root: &KeyId, der: &[u8]) -> Result<(), Problem> {
        replace_file(&self.file(root, 0), der)
            .map_err(|error| Problem::internal_error("the root's CRL was not written to disk", &error))
    }

    fn load(&self, issuer: &KeyId, shard: u16) {
        let Some(state) = self.directory.read(|world| world.crl(issuer, shard).cloned()) else { return };
        let path = self.file(issuer, shard);
        let Ok(der) = read_file(&path, mesh_ca::CRL_BYTES_MAX as u64) else { return };
        if <[u8; 32]>::from(Sha256::digest(&der)) != state.digest {
            tracing::warn!(%issuer, shard, "the CRL on disk is not the recorded one; it is made anew");
            return;
        }
        let Some(entries) = self.issuing.authority().listed(issuer, &der) else { return };
        self.keep((issuer.clone(), shard), state.number, Signed { der: der.into(), entries });
    }

    fn file(&self, issuer: &KeyId, shard: u16) -> PathBuf {
        self.folder.join(crl_file(issuer, shard))
    }

    /// The number of the CRL after number `last`.
    pub(crate) fn number_after(&self, last: u64) -> u64 {
        (last + 1).max(self.floor)
    }
}

/// Name of a CRL's file.
pub(crate) fn crl_file(issuer: &KeyId, shard: u16) -> String {
    format!("{issuer}-{shard}.crl")
}

/// What streams tell nodes about a CRL.
pub(crate) fn crl_have(issuer: &KeyId, shard: u16, number: u64) -> pb::CrlHave {
    pb::CrlHave { issuer_key_id: issuer.0.clone().into(), shard: shard.into(), number }
}

fn message(crl: PublishedCrl) -> pb::Crl {
    pb::Crl { issuer_key_id: crl.issuer.0.into(), shard: crl.shard.into(), number: crl.number, der: crl.der }
}

#[cfg(test)]
mod property;
#[cfg(test)]
mod tests;
