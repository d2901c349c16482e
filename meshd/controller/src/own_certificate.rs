//! The controller's own certificate: made in this process, with a key that is never on disk.

use std::sync::Arc;
use std::time::Duration;

use mesh_ca::{Identity, LeafKey, Profile};
use mesh_core::{CertificateRecord, Command, DnsName, Owner, UtcTime};
use mesh_runtime::{Backoff, SharedClock, ShutdownToken};
use rustls::sign::CertifiedKey;
use rustls_pki_types::CertificateDer;

use crate::authority::{LeafRequest, label};
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
}

impl OwnCertificate {
    /// Issues and records the first certificate of this process.
    pub(crate) async fn issue(
        name: String,
        domain: DnsName,
        (issuing, writer, clock): (Issuing, Writer, SharedClock),
    ) -> Result<Self, Problem> {
        let (certified, record) = make(&name, &domain, &issuing, &writer).await?;
        let served = Arc::new(ServedCertificate::new(certified));
        let first_renewal = renew_at(&record);
        Ok(Self { name, domain, issuing, writer, clock, served, first_renewal })
    }

    /// What the listener asks for the current certificate.
    pub(crate) fn served(&self) -> Arc<ServedCertificate> {
        Arc::clone(&self.served)
    }

    /// Replaces the certificate after each third of its life, until shutdown.
    pub(crate) async fn keep_fresh(&self, shutdown: ShutdownToken) {
        let (mut due, mut backoff) = (self.first_renewal, Backoff::new(RETRY.0, RETRY.1));
        loop {
            let wait = due.since(self.clock.utc_now().into());
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(wait) => {}
            }
            match make(&self.name, &self.domain, &self.issuing, &self.writer).await {
                Ok((certified, record)) => {
                    tracing::info!(serial = %record.serial, not_after = %record.not_after, "controller certificate renewed");
                    self.served.replace(certified);
                    due = renew_at(&record);
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
    writer: &Writer,
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
    // The root is served too, so that a joining node can check its pin before it says anything.
    let authority = issuing.authority();
    let chain = [record.der.as_slice(), authority.issuing_der(), authority.root_der()]
        .map(|der| CertificateDer::from(der.to_vec()))
        .to_vec();
    let certified = key
        .certified(chain)
        .map_err(|error| Problem::internal_error("cannot serve the controller's certificate", &error))?;
    Ok((certified, record))
}
