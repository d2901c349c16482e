//! `meshctl cert issue`: on a node through its daemon, elsewhere straight from the controller.

use std::{
    io::Read as _,
    path::{Path, PathBuf},
};

use mesh_ca::{CSR_BYTES_MAX, Csr, CsrError, KeyAlgorithm, LeafKey, bundle};
use mesh_proto::v1::{
    self as pb, ErrorCode, certificates_client::CertificatesClient, local_client::LocalClient,
};
use rustls_pki_types::CertificateDer;
use zeroize::Zeroizing;

use super::{
    Facts, document, explain,
    folder::{self, Owner, Part},
    nobody_renews, pair_document,
};
use crate::{
    app::{App, client, operation_id},
    error::{Exit, Failure, Result},
    secret,
    text::{Span, left, now, safe},
};

const KEY_MODE: u32 = 0o600;
const PUBLIC_MODE: u32 = 0o644;

#[derive(Debug, clap::Args)]
pub(crate) struct Issue {
    /// DNS names and IP addresses; the first names the pair
    #[arg(required_unless_present = "csr")]
    names: Vec<String>,
    /// Folder for key.pem, cert.pem, ca.pem and crl.pem
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Sign this CSR (`-` is stdin) and print the chain; the key stays where it is
    #[arg(long, value_name = "FILE", conflicts_with_all = ["out", "owner", "mode", "reload", "rotate_key", "combined", "p12"])]
    csr: Option<PathBuf>,
    /// What it is for: server, client, peer (both, with a SPIFFE ID), or a profile of the policy
    #[arg(long, default_value = "server")]
    profile: String,
    /// Type of the key: ecdsa-p256, ecdsa-p384, ed25519, rsa-2048, rsa-3072 or rsa-4096
    #[arg(long, value_name = "TYPE", value_parser = parse_key_type, conflicts_with = "csr")]
    key_type: Option<KeyAlgorithm>,
    /// Only say whether policy would allow it; issues nothing; exit 4 if it would not
    #[arg(long)]
    dry_run: bool,
    /// With --dry-run: which rule allows or refuses each name
    #[arg(long, requires = "dry_run")]
    explain: bool,
    /// With --dry-run, on a controller: for a service of this node
    #[arg(long, requires = "dry_run")]
    node: Option<String>,
    /// How long it lives
    #[arg(long, value_name = "TIME")]
    ttl: Option<Span>,
    /// Whom the files belong to
    #[arg(long, value_name = "USER:GROUP")]
    owner: Option<String>,
    /// Mode of the key file; 0600 unless given
    #[arg(long, value_parser = parse_mode)]
    mode: Option<u32>,
    /// Command to run after each change; on a node, as root
    #[arg(long, value_name = "COMMAND")]
    reload: Option<String>,
    /// A new key at every renewal
    #[arg(long)]
    rotate_key: bool,
    /// Also combined.pem: key and chain in one file, for HAProxy
    #[arg(long)]
    combined: bool,
    /// Also cert.p12: key and chain as PKCS #12, for Java
    #[arg(long, requires = "p12_passphrase_file")]
    p12: bool,
    /// File whose first line protects cert.p12; on a node it is read again at each renewal
    #[arg(long, value_name = "FILE", requires = "p12")]
    p12_passphrase_file: Option<PathBuf>,
}

/// Octal, for the owner and the group to read at most.
fn parse_mode(text: &str) -> Result<u32, &'static str> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode & !0o660 == 0 && mode & 0o400 != 0 => Ok(mode),
        Ok(_) => Err("a key is readable by its owner and at most its group: 0600, 0640, 0400 or 0440"),
        Err(_) => Err("a mode is octal, like 0640"),
    }
}

fn parse_key_type(text: &str) -> Result<KeyAlgorithm, String> {
    KeyAlgorithm::GENERATED.into_iter().find(|known| known.to_string() == text).ok_or_else(|| {
        format!("known are {}", KeyAlgorithm::GENERATED.map(|known| known.to_string()).join(", "))
    })
}

