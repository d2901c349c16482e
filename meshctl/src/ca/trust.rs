//! `meshctl ca trust`: the root among those that all programs of this machine trust (Debian's ca-certificates).

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use mesh_ca::bundle;
use mesh_proto::v1::ErrorCode;
use rustls_pki_types::CertificateDer;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::{
    app::App,
    context,
    error::{Failure, Result},
};

/// What an administrator adds by hand lies here (update-ca-certificates(8)).
const LOCAL: &str = "usr/local/share/ca-certificates";
const STORE: &str = "etc/ssl/certs";
const HOOKS: &str = "etc/ca-certificates/update.d";
/// The one file that most programs read.
const BUNDLE: &str = "ca-certificates.crt";
/// All Debian trusts is a few hundred certificates.
const BUNDLE_BYTES_MAX: u64 = 8 * 1024 * 1024;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Trust {
    /// Make every program of this machine trust the mesh's root
    Install(Place),
    /// Take it back
    Remove(Place),
}

#[derive(Debug, clap::Args)]
pub(crate) struct Place {
    /// The root, PEM; asked of the controller unless given
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// The machine's root folder, for images
    #[arg(long, value_name = "DIR", default_value = "/")]
    root: PathBuf,
}

impl Place {
    /// With the machine's folder as seen from anywhere: update-ca-certificates changes to another one.
    fn found(self) -> Result<Self> {
        let root = fs::canonicalize(&self.root).map_err(|error| Failure::file("open", &self.root, &error))?;
        Ok(Self { root, ..self })
    }

    fn path(&self, below: &str) -> PathBuf {
        self.root.join(below)
    }

    /// `meshd-<fingerprint>.crt`: two meshes do not disturb each other.
    fn file(&self, root: &CertificateDer<'_>) -> PathBuf {
        let name = format!("meshd-{}.crt", &hex::encode(Sha256::digest(root))[..16]);
        self.path(LOCAL).join(name)
    }
}

impl Trust {
    pub(crate) async fn run(self, app: &App) -> Result<()> {
        let (place, install) = match self {
            Self::Install(place) => (place.found()?, true),
            Self::Remove(place) => (place.found()?, false),
        };
        let roots = match &place.ca {
            Some(path) => crate::cert::read_certificates(path)?,
            None => {
                let info = super::info(app).await?;
                info.roots.iter().map(|root| CertificateDer::from(root.der.to_vec())).collect()
            }
        };
        for root in &roots {
            check(root)?;
        }
        let mut changed = false;
        for root in &roots {
            changed |= if install { put(&place, root)? } else { take(&place, root)? };
        }
        // Also when no file changed: the store may have been made anew without it.
        update(&place)?;
        let trusted = trusted(&place)?;
        for root in &roots {
            if trusted.contains(root) != install {
                let what = if install { "is not" } else { "is still" };
                return Err(Failure::new(
                    ErrorCode::CertificateInvalid,
                    format!("the root {what} in {}", place.path(STORE).join(BUNDLE).display()),
                )
                .why("update-ca-certificates ended well and left it so")
                .next("look for it in /etc/ca-certificates.conf and other folders of certificates"));
            }
        }
        let line = match (install, changed) {
            (true, true) => "this machine trusts the mesh's root",
            (true, false) => "this machine trusted the mesh's root already",
            (false, true) => "this machine does not trust the mesh's root any more",
            (false, false) => "this machine did not trust the mesh's root",
        };
        let store = place.path(STORE).join(BUNDLE).display().to_string();
        app.out.action(
            "TrustStore",
            changed,
            json!({ "store": store, "trusted": install }),
            &store,
            &[line.into()],
        );
        Ok(())
    }
}

/// Only a CA belongs there, one that signed itself.
fn check(der: &CertificateDer<'_>) -> Result<()> {
    let refuse = |why: &str| {
        Failure::new(ErrorCode::CertificateInvalid, "this is no root certificate")
            .why(why)
            .next("give the file that `meshctl ca root --out F` writes")
    };
    let (_, parsed) = X509Certificate::from_der(der).map_err(|error| refuse(&error.to_string()))?;
    if !parsed.is_ca() {
        return Err(refuse("it is not a CA"));
    }
    parsed.verify_signature(None).map_err(|_| refuse("it did not sign itself"))
}

/// Returns whether anything changed.
fn put(place: &Place, root: &CertificateDer<'_>) -> Result<bool> {
    let path = place.file(root);
    let text = bundle::encode_certificates([root]);
    if fs::read_to_string(&path).is_ok_and(|old| old == text) {
        return Ok(false);
    }
    let failed = |error| Failure::file("write", &path, &error);
    fs::create_dir_all(place.path(LOCAL)).map_err(failed)?;
    context::replace(&path, text.as_bytes(), 0o644).map_err(failed)?;
    Ok(true)
}

