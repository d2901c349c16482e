//! The controller's own certificate: made in this process, with a key that is never on disk.

use std::sync::Arc;
use std::time::Duration;

use mesh_ca::{Identity, LeafKey, Profile};
use mesh_core::{CertificateRecord, Command, DnsName, Owner, UtcTime, World};
use mesh_runtime::{Backoff, SharedClock, ShutdownToken};
use rustls::sign::CertifiedKey;
use rustls_pki_types::CertificateDer;

use crate::authority::{LeafRequest, label};
use crate::directory::Directory;
use crate::issuer::Issuing;
use crate::status::Problem;
use crate::tls::ServedCertificate;
use crate::writer::Writer;

/// Shortest and longest wait between two tries to renew.
const RETRY: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(300));

/// Keeps the certificate that the listener shows.
#[derive(Debug)]
pub(crate) struct OwnCertificate {
    name: String,
    domain: DnsName,
    issuing: Issuing,
    writer: Writer,
    clock: SharedClock,
    served: Arc<ServedCertificate>,
    /// When the first one is to be replaced.
    first_renewal: UtcTime,
    first_bundle: u64,
    directory: Arc<Directory>,
}

impl OwnCertificate {
    /// Issues and records the first certificate of this process.
    pub(crate) async fn issue(
        name: String,
        domain: DnsName,
        (issuing, writer, clock): (Issuing, Writer, SharedClock),
        directory: Arc<Directory>,
    ) -> Result<Self, Problem> {
        let first_bundle = directory.read(mesh_core::World::bundle_version);
        let (certified, record) = make(&name, &domain, &issuing, (&writer, &directory)).await?;
        let served = Arc::new(ServedCertificate::new(certified));
        let first_renewal = renew_at(&record);
        Ok(Self { name, domain, issuing, writer, clock, served, first_renewal, first_bundle, directory })
    }

    /// What the listener asks for the current certificate.
    pub(crate) fn served(&self) -> Arc<ServedCertificate> {
        Arc::clone(&self.served)
    }

    /// Replaces the certificate after each third of its life, until shutdown.
    pub(crate) async fn keep_fresh(&self, shutdown: ShutdownToken) {
        let (mut due, mut backoff) = (self.first_renewal, Backoff::new(RETRY.0, RETRY.1));
        let mut bundle = self.first_bundle;
        let mut head = self.directory.watch();
        loop {
            let wait = due.since(self.clock.utc_now().into());
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(wait) => {}
                // What is shown, and by whom it is signed, changes with the authorities.
                changed = head.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let now = self.directory.read(mesh_core::World::bundle_version);
                    if now == bundle {
                        continue;
                    }
                }
            }
            let shown = self.directory.read(mesh_core::World::bundle_version);
            self.issuing.authority().catch_up(&self.directory);
            match make(&self.name, &self.domain, &self.issuing, (&self.writer, &self.directory)).await {
                Ok((certified, record)) => {
                    tracing::info!(serial = %record.serial, not_after = %record.not_after, "controller certificate renewed");
                    self.served.replace(certified);
                    due = renew_at(&record);
                    bundle = shown;
                    backoff.reset();
                }
                Err(problem) => {
                    tracing::error!(why = problem.why, "controller certificate was not renewed");
                    due = UtcTime::from(self.clock.utc_now()) + backoff.next_wait();
                }
            }
        }
    }
}

/// A third of the certificate's life after its beginning.
fn renew_at(record: &CertificateRecord) -> UtcTime {
    record.not_before + record.not_after.since(record.not_before) / 3
}

async fn make(
    name: &str,
    domain: &DnsName,
    issuing: &Issuing,
    (writer, directory): (&Writer, &Directory),
) -> Result<(CertifiedKey, CertificateRecord), Problem> {
    let key = LeafKey::generate()
        .map_err(|error| Problem::internal_error("cannot draw the controller's key", &error))?;
    let key = Arc::new(key);
    let label =
        label(name).map_err(|error| Problem::internal_error("cannot use the controller's name", &error))?;
    let dns = DnsName::try_from(format!("{name}.{domain}"))
        .map_err(|error| Problem::internal_error("cannot use the controller's name", &error))?;
    let request = LeafRequest {
        profile: Profile::Controller,
        identity: Some(Identity::Controller { name: label }),
        owner: Owner::Controller { name: name.to_owned() },
        names: vec![dns],
        ips: Vec::new(),
        wireguard: Vec::new(),
        pair_name: String::new(),
        lifetime: Profile::Controller.default_lifetime(),
        custom: None,
    };
    let record = issuing.sign_own(request, Arc::clone(&key)).await?;
    let command = Command::RecordControllerCertificate { certificate: record.clone() };
    // Commit point.
    writer.submit_own(command).await?;
    let links = directory.read(|world| served_links(world, &record.issuer_key_id));
    let chain = std::iter::once(record.der.clone()).chain(links).map(CertificateDer::from).collect();
    let certified = key
        .certified(chain)
        .map_err(|error| Problem::internal_error("cannot serve the controller's certificate", &error))?;
    Ok((certified, record))
}

/// What is served below the leaf: its issuer; the root, so that a joining node can check its pin before it says
/// anything; then the history of roots, so that whoever pins an older one can follow, and joiners with an older
/// token find theirs. Cut to what verifiers read.
fn served_links(world: &World, issuer: &mesh_core::KeyId) -> Vec<Vec<u8>> {
    let issuer = world.authority(issuer);
    let root = issuer.and_then(|issuer| world.authority(&issuer.root));
    let lineage = world.lineage();
    let crosses = lineage.iter().map(|cross| cross.der.clone());
    let older = lineage.iter().filter_map(|cross| world.authority(&cross.by)).map(|root| root.der.clone());
    let mut links: Vec<Vec<u8>> = issuer.into_iter().chain(root).map(|known| known.der.clone()).collect();
    links.extend(crosses.chain(older));
    links.truncate(mesh_ca::CHAIN_LENGTH_MAX);
    links
}
