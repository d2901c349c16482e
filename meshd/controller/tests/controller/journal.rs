use std::time::Duration;

use mesh_proto::v1 as pb;
use mesh_store::journal::Fault;
use mesh_store::{Journal as _, MemoryJournal};
use pb::ErrorCode;
use pb::audit_client::AuditClient;
use pb::tokens_client::TokensClient;

use crate::harness::{Candidate, Mesh, Running, SyncStream, code, operation, peer, within};

async fn head_seq(running: &Running) -> u64 {
    let mut fleet = pb::fleet_client::FleetClient::new(running.local().await);
    fleet.status(pb::Empty {}).await.unwrap().into_inner().head_seq
}

async fn log(running: &Running, request: pb::AuditLogRequest) -> Vec<pb::AuditEntry> {
    let mut audit = AuditClient::new(running.local().await);
    let mut stream = audit.log(request).await.unwrap().into_inner();
    let mut entries = vec![];
    while let Some(entry) = stream.message().await.unwrap() {
        entries.push(entry);
    }
    entries
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_keeps_everything() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    let token = running.plain_token().await;
    let candidate = Candidate::new("alpha");
    let enrolled = candidate.enroll(running.stranger().await, &token).await.unwrap();
    let open = running.plain_token().await;
    let crls = async |running: &Running| {
        let mut client = pb::certificates_client::CertificatesClient::new(running.local().await);
        client.crls(pb::CrlsRequest::default()).await.unwrap().into_inner().crls
    };
    let before = (log(&running, pb::AuditLogRequest::default()).await, crls(&running).await);
    running.stop().await.unwrap();

    let running = mesh.start().await;
    let after = (log(&running, pb::AuditLogRequest::default()).await, crls(&running).await);
    // A start adds its own certificates to the log, and nothing else.
    assert_eq!(after.0[..before.0.len()], before.0);
    let added: Vec<_> = after.0[before.0.len()..].iter().map(|entry| entry.action.as_str()).collect();
    assert_eq!(added, ["controller.certify", "ocsp.certify"]);
    assert_eq!(before.1, after.1, "the same CRLs, not new ones");
    let again = candidate.enroll(running.stranger().await, &token).await.unwrap();
    assert_eq!(again.leaf, enrolled.leaf);
    Candidate::new("bravo").enroll(running.stranger().await, &open).await.unwrap();
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_audit_log_names_who_did_what_and_is_verified() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    running.enroll("alpha").await;
    let entries = log(&running, pb::AuditLogRequest::default()).await;
    let actions: Vec<_> = entries.iter().map(|entry| entry.action.as_str()).collect();
    assert_eq!(
        actions,
        [
            "mesh.create",
            "controller.certify",
            "ocsp.certify",
            "crl.issue",
            "crl.issue",
            "token.create",
            "node.enroll"
        ]
    );
    assert_eq!(entries[5].actor, "local root");
    assert!(entries[6].detail.contains("alpha"), "{:?}", entries[6]);
    assert!(entries.windows(2).all(|pair| pair[0].seq + 1 == pair[1].seq && pair[0].time <= pair[1].time));
    let last_two = log(&running, pb::AuditLogRequest { limit: 2, ..Default::default() }).await;
    assert_eq!(last_two, entries[5..]);
    let since = log(&running, pb::AuditLogRequest { since: entries[0].time, ..Default::default() }).await;
    assert_eq!(since, entries);
    let future = pb::AuditLogRequest { since: entries[0].time + 3600, ..Default::default() };
    assert!(log(&running, future).await.is_empty());

    let mut audit = AuditClient::new(running.local().await);
    let follow = pb::AuditLogRequest { follow: true, limit: 1, ..Default::default() };
    let mut stream = audit.log(follow).await.unwrap().into_inner();
    assert_eq!(stream.message().await.unwrap().unwrap(), entries[6]);
    running.plain_token().await;
    let next = within(Duration::from_secs(5), "the next entry", stream.message()).await.unwrap().unwrap();
    assert_eq!(next.action, "token.create");

    let verified = audit.verify(pb::Empty {}).await.unwrap().into_inner();
    assert!(verified.intact, "{verified:?}");
    assert_eq!((verified.first_seq, verified.last_seq), (1, next.seq));
    assert_eq!(verified.head_hash, next.hash);
    running.stop().await.unwrap();
}

