//! Clocks: moments at which times change their form, and callers whose clocks are off.

use std::sync::Arc;
use std::time::Duration;

use mesh_ca::{ChainError, ExpiredCrl, RevocationLists, Usage, verify_chain};
use mesh_proto::v1 as pb;
use mesh_runtime::{Clock as _, ManualClock, SharedClock};
use rustls_pki_types::CertificateDer;
use time::UtcDateTime;
use time::macros::utc_datetime;

use crate::harness::*;
use crate::key_types::exercise;
use crate::ocsp;

/// The end of 32-bit seconds, the first moment that is no UTCTime, days that exist in leap years only, or do not.
const MOMENTS: [UtcDateTime; 4] = [
    utc_datetime!(2038-01-19 03:14:08),
    utc_datetime!(2050-01-01 00:00:00),
    utc_datetime!(2028-02-29 00:00:00),
    utc_datetime!(2100-03-01 00:00:00),
];

#[tokio::test(flavor = "multi_thread")]
async fn a_mesh_lives_through_2038_2050_and_leap_days() {
    for moment in MOMENTS {
        let clock = Arc::new(ManualClock::new(moment - Duration::from_secs(240)));
        let mesh = Mesh::init_at(clock.clone());
        let running = ocsp::start(&mesh).await;
        let alpha = running.enroll("alpha").await;
        exercise(&mesh, &running, &alpha, "before.alpha.mesh.internal").await;
        // A longer step would be a jump.
        clock.advance(Duration::from_secs(480));
        assert!(clock.utc_now() > moment);
        exercise(&mesh, &running, &alpha, "after.alpha.mesh.internal").await;
        let bravo = running.enroll("bravo").await;
        running.stop().await.unwrap();
        let running = ocsp::start(&mesh).await;
        exercise(&mesh, &running, &bravo, "again.bravo.mesh.internal").await;
        running.stop().await.unwrap();
    }
}

/// Ten minutes off, either way: the controller is believed, and so is what was issued and revoked a moment ago.
#[tokio::test(flavor = "multi_thread")]
async fn a_caller_whose_clock_is_ten_minutes_off_is_served() {
    let clock = Arc::new(ManualClock::new(UtcDateTime::now()));
    let mesh = Mesh::init_at(clock.clone());
    let running = ocsp::start(&mesh).await;
    let alpha = running.enroll("alpha").await;
    let service = running.service(&alpha, "web.alpha.mesh.internal", "peer").await;
    let lost = running.service(&alpha, "lost.alpha.mesh.internal", "peer").await;
    ocsp::revoke(&running, &ocsp::serial(&lost)).await;
    let off_by = |seconds: i64| -> SharedClock {
        Arc::new(ManualClock::new(clock.utc_now() + time::Duration::seconds(seconds)))
    };
    for seconds in [-600, 600] {
        let theirs = off_by(seconds);
        let config = client_config(running.anchors(), Some(&alpha.identity), &theirs);
        let channel = connect(running.address, config).await.unwrap();
        let mut client = pb::certificates_client::CertificatesClient::new(channel);
        let request = pb::CrlsRequest {
            ocsp_of: vec![ocsp::serial(&service).into(), ocsp::serial(&lost).into()],
            ..Default::default()
        };
        let answer = client.crls(request).await.unwrap().into_inner();
        let lists = RevocationLists::new(answer.crls.iter().map(|crl| &crl.der), ExpiredCrl::Refuse).unwrap();
        let chain = [CertificateDer::from(service.issuer.clone())];
        let judge = |identity: &Identity| {
            let anchors = running.anchors();
            verify_chain(&identity.leaf, &chain, &anchors, theirs.utc_now(), Usage::Any, Some(&lists))
                .map(drop)
        };
        judge(&service).unwrap();
        judge(&alpha.identity).unwrap();
        let refused = judge(&lost).unwrap_err();
        assert!(refused.to_string().contains("revoked"), "{seconds}: {refused}");
        let issuer = &alpha.enrolled.issuers[0];
        for response in &answer.ocsp {
            mesh_ca::parse_ocsp_response(&response.der, issuer, theirs.utc_now()).unwrap();
        }
        assert_eq!(answer.ocsp.len(), 2);
    }
    // Past the allowance of a quarter of an hour nothing is believed that was made just now.
    let behind = off_by(-960);
    let config = client_config(running.anchors(), Some(&alpha.identity), &behind);
    assert!(connect(running.address, config).await.is_err());
    let chain = [CertificateDer::from(service.issuer.clone())];
    let early = verify_chain(&service.leaf, &chain, &running.anchors(), behind.utc_now(), Usage::Any, None);
    assert!(matches!(early, Err(ChainError::NotYetValid(_))), "{early:?}");
    running.stop().await.unwrap();
}
