//! `kill -9` of the controller under load: what it acknowledged is there, the rest wholly or not at all.

use std::{
    collections::BTreeSet,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use mesh_tests::{CONTROLLER, Fleet, fleet_test};

const ROUNDS: u32 = 50;
const WRITERS: usize = 3;

#[test]
fn kill_nine_loses_nothing_that_was_acknowledged() {
    fleet_test("crash::kill_nine_loses_nothing_that_was_acknowledged", || {
        let mut fleet = Fleet::new();
        let acknowledged = Mutex::new(BTreeSet::new());
        let mut moment = 0x9e37_79b9_u32;
        for round in 0..ROUNDS {
            // Not synchronisation: the moment of the crash, different in each round, the same in each run.
            moment = moment.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let crash_after = Duration::from_millis(u64::from(moment >> 16) % 300);
            let over = AtomicBool::new(false);
            std::thread::scope(|scope| {
                let (fleet, over, acknowledged) = (&fleet, &over, &acknowledged);
                for writer in 0..WRITERS {
                    scope.spawn(move || {
                        for count in 0..100 {
                            if over.load(Ordering::Relaxed) {
                                break;
                            }
                            let name = format!("r{round}-w{writer}-{count}");
                            let created =
                                fleet.controller(&["token", "create", "--name", &name, "--timeout", "5s"]);
                            if created.code == 0 {
                                acknowledged.lock().unwrap().insert(name);
                            }
                        }
                    });
                }
                std::thread::sleep(crash_after);
                kill_by_pid(fleet.processes.id(CONTROLLER).expect("the controller runs"));
                over.store(true, Ordering::Relaxed);
            });
            fleet.processes.kill(CONTROLLER).unwrap();
            fleet.start_controller();
        }

        let listed = fleet.controller(&["token", "ls", "-o", "json"]).ok().json();
        let present: BTreeSet<String> = listed["items"]
            .as_array()
            .unwrap()
            .iter()
            .map(|token| token["name"].as_str().unwrap().to_owned())
            .collect();
        let acknowledged = acknowledged.into_inner().unwrap();
        assert!(acknowledged.len() >= ROUNDS as usize, "load too light: {}", acknowledged.len());
        let lost: Vec<_> = acknowledged.difference(&present).collect();
        assert!(lost.is_empty(), "acknowledged and lost: {lost:?}");

        // Wholly or not at all: the log is one unbroken chain and tells of each token exactly once.
        fleet.controller(&["audit", "verify"]).ok();
        let log = fleet.controller(&["audit", "log", "-n", "0", "-o", "json"]).ok().json();
        let created =
            log["items"].as_array().unwrap().iter().filter(|entry| entry["action"] == "token.create").count();
        assert_eq!(created, present.len());
    });
}

fn kill_by_pid(pid: u32) {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).expect("a process id"));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).expect("our own child");
}
