//! The documentation's transcripts show what `meshctl` really says.

/// Asserts that `page` shows `said` below the prompt that ends with `command`, up to the next prompt; hashes, numbers and
/// paths may differ, `instead` is read in place of names of the page's own.
pub(crate) fn shown(page: &str, command: &str, instead: &[(&str, &str)], said: &str) {
    let prompt =
        |line: &&str| line.split_once("$ ").is_some_and(|(_, typed)| typed.trim_start().starts_with(command));
    let below = page.lines().skip_while(|line| !prompt(line)).skip(1);
    let mut block = below
        .take_while(|line| !line.starts_with("```") && !line.contains("$ "))
        .collect::<Vec<_>>()
        .join("\n");
    instead.iter().for_each(|(theirs, ours)| block = block.replace(theirs, ours));
    let shapes = |text: &str| text.lines().map(shape).filter(|line| !line.is_empty()).collect::<Vec<_>>();
    assert!(!shapes(&block).is_empty(), "nothing is shown below `{command}`");
    assert_eq!(shapes(&block), shapes(said), "below `{command}`; it said:\n{said}");
}

fn shape(line: &str) -> String {
    let word = |word: &str| match word.trim_start_matches('#') {
        hash if hash.starts_with("sha256:") => "sha256:#".to_owned(),
        file if [".json", ".pem"].iter().any(|end| file.trim_end_matches(';').ends_with(end)) => {
            "FILE".to_owned()
        }
        number if number.starts_with(|first: char| first.is_ascii_digit()) => "#".to_owned(),
        _ => word.to_owned(),
    };
    line.split_whitespace().map(word).collect::<Vec<_>>().join(" ")
}
