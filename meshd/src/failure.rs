use std::fmt;

use mesh_controller::ErrorCode;

/// Why the daemon ends: the same three facts, in the same form, as `meshctl` prints them.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) code: ErrorCode,
    pub(crate) what: String,
    pub(crate) facts: Vec<String>,
    pub(crate) why: String,
    pub(crate) next: String,
    pub(crate) exit: u8,
}

impl Failure {
    /// E0113: a setting that cannot be used.
    pub(crate) fn config(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self {
            code: ErrorCode::ConfigInvalid,
            what: what.into(),
            facts: Vec::new(),
            why: why.into(),
            next: "correct it, then see all settings with `meshd controller config show --origin` (or `meshd node …`)"
                .to_owned(),
            exit: ErrorCode::ConfigInvalid.exit() as u8,
        }
    }

    /// E0902: a command line that cannot be read.
    pub(crate) fn usage(error: &clap::Error) -> Self {
        let text = error.render().to_string();
        let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        let first = lines.next().unwrap_or_default();
        // Without a subcommand clap shows the whole help instead of saying what is missing.
        let (what, facts) = match error.kind() {
            clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
                ("a subcommand is missing".to_owned(), Vec::new())
            }
            _ => {
                let facts = lines.filter(|line| !line.starts_with("For more information"));
                (first.trim_start_matches("error: ").to_owned(), facts.map(str::to_owned).collect())
            }
        };
        Self {
            code: ErrorCode::Usage,
            what,
            facts,
            why: String::new(),
            next: "correct it; `meshd --help` and `meshd ROLE COMMAND --help` show the forms".to_owned(),
            exit: ErrorCode::Usage.exit() as u8,
        }
    }

    /// E0114: no passphrase, and nobody to ask for one.
    pub(crate) fn passphrase(what: impl Into<String>, next: impl Into<String>) -> Self {
        Self {
            code: ErrorCode::PassphraseMissing,
            what: what.into(),
            facts: Vec::new(),
            why: "the CA's keys are sealed with a passphrase, and there is no terminal to ask on".to_owned(),
            next: next.into(),
            exit: ErrorCode::PassphraseMissing.exit() as u8,
        }
    }

    /// E0900: the machine refused something that every program gets.
    pub(crate) fn internal(what: impl Into<String>, source: &dyn std::error::Error) -> Self {
        Self {
            code: ErrorCode::Internal,
            what: what.into(),
            facts: Vec::new(),
            why: source.to_string(),
            next: "see the lines above; if they do not explain it, this is a bug".to_owned(),
            exit: ErrorCode::Internal.exit() as u8,
        }
    }
}

impl From<mesh_controller::StartupError> for Failure {
    fn from(error: mesh_controller::StartupError) -> Self {
        Self {
            code: error.code(),
            what: error.to_string(),
            facts: Vec::new(),
            why: error.why(),
            next: error.next(),
            exit: error.exit(),
        }
    }
}

impl From<mesh_node::StartupError> for Failure {
    fn from(error: mesh_node::StartupError) -> Self {
        let (what, why) = match error.why.split_once(": ") {
            Some((what, why)) => (what.to_owned(), why.to_owned()),
            None => (error.why.clone(), String::new()),
        };
        Self {
            code: error.code,
            what,
            facts: error.facts,
            why,
            next: error.next,
            exit: u8::try_from(error.exit).unwrap_or(1),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "error[{}]: {}", self.code.label(), self.what)?;
        for fact in &self.facts {
            writeln!(f, "  {fact}")?;
        }
        if !self.why.is_empty() {
            writeln!(f, "  why: {}", self.why)?;
        }
        writeln!(f, "  do:  {}", self.next)
    }
}
