use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    os::unix::process::{CommandExt, ExitStatusExt},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use nix::{libc, sys::signal::Signal, unistd::Pid};

use crate::{LabError, sys, wait_for};

/// Between asking a process to end and ending it.
const TERMINATE_GRACE: Duration = Duration::from_secs(5);
/// For the kernel to hand over a process that was killed.
const KILL_GRACE: Duration = Duration::from_secs(5);

/// Child processes by name, each with a log file in one folder.
///
/// None outlives this value: on drop they are asked to end, then killed. If this process itself is
/// killed, the kernel kills them.
#[derive(Debug)]
pub struct Processes {
    folder: PathBuf,
    children: BTreeMap<String, Running>,
    spawner: Spawner,
}

#[derive(Debug)]
struct Running {
    child: Child,
    exit: Option<ExitStatus>,
}

impl Processes {
    /// Logs go to `folder/NAME.log`; the folder is made if need be.
    pub fn new(folder: impl Into<PathBuf>) -> Result<Self, LabError> {
        let folder = folder.into();
        fs::create_dir_all(&folder).map_err(|source| LabError::Log { path: folder.clone(), source })?;
        let spawner = Spawner::new()
            .map_err(|source| LabError::System { attempt: "start the spawning thread", source })?;
        Ok(Self { folder, children: BTreeMap::new(), spawner })
    }

    /// Starts `command` as `name`, with its output appended to the log and no input. A process of that
    /// name that still runs is stopped first.
    pub fn spawn(&mut self, name: &str, mut command: Command) -> Result<u32, LabError> {
        if name.is_empty() || name.contains('/') || name.starts_with('.') {
            return Err(LabError::ProcessName { name: name.to_owned() });
        }
        if self.children.contains_key(name) {
            self.stop(name)?;
        }
        let path = self.log_path(name);
        let log = || -> io::Result<(File, File)> {
            let file = fs::OpenOptions::new().create(true).append(true).open(&path)?;
            Ok((file.try_clone()?, file))
        };
        let (output, errors) = log().map_err(|source| LabError::Log { path: path.clone(), source })?;
        command.stdin(Stdio::null()).stdout(output).stderr(errors);
        let spawned = self.spawner.spawn(command);
        let child = spawned.map_err(|source| LabError::Spawn { name: name.to_owned(), source })?;
        let id = child.id();
        self.children.insert(name.to_owned(), Running { child, exit: None });
        Ok(id)
    }

    /// Process id of a process that was started, also after its end.
    pub fn id(&self, name: &str) -> Option<u32> {
        self.children.get(name).map(|running| running.child.id())
    }

    /// How the process ended; `None` while it runs.
    pub fn exit_status(&mut self, name: &str) -> Result<Option<ExitStatus>, LabError> {
        let running = self.running(name)?;
        running.poll().map_err(|source| LabError::Control { name: name.to_owned(), source })
    }

    pub fn is_running(&mut self, name: &str) -> bool {
        matches!(self.exit_status(name), Ok(None))
    }

    /// Sends `signal`; a process that has ended gets none.
    pub fn signal(&mut self, name: &str, signal: Signal) -> Result<(), LabError> {
        let sent = self.running(name)?.signal(signal);
        sent.map_err(|source| LabError::Control { name: name.to_owned(), source })
    }

    /// Waits until the process ends by itself.
    pub fn wait(&mut self, name: &str, deadline: Duration) -> Result<ExitStatus, LabError> {
        let running = self.running(name)?;
        wait_for(&format!("the end of process {name}"), deadline, || running.poll().ok().flatten())
    }

    /// Asks the process to end, and kills it if it does not within five seconds.
    pub fn stop(&mut self, name: &str) -> Result<ExitStatus, LabError> {
        let running = self.running(name)?;
        let ended = running.signal(Signal::SIGTERM).map(|()| running.wait(TERMINATE_GRACE));
        match ended {
            Ok(Some(status)) => Ok(status),
            _ => self.kill(name),
        }
    }

