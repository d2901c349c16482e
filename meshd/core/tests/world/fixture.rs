//! A mesh to try commands on: a World, its journal, and certificates as the controller would make them.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use mesh_core::policy::STARTER_POLICY;
use mesh_core::{
    Actor, CaRecord, CertificateRecord, Change, Command, Cross, Decision, KeyHash, KeyId, NodeId, NodeName,
    OperationId, OperatorName, Owner, Record, Refusal, Request, Role, Serial, Tag, TokenId, UtcTime, WgKey,
    Which, World,
};

pub(crate) const START: UtcTime = UtcTime(1_795_363_200);
pub(crate) const HOUR: Duration = Duration::from_secs(3600);
pub(crate) const DAY: Duration = Duration::from_secs(86_400);

/// A node as its owner knows it.
#[derive(Clone, Debug)]
pub(crate) struct Enrolled {
    pub(crate) id: NodeId,
    pub(crate) name: NodeName,
    pub(crate) serial: Serial,
    pub(crate) token: TokenId,
    pub(crate) enrollment: Command,
}

impl Enrolled {
    pub(crate) fn actor(&self) -> Actor {
        Actor::Node { id: self.id, serial: self.serial }
    }
}

pub(crate) struct Fixture {
    pub(crate) world: World,
    pub(crate) journal: Vec<Record>,
    pub(crate) now: UtcTime,
    counter: u32,
}

impl Fixture {
    /// A new mesh `mesh.internal` with the starter policy.
    pub(crate) fn new() -> Self {
        Self::with_policy(STARTER_POLICY)
    }

    pub(crate) fn with_policy(policy: &str) -> Self {
        let mut fixture = Self::empty();
        fixture.ok(Actor::LocalRoot, create_mesh(policy));
        let serial = Serial(fixture.bytes());
        let owner = Owner::Controller { name: "ctl-1".to_owned() };
        let certificate = fixture.certificate(owner, "controller", serial);
        fixture.ok(Actor::Controller, Command::RecordControllerCertificate { certificate });
        fixture
    }

    /// Before the first record.
    pub(crate) fn empty() -> Self {
        Self { world: World::new(), journal: Vec::new(), now: START, counter: 0 }
    }

    /// Bytes that never came before.
    pub(crate) fn bytes<const N: usize>(&mut self) -> [u8; N] {
        self.counter += 1;
        let mut bytes = [0xA5; N];
        bytes[..4].copy_from_slice(&self.counter.to_be_bytes());
        // The tail of a serial chooses its CRL shard.
        if N >= 8 {
            bytes[N - 4..].copy_from_slice(&self.counter.to_be_bytes());
        }
        bytes
    }

    pub(crate) fn wait(&mut self, duration: Duration) {
        self.now = self.now + duration;
    }

    /// Decides and, when there is something to record, records and applies.
    pub(crate) fn run(&mut self, request: &Request) -> Result<Decision, Refusal> {
        let decision = self.world.decide(self.now, request)?;
        if let Decision::Changes(changes) = &decision {
            assert!(!changes.is_empty(), "a decision without changes is AlreadyDone");
            let at = self.world.record_time(self.now);
            let record = self.world.record(at, request, changes.clone());
            self.world.apply(self.journal.len() as u64 + 1, &record);
            self.journal.push(record);
        }
        Ok(decision)
    }

    pub(crate) fn give(&mut self, actor: Actor, command: Command) -> Result<Decision, Refusal> {
        let operation = OperationId(self.bytes());
        self.run(&Request { actor, operation, command })
    }

    /// The command is accepted and changes something.
    #[track_caller]
    pub(crate) fn ok(&mut self, actor: Actor, command: Command) -> Vec<Change> {
        match self.give(actor, command.clone()) {
            Ok(Decision::Changes(changes)) => changes,
            other => panic!("{command:?}: {other:?}"),
        }
    }

    #[track_caller]
    pub(crate) fn already_done(&mut self, actor: Actor, command: Command) {
        assert_eq!(self.give(actor, command), Ok(Decision::AlreadyDone));
    }

    /// The command is refused and changes nothing.
    #[track_caller]
    pub(crate) fn refused(&mut self, actor: Actor, command: Command) -> Refusal {
        let before = self.world.clone();
        let refusal = match self.give(actor, command.clone()) {
            Err(refusal) => refusal,
            Ok(decision) => panic!("{command:?}: {decision:?}"),
        };
        assert_eq!(self.world, before);
        refusal
    }

