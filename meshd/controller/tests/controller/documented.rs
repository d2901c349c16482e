//! The documentation's transcripts show what programs really said.

const CERTIFICATES: &str = include_str!("../../../../docs/certificates.md");

/// Asserts that `docs/certificates.md` shows `said` below the prompt that starts with `command`; moments, lengths
/// and hashes may differ.
pub(crate) fn shown(command: &str, said: &str) {
    let prompt = CERTIFICATES.split(&format!("$ {command}")).nth(1).expect("the page has the command");
    let block = prompt.split("```").next().unwrap().split_once('\n').unwrap().1;
    let shapes = |text: &str| text.lines().map(shape).filter(|line| !line.is_empty()).collect::<Vec<_>>();
    assert_eq!(shapes(block), shapes(said), "docs/certificates.md, below `$ {command}`; it said:\n{said}");
}

fn shape(line: &str) -> String {
    const NAMES: &str = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec Mon, Tue, Wed, Thu, Fri, Sat, Sun,";
    let differs = |word: &str| {
        word.starts_with('"')
            || word.starts_with(|first: char| first.is_ascii_digit())
            || NAMES.split(' ').any(|name| name == word)
    };
    line.split_whitespace().map(|word| if differs(word) { "#" } else { word }).collect::<Vec<_>>().join(" ")
}
