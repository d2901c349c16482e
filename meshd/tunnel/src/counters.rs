//! What the threads count, and which offloads are on: cells that many may read while they change.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::tunnel::{Counters, Offloads};

/// [`Offloads`] as they are at the moment; each may be switched off by the first error of a driver.
#[derive(Debug, Default)]
pub(crate) struct OffloadCells {
    pub(crate) tun_tcp: AtomicBool,
    pub(crate) tun_udp: AtomicBool,
    pub(crate) udp_gso: AtomicBool,
    pub(crate) udp_gro: AtomicBool,
}

impl OffloadCells {
    pub(crate) fn read(&self) -> Offloads {
        Offloads {
            tun_tcp: self.tun_tcp.load(Ordering::Relaxed),
            tun_udp: self.tun_udp.load(Ordering::Relaxed),
            udp_gso: self.udp_gso.load(Ordering::Relaxed),
            udp_gro: self.udp_gro.load(Ordering::Relaxed),
        }
    }
}

macro_rules! counter_cells {
    ($($name:ident),* $(,)?) => {
        /// [`Counters`] while they count.
        #[derive(Debug, Default)]
        pub(crate) struct CounterCells { $(pub(crate) $name: AtomicU64),* }

        impl CounterCells {
            pub(crate) fn read(&self) -> Counters {
                Counters { $($name: self.$name.load(Ordering::Relaxed)),* }
            }
        }
    };
}

counter_cells!(
    tx_malformed,
    tx_no_peer,
    tx_no_endpoint,
    tx_socket_errors,
    rx_invalid,
    rx_wrong_source,
    rx_under_load,
    rx_handshakes_dropped,
    rx_interface_errors,
    rx_foreign,
    rx_virtual_dropped,
    tx_waiting_dropped,
);

/// Adds one.
pub(crate) fn count(cell: &AtomicU64) {
    cell.fetch_add(1, Ordering::Relaxed);
}

/// Adds `n`.
pub(crate) fn count_many(cell: &AtomicU64, n: usize) {
    cell.fetch_add(n as u64, Ordering::Relaxed);
}
