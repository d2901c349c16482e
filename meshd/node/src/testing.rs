//! A mesh for tests: root, issuing CA, nodes and CRLs, all made by `mesh-ca`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use mesh_ca::{
    CRL_LIFETIME, CaNaming, CertIdHash, CrlPlan, DnsName, Identity as Speaker, Issuer, KeyId, Label, LeafKey,
    LeafTemplate, MemoryKeyStore, OCSP_RESPONSE_LIFETIME, OcspAnswer, OcspResponder, OcspStatus, Profile,
    RevocationReason, RevokedEntry, SerialNumber, TrustDomain, build_crl, create_issuing_ca, create_root,
    issue_leaf,
};
use mesh_proto::v1 as pb;
use time::UtcDateTime;

use crate::join::{leaf_key, new_keys, wireguard_key};
use crate::pki::Trust;
use crate::roster::Place;
use crate::state::{Der, Identity};

pub(crate) const DOMAIN: &str = "mesh.internal";
const POOL: &str = "100.64.0.0/10";
const PREFIX: &str = "fd5e:1:2::/48";
/// How long a leaf lives.
pub(crate) const LIFE: Duration = Duration::from_secs(72 * 3600);

pub(crate) struct TestMesh {
    store: MemoryKeyStore,
    root: Issuer,
    issuing: Issuer,
    root_pin: [u8; 32],
    pub(crate) now: UtcDateTime,
}

/// Random bytes as `mesh-ca` takes them.
fn random(bytes: &mut [u8]) {
    for chunk in bytes.chunks_mut(16) {
        chunk.copy_from_slice(&mesh_runtime::random_bytes::<16>()[..chunk.len()]);
    }
}

impl TestMesh {
    pub(crate) fn new(now: UtcDateTime) -> Self {
        let now = now.truncate_to_second();
        let domain = TrustDomain::parse(DOMAIN).unwrap();
        let mut store = MemoryKeyStore::new();
        let (root_key, issuing_key) = (KeyId::parse("root").unwrap(), KeyId::parse("issuing").unwrap());
        store.generate(root_key.clone()).unwrap();
        store.generate(issuing_key.clone()).unwrap();
        let naming = CaNaming { mesh: "test", now };
        let made = create_root(&store, &root_key, naming, &mut random).unwrap();
        let root_pin = made.key_hash;
        let root = Issuer::new(&made.der, root_key, domain.clone(), &store).unwrap();
        let made = create_issuing_ca(&root, &store, &issuing_key, naming, &mut random).unwrap();
        let issuing = Issuer::new(&made.der, issuing_key, domain, &store).unwrap();
        Self { store, root, issuing, root_pin, now }
    }

    /// A mesh whose root follows this one's, and what nodes are told: both roots, then the new one alone.
    pub(crate) fn successor(&self) -> (Self, [pb::TrustBundle; 2]) {
        let next = Self::new(self.now);
        let (old, new) = (self.root.certificate_der(), next.root.certificate_der());
        let vouched = |signer: &Self, root: &[u8]| {
            let made = mesh_ca::vouch_for_root(&signer.root, &signer.store, root, self.now, &mut random);
            bytes::Bytes::from(made.unwrap().der)
        };
        let der = |der: &[u8]| bytes::Bytes::from(der.to_vec());
        let (first, second) = (der(self.issuing.certificate_der()), der(next.issuing.certificate_der()));
        let overlap = pb::TrustBundle {
            version: 2,
            roots: vec![der(old), der(new)],
            issuers: vec![first, second.clone()],
            lineage: vec![vouched(self, new)],
            issuer_key_id: der(self.issuing.key_identifier().as_bytes()),
        };
        let alone = pb::TrustBundle {
            version: 3,
            roots: vec![der(new)],
            issuers: vec![second],
            issuer_key_id: der(next.issuing.key_identifier().as_bytes()),
            ..overlap.clone()
        };
        (next, [overlap, alone])
    }

