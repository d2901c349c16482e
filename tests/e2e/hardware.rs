//! The issuing CA's key in a hardware token, with SoftHSM in the token's place; and backups, from the command line.

use std::path::{Path, PathBuf};

use mesh_tests::{CONTROLLER, Fleet, fleet_test, run};

const PIN: &str = "24680";

/// A token that the controller's host finds by its home folder.
struct Hsm {
    folder: PathBuf,
    uri: String,
    pin_file: PathBuf,
    config: PathBuf,
}

impl Hsm {
    fn new(fleet: &Fleet) -> Self {
        let folder = fleet.path(CONTROLLER);
        let (config, tokens) = (folder.join(".config/softhsm2"), folder.join("tokens"));
        std::fs::create_dir_all(&config).unwrap();
        std::fs::create_dir(&tokens).unwrap();
        let config = config.join("softhsm2.conf");
        let text = format!("directories.tokendir = {}\n", tokens.display());
        std::fs::write(&config, &text).unwrap();
        let made = ["--init-token", "--free", "--label", "prod CA", "--pin", PIN, "--so-pin", "13579"];
        fleet.on(CONTROLLER, "softhsm2-util", &made).ok();
        let places = ["/usr/lib/softhsm/libsofthsm2.so", "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so"];
        let module = places.iter().find(|path| Path::new(path).exists());
        let uri = format!(
            "pkcs11:token=prod%20CA?module-path={}",
            module.expect("softhsm2 is installed by make deps-test")
        );
        let pin_file = folder.join("pin");
        std::fs::write(&pin_file, format!("{PIN}\n")).unwrap();
        Self { folder, uri, pin_file, config }
    }

    /// A token that makes no EC keys, and one that does again.
    fn can_draw(&self, able: bool) {
        let mut text = format!("directories.tokendir = {}\n", self.folder.join("tokens").display());
        if !able {
            // What it has, not what it lacks: SoftHSM 2.6.1 reads a list of one exclusion as none.
            text += "slots.mechanisms = CKM_ECDSA,CKM_SHA256\n";
        }
        std::fs::write(&self.config, text).unwrap();
    }

    fn set_pin(&self, pin: &str) {
        std::fs::write(&self.pin_file, format!("{pin}\n")).unwrap();
    }

    /// Takes the token out, or puts it back.
    fn plug(&self, plugged: bool) {
        let (inside, outside) = (self.folder.join("tokens"), self.folder.join("drawer"));
        let (from, to) = if plugged { (&outside, &inside) } else { (&inside, &outside) };
        std::fs::rename(from, to).unwrap();
    }

    fn start(&self, fleet: &mut Fleet) {
        fleet.start_controller_with(&[("MESH_PIN_FILE", self.pin_file.to_str().unwrap())]);
    }
}

/// Issues a certificate by the controller, and has OpenSSL judge it with all CRLs.
fn issue_and_judge(fleet: &Fleet, name: &str) {
    let out = fleet.path(CONTROLLER).join(name);
    fleet.controller(&["cert", "issue", name, "--out", out.to_str().unwrap()]).ok();
    let file = |name: &str| out.join(name).display().to_string();
    let (ca, cert, crl) = (file("ca.pem"), file("cert.pem"), file("crl.pem"));
    let verify = ["verify", "-x509_strict", "-crl_check_all", "-CAfile", &ca, "-untrusted", &cert];
    let judged = fleet.on(CONTROLLER, "openssl", &[&verify[..], &["-CRLfile", &crl, &cert]].concat()).ok();
    assert!(judged.stdout.contains("OK"), "{judged}");
}

fn issued(fleet: &Fleet) -> usize {
    let listed = fleet.controller(&["cert", "ls", "-o", "json"]).ok().json();
    listed["items"].as_array().unwrap().len()
}

