//! The root away from the controller: exported, and asked to sign on another machine. Each step checks what the one
//! before wrote, and writes its own file whole or not at all.

use std::path::{Path, PathBuf};

use mesh_ca::bundle::{encode_certificates, parse_certificates};
use mesh_ca::{
    CEREMONY_BYTES_MAX, CeremonyError, Issuer, IssuerRequest, KeyId, KeyPurpose, MemoryKeyStore, TrustDomain,
    Unlock,
};
use mesh_proto::v1::{self as pb, ErrorCode, ca_client::CaClient};
use serde::{Deserialize, Serialize};
use serde_json::json;
use time::UtcDateTime;
use zeroize::Zeroizing;

use crate::{
    app::{App, client, operation_id},
    context,
    error::{Exit, Failure, Result},
    text::{date, fingerprint, now},
};

const PASSPHRASE_BYTES_MAX: u64 = 4096;
const API_VERSION: &str = "mesh/v1";

/// The root as it leaves the controller. The key is sealed under a passphrase.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct OfflineRoot {
    api_version: String,
    kind: String,
    fleet: String,
    trust_domain: String,
    root_spki_sha256: String,
    key_id: String,
    root: String,
    sealed_key: String,
}

const ROOT_KIND: &str = "OfflineRoot";

#[derive(Debug, clap::Args)]
pub(crate) struct Seal {
    /// Write the encrypted root key to this file; it must not exist
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// File with the passphrase that will protect it; `-` is stdin
    #[arg(long, value_name = "FILE", env = "MESH_PASSPHRASE_FILE")]
    passphrase_file: PathBuf,
}

