//! A CA whose issuing key is in a token, with SoftHSM in the token's place.
//!
//! One test in one process: SoftHSM reads its configuration from the environment when it is loaded.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use cryptoki::object::{Attribute, AttributeType, ObjectClass};
use mesh_ca::*;
use mesh_pkcs11::{TokenError, TokenKeyStore};
use time::UtcDateTime;
use time::macros::utc_datetime;

const NOW: UtcDateTime = utc_datetime!(2026-11-22 12:00:00);
const PIN: &str = "1234";

fn module() -> PathBuf {
    let places = ["/usr/lib/softhsm/libsofthsm2.so", "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so"];
    places
        .iter()
        .map(PathBuf::from)
        .find(|path| path.exists())
        .expect("softhsm2 is installed by make deps-test")
}

fn rng(bytes: &mut [u8]) {
    aws_lc_rs::rand::fill(bytes).unwrap();
}

fn softhsm(folder: &Path, arguments: &[&str]) {
    let done = Command::new("softhsm2-util")
        .args(arguments)
        .env("SOFTHSM2_CONF", folder.join("softhsm2.conf"))
        .output()
        .expect("softhsm2-util runs");
    assert!(done.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
}

/// Puts a key into the token, as an operator would who brings an existing one.
fn put(folder: &Path, name: &str, algorithm: KeyAlgorithm, id: &str) -> PublicKey {
    let key = LeafKey::generate_for(algorithm).unwrap();
    let path = folder.join(format!("{name}.pem"));
    fs::write(&path, key.to_pkcs8_pem().as_bytes()).unwrap();
    let path = path.to_str().unwrap();
    softhsm(folder, &["--import", path, "--token", "mesh", "--label", name, "--id", id, "--pin", PIN]);
    key.public_key().clone()
}

/// What the token says of a private key's protection.
fn protection(label: &str) -> Vec<Attribute> {
    let module = Pkcs11::new(module()).unwrap();
    // Loaded already by the store under test.
    let _ = module.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK));
    let slot = module.get_slots_with_initialized_token().unwrap()[0];
    let session = module.open_ro_session(slot).unwrap();
    let wanted = [Attribute::Class(ObjectClass::PRIVATE_KEY), Attribute::Label(label.as_bytes().to_vec())];
    let found = session.find_objects(&wanted).unwrap();
    session.get_attributes(found[0], &[AttributeType::Sensitive, AttributeType::Extractable]).unwrap()
}

