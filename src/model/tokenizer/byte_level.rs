//! Byte-level BPE, `tokenizer.ggml.model` "gpt2": text is cut into words, and a word's bytes are merged by rank.

use std::collections::HashMap;

use super::{
    Merges, Token,
    merge::{Symbol, merge_all},
    pre_tokenizer::PreTokenizer,
};

pub struct ByteLevel {
    pre: PreTokenizer,
    /// The token of each byte.
    bytes: [Option<u32>; 256],
    merges: Merges,
    /// Tokens by their bytes, for the pre-tokenizers that take words whole.
    words: HashMap<Vec<u8>, u32>,
}

impl ByteLevel {
    pub fn new(pre: PreTokenizer, tokens: &[Token], merges: Merges) -> Self {
        let mut bytes = [None; 256];
        let mut words = HashMap::new();
        for (id, token) in (0..).zip(tokens) {
            if !token.kind.is_text() {
                continue;
            }
            match bytes_of(&token.text) {
                Some(word) if word.len() == 1 => bytes[word[0] as usize] = Some(id),
                Some(word) if pre.takes_words => drop(words.insert(word, id)),
                _ => {}
            }
        }
        Self {
            pre,
            bytes,
            merges,
            words,
        }
    }

    /// Whether a prompt starts with the beginning-of-sequence token where the file does not say.
    pub fn adds_bos(&self) -> bool {
        self.pre.adds_bos
    }

    /// Appends the ids of `text`.
    pub fn encode(&self, text: &str, ids: &mut Vec<u32>) {
        let text = self.pre.normalize(text);
        self.pre
            .for_each_word(&text, &mut |word| match self.words.get(word.as_bytes()) {
                Some(&id) => ids.push(id),
                None => self.merge(word.as_bytes(), ids),
            });
    }

    fn merge(&self, word: &[u8], ids: &mut Vec<u32>) {
        let of_byte = |(start, &byte): (usize, &u8)| {
            let id = Some(self.bytes[byte as usize]?);
            let end = start + 1;
            Some(Symbol { start, end, id })
        };
        let mut symbols: Vec<_> = word.iter().enumerate().filter_map(of_byte).collect();
        merge_all(&mut symbols, |left, right| {
            self.merges.get(&(left.id?, right.id?)).copied()
        });
        ids.extend(symbols.iter().filter_map(|symbol| symbol.id));
    }
}

/// The bytes that a token stands for, if it is written in GPT-2's alphabet.
pub fn bytes_of(text: &str) -> Option<Vec<u8>> {
    text.chars().map(byte_of).collect()
}

/// The byte that `char` spells in GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes
/// follow in order from U+0100.
fn byte_of(char: char) -> Option<u8> {
    let code = u32::from(char);
    let byte = match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => code,
        0x100..=0x120 => code - 0x100,
        0x121..=0x142 => code - 0x121 + 0x7f,
        0x143 => 0xad,
        _ => return None,
    };
    u8::try_from(byte).ok()
}
