//! How tokens are chosen, as the host's sampler and a device that chooses by itself share it.

use std::fmt;

use anyhow::{Result, anyhow};

/// How the next token is chosen. The filters apply in llama.cpp's order: penalties, top-k, top-p, min-p, temperature.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; 0 takes the likeliest token.
    pub temperature: f32,
    /// Keeps this many of the likeliest tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the fewest likeliest tokens whose probabilities reach this sum; 1 keeps all.
    pub top_p: f32,
    /// Keeps tokens at least this fraction as likely as the likeliest; 0 keeps all.
    pub min_p: f32,
    /// Divides the positive logits, and multiplies the negative ones, of tokens among the last `repeat_last_n`; 1 is off.
    pub repeat_penalty: f32,
    /// Tokens that the penalties look back on, prompt included.
    pub repeat_last_n: usize,
    /// Subtracted from the logit of every token among them.
    pub presence_penalty: f32,
    /// Subtracted for each time that a token is among them.
    pub frequency_penalty: f32,
    pub seed: u64,
}

impl SamplingParams {
    pub fn has_penalties(&self) -> bool {
        self.repeat_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }
}

impl fmt::Display for SamplingParams {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            temperature,
            top_k,
            top_p,
            min_p,
            repeat_penalty,
            repeat_last_n,
            presence_penalty,
            frequency_penalty,
            seed,
        } = self;
        write!(
            f,
            "temperature {temperature}, top-k {top_k}, top-p {top_p}, min-p {min_p}, "
        )?;
        if self.has_penalties() {
            write!(
                f,
                "penalties over {repeat_last_n} tokens (repeat {repeat_penalty}, presence {presence_penalty}, \
                 frequency {frequency_penalty}), "
            )?;
        }
        write!(f, "seed {seed}")
    }
}

/// A text that goes on with tokens which a device chooses.
#[derive(Debug, Clone, Copy)]
pub struct StreamStart<'a> {
    /// All of it. The last token is the first to compute; keys and values of those before are cached.
    pub text: &'a [u32],
    pub sampling: &'a SamplingParams,
    /// Tokens that are never chosen.
    pub banned: &'a [u32],
    /// For each token to choose one number, from 0 to below 1, that decides among its candidates.
    pub uniforms: &'a [f64],
}

/// Tokens that a device chooses and computes, some of them before they are asked for.
pub trait TokenStream {
    /// The next token, or an error where [`StreamStart::uniforms`] are used up. All tokens before it are computed; what was
    /// computed beyond is as if it had never been.
    ///
    /// # Errors
    /// Logits that are not numbers, and whatever the device meets.
    fn next_token(&mut self) -> Result<u32>;

    /// The next token, one of those that are allowed: bit `i % 32` of word `i / 32` for token `i`, none beyond the
    /// last word, or all. `allowed` is asked while the device computes.
    ///
    /// # Errors
    /// As [`TokenStream::next_token`], what `allowed` meets, and where all that it allows are banned.
    fn next_allowed(
        &mut self,
        allowed: &mut dyn FnMut() -> Result<Option<Vec<u32>>>,
    ) -> Result<u32>;
}

/// The error of logits among which nothing can be chosen.
pub fn not_finite() -> anyhow::Error {
    anyhow!("the model computed logits that are no finite numbers: its weights may be damaged")
}
