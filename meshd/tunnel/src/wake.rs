//! An eventfd that wakes a thread out of `poll`.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

#[derive(Debug)]
pub(crate) struct Wake(EventFd);

impl Wake {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?))
    }

    /// Wakes the owner now, or at its next wait. Never blocks.
    pub(crate) fn wake(&self) {
        // Only fails when the counter is full, and then the owner wakes anyway.
        let _ = self.0.write(1);
    }

    /// Forgets earlier wake-ups; look at the work *after* this call.
    pub(crate) fn clear(&self) {
        let _ = self.0.read();
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What to do when a descriptor says nothing but "error".
pub(crate) const READABLE: PollFlags = PollFlags::POLLIN;

/// Waits until one of `fds` has something. An interrupted wait counts as a time-out.
pub(crate) fn wait(fds: &mut [PollFd<'_>], timeout: PollTimeout) -> io::Result<()> {
    match poll(fds, timeout) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// A time-out no shorter than `pause`: waking a little early would only spin. At most a minute.
pub(crate) fn rounded_up(pause: Duration) -> PollTimeout {
    PollTimeout::from(pause.as_micros().div_ceil(1000).min(60_000) as u16)
}

/// Whether `fd` has input, an error or a hang-up waiting: a read then says which.
pub(crate) fn is_ready(fd: &PollFd<'_>) -> bool {
    fd.revents().is_some_and(|events| !events.is_empty())
}
