//! The root taken offline: its export and its seal, what it is asked to sign, and what it answers.

use std::sync::Arc;

use mesh_ca::{
    CEREMONY_BYTES_MAX, CaKeyType, IssuerRequest, KeyPurpose, KeyStore as _, Pointers, PublicKey,
    RevokedEntry, SignedIssuer,
};
use mesh_core::{Command, Request};
use mesh_proto::v1 as pb;
use sha2::{Digest as _, Sha256};
use time::UtcDateTime;

use crate::auth::Caller;
use crate::authority::{Authority, CaFacts, NewKey, Signer, crl_entry, random_fill, unlock_with};
use crate::config::Passphrase;
use crate::parts::Parts;
use crate::state::{read_file, replace_file};
use crate::status::Problem;
use crate::succession::{Prepared, asked_key_type, draw, keep};

/// The key of an authority that the offline root has not signed yet, and its request.
const PENDING_KEY: &str = "pending-issuing";
const PENDING_REQUEST: &str = "pending-issuing.request";

impl Parts {
    /// The root's key under a passphrase of the caller's. Recorded first.
    pub(crate) async fn export_root(
        &self,
        caller: &Caller,
        request: pb::ExportRootRequest,
    ) -> Result<pb::ExportRootResponse, Problem> {
        let operation = super::service::operation(&request.operation_id)?;
        let actor = super::service::actor(caller)?;
        let passphrase = super::service::lone_passphrase(request.passphrase, "an exported root")?;
        let _one = self.successions.lock().await;
        let root = self.active_root()?;
        let command = Command::ExportRoot { key_id: root.key_id.clone() };
        // Commit point: whoever has the file stands in the journal.
        self.writer.submit(Request { actor, operation, command }).await?;
        self.publisher.sign_anew(&root.key_id).await?;
        let authority = Arc::clone(self.issuing.authority());
        let known = root.clone();
        let (sealed_key, key_id) =
            self.issuing.on_pool(move || authority.export(&known, &passphrase)).await?;
        let facts = CaFacts::read(&root.der).ok_or_else(|| Problem::internal("the root cannot be read"))?;
        Ok(pb::ExportRootResponse {
            sealed_key,
            root: root.der.into(),
            key_id,
            spki_sha256: facts.spki_sha256.to_vec().into(),
            fleet: self.directory.read(|world| world.fleet().unwrap_or_default().to_owned()),
            trust_domain: self.issuing.authority().domain().to_string(),
        })
    }

    /// Takes the root's key away, for good.
    pub(crate) async fn seal_root(
        &self,
        caller: &Caller,
        request: pb::SealRequest,
    ) -> Result<pb::ActionResponse, Problem> {
        let operation = super::service::operation(&request.operation_id)?;
        let actor = super::service::actor(caller)?;
        let _one = self.successions.lock().await;
        let root = self.active_root()?;
        let facts = CaFacts::read(&root.der).ok_or_else(|| Problem::internal("the root cannot be read"))?;
        if facts.spki_sha256 != *request.root_spki_sha256 {
            return Err(Problem::ceremony(
                "the exported file is of another root than the one that signs here",
            ));
        }
        let command = Command::SealRoot { key_id: root.key_id.clone() };
        // Commit point: from here on the key is not used; a crash before it is removed ends at the next start.
        let committed = self.writer.submit(Request { actor, operation, command }).await?;
        let authority = Arc::clone(self.issuing.authority());
        let known = root.clone();
        let removed = self.issuing.on_pool(move || {
            authority
                .forget(&known)
                .map_err(|error| Problem::internal_error("the root's key file stays", &error))
        });
        removed.await?;
        let detail = match committed.changed() {
            true => format!("root {} is offline", hex::encode(facts.spki_sha256)),
            false => "the root is offline already".to_owned(),
        };
        Ok(pb::ActionResponse { changed: committed.changed(), detail, incomplete: false })
    }

    /// The request for the offline root: made once, and handed out again until it is answered.
    pub(crate) async fn request_issuer(
        &self,
        caller: &Caller,
        request: pb::RequestIssuerRequest,
    ) -> Result<pb::IssuerRequest, Problem> {
        let actor = super::service::actor(caller)?;
        let key_type = asked_key_type(&request.key_type)?;
        let _one = self.successions.lock().await;
        let at = self.utc();
        let (root, fleet, crl_number, revoked) = self.directory.read(|world| {
            world.check_actor(at, &actor, mesh_core::CommandKind::StartRotation)?;
            if let Some(rotation) = world.rotation() {
                return Err(mesh_core::Refusal::RotationRunning { to: rotation.to.clone() });
            }
            let root = world.active_root().cloned().ok_or(mesh_core::Refusal::MeshMissing)?;
            let number = self.publisher.number_after(world.last_crl_number(&root.key_id, 0));
            let revoked = world.revoked_entries(&root.key_id, 0);
            Ok((root, world.fleet().unwrap_or_default().to_owned(), number, revoked))
        })?;
        let facts = CaFacts::read(&root.der).ok_or_else(|| Problem::internal("the root cannot be read"))?;
        let draft = Draft {
            root_key_hash: facts.spki_sha256,
            mesh: fleet,
            pointers: self.publisher.ca_pointers(&root.der)?,
            requested_at: self.clock.utc_now(),
            crl_number,
            revoked: revoked.into_iter().filter_map(|(serial, at, why)| crl_entry(serial, at, why)).collect(),
        };
        let authority = Arc::clone(self.issuing.authority());
        let (pem, key_hash) =
            self.issuing.on_pool(move || pending_request(&authority, draft, key_type)).await?;
        Ok(pb::IssuerRequest {
            pem,
            root_spki_sha256: facts.spki_sha256.to_vec().into(),
            key_sha256: key_hash.to_vec().into(),
        })
    }

