use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use mesh_tests::{CONTROLLER, Fleet, binary, run};

/// One thing that is measured.
pub(crate) struct Figure {
    pub(crate) name: &'static str,
    pub(crate) title: &'static str,
    /// Returns the lines to print.
    pub(crate) measure: fn() -> Vec<String>,
}

pub(crate) const ALL: &[Figure] = &[
    Figure { name: "demo", title: "meshctl demo, all steps (to reach: 10 s)", measure: demo },
    Figure {
        name: "enroll",
        title: "enroll command to first answered ping (to reach: 2 s)",
        measure: enroll_to_ping,
    },
    Figure {
        name: "revoke",
        title: "node revoke to last accepted packet on connected peers, 20 nodes (to reach: p99 1 s)",
        measure: revoke_to_last_packet,
    },
    Figure {
        name: "memory",
        title: "resident memory after 60 s idle, 20 nodes (to reach: node 25 MiB, controller 40 MiB)",
        measure: memory,
    },
    Figure {
        name: "issuance",
        title: "durable issuance over gRPC with mutual TLS, beside cfssl (controller on one core)",
        measure: crate::issuance::issuance,
    },
];

const DEMO_ROUNDS: usize = 3;
const ENROLL_ROUNDS: usize = 20;
const REVOCATIONS: usize = 100;
const NODES: usize = 20;
/// How often the revoked node sends to each peer: the resolution of the figure.
const SEND_INTERVAL: Duration = Duration::from_millis(2);
/// After this long without a packet a peer counts as having cut the sender off.
const SILENCE: Duration = Duration::from_secs(2);
const PROBE_PORT: u16 = 7777;

fn percentile(sorted: &[f64], percent: usize) -> f64 {
    sorted[(sorted.len() * percent).div_ceil(100).clamp(1, sorted.len()) - 1]
}

fn distribution(mut seconds: Vec<f64>) -> String {
    seconds.sort_by(f64::total_cmp);
    format!(
        "p50 {:.3}s  p99 {:.3}s  worst {:.3}s  ({} rounds)",
        percentile(&seconds, 50),
        percentile(&seconds, 99),
        percentile(&seconds, 100),
        seconds.len()
    )
}

/// Baseline: how long one `meshctl` call to the same controller takes.
fn baseline(fleet: &Fleet) -> f64 {
    let calls = (0..10).map(|_| {
        let start = Instant::now();
        fleet.controller(&["ca", "show"]).ok();
        start.elapsed().as_secs_f64()
    });
    let mut calls: Vec<f64> = calls.collect();
    calls.sort_by(f64::total_cmp);
    percentile(&calls, 50)
}

fn demo() -> Vec<String> {
    let rounds = (0..DEMO_ROUNDS).map(|_| {
        let mut command = std::process::Command::new(binary("meshctl"));
        command.arg("demo");
        let start = Instant::now();
        run(command).ok();
        start.elapsed().as_secs_f64()
    });
    vec![distribution(rounds.collect())]
}

fn enroll_to_ping() -> Vec<String> {
    let mut fleet = Fleet::with_nodes(&["alpha"]);
    let (alpha, _) = fleet.addresses("alpha");
    let rounds = (0..ENROLL_ROUNDS).map(|round| {
        let name = format!("n{round}");
        fleet.add_host(&name);
        fleet.start_node(&name);
        let token = fleet.token(&[]);
        let start = Instant::now();
        fleet.meshctl(&name, &["enroll", &token, "--name", &name]).ok();
        fleet.until("the first answer", |fleet| {
            fleet.on(&name, "ping", &["-n", "-c1", "-W0.05", &alpha.to_string()]).code == 0
        });
        start.elapsed().as_secs_f64()
    });
    let rounds: Vec<f64> = rounds.collect();
    let base = baseline(&fleet);
    let mut sorted = rounds.clone();
    sorted.sort_by(f64::total_cmp);
    vec![
        distribution(rounds),
        format!("baseline: one meshctl call {base:.3}s; p50 is {:.1} x that", percentile(&sorted, 50) / base),
    ]
}

/// What one peer last heard from the node that is being revoked.
struct Listener {
    socket: UdpSocket,
    last: Mutex<Option<Instant>>,
}

