//! OCSP: what a delegate signs, and what is believed.

use der::{Decode as _, Encode as _};
use mesh_ca::*;
use x509_ocsp::{CertId, OcspRequest, Request, TbsRequest};

use crate::authority::*;

fn responder(authority: &Authority, key: KeyAlgorithm) -> OcspResponder {
    let key = LeafKey::generate_for(key).unwrap();
    OcspResponder::issue(&authority.issuing, &authority.store, key, SerialNumber::random(&mut rng), NOW)
        .unwrap()
}

/// A request as a client makes it, with the hash's parameters written or left out.
fn request(issuer_der: &[u8], serial: &[u8], hash: CertIdHash, null: bool, nonce: Option<&[u8]>) -> Vec<u8> {
    use aws_lc_rs::digest;
    let (oid, algorithm) = match hash {
        CertIdHash::Sha1 => ("1.3.14.3.2.26", &digest::SHA1_FOR_LEGACY_USE_ONLY),
        CertIdHash::Sha256 => ("2.16.840.1.101.3.4.2.1", &digest::SHA256),
    };
    let issuer = x509_cert::Certificate::from_der(issuer_der).unwrap().tbs_certificate;
    let octets = |bytes: &[u8]| {
        der::asn1::OctetString::new(digest::digest(algorithm, bytes).as_ref().to_vec()).unwrap()
    };
    let id = CertId {
        hash_algorithm: x509_cert::spki::AlgorithmIdentifierOwned {
            oid: oid.parse().unwrap(),
            parameters: null.then(|| der::asn1::Null.into()),
        },
        issuer_name_hash: octets(&issuer.subject.to_der().unwrap()),
        issuer_key_hash: octets(issuer.subject_public_key_info.subject_public_key.raw_bytes()),
        serial_number: x509_cert::serial_number::SerialNumber::new(serial).unwrap(),
    };
    let nonce = nonce.map(|nonce| {
        let value = der::asn1::OctetString::new(nonce).unwrap().to_der().unwrap();
        vec![x509_cert::ext::Extension {
            extn_id: "1.3.6.1.5.5.7.48.1.2".parse().unwrap(),
            critical: false,
            extn_value: der::asn1::OctetString::new(value).unwrap(),
        }]
    });
    let tbs_request = TbsRequest {
        request_list: vec![Request { req_cert: id, single_request_extensions: None }],
        request_extensions: nonce,
        ..TbsRequest::default()
    };
    OcspRequest { tbs_request, optional_signature: None }.to_der().unwrap()
}

fn statuses() -> Vec<OcspStatus> {
    let revoked = |reason| OcspStatus::Revoked { at: NOW - HOUR, reason };
    let mut all = vec![OcspStatus::Good, OcspStatus::Unknown];
    all.extend(RevocationReason::ALL.map(revoked));
    all
}

/// Checklist 34, 35 and 37: the CertID comes back as it was sent, the nonce with it, and the status says what the CRL says.
#[test]
pub(crate) fn an_answer_echoes_the_query_and_states_the_status() {
    for issuing_key in [KeyAlgorithm::EcdsaP256, KeyAlgorithm::EcdsaP384, KeyAlgorithm::Ed25519] {
        let authority = Authority::with_keys(NOW, "mesh.internal", KeyAlgorithm::EcdsaP256, issuing_key);
        let issuing = authority.issuing.certificate_der();
        let responder = responder(&authority, issuing_key);
        let serial = SerialNumber::random(&mut rng);
        for hash in CertIdHash::ALL {
            for null in [true, false] {
                for nonce in [None, Some([7_u8; 1].as_slice()), Some(&[8; 128])] {
                    let der = request(issuing, serial.as_bytes(), hash, null, nonce);
                    let query = OcspQuery::from_der(&der).unwrap();
                    assert_eq!(query.serial(), Some(serial));
                    for status in statuses() {
                        let answer = OcspAnswer::new(status, NOW, OCSP_RESPONSE_LIFETIME);
                        let response = responder.answer(&query, &answer).unwrap();
                        let read = parse_ocsp_response(&response, issuing, NOW).unwrap();
                        let expected = VerifiedOcspResponse {
                            serial: Some(serial),
                            status,
                            hash,
                            this_update: NOW - CLOCK_SKEW_ALLOWANCE,
                            next_update: NOW + OCSP_RESPONSE_LIFETIME,
                            produced_at: NOW,
                            nonce: nonce.map(<[u8]>::to_vec),
                        };
                        assert_eq!(read, expected);
                        assert_eq!(lint_ocsp_response(&response, issuing), []);
                        let id = OcspRequest::from_der(&der).unwrap().tbs_request.request_list[0]
                            .req_cert
                            .to_der()
                            .unwrap();
                        assert!(response.windows(id.len()).any(|window| window == id), "CertID echoed");
                    }
                }
            }
        }
    }
}

/// Checklist 36: what is no serial of ours was never issued, and a caller can tell.
#[test]
pub(crate) fn a_foreign_serial_can_be_answered_with_unknown() {
    let authority = Authority::new();
    let issuing = authority.issuing.certificate_der();
    for serial in [&[1_u8][..], &[0x3f; 16], &[0x11; 20]] {
        let query = OcspQuery::from_der(&request(issuing, serial, CertIdHash::Sha1, true, None)).unwrap();
        assert_eq!(query.serial(), None);
        let answer = OcspAnswer::new(OcspStatus::Unknown, NOW, OCSP_RESPONSE_LIFETIME);
        let responder = responder(&authority, KeyAlgorithm::EcdsaP256);
        let response = responder.answer(&query, &answer).unwrap();
        let read = parse_ocsp_response(&response, issuing, NOW).unwrap();
        assert_eq!((read.serial, read.status), (None, OcspStatus::Unknown));
        // A caller that takes it for good gets no signature out.
        let good = OcspAnswer::new(OcspStatus::Good, NOW, OCSP_RESPONSE_LIFETIME);
        assert_eq!(responder.answer(&query, &good), Err(OcspError::Lint(Finding::OcspForeignSerial)));
    }
}

