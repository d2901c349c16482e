//! Bad input gets a clear error with its stable code, its exit code and a next step, and nothing is lost.

use std::path::PathBuf;

use mesh_tests::{CONTROLLER, Fleet, Ran, fleet_test, move_clock, run};

#[test]
fn of_tokens_and_names() {
    fleet_test("bad_input::of_tokens_and_names", || {
        let mut fleet = Fleet::with_nodes(&["alpha"]);
        fleet.add_host("web-1");
        fleet.start_node("web-1");
        let enroll = |fleet: &Fleet, token: &str, name: &str| {
            fleet.meshctl("web-1", &["enroll", token, &format!("--name={name}"), "--no-wait"])
        };

        enroll(&fleet, "not-a-token", "web-1").refused("E0401", 4);
        let good = fleet.token(&[]);
        // One letter of the secret, which stands before the kind and the trust domain.
        let at = good.len() - 40;
        let other = if &good[at..=at] == "A" { "B" } else { "A" };
        let wrong = format!("{}{other}{}", &good[..at], &good[at + 1..]);
        let refused = enroll(&fleet, &wrong, "web-1");
        refused.refused("E0401", 4);

        for (name, error, exit) in [
            ("alpha", "E0502", 7),
            ("controller", "E0503", 4),
            ("localhost", "E0503", 4),
            ("Web_1", "E0501", 2),
            ("-web", "E0501", 2),
            ("*", "E0501", 2),
        ] {
            enroll(&fleet, &good, name).refused(error, exit);
        }
        let bound = fleet.token(&["--name", "web-7"]);
        enroll(&fleet, &bound, "web-1").refused("E0405", 4);

        // None of these refusals has used the token up.
        enroll(&fleet, &good, "web-1").ok();
        fleet.meshctl("web-1", &["enroll", &good]).ok(); // twice: nothing to do
        let other = fleet.token(&[]);
        fleet.meshctl("web-1", &["enroll", &other, "--name", "web-2"]).refused("E0410", 7);

        fleet.add_host("web-2");
        fleet.start_node("web-2");
        fleet.meshctl("web-2", &["enroll", &good, "--name", "web-2"]).refused("E0403", 4);

        let short = fleet.token(&["--ttl", "1s"]);
        fleet.until("the token has expired", |fleet| {
            let listed = fleet.controller(&["token", "ls", "-o", "json"]).json();
            listed["items"].as_array().unwrap().iter().any(|token| token["state"] == "expired")
        });
        fleet.meshctl("web-2", &["enroll", &short, "--name", "web-2"]).refused("E0402", 4);
    });
}

/// Files of certificate requests, made by openssl, each wrong in one way.
struct Requests {
    folder: PathBuf,
}

impl Requests {
    fn make(&self, fleet: &Fleet, file: &str, key: &[&str], extra: &[&str]) -> String {
        let (request, key_file) = (self.folder.join(file), self.folder.join(format!("{file}.key")));
        let mut args = vec!["req", "-new", "-nodes", "-subj", "/", "-keyout", key_file.to_str().unwrap()];
        args.extend(["-out", request.to_str().unwrap(), "-newkey"]);
        args.extend_from_slice(key);
        args.extend_from_slice(extra);
        fleet.on(CONTROLLER, "openssl", &args).ok();
        request.display().to_string()
    }
}

#[test]
fn of_certificate_requests() {
    fleet_test("bad_input::of_certificate_requests", || {
        let fleet = Fleet::with_nodes(&["alpha"]);
        let requests = Requests { folder: fleet.path(CONTROLLER) };
        let p256 = ["ec", "-pkeyopt", "ec_paramgen_curve:P-256"];
        let sign = |name: &str, request: &str| -> Ran {
            fleet.controller(&["cert", "issue", name, "--csr", request, "--profile", "server"])
        };
        let good = requests.make(&fleet, "good", &p256, &[]);

        for (name, error, exit) in [
            ("alpha.mesh.internal", "E0502", 7),
            ("x.alpha.mesh.internal", "E0502", 7),
            ("ca.mesh.internal", "E0503", 4),
            ("*.mesh.internal", "E0506", 2),
            ("www.example.com", "E0504", 4),
            ("under_score.mesh.internal", "E0501", 2),
        ] {
            sign(name, &good).refused(error, exit);
        }

        let weak = requests.make(&fleet, "weak", &["rsa:1024"], &[]);
        sign("svc.mesh.internal", &weak).refused("E0512", 2);
        let ca = requests.make(&fleet, "ca", &p256, &["-addext", "basicConstraints=critical,CA:TRUE"]);
        sign("svc.mesh.internal", &ca).refused("E0514", 2);
        let foreign =
            requests.make(&fleet, "foreign", &p256, &["-addext", "subjectAltName=DNS:evil.example.com"]);
        sign("svc.mesh.internal", &foreign).refused("E0513", 2);

        let der = requests.folder.join("forged.der");
        fleet
            .on(
                CONTROLLER,
                "openssl",
                &["req", "-in", &good, "-outform", "DER", "-out", der.to_str().unwrap()],
            )
            .ok();
        let mut bytes = std::fs::read(&der).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&der, bytes).unwrap();
        sign("svc.mesh.internal", der.to_str().unwrap()).refused("E0511", 2);

        let huge = requests.folder.join("huge");
        std::fs::write(&huge, vec![b'A'; 5 << 20]).unwrap();
        sign("svc.mesh.internal", huge.to_str().unwrap()).refused("E0515", 2);
        std::fs::write(&huge, "no request at all").unwrap();
        sign("svc.mesh.internal", huge.to_str().unwrap()).refused("E0510", 2);

        // The good request was not spoiled by its bad company.
        sign("svc.mesh.internal", &good).ok();

        // A node may only have its own names.
        let out = fleet.path("alpha").join("tls");
        fleet
            .meshctl("alpha", &["cert", "issue", "db.mesh.internal", "--out", out.to_str().unwrap()])
            .refused("E0505", 4);
        std::fs::create_dir_all(&out).unwrap();
        std::fs::write(out.join("mine"), "precious").unwrap();
        fleet
            .meshctl("alpha", &["cert", "issue", "x.alpha.mesh.internal", "--out", out.to_str().unwrap()])
            .refused("E0522", 7);
        assert_eq!(std::fs::read_to_string(out.join("mine")).unwrap(), "precious");
    });
}

