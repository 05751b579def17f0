//! A text on a backend: remembers which tokens its KV cache holds.

use std::{
    ops::ControlFlow,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use crate::backend::{Backend, Batch, StreamStart, TokenStream, Want, Watch};

/// A backend and the tokens in its KV cache.
pub struct Session {
    backend: Box<dyn Backend>,
    /// Token `i` is at position `i`.
    tokens: Vec<u32>,
}

/// A session that goes on by itself: the device chooses what follows.
pub struct SessionStream<'a> {
    stream: Box<dyn TokenStream + 'a>,
    tokens: &'a mut Vec<u32>,
    /// The token that was chosen last, which the cache does not hold yet.
    chosen: u32,
}

impl SessionStream<'_> {
    /// The next token. All before it are in the KV cache.
    ///
    /// # Errors
    /// As [`TokenStream::next_token`].
    pub fn next_token(&mut self) -> Result<u32> {
        let chosen = self.stream.next_token()?;
        Ok(self.follow(chosen))
    }

    /// The next token, one of those that are allowed.
    ///
    /// # Errors
    /// As [`TokenStream::next_allowed`].
    pub fn next_allowed(
        &mut self,
        allowed: &mut dyn FnMut() -> Result<Option<Vec<u32>>>,
    ) -> Result<u32> {
        let chosen = self.stream.next_allowed(allowed)?;
        Ok(self.follow(chosen))
    }

    fn follow(&mut self, chosen: u32) -> u32 {
        self.tokens.push(self.chosen);
        self.chosen = chosen;
        chosen
    }
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
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Goes back to the first `len` tokens; the session is as if the others had never been computed.
    pub fn rewind(&mut self, len: usize) {
        self.tokens.truncate(len);
    }

    /// Reads all tokens again, where the cache has forgotten what the next one sees of them.
    fn recall(&mut self) -> Result<()> {
        let len = self.tokens.len();
        if !self.backend.remembers(len) {
            let start = Instant::now();
            read_prompt(&mut *self.backend, &self.tokens, 0, &mut |_| ())?;
            say_read_again(self.backend.kv_layout().budget, len, len, start.elapsed());
        }
        Ok(())
    }

    /// Makes the KV cache hold exactly `prompt` and returns the logits after its last token. What the cache already
    /// shares with the prompt is not computed again.
    ///
    /// `progress` hears how many tokens of the prompt are done, and of how many: before each chunk, after the last, and while
    /// the backend computes one, of which as many count then as are part of the work that is done. Where it breaks, reading
    /// stops and `None` is returned; the cache holds the chunks that were done.
    ///
    /// # Errors
    /// An empty prompt, one longer than the context, and whatever the backend meets.
    pub fn prefill(
        &mut self,
        prompt: &[u32],
        progress: &mut (dyn FnMut(usize, usize) -> ControlFlow<()> + Send),
    ) -> Result<Option<&[f32]>> {
        ensure!(
            !prompt.is_empty(),
            "the prompt holds no tokens: give it some text"
        );
        let limits = self.backend.limits();
        ensure!(
            prompt.len() <= limits.context_len,
            "the prompt is {} tokens long, but the context holds {}",
            prompt.len(),
            limits.context_len
        );
        let shared = self.tokens.iter().zip(prompt).take_while(|(a, b)| a == b);
        // The last token is always computed: its logits are the result.
        let shared = shared.count().min(prompt.len() - 1);
        let again = match self.backend.remembers(shared) {
            true => 0,
            false => shared,
        };
        let start = Instant::now();
        let budget = self.backend.kv_layout().budget;
        self.rewind(shared - again);

        loop {
            let position = self.tokens.len();
            if progress(position, prompt.len()).is_break() {
                return Ok(None);
            }
            let rest = &prompt[position..];
            let chunk = &rest[..limits.next_len(rest.len())];
            if chunk.len() == rest.len() {
                break;
            }
            let batch = Batch::prompt(chunk, position, Want::Nothing);
            let mut watch = |part| progress(done(&batch, part), prompt.len());
            if self.backend.compute_watched(batch, &mut watch)?.is_none() {
                return Ok(None);
            }
            self.tokens.extend_from_slice(chunk);
        }
        let position = self.tokens.len();
        let chunk = &prompt[position..];
        let batch = Batch::end_of_prompt(chunk, position);
        let mut watch = |part| progress(done(&batch, part), prompt.len());
        let Some(results) = self.backend.compute_watched(batch, &mut watch)? else {
            return Ok(None);
        };
        self.tokens.extend_from_slice(chunk);
        if again > 0 {
            say_read_again(budget, again, prompt.len(), start.elapsed());
        }
        // Too late to stop: the work is done.
        let _ = progress(prompt.len(), prompt.len());
        Ok(Some(results.logits))
    }

    /// Begins a stream whose text is the session's tokens and one more.
    ///
    /// # Errors
    /// As [`Backend::stream`].
    pub fn stream(&mut self, start: &StreamStart) -> Result<SessionStream<'_>> {
        let (&chosen, cached) = start.text.split_last().context("a text has tokens")?;
        ensure!(
            cached == self.tokens,
            "a stream goes on behind the tokens of its session"
        );
        self.recall()?;
        Ok(SessionStream {
            stream: self.backend.stream(start)?,
            tokens: &mut self.tokens,
            chosen,
        })
    }

    /// Appends `token` and returns the logits after it: (vocab_size).
    ///
    /// # Errors
    /// A full context, and whatever the backend meets.
    pub fn decode(&mut self, token: u32) -> Result<&[f32]> {
        let logits = self.decode_watched(token, &mut |_| ControlFlow::Continue(()))?;
        Ok(logits.expect("nobody broke it off"))
    }

    /// The same, or `None` where `watch` broke: `token` is not appended then.
    ///
    /// # Errors
    /// The same.
    pub fn decode_watched(&mut self, token: u32, watch: Watch) -> Result<Option<&[f32]>> {
        let position = self.tokens.len();
        ensure!(
            position < self.backend.limits().context_len,
            "the context of {position} tokens is full"
        );
        self.recall()?;
        let batch = Batch::decode(&token, position);
        let Some(results) = self.backend.compute_watched(batch, watch)? else {
            return Ok(None);
        };
        self.tokens.push(token);
        Ok(Some(results.logits))
    }
}

