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
pub(crate) fn a_crl_reads_back_as_it_was_planned() {
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
pub(crate) fn certificates_and_crl_agree_on_the_address() {
    let authority = Authority::new();
    let url = &HttpUrl::parse("http://crl.mesh.internal/0.crl").unwrap();
    let pointers = Pointers { crl: Some(url.clone()), ..Pointers::default() };
    let template = LeafTemplate { pointers, ..Authority::template(Profile::Peer) };
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
    let other = HttpUrl::parse("http://crl.mesh.internal/1.crl").unwrap();
    let plan = CrlPlan { url: Some(&other), ..plan };
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
pub(crate) fn a_crl_of_somebody_else_is_refused() {
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

/// Checklist 26: fullName equal to the certificates' pointer, critical, at most one flag, FALSE never written.
#[test]
pub(crate) fn a_limited_crl_says_what_it_covers() {
    let authority = Authority::new();
    let url = HttpUrl::parse("http://crl.mesh.internal/7.crl").unwrap();
    for (scope, flag) in [
        (CrlScope::All, [].as_slice()),
        (CrlScope::UserCerts, &[0x81, 1, 0xff]),
        (CrlScope::CaCerts, &[0x82, 1, 0xff]),
    ] {
        let plan = CrlPlan { url: Some(&url), scope, ..CrlPlan::new(3, NOW, CRL_LIFETIME, &[]) };
        let der = build_crl(&authority.issuing, &authority.store, &plan).unwrap();
        let crl = Crl::parse_verified(&der, authority.issuing.certificate_der()).unwrap();
        assert_eq!((crl.url(), crl.scope()), (Some(&url), scope));
        let (_, parsed) = x509_parser::parse_x509_crl(&der).unwrap();
        let extension = parsed.extensions().iter().find(|e| e.oid.to_id_string() == "2.5.29.28").unwrap();
        assert!(extension.critical);
        let name = [&[0x86, 30], url.as_str().as_bytes()].concat();
        let point = [&[0xa0, 34, 0xa0, 32], name.as_slice(), flag].concat();
        let length = u8::try_from(point.len()).unwrap();
        assert_eq!(extension.value, [&[0x30, length], point.as_slice()].concat());
    }
    let plan = CrlPlan { scope: CrlScope::UserCerts, ..CrlPlan::new(3, NOW, CRL_LIFETIME, &[]) };
    let refused = build_crl(&authority.issuing, &authority.store, &plan);
    assert_eq!(refused, Err(CrlError::ScopeWithoutAddress));
}

/// A CRL of our own whose issuing distribution point is replaced by other bytes of the same length.
fn with_point(authority: &Authority, point: &[u8]) -> Vec<u8> {
    let url = HttpUrl::parse("http://crl.mesh.internal/7.crl").unwrap();
    let plan =
        CrlPlan { url: Some(&url), scope: CrlScope::UserCerts, ..CrlPlan::new(3, NOW, CRL_LIFETIME, &[]) };
    let der = build_crl(&authority.issuing, &authority.store, &plan).unwrap();
    let (_, parsed) = x509_parser::parse_x509_crl(&der).unwrap();
    let extension = parsed.extensions().iter().find(|e| e.oid.to_id_string() == "2.5.29.28").unwrap();
    assert_eq!(extension.value.len(), point.len());
    let at = der.windows(point.len()).position(|window| window == extension.value).unwrap();
    let mut changed = der.clone();
    changed[at..at + point.len()].copy_from_slice(point);
    authority.sign_again(&changed)
}

/// Checklist 28: rustls refuses delta, indirect and reason-partitioned CRLs, so they are neither made nor taken.
#[test]
pub(crate) fn crls_that_rustls_refuses_are_refused() {
    let authority = Authority::new();
    let name = b"http://crl.mesh.internal/7.crl";
    let point = |flag: [u8; 3]| [&[0x30, 39, 0xa0, 34, 0xa0, 32, 0x86, 30], name.as_slice(), &flag].concat();
    let parse = |point: &[u8]| {
        Crl::parse_verified(&with_point(&authority, point), authority.issuing.certificate_der()).map(drop)
    };
    assert_eq!(parse(&point([0x81, 1, 0xff])), Ok(()));
    let refused = [
        ("indirect", point([0x84, 1, 0xff])),
        ("attribute certificates", point([0x85, 1, 0xff])),
        ("by reason", [&[0x30, 39, 0xa0, 33, 0xa0, 31, 0x86, 29], &name[1..], &[0x83, 2, 0, 0x80]].concat()),
    ];
    for (what, point) in refused {
        let verdict = parse(&point);
        let expected = [CrlError::Malformed, CrlError::Extension("2.5.29.28".to_owned())];
        assert!(verdict.as_ref().is_err_and(|error| expected.contains(error)), "{what}: {verdict:?}");
    }
}
