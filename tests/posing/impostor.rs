//! A server that shows a stolen certificate at the controller's address hears nothing.

use std::{
    io::{self, Read as _},
    net::{TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use mesh_tests::{CONTROLLER, Fleet, binary, fleet_test, run};
use rustls::{ServerConfig, ServerConnection};

use crate::{
    callers::log_in,
    credential::{Credential, DOMAIN},
};

/// What came in at the controller's address while the thief stood there.
#[derive(Debug, Default)]
struct Heard {
    connections: AtomicUsize,
    handshakes_done: AtomicUsize,
    /// Bytes after the handshake: what a client believed to say to its controller.
    application_bytes: AtomicUsize,
    stop: AtomicBool,
}

impl Heard {
    fn counts(&self) -> (usize, usize, usize) {
        let read = |count: &AtomicUsize| count.load(Ordering::SeqCst);
        (read(&self.connections), read(&self.handshakes_done), read(&self.application_bytes))
    }

    /// Speaks TLS with one client as long as it likes.
    fn serve(&self, mut tcp: TcpStream, config: Arc<ServerConfig>) -> io::Result<()> {
        self.connections.fetch_add(1, Ordering::SeqCst);
        tcp.set_nonblocking(false)?;
        tcp.set_read_timeout(Some(Duration::from_secs(5)))?;
        let mut tls = ServerConnection::new(config).map_err(io::Error::other)?;
        while tls.is_handshaking() {
            tls.complete_io(&mut tcp)?;
        }
        self.handshakes_done.fetch_add(1, Ordering::SeqCst);
        let mut stream = rustls::Stream::new(&mut tls, &mut tcp);
        let mut buffer = [0; 4096];
        loop {
            match stream.read(&mut buffer)? {
                0 => return Ok(()),
                count => _ = self.application_bytes.fetch_add(count, Ordering::SeqCst),
            }
        }
    }

    fn listen(&self, listener: &TcpListener, config: &Arc<ServerConfig>) {
        std::thread::scope(|scope| {
            while !self.stop.load(Ordering::SeqCst) {
                match listener.accept() {
                    Ok((tcp, _)) => {
                        let config = Arc::clone(config);
                        scope.spawn(move || self.serve(tcp, config));
                    }
                    // Not synchronisation: how soon the listener sees that it shall stop.
                    Err(_) => std::thread::sleep(Duration::from_millis(10)),
                }
            }
        });
    }
}

fn server_config(thief: &Credential) -> Arc<ServerConfig> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(thief.chain.clone(), thief.key.clone_key())
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(config)
}

/// Puts `thief` at the controller's address while `work` runs.
fn at_the_controllers_place(fleet: &mut Fleet, thief: &Credential, work: impl FnOnce(&mut Fleet, &Heard)) {
    let host = fleet.host(CONTROLLER).clone();
    let listener = host.run(|| TcpListener::bind("0.0.0.0:7443")).unwrap().expect("the port is free");
    listener.set_nonblocking(true).unwrap();
    let (heard, config) = (Heard::default(), server_config(thief));
    std::thread::scope(|scope| {
        let (heard, listener, config) = (&heard, &listener, &config);
        scope.spawn(move || heard.listen(listener, config));
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(fleet, heard)));
        heard.stop.store(true, Ordering::SeqCst);
        if let Err(panic) = outcome {
            std::panic::resume_unwind(panic);
        }
    });
}

