//! The task that owns the pairs. Slow things, issuing and hooks, run beside it and report back.

mod deliver;
mod policy;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use mesh_proto::v1 as pb;
use mesh_proto::v1::ErrorCode;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::definition::{Definition, Origin};
use super::issue::Issued;
use super::live::Live;
use super::record::{Record, Records, Staple};
use super::{Answer, Command, declared, issue};
use crate::clock::ControllerClock;
use crate::failure::Failure;
use crate::findings::{Findings, Severity};
use crate::hostop::{Host, HostError};
use crate::identity::Identities;
use crate::limits::{PAIRS_MAX, RETRY_FIRST};
use crate::network::NetworkHandle;
use crate::state::{Der, StateDir};
use crate::uplink::UplinkHandle;

/// Clocks, declarations and retries are looked at this often.
const TICK: Duration = Duration::from_secs(15);
/// Pairs that are issued at the same moment.
const ISSUES_AT_ONCE: usize = 8;

/// A slow thing that has ended.
enum Done {
    Issued { name: String, result: Result<Issued, Failure> },
    Hooked { name: String, result: Result<(), HostError> },
    Judged { name: String, result: Result<Option<Failure>, Failure> },
    Stapled { name: String, serial: Vec<u8>, result: Result<Option<Staple>, Failure> },
}

/// Everything the pairs' task needs.
pub(crate) struct Manager {
    pub(crate) state: StateDir,
    pub(crate) clock: ControllerClock,
    pub(crate) findings: Findings,
    pub(crate) host: Host,
    pub(crate) identities: Arc<Identities>,
    pub(crate) network: NetworkHandle,
    pub(crate) uplink: UplinkHandle,
    pub(crate) certs_dir: PathBuf,
    pub(crate) inbox: mpsc::Receiver<Command>,
    /// The bundle that all services have, and under whose issuer all have renewed; 0 if not all.
    pub(crate) settled: watch::Sender<u64>,
}

impl Manager {
    /// Where pairs without a folder of their own are written.
    pub(crate) fn own_certs(state: &StateDir) -> PathBuf {
        state.path().join("certs")
    }

    /// Runs until it is dropped.
    pub(crate) async fn run(self) {
        let records = match self.state.pairs() {
            Ok(records) => records,
            Err(error) => {
                self.findings.raise_failure("state/pairs", "the stored pairs", &error.into());
                Records::new()
            }
        };
        let live = records.keys().map(|name| (name.clone(), Live::default())).collect();
        let task = Task {
            parts: self,
            records,
            live,
            jobs: JoinSet::new(),
            crls: Arc::default(),
            roots: Vec::new(),
            bundle: 0,
            terms: Terms::default(),
        };
        task.run().await;
    }
}

struct Task {
    parts: Manager,
    records: Records,
    live: BTreeMap<String, Live>,
    jobs: JoinSet<Done>,
    /// The CRLs that stand in the folders.
    crls: Arc<Vec<pb::Crl>>,
    /// The roots that stand in the folders, and the version of the bundle they come from.
    roots: Vec<Der>,
    bundle: u64,
    /// What the controller last said about policy and us.
    terms: Terms,
}

/// What decides, apart from the pairs themselves, which of them may be issued.
#[derive(Default, PartialEq, Eq)]
struct Terms {
    policy_version: u64,
    tags: Vec<String>,
    granted: Vec<String>,
}

impl Task {
    async fn run(mut self) {
        let (mut own, mut crls) = (self.parts.network.own.clone(), self.parts.network.crls.clone());
        let mut channel = self.parts.uplink.channel.clone();
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut identity = self.parts.identities.subscribe();
        self.write_crls().await;
        loop {
            self.advance_all().await;
            self.tell_settled();
            let wake = self.wake();
            tokio::select! {
                command = self.parts.inbox.recv() => match command {
                    Some(command) => self.handle(command).await,
                    None => return,
                },
                Some(done) = self.jobs.join_next() => match done {
                    Ok(done) => self.finish(done).await,
                    Err(error) => tracing::error!(%error, "a job of the pairs has crashed"),
                },
                changed = own.changed() => {
                    if changed.is_err() { return }
                    let own = own.borrow_and_update().clone();
                    self.take_own(&own);
                }
                changed = identity.changed() => {
                    if changed.is_err() { return }
                    identity.borrow_and_update();
                    self.write_crls().await;
                }
                changed = crls.changed() => {
                    if changed.is_err() { return }
                    crls.borrow_and_update();
                    self.write_crls().await;
                }
                changed = channel.changed() => {
                    if changed.is_err() { return }
                    // Connected again: what waited for that is asked at once.
                    if channel.borrow_and_update().is_some() {
                        self.live.values_mut().for_each(|live| live.ask_after = None);
                    }
                }
                () = tokio::time::sleep_until(wake) => {}
                _ = tick.tick() => self.read_declared(),
            }
        }
    }

