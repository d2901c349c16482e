use std::sync::Arc;
use std::time::Duration;

use mesh_proto::v1 as pb;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::harness::{Mesh, SyncStream, client_config, within};

/// A resumed session carries no certificate: with one, a revoked client could come back.
#[tokio::test(flavor = "multi_thread")]
async fn no_session_is_ever_resumed() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    let alpha = running.enroll("alpha").await;
    // The client keeps every ticket it is given, and both connections share the store.
    let config = Arc::new(client_config(running.anchors(), Some(&alpha.identity), &mesh.clock));
    for round in 0..3 {
        let connector = tokio_rustls::TlsConnector::from(Arc::clone(&config));
        let stream = TcpStream::connect(running.address).await.unwrap();
        let name = ServerName::try_from("controller").unwrap();
        let mut stream = connector.connect(name, stream).await.unwrap();
        // The server's first frame comes after any ticket it would send.
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
        assert!(stream.read(&mut [0; 64]).await.unwrap() > 0);
        let (_, session) = stream.get_ref();
        assert_eq!(session.handshake_kind(), Some(rustls::HandshakeKind::Full), "round {round}");
        assert_eq!(session.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
        assert_eq!(session.tls13_tickets_received(), 0, "round {round}");
        let group = session.negotiated_key_exchange_group().unwrap();
        assert_eq!(group.name(), rustls::NamedGroup::X25519MLKEM768);
        assert_eq!(session.alpn_protocol(), Some(&b"h2"[..]));
    }
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn noise_on_the_port_disturbs_nobody() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 4096], &[0x16, 3, 1, 0xff, 0xff], b""] {
        let mut stream = TcpStream::connect(running.address).await.unwrap();
        // The controller may close before all of it is written.
        let _ = stream.write_all(bytes).await;
    }
    running.enroll("alpha").await;
    let mut unknown = tonic::client::Grpc::new(running.local().await);
    unknown.ready().await.unwrap();
    let path = "/mesh.v1.Nodes/Drop".parse().unwrap();
    let codec = tonic_prost::ProstCodec::<pb::Empty, pb::Empty>::default();
    let refused = unknown.unary(tonic::Request::new(pb::Empty {}), path, codec).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::Unimplemented);
    running.stop().await.unwrap();
}

/// Whoever connects and says nothing is gone after the handshake's limit, and in nobody's way before.
#[tokio::test(flavor = "multi_thread")]
async fn silent_connections_are_closed() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    let mut silent = vec![];
    for _ in 0..200 {
        silent.push(TcpStream::connect(running.address).await.unwrap());
    }
    running.enroll("alpha").await;
    let closed = async {
        for mut stream in silent {
            assert_eq!(stream.read(&mut [0; 1]).await.unwrap_or(0), 0);
        }
    };
    within(Duration::from_secs(15), "the end of silent connections", closed).await;
    running.stop().await.unwrap();
}

/// A node that talks without end is slowed down, and its peers are not.
#[tokio::test(flavor = "multi_thread")]
async fn a_chatty_node_waits_its_turn() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    let (alpha, bravo) = (running.enroll("alpha").await, running.enroll("bravo").await);
    let (chatty, _) = SyncStream::of(&running, &alpha).await;
    let (mut other, _) = SyncStream::of(&running, &bravo).await;
    let flood = tokio::spawn(async move {
        for _ in 0..10 {
            for port in 1..=u16::MAX {
                let endpoint = pb::Endpoint { address: format!("192.0.2.1:{port}"), source: 1 };
                let endpoints = pb::sync_request::Endpoints { endpoints: vec![endpoint], seen: vec![] };
                chatty.send(pb::sync_request::Request::Endpoints(endpoints)).await;
            }
        }
    });
    running.enroll("charlie").await;
    let delta = within(Duration::from_secs(5), "a delta", other.delta()).await;
    assert_eq!(delta.upserts.len(), 1);
    assert!(!flood.is_finished(), "the windows of the stream fill up");
    flood.abort();
    running.stop().await.unwrap();
}

/// Strangers have places of their own: when those are taken the next stranger is sent away, and a node from
/// the same address is not.
#[tokio::test(flavor = "multi_thread")]
async fn strangers_cannot_keep_a_node_out() {
    const STRANGERS_PER_SOURCE: usize = 100;
    let mesh = Mesh::init();
    let running = mesh.start().await;
    let alpha = running.enroll("alpha").await;
    let tls = tokio_rustls::TlsConnector::from(Arc::new(client_config(running.anchors(), None, &mesh.clock)));
    let connect = async || {
        let stream = TcpStream::connect(running.address).await.unwrap();
        let name = ServerName::try_from("controller").unwrap();
        let mut stream = tls.connect(name, stream).await.unwrap();
        // The first frame of the server's HTTP/2 comes once the connection has its place.
        let served = stream.read_exact(&mut [0; 9]).await.is_ok();
        (stream, served)
    };
    let patience = Duration::from_secs(20);
    let mut kept = Vec::new();
    let fill = async {
        while kept.len() <= STRANGERS_PER_SOURCE {
            match connect().await {
                (stream, true) => kept.push(stream),
                (_, false) => return,
            }
        }
        panic!("strangers are never refused");
    };
    within(patience, "the end of the places for strangers", fill).await;
    assert!(kept.len() > STRANGERS_PER_SOURCE / 2, "{}", kept.len());
    let (_, full) = SyncStream::of(&running, &alpha).await;
    assert!(full.peers.is_empty());
    drop(kept);
    let again = async { while !connect().await.1 {} };
    within(patience, "a place for a stranger", again).await;
    running.stop().await.unwrap();
}
