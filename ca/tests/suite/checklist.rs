//! The rules that strict verifiers hold us to, by the number of their line in the checklist, and the test of each.

use std::time::Duration;

use mesh_ca::*;
use time::UtcDateTime;
use time::macros::utc_datetime;

use crate::authority::*;
use crate::{ceremony, chains, crls, csrs, hierarchy, hostile, imports, issuing, keys, lints, ocsp, specs};

/// Line, rule in short, tests.
type Line = (u8, &'static str, &'static [fn()]);

const LINES: &[Line] = &[
    (
        1,
        "serials random, positive, never repeated",
        &[issuing::renewing_with_the_same_key_takes_another_serial, serials_are_random_and_sixteen_octets],
    ),
    (2, "no defaults of rcgen", &[lints::each_broken_leaf_is_found]),
    (
        3,
        "inner and outer signature algorithm",
        &[keys::signature_algorithms_have_the_parameters_of_their_rfc],
    ),
    (
        4,
        "issuer is the issuer's subject; a new key has a new subject",
        &[
            imports::a_ca_whose_name_cannot_be_reproduced_is_refused,
            hierarchy::several_issuing_cas_live_side_by_side_under_their_own_subjects,
        ],
    ),
    (5, "UTCTime to 2049, GeneralizedTime after", &[times_change_their_form_with_2050]),
    (
        6,
        "notAfter is the minimum over the chain",
        &[
            issuing::a_leaf_never_reaches_beyond_its_issuer,
            chains::the_lease_ends_with_the_first_certificate_of_the_chain,
        ],
    ),
    (
        7,
        "empty subject only with critical names",
        &[issuing::a_long_name_leaves_the_subject_empty_and_the_names_critical],
    ),
    (
        8,
        "names in their one form",
        &[csrs::malformed_names_are_refused_by_their_fault, lints::each_broken_leaf_is_found],
    ),
    (
        9,
        "one SPIFFE ID with both purposes",
        &[
            chains::a_leaf_of_each_profile_reads_back_as_its_template_said,
            chains::a_signed_certificate_that_fits_no_profile_is_refused,
        ],
    ),
    (
        10,
        "basicConstraints",
        &[
            lints::each_broken_ca_is_found,
            lints::each_broken_leaf_is_found,
            extensions_are_encoded_as_der_wants,
        ],
    ),
    (
        11,
        "keyUsage critical and minimal",
        &[extensions_are_encoded_as_der_wants, lints::each_broken_ca_is_found],
    ),
    (
        12,
        "extendedKeyUsage minimal",
        &[
            chains::a_single_purpose_leaf_is_refused_for_the_other_purpose,
            imports::a_ca_that_strict_verifiers_refuse_is_refused_by_its_fault,
        ],
    ),
    (
        13,
        "SKI on every CA, AKI equal to it",
        &[every_authority_key_identifier_is_the_issuers, imports::a_foreign_intermediate_comes_with_its_root],
    ),
    (
        14,
        "no extension twice, own ones non-critical",
        &[lints::each_broken_leaf_is_found, extensions_are_encoded_as_der_wants],
    ),
    (
        15,
        "no URI or directory name constraints",
        &[imports::a_ca_that_strict_verifiers_refuse_is_refused_by_its_fault],
    ),
    (16, "no policy mappings", &[no_certificate_carries_policies]),
    (
        17,
        "pointers plain http, shard fixed at issuance",
        &[
            crls::certificates_and_crl_agree_on_the_address,
            hierarchy::an_issuing_ca_certificate_says_where_the_roots_crl_is,
        ],
    ),
    (
        18,
        "noRevAvail without pointers",
        &[
            specs::a_short_lived_profile_carries_no_rev_avail_and_no_pointers,
            chains::a_short_lived_leaf_needs_no_crl_of_its_own,
        ],
    ),
    (
        19,
        "key types and sizes; the CSR's signature",
        &[
            csrs::weak_and_foreign_keys_are_refused,
            csrs::a_signature_by_another_key_is_refused,
            issuing::the_issuers_own_key_is_not_certified_as_a_leaf,
        ],
    ),
    (
        20,
        "strict DER, two parsers",
        &[hostile::no_changed_byte_is_believed, lints::each_broken_leaf_is_found],
    ),
    (21, "never identified by a hash of the file", &[a_malleable_signature_changes_no_identity]),
    (22, "chains stay short", &[chains::limits_hold_before_anything_is_parsed]),
    (
        23,
        "upper bounds",
        &[
            csrs::size_and_form_are_judged_first,
            chains::limits_hold_before_anything_is_parsed,
            lints::each_broken_leaf_is_found,
        ],
    ),
    (
        24,
        "CRL version, times, AKI, number",
        &[crls::a_crl_reads_back_as_it_was_planned, lints::each_broken_crl_is_found],
    ),
    (
        25,
        "empty list absent; cRLSign",
        &[lints::an_empty_list_of_revoked_certificates_is_found, crls::a_crl_of_somebody_else_is_refused],
    ),
    (
        26,
        "issuing distribution point",
        &[crls::a_limited_crl_says_what_it_covers, crls::certificates_and_crl_agree_on_the_address],
    ),
    (
        27,
        "the CRL's AKI is the CA's SKI",
        &[lints::each_broken_crl_is_found, every_authority_key_identifier_is_the_issuers],
    ),
    (28, "no delta, indirect or partitioned CRLs", &[crls::crls_that_rustls_refuses_are_refused]),
    (
        29,
        "a CRL for every CA, root included",
        &[
            chains::revoked_leaves_are_refused_and_every_ca_needs_a_crl,
            ceremony::a_request_becomes_an_issuing_ca_and_the_roots_crl,
        ],
    ),
    (
        30,
        "CRLs past nextUpdate are refused by our verifiers",
        &[chains::revoked_leaves_are_refused_and_every_ca_needs_a_crl],
    ),
    (
        31,
        "reasons; an entry stays one CRL after expiry",
        &[lints::each_broken_crl_is_found, an_entry_leaves_one_crl_after_expiry],
    ),
    (32, "new CRL well before half-life, numbers rise", &[crl_lifetimes_leave_room_for_an_outage]),
    (33, "delegated responder", &[ocsp::the_delegate_can_do_nothing_but_sign_responses]),
    (
        34,
        "CertID's hash echoed, SHA-1 and SHA-256",
        &[ocsp::an_answer_echoes_the_query_and_states_the_status],
    ),
    (
        35,
        "one response with both times; revoked as the CRL",
        &[ocsp::an_answer_echoes_the_query_and_states_the_status],
    ),
    (36, "never issued is not good", &[ocsp::a_foreign_serial_can_be_answered_with_unknown]),
    (
        37,
        "nonces; unsigned failures",
        &[
            ocsp::an_answer_echoes_the_query_and_states_the_status,
            ocsp::forged_and_misdirected_responses_are_refused,
        ],
    ),
];

