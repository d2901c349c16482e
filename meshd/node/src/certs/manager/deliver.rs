//! How a pair gets to its service: files, hook, and the way back when the service does not take it.

use std::time::Duration;

use mesh_proto::v1::ErrorCode;
use tokio::time::Instant;

use super::{Done, Manager, Task};
use crate::certs::definition::Definition;
use crate::certs::issue;
use crate::certs::record::{Material, Staple};
use crate::failure::Failure;
use crate::hostop::{HostError, HostOp, PairVersion};
use crate::limits::HOOK_INTERVAL;

/// Shortest time between two questions for the OCSP response of one pair.
const STAPLE_INTERVAL: Duration = Duration::from_secs(60);

impl Task {
    /// Puts the newest material in place, then runs the hook, if there is one.
    pub(super) async fn run_hook(&mut self, name: &str) {
        let Some(record) = self.records.get(name) else { return };
        let Some(material) = record.newest().cloned() else { return };
        let definition = record.definition.clone();
        if let Err(failure) = self.write(&definition, &material).await {
            return self.not_written(name, &failure);
        }
        let Some(live) = self.live.get_mut(name) else { return };
        let Some(command) = definition.reload.clone() else { return self.settled(name) };
        let earliest = live.last_hook.map_or_else(Instant::now, |last| last + HOOK_INTERVAL);
        if earliest > Instant::now() {
            live.hook_due = Some(earliest);
            return;
        }
        live.hook_running = true;
        live.hook_due = None;
        let (name, host) = (name.to_owned(), self.parts.host.clone());
        let op = HostOp::RunHook { command, pair: name.clone(), folder: definition.out.clone() };
        self.jobs.spawn(async move { Done::Hooked { name, result: host.apply(op).await } });
    }

    pub(super) async fn hooked(&mut self, name: &str, result: Result<(), HostError>) {
        match result {
            Ok(()) => self.settled(name),
            Err(error) => self.roll_back(name, &error).await,
        }
    }

    /// The service has what is in the folder.
    fn settled(&mut self, name: &str) {
        let Some(record) = self.records.get_mut(name) else { return };
        let Some(live) = self.live.get_mut(name) else { return };
        if let Some(candidate) = record.candidate.take() {
            record.published = Some(candidate);
        }
        live.backoff.reset();
        live.problem.clear();
        live.ask_after = None;
        let shown = record.show("", true);
        for waiter in live.waiters.drain(..) {
            let _ = waiter.send(Ok(shown.clone()));
        }
        self.parts.findings.clear(&format!("pair/{name}"));
        self.save();
    }

    /// The service did not take the new pair: the old one returns, unless nobody would accept it. New CRLs
    /// stay in any case: a broken hook must not revive what was revoked.
    async fn roll_back(&mut self, name: &str, error: &HostError) {
        let now = self.parts.clock.now();
        let Some(record) = self.records.get_mut(name) else { return };
        let old = record.published.clone().filter(|_| record.candidate.is_some());
        let old = old.filter(|old| !old.has_expired(now) && !self.parts.is_revoked(&old.serial));
        let definition = record.definition.clone();
        let outcome = match &old {
            Some(old) => match self.write(&definition, old).await {
                Ok(()) => "the pair before it is back in place",
                Err(_) => "the pair before it could not be put back",
            },
            None => {
                // Nothing better is there; what was issued stays.
                if let Some(record) = self.records.get_mut(name)
                    && let Some(candidate) = record.candidate.take()
                {
                    record.published = Some(candidate);
                }
                "the new files stay in place"
            }
        };
        let failure = Failure::new(
            ErrorCode::HookFailed,
            format!("reload hook of {name} failed: {error}; {outcome}"),
            "correct the service or the hook; it is tried again by itself",
        );
        self.failing(name, &failure);
    }

    fn not_written(&mut self, name: &str, failure: &Failure) {
        self.failing(name, failure);
    }

    fn failing(&mut self, name: &str, failure: &Failure) {
        let Some(live) = self.live.get_mut(name) else { return };
        live.problem = format!("{}: {}", failure.number(), failure.why);
        live.hook_due = Some(Instant::now() + HOOK_INTERVAL + live.backoff.next_wait());
        for waiter in live.waiters.drain(..) {
            let _ = waiter.send(Err(failure.clone()));
        }
        self.parts.findings.raise_failure(format!("pair/{name}"), format!("pair {name}"), failure);
        self.save();
    }

