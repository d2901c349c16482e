//! The context file: which controller, whose root, and who we are. Written by `meshctl login`.

use std::{
    fs, io,
    io::Write as _,
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use mesh_proto::v1::ErrorCode;
use serde::{Deserialize, Serialize};

use crate::error::{Failure, Result};

/// A context holds two addresses and a few certificates; more than this is not ours.
const CONTEXT_BYTES_MAX: u64 = 256 * 1024;

/// Holds a private key, so there is no Debug output and the file is 0600.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Context {
    /// `host:port` of each controller, best first.
    pub(crate) controllers: Vec<String>,
    pub(crate) trust_domain: String,
    pub(crate) operator: String,
    pub(crate) role: String,
    /// PEM, leaf first.
    pub(crate) certificate: String,
    /// PEM, PKCS #8.
    pub(crate) key: String,
    /// PEM.
    pub(crate) roots: String,
}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Context")
            .field("controllers", &self.controllers)
            .field("operator", &self.operator)
            .finish_non_exhaustive()
    }
}

/// `$MESH_CONTEXT`, else `meshd/context.toml` in the user's configuration folder.
pub(crate) fn path() -> Option<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    variable("MESH_CONTEXT").or_else(|| {
        let folder =
            variable("XDG_CONFIG_HOME").or_else(|| variable("HOME").map(|home| home.join(".config")))?;
        Some(folder.join("meshd").join("context.toml"))
    })
}

/// The context, or `None` where nobody has logged in.
///
/// # Errors
/// A file that others can read (it holds a key), that is too long, or that is no context.
pub(crate) fn load(path: &Path) -> Result<Option<Context>> {
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Failure::file("read", path, &error)),
    };
    if metadata.mode() & 0o077 != 0 {
        return Err(Failure::new(
            ErrorCode::StatePermissions,
            format!("{} can be read by others", path.display()),
        )
        .why("it holds your operator key")
        .next(format!("chmod 600 {}", path.display())));
    }
    let damaged = |why: String| {
        Failure::new(ErrorCode::StateCorrupt, format!("{} is not a context file", path.display()))
            .why(why)
            .next("remove it and run `meshctl login` again")
    };
    if metadata.len() > CONTEXT_BYTES_MAX {
        return Err(damaged(format!("it is longer than {CONTEXT_BYTES_MAX} bytes")));
    }
    let text = fs::read_to_string(path).map_err(|error| Failure::file("read", path, &error))?;
    // The parser's message would quote the line, which may be the key.
    toml::from_str(&text).map(Some).map_err(|error| damaged(error.message().to_owned()))
}

/// Replaces the context file as a whole; 0600, in a folder of 0700.
pub(crate) fn save(path: &Path, context: &Context) -> Result<()> {
    let text = toml::to_string(context).expect("a context holds only strings");
    let folder = path.parent().unwrap_or(Path::new("."));
    let failed = |error: io::Error| Failure::file("write", path, &error);
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;
    replace(path, text.as_bytes(), 0o600).map_err(failed)
}

/// Writes a file so that a reader sees the old or the new whole, also after a crash.
pub(crate) fn replace(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".new-{}", std::process::id()));
    let temporary = PathBuf::from(temporary);
    let write = || -> io::Result<()> {
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        fs::File::open(folder)?.sync_all()
    };
    write().inspect_err(|_| {
        let _ = fs::remove_file(&temporary);
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn context() -> Context {
        Context {
            controllers: vec!["192.0.2.1:7443".into()],
            trust_domain: "mesh.internal".into(),
            operator: "alice".into(),
            role: "admin".into(),
            certificate: "CERT".into(),
            key: "SECRET-KEY".into(),
            roots: "ROOT".into(),
        }
    }

    #[test]
    fn a_context_is_written_for_its_owner_alone_and_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("meshd/context.toml");
        save(&path, &context()).unwrap();
        save(&path, &context()).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(path.parent().unwrap()).unwrap().mode() & 0o777, 0o700);
        assert_eq!(load(&path).unwrap().unwrap().controllers, ["192.0.2.1:7443"]);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "a temporary file stayed");
    }

    #[test]
    fn no_context_is_not_an_error_but_a_bad_one_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("context.toml");
        assert!(load(&path).unwrap().is_none());
        fs::write(&path, "key = \"SECRET-KEY\" trailing").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let failure = load(&path).unwrap_err();
        assert_eq!(failure.code, ErrorCode::StateCorrupt);
        assert!(!failure.render().contains("SECRET-KEY"), "the error quotes the key");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        assert_eq!(load(&path).unwrap_err().code, ErrorCode::StatePermissions);
    }

    #[test]
    fn the_key_has_no_debug_output() {
        assert!(!format!("{:?}", context()).contains("SECRET-KEY"));
    }
}
