//! One question to the controller: sign this key for these names.

use std::collections::BTreeSet;
use std::net::IpAddr;

use mesh_ca::{Csr, KeyAlgorithm, LeafKey, Profile};
use mesh_proto::v1 as pb;
use mesh_proto::v1::ErrorCode;
use mesh_proto::v1::certificates_client::CertificatesClient;
use time::UtcDateTime;
use tonic::Request;
use tonic::transport::Channel;

use super::definition::Definition;
use super::record::{IssueRequest, Material, Staple};
use crate::clock::ControllerClock;
use crate::failure::Failure;
use crate::join::leaf_key;
use crate::limits::{CALL_TIMEOUT, ISSUERS_MAX, MESSAGE_BYTES_MAX};
use crate::pki;
use crate::state::{Der, Identity, Secret};

/// What came back.
pub(super) struct Issued {
    pub(super) material: Material,
    pub(super) crls: Vec<pb::Crl>,
}

/// A new request: with `key`, if it is of the wanted type, or a new one.
pub(super) fn prepare(
    key: Option<Secret>,
    algorithm: KeyAlgorithm,
    restart: bool,
) -> Result<IssueRequest, Failure> {
    let fits = |key: &Secret| leaf_key(key).is_ok_and(|key| key.public_key().algorithm() == algorithm);
    let key = key.filter(fits).map_or_else(|| new_key(algorithm), Ok)?;
    let csr =
        Csr::create(&leaf_key(&key)?).map_err(|error| Failure::internal("cannot make a CSR", &error))?;
    Ok(IssueRequest { operation_id: mesh_runtime::random_bytes(), key, csr: Der(csr), restart })
}

fn new_key(algorithm: KeyAlgorithm) -> Result<Secret, Failure> {
    let generate = || LeafKey::generate_for(algorithm);
    let threads = tokio::runtime::Handle::try_current().map(|handle| handle.runtime_flavor());
    let key = match (algorithm, threads) {
        // RSA keys take seconds.
        (KeyAlgorithm::Rsa { .. }, Ok(tokio::runtime::RuntimeFlavor::MultiThread)) => {
            tokio::task::block_in_place(generate)
        }
        _ => generate(),
    };
    let key = key.map_err(|error| Failure::internal("cannot make a key", &error))?;
    Ok(Secret::new(key.to_pkcs8_der().to_vec()))
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
    let answer = CertificatesClient::new(channel.clone())
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .issue(call)
        .await
        .map_err(|status| Failure::from_status(&status))?
        .into_inner();
    let ders = |list: &[bytes::Bytes]| -> Vec<Der> {
        list.iter().take(ISSUERS_MAX).map(|der| Der(der.to_vec())).collect()
    };
    let issuers = ders(&answer.issuers);
    let unclear = |why: String| {
        Failure::new(
            ErrorCode::CertificateInvalid,
            format!("the certificate that came back cannot be used: {why}"),
            "look at the controller's log",
        )
    };
    let verified = pki::judge_own(identity, &issuers, &answer.leaf, &leaf_key(&request.key)?, clock.now())
        .map_err(|error| unclear(mesh_runtime::chain(&error)))?;
    let names: BTreeSet<String> = verified
        .dns
        .iter()
        .map(ToString::to_string)
        .chain(verified.ips.iter().map(ToString::to_string))
        .collect();
    let asked: BTreeSet<String> = definition.names.iter().map(|name| canonical(name)).collect();
    if names != asked || !fits(verified.profile, &definition.profile) {
        return Err(unclear("it has other names or another profile than asked for".to_owned()));
    }
    let mut material = Material {
        key: request.key.clone(),
        leaf: Der(answer.leaf.to_vec()),
        issuers,
        serial: verified.serial.as_bytes().to_vec(),
        not_before: verified.not_before.unix_timestamp(),
        not_after: verified.not_after.unix_timestamp(),
        staples: verified.profile.server_auth() && !verified.no_rev_avail,
        staple: None,
    };
    if material.staples {
        material.staple = first_staple(channel, &material, clock).await;
    }
    Ok(Issued { material, crls: answer.crls })
}

/// What was issued is of the profile asked for. A custom one is of a service's kind; which, the policy says.
fn fits(profile: Profile, asked: &str) -> bool {
    match asked.parse::<Profile>() {
        Ok(built_in) => profile == built_in,
        Err(_) => matches!(profile, Profile::Server | Profile::Client | Profile::Peer),
    }
}

/// The response that goes into the folder together with a new pair. A pair without one is good too: it is asked for again.
async fn first_staple(channel: Channel, material: &Material, clock: &ControllerClock) -> Option<Staple> {
    let issuer = material.issuers.first()?.clone();
    let found = staple(channel, (material.serial.clone(), issuer), clock).await;
    found.unwrap_or_else(|failure| {
        tracing::debug!(%failure, "no OCSP response for a new certificate yet");
        None
    })
}

