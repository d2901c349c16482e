//! What happened to the peers, for a caller that wants to know without asking.
//!
//! The queue is bounded by collapsing: of one kind and one peer only the newest event waits, so a
//! reader that sleeps finds at most a handful per peer and never slows the tunnel down.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::key::PublicKey;

/// Events that may wait. Further ones are dropped; the statistics still tell.
const EVENTS_MAX: usize = 16_384;

#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum TunnelEvent {
    /// A new session with `peer` is in use: its handshake is complete and proved on both sides.
    HandshakeDone { peer: PublicKey },
    /// An authenticated message of `peer` came from a new underlay address, which is now used.
    EndpointChanged { peer: PublicKey, from: SocketAddr },
    /// `peer` answered a handshake of ours from `from` after `rtt`: that path works both ways. Comes with
    /// each answer, for every address; which path is in use says `EndpointChanged`.
    PathAnswered { peer: PublicKey, from: SocketAddr, rtt: Duration },
    /// Something was sent to `peer` 15 s ago and nothing has come back since. Said once per silence.
    PeerSilent { peer: PublicKey },
    /// The tunnel carries nothing any more. `error` is `None` after [`close`](crate::Tunnel::close).
    Stopped { error: Option<String> },
}

/// Why [`Events::recv_timeout`] has no event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecvTimeoutError {
    #[error("no event in time")]
    Timeout,
    #[error("the tunnel is closed and every event was read")]
    Closed,
}

/// The reading end of a tunnel's events. Clones share one queue: each event goes to one of them.
#[derive(Debug, Clone)]
pub struct Events(Arc<Queue>);

impl Events {
    /// Waits for the next event; `None` once the tunnel is closed and every event was read.
    pub fn recv(&self) -> Option<TunnelEvent> {
        let mut state = self.0.lock();
        loop {
            match state.pop() {
                Some(event) => return Some(event),
                None if state.closed => return None,
                None => state = self.0.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// As [`recv`](Self::recv), for at most `timeout`.
    ///
    /// # Errors
    /// [`RecvTimeoutError`] says whether waiting longer could help.
    pub fn recv_timeout(&self, timeout: Duration) -> Result<TunnelEvent, RecvTimeoutError> {
        let deadline = Instant::now() + timeout;
        let mut state = self.0.lock();
        loop {
            if let Some(event) = state.pop() {
                return Ok(event);
            }
            if state.closed {
                return Err(RecvTimeoutError::Closed);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(RecvTimeoutError::Timeout);
            }
            (state, _) = self.0.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The next event if one is waiting.
    pub fn try_recv(&self) -> Option<TunnelEvent> {
        self.0.lock().pop()
    }
}

/// The writing end, shared by the engine's threads.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    order: VecDeque<Slot>,
    waiting: HashMap<Slot, TunnelEvent>,
    closed: bool,
}

/// What collapses into one: the kind, the peer if there is one, and the path if the kind is about paths.
type Slot = (u8, Option<PublicKey>, Option<SocketAddr>);

impl Queue {
    pub(crate) fn reader(self: &Arc<Self>) -> Events {
        Events(self.clone())
    }

    pub(crate) fn push(&self, event: TunnelEvent) {
        let mut state = self.lock();
        let slot = slot(&event);
        // The end must always be heard, however full the queue is.
        let last = matches!(event, TunnelEvent::Stopped { .. });
        if state.closed || (state.waiting.len() >= EVENTS_MAX && !last && !state.waiting.contains_key(&slot))
        {
            return;
        }
        if state.waiting.insert(slot, event).is_none() {
            state.order.push_back(slot);
        }
        drop(state);
        self.changed.notify_one();
    }

    /// No event follows; readers see the end once they have read what waits.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn pop(&mut self) -> Option<TunnelEvent> {
        let slot = self.order.pop_front()?;
        self.waiting.remove(&slot)
    }
}

fn slot(event: &TunnelEvent) -> Slot {
    match event {
        TunnelEvent::HandshakeDone { peer } => (0, Some(*peer), None),
        TunnelEvent::EndpointChanged { peer, .. } => (1, Some(*peer), None),
        TunnelEvent::PeerSilent { peer } => (2, Some(*peer), None),
        TunnelEvent::Stopped { .. } => (3, None, None),
        TunnelEvent::PathAnswered { peer, from, .. } => (4, Some(*peer), Some(*from)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: PublicKey = PublicKey([9; 32]);

    #[test]
    fn newer_events_of_one_kind_and_peer_replace_older_ones() {
        let queue = Arc::new(Queue::default());
        let events = queue.reader();
        for port in 1..=100 {
            queue.push(TunnelEvent::EndpointChanged { peer: PEER, from: ([10, 0, 0, 1], port).into() });
            queue.push(TunnelEvent::HandshakeDone { peer: PEER });
        }
        let last = TunnelEvent::EndpointChanged { peer: PEER, from: ([10, 0, 0, 1], 100).into() };
        assert_eq!(events.try_recv(), Some(last));
        assert_eq!(events.try_recv(), Some(TunnelEvent::HandshakeDone { peer: PEER }));
        assert_eq!(events.try_recv(), None);
    }

    #[test]
    fn answers_from_different_places_do_not_replace_each_other() {
        let queue = Arc::new(Queue::default());
        let answer = |port, rtt| TunnelEvent::PathAnswered {
            peer: PEER,
            from: ([10, 0, 0, 1], port).into(),
            rtt: Duration::from_millis(rtt),
        };
        for event in [answer(1, 5), answer(2, 6), answer(1, 7)] {
            queue.push(event);
        }
        let read: Vec<_> = std::iter::from_fn(|| queue.reader().try_recv()).collect();
        assert_eq!(read, [answer(1, 7), answer(2, 6)]);
    }

    #[test]
    fn a_full_queue_still_tells_the_end() {
        let queue = Arc::new(Queue::default());
        for n in 0..EVENTS_MAX as u32 + 10 {
            let mut key = [0; 32];
            key[..4].copy_from_slice(&n.to_le_bytes());
            queue.push(TunnelEvent::HandshakeDone { peer: PublicKey(key) });
        }
        queue.push(TunnelEvent::Stopped { error: None });
        queue.close();
        let events: Vec<_> = std::iter::from_fn(|| queue.reader().recv()).collect();
        assert_eq!(events.len(), EVENTS_MAX + 1);
        assert_eq!(events.last(), Some(&TunnelEvent::Stopped { error: None }));
        assert_eq!(queue.reader().recv_timeout(Duration::ZERO), Err(RecvTimeoutError::Closed));
    }
}
