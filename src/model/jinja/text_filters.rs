//! Jinja's filters that take their value as a text.

use super::{
    Error, Result,
    access::of_safe,
    interpreter::{Interpreter, Passed},
    methods::{self, int_argument, is_true, text_argument},
    text::{self, Builder, Letter},
    value::Value,
};

/// The widest that a filter may make an indentation.
const WIDEST: usize = 100_000;

impl Interpreter<'_> {
    /// A filter that takes its value as a text.
    pub fn text_filter(&mut self, name: &str, value: &Value, passed: Passed) -> Result<Value> {
        let text = match (name, value) {
            (
                "upper" | "lower" | "capitalize" | "title" | "trim" | "center" | "indent"
                | "wordwrap" | "truncate",
                Value::Safe(_),
            ) => return Err(of_safe(&format!("the filter {name}"))),
            (
                "upper" | "lower" | "capitalize" | "title" | "trim" | "center" | "indent"
                | "wordwrap" | "truncate" | "replace" | "wordcount" | "striptags" | "urlencode",
                value,
            ) => value.to_text()?,
            _ => return Err(Error::new(format!("there is no filter {name}"))),
        };
        let made = |letters: Vec<Letter>| Ok(Value::text(letters));
        match name {
            "upper" => made(text::upper(&text)),
            "lower" => made(text::lower(&text)),
            "capitalize" => made(text::capitalize(&text)),
            "title" => {
                let begins = |c: char| text::is_space(c) || "-({[<".contains(c);
                let words = text.chunk_by(|a, b| begins(a.char()) == begins(b.char()));
                made(words.flat_map(text::capitalize).collect())
            }
            "trim" => methods::call(&Value::Text(text), "strip", passed),
            "replace" => {
                let [old, new, count] = passed.take(name, ["old", "new", "count"])?;
                let as_text = |value: Option<Value>| match value {
                    Some(value) => value.to_text(),
                    None => Err(Error::new("replace takes what to replace, and with what")),
                };
                let count = int_argument(count, name)?.unwrap_or(-1);
                let most = usize::try_from(count).unwrap_or(usize::MAX);
                made(text::replace(&text, &as_text(old)?, &as_text(new)?, most)?)
            }
            "center" => {
                let [width] = passed.take(name, ["width"])?;
                let width = width.unwrap_or(Value::Int(80));
                methods::call(&Value::Text(text), "center", Passed::of(vec![width]))
            }
            "indent" => indent(&text, passed),
            "wordcount" => {
                let in_word =
                    |letter: &Letter| letter.char() == '_' || letter.char().is_alphanumeric();
                let words = text.chunk_by(|a, b| in_word(a) == in_word(b));
                let words = words.filter(|word| word.first().is_some_and(in_word));
                Ok(Value::Int(words.count() as i128))
            }
            "wordwrap" => {
                let names = [
                    "width",
                    "break_long_words",
                    "wrapstring",
                    "break_on_hyphens",
                ];
                let [width, break_long, newline, break_on_hyphens] = passed.take(name, names)?;
                let break_on_hyphens = break_on_hyphens.is_none_or(|value| value.is_true());
                if break_on_hyphens && text.iter().any(|letter| letter.char() == '-') {
                    return Err(Error::new(
                        "wordwrap at hyphens is not supported; break_on_hyphens=false keeps to blanks",
                    ));
                }
                let width = self.width(width, name, 79)?.max(1);
                let break_long = break_long.is_none_or(|value| value.is_true());
                let newline = match newline {
                    Some(Value::Text(newline)) => newline,
                    _ => text::written("\n").into(),
                };
                let lines = text::lines(&text, false);
                let lines = lines.into_iter().map(|line| {
                    let wrapped = wrap(line, width, break_long);
                    text::join(&newline, wrapped)
                });
                let lines: Vec<_> = lines.collect::<Result<_>>()?;
                made(text::join(&newline, lines.iter().map(Vec::as_slice))?)
            }
            "truncate" => {
                let names = ["length", "killwords", "end", "leeway"];
                let [length, kill, end, leeway] = passed.take(name, names)?;
                let length = self.width(length, name, 255)?;
                let leeway = self.width(leeway, name, 5)?;
                let end = match end {
                    Some(end) => end.to_text()?,
                    None => text::written("...").into(),
                };
                if value.len()? <= length + leeway {
                    return Ok(value.clone());
                }
                let text = text_argument(Some(value.clone()), name)?;
                let cut = &text[..length.saturating_sub(end.len())];
                let cut = match is_true(kill) {
                    true => cut,
                    false => text::split_from_right(cut, &text::written(" "), 1)[0],
                };
                made(text::join(&[], [cut, &end])?)
            }
            "striptags" => made(strip_tags(&text)?),
            // urlencode
            _ => match value {
                Value::Dict(_) | Value::List(_) => {
                    let pairs = match value {
                        Value::Dict(_) => methods::items(value)?,
                        value => value.iterate()?,
                    };
                    let pair = |pair: Value| match pair.iterate()?.as_slice() {
                        [key, value] => {
                            let (key, value) = (key.to_text()?, value.to_text()?);
                            let (key, value) = (url(&key, true)?, url(&value, true)?);
                            text::join(&text::written("="), [key.as_slice(), &value])
                        }
                        _ => Err(Error::new("urlencode takes pairs")),
                    };
                    let pairs: Vec<_> = pairs.into_iter().map(pair).collect::<Result<_>>()?;
                    let pairs = pairs.iter().map(Vec::as_slice);
                    made(text::join(&text::written("&"), pairs)?)
                }
                _ => made(url(&text, false)?),
            },
        }
    }
}

