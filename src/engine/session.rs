//! A text on a backend: remembers which tokens its KV cache holds.

use std::{
    ops::ControlFlow,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use crate::backend::{Backend, Batch, KvPart, StreamStart, TokenStream, Want, Watch, Written};

/// A backend and the tokens in its KV cache.
pub struct Session {
    backend: Box<dyn Backend>,
    /// Token `i` is at position `i`.
    tokens: Vec<u32>,
    /// Of the prompt that was read last and to its end, as long as its tokens are the session's.
    prompt_end: Option<PromptEnd>,
    /// Whether to have one.
    keeps_prompts: bool,
}

/// What a session was when it had just read a prompt.
struct PromptEnd {
    /// Tokens of the prompt.
    len: usize,
    /// Behind the last one, (vocab_size)
    logits: Vec<f32>,
    /// What the cache was filled with, and its [`KvPart::Rings`], where tokens have followed.
    before: Option<(Written, Vec<u8>)>,
}

/// A prompt, and what is known behind it.
pub(super) struct ReadPrompt<'a> {
    pub tokens: &'a [u32],
    /// (vocab_size)
    pub logits: &'a [f32],
    pub written: Written,
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
            prompt_end: None,
            keeps_prompts: false,
        }
    }

    /// From here on, the state behind a prompt can still be had when a text has followed it. It takes memory for the logits and
    /// for the rings of layers with windows, and time to copy these behind the first token.
    pub fn keep_prompts(&mut self) {
        self.keeps_prompts = true;
        // What followed was not kept from it.
        if self
            .prompt_end
            .as_ref()
            .is_some_and(|end| end.len < self.len())
        {
            self.prompt_end = None;
        }
    }

    /// Makes the session what one was that had just read `tokens`. `state` are both parts of its KV cache, the rings first.
    pub(super) fn restore(
        &mut self,
        tokens: &[u32],
        logits: Vec<f32>,
        written: Written,
        state: &[u8],
    ) -> Result<()> {
        self.rewind(0);
        self.backend.import_kv(written, state)?;
        self.tokens = tokens.to_vec();
        self.prompt_end = Some(PromptEnd {
            len: tokens.len(),
            logits,
            before: None,
        });
        Ok(())
    }

    /// The prompt that was read last, and what the session was behind it; `None` where it was not to be kept, was not read to its
    /// end, or was left again.
    pub(super) fn prompt(&self) -> Option<ReadPrompt<'_>> {
        let end = self.prompt_end.as_ref()?;
        let before = end.before.as_ref();
        Some(ReadPrompt {
            tokens: &self.tokens[..end.len],
            logits: &end.logits,
            written: before.map_or(self.backend.written(), |(written, _)| *written),
        })
    }

    /// Hands `take` both parts of the KV cache as it was behind that prompt, the rings first.
    pub(super) fn export_prompt(
        &mut self,
        take: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let end = self.prompt_end.as_ref().context("no prompt was kept")?;
        let written = match &end.before {
            Some((written, rings)) => {
                take(rings)?;
                *written
            }
            None => {
                let written = self.backend.written();
                self.backend.export_kv(KvPart::Rings, written, take)?;
                written
            }
        };
        self.backend.export_kv(KvPart::Rest, written, take)
    }

    /// Keeps of the prompt's end what the token that follows it overwrites.
    fn keep_rings(&mut self) -> Result<()> {
        let len = self.tokens.len();
        let end = self.prompt_end.as_mut().filter(|end| end.len == len);
        let Some(end) = end.filter(|end| self.keeps_prompts && end.before.is_none()) else {
            return Ok(());
        };
        let (written, mut rings) = (self.backend.written(), Vec::new());
        self.backend
            .export_kv(KvPart::Rings, written, &mut |bytes| {
                rings.extend_from_slice(bytes);
                Ok(())
            })?;
        end.before = Some((written, rings));
        Ok(())
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
        self.prompt_end = self.prompt_end.take().filter(|end| end.len <= len);
    }

    /// Reads all tokens again, where the cache has forgotten what the next one sees of them.
    fn recall(&mut self) -> Result<()> {
        let len = self.tokens.len();
        if !self.backend.remembers(len) {
            let start = Instant::now();
            self.prompt_end = None;
            read_prompt(&mut *self.backend, &self.tokens, 0, &mut |_| ())?;
            say_read_again(self.backend.kv_layout().budget, len, len, start.elapsed());
        }
        Ok(())
    }

    /// Makes the KV cache hold exactly `prompt` and returns the logits after its last token. What the cache already
    /// shares with the prompt is not computed again, but for the last token where its logits are not known.
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
        let shared = shared.count();
        let known = self.prompt_end.as_ref().map(|end| end.len) == Some(prompt.len());
        if known && shared == prompt.len() && self.backend.remembers(shared) {
            self.rewind(shared);
            // There is nothing to stop.
            let _ = progress(shared, shared);
            return Ok(self.prompt_end.as_ref().map(|end| &end.logits[..]));
        }
        self.prompt_end = None;
        // The last token is computed: its logits are the result.
        let shared = shared.min(prompt.len() - 1);
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
        if !self.keeps_prompts {
            return Ok(Some(results.logits));
        }
        let end = PromptEnd {
            len: prompt.len(),
            logits: results.logits.to_vec(),
            before: None,
        };
        Ok(Some(&self.prompt_end.insert(end).logits))
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
        self.keep_rings()?;
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
        self.keep_rings()?;
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