/// The body runs again in a child process whose environment names the token's folder.
#[test]
fn a_token_signs_and_refuses_clearly() {
    const FOLDER: &str = "MESH_PKCS11_TEST_FOLDER";
    let Some(folder) = std::env::var_os(FOLDER).map(PathBuf::from) else {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("tokens")).unwrap();
        let conf = format!("directories.tokendir = {}\n", folder.path().join("tokens").display());
        fs::write(folder.path().join("softhsm2.conf"), conf).unwrap();
        softhsm(
            folder.path(),
            &["--init-token", "--free", "--label", "mesh", "--pin", PIN, "--so-pin", "5678"],
        );
        let done = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_token_signs_and_refuses_clearly", "--nocapture"])
            .env(FOLDER, folder.path())
            .env("SOFTHSM2_CONF", folder.path().join("softhsm2.conf"))
            .status()
            .unwrap();
        assert!(done.success());
        return;
    };
    let id = |text| KeyId::parse(text).unwrap();
    let public = put(&folder, "issuing-p256", KeyAlgorithm::EcdsaP256, "01");
    put(&folder, "issuing-p384", KeyAlgorithm::EcdsaP384, "02");
    put(&folder, "issuing-rsa", KeyAlgorithm::Rsa { bits: 2048 }, "03");
    let ids = [id("issuing-p256"), id("issuing-p384"), id("issuing-rsa")];

    // Nothing is opened by a wrong PIN, a wrong name, or for a key that is not there.
    let open = |token: &str, pin: &str, keys: &[KeyId]| TokenKeyStore::open(&module(), token, pin, keys);
    assert!(matches!(open("mesh", "9999", &ids), Err(TokenError::WrongPin)));
    assert!(matches!(open("other", PIN, &ids), Err(TokenError::NoToken(label)) if label == "other"));
    assert!(matches!(open("mesh", PIN, &[id("absent")]), Err(TokenError::NoKey(key)) if key == id("absent")));
    assert!(matches!(
        TokenKeyStore::open(Path::new("/nonexistent.so"), "mesh", PIN, &ids),
        Err(TokenError::Module(_))
    ));

    // Every key signs what its public half verifies.
    let token = open("mesh", PIN, &ids).unwrap();
    assert_eq!(token.public_key(&ids[0]).unwrap(), public);
    for key in &ids {
        let signature = token.sign(key, b"message").unwrap();
        assert!(token.public_key(key).unwrap().verifies(b"message", &signature), "{key}");
        assert!(!token.public_key(key).unwrap().verifies(b"massage", &signature), "{key}");
    }
    assert_eq!(token.sign(&id("root"), b"x"), Err(KeyStoreError::UnknownKey(id("root"))));

    // A key that is drawn in the token never leaves it, takes nobody's name, and can be destroyed.
    for (name, algorithm) in
        [("drawn-p256", KeyAlgorithm::EcdsaP256), ("drawn-p384", KeyAlgorithm::EcdsaP384)]
    {
        let generate = || TokenKeyStore::generate(&module(), "mesh", PIN, &id(name), algorithm);
        let drawn = generate().unwrap();
        assert_eq!(drawn.public_key(&id(name)).unwrap().algorithm(), algorithm);
        let signature = drawn.sign(&id(name), b"message").unwrap();
        let again = open("mesh", PIN, &[id(name)]).unwrap();
        assert!(again.public_key(&id(name)).unwrap().verifies(b"message", &signature));
        assert_eq!(protection(name), [Attribute::Sensitive(true), Attribute::Extractable(false)]);
        assert!(matches!(generate(), Err(TokenError::KeyExists(key)) if key == id(name)));
    }
    TokenKeyStore::destroy(&module(), "mesh", PIN, &id("drawn-p384")).unwrap();
    assert!(matches!(open("mesh", PIN, &[id("drawn-p384")]), Err(TokenError::NoKey(_))));
    assert!(open("mesh", PIN, &[id("drawn-p256")]).is_ok());
    let unknown = TokenKeyStore::generate(&module(), "mesh", PIN, &id("drawn-25519"), KeyAlgorithm::Ed25519);
    assert!(matches!(unknown, Err(TokenError::Generate(KeyAlgorithm::Ed25519))));

    // An issuing CA whose key is in the token issues a leaf and a CRL.
    let mut offline = MemoryKeyStore::new();
    offline.generate(id("root")).unwrap();
    let domain = TrustDomain::parse("mesh.internal").unwrap();
    let naming = CaNaming { mesh: "prod-eu", now: NOW };
    let root = create_root(&offline, &id("root"), naming, &mut rng).unwrap();
    let root = Issuer::new(&root.der, id("root"), domain.clone(), &offline).unwrap();
    let made =
        create_issuing_ca_for(&root, &offline, &public, naming, &Pointers::default(), &mut rng).unwrap();
    let issuing = Issuer::new(&made.der, ids[0].clone(), domain, &token).unwrap();
    let names = vec![DnsName::parse("shop.mesh.internal").unwrap()];
    let (node, name) = (Label::parse("web-1").unwrap(), Label::parse("shop").unwrap());
    let hour = std::time::Duration::from_secs(3600);
    let template = LeafTemplate::service(Profile::Server, node, name, names, NOW, hour);
    let key = LeafKey::generate().unwrap();
    let issue = || issue_leaf(&issuing, &token, &key, &template, SerialNumber::random(&mut rng));
    assert!(issue().is_ok());
    assert!(build_crl(&issuing, &token, &CrlPlan::new(1, NOW, CRL_LIFETIME, &[])).is_ok());

    // The token is taken out: a clear refusal, and nothing signed.
    softhsm(&folder, &["--delete-token", "--token", "mesh"]);
    let refused = issue();
    assert!(
        matches!(&refused, Err(IssueError::KeyStore(KeyStoreError::Token { key_id, .. })) if *key_id == ids[0]),
        "{refused:?}"
    );
    assert!(matches!(open("mesh", PIN, &ids), Err(TokenError::NoToken(_) | TokenError::Token(_))));
}
