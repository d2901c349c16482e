//! Whatever happens, the CRLs together list what the journal says was revoked, and nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mesh_ca::Crl;
use mesh_core::{CertificateRecord, Command, Serial, UtcTime};
use mesh_runtime::Clock as _;
use proptest::prelude::*;

use super::{PublishedCrl, ShardId};
use crate::rig::{DAY, HOUR, Rig, VirtualClock, init};

/// Shorter than the certificates live, so that some end, leave the CRL, and leave the store.
const RETENTION: Duration = Duration::from_secs(6 * DAY);
/// Life of an issued certificate in days, by turns.
const LIVES: [u64; 4] = [1, 3, 10, 40];

#[derive(Debug, Clone)]
enum Step {
    Issue(usize),
    /// One of those issued so far, revoked before or not, ended or not.
    Revoke(prop::sample::Index),
    /// Hours pass, CRLs age, what ended long ago is thrown away.
    Pass(u64),
    /// A new issuing CA, below a new root or the same one.
    Rotate {
        root: bool,
    },
    /// The rotation's next step, if nothing holds it up.
    Advance,
    Abort,
    /// Every live certificate of an issuer that goes is revoked: then nothing holds up the rotation.
    RevokeLeaving,
    Restart,
    /// The same after a loss of everything that can be made again.
    RestartBare,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (0..LIVES.len()).prop_map(Step::Issue),
        5 => any::<prop::sample::Index>().prop_map(Step::Revoke),
        5 => (1u64..90).prop_map(Step::Pass),
        2 => any::<bool>().prop_map(|root| Step::Rotate { root }),
        5 => Just(Step::Advance),
        1 => Just(Step::Abort),
        2 => Just(Step::RevokeLeaving),
        1 => Just(Step::Restart),
        1 => Just(Step::RestartBare),
    ];
    prop::collection::vec(step, 1..40)
}

/// thisUpdate of a list and of the one before it, by number.
#[derive(Debug, Clone, Copy)]
struct Seen {
    number: u64,
    this_update: UtcTime,
    before: Option<UtcTime>,
}

/// What the journal said, kept beside it: records go, this stays.
#[derive(Default)]
struct Model {
    issued: Vec<CertificateRecord>,
    revoked: BTreeSet<Serial>,
    lists: BTreeMap<ShardId, Seen>,
    /// Rotations that ran to their end.
    ended: usize,
}

impl Model {
    /// Takes up the lists as they are now, then compares each with what it must say.
    fn check(&mut self, rig: &Rig) -> Result<(), TestCaseError> {
        let mut union = BTreeSet::new();
        // Also those of issuers that nobody trusts any more: served to whoever holds an old certificate.
        let shards = rig.publisher.shards(None);
        for (issuer, shard) in &shards {
            let crl = rig.publisher.one(issuer, *shard);
            let Some(crl) = crl else {
                return Err(TestCaseError::fail(format!("no list of shard {shard} of {issuer}")));
            };
            let ca = rig.directory.read(|world| world.authority(issuer).unwrap().der.clone());
            let parsed = Crl::parse_verified(&crl.der, &ca).expect("a CRL of ours");
            prop_assert_eq!(parsed.number(), crl.number);
            let seen = self.see(&crl)?;
            let listed: BTreeSet<Serial> =
                parsed.entries().map(|entry| Serial(*entry.serial.as_bytes())).collect();
            prop_assert_eq!(listed.len(), parsed.len());
            self.check_list((issuer, *shard), &listed, seen)?;
            union.extend(listed);
        }
        // Together: every revocation of what has not ended, and no certificate that was not revoked.
        let now = UtcTime::from(rig.clock.utc_now());
        let live = self.issued.iter().filter(|c| self.revoked.contains(&c.serial) && now < c.not_after);
        for certificate in live {
            prop_assert!(union.contains(&certificate.serial), "{} is on no list", certificate.serial);
        }
        prop_assert!(union.is_subset(&self.revoked), "a list says more than the journal");
        self.check_gone(rig, &shards)
    }

