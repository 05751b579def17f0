//! From a prompt to a stream of tokens: the session over a backend, the generation loop and sampling.

mod generate;
mod sampling;
mod session;
mod text_stream;

use anyhow::Result;

pub use generate::{
    FinishReason, GenerateOptions, Generation, Logprobs, Observer, Timings, TokenEvent, generate,
};
pub use sampling::{Sampler, SamplingParams, log_softmax_denominator};
pub use session::Session;
pub use text_stream::TextStream;

/// What computes logits. A backend owns the KV cache; positions before the one asked for must have been computed.
pub trait Backend {
    /// `cpu` or `cuda`.
    fn name(&self) -> &'static str;

    /// The device's own name.
    fn device(&self) -> &str;

    /// Tokens that the KV cache has room for.
    fn context_len(&self) -> usize;

    /// The most tokens that one call takes.
    fn chunk_len(&self) -> usize;

    /// Appends `tokens` (1 to `chunk_len`) to the KV cache at `position` and returns the logits after the last
    /// one: (vocab_size).
    fn forward(&mut self, tokens: &[u32], position: usize) -> Result<&[f32]>;

    /// The same, with the logits after every token: (vocab_size, tokens), vocab_size contiguous.
    fn forward_all(&mut self, tokens: &[u32], position: usize) -> Result<&[f32]>;
}
