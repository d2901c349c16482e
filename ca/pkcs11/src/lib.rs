//! Keys of the authority in a hardware token, behind PKCS #11 (version 2.40).
//!
//! The token's module is a shared library, so this stands apart from `mesh-ca`, which loads nothing. A key is found by its
//! label, which is its [`KeyId`]; private and public key object carry the same. ECDSA P-256 and P-384 and RSA are supported.
//!
//! Every signature is checked with the public key before it is handed out, so that a token that answers with something
//! else has signed nothing.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::Mutex;

use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use cryptoki::error::{Error, RvError};
use cryptoki::mechanism::{Mechanism, MechanismType};
use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle};
use cryptoki::session::{Session, UserType};
use cryptoki::slot::Slot;
use cryptoki::types::AuthPin;
use der::asn1::{AnyRef, BitStringRef, ObjectIdentifier, OctetStringRef, UintRef};
use der::{Decode as _, Encode as _, Tag};
use mesh_ca::{KeyAlgorithm, KeyError, KeyId, KeyStore, KeyStoreError, PublicKey};
use sha2::{Digest as _, Sha256, Sha384};

const EC_PUBLIC_KEY: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.2.1");
const P256: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.3.1.7");
const P384: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.132.0.34");
const RSA_ENCRYPTION: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");

/// Why a token cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    #[error("PKCS #11 module cannot be loaded")]
    Module(#[source] Error),
    #[error("no token is labelled {0:?}")]
    NoToken(String),
    #[error("token refuses the PIN")]
    WrongPin,
    #[error("token's PIN is locked")]
    PinLocked,
    #[error("token holds no key labelled {0}")]
    NoKey(KeyId),
    #[error("token holds more than one key labelled {0}")]
    SeveralKeys(KeyId),
    #[error("token holds a key labelled {0} already")]
    KeyExists(KeyId),
    #[error("keys of type {0} are not generated in tokens, only ECDSA P-256 and P-384")]
    Generate(KeyAlgorithm),
    #[error("token does not make keys of type {algorithm}")]
    Unsupported {
        algorithm: KeyAlgorithm,
        #[source]
        source: Option<Error>,
    },
    #[error("key {0} is not an ECDSA P-256, P-384 or RSA key")]
    KeyType(KeyId),
    #[error("key {key_id} is not taken")]
    Key {
        key_id: KeyId,
        #[source]
        source: KeyError,
    },
    #[error("token failed")]
    Token(#[source] Error),
}

impl From<Error> for TokenError {
    fn from(error: Error) -> Self {
        match error {
            Error::Pkcs11(RvError::PinIncorrect | RvError::PinInvalid | RvError::PinLenRange, _) => {
                Self::WrongPin
            }
            Error::Pkcs11(RvError::PinLocked, _) => Self::PinLocked,
            other => Self::Token(other),
        }
    }
}

struct TokenKey {
    handle: ObjectHandle,
    public: PublicKey,
}

/// A token with one open session, logged in. Signatures are made one after the other.
pub struct TokenKeyStore {
    module: Pkcs11,
    slot: Slot,
    serial: String,
    session: Mutex<Session>,
    keys: BTreeMap<KeyId, TokenKey>,
}

impl fmt::Debug for TokenKeyStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenKeyStore")
            .field("keys", &self.keys.keys().collect::<Vec<_>>())
            .finish_non_exhaustive()
    }
}

impl TokenKeyStore {
    /// Opens the token `token_label` through the module at `module` and finds `keys` on it. Blocks.
    ///
    /// # Errors
    /// [`TokenError::WrongPin`] costs one of the token's tries.
    pub fn open(module: &Path, token_label: &str, pin: &str, keys: &[KeyId]) -> Result<Self, TokenError> {
        let (module, slot, serial) = connect(module, token_label)?;
        let session = module.open_ro_session(slot)?;
        login(&session, pin)?;
        let found = keys.iter().map(|id| Ok((id.clone(), find_key(&session, id)?)));
        let keys = found.collect::<Result<_, TokenError>>()?;
        Ok(Self { module, slot, serial, session: Mutex::new(session), keys })
    }