#[test]
fn every_line_on_certificates_crls_and_ocsp_has_a_test() {
    let numbers: Vec<u8> = LINES.iter().map(|(number, ..)| *number).collect();
    assert_eq!(numbers, (1..=37).collect::<Vec<u8>>());
    assert!(LINES.iter().all(|(_, rule, tests)| !rule.is_empty() && !tests.is_empty()));
}

#[test]
fn serials_are_random_and_sixteen_octets() {
    let authority = Authority::new();
    let key = LeafKey::generate().unwrap();
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..50 {
        let template = Authority::template(Profile::Server);
        let issued =
            issue_leaf(&authority.issuing, &authority.store, &key, &template, SerialNumber::random(&mut rng))
                .unwrap();
        let (_, parsed) = x509_parser::parse_x509_certificate(&issued.der).unwrap();
        assert_eq!(parsed.raw_serial(), issued.serial.as_bytes());
        assert_eq!(parsed.raw_serial()[0] & 0xc0, 0x40, "positive, and no shorter encoding");
        assert!(seen.insert(issued.serial));
    }
}

/// A chain whose validity reaches from `now` over `lifetime`, with the leaf cut to 90 days.
fn validity_of(der: &[u8]) -> [(bool, UtcDateTime); 2] {
    let (_, parsed) = x509_parser::parse_x509_certificate(der).unwrap();
    [parsed.validity().not_before, parsed.validity().not_after]
        .map(|at| (at.is_utctime(), at.to_datetime().to_utc()))
}

