//! Where the passphrase of the CA's keys comes from: a file, systemd's credential, or a person.

use std::{env, fs, io::IsTerminal as _, path::Path};

use mesh_controller::Passphrase;
use zeroize::Zeroizing;

use crate::failure::Failure;

/// Longer files hold something else than a passphrase.
const PASSPHRASE_BYTES_MAX: usize = 4096;
/// Name of systemd's credential.
const CREDENTIAL: &str = "mesh-passphrase";

/// The first line of `path`.
pub(crate) fn from_file(path: &Path) -> Result<Passphrase, Failure> {
    let next = "give --passphrase-file a readable file whose first line is the passphrase";
    let cannot = |why: String| Failure {
        why,
        ..Failure::passphrase(format!("cannot read the passphrase file {}", path.display()), next)
    };
    let text = Zeroizing::new(fs::read_to_string(path).map_err(|error| cannot(error.to_string()))?);
    let line = text.lines().next().unwrap_or_default();
    match line.len() {
        0 => Err(cannot("its first line is empty".to_owned())),
        1..=PASSPHRASE_BYTES_MAX => Ok(Passphrase::new(line.to_owned())),
        length => Err(cannot(format!("its first line has {length} bytes, more than {PASSPHRASE_BYTES_MAX}"))),
    }
}

/// What systemd handed over, if it did.
pub(crate) fn from_credential() -> Result<Option<Passphrase>, Failure> {
    let Some(folder) = env::var_os("CREDENTIALS_DIRECTORY") else { return Ok(None) };
    let path = Path::new(&folder).join(CREDENTIAL);
    if path.exists() { from_file(&path).map(Some) } else { Ok(None) }
}

/// Whether there is a person to ask.
pub(crate) fn can_ask() -> bool {
    std::io::stdin().is_terminal() && std::io::stderr().is_terminal()
}

/// Asks for the passphrase that unlocks what is there.
pub(crate) fn ask() -> Result<Passphrase, Failure> {
    prompt("passphrase of the CA's keys: ").map(Passphrase::new)
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