    /// Draws a key in the token, which never leaves it, and opens it. Blocks.
    ///
    /// # Errors
    /// [`TokenError::KeyExists`] if the label is taken; nothing is changed then. As [`open`](Self::open) otherwise.
    pub fn generate(
        module: &Path,
        token_label: &str,
        pin: &str,
        key_id: &KeyId,
        algorithm: KeyAlgorithm,
    ) -> Result<Self, TokenError> {
        let curve = match algorithm {
            KeyAlgorithm::EcdsaP256 => P256,
            KeyAlgorithm::EcdsaP384 => P384,
            other => return Err(TokenError::Generate(other)),
        };
        let (library, slot, _) = connect(module, token_label)?;
        // Asked first: a module need not refuse by itself what its list lacks.
        if !library.get_mechanism_list(slot)?.contains(&MechanismType::ECC_KEY_PAIR_GEN) {
            return Err(TokenError::Unsupported { algorithm, source: None });
        }
        let session = library.open_rw_session(slot)?;
        login(&session, pin)?;
        let label = Attribute::Label(key_id.as_str().as_bytes().to_vec());
        if !session.find_objects(std::slice::from_ref(&label))?.is_empty() {
            return Err(TokenError::KeyExists(key_id.clone()));
        }
        // PKCS #11 links the two halves by their id; ours is as unique as the label.
        let id = Attribute::Id(Sha256::digest(key_id.as_str())[..16].to_vec());
        let public = [
            Attribute::Token(true),
            Attribute::Verify(true),
            Attribute::EcParams(curve.to_der().map_err(|_| TokenError::KeyType(key_id.clone()))?),
            label.clone(),
            id.clone(),
        ];
        let private = [
            Attribute::Token(true),
            Attribute::Private(true),
            Attribute::Sensitive(true),
            Attribute::Extractable(false),
            Attribute::Sign(true),
            label,
            id,
        ];
        let drawn = session.generate_key_pair(&Mechanism::EccKeyPairGen, &public, &private);
        drawn.map_err(|error| match error {
            Error::Pkcs11(refused, _) if is_lack(refused) => {
                TokenError::Unsupported { algorithm, source: Some(error) }
            }
            other => other.into(),
        })?;
        drop(session);
        Self::open(module, token_label, pin, std::slice::from_ref(key_id))
    }

    /// Takes both halves of a key out of its token for good. Blocks.
    pub fn destroy(module: &Path, token_label: &str, pin: &str, key_id: &KeyId) -> Result<(), TokenError> {
        let (module, slot, _) = connect(module, token_label)?;
        let session = module.open_rw_session(slot)?;
        login(&session, pin)?;
        let label = Attribute::Label(key_id.as_str().as_bytes().to_vec());
        for object in session.find_objects(&[label])? {
            session.destroy_object(object)?;
        }
        Ok(())
    }

    fn key(&self, key_id: &KeyId) -> Result<&TokenKey, KeyStoreError> {
        self.keys.get(key_id).ok_or_else(|| KeyStoreError::UnknownKey(key_id.clone()))
    }

    /// A token that was taken out may be answered for by a module that remembers its objects.
    fn check_present(&self) -> Result<(), String> {
        let info = self.module.get_token_info(self.slot).map_err(|error| error.to_string())?;
        if info.serial_number() == self.serial {
            Ok(())
        } else {
            Err("another token is in its place".to_owned())
        }
    }
}

impl KeyStore for TokenKeyStore {
    fn sign(&self, key_id: &KeyId, tbs: &[u8]) -> Result<Vec<u8>, KeyStoreError> {
        let key = self.key(key_id)?;
        let refuse = |what: String| KeyStoreError::Token { key_id: key_id.clone(), what };
        self.check_present().map_err(refuse)?;
        let session = self.session.lock().map_err(|_| KeyStoreError::Sign(key_id.clone()))?;
        let sign = |mechanism: &Mechanism<'_>, data: &[u8]| {
            session.sign(mechanism, key.handle, data).map_err(|error| refuse(error.to_string()))
        };
        let signature = match key.public.algorithm() {
            KeyAlgorithm::EcdsaP256 => {
                sign(&Mechanism::Ecdsa, &Sha256::digest(tbs)).map(|raw| ecdsa_to_der(&raw))
            }
            KeyAlgorithm::EcdsaP384 => {
                sign(&Mechanism::Ecdsa, &Sha384::digest(tbs)).map(|raw| ecdsa_to_der(&raw))
            }
            KeyAlgorithm::Rsa { .. } => sign(&Mechanism::Sha256RsaPkcs, tbs).map(Some),
            KeyAlgorithm::Ed25519 => return Err(KeyStoreError::BadKey(key_id.clone())),
        }?;
        let signature = signature.ok_or_else(|| refuse("signature has an odd length".to_owned()))?;
        if key.public.verifies(tbs, &signature) {
            Ok(signature)
        } else {
            Err(refuse("signature does not verify with the token's public key".to_owned()))
        }
    }

    fn public_key(&self, key_id: &KeyId) -> Result<PublicKey, KeyStoreError> {
        Ok(self.key(key_id)?.public.clone())
    }
}

/// Loads the module and finds the token: its slot and serial number.
fn connect(module: &Path, token_label: &str) -> Result<(Pkcs11, Slot, String), TokenError> {
    let module = Pkcs11::new(module).map_err(TokenError::Module)?;
    match module.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK)) {
        // Another store of this process loaded the same module.
        Ok(()) | Err(Error::Pkcs11(RvError::CryptokiAlreadyInitialized, _)) => {}
        Err(error) => return Err(TokenError::Module(error)),
    }
    let (slot, serial) = find_token(&module, token_label)?;
    Ok((module, slot, serial))
}

