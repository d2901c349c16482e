//! CA keys in a hardware token: which token, its PIN, and the small files that say which key is there.

use std::path::{Path, PathBuf};

use mesh_ca::{CaKeyType, KeyId};
use mesh_pkcs11::{TokenError, TokenKeyStore};
use zeroize::Zeroizing;

use crate::config::Passphrase;
use crate::error::StartupError;
use crate::state::{read_file, replace_file};

/// Suffix of a file that names a key in the token; beside it stand the sealed keys, `.key`.
pub(crate) const TOKEN_FILE_SUFFIX: &str = "token";
/// Longest file with a PIN.
const PIN_BYTES_MAX: u64 = 4096;
/// Longest `pkcs11:` URI.
const URI_BYTES_MAX: usize = 4096;

/// Where a token is, from a `pkcs11:` URI (RFC 7512).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HsmPlace {
    uri: String,
    module: PathBuf,
    label: String,
    pin_source: Option<PathBuf>,
}

impl HsmPlace {
    /// Reads `pkcs11:token=LABEL?module-path=/path/to/module.so[&pin-source=/path/to/pin]`; other attributes, and a PIN in
    /// the URI itself, are refused.
    ///
    /// # Errors
    /// What is wrong, for people. The text repeats nothing of the URI but names of attributes.
    pub fn parse(uri: &str) -> Result<Self, String> {
        let body = uri.strip_prefix("pkcs11:").filter(|_| uri.len() <= URI_BYTES_MAX);
        let body = body.ok_or("is not a pkcs11: URI of at most 4096 characters (RFC 7512)")?;
        let (path, query) = body.split_once('?').unwrap_or((body, ""));
        let (mut label, mut module, mut pin_source) = (None, None, None);
        let attributes = path.split(';').chain(query.split('&')).filter(|part| !part.is_empty());
        for attribute in attributes {
            let (name, value) = attribute.split_once('=').ok_or("has an attribute without a value")?;
            let value = percent_decoded(value).ok_or_else(|| format!("has a {name} that cannot be read"))?;
            let slot = match name {
                "token" => &mut label,
                "module-path" => &mut module,
                "pin-source" => &mut pin_source,
                "pin-value" => {
                    return Err(
                        "has a PIN in it, which other users can see; give --pin-file or pin-source".into()
                    );
                }
                other => return Err(format!("has an attribute {other:?}, which is not known here")),
            };
            if value.is_empty() || slot.replace(value).is_some() {
                return Err(format!("has {name} empty or twice"));
            }
        }
        let module = PathBuf::from(module.ok_or("has no module-path, the vendor's PKCS #11 library")?);
        if !module.is_absolute() {
            return Err("has a module-path that is not absolute".into());
        }
        // RFC 7512 §2.4 has a file URI or a path there.
        let file = |text: String| {
            PathBuf::from(text.strip_prefix("file://").or(text.strip_prefix("file:")).unwrap_or(&text))
        };
        Ok(Self {
            uri: uri.to_owned(),
            module,
            label: label.ok_or("has no token, the token's label")?,
            pin_source: pin_source.map(file),
        })
    }

    /// The URI as it was given.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// File whose first line is the PIN.
    pub fn pin_source(&self) -> Option<&Path> {
        self.pin_source.as_deref()
    }
}

/// RFC 3986 §2.1; `None` if the result is no UTF-8.
fn percent_decoded(text: &str) -> Option<String> {
    let (mut bytes, mut rest) = (Vec::new(), text.as_bytes());
    while let [first, after @ ..] = rest {
        rest = match first {
            b'%' => {
                let (digits, after) = after.split_at_checked(2)?;
                bytes.extend(hex::decode(digits).ok()?);
                after
            }
            byte => {
                bytes.push(*byte);
                after
            }
        };
    }
    String::from_utf8(bytes).ok()
}

/// A token that can be opened.
#[derive(Clone)]
pub(crate) struct Hsm {
    place: HsmPlace,
    pin: Passphrase,
}

impl Hsm {
    /// Takes the PIN that was given, else the first line of the URI's pin-source.
    ///
    /// # Errors
    /// [`StartupError::PinMissing`].
    pub(crate) fn new(place: &HsmPlace, pin: Option<&Passphrase>) -> Result<Self, StartupError> {
        let pin = match (pin, &place.pin_source) {
            (Some(pin), _) => pin.clone(),
            (None, Some(path)) => read_pin(path)?,
            (None, None) => return Err(StartupError::PinMissing),
        };
        Ok(Self { place: place.clone(), pin })
    }