    async fn handle(&mut self, command: Command) {
        match command {
            Command::Issue { definition, reply } => self.issue(*definition, reply),
            Command::Renew { name, reply } => self.renew(&name, reply),
            Command::List(reply) => {
                let _ = reply.send(self.list());
            }
            Command::WriteCrls(reply) => {
                self.write_crls().await;
                // Whoever asked looks at once whether all services have it: hooks are due now.
                self.tell_settled();
                let _ = reply.send(());
            }
            Command::Forget(reply) => {
                self.records.clear();
                self.live.clear();
                self.save();
                let _ = reply.send(());
            }
        }
    }

    /// Says when every service has what the bundle asks for. A pair whose hook fails is not there yet; one that
    /// was stopped or never issued uses nothing.
    fn tell_settled(&self) {
        let active = self.parts.identities.active();
        let (issuer, now) = (&active.identity.active_issuer, self.parts.clock.now());
        let busy = self.records.iter().any(|(name, record)| {
            let live = self.live.get(name);
            let unsettled = live.is_some_and(|live| {
                live.issuing || live.hook_running || live.hook_due.is_some() || !live.problem.is_empty()
            });
            let used = record.published.as_ref().or(record.candidate.as_ref());
            let behind =
                used.is_some_and(|material| material.is_of_other(issuer) && !material.has_expired(now));
            !record.stopped && (unsettled || behind || record.candidate.is_some())
        });
        let current = self.bundle == active.identity.bundle && self.roots == active.identity.roots;
        let settled = if busy || !current { 0 } else { self.bundle };
        self.parts.settled.send_if_modified(|before| std::mem::replace(before, settled) != settled);
    }

    fn list(&self) -> Vec<pb::ManagedPair> {
        let problem = |name: &String| self.live.get(name).map_or("", Live::shown_problem);
        self.records.iter().map(|(name, record)| record.show(problem(name), false)).collect()
    }

    /// `cert issue`: makes the pair, changes it, starts it again, or finds that nothing is to be done.
    fn issue(&mut self, definition: Definition, reply: Answer) {
        let name = definition.name().to_owned();
        let now = self.parts.clock.now();
        if let Some(record) = self.records.get(&name)
            && record.definition == definition
            && !record.stopped
            && record.candidate.is_none()
            && record.request.is_none()
            && record.published.as_ref().is_some_and(|material| now < material.renews_at())
            && self.live.get(&name).is_none_or(|live| live.shown_problem().is_empty())
        {
            let _ = reply.send(Ok(record.show("", false)));
            return;
        }
        if let Err(failure) = self.check_room(&definition).and_then(|()| self.parts.uplink.open_channel()) {
            let _ = reply.send(Err(failure));
            return;
        }
        let record = self.records.entry(name.clone()).or_insert_with(|| Record::new(definition.clone()));
        // A revoked or stopped key does not come back.
        let key = record.newest().filter(|_| !record.stopped).map(|material| material.key.clone());
        let key = key.filter(|_| !definition.rotate_key);
        record.definition = definition;
        match issue::prepare(key, record.definition.key_algorithm(), true) {
            Ok(request) => record.request = Some(request),
            Err(failure) => {
                let _ = reply.send(Err(failure));
                return;
            }
        }
        record.candidate = None;
        record.stopped = false;
        let live = self.live.entry(name).or_default();
        live.waiters.push(reply);
        live.ask_after = None;
        self.save();
    }

    fn check_room(&self, definition: &Definition) -> Result<(), Failure> {
        let known = self.records.contains_key(definition.name());
        if !known && self.records.len() >= PAIRS_MAX {
            return Err(Failure::new(
                ErrorCode::TooLarge,
                format!("this node keeps {PAIRS_MAX} pairs already"),
                "remove a declaration, or use fewer names",
            ));
        }
        // Before anything is asked for: a folder that is refused would leave a certificate nobody can use.
        Host::check_pair(&definition.out, definition.name()).map_err(Failure::from)
    }

