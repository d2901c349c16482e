//! The one thread that changes the mesh.
//!
//! It takes all waiting commands, decides one after the other on a World of its own, writes their
//! records as one frame, syncs once, publishes, answers. Nothing is visible or acknowledged before
//! it is on disk: not even a refusal, which may rest on a command of the same frame.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use mesh_core::{Actor, Command, Decision, OperationId, Record, Refusal, Request, UtcTime, World};
use mesh_runtime::{SharedClock, ShutdownToken};
use mesh_store::{Append, AppendError, EncodedRecord, Head, Journal, ReadError};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use crate::codec::{CodecError, decode_record, encode_record};
use crate::directory::Directory;
use crate::limits::{APPEND_ROUNDS_MAX, FRAME_COMMANDS_MAX, GATHER_TIME, WRITER_QUEUE_MAX};

/// Octets of records after which a frame is closed; a journal's own limits lie above.
const FRAME_BYTES_SOFT_MAX: usize = 4 * 1024 * 1024;
/// Commands in one frame from which on the writer waits for the longest time for more.
const CROWD: usize = 9;
/// How often the writer looks up while it gathers.
const GATHER_STEPS: u32 = 4;

/// Why a command did not take effect, or may not have.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum WriteError {
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error("the disk is full")]
    DiskFull,
    #[error("too many commands are waiting")]
    Overloaded,
    #[error("the record is too large")]
    TooLarge,
    #[error("the journal cannot be written: {0}")]
    Journal(String),
    /// The process is ending; whether the command took effect shows when it is repeated.
    #[error("the outcome is unknown")]
    Unknown,
}

/// A command that has taken effect, durably.
#[derive(Debug, Clone)]
pub(crate) struct Committed {
    /// The record that holds it.
    pub(crate) seq: u64,
    pub(crate) effect: Effect,
}

#[derive(Debug, Clone)]
pub(crate) enum Effect {
    /// This command made the record.
    Changed(Arc<Record>),
    /// An earlier one with the same meaning did; nothing new was written.
    AlreadyDone,
}

impl Committed {
    pub(crate) fn changed(&self) -> bool {
        matches!(self.effect, Effect::Changed(_))
    }

    pub(crate) fn changes(&self) -> &[mesh_core::Change] {
        match &self.effect {
            Effect::Changed(record) => &record.changes,
            Effect::AlreadyDone => &[],
        }
    }
}

/// What the thread is sent.
enum Message {
    Job(Box<Job>),
    Stop,
}

/// Where the outcome of a command goes.
pub(crate) type Answer = oneshot::Sender<Result<Committed, WriteError>>;

struct Job {
    request: Request,
    answer: Answer,
}

/// Hands commands to the writer's thread. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Writer {
    queue: SyncSender<Message>,
    coming: Arc<AtomicUsize>,
}

/// A command that is being prepared, for as long as this lives: the writer may wait for it.
#[derive(Debug)]
pub(crate) struct Coming(Arc<AtomicUsize>);

impl Drop for Coming {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}

/// What the thread is made from.
pub(crate) struct WriterParts {
    pub(crate) journal: Box<dyn Journal>,
    pub(crate) directory: Arc<Directory>,
    pub(crate) clock: SharedClock,
    /// Cancelled when the journal can no longer be trusted: the process has to end.
    pub(crate) fatal: ShutdownToken,
}

impl Writer {
    /// Starts the thread. It ends once every [`Writer`] is dropped, or with `fatal`.
    pub(crate) fn start(parts: WriterParts) -> std::io::Result<(Self, JoinHandle<()>)> {
        let (queue, jobs) = sync_channel(WRITER_QUEUE_MAX);
        let (runtime, coming) = (Handle::try_current().ok(), Arc::default());
        let writer = Self { queue, coming: Arc::clone(&coming) };
        let thread = std::thread::Builder::new().name("writer".into()).spawn(move || {
            let _guard = FatalOnPanic(parts.fatal.clone());
            Thread::new(parts, runtime).run(&jobs, &coming);
        })?;
        Ok((writer, thread))
    }

