//! Tests inside namespaces, under the ordinary test harness.
//!
//! The harness has several threads, so a test cannot [`enter`](crate::enter) by itself. [`isolated`]
//! runs the same test again in a child process that is isolated before it starts:
//!
//! ```no_run
//! # use mesh_lab::{Lab, testing::{Privilege, isolated}};
//! #[test]
//! fn two_hosts_meet() {
//!     isolated("two_hosts_meet", Privilege::Current, || {
//!         let mut lab = Lab::new().unwrap();
//!         // …
//!     });
//! }
//! ```

use std::{
    env,
    os::unix::process::CommandExt,
    process::{Command, Stdio},
};

use crate::{LabError, process::describe, sys};

const VARIABLE: &str = "MESH_LAB_TEST";
const FINISHED: &str = "mesh-lab: the isolated test ran to its end";

/// As whom an isolated test runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Privilege {
    /// As the user who runs the tests.
    Current,
    /// As `nobody`, if the tests run as root; otherwise as [`Privilege::Current`].
    Unprivileged,
}

/// Runs `body` of the test called `test` (its full path within the test binary) in namespaces of its
/// own: in a user namespace unless root.
///
/// # Panics
/// If the body does, if the child cannot be isolated, or if no test has that name.
pub fn isolated(test: &str, privilege: Privilege, body: impl FnOnce()) {
    if env::var_os(VARIABLE).is_some_and(|name| name == test) {
        body();
        println!("{FINISHED}");
        return;
    }
    let mut command = Command::new(env::current_exe().expect("a running test has a binary"));
    command.args([test, "--exact", "--nocapture", "--include-ignored", "--test-threads=1"]);
    command.env(VARIABLE, test).stdin(Stdio::null());
    isolate(&mut command, privilege);
    let output = match command.output() {
        Ok(output) => output,
        Err(error) => panic!("cannot isolate test {test}: {}", LabError::namespaces(error)),
    };
    let text = String::from_utf8_lossy(&output.stdout);
    eprint!("{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "isolated test {test} ended with {}", describe(output.status));
    // A name that matches no test ends well too, having proved nothing.
    assert!(text.lines().any(|line| line.ends_with(FINISHED)), "no test is called {test}");
}

/// Makes `command` start in namespaces of its own, and end with the thread that starts it.
pub fn isolate(command: &mut Command, privilege: Privilege) {
    let drop_root = privilege == Privilege::Unprivileged && nix::unistd::geteuid().is_root();
    let plan = if drop_root { sys::EnterPlan::nobody() } else { sys::EnterPlan::current() };
    let parent = nix::unistd::getpid().as_raw();
    let hook = move || {
        if drop_root {
            sys::become_nobody()?;
        }
        sys::enter(&plan)?;
        // Last, because a change of user clears it.
        sys::die_with(parent)
    };
    // SAFETY: the hook only makes system calls (see `sys`) and reads what was made before the fork.
    unsafe { command.pre_exec(hook) };
}

/// Makes `command` run as `nobody` if we are root, able to open `/dev/net/tun`: how an ordinary user
/// would run it. It enters no namespace; that is the command's own affair.
pub fn drop_privileges(command: &mut Command) {
    if nix::unistd::geteuid().is_root() {
        // SAFETY: the hook only makes system calls (see `sys`).
        unsafe { command.pre_exec(sys::become_nobody) };
    }
}
