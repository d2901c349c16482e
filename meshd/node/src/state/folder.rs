//! Opening the folder, and reading and replacing files in it.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mesh_proto::v1::ErrorCode;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag};

use crate::failure::Failure;
use crate::limits::STATE_FILE_BYTES_MAX;

/// What this program writes and the newest it reads.
const FORMAT_VERSION: u32 = 1;
const VERSION_FILE: &str = "version";
const LOCK_FILE: &str = "lock";

/// Why the state folder cannot be used. Nothing in it has been changed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StateError {
    #[error("state folder {path} is in use by another meshd")]
    InUse { path: PathBuf },
    #[error("{path} has mode {mode:04o} and may be read by others")]
    Permissions { path: PathBuf, mode: u32 },
    #[error("{path} belongs to uid {owner}, not to uid {us}")]
    Owner { path: PathBuf, owner: u32, us: u32 },
    #[error("{path} is not a plain folder or file")]
    Kind { path: PathBuf },
    #[error("state folder {path} cannot be written")]
    ReadOnly { path: PathBuf },
    #[error("state folder {path} has format {found}, this meshd knows {FORMAT_VERSION}")]
    NewerVersion { path: PathBuf, found: u32 },
    #[error("{path} cannot be understood: {what}")]
    Corrupt { path: PathBuf, what: String },
    #[error("no space left to write {path}")]
    DiskFull { path: PathBuf },
    #[error("cannot {action} {path}")]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl From<StateError> for Failure {
    fn from(error: StateError) -> Self {
        use ErrorCode as C;
        let (code, next) = match &error {
            StateError::InUse { .. } => (
                C::StateInUse,
                "stop the other meshd, or give this one its own --state-dir and --socket".to_owned(),
            ),
            StateError::Permissions { path, .. } => {
                (C::StatePermissions, format!("check who could read it, then `chmod go= {}`", path.display()))
            }
            StateError::Owner { path, us, .. } => (
                C::StatePermissions,
                format!("run meshd as its owner, or `chown -R {us} {}`", path.display()),
            ),
            StateError::Kind { path } => {
                (C::StatePermissions, format!("replace {} by a real folder or file", path.display()))
            }
            StateError::ReadOnly { path } => {
                (C::StateReadOnly, format!("make {} writable, or choose another --state-dir", path.display()))
            }
            StateError::NewerVersion { .. } => {
                (C::StateNewerVersion, "start the newer meshd that wrote it".to_owned())
            }
            StateError::Corrupt { path, .. } => (
                C::StateCorrupt,
                format!("restore {} from a backup, or move it away and enroll again", path.display()),
            ),
            StateError::DiskFull { .. } => (C::DiskFull, "free some space and try again".to_owned()),
            StateError::Io { path, .. } => {
                (C::StateCorrupt, format!("check the disk and the folder of {}", path.display()))
            }
        };
        let why = mesh_runtime::chain(&error);
        Failure::new(code, why, next)
    }
}

/// The open, locked state folder. Clones share the lock; it ends with the last of them.
#[derive(Debug, Clone)]
pub(crate) struct StateDir {
    path: PathBuf,
    _lock: Arc<Flock<File>>,
}

