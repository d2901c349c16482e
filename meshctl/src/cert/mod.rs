//! `meshctl cert`: certificates of services and people.

mod explain;
mod file;
mod folder;
mod inspect;
mod issue;
mod lint;
mod listing;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use clap::builder::NonEmptyStringValueParser;
use mesh_proto::v1::{
    self as pb, ErrorCode, certificates_client::CertificatesClient, local_client::LocalClient,
    revoke_certificate_request::Which,
};

use crate::{
    app::{App, Wait, Watch, client, operation_id},
    client::{CONTROLLER, Role},
    error::{Exit, Failure, Result},
    output::count,
    revocation,
    text::{Span, left, now, safe},
};

pub(crate) use file::{Facts, certificates as read_certificates};
pub(crate) use listing::{document, pair_document};

const SERIAL_BYTES: usize = 16;
/// How files of certificates end: what ends so is no name.
const FILE_ENDINGS: [&str; 4] = ["pem", "der", "crt", "cer"];
const KEY_HASH_PREFIX: &str = "sha256:";

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Issue a certificate; on a node meshd keeps it renewed
    Issue(issue::Issue),
    /// List certificates; on a node the pairs that meshd keeps there
    Ls(List),
    /// Everything about one certificate
    Show(Show),
    /// Renew a pair of this node now
    Renew(Renew),
    /// Revoke a certificate, or all live ones of a name
    Revoke(Revoke),
    /// Show any certificate and what is wrong with it: a file, or what answers at https://HOST:PORT; exit 3 on findings
    Inspect(inspect::Inspect),
    /// Check a certificate file: chain, dates, revocation, key; exit 3 if it fails
    Verify(file::Verify),
}

