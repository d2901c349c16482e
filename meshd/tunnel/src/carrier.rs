//! The thread that carries one queue both ways: interface → encrypt → sockets, and sockets → decrypt →
//! interface.
//!
//! One thread and not two: on few cores the two would contend with each other, with the kernel's half of the work
//! and with the programs whose packets these are. Each direction has its turn in each round, of a bounded number of
//! packets, so that neither starves the other.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, PollTimeout};

use crate::housekeeper::Handshake;
use crate::inbound::Inbound;
use crate::outbound::Outbound;
use crate::receive::Received;
use crate::shared::Shared;
use crate::tun::Tun;
use crate::udp::{SEND_WAIT, Udp};
use crate::wake::{self, READABLE};

pub(crate) struct Carrier {
    shared: Arc<Shared>,
    queue: usize,
    tun: Arc<Tun>,
    udp: Arc<Udp>,
    inbound: Inbound,
    outbound: Outbound,
}

/// What has something to do.
#[derive(Debug, Clone, Copy, Default)]
struct Ready {
    woken: bool,
    interface: bool,
    sockets: [bool; 2],
}

impl Carrier {
    pub(crate) fn new(
        shared: Arc<Shared>,
        queue: usize,
        tun: Tun,
        udp: Arc<Udp>,
        mtu: u16,
        handshakes: SyncSender<Handshake>,
    ) -> Self {
        let tun = Arc::new(tun);
        let inbound = Inbound::new(shared.clone(), queue, tun.clone(), udp.clone(), handshakes);
        let outbound = Outbound::new(shared.clone(), tun.clone(), udp.clone(), mtu);
        Self { shared, queue, tun, udp, inbound, outbound }
    }

    /// Runs until the tunnel stops; an error is the end of the tunnel.
    pub(crate) fn run(mut self) -> Result<(), String> {
        let mut received = Received::new();
        while !self.shared.is_stopped() {
            let ready = self.wait().map_err(|error| format!("cannot wait: {error}"))?;
            if ready.woken && !self.woken() {
                break;
            }
            let udp = self.udp.clone();
            for (socket, _) in udp.sockets().zip(ready.sockets).filter(|(_, ready)| *ready) {
                self.inbound.turn(socket, &mut received);
            }
            if self.outbound.blocked().is_some() {
                self.outbound.retry(Instant::now());
            } else if ready.interface {
                self.outbound.turn()?;
            }
        }
        Ok(())
    }

    /// Waits for something to do. While nothing can be sent, nothing is taken from the interface.
    fn wait(&self) -> std::io::Result<Ready> {
        let wake = PollFd::new(self.shared.queues[self.queue].wake.as_fd(), READABLE);
        let blocked = self.outbound.blocked();
        let limit = match blocked {
            Some((_, since)) => wake::rounded_up(SEND_WAIT.saturating_sub(since.elapsed())),
            None => PollTimeout::NONE,
        };
        let full = blocked.and_then(|(to, _)| self.udp.socket_to(to));
        let (source, events) = match full {
            Some(socket) => (socket.as_fd(), PollFlags::POLLOUT),
            None => (self.tun.as_fd(), READABLE),
        };
        let mut fds = [wake.clone(), PollFd::new(source, events), wake.clone(), wake];
        let mut used = 2;
        for socket in self.udp.sockets() {
            fds[used] = PollFd::new(socket.as_fd(), READABLE);
            used += 1;
        }
        wake::wait(&mut fds[..used], limit)?;
        let [woken, source, ..] = &fds;
        let mut sockets = [false; 2];
        for (ready, fd) in sockets.iter_mut().zip(&fds[2..used]) {
            *ready = wake::is_ready(fd);
        }
        Ok(Ready {
            woken: wake::is_ready(woken),
            interface: full.is_none() && wake::is_ready(source),
            sockets,
        })
    }

    /// Somebody wants something. `false` if the tunnel is closed.
    fn woken(&mut self) -> bool {
        self.shared.queues[self.queue].wake.clear();
        // The sockets may have been exchanged.
        let Some(udp) = self.shared.udp.get(self.queue) else { return false };
        self.udp = udp.clone();
        self.inbound.set_udp(udp.clone());
        self.outbound.set_udp(udp);
        if self.queue == 0 {
            self.inbound.detoured();
            for peer in self.shared.take_ready() {
                self.outbound.send_waiting(&peer, Instant::now());
            }
        }
        true
    }
}
