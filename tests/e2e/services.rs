//! mTLS between third-party programs that use the pairs we hand out.

use std::{
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
};

use mesh_lab::transcript::assert_shown;
use mesh_tests::{Fleet, Ran, fleet_test, run};

use crate::ends::{Haproxy, Postgres};

const POLICY: &str = r#"
[[allow]]
from = ["*"]
to = ["*"]

[[grant]]
names = ["api.mesh.internal"]
to = ["node:bravo"]
"#;

/// nginx on bravo behind `ssl_verify_client on`, a client pair on alpha.
pub(crate) struct Service {
    pub(crate) fleet: Fleet,
    bravo: std::net::IpAddr,
}

/// Asks nginx from alpha, also while somebody else has the fleet.
pub(crate) struct Requester {
    host: mesh_tests::Host,
    ca: PathBuf,
    bravo: std::net::IpAddr,
}

impl Service {
    pub(crate) fn start() -> Self {
        let mut fleet = Fleet::with_nodes(&["alpha", "bravo"]);
        apply_policy(&fleet, POLICY);
        let (bravo, _) = fleet.addresses("bravo");
        let folder = fleet.path("bravo");
        let reload = format!("kill -HUP $(cat {})", folder.join("nginx.pid").display());
        issue(&mut fleet, "bravo", "api.mesh.internal", &["--profile", "server"]);
        let config = nginx_config(&folder);
        let nginx = fleet.command(
            "bravo",
            "nginx",
            &["-p", folder.to_str().unwrap(), "-c", config.to_str().unwrap()],
        );
        fleet.processes.spawn("nginx", nginx).unwrap();
        fleet.until("nginx runs", |fleet| fleet.path("bravo").join("nginx.pid").exists());
        // Again with the hook, now that there is something to reload: idempotent for the pair itself.
        issue(&mut fleet, "bravo", "api.mesh.internal", &["--profile", "server", "--reload", &reload]);
        issue(&mut fleet, "alpha", "web.alpha.mesh.internal", &["--profile", "client"]);
        let mut service = Self { fleet, bravo };
        service.until_answered("200");
        service
    }

    pub(crate) fn pair(&self, node: &str) -> PathBuf {
        self.fleet.path(node).join("tls")
    }

    /// One request from alpha; `None` for `pair` presents no certificate.
    fn request(&self, pair: Option<&Path>) -> Ran {
        self.request_as(pair, &[])
    }

    fn request_as(&self, pair: Option<&Path>, more: &[&str]) -> Ran {
        self.requester().request_as(pair, more)
    }

    pub(crate) fn requester(&self) -> Requester {
        let ca = self.pair("alpha").join("ca.pem");
        Requester { host: self.fleet.host("alpha").clone(), ca, bravo: self.bravo }
    }

    fn until_answered(&mut self, status: &str) {
        let pair = self.pair("alpha");
        let mut last = None;
        let answered =
            mesh_tests::wait_until(&format!("nginx answers {status}"), mesh_tests::DEADLINE, || {
                let ran = self.request(Some(&pair));
                let answered = ran.stdout == status;
                last = Some(ran);
                answered
            });
        if let Err(error) = answered {
            panic!("{error}: {}\n{}", last.unwrap(), self.fleet.processes.log_tails(40));
        }
    }
}

impl Requester {
    /// One request; `None` for `pair` presents no certificate.
    pub(crate) fn request(&self, pair: Option<&Path>) -> Ran {
        self.request_as(pair, &[])
    }

    fn request_as(&self, pair: Option<&Path>, more: &[&str]) -> Ran {
        let resolve = format!("api.mesh.internal:8443:{}", self.bravo);
        let mut command = self.host.command(Path::new("curl"));
        command.args(["-sS", "--max-time", "5", "-o", "/dev/null"]);
        command.args(["-w", "%{http_code}", "--resolve", &resolve, "--cacert"]).arg(&self.ca);
        if let Some(pair) = pair {
            command.arg("--cert").arg(pair.join("cert.pem")).arg("--key").arg(pair.join("key.pem"));
        }
        command.args(more).arg("https://api.mesh.internal:8443/");
        run(command)
    }
}

fn apply_policy(fleet: &Fleet, policy: &str) {
    let file = fleet.path("ctl").join("policy.toml");
    std::fs::write(&file, policy).unwrap();
    fleet.controller(&["policy", "apply", file.to_str().unwrap()]).ok();
}

