//! Strings from files, as a terminal may see them.

/// `text` with its control characters escaped, `\n` and `\u{1b}`, so that it stays on its line and commands no terminal.
pub fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character.is_control() {
            true => out.extend(character.escape_default()),
            false => out.push(character),
        }
    }
    out
}

/// The same for a message, whose lines stay lines.
pub fn escaped_lines(text: &str) -> String {
    text.split('\n').map(escaped).collect::<Vec<_>>().join("\n")
}

/// The same for a text that lays itself out: its lines and tabs stay.
pub fn escaped_layout(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for part in text.split_inclusive(['\n', '\t']) {
        let body = part.trim_end_matches(['\n', '\t']);
        out += &escaped(body);
        out += &part[body.len()..];
    }
    out
}