#[test]
fn times_change_their_form_with_2050() {
    let last = utc_datetime!(2049-12-31 23:59:59);
    for (now, lifetime) in [
        (utc_datetime!(2038-01-19 03:14:07), Duration::from_secs(72 * 3600)),
        (utc_datetime!(2038-01-19 03:14:08), Duration::from_secs(1)),
        (utc_datetime!(2049-12-31 23:00:00), Duration::from_secs(3599)),
        (utc_datetime!(2049-12-31 23:00:00), Duration::from_secs(3600)),
        (utc_datetime!(2050-01-01 00:00:00), Duration::from_secs(600)),
        (utc_datetime!(2028-02-28 23:59:59), Duration::from_secs(24 * 3600)),
        (utc_datetime!(2028-02-29 12:00:00), Duration::from_secs(365 * 24 * 3600 / 5)),
    ] {
        let authority = Authority::made_at(now, "mesh.internal");
        let names = vec![dns("shop.mesh.internal")];
        let template =
            LeafTemplate::service(Profile::Server, label("web-1"), label("shop"), names, now, lifetime);
        let leaf = authority.issue(&template).issued;
        for der in [authority.root.certificate_der(), authority.issuing.certificate_der(), &leaf.der] {
            for (is_utc, at) in validity_of(der) {
                assert_eq!(is_utc, at <= last, "{at}");
            }
        }
        let [(_, begin), (_, end)] = validity_of(&leaf.der);
        assert_eq!((begin, end), (now - CLOCK_SKEW_ALLOWANCE, now + lifetime));
        // The CRL and an OCSP response of the same moment.
        let plan = CrlPlan::new(1, now, CRL_LIFETIME, &[]);
        let crl = build_crl(&authority.issuing, &authority.store, &plan).unwrap();
        let read = Crl::parse_verified(&crl, authority.issuing.certificate_der()).unwrap();
        assert_eq!(
            (read.this_update(), read.next_update()),
            (now - CLOCK_SKEW_ALLOWANCE, now + CRL_LIFETIME)
        );
        let responder = OcspResponder::issue(
            &authority.issuing,
            &authority.store,
            LeafKey::generate().unwrap(),
            SerialNumber::random(&mut rng),
            now,
        )
        .unwrap();
        let answer = OcspAnswer::new(OcspStatus::Good, now, OCSP_RESPONSE_LIFETIME);
        let response = responder.presign(&leaf.serial, CertIdHash::Sha1, &answer).unwrap();
        assert!(parse_ocsp_response(&response, authority.issuing.certificate_der(), now).is_ok());
        // A verifier whose clock is ten minutes off either way.
        let verify = |at| {
            verify_chain(&leaf.der, &authority.intermediates(), &authority.anchors(), at, Usage::Server, None)
        };
        let skew = Duration::from_secs(600);
        assert!(verify(now).is_ok() && verify(now - skew).is_ok());
        assert_eq!(verify(now + skew).is_ok(), skew <= lifetime);
        assert!(parse_ocsp_response(&response, authority.issuing.certificate_der(), now - skew).is_ok());
    }
}

