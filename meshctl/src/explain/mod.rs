//! `meshctl explain`: what an error code means.

mod texts;

use mesh_proto::v1::ErrorCode;
use serde_json::json;

use crate::{
    error::{Exit, Failure, Result},
    output::{Output, Tone, paint},
};

/// Codes have four digits.
const CODE_MAX: i32 = 9999;

#[derive(Debug, clap::Args)]
pub(crate) struct Explain {
    /// The code, like E0412; all of them are listed without one
    code: Option<String>,
}

/// Every code there is, in order.
fn all() -> impl Iterator<Item = ErrorCode> {
    (1..=CODE_MAX).filter_map(|number| ErrorCode::try_from(number).ok())
}

fn parse(text: &str) -> Option<ErrorCode> {
    let number: i32 = text.trim_start_matches(['E', 'e']).parse().ok()?;
    ErrorCode::try_from(number).ok().filter(|code| *code != ErrorCode::Unspecified)
}

impl Explain {
    pub(crate) fn run(&self, out: &Output) -> Result<Exit> {
        let Some(text) = &self.code else {
            list(out);
            return Ok(Exit::Done);
        };
        let code = parse(text).ok_or_else(|| {
            Failure::usage(
                format!("{text} is not an error code"),
                "codes look like E0412; `meshctl explain` lists them",
            )
            .exit(Exit::NotFound)
        })?;
        let explained = texts::text(code);
        if out.is_json() {
            out.document("ErrorCode", &document(code));
            return Ok(Exit::Done);
        }
        out.line(&format!("{} {}", paint(Tone::Bold, &format!("{}:", code.label())), explained.title));
        out.line(&format!("\n{}", explained.means));
        out.line(&format!("\ndo:   {}", explained.next));
        out.line(&format!("exit: {}", code.exit() as u8));
        Ok(Exit::Done)
    }
}

fn list(out: &Output) {
    if out.is_json() {
        out.list_document("ErrorCodeList", &all().map(document).collect::<Vec<_>>());
        return;
    }
    all().for_each(|code| out.line(&format!("{}  {}", code.label(), texts::text(code).title)));
}

fn document(code: ErrorCode) -> serde_json::Value {
    let explained = texts::text(code);
    json!({
        "code": code.label(), "name": code.as_str_name(), "title": explained.title, "means": explained.means,
        "do": explained.next, "exit": code.exit() as u8,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_has_a_text_that_says_something() {
        let codes: Vec<ErrorCode> = all().collect();
        assert!(codes.len() > 60, "only {} codes found", codes.len());
        let mut titles = std::collections::BTreeSet::new();
        for code in codes {
            let text = texts::text(code);
            assert!(text.title.len() > 5 && text.means.len() > 20 && text.next.len() > 10, "{code:?}");
            assert!(
                !text.title.ends_with('.') && text.means.ends_with('.') && text.next.ends_with('.'),
                "{code:?}"
            );
            assert!(titles.insert(text.title), "{code:?} has the title of another");
        }
    }

    #[test]
    fn codes_are_taken_as_people_write_them() {
        for text in ["E0412", "e412", "0412", "412"] {
            assert_eq!(parse(text), Some(ErrorCode::RootMismatch), "{text}");
        }
        for text in ["", "E", "E0000", "E9999", "X0412", "-412"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
