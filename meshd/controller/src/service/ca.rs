use std::sync::Arc;

use mesh_core::{Command, UtcTime};
use mesh_proto::v1 as pb;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::auth::Caller;
use crate::authority::{CaFacts, key_algorithm};
use crate::backup;
use crate::config::Passphrase;
use crate::parts::Parts;
use crate::status::Problem;

/// Parts of 64 KiB on their way.
const BACKUP_PARTS: usize = 8;

#[derive(Debug)]
pub(crate) struct CaService(pub(crate) Arc<Parts>);

#[tonic::async_trait]
impl pb::ca_server::Ca for CaService {
    async fn show(&self, _: Request<pb::Empty>) -> Result<Response<pb::CaInfo>, Status> {
        let mut info = self.0.ca_info();
        // After World was read, not while: its lock and the publisher's are never held together.
        for crl in &mut info.crls {
            crl.entries = self.0.publisher.entries_of(&crl.issuer_key_id, crl.shard, crl.number) as u64;
        }
        Ok(Response::new(info))
    }

    async fn rotation_status(&self, _: Request<pb::Empty>) -> Result<Response<pb::RotationInfo>, Status> {
        Ok(Response::new(self.0.rotation_info(false)?))
    }

    async fn start_rotation(
        &self,
        request: Request<pb::StartRotationRequest>,
    ) -> Result<Response<pb::RotationInfo>, Status> {
        let caller = Caller::from_extensions(request.extensions())?;
        Ok(Response::new(self.0.start_rotation(&caller, request.into_inner()).await?))
    }

    async fn advance_rotation(
        &self,
        request: Request<pb::RotationStep>,
    ) -> Result<Response<pb::RotationInfo>, Status> {
        self.step(request, |version| Command::AdvanceRotation { version }).await
    }

    async fn abort_rotation(
        &self,
        request: Request<pb::RotationStep>,
    ) -> Result<Response<pb::RotationInfo>, Status> {
        self.step(request, |version| Command::AbortRotation { version }).await
    }

    async fn export_root(
        &self,
        request: Request<pb::ExportRootRequest>,
    ) -> Result<Response<pb::ExportRootResponse>, Status> {
        let caller = Caller::from_extensions(request.extensions())?;
        Ok(Response::new(self.0.export_root(&caller, request.into_inner()).await?))
    }

    async fn seal(&self, request: Request<pb::SealRequest>) -> Result<Response<pb::ActionResponse>, Status> {
        let caller = Caller::from_extensions(request.extensions())?;
        Ok(Response::new(self.0.seal_root(&caller, request.into_inner()).await?))
    }

    async fn import_crl(
        &self,
        request: Request<pb::ImportCrlRequest>,
    ) -> Result<Response<pb::ActionResponse>, Status> {
        let caller = Caller::from_extensions(request.extensions())?;
        Ok(Response::new(self.0.import_crl(&caller, request.into_inner()).await?))
    }

    type BackupStream = ReceiverStream<Result<pb::BackupPart, Status>>;

