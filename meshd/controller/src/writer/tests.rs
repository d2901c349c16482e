use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::mpsc;

use mesh_core::policy::STARTER_POLICY;
use mesh_core::{CaRecord, DnsName, KeyId, TokenId};
use mesh_runtime::{Clock as _, ManualClock};
use mesh_store::journal::{Fault, Faults};
use mesh_store::{JournalReader, MemoryJournal};
use time::UtcDateTime;

use super::*;

/// A journal that tells of each append, and lets the test say when it may go on.
struct Gated {
    inner: MemoryJournal,
    appends: mpsc::Sender<usize>,
    go: mpsc::Receiver<()>,
}

impl Journal for Gated {
    fn head(&self) -> Head {
        self.inner.head()
    }

    fn append(&mut self, expected: &Head, records: &[EncodedRecord]) -> Result<Append, AppendError> {
        self.appends.send(records.len()).unwrap();
        self.go.recv().unwrap();
        self.inner.append(expected, records)
    }

    fn reader(&self) -> Box<dyn JournalReader> {
        self.inner.reader()
    }
}

struct Fixture {
    writer: Writer,
    directory: Arc<Directory>,
    clock: Arc<ManualClock>,
    fatal: ShutdownToken,
    faults: Faults,
    /// A second handle on what the journal keeps.
    disk: MemoryJournal,
    appends: Mutex<mpsc::Receiver<usize>>,
    go: mpsc::Sender<()>,
}

fn create_mesh() -> Command {
    Command::CreateMesh {
        mesh_id: [1; 16],
        journal_id: [2; 16],
        fleet: "test".into(),
        domain: DnsName::try_from("mesh.internal").unwrap(),
        controller_name: "ctl-1".into(),
        ipv4_pool: "100.64.0.0/10".parse().unwrap(),
        cas: [true, false]
            .map(|is_root| CaRecord {
                key_id: KeyId(vec![u8::from(is_root); 20]),
                der: vec![1],
                is_root,
                sealed: false,
            })
            .into(),
        starter_policy: STARTER_POLICY.into(),
    }
}

fn request(command: Command) -> Request {
    Request { actor: Actor::LocalRoot, operation: OperationId(mesh_runtime::random_bytes()), command }
}

fn token(id: u8, clock: &ManualClock) -> Command {
    Command::CreateToken {
        id: TokenId([id; 8]),
        secret_hash: [id; 32],
        tags: BTreeSet::new(),
        name: None,
        uses: 1,
        expires_at: UtcTime::from(clock.utc_now()) + Duration::from_secs(600),
        require_approval: false,
    }
}

impl Fixture {
    /// A mesh that exists, before its writer has written anything.
    fn new() -> Self {
        let clock = Arc::new(ManualClock::new(UtcDateTime::from_unix_timestamp(1_795_363_200).unwrap()));
        let mut inner = MemoryJournal::new();
        let mut world = World::new();
        let first = request(create_mesh());
        let at = clock.utc_now().into();
        let changes = world.decide(at, &first).unwrap().changes();
        let record = world.record(at, &first, changes);
        inner.append(&Head::EMPTY, &[encode_record(&record).unwrap()]).unwrap();
        world.apply(1, &record);
        let (faults, disk, head) = (inner.faults(), inner.reopen(), inner.head());
        let directory = Arc::new(Directory::new(world, head));
        let (appends, told) = mpsc::channel();
        let (go, gate) = mpsc::channel();
        let fatal = ShutdownToken::new();
        let parts = WriterParts {
            journal: Box::new(Gated { inner, appends, go: gate }),
            directory: Arc::clone(&directory),
            clock: clock.clone(),
            fatal: fatal.clone(),
        };
        let (writer, _) = Writer::start(parts).unwrap();
        Self { writer, directory, clock, fatal, faults, disk, appends: Mutex::new(told), go }
    }

    fn submit(&self, command: Command) -> tokio::task::JoinHandle<Result<Committed, WriteError>> {
        let (writer, request) = (self.writer.clone(), request(command));
        tokio::spawn(async move { writer.submit(request).await })
    }

    /// Records in the next append, which now waits to be let on.
    fn appending(&self) -> usize {
        self.appends.lock().unwrap().recv().unwrap()
    }

    fn token_count(&self) -> usize {
        self.directory.read(|world| world.tokens().count())
    }
}

