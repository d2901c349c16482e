//! Every reader of foreign bytes ends in a value or an error, and no changed byte is believed.

use std::sync::LazyLock;

use mesh_ca::*;
use proptest::collection::vec;
use proptest::prelude::*;

use crate::authority::*;

struct Fixture {
    authority: Authority,
    anchors: TrustAnchors,
    leaf: Vec<u8>,
    csr: Vec<u8>,
    crl: Vec<u8>,
    sealed: Vec<u8>,
    key: String,
    spki: Vec<u8>,
}

static FIXTURE: LazyLock<Fixture> = LazyLock::new(|| {
    let authority = Authority::new();
    let node = authority.leaf(Profile::Node);
    let cost = KdfParams::FLOOR;
    let id = KeyId::parse("root").unwrap();
    let sealed = seal(b"secret", &id, KeyPurpose::Root, Unlock::None, cost, &mut rng).unwrap();
    Fixture {
        anchors: authority.anchors(),
        csr: Csr::create(&node.key).unwrap(),
        crl: authority.crls(&[node.issued.serial]).remove(0),
        sealed: sealed.as_bytes().to_vec(),
        key: node.key.to_pkcs8_pem().to_string(),
        spki: node.key.public_key().spki_der().to_vec(),
        leaf: node.issued.der,
        authority,
    }
});

/// Hands `bytes` to every reader; the only demand is that each returns.
fn read_everywhere(bytes: &[u8]) {
    let fixture = &*FIXTURE;
    let (issuing, domain) = (fixture.authority.issuing.certificate_der(), fixture.authority.issuing.domain());
    let _ = Csr::parse(bytes).and_then(Csr::verify);
    let _ = classify(bytes, domain);
    let _ = verify_chain(bytes, &fixture.authority.intermediates(), &fixture.anchors, NOW, Usage::Any, None);
    let foreign = [rustls_pki_types::CertificateDer::from(bytes)];
    let _ = verify_chain(&fixture.leaf, &foreign, &fixture.anchors, NOW, Usage::Any, None);
    let _ = TrustAnchors::new(domain.clone(), [bytes]);
    let _ = RevocationLists::new([bytes], ExpiredCrl::Accept);
    let _ = Crl::parse_verified(bytes, issuing);
    let _ = Crl::parse_verified(&fixture.crl, bytes);
    let _ = lint_leaf(bytes, issuing, domain);
    let _ = lint_leaf(&fixture.leaf, bytes, domain);
    let _ = lint_ca(bytes, issuing);
    let _ = lint_crl(bytes, issuing);
    let _ = Issuer::new(bytes, KeyId::parse("root").unwrap(), domain.clone(), &fixture.authority.store);
    let _ = PublicKey::from_spki_der(bytes);
    let _ = LeafKey::from_pkcs8_der(bytes);
    let _ = SerialNumber::from_slice(bytes);
    let _ = unseal(bytes, &KeyId::parse("root").unwrap(), KeyPurpose::Root, Unlock::None);
    let _ = bundle::parse_certificates(bytes);
    let _ = bundle::parse_crls(bytes);
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _ = LeafKey::from_pkcs8_pem(text);
        let _ = Identity::parse(domain, text);
        let _ = DnsName::parse(text);
        let _ = text.parse::<SerialNumber>();
    }
}

/// Whether bytes are believed.
type Reader = fn(&[u8]) -> bool;

/// What is believed for its signature.
const READERS: [(&str, Reader); 3] = [
    ("leaf", |der| {
        let fixture = &*FIXTURE;
        let intermediates = fixture.authority.intermediates();
        verify_chain(der, &intermediates, &fixture.anchors, NOW, Usage::Any, None).is_ok()
    }),
    ("CSR", |der| Csr::parse(der).and_then(Csr::verify).is_ok()),
    ("CRL", |der| Crl::parse_verified(der, FIXTURE.authority.issuing.certificate_der()).is_ok()),
];

/// A valid message with some bytes overwritten, and perhaps cut.
fn spoiled(valid: &[u8], changes: &[(prop::sample::Index, u8)], cut: Option<prop::sample::Index>) -> Vec<u8> {
    let mut bytes = valid.to_vec();
    for (at, value) in changes {
        let at = at.index(bytes.len());
        bytes[at] = *value;
    }
    if let Some(cut) = cut {
        bytes.truncate(cut.index(valid.len()));
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn arbitrary_bytes_are_survived_and_not_believed(bytes in vec(any::<u8>(), 0..600)) {
        read_everywhere(&bytes);
        let (fixture, foreign) = (&*FIXTURE, [rustls_pki_types::CertificateDer::from(bytes.as_slice())]);
        prop_assert!(TrustAnchors::new(fixture.authority.issuing.domain().clone(), [&bytes]).is_err());
        prop_assert!(verify_chain(&bytes, &fixture.authority.intermediates(), &fixture.anchors, NOW, Usage::Any, None).is_err());
        prop_assert!(verify_chain(&fixture.leaf, &foreign, &fixture.anchors, NOW, Usage::Any, None).is_err());
    }

    #[test]
    fn spoiled_messages_are_survived_and_not_believed(
        which in 0..6_usize,
        changes in vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        cut in proptest::option::of(any::<prop::sample::Index>()),
    ) {
        let fixture = &*FIXTURE;
        let valid: [&[u8]; 6] =
            [&fixture.leaf, &fixture.csr, &fixture.crl, &fixture.sealed, fixture.key.as_bytes(), &fixture.spki];
        let bytes = spoiled(valid[which], &changes, cut);
        read_everywhere(&bytes);
        if bytes != valid[which] {
            for (what, believed) in READERS {
                prop_assert!(!believed(&bytes), "{what}");
            }
        }
    }
}

/// A certificate, CSR or CRL with any one byte changed is not believed.
#[test]
pub(crate) fn no_changed_byte_is_believed() {
    let fixture = &*FIXTURE;
    for ((what, believed), valid) in READERS.into_iter().zip([&fixture.leaf, &fixture.csr, &fixture.crl]) {
        assert!(believed(valid), "{what}");
        for at in 0..valid.len() {
            // Each bit alone, and bits that turn one tag into another.
            for flip in [1, 2, 4, 8, 16, 32, 64, 128, 0x11, 0x60, 0xff] {
                let mut bytes = valid.to_vec();
                bytes[at] ^= flip;
                assert!(!believed(&bytes), "{what}: byte {at} ^ {flip:#x}");
            }
        }
    }
}
