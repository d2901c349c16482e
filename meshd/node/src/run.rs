//! The role from start to end: wait for an identity, live with it, forget it when told to.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mesh_proto::v1::ErrorCode;
use mesh_runtime::{Backoff, SystemClock};
use tokio::sync::{Mutex, Notify, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::clock::ControllerClock;
use crate::config::RunConfig;
use crate::failure::Failure;
use crate::findings::Findings;
use crate::identity::Identities;
use crate::join::{Joiner, Progress, Token};
use crate::limits::{RECONNECT_FIRST, RECONNECT_LONGEST, TOKEN_CHARS_MAX};
use crate::local::LocalServer;
use crate::session::{Running, Session};
use crate::state::{Identity, StateDir};

/// What all parts of one node share.
pub(crate) struct Node {
    pub(crate) config: RunConfig,
    pub(crate) state: StateDir,
    pub(crate) clock: ControllerClock,
    pub(crate) findings: Findings,
    /// The life with an identity; `None` before enrollment and after leaving.
    pub(crate) session: watch::Sender<Option<Arc<Session>>>,
    /// Why the life with a new identity could not begin; the process ends with it.
    pub(crate) broken: watch::Sender<Option<Failure>>,
    /// Held by whoever enrolls.
    pub(crate) enrolling: Mutex<()>,
    /// A person enrolls: what goes on by itself lets go.
    pub(crate) attended: Notify,
    /// An identity has been stored.
    pub(crate) enrolled: Notify,
    /// Asks the supervisor to leave the mesh.
    pub(crate) leave: mpsc::Sender<oneshot::Sender<Result<(), Failure>>>,
}

/// How long a start from disk may take before a caller is told that it has not ended.
const START_TIMEOUT: Duration = Duration::from_secs(10);

impl Node {
    /// The life with an identity; waits for it while an identity is on disk and the overlay is coming up.
    ///
    /// # Errors
    /// [`ErrorCode::NotEnrolled`].
    pub(crate) async fn session(&self) -> Result<Arc<Session>, Failure> {
        let mut session = self.session.subscribe();
        let has_identity = self.state.identity().is_ok_and(|identity| identity.is_some());
        if has_identity && session.borrow().is_none() {
            // Past the limit the answer below is given; the sender lives as long as the node.
            let _ = tokio::time::timeout(START_TIMEOUT, session.wait_for(Option::is_some)).await;
        }
        session.borrow().clone().ok_or_else(|| {
            Failure::new(
                ErrorCode::NotEnrolled,
                "this machine is not enrolled in a mesh",
                "enroll it: `meshctl enroll TOKEN`",
            )
        })
    }
}

/// Runs the node until `shutdown` is cancelled. Must be called inside a multi-threaded tokio runtime.
///
/// # Errors
/// [`Failure`] with code, reason, next step and exit code: the state folder cannot be used, the socket
/// cannot be opened, the overlay cannot be brought up, or the enrollment that `token_file` asks for was
/// refused.
pub async fn run(config: RunConfig, shutdown: CancellationToken) -> Result<(), Failure> {
    let state = StateDir::open(&config.state_dir)?;
    let clock = ControllerClock::new(Arc::new(SystemClock), state.clock()?.offset_secs);
    check_tun()?;
    let (leave, leave_requests) = mpsc::channel(1);
    let node = Arc::new(Node {
        config,
        state,
        clock,
        findings: Findings::default(),
        session: watch::Sender::new(None),
        broken: watch::Sender::new(None),
        enrolling: Mutex::new(()),
        attended: Notify::new(),
        enrolled: Notify::new(),
        leave,
    });
    let local = LocalServer::open(node.clone())?;
    let served = tokio::spawn(local.serve(shutdown.child_token()));
    tracing::info!(state = %node.state.path().display(), socket = %node.config.socket.display(), "node runs");
    let result = supervise(&node, leave_requests, &shutdown).await;
    if let Err(failure) = &result {
        node.broken.send_replace(Some(failure.clone()));
    }
    shutdown.cancel();
    // The last answers go out before the process ends.
    if let Err(error) = served.await {
        tracing::warn!(%error, "local socket ended badly");
    }
    result
}

async fn supervise(
    node: &Arc<Node>,
    mut leave_requests: mpsc::Receiver<oneshot::Sender<Result<(), Failure>>>,
    shutdown: &CancellationToken,
) -> Result<(), Failure> {
    loop {
        let identities = match Identities::load(&node.state, &node.clock, &node.findings)? {
            Some(identities) => identities,
            None => {
                tokio::select! {
                    () = shutdown.cancelled() => return Ok(()),
                    () = node.enrolled.notified() => {}
                    result = enroll_unattended(node) => result?,
                    Some(reply) = leave_requests.recv() => {
                        // Whoever asked may be gone.
                        let _ = reply.send(Ok(()));
                    }
                }
                continue;
            }
        };
        let mut running = Running::start(node, Arc::new(identities)).await?;
        node.session.send_replace(Some(running.session.clone()));
        tokio::select! {
            () = shutdown.cancelled() => {
                node.session.send_replace(None);
                running.stop(false).await;
                return Ok(());
            }
            ended = running.broken() => {
                node.session.send_replace(None);
                ended?;
                running.let_go().await;
            }
            Some(reply) = leave_requests.recv() => {
                node.session.send_replace(None);
                running.stop(true).await;
                let forgotten = node.state.forget_everything().map_err(Failure::from);
                node.findings.clear_others("", &[]);
                // Whoever asked may be gone.
                let _ = reply.send(forgotten.clone());
                forgotten?;
            }
        }
    }
}

/// Enrolls with the token file, or goes on with a request that a crash interrupted. Without either it waits
/// for ever.
async fn enroll_unattended(node: &Node) -> Result<(), Failure> {
    let joiner = Joiner::new(node.state.clone(), node.clock.clone());
    let mut backoff = Backoff::new(RECONNECT_FIRST, RECONNECT_LONGEST);
    loop {
        let attempt = async {
            let _guard = node.enrolling.lock().await;
            // A person may have been here since the last try.
            if node.state.identity()?.is_some() {
                return Ok(true);
            }
            let enrollment = match &node.config.token_file {
                Some(path) => {
                    let name = node.config.name.clone().map_or_else(host_name, Ok)?;
                    Some(joiner.prepare(&read_token(path)?, &name)?)
                }
                None => node.state.enrollment()?,
            };
            let Some(enrollment) = enrollment else { return Ok(false) };
            let (progress, _unheard) = mpsc::channel(1);
            let identity = joiner.enroll(&enrollment, &progress).await?;
            announce(&identity);
            Ok(true)
        };
        let outcome: Result<bool, Failure> = tokio::select! {
            outcome = attempt => outcome,
            // Enrolling can be cut off at any step; who types the command hears how it ends.
            () = node.attended.notified() => continue,
        };
        match outcome {
            Ok(true) => return Ok(()),
            Ok(false) => node.attended.notified().await,
            Err(failure) if failure.exit == 5 => tokio::select! {
                () = tokio::time::sleep(backoff.next_wait()) => {}
                () = node.attended.notified() => {}
            },
            Err(failure) if node.config.token_file.is_some() => return Err(failure),
            Err(failure) => {
                node.findings.raise_failure("enrollment", "the enrollment that was interrupted", &failure);
                node.attended.notified().await;
            }
        }
    }
}

/// Enrolls for `meshctl enroll`. Returns the identity once it is on disk.
pub(crate) async fn enroll_attended(
    node: &Node,
    token: &Token,
    name: &str,
    progress: &mpsc::Sender<Progress>,
) -> Result<Identity, Failure> {
    node.attended.notify_one();
    let _guard = node.enrolling.lock().await;
    if let Some(identity) = node.state.identity()? {
        return enrolled_already(&identity, token, Some(name)).map(|()| identity);
    }
    let joiner = Joiner::new(node.state.clone(), node.clock.clone());
    let enrollment = joiner.prepare(token, name)?;
    let identity = joiner.enroll(&enrollment, progress).await?;
    announce(&identity);
    node.findings.clear("enrollment");
    node.enrolled.notify_one();
    Ok(identity)
}

/// Enrolling again in the same mesh under the same name is done already; anything else needs `leave` first.
pub(crate) fn enrolled_already(
    identity: &Identity,
    token: &Token,
    wished: Option<&str>,
) -> Result<(), Failure> {
    if token.is_for(identity) && wished.is_none_or(|name| name == identity.name) {
        return Ok(());
    }
    Err(Failure::new(
        ErrorCode::AlreadyEnrolled,
        format!("this machine is node {} of {} already", identity.name, identity.trust_domain),
        "to enroll it anew run `meshctl leave` first",
    ))
}

fn announce(identity: &Identity) {
    tracing::info!(name = identity.name, ipv4 = %identity.ipv4, ipv6 = %identity.ipv6, "enrolled");
}

/// The first label of this machine's host name, in lower case.
pub(crate) fn host_name() -> Result<String, Failure> {
    let unnamed = || {
        Failure::new(
            ErrorCode::NameInvalid,
            "this machine has no host name that could name the node",
            "give one with --name",
        )
    };
    let name = nix::unistd::gethostname().map_err(|_| unnamed())?.into_string().map_err(|_| unnamed())?;
    let label = name.split('.').next().unwrap_or_default().to_ascii_lowercase();
    if label.is_empty() { Err(unnamed()) } else { Ok(label) }
}

fn read_token(path: &Path) -> Result<Token, Failure> {
    let unreadable = |why: String| {
        Failure::new(
            ErrorCode::ConfigInvalid,
            format!("token file {} cannot be read: {why}", path.display()),
            "check --token-file",
        )
    };
    let file = std::fs::File::open(path).map_err(|error| unreadable(error.to_string()))?;
    let limited = std::io::Read::take(file, TOKEN_CHARS_MAX as u64 + 2);
    let text = std::io::read_to_string(limited).map_err(|error| unreadable(error.to_string()))?;
    Token::parse(&zeroize::Zeroizing::new(text))
}

/// That a tunnel can be made here, before a token is spent on it.
fn check_tun() -> Result<(), Failure> {
    match std::fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun") {
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            return Err(Failure::new(
                ErrorCode::TunDenied,
                "/dev/net/tun may not be opened by this user",
                "run meshd as root, or with CAP_NET_ADMIN and access to the device",
            ));
        }
        Err(error) => {
            return Err(Failure::new(
                ErrorCode::TunMissing,
                format!("there is no usable /dev/net/tun here: {error}"),
                "load the module with `modprobe tun`, or give the container the device",
            ));
        }
    }
    // CAP_NET_ADMIN is bit 12 of the effective set, capabilities(7).
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|text| u64::from_str_radix(text.trim(), 16).ok());
    match effective {
        Some(bits) if bits & (1 << 12) == 0 => Err(Failure::new(
            ErrorCode::TunDenied,
            "this process may not change the network",
            "run meshd as root, or with CAP_NET_ADMIN",
        )),
        // Where /proc is closed the tunnel itself will tell.
        _ => Ok(()),
    }
}
