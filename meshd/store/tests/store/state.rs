use std::{fs, os::unix::fs::PermissionsExt, path::Path, process::Command};

use mesh_store::{OpenError, STATE_FORMAT_VERSION, StateDir, StateError, Store, StoreOptions};

use crate::support::{append, files, record};

fn small() -> StoreOptions {
    StoreOptions { segment_bytes: 4096 }
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn a_state_directory_in_use_is_refused_and_left_alone() {
    let parent = tempfile::tempdir().unwrap();
    let path = parent.path().join("state");
    let mut store = Store::open(&path, small()).unwrap();
    append(&mut store.journal, &[record(1, 10)]);
    let before = files(&path.join("journal"));
    let error = Store::open(&path, small()).unwrap_err();
    assert!(matches!(error, OpenError::State(StateError::InUse { .. })), "{error}");
    assert!(error.to_string().starts_with("state is in use"), "{error}");
    assert_eq!(files(&path.join("journal")), before);
    append(&mut store.journal, &[record(2, 10)]);
    drop(store);
    assert_eq!(Store::open(&path, small()).unwrap().index.applied().seq, 0);
}

#[test]
fn state_of_a_newer_version_is_refused_untouched() {
    let parent = tempfile::tempdir().unwrap();
    let path = parent.path().join("state");
    drop(Store::open(&path, small()).unwrap());
    fs::remove_file(path.join("lock")).unwrap();
    fs::write(path.join("format"), format!("meshd-state {}\n", STATE_FORMAT_VERSION + 1)).unwrap();
    let before = files(&path);
    let error = Store::open(&path, small()).unwrap_err();
    assert_eq!(files(&path), before);
    let OpenError::State(StateError::Newer { found, supported, .. }) = &error else { panic!("{error}") };
    assert_eq!((*found, *supported), (STATE_FORMAT_VERSION + 1, STATE_FORMAT_VERSION));
    let text = error.to_string();
    assert!(text.contains(&found.to_string()) && text.contains(&supported.to_string()), "{text}");
}

#[test]
fn a_format_file_that_is_missing_or_nonsense_is_refused() {
    let parent = tempfile::tempdir().unwrap();
    let path = parent.path().join("state");
    drop(Store::open(&path, small()).unwrap());
    for nonsense in ["", "meshd-state", "meshd-state x", "other 1", &"9".repeat(1000)] {
        fs::write(path.join("format"), nonsense).unwrap();
        let error = StateDir::open(&path).unwrap_err();
        assert!(matches!(error, StateError::Format { .. }), "{nonsense:?}: {error}");
    }
    fs::remove_file(path.join("format")).unwrap();
    assert!(matches!(StateDir::open(&path), Err(StateError::FormatMissing { .. })));
}

#[test]
fn state_open_to_others_is_refused() {
    let parent = tempfile::tempdir().unwrap();
    let path = parent.path().join("state");
    drop(StateDir::open(&path).unwrap());
    fs::set_permissions(&path, fs::Permissions::from_mode(0o750)).unwrap();
    let error = StateDir::open(&path).unwrap_err();
    assert!(matches!(error, StateError::Mode { mode: 0o750, .. }), "{error}");
}

/// The child half of the next test: umask is a property of the process.
#[test]
#[ignore = "started by everything_is_private_whatever_the_umask"]
fn open_a_store() {
    let Some(path) = std::env::var_os("MESH_STORE_OPEN") else { return };
    let mut store = Store::open(path, small()).unwrap();
    append(&mut store.journal, &[record(1, 10)]);
}

#[test]
fn everything_is_private_whatever_the_umask() {
    let parent = tempfile::tempdir().unwrap();
    let path = parent.path().join("state");
    let script = "umask 0 && exec \"$0\" state::open_a_store --exact --ignored";
    let child = Command::new("sh")
        .args(["-c", script])
        .arg(std::env::current_exe().unwrap())
        .env("MESH_STORE_OPEN", &path)
        .output()
        .unwrap();
    assert!(child.status.success(), "{child:?}");
    for name in ["", "journal", "index"] {
        assert_eq!(mode(&path.join(name)), 0o700, "{name:?}");
    }
    for name in files(&path).keys().filter(|name| !name.starts_with("index/")) {
        assert_eq!(mode(&path.join(name)), 0o600, "{name}");
    }
    assert!(files(&path).contains_key("journal/head"));
}