impl Issue {
    pub(crate) async fn run(self, app: &App) -> Result<Exit> {
        if self.dry_run {
            return self.explain(app).await;
        }
        match (&self.csr, app.places.is_node()) {
            (Some(csr), _) => self.sign(app, csr).await,
            (None, true) => self.on_node(app).await,
            (None, false) => self.here(app).await,
        }
    }

    async fn on_node(&self, app: &App) -> Result<Exit> {
        let out = self.out.as_deref().map(absolute).transpose()?;
        let p12 = self.p12_passphrase_file.as_deref().map(absolute).transpose()?;
        let request = pb::LocalIssueRequest {
            names: self.names.clone(),
            out: out.map(|out| out.display().to_string()).unwrap_or_default(),
            profile: self.profile.clone(),
            ttl_secs: self.ttl.map_or(0, Span::seconds),
            owner: self.owner.clone().unwrap_or_default(),
            mode: self.mode.unwrap_or(0),
            reload: self.reload.clone().unwrap_or_default(),
            rotate_key: self.rotate_key,
            key_type: self.key_type.map(|key| key.to_string()).unwrap_or_default(),
            combined: self.combined,
            p12_passphrase_file: p12.map(|path| path.display().to_string()).unwrap_or_default(),
        };
        let pair =
            app.ask_node(client!(LocalClient<_>, app.node().await?).issue_certificate(request)).await?;
        let now = now();
        let lines = [format!(
            "{} in {}: serial {}, expires in {}, meshd renews it in {}",
            safe(&pair.name),
            safe(&pair.out),
            hex::encode(&pair.serial),
            left(pair.not_after, now),
            left(pair.renews_at, now)
        )];
        app.out.action("ManagedPair", pair.changed, pair_document(&pair), &pair.name, &lines);
        Ok(Exit::Done)
    }

    /// An operator's machine: the key is made here, once, and nobody renews it.
    async fn here(&self, app: &App) -> Result<Exit> {
        if self.reload.is_some() || self.rotate_key {
            return Err(Failure::usage(
                "--reload and --rotate-key are for pairs that meshd keeps",
                "run this on a node, or leave them out",
            ));
        }
        let name = self.names.first().map(String::as_str).unwrap_or_default();
        let out = absolute(self.out.as_deref().unwrap_or(Path::new(name)))?;
        folder::check(&out)?;
        let owner = self.owner.as_deref().map(Owner::find).transpose()?;
        // Before a certificate is asked for that then could not be written.
        let passphrase = self.p12_passphrase_file.as_deref().map(secret::passphrase_file).transpose()?;
        let key = LeafKey::generate_for(self.key_type.unwrap_or_default())
            .map_err(|error| internal("make a key", &error))?;
        let csr = Csr::create(&key).map_err(|error| internal("make a CSR", &error))?;
        let answer = self.request(app, csr, self.names.clone()).await?;
        let leaf = Facts::read(&answer.leaf)?;
        if leaf.key_hash != key.key_hash() {
            return Err(Failure::new(
                ErrorCode::CertificateInvalid,
                "the controller certified another key than ours",
            )
            .next("do not use it; look at the controller's log"));
        }
        let pem = key.to_pkcs8_pem();
        let (chain, roots, crls) = texts(&answer);
        let key_mode = self.mode.unwrap_or(KEY_MODE);
        let combined = Zeroizing::new([pem.as_str(), &chain].concat());
        let p12 = passphrase.map(|passphrase| pkcs12(name, &key, &answer, &passphrase)).transpose()?;
        let mut parts = vec![
            Part { name: "key.pem", bytes: pem.as_bytes(), mode: key_mode },
            Part { name: "cert.pem", bytes: chain.as_bytes(), mode: PUBLIC_MODE },
            Part { name: "ca.pem", bytes: roots.as_bytes(), mode: PUBLIC_MODE },
            Part { name: "crl.pem", bytes: crls.as_bytes(), mode: PUBLIC_MODE },
        ];
        if self.combined {
            parts.push(Part { name: "combined.pem", bytes: combined.as_bytes(), mode: key_mode });
        }
        if let Some(p12) = &p12 {
            parts.push(Part { name: "cert.p12", bytes: p12, mode: key_mode });
        }
        folder::replace(&out, &parts, owner)?;
        let certificate = answer.certificate.unwrap_or_default();
        let mut body = document(&certificate);
        body["out"] = out.display().to_string().into();
        let line = format!(
            "{} in {}: serial {}, expires in {}",
            safe(name),
            out.display(),
            hex::encode(&certificate.serial),
            left(certificate.not_after, now())
        );
        app.out.action("Certificate", true, body, name, &[line]);
        app.out.note(&nobody_renews(&out, certificate.not_after));
        Ok(Exit::Done)
    }

