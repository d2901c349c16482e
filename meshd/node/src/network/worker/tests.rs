//! What a host does to a node behind its back, and what a disk that fails does to its receipts.

use mesh_runtime::ManualClock;

use super::*;
use crate::identity::Identities;
use crate::network::Update;
use crate::testing::{TestMesh, full, in_own_network, record, run};

const INTERFACE: &str = "mesh0";

/// A worker on a real interface, with one peer in its map.
struct Fixture {
    folder: tempfile::TempDir,
    mesh: TestMesh,
    time: Arc<ManualClock>,
    handle: NetworkHandle,
    worker: Worker,
    active: Arc<crate::identity::Active>,
}

impl Fixture {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mesh = TestMesh::new(time::UtcDateTime::now());
        let identity = mesh.node(1, "alpha");
        let state = StateDir::open(&folder.path().join("state")).unwrap();
        state.save_identity(&identity).unwrap();
        let time = Arc::new(ManualClock::new(mesh.now));
        let clock = ControllerClock::new(time.clone(), 0);
        let findings = Findings::default();
        let identities = Identities::load(&state, &clock, &findings).unwrap().unwrap();
        let setup = Setup {
            host: Host::open().unwrap(),
            changes: Changes::listen(crate::firewall::TABLE_NAME),
            state,
            clock,
            findings,
            interface: INTERFACE.into(),
            mtu: 1280,
            wg_port: 0,
            backend: Backend::Auto,
            active: identities.active(),
        };
        let (handle, mut worker) = Worker::start(setup).await.unwrap();
        worker.take_crls(&mesh.crls(1, &[])).await;
        let peers = vec![record(&mesh.node(2, "bravo"))];
        worker.apply(Update::Full(full(1, peers), identities.active())).await.unwrap();
        assert_eq!(worker.current.len(), 1, "{:?}", worker.findings.list());
        Self { folder, mesh, time, handle, worker, active: identities.active() }
    }

    fn finding(&self, subject: &str) -> Option<String> {
        let found = self.worker.findings.list().into_iter().find(|finding| finding.subject == subject);
        found.map(|finding| finding.what)
    }
}

fn block_on(body: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(body);
}

/// The table without its handles.
fn table() -> String {
    run("nft", &["list", "table", "inet", "meshd"])
}

#[test]
fn a_table_that_was_flushed_or_changed_is_put_back() {
    in_own_network("network::worker::tests::a_table_that_was_flushed_or_changed_is_put_back", || {
        block_on(async {
            let mut fixture = Fixture::new().await;
            let before = table();
            assert!(before.contains("100.64.0.2"), "{before}");
            fixture.worker.tick().await;
            assert_eq!(fixture.finding("this host's firewall"), None);
            let changes: [&[&str]; 4] = [
                &["flush", "ruleset"],
                &["flush", "chain", "inet", "meshd", "overlay"],
                &["add", "element", "inet", "meshd", "inbound4", "{ 100.64.0.77 }"],
                &["insert", "rule", "inet", "meshd", "input", "accept"],
            ];
            for change in changes {
                run("nft", change);
                assert!(fixture.worker.inspect().await.firewall.is_some(), "nft {change:?} is seen");
                fixture.worker.tick().await;
                assert_eq!(table(), before, "after nft {change:?}");
                assert_eq!(fixture.worker.inspect().await.firewall, None);
                let said = fixture.finding("this host's firewall").expect("a finding is raised");
                assert!(said.contains("inet meshd"), "{said}");
            }
            assert_eq!(fixture.worker.current.len(), 1, "the peer stays");
            fixture.time.advance(Duration::from_secs(600));
            fixture.worker.tick().await;
            assert_eq!(fixture.finding("this host's firewall"), None);
        });
    });
}

