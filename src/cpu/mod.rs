//! The CPU backend: float32 activations on exactly dequantized weights.
//!
//! `forward.rs` reads from token ids to logits; what it calls is in files of their own. The same bits come out for
//! every number of threads, every vector width and every way of cutting a prompt into chunks.

mod attention;
mod forward;
mod matmul;
mod ops;
mod processor;
mod rope;
mod simd;
mod workers;

pub use processor::describe_all as describe_processor;

use std::sync::Arc;

use anyhow::{Context, Result, ensure};

use self::{
    attention::KvCache,
    forward::Activations,
    matmul::MatmulScratch,
    rope::Rope,
    simd::{LANES, Lanes},
};
use crate::{engine::Backend, model::Model};

/// Tokens that share one reading of the weights.
const CHUNK_LEN: usize = 128;

/// A worker's own memory.
struct Scratch {
    matmul: MatmulScratch,
    /// (context_len): attention scores
    scores: Vec<Lanes>,
}

type Workers = workers::Workers<Scratch>;

/// Computes logits on the host.
pub struct CpuBackend {
    model: Arc<Model>,
    context_len: usize,
    workers: Workers,
    cache: KvCache,
    rope: Rope,
    activations: Activations,
    device: String,
}

impl CpuBackend {
    /// Allocates the KV cache for `context_len` tokens (float32) and all scratch, and starts `threads` workers
    /// (0: one per core).
    ///
    /// # Errors
    ///
    /// Where there is no memory for the context or the threads cannot be started.
    pub fn new(model: Arc<Model>, context_len: usize, threads: usize) -> Result<Self> {
        let config = &model.config;
        let no_memory = || {
            format!(
                "cannot allocate the KV cache for a context of {context_len} tokens ({} bytes a token)",
                2 * config.block_count * config.head_count_kv * config.head_dim * size_of::<f32>(),
            )
        };
        let cache = KvCache::new(config, context_len).with_context(no_memory)?;
        let rope = Rope::new(
            config.rope_style,
            &model.weights.rope_frequencies,
            CHUNK_LEN,
        )
        .with_context(no_memory)?;
        let activations = Activations::new(config, CHUNK_LEN).with_context(no_memory)?;
        let workers = Workers::new(threads, || Scratch {
            matmul: MatmulScratch::new(CHUNK_LEN),
            scores: vec![Lanes::ZERO; context_len.div_ceil(LANES)],
        })?;
        let device = processor::describe(workers.threads());
        Ok(Self {
            context_len,
            workers,
            cache,
            rope,
            activations,
            device,
            model,
        })
    }

    /// Refuses what a forward pass cannot take.
    fn check(&self, tokens: &[u32], position: usize) -> Result<()> {
        let vocab_size = self.model.config.vocab_size;
        ensure!(
            (1..=CHUNK_LEN).contains(&tokens.len()),
            "a forward pass takes 1 to {CHUNK_LEN} tokens, not {}",
            tokens.len()
        );
        ensure!(
            position
                .checked_add(tokens.len())
                .is_some_and(|end| end <= self.context_len),
            "{} tokens from position {position} on do not fit into a context of {}",
            tokens.len(),
            self.context_len
        );
        if let Some(token) = tokens.iter().find(|token| **token as usize >= vocab_size) {
            anyhow::bail!("token {token} is not in the model's vocabulary of {vocab_size}");
        }
        Ok(())
    }
}

impl Backend for CpuBackend {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn device(&self) -> &str {
        &self.device
    }

    fn context_len(&self) -> usize {
        self.context_len
    }

    fn chunk_len(&self) -> usize {
        CHUNK_LEN
    }

    fn bytes_per_token(&self, position: usize) -> u64 {
        let config = &self.model.config;
        let values = 2 * config.block_count * config.head_count_kv * config.head_dim;
        self.model.weights.bytes_per_token() + (position * values * size_of::<f32>()) as u64
    }

    fn forward(&mut self, tokens: &[u32], position: usize) -> Result<&[f32]> {
        self.check(tokens, position)?;
        Ok(self.compute(tokens, position, tokens.len() - 1..tokens.len()))
    }

    fn forward_all(&mut self, tokens: &[u32], position: usize) -> Result<&[f32]> {
        self.check(tokens, position)?;
        Ok(self.compute(tokens, position, 0..tokens.len()))
    }
}