    async fn sign(&self, app: &App, path: &Path) -> Result<Exit> {
        let csr = parse_csr(path)?;
        let names = if self.names.is_empty() { names_in(&csr)? } else { self.names.clone() };
        let answer = self.request(app, csr.der().to_vec(), names).await?;
        let (chain, roots, _) = texts(&answer);
        if app.out.is_json() {
            let mut body = document(&answer.certificate.clone().unwrap_or_default());
            body["chain"] = chain.into();
            body["roots"] = roots.into();
            body["changed"] = true.into();
            app.out.document("Certificate", &body);
        } else {
            app.out.write(&chain);
        }
        Ok(Exit::Done)
    }

    async fn explain(&self, app: &App) -> Result<Exit> {
        let (mut names, mut key) = (self.names.clone(), self.key_type.unwrap_or_default());
        if let Some(path) = &self.csr {
            let csr = parse_csr(path)?;
            key = csr.clone().verify().map_err(csr_refused)?.public_key().algorithm();
            if names.is_empty() {
                names = names_in(&csr)?;
            }
        }
        let request = pb::ExplainRequest {
            names,
            profile: self.profile.clone(),
            ttl_secs: self.ttl.map_or(0, Span::seconds),
            key_type: key.to_string(),
            node: self.node.clone().unwrap_or_default(),
        };
        let answer = match app.places.is_node() && self.node.is_none() {
            true => {
                app.ask_node(client!(LocalClient<_>, app.node().await?).explain_certificate(request)).await?
            }
            false => {
                app.ask(client!(CertificatesClient<_>, app.controller().await?).explain(request)).await?
            }
        };
        Ok(explain::report(app, &self.profile, &answer, self.explain))
    }

    async fn request(&self, app: &App, csr: Vec<u8>, names: Vec<String>) -> Result<pb::IssueResponse> {
        let request = pb::IssueRequest {
            csr: csr.into(),
            names,
            profile: self.profile.clone(),
            ttl_secs: self.ttl.map_or(0, Span::seconds),
            operation_id: operation_id(),
            restart: true,
        };
        app.ask(client!(CertificatesClient<_>, app.controller().await?).issue(request)).await
    }
}

/// Key and chain as PKCS #12; its alias in Java is the pair's name.
fn pkcs12(
    name: &str,
    key: &LeafKey,
    answer: &pb::IssueResponse,
    passphrase: &str,
) -> Result<Zeroizing<Vec<u8>>> {
    let chain: Vec<_> = std::iter::once(&answer.leaf)
        .chain(answer.issuers.first())
        .map(|der| CertificateDer::from(der.as_ref()))
        .collect();
    let mut rng = |bytes: &mut [u8]| rand::fill(bytes);
    mesh_ca::write_pkcs12(name, &key.to_pkcs8_der(), &chain, passphrase, &mut rng).map_err(|error| {
        Failure::new(ErrorCode::Pkcs12Refused, "the PKCS #12 file cannot be made")
            .why(error.to_string())
            .next("nothing was written; choose another passphrase or leave --p12 out")
    })
}

