//! A node speaks for itself alone, whatever it writes into its messages.

use mesh_ca::{Csr, LeafKey, TrustAnchors, TrustDomain, Usage, VerifiedLeaf, verify_chain};
use mesh_proto::v1 as pb;
use mesh_tests::{Fleet, fleet_test};
use pb::{
    certificates_client::CertificatesClient, enrollment_client::EnrollmentClient,
    renewal_client::RenewalClient, revoke_certificate_request::Which, sync_client::SyncClient,
    sync_request as ask, sync_response as told,
};
use rustls_pki_types::CertificateDer;
use tonic::{Code, Status, transport::Channel};

use crate::{
    credential::{Credential, DOMAIN, client_config, decoded, identity_file},
    rpc::{channel, controller, error_code, on_host, operation},
};

fn refused<T: std::fmt::Debug>(what: &str, answer: Result<T, Status>) -> pb::ErrorCode {
    match answer {
        Ok(answer) => panic!("{what} was done: {answer:?}"),
        Err(status) => {
            // A refusal with its reason, not an accident of ours.
            let accidents = [Code::Internal, Code::Unknown, Code::Unimplemented, Code::Unavailable];
            assert!(!accidents.contains(&status.code()), "{what}: {status:?}");
            assert_ne!(error_code(&status), pb::ErrorCode::Unspecified, "{what}: {status:?}");
            error_code(&status)
        }
    }
}

/// What `chain`, leaf first and root last, says.
fn leaf<D: AsRef<[u8]>>(chain: &[D]) -> VerifiedLeaf {
    let ders: Vec<_> = chain.iter().map(|der| CertificateDer::from(der.as_ref())).collect();
    let anchors = TrustAnchors::new(TrustDomain::parse(DOMAIN).unwrap(), ders.last()).expect("a root");
    let now = time::UtcDateTime::now();
    verify_chain(&ders[0], &ders[1..], &anchors, now, Usage::Any, None).expect("a leaf of this mesh")
}

fn csr(params: impl FnOnce(&mut rcgen::CertificateParams)) -> bytes::Bytes {
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    let mut request = rcgen::CertificateParams::default();
    request.distinguished_name = rcgen::DistinguishedName::new();
    params(&mut request);
    request.serialize_request(&key).unwrap().der().to_vec().into()
}

fn named(sans: Vec<rcgen::SanType>) -> bytes::Bytes {
    csr(|request| request.subject_alt_names = sans)
}

fn plain() -> bytes::Bytes {
    csr(|_| {})
}

fn uri(path: &str) -> rcgen::SanType {
    rcgen::SanType::URI(format!("spiffe://{DOMAIN}{path}").try_into().unwrap())
}

fn dns(name: &str) -> rcgen::SanType {
    rcgen::SanType::DnsName(name.try_into().unwrap())
}

/// Everything of bravo that alpha could write into a message.
struct Bravo {
    id: u32,
    addresses: (std::net::IpAddr, std::net::IpAddr),
    serial: bytes::Bytes,
    wireguard: bytes::Bytes,
    pair_serial: bytes::Bytes,
    pair_key_hash: bytes::Bytes,
}

#[test]
fn with_the_names_and_numbers_of_another_node() {
    fleet_test("bodies::with_the_names_and_numbers_of_another_node", || {
        let mut fleet = Fleet::with_nodes(&["alpha", "bravo", "charlie"]);
        let out = fleet.path("bravo").join("tls");
        let pair_name = format!("db.bravo.{DOMAIN}");
        fleet.meshctl("bravo", &["cert", "issue", &pair_name, "--out", out.to_str().unwrap()]).ok();
        let pair = leaf(&Credential::of_pair(&out).chain);
        let own = leaf(&Credential::of_node(&fleet, "bravo").chain);
        let bravo = Bravo {
            id: u32::try_from(identity_file(&fleet, "bravo")["node_id"].as_u64().unwrap()).unwrap(),
            addresses: fleet.addresses("bravo"),
            serial: own.serial.as_bytes().to_vec().into(),
            wireguard: own.wireguard_keys[0].to_vec().into(),
            pair_serial: pair.serial.as_bytes().to_vec().into(),
            pair_key_hash: pair.key_hash.to_vec().into(),
        };
        let own_wireguard = leaf(&Credential::of_node(&fleet, "alpha").chain).wireguard_keys[0];
        let before = fleet.controller(&["node", "show", "bravo", "-o", "json"]).ok().json();

        let alpha = Credential::of_node(&fleet, "alpha");
        let (address, config) = (controller(&fleet), client_config(&fleet, Some(&alpha)));
        let token = crate::join::open(&fleet.token(&["--name", "delta"]));
        let (bravo, token) = (&bravo, &token);
        on_host(&fleet, "alpha", || async move {
            let channel = channel(address, config).await.unwrap();
            issues_for_itself_alone(&channel, bravo).await;
            reads_and_revokes_its_own_alone(&channel, bravo).await;
            renews_itself_alone(&channel, bravo, own_wireguard).await;
            // A node's certificate does not help a token along, nor the other way round.
            let request = crate::join::request(token, "bravo", &LeafKey::generate().unwrap());
            let enrolled = EnrollmentClient::new(channel.clone()).enroll(request).await;
            assert_eq!(refused("enrolling as bravo", enrolled), pb::ErrorCode::Denied);
        });
        reports_about_itself_alone(&fleet, bravo);

        let after = fleet.controller(&["node", "show", "bravo", "-o", "json"]).ok().json();
        for key in ["serial", "ipv4", "ipv6", "name", "state", "wireguardPublicKey", "tags", "endpoints"] {
            assert_eq!(before.pointer(&format!("/{key}")), after.pointer(&format!("/{key}")), "{key}");
            let item = format!("/item/{key}");
            assert_eq!(before.pointer(&item), after.pointer(&item), "{key}");
        }
        fleet.meshctl("bravo", &["cert", "renew", &pair_name]).ok();
        fleet.wait_meshed(&["bravo", "charlie"]);
    });
}

