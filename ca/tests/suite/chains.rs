//! Which chains are believed, and what is read from them.

use mesh_ca::*;
use rustls_pki_types::CertificateDer;

use crate::authority::*;

#[test]
pub(crate) fn a_leaf_of_each_profile_reads_back_as_its_template_said() {
    let authority = Authority::new();
    for profile in Profile::ALL {
        let template = Authority::template(profile);
        let leaf = authority.issue(&template);
        let verified = authority.verify(&leaf.issued.der, Usage::Any).unwrap();
        assert_eq!(verified.profile, profile);
        assert_eq!(verified.identity, template.identity);
        assert_eq!((&verified.dns, &verified.ips), (&template.dns, &template.ips));
        assert_eq!(verified.wireguard_keys, template.wireguard_keys);
        assert_eq!((verified.not_before, verified.not_after), (template.not_before, template.not_after));
        assert_eq!(verified.chain_not_after, template.not_after);
        assert_eq!(verified.serial, leaf.issued.serial);
        assert_eq!(verified.key_hash, leaf.key.key_hash());
        assert_eq!(&verified.issuer_key_id, authority.issuing.key_identifier());
        let read = classify(&leaf.issued.der, authority.issuing.domain()).unwrap();
        assert_eq!(read, (profile, template.identity));
    }
}

#[test]
pub(crate) fn a_single_purpose_leaf_is_refused_for_the_other_purpose() {
    let authority = Authority::new();
    for profile in Profile::ALL {
        let leaf = authority.leaf(profile);
        let as_server = authority.verify(&leaf.issued.der, Usage::Server);
        let as_client = authority.verify(&leaf.issued.der, Usage::Client);
        assert_eq!(as_server.is_ok(), profile.server_auth(), "{profile}");
        assert_eq!(as_client.is_ok(), profile.client_auth(), "{profile}");
        for refused in [as_server, as_client].into_iter().filter_map(Result::err) {
            assert_eq!(refused, ChainError::Usage);
        }
    }
}

#[test]
pub(crate) fn a_signed_certificate_that_fits_no_profile_is_refused() {
    let authority = Authority::new();
    let key = LeafKey::generate().unwrap();
    type Change = fn(&mut rcgen::CertificateParams);
    let controller = "spiffe://mesh.internal/controller/c1";
    let node = "spiffe://mesh.internal/node/web-1";
    let service = "spiffe://mesh.internal/service/web-1/shop";
    let table: [(&str, &[&str], Change, ClassifyError); 9] = [
        ("two URIs", &[controller, node], |_| {}, ClassifyError::Uris(2)),
        ("a node without WireGuard keys", &[node], |_| {}, ClassifyError::NoProfile),
        (
            "a service with WireGuard keys",
            &[service],
            |p| {
                let content = [&[0x30, 34, 4, 32][..], &[7; 32]].concat();
                let extension = rcgen::CustomExtension::from_oid_content(&WIREGUARD_KEYS_OID, content);
                p.custom_extensions.push(extension);
            },
            ClassifyError::NoProfile,
        ),
        (
            "a service that is only a server",
            &[service],
            |p| p.extended_key_usages.truncate(1),
            ClassifyError::NoProfile,
        ),
        ("no URI and both purposes", &[], |_| {}, ClassifyError::NoProfile),
        (
            "a controller for any purpose",
            &[controller],
            |p| p.extended_key_usages.push(rcgen::ExtendedKeyUsagePurpose::Any),
            ClassifyError::NoProfile,
        ),
        (
            "an operator with a host name",
            &["spiffe://mesh.internal/operator/anna"],
            |_| {},
            ClassifyError::NoProfile,
        ),
        (
            "a leaf that may sign",
            &[service],
            |p| p.key_usages.push(rcgen::KeyUsagePurpose::KeyCertSign),
            ClassifyError::IsCa,
        ),
        (
            "a serial of another form",
            &[service],
            |p| p.serial_number = Some(rcgen::SerialNumber::from(5_u64)),
            ClassifyError::Serial(SerialError::Length(1)),
        ),
    ];
    for (what, uris, change, verdict) in table {
        let mut params = Authority::raw_params(uris);
        change(&mut params);
        let der = authority.sign_raw(&params, &key);
        assert_eq!(authority.verify(&der, Usage::Any), Err(ChainError::Leaf(verdict)), "{what}");
    }
    // The same way of signing, unspoiled.
    let der = authority.sign_raw(&Authority::raw_params(&[service]), &key);
    assert_eq!(authority.verify(&der, Usage::Any).unwrap().profile, Profile::Peer);
}

