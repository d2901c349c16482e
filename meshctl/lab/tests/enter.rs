//! `enter` as a program's first act, as whoever runs the tests and as an ordinary user.

use std::{
    env, fs,
    path::Path,
    process::{Command, Stdio},
};

use mesh_lab::{Lab, Processes, check_tun, enter, testing::drop_privileges};

const VARIABLE: &str = "MESH_LAB_ENTER";

fn main() {
    if env::var_os(VARIABLE).is_some() {
        return program();
    }
    let listing = env::args().any(|argument| argument == "--list");
    if listing {
        return;
    }
    for ordinary_user in [false, true] {
        let mut command = Command::new(env::current_exe().unwrap());
        command.env(VARIABLE, "1").stdin(Stdio::null());
        if ordinary_user {
            drop_privileges(&mut command);
        }
        let status = command.status().unwrap();
        assert!(status.success(), "as an ordinary user: {ordinary_user}; {status}");
        println!("test enter (ordinary user: {ordinary_user}) ... ok");
    }
}

/// What `meshctl demo` does first.
fn program() {
    let root = nix::unistd::geteuid().is_root();
    let network = fs::read_link("/proc/self/ns/net").unwrap();
    let isolation = enter().unwrap();
    assert_eq!(isolation.user_namespace, !root);
    assert!(nix::unistd::geteuid().is_root(), "not root inside");
    assert_ne!(fs::read_link("/proc/self/ns/net").unwrap(), network);
    assert_eq!(fs::read_dir("/run").unwrap().count(), 0, "/run is not empty");
    let routes = fs::read_to_string("/proc/net/route").unwrap();
    assert_eq!(routes.lines().count(), 1, "a route leads out: {routes}");
    check_tun().unwrap();
    fs::write("/run/ours", "").unwrap();

    let mut lab = Lab::new().unwrap();
    let host = lab.add_host("a", &Lab::underlay(1)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut processes = Processes::new(folder.path()).unwrap();
    let mut command = host.command("sh");
    command.args(["-c", "test ! -e /run/ours && echo on a host"]);
    processes.spawn("check", command).unwrap();
    let status = processes.wait("check", std::time::Duration::from_secs(20)).unwrap();
    assert!(status.success(), "{}", processes.log_tails(20));
    assert_eq!(processes.log("check"), "on a host\n");
    assert!(matches!(enter(), Err(mesh_lab::LabError::Threaded { .. })), "the spawner is a thread");
    assert!(Path::new("/run/ours").exists());
}
