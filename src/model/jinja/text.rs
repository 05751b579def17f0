//! Text whose letters remember who wrote them: the template, or what was given to it.
//!
//! Python counts and cuts strings by code point, and so do these.

use std::{cmp::Ordering, fmt, rc::Rc};

use super::{Error, Result};

/// The longest text that a template may make, in letters.
pub const MOST_LETTERS: usize = 1 << 26;
/// Letters that count as one step of a template.
pub const LETTERS_PER_STEP: usize = 16;

/// A character, and whether it was given: brought by a message or another input, not written by the template.
#[derive(Clone, Copy)]
pub struct Letter(u32);

/// Above all characters.
const GIVEN: u32 = 1 << 31;

pub type Text = Rc<[Letter]>;

impl Letter {
    pub fn written(character: char) -> Self {
        Self(character.into())
    }

    pub fn given(character: char) -> Self {
        Self(u32::from(character) | GIVEN)
    }

    pub fn char(self) -> char {
        char::from_u32(self.0 & !GIVEN).unwrap_or(char::REPLACEMENT_CHARACTER)
    }

    pub fn is_given(self) -> bool {
        self.0 & GIVEN != 0
    }

    /// Another character by the same hand.
    pub fn with(self, character: char) -> Self {
        Self(u32::from(character) | self.0 & GIVEN)
    }

    pub fn is_space(self) -> bool {
        is_space(self.char())
    }
}

/// Who wrote a letter makes no difference to a template.
impl PartialEq for Letter {
    fn eq(&self, other: &Self) -> bool {
        (self.0 ^ other.0) & !GIVEN == 0
    }
}

impl Eq for Letter {}

impl PartialOrd for Letter {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Letter {
    fn cmp(&self, other: &Self) -> Ordering {
        self.char().cmp(&other.char())
    }
}

impl fmt::Debug for Letter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.char().fmt(f)
    }
}

/// What Python's `str.isspace` counts as a blank.
pub fn is_space(character: char) -> bool {
    character.is_whitespace() || ('\x1c'..='\x1f').contains(&character)
}

/// The letters of a text that the template wrote.
pub fn written(text: &str) -> Vec<Letter> {
    text.chars().map(Letter::written).collect()
}

/// The letters of a text that came in from outside.
pub fn given(text: &str) -> Vec<Letter> {
    text.chars().map(Letter::given).collect()
}

pub fn string(letters: &[Letter]) -> String {
    letters.iter().map(|letter| letter.char()).collect()
}

/// Whether `letters` spell `text`.
pub fn spells(letters: &[Letter], text: &str) -> bool {
    letters.iter().map(|letter| letter.char()).eq(text.chars())
}

/// Collects letters, up to what a text may hold.
#[derive(Default)]
pub struct Builder(Vec<Letter>);

impl Builder {
    pub fn push(&mut self, letters: &[Letter]) -> Result<()> {
        if self.0.len() + letters.len() > MOST_LETTERS {
            return Err(Error::new("it makes a text without end"));
        }
        self.0.extend_from_slice(letters);
        Ok(())
    }

    pub fn write(&mut self, text: &str) -> Result<()> {
        self.push(&written(text))
    }

    /// `text` by the hand of `letter`, in whose place it stands.
    pub fn write_as(&mut self, letter: Letter, text: &str) -> Result<()> {
        text.chars()
            .try_for_each(|character| self.push(&[letter.with(character)]))
    }

    pub fn fill(&mut self, letter: Letter, count: usize) -> Result<()> {
        if self.0.len().saturating_add(count) > MOST_LETTERS {
            return Err(Error::new("it makes a text without end"));
        }
        self.0.extend(std::iter::repeat_n(letter, count));
        Ok(())
    }

    pub fn finish(self) -> Vec<Letter> {
        self.0
    }
}

/// `parts` with `separator` between them.
pub fn join<'a>(
    separator: &[Letter],
    parts: impl IntoIterator<Item = &'a [Letter]>,
) -> Result<Vec<Letter>> {
    let mut out = Builder::default();
    for (number, part) in parts.into_iter().enumerate() {
        if number > 0 {
            out.push(separator)?;
        }
        out.push(part)?;
    }
    Ok(out.finish())
}

