//! The folder a service reads its pair from. Four names, more if it asked for other forms, point into `..data`, and
//! `..data` points to one version; one rename swaps all of them.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Component, Path, PathBuf};

use mesh_proto::v1::ErrorCode;
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, readlinkat, renameat};
use nix::sys::stat::{Mode, fchmod, fstatat, mkdirat};
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchown, symlinkat, unlinkat};
use zeroize::Zeroizing;

use super::keystore::{KeyStoreError, KeyStoreOrder};
use crate::failure::Failure;
use crate::limits::KEY_STORE_BYTES_MAX;

/// Says whose folder it is. Its content is the pair's name.
const MARKER: &str = "..meshd";
/// The link that is swapped.
const DATA: &str = "..data";
/// Its successor for a moment.
const DATA_NEW: &str = "..data.new";
/// Begins the name of every version folder.
const VERSION_PREFIX: &str = "..20";

const KEY: &str = "key.pem";
const CERT: &str = "cert.pem";
const CA: &str = "ca.pem";
const CRL: &str = "crl.pem";
const OCSP: &str = "ocsp.der";
/// Key and chain, for HAProxy and others who want one file.
const COMBINED: &str = "combined.pem";
/// Key and chain as PKCS #12.
const P12: &str = "cert.p12";
/// Every name a version may have.
const NAMES: [&str; 7] = [KEY, CERT, CA, CRL, OCSP, COMBINED, P12];

/// What the files hold.
#[derive(Clone)]
pub(crate) struct PairFiles {
    pub(crate) key: Zeroizing<String>,
    /// Leaf first, then the issuing CA.
    pub(crate) cert: String,
    /// Roots only.
    pub(crate) ca: String,
    /// Issuing and root CRLs.
    pub(crate) crl: String,
    /// An OCSP response to staple; the file is there only with one.
    pub(crate) ocsp: Option<Vec<u8>>,
    /// Whether there is a file with key and chain.
    pub(crate) combined: bool,
    pub(crate) p12: Option<KeyStoreOrder>,
}

impl std::fmt::Debug for PairFiles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PairFiles").finish_non_exhaustive()
    }
}

/// Who may read the key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Access {
    /// Permissions of `key.pem`; the other files are for everybody.
    pub(crate) key_mode: u32,
    pub(crate) uid: Option<Uid>,
    pub(crate) gid: Option<Gid>,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum FolderError {
    #[error("{path} is not an absolute path without `..`")]
    Path { path: PathBuf },
    #[error("{path} is a link or no folder")]
    Link { path: PathBuf },
    #[error("{path} is not empty and was not made by meshd")]
    NotOurs { path: PathBuf },
    #[error("{path} holds the pair {owner}")]
    OtherPair { path: PathBuf, owner: String },
    #[error(transparent)]
    KeyStore(KeyStoreError),
    #[error("cannot {action} in {path}")]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl From<FolderError> for Failure {
    fn from(error: FolderError) -> Self {
        let (code, next) = match &error {
            FolderError::Path { .. } => (ErrorCode::Usage, "give the whole path, e.g. --out /etc/nginx/tls"),
            FolderError::Link { .. } => (ErrorCode::DirectoryNotOurs, "give the path the link points to"),
            FolderError::NotOurs { .. } => (ErrorCode::DirectoryNotOurs, "choose an empty or a new folder"),
            FolderError::OtherPair { .. } => {
                (ErrorCode::DirectoryNotOurs, "choose another folder: one folder holds one pair")
            }
            FolderError::KeyStore(_) => (
                ErrorCode::Pkcs12Refused,
                "put the passphrase into the first line of a file that meshd can read, then try again",
            ),
            FolderError::Io { source, .. } => match source.kind() {
                io::ErrorKind::StorageFull => (ErrorCode::DiskFull, "free some space and try again"),
                _ => (ErrorCode::Internal, "check the folder and its rights"),
            },
        };
        let why = mesh_runtime::chain(&error);
        Failure::new(code, why, next)
    }
}

/// An open folder that is ours.
#[derive(Debug)]
pub(crate) struct PairFolder {
    fd: OwnedFd,
    path: PathBuf,
}