#[test]
fn identities_of_another_mesh_are_refused() {
    let authority = Authority::new();
    let leaf = authority.leaf(Profile::Node);
    let other = TrustDomain::parse("other.internal").unwrap();
    let anchors = TrustAnchors::new(other.clone(), [authority.root.certificate_der()]).unwrap();
    let refused = verify_chain(&leaf.issued.der, &authority.intermediates(), &anchors, NOW, Usage::Any, None);
    let reason = ClassifyError::Uri(NameError::ForeignTrustDomain(other));
    assert_eq!(refused, Err(ChainError::Leaf(reason)));
}

#[test]
fn a_chain_to_another_root_is_refused_even_under_equal_names() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let leaf = theirs.leaf(Profile::Controller);
    let anchors = ours.anchors();
    let with = |intermediates: &[CertificateDer<'static>]| {
        verify_chain(&leaf.issued.der, intermediates, &anchors, NOW, Usage::Server, None)
    };
    assert_eq!(with(&theirs.intermediates()), Err(ChainError::UnknownIssuer));
    assert_eq!(with(&[]), Err(ChainError::UnknownIssuer));
    let root = CertificateDer::from(theirs.root.certificate_der().to_vec());
    assert_eq!(with(&[theirs.intermediates(), vec![root]].concat()), Err(ChainError::UnknownIssuer));

    // A forger copies name and key identifier of our issuing CA and signs with a key of his own.
    let forger = LeafKey::generate().unwrap();
    let der = CertificateDer::from(ours.issuing.certificate_der().to_vec());
    let issuer = rcgen::Issuer::from_ca_cert_der(&der, forger).unwrap();
    let params = Authority::raw_params(&["spiffe://mesh.internal/service/web-1/shop"]);
    let forged = params.signed_by(&LeafKey::generate().unwrap(), &issuer).unwrap();
    assert_eq!(ours.verify(forged.der(), Usage::Any), Err(ChainError::BadSignature));
}

#[test]
fn a_leaf_cannot_issue() {
    let authority = Authority::new();
    let node = authority.leaf(Profile::Node);
    let node_der = CertificateDer::from(node.issued.der.clone());
    let issuer = rcgen::Issuer::from_ca_cert_der(&node_der, node.key).unwrap();
    // rcgen refuses no issuer; the key identifiers are right, too.
    let params = Authority::raw_params(&["spiffe://mesh.internal/service/web-1/shop"]);
    let child = params.signed_by(&LeafKey::generate().unwrap(), &issuer).unwrap();
    let intermediates = [authority.intermediates(), vec![node_der.clone()]].concat();
    let refused = verify_chain(child.der(), &intermediates, &authority.anchors(), NOW, Usage::Any, None);
    assert_eq!(refused, Err(ChainError::Invalid(webpki::Error::EndEntityUsedAsCa)));
}

