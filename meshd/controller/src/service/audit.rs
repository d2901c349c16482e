use std::sync::Arc;

use bytes::Bytes;
use mesh_core::UtcTime;
use mesh_proto::v1 as pb;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::codec::decode_record;
use crate::gate::Connection;
use crate::limits::PAGE_SIZE_MAX;
use crate::parts::Parts;
use crate::status::Problem;

/// Entries read from the journal at one time, so that a long log is never in memory.
const CHUNK: usize = 256;

#[derive(Debug)]
pub(crate) struct AuditService(pub(crate) Arc<Parts>);

type Entries = mpsc::Sender<Result<pb::AuditEntry, Status>>;

#[tonic::async_trait]
impl pb::audit_server::Audit for AuditService {
    type LogStream = ReceiverStream<Result<pb::AuditEntry, Status>>;

    async fn log(&self, request: Request<pb::AuditLogRequest>) -> Result<Response<Self::LogStream>, Status> {
        let closing = request.extensions().get::<Arc<Connection>>().map(|c| c.closing.clone());
        let request = request.into_inner();
        let (entries, stream) = mpsc::channel(CHUNK);
        let parts = Arc::clone(&self.0);
        tokio::spawn(async move {
            let closed = async {
                match &closing {
                    Some(closing) => closing.cancelled().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = closed => {}
                outcome = parts.send_log(&request, &entries) => if let Err(problem) = outcome {
                    let _ = entries.send(Err(problem.into())).await;
                },
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn verify(&self, _: Request<pb::Empty>) -> Result<Response<pb::AuditVerifyResponse>, Status> {
        let (archive, head) = (self.0.archive.clone(), self.0.directory.head());
        let verified = self
            .0
            .issuing
            .on_pool(move || {
                let base = archive.reader().base();
                let mut answer = pb::AuditVerifyResponse {
                    intact: true,
                    first_seq: base.seq + 1,
                    last_seq: base.seq,
                    base_hash: if base.seq > 0 { base.hash.to_vec().into() } else { Bytes::new() },
                    head_hash: head.hash.to_vec().into(),
                    ..pb::AuditVerifyResponse::default()
                };
                for stored in archive.reader().read(base.seq + 1) {
                    // The reader checks every hash against its predecessor's.
                    let problem = match stored {
                        Err(error) => mesh_runtime::chain(&error),
                        Ok(stored) => {
                            answer.last_seq = stored.seq;
                            if stored.seq == head.seq && stored.hash != head.hash {
                                "the newest record is not the acknowledged one".into()
                            } else {
                                continue;
                            }
                        }
                    };
                    answer.intact = false;
                    answer.bad_seq = answer.last_seq + 1;
                    answer.problem = problem;
                    return Ok(answer);
                }
                if answer.last_seq < head.seq {
                    answer.intact = false;
                    answer.bad_seq = answer.last_seq + 1;
                    answer.problem = "acknowledged records are missing".into();
                }
                Ok(answer)
            })
            .await?;
        Ok(Response::new(verified))
    }
}

impl Parts {
    async fn send_log(&self, request: &pb::AuditLogRequest, entries: &Entries) -> Result<(), Problem> {
        let mut head = self.directory.watch();
        let mut next = self.first_entry(request).await?;
        loop {
            head.mark_unchanged();
            let end = self.directory.head().seq;
            while next <= end {
                for entry in self.entries(next).await? {
                    next = entry.seq + 1;
                    if entries.send(Ok(entry)).await.is_err() {
                        return Ok(());
                    }
                }
            }
            if !request.follow {
                return Ok(());
            }
            tokio::select! {
                () = entries.closed() => return Ok(()),
                changed = head.changed() => if changed.is_err() { return Ok(()) },
            }
        }
    }

    async fn first_entry(&self, request: &pb::AuditLogRequest) -> Result<u64, Problem> {
        let head = self.directory.head().seq;
        let since = UtcTime::from_unix(request.since);
        let first = match request.since {
            0 => self.archive.reader().base().seq + 1,
            _ => {
                let archive = self.archive.clone();
                self.issuing.on_pool(move || archive.first_since(since)).await?
            }
        };
        Ok(match u64::from(request.limit) {
            0 => first,
            limit => first.max((head + 1).saturating_sub(limit)),
        })
    }

    async fn entries(&self, from: u64) -> Result<Vec<pb::AuditEntry>, Problem> {
        let archive = self.archive.clone();
        self.issuing
            .on_pool(move || {
                let mut entries = Vec::with_capacity(CHUNK.min(PAGE_SIZE_MAX));
                for stored in archive.reader().read(from).take(CHUNK) {
                    let stored =
                        stored.map_err(|error| Problem::internal_error("cannot read the journal", &error))?;
                    let record = decode_record(&stored.bytes)
                        .map_err(|error| Problem::internal_error("cannot read a record", &error))?;
                    entries.push(pb::AuditEntry {
                        seq: stored.seq,
                        time: stored.time_secs,
                        detail: record.detail(),
                        actor: record.who,
                        action: record.action,
                        hash: stored.hash.to_vec().into(),
                    });
                }
                if entries.is_empty() {
                    return Err(Problem::internal("an acknowledged record cannot be read"));
                }
                Ok(entries)
            })
            .await
    }
}