/// Policy reaches a node within moments of `policy apply`; a refusal until then is not a failure.
fn issue(fleet: &mut Fleet, node: &str, name: &str, args: &[&str]) {
    let out = fleet.path(node).join("tls");
    let command = [&["cert", "issue", name, "--out", out.to_str().unwrap()], args].concat();
    fleet.meshctl(node, &command).ok();
    for file in ["key.pem", "cert.pem", "ca.pem", "crl.pem"] {
        assert!(out.join(file).exists(), "{file} of {name} on {node}");
    }
    let server = !args.contains(&"client");
    assert_eq!(out.join("ocsp.der").exists(), server, "ocsp.der of {name} on {node}");
}

fn nginx_config(folder: &Path) -> PathBuf {
    let path = folder.join("nginx.conf");
    let folder = folder.display();
    let config = format!(
        "daemon off;\nuser root;\nworker_processes 1;\npid {folder}/nginx.pid;\nerror_log stderr;\n\
         events {{}}\nhttp {{\n  access_log off;\n  client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2;\n\
         fastcgi_temp_path {folder}/t3; uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;\n\
         server {{\n    listen 8443 ssl;\n    listen [::]:8443 ssl;\n    keepalive_timeout 0;\n\
         ssl_certificate {folder}/tls/cert.pem;\n    ssl_certificate_key {folder}/tls/key.pem;\n\
         ssl_client_certificate {folder}/tls/ca.pem;\n    ssl_crl {folder}/tls/crl.pem;\n\
         ssl_stapling on;\n    ssl_stapling_file {folder}/tls/ocsp.der;\n\
         ssl_verify_client on;\n    ssl_verify_depth 2;\n    ssl_session_tickets off;\n    ssl_session_cache off;\n\
         location / {{ return 200 'hello $ssl_client_s_dn\\n'; }}\n  }}\n}}\n"
    );
    std::fs::write(&path, config).unwrap();
    path
}

#[test]
fn nginx_haproxy_and_postgres_serve_mtls_and_refuse_who_is_revoked() {
    fleet_test("services::nginx_haproxy_and_postgres_serve_mtls_and_refuse_who_is_revoked", || {
        let mut service = Service::start();

        // Without a certificate nginx answers 400.
        assert_eq!(service.request(None).stdout, "400");

        // A second judge of the same handshake.
        let pair = service.pair("alpha");
        let file = |name: &str| pair.join(name).display().to_string();
        let target = format!("{}:8443", service.bravo);
        let (ca, cert, key) = (file("ca.pem"), file("cert.pem"), file("key.pem"));
        let seen = service.fleet.on(
            "alpha",
            "openssl",
            &[
                "s_client",
                "-connect",
                &target,
                "-servername",
                "api.mesh.internal",
                "-verify_return_error",
                "-verify_hostname",
                "api.mesh.internal",
                "-x509_strict",
                "-CAfile",
                &ca,
                "-cert",
                &cert,
                "-key",
                &key,
                "-status",
            ],
        );
        assert!(seen.stdout.contains("Verify return code: 0 (ok)"), "{seen}");
        assert!(seen.stdout.contains("OCSP Response Status: successful"), "{seen}");
        assert!(seen.stdout.contains("Cert Status: good"), "{seen}");
        // curl refuses a server without a good stapled response.
        let ran = service.request_as(Some(&pair), &["--cert-status"]);
        assert_eq!(ran.stdout, "200", "{ran}");

        a_profile_of_the_policy_is_kept_until_the_policy_ends_it(&mut service.fleet);
        profiles_are_explained_as_documented(&mut service.fleet);
        apply_policy(&service.fleet, POLICY);

        // Two more ends, each with a certificate, without, and later with a revoked one.
        let haproxy = Haproxy::start(&mut service.fleet);
        service.fleet.until("haproxy answers", |fleet| haproxy.request(fleet, &pair, true).stdout == "200");
        let stranger = haproxy.request(&service.fleet, &pair, false);
        assert_eq!((stranger.stdout.as_str(), stranger.code == 0), ("000", false), "{stranger}");
        let postgres = Postgres::start(&mut service.fleet);
        if let Some(postgres) = &postgres {
            let query = |role, shown| postgres.query(&service.fleet, &pair, role, shown);
            assert_eq!(query(Postgres::role(), true).ok().stdout.trim(), "42");
            let stranger = query(Postgres::role(), false);
            assert!(stranger.code != 0 && stranger.stderr.contains("client certificate"), "{stranger}");
            let other = query("postgres", true);
            assert!(other.code != 0 && other.stderr.contains("authentication failed"), "{other}");
        }
        other_forms_follow_the_pair(&service.fleet);

        let revoked =
            service.fleet.controller(&["cert", "revoke", "web.alpha.mesh.internal", "--wait", "-o", "json"]);
        assert_eq!(revoked.ok().json()["changed"], true);
        service.until_answered("400");
        service.fleet.until("haproxy refuses", |fleet| haproxy.request(fleet, &pair, true).stdout == "000");
        if let Some(postgres) = &postgres {
            service.fleet.until("postgres refuses", |fleet| {
                let ran = postgres.query(fleet, &pair, Postgres::role(), true);
                ran.code != 0 && ran.stderr.contains("revoked")
            });
        }
    });
}

