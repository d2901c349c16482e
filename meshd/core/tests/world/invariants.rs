//! Random commands from random actors, in any order: what must hold after each of them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use mesh_core::world::{Node, NodeState, Purpose};
use mesh_core::{
    Actor, CertificateRecord, Change, Command, Decision, KeyHash, KeyId, NodeId, OperationId, OperatorName,
    Owner, Reason, Record, Refusal, Request, Role, Serial, TokenId, UtcTime, View, WgKey, Which, World,
};
use proptest::collection::vec;
use proptest::prelude::*;

use crate::fixture::*;

/// Numbers that are read as a command: few values each, so that they often collide.
#[derive(Clone, Copy, Debug)]
struct Step {
    kind: u8,
    actor: u8,
    a: u8,
    b: u8,
    c: u8,
}

fn any_step() -> impl Strategy<Value = Step> {
    (0u8..34, any::<u8>(), any::<u8>(), any::<u8>(), any::<u8>()).prop_map(|(kind, actor, a, b, c)| Step {
        kind,
        actor,
        a,
        b,
        c,
    })
}

const NAMES: [&str; 5] = ["alpha", "bravo", "charlie", "api", "shop"];
const POLICIES: [&str; 4] = [
    "[[allow]]\nfrom = [\"*\"]\nto = [\"*\"]",
    "[[allow]]\nfrom = [\"tag:t0\"]\nto = [\"tag:t1\", \"node:alpha\"]",
    "[[grant]]\nnames = [\"api.mesh.internal\", \"www.shop.mesh.internal\"]\nto = [\"tag:t0\", \"node:bravo\"]\n[[allow]]\nfrom = [\"node:bravo\"]\nto = [\"*\"]",
    "",
];
const OPERATORS: [&str; 3] = ["ann", "ben", "cyd"];

struct Machine {
    mesh: Fixture,
    tokens: Vec<TokenId>,
    nodes: Vec<NodeId>,
    serials: Vec<Serial>,
    /// What was asked last, to be asked again.
    last: Option<Request>,
    /// What each node holds: the record it is at, and its view.
    held: BTreeMap<NodeId, (u64, View)>,
}

impl Machine {
    fn new() -> Self {
        let mesh = Fixture::with_policy(POLICIES[0]);
        Self { mesh, tokens: vec![], nodes: vec![], serials: vec![], last: None, held: BTreeMap::new() }
    }

    fn pick<T: Copy>(from: &[T], number: u8) -> Option<T> {
        from.get(usize::from(number) % from.len().max(1)).copied()
    }

    /// A node of now, or seldom one of ever.
    fn node_id(&self, number: u8) -> Option<NodeId> {
        let now: Vec<NodeId> = self.mesh.world.nodes().map(|node| node.id).collect();
        if number > 220 { Self::pick(&self.nodes, number) } else { Self::pick(&now, number) }
    }

    fn node(&self, number: u8) -> Option<Node> {
        self.node_id(number).and_then(|id| self.mesh.world.node(id).cloned())
    }

    /// One of the newest tokens, or seldom one of ever.
    fn token(&self, number: u8) -> Option<TokenId> {
        let newest = &self.tokens[self.tokens.len().saturating_sub(3)..];
        if number > 220 { Self::pick(&self.tokens, number) } else { Self::pick(newest, number) }
    }

    fn node_actor(&self, node: &Node, number: u8) -> Option<Actor> {
        let serials: Vec<Serial> = node.current.iter().map(|c| c.serial).chain(node.previous).collect();
        Some(Actor::Node { id: node.id, serial: Self::pick(&serials, number)? })
    }

    fn operator_actor(&self, number: u8) -> Option<Actor> {
        let name = OperatorName::try_from(OPERATORS[usize::from(number) % 3]).unwrap();
        let serial = self.mesh.world.operator(&name)?.serial?;
        Some(Actor::Operator { name, serial })
    }

    /// Somebody who has no business here, more often than not.
    fn stranger(&self, number: u8) -> Actor {
        let serial = Self::pick(&self.serials, number / 5).unwrap_or(Serial([0; 16]));
        let stranger = match number % 5 {
            0 => Self::pick(&self.nodes, number / 5).map(|id| Actor::Node { id, serial }),
            1 => self.operator_actor(number / 5),
            2 => Self::pick(&self.tokens, number / 5).map(|id| Actor::Token { id }),
            3 => Some(Actor::Operator { name: "ann".try_into().unwrap(), serial }),
            _ => Some(Actor::Controller),
        };
        stranger.unwrap_or(Actor::LocalRoot)
    }

