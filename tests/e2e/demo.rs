//! `meshctl demo`, as root and as nobody; and that it can fail.

use std::process::Command;

use mesh_lab::testing::drop_privileges;
use mesh_lab::transcript::assert_shown;
use mesh_tests::{Ran, binary, run};

const STEPS: [&str; 10] =
    ["ca", "enroll", "mesh", "issue", "mtls", "no cert", "rotate", "revoke", "evict", "offline"];

fn demo(environment: &[(&str, &str)], prepare: impl FnOnce(&mut Command)) -> Ran {
    let folder = tempfile::Builder::new().prefix("mesh-demo-").tempdir().unwrap();
    // An ordinary user must be able to write his temporary files.
    std::fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    // Also the programs: the clone may lie in a folder that is closed to others.
    for program in ["meshd", "meshctl"] {
        // By a process of its own: a file that a thread here has open for writing cannot be run, and any
        // other test's fork keeps it open a moment longer.
        let mut copy = Command::new("cp");
        copy.arg(binary(program)).arg(folder.path().join(program));
        run(copy).ok();
    }
    let mut command = Command::new(folder.path().join("meshctl"));
    command.arg("demo").env("TMPDIR", folder.path()).env("HOME", folder.path());
    command.envs(environment.iter().copied());
    prepare(&mut command);
    run(command)
}

fn passes(ran: Ran) {
    let ran = ran.ok();
    for (index, step) in STEPS.iter().enumerate() {
        let line = format!("{:>2} {step}", index + 1);
        assert!(ran.stdout.lines().any(|seen| seen.starts_with(&line)), "no line {line:?}: {ran}");
    }
    assert!(ran.stdout.contains("all 10 steps passed"), "{ran}");
}

#[test]
fn passes_as_root_or_as_who_runs_the_tests() {
    passes(demo(&[], |_| ()));
}

#[test]
fn passes_as_an_ordinary_user_and_looks_as_the_readme_says() {
    let ran = demo(&[], drop_privileges);
    let readme = include_str!("../../README.md");
    assert_shown(readme, "meshctl demo", &[], &ran.stdout);
    passes(ran);
}

#[test]
fn is_red_when_revoked_certificates_are_not_pushed() {
    let ran = demo(&[("MESH_FAILPOINT", "crl-push-disabled")], |_| ()).exits(1);
    assert!(ran.to_string().contains("8 revoke"), "{ran}");
    assert!(!ran.stdout.contains("9 evict"), "{ran}");
}

#[test]
fn is_red_when_a_revoked_peer_is_kept() {
    let ran = demo(&[("MESH_FAILPOINT", "peer-removal-disabled")], |_| ()).exits(1);
    assert!(ran.to_string().contains("9 evict"), "{ran}");
    assert!(!ran.stdout.contains("10 offline"), "{ran}");
}
