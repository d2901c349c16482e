//! Two peers' state machines, talking to each other without a network.

use super::*;
use crate::key::{PresharedKey, PrivateKey};
use boringtun::noise::rate_limiter::RateLimiter;
use proptest::prelude::*;

const A: ([u8; 4], u16) = ([192, 0, 2, 1], 1000);
const B: ([u8; 4], u16) = ([192, 0, 2, 2], 2000);
const ELSEWHERE: ([u8; 4], u16) = ([198, 51, 100, 3], 3000);

fn own(byte: u8) -> Identity {
    Identity::new(PrivateKey::from_bytes([byte; 32]), 100)
}

fn config(byte: u8, endpoint: Option<([u8; 4], u16)>) -> PeerConfig {
    PeerConfig {
        public_key: own(byte).public,
        preshared_key: None,
        endpoint: endpoint.map(Into::into),
        allowed_ips: Vec::new(),
        persistent_keepalive: None,
    }
}

fn buffer() -> Vec<u8> {
    vec![0; BUFFER_BYTES]
}

/// An IPv4 packet of `length` bytes.
fn packet(length: u16) -> Vec<u8> {
    let mut packet = vec![0; length.into()];
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&length.to_be_bytes());
    packet
}

/// `a` knows where `b` is; nothing was sent yet.
fn pair() -> (Peer, Peer) {
    let now = Instant::now();
    let a = Peer::new(config(2, Some(B)), &own(1), 0x10_0001, 1, now);
    let b = Peer::new(config(1, None), &own(2), 0x20_0002, 2, now);
    (a, b)
}

fn initiation(peer: &Peer) -> Vec<u8> {
    let (mut out, mut notes) = (buffer(), Notes::default());
    assert!(peer.lock().want_initiation());
    peer.lock().last_initiation = None;
    let outgoing = peer.lock().tick(&mut out, Instant::now(), &mut notes).expect("an initiation");
    assert_eq!(outgoing.length, packet::INITIATION_BYTES);
    out.truncate(outgoing.length);
    out
}

/// Lets `to` answer handshake message `message` from `from`.
fn answer(to: &Peer, message: &[u8], from: ([u8; 4], u16)) -> (Option<Vec<u8>>, Notes) {
    let (mut out, mut notes) = (buffer(), Notes::default());
    let outgoing = to.lock().handshake((message, from.into()), &mut out, Instant::now(), &mut notes);
    (outgoing.map(|outgoing| out[..outgoing.length].to_vec()), notes)
}

fn decrypt(to: &Peer, datagram: &[u8], from: ([u8; 4], u16)) -> (Received, Notes) {
    let (mut out, mut notes) = (buffer(), Notes::default());
    (to.lock().decrypt((datagram, from.into()), &mut out, Instant::now(), &mut notes), notes)
}

fn encrypt(peer: &Peer, packet: &[u8]) -> Option<Vec<u8>> {
    let mut out = buffer();
    match peer.lock().encrypt(packet, &mut out, Instant::now()) {
        Sent::Send(outgoing) | Sent::Began { first: outgoing, .. } => Some(out[..outgoing.length].to_vec()),
        _ => None,
    }
}

fn connect(a: &Peer, b: &Peer) {
    let (response, notes) = answer(b, &initiation(a), A);
    assert!(!notes.handshake_done, "an initiation proves nothing about our answer");
    let (keepalive, notes) = answer(a, &response.unwrap(), B);
    assert!(notes.handshake_done);
    let (received, notes) = decrypt(b, &keepalive.unwrap(), A);
    assert_eq!(received, Received::Keepalive);
    assert!(notes.handshake_done);
}

#[test]
fn both_sides_learn_of_a_handshake_when_it_is_proved() {
    let (a, b) = pair();
    connect(&a, &b);
    let datagram = encrypt(&a, &packet(100)).unwrap();
    let (received, notes) = decrypt(&b, &datagram, A);
    assert!(matches!(received, Received::Packet { length: 100, .. }));
    assert_eq!(notes, Notes::default());
    assert_eq!(b.lock().stats(b.key, Instant::now()).endpoint, Some(A.into()));
}

#[test]
fn the_session_the_peer_uses_counts_even_if_it_asked_again_meanwhile() {
    let (a, b) = pair();
    let first = initiation(&a);
    let (response, _) = answer(&b, &first, A);
    let (late_response, _) = answer(&b, &initiation(&a), A);
    let (keepalive, _) = answer(&a, &response.unwrap(), B);
    let (_, notes) = decrypt(&b, &keepalive.unwrap(), A);
    assert!(notes.handshake_done);
    let (keepalive, _) = answer(&a, &late_response.unwrap(), B);
    let (_, notes) = decrypt(&b, &keepalive.unwrap(), A);
    assert!(notes.handshake_done);
}

