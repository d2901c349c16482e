//! The daemon. Picks the role and parses everything before a socket opens.
#![forbid(unsafe_code)]

mod cli;
mod config;
mod failure;
mod passphrase;
mod role;

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    match role::run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprint!("{failure}");
            ExitCode::from(failure.exit)
        }
    }
}
