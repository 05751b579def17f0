//! From a prompt to a stream of tokens: the session over a backend, the generation loop and sampling.

mod bench;
mod evaluate;
mod generate;
mod sampling;
mod session;
mod text_stream;
mod verify;

use anyhow::Result;
use serde::Serialize;

pub use bench::{Kind, Workload, made_up_tokens, measure};
pub use evaluate::{Divergence, Evaluation, evaluate};
pub use generate::{
    FinishReason, GenerateOptions, Generation, Logprobs, Observer, Timings, TokenEvent, generate,
};
pub use sampling::{Sampler, SamplingParams, log_softmax_denominator};
pub use session::Session;
pub use text_stream::TextStream;
pub use verify::{Comparison, Trace};

/// What computes logits. A backend owns the KV cache; positions before the one asked for must have been computed.
pub trait Backend {
    /// `cpu` or `cuda`.
    fn name(&self) -> &'static str;

    /// The device's own name.
    fn device(&self) -> &str;

    /// Tokens that the KV cache has room for.
    fn context_len(&self) -> usize;

    /// The most tokens that one call of [`Backend::forward`] takes.
    fn chunk_len(&self) -> usize;

    /// The most tokens that one call of [`Backend::forward_all`] takes.
    fn logits_len(&self) -> usize {
        self.chunk_len()
    }

    /// Reads a piece of a prompt: appends `tokens` (1 to `chunk_len`) to the KV cache at `position` and returns the logits
    /// after the last one: (vocab_size).
    fn forward(&mut self, tokens: &[u32], position: usize) -> Result<&[f32]>;

    /// The same for 1 to `logits_len` tokens, with the logits after every one: (vocab_size, tokens), vocab_size contiguous.
    fn forward_all(&mut self, tokens: &[u32], position: usize) -> Result<&[f32]>;

    /// Appends one token of the text that is being generated, and returns the logits after it: (vocab_size). Unlike
    /// [`Backend::forward`], it may trade accuracy for speed.
    fn decode(&mut self, token: u32, position: usize) -> Result<&[f32]> {
        self.forward(&[token], position)
    }

    /// Bytes of weights and KV cache that decoding the token at `position` reads.
    fn bytes_per_token(&self, position: usize) -> u64;

    /// Starts over with the graph, where there may be one: captured anew, or not used for the given reason.
    fn set_graph(&mut self, _ineligible: Option<String>) {}

    /// What became of the CUDA graph, where there may be one.
    fn graph_report(&self) -> Option<&GraphReport> {
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