    /// One of a dozen keys; a new one when the number is high.
    fn key(&mut self, number: u8) -> KeyHash {
        if number > 40 { KeyHash(self.mesh.bytes()) } else { KeyHash([number % 12; 32]) }
    }

    fn wireguard(&mut self, number: u8) -> WgKey {
        if number > 40 { WgKey(self.mesh.bytes()) } else { WgKey([number % 8; 32]) }
    }

    /// The command that a step means, and who may be expected to give it.
    fn command(&mut self, step: Step) -> Option<(Actor, Command)> {
        let Step { kind, a, b, c, .. } = step;
        let root = Actor::LocalRoot;
        let reason = Reason::ALL[usize::from(c) % Reason::ALL.len()];
        Some(match kind {
            0 | 1 => (root, self.create_token(a, b, c)),
            2 => (root, Command::RevokeToken { id: self.token(a)? }),
            3..=6 => self.enrollment(a, b, c)?,
            7 => self.request(a, b, c)?,
            8 => (root, Command::ApproveNode { node: self.node_id(a)? }),
            9 => {
                let tags = |bits: u8| tag_set(&["t0", "t1"][..usize::from(bits % 3).min(2)]);
                (root, Command::TagNode { node: self.node_id(a)?, add: tags(b), remove: tags(c) })
            }
            10 => (root, Command::RevokeNode { node: self.node_id(a)?, reason, remove: b.is_multiple_of(2) }),
            11 => {
                let node = self.node(a)?;
                (self.node_actor(&node, b)?, Command::LeaveNode { node: node.id })
            }
            12..=14 => self.renewal(a, b, c)?,
            15 => (root, Command::RotateKeys { node: self.node_id(a)? }),
            16..=18 => self.issuance(a, b, c)?,
            19 => (root, self.revocation(a, b, reason)),
            20 => (root, Command::ApplyPolicy { toml: POLICIES[usize::from(a) % 4].to_owned() }),
            21 => (root, self.add_operator(a, b)),
            22 => (root, Command::RemoveOperator { name: OPERATORS[usize::from(a) % 3].try_into().unwrap() }),
            23 => self.login(a, b)?,
            24 if a.is_multiple_of(16) => (Actor::Controller, open_shards(a, b)),
            24 if a.is_multiple_of(5) => (Actor::Controller, self.responder()),
            24 => (Actor::Controller, self.crl(a)),
            26..=31 => self.authorities(kind, a, b, c)?,
            _ if a.is_multiple_of(16) => (Actor::Controller, Command::HoldClock),
            _ => (root, Command::ConfirmClock),
        })
    }

    fn create_token(&mut self, a: u8, b: u8, c: u8) -> Command {
        let id = TokenId(self.mesh.bytes());
        let name = (a.is_multiple_of(3)).then(|| NAMES[usize::from(b) % NAMES.len()].try_into().unwrap());
        Command::CreateToken {
            id,
            secret_hash: [a; 32],
            tags: tag_set(&["t0", "t1"][..usize::from(c % 3).min(2)]),
            uses: if name.is_some() { 1 } else { u32::from(b % 3) + 1 },
            name,
            expires_at: self.mesh.now + HOUR * u32::from(c % 50),
            require_approval: c.is_multiple_of(4),
        }
    }

    fn enrollment(&mut self, a: u8, b: u8, c: u8) -> Option<(Actor, Command)> {
        let token = self.token(a)?;
        let name = NAMES[usize::from(b) % NAMES.len()];
        let mut command = self.mesh.enrollment(token, name);
        let (key, wireguard_key) = (self.key(c), self.wireguard(c.wrapping_mul(7)));
        let pending = self.mesh.world.node_by_name(&name.try_into().unwrap()).cloned();
        if let Command::Enroll { node, certificate, wireguard, ipv4, .. } = &mut command {
            (certificate.key_hash, *wireguard) = (key, wireguard_key);
            // Often the machine that asked before; seldom somebody else's address or index.
            if let Some(known) = pending.filter(|_| c.is_multiple_of(2)) {
                (certificate.key_hash, *wireguard) = (known.enrollment.key_hash, known.enrollment.wireguard);
                let owned = self.mesh.node_certificate(known.id, &known.name, *ipv4);
                (*node, certificate.owner, certificate.ips) = (known.id, owned.owner, owned.ips);
            } else if c == 255 {
                *node = Self::pick(&self.nodes, b).unwrap_or(*node);
            }
        }
        Some((Actor::Token { id: token }, command))
    }