/// What a token answers that knows no EC keys, or not this curve (PKCS #11 v2.40 §11.16).
fn is_lack(refused: RvError) -> bool {
    matches!(
        refused,
        RvError::MechanismInvalid
            | RvError::MechanismParamInvalid
            | RvError::CurveNotSupported
            | RvError::DomainParamsInvalid
            | RvError::AttributeValueInvalid
            | RvError::TemplateInconsistent
    )
}

fn login(session: &Session, pin: &str) -> Result<(), TokenError> {
    match session.login(UserType::User, Some(&AuthPin::new(pin.into()))) {
        Ok(()) | Err(Error::Pkcs11(RvError::UserAlreadyLoggedIn, _)) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn find_token(module: &Pkcs11, label: &str) -> Result<(Slot, String), TokenError> {
    for slot in module.get_slots_with_initialized_token()? {
        let info = module.get_token_info(slot)?;
        if info.label() == label {
            return Ok((slot, info.serial_number().to_owned()));
        }
    }
    Err(TokenError::NoToken(label.to_owned()))
}

fn find_key(session: &Session, key_id: &KeyId) -> Result<TokenKey, TokenError> {
    let label = Attribute::Label(key_id.as_str().as_bytes().to_vec());
    let one = |class: ObjectClass| -> Result<ObjectHandle, TokenError> {
        match session.find_objects(&[Attribute::Class(class), label.clone()])?.as_slice() {
            [handle] => Ok(*handle),
            [] => Err(TokenError::NoKey(key_id.clone())),
            _ => Err(TokenError::SeveralKeys(key_id.clone())),
        }
    };
    let (handle, public) = (one(ObjectClass::PRIVATE_KEY)?, one(ObjectClass::PUBLIC_KEY)?);
    let spki = spki_of(session, public)?.ok_or_else(|| TokenError::KeyType(key_id.clone()))?;
    let public = PublicKey::from_spki_der(&spki)
        .map_err(|source| TokenError::Key { key_id: key_id.clone(), source })?;
    if public.algorithm() == KeyAlgorithm::Ed25519 {
        return Err(TokenError::KeyType(key_id.clone()));
    }
    Ok(TokenKey { handle, public })
}

/// SubjectPublicKeyInfo of a public key object; `None` for a type that is not supported.
fn spki_of(session: &Session, public: ObjectHandle) -> Result<Option<Vec<u8>>, TokenError> {
    let wanted = [
        AttributeType::KeyType,
        AttributeType::EcParams,
        AttributeType::EcPoint,
        AttributeType::Modulus,
        AttributeType::PublicExponent,
    ];
    let (mut kind, mut params, mut point, mut modulus, mut exponent) = (None, None, None, None, None);
    for attribute in session.get_attributes(public, &wanted)? {
        match attribute {
            Attribute::KeyType(found) => kind = Some(found),
            Attribute::EcParams(found) => params = Some(found),
            Attribute::EcPoint(found) => point = Some(found),
            Attribute::Modulus(found) => modulus = Some(found),
            Attribute::PublicExponent(found) => exponent = Some(found),
            _ => {}
        }
    }
    let encoded = match (kind, params, point, modulus, exponent) {
        (Some(KeyType::EC), Some(params), Some(point), ..) => ec_spki(&params, &point),
        (Some(KeyType::RSA), _, _, Some(modulus), Some(exponent)) => rsa_spki(&modulus, &exponent),
        _ => return Ok(None),
    };
    Ok(encoded.ok())
}

/// CKA_EC_POINT is the point within an OCTET STRING (PKCS #11 v2.40 §2.3.3).
fn ec_spki(params: &[u8], point: &[u8]) -> der::Result<Vec<u8>> {
    let point = OctetStringRef::from_der(point)?;
    let algorithm = sequence(&[&EC_PUBLIC_KEY.to_der()?, params])?;
    sequence(&[&algorithm, &BitStringRef::from_bytes(point.as_bytes())?.to_der()?])
}

fn rsa_spki(modulus: &[u8], exponent: &[u8]) -> der::Result<Vec<u8>> {
    let key = sequence(&[&UintRef::new(modulus)?.to_der()?, &UintRef::new(exponent)?.to_der()?])?;
    let algorithm = sequence(&[&RSA_ENCRYPTION.to_der()?, &der::asn1::Null.to_der()?])?;
    sequence(&[&algorithm, &BitStringRef::from_bytes(&key)?.to_der()?])
}

fn sequence(parts: &[&[u8]]) -> der::Result<Vec<u8>> {
    AnyRef::new(Tag::Sequence, &parts.concat())?.to_der()
}

/// PKCS #11 gives r and s side by side, each as long as the curve's order.
fn ecdsa_to_der(raw: &[u8]) -> Option<Vec<u8>> {
    if raw.is_empty() || !raw.len().is_multiple_of(2) {
        return None;
    }
    let (r, s) = raw.split_at(raw.len() / 2);
    let number = |bytes| UintRef::new(bytes).and_then(|number| number.to_der()).ok();
    sequence(&[&number(r)?, &number(s)?]).ok()
}
