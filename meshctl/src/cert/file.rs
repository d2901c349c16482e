//! Certificate files: what stands in them, and whether they hold.

use std::{
    fs::File,
    io::Read as _,
    net::IpAddr,
    path::{Path, PathBuf},
};

use mesh_ca::{LeafKey, bundle};
use mesh_proto::v1::ErrorCode;
use rustls_pki_types::{CertificateDer, SignatureVerificationAlgorithm, UnixTime};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use webpki::{
    BorrowedCertRevocationList, CertRevocationList, EndEntityCert, ExpirationPolicy, KeyUsage,
    RevocationCheckDepth, RevocationOptionsBuilder, UnknownStatusPolicy, anchor_from_trusted_cert,
};
use x509_parser::{
    extensions::{GeneralName, ParsedExtension},
    prelude::{FromDer as _, X509Certificate},
    revocation_list::CertificateRevocationList,
};

use super::listing::lines;
use crate::{
    app::App,
    error::{Exit, Failure, Result},
    output::{Tone, paint},
    text::{fingerprint, left, minute, now, rfc3339},
};

#[derive(Debug, clap::Args)]
pub(crate) struct Verify {
    /// The certificate, leaf first, then its issuing CA
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Roots to trust; ca.pem beside FILE unless given
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// CRLs; crl.pem beside FILE unless given
    #[arg(long, value_name = "FILE")]
    crl: Option<PathBuf>,
}

/// What a certificate says about itself; nothing of it is proved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Facts {
    pub(crate) subject: String,
    pub(crate) issuer: String,
    pub(crate) serial: String,
    pub(crate) is_ca: bool,
    pub(crate) names: Vec<String>,
    pub(crate) spiffe: String,
    pub(crate) uses: Vec<&'static str>,
    pub(crate) not_before: i64,
    pub(crate) not_after: i64,
    pub(crate) key_hash: [u8; 32],
}

impl Facts {
    pub(crate) fn read(der: &[u8]) -> Result<Self> {
        let (rest, parsed) = X509Certificate::from_der(der).map_err(|error| malformed(&error.to_string()))?;
        if !rest.is_empty() {
            return Err(malformed("bytes follow the certificate"));
        }
        let mut facts = Self {
            subject: parsed.subject().to_string(),
            issuer: parsed.issuer().to_string(),
            serial: hex::encode(parsed.raw_serial()),
            is_ca: parsed.is_ca(),
            names: Vec::new(),
            spiffe: String::new(),
            uses: Vec::new(),
            not_before: parsed.validity().not_before.timestamp(),
            not_after: parsed.validity().not_after.timestamp(),
            key_hash: Sha256::digest(parsed.public_key().raw).into(),
        };
        for extension in parsed.extensions() {
            match extension.parsed_extension() {
                ParsedExtension::SubjectAlternativeName(san) => {
                    san.general_names.iter().for_each(|name| facts.add_name(name));
                }
                ParsedExtension::ExtendedKeyUsage(usage) => {
                    facts.uses.extend(usage.server_auth.then_some("server"));
                    facts.uses.extend(usage.client_auth.then_some("client"));
                }
                _ => {}
            }
        }
        Ok(facts)
    }

    fn add_name(&mut self, name: &GeneralName<'_>) {
        match name {
            GeneralName::DNSName(text) => self.names.push((*text).to_owned()),
            GeneralName::URI(text) if text.starts_with("spiffe://") => self.spiffe = (*text).to_owned(),
            GeneralName::URI(text) => self.names.push((*text).to_owned()),
            GeneralName::IPAddress(octets) => {
                let four = <[u8; 4]>::try_from(*octets).map(IpAddr::from);
                let sixteen = <[u8; 16]>::try_from(*octets).map(IpAddr::from);
                self.names.extend(four.or(sixteen).ok().map(|ip| ip.to_string()));
            }
            other => self.names.push(other.to_string()),
        }
    }

