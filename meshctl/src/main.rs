//! `meshctl`: the one command people type to see and steer a mesh.
//!
//! One file per noun; `client` finds the daemons, `output` and `error` speak to people and scripts.
#![forbid(unsafe_code)]

mod cli;

mod app;
mod client;
mod context;
mod error;
mod output;
mod secret;
mod text;
mod trust;

mod audit;
mod ca;
mod cert;
mod clock;
mod completions;
mod demo;
mod doctor;
mod enroll;
mod explain;
mod login;
mod man;
mod node;
mod operator;
mod ping;
mod policy;
mod probe;
mod revocation;
mod status;
mod token;

use std::process::ExitCode;

use clap::error::ErrorKind;
use mesh_proto::v1::ErrorCode;

use crate::{
    app::App,
    cli::{Cli, Command},
    error::{Exit, Failure, Result},
    output::{Tone, paint, write_bytes, write_text},
};

fn main() -> ExitCode {
    let cli = match Cli::read() {
        Ok(cli) => cli,
        Err(error) => return usage(&error).into(),
    };
    let app = cli.globals.app();
    match run(cli.command, &app) {
        Ok(exit) => exit.into(),
        Err(failure) => {
            failure.print(Some(&app.out));
            failure.exit.into()
        }
    }
}

fn run(command: Command, app: &App) -> Result<Exit> {
    match command {
        // The demo enters namespaces, which only a process of one thread can do: no runtime yet.
        Command::Demo(demo) => demo.run(&app.out),
        Command::Probe(probe) => probe.run(),
        Command::Completions(completions) => Ok(completions.run()),
        Command::Explain(explain) => explain.run(&app.out),
        Command::Man(man) => man.run(app),
        command => runtime()?.block_on(ask(command, app)),
    }
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| {
        Failure::new(ErrorCode::Internal, "cannot start")
            .why(error.to_string())
            .next("see the limits of this user, then try again")
    })
}

async fn ask(command: Command, app: &App) -> Result<Exit> {
    match command {
        Command::Token(command) => command.run(app).await,
        Command::Enroll(command) => command.run(app).await,
        Command::Leave(command) => command.run(app).await,
        Command::Node(command) => command.run(app).await,
        Command::Cert(command) => command.run(app).await,
        Command::Ca(command) => command.run(app).await,
        Command::Policy(command) => command.run(app).await,
        Command::Status(command) => command.run(app).await,
        Command::Ping(command) => command.run(app).await,
        Command::Doctor(command) => command.run(app).await,
        Command::Audit(command) => command.run(app).await,
        Command::Operator(command) => command.run(app).await,
        Command::Clock(command) => command.run(app).await,
        Command::Login(command) => command.run(app).await,
        Command::Demo(_)
        | Command::Probe(_)
        | Command::Completions(_)
        | Command::Explain(_)
        | Command::Man(_) => {
            unreachable!("`run` answers these without a runtime")
        }
    }
}

/// Help and version go to stdout; a wrong command line is E0902 and exit 2.
fn usage(error: &clap::Error) -> Exit {
    let text = error.render().ansi().to_string();
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        write_text(&text);
        return Exit::Done;
    }
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        anstream::eprint!("{text}");
        return Exit::Usage;
    }
    let plain = error.render().to_string();
    let body = plain.strip_prefix("error: ").unwrap_or(&plain);
    anstream::eprint!("{} {body}", paint(Tone::Bad, &format!("error[{}]:", ErrorCode::Usage.label())));
    if json_was_asked_for(&std::env::args().collect::<Vec<_>>()) {
        let first = body.lines().next().unwrap_or_default();
        let document = serde_json::json!({
            "apiVersion": output::API_VERSION, "kind": "Error", "code": ErrorCode::Usage.label(), "error": first,
            "facts": [], "why": "", "do": "see --help", "exit": Exit::Usage as u8,
        });
        write_bytes(format!("{document}\n").as_bytes());
    }
    Exit::Usage
}

/// Looks for `-o json` in a command line that could not be read as a whole.
fn json_was_asked_for(arguments: &[String]) -> bool {
    let joined = ["-ojson", "-o=json", "--output=json"];
    let apart = |pair: &[String]| matches!(pair[0].as_str(), "-o" | "--output") && pair[1] == "json";
    arguments.iter().any(|argument| joined.contains(&argument.as_str())) || arguments.windows(2).any(apart)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_recognised_in_a_broken_command_line() {
        let asked = |line: &str| json_was_asked_for(&line.split(' ').map(str::to_owned).collect::<Vec<_>>());
        for line in [
            "meshctl frob -o json",
            "meshctl -ojson frob",
            "meshctl frob --output=json",
            "meshctl --output json x",
        ] {
            assert!(asked(line), "{line}");
        }
        for line in ["meshctl node show json --frob", "meshctl frob -o table", "meshctl frob -o"] {
            assert!(!asked(line), "{line}");
        }
    }
}
