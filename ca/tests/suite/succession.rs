//! Roots that follow each other, and what an old pin still leads to.

use std::time::Duration;

use mesh_ca::*;
use rustls_pki_types::CertificateDer;

use crate::authority::{Authority, NOW, rng};

fn cross(signer: &Authority, root: &Authority) -> Vec<u8> {
    vouch_for_root(&signer.root, &signer.store, root.root.certificate_der(), NOW, &mut rng).unwrap().der
}

#[test]
fn whoever_pins_an_old_root_reaches_what_the_new_one_signs() {
    let (old, new, newest) = (Authority::new(), Authority::new(), Authority::new());
    let (to_new, to_newest) = (cross(&old, &new), cross(&new, &newest));
    let leaf = newest.leaf(Profile::Node);
    let der = |der: &[u8]| CertificateDer::from(der.to_vec());
    let chain =
        [newest.issuing.certificate_der(), newest.root.certificate_der(), &to_newest, &to_new].map(der);
    let anchors = |root: &Authority| {
        TrustAnchors::new(root.root.domain().clone(), [root.root.certificate_der()]).unwrap()
    };
    for pinned in [&old, &new, &newest] {
        verify_chain(&leaf.issued.der, &chain, &anchors(pinned), NOW, Usage::Any, None).unwrap();
    }
    let refused = verify_chain(&leaf.issued.der, &chain[..3], &anchors(&old), NOW, Usage::Any, None);
    assert_eq!(refused, Err(ChainError::UnknownIssuer), "a history with a hole leads nowhere");
}

#[test]
fn roots_are_vouched_for_by_an_unbroken_valid_history_only() {
    let (old, new, newest, stranger) =
        (Authority::new(), Authority::new(), Authority::new(), Authority::new());
    let (to_new, to_newest, foreign) = (cross(&old, &new), cross(&new, &newest), cross(&stranger, &newest));
    let roots = [&old, &new, &newest, &stranger].map(|authority| authority.root.certificate_der());
    let vouched = |lineage: &[&[u8]], at| vouched_roots(&roots[..1], &roots, lineage, Some(at));
    assert_eq!(vouched(&[&to_newest, &to_new], NOW), roots[..3], "in whatever order they come");
    assert_eq!(vouched(&[&to_newest], NOW), roots[..1]);
    assert_eq!(vouched(&[&foreign], NOW), roots[..1], "a stranger vouches for nobody");
    let mut forged = to_new.clone();
    *forged.last_mut().unwrap() ^= 1;
    assert_eq!(vouched(&[&forged, &to_newest], NOW), roots[..1]);
    let after = NOW + ROOT_LIFETIME + Duration::from_secs(86_400);
    assert_eq!(vouched(&[&to_newest, &to_new], after), roots[..1], "an expired root vouches for nobody");
    // A leaf or an issuing CA in the place of a link is none.
    let leaf = old.leaf(Profile::Node).issued.der;
    assert_eq!(vouched(&[&leaf, old.issuing.certificate_der()], NOW), roots[..1]);
    assert_eq!(vouched(&[b"noise", &[]], NOW), roots[..1]);
}

#[test]
fn a_cross_certificate_is_for_a_root_and_never_for_oneself() {
    let (old, new) = (Authority::new(), Authority::new());
    let sign = |der: &[u8]| vouch_for_root(&old.root, &old.store, der, NOW, &mut rng).map(drop);
    assert_eq!(sign(new.issuing.certificate_der()), Err(IssueError::NotCa));
    assert_eq!(sign(&new.leaf(Profile::Node).issued.der), Err(IssueError::NotCa));
    assert_eq!(sign(b""), Err(IssueError::NotCa));
    assert_eq!(sign(old.root.certificate_der()), Err(IssueError::IssuerKeyAsLeaf));
    let made = cross(&old, &new);
    check_cross(&made, new.root.certificate_der(), old.root.certificate_der()).unwrap();
    for (root, signer) in [(&old, &new), (&new, &new), (&old, &old)] {
        let checked = check_cross(&made, root.root.certificate_der(), signer.root.certificate_der());
        assert!(matches!(checked, Err(IssueError::Recheck(_))));
    }
}

#[test]
fn an_issuing_ca_is_made_for_a_key_that_is_elsewhere() {
    let offline = Authority::new();
    let mut online = MemoryKeyStore::new();
    let key_id = KeyId::parse("issuing-2").unwrap();
    let pkcs8 = online.generate(key_id.clone()).unwrap();
    let key = LeafKey::from_pkcs8_der(&pkcs8).unwrap();
    let csr = Csr::parse(&Csr::create(&key).unwrap()).unwrap().verify().unwrap();
    let naming = CaNaming { mesh: "prod-eu", now: NOW };
    let none = Pointers::default();
    let made =
        create_issuing_ca_for(&offline.root, &offline.store, csr.public_key(), naming, &none, &mut rng)
            .unwrap();
    assert_eq!(made.key_hash, key.key_hash());
    let issuer = Issuer::new(&made.der, key_id, offline.root.domain().clone(), &online).unwrap();
    assert_eq!(ca_key_identifier(&made.der).as_ref(), Some(issuer.key_identifier()));
}
