//! `meshctl login`: become an operator on this machine with a one-time token.

use std::sync::Arc;

use mesh_ca::{Csr, LeafKey, PinnedControllerVerifier, bundle};
use mesh_proto::v1::{self as pb, ErrorCode, operators_client::OperatorsClient};
use serde_json::json;
use sha2::{Digest as _, Sha256};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::{
    app::{App, client, operation_id},
    client::Target,
    context::{self, Context},
    error::{Exit, Failure, Result},
    secret::{self, Token, TokenFile},
    text::{fingerprint, safe},
    trust,
};

#[derive(clap::Args)]
pub(crate) struct Login {
    /// The controller: https://HOST:PORT
    #[arg(value_name = "URL")]
    url: Target,
    /// The one-time token, or `-` to read it from stdin; also MESH_TOKEN
    #[arg(value_name = "TOKEN", conflicts_with = "token_file", allow_hyphen_values = true)]
    token: Option<String>,
    #[command(flatten)]
    file: TokenFile,
}

impl std::fmt::Debug for Login {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Login").field("url", &self.url).finish_non_exhaustive()
    }
}

impl Login {
    pub(crate) async fn run(self, app: &App) -> Result<Exit> {
        let Target::Tcp(address) = &self.url else {
            return Err(Failure::usage(
                "login goes over the network",
                "give https://HOST:PORT; the local socket needs no login",
            ));
        };
        let text =
            secret::token(self.token.as_deref(), self.file.token_file.as_deref(), "meshctl login URL")?;
        let Token(token) = secret::parse_operator_token(&text)?;
        let path = context::path().ok_or_else(|| {
            Failure::usage(
                "there is no place for the context file",
                "set HOME, XDG_CONFIG_HOME or MESH_CONTEXT",
            )
        })?;
        let (channel, recorder) = connect(app, address, &token).await?;
        let key = LeafKey::generate().map_err(|error| failed("make a key", &error))?;
        let csr = Csr::create(&key).map_err(|error| failed("make a CSR", &error))?;
        let request = pb::LoginRequest {
            token_id: token.id.clone(),
            token_secret: token.secret.clone(),
            csr: csr.into(),
            operation_id: operation_id(),
        };
        let answer = app.ask(client!(OperatorsClient<_>, channel).login(request)).await?;
        check(&answer, &token, &recorder)?;
        let mut controllers = vec![address.clone()];
        controllers.extend(token.controllers.iter().filter(|other| *other != address).cloned());
        let context = Context {
            controllers,
            trust_domain: answer.trust_domain.clone(),
            operator: answer.name.clone(),
            role: answer.role.clone(),
            certificate: bundle::encode_certificates(std::iter::once(&answer.leaf).chain(&answer.issuers)),
            key: key.to_pkcs8_pem().to_string(),
            roots: bundle::encode_certificates(&answer.roots),
        };
        context::save(&path, &context)?;
        let line = format!(
            "{} is {} of {}; identity in {} (it holds a key: keep it yours)",
            safe(&answer.name),
            safe(&answer.role),
            safe(&answer.trust_domain),
            path.display()
        );
        let body = json!({
            "operator": answer.name, "role": answer.role, "trustDomain": answer.trust_domain, "controller": address,
            "context": path.display().to_string(),
        });
        app.out.action("Login", true, body, &answer.name, &[line]);
        Ok(Exit::Done)
    }
}

/// Connects only to a controller whose root is the one in the token.
async fn connect(
    app: &App,
    address: &str,
    token: &pb::JoinToken,
) -> Result<(tonic::transport::Channel, Arc<PinnedControllerVerifier>)> {
    let pin: [u8; 32] = token.root_spki_sha256.as_ref().try_into().expect("checked when the token was read");
    let recorder = Arc::new(PinnedControllerVerifier::new(pin));
    let mut config = trust::client_config(recorder.clone()).with_no_client_auth();
    trust::finish(&mut config);
    match app.places.tls_with(&[address.to_owned()], Arc::new(config)).await {
        Ok(channel) => Ok((channel, recorder)),
        Err(failure) => Err(match recorder.shown() {
            Some(shown) if shown != pin => mismatch(&pin, &shown),
            _ => failure,
        }),
    }
}

fn mismatch(expected: &[u8], shown: &[u8]) -> Failure {
    Failure::new(ErrorCode::RootMismatch, "controller's root key does not match the token")
        .fact(format!("token expects     {}", fingerprint(expected)))
        .fact(format!("controller showed {}", fingerprint(shown)))
        .why("wrong controller, a stale token, or someone in the middle. Nothing was sent.")
        .next("on the controller run `meshctl ca fingerprint`, compare, then create a new token")
}

/// What came back must belong to the root we pinned and the mesh we saw.
fn check(
    answer: &pb::LoginResponse,
    token: &pb::JoinToken,
    recorder: &PinnedControllerVerifier,
) -> Result<()> {
    let pinned = |der: &prost::bytes::Bytes| {
        X509Certificate::from_der(der).is_ok_and(|(_, root)| {
            Sha256::digest(root.public_key().raw).as_slice() == token.root_spki_sha256.as_ref()
        })
    };
    let seen = recorder.accepted().map(|accepted| accepted.domain.as_str().to_owned());
    if answer.roots.iter().any(pinned) && seen.as_deref() == Some(&answer.trust_domain) {
        return Ok(());
    }
    Err(Failure::new(ErrorCode::ControllerNotTrusted, "the controller's answer does not fit its own root")
        .why("the root or the domain in it is not the one of the connection")
        .next("do not use this controller; tell an admin"))
}

fn failed(attempt: &str, error: &dyn std::error::Error) -> Failure {
    Failure::new(ErrorCode::Internal, format!("cannot {attempt}")).why(error.to_string()).next("try again")
}