#[test]
fn a_presigned_answer_is_what_a_client_asks_for() {
    let authority = Authority::new();
    let issuing = authority.issuing.certificate_der();
    let responder = responder(&authority, KeyAlgorithm::EcdsaP256);
    let serial = SerialNumber::random(&mut rng);
    let answer = OcspAnswer::new(OcspStatus::Good, NOW, OCSP_RESPONSE_LIFETIME);
    for hash in CertIdHash::ALL {
        let response = responder.presign(&serial, hash, &answer).unwrap();
        let read = parse_ocsp_response(&response, issuing, NOW + HOUR).unwrap();
        assert_eq!(
            (read.serial, read.status, read.hash, read.nonce),
            (Some(serial), OcspStatus::Good, hash, None)
        );
        assert_eq!(
            parse_ocsp_response(&response, issuing, NOW + OCSP_RESPONSE_LIFETIME + HOUR),
            Err(OcspResponseError::Expired(NOW + OCSP_RESPONSE_LIFETIME))
        );
        assert_eq!(
            parse_ocsp_response(&response, issuing, NOW - HOUR),
            Err(OcspResponseError::NotYetValid(NOW - CLOCK_SKEW_ALLOWANCE))
        );
    }
}

/// Checklist 33: issued directly by the CA, OCSPSigning alone, ocsp-nocheck, short; and never taken for a mesh identity.
#[test]
pub(crate) fn the_delegate_can_do_nothing_but_sign_responses() {
    let authority = Authority::new();
    let responder = responder(&authority, KeyAlgorithm::EcdsaP256);
    let der = responder.certificate_der();
    assert_eq!(lint_ocsp_responder(&der, authority.issuing.certificate_der()), []);
    let (_, parsed) = x509_parser::parse_x509_certificate(&der).unwrap();
    let usage = parsed.extended_key_usage().unwrap().unwrap().value;
    assert!(usage.ocsp_signing && !usage.server_auth && !usage.client_auth && usage.other.is_empty());
    assert!(
        parsed.extensions().iter().any(|e| e.oid.to_id_string() == "1.3.6.1.5.5.7.48.1.5" && !e.critical)
    );
    assert_eq!(parsed.issuer().as_raw(), {
        let (_, issuing) = x509_parser::parse_x509_certificate(authority.issuing.certificate_der()).unwrap();
        issuing.subject().as_raw().to_vec()
    });
    assert_eq!(responder.not_after(), NOW + OCSP_RESPONDER_LIFETIME);
    assert!(matches!(authority.verify(&der, Usage::Any), Err(ChainError::Leaf(_))));

    // A leaf that happens to exist is no delegate.
    let leaf = authority.leaf(Profile::Server);
    let taken = OcspResponder::new(authority.issuing.certificate_der(), leaf.key, &leaf.issued.der);
    assert!(matches!(taken, Err(OcspError::Lint(_))));
    // Nor is a delegate's certificate with another key, or of another issuer.
    let other_key = LeafKey::generate().unwrap();
    let taken = OcspResponder::new(authority.issuing.certificate_der(), other_key, &der);
    assert_eq!(taken.unwrap_err(), OcspError::NotResponder);
}

#[test]
pub(crate) fn forged_and_misdirected_responses_are_refused() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    let issuing = authority.issuing.certificate_der();
    let responder = responder(&authority, KeyAlgorithm::EcdsaP256);
    let serial = SerialNumber::random(&mut rng);
    let answer = OcspAnswer::new(OcspStatus::Good, NOW, OCSP_RESPONSE_LIFETIME);
    let response = responder.presign(&serial, CertIdHash::Sha256, &answer).unwrap();
    assert_eq!(
        parse_ocsp_response(&response, stranger.issuing.certificate_der(), NOW),
        Err(OcspResponseError::OtherIssuer)
    );
    // One bit of the serial changed: the signature no longer holds.
    let at = response.windows(16).position(|window| window == serial.as_bytes()).unwrap();
    let mut changed = response.clone();
    changed[at + 15] ^= 1;
    assert_eq!(parse_ocsp_response(&changed, issuing, NOW), Err(OcspResponseError::Signature));
    assert_eq!(lint_ocsp_response(&changed, issuing), [Finding::OcspSignature]);
    for (failure, code) in OcspFailure::ALL.into_iter().zip([1, 2, 3, 6]) {
        assert_eq!(
            parse_ocsp_response(&failure.to_der(), issuing, NOW),
            Err(OcspResponseError::Failure(code))
        );
    }
    assert_eq!(parse_ocsp_response(b"", issuing, NOW), Err(OcspResponseError::Malformed));
    let huge = vec![0x30; OCSP_RESPONSE_BYTES_MAX + 1];
    assert_eq!(parse_ocsp_response(&huge, issuing, NOW), Err(OcspResponseError::TooLarge));

    let query = OcspQuery::from_der(&request(
        stranger.issuing.certificate_der(),
        serial.as_bytes(),
        CertIdHash::Sha1,
        true,
        None,
    ));
    assert_eq!(responder.answer(&query.unwrap(), &answer), Err(OcspError::OtherIssuer));
    let late = OcspAnswer { next_update: responder.not_after() + HOUR, ..answer };
    let refused = responder.presign(&serial, CertIdHash::Sha1, &late);
    assert_eq!(refused, Err(OcspError::Updates(responder.not_after())));
}