    /// The identity of node `id`, with new keys.
    pub(crate) fn node(&self, id: u32, name: &str) -> Identity {
        self.node_at(id, name, address(id), ipv6(id))
    }

    /// As [`node`](Self::node), with addresses an honest controller would not give.
    pub(crate) fn node_at(&self, id: u32, name: &str, ipv4: Ipv4Addr, ipv6: Ipv6Addr) -> Identity {
        let (tls_key, wireguard_secret) = new_keys().unwrap();
        let key = leaf_key(&tls_key).unwrap();
        let wireguard = wireguard_key(&wireguard_secret).unwrap().public().0;
        let speaker = Speaker::Node { name: Label::parse(name).unwrap() };
        let mut template = LeafTemplate::new(Profile::Node, Some(speaker), self.now, LIFE);
        template.dns = vec![DnsName::parse(&format!("{name}.{DOMAIN}")).unwrap()];
        template.ips = vec![IpAddr::V4(ipv4), IpAddr::V6(ipv6)];
        template.wireguard_keys = vec![wireguard];
        let leaf = self.sign(&key, &template);
        Identity {
            name: name.into(),
            node_id: id,
            trust_domain: DOMAIN.into(),
            mesh_id: vec![5; 16],
            ipv4,
            ipv6,
            ipv4_pool: POOL.parse().unwrap(),
            ipv6_prefix: PREFIX.parse().unwrap(),
            controllers: vec!["127.0.0.1:1".into()],
            root_pin: self.root_pin,
            lineage: Vec::new(),
            bundle: 0,
            active_issuer: Vec::new(),
            leaf: Der(leaf),
            issuers: vec![Der(self.issuing.certificate_der().to_vec())],
            roots: vec![Der(self.root.certificate_der().to_vec())],
            renew_at: 0,
            tls_key,
            wireguard_keys: vec![wireguard_secret],
        }
    }

    /// A service's leaf for `key`: profile `server`.
    pub(crate) fn service(&self, key: &LeafKey, name: &str) -> Vec<u8> {
        let label = |text: &str| Label::parse(text).unwrap();
        let dns = vec![DnsName::parse(name).unwrap()];
        let template =
            LeafTemplate::service(Profile::Server, label("web-1"), label("api"), dns, self.now, LIFE);
        self.sign(key, &template)
    }

    /// A controller's leaf.
    pub(crate) fn controller(&self, key: &LeafKey) -> Vec<u8> {
        let speaker = Speaker::Controller { name: Label::parse("ctl-1").unwrap() };
        let mut template = LeafTemplate::new(Profile::Controller, Some(speaker), self.now, LIFE);
        template.dns = vec![DnsName::parse("ctl-1.mesh.internal").unwrap()];
        self.sign(key, &template)
    }

    fn sign(&self, key: &LeafKey, template: &LeafTemplate) -> Vec<u8> {
        let serial = SerialNumber::random(&mut random);
        issue_leaf(&self.issuing, &self.store, key, template, serial).unwrap().der
    }

    /// The CRLs of both CAs with `number`; the issuing CA's lists `revoked`.
    pub(crate) fn crls(&self, number: u64, revoked: &[&[u8]]) -> Vec<pb::Crl> {
        let entries: Vec<RevokedEntry> = revoked
            .iter()
            .map(|serial| RevokedEntry {
                serial: SerialNumber::from_slice(serial).unwrap(),
                revoked_at: self.now,
                reason: RevocationReason::KeyCompromise,
            })
            .collect();
        [(&self.root, &[][..]), (&self.issuing, &entries[..])]
            .into_iter()
            .map(|(issuer, entries)| {
                let plan = CrlPlan::new(number, self.now, CRL_LIFETIME, entries);
                let der = build_crl(issuer, &self.store, &plan).unwrap();
                let issuer_key_id = issuer.key_identifier().as_bytes().to_vec().into();
                pb::Crl { issuer_key_id, shard: 0, number, der: der.into() }
            })
            .collect()
    }

