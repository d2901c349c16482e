use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io,
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::disk;

/// Version of the layout of the state directory; a newer program may read an older one.
pub const STATE_FORMAT_VERSION: u32 = 1;
const FORMAT_FILE: &str = "format";
const FORMAT_NAME: &str = "meshd-state";
const FORMAT_BYTES_MAX: u64 = 256;
const LOCK_FILE: &str = "lock";
/// Mode bits that let others in.
const OTHERS: u32 = 0o077;

/// The state directory, ours alone until the last clone is dropped.
#[derive(Debug, Clone)]
pub struct StateDir {
    path: PathBuf,
    _lock: Arc<Lock>,
}

/// The locked file. Unlocked and not only closed: a child that another thread is about to start holds the open file too,
/// until it executes its program.
#[derive(Debug)]
struct Lock(File);

impl Drop for Lock {
    fn drop(&mut self) {
        // An error leaves what closing does.
        let _ = self.0.unlock();
    }
}

/// Why the state directory was not opened. Nothing in it was changed.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("state is in use: another process holds {}", path.display())]
    InUse { path: PathBuf },
    #[error("state {} has format {found}; this program knows up to {supported}", path.display())]
    Newer { path: PathBuf, found: u32, supported: u32 },
    #[error("{} does not name a state format", path.display())]
    Format { path: PathBuf },
    #[error("{} holds state but no format file", path.display())]
    FormatMissing { path: PathBuf },
    #[error("state {} is open to others (mode {mode:04o}); make it 0700", path.display())]
    Mode { path: PathBuf, mode: u32 },
    #[error("state {} is read-only", path.display())]
    ReadOnly { path: PathBuf },
    #[error("cannot {attempt} {}", path.display())]
    Io { attempt: &'static str, path: PathBuf, source: io::Error },
}

impl StateDir {
    /// Opens the directory, making it if its parent exists, and locks it.
    ///
    /// # Errors
    /// [`StateError::InUse`] at once if another process has it; [`StateError::Newer`] if a newer
    /// program wrote it; [`StateError::Mode`] if group or others may enter it.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, StateError> {
        let path = path.into();
        disk::ensure_folder(&path).map_err(|source| failed("make", &path, source))?;
        let metadata = fs::metadata(&path).map_err(|source| failed("read", &path, source))?;
        let mode = metadata.permissions().mode() & 0o7777;
        if mode & OTHERS != 0 {
            return Err(StateError::Mode { path, mode });
        }
        // Before the lock, which makes a file: what a newer program wrote stays as it is.
        let formatted = check_format(&path)?;
        let lock = lock(&path)?;
        if !formatted && !check_format(&path)? {
            write_format(&path)?;
        }
        Ok(Self { path, _lock: Arc::new(lock) })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A folder in the state directory, made if need be.
    ///
    /// # Errors
    /// [`StateError::Io`] or [`StateError::ReadOnly`] if it cannot be made.
    pub fn folder(&self, name: &str) -> Result<PathBuf, StateError> {
        let path = self.path.join(name);
        disk::ensure_folder(&path).map_err(|source| failed("make", &path, source))?;
        Ok(path)
    }
}

fn lock(state: &Path) -> Result<Lock, StateError> {
    let path = state.join(LOCK_FILE);
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
    let file = file.map_err(|source| failed("open", &path, source))?;
    match file.try_lock() {
        Ok(()) => Ok(Lock(file)),
        Err(TryLockError::WouldBlock) => Err(StateError::InUse { path: state.to_owned() }),
        Err(TryLockError::Error(source)) => Err(failed("lock", &path, source)),
    }
}

/// Whether the format file is there; fails unless it names a version we know.
fn check_format(state: &Path) -> Result<bool, StateError> {
    let path = state.join(FORMAT_FILE);
    match fs::metadata(&path) {
        Ok(metadata) if metadata.len() > FORMAT_BYTES_MAX => return Err(StateError::Format { path }),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(source) => return Err(failed("read", &path, source)),
    }
    let bytes = fs::read(&path).map_err(|source| failed("read", &path, source))?;
    let Some(found) = parse_format(&bytes) else { return Err(StateError::Format { path }) };
    if found > STATE_FORMAT_VERSION {
        return Err(StateError::Newer { path: state.to_owned(), found, supported: STATE_FORMAT_VERSION });
    }
    Ok(true)
}

fn parse_format(bytes: &[u8]) -> Option<u32> {
    let (name, version) = std::str::from_utf8(bytes).ok()?.trim_end().split_once(' ')?;
    (name == FORMAT_NAME).then(|| version.parse().ok())?
}

/// Marks a new state directory as ours; one that already holds something else of ours is not new.
fn write_format(state: &Path) -> Result<(), StateError> {
    if state.join(crate::store::JOURNAL_FOLDER).exists() {
        return Err(StateError::FormatMissing { path: state.to_owned() });
    }
    let path = state.join(FORMAT_FILE);
    let text = format!("{FORMAT_NAME} {STATE_FORMAT_VERSION}\n");
    disk::replace_file(&path, &[text.as_bytes()]).map_err(|source| failed("write", &path, source))
}

fn failed(attempt: &'static str, path: &Path, source: io::Error) -> StateError {
    match source.kind() {
        io::ErrorKind::ReadOnlyFilesystem => StateError::ReadOnly { path: path.to_owned() },
        _ => StateError::Io { attempt, path: path.to_owned(), source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_that_is_being_started_keeps_nothing_locked() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        let state = StateDir::open(&path).unwrap();
        assert!(matches!(StateDir::open(&path), Err(StateError::InUse { .. })));
        // What a child has between fork and exec: the same open file.
        let of_the_child = state._lock.0.try_clone().unwrap();
        drop(state);
        let reopened = StateDir::open(&path);
        assert!(reopened.is_ok(), "{reopened:?}");
        drop(of_the_child);
    }
}