    /// The offline root's answer: certificate and CRL, each checked before anything is believed.
    pub(crate) async fn take_response(
        &self,
        answer: String,
        root: &mesh_core::Authority,
    ) -> Result<Prepared, Problem> {
        let authority = Arc::clone(self.issuing.authority());
        let known = root.clone();
        let (issuing, der) = self.issuing.on_pool(move || bind_pending(&authority, &answer, &known)).await?;
        let crl = mesh_ca::Crl::parse_verified(&der, &root.der)
            .map_err(|error| Problem::ceremony(format!("the root's CRL is not believed: {error}")))?;
        let digest: [u8; 32] = Sha256::digest(&der).into();
        let (last, taken) = self.directory.read(|world| {
            let last = world.crl(&root.key_id, 0);
            (last.map_or(0, |last| last.number), last.is_some_and(|last| last.digest == digest))
        });
        let next = self.publisher.number_after(last);
        if !taken && crl.number() != next {
            return Err(Problem::ceremony(format!(
                "the root's CRL has number {}, {next} is the next: make a new request",
                crl.number()
            )));
        }
        if !taken {
            self.publisher.take_foreign(&root.key_id, &crl, der.into()).await?;
        }
        Ok(Prepared { issuing, root: None, crosses: Vec::new() })
    }

    /// Publishes the next CRL of a root whose key is elsewhere.
    pub(crate) async fn import_crl(
        &self,
        caller: &Caller,
        request: pb::ImportCrlRequest,
    ) -> Result<pb::ActionResponse, Problem> {
        let actor = super::service::actor(caller)?;
        let _one = self.successions.lock().await;
        let at = self.utc();
        let der = request.crl;
        let digest: [u8; 32] = Sha256::digest(&der).into();
        let (root, issuing, last) = self.directory.read(|world| {
            world.check_actor(at, &actor, mesh_core::CommandKind::SealRoot)?;
            let root = world.active_root().cloned().ok_or(mesh_core::Refusal::MeshMissing)?;
            let issuing = world.active_issuer().cloned().ok_or(mesh_core::Refusal::MeshMissing)?;
            let last = world.crl(&root.key_id, 0).map(|last| (last.number, last.digest));
            Ok::<_, Problem>((root, issuing, last))
        })?;
        let refused = |why: String| {
            Problem::new(
                pb::ErrorCode::ImportRefused,
                format!("the CRL is not taken: {why}"),
                "let the root sign its next CRL (`openssl ca -gencrl`) and give that; the one before stays",
            )
        };
        if last.is_some_and(|(_, known)| known == digest) {
            let detail = "this CRL is published already".to_owned();
            return Ok(pb::ActionResponse { changed: false, detail, incomplete: false });
        }
        if !root.sealed {
            return Err(refused(
                "the root's key is here, and the controller signs the root's CRLs".to_owned(),
            ));
        }
        let crl =
            mesh_ca::Crl::parse_verified(&der, &root.der).map_err(|error| refused(error.to_string()))?;
        if let Some((last, _)) = last.filter(|(last, _)| crl.number() <= *last) {
            return Err(refused(format!("it has number {}, and number {last} is published", crl.number())));
        }
        if mesh_core::UtcTime::from(crl.next_update()) <= at {
            return Err(refused(format!("it ended at {}", crl.next_update())));
        }
        if CaFacts::read(&issuing.der).is_some_and(|facts| crl.contains_raw(&facts.serial)) {
            return Err(refused(
                "it lists the issuing CA, and nothing below that would be accepted".to_owned(),
            ));
        }
        let detail = format!("CRL #{} of the root, good until {}", crl.number(), crl.next_update());
        self.publisher.take_foreign(&root.key_id, &crl, der).await?;
        Ok(pb::ActionResponse { changed: true, detail, incomplete: false })
    }

    /// The request has been answered.
    pub(crate) fn forget_pending(&self) {
        let keys = self.issuing.authority().keys();
        for name in [format!("{PENDING_KEY}.key"), PENDING_REQUEST.to_owned()] {
            match std::fs::remove_file(keys.join(&name)) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    tracing::warn!(%error, name, "an answered request stays on disk");
                }
                _ => {}
            }
        }
    }
}

