use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd},
    thread,
};

use crate::{LabError, sys};

/// A network and a mount namespace, alive as long as this value or a process in them.
#[derive(Debug)]
pub(crate) struct Namespaces {
    net: File,
    mounts: File,
}

impl Namespaces {
    /// New ones, with `lo` up, nothing else, and an empty `/run`.
    pub(crate) fn new() -> Result<Self, LabError> {
        // Only the thread moves; what it leaves behind are the two descriptors.
        on_new_thread(|| {
            sys::unshare_thread()?;
            Ok(Self {
                net: File::open("/proc/thread-self/ns/net")?,
                mounts: File::open("/proc/thread-self/ns/mnt")?,
            })
        })
        .map_err(LabError::namespaces)
    }

    pub(crate) fn net(&self) -> BorrowedFd<'_> {
        self.net.as_fd()
    }

    /// Moves the caller, a thread of its own or a child before exec, in here.
    pub(crate) fn join(&self) -> io::Result<()> {
        sys::join(self.net.as_fd(), self.mounts.as_fd())
    }

    /// Runs `work` on a new thread in here. Sockets it opens stay in here.
    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, LabError> {
        on_new_thread(|| self.join().map(|()| work()))
            .map_err(|source| LabError::System { attempt: "join a namespace of the lab", source })
    }
}

/// Runs `work` on a thread of its own; a panic in it goes on in the caller.
fn on_new_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let worker = thread::Builder::new().name("lab".to_owned()).spawn_scoped(scope, work)?;
        worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
