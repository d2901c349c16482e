use std::path::PathBuf;

/// The built program `name` (`meshd` or `meshctl`) beside the running test.
///
/// # Panics
/// If it was not built: `tests/run` builds the programs before the suites.
pub fn binary(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a running test has a binary");
    // Tests lie in target/PROFILE/deps, the benchmark in target/PROFILE.
    let folder = test.parent().expect("a program lies in a folder");
    let profile =
        if folder.ends_with("deps") { folder.parent().expect("target/PROFILE/deps") } else { folder };
    let path = profile.join(name);
    assert!(
        path.exists(),
        "{} is not built; first run: cargo build --workspace --bins --features failpoints",
        path.display()
    );
    path
}
