//! What goes to the screen: tables for people, one JSON document for programs, bare names for pipes.

use std::io::{self, IsTerminal, Write};

use anstream::ColorChoice;
use comfy_table::{CellAlignment, ContentArrangement, Table as Grid, presets};
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::text;

pub(crate) const API_VERSION: &str = "mesh/v1";

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub(crate) enum Format {
    // No help text of their own: they would triple the length of every --help.
    #[default]
    Table,
    Wide,
    Json,
    Name,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub(crate) enum Color {
    #[default]
    Auto,
    Always,
    Never,
}

/// How a piece of text is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tone {
    Good,
    Warn,
    Bad,
    Dim,
    Bold,
}

impl Tone {
    const fn code(self) -> &'static str {
        match self {
            Self::Good => "32",
            Self::Warn => "33",
            Self::Bad => "31",
            Self::Dim => "2",
            Self::Bold => "1",
        }
    }
}

/// `text` with a colour; the stream takes it away again where none is wanted.
pub(crate) fn paint(tone: Tone, text: &str) -> String {
    format!("\x1b[{}m{text}\x1b[0m", tone.code())
}

/// Rows under a header, aligned; the last column may carry a tone.
#[derive(Debug)]
pub(crate) struct Table {
    header: Vec<&'static str>,
    rows: Vec<(Vec<String>, Option<Tone>)>,
}

impl Table {
    pub(crate) fn new(header: &[&'static str]) -> Self {
        Self { header: header.to_vec(), rows: Vec::new() }
    }

    /// Adds a row; foreign characters that steer terminals are made visible.
    pub(crate) fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.toned_row(cells, None);
    }

    pub(crate) fn toned_row<const N: usize>(&mut self, cells: [String; N], tone: Option<Tone>) {
        debug_assert_eq!(N, self.header.len());
        let cells = cells
            .iter()
            .map(|cell| if cell.is_empty() { "-".to_owned() } else { text::safe(cell).into_owned() });
        self.rows.push((cells.collect(), tone));
    }

    /// The lines, with colours.
    pub(crate) fn lines(&self) -> Vec<String> {
        let mut grid = Grid::new();
        grid.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
        grid.set_header(self.header.clone());
        for (cells, _) in &self.rows {
            grid.add_row(cells.clone());
        }
        for column in grid.column_iter_mut() {
            column.set_padding((0, 2));
            column.set_cell_alignment(CellAlignment::Left);
        }
        let tones = std::iter::once(Some(Tone::Bold)).chain(self.rows.iter().map(|(_, tone)| *tone));
        let lasts = std::iter::once(None).chain(self.rows.iter().map(|(cells, _)| cells.last()));
        grid.lines()
            .zip(tones.zip(lasts))
            .map(|(line, (tone, last))| {
                let line = line.trim_end();
                match (tone, last) {
                    (Some(tone), None) => paint(tone, line),
                    (Some(tone), Some(last)) if line.ends_with(last.as_str()) => {
                        let start = line.len() - last.len();
                        format!("{}{}", &line[..start], paint(tone, last))
                    }
                    _ => line.to_owned(),
                }
            })
            .collect()
    }
}

/// A listing in all its forms.
#[derive(Debug)]
pub(crate) struct Listing {
    pub(crate) kind: &'static str,
    pub(crate) items: Vec<Value>,
    pub(crate) names: Vec<String>,
    pub(crate) table: Table,
    /// Said instead of an empty table.
    pub(crate) empty: &'static str,
}

/// Where everything meshctl says goes through.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    pub(crate) format: Format,
    pub(crate) quiet: bool,
    pub(crate) verbose: bool,
    ascii: bool,
}

impl Output {
    pub(crate) fn new(format: Format, color: Color, quiet: bool, verbose: bool) -> Self {
        match color {
            Color::Auto => ColorChoice::Auto,
            Color::Always => ColorChoice::Always,
            Color::Never => ColorChoice::Never,
        }
        .write_global();
        Self { format, quiet, verbose, ascii: io::stdout().is_terminal() && !locale_is_utf8() }
    }

    pub(crate) fn is_json(&self) -> bool {
        self.format == Format::Json
    }

    pub(crate) fn is_wide(&self) -> bool {
        self.format == Format::Wide
    }

    /// A line of data.
    pub(crate) fn line(&self, line: &str) {
        self.write(&format!("{line}\n"));
    }

    /// Data as it is, for instance a PEM file.
    pub(crate) fn write(&self, data: &str) {
        let data = if self.ascii { data.replace('…', "...") } else { data.to_owned() };
        write_out(data.as_bytes());
    }

    /// Talk: to stderr, silenced by `-q`.
    pub(crate) fn note(&self, line: &str) {
        if !self.quiet {
            let _ = writeln!(anstream::stderr(), "{line}");
        }
    }

    /// Talk for `-v` only.
    pub(crate) fn detail(&self, line: &str) {
        if self.verbose {
            let _ = writeln!(anstream::stderr(), "{line}");
        }
    }