    fn request(&mut self, a: u8, b: u8, c: u8) -> Option<(Actor, Command)> {
        let token = self.token(a)?;
        let name = NAMES[usize::from(b) % NAMES.len()].try_into().unwrap();
        let (key_hash, wireguard) = (self.key(c), self.wireguard(c.wrapping_mul(7)));
        Some((Actor::Token { id: token }, Command::RequestEnrollment { token, name, key_hash, wireguard }))
    }

    fn renewal(&mut self, a: u8, b: u8, c: u8) -> Option<(Actor, Command)> {
        let node = self.node(a)?;
        let mut certificate = self.mesh.node_certificate(node.id, &node.name, node.ipv4?);
        certificate.key_hash = self.key(c);
        let mut wireguard = node.wireguard.clone();
        if b.is_multiple_of(3) {
            wireguard.insert(0, self.wireguard(c));
            wireguard.truncate(2);
        }
        let command =
            Command::RenewIdentity { node: node.id, wireguard, certificate, resume: b.is_multiple_of(4) };
        Some((self.node_actor(&node, c)?, command))
    }

    fn issuance(&mut self, a: u8, b: u8, c: u8) -> Option<(Actor, Command)> {
        let name = match b % 4 {
            0 => format!("{}.mesh.internal", NAMES[usize::from(c) % NAMES.len()]),
            1 => format!("www.{}.mesh.internal", NAMES[usize::from(c) % NAMES.len()]),
            2 => {
                format!("{}.mesh.internal", self.node(a).map_or("x".to_owned(), |node| node.name.to_string()))
            }
            _ => "printer.mesh.internal".to_owned(),
        };
        let (actor, owner) = match a % 4 {
            0 => (Actor::LocalRoot, Owner::Detached { operator: None }),
            _ => {
                let node = self.node(a)?;
                (self.node_actor(&node, c)?, Owner::Service { node: node.id, name: name.clone() })
            }
        };
        // World knows a serial again only while it remembers the certificate; beyond that, 128 random bits
        // have to do.
        let known: Vec<Serial> = self.mesh.world.certificates().map(|known| known.serial).collect();
        let serial = if c == 0 { Self::pick(&known, a)? } else { Serial(self.mesh.bytes()) };
        let mut certificate = self.mesh.certificate(owner, "server", serial);
        certificate.key_hash = self.key(c);
        (certificate.names, certificate.pair_name) = (vec![name.as_str().try_into().unwrap()], name);
        Some((actor, Command::IssueCertificate { certificate, restart: b.is_multiple_of(5), made: None }))
    }

    fn revocation(&mut self, a: u8, b: u8, reason: Reason) -> Command {
        let which = match a % 3 {
            0 => Which::Serial(Self::pick(&self.serials, b).unwrap_or(Serial([0; 16]))),
            1 => Which::KeyHash(self.key(b % 40)),
            _ => Which::Name(format!("{}.mesh.internal", NAMES[usize::from(b) % NAMES.len()])),
        };
        Command::RevokeCertificates { which, reason }
    }

    fn add_operator(&mut self, a: u8, b: u8) -> Command {
        let token = TokenId(self.mesh.bytes());
        let (name, role) = (OPERATORS[usize::from(a) % 3].try_into().unwrap(), Role::ALL[usize::from(b) % 4]);
        Command::AddOperator { name, role, token, secret_hash: [1; 32], expires_at: self.mesh.now + HOUR }
    }

    fn login(&mut self, a: u8, b: u8) -> Option<(Actor, Command)> {
        let name = OperatorName::try_from(OPERATORS[usize::from(a) % 3]).unwrap();
        let token = self.mesh.world.operator(&name)?.login;
        let serial = Serial(self.mesh.bytes());
        let mut certificate = self.mesh.certificate(Owner::Operator(name), "operator", serial);
        certificate.key_hash = self.key(b);
        Some((Actor::Token { id: token }, Command::LoginOperator { token, certificate }))
    }

    fn responder(&mut self) -> Command {
        let serial = Serial(self.mesh.bytes());
        let owner = Owner::Controller { name: "ctl-1".to_owned() };
        Command::RecordResponder { certificate: self.mesh.certificate(owner, "ocsp", serial) }
    }

