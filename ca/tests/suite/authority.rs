//! A small mesh made in memory: one root, one issuing CA, and a leaf for whoever is asked for.

use std::time::Duration;

use mesh_ca::*;
use rustls_pki_types::CertificateDer;
use time::UtcDateTime;
use time::macros::utc_datetime;

pub(crate) const NOW: UtcDateTime = utc_datetime!(2026-11-22 12:00:00);
pub(crate) const HOUR: Duration = Duration::from_secs(3600);

/// Random enough for tests, and different at each call.
pub(crate) fn rng(bytes: &mut [u8]) {
    aws_lc_rs::rand::fill(bytes).unwrap();
}

pub(crate) fn label(text: &str) -> Label {
    Label::parse(text).unwrap()
}

pub(crate) fn dns(text: &str) -> DnsName {
    DnsName::parse(text).unwrap()
}

pub(crate) struct Authority {
    pub(crate) store: MemoryKeyStore,
    pub(crate) root: Issuer,
    pub(crate) issuing: Issuer,
    /// The issuing CA's private key, for certificates that the product would never sign.
    pub(crate) issuing_pkcs8: Vec<u8>,
}

pub(crate) struct Leaf {
    pub(crate) key: LeafKey,
    pub(crate) issued: IssuedCertificate,
}

impl Authority {
    pub(crate) fn new() -> Self {
        Self::made_at(NOW, "mesh.internal")
    }

    pub(crate) fn made_at(now: UtcDateTime, domain: &str) -> Self {
        Self::with_keys(now, domain, KeyAlgorithm::EcdsaP256, KeyAlgorithm::EcdsaP256)
    }

    pub(crate) fn with_keys(
        now: UtcDateTime,
        domain: &str,
        root_key: KeyAlgorithm,
        issuing_key: KeyAlgorithm,
    ) -> Self {
        let domain = TrustDomain::parse(domain).unwrap();
        let mut store = MemoryKeyStore::new();
        let naming = CaNaming { mesh: "prod-eu", now };
        let (root_id, issuing_id) = (KeyId::parse("root").unwrap(), KeyId::parse("issuing").unwrap());
        store.generate_for(root_id.clone(), root_key).unwrap();
        let issuing_pkcs8 = store.generate_for(issuing_id.clone(), issuing_key).unwrap().to_vec();
        let root = create_root(&store, &root_id, naming, &mut rng).unwrap();
        let root = Issuer::new(&root.der, root_id, domain.clone(), &store).unwrap();
        let issuing = create_issuing_ca(&root, &store, &issuing_id, naming, &mut rng).unwrap();
        let issuing = Issuer::new(&issuing.der, issuing_id, domain, &store).unwrap();
        Self { store, root, issuing, issuing_pkcs8 }
    }

    pub(crate) fn template(profile: Profile) -> LeafTemplate {
        let (node, lifetime) = (label("web-1"), profile.default_lifetime());
        match profile {
            Profile::Controller => LeafTemplate {
                dns: vec![dns("controller.mesh.internal")],
                ..LeafTemplate::new(profile, Some(Identity::Controller { name: label("c1") }), NOW, lifetime)
            },
            Profile::Node => LeafTemplate {
                dns: vec![dns("web-1.mesh.internal")],
                ips: vec!["fd00::1".parse().unwrap(), "100.64.0.1".parse().unwrap()],
                wireguard_keys: vec![[7; 32], [8; 32]],
                ..LeafTemplate::new(profile, Some(Identity::Node { name: node }), NOW, lifetime)
            },
            Profile::Operator => {
                LeafTemplate::new(profile, Some(Identity::Operator { name: label("anna") }), NOW, lifetime)
            }
            Profile::Server | Profile::Client | Profile::Peer => {
                let names = vec![dns("shop.mesh.internal")];
                LeafTemplate::service(profile, node, label("shop"), names, NOW, lifetime)
            }
        }
    }

    pub(crate) fn issue(&self, template: &LeafTemplate) -> Leaf {
        self.issue_for(LeafKey::generate().unwrap(), template)
    }

