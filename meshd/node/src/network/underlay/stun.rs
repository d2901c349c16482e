//! When to ask the controller where our datagrams come from, and what its answers are worth. No I/O.

use std::net::SocketAddr;
use std::time::Duration;

use mesh_core::stun::{TransactionId, binding_request, parse_response, transaction_of};
use tokio::time::Instant;

/// First wait for an answer; doubles with each try. RFC 8489 §6.2.1 (`RTO`).
const RETRY_FIRST: Duration = Duration::from_millis(500);
/// Requests of one transaction. RFC 8489 §6.2.1 has 7 (`Rc`); five take 15.5 s.
const TRIES: u32 = 5;
/// Between two questions that were answered: keeps the mapping in the router, as WireGuard's keepalive does.
const REFRESH: Duration = Duration::from_secs(25);
/// After a question without an answer.
const PAUSE: Duration = Duration::from_secs(5);
/// Questions without an answer until the last answer is forgotten.
const FAILURES_MAX: u32 = 2;

/// The questions of one node. Call [`poll`](Self::poll) at [`wake`](Self::wake).
#[derive(Debug)]
pub(super) struct Stun {
    server: Option<SocketAddr>,
    asked: Option<(TransactionId, u32)>,
    mapped: Option<SocketAddr>,
    failures: u32,
    next_at: Instant,
}

impl Stun {
    pub(super) fn new(now: Instant) -> Self {
        Self { server: None, asked: None, mapped: None, failures: 0, next_at: now }
    }

    /// Where this node's port is seen.
    pub(super) fn mapped(&self) -> Option<SocketAddr> {
        self.mapped
    }

    /// Asks this server from now on. Without one the last answer stands: the mapping outlives the controller.
    pub(super) fn use_server(&mut self, server: Option<SocketAddr>, now: Instant) {
        if std::mem::replace(&mut self.server, server) != server {
            self.restart(now);
        }
    }

    /// Asks again at once: the network has changed.
    pub(super) fn restart(&mut self, now: Instant) {
        (self.asked, self.failures, self.next_at) = (None, 0, now);
    }

    pub(super) fn wake(&self) -> Option<Instant> {
        self.server.map(|_| self.next_at)
    }

    /// The request that is due, and whom to send it to.
    pub(super) fn poll(&mut self, now: Instant) -> Option<(Vec<u8>, SocketAddr)> {
        let server = self.server.filter(|_| self.next_at <= now)?;
        let (id, tries) = self.asked.unwrap_or_else(|| (TransactionId(mesh_runtime::random_bytes()), 0));
        if tries == TRIES {
            (self.asked, self.next_at) = (None, now + PAUSE);
            self.failures = self.failures.saturating_add(1);
            if self.failures >= FAILURES_MAX {
                self.mapped = None;
            }
            return None;
        }
        self.asked = Some((id, tries + 1));
        self.next_at = now + RETRY_FIRST * 2_u32.pow(tries);
        Some((binding_request(id), server))
    }

    /// Takes what came; everything but an answer to the question that is open is dropped.
    pub(super) fn handle_answer(&mut self, datagram: &[u8], from: SocketAddr, now: Instant) {
        let Some((id, _)) = self.asked.filter(|(id, _)| transaction_of(datagram) == Some(*id)) else {
            return;
        };
        if self.server != Some(from) {
            return;
        }
        match parse_response(datagram, id) {
            Ok(mapped) => {
                (self.asked, self.failures, self.next_at) = (None, 0, now + REFRESH);
                self.mapped = Some(mapped);
            }
            Err(error) => tracing::debug!(%from, %error, "STUN answer"),
        }
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::stun::{binding_response, parse_request};

    use super::*;

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_question_is_repeated_then_given_up_and_the_last_answer_forgotten() {
        let (mut now, server) = (Instant::now(), at("192.0.2.1:7443"));
        let mut stun = Stun::new(now);
        assert_eq!((stun.wake(), stun.poll(now)), (None, None), "nobody to ask");
        stun.use_server(Some(server), now);
        let (request, to) = stun.poll(now).unwrap();
        assert_eq!(to, server);
        assert_eq!(stun.poll(now), None, "not twice at once");
        let answer = binding_response(parse_request(&request).unwrap(), at("198.51.100.7:4444"));
        stun.handle_answer(&answer, at("203.0.113.9:7443"), now);
        assert_eq!(stun.mapped(), None, "somebody else's word");
        stun.handle_answer(&binding_response(TransactionId([1; 12]), at("203.0.113.9:1")), server, now);
        assert_eq!(stun.mapped(), None, "the answer to another question");
        stun.handle_answer(&answer, server, now);
        assert_eq!(stun.mapped(), Some(at("198.51.100.7:4444")));
        assert_eq!(stun.wake(), Some(now + REFRESH));
        let mut asked = 0;
        while stun.mapped().is_some() {
            now = stun.wake().unwrap();
            asked += u32::from(stun.poll(now).is_some());
        }
        assert_eq!(asked, TRIES * FAILURES_MAX);
        stun.restart(now);
        assert!(stun.poll(now).is_some());
    }
}
