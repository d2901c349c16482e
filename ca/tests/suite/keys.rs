//! Every key type as CA and as leaf.

use mesh_ca::*;

use crate::authority::*;

const CA_KEYS: [KeyAlgorithm; 3] = [KeyAlgorithm::EcdsaP256, KeyAlgorithm::EcdsaP384, KeyAlgorithm::Ed25519];
const LEAF_KEYS: [KeyAlgorithm; 4] = [
    KeyAlgorithm::EcdsaP256,
    KeyAlgorithm::EcdsaP384,
    KeyAlgorithm::Ed25519,
    KeyAlgorithm::Rsa { bits: 2048 },
];

#[test]
fn every_ca_key_signs_leaves_of_every_key_and_their_crl() {
    let leaf_keys = LEAF_KEYS.map(|algorithm| LeafKey::generate_for(algorithm).unwrap());
    for root_key in CA_KEYS {
        for issuing_key in CA_KEYS {
            let authority = Authority::with_keys(NOW, "mesh.internal", root_key, issuing_key);
            for key in &leaf_keys {
                let csr = Csr::parse(&Csr::create(key).unwrap()).unwrap().verify().unwrap();
                let serial = SerialNumber::random(&mut rng);
                let template = Authority::template(Profile::Peer);
                let issued =
                    issue_leaf(&authority.issuing, &authority.store, &csr, &template, serial).unwrap();
                let what = format!("{root_key} {issuing_key} {}", key.public_key().algorithm());
                assert!(authority.verify(&issued.der, Usage::Server).is_ok(), "{what}");
                let lists = RevocationLists::new(authority.crls(&[serial]), ExpiredCrl::Refuse).unwrap();
                let revoked = verify_chain(
                    &issued.der,
                    &authority.intermediates(),
                    &authority.anchors(),
                    NOW,
                    Usage::Any,
                    Some(&lists),
                );
                assert_eq!(revoked, Err(ChainError::Revoked), "{what}");
            }
        }
    }
}

/// Checklist 3: inner and outer algorithm are the same, and their parameters are absent or NULL as each RFC wants.
#[test]
pub(crate) fn signature_algorithms_have_the_parameters_of_their_rfc() {
    for (key, oid) in CA_KEYS.into_iter().zip(["1.2.840.10045.4.3.2", "1.2.840.10045.4.3.3", "1.3.101.112"]) {
        let authority = Authority::with_keys(NOW, "mesh.internal", key, key);
        let leaf = authority.leaf(Profile::Server).issued.der;
        let (_, parsed) = x509_parser::parse_x509_certificate(&leaf).unwrap();
        assert_eq!(parsed.signature_algorithm, parsed.tbs_certificate.signature);
        assert_eq!(parsed.signature_algorithm.algorithm.to_id_string(), oid);
        assert_eq!(parsed.signature_algorithm.parameters, None);
    }
}

#[test]
fn a_new_ca_never_has_an_rsa_key() {
    let mut authority = Authority::new();
    let id = KeyId::parse("rsa").unwrap();
    let rsa = KeyAlgorithm::Rsa { bits: 2048 };
    authority.store.generate_for(id.clone(), rsa).unwrap();
    let naming = CaNaming { mesh: "prod-eu", now: NOW };
    assert_eq!(create_root(&authority.store, &id, naming, &mut rng), Err(IssueError::CaKey(rsa)));
    let refused = create_issuing_ca(&authority.root, &authority.store, &id, naming, &mut rng);
    assert_eq!(refused, Err(IssueError::CaKey(rsa)));
}

#[test]
fn a_leaf_of_every_key_type_serves_tls_in_rustls() {
    for algorithm in LEAF_KEYS {
        let authority = Authority::new();
        let key = LeafKey::generate_for(algorithm).unwrap();
        let leaf = authority.issue_for(key, &Authority::template(Profile::Server));
        let chain = vec![leaf.issued.der.clone().into()];
        assert!(leaf.key.certified(chain).is_ok(), "{algorithm}");
        let other = Authority::new().leaf(Profile::Server).issued.der;
        assert!(leaf.key.certified(vec![other.into()]).is_err());
    }
}