fn indent(letters: &[Letter], passed: Passed) -> Result<Value> {
    let [width, first, blank] = passed.take("indent", ["width", "first", "blank"])?;
    let (first, blank) = (is_true(first), is_true(blank));
    let indentation = match width {
        Some(Value::Text(text)) => text.to_vec(),
        width => {
            let width = usize::try_from(int_argument(width, "indent")?.unwrap_or(4)).unwrap_or(0);
            text::written(&" ".repeat(width.min(WIDEST)))
        }
    };
    // As if the text ended with one more line end, so that one at its end counts.
    let newline = text::written("\n");
    let ended = text::join(&[], [letters, &newline])?;
    let mut out = Builder::default();
    for (number, line) in text::lines(&ended, false).into_iter().enumerate() {
        if number > 0 {
            out.push(&newline)?;
        }
        let indents = if number == 0 {
            first
        } else {
            blank || !line.is_empty()
        };
        if indents {
            out.push(&indentation)?;
        }
        out.push(line)?;
    }
    Ok(Value::text(out.finish()))
}

/// Lines of at most `width` letters, cut at blanks, which go where a line is cut.
fn wrap(line: &[Letter], width: usize, break_long: bool) -> Vec<&[Letter]> {
    let chunks = line.chunk_by(|a, b| a.is_space() == b.is_space());
    let mut lines: Vec<&[Letter]> = Vec::new();
    // Where the current line begins and ends.
    let (mut start, mut end) = (0, 0);
    for chunk in chunks {
        let (is_blank, mut rest) = (chunk[0].is_space(), chunk.len());
        if is_blank && start == end && !lines.is_empty() {
            (start, end) = (end + rest, end + rest);
            continue;
        }
        if end - start + rest > width && start < end && !(break_long && rest > width) {
            lines.push(text::strip_end(&line[start..end], Letter::is_space));
            start = end;
            if is_blank {
                (start, end) = (end + rest, end + rest);
                continue;
            }
        }
        while break_long && end - start + rest > width {
            let taken = width - (end - start);
            lines.push(&line[start..end + taken]);
            (start, end, rest) = (end + taken, end + taken, rest - taken);
        }
        end += rest;
    }
    lines.push(text::strip_end(&line[start..end], Letter::is_space));
    lines.retain(|line| !line.is_empty());
    lines
}

fn strip_tags(letters: &[Letter]) -> Result<Vec<Letter>> {
    let without = |letters: &[Letter], open: &str, close: &str| -> Result<Vec<Letter>> {
        let (open, close) = (text::written(open), text::written(close));
        let mut out = Builder::default();
        let mut rest = letters;
        let find = |letters: &[Letter], sign: &[Letter]| {
            letters.windows(sign.len()).position(|part| part == sign)
        };
        while let Some(start) = find(rest, &open)
            && let Some(end) = find(&rest[start..], &close)
        {
            out.push(&rest[..start])?;
            rest = &rest[start + end + close.len()..];
        }
        out.push(rest)?;
        Ok(out.finish())
    };
    let letters = without(letters, "<!--", "-->")?;
    let letters = without(&letters, "<", ">")?;
    let mut letters = text::join(&text::written(" "), text::words(&letters, usize::MAX))?;
    for (entity, character) in [
        ("&lt;", '<'),
        ("&gt;", '>'),
        ("&#34;", '"'),
        ("&quot;", '"'),
        ("&#39;", '\''),
        ("&amp;", '&'),
    ] {
        let entity = text::written(entity);
        let mut out = Builder::default();
        let mut done = 0;
        for at in text::matches(&letters, &entity) {
            out.push(&letters[done..at])?;
            done = at + entity.len();
            // Given where any letter of it was.
            let spelled = &letters[at..done];
            let by = spelled.iter().find(|letter| letter.is_given());
            out.push(&[by.unwrap_or(&spelled[0]).with(character)])?;
        }
        out.push(&letters[done..])?;
        letters = out.finish();
    }
    Ok(letters)
}

/// Percent-encoded; `query`: for a query, in which a blank is `+` and a slash is encoded too.
fn url(letters: &[Letter], query: bool) -> Result<Vec<Letter>> {
    let mut out = Builder::default();
    for &letter in letters {
        match letter.char() {
            c if c.is_ascii_alphanumeric() || "_.-~".contains(c) || (c == '/' && !query) => {
                out.push(&[letter])?;
            }
            ' ' if query => out.push(&[letter.with('+')])?,
            c => {
                for byte in c.encode_utf8(&mut [0; 4]).bytes() {
                    out.write_as(letter, &format!("%{byte:02X}"))?;
                }
            }
        }
    }
    Ok(out.finish())
}