#[test]
fn extensions_are_encoded_as_der_wants() {
    let authority = Authority::new();
    let raw = |der: &[u8], oid: &str| {
        let (_, parsed) = x509_parser::parse_x509_certificate(der).unwrap();
        let found = parsed.extensions().iter().find(|e| e.oid.to_id_string() == oid).unwrap();
        (found.critical, found.value.to_vec())
    };
    for profile in Profile::ALL {
        let leaf = authority.leaf(profile).issued.der;
        // cA FALSE is the default and left out; digitalSignature alone, trailing zero bits trimmed.
        assert_eq!(raw(&leaf, "2.5.29.19"), (true, vec![0x30, 0]));
        assert_eq!(raw(&leaf, "2.5.29.15"), (true, vec![3, 2, 7, 0x80]));
        assert!(!raw(&leaf, "2.5.29.37").0);
    }
    let node = authority.leaf(Profile::Node).issued.der;
    assert!(!raw(&node, "1.3.6.1.4.1.32473.1.1").0);
    assert_eq!(raw(authority.root.certificate_der(), "2.5.29.19"), (true, vec![0x30, 3, 1, 1, 0xff]));
    let issuing = authority.issuing.certificate_der();
    assert_eq!(raw(issuing, "2.5.29.19"), (true, vec![0x30, 6, 1, 1, 0xff, 2, 1, 0]));
    assert_eq!(raw(issuing, "2.5.29.15"), (true, vec![3, 2, 1, 6]));
}

#[test]
fn every_authority_key_identifier_is_the_issuers() {
    let authority = Authority::new();
    let (root, issuing) = (&authority.root, &authority.issuing);
    let aki = |der: &[u8]| {
        let (_, parsed) = x509_parser::parse_x509_certificate(der).unwrap();
        parsed.extensions().iter().find(|e| e.oid.to_id_string() == "2.5.29.35").map(|e| e.value.to_vec())
    };
    // [0] keyIdentifier alone, never issuer and serial.
    let expected = |issuer: &Issuer| [&[0x30, 22, 0x80, 20], issuer.key_identifier().as_bytes()].concat();
    assert_eq!(aki(root.certificate_der()), None);
    assert_eq!(aki(issuing.certificate_der()), Some(expected(root)));
    for profile in Profile::ALL {
        assert_eq!(aki(&authority.leaf(profile).issued.der), Some(expected(issuing)));
    }
    for (crl, issuer) in authority.crls(&[]).iter().zip([issuing, root]) {
        let (_, parsed) = x509_parser::parse_x509_crl(crl).unwrap();
        let found = parsed.extensions().iter().find(|e| e.oid.to_id_string() == "2.5.29.35").unwrap();
        assert_eq!(found.value, expected(issuer));
    }
}

#[test]
fn no_certificate_carries_policies() {
    let authority = Authority::new();
    // certificatePolicies, policyMappings, policyConstraints, inhibitAnyPolicy.
    for (arc, content) in [
        (32, vec![0x30, 7, 0x30, 5, 6, 3, 0x2a, 3, 4]),
        (33, vec![0x30, 0]),
        (36, vec![0x30, 0]),
        (54, vec![2, 1, 0]),
    ] {
        let mut params = Authority::raw_params(&[]);
        params.extended_key_usages.truncate(1);
        params.custom_extensions.push(rcgen::CustomExtension::from_oid_content(&[2, 5, 29, arc], content));
        let der = authority.sign_raw(&params, &LeafKey::generate().unwrap());
        let found = lint_leaf(&der, authority.issuing.certificate_der(), authority.issuing.domain());
        assert!(found.contains(&Finding::ForeignExtension(format!("2.5.29.{arc}"))), "{arc}: {found:?}");
    }
}