#[test]
fn the_issuing_key_lives_in_a_token_and_without_it_nothing_is_signed() {
    fleet_test("hardware::the_issuing_key_lives_in_a_token_and_without_it_nothing_is_signed", || {
        let mut fleet = Fleet::without_controller();
        let hsm = Hsm::new(&fleet);
        std::fs::write(fleet.passphrase_file(), "correct horse battery staple\n").unwrap();
        let pin = hsm.pin_file.display().to_string();
        let init = |args: &[&str]| {
            let fixed = ["init", "--domain", "mesh.internal", "--key-store", &hsm.uri];
            fleet.meshd_controller(&[&fixed[..], args].concat())
        };

        // Refused, each for its reason, and with nothing left behind.
        init(&[]).refused("E0556", 2);
        hsm.set_pin("99999");
        let wrong = init(&["--pin-file", &pin]).refused("E0555", 4);
        assert!(!wrong.stderr.contains("99999"), "the PIN is repeated: {wrong}");
        hsm.set_pin(PIN);
        hsm.plug(false);
        init(&["--pin-file", &pin]).refused("E0554", 1);
        hsm.plug(true);
        let inline = format!("{}&pin-value={PIN}", hsm.uri);
        let refused = fleet.meshd_controller(&["init", "--domain", "mesh.internal", "--key-store", &inline]);
        assert!(!refused.clone().refused("E0113", 2).stderr.contains(PIN), "{refused}");
        let typed = |key_type: &str| init(&["--pin-file", &pin, "--key-type", key_type]);
        let refused = typed("ed25519").refused("E0113", 2);
        assert!(refused.stderr.contains("p256 or p384"), "{refused}");
        hsm.can_draw(false);
        let refused = typed("p384").refused("E0113", 2);
        assert!(refused.stderr.contains("does not make keys of type ecdsa-p384"), "{refused}");
        hsm.can_draw(true);
        assert!(!fleet.state(CONTROLLER).exists());

        typed("p384").ok();
        let keys = fleet.state(CONTROLLER).join("keys");
        assert!(keys.join("root.key").exists() && keys.join("issuing.token").exists());
        assert!(!keys.join("issuing.key").exists(), "the issuing key is nowhere but in the token");
        hsm.start(&mut fleet);
        issue_and_judge(&fleet, "one.mesh.internal");
        fleet.processes.stop(CONTROLLER).unwrap();

        let start = |args: &[&str]| fleet.meshd_controller(&[&["run"][..], args].concat());
        start(&[]).refused("E0556", 2);
        hsm.set_pin("99999");
        start(&["--pin-file", &pin]).refused("E0555", 4);
        hsm.set_pin(PIN);
        hsm.plug(false);
        start(&["--pin-file", &pin]).refused("E0554", 1);
        hsm.plug(true);

        // The token is taken out while the controller runs.
        hsm.start(&mut fleet);
        issue_and_judge(&fleet, "two.mesh.internal");
        let before = issued(&fleet);
        hsm.plug(false);
        let out = fleet.path(CONTROLLER).join("three").display().to_string();
        let refused = fleet.controller(&["cert", "issue", "three.mesh.internal", "--out", &out]);
        refused.refused("E0554", 1);
        assert_eq!(issued(&fleet), before, "nothing was signed");
        hsm.plug(true);
        fleet.processes.stop(CONTROLLER).unwrap();
        hsm.start(&mut fleet);
        issue_and_judge(&fleet, "three.mesh.internal");

        // The next issuing CA's key is drawn there too, of the same type.
        let ed25519 = fleet.controller(&["ca", "rotate", "start", "--key-type", "ed25519"]);
        assert!(ed25519.refused("E0554", 1).stderr.contains("choose another with --key-type"));
        fleet.controller(&["ca", "rotate", "start"]).ok();
        let shown = fleet.controller(&["ca", "show", "-o", "json"]).ok().json();
        let types = |list: &str| -> Vec<String> {
            let all = shown.pointer(&format!("/item/{list}")).or_else(|| shown.get(list)).unwrap();
            all.as_array().unwrap().iter().map(|ca| ca["keyType"].as_str().unwrap().to_owned()).collect()
        };
        assert_eq!((types("roots").len(), types("issuers")), (1, vec!["ecdsa-p384".to_owned(); 2]));
        let names =
            std::fs::read_dir(&keys).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let names: Vec<String> = names.filter(|name| name.starts_with("issuing-")).collect();
        assert!(matches!(names.as_slice(), [name] if name.ends_with(".token")), "{names:?}");
        fleet.controller(&["ca", "rotate", "abort"]).ok();

        // A backup has all but the token's keys; with the token the restored controller goes on.
        let backup = fleet.path(CONTROLLER).join("backup").display().to_string();
        let secret = fleet.passphrase_file().display().to_string();
        let take = ["ca", "backup", "--out", &backup, "--passphrase-file", &secret, "-o", "json"];
        assert_eq!(fleet.controller(&take).ok().json()["changed"], true);
        fleet.controller(&take).refused("E0902", 2);
        fleet.processes.stop(CONTROLLER).unwrap();
        std::fs::rename(fleet.state(CONTROLLER), fleet.path(CONTROLLER).join("lost")).unwrap();
        let mut restore = fleet.command(CONTROLLER, mesh_tests::binary("meshd"), &["controller", "restore"]);
        restore.args(["--from", &backup, "--backup-passphrase-file", &secret, "--state-dir"]);
        restore.arg(fleet.state(CONTROLLER));
        run(restore).ok();
        hsm.start(&mut fleet);
        issue_and_judge(&fleet, "four.mesh.internal");
    });
}