    /// Kills the process at once (SIGKILL), as a crash would.
    pub fn kill(&mut self, name: &str) -> Result<ExitStatus, LabError> {
        let running = self.running(name)?;
        running
            .signal(Signal::SIGKILL)
            .map_err(|source| LabError::Control { name: name.to_owned(), source })?;
        running.wait(KILL_GRACE).ok_or_else(|| LabError::Deadline {
            what: format!("the end of killed process {name}"),
            deadline: KILL_GRACE,
        })
    }

    /// The folder of the logs.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub fn log_path(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.log"))
    }

    /// All that the process has written, of all runs under that name; empty if nothing was.
    pub fn log(&self, name: &str) -> String {
        fs::read(self.log_path(name))
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// The last `lines` lines of the log, for the report of a failure.
    pub fn log_tail(&self, name: &str, lines: usize) -> String {
        let log = self.log(name);
        let all: Vec<&str> = log.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    /// The last `lines` lines of every log, each under the name of its process.
    pub fn log_tails(&self, lines: usize) -> String {
        self.children
            .keys()
            .map(|name| {
                format!("--- {name} ({})\n{}\n", self.log_path(name).display(), self.log_tail(name, lines))
            })
            .collect()
    }

    fn running(&mut self, name: &str) -> Result<&mut Running, LabError> {
        self.children.get_mut(name).ok_or_else(|| LabError::NoProcess { name: name.to_owned() })
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        // All are asked first, so that they end side by side.
        for running in self.children.values_mut() {
            let _ = running.signal(Signal::SIGTERM);
        }
        for running in self.children.values_mut() {
            if running.wait(TERMINATE_GRACE).is_none() {
                let _ = running.signal(Signal::SIGKILL);
                let _ = running.wait(KILL_GRACE);
            }
        }
    }
}

impl Running {
    fn poll(&mut self) -> io::Result<Option<ExitStatus>> {
        if self.exit.is_none() {
            self.exit = self.child.try_wait()?;
        }
        Ok(self.exit)
    }

    fn wait(&mut self, deadline: Duration) -> Option<ExitStatus> {
        wait_for("an end", deadline, || self.poll().ok().flatten()).ok()
    }

    /// The id cannot have passed to another process: we have not taken the child's end yet.
    fn signal(&mut self, signal: Signal) -> io::Result<()> {
        if self.poll()?.is_some() {
            return Ok(());
        }
        let id = libc::pid_t::try_from(self.child.id()).expect("the kernel's process ids fit pid_t");
        Ok(nix::sys::signal::kill(Pid::from_raw(id), signal)?)
    }
}

/// A thread that starts the children. The kernel's "signal me when my parent dies" means the
/// *thread* that forked, and callers' threads (a test, a runtime's pool) end too early.
#[derive(Debug)]
struct Spawner {
    requests: mpsc::Sender<(Command, mpsc::Sender<io::Result<Child>>)>,
}

impl Spawner {
    fn new() -> io::Result<Self> {
        let (requests, inbox) = mpsc::channel::<(Command, mpsc::Sender<io::Result<Child>>)>();
        thread::Builder::new().name("lab-spawner".to_owned()).spawn(move || {
            while let Ok((mut command, reply)) = inbox.recv() {
                let parent = nix::unistd::getpid().as_raw();
                // SAFETY: the hook makes two system calls and touches no memory but its own copy.
                unsafe { command.pre_exec(move || sys::die_with(parent)) };
                let _ = reply.send(command.spawn());
            }
        })?;
        Ok(Self { requests })
    }

    fn spawn(&self, command: Command) -> io::Result<Child> {
        let gone = || io::Error::other("the spawning thread is gone");
        let (reply, answer) = mpsc::channel();
        self.requests.send((command, reply)).map_err(|_| gone())?;
        answer.recv().map_err(|_| gone())?
    }
}

/// How a process ended, in words: `exit code 3`, `signal 9`.
pub(crate) fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "an unknown end".to_owned(),
    }
}