    /// A rotation's steps, more often in an order that leads somewhere.
    fn authorities(&mut self, kind: u8, a: u8, b: u8, c: u8) -> Option<(Actor, Command)> {
        let root = Actor::LocalRoot;
        let world = &self.mesh.world;
        let version = world
            .rotation()
            .map_or(0, |rotation| rotation.version)
            .saturating_sub(u64::from(c == 0 && a > 200));
        let old = world.active_root()?.key_id.clone();
        Some(match kind {
            26 if a > 60 => {
                let byte = u8::try_from(world.authorities().len() % 100).ok()? * 2 + 20;
                (root, start_rotation(world, byte, b.is_multiple_of(2), c.is_multiple_of(2)))
            }
            26 => (root, Command::AbortRotation { version }),
            27 => {
                let missing = world.trusted_authorities().find(|ca| world.crl(&ca.key_id, 0).is_none());
                let issuer_key_id = missing.map_or(old, |ca| ca.key_id.clone());
                (Actor::Controller, self.crl_of(issuer_key_id, a))
            }
            28 => {
                let nodes = world.nodes().map(|node| node.id).filter(|id| b > 80 || id.0 % 2 == 0);
                (Actor::Controller, Command::AcknowledgeBundle { version, nodes: nodes.collect() })
            }
            29 => {
                let serial = Serial(self.mesh.bytes());
                let owner = Owner::Controller { name: "ctl-1".to_owned() };
                let certificate = self.mesh.certificate(owner, "controller", serial);
                (Actor::Controller, Command::RecordControllerCertificate { certificate })
            }
            30 => {
                let auto = world.rotation().is_some_and(|rotation| rotation.auto);
                (if auto { Actor::Controller } else { root }, Command::AdvanceRotation { version })
            }
            _ if a < 120 => (root, Command::ExportRoot { key_id: old }),
            _ => (root, Command::SealRoot { key_id: old }),
        })
    }

    fn crl(&self, a: u8) -> Command {
        self.crl_of(issuer(), a)
    }

    fn crl_of(&self, issuer: KeyId, a: u8) -> Command {
        let lasts = if a > 128 { 365 * DAY } else { 7 * DAY };
        let shards = self.mesh.world.crl_shards(&issuer);
        let shard = shards[usize::from(a) % shards.len()];
        Command::RecordCrl {
            issuer_key_id: issuer.clone(),
            shard,
            number: self.mesh.world.last_crl_number(&issuer, shard) + u64::from(!a.is_multiple_of(8)),
            covers_seq: self.mesh.world.head_seq(),
            digest: [a; 32],
            this_update: self.mesh.world.record_time(self.mesh.now),
            next_update: self.mesh.now + lasts,
        }
    }

    /// Gives the command of a step, checks what became of it, and lets a node follow.
    fn step(&mut self, step: Step) -> Result<(), TestCaseError> {
        self.let_time_pass(step);
        let request = match (&self.last, step.actor) {
            (Some(last), 0..16) => last.clone(),
            (Some(last), 16..24) => Request { actor: self.stranger(step.a), ..last.clone() },
            _ => {
                let Some((actor, command)) = self.command(step) else { return Ok(()) };
                let actor = if step.actor > 215 { self.stranger(step.b) } else { actor };
                Request { actor, operation: OperationId(self.mesh.bytes()), command }
            }
        };
        let before = self.mesh.world.clone();
        let at = self.mesh.now.max(before.last_time());
        match self.mesh.run(&request) {
            Ok(Decision::Changes(changes)) => {
                prop_assert!(may(&before, at, &request), "not authorized: {request:?}");
                self.note(&changes);
                check_changes(&before, at, &changes)?;
            }
            Ok(Decision::AlreadyDone) => prop_assert_eq!(&self.mesh.world, &before),
            Err(Refusal::CertificateMismatch { what }) => prop_assert!(!what.is_empty()),
            Err(_) => prop_assert_eq!(&self.mesh.world, &before),
        }
        self.last = Some(request);
        check_world(&self.mesh.world)?;
        self.follow(step.c)
    }