/// Asks whether policy would let a pair be issued as it is. `Some` is what the controller would refuse it with.
pub(super) async fn judge(channel: Channel, definition: &Definition) -> Result<Option<Failure>, Failure> {
    let mut call = Request::new(pb::ExplainRequest {
        names: definition.names.clone(),
        profile: definition.profile.clone(),
        ttl_secs: definition.ttl_secs,
        key_type: definition.key_type.clone(),
        node: String::new(),
    });
    call.set_timeout(CALL_TIMEOUT);
    let answer = match CertificatesClient::new(channel).explain(call).await {
        Ok(answer) => answer.into_inner(),
        // An older controller says it when the pair is renewed.
        Err(status) if status.code() == tonic::Code::Unimplemented => return Ok(None),
        Err(status) => return Err(Failure::from_status(&status)),
    };
    let refused = answer.verdicts.into_iter().find(|verdict| !verdict.allowed);
    Ok(refused.map(|verdict| {
        let code = ErrorCode::try_from(verdict.code).unwrap_or(ErrorCode::Unspecified);
        Failure::new(code, verdict.why, verdict.next)
    }))
}

/// Fetches the OCSP response of a certificate. `None` for a controller that has none.
pub(super) async fn staple(
    channel: Channel,
    (serial, issuer): (Vec<u8>, Der),
    clock: &ControllerClock,
) -> Result<Option<Staple>, Failure> {
    let ocsp_of = vec![serial.clone().into()];
    let mut call = Request::new(pb::CrlsRequest { ocsp_of, no_crls: true, ..Default::default() });
    call.set_timeout(CALL_TIMEOUT);
    let answer = CertificatesClient::new(channel)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .crls(call)
        .await
        .map_err(|status| Failure::from_status(&status))?
        .into_inner();
    Ok(pick_staple(&answer.ocsp, &serial, &issuer, clock.now()))
}

/// Believes a response only as far as it proves itself: signed by the delegate of `issuer`, about this serial, good, and
/// counting now.
fn pick_staple(
    responses: &[pb::OcspResponse],
    serial: &[u8],
    issuer: &Der,
    now: UtcDateTime,
) -> Option<Staple> {
    responses.iter().find_map(|response| {
        let parsed = mesh_ca::parse_ocsp_response(&response.der, &issuer.0, now).ok()?;
        let about = parsed.serial.is_some_and(|about| about.as_bytes()[..] == *serial);
        let good = about && parsed.status == mesh_ca::OcspStatus::Good;
        good.then(|| Staple {
            der: Der(response.der.to_vec()),
            taken_at: now.unix_timestamp(),
            next_update: parsed.next_update.unix_timestamp(),
        })
    })
}

/// IP addresses have many texts; one is compared.
fn canonical(name: &str) -> String {
    name.parse::<IpAddr>().map_or_else(|_| name.to_owned(), |ip| ip.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestMesh;

    #[test]
    fn only_a_good_response_of_the_own_ca_about_the_own_leaf_is_stapled() {
        let mesh = TestMesh::new(UtcDateTime::now());
        let other = TestMesh::new(mesh.now);
        let issuer = mesh.node(1, "web-1").issuers[0].clone();
        let (serial, foreign) = ([0x47; 16], [0x48; 16]);
        let response = |mesh: &TestMesh, serial: &[u8], revoked| pb::OcspResponse {
            der: mesh.ocsp(serial, revoked).into(),
            ..Default::default()
        };
        let pick = |responses: &[pb::OcspResponse], now| pick_staple(responses, &serial, &issuer, now);
        let good = response(&mesh, &serial, false);
        let bad = [
            response(&mesh, &serial, true),
            response(&mesh, &foreign, false),
            response(&other, &serial, false),
            pb::OcspResponse { der: good.der.slice(1..), ..Default::default() },
            pb::OcspResponse::default(),
        ];
        assert!(pick(&bad, mesh.now).is_none());
        let all = [&bad[..], std::slice::from_ref(&good)].concat();
        let staple = pick(&all, mesh.now).unwrap();
        assert!(staple.der.0 == good.der && staple.next_update > mesh.now.unix_timestamp());
        let late = mesh.now + std::time::Duration::from_secs(8 * 86_400);
        assert!(pick(&all, late).is_none(), "it counts no more");
    }

    #[test]
    fn a_key_stays_unless_another_type_is_wanted() {
        let first = prepare(None, KeyAlgorithm::EcdsaP256, false).unwrap();
        let again = prepare(Some(first.key.clone()), KeyAlgorithm::EcdsaP256, false).unwrap();
        assert!(again.key == first.key && again.operation_id != first.operation_id);
        let other = prepare(Some(first.key.clone()), KeyAlgorithm::Ed25519, false).unwrap();
        assert_eq!(leaf_key(&other.key).unwrap().public_key().algorithm(), KeyAlgorithm::Ed25519);
    }

    #[test]
    fn what_comes_back_is_of_the_profile_asked_for() {
        for profile in Profile::ALL {
            let service = matches!(profile, Profile::Server | Profile::Client | Profile::Peer);
            assert_eq!(fits(profile, "database"), service, "{profile}");
            assert_eq!(fits(profile, "server"), profile == Profile::Server, "{profile}");
        }
    }
}