#[test]
fn of_revocations_and_unknown_things() {
    fleet_test("bad_input::of_revocations_and_unknown_things", || {
        let fleet = Fleet::with_nodes(&["alpha"]);
        fleet.controller(&["node", "show", "nobody"]).refused("E0601", 6);
        fleet.controller(&["node", "revoke", "nobody"]).refused("E0601", 6);
        fleet.controller(&["cert", "revoke", "00112233445566778899aabbccddeeff"]).refused("E0520", 6);
        fleet.controller(&["cert", "revoke", "nothing.mesh.internal"]).refused("E0520", 6);
        // A node's identity is not a service certificate.
        fleet.controller(&["cert", "revoke", "alpha.mesh.internal"]).refused("E0521", 7);
        for args in [
            &["frobnicate"][..],
            &["node", "ls", "--frob"],
            &["node", "revoke"],
            &["token", "create", "--ttl", "soon"],
        ] {
            let ran = fleet.controller(args).exits(2);
            assert!(ran.stderr.contains("error"), "{ran}");
        }
        fleet.controller(&["node", "revoke", "alpha", "--reason", "boredom"]).exits(2);

        let policy = fleet.path(CONTROLLER).join("policy.toml");
        std::fs::write(&policy, "[[allow]]\nfrom = [\"tag:web\"]\n").unwrap();
        fleet.controller(&["policy", "apply", policy.to_str().unwrap()]).refused("E0701", 2);
        std::fs::write(&policy, "this is not toml").unwrap();
        fleet.controller(&["policy", "check", policy.to_str().unwrap()]).refused("E0701", 2);
        // The old policy stays.
        assert!(fleet.controller(&["policy", "show"]).ok().stdout.contains("[[allow]]"));
    });
}