impl Authority {
    /// The root's key, sealed again under `passphrase`; and the name it has in that seal. Blocks.
    fn export(
        &self,
        root: &mesh_core::Authority,
        passphrase: &Passphrase,
    ) -> Result<(String, String), Problem> {
        let (id, pkcs8) = self.open_sealed(root)?;
        let cost = mesh_ca::KdfParams::default();
        let unlock = unlock_with(Some(passphrase));
        let text = mesh_ca::seal(&pkcs8, &id, KeyPurpose::Root, unlock, cost, &mut random_fill)
            .map_err(|error| Problem::internal_error("the root's key cannot be sealed again", &error))?;
        Ok((text.as_str().to_owned(), id.to_string()))
    }
}

/// A request but for its key.
struct Draft {
    root_key_hash: [u8; 32],
    mesh: String,
    pointers: Pointers,
    requested_at: UtcDateTime,
    crl_number: u64,
    revoked: Vec<RevokedEntry>,
}

impl Draft {
    /// Whether `request` asks for the same.
    fn is_in(&self, request: &IssuerRequest) -> bool {
        (self.root_key_hash, self.crl_number) == (request.root_key_hash, request.crl_number)
            && (&self.mesh, &self.pointers, &self.revoked)
                == (&request.mesh, &request.pointers, &request.revoked)
    }
}

/// The request that waits, PEM, and the digest of its key; made if there is none or it asks for something else than
/// `draft`. Blocks.
fn pending_request(
    authority: &Authority,
    draft: Draft,
    key_type: Option<CaKeyType>,
) -> Result<(String, [u8; 32]), Problem> {
    if authority.token().is_some() {
        // Its key would wait in a file.
        return Err(Problem::new(
            pb::ErrorCode::TokenUnavailable,
            "keys of this mesh are drawn in a hardware token, and a request for an offline root is not made there",
            "rotate before the root is sealed, or take key_store out of the configuration for this rotation",
        ));
    }
    let key_file = authority.keys().join(format!("{PENDING_KEY}.key"));
    let fits = |key: &PublicKey| key_type.is_none_or(|wanted| key.algorithm() == wanted.algorithm());
    if key_file.exists()
        && let Ok((pem, request)) = stored_request(authority)
        && draft.is_in(&request)
        && fits(&request.public_key)
    {
        return Ok((pem, request.public_key.key_hash()));
    }
    let failed = "cannot make a request";
    let public_of =
        |key: &NewKey| key.store.public_key(&key.id).map_err(|error| Problem::internal_error(failed, &error));
    let mut key = match key_file.exists() {
        true => NewKey::open(authority, PENDING_KEY, KeyPurpose::Issuing)?,
        false => draw(authority, PENDING_KEY, KeyPurpose::Issuing, next_type(authority, key_type))?,
    };
    let mut public_key = public_of(&key)?;
    if !fits(&public_key) {
        // Whoever signs the request before this one signs for nothing.
        key = draw(authority, PENDING_KEY, KeyPurpose::Issuing, next_type(authority, key_type))?;
        public_key = public_of(&key)?;
    }
    let Draft { root_key_hash, mesh, pointers, requested_at, crl_number, revoked } = draft;
    let request =
        IssuerRequest { root_key_hash, mesh, public_key, pointers, requested_at, crl_number, revoked };
    let pem = request.to_pem(&key.store, &key.id).map_err(|error| Problem::internal_error(failed, &error))?;
    // The key first: a request without its key would be signed for nothing.
    key.write(authority.keys())?;
    replace_file(&authority.keys().join(PENDING_REQUEST), pem.as_bytes())
        .map_err(|error| Problem::internal_error("cannot write the request", &error))?;
    Ok((pem, request.public_key.key_hash()))
}

fn next_type(authority: &Authority, wanted: Option<CaKeyType>) -> CaKeyType {
    wanted.unwrap_or_else(|| authority.next_key_type())
}

fn stored_request(authority: &Authority) -> Result<(String, IssuerRequest), Problem> {
    let none = || Problem::ceremony("no request is waiting for an answer");
    let text =
        read_file(&authority.keys().join(PENDING_REQUEST), CEREMONY_BYTES_MAX as u64).map_err(|_| none())?;
    let request = IssuerRequest::parse_verified(&text)
        .map_err(|error| Problem::ceremony(format!("the request that waits is damaged: {error}")))?;
    Ok((String::from_utf8(text).map_err(|_| none())?, request))
}

/// The pending key with the certificate that the offline root made for it, under its lasting name, and the root's CRL.
/// Blocks.
fn bind_pending(
    authority: &Authority,
    answer: &str,
    root: &mesh_core::Authority,
) -> Result<(Signer, Vec<u8>), Problem> {
    let (_, request) = stored_request(authority)?;
    let signed = SignedIssuer::parse_verified(answer.as_bytes(), &request, &root.der).map_err(|error| {
        Problem::ceremony(format!("the answer is not believed: {}", mesh_runtime::chain(&error)))
    })?;
    let key = NewKey::open(authority, PENDING_KEY, KeyPurpose::Issuing)?;
    let signer = keep(authority, key, &signed.certificate.der, KeyPurpose::Issuing)?;
    Ok((signer, signed.root_crl))
}