fn revoke_to_last_packet() -> Vec<String> {
    let peers: Vec<String> = (0..NODES - 1).map(|index| format!("peer-{index}")).collect();
    let mut fleet = Fleet::with_nodes(&peers.iter().map(String::as_str).collect::<Vec<_>>());
    let addresses: Vec<IpAddr> = peers.iter().map(|name| fleet.addresses_known(name).0).collect();
    let listeners: Vec<Listener> = peers
        .iter()
        .map(|name| {
            let bind = || UdpSocket::bind(("0.0.0.0", PROBE_PORT));
            let socket = fleet.host(name).run(bind).expect("the peer's namespace").expect("a probe socket");
            socket.set_read_timeout(Some(Duration::from_millis(100))).expect("a read timeout");
            Listener { socket, last: Mutex::new(None) }
        })
        .collect();
    let mut delays = Vec::new();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for listener in &listeners {
            scope.spawn(|| {
                let mut buffer = [0; 64];
                while !over.load(Ordering::Relaxed) {
                    if listener.socket.recv(&mut buffer).is_ok() {
                        *listener.last.lock().expect("no panic under this lock") = Some(Instant::now());
                    }
                }
            });
        }
        for round in 0..REVOCATIONS {
            let victim = format!("victim-{round}");
            fleet.add_host(&victim);
            fleet.start_node(&victim);
            fleet.enroll(&victim, &[]);
            delays.extend(revoke_one(&mut fleet, &victim, &addresses, &listeners));
            fleet.processes.kill(&victim).expect("the victim ends");
            fleet.controller(&["node", "rm", &victim, "--yes"]).ok();
        }
        over.store(true, Ordering::Relaxed);
    });
    let base = baseline(&fleet);
    vec![
        distribution(delays),
        format!("{REVOCATIONS} revocations x {} peers; baseline: one meshctl call {base:.3}s", NODES - 1),
    ]
}

/// Seconds from the start of the revoke command to the last packet, a value per peer.
fn revoke_one(fleet: &mut Fleet, victim: &str, addresses: &[IpAddr], listeners: &[Listener]) -> Vec<f64> {
    for listener in listeners {
        *listener.last.lock().expect("no panic under this lock") = None;
    }
    let bind = || UdpSocket::bind(("0.0.0.0", 0));
    let sender = fleet.host(victim).run(bind).expect("the victim's namespace").expect("a sending socket");
    let stop = AtomicBool::new(false);
    let heard = |listener: &Listener| *listener.last.lock().expect("no panic under this lock");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for address in addresses {
                    // Refused once the tunnel is gone: that is the point.
                    let _ = sender.send_to(b"still here", SocketAddr::new(*address, PROBE_PORT));
                }
                std::thread::sleep(SEND_INTERVAL);
            }
        });
        fleet.until("every peer hears the node", |_| {
            listeners.iter().all(|listener| heard(listener).is_some())
        });
        let start = Instant::now();
        fleet.controller(&["node", "revoke", victim]).ok();
        fleet.until("every peer has cut the node off", |_| {
            listeners.iter().all(|listener| heard(listener).is_some_and(|last| last.elapsed() > SILENCE))
        });
        stop.store(true, Ordering::Relaxed);
        let last = listeners.iter().filter_map(heard);
        last.map(|last| last.saturating_duration_since(start).as_secs_f64()).collect()
    })
}

fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("a running process");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("the kernel tells VmRSS");
    line.split_whitespace().nth(1).and_then(|word| word.parse().ok()).expect("a number of KiB")
}

fn memory() -> Vec<String> {
    let names: Vec<String> = (0..NODES).map(|index| format!("n{index}")).collect();
    let fleet = Fleet::with_nodes(&names.iter().map(String::as_str).collect::<Vec<_>>());
    // The figure's definition: 60 s idle.
    std::thread::sleep(Duration::from_secs(60));
    let of = |name: &str| resident_kib(fleet.processes.id(name).expect("it runs"));
    let mut nodes: Vec<u64> = names.iter().map(|name| of(name)).collect();
    nodes.sort_unstable();
    let mib = |kib: u64| kib as f64 / 1024.0;
    vec![
        format!(
            "node       {:.1} MiB (largest of {NODES}), {:.1} MiB (median)",
            mib(nodes[NODES - 1]),
            mib(nodes[NODES / 2])
        ),
        format!("controller {:.1} MiB", mib(of(CONTROLLER))),
        format!("baseline: this program {:.1} MiB", mib(resident_kib(std::process::id()))),
    ]
}