    fn let_time_pass(&mut self, step: Step) {
        match step.b {
            0..200 => self.mesh.wait(Duration::from_secs(u64::from(step.c))),
            200..240 => self.mesh.wait(HOUR * u32::from(step.c % 30)),
            240..250 => self.mesh.wait(DAY * u32::from(step.c % 40)),
            _ => self.mesh.now = self.mesh.now - HOUR,
        }
    }

    fn note(&mut self, changes: &[Change]) {
        for change in changes {
            match change {
                Change::TokenCreated { token } => self.tokens.push(token.id),
                Change::NodeRequested { id, .. } => self.nodes.push(*id),
                Change::NodeEnrolled { id, certificate, .. } => {
                    self.nodes.push(*id);
                    self.serials.push(certificate.serial);
                }
                Change::IdentityRenewed { certificate, .. } | Change::CertificateIssued { certificate } => {
                    self.serials.push(certificate.serial);
                }
                _ => {}
            }
        }
    }

    /// One node takes what is new, by delta when there is one; then it has what a fresh full view has.
    fn follow(&mut self, number: u8) -> Result<(), TestCaseError> {
        let Some(id) = Self::pick(&self.nodes, number) else { return Ok(()) };
        let (world, head) = (&self.mesh.world, self.mesh.world.head_seq());
        let Some(fresh) = world.view_for(id) else {
            prop_assert_eq!(world.delta_for(id, head), None);
            self.held.remove(&id);
            return Ok(());
        };
        let held = self.held.remove(&id).and_then(|(seq, mut view)| {
            view.patch(world.delta_for(id, seq)?);
            Some(view)
        });
        if let Some(view) = held {
            prop_assert_eq!(&view, &fresh, "the delta and the full view of node {} differ", id);
        }
        self.held.insert(id, (head, fresh));
        Ok(())
    }
}

/// Who may do what, said a second time and another way.
fn may(world: &World, at: UtcTime, request: &Request) -> bool {
    let Request { actor, command, .. } = request;
    let action = command.kind().action();
    let live =
        |serial: &Serial| world.certificate(serial).is_some_and(|c| c.revoked.is_none() && at < c.not_after);
    match actor {
        Actor::Controller => {
            let told =
                world.rotation().is_some_and(|rotation| rotation.auto) && action == "ca.rotate-advance";
            let own = [
                "controller.certify",
                "ocsp.certify",
                "crl.issue",
                "crl.open",
                "denials.record",
                "clock.hold",
                "ca.acknowledge",
            ];
            told || own.contains(&action)
        }
        Actor::LocalRoot => ![
            "controller.certify",
            "ocsp.certify",
            "crl.issue",
            "crl.open",
            "denials.record",
            "clock.hold",
            "ca.acknowledge",
            "node.request",
            "node.enroll",
            "operator.login",
            "node.renew",
            "node.resume",
            "node.leave",
        ]
        .contains(&action),
        Actor::Operator { name, serial } => {
            let known =
                world.operator(name).filter(|operator| operator.serial == Some(*serial) && live(serial));
            let enroller = ["token.create", "token.revoke", "node.approve"];
            let operator = [
                "node.tag",
                "node.revoke",
                "node.remove",
                "node.rotate-keys",
                "cert.issue",
                "cert.revoke",
                "policy.apply",
            ];
            let admin = [
                "operator.add",
                "operator.remove",
                "clock.confirm",
                "ca.rotate-start",
                "ca.rotate-advance",
                "ca.rotate-abort",
                "ca.export-root",
                "ca.seal",
            ];
            known.is_some_and(|known| match known.role {
                Role::Admin => {
                    enroller.contains(&action) || operator.contains(&action) || admin.contains(&action)
                }
                Role::Operator => enroller.contains(&action) || operator.contains(&action),
                Role::Enroller => enroller.contains(&action),
                Role::Auditor => false,
            })
        }
        Actor::Node { id, serial } => {
            let node = world.node(*id).filter(|node| node.state == NodeState::Active);
            let known = node.is_some_and(|node| {
                node.current.as_ref().is_some_and(|c| c.serial == *serial) || node.previous == Some(*serial)
            });
            let unrevoked = world.certificate(serial).is_some_and(|c| c.revoked.is_none());
            known
                && unrevoked
                && match command {
                    Command::RenewIdentity { node, resume, .. } => node == id && (*resume || live(serial)),
                    Command::LeaveNode { node } => node == id && live(serial),
                    Command::IssueCertificate { certificate, .. } => {
                        live(serial)
                            && matches!(&certificate.owner, Owner::Service { node, .. } if node == id)
                    }
                    Command::RevokeCertificates { .. } => live(serial),
                    _ => false,
                }
        }
        Actor::Token { id } => {
            let open = world.token(id).is_some_and(|token| token.revoked_at.is_none());
            open && match command {
                Command::Enroll { token, .. }
                | Command::RequestEnrollment { token, .. }
                | Command::LoginOperator { token, .. } => token == id,
                _ => false,
            }
        }
    }
}

