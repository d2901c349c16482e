//! `meshctl ca`: root, issuing CAs, CRLs.

mod backup;
mod ceremony;
mod rotate;
mod trust;

use std::path::PathBuf;

use mesh_ca::{
    CRL_BYTES_MAX,
    bundle::{encode_certificates, encode_crls, parse_crls},
};
use mesh_proto::v1::{self as pb, ErrorCode, ca_client::CaClient, certificates_client::CertificatesClient};
use serde_json::{Value, json};

use crate::{
    app::{App, client, operation_id},
    context,
    error::{Exit, Failure, Result},
    output::{Format, Table, write_bytes},
    text::{ago, date, fingerprint, left, now, rfc3339, safe},
};

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Root, issuing CAs and CRLs with their dates
    Show,
    /// The root certificate, PEM
    Root(Root),
    /// SHA-256 of the root's public key: what join tokens pin
    Fingerprint,
    /// The current CRLs, PEM
    Crl(Crl),
    /// The root among those that this machine trusts (Debian's ca-certificates)
    #[command(subcommand)]
    Trust(trust::Trust),
    /// Replace the issuing CA, or the root with it, while everything keeps working
    #[command(subcommand)]
    Rotate(rotate::Command),
    /// Take the root offline: export its key encrypted, and remove it from the controller
    Seal(ceremony::Seal),
    /// On the machine with the root's key: sign a new issuing CA
    SignIssuer(ceremony::SignIssuer),
    /// Publish the next CRL of a root whose key is elsewhere
    ImportCrl(ImportCrl),
    /// Journal, sealed keys, CRLs and settings in one encrypted file; as root on the controller
    Backup(backup::Backup),
}