    pub(super) fn document(&self) -> Value {
        json!({
            "subject": self.subject, "issuer": self.issuer, "serial": self.serial, "ca": self.is_ca, "names": self.names,
            "spiffe": self.spiffe, "uses": self.uses, "notBefore": rfc3339(self.not_before),
            "notAfter": rfc3339(self.not_after), "keySha256": hex::encode(self.key_hash),
        })
    }

    pub(super) fn describe(&self, now: i64) -> Vec<String> {
        let ended = self.not_after <= now;
        let state = if ended { paint(Tone::Bad, "ended") } else { String::new() };
        let facts = [
            ("serial", self.serial.clone()),
            ("issuer", self.issuer.clone()),
            ("names", self.names.join(" ")),
            ("spiffe", self.spiffe.clone()),
            ("for", if self.is_ca { "signing (CA)".to_owned() } else { self.uses.join(" and ") }),
            ("from", rfc3339(self.not_before).unwrap_or_default()),
            (
                "until",
                format!("{} ({})", rfc3339(self.not_after).unwrap_or_default(), left(self.not_after, now)),
            ),
            ("key", fingerprint(&self.key_hash)),
        ];
        let title =
            if self.subject.is_empty() { self.names.first().unwrap_or(&self.serial) } else { &self.subject };
        lines(title, &state, &facts)
    }
}

fn malformed(why: &str) -> Failure {
    Failure::new(ErrorCode::CertificateInvalid, "this is not a certificate")
        .why(why)
        .next("give a PEM or DER file of a certificate")
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let failed = |error| Failure::file("read", path, &error);
    let limit = bundle::PEM_BYTES_MAX as u64 + 1;
    File::open(path).map_err(failed)?.take(limit).read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes)
}

/// PEM, or one certificate in DER.
pub(crate) fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let bytes = read(path)?;
    // DER begins with SEQUENCE, PEM with a dash or text.
    if bytes.first() == Some(&0x30) {
        return Ok(vec![CertificateDer::from(bytes)]);
    }
    bundle::parse_certificates(&bytes)
        .map_err(|error| malformed(&error.to_string()).fact(path.display().to_string()))
}

/// Everything a verdict needs, read from disk.
struct Case {
    chain: Vec<CertificateDer<'static>>,
    roots: Vec<CertificateDer<'static>>,
    crls: Vec<Vec<u8>>,
    key: Option<LeafKey>,
}

impl Verify {
    #[expect(clippy::unused_async, reason = "every command is awaited")]
    pub(crate) async fn run(self, app: &App) -> Result<Exit> {
        let case = self.read()?;
        let leaf = Facts::read(&case.chain[0])?;
        let problem = judge(&case, &leaf, now());
        let unchecked = case.crls.is_empty();
        if app.out.is_json() {
            let mut body = leaf.document();
            body["valid"] = problem.is_none().into();
            body["why"] = problem.clone().into();
            body["revocationChecked"] = (!unchecked).into();
            body["revocationAsOf"] = oldest_list(&case.crls).and_then(rfc3339).into();
            app.out.document("CertificateVerification", &body);
        } else if problem.is_none() {
            let known = oldest_list(&case.crls)
                .map(|made| format!("; not revoked by CRLs of {} and later", minute(made)))
                .unwrap_or_default();
            let life = left(leaf.not_after, now());
            app.out.line(&format!("{}: good for {life}{known}", self.file.display()));
        }
        if unchecked {
            app.out.note("revocation was not checked: no crl.pem beside the certificate and no --crl");
        }
        let Some(why) = problem else { return Ok(Exit::Done) };
        if !app.out.is_json() {
            Failure::new(ErrorCode::CertificateInvalid, format!("{} does not hold", self.file.display()))
                .why(why)
                .next("issue it again with `meshctl cert issue`")
                .print(None);
        }
        Ok(Exit::Findings)
    }

