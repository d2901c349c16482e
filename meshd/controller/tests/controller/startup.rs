use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;

use mesh_controller::{Controller, Environment, InitConfig, Passphrase, RunConfig, StartupError, Unlock};
use mesh_proto::v1::ErrorCode;
use mesh_runtime::SystemClock;

use crate::harness::Mesh;

async fn build(config: RunConfig) -> Result<Controller, StartupError> {
    let environment = Environment { clock: Arc::new(SystemClock), journal: None };
    Controller::build(config, environment).await
}

fn init(config: InitConfig) -> Result<(), StartupError> {
    mesh_controller::init(config, Arc::new(SystemClock)).map(drop)
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// Every refusal has its number, a reason, a next step, and an exit code.
fn check(error: StartupError, code: ErrorCode, exit: u8) {
    assert_eq!((error.code(), error.exit()), (code, exit), "{error}");
    assert!(!error.why().is_empty() && !error.next().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_directory_that_cannot_be_used_says_why() {
    let mesh = Mesh::init();
    check(init(mesh.init_config()).unwrap_err(), ErrorCode::StateExists, 7);

    let missing = RunConfig { state_dir: mesh.state_dir().join("nothing"), ..mesh.run_config() };
    check(build(missing).await.unwrap_err(), ErrorCode::StateNotFound, 6);
    let file = RunConfig { state_dir: mesh.state_dir().join("controller.toml"), ..mesh.run_config() };
    check(build(file).await.unwrap_err(), ErrorCode::StateNotFound, 6);

    for path in ["", "keys", "keys/issuing.key", "controller.toml"] {
        let path = mesh.state_dir().join(path);
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        set_mode(&path, mode | 0o040);
        check(build(mesh.run_config()).await.unwrap_err(), ErrorCode::StatePermissions, 1);
        set_mode(&path, mode);
    }
    let link = mesh.state_dir().with_file_name("link");
    std::os::unix::fs::symlink(mesh.state_dir(), &link).unwrap();
    let linked = RunConfig { state_dir: link, ..mesh.run_config() };
    check(build(linked).await.unwrap_err(), ErrorCode::StatePermissions, 1);

    let running = mesh.start().await;
    let second = RunConfig { socket: mesh.state_dir().with_file_name("other.sock"), ..mesh.run_config() };
    check(build(second).await.unwrap_err(), ErrorCode::StateInUse, 7);
    let taken = {
        let other = Mesh::init();
        let config = RunConfig { listen: running.address, ..other.run_config() };
        build(config).await.unwrap_err()
    };
    check(taken, ErrorCode::PortInUse, 7);
    running.enroll("alpha").await;
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_or_damaged_state_is_left_as_it_is() {
    let mesh = Mesh::init();
    let format = mesh.state_dir().join("format");
    let own = fs::read_to_string(&format).unwrap();
    fs::write(&format, "meshd-state 99\n").unwrap();
    check(build(mesh.run_config()).await.unwrap_err(), ErrorCode::StateNewerVersion, 1);
    assert_eq!(fs::read_to_string(&format).unwrap(), "meshd-state 99\n");
    fs::write(&format, own).unwrap();

    let key = mesh.state_dir().join("keys/issuing.key");
    let sealed = fs::read(&key).unwrap();
    fs::copy(mesh.state_dir().join("keys/root.key"), &key).unwrap();
    check(build(mesh.run_config()).await.unwrap_err(), ErrorCode::CaKeyMismatch, 4);
    fs::write(&key, sealed).unwrap();
    mesh.start().await.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn sealed_keys_open_with_their_passphrase_only() {
    let folder = tempfile::tempdir().unwrap();
    let plain = Mesh::init();
    let config = InitConfig {
        state_dir: folder.path().join("sealed"),
        unlock: Unlock::Passphrase,
        passphrase: None,
        ..plain.init_config()
    };
    check(init(config.clone()).unwrap_err(), ErrorCode::PassphraseMissing, 2);
    assert!(!config.state_dir.exists(), "a refused init leaves nothing behind");
    let passphrase = |text: &str| Some(Passphrase::new(text.into()));
    init(InitConfig { passphrase: passphrase("correct horse"), ..config.clone() }).unwrap();
    let run = RunConfig { state_dir: config.state_dir.clone(), ..plain.run_config() };
    check(build(run.clone()).await.unwrap_err(), ErrorCode::PassphraseMissing, 2);
    let wrong = RunConfig { passphrase: passphrase("battery staple"), ..run.clone() };
    check(build(wrong).await.unwrap_err(), ErrorCode::PassphraseWrong, 4);
    build(RunConfig { passphrase: passphrase("correct horse"), ..run }).await.unwrap();
    let text = fs::read_to_string(config.state_dir.join("keys/root.key")).unwrap();
    assert!(text.contains("MESH SEALED KEY"));
    assert!(!format!("{:?}", passphrase("correct horse")).contains("horse"));
}

#[test]
fn init_refuses_names_that_no_mesh_can_have() {
    let mesh = Mesh::init();
    let fresh = || InitConfig { state_dir: mesh.state_dir().join("../other"), ..mesh.init_config() };
    let table = [
        InitConfig { domain: "mesh".into(), ..fresh() },
        InitConfig { domain: "Mesh.Internal".into(), ..fresh() },
        InitConfig { name: "two.labels".into(), ..fresh() },
        InitConfig { advertise: vec!["no-port".into()], ..fresh() },
        InitConfig { ipv4_pool: "100.64.0.0/32".parse().unwrap(), ..fresh() },
    ];
    for config in table {
        let shown = format!("{config:?}");
        let error = init(config).expect_err(&shown);
        check(error, ErrorCode::ConfigInvalid, 2);
        assert!(!mesh.state_dir().join("../other").exists(), "{shown}");
    }
}

#[test]
fn everything_below_the_state_directory_is_ours_alone() {
    let mesh = Mesh::init();
    let mut folders = vec![mesh.state_dir()];
    while let Some(folder) = folders.pop() {
        assert_eq!(fs::metadata(&folder).unwrap().permissions().mode() & 0o777, 0o700, "{folder:?}");
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            // A library makes the index, with modes of its own; the folder above keeps others out.
            if path.ends_with("index") {
                continue;
            }
            if path.is_dir() {
                folders.push(path);
            } else {
                let mode = fs::metadata(&path).unwrap().permissions().mode();
                assert_eq!(mode & 0o777, 0o600, "{path:?}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_path_that_is_somebodys_file_is_left_alone() {
    let mesh = Mesh::init();
    let file = mesh.state_dir().with_file_name("precious");
    fs::write(&file, "data").unwrap();
    let config = RunConfig { socket: file.clone(), ..mesh.run_config() };
    check(build(config).await.unwrap_err(), ErrorCode::PortInUse, 7);
    assert_eq!(fs::read_to_string(&file).unwrap(), "data");
}