    pub(crate) fn listing(&self, listing: &Listing) {
        match self.format {
            Format::Json => self.list_document(listing.kind, &listing.items),
            Format::Name => listing.names.iter().for_each(|name| self.line(&text::safe(name))),
            Format::Table | Format::Wide if listing.items.is_empty() => self.note(listing.empty),
            Format::Table | Format::Wide => listing.table.lines().iter().for_each(|line| self.line(line)),
        }
    }

    pub(crate) fn list_document(&self, kind: &str, items: &[Value]) {
        self.json(&json!({ "apiVersion": API_VERSION, "kind": kind, "items": items }));
    }

    /// One document of `kind` with the fields of `body`, which must be an object.
    pub(crate) fn document<T: Serialize>(&self, kind: &str, body: &T) {
        self.json(&document(kind, body));
    }

    /// The end of an action: a JSON document with `changed`, the bare `name`, or lines of text.
    pub(crate) fn action(&self, kind: &str, changed: bool, body: Value, name: &str, lines: &[String]) {
        match self.format {
            Format::Json => {
                let mut document = document(kind, &body);
                document["changed"] = Value::Bool(changed);
                self.json(&document);
            }
            Format::Name if name.is_empty() => {}
            Format::Name => self.line(&text::safe(name)),
            Format::Table | Format::Wide if self.quiet => {}
            Format::Table | Format::Wide => lines.iter().for_each(|line| self.line(line)),
        }
    }

    fn json(&self, value: &Value) {
        let mut text = serde_json::to_string_pretty(value).expect("a value of strings, numbers and maps");
        text.push('\n');
        write_out(text.as_bytes());
    }
}

fn document<T: Serialize>(kind: &str, body: &T) -> Value {
    let mut object = Map::new();
    object.insert("apiVersion".to_owned(), API_VERSION.into());
    object.insert("kind".to_owned(), kind.into());
    match serde_json::to_value(body).expect("documents hold strings, numbers and maps") {
        Value::Object(fields) => object.extend(fields),
        other => {
            object.insert("value".to_owned(), other);
        }
    }
    Value::Object(object)
}

/// Text to stdout, without its colours where none are wanted.
pub(crate) fn write_text(text: &str) {
    write_out(text.as_bytes());
}

fn write_out(data: &[u8]) {
    let mut stdout = anstream::stdout().lock();
    settle(stdout.write_all(data).and_then(|()| stdout.flush()));
}

/// Bytes to stdout as they are, for instance DER.
pub(crate) fn write_bytes(data: &[u8]) {
    let mut stdout = io::stdout().lock();
    settle(stdout.write_all(data).and_then(|()| stdout.flush()));
}

/// A reader that went away (`| head`) is not our error.
fn settle(written: io::Result<()>) {
    match written {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        Err(error) => {
            let _ = writeln!(io::stderr(), "cannot write to stdout: {error}");
            std::process::exit(1);
        }
        Ok(()) => {}
    }
}

fn locale_is_utf8() -> bool {
    ["LC_ALL", "LC_CTYPE", "LANG"]
        .iter()
        .find_map(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
        .is_some_and(|value| {
            let value = value.to_ascii_lowercase();
            value.contains("utf-8") || value.contains("utf8")
        })
}

/// Words for one and many: `1 certificate`, `2 certificates`.
pub(crate) fn count(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(lines: &[String]) -> String {
        anstream::adapter::strip_str(&lines.join("\n")).to_string()
    }

    #[test]
    fn tables_have_no_borders_and_no_trailing_blanks() {
        let mut table = Table::new(&["NODE", "MESH IP", "STATE"]);
        table.toned_row(["web-1".into(), "100.64.0.11".into(), "ok".into()], Some(Tone::Good));
        table.row(["db-2".into(), String::new(), "cut off on 3/3".into()]);
        let lines = table.lines();
        assert_eq!(
            plain(&lines),
            "NODE   MESH IP      STATE\nweb-1  100.64.0.11  ok\ndb-2   -            cut off on 3/3"
        );
        assert!(lines[1].ends_with("\x1b[32mok\x1b[0m"), "{:?}", lines[1]);
    }

    #[test]
    fn a_name_from_elsewhere_stays_on_its_line() {
        let mut table = Table::new(&["NODE", "STATE"]);
        table.row(["evil\n\x1b[2J".into(), "ok".into()]);
        assert_eq!(table.lines().len(), 2);
        assert!(!table.lines()[1].contains('\x1b'));
    }

    #[test]
    fn documents_carry_version_kind_and_fields() {
        let text = serde_json::to_string(&document("Node", &json!({ "name": "web-1" }))).unwrap();
        assert_eq!(text, r#"{"apiVersion":"mesh/v1","kind":"Node","name":"web-1"}"#);
    }

    #[test]
    fn counted_nouns_agree() {
        assert_eq!((count(1, "token"), count(0, "token")), ("1 token".to_owned(), "0 tokens".to_owned()));
    }
}