    pub(crate) fn issue_for(&self, key: LeafKey, template: &LeafTemplate) -> Leaf {
        let serial = SerialNumber::random(&mut rng);
        let issued = issue_leaf(&self.issuing, &self.store, &key, template, serial).unwrap();
        Leaf { key, issued }
    }

    pub(crate) fn leaf(&self, profile: Profile) -> Leaf {
        self.issue(&Self::template(profile))
    }

    pub(crate) fn intermediates(&self) -> Vec<CertificateDer<'static>> {
        vec![CertificateDer::from(self.issuing.certificate_der().to_vec())]
    }

    pub(crate) fn anchors(&self) -> TrustAnchors {
        TrustAnchors::new(self.issuing.domain().clone(), [self.root.certificate_der()]).unwrap()
    }

    /// CRLs of issuing CA and root, made at [`NOW`].
    pub(crate) fn crls(&self, revoked: &[SerialNumber]) -> Vec<Vec<u8>> {
        let entry = |serial: &SerialNumber| RevokedEntry {
            serial: *serial,
            revoked_at: NOW,
            reason: RevocationReason::KeyCompromise,
        };
        let entries: Vec<_> = revoked.iter().map(entry).collect();
        vec![
            build_crl(&self.issuing, &self.store, &CrlPlan::new(2, NOW, CRL_LIFETIME, &entries)).unwrap(),
            build_crl(&self.root, &self.store, &CrlPlan::new(1, NOW, ROOT_CRL_LIFETIME, &[])).unwrap(),
        ]
    }

    pub(crate) fn verify(&self, leaf: &[u8], usage: Usage) -> Result<VerifiedLeaf, ChainError> {
        verify_chain(leaf, &self.intermediates(), &self.anchors(), NOW, usage, None)
    }

    /// rcgen's parameters of a leaf that the linter likes, to be spoiled, and signed by [`sign_raw`](Self::sign_raw).
    pub(crate) fn raw_params(uris: &[&str]) -> rcgen::CertificateParams {
        let ia5 = |text: &str| rcgen::string::Ia5String::try_from(text).unwrap();
        let mut serial = [0; 16];
        serial.copy_from_slice(SerialNumber::random(&mut rng).as_bytes());
        let mut params = rcgen::CertificateParams::default();
        params.not_before = (NOW - CLOCK_SKEW_ALLOWANCE).to_offset(time::UtcOffset::UTC);
        params.not_after = (NOW + 72 * HOUR).to_offset(time::UtcOffset::UTC);
        params.serial_number = Some(rcgen::SerialNumber::from_slice(&serial));
        params.subject_alt_names = vec![rcgen::SanType::DnsName(ia5("shop.mesh.internal"))];
        params.subject_alt_names.extend(uris.iter().map(|uri| rcgen::SanType::URI(ia5(uri))));
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::CommonName, "shop.mesh.internal");
        params.is_ca = rcgen::IsCa::ExplicitNoCa;
        params.key_usages = vec![rcgen::KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth, rcgen::ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        params
    }

    /// Signs anything with the issuing CA's key, past every check of the product.
    pub(crate) fn sign_raw(&self, params: &rcgen::CertificateParams, key: &LeafKey) -> Vec<u8> {
        let signer = LeafKey::from_pkcs8_der(&self.issuing_pkcs8).unwrap();
        let der = CertificateDer::from(self.issuing.certificate_der().to_vec());
        let issuer = rcgen::Issuer::from_ca_cert_der(&der, signer).unwrap();
        params.signed_by(key, &issuer).unwrap().der().to_vec()
    }

    /// Signs the first element of a signed DER structure anew, with the issuing CA's key.
    pub(crate) fn sign_again(&self, der: &[u8]) -> Vec<u8> {
        use der::{Decode as _, Encode as _};
        let signer = LeafKey::from_pkcs8_der(&self.issuing_pkcs8).unwrap();
        let outer: Vec<der::AnyRef<'_>> = Vec::from_der(der).unwrap();
        let signature = rcgen::SigningKey::sign(&signer, &outer[0].to_der().unwrap()).unwrap();
        let bits = der::asn1::BitString::from_bytes(&signature).unwrap().to_der().unwrap();
        vec![outer[0], outer[1], der::AnyRef::from_der(&bits).unwrap()].to_der().unwrap()
    }
}
