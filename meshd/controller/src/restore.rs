//! `meshd controller restore`: a state directory from a backup.

use std::fs::File;
use std::io::{BufReader, Read};

use mesh_runtime::SharedClock;
use mesh_store::{Append, BeginError, Head, Journal, Store};
use time::UtcDateTime;

use crate::backup::{self, BackupError, Beginning, Opened};
use crate::config::{RestoreConfig, RestoreSummary};
use crate::controller::load_world;
use crate::error::StartupError;
use crate::init::crl_number_floor;
use crate::state::{Settings, StateDir};

/// Records that are written at once, and the sum of their octets.
const BATCH_RECORDS: usize = 1024;
const BATCH_BYTES: usize = 4 * 1024 * 1024;

/// Makes a controller in `config.state_dir` as it was when the backup was taken. Nothing is listening afterwards.
///
/// Its CRLs go on with numbers above all that the lost controller may have signed, and nodes see a new incarnation.
///
/// # Errors
/// [`StartupError::StateExists`] without touching anything; after any other failure the directory that was made is
/// removed again.
pub fn restore(config: &RestoreConfig, clock: &SharedClock) -> Result<RestoreSummary, StartupError> {
    let refused = |source| StartupError::Backup { path: config.backup.clone(), source };
    let file = File::open(&config.backup).map_err(|error| refused(BackupError::Io(error)))?;
    // Before anything is made.
    let opened = backup::open(BufReader::new(file), &config.passphrase).map_err(refused)?;
    let settings = settings_of(&opened).map_err(refused)?;
    let (state, store) = StateDir::create(&config.state_dir)?;
    let made = fill(config, opened, settings, &state, store, clock);
    if made.is_err() {
        let _ = std::fs::remove_dir_all(&config.state_dir);
    }
    made
}

fn settings_of<R>(opened: &Opened<R>) -> Result<Settings, BackupError> {
    let (_, text) = opened
        .files
        .iter()
        .find(|(name, _)| name == backup::SETTINGS_NAME)
        .ok_or(BackupError::Malformed("it has no settings"))?;
    let text = std::str::from_utf8(text).map_err(|_| BackupError::Malformed("its settings"))?;
    toml::from_str(text).map_err(|_| BackupError::Malformed("its settings"))
}

fn fill<R: Read>(
    config: &RestoreConfig,
    mut opened: Opened<R>,
    settings: Settings,
    state: &StateDir,
    mut store: Store,
    clock: &SharedClock,
) -> Result<RestoreSummary, StartupError> {
    for (name, bytes) in opened.files.iter().filter(|(name, _)| name != backup::SETTINGS_NAME) {
        state.write(name, bytes)?;
    }
    let refused = |source| StartupError::Backup { path: config.backup.clone(), source };
    let beginning = opened.beginning.take();
    if let Some(beginning) = &beginning {
        begin(beginning, state, &mut store, refused)?;
    }
    let head = replay(config, &mut opened, state, &mut store)?;
    let manifest = opened.manifest;
    if head != manifest.head() {
        return Err(refused(BackupError::OtherHead));
    }
    if let Some(beginning) = &beginning {
        take_world(beginning, state, &store, refused)?;
    }
    let summary = RestoreSummary {
        first_seq: manifest.first_seq(),
        state_dir: config.state_dir.clone(),
        domain: manifest.domain,
        taken_at: UtcDateTime::from_unix_timestamp(manifest.taken_at).unwrap_or(UtcDateTime::UNIX_EPOCH),
        seq: head.seq,
        unlock: settings.unlock,
    };
    // Last: a directory without settings does not count.
    state.write_settings(&Settings {
        incarnation: settings.incarnation.saturating_add(1),
        crl_number_floor: Some(crl_number_floor(clock.utc_now()).max(settings.crl_number_floor.unwrap_or(0))),
        ..settings
    })?;
    Ok(summary)
}

/// Lets the journal begin where the backed-up one did.
fn begin(
    beginning: &Beginning,
    state: &StateDir,
    store: &mut Store,
    refused: impl Fn(BackupError) -> StartupError,
) -> Result<(), StartupError> {
    store.journal.begin_after(&beginning.base, &beginning.kept).map_err(|error| match error {
        BeginError::NotEmpty => StartupError::StateExists { path: state.root().into() },
        BeginError::Kept { .. } => refused(BackupError::Malformed("its kept records")),
        BeginError::Io { path, source } => StartupError::io("write", &path, source),
    })
}

/// Writes down what stands in for the records that are gone. A controller must be able to start from it.
fn take_world(
    beginning: &Beginning,
    state: &StateDir,
    store: &Store,
    refused: impl Fn(BackupError) -> StartupError,
) -> Result<(), StartupError> {
    let written = store.snapshots.write(&beginning.world);
    written.map_err(|error| StartupError::internal("cannot write a snapshot", error))?;
    let loaded = load_world(state, &store.journal, &store.snapshots);
    match loaded.is_ok_and(|(world, _)| world.mesh().is_some()) {
        true => Ok(()),
        false => Err(refused(BackupError::Malformed("its World"))),
    }
}

/// Appends all records; their hashes are made anew, so that the head proves them.
fn replay<R: Read>(
    config: &RestoreConfig,
    opened: &mut Opened<R>,
    state: &StateDir,
    store: &mut Store,
) -> Result<Head, StartupError> {
    let refused = |source| StartupError::Backup { path: config.backup.clone(), source };
    let mut head = store.journal.head();
    loop {
        let (mut batch, mut bytes) = (Vec::new(), 0);
        while batch.len() < BATCH_RECORDS && bytes < BATCH_BYTES {
            let Some(record) = opened.next_record().map_err(refused)? else { break };
            bytes += record.bytes.len();
            batch.push(record);
        }
        if batch.is_empty() {
            return Ok(head);
        }
        head = match store.journal.append(&head, &batch) {
            Ok(Append::Appended { head }) => head,
            Ok(Append::Conflict { .. }) => {
                return Err(StartupError::StateExists { path: state.root().into() });
            }
            Ok(Append::Unknown { source }) => return Err(StartupError::io("sync", state.root(), source)),
            Err(mesh_store::AppendError::Full { .. }) => {
                return Err(StartupError::DiskFull { path: state.root().into() });
            }
            Err(error) => return Err(StartupError::internal("cannot write the journal", error)),
        };
    }
}
