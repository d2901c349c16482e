//! Durable issuance over gRPC with mutual TLS, beside cfssl in the same run.
//!
//! Every server is held to core 0, the callers to core 1: rates are per core of the server. Rounds are
//! interleaved, so that what else the machine does falls on all alike.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use mesh_ca::{Csr, LeafKey};
use mesh_proto::v1 as pb;
use mesh_tests::{
    CONTROLLER, Fleet,
    credential::{Credential, DOMAIN, client_config},
    join, rpc,
};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use pb::{
    certificates_client::CertificatesClient, enroll_response::Outcome, enrollment_client::EnrollmentClient,
};
use rustls_pki_types::CertificateDer;
use tonic::transport::Channel;

use crate::cfssl::Cfssl;

const ROUNDS: usize = 5;
/// Callers at once, a connection each.
pub(crate) const CALLERS: usize = 64;
/// Issued by each caller in a round; a node may hold 512 live certificates.
const EACH: usize = 300;
const CFSSL_ROUND: Duration = Duration::from_secs(3);
/// Calls of each kind from which the floor is made.
const FLOOR_CALLS: usize = 2_000;
const SERVER_CORE: usize = 0;
const LOAD_CORE: usize = 1;
pub(crate) const LOAD_HOST: &str = "load";

/// What a server did in one round.
#[derive(Clone, Copy)]
pub(crate) struct Load {
    pub(crate) per_second: f64,
    /// Of the server, all threads, per certificate.
    pub(crate) cpu_us: f64,
    pub(crate) p50_ms: f64,
    pub(crate) p99_ms: f64,
}

impl Load {
    pub(crate) fn of(mut latencies: Vec<Duration>, wall: Duration, cpu: Duration) -> Self {
        latencies.sort_unstable();
        let at = |percent: usize| {
            latencies[(latencies.len() * percent / 100).min(latencies.len() - 1)].as_secs_f64() * 1e3
        };
        let count = latencies.len() as f64;
        Self {
            per_second: count / wall.as_secs_f64(),
            cpu_us: cpu.as_secs_f64() * 1e6 / count,
            p50_ms: at(50),
            p99_ms: at(99),
        }
    }
}

impl std::fmt::Display for Load {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { per_second, cpu_us, p50_ms, p99_ms } = self;
        write!(f, "{per_second:6.0}/s  {cpu_us:5.0} us CPU each  p50 {p50_ms:.1} ms  p99 {p99_ms:.1} ms")
    }
}

/// The round in the middle by rate.
fn median(mut rounds: Vec<Load>) -> Load {
    rounds.sort_by(|a, b| a.per_second.total_cmp(&b.per_second));
    rounds[rounds.len() / 2]
}

/// Holds a process, with all threads it has, to one core; threads made later inherit it.
pub(crate) fn pin(pid: u32, core: usize) {
    let mut set = CpuSet::new();
    set.set(core).expect("a core number");
    for task in std::fs::read_dir(format!("/proc/{pid}/task")).expect("a running process") {
        let id = task.expect("a thread").file_name().to_string_lossy().parse().expect("a thread id");
        // A thread that ended meanwhile needs no core.
        let _ = sched_setaffinity(Pid::from_raw(id), &set);
    }
}

pub(crate) fn cpu_time(pid: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("a running process");
    let after_name = stat.rsplit_once(')').expect("the name stands in parentheses").1;
    // Fields 14 and 15 of proc(5), in ticks of 10 ms.
    let ticks: u64 =
        after_name.split_whitespace().skip(11).take(2).map(|t| t.parse::<u64>().expect("ticks")).sum();
    Duration::from_millis(ticks * 10)
}

