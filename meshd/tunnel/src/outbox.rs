//! What is to be sent: datagrams in batches of one size and destination, many batches in one system call.
//!
//! Datagrams are encrypted straight to where they leave from ([`Outbox::room`]). Batches leave in the
//! order in which they were begun, and datagrams join only where no datagram of their flow is overtaken: the
//! last batch, or, for fragments, the batch before it. A packet a little longer than the MTU comes as a long and a
//! short fragment, time and again, and would end a batch at every second datagram; so the last fragments of
//! packets make a batch of their own behind that of the first ones. A whole packet never passes either.

use std::net::SocketAddr;
use std::ops::Range;
use std::sync::atomic::Ordering;

use crate::detour::is_virtual;
use crate::packet::{DATAGRAM_MAX, Fragment};
use crate::peer::{BUFFER_BYTES, Outgoing};
use crate::send::{MESSAGES, Message};
use crate::udp::{self, Udp};

/// Datagrams in one message. Older kernels take no more (`UDP_MAX_SEGMENTS`).
const BATCH_DATAGRAMS: usize = 64;
/// Batches that may wait.
const BATCHES_MAX: usize = 64;
/// Bytes of datagrams in one lane before it counts as full. What one read of the interface brings fits behind
/// [`TURN_BYTES`], unless its segments are very small.
const LANE_BYTES: usize = 576 << 10;
/// The same for last fragments.
const TAILS_BYTES: usize = 64 << 10;
/// So much is worth a system call: eight of the largest packets that the interface hands over. What a call costs
/// beside its bytes is mostly whom it wakes: the other host, and through that the program that reads there and so on
/// back to us. So one long turn costs less than four short ones, and is still over in a millisecond or so.
const TURN_BYTES: usize = 480 << 10;

/// Whether everything has left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flushed {
    All,
    /// The send buffer of the socket for this address is full.
    Blocked(SocketAddr),
}

pub(crate) struct Outbox {
    lanes: [Lane; 2],
    batches: Vec<Batch>,
    /// Batches that have left, and bytes of the one after them that have.
    sent: (usize, usize),
    refused: usize,
}

/// Where the bytes of batches lie: those of last fragments apart, so that both kinds stay together.
struct Lane {
    bytes: Vec<u8>,
    used: usize,
    limit: usize,
}

const MAIN: usize = 0;
const TAILS: usize = 1;

/// Datagrams for one destination that leave together: all of one size, but the last may be shorter.
#[derive(Debug, Clone)]
struct Batch {
    lane: usize,
    range: Range<usize>,
    size: usize,
    count: usize,
    /// Type of service and address.
    to: (u8, SocketAddr),
    /// The kernel does not segment it.
    piecewise: bool,
}

impl Batch {
    fn takes(&self, length: usize, to: (u8, SocketAddr)) -> bool {
        let ended = self.range.len() < self.size * self.count;
        !ended
            && self.to == to
            && length <= self.size
            && self.count < BATCH_DATAGRAMS
            && self.range.len() + length <= DATAGRAM_MAX
    }
}

fn lane_of(fragment: Fragment) -> usize {
    if fragment == Fragment::Last { TAILS } else { MAIN }
}

