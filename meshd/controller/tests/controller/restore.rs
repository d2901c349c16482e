//! A backup, and the controller that comes back from it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mesh_controller::{InitConfig, Passphrase, RestoreConfig, RunConfig, StartupError, Unlock};
use mesh_proto::v1::{self as pb, ErrorCode, backup_part::Part};
use mesh_runtime::{SharedClock, SystemClock};

use crate::harness::{Mesh, Running};

const SECRET: &str = "correct horse battery";

async fn backup(running: &Running, out: &Path) -> pb::BackupDone {
    let mut client = pb::ca_client::CaClient::new(running.local().await);
    let request = pb::BackupRequest { passphrase: SECRET.into() };
    let mut stream = client.backup(request).await.unwrap().into_inner();
    let (mut bytes, mut done) = (Vec::new(), None);
    while let Some(part) = stream.message().await.unwrap() {
        match part.part.unwrap() {
            Part::Data(data) => bytes.extend_from_slice(&data),
            Part::Done(summary) => done = Some(summary),
        }
    }
    fs::write(out, &bytes).unwrap();
    done.filter(|done| done.bytes == bytes.len() as u64).unwrap()
}

fn restore(backup: &Path, state_dir: PathBuf, secret: &str) -> Result<(), StartupError> {
    let clock: SharedClock = Arc::new(SystemClock);
    let passphrase = Passphrase::new(secret.into());
    mesh_controller::restore(&RestoreConfig { state_dir, backup: backup.into(), passphrase }, &clock)
        .map(drop)
}

/// The numbers of all published CRLs, each by issuer and shard.
async fn numbers(running: &Running) -> Vec<(Vec<u8>, u64)> {
    let mut client = pb::ca_client::CaClient::new(running.local().await);
    let info = client.show(pb::Empty {}).await.unwrap().into_inner();
    info.crls.iter().map(|crl| (crl.issuer_key_id.to_vec(), crl.number)).collect()
}

