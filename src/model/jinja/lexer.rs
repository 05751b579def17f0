//! A template's source as tokens, cut as Jinja 3.1 cuts it with `trim_blocks` and `lstrip_blocks`: what is text, what is
//! a tag, and which white space around tags goes.

use super::{
    Error, Result,
    text::{Letter, is_space},
};

#[derive(Debug, Clone, PartialEq)]
pub enum Token {
    Data(Vec<Letter>),
    BlockBegin,
    BlockEnd,
    VariableBegin,
    VariableEnd,
    Name(String),
    Text(Vec<Letter>),
    Int(i128),
    Float(f64),
    Operator(&'static str),
    End,
}

pub struct Lexeme {
    pub token: Token,
    /// Counted from 1.
    pub line: usize,
}

/// The longest first.
const OPERATORS: [&str; 25] = [
    "**", "//", "==", "!=", ">=", "<=", "+", "-", "*", "/", "%", "~", "[", "]", "(", ")", "{", "}",
    ">", "<", "=", ".", ":", "|", ",",
];

/// Cuts up a source. One line end at its end does not count, and every line end is a line feed.
pub fn tokens(source: &str) -> Result<Vec<Lexeme>> {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let source = source.strip_suffix('\n').unwrap_or(&source);
    let mut lexer = Lexer {
        rest: source,
        line: 1,
        line_starts: true,
        tokens: Vec::new(),
    };
    match lexer.run() {
        Ok(()) => Ok(lexer.tokens),
        Err(error) => Err(error.at(lexer.line)),
    }
}

struct Lexer<'a> {
    rest: &'a str,
    line: usize,
    /// Whether what was read last ends a line.
    line_starts: bool,
    tokens: Vec<Lexeme>,
}

impl<'a> Lexer<'a> {
    fn run(&mut self) -> Result<()> {
        while let Some(at) = find_first(self.rest, &["{%", "{{", "{#"]) {
            let opening = &self.rest[at..at + 2];
            let sign = sign(&self.rest[at + 2..]);
            self.data(at, sign, opening != "{{");
            let line = self.line;
            self.take(2 + sign.len());
            match opening {
                "{#" => self.comment().map_err(|error| error.at(line))?,
                "{{" => self.tag(Token::VariableBegin, "}}", Token::VariableEnd)?,
                _ => match raw_tag(self.rest, "raw", false) {
                    Some(len) => self.raw(len).map_err(|error| error.at(line))?,
                    None => self.tag(Token::BlockBegin, "%}", Token::BlockEnd)?,
                },
            }
        }
        self.data(self.rest.len(), "", false);
        self.push(Token::End);
        Ok(())
    }

