//! Writes a small authority to a folder, for judges that share no code with us.
//!
//! `cargo run -p mesh-ca --example chain -- DIR` makes a root, an issuing CA, a leaf of every profile and CRLs, all PEM:
//!
//! - `root.pem`, `issuing.pem`; `leaf-PROFILE.pem`, `leaf-long.pem` (its name does not fit a subject), `leaf-revoked.pem`
//! - `root.crl.pem`, `issuing.crl.pem` (empty), `issuing-revoked.crl.pem` (lists every leaf that is called revoked)
//! - `kinds/ISSUER-LEAF/`: for CA keys P-256, P-384 and Ed25519 and every leaf key, a chain with pointers: `root.pem`,
//!   `issuing.pem`, `good.pem`, `revoked.pem`, `responder.pem`, `good.p12` (password `judges`), `root.crl.pem`, `issuing.crl.pem` and, under
//!   the name that `openssl ocsp` and `ocsptool` read, `good.ocsp.der` and `revoked.ocsp.der` for SHA-1 CertIDs
//! - `short.pem`: a leaf without revocation (RFC 9608)
//! - `profiles/USES-NAME-KEY.pem`: a leaf of each built-in profile and of each kind of custom profile, for every leaf key; USES is
//!   `server`, `client` or `both`. Beside each stands another, `…-revoked.pem`, which `issuing-revoked.crl.pem` lists
//! - `addressed/`: a leaf that names a CRL address, one of them revoked, and the CRL of that address

#![allow(clippy::disallowed_methods)] // The library is pure; this program writes files.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use mesh_ca::*;
use time::UtcDateTime;

const ADDRESS: &str = "http://crl.mesh.internal/0.crl";

fn rng(bytes: &mut [u8]) {
    aws_lc_rs::rand::fill(bytes).expect("the operating system has random bytes");
}

struct Writer {
    folder: PathBuf,
    store: MemoryKeyStore,
    issuing: Issuer,
}

impl Writer {
    fn leaf(&self, name: &str, template: &LeafTemplate) -> Result<SerialNumber, Box<dyn Error>> {
        let key = LeafKey::generate()?;
        let issued = issue_leaf(&self.issuing, &self.store, &key, template, SerialNumber::random(&mut rng))?;
        self.write(name, bundle::encode_certificates([&issued.der]))?;
        Ok(issued.serial)
    }

    fn crl(&self, name: &str, issuer: &Issuer, plan: &CrlPlan<'_>) -> Result<(), Box<dyn Error>> {
        self.write(name, bundle::encode_crls([build_crl(issuer, &self.store, plan)?]))
    }

    fn write(&self, name: &str, text: String) -> Result<(), Box<dyn Error>> {
        Ok(fs::write(self.folder.join(name), text)?)
    }
}

fn template(profile: Profile, now: UtcDateTime) -> Result<LeafTemplate, NameError> {
    let (node, lifetime) = (Label::parse("web-1")?, profile.default_lifetime());
    let bare = |identity| LeafTemplate::new(profile, Some(identity), now, lifetime);
    Ok(match profile {
        Profile::Controller => LeafTemplate {
            dns: vec![DnsName::parse("controller.mesh.internal")?],
            ..bare(Identity::Controller { name: Label::parse("c1")? })
        },
        Profile::Node => LeafTemplate {
            dns: vec![DnsName::parse("web-1.mesh.internal")?],
            ips: vec![[100, 64, 0, 1].into(), [0xfd00, 0, 0, 0, 0, 0, 0, 1].into()],
            wireguard_keys: vec![[7; 32], [8; 32]],
            ..bare(Identity::Node { name: node })
        },
        Profile::Operator => bare(Identity::Operator { name: Label::parse("anna")? }),
        Profile::Server | Profile::Client | Profile::Peer => {
            let dns = vec![DnsName::parse("shop.mesh.internal")?];
            LeafTemplate::service(profile, node, Label::parse("shop")?, dns, now, lifetime)
        }
    })
}

