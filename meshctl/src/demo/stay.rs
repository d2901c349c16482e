//! `--stay`: the fleet goes on until somebody has seen enough.

use super::{
    Broken,
    fleet::{CONTROLLER, Fleet},
    interrupt::wait_for_signal,
    screen::Screen,
    steps::start_controller,
};

/// Starts the controller again, says how to enter, and waits for Ctrl-C.
pub(super) fn stay(fleet: &mut Fleet, screen: &Screen) -> Result<(), Broken> {
    fleet.interrupt.disarm();
    start_controller(fleet)?;
    screen.line("\nthe fleet runs (the controller again, charlie evicted); enter a machine with:");
    let hosts: Vec<&str> =
        std::iter::once(CONTROLLER).chain(fleet.nodes.iter().map(|node| node.name)).collect();
    for host in hosts {
        let Some(id) = fleet.processes().id(host) else { continue };
        screen.line(&format!("  {host:<11} {}", enter(id, fleet.user_namespace)));
    }
    screen.line(&format!("there try `{0} status` and `{0} ping bravo`", fleet.meshctl_path().display()));
    screen.line(&format!("state and logs: {}", fleet.path("").display()));
    screen.line("Ctrl-C ends it and leaves nothing behind");
    wait_for_signal()
}

/// The user namespace as well where there is one; entering the one we are in is an error.
fn enter(id: u32, user_namespace: bool) -> String {
    let user = if user_namespace { " -U --preserve-credentials" } else { "" };
    format!("nsenter -t {id}{user} -n -m")
}
