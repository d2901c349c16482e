//! CAs that OpenSSL made, taken over at `init`, and certificates below them as OpenSSL judges them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use mesh_ca::bundle::{encode_certificates, encode_crls};
use mesh_controller::{ImportConfig, ImportKind, InitConfig, Passphrase, StartupError};
use mesh_proto::v1::{self as pb, ErrorCode};
use mesh_runtime::SystemClock;
use tempfile::TempDir;

use crate::harness::{Mesh, Running};

const CONFIG: &str = "\
[req]
distinguished_name = dn
[dn]
[ca]
default_ca = here
[here]
database = index.txt
new_certs_dir = .
serial = serial
crlnumber = crlnumber
default_md = sha256
policy = any
unique_subject = no
crl_extensions = crl
[any]
countryName = optional
organizationName = optional
commonName = supplied
[crl]
authorityKeyIdentifier = keyid
[root]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[nosign]
basicConstraints = critical, CA:TRUE
keyUsage = critical, digitalSignature
subjectKeyIdentifier = hash
[leaf]
basicConstraints = CA:FALSE
keyUsage = critical, digitalSignature
subjectKeyIdentifier = hash
[elsewhere]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
nameConstraints = critical, permitted;DNS:example.com
[issuing]
basicConstraints = critical, CA:TRUE, pathlen:0
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
";

/// A folder in which OpenSSL keeps a CA.
struct Foreign(TempDir);

impl Foreign {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("ca.cnf"), CONFIG).unwrap();
        for (name, text) in [("index.txt", ""), ("serial", "01\n"), ("crlnumber", "2A\n")] {
            fs::write(folder.path().join(name), text).unwrap();
        }
        Self(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn openssl(&self, arguments: &str) -> String {
        let done = Command::new("openssl")
            .args(arguments.split_whitespace().map(|word| word.replace('~', " ")))
            .current_dir(self.0.path())
            .env("OPENSSL_CONF", self.path("ca.cnf"))
            .output()
            .unwrap();
        assert!(done.status.success(), "{arguments}: {}", String::from_utf8_lossy(&done.stderr));
        String::from_utf8(done.stdout).unwrap()
    }

    /// `root.pem` and `root.key` of a kind of key.
    fn root(&self, key: &str, subject: &str, extensions: &str) {
        self.openssl(&format!("genpkey {key} -out root.key"));
        self.openssl(&format!(
            "req -x509 -new -key root.key -subj {subject} -days 900 -extensions {extensions} -out root.pem"
        ));
    }

    /// `issuing.pem` and `issuing.key` below the root.
    fn issuing(&self) {
        self.openssl("genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out issuing.key");
        self.openssl("req -new -key issuing.key -subj /O=Example/CN=Mesh~issuing -out issuing.csr");
        self.openssl(
            "ca -batch -config ca.cnf -cert root.pem -keyfile root.key -extensions issuing -days 400 -notext -in issuing.csr -out issuing.pem",
        );
    }

    fn crl(&self) {
        self.openssl("ca -config ca.cnf -gencrl -cert root.pem -keyfile root.key -crldays 90 -out root.crl");
    }

    fn import(&self, kind: ImportKind, files: &[&str]) -> ImportConfig {
        let files = files.iter().map(|name| self.path(name)).collect();
        ImportConfig { kind, files, crl: None, passphrase: None }
    }
}

fn init(mesh: &Mesh, import: ImportConfig) -> Result<(), StartupError> {
    let config = InitConfig { import: Some(import), ..mesh.init_config() };
    mesh_controller::init(config, Arc::new(SystemClock)).map(drop)
}

fn passphrase(text: &str) -> Option<Passphrase> {
    Some(Passphrase::new(text.to_owned()))
}

