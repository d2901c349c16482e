//! What a running controller lets others on its machine see of it.

use std::{
    fs,
    os::unix::{fs::MetadataExt as _, process::ExitStatusExt as _},
    path::Path,
};

use mesh_ca::{KeyId, KeyPurpose, Unlock};
use mesh_tests::{CONTROLLER, DEADLINE, Fleet, fleet_test};
use nix::sys::signal::Signal;

use crate::secrets::{Needles, files_below};

/// What the harness seals the CA's keys with.
fn passphrase(fleet: &Fleet) -> String {
    fs::read_to_string(fleet.passphrase_file()).unwrap().trim_end().to_owned()
}

fn limit(pid: u32, name: &str) -> String {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let line =
        limits.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name}: {limits}"));
    line[name.len()..].split_whitespace().take(2).collect::<Vec<_>>().join(" ")
}

#[test]
fn shows_no_passphrase_and_no_ca_key() {
    fleet_test("process::shows_no_passphrase_and_no_ca_key", || {
        let fleet = Fleet::with_nodes(&["alpha"]);
        let passphrase = passphrase(&fleet);
        assert!(passphrase.len() > 10);
        let mut needles = Needles::default();
        needles.add("the passphrase", passphrase.as_bytes());
        let sealed: Vec<_> = files_below(&fleet.state(CONTROLLER).join("keys"));
        assert_eq!(sealed.len(), 2, "root and issuing CA: {sealed:?}");
        for file in &sealed {
            let text = fs::read(file).unwrap();
            let key = [("root", KeyPurpose::Root), ("issuing", KeyPurpose::Issuing)].into_iter().find_map(
                |(prefix, purpose)| {
                    let stem = file.file_stem()?.to_str()?;
                    let ids = [prefix, stem, &format!("{prefix}-1")].map(KeyId::parse);
                    ids.into_iter().flatten().find_map(|id| {
                        mesh_ca::unseal(&text, &id, purpose, Unlock::Passphrase(passphrase.as_bytes())).ok()
                    })
                },
            );
            let key = key.unwrap_or_else(|| panic!("{} opens with the passphrase", file.display()));
            needles.add_key(&format!("CA key {}", file.display()), &key);
        }

        let pid = fleet.processes.id(CONTROLLER).unwrap();
        for what in ["environ", "cmdline"] {
            let bytes = fs::read(format!("/proc/{pid}/{what}")).unwrap();
            assert!(!bytes.is_empty(), "{what} can be read here");
            assert_eq!(needles.found_in(&bytes), Vec::<String>::new(), "in {what}");
        }
        let places = [fleet.state(CONTROLLER), fleet.state("alpha"), fleet.processes.folder().to_owned()];
        for file in places.iter().flat_map(|place| files_below(place)) {
            let bytes = fs::read(&file).unwrap();
            assert_eq!(needles.found_in(&bytes), Vec::<String>::new(), "in {}", file.display());
        }
    });
}

#[test]
fn leaves_no_core_and_cannot_be_looked_into() {
    fleet_test("process::leaves_no_core_and_cannot_be_looked_into", || {
        let mut fleet = Fleet::with_nodes(&["alpha"]);
        for name in [CONTROLLER, "alpha"] {
            let pid = fleet.processes.id(name).unwrap();
            assert_eq!(limit(pid, "Max core file size"), "0 0", "{name}");
        }
        // A crash writes nothing, even where the shell that started the daemon wanted cores.
        fleet.processes.signal("alpha", Signal::SIGABRT).unwrap();
        let status = fleet.processes.wait("alpha", DEADLINE).unwrap();
        assert_eq!((status.signal(), status.core_dumped()), (Some(Signal::SIGABRT as i32), false));

        if nix::unistd::geteuid().is_root() {
            nobody_runs_a_controller(&mut fleet);
        }
    });
}

/// As root everything can be looked into. So the daemon runs as somebody else, and that somebody looks.
fn nobody_runs_a_controller(fleet: &mut Fleet) {
    const NOBODY: u32 = 65534;
    let folder = fleet.path(CONTROLLER).join("nobody");
    fs::create_dir(&folder).unwrap();
    for path in [folder.as_path(), folder.parent().unwrap(), folder.parent().unwrap().parent().unwrap()] {
        fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    }
    std::os::unix::fs::chown(&folder, Some(NOBODY), Some(NOBODY)).unwrap();
    let program = folder.join("meshd");
    fs::copy(mesh_tests::binary("meshd"), &program).unwrap();
    let as_nobody = |fleet: &Fleet, program: &Path, args: &[&str]| {
        let mut command =
            fleet.command(CONTROLLER, "setpriv", &["--reuid=65534", "--regid=65534", "--clear-groups"]);
        command.arg(program).args(args);
        command
    };
    let state = folder.join("state");
    let state = state.to_str().unwrap();
    let init = ["controller", "init", "--domain", "other.internal", "--unlock", "none", "--state-dir", state];
    mesh_tests::run(as_nobody(fleet, &program, &init)).ok();
    let socket = folder.join("sock");
    let serve = ["controller", "run", "--state-dir", state, "--listen", "127.0.0.1:0", "--socket"];
    let mut daemon = as_nobody(fleet, &program, &serve);
    daemon.arg(&socket);
    fleet.processes.spawn("nobody", daemon).unwrap();
    fleet.until("nobody's controller runs", |_| socket.exists());
    let plain = as_nobody(fleet, Path::new("sleep"), &["600"]);
    fleet.processes.spawn("sleeper", plain).unwrap();
    let sleeper = fleet.processes.id("sleeper").unwrap();
    fleet.until("the sleeper is nobody's", |_| {
        fs::metadata(format!("/proc/{sleeper}")).is_ok_and(|folder| folder.uid() == NOBODY)
    });

    let daemon = fleet.processes.id("nobody").unwrap();
    for what in ["environ", "mem", "maps"] {
        let look = |pid: u32| {
            let file = format!("/proc/{pid}/{what}");
            mesh_tests::run(as_nobody(fleet, Path::new("head"), &["-c0", &file]))
        };
        assert_eq!(look(sleeper).code, 0, "the control: {}", look(sleeper));
        assert_ne!(look(daemon).code, 0, "a process of the same user may read {what} of the daemon");
    }
}