/// Where `part` begins in `letters`, from the left, without overlaps.
pub fn matches(letters: &[Letter], part: &[Letter]) -> Vec<usize> {
    let (letters, part) = (string(letters), string(part));
    let found = letters.match_indices(&part).map(|(at, _)| at);
    letter_positions(&letters, found)
}

/// The same from the right, the last one first.
pub fn matches_from_right(letters: &[Letter], part: &[Letter]) -> Vec<usize> {
    let (letters, part) = (string(letters), string(part));
    let mut found: Vec<usize> = letters.rmatch_indices(&part).map(|(at, _)| at).collect();
    found.reverse();
    let mut positions = letter_positions(&letters, found.into_iter());
    positions.reverse();
    positions
}

/// Letters before each of these byte positions, which ascend.
fn letter_positions(text: &str, bytes: impl Iterator<Item = usize>) -> Vec<usize> {
    let (mut done, mut letters) = (0, 0);
    let position = |at: usize| {
        letters += text[done..at].chars().count();
        done = at;
        letters
    };
    bytes.map(position).collect()
}

pub fn find(letters: &[Letter], part: &[Letter]) -> Option<usize> {
    matches(letters, part).first().copied()
}

/// `letters` with the first `most` occurrences of `old` replaced.
pub fn replace(
    letters: &[Letter],
    old: &[Letter],
    new: &[Letter],
    most: usize,
) -> Result<Vec<Letter>> {
    let mut out = Builder::default();
    let mut done = 0;
    for at in matches(letters, old).into_iter().take(most) {
        out.push(&letters[done..at])?;
        out.push(new)?;
        done = at + old.len();
    }
    out.push(&letters[done..])?;
    Ok(out.finish())
}

/// The parts of `letters` between the first `most` occurrences of `separator`.
pub fn split<'a>(letters: &'a [Letter], separator: &[Letter], most: usize) -> Vec<&'a [Letter]> {
    let mut parts = Vec::new();
    let mut done = 0;
    for at in matches(letters, separator).into_iter().take(most) {
        parts.push(&letters[done..at]);
        done = at + separator.len();
    }
    parts.push(&letters[done..]);
    parts
}

/// The same from the right; the parts still stand in their order.
pub fn split_from_right<'a>(
    letters: &'a [Letter],
    separator: &[Letter],
    most: usize,
) -> Vec<&'a [Letter]> {
    let mut parts = Vec::new();
    let mut end = letters.len();
    for at in matches_from_right(letters, separator)
        .into_iter()
        .take(most)
    {
        parts.push(&letters[at + separator.len()..end]);
        end = at;
    }
    parts.push(&letters[..end]);
    parts.reverse();
    parts
}

/// The words of `letters`: at most `most` cuts at blanks, then the rest.
pub fn words(letters: &[Letter], most: usize) -> Vec<&[Letter]> {
    let mut parts = Vec::new();
    let mut rest = strip_start(letters, Letter::is_space);
    while !rest.is_empty() {
        let end = match parts.len() < most {
            true => rest.iter().position(|letter| letter.is_space()),
            false => None,
        };
        parts.push(&rest[..end.unwrap_or(rest.len())]);
        rest = strip_start(&rest[end.unwrap_or(rest.len())..], Letter::is_space);
    }
    parts
}

/// The same from the right; the words still stand in their order.
pub fn words_from_right(letters: &[Letter], most: usize) -> Vec<&[Letter]> {
    let mut parts = Vec::new();
    let mut rest = strip_end(letters, Letter::is_space);
    while !rest.is_empty() {
        let start = match parts.len() < most {
            true => rest.iter().rposition(|letter| letter.is_space()),
            false => None,
        };
        let start = start.map_or(0, |blank| blank + 1);
        parts.push(&rest[start..]);
        rest = strip_end(&rest[..start], Letter::is_space);
    }
    parts.reverse();
    parts
}

