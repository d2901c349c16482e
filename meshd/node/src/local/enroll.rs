//! `Local.Enroll`: progress as it happens, and "done" only once the overlay stands.

use std::sync::Arc;
use std::time::Duration;

use mesh_proto::v1 as pb;
use mesh_proto::v1::ErrorCode;
use mesh_proto::v1::local_enroll_progress::{Enrolled, Step};
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use zeroize::Zeroizing;

use crate::failure::Failure;
use crate::join::{Progress, Token};
use crate::run::{Node, enroll_attended, enrolled_already, host_name};
use crate::session::Session;
use crate::state::Identity;

/// Steps that may wait for a slow reader.
const STEPS: usize = 16;
/// How long the overlay may take to come up.
const OVERLAY_TIMEOUT: Duration = Duration::from_secs(20);
/// How long the first map may take; without it the enrollment is good all the same.
const FIRST_MAP_TIMEOUT: Duration = Duration::from_secs(3);
/// How long the first handshake may take; the same holds.
const FIRST_PEER_TIMEOUT: Duration = Duration::from_secs(1);
/// How often is looked for it.
const PEER_LOOK: Duration = Duration::from_millis(20);

/// Enrolls in a task of its own: it goes on when the caller hangs up (`--no-wait`).
pub(super) fn enroll(
    node: Arc<Node>,
    request: pb::LocalEnrollRequest,
) -> impl Stream<Item = Result<pb::LocalEnrollProgress, Status>> + use<> {
    let (steps, stream) = mpsc::channel(STEPS);
    tokio::spawn(async move {
        let no_wait = request.no_wait;
        let (progress, heard) = mpsc::channel(STEPS);
        let listener = tokio::spawn(relay(heard, steps, no_wait));
        let outcome = attempt(&node, request, &progress).await;
        drop(progress);
        // Ends once the channel above is closed; it cannot panic.
        let steps = listener.await.ok().flatten();
        let last = match outcome {
            Ok(enrolled) => Ok(pb::LocalEnrollProgress { step: Some(Step::Done(enrolled)) }),
            Err(failure) => {
                tracing::warn!(code = failure.number(), why = %failure, "enrollment failed");
                Err(failure.into())
            }
        };
        // Nobody may be listening any more.
        if let Some(steps) = steps {
            let _ = steps.send(last).await;
        }
    });
    ReceiverStream::new(stream)
}

/// Hands progress on, and the way to the caller back. With `no_wait` the caller is let go as soon as approval is
/// pending: that is the last step, and the stream's end is no error.
async fn relay(
    mut heard: mpsc::Receiver<Progress>,
    steps: mpsc::Sender<Result<pb::LocalEnrollProgress, Status>>,
    no_wait: bool,
) -> Option<mpsc::Sender<Result<pb::LocalEnrollProgress, Status>>> {
    let mut told = false;
    while let Some(progress) = heard.recv().await {
        let step = match progress {
            Progress::Connecting(address) => Step::Connecting(address),
            Progress::Pending(pending) if no_wait => {
                let _ = steps.send(Ok(pb::LocalEnrollProgress { step: Some(Step::Pending(pending)) })).await;
                return None;
            }
            // Once is enough: it is asked again and again.
            Progress::Pending(_) if told => continue,
            Progress::Pending(pending) => {
                told = true;
                Step::Pending(pending)
            }
        };
        let _ = steps.send(Ok(pb::LocalEnrollProgress { step: Some(step) })).await;
    }
    Some(steps)
}

async fn attempt(
    node: &Arc<Node>,
    request: pb::LocalEnrollRequest,
    progress: &mpsc::Sender<Progress>,
) -> Result<Enrolled, Failure> {
    let text = Zeroizing::new(request.token);
    let token = Token::parse(&text)?;
    let wished = Some(request.name).filter(|name| !name.is_empty()).or_else(|| node.config.name.clone());
    if let Some(session) = node.session.borrow().clone() {
        let active = session.identities.active();
        enrolled_already(&active.identity, &token, wished.as_deref())?;
        return Ok(answer(&active.identity, false));
    }
    let name = wished.map_or_else(host_name, Ok)?;
    let identity = enroll_attended(node, &token, &name, progress).await?;
    overlay_up(node).await?;
    Ok(answer(&identity, true))
}

