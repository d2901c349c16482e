use std::process::Command;

/// Makes `command` see the wall clock moved by `offset` ("+80h", "-1h"), with timers as they are.
///
/// # Panics
/// If libfaketime is not installed.
pub fn move_clock(command: &mut Command, offset: &str) {
    let library = std::fs::read_dir("/usr/lib")
        .expect("/usr/lib")
        .filter_map(|entry| Some(entry.ok()?.path().join("faketime/libfaketime.so.1")))
        .find(|path| path.exists())
        .expect("Debian's package faketime is installed by `make deps-test`");
    command.env("LD_PRELOAD", library).env("FAKETIME", offset).env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
}
