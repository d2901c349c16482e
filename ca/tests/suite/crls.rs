//! CRLs, written and read.

use mesh_ca::*;

use crate::authority::*;
use crate::chains::forged_crl;

fn entries(count: u8) -> Vec<RevokedEntry> {
    let reasons = RevocationReason::ALL.into_iter().cycle();
    (0..count)
        .zip(reasons)
        .map(|(_, reason)| RevokedEntry {
            serial: SerialNumber::random(&mut rng),
            revoked_at: NOW - HOUR,
            reason,
        })
        .collect()
}

#[test]
fn a_crl_reads_back_as_it_was_planned() {
    let authority = Authority::new();
    for count in [0, 1, 7, 200] {
        for number in [1, 127, 128, 65_535, u64::MAX] {
            let entries = entries(count);
            let plan = CrlPlan::new(number, NOW, CRL_LIFETIME, &entries);
            let der = build_crl(&authority.issuing, &authority.store, &plan).unwrap();
            let crl = Crl::parse_verified(&der, authority.issuing.certificate_der()).unwrap();
            assert_eq!(crl.number(), number);
            assert_eq!(crl.this_update(), NOW - CLOCK_SKEW_ALLOWANCE);
            assert_eq!(crl.next_update(), NOW + CRL_LIFETIME);
            assert_eq!(crl.issuer_key_id(), authority.issuing.key_identifier());
            assert_eq!(crl.len(), usize::from(count));
            assert_eq!(crl.is_empty(), count == 0);
            let mut sorted = entries.clone();
            sorted.sort_by_key(|entry| entry.serial);
            assert_eq!(crl.entries().copied().collect::<Vec<_>>(), sorted);
            assert!(entries.iter().all(|entry| crl.contains(&entry.serial)));
            assert!(!crl.contains(&SerialNumber::random(&mut rng)));
            assert_eq!(lint_crl(&der, authority.issuing.certificate_der()), []);
        }
    }
}

#[test]
fn certificates_and_crl_agree_on_the_address() {
    let authority = Authority::new();
    let url = "http://crl.mesh.internal/0.crl";
    let template = LeafTemplate { crl_url: Some(url.to_owned()), ..Authority::template(Profile::Peer) };
    let (good, bad) = (authority.issue(&template), authority.issue(&template));
    let entry =
        RevokedEntry { serial: bad.issued.serial, revoked_at: NOW, reason: RevocationReason::Superseded };
    let entries = [entry];
    let plan = CrlPlan { url: Some(url), ..CrlPlan::new(1, NOW, CRL_LIFETIME, &entries) };
    let with_address = build_crl(&authority.issuing, &authority.store, &plan).unwrap();
    let root = authority.crls(&[]).remove(1);
    let lists = RevocationLists::new([&with_address, &root], ExpiredCrl::Refuse).unwrap();
    let check = |leaf: &Leaf| {
        let (intermediates, anchors) = (authority.intermediates(), authority.anchors());
        verify_chain(&leaf.issued.der, &intermediates, &anchors, NOW, Usage::Any, Some(&lists)).map(drop)
    };
    assert_eq!(check(&good), Ok(()));
    assert_eq!(check(&bad), Err(ChainError::Revoked));
    // A CRL for another address says nothing about these certificates.
    let plan = CrlPlan { url: Some("http://crl.mesh.internal/1.crl"), ..plan };
    let other = build_crl(&authority.issuing, &authority.store, &plan).unwrap();
    let lists = RevocationLists::new([&other, &root], ExpiredCrl::Refuse).unwrap();
    let (intermediates, anchors) = (authority.intermediates(), authority.anchors());
    let unknown = verify_chain(&good.issued.der, &intermediates, &anchors, NOW, Usage::Any, Some(&lists));
    assert_eq!(unknown, Err(ChainError::RevocationUnknown));
}