/// What no accepted command may do, seen from the world before it.
fn check_changes(before: &World, at: UtcTime, changes: &[Change]) -> Result<(), TestCaseError> {
    for change in changes {
        match change {
            Change::NodeRequested { id, key_hash, wireguard, .. } => {
                prop_assert!(before.node_id_free(*id));
                prop_assert!(!before.key_blocked(key_hash) && !before.wireguard_key_blocked(wireguard));
            }
            Change::NodeEnrolled { id, wireguard, certificate, ipv4, .. } => {
                let pending = before.node(*id);
                let approved = NodeState::Pending { approved: true };
                let fits = pending.map_or(before.node_id_free(*id), |node| node.state == approved);
                prop_assert!(fits);
                prop_assert!(before.ipv4_free(*ipv4));
                prop_assert!(!before.wireguard_key_blocked(wireguard));
                check_new_certificate(before, certificate)?;
            }
            Change::IdentityRenewed { wireguard, certificate, .. } => {
                prop_assert!(wireguard.iter().all(|key| !before.wireguard_key_blocked(key)));
                check_new_certificate(before, certificate)?;
            }
            Change::CertificateIssued { certificate } => check_new_certificate(before, certificate)?,
            Change::TokenUsed { id, used } => {
                let token = before.token(id).unwrap();
                prop_assert!(*used <= token.uses && *used == token.used + 1);
                prop_assert!(at < token.expires_at && token.revoked_at.is_none());
            }
            Change::CertificateRevoked { serial, .. } => {
                prop_assert!(before.certificate(serial).unwrap().revoked.is_none());
            }
            _ => {}
        }
    }
    Ok(())
}

fn check_new_certificate(before: &World, certificate: &CertificateRecord) -> Result<(), TestCaseError> {
    prop_assert!(before.certificate(&certificate.serial).is_none());
    prop_assert!(!before.key_blocked(&certificate.key_hash));
    prop_assert!(!before.clock_held());
    Ok(())
}

/// What must hold of every world.
fn check_world(world: &World) -> Result<(), TestCaseError> {
    let (mut names, mut addresses, mut keys) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    let domain = world.domain().unwrap();
    for node in world.nodes() {
        prop_assert!(names.insert(&node.name), "two nodes named {}", node.name);
        prop_assert!(
            node.ipv4.is_none_or(|address| addresses.insert(address)),
            "two nodes at {:?}",
            node.ipv4
        );
        prop_assert!(node.vouched.iter().all(|key| keys.insert(*key)), "two nodes with one WireGuard key");
        prop_assert!(node.wireguard.iter().all(|key| node.vouched.contains(key)));
        prop_assert_eq!(node.ipv4.is_some(), node.current.is_some());
        prop_assert_eq!(
            world.policy().granted_under(node.name.as_str(), domain),
            None,
            "a node has a granted name"
        );
        if let NodeState::Revoked { .. } = node.state {
            prop_assert!(node.vouched.iter().all(|key| world.wireguard_key_blocked(key)));
            prop_assert!(world.certificates_of(node.id).all(|certificate| certificate.revoked.is_some()));
        }
    }
    for certificate in world.certificates() {
        check_certificate(world, certificate)?;
    }
    let gap = world.check_trust(world.last_time());
    prop_assert_eq!(gap, Ok(()), "a certificate in use would not verify");
    for token in world.tokens() {
        prop_assert!(token.used <= token.uses);
        prop_assert!(token.purpose == Purpose::Enrollment || token.uses == 1);
    }
    Ok(())
}