#[test]
fn of_the_controllers_own_machine() {
    fleet_test("bad_input::of_the_controllers_own_machine", || {
        let mut fleet = Fleet::new();
        // In use, both the folder and the port.
        fleet.meshd_controller(&["run"]).refused("E0101", 7);
        let init = ["init", "--domain", "mesh.internal"];
        fleet.meshd_controller(&init).refused("E0107", 7);
        for key_type in ["rsa-4096", "p521", ""] {
            let typed = [&init[..], &["--key-type", key_type]].concat();
            assert!(fleet.meshd_controller(&typed).refused("E0902", 2).stderr.contains("--key-type"));
        }
        fleet.processes.stop(CONTROLLER).unwrap();
        let address = fleet.controller_url();
        let busy =
            fleet.host(CONTROLLER).run(|| std::net::TcpListener::bind("0.0.0.0:7443")).unwrap().unwrap();
        fleet.meshd_controller(&["run", "--listen", "0.0.0.0:7443"]).refused("E0110", 7);
        drop(busy);

        std::fs::write(fleet.passphrase_file(), "wrong\n").unwrap();
        fleet.meshd_controller(&["run"]).refused("E0115", 4);
        std::fs::remove_file(fleet.passphrase_file()).unwrap();
        fleet.meshd_controller(&["run"]).refused("E0114", 2);

        // A folder that others can read, and one that cannot be written.
        let state = fleet.state(CONTROLLER);
        let mode = |mode| {
            std::fs::set_permissions(&state, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap()
        };
        std::fs::write(fleet.passphrase_file(), "correct horse battery staple\n").unwrap();
        mode(0o755);
        fleet.meshd_controller(&["run"]).refused("E0103", 1);
        mode(0o700);
        let path = state.to_str().unwrap();
        fleet.on(CONTROLLER, "mount", &["--bind", path, path]).ok();
        fleet.on(CONTROLLER, "mount", &["-o", "remount,bind,ro", path]).ok();
        fleet.meshd_controller(&["run"]).refused("E0104", 1);
        fleet.on(CONTROLLER, "umount", &[path]).ok();

        // A controller that is down is exit 5, from every side.
        fleet.controller(&["node", "ls"]).refused("E0201", 5);
        let remote = fleet.command(
            CONTROLLER,
            mesh_tests::binary("meshctl"),
            &["--controller", &address, "node", "ls"],
        );
        assert_ne!(run(remote).code, 0);

        // After all of that it starts.
        fleet.start_controller();
    });
}

#[test]
fn of_a_full_disk() {
    fleet_test("bad_input::of_a_full_disk", || {
        let fleet = Fleet::without_controller();
        std::fs::write(fleet.passphrase_file(), "correct horse battery staple\n").unwrap();
        let state = fleet.state(CONTROLLER);
        let parent = state.parent().unwrap().join("small");
        std::fs::create_dir_all(&parent).unwrap();
        fleet
            .on(CONTROLLER, "mount", &["-t", "tmpfs", "-o", "size=16k", "tmpfs", parent.to_str().unwrap()])
            .ok();
        let target = parent.join("state");
        let mut command = fleet.command(CONTROLLER, mesh_tests::binary("meshd"), &["controller", "init"]);
        command.args(["--domain", "mesh.internal", "--passphrase-file"]).arg(fleet.passphrase_file());
        command.arg("--state-dir").arg(&target);
        run(command).refused("E0116", 1);
        let left = fleet.on(CONTROLLER, "ls", &["-A", parent.to_str().unwrap()]).ok();
        assert_eq!(left.stdout, "", "a failed init leaves nothing behind");
    });
}

#[test]
fn of_the_nodes_own_machine() {
    fleet_test("bad_input::of_the_nodes_own_machine", || {
        let mut fleet = Fleet::new();
        fleet.add_host("web-1");
        fleet.start_node("web-1");
        fleet.enroll("web-1", &[]);

        run(fleet.node_command("web-1", &[], &[])).refused("E0101", 7);
        fleet.processes.stop("web-1").unwrap();
        fleet.meshctl("web-1", &["status"]).refused("E0202", 5);

        // No TUN device. The host's own mount namespace hides it.
        fleet.on("web-1", "mount", &["-t", "tmpfs", "tmpfs", "/dev/net"]).ok();
        run(fleet.node_command("web-1", &[], &[])).refused("E0111", 1);
        fleet.on("web-1", "umount", &["/dev/net"]).ok();

        // No rights: root without its capabilities.
        let daemon = fleet.node_command("web-1", &[], &[]);
        let mut powerless = fleet.command("web-1", "setpriv", &["--bounding-set=-all", "--inh-caps=-all"]);
        powerless.arg(daemon.get_program()).args(daemon.get_args());
        run(powerless).refused("E0112", 1);

        // Keys that others can read.
        let state = fleet.state("web-1");
        std::fs::set_permissions(&state, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        run(fleet.node_command("web-1", &[], &[])).refused("E0103", 1);
        std::fs::set_permissions(&state, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
        fleet.start_node("web-1");

        // The controller is away while a node enrolls.
        let token = fleet.token(&[]);
        fleet.add_host("web-2");
        fleet.start_node("web-2");
        fleet.processes.stop(CONTROLLER).unwrap();
        fleet.meshctl("web-2", &["enroll", &token, "--timeout", "3s"]).refused("E0201", 5);
        fleet.start_controller();
        fleet.meshctl("web-2", &["enroll", &token]).ok();
    });
}

#[test]
fn of_a_clock_that_is_an_hour_off() {
    fleet_test("bad_input::of_a_clock_that_is_an_hour_off", || {
        let mut fleet = Fleet::new();
        let token = fleet.token(&[]);
        for (name, offset) in [("late", "-1h"), ("early", "+1h")] {
            fleet.add_host(name);
            let mut daemon = fleet.node_command(name, &[], &[]);
            move_clock(&mut daemon, offset);
            fleet.processes.spawn(name, daemon).unwrap();
            fleet.until("the daemon answers", |fleet| {
                fleet.meshctl(name, &["status", "-o", "json"]).code == 0
            });
            let refused = fleet.meshctl(name, &["enroll", &token, "--name", name]).refused("E0117", 1);
            assert!(refused.stderr.contains("set this machine's clock"), "{refused}");
        }
        // The token is intact.
        fleet.add_host("good");
        fleet.start_node("good");
        fleet.meshctl("good", &["enroll", &token, "--name", "good"]).ok();
    });
}