#[test]
fn impossible_plans_are_refused() {
    let authority = Authority::new();
    let build = |plan: &CrlPlan<'_>| build_crl(&authority.issuing, &authority.store, plan).map(drop);
    let twice = [entries(1), entries(0)].concat();
    let twice = [twice[0], twice[0]];
    let plan = CrlPlan::new(1, NOW, CRL_LIFETIME, &twice);
    assert_eq!(build(&plan), Err(CrlError::Repeated(twice[0].serial)));
    let backwards = CrlPlan { next_update: NOW - HOUR, ..CrlPlan::new(1, NOW, CRL_LIFETIME, &[]) };
    assert_eq!(build(&backwards), Err(CrlError::Updates));
    let future = [RevokedEntry { revoked_at: NOW + 1000 * HOUR, ..twice[0] }];
    let plan = CrlPlan::new(1, NOW, CRL_LIFETIME, &future);
    assert_eq!(build(&plan), Err(CrlError::Lint(Finding::CrlEntry)));
    let empty = MemoryKeyStore::new();
    let refused = build_crl(&authority.issuing, &empty, &CrlPlan::new(1, NOW, CRL_LIFETIME, &[]));
    let unknown = KeyStoreError::UnknownKey(KeyId::parse("issuing").unwrap());
    assert_eq!(refused, Err(CrlError::KeyStore(unknown)));
}

#[test]
fn a_crl_of_somebody_else_is_refused() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    let issuing = authority.issuing.certificate_der();
    let [own, roots] = <[Vec<u8>; 2]>::try_from(authority.crls(&[])).unwrap();
    assert!(Crl::parse_verified(&own, issuing).is_ok());
    assert_eq!(Crl::parse_verified(&roots, issuing), Err(CrlError::OtherIssuer));
    assert_eq!(Crl::parse_verified(&stranger.crls(&[])[0], issuing), Err(CrlError::OtherIssuer));
    assert_eq!(Crl::parse_verified(&forged_crl(&authority, &stranger), issuing), Err(CrlError::Signature));
    let leaf = authority.leaf(Profile::Node).issued.der;
    assert_eq!(Crl::parse_verified(&own, &leaf), Err(CrlError::NotCrlIssuer));
    assert_eq!(
        Crl::parse_verified(&vec![0x30; CRL_BYTES_MAX + 1], issuing),
        Err(CrlError::TooLarge(CRL_BYTES_MAX + 1))
    );
    let mut trailing = own;
    trailing.push(0);
    assert_eq!(Crl::parse_verified(&trailing, issuing), Err(CrlError::Malformed));
}

#[test]
fn a_crl_that_covers_only_some_certificates_is_refused() {
    let authority = Authority::new();
    let der = rustls_pki_types::CertificateDer::from(authority.issuing.certificate_der().to_vec());
    let key = LeafKey::from_pkcs8_der(&authority.issuing_pkcs8).unwrap();
    let issuer = rcgen::Issuer::from_ca_cert_der(&der, key).unwrap();
    let id = authority.issuing.key_identifier().as_bytes().to_vec();
    for scope in [rcgen::CrlScope::UserCertsOnly, rcgen::CrlScope::CaCertsOnly] {
        let point = rcgen::CrlDistributionPoint { uris: vec!["http://crl.mesh.internal/".to_owned()] };
        let crl = rcgen::CertificateRevocationListParams {
            this_update: NOW.to_offset(time::UtcOffset::UTC),
            next_update: (NOW + CRL_LIFETIME).to_offset(time::UtcOffset::UTC),
            crl_number: rcgen::SerialNumber::from(3_u64),
            issuing_distribution_point: Some(rcgen::CrlIssuingDistributionPoint {
                distribution_point: point,
                scope: Some(scope),
            }),
            revoked_certs: Vec::new(),
            key_identifier_method: rcgen::KeyIdMethod::PreSpecified(id.clone()),
        };
        let crl = crl.signed_by(&issuer).unwrap();
        let refused = Crl::parse_verified(crl.der(), authority.issuing.certificate_der());
        assert_eq!(refused, Err(CrlError::Extension("2.5.29.28".to_owned())), "{scope:?}");
    }
}