    /// An OCSP response about `serial`, good or revoked.
    pub(crate) fn ocsp(&self, serial: &[u8], revoked: bool) -> Vec<u8> {
        let (key, own) = (LeafKey::generate().unwrap(), SerialNumber::random(&mut random));
        let responder = OcspResponder::issue(&self.issuing, &self.store, key, own, self.now).unwrap();
        let status = match revoked {
            true => OcspStatus::Revoked { at: self.now, reason: RevocationReason::KeyCompromise },
            false => OcspStatus::Good,
        };
        let answer = OcspAnswer::new(status, self.now, OCSP_RESPONSE_LIFETIME);
        let serial = SerialNumber::from_slice(serial).unwrap();
        responder.presign(&serial, CertIdHash::Sha1, &answer).unwrap()
    }

    /// What `identity` believes once it has the CRLs with `number`.
    pub(crate) fn trust(&self, identity: &Identity, number: u64, revoked: &[&[u8]]) -> Trust {
        let mut trust = Trust::of(identity).unwrap();
        for crl in self.crls(number, revoked) {
            assert!(trust.take_crl(&crl).unwrap());
        }
        trust
    }
}

pub(crate) fn address(id: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(100, 64, 0, 0)) + id)
}

pub(crate) fn ipv6(id: u32) -> Ipv6Addr {
    Ipv6Addr::new(0xfd5e, 1, 2, 0, 0, 0, (id >> 16) as u16, id as u16)
}

/// The record of `identity` as the controller sends it to others.
pub(crate) fn record(identity: &Identity) -> pb::Peer {
    pb::Peer {
        node_id: identity.node_id,
        leaf: identity.leaf.0.clone().into(),
        inbound: true,
        outbound: true,
        tags: Vec::new(),
    }
}

pub(crate) fn cursor(seq: u64) -> pb::Cursor {
    pb::Cursor { journal_id: vec![1; 16].into(), incarnation: 1, seq, hash8: vec![0; 8].into() }
}

pub(crate) fn full(seq: u64, peers: Vec<pb::Peer>) -> pb::Full {
    let peers = peers.iter().map(pb::Peer::to_entry).collect();
    pb::Full { cursor: Some(cursor(seq)), own: Some(pb::Own::default()), peers, ..Default::default() }
}

pub(crate) fn place(identity: &Identity) -> Place {
    let key = wireguard_key(&identity.wireguard_keys[0]).unwrap();
    Place {
        node_id: identity.node_id,
        name: identity.name.clone(),
        ipv4: identity.ipv4,
        ipv6: identity.ipv6,
        ipv4_pool: identity.ipv4_pool,
        ipv6_prefix: identity.ipv6_prefix,
        wireguard_keys: vec![key.public().0],
    }
}

/// Names the child that [`in_own_network`] started.
const OWN_NETWORK: &str = "MESH_NODE_OWN_NETWORK";

/// Runs `body` where it may change interfaces, routes and tables: the test called `name` runs again in a
/// network namespace of its own. Left out, and said, where namespaces, `nft` or TUN devices are denied.
pub(crate) fn in_own_network(name: &str, body: impl FnOnce()) {
    if std::env::var_os(OWN_NETWORK).is_some() {
        run("ip", &["link", "set", "lo", "up"]);
        return body();
    }
    let unshare = || {
        let mut command = std::process::Command::new("unshare");
        command.args(["-Urn", "--"]).env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin");
        command
    };
    let able = "nft add table inet able && ip tuntap add able0 mode tun && ip link set lo up";
    match unshare().args(["sh", "-c", able]).output() {
        Ok(output) if output.status.success() => {}
        Ok(output) => return eprintln!("left out: {}", String::from_utf8_lossy(&output.stderr)),
        Err(error) => return eprintln!("left out: {error}"),
    }
    let output = unshare()
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(OWN_NETWORK, "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let complained = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("1 passed"), "{said}\n{complained}");
}

/// Runs a program that must succeed; its output.
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let output = std::process::Command::new(program).args(arguments).output().unwrap();
    let complained = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {complained}");
    String::from_utf8(output.stdout).unwrap()
}