#[derive(Debug, Default, clap::Args)]
pub(crate) struct List {
    /// Only those that end within TIME, for instance 30d
    #[arg(long, value_name = "TIME")]
    expiring: Option<Span>,
    /// Only those of this node
    // An empty filter, of an unset variable for instance, would be none for the controller.
    #[arg(long, value_parser = NonEmptyStringValueParser::new())]
    node: Option<String>,
    /// Only those for this DNS name or address, or of the pair of this name
    #[arg(long, value_parser = NonEmptyStringValueParser::new())]
    name: Option<String>,
    /// Only those of the issuing CA whose key id begins with these hexadecimal digits
    #[arg(long, value_name = "HEX", value_parser = NonEmptyStringValueParser::new())]
    issuer: Option<String>,
    /// Only those in this state; ok unless given
    #[arg(long, value_enum, conflicts_with = "all")]
    state: Option<State>,
    /// Also those that have ended or are revoked
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    watch: Watch,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum State {
    Ok,
    Revoked,
    Ended,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Show {
    /// A serial number, a name (its newest certificate), or a PEM or DER file
    #[arg(value_name = "SERIAL|NAME|FILE", value_parser = NonEmptyStringValueParser::new())]
    which: String,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Renew {
    /// The pair's name, the first it was issued for
    name: String,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Revoke {
    /// A serial number, a name, or sha256:HEX of a public key
    #[arg(value_name = "SERIAL|NAME")]
    which: String,
    /// Why; superseded issues it again at once with a new key
    #[arg(long, value_parser = revocation::REASONS, default_value = "unspecified", hide_default_value = true)]
    reason: String,
    #[command(flatten)]
    wait: Wait,
}

impl Command {
    pub(crate) async fn run(self, app: &App) -> Result<Exit> {
        match self {
            Self::Issue(issue) => issue.run(app).await,
            Self::Ls(list) => app.watch(&list.watch, || list.run(app)).await,
            Self::Show(show) => show.run(app).await,
            Self::Renew(renew) => renew.run(app).await,
            Self::Revoke(revoke) => revoke.run(app).await,
            Self::Inspect(inspect) => inspect.run(app),
            Self::Verify(verify) => verify.run(app).await,
        }
    }
}

/// A serial number as it is shown everywhere: 32 hexadecimal digits, colons allowed.
fn parse_serial(text: &str) -> Option<Vec<u8>> {
    hex::decode(text.replace(':', "")).ok().filter(|serial| serial.len() == SERIAL_BYTES)
}

impl List {
    async fn run(&self, app: &App) -> Result<Exit> {
        let now = now();
        let asks_controller = self.node.is_some() || self.name.is_some() || self.issuer.is_some();
        let node_filter = asks_controller || self.state.is_some() || self.all;
        if app.places.status_role() == Role::Node && !node_filter {
            let pairs = app
                .ask_node(client!(LocalClient<_>, app.node().await?).list_certificates(pb::Empty {}))
                .await?
                .pairs;
            let within = self.expiring.map(|span| now + i64::from(span.seconds()));
            let pairs: Vec<_> =
                pairs.into_iter().filter(|pair| within.is_none_or(|end| pair.not_after <= end)).collect();
            app.out.listing(&listing::pairs(&pairs, now));
            return Ok(Exit::Done);
        }
        let certificates = self.all_pages(app).await?;
        app.out.listing(&listing::certificates(&certificates, now, app.out.is_wide()));
        Ok(Exit::Done)
    }

    async fn all_pages(&self, app: &App) -> Result<Vec<pb::Certificate>> {
        let mut service = client!(CertificatesClient<_>, app.controller().await?);
        let mut all = Vec::new();
        let mut page_token = String::new();
        loop {
            let request = pb::ListCertificatesRequest {
                expiring_within_secs: self.expiring.map_or(0, Span::seconds),
                node: self.node.clone().unwrap_or_default(),
                include_ended: self.all,
                page_size: 0,
                page_token: page_token.clone(),
                name: self.name.clone().unwrap_or_default(),
                issuer: self.issuer.clone().unwrap_or_default(),
                state: match self.state {
                    None => pb::list_certificates_request::State::Unspecified,
                    Some(State::Ok) => pb::list_certificates_request::State::Ok,
                    Some(State::Revoked) => pb::list_certificates_request::State::Revoked,
                    Some(State::Ended) => pb::list_certificates_request::State::Ended,
                }
                .into(),
            };
            let page = app.ask(service.list(request)).await?;
            all.extend(page.certificates);
            // A token that repeats itself would go round for ever.
            if page.next_page_token.is_empty() || page.next_page_token == page_token {
                return Ok(all);
            }
            page_token = page.next_page_token;
        }
    }
}

/// Every certificate that is neither revoked nor past its end.
pub(crate) async fn all_live(app: &App) -> Result<Vec<pb::Certificate>> {
    List::default().all_pages(app).await
}

impl Show {
    async fn run(self, app: &App) -> Result<Exit> {
        let path = PathBuf::from(&self.which);
        if path.is_file() {
            return inspect::show_file(app, &path);
        }
        let serial = match parse_serial(&self.which) {
            Some(serial) => serial,
            None => newest(app, &self.which).await?,
        };
        let request = pb::GetCertificateRequest { serial: serial.into() };
        let certificate =
            app.ask(client!(CertificatesClient<_>, app.controller().await?).get(request)).await?;
        match app.out.format {
            crate::output::Format::Json => {
                let mut body = document(&certificate);
                body["pem"] = mesh_ca::bundle::encode_certificates([&certificate.leaf]).into();
                app.out.document("Certificate", &body);
            }
            crate::output::Format::Name => app.out.line(&hex::encode(&certificate.serial)),
            _ => listing::describe(&certificate, now()).iter().for_each(|line| app.out.line(line)),
        }
        Ok(Exit::Done)
    }
}

/// Serial number of the newest certificate of a name: of the live ones, or else of all.
async fn newest(app: &App, name: &str) -> Result<Vec<u8>> {
    let missing = |what: String| Failure::new(ErrorCode::CertificateNotFound, what);
    let path = Path::new(name);
    if path.components().count() > 1
        || path.extension().is_some_and(|end| FILE_ENDINGS.iter().any(|of| end == *of))
    {
        return Err(missing(format!("there is no file {name}")).next("check the path"));
    }
    let asked = List { name: Some(name.to_owned()), all: true, ..List::default() };
    let all = asked.all_pages(app).await?;
    let newest = all
        .iter()
        .max_by_key(|one| (one.revoked_at == 0, one.not_before, one.not_after))
        .ok_or_else(|| {
            let failure = missing(format!("no certificate was issued for {name}"))
                .next("`meshctl cert ls --all` shows all of them");
            match name.bytes().all(|letter| letter.is_ascii_hexdigit()) {
                true => failure.why("it is no serial number either: those have 32 hexadecimal digits"),
                false => failure,
            }
        })?;
    if all.len() > 1 {
        let rest = count(all.len() - 1, "more certificate");
        app.out.note(&format!("{rest} of this name: meshctl cert ls --all --name {name}"));
    }
    Ok(newest.serial.to_vec())
}

impl Renew {
    async fn run(self, app: &App) -> Result<Exit> {
        if !app.places.is_node() {
            return Err(Failure::new(
                ErrorCode::CertificateNotFound,
                "only a node renews the pairs it keeps",
            )
            .why("no meshd node runs here")
            .next("run this on the node, or `meshctl cert issue` again"));
        }
        let request = pb::LocalRenewRequest { name: self.name.clone() };
        let pair =
            app.ask_node(client!(LocalClient<_>, app.node().await?).renew_certificate(request)).await?;
        let line = format!(
            "{} renewed: serial {}, expires in {}",
            safe(&pair.name),
            hex::encode(&pair.serial),
            left(pair.not_after, now())
        );
        app.out.action("ManagedPair", pair.changed, pair_document(&pair), &self.name, &[line]);
        Ok(Exit::Done)
    }
}

impl Revoke {
    async fn run(self, app: &App) -> Result<Exit> {
        let which = match (parse_serial(&self.which), self.which.strip_prefix(KEY_HASH_PREFIX)) {
            (Some(serial), _) => Which::Serial(serial.into()),
            (None, Some(hash)) => {
                let hash = hex::decode(hash).ok().filter(|hash| hash.len() == 32).ok_or_else(|| {
                    Failure::usage(
                        "this is not the SHA-256 of a key",
                        "write sha256: and 64 hexadecimal digits",
                    )
                })?;
                Which::KeyHash(hash.into())
            }
            (None, None) => Which::Name(self.which.clone()),
        };
        app.confirm(&format!("revoke {}?", self.which))?;
        let wait = self.wait.seconds();
        let request = pb::RevokeCertificateRequest {
            reason: self.reason,
            wait_secs: wait,
            operation_id: operation_id(),
            which: Some(which),
        };
        let mut service = client!(CertificatesClient<_>, app.controller().await?);
        let answer =
            app.ask_for(CONTROLLER, Duration::from_secs(wait.into()), service.revoke(request)).await?;
        let head = head(&self.which, &answer);
        Ok(revocation::report(app, "CertificateRevocation", &self.which, &answer, head, wait > 0))
    }
}

fn head(which: &str, answer: &pb::RevokeResponse) -> String {
    let which = safe(which);
    if !answer.changed {
        return format!("{which}: nothing to revoke, that was done already");
    }
    format!("{which}: {} revoked (CRL #{})", revocation::certificates(answer), answer.crl_number)
}

/// The note that goes with every pair nobody keeps.
fn nobody_renews(out: &std::path::Path, not_after: i64) -> String {
    let path = out.display().to_string();
    format!("nobody renews {}: issue it again before it ends in {}", safe(&path), left(not_after, now()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serials_have_32_digits_and_may_have_colons() {
        assert_eq!(parse_serial(&"ab".repeat(16)).unwrap(), [0xab; 16]);
        assert_eq!(parse_serial(&["AB"; 16].join(":")).unwrap(), [0xab; 16]);
        for text in ["", "abcd", "api.mesh.internal", &"ab".repeat(17), &"zz".repeat(16)] {
            assert!(parse_serial(text).is_none(), "{text}");
        }
    }

    #[test]
    fn revoking_twice_says_so() {
        assert_eq!(
            head("api", &pb::RevokeResponse::default()),
            "api: nothing to revoke, that was done already"
        );
    }
}
