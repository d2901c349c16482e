//! A CA that was made elsewhere, taken over at `init`: read and judged before anything is made.

use std::io;
use std::path::{Path, PathBuf};

use mesh_ca::{Crl, CrlError, ImportedCa, Pkcs12Error};
use mesh_proto::v1::ErrorCode;
use rustls_pki_types::CertificateDer;
use time::UtcDateTime;
use zeroize::Zeroizing;

use crate::authority::CaFacts;
use crate::config::{ImportConfig, ImportKind};
use crate::error::StartupError;
use crate::state::read_file;

/// Why a CA is not taken over. Nothing was made.
#[derive(Debug, thiserror::Error)]
pub enum ImportProblem {
    #[error("cannot read {}", .path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the CA is not taken over")]
    Ca(#[source] mesh_ca::ImportError),
    #[error("the key belongs to an issuing CA, not to the root")]
    NotRoot,
    #[error("the key belongs to the root, not to an issuing CA")]
    NotIssuer,
    #[error("the issuing CA stands {0} steps below its root, not directly below it")]
    Depth(usize),
    #[error("the root's CRL is missing")]
    CrlMissing,
    #[error("{} is not the root's CRL", .path.display())]
    Crl {
        path: PathBuf,
        #[source]
        source: Option<CrlError>,
    },
    #[error("the root's CRL ended at {0}")]
    CrlEnded(UtcDateTime),
    #[error("the root's CRL lists {0} certificates, which the root's CRLs made here would drop")]
    CrlLists(usize),
    #[error("the root's CRL lists the issuing CA")]
    Revoked,
    #[error("a certificate issued below this CA would not be accepted")]
    Sample(#[source] mesh_ca::ChainError),
    #[error("this CA cannot sign for the mesh")]
    Sign(#[source] mesh_ca::IssueError),
}

impl ImportProblem {
    pub(crate) fn code(&self) -> ErrorCode {
        use mesh_ca::ImportError as E;
        match self {
            Self::Read { source, .. } if source.kind() == io::ErrorKind::NotFound => ErrorCode::StateNotFound,
            Self::Ca(E::Subject) => ErrorCode::ImportName,
            Self::Ca(E::PasswordNeeded | E::Pkcs12(Pkcs12Error::WrongPassword)) => {
                ErrorCode::ImportPassphrase
            }
            _ => ErrorCode::ImportRefused,
        }
    }

    /// One sentence: what to do.
    pub(crate) fn next(&self) -> &'static str {
        use mesh_ca::ImportError as E;
        match self {
            Self::Read { .. } => "check the path and who may read it",
            Self::Ca(E::Subject) => {
                "let this CA sign an issuing CA whose name has each attribute once (`/O=Example/CN=Mesh issuing CA`), \
                 and import that with --import-issuer"
            }
            Self::Ca(E::PasswordNeeded) => "give --import-passphrase-file F",
            Self::Ca(E::Pkcs12(Pkcs12Error::WrongPassword)) => {
                "check --import-passphrase-file; its first line is the passphrase"
            }
            Self::Ca(E::OldEncryption | E::Pkcs12(Pkcs12Error::OldAlgorithm)) => {
                "write the file anew with OpenSSL 3 (`openssl pkcs8 -topk8`, `openssl pkcs12 -export`) and import that"
            }
            Self::Ca(E::Expired(_)) => "renew that CA first; an ended one can sign nothing that verifies",
            Self::Ca(E::OtherKey | E::Keys(_)) => "give certificate and key of the same CA, and one key only",
            Self::Ca(E::NoRoot) => "give the root's certificate too: --import-root ROOT.pem",
            Self::Ca(_) => {
                "strict verifiers would refuse what is below it: issue the CA anew without this fault, or let `init` make a new one"
            }
            Self::NotRoot => "give the root's own key, or name the issuing CA with --import-issuer",
            Self::NotIssuer => "leave --import-issuer out to import a root with its key",
            Self::Depth(_) => "import an issuing CA that the root signed itself",
            Self::CrlMissing => {
                "give --import-crl FILE (`openssl ca -gencrl` on the machine with the root): verifiers ask for a CRL of every CA"
            }
            Self::Crl { .. } | Self::CrlEnded(_) => {
                "let the root sign a new CRL with a number (`openssl ca -gencrl`) and give that"
            }
            Self::CrlLists(_) => {
                "let the root sign an issuing CA for meshd and import that with --import-issuer: the root then goes on to sign its CRL"
            }
            Self::Revoked => "import another issuing CA; this one is accepted nowhere",
            Self::Sample(_) | Self::Sign(_) => {
                "check the CA's name constraints, path length and end, or let `init` make a new one"
            }
        }
    }
}

/// A CA and what came with it.
#[derive(Debug)]
pub(crate) struct Foreign {
    pub(crate) ca: ImportedCa,
    /// Of its root, or its own.
    pub(crate) crl: Option<ForeignCrl>,
}

/// A CRL that the root signed elsewhere.
#[derive(Debug)]
pub(crate) struct ForeignCrl {
    pub(crate) der: Vec<u8>,
    pub(crate) crl: Crl,
}

impl Foreign {
    /// The root's certificate: its own, or that of its issuer.
    pub(crate) fn root(&self) -> &CertificateDer<'static> {
        self.ca.issuers.first().unwrap_or(&self.ca.certificate)
    }
}

/// Reads the files and judges what they hold at the time `now`.
pub(crate) fn read(config: &ImportConfig, now: UtcDateTime) -> Result<Foreign, StartupError> {
    judge(config, now).map_err(|problem| StartupError::Import { problem })
}

fn judge(config: &ImportConfig, now: UtcDateTime) -> Result<Foreign, ImportProblem> {
    let mut files = Vec::new();
    for path in &config.files {
        files.push(Zeroizing::new(load(path, mesh_ca::PKCS12_BYTES_MAX)?));
    }
    let files: Vec<&[u8]> = files.iter().map(|file| file.as_slice()).collect();
    let password = config.passphrase.as_ref().map(|passphrase| passphrase.as_str());
    let ca = mesh_ca::import_ca(&files, password, now).map_err(ImportProblem::Ca)?;
    match (config.kind, ca.issuers.len()) {
        (ImportKind::Root, 0) | (ImportKind::Issuer, 1) => {}
        (ImportKind::Root, _) => return Err(ImportProblem::NotRoot),
        (ImportKind::Issuer, 0) => return Err(ImportProblem::NotIssuer),
        (ImportKind::Issuer, steps) => return Err(ImportProblem::Depth(steps)),
    }
    let crl = match &config.crl {
        Some(path) => Some(read_crl(path, ca.issuers.first().unwrap_or(&ca.certificate), now)?),
        None if config.kind == ImportKind::Issuer => return Err(ImportProblem::CrlMissing),
        None => None,
    };
    match &crl {
        Some(known) if ca.is_root() && !known.crl.is_empty() => {
            return Err(ImportProblem::CrlLists(known.crl.len()));
        }
        Some(known) if !ca.is_root() && lists(&known.crl, &ca.certificate) => {
            return Err(ImportProblem::Revoked);
        }
        _ => {}
    }
    Ok(Foreign { ca, crl })
}

fn load(path: &Path, limit: usize) -> Result<Vec<u8>, ImportProblem> {
    read_file(path, limit as u64).map_err(|source| ImportProblem::Read { path: path.into(), source })
}

/// DER, or one PEM block.
fn read_crl(path: &Path, root: &[u8], now: UtcDateTime) -> Result<ForeignCrl, ImportProblem> {
    let refused = |source| ImportProblem::Crl { path: path.into(), source };
    let bytes = load(path, mesh_ca::CRL_BYTES_MAX)?;
    let der = match bytes.first() {
        Some(0x30) => bytes,
        _ => match <[_; 1]>::try_from(mesh_ca::bundle::parse_crls(&bytes).unwrap_or_default()) {
            Ok([der]) => der.to_vec(),
            Err(_) => return Err(refused(None)),
        },
    };
    let crl = Crl::parse_verified(&der, root).map_err(|error| refused(Some(error)))?;
    match crl.next_update() < now {
        true => Err(ImportProblem::CrlEnded(crl.next_update())),
        false => Ok(ForeignCrl { der, crl }),
    }
}

fn lists(crl: &Crl, certificate: &[u8]) -> bool {
    CaFacts::read(certificate).is_some_and(|facts| crl.contains_raw(&facts.serial))
}