    /// Says that a command will come soon, so that others wait for its company.
    pub(crate) fn announce(&self) -> Coming {
        self.coming.fetch_add(1, Ordering::Relaxed);
        Coming(Arc::clone(&self.coming))
    }

    /// Runs a command and waits until it is durable.
    pub(crate) async fn submit(&self, request: Request) -> Result<Committed, WriteError> {
        let (answer, answered) = oneshot::channel();
        self.send(request, answer)?;
        answered.await.unwrap_or(Err(WriteError::Unknown))
    }

    /// Queues a command; `answer` hears of it once it is durable, and is dropped if the process is ending.
    ///
    /// # Errors
    /// Nothing was queued.
    pub(crate) fn send(&self, request: Request, answer: Answer) -> Result<(), WriteError> {
        self.queue.try_send(Message::Job(Box::new(Job { request, answer }))).map_err(|error| match error {
            TrySendError::Full(_) => WriteError::Overloaded,
            TrySendError::Disconnected(_) => WriteError::Unknown,
        })
    }

    /// A command of the controller itself.
    pub(crate) async fn submit_own(&self, command: Command) -> Result<Committed, WriteError> {
        let operation = OperationId(mesh_runtime::random_bytes());
        self.submit(Request { actor: Actor::Controller, operation, command }).await
    }
}

impl Writer {
    /// Ends the thread once it has answered what waits before this. Later commands are refused.
    pub(crate) fn stop(&self) {
        // A full queue or a thread that has ended already: both end by themselves.
        let _ = self.queue.send(Message::Stop);
    }
}

struct Thread {
    journal: Box<dyn Journal>,
    directory: Arc<Directory>,
    clock: SharedClock,
    fatal: ShutdownToken,
    /// What the next command is decided on: the published World and the frame being made.
    world: World,
    head: Head,
    /// The last reading of both clocks.
    reading: (UtcTime, Duration),
    /// Where those who wait for answers run.
    runtime: Option<Handle>,
}

/// A writer that has panicked can decide nothing any more: the process has to end.
struct FatalOnPanic(ShutdownToken);

impl Drop for FatalOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.cancel();
        }
    }
}

/// A frame in the making: what to write, and what to answer once it is written.
#[derive(Default)]
struct Frame {
    records: Vec<(u64, Arc<Record>)>,
    encoded: Vec<EncodedRecord>,
    bytes: usize,
    answers: Vec<(Job, Result<Committed, WriteError>)>,
}

/// What became of a frame.
enum Flushed {
    Durable,
    /// Somebody else wrote first; the commands have to be decided again.
    Again(Vec<Job>),
    /// The journal cannot be trusted any more.
    Fatal,
}

impl Thread {
    fn new(parts: WriterParts, runtime: Option<Handle>) -> Self {
        let WriterParts { journal, directory, clock, fatal } = parts;
        let world = directory.read(World::clone);
        let reading = (UtcTime::from(clock.utc_now()), clock.since_boot());
        let head = directory.head();
        Self { journal, directory, clock, fatal, world, head, reading, runtime }
    }

    fn run(mut self, jobs: &Receiver<Message>, coming: &AtomicUsize) {
        let mut company = 1;
        while let Ok(Message::Job(first)) = jobs.recv() {
            let (mut waiting, stopped) = gather(*first, jobs, company, coming);
            company = waiting.len();
            for round in 0.. {
                if waiting.is_empty() {
                    break;
                }
                if round == APPEND_ROUNDS_MAX {
                    let error = WriteError::Journal("other writers keep winning".into());
                    waiting.drain(..).for_each(|job| answer(job, Err(error.clone())));
                    break;
                }
                match self.commit(waiting) {
                    Flushed::Durable => break,
                    Flushed::Again(jobs) => waiting = jobs,
                    Flushed::Fatal => return self.fatal.cancel(),
                }
            }
            if stopped {
                return;
            }
        }
    }