    fn renew(&mut self, name: &str, reply: Answer) {
        let Some(record) = self.records.get(name) else {
            let _ = reply.send(Err(Failure::new(
                ErrorCode::CertificateNotFound,
                format!("this node keeps no pair {name}"),
                "`meshctl cert ls` on this node shows its pairs",
            )));
            return;
        };
        let refused = match (record.stopped, self.parts.uplink.open_channel()) {
            (true, _) => Some(Failure::new(
                ErrorCode::NameStopped,
                format!("{name} was revoked by an operator and is not renewed"),
                format!("start it again: `meshctl cert issue {name}`"),
            )),
            (false, Err(failure)) => Some(failure),
            (false, Ok(_)) => None,
        };
        if let Some(failure) = refused {
            let _ = reply.send(Err(failure));
            return;
        }
        let live = self.live.entry(name.to_owned()).or_default();
        live.waiters.push(reply);
        live.forced = true;
        live.ask_after = None;
    }

    /// The controller's word on our names: stop, or issue anew with a new key.
    fn take_own(&mut self, own: &pb::Own) {
        let mut changed = false;
        self.take_terms(own);
        for record in self.records.values_mut() {
            let names = |list: &[String]| record.definition.names.iter().any(|name| list.contains(name));
            let (stopped, reissue) = (names(&own.stopped_names), names(&own.reissue_names));
            // A start by an operator that is under way is newer than what the map says.
            let starting = record.request.as_ref().is_some_and(|request| request.restart);
            if record.stopped != (stopped && !starting) {
                record.stopped = stopped && !starting;
                changed = true;
            }
            if !reissue && record.reissued {
                record.reissued = false;
                changed = true;
            }
            if reissue && !record.reissued && !record.stopped {
                match issue::prepare(None, record.definition.key_algorithm(), false) {
                    Ok(request) => {
                        record.request = Some(request);
                        record.reissued = true;
                        changed = true;
                    }
                    Err(failure) => tracing::error!(%failure, "no new key for a pair"),
                }
            }
        }
        if changed {
            self.save();
        }
    }

    fn read_declared(&mut self) {
        let own_certs = Manager::own_certs(&self.parts.state);
        let declared = declared::read(&self.parts.certs_dir, &own_certs);
        let mut keys = Vec::new();
        for (path, problem) in &declared.problems {
            let key = format!("certs.d/{}", path.display());
            let subject = format!("declaration {}", path.display());
            let next = "correct it; it must belong to root, and nobody else may write it";
            self.parts.findings.raise(key.clone(), Severity::Bad, subject, problem.clone(), next);
            keys.push(key);
        }
        self.parts.findings.clear_others("certs.d/", &keys);
        let before = self.records.len();
        self.records.retain(|name, record| {
            record.definition.origin == Origin::Socket || declared.pairs.contains_key(name)
        });
        let mut changed = before != self.records.len();
        for (name, definition) in declared.pairs {
            match self.records.get_mut(&name) {
                Some(record) if record.definition == definition => continue,
                Some(record) => {
                    // Files go to the new place, or the certificate gets the new names.
                    record.definition = definition;
                    self.live.entry(name).or_default().forced = true;
                }
                None => {
                    self.records.insert(name.clone(), Record::new(definition));
                    self.live.entry(name).or_default();
                }
            }
            changed = true;
        }
        let records = &self.records;
        self.live.retain(|name, _| records.contains_key(name));
        if changed {
            self.save();
        }
    }

    /// What each pair does next; called after every event.
    async fn advance_all(&mut self) {
        let names: Vec<String> = self.records.keys().cloned().collect();
        for name in names {
            self.advance(&name).await;
            self.ask_staple(&name);
            self.ask_judgement(&name);
        }
    }

