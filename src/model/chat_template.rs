//! The Jinja chat template that a file carries.

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::{gguf::Gguf, tokenizer::Tokenizer};

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    pub role: String,
    pub content: String,
}

/// Text ready for the tokenizer, in which a control token's text stands for the token, except where it
/// came in through a message's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// The text, with `guard` inside every control token's text that came from a message's content.
    pub(super) guarded: String,
    /// A character that occurs in no message and no template.
    pub(super) guard: Option<char>,
}

impl Prompt {
    /// A prompt taken as it is.
    pub fn raw(text: impl Into<String>) -> Self {
        Self {
            guarded: text.into(),
            guard: None,
        }
    }

    /// The text, byte for byte what the tokens will stand for.
    pub fn text(&self) -> String {
        match self.guard {
            Some(guard) => self.guarded.replace(guard, ""),
            None => self.guarded.clone(),
        }
    }
}

/// A compiled chat template.
pub struct ChatTemplate {}

impl ChatTemplate {
    /// Compiles the file's `tokenizer.chat_template`, if there is one.
    pub fn from_gguf(_gguf: &Gguf, _tokenizer: &Tokenizer) -> Result<Option<Self>> {
        todo!()
    }

    /// Renders a conversation up to the point where the assistant speaks. `enable_thinking` reaches the
    /// template only where it is given.
    pub fn render(&self, _messages: &[Message], _enable_thinking: Option<bool>) -> Result<Prompt> {
        todo!()
    }
}
