use std::net::UdpSocket;
use std::sync::Arc;

use super::*;
use crate::receive::Received;
use crate::tunnel::Offloads;
use crate::udp::Settings;

fn add(outbox: &mut Outbox, bytes: &[u8], to: SocketAddr, tos: u8, fragment: Fragment) {
    outbox.room(fragment)[..bytes.len()].copy_from_slice(bytes);
    outbox.add(&Outgoing { length: bytes.len(), to, is_data: true }, tos, fragment);
}

/// Counts and sizes of the batches.
fn shape(outbox: &Outbox) -> Vec<(usize, usize)> {
    outbox.batches.iter().map(|batch| (batch.count, batch.size)).collect()
}

const A: ([u8; 4], u16) = ([10, 0, 0, 1], 1);
const B: ([u8; 4], u16) = ([10, 0, 0, 1], 2);

#[test]
fn a_batch_holds_what_one_message_may() {
    let mut outbox = Outbox::new();
    let mut put = |length: usize, to: ([u8; 4], u16), tos| {
        add(&mut outbox, &vec![0; length], to.into(), tos, Fragment::No);
        shape(&outbox)
    };
    assert_eq!(put(100, A, 2), [(1, 100)]);
    assert_eq!(put(100, A, 2), [(2, 100)]);
    assert_eq!(put(100, B, 2), [(2, 100), (1, 100)], "another address");
    assert_eq!(put(101, B, 2)[1..], [(1, 100), (1, 101)], "a longer one");
    assert_eq!(put(101, B, 0)[2..], [(1, 101), (1, 101)], "another type of service");
    assert_eq!(put(60, B, 0)[3..], [(2, 101)], "a shorter one is the last");
    assert_eq!(put(60, B, 0)[3..], [(2, 101), (1, 60)]);
    for count in 2..=BATCH_DATAGRAMS {
        assert_eq!(put(60, B, 0)[4..], [(count, 60)]);
    }
    assert_eq!(put(60, B, 0)[4..], [(BATCH_DATAGRAMS, 60), (1, 60)]);
    let mut outbox = Outbox::new();
    for _ in 0..46 {
        add(&mut outbox, &[0; 1452], A.into(), 0, Fragment::No);
    }
    assert_eq!(shape(&outbox), [(45, 1452), (1, 1452)]);
}

#[test]
fn last_fragments_stay_behind_the_first_ones_and_before_whole_packets() {
    use Fragment::{First, Last, No};

    /// Kinds and lengths of packets, and counts and sizes of the batches that they make.
    type Case<'a> = (&'a [(Fragment, usize)], &'a [(usize, usize)]);
    let table: [Case<'_>; 6] = [
        (&[(First, 900), (Last, 60), (First, 900), (Last, 60)], &[(2, 900), (2, 60)]),
        (&[(No, 900), (First, 900), (Last, 60), (First, 900)], &[(3, 900), (1, 60)]),
        (&[(First, 900), (Last, 60), (No, 900)], &[(1, 900), (1, 60), (1, 900)]),
        (&[(First, 900), (Last, 60), (No, 50), (Last, 60)], &[(1, 900), (1, 60), (1, 50), (1, 60)]),
        (&[(First, 900), (Last, 60), (Last, 70), (First, 900)], &[(1, 900), (1, 60), (1, 70), (1, 900)]),
        (&[(Last, 60), (First, 900), (Last, 60)], &[(1, 60), (1, 900), (1, 60)]),
    ];
    for (packets, expected) in table {
        let mut outbox = Outbox::new();
        for (fragment, length) in packets {
            add(&mut outbox, &vec![0; *length], A.into(), 0, *fragment);
        }
        assert_eq!(shape(&outbox), expected, "{packets:?}");
    }
}

/// A pair of sockets that send, and two that receive.
fn sockets(wanted: Offloads) -> (Arc<Udp>, [UdpSocket; 2]) {
    let settings = Settings {
        port: 0,
        fwmark: None,
        queues: 1,
        wanted,
        offloads: Arc::default(),
        virtual_out: Arc::default(),
    };
    let udp = Udp::bind(&settings).unwrap().remove(0);
    (udp, ["127.0.0.1:0", "[::1]:0"].map(|local| UdpSocket::bind(local).unwrap()))
}

#[test]
fn everything_leaves_once_and_in_order_with_and_without_segmentation() {
    for wanted in [Offloads::ALL, Offloads::NONE] {
        let (udp, receivers) = sockets(wanted);
        let mut outbox = Outbox::new();
        let mut expected = [Vec::new(), Vec::new()];
        // More messages than one call takes, and batches among them that segment.
        for number in 0..60_u8 {
            let which = usize::from(number / 4 % 2);
            let datagram = vec![number; if number % 8 < 2 { 200 } else { 100 + usize::from(number) }];
            add(&mut outbox, &datagram, receivers[which].local_addr().unwrap(), 0, Fragment::No);
            expected[which].push(datagram);
        }
        assert_eq!(outbox.flush(&udp), Flushed::All);
        assert!(outbox.is_empty() && outbox.take_refused() == 0);
        for (receiver, expected) in receivers.iter().zip(expected) {
            let (mut received, mut seen) = (Received::new(), Vec::new());
            while received.receive(receiver).unwrap() > 0 {
                seen.extend(received.messages().flat_map(|(.., datagrams)| datagrams.map(<[u8]>::to_vec)));
            }
            assert_eq!(seen, expected);
        }
    }
}

#[test]
fn what_a_socket_refuses_is_counted_and_the_rest_leaves() {
    let (udp, [receiver, _]) = sockets(Offloads::ALL);
    let to = receiver.local_addr().unwrap();
    let nowhere: SocketAddr = "[100::1]:7".parse().unwrap();
    let forbidden: SocketAddr = "255.255.255.255:9".parse().unwrap();
    let mut outbox = Outbox::new();
    for to in [to, nowhere, nowhere, to, forbidden, forbidden, to] {
        add(&mut outbox, &[1; 40], to, 0, Fragment::No);
    }
    assert_eq!(outbox.flush(&udp), Flushed::All);
    // Nobody takes what is for virtual endpoints, and broadcasts need permission.
    assert_eq!(outbox.take_refused(), 4);
    assert_eq!(outbox.take_refused(), 0);
    let mut received = Received::new();
    assert_eq!(received.receive(&receiver).unwrap(), 3);
    for _ in 0..3 {
        add(&mut outbox, &[1; 40], to, 0, Fragment::No);
    }
    outbox.drop_rest();
    assert_eq!((outbox.take_refused(), outbox.is_empty()), (3, true));
}