    /// Rewrites `crl.pem` and `ca.pem` everywhere if CRLs or roots have changed, and lets the hooks know.
    pub(super) async fn write_crls(&mut self) {
        let crls = self.parts.network.crls.borrow().clone();
        let active = self.parts.identities.active();
        self.bundle = active.identity.bundle;
        if *crls == *self.crls && active.identity.roots == self.roots {
            return;
        }
        self.crls = crls;
        self.roots.clone_from(&active.identity.roots);
        let names: Vec<String> = self.records.keys().cloned().collect();
        for name in names {
            self.rewrite(&name).await;
        }
    }

    /// Writes again what is in a folder, with what changed beside the pair, and lets the hook know.
    async fn rewrite(&mut self, name: &str) {
        let Some(record) = self.records.get(name) else { return };
        // What is in the folder now: a candidate only while its hook runs.
        let running = self.live.get(name).is_some_and(|live| live.hook_running);
        let material = match running {
            true => record.newest(),
            false => record.published.as_ref().or(record.candidate.as_ref()),
        };
        let Some(material) = material.cloned() else { return };
        let definition = record.definition.clone();
        if let Err(failure) = self.write(&definition, &material).await {
            self.not_written(name, &failure);
            return;
        }
        if definition.reload.is_some()
            && let Some(live) = self.live.get_mut(name)
        {
            let earliest = live.last_hook.map_or_else(Instant::now, |last| last + HOOK_INTERVAL);
            live.hook_due = Some(live.hook_due.map_or(earliest, |due| due.min(earliest)));
        }
    }

    /// Asks for the OCSP response of a server's certificate when there is none or it gets old.
    pub(super) fn ask_staple(&mut self, name: &str) {
        let Some(record) = self.records.get(name) else { return };
        let Some(live) = self.live.get_mut(name) else { return };
        let busy = live.stapling || live.issuing || live.hook_running;
        let early = live.staple_after.is_some_and(|after| after > Instant::now());
        if busy || early || record.stopped {
            return;
        }
        // A candidate gets its own once the service has taken it.
        let Some(material) = record.published.as_ref().filter(|_| record.candidate.is_none()) else { return };
        if !material.wants_staple(self.parts.clock.now()) {
            return;
        }
        let (Ok(channel), Some(issuer)) = (self.parts.uplink.open_channel(), material.issuers.first()) else {
            return;
        };
        live.stapling = true;
        let asked = (material.serial.clone(), issuer.clone());
        let (name, clock) = (name.to_owned(), self.parts.clock.clone());
        self.jobs.spawn(async move {
            let serial = asked.0.clone();
            Done::Stapled { name, serial, result: issue::staple(channel, asked, &clock).await }
        });
    }

    pub(super) async fn stapled(
        &mut self,
        name: &str,
        serial: &[u8],
        result: Result<Option<Staple>, Failure>,
    ) {
        let Some(live) = self.live.get_mut(name) else { return };
        live.stapling = false;
        live.staple_after = Some(Instant::now() + STAPLE_INTERVAL);
        let staple = match result {
            Ok(Some(staple)) => staple,
            Ok(None) => return,
            Err(failure) => return tracing::debug!(name, %failure, "no OCSP response"),
        };
        let Some(record) = self.records.get_mut(name) else { return };
        let Some(material) = record.published.as_mut().filter(|material| material.serial == serial) else {
            return;
        };
        let changed = material.staple.as_ref().is_none_or(|old| old.der != staple.der);
        material.staple = Some(staple);
        self.save();
        if changed {
            self.rewrite(name).await;
        }
    }

    /// Writes one version of the folder.
    pub(super) async fn write(&self, definition: &Definition, material: &Material) -> Result<(), Failure> {
        let files = material.files(definition, &self.crls, &self.roots)?;
        let access = definition.access()?;
        let version = PairVersion {
            folder: definition.out.clone(),
            pair: definition.name().to_owned(),
            files,
            access,
            version: self.version(),
        };
        self.parts.host.apply(HostOp::WritePair(Box::new(version))).await.map_err(Failure::from)
    }

    /// A new version's name: a UTC stamp for people, random bits against a clock that was set back.
    fn version(&self) -> String {
        let now = self.parts.clock.now();
        format!(
            "..{:04}_{:02}_{:02}T{:02}_{:02}_{:02}Z.{}",
            now.year(),
            u8::from(now.month()),
            now.day(),
            now.hour(),
            now.minute(),
            now.second(),
            hex::encode(mesh_runtime::random_bytes::<4>()),
        )
    }
}

impl Manager {
    fn is_revoked(&self, serial: &[u8]) -> bool {
        let active = self.identities.active();
        let Ok(mut trust) = crate::pki::Trust::of(&active.identity) else { return false };
        for crl in self.network.crls.borrow().iter() {
            // What is not believed says nothing.
            let _ = trust.take_crl(crl);
        }
        trust.is_revoked(serial)
    }
}
