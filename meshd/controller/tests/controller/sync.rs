use std::time::Duration;

use mesh_proto::v1 as pb;
use pb::ErrorCode;
use pb::nodes_client::NodesClient;

use crate::harness::{Mesh, Running, SyncStream, peer, within};

fn cursor_seq(cursor: &Option<pb::Cursor>) -> u64 {
    cursor.as_ref().expect("a map has a cursor").seq
}

fn ids(entries: &[bytes::Bytes]) -> Vec<u32> {
    entries.iter().map(|entry| peer(entry).node_id).collect()
}

async fn has_finding(running: &Running, subject: &str, text: &str) -> bool {
    let mut fleet = pb::fleet_client::FleetClient::new(running.local().await);
    let findings = fleet.status(pb::Empty {}).await.unwrap().into_inner().findings;
    findings.iter().any(|finding| finding.subject == subject && finding.what.contains(text))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_that_stops_blames_nobody() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    let alpha = running.enroll("alpha").await;
    let (stream, _) = SyncStream::of(&running, &alpha).await;
    running.stop().await.unwrap();
    assert_eq!(stream.end().await, Some(ErrorCode::ControllerUnreachable));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_node_reaches_its_peers_as_a_delta_and_a_removed_one_leaves_by_one() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    let alpha = running.enroll("alpha").await;
    let (mut stream, full) = SyncStream::of(&running, &alpha).await;
    assert!(full.peers.is_empty());
    assert_eq!(full.crls.len(), 2, "issuing and root CRL");
    assert_eq!(full.own.as_ref().unwrap().policy_version, 1);

    let bravo = running.enroll("bravo").await;
    let delta = stream.delta().await;
    assert_eq!(delta.from, full.cursor);
    assert_eq!(ids(&delta.upserts), [bravo.id()]);
    assert_eq!(peer(&delta.upserts[0]).leaf, bravo.enrolled.leaf);
    assert!(peer(&delta.upserts[0]).inbound && peer(&delta.upserts[0]).outbound);
    assert!(cursor_seq(&delta.cursor) > cursor_seq(&full.cursor));

    let mut nodes = NodesClient::new(running.local().await);
    let request = pb::RevokeNodeRequest { name: "bravo".into(), ..Default::default() };
    let revoked = nodes.remove(request).await.unwrap().into_inner();
    assert!(revoked.changed && revoked.peer_removed);
    let (mut removes, mut crls) = (vec![], vec![]);
    while crls.is_empty() || removes.is_empty() {
        let delta = stream.delta().await;
        removes.extend(delta.removes);
        crls.extend(delta.crls);
    }
    assert_eq!(removes, [bravo.id()]);
    assert!(crls.iter().any(|crl| crl.number == revoked.crl_number));
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cursor_is_good_across_a_restart_and_a_forged_one_gets_everything() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    let alpha = running.enroll("alpha").await;
    let (_, full) = SyncStream::of(&running, &alpha).await;
    let bravo = running.enroll("bravo").await;
    running.stop().await.unwrap();

    let running = mesh.start().await;
    let charlie = running.enroll("charlie").await;
    let hello = |cursor: &Option<pb::Cursor>| pb::sync_request::Hello {
        cursor: cursor.clone(),
        ..Default::default()
    };
    let channel = running.member(&alpha.identity).await;
    let mut resumed = SyncStream::open(channel.clone(), hello(&full.cursor)).await.unwrap();
    let delta = resumed.delta().await;
    assert_eq!(delta.from, full.cursor);
    assert_eq!(ids(&delta.upserts), [bravo.id(), charlie.id()]);

    let own = full.cursor.clone().unwrap();
    let forged = [
        pb::Cursor { hash8: vec![0; 8].into(), ..own.clone() },
        pb::Cursor { journal_id: vec![0; 16].into(), ..own.clone() },
        pb::Cursor { incarnation: own.incarnation + 1, ..own.clone() },
        pb::Cursor { seq: own.seq + 1_000_000, ..own },
    ];
    for (number, cursor) in forged.into_iter().enumerate() {
        let mut stream = SyncStream::open(channel.clone(), hello(&Some(cursor.clone()))).await.unwrap();
        let full = stream.full().await;
        assert_eq!(ids(&full.peers), [bravo.id(), charlie.id()], "{cursor:?}");
        // Another journal is no fork of this one.
        let forked = has_finding(&running, "alpha", "not in this journal").await;
        assert_eq!(forked, matches!(number, 0 | 3), "{cursor:?}");
    }
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_policy_or_of_ones_own_tags_is_a_full_map() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    let alpha = running.enroll("alpha").await;
    let bravo = running.enroll("bravo").await;
    let (mut stream, full) = SyncStream::of(&running, &alpha).await;
    assert_eq!(ids(&full.peers), [bravo.id()]);

    let mut nodes = NodesClient::new(running.local().await);
    let tag = pb::TagNodeRequest { name: "alpha".into(), add: vec!["db".into()], ..Default::default() };
    assert!(nodes.tag(tag.clone()).await.unwrap().into_inner().changed);
    assert!(!nodes.tag(tag).await.unwrap().into_inner().changed);
    let full = stream.full().await;
    assert_eq!(full.own.unwrap().tags, ["db"]);

    let mut policy = pb::policy_client::PolicyClient::new(running.local().await);
    let only_in = "[[allow]]\nfrom = [\"node:bravo\"]\nto = [\"tag:db\"]\n";
    let document = pb::PolicyDocument { toml: only_in.into(), ..Default::default() };
    let check = policy.check(document.clone()).await.unwrap().into_inner();
    assert!(check.valid, "{check:?}");
    assert!(policy.apply(document).await.unwrap().into_inner().changed);
    let full = stream.full().await;
    assert_eq!(full.own.unwrap().policy_version, 2);
    assert!(peer(&full.peers[0]).inbound && !peer(&full.peers[0]).outbound);

    let deny_all = pb::PolicyDocument { toml: "# nothing\n".into(), ..Default::default() };
    policy.apply(deny_all).await.unwrap();
    assert!(stream.full().await.peers.is_empty());
    let broken = pb::PolicyDocument { toml: "[[allow]]\nfrom = [\"team:x\"]\n".into(), ..Default::default() };
    let check = policy.check(broken.clone()).await.unwrap().into_inner();
    assert!(!check.valid && !check.problems.is_empty());
    let refused = policy.apply(broken).await.unwrap_err();
    assert_eq!(crate::harness::code(&refused), ErrorCode::PolicyInvalid);
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn peers_hear_where_a_node_is_and_what_the_controller_saw() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    let alpha = running.enroll("alpha").await;
    let bravo = running.enroll("bravo").await;
    let (mut stream, _) = SyncStream::of(&running, &alpha).await;
    let own = stream.hints().await;
    assert_eq!(own.seen_from[0].address, "127.0.0.1:51820");
    assert_eq!(own.seen_from[0].source(), pb::endpoint::Source::ControllerSaw);

    let endpoint = |address: &str| pb::Endpoint {
        address: address.into(),
        source: pb::endpoint::Source::Interface as i32,
    };
    let inside = endpoint(&format!("{}:51820", alpha.enrolled.ipv4));
    let hello = pb::sync_request::Hello {
        wireguard_port: 4242,
        endpoints: vec![endpoint("192.0.2.7:4242"), inside, endpoint("nonsense"), endpoint("0.0.0.0:1")],
        ..Default::default()
    };
    let bravo_stream = SyncStream::open(running.member(&bravo.identity).await, hello).await.unwrap();
    let peer = |hints: pb::Hints| hints.peers.into_iter().find(|peer| peer.node_id == bravo.id());
    let heard = loop {
        if let Some(peer) = peer(stream.hints().await) {
            break peer;
        }
    };
    let addresses: Vec<_> = heard.endpoints.iter().map(|e| e.address.as_str()).collect();
    assert_eq!(addresses, ["192.0.2.7:4242", "127.0.0.1:4242"], "mesh addresses and nonsense are dropped");

    let moved = pb::sync_request::Endpoints { endpoints: vec![endpoint("192.0.2.8:4242")], seen: vec![] };
    bravo_stream.send(pb::sync_request::Request::Endpoints(moved)).await;
    let heard = peer(stream.hints().await).unwrap();
    assert_eq!(heard.endpoints[0].address, "192.0.2.8:4242");
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_streams_of_one_node_the_newest_wins() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    let alpha = running.enroll("alpha").await;
    let (older, _) = SyncStream::of(&running, &alpha).await;
    let (newer, _) = SyncStream::of(&running, &alpha).await;
    assert_eq!(older.end().await, Some(ErrorCode::Denied));
    assert!(!has_finding(&running, "alpha", "two machines").await);
    let (older, mut newer) = (newer, SyncStream::of(&running, &alpha).await.0);
    assert_eq!(older.end().await, Some(ErrorCode::Denied));
    assert!(has_finding(&running, "alpha", "two machines").await);
    running.enroll("bravo").await;
    assert_eq!(newer.delta().await.upserts.len(), 1);
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_begins_with_a_hello() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    let alpha = running.enroll("alpha").await;
    let (requests, outgoing) = tokio::sync::mpsc::channel(4);
    let outgoing = tokio_stream::wrappers::ReceiverStream::new(outgoing);
    let ack = pb::sync_request::Request::Ack(pb::sync_request::Ack::default());
    requests.send(pb::SyncRequest { request: Some(ack) }).await.unwrap();
    let mut client = pb::sync_client::SyncClient::new(running.member(&alpha.identity).await);
    let mut responses = client.sync(outgoing).await.unwrap().into_inner();
    let refused = responses.message().await.unwrap_err();
    assert_eq!(crate::harness::code(&refused), ErrorCode::Usage);
    running.stop().await.unwrap();
}

/// Many changes while nobody reads become one message with their sum, not a queue of old ones.
#[tokio::test(flavor = "multi_thread")]
async fn changes_coalesce() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    let alpha = running.enroll("alpha").await;
    let (mut stream, _) = SyncStream::of(&running, &alpha).await;
    let token = running.token(pb::CreateTokenRequest { uses: 100, ..Default::default() }).await;
    let channel = running.stranger().await;
    let mut joins = tokio::task::JoinSet::new();
    for index in 0..100 {
        let (channel, token) = (channel.clone(), token.clone());
        joins.spawn(async move {
            crate::harness::Candidate::new(&format!("n{index}")).enroll(channel, &token).await.unwrap()
        });
        if index == 0 {
            // With the first answer the client knows how many calls a connection may have at once.
            joins.join_next().await.unwrap().unwrap();
        }
    }
    assert_eq!(joins.join_all().await.len(), 99);
    let (mut peers, mut messages) = (0, 0);
    while peers < 100 {
        peers += within(Duration::from_secs(10), "all peers", stream.delta()).await.upserts.len();
        messages += 1;
    }
    assert_eq!(peers, 100);
    assert!(messages < 50, "{messages} messages for 100 changes");
    running.stop().await.unwrap();
}