#[test]
fn addresses_and_routes_come_back() {
    in_own_network("network::worker::tests::addresses_and_routes_come_back", || {
        block_on(async {
            let mut fixture = Fixture::new().await;
            let look = || {
                let address = run("ip", &["address", "show", "dev", INTERFACE, "scope", "global"]);
                let address: Vec<&str> = address.lines().filter(|line| line.contains("inet")).collect();
                let all = [address.join("\n"), run("ip", &["route"]), run("ip", &["-6", "route"])].join("\n");
                let mut lines: Vec<String> = all
                    .lines()
                    .filter(|line| !line.contains("fe80::"))
                    .map(|line| line.trim().to_owned())
                    .collect();
                lines.sort();
                lines
            };
            let before = look();
            for expected in
                ["unreachable 100.64.0.0/10", "unreachable fd5e:1:2::/48", "inet6 fd5e:1:2::1/128"]
            {
                assert!(before.iter().any(|line| line.starts_with(expected)), "{expected}: {before:?}");
            }
            run("ip", &["link", "set", INTERFACE, "down"]);
            run("ip", &["link", "set", INTERFACE, "up"]);
            run("ip", &["route", "del", "unreachable", "100.64.0.0/10"]);
            run("ip", &["-6", "route", "del", "unreachable", "fd5e:1:2::/48"]);
            assert_ne!(look(), before);
            let said = fixture.worker.inspect().await.overlay.join("; ");
            for missing in ["no route for 100.64.0.0/10", "no route for fd5e:1:2::/48", "address fd5e:1:2::1"]
            {
                assert!(said.contains(missing), "{said}");
            }
            assert!(said.contains("no unreachable route for 100.64.0.0/10"), "{said}");
            assert!(said.contains("no unreachable route for fd5e:1:2::/48"), "{said}");
            fixture.worker.tick().await;
            assert_eq!(look(), before);
            assert_eq!(fixture.worker.inspect().await.overlay, Vec::<String>::new());
            run("ip", &["address", "del", "100.64.0.1/32", "dev", INTERFACE]);
            fixture.worker.tick().await;
            assert_eq!(look(), before);
        });
    });
}

#[test]
fn only_what_is_on_disk_is_acknowledged() {
    in_own_network("network::worker::tests::only_what_is_on_disk_is_acknowledged", || {
        block_on(async {
            let mut fixture = Fixture::new().await;
            let receipt = fixture.handle.receipt.clone();
            let numbers = || receipt.borrow().crls.iter().map(|crl| crl.number).collect::<Vec<_>>();
            assert_eq!((receipt.borrow().seq, numbers()), (1, vec![1, 1]));
            // A folder in the place of a file cannot be replaced by one.
            let state = fixture.folder.path().join("state");
            let blocked = ["map.bin", "crls.bin"].map(|name| state.join(name));
            for path in &blocked {
                std::fs::remove_file(path).unwrap();
                std::fs::create_dir(path).unwrap();
            }
            fixture.worker.take_crls(&fixture.mesh.crls(2, &[])).await;
            fixture.worker.apply(Update::Full(full(2, Vec::new()), fixture.active.clone())).await.unwrap();
            assert_eq!(fixture.worker.current.len(), 0, "it took effect all the same");
            assert_eq!((receipt.borrow().seq, numbers()), (1, vec![1, 1]));
            assert_eq!(fixture.worker.knowledge().cursor, None, "a cursor would be taken for a receipt");
            assert!(fixture.finding("the state folder").is_some());
            fixture.worker.tick().await;
            assert_eq!((receipt.borrow().seq, numbers()), (1, vec![1, 1]));
            for path in &blocked {
                std::fs::remove_dir(path).unwrap();
            }
            fixture.worker.tick().await;
            assert_eq!((receipt.borrow().seq, numbers()), (2, vec![2, 2]));
            assert_eq!(fixture.worker.knowledge().cursor.unwrap().seq, 2);
            assert_eq!(fixture.finding("the state folder"), None);
        });
    });
}

#[test]
fn a_peer_that_asks_by_the_relay_is_a_finding_or_a_reason_to_change_the_engine() {
    let name = "a_peer_that_asks_by_the_relay_is_a_finding_or_a_reason_to_change_the_engine";
    in_own_network(&format!("network::worker::tests::{name}"), || {
        block_on(async {
            let mut fixture = Fixture::new().await;
            let patience = Duration::from_secs(10);
            let knocks = |fixture: &mut Fixture| {
                fixture.worker.take_knock(2);
                fixture.time.advance(patience);
                fixture.worker.take_knock(2);
            };
            knocks(&mut fixture);
            assert_eq!((fixture.finding("this host's WireGuard"), fixture.worker.reopen), (None, false));
            fixture.worker.bare = true;
            fixture.worker.choice.backend = Backend::Kernel;
            fixture.worker.take_knock(99);
            knocks(&mut fixture);
            let said = fixture.finding("this host's WireGuard").expect("a finding is raised");
            assert!(said.contains("bravo") && said.contains("relay"), "{said}");
            assert!(!fixture.worker.reopen, "whoever insists on an engine keeps it");
            assert_eq!(fixture.worker.status().lacks.len(), crate::network::KERNEL_LACKS.len());
            fixture.worker.publish_unreached();
            assert_eq!(*fixture.handle.unreached.borrow(), [2]);

            fixture.worker.choice.backend = Backend::Auto;
            fixture.worker.take_knock(2);
            assert!(fixture.worker.reopen);
            let choice = Choice::of(Backend::Auto, &fixture.worker.state, fixture.worker.clock.now());
            assert_eq!(choice.backend, Backend::Userspace);
            assert!(choice.why_not_kernel.is_some_and(|why| why.contains("bravo")));
        });
    });
}