impl PairFolder {
    /// Opens `path` for the pair `name`, making what is missing. No link on the way is followed.
    ///
    /// # Errors
    /// [`FolderError::NotOurs`] for a folder with foreign content, [`FolderError::OtherPair`] for another
    /// pair's. Nothing in it has been changed.
    pub(crate) fn open(path: &Path, name: &str) -> Result<Self, FolderError> {
        let fd = open_without_links(path, Missing::Make)?.expect("what is missing was made");
        let folder = Self { fd, path: path.to_owned() };
        if !folder.is_marked(name)? {
            folder.write_file(&folder.fd, MARKER, format!("{name}\n").as_bytes(), 0o644, None, None)?;
        }
        Ok(folder)
    }

    /// Whether [`open`](Self::open) would take `path`; makes and changes nothing.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub(crate) fn check(path: &Path, name: &str) -> Result<(), FolderError> {
        match open_without_links(path, Missing::Leave)? {
            Some(fd) => Self { fd, path: path.to_owned() }.is_marked(name).map(drop),
            None => Ok(()),
        }
    }

    /// `true`: this pair's folder; `false`: empty.
    fn is_marked(&self, name: &str) -> Result<bool, FolderError> {
        match self.read(MARKER)? {
            Some(owner) if owner.trim() == name => Ok(true),
            Some(owner) => {
                Err(FolderError::OtherPair { path: self.path.clone(), owner: owner.trim().to_owned() })
            }
            None if self.names()?.is_empty() => Ok(false),
            None => Err(FolderError::NotOurs { path: self.path.clone() }),
        }
    }

    /// Writes a new version and makes it the current one; the others are removed but for the one it
    /// replaces, so that a reader in between finishes with what it began.
    ///
    /// `version` begins with `..20` (a UTC stamp) and has not been used before.
    pub(crate) fn publish(
        &self,
        files: &PairFiles,
        access: Access,
        version: &str,
    ) -> Result<(), FolderError> {
        debug_assert!(version.starts_with(VERSION_PREFIX));
        let before = self.current()?;
        mkdirat(&self.fd, version, Mode::from_bits_truncate(0o755))
            .map_err(|e| self.io("make a folder", e))?;
        let result = self.fill(files, access, version, before.as_deref());
        if result.is_err() {
            // Whatever was written so far is of no use, and may be a key.
            let _ = self.remove_version(version);
        }
        result?;
        for name in self.names()? {
            let old = name.starts_with(VERSION_PREFIX) && name != version && Some(&name) != before.as_ref();
            if old {
                self.remove_version(&name)?;
            }
        }
        Ok(())
    }

    /// The version in use.
    pub(crate) fn current(&self) -> Result<Option<String>, FolderError> {
        match readlinkat(&self.fd, DATA) {
            Ok(target) => Ok(target.into_string().ok()),
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(self.io("read a link", errno)),
        }
    }

    fn fill(
        &self,
        files: &PairFiles,
        access: Access,
        version: &str,
        before: Option<&str>,
    ) -> Result<(), FolderError> {
        let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_RDONLY;
        let folder =
            openat(&self.fd, version, flags, Mode::empty()).map_err(|e| self.io("open a folder", e))?;
        // mkdir's mode was cut by the umask.
        fchmod(&folder, Mode::from_bits_truncate(0o755)).map_err(|e| self.io("set rights", e))?;
        let Access { key_mode, uid, gid } = access;
        self.write_file(&folder, KEY, files.key.as_bytes(), key_mode, uid, gid)?;
        self.write_file(&folder, CERT, files.cert.as_bytes(), 0o644, uid, gid)?;
        self.write_file(&folder, CA, files.ca.as_bytes(), 0o644, uid, gid)?;
        self.write_file(&folder, CRL, files.crl.as_bytes(), 0o644, uid, gid)?;
        let mut names = vec![KEY, CERT, CA, CRL];
        if let Some(ocsp) = &files.ocsp {
            self.write_file(&folder, OCSP, ocsp, 0o644, uid, gid)?;
            names.push(OCSP);
        }
        if files.combined {
            let text = Zeroizing::new([files.key.as_str(), &files.cert].concat());
            self.write_file(&folder, COMBINED, text.as_bytes(), key_mode, uid, gid)?;
            names.push(COMBINED);
        }
        if let Some(order) = &files.p12 {
            let made = match before.and_then(|before| self.same_key_store(before, files)) {
                Some(made) => made,
                None => order.make().map_err(FolderError::KeyStore)?,
            };
            self.write_file(&folder, P12, &made, key_mode, uid, gid)?;
            names.push(P12);
        }
        sync(&folder).map_err(|source| self.io_std("sync", source))?;
        self.link(version, DATA_NEW)?;
        // Commit point: all files change here.
        renameat(&self.fd, DATA_NEW, &self.fd, DATA).map_err(|e| self.io("swap the pair", e))?;
        for name in NAMES {
            match names.contains(&name) {
                true => self.point_name(name)?,
                false => self.drop_name(name)?,
            }
        }
        sync(&self.fd).map_err(|source| self.io_std("sync", source))
    }

    /// Makes `name` a link into `..data`, whatever it was.
    fn point_name(&self, name: &str) -> Result<(), FolderError> {
        let target = format!("{DATA}/{name}");
        match readlinkat(&self.fd, name) {
            Ok(found) if found == *target => return Ok(()),
            Ok(_) | Err(Errno::ENOENT | Errno::EINVAL) => {}
            Err(errno) => return Err(self.io("read a link", errno)),
        }
        let temporary = format!("..{name}.new");
        self.link(&target, &temporary)?;
        renameat(&self.fd, temporary.as_str(), &self.fd, name).map_err(|e| self.io("name a file", e))
    }

    /// Takes away our link `name`, which leads nowhere any more: a server that is told to staple from it would stop with
    /// an unclear word.
    fn drop_name(&self, name: &str) -> Result<(), FolderError> {
        match readlinkat(&self.fd, name) {
            Ok(_) => {
                unlinkat(&self.fd, name, UnlinkatFlags::NoRemoveDir).map_err(|e| self.io("remove a link", e))
            }
            Err(Errno::ENOENT | Errno::EINVAL) => Ok(()),
            Err(errno) => Err(self.io("read a link", errno)),
        }
    }

    /// The PKCS #12 file of the version before, if that has the same key and chain: deriving its keys anew with each
    /// CRL would cost half a second of a core.
    fn same_key_store(&self, before: &str, files: &PairFiles) -> Option<Zeroizing<Vec<u8>>> {
        let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_RDONLY;
        let folder = openat(&self.fd, before, flags, Mode::empty()).ok()?;
        let read = |name: &str| {
            let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let file = File::from(openat(&folder, name, flags, Mode::empty()).ok()?);
            let mut bytes = Zeroizing::new(Vec::new());
            io::Read::take(file, KEY_STORE_BYTES_MAX).read_to_end(&mut bytes).ok()?;
            Some(bytes)
        };
        let same =
            read(KEY)?.as_slice() == files.key.as_bytes() && read(CERT)?.as_slice() == files.cert.as_bytes();
        read(P12).filter(|made| same && !made.is_empty())
    }

    fn link(&self, target: &str, name: &str) -> Result<(), FolderError> {
        match unlinkat(&self.fd, name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => {}
            Err(errno) => return Err(self.io("remove a link", errno)),
        }
        symlinkat(target, &self.fd, name).map_err(|e| self.io("make a link", e))
    }

    fn write_file(
        &self,
        folder: &OwnedFd,
        name: &str,
        bytes: &[u8],
        mode: u32,
        uid: Option<Uid>,
        gid: Option<Gid>,
    ) -> Result<(), FolderError> {
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        // Closed to others until owner and rights are as asked for.
        let fd = openat(folder, name, flags, Mode::from_bits_truncate(0o600))
            .map_err(|e| self.io("create a file", e))?;
        let mut file = File::from(fd);
        file.write_all(bytes).map_err(|source| self.io_std("write a file", source))?;
        if uid.is_some() || gid.is_some() {
            fchown(&file, uid, gid).map_err(|e| self.io("give a file to its owner", e))?;
        }
        fchmod(&file, Mode::from_bits_truncate(mode)).map_err(|e| self.io("set rights", e))?;
        file.sync_all().map_err(|source| self.io_std("sync", source))
    }

    fn read(&self, name: &str) -> Result<Option<String>, FolderError> {
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        match openat(&self.fd, name, flags, Mode::empty()) {
            Ok(fd) => {
                let text = io::read_to_string(io::Read::take(File::from(fd), 4096))
                    .map_err(|source| self.io_std("read a file", source))?;
                Ok(Some(text))
            }
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(self.io("read a file", errno)),
        }
    }

    fn names(&self) -> Result<Vec<String>, FolderError> {
        let fd = self.fd.try_clone().map_err(|source| self.io_std("list", source))?;
        names_in(fd).map_err(|e| self.io("list", e))
    }

    fn remove_version(&self, version: &str) -> Result<(), FolderError> {
        // A link in place of a version would lead the removal elsewhere.
        let stat = fstatat(&self.fd, version, AtFlags::AT_SYMLINK_NOFOLLOW)
            .map_err(|e| self.io("look at a version", e))?;
        if stat.st_mode & nix::libc::S_IFMT != nix::libc::S_IFDIR {
            return Ok(());
        }
        let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_RDONLY;
        let folder =
            openat(&self.fd, version, flags, Mode::empty()).map_err(|e| self.io("open a version", e))?;
        for name in NAMES {
            match unlinkat(&folder, name, UnlinkatFlags::NoRemoveDir) {
                Ok(()) | Err(Errno::ENOENT) => {}
                Err(errno) => return Err(self.io("remove a file", errno)),
            }
        }
        unlinkat(&self.fd, version, UnlinkatFlags::RemoveDir).map_err(|e| self.io("remove a version", e))
    }

    fn io(&self, action: &'static str, errno: Errno) -> FolderError {
        self.io_std(action, errno.into())
    }

    fn io_std(&self, action: &'static str, source: io::Error) -> FolderError {
        FolderError::Io { action, path: self.path.clone(), source }
    }
}