/// The page's own policy, asked the page's own question.
fn profiles_are_explained_as_documented(fleet: &mut Fleet) {
    let page = include_str!("../../docs/profiles.md");
    let profile = page.split("```toml\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
    fleet.controller(&["node", "tag", "alpha", "+db"]).ok();
    apply_policy(fleet, &format!("{POLICY}{profile}"));
    let ask = ["cert", "issue", "--dry-run", "--explain", "db.mesh.internal", "x.mesh.internal"];
    let said =
        fleet.controller(&[&ask[..], &["--profile", "database", "--node", "alpha"]].concat()).exits(4).stdout;
    assert_shown(page, "meshctl cert issue --dry-run", &[("db-1", "alpha")], &said);
}

/// A custom profile on a node: asked about, issued with a key of its own, renewed, and refused once the policy is another.
fn a_profile_of_the_policy_is_kept_until_the_policy_ends_it(fleet: &mut Fleet) {
    let name = "db.mesh.internal";
    let issue = ["cert", "issue", name, "--profile", "database"];
    fleet.meshctl("alpha", &issue).refused("E0570", 6);
    let profile = "[profile.database]\nkind = \"server\"\nkeys = [\"ed25519\"]\nrevocation = \"short-lived\"\n\
                   [[profile.database.names]]\nto = [\"node:alpha\"]\nexact = [\"db.mesh.internal\"]\n";
    apply_policy(fleet, &format!("{POLICY}{profile}"));
    let ask = [&issue[..], &["--dry-run", "--explain", "-o", "json"]].concat();
    let answer = fleet.meshctl("alpha", &ask).exits(4).json();
    let refused = answer["items"].as_array().unwrap().iter().find(|item| item["allowed"] == false).unwrap();
    assert_eq!((&refused["about"], &refused["code"]), (&"key".into(), &"E0573".into()), "{answer}");
    let out = fleet.path("alpha").join("db");
    let typed = [&issue[..], &["--key-type", "ed25519"]].concat();
    let ask = [&typed[..], &["--dry-run"]].concat();
    fleet.meshctl("alpha", &ask).ok();
    let node = [&ask[..], &["--node", "bravo"]].concat();
    assert!(fleet.controller(&node).exits(4).stdout.contains("E0571"));
    assert!(!out.exists(), "a dry run issues nothing");
    fleet.meshctl("alpha", &[&typed[..], &["--out", out.to_str().unwrap()]].concat()).ok();
    let certificate = out.join("cert.pem").display().to_string();
    let text = fleet.on("alpha", "openssl", &["x509", "-in", &certificate, "-noout", "-text"]).ok().stdout;
    // Older programs know noRevAvail by its number only.
    let short = text.contains("2.5.29.56") || text.contains("No Revocation Available");
    assert!(text.contains("ED25519") && short, "{text}");
    assert!(!out.join("ocsp.der").exists(), "nobody tells of its revocation");
    let before = std::fs::read(out.join("cert.pem")).unwrap();
    fleet.meshctl("alpha", &["cert", "renew", name]).ok();
    assert_ne!(std::fs::read(out.join("cert.pem")).unwrap(), before);

    apply_policy(fleet, POLICY);
    let problem = |fleet: &Fleet| {
        let pairs = fleet.meshctl("alpha", &["cert", "ls", "-o", "json"]).ok().json();
        let pair = pairs["items"].as_array().unwrap().iter().find(|pair| pair["name"] == name).cloned();
        pair.unwrap()["problem"].as_str().unwrap().to_owned()
    };
    fleet.until("the node says that it does not renew it", |fleet| problem(fleet).contains("E0570"));
    fleet.meshctl("alpha", &["cert", "renew", name]).refused("E0570", 6);
    let listed = fleet.controller(&["cert", "ls", "--name", name, "-o", "json"]).ok().json();
    assert_eq!(listed["items"][0]["refusedCode"], "E0570", "{listed}");
}

/// combined.pem and cert.p12 as OpenSSL and Java read them, before and after a renewal.
fn other_forms_follow_the_pair(fleet: &Fleet) {
    let out = fleet.path("alpha").join("forms");
    let passphrase = fleet.path("alpha").join("p12-passphrase");
    std::fs::write(&passphrase, "changeit 1\n").unwrap();
    let (text, file) = (out.display().to_string(), passphrase.display().to_string());
    let name = "forms.alpha.mesh.internal";
    let args = ["--out", &text, "--combined", "--p12", "--p12-passphrase-file", &file];
    fleet.meshctl("alpha", &[&["cert", "issue", name][..], &args].concat()).ok();
    let read = |name: &str| std::fs::read_to_string(out.join(name)).unwrap();
    let p12 = out.join("cert.p12").display().to_string();
    let judge = |password: &str| {
        assert_eq!(read("combined.pem"), read("key.pem") + &read("cert.pem"));
        let source = format!("pass:{password}");
        let opened =
            fleet.on("alpha", "openssl", &["pkcs12", "-in", &p12, "-passin", &source, "-nodes"]).ok();
        for block in [read("cert.pem"), read("key.pem")] {
            for line in block.lines() {
                assert!(opened.stdout.contains(line), "{line} is not in cert.p12");
            }
        }
        let listed =
            fleet.on("alpha", "keytool", &["-list", "-v", "-keystore", &p12, "-storepass", password]).ok();
        assert!(listed.stdout.contains("Certificate chain length: 2"), "{listed}");
        assert!(listed.stdout.contains(&format!("Alias name: {name}")), "{listed}");
    };
    judge("changeit 1");
    let before = read("cert.pem");
    std::fs::write(&passphrase, "changeit 2\n").unwrap();
    fleet.meshctl("alpha", &["cert", "renew", name]).ok();
    assert_ne!(read("cert.pem"), before);
    judge("changeit 2");

    // By its name the controller shows the newer one, and that there is another.
    let shown = fleet.controller(&["cert", "show", name, "-o", "json"]).ok();
    let leaf = shown.json()["pem"].as_str().unwrap().to_owned();
    assert!(read("cert.pem").starts_with(leaf.trim_end()), "{shown}");
    let shown = fleet.controller(&["cert", "show", name]).ok();
    assert!(shown.stdout.contains(name) && shown.stderr.contains("1 more certificate"), "{shown}");
    fleet.controller(&["cert", "show", "nobody.mesh.internal"]).refused("E0520", 6);
    for unset in [&["cert", "show", ""][..], &["cert", "ls", "--name", ""], &["cert", "ls", "--node", ""]] {
        let refused = fleet.controller(unset).exits(2);
        assert!(refused.stderr.contains("E0902") && refused.stdout.is_empty(), "{refused}");
    }
    let short = fleet.controller(&["cert", "show", "00ff"]).refused("E0520", 6);
    assert!(short.stderr.contains("32 hexadecimal digits"), "{short}");
}

#[test]
fn renewal_under_requests_fails_none() {
    fleet_test("services::renewal_under_requests_fails_none", || {
        let service = Service::start();
        let serial = |service: &Service| std::fs::read(service.pair("bravo").join("cert.pem")).unwrap();
        let (stop, failed, answered) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
        let pair = service.pair("alpha");
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    // Bounded: about as many requests as three renewals take, never endless.
                    for _ in 0..2_000 {
                        if stop.load(Ordering::Relaxed) {
                            break;
                        }
                        let ran = service.request(Some(&pair));
                        if ran.stdout != "200" {
                            eprintln!("{ran}");
                            failed.fetch_add(1, Ordering::Relaxed);
                        }
                        answered.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            for _ in 0..3 {
                let before = serial(&service);
                service.fleet.meshctl("bravo", &["cert", "renew", "api.mesh.internal"]).ok();
                assert_ne!(serial(&service), before, "renewal replaces the certificate");
                let seen = answered.load(Ordering::Relaxed);
                let _ = mesh_tests::wait_until("requests after the renewal", mesh_tests::DEADLINE, || {
                    answered.load(Ordering::Relaxed) > seen + 20
                });
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert_eq!(failed.load(Ordering::Relaxed), 0, "of {}", answered.load(Ordering::Relaxed));
        assert!(answered.load(Ordering::Relaxed) >= 60);
    });
}