    /// A certificate of 72 hours for a new key.
    pub(crate) fn certificate(&mut self, owner: Owner, profile: &str, serial: Serial) -> CertificateRecord {
        CertificateRecord {
            serial,
            key_hash: KeyHash(self.bytes()),
            owner,
            profile: profile.to_owned(),
            names: Vec::new(),
            ips: Vec::new(),
            pair_name: String::new(),
            shard: self.world.place_for(&issuer(), &serial).shard,
            not_before: self.now - Duration::from_secs(900),
            not_after: self.now + 72 * HOUR,
            issuer_key_id: self.world.active_issuer().map_or_else(issuer, |active| active.key_id.clone()),
            der: serial.0.to_vec(),
        }
    }

    pub(crate) fn node_certificate(
        &mut self,
        id: NodeId,
        name: &NodeName,
        ipv4: Ipv4Addr,
    ) -> CertificateRecord {
        let serial = Serial(self.bytes());
        let mut certificate = self.certificate(Owner::Node(id), "node", serial);
        let mesh = self.world.mesh().unwrap();
        certificate.names = vec![name.under(&mesh.domain).unwrap()];
        certificate.ips = vec![IpAddr::V4(ipv4), IpAddr::V6(mesh.ipv6_of(id))];
        certificate
    }

    /// A server certificate for names of a node's service; the first names the pair.
    pub(crate) fn service(&mut self, node: &Enrolled, names: &[&str]) -> CertificateRecord {
        let serial = Serial(self.bytes());
        let owner = Owner::Service { node: node.id, name: names[0].to_owned() };
        let mut certificate = self.certificate(owner, "server", serial);
        certificate.names = names.iter().map(|name| (*name).try_into().unwrap()).collect();
        certificate.pair_name = names[0].to_owned();
        certificate
    }

    #[track_caller]
    pub(crate) fn issue(&mut self, node: &Enrolled, names: &[&str]) -> CertificateRecord {
        let certificate = self.service(node, names);
        self.ok(node.actor(), issue(&certificate));
        certificate
    }

    pub(crate) fn token(&mut self, name: Option<&str>, tags: &[&str], uses: u32, approval: bool) -> TokenId {
        let id = TokenId(self.bytes());
        let command = Command::CreateToken {
            id,
            secret_hash: self.bytes(),
            tags: tag_set(tags),
            name: name.map(|name| name.try_into().unwrap()),
            uses,
            expires_at: self.now + HOUR,
            require_approval: approval,
        };
        self.ok(Actor::LocalRoot, command);
        id
    }

    /// An enrollment with new keys and a free address.
    pub(crate) fn enrollment(&mut self, token: TokenId, name: &str) -> Command {
        let name = NodeName::try_from(name).unwrap();
        let (node, ipv4) = (self.world.next_node_id(), self.world.free_ipv4().next().unwrap());
        let certificate = self.node_certificate(node, &name, ipv4);
        Command::Enroll { token, node, name, ipv4, wireguard: WgKey(self.bytes()), certificate }
    }

    #[track_caller]
    pub(crate) fn enroll(&mut self, name: &str, tags: &[&str]) -> Enrolled {
        let token = self.token(None, tags, 1, false);
        self.enroll_with(token, name)
    }

    #[track_caller]
    pub(crate) fn enroll_with(&mut self, token: TokenId, name: &str) -> Enrolled {
        let enrollment = self.enrollment(token, name);
        self.ok(Actor::Token { id: token }, enrollment.clone());
        enrolled(enrollment)
    }

    /// A renewal under the identity that `node` holds.
    pub(crate) fn renewal(&mut self, node: &Enrolled, resume: bool) -> (Command, Serial) {
        let known = self.world.node(node.id).unwrap().clone();
        let certificate = self.node_certificate(node.id, &node.name, known.ipv4.unwrap());
        let serial = certificate.serial;
        (Command::RenewIdentity { node: node.id, wireguard: known.wireguard, certificate, resume }, serial)
    }

    /// An operator with a certificate.
    pub(crate) fn operator(&mut self, name: &str, role: Role) -> Actor {
        let name = OperatorName::try_from(name).unwrap();
        let token = TokenId(self.bytes());
        let (secret_hash, expires_at) = (self.bytes(), self.now + HOUR);
        let add = Command::AddOperator { name: name.clone(), role, token, secret_hash, expires_at };
        self.ok(Actor::LocalRoot, add);
        let serial = Serial(self.bytes());
        let certificate = self.certificate(Owner::Operator(name.clone()), "operator", serial);
        self.ok(Actor::Token { id: token }, Command::LoginOperator { token, certificate });
        Actor::Operator { name, serial }
    }

