//! BPE over characters, in which U+2581 stands for a blank and a character that the vocabulary does not have falls back
//! to its bytes: SentencePiece's, which merges by score (`tokenizer.ggml.model` "llama"), and Gemma 4's, which merges by
//! rank ("gemma4").
//!
//! Only normal pieces take part in merging. Text is neither normalized nor trimmed.

use std::collections::HashMap;

use super::{
    Merges, Token, TokenKind,
    merge::{Merge, Symbol, merge_all},
};

/// What stands for a blank in a piece.
pub const BLANK: char = '\u{2581}';

pub struct SentencePiece {
    pieces: HashMap<Box<str>, u32>,
    order: Order,
    /// The byte tokens, such as `<0x0A>`.
    bytes: [Option<u32>; 256],
    /// The token for text that even the byte tokens do not cover.
    unknown: Option<u32>,
    /// Whether a blank is put before a text, and before what follows a special token.
    space_prefix: bool,
}

/// Which merge goes first.
pub enum Order {
    /// That into the piece with the highest score. By id, the highest score is 0.
    Scores(Vec<u32>),
    Merges(Merges),
}

impl SentencePiece {
    pub fn new(tokens: &[Token], order: Order, unknown: Option<u32>, space_prefix: bool) -> Self {
        let mut bytes = [None; 256];
        let mut pieces = HashMap::with_capacity(tokens.len());
        for (id, token) in (0..).zip(tokens) {
            match token.kind {
                TokenKind::Normal => drop(pieces.insert(token.text.as_str().into(), id)),
                TokenKind::Byte(byte) => bytes[byte as usize] = Some(id),
                _ => {}
            }
        }
        Self {
            pieces,
            order,
            bytes,
            unknown,
            space_prefix,
        }
    }

    /// Whether pieces are merged by rank.
    pub fn is_gemma4(&self) -> bool {
        matches!(self.order, Order::Merges(_))
    }

    /// The tokens of bytes that all have one.
    fn byte_tokens(&self, bytes: &[u8]) -> Option<Vec<u32>> {
        bytes
            .iter()
            .map(|&byte| self.bytes[byte as usize])
            .collect()
    }

    /// Appends the ids of `text`, which stands at the beginning or after a special token.
    pub fn encode(&self, text: &str, ids: &mut Vec<u32>) {
        let prefix = if self.space_prefix { " " } else { "" };
        let text = format!("{prefix}{text}").replace(' ', BLANK.encode_utf8(&mut [0; 3]));
        let of_char = |(start, char): (usize, char)| {
            let end = start + char.len_utf8();
            let id = self.pieces.get(&text[start..end]).copied();
            Symbol { start, end, id }
        };
        let mut symbols: Vec<_> = text.char_indices().map(of_char).collect();
        merge_all(&mut symbols, |left, right| match &self.order {
            Order::Scores(ranks) => {
                let id = *self.pieces.get(&text[left.start..right.end])?;
                let rank = ranks[id as usize];
                Some(Merge { rank, id })
            }
            Order::Merges(merges) => merges.get(&(left.id?, right.id?)).copied(),
        });
        let mut after_unknown = false;
        for symbol in symbols {
            let bytes = &text.as_bytes()[symbol.start..symbol.end];
            let mut is_unknown = false;
            if let Some(id) = symbol.id {
                ids.push(id);
            } else if let Some(bytes) = self.byte_tokens(bytes) {
                ids.extend(bytes);
            } else {
                is_unknown = true;
                // A run of unknown characters is one unknown token.
                ids.extend(self.unknown.filter(|_| !after_unknown));
            }
            after_unknown = is_unknown;
        }
    }
}

/// The byte that a byte token's text names: `<0x0A>`.
pub fn byte_of(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    let is_hex = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    is_hex
        .then(|| u8::from_str_radix(digits, 16).ok())
        .flatten()
}