#[test]
fn an_issuing_ca_cannot_make_another() {
    let authority = Authority::new();
    let sub_key = LeafKey::generate().unwrap();
    let mut params = Authority::raw_params(&[]);
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign, rcgen::KeyUsagePurpose::CrlSign];
    params.subject_alt_names.clear();
    params.extended_key_usages.clear();
    params.distinguished_name.push(rcgen::DnType::CommonName, "sub CA");
    let sub = CertificateDer::from(authority.sign_raw(&params, &sub_key));
    let issuer = rcgen::Issuer::from_ca_cert_der(&sub, sub_key).unwrap();
    let params = Authority::raw_params(&["spiffe://mesh.internal/service/web-1/shop"]);
    let child = params.signed_by(&LeafKey::generate().unwrap(), &issuer).unwrap();
    let intermediates = [vec![sub], authority.intermediates()].concat();
    let refused = verify_chain(child.der(), &intermediates, &authority.anchors(), NOW, Usage::Any, None);
    assert_eq!(refused, Err(ChainError::Invalid(webpki::Error::PathLenConstraintViolated)));
}

#[test]
fn dates_are_kept_to_the_second() {
    let authority = Authority::new();
    let leaf = authority.leaf(Profile::Node).issued;
    let second = std::time::Duration::from_secs(1);
    let at = |moment| {
        verify_chain(&leaf.der, &authority.intermediates(), &authority.anchors(), moment, Usage::Any, None)
    };
    assert_eq!(at(leaf.not_before - second), Err(ChainError::NotYetValid(leaf.not_before)));
    assert!(at(leaf.not_before).is_ok());
    assert!(at(leaf.not_after).is_ok());
    assert_eq!(at(leaf.not_after + second), Err(ChainError::Expired(leaf.not_after)));
}

#[test]
fn a_root_past_its_own_validity_carries_nothing() {
    // webpki does not look at a root's dates, so a leaf signed late must fail here.
    let authority = Authority::new();
    let root_end = authority.root.not_after();
    let key = LeafKey::generate().unwrap();
    let mut params = Authority::raw_params(&["spiffe://mesh.internal/service/web-1/shop"]);
    params.not_after = (root_end + 1000 * HOUR).to_offset(time::UtcOffset::UTC);
    // Signed by the root itself, so that no intermediate's dates interfere.
    let root_store = &authority.store;
    struct Root<'a>(&'a MemoryKeyStore, PublicKeyBits);
    struct PublicKeyBits(Vec<u8>);
    impl rcgen::PublicKeyData for Root<'_> {
        fn der_bytes(&self) -> &[u8] {
            &self.1.0
        }
        fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
            &rcgen::PKCS_ECDSA_P256_SHA256
        }
    }
    impl rcgen::SigningKey for Root<'_> {
        fn sign(&self, msg: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
            self.0.sign(&KeyId::parse("root").unwrap(), msg).map_err(|_| rcgen::Error::RemoteKeyError)
        }
    }
    let spki = root_store.public_key(&KeyId::parse("root").unwrap()).unwrap().spki_der().to_vec();
    let signer = Root(root_store, PublicKeyBits(spki[spki.len() - 65..].to_vec()));
    let root_der = CertificateDer::from(authority.root.certificate_der().to_vec());
    let issuer = rcgen::Issuer::from_ca_cert_der(&root_der, signer).unwrap();
    let der = params.signed_by(&key, &issuer).unwrap().der().to_vec();
    let at = |moment| verify_chain(&der, &[], &authority.anchors(), moment, Usage::Any, None);
    assert_eq!(at(NOW).unwrap().chain_not_after, root_end);
    assert_eq!(at(root_end + HOUR), Err(ChainError::Expired(root_end)));
}

#[test]
pub(crate) fn the_lease_ends_with_the_first_certificate_of_the_chain() {
    // Signed past the rules, for longer than its issuer lives.
    let authority = Authority::new();
    let mut params = Authority::raw_params(&["spiffe://mesh.internal/service/web-1/shop"]);
    params.not_after = (authority.issuing.not_after() + HOUR).to_offset(time::UtcOffset::UTC);
    let der = authority.sign_raw(&params, &LeafKey::generate().unwrap());
    let verified = authority.verify(&der, Usage::Any).unwrap();
    assert_eq!(verified.not_after, authority.issuing.not_after() + HOUR);
    assert_eq!(verified.chain_not_after, authority.issuing.not_after());
}

