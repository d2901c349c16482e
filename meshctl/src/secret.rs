//! Tokens from wherever they may come: argument, file, stdin, environment, systemd credential.

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use mesh_proto::v1::{ErrorCode, JoinToken, join_token::Kind};
use prost::Message as _;
use zeroize::Zeroizing;

use crate::error::{Failure, Result};

/// Longest token that is read; one with ten controller addresses has about 400 characters.
pub(crate) const TOKEN_BYTES_MAX: usize = 4096;
/// What every token starts with; the number is that of the format.
const TOKEN_PREFIX: &str = "mesh1_";
/// Name of the systemd credential that may hold the token.
const CREDENTIAL: &str = "mesh-token";
const VARIABLE: &str = "MESH_TOKEN";

/// Longest passphrase that is read.
const PASSPHRASE_BYTES_MAX: usize = 1024;

/// Where `enroll` and `login` take their token from.
#[derive(clap::Args)]
pub(crate) struct TokenFile {
    /// File that holds the token
    #[arg(long, value_name = "FILE")]
    pub(crate) token_file: Option<PathBuf>,
}

impl std::fmt::Debug for TokenFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TokenFile")
    }
}

/// Reads the token: `argument` (`-` is stdin), else the file, else `MESH_TOKEN`, else the systemd
/// credential `mesh-token`.
///
/// # Errors
/// Usage if there is none; E0401 if it is too long, before anything looks at it.
pub(crate) fn token(argument: Option<&str>, file: Option<&Path>, command: &str) -> Result<String> {
    let text = match (argument, file) {
        (Some("-"), _) => read("stdin", io::stdin().lock())?,
        (Some(text), _) => text.to_owned(),
        (None, Some(path)) => read_file(path)?,
        (None, None) => match from_environment()? {
            Some(text) => text,
            None => {
                return Err(Failure::usage(
                    "no token was given",
                    format!(
                        "`{command} TOKEN`, `--token-file FILE`, or `-` to read it from stdin; on the controller `meshctl token create` makes one"
                    ),
                ));
            }
        },
    };
    let text = text.trim();
    if text.is_empty() || text.len() > TOKEN_BYTES_MAX {
        return Err(invalid(if text.is_empty() { "it is empty" } else { "it is too long" }));
    }
    Ok(text.to_owned())
}

fn from_environment() -> Result<Option<String>> {
    if let Ok(token) = std::env::var(VARIABLE) {
        return Ok(Some(token));
    }
    let Some(folder) = std::env::var_os("CREDENTIALS_DIRECTORY") else { return Ok(None) };
    let path = Path::new(&folder).join(CREDENTIAL);
    if path.exists() { read_file(&path).map(Some) } else { Ok(None) }
}

fn read_file(path: &Path) -> Result<String> {
    let file = File::open(path).map_err(|error| Failure::file("read", path, &error))?;
    read(&path.display().to_string(), file)
}

fn read(name: &str, source: impl Read) -> Result<String> {
    let mut bytes = Vec::new();
    // One more than allowed, so that "too long" is seen.
    source
        .take(TOKEN_BYTES_MAX as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| Failure::file("read", Path::new(name), &error))?;
    String::from_utf8(bytes).map_err(|_| invalid("it is no text"))
}

/// The first line of a file, or of stdin for `-`.
///
/// # Errors
/// E0114 if there is no passphrase in it.
pub(crate) fn passphrase_file(path: &Path) -> Result<Zeroizing<String>> {
    let failed = |error| Failure::file("read", path, &error);
    let mut bytes = Zeroizing::new(Vec::with_capacity(PASSPHRASE_BYTES_MAX + 1));
    let room = PASSPHRASE_BYTES_MAX as u64 + 1;
    if path.as_os_str() == "-" {
        io::stdin().lock().take(room).read_to_end(&mut bytes).map_err(failed)?;
    } else {
        File::open(path).map_err(failed)?.take(room).read_to_end(&mut bytes).map_err(failed)?;
    }
    let end = bytes.iter().position(|byte| *byte == b'\n').unwrap_or(bytes.len());
    let line = bytes[..end].strip_suffix(b"\r").unwrap_or(&bytes[..end]);
    match std::str::from_utf8(line) {
        Ok(line) if (1..=PASSPHRASE_BYTES_MAX).contains(&line.len()) => Ok(Zeroizing::new(line.to_owned())),
        _ => Err(Failure::new(ErrorCode::PassphraseMissing, format!("no passphrase in {}", path.display()))
            .why(format!("its first line is empty, no UTF-8, or longer than {PASSPHRASE_BYTES_MAX} bytes"))
            .next("put the passphrase into the first line of the file")),
    }
}

/// What a token says. No Debug output: it holds the secret.
pub(crate) struct Token(pub(crate) JoinToken);