/// One chain of given key types, with pointers, CRLs of shard and root, and OCSP responses.
fn kind(
    folder: &Path,
    ca_key: KeyAlgorithm,
    leaf_key: KeyAlgorithm,
    now: UtcDateTime,
) -> Result<(), Box<dyn Error>> {
    let folder = folder.join("kinds").join(format!("{ca_key}-{leaf_key}"));
    fs::create_dir_all(&folder)?;
    let domain = TrustDomain::parse("mesh.internal")?;
    let naming = CaNaming { mesh: "prod-eu", now };
    let (root_id, issuing_id) = (KeyId::parse("root")?, KeyId::parse("issuing")?);
    let mut store = MemoryKeyStore::new();
    store.generate_for(root_id.clone(), ca_key)?;
    store.generate_for(issuing_id.clone(), ca_key)?;
    let root = create_root(&store, &root_id, naming, &mut rng)?;
    let root = Issuer::new(&root.der, root_id, domain.clone(), &store)?;
    let points = PublishingPoints::new(HttpUrl::parse("http://pki.mesh.internal")?, 4)?;
    let ca_pointers = points.ca(root.key_identifier())?;
    let public = store.public_key(&issuing_id)?;
    let issuing = create_issuing_ca_for(&root, &store, &public, naming, &ca_pointers, &mut rng)?;
    let issuing = Issuer::new(&issuing.der, issuing_id, domain, &store)?;
    let pointers = points.leaf(issuing.key_identifier(), 3)?;
    let responder_key = LeafKey::generate_for(ca_key)?;
    let responder =
        OcspResponder::issue(&issuing, &store, responder_key, SerialNumber::random(&mut rng), now)?;
    let mut revoked = Vec::new();
    for name in ["good", "revoked"] {
        let leaf = LeafTemplate { pointers: pointers.clone(), crl_shard: 3, ..template(Profile::Peer, now)? };
        let key = LeafKey::generate_for(leaf_key)?;
        let csr = Csr::parse(&Csr::create(&key)?)?.verify()?;
        let issued = issue_leaf(&issuing, &store, &csr, &leaf, SerialNumber::random(&mut rng))?;
        fs::write(folder.join(format!("{name}.pem")), bundle::encode_certificates([&issued.der]))?;
        let mut status = OcspStatus::Good;
        if name == "revoked" {
            let reason = RevocationReason::KeyCompromise;
            revoked.push(RevokedEntry { serial: issued.serial, revoked_at: now, reason });
            status = OcspStatus::Revoked { at: now, reason };
        } else {
            let chain = [issued.der.clone().into(), issuing.certificate_der().to_vec().into()];
            let file = write_pkcs12("good", &key.to_pkcs8_der(), &chain, "judges", &mut rng)?;
            fs::write(folder.join("good.p12"), file.as_slice())?;
        }
        let answer = OcspAnswer::new(status, now, OCSP_RESPONSE_LIFETIME);
        let response = responder.presign(&issued.serial, CertIdHash::Sha1, &answer)?;
        fs::write(folder.join(format!("{name}.ocsp.der")), response)?;
    }
    let plan = CrlPlan {
        url: pointers.crl.as_ref(),
        scope: CrlScope::UserCerts,
        ..CrlPlan::new(7, now, CRL_LIFETIME, &revoked)
    };
    fs::write(folder.join("issuing.crl.pem"), bundle::encode_crls([build_crl(&issuing, &store, &plan)?]))?;
    let plan = CrlPlan::new(1, now, ROOT_CRL_LIFETIME, &[]);
    fs::write(folder.join("root.crl.pem"), bundle::encode_crls([build_crl(&root, &store, &plan)?]))?;
    fs::write(folder.join("root.pem"), bundle::encode_certificates([root.certificate_der()]))?;
    fs::write(folder.join("issuing.pem"), bundle::encode_certificates([issuing.certificate_der()]))?;
    fs::write(folder.join("responder.pem"), bundle::encode_certificates([responder.certificate_der()]))?;
    Ok(())
}

/// One key of each family.
fn families() -> Result<Vec<(KeyFamily, LeafKey)>, Box<dyn Error>> {
    let mut keys = Vec::new();
    for family in KeyFamily::ALL {
        let algorithm = KeyAlgorithm::GENERATED.into_iter().find(|known| KeyFamily::of(*known) == family);
        keys.push((family, LeafKey::generate_for(algorithm.ok_or("no such key")?)?));
    }
    Ok(keys)
}