#[test]
fn resume_takes_an_expired_leaf_but_no_expired_forgery() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    let late = NOW + 300 * HOUR;
    let anchors = authority.anchors();
    let check = |leaf: &[u8], at| {
        verify_chain_expired_ok(leaf, &authority.intermediates(), &anchors, at, Usage::Client, None)
    };
    let leaf = authority.leaf(Profile::Node);
    assert!(!check(&leaf.issued.der, NOW).unwrap().expired);
    let verified = check(&leaf.issued.der, late).unwrap();
    assert!(verified.expired);
    assert_eq!(verified.leaf.serial, leaf.issued.serial);

    let foreign = stranger.leaf(Profile::Node).issued.der;
    assert_eq!(check(&foreign, late), Err(ChainError::UnknownIssuer));
    // One changed bit of the signature, one of the signed part.
    for at in [leaf.issued.der.len() - 1, leaf.issued.der.len() / 2] {
        let mut forged = leaf.issued.der.clone();
        forged[at] ^= 1;
        assert!(check(&forged, late).is_err());
    }
    let early = NOW - 300 * HOUR;
    assert!(matches!(check(&leaf.issued.der, early), Err(ChainError::NotYetValid(_))));
}

#[test]
pub(crate) fn revoked_leaves_are_refused_and_every_ca_needs_a_crl() {
    let authority = Authority::new();
    let (good, bad) = (authority.leaf(Profile::Node), authority.leaf(Profile::Node));
    let crls = authority.crls(&[bad.issued.serial]);
    let lists = |crls: &[Vec<u8>], expired| RevocationLists::new(crls, expired).unwrap();
    let check = |leaf: &Leaf, lists: &RevocationLists, at| {
        let (intermediates, anchors) = (authority.intermediates(), authority.anchors());
        verify_chain(&leaf.issued.der, &intermediates, &anchors, at, Usage::Any, Some(lists)).map(drop)
    };
    let both = lists(&crls, ExpiredCrl::Refuse);
    assert_eq!(check(&good, &both, NOW), Ok(()));
    assert_eq!(check(&bad, &both, NOW), Err(ChainError::Revoked));
    for alone in &crls {
        let lists = lists(std::slice::from_ref(alone), ExpiredCrl::Refuse);
        assert_eq!(check(&good, &lists, NOW), Err(ChainError::RevocationUnknown));
    }

    // A leaf that outlives its CRL.
    let lifetime = 80 * 24 * HOUR;
    let template = LeafTemplate { not_after: NOW + lifetime, ..Authority::template(Profile::Node) };
    let (long, late) = (authority.issue(&template), NOW + 8 * 24 * HOUR);
    let next_update = NOW + CRL_LIFETIME;
    assert_eq!(check(&long, &both, late), Err(ChainError::CrlExpired(next_update)));
    assert_eq!(check(&long, &lists(&crls, ExpiredCrl::Accept), late), Ok(()));

    // A CRL that a forger signed in the issuing CA's name.
    let forger = Authority::new();
    let mut forged = crls.clone();
    forged[0] = forged_crl(&authority, &forger);
    let refused = check(&good, &lists(&forged, ExpiredCrl::Refuse), NOW);
    assert_eq!(refused, Err(ChainError::Invalid(webpki::Error::InvalidCrlSignatureForPublicKey)));
}

/// An empty CRL under the name of `victim`'s issuing CA, signed by another key.
pub(crate) fn forged_crl(victim: &Authority, forger: &Authority) -> Vec<u8> {
    let der = CertificateDer::from(victim.issuing.certificate_der().to_vec());
    let key = LeafKey::from_pkcs8_der(&forger.issuing_pkcs8).unwrap();
    let issuer = rcgen::Issuer::from_ca_cert_der(&der, key).unwrap();
    let id = victim.issuing.key_identifier().as_bytes().to_vec();
    rcgen::CertificateRevocationListParams {
        this_update: NOW.to_offset(time::UtcOffset::UTC),
        next_update: (NOW + CRL_LIFETIME).to_offset(time::UtcOffset::UTC),
        crl_number: rcgen::SerialNumber::from(99_u64),
        issuing_distribution_point: None,
        revoked_certs: Vec::new(),
        key_identifier_method: rcgen::KeyIdMethod::PreSpecified(id),
    }
    .signed_by(&issuer)
    .unwrap()
    .der()
    .to_vec()
}