/// Reads an operator's login token.
///
/// # Errors
/// E0401 if it is damaged or no operator's.
pub(crate) fn parse_operator_token(text: &str) -> Result<Token> {
    let body = text.strip_prefix(TOKEN_PREFIX).ok_or_else(|| invalid("it does not start with `mesh1_`"))?;
    let bytes =
        URL_SAFE_NO_PAD.decode(body).map_err(|_| invalid("it is cut short or has a wrong character"))?;
    let token = JoinToken::decode(bytes.as_slice()).map_err(|_| invalid("it is damaged"))?;
    match token.kind() {
        Kind::Operator => {}
        Kind::Node => {
            return Err(invalid("it lets a node join, not an operator log in")
                .next("on the controller run `meshctl operator add NAME --role ROLE`"));
        }
        Kind::Unspecified => return Err(invalid("it says not what it is for")),
    }
    if token.root_spki_sha256.len() != 32 || token.secret.is_empty() || token.controllers.is_empty() {
        return Err(invalid("it lacks the root's fingerprint, the secret or the controller"));
    }
    Ok(Token(token))
}

fn invalid(why: &str) -> Failure {
    Failure::new(ErrorCode::TokenInvalid, "this is not a token of a mesh")
        .why(why)
        .next("copy the whole token, from `mesh1_` to its end, or create a new one")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(token: &JoinToken) -> String {
        format!("{TOKEN_PREFIX}{}", URL_SAFE_NO_PAD.encode(token.encode_to_vec()))
    }

    fn token(kind: Kind) -> JoinToken {
        JoinToken {
            controllers: vec!["192.0.2.1:7443".into()],
            root_spki_sha256: vec![7; 32].into(),
            id: vec![1; 8].into(),
            secret: vec![2; 32].into(),
            kind: kind.into(),
            trust_domain: "mesh.internal".into(),
        }
    }

    #[test]
    fn an_operator_token_is_read_and_others_are_refused_with_a_reason() {
        let read = parse_operator_token(&encoded(&token(Kind::Operator))).unwrap();
        assert_eq!(read.0.controllers, ["192.0.2.1:7443"]);
        let no_root = JoinToken { root_spki_sha256: vec![7; 31].into(), ..token(Kind::Operator) };
        let whole = encoded(&token(Kind::Operator));
        for text in [
            &encoded(&token(Kind::Node)),
            &encoded(&no_root),
            "mesh1_",
            "mesh1_%%%",
            "mesh2_AAAA",
            &whole[..whole.len() - 3],
        ] {
            let failure = parse_operator_token(text).map(|_| ()).unwrap_err();
            assert_eq!(failure.code, ErrorCode::TokenInvalid, "{text}");
            let secret = text.len() > 20 && failure.render().contains(&text[text.len() / 2..]);
            assert!(!secret, "the error repeats the token");
        }
    }

    proptest::proptest! {
        /// A token spoiled anywhere, or no token at all: one that can be used, or a refusal that quotes nothing.
        #[test]
        fn any_text_is_a_usable_token_or_none(
            noise in "\\PC{0,60}|mesh1_[A-Za-z0-9_-]{0,90}",
            at in proptest::prelude::any::<proptest::sample::Index>(),
            put in "[A-Za-z0-9_-]",
        ) {
            let mut spoiled = encoded(&token(Kind::Operator));
            let at = at.index(spoiled.len());
            spoiled.replace_range(at..=at, &put);
            for text in [noise, spoiled] {
                match parse_operator_token(&text) {
                    Ok(Token(read)) => {
                        proptest::prop_assert_eq!(read.root_spki_sha256.len(), 32);
                        proptest::prop_assert!(read.kind() == Kind::Operator && !read.controllers.is_empty());
                    }
                    Err(failure) => {
                        proptest::prop_assert_eq!(failure.code, ErrorCode::TokenInvalid);
                        proptest::prop_assert!(text.len() < 24 || !failure.render().contains(&text));
                    }
                }
            }
        }
    }

    #[test]
    fn a_token_comes_from_argument_or_file_and_has_a_limit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t");
        std::fs::write(&path, "  mesh1_abc \n").unwrap();
        assert_eq!(super::token(None, Some(&path), "meshctl enroll").unwrap(), "mesh1_abc");
        assert_eq!(super::token(Some("mesh1_x"), None, "meshctl enroll").unwrap(), "mesh1_x");
        std::fs::write(&path, "x".repeat(TOKEN_BYTES_MAX + 1)).unwrap();
        let failure = super::token(None, Some(&path), "meshctl enroll").unwrap_err();
        assert_eq!(failure.code, ErrorCode::TokenInvalid);
        let missing = super::token(None, Some(&folder.path().join("no")), "meshctl enroll").unwrap_err();
        assert_eq!(missing.exit, crate::error::Exit::NotFound);
    }
}