/// A leaf under every built-in profile, for every type of key, and one that is revoked; returns those.
fn built_in(writer: &Writer, now: UtcDateTime) -> Result<Vec<SerialNumber>, Box<dyn Error>> {
    let mut revoked = Vec::new();
    for profile in Profile::ALL {
        let uses = match profile {
            Profile::Server => "server",
            Profile::Client => "client",
            _ => "both",
        };
        let mut template = template(profile, now)?;
        // One name for all judges; an operator has none.
        if profile != Profile::Operator {
            template.dns = vec![DnsName::parse("shop.mesh.internal")?];
        }
        for (family, key) in families()? {
            for suffix in ["", "-revoked"] {
                let serial = SerialNumber::random(&mut rng);
                let issued = issue_leaf(&writer.issuing, &writer.store, &key, &template, serial)?;
                let name = format!("profiles/{uses}-{profile}-{}{suffix}.pem", family.name());
                writer.write(&name, bundle::encode_certificates([&issued.der]))?;
                revoked.extend((!suffix.is_empty()).then_some(serial));
            }
        }
    }
    Ok(revoked)
}

/// The same under custom profiles that between them use every word of a profile.
fn custom(writer: &Writer, now: UtcDateTime) -> Result<Vec<SerialNumber>, Box<dyn Error>> {
    let mut revoked = Vec::new();
    let domain = writer.issuing.domain();
    let (node, service) = (Label::parse("web-1")?, Label::parse("shop")?);
    let addresses = [[100, 64, 0, 1].into(), [0xfd00, 0, 0, 0, 0, 0, 0, 1].into()];
    let dns = DnsName::parse("shop.mesh.internal")?;
    let day = std::time::Duration::from_secs(86_400);
    let spec = |name: &str, kind| -> Result<ProfileSpec, NameError> {
        Ok(ProfileSpec {
            name: Label::parse(name)?,
            kind,
            extra_usages: Vec::new(),
            keys: KeyFamily::ALL.into(),
            lifetime: day,
            lifetime_max: 7 * day,
            dns: vec![DnsRule::Exact(dns.clone()), DnsRule::OwnName],
            ips: IpRule::OwnAddresses,
            subject: SubjectForm::CommonName,
            revocation: RevocationForm::Pointers { crl: true, ocsp: true },
        })
    };
    let specs = [
        ("server", spec("plain", ServiceKind::Server)?),
        (
            "server",
            ProfileSpec {
                extra_usages: vec![ExtraUsage::IpsecIke],
                subject: SubjectForm::Empty,
                revocation: RevocationForm::NoRevAvail,
                ..spec("short", ServiceKind::Server)?
            },
        ),
        (
            "client",
            ProfileSpec {
                extra_usages: vec![ExtraUsage::DocumentSigning, ExtraUsage::EmailProtection],
                ips: IpRule::None,
                revocation: RevocationForm::Pointers { crl: false, ocsp: true },
                ..spec("signer", ServiceKind::Client)?
            },
        ),
        (
            "both",
            ProfileSpec {
                subject: SubjectForm::Empty,
                revocation: RevocationForm::Pointers { crl: false, ocsp: false },
                ..spec("mesh", ServiceKind::Peer)?
            },
        ),
    ];
    let points = PublishingPoints::new(HttpUrl::parse("http://pki.mesh.internal")?, 1)?;
    for (uses, spec) in specs {
        let profile = spec.accept(domain, now, &mut rng)?;
        for (family, key) in families()? {
            let request = SpecRequest {
                owner: NameOwner { domain, node: &node, addresses: &addresses },
                service: &service,
                dns: vec![dns.clone()],
                ips: if profile.spec().ips == IpRule::None { Vec::new() } else { addresses.to_vec() },
                lifetime: None,
                now,
                key: key.public_key(),
            };
            let issuer = writer.issuing.key_identifier();
            let template =
                profile.template(&request, Placement { issuer, points: Some(&points), shard: 0 })?;
            let csr = Csr::parse(&Csr::create(&key)?)?.verify()?;
            for suffix in ["", "-revoked"] {
                let serial = SerialNumber::random(&mut rng);
                let issued = issue_leaf(&writer.issuing, &writer.store, &csr, &template, serial)?;
                let name = format!("profiles/{uses}-{}-{}{suffix}.pem", profile.spec().name, family.name());
                writer.write(&name, bundle::encode_certificates([&issued.der]))?;
                revoked.extend((!suffix.is_empty()).then_some(serial));
            }
        }
    }
    Ok(revoked)
}

