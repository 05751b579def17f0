//! What a backend is: something that computes a batch of tokens behind those in its KV cache.

mod eviction;
mod kv_layout;
mod sampling;

use std::ops::ControlFlow;

use anyhow::{Result, bail, ensure};
use serde::Serialize;

pub use eviction::{MIN_BUDGET, NEIGHBORS, NEWEST, output_grams};
pub use kv_layout::{KvFormat, KvLayer, KvLayout, KvOptions, KvPart, SINKS, Tiles, Written};
pub use sampling::{SamplingParams, StreamStart, TokenStream, not_finite};

/// Tokens to compute together.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    /// One or more.
    pub tokens: &'a [u32],
    /// Of the first token; the others follow it.
    pub position: usize,
    pub phase: Phase,
    pub want: Want,
    /// Whether a prompt ends with it: behind it, a KV cache keeps no more than its budget.
    pub ends_prompt: bool,
}

/// What the tokens of a batch are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// A piece of a prompt, of at most [`Limits::chunk_len`] tokens.
    Prompt,
    /// One token of the text that is being generated. A backend may trade accuracy for speed here.
    Decode,
}

/// Which tokens of a batch get results.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// None: the batch is there for the KV cache.
    Nothing,
    Last,
    /// All, of at most [`Limits::results_len`] tokens.
    All,
}

/// What came out of a batch.
#[derive(Debug, Clone, Copy)]
pub struct Results<'a> {
    /// (vocab_size, tokens that get results), vocab_size contiguous
    pub logits: &'a [f32],
}

/// Hears, while a batch is being computed, which part of its work is done, from 0 to 1, from whichever thread computes. Where
/// it breaks, computing ends early.
pub type Watch<'a> = &'a mut (dyn FnMut(f64) -> ControlFlow<()> + Send);

/// How many tokens a backend takes, at most where nothing else is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// In the KV cache.
    pub context_len: usize,
    /// In one batch.
    pub chunk_len: usize,
    /// In one batch that wants results for all.
    pub results_len: usize,
    /// In the last batch of a prompt, at least, where it has so many: they say what a KV cache with a budget keeps.
    pub last_len: usize,
    /// Different tokens.
    pub vocab_size: usize,
}

/// What computes logits. A backend owns the KV cache of one text.
pub trait Backend {
    /// `cpu` or `cuda`.
    fn name(&self) -> &'static str;

    /// The device's own name.
    fn device(&self) -> &str;

    fn limits(&self) -> Limits;

    /// Whether all that a token at `position` sees is still in the KV cache: layers with a sliding window forget what is far
    /// behind the last position that was computed.
    fn remembers(&self, _position: usize) -> bool {
        true
    }

    /// Computes a batch and caches its keys and values. Those of every position before it must be cached; those from its
    /// position on are forgotten.
    ///
    /// # Errors
    /// A batch that the limits do not allow or of whose context something is forgotten, and whatever the device meets.
    fn compute(&mut self, batch: Batch) -> Result<Results<'_>>;

    /// As [`compute`](Self::compute), for a backend that takes seconds: `watch` hears of it again and again. `None` where it
    /// broke: the batch's positions, like all behind them, are forgotten.
    ///
    /// # Errors
    /// The same.
    fn compute_watched(&mut self, batch: Batch, _watch: Watch) -> Result<Option<Results<'_>>> {
        self.compute(batch).map(Some)
    }

    /// Whether the device can choose tokens so by itself.
    fn chooses(&self, _sampling: &SamplingParams) -> bool {
        false
    }

    /// Begins a stream of tokens that the device chooses by itself.
    ///
    /// # Errors
    /// Parameters by which it cannot choose, a text that does not fit into the context, and whatever the device meets.
    fn stream(&mut self, _start: &StreamStart) -> Result<Box<dyn TokenStream + '_>> {
        bail!("{} does not choose tokens by itself", self.device())
    }

    /// Where its KV cache keeps what.
    fn kv_layout(&self) -> &KvLayout;

    /// What the KV cache was filled with.
    fn written(&self) -> Written {
        Written::default()
    }

    /// What beside the model, the layout and the lengths of chunks decides about the bits of keys and values, as messages
    /// name it.
    fn arithmetic(&self) -> String {
        self.name().to_owned()
    }

    /// Hands `take` a part of the KV cache as it lies in memory, as far as it was `written`, piece by piece.
    ///
    /// # Errors
    /// What `take` and the device meet.
    fn export_kv(
        &mut self,
        _part: KvPart,
        _written: Written,
        _take: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        bail!("{} does not hand out its KV cache", self.device())
    }

    /// Fills the KV cache with both parts of another one that was `written` so, the rings first. Both were made with the same
    /// model, layout and lengths of chunks, but not for the same context, which has room here for all that was written.
    ///
    /// # Errors
    /// Another number of bytes than such a cache takes, and what the device meets.
    fn import_kv(&mut self, _written: Written, _state: &[u8]) -> Result<()> {
        bail!("{} does not take a KV cache", self.device())
    }

    /// Bytes of weights and KV cache that decoding the token at `position` reads.
    fn bytes_per_token(&self, position: usize) -> u64;

    /// Starts over with the graph, where there may be one: captured anew, or not used for the given reason.
    fn set_graph(&mut self, _disabled: Option<String>) {}

    /// What became of the CUDA graph, where there may be one.
    fn graph_report(&self) -> Option<&GraphReport> {
        None
    }

    /// Starts over with the step kernel, where there may be one, or without it for the given reason.
    fn set_step(&mut self, _disabled: Option<String>) {}

    /// Whether the step kernel computes tokens, where there may be one.
    fn step_report(&self) -> Option<&StepReport> {
        None
    }
}

