//! Labs as root and as an ordinary user, with real namespaces and processes.

use std::{
    fs, io,
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::unix::process::ExitStatusExt,
    path::Path,
    process::Command,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use mesh_lab::{
    Host, Lab, LabError, Processes, check_tun,
    testing::{Privilege, drop_privileges, isolate, isolated},
    wait_for, wait_until,
};

const LONG: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(100);

fn two_hosts() -> (Lab, Host, Host) {
    let mut lab = Lab::new().unwrap();
    let a = lab.add_host("a", &Lab::underlay(1)).unwrap();
    let b = lab.add_host("b", &Lab::underlay(2)).unwrap();
    (lab, a, b)
}

fn socket_on(host: &Host, address: IpAddr) -> UdpSocket {
    let socket = host.run(|| UdpSocket::bind((address, 0))).unwrap().unwrap();
    socket.set_read_timeout(Some(SHORT)).unwrap();
    socket
}

/// Whether a datagram of `from` reaches `to`.
fn arrives(from: &UdpSocket, to: &UdpSocket) -> bool {
    // Numbered: one that waited for the neighbour's address comes late, and is not the one that is asked about.
    static SENT: AtomicU64 = AtomicU64::new(0);
    let datagram = SENT.fetch_add(1, Ordering::Relaxed).to_be_bytes();
    let (source, target) = (from.local_addr().unwrap(), to.local_addr().unwrap());
    // A host without a carrier may refuse to send; that is "does not arrive" too.
    if from.send_to(&datagram, target).is_err() {
        return false;
    }
    let mut buffer = [0; 16];
    while let Ok((length, sender)) = to.recv_from(&mut buffer) {
        if buffer[..length] == datagram && sender == source {
            return true;
        }
    }
    false
}

fn hosts_meet() {
    let (_lab, a, b) = two_hosts();
    for (from, to) in [(a.ipv4(), b.ipv4()), (a.ipv6(), b.ipv6())] {
        let (from, to) = (socket_on(&a, from.unwrap()), socket_on(&b, to.unwrap()));
        wait_until("a datagram", LONG, || arrives(&from, &to)).unwrap();
        wait_until("an answer", LONG, || arrives(&to, &from)).unwrap();
    }
}

#[test]
fn hosts_meet_over_both_families() {
    isolated("hosts_meet_over_both_families", Privilege::Current, hosts_meet);
}

#[test]
fn hosts_meet_for_an_ordinary_user() {
    isolated("hosts_meet_for_an_ordinary_user", Privilege::Unprivileged, || {
        assert!(!Path::new("/run/lock").exists(), "/run is not private");
        let outside = fs::read_to_string("/proc/self/uid_map").unwrap();
        let outside: Vec<&str> = outside.split_whitespace().collect();
        assert_ne!(outside[1], "0", "the body runs as the machine's root");
        check_tun().unwrap();
        hosts_meet();
    });
}

#[test]
fn a_cut_link_passes_nothing_until_it_is_restored() {
    isolated("a_cut_link_passes_nothing_until_it_is_restored", Privilege::Unprivileged, || {
        let (_lab, a, b) = two_hosts();
        type Step = fn(&Host) -> Result<(), LabError>;
        let ways: [(Step, Step); 2] = [(Host::link_down, Host::link_up), (Host::partition, Host::rejoin)];
        for (cut, restore) in ways {
            for (from, to) in [(a.ipv4(), b.ipv4()), (a.ipv6(), b.ipv6())] {
                let (from, to) = (socket_on(&a, from.unwrap()), socket_on(&b, to.unwrap()));
                wait_until("a datagram", LONG, || arrives(&from, &to)).unwrap();
                cut(&b).unwrap();
                assert!((0..3).all(|_| !arrives(&from, &to)), "a cut link passed a datagram to {to:?}");
                restore(&b).unwrap();
                wait_until("a datagram after the cut", LONG, || arrives(&from, &to)).unwrap();
            }
        }
    });
}

#[test]
fn a_host_reaches_nothing_outside() {
    isolated("a_host_reaches_nothing_outside", Privilege::Unprivileged, || {
        let outside = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let (_lab, a, _b) = two_hosts();
        let connect = |target: SocketAddr| a.run(|| TcpStream::connect(target)).unwrap().unwrap_err().kind();
        for target in ["192.0.2.1:443", "[2001:db8::1]:443"] {
            assert_eq!(connect(target.parse().unwrap()), io::ErrorKind::NetworkUnreachable, "{target}");
        }
        assert_eq!(connect(outside), io::ErrorKind::ConnectionRefused, "lo is shared");
        // A default route to the other host leads there and no further.
        a.add_default_route("10.99.0.2".parse().unwrap()).unwrap();
        let routed = a.run(|| UdpSocket::bind("0.0.0.0:0")?.send_to(b"?", "192.0.2.1:9")).unwrap();
        assert_eq!(routed.unwrap(), 1, "no default route");
    });
}

#[test]
fn a_moved_host_answers_only_at_its_new_address() {
    isolated("a_moved_host_answers_only_at_its_new_address", Privilege::Current, || {
        let (_lab, a, b) = two_hosts();
        let old = socket_on(&b, b.ipv4().unwrap());
        b.set_addresses(&Lab::underlay(77)).unwrap();
        assert_eq!(b.ipv4(), Some("10.99.0.77".parse().unwrap()));
        for (from, to) in [(a.ipv4(), b.ipv4()), (a.ipv6(), b.ipv6())] {
            let (from, to) = (socket_on(&a, from.unwrap()), socket_on(&b, to.unwrap()));
            wait_until("a datagram", LONG, || arrives(&from, &to)).unwrap();
        }
        let from = socket_on(&a, a.ipv4().unwrap());
        assert!(!arrives(&from, &old), "the old address still answers");
    });
}

#[test]
fn a_command_runs_on_its_host_in_our_folder() {
    isolated("a_command_runs_on_its_host_in_our_folder", Privilege::Unprivileged, || {
        let (_lab, a, b) = two_hosts();
        let folder = tempfile::tempdir().unwrap();
        std::env::set_current_dir(folder.path()).unwrap();
        let script =
            "pwd && cut -d: -f1 -s /proc/net/dev | tr -d ' ' | sort | tr '\\n' ' ' && touch /run/mine";
        let output = a.command("sh").args(["-c", script]).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        let mut lines = text.lines();
        assert_eq!(lines.next().map(Path::new), Some(fs::canonicalize(folder.path()).unwrap().as_path()));
        let interfaces: Vec<&str> = lines.next().unwrap().split_whitespace().collect();
        assert!(interfaces.contains(&"eth0") && interfaces.contains(&"lo"), "{interfaces:?}");
        assert!(a.run(|| Path::new("/run/mine").exists()).unwrap(), "/run of a host does not last");
        assert!(!b.run(|| Path::new("/run/mine").exists()).unwrap(), "/run is shared between hosts");
        assert!(!Path::new("/run/mine").exists(), "/run is shared with us");
        assert!(fs::metadata(a.ns_path()).is_ok());
    });
}

#[test]
fn names_are_unique_in_a_lab() {
    isolated("names_are_unique_in_a_lab", Privilege::Current, || {
        let (mut lab, ..) = two_hosts();
        assert!(matches!(lab.add_host("a", &[]), Err(LabError::HostExists { name }) if name == "a"));
        assert_eq!(lab.hosts().map(Host::name).collect::<Vec<_>>(), ["a", "b"]);
    });
}

#[test]
fn processes_end_when_asked_and_when_they_do_not_listen() {
    let folder = tempfile::tempdir().unwrap();
    let mut processes = Processes::new(folder.path()).unwrap();
    let shell = |script: &str| {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    };
    processes
        .spawn("polite", shell("trap 'echo bye; exit 3' TERM; echo ready; while :; do sleep 0.05; done"))
        .unwrap();
    processes.spawn("deaf", shell("trap '' TERM; echo ready; while :; do sleep 0.05; done")).unwrap();
    for name in ["polite", "deaf"] {
        wait_until("the trap", LONG, || processes.log(name).contains("ready")).unwrap();
    }
    assert_eq!(processes.stop("polite").unwrap().code(), Some(3));
    assert_eq!(processes.log_tail("polite", 1), "bye");
    assert!(processes.is_running("deaf") && !processes.is_running("polite"));
    assert!(processes.log_tails(5).contains("--- deaf"));
    let deaf = processes.id("deaf").unwrap();
    drop(processes);
    assert!(!Path::new(&format!("/proc/{deaf}")).exists(), "a deaf process outlived its keeper");
}

#[test]
fn a_killed_process_reports_the_signal() {
    let folder = tempfile::tempdir().unwrap();
    let mut processes = Processes::new(folder.path()).unwrap();
    let mut command = Command::new("sleep");
    command.arg("1000");
    processes.spawn("sleeper", command).unwrap();
    assert_eq!(processes.kill("sleeper").unwrap().signal(), Some(9));
    assert!(matches!(processes.stop("nobody"), Err(LabError::NoProcess { .. })));
    assert!(matches!(processes.spawn("a/b", Command::new("true")), Err(LabError::ProcessName { .. })));
    assert!(matches!(processes.spawn("x", Command::new("/nonexistent")), Err(LabError::Spawn { .. })));
}

/// The keeper half of the next test: holds a child until it is killed.
#[test]
#[ignore = "started by children_die_with_their_keeper"]
fn keeper() {
    let Some(folder) = std::env::var_os("MESH_LAB_KEEPER") else { return };
    let mut processes = Processes::new(&folder).unwrap();
    let mut command = Command::new("sleep");
    command.arg("1000");
    // Started from a thread that ends at once: the child must not end with it.
    let id =
        std::thread::scope(|scope| scope.spawn(|| processes.spawn("kept", command).unwrap()).join().unwrap());
    let folder = Path::new(&folder);
    fs::write(folder.join("pid.new"), id.to_string()).unwrap();
    fs::rename(folder.join("pid.new"), folder.join("pid")).unwrap();
    processes.wait("kept", Duration::from_secs(600)).unwrap();
}

#[test]
fn children_die_with_their_keeper() {
    let folder = tempfile::tempdir().unwrap();
    let mut keeper = Command::new(std::env::current_exe().unwrap());
    keeper.args(["keeper", "--exact", "--ignored", "--nocapture"]).env("MESH_LAB_KEEPER", folder.path());
    let mut keeper = keeper.spawn().unwrap();
    let pid =
        wait_for("the child's id", LONG, || fs::read_to_string(folder.path().join("pid")).ok()).unwrap();
    let runs = || {
        // A zombie has died; only its new parent has not looked yet.
        fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
    };
    assert!(runs());
    keeper.kill().unwrap();
    keeper.wait().unwrap();
    wait_until("the child's death", LONG, || !runs()).unwrap();
}

#[test]
fn an_ordinary_user_may_enter_by_himself() {
    // The test binary's harness is threaded, so the plain program to enter with is a shell that
    // `isolate` starts; what it sees is what `enter` gives.
    let mut command = Command::new("sh");
    command
        .args(["-c", "id -u; cut -d: -f1 -s /proc/net/dev; ls /run | wc -l; sed -n 1p /proc/self/uid_map"]);
    isolate(&mut command, Privilege::Unprivileged);
    let output = command.output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let words: Vec<&str> = text.split_whitespace().collect();
    assert_eq!(words.first(), Some(&"0"), "{text}");
    assert!(words.contains(&"lo") && !words.contains(&"eth0"), "{text}");
}

#[test]
fn dropped_privileges_are_gone() {
    let mut command = Command::new("sh");
    command.args(["-c", "id -u; id -G; grep CapEff /proc/self/status; test -w /dev/net/tun"]);
    drop_privileges(&mut command);
    let output = command.output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}");
    assert!(!text.lines().any(|line| line == "0"), "{text}");
    assert!(text.contains("CapEff:\t0000000000000000"), "{text}");
}