/// The position that a text has come to when `part` of a batch's work is done.
fn done(batch: &Batch, part: f64) -> usize {
    batch.position + (part * batch.tokens.len() as f64) as usize
}

/// Says what it cost to go back to where the KV cache had forgotten something: of `read` tokens it had known `again`.
fn say_read_again(budget: Option<usize>, again: usize, read: usize, time: Duration) {
    let why = match budget {
        Some(budget) => format!("--kv-budget {budget} had evicted tokens"),
        None => "those far behind the end were no longer as they are seen there".to_owned(),
    };
    tracing::info!(
        "{again} tokens were read again, {read} in all, in {time:.1?}: the text went back to where {why}"
    );
}

/// Reads `prompt` (one token or more) at `position`, chunk by chunk, and returns the logits after its last token. `progress`
/// hears now and then which position it has come to.
pub(super) fn read_prompt<'a>(
    backend: &'a mut dyn Backend,
    prompt: &[u32],
    position: usize,
    progress: &mut (dyn FnMut(usize) + Send),
) -> Result<&'a [f32]> {
    let limits = backend.limits();
    let (mut position, mut rest) = (position, prompt);
    loop {
        let (chunk, behind) = rest.split_at(limits.next_len(rest.len()));
        let batch = match behind {
            [] => Batch::end_of_prompt(chunk, position),
            _ => Batch::prompt(chunk, position, Want::Nothing),
        };
        let mut watch = |part| {
            progress(done(&batch, part));
            ControlFlow::Continue(())
        };
        if behind.is_empty() {
            let results = backend.compute_watched(batch, &mut watch)?;
            return Ok(results.expect("nobody broke it off").logits);
        }
        backend.compute_watched(batch, &mut watch)?;
        position += chunk.len();
        rest = behind;
    }
}