/// How decoding was launched.
#[derive(Debug, Clone, Default, Serialize)]
pub struct GraphReport {
    /// Whether tokens are decoded by replaying a graph.
    pub enabled: bool,
    pub captures: usize,
    /// Of the latest graph.
    pub nodes: usize,
    /// Tokens that a replay computed.
    pub replays: usize,
    /// Tokens whose kernels were launched one by one.
    pub direct_tokens: usize,
    /// Why there is no graph.
    pub disabled_reason: Option<String>,
}

/// What computes a token.
#[derive(Debug, Clone, Default, Serialize)]
pub struct StepReport {
    /// Whether it is the step kernel, one launch for the whole token, and not separate launches.
    pub enabled: bool,
    /// Why it is separate launches.
    pub disabled_reason: Option<String>,
}

impl Limits {
    /// Of a prompt of which `left` tokens are still to be read, how many the next batch takes.
    pub fn next_len(&self, left: usize) -> usize {
        let behind = left.saturating_sub(self.chunk_len);
        match behind {
            0 => left,
            _ => left - behind.max(self.last_len.min(self.chunk_len)),
        }
    }
}

impl<'a> Batch<'a> {
    /// A piece of a prompt.
    pub fn prompt(tokens: &'a [u32], position: usize, want: Want) -> Self {
        Self {
            tokens,
            position,
            phase: Phase::Prompt,
            want,
            ends_prompt: false,
        }
    }

    /// The last piece of a prompt, for the logits behind it.
    pub fn end_of_prompt(tokens: &'a [u32], position: usize) -> Self {
        Self {
            ends_prompt: true,
            ..Self::prompt(tokens, position, Want::Last)
        }
    }

    /// One token of the text that is being generated.
    pub fn decode(token: &'a u32, position: usize) -> Self {
        Self {
            tokens: std::slice::from_ref(token),
            position,
            phase: Phase::Decode,
            want: Want::Last,
            ends_prompt: false,
        }
    }

    pub fn positions(&self) -> std::ops::Range<usize> {
        self.position..self.position + self.tokens.len()
    }

    /// The batch's tokens that get results, by their index.
    pub fn wanted(&self) -> std::ops::Range<usize> {
        let len = self.tokens.len();
        match self.want {
            Want::Nothing => len..len,
            Want::Last => len - 1..len,
            Want::All => 0..len,
        }
    }

    /// Refuses a batch that a backend of these limits cannot take, or which sees what the backend does not remember.
    pub fn check(&self, limits: Limits, remembered: bool) -> Result<()> {
        let Limits {
            context_len,
            chunk_len,
            results_len,
            vocab_size,
            ..
        } = limits;
        let len = self.tokens.len();
        let most = match (self.phase, self.want) {
            (Phase::Decode, _) => 1,
            (Phase::Prompt, Want::All) => results_len.min(chunk_len),
            (Phase::Prompt, Want::Last | Want::Nothing) => chunk_len,
        };
        ensure!(
            (1..=most).contains(&len),
            "a batch of {len} tokens was to be computed, and 1 to {most} can be"
        );
        ensure!(
            self.position
                .checked_add(len)
                .is_some_and(|end| end <= context_len),
            "{len} tokens from position {} on do not fit into a context of {context_len}",
            self.position
        );
        ensure!(
            remembered,
            "what the token at position {} sees is no longer in the KV cache",
            self.position
        );
        let unknown = |token: &&u32| **token as usize >= vocab_size;
        if let Some(token) = self.tokens.iter().find(unknown) {
            bail!("token {token} is not in the model's vocabulary of {vocab_size}");
        }
        Ok(())
    }
}
