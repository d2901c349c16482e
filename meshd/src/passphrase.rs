//! Where passphrases and PINs come from: a file, systemd's credential, or a person; never the command line.

use std::{
    env,
    ffi::OsString,
    fs,
    io::{IsTerminal as _, Read},
    os::unix::fs::MetadataExt as _,
    path::Path,
};

use mesh_controller::Passphrase;
use zeroize::Zeroizing;

use crate::failure::Failure;

/// Longer files hold something else than a passphrase.
const PASSPHRASE_BYTES_MAX: usize = 4096;
/// Names of systemd's credentials.
const CREDENTIAL: &str = "mesh-passphrase";
const PIN_CREDENTIAL: &str = "mesh-pin";
const PIN_FLAG: &str = "--pin-file";

/// The first line of `path`; of stdin for `-`.
pub(crate) fn from_file(path: &Path) -> Result<Passphrase, Failure> {
    from_file_of(path, "--passphrase-file")
}

/// The same for the file that the flag `flag` names.
pub(crate) fn from_file_of(path: &Path, flag: &str) -> Result<Passphrase, Failure> {
    if path == Path::new("-") {
        return first_line(std::io::stdin().lock()).map_err(|why| unreadable("stdin", flag, why));
    }
    let name = path.display().to_string();
    let file = fs::File::open(path).map_err(|error| unreadable(&name, flag, error.to_string()))?;
    // systemd keeps its credentials to the service itself, by means that a mode does not show.
    let ours = path.parent().is_none_or(|folder| Some(folder.as_os_str()) != credentials().as_deref());
    if ours && file.metadata().is_ok_and(|metadata| is_exposed(&metadata)) {
        eprintln!("warning: others on this machine may read {name}; do: chmod 600 {name}");
    }
    first_line(file).map_err(|why| unreadable(&name, flag, why))
}

fn unreadable(name: &str, flag: &str, why: String) -> Failure {
    let what = if flag == PIN_FLAG { "PIN" } else { "passphrase" };
    let next = format!("give {flag} a readable file whose first line is the {what}");
    Failure { why, ..Failure::passphrase(format!("cannot read the {what} file {name}"), next) }
}

/// Whether users other than its owner can read a file. Pipes and the like are for those who made them.
fn is_exposed(metadata: &fs::Metadata) -> bool {
    metadata.is_file() && metadata.mode() & 0o077 != 0
}

/// The first line, of which no more is read than a passphrase may have.
fn first_line(source: impl Read) -> Result<Passphrase, String> {
    let room = PASSPHRASE_BYTES_MAX + 1;
    let mut bytes = Zeroizing::new(Vec::with_capacity(room));
    source.take(room as u64).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    let end = bytes.iter().position(|byte| *byte == b'\n').unwrap_or(bytes.len());
    let line = bytes[..end].strip_suffix(b"\r").unwrap_or(&bytes[..end]);
    match line.len() {
        0 => Err("its first line is empty".to_owned()),
        1..=PASSPHRASE_BYTES_MAX => std::str::from_utf8(line)
            .map(|line| Passphrase::new(line.to_owned()))
            .map_err(|_| "its first line is not UTF-8".to_owned()),
        _ => Err(format!("its first line has more than {PASSPHRASE_BYTES_MAX} bytes")),
    }
}

fn credentials() -> Option<OsString> {
    env::var_os("CREDENTIALS_DIRECTORY")
}

/// What systemd handed over, if it did.
pub(crate) fn from_credential() -> Result<Option<Passphrase>, Failure> {
    credential(CREDENTIAL, "--passphrase-file")
}

fn credential(name: &str, flag: &str) -> Result<Option<Passphrase>, Failure> {
    let Some(folder) = credentials() else { return Ok(None) };
    let path = Path::new(&folder).join(name);
    if path.exists() { from_file_of(&path, flag).map(Some) } else { Ok(None) }
}

/// A hardware token's PIN: from the file that was named, else from systemd.
pub(crate) fn pin(file: Option<&Path>) -> Result<Option<Passphrase>, Failure> {
    match file {
        Some(path) => from_file_of(path, PIN_FLAG).map(Some),
        None => credential(PIN_CREDENTIAL, PIN_FLAG),
    }
}

/// Whether there is a person to ask.
pub(crate) fn can_ask() -> bool {
    std::io::stdin().is_terminal() && std::io::stderr().is_terminal()
}

/// Asks for the passphrase that unlocks what is there.
pub(crate) fn ask() -> Result<Passphrase, Failure> {
    ask_for("passphrase of the CA's keys")
}

/// Asks for something that nobody may see.
pub(crate) fn ask_for(what: &str) -> Result<Passphrase, Failure> {
    prompt(&format!("{what}: ")).map(Passphrase::new)
}

/// Asks twice for the passphrase that shall seal what is made.
pub(crate) fn ask_new() -> Result<Passphrase, Failure> {
    let first = Zeroizing::new(prompt("new passphrase for the CA's keys: ")?);
    let second = Zeroizing::new(prompt("once more: ")?);
    if first.is_empty() || *first != *second {
        let why = if first.is_empty() { "it is empty" } else { "the two differ" };
        let next = "run the command again";
        return Err(Failure { why: why.to_owned(), ..Failure::passphrase("no passphrase was chosen", next) });
    }
    Ok(Passphrase::new(first.to_string()))
}

fn prompt(question: &str) -> Result<String, Failure> {
    rpassword::prompt_password(question)
        .map_err(|error| Failure::internal("cannot ask for the passphrase", &error))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn one_line_is_read_and_never_more_than_it_may_have() {
        for good in ["secret", "secret\n", "secret\r\nmore\n"] {
            assert!(first_line(good.as_bytes()).is_ok(), "{good:?}");
        }
        assert!(first_line(&[b'x'; PASSPHRASE_BYTES_MAX][..]).is_ok());
        // A source without an end is given up at the limit.
        let why = first_line(std::io::repeat(b'x')).err().unwrap();
        assert!(why.contains("4096"), "{why}");
        for bad in [&b""[..], b"\nsecret", b"\xff\n"] {
            assert!(first_line(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_file_that_others_can_read_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("passphrase");
        fs::write(&path, "secret\n").unwrap();
        for (mode, exposed) in [(0o600, false), (0o400, false), (0o640, true), (0o644, true)] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(is_exposed(&fs::metadata(&path).unwrap()), exposed, "{mode:o}");
        }
        // Pipes and devices have no mode that says something.
        assert!(!is_exposed(&fs::metadata("/dev/null").unwrap()));
    }
}
