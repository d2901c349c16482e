//! `meshctl completions`: the completion script of a shell.

use clap::CommandFactory;
use clap_complete::Shell;

use crate::{cli::Cli, error::Exit, output::write_bytes};

#[derive(Debug, clap::Args)]
pub(crate) struct Completions {
    /// Which shell
    #[arg(value_enum)]
    shell: Shell,
}

impl Completions {
    pub(crate) fn run(&self) -> Exit {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "meshctl", &mut script);
        write_bytes(&script);
        Exit::Done
    }
}