impl StateDir {
    /// Opens the folder, making it if it is missing.
    ///
    /// # Errors
    /// Each variant of [`StateError`] but `Kind` on files; nothing in the folder has been changed.
    pub(crate) fn open(path: &Path) -> Result<Self, StateError> {
        let made = match DirBuilder::new().recursive(true).mode(0o700).create(path) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
            Err(error) => Err(io_error("create", path, error)),
        };
        made?;
        check_private(path, true)?;
        let lock = take_lock(path)?;
        let folder = Self { path: path.to_owned(), _lock: Arc::new(lock) };
        folder.check_version()?;
        Ok(folder)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The whole file, `None` if there is none.
    pub(crate) fn read(&self, name: &str) -> Result<Option<Vec<u8>>, StateError> {
        let path = self.path.join(name);
        let flags = (OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC).bits();
        let file = match OpenOptions::new().read(true).custom_flags(flags).open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) if error.raw_os_error() == Some(Errno::ELOOP as i32) => {
                return Err(StateError::Kind { path });
            }
            Err(error) => return Err(io_error("open", &path, error)),
        };
        let metadata = file.metadata().map_err(|error| io_error("look at", &path, error))?;
        if !metadata.is_file() {
            return Err(StateError::Kind { path });
        }
        if metadata.mode() & 0o077 != 0 {
            return Err(StateError::Permissions { path, mode: metadata.mode() & 0o7777 });
        }
        if metadata.len() > STATE_FILE_BYTES_MAX {
            return Err(StateError::Corrupt { path, what: format!("{} bytes long", metadata.len()) });
        }
        let mut bytes = Vec::with_capacity(usize::try_from(metadata.len()).unwrap_or(0));
        file.take(STATE_FILE_BYTES_MAX)
            .read_to_end(&mut bytes)
            .map_err(|error| io_error("read", &path, error))?;
        Ok(Some(bytes))
    }

    /// Replaces the file whole: after a crash it is the old or the new one, and when this returns the
    /// new one is on disk.
    pub(crate) fn write(&self, name: &str, bytes: &[u8]) -> Result<(), StateError> {
        let path = self.path.join(name);
        let temporary = self.path.join(format!(".{name}.new"));
        let written = (|| {
            match std::fs::remove_file(&temporary) {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
            let flags = (OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC).bits();
            let mut file = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .custom_flags(flags)
                .open(&temporary)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            std::fs::rename(&temporary, &path)?;
            self.sync_folder()
        })();
        written.map_err(|error| {
            // A half-written temporary file must not eat the space that is lacking.
            let _ = std::fs::remove_file(&temporary);
            io_error("write", &path, error)
        })
    }

    /// Removes the file for good; no error if there is none.
    pub(crate) fn remove(&self, name: &str) -> Result<(), StateError> {
        let path = self.path.join(name);
        match std::fs::remove_file(&path) {
            Ok(()) => self.sync_folder().map_err(|error| io_error("sync", &self.path, error)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            Err(error) => Err(io_error("remove", &path, error)),
        }
    }

    /// As [`read`](Self::read), parsed.
    pub(crate) fn read_json<T: serde::de::DeserializeOwned>(
        &self,
        name: &str,
    ) -> Result<Option<T>, StateError> {
        let Some(bytes) = self.read(name)? else { return Ok(None) };
        let bytes = zeroize::Zeroizing::new(bytes);
        serde_json::from_slice(&bytes)
            .map(Some)
            // The text of a JSON error may quote the file, which may hold a key.
            .map_err(|error| StateError::Corrupt {
                path: self.path.join(name),
                what: format!("line {}, column {}", error.line(), error.column()),
            })
    }

    /// As [`write`](Self::write), with `value` as JSON.
    pub(crate) fn write_json<T: serde::Serialize>(&self, name: &str, value: &T) -> Result<(), StateError> {
        let bytes = serde_json::to_vec_pretty(value)
            .map(zeroize::Zeroizing::new)
            .map_err(|error| StateError::Corrupt { path: self.path.join(name), what: error.to_string() })?;
        self.write(name, &bytes)
    }

    fn sync_folder(&self) -> io::Result<()> {
        File::open(&self.path)?.sync_all()
    }

    fn check_version(&self) -> Result<(), StateError> {
        let path = self.path.join(VERSION_FILE);
        let Some(bytes) = self.read(VERSION_FILE)? else {
            return self.write(VERSION_FILE, format!("{FORMAT_VERSION}\n").as_bytes());
        };
        let found = std::str::from_utf8(&bytes).ok().and_then(|text| text.trim().parse::<u32>().ok());
        match found {
            Some(FORMAT_VERSION) => Ok(()),
            Some(found) if found > FORMAT_VERSION => {
                Err(StateError::NewerVersion { path: self.path.clone(), found })
            }
            _ => Err(StateError::Corrupt { path, what: "not a version number".to_owned() }),
        }
    }
}

fn check_private(path: &Path, folder: bool) -> Result<(), StateError> {
    let metadata = std::fs::symlink_metadata(path).map_err(|error| io_error("look at", path, error))?;
    if metadata.is_dir() != folder || metadata.is_symlink() {
        return Err(StateError::Kind { path: path.to_owned() });
    }
    let us = nix::unistd::geteuid().as_raw();
    if metadata.uid() != us {
        return Err(StateError::Owner { path: path.to_owned(), owner: metadata.uid(), us });
    }
    if metadata.mode() & 0o077 != 0 {
        return Err(StateError::Permissions { path: path.to_owned(), mode: metadata.mode() & 0o7777 });
    }
    Ok(())
}

fn take_lock(folder: &Path) -> Result<Flock<File>, StateError> {
    let path = folder.join(LOCK_FILE);
    let flags = (OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC).bits();
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(flags)
        .open(&path)
        .map_err(|error| io_error("open", &path, error))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        Errno::EWOULDBLOCK => StateError::InUse { path: folder.to_owned() },
        errno => io_error("lock", &path, errno.into()),
    })
}

