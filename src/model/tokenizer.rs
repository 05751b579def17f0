//! Text to token ids and back: byte-level BPE built from a file's own vocabulary and merges.

use anyhow::Result;

use super::{chat_template::Prompt, gguf::Gguf};

/// A model's tokenizer.
pub struct Tokenizer {}

impl Tokenizer {
    /// Builds the tokenizer that the file describes.
    pub fn from_gguf(_gguf: &Gguf) -> Result<Self> {
        todo!()
    }

    /// Tokens in the vocabulary, special ones included.
    pub fn vocab_size(&self) -> usize {
        todo!()
    }

    /// The ids of `prompt`: special-token text outside message content becomes its id. Adds the file's
    /// beginning-of-sequence token where the file asks for one and the text does not start with it.
    pub fn encode(&self, _prompt: &Prompt) -> Result<Vec<u32>> {
        todo!()
    }

    /// The bytes that a token stands for: part of a character, maybe. Empty for a control token.
    pub fn token_bytes(&self, _id: u32) -> Vec<u8> {
        todo!()
    }

    /// The vocabulary's own spelling of a token (`<|im_end|>`, `Ġthe`), for listings.
    pub fn piece(&self, _id: u32) -> &str {
        todo!()
    }

    /// The tokens that end generation.
    pub fn end_of_generation(&self) -> &[u32] {
        todo!()
    }

    /// Whether generation ends with this token.
    pub fn is_end_of_generation(&self, _id: u32) -> bool {
        todo!()
    }
}