    /// Records the next CRL of shard 0, signed now.
    pub(crate) fn crl(&mut self) {
        self.crl_of(0);
    }

    /// Records the next CRL of a shard, signed now.
    pub(crate) fn crl_of(&mut self, shard: u16) {
        self.next_crl(&issuer(), shard, 7 * DAY);
    }

    /// Records the next CRL of an issuer's first shard, signed now.
    pub(crate) fn crl_by(&mut self, issuer: &KeyId, lasts: Duration) {
        self.next_crl(issuer, 0, lasts);
    }

    fn next_crl(&mut self, issuer: &KeyId, shard: u16, lasts: Duration) {
        let command = Command::RecordCrl {
            issuer_key_id: issuer.clone(),
            shard,
            number: self.world.last_crl_number(issuer, shard) + 1,
            covers_seq: self.world.head_seq(),
            digest: self.bytes(),
            this_update: self.now,
            next_update: self.now + lasts,
        };
        self.ok(Actor::Controller, command);
    }
}

pub(crate) fn enrolled(enrollment: Command) -> Enrolled {
    match &enrollment {
        Command::Enroll { token, node, name, certificate, .. } => Enrolled {
            id: *node,
            name: name.clone(),
            serial: certificate.serial,
            token: *token,
            enrollment: enrollment.clone(),
        },
        other => panic!("not an enrollment: {other:?}"),
    }
}

pub(crate) fn create_mesh(policy: &str) -> Command {
    Command::CreateMesh {
        mesh_id: [1; 16],
        journal_id: [2; 16],
        fleet: "prod-eu".to_owned(),
        domain: "mesh.internal".try_into().unwrap(),
        controller_name: "ctl-1".to_owned(),
        ipv4_pool: "100.64.0.0/10".parse().unwrap(),
        cas: vec![
            CaRecord { key_id: KeyId(vec![9; 20]), der: vec![1], is_root: true, sealed: false },
            CaRecord { key_id: issuer(), der: vec![2], is_root: false, sealed: false },
        ],
        starter_policy: policy.to_owned(),
    }
}

pub(crate) fn issuer() -> KeyId {
    KeyId(vec![8; 20])
}

pub(crate) fn root() -> KeyId {
    KeyId(vec![9; 20])
}

/// A rotation to authorities with keys made of `byte`; with a new root, or under the one that is.
pub(crate) fn start_rotation(world: &World, byte: u8, new_root: bool, auto: bool) -> Command {
    let old = world.active_root().unwrap().key_id.clone();
    let (new, issuing) = (KeyId(vec![byte; 20]), KeyId(vec![byte + 1; 20]));
    let ca = |key_id: &KeyId, is_root| CaRecord {
        key_id: key_id.clone(),
        der: key_id.0.clone(),
        is_root,
        sealed: false,
    };
    let cross = |root: &KeyId, by: &KeyId| Cross { root: root.clone(), by: by.clone(), der: vec![byte] };
    Command::StartRotation {
        issuing: ca(&issuing, false),
        root: new_root.then(|| ca(&new, true)),
        crosses: if new_root { vec![cross(&new, &old), cross(&old, &new)] } else { Vec::new() },
        auto,
    }
}

pub(crate) fn tag_set(tags: &[&str]) -> BTreeSet<Tag> {
    tags.iter().map(|tag| (*tag).try_into().unwrap()).collect()
}

pub(crate) fn issue(certificate: &CertificateRecord) -> Command {
    Command::IssueCertificate { certificate: certificate.clone(), restart: false, made: None }
}

pub(crate) fn restart(certificate: &CertificateRecord) -> Command {
    Command::IssueCertificate { certificate: certificate.clone(), restart: true, made: None }
}

pub(crate) fn revoke_node(node: &Enrolled) -> Command {
    let reason = mesh_core::Reason::KeyCompromise;
    Command::RevokeNode { node: node.id, reason, remove: false }
}

pub(crate) fn revoke_name(name: &str, reason: mesh_core::Reason) -> Command {
    Command::RevokeCertificates { which: Which::Name(name.to_owned()), reason }
}

pub(crate) fn anonymous(token: TokenId) -> Actor {
    Actor::Token { id: token }
}
