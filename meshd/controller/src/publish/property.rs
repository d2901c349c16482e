//! Whatever happens, the CRLs together list what the journal says was revoked, and nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mesh_ca::Crl;
use mesh_core::{CertificateRecord, KeyId, Serial, UtcTime};
use mesh_runtime::Clock as _;
use proptest::prelude::*;

use crate::authority::CaRole;
use crate::identity::issuer_ders;
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
    Restart,
    /// The same after a loss of everything that can be made again.
    RestartBare,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0..LIVES.len()).prop_map(Step::Issue),
        4 => any::<prop::sample::Index>().prop_map(Step::Revoke),
        4 => (1u64..90).prop_map(Step::Pass),
        1 => Just(Step::Restart),
        1 => Just(Step::RestartBare),
    ];
    prop::collection::vec(step, 1..28)
}

/// What the journal said, kept beside it: records go, this stays.
#[derive(Default)]
struct Model {
    issued: Vec<CertificateRecord>,
    revoked: BTreeSet<Serial>,
    /// thisUpdate of each list and of the one before it, by number.
    lists: BTreeMap<u16, (u64, UtcTime, Option<UtcTime>)>,
}

impl Model {
    /// Takes up the lists as they are now, then compares each with what it must say.
    fn check(&mut self, rig: &Rig) -> Result<(), TestCaseError> {
        let issuer = rig.issuing.authority().issuer_key_id(CaRole::Issuing);
        let ca = rig.directory.read(|world| issuer_ders(world, Some(&issuer))).swap_remove(0);
        let mut union = BTreeSet::new();
        for crl in rig.publisher.published().into_iter().filter(|crl| crl.issuer == issuer) {
            let parsed = Crl::parse_verified(&crl.der, &ca).expect("a CRL of ours");
            prop_assert_eq!(parsed.number(), crl.number);
            let last = self.lists.get(&crl.shard).copied();
            match last {
                Some((number, ..)) if number == crl.number => {}
                Some((number, this_update, _)) => {
                    prop_assert!(number < crl.number, "shard {}: {} after {}", crl.shard, crl.number, number);
                    // A list between the two was never seen here; it can only have been like one of both.
                    let before = (crl.number == number + 1).then_some(this_update);
                    self.lists.insert(crl.shard, (crl.number, crl.this_update, before));
                }
                None => {
                    self.lists.insert(crl.shard, (crl.number, crl.this_update, None));
                }
            }
            let before = self.lists[&crl.shard].2;
            let listed: BTreeSet<Serial> =
                parsed.entries().map(|entry| Serial(*entry.serial.as_bytes())).collect();
            prop_assert_eq!(listed.len(), parsed.len());
            self.check_list(&issuer, crl.shard, (&listed, crl.this_update, before))?;
            union.extend(listed);
        }
        // Together: every revocation of what has not ended, and no certificate that was not revoked.
        let now = UtcTime::from(rig.clock.utc_now());
        let live = self.issued.iter().filter(|c| self.revoked.contains(&c.serial) && now < c.not_after);
        for certificate in live {
            prop_assert!(union.contains(&certificate.serial), "{} is on no list", certificate.serial);
        }
        prop_assert!(union.is_subset(&self.revoked), "a list says more than the journal");
        Ok(())
    }

    /// A revoked certificate stands on its shard's lists up to the first one made after its end (RFC 5280 §3.3).
    fn check_list(
        &self,
        issuer: &KeyId,
        shard: u16,
        (listed, this_update, before): (&BTreeSet<Serial>, UtcTime, Option<UtcTime>),
    ) -> Result<(), TestCaseError> {
        for certificate in self.issued.iter().filter(|c| c.issuer_key_id == *issuer && c.shard == shard) {
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
            let own = self.issued.iter().find(|certificate| certificate.serial == *serial);
            prop_assert!(own.is_some_and(|own| own.shard == shard), "{serial} is of another shard");
        }
        Ok(())
    }
}

async fn run(root: &Path, clock: &Arc<VirtualClock>, steps: Vec<Step>) -> Result<(), TestCaseError> {
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
        model.check(&rig)?;
    }
    rig.close();
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, max_shrink_iters: 60, ..ProptestConfig::default() })]

    #[test]
    fn the_lists_together_are_the_journals_revocations(steps in steps()) {
        let (folder, clock) = (tempfile::tempdir().unwrap(), Arc::new(VirtualClock::default()));
        let root = init(folder.path(), &clock);
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.block_on(run(&root, &clock, steps))?;
    }
}
