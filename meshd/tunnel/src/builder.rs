//! Opening an interface: what it is called, and whose engine carries it.

use crate::config::TunnelConfig;
use crate::engine::Userspace;
use crate::error::TunnelError;
use crate::kernel::{self, Kernel};
use crate::key::PrivateKey;
use crate::tunnel::{Backend, Offloads, Tuning, Tunnel};

/// Inner MTU if none is given, bytes: fits an Ethernet underlay of either family (1500 less 40 for IPv6, 8
/// for UDP and 32 for WireGuard).
const MTU_DEFAULT: u16 = 1420;

/// An interface to be opened. Every setting but name and key has a default.
///
/// ```no_run
/// use mesh_tunnel::{Backend, PeerConfig, TunnelBuilder};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let key = "yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk=".parse()?;
/// let tunnel = TunnelBuilder::new("wg0", key)
///     .listen_port(51820)
///     .mtu(1380)
///     .backend(Backend::Auto)
///     .open()?;
/// tunnel.set_peer(PeerConfig {
///     allowed_ips: vec!["10.0.0.2/32".parse()?],
///     ..PeerConfig::new("xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=".parse()?)
/// })?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
#[must_use = "nothing is opened before `open`"]
pub struct TunnelBuilder {
    config: TunnelConfig,
    backend: Backend,
    tuning: Tuning,
}

impl TunnelBuilder {
    /// An interface of that name, 1 to 15 bytes; `mesh%d` lets the kernel number it.
    pub fn new(interface: impl Into<String>, private_key: PrivateKey) -> Self {
        let config = TunnelConfig {
            interface: interface.into(),
            mtu: MTU_DEFAULT,
            listen_port: 0,
            private_key,
            fwmark: None,
        };
        Self { config, backend: Backend::Userspace, tuning: Tuning::default() }
    }

    /// Largest inner packet, bytes, 576 to 65455 (1420, which fits a 1500-byte underlay of either family).
    pub fn mtu(mut self, bytes: u16) -> Self {
        self.config.mtu = bytes;
        self
    }

    /// UDP port for both families; 0, the default, takes any that is free in both.
    pub fn listen_port(mut self, port: u16) -> Self {
        self.config.listen_port = port;
        self
    }

    /// Mark of outer packets (`SO_MARK`), for policy routing (none). 0 is none.
    pub fn fwmark(mut self, mark: impl Into<Option<u32>>) -> Self {
        self.config.fwmark = mark.into();
        self
    }

    /// Whose engine carries the interface (the userspace engine's, which can do all of [`Tunnel`]).
    pub fn backend(mut self, backend: Backend) -> Self {
        self.backend = backend;
        self
    }

    /// No other offloads than these (all that host and driver can do): to find out which of them a driver
    /// cannot do. The kernel's engine has its own.
    pub fn offloads(mut self, wanted: Offloads) -> Self {
        self.tuning.offloads = wanted;
        self
    }

    /// Queues of the interface and sockets on the port, each with a thread that carries it both ways, 1 to 16 (one
    /// up to three cores, then one for each core, 8 at most). The kernel's engine has its own.
    pub fn queues(mut self, queues: usize) -> Self {
        self.tuning.queues = Some(queues);
        self
    }

    /// Creates the interface, sets its MTU, brings it up and starts to listen. Addresses and routes are the
    /// caller's. An interface that a dead process of this crate left behind is taken over.
    ///
    /// # Errors
    /// Nothing is left behind; each variant of [`TunnelError`] names the next step.
    /// [`TunnelError::NoKernel`] if [`Backend::Kernel`] was asked for in vain.
    pub fn open(self) -> Result<Box<dyn Tunnel>, TunnelError> {
        let Self { config, backend, tuning } = self;
        config.check()?;
        kernel::remove_abandoned(&config.interface);
        if backend == Backend::Userspace {
            return Ok(Box::new(Userspace::open(config, tuning)?));
        }
        match Kernel::open(&config) {
            Ok(kernel) => Ok(Box::new(kernel)),
            Err(kernel::OpenError::Other(error)) => Err(error),
            Err(kernel::OpenError::Absent(why)) if backend == Backend::Kernel => {
                Err(TunnelError::NoKernel { why })
            }
            Err(kernel::OpenError::Absent(why)) => {
                tracing::info!(%why, "userspace WireGuard");
                Ok(Box::new(Userspace::open(config, tuning)?.instead_of_kernel(why)))
            }
        }
    }
}