pub(crate) fn issuance() -> Vec<String> {
    if std::thread::available_parallelism().map_or(1, usize::from) < 2 {
        return vec!["skipped: needs a core for the server and one for the callers".into()];
    }
    let mut fleet = Fleet::new();
    fleet.add_host(LOAD_HOST);
    let controller = fleet.processes.id(CONTROLLER).expect("it runs");
    pin(controller, SERVER_CORE);
    let mut storing = Cfssl::start(&mut fleet, "cfssl-sqlite", 8801, true);
    let mut bare = Cfssl::start(&mut fleet, "cfssl", 8802, false);
    for server in [&storing, &bare] {
        pin(fleet.processes.id(server.name()).expect("it runs"), SERVER_CORE);
    }

    let (mut ours, mut settled, mut theirs, mut theirs_bare) = (vec![], vec![], vec![], vec![]);
    let mut floor = None;
    for round in 0..ROUNDS {
        let nodes = enroll(&fleet, round);
        floor.get_or_insert_with(|| floor_of(&fleet, controller, &nodes[0]));
        let began = Instant::now();
        ours.push(issue_from_all(&fleet, controller, nodes));
        // The index follows in the background; its work falls on nobody else's round, and is counted below.
        let name = format!("api.n{round}-0.{DOMAIN}");
        fleet.meshctl(CONTROLLER, &["cert", "ls", "--name", &name]).ok();
        settled.push((CALLERS * EACH) as f64 / began.elapsed().as_secs_f64());
        theirs.push(storing.load(&fleet, CFSSL_ROUND));
        theirs_bare.push(bare.load(&fleet, CFSSL_ROUND));
    }
    let lone = lone_caller(&fleet, controller);
    let floor = floor.expect("there was a round");
    let (ours, theirs, theirs_bare) = (median(ours), median(theirs), median(theirs_bare));
    settled.sort_by(f64::total_cmp);
    vec![
        format!("meshd                {ours}"),
        format!("  to the last entry of its index, connections included: {:.0}/s", settled[ROUNDS / 2]),
        format!("  one caller alone   {lone}"),
        format!("cfssl, SQLite        {theirs}"),
        format!("cfssl, no store      {theirs_bare}"),
        format!(
            "meshd / cfssl with SQLite   {:.2} x   (to reach: 6, aim 8)",
            ours.per_second / theirs.per_second
        ),
        format!(
            "meshd / cfssl with no store {:.2} x   (to reach: 1.3, aim 1.7)",
            ours.per_second / theirs_bare.per_second
        ),
        format!(
            "floor of this run: CSR {:.0} + sign {:.0} + verify {:.0} + unary call {:.0} us = {:.0}/s; meshd {:.0} % of it   (to reach: 60 %, aim 75 %)",
            floor.csr,
            floor.sign,
            floor.verify,
            floor.call,
            floor.per_second(),
            100.0 * ours.per_second / floor.per_second()
        ),
        format!("median of {ROUNDS} interleaved rounds, {CALLERS} callers with a connection each"),
    ]
}

struct Node {
    name: String,
    credential: Credential,
    csr: bytes::Bytes,
}

pub(crate) fn on_load_core<T: Send, F: Future<Output = T>>(
    fleet: &Fleet,
    work: impl FnOnce() -> F + Send,
) -> T {
    rpc::on_host(fleet, LOAD_HOST, || {
        let mut set = CpuSet::new();
        set.set(LOAD_CORE).expect("a core number");
        // Of this thread alone; the runtime on it has no other.
        sched_setaffinity(Pid::from_raw(0), &set).expect("this machine has two cores");
        work()
    })
}

/// As many machines as call at once, enrolled with one token.
fn enroll(fleet: &Fleet, round: usize) -> Vec<Node> {
    let token = join::open(&fleet.token(&["--uses", &CALLERS.to_string()]));
    let (address, config) = (rpc::controller(fleet), client_config(fleet, None));
    on_load_core(fleet, || async move {
        let channel = rpc::channel(address, config).await.expect("the controller is there");
        let mut client = EnrollmentClient::new(channel);
        let mut nodes = Vec::with_capacity(CALLERS);
        for index in 0..CALLERS {
            let (name, key) = (format!("n{round}-{index}"), LeafKey::generate().expect("a key"));
            let request = join::request(&token, &name, &key);
            let answer = client.enroll(request).await.expect("the token is good").into_inner();
            let Some(Outcome::Enrolled(identity)) = answer.outcome else { panic!("{name} is enrolled") };
            let chain = std::iter::once(identity.leaf).chain(identity.issuers);
            let chain = chain.map(|der| CertificateDer::from(der.to_vec())).collect();
            let service = LeafKey::generate().expect("a key");
            nodes.push(Node {
                name,
                credential: Credential { chain, key: key.to_rustls_der() },
                csr: Csr::create(&service).expect("a CSR").into(),
            });
        }
        nodes
    })
}

fn order(node: &Node) -> pb::IssueRequest {
    pb::IssueRequest {
        csr: node.csr.clone(),
        names: vec![format!("api.{}.{DOMAIN}", node.name)],
        profile: "server".into(),
        operation_id: rpc::operation(),
        ..Default::default()
    }
}

