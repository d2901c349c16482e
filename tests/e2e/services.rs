//! mTLS between third-party programs that use the pairs we hand out.

use std::{
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
};

use mesh_tests::{Fleet, Ran, fleet_test, run};

const POLICY: &str = r#"
[[allow]]
from = ["*"]
to = ["*"]

[[grant]]
names = ["api.mesh.internal"]
to = ["node:bravo"]
"#;

/// nginx on bravo behind `ssl_verify_client on`, a client pair on alpha.
struct Service {
    fleet: Fleet,
    bravo: std::net::IpAddr,
}

impl Service {
    fn start() -> Self {
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

    fn pair(&self, node: &str) -> PathBuf {
        self.fleet.path(node).join("tls")
    }

    /// One request from alpha; `None` for `pair` presents no certificate.
    fn request(&self, pair: Option<&Path>) -> Ran {
        let ca = self.pair("alpha").join("ca.pem");
        let resolve = format!("api.mesh.internal:8443:{}", self.bravo);
        let mut command = self.fleet.command("alpha", "curl", &["-sS", "--max-time", "5", "-o", "/dev/null"]);
        command.args(["-w", "%{http_code}", "--resolve", &resolve, "--cacert"]).arg(ca);
        if let Some(pair) = pair {
            command.arg("--cert").arg(pair.join("cert.pem")).arg("--key").arg(pair.join("key.pem"));
        }
        run({
            command.arg("https://api.mesh.internal:8443/");
            command
        })
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
         ssl_verify_client on;\n    ssl_verify_depth 2;\n    ssl_session_tickets off;\n    ssl_session_cache off;\n\
         location / {{ return 200 'hello $ssl_client_s_dn\\n'; }}\n  }}\n}}\n"
    );
    std::fs::write(&path, config).unwrap();
    path
}

#[test]
fn nginx_serves_mtls_and_refuses_who_is_revoked() {
    fleet_test("services::nginx_serves_mtls_and_refuses_who_is_revoked", || {
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
            ],
        );
        assert!(seen.stdout.contains("Verify return code: 0 (ok)"), "{seen}");

        let revoked =
            service.fleet.controller(&["cert", "revoke", "web.alpha.mesh.internal", "--wait", "-o", "json"]);
        assert_eq!(revoked.ok().json()["changed"], true);
        service.until_answered("400");
    });
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
