//! Every connection proves itself anew: nothing to resume is ever handed out.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use mesh_tests::{CONTROLLER, Fleet, fleet_test};
use rustls::{
    HandshakeKind, NamedGroup,
    client::{ClientSessionStore, Resumption, Tls12ClientSessionValue, Tls13ClientSessionValue},
};
use rustls_pki_types::ServerName;
use tokio::io::AsyncReadExt as _;

use crate::{
    credential::{Credential, client_config},
    rpc::{call_empty, channel, controller, on_host},
};

/// A client that would resume if it could, and counts what it could resume with.
#[derive(Debug, Default)]
struct Eager {
    tickets: AtomicUsize,
    kept: std::sync::Mutex<Vec<Tls13ClientSessionValue>>,
}

impl ClientSessionStore for Eager {
    fn set_kx_hint(&self, _: ServerName<'static>, _: NamedGroup) {}

    fn kx_hint(&self, _: &ServerName<'_>) -> Option<NamedGroup> {
        None
    }

    fn set_tls12_session(&self, _: ServerName<'static>, _: Tls12ClientSessionValue) {
        self.tickets.fetch_add(1, Ordering::Relaxed);
    }

    fn tls12_session(&self, _: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        None
    }

    fn remove_tls12_session(&self, _: &ServerName<'static>) {}

    fn insert_tls13_ticket(&self, _: ServerName<'static>, ticket: Tls13ClientSessionValue) {
        self.tickets.fetch_add(1, Ordering::Relaxed);
        self.kept.lock().unwrap().push(ticket);
    }

    fn take_tls13_ticket(&self, _: &ServerName<'static>) -> Option<Tls13ClientSessionValue> {
        self.kept.lock().unwrap().pop()
    }
}

#[test]
fn no_ticket_is_handed_out_and_the_second_handshake_is_full() {
    fleet_test("resumption::no_ticket_is_handed_out_and_the_second_handshake_is_full", || {
        let fleet = Fleet::with_nodes(&["alpha"]);
        let node = Credential::of_node(&fleet, "alpha");
        let eager = Arc::new(Eager::default());
        let mut config = client_config(&fleet, Some(&node));
        config.resumption = Resumption::store(eager.clone());
        config.enable_early_data = true;
        let address = controller(&fleet);
        on_host(&fleet, "alpha", || async move {
            for attempt in 0..3 {
                let connector = tokio_rustls::TlsConnector::from(Arc::new(config.clone()));
                let tcp = tokio::net::TcpStream::connect(address).await.unwrap();
                let name = ServerName::try_from("controller").unwrap();
                let mut stream = connector.connect(name, tcp).await.unwrap();
                // The server's first HTTP/2 frame comes after any ticket would.
                let mut settings = [0; 9];
                stream.read_exact(&mut settings).await.unwrap();
                let (_, session) = stream.get_ref();
                assert_eq!(session.handshake_kind(), Some(HandshakeKind::Full), "connection {attempt}");
                assert!(!session.is_early_data_accepted());
            }
            // And over a whole call.
            let channel = channel(address, config).await.unwrap();
            assert!(!call_empty(&channel, "/mesh.v1.Certificates/Crls").await.is_denied());
        });
        assert_eq!(eager.tickets.load(Ordering::Relaxed), 0, "the controller hands out session tickets");

        // A judge of another house, which saves what it is given.
        let saved = fleet.path(CONTROLLER).join("session");
        let seen = fleet.on(
            "alpha",
            "openssl",
            &[
                "s_client",
                "-connect",
                &fleet.controller_url(),
                "-tls1_3",
                "-alpn",
                "h2",
                "-sess_out",
                saved.to_str().unwrap(),
            ],
        );
        assert!(seen.stdout.contains("New, TLSv1.3"), "{seen}");
        assert!(!seen.stdout.contains("TLS session ticket:"), "{seen}");
        for version in ["-tls1_2", "-tls1_1"] {
            let old =
                fleet.on("alpha", "openssl", &["s_client", "-connect", &fleet.controller_url(), version]);
            assert_ne!(old.code, 0, "{old}");
        }
    });
}