/// A node's certificate, its chain and all CRLs, judged by OpenSSL's strict verification.
async fn judge(running: &Running, folder: &Path) {
    let node = running.enroll("alpha").await;
    let put = |name: &str, text: String| fs::write(folder.join(name), text).unwrap();
    put("leaf.pem", encode_certificates([&node.identity.leaf]));
    put("chain.pem", encode_certificates([&node.identity.issuer]));
    put("ca.pem", encode_certificates([&running.root]));
    let crls = pb::certificates_client::CertificatesClient::new(running.local().await)
        .crls(pb::CrlsRequest::default())
        .await
        .unwrap()
        .into_inner()
        .crls;
    put("crls.pem", encode_crls(crls.iter().map(|crl| &crl.der)));
    let judged = Command::new("openssl")
        .args(["verify", "-x509_strict", "-crl_check_all", "-CAfile", "ca.pem", "-untrusted", "chain.pem"])
        .args(["-CRLfile", "crls.pem", "leaf.pem"])
        .current_dir(folder)
        .output()
        .unwrap();
    let said =
        String::from_utf8_lossy(&judged.stdout).into_owned() + &String::from_utf8_lossy(&judged.stderr);
    assert!(judged.status.success() && said.contains("leaf.pem: OK"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_root_of_openssl_of_every_key_type_signs_a_fleet_that_openssl_accepts() {
    for key in [
        "-algorithm RSA -pkeyopt rsa_keygen_bits:2048",
        "-algorithm RSA -pkeyopt rsa_keygen_bits:4096",
        "-algorithm EC -pkeyopt ec_paramgen_curve:P-256",
        "-algorithm EC -pkeyopt ec_paramgen_curve:P-384",
        "-algorithm ED25519",
    ] {
        let (foreign, mesh) = (Foreign::new(), Mesh::empty());
        foreign.root(key, "/C=DE/O=Example/CN=Example~Root", "root");
        init(&mesh, foreign.import(ImportKind::Root, &["root.pem", "root.key"])).unwrap();
        let running = mesh.start().await;
        assert_eq!(
            encode_certificates([&running.root]),
            fs::read_to_string(foreign.path("root.pem")).unwrap()
        );
        judge(&running, foreign.0.path()).await;
        running.stop().await.unwrap();
    }
}

/// What people have of a CA: certificate and key in one file or two, PEM of every age, or PKCS #12.
#[tokio::test(flavor = "multi_thread")]
async fn root_and_intermediate_come_in_every_form_of_file() {
    let foreign = Foreign::new();
    foreign.root("-algorithm EC -pkeyopt ec_paramgen_curve:P-256", "/O=Example/CN=Example~Root", "root");
    foreign.issuing();
    foreign.crl();
    for (name, chain) in [("root", ""), ("issuing", "-certfile root.pem")] {
        foreign.openssl(&format!("ec -in {name}.key -out {name}.sec1.key"));
        foreign.openssl(&format!("pkcs8 -topk8 -in {name}.key -out {name}.sealed.key -passout pass:s3cret"));
        foreign.openssl(&format!(
            "pkcs12 -export -in {name}.pem -inkey {name}.key {chain} -passout pass:s3cret -out {name}.p12"
        ));
        let both = fs::read_to_string(foreign.path(&format!("{name}.key"))).unwrap()
            + &fs::read_to_string(foreign.path(&format!("{name}.pem"))).unwrap();
        fs::write(foreign.path(&format!("{name}.all.pem")), both).unwrap();
    }
    for (kind, name) in [(ImportKind::Root, "root"), (ImportKind::Issuer, "issuing")] {
        let forms: [(&[&str], Option<&str>); 5] = [
            (&[".pem", ".key"], None),
            (&[".pem", ".sec1.key"], None),
            (&[".all.pem"], None),
            (&[".pem", ".sealed.key"], Some("s3cret")),
            (&[".p12"], Some("s3cret")),
        ];
        for (endings, secret) in forms {
            let mut files: Vec<String> = endings.iter().map(|ending| format!("{name}{ending}")).collect();
            // The root's certificate comes along with an intermediate, unless it is in the file already.
            if kind == ImportKind::Issuer && endings != [".p12"] {
                files.push("root.pem".into());
            }
            let files: Vec<&str> = files.iter().map(String::as_str).collect();
            let crl = (kind == ImportKind::Issuer).then(|| foreign.path("root.crl"));
            let import =
                ImportConfig { crl, passphrase: secret.and_then(passphrase), ..foreign.import(kind, &files) };
            let mesh = Mesh::empty();
            init(&mesh, import).unwrap_or_else(|error| panic!("{files:?}: {error}: {}", error.why()));
            let running = mesh.start().await;
            let root = encode_certificates([&running.root]);
            assert_eq!(root, fs::read_to_string(foreign.path("root.pem")).unwrap(), "{files:?}");
            judge(&running, foreign.0.path()).await;
            running.stop().await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_issuing_ca_of_openssl_works_below_a_root_that_stays_away() {
    let (foreign, mesh) = (Foreign::new(), Mesh::empty());
    // A name that could not be reproduced here: nobody has to.
    let p384 = "-algorithm EC -pkeyopt ec_paramgen_curve:P-384";
    foreign.root(p384, "/DC=com/DC=example/CN=Example~Root", "root");
    foreign.issuing();
    foreign.crl();
    foreign.openssl("pkcs12 -export -in issuing.pem -inkey issuing.key -certfile root.pem -passout pass:s3cret -out issuing.p12");
    let import = ImportConfig {
        crl: Some(foreign.path("root.crl")),
        passphrase: passphrase("s3cret"),
        ..foreign.import(ImportKind::Issuer, &["issuing.p12"])
    };
    init(&mesh, import).unwrap();
    assert!(!mesh.state_dir().join("keys/root.key").exists());
    for _ in 0..2 {
        let running = mesh.start().await;
        let ca = pb::ca_client::CaClient::new(running.local().await);
        let shown = ca.clone().show(pb::Empty {}).await.unwrap().into_inner();
        assert!(shown.roots[0].sealed && !shown.issuers[0].sealed);
        let root_crl = shown.crls.iter().find(|crl| crl.issuer.contains("Example Root")).unwrap();
        assert_eq!(root_crl.number, 0x2a, "the root's own CRL, as it came");
        running.stop().await.unwrap();
    }
    let running = mesh.start().await;
    // The root's next CRL takes the place of the one that came with it; older and foreign ones do not.
    let before = fs::read(foreign.path("root.crl")).unwrap();
    foreign.crl();
    let crl = |text: &[u8]| mesh_ca::bundle::parse_crls(text).unwrap().remove(0);
    let (old, new) = (crl(&before), crl(&fs::read(foreign.path("root.crl")).unwrap()));
    let mut client = pb::ca_client::CaClient::new(running.local().await);
    let mut give = async |crl: Vec<u8>| {
        let request =
            pb::ImportCrlRequest { crl: crl.into(), operation_id: crate::harness::operation().into() };
        client.import_crl(request).await.map(|done| done.into_inner().changed)
    };
    let code = crate::harness::code;
    assert!(give(new.clone()).await.unwrap());
    assert!(!give(new).await.unwrap(), "the same again");
    assert_eq!(code(&give(old.clone()).await.unwrap_err()), ErrorCode::ImportRefused);
    let other = Foreign::new();
    other.root(p384, "/DC=com/DC=example/CN=Example~Root", "root");
    other.crl();
    let posing = crl(&fs::read(other.path("root.crl")).unwrap());
    assert_eq!(code(&give(posing).await.unwrap_err()), ErrorCode::ImportRefused);
    foreign.openssl("ca -config ca.cnf -revoke issuing.pem -cert root.pem -keyfile root.key");
    foreign.crl();
    let revoking = crl(&fs::read(foreign.path("root.crl")).unwrap());
    assert_eq!(code(&give(revoking).await.unwrap_err()), ErrorCode::ImportRefused);
    judge(&running, foreign.0.path()).await;
    running.stop().await.unwrap();
}

#[test]
fn a_ca_that_cannot_be_taken_over_is_refused_and_nothing_is_made() {
    let foreign = Foreign::new();
    let p256 = "-algorithm EC -pkeyopt ec_paramgen_curve:P-256";
    let mesh = Mesh::empty();
    let refused = |import: ImportConfig, code: ErrorCode, why: &str| {
        let error = init(&mesh, import).unwrap_err();
        assert_eq!(error.code(), code, "{error}: {}", error.why());
        assert!(format!("{error}: {}", error.why()).contains(why), "{error}: {}", error.why());
        assert!(!error.next().is_empty());
        assert!(!mesh.state_dir().exists(), "{why}: nothing is half made");
    };
    let both = |kind| foreign.import(kind, &["root.pem", "root.key"]);
    use ErrorCode::{ImportName, ImportPassphrase, ImportRefused, StateNotFound};

    refused(both(ImportKind::Root), StateNotFound, "root.pem");
    foreign.root(p256, "/DC=com/DC=example/CN=Example~Root", "root");
    refused(both(ImportKind::Root), ImportName, "byte for byte");
    for (extensions, why) in
        [("nosign", "keyCertSign"), ("leaf", "not a CA"), ("elsewhere", "would not be accepted")]
    {
        foreign.root(p256, "/CN=Example~Root", extensions);
        refused(both(ImportKind::Root), ImportRefused, why);
    }
    foreign.root("-algorithm RSA -pkeyopt rsa_keygen_bits:1024", "/CN=Weak", "root");
    refused(both(ImportKind::Root), ImportRefused, "not taken");
    foreign.root(p256, "/CN=Example~Root", "root");
    fs::copy(foreign.path("root.key"), foreign.path("first.key")).unwrap();
    fs::copy(foreign.path("root.pem"), foreign.path("first.pem")).unwrap();
    foreign.root(p256, "/CN=Example~Root", "root");
    refused(
        foreign.import(ImportKind::Root, &["root.pem", "first.key"]),
        ImportRefused,
        "none of the certificates",
    );
    refused(both(ImportKind::Issuer), ImportRefused, "the root, not");
    foreign.openssl("req -new -key root.key -subj /CN=Ended -out ended.csr");
    foreign.openssl(
        "ca -batch -config ca.cnf -selfsign -keyfile root.key -extensions root -startdate 20200101000000Z \
         -enddate 20210101000000Z -notext -in ended.csr -out ended.pem",
    );
    refused(foreign.import(ImportKind::Root, &["ended.pem", "root.key"]), ImportRefused, "ended at 2021");

    // Passphrases.
    foreign.openssl("pkcs8 -topk8 -in root.key -out sealed.key -passout pass:s3cret");
    let sealed = foreign.import(ImportKind::Root, &["root.pem", "sealed.key"]);
    refused(sealed.clone(), ImportPassphrase, "password is needed");
    refused(
        ImportConfig { passphrase: passphrase("wrong"), ..sealed.clone() },
        ImportPassphrase,
        "wrong password",
    );

    // An issuing CA: its root, its root's CRL, and what that says.
    foreign.issuing();
    foreign.crl();
    let all = ["issuing.pem", "issuing.key", "root.pem"];
    let crl = |name: &str| Some(foreign.path(name));
    refused(foreign.import(ImportKind::Issuer, &all), ImportRefused, "CRL is missing");
    refused(foreign.import(ImportKind::Issuer, &all[..2]), ImportRefused, "self-signed root");
    let import = |name: &str| ImportConfig { crl: crl(name), ..foreign.import(ImportKind::Issuer, &all) };
    refused(import("root.pem"), ImportRefused, "is not the root's CRL");
    foreign.openssl("ca -config ca.cnf -revoke issuing.pem -cert root.pem -keyfile root.key");
    foreign.crl();
    refused(import("root.crl"), ImportRefused, "lists the issuing CA");
    let root = ImportConfig { crl: crl("root.crl"), ..both(ImportKind::Root) };
    refused(root, ImportRefused, "would drop");

    // And the sealed one with its passphrase is taken.
    init(&mesh, ImportConfig { passphrase: passphrase("s3cret"), ..sealed }).unwrap();
}