    /// Decides all of `jobs` and writes them, in as many frames as their size asks for.
    fn commit(&mut self, jobs: Vec<Job>) -> Flushed {
        let mut jobs = std::collections::VecDeque::from(jobs);
        while !jobs.is_empty() {
            let mut frame = Frame::default();
            let at = self.record_time(&mut frame);
            while frame.bytes < FRAME_BYTES_SOFT_MAX {
                let Some(job) = jobs.pop_front() else { break };
                let outcome = self.decide(at, &job.request, &mut frame);
                frame.answers.push((job, outcome));
            }
            match self.flush(frame) {
                Flushed::Durable => {}
                Flushed::Again(mut again) => {
                    again.extend(jobs);
                    return Flushed::Again(again);
                }
                Flushed::Fatal => return Flushed::Fatal,
            }
        }
        Flushed::Durable
    }

    /// The time of the next records. A wall clock that ran ahead of the monotonic one is written down
    /// before anything else, and stops what depends on the time.
    fn record_time(&mut self, frame: &mut Frame) -> UtcTime {
        // The boot-time clock counts while the machine sleeps: a laptop that wakes up has not jumped.
        let (utc, now) = (UtcTime::from(self.clock.utc_now()), self.clock.since_boot());
        let (last_utc, last_now) = std::mem::replace(&mut self.reading, (utc, now));
        let expected = last_utc + now.saturating_sub(last_now);
        if World::clock_jumped(expected, utc) && !self.world.clock_held() {
            tracing::error!(%expected, %utc, "the clock jumped ahead; time-dependent commands wait for `meshctl clock confirm`");
            let operation = OperationId(mesh_runtime::random_bytes());
            let hold = Request { actor: Actor::Controller, operation, command: Command::HoldClock };
            if let Err(error) = self.decide(self.world.record_time(expected), &hold, frame) {
                tracing::error!(%error, "cannot hold the clock");
            }
        }
        self.world.record_time(utc)
    }

    fn decide(&mut self, at: UtcTime, request: &Request, frame: &mut Frame) -> Result<Committed, WriteError> {
        let changes = match self.world.decide(at, request)? {
            Decision::AlreadyDone => {
                let seq = self.world.operation(&request.operation).map_or(self.head.seq, |o| o.seq);
                return Ok(Committed { seq, effect: Effect::AlreadyDone });
            }
            Decision::Changes(changes) => changes,
        };
        let record = Arc::new(self.world.record(at, request, changes));
        let encoded = encode_record(&record).map_err(|error| {
            tracing::error!(error = mesh_runtime::chain(&error), "record cannot be encoded");
            WriteError::Journal("record cannot be encoded".into())
        })?;
        if encoded.bytes.len() > mesh_store::journal::RECORD_BYTES_MAX {
            return Err(WriteError::TooLarge);
        }
        let seq = self.head.seq + 1 + frame.records.len() as u64;
        self.world.apply(seq, &record);
        frame.bytes += encoded.bytes.len();
        frame.encoded.push(encoded);
        frame.records.push((seq, Arc::clone(&record)));
        Ok(Committed { seq, effect: Effect::Changed(record) })
    }

    fn flush(&mut self, mut frame: Frame) -> Flushed {
        if frame.encoded.is_empty() {
            frame.answer_all(self.runtime.as_ref());
            return Flushed::Durable;
        }
        // Commit point.
        match self.journal.append(&self.head, &frame.encoded) {
            Ok(Append::Appended { head }) => {
                self.head = head;
                self.directory.publish(std::mem::take(&mut frame.records), head);
                frame.answer_all(self.runtime.as_ref());
                Flushed::Durable
            }
            Ok(Append::Conflict { head }) => match self.follow(head) {
                Ok(()) => Flushed::Again(frame.answers.into_iter().map(|(job, _)| job).collect()),
                Err(error) => {
                    tracing::error!(error = mesh_runtime::chain(&error), "cannot follow the journal");
                    Flushed::Fatal
                }
            },
            Ok(Append::Unknown { source }) => {
                // A failed sync is never retried: the kernel may have dropped the pages. Whoever asked
                // repeats the request, and the next process finds its operation or does not.
                tracing::error!(error = mesh_runtime::chain(&source), "the journal could not be synced");
                Flushed::Fatal
            }
            Err(error) => {
                self.reset();
                let refused = match error {
                    AppendError::Full { .. } => WriteError::DiskFull,
                    AppendError::Broken => {
                        tracing::error!("the journal is closed");
                        return Flushed::Fatal;
                    }
                    other => {
                        tracing::error!(error = mesh_runtime::chain(&other), "frame was not written");
                        WriteError::Journal(other.to_string())
                    }
                };
                frame.answers.into_iter().for_each(|(job, _)| answer(job, Err(refused.clone())));
                Flushed::Durable
            }
        }
    }

