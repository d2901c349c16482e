//! What the demo prints.

use std::{path::Path, time::Duration};

use serde_json::{Value, json};

use crate::{
    output::{Output, Tone, paint},
    text::{safe, shell_quote},
};

/// Columns of a step's text; the time stands behind it.
const TEXT_COLUMNS: usize = 92;

#[derive(Debug, Clone, Copy)]
pub(super) struct Screen {
    out: Output,
    show: bool,
}

impl Screen {
    pub(super) fn new(out: Output, show: bool) -> Self {
        Self { out, show }
    }

    pub(super) fn line(&self, line: &str) {
        if !self.out.is_json() {
            self.out.line(line);
        }
    }

    /// To stderr, also under `-q`: it explains a failure.
    pub(super) fn talk(&self, text: &str) {
        let mut out = self.out;
        out.quiet = false;
        out.note(text);
    }

    /// A command before it runs, as one would type it on that host.
    pub(super) fn command(&self, host: &str, words: &[&str]) {
        if self.show {
            self.line(&paint(Tone::Dim, &command_line(host, words)));
        }
    }

    pub(super) fn step(&self, number: usize, name: &str, outcome: Result<&String, &str>, took: Duration) {
        self.line(&step_line(number, name, outcome, took));
    }

    /// The one JSON document.
    pub(super) fn document(&self, steps: &[Value], passed: bool, logs: Option<&Path>, total: Duration) {
        if self.out.is_json() {
            let logs = logs.map(|path| path.display().to_string());
            let body =
                json!({ "passed": passed, "seconds": total.as_secs_f64(), "steps": steps, "logs": logs });
            self.out.document("Demo", &body);
        }
    }
}

/// `    alpha$ meshctl ping bravo`
fn command_line(host: &str, words: &[&str]) -> String {
    let words: Vec<_> = words.iter().map(|word| shell_quote(word)).collect();
    format!("    {host}$ {}", words.join(" "))
}

/// ` 2 enroll    alpha 100.64.0.1   bravo 100.64.0.2        0.31s`
fn step_line(number: usize, name: &str, outcome: Result<&String, &str>, took: Duration) -> String {
    let (text, mark) = match outcome {
        Ok(text) => (text.clone(), String::new()),
        Err(why) => (safe(why).into_owned(), format!("{} ", paint(Tone::Bad, "FAILED:"))),
    };
    let used = text.chars().count() + if mark.is_empty() { 0 } else { "FAILED: ".len() };
    let gap = " ".repeat(TEXT_COLUMNS.saturating_sub(used).max(1));
    format!(
        "{number:>2} {} {mark}{text}{gap}{:.2}s",
        paint(Tone::Bold, &format!("{name:<9}")),
        took.as_secs_f64()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_stand_in_columns_and_failures_say_so() {
        let plain = |line: String| anstream::adapter::strip_str(&line).to_string();
        let text = "alpha 100.64.0.1".to_owned();
        let line = plain(step_line(2, "enroll", Ok(&text), Duration::from_millis(310)));
        assert!(line.starts_with(" 2 enroll    alpha 100.64.0.1  "), "{line}");
        assert!(line.ends_with(" 0.31s"), "{line}");
        let line = plain(step_line(10, "offline", Err("no reply"), Duration::ZERO));
        assert!(line.starts_with("10 offline   FAILED: no reply  "), "{line}");
    }

    #[test]
    fn commands_are_shown_as_one_would_type_them() {
        assert_eq!(
            command_line("alpha", &["meshctl", "node", "tag", "a b"]),
            "    alpha$ meshctl node tag 'a b'"
        );
    }
}
