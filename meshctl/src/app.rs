//! What every command is given: where the daemons are and how to speak.

use std::{future::Future, io::IsTerminal, time::Duration};

use mesh_proto::v1::ErrorCode;
use tonic::transport::Channel;

use crate::{
    client::{ANSWER_BYTES_MAX, CONTROLLER, NODE, Places},
    error::{Exit, Failure, Result},
    output::Output,
    text::Span,
};

/// For one answer, unless `--timeout` says another.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// Between two looks of `--watch`, at least: it asks a controller that others need too.
const WATCH_PERIOD_MIN: Duration = Duration::from_millis(100);

#[derive(Debug, Clone)]
pub(crate) struct App {
    pub(crate) places: Places,
    pub(crate) out: Output,
    pub(crate) yes: bool,
}

/// `--watch` of every listing.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct Watch {
    /// Show it again every two seconds, or as given
    #[arg(long, value_name = "EVERY", num_args = 0..=1, require_equals = true, default_missing_value = "2s")]
    pub(crate) watch: Option<Span>,
}

/// `--wait` of every revocation.
#[derive(Debug, clap::Args)]
pub(crate) struct Wait {
    /// Wait until every node has acknowledged, 30 seconds at most unless given
    #[arg(long, value_name = "LIMIT", num_args = 0..=1, require_equals = true, default_missing_value = "30s")]
    pub(crate) wait: Option<Span>,
}

impl Wait {
    pub(crate) fn seconds(&self) -> u32 {
        self.wait.map_or(0, |span| span.seconds().max(1))
    }
}

impl App {
    pub(crate) async fn controller(&self) -> Result<Channel> {
        self.places.controller().await
    }

    pub(crate) async fn node(&self) -> Result<Channel> {
        self.places.node().await
    }

    /// One question to the controller.
    pub(crate) async fn ask<T>(
        &self,
        question: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    ) -> Result<T> {
        self.ask_for(CONTROLLER, Duration::ZERO, question).await
    }

    /// One question to the local node.
    pub(crate) async fn ask_node<T>(
        &self,
        question: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    ) -> Result<T> {
        self.ask_for(NODE, Duration::ZERO, question).await
    }

    /// A question that by its nature takes up to `extra` longer.
    pub(crate) async fn ask_for<T>(
        &self,
        of: &str,
        extra: Duration,
        question: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    ) -> Result<T> {
        let limit = self.places.timeout.unwrap_or(ANSWER_LIMIT) + extra;
        match tokio::time::timeout(limit, question).await {
            Ok(answer) => {
                answer.map(tonic::Response::into_inner).map_err(|status| Failure::from_status(&status, of))
            }
            Err(_) => Err(Failure::new(
                ErrorCode::TimedOut,
                format!("{of} did not answer in {} s", limit.as_secs()),
            )
            .why("it is busy or cut off")
            .next("try again, or allow more with --timeout")),
        }
    }

    /// Runs `show` once, or for ever under `--watch`.
    pub(crate) async fn watch<F>(&self, watch: &Watch, mut show: impl FnMut() -> F) -> Result<Exit>
    where
        F: Future<Output = Result<Exit>>,
    {
        let Some(Span(period)) = watch.watch else { return show().await };
        let clear = std::io::stdout().is_terminal() && !self.out.is_json();
        let mut ticks = tokio::time::interval(period.max(WATCH_PERIOD_MIN));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if clear {
                self.out.write("\x1b[H\x1b[2J");
            }
            match show().await {
                // A controller that restarts must not end the watch.
                Err(failure) if failure.exit == Exit::Unreachable => failure.print(None),
                Err(failure) => return Err(failure),
                Ok(_) => {}
            }
        }
    }

    /// Asks before what cannot be undone; `--yes`, or no terminal to ask on, answers.
    ///
    /// # Errors
    /// E0902 if the answer is no.
    pub(crate) fn confirm(&self, question: &str) -> Result<()> {
        use std::io::Write as _;
        if self.yes || !std::io::stdin().is_terminal() || !std::io::stderr().is_terminal() {
            return Ok(());
        }
        let _ = write!(anstream::stderr(), "{question} [y/N] ");
        let mut answer = String::new();
        let read = std::io::stdin().read_line(&mut answer);
        if read.is_ok() && matches!(answer.trim(), "y" | "Y" | "yes") {
            return Ok(());
        }
        Err(Failure::usage("nothing was done", "answer y, or give --yes").exit(Exit::Failed))
    }
}

/// 16 random bytes that make a repeated request the same request.
pub(crate) fn operation_id() -> prost::bytes::Bytes {
    rand::random::<[u8; 16]>().to_vec().into()
}

/// Sets the limits of a generated client.
macro_rules! client {
    ($client:path, $channel:expr) => {{
        let channel = $channel;
        <$client>::new(channel).max_decoding_message_size($crate::client::ANSWER_BYTES_MAX)
    }};
}
pub(crate) use client;

const _: () = assert!(ANSWER_BYTES_MAX > 4 * 1024 * 1024);
