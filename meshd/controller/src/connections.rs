//! Open connections: counted by what is known of their callers, and found by the certificate they showed.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mesh_core::Serial;
use tokio_util::sync::CancellationToken;

use crate::limits::{
    ANONYMOUS_CONNECTIONS_MAX, ANONYMOUS_CONNECTIONS_PER_SOURCE_MAX, CONNECTIONS_MAX,
    CONNECTIONS_PER_SOURCE_MAX, HANDSHAKES_MAX, HANDSHAKES_PER_SOURCE_MAX,
};

/// What is known of a connection's caller. Each class has places of its own, so that strangers take none
/// of the places of enrolled nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    /// In the TLS handshake: nothing.
    Handshake,
    /// It showed no certificate.
    Anonymous,
    /// It showed a certificate of this mesh, or is local.
    Known,
}

impl Class {
    /// How many places there are in all, and for one source.
    const fn places(self) -> (usize, usize) {
        match self {
            Self::Handshake => (HANDSHAKES_MAX, HANDSHAKES_PER_SOURCE_MAX),
            Self::Anonymous => (ANONYMOUS_CONNECTIONS_MAX, ANONYMOUS_CONNECTIONS_PER_SOURCE_MAX),
            Self::Known => (CONNECTIONS_MAX, CONNECTIONS_PER_SOURCE_MAX),
        }
    }
}

/// Who counts as one caller: an IPv4 address, an IPv6 /64, which one customer has to himself.
fn source_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => address.into(),
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
    }
}

#[derive(Debug, Clone, Default)]
pub(crate) struct Connections(Arc<Mutex<Table>>);

#[derive(Debug, Default)]
struct Table {
    open: [Taken; 3],
    by_certificate: BTreeMap<Serial, BTreeMap<u64, CancellationToken>>,
    next: u64,
}

/// The places of one class that are taken.
#[derive(Debug, Default)]
struct Taken {
    all: usize,
    by_source: HashMap<IpAddr, usize>,
}

impl Taken {
    fn take(&mut self, source: Option<IpAddr>, (all_max, source_max): (usize, usize)) -> bool {
        let of_source = source.map_or(0, |source| self.by_source.get(&source).copied().unwrap_or_default());
        if self.all >= all_max || of_source >= source_max {
            return false;
        }
        self.all += 1;
        if let Some(source) = source {
            self.by_source.insert(source, of_source + 1);
        }
        true
    }

    fn give_back(&mut self, source: Option<IpAddr>) {
        self.all -= 1;
        if let Some(source) = source
            && let Some(count) = self.by_source.get_mut(&source)
        {
            *count -= 1;
            if *count == 0 {
                self.by_source.remove(&source);
            }
        }
    }
}

impl Connections {
    /// A place for a new connection from `address`; `None` if there is none left. Local connections have
    /// no address.
    pub(crate) fn take_slot(&self, class: Class, address: Option<IpAddr>) -> Option<Slot> {
        let source = address.map(source_of);
        let taken = self.lock().open[class as usize].take(source, class.places());
        taken.then(|| Slot { connections: self.clone(), class, source })
    }

    /// Notes which certificate a connection showed, until the entry is dropped.
    pub(crate) fn register(&self, serial: Serial, closing: CancellationToken) -> Entry {
        let mut table = self.lock();
        table.next += 1;
        let number = table.next;
        table.by_certificate.entry(serial).or_default().insert(number, closing);
        Entry { connections: self.clone(), serial, number }
    }

    /// Every certificate that an open connection showed.
    pub(crate) fn certificates(&self) -> Vec<Serial> {
        self.lock().by_certificate.keys().copied().collect()
    }

    /// How many connections showed one of these certificates.
    pub(crate) fn count(&self, serials: &[Serial]) -> usize {
        let table = self.lock();
        serials.iter().filter_map(|serial| table.by_certificate.get(serial)).map(BTreeMap::len).sum()
    }

