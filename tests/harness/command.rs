use std::process::{Command, Stdio};

/// What a program that has ended gave back.
#[derive(Debug, Clone)]
pub struct Ran {
    /// The command line, for messages.
    pub command: String,
    /// Exit code; -1 if a signal ended it.
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    /// # Panics
    /// If the program did not end with exit code 0.
    pub fn ok(self) -> Self {
        self.exits(0)
    }

    /// # Panics
    /// If the program did not end with exit code `code`.
    pub fn exits(self, code: i32) -> Self {
        assert_eq!(self.code, code, "{self}");
        self
    }

    /// Refused with the stable error code `error` ("E0403") and exit code `code`.
    ///
    /// # Panics
    /// If not, or if the message lacks its next step.
    pub fn refused(self, error: &str, code: i32) -> Self {
        assert!(self.stderr.contains(&format!("error[{error}]")), "expected {error}: {self}");
        assert!(self.stderr.contains("do:"), "no next step: {self}");
        self.exits(code)
    }

    /// # Panics
    /// If standard output is not one JSON document.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("not JSON ({error}): {self}"))
    }
}

impl std::fmt::Display for Ran {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} ended with {}\n--- stdout\n{}\n--- stderr\n{}",
            self.command, self.code, self.stdout, self.stderr
        )
    }
}

/// Runs `command` to its end, without input.
///
/// # Panics
/// If it cannot be started.
pub fn run(mut command: Command) -> Ran {
    let line = format!("{command:?}");
    let output =
        command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("cannot run {line}: {error}"));
    Ran {
        command: line,
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}
