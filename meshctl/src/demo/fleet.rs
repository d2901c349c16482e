//! The demo's machines, daemons and commands.

use std::{
    ffi::OsStr,
    fs,
    io::Write as _,
    net::{SocketAddr, UdpSocket},
    os::unix::{net::UnixStream, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use mesh_lab::{Host, Isolation, Lab, Processes, wait_until};
use serde_json::Value;

use super::{Broken, interrupt::Interrupt, screen::Screen};
use crate::client::{CONTROLLER_SOCKET, NODE_SOCKET};

pub(super) const CONTROLLER: &str = "controller";
const NAMES: [&str; 10] =
    ["alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliett"];
pub(super) const DOMAIN: &str = "mesh.internal";
/// A daemon has this long until it answers on its socket.
const START_LIMIT: Duration = Duration::from_secs(20);
/// Given to every `meshctl`, so that a daemon that hangs fails the step rather than the demo's user.
const COMMAND_LIMIT: &str = "20s";
/// A packet crosses the mesh in about a millisecond: one that is not there after this long does not come.
const DATAGRAM_LIMIT: Duration = Duration::from_millis(60);
const DATAGRAM_TRIES: usize = 5;

/// How a command ended.
#[derive(Debug)]
pub(super) struct Ran {
    pub(super) code: i32,
    pub(super) stdout: String,
    pub(super) stderr: String,
}

impl Ran {
    /// The JSON document on stdout.
    pub(super) fn json(&self) -> Result<Value, Broken> {
        serde_json::from_str(&self.stdout).map_err(|error| Broken::new(format!("no JSON came back: {error}")))
    }

    /// The first line that says why it failed.
    pub(super) fn complaint(&self) -> String {
        let lines = self.stderr.lines().chain(self.stdout.lines());
        let first: Vec<&str> = lines.map(str::trim).filter(|line| !line.is_empty()).take(3).collect();
        format!("exit {}: {}", self.code, first.join(" | "))
    }
}

/// One node of the demo.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub(super) name: &'static str,
    pub(super) host: Host,
    /// Known once it is enrolled.
    pub(super) ipv4: String,
}

pub(super) struct Fleet {
    /// Stopped first: fields drop in this order.
    processes: Processes,
    _lab: Lab,
    pub(super) controller: Host,
    pub(super) nodes: Vec<Node>,
    pub(super) screen: Screen,
    meshd: PathBuf,
    meshctl: PathBuf,
    folder: Folder,
    /// What later steps know from earlier ones.
    pub(super) memory: Memory,
    pub(super) interrupt: Interrupt,
    pub(super) user_namespace: bool,
}

#[derive(Debug, Default)]
pub(super) struct Memory {
    pub(super) client_serial: String,
    pub(super) server_serial: String,
}

/// Goes with the fleet, unless a failure keeps it.
struct Folder {
    path: PathBuf,
    temporary: Option<tempfile::TempDir>,
}

impl Fleet {
    pub(super) fn new(count: u8, screen: Screen, isolation: Isolation) -> Result<Self, Broken> {
        let meshctl = std::env::current_exe()
            .map_err(|error| Broken::new(format!("cannot find meshctl itself: {error}")))?;
        let meshd = find_meshd(&meshctl)?;
        let temporary = tempfile::Builder::new()
            .prefix("mesh-demo-")
            .tempdir()
            .map_err(|error| Broken::new(format!("cannot make a folder: {error}")))?;
        let folder = Folder { path: temporary.path().to_owned(), temporary: Some(temporary) };
        let mut lab = Lab::new()?;
        let controller = lab.add_host(CONTROLLER, &Lab::underlay(1))?;
        let mut nodes = Vec::new();
        for (name, number) in NAMES.into_iter().zip(2..).take(count.into()) {
            let host = lab.add_host(name, &Lab::underlay(number))?;
            nodes.push(Node { name, host, ipv4: String::new() });
        }
        let processes = Processes::new(folder.path.join("logs"))?;
        let interrupt = Interrupt::arm(folder.path.clone())?;
        let memory = Memory::default();
        Ok(Self {
            processes,
            _lab: lab,
            controller,
            nodes,
            screen,
            meshd,
            meshctl,
            folder,
            memory,
            interrupt,
            user_namespace: isolation.user_namespace,
        })
    }

    /// A path inside the demo's folder.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.path.join(name)
    }

    pub(super) fn meshctl_path(&self) -> &Path {
        &self.meshctl
    }

    pub(super) fn node(&self, name: &str) -> &Node {
        self.nodes
            .iter()
            .find(|node| node.name == name)
            .expect("the demo has at least alpha, bravo and charlie")
    }

    /// Runs a command to its end on `host` and shows it.
    fn execute(&self, host: &Host, program: &Path, words: &[&str], input: &str) -> Result<Ran, Broken> {
        let name = program.file_name().and_then(OsStr::to_str).unwrap_or("meshctl");
        let shown: Vec<&str> = std::iter::once(name).chain(words.iter().copied()).collect();
        self.screen.command(host.name(), &shown);
        let mut command = self.command(host, program, words);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let failed = |error: std::io::Error| Broken::new(format!("cannot run {name}: {error}"));
        let mut child = command.spawn().map_err(failed)?;
        let mut stdin = child.stdin.take().expect("stdin was piped");
        // A command that reads nothing may be gone already; what counts is how it ended.
        let _ = stdin.write_all(input.as_bytes());
        drop(stdin);
        let output = child.wait_with_output().map_err(failed)?;
        Ok(Ran {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    fn command(&self, host: &Host, program: &Path, words: &[&str]) -> Command {
        let mut command = host.command(program);
        for (name, _) in std::env::vars_os() {
            // The caller's own settings must not steer the demo; a fault to be tried is meant for it.
            if name.as_encoded_bytes().starts_with(b"MESH_") && name != "MESH_FAILPOINT" {
                command.env_remove(name);
            }
        }
        command.args(words).env("MESH_TIMEOUT", COMMAND_LIMIT).env("MESH_CONTEXT", self.path("no-context"));
        command.env("NO_COLOR", "1").env_remove("CREDENTIALS_DIRECTORY").current_dir(&self.folder.path);
        // Ctrl-C is for the demo, which ends the others.
        command.process_group(0);
        command
    }

    /// Runs `meshctl` on `host`, however it ends.
    pub(super) fn try_meshctl(&self, host: &Host, words: &[&str]) -> Result<Ran, Broken> {
        self.execute(host, &self.meshctl, words, "")
    }

    /// Runs `meshctl` on `host`; it must end well.
    pub(super) fn meshctl(&self, host: &Host, words: &[&str]) -> Result<Ran, Broken> {
        self.meshctl_with(host, words, "")
    }

    /// The same with something on its stdin.
    pub(super) fn meshctl_with(&self, host: &Host, words: &[&str], input: &str) -> Result<Ran, Broken> {
        must(self.execute(host, &self.meshctl, words, input)?, &format!("meshctl {}", words.join(" ")))
    }

    /// Runs `meshd` to its end, for `controller init`.
    pub(super) fn meshd(&self, host: &Host, words: &[&str]) -> Result<Ran, Broken> {
        must(self.execute(host, &self.meshd, words, "")?, &format!("meshd {}", words.join(" ")))
    }

    /// Starts `meshd` as a daemon called like its host and waits until it answers on its socket.
    pub(super) fn start_meshd(&mut self, host: &Host, words: &[&str]) -> Result<(), Broken> {
        let shown: Vec<&str> = std::iter::once("meshd").chain(words.iter().copied()).collect();
        self.screen.command(host.name(), &shown);
        let mut command = self.command(host, &self.meshd, words);
        command.env_remove("MESH_TIMEOUT");
        self.processes.spawn(host.name(), command)?;
        Ok(())
    }

    /// Waits until the daemon of `host` takes connections.
    pub(super) fn wait_ready(&mut self, host: &Host) -> Result<(), Broken> {
        let name = host.name();
        let socket = if name == CONTROLLER { CONTROLLER_SOCKET } else { NODE_SOCKET };
        let mut ended = None;
        let ready = wait_until(&format!("the start of {name}"), START_LIMIT, || {
            ended = self.processes.exit_status(name).ok().flatten();
            ended.is_some() || host.run(|| UnixStream::connect(socket).is_ok()).unwrap_or(false)
        });
        match ended {
            Some(status) => Err(Broken::new(format!(
                "meshd on {name} ended at once: {status}; {}",
                self.processes.log_tail(name, 3)
            ))),
            None => Ok(ready?),
        }
    }

    /// Starts a background `meshctl` (the HTTPS server) under a name of its own.
    pub(super) fn start_meshctl(&mut self, name: &str, host: &Host, words: &[&str]) -> Result<(), Broken> {
        let shown: Vec<&str> = std::iter::once("meshctl").chain(words.iter().copied()).collect();
        self.screen.command(host.name(), &shown);
        let command = self.command(host, &self.meshctl, words);
        self.processes.spawn(name, command)?;
        Ok(())
    }

    pub(super) fn processes(&mut self) -> &mut Processes {
        &mut self.processes
    }

    /// Whether plain UDP gets from one node's overlay address to another's: seen without any of our programs.
    pub(super) fn overlay_passes(&self, from: &Node, to: &Node) -> Result<bool, Broken> {
        let socket = |node: &Node| {
            let address = format!("{}:0", node.ipv4);
            let bound = node.host.run(move || UdpSocket::bind(address))?;
            let socket = bound.map_err(|error| {
                Broken::new(format!("cannot bind {} on {}: {error}", node.ipv4, node.name))
            })?;
            socket.set_read_timeout(Some(DATAGRAM_LIMIT)).map_err(|error| Broken::new(error.to_string()))?;
            Ok::<_, Broken>(socket)
        };
        let (sender, receiver) = (socket(from)?, socket(to)?);
        let target: SocketAddr = receiver.local_addr().map_err(|error| Broken::new(error.to_string()))?;
        let mut buffer = [0; 64];
        for _ in 0..DATAGRAM_TRIES {
            // A node without a peer for the address refuses to send: that is "does not pass".
            if sender.send_to(b"mesh demo", target).is_ok() && receiver.recv_from(&mut buffer).is_ok() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Leaves the folder behind for whoever looks into a failure.
    pub(super) fn keep(&mut self) -> PathBuf {
        self.interrupt.disarm();
        if let Some(temporary) = self.folder.temporary.take() {
            self.folder.path = temporary.keep();
        }
        self.folder.path.clone()
    }

    pub(super) fn log_tails(&self, lines: usize) -> String {
        self.processes.log_tails(lines)
    }
}

fn must(ran: Ran, what: &str) -> Result<Ran, Broken> {
    if ran.code == 0 { Ok(ran) } else { Err(Broken::new(format!("`{what}`: {}", ran.complaint()))) }
}

/// `$MESHD`, or the one beside this program.
fn find_meshd(meshctl: &Path) -> Result<PathBuf, Broken> {
    let path = std::env::var_os("MESHD").map_or_else(|| meshctl.with_file_name("meshd"), PathBuf::from);
    match fs::metadata(&path) {
        Ok(found) if found.is_file() => Ok(path),
        _ => Err(Broken::new(format!(
            "there is no meshd at {}; build it, or name it with MESHD",
            path.display()
        ))),
    }
}
