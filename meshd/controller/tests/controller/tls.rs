use std::sync::Arc;

use mesh_proto::v1 as pb;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::harness::{Mesh, client_config};

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