async fn revoke(running: &Running, name: &str) {
    let mut nodes = pb::nodes_client::NodesClient::new(running.local().await);
    let request = pb::RevokeNodeRequest { name: name.into(), ..pb::RevokeNodeRequest::default() };
    nodes.revoke(request).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_controller_goes_on_with_rising_crl_numbers() {
    let mesh = Mesh::empty();
    let init = InitConfig {
        unlock: Unlock::Passphrase,
        passphrase: Some(Passphrase::new(SECRET.into())),
        ..mesh.init_config()
    };
    mesh_controller::init(init, Arc::new(SystemClock)).unwrap();
    let unlocked = RunConfig { passphrase: Some(Passphrase::new(SECRET.into())), ..mesh.run_config() };
    let running = mesh.start_config(unlocked.clone(), None).await;
    for name in ["alpha", "bravo", "charlie"] {
        running.enroll(name).await;
    }
    revoke(&running, "bravo").await;
    let file = mesh.state_dir().with_file_name("backup");
    let taken = backup(&running, &file).await;
    assert_eq!(taken.domain, "mesh.internal");
    // What the backup does not know: CRLs with higher numbers are about.
    revoke(&running, "charlie").await;
    running.enroll("delta").await;
    revoke(&running, "delta").await;
    let lost = numbers(&running).await;
    running.stop().await.unwrap();

    let text = fs::read(&file).unwrap();
    for clear in ["MESH SEALED KEY", "mesh.internal", "alpha", "PRIVATE KEY"] {
        assert!(!text.windows(clear.len()).any(|window| window == clear.as_bytes()), "{clear} in clear");
    }
    let mut floor = lost;
    // Twice from the same backup: also the first restore's CRLs are about then.
    for round in 0..2 {
        let state_dir = mesh.state_dir().with_file_name(format!("restored-{round}"));
        restore(&file, state_dir.clone(), SECRET).unwrap();
        let config = RunConfig { state_dir: state_dir.clone(), ..unlocked.clone() };
        let running = mesh.start_config(config, None).await;
        let now = numbers(&running).await;
        assert_eq!(now.len(), floor.len());
        for (issuer, number) in &now {
            let (_, before) = floor.iter().find(|(known, _)| known == issuer).unwrap();
            assert!(number > before, "round {round}: number {number} after {before}");
        }
        let nodes = pb::nodes_client::NodesClient::new(running.local().await)
            .list(pb::Empty {})
            .await
            .unwrap()
            .into_inner()
            .nodes;
        let state = |name: &str| nodes.iter().find(|node| node.name == name).map(|node| node.state.clone());
        assert!(state("alpha").is_some_and(|state| state != "revoked"));
        assert_eq!((state("bravo").as_deref(), state("delta")), (Some("revoked"), None));
        revoke(&running, "charlie").await;
        floor = numbers(&running).await;
        running.stop().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_is_not_whole_or_not_opened_makes_nothing() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    let file = mesh.state_dir().with_file_name("backup");
    backup(&running, &file).await;
    let mut client = pb::ca_client::CaClient::new(running.local().await);
    let weak = client.backup(pb::BackupRequest { passphrase: "short".into() }).await.unwrap_err();
    assert_eq!(weak.code(), tonic::Code::InvalidArgument, "{weak}");
    running.stop().await.unwrap();

    let other = mesh.state_dir().with_file_name("other");
    let refused = |path: &Path, secret: &str, code: ErrorCode| {
        let error = restore(path, other.clone(), secret).unwrap_err();
        assert_eq!(error.code(), code, "{error}: {}", error.why());
        assert!(!error.next().is_empty() && !other.exists(), "nothing is half made");
    };
    refused(&file, "wrong", ErrorCode::PassphraseWrong);
    refused(&file.with_file_name("missing"), SECRET, ErrorCode::StateNotFound);
    let good = fs::read(&file).unwrap();
    let spoiled = file.with_file_name("spoiled");
    let write = |bytes: &[u8]| fs::write(&spoiled, bytes).unwrap();
    for at in [60, good.len() / 2, good.len() - 1] {
        let mut bytes = good.clone();
        bytes[at] ^= 1;
        write(&bytes);
        refused(&spoiled, SECRET, ErrorCode::PassphraseWrong);
    }
    write(&good[..good.len() - 20]);
    refused(&spoiled, SECRET, ErrorCode::PassphraseWrong);
    write(b"not a backup at all, but long enough to hold what a header would be");
    refused(&spoiled, SECRET, ErrorCode::BackupRefused);
    // Lower cost of the passphrase.
    let mut bytes = good.clone();
    bytes[15] = 1;
    write(&bytes);
    refused(&spoiled, SECRET, ErrorCode::BackupRefused);
    // Never over something that is there.
    let exists = restore(&file, mesh.state_dir(), SECRET).unwrap_err();
    assert_eq!(exists.code(), ErrorCode::StateExists);
    restore(&file, other.clone(), SECRET).unwrap();
    let running = mesh.start_as(|config| config.state_dir.clone_from(&other)).await;
    running.stop().await.unwrap();
}

/// A sealed key whose header asks for less work than ever was written: refused before the passphrase is used.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_file_that_was_made_easier_to_guess_is_refused() {
    let mesh = Mesh::empty();
    let passphrase = || Some(Passphrase::new(SECRET.into()));
    let init = InitConfig { unlock: Unlock::Passphrase, passphrase: passphrase(), ..mesh.init_config() };
    mesh_controller::init(init, Arc::new(SystemClock)).unwrap();
    let key = mesh.state_dir().join("keys/issuing.key");
    let text = fs::read_to_string(&key).unwrap();
    let block = pem::parse(&text).unwrap();
    // Memory, passes and lanes follow magic, version, sealing and purpose.
    for (at, value) in [(11, 0), (17, 1), (21, 0)] {
        let mut body = block.contents().to_vec();
        body[at] = value;
        fs::write(&key, pem::encode(&pem::Pem::new(block.tag(), body))).unwrap();
        let config = RunConfig { passphrase: passphrase(), ..mesh.run_config() };
        let environment = mesh_controller::Environment { clock: Arc::new(SystemClock), journal: None };
        let refused = mesh_controller::Controller::build(config, environment).await.unwrap_err();
        assert_eq!(refused.code(), ErrorCode::SealedKeyCost, "{refused}");
        assert!(!refused.why().is_empty() && !refused.next().is_empty());
    }
    fs::write(&key, text).unwrap();
    let config = RunConfig { passphrase: passphrase(), ..mesh.run_config() };
    mesh.start_config(config, None).await.stop().await.unwrap();
}
