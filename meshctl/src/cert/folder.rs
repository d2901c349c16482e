//! A pair on an operator's disk: four files that are replaced together.

use std::{
    fs::{self, DirBuilder, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
};

use mesh_proto::v1::ErrorCode;
use nix::unistd::{Gid, Group, Uid, User};

use crate::error::{Failure, Result};

/// The symlink that every file of the pair goes through: renaming it swaps all four at once.
const DATA: &str = "..data";

/// One file of the pair.
#[derive(Debug)]
pub(super) struct Part<'a> {
    pub(super) name: &'a str,
    pub(super) bytes: &'a [u8],
    pub(super) mode: u32,
}

/// Whom the files shall belong to, as `--owner USER:GROUP` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Owner {
    user: Option<Uid>,
    group: Option<Gid>,
}

impl Owner {
    pub(super) fn find(text: &str) -> Result<Self> {
        let (user, group) = text.split_once(':').unwrap_or((text, ""));
        let unknown = |kind: &str, name: &str| {
            Failure::usage(
                format!("there is no {kind} {name:?} on this machine"),
                "write --owner USER:GROUP with names or numbers",
            )
        };
        let user = match user {
            "" => None,
            name => Some(match name.parse() {
                Ok(number) => Uid::from_raw(number),
                Err(_) => User::from_name(name).ok().flatten().ok_or_else(|| unknown("user", name))?.uid,
            }),
        };
        let group = match group {
            "" => None,
            name => Some(match name.parse() {
                Ok(number) => Gid::from_raw(number),
                Err(_) => Group::from_name(name).ok().flatten().ok_or_else(|| unknown("group", name))?.gid,
            }),
        };
        Ok(Self { user, group })
    }
}

/// Refuses a folder that holds what we did not make.
///
/// # Errors
/// E0522, before anything is asked of the controller.
pub(super) fn check(folder: &Path) -> Result<()> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Failure::file("read", folder, &error)),
    };
    let ours = fs::symlink_metadata(folder.join(DATA)).is_ok_and(|data| data.is_symlink());
    if ours || entries.count() == 0 {
        return Ok(());
    }
    Err(Failure::new(ErrorCode::DirectoryNotOurs, format!("{} is not empty", folder.display()))
        .why("it holds files that meshctl did not make, which would be overwritten")
        .next("name an empty or new folder with --out"))
}

/// Puts `parts` in place together: a reader sees all old or all new.
pub(super) fn replace(folder: &Path, parts: &[Part<'_>], owner: Option<Owner>) -> Result<()> {
    let failed = |error: io::Error| Failure::file("write", folder, &error);
    DirBuilder::new().recursive(true).mode(0o755).create(folder).map_err(failed)?;
    let version = format!("..{}-{:08x}", crate::text::now(), rand::random::<u32>());
    let written = write_version(folder, &version, parts, owner).and_then(|()| swap(folder, &version, parts));
    if written.is_err() {
        let _ = fs::remove_dir_all(folder.join(&version));
    }
    written.map_err(failed)
}

fn write_version(folder: &Path, version: &str, parts: &[Part<'_>], owner: Option<Owner>) -> io::Result<()> {
    let home = folder.join(version);
    DirBuilder::new().mode(0o755).create(&home)?;
    for part in parts {
        let path = home.join(part.name);
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
        file.write_all(part.bytes)?;
        // Owner before mode: nobody else may read a key, not even for a moment.
        if let Some(Owner { user, group }) = owner {
            nix::unistd::chown(&path, user, group)?;
        }
        file.set_permissions(fs::Permissions::from_mode(part.mode))?;
        file.sync_all()?;
    }
    fs::File::open(&home)?.sync_all()
}

fn swap(folder: &Path, version: &str, parts: &[Part<'_>]) -> io::Result<()> {
    let data = folder.join(DATA);
    let old: Option<PathBuf> = fs::read_link(&data).ok();
    let new = folder.join(format!("{DATA}.new"));
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    symlink(version, &new)?;
    fs::rename(&new, &data)?;
    for part in parts {
        let link = folder.join(part.name);
        if fs::symlink_metadata(&link).is_err() {
            symlink(Path::new(DATA).join(part.name), &link)?;
        }
    }
    fs::File::open(folder)?.sync_all()?;
    // Only a name of ours beside the link, never what a planted link points to.
    if let Some(old) = old.filter(|old| old.components().count() == 1 && old.as_os_str() != version) {
        let _ = fs::remove_dir_all(folder.join(old));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts<'a>(key: &'a [u8], certificate: &'a [u8]) -> [Part<'a>; 2] {
        [
            Part { name: "key.pem", bytes: key, mode: 0o600 },
            Part { name: "cert.pem", bytes: certificate, mode: 0o644 },
        ]
    }

    #[test]
    fn a_pair_is_replaced_as_a_whole_and_the_old_one_goes() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("api");
        check(&out).unwrap();
        replace(&out, &parts(b"k1", b"c1"), None).unwrap();
        check(&out).unwrap();
        replace(&out, &parts(b"k2", b"c2"), None).unwrap();
        assert_eq!(fs::read(out.join("key.pem")).unwrap(), b"k2");
        assert_eq!(fs::read(out.join("cert.pem")).unwrap(), b"c2");
        let mode = |name: &str| fs::metadata(out.join(name)).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode("key.pem"), mode("cert.pem")), (0o600, 0o644));
        // ..data, the version behind it, and two links.
        assert_eq!(fs::read_dir(&out).unwrap().count(), 4);
    }

    #[test]
    fn a_folder_with_other_files_is_refused_untouched() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("key.pem"), "precious").unwrap();
        assert_eq!(check(folder.path()).unwrap_err().code, ErrorCode::DirectoryNotOurs);
        assert_eq!(fs::read(folder.path().join("key.pem")).unwrap(), b"precious");
    }

    #[test]
    fn owners_are_names_or_numbers_that_exist() {
        let owner = Owner::find("0:0").unwrap();
        assert_eq!(owner, Owner { user: Some(Uid::from_raw(0)), group: Some(Gid::from_raw(0)) });
        assert_eq!(Owner::find(":root").unwrap(), Owner { user: None, group: Some(Gid::from_raw(0)) });
        assert_eq!(Owner::find("no-such-user-here").unwrap_err().code, ErrorCode::Usage);
    }
}