fn main() -> Result<(), Box<dyn Error>> {
    let folder = PathBuf::from(std::env::args_os().nth(1).ok_or("usage: chain DIR")?);
    fs::create_dir_all(folder.join("addressed"))?;
    let now = UtcDateTime::now();
    let domain = TrustDomain::parse("mesh.internal")?;
    let naming = CaNaming { mesh: "prod-eu", now };
    let (root_id, issuing_id) = (KeyId::parse("root")?, KeyId::parse("issuing")?);
    let mut store = MemoryKeyStore::new();
    store.generate(root_id.clone())?;
    store.generate(issuing_id.clone())?;
    let root = create_root(&store, &root_id, naming, &mut rng)?;
    let root = Issuer::new(&root.der, root_id, domain.clone(), &store)?;
    for ca_key in [KeyAlgorithm::EcdsaP256, KeyAlgorithm::EcdsaP384, KeyAlgorithm::Ed25519] {
        let rsa = KeyAlgorithm::Rsa { bits: 2048 };
        for leaf_key in [KeyAlgorithm::EcdsaP256, KeyAlgorithm::EcdsaP384, KeyAlgorithm::Ed25519, rsa] {
            kind(&folder, ca_key, leaf_key, now)?;
        }
    }
    let issuing = create_issuing_ca(&root, &store, &issuing_id, naming, &mut rng)?;
    let issuing = Issuer::new(&issuing.der, issuing_id, domain, &store)?;
    let writer = Writer { folder, store, issuing };
    writer.write("root.pem", bundle::encode_certificates([root.certificate_der()]))?;
    writer.write("issuing.pem", bundle::encode_certificates([writer.issuing.certificate_der()]))?;

    for profile in Profile::ALL {
        writer.leaf(&format!("leaf-{profile}.pem"), &template(profile, now)?)?;
    }
    let short = LeafTemplate { no_rev_avail: true, ..template(Profile::Server, now)? };
    writer.leaf("short.pem", &short)?;
    fs::create_dir_all(writer.folder.join("profiles"))?;
    let mut all_revoked = built_in(&writer, now)?;
    all_revoked.extend(custom(&writer, now)?);
    let long = DnsName::parse(&format!("{}.mesh.internal", "a".repeat(60)))?;
    writer.leaf("leaf-long.pem", &LeafTemplate { dns: vec![long], ..template(Profile::Server, now)? })?;
    let revoked = writer.leaf("leaf-revoked.pem", &template(Profile::Peer, now)?)?;
    writer.crl("root.crl.pem", &root, &CrlPlan::new(1, now, ROOT_CRL_LIFETIME, &[]))?;
    let issuing = &writer.issuing;
    writer.crl("issuing.crl.pem", issuing, &CrlPlan::new(1, now, CRL_LIFETIME, &[]))?;
    let entry = |serial, reason| RevokedEntry { serial, revoked_at: now, reason };
    all_revoked.push(revoked);
    let entries: Vec<_> =
        all_revoked.into_iter().map(|serial| entry(serial, RevocationReason::KeyCompromise)).collect();
    writer.crl("issuing-revoked.crl.pem", issuing, &CrlPlan::new(2, now, CRL_LIFETIME, &entries))?;

    let address = HttpUrl::parse(ADDRESS)?;
    let pointers = Pointers { crl: Some(address.clone()), ..Pointers::default() };
    let addressed = LeafTemplate { pointers, ..template(Profile::Peer, now)? };
    let name = |file: &str| Path::new("addressed").join(file).to_string_lossy().into_owned();
    writer.leaf(&name("leaf-peer.pem"), &addressed)?;
    let revoked = writer.leaf(&name("leaf-revoked.pem"), &addressed)?;
    let entries = [entry(revoked, RevocationReason::Unspecified)];
    let plan = CrlPlan { url: Some(&address), ..CrlPlan::new(3, now, CRL_LIFETIME, &entries) };
    writer.crl(&name("issuing.crl.pem"), issuing, &plan)
}
