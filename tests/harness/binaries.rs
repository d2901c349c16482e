use std::path::PathBuf;

/// The built program `name` (`meshd` or `meshctl`) beside the running test.
///
/// # Panics
/// If it was not built: `tests/run` builds the programs before the suites.
pub fn binary(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a running test has a binary");
    let profile = test.ancestors().nth(2).expect("cargo keeps tests in target/PROFILE/deps");
    let path = profile.join(name);
    assert!(
        path.exists(),
        "{} is not built; first run: cargo build --workspace --bins --features failpoints",
        path.display()
    );
    path
}
