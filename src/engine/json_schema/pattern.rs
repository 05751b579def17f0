//! Regular expressions of JSON schemas, which are JavaScript's, in the syntax of Rust's.

use std::{iter::Peekable, str::Chars};

use anyhow::{Context, Result, bail, ensure};

const SPACE: &str = r"\t\n\x0b\x0c\r \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff";

/// `pattern` for Rust, where it is to match the same.
///
/// # Errors
/// Names what means something else there, or nothing.
pub fn translate(pattern: &str) -> Result<String> {
    let translated = Translation {
        rest: pattern.chars().peekable(),
        out: String::new(),
        in_class: false,
    };
    translated
        .run()
        .with_context(|| format!("the pattern {pattern:?} cannot be enforced"))
}

struct Translation<'a> {
    rest: Peekable<Chars<'a>>,
    out: String,
    /// Between brackets.
    in_class: bool,
}

impl Translation<'_> {
    fn run(mut self) -> Result<String> {
        while let Some(character) = self.rest.next() {
            let next = self.rest.peek().copied();
            match character {
                '\\' => self.escape()?,
                _ if character.is_ascii_control() => {
                    bail!("{character:?} is no text: write it with an escape")
                }
                '[' if self.in_class => self.out.push_str(r"\["),
                '[' => {
                    ensure!(next != Some(']'), "[] is empty");
                    self.in_class = true;
                    self.out.push('[');
                }
                ']' => {
                    self.in_class = false;
                    self.out.push(']');
                }
                '-' if self.in_class && next == Some('-') => bail!("two hyphens between brackets"),
                '&' | '~' if self.in_class => self.out.extend(['\\', character]),
                '.' if !self.in_class => self.out.push_str(r"[^\n\r\u2028\u2029]"),
                '(' if next == Some('?') => self.group()?,
                '{' if !self.in_class && next == Some(',') => {
                    bail!("a repetition without a least number")
                }
                _ => self.out.push(character),
            }
        }
        Ok(self.out)
    }

    /// What `(?` begins.
    fn group(&mut self) -> Result<()> {
        let after: String = self.rest.clone().take(3).collect();
        let known =
            after.starts_with("?:") || after.starts_with("?<") && !after.contains(['=', '!']);
        ensure!(
            self.in_class || known,
            "({after} is no plain group: flags, look-ahead and look-behind cannot be enforced"
        );
        self.out.push('(');
        Ok(())
    }

    /// What a backslash begins.
    fn escape(&mut self) -> Result<()> {
        let character = self.rest.next().context("it ends with a backslash")?;
        match character {
            's' => self.out.extend(["[", SPACE, "]"]),
            'S' => self.out.extend(["[^", SPACE, "]"]),
            'd' | 'D' | 'w' | 'W' | 'p' | 'P' | 't' | 'n' | 'f' | 'r' => {
                self.out.extend(['\\', character]);
            }
            'x' | 'u' => {
                let digits = self.code(character)?;
                self.out.push('\\');
                self.out.push(character);
                self.out.push_str(&digits);
            }
            _ if character.is_ascii_punctuation() => self.out.extend(['\\', character]),
            _ => bail!("\\{character} is not supported"),
        }
        Ok(())
    }

    /// The digits of a character's code.
    fn code(&mut self, kind: char) -> Result<String> {
        let is_in_range = self.out.ends_with('-') && self.in_class;
        let digits: String = match self.rest.peek() {
            Some('{') => {
                let mut braced = String::new();
                for character in self.rest.by_ref() {
                    braced.push(character);
                    if character == '}' {
                        break;
                    }
                }
                braced
            }
            _ => self
                .rest
                .by_ref()
                .take(if kind == 'x' { 2 } else { 4 })
                .collect(),
        };
        let code = u32::from_str_radix(digits.trim_matches(['{', '}']), 16);
        let code = code.with_context(|| format!("\\{kind}{digits} is no character"))?;
        let control = code < 0x20 && !matches!(code, 8 | 9 | 10 | 12 | 13) || code == 0x7f;
        // llguidance writes such a character alone as nothing.
        ensure!(
            !control || is_in_range || self.in_class && self.rest.peek() == Some(&'-'),
            "\\{kind}{digits} is a control character"
        );
        Ok(digits)
    }
}