/// Waits until the interface stands and the first map has been asked for, so that what follows "done" works.
async fn overlay_up(node: &Node) -> Result<(), Failure> {
    let mut session = node.session.subscribe();
    let mut broken = node.broken.subscribe();
    let up = async {
        tokio::select! {
            // The senders live as long as the node.
            found = session.wait_for(Option::is_some) => Ok(found.ok().and_then(|found| found.clone())),
            found = broken.wait_for(Option::is_some) => {
                Err(found.ok().and_then(|found| found.clone()).unwrap_or_else(|| crate::network::Gone.into()))
            }
        }
    };
    let session = tokio::time::timeout(OVERLAY_TIMEOUT, up).await.map_err(|_| {
        Failure::new(
            ErrorCode::TimedOut,
            "this machine is enrolled, but the overlay has not come up yet",
            "look at `meshctl doctor` and the daemon's log",
        )
    })??;
    if let Some(session) = session {
        let mut channel = session.uplink.channel.clone();
        // Too late is no failure: the node goes on trying.
        let _ = tokio::time::timeout(FIRST_MAP_TIMEOUT, channel.wait_for(Option::is_some)).await;
        let _ = tokio::time::timeout(FIRST_PEER_TIMEOUT, first_peer(&session)).await;
    }
    Ok(())
}

/// Waits until the first map is applied and, if it names peers, one of them has answered, so that a `ping`
/// typed right after `enroll` is not told that the host is unreachable.
async fn first_peer(session: &Session) {
    let mut look = tokio::time::interval(PEER_LOOK);
    loop {
        look.tick().await;
        let Ok(network) = session.network.status().await else { return };
        let answered = network.peers.is_empty() || network.peers.iter().any(|peer| peer.has_session);
        if network.roster_seq > 0 && answered {
            return;
        }
    }
}

fn answer(identity: &Identity, changed: bool) -> Enrolled {
    Enrolled {
        name: identity.name.clone(),
        ipv4: identity.ipv4.to_string(),
        ipv6: identity.ipv6.to_string(),
        trust_domain: identity.trust_domain.clone(),
        changed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn heard_by_the_caller(no_wait: bool) -> (Vec<Step>, bool) {
        let (progress, heard) = mpsc::channel(STEPS);
        let (steps, mut stream) = mpsc::channel(STEPS);
        let pending = pb::enroll_response::Pending { node: "alpha".into(), ..Default::default() };
        progress.send(Progress::Connecting("192.0.2.1:7443".into())).await.unwrap();
        progress.send(Progress::Pending(pending.clone())).await.unwrap();
        progress.send(Progress::Pending(pending)).await.unwrap();
        // Who waits is told more; who does not is let go while the enrollment goes on.
        let goes_on = no_wait.then(|| progress.clone());
        drop(progress);
        let left = relay(heard, steps, no_wait).await;
        let more = left.is_some();
        drop((left, goes_on));
        let mut told = Vec::new();
        while let Some(step) = stream.recv().await {
            told.push(step.expect("no step is an error").step.unwrap());
        }
        (told, more)
    }

    #[tokio::test]
    async fn who_does_not_wait_is_told_of_the_approval_and_let_go() {
        let (told, more) = heard_by_the_caller(true).await;
        assert!(
            matches!(&told[..], [Step::Connecting(_), Step::Pending(pending)] if pending.node == "alpha")
        );
        assert!(!more);
    }

    #[tokio::test]
    async fn who_waits_is_told_once_and_goes_on_listening() {
        let (told, more) = heard_by_the_caller(false).await;
        assert!(matches!(&told[..], [Step::Connecting(_), Step::Pending(_)]));
        assert!(more);
    }
}
