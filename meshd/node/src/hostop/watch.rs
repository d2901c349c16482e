//! What other programs do to the host's network, noticed as soon as it is done.

use std::time::Duration;

use bytes::BytesMut;
use futures::FutureExt as _;
use rtnetlink::sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use rtnetlink::sys::{AsyncSocket as _, AsyncSocketExt as _, SocketAddr, TokioSocket};
use tokio::sync::watch;

/// `RTNLGRP_LINK`, `RTNLGRP_IPV4_IFADDR`, `RTNLGRP_IPV4_ROUTE`, `RTNLGRP_IPV6_IFADDR`, `RTNLGRP_IPV6_ROUTE`,
/// rtnetlink(7).
const NETWORK_GROUPS: u32 = group(1) | group(5) | group(7) | group(9) | group(11);
/// `NFNLGRP_NFTABLES`, linux/netfilter/nfnetlink.h.
const FIREWALL_GROUPS: u32 = group(7);
/// `NFNL_SUBSYS_NFTABLES`, the same file.
const SUBSYSTEM_NFTABLES: u16 = 10;

/// One change of a program's is many messages: they are waited for.
const NETWORK_SETTLES: Duration = Duration::from_millis(50);
const FIREWALL_SETTLES: Duration = Duration::from_millis(10);
/// Two looks are at least this far apart, however much goes on.
const GAP: Duration = Duration::from_millis(500);

/// One datagram of the kernel's; larger ones are cut, and count as a change all the same.
const DATAGRAM_BYTES: usize = 32 * 1024;

/// Counters that rise with each change. They stand still for ever where the kernel lets nobody listen; the
/// regular look at the host remains.
#[derive(Debug, Clone)]
pub(crate) struct Changes {
    /// Links, addresses and routes, whoever changed them.
    pub(crate) network: watch::Receiver<u64>,
    /// Our firewall table, whoever changed it.
    pub(crate) firewall: watch::Receiver<u64>,
}

impl Changes {
    /// Listens until all receivers are dropped. Must be called inside a runtime.
    pub(crate) fn listen(table: &'static str) -> Self {
        let network = follow(NETLINK_ROUTE, NETWORK_GROUPS, NETWORK_SETTLES, |_| true);
        let about_table = move |datagram: &[u8]| speaks_of(datagram, table);
        let firewall = follow(NETLINK_NETFILTER, FIREWALL_GROUPS, FIREWALL_SETTLES, about_table);
        Self { network, firewall }
    }
}

const fn group(number: u32) -> u32 {
    1 << (number - 1)
}

fn follow(
    protocol: isize,
    groups: u32,
    settles: Duration,
    matters: impl Fn(&[u8]) -> bool + Send + Sync + 'static,
) -> watch::Receiver<u64> {
    let (changes, receiver) = watch::channel(0);
    match subscribe(protocol, groups) {
        Ok(socket) => drop(tokio::spawn(pump(socket, settles, matters, changes))),
        Err(error) => {
            tracing::warn!(%error, "changes of the host are seen late");
            // Kept alive, so that nobody takes silence for an end.
            tokio::spawn(async move { changes.closed().await });
        }
    }
    receiver
}

fn subscribe(protocol: isize, groups: u32) -> std::io::Result<TokioSocket> {
    let mut socket = TokioSocket::new(protocol)?;
    socket.socket_mut().bind(&SocketAddr::new(0, groups))?;
    Ok(socket)
}

async fn pump(
    socket: TokioSocket,
    settles: Duration,
    matters: impl Fn(&[u8]) -> bool,
    changes: watch::Sender<u64>,
) {
    let mut buffer = BytesMut::with_capacity(DATAGRAM_BYTES);
    loop {
        let first = tokio::select! {
            () = changes.closed() => return,
            first = receive(&socket, &mut buffer, &matters) => first,
        };
        match first {
            Ok(true) => {}
            Ok(false) => continue,
            Err(error) => return tracing::warn!(%error, "changes of the host are no longer seen"),
        }
        tokio::time::sleep(settles).await;
        // The rest of the same change. An error shows again at the next receive.
        while let Some(Ok(_)) = receive(&socket, &mut buffer, &matters).now_or_never() {}
        changes.send_modify(|count| *count += 1);
        tokio::time::sleep(GAP).await;
    }
}

/// Takes one datagram; whether it matters.
async fn receive(
    socket: &TokioSocket,
    buffer: &mut BytesMut,
    matters: &impl Fn(&[u8]) -> bool,
) -> std::io::Result<bool> {
    buffer.clear();
    buffer.reserve(DATAGRAM_BYTES);
    match socket.recv(buffer).await {
        Ok(()) => Ok(buffer.len() >= DATAGRAM_BYTES || matters(buffer)),
        // More came than the kernel keeps for us: something in it may have mattered.
        Err(error) if error.raw_os_error() == Some(nix::libc::ENOBUFS) => Ok(true),
        Err(error) => Err(error),
    }
}

