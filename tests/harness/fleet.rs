use std::{
    collections::BTreeMap,
    net::IpAddr,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use ipnet::IpNet;
use mesh_lab::{
    Host, Lab, Processes,
    testing::{Privilege, isolated},
    wait_for, wait_until,
};
use tempfile::TempDir;

use crate::{DEADLINE, Ran, binary, run};

/// Name of the controller's host and of its process.
pub const CONTROLLER: &str = "ctl";
const PASSPHRASE: &str = "correct horse battery staple\n";

/// Runs `body` as the test called `name` (its path within the suite) in namespaces of its own.
pub fn fleet_test(name: &str, body: impl FnOnce()) {
    isolated(name, Privilege::Current, body);
}

/// A controller and nodes, each a real process on its own host of a private network.
#[derive(Debug)]
pub struct Fleet {
    // Ends before the network and the folder it lives in.
    pub processes: Processes,
    pub lab: Lab,
    folder: TempDir,
    hosts: u8,
    known: BTreeMap<String, (IpAddr, IpAddr)>,
}

impl Fleet {
    /// A running controller of domain `mesh.internal` and no nodes.
    pub fn new() -> Self {
        let mut fleet = Self::without_controller();
        fleet.init_controller();
        fleet.start_controller();
        fleet
    }

    /// A controller host on which nothing was made yet.
    pub fn without_controller() -> Self {
        let folder = tempfile::Builder::new().prefix("mesh-test-").tempdir().expect("a folder under /tmp");
        let processes = Processes::new(folder.path().join("logs")).expect("the log folder");
        let mut fleet =
            Self { processes, lab: Lab::new().expect("a lab"), folder, hosts: 0, known: BTreeMap::new() };
        fleet.add_host(CONTROLLER);
        fleet
    }

    /// A controller and these nodes, enrolled, all of them connected to one another.
    pub fn with_nodes(names: &[&str]) -> Self {
        Self::with_nodes_and(names, &[])
    }

    /// The same below a controller that was made with these arguments.
    pub fn with_nodes_and(names: &[&str], init: &[&str]) -> Self {
        let mut fleet = Self::without_controller();
        fleet.init_controller_with(init);
        fleet.start_controller();
        for name in names {
            fleet.add_host(name);
            fleet.start_node(name);
        }
        for name in names {
            fleet.enroll(name, &[]);
        }
        fleet.wait_meshed(names);
        fleet
    }

    pub fn add_host(&mut self, name: &str) -> Host {
        self.hosts += 1;
        self.add_host_at(name, &Lab::underlay(self.hosts))
    }

    /// A host with these underlay addresses.
    pub fn add_host_at(&mut self, name: &str, addresses: &[IpNet]) -> Host {
        let host = self.lab.add_host(name, addresses).expect("a host");
        std::fs::create_dir_all(self.path(name)).expect("the host's folder");
        host
    }

    pub fn host(&self, name: &str) -> &Host {
        self.lab.host(name).unwrap_or_else(|| panic!("no host {name}"))
    }

    /// The folder that stands for the disk of host `name`.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// State directory of the role on host `name`.
    pub fn state(&self, name: &str) -> PathBuf {
        self.path(name).join("state")
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.path(name).join("meshd.sock")
    }

    pub fn passphrase_file(&self) -> PathBuf {
        self.path(CONTROLLER).join("passphrase")
    }

    /// `program ARGS` on host `name`, not started yet.
    pub fn command(&self, name: &str, program: impl AsRef<Path>, args: &[&str]) -> Command {
        let mut command = self.host(name).command(program.as_ref());
        command.args(args).env_remove("MESH_CONTROLLER").env("HOME", self.path(name));
        command
    }

    /// Runs any program on host `name`.
    pub fn on(&self, name: &str, program: &str, args: &[&str]) -> Ran {
        run(self.command(name, program, args))
    }

    pub fn controller_url(&self) -> String {
        let address = self.host(CONTROLLER).ipv4().expect("the controller has an IPv4 address");
        format!("{address}:7443")
    }

    pub fn init_controller(&self) -> Ran {
        self.init_controller_with(&[])
    }

    /// `meshd controller init` with more arguments.
    pub fn init_controller_with(&self, args: &[&str]) -> Ran {
        std::fs::write(self.passphrase_file(), PASSPHRASE).expect("the passphrase file");
        self.meshd_controller(&[&["init", "--domain", "mesh.internal"], args].concat()).ok()
    }

    /// `meshd controller VERB …` on the controller's host, to its end.
    pub fn meshd_controller(&self, args: &[&str]) -> Ran {
        run(self.controller_command(args))
    }

    fn controller_command(&self, args: &[&str]) -> Command {
        let mut command = self.command(CONTROLLER, binary("meshd"), &["controller"]);
        command.args(args).arg("--state-dir").arg(self.state(CONTROLLER));
        command.arg("--advertise").arg(self.controller_url());
        command.arg("--passphrase-file").arg(self.passphrase_file());
        command
    }

    /// `meshd controller run`, not started yet.
    pub fn controller_run_command(&self) -> Command {
        let mut command = self.controller_command(&["run"]);
        command.arg("--socket").arg(self.socket(CONTROLLER));
        command
    }

    pub fn start_controller(&mut self) {
        self.start_controller_with(&[]);
    }

    /// Starts the controller with environment variables set, and waits until it answers.
    pub fn start_controller_with(&mut self, environment: &[(&str, &str)]) {
        let mut command = self.controller_run_command();
        command.envs(environment.iter().copied());
        self.processes.spawn(CONTROLLER, command).expect("the controller starts");
        self.until("the controller answers", |fleet| fleet.controller(&["ca", "show"]).code == 0);
    }

    /// Starts `meshd node run` on host `name` and waits for its socket.
    pub fn start_node(&mut self, name: &str) {
        self.start_node_with(name, &[], &[]);
    }

    pub fn start_node_with(&mut self, name: &str, arguments: &[&str], environment: &[(&str, &str)]) {
        let command = self.node_command(name, arguments, environment);
        self.processes.spawn(name, command).expect("the node starts");
        let node = name.to_owned();
        self.until(&format!("node {name} answers on its socket"), move |fleet| {
            fleet.meshctl(&node, &["status", "-o", "json"]).code == 0
        });
    }

    /// `meshd node run` on host `name`, not started yet.
    pub fn node_command(&self, name: &str, arguments: &[&str], environment: &[(&str, &str)]) -> Command {
        let mut command = self.command(name, binary("meshd"), &["node", "run"]);
        command.arg("--state-dir").arg(self.state(name)).arg("--socket").arg(self.socket(name));
        command.arg("--certs-dir").arg(self.path(name).join("certs.d"));
        command.args(arguments).envs(environment.iter().copied());
        command
    }

    /// `meshctl ARGS` on host `name`, talking to that host's daemon.
    pub fn meshctl(&self, name: &str, args: &[&str]) -> Ran {
        run(self.meshctl_command(name, args))
    }

    pub fn meshctl_command(&self, name: &str, args: &[&str]) -> Command {
        let mut command = self.command(name, binary("meshctl"), &[]);
        if name == CONTROLLER {
            command.arg("--controller").arg(format!("unix:{}", self.socket(CONTROLLER).display()));
        } else {
            command.arg("--socket").arg(self.socket(name));
        }
        command.args(args);
        command
    }

    /// `meshctl ARGS` as root on the controller's host.
    pub fn controller(&self, args: &[&str]) -> Ran {
        self.meshctl(CONTROLLER, args)
    }

    /// A fresh join token.
    pub fn token(&self, args: &[&str]) -> String {
        let created = self.controller(&[&["token", "create"], args].concat()).ok();
        created.stdout.trim().to_owned()
    }

    /// Enrolls the node that runs on host `name` under that name.
    pub fn enroll(&self, name: &str, token_args: &[&str]) -> Ran {
        let token = self.token(token_args);
        self.meshctl(name, &["enroll", &token, "--name", name]).ok()
    }

    /// The overlay addresses of node `name`: IPv4, IPv6.
    pub fn addresses(&self, name: &str) -> (IpAddr, IpAddr) {
        let node = self.controller(&["node", "show", name, "-o", "json"]).ok().json();
        let address = |key: &str| {
            let text = node[key].as_str().unwrap_or_else(|| panic!("no {key} in {node}"));
            text.parse().unwrap_or_else(|_| panic!("{text} is an address"))
        };
        (address("ipv4"), address("ipv6"))
    }

    /// The overlay addresses of node `name` as they were when all was up, so that they can be asked
    /// for with the controller down.
    pub fn addresses_known(&self, name: &str) -> (IpAddr, IpAddr) {
        *self.known.get(name).unwrap_or_else(|| panic!("{name} was not part of the mesh"))
    }

    /// Whether one echo over the overlay comes back within a second.
    pub fn pings(&self, from: &str, to: IpAddr) -> bool {
        self.on(from, "ping", &["-n", "-c1", "-W1", &to.to_string()]).code == 0
    }

    /// Waits until each of `names` reaches each other over both families.
    pub fn wait_meshed(&mut self, names: &[&str]) {
        let addresses: Vec<_> = names.iter().map(|name| (*name, self.addresses(name))).collect();
        self.known.extend(addresses.iter().map(|(name, pair)| ((*name).to_owned(), *pair)));
        for from in names {
            for (to, (ipv4, ipv6)) in addresses.iter().filter(|(to, _)| to != from) {
                for address in [*ipv4, *ipv6] {
                    self.until(&format!("{from} reaches {to} at {address}"), |fleet| {
                        fleet.pings(from, address)
                    });
                }
            }
        }
    }

    /// Waits for `condition`; on failure the message carries the end of every log.
    ///
    /// # Panics
    /// If the condition does not hold within [`DEADLINE`].
    pub fn until(&mut self, what: &str, condition: impl FnMut(&Self) -> bool) {
        self.within(what, DEADLINE, condition);
    }

    /// Like [`until`](Self::until) with another deadline.
    ///
    /// # Panics
    /// If the condition does not hold within `deadline`.
    pub fn within(&mut self, what: &str, deadline: Duration, mut condition: impl FnMut(&Self) -> bool) {
        if let Err(error) = wait_until(what, deadline, || condition(self)) {
            panic!("{error}\n{}", self.processes.log_tails(40));
        }
    }

    /// Waits for a value; see [`until`](Self::until).
    ///
    /// # Panics
    /// If there is none within [`DEADLINE`].
    pub fn until_some<T>(&mut self, what: &str, mut attempt: impl FnMut(&Self) -> Option<T>) -> T {
        wait_for(what, DEADLINE, || attempt(self))
            .unwrap_or_else(|error| panic!("{error}\n{}", self.processes.log_tails(40)))
    }
}

impl Default for Fleet {
    fn default() -> Self {
        Self::new()
    }
}
