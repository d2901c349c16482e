//! The relay, by its stream and by UDP: whom it serves, whom it does not, and when it ends.

use std::net::SocketAddr;
use std::time::Duration;

use mesh_core::relay::{Codec, Direction, Frame, Key, SessionId};
use mesh_proto::v1 as pb;
use pb::relay_response::{Grant, Response};
use tokio::net::UdpSocket;

use crate::harness::{Mesh, Node, Running, operation, within};

const PATIENCE: Duration = Duration::from_secs(10);

/// A node's relay session, driven by hand.
struct Session {
    requests: tokio::sync::mpsc::Sender<pb::RelayRequest>,
    responses: tonic::Streaming<pb::RelayResponse>,
    grant: Grant,
    codec: Codec,
    udp: UdpSocket,
    server: SocketAddr,
    counter: u32,
}

impl Session {
    async fn open(running: &Running, node: &Node) -> Self {
        let (requests, outgoing) = tokio::sync::mpsc::channel(16);
        let outgoing = tokio_stream::wrappers::ReceiverStream::new(outgoing);
        let mut client = pb::relay_client::RelayClient::new(running.member(&node.identity).await);
        let mut responses = client.open(outgoing).await.unwrap().into_inner();
        let first = within(PATIENCE, "a grant", responses.message()).await.unwrap().unwrap();
        let Some(Response::Grant(grant)) = first.response else { panic!("{first:?}") };
        let key = Key::new((&*grant.key).try_into().unwrap());
        let codec = Codec::new(SessionId::of(grant.session), &key);
        let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let server = SocketAddr::new(running.address.ip(), grant.udp_port.try_into().unwrap());
        Self { requests, responses, grant, codec, udp, server, counter: 0 }
    }

    async fn send(&self, to: &Node, datagram: &[u8]) {
        let request = pb::RelayRequest { node_id: to.id(), datagram: datagram.to_vec().into() };
        self.requests.send(request).await.unwrap();
    }

    /// The next datagram on the stream and whom it is from; `None` at its end.
    async fn next(&mut self) -> Option<(u32, Vec<u8>)> {
        match within(PATIENCE, "a message", self.responses.message()).await {
            Ok(Some(pb::RelayResponse { response: Some(Response::Datagram(datagram)) })) => {
                Some((datagram.node_id, datagram.datagram.to_vec()))
            }
            Ok(Some(other)) => panic!("{other:?}"),
            Ok(None) | Err(_) => None,
        }
    }

    fn frame(&mut self, peer: u32, datagram: &[u8]) -> Vec<u8> {
        self.counter += 1;
        let frame = Frame { counter: self.counter, peer, datagram };
        self.codec.seal(Direction::ToController, frame).unwrap()
    }

    async fn send_frame(&mut self, peer: u32, datagram: &[u8]) {
        let frame = self.frame(peer, datagram);
        self.udp.send_to(&frame, self.server).await.unwrap();
    }

    /// The next frame by UDP: whom it is from and what it carries.
    async fn next_frame(&mut self) -> (u32, Vec<u8>) {
        let mut bytes = [0; 2048];
        let (length, from) = within(PATIENCE, "a frame", self.udp.recv_from(&mut bytes)).await.unwrap();
        assert_eq!(from, self.server);
        let frame = self.codec.open(Direction::ToNode, &bytes[..length]).unwrap();
        (frame.peer, frame.datagram.to_vec())
    }

