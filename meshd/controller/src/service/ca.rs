use std::sync::Arc;

use mesh_core::{CaRecord, UtcTime};
use mesh_proto::v1 as pb;
use tonic::{Request, Response, Status};

use crate::authority::CaFacts;
use crate::parts::Parts;

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
}

impl Parts {
    fn ca_info(&self) -> pb::CaInfo {
        let authority = self.issuing.authority();
        self.directory.read(|world| {
            let list = |roots: bool| -> Vec<pb::CaCertificate> {
                world.cas().iter().filter(|ca| ca.is_root == roots).filter_map(ca_message).collect()
            };
            let subject_of = |key: &mesh_core::KeyId| {
                let ca = world.cas().iter().find(|ca| ca.key_id == *key);
                ca.and_then(|ca| CaFacts::read(&ca.der)).map(|facts| facts.subject).unwrap_or_default()
            };
            let crls = world
                .crls()
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

fn ca_message(ca: &CaRecord) -> Option<pb::CaCertificate> {
    let facts = CaFacts::read(&ca.der)?;
    Some(pb::CaCertificate {
        der: ca.der.clone().into(),
        subject: facts.subject,
        not_before: UtcTime::from(facts.not_before).unix(),
        not_after: UtcTime::from(facts.not_after).unix(),
        spki_sha256: facts.spki_sha256.to_vec().into(),
        serial: facts.serial.into(),
    })
}
