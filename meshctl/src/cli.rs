//! The command line: every name here is a promise to scripts.

use std::path::PathBuf;

use clap::{Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand};

use crate::{
    app::{App, Watch},
    audit, ca, cert,
    client::{Places, Target},
    clock, completions, demo, doctor, enroll,
    error::EXIT_CODES,
    explain, login, man, node, operator,
    output::{Color, Format, Output},
    ping, policy, probe, status,
    text::Span,
    token,
};

/// Enroll servers, see the mesh, issue and revoke certificates
#[derive(Debug, Parser)]
#[command(name = "meshctl", version, disable_help_subcommand = true, max_term_width = 110)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) globals: Globals,
    #[command(subcommand)]
    pub(crate) command: Command,
}

impl Cli {
    /// The tree of commands as `--help` and the manual show it.
    pub(crate) fn command_with_exit_codes() -> clap::Command {
        with_exit_codes(Self::command())
    }

    /// Reads the process's command line.
    pub(crate) fn read() -> Result<Self, clap::Error> {
        let matches = Self::command_with_exit_codes()
            .try_get_matches_from(node::options_first(std::env::args_os().collect()))?;
        Self::from_arg_matches(&matches)
    }
}

/// Exit codes belong to the contract of every command, so every `--help` ends with them.
fn with_exit_codes(command: clap::Command) -> clap::Command {
    command.after_help(EXIT_CODES).mut_subcommands(with_exit_codes)
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Global options")]
pub(crate) struct Globals {
    /// Controller to ask: https://HOST:PORT or unix:PATH
    #[arg(long, global = true, env = "MESH_CONTROLLER", value_name = "URL", hide_env_values = true)]
    controller: Option<Target>,
    /// Socket of the local meshd node
    #[arg(long, global = true, env = "MESH_SOCKET", value_name = "PATH", hide_env_values = true)]
    socket: Option<PathBuf>,
    /// How to show the answer: columns, more columns, one JSON document, or bare names
    #[arg(short, long, global = true, value_enum, default_value_t, value_name = "FORMAT")]
    output: Format,
    /// Longest wait for an answer, for instance 10s
    #[arg(long, global = true, env = "MESH_TIMEOUT", value_name = "TIME", hide_env_values = true)]
    timeout: Option<Span>,
    /// When to use colours; NO_COLOR turns them off as well
    #[arg(long, global = true, value_enum, default_value_t, value_name = "WHEN")]
    color: Color,
    /// Do not ask before what cannot be undone
    #[arg(long, short = 'y', global = true)]
    yes: bool,
    /// Say only what was asked for
    #[arg(long, short, global = true)]
    quiet: bool,
    /// Say more on stderr
    #[arg(long, short, global = true, conflicts_with = "quiet")]
    verbose: bool,
}

impl Globals {
    pub(crate) fn output(&self) -> Output {
        Output::new(self.output, self.color, self.quiet, self.verbose)
    }

    pub(crate) fn app(&self) -> App {
        let places = Places {
            controller: self.controller.clone(),
            socket: self.socket.clone(),
            timeout: self.timeout.map(|span| span.0),
        };
        App { places, out: self.output(), yes: self.yes }
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Create, list and revoke the tokens new nodes join with
    #[command(subcommand)]
    Token(token::Command),
    /// Join this machine to a mesh; talks to the meshd node that runs here
    Enroll(enroll::Enroll),
    /// Take this machine out of its mesh and forget its identity
    Leave(enroll::Leave),
    /// The enrolled machines
    #[command(subcommand)]
    Node(node::Command),
    /// Issue, list, renew, revoke and check certificates
    #[command(subcommand)]
    Cert(cert::Command),
    /// The certificate authority: root, issuing CAs, CRLs
    #[command(subcommand)]
    Ca(ca::Command),
    /// Who may reach whom, and who may hold which name
    #[command(subcommand)]
    Policy(policy::Command),
    /// The fleet as the controller sees it, or this node and its peers
    Status(status::Status),
    /// Reach a node step by step: underlay, handshake, overlay
    Ping(ping::Ping),
    /// Look for everything that could be wrong with this node or, on the controller, with the fleet
    Doctor(doctor::Doctor),
    /// Who did what, in a log that shows tampering
    #[command(subcommand)]
    Audit(audit::Command),
    /// The people who may use this controller
    #[command(subcommand)]
    Operator(operator::Command),
    /// The controller's clock, after it jumped
    #[command(subcommand)]
    Clock(clock::Command),
    /// Become an operator on this machine with a one-time token
    Login(login::Login),
    /// Build a mesh of three nodes on this machine and try everything, in seconds
    Demo(demo::Demo),
    /// Print the completion script of a shell
    Completions(completions::Completions),
    /// What an error code means and what to do about it
    Explain(explain::Explain),
    /// Write the manual pages; for whoever packages this
    #[command(hide = true)]
    Man(man::Man),
    /// HTTPS with mutual TLS, for the demo and for tests
    #[command(hide = true, subcommand)]
    Probe(probe::Command),
}

/// `ls` without filters of its own.
#[derive(Debug, Args)]
pub(crate) struct List {
    #[command(flatten)]
    pub(crate) watch: Watch,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_tree_is_consistent() {
        Cli::command().debug_assert();
    }

    /// Every command line of the contract parses.
    #[test]
    fn the_contract_parses() {
        let lines = "
            token create | token create --tag web --tag db --name web-1 --uses 3 --ttl 1h --require-approval | token ls | token revoke 00ff
            enroll | enroll mesh1_x | enroll --token-file t | enroll - | enroll - --name web-1 --no-wait | leave
            node ls | node show web-1 | node approve web-1 | node tag web-1 +a -b | node revoke web-1 --reason key-compromise --wait
            node revoke web-1 --wait=5s | node rm web-1 | node rotate-keys web-1 | node ls --watch | node ls -o json | node ls --watch=5s
            cert issue api.mesh.internal 100.64.0.1 --out d --profile server --ttl 24h --owner a:b --mode 0640 --reload x --rotate-key
            cert issue api.mesh.internal --combined --p12 --p12-passphrase-file f
            ca backup --out f --passphrase-file p | ca import-crl f
            cert issue --csr - | cert issue --csr f -o json | cert ls --expiring 30d --node web-1 | cert inspect https://h:1 | cert inspect f.pem | ca trust install --root d | ca trust remove | cert ls --name api --issuer 0a --state revoked | doctor --outage 60h | cert show 00ff | cert show f.pem | cert renew api
            cert revoke api --reason superseded --wait=30s | cert verify f.pem
            ca rotate start --root --auto | ca rotate start --request-out f | ca rotate start --response f --auto | ca rotate status | ca rotate advance | ca rotate abort --yes
            ca seal --out f --passphrase-file p | ca sign-issuer --root f --passphrase-file - --request r --out a
            ca show | ca root | ca root --out f | ca fingerprint | ca crl | ca crl --der | policy show | policy check f | policy apply f
            status | status --check | status -o wide | ping web-1 | doctor | audit log | audit log --follow --since 24h | audit verify
            operator add alice --role admin | operator ls | operator rm alice | login https://ctl:7443 | login ctl --token-file f
            demo | demo --nodes 3 --stay --show | completions bash | explain E0412 | status --controller unix:/x --timeout 5s --yes -q
            status -v --socket /run/x.sock --color never -o name";
        for line in lines.split(['|', '\n']).map(str::trim).filter(|line| !line.is_empty()) {
            let words = std::iter::once("meshctl").chain(line.split_whitespace());
            if let Err(error) = Cli::try_parse_from(words) {
                panic!("{line}: {error}");
            }
        }
    }

    #[test]
    fn every_help_ends_with_the_exit_codes() {
        fn check(command: &mut clap::Command) {
            let help = command.render_help().to_string();
            assert!(help.contains("7  conflict"), "{help}");
            command.get_subcommands_mut().for_each(check);
        }
        check(&mut with_exit_codes(Cli::command()));
    }
}