#[test]
fn a_revoked_issuing_ca_takes_its_leaves_with_it() {
    let authority = Authority::new();
    let leaf = authority.leaf(Profile::Node);
    let issuing = x509_serial(authority.issuing.certificate_der());
    let entry = RevokedEntry { serial: issuing, revoked_at: NOW, reason: RevocationReason::CaCompromise };
    let root_crl =
        build_crl(&authority.root, &authority.store, &CrlPlan::new(2, NOW, ROOT_CRL_LIFETIME, &[entry]))
            .unwrap();
    let lists = RevocationLists::new([&authority.crls(&[])[0], &root_crl], ExpiredCrl::Refuse).unwrap();
    let (intermediates, anchors) = (authority.intermediates(), authority.anchors());
    let refused = verify_chain(&leaf.issued.der, &intermediates, &anchors, NOW, Usage::Any, Some(&lists));
    assert_eq!(refused, Err(ChainError::Revoked));
}

fn x509_serial(der: &[u8]) -> SerialNumber {
    let der = CertificateDer::from(der);
    let certificate = webpki::EndEntityCert::try_from(&der).unwrap();
    SerialNumber::from_slice(certificate.serial()).unwrap()
}

#[test]
pub(crate) fn limits_hold_before_anything_is_parsed() {
    let authority = Authority::new();
    let leaf = authority.leaf(Profile::Node).issued.der;
    let anchors = authority.anchors();
    let many = vec![authority.intermediates()[0].clone(); CHAIN_LENGTH_MAX + 1];
    let refused = verify_chain(&leaf, &many, &anchors, NOW, Usage::Any, None);
    assert_eq!(refused, Err(ChainError::TooLong(CHAIN_LENGTH_MAX + 1)));
    let large = vec![0x30; CERT_BYTES_MAX + 1];
    let refused = verify_chain(&large, &[], &anchors, NOW, Usage::Any, None);
    assert_eq!(refused, Err(ChainError::TooLarge(CERT_BYTES_MAX + 1)));
}

#[test]
fn only_a_self_signed_ca_is_a_root() {
    let authority = Authority::new();
    let domain = authority.root.domain();
    let make = |der: &[u8]| TrustAnchors::new(domain.clone(), [der]).map(drop);
    assert_eq!(make(authority.root.certificate_der()), Ok(()));
    assert_eq!(make(authority.issuing.certificate_der()), Err(ChainError::Root));
    assert_eq!(make(&authority.leaf(Profile::Node).issued.der), Err(ChainError::Root));
    assert_eq!(make(b""), Err(ChainError::Root));
    let mut forged = authority.root.certificate_der().to_vec();
    *forged.last_mut().unwrap() ^= 1;
    assert_eq!(make(&forged), Err(ChainError::Root));
    let none: [&[u8]; 0] = [];
    assert!(matches!(TrustAnchors::new(domain.clone(), none), Err(ChainError::NoRoots)));
}

#[test]
fn two_roots_are_trusted_side_by_side() {
    let (old, new) = (Authority::new(), Authority::new());
    let roots = [old.root.certificate_der(), new.root.certificate_der()];
    let anchors = TrustAnchors::new(old.root.domain().clone(), roots).unwrap();
    for authority in [&old, &new] {
        let leaf = authority.leaf(Profile::Controller).issued.der;
        let verified = verify_chain(&leaf, &authority.intermediates(), &anchors, NOW, Usage::Server, None);
        assert!(verified.is_ok());
    }
}