async fn issues_for_itself_alone(channel: &Channel, bravo: &Bravo) {
    let mut client = CertificatesClient::new(channel.clone());
    let ask = |names: &[&str], csr: bytes::Bytes| pb::IssueRequest {
        csr,
        names: names.iter().map(ToString::to_string).collect(),
        profile: "peer".into(),
        ttl_secs: 0,
        operation_id: operation(),
        restart: true,
    };
    let (v4, v6) = (bravo.addresses.0.to_string(), bravo.addresses.1.to_string());
    let mine = "web.alpha.mesh.internal";
    for names in [
        &["bravo.mesh.internal"][..],
        &["db.bravo.mesh.internal"],
        &["x.bravo.mesh.internal"],
        &[mine, "x.bravo.mesh.internal"],
        &[mine, &v4],
        &[mine, &v6],
        &[&v4],
        &["mesh.internal"],
        &["controller.mesh.internal"],
        &["*.alpha.mesh.internal"],
        &["alpha.mesh.internal.example.com"],
        &["BRAVO.mesh.internal"],
        &["bravo.mesh.internal."],
        &["spiffe://mesh.internal/node/bravo"],
    ] {
        refused(&format!("issuing {names:?}"), client.issue(ask(names, plain())).await);
    }
    for (what, sans) in [
        ("bravo's name", vec![dns("bravo.mesh.internal")]),
        ("bravo's node URI", vec![uri("/node/bravo")]),
        ("the own node URI", vec![uri("/node/alpha")]),
        ("a controller URI", vec![uri("/controller/ctl")]),
        ("an operator URI", vec![uri("/operator/alice")]),
        ("bravo's address", vec![rcgen::SanType::IpAddress(bravo.addresses.0)]),
    ] {
        let answer = client.issue(ask(&[mine], named(sans))).await;
        refused(&format!("a CSR with {what}"), answer);
    }
    for profile in ["node", "controller", "operator", "ca"] {
        let request = pb::IssueRequest { profile: profile.into(), ..ask(&[mine], plain()) };
        refused(&format!("profile {profile}"), client.issue(request).await);
    }
    // The honest request in the same words goes through, and says service of alpha.
    let issued = client.issue(ask(&[mine], plain())).await.unwrap().into_inner();
    let chain = [&[issued.leaf][..], &issued.issuers, &issued.roots].concat();
    let identity =
        leaf(&chain).identity.expect("an identity").to_spiffe(&TrustDomain::parse(DOMAIN).unwrap());
    assert!(identity.starts_with("spiffe://mesh.internal/service/alpha/"), "{identity}");
}

async fn reads_and_revokes_its_own_alone(channel: &Channel, bravo: &Bravo) {
    let mut client = CertificatesClient::new(channel.clone());
    for node in ["", "bravo", "alpha"] {
        let list =
            pb::ListCertificatesRequest { node: node.into(), include_ended: true, ..Default::default() };
        let listed = client.list(list).await.unwrap().into_inner().certificates;
        assert!(listed.iter().all(|known| known.owner == "alpha"), "asked for {node:?}: {listed:?}");
    }
    for serial in [&bravo.serial, &bravo.pair_serial] {
        let get = pb::GetCertificateRequest { serial: serial.clone() };
        refused("reading a foreign certificate", client.get(get).await);
    }
    for which in [
        Which::Serial(bravo.serial.clone()),
        Which::Serial(bravo.pair_serial.clone()),
        Which::Name("db.bravo.mesh.internal".into()),
        Which::Name("bravo.mesh.internal".into()),
        Which::KeyHash(bravo.pair_key_hash.clone()),
    ] {
        let revoke = pb::RevokeCertificateRequest {
            which: Some(which.clone()),
            operation_id: operation(),
            ..Default::default()
        };
        refused(&format!("revoking {which:?}"), client.revoke(revoke).await);
    }
}