    /// Ends every connection that showed this certificate.
    pub(crate) fn close(&self, serial: Serial) {
        let closing: Vec<_> = {
            let table = self.lock();
            table.by_certificate.get(&serial).into_iter().flat_map(BTreeMap::values).cloned().collect()
        };
        closing.iter().for_each(CancellationToken::cancel);
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The place of one connection.
pub(crate) struct Slot {
    connections: Connections,
    class: Class,
    source: Option<IpAddr>,
}

impl Slot {
    /// Moves to a place of another class, once more is known; without one the connection has to go.
    pub(crate) fn move_to(mut self, class: Class) -> Option<Self> {
        {
            let mut table = self.connections.lock();
            if !table.open[class as usize].take(self.source, class.places()) {
                return None;
            }
            table.open[self.class as usize].give_back(self.source);
        }
        self.class = class;
        Some(self)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.connections.lock().open[self.class as usize].give_back(self.source);
    }
}

/// One connection in the table of certificates.
pub(crate) struct Entry {
    connections: Connections,
    serial: Serial,
    number: u64,
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut table = self.connections.lock();
        if let Some(open) = table.by_certificate.get_mut(&self.serial) {
            open.remove(&self.number);
            if open.is_empty() {
                table.by_certificate.remove(&self.serial);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn slots_are_counted_per_source_and_come_back() {
        let connections = Connections::default();
        for (class, source, neighbour, stranger) in [
            (Class::Known, "192.0.2.1", "::ffff:192.0.2.1", "192.0.2.2"),
            (Class::Anonymous, "2001:db8::1", "2001:db8::ffff:0:0:9", "2001:db8:0:1::1"),
            (Class::Handshake, "2001:db8::1", "2001:db8::2", "192.0.2.1"),
        ] {
            let take = |address| connections.take_slot(class, Some(ip(address)));
            let slots: Vec<_> = (0..class.places().1).map(|_| take(source).unwrap()).collect();
            assert!(take(source).is_none() && take(neighbour).is_none(), "{class:?}");
            assert!(take(stranger).is_some(), "{class:?}");
            drop(slots);
            assert!(take(neighbour).is_some(), "{class:?}");
            assert_eq!(connections.lock().open[class as usize].all, 0);
            assert!(connections.lock().open[class as usize].by_source.is_empty());
        }
    }

    /// However many strangers come, from however many places, an enrolled node and local root get in.
    #[test]
    fn strangers_take_no_places_of_nodes() {
        let connections = Connections::default();
        let mut kept = Vec::new();
        for source in 0..HANDSHAKES_MAX as u128 {
            let address = IpAddr::from((0x2001_0db8_u128 << 96 | source << 64).to_be_bytes());
            let slot = connections.take_slot(Class::Handshake, Some(address)).unwrap();
            kept.extend(slot.move_to(Class::Anonymous));
        }
        assert_eq!(kept.len(), ANONYMOUS_CONNECTIONS_MAX, "the rest had to go, and left no place taken");
        let node = connections.take_slot(Class::Handshake, Some(ip("192.0.2.1"))).unwrap();
        assert!(node.move_to(Class::Known).is_some());
        assert!(connections.take_slot(Class::Known, None).is_some());
    }

    #[test]
    fn closing_a_certificate_reaches_all_of_its_connections_and_no_other() {
        let connections = Connections::default();
        let (ended, other) = (Serial([0x41; 16]), Serial([0x42; 16]));
        let tokens: Vec<_> = (0..3).map(|_| CancellationToken::new()).collect();
        let _entries = [
            connections.register(ended, tokens[0].clone()),
            connections.register(ended, tokens[1].clone()),
            connections.register(other, tokens[2].clone()),
        ];
        assert_eq!(connections.count(&[ended, other]), 3);
        connections.close(ended);
        assert_eq!(
            tokens.iter().map(CancellationToken::is_cancelled).collect::<Vec<_>>(),
            [true, true, false]
        );
    }
}
