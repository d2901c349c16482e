//! Authorities replaced while nodes come, go and renew: real certificates under real verifiers, on virtual time.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use mesh_ca::{TrustAnchors, TrustDomain, Usage, verify_chain, vouched_roots};
use mesh_proto::v1 as pb;
use mesh_runtime::{Clock as _, ManualClock, SharedClock};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use rustls_pki_types::CertificateDer;
use sha2::{Digest as _, Sha256};

use crate::harness::*;
use crate::rotation::{advance, ca, start, status};

/// Virtual time between two looks at each node.
const STEP: Duration = Duration::from_secs(3 * 3600);
/// Steps within which both rotations have to end: 75 days.
const STEPS_MAX: u32 = 600;

/// A node as it is on its own disk.
struct Model {
    name: String,
    node: Node,
    service: Identity,
    /// What it trusts, taken up along the signed history alone.
    trust: pb::TrustBundle,
    cut_off_until: u32,
}

struct Fleet {
    mesh: Mesh,
    running: Option<Running>,
    clock: Arc<ManualClock>,
    rng: StdRng,
    nodes: Vec<Model>,
    renewals: u32,
    returns: u32,
    /// Pairs of leaf and bundle that have been verified.
    verified: BTreeSet<([u8; 32], u64)>,
    checks: u32,
}

fn anchors(roots: &[Bytes]) -> Arc<TrustAnchors> {
    Arc::new(TrustAnchors::new(TrustDomain::parse(DOMAIN).unwrap(), roots).unwrap())
}

impl Fleet {
    async fn new(seed: u64) -> Self {
        let clock = Arc::new(ManualClock::new(time::UtcDateTime::now()));
        let shared: SharedClock = clock.clone();
        let mesh = Mesh::init_at(shared);
        let running = Some(mesh.start().await);
        let rng = StdRng::seed_from_u64(seed);
        let mut fleet = Self {
            mesh,
            running,
            clock,
            rng,
            nodes: vec![],
            renewals: 0,
            returns: 0,
            verified: BTreeSet::new(),
            checks: 0,
        };
        for _ in 0..6 {
            fleet.join().await;
        }
        fleet
    }

    fn running(&self) -> &Running {
        self.running.as_ref().unwrap()
    }

    /// The process ends, and starts from its journal.
    async fn restart(&mut self) {
        let before = status(self.running()).await;
        self.running.take().unwrap().stop().await.unwrap();
        self.running = Some(self.mesh.start().await);
        let after = status(self.running()).await;
        assert_eq!(
            (before.running, &before.phase, before.version, &before.to),
            (after.running, &after.phase, after.version, &after.to)
        );
        // What was acknowledged last may have been written down after the first look.
        let still = |name: &String| before.waits_for_nodes.contains(name);
        assert!(after.waits_for_nodes.iter().all(still), "{before:?} {after:?}");
    }

    async fn join(&mut self) {
        let name = format!("n{}", self.nodes.len());
        let node = self.running().enroll(&name).await;
        let service = self.running().service(&node, &format!("{name}.{DOMAIN}"), "peer").await;
        let trust = node.enrolled.trust.clone().unwrap();
        // The phase as it is: whoever joins now needs no history.
        assert_eq!(trust.version, status(self.running()).await.version);
        self.nodes.push(Model { name, node, service, trust, cut_off_until: 0 });
    }

    /// A bundle counts as far as what is trusted already leads to it.
    fn take_up(&mut self, index: usize, bundle: pb::TrustBundle) {
        let held: Vec<&[u8]> = self.nodes[index].trust.roots.iter().map(|der| &**der).collect();
        let told: Vec<&[u8]> = bundle.roots.iter().map(|der| &**der).collect();
        let lineage: Vec<&[u8]> = bundle.lineage.iter().map(|der| &**der).collect();
        let vouched = vouched_roots(&held, &told, &lineage, Some(self.clock.utc_now()));
        assert_eq!(vouched, told, "{} cannot follow the history of roots", self.nodes[index].name);
        self.nodes[index].trust = bundle;
    }

    fn is_live(&self, identity: &Identity) -> bool {
        self.clock.utc_now() < not_after(&identity.leaf)
    }

    fn is_settled(&self, index: usize) -> bool {
        let model = &self.nodes[index];
        let issuer = &model.trust.issuer_key_id;
        [&model.node.identity, &model.service].iter().all(|held| key_id(&held.issuer) == **issuer)
    }

