//! `--stay`: the fleet goes on until somebody has seen enough.

use tokio::signal::unix::{SignalKind, signal};

use super::{
    Broken,
    fleet::{CONTROLLER, Fleet},
    screen::Screen,
    steps::start_controller,
};

/// Starts the controller again, says how to enter, and waits for Ctrl-C.
pub(super) fn stay(fleet: &mut Fleet, screen: &Screen) -> Result<(), Broken> {
    start_controller(fleet)?;
    screen.line("\nthe fleet runs (the controller again, charlie evicted); enter a machine with:");
    let hosts: Vec<&str> =
        std::iter::once(CONTROLLER).chain(fleet.nodes.iter().map(|node| node.name)).collect();
    for host in hosts {
        let Some(id) = fleet.processes().id(host) else { continue };
        screen.line(&format!("  {host:<11} {}", enter(id)));
    }
    screen.line(&format!(
        "there try `meshctl status` and `meshctl ping bravo`; state and logs: {}",
        fleet.path("").display()
    ));
    screen.line("Ctrl-C ends it and leaves nothing behind");
    wait_for_signal()
}

/// User namespace as well: inside it we are root, also where that was not needed.
fn enter(id: u32) -> String {
    format!("nsenter --preserve-credentials -t {id} -U -n -m")
}

fn wait_for_signal() -> Result<(), Broken> {
    let broken = |error: std::io::Error| Broken::new(format!("cannot wait for a signal: {error}"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(broken)?;
    runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt()).map_err(broken)?;
        let mut terminate = signal(SignalKind::terminate()).map_err(broken)?;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        Ok(())
    })
}
