//! The receiver enforces the policy: direction counts, what no rule allows is denied, in both families.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

use mesh_tests::{CONTROLLER, Fleet, fleet_test};

const PORT: u16 = 4000;
/// Longer than any connection that is allowed takes, on two busy cores.
const CONNECT: Duration = Duration::from_secs(2);

fn apply(fleet: &Fleet, policy: &str) {
    let file = fleet.path(CONTROLLER).join("policy.toml");
    std::fs::write(&file, policy).unwrap();
    fleet.controller(&["policy", "apply", file.to_str().unwrap()]).ok();
}

/// Serves "yes" to whoever connects, for as long as the test runs.
fn serve(fleet: &Fleet, host: &str) {
    let listener = fleet.host(host).run(|| TcpListener::bind(("::", PORT))).unwrap().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let _ = (&stream).write_all(b"yes");
        }
    });
}

fn connects(fleet: &Fleet, from: &str, to: IpAddr) -> bool {
    let attempt = || {
        let mut stream = TcpStream::connect_timeout(&SocketAddr::new(to, PORT), CONNECT)?;
        stream.set_read_timeout(Some(CONNECT))?;
        let mut answer = [0; 3];
        stream.read_exact(&mut answer).map(|()| answer)
    };
    fleet.host(from).run(attempt).unwrap().is_ok_and(|answer| &answer == b"yes")
}

#[test]
fn a_rule_opens_one_direction_and_its_absence_closes_all() {
    fleet_test("policy::a_rule_opens_one_direction_and_its_absence_closes_all", || {
        let mut fleet = Fleet::with_nodes(&["alpha", "bravo", "charlie"]);
        let (alpha, alpha6) = fleet.addresses_known("alpha");
        let (bravo, bravo6) = fleet.addresses_known("bravo");
        serve(&fleet, "alpha");
        serve(&fleet, "bravo");
        // The starter lets everybody reach everybody: what is refused below is refused by the rule alone.
        for (from, to) in [("alpha", bravo), ("alpha", bravo6), ("bravo", alpha), ("charlie", bravo6)] {
            fleet.until(&format!("the starter lets {from} reach {to}"), |fleet| connects(fleet, from, to));
        }

        apply(&fleet, "[[allow]]\nfrom = [\"node:alpha\"]\nto = [\"tag:web\"]\n");
        fleet.until("nothing is open without the tag", |fleet| {
            !connects(fleet, "alpha", bravo) && !connects(fleet, "bravo", alpha)
        });
        assert!(!connects(&fleet, "alpha", bravo6) && !fleet.pings("alpha", bravo));

        fleet.controller(&["node", "tag", "bravo", "+web"]).ok();
        for to in [bravo, bravo6] {
            fleet.until(&format!("the tag opens {to} to alpha"), |fleet| connects(fleet, "alpha", to));
        }
        for (from, to) in [("bravo", alpha), ("bravo", alpha6), ("charlie", bravo), ("charlie", bravo6)] {
            assert!(!connects(&fleet, from, to), "{from} must not reach {to}");
        }
        // Echoes are answered between peers that know each other; a stranger gets none.
        assert!(fleet.pings("bravo", alpha));
        assert!(!fleet.pings("charlie", bravo));

        fleet.controller(&["node", "tag", "bravo", "-web"]).ok();
        fleet.until("without the tag it is closed again", |fleet| !connects(fleet, "alpha", bravo));
    });
}
