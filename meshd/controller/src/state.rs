//! The controller's directory on disk: who may enter, who holds it, what lies where.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use mesh_store::journal::JournalError;
use mesh_store::{OpenError, StateError, Store, StoreOptions};
use serde::{Deserialize, Serialize};

use crate::config::Unlock;
use crate::error::StartupError;

const DIRECTORY_MODE: u32 = 0o700;
const FILE_MODE: u32 = 0o600;

/// What `init` decided for good, in `controller.toml`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Settings {
    pub(crate) name: String,
    pub(crate) unlock: Unlock,
    pub(crate) advertise: Vec<String>,
    /// Base address of published CRLs, unless `run` is told another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) publish_url: Option<String>,
    /// The token that keeps the issuing CA's key, a `pkcs11:` URI.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) key_store: Option<String>,
    /// No CRL has a lower number: CRLs of a future that a restore took back, or of a CA's time elsewhere, are about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) crl_number_floor: Option<u64>,
    /// Rises at each restore from a backup, so that cursors of a lost future are not taken up.
    pub(crate) incarnation: u32,
}

/// The controller's part of an open state directory; the store holds its lock.
#[derive(Debug, Clone)]
pub(crate) struct StateDir {
    root: PathBuf,
}

/// What `init` writes last: a directory without it does not count.
const SETTINGS_FILE: &str = "controller.toml";

impl StateDir {
    /// Makes the directory, with mode 0700, and opens its store.
    ///
    /// # Errors
    /// [`StartupError::StateExists`] if anything is there already; it is not touched.
    pub(crate) fn create(root: &Path) -> Result<(Self, Store), StartupError> {
        DirBuilder::new().mode(DIRECTORY_MODE).create(root).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => StartupError::StateExists { path: root.into() },
            _ => StartupError::io("create", root, error),
        })?;
        let store = open_store(root)?;
        for folder in ["keys", "crl"] {
            let path = root.join(folder);
            DirBuilder::new()
                .mode(DIRECTORY_MODE)
                .create(&path)
                .map_err(|error| StartupError::io("create", &path, error))?;
        }
        if let Some(parent) = root.parent().filter(|path| !path.as_os_str().is_empty()) {
            sync_folder(parent).map_err(|error| StartupError::io("sync", parent, error))?;
        }
        Ok((Self { root: root.into() }, store))
    }

    /// Opens an existing directory and its store.
    ///
    /// # Errors
    /// Missing, unfinished, readable by others, newer, read-only, in use, damaged: each its own
    /// variant. Nothing is changed in any of these cases.
    pub(crate) fn open(root: &Path) -> Result<(Self, Store), StartupError> {
        check_folder(root)?;
        if !root.join(SETTINGS_FILE).is_file() {
            return Err(StartupError::StateNotFound { path: root.into() });
        }
        check_tree(root, 0)?;
        let store = open_store(root)?;
        Ok((Self { root: root.into() }, store))
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn keys(&self) -> PathBuf {
        self.root.join("keys")
    }

    pub(crate) fn crls(&self) -> PathBuf {
        self.root.join("crl")
    }

    pub(crate) fn settings(&self) -> Result<Settings, StartupError> {
        let path = self.root.join(SETTINGS_FILE);
        let text = fs::read_to_string(&path).map_err(|error| StartupError::io("read", &path, error))?;
        toml::from_str(&text).map_err(|error| StartupError::StateCorrupt {
            path: self.root.clone(),
            what: "controller.toml cannot be read".into(),
            source: Some(error.into()),
        })
    }

    pub(crate) fn write_settings(&self, settings: &Settings) -> Result<(), StartupError> {
        let text = toml::to_string(settings)
            .map_err(|error| StartupError::internal("cannot encode the settings", error))?;
        self.write(SETTINGS_FILE, text.as_bytes())
    }

    /// Replaces `name` below the directory: temporary file, fsync, rename, fsync of the folder.
    pub(crate) fn write(&self, name: &str, bytes: &[u8]) -> Result<(), StartupError> {
        let path = self.root.join(name);
        replace_file(&path, bytes).map_err(|error| StartupError::io("write", &path, error))
    }
}

