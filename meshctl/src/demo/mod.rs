//! `meshctl demo`: a mesh of real processes in private namespaces, and everything it promises, tried.
//!
//! Each role is a `meshd` process of its own; everything else is done by running `meshctl` as a user
//! would. Every line is printed from what was seen, and a step that is not seen to hold fails the demo.

mod fleet;
mod interrupt;
mod screen;
mod stay;
mod steps;

use std::time::Instant;

use mesh_lab::LabError;
use mesh_proto::v1::ErrorCode;
use serde_json::json;

use self::{
    fleet::Fleet,
    screen::Screen,
    steps::{STEPS, Step},
};
use crate::{
    error::{Exit, Failure, Result},
    output::Output,
};

/// Lines of each log that are shown when a step fails.
const LOG_TAIL_LINES: usize = 12;

#[derive(Debug, clap::Args)]
pub(crate) struct Demo {
    /// How many nodes
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(3..=10))]
    nodes: u8,
    /// Keep it running, and say how to enter
    #[arg(long)]
    stay: bool,
    /// Print each command before it runs
    #[arg(long)]
    show: bool,
}

/// Why a step did not hold; one sentence.
#[derive(Debug)]
struct Broken(String);

impl Broken {
    fn new(why: impl Into<String>) -> Self {
        Self(why.into())
    }
}

impl From<&LabError> for Broken {
    /// The error with all its causes: a lab's own text names only the attempt.
    fn from(error: &LabError) -> Self {
        let mut text = error.to_string();
        let mut source = std::error::Error::source(error);
        while let Some(cause) = source {
            text.push_str(": ");
            text.push_str(&cause.to_string());
            source = cause.source();
        }
        Self(text)
    }
}

impl From<LabError> for Broken {
    fn from(error: LabError) -> Self {
        Self::from(&error)
    }
}

impl Demo {
    /// Must be called while the process has one thread.
    pub(crate) fn run(&self, out: &Output) -> Result<Exit> {
        let isolation = mesh_lab::enter().map_err(|error| no_namespaces(&error))?;
        mesh_lab::check_tun().map_err(|error| no_tun(&error))?;
        let screen = Screen::new(*out, self.show);
        let root = if isolation.user_namespace {
            "private user and network namespaces (no root, nothing outside is touched)"
        } else {
            "private network namespaces (nothing outside is touched)"
        };
        screen.line(&format!("mesh demo: 1 controller, {} nodes, {root}", self.nodes));
        let mut fleet = Fleet::new(self.nodes, screen, isolation).map_err(|broken| {
            Failure::new(ErrorCode::Internal, "the demo could not start")
                .why(broken.0)
                .next("see the message; nothing was changed")
        })?;
        self.go(&mut fleet, &screen)
    }

    fn go(&self, fleet: &mut Fleet, screen: &Screen) -> Result<Exit> {
        let started = Instant::now();
        let mut results = Vec::new();
        for (index, step) in STEPS.iter().enumerate() {
            let begun = Instant::now();
            let outcome = (step.run)(fleet);
            let took = begun.elapsed();
            screen.step(index + 1, step.name, outcome.as_ref().map_err(|broken| broken.0.as_str()), took);
            results.push(json!({
                "step": index + 1, "name": step.name, "passed": outcome.is_ok(), "seconds": took.as_secs_f64(),
                "text": outcome.as_ref().map_or_else(|broken| broken.0.clone(), Clone::clone),
            }));
            if outcome.is_err() {
                self.failed(fleet, screen, step, &results);
                return Ok(Exit::Failed);
            }
        }
        let total = started.elapsed();
        screen.document(&results, true, None, total);
        let hints = if self.stay {
            ""
        } else {
            "        keep it running: meshctl demo --stay        the commands: meshctl demo --show"
        };
        screen.line(&format!("all {} steps passed in {:.1}s{hints}", STEPS.len(), total.as_secs_f64()));
        if self.stay {
            stay::stay(fleet, screen).map_err(|broken| {
                Failure::new(ErrorCode::Internal, "the demo could not stay").why(broken.0)
            })?;
        }
        Ok(Exit::Done)
    }

    fn failed(&self, fleet: &mut Fleet, screen: &Screen, step: &Step, results: &[serde_json::Value]) {
        let folder = fleet.keep();
        screen.document(results, false, Some(&folder), std::time::Duration::ZERO);
        screen.talk(&fleet.log_tails(LOG_TAIL_LINES));
        screen.talk(&format!(
            "step \"{}\" failed; logs and state are kept in {}",
            step.name,
            folder.display()
        ));
    }
}

fn no_namespaces(error: &LabError) -> Failure {
    let Broken(why) = error.into();
    Failure::new(ErrorCode::NamespacesDenied, "the kernel does not let the demo build its private network")
        .why(why)
        .next("run it as root, or see `meshctl explain E0120`")
}

fn no_tun(error: &LabError) -> Failure {
    let Broken(why) = error.into();
    let code = if why.contains("missing") || why.contains("no TUN driver") {
        ErrorCode::TunMissing
    } else {
        ErrorCode::TunDenied
    };
    Failure::new(code, "the demo needs TUN devices").why(why).next("the line above says what to type")
}