/// What to do about folders that are not there.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Missing {
    Make,
    Leave,
}

/// Walks from the root one name at a time, so that no link anywhere leads elsewhere. `None` if a folder is
/// missing and shall not be made.
fn open_without_links(path: &Path, missing: Missing) -> Result<Option<OwnedFd>, FolderError> {
    let mut components = path.components();
    if components.next() != Some(Component::RootDir) {
        return Err(FolderError::Path { path: path.to_owned() });
    }
    let failed =
        |action, errno: Errno| FolderError::Io { action, path: path.to_owned(), source: errno.into() };
    let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_RDONLY;
    let mut at = nix::fcntl::open("/", flags, Mode::empty()).map_err(|e| failed("open /", e))?;
    let mut walked = PathBuf::from("/");
    for component in components {
        let Component::Normal(name) = component else {
            return Err(FolderError::Path { path: path.to_owned() });
        };
        walked.push(name);
        let opened = match (openat(&at, name, flags, Mode::empty()), missing) {
            (Err(Errno::ENOENT), Missing::Leave) => return Ok(None),
            (Err(Errno::ENOENT), Missing::Make) => make_folder(&at, name),
            (opened, _) => opened,
        };
        at = match opened {
            Ok(fd) => fd,
            Err(Errno::ELOOP | Errno::ENOTDIR) => return Err(FolderError::Link { path: walked }),
            Err(errno) => return Err(failed("open a folder", errno)),
        };
    }
    Ok(Some(at))
}