async fn connect(address: SocketAddr, config: rustls::ClientConfig) -> CertificatesClient<Channel> {
    let channel = rpc::channel(address, config).await.expect("the controller is there");
    let mut client = CertificatesClient::new(channel);
    // The first call pays for the connection.
    client.crls(pb::CrlsRequest::default()).await.expect("a node may have the CRLs");
    client
}

fn issue_from_all(fleet: &Fleet, controller: u32, nodes: Vec<Node>) -> Load {
    let address = rpc::controller(fleet);
    let callers: Vec<_> = nodes
        .into_iter()
        .map(|node| (client_config(fleet, Some(&node.credential)), Arc::new(node)))
        .collect();
    on_load_core(fleet, || async move {
        let mut clients = Vec::new();
        for (config, node) in callers {
            clients.push((connect(address, config).await, node));
        }
        let (start, cpu) = (Instant::now(), cpu_time(controller));
        let mut tasks = tokio::task::JoinSet::new();
        for (mut client, node) in clients {
            tasks.spawn(async move {
                let mut latencies = Vec::with_capacity(EACH);
                for _ in 0..EACH {
                    let asked = Instant::now();
                    client.issue(order(&node)).await.expect("a name of its own");
                    latencies.push(asked.elapsed());
                }
                latencies
            });
        }
        let latencies = tasks.join_all().await.concat();
        Load::of(latencies, start.elapsed(), cpu_time(controller) - cpu)
    })
}

fn lone_caller(fleet: &Fleet, controller: u32) -> Load {
    let mut nodes = enroll(fleet, ROUNDS);
    nodes.truncate(1);
    issue_from_all(fleet, controller, nodes)
}

/// Microseconds of one core for what no issuance over gRPC can do without.
struct Floor {
    csr: f64,
    sign: f64,
    verify: f64,
    call: f64,
}

impl Floor {
    fn per_second(&self) -> f64 {
        1e6 / (self.csr + self.sign + self.verify + self.call)
    }
}

fn microseconds_each(mut work: impl FnMut()) -> f64 {
    let start = Instant::now();
    for _ in 0..FLOOR_CALLS {
        work();
    }
    start.elapsed().as_secs_f64() * 1e6 / FLOOR_CALLS as f64
}

fn floor_of(fleet: &Fleet, controller: u32, node: &Node) -> Floor {
    use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData as _};
    let address = rpc::controller(fleet);
    let configs: Vec<_> = (0..CALLERS).map(|_| client_config(fleet, Some(&node.credential))).collect();
    let csr = node.csr.clone();
    on_load_core(fleet, || async move {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).expect("a key");
        let names = CertificateParams::default();
        let issuer = rcgen::Issuer::from_params(&names, &key);
        let leaf = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).expect("a key");
        let params = CertificateParams::new([format!("api.n0-0.{DOMAIN}")]).expect("a name");
        let build = || params.signed_by(&leaf, &issuer).expect("a certificate");
        let der = build();
        let spki = key.subject_public_key_info();
        let verify = || {
            use x509_parser::prelude::FromDer as _;
            let (_, certificate) =
                x509_parser::certificate::X509Certificate::from_der(der.der()).expect("our own");
            let (_, spki) = x509_parser::x509::SubjectPublicKeyInfo::from_der(&spki).expect("our own");
            certificate.verify_signature(Some(&spki)).expect("our own");
        };
        Floor {
            csr: microseconds_each(|| drop(Csr::parse(&csr).and_then(Csr::verify).expect("our own"))),
            sign: microseconds_each(|| drop(build())),
            verify: microseconds_each(verify),
            call: unary_call(address, configs, controller).await,
        }
    })
}

/// The server's cost of a unary call that reads and writes next to nothing, from all connections at once.
async fn unary_call(address: SocketAddr, configs: Vec<rustls::ClientConfig>, controller: u32) -> f64 {
    let mut clients = Vec::new();
    for config in configs {
        clients.push(connect(address, config).await);
    }
    let cpu = cpu_time(controller);
    let mut tasks = tokio::task::JoinSet::new();
    for mut client in clients {
        tasks.spawn(async move {
            for _ in 0..EACH {
                client.crls(pb::CrlsRequest::default()).await.expect("a node may have the CRLs");
            }
        });
    }
    tasks.join_all().await;
    (cpu_time(controller) - cpu).as_secs_f64() * 1e6 / (CALLERS * EACH) as f64
}