#[test]
fn only_authentic_messages_move_the_endpoint() {
    let (a, b) = pair();
    connect(&a, &b);
    let datagram = encrypt(&a, &packet(100)).unwrap();
    let mut forged = datagram.clone();
    *forged.last_mut().unwrap() ^= 1;
    assert_eq!(decrypt(&b, &forged, ELSEWHERE), (Received::Invalid, Notes::default()));
    let (_, notes) = decrypt(&b, &datagram, ELSEWHERE);
    assert_eq!(notes.moved_to, Some(ELSEWHERE.into()));
    // A replay from yet another place changes nothing.
    assert_eq!(decrypt(&b, &datagram, A), (Received::Invalid, Notes::default()));
    assert_eq!(b.lock().endpoint, Some(ELSEWHERE.into()));
}

#[test]
fn a_cookie_reply_does_not_move_the_endpoint() {
    let (a, _) = pair();
    let initiation = initiation(&a);
    // What the other side's limiter answers when it is under load from the first message on.
    let limiter = RateLimiter::new(&own(2).public.to_x25519(), 0);
    let mut cookie = [0; packet::COOKIE_REPLY_BYTES];
    let reply = limiter.verify_packet(Some(std::net::Ipv4Addr::LOCALHOST.into()), &initiation, &mut cookie);
    assert!(matches!(reply, Err(TunnResult::WriteToNetwork(_))));
    let (sent, notes) = answer(&a, &cookie, ELSEWHERE);
    assert_eq!((sent, notes), (None, Notes::default()));
    assert_eq!(a.lock().endpoint, Some(B.into()));
    assert_eq!(a.lock().rx_bytes, 0);
}

#[test]
fn packets_wait_in_order_until_a_session_is_in_use() {
    let (a, b) = pair();
    let initiation = encrypt(&a, &packet(20)).expect("the first packet starts a handshake");
    for length in 21..30 {
        assert_eq!(encrypt(&a, &packet(length)), None);
    }
    let mut out = buffer();
    assert_eq!(a.lock().next_waiting(&mut out, Instant::now()), None);
    let (response, _) = answer(&b, &initiation, A);
    let (keepalive, notes) = answer(&a, &response.unwrap(), B);
    assert!(notes.backlog_ready);
    decrypt(&b, &keepalive.unwrap(), A);
    for length in 20..30 {
        let outgoing = a.lock().next_waiting(&mut out, Instant::now()).expect("a waiting packet");
        let (received, _) = decrypt(&b, &out[..outgoing.length], A);
        assert!(matches!(received, Received::Packet { length: l, .. } if l == length));
    }
    assert_eq!(a.lock().next_waiting(&mut out, Instant::now()), None);
}

#[test]
fn what_waits_is_bounded_by_bytes_and_the_newest_stay() {
    let (a, b) = pair();
    let initiation = encrypt(&a, &packet(20)).expect("the first packet starts a handshake");
    let mut dropped_in_all = 0;
    for length in 60_000..60_010 {
        match a.lock().encrypt(&packet(length), &mut buffer(), Instant::now()) {
            Sent::Queued { dropped } => dropped_in_all += dropped,
            other => panic!("{other:?}"),
        }
    }
    let fit = WAITING_BYTES_MAX / (60_009 + PACKET_COST);
    assert_eq!(dropped_in_all, 11 - fit);
    let (response, _) = answer(&b, &initiation, A);
    let (keepalive, _) = answer(&a, &response.unwrap(), B);
    decrypt(&b, &keepalive.unwrap(), A);
    let mut out = buffer();
    let mut lengths = Vec::new();
    while let Some(outgoing) = a.lock().next_waiting(&mut out, Instant::now()) {
        lengths.push(outgoing.length - packet::DATA_OVERHEAD);
    }
    assert_eq!(lengths, (60_010 - fit..60_010).collect::<Vec<_>>());
    // Many small ones are bounded by their number.
    a.lock().renew(&own(1), Instant::now());
    for _ in 0..2 * WAITING_MAX {
        encrypt(&a, &packet(20));
    }
    assert_eq!(a.lock().waiting.len(), WAITING_MAX);
}

#[test]
fn updates_keep_the_session_unless_the_preshared_key_changes() {
    let (a, b) = pair();
    connect(&a, &b);
    let now = Instant::now();
    let keepalive = PeerConfig {
        persistent_keepalive: Some(Duration::from_millis(1500)),
        allowed_ips: vec!["10.0.0.0/8".parse().unwrap()],
        ..config(2, Some(B))
    };
    assert_eq!(keepalive.keepalive(), Some(Duration::from_secs(2)));
    a.lock().update(keepalive.clone(), &own(1), now);
    assert!(a.lock().has_session());
    let psk = PeerConfig { preshared_key: Some(PresharedKey::from_bytes([3; 32])), ..keepalive };
    a.lock().update(psk.clone(), &own(1), now);
    assert!(!a.lock().has_session());
    a.lock().update(psk, &own(1), now);
}