    /// Reads on by `len` bytes.
    fn take(&mut self, len: usize) -> &'a str {
        let (taken, rest) = self.rest.split_at(len);
        self.line += taken.matches('\n').count();
        self.line_starts = match taken.chars().last() {
            Some(last) => last == '\n',
            None => self.line_starts,
        };
        self.rest = rest;
        taken
    }

    fn push(&mut self, token: Token) {
        let line = self.line;
        self.tokens.push(Lexeme { token, line });
    }

    /// Text up to a tag that begins with `sign`; `block`: a tag before which `lstrip_blocks` takes away blanks.
    fn data(&mut self, len: usize, sign: &str, block: bool) {
        let line = self.line;
        let started = self.line_starts;
        let text = self.take(len);
        let line_start = text.rfind('\n').map(|at| at + 1);
        let kept = match sign {
            "-" => text.trim_end_matches(is_space),
            "" if block => match line_start.or(started.then_some(0)) {
                Some(start) if text[start..].chars().all(is_space) => &text[..start],
                _ => text,
            },
            _ => text,
        };
        if !kept.is_empty() {
            let token = Token::Data(kept.chars().map(Letter::written).collect());
            self.tokens.push(Lexeme { token, line });
        }
    }

    fn comment(&mut self) -> Result<()> {
        let end = self.rest.find("#}");
        let end = end.ok_or_else(|| Error::new("a comment does not end: #} is missing"))?;
        let sign = match self.rest[..end].chars().last() {
            Some('-') => "-",
            Some('+') => "+",
            _ => "",
        };
        self.take(end + 2);
        self.after_tag(sign, true);
        Ok(())
    }

    /// Takes what a tag's end takes with it: all white space after `-`, one line end where `trim_blocks` applies.
    fn after_tag(&mut self, sign: &str, trims: bool) {
        let len = match sign {
            "-" => self.rest.len() - self.rest.trim_start_matches(is_space).len(),
            "" if trims && self.rest.starts_with('\n') => 1,
            _ => 0,
        };
        if len > 0 {
            self.take(len);
        }
    }

    /// From the `raw` of an opening tag, `len` bytes long, to behind `endraw`.
    fn raw(&mut self, len: usize) -> Result<()> {
        let opening = self.take(len);
        let ends_with_sign = opening.ends_with("-%}");
        self.after_tag(if ends_with_sign { "-" } else { "" }, false);
        let mut from = 0;
        while let Some(found) = self.rest[from..].find("{%") {
            let at = from + found;
            let sign = sign(&self.rest[at + 2..]);
            let Some(len) = raw_tag(&self.rest[at + 2 + sign.len()..], "endraw", true) else {
                from = at + 2;
                continue;
            };
            self.data(at, sign, true);
            let tag = self.take(2 + sign.len() + len);
            let sign = match tag.as_bytes()[tag.len() - 3] {
                b'-' => "-",
                b'+' => "+",
                _ => "",
            };
            self.after_tag(sign, true);
            return Ok(());
        }
        Err(Error::new(
            "a raw block does not end: {% endraw %} is missing",
        ))
    }

    /// The inside of a tag, to behind its end.
    fn tag(&mut self, begin: Token, closing: &str, end: Token) -> Result<()> {
        self.push(begin);
        let mut open: Vec<&str> = Vec::new();
        loop {
            let blanks = self.rest.len() - self.rest.trim_start_matches(is_space).len();
            if blanks > 0 {
                self.take(blanks);
            }
            if open.is_empty() {
                let sign = sign(self.rest);
                let is_end = self.rest[sign.len()..].starts_with(closing);
                if is_end && (sign != "+" || closing == "%}") {
                    self.push(end);
                    self.take(sign.len() + closing.len());
                    self.after_tag(sign, closing == "%}");
                    return Ok(());
                }
            }
            let Some(first) = self.rest.chars().next() else {
                return Err(Error::new("unexpected end of the template inside a tag"));
            };
            if first.is_ascii_digit() {
                self.number()?;
            } else if first == '_' || first.is_alphabetic() {
                let len = self.rest.find(|c: char| c != '_' && !c.is_alphanumeric());
                let name = self.rest[..len.unwrap_or(self.rest.len())].to_owned();
                self.push(Token::Name(name.clone()));
                self.take(name.len());
            } else if first == '"' || first == '\'' {
                self.text(first)?;
            } else {
                let operator = OPERATORS.iter().find(|o| self.rest.starts_with(**o));
                let operator = *operator
                    .ok_or_else(|| Error::new(format!("unexpected {first:?} in a tag")))?;
                match operator {
                    "(" => open.push(")"),
                    "[" => open.push("]"),
                    "{" => open.push("}"),
                    ")" | "]" | "}" if open.pop() != Some(operator) => {
                        return Err(Error::new(format!("unexpected {operator:?} in a tag")));
                    }
                    _ => {}
                }
                self.push(Token::Operator(operator));
                self.take(operator.len());
            }
        }
    }

    fn number(&mut self) -> Result<()> {
        let bytes = self.rest.as_bytes();
        let digits = |from: usize| {
            let is_digit = |&&b: &&u8| b.is_ascii_digit() || b == b'_';
            bytes[from..].iter().take_while(is_digit).count()
        };
        let radix = match bytes.get(1).map(u8::to_ascii_lowercase) {
            _ if bytes[0] != b'0' => 10,
            Some(b'x') => 16,
            Some(b'o') => 8,
            Some(b'b') => 2,
            _ => 10,
        };
        if radix != 10 {
            let is_digit = |&&b: &&u8| char::from(b).is_digit(radix) || b == b'_';
            let len = 2 + bytes[2..].iter().take_while(is_digit).count();
            let number = self.take(len)[2..].replace('_', "");
            let number = i128::from_str_radix(&number, radix);
            self.push(Token::Int(number.map_err(|_| too_large())?));
            return Ok(());
        }
        let mut len = digits(0);
        let after_dot = self
            .tokens
            .last()
            .is_some_and(|last| last.token == Token::Operator("."));
        let mut is_float = false;
        if !after_dot {
            if bytes.get(len) == Some(&b'.') && bytes.get(len + 1).is_some_and(u8::is_ascii_digit) {
                len += 1 + digits(len + 1);
                is_float = true;
            }
            if matches!(bytes.get(len), Some(b'e' | b'E')) {
                let sign = usize::from(matches!(bytes.get(len + 1), Some(b'+' | b'-')));
                if bytes.get(len + 1 + sign).is_some_and(u8::is_ascii_digit) {
                    len += 1 + sign + digits(len + 1 + sign);
                    is_float = true;
                }
            }
        }
        let number = self.take(len).replace('_', "");
        self.push(match is_float {
            true => Token::Float(number.parse().map_err(|_| too_large())?),
            false => Token::Int(number.parse().map_err(|_| too_large())?),
        });
        Ok(())
    }

    /// A string literal, with Python's escapes.
    fn text(&mut self, quote: char) -> Result<()> {
        let mut letters = Vec::new();
        let mut characters = self.rest[1..].chars();
        let no_end = || Error::new("a string does not end");
        loop {
            let character = characters.next().ok_or_else(no_end)?;
            if character == quote {
                break;
            }
            if character != '\\' {
                letters.push(character);
                continue;
            }
            let escape = characters.next().ok_or_else(no_end)?;
            let digits = match escape {
                'x' => 2,
                'u' => 4,
                'U' => 8,
                _ => 0,
            };
            if digits > 0 {
                let text = characters.as_str();
                let code = text
                    .get(..digits)
                    .and_then(|d| u32::from_str_radix(d, 16).ok());
                let character = code.and_then(char::from_u32);
                let unknown = || Error::new(format!("\\{escape} in a string names no character"));
                letters.push(character.ok_or_else(unknown)?);
                characters = text[digits..].chars();
                continue;
            }
            match escape {
                '\n' => {}
                '\\' | '\'' | '"' => letters.push(escape),
                'n' => letters.push('\n'),
                't' => letters.push('\t'),
                'r' => letters.push('\r'),
                'a' => letters.push('\x07'),
                'b' => letters.push('\x08'),
                'f' => letters.push('\x0c'),
                'v' => letters.push('\x0b'),
                '0'..='7' => {
                    let text = characters.as_str();
                    let more = text
                        .bytes()
                        .take(2)
                        .take_while(|b| (b'0'..=b'7').contains(b));
                    let more = more.count();
                    let octal = format!("{escape}{}", &text[..more]);
                    letters.extend(u32::from_str_radix(&octal, 8).ok().and_then(char::from_u32));
                    characters = text[more..].chars();
                }
                other => letters.extend(['\\', other]),
            }
        }
        let len = self.rest.len() - characters.as_str().len();
        self.push(Token::Text(
            letters.into_iter().map(Letter::written).collect(),
        ));
        self.take(len);
        Ok(())
    }
}

fn too_large() -> Error {
    Error::new("a number is out of range")
}

fn sign(text: &str) -> &'static str {
    match text.as_bytes().first() {
        Some(b'-') => "-",
        Some(b'+') => "+",
        _ => "",
    }
}

fn find_first(text: &str, wanted: &[&str]) -> Option<usize> {
    let braces = text.match_indices('{').map(|(at, _)| at);
    braces
        .into_iter()
        .find(|&at| wanted.iter().any(|w| text[at..].starts_with(w)))
}

/// The length of `word` and the end of its tag, if that is what `text` begins with.
fn raw_tag(text: &str, word: &str, plus: bool) -> Option<usize> {
    let rest = text.trim_start_matches(is_space).strip_prefix(word)?;
    let rest = rest.trim_start_matches(is_space);
    let sign = sign(rest);
    let rest = rest[sign.len()..].strip_prefix("%}")?;
    (plus || sign != "+").then(|| text.len() - rest.len())
}