/// Whether one of the nftables messages in `datagram` names `table`: in those about tables, chains, rules, sets
/// and elements attribute 1 is the table's name. What cannot be read counts as a yes.
fn speaks_of(datagram: &[u8], table: &str) -> bool {
    let mut rest = datagram;
    while rest.len() >= 16 {
        let length = u32::from_ne_bytes([rest[0], rest[1], rest[2], rest[3]]) as usize;
        let kind = u16::from_ne_bytes([rest[4], rest[5]]);
        let Some(message) = rest.get(..length).filter(|message| message.len() >= 16) else { return true };
        if kind >> 8 == SUBSYSTEM_NFTABLES && names(message.get(20..).unwrap_or_default(), table) {
            return true;
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    false
}

/// Whether attribute 1 is `table`.
fn names(mut attributes: &[u8], table: &str) -> bool {
    while attributes.len() >= 4 {
        let length = usize::from(u16::from_ne_bytes([attributes[0], attributes[1]]));
        // The two high bits are flags.
        let kind = u16::from_ne_bytes([attributes[2], attributes[3]]) & 0x3fff;
        let Some(attribute) = attributes.get(..length).filter(|attribute| attribute.len() >= 4) else {
            return true;
        };
        if kind == 1 {
            return attribute[4..].strip_suffix(&[0]).unwrap_or(&attribute[4..]) == table.as_bytes();
        }
        attributes = attributes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{in_own_network, run};

    fn message(kind: u16, attributes: &[(u16, &[u8])]) -> Vec<u8> {
        let mut body = vec![0; 4];
        for (kind, value) in attributes {
            body.extend(u16::try_from(value.len() + 4).unwrap().to_ne_bytes());
            body.extend(kind.to_ne_bytes());
            body.extend(*value);
            body.resize(body.len().next_multiple_of(4), 0);
        }
        let mut bytes = u32::try_from(body.len() + 16).unwrap().to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend(body);
        bytes
    }

    #[test]
    fn only_our_table_counts() {
        let nft = |attributes: &[(u16, &[u8])]| message(SUBSYSTEM_NFTABLES << 8 | 2, attributes);
        let ours = nft(&[(2, b"\x01\0\0\0"), (1, b"meshd\0")]);
        let theirs = nft(&[(1, b"kube-proxy\0"), (3, b"meshd\0")]);
        let longer = nft(&[(1, b"meshd2\0")]);
        assert!(speaks_of(&ours, "meshd"));
        assert!(!speaks_of(&theirs, "meshd"));
        assert!(!speaks_of(&longer, "meshd"));
        assert!(speaks_of(&[theirs.clone(), longer, ours].concat(), "meshd"));
        assert!(!speaks_of(&message(0x0102, &[(1, b"meshd\0")]), "meshd"), "another subsystem");
        assert!(speaks_of(&theirs[..30], "meshd"), "what is cut may have named it");
    }

    proptest::proptest! {
        /// Whatever bytes arrive, reading them ends; a first message of no possible length counts as ours, and nothing
        /// behind a message about our table hides it.
        #[test]
        fn reading_ends(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200)) {
            let said = speaks_of(&bytes, "meshd");
            if let Some((length, _)) = bytes.split_first_chunk().filter(|_| bytes.len() >= 16) {
                let fits = (16..=bytes.len()).contains(&(u32::from_ne_bytes(*length) as usize));
                proptest::prop_assert!(said || fits);
            }
            let ours = message(SUBSYSTEM_NFTABLES << 8 | 2, &[(1, b"meshd\0")]);
            proptest::prop_assert!(speaks_of(&[ours, bytes].concat(), "meshd"));
        }
    }

    #[test]
    fn changes_are_noticed_and_foreign_tables_are_not() {
        in_own_network("hostop::watch::tests::changes_are_noticed_and_foreign_tables_are_not", || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let mut changes = Changes::listen("meshd");
                let noticed = async |which: &mut watch::Receiver<u64>| {
                    tokio::time::timeout(Duration::from_secs(20), which.changed()).await.unwrap().unwrap();
                };
                run("nft", &["add", "table", "inet", "meshd"]);
                noticed(&mut changes.firewall).await;
                run("nft", &["add", "table", "inet", "theirs"]);
                run("nft", &["add", "chain", "inet", "theirs", "meshd"]);
                run("ip", &["link", "add", "left", "type", "veth", "peer", "name", "right"]);
                noticed(&mut changes.network).await;
                assert!(!changes.firewall.has_changed().unwrap(), "foreign tables are nobody's business");
                run("ip", &["address", "add", "192.0.2.1/24", "dev", "left"]);
                noticed(&mut changes.network).await;
                run("nft", &["flush", "ruleset"]);
                noticed(&mut changes.firewall).await;
            });
        });
    }
}