    fn read(&self) -> Result<Case> {
        let beside = |name: &str| Some(self.file.with_file_name(name)).filter(|path| path.is_file());
        let roots = self.ca.clone().or_else(|| beside("ca.pem")).ok_or_else(|| {
            Failure::usage(
                "there is no root to check against",
                "put ca.pem beside the certificate, or name it with --ca (`meshctl ca root --out F`)",
            )
        })?;
        let crls = match self.crl.clone().or_else(|| beside("crl.pem")) {
            Some(path) => bundle::parse_crls(&read(&path)?).map_err(|error| {
                Failure::new(ErrorCode::CertificateInvalid, format!("{} holds no CRL", path.display()))
                    .why(error.to_string())
            })?,
            None => Vec::new(),
        };
        let key = beside("key.pem")
            .and_then(|path| std::fs::read_to_string(path).ok())
            .and_then(|text| LeafKey::from_pkcs8_pem(&text).ok());
        Ok(Case { chain: certificates(&self.file)?, roots: certificates(&roots)?, crls, key })
    }
}

/// When the oldest of these lists was made: what was revoked since, they may not say.
fn oldest_list(crls: &[Vec<u8>]) -> Option<i64> {
    let made = |der: &Vec<u8>| {
        CertificateRevocationList::from_der(der).ok().map(|(_, list)| list.last_update().timestamp())
    };
    crls.iter().filter_map(made).min()
}

/// Why the certificate does not hold, or `None`.
fn judge(case: &Case, leaf: &Facts, now: i64) -> Option<String> {
    if case.key.as_ref().is_some_and(|key| key.key_hash() != leaf.key_hash) {
        return Some("key.pem beside it is the key of another certificate".to_owned());
    }
    if leaf.is_ca {
        return Some("it is a CA certificate, not a leaf".to_owned());
    }
    check_chain(case, leaf, now).err()
}

fn check_chain(case: &Case, leaf: &Facts, now: i64) -> Result<(), String> {
    let anchors = case
        .roots
        .iter()
        .map(|root| {
            anchor_from_trusted_cert(root).map_err(|error| format!("the root cannot be read: {error}"))
        })
        .collect::<Result<Vec<_>, _>>()?;
    let parsed: Vec<CertRevocationList<'_>> = case
        .crls
        .iter()
        .map(|der| BorrowedCertRevocationList::from_der(der).map(Into::into))
        .collect::<Result<_, _>>()
        .map_err(|error| format!("the CRL cannot be read: {error}"))?;
    let crls: Vec<&CertRevocationList<'_>> = parsed.iter().collect();
    let revocation = RevocationOptionsBuilder::new(&crls).ok().map(|builder| {
        builder
            .with_depth(RevocationCheckDepth::Chain)
            .with_status_policy(UnknownStatusPolicy::Deny)
            .with_expiration_policy(ExpirationPolicy::Enforce)
            .build()
    });
    let usage = if leaf.uses.contains(&"server") { KeyUsage::server_auth() } else { KeyUsage::client_auth() };
    let time = UnixTime::since_unix_epoch(std::time::Duration::from_secs(u64::try_from(now).unwrap_or(0)));
    let algorithms: &[&dyn SignatureVerificationAlgorithm] = webpki::ALL_VERIFICATION_ALGS;
    EndEntityCert::try_from(&case.chain[0])
        .and_then(|end| {
            end.verify_for_usage(algorithms, &anchors, &case.chain[1..], time, usage, revocation, None)
                .map(drop)
        })
        .map_err(|error| explain(&error))
}