#[derive(Debug, clap::Args)]
pub(crate) struct Root {
    /// Write it to this file
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Crl {
    /// The issuing CA's CRL alone, as DER
    #[arg(long)]
    der: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct ImportCrl {
    /// The CRL, PEM or DER
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

impl ImportCrl {
    async fn run(self, app: &App) -> Result<()> {
        let failed = |error| Failure::file("read", &self.file, &error);
        let mut bytes = Vec::new();
        let file = std::fs::File::open(&self.file).map_err(failed)?;
        // One more than allowed, so that the controller's limit is what refuses it.
        std::io::Read::read_to_end(&mut std::io::Read::take(file, CRL_BYTES_MAX as u64 + 1), &mut bytes)
            .map_err(failed)?;
        let der = match parse_crls(&bytes).as_deref() {
            Ok([der]) => der.clone(),
            _ => bytes,
        };
        let request = pb::ImportCrlRequest { crl: der.into(), operation_id: operation_id() };
        let done = app.ask(client!(CaClient<_>, app.controller().await?).import_crl(request)).await?;
        let name = self.file.display().to_string();
        let body = json!({ "path": name, "detail": done.detail });
        app.out.action("RootCrl", done.changed, body, &name, &[safe(&done.detail).into_owned()]);
        Ok(())
    }
}

impl Command {
    pub(crate) async fn run(self, app: &App) -> Result<Exit> {
        match self {
            Self::Show => show(app).await?,
            Self::Root(root) => root.run(app).await?,
            Self::Fingerprint => print_fingerprint(app).await?,
            Self::Crl(crl) => crl.run(app).await?,
            Self::Trust(trust) => trust.run(app).await?,
            Self::Rotate(rotate) => return rotate.run(app).await,
            Self::Seal(seal) => return seal.run(app).await,
            Self::SignIssuer(sign) => return sign.run(app),
            Self::ImportCrl(import) => import.run(app).await?,
            Self::Backup(backup) => return backup.run(app).await,
        }
        Ok(Exit::Done)
    }
}

async fn info(app: &App) -> Result<pb::CaInfo> {
    app.ask(client!(CaClient<_>, app.controller().await?).show(pb::Empty {})).await
}

async fn show(app: &App) -> Result<()> {
    let info = info(app).await?;
    match app.out.format {
        Format::Json => app.out.document("Ca", &document(&info)),
        Format::Name => {
            info.roots.iter().chain(&info.issuers).for_each(|ca| app.out.line(&safe(&ca.subject)))
        }
        Format::Table | Format::Wide => {
            app.out.line(&format!(
                "fleet {}   domain {}   keys unlocked by {}",
                safe(&info.fleet),
                safe(&info.trust_domain),
                safe(&info.unlock)
            ));
            authorities(&info).lines().iter().for_each(|line| app.out.line(line));
            app.out.line("");
            crls(&info, now()).lines().iter().for_each(|line| app.out.line(line));
        }
    }
    Ok(())
}

fn authorities(info: &pb::CaInfo) -> Table {
    let mut table = Table::new(&["CA", "STATE", "SUBJECT", "FROM", "UNTIL", "TYPE", "KEY"]);
    let kinds = info.roots.iter().map(|ca| ("root", ca)).chain(info.issuers.iter().map(|ca| ("issuing", ca)));
    for (kind, ca) in kinds {
        table.row([
            kind.into(),
            state(ca),
            ca.subject.clone(),
            date(ca.not_before),
            date(ca.not_after),
            ca.key_type.clone(),
            fingerprint(&ca.spki_sha256),
        ]);
    }
    table
}

/// Where an authority stands; an older controller does not say.
fn state(ca: &pb::CaCertificate) -> String {
    let sealed = if ca.sealed { ", key offline" } else { "" };
    format!("{}{sealed}", safe(&ca.standing))
}

fn crls(info: &pb::CaInfo, now: i64) -> Table {
    let mut table = Table::new(&["CRL", "ISSUER", "ENTRIES", "SIGNED", "GOOD FOR"]);
    for crl in &info.crls {
        table.row([
            format!("#{}", crl.number),
            crl.issuer.clone(),
            crl.entries.to_string(),
            ago(crl.signed_at, now),
            left(crl.next_update, now),
        ]);
    }
    table
}

fn document(info: &pb::CaInfo) -> Value {
    let authority = |ca: &pb::CaCertificate| {
        json!({
            "subject": ca.subject, "serial": hex::encode(&ca.serial), "notBefore": rfc3339(ca.not_before),
            "notAfter": rfc3339(ca.not_after), "standing": ca.standing, "keyOffline": ca.sealed, "keyType": ca.key_type, "spkiSha256": hex::encode(&ca.spki_sha256), "pem": encode_certificates([&ca.der]),
        })
    };
    let crl = |crl: &pb::CrlInfo| {
        json!({
            "issuer": crl.issuer, "issuerKeyId": hex::encode(&crl.issuer_key_id), "shard": crl.shard, "number": crl.number,
            "thisUpdate": rfc3339(crl.this_update), "signedAt": rfc3339(crl.signed_at), "nextUpdate": rfc3339(crl.next_update), "entries": crl.entries,
        })
    };
    json!({
        "fleet": info.fleet, "trustDomain": info.trust_domain, "rootSpkiSha256": hex::encode(&info.root_spki_sha256),
        "unlock": info.unlock, "roots": info.roots.iter().map(authority).collect::<Vec<_>>(),
        "issuers": info.issuers.iter().map(authority).collect::<Vec<_>>(),
        "crls": info.crls.iter().map(crl).collect::<Vec<_>>(),
    })
}

impl Root {
    async fn run(self, app: &App) -> Result<()> {
        let info = info(app).await?;
        let text: String = info.roots.iter().map(|root| encode_certificates([&root.der])).collect();
        let Some(path) = self.out else {
            if app.out.is_json() {
                app.out.document(
                    "RootCertificate",
                    &json!({ "pem": text, "spkiSha256": hex::encode(&info.root_spki_sha256) }),
                );
            } else {
                app.out.write(&text);
            }
            return Ok(());
        };
        let same = std::fs::read_to_string(&path).is_ok_and(|old| old == text);
        if !same {
            context::replace(&path, text.as_bytes(), 0o644)
                .map_err(|error| Failure::file("write", &path, &error))?;
        }
        let name = path.display().to_string();
        let line = format!("root certificate {} {name}", if same { "is already in" } else { "written to" });
        app.out.action("RootCertificate", !same, json!({ "path": name }), &name, &[line]);
        Ok(())
    }
}

async fn print_fingerprint(app: &App) -> Result<()> {
    let info = info(app).await?;
    let text = fingerprint(&info.root_spki_sha256);
    if app.out.is_json() {
        app.out.document(
            "Fingerprint",
            &json!({ "rootSpkiSha256": hex::encode(&info.root_spki_sha256), "text": text }),
        );
    } else {
        app.out.line(&text);
    }
    Ok(())
}

impl Crl {
    async fn run(self, app: &App) -> Result<()> {
        let channel = app.controller().await?;
        let crls =
            app.ask(client!(CertificatesClient<_>, channel).crls(pb::CrlsRequest::default())).await?.crls;
        if self.der {
            if app.out.is_json() {
                return Err(Failure::usage("DER is no JSON", "leave out --der or -o json"));
            }
            let info = info(app).await?;
            let issuing = issuing_crl(&crls, &info).ok_or_else(|| {
                Failure::new(ErrorCode::CertificateNotFound, "the controller has no CRL of an issuing CA")
                    .next("look at `meshctl ca show`")
            })?;
            write_bytes(&issuing.der);
            return Ok(());
        }
        if app.out.is_json() {
            let items: Vec<Value> = crls
                .iter()
                .map(|crl| {
                    json!({
                        "issuerKeyId": hex::encode(&crl.issuer_key_id), "shard": crl.shard, "number": crl.number,
                        "pem": encode_crls([&crl.der]),
                    })
                })
                .collect();
            app.out.list_document("CrlList", &items);
        } else {
            crls.iter().for_each(|crl| app.out.write(&encode_crls([&crl.der])));
        }
        Ok(())
    }
}

/// The newest CRL that is not of a root.
fn issuing_crl<'a>(crls: &'a [pb::Crl], info: &pb::CaInfo) -> Option<&'a pb::Crl> {
    let roots: Vec<&str> = info.roots.iter().map(|root| root.subject.as_str()).collect();
    let of_root = |crl: &pb::Crl| {
        info.crls
            .iter()
            .any(|known| known.issuer_key_id == crl.issuer_key_id && roots.contains(&known.issuer.as_str()))
    };
    crls.iter().filter(|crl| !of_root(crl)).max_by_key(|crl| crl.number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn der_means_the_newest_crl_of_an_issuing_ca() {
        let crl = |key: u8, number| pb::Crl { issuer_key_id: vec![key].into(), number, ..pb::Crl::default() };
        let known = |key: u8, issuer: &str| pb::CrlInfo {
            issuer_key_id: vec![key].into(),
            issuer: issuer.into(),
            ..pb::CrlInfo::default()
        };
        let info = pb::CaInfo {
            roots: vec![pb::CaCertificate { subject: "root".into(), ..pb::CaCertificate::default() }],
            crls: vec![known(1, "root"), known(2, "issuing")],
            ..pb::CaInfo::default()
        };
        assert_eq!(issuing_crl(&[crl(1, 99), crl(2, 3), crl(2, 4)], &info).unwrap().number, 4);
        assert!(issuing_crl(&[crl(1, 99)], &info).is_none());
    }
}