    async fn advance(&mut self, name: &str) {
        let now = Instant::now();
        let controller_now = self.parts.clock.now();
        let Some(record) = self.records.get_mut(name) else { return };
        let live = self.live.entry(name.to_owned()).or_default();
        if live.issuing || live.hook_running {
            return;
        }
        // A hook that is due comes first: the service shall have what is there.
        if live.hook_due.is_some_and(|due| due <= now) {
            live.hook_due = None;
            self.run_hook(name).await;
            return;
        }
        // A CA that no longer issues is about to go.
        let issuer = self.parts.identities.active().identity.active_issuer.clone();
        let due = record
            .newest()
            .is_none_or(|material| controller_now >= material.renews_at() || material.is_of_other(&issuer));
        let may = !record.stopped && live.refused.is_none();
        let wanted = record.request.is_some() || live.forced || (due && may);
        if !wanted || live.ask_after.is_some_and(|after| after > now) {
            return;
        }
        let Ok(channel) = self.parts.uplink.open_channel() else { return };
        if self.jobs.len() >= ISSUES_AT_ONCE {
            return;
        }
        if record.request.is_none() {
            let key = record.newest().filter(|_| !record.definition.rotate_key);
            let key = key.map(|material| material.key.clone());
            match issue::prepare(key, record.definition.key_algorithm(), false) {
                Ok(request) => record.request = Some(request),
                Err(failure) => return tracing::error!(%failure, "no key for a pair"),
            }
            self.save();
        }
        let Some(record) = self.records.get(name) else { return };
        let Some(request) = record.request.clone() else { return };
        let live = self.live.entry(name.to_owned()).or_default();
        live.issuing = true;
        live.forced = false;
        let (name, definition) = (name.to_owned(), record.definition.clone());
        let (active, clock) = (self.parts.identities.active(), self.parts.clock.clone());
        self.jobs.spawn(async move {
            let result = issue::ask(channel, &definition, &request, &active.identity, &clock).await;
            Done::Issued { name, result }
        });
    }

    async fn finish(&mut self, done: Done) {
        match done {
            Done::Issued { name, result } => {
                if let Some(live) = self.live.get_mut(&name) {
                    live.issuing = false;
                }
                match result {
                    Ok(issued) => self.issued(&name, issued).await,
                    Err(failure) => self.not_issued(&name, failure),
                }
            }
            Done::Judged { name, result } => self.judged(&name, result),
            Done::Stapled { name, serial, result } => self.stapled(&name, &serial, result).await,
            Done::Hooked { name, result } => {
                if let Some(live) = self.live.get_mut(&name) {
                    live.hook_running = false;
                    live.last_hook = Some(Instant::now());
                }
                self.hooked(&name, result).await;
            }
        }
    }

    async fn issued(&mut self, name: &str, issued: Issued) {
        let Some(record) = self.records.get_mut(name) else { return };
        tracing::info!(pair = name, serial = hex::encode(&issued.material.serial), "certificate issued");
        record.candidate = Some(issued.material);
        record.request = None;
        self.allow(name);
        // On disk before the service can see it.
        self.save();
        // The network task verifies them and tells us; without it this pair starts from what is here.
        if self.parts.network.take_crls(issued.crls).await.is_err() {
            return;
        }
        self.crls = self.parts.network.crls.borrow().clone();
        self.run_hook(name).await;
    }

    fn not_issued(&mut self, name: &str, failure: Failure) {
        let Some(record) = self.records.get_mut(name) else { return };
        let Some(live) = self.live.get_mut(name) else { return };
        tracing::warn!(pair = name, code = failure.number(), why = %failure, "certificate not issued");
        // The same question gets the same refusal; the next one is a new question.
        if failure.exit != 5 {
            record.request = None;
        }
        if failure.code == ErrorCode::NameStopped {
            record.stopped = true;
        }
        let never_was = record.newest().is_none() && record.definition.origin == Origin::Socket;
        for waiter in live.waiters.drain(..) {
            let _ = waiter.send(Err(failure.clone()));
        }
        if policy::says(failure.code) && record.newest().is_some() {
            self.refuse(name, &failure);
            return self.save();
        }
        live.problem = format!("{}: {}", failure.number(), failure.why);
        live.ask_after = Some(Instant::now() + RETRY_FIRST + live.backoff.next_wait());
        if never_was {
            // Whoever typed it has been told; there is nothing to keep renewed.
            self.records.remove(name);
            self.live.remove(name);
        } else {
            self.parts.findings.raise_failure(format!("pair/{name}"), format!("pair {name}"), &failure);
        }
        self.save();
    }

    fn save(&self) {
        match self.parts.state.save_pairs(&self.records) {
            Ok(()) => self.parts.findings.clear("state/pairs"),
            Err(error) => self.parts.findings.raise_failure("state/pairs", "the state folder", &error.into()),
        }
    }

    /// When something is due by itself.
    fn wake(&self) -> Instant {
        let now = Instant::now();
        let hooks = self.live.values().filter(|live| !live.hook_running).filter_map(|live| live.hook_due);
        let asks = self.live.values().filter(|live| !live.issuing).filter_map(|live| live.ask_after);
        // An `ask_after` that has passed waits for a connection, not for time.
        hooks.chain(asks.filter(|at| *at > now)).min().unwrap_or(now + TICK).min(now + TICK)
    }
}

#[cfg(test)]
mod tests;