impl Outbox {
    pub(crate) fn new() -> Self {
        // Behind what may wait there must still be room for the largest single result.
        let lane = |limit| Lane { bytes: vec![0; limit + BUFFER_BYTES], used: 0, limit };
        Self {
            lanes: [lane(LANE_BYTES), lane(TAILS_BYTES)],
            batches: Vec::with_capacity(BATCHES_MAX),
            sent: (0, 0),
            refused: 0,
        }
    }

    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.batches.is_empty()
    }

    /// Whether it must be flushed before anything else may come.
    pub(crate) fn is_full(&self) -> bool {
        self.batches.len() == BATCHES_MAX || self.lanes.iter().any(|lane| lane.used >= lane.limit)
    }

    /// Whether there is enough in it to be sent.
    pub(crate) fn is_worth_a_call(&self) -> bool {
        self.lanes[MAIN].used >= TURN_BYTES || self.is_full()
    }

    /// Where the next datagram goes: room for the largest there is, while it is not full.
    pub(crate) fn room(&mut self, fragment: Fragment) -> &mut [u8] {
        let lane = &mut self.lanes[lane_of(fragment)];
        &mut lane.bytes[lane.used..]
    }

    /// Takes up the datagram that was written to [`room`](Self::room) for a packet of that kind.
    pub(crate) fn add(&mut self, outgoing: &Outgoing, tos: u8, fragment: Fragment) {
        let (lane, length, to) = (lane_of(fragment), outgoing.length, (tos, outgoing.to));
        let start = self.lanes[lane].used;
        self.lanes[lane].used += length;
        if let Some(batch) = self.open(fragment).filter(|batch| batch.takes(length, to)) {
            batch.range.end += length;
            batch.count += 1;
            return;
        }
        let range = start..start + length;
        self.batches.push(Batch { lane, range, size: length, count: 1, to, piecewise: false });
    }

    /// The batch that a packet of that kind may join.
    fn open(&mut self, fragment: Fragment) -> Option<&mut Batch> {
        let last = self.batches.len().checked_sub(1)?;
        let wanted = lane_of(fragment);
        let at = if self.batches[last].lane == wanted {
            last
        } else if fragment == Fragment::First {
            last.checked_sub(1)?
        } else {
            return None;
        };
        // What has left takes nothing any more.
        let waits = at >= self.sent.0;
        Some(&mut self.batches[at]).filter(|batch| waits && batch.lane == wanted)
    }

    /// How far sending has come: it changes whenever something leaves.
    pub(crate) fn progress(&self) -> (usize, usize) {
        self.sent
    }

    /// Datagrams that the sockets have refused since the last call.
    pub(crate) fn take_refused(&mut self) -> usize {
        std::mem::take(&mut self.refused)
    }

    /// Sends all that waits, as far as the sockets take it without waiting.
    pub(crate) fn flush(&mut self, udp: &Udp) -> Flushed {
        while let Some(batch) = self.batches.get(self.sent.0) {
            let (_, to) = batch.to;
            if is_virtual(to) {
                let bytes = &self.lanes[batch.lane].bytes[batch.range.clone()];
                self.refused += bytes.chunks(batch.size).filter(|datagram| !udp.detour(datagram, to)).count();
                self.sent = (self.sent.0 + 1, 0);
                continue;
            }
            let gso = udp.offloads.udp_gso.load(Ordering::Relaxed);
            let (messages, count) = self.messages(gso);
            match udp.send_many(&messages[..count]) {
                Ok(taken) => {
                    let bytes = messages[..taken].iter().map(|message| message.bytes.len()).sum();
                    self.advance(bytes);
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    return Flushed::Blocked(to);
                }
                Err(error) => {
                    let (bytes, segment) = (messages[0].bytes.len(), messages[0].segment);
                    self.failed(&error, bytes, segment.map(usize::from), udp);
                }
            }
        }
        self.clear();
        Flushed::All
    }

    /// Gives up what has not left.
    pub(crate) fn drop_rest(&mut self) {
        let (done, bytes) = self.sent;
        let left = self.batches.iter().skip(done).map(|batch| batch.count).sum::<usize>();
        let gone = self.batches.get(done).map_or(0, |batch| bytes / batch.size);
        self.refused += left - gone;
        self.clear();
    }

    fn clear(&mut self) {
        self.batches.clear();
        self.lanes.iter_mut().for_each(|lane| lane.used = 0);
        self.sent = (0, 0);
    }

    /// What goes into the next call: as much as it takes, for one socket.
    fn messages(&self, gso: bool) -> ([Message<'_>; MESSAGES], usize) {
        let (done, mut skip) = self.sent;
        let to = self.batches[done].to.1;
        let mut messages = [Message { bytes: &[], segment: None, tos: 0, to }; MESSAGES];
        let mut count = 0;
        for batch in &self.batches[done..] {
            let (tos, to) = batch.to;
            if to.is_ipv4() != messages[0].to.is_ipv4() || is_virtual(to) {
                break;
            }
            let bytes = &self.lanes[batch.lane].bytes[batch.range.clone()][std::mem::take(&mut skip)..];
            let whole = gso && !batch.piecewise && bytes.len() > batch.size;
            let (size, segment) =
                if whole { (bytes.len(), Some(batch.size as u16)) } else { (batch.size, None) };
            for bytes in bytes.chunks(size) {
                if count == MESSAGES {
                    return (messages, count);
                }
                messages[count] = Message { bytes, segment, tos, to };
                count += 1;
            }
        }
        (messages, count)
    }

    /// So many bytes have left, or are given up.
    fn advance(&mut self, mut bytes: usize) {
        while bytes > 0 {
            let left = self.batches[self.sent.0].range.len() - self.sent.1;
            if bytes < left {
                self.sent.1 += bytes;
                return;
            }
            bytes -= left;
            self.sent = (self.sent.0 + 1, 0);
        }
    }

    /// The socket did not take the next message.
    fn failed(&mut self, error: &std::io::Error, bytes: usize, segment: Option<usize>, udp: &Udp) {
        match segment {
            // The device cannot do it after all.
            Some(_) if error.raw_os_error() == Some(nix::libc::EIO) => {
                tracing::warn!(%error, "UDP segmentation switched off");
                udp.offloads.udp_gso.store(false, Ordering::Relaxed);
            }
            // A path with a smaller MTU: the kernel fragments single datagrams, but not these.
            Some(_) if udp::is_size_error(error) => self.batches[self.sent.0].piecewise = true,
            _ => {
                self.refused += segment.map_or(1, |size| bytes.div_ceil(size));
                self.advance(bytes);
            }
        }
    }
}

#[cfg(test)]
mod tests;
