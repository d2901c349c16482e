//! Why the controller does not start, or had to stop.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use mesh_pkcs11::TokenError;
use mesh_proto::v1::ErrorCode;

use crate::backup::BackupError;
use crate::import::ImportProblem;

type Source = Box<dyn std::error::Error + Send + Sync>;

/// Why `init` or `run` ended. Printed by the daemon as `error[E0xxx]`, `why`, `do`.
#[derive(Debug, thiserror::Error)]
pub enum StartupError {
    #[error("state directory {} exists already", .path.display())]
    StateExists { path: PathBuf },
    #[error("state directory {} does not hold a controller", .path.display())]
    StateNotFound { path: PathBuf },
    #[error("state directory {} is in use by another process", .path.display())]
    StateInUse { path: PathBuf },
    #[error("{} has mode {mode:04o}, at most {allowed:04o} is accepted", .path.display())]
    StatePermissions { path: PathBuf, mode: u32, allowed: u32 },
    #[error("{} belongs to uid {owner}, not to uid {own}", .path.display())]
    StateOwner { path: PathBuf, owner: u32, own: u32 },
    #[error("{} is a symbolic link", .path.display())]
    StateSymlink { path: PathBuf },
    #[error("{} cannot be written", .path.display())]
    StateReadOnly {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("state directory {} has version {found}, this program knows {known}", .path.display())]
    StateNewer { path: PathBuf, found: u32, known: u32 },
    #[error("state directory {} is damaged: {what}", .path.display())]
    StateCorrupt {
        path: PathBuf,
        what: String,
        #[source]
        source: Option<Source>,
    },
    #[error("cannot {action} {}", .path.display())]
    StateIo {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("disk is full under {}", .path.display())]
    DiskFull { path: PathBuf },
    #[error("the CA's keys are sealed and no passphrase was given")]
    PassphraseMissing,
    #[error("the passphrase does not open the CA's keys")]
    PassphraseWrong,
    #[error("{} is not the key it should be: {what}", .path.display())]
    CaKeyMismatch { path: PathBuf, what: String },
    #[error("{} asks for less work per guess of the passphrase than this program ever does", .path.display())]
    SealedKeyCost {
        path: PathBuf,
        #[source]
        source: mesh_ca::SealError,
    },
    #[error(transparent)]
    Import { problem: ImportProblem },
    #[error("the CA's key is in a hardware token and no PIN was given")]
    PinMissing,
    #[error("the hardware token with the CA's key cannot be used")]
    Hardware {
        #[source]
        source: TokenError,
    },
    #[error("{} cannot be restored", .path.display())]
    Backup {
        path: PathBuf,
        #[source]
        source: BackupError,
    },
    #[error("{address} is in use")]
    PortInUse { address: SocketAddr },
    #[error("cannot listen on {address}")]
    Listen {
        address: String,
        #[source]
        source: io::Error,
    },
    #[error("{key}: {problem}")]
    Config { key: &'static str, problem: String },
    #[error("{what}")]
    Internal {
        what: String,
        #[source]
        source: Option<Source>,
    },
}

impl StartupError {
    /// The stable number people look up.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::StateExists { .. } => ErrorCode::StateExists,
            Self::StateNotFound { .. } => ErrorCode::StateNotFound,
            Self::StateInUse { .. } => ErrorCode::StateInUse,
            Self::StatePermissions { .. } | Self::StateOwner { .. } | Self::StateSymlink { .. } => {
                ErrorCode::StatePermissions
            }
            Self::StateReadOnly { .. } => ErrorCode::StateReadOnly,
            Self::StateNewer { .. } => ErrorCode::StateNewerVersion,
            Self::StateCorrupt { .. } => ErrorCode::StateCorrupt,
            Self::StateIo { .. } | Self::Internal { .. } => ErrorCode::Internal,
            Self::DiskFull { .. } => ErrorCode::DiskFull,
            Self::PassphraseMissing => ErrorCode::PassphraseMissing,
            Self::PassphraseWrong => ErrorCode::PassphraseWrong,
            Self::CaKeyMismatch { .. } => ErrorCode::CaKeyMismatch,
            Self::SealedKeyCost { .. } => ErrorCode::SealedKeyCost,
            Self::Import { problem } => problem.code(),
            Self::PinMissing => ErrorCode::PinMissing,
            Self::Hardware { source: TokenError::WrongPin | TokenError::PinLocked } => ErrorCode::PinWrong,
            Self::Hardware { source: TokenError::Generate(_) | TokenError::Unsupported { .. } } => {
                ErrorCode::ConfigInvalid
            }
            Self::Hardware { .. } => ErrorCode::TokenUnavailable,
            Self::Backup { source: BackupError::Passphrase, .. } => ErrorCode::PassphraseWrong,
            Self::Backup { source: BackupError::Io(error), .. }
                if error.kind() == io::ErrorKind::NotFound =>
            {
                ErrorCode::StateNotFound
            }
            Self::Backup { .. } => ErrorCode::BackupRefused,
            Self::PortInUse { .. } | Self::Listen { .. } => ErrorCode::PortInUse,
            Self::Config { .. } => ErrorCode::ConfigInvalid,
        }
    }

    /// One sentence: what to do about it.
    pub fn next(&self) -> String {
        match self {
            Self::StateExists { path } => format!(
                "run `meshd controller run --state-dir {0}` to start it, or name another directory; {0} was not touched",
                path.display()
            ),
            Self::StateNotFound { path } => {
                format!("run `meshd controller init --state-dir {} --domain DOMAIN`", path.display())
            }
            Self::StateInUse { .. } => {
                "stop the other controller, or give this one its own --state-dir".into()
            }
            Self::StatePermissions { path, allowed, .. } => {
                format!("find out who could read it, then `chmod {allowed:04o} {}`", path.display())
            }
            Self::StateOwner { path, own, .. } => {
                format!("run as the owner, or `chown -R {own} {}`", path.display())
            }
            Self::StateSymlink { path } => {
                format!("name the real directory; {} is not followed", path.display())
            }
            Self::StateReadOnly { path, .. } => {
                format!("make {} writable for this user; is the file system mounted read-only?", path.display())
            }
            Self::StateNewer { .. } => {
                "start the newer program that wrote it, or restore a backup made by this one; nothing was changed".into()
            }
            Self::StateCorrupt { .. } => {
                "nothing was changed; restore the newest backup, and keep this directory for a look at what happened".into()
            }
            Self::DiskFull { .. } => "free some space, then start again; nothing was lost".into(),
            Self::PassphraseMissing => {
                "give --passphrase-file FILE, MESH_PASSPHRASE_FILE or the credential `mesh-passphrase`".into()
            }
            Self::PassphraseWrong => {
                "check the passphrase file; the passphrase was chosen at `meshd controller init`".into()
            }
            Self::CaKeyMismatch { .. } => {
                "put the right key file back from a backup; nothing was signed".into()
            }
            Self::SealedKeyCost { .. } => {
                "put the key file back from a backup: somebody changed it; nothing was signed".into()
            }
            Self::Import { problem } => problem.next().into(),
            Self::PinMissing => {
                "give --pin-file FILE, MESH_PIN_FILE, the credential `mesh-pin`, or pin-source in --key-store".into()
            }
            Self::Hardware { source: TokenError::WrongPin } => {
                "check the PIN; each wrong one costs one of the token's tries; nothing was signed".into()
            }
            Self::Hardware { source: TokenError::PinLocked } => {
                "unlock the token with its security officer's PIN; nothing was signed".into()
            }
            Self::Hardware { source: TokenError::NoKey(_) } => {
                "plug in the token that was there at init; the key is in no other place".into()
            }
            Self::Hardware { source: TokenError::Generate(_) | TokenError::Unsupported { .. } } => {
                "choose another with --key-type, or another token; nothing was made".into()
            }
            Self::Hardware { .. } => {
                "plug the token in, and check module path and label in --key-store; nothing was signed".into()
            }
            Self::Backup { source: BackupError::Passphrase, .. } => {
                "check the passphrase of the backup, then its copy: a changed byte looks the same".into()
            }
            Self::Backup { .. } => "take another copy or an older backup; nothing was made".into(),
            Self::PortInUse { .. } => {
                "stop what listens there (`ss -ltnp`), or give --listen another port".into()
            }
            Self::Listen { .. } => "check --listen and --socket".into(),
            Self::Config { .. } => "correct it; `meshd controller config check` reads it without starting".into(),
            Self::StateIo { .. } | Self::Internal { .. } => {
                "see the lines above for the cause; if they do not explain it, this is a bug".into()
            }
        }
    }

    /// The process's exit code.
    pub fn exit(&self) -> u8 {
        self.code().exit() as u8
    }

    /// Why, below the first line: the chain of causes, or a sentence of our own.
    pub fn why(&self) -> String {
        let mut source = std::error::Error::source(self);
        let mut causes = Vec::new();
        while let Some(cause) = source {
            causes.push(cause.to_string());
            source = cause.source();
        }
        if !causes.is_empty() {
            return causes.join(": ");
        }
        match self {
            Self::StateExists { .. } => "init never writes into a directory that is there".into(),
            Self::StateNotFound { .. } => "it is missing, or init did not finish".into(),
            Self::StateInUse { .. } => "two controllers on one journal would contradict each other".into(),
            Self::StatePermissions { .. } => "others on this machine could read or change CA state".into(),
            Self::StateOwner { .. } => "somebody else could change it at any time".into(),
            Self::StateSymlink { .. } => "a link could be turned to another place".into(),
            Self::StateNewer { .. } => "an older program could misread what a newer one wrote".into(),
            Self::DiskFull { .. } => "nothing is acknowledged before it is on disk".into(),
            Self::PassphraseMissing => "only the passphrase opens them".into(),
            Self::PassphraseWrong => "the sealed keys failed authentication".into(),
            Self::PinMissing => "only its PIN makes the token sign".into(),
            Self::Import { .. } => "nothing was made".into(),
            Self::PortInUse { .. } => "another process listens on that port".into(),
            Self::Config { .. } => {
                "it is checked before anything is made or opened; nothing was changed".into()
            }
            _ => self.to_string(),
        }
    }

    /// An I/O failure under the state directory, sorted by what a person would do about it.
    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>, source: io::Error) -> Self {
        let path = path.into();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::DiskFull { path },
            io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied => {
                Self::StateReadOnly { path, source }
            }
            _ => Self::StateIo { action, path, source },
        }
    }

    pub(crate) fn internal(what: impl Into<String>, source: impl Into<Source>) -> Self {
        Self::Internal { what: what.into(), source: Some(source.into()) }
    }
}