fn take(place: &Place, root: &CertificateDer<'_>) -> Result<bool> {
    let path = place.file(root);
    match fs::remove_file(&path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Failure::file("remove", &path, &error)),
    }
}

fn update(place: &Place) -> Result<()> {
    let failed = |why: String| {
        Failure::new(ErrorCode::Internal, "update-ca-certificates failed")
            .why(why)
            .next("install Debian's package ca-certificates, and run this as root")
    };
    let mut command = Command::new("update-ca-certificates");
    command.arg("--fresh");
    if place.root != Path::new("/") {
        fs::create_dir_all(place.path(STORE))
            .map_err(|error| Failure::file("make", &place.path(STORE), &error))?;
        for (option, below) in [
            ("--localcertsdir", LOCAL),
            ("--etccertsdir", STORE),
            ("--hooksdir", HOOKS),
            ("--certsdir", "usr/share/ca-certificates"),
            ("--certsconf", "etc/ca-certificates.conf"),
        ] {
            command.arg(option).arg(place.path(below));
        }
    }
    let done = command.output().map_err(|error| failed(error.to_string()))?;
    if !done.status.success() {
        return Err(failed(String::from_utf8_lossy(&done.stderr).trim().to_owned()));
    }
    // With nothing left to trust, Debian 12's script leaves the bundle as it was.
    let bundle = place.path(STORE).join(BUNDLE);
    if is_without_certificates(&place.path(STORE))? {
        context::replace(&bundle, b"", 0o644).map_err(|error| Failure::file("write", &bundle, &error))?;
    }
    Ok(())
}

/// Whether a store holds no certificate: each is a link NAME.pem to its file. Links by hash may point to the bundle itself.
fn is_without_certificates(store: &Path) -> Result<bool> {
    let failed = |error| Failure::file("read", store, &error);
    for entry in fs::read_dir(store).map_err(failed)? {
        if entry.map_err(failed)?.path().extension().is_some_and(|ending| ending == "pem") {
            return Ok(false);
        }
    }
    Ok(true)
}

/// What programs of this machine trust now.
fn trusted(place: &Place) -> Result<Vec<CertificateDer<'static>>> {
    let path = place.path(STORE).join(BUNDLE);
    let failed = |error| Failure::file("read", &path, &error);
    if fs::metadata(&path).map_err(failed)?.len() > BUNDLE_BYTES_MAX {
        return Err(failed(std::io::ErrorKind::FileTooLarge.into()));
    }
    let text = fs::read_to_string(&path).map_err(failed)?;
    // An empty store holds no certificate, which is no error here.
    let mut found = Vec::new();
    for block in text.split_inclusive("-----END CERTIFICATE-----") {
        if let Ok(one) = bundle::parse_certificates(block.as_bytes()) {
            found.extend(one);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::slice;

    use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};

    use super::*;

    fn certificate(ca: bool) -> CertificateDer<'static> {
        let mut params = CertificateParams::new(vec!["x".to_owned()]).unwrap();
        if ca {
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        }
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().clone()
    }

    #[test]
    fn only_a_root_goes_into_the_store() {
        check(&certificate(true)).unwrap();
        assert!(check(&certificate(false)).unwrap_err().why.contains("not a CA"));
        let mut changed = certificate(true).to_vec();
        *changed.last_mut().unwrap() ^= 1;
        assert!(check(&changed.into()).is_err());
    }

    /// With the real update-ca-certificates, in a folder that stands for a machine.
    #[test]
    fn a_root_comes_into_the_machines_bundle_and_leaves_it() {
        let folder = tempfile::tempdir().unwrap();
        let place = Place { ca: None, root: folder.path().to_owned() };
        for below in ["usr/share/ca-certificates", HOOKS] {
            fs::create_dir_all(place.path(below)).unwrap();
        }
        fs::write(place.path("etc/ca-certificates.conf"), "").unwrap();
        let (ours, other) = (certificate(true), certificate(true));
        assert!(put(&place, &other).unwrap());
        assert!(put(&place, &ours).unwrap() && !put(&place, &ours).unwrap());
        update(&place).unwrap();
        let both = trusted(&place).unwrap();
        assert!(both.contains(&ours) && both.contains(&other));
        assert!(take(&place, &ours).unwrap() && !take(&place, &ours).unwrap());
        update(&place).unwrap();
        assert_eq!(trusted(&place).unwrap(), slice::from_ref(&other), "what others put there stays");
        // Made anew with one certificate, the store has a link by hash to the bundle.
        update(&place).unwrap();
        assert!(take(&place, &other).unwrap());
        update(&place).unwrap();
        assert_eq!(trusted(&place).unwrap(), [], "the last one leaves as well");
    }
}