/// RFC 9608 §4: no CRL is asked for a leaf with noRevAvail; the CAs above it still need theirs, and a CRL that lists the
/// leaf counts.
#[test]
pub(crate) fn a_short_lived_leaf_needs_no_crl_of_its_own() {
    let authority = Authority::new();
    let short = LeafTemplate { no_rev_avail: true, ..Authority::template(Profile::Server) };
    let leaf = authority.issue(&short).issued;
    let plain = authority.leaf(Profile::Server).issued;
    let [issuing, root]: [Vec<u8>; 2] = authority.crls(&[]).try_into().unwrap();
    let [listing, _]: [Vec<u8>; 2] = authority.crls(&[leaf.serial]).try_into().unwrap();
    let ask = |leaf: &[u8], crls: &[&Vec<u8>]| {
        let lists = RevocationLists::new(crls, ExpiredCrl::Refuse).unwrap();
        let (chain, anchors) = (authority.intermediates(), authority.anchors());
        verify_chain(leaf, &chain, &anchors, NOW, Usage::Server, Some(&lists)).map(|leaf| leaf.no_rev_avail)
    };
    assert_eq!(ask(&leaf.der, &[&root]), Ok(true));
    assert_eq!(ask(&plain.der, &[&root]), Err(ChainError::RevocationUnknown), "only what says so");
    assert_eq!(ask(&leaf.der, &[&issuing, &root]), Ok(true));
    assert_eq!(ask(&leaf.der, &[&listing, &root]), Err(ChainError::Revoked));
    assert_eq!(ask(&leaf.der, &[&issuing]), Err(ChainError::RevocationUnknown), "the CA above needs its CRL");
    let other = Authority::new().crls(&[]).remove(1);
    let foreign = ask(&leaf.der, &[&other]);
    assert!(foreign.is_err(), "a CRL of an equal name and another key: {foreign:?}");
    let [_, revoked]: [Vec<u8>; 2] = {
        let entry = RevokedEntry {
            serial: x509_serial(authority.issuing.certificate_der()),
            revoked_at: NOW,
            reason: RevocationReason::CaCompromise,
        };
        let plan = CrlPlan::new(2, NOW, ROOT_CRL_LIFETIME, std::slice::from_ref(&entry));
        [issuing.clone(), build_crl(&authority.root, &authority.store, &plan).unwrap()]
    };
    assert_eq!(ask(&leaf.der, &[&revoked]), Err(ChainError::Revoked), "with its CA");
}

/// noRevAvail never takes an identity out of reach of revocation.
#[test]
fn an_identity_with_no_rev_avail_is_refused() {
    let authority = Authority::new();
    let no_rev_avail = rcgen::CustomExtension::from_oid_content(&[2, 5, 29, 56], vec![5, 0]);
    let keys = [&[0x30, 34, 4, 32][..], &[7; 32]].concat();
    for (uri, fits) in [("node/web-1", false), ("operator/anna", false), ("service/web-1/shop", true)] {
        let mut params = Authority::raw_params(&[&format!("spiffe://mesh.internal/{uri}")]);
        if uri.starts_with("operator") {
            params.subject_alt_names.retain(|name| matches!(name, rcgen::SanType::URI(_)));
        }
        if uri.starts_with("node") {
            let content = rcgen::CustomExtension::from_oid_content(&WIREGUARD_KEYS_OID, keys.clone());
            params.custom_extensions.push(content);
        }
        let verify = |params: &rcgen::CertificateParams| {
            let der = authority.sign_raw(params, &LeafKey::generate().unwrap());
            authority.verify(&der, Usage::Any).map(|leaf| leaf.no_rev_avail)
        };
        assert_eq!(verify(&params), Ok(false), "{uri}");
        params.custom_extensions.push(no_rev_avail.clone());
        let refused = Err(ChainError::Leaf(ClassifyError::NoProfile));
        assert_eq!(verify(&params), if fits { Ok(true) } else { refused }, "{uri}");
    }
}