/// Python's `splitlines`.
pub fn lines(letters: &[Letter], keep_ends: bool) -> Vec<&[Letter]> {
    let mut parts = Vec::new();
    let mut start = 0;
    let mut at = 0;
    while at < letters.len() {
        let end = match letters[at].char() {
            '\r' if letters.get(at + 1).is_some_and(|next| next.char() == '\n') => 2,
            '\n'
            | '\r'
            | '\x0b'
            | '\x0c'
            | '\x1c'..='\x1e'
            | '\u{85}'
            | '\u{2028}'
            | '\u{2029}' => 1,
            _ => 0,
        };
        if end > 0 {
            parts.push(&letters[start..if keep_ends { at + end } else { at }]);
            start = at + end;
        }
        at += end.max(1);
    }
    if start < letters.len() {
        parts.push(&letters[start..]);
    }
    parts
}

pub fn strip_start(letters: &[Letter], of: impl Fn(Letter) -> bool) -> &[Letter] {
    let kept = letters.iter().position(|&letter| !of(letter));
    &letters[kept.unwrap_or(letters.len())..]
}

pub fn strip_end(letters: &[Letter], of: impl Fn(Letter) -> bool) -> &[Letter] {
    let kept = letters.iter().rposition(|&letter| !of(letter));
    &letters[..kept.map_or(0, |last| last + 1)]
}

/// What HTML needs in the place of its signs.
pub fn html(letters: &[Letter]) -> Result<Vec<Letter>> {
    let mut out = Builder::default();
    for &letter in letters {
        match letter.char() {
            '&' => out.write_as(letter, "&amp;")?,
            '<' => out.write_as(letter, "&lt;")?,
            '>' => out.write_as(letter, "&gt;")?,
            '"' => out.write_as(letter, "&#34;")?,
            '\'' => out.write_as(letter, "&#39;")?,
            _ => out.push(&[letter])?,
        }
    }
    Ok(out.finish())
}

pub fn upper(letters: &[Letter]) -> Vec<Letter> {
    let upper = |l: &Letter| {
        let letter = *l;
        letter.char().to_uppercase().map(move |c| letter.with(c))
    };
    letters.iter().flat_map(upper).collect()
}

pub fn lower(letters: &[Letter]) -> Vec<Letter> {
    // Of the whole text: a sigma that ends a word is another than one inside.
    let lowered = string(letters).to_lowercase();
    let mut characters = lowered.chars();
    let mut out = Vec::with_capacity(letters.len());
    for letter in letters {
        let count = letter.char().to_lowercase().count();
        out.extend(characters.by_ref().take(count).map(|c| letter.with(c)));
    }
    out
}

/// A letter as a word begins with it: where it becomes several, one of them is large.
fn initial(letter: Letter) -> Vec<Letter> {
    let upper = upper(&[letter]);
    let large = upper.iter().position(|letter| is_cased(*letter));
    let (before, after) = upper.split_at(large.map_or(upper.len(), |at| at + 1));
    [before.to_vec(), lower(after)].concat()
}

/// The first letter large, the others small.
pub fn capitalize(letters: &[Letter]) -> Vec<Letter> {
    let Some(&first) = letters.first() else {
        return Vec::new();
    };
    let rest = lower(letters).split_off(first.char().to_lowercase().count());
    [initial(first), rest].concat()
}

/// Python's `title`: of all letters next to one another the first is large.
pub fn title(letters: &[Letter]) -> Vec<Letter> {
    let words = letters.chunk_by(|a, b| is_cased(*a) == is_cased(*b));
    words.flat_map(capitalize).collect()
}

/// Whether a letter has a large and a small form.
pub fn is_cased(letter: Letter) -> bool {
    let character = letter.char();
    character.is_lowercase() || character.is_uppercase() || is_title(letter)
}

/// Whether a letter is two, of which the first is large, such as U+01C5.
pub fn is_title(letter: Letter) -> bool {
    let character = letter.char();
    !character.is_uppercase() && character.to_lowercase().next() != Some(character)
}