/// cert.pem (leaf first, then the issuing CA), ca.pem (roots) and crl.pem.
fn texts(answer: &pb::IssueResponse) -> (String, String, String) {
    let chain = std::iter::once(&answer.leaf).chain(answer.issuers.first());
    (
        bundle::encode_certificates(chain),
        bundle::encode_certificates(&answer.roots),
        bundle::encode_crls(answer.crls.iter().map(|crl| &crl.der)),
    )
}

fn parse_csr(path: &Path) -> Result<Csr> {
    Csr::parse(&read_csr(path)?).map_err(|error| {
        Failure::new(ErrorCode::CsrInvalid, "this is not a CSR")
            .why(error.to_string())
            .next("make one with `openssl req -new`")
    })
}

fn csr_refused(error: CsrError) -> Failure {
    let code = match error {
        CsrError::Signature | CsrError::SignatureAlgorithm => ErrorCode::CsrSignature,
        CsrError::Key(_) => ErrorCode::KeyWeak,
        CsrError::AsksForCa | CsrError::KeyUsage => ErrorCode::CsrNotALeaf,
        _ => ErrorCode::CsrInvalid,
    };
    Failure::new(code, "the CSR is not good")
        .why(error.to_string())
        .next(format!("see `meshctl explain E{:04}`", code as i32))
}

/// The DNS names and addresses a CSR asks for: what is signed where no NAME was given.
fn names_in(csr: &Csr) -> Result<Vec<String>> {
    let verified = csr.clone().verify().map_err(csr_refused)?;
    let asked = verified.requested_names();
    let dns = asked.dns.iter().map(|name| name.as_str().to_owned());
    let names: Vec<String> = dns.chain(asked.ips.iter().map(ToString::to_string)).collect();
    if names.is_empty() {
        return Err(Failure::usage(
            "neither the command line nor the CSR has a name",
            "give the names, as in `meshctl cert issue api.mesh.internal --csr F`",
        ));
    }
    Ok(names)
}

fn read_csr(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let failed = |error| Failure::file("read", path, &error);
    let limit = CSR_BYTES_MAX as u64 + 1;
    if path.as_os_str() == "-" {
        std::io::stdin().lock().take(limit).read_to_end(&mut bytes).map_err(failed)?;
    } else {
        std::fs::File::open(path).map_err(failed)?.take(limit).read_to_end(&mut bytes).map_err(failed)?;
    }
    if bytes.len() > CSR_BYTES_MAX {
        return Err(Failure::new(ErrorCode::TooLarge, "the CSR is too long")
            .why(format!("it has more than {CSR_BYTES_MAX} bytes"))
            .next("a CSR holds one key and few names"));
    }
    Ok(bytes)
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(|error| Failure::file("find", path, &error))
}

fn internal(attempt: &str, error: &dyn std::error::Error) -> Failure {
    Failure::new(ErrorCode::Internal, format!("cannot {attempt}")).why(error.to_string()).next("try again")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_never_readable_by_all() {
        for (text, mode) in [("0600", 0o600), ("640", 0o640), ("0440", 0o440)] {
            assert_eq!(parse_mode(text), Ok(mode), "{text}");
        }
        for text in ["0644", "0777", "0200", "abc", "0900", "", "07777777777777"] {
            assert!(parse_mode(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_chain_is_leaf_then_issuing_ca() {
        let answer = pb::IssueResponse {
            leaf: vec![1].into(),
            issuers: vec![vec![2].into(), vec![3].into()],
            roots: vec![vec![4].into()],
            ..pb::IssueResponse::default()
        };
        let (chain, roots, crls) = texts(&answer);
        let parsed = bundle::parse_certificates(chain.as_bytes()).unwrap();
        assert_eq!(parsed.iter().map(|der| der.as_ref().to_vec()).collect::<Vec<_>>(), [vec![1], vec![2]]);
        assert!(roots.contains("BEGIN CERTIFICATE") && crls.is_empty());
    }

    #[test]
    fn a_csr_has_a_limit() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![b'x'; 5 * 1024 * 1024]).unwrap();
        assert_eq!(read_csr(file.path()).unwrap_err().code, ErrorCode::TooLarge);
    }
}