/// Replaces `path` by `bytes` with mode 0600, so that a crash leaves the old or the new content.
pub(crate) fn replace_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let temporary = PathBuf::from(temporary);
    // A leftover of a crash would keep its mode, so it goes first.
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(FILE_MODE).open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    sync_folder(folder)
}

/// Reads a file of at most `limit` octets.
pub(crate) fn read_file(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(bytes)
}

fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

fn check_folder(root: &Path) -> Result<(), StartupError> {
    let metadata = fs::symlink_metadata(root).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
            StartupError::StateNotFound { path: root.into() }
        }
        _ => StartupError::io("open", root, error),
    })?;
    if metadata.is_symlink() {
        return Err(StartupError::StateSymlink { path: root.into() });
    }
    if !metadata.is_dir() {
        return Err(StartupError::StateNotFound { path: root.into() });
    }
    check_mode(root, &metadata)
}

fn check_mode(path: &Path, metadata: &fs::Metadata) -> Result<(), StartupError> {
    let allowed = if metadata.is_dir() { DIRECTORY_MODE } else { FILE_MODE };
    let mode = metadata.mode() & 0o7777;
    if mode & !allowed & 0o077 != 0 {
        return Err(StartupError::StatePermissions { path: path.into(), mode, allowed });
    }
    let own = nix::unistd::geteuid().as_raw();
    if metadata.uid() != own {
        return Err(StartupError::StateOwner { path: path.into(), owner: metadata.uid(), own });
    }
    Ok(())
}

/// Levels below the state directory that are looked at; our own layout has two.
const TREE_DEPTH_MAX: u32 = 4;

fn check_tree(folder: &Path, depth: u32) -> Result<(), StartupError> {
    let entries = fs::read_dir(folder).map_err(|error| StartupError::io("list", folder, error))?;
    for entry in entries {
        let path = entry.map_err(|error| StartupError::io("list", folder, error))?.path();
        let metadata = match fs::symlink_metadata(&path) {
            // A controller that runs here replaces files; its lock is found next.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            other => other.map_err(|error| StartupError::io("look at", &path, error))?,
        };
        if metadata.is_symlink() {
            return Err(StartupError::StateSymlink { path });
        }
        // The index may be lost at any time, and a library makes its files with modes of its own; the
        // directory above keeps others out.
        if depth == 0 && path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"index")) {
            continue;
        }
        check_mode(&path, &metadata)?;
        if metadata.is_dir() && depth < TREE_DEPTH_MAX {
            check_tree(&path, depth + 1)?;
        }
    }
    Ok(())
}

/// Octets that the files of a folder take on disk. A file that goes meanwhile counts as none.
pub(crate) fn room_taken(folder: &Path, depth: u32) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    let sizes = entries.filter_map(Result::ok).map(|entry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() && depth < TREE_DEPTH_MAX => room_taken(&entry.path(), depth + 1),
        // Blocks of 512 octets, whatever the file system's own are (stat(2)).
        Ok(metadata) => metadata.blocks() * 512,
        Err(_) => 0,
    });
    sizes.sum()
}

fn open_store(root: &Path) -> Result<Store, StartupError> {
    Store::open(root, StoreOptions::default()).map_err(|error| store_error(root, error))
}

/// A store that does not open, sorted by what a person would do about it.
fn store_error(root: &Path, error: OpenError) -> StartupError {
    let path = root.to_path_buf();
    match error {
        OpenError::State(StateError::InUse { .. }) => StartupError::StateInUse { path },
        OpenError::State(StateError::Newer { found, supported, .. }) => {
            StartupError::StateNewer { path, found, known: supported }
        }
        OpenError::State(StateError::Mode { path, mode }) => {
            StartupError::StatePermissions { path, mode, allowed: DIRECTORY_MODE }
        }
        OpenError::State(StateError::ReadOnly { path }) => {
            StartupError::StateReadOnly { path, source: io::ErrorKind::ReadOnlyFilesystem.into() }
        }
        OpenError::State(StateError::Io { attempt, path, source })
        | OpenError::Journal(JournalError::Io { attempt, path, source }) => {
            StartupError::io(attempt, path, source)
        }
        other => {
            StartupError::StateCorrupt { path, what: mesh_runtime::chain(&other), source: Some(other.into()) }
        }
    }
}