fn check_certificate(
    world: &World,
    certificate: &mesh_core::world::CertificateState,
) -> Result<(), TestCaseError> {
    if certificate.revoked.is_some() {
        prop_assert!(world.authenticate(certificate.serial, world.last_time()).is_err());
        return Ok(());
    }
    prop_assert!(!world.key_blocked(&certificate.key_hash), "a live certificate has a revoked key");
    let owner = certificate.owner.node();
    let removed = owner.is_some_and(|id| world.node(id).is_none());
    prop_assert!(!removed, "a live certificate of a removed node");
    for name in certificate.names.iter().filter(|_| certificate.is_live(world.last_time())) {
        let label = name.label_under(world.domain().unwrap()).unwrap();
        let node = world.node_by_name(&label.try_into().unwrap());
        prop_assert!(
            node.is_none_or(|node| Some(node.id) == owner),
            "{} names somebody else's {name}",
            certificate.serial
        );
    }
    Ok(())
}

/// What must hold of every journal.
fn check_journal(records: &[Record]) -> Result<(), TestCaseError> {
    let (mut serials, mut gone, mut revoked) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    let (mut spent, mut tokens) = (BTreeMap::<TokenId, u32>::new(), BTreeMap::new());
    for (record, next) in records.iter().zip(&records[1..]) {
        prop_assert!(record.at <= next.at);
    }
    for change in records.iter().flat_map(|record| &record.changes) {
        match change {
            Change::ControllerCertified { certificate: c } | Change::CertificateIssued { certificate: c } => {
                prop_assert!(serials.insert(c.serial));
            }
            Change::IdentityRenewed { id, certificate, .. }
            | Change::NodeEnrolled { id, certificate, .. } => {
                prop_assert!(serials.insert(certificate.serial));
                prop_assert!(!gone.contains(id), "an ended node goes on");
            }
            Change::NodeRequested { id, .. } => prop_assert!(!gone.contains(id)),
            Change::NodeRevoked { id, .. } | Change::NodeRemoved { id, .. } => drop(gone.insert(*id)),
            Change::CertificateRevoked { serial, .. } => {
                prop_assert!(revoked.insert(*serial), "revoked twice")
            }
            Change::TokenCreated { token } => drop(tokens.insert(token.id, token.uses)),
            Change::TokenUsed { id, .. } => *spent.entry(*id).or_default() += 1,
            _ => {}
        }
    }
    prop_assert!(spent.iter().all(|(id, spent)| spent <= &tokens[id]), "a token was spent too often");
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Whoever commands what in whichever order: only the authorized change anything, what is unique stays
    /// unique, what is revoked stays revoked, no token is spent twice, deltas add up to full views, and
    /// replaying the journal or reading a snapshot gives the same world.
    #[test]
    fn no_interleaving_breaks_the_mesh(steps in vec(any_step(), 1..160)) {
        let mut machine = Machine::new();
        for step in steps {
            machine.step(step)?;
        }
        let Fixture { world, journal, .. } = &machine.mesh;
        check_journal(journal)?;
        let mut replayed = World::new();
        for (index, record) in journal.iter().enumerate() {
            replayed.apply(index as u64 + 1, record);
            let line = record.detail();
            prop_assert!(!line.is_empty() && !line.chars().any(char::is_control));
        }
        prop_assert_eq!(&replayed, world);
        let mut bytes = Vec::new();
        ciborium::into_writer(world, &mut bytes).unwrap();
        prop_assert_eq!(&ciborium::from_reader::<World, _>(bytes.as_slice()).unwrap(), world);
    }
}

fn open_shards(a: u8, b: u8) -> Command {
    let base_url = format!("http://pki{}.mesh.internal", b % 2);
    Command::OpenCrlShards { issuer_key_id: issuer(), count: u16::from(a / 16 % 3), base_url }
}

/// The random commands are worth something only if many are accepted.
#[test]
fn random_commands_reach_every_kind_of_change() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;
    let mut runner = TestRunner::deterministic();
    const RUNS: usize = 200;
    let (mut actions, mut accepted) = (BTreeSet::new(), 0);
    for _ in 0..RUNS {
        let steps = vec(any_step(), 160).new_tree(&mut runner).unwrap().current();
        let mut machine = Machine::new();
        steps.into_iter().for_each(|step| machine.step(step).unwrap());
        accepted += machine.mesh.journal.len();
        actions.extend(machine.mesh.journal.into_iter().map(|record| record.action));
    }
    assert!(accepted >= 30 * RUNS, "{accepted} records in {RUNS} journals");
    let missing: Vec<&str> = mesh_core::CommandKind::ALL
        .iter()
        .map(|kind| kind.action())
        .filter(|action| !actions.contains(*action) && *action != "denials.record")
        .collect();
    assert_eq!(missing, [""; 0]);
}