fn io_error(action: &'static str, path: &Path, source: io::Error) -> StateError {
    let path = path.to_owned();
    match source.kind() {
        ErrorKind::ReadOnlyFilesystem | ErrorKind::PermissionDenied => StateError::ReadOnly { path },
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => StateError::DiskFull { path },
        _ => StateError::Io { action, path, source },
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn folder() -> (tempfile::TempDir, PathBuf) {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("state");
        (parent, path)
    }

    fn chmod(path: &Path, mode: u32) {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_new_folder_is_private_and_a_second_open_is_refused() {
        let (_parent, path) = folder();
        let first = StateDir::open(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, 0o700);
        assert!(matches!(StateDir::open(&path), Err(StateError::InUse { .. })));
        drop(first);
        StateDir::open(&path).unwrap();
    }

    #[test]
    fn what_others_may_read_is_refused() {
        let (_parent, path) = folder();
        let state = StateDir::open(&path).unwrap();
        state.write("identity", b"secret").unwrap();
        assert_eq!(std::fs::metadata(path.join("identity")).unwrap().mode() & 0o7777, 0o600);
        chmod(&path.join("identity"), 0o640);
        assert!(matches!(state.read("identity"), Err(StateError::Permissions { mode: 0o640, .. })));
        drop(state);
        chmod(&path, 0o750);
        assert!(matches!(StateDir::open(&path), Err(StateError::Permissions { mode: 0o750, .. })));
    }

    #[test]
    fn links_are_not_followed() {
        let (parent, path) = folder();
        let state = StateDir::open(&path).unwrap();
        std::os::unix::fs::symlink("/etc/hostname", path.join("map")).unwrap();
        assert!(matches!(state.read("map"), Err(StateError::Kind { .. })));
        let link = parent.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(matches!(StateDir::open(&link), Err(StateError::Kind { .. })));
    }

    #[test]
    fn a_newer_or_garbled_version_is_refused_and_left_alone() {
        for (text, newer) in [("2\n", true), ("one", false), ("", false)] {
            let (_parent, path) = folder();
            drop(StateDir::open(&path).unwrap());
            std::fs::write(path.join(VERSION_FILE), text).unwrap();
            let error = StateDir::open(&path).unwrap_err();
            assert_eq!(matches!(error, StateError::NewerVersion { found: 2, .. }), newer, "{text:?}");
            assert_eq!(matches!(error, StateError::Corrupt { .. }), !newer, "{text:?}");
            assert_eq!(std::fs::read_to_string(path.join(VERSION_FILE)).unwrap(), text);
        }
    }

    #[test]
    fn a_file_is_replaced_whole_under_the_eyes_of_a_reader() {
        let (_parent, path) = folder();
        let state = StateDir::open(&path).unwrap();
        state.write("map", &[0; 4096]).unwrap();
        let reader = std::thread::spawn({
            let path = path.join("map");
            move || {
                for _ in 0..2000 {
                    let bytes = std::fs::read(&path).unwrap();
                    assert_eq!(bytes.len(), 4096);
                    assert!(bytes.iter().all(|byte| *byte == bytes[0]), "a mixed file was read");
                }
            }
        });
        for round in 1..60u8 {
            state.write("map", &[round; 4096]).unwrap();
        }
        reader.join().unwrap();
        state.remove("map").unwrap();
        state.remove("map").unwrap();
        assert!(state.read("map").unwrap().is_none());
    }

    #[test]
    fn a_parse_error_does_not_quote_the_file() {
        let (_parent, path) = folder();
        let state = StateDir::open(&path).unwrap();
        state.write("identity", br#"{"key": "hunter2", oops"#).unwrap();
        let error = state.read_json::<serde_json::Value>("identity").unwrap_err();
        assert!(!error.to_string().contains("hunter2"), "{error}");
    }
}