    /// Forgets what was decided and not written.
    fn reset(&mut self) {
        self.world = self.directory.read(World::clone);
        self.head = self.directory.head();
    }

    /// Takes up the records that another writer appended.
    fn follow(&mut self, head: Head) -> Result<(), FollowError> {
        let mut foreign = Vec::new();
        for stored in self.journal.read(self.directory.head().seq + 1) {
            let stored = stored?;
            foreign.push((stored.seq, Arc::new(decode_record(&stored.bytes)?)));
        }
        self.directory.publish(foreign, head);
        self.reset();
        Ok(())
    }
}

#[derive(Debug, thiserror::Error)]
enum FollowError {
    #[error("journal cannot be read")]
    Read(#[from] ReadError),
    #[error("record of another writer cannot be read")]
    Codec(#[from] CodecError),
}

impl Frame {
    /// Answers a crowd on the runtime: waking it once costs less than waking it for each of them.
    fn answer_all(self, runtime: Option<&Handle>) {
        let answers = self.answers;
        match runtime.filter(|_| answers.len() > 1) {
            Some(runtime) => drop(runtime.spawn(async move { answer_each(answers) })),
            None => answer_each(answers),
        }
    }
}

/// Everything that waits, and what comes within a moment that grows with the company the last frame had: each
/// sync, and each turn of this thread, then serves more callers. A lone caller never waits for company that does not come,
/// and nobody waits once no other command is being prepared.
fn gather(first: Job, jobs: &Receiver<Message>, company: usize, coming: &AtomicUsize) -> (Vec<Job>, bool) {
    let mut waiting = vec![first];
    let mut stopped = take_waiting(&mut waiting, jobs);
    let step = gather_time(waiting.len().max(company)) / GATHER_STEPS;
    for _ in 0..GATHER_STEPS {
        if stopped || step.is_zero() || waiting.len() >= FRAME_COMMANDS_MAX {
            break;
        }
        let alone = coming.load(Ordering::Acquire) == 0;
        if !alone {
            // Asleep and not at the queue, so that nobody who comes meanwhile has to wake this thread.
            std::thread::sleep(step);
        }
        stopped = take_waiting(&mut waiting, jobs);
        if alone {
            break;
        }
    }
    (waiting, stopped)
}

/// Takes what waits, as much as a frame holds. Says whether the thread was told to stop.
fn take_waiting(waiting: &mut Vec<Job>, jobs: &Receiver<Message>) -> bool {
    while waiting.len() < FRAME_COMMANDS_MAX {
        match jobs.try_recv() {
            Ok(Message::Job(job)) => waiting.push(*job),
            Ok(Message::Stop) => return true,
            Err(_) => break,
        }
    }
    false
}

/// None for one caller, all of [`GATHER_TIME`] for [`CROWD`] and more.
fn gather_time(company: usize) -> Duration {
    GATHER_TIME * u32::try_from(company.min(CROWD) - 1).unwrap_or(0) / (CROWD as u32 - 1)
}

fn answer_each(answers: Vec<(Job, Result<Committed, WriteError>)>) {
    answers.into_iter().for_each(|(job, outcome)| answer(job, outcome));
}

/// A caller that no longer waits learns the outcome by repeating its operation id.
fn answer(job: Job, outcome: Result<Committed, WriteError>) {
    let _ = job.answer.send(outcome);
}

#[cfg(test)]
mod tests;