    /// One node's exchange with the controller; any answer may get lost.
    async fn exchange(&mut self, index: usize) {
        let live = self.is_live(&self.nodes[index].node.identity);
        let roots = anchors(&self.nodes[index].trust.roots);
        let shared: SharedClock = self.clock.clone();
        let model = &self.nodes[index];
        let config = client_config(roots, Some(&model.node.identity), &shared);
        // The controller is believed by what this node has pinned, however old.
        let channel = connect(self.running().address, config)
            .await
            .unwrap_or_else(|error| panic!("{} does not reach the controller: {error}", model.name));
        if live {
            let settled = self.is_settled(index);
            let model = &self.nodes[index];
            let trust = if settled { model.trust.version } else { 0 };
            let hello = pb::sync_request::Hello { wireguard_port: 51820, trust, ..Default::default() };
            let mut stream = SyncStream::open(channel.clone(), hello).await.unwrap();
            let told = stream.full().await.trust.unwrap();
            self.take_up(index, told);
        }
        let model = &self.nodes[index];
        let behind = key_id(&model.node.identity.issuer) != model.trust.issuer_key_id;
        if !live || behind || self.rng.random_ratio(1, 3) {
            let model = &self.nodes[index];
            let candidate = Candidate::new(&model.name);
            let request = pb::RenewRequest {
                csr: mesh_ca::Csr::create(&candidate.key).unwrap().into(),
                wireguard_public_keys: vec![model.node.wireguard.to_vec().into()],
                operation_id: operation().into(),
            };
            let mut client = pb::renewal_client::RenewalClient::new(channel);
            let answer = match live {
                true => client.renew(request).await,
                false => client.resume(request).await,
            };
            let answer = answer.unwrap().into_inner();
            self.renewals += 1;
            if self.rng.random_ratio(1, 6) {
                return;
            }
            self.returns += u32::from(!live);
            let wireguard = model.node.wireguard;
            let bundle = answer.trust.clone().unwrap();
            self.nodes[index].node = Node { wireguard, ..candidate.into_node(answer) };
            self.take_up(index, bundle);
        }
        let model = &self.nodes[index];
        let behind = key_id(&model.service.issuer) != model.trust.issuer_key_id;
        if behind || !self.is_live(&model.service) || self.rng.random_ratio(1, 3) {
            let shared: SharedClock = self.clock.clone();
            let config = client_config(anchors(&model.trust.roots), Some(&model.node.identity), &shared);
            let channel = connect(self.running().address, config).await.unwrap();
            let key = mesh_ca::LeafKey::generate().unwrap();
            let request = issue_request(&key, &[&format!("{}.{DOMAIN}", model.name)], "peer");
            let mut client = pb::certificates_client::CertificatesClient::new(channel);
            let issued = client.issue(request).await.unwrap().into_inner();
            self.renewals += 1;
            if self.rng.random_ratio(1, 6) {
                return;
            }
            self.nodes[index].service = Identity {
                leaf: issued.leaf.to_vec(),
                issuer: issued.issuers[0].to_vec(),
                key: Arc::new(key),
            };
        }
    }

    /// What anybody may show anybody is believed.
    fn verify_everybody(&mut self) {
        let live: Vec<&Model> =
            self.nodes.iter().filter(|model| self.is_live(&model.node.identity)).collect();
        for verifier in &live {
            let roots = anchors(&verifier.trust.roots);
            let issuers: Vec<CertificateDer<'_>> =
                verifier.trust.issuers.iter().map(|der| CertificateDer::from(der.as_ref())).collect();
            for shown in &live {
                for leaf in [&shown.node.identity, &shown.service] {
                    let pair = (Sha256::digest(&leaf.leaf).into(), verifier.trust.version);
                    if !self.is_live(leaf) || !self.verified.insert(pair) {
                        continue;
                    }
                    self.checks += 1;
                    verify_chain(&leaf.leaf, &issuers, &roots, self.clock.utc_now(), Usage::Any, None)
                        .unwrap_or_else(|error| {
                            let version = verifier.trust.version;
                            panic!("{} refuses {} with bundle {version}: {error}", verifier.name, shown.name)
                        });
                }
            }
        }
    }

    async fn step(&mut self, step: u32) {
        self.clock.advance(STEP);
        for index in 0..self.nodes.len() {
            if step < self.nodes[index].cut_off_until {
                continue;
            }
            if self.rng.random_ratio(1, 12) {
                let steps = self.rng.random_range(1..9);
                self.nodes[index].cut_off_until = step + steps;
            } else {
                self.exchange(index).await;
            }
        }
        self.verify_everybody();
    }
}

fn not_after(der: &[u8]) -> time::UtcDateTime {
    use x509_parser::prelude::FromDer as _;
    let (_, certificate) = x509_parser::certificate::X509Certificate::from_der(der).unwrap();
    time::UtcDateTime::from_unix_timestamp(certificate.validity().not_after.timestamp()).unwrap()
}

fn key_id(der: &[u8]) -> Vec<u8> {
    mesh_ca::ca_key_identifier(der).unwrap().as_bytes().to_vec()
}

/// Issue 4: "rotation during 200 renewals with nodes partitioned at random (virtual time): no failed verification".
#[tokio::test(flavor = "multi_thread")]
async fn no_verification_fails_in_two_rotations_under_renewals_and_partitions() {
    let mut fleet = Fleet::new(7).await;
    // Away for longer than an identity lives, from before the first rotation until after the second phase.
    fleet.nodes[0].cut_off_until = 45;
    let mut step = 0;
    for root in [false, true] {
        start(fleet.running(), root).await;
        loop {
            step += 1;
            assert!(step < STEPS_MAX, "it never ended: {:?}", status(fleet.running()).await);
            fleet.step(step).await;
            if step % 9 == 0 && fleet.nodes.len() < 9 {
                fleet.join().await;
            }
            if step % 7 == 0 {
                fleet.restart().await;
            }
            if status(fleet.running()).await.ready {
                let moved = advance(fleet.running()).await.unwrap();
                fleet.verify_everybody();
                if !moved.running {
                    break;
                }
                fleet.restart().await;
            }
        }
    }
    // Whoever is still away comes back.
    let end = fleet.nodes.iter().map(|model| model.cut_off_until).max().unwrap().max(step) + 4;
    while step < end {
        step += 1;
        fleet.step(step).await;
    }
    assert!(
        fleet.renewals >= 200 && fleet.returns > 0,
        "{} renewals, {} returns",
        fleet.renewals,
        fleet.returns
    );
    assert!(fleet.checks >= 300, "{} pairs of leaf and bundle", fleet.checks);
    let show = ca(fleet.running()).await.show(pb::Empty {}).await.unwrap().into_inner();
    assert_eq!((show.roots.len(), show.issuers.len()), (1, 1));
    fleet.running.take().unwrap().stop().await.unwrap();
}
