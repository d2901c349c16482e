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

#[cfg(test)]
mod tests {
    use clap::ValueEnum as _;

    use super::*;

    #[test]
    fn every_shell_gets_a_script_that_knows_the_commands() {
        for shell in Shell::value_variants() {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "meshctl", &mut script);
            let script = String::from_utf8(script).unwrap();
            for word in ["enroll", "fingerprint", "revoke"] {
                assert!(script.contains(word), "{shell}: {word}");
            }
        }
    }
}
