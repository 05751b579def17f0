//! A conversation with a backend: remembers which tokens its KV cache holds.

use std::ops::ControlFlow;

use anyhow::{Result, ensure};

use super::Backend;

/// A backend and the tokens in its KV cache.
pub struct Session {
    backend: Box<dyn Backend>,
    /// Token `i` is at position `i` of the KV cache.
    tokens: Vec<u32>,
}

impl Session {
    pub fn new(backend: Box<dyn Backend>) -> Self {
        Self {
            backend,
            tokens: Vec::new(),
        }
    }

    pub fn backend(&self) -> &dyn Backend {
        &*self.backend
    }

    /// Tokens in the KV cache.
    pub fn position(&self) -> usize {
        self.tokens.len()
    }

    /// Makes the KV cache hold exactly `prompt` and returns the logits after its last token. What the cache already
    /// shares with the prompt is not computed again.
    ///
    /// `progress` hears how many tokens of the prompt are done, and of how many, before each chunk and after the last;
    /// where it breaks, reading stops and `None` is returned.
    ///
    /// # Errors
    /// An empty prompt, one longer than the context, and whatever the backend meets.
    pub fn prefill(
        &mut self,
        prompt: &[u32],
        progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<Option<&[f32]>> {
        ensure!(
            !prompt.is_empty(),
            "the prompt holds no tokens: give it some text"
        );
        let context_len = self.backend.context_len();
        ensure!(
            prompt.len() <= context_len,
            "the prompt is {} tokens long, but the context holds {context_len}",
            prompt.len()
        );
        let shared = self.tokens.iter().zip(prompt).take_while(|(a, b)| a == b);
        // The last token is always computed: its logits are the result.
        self.tokens.truncate(shared.count().min(prompt.len() - 1));

        let chunk_len = self.backend.chunk_len();
        while prompt.len() - self.tokens.len() > chunk_len {
            if progress(self.tokens.len(), prompt.len()).is_break() {
                return Ok(None);
            }
            let position = self.tokens.len();
            let chunk = &prompt[position..position + chunk_len];
            self.backend.forward(chunk, position)?;
            self.tokens.extend_from_slice(chunk);
        }
        if progress(self.tokens.len(), prompt.len()).is_break() {
            return Ok(None);
        }
        let position = self.tokens.len();
        let logits = self.backend.forward(&prompt[position..], position)?;
        self.tokens.extend_from_slice(&prompt[position..]);
        // Too late to stop: the work is done.
        let _ = progress(prompt.len(), prompt.len());
        Ok(Some(logits))
    }

    /// Appends `token` and returns the logits after it: (vocab_size).
    ///
    /// # Errors
    /// A full context, and whatever the backend meets.
    pub fn decode(&mut self, token: u32) -> Result<&[f32]> {
        let position = self.tokens.len();
        ensure!(
            position < self.backend.context_len(),
            "the context of {position} tokens is full"
        );
        let logits = self.backend.decode(token, position)?;
        self.tokens.push(token);
        Ok(logits)
    }
}