#[derive(Debug, clap::Args)]
pub(crate) struct SignIssuer {
    /// The file that `meshctl ca seal` wrote
    #[arg(long, value_name = "FILE")]
    root: PathBuf,
    /// File with its passphrase; `-` is stdin
    #[arg(long, value_name = "FILE", env = "MESH_PASSPHRASE_FILE")]
    passphrase_file: PathBuf,
    /// The file that `meshctl ca rotate start --request-out` wrote
    #[arg(long, value_name = "FILE")]
    request: PathBuf,
    /// Write certificate and root CRL to this file
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

impl Seal {
    pub(crate) async fn run(self, app: &App) -> Result<Exit> {
        if self.out.symlink_metadata().is_ok() {
            return Err(Failure::usage(
                format!("{} exists already", self.out.display()),
                "name a file that does not exist: a root key is never overwritten",
            ));
        }
        let passphrase = passphrase(&self.passphrase_file)?;
        app.confirm("export the root's key and remove it from the controller for good?")?;
        let channel = app.controller().await?;
        let request =
            pb::ExportRootRequest { passphrase: passphrase.to_string(), operation_id: operation_id() };
        let exported = app.ask(client!(CaClient<_>, channel.clone()).export_root(request)).await?;
        let file = OfflineRoot {
            api_version: API_VERSION.into(),
            kind: ROOT_KIND.into(),
            fleet: exported.fleet,
            trust_domain: exported.trust_domain,
            root_spki_sha256: hex::encode(&exported.spki_sha256),
            key_id: exported.key_id,
            root: encode_certificates([&exported.root]),
            sealed_key: exported.sealed_key,
        };
        let text = serde_json::to_string_pretty(&file).map_err(|error| {
            Failure::new(ErrorCode::Internal, format!("a file cannot be encoded: {error}"))
        })?;
        write(&self.out, &Zeroizing::new(text + "\n"))?;
        // What stands on disk is opened once before the controller lets go of its own.
        open_root(&self.out, &passphrase)?;
        let request =
            pb::SealRequest { root_spki_sha256: exported.spki_sha256.clone(), operation_id: operation_id() };
        let done = app.ask(client!(CaClient<_>, channel).seal(request)).await?;
        let name = self.out.display().to_string();
        let lines = [
            format!(
                "root {} is offline; its key is in {name} and nowhere else",
                fingerprint(&exported.spki_sha256)
            ),
            "its CRL is good for a year; the controller goes on issuing".to_owned(),
            "next: copy the file to two places that are not this machine, then remove it here".to_owned(),
        ];
        let body = json!({ "path": name, "rootSpkiSha256": hex::encode(&exported.spki_sha256) });
        app.out.action("RootSealed", done.changed, body, &name, &lines);
        Ok(Exit::Done)
    }
}

/// The request for the offline root.
pub(super) async fn write_request(app: &App, path: &Path, key_type: String) -> Result<Exit> {
    let asked = pb::RequestIssuerRequest { key_type };
    let request = app.ask(client!(CaClient<_>, app.controller().await?).request_issuer(asked)).await?;
    write(path, &request.pem)?;
    let name = path.display().to_string();
    let lines = [
        format!("request for key {} written to {name}", fingerprint(&request.key_sha256)),
        format!("for root {}", fingerprint(&request.root_spki_sha256)),
        "next: where the root's key is, meshctl ca sign-issuer --root FILE --request FILE --out FILE"
            .to_owned(),
    ];
    let body = json!({
        "path": name, "keySha256": hex::encode(&request.key_sha256),
        "rootSpkiSha256": hex::encode(&request.root_spki_sha256),
    });
    app.out.action("IssuerRequest", true, body, &name, &lines);
    Ok(Exit::Done)
}

impl SignIssuer {
    /// Works without a controller: nothing but the files is read.
    pub(crate) fn run(self, app: &App) -> Result<Exit> {
        let request = IssuerRequest::parse_verified(&read(&self.request)?)
            .map_err(|error| mismatch(format!("{}: {}", self.request.display(), chain(&error))))?;
        let passphrase = passphrase(&self.passphrase_file)?;
        let root = open_root(&self.root, &passphrase)?;
        if request.mesh != root.fleet {
            return Err(mismatch(format!(
                "the request is for mesh {:?}, the root is of {:?}",
                request.mesh, root.fleet
            )));
        }
        let now = UtcDateTime::from_unix_timestamp(now()).unwrap_or(UtcDateTime::UNIX_EPOCH);
        let signed = mesh_ca::sign_issuer(&request, &root.issuer, &root.store, now, &mut fill);
        let signed = signed.map_err(|error| match error {
            CeremonyError::OtherRoot => mismatch(format!(
                "the request is for root {}, the file holds {}",
                fingerprint(&request.root_key_hash),
                fingerprint(&root.spki_sha256)
            )),
            other => Failure::new(
                ErrorCode::CertificateInvalid,
                format!("the issuing CA was not signed: {}", chain(&other)),
            )
            .next("check this machine's clock and the root's dates"),
        })?;
        write(&self.out, &signed.to_pem())?;
        let name = self.out.display().to_string();
        let key = signed.certificate.key_hash;
        let lines = [
            format!(
                "request for key {} signed by root {}",
                fingerprint(&key),
                fingerprint(&root.spki_sha256)
            ),
            format!(
                "issuing CA until {}, root CRL #{} for a year",
                date(signed.certificate.not_after.unix_timestamp()),
                request.crl_number
            ),
            format!("next: on the controller, meshctl ca rotate start --response {name}"),
        ];
        let body = json!({
            "path": name, "keySha256": hex::encode(key), "rootSpkiSha256": hex::encode(root.spki_sha256),
        });
        app.out.action("IssuerSigned", true, body, &name, &lines);
        Ok(Exit::Done)
    }
}

/// The offline root's answer, for the controller.
pub(super) fn read_response(path: &Path) -> Result<String> {
    String::from_utf8(read(path)?.to_vec())
        .map_err(|_| mismatch(format!("{} is no answer of `meshctl ca sign-issuer`", path.display())))
}

fn chain(error: &CeremonyError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// A root whose key is open, in this process's memory only.
struct OpenRoot {
    store: MemoryKeyStore,
    issuer: Issuer,
    fleet: String,
    spki_sha256: [u8; 32],
}

fn open_root(path: &Path, passphrase: &Zeroizing<String>) -> Result<OpenRoot> {
    let file: OfflineRoot = parse_root(path)?;
    let bad = |what: String| {
        Failure::new(ErrorCode::CaKeyMismatch, format!("{}: {what}", path.display()))
            .next("use the file that `meshctl ca seal` wrote, or a copy of it; nothing was signed")
    };
    let key_id = KeyId::parse(&file.key_id).map_err(|error| bad(error.to_string()))?;
    let unlock = Unlock::Passphrase(passphrase.as_bytes());
    let pkcs8 =
        mesh_ca::unseal(file.sealed_key.as_bytes(), &key_id, KeyPurpose::Root, unlock).map_err(|error| {
            match error {
                mesh_ca::SealError::WrongPassphrase => {
                    Failure::new(ErrorCode::PassphraseWrong, "the passphrase does not open the root's key")
                        .next("check the passphrase file; nothing was signed")
                }
                other => bad(other.to_string()),
            }
        })?;
    let mut store = MemoryKeyStore::new();
    store.insert_pkcs8(key_id.clone(), &pkcs8).map_err(|error| bad(error.to_string()))?;
    let roots = parse_certificates(file.root.as_bytes()).map_err(|error| bad(error.to_string()))?;
    let [root] = roots.as_slice() else { return Err(bad("it holds more than one root".into())) };
    let domain = TrustDomain::parse(&file.trust_domain).map_err(|error| bad(error.to_string()))?;
    let issuer = Issuer::new(root, key_id, domain, &store)
        .map_err(|error| bad(format!("key and certificate do not belong together: {error}")))?;
    let spki_sha256 = issuer.public_key().key_hash();
    if hex::encode(spki_sha256) != file.root_spki_sha256 {
        return Err(bad("its fingerprint is another".into()));
    }
    Ok(OpenRoot { store, issuer, fleet: file.fleet, spki_sha256 })
}

fn passphrase(path: &Path) -> Result<Zeroizing<String>> {
    use std::io::Read as _;
    let mut text = Zeroizing::new(String::new());
    let read = match path.as_os_str() == "-" {
        true => std::io::stdin().lock().take(PASSPHRASE_BYTES_MAX).read_to_string(&mut text),
        false => std::fs::File::open(path)
            .and_then(|file| file.take(PASSPHRASE_BYTES_MAX).read_to_string(&mut text)),
    };
    read.map_err(|error| Failure::file("read", path, &error))?;
    let line = Zeroizing::new(text.trim_end_matches(['\n', '\r']).to_owned());
    match line.is_empty() {
        true => Err(Failure::new(ErrorCode::PassphraseMissing, "the passphrase is empty")
            .next("write one into the file")),
        false => Ok(line),
    }
}

/// One octet more than may be there, so that what is too large is seen to be.
fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>> {
    use std::io::Read as _;
    let mut bytes = Zeroizing::new(Vec::new());
    std::fs::File::open(path)
        .and_then(|file| file.take(CEREMONY_BYTES_MAX as u64 + 1).read_to_end(&mut bytes))
        .map_err(|error| Failure::file("read", path, &error))?;
    Ok(bytes)
}

fn parse_root(path: &Path) -> Result<OfflineRoot> {
    // A JSON error may quote the file, which may hold a key.
    let other = || mismatch(format!("{} is no {ROOT_KIND} of {API_VERSION}", path.display()));
    let file: OfflineRoot = serde_json::from_slice(&read(path)?).map_err(|_| other())?;
    match file.api_version == API_VERSION && file.kind == ROOT_KIND {
        true => Ok(file),
        false => Err(other()),
    }
}

fn write(path: &Path, text: &str) -> Result<()> {
    context::replace(path, text.as_bytes(), 0o600).map_err(|error| Failure::file("write", path, &error))
}

fn mismatch(why: String) -> Failure {
    Failure::new(ErrorCode::CeremonyMismatch, why)
        .next("compare the fingerprints of request, root and answer; nothing was signed or changed")
}

fn fill(bytes: &mut [u8]) {
    use rand::RngCore as _;
    rand::rng().fill_bytes(bytes);
}