async fn renews_itself_alone(channel: &Channel, bravo: &Bravo, own_wireguard: [u8; 32]) {
    let mut client = RenewalClient::new(channel.clone());
    let own: bytes::Bytes = own_wireguard.to_vec().into();
    let ask = |csr: bytes::Bytes, keys: Vec<bytes::Bytes>| pb::RenewRequest {
        csr,
        wireguard_public_keys: keys,
        operation_id: operation(),
    };
    let bad = [
        ("bravo's name", ask(named(vec![dns("bravo.mesh.internal")]), vec![own.clone()])),
        ("bravo's URI", ask(named(vec![uri("/node/bravo")]), vec![own.clone()])),
        ("a controller's URI", ask(named(vec![uri("/controller/ctl")]), vec![own.clone()])),
        (
            "bravo's address",
            ask(named(vec![rcgen::SanType::IpAddress(bravo.addresses.0)]), vec![own.clone()]),
        ),
        ("bravo's WireGuard key", ask(plain(), vec![bravo.wireguard.clone()])),
        ("bravo's as the second", ask(plain(), vec![own.clone(), bravo.wireguard.clone()])),
        (
            "three keys",
            ask(plain(), vec![own.clone(), crate::join::wireguard_key(), crate::join::wireguard_key()]),
        ),
        ("no key", ask(plain(), vec![])),
        ("the same key twice", ask(plain(), vec![own.clone(), own.clone()])),
    ];
    for (what, request) in bad {
        for (resume, word) in [(false, "renewing"), (true, "resuming")] {
            let answer = match resume {
                false => client.renew(request.clone()).await,
                true => client.resume(request.clone()).await,
            };
            refused(&format!("{word} with {what}"), answer);
        }
    }
}

/// What charlie says about endpoints is charlie's, and an acknowledgement from the future changes nothing for bravo.
fn reports_about_itself_alone(fleet: &Fleet, bravo: &Bravo) {
    let charlie = Credential::of_node(fleet, "charlie");
    let (address, config) = (controller(fleet), client_config(fleet, Some(&charlie)));
    let claimed = "198.51.100.77:4242";
    let roster = on_host(fleet, "charlie", || async move {
        let channel = channel(address, config).await.unwrap();
        let (say, heard) = tokio::sync::mpsc::channel(4);
        let mut answers = SyncClient::new(channel)
            .sync(tokio_stream::wrappers::ReceiverStream::new(heard))
            .await
            .unwrap()
            .into_inner();
        let hello = ask::Hello {
            endpoints: vec![pb::Endpoint { address: claimed.into(), source: 2 }],
            version: "test".into(),
            ..Default::default()
        };
        say.send(pb::SyncRequest { request: Some(ask::Request::Hello(hello)) }).await.unwrap();
        let ack = ask::Ack { seq: u64::MAX, ..Default::default() };
        say.send(pb::SyncRequest { request: Some(ask::Request::Ack(ack)) }).await.unwrap();
        loop {
            let answer = answers.message().await.unwrap().expect("a map");
            if let Some(told::Response::Full(full)) = answer.response {
                return full;
            }
        }
    });
    assert!(roster.read_peers().any(|peer| peer.unwrap().node_id == bravo.id), "charlie sees bravo");
    let shown = fleet.controller(&["node", "show", "bravo", "-o", "json"]).ok();
    assert!(!shown.stdout.contains(claimed), "{shown}");
}

#[test]
fn a_csr_made_of_another_nodes_key_is_not_had() {
    fleet_test("bodies::a_csr_made_of_another_nodes_key_is_not_had", || {
        let fleet = Fleet::with_nodes(&["alpha", "bravo"]);
        let alpha = Credential::of_node(&fleet, "alpha");
        // Even with bravo's key in hand: a key belongs to one owner.
        let stolen = LeafKey::from_pkcs8_der(&decoded(&identity_file(&fleet, "bravo")["tls_key"])).unwrap();
        let (address, config) = (controller(&fleet), client_config(&fleet, Some(&alpha)));
        on_host(&fleet, "alpha", || async move {
            let channel = channel(address, config).await.unwrap();
            let issue = pb::IssueRequest {
                csr: Csr::create(&stolen).unwrap().into(),
                names: vec!["web.alpha.mesh.internal".into()],
                profile: "peer".into(),
                operation_id: operation(),
                ..Default::default()
            };
            let answer = CertificatesClient::new(channel).issue(issue).await;
            assert_eq!(refused("a pair with bravo's key", answer), pb::ErrorCode::KeyInUse);
        });
    });
}