    /// Draws a key that never leaves the token.
    ///
    /// # Errors
    /// [`TokenError::Generate`] for Ed25519, [`TokenError::Unsupported`] for what this token lacks.
    pub(crate) fn generate(&self, id: &KeyId, key_type: CaKeyType) -> Result<TokenKeyStore, TokenError> {
        let HsmPlace { module, label, .. } = &self.place;
        TokenKeyStore::generate(module, label, self.pin(), id, key_type.algorithm())
    }

    pub(crate) fn open(&self, id: &KeyId) -> Result<TokenKeyStore, TokenError> {
        let HsmPlace { module, label, .. } = &self.place;
        TokenKeyStore::open(module, label, self.pin(), std::slice::from_ref(id))
    }

    /// A label that no other key has: several controllers may share a token.
    pub(crate) fn fresh_label() -> KeyId {
        let text = format!("issuing-{}", hex::encode(mesh_runtime::random_bytes::<8>()));
        KeyId::parse(&text).expect("hexadecimal digits are plain")
    }

    /// Takes back what was drawn for nothing.
    pub(crate) fn destroy(&self, id: &KeyId) {
        let HsmPlace { module, label, .. } = &self.place;
        if let Err(error) = TokenKeyStore::destroy(module, label, self.pin(), id) {
            tracing::warn!(error = mesh_runtime::chain(&error), key = %id, "a key that is of no use stays in the token");
        }
    }

    fn pin(&self) -> &str {
        self.pin.as_str()
    }
}

impl std::fmt::Debug for Hsm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hsm").field("place", &self.place).finish_non_exhaustive()
    }
}

fn read_pin(path: &Path) -> Result<Passphrase, StartupError> {
    let refused = |problem: String| StartupError::Config { key: "pin-source", problem };
    let bytes = read_file(path, PIN_BYTES_MAX).map(Zeroizing::new);
    let bytes = bytes.map_err(|error| refused(format!("{} cannot be read: {error}", path.display())))?;
    let text = std::str::from_utf8(&bytes).unwrap_or_default();
    match text.lines().next() {
        Some(pin) if !pin.is_empty() => Ok(Passphrase::new(pin.to_owned())),
        _ => Err(refused(format!("{} has no PIN in its first line", path.display()))),
    }
}

/// The key that a token file names.
pub(crate) fn read_token_file(path: &Path) -> Result<KeyId, StartupError> {
    let bytes = read_file(path, 256).map_err(|error| StartupError::io("read", path, error))?;
    let text = String::from_utf8_lossy(&bytes);
    KeyId::parse(text.trim_end()).map_err(|error| StartupError::StateCorrupt {
        path: path.into(),
        what: "it does not name a key".into(),
        source: Some(error.into()),
    })
}

pub(crate) fn write_token_file(path: &Path, id: &KeyId) -> std::io::Result<()> {
    replace_file(path, format!("{id}\n").as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_named_by_label_and_module() {
        let place = HsmPlace::parse(
            "pkcs11:token=prod%20CA?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=file:/run/pin",
        )
        .unwrap();
        assert_eq!(
            (place.label.as_str(), place.module.to_str()),
            ("prod CA", Some("/usr/lib/softhsm/libsofthsm2.so"))
        );
        assert_eq!(place.pin_source(), Some(Path::new("/run/pin")));
    }

    #[test]
    fn a_uri_that_hides_something_is_refused_without_repeating_it() {
        for (uri, why) in [
            ("", "pkcs11:"),
            ("softhsm:token=a", "pkcs11:"),
            ("pkcs11:token=a", "module-path"),
            ("pkcs11:?module-path=/a.so", "token"),
            ("pkcs11:token=a?module-path=a.so", "absolute"),
            ("pkcs11:token=a;token=b?module-path=/a.so", "twice"),
            ("pkcs11:token=?module-path=/a.so", "empty"),
            ("pkcs11:token=%zz?module-path=/a.so", "token"),
            ("pkcs11:token=a;slot-id=3?module-path=/a.so", "slot-id"),
            ("pkcs11:token=a?module-path=/a.so&pin-value=13579", "PIN"),
        ] {
            let refused = HsmPlace::parse(uri).unwrap_err();
            assert!(refused.contains(why), "{uri}: {refused}");
            assert!(!refused.contains("13579"), "{refused}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_a_place_or_none(text in "(pkcs11:)?([a-z-]{0,8}[=;?&%/]{0,2}){0,8}\\PC{0,20}") {
            if let Ok(place) = HsmPlace::parse(&text) {
                proptest::prop_assert!(place.module.is_absolute() && !place.label.is_empty());
            }
        }
    }
}
