//! HAProxy and PostgreSQL as ends of mTLS on bravo, each with a pair of its own below bravo's name.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
};

use mesh_tests::{Fleet, Ran};

const HAPROXY: &str = "lb.bravo.mesh.internal";
const POSTGRES: &str = "db.bravo.mesh.internal";
/// The role in the database; with `clientcert=verify-full` it is the common name of the client's certificate.
const ROLE: &str = "web.alpha.mesh.internal";

/// Issues a pair on bravo in the folder `out`.
fn issue(fleet: &Fleet, name: &str, out: &str, args: &[&str]) -> PathBuf {
    let folder = fleet.path("bravo").join(out);
    let command = [&["cert", "issue", name, "--out", folder.to_str().unwrap()], args].concat();
    fleet.meshctl("bravo", &command).ok();
    folder
}

/// HAProxy with one file for key and chain, and our CRLs.
pub(crate) struct Haproxy {
    address: IpAddr,
}

impl Haproxy {
    pub(crate) fn start(fleet: &mut Fleet) -> Self {
        let pair = issue(fleet, HAPROXY, "lb", &["--combined"]);
        let folder = fleet.path("bravo");
        let (config, pid) = (folder.join("haproxy.cfg"), folder.join("haproxy.pid"));
        let text = format!(
            "global\n  ssl-default-bind-options ssl-min-ver TLSv1.2\ndefaults\n  mode http\n  timeout connect 5s\n\
             \x20 timeout client 5s\n  timeout server 5s\nfrontend tls\n  bind :8444 ssl crt {0}/combined.pem \
             ca-file {0}/ca.pem crl-file {0}/crl.pem verify required\n  http-request return status 200\n",
            pair.display()
        );
        std::fs::write(&config, text).unwrap();
        let haproxy = fleet.command(
            "bravo",
            "/usr/sbin/haproxy",
            &["-W", "-f", config.to_str().unwrap(), "-p", pid.to_str().unwrap()],
        );
        fleet.processes.spawn("haproxy", haproxy).unwrap();
        fleet.until("haproxy runs", |_| pid.exists());
        let reload = format!("kill -USR2 $(cat {})", pid.display());
        issue(fleet, HAPROXY, "lb", &["--combined", "--reload", &reload]);
        Self { address: fleet.addresses("bravo").0 }
    }

    /// The status of one request from alpha with a pair or none; `000` is a handshake that failed.
    pub(crate) fn request(&self, fleet: &Fleet, pair: &Path, shown: bool) -> Ran {
        let resolve = format!("{HAPROXY}:8444:{}", self.address);
        let url = format!("https://{HAPROXY}:8444/");
        let file = |name: &str| pair.join(name).display().to_string();
        let (ca, cert, key) = (file("ca.pem"), file("cert.pem"), file("key.pem"));
        let mut args = vec!["-sS", "--max-time", "5", "-o", "/dev/null", "-w", "%{http_code}"];
        args.extend(["--resolve", &resolve, "--cacert", &ca]);
        if shown {
            args.extend(["--cert", &cert, "--key", &key]);
        }
        args.push(&url);
        fleet.on("alpha", "curl", &args)
    }
}

/// PostgreSQL whose only way in is a certificate that names the role.
pub(crate) struct Postgres {
    address: IpAddr,
}

impl Postgres {
    /// `None` where we are root by name alone: PostgreSQL refuses to run as root, and there is nobody else.
    pub(crate) fn start(fleet: &mut Fleet) -> Option<Self> {
        let map = std::fs::read_to_string("/proc/self/uid_map").unwrap();
        if map.split_whitespace().nth(2) == Some("1") {
            eprintln!("PostgreSQL is left out: this user namespace has one user");
            return None;
        }
        let programs = programs();
        let program = |name: &str| programs.join(name).display().to_string();
        let data = fleet.path("bravo").join("pg");
        let text = data.display().to_string();
        // The server's user has to get to its files; everything that matters guards itself.
        fleet
            .on("bravo", "chmod", &["711", data.parent().and_then(Path::parent).unwrap().to_str().unwrap()])
            .ok();
        fleet.on("bravo", "install", &["-d", "-o", "postgres", "-g", "postgres", "-m", "700", &text]).ok();
        let as_postgres = ["--reuid=postgres", "--regid=postgres", "--clear-groups"];
        let initdb = program("initdb");
        let made = [initdb.as_str(), "-D", &text, "-U", ROLE, "-A", "reject", "--no-sync", "-E", "UTF8"];
        fleet.on("bravo", "setpriv", &[&as_postgres[..], &made].concat()).ok();
        let rule = "hostssl all all 0.0.0.0/0 cert clientcert=verify-full\n";
        std::fs::write(data.join("pg_hba.conf"), rule).unwrap();

        let owned = ["--owner", "postgres:postgres"];
        let pair = issue(fleet, POSTGRES, "db", &owned);
        let settings = format!(
            "listen_addresses = '*'\nport = 5432\nunix_socket_directories = ''\nfsync = off\nssl = on\n\
             ssl_cert_file = '{0}/cert.pem'\nssl_key_file = '{0}/key.pem'\nssl_ca_file = '{0}/ca.pem'\n\
             ssl_crl_file = '{0}/crl.pem'\n",
            pair.display()
        );
        std::fs::write(data.join("postgresql.auto.conf"), settings).unwrap();
        let postgres = program("postgres");
        let run = [&as_postgres[..], &[&postgres, "-D", &text]].concat();
        let server = fleet.command("bravo", "setpriv", &run);
        fleet.processes.spawn("postgres", server).unwrap();
        let pid = data.join("postmaster.pid");
        fleet.until("postgres is ready", |_| {
            std::fs::read_to_string(&pid).is_ok_and(|text| text.contains("ready"))
        });
        let reload = format!("kill -HUP $(head -1 {})", pid.display());
        issue(fleet, POSTGRES, "db", &[&owned[..], &["--reload", &reload]].concat());
        Some(Self { address: fleet.addresses("bravo").0 })
    }

    /// One query from alpha as `role` with a pair or none.
    pub(crate) fn query(&self, fleet: &Fleet, pair: &Path, role: &str, shown: bool) -> Ran {
        let shown = if shown { pair } else { Path::new("/nonexistent") };
        let target = format!(
            "host={POSTGRES} hostaddr={} port=5432 user={role} dbname=postgres connect_timeout=5 sslmode=verify-full \
             sslrootcert={ca} sslcrl={crl} sslcert={cert} sslkey={key}",
            self.address,
            ca = pair.join("ca.pem").display(),
            crl = pair.join("crl.pem").display(),
            cert = shown.join("cert.pem").display(),
            key = shown.join("key.pem").display(),
        );
        fleet.on("alpha", "psql", &["-X", "-A", "-t", "-c", "select 40 + 2", &target])
    }

    /// The role that [`query`](Self::query) may take.
    pub(crate) fn role() -> &'static str {
        ROLE
    }
}

/// Where Debian puts the newest server's programs.
fn programs() -> PathBuf {
    let versions =
        std::fs::read_dir("/usr/lib/postgresql").expect("postgresql is installed by make deps-test");
    let newest = versions.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok()).max();
    PathBuf::from(format!("/usr/lib/postgresql/{}/bin", newest.expect("a version")))
}