#[test]
fn a_stolen_certificate_makes_no_controller() {
    fleet_test("impostor::a_stolen_certificate_makes_no_controller", || {
        let mut fleet = Fleet::with_nodes(&["alpha", "bravo"]);
        let out = fleet.path("bravo").join("tls");
        for profile in ["server", "peer"] {
            let (name, out) = (format!("{profile}.bravo.{DOMAIN}"), out.join(profile));
            let args = ["cert", "issue", &name, "--profile", profile, "--out", out.to_str().unwrap()];
            fleet.meshctl("bravo", &args).ok();
        }
        fleet.add_host("desk");
        log_in(&fleet, "desk", "alice", "admin");
        let join = fleet.token(&[]);
        let login = fleet.controller(&["operator", "add", "bob", "--role", "admin"]).ok().stdout;
        let login_file = fleet.path("desk").join("bob");
        std::fs::write(&login_file, login.trim()).unwrap();
        fleet.add_host("new");
        fleet.start_node("new");
        fleet.processes.stop(CONTROLLER).unwrap();

        let thieves = [
            ("a node's identity", Credential::of_node(&fleet, "bravo")),
            ("a server pair", Credential::of_pair(&out.join("server"))),
            ("a peer pair", Credential::of_pair(&out.join("peer"))),
        ];
        for (what, thief) in &thieves {
            at_the_controllers_place(&mut fleet, thief, |fleet, heard| {
                // A node that is enrolled dials again and again by itself.
                fleet.until("alpha dials its controller", |_| heard.counts().0 >= 2);
                // An operator with an identity, one with a token, a machine with a token.
                let url = fleet.controller_url();
                let mut list = fleet.command("desk", binary("meshctl"), &["--controller", &url]);
                list.args(["node", "ls", "--timeout", "10s"]);
                run(list).refused("E0204", 4);
                let mut login = fleet.command("desk", binary("meshctl"), &["login", &url, "--token-file"]);
                login.arg(&login_file).env("HOME", fleet.path("new"));
                let refused = run(login);
                assert!([4, 5].contains(&refused.code), "{what}: {refused}");
                let refused = fleet.meshctl("new", &["enroll", &join, "--name", "new", "--timeout", "10s"]);
                assert!([4, 5].contains(&refused.code), "{what}: {refused}");
                let (connections, done, bytes) = heard.counts();
                assert!(connections >= 5, "{what}: {connections} connections");
                assert_eq!((done, bytes), (0, 0), "{what} was believed");
            });
        }

        // The count does count: a client that believes everybody is heard.
        at_the_controllers_place(&mut fleet, &thieves[0].1, |fleet, heard| {
            let url = fleet.controller_url();
            let open =
                fleet.on("desk", "sh", &["-c", &format!("echo secret | openssl s_client -connect {url}")]);
            assert!(open.stdout.contains("BEGIN CERTIFICATE"), "{open}");
            fleet.until("the careless client is heard", |_| heard.counts().2 >= 7);
        });

        // Nothing was given away: both tokens still work, and alpha finds the real one.
        fleet.start_controller();
        fleet.meshctl("new", &["enroll", &join, "--name", "new"]).ok();
        let url = fleet.controller_url();
        let mut login = fleet.command("desk", binary("meshctl"), &["login", &url, "--token-file"]);
        login.arg(&login_file).env("HOME", fleet.path("new"));
        run(login).ok();
        fleet.wait_meshed(&["alpha", "new"]);
    });
}

/// Not over TLS but in the data: a node's own key does not open the local socket of another user.
#[test]
fn the_local_socket_serves_root_alone() {
    fleet_test("impostor::the_local_socket_serves_root_alone", || {
        let fleet = Fleet::with_nodes(&["alpha"]);
        // Without root there is no other user to be.
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        // Even with the file open to everybody, who speaks is asked of the kernel.
        for (host, folder) in [(CONTROLLER, fleet.path(CONTROLLER)), ("alpha", fleet.path("alpha"))] {
            let socket = folder.join("meshd.sock");
            let everywhere = |path: &std::path::Path, mode| {
                std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
            };
            everywhere(&socket, 0o666);
            everywhere(&folder, 0o755);
            everywhere(folder.parent().unwrap(), 0o755);
            let connect = format!(
                "import socket; s=socket.socket(socket.AF_UNIX); s.connect({:?}); s.settimeout(5)\n\
                 try: d=s.recv(9)\nexcept ConnectionResetError: d=b''\nprint(len(d))",
                socket.display().to_string()
            );
            let args =
                ["--reuid=65534", "--regid=65534", "--clear-groups", "/usr/bin/python3", "-c", &connect];
            let seen = fleet.on(host, "setpriv", &args).ok();
            assert_eq!(seen.stdout.trim(), "0", "a stranger was served on {host}: {seen}");
            let as_root = fleet.on(host, "/usr/bin/python3", &["-c", &connect]).ok();
            assert_eq!(as_root.stdout.trim(), "9", "root is not served on {host}: {as_root}");
        }
    });
}