    /// Lets the controller know that UDP gets through.
    async fn greet(&mut self) {
        self.send_frame(0, &[]).await;
        assert_eq!(self.next_frame().await, (0, vec![]));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn datagrams_go_between_stream_and_udp_in_every_combination() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    let (alpha, bravo) = (running.enroll("alpha").await, running.enroll("bravo").await);
    let mut a = Session::open(&running, &alpha).await;
    let mut b = Session::open(&running, &bravo).await;
    assert_eq!(a.grant.bytes_per_second, 4 << 20);
    a.send(&bravo, b"stream to stream").await;
    assert_eq!(b.next().await, Some((alpha.id(), b"stream to stream".to_vec())));

    a.greet().await;
    b.send(&alpha, b"stream to udp").await;
    assert_eq!(a.next_frame().await, (bravo.id(), b"stream to udp".to_vec()));
    a.send_frame(bravo.id(), b"udp to stream").await;
    assert_eq!(b.next().await, Some((alpha.id(), b"udp to stream".to_vec())));
    b.greet().await;
    a.send_frame(bravo.id(), b"udp to udp").await;
    assert_eq!(b.next_frame().await, (alpha.id(), b"udp to udp".to_vec()));
    // What does not fit one packet takes the stream all the same.
    a.send_frame(bravo.id(), &[7; 1500]).await;
    assert_eq!(b.next().await, Some((alpha.id(), vec![7; 1500])));

    // Once more the same frame, a frame with a wrong tag, one of another session, one thrown back: nothing.
    let once = a.frame(bravo.id(), b"once");
    let mut forged = a.frame(bravo.id(), b"forged");
    *forged.last_mut().unwrap() ^= 1;
    let stranger = Codec::new(SessionId::of(a.grant.session ^ 1), &Key::new([0; 32]));
    let foreign = Frame { counter: 99, peer: bravo.id(), datagram: b"foreign" };
    let foreign = stranger.seal(Direction::ToController, foreign).unwrap();
    for frame in [&once, &once, &forged, &foreign] {
        a.udp.send_to(frame, a.server).await.unwrap();
    }
    a.send_frame(bravo.id(), b"last").await;
    assert_eq!(b.next_frame().await, (alpha.id(), b"once".to_vec()));
    assert_eq!(b.next_frame().await, (alpha.id(), b"last".to_vec()));
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn only_peers_that_policy_joins_are_served_and_a_revoked_node_at_once_no_more() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    let (alpha, bravo) = (running.enroll("alpha").await, running.enroll("bravo").await);
    let charlie = running.enroll("charlie").await;
    let mut a = Session::open(&running, &alpha).await;
    let mut b = Session::open(&running, &bravo).await;
    let mut c = Session::open(&running, &charlie).await;
    a.greet().await;
    let mut policy = pb::policy_client::PolicyClient::new(running.local().await);
    let toml = "[[allow]]\nfrom = [\"node:alpha\"]\nto = [\"node:bravo\"]\n";
    policy.apply(pb::PolicyDocument { toml: toml.into(), ..Default::default() }).await.unwrap();
    a.send_frame(charlie.id(), b"denied").await;
    c.send(&alpha, b"denied").await;
    c.send(&bravo, b"denied").await;
    a.send_frame(bravo.id(), b"allowed").await;
    assert_eq!(b.next().await, Some((alpha.id(), b"allowed".to_vec())));
    b.send(&alpha, b"and back").await;
    assert_eq!(a.next_frame().await, (bravo.id(), b"and back".to_vec()));

    let mut nodes = pb::nodes_client::NodesClient::new(running.local().await);
    let revoke = pb::RevokeNodeRequest {
        name: "alpha".into(),
        reason: "key-compromise".into(),
        operation_id: operation().into(),
        ..Default::default()
    };
    nodes.revoke(revoke).await.unwrap();
    // By UDP it still can send: nobody listens, in either direction.
    a.send_frame(bravo.id(), b"revoked").await;
    within(Duration::from_secs(1), "the end of its stream", async { while a.next().await.is_some() {} })
        .await;
    b.send(&alpha, b"to a revoked one").await;
    drop(b.requests);
    assert!(within(PATIENCE, "the end", b.responses.message()).await.unwrap().is_none(), "nothing came");
    let silent = tokio::time::timeout(Duration::from_millis(1), a.udp.recv_from(&mut [0; 64])).await;
    assert!(silent.is_err(), "nothing was sent to the revoked node");
    drop(c.requests);
    assert!(within(PATIENCE, "the end", c.responses.message()).await.unwrap().is_none(), "nothing came");
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_gets_no_more_than_its_limit_and_a_relay_can_be_off() {
    let mesh = Mesh::init();
    let running = mesh
        .start_as(|config| config.relay = Some(mesh_controller::RelayLimit { bytes_per_second: 1 }))
        .await;
    let (alpha, bravo) = (running.enroll("alpha").await, running.enroll("bravo").await);
    let a = Session::open(&running, &alpha).await;
    let mut b = Session::open(&running, &bravo).await;
    // The burst is 256 KiB: 28 datagrams of 9,216 bytes, and one of 4,096.
    for number in 0..40 {
        a.send(&bravo, &[number; 9216]).await;
    }
    a.send(&bravo, &[99; 16]).await;
    let mut last = None;
    while last != Some((alpha.id(), vec![99; 16])) {
        last = b.next().await;
        let (_, datagram) = last.as_ref().expect("the stream goes on");
        assert!(datagram[0] < 28 || datagram[0] == 99, "{} is over the limit", datagram[0]);
    }
    running.stop().await.unwrap();

    let running = mesh.start_as(|config| config.relay = None).await;
    let mut client = pb::relay_client::RelayClient::new(running.member(&alpha.identity).await);
    let refused = client.open(tokio_stream::empty()).await.unwrap_err();
    assert_eq!(crate::harness::code(&refused), pb::ErrorCode::Denied);
    running.stop().await.unwrap();
}