    /// Notes a list. Numbers of a shard only rise.
    fn see(&mut self, crl: &PublishedCrl) -> Result<Seen, TestCaseError> {
        let place = (crl.issuer.clone(), crl.shard);
        let before = match self.lists.get(&place) {
            Some(last) if last.number == crl.number => return Ok(*last),
            Some(last) => {
                prop_assert!(last.number < crl.number, "{:?}: {} after {}", place, crl.number, last.number);
                // A list between the two was never seen here; it can only have been like one of both.
                (crl.number == last.number + 1).then_some(last.this_update)
            }
            None => None,
        };
        let seen = Seen { number: crl.number, this_update: crl.this_update, before };
        self.lists.insert(place, seen);
        Ok(seen)
    }

    /// A revoked certificate stands on its shard's lists up to the first one made after its end (RFC 5280 §3.3).
    fn check_list(
        &self,
        (issuer, shard): (&mesh_core::KeyId, u16),
        listed: &BTreeSet<Serial>,
        Seen { this_update, before, .. }: Seen,
    ) -> Result<(), TestCaseError> {
        for certificate in self.issued_in(issuer, shard) {
            let is_listed = listed.contains(&certificate.serial);
            let revoked = self.revoked.contains(&certificate.serial);
            let first_after_its_end = before.is_some_and(|before| before < certificate.not_after);
            if revoked && (this_update < certificate.not_after || first_after_its_end) {
                prop_assert!(is_listed, "{} has left shard {shard} too early", certificate.serial);
            }
            if before.is_some_and(|before| before >= certificate.not_after) {
                prop_assert!(!is_listed, "{} stays on shard {shard}", certificate.serial);
            }
        }
        for serial in listed {
            let own = self.issued_in(issuer, shard).any(|certificate| certificate.serial == *serial);
            prop_assert!(own, "{serial} is of another shard, or of another issuer");
        }
        Ok(())
    }

    fn issued_in(&self, issuer: &mesh_core::KeyId, shard: u16) -> impl Iterator<Item = &CertificateRecord> {
        self.issued.iter().filter(move |c| c.issuer_key_id == *issuer && c.shard == shard)
    }

    /// A shard has no list any more only when all that was revoked in it stood on one that was made after its end; the
    /// key of a CA without shards is gone.
    fn check_gone(&self, rig: &Rig, shards: &[ShardId]) -> Result<(), TestCaseError> {
        for place @ (issuer, shard) in self.lists.keys().filter(|place| !shards.contains(place)) {
            let last = rig.directory.read(|world| world.crl(issuer, *shard).unwrap().this_update);
            let mut revoked = self.issued_in(issuer, *shard).filter(|c| self.revoked.contains(&c.serial));
            prop_assert!(revoked.all(|c| c.not_after <= last), "{:?} went before its last leaf", place);
            let trusted = rig.directory.read(|world| world.is_trusted(issuer));
            if !trusted && shards.iter().all(|(other, _)| other != issuer) {
                prop_assert!(rig.issuing.authority().signer(issuer).is_none(), "{issuer} could still sign");
            }
        }
        let keys = rig.issuing.authority().crl_issuers().len();
        let files = std::fs::read_dir(rig.state.keys()).unwrap().count();
        prop_assert!(files <= keys, "{files} keys on disk for {keys} CAs that sign");
        Ok(())
    }
}