/// A folder that services may enter, whatever the daemon's umask; what is in it guards itself.
fn make_folder(at: &OwnedFd, name: &std::ffi::OsStr) -> Result<OwnedFd, Errno> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_RDONLY;
    match mkdirat(at, name, Mode::from_bits_truncate(0o755)) {
        Ok(()) => {
            let fd = openat(at, name, flags, Mode::empty())?;
            fchmod(&fd, Mode::from_bits_truncate(0o755))?;
            Ok(fd)
        }
        // Somebody was faster: it is theirs.
        Err(Errno::EEXIST) => openat(at, name, flags, Mode::empty()),
        Err(errno) => Err(errno),
    }
}

fn names_in(fd: OwnedFd) -> Result<Vec<String>, Errno> {
    let mut folder = Dir::from_fd(fd)?;
    let mut names = Vec::new();
    for entry in folder.iter() {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name != "." && name != ".." {
            names.push(name);
        }
    }
    Ok(names)
}

fn sync(fd: &OwnedFd) -> io::Result<()> {
    File::from(fd.as_fd().try_clone_to_owned()?).sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};

    use super::*;

    const ACCESS: Access = Access { key_mode: 0o640, uid: None, gid: None };

    fn files(mark: usize) -> PairFiles {
        let text = |what: &str| format!("{what} {mark}\n");
        PairFiles {
            key: Zeroizing::new(text("key")),
            cert: text("cert"),
            ca: text("ca"),
            crl: text("crl"),
            ocsp: None,
            combined: false,
            p12: None,
        }
    }

    /// The same with both other forms, under the passphrase in `file`.
    fn forms(mark: usize, file: &Path) -> PairFiles {
        let order = KeyStoreOrder {
            alias: "api".to_owned(),
            passphrase_file: file.to_owned(),
            key: Zeroizing::new(vec![0x30, 1, u8::try_from(mark).unwrap()]),
            chain: vec![vec![0x30, 0].into()],
        };
        PairFiles { combined: true, p12: Some(order), ..files(mark) }
    }

    fn parent() -> (tempfile::TempDir, PathBuf) {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().canonicalize().unwrap().join("sub/tls");
        (parent, path)
    }

    #[test]
    fn four_names_lead_to_one_version_with_the_rights_asked_for() {
        let (_parent, path) = parent();
        let folder = PairFolder::open(&path, "api.mesh.internal").unwrap();
        assert_eq!(folder.current().unwrap(), None);
        folder.publish(&files(1), ACCESS, "..2026-1").unwrap();
        assert_eq!(std::fs::read_to_string(path.join("key.pem")).unwrap(), "key 1\n");
        assert_eq!(std::fs::metadata(path.join("key.pem")).unwrap().mode() & 0o7777, 0o640);
        assert_eq!(std::fs::metadata(path.join("cert.pem")).unwrap().mode() & 0o7777, 0o644);
        folder.publish(&files(2), ACCESS, "..2026-2").unwrap();
        folder.publish(&files(3), ACCESS, "..2026-3").unwrap();
        assert_eq!(folder.current().unwrap().as_deref(), Some("..2026-3"));
        let mut names = folder.names().unwrap();
        names.sort();
        let versions: Vec<_> = names.iter().filter(|name| name.starts_with("..20")).collect();
        assert_eq!(versions, ["..2026-2", "..2026-3"], "the one before stays for readers, older ones go");
    }

    #[test]
    fn other_forms_come_go_and_are_guarded_like_the_key() {
        let (parent, path) = parent();
        let passphrase = parent.path().join("passphrase");
        std::fs::write(&passphrase, "secret\n").unwrap();
        let folder = PairFolder::open(&path, "api").unwrap();
        folder.publish(&forms(1, &passphrase), ACCESS, "..2026-1").unwrap();
        assert_eq!(std::fs::read_to_string(path.join("combined.pem")).unwrap(), "key 1\ncert 1\n");
        let opened = |password: &str| {
            let made = std::fs::read(path.join("cert.p12")).unwrap();
            mesh_ca::read_pkcs12(&made, password).map(|contents| contents.pkcs8.to_vec())
        };
        assert_eq!(opened("secret").unwrap(), [0x30, 1, 1]);
        for name in ["combined.pem", "cert.p12"] {
            assert_eq!(std::fs::metadata(path.join(name)).unwrap().mode() & 0o7777, 0o640, "{name}");
        }
        // Another CRL alone: the file stays as it is, and so does its passphrase.
        let first = std::fs::read(path.join("cert.p12")).unwrap();
        std::fs::write(&passphrase, "another\n").unwrap();
        let newer = PairFiles { crl: "crl 2\n".to_owned(), ..forms(1, &passphrase) };
        folder.publish(&newer, ACCESS, "..2026-2").unwrap();
        assert_eq!(std::fs::read(path.join("cert.p12")).unwrap(), first);
        // A renewal takes up what the file says now.
        folder.publish(&forms(3, &passphrase), ACCESS, "..2026-3").unwrap();
        assert_eq!(opened("another").unwrap(), [0x30, 1, 3]);
        assert!(opened("secret").is_err());
        // Without a passphrase nothing changes at all.
        std::fs::remove_file(&passphrase).unwrap();
        let refused = folder.publish(&forms(4, &passphrase), ACCESS, "..2026-4");
        assert!(matches!(refused, Err(FolderError::KeyStore(_))));
        assert_eq!(std::fs::read_to_string(path.join("cert.pem")).unwrap(), "cert 3\n");
        assert!(!path.join("..2026-4").exists());
        // No longer asked for: no file is left behind that would grow stale.
        folder.publish(&files(5), ACCESS, "..2026-5").unwrap();
        for name in ["combined.pem", "cert.p12"] {
            assert!(std::fs::symlink_metadata(path.join(name)).is_err(), "{name}");
        }
    }

    #[test]
    fn a_reader_never_sees_a_mixed_pair() {
        let (_parent, path) = parent();
        let folder = PairFolder::open(&path, "api").unwrap();
        folder.publish(&files(0), ACCESS, "..2026-0").unwrap();
        let reader = std::thread::spawn({
            let path = path.clone();
            move || {
                let mut seen = 0;
                while seen < 100 {
                    // As a careful reader does: resolve the version once, read all files there.
                    let version = path.join(std::fs::read_link(path.join("..data")).unwrap());
                    let read = |name: &str| {
                        let text = std::fs::read_to_string(version.join(name)).ok()?;
                        text.split(' ').nth(1).map(|mark| mark.trim().parse::<usize>().unwrap())
                    };
                    // `None` if two swaps happened in between: the reader starts over.
                    let marks = ["key.pem", "cert.pem", "ca.pem", "crl.pem"].map(read);
                    let marks: Vec<_> = marks.into_iter().flatten().collect();
                    assert!(marks.windows(2).all(|pair| pair[0] == pair[1]), "mixed pair {marks:?}");
                    // Four names are always there, whatever version they lead to.
                    assert!(path.join("key.pem").exists() && path.join("cert.pem").exists());
                    seen = *marks.last().unwrap_or(&seen);
                }
            }
        });
        for mark in 1..=100 {
            folder.publish(&files(mark), ACCESS, &format!("..2026-{mark}")).unwrap();
        }
        reader.join().unwrap();
    }

    #[test]
    fn foreign_folders_links_and_other_pairs_are_refused_and_left_alone() {
        let (parent, path) = parent();
        std::fs::create_dir_all(&path).unwrap();
        std::fs::write(path.join("key.pem"), "theirs").unwrap();
        assert!(matches!(PairFolder::open(&path, "api"), Err(FolderError::NotOurs { .. })));
        assert_eq!(std::fs::read_to_string(path.join("key.pem")).unwrap(), "theirs");
        assert_eq!(std::fs::read_dir(&path).unwrap().count(), 1);

        let base = parent.path().canonicalize().unwrap();
        symlink(&path, base.join("link")).unwrap();
        assert!(matches!(PairFolder::open(&base.join("link"), "api"), Err(FolderError::Link { .. })));
        assert!(matches!(PairFolder::open(&base.join("link/deeper"), "api"), Err(FolderError::Link { .. })));
        assert!(matches!(PairFolder::open(Path::new("relative"), "api"), Err(FolderError::Path { .. })));
        assert!(matches!(PairFolder::open(&base.join("a/../b"), "api"), Err(FolderError::Path { .. })));

        let ours = base.join("ours");
        PairFolder::check(&ours, "api").unwrap();
        assert!(!ours.exists(), "a check makes nothing");
        assert!(matches!(PairFolder::check(&path, "api"), Err(FolderError::NotOurs { .. })));
        PairFolder::open(&ours, "api").unwrap();
        PairFolder::open(&ours, "api").unwrap();
        assert!(matches!(PairFolder::open(&ours, "web"), Err(FolderError::OtherPair { .. })));
    }

    #[test]
    fn a_failed_version_leaves_the_old_one_in_use() {
        let (_parent, path) = parent();
        let folder = PairFolder::open(&path, "api").unwrap();
        folder.publish(&files(1), ACCESS, "..2026-1").unwrap();
        // A folder in the place of the next link cannot be replaced, also not by root.
        std::fs::create_dir(path.join(DATA_NEW)).unwrap();
        assert!(folder.publish(&files(2), ACCESS, "..2026-2").is_err());
        assert_eq!(std::fs::read_to_string(path.join("cert.pem")).unwrap(), "cert 1\n");
        assert!(!path.join("..2026-2").exists(), "the key of a failed version is removed");
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o022, 0, "nobody else may write");
    }
}
