//! Numbers that every reader of JSON takes: they fit into a double, and end, although a schema without bounds allows any.

use llguidance::toktrie::{SimpleVob, TokTrie};

/// Digits of a number, its exponent apart.
const MOST_DIGITS: u32 = 200;

/// Digits of an exponent: with the others less than what a double holds.
const MOST_EXPONENT_DIGITS: u32 = 2;

/// Follows a JSON document.
#[derive(Debug, Clone, Copy, Default)]
pub struct Numbers(Place);

/// Where the document is.
#[derive(Debug, Clone, Copy, Default)]
enum Place {
    #[default]
    Outside,
    String,
    /// Behind a backslash.
    Escape,
    /// Behind so many digits.
    Number(u32),
    Exponent(u32),
}

impl Place {
    /// Where it is behind `byte`, or `None` where a number becomes too long.
    fn behind(self, byte: u8) -> Option<Self> {
        Some(match (self, byte) {
            (Self::Escape, _) => Self::String,
            (Self::String, b'\\') => Self::Escape,
            (Self::String, b'"') => Self::Outside,
            (Self::String, _) => Self::String,
            (Self::Number(MOST_DIGITS), b'0'..=b'9' | b'.') => return None,
            (Self::Exponent(MOST_EXPONENT_DIGITS), b'0'..=b'9') => return None,
            (Self::Number(digits), b'0'..=b'9') => Self::Number(digits + 1),
            (Self::Exponent(digits), b'0'..=b'9') => Self::Exponent(digits + 1),
            (Self::Number(digits), b'.') => Self::Number(digits),
            (Self::Number(_), b'e' | b'E') => Self::Exponent(0),
            (Self::Exponent(0), b'+' | b'-') => Self::Exponent(0),
            (_, b'"') => Self::String,
            (_, b'0'..=b'9') => Self::Number(1),
            _ => Self::Outside,
        })
    }
}

impl Numbers {
    /// Goes on by the bytes of a token.
    pub fn push(&mut self, bytes: &[u8]) {
        let place = bytes
            .iter()
            .try_fold(self.0, |place, &byte| place.behind(byte));
        self.0 = place.unwrap_or_default();
    }

    /// Takes out of `allowed` the tokens that would make a number too long. Where a token ends a string, what follows in it is
    /// too short for that.
    pub fn restrict(self, allowed: &mut SimpleVob, vocabulary: &TokTrie) {
        if matches!(self.0, Place::String | Place::Escape) {
            return;
        }
        let mut too_long = Vec::new();
        allowed.iter_set_entries(|id| {
            let bytes = vocabulary.token(id as u32).iter();
            let place = bytes.copied().try_fold(self.0, Place::behind);
            if place.is_none() {
                too_long.push(id as u32);
            }
        });
        too_long
            .into_iter()
            .for_each(|id| allowed.disallow_token(id));
    }
}