async fn run(root: &Path, clock: &Arc<VirtualClock>, steps: Vec<Step>) -> Result<Model, TestCaseError> {
    let mut rig = Rig::open(root, clock, RETENTION).await;
    let mut model = Model::default();
    for step in steps {
        match step {
            Step::Issue(life) => {
                let life = Duration::from_secs(LIVES[life] * DAY);
                model.issued.push(rig.issue_detached(life).await);
            }
            Step::Revoke(which) if !model.issued.is_empty() => {
                let certificate = which.get(&model.issued);
                let serial = certificate.serial;
                // Of what has ended there is nothing to revoke.
                let live = UtcTime::from(rig.clock.utc_now()) < certificate.not_after;
                if rig.try_revoke(serial).await.is_ok() && live {
                    model.revoked.insert(serial);
                }
            }
            Step::Revoke(_) => {}
            Step::Pass(hours) => {
                clock.advance(hours * HOUR);
                rig.publisher.refresh().await.unwrap();
                rig.keeper.sweep();
            }
            Step::Rotate { root } => {
                let running = rig.directory.read(|world| world.rotation().is_some());
                prop_assert_eq!(rig.start_rotation(root).await.is_ok(), !running);
            }
            Step::Advance => {
                let stepped = rig.step_rotation(|version| Command::AdvanceRotation { version }).await.is_ok();
                model.ended += usize::from(stepped && rig.directory.read(|world| world.rotation().is_none()));
            }
            Step::Abort => {
                let _ = rig.step_rotation(|version| Command::AbortRotation { version }).await;
            }
            Step::RevokeLeaving => {
                let (now, active) = (UtcTime::from(clock.utc_now()), rig.active_issuer());
                let leaving = |c: &&CertificateRecord| c.issuer_key_id != active && now < c.not_after;
                for certificate in model.issued.iter().filter(leaving) {
                    if rig.try_revoke(certificate.serial).await.is_ok() {
                        model.revoked.insert(certificate.serial);
                    }
                }
            }
            Step::Restart | Step::RestartBare => {
                rig.close();
                if matches!(step, Step::RestartBare) {
                    std::fs::remove_dir_all(root.join("index")).unwrap();
                    for file in std::fs::read_dir(root.join("crl")).unwrap() {
                        // A write that is still under way may rename its file meanwhile.
                        let _ = std::fs::remove_file(file.unwrap().path());
                    }
                }
                rig = Rig::open(root, clock, RETENTION).await;
            }
        }
        rig.publisher.refresh().await.unwrap();
        rig.follow_authorities();
        model.check(&rig)?;
    }
    rig.close();
    Ok(model)
}

fn run_alone(steps: Vec<Step>) -> Result<Model, TestCaseError> {
    let (folder, clock) = (tempfile::tempdir().unwrap(), Arc::new(VirtualClock::default()));
    let root = init(folder.path(), &clock);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    runtime.block_on(run(&root, &clock, steps))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, max_shrink_iters: 60, ..ProptestConfig::default() })]

    #[test]
    fn the_lists_together_are_the_journals_revocations(steps in steps()) {
        run_alone(steps)?;
    }
}

/// The road that random steps seldom take to its end: two rotations, one of them of the root, with revoked leaves of
/// both old CAs, a rotation taken back, and years until the last of them is off its list.
#[test]
fn lists_of_dropped_issuers_stay_until_their_last_leaf_is_off() {
    use Step::{Abort, Advance, Issue, Pass, Restart, RestartBare, RevokeLeaving, Rotate};
    let rotation = |root| {
        let begun = [Issue(3), Issue(1), Rotate { root }, Restart, Issue(0), Advance, Issue(2), Issue(3)];
        let ended = [RestartBare, RevokeLeaving, Advance, Pass(30), Restart];
        begun.into_iter().chain(ended)
    };
    let aborted =
        [Issue(3), Rotate { root: true }, Advance, Issue(3), Abort, RevokeLeaving, Advance, Pass(1)];
    let years = (0..60).map(|_| Pass(48));
    let steps = rotation(false).chain(rotation(true)).chain(aborted).chain(years).collect();
    let model = run_alone(steps).unwrap();
    assert_eq!(model.ended, 3);
    // Every CA that was dropped has gone, with its shards: 40 days after the last revocation.
    let issuers: BTreeSet<_> = model.issued.iter().map(|certificate| &certificate.issuer_key_id).collect();
    assert_eq!(issuers.len(), 4);
}