/// What nobody may do leaves a line, and known callers leave it in the journal.
#[tokio::test(flavor = "multi_thread")]
async fn refusals_of_known_callers_are_recorded() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    let alpha = running.enroll("alpha").await;
    let mut nodes = pb::nodes_client::NodesClient::new(running.member(&alpha.identity).await);
    for _ in 0..3 {
        assert_eq!(code(&nodes.list(pb::Empty {}).await.unwrap_err()), ErrorCode::Denied);
    }
    // Stopping writes down what was counted.
    running.stop().await.unwrap();
    let running = mesh.start().await;
    let entries = log(&running, pb::AuditLogRequest::default()).await;
    let denied = entries.iter().find(|entry| entry.action == "denials.record").expect("a record");
    assert!(denied.detail.contains("node alpha refused Nodes/List 3 times"), "{}", denied.detail);
    running.stop().await.unwrap();
}

/// The records of the mesh's making, in a journal that fails on demand.
async fn failing_journal(mesh: &Mesh) -> MemoryJournal {
    let mut memory = MemoryJournal::new();
    let store = mesh_store::Store::open(mesh.state_dir(), mesh_store::StoreOptions::default()).unwrap();
    for record in store.journal.read(1) {
        let record = record.unwrap();
        let encoded = mesh_store::EncodedRecord {
            op_id: record.op_id,
            time_secs: record.time_secs,
            bytes: record.bytes,
        };
        let head = memory.head();
        memory.append(&head, &[encoded]).unwrap();
    }
    memory
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_refuses_changes_and_nothing_else() {
    let mesh = Mesh::init();
    let journal = failing_journal(&mesh).await;
    let faults = journal.faults();
    let running = mesh.start_with(Some(Box::new(journal))).await;
    let alpha = running.enroll("alpha").await;
    let (mut stream, full) = SyncStream::of(&running, &alpha).await;
    let token = running.plain_token().await;
    let before = head_seq(&running).await;

    faults.push(Fault::Full);
    let candidate = Candidate::new("bravo");
    let refused = candidate.ask(running.stranger().await, &token).await.unwrap_err();
    assert_eq!(code(&refused), ErrorCode::DiskFull);
    assert_eq!(refused.code(), tonic::Code::ResourceExhausted);
    assert_eq!(head_seq(&running).await, before, "nothing was changed");
    let mut nodes = pb::nodes_client::NodesClient::new(running.local().await);
    assert_eq!(nodes.list(pb::Empty {}).await.unwrap().into_inner().nodes.len(), 1);

    // There is room again: the same request goes through, with the token unspent.
    let bravo = candidate.enroll(running.stranger().await, &token).await.unwrap();
    let delta = stream.delta().await;
    assert_eq!(delta.from, full.cursor);
    assert_eq!(peer(&delta.upserts[0]).leaf, bravo.leaf);
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_sync_ends_the_controller_and_the_next_one_knows_the_outcome() {
    for (fault, kept) in [(Fault::UnknownAfterPersisting, true), (Fault::UnknownBeforePersisting, false)] {
        let mesh = Mesh::init();
        let journal = failing_journal(&mesh).await;
        let (faults, disk) = (journal.faults(), journal.reopen());
        let running = mesh.start_with(Some(Box::new(journal))).await;
        let token = running.plain_token().await;
        let candidate = Candidate::new("alpha");
        faults.push(fault);
        let asked = candidate.ask(running.stranger().await, &token).await;
        assert!(asked.is_err(), "what may not be on disk is not acknowledged");
        let ended = within(Duration::from_secs(10), "the end", running.ended()).await;
        assert!(ended.is_err(), "{fault:?}");

        // The index beside it belongs to the journal in memory, which the state directory knows nothing of.
        std::fs::remove_dir_all(mesh.state_dir().join("index")).unwrap();
        let running = mesh.start_with(Some(Box::new(disk))).await;
        let mut nodes = pb::nodes_client::NodesClient::new(running.local().await);
        let count = nodes.list(pb::Empty {}).await.unwrap().into_inner().nodes.len();
        assert_eq!(count, usize::from(kept), "{fault:?}");
        // Either way the repeated request ends with one node.
        candidate.enroll(running.stranger().await, &token).await.unwrap();
        assert_eq!(nodes.list(pb::Empty {}).await.unwrap().into_inner().nodes.len(), 1);
        running.stop().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operation_is_done_once() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    running.enroll("alpha").await;
    let mut nodes = pb::nodes_client::NodesClient::new(running.local().await);
    let tag = pb::TagNodeRequest {
        name: "alpha".into(),
        add: vec!["web".into()],
        operation_id: operation().into(),
        ..Default::default()
    };
    assert!(nodes.tag(tag.clone()).await.unwrap().into_inner().changed);
    let head = head_seq(&running).await;
    assert!(!nodes.tag(tag.clone()).await.unwrap().into_inner().changed);
    assert_eq!(head_seq(&running).await, head);
    let other =
        pb::RevokeNodeRequest { name: "alpha".into(), operation_id: tag.operation_id, ..Default::default() };
    assert_eq!(code(&nodes.revoke(other).await.unwrap_err()), ErrorCode::Usage);
    let mut tokens = TokensClient::new(running.local().await);
    let malformed = pb::CreateTokenRequest { operation_id: vec![1, 2, 3].into(), ..Default::default() };
    assert_eq!(code(&tokens.create(malformed).await.unwrap_err()), ErrorCode::Usage);
    running.stop().await.unwrap();
}

/// A start reads the newest snapshot and what follows it; without one it reads everything, to the same end.
#[tokio::test(flavor = "multi_thread")]
async fn a_start_from_a_snapshot_and_one_from_the_journal_end_the_same() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    let mut creating = tokio::task::JoinSet::new();
    for _ in 0..64 {
        let mut tokens = TokensClient::new(running.local().await);
        creating.spawn(async move {
            for _ in 0..65 {
                tokens.create(pb::CreateTokenRequest::default()).await.unwrap();
            }
        });
    }
    creating.join_all().await;
    running.enroll("alpha").await;
    running.stop().await.unwrap();

    let snapshots = || {
        let entries = std::fs::read_dir(mesh.state_dir().join("journal")).unwrap();
        let paths = entries.map(|entry| entry.unwrap().path());
        paths.filter(|path| path.to_string_lossy().contains("snapshot-")).collect::<Vec<_>>()
    };
    assert_eq!(snapshots().len(), 1);
    let seen = async || {
        let running = mesh.start().await;
        let mut tokens = TokensClient::new(running.local().await);
        let tokens = tokens.list(pb::Empty {}).await.unwrap().into_inner().tokens;
        let mut nodes = pb::nodes_client::NodesClient::new(running.local().await);
        let nodes = nodes.list(pb::Empty {}).await.unwrap().into_inner().nodes;
        running.stop().await.unwrap();
        (tokens, nodes)
    };
    let from_snapshot = seen().await;
    assert_eq!(from_snapshot.0.len(), 64 * 65 + 1);
    let mut bytes = std::fs::read(&snapshots()[0]).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&snapshots()[0], bytes).unwrap();
    assert_eq!(seen().await, from_snapshot);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_remembers_who_was_seen_when() {
    let mesh = Mesh::init();
    let running = mesh.start().await;
    let alpha = running.enroll("alpha").await;
    let (stream, _) = SyncStream::of(&running, &alpha).await;
    drop(stream);
    running.stop().await.unwrap();
    let running = mesh.start().await;
    let mut nodes = pb::nodes_client::NodesClient::new(running.local().await);
    let node = nodes.list(pb::Empty {}).await.unwrap().into_inner().nodes.remove(0);
    assert!(node.last_seen > 0 && !node.connected, "{node:?}");
    assert_eq!(node.state, "offline");
    running.stop().await.unwrap();
}
