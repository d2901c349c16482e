//! One question to the controller: sign this key for these names.

use std::collections::BTreeSet;
use std::net::IpAddr;

use mesh_ca::Csr;
use mesh_proto::v1 as pb;
use mesh_proto::v1::ErrorCode;
use mesh_proto::v1::certificates_client::CertificatesClient;
use tonic::Request;
use tonic::transport::Channel;

use super::definition::Definition;
use super::record::{IssueRequest, Material};
use crate::clock::ControllerClock;
use crate::failure::Failure;
use crate::join::{leaf_key, new_tls_key};
use crate::limits::{CALL_TIMEOUT, ISSUERS_MAX, MESSAGE_BYTES_MAX};
use crate::pki;
use crate::state::{Der, Identity, Secret};

/// What came back.
pub(super) struct Issued {
    pub(super) material: Material,
    pub(super) crls: Vec<pb::Crl>,
}

/// A new request: with `key`, or a new one.
pub(super) fn prepare(key: Option<Secret>, restart: bool) -> Result<IssueRequest, Failure> {
    let key = key.map_or_else(new_tls_key, Ok)?;
    let csr =
        Csr::create(&leaf_key(&key)?).map_err(|error| Failure::internal("cannot make a CSR", &error))?;
    Ok(IssueRequest { operation_id: mesh_runtime::random_bytes(), key, csr: Der(csr), restart })
}

/// Asks, and believes the answer only as far as it proves itself: chain to the pinned root, our key, the
/// profile and exactly the names that were asked for.
pub(super) async fn ask(
    channel: Channel,
    definition: &Definition,
    request: &IssueRequest,
    identity: &Identity,
    clock: &ControllerClock,
) -> Result<Issued, Failure> {
    let mut call = Request::new(pb::IssueRequest {
        csr: request.csr.0.clone().into(),
        names: definition.names.clone(),
        profile: definition.profile.clone(),
        ttl_secs: definition.ttl_secs,
        operation_id: request.operation_id.to_vec().into(),
        restart: request.restart,
    });
    call.set_timeout(CALL_TIMEOUT);
    let answer = CertificatesClient::new(channel)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .issue(call)
        .await
        .map_err(|status| Failure::from_status(&status))?
        .into_inner();
    let ders = |list: &[bytes::Bytes]| -> Vec<Der> {
        list.iter().take(ISSUERS_MAX).map(|der| Der(der.to_vec())).collect()
    };
    let (issuers, roots) = (ders(&answer.issuers), ders(&answer.roots));
    let unclear = |why: String| {
        Failure::new(
            ErrorCode::CertificateInvalid,
            format!("the certificate that came back cannot be used: {why}"),
            "look at the controller's log",
        )
    };
    let verified = pki::judge_own(
        &identity.trust_domain,
        &roots,
        &identity.root_pin,
        &issuers,
        &answer.leaf,
        &leaf_key(&request.key)?,
        clock.now(),
    )
    .map_err(|error| unclear(mesh_runtime::chain(&error)))?;
    let names: BTreeSet<String> = verified
        .dns
        .iter()
        .map(ToString::to_string)
        .chain(verified.ips.iter().map(ToString::to_string))
        .collect();
    let asked: BTreeSet<String> = definition.names.iter().map(|name| canonical(name)).collect();
    if names != asked || verified.profile.name() != definition.profile {
        return Err(unclear("it has other names or another profile than asked for".to_owned()));
    }
    let material = Material {
        key: request.key.clone(),
        leaf: Der(answer.leaf.to_vec()),
        issuers,
        roots,
        serial: verified.serial.as_bytes().to_vec(),
        not_before: verified.not_before.unix_timestamp(),
        not_after: verified.not_after.unix_timestamp(),
    };
    Ok(Issued { material, crls: answer.crls })
}

/// IP addresses have many texts; one is compared.
fn canonical(name: &str) -> String {
    name.parse::<IpAddr>().map_or_else(|_| name.to_owned(), |ip| ip.to_string())
}
