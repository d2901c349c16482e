//! Transcripts in the documentation, held against what programs really say.

/// Asserts that `page` shows `said` below the prompt that begins with `command`, up to the next prompt. What differs from
/// run to run may differ: numbers, moments, hashes, names of files. `instead` is read in place of names of the page's own.
///
/// # Panics
/// If the page has no such prompt, shows nothing below it, or something else.
pub fn assert_shown(page: &str, command: &str, instead: &[(&str, &str)], said: &str) {
    let is_prompt =
        |line: &&str| line.split_once("$ ").is_some_and(|(_, typed)| typed.trim_start().starts_with(command));
    let below = page.lines().skip_while(|line| !is_prompt(line)).skip(1);
    let block = below.take_while(|line| !line.starts_with("```") && !line.contains("$ "));
    let mut block = block.collect::<Vec<_>>().join("\n");
    instead.iter().for_each(|(theirs, ours)| block = block.replace(theirs, ours));
    let shapes = |text: &str| text.lines().map(shape).filter(|line| !line.is_empty()).collect::<Vec<_>>();
    assert!(!shapes(&block).is_empty(), "nothing is shown below `{command}`");
    assert_eq!(shapes(&block), shapes(said), "below `{command}`; it said:\n{said}");
}

/// A line without what differs from run to run, the width of columns included.
fn shape(line: &str) -> String {
    const CALENDAR: &str =
        "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec Mon, Tue, Wed, Thu, Fri, Sat, Sun,";
    let word = |word: &str| {
        let bare = word.trim_start_matches('#').trim_end_matches([':', ';', ',']);
        let counts = bare.starts_with(|first: char| first.is_ascii_digit());
        let differs = word.starts_with('"') || counts || CALENDAR.split(' ').any(|name| name == word);
        match bare {
            hash if hash.starts_with("sha256:") => "HASH".to_owned(),
            file if [".json", ".pem"].iter().any(|end| file.ends_with(end)) => "FILE".to_owned(),
            _ if differs => "#".to_owned(),
            _ => word.to_owned(),
        }
    };
    line.split_whitespace().map(word).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str =
        "```text\na$ tool one\nkey sha256:8a…f5 in key.pem, 3 of 4\nnext: two\nb$   tool two\n```\nend\n";

    #[test]
    fn what_differs_from_run_to_run_may_differ() {
        assert_shown(
            PAGE,
            "tool one",
            &[("next", "then")],
            "key   sha256:00 in /tmp/x.pem, 7 of 9\n\nthen: two\n",
        );
    }

    #[test]
    fn nothing_else_may() {
        let holds = |command: &str, said: &str| {
            let (command, said) = (command.to_owned(), said.to_owned());
            std::panic::catch_unwind(move || assert_shown(PAGE, &command, &[], &said)).is_ok()
        };
        assert!(holds("tool one", "key sha256:8a in key.pem, 3 of 4\nnext: two"));
        for (command, said) in [
            ("tool one", "key sha256:8a in key.pem, 3 of 4"),
            ("tool one", "key sha256:8a in key.pem, three of 4\nnext: two"),
            ("tool one", "key sha256:8a in key.pem, 3 of 4\nnext: two\nand more"),
            ("tool two", ""),
            ("tool three", "next: two"),
        ] {
            assert!(!holds(command, said), "{command}: {said}");
        }
    }
}
