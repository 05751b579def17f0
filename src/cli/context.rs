//! How many tokens the KV cache gets room for.

use anyhow::{Result, bail, ensure};
use indicatif::HumanBytes;

use super::{backend::Compute, system};
use crate::{
    backend::{KvFormat, KvLayout, KvOptions},
    cpu,
    model::Decoder,
};

/// What the KV cache takes on the CPU, in bytes.
pub struct CacheSize {
    per_token: u64,
    /// Whatever the context.
    fixed: u64,
}

impl CacheSize {
    pub fn new(decoder: &Decoder, options: KvOptions) -> Self {
        let layout = KvLayout::new(
            decoder,
            usize::MAX,
            cpu::CHUNK_LEN,
            KvFormat::F32,
            options,
            cpu::CHUNK_LEN,
        );
        Self {
            // Where every layer has a sliding window, a longer context takes no more.
            per_token: layout.bytes_per_token().max(1) as u64,
            fixed: layout.ring_bytes() as u64,
        }
    }

    /// For a context of so many tokens.
    pub fn bytes(&self, context_len: usize) -> u64 {
        self.per_token
            .saturating_mul(context_len as u64)
            .saturating_add(self.fixed)
    }

    /// Tokens for which `bytes` are enough.
    fn longest(&self, bytes: u64) -> u64 {
        bytes.saturating_sub(self.fixed) / self.per_token
    }

    /// Tokens of context where nobody asks for any: the length that the model was trained for, as far as the cache takes no
    /// more than half of the memory that is free.
    pub fn automatic(&self, decoder: &Decoder) -> usize {
        let trained = decoder.context_length;
        let room = system::available_memory_bytes().map_or(u64::MAX, |free| self.longest(free / 2));
        let context_len = trained
            .min(usize::try_from(room).unwrap_or(usize::MAX))
            .max(1);
        if context_len < trained {
            tracing::debug!(
                "context: {context_len} of the model's {trained} tokens, the KV cache being held to half of the free memory"
            );
        }
        context_len
    }
}

/// Tokens of context on the CPU: those asked for, or [`CacheSize::automatic`].
///
/// # Errors
/// A context that this machine's memory could never hold.
pub fn choose(compute: &Compute, decoder: &Decoder) -> Result<usize> {
    let size = CacheSize::new(decoder, compute.kv);
    let Some(asked) = compute.context_len else {
        return Ok(size.automatic(decoder));
    };
    if let Some(total) = system::total_memory_bytes() {
        let most = size.longest(total);
        if asked as u64 > most {
            bail!(
                "a context of {asked} tokens ({}): its KV cache takes {} a token, and this machine has {} of memory: at \
                 most {most} fit",
                compute.context_flags,
                HumanBytes(size.per_token),
                HumanBytes(total)
            );
        }
    }
    warn_if_untrained(compute, decoder);
    Ok(asked)
}

/// Refuses a prompt that the context has no room for, and one of no tokens.
pub fn check_prompt(prompt: &[u32], context_len: usize) -> Result<()> {
    ensure!(
        !prompt.is_empty(),
        "the prompt holds no tokens: give it some text"
    );
    ensure!(
        prompt.len() <= context_len,
        "the prompt is {} tokens long, but the context holds {context_len}: shorten it, or raise --ctx-size",
        prompt.len()
    );
    Ok(())
}

/// Says so where the context is longer than the model was trained for.
pub fn warn_if_untrained(compute: &Compute, decoder: &Decoder) {
    if let Some(asked) = compute.context_len
        && asked > decoder.context_length
    {
        tracing::warn!(
            "a context of {asked} tokens ({}) is more than the {} that the model was trained for; the text may become \
             nonsense",
            compute.context_flags,
            decoder.context_length
        );
    }
}