    async fn backup(
        &self,
        request: Request<pb::BackupRequest>,
    ) -> Result<Response<Self::BackupStream>, Status> {
        let passphrase = super::lone_passphrase(request.into_inner().passphrase, "a backup")?;
        let (parts, stream) = mpsc::channel(BACKUP_PARTS);
        let controller = Arc::clone(&self.0);
        tokio::spawn(async move { controller.send_backup(passphrase, parts).await });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn request_issuer(
        &self,
        request: Request<pb::RequestIssuerRequest>,
    ) -> Result<Response<pb::IssuerRequest>, Status> {
        let caller = Caller::from_extensions(request.extensions())?;
        Ok(Response::new(self.0.request_issuer(&caller, request.into_inner()).await?))
    }
}

impl CaService {
    /// Takes a step of the rotation whose bundle has the version that the caller has seen.
    async fn step(
        &self,
        request: Request<pb::RotationStep>,
        command: fn(u64) -> Command,
    ) -> Result<Response<pb::RotationInfo>, Status> {
        let caller = Caller::from_extensions(request.extensions())?;
        let step = request.into_inner();
        let (actor, operation) = (super::actor(&caller)?, super::operation(&step.operation_id)?);
        self.0.step_rotation(actor, operation, command(step.version)).await?;
        Ok(Response::new(self.0.rotation_info(true)?))
    }
}

/// Hands on what is written to it.
struct PartSender {
    parts: mpsc::Sender<Result<pb::BackupPart, Status>>,
    bytes: u64,
}

impl std::io::Write for PartSender {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let part = pb::backup_part::Part::Data(bytes.to_vec().into());
        let sent = self.parts.blocking_send(Ok(pb::BackupPart { part: Some(part) }));
        sent.map_err(|_| std::io::ErrorKind::BrokenPipe)?;
        self.bytes += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Parts {
    async fn send_backup(&self, passphrase: Passphrase, parts: mpsc::Sender<Result<pb::BackupPart, Status>>) {
        // No key is drawn or removed meanwhile.
        let _one = self.successions.lock().await;
        let (archive, directory) = (self.archive.clone(), Arc::clone(&self.directory));
        let (state, taken_at, sender) = (self.state_dir.clone(), self.utc().unix(), parts.clone());
        let write = move || {
            let mut out = PartSender { parts: sender, bytes: 0 };
            let source = backup::Source { root: &state, journal: archive.reader(), directory: &directory };
            let manifest = backup::write(&mut out, &passphrase, &source, taken_at)
                .map_err(|error| Problem::internal_error("the backup was not written", &error))?;
            tracing::info!(seq = manifest.seq, bytes = out.bytes, "backup taken");
            Ok(pb::BackupDone {
                first_seq: manifest.first_seq(),
                domain: manifest.domain,
                seq: manifest.seq,
                head_hash: manifest.hash.to_vec().into(),
                taken_at,
                bytes: out.bytes,
            })
        };
        let last = match self.issuing.on_pool(write).await {
            Ok(done) => Ok(pb::BackupPart { part: Some(pb::backup_part::Part::Done(done)) }),
            Err(problem) => Err(problem.into()),
        };
        // Whoever asked may be gone.
        let _ = parts.send(last).await;
    }

    fn ca_info(&self) -> pb::CaInfo {
        let authority = self.issuing.authority();
        self.directory.read(|world| {
            let list = |roots: bool| -> Vec<pb::CaCertificate> {
                let known = world.trusted_authorities().filter(|ca| ca.is_root == roots);
                let mut known: Vec<&mesh_core::Authority> = known.collect();
                known.sort_by_key(|ca| ca.standing != mesh_core::Standing::Active);
                known.into_iter().filter_map(ca_message).collect()
            };
            let subject_of = |key: &mesh_core::KeyId| {
                world
                    .authority(key)
                    .and_then(|ca| CaFacts::read(&ca.der))
                    .map(|facts| facts.subject)
                    .unwrap_or_default()
            };
            let trusted = |issuer| world.authority(issuer).is_some_and(|known| known.standing.is_trusted());
            let crls = world
                .crls()
                .filter(|crl| trusted(&crl.issuer_key_id))
                .map(|crl| pb::CrlInfo {
                    issuer_key_id: crl.issuer_key_id.0.clone().into(),
                    shard: crl.shard.into(),
                    number: crl.number,
                    this_update: crl.this_update.unix(),
                    next_update: crl.next_update.unix(),
                    entries: 0,
                    signed_at: super::fleet::signed_at(crl.this_update),
                    issuer: subject_of(&crl.issuer_key_id),
                })
                .collect();
            pb::CaInfo {
                trust_domain: authority.domain().to_string(),
                fleet: world.fleet().unwrap_or_default().to_owned(),
                roots: list(true),
                issuers: list(false),
                crls,
                root_spki_sha256: authority.root_spki_sha256().to_vec().into(),
                unlock: self.unlock.name().to_owned(),
            }
        })
    }
}

fn ca_message(ca: &mesh_core::Authority) -> Option<pb::CaCertificate> {
    let facts = CaFacts::read(&ca.der)?;
    Some(pb::CaCertificate {
        der: ca.der.clone().into(),
        subject: facts.subject,
        not_before: UtcTime::from(facts.not_before).unix(),
        not_after: UtcTime::from(facts.not_after).unix(),
        spki_sha256: facts.spki_sha256.to_vec().into(),
        serial: facts.serial.into(),
        standing: ca.standing.as_str().to_owned(),
        sealed: ca.sealed,
        key_type: key_algorithm(&ca.der).to_string(),
    })
}