/// An ECDSA signature (r, s) holds as (r, n - s) too: other bytes, another hash of the file, the same certificate.
#[test]
fn a_malleable_signature_changes_no_identity() {
    use der::{Decode as _, Encode as _};
    let authority = Authority::new();
    let leaf = authority.leaf(Profile::Server).issued;
    // Order of P-256, SEC 2 §2.4.2.
    let order = hex::decode("ffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551").unwrap();
    let outer: Vec<der::AnyRef<'_>> = Vec::from_der(&leaf.der).unwrap();
    let signature =
        der::asn1::BitStringRef::from_der(&outer[2].to_der().unwrap()).unwrap().raw_bytes().to_vec();
    let numbers: Vec<der::asn1::UintRef<'_>> = Vec::from_der(&signature).unwrap();
    let s = numbers[1].as_bytes();
    let s = [vec![0; 32 - s.len()], s.to_vec()].concat();
    let mut difference = vec![0; 32];
    let mut borrow = 0_i16;
    for index in (0..32).rev() {
        let value = i16::from(order[index]) - i16::from(s[index]) - borrow;
        borrow = i16::from(value < 0);
        difference[index] = u8::try_from(value.rem_euclid(256)).unwrap();
    }
    let other = vec![numbers[0], der::asn1::UintRef::new(&difference).unwrap()].to_der().unwrap();
    let bits = der::asn1::BitString::from_bytes(&other).unwrap().to_der().unwrap();
    let twin = vec![outer[0], outer[1], der::AnyRef::from_der(&bits).unwrap()].to_der().unwrap();
    assert_ne!(twin, leaf.der);
    let (one, two) =
        (authority.verify(&leaf.der, Usage::Any).unwrap(), authority.verify(&twin, Usage::Any).unwrap());
    assert_eq!(one, two, "the same issuer, serial and key");
    // So a revocation by issuer and serial meets both.
    let lists = RevocationLists::new(authority.crls(&[leaf.serial]), ExpiredCrl::Refuse).unwrap();
    for der in [&leaf.der, &twin] {
        let verdict = verify_chain(
            der,
            &authority.intermediates(),
            &authority.anchors(),
            NOW,
            Usage::Any,
            Some(&lists),
        );
        assert_eq!(verdict, Err(ChainError::Revoked));
    }
}

#[test]
fn an_entry_leaves_one_crl_after_expiry() {
    let end = NOW + 72 * HOUR;
    // CRLs of one shard, one every 12 h: the entry is in the first that was made after `end`, and in no later one.
    let mut previous = None;
    let mut listed = Vec::new();
    for step in 0..10_u32 {
        let plan = CrlPlan::new(u64::from(step) + 1, NOW + step * 12 * HOUR, CRL_LIFETIME, &[]);
        listed.push((plan.this_update, stays_listed(end, previous)));
        previous = Some(plan.this_update);
    }
    let past: Vec<bool> = listed.iter().filter(|(made, _)| *made > end).map(|(_, stays)| *stays).collect();
    assert_eq!(past, [true, false, false]);
    assert!(listed.iter().filter(|(made, _)| *made <= end).all(|(_, stays)| *stays));
}

#[test]
fn crl_lifetimes_leave_room_for_an_outage() {
    let half_a_day = Duration::from_secs(12 * 3600);
    assert!(CRL_LIFETIME >= 4 * half_a_day, "one CRL a half-day, and several may be missed");
    assert!(ROOT_CRL_LIFETIME > CRL_LIFETIME);
    assert!(OCSP_RESPONSE_LIFETIME < OCSP_RESPONDER_LIFETIME);
    // A number once used is refused by nobody here: it comes from the journal. It may only be a plain rising integer.
    let authority = Authority::new();
    let number = |n| {
        let der = build_crl(&authority.issuing, &authority.store, &CrlPlan::new(n, NOW, CRL_LIFETIME, &[]))
            .unwrap();
        Crl::parse_verified(&der, authority.issuing.certificate_der()).unwrap().number()
    };
    assert_eq!([number(127), number(128), number(u64::MAX)], [127, 128, u64::MAX]);
}