fn explain(error: &webpki::Error) -> String {
    let at = |time: UnixTime| i64::try_from(time.as_secs()).ok().and_then(rfc3339).unwrap_or_default();
    match error {
        webpki::Error::CertExpired { not_after, .. } => format!("it ended at {}", at(*not_after)),
        webpki::Error::CertNotValidYet { not_before, .. } => {
            format!("it is not valid before {}", at(*not_before))
        }
        webpki::Error::CertRevoked => "it is revoked".to_owned(),
        webpki::Error::UnknownIssuer => {
            "it does not lead to the root: another mesh, or the issuing CA is missing in the file".to_owned()
        }
        webpki::Error::InvalidSignatureForPublicKey => "a signature in its chain is wrong".to_owned(),
        webpki::Error::UnknownRevocationStatus => {
            "crl.pem says nothing about a certificate of its chain".to_owned()
        }
        webpki::Error::CrlExpired { next_update, .. } => format!("crl.pem ended at {}", at(*next_update)),
        webpki::Error::InvalidCrlSignatureForPublicKey => {
            "crl.pem was not signed by the CA whose name it bears".to_owned()
        }
        webpki::Error::IssuerNotCrlSigner => "a CA in its chain may not sign CRLs".to_owned(),
        webpki::Error::RequiredEkuNotFoundContext(_) => {
            "it is neither for servers nor for clients".to_owned()
        }
        webpki::Error::NameConstraintViolation => {
            "it has a name that a CA in its chain may not sign for".to_owned()
        }
        webpki::Error::PathLenConstraintViolated => {
            "a CA in its chain may have no CA below it, and has one".to_owned()
        }
        webpki::Error::EndEntityUsedAsCa => "what signed it is no CA".to_owned(),
        webpki::Error::UnsupportedCriticalExtension => {
            "it or a CA in its chain has a critical extension that is not known here".to_owned()
        }
        webpki::Error::UnsupportedSignatureAlgorithmContext(_)
        | webpki::Error::UnsupportedSignatureAlgorithmForPublicKeyContext(_)
        | webpki::Error::UnsupportedCrlSignatureAlgorithmContext(_)
        | webpki::Error::UnsupportedCrlSignatureAlgorithmForPublicKeyContext(_) => {
            "something in its chain was signed in a way that is not taken (RSA needs 2048 bits, SHA-1 counts for nothing)".to_owned()
        }
        webpki::Error::MaximumPathDepthExceeded
        | webpki::Error::MaximumPathBuildCallsExceeded
        | webpki::Error::MaximumSignatureChecksExceeded
        | webpki::Error::MaximumNameConstraintComparisonsExceeded => "its chain is too long".to_owned(),
        other => format!("it or something in its chain is malformed: {other}"),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use rcgen::{
        BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer,
        ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams,
        SerialNumber,
    };
    use time::{Duration, OffsetDateTime};

    use super::*;

    struct Pki {
        folder: tempfile::TempDir,
        root: CertifiedIssuer<'static, KeyPair>,
    }

    impl Pki {
        fn new() -> Self {
            Self::named("ours")
        }

        fn named(name: &str) -> Self {
            let mut params = CertificateParams::new(Vec::new()).unwrap();
            params.distinguished_name.push(rcgen::DnType::CommonName, name);
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
            let root = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
            let folder = tempfile::tempdir().unwrap();
            fs::write(folder.path().join("ca.pem"), root.pem()).unwrap();
            Self { folder, root }
        }

        /// Writes cert.pem and key.pem of a leaf that ends at `until`.
        fn leaf(&self, until: OffsetDateTime) -> PathBuf {
            let mut params = CertificateParams::new(vec!["api.mesh.internal".to_owned()]).unwrap();
            params.serial_number = Some(SerialNumber::from_slice(&[7; 16]));
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
            params.not_before = until - Duration::hours(1);
            params.not_after = until;
            params.use_authority_key_identifier_extension = true;
            let key = KeyPair::generate().unwrap();
            let path = self.folder.path().join("cert.pem");
            fs::write(&path, params.signed_by(&key, &self.root).unwrap().pem()).unwrap();
            fs::write(self.folder.path().join("key.pem"), key.serialize_pem()).unwrap();
            path
        }

        fn crl(&self, revoked: &[u8]) {
            self.crl_until(revoked, OffsetDateTime::now_utc() + Duration::hours(1));
        }

        fn crl_until(&self, revoked: &[u8], next_update: OffsetDateTime) {
            let now = OffsetDateTime::now_utc();
            let entries = [RevokedCertParams {
                serial_number: SerialNumber::from_slice(revoked),
                revocation_time: now - Duration::minutes(5),
                reason_code: None,
                invalidity_date: None,
            }];
            let params = CertificateRevocationListParams {
                this_update: now - Duration::minutes(10),
                next_update,
                crl_number: SerialNumber::from(1),
                issuing_distribution_point: None,
                revoked_certs: entries.to_vec(),
                key_identifier_method: KeyIdMethod::Sha256,
            };
            fs::write(
                self.folder.path().join("crl.pem"),
                params.signed_by(&self.root).unwrap().pem().unwrap(),
            )
            .unwrap();
        }

        fn verdict(&self, file: PathBuf) -> Option<String> {
            let case = Verify { file, ca: None, crl: None }.read().unwrap();
            let leaf = Facts::read(&case.chain[0]).unwrap();
            judge(&case, &leaf, now())
        }
    }

    fn soon() -> OffsetDateTime {
        OffsetDateTime::now_utc() + Duration::minutes(30)
    }

    #[test]
    fn a_good_leaf_is_good_and_a_revoked_one_is_not() {
        let pki = Pki::new();
        let path = pki.leaf(soon());
        assert_eq!(pki.verdict(path.clone()), None);
        pki.crl(&[8; 16]);
        assert_eq!(pki.verdict(path.clone()), None);
        let case = Verify { file: path.clone(), ca: None, crl: None }.read().unwrap();
        let made = oldest_list(&case.crls).unwrap();
        assert!((590..=660).contains(&(now() - made)), "it was made ten minutes ago");
        assert_eq!(oldest_list(&[]), None);
        pki.crl(&[7; 16]);
        assert_eq!(pki.verdict(path).as_deref(), Some("it is revoked"));
    }

    #[test]
    fn each_fault_is_named() {
        let pki = Pki::new();
        let path = pki.leaf(OffsetDateTime::now_utc() - Duration::minutes(1));
        assert!(pki.verdict(path).unwrap().starts_with("it ended at 20"));
        let path = pki.leaf(OffsetDateTime::now_utc() + Duration::hours(9));
        assert!(pki.verdict(path).unwrap().starts_with("it is not valid before"));
        let path = pki.leaf(soon());
        fs::write(pki.folder.path().join("ca.pem"), Pki::named("other").root.pem()).unwrap();
        assert!(pki.verdict(path.clone()).unwrap().starts_with("it does not lead to the root"));
        fs::write(pki.folder.path().join("ca.pem"), Pki::new().root.pem()).unwrap();
        assert_eq!(pki.verdict(path.clone()).as_deref(), Some("a signature in its chain is wrong"));
        fs::write(pki.folder.path().join("ca.pem"), pki.root.pem()).unwrap();
        fs::write(pki.folder.path().join("key.pem"), KeyPair::generate().unwrap().serialize_pem()).unwrap();
        assert_eq!(pki.verdict(path).as_deref(), Some("key.pem beside it is the key of another certificate"));
        assert!(pki.verdict(pki.folder.path().join("ca.pem")).is_some(), "a CA is no leaf");
    }

    #[test]
    fn a_list_that_ended_or_says_nothing_is_named() {
        let pki = Pki::new();
        let path = pki.leaf(soon());
        pki.crl_until(&[8; 16], OffsetDateTime::now_utc() - Duration::minutes(1));
        assert!(pki.verdict(path.clone()).unwrap().starts_with("crl.pem ended at 20"));
        for (name, why) in [
            ("other", "crl.pem says nothing about a certificate of its chain"),
            ("ours", "crl.pem was not signed by the CA whose name it bears"),
        ] {
            let other = Pki::named(name);
            other.crl(&[8; 16]);
            fs::copy(other.folder.path().join("crl.pem"), pki.folder.path().join("crl.pem")).unwrap();
            assert_eq!(pki.verdict(path.clone()).as_deref(), Some(why));
        }
    }

    /// A CA below another one.
    fn ca_below(
        issuer: &CertifiedIssuer<'static, KeyPair>,
        change: impl FnOnce(&mut CertificateParams),
    ) -> CertifiedIssuer<'static, KeyPair> {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(rcgen::DnType::CommonName, "below");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        change(&mut params);
        CertifiedIssuer::signed_by(params, KeyPair::generate().unwrap(), issuer).unwrap()
    }

    /// Whatever is wrong with the chain is said in a sentence, not by the name of a library's error.
    #[test]
    fn each_fault_of_a_chain_is_named() {
        let leaf = |issuer: &CertifiedIssuer<'static, KeyPair>, usage: ExtendedKeyUsagePurpose| {
            let mut params = CertificateParams::new(vec!["api.mesh.internal".to_owned()]).unwrap();
            params.extended_key_usages = vec![usage];
            (params.not_before, params.not_after) = (soon() - Duration::hours(1), soon());
            params.signed_by(&KeyPair::generate().unwrap(), issuer).unwrap().pem()
        };
        let server = ExtendedKeyUsagePurpose::ServerAuth;
        let pki = Pki::new();
        let path = pki.leaf(soon());
        let said = |texts: &[String]| {
            fs::write(&path, texts.concat()).unwrap();
            let _ = fs::remove_file(pki.folder.path().join("key.pem"));
            pki.verdict(path.clone()).expect("a fault")
        };
        // One bit of the signature.
        let mut changed = certificates(&path).unwrap().remove(0).to_vec();
        *changed.last_mut().unwrap() ^= 1;
        assert!(said(&[bundle::encode_certificates([&changed])]).contains("signature in its chain is wrong"));
        let code = leaf(&pki.root, ExtendedKeyUsagePurpose::CodeSigning);
        assert_eq!(said(&[code]), "it is neither for servers nor for clients");
        let last = ca_below(&pki.root, |ca| ca.is_ca = IsCa::Ca(BasicConstraints::Constrained(0)));
        let deeper = ca_below(&last, |ca| ca.distinguished_name.push(rcgen::DnType::CommonName, "deeper"));
        let texts = [leaf(&deeper, server.clone()), deeper.pem(), last.pem()];
        assert_eq!(said(&texts), "a CA in its chain may have no CA below it, and has one");
        let elsewhere = ca_below(&pki.root, |ca| {
            ca.name_constraints = Some(rcgen::NameConstraints {
                permitted_subtrees: vec![rcgen::GeneralSubtree::DnsName("example.com".to_owned())],
                excluded_subtrees: Vec::new(),
            });
        });
        let texts = [leaf(&elsewhere, server.clone()), elsewhere.pem()];
        assert_eq!(said(&texts), "it has a name that a CA in its chain may not sign for");
        let no_ca = ca_below(&pki.root, |ca| ca.is_ca = IsCa::ExplicitNoCa);
        assert_eq!(said(&[leaf(&no_ca, server.clone()), no_ca.pem()]), "what signed it is no CA");

        // Lists by a CA that may sign none, and by one that only bears the name.
        pki.crl(&[8; 16]);
        let no_lists = ca_below(&pki.root, |ca| ca.key_usages = vec![KeyUsagePurpose::KeyCertSign]);
        let texts = [leaf(&no_lists, server.clone()), no_lists.pem()];
        assert_eq!(said(&texts), "crl.pem says nothing about a certificate of its chain");
    }

    #[test]
    fn facts_of_a_certificate_are_read_from_pem_and_der() {
        let pki = Pki::new();
        let path = pki.leaf(soon());
        let der = certificates(&path).unwrap().remove(0);
        let facts = Facts::read(&der).unwrap();
        assert_eq!(
            (facts.names.as_slice(), facts.uses.as_slice()),
            (["api.mesh.internal".to_owned()].as_slice(), ["server"].as_slice())
        );
        assert_eq!(facts.serial, "07".repeat(16));
        fs::write(&path, &der).unwrap();
        assert_eq!(Facts::read(&certificates(&path).unwrap()[0]).unwrap(), facts);
        fs::write(&path, "nonsense").unwrap();
        assert_eq!(certificates(&path).unwrap_err().code, ErrorCode::CertificateInvalid);
    }
}