#[test]
fn a_removed_peer_neither_speaks_nor_hears() {
    let (a, b) = pair();
    connect(&a, &b);
    let datagram = encrypt(&a, &packet(100)).unwrap();
    let late = initiation(&a);
    b.lock().remove();
    assert_eq!(decrypt(&b, &datagram, A).0, Received::Invalid);
    assert_eq!(answer(&b, &late, A).0, None);
    assert_eq!(encrypt(&b, &packet(100)), None);
    let mut notes = Notes::default();
    assert_eq!(b.lock().tick(&mut buffer(), Instant::now(), &mut notes), None);
}

#[test]
fn keepalives_are_sent_at_their_interval_and_a_dead_handshake_is_tried_again() {
    let (a, b) = pair();
    let mut out = buffer();
    let with_keepalive =
        PeerConfig { persistent_keepalive: Some(Duration::from_secs(25)), ..config(2, Some(B)) };
    a.lock().update(with_keepalive, &own(1), Instant::now());
    connect(&a, &b);
    let start = a.lock().last_tx;
    assert_eq!(a.lock().own_timers(&mut out, start + Duration::from_millis(24_900)), None);
    let sent = a.lock().own_timers(&mut out, start + Duration::from_secs(25));
    assert_eq!(sent, Some(packet::DATA_OVERHEAD));

    // Once boringtun has given up, the next attempt comes after a pause that grows.
    a.lock().renew(&own(1), start);
    assert!(std::mem::take(&mut a.lock().initiation_wanted), "a peer that was up is greeted at once");
    let mut pauses = Vec::new();
    let mut now = start;
    for _ in 0..8 {
        a.lock().gave_up(now);
        a.lock().gave_up(now);
        let until = a.lock().retry_at;
        assert_eq!(a.lock().own_timers(&mut out, until - Duration::from_millis(1)), None);
        pauses.push(until - now);
        a.lock().gave_up = false;
        now = until;
    }
    assert!(pauses[0] >= RETRY_FIRST / 2 && pauses[0] <= RETRY_FIRST, "{pauses:?}");
    assert!(pauses[7] >= RETRY_LAST / 2 && pauses[7] <= RETRY_LAST, "{pauses:?}");
    let sent = a.lock().own_timers(&mut out, now);
    assert_eq!(sent, Some(packet::INITIATION_BYTES));
}

#[test]
fn silence_after_sending_is_noticed_once_and_ends_with_an_answer() {
    let (a, b) = pair();
    connect(&a, &b);
    encrypt(&a, &packet(100)).unwrap();
    let mut notes = Notes::default();
    let later = Instant::now() + SILENCE;
    a.lock().notice_silence(later, &mut notes);
    assert!(notes.silent);
    let mut notes = Notes::default();
    a.lock().notice_silence(later, &mut notes);
    assert!(!notes.silent);
    decrypt(&a, &encrypt(&b, &packet(40)).unwrap(), B);
    encrypt(&a, &packet(100)).unwrap();
    a.lock().notice_silence(later + SILENCE, &mut notes);
    assert!(notes.silent);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever arrives on a session, of whatever size up to the largest datagram, is refused quietly.
    #[test]
    fn no_datagram_makes_it_panic(
        seed in any::<u64>(), kind in 1..=4_u8, length in 0..=packet::DATAGRAM_MAX, counter in any::<u64>(),
    ) {
        let (a, b) = pair();
        connect(&a, &b);
        let mut bytes = vec![0; length];
        rand::RngCore::fill_bytes(&mut <rand::rngs::StdRng as rand::SeedableRng>::seed_from_u64(seed), &mut bytes);
        if length >= 16 {
            bytes[..4].copy_from_slice(&[kind, 0, 0, 0]);
            let session = b.index << 8 | 1;
            bytes[4..8].copy_from_slice(&session.to_le_bytes());
            bytes[8..16].copy_from_slice(&counter.to_le_bytes());
        }
        prop_assert_eq!(decrypt(&b, &bytes, ELSEWHERE), (Received::Invalid, Notes::default()));
        let (sent, notes) = answer(&b, &bytes, ELSEWHERE);
        prop_assert_eq!((sent, notes), (None, Notes::default()));
        prop_assert!(encrypt(&a, &packet(1400)).is_some());
    }

    /// Packets of every length go through, also those that boringtun needs slack for.
    #[test]
    fn every_length_survives(length in 20..=65_400_u16) {
        let (a, b) = pair();
        connect(&a, &b);
        let (received, _) = decrypt(&b, &encrypt(&a, &packet(length)).unwrap(), A);
        let survived = matches!(received, Received::Packet { length: l, .. } if l == usize::from(length));
        prop_assert!(survived);
    }
}