/// Commands in the queue, whatever the thread does meanwhile.
async fn queued(handles: &[tokio::task::JoinHandle<Result<Committed, WriteError>>]) {
    // The tasks run on this thread's runtime: after a yield each has sent its command and waits.
    for _ in 0..=handles.len() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn what_waits_while_a_frame_is_synced_becomes_the_next_frame() {
    let fixture = Fixture::new();
    let first = fixture.submit(token(1, &fixture.clock));
    queued(std::slice::from_ref(&first)).await;
    assert_eq!(fixture.appending(), 1);
    let waiting: Vec<_> = (2..=50).map(|id| fixture.submit(token(id, &fixture.clock))).collect();
    queued(&waiting).await;
    assert_eq!(fixture.token_count(), 0, "nothing is visible before it is on disk");
    assert!(!first.is_finished(), "nor answered");

    fixture.go.send(()).unwrap();
    assert_eq!(first.await.unwrap().unwrap().seq, 2);
    assert_eq!(fixture.appending(), 49, "one frame for all that waited");
    assert_eq!(fixture.token_count(), 1);
    fixture.go.send(()).unwrap();
    let mut seqs = BTreeSet::new();
    for handle in waiting {
        seqs.insert(handle.await.unwrap().unwrap().seq);
    }
    assert_eq!(seqs, (3..=51).collect());
    assert_eq!(fixture.token_count(), 50);
}

/// A lost count would make every later frame wait for company that never comes.
#[tokio::test]
async fn an_announced_command_counts_until_its_preparation_ends_however_it_ends() {
    let fixture = Fixture::new();
    let coming = |fixture: &Fixture| fixture.writer.coming.load(Ordering::Acquire);
    let (sent, refused) = (fixture.writer.announce(), fixture.writer.clone().announce());
    assert_eq!(coming(&fixture), 2);
    drop(sent);
    let panicked = std::thread::spawn(move || {
        let _refused = refused;
        panic!("a preparation that panics");
    });
    assert!(panicked.join().is_err());
    assert_eq!(coming(&fixture), 0);
}

/// A refusal may rest on a command of the same frame; if that one is lost, so is the refusal.
#[tokio::test]
async fn a_full_disk_takes_the_whole_frame_back() {
    let fixture = Fixture::new();
    let first = fixture.submit(token(1, &fixture.clock));
    queued(std::slice::from_ref(&first)).await;
    fixture.appending();
    let frame = vec![fixture.submit(token(2, &fixture.clock)), fixture.submit(token(2, &fixture.clock))];
    queued(&frame).await;
    fixture.faults.push(Fault::None);
    fixture.faults.push(Fault::Full);
    fixture.go.send(()).unwrap();
    first.await.unwrap().unwrap();
    assert_eq!(fixture.appending(), 1, "the second token has the same id and is refused");
    fixture.go.send(()).unwrap();
    for handle in frame {
        assert!(matches!(handle.await.unwrap(), Err(WriteError::DiskFull)));
    }
    assert_eq!(fixture.token_count(), 1);

    let again = fixture.submit(token(2, &fixture.clock));
    queued(std::slice::from_ref(&again)).await;
    fixture.appending();
    fixture.go.send(()).unwrap();
    assert_eq!(again.await.unwrap().unwrap().seq, 3, "no sequence number was lost");
    assert!(!fixture.fatal.is_cancelled());
}

#[tokio::test]
async fn a_record_of_another_writer_is_taken_up_before_deciding_again() {
    let fixture = Fixture::new();
    let mut other = fixture.disk.reopen();
    let theirs = {
        let request = request(token(7, &fixture.clock));
        let at = fixture.clock.utc_now().into();
        fixture.directory.read(|world| {
            let changes = world.decide(at, &request).unwrap().changes();
            encode_record(&world.record(at, &request, changes)).unwrap()
        })
    };
    let head = other.head();
    other.append(&head, &[theirs]).unwrap();

    let (same, own) = (fixture.submit(token(7, &fixture.clock)), fixture.submit(token(8, &fixture.clock)));
    for _ in 0..8 {
        fixture.go.send(()).unwrap();
    }
    let own = own.await.unwrap().unwrap();
    assert_eq!(own.seq, 3);
    assert!(matches!(same.await.unwrap(), Err(WriteError::Refused(Refusal::TokenExists { .. }))));
    assert_eq!(fixture.token_count(), 2);
    assert_eq!(fixture.directory.head(), fixture.disk.head());
}

#[tokio::test]
async fn a_failed_sync_is_the_end() {
    let fixture = Fixture::new();
    fixture.faults.push(Fault::UnknownAfterPersisting);
    fixture.go.send(()).unwrap();
    let lost = fixture.submit(token(1, &fixture.clock)).await.unwrap();
    assert!(matches!(lost, Err(WriteError::Unknown)));
    fixture.fatal.cancelled().await;
    assert_eq!(fixture.token_count(), 0);
    let later = fixture.submit(token(2, &fixture.clock)).await.unwrap();
    assert!(matches!(later, Err(WriteError::Unknown)));
}

#[tokio::test]
async fn a_clock_that_jumps_ahead_holds_what_depends_on_it_until_confirmed() {
    let fixture = Fixture::new();
    for _ in 0..8 {
        fixture.go.send(()).unwrap();
    }
    // Time that passed on every clock, also while the machine slept, is no jump.
    fixture.clock.advance(Duration::from_secs(3 * 24 * 3600));
    fixture.submit(token(1, &fixture.clock)).await.unwrap().unwrap();

    let before = fixture.directory.read(World::last_time);
    fixture.clock.set_utc(fixture.clock.utc_now() + Duration::from_secs(3600));
    let held = fixture.submit(token(2, &fixture.clock)).await.unwrap();
    assert!(matches!(held, Err(WriteError::Refused(Refusal::ClockJump { .. }))), "{held:?}");
    assert!(fixture.directory.read(World::clock_held));
    assert!(fixture.directory.read(World::last_time) < before + Duration::from_secs(600));

    fixture.submit(Command::ConfirmClock).await.unwrap().unwrap();
    fixture.submit(token(2, &fixture.clock)).await.unwrap().unwrap();
    assert_eq!(fixture.directory.read(World::last_time), fixture.clock.utc_now().into());
}
